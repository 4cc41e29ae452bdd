#!/usr/bin/env bash
# Ollama speaks to ollama.com at each start, without being asked.
# Expected: a server that was only started, with no model and no request, connects to nobody.
# What happens: it asks for /api/tags and /api/experimental/model-recommendations there (the latter
# again every four hours). OLLAMA_NO_CLOUD=1 ends both. Here a proxy setting that leads to a closed
# port of this machine makes it visible: nothing goes out.
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

closed=127.0.0.1:$(port)
asks() { # LOG [SETTING…]: the addresses that a start asks for
    OLLAMA_HOST=127.0.0.1:$(port)
    export OLLAMA_HOST
    env "${@:2}" HOME="$work" OLLAMA_MODELS="$work/models" HTTPS_PROXY="http://$closed" \
        "$work/bin/ollama" serve >"$1" 2>&1 &
    pids+=($!)
    curl -s --retry 20 --retry-connrefused --retry-delay 1 "http://$OLLAMA_HOST/api/version"
    echo
    sleep 3
    grep -oE 'https://ollama\.com(:443)?/[a-z/-]+' "$1" | sort -u || true
}
echo "a start:"
asks plain.log >plain.txt # no pipe: the server would be started in a subshell, and stay
cat plain.txt
echo "a start with OLLAMA_NO_CLOUD=1:"
asks quiet.log OLLAMA_NO_CLOUD=1 >quiet.txt
cat quiet.txt
grep -q '/api/tags$' plain.txt
grep -q 'model-recommendations$' plain.txt
if grep -q https quiet.txt; then
    echo "changed: OLLAMA_NO_CLOUD=1 does not stop it"
    exit 1
fi
echo "still so: two addresses of ollama.com, none with OLLAMA_NO_CLOUD=1"
