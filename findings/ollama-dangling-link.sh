#!/usr/bin/env bash
# One link that leads nowhere takes every model away.
# Expected: a broken entry among the manifests costs that entry alone, as one that does not parse
# does. An alias that is a link to another model's manifest is listed and works.
# What happens: when that other model is deleted, GET /api/tags is a 500, all other models cannot
# be shown, and the alias cannot be deleted by the API: the link must be removed by hand.
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

status() { api "$@" -o answer -w '%{http_code}'; }
tiny one.gguf 0
create original one.gguf
create bystander one.gguf
manifests=$work/models/manifests/registry.ollama.ai/library
mkdir "$manifests/alias"
ln -s ../original/latest "$manifests/alias/latest"
echo "with the alias: list $(status /api/tags), models $(grep -o '"name"' answer | wc -l)"
status /api/delete -X DELETE -d '{"model":"original"}' >/dev/null
list=$(status /api/tags)
head -c 300 answer | sed "s#$work#…#" && echo
show=$(status /api/show -d '{"model":"bystander"}')
delete=$(status /api/delete -X DELETE -d '{"model":"alias"}')
echo "original deleted: list $list, show bystander $show, delete alias $delete"
[[ $list == 500 && $show == 400 && $delete == 404 ]]
rm "$manifests/alias/latest"
echo "link removed by hand: list $(status /api/tags)"
echo "still so: one link that leads nowhere hides all models"
