"""start.sh: settings, ports, signals, deaths, and what a killed one leaves."""

import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest

from helpers.causes import slow_ollama
from helpers.places import ROOT
from helpers.ports import free_port
from helpers.waiting import wait_for


def run_start(*arguments, **env):
    return subprocess.run(
        ["./start.sh", *arguments],
        cwd=ROOT,
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


def lines_of(ended):
    """Return what it said, without what it says where another test's start.sh holds the lock."""
    waiting = "llm-service: waiting for another start.sh"
    return [line for line in ended.stderr.splitlines() if line != waiting]


def assert_one_line(ended, *words):
    assert ended.returncode == 1 and ended.stdout == ""
    (line,) = lines_of(ended)
    assert all(word in line for word in words), line


# Settings


@pytest.mark.parametrize(
    "name, value",
    [
        ("LLM_CONTEXT_LENGTH", "many"),
        ("LLM_CONTEXT_LENGTH", "0"),
        ("LLM_GPU_LAYERS", "some"),
        ("LLM_API_PORT", "65536"),
        ("LLM_API_PORT", "http"),
        ("LLM_MAX_PULLS", "0"),
        ("LLM_MODEL", "../etc/passwd"),
        ("LLM_ALLOWED_HOSTS", "http://dashboard"),
        ("LLM_ALLOWED_ORIGINS", "dashboard"),
        ("LLM_API_TOKEN", "two words"),
    ],
)
def test_a_setting_that_makes_no_sense_stops_the_start_with_one_line(name, value):
    assert_one_line(run_start(LLM_VENV=sys.prefix, **{name: value}), name, "takes")


@pytest.mark.parametrize(
    "name, value",
    [
        ("LLM_API_HOST", "nowhere.invalid"),
        ("LLM_API_HOST", "192.0.2.1"),
        ("OLLAMA_HOST", "http://[bad"),
    ],
)
def test_an_address_that_cannot_be_listened_on_stops_the_start_with_one_line(name, value):
    env = {"LLM_API_PORT": str(free_port()), "LLM_VENV": sys.prefix, name: value}
    assert_one_line(run_start(**env), f"{name}=", value)


def test_an_unknown_argument_is_refused():
    ended = run_start("--fast")
    assert ended.returncode == 1 and "--fast" in ended.stderr


def test_a_set_up_machine_is_not_set_up_again():
    ended = run_start("--setup", "tests/requirements.txt")
    python, ollama = ended.stdout.splitlines()
    assert ended.returncode == 0 and lines_of(ended) == []
    assert os.access(python, os.X_OK) and os.access(ollama, os.X_OK)


def test_context_length_and_gpu_layers_hold_for_callers_of_ollamas_own_port(make_service, gguf):
    service = make_service(models={"gemma": gguf}, LLM_CONTEXT_LENGTH=1536, LLM_GPU_LAYERS=7)
    runner = service.load("gemma")
    command = runner.cmdline()
    assert command[command.index("-c") + 1] == "1536"
    assert runner.environ()["LLAMA_ARG_N_GPU_LAYERS"] == "7"
    info = service.get("/api/info").json()
    assert info["context_length"] == 1536 and info["gpu_layers"] == "7"
    (loaded,) = service.get("/api/models/loaded").json()["loaded_models"]
    assert loaded["context_length"] == 1536


def test_ollamas_own_context_length_wins_and_auto_leaves_the_layers_to_ollama(make_service, gguf):
    service = make_service(
        models={"gemma": gguf},
        OLLAMA_CONTEXT_LENGTH=1024,
        LLM_CONTEXT_LENGTH=2048,
        LLM_GPU_LAYERS="auto",
    )
    runner = service.load("gemma")
    assert runner.cmdline()[runner.cmdline().index("-c") + 1] == "1024"
    assert "LLAMA_ARG_N_GPU_LAYERS" not in runner.environ()
    assert service.get("/api/info").json()["context_length"] == 1024


# Ports


def test_a_taken_api_port_stops_the_start(make_service):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        service = make_service(wait=False, LLM_API_PORT=port)
        assert service.process.wait(20) == 1
        assert "LLM_API_PORT" in service.log() and str(port) in service.log()


def test_an_ollama_port_taken_by_something_else_stops_the_start(make_service):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        service = make_service(wait=False, OLLAMA_HOST=address)
        assert service.process.wait(20) == 1
        assert "OLLAMA_HOST" in service.log()


# The start


def test_health_says_wait_while_ollama_starts(make_service, tmp_path, ollama_binary):
    slow = slow_ollama(tmp_path, ollama_binary, 3)
    service = make_service(wait=False, PATH=f"{slow.parent}:{os.environ['PATH']}")
    # In a list, as a 503 alone is false.
    (answer,) = wait_for(lambda: [service.get("/health")], 20, "the API's first answer")
    assert answer.status_code == 503
    assert answer.json()["recommended_action"] == "wait"
    assert answer.headers["Retry-After"]
    service.wait_healthy(20)


# The end


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_it_ends_within_10_s_with_status_0_and_leaves_no_process(make_service, gguf, sig):
    service = make_service(models={"gemma": gguf})
    service.generate("gemma")
    began = time.monotonic()
    assert service.stop(sig) == 0
    assert time.monotonic() - began < 10


def test_it_ends_within_10_s_though_ollama_hangs(make_service):
    service = make_service()
    os.kill(service.ollama_pid(), signal.SIGSTOP)
    began = time.monotonic()
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(15) == 0
    assert time.monotonic() - began < 10
    assert not service.processes()


def test_gunicorns_death_ends_all_with_its_status(make_service):
    service = make_service()
    master = psutil.Process(service.worker_pid()).ppid()
    os.kill(master, signal.SIGKILL)
    assert service.process.wait(20) == 128 + signal.SIGKILL
    wait_for(lambda: not service.processes(), 5, "the end of all processes")


def test_five_deaths_of_ollama_within_a_minute_end_the_service(make_service):
    service = make_service()

    def next_one(pid):
        # Before start.sh ends, it removes what it has recorded.
        lines = service.state_lines()
        return service.process.poll() is not None or (lines and lines[-1][0] != pid)

    for _ in range(5):
        pid = service.ollama_pid()
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda dead=pid: next_one(dead), 15, "the next Ollama")
    assert service.process.wait(20) == 1
    wait_for(lambda: not service.processes(), 5, "the end of all processes")


def test_a_killed_launcher_leaves_nothing_that_disturbs_the_next_start(make_service, gguf):
    first = make_service(models={"gemma": gguf})
    first.load("gemma")
    first.process.kill()
    first.process.wait()
    wait_for(lambda: not first.processes(), 15, "the end of all that the killed launcher started")
    address = f"127.0.0.1:{first.ollama_port}"
    second = make_service(LLM_API_PORT=first.port, OLLAMA_HOST=address)
    assert second.get("/health").json()["status"] == "healthy"
