"""Who is let in; and that a service fed with anything at all answers by the contract and loses nothing."""
import contextlib
import functools
import http.client
import http.server
import json
import random
import re
import selectors
import shutil
import socket
import struct
import threading
import time
from collections import Counter
from urllib.parse import quote

import psutil
import pytest

from conftest import Service, call, servers, wait_for
from registry import FakeOllama, chunked, drip, free_port, http as http_answer, ndjson, never

TOKEN = "correct-horse-battery"
STATUSES = {200, 202, 204, 400, 401, 403, 404, 405, 409, 413, 415, 429, 502, 503, 504, 507}
STATUS_WORDS = {"/health": "unhealthy", "/api/cache/clear": "error", "/api/session/reset": "error"}
GETS = ["/health", "/api/models", "/api/models/loaded", "/api/models/pull", "/api/stats", "/api/info"]
WITH_BODY = [("POST", "/api/models/pull"), ("DELETE", "/api/models/pull"), ("DELETE", "/api/models/delete"),
             ("POST", "/api/cache/clear"), ("POST", "/api/session/reset")]
ROUTES = [("GET", path) for path in GETS] + WITH_BODY
every_route_with_body = pytest.mark.parametrize("method, path", WITH_BODY, ids=lambda v: v.rpartition("/")[2])
NEVER = f"127.0.0.1:{free_port()}"  # nothing listens there


@pytest.fixture(scope="module")
def make_for_module(ollama_binary):
    with servers(functools.partial(Service, binary=ollama_binary)) as make:
        # No name of a fuzz run may reach a registry of the world; loopback is never asked by the proxy.
        yield functools.partial(make, HTTPS_PROXY=f"http://{NEVER}", https_proxy=f"http://{NEVER}",
                                LLM_MODEL="gemma:latest")


@pytest.fixture(scope="module")
def plain(make_for_module):
    return make_for_module(LLM_ALLOWED_HOSTS="llm.example.com, Other.Example.org", LLM_ALLOWED_ORIGINS=(
        "http://dashboard.example.com:8080,https://Secure.example.com"))


@pytest.fixture(scope="module")
def guarded(make_for_module):
    return make_for_module(LLM_API_TOKEN=TOKEN)


def shaped(status, headers, body, path):
    """Asserts that an answer is one of the contract's; returns its JSON (of a stream: its last line)."""
    assert status in STATUSES, (status, body[:500])
    if not body and status in (200, 204):  # of OPTIONS
        return None
    kind = headers["Content-Type"]
    assert kind.startswith(("application/json", "application/x-ndjson")), (status, headers, body[:200])
    answer = json.loads(body.strip().splitlines()[-1] if "ndjson" in kind else body)
    if status >= 400:
        shaped_error(answer, path)
        assert status not in (429, 503) or headers["Retry-After"].isdigit()
    else:
        assert isinstance(answer, dict)
    return answer


def shaped_error(answer, path=""):
    assert re.fullmatch("[a-z0-9_]+", answer["code"])
    assert len(answer["error"]) > 15 and answer["error"].isprintable() and answer["error"][-1] in ".!?"
    assert answer.get("status") == STATUS_WORDS.get(path.partition("?")[0])
    return answer


def error(response, status, code=None):
    """Asserts an error of this status, in the contract's shape; returns it."""
    assert response.status_code == status, response.text[:500]
    answer = shaped(response.status_code, response.headers, response.content, response.request.path_url)
    assert code in (None, answer["code"])
    return answer


def dial(service):
    return socket.create_connection(("127.0.0.1", service.port), 20)


def read_all(sock):
    """What comes until the other side closes."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := sock.recv(1 << 16):
            data += piece
    return data


def split(data):
    """An answer's (status, headers, body), of chunks put together."""
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.title(): value for name, value in (line.split(": ", 1) for line in lines)}
    if headers.get("Transfer-Encoding") == "chunked":
        rest, body = body, b""
        while rest and (size := int(rest.partition(b"\r\n")[0], 16)):
            body, rest = body + rest.partition(b"\r\n")[2][:size], rest.partition(b"\r\n")[2][size + 2:]
    return int(first.split()[1]), headers, body


def raw(service, data, half_close=False):
    """The answer to these bytes; the connection is closed by the service, or asked for by a header in them."""
    with dial(service) as sock:
        sock.sendall(data)
        if half_close:
            sock.shutdown(socket.SHUT_WR)
        return split(read_all(sock))


def request_bytes(method, path, body=b"", host="127.0.0.1", **headers):
    lines = [f"{method} {path} HTTP/1.1", *([f"Host: {host}"] if host is not None else []), "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    lines += [f"Content-Length: {len(body)}"] if body else []
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


# Hosts and origins

@pytest.mark.parametrize("host", [
    "127.0.0.1", "127.0.0.1:11435", "10.1.2.3:80", "[::1]", "[::1]:11435", "[fe80::1]", "localhost", "LOCALHOST:1",
    "llm-service", "llm-service:11435", "orin.local", "host.docker.internal:11435", "x.localhost", "llm.example.com",
    "LLM.example.com:99", "other.example.org", "localhost.", "orin.local."])
def test_a_host_of_this_machine_or_an_allowed_one_is_answered(plain, host):
    assert plain.get("/api/info", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", [
    "evil.example", "evil.example:11435", "evil.example.", "127.0.0.1.evil.example", "localhost.evil.example",
    "evil.localhost.com", "evillocal.com", "x.llm.example.com", "llm.example.com.evil.org", "127.0.0.1,evil.example",
    "127.0.0.1@evil.example", "[::1", "[evil.example]", "evil.example#.local", "evil.example/.local",
    "evil.example?.local", "0x7f.1", "ev\xefl.example", "a" * 4000 + ".com"])
@pytest.mark.parametrize("method, path", [("GET", "/health"), ("POST", "/api/cache/clear")], ids=["health", "clear"])
def test_any_other_host_is_refused(plain, host, method, path):
    status, headers, body = raw(plain, request_bytes(method, path, host=host))
    assert status in (400, 403)  # gunicorn itself refuses some
    shaped(status, headers, body, path) if status == 403 else shaped_error(json.loads(body))


def test_no_host_is_a_programs(plain):
    assert raw(plain, b"GET /api/info HTTP/1.0\r\n\r\n")[0] == 200


def test_of_two_hosts_none_lets_in(plain):
    assert raw(plain, request_bytes("GET", "/health", host="127.0.0.1\r\nHost: evil.example"))[0] in (400, 403)
    assert raw(plain, request_bytes("GET", "http://evil.example/health", host="evil.example"))[0] == 403


@pytest.mark.parametrize("origin", ["http://dashboard.example.com:8080", "https://secure.example.com",
                                    "HTTPS://SECURE.example.com", "own"])
@pytest.mark.parametrize("method, path, status", [("POST", "/api/cache/clear", 200), ("GET", "/api/models", 200),
                                                  ("GET", "/api/nothing", 404),
                                                  ("PUT", "/api/models", 405), ("DELETE", "/api/models/delete", 400)])
def test_an_allowed_origin_is_served_and_may_read_the_answer(plain, origin, method, path, status):
    origin = origin.replace("own", plain.url)
    answer = call(method, plain.url + path, headers={"Origin": origin, "Sec-Fetch-Site": "cross-site"})
    assert answer.status_code == status
    assert answer.headers["Access-Control-Allow-Origin"] == origin
    assert "Origin" in answer.headers["Vary"] and "Access-Control-Allow-Credentials" not in answer.headers


@pytest.mark.parametrize("origin", [
    "null", "", "http://evil.example", "https://127.0.0.1:{port}", "http://127.0.0.1", "http://127.0.0.1:1",
    "http://localhost:{port}", "http://[::1]:{port}", "http://127.0.0.1:{port}.evil.example",
    "http://dashboard.example.com", "https://dashboard.example.com:8080", "http://dashboard.example.com:80801",
    "http://x.dashboard.example.com:8080", "file://", "127.0.0.1:{port}",
    "http://127.0.0.1:{port}, http://evil.example", "http://127.0.0.1:{port}/", "chrome-extension://abc", "*", "\xff"])
@pytest.mark.parametrize("method, path", ROUTES, ids=lambda v: v.rpartition("/")[2])
def test_any_other_origin_is_refused_and_may_read_nothing(plain, origin, method, path):
    origin = origin.replace("{port}", str(plain.port)).encode("latin-1")
    answer = call(method, plain.url + path, headers={"Origin": origin})
    error(answer, 403, "origin_not_allowed")
    assert not [name for name in answer.headers if name.startswith("Access-Control")]


def test_a_page_is_its_own_origin_by_each_name_of_the_service(plain):
    for host in ("localhost:11435", "llm-service", "[::1]:11435", "llm.example.com"):
        assert plain.get("/api/info", headers={"Host": host, "Origin": f"http://{host}"}).status_code == 200
        error(plain.get("/api/info", headers={"Host": host, "Origin": "http://127.0.0.1"}), 403)


@pytest.mark.parametrize("site, status", [("cross-site", 403), ("same-origin", 200), ("same-site", 200), ("none", 200)])
def test_a_browsers_call_from_another_site_is_refused(plain, site, status):
    for method, path in (("GET", "/health"), ("POST", "/api/cache/clear"), ("GET", "/api/models")):
        answer = call(method, plain.url + path, headers={"Sec-Fetch-Site": site})
        assert answer.status_code == status
        assert status == 200 or error(answer, 403, "cross_site")


@pytest.mark.parametrize("path", ["/api/models/delete", "/api/models/pull", "/api/session/reset", "/api/nothing"])
def test_a_preflight_lets_an_allowed_origin_delete_and_send_json_and_a_token(guarded, plain, path):
    asked = {"Access-Control-Request-Method": "DELETE", "Access-Control-Request-Headers": "content-type,authorization"}

    def listed(kind):
        return set(re.split(", *", answer.headers[f"Access-Control-Allow-{kind}"].lower()))

    for service, origin in ((plain, "http://dashboard.example.com:8080"), (plain, plain.url), (guarded, guarded.url)):
        answer = call("OPTIONS", service.url + path, headers={"Origin": origin, **asked})
        assert answer.status_code in (200, 204)
        assert answer.headers["Access-Control-Allow-Origin"] == origin
        assert {"get", "post", "delete"} <= listed("Methods")
        assert {"content-type", "authorization"} <= listed("Headers")
    refused = call("OPTIONS", plain.url + path, headers={"Origin": "http://evil.example", **asked})
    error(refused, 403)
    assert not [name for name in refused.headers if name.startswith("Access-Control")]


def test_without_an_origin_no_answer_speaks_of_cors(plain):
    for method, path in ROUTES:
        answer = call(method, plain.url + path)
        assert not [name for name in answer.headers if name.startswith("Access-Control")]
        assert answer.headers["X-Content-Type-Options"] == "nosniff" and "no-store" in answer.headers["Cache-Control"]


# The token

def test_without_the_token_only_health_and_the_page_are_open(guarded):
    for path in ("/health", "/health?deep=1"):
        assert guarded.get(path).status_code == 200
    assert guarded.get("/").status_code in (200, 404)
    for method, path in [*ROUTES, ("POST", "/health"), ("PUT", "/"), ("GET", "/api/nothing"), ("GET", "//api/models"),
                         ("GET", "/health/x"), ("GET", "/staticx"), ("OPTIONS", "/api/models"),
                         ("TRACE", "/api/models"), ("HEAD", "/api/models")]:
        if path != "/health" or method != "GET":
            answer = call(method, guarded.url + path)
            assert answer.status_code == 401, (method, path, answer.status_code)
            assert method == "HEAD" or error(answer, 401, "token_wanted")


def test_static_opens_nothing_but_the_pages_files(guarded):
    for path in ("/static/../api/models", "/static/..%2fapp.py", "/static/%2e%2e/app.py", "/static/../app.py",
                 "/static//etc/passwd",
                 "/static/..%5capp.py", "/static/", "/static/nothing", "/static/%00", "/%73tatic/../api/models"):
        status, headers, body = raw(guarded, request_bytes("GET", path))
        assert status in (401, 404), (path, status)
        shaped(status, headers, body, path)


@pytest.mark.parametrize("given", ["", "Bearer", "Bearer ", "Bearer wrong", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}",
                                   f"Bearer {TOKEN.upper()}",
                                   f"Bearer  {TOKEN}x", f"Basic {TOKEN}", TOKEN, "Bearer \xff\xfe", "Bearer " + "x" * 7000])
def test_a_wrong_token_is_a_401(guarded, given):
    for path in ("/api/models", "/api/stats"):
        error(guarded.get(path, headers={"Authorization": given.encode("latin-1")}), 401, "token_wanted")
    assert error(guarded.post("/api/cache/clear", headers={"Authorization": given.encode("latin-1")}),
                 401)["status"] == "error"


def test_the_token_is_checked_before_the_path_and_the_body_are(guarded):
    error(guarded.post("/api/cache/clear", data="{"), 401)
    error(guarded.post("/api/models/pull", data=b"x" * 100_000), 401)
    error(guarded.get("/api/nothing"), 401)


def test_with_the_token_all_is_served(guarded):
    for path in GETS:
        assert guarded.get(path, headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200
    assert guarded.post("/api/cache/clear", headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200
    assert TOKEN not in guarded.log()


# Bodies

@every_route_with_body
def test_a_body_over_64_kib_is_a_413(plain, method, path):
    for body in (b"{" + b" " * 65536 + b"}", iter([b"{" + b" " * 40000, b" " * 40000 + b"}"])):
        error(call(method, plain.url + path, data=body), 413)
    status, headers, answer = raw(plain, request_bytes(method, path, Content_Length=10**12))
    assert shaped(status, headers, answer, path) and status == 413


def test_a_body_of_64_kib_is_taken(plain):
    assert plain.post("/api/cache/clear", data=b"{}".ljust(65536)).status_code == 200
    assert plain.post("/api/cache/clear", data=iter([b"{" + b" " * 32766, b" " * 32768 + b"}"])).status_code == 200


@every_route_with_body
@pytest.mark.parametrize("body", [
    "[]", "7", '"x"', "null", "true", "NaN", "{", "}", "{'model': 'x'}", "model=gemma", '{"model": NaN}',
    '{"model": Infinity}', '{"a" 1}', '{"model": "\n"}', "[" * 60_000, '{"a":' * 12_000, b"\xff\xfe",
    b'{"model":"\xff"}', b"\0", '{} {}', '{"model":"x"', "9" * 60_000,
    '{"model":' + "9" * 60_000 + "}"], ids=lambda v: repr(v[:20]))
def test_a_body_that_is_no_json_object_is_a_400(plain, method, path, body):
    error(call(method, plain.url + path, data=body if isinstance(body, bytes) else body.encode()), 400)


@every_route_with_body
@pytest.mark.parametrize("name", [
    "../../etc/passwd", "/etc/passwd", "..", "a/../../b", "a\\..\\b", "%2e%2e/x", "$(touch /tmp/x)", "a;id", "`id`",
    "gemma\0", "gemma\x1b[31mred", "gemma\r\n127.0.0.1 GET /forged", "\u202egemma", "\ud800", "x" * 10_000,
    "\x1b" * 10_000, "é", "", " ", 7, 0, 1.5, True, [], ["gemma"], {}, {"name": "x"}], ids=lambda v: repr(v)[:20])
def test_a_name_that_is_none_is_a_400_that_echoes_nothing(plain, method, path, name):
    for key in ("model", "name"):
        answer = error(call(method, plain.url + path, data=json.dumps({key: name})), 400, "bad_model_name")
        assert "passwd" not in answer["error"] and len(answer["error"]) < 300


def test_names_and_paths_reach_no_log_line_raw(plain):
    before = len(plain.log())
    marks = ["\x1b[31mred", "\x9b31m", "one\nFORGED two", "one\r\nFORGED two", "\u2028FORGED", "\0"]
    for mark in marks:
        for method, path in WITH_BODY:
            call(method, plain.url + path, json={"model": f"gemma{mark}"})
            call(method, plain.url + path, params={"model": f"gemma{mark}"})
        for path in (f"/{mark}", f"/api/{mark}?x={mark}", f"/health?deep={mark}"):
            plain.get(path)
    for data in (b"GET /\x1b[31mFORGED HTTP/1.1\r\n\r\n", b"\x1b[31mFORGED\r\n\r\n", b"GET / HTTP/\x1b[31m\r\n\r\n",
                 b"GET / HTTP/1.1\r\nX\x1b[31m: 1\r\n\r\n",
                 b"GET / HTTP/1.1\r\nX: \x1b[31m\r\n\r\n", b"GE\x1bT / HTTP/1.1\r\n\r\n",
                 b"GET /\x9b31m HTTP/1.1\r\nHost: \x9b\r\n\r\n",
                 b"GET / HTTP/1.1\r\nUser-Agent: \x1b[31m\r\nReferer: \x1b[31m\r\n\r\n"):
        raw(plain, data, half_close=True)
    log = plain.log()[before:]
    assert len(log.splitlines()) > 50
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028]|^\W*FORGED", log, re.M)


@every_route_with_body
def test_model_and_name_may_both_stand_if_they_agree(plain, method, path):
    error(call(method, plain.url + path, json={"model": "gemma:1", "name": "gemma:2"}), 400)
    error(call(method, plain.url + path, json={"model": "gemma:1", "name": 7}), 400)
    same = call(method, plain.url + path, json={"model": "localhost:1/a/b:c", "name": "localhost:1/a/b:c"})
    assert same.status_code in (404, 502)


@pytest.mark.parametrize("method, path, flag", [
    ("POST", "/api/models/pull", "stream"), ("POST", "/api/models/pull", "insecure"),
    ("POST", "/api/models/pull", "detach"), ("DELETE", "/api/models/pull", "purge"),
    ("DELETE", "/api/models/delete", "force"), ("POST", "/api/cache/clear", "force"),
    ("POST", "/api/session/reset", "restart")])
def test_a_flag_that_is_no_boolean_is_a_400_that_names_it(plain, method, path, flag):
    for value in ("yes", "", "true", 1, 0, 1.0, [], {}, [True]):
        assert flag in error(call(method, plain.url + path, json={"model": "localhost:1/a/b", flag: value}),
                             400)["error"]
    error(call(method, plain.url + path, params={"model": "localhost:1/a/b", flag: "maybe"}), 400)


def test_a_body_is_json_whatever_its_content_type_says(plain):
    for kind in (None, "application/x-www-form-urlencoded", "text/plain", "application/json",
                 "application/json; charset=utf-16", "x", "multipart/form-data"):
        answer = call("DELETE", plain.url + "/api/models/delete", data='{"model":"nothing"}',
                      headers={"Content-Type": kind})
        error(answer, 404, "model_not_found")


def test_a_body_need_not_be_there(plain):
    for path, words in (("/api/cache/clear", "cache cleared"), ("/api/session/reset", "session reset")):
        for answer in (plain.post(path, timeout=5), plain.post(path, data="", timeout=5),
                       plain.post(path, data=" \n", timeout=5),
                       plain.post(path, data="{}", timeout=5), plain.post(path, json={"model": None}, timeout=5),
                       plain.post(path, headers={"Content-Type": "application/json"}, timeout=5)):
            assert answer.status_code == 200 and words in answer.json()["message"].lower()
    for method, path in WITH_BODY[:3]:
        error(call(method, plain.url + path), 400, "model_missing")


def test_a_compressed_body_is_a_415(plain):
    error(plain.post("/api/cache/clear", data=b"\x1f\x8b", headers={"Content-Encoding": "gzip"}), 415)


# What Flask and gunicorn raise themselves

def test_each_path_that_is_not_there_is_a_json_404(plain):
    for path in ("/nothing", "/api", "/api/models/pull/x", "/static/nothing.js", "/%00", "/../etc/passwd", "/a" * 1000,
                 "/api%2fnothing", "/favicon.ico"):
        for method in ("GET", "POST", "DELETE"):
            answer = call(method, plain.url + path)
            assert answer.status_code == 404 or (path.startswith("/static") and answer.status_code == 405)
            error(answer, answer.status_code)


def test_each_method_that_is_not_there_is_a_json_405(plain):
    for path in {path for _, path in ROUTES}:
        for method in ("PUT", "PATCH", "TRACE", "X" * 15):
            answer = call(method, plain.url + path)
            error(answer, 405)
            assert "Allow" in answer.headers
    error(plain.post("/health"), 405)


CHUNKED = b"POST /api/cache/clear HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
BAD_REQUESTS = {
    "no request": b"nonsense\r\n\r\n", "no version": b"GET /health\r\n\r\n",
    "another version": b"GET /health HTTP/9.9\r\n\r\n",
    "a method in small letters": b"get /health HTTP/1.1\r\nHost: x\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "a header without a colon": b"GET /health HTTP/1.1\r\nHost\r\n\r\n",
    "a header name with a space": b"GET /health HTTP/1.1\r\nHo st: x\r\n\r\n",
    "a folded header": b"GET /health HTTP/1.1\r\nA: b\r\n c\r\n\r\n",
    "a control character": b"GET /health HTTP/1.1\r\nA: \0\r\n\r\n",
    "a long line": b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n\r\n",
    "a long header": b"GET /health HTTP/1.1\r\nA: " + b"a" * 70_000 + b"\r\n\r\n",
    "many headers": b"GET /health HTTP/1.1\r\n" + b"".join(b"A%d: b\r\n" % n for n in range(200)) + b"\r\n",
    "headers without end": b"GET /health HTTP/1.1\r\n" + b"A: " + b"a" * 1_000_000,
    "a length that is no number": b"POST /api/cache/clear HTTP/1.1\r\nContent-Length: x\r\n\r\n",
    "a negative length": b"POST /api/cache/clear HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    "two lengths": b"POST /api/cache/clear HTTP/1.1\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}x",
    "length and chunks": CHUNKED + b"Content-Length: 2\r\n\r\n0\r\n\r\n",
    "another coding": b"POST /api/cache/clear HTTP/1.1\r\nTransfer-Encoding: x\r\n\r\n",
    "a bad chunk": CHUNKED + b"\r\nzz\r\n{}\r\n0\r\n\r\n",
    "a chunk longer than it says": CHUNKED + b"\r\n2\r\n{}{}{}\r\n0\r\n\r\n",
    "a chunk cut off": CHUNKED + b"\r\n9\r\n{}",
    "a body cut off": b"POST /api/cache/clear HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{}",
    "an expectation": b"GET /health HTTP/1.1\r\nHost: x\r\nExpect: tea\r\n\r\n",
    "a proxy's line": b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\nGET /health HTTP/1.1\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
}


@pytest.mark.parametrize("data", BAD_REQUESTS.values(), ids=list(BAD_REQUESTS))
def test_what_is_no_request_gets_json_and_no_500(plain, data):
    before = len(plain.log())
    status, headers, body = raw(plain, data, half_close=True)
    assert 400 <= status < 500 or status == 501, (status, body)
    assert headers["Content-Type"].startswith("application/json")
    answer = json.loads(body)
    assert re.fullmatch("[a-z0-9_]+", answer["code"]) and len(answer["error"]) > 15
    assert "Traceback" not in plain.log()[before:]


@pytest.mark.parametrize("header", ["Script-Name: /x", "SCRIPT_NAME: /x", "PATH_INFO: /api/info", "REMOTE_USER: x",
                                    "X-Forwarded-Proto: https",
                                    "X-Forwarded-Proto: https\r\nX-Forwarded-Ssl: off",
                                    "X-Forwarded-Host: evil.example"])
def test_what_a_proxy_would_say_changes_nothing(plain, header):
    status, headers, body = raw(plain, request_bytes("GET", "/health", host=f"127.0.0.1:{plain.port}\r\n{header}",
                                                     Origin=plain.url))
    assert status == 200 and shaped(status, headers, body, "/health")["status"] == "healthy"


# The page

def test_the_page_runs_nothing_but_its_own_files(plain):
    answer = plain.get("/")
    assert answer.status_code == 200 and answer.headers["Content-Type"].startswith("text/html")
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["Content-Security-Policy"].split(";"))
    assert {policy[kind] for kind in ("script-src", "connect-src", "style-src")} == {"'self'"}
    assert {policy[kind] for kind in ("default-src", "frame-ancestors", "base-uri", "form-action")} == {"'none'"}
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=|javascript:|https?://", answer.text, re.I)
    for file in re.findall(r'(?:src|href)="(/?[^"#]+)"', answer.text):
        loaded = plain.get("/" + file.removeprefix("/"))
        assert loaded.status_code == 200 and loaded.headers["X-Content-Type-Options"] == "nosniff"


# Anything at all

HEADERS = {
    "Content-Type": ["application/json", "text/plain", "\xff"], "Origin": ["null", "http://evil.example"],
    "Sec-Fetch-Site": ["cross-site", "none"], "Authorization": ["Bearer x", "\xff"], "Accept": ["text/html"],
    "Content-Encoding": ["gzip", "identity"], "X-Http-Method-Override": ["DELETE"], "Range": ["bytes=0-1"],
    "If-None-Match": ["*"], "X-Forwarded-For": ["1.2.3.4"]}


class Fuzz:
    """Seeded requests over all routes; the names are such that no registry of the world is asked for them."""

    def __init__(self, seed, registry_name):
        self.random = random.Random(seed)
        self.names = ["gemma:latest", "gemma", "Gemma:LATEST", "nothing", "library/nothing", registry_name,
                      f"{NEVER}/ns/m:t",
                      "localhost:1/ns/m", "../x", "a:b:c", "", "\x1b[31m", "x" * 5000, "a//b"]

    def text(self):
        return "".join(chr(self.random.choice((self.random.randrange(128), self.random.randrange(0xd800))))
                       for _ in range(self.random.randrange(12))) + "//"

    def value(self, depth=0):
        kinds = [lambda: None, lambda: self.random.choice((True, False)), self.text,
                 lambda: self.random.choice(self.names),
                 lambda: self.random.choice((0, -1, 1 << 64, 1e308, -0.0, self.random.randrange(10**9)))]
        if depth < 4:
            kinds += [lambda: [self.value(depth + 1) for _ in range(self.random.randrange(4))],
                      lambda: {self.text(): self.value(depth + 1) for _ in range(self.random.randrange(4))}]
        return self.random.choice(kinds)()

    def body(self, path):
        how = self.random.random()
        if how < 0.08:
            return b""
        if how < 0.16:
            return json.dumps(self.value()).encode()
        if how < 0.24:
            return self.random.randbytes(self.random.randrange(300))
        given = {}
        for key in ("model", "name", "stream", "insecure", "detach", "force", "purge", "deep", self.text()):
            if self.random.random() < (0.7 if key == "model" else 0.25):
                given[key] = self.value() if self.random.random() < 0.4 else (
                    self.random.choice(self.names) if key in ("model", "name") else self.random.choice((True, False)))
        if self.random.random() < 0.02:
            given["restart"] = True
        text = json.dumps(given).encode()
        if how < 0.34:
            at = self.random.randrange(len(text))
            text = text[:at] + self.random.randbytes(self.random.randrange(3)) + text[at + 1:]
        return text if how < 0.98 else text.ljust(self.random.choice((65536, 65537, 70_000)))

    def path(self):
        path = self.random.choice([*GETS, *[path for _, path in WITH_BODY] * 3, "/static/x",
                                   "/api/" + str(self.random.random())])
        if self.random.random() < 0.2:
            keys = ["model", "name", "force", "deep", "stream", "x"]
            path += "?" + "&".join(f"{self.random.choice(keys)}={quote(str(self.value()))[:200]}" for _ in range(2))
        return path

    def headers(self):
        headers = {"Host": "127.0.0.1"}
        for name, values in HEADERS.items():
            if self.random.random() < 0.04:
                headers[name] = self.random.choice(values)
        return headers

    def method(self, path):
        usual = [method for method, each in ROUTES if each == path.partition("?")[0]]
        return self.random.choice(usual if usual and self.random.random() < 0.85 else
                                  ["GET", "POST", "DELETE", "PUT", "PATCH", "OPTIONS", "HEAD", "TRACE", "PROPFIND"])


@pytest.mark.parametrize("seed", range(4))
def test_no_json_on_any_route_is_a_500(make_for_module, gguf, registry, seed):
    service = make_for_module(models={"gemma:latest": gguf})
    name = registry.add_random("ns/small:latest", 0.2)
    # A deleted model comes back, so that those that find it go on being tried.
    fuzz, seen, lock = Fuzz(seed, name), Counter(), threading.Lock()
    failures = []

    def client(requests_each):
        connection, body = http.client.HTTPConnection("127.0.0.1", service.port, timeout=30), b""
        for _ in range(requests_each):
            if len(body) > 60_000:
                connection.close()  # gunicorn closes one whose long body was refused unread
            with lock:
                path = fuzz.path()
                method, body, headers = fuzz.method(path), fuzz.body(path), fuzz.headers()
            try:
                connection.request(method, path, body, headers)
                answer = connection.getresponse()
                data = answer.read()
                with lock:
                    seen[method, path.partition("?")[0].rstrip(".0123456789"), answer.status] += 1
                if method == "HEAD":
                    assert answer.status in STATUSES
                else:
                    shaped(answer.status, answer.headers, data, path)
                if method == "DELETE" and answer.status == 200:
                    service.add_model("gemma:latest", gguf)
            except Exception as error:
                failures.append((method, path, body[:300], headers, repr(error)[:600]))
                connection.close()
        connection.close()

    clients = [threading.Thread(target=client, args=(200,)) for _ in range(5)]
    for each in clients:
        each.start()
    for each in clients:
        each.join()
    print(sorted(Counter(status for _, _, status in seen.elements()).items()))
    assert not failures, "\n".join(map(str, [len(failures), *failures[:20]]))
    assert {key[2] for key in seen} >= {200, 400, 403, 404, 405, 413, 415, 502}  # it has come past the parsing
    wait_for(lambda: service.get("/health").status_code == 200, 30, "/health after the fuzz run")
    assert ": a bug" not in service.log() and "Traceback" not in service.log()


# Load and abuse

class Worker:
    """What the worker holds, for a comparison of before and after."""

    def __init__(self, service):
        self.process, self.ollama_port = psutil.Process(service.worker_pid()), service.ollama_port
        self.fds, self.rss = self.descriptors(), self.process.memory_info().rss

    def descriptors(self):
        """Their number, without the connections to Ollama, which are kept (at most 64 of them)."""
        open_now = self.process.net_connections("tcp")
        kept = sum(bool(each.raddr) and each.raddr.port == self.ollama_port for each in open_now)
        assert kept <= 64 + 8
        return self.process.num_fds() - kept

    def is_back(self):
        # A connection is closed by the thread that serves it: with the descriptors the threads are free too.
        wait_for(lambda: self.descriptors() <= self.fds + 8, 15,
                 f"descriptors back at {self.fds} (now {self.descriptors()})")
        assert self.process.num_threads() <= 256 + 40
        assert self.process.memory_info().rss < self.rss + 60e6


@pytest.fixture
def service_under_load(make_service):
    service = make_service(LLM_MODEL="gemma:latest")
    for _ in range(20):
        service.get("/health"), service.get("/api/stats"), service.post("/api/cache/clear")
    return service


@pytest.fixture
def worker(service_under_load):
    return Worker(service_under_load)


SLOW_HEADERS = b"GET /health HTTP/1.1\r\nHost: x\r\nX-Slow: " + b"y" * 1000
SLOW_BODY = b"POST /api/cache/clear HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n" + b" " * 1000


@pytest.mark.parametrize("data, sent_at_once", [(SLOW_HEADERS, 1), (SLOW_BODY, SLOW_BODY.index(b"\r\n\r\n") + 4)],
                         ids=["header", "body"])
def test_200_slow_clients_leave_health_its_3_seconds_and_nothing_behind(service_under_load, worker, data, sent_at_once):
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(dial(service_under_load)) for _ in range(200)]
        for sock in socks:
            sock.sendall(data[:sent_at_once])
        until, at = time.monotonic() + 8, sent_at_once
        while time.monotonic() < until:
            for sock in socks:
                sock.sendall(data[at:at + 1])
            at += 1
            assert service_under_load.get("/health", timeout=3).status_code == 200
            assert service_under_load.post("/api/cache/clear", timeout=5).status_code == 200
            time.sleep(0.5)
        assert worker.descriptors() > worker.fds + 190
    worker.is_back()


@pytest.mark.parametrize("opening", [b"", b"GET /api/info HTTP/1.0\r\n\r\n",
                                     b"GET /api/info HTTP/1.1\r\nHost: x\r\n\r\n", b"nonsense\r\n\r\n"],
                         ids=["silent", "answered", "kept alive", "refused"])
def test_200_clients_that_never_leave_do_not_hold_up_health(service_under_load, worker, opening):
    with contextlib.ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(dial(service_under_load)).sendall(opening)
        for _ in range(5):
            assert service_under_load.get("/health", timeout=3).status_code == 200
            time.sleep(0.2)
    worker.is_back()


@pytest.mark.parametrize("opening", [b"", b"GET /health HTTP/1.1\r\nHost: x\r\n", SLOW_BODY[:-1]],
                         ids=["silent", "half a header", "half a body"])
def test_more_clients_than_threads_hold_them_up_for_a_bounded_time_only(make_service, opening):
    service = make_service(constants={"app.CLIENT_S": 2})
    worker = Worker(service)
    with contextlib.ExitStack() as stack:
        for _ in range(300):
            stack.enter_context(dial(service)).sendall(opening)
        wait_for(lambda: service.get("/health", timeout=3).status_code == 200, 12, "/health")
    worker.is_back()
    assert "Traceback" not in service.log()


def at_once(service, requests_of_bytes):
    """The answers to all of these, sent at once, each on its connection."""
    selector, answers = selectors.DefaultSelector(), []
    for data in requests_of_bytes:
        sock = socket.socket()
        sock.setblocking(False)
        sock.connect_ex(("127.0.0.1", service.port))
        selector.register(sock, selectors.EVENT_WRITE, [data, b""])
    until = time.monotonic() + 60
    while selector.get_map():
        assert time.monotonic() < until, f"{len(selector.get_map())} without an answer"
        for key, events in selector.select(1):
            if events & selectors.EVENT_WRITE:
                key.fileobj.send(key.data[0])
                selector.modify(key.fileobj, selectors.EVENT_READ, key.data)
            elif piece := key.fileobj.recv(1 << 16):
                key.data[1] += piece
            else:
                selector.unregister(key.fileobj)
                key.fileobj.close()
                answers.append(split(key.data[1]))
    return answers


@pytest.mark.parametrize("method, path", [*[("GET", path) for path in GETS], *WITH_BODY[3:]],
                         ids=lambda v: v.rpartition("/")[2])
def test_500_requests_at_once_are_all_answered(service_under_load, worker, method, path):
    answers = at_once(service_under_load, [request_bytes(method, path)] * 500)
    for status, headers, body in answers:
        shaped(status, headers, body, path)
    assert Counter(status for status, _, _ in answers) == {200: 500}
    worker.is_back()


def test_500_different_requests_at_once_are_all_answered(service_under_load, worker):
    bodies = (b"", b"{}", b"[]", b'{"model":"nothing"}')
    wanted = [(method, path, body) for method, path in ROUTES for body in bodies if path != "/api/models/pull"]
    answers = at_once(service_under_load, [request_bytes(*wanted[n % len(wanted)]) for n in range(500)])
    assert {status for status, _, _ in answers} == {200, 400, 404}
    worker.is_back()


def test_half_closed_connections_get_their_answers(service_under_load, worker, registry):
    for method, path in ROUTES[:6] + WITH_BODY[3:]:
        status, headers, body = raw(service_under_load, request_bytes(method, path), half_close=True)
        assert status == 200 and shaped(status, headers, body, path)
    name = registry.add_random("ns/m:latest", 3)
    registry.rate = 2e6
    for stream in (True, False):
        asked = json.dumps({"model": name, "insecure": True, "stream": stream}).encode()
        status, headers, body = raw(service_under_load, request_bytes("POST", "/api/models/pull", asked),
                                    half_close=True)
        assert shaped(status, headers, body, "/api/models/pull")["status"] == "success"
    worker.is_back()


def running(service):
    return [pull for pull in service.get("/api/models/pull").json()["pulls"] if pull["state"] == "running"]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("reset", [False, True], ids=["fin", "rst"])
def test_listeners_that_leave_in_mid_answer_leave_nothing_behind(service_under_load, worker, registry, stream, reset):
    name = registry.add_random("ns/m:latest", 20)
    registry.rate = 1e6
    body = json.dumps({"model": name, "insecure": True, "stream": stream}).encode()
    asked = request_bytes("POST", "/api/models/pull", body)
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(dial(service_under_load)) for _ in range(50)]
        for sock in socks:
            sock.sendall(asked)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", reset, 0))
        wait_for(lambda: [pull["listeners"] for pull in running(service_under_load)] == [50], 15, "fifty listeners")
    if not stream:  # nothing is written before the end: by that alone it shows that they left
        service_under_load.delete("/api/models/pull", json={"model": name})
    wait_for(lambda: not running(service_under_load), 10, "the download's end")
    wait_for(lambda: not registry.active, 10, "the transfers' end")
    worker.is_back()


def test_callers_that_leave_at_once_leave_nothing_behind(service_under_load, worker):
    for n in range(600):
        method, path = ROUTES[n % 6] if n % 3 else WITH_BODY[3]
        with dial(service_under_load) as sock:
            sock.sendall(request_bytes(method, path)[:None if n % 2 else -2])
            if n % 5 == 0:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert service_under_load.get("/health", timeout=5).status_code == 200
    worker.is_back()
    assert "Traceback" not in service_under_load.log()


def test_streams_are_bounded_and_their_places_come_back(service_under_load, worker, registry):
    name = registry.add_random("ns/m:latest", 20)
    registry.rate, asked = 1e6, {"model": name, "insecure": True}
    for _ in range(2):
        with contextlib.ExitStack() as stack:
            for _ in range(64):
                answer = service_under_load.post("/api/models/pull", json=asked, stream=True)
                stack.callback(answer.close)
                assert answer.status_code == 200
            for stream in (True, False):
                error(service_under_load.post("/api/models/pull", json={**asked, "stream": stream}), 429)
            assert service_under_load.get("/health", timeout=3).status_code == 200
            detached = service_under_load.post("/api/models/pull", json={**asked, "detach": True})
            assert detached.status_code == 202
        service_under_load.delete("/api/models/pull", json={"model": name})
        wait_for(lambda: not running(service_under_load), 10, "the download's end")
        worker.is_back()


# What Ollama sends

def dripping(sock):
    sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n")
    drip(b" " * 100, 0.5)(sock)


def listed(**fields):
    return http_answer(json.dumps({"models": [{"name": "a", **fields}]}))


LIMITS_S = {"/health": 3, "/api/stats": 3, "/api/cache/clear": 5, "/api/session/reset": 5}
ANSWERS = {
    "html": http_answer("<html>It works!</html>", type="text/html"),
    "an html error": http_answer("<html>", 502, "text/html"), "half a line": chunked(b'{"sta'),
    "cut off": chunked(b'{"status":"x"}\n', end=False), "nothing": b"", "no http": b"\x16\x03\x01" * 99,
    "a line of 10 MB": ndjson({"status": "x" * 10_000_000}), "a list": http_answer("[]"), "null": http_answer("null"),
    "numbers": http_answer('{"models": 7, "version": 7}'),
    "models without names": http_answer('{"models": [{}], "version": null}'),
    "odd models": listed(size="x", modified_at=7, expires_at=[], details=7, digest={}),
    "odd times": listed(modified_at="9999-99-99T99:99:99+99:99", expires_at="0001-01-01T00:00:00+14:00"),
    "negative sizes": ndjson({"status": "pulling 0", "digest": "sha256:0", "total": -5, "completed": -7}),
    "more than all": ndjson({"status": "pulling 0", "digest": "sha256:0", "total": 5, "completed": 10**18},
                            {"status": "success"}),
    "an odd digest": ndjson({"status": "pulling 0", "digest": "../../x", "total": 5, "completed": 5},
                            {"status": "success"}),
    "escapes": http_answer('{"error": "\\u001b[31m\\nFORGED"}', 500),
    "an odd error": http_answer('{"error": {"a": [1]}}', 500), "deep": http_answer("[" * 100_000),
    "a redirect": b"HTTP/1.1 302 X\r\nLocation: http://evil.example/\r\nContent-Length: 0\r\n\r\n",
    "a 204": b"HTTP/1.1 204 X\r\n\r\n", "a 999": http_answer("{}", 999), "a byte at a time": dripping, "never": never,
}


@pytest.fixture(scope="module")
def fake():
    with FakeOllama({"/api/version": http_answer('{"version":"0.0.0"}')}) as one:
        yield one


@pytest.fixture(scope="module")
def on_fake(make_for_module, fake):
    """A service on an Ollama that it did not start."""
    service = make_for_module(wait=False, constants={"ollama_client.MAX_RECONNECTS": 1},
                              OLLAMA_HOST=fake.url.removeprefix("http://"))
    wait_for(lambda: service.get("/api/info").ok, 30, "/api/info")
    return service


@pytest.mark.parametrize("sent", ANSWERS)
def test_whatever_ollama_sends_the_answer_is_the_contracts(on_fake, fake, sent):
    paths = ("version", "tags", "ps", "generate", "delete", "pull")
    fake.routes = {f"/api/{path}": ANSWERS[sent] for path in paths}
    before, memory = len(on_fake.log()), psutil.Process(on_fake.worker_pid()).memory_info().rss
    statuses = {}
    for method, path in [*ROUTES, ("GET", "/health?deep=1")]:
        if "/pull" in path and sent in ("never", "a byte at a time"):
            continue  # a pull waits for its next line
        body = None if method == "GET" else {"model": f"{NEVER}/ns/m:t"} if "models" in path else {}
        answer = call(method, on_fake.url + path, json=body, timeout=10)
        statuses[f"{method} {path}"] = answer.status_code
        shaped(answer.status_code, answer.headers, answer.content, path)
        assert answer.elapsed.total_seconds() < LIMITS_S.get(path, 10)
    print(statuses)
    assert not re.search(r": a bug|Traceback|\x1b|^FORGED", on_fake.log()[before:], re.M)
    assert psutil.Process(on_fake.worker_pid()).memory_info().rss < memory + 60e6


# The log

def new_lines(service, before, count):
    wait_for(lambda: len(service.log()[before:].splitlines()) >= count, 5, f"{count} log lines")
    return service.log()[before:].splitlines()


def test_the_log_has_one_line_a_request_with_its_duration(guarded):
    bearer = {"Authorization": f"Bearer {TOKEN}"}
    wait_for(lambda: guarded.get("/health").ok, 5, "/health")
    time.sleep(0.3)  # its line
    calls = (("GET", "/api/info", 200), ("POST", "/api/cache/clear", 200), ("GET", "/nothing", 404))
    for method, path, status in calls:
        before = len(guarded.log())
        assert call(method, guarded.url + path, headers=bearer, json={"secret": "in-the-body"}).status_code == status
        time.sleep(0.3)  # a second line would have come
        [line] = [line for line in guarded.log()[before:].splitlines() if "[GIN]" not in line]
        assert re.search(rf"{method} {path}\b.* {status} .*\b\d+ ms", line)
    call("GET", guarded.url + "/api/info", headers={"Authorization": "Bearer guess-of-a-token"})
    assert not re.search(f"{TOKEN}|guess-of-a-token|in-the-body", guarded.log())


def levels(service, words):
    return {line.split()[2] for line in service.log().splitlines() if words in line and len(line.split()) > 2}


def test_a_refused_pull_is_a_warning_and_an_ended_runner_an_error_with_its_pid(make_service, gguf):
    service = make_service(models={"gemma:latest": gguf}, LLM_MODEL="gemma:latest")
    error(service.post("/api/models/pull", json={"model": f"{NEVER}/ns/m:t", "insecure": True}), 502)
    assert levels(service, f"{NEVER}/ns/m:t") & {"WARNING"} and "ERROR" not in levels(service, f"{NEVER}/ns/m:t")
    runner = service.load("gemma:latest")
    generation = service.generate("gemma:latest")
    assert [each["pid"] for each in service.post("/api/cache/clear").json()["killed"]] == [runner.pid]
    generation.wait(10)
    [line] = [line for line in service.log().splitlines() if " ERROR " in line]
    assert str(runner.pid) in line and "busy" in line and "gemma:latest" in line


# A browser

PAGE = b"<!doctype html><title>another site</title>"


class Elsewhere(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(PAGE)))
        self.end_headers()
        self.wfile.write(PAGE)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def elsewhere():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", free_port()), Elsewhere)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="no browser tests: selenium is not installed")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no browser tests: chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync",
                 "--disable-dev-shm-usage", "--disable-component-update", "--no-first-run",
                 "--host-resolver-rules=MAP evil.example 127.0.0.1, MAP good.example 127.0.0.1"):
        options.add_argument(flag)
    one = webdriver.Chrome(options, webdriver.ChromeService(driver))
    one.set_script_timeout(20)
    yield one
    one.quit()


@pytest.fixture
def visited(make_service, gguf, elsewhere):
    """A service with a loaded model, which a call that got through would unload or delete."""
    service = make_service(models={"gemma:latest": gguf}, LLM_MODEL="gemma:latest",
                           LLM_ALLOWED_ORIGINS=f"http://good.example:{elsewhere}")
    service.load("gemma:latest")
    return service


def fetch(browser, url, **init):
    """What a page's script gets of a call: [status, body], or [0, the error]."""
    return browser.execute_async_script("""const done = arguments[arguments.length - 1];
        fetch(arguments[0], arguments[1]).then(async r => done([r.status, await r.text()]))
        .catch(e => done([0, String(e)]))""", url, init)


def untouched(service):
    return service.get("/api/models/loaded").json()["count"] == 1 and service.get("/api/models").json()["count"] == 1


def test_a_page_of_another_site_gets_nothing_and_does_nothing(browser, visited, elsewhere):
    browser.get(f"http://evil.example:{elsewhere}/")
    before = len(visited.log())
    for path in GETS:
        assert fetch(browser, visited.url + path)[0] == 0
        assert fetch(browser, visited.url + path, mode="no-cors")[:1] == [0]  # opaque: no status, no text
    bodies = {"/api/cache/clear": "{}", "/api/session/reset": '{"restart":true}', "/api/models/pull": '{"model":"a/b"}'}
    for path, body in bodies.items():
        for init in ({"mode": "no-cors"}, {"headers": {"Content-Type": "application/json"}}, {},
                     {"mode": "no-cors", "credentials": "include"}):
            assert fetch(browser, visited.url + path, method="POST", body=body, **init)[0] == 0
    assert fetch(browser, f"{visited.url}/api/models/delete?model=gemma:latest", method="DELETE")[0] == 0
    browser.execute_async_script("""const [url, done] = arguments;
        const image = new Image(); image.onload = image.onerror = () => done();
        image.src = url + '/api/models'""", visited.url)
    assert browser.execute_script("return navigator.sendBeacon(arguments[0] + '/api/cache/clear', '{}')", visited.url)
    browser.execute_script("""const form = document.createElement('form');
        form.method = 'post'; form.enctype = 'text/plain';
        form.action = arguments[0] + '/api/cache/clear'; document.body.append(form); form.submit()""", visited.url)
    wait_for(lambda: visited.url in browser.current_url, 10, "the form's answer")
    assert '"code":"origin_not_allowed"' in browser.page_source.replace(" ", "")
    calls = re.findall(r"INFO \S+ (\S+) (/\S*) (\d{3}) ", visited.log()[before:])
    # The icon is asked for by the service's own error page, on which the form has ended.
    assert {call for call in calls if call[2] != "403"} <= {("GET", "/favicon.ico", "404")} and len(calls) > 25
    assert untouched(visited)


def test_a_page_in_a_sandbox_gets_nothing(browser, visited, elsewhere):
    browser.get(f"http://evil.example:{elsewhere}/")
    browser.execute_async_script("""const [url, done] = arguments;
        const frame = document.createElement('iframe'); frame.sandbox = 'allow-scripts';
        onmessage = () => done();
        frame.srcdoc = `<script>fetch('${url}/api/cache/clear', {method: 'POST', mode: 'no-cors'})
        .finally(() => parent.postMessage(1, '*'))</script>`; document.body.append(frame)""", visited.url)
    assert "POST /api/cache/clear 403" in visited.log() and untouched(visited)


def test_a_name_bound_anew_to_this_machine_gets_nothing(browser, visited):
    browser.get(f"http://evil.example:{visited.port}/")
    assert '"code":"host_not_allowed"' in browser.page_source.replace(" ", "")
    for path in GETS:
        status, body = fetch(browser, path)
        assert status == 403 and "host_not_allowed" in body
    for path in ("/api/cache/clear", "/api/session/reset"):
        assert fetch(browser, path, method="POST")[0] == 403
    assert fetch(browser, "/api/models/delete?model=gemma:latest", method="DELETE")[0] == 403
    assert untouched(visited)


def test_an_allowed_site_and_the_own_page_can_do_all(browser, visited, elsewhere):
    for page, base in ((f"http://good.example:{elsewhere}/", visited.url), (visited.url + "/", "")):
        browser.get(page)
        for path in GETS:
            assert fetch(browser, base + path)[0] == 200
        headers = {"Content-Type": "application/json"}
        assert fetch(browser, base + "/api/cache/clear", method="POST", body="{}", headers=headers)[0] == 200
        status, body = fetch(browser, base + "/api/models/delete", method="DELETE", headers=headers,
                             body='{"model":"nothing"}')
        assert status == 404 and "model_not_found" in body
