#!/usr/bin/env bash
# skopeo reads nothing of what Ollama pushes.
# Expected: a model in a registry is an image to the tools for images: its manifest says
# application/vnd.docker.distribution.manifest.v2+json, so inspect shows it and copy mirrors it.
# What happens: both fail ("unsupported docker v2s2 media type"), as each layer has a type of Ollama's
# own. Only inspect --raw without --config works, so one mirrors models by pull and push.
# Versions: Ollama 0.34.4, docker-registry 2.8.2 and skopeo 1.9.3 (Debian 12), gguf 0.19.0.
# Date: 2026-11-29.
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
tiny one.gguf 0
create "$model" one.gguf
api /api/push -d "{\"model\":\"$model\",\"insecure\":true,\"stream\":false}" && echo

apt-get download -qq 'skopeo=1.9.3+*' golang-github-containers-common \
    libgpgme11 libassuan0 libdevmapper1.02.1 2>/dev/null
for package in skopeo_*.deb golang*.deb lib*.deb; do
    dpkg-deb -x "$package" skopeo
done
LD_LIBRARY_PATH=$(printf '%s:' skopeo/usr/lib/*-linux-gnu skopeo/lib/*-linux-gnu)
export LD_LIBRARY_PATH
skopeo() { skopeo/usr/bin/skopeo --policy skopeo/etc/containers/policy.json "$@"; }
skopeo --version
skopeo inspect --raw --tls-verify=false "docker://$model" && echo
refused() {
    local said
    if said=$("$@" 2>&1); then
        echo "changed: it works now: $*"
        exit 1
    fi
    echo "$1 $2: $said"
    [[ $said == *"unsupported docker v2s2 media type"*ollama* ]]
}
refused skopeo inspect --tls-verify=false "docker://$model"
refused skopeo copy --src-tls-verify=false "docker://$model" "dir:$work/copy"
echo "still so: raw only"
