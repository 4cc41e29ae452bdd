"""The TCP sockets of a port, as the kernel tells them through netlink (sock_diag)."""

import contextlib
import os
import socket
import stat
import struct
import typing

# Numbers and layouts of Linux' sock_diag.h, inet_diag.h and tcp.h
SOCK_DIAG = 4
BY_FAMILY = 20
ONE = 1
DUMP = 0x301
ERROR = 2
DONE = 3
ESTABLISHED = 1
SYN_SENT = 2
LISTEN = 10
CALLERS = 1 << ESTABLISHED | 1 << LISTEN
LIVE = 1 << ESTABLISHED | 1 << SYN_SENT
INFO = 2  # the attribute that holds a tcp_info
QUESTION = struct.Struct("=IHHIIBBBxI48s")
MESSAGE = struct.Struct("=IH10x")
STATUS = struct.Struct("=16xi")  # of an answer's end: below 0 it has failed
# State, port, the peer's port, address, the peer's address, inode
SOCKET = struct.Struct("=xBxx2s2s16s16s28xI")
ENDS = slice(4, 52)  # of a message: what the kernel finds this one by
ATTRIBUTE = struct.Struct("=HH")
# Ms since sent and received; bytes that came through, bytes received; segments out
TCP_INFO = struct.Struct("=44xI4xI64xQQ20xI")

JUST_NOW_MS = 3000
LONG_AGO_MS = 4000
ANYWHERE = bytes(16)
IPV4_IN_IPV6 = bytes(10) + b"\xff\xff"


class Connection(typing.NamedTuple):
    """A connection, seen from the side of the listener."""

    family: int
    key: bytes  # the kernel's: both ends and a number that no other has
    peer: tuple[bytes, bytes]  # IPv6 address and port
    received: int  # bytes
    sent: int  # bytes that came through
    wait_s: float  # since it last received, where nothing was sent since; else 0
    tied_s: float  # the same, where something was sent within the same tick; else 0
    streams: bool  # something was sent just now, long after it last received


def connections(port: int) -> list[Connection]:
    """Return the connections to the listener of a port. Raises OSError where none can be had."""
    found: list[Connection] = []
    with open_kernel() as kernel:
        for family in (socket.AF_INET, socket.AF_INET6):
            listening = set()
            for message in ask_kernel(kernel, family, port.to_bytes(2, "big"), CALLERS):
                state, _, _, address, *_ = SOCKET.unpack_from(message)
                if state == LISTEN:  # these come first
                    listening.add(address)
                elif ANYWHERE in listening or address in listening:
                    found.append(connection(family, message))
            if listening:
                break
    return found


def again(known: list[Connection]) -> list[Connection]:
    """Return those of these connections that are there still, as they are now.

    Each is found at once, where the kernel goes through all of its table for ``connections``.
    """
    found = []
    with open_kernel() as kernel:
        for each in known:
            with contextlib.suppress(OSError):  # it has gone
                for message in ask_kernel(kernel, each.family, each.key, 0, ONE):
                    state, *_ = SOCKET.unpack_from(message)
                    if state == ESTABLISHED:
                        found.append(connection(each.family, message))
    return found


def connection(family: int, message: memoryview) -> Connection:
    """Return what a message tells of a connection. Raises OSError where it lacks the traffic."""
    _, _, peer_port, _, peer, _ = SOCKET.unpack_from(message)
    if family == socket.AF_INET:
        peer = IPV4_IN_IPV6 + peer[:4]
    return Connection(family, bytes(message[ENDS]), (peer, peer_port), *traffic(message))


def listeners(port: int) -> set[int]:
    """Return the inodes of what listens on a port. Raises OSError where none can be had."""
    found = set()
    with open_kernel() as kernel:
        for family in (socket.AF_INET, socket.AF_INET6):
            for message in ask_kernel(kernel, family, port.to_bytes(2, "big"), 1 << LISTEN):
                *_, inode = SOCKET.unpack_from(message)
                found.add(inode)
    return found


def ports_of(inodes: set[int]) -> set[tuple[int, int]]:
    """Return the own and the peer's port of those connections that belong to these inodes."""
    found = set()
    with open_kernel() as kernel:
        for family in (socket.AF_INET, socket.AF_INET6):
            for message in ask_kernel(kernel, family, b"", LIVE):
                _, port, peer_port, *_, inode = SOCKET.unpack_from(message)
                if inode in inodes:
                    ports = int.from_bytes(port, "big"), int.from_bytes(peer_port, "big")
                    found.add(ports)
    return found


def open_kernel() -> socket.socket:
    """Return a socket for questions to the kernel, one after the other."""
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, SOCK_DIAG)


def ask_kernel(
    kernel: socket.socket, family: int, ends: bytes, states: int, mode: int = DUMP
) -> typing.Iterator[memoryview]:
    """Yield the kernel's message on each TCP socket of a local port, or on ONE of these ends."""
    question = QUESTION.pack(
        QUESTION.size,
        BY_FAMILY,
        mode,
        0,
        0,
        family,
        socket.IPPROTO_TCP,
        1 << INFO - 1,
        states,
        ends,
    )
    kernel.send(question)
    while True:
        answer = memoryview(kernel.recv(1 << 16))
        while answer:
            length, kind = MESSAGE.unpack_from(answer)
            failed = kind == DONE and STATUS.unpack_from(answer)[0] < 0
            if failed or kind == ERROR:
                raise OSError("this kernel tells nothing of its sockets")
            if kind == DONE:
                return
            yield answer[MESSAGE.size : length]
            answer = answer[aligned(length) :]
        if mode == ONE:
            return


def traffic(message: memoryview) -> tuple[int, int, float, float, bool]:
    """Return what a Connection tells of a socket's traffic.

    What comes within the same tick of the kernel's clock as an answer counts as answered.
    Raises OSError where the kernel does not tell.
    """
    attributes = message[SOCKET.size :]
    while attributes:
        length, kind = ATTRIBUTE.unpack_from(attributes)
        if kind == INFO and length >= ATTRIBUTE.size + TCP_INFO.size:
            figures = TCP_INFO.unpack_from(attributes, ATTRIBUTE.size)
            sent_ms, received_ms, sent, received, segments = figures
            answered = segments and sent_ms <= received_ms
            waits = received and not answered
            since_s = max(received_ms, 1) / 1000
            wait_s = since_s if waits else 0.0
            tied_s = since_s if sent_ms == received_ms else 0.0
            streams = sent_ms < JUST_NOW_MS and received_ms > LONG_AGO_MS
            return received, sent, wait_s, tied_s, bool(answered and streams)
        attributes = attributes[aligned(length) :]
    raise OSError("this kernel does not tell when a socket received and sent")


def aligned(length: int) -> int:
    """Return where the next message or attribute begins."""
    return length + 3 & ~3


def own_ends(port: int) -> set[tuple[bytes, bytes]]:
    """Return address and port of this process's own connections to a port."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            file = int(name)
            if not stat.S_ISSOCK(os.stat(file).st_mode):
                continue
            with socket.socket(fileno=os.dup(file)) as own:
                if own.getpeername()[1:2] != (port,):
                    continue
                host, own_port, *_ = own.getsockname()
                address = socket.inet_pton(own.family, host)
                address = (IPV4_IN_IPV6 + address)[-16:]
                found.add((address, own_port.to_bytes(2, "big")))
    return found
