"""Processes on a real Ollama: a record that is void, and the runners of a dead server."""

from pathlib import Path

import pytest

from helpers.answers import GEMMA
from helpers.waiting import call, wait_for
from llm_service.processes import Processes, alive, end


@pytest.fixture
def recorded(ollama_server, gguf, tmp_path):
    """A server with a runner, and a function that makes a Processes with a record of it."""
    server = ollama_server()
    server.add_model(GEMMA, gguf)
    call("POST", server.url + "/api/generate", json={"model": GEMMA})
    fields = Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")[2].split()
    started = int(fields[19])

    def processes(offset=0):
        (tmp_path / "state").write_text(f"{server.pid} {started + offset} 3\n")
        return Processes(str(tmp_path / "state"))

    return server, processes


@pytest.mark.parametrize("offset", [1, -1])
def test_a_record_with_another_start_time_is_void(recorded, offset):
    server, processes = recorded
    ours = processes()
    assert ours.server().pid == server.pid
    (found,) = ours.runners()
    (runner,) = server.runners()
    assert found.process.pid == runner.pid
    void = processes(offset)
    assert void.server() is None
    assert void.all() == [] and void.runners() == []
    assert void.end_server(0.1) is True
    assert server.process.poll() is None and runner.is_running()


def test_runners_of_a_dead_server_are_found_by_its_session(recorded):
    server, processes = recorded
    server.kill()
    dead = processes()
    assert dead.server() is None
    (orphan,) = dead.runners()
    end(orphan.process)
    wait_for(lambda: not alive(orphan.process), 30, "the orphan is gone")
    assert dead.runners() == []
