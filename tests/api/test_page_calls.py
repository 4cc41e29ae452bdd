"""What the page asks for beside the rest: a try, the last hour, models to begin with."""

import json
import time

import pytest

from helpers.answers import GEMMA, clear, error, stats
from helpers.generation import PROMPT
from helpers.waiting import wait_for
from llm_service.history import MARKS_KEPT

TRY = "/api/models/try"


def attempt(service, prompt="Say hello.", model=GEMMA):
    body = {"model": model, "prompt": prompt}
    return service.post(TRY, json=body, stream=True, timeout=60)


def busy(service):
    return [runner for runner in stats(service)["runners"] if runner["state"] == "busy"]


@pytest.fixture
def brief(service):
    """A model that counts, and ends at 20: of the other nobody knows when it ends."""
    parameters = {"temperature": 0, "stop": ["20"]}
    body = {"model": "brief", "from": GEMMA, "parameters": parameters, "stream": False}
    assert service.ollama("POST", "/api/create", json=body).ok
    yield "brief"
    service.delete("/api/models/delete", json={"model": "brief", "force": True})


@pytest.fixture
def tries_end(service):
    """Wait until the tries of a test have ended, for whose listeners may have left just now."""
    yield
    wait_for(lambda: attempt(service, model="nothing").status_code == 404, 30, "the last try's end")


@pytest.mark.usefixtures("tries_end")
def test_a_try_gives_ollamas_own_lines(service, brief):
    clear(service)
    answer = attempt(service, PROMPT, brief)
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in answer.iter_lines()]
    assert all(line["model"] == brief for line in lines)
    assert "".join(line["response"] for line in lines)
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    assert lines[-1]["eval_count"] > 0 and lines[-1]["eval_duration"] > 0


@pytest.mark.usefixtures("tries_end")
def test_a_try_is_one_at_a_time_and_ends_when_its_listener_leaves(service):
    answer = attempt(service, PROMPT)  # it counts for ever
    lines = answer.iter_lines()
    wait_for(lambda: json.loads(next(lines))["response"], 60, "the answer")
    refused = error(attempt(service), 429, "try_under_way")
    assert "Wait" in refused["error"] or "wait" in refused["error"]
    answer.raw.shutdown()
    answer.close()
    left = time.monotonic()
    wait_for(lambda: attempt(service, " ").status_code == 400, 30, "a check of the prompt")

    def free():
        again = attempt(service)
        again.close()
        return again.status_code == 200

    wait_for(free, 5, "the next try")
    print(f"the next try {time.monotonic() - left:.1f} s after the listener had left")
    wait_for(lambda: not busy(service), 60, "the end of the work")


@pytest.mark.parametrize(
    "body, status, code",
    [
        ({"model": "nothing:here", "prompt": "a"}, 404, "model_not_found"),
        ({"prompt": "a"}, 400, "model_missing"),
        ({"model": GEMMA}, 400, "bad_field"),
        ({"model": GEMMA, "prompt": 5}, 400, "bad_field"),
        ({"model": GEMMA, "prompt": "  "}, 400, "bad_field"),
        ({"model": "../x", "prompt": "a"}, 400, "bad_model_name"),
    ],
)
def test_a_try_that_cannot_be_is_an_error_and_blocks_no_other(service, body, status, code):
    for _ in range(2):
        error(service.post(TRY, json=body), status, code)


def test_a_try_is_refused_to_other_sites_and_without_the_token(service, guarded):
    body = {"model": GEMMA, "prompt": "a"}
    evil = {"Origin": "http://evil.example"}
    error(service.post(TRY, json=body, headers=evil), 403, "origin_not_allowed")
    error(service.post(TRY, json=body, headers={"Host": "evil.example"}), 403)
    error(guarded.post(TRY, json=body), 401, "token_wanted")


def test_the_last_hour_has_a_value_for_each_series(service):
    answer = wait_for(
        lambda: (h := service.get("/api/history").json())["samples"] and h, 60, "a sample"
    )
    assert answer["interval_s"] == 10 and answer["span_s"] == 3600
    assert {"cpu_percent", "memory_mb", "tokens_per_second"} <= set(answer["series"])
    for sample in answer["samples"]:
        assert len(sample) == 1 + len(answer["series"])
    again = service.get("/api/history", params={"since": answer["next"]}).json()
    assert not again["complete"] and len(again["samples"]) <= 2
    error(service.get("/api/history?since=yesterday"), 400, "bad_field")


def test_a_clear_is_a_mark_of_the_last_hour(service):
    before = service.get("/api/history").json()["marks"]
    freed = clear(service)["memory"]["freed_mb"]
    newest, *others = service.get("/api/history").json()["marks"]
    assert newest["kind"] == "cleared" and newest["freed_mb"] == freed
    # As many as are kept: on the shared service other tests may have made so many.
    kinds = [mark["kind"] for mark in before]
    assert [mark["kind"] for mark in others] == kinds[: MARKS_KEPT - 1]


def test_models_to_begin_with_are_ollamas_local_ones(service):
    models = service.get("/api/models/recommendations").json()["models"]
    assert models
    for model in models:
        assert model["name"] and not model["name"].endswith("cloud")
        assert model["vram_bytes"] > 1e9
    assert [model["name"] for model in models][:2] == ["llama3.2:1b", "llama3.1:8b"]
    assert all(model["download_bytes"] is None for model in models)  # nobody was asked


def test_how_large_they_are_is_asked_only_when_told_to_and_told_with_a_reason(service):
    path = "/api/models/recommendations?sizes=true"
    models = service.get(path, timeout=60).json()["models"]
    asked = {model["name"] for model in service.get(path[:-11]).json()["models"]}
    assert {model["name"] for model in models} == asked
    for model in models:  # without a network there is a reason instead
        assert bool(model["download_bytes"]) != bool(model["code"] and model["reason"])
    error(service.get("/api/models/recommendations?sizes=perhaps"), 400, "bad_field")


@pytest.mark.parametrize("path", ["/api/models", "/api/models/pull"])
def test_what_has_not_changed_is_not_sent_again(service, path):
    first = service.get(path)
    tag = first.headers["ETag"]
    again = service.get(path, headers={"If-None-Match": tag})
    assert again.status_code == 304 and again.content == b""
    assert again.headers["Cache-Control"] == "no-store"
    assert service.get(path, headers={"If-None-Match": '"other"'}).json() == first.json()
