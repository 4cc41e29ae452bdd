#!/usr/bin/env bash
# The same Ollama answers nginx by its address, and refuses it by an upstream's name.
# Expected: giving an address a name (upstream llm { server 127.0.0.1:11434; }) changes nothing.
# What happens: 403 with an empty body for every request. nginx sends the name in proxy_pass as the
# Host header, and an Ollama on loopback takes only localhost, addresses and the machine's own names.
# Neither log tells the reason. proxy_set_header Host localhost (as Ollama's FAQ has it) mends it.
# Versions: Ollama 0.34.4, nginx 1.22.1 (Debian 12). Date: 2026-11-29.
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


apt-get download -qq 'nginx=1.22.1-*' 2>/dev/null
dpkg-deb -x nginx_*.deb nginx
named=$(port) direct=$(port) mended=$(port)
cat >nginx.conf <<NGINX
daemon off;
pid $work/nginx.pid;
events {}
http {
    access_log off;
    client_body_temp_path $work/body;
    proxy_temp_path $work/proxy;
    fastcgi_temp_path $work/fastcgi;
    uwsgi_temp_path $work/uwsgi;
    scgi_temp_path $work/scgi;
    upstream llm { server $OLLAMA_HOST; }
    server { listen 127.0.0.1:$named; location / { proxy_pass http://llm; } }
    server { listen 127.0.0.1:$direct; location / { proxy_pass http://$OLLAMA_HOST; } }
    server {
        listen 127.0.0.1:$mended;
        location / { proxy_pass http://llm; proxy_set_header Host localhost; }
    }
}
NGINX
nginx/usr/sbin/nginx -v
nginx/usr/sbin/nginx -p "$work" -e "$work/error.log" -c "$work/nginx.conf" &
pids+=($!)
ask() {
    curl -s --retry 20 --retry-connrefused --retry-delay 1 -w ' %{http_code} %{size_download}\n' \
        "http://127.0.0.1:$1/api/version"
}
echo "upstream by name:       $(ask "$named" | tee named.txt)"
echo "by address:             $(ask "$direct" | tee direct.txt)"
echo "by name, Host localhost: $(ask "$mended" | tee mended.txt)"
[[ $(cat named.txt) == " 403 0" && $(cat direct.txt mended.txt | grep -c ' 200 ') == 2 ]]
echo "still so: the upstream's name is refused"
