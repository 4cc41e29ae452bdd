"""Requests written byte by byte, and their answers read from the socket."""

import contextlib
import selectors
import socket
import time

INTERIM = b"HTTP/1.1 100 Continue\r\n\r\n"


def dial(service):
    return socket.create_connection(("127.0.0.1", service.port), 60)


def read_all(sock):
    """Return what comes until the other side closes."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := sock.recv(1 << 16):
            data += piece
    return data


def split(data):
    """Return an answer's (status, headers, body), its chunks put together.

    An interim answer before it is skipped, as HTTP/1.1 wants of every client.
    """
    head, _, body = data.removeprefix(INTERIM).partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.title(): value for name, value in (line.split(": ", 1) for line in lines)}
    if headers.get("Transfer-Encoding") == "chunked":
        rest, body = body, b""
        while rest and (size := int(rest.partition(b"\r\n")[0], 16)):
            chunk = rest.partition(b"\r\n")[2]
            body, rest = body + chunk[:size], chunk[size + 2 :]
    return int(first.split()[1]), headers, body


def raw(service, data, half_close=False):
    """Return the answer to these bytes.

    The service closes the connection, or a header in the bytes asks it to.
    """
    with dial(service) as sock:
        sock.sendall(data)
        if half_close:
            sock.shutdown(socket.SHUT_WR)
        return split(read_all(sock))


def request_bytes(method, path, body=b"", host="127.0.0.1", **headers):
    """Write a request; of a header's name `_` becomes `-`."""
    lines = [f"{method} {path} HTTP/1.1"]
    lines += [f"Host: {host}"] if host is not None else []
    lines += ["Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    lines += [f"Content-Length: {len(body)}"] if body else []
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def at_once(service, requests_of_bytes):
    """Send all of these at once, each on its connection; return the answers."""
    selector, answers = selectors.DefaultSelector(), []
    for data in requests_of_bytes:
        sock = socket.socket()
        sock.setblocking(False)
        sock.connect_ex(("127.0.0.1", service.port))
        selector.register(sock, selectors.EVENT_WRITE, [data, b""])
    until = time.monotonic() + 60
    while selector.get_map():
        assert time.monotonic() < until, f"{len(selector.get_map())} without an answer"
        for key, events in selector.select(1):
            if events & selectors.EVENT_WRITE:
                key.fileobj.send(key.data[0])
                selector.modify(key.fileobj, selectors.EVENT_READ, key.data)
            elif piece := key.fileobj.recv(1 << 16):
                key.data[1] += piece
            else:
                selector.unregister(key.fileobj)
                key.fileobj.close()
                answers.append(split(key.data[1]))
    return answers
