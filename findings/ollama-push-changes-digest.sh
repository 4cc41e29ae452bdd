#!/usr/bin/env bash
# A model has another digest where it was made than where it was pushed to.
# Expected: the digest in /api/tags of a model that was created here and pushed is the registry's, so
# that it can be compared to tell whether there is an update.
# What happens: the file here ends with a line feed, what is sent does not. The registry's digest is
# another one; the first pull of the same, unchanged model changes the digest in /api/tags.
# Versions: Ollama 0.34.4, docker-registry 2.8.2 (Debian 12), gguf 0.19.0. Date: 2026-11-29.
# Needs: go, curl, python3 with venv, apt-get with its lists (Debian 12), dpkg-deb.
set -euo pipefail

work=$(mktemp -d)
pids=()
leave() {
    local rc=$?
    ((rc == 0)) || echo "the finding did not show: it changed, or something is missing here" >&2
    kill "${pids[@]}" 2>/dev/null || true
    wait
    rm -rf "$work"
}
trap leave EXIT
cd "$work"

GOBIN=$work/bin go install -ldflags "-X=github.com/ollama/ollama/version.Version=0.34.4" \
    github.com/ollama/ollama@v0.34.4
port() { # a free one
    python3 -c 'import socket; print(socket.create_server(("127.0.0.1", 0)).getsockname()[1])'
}

OLLAMA_HOST=127.0.0.1:$(port)
export OLLAMA_HOST
HOME=$work OLLAMA_MODELS=$work/models OLLAMA_NO_CLOUD=1 "$work/bin/ollama" serve >ollama.log 2>&1 &
pids+=($!)
api() { curl -sS "http://$OLLAMA_HOST$1" "${@:2}"; }
curl -s --retry 20 --retry-connrefused --retry-delay 1 "http://$OLLAMA_HOST/api/version" && echo

python3 -m venv venv
venv/bin/pip install -q --disable-pip-version-check gguf==0.19.0
tiny() { # FILE [FILE_TYPE]: one float tensor and what Ollama wants to know of a model
    venv/bin/python - "$@" <<"PYTHON"
import sys
import gguf
import numpy as np

writer = gguf.GGUFWriter(sys.argv[1], "llama")
writer.add_block_count(1)
writer.add_context_length(64)
writer.add_embedding_length(32)
if len(sys.argv) > 2:
    writer.add_file_type(int(sys.argv[2]))
writer.add_tensor("token_embd.weight", np.ones((4, 32), np.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
PYTHON
}
create() { # NAME FILE
    local digest
    digest=sha256:$(sha256sum "$2" | cut -d " " -f 1)
    api "/api/blobs/$digest" -T "$2" -X POST
    api /api/create -d "{\"model\":\"$1\",\"files\":{\"x.gguf\":\"$digest\"},\"stream\":false}"
    echo
}

apt-get download -qq 'docker-registry=2.8.2+*' 2>/dev/null
dpkg-deb -x docker-registry_*.deb registry
name=localhost:$(port)
cat >registry.yml <<YAML
version: 0.1
storage: {filesystem: {rootdirectory: $work/store}}
http: {addr: "${name/localhost/127.0.0.1}"}
YAML
registry/usr/bin/docker-registry --version
registry/usr/bin/docker-registry serve registry.yml >registry.log 2>&1 &
pids+=($!)
curl -s --retry 20 --retry-connrefused --retry-delay 1 "http://$name/v2/"
model=$name/shelf/tiny
digest() {
    api /api/tags | python3 -c 'import json, sys
print("sha256:" + json.load(sys.stdin)["models"][0]["digest"])'
}
tiny one.gguf 0
create "$model" one.gguf
made=$(digest)
api /api/push -d "{\"model\":\"$model\",\"insecure\":true,\"stream\":false}" && echo
there=$(curl -sSI -H 'Accept: application/vnd.docker.distribution.manifest.v2+json' \
    "http://$name/v2/shelf/tiny/manifests/latest" |
    tr -d '\r' | sed -n 's/^Docker-Content-Digest: //p')
api /api/pull -d "{\"model\":\"$model\",\"insecure\":true,\"stream\":false}" && echo
pulled=$(digest)
printf '%s\n' "created  $made" "registry $there" "pulled   $pulled"
[[ $there == sha256:* && $made != "$there" && $pulled == "$there" ]]
echo "still so: pushing makes another digest of the same model"
