"""Questions to other machines: by which proxy, trusting whom, for how long."""

import contextlib
import socket
import socketserver
import threading
import urllib.parse

import pytest

from helpers.faults import Silent, answer, cut, speak
from helpers.ports import free_port
from helpers.registry import Registry
from helpers.tls import NOWHERE
from llm_service.errors import ServiceError
from llm_service.network import (
    ANSWER_LIMIT_BYTES,
    Conversation,
    proxy_for,
    proxy_headers,
    tls_context,
)

PROXY = "http://proxy.example:3128"


def proxy(url, **environment):
    found = proxy_for(urllib.parse.urlsplit(url), environment)
    return found and found.geturl()


@pytest.mark.parametrize(
    "url, environment, expected",
    [
        ("https://r.example/v2/", {}, None),
        ("https://r.example/v2/", {"HTTPS_PROXY": PROXY}, PROXY),
        ("https://r.example/v2/", {"https_proxy": PROXY}, PROXY),
        ("https://r.example/v2/", {"HTTPS_PROXY": PROXY, "https_proxy": "http://no"}, PROXY),
        ("https://r.example/v2/", {"HTTPS_PROXY": "", "https_proxy": PROXY}, PROXY),
        ("https://r.example/v2/", {"HTTPS_PROXY": "proxy.example:3128"}, PROXY),
        ("https://r.example/v2/", {"HTTP_PROXY": PROXY, "ALL_PROXY": PROXY}, None),
        ("http://r.example/v2/", {"HTTP_PROXY": PROXY}, PROXY),
        ("http://r.example/v2/", {"HTTPS_PROXY": PROXY}, None),
    ],
)
def test_the_proxy_is_the_one_of_the_scheme(url, environment, expected):
    assert proxy(url, **environment) == expected


@pytest.mark.parametrize("host", ["localhost", "localhost:5000", "127.0.0.1:5000", "[::1]:5000"])
def test_this_machine_is_asked_without_a_proxy(host):
    assert proxy(f"https://{host}/v2/", HTTPS_PROXY=PROXY) is None


# Of each the first that Go's httpproxy takes for the same; tried with golang.org/x/net 0.46.
@pytest.mark.parametrize(
    "no_proxy, passed_by, asked_by_proxy",
    [
        ("*", "r.example 10.1.2.3", ""),
        ("r.example", "r.example a.r.example r.example:5000 R.Example", "xr.example r.example.org"),
        (".r.example", "a.r.example", "r.example xr.example"),
        ("*.r.example", "a.r.example", "r.example"),
        ("*r.example", "", "r.example xr.example"),
        ("r.example:5000", "r.example:5000 a.r.example:5000", "r.example r.example:443"),
        ("r.example:", "r.example:5000 r.example", ""),
        ("r.example:http", "", "r.example:80 r.example"),
        (" R.EXAMPLE , other", "r.example other", "another"),
        ("10.0.0.0/8", "10.1.2.3 10.1.2.3:5000", "11.1.2.3 r.example"),
        ("10.1.2.3", "10.1.2.3 10.1.2.3:5000", "10.1.2.4"),
        ("10.1.2.3:5000", "10.1.2.3:5000", "10.1.2.3"),
        ("fd00::/8", "[fd00::1]:5000", "[fe00::1]"),
        ("fd00::1", "[fd00::1]", "[fd00::2]"),
        ("[fd00::1]:5000", "[fd00::1]:5000", "[fd00::1]"),
        ("2.3", "", "10.1.2.3"),
        (",:80,/,[]", "", "r.example 10.1.2.3 r.example:80"),
    ],
)
def test_no_proxy_is_read_as_go_reads_it(no_proxy, passed_by, asked_by_proxy):
    found = {
        host: proxy(f"https://{host}/", HTTPS_PROXY=PROXY, NO_PROXY=no_proxy)
        for host in f"{passed_by} {asked_by_proxy}".split()
    }
    expected = dict.fromkeys(passed_by.split()) | dict.fromkeys(asked_by_proxy.split(), PROXY)
    assert found == expected


def test_a_proxys_name_and_password_go_into_a_header():
    parts = urllib.parse.urlsplit("http://us%20er:p%40ss@proxy.example:3128")
    assert proxy_headers(parts) == {"Proxy-Authorization": "Basic dXMgZXI6cEBzcw=="}
    assert proxy_headers(urllib.parse.urlsplit(PROXY)) == {}


# Certificate authorities


def ask(port, limit_s=10, scheme="https", host="localhost", path="/v2/", **environment):
    with Conversation(environment, tls_context(environment), limit_s) as conversation:
        url = urllib.parse.urlsplit(f"{scheme}://{host}:{port}{path}")
        return conversation.get(url, {"Accept": "text/plain"})


def refused(port, *args, **options):
    with pytest.raises(ServiceError) as raised:
        ask(port, *args, **options)
    return raised.value.code


def test_whom_the_environment_trusts_is_trusted(tls_registry, authority, tmp_path):
    own = {"SSL_CERT_FILE": str(authority.pem)}
    nothing = {"SSL_CERT_FILE": str(tmp_path / "none"), "SSL_CERT_DIR": str(tmp_path)}
    port = tls_registry.port
    assert refused(port) == "registry_certificate"
    assert ask(port, **own).status == 404
    # Any file of the folder, whatever its name, beside what is none.
    (authority.folder / "note").write_text("-----BEGIN CERTIFICATE-----\nno\n")
    folders = f"{tmp_path}/none:{authority.folder}"
    assert ask(port, SSL_CERT_DIR=folders).status == 404
    assert ask(port, **{**nothing, "SSL_CERT_DIR": folders}).status == 404
    assert refused(port, **nothing) == "registry_certificate"


def test_a_damaged_certificate_spoils_no_other(tls_registry, authority, tmp_path):
    whole = authority.pem.read_text()
    damaged = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
    file = tmp_path / "both.pem"
    file.write_text(f"{damaged}{whole}{damaged}")
    assert ask(tls_registry.port, SSL_CERT_FILE=str(file), SSL_CERT_DIR=NOWHERE).status == 404


def test_a_certificate_of_another_name_is_refused(authority):
    with Registry(tls=authority.context("other.example")) as one:
        assert refused(one.port, **authority.alone) == "registry_certificate"


def test_a_server_without_tls_is_named(authority, registry):
    assert refused(registry.port, **authority.alone) == "registry_insecure"


# Limits


def drip(data):
    """Send a byte at a time, for ever."""

    def act(handler):
        handler.push(memoryview(data))
        while not handler.wait(0, 0.02):
            handler.push(memoryview(b"x"))

    return act


HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n"


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize(
    "data",
    [b"", b"HTTP/1.1 200 OK\r\nX: ", HEAD + b"\r\n", b"HTTP/1.1 200 OK\r\n\r\n"],
    ids=["status", "header", "body", "body without a length"],
)
def test_an_answer_by_bytes_ends_in_time(scheme, data, authority):
    context = authority.context() if scheme == "https" else None
    with Registry(tls=context) as registry:
        registry.models["ns/m:latest"] = []
        registry.faults["manifest"] = drip(data)
        found = refused(
            registry.port,
            limit_s=0.3,
            scheme=scheme,
            path="/v2/ns/m/manifests/latest",
            **authority.alone,
        )
    assert found == "registry_unreachable"


def test_who_does_not_answer_at_all_ends_in_time():
    with Silent() as silent:
        assert refused(silent.port, limit_s=0.5, scheme="http") == "registry_unreachable"
        assert refused(silent.port, limit_s=0.5) == "registry_unreachable"


def endless(handler):
    handler.push(memoryview(HEAD[:17] + b"\r\n"))
    while True:
        handler.push(memoryview(bytes(1 << 20)))


@pytest.mark.parametrize(
    "act, code",
    [
        (endless, "registry_error"),
        (answer(200, bytes(ANSWER_LIMIT_BYTES + 1)), "registry_error"),
        (cut(), "registry_error"),
        (speak(b"SSH-2.0-OpenSSH_9\r\n"), "registry_error"),
        (speak(b""), "registry_unreachable"),
        (speak(HEAD + b"X: " + bytes(70_000) + b"\r\n\r\n"), "registry_error"),
    ],
    ids=["endless", "too long", "cut off", "no HTTP", "nothing", "a header too long"],
)
def test_what_is_no_answer_is_an_error(act, code, registry):
    registry.models["ns/m:latest"] = []
    registry.faults["manifest"] = act
    path = "/v2/ns/m/manifests/latest"
    assert refused(registry.port, scheme="http", path=path) == code


def test_a_whole_answer_of_the_greatest_size_is_taken(registry):
    registry.models["ns/m:latest"] = []
    registry.faults["manifest"] = answer(200, bytes(ANSWER_LIMIT_BYTES))
    found = ask(registry.port, scheme="http", path="/v2/ns/m/manifests/latest")
    assert (found.status, len(found.body)) == (200, ANSWER_LIMIT_BYTES)


def test_nobody_and_nowhere_are_told_apart():
    port = free_port()  # which no other test takes meanwhile
    for host in ("localhost", "nowhere.invalid"):
        assert refused(port, host=host) == "registry_unreachable"


# By a proxy


class Proxy(socketserver.ThreadingTCPServer):
    """Answers CONNECT, and leads every name to this machine. ``asked``: the first lines."""

    daemon_threads = allow_reuse_address = True

    def __init__(self, status=b"200 OK"):
        self.status, self.asked, self.headers = status, [], []
        super().__init__(("127.0.0.1", 0), _ProxyConnection)
        self.port = self.server_address[1]
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class _ProxyConnection(socketserver.StreamRequestHandler):
    def handle(self):
        first = self.rfile.readline().decode().strip()
        self.server.asked.append(first)
        while line := self.rfile.readline().strip():
            self.server.headers.append(line.decode())
        method, target, _ = first.split()
        if method != "CONNECT" or not self.server.status.startswith(b"200"):
            status = self.server.status if method == "CONNECT" else b"404 Not Found"
            self.wfile.write(b"HTTP/1.1 %s\r\nContent-Length: 0\r\n\r\n" % status)
            return
        port = int(target.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as other:
            self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
            back = threading.Thread(target=copy, args=(other, self.connection), daemon=True)
            back.start()
            copy(self.connection, other)
            back.join(30)


def copy(source, target):
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


def test_a_registry_is_asked_by_a_proxy(authority):
    with Proxy() as server, Registry(tls=authority.context("r.example")) as registry:
        environment = {
            **authority.alone,
            "HTTPS_PROXY": f"http://me:secret@127.0.0.1:{server.port}",
            "HTTP_PROXY": f"127.0.0.1:{server.port}",
        }
        found = ask(registry.port, host="r.example", **environment)
        assert found.status == 404
        assert server.asked[0].startswith(f"CONNECT r.example:{registry.port} ")
        assert "Proxy-Authorization: Basic bWU6c2VjcmV0" in server.headers
        ask(registry.port, scheme="http", host="r.example", **environment)
        assert server.asked[1:] == [f"GET http://r.example:{registry.port}/v2/ HTTP/1.1"]


@pytest.mark.parametrize("status", [b"407 Who are you", b"403 Forbidden", b"502 Bad Gateway"])
def test_a_proxy_that_refuses_is_named(status):
    with Proxy(status) as server:
        found = refused(443, host="r.example", HTTPS_PROXY=f"http://127.0.0.1:{server.port}")
    assert found == "proxy_error"


def test_a_proxy_that_is_not_there_is_named():
    assert refused(443, host="r.example", HTTPS_PROXY="http://127.0.0.1:1") == "proxy_error"
    assert refused(443, host="r.example", HTTPS_PROXY="socks5://127.0.0.1:1") == "proxy_error"
    assert refused(443, host="r.example", HTTPS_PROXY="http://127.0.0.1:port") == "proxy_error"
    assert refused(443, host="r.example", HTTPS_PROXY="http://[") == "proxy_error"
