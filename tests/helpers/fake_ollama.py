"""An Ollama that answers whatever a test wants.

    with FakeOllama({"/api/tags": http("<html>"), "/api/version": never}) as fake:
        fake.url
        fake.routes     may be changed while it runs
        fake.calls      [(method, path, body), …]

Each path is answered with raw bytes, or by a callable that gets the socket; then the connection
is closed. A path without a route gets Ollama's 404.
"""

import json
import socketserver
import threading
import time

from helpers.ports import free_port

# Said, since it is what happens: a client that kept the connection would find it closed.
CLOSE = "Connection: close\r\n"
NDJSON = f"HTTP/1.1 200 OK\r\n{CLOSE}Content-Type: application/x-ndjson\r\n"


def http(body, status=200, type="application/json"):
    """Return a whole answer."""
    body = body if isinstance(body, bytes) else body.encode()
    head = f"HTTP/1.1 {status} X\r\n{CLOSE}Content-Type: {type}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def ndjson(*objects):
    """Return a 200 whose body lasts until the connection closes."""
    lines = [json.dumps(each).encode() + b"\n" for each in objects]
    return f"{NDJSON}\r\n".encode() + b"".join(lines)


def chunked(*pieces, end=True):
    """Return a 200 in chunks; with end=False it is cut off."""
    chunks = [b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces]
    head = f"{NDJSON}Transfer-Encoding: chunked\r\n\r\n".encode()
    return head + b"".join(chunks) + (b"0\r\n\r\n" if end else b"")


def never(sock):
    """Answer nothing until the client leaves."""
    while sock.recv(4096):
        pass


def drip(data, seconds):
    """Send a byte at a time."""

    def send(sock):
        for n in range(len(data)):
            sock.sendall(data[n : n + 1])
            time.sleep(seconds)

    return send


class FakeOllama(socketserver.ThreadingTCPServer):
    allow_reuse_address = daemon_threads = True
    request_queue_size = 128

    def __init__(self, routes, port=None):
        self.routes, self.calls = routes, []
        super().__init__(("127.0.0.1", port or free_port()), _Connection)
        self.port = self.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def __exit__(self, *exc):
        self.shutdown()
        self.server_close()

    def handle_error(self, *_):
        """Stay quiet: a client that leaves is what these tests are about."""

    def answer_to(self, path):
        return self.routes.get(path, http("404 page not found", 404, "text/plain"))


class _Connection(socketserver.StreamRequestHandler):
    def handle(self):
        method, path, _ = self.rfile.readline().decode().split(" ", 2)
        length = 0
        while line := self.rfile.readline().strip():
            key, _, value = line.partition(b":")
            length = int(value) if key.lower() == b"content-length" else length
        self.server.calls.append((method, path, self.rfile.read(length)))
        answer = self.server.answer_to(path.partition("?")[0])
        if callable(answer):
            answer(self.connection)
        else:
            self.connection.sendall(answer)
