"""Slow, silent, leaving and very many clients: all are answered, and nothing is left behind."""

import contextlib
import json
import socket
import struct
import time
from collections import Counter

import psutil
import pytest

from helpers.answers import GEMMA, GETS, HEALING, ROUTES, error, last_part, shaped
from helpers.listener import PULL, running_pulls
from helpers.raw import at_once, dial, raw, request_bytes
from helpers.waiting import wait_for

GET_HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n"
SLOW_HEADERS = GET_HEALTH + b"X-Slow: " + b"y" * 1000
POST_HEAD = b"POST /api/cache/clear HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"
SLOW_BODY = POST_HEAD + b" " * 1000


class Worker:
    """What the worker holds, for a comparison of before and after."""

    def __init__(self, service):
        self.process = psutil.Process(service.worker_pid())
        self.ollama_port = service.ollama_port
        self.fds = self.descriptors()
        self.rss = self.process.memory_info().rss

    def descriptors(self):
        """Return their number, without the connections to Ollama, of which at most 64 are kept."""
        open_now = self.process.net_connections("tcp")
        kept = sum(bool(each.raddr) and each.raddr.port == self.ollama_port for each in open_now)
        assert kept <= 64 + 8
        return self.process.num_fds() - kept

    def assert_back(self):
        # A connection is closed by the thread that serves it: with the descriptors the threads
        # are free, too.
        wait_for(
            lambda: self.descriptors() <= self.fds + 8,
            60,
            f"descriptors back at {self.fds} (now {self.descriptors()})",
        )
        assert self.process.num_threads() <= 256 + 40
        assert self.process.memory_info().rss < self.rss + 60e6


@pytest.fixture(scope="module")
def loaded(make_module_service):
    service = make_module_service(LLM_MODEL=GEMMA)
    for _ in range(20):
        service.get("/health")
        service.get("/api/stats")
        service.post("/api/cache/clear")
    return service


@pytest.fixture
def worker(loaded):
    """The worker, which must be back at what it holds now when the test is over."""
    for pull in running_pulls(loaded):  # of a test that has failed
        loaded.delete(PULL, json={"model": pull["model"]})
    loaded.wait_healthy(60)
    one = Worker(loaded)
    yield one
    one.assert_back()


def reset_on_close(sock):
    """Let a socket's closing be an RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


# Slow and silent clients


@pytest.mark.parametrize(
    "data, sent_at_once",
    [(SLOW_HEADERS, 1), (SLOW_BODY, len(POST_HEAD))],
    ids=["header", "body"],
)
def test_200_slow_clients_leave_health_its_3_seconds(loaded, worker, data, sent_at_once):
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(dial(loaded)) for _ in range(200)]
        for sock in socks:
            sock.sendall(data[:sent_at_once])
        for at in range(sent_at_once, sent_at_once + 12):
            for sock in socks:
                sock.sendall(data[at : at + 1])
            assert loaded.get("/health", timeout=3).status_code == 200
            assert loaded.post("/api/cache/clear", timeout=5).status_code == 200
            time.sleep(0.4)
        assert worker.descriptors() > worker.fds + 190


@pytest.mark.parametrize(
    "opening",
    [
        b"",
        b"GET /api/info HTTP/1.0\r\n\r\n",
        b"GET /api/info HTTP/1.1\r\nHost: x\r\n\r\n",
        b"nonsense\r\n\r\n",
    ],
    ids=["silent", "answered", "kept alive", "refused"],
)
@pytest.mark.usefixtures("worker")
def test_200_clients_that_never_leave_do_not_hold_up_health(loaded, opening):
    with contextlib.ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(dial(loaded)).sendall(opening)
        for _ in range(5):
            assert loaded.get("/health", timeout=3).status_code == 200
            time.sleep(0.2)


@pytest.mark.parametrize(
    "opening", [b"", GET_HEALTH, SLOW_BODY[:-1]], ids=["silent", "half a header", "half a body"]
)
def test_more_clients_than_threads_hold_them_up_for_a_bounded_time_only(make_service, opening):
    service = make_service(constants={"app.SILENT_CLIENT_S": 2})
    worker = Worker(service)
    with contextlib.ExitStack() as stack:
        for _ in range(300):
            stack.enter_context(dial(service)).sendall(opening)
        wait_for(lambda: service.get("/health", timeout=3).status_code == 200, 60, "/health")
    worker.assert_back()
    assert "Traceback" not in service.log()


# Very many clients


@pytest.mark.parametrize(
    "method, path", [*[("GET", path) for path in GETS], *HEALING], ids=last_part
)
@pytest.mark.usefixtures("worker")
def test_500_requests_at_once_are_all_answered(loaded, method, path):
    answers = at_once(loaded, [request_bytes(method, path)] * 500)
    for status, headers, body in answers:
        shaped(status, headers, body, path)
    assert Counter(status for status, _, _ in answers) == {200: 500}


@pytest.mark.usefixtures("worker")
def test_500_different_requests_at_once_are_all_answered(loaded):
    bodies = (b"", b"{}", b"[]", b'{"model":"nothing"}')
    wanted = [(*route, body) for route in ROUTES for body in bodies if route[1] != PULL]
    answers = at_once(loaded, [request_bytes(*wanted[n % len(wanted)]) for n in range(500)])
    others = [json.loads(body) for status, _, body in answers if status not in (200, 400, 404)]
    # There is one check of files at a time
    assert {said["code"] for said in others} <= {"verify_running"}
    assert {200, 400, 404} <= {status for status, _, _ in answers}


@pytest.mark.usefixtures("worker")
def test_half_closed_connections_get_their_answers(loaded, registry):
    for method, path in [*[("GET", path) for path in GETS], *HEALING]:
        asked = request_bytes(method, path)
        status, headers, body = raw(loaded, asked, half_close=True)
        assert status == 200 and shaped(status, headers, body, path)
    name = registry.add_random("ns/half:latest", 3)
    registry.rate = 2e6
    for stream in (True, False):
        body = json.dumps({"model": name, "insecure": True, "stream": stream}).encode()
        status, headers, said = raw(loaded, request_bytes("POST", PULL, body), half_close=True)
        assert shaped(status, headers, said, PULL)["status"] == "success"


# Clients that leave


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("by_rst", [False, True], ids=["fin", "rst"])
@pytest.mark.usefixtures("worker")
def test_listeners_that_leave_in_mid_answer_leave_nothing_behind(loaded, registry, stream, by_rst):
    name = registry.add_random("ns/leave:latest", 20, seed=f"{stream} {by_rst}")
    registry.rate = 3e5  # so that it has not ended before all fifty listen
    body = json.dumps({"model": name, "insecure": True, "stream": stream}).encode()
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(dial(loaded)) for _ in range(50)]
        for sock in socks:
            sock.sendall(request_bytes("POST", PULL, body))
            if by_rst:
                reset_on_close(sock)

        def listeners():
            return [pull["listeners"] for pull in running_pulls(loaded)]

        wait_for(lambda: listeners() == [50], 60, "fifty listeners")
    if not stream:  # nothing is written before the end: by that alone it shows that they left
        loaded.delete(PULL, json={"model": name})
    wait_for(lambda: not running_pulls(loaded), 30, "the download's end")
    wait_for(lambda: not registry.active, 30, "the transfers' end")


@pytest.mark.usefixtures("worker")
def test_callers_that_leave_at_once_leave_nothing_behind(loaded):
    for n in range(600):
        method, path = ROUTES[n % 6] if n % 3 else HEALING[0]
        with dial(loaded) as sock:
            sock.sendall(request_bytes(method, path)[: None if n % 2 else -2])
            if n % 5 == 0:
                reset_on_close(sock)
    assert loaded.get("/health", timeout=5).status_code == 200
    assert "Traceback" not in loaded.log()


def test_streams_are_bounded_and_their_places_come_back(loaded, worker, registry):
    name = registry.add_random("ns/bounded:latest", 20)
    registry.rate = 2e5  # so that the download outlasts both turns, the second of which goes on
    asked = {"model": name, "insecure": True}
    for _ in range(2):
        with contextlib.ExitStack() as stack:
            for _ in range(64):
                answer = loaded.post(PULL, json=asked, stream=True)
                stack.callback(answer.close)
                assert answer.status_code == 200
            for stream in (True, False):
                error(loaded.post(PULL, json={**asked, "stream": stream}), 429)
            assert loaded.get("/health", timeout=3).status_code == 200
            assert loaded.post(PULL, json={**asked, "detach": True}).status_code == 202
        loaded.delete(PULL, json={"model": name})
        wait_for(lambda: not running_pulls(loaded), 30, "the download's end")
        worker.assert_back()
