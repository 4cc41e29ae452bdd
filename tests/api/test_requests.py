"""Bodies, names, flags, paths and methods that make no sense, and what is no request at all."""

import json
import re

import pytest
import requests

from helpers.answers import (
    CLEAR,
    GEMMA,
    RESET,
    ROUTES,
    WITH_BODY,
    WITH_MODEL,
    error,
    every_route_with_body,
    shaped,
)
from helpers.listener import pull_of, running_pulls
from helpers.raw import raw, request_bytes
from helpers.waiting import call, wait_for

DELETE = "/api/models/delete"

# Bodies


@every_route_with_body
def test_a_body_over_64_kib_is_a_413(service, method, path):
    error(call(method, service.url + path, data=b"{" + b" " * 65536 + b"}"), 413)
    chunks = iter([b"{" + b" " * 40000, b" " * 40000 + b"}"])
    error(call(method, service.url + path, data=chunks), 413)
    announced = request_bytes(method, path, Content_Length=10**12)
    status, headers, answer = raw(service, announced)
    assert shaped(status, headers, answer, path) and status == 413


def test_a_body_of_64_kib_is_taken(service):
    assert service.post(CLEAR, data=b"{}".ljust(65536)).status_code == 200
    chunks = iter([b"{" + b" " * 32766, b" " * 32768 + b"}"])
    assert service.post(CLEAR, data=chunks).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        "{",
        "}",
        "{'model': 'x'}",
        "model=gemma",
        '{"model": NaN}',
        '{"model": Infinity}',
        '{"a" 1}',
        '{"model": "\n"}',
        "[" * 60_000,
        '{"a":' * 12_000,
        b"\xff\xfe",
        b'{"model":"\xff"}',
        b"\0",
        "{} {}",
        '{"model":"x"',
        "9" * 60_000,
        '{"model":' + "9" * 60_000 + "}",
    ],
    ids=lambda body: repr(body[:20]),
)
def test_a_body_that_is_no_json_is_a_400(service, body):
    error(service.post(CLEAR, data=body), 400)


@pytest.mark.parametrize("body", ["[]", "7", '"x"', "null", "true", "1764390000000", '["gemma"]'])
def test_a_body_that_is_no_object_is_an_error_where_one_is_wanted_alone(service, body):
    for path in (CLEAR, RESET):
        assert service.post(path, data=body).status_code == 200
    error(service.delete(DELETE, data=body), 400, "bad_json")
    error(service.post("/api/models/prune", data=body), 400, "bad_json")


@every_route_with_body
def test_every_route_refuses_a_body_that_is_no_json(service, method, path):
    error(call(method, service.url + path, data="{"), 400)


@pytest.mark.parametrize(
    "kind",
    [
        None,
        "application/x-www-form-urlencoded",
        "text/plain",
        "application/json",
        "application/json; charset=utf-16",
        "x",
        "multipart/form-data",
    ],
)
def test_a_body_is_json_whatever_its_content_type_says(service, kind):
    answer = service.delete(DELETE, data='{"model":"nothing"}', headers={"Content-Type": kind})
    error(answer, 404, "model_not_found")


@pytest.mark.parametrize("path, words", [(CLEAR, "cache cleared"), (RESET, "session reset")])
@pytest.mark.parametrize(
    "sent",
    [
        {},
        {"data": ""},
        {"data": " \n"},
        {"data": "{}"},
        {"json": {"model": None}},
        {"headers": {"Content-Type": "application/json"}},
    ],
)
def test_clear_and_reset_need_no_body(service, path, words, sent):
    answer = service.post(path, timeout=5, **sent)
    assert answer.status_code == 200 and words in answer.json()["message"].lower()


@pytest.mark.parametrize("path", [CLEAR, RESET])
def test_a_post_without_any_header_of_a_body_is_taken(service, path):
    head = f"POST {path} HTTP/1.1\r\nHost: llm-service:11435\r\nConnection: close\r\n\r\n"
    assert raw(service, head.encode())[0] == 200


@pytest.mark.parametrize("method, path", WITH_MODEL)
def test_a_model_must_be_named(service, method, path):
    error(call(method, service.url + path), 400, "model_missing")


def test_a_compressed_body_is_a_415(service):
    error(service.post(CLEAR, data=b"\x1f\x8b", headers={"Content-Encoding": "gzip"}), 415)


# Names and flags


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd",
        "/etc/passwd",
        "..",
        "a/../../b",
        "a\\..\\b",
        "%2e%2e/x",
        "$(touch /tmp/x)",
        "a;id",
        "`id`",
        "gemma\0",
        "gemma\x1b[31mred",
        "gemma\r\n127.0.0.1 GET /forged",
        "\u202egemma",
        "\ud800",
        "x" * 10_000,
        "\x1b" * 10_000,
        "é",
        "",
        " ",
        7,
        0,
        1.5,
        True,
        [],
        ["gemma"],
        {},
        {"name": "x"},
    ],
    ids=lambda name: ascii(name)[:20],
)
def test_a_name_that_is_none_is_a_400_that_echoes_nothing(service, name):
    for key in ("model", "name"):
        answer = error(service.delete(DELETE, data=json.dumps({key: name})), 400, "bad_model_name")
        assert "passwd" not in answer["error"] and len(answer["error"]) < 300


@every_route_with_body
def test_every_route_refuses_a_name_that_is_none(service, method, path):
    for key in ("model", "name"):
        answer = call(method, service.url + path, json={key: "../../etc/passwd"})
        error(answer, 400, "bad_model_name")


@every_route_with_body
def test_model_and_name_may_both_stand_if_they_agree(service, method, path):
    url = service.url + path
    error(call(method, url, json={"model": "gemma:1", "name": "gemma:2"}), 400)
    error(call(method, url, json={"model": "gemma:1", "name": 7}), 400)
    same = call(method, url, json={"model": "localhost:1/a/b:c", "name": "localhost:1/a/b:c"})
    assert same.status_code in (404, 502)


@pytest.mark.parametrize("path", [CLEAR, RESET])
def test_a_model_that_does_not_exist_is_a_404_and_nothing_happens(service, path):
    runner = service.load(GEMMA)
    error(service.post(path, json={"model": "absent:1b"}), 404, "model_not_found")
    assert runner.is_running()


every_flag = pytest.mark.parametrize(
    "method, path, flag",
    [
        ("POST", "/api/models/pull", "stream"),
        ("POST", "/api/models/pull", "insecure"),
        ("POST", "/api/models/pull", "detach"),
        ("POST", "/api/models/pull", "verify"),
        ("DELETE", "/api/models/pull", "purge"),
        ("DELETE", DELETE, "force"),
        ("POST", "/api/models/prune", "dry_run"),
        ("POST", CLEAR, "force"),
        ("POST", RESET, "restart"),
    ],
)


@every_flag
def test_every_flag_that_is_no_boolean_is_a_400_that_names_it(service, method, path, flag):
    given = {"model": "localhost:1/a/b", flag: "maybe"}
    assert flag in error(call(method, service.url + path, json=given), 400)["error"]
    error(call(method, service.url + path, params=given), 400)


@pytest.mark.parametrize("value", ["yes", "", 1, 1.5, [], {}, [True]])
def test_what_is_no_boolean_is_a_400(service, value):
    error(service.post(CLEAR, json={"force": value}), 400)


@every_flag
@pytest.mark.parametrize("word", ["true", "false", "1", "0", "True", "FALSE"])
def test_every_flag_takes_the_words_that_form_fields_send(service, method, path, flag, word):
    given = {flag: word, "older_than_s": "3600"}
    if path != "/api/models/prune":
        given["model"] = "localhost:1/a/b"
    wait_for(lambda: not running_pulls(service), 60, "the end of those that went on by themselves")
    for sent in ({"json": given}, {"params": given}):
        answer = call(method, service.url + path, **sent)
        shaped(answer.status_code, answer.headers, answer.content, path)
        assert answer.status_code in (200, 202, 404, 502), answer.text


@pytest.mark.parametrize(
    "fields, status, kind",
    [
        ({"stream": "true"}, 200, "application/x-ndjson"),
        ({"stream": "1", "detach": "0"}, 200, "application/x-ndjson"),
        ({"stream": "false"}, 200, "application/json"),
        ({"stream": "0", "detach": "false"}, 200, "application/json"),
        ({"detach": "true"}, 202, "application/json"),
        ({"stream": "false", "detach": "1"}, 202, "application/json"),
    ],
)
def test_a_word_means_what_it_says(service, registry, fields, status, kind):
    """n8n's "Using Fields Below" sends every flag as a word."""
    name = registry.add_random(f"ns/words{len(str(fields))}:latest", 1)
    answer = service.post("/api/models/pull", json={"model": name, "insecure": "true", **fields})
    assert (answer.status_code, answer.headers["Content-Type"]) == (status, kind), answer.text
    wait_for(lambda: pull_of(service, name)["state"] == "success", 60, "success")
    refused = {"model": name, "insecure": "false", "stream": False}
    error(service.post("/api/models/pull", json=refused), 502, "registry_insecure")
    assert service.delete("/api/models/delete", json={"model": name}).ok


# OPTIONS and HEAD


@pytest.mark.parametrize("path", ["/", "/metrics", "/livez", *sorted({path for _, path in ROUTES})])
def test_options_tells_the_methods_and_is_no_page(service, path):
    for body in (None, b"{}", b"not JSON"):
        answer = call("OPTIONS", service.url + path, data=body)
        assert (answer.status_code, answer.content) == (204, b"")
        assert "OPTIONS" in answer.headers["Allow"] and "Content-Type" not in answer.headers
        assert "Content-Length" not in answer.headers  # a 204 has none


@pytest.mark.parametrize("path", ["/api/nothing", "/api/models/nothing", "/static"])
def test_options_of_no_path_is_a_json_404(service, path):
    error(call("OPTIONS", service.url + path), 404, "not_found")


@pytest.mark.parametrize("path", ["/api/info", "/health", "/api/models", "/api/nothing"])
def test_a_head_has_the_headers_of_a_get_and_no_body(service, path):
    """Its body would be taken for the next answer on that connection."""
    with requests.Session() as session:
        session.trust_env = False
        head, got = (session.request(how, service.url + path) for how in ("HEAD", "GET"))
    assert head.status_code == got.status_code and head.content == b""
    assert head.headers["Content-Type"] == got.headers["Content-Type"]
    assert got.json()


# What the framework and the server raise themselves


@pytest.mark.parametrize(
    "path",
    [
        "/nothing",
        "/api",
        "/api/models/pull/x",
        "/static/nothing.js",
        "/%00",
        "/../etc/passwd",
        "/a" * 1000,
        "/api%2fnothing",
        "/favicon.ico",
    ],
    ids=lambda path: path[:20],
)
def test_each_path_that_is_not_there_is_a_json_404(service, path):
    for method in ("GET", "POST", "DELETE"):
        answer = call(method, service.url + path)
        other_method = path.startswith("/static") and answer.status_code == 405
        error(answer, 405 if other_method else 404)


@pytest.mark.parametrize("path", sorted({path for _, path in ROUTES}))
def test_each_method_that_is_not_there_is_a_json_405(service, path):
    for method in ("PUT", "PATCH", "TRACE", "X" * 15):
        answer = call(method, service.url + path)
        error(answer, 405)
        assert "Allow" in answer.headers


def test_health_takes_no_post(service):
    error(service.post("/health"), 405)


GET = b"GET /health HTTP/1.1\r\n"
POST = b"POST /api/cache/clear HTTP/1.1\r\n"
CHUNKED = POST + b"Host: x\r\nTransfer-Encoding: chunked\r\n"
BAD_REQUESTS = {
    "no request": b"nonsense\r\n\r\n",
    "no version": b"GET /health\r\n\r\n",
    "another version": b"GET /health HTTP/9.9\r\n\r\n",
    "a method in small letters": b"get /health HTTP/1.1\r\nHost: x\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "a header without a colon": GET + b"Host\r\n\r\n",
    "a header name with a space": GET + b"Ho st: x\r\n\r\n",
    "a folded header": GET + b"A: b\r\n c\r\n\r\n",
    "a control character": GET + b"A: \0\r\n\r\n",
    "a long line": b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n\r\n",
    "a long header": GET + b"A: " + b"a" * 70_000 + b"\r\n\r\n",
    "many headers": GET + b"".join(b"A%d: b\r\n" % n for n in range(200)) + b"\r\n",
    "headers without end": GET + b"A: " + b"a" * 1_000_000,
    "a length that is no number": POST + b"Content-Length: x\r\n\r\n",
    "a negative length": POST + b"Content-Length: -1\r\n\r\n",
    "two lengths": POST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}x",
    "length and chunks": CHUNKED + b"Content-Length: 2\r\n\r\n0\r\n\r\n",
    "another coding": POST + b"Transfer-Encoding: x\r\n\r\n",
    "a bad chunk": CHUNKED + b"\r\nzz\r\n{}\r\n0\r\n\r\n",
    "a chunk longer than it says": CHUNKED + b"\r\n2\r\n{}{}{}\r\n0\r\n\r\n",
    "a chunk cut off": CHUNKED + b"\r\n9\r\n{}",
    "a body cut off": POST + b"Host: x\r\nContent-Length: 99\r\n\r\n{}",
    "an expectation": GET + b"Host: x\r\nExpect: tea\r\n\r\n",
    "a proxy's line": b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\n" + GET + b"\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
}


@pytest.mark.parametrize("data", BAD_REQUESTS.values(), ids=list(BAD_REQUESTS))
def test_what_is_no_request_gets_json_and_no_500(service, data):
    before = len(service.log())
    status, headers, body = raw(service, data, half_close=True)
    assert 400 <= status < 500 or status == 501, (status, body)
    assert headers["Content-Type"].startswith("application/json")
    answer = json.loads(body)
    assert re.fullmatch("[a-z0-9_]+", answer["code"]) and len(answer["error"]) > 15
    assert "Traceback" not in service.log()[before:]


# The log

MARKS = ["\x1b[31mred", "\x9b31m", "one\nFORGED two", "one\r\nFORGED two", "\u2028FORGED", "\0"]
RAW_MARKS = [
    b"GET /\x1b[31mFORGED HTTP/1.1\r\n\r\n",
    b"\x1b[31mFORGED\r\n\r\n",
    b"GET / HTTP/\x1b[31m\r\n\r\n",
    b"GET / HTTP/1.1\r\nX\x1b[31m: 1\r\n\r\n",
    b"GET / HTTP/1.1\r\nX: \x1b[31m\r\n\r\n",
    b"GE\x1bT / HTTP/1.1\r\n\r\n",
    b"GET /\x9b31m HTTP/1.1\r\nHost: \x9b\r\n\r\n",
    b"GET / HTTP/1.1\r\nUser-Agent: \x1b[31m\r\nReferer: \x1b[31m\r\n\r\n",
]


def test_names_and_paths_reach_no_log_line_raw(service):
    before = len(service.log())
    for mark in MARKS:
        for method, path in WITH_BODY:
            call(method, service.url + path, json={"model": f"gemma{mark}"})
            call(method, service.url + path, params={"model": f"gemma{mark}"})
        for path in (f"/{mark}", f"/api/{mark}?x={mark}", f"/health?deep={mark}"):
            service.get(path)
    for data in RAW_MARKS:
        raw(service, data, half_close=True)
    log = service.log()[before:]
    assert len(log.splitlines()) > 50
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028]|^\W*FORGED", log, re.M)
