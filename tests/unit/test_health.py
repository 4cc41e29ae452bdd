"""What /health says of an Ollama that gave no answer."""

import subprocess

import psutil
import pytest

import app
from llm_service.errors import TimedOut, Unreachable
from llm_service.processes import alive
from llm_service.server_state import ServerState


@pytest.fixture
def server(monkeypatch):
    """A process that stands for an Ollama which has answered once."""
    with subprocess.Popen(["sleep", "60"]) as started:
        process = psutil.Process(started.pid)
        monkeypatch.setattr(app.processes, "server", lambda: process)
        monkeypatch.setattr(app.processes, "_ended", None)
        monkeypatch.setattr(app.processes, "ever_started", lambda: True)
        state = ServerState(app.ollama, app.store, app.processes)
        monkeypatch.setattr(app.watch, "server_state", state)
        state.note_answer(process)
        yield started
        started.kill()


def diagnosis(error, asked):
    code, _reason, action = app.health_report.diagnose(error("code", "no answer"), asked)
    return code, action


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize(
    ("error", "expected"),
    [(TimedOut, "ollama_hung"), (Unreachable, "ollama_unreachable")],
)
def test_one_that_lives_needs_a_reset(error, expected):
    assert diagnosis(error, app.processes.server()) == (expected, "reset_session")


def test_one_that_is_dead_and_not_reaped_is_started_again(server):
    server.kill()
    assert diagnosis(Unreachable, app.processes.server()) == ("ollama_dead", "wait")


def test_one_that_is_reaped_while_its_error_is_looked_into_is_started_again(server):
    """It dies, and takes the connection with it, while /health waits for its answer."""
    server.kill()
    server.wait()
    assert diagnosis(Unreachable, app.processes.server()) == ("ollama_dead", "wait")


@pytest.mark.usefixtures("server")
def test_one_that_was_told_to_end_is_started_again(tmp_path, monkeypatch):
    """At SIGTERM Ollama closes its connections, and waits for its runners."""
    asked = app.processes.server()
    monkeypatch.setattr(app.processes, "state_file", tmp_path / "state")
    seen = []
    monkeypatch.setattr(
        app.processes, "_send", lambda *_: seen.append(diagnosis(Unreachable, asked))
    )
    assert not app.processes.end_server(0)
    assert alive(asked) and set(seen) == {("ollama_dead", "wait")}
