"""Who is let in: hosts, origins, the token; and the page's own files."""

import json
import re

import pytest

from helpers.answers import (
    CLEAR,
    GETS,
    RESET,
    ROUTES,
    TOKEN,
    cors_headers,
    error,
    every_route,
    shaped,
    shaped_error,
)
from helpers.raw import raw, request_bytes
from helpers.waiting import call

DASHBOARD = "http://dashboard.example.com:8080"
ORIGINS = [DASHBOARD, "https://secure.example.com", "HTTPS://SECURE.example.com", "own"]

# Hosts


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.0.0.1:11435",
        "10.1.2.3:80",
        "[::1]",
        "[::1]:11435",
        "[fe80::1]",
        "localhost",
        "LOCALHOST:1",
        "llm-service",
        "llm-service:11435",
        "orin.local",
        "host.docker.internal:11435",
        "x.localhost",
        "llm.example.com",
        "LLM.example.com:99",
        "other.example.org",
        "localhost.",
        "orin.local.",
        "gpu1.lan",
        "gpu1.lan:11435",
        "GPU1.LAN.",
        "gpu1.home.arpa",
        "gpu1.rack2.intranet:11435",
    ],
)
def test_a_host_of_this_machine_or_an_allowed_one_is_answered(service, host):
    assert service.get("/api/info", headers={"Host": host}).status_code == 200


def assert_host_refused(service, method, path, host):
    status, headers, body = raw(service, request_bytes(method, path, host=host))
    assert status in (400, 403)  # gunicorn itself refuses some
    if status == 403:
        shaped(status, headers, body, path)
    else:
        shaped_error(json.loads(body))


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:11435",
        "evil.example.",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "evil.localhost.com",
        "evillocal.com",
        "evil.lan.example",
        "lan.evil.example",
        "evil.xlan",
        "evil.home.arpa.example",
        "evil.arpa",
        "evilhome.arpa",
        "evil.intranet.example",
        "x.llm.example.com",
        "llm.example.com.evil.org",
        "127.0.0.1,evil.example",
        "127.0.0.1@evil.example",
        "[::1",
        "[evil.example]",
        "evil.example#.local",
        "evil.example/.local",
        "evil.example?.local",
        "0x7f.1",
        "ev\xefl.example",
        "a" * 4000 + ".com",
    ],
    ids=lambda host: ascii(host)[:40],
)
def test_any_other_host_is_refused(service, host):
    assert_host_refused(service, "GET", "/health", host)


@every_route
def test_every_route_refuses_another_host(service, method, path):
    assert_host_refused(service, method, path, "evil.example")


def test_no_host_is_a_programs(service):
    assert raw(service, b"GET /api/info HTTP/1.0\r\n\r\n")[0] == 200


def test_of_two_hosts_none_lets_in(service):
    two = request_bytes("GET", "/health", host="127.0.0.1\r\nHost: evil.example")
    assert raw(service, two)[0] in (400, 403)
    absolute = request_bytes("GET", "http://evil.example/health", host="evil.example")
    assert raw(service, absolute)[0] == 403


# Origins


def assert_readable(service, origin, method, path, status):
    origin = origin.replace("own", service.url)
    headers = {"Origin": origin, "Sec-Fetch-Site": "cross-site"}
    answer = call(method, service.url + path, headers=headers)
    assert answer.status_code == status
    assert answer.headers["Access-Control-Allow-Origin"] == origin
    assert "Origin" in answer.headers["Vary"]
    assert "Access-Control-Allow-Credentials" not in answer.headers


@pytest.mark.parametrize("origin", ORIGINS)
def test_an_allowed_origin_is_served_and_may_read_the_answer(service, origin):
    assert_readable(service, origin, "GET", "/api/models", 200)


@pytest.mark.parametrize(
    "method, path, status",
    [
        ("POST", CLEAR, 200),
        ("GET", "/api/nothing", 404),
        ("PUT", "/api/models", 405),
        ("DELETE", "/api/models/delete", 400),
    ],
)
def test_an_allowed_origin_may_read_every_sort_of_answer(service, method, path, status):
    assert_readable(service, DASHBOARD, method, path, status)


def assert_origin_refused(service, method, path, origin):
    origin = origin.replace("{port}", str(service.port)).encode("latin-1")
    answer = call(method, service.url + path, headers={"Origin": origin})
    error(answer, 403, "origin_not_allowed")
    assert not cors_headers(answer)


@pytest.mark.parametrize(
    "origin",
    [
        "null",
        "",
        "http://evil.example",
        "https://127.0.0.1:{port}",
        "http://127.0.0.1",
        "http://127.0.0.1:1",
        "http://localhost:{port}",
        "http://[::1]:{port}",
        "http://127.0.0.1:{port}.evil.example",
        "http://dashboard.example.com",
        "https://dashboard.example.com:8080",
        "http://dashboard.example.com:80801",
        "http://x.dashboard.example.com:8080",
        "file://",
        "127.0.0.1:{port}",
        "http://127.0.0.1:{port}, http://evil.example",
        "http://127.0.0.1:{port}/",
        "chrome-extension://abc",
        "*",
        "\xff",
    ],
)
def test_any_other_origin_is_refused_and_may_read_nothing(service, origin):
    assert_origin_refused(service, "POST", CLEAR, origin)


@every_route
def test_every_route_refuses_another_origin(service, method, path):
    assert_origin_refused(service, method, path, "http://evil.example")


@pytest.mark.parametrize(
    "host", ["localhost:11435", "llm-service", "[::1]:11435", "llm.example.com"]
)
def test_a_page_is_its_own_origin_by_each_name_of_the_service(service, host):
    own = {"Host": host, "Origin": f"http://{host}"}
    assert service.get("/api/info", headers=own).status_code == 200
    other = {"Host": host, "Origin": "http://127.0.0.1"}
    error(service.get("/api/info", headers=other), 403)


SAME = {"Sec-Fetch-Site": "same-origin"}


@pytest.mark.parametrize(
    "host, origin",
    [
        ("gpu1.lan", "https://gpu1.lan"),
        ("gpu1.lan:443", "https://gpu1.lan"),
        ("gpu1.lan", "https://gpu1.lan:443"),
        ("GPU1.lan:8443", "https://gpu1.LAN:8443"),
        ("[::1]:8443", "https://[::1]:8443"),
        ("llm.example.com", "https://llm.example.com"),
        ("gpu1.lan:80", "http://gpu1.lan"),
    ],
)
def test_the_own_page_works_behind_a_proxy_that_ends_tls(service, host, origin):
    answer = service.post(CLEAR, headers={"Host": host, "Origin": origin, **SAME})
    assert answer.status_code == 200
    assert answer.headers["Access-Control-Allow-Origin"] == origin


@pytest.mark.parametrize(
    "host, origin",
    [
        ("gpu1.lan", "https://evil.example"),
        ("gpu1.lan", "https://gpu1.lan.evil.example"),
        ("gpu1.lan", "https://evil.example/gpu1.lan"),
        ("gpu1.lan", "https://gpu1.lan@evil.example"),
        ("gpu1.lan", "https://gpu1.lan:8443"),
        ("gpu1.lan:443", "http://gpu1.lan"),
        ("gpu1.lan", "gpu1.lan"),
        ("gpu1.lan", "https:gpu1.lan"),
        ("127.0.0.1:11435", "https://gpu1.lan"),
        ("gpu1.lan", "null"),
    ],
)
def test_a_browsers_word_counts_for_equal_names_alone(service, host, origin):
    headers = {"Host": host, "Origin": origin, **SAME}
    told = error(service.post(CLEAR, headers=headers), 403, "origin_not_allowed")["error"]
    assert "Host" in told and "LLM_ALLOWED_ORIGINS" in told


def test_the_pages_files_are_given_to_whatever_origin_a_proxy_makes_of_it(service):
    headers = {"Host": "127.0.0.1", "Origin": "https://gpu1.lan", **SAME}
    answer = service.get("/static/page.js", headers=headers)
    assert answer.status_code == 200
    assert "Access-Control-Allow-Origin" not in answer.headers
    for path in ("/", "/api/info"):
        error(service.get(path, headers=headers), 403, "origin_not_allowed")


@pytest.mark.parametrize("site", [None, "same-site", "cross-site", "none", "Same-Origin, none"])
def test_another_scheme_wants_the_browsers_word(service, site):
    headers = {"Host": "gpu1.lan", "Origin": "https://gpu1.lan"}
    headers |= {"Sec-Fetch-Site": site} if site else {}
    error(service.post(CLEAR, headers=headers), 403, "origin_not_allowed")


@pytest.mark.parametrize("name", ["Forwarded", "X-Forwarded-Proto", "X-Forwarded-Host"])
def test_nothing_is_believed_of_what_a_proxy_is_said_to_forward(service, name):
    said = {"Forwarded": "host=evil.example;proto=https"}.get(name, "https")
    said = "evil.example" if name == "X-Forwarded-Host" else said
    for origin in ("https://evil.example", "https://gpu1.lan"):
        headers = {"Host": "gpu1.lan", "Origin": origin, name: said}
        error(service.post(CLEAR, headers=headers), 403, "origin_not_allowed")


@pytest.mark.parametrize(
    "origin", ["https://secure.example.com:443", "https://plain.example.com", "http://named:80"]
)
def test_an_allowed_origin_is_the_same_with_its_default_port(service, origin):
    assert_readable(service, origin, "GET", "/api/models", 200)
    for other in (origin.replace("s://", "s://x"), origin + "0", origin + ":444"):
        if other != origin:
            assert_origin_refused(service, "GET", "/api/models", other)


@pytest.mark.parametrize("site", ["same-origin", "same-site", "none"])
def test_a_browsers_call_from_its_own_site_is_taken(service, site):
    assert service.get("/api/models", headers={"Sec-Fetch-Site": site}).status_code == 200


@every_route
def test_every_route_refuses_a_browsers_call_from_another_site(service, method, path):
    answer = call(method, service.url + path, headers={"Sec-Fetch-Site": "cross-site"})
    error(answer, 403, "cross_site")


def preflight(service, path, origin):
    asked = {
        "Origin": origin,
        "Access-Control-Request-Method": "DELETE",
        "Access-Control-Request-Headers": "content-type,authorization",
    }
    return call("OPTIONS", service.url + path, headers=asked)


def listed(answer, kind):
    return set(re.split(", *", answer.headers[f"Access-Control-Allow-{kind}"].lower()))


@pytest.mark.parametrize("path", ["/api/models/delete", "/api/models/pull", RESET, "/api/nothing"])
def test_a_preflight_lets_an_allowed_origin_delete_and_send_json_and_a_token(
    guarded, service, path
):
    for one, origin in ((service, DASHBOARD), (service, service.url), (guarded, guarded.url)):
        answer = preflight(one, path, origin)
        assert answer.status_code in (200, 204)
        assert answer.headers["Access-Control-Allow-Origin"] == origin
        assert {"get", "post", "delete"} <= listed(answer, "Methods")
        assert {"content-type", "authorization"} <= listed(answer, "Headers")


def test_a_preflight_lets_no_other_origin_do_anything(service):
    answer = preflight(service, CLEAR, "http://evil.example")
    error(answer, 403)
    assert not cors_headers(answer)


@every_route
def test_without_an_origin_no_answer_speaks_of_cors(service, method, path):
    answer = call(method, service.url + path)
    assert not cors_headers(answer)
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert "no-store" in answer.headers["Cache-Control"]


# The token


def test_without_the_token_only_health_and_the_page_are_open(guarded):
    for path in ("/health", "/health?deep=1", "/"):
        assert guarded.get(path).status_code == 200


@pytest.mark.parametrize(
    "method, path",
    [
        *[route for route in ROUTES if route != ("GET", "/health")],
        ("POST", "/health"),
        ("PUT", "/"),
        ("GET", "/api/nothing"),
        ("GET", "//api/models"),
        ("GET", "/health/x"),
        ("GET", "/staticx"),
        ("OPTIONS", "/api/models"),
        ("TRACE", "/api/models"),
    ],
)
def test_everything_else_wants_the_token(guarded, method, path):
    error(call(method, guarded.url + path), 401, "token_wanted")


def test_a_head_wants_the_token_too(guarded):
    assert call("HEAD", guarded.url + "/api/models").status_code == 401


@pytest.mark.parametrize(
    "path",
    [
        "/static/../api/models",
        "/static/..%2fapp.py",
        "/static/%2e%2e/app.py",
        "/static/../app.py",
        "/static//etc/passwd",
        "/static/..%5capp.py",
        "/static/",
        "/static/nothing",
        "/static/%00",
        "/%73tatic/../api/models",
    ],
)
def test_static_opens_nothing_but_the_pages_files(guarded, path):
    status, headers, body = raw(guarded, request_bytes("GET", path))
    assert status in (401, 404)
    shaped(status, headers, body, path)


@pytest.mark.parametrize(
    "given",
    [
        "",
        "Bearer",
        "Bearer ",
        "Bearer wrong",
        f"Bearer {TOKEN}x",
        f"Bearer {TOKEN[:-1]}",
        f"Bearer {TOKEN.upper()}",
        f"Bearer  {TOKEN}x",
        f"Basic {TOKEN}",
        TOKEN,
        "Bearer \xff\xfe",
        "Bearer " + "x" * 7000,
    ],
    ids=lambda given: ascii(given)[:30],
)
def test_a_wrong_token_is_a_401(guarded, given):
    headers = {"Authorization": given.encode("latin-1")}
    error(guarded.get("/api/models", headers=headers), 401, "token_wanted")
    assert error(guarded.post(CLEAR, headers=headers), 401)["status"] == "error"


def test_the_token_is_checked_before_the_path_and_the_body_are(guarded):
    error(guarded.post(CLEAR, data="{"), 401)
    error(guarded.post("/api/models/pull", data=b"x" * 100_000), 401)
    error(guarded.get("/api/nothing"), 401)


@pytest.mark.parametrize(
    "method, path", [*ROUTES[1:], ("GET", "/metrics"), ("GET", "/api/nothing"), ("PUT", "/")]
)
def test_each_401_names_its_scheme_as_java_wants_it(guarded, method, path):
    for sent in ({}, {"headers": {"Authorization": "Bearer wrong"}}, {"data": b" " * 70_000}):
        answer = call(method, guarded.url + path, **sent)
        error(answer, 401, "token_wanted")
        assert answer.headers["WWW-Authenticate"] == "Bearer"


def test_no_other_answer_asks_for_a_token(guarded, service):
    for one, path in ((guarded, "/health"), (service, "/api/info"), (service, "/api/nothing")):
        assert "WWW-Authenticate" not in one.get(path).headers


def test_with_the_token_all_is_served(guarded):
    headers = {"Authorization": f"Bearer {TOKEN}"}
    for path in GETS:
        assert guarded.get(path, headers=headers).status_code == 200
    assert guarded.post(CLEAR, headers=headers).status_code == 200
    assert TOKEN not in guarded.log()


# Proxies and the page


@pytest.mark.parametrize(
    "header",
    [
        "Script-Name: /x",
        "SCRIPT_NAME: /x",
        "PATH_INFO: /api/info",
        "REMOTE_USER: x",
        "X-Forwarded-Proto: https",
        "X-Forwarded-Proto: https\r\nX-Forwarded-Ssl: off",
        "X-Forwarded-Host: evil.example",
    ],
)
def test_what_a_proxy_would_say_changes_nothing(service, header):
    host = f"127.0.0.1:{service.port}\r\n{header}"
    asked = request_bytes("GET", "/health", host=host, Origin=service.url)
    status, headers, body = raw(service, asked)
    assert status == 200
    assert shaped(status, headers, body, "/health")["status"] == "healthy"


def test_the_page_runs_nothing_but_its_own_files(service):
    answer = service.get("/")
    assert answer.status_code == 200
    assert answer.headers["Content-Type"].startswith("text/html")
    parts = answer.headers["Content-Security-Policy"].split(";")
    policy = dict(part.strip().split(" ", 1) for part in parts)
    assert {policy[kind] for kind in ("script-src", "connect-src", "style-src")} == {"'self'"}
    closed = ("default-src", "frame-ancestors", "base-uri", "form-action")
    assert {policy[kind] for kind in closed} == {"'none'"}
    inline = r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=|javascript:|https?://"
    assert not re.search(inline, answer.text, re.I)
    for file in re.findall(r'(?:src|href)="(/?[^"#]+)"', answer.text):
        loaded = service.get("/" + file.removeprefix("/"))
        assert loaded.status_code == 200
        assert loaded.headers["X-Content-Type-Options"] == "nosniff"
