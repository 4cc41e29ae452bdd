"""A verify whose caller leaves, and beside downloads, prunes and a hung Ollama."""

import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
import requests

from helpers.answers import GEMMA, error
from helpers.listener import PULL, VERIFY, Listener
from helpers.models import add_sparse_model, blob_path
from helpers.raw import dial, request_bytes
from helpers.waiting import wait_for

LONG = 30_000_000_000  # bytes that take many seconds to read
SHORT = 1000


@pytest.fixture(scope="module")
def slow(make_module_service):
    service = make_module_service()
    service.long = add_long_model(service)
    add_sparse_model(service.models, "short", SHORT)
    return service


def add_long_model(service):
    """Add a model that takes long to read; return the path of its file."""
    return blob_path(service.models, add_sparse_model(service.models, "long", LONG))


def is_running(service):
    """Tell whether a verify has the long file open: another one would get in its way."""
    worker = psutil.Process(service.worker_pid())
    return service.long.name in [Path(file.path).name for file in worker.open_files()]


def ended(service):
    # By itself it would take longer.
    wait_for(lambda: not is_running(service), 8, "the end of the verify")
    short = {"model": "short", "stream": False}
    wait_for(lambda: service.post(VERIFY, json=short).ok, 8, "room for another one")


def test_one_at_a_time_and_it_ends_when_its_caller_leaves(slow):
    listener = Listener(slow, None, VERIFY).flowing()
    error(slow.post(VERIFY), 409, "verify_running")
    assert not listener.done
    listener.leave()
    ended(slow)


def test_a_caller_of_one_answer_leaves(slow):
    with dial(slow) as sock:
        sock.sendall(request_bytes("POST", f"{VERIFY}?stream=false"))
        wait_for(lambda: is_running(slow), 30, "the verify")
    ended(slow)


def test_a_verify_ends_with_the_service(make_service):
    service = make_service()
    add_sparse_model(service.models, "long", LONG)
    listener = Listener(service, None, VERIFY).flowing()
    service.stop()
    assert listener.end()["code"] == "shutting_down"


def test_a_verify_needs_no_ollama(make_service, gguf):
    service = make_service(models={GEMMA: gguf}, LLM_SELF_HEAL="off")
    ollama = service.ollama_pid()
    subprocess.run(["kill", f"-{signal.SIGSTOP}", str(ollama)], check=True)
    answer = service.post(f"{VERIFY}?stream=false", timeout=60)
    subprocess.run(["kill", f"-{signal.SIGCONT}", str(ollama)], check=True)
    assert [model["ok"] for model in answer.json()["models"]] == [True]


@pytest.fixture
def fresh(make_service, registry):
    """A service with two downloaded models, and one that takes long to read."""
    service = make_service()
    service.long = add_long_model(service)
    for name in ("ns/one:latest", "ns/two:latest"):
        pull(service, registry.add_random(name, 20))
    return service


def whole(last):
    return {
        model["name"]: model["ok"] for model in last["models"] if model["name"] != "long:latest"
    }


def pull(service, name):
    answer = service.post(PULL, json={"model": name, "insecure": True, "stream": False})
    assert answer.status_code == 200, answer.text


def test_an_update_and_a_prune_beside_a_verify(fresh, registry):
    listener = Listener(fresh, None, VERIFY).flowing()
    name = registry.add_random("ns/one:latest", 20, seed="newer")
    pull(fresh, name)
    pruned = fresh.post("/api/models/prune", json={"older_than_s": 0})
    assert pruned.status_code == 200
    assert not listener.done  # all of it was beside
    os.truncate(fresh.long, SHORT)  # so that it ends soon
    last = listener.end()
    assert whole(last) == {
        f"localhost:{registry.port}/ns/one:latest": True,
        f"localhost:{registry.port}/ns/two:latest": True,
    }
    for name in ("ns/one:latest", "ns/two:latest"):
        for layer in registry.layers(name):
            path = blob_path(fresh.models, layer["digest"])
            assert path.stat().st_size == layer["size"]


def test_a_delete_beside_a_verify(fresh, registry):
    listener = Listener(fresh, None, VERIFY).flowing()
    one = f"localhost:{registry.port}/ns/one:latest"
    assert fresh.delete("/api/models/delete", json={"model": one}).status_code == 200
    assert not listener.done
    os.truncate(fresh.long, SHORT)
    last = listener.end()
    assert whole(last) == {f"localhost:{registry.port}/ns/two:latest": True}


def test_the_readmes_line_tells_what_is_damaged(make_service, registry):
    fresh = make_service()
    pull(fresh, registry.add_random("ns/two:latest", 20))
    two = registry.layers("ns/two:latest")[0]["digest"]
    assert "llm_models_damaged" not in fresh.get("/metrics").text
    with blob_path(fresh.models, two).open("r+b") as file:
        file.write(b"damaged")
    line = f"curl -sN -X POST {fresh.url}/api/models/verify | tail -1"
    shown = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)
    last = requests.models.complexjson.loads(shown.stdout)
    assert [model["name"] for model in last["models"] if model["damaged"] == [two]] == [
        f"localhost:{registry.port}/ns/two:latest"
    ]
    assert "\nllm_models_damaged 1\n" in fresh.get("/metrics").text
