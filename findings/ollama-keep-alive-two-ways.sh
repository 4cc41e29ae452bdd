#!/usr/bin/env bash
# OLLAMA_KEEP_ALIVE=-1 keeps a model for ever, and "keep_alive": "-1" is an error.
# Expected: what the environment takes, a request takes as well, and what makes no sense is refused
# by both or by neither.
# What happens: the environment takes seconds without a unit (-1, 600). In a request they must be a
# number; as a text, which is what a template or a form makes of them, they are a 400 ("missing unit in
# duration"), but for "0". With "1d" it is the other way round: a request is a 400, and the
# environment falls back to 5 minutes without a word, so a model that was to stay a day goes.
# Versions: Ollama 0.34.4. Date: 2026-11-30. Needs: go, curl, python3.
set -euo pipefail

work=$(mktemp -d)
server=''
leave() {
    local rc=$?
    ((rc == 0)) || echo "the finding did not show: it changed, or something is missing here" >&2
    [[ -z $server ]] || kill "$server" 2>/dev/null || true
    wait
    rm -rf "$work"
}
trap leave EXIT
cd "$work"

GOBIN=$work/bin go install -ldflags "-X=github.com/ollama/ollama/version.Version=0.34.4" \
    github.com/ollama/ollama@v0.34.4
OLLAMA_HOST=127.0.0.1:$(python3 -c 'import socket; print(socket.create_server(("127.0.0.1", 0)).getsockname()[1])')
export OLLAMA_HOST OLLAMA_NO_CLOUD=1

start() { # KEEP_ALIVE: for the environment
    HOME=$work OLLAMA_MODELS=$work/models OLLAMA_KEEP_ALIVE=$1 "$work/bin/ollama" serve >ollama.log 2>&1 &
    server=$!
    curl -s -o version --retry 20 --retry-connrefused --retry-delay 1 "http://$OLLAMA_HOST/api/version"
}
in_environment() { # KEEP_ALIVE: sets `taken`, what the server takes it for; and it must not warn
    start "$1"
    kill "$server"
    wait "$server" || true
    server=''
    if grep -i 'warn\|invalid' ollama.log | grep -v 'server config' | grep -qi 'keep.alive'; then
        echo "changed: it warns of OLLAMA_KEEP_ALIVE=$1 now"
        exit 1
    fi
    taken=$(grep -oE 'OLLAMA_KEEP_ALIVE:[^ ]+' ollama.log | cut -d : -f 2)
}
in_request() { # JSON: 404 where it was taken, as there is no such model
    curl -s -o answer -w '%{http_code}' "http://$OLLAMA_HOST/api/generate" -d '{"model": "none", "keep_alive": '"$1"'}'
}

found=''
for value in -1 600 1d; do
    in_environment "$value"
    found+="environment $value: $taken"$'\n'
done
start 5m
for value in -1 '"-1"' 600 '"600"' '"0"' '"1d"'; do
    found+="request $value: $(in_request "$value")"$'\n'
done
printf '%s' "$found"
[[ $found == 'environment -1: 2562047h47m16.854775807s
environment 600: 10m0s
environment 1d: 5m0s
request -1: 404
request "-1": 400
request 600: 404
request "600": 400
request "0": 404
request "1d": 400
' ]]
echo "still so: the same value means two things"
