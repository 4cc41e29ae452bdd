#!/usr/bin/env bash
# A registry's "403 Forbidden" is written into the model's file.
# Expected: when the address that a layer's data comes from answers 403 (as a signed link does that
# is too old), the pull ends with an error that tells of the 403.
# What happens: the status is not looked at. The error page is taken for the data, and the error is
# a "digest mismatch", which sends people to look for a bad disk. (A page shorter than the layer ends
# in "max retries exceeded: EOF" after a minute instead.) The file is removed: nothing wrong stays.
# Versions: Ollama 0.34.4, gguf 0.19.0. Date: 2026-11-29. Needs: go, curl, python3 with venv.
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

tiny tiny.gguf 0
cat >registry.py <<"PYTHON"
"""A registry of one model: what its path's namespace says decides how the data comes."""
import hashlib, http.server, json, re, sys

port = int(sys.argv[1])
data = {}
def blob(kind, content):
    digest = "sha256:" + hashlib.sha256(content).hexdigest()
    data[digest] = content
    return {"mediaType": kind, "digest": digest, "size": len(content)}

config = {"model_format": "gguf", "model_family": "llama", "os": "linux", "architecture": "amd64"}
manifest = json.dumps({
    "schemaVersion": 2,
    "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
    "config": blob("application/vnd.docker.container.image.v1+json", json.dumps(config).encode()),
    "layers": [blob("application/vnd.ollama.image.model", open("tiny.gguf", "rb").read())],
}).encode()

class Registry(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        digest = self.path.rsplit("/", 1)[1]
        if "/manifests/" in self.path:
            self.answer(200, manifest)
        elif self.command == "HEAD":
            self.answer(200, data[digest])
        elif self.path.startswith("/v2/"):
            folder = self.path.split("/")[2]
            self.answer(307, b"", f"http://127.0.0.1:{port}/{folder}/{digest}")
        elif self.path.startswith("/expired/"):
            page = "<html><head><title>403 Forbidden</title></head>" + "<p>The link is too old.</p>" * 50
            self.answer(403, page.encode())
        else:
            first, last = re.match(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups()
            self.answer(206, data[digest][int(first) : int(last) + 1])
    do_HEAD = do_GET
    def answer(self, status, body, location=None):
        print(self.command, self.path, status, flush=True)
        self.send_response(status)
        if location:
            self.send_header("Location", location)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
    def log_message(self, *_):
        pass

http.server.ThreadingHTTPServer(("127.0.0.1", port), Registry).serve_forever()
PYTHON
name=localhost:$(port)
python3 registry.py "${name#*:}" >registry.log &
pids+=($!)
curl -s --retry 20 --retry-connrefused --retry-delay 1 "http://$name/v2/fine/tiny/manifests/x" >first
pull() { # NAMESPACE
    api /api/pull -d "{\"model\":\"$name/$1/tiny\",\"insecure\":true,\"stream\":false}"
    echo
}

said=$(pull expired)
echo "the address of the data answers 403: $said"
grep -m 1 ' 403' registry.log
[[ $said == *"digest mismatch"* && $said != *" 403"* && $said != *Forbidden* ]]
said=$(pull fine)
echo "it answers with the data: $said"
[[ $said == *success* ]]
echo "still so: the 403 is not named"
