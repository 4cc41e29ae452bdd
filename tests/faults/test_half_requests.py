"""Who has sent half a request waits for nobody but himself, on a real Ollama."""

import socket
import time

import pytest

from helpers.answers import GEMMA, ask, stats
from helpers.impatient import STUCK_S, VERDICT_S, health, impatient
from helpers.waiting import wait_for
from llm_service.loading import QUEUE_THREADS

HALF = b"POST /api/generate HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n"


@pytest.fixture
def make(make_service, gguf):
    return impatient(make_service, gguf)


@pytest.mark.parametrize("healing, loaded", [("on", True), ("on", False), ("off", True)])
def test_half_a_request_is_no_fault_though_others_came_just_after_it(make, healing, loaded):
    """What Ollama reads for the others looks as if it was for that one."""
    service = make(LLM_SELF_HEAL=healing)
    server = service.ollama_pid()
    with socket.create_connection(("127.0.0.1", service.ollama_port)) as half:
        half.sendall(HALF)
        ask(service)
        if not loaded:
            service.ollama("POST", "/api/generate", json={"model": GEMMA, "keep_alive": 0})
            wait_for(lambda: contexts(service) == [], 30, "nothing is loaded")
        lines = service.ollama("GET", "/api/ps").json()["models"]
        words = f"a load of {GEMMA} went through Ollama's queue"

        def seen():
            told = health(service)
            assert told["status"] == "healthy", told
            return words in service.log()

        def warned():  # not while what is loaded for the look into it may be for who waits
            return [each["code"] for each in health(service)["warnings"]] == ["callers_waiting"]

        wait_for(seen, VERDICT_S + 20, "a look into it")
        wait_for(warned, 30, "the warning")
        wait_for(
            lambda: contexts(service) == [line["context_length"] for line in lines], 60, "as before"
        )
        for _ in range(STUCK_S):
            time.sleep(1)
            assert health(service)["status"] == "healthy"
    assert service.log().count(words) == 1
    assert service.ollama_pid() == server and stats(service)["healed"]["last"] is None


def test_half_a_request_is_no_fault_where_the_model_is_loaded_as_it_is_tried(make):
    """Then it answers past the queue: it has to be unloaded first."""
    service = make()
    server = service.ollama_pid()
    with socket.create_connection(("127.0.0.1", service.ollama_port)) as half:
        half.sendall(HALF)
        service.load(GEMMA, num_thread=QUEUE_THREADS)

        def seen():
            told = health(service)
            assert told["status"] == "healthy", told
            return f"a load of {GEMMA} went through Ollama's queue" in service.log()

        wait_for(seen, VERDICT_S + 20, "a look into it")
    assert service.ollama_pid() == server and stats(service)["healed"]["last"] is None


def test_half_a_request_is_no_fault_where_the_model_does_not_load(make):
    """Ollama's error of that load has come through its queue, too."""
    service = make()
    server = service.ollama_pid()
    weights = max((service.models / "blobs").iterdir(), key=lambda blob: blob.stat().st_size)
    weights.unlink()  # it is a link to what others use
    weights.write_bytes(b"GGUF" + bytes(1 << 16))
    with socket.create_connection(("127.0.0.1", service.ollama_port)) as half:
        half.sendall(HALF)
        for _ in range(3):
            answer = service.ollama("POST", "/api/generate", json={"model": GEMMA, "prompt": "x"})
            assert answer.status_code == 500
        words = f"a load of {GEMMA} went through Ollama's queue"
        wait_for(lambda: words in service.log(), VERDICT_S + 20, "a look into it")
        for _ in range(10):
            assert health(service)["status"] == "healthy"
            time.sleep(1)
    assert service.ollama_pid() == server and stats(service)["healed"]["last"] is None


def contexts(service):
    models = service.ollama("GET", "/api/ps").json()["models"]
    return [model["context_length"] for model in models]
