"""The pieces below the routes: names, addresses, the client of Ollama's API, its store and its processes."""
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
import requests
import responses

from conftest import add_model, blob_path, manifest_path, wait_for
from ollama_client import Ollama, OllamaError, Processes, Store, check_name, dial_url, name_key, timestamp
from registry import FakeOllama, chunked, drip, free_port, http, ndjson, never

URL = "http://127.0.0.1:9"
NAMES = [
    "gemma", "gemma:latest", "llama3.1:8b", "user/model", "user/model:tag", "library/gemma", "hf.co/org/repo:Q4_K_M",
    "registry.ollama.ai/library/gemma:latest", "host:5000/ns/model:tag", "host:port/ns/model", "h::1/n/m",
    "http://h/n/m", "https://h:1/n/m:t", "A/B:C", "a_b-c.d", "_a", "a/b.c", "a:_x", "0", "cloud", "gemma:cloud",
    "gemma:8b-cloud", "gemma:8b:cloud", "gemma:8b:local", "gemma:CLOUD", " gemma ", "gemma\n", "\tgemma\r\n", "a" * 80,
    "n" * 80 + "/m", "m:" + "t" * 80, "h" * 200 + "/n/m"]
NO_NAMES = [
    "", " ", ".", "..", "-a", ".a", "a.b/c", "a:b:c", "a:b/c", "a/b/c/d", "/a", "a/", ":a", "a:", "a//b", "a:-x",
    "a:.x", "../etc", "../../etc/passwd", "/etc/passwd", "a/../b", "a/..", "a/b:../c", "..\\..\\a", "a%2fb", "a@b",
    "a@sha256:00", "[::1]/n/m", "http://n/m", "http://a/b://c", "a$b", "$(id)", "a;b", "`id`", "a|b", "a&b", "a*", "a?",
    "~", "a'b", 'a"b', "--help", "gem ma", "gemma\0", "gem\nma", "gemma\x1b[31m", "gemma\x1f", "\x1cgemma",
    "\x1b]0;x\x07", "\ufeffgemma", "gemma\u200b", "\u202egemma", "é", "模型", "m\u212a", "\ud800", "a" * 81,
    "n" * 81 + "/m", "m:" + "t" * 81, "h" * 351 + "/n/m", "a" * 10_000, "a/" * 5_000, "gemma:-cloud", "gemma :cloud"]
NOT_BOTH = ["gemma:cloud:local", "cloud:local:cloud", "a:x-cloud:local", "a:local-cloud"]


def taken(name):
    try:
        return check_name(name) == name.strip()
    except OllamaError as error:
        assert (error.status, error.code) == (400, "bad_model_name")
        return False


@contextlib.contextmanager
def refused(code, status=None):
    with pytest.raises(OllamaError) as caught:
        yield caught
    assert caught.value.code == code, str(caught.value)
    assert status in (None, caught.value.status)
    assert str(caught.value).isprintable() and 20 < len(str(caught.value)) < 600


def test_a_name_is_taken_exactly_if_ollama_takes_it(ollama_server):
    server = ollama_server()
    # Ollama's delete parses the name as its pull does, and asks no registry.
    theirs = {name: requests.delete(f"{server.url}/api/delete", data=json.dumps({"model": name})).status_code
              for name in NAMES + NO_NAMES}
    assert set(theirs.values()) == {400, 404}
    assert {name: 404 if taken(name) else 400 for name in theirs} == theirs


@pytest.mark.parametrize("name", [n for n in NO_NAMES if n.strip()] + NOT_BOTH)
def test_ollamas_own_refusal_of_a_name_is_a_400_too(ollama_server_shared, name):
    with refused("bad_model_name", 400):
        ollama_server_shared.pull(name)


@pytest.fixture(scope="module")
def ollama_server_shared(ollama_binary, tmp_path_factory):
    from conftest import OllamaServer
    server = OllamaServer(str(tmp_path_factory.mktemp("ollama")), ollama_binary)
    server.start()
    yield Ollama(server.url)
    server.stop()


@pytest.mark.parametrize("value", [None, 7, 1.5, True, [], ["gemma"], {}, {"model": "gemma"}, b"gemma"])
def test_what_is_no_string_is_no_name(value):
    with refused("bad_model_name", 400):
        check_name(value)


@pytest.mark.parametrize("one, other", [
    ("gemma", "gemma:latest"), ("Gemma", "gemma:LATEST"), ("library/gemma", "gemma"),
    ("registry.ollama.ai/library/gemma:latest", "gemma"), ("registry.ollama.ai/user/m", "user/m:latest"),
    ("HF.co/Org/Repo:q4_k_m", "hf.co/org/repo:Q4_K_M"), ("https://h/n/m", "h/n/m")])
def test_names_of_one_model_have_one_key(one, other):
    assert name_key(one) == name_key(other)


def test_names_of_different_models_have_different_keys():
    names = ["gemma", "gemma:2b", "gemma2", "user/gemma", "library2/gemma", "h/library/gemma", "h:1/library/gemma",
             "h:2/library/gemma", "h/user/gemma", "hf.co/library/gemma", "hf.co/gemma"]
    assert len({name_key(name) for name in names}) == len(names)


@pytest.mark.parametrize("setting, url", [
    ("", "http://127.0.0.1:11434"), ("0.0.0.0", "http://127.0.0.1:11434"), ("0.0.0.0:1234", "http://127.0.0.1:1234"),
    (":1234", "http://127.0.0.1:1234"), ("127.0.0.1", "http://127.0.0.1:11434"),
    ("example.com", "http://example.com:11434"), ("example.com:80", "http://example.com:80"),
    ("http://example.com", "http://example.com:80"), ("https://example.com", "https://example.com:443"),
    ("https://example.com:1/path", "https://example.com:1"), ("::", "http://[::1]:11434"),
    ("::1", "http://[::1]:11434"), ("[::]", "http://[::1]:11434"), ("[::]:99", "http://[::1]:99"),
    ("[::1]:99", "http://[::1]:99"), ("http://[::]:5", "http://[::1]:5"),
    ("http://0.0.0.0:11434/", "http://127.0.0.1:11434"), (" 127.0.0.1:1 ", "http://127.0.0.1:1"),
    ('"0.0.0.0"', "http://127.0.0.1:11434"), ("'0.0.0.0:99'", "http://127.0.0.1:99"),
    ("localhost:1", "http://localhost:1"), ("example.com:99999", "http://example.com:11434"),
    ("example.com:port", "http://example.com:11434")])
def test_ollama_host_is_read_as_ollama_reads_it(setting, url):
    assert dial_url(setting) == url


def test_times_are_iso_8601_utc():
    assert timestamp(0.5) == "1970-01-01T00:00:00+00:00"
    assert timestamp(None) is None


CALLS = {
    "version": ("GET", "/api/version", lambda o: o.version()), "tags": ("GET", "/api/tags", lambda o: o.tags()),
    "ps": ("GET", "/api/ps", lambda o: o.ps()), "load": ("POST", "/api/generate", lambda o: o.load("m")),
    "unload": ("POST", "/api/generate", lambda o: o.unload("m")),
    "one_token": ("POST", "/api/generate", lambda o: o.one_token("m", 4096, 1)),
    "delete": ("DELETE", "/api/delete", lambda o: o.delete("m")),
    "pull": ("POST", "/api/pull", lambda o: list(o.pull("m")))}
every_call = pytest.mark.parametrize("method, path, do", CALLS.values(), ids=list(CALLS))


@pytest.fixture
def stubs():
    with responses.RequestsMock(assert_all_requests_are_fired=True) as mock:
        yield mock


@every_call
@pytest.mark.parametrize("raised, code, status", [
    (requests.ConnectionError("refused"), "ollama_unreachable", 503),
    (requests.ConnectTimeout(), "ollama_timeout", 504), (requests.ReadTimeout(), "ollama_timeout", 504),
    (requests.exceptions.ChunkedEncodingError(), "ollama_unreachable", 503),
    (requests.exceptions.InvalidHeader(), "ollama_unreachable", 503)])
def test_a_failed_call_says_how_it_failed(stubs, method, path, do, raised, code, status):
    stubs.add(method, URL + path, body=raised)
    with refused(code, status):
        do(Ollama(URL))


@every_call
@pytest.mark.parametrize("answered, message, code, status", [
    (404, "model 'm' not found", "model_not_found", 404), (400, "invalid model name", "bad_model_name", 400),
    (500, "write /x: no space left on device", "disk_full", 507), (500, "something new", "ollama_error", 502),
    (500, "\x1b[31mred\nline", "ollama_error", 502), (503, "server busy, please try again", "ollama_error", 502)])
def test_ollamas_error_is_told_with_its_status(stubs, method, path, do, answered, message, code, status):
    stubs.add(method, URL + path, json={"error": message}, status=answered)
    with refused(code, status):
        do(Ollama(URL))


@every_call
@pytest.mark.parametrize("body", [b"", b"<html>oops</html>", b"[]", b"{}", b'"error"', b"\xff\xfe", b'{"error":'])
def test_an_error_without_a_reason_is_a_502(stubs, method, path, do, body):
    stubs.add(method, URL + path, body=body, status=500)
    with refused("bad_answer", 502):
        do(Ollama(URL))


@pytest.mark.parametrize("message, code", [
    ("pull model manifest: file does not exist", "model_not_found"),
    ("max retries exceeded: unexpected EOF", "pull_interrupted"), ("context canceled", "pull_interrupted"),
    ("digest mismatch, file must be downloaded again", "digest_mismatch"),
    ('Get "https://nowhere/v2/": dial tcp: lookup nowhere: no such host', "registry_unreachable"),
    ("dial tcp 127.0.0.1:1: connect: connection refused", "registry_unreachable"),
    ("remove /m/blobs/sha256-00-partial-0: no such file or directory", "parts_damaged"),
    ("insecure protocol http", "registry_insecure"),
    ("http: server gave HTTP response to HTTPS client", "registry_insecure"),
    ("tls: first record does not look like a TLS handshake", "registry_insecure")])
def test_an_error_line_of_a_pull_has_a_code_and_an_advice(message, code):
    with FakeOllama({"/api/pull": ndjson({"status": "pulling manifest"}, {"error": message})}) as fake:
        with refused(code):
            list(Ollama(fake.url).pull("m"))


def test_a_model_that_only_embeds_is_loaded_by_embed(stubs):
    stubs.post(f"{URL}/api/generate", json={"error": '"m" does not support generate'}, status=400)
    stubs.post(f"{URL}/api/embed", json={"embeddings": []}, match=[responses.matchers.json_params_matcher(
        {"model": "m", "input": []})])
    Ollama(URL).load("m")


def test_the_calls_say_what_they_mean(stubs):
    sent = responses.matchers.json_params_matcher
    stubs.post(f"{URL}/api/generate", json={}, match=[sent({"model": "m", "keep_alive": 0})])
    stubs.post(f"{URL}/api/generate", json={}, match=[sent({
        "model": "m", "prompt": "Hi", "raw": True, "stream": False, "options": {"num_predict": 1, "num_ctx": 512}})])
    stubs.post(f"{URL}/api/pull", body=b"", match=[sent({"model": "m", "insecure": True, "stream": True})])
    stubs.delete(f"{URL}/api/delete", body=b"", match=[sent({"model": "m"})])
    ollama = Ollama(URL)
    ollama.unload("m")
    ollama.one_token("m", 512, 1)
    assert list(ollama.pull("m", insecure=True)) == []
    ollama.delete("m")


def test_a_proxy_in_the_environment_is_not_for_ollama(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    with FakeOllama({"/api/version": http('{"version":"1"}')}) as fake:
        assert Ollama(fake.url).version() == "1"


LISTS = {"tags": lambda o: o.tags(1), "ps": lambda o: o.ps(1), "version": lambda o: o.version(1)}
every_list = pytest.mark.parametrize("do", LISTS.values(), ids=list(LISTS))


@pytest.fixture
def fake():
    with FakeOllama({}) as one:
        yield one


def answer_all(fake, raw):
    fake.routes = dict.fromkeys(("/api/tags", "/api/ps", "/api/version", "/api/pull"), raw)


@every_list
@pytest.mark.parametrize("body", ["<html>It works!</html>", "", '{"models":[{"na', "[]", "null", "7", '"x"', "\udcff",
                                  '{"models":' + "[" * 100_000])
def test_a_200_that_is_no_answer_of_ollamas_is_a_502(fake, do, body):
    answer_all(fake, http(body.encode(errors="surrogateescape"), type="text/html"))
    with refused("bad_answer", 502):
        do(Ollama(fake.url))


@pytest.mark.parametrize("models", ["x", 7, {"a": 1}, [7], [None], [{}], [{"name": None}], [{"name": 7}], [["name"]]])
@pytest.mark.parametrize("do", [LISTS["tags"], LISTS["ps"]], ids=["tags", "ps"])
def test_a_list_of_something_else_is_a_502(fake, do, models):
    answer_all(fake, http(json.dumps({"models": models})))
    with refused("bad_answer", 502):
        do(Ollama(fake.url))


@every_list
def test_an_answer_cut_off_is_an_error(fake, do):
    answer_all(fake, b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n" + b'{"models":[')
    with pytest.raises(OllamaError) as caught:
        do(Ollama(fake.url))
    assert caught.value.status in (502, 503, 504)


@every_list
def test_an_answer_without_end_takes_bounded_memory(fake, do):
    def endless(sock):
        sock.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            sock.sendall(b" " * (1 << 20))

    answer_all(fake, endless)
    before = psutil.Process().memory_info().rss
    with pytest.raises(OllamaError) as caught:
        do(Ollama(fake.url))
    assert caught.value.code in ("bad_answer", "ollama_timeout")  # as fast as the machine is
    assert psutil.Process().memory_info().rss - before < 300e6


def dripping(sock):
    head, body = http('{"version":"1","models":[' + " " * 100 + "]}").split(b"{", 1)
    sock.sendall(head)
    drip(b"{" + body, 0.3)(sock)


@every_list
@pytest.mark.parametrize("answer", [never, dripping], ids=["never", "a byte at a time"])
def test_a_call_ends_in_its_time(fake, do, answer):
    answer_all(fake, answer)
    began = time.monotonic()
    with pytest.raises(OllamaError) as caught:
        do(Ollama(fake.url))
    assert caught.value.code == "ollama_timeout"
    assert time.monotonic() - began < 3  # asked for 1 s


def test_a_redirect_is_not_followed_to_elsewhere(fake):
    with FakeOllama({"/api/version": http('{"version":"evil"}')}) as other:
        answer_all(fake,
                   f"HTTP/1.1 302 Found\r\nLocation: {other.url}/api/version\r\nContent-Length: 0\r\n\r\n".encode())
        with pytest.raises(OllamaError):
            Ollama(fake.url).version()
        assert not other.calls


def connections(port):
    return [c for c in psutil.Process().net_connections("tcp") if c.raddr and c.raddr.port == port]


def test_calls_share_a_connection_also_after_errors(ollama_server):
    server = ollama_server()
    ollama = Ollama(server.url)
    for _ in range(50):
        ollama.version(), ollama.tags(), ollama.ps()
        with refused("model_not_found", 404):
            ollama.delete("nothing")
    assert len(connections(server.port)) == 1


def test_a_restarted_ollama_is_reached_at_the_next_call(ollama_server):
    server = ollama_server()
    ollama = Ollama(server.url)
    for _ in range(3):
        assert ollama.version()
        server.kill()
        with refused("ollama_unreachable", 503):
            ollama.version()
        server.start()


def test_a_pulls_lines_come_whole_however_they_are_cut(fake):
    lines = [{"status": "pulling manifest"}, {"status": "é", "digest": "sha256:00", "total": 9, "completed": 1}]
    data = b"\n\n".join(json.dumps(line, ensure_ascii=False).encode() for line in lines)
    for size in (1, 2, 7, 1000):
        answer_all(fake, chunked(*[data[n:n + size] for n in range(0, len(data), size)]))
        assert list(Ollama(fake.url).pull("m")) == lines


@pytest.mark.parametrize("line", [
    b"<html>", b'{"sta', b"null", b"7", b'"error"', b"[]", b'["error"]', b"{}", b'{"status":7}', b'{"status":null}',
    b"\xff", b'{"status":"x","total":-1}', b'{"status":"x","completed":-5,"total":9}', b'{"status":"x","total":1.5}',
    b'{"status":"x","total":"9"}', b'{"status":"x","total":null}', b'{"status":"x","total":true}',
    b'{"status":"x","total":[]}', b'{"status":"x","total":NaN}', b'{"status":"x","total":1e999}',
    b'{"status":"x","total":9223372036854775808}', b'{"status":"x","completed":' + b"9" * 5000 + b"}",
    b'{"status":"x","digest":7}', b"[" * 100_000, b'{"a":' * 100_000])
def test_what_is_no_progress_line_is_an_error_of_ollamas(fake, line):
    answer_all(fake, chunked(b'{"status":"pulling manifest"}\n' + line + b"\n"))
    seen = []
    with refused("bad_answer", 502):
        seen.extend(Ollama(fake.url).pull("m"))
    answer_all(fake, chunked(line))  # as the last, without its end
    with refused("bad_answer", 502):
        list(Ollama(fake.url).pull("m"))


def test_a_progress_line_of_10_mb_takes_bounded_memory(fake):
    answer_all(fake, ndjson({"status": "x" * 10_000_000}))
    with refused("bad_answer", 502):
        list(Ollama(fake.url).pull("m"))
    assert not connections(fake.server_address[1])


@pytest.mark.parametrize("raw", [chunked(b'{"status":"x"}\n', end=False),
                                 b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{}"[:-2],
                                 b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"])
def test_a_broken_connection_interrupts_a_pull(fake, raw):
    answer_all(fake, raw)
    with refused("pull_interrupted", 502):
        list(Ollama(fake.url).pull("m"))


def test_a_stores_models_are_read_from_its_files(tmp_path, gguf):
    store = Store(tmp_path)
    assert store.models() == {} and store.sizes(["0" * 64]) == {} and store.disk()["partial_bytes"] == 0
    for name in ("gemma", "user/Gemma:tag"):
        add_model(tmp_path, name, gguf)
    assert set(store.models()) == {name_key("gemma"), name_key("user/gemma:tag")}
    weights, config = store.models()["gemma:latest"]
    assert store.sizes([config, weights, "0" * 64]) == {
        weights: gguf.stat().st_size, config: blob_path(tmp_path, f"sha256:{config}").stat().st_size}
    assert Store(tmp_path / "nowhere").disk() is None and Store(tmp_path / "nowhere").models() == {}


def test_a_store_never_looks_as_it_did_before_a_change(tmp_path, gguf):
    def signature():
        assert Store(tmp_path).signature() is None  # just changed: the next change might not show
        past = time.time() - 60 - len(seen)
        for folder, _, files in os.walk(tmp_path / "manifests"):
            for path in (folder, *(os.path.join(folder, file) for file in files)):
                if os.stat(path).st_mtime > time.time() - 30:
                    os.utime(path, (past, past))
        seen.append(Store(tmp_path).signature())

    seen = []
    assert Store(tmp_path).signature() is None  # no store, so nothing to tell a change by
    add_model(tmp_path, "stays", gguf)
    signature()
    add_model(tmp_path, "library/other", gguf)
    signature()
    shutil.rmtree(manifest_path(tmp_path, "other").parent)
    signature()
    assert None not in seen and len(set(seen)) == 3


def test_a_store_is_read_while_models_come_and_go(tmp_path, gguf):
    add_model(tmp_path, "stays", gguf)
    reading = threading.Event()

    def come_and_go():
        while not reading.is_set():
            for n in range(20):
                add_model(tmp_path, f"user{n}/m", gguf)
            for n in range(20):
                shutil.rmtree(manifest_path(tmp_path, f"user{n}/m").parents[1])

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        assert all("stays:latest" in Store(tmp_path).models() and Store(tmp_path).signature() != () for _ in range(300))
        assert thread.is_alive()
    finally:
        reading.set()
        thread.join()


@pytest.mark.parametrize("manifest", [
    b"", b"{", b"[]", b"null", b"7", b"\xff", b"{}", b'{"layers":null,"config":{}}', b'{"layers":[7],"config":{}}',
    b'{"layers":[],"config":null}', b'{"layers":[],"config":{"digest":"sha256:../../x"}}',
    b'{"layers":[],"config":{"digest":7}}', b'{"layers":[{"mediaType":7,"digest":"x"}],"config":{}}',
    b'{"layers":[{"mediaType":null}],"config":{}}', b"[" * 100_000])
def test_a_damaged_manifest_hides_no_other_model(tmp_path, gguf, manifest):
    add_model(tmp_path, "gemma", gguf)
    add_model(tmp_path, "broken", gguf)
    (tmp_path / "manifests/registry.ollama.ai/library/broken/latest").write_bytes(manifest)
    assert set(Store(tmp_path).models()) == {"gemma:latest"}


def test_a_blob_that_is_missing_takes_no_bytes(tmp_path, gguf):
    add_model(tmp_path, "gemma", gguf)
    weights, config = Store(tmp_path).models()["gemma:latest"]
    blob_path(tmp_path, f"sha256:{weights}").unlink()
    assert set(Store(tmp_path).sizes([weights, config])) == {config}


def test_a_purge_takes_the_parts_of_these_blobs_and_nothing_else(tmp_path):
    mine, other = "a" * 64, "b" * 64
    (tmp_path / "blobs").mkdir()
    for name in (f"sha256-{mine}-partial", f"sha256-{mine}-partial-0", f"sha256-{other}-partial", f"sha256-{mine}"):
        (tmp_path / "blobs" / name).write_bytes(b"x" * 8192)
    store = Store(tmp_path)
    assert store.disk()["partial_bytes"] == 3 * 8192
    assert store.purge([mine]) == 2 * 8192
    assert {file.name for file in (tmp_path / "blobs").iterdir()} == {f"sha256-{other}-partial", f"sha256-{mine}"}


@pytest.mark.parametrize("text", ["", "\n", "garbage\n", "1 2\n", "1 2 3 4\n", "x y z\n", "1 2 3\nhalf", "\0\0\0"])
def test_a_damaged_state_file_names_no_process(tmp_path, text):
    (tmp_path / "state").write_text(text)
    processes = Processes(str(tmp_path / "state"))
    assert (processes.server(), processes.restarts(), processes.all(), processes.runners()) == (None, 0, [], [])


@pytest.mark.parametrize("state_file", [None, "", "/nonexistent/state"])
def test_without_a_state_file_nothing_is_ours(state_file):
    processes = Processes(state_file)
    assert (processes.server(), processes.all(), processes.runners()) == (None, [], [])
    assert processes.managed == (state_file == "/nonexistent/state")


def ticks(pid):
    with open(f"/proc/{pid}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[19])


@pytest.fixture
def server_process(tmp_path):
    """A stand-in server in a session of its own, with a runner as its child."""
    runner = ["llama-server", "-c", "import time; time.sleep(60)", "--model", f"/m/blobs/sha256-{'c' * 64}", "--port",
              "1234"]
    program = f"import subprocess, sys, time; subprocess.Popen({runner}, executable=sys.executable); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", program], start_new_session=True) as process:
        state = tmp_path / "state"
        state.write_text(f"1 1 0\n{process.pid} {ticks(process.pid)} 3\n")
        processes = Processes(str(state))
        wait_for(processes.runners, 10, "the runner")
        yield process, processes, state
        for each in psutil.Process(process.pid).children() if process.poll() is None else ():
            each.kill()
        process.kill()


def test_a_recorded_server_and_its_runner_are_found(server_process):
    process, processes, _ = server_process
    [runner] = processes.runners()
    assert processes.server().pid == process.pid and processes.restarts() == 3
    assert (runner.digest, runner.port, runner.process.parent) == ("c" * 64, "1234", process.pid)
    assert {each.pid for each in processes.all()} == {process.pid, runner.process.pid}
    assert 0 <= processes.uptime_s(processes.server()) < 60


def test_a_number_with_another_start_time_is_void(server_process):
    process, _, state = server_process
    state.write_text(f"{process.pid} {ticks(process.pid) - 1} 0\n")
    processes = Processes(str(state))
    assert (processes.server(), processes.all(), processes.runners()) == (None, [], [])
    assert processes.end_server(0)
    assert process.poll() is None


def test_a_runner_of_a_stranger_is_not_ours(tmp_path, server_process):
    _, processes, state = server_process
    ours = [each.process.pid for each in processes.runners()]
    stranger = ["llama-server", "-c", "import time; time.sleep(60)", "--model", f"/m/blobs/sha256-{'d' * 64}", "--port",
                "9"]
    with subprocess.Popen(stranger, executable=sys.executable, start_new_session=True) as process:
        try:
            wait_for(lambda: b"--model" in open(f"/proc/{process.pid}/cmdline", "rb").read(), 5,
                     "the stranger's command line")
            assert [each.process.pid for each in processes.runners()] == ours
        finally:
            process.kill()


def test_an_orphan_is_still_ours_and_the_server_is_gone(server_process):
    process, processes, _ = server_process
    [runner] = processes.runners()
    assert processes.end_server(0.5)
    process.wait()
    assert processes.server() is None
    [orphan] = processes.runners()
    assert orphan.process.pid == runner.process.pid and orphan.process.parent != process.pid
    processes.end(orphan.process)
    wait_for(lambda: not processes.alive(orphan.process), 5, "the orphan's end")


def test_a_zombie_is_dead(server_process):
    process, processes, _ = server_process
    server = processes.server()
    for each in processes.runners():
        processes.end(each.process)
    process.send_signal(signal.SIGKILL)
    wait_for(lambda: not processes.alive(server), 5, "the server's end")
    assert os.path.exists(f"/proc/{process.pid}") and processes.server() is None


def test_signalling_a_process_that_has_ended_does_nothing(server_process):
    process, processes, _ = server_process
    server = processes.server()
    process.kill()
    process.wait()
    processes.end(server)
    processes.end(server._replace(pid=os.getpid()))
