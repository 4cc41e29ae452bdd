"""The contract's routes, and assertions on their answers."""

import json
import re
import time

import pytest

from helpers.waiting import wait_for

GEMMA = "gemma:latest"
# Of the service that the fixture `guarded` gives.
TOKEN = "correct-horse-battery"
CLEAR, RESET = "/api/cache/clear", "/api/session/reset"
# Within which the contract wants an answer, in seconds.
LIMITS_S = {CLEAR: 4, RESET: 4.5, "/health": 3, "/api/stats": 1}

GETS = [
    "/health",
    "/api/models",
    "/api/models/loaded",
    "/api/models/pull",
    "/api/stats",
    "/api/info",
    "/api/history",
    "/api/models/updates",
]
WITH_MODEL = [
    ("POST", "/api/models/pull"),
    ("POST", "/api/models/load"),
    ("DELETE", "/api/models/pull"),
    ("DELETE", "/api/models/delete"),
]
HEALING = [("POST", CLEAR), ("POST", RESET)]
WITH_BODY = [*WITH_MODEL, *HEALING, ("POST", "/api/models/verify")]
ROUTES = [("GET", path) for path in GETS] + WITH_BODY


def last_part(value):
    """Make a short test id of a path."""
    return value.rpartition("/")[2]


every_route = pytest.mark.parametrize("method, path", ROUTES, ids=last_part)
every_route_with_body = pytest.mark.parametrize("method, path", WITH_BODY, ids=last_part)

STATUSES = {200, 202, 204, 304, 400, 401, 403, 404, 405, 409, 413, 415, 429, 502, 503, 504, 507}
STATUS_WORDS = {"/health": "unhealthy", CLEAR: "error", RESET: "error"}


def shaped(status, headers, body, path):
    """Assert that an answer is one of the contract's.

    Returns its JSON, of a stream its last line.
    """
    assert status in STATUSES, (status, body[:500])
    if not body and status in (200, 204, 304):  # of OPTIONS, or as it was
        return None
    kind = headers["Content-Type"]
    assert kind.startswith(("application/json", "application/x-ndjson")), (kind, body[:200])
    answer = json.loads(body.strip().splitlines()[-1] if "ndjson" in kind else body)
    if status >= 400:
        shaped_error(answer, path)
        assert status not in (429, 503) or headers["Retry-After"].isdigit()
    else:
        assert isinstance(answer, dict)
    return answer


def shaped_error(answer, path=""):
    """Assert that this is the contract's one error shape; return it."""
    assert re.fullmatch("[a-z0-9_]+", answer["code"])
    sentence = answer["error"]
    assert len(sentence) > 15 and sentence.isprintable() and sentence[-1] in ".!?"
    assert answer.get("status") == STATUS_WORDS.get(path.partition("?")[0])
    return answer


def error(response, status, code=None):
    """Assert an error of this status, in the contract's shape; return it."""
    assert response.status_code == status, response.text[:500]
    path = response.request.path_url
    answer = shaped(response.status_code, response.headers, response.content, path)
    assert code in (None, answer["code"])
    return answer


def heal(service, path, began=None, **fields):
    """Send a clear or reset that must succeed in its time; return the report.

    Without fields it is sent as the watchdog does: no body, no content type. ``began()`` is when
    its time begins (monotonic), which is else when it is sent.
    """
    answer = service.post(path, **({"json": fields} if fields else {}))
    seconds, report = answer.elapsed.total_seconds(), answer.json()
    if began:
        seconds = time.monotonic() - began()
    steps = {step["step"]: step["seconds"] for step in report.get("steps", ())}
    print(f"{path} {fields or ''}: {seconds:.2f} s {report.get('message')} {steps}")
    assert answer.status_code == 200, answer.text
    assert seconds < LIMITS_S[path]
    assert report["status"] == "success"
    assert {CLEAR: "cache cleared", RESET: "session reset"}[path] in report["message"].lower()
    assert all(set(step) == {"step", "ok", "seconds", "detail"} for step in report["steps"])
    return report


def clear(service, **fields):
    return heal(service, CLEAR, **fields)


def reset(service, **fields):
    return heal(service, RESET, **fields)


def cors_headers(answer):
    return [name for name in answer.headers if name.startswith("Access-Control")]


def health(service, status=200):
    """Ask /health; assert the status and the time, and return the report."""
    answer = service.get("/health")
    assert answer.elapsed.total_seconds() < LIMITS_S["/health"]
    assert answer.status_code == status, answer.text
    return answer.json()


def stats(service):
    answer = service.get("/api/stats")
    assert answer.elapsed.total_seconds() < LIMITS_S["/api/stats"]
    return answer.json()


def wait_loaded(service, *names):
    def loaded():
        listed = service.get("/api/models/loaded").json().get("loaded_models", ())
        return {model["name"] for model in listed} >= set(names)

    wait_for(loaded, 60, f"{names} loaded")


def wait_looks(service, count=2):
    """Wait for this many more looks of the watch."""

    def looked_at():
        return service.get("/api/stats").json()["looked_at"]

    for _ in range(count):
        before = looked_at()
        wait_for(lambda before=before: looked_at() != before, 30, "a look")


def ask(service, name=GEMMA):
    """Assert that a short generation works."""
    body = {"model": name, "prompt": "1 2 3 4", "stream": False, "options": {"num_predict": 3}}
    answer = service.ollama("POST", "/api/generate", json=body)
    assert answer.status_code == 200 and answer.json()["eval_count"] > 0, answer.text


def assert_works(service):
    """Assert that after all of a test's faults it is well, with one model loaded."""
    service.wait_healthy(60)
    ask(service)
    assert len(service.runners()) == 1
