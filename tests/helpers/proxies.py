"""Proxies as Debian packages them, each with the configuration that the README advises.

TLS is ended with a certificate of an authority of its own. `{port}`, `{upstream}` and `{folder}`
are filled in; a path below /llm/ is passed on without that prefix.
"""

import shutil
import signal
import socket
import subprocess

import pytest
import trustme

from helpers.places import MARK
from helpers.ports import free_port
from helpers.processes import mark
from helpers.waiting import call, wait_for

NAME = "llm.example"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

NGINX = """
daemon off; master_process off; pid {folder}/pid; error_log stderr; user root;
events {{}}
http {{
    access_log off; client_body_temp_path {folder}/b; proxy_temp_path {folder}/p;
    fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
    server {{
        listen 127.0.0.1:{port} ssl;
        ssl_certificate {folder}/both.pem; ssl_certificate_key {folder}/both.pem;
        proxy_http_version 1.1;
        {host}
        proxy_buffering off; proxy_read_timeout 15m;
        location / {{ proxy_pass http://127.0.0.1:{upstream}; }}
        location /llm/ {{ proxy_pass http://127.0.0.1:{upstream}/; }}
    }}
}}
"""
HAPROXY = """
defaults
    mode http
    option http-no-delay
    timeout connect 2s
    timeout client 15m
    timeout server 15m
frontend llm
    bind 127.0.0.1:{port} ssl crt {folder}/both.pem
    http-request replace-path ^/llm/(.*) /\\1
    default_backend llm
backend llm
    server llm 127.0.0.1:{upstream}
"""
APACHE = """
ServerName {name}
ServerRoot {folder}
PidFile {folder}/pid
ErrorLog /dev/stderr
DefaultRuntimeDir {folder}
{modules}
Listen 127.0.0.1:{port}
SSLEngine on
SSLCertificateFile {folder}/both.pem
SSLSessionCache none
{host}
ProxyPass /llm/ http://127.0.0.1:{upstream}/ flushpackets=on
ProxyPass / http://127.0.0.1:{upstream}/ flushpackets=on
"""
MODULES = "mpm_event authz_core socache_shmcb ssl proxy proxy_http"
CADDY = """
{{
    admin off
    auto_https off
}}
https://:{port} {{
    tls {folder}/both.pem {folder}/both.pem
    handle_path /llm/* {{
        reverse_proxy 127.0.0.1:{upstream}
    }}
    reverse_proxy 127.0.0.1:{upstream}
}}
"""
# How each is called with its configuration in {folder}/configuration.
KINDS = {
    "nginx": (NGINX, "nginx -p {folder} -c {folder}/configuration"),
    "haproxy": (HAPROXY, "haproxy -f {folder}/configuration"),
    "apache2": (APACHE, "apache2 -DFOREGROUND -f {folder}/configuration"),
    "caddy": (CADDY, "caddy run --adapter caddyfile --config {folder}/configuration"),
}
# nginx and Apache put the upstream's own address into Host, unless they are told not to.
PASSES_HOST = {"nginx": "proxy_set_header Host $http_host;", "apache2": "ProxyPreserveHost on"}


class Proxy:
    """A proxy before an upstream's port: .port .host (NAME and the port) .log()

    rewrites_host   True: as nginx and Apache do it where nobody says otherwise
    """

    def __init__(self, kind, folder, upstream, rewrites_host=False):
        configuration, command = KINDS[kind]
        if not shutil.which(command.split()[0], path=PATH):
            pytest.skip(f"no {kind}: apt-get install nginx-light haproxy apache2 caddy")
        self.port = free_port()
        self.host = f"{NAME}:{self.port}"
        self._logfile = folder / "proxy.log"
        self._authority = folder / "authority.pem"
        _write_certificates(folder)
        host = "" if rewrites_host else PASSES_HOST.get(kind, "")
        names = {"folder": folder, "port": self.port, "upstream": upstream, "name": NAME}
        names |= {"host": host, "modules": _apache_modules()}
        (folder / "configuration").write_text(configuration.format(**names))
        with open(self._logfile, "w") as log:
            self.process = subprocess.Popen(
                command.format(**names).split(),
                env={"PATH": PATH, "HOME": str(folder), MARK: mark(self.port)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        wait_for(self._listens, 20, f"{kind} listens")

    def call(self, method, path, **headers):
        """Send a request by name, with {} where it has a body."""
        url = f"https://127.0.0.1:{self.port}{path}"
        options = {"headers": {"Host": self.host, **headers}, "verify": str(self._authority)}
        return call(method, url, **options, **({"json": {}} if method == "POST" else {}))

    def log(self):
        return self._logfile.read_text(errors="replace")

    def close(self):
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _listens(self):
        assert self.process.poll() is None, self.log()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0


def _write_certificates(folder):
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "authority.pem")
    issued = authority.issue_cert(NAME, "127.0.0.1")
    issued.private_key_and_cert_chain_pem.write_to_path(folder / "both.pem")


def _apache_modules():
    folder = "/usr/lib/apache2/modules"
    lines = (f"LoadModule {name}_module {folder}/mod_{name}.so" for name in MODULES.split())
    return "\n".join(lines)
