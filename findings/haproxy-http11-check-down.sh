#!/usr/bin/env bash
# HAProxy's health check marks a healthy Ollama DOWN when it is asked to speak HTTP/1.1.
# Expected: "option httpchk GET /api/version" and the same with HTTP/1.1 give the same result.
# What happens: HAProxy sends an HTTP/1.1 request without Host, which Go's server refuses: 400
# "missing required Host header", so the server is DOWN. With HTTP/1.0 (its default) it is UP, and
# with a Host header as well.
# Versions: Ollama 0.34.4, HAProxy 2.6.12 (Debian 12). Date: 2026-11-29.
# Needs: go, curl, python3, apt-get with its lists (Debian 12), dpkg-deb.
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


apt-get download -qq 'haproxy=2.6.12-*' liblua5.3-0 libopentracing-c-wrapper0 libopentracing1 2>/dev/null
for package in *.deb; do
    dpkg-deb -x "$package" haproxy
done
LD_LIBRARY_PATH=$(printf '%s:' haproxy/usr/lib/*-linux-gnu)
export LD_LIBRARY_PATH
cat >haproxy.cfg <<HAPROXY
global
    stats socket $work/stats
defaults
    mode http
    timeout connect 2s
    timeout client 5s
    timeout server 5s
backend http10
    option httpchk GET /api/version
    server ollama $OLLAMA_HOST check inter 300ms
backend http11
    option httpchk GET /api/version HTTP/1.1
    server ollama $OLLAMA_HOST check inter 300ms
backend http11-with-host
    option httpchk
    http-check send meth GET uri /api/version ver HTTP/1.1 hdr Host localhost
    server ollama $OLLAMA_HOST check inter 300ms
HAPROXY
haproxy/usr/sbin/haproxy -v | sed -n 1p
haproxy/usr/sbin/haproxy -db -f haproxy.cfg >haproxy.log 2>&1 &
pids+=($!)
sleep 4
python3 - "$work/stats" <<"PYTHON" | tee states.txt
import csv, io, socket, sys

line = socket.socket(socket.AF_UNIX)
line.connect(sys.argv[1])
line.sendall(b"show stat\n")
text = b"".join(iter(lambda: line.recv(65536), b"")).decode().removeprefix("# ")
for row in csv.DictReader(io.StringIO(text)):
    if row["svname"] == "ollama":
        print(row["pxname"], row["status"], row["check_code"], row["last_chk"])
PYTHON
grep -q '^http10 UP 200' states.txt
grep -q '^http11 DOWN 400 .*missing required Host header' states.txt
grep -q '^http11-with-host UP 200' states.txt
echo "still so: HTTP/1.1 without Host is DOWN"
