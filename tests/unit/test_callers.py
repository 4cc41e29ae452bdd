"""Who waits in vain, by looks that are made by hand, and by looks at real sockets."""

import contextlib
import socket
import time
import types
import unittest.mock

import pytest

import llm_service.callers
from helpers import strangers
from helpers.waiting import wait_for
from llm_service import sockets
from llm_service.callers import Callers, bytes_read, sockets_of

STUCK_S = 40


class Looks:
    """Callers, and looks at them every two seconds.

    .for_(s, wait_s, …)     so many seconds of looks; who waits has waited for so long at the first
    """

    def __init__(self):
        self.callers = Callers(0, STUCK_S, works=lambda: False)
        self.now = 1000.0

    def look(self, *waits, tasks=0, whole=True, after=2.0, streams=0):
        self.now += after
        whole_s = max(waits, default=0) if whole else 0
        self.callers.judge(self.now, list(waits), whole_s, tasks, streams)

    def for_(self, seconds, *waits, step=2.0, **fields):
        """Return when a fault was seen first, in seconds; None if it was not."""
        seen = None
        for n in range(int(seconds / step)):
            passed = (n + 1) * step
            self.look(*(wait + passed for wait in waits), after=step, **fields)
            if self.callers.suspicion and seen is None:
                seen = passed
        return seen


@pytest.fixture
def looks():
    return Looks()


def test_nobody_waits(looks):
    assert looks.for_(600) is None
    assert not looks.callers._queue


def test_who_waits_while_nothing_works_waits_in_vain(looks):
    # It is asked from CHECK_S on what else works, and that must be quiet for as long.
    assert looks.for_(100, 0) == pytest.approx(STUCK_S + 6)
    assert "up to 100 s; for 94 s no runner" in looks.callers.suspicion


def test_a_runner_that_works_serves_somebody(looks):
    assert looks.for_(600, 0, tasks=1) is None


def test_the_time_begins_when_the_last_thing_has_ended(looks):
    assert looks.for_(600, 0, tasks=1) is None
    assert looks.for_(100, 600) == pytest.approx(STUCK_S + 2)


def test_one_look_at_which_something_works_begins_it_anew(looks):
    assert looks.for_(STUCK_S, 0) is None
    looks.look(STUCK_S, tasks=1)
    assert looks.for_(STUCK_S, STUCK_S) is None
    assert looks.for_(20, 2 * STUCK_S) is not None


def test_a_request_that_is_not_whole_is_no_fault(looks):
    assert looks.for_(600, 0, whole=False) is None
    assert looks.callers._queue  # it is told all the same


def test_many_who_wait_for_a_short_time_are_no_fault(looks):
    for n in range(600):
        looks.look(STUCK_S / 2, n % 30)
    assert not looks.callers.suspicion and not looks.callers._queue


def test_it_ends_when_nobody_waits(looks):
    assert looks.for_(100, 0)
    looks.look()
    assert not looks.callers.suspicion
    assert looks.for_(STUCK_S, 0) is None


def test_a_pause_between_two_looks_begins_it_anew(looks):
    assert looks.for_(STUCK_S, 0) is None
    looks.look(STUCK_S + 3600, after=3600)
    assert not looks.callers.suspicion
    assert looks.for_(STUCK_S - 2, 3600 + STUCK_S) is None


def test_a_suspicion_is_a_fault_once_it_is_confirmed_and_as_long_as_it_holds(looks):
    looks.for_(100, 0)
    assert looks.callers.suspicion and not looks.callers.starved
    assert looks.callers._queue  # it is told meanwhile
    looks.callers.confirm()
    looks.look(102)
    assert looks.callers.starved == looks.callers.suspicion
    looks.look()
    assert not looks.callers.starved
    looks.for_(100, 0)
    assert looks.callers.suspicion and not looks.callers.starved


def test_it_takes_ten_looks():
    looks = Looks()
    looks.callers = Callers(0, 1, works=lambda: False)
    assert looks.for_(60, 0) == pytest.approx(6 + 2 * 9)


# Who waits while others are served


def test_one_who_is_served_does_not_queue(looks):
    looks.for_(600, 0, tasks=1)
    assert not looks.callers._queue


def test_more_who_wait_than_are_served_queue(looks):
    looks.for_(600, 0, 0, tasks=1)
    assert looks.callers._queue == "2 callers of Ollama have waited for up to 600 s"


@pytest.mark.parametrize(("streams", "queue"), [(0, False), (1, True), (2, True)])
def test_who_waits_behind_answers_that_stream_queues(looks, streams, queue):
    looks.for_(600, 0, tasks=1, streams=streams)
    assert bool(looks.callers._queue) is queue


def test_those_who_came_just_now_do_not_queue(looks):
    looks.look(STUCK_S, STUCK_S - 1, STUCK_S - 2, tasks=1)
    assert not looks.callers._queue


# On real connections, to a server and from callers in processes of their own


@pytest.fixture
def server(tmp_path):
    """A server that reads a file of 2,000 bytes for each request that ends with "}"."""
    file = tmp_path / "manifest"
    file.write_bytes(bytes(2000))
    with strangers.server(file) as (process, port):
        yield types.SimpleNamespace(pid=process.pid, port=port)


@pytest.fixture
def works():
    """What the server itself does."""
    return unittest.mock.Mock(return_value=False)


@pytest.fixture
def callers(server, works):
    return Callers(server.port, STUCK_S, works)


@pytest.fixture
def look(server, callers):
    return lambda: callers.look(time.monotonic(), server.pid, tasks=0)


@pytest.fixture
def call(server):
    with contextlib.ExitStack() as stack:
        yield lambda *texts: stack.enter_context(strangers.caller(server.port, *texts))


def test_strangers_are_counted_and_the_services_own_connections_are_not(
    server, callers, look, call
):
    with socket.create_connection(("127.0.0.1", server.port)) as own:
        own.sendall(b"GET /api/ps")
        call()
        call("POST /api/generate")
        time.sleep(0.1)
        look()
    assert callers.report["connections"] == 2
    assert callers.report["waiting"] == 1
    assert 0.1 <= callers.report["longest_wait_s"] < 30


def test_who_was_told_to_go_on_waits_for_his_answer(callers, look, call):
    """As curl asks before it sends much; the kernel's clock often tells no order of the two."""
    for _ in range(20):
        call("Expect: 100-continue", "{}")
    wait_for(lambda: look() or callers.report["connections"] == 20, 30, "all are seen")
    assert callers.report["waiting"] == 20
    look()
    assert callers.report["waiting"] == 20


def assert_stays(look, callers, figure):
    """Look ten times, at each of which it is one."""
    for _ in range(10):
        look()
        assert callers.report[figure] == 1


def test_own_connections_are_looked_for_only_where_there_are_others(
    server, callers, look, call, monkeypatch
):
    own_ends = unittest.mock.Mock(wraps=sockets.own_ends)
    monkeypatch.setattr(llm_service.callers, "own_ends", own_ends)
    with socket.create_connection(("127.0.0.1", server.port)):
        call()
        wait_for(lambda: look() or callers.report["connections"] == 1, 30, "he is seen")
        own_ends.reset_mock()
        assert_stays(look, callers, "connections")
        assert own_ends.call_count == 2
        with socket.create_connection(("127.0.0.1", server.port)):
            assert_stays(look, callers, "connections")


def test_nobody_is_there(callers, look):
    look()
    assert callers.report == {"connections": 0, "waiting": 0, "longest_wait_s": 0}


def test_all_are_looked_for_where_a_new_one_can_have_come(server, callers, look, call, monkeypatch):
    all_of_them = unittest.mock.Mock(wraps=sockets.connections)
    monkeypatch.setattr(llm_service.callers, "connections", all_of_them)
    call("POST /api/generate")
    wait_for(lambda: len(sockets_of(server.pid)) == 2, 30, "he is accepted")
    look()
    wait_for(lambda: look() or callers.report["waiting"] == 1, 30, "he waits")
    all_of_them.reset_mock()
    assert_stays(look, callers, "waiting")
    assert all_of_them.call_count == 2
    with strangers.caller(server.port):
        wait_for(lambda: look() or callers.report["connections"] == 2, 30, "the new one")
    wait_for(lambda: look() or callers.report["connections"] == 1, 30, "he has left")


def test_a_kernel_that_tells_nothing_leaves_the_figures_out(callers, look, call, monkeypatch):
    call("POST /api/generate")
    look()
    monkeypatch.setattr(sockets, "SOCK_DIAG", 31)
    look()
    assert callers.report is None
    assert not callers.suspicion and not callers._queue


def test_what_the_server_does_is_asked_only_where_somebody_waits(look, works, call, monkeypatch):
    monkeypatch.setattr(llm_service.callers, "CHECK_S", 0.1)
    call()
    time.sleep(0.2)
    look()
    monkeypatch.setattr(llm_service.callers, "CHECK_S", 60)  # he has come just now
    call("POST /api/generate")
    look()
    works.assert_not_called()
    monkeypatch.setattr(llm_service.callers, "CHECK_S", 0.1)
    time.sleep(0.2)
    look()
    works.assert_called_once()


def test_where_runners_work_it_is_not_asked_what_the_server_does(
    server, callers, works, call, monkeypatch
):
    monkeypatch.setattr(llm_service.callers, "CHECK_S", 0.1)
    call("POST /api/generate")
    time.sleep(0.2)
    callers.look(time.monotonic(), server.pid, tasks=1)
    works.assert_not_called()


def test_who_waits_in_vain_by_looks_at_real_connections(callers, look, works, call, monkeypatch):
    monkeypatch.setattr(llm_service.callers, "CHECK_S", 0.1)
    monkeypatch.setattr(callers, "_stuck_s", 1)
    look()
    call("{}")
    wait_for(lambda: look() or callers.suspicion, 60, "a caller that waits in vain")
    works.return_value = True
    for _ in range(20):
        look()
        assert not callers.suspicion


# A request is whole where the server has read more than it was sent


def whole(callers):
    return [request.whole for request in callers._requests.values()]


def test_a_request_for_which_files_are_read_is_whole_and_stays_so(callers, look, call):
    look()
    call('{"model":"m"}')
    wait_for(lambda: look() or whole(callers) == [True], 30, "files are read")
    look()
    assert whole(callers) == [True]


@pytest.mark.parametrize("length", [1, 100, 50_000])
def test_half_a_request_is_not_whole_however_long_it_is(server, callers, look, call, length):
    look()
    before = bytes_read(server.pid)
    call('{"model":' + " " * length)
    wait_for(lambda: bytes_read(server.pid) > before + length, 30, "the request is read")
    for _ in range(5):
        look()
        assert whole(callers) == [False]


def test_what_is_read_long_after_a_request_has_nothing_to_do_with_it(callers, look, call):
    look()
    call('{"model":')
    # One that the server has not taken yet may be missed
    wait_for(lambda: look() or whole(callers) == [False], 30, "the request is seen")
    callers._requests = {
        key: request._replace(at=request.at - 10) for key, request in callers._requests.items()
    }
    call('{"model":"m"}')
    wait_for(lambda: look() or sorted(whole(callers)) == [False, True], 30, "files are read")


def test_who_is_excused_is_no_evidence_any_more_and_who_comes_later_is(
    callers, look, call, monkeypatch
):
    monkeypatch.setattr(llm_service.callers, "CHECK_S", 0.1)
    monkeypatch.setattr(callers, "_stuck_s", 1)
    look()
    call("{}")
    wait_for(lambda: look() or callers.suspicion, 60, "a suspicion")
    callers.excuse(time.monotonic())
    for _ in range(30):
        look()
        assert not callers.suspicion
    call("{}")
    wait_for(lambda: look() or callers.suspicion, 60, "a suspicion anew")


def test_a_server_whose_reading_cannot_be_told_has_no_whole_requests(callers, call):
    for _ in range(2):
        call('{"model":"m"}')
        callers.look(time.monotonic(), 0, tasks=0)
    assert whole(callers) == [False, False]
    assert bytes_read(0) == 0


def test_what_came_before_the_first_look_counts_as_whole(callers, look, call):
    """A server reads its own files at its start, when who was cut off comes again."""
    call('{"model":')
    look()
    assert whole(callers) == [True]
