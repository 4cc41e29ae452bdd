"""A start is not a hang, and a kept connection loses no request."""

import http.client
import json
import random
import shutil
import subprocess
import sys
import threading

import pytest
import requests

from helpers.waiting import wait_for

BIG = b" " * 70_000  # over the limit of 64 KiB
SLOW_START = """#!{python}
# Ollama as it starts with a GPU: it takes connections and answers nobody for a while.
import os, socket, sys, time
if sys.argv[1] == "serve":
    with open("{starts}", "a") as file:
        file.write("start\\n")
    time.sleep({before})
    host, port = os.environ["OLLAMA_HOST"].split(":")
    with socket.create_server((host, int(port))):
        time.sleep({seconds})
os.execv("{ollama}", ["ollama", *sys.argv[1:]])
"""


@pytest.fixture
def slow_start(make_service, tmp_path, ollama_binary):
    """Factory: a service whose Ollama answers nobody for `seconds` after its port is open.

    The port opens after `before` seconds.
    """

    def make(seconds, before=0, **settings):
        wrapper, starts = tmp_path / "ollama", tmp_path / "starts"
        values = {"python": sys.executable, "ollama": ollama_binary, "starts": starts}
        wrapper.write_text(SLOW_START.format(seconds=seconds, before=before, **values))
        wrapper.chmod(0o755)
        path = f"{tmp_path}:/usr/local/bin:/usr/bin:/bin"
        service = make_service(wait=False, PATH=path, **settings)
        wait_for(lambda: service.get("/api/info").ok, 60, "the API's first answer")
        service.starts = lambda: len(starts.read_text().splitlines())
        return service

    return make


def test_a_watchdog_that_obeys_lets_a_slow_start_end(slow_start, gguf):
    service = slow_start(20, models={"gemma:latest": gguf}, LLM_MODEL="gemma")
    seen = set()

    def obey():
        answer = service.get("/health", timeout=5)
        if answer.status_code == 200:
            return True
        report = answer.json()
        seen.add((answer.status_code, report["code"], report["recommended_action"]))
        if report["recommended_action"] == "reset_session":
            service.post("/api/session/reset", timeout=5)
        threading.Event().wait(1)

    wait_for(obey, 120, "Ollama is up")
    assert seen <= {(503, "ollama_starting", "wait"), (503, "ollama_dead", "wait")}
    assert (503, "ollama_starting", "wait") in seen
    assert service.starts() == 1


def test_clear_and_reset_leave_a_starting_server_alone(slow_start, gguf):
    # A clear and two resets take up to 13 s.
    service = slow_start(20, models={"gemma:latest": gguf}, LLM_MODEL="gemma")
    wait_for(
        lambda: service.get("/health").json().get("code") == "ollama_starting", 20, "it starts"
    )
    cleared = service.post("/api/cache/clear", timeout=5)
    assert cleared.status_code == 200
    assert "nothing was loaded" in cleared.json()["message"]
    for body in ({}, {"restart": True}):
        reset = service.post("/api/session/reset", json=body, timeout=5)
        assert reset.status_code == 200
        assert reset.json()["model_state"] == "loading"
    service.wait_healthy(60)
    assert service.starts() == 1
    wait_for(
        lambda: service.get("/api/models/loaded").json().get("count"),
        60,
        "the reset's model is loaded",
    )


def test_a_reset_whose_new_server_still_starts_is_a_success(slow_start, gguf):
    """A watchdog must not restart the container that is just healing."""
    service = slow_start(0.1, before=10, models={"gemma:latest": gguf}, LLM_MODEL="gemma")
    service.wait_healthy(60)
    reset = service.post("/api/session/reset", json={"restart": True}, timeout=5)
    report = reset.json()
    assert (reset.status_code, report["status"]) == (200, "success")
    assert report["model_state"] == "loading"
    assert service.get("/health").json()["recommended_action"] == "wait"
    service.wait_healthy(60)
    assert service.starts() == 2


@pytest.mark.parametrize("layers, passed", [("-1", "all"), ("all", "all"), ("0", "0")])
def test_every_layer_has_two_spellings(make_service, gguf, layers, passed):
    service = make_service(models={"gemma": gguf}, LLM_GPU_LAYERS=layers)
    runner = service.load("gemma")
    assert runner.environ()["LLAMA_ARG_N_GPU_LAYERS"] == passed


# Kept connections


class Asker:
    """Mixed requests, and what each must be answered: the model's name tells whose it is."""

    def __init__(self, seed):
        self._random = random.Random(seed)
        self._count = 0

    def next(self):
        """Return (method, path, body, status, words that the answer contains)."""
        self._count += 1
        name = f"absent{self._count}"
        small = json.dumps({"model": name}).encode()
        return self._random.choice(
            [
                ("GET", "/api/info", None, 200, "llm-service"),
                ("DELETE", f"/api/models/delete?model={name}", None, 404, name),
                ("DELETE", "/api/models/delete", small, 404, name),
                ("POST", "/api/models/delete", small + b" " * 60_000, 405, "DELETE"),
                ("POST", f"/api/{name}", small, 404, "no such path"),
                ("POST", "/api/cache/clear", BIG, 413, "64 KiB"),
                ("POST", f"/api/{name}", BIG, 413, "64 KiB"),
                ("POST", "/api/models/pull", b"{" + small, 400, "JSON"),
                ("POST", "/health", small, 405, "GET"),
            ]
        )


@pytest.mark.parametrize(
    "method, path, body",
    [
        ("GET", "/health", None),
        ("GET", "/", None),
        ("HEAD", "/api/models", None),
        ("OPTIONS", "/api/models", None),
        ("POST", "/api/cache/clear", None),
        ("POST", "/api/cache/clear", b"{"),
        ("GET", "/api/nothing", None),
        ("PUT", "/api/models", b"{}"),
        ("GET", "/metrics", None),
    ],
)
def test_a_kept_connection_says_for_how_long_and_is_kept(service, method, path, body):
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=60)
    connection.request(method, path, body)
    answer = connection.getresponse()
    answer.read()
    assert answer.headers.get_all("Keep-Alive") == ["timeout=30"]
    assert answer.headers["Connection"] == "keep-alive"
    sock = connection.sock
    connection.request("GET", "/api/info")
    assert json.load(connection.getresponse()) and connection.sock is sock
    connection.close()


CLOSED = {
    "a body that is too long": (b"POST /api/cache/clear HTTP/1.1", b"Content-Length: 70000", BIG),
    "chunks": (b"POST /api/cache/clear HTTP/1.1", b"Transfer-Encoding: chunked", b"0\r\n\r\n"),
    "the client's wish": (b"GET /api/info HTTP/1.1", b"Connection: close", b""),
    "HTTP/1.0": (b"GET /api/info HTTP/1.0", b"A: b", b""),
    "no request": (b"GET /api/info HTTP/1.1", b"no header", b""),
}


@pytest.mark.parametrize("first, header, body", CLOSED.values(), ids=list(CLOSED))
def test_a_closed_connection_says_so_and_names_no_time(service, first, header, body):
    sent = b"\r\n".join([first, b"Host: localhost", header, b"", b""]) + body
    ((_, headers),) = read_answers(service.port, sent)
    assert headers["Connection"] == "close" and "Keep-Alive" not in headers


def test_requests_loses_nothing_on_a_kept_connection(service):
    asker = Asker(1)
    with requests.Session() as session:
        session.trust_env = False
        for _ in range(500):
            method, path, body, status, words = asker.next()
            answer = session.request(method, service.url + path, data=body, timeout=60)
            assert (answer.status_code, words in answer.text) == (status, True), (path, answer.text)


def test_http_client_loses_nothing_on_a_kept_connection(service):
    asker = Asker(2)
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=60)
    for _ in range(500):
        method, path, body, status, words = asker.next()
        connection.request(method, path, body)  # connects anew only after an answer that closed
        answer = connection.getresponse()
        text = answer.read().decode()
        assert (answer.status, words in text) == (status, True), (path, text)
    connection.close()


AIOHTTP = """
import asyncio, json, sys
import aiohttp

async def main(url, asked):
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=4)) as session:
        async def ask(method, path, body, status, words):
            async with session.request(method, url + path, data=body and body.encode()) as answer:
                text = await answer.text()
                assert answer.status == status and words in text, (path, answer.status, text)
        for at in range(0, len(asked), 4):
            await asyncio.gather(*(ask(*one) for one in asked[at:at + 4]))

asyncio.run(main(sys.argv[1], json.load(sys.stdin)))
"""
NODE = """
const asked = JSON.parse(require("fs").readFileSync(0));
async function ask([method, path, body, status, words]) {
    const answer = await fetch(process.argv[1] + path, {method, body: body ?? undefined});
    const text = await answer.text();
    const right = answer.status === status && text.includes(words);
    if (!right) throw new Error(path + answer.status + text);
}
(async () => {
    for (let at = 0; at < asked.length; at += 4) {
        await Promise.all(asked.slice(at, at + 4).map(ask));
    }
})().catch((error) => { console.error(error); process.exit(1); });
"""


@pytest.mark.parametrize("client", ["aiohttp", "node"])
def test_aiohttp_and_node_lose_nothing_on_kept_connections(service, client):
    if client == "node" and not shutil.which("node"):
        pytest.skip("Node is not installed")
    asker = Asker(3)
    asked = [asker.next() for _ in range(500)]
    texts = [(m, p, b and b.decode(), status, words) for m, p, b, status, words in asked]
    command = [sys.executable, "-c", AIOHTTP] if client == "aiohttp" else ["node", "-e", NODE]
    done = subprocess.run(
        [*command, service.url],
        input=json.dumps(texts),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


def read_answers(port, sent):
    """Send bytes on one connection; return (status, headers) of each answer until it is closed."""
    answers = []
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.connect()
    connection.sock.sendall(sent)
    connection.sock.shutdown(1)
    reader = connection.sock.makefile("rb")
    while line := reader.readline():
        status = int(line.split()[1])
        headers = http.client.parse_headers(reader)
        reader.read(int(headers["Content-Length"]))
        answers.append((status, headers))
    connection.close()
    return answers


@pytest.mark.parametrize("path", ["/health", "/api/cache/clear", "/api/nothing"])
@pytest.mark.parametrize(
    "chunks",
    [b"zz\r\nabc\r\n0\r\n\r\n", b"3\r\nabcdef\r\n0\r\n\r\n", b"3;\x01\r\nabc\r\n0\r\n\r\n"],
)
def test_a_malformed_body_has_one_answer_that_says_close(service, path, chunks):
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    answers = read_answers(service.port, head.encode() + chunks)
    assert len(answers) == 1
    assert 400 <= answers[0][0] < 500
    assert answers[0][1]["Connection"] == "close"
