#!/usr/bin/env bash
# Ollama reads "no" and "off" as true.
# Expected: OLLAMA_NOPRUNE=no and OLLAMA_NO_CLOUD=off leave these switches off, or stop the start.
# What happens: every value that Go's ParseBool does not know counts as true, so both are on, and
# nothing warns of it. Only 0, f and false (in a few spellings) are off. llama-server, which the
# same environment reaches, takes an unknown word for off.
# Versions: Ollama 0.34.4. Date: 2026-11-29. Needs: go, curl, python3.
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
HOME=$work OLLAMA_MODELS=$work/models OLLAMA_NOPRUNE=no OLLAMA_NO_CLOUD=off OLLAMA_SCHED_SPREAD=0 \
    "$work/bin/ollama" serve >ollama.log 2>&1 &
pids+=($!)
curl -s --retry 20 --retry-connrefused --retry-delay 1 "http://$OLLAMA_HOST/api/version"
echo
said=$(grep -oE 'OLLAMA_(NOPRUNE|NO_CLOUD|SCHED_SPREAD):[a-z]+' ollama.log | sort)
echo "set: NOPRUNE=no NO_CLOUD=off SCHED_SPREAD=0; Ollama's log:"
echo "$said"
if grep -iE 'invalid|warn' ollama.log | grep -E 'NOPRUNE|NO_CLOUD' | grep -v 'server config'; then
    echo "changed: it warns now"
    exit 1
fi
[[ $said == $'OLLAMA_NOPRUNE:true\nOLLAMA_NO_CLOUD:true\nOLLAMA_SCHED_SPREAD:false' ]]
echo "still so: no and off are true"
