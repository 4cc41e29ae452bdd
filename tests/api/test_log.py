"""What the log says of requests and of what the service does by itself."""

import re

import pytest

from helpers.answers import CLEAR, GEMMA, TOKEN, clear, error
from helpers.ports import NOWHERE
from helpers.waiting import call, wait_for


def request_lines(service, start, path):
    return [line for line in service.log()[start:].splitlines() if f" {path}" in line]


def own_lines(log, words):
    """Return the service's own lines with these words, each split at blanks."""
    lines = [line.split() for line in log.splitlines() if words in line]
    return [line for line in lines if len(line) > 2]


@pytest.mark.parametrize(
    "method, path, status", [("GET", "/api/info", 200), ("POST", CLEAR, 200), ("GET", "/none", 404)]
)
def test_a_request_has_one_line_with_its_duration(guarded, method, path, status):
    start = len(guarded.log())
    bearer = {"Authorization": f"Bearer {TOKEN}"}
    secret = {"secret": "in-the-body"}
    assert call(method, guarded.url + path, headers=bearer, json=secret).status_code == status
    # Its line comes after its answer, and a second one would come before a later request's.
    wait_for(lambda: request_lines(guarded, start, path), 30, "its line")
    guarded.get("/api/models/loaded?after")
    last = "/api/models/loaded?after"
    wait_for(lambda: request_lines(guarded, start, last), 30, "the line after")
    (line,) = request_lines(guarded, start, path)
    assert re.search(rf"{method} {path}\b.* {status} .*\b\d+ ms", line)
    assert not re.search(f"{TOKEN}|in-the-body", guarded.log())


POLLED = ["/health", "/api/stats", "/api/models", "/api/models/pull", "/api/history?since=0"]


def test_what_the_page_polls_leaves_no_line_unless_it_fails(service):
    start = len(service.log())
    for path in POLLED:
        answer = service.get(path)
        assert answer.status_code == 200
        if tag := answer.headers.get("ETag"):
            assert service.get(path, headers={"If-None-Match": tag}).status_code == 304
        assert service.get(path, headers={"Host": "evil.example"}).status_code == 403
    service.post("/api/models/pull", data="{")
    service.get("/api/info?last")
    refused = [f"GET {path} 403" for path in POLLED]
    wanted = sorted([*refused, "POST /api/models/pull 400", "GET /api/info?last 200"])

    def seen():  # a line comes after its answer: the next request's may be written before it
        return sorted(re.findall(r"INFO \S+ ([A-Z]+ \S+ \d+) ", service.log()[start:]))

    wait_for(lambda: set(seen()) >= set(wanted), 30, "all lines")
    assert seen() == wanted


def test_a_guessed_token_reaches_no_log_line(guarded):
    start = len(guarded.log())
    guarded.get("/api/info", headers={"Authorization": "Bearer guess-of-a-token"})
    wait_for(lambda: request_lines(guarded, start, "/api/info"), 30, "its line")
    assert "guess-of-a-token" not in guarded.log()


def test_a_refused_pull_is_a_warning(service):
    model = f"{NOWHERE}/ns/refused:t"
    error(service.post("/api/models/pull", json={"model": model, "insecure": True}), 502)
    levels = {line[2] for line in own_lines(service.log(), model)}
    assert "WARNING" in levels and "ERROR" not in levels


def test_an_ended_runner_is_an_error_with_its_pid(service):
    runner = service.load(GEMMA)
    generation = service.generate(GEMMA)
    start = len(service.log())
    assert [each["pid"] for each in clear(service)["killed"]] == [runner.pid]
    generation.wait(60)
    (line,) = [line for line in service.log()[start:].splitlines() if " ERROR " in line]
    assert str(runner.pid) in line and "busy" in line and GEMMA in line
