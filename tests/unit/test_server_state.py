"""When Ollama is asked again what it has loaded."""

import math
import signal
import subprocess
import sys

import psutil
import pytest

import app
from helpers.waiting import wait_for
from llm_service.errors import TimedOut
from llm_service.server_state import ServerState

# Uses 20 ms of CPU for each line that it reads.
WORKER = """
import sys, time
print("ready", flush=True)
for _ in sys.stdin:
    began = time.process_time()
    while time.process_time() < began + 0.02: pass
    print("done", flush=True)
"""


@pytest.fixture
def server():
    """A process that stands for Ollama's server, and does nothing."""
    command = [sys.executable, "-IS", "-c", WORKER]
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True, bufsize=1) as worker:
        worker.stdout.readline()
        yield worker
        worker.kill()


@pytest.fixture
def asked(monkeypatch, server):
    """Answers "what is loaded?" by the number of the question."""
    questions = []

    def ps(_timeout_s):
        questions.append(1)
        return [{"name": f"m{len(questions)}"}]

    monkeypatch.setattr(app.ollama, "ps", ps)
    process = psutil.Process(server.pid)
    monkeypatch.setattr(app.processes, "server", lambda: process)
    waits = psutil.STATUS_SLEEPING
    wait_for(lambda: process.status() == waits, 30, "the server waits for work")
    state = ServerState(app.ollama, app.store, app.processes)
    state.ask_loaded(process, 1)
    assert state.loaded_now() == state.loaded_now() == [{"name": "m1"}]
    return state


def test_a_server_that_has_worked_since_is_asked_again(asked, server):
    server.stdin.write("\n")
    server.stdout.readline()
    assert asked.loaded_now() == [{"name": "m2"}]


def test_a_stopped_server_is_asked_as_that_tells_that_it_hangs(asked, server):
    server.send_signal(signal.SIGSTOP)
    process = psutil.Process(server.pid)
    wait_for(lambda: process.status() == psutil.STATUS_STOPPED, 30, "it is stopped")
    assert asked.loaded_now() == [{"name": "m2"}]


@pytest.mark.parametrize("reaped", [True, False])
def test_after_its_end_its_successor_is_asked(asked, server, reaped):
    process = psutil.Process(server.pid)
    server.kill()
    wait_for(lambda: process.status() == psutil.STATUS_ZOMBIE, 30, "it is dead")
    if reaped:
        server.wait()
    assert asked.loaded_now() == [{"name": "m2"}]


def test_a_server_that_was_silent_at_the_last_look_is_asked(asked):
    asked.note_silence(app.processes.server())
    assert asked.loaded_now() == [{"name": "m2"}]
    assert asked.loaded_now() == [{"name": "m2"}]  # it has answered


def test_what_was_said_while_the_server_worked_is_not_kept(asked, server, monkeypatch):
    def ps(_timeout_s):
        server.stdin.write("\n")  # another caller's request, which may end after the answer
        server.stdout.readline()
        return [{"name": "old"}]

    answer = app.ollama.ps
    monkeypatch.setattr(app.ollama, "ps", ps)
    asked.ask_loaded(app.processes.server(), 1)
    monkeypatch.setattr(app.ollama, "ps", answer)
    assert asked.loaded_now() == [{"name": "m2"}]


def test_where_the_clock_cannot_be_read_the_server_is_asked(asked, monkeypatch):
    monkeypatch.setattr("llm_service.server_state.cpu_clock_s", lambda _: math.nan)
    assert asked.loaded_now() == [{"name": "m2"}]
    assert asked.loaded_now() == [{"name": "m3"}]


# By looks of the watch


@pytest.fixture
def looks(asked, monkeypatch):
    """Looks at two seconds' distance; each returns the name of what is loaded."""
    now = [asked._clock()]
    monkeypatch.setattr(asked, "_clock", lambda: now[0])

    def look(server=None):
        now[0] += 2
        (line,) = asked.look_at_loaded(server or app.processes.server(), 1)
        return line["name"]

    return look


def test_a_quiet_server_is_asked_at_one_look_in_four(looks):
    assert [looks() for _ in range(8)] == ["m1"] * 3 + ["m2"] * 4 + ["m3"]


def test_a_server_that_has_worked_since_the_last_look_is_asked(looks, server):
    server.stdin.write("\n")
    server.stdout.readline()
    assert looks() == looks() == "m2"


def test_each_look_asks_a_server_that_was_silent(looks, asked, monkeypatch):
    def ps(_timeout_s):
        questions.append(1)
        raise TimedOut("ollama_timeout", "")

    questions = []
    monkeypatch.setattr(app.ollama, "ps", ps)
    asked.note_silence(app.processes.server())
    for _ in range(3):
        with pytest.raises(TimedOut):
            looks()
    assert len(questions) == 3


def test_a_look_asks_the_successor_of_a_quiet_server(looks):
    assert looks(psutil.Process()) == "m2"


def test_a_look_asks_a_stopped_server(looks, server):
    server.send_signal(signal.SIGSTOP)
    process = psutil.Process(server.pid)
    wait_for(lambda: process.status() == psutil.STATUS_STOPPED, 30, "it is stopped")
    assert [looks(), looks()] == ["m2", "m3"]
