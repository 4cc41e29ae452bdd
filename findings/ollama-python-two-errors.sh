#!/usr/bin/env bash
# Ollama's Python client says in two ways that it reaches no server, and a streamed call says nothing.
# Expected: client.pull(name) and client.pull(name, stream=True) fail alike when nothing listens, and
# at the call.
# What happens: the first raises Python's ConnectionError. The second returns: nothing is sent until
# the first line is read, and then it raises httpx.ConnectError, which is no ConnectionError (nor an
# OSError), so the same "except ConnectionError" lets it pass. A pull whose lines nobody reads never
# begins.
# Versions: ollama 0.6.3 (PyPI), httpx 0.28.1. Date: 2026-11-29. Needs: python3 with venv.
set -euo pipefail

work=$(mktemp -d)
leave() {
    local rc=$?
    ((rc == 0)) || echo "the finding did not show: it changed, or something is missing here" >&2
    rm -rf "$work"
}
trap leave EXIT
cd "$work"

python3 -m venv venv
venv/bin/pip install -q --disable-pip-version-check ollama==0.6.3 httpx==0.28.1
venv/bin/python - <<"PYTHON" | tee said.txt
import socket
from importlib.metadata import version
import ollama

print("ollama", version("ollama"), "httpx", version("httpx"))
with socket.create_server(("127.0.0.1", 0)) as listener:
    port = listener.getsockname()[1]  # closed again: nothing listens there
client = ollama.Client(f"http://127.0.0.1:{port}", trust_env=False)
def told(call):
    try:
        call()
    except Exception as error:
        kind = type(error)
        return f"{kind.__module__}.{kind.__name__}, a ConnectionError: {issubclass(kind, ConnectionError)}"
    return "no error"

print("plain call:", told(lambda: client.pull("tiny")))
print("streamed call:", told(lambda: client.pull("tiny", stream=True)))
print("first line read:", told(lambda: next(client.pull("tiny", stream=True))))
PYTHON
grep -qx 'plain call: builtins.ConnectionError, a ConnectionError: True' said.txt
grep -qx 'streamed call: no error' said.txt
grep -qx 'first line read: httpx.ConnectError, a ConnectionError: False' said.txt
echo "still so: two errors, and none at the streamed call"
