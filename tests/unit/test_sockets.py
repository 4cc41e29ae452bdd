"""What the kernel tells of the connections of a port, on real sockets."""

import contextlib
import os
import socket
import time

import pytest

from helpers.strangers import caller
from llm_service import sockets
from llm_service.sockets import again, connections, listeners, own_ends

TICK_S = 0.05  # longer than one of the kernel's clock, after which an order can be told


class Pair:
    """A client and the connection that was accepted of it."""

    def __init__(self, stack, listener):
        address = listener.getsockname()
        self.client = stack.enter_context(socket.create_connection(address[:2]))
        self.accepted = stack.enter_context(listener.accept()[0])

    def ask(self, text=b"a request"):
        self.client.sendall(text)
        time.sleep(TICK_S)

    def answer(self):
        self.accepted.sendall(b"an answer")
        time.sleep(TICK_S)


class Port:
    def __init__(self, stack, listener):
        self._stack, self.listener = stack, stack.enter_context(listener)
        self.number = listener.getsockname()[1]

    def pair(self):
        return Pair(self._stack, self.listener)

    def waits(self):
        return sorted(each.wait_s > 0 for each in connections(self.number))


@pytest.fixture
def listen():
    with contextlib.ExitStack() as stack:
        yield lambda *address, **options: Port(stack, socket.create_server(address, **options))


@pytest.fixture
def port(listen):
    return listen("127.0.0.1", 0)


def test_who_has_sent_nothing_does_not_wait(port):
    port.pair()
    assert port.waits() == [False]


def test_who_has_asked_waits_until_he_is_answered(port):
    pair = port.pair()
    pair.ask()
    assert port.waits() == [True]
    pair.answer()
    assert port.waits() == [False]


def test_who_asks_again_on_a_kept_connection_waits_again(port):
    pair = port.pair()
    pair.ask()
    pair.answer()
    pair.ask()
    assert port.waits() == [True]
    pair.answer()
    assert port.waits() == [False]


def test_the_wait_is_as_long_as_the_request_is_old(port):
    pair = port.pair()
    time.sleep(0.5)  # the connection's age does not count
    began = time.monotonic()
    pair.ask()
    time.sleep(0.3)
    (seen,) = connections(port.number)
    passed_s = time.monotonic() - began
    assert 0.3 <= seen.wait_s <= passed_s + 0.01


def streams(port):
    return [each.streams for each in connections(port.number)]


def test_what_is_sent_long_after_the_request_is_a_stream(port, monkeypatch):
    def just_now_is(milliseconds):  # a long one where a busy machine might pass over it
        monkeypatch.setattr(sockets, "JUST_NOW_MS", milliseconds)

    just_now_is(20_000)
    pair = port.pair()
    pair.ask()
    pair.answer()
    assert streams(port) == [False]  # it has come at once
    monkeypatch.setattr(sockets, "LONG_AGO_MS", 300)
    time.sleep(0.4)
    just_now_is(200)
    assert streams(port) == [False]
    just_now_is(20_000)
    pair.answer()
    assert streams(port) == [True]
    just_now_is(200)
    time.sleep(0.3)
    assert streams(port) == [False]  # it has ended
    pair.ask()
    assert streams(port) == [False]
    assert port.waits() == [True]


def test_the_bytes_that_were_received_are_told(port):
    pair = port.pair()
    pair.ask(b"x" * 1000)
    pair.ask(b"x" * 234)
    (seen,) = connections(port.number)
    assert seen.received == 1234


def test_who_has_left_is_not_told(port):
    pair, _ = port.pair(), port.pair()
    pair.ask()
    pair.client.close()
    time.sleep(TICK_S)
    assert port.waits() == [False]


def test_each_connection_has_a_key_of_its_own_that_stays(port):
    pair, _ = port.pair(), port.pair()
    before = {each.key for each in connections(port.number)}
    pair.ask()
    pair.answer()
    assert len(before) == 2
    assert {each.key for each in connections(port.number)} == before


def test_more_connections_than_one_answer_of_the_kernels_holds(port):
    for pair in [port.pair() for _ in range(300)]:
        pair.client.sendall(b"a request")
    time.sleep(TICK_S)
    assert port.waits() == [True] * 300


def test_no_listener_no_connections(port):
    port.pair()
    port.listener.close()
    assert connections(port.number) == []


# The same ones again


@pytest.mark.parametrize(
    "address, family, dialled",
    [
        ("127.0.0.1", socket.AF_INET, "127.0.0.1"),
        ("::1", socket.AF_INET6, "::1"),
        ("::", socket.AF_INET6, "127.0.0.1"),
    ],
)
def test_known_connections_are_told_anew_as_all_are(listen, address, family, dialled):
    port = listen(address, 0, family=family, dualstack_ipv6=address == "::")
    with contextlib.ExitStack() as stack:
        clients = []
        for _ in range(3):
            client = stack.enter_context(socket.create_connection((dialled, port.number)))
            stack.enter_context(port.listener.accept()[0])
            clients.append(client)
        known = connections(port.number)
        clients[0].sendall(b"a request")
        time.sleep(TICK_S)
        told = again(known)
        assert [each[:5] for each in told] == [each[:5] for each in connections(port.number)]
        assert sorted(each.wait_s > 0 for each in told) == [False, False, True]


def test_who_has_left_is_not_told_again(port):
    pair, other = port.pair(), port.pair()
    known = connections(port.number)
    pair.client.close()
    time.sleep(TICK_S)
    (left,) = again(known)
    assert left.key in {each.key for each in known}
    pair.accepted.close()
    other.accepted.close()
    other.client.close()
    assert again(known) == []


# Whose connection


def own(port):
    return [each.peer in own_ends(port.number) for each in connections(port.number)]


@pytest.mark.parametrize(
    "address, family, dialled",
    [
        ("127.0.0.1", socket.AF_INET, ["127.0.0.1"]),
        ("0.0.0.0", socket.AF_INET, ["127.0.0.1"]),
        ("::1", socket.AF_INET6, ["::1"]),
        ("::", socket.AF_INET6, ["::1", "127.0.0.1"]),
    ],
)
def test_own_connections_are_known_as_such(listen, address, family, dialled):
    both = address == "::"
    port = listen(address, 0, family=family, dualstack_ipv6=both)
    with contextlib.ExitStack() as stack:
        for host in dialled:
            stack.enter_context(socket.create_connection((host, port.number)))
        assert own(port) == [True] * len(dialled)


def test_a_strangers_connection_is_not_own(port):
    with caller(port.number):
        assert own(port) == [False]


def test_own_connections_to_other_ports_are_not_told(port, listen):
    other = listen("127.0.0.1", 0)
    other.pair()
    assert own_ends(port.number) == set()


def test_looking_for_own_connections_leaves_them_open(port):
    pair = port.pair()
    assert own(port) == [True]
    pair.ask()
    assert pair.accepted.recv(100) == b"a request"


# Kernels that do not tell


def test_a_kernel_without_sock_diag(port, monkeypatch):
    monkeypatch.setattr(sockets, "SOCK_DIAG", 31)  # a protocol that no kernel has
    with pytest.raises(OSError):
        connections(port.number)


def test_a_kernel_that_refuses_the_question(port, monkeypatch):
    monkeypatch.setattr(sockets, "BY_FAMILY", 99)
    with pytest.raises(OSError):
        connections(port.number)


def test_a_kernel_that_does_not_tell_when_a_socket_received(port, monkeypatch):
    monkeypatch.setattr(sockets, "INFO", 1)  # asked for, and told, is another attribute
    port.pair()
    with pytest.raises(OSError):
        connections(port.number)


def test_a_kernel_that_breaks_off_its_answer_tells_nothing(port, monkeypatch):
    """As one that knows sockets, and not those of TCP: that is no empty list."""
    unknown = 99
    monkeypatch.setattr(sockets.socket, "IPPROTO_TCP", unknown)
    with pytest.raises(OSError, match="tells nothing"):
        listeners(port.number)
    with pytest.raises(OSError, match="tells nothing"):
        connections(port.number)


def test_who_listens_is_told_by_the_inode(listen):
    for address in ("127.0.0.1", "0.0.0.0"):
        one = listen(address, 0)
        assert listeners(one.number) == {os.fstat(one.listener.fileno()).st_ino}
    one.pair()
    assert len(listeners(one.number)) == 1
    one.listener.close()
    assert listeners(one.number) == set()
