"""Proxies, each with the configuration that the README advises. Debian packages all but Traefik.

TLS is ended, but by Varnish, which has none, with a certificate of an authority of its own.
`{port}`, `{upstream}`, `{folder}` and others are filled in; `{host}` is what decides on `Host`.
A path below /llm/ is passed on without that prefix.
"""

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import typing

import pytest
import trustme

from helpers.places import MARK
from helpers.ports import free_port
from helpers.processes import mark
from helpers.waiting import call, wait_for

NAME = "llm.example"
NO_TLS = ("varnishd",)
PATH = f"{os.environ['PATH']}:/usr/local/sbin:/usr/sbin:/sbin"

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
    {host}
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
        reverse_proxy 127.0.0.1:{upstream} {{
            {host}
        }}
    }}
    reverse_proxy 127.0.0.1:{upstream} {{
        {host}
    }}
}}
"""
TRAEFIK = """
tls: {{certificates: [{{certFile: {folder}/both.pem, keyFile: {folder}/both.pem}}]}}
http:
  routers:
    llm: {{rule: "PathPrefix(`/`)", entryPoints: [websecure], tls: {{}}, service: llm}}
    under:
      rule: "PathPrefix(`/llm/`)"
      entryPoints: [websecure]
      tls: {{}}
      service: llm
      middlewares: [strip]
  middlewares:
    strip: {{stripPrefix: {{prefixes: [/llm]}}}}
  services:
    llm: {{loadBalancer: {{servers: [{{url: "http://127.0.0.1:{upstream}"}}], {host}}}}}
"""
LIGHTTPD = """
server.document-root = "{folder}"
server.bind = "127.0.0.1"
server.port = {port}
server.modules = ("mod_openssl", "mod_proxy")
server.stream-response-body = 1
ssl.engine = "enable"
ssl.pemfile = "{folder}/both.pem"
proxy.server = ("" => (("host" => "127.0.0.1", "port" => {upstream})))
proxy.header = ({host})
$HTTP["url"] =~ "^/llm/" {{
    proxy.header = ("map-urlpath" => ("/llm/" => "/"), {host})
}}
"""
SQUID = """
pid_filename none
pinger_enable off
shutdown_lifetime 0 seconds
visible_hostname {name}
https_port 127.0.0.1:{port} accel vhost defaultsite={name} tls-cert={folder}/both.pem
cache_peer 127.0.0.1 parent {upstream} 0 no-query no-digest originserver {host}
never_direct allow all
http_access allow all
cache deny all
access_log none
cache_log stdio:/dev/stderr
url_rewrite_program /bin/sed -u {rewrite}
"""
# A line begins with the address, and ends with who asks. Squid takes no parentheses.
REWRITE = r"/^\w*:..[^/]*.llm./!s/.*/ERR/;t;s,/llm/,/,;s/\s.*//;s/^/OK\x20rewrite-url=/"
VARNISH = """
vcl 4.1;
backend llm {{ .host = "127.0.0.1"; .port = "{upstream}"; }}
sub vcl_recv {{
    set req.url = regsub(req.url, "^/llm/", "/");
    {host}
    return (pass);
}}
"""


class Kind(typing.NamedTuple):
    """How one is configured and called, and the words with which it does as it does not by itself.

    Those pass the browser's Host on (nginx and Apache put the upstream's address there), or send
    the upstream's address in its place.
    """

    configuration: str
    command: str
    passes_host: str = ""
    rewrites_host: str = ""


KINDS = {
    "nginx": Kind(
        NGINX,
        "nginx -p {folder} -c {file}",
        passes_host="proxy_set_header Host $http_host;",
    ),
    "haproxy": Kind(
        HAPROXY,
        "haproxy -f {file}",
        rewrites_host="http-request set-header Host 127.0.0.1:{upstream}",
    ),
    "apache2": Kind(
        APACHE,
        "apache2 -DFOREGROUND -f {file}",
        passes_host="ProxyPreserveHost on",
    ),
    "caddy": Kind(
        CADDY,
        "caddy run --adapter caddyfile --config {file}",
        rewrites_host="header_up Host {{upstream_hostport}}",
    ),
    "traefik": Kind(
        TRAEFIK,
        "traefik --providers.file.filename={file} --entrypoints.websecure.address=127.0.0.1:{port}"
        " --global.checknewversion=false",
        rewrites_host="passHostHeader: false",
    ),
    "lighttpd": Kind(
        LIGHTTPD,
        "lighttpd -D -f {file}",
        rewrites_host='"map-host-request" => ("-" => "127.0.0.1:{upstream}")',
    ),
    "squid": Kind(
        SQUID,
        "squid -N -d 1 -f {file}",
        rewrites_host="forceddomain=127.0.0.1",
    ),
    "varnishd": Kind(
        VARNISH,
        "varnishd -F -j none -n {folder} -f {file} -s malloc,8m -a 127.0.0.1:{port}",
        rewrites_host='set req.http.Host = "127.0.0.1:{upstream}";',
    ),
}


class Proxy:
    """A proxy before an upstream's port: .port .host (NAME and the port) .url .log()

    rewrites_host   True: the upstream's address goes on as Host, not the browser's
    """

    def __init__(self, kind, folder, upstream, rewrites_host=False):
        one = KINDS[kind]
        if not shutil.which(kind, path=PATH):
            pytest.skip(f"no {kind}: tests/README.md says where it comes from")
        self.port = free_port()
        self.host = f"{NAME}:{self.port}"
        self.url = f"{'http' if kind in NO_TLS else 'https'}://{self.host}"
        self._logfile = folder / "proxy.log"
        self._authority = folder / "authority.pem"
        _write_certificates(folder)
        file = folder / "proxy.yaml"  # Traefik goes by the name
        names = {"folder": folder, "port": self.port, "upstream": upstream, "name": NAME}
        names |= {"modules": _apache_modules(), "rewrite": REWRITE, "file": file}
        names["host"] = (one.rewrites_host if rewrites_host else one.passes_host).format(**names)
        file.write_text(one.configuration.format(**names))
        with open(self._logfile, "w") as log:
            self.process = subprocess.Popen(
                one.command.format(**names).split(),
                env={"PATH": PATH, "HOME": str(folder), MARK: mark(self.port)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        wait_for(self._passes_on, 60, f"{kind} passes a call on")

    def call(self, method, path, **headers):
        """Send a request by name, with {} where it has a body."""
        url = self.url.replace(NAME, "127.0.0.1") + path
        options = {"headers": {"Host": self.host, **headers}, "verify": str(self._authority)}
        return call(method, url, **options, **({"json": {}} if method == "POST" else {}))

    def stream(self, method, path, body=None):
        """Give the answer to a request by name; at the end the caller has left."""
        context = None
        if self.url.startswith("https"):
            context = ssl.create_default_context(cafile=self._authority)
        return stream_of(self.port, method, path, body, {"Host": self.host}, context)

    def log(self):
        return self._logfile.read_text(errors="replace")

    def close(self):
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _passes_on(self):
        assert self.process.poll() is None, self.log()
        return self.call("GET", "/").ok


@contextlib.contextmanager
def stream_of(port, method, path, body, headers, tls=None):
    """Give the answer to a request; at the end the caller has left."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.connect()
    if tls:
        connection.sock = tls.wrap_socket(connection.sock, server_hostname=NAME)
    with connection.sock as client:
        connection.request(method, path, body and json.dumps(body), headers)
        yield connection.getresponse()
        client.shutdown(socket.SHUT_RDWR)  # the answer has the socket, too


def _write_certificates(folder):
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "authority.pem")
    issued = authority.issue_cert(NAME, "127.0.0.1")
    issued.private_key_and_cert_chain_pem.write_to_path(folder / "both.pem")


def _apache_modules():
    folder = "/usr/lib/apache2/modules"
    lines = (f"LoadModule {name}_module {folder}/mod_{name}.so" for name in MODULES.split())
    return "\n".join(lines)
