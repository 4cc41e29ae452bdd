"""Who waits for long, and not in vain: each kind for far longer than LLM_STUCK_SECONDS."""

import contextlib
import hashlib
import http.client
import json
import os
import shutil
import socket
import subprocess
import time

import pytest
import requests

from helpers.answers import GEMMA, clear, stats
from helpers.deaf_ollama import stand_in
from helpers.embedding import add_embedding_model
from helpers.frozen import frozen
from helpers.generation import ENDLESS, PROMPT
from helpers.ports import free_port
from helpers.waiting import call, wait_for

# By hand for as long as one likes, with the real limits: a verdict takes LLM_TEST_STUCK_S and 16 s
# more. Else by smaller ones: it takes 10 s.
BY_HAND = os.environ.get("LLM_TEST_WAIT_S")
WAIT_S = float(BY_HAND or 16)
SMALL = {"llm_service.callers.LOOKS": 3, "llm_service.callers.CHECK_S": 1}
STUCK_S = os.environ.get("LLM_TEST_STUCK_S", 20) if BY_HAND else 4
LIMITS = {"LLM_STUCK_SECONDS": STUCK_S, "constants": None if BY_HAND else SMALL}

pytestmark = pytest.mark.timeout(180 + WAIT_S)


@pytest.fixture(scope="module")
def service(make_module_service, gguf):
    return make_module_service(
        models={GEMMA: gguf},
        LLM_MODEL=GEMMA,
        **LIMITS,
        LLM_CONTEXT_LENGTH=32768 if BY_HAND else 4096,  # an answer ends where that is full
        OLLAMA_REMOTES="127.0.0.1",
        OLLAMA_LOAD_TIMEOUT="1h",
    )


@pytest.fixture(autouse=True)
def well(service):
    """Begin with nothing loaded, and end with nothing healed."""
    service.wait_healthy(60)
    clear(service)
    before = stats(service)["healed"]
    yield
    assert stats(service)["healed"] == before
    clear(service)


class Request:
    """A request to Ollama that is under way; .close() leaves."""

    def __init__(self, service, path, body):
        self._connection = http.client.HTTPConnection("127.0.0.1", service.ollama_port)
        self._connection.request("POST", path, json.dumps(body))

    def close(self):
        self._connection.close()


def endure(service, waits=True):
    """Let it be so for WAIT_S: somebody waits all that time, and /health finds no fault."""
    longest_s = 0
    until = time.monotonic() + WAIT_S
    while time.monotonic() < until:
        health = service.get("/health")
        assert health.status_code == 200, health.text
        longest_s = max(longest_s, stats(service)["callers"]["longest_wait_s"])
        time.sleep(1)
    assert (longest_s > WAIT_S - 6) is waits


def generate(**options):
    options = {**ENDLESS, **options}
    return {"model": GEMMA, "prompt": PROMPT, "raw": True, "stream": False, "options": options}


# What the runners do


def test_a_long_answer_that_does_not_stream(service):
    service.load(GEMMA)
    with contextlib.closing(Request(service, "/api/generate", generate())):
        endure(service)


def test_a_queue(service):
    service.load(GEMMA)
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            asked = Request(service, "/api/generate", generate())
            stack.enter_context(contextlib.closing(asked))
        endure(service)
        codes = [each["code"] for each in service.get("/health").json()["warnings"]]
    assert codes == ["callers_waiting"]


def test_embeddings_of_a_long_text(service):
    add_embedding_model(service.models, "letters")
    parts = ["a b c d e " * 45] * round(25 * WAIT_S)
    with contextlib.closing(Request(service, "/api/embed", {"model": "letters", "input": parts})):
        endure(service)


def has_loaded(runner):
    words = runner.cmdline()
    try:
        return call("GET", f"http://127.0.0.1:{words[words.index('--port') + 1]}/health").ok
    except requests.ConnectionError:  # it does not listen yet
        return False


@contextlib.contextmanager
def loading_for_ever(service):
    """Hold a runner's main thread before it has loaded: one that was quicker makes room."""
    for _ in range(10):
        with contextlib.closing(Request(service, "/api/generate", generate())):
            (runner,) = wait_for(service.runners, 30, "a runner")
            runner.suspend()
            with frozen(runner, answering=False):
                runner.resume()
                if not has_loaded(runner):
                    yield
                    return
        clear(service)
    raise AssertionError("each runner had loaded before it was held")


def test_a_model_that_loads_for_long(service):
    with loading_for_ever(service):
        endure(service)
        assert [each["state"] for each in stats(service)["runners"]] == ["loading"]


def test_a_runner_that_tells_nothing_of_its_work(make_service, tmp_path):
    """As MLX's does."""
    mlx = make_service(PATH=stand_in(tmp_path), WORKING_RUNNER="1", **LIMITS)
    wait_for(mlx.runners, 30, "the runner")
    body = {"model": "mlx", "prompt": "Why?"}
    with contextlib.closing(Request(mlx, "/api/generate", body)):
        endure(mlx)
        assert [each["state"] for each in stats(mlx)["runners"]] == ["unwatched"]
    assert stats(mlx)["healed"]["last"] is None


# What the server does


@contextlib.contextmanager
def pulling(service, name):
    body = {"model": name, "insecure": True, "stream": False}
    with contextlib.closing(Request(service, "/api/pull", body)):
        yield


def test_a_pull_whose_registry_has_stalled(service, registry):
    name = registry.add_random("ns/stalled:latest", 20)
    registry.stall_after(5_000_000)
    with pulling(service, name):
        endure(service)


def test_a_pull_whose_registry_thinks_about_the_manifest(service, registry):
    name = registry.add_random("ns/late:latest", 1)
    registry.manifest_delay = 10 * WAIT_S
    with pulling(service, name):
        endure(service)


def test_a_model_in_the_cloud(service):
    with socket.create_server(("127.0.0.1", 0)) as cloud:
        url = f"http://127.0.0.1:{cloud.getsockname()[1]}"
        body = {"model": "far", "from": "far-away", "remote_host": url, "stream": False}
        made = service.ollama("POST", "/api/create", json=body)
        assert made.ok, made.text
        asked = {"model": "far", "prompt": "Why?", "stream": False}
        with contextlib.closing(Request(service, "/api/generate", asked)):
            endure(service)


# What callers do


LINE = "POST /api/generate HTTP/1.1\r\n"
HEAD = f"{LINE}Host: localhost\r\nContent-Length: 99\r\n\r\n"
HALVES = {"one line": LINE, "without a body": HEAD, "half a body": f'{HEAD}{{"model":'}


@pytest.mark.parametrize("text", HALVES.values(), ids=HALVES)
def test_half_a_request(service, text):
    with socket.create_connection(("127.0.0.1", service.ollama_port)) as caller:
        caller.sendall(text.encode())
        endure(service)


def test_the_files_of_a_create_that_come_no_further(service):
    content = bytes(1 << 20)
    path = f"/api/blobs/sha256:{hashlib.sha256(content).hexdigest()}"
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", service.ollama_port)) as caller:
        caller.sendall(head.encode() + content[:500_000])
        endure(service)


def test_connections_that_are_kept_and_those_that_say_nothing(service):
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            kept = http.client.HTTPConnection("127.0.0.1", service.ollama_port)
            stack.callback(kept.close)
            kept.request("GET", "/api/tags")
            assert kept.getresponse().read()
            silent = socket.create_connection(("127.0.0.1", service.ollama_port))
            stack.enter_context(silent)
        endure(service, waits=False)


PROXY = """
defaults
    mode http
    timeout connect 2s
    timeout client 1h
    timeout server 1h
frontend callers
    bind 127.0.0.1:{port}
    default_backend ollama
backend ollama
    http-reuse always
    server ollama 127.0.0.1:{upstream} pool-purge-delay 1h
"""


@contextlib.contextmanager
def haproxy(folder, upstream):
    """A proxy that keeps its connections to the server: its port."""
    if not shutil.which("haproxy"):
        pytest.skip("no haproxy: tests/run.sh --system installs it")
    port = free_port()
    configuration = folder / "haproxy.cfg"
    configuration.write_text(PROXY.format(port=port, upstream=upstream))
    with subprocess.Popen(["haproxy", "-f", configuration]) as process:
        try:
            yield port
        finally:
            process.kill()


def test_a_proxy_that_keeps_its_connections(service, tmp_path):
    with haproxy(tmp_path, service.ollama_port) as port:
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: call("GET", f"{url}/api/version").ok, 30, "the proxy")
        assert call("POST", f"{url}/api/show", json={"model": GEMMA}).ok
        endure(service, waits=False)
        assert stats(service)["callers"]["connections"] > 0
        assert not stats(service)["callers"]["waiting"]


def test_a_caller_who_does_not_read_his_answer(service):
    service.load(GEMMA)
    body = json.dumps({**generate(), "stream": True})
    head = f"POST /api/generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", service.ollama_port)) as caller:
        caller.sendall((head + body).encode())
        endure(service, waits=False)


# And that all these would have been found


def test_who_waits_in_vain_is_found_in_that_time(make_service, tmp_path):
    deaf = make_service(PATH=stand_in(tmp_path), **LIMITS)
    body = {"model": "m", "prompt": "Why?"}
    with contextlib.closing(Request(deaf, "/api/generate", body)):
        # By this the tests above would be red.
        wait_for(lambda: deaf.get("/health").status_code == 503, WAIT_S, "a fault")
        wait_for(lambda: stats(deaf)["healed"]["ollama"], 60, "a healing")
