#!/usr/bin/env bash
# A copy to a name in other letters replaces the model of that name in small ones.
# Expected: on a case-sensitive file system "Report" and "report" are two models, as the list shows
# the letters that were given; or the copy is refused.
# What happens: POST /api/copy to "report" answers 200, no "report" appears, and "Report" is the
# copy now: what it was is gone.
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
create() { # NAME FILE
    local digest
    digest=sha256:$(sha256sum "$2" | cut -d " " -f 1)
    api "/api/blobs/$digest" -T "$2" -X POST
    api /api/create -d "{\"model\":\"$1\",\"files\":{\"x.gguf\":\"$digest\"},\"stream\":false}"
    echo
}

list() {
    api /api/tags | python3 -c 'import json, sys
for model in sorted(json.load(sys.stdin)["models"], key=lambda m: m["name"]):
    print(model["name"], model["digest"][:12])'
}
tiny one.gguf 0
tiny two.gguf 1
create Report one.gguf
create draft two.gguf
echo "before:" && list
before=$(list | grep -i report)
status=$(api /api/copy -d '{"source":"draft","destination":"report"}' -w '%{http_code}')
echo "copy draft to report: $status; after:" && list
draft=$(list | grep draft)
[[ $status == 200 && $(list | grep -ci report) == 1 ]]
[[ $(list | grep -i report) == "Report:latest ${draft#* }" && $before != *"${draft#* }" ]]
echo "still so: Report is what draft is, and report is not listed"
