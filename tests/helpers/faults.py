"""What a registry does at one step of a pull, instead of its work.

    registry.faults["manifest"] = answer(503, "busy")
    del registry.faults["manifest"]      # it works again

Steps, in the order of a pull: "connect" (before TLS and HTTP), "manifest", "token", "head" (a
layer's size), "blob" (where its content is), "data" (the content).
"""

import socket
import struct


def answer(status, body=b"", **headers):
    """Answer so; of a header's name `_` becomes `-`."""
    data = body if isinstance(body, bytes) else body.encode()

    def act(handler):
        handler.head(status, len(data), **headers)
        if handler.command != "HEAD":
            handler.push(memoryview(data))

    return act


def redirect(url, status=307):
    return answer(status, Location=url)


def wants_token(realm):
    """Ask for a token of this realm, as registries do."""
    challenge = f'Bearer realm="{realm}",service="tests",scope="pull"'
    return answer(401, "login, please", WWW_Authenticate=challenge)


def close(_handler):
    """Close the connection without an answer."""


def reset(handler):
    """Close the connection by RST."""
    option = struct.pack("ii", 1, 0)
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, option)


def stall(handler):
    """Send nothing until the client leaves."""
    while True:
        handler.wait(0, 0.05)


def speak(data):
    """Send these bytes, whatever was asked."""

    def act(handler):
        handler.push(memoryview(data))

    return act


def cut(act=close, sent=b"{"):
    """Promise a long body, send its beginning, then act."""

    def do(handler):
        handler.head(200, 10_000)
        handler.push(memoryview(sent))
        act(handler)

    return do


def ignore_range(handler):
    """Send a layer's content from its beginning, whatever part was asked for."""
    del handler.headers["Range"]
    handler.blob(handler.registry.blobs[handler.path.rpartition("/")[2]], body=True)


class Silent:
    """A port to which no connection comes about: packets are dropped, as a firewall does.

    Its queue is full: the kernel drops whoever comes then.
    """

    def __init__(self):
        self._server = socket.create_server(("127.0.0.1", 0), backlog=0)
        self.port = self._server.getsockname()[1]
        self._queued = socket.create_connection(("127.0.0.1", self.port))

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self._queued.close()
        self._server.close()
