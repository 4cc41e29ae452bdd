"""The client of Ollama's API: against `responses` what is said, against sockets how it comes."""

import contextlib
import json
import time
import typing

import psutil
import pytest
import responses
from responses.matchers import json_params_matcher

from app import STATUS
from helpers.fake_ollama import FakeOllama, chunked, drip, http, ndjson, never
from helpers.ports import NOWHERE, free_port
from ollama_client import Ollama, ServiceError

PATHS = ["version", "tags", "ps", "generate", "embed", "delete", "pull"]
URL = "http://ollama:11434"


class Call(typing.NamedTuple):
    """What is called, and what of Ollama's it asks."""

    do: typing.Callable
    method: str
    path: str


CALLS = {
    "version": Call(lambda ollama: ollama.version(), "GET", "/api/version"),
    "tags": Call(lambda ollama: ollama.tags(), "GET", "/api/tags"),
    "ps": Call(lambda ollama: ollama.ps(), "GET", "/api/ps"),
    "load": Call(lambda ollama: ollama.load("m"), "POST", "/api/generate"),
    "unload": Call(lambda ollama: ollama.unload("m"), "POST", "/api/generate"),
    "delete": Call(lambda ollama: ollama.delete("m"), "DELETE", "/api/delete"),
    "pull": Call(lambda ollama: list(ollama.pull("m")), "POST", "/api/pull"),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))
LISTS = {
    "tags": lambda ollama, seconds: ollama.tags(timeout_s=seconds),
    "ps": lambda ollama, seconds: ollama.ps(timeout_s=seconds),
    "version": lambda ollama, seconds: ollama.version(timeout_s=seconds),
}
every_list = pytest.mark.parametrize("do", LISTS.values(), ids=list(LISTS))


@contextlib.contextmanager
def refused(code, status=None):
    """Expect an ServiceError whose sentence a person can read."""
    with pytest.raises(ServiceError) as caught:
        yield caught
    assert caught.value.code == code, str(caught.value)
    assert status in (None, STATUS.get(caught.value.code, 502))
    assert str(caught.value).isprintable() and 20 < len(str(caught.value)) < 600


@pytest.fixture
def fake():
    with FakeOllama({}) as one:
        yield one


@pytest.fixture
def ollama(fake):
    return Ollama(fake.url)


@pytest.fixture
def said():
    """What Ollama says: each answer that is added must be asked for."""
    with responses.RequestsMock(assert_all_requests_are_fired=True) as mock:
        yield mock


@pytest.fixture
def told():
    """A client of the Ollama that ``said`` stands for."""
    return Ollama(URL)


def answer_all(fake, raw):
    fake.routes = {f"/api/{path}": raw for path in PATHS}


def connections(port):
    return [c for c in psutil.Process().net_connections("tcp") if c.raddr and c.raddr.port == port]


# How a call fails


@every_call
def test_every_call_says_that_ollama_is_not_there(call):
    with refused("ollama_unreachable", 503):
        call.do(Ollama(f"http://{NOWHERE}"))


@every_call
def test_no_call_asks_another_on_its_port(fake, call):
    with refused("ollama_unreachable", 503):
        call.do(Ollama(fake.url, is_own=lambda: False))
    assert fake.calls == []


@every_call
def test_every_call_says_that_the_connection_broke(fake, ollama, call):
    answer_all(fake, b"")
    with refused("ollama_unreachable", 503):
        call.do(ollama)


@pytest.mark.parametrize(
    "status, message, code, answered",
    [
        (404, "model 'm' not found", "model_not_found", 404),
        (400, "invalid model name", "bad_model_name", 400),
        (500, "write /x: no space left on device", "disk_full", 507),
        (500, "something new", "ollama_error", 502),
        (500, "\x1b[31mred\nline", "ollama_error", 502),
        (503, "server busy, please try again", "ollama_error", 502),
    ],
)
def test_ollamas_error_is_told_with_its_status(said, told, status, message, code, answered):
    said.get(f"{URL}/api/tags", json={"error": message}, status=status)
    with refused(code, answered):
        told.tags()


@every_call
def test_every_call_tells_ollamas_error(said, told, call):
    said.add(call.method, URL + call.path, json={"error": "something new"}, status=500)
    with refused("ollama_error", 502):
        call.do(told)


@pytest.mark.parametrize(
    "body", [b"", b"<html>oops</html>", b"[]", b"{}", b'"error"', b"\xff\xfe", b'{"error":']
)
def test_an_error_without_a_reason_is_a_502(said, told, body):
    said.get(f"{URL}/api/tags", body, status=500)
    with refused("bad_answer", 502):
        told.tags()


def dripping(sock):
    head, body = http('{"version":"1","models":[' + " " * 100 + "]}").split(b"{", 1)
    sock.sendall(head)
    drip(b"{" + body, 0.3)(sock)


@every_list
def test_a_call_ends_in_its_time(fake, ollama, do):
    answer_all(fake, never)
    began = time.monotonic()
    with refused("ollama_timeout", 504):
        do(ollama, 0.5)
    assert time.monotonic() - began < 15  # on a busy machine; else it would take for ever or 30 s


def test_a_call_ends_in_its_time_though_a_byte_comes_now_and_then(fake, ollama):
    answer_all(fake, dripping)
    began = time.monotonic()
    with refused("ollama_timeout", 504):
        ollama.tags(timeout_s=0.5)
    assert time.monotonic() - began < 15  # on a busy machine; else it would take for ever or 30 s


# Answers that are none


@pytest.mark.parametrize(
    "body",
    [
        "<html>It works!</html>",
        "",
        '{"models":[{"na',
        "[]",
        "null",
        "7",
        '"x"',
        b"\xff",
        '{"models":' + "[" * 100_000,
    ],
    ids=lambda body: repr(body[:20]),
)
@pytest.mark.usefixtures("no_garbage")
def test_a_200_that_is_no_answer_of_ollamas_is_a_502(said, told, body):
    said.get(f"{URL}/api/tags", body, content_type="text/html")
    with refused("bad_answer", 502):
        told.tags()


@every_list
def test_every_list_refuses_what_is_no_answer(fake, ollama, do):
    answer_all(fake, http("[]"))
    with refused("bad_answer", 502):
        do(ollama, 30)


@pytest.mark.parametrize(
    "models", ["x", 7, {"a": 1}, [7], [None], [{}], [{"name": None}], [{"name": 7}], [["name"]]]
)
def test_a_list_of_something_else_is_a_502(said, told, models):
    for path in ("tags", "ps"):
        said.get(f"{URL}/api/{path}", json={"models": models})
    with refused("bad_answer", 502):
        told.tags()
    with refused("bad_answer", 502):
        told.ps()


def test_an_answer_cut_off_is_an_error(fake, ollama):
    answer_all(fake, b'HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"models":[')
    with pytest.raises(ServiceError) as caught:
        ollama.tags()
    assert STATUS.get(caught.value.code, 502) in (502, 503, 504)


def test_an_answer_without_end_takes_bounded_memory(fake, ollama):
    def endless(sock):
        sock.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            sock.sendall(b" " * (1 << 20))

    answer_all(fake, endless)
    before = psutil.Process().memory_info().rss
    with pytest.raises(ServiceError) as caught:
        ollama.tags(timeout_s=1)
    # Which of the two depends on the machine's speed.
    assert caught.value.code in ("bad_answer", "ollama_timeout")
    assert psutil.Process().memory_info().rss - before < 300e6


def test_a_redirect_is_not_followed_to_elsewhere(fake, ollama):
    with FakeOllama({"/api/version": http('{"version":"evil"}')}) as other:
        moved = f"HTTP/1.1 302 Found\r\nLocation: {other.url}/api/version\r\n"
        answer_all(fake, f"{moved}Content-Length: 0\r\n\r\n".encode())
        with pytest.raises(ServiceError):
            ollama.version()
        assert not other.calls


# What is sent


def expect(said, method, path, wanted, **answer):
    """Have one request answered, which must be just that."""
    said.add(method, URL + path, match=[json_params_matcher(wanted)], **{"json": {}, **answer})


def test_the_calls_say_what_they_mean(said, told):
    expect(said, "POST", "/api/generate", {"model": "m"})
    told.load("m")
    expect(said, "POST", "/api/generate", {"model": "m", "keep_alive": 0})
    told.unload("m")
    expect(said, "DELETE", "/api/delete", {"model": "m"})
    told.delete("m")
    options = {"num_ctx": 1024}
    expect(said, "POST", "/api/generate", {"model": "m", "options": options, "keep_alive": -1})
    told.load("m", 5, options=options, keep_alive=-1)


def test_a_pull_says_what_it_means(said, told):
    body = {"model": "m", "insecure": True, "stream": True}
    expect(said, "POST", "/api/pull", body, json=None, body=b"")
    assert list(told.pull("m", insecure=True)) == []


def test_a_model_that_only_embeds_is_loaded_by_embed(said, told):
    words = '"m" does not support generate'
    expect(said, "POST", "/api/generate", {"model": "m"}, json={"error": words}, status=400)
    expect(said, "POST", "/api/embed", {"model": "m", "input": []}, json={"embeddings": []})
    told.load("m")


def test_a_proxy_in_the_environment_is_not_for_ollama(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    with FakeOllama({"/api/version": http('{"version":"1"}')}) as fake:
        assert Ollama(fake.url).version() == "1"


# A pull's lines


def test_a_pulls_lines_come_whole_however_they_are_cut(fake, ollama):
    lines = [
        {"status": "pulling manifest"},
        {"status": "é", "digest": "sha256:00", "total": 9, "completed": 1},
    ]
    data = b"\n\n".join(json.dumps(line, ensure_ascii=False).encode() for line in lines)
    for size in (1, 2, 7, 1000):
        answer_all(fake, chunked(*[data[n : n + size] for n in range(0, len(data), size)]))
        assert list(ollama.pull("m")) == lines


@pytest.mark.parametrize(
    "line",
    [
        b"<html>",
        b'{"sta',
        b"null",
        b"7",
        b'"error"',
        b"[]",
        b'["error"]',
        b"{}",
        b'{"status":7}',
        b'{"status":null}',
        b"\xff",
        b'{"status":"x","total":-1}',
        b'{"status":"x","completed":-5,"total":9}',
        b'{"status":"x","total":1.5}',
        b'{"status":"x","total":"9"}',
        b'{"status":"x","total":null}',
        b'{"status":"x","total":true}',
        b'{"status":"x","total":[]}',
        b'{"status":"x","total":NaN}',
        b'{"status":"x","total":1e999}',
        b'{"status":"x","total":9223372036854775808}',
        b'{"status":"x","completed":' + b"9" * 5000 + b"}",
        b'{"status":"x","digest":7}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
    ],
    ids=lambda line: repr(line[:40]),
)
@pytest.mark.usefixtures("no_garbage")
def test_what_is_no_progress_line_is_an_error_of_ollamas(fake, ollama, line):
    answer_all(fake, chunked(b'{"status":"pulling manifest"}\n' + line + b"\n"))
    with refused("bad_answer", 502):
        list(ollama.pull("m"))
    # As the last, without its end.
    answer_all(fake, chunked(line))
    with refused("bad_answer", 502):
        list(ollama.pull("m"))


def test_a_progress_line_of_10_mb_is_not_kept(fake, ollama):
    answer_all(fake, ndjson({"status": "x" * 10_000_000}))
    with refused("bad_answer", 502):
        list(ollama.pull("m"))
    assert not connections(fake.port)


@pytest.mark.parametrize(
    "raw",
    [
        chunked(b'{"status":"x"}\n', end=False),
        b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_a_broken_connection_interrupts_a_pull(fake, ollama, raw):
    answer_all(fake, raw)
    with refused("pull_interrupted", 502):
        list(ollama.pull("m"))


@pytest.mark.parametrize(
    "message, code",
    [
        ("pull model manifest: file does not exist", "model_not_found"),
        ("max retries exceeded: unexpected EOF", "pull_interrupted"),
        ("context canceled", "pull_interrupted"),
        ("digest mismatch, file must be downloaded again", "digest_mismatch"),
        (
            'Get "https://nowhere/v2/": dial tcp: lookup nowhere: no such host',
            "registry_unreachable",
        ),
        ("dial tcp 127.0.0.1:1: connect: connection refused", "registry_unreachable"),
        ("remove /m/blobs/sha256-00-partial-0: no such file or directory", "parts_damaged"),
        ("insecure protocol http", "registry_insecure"),
        ("http: server gave HTTP response to HTTPS client", "registry_insecure"),
        ("tls: first record does not look like a TLS handshake", "registry_insecure"),
    ],
)
def test_an_error_line_of_a_pull_has_a_code_and_an_advice(fake, ollama, message, code):
    answer_all(fake, ndjson({"status": "pulling manifest"}, {"error": message}))
    with refused(code):
        list(ollama.pull("m"))


def test_a_load_and_a_pull_take_as_long_as_ollama_lets_them(fake, ollama, monkeypatch):
    """A caller who gave up would abort them; Ollama's own limit is OLLAMA_LOAD_TIMEOUT."""
    answer_all(fake, http("{}"))
    limits = []
    send = ollama._session.send

    def note(request, timeout, **options):
        limits.append(timeout)
        return send(request, timeout=timeout, **options)

    monkeypatch.setattr(ollama._session, "send", note)
    ollama.load("m")
    with contextlib.suppress(ServiceError):
        list(ollama.pull("m"))
    assert [read_s for _, read_s in limits] == [None, None]
    ollama.version()
    assert limits[-1][1] is not None


@pytest.mark.parametrize("port", [None, "abc", "99999999"])
def test_a_runner_without_a_proper_port_is_as_one_where_nothing_listens(port):
    ollama = Ollama("http://127.0.0.1:1")
    assert ollama.runner_health(port, 0.5) == "loading"
    assert ollama.runner_slots(port, 0.5) is None
