#!/usr/bin/env bash
# Ollama's quantization_level is what a file says of itself.
# Expected: the level in /api/tags and /api/show is found from the tensors, as the size is.
# What happens: it is the key general.file_type alone. A file whose only tensor is 32-bit floats is
# a Q4_0 if it says so, and "unknown" if it says nothing. (Tools that write GGUF by hand often leave
# the key out or copy it.)
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

level() { # NAME
    api /api/show -d "{\"model\":\"$1\"}" |
        python3 -c 'import json, sys; print(json.load(sys.stdin)["details"]["quantization_level"])'
}
tiny says-q4.gguf 2 # LLAMA_FTYPE_MOSTLY_Q4_0
tiny says-nothing.gguf
create says-q4 says-q4.gguf
create says-nothing says-nothing.gguf
said="$(level says-q4) $(level says-nothing)"
echo "two files of 32-bit floats are: $said"
[[ $said == "Q4_0 unknown" ]]
echo "still so: the level is a claim"
