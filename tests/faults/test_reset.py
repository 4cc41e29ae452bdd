"""Reset: what it loads, and an Ollama that hangs, dies or starts."""

import os
import signal
import time

import psutil
import pytest

from helpers.answers import (
    CLEAR,
    GEMMA,
    RESET,
    ask,
    assert_works,
    clear,
    error,
    heal,
    health,
    reset,
    stats,
    wait_loaded,
)
from helpers.causes import hung_runner, late_ollama, ollama_dead, ollama_hung
from helpers.frozen import unkillable
from helpers.processes import is_gone
from helpers.waiting import wait_for
from llm_service.processes import is_ending

BOTH_TEN_TIMES = [CLEAR, RESET] * 10

# What it loads


@pytest.mark.parametrize(
    "fields", [{}, {"model": "gemma"}, {"restart": True}, {"restart": True, "model": GEMMA}]
)
def test_it_loads_the_default_or_the_named_model(idle, fields):
    old = idle.ollama_pid()
    report = reset(idle, **fields)
    assert report["model"] in (GEMMA, "gemma")
    assert report["model_state"] in ("loading", "loaded")
    assert (idle.ollama_pid() != old) == bool(fields.get("restart"))
    wait_loaded(idle, GEMMA)
    assert health(idle)["loaded"] == [GEMMA]


def test_it_loads_the_named_one_else_the_default(trio):
    assert reset(trio, model="m2")["model"] == "m2"
    wait_loaded(trio, "m2:latest")
    assert reset(trio)["model"] == "m1"
    wait_loaded(trio, "m1:latest")
    assert health(trio)["loaded"] == ["m1:latest"]


def test_without_the_default_it_loads_what_was_loaded_else_none(make_service, make_gguf_variant):
    models = {"m3:latest": make_gguf_variant(3)}
    service = make_service(models=models, LLM_MODEL="absent:1b", LLM_CONTEXT_LENGTH=1024)
    report = reset(service)
    assert (report["model"], report["model_state"]) == (None, "none")
    assert service.runners() == []
    service.load("m3")
    for restart in (False, True):
        assert reset(service, restart=restart)["model"] == "m3:latest"
        wait_loaded(service, "m3:latest")


def test_while_the_model_loads(idle, others):
    runners = []
    for _ in range(3):
        loading = others.submit(idle.ollama, "POST", "/api/generate", json={"model": GEMMA})
        runners.append(wait_for(idle.runners, 60, "a runner that loads")[0])
        assert reset(idle)["model"] == GEMMA
        loading.result(90)
    wait_loaded(idle, GEMMA)
    assert all(map(is_gone, runners))
    ask(idle)


def test_during_the_load_of_the_reset_before(idle):
    for restart in (False, True, False, False):
        assert reset(idle, restart=restart)["model"] == GEMMA
    wait_loaded(idle, GEMMA)
    assert len(idle.runners()) == 1
    ask(idle)


def test_a_model_that_does_not_load_shows_in_health(make_service, gguf):
    service = make_service(models={GEMMA: gguf}, LLM_MODEL=GEMMA)
    for blob in (service.models / "blobs").iterdir():
        if blob.stat().st_size > 1 << 20:
            blob.unlink()
            blob.write_bytes(b"GGUF" + bytes(1 << 16))
    report = reset(service)
    assert report["model"] == GEMMA and report["model_state"] != "loaded"
    wait_for(lambda: health(service)["load"]["state"] == "failed", 60, "the outcome of the load")
    load = health(service)["load"]
    assert load["model"] == GEMMA and load["error"]


# Ollama hangs


def test_ollama_hung_is_told_and_a_reset_brings_it_back(idle):
    idle.load(GEMMA)
    restarts = stats(idle)["ollama"]["restarts"]
    with ollama_hung(idle) as server:
        told = health(idle, 503)
        assert told["status"] == "unhealthy"
        assert (told["code"], told["recommended_action"]) == ("ollama_hung", "reset_session")
        assert stats(idle)["ollama"]["pid"] == server.pid
        reset(idle)
        assert is_gone(server)
    idle.wait_healthy(60)
    assert idle.ollama_pid() != server.pid
    assert stats(idle)["ollama"]["restarts"] == restarts + 1
    wait_loaded(idle, GEMMA)
    assert health(idle)["recommended_action"] == "none"
    ask(idle)


def test_ollama_and_a_runner_hung_in_mid_answer_are_reset_in_time(idle):
    waiting = hung_runner(idle)
    with ollama_hung(idle):
        reset(idle)
    assert is_gone(waiting.runner)
    wait_loaded(idle, GEMMA)
    ask(idle)


def test_an_ollama_that_takes_its_time_to_die_is_no_failure(idle, others):
    """By the end of the reset the next one is there, though SIGKILL took longer than usual."""
    server = psutil.Process(idle.ollama_pid())
    with unkillable(server):
        resetting = others.submit(reset, idle, restart=True)
        wait_for(lambda: is_ending(server), 30, "the signal")
        time.sleep(1.9)  # SIGTERM gets 1 s, SIGKILL 0.5 s
    assert resetting.result()["model"] == GEMMA
    assert is_gone(server)
    wait_loaded(idle, GEMMA)


def test_clear_frees_the_memory_of_a_hung_ollama(idle):
    runner = idle.load(GEMMA)
    with ollama_hung(idle):
        report = clear(idle)
        assert report["verified"] is True
        assert [killed["pid"] for killed in report["killed"]] == [runner.pid]
        assert report["unloaded_models"] == [GEMMA]
        assert is_gone(runner)
    ask(idle)


# Ollama dies


def test_ollama_killed_with_a_model_loaded_comes_back_without_an_orphan(idle):
    orphan = idle.load(GEMMA)
    restarts, old = stats(idle)["ollama"]["restarts"], idle.ollama_pid()
    killed_at = time.monotonic()
    os.kill(old, signal.SIGKILL)
    wait_for(lambda: is_gone(orphan), 30, "the orphan is gone")
    wait_for(lambda: idle.ollama_pid() != old, 60, "the next Ollama")
    idle.wait_healthy(60)
    told = stats(idle)
    assert told["ollama"]["pid"] == idle.ollama_pid()
    assert told["ollama"]["restarts"] == restarts + 1
    assert told["ollama"]["uptime_seconds"] <= time.monotonic() - killed_at + 1
    wait_for(lambda: stats(idle)["runners"] == [], 30, "the watch sees that it is gone")
    ask(idle)


def test_with_ollama_dead_both_answer_and_health_says_wait(idle, others):
    with ollama_dead(idle):
        told = health(idle, 503)
        assert (told["code"], told["recommended_action"]) == ("ollama_dead", "wait")
        assert stats(idle)["ollama"]["pid"] is None
        for _ in range(3):
            assert clear(idle)["verified"] is True
        list(others.map(lambda path: heal(idle, path), BOTH_TEN_TIMES))
    # The reset's loading goes on.
    wait_loaded(idle, GEMMA)


# Ollama starts


def test_while_ollama_starts_health_says_wait_and_both_succeed(
    make_service, gguf, tmp_path, ollama_binary
):
    program, listens = late_ollama(tmp_path, ollama_binary)
    path = f"{program.parent}:{os.environ['PATH']}"
    service = make_service(models={GEMMA: gguf}, LLM_MODEL=GEMMA, PATH=path, wait=False)
    # In a list, as a 503 alone is false.
    (told,) = wait_for(lambda: [service.get("/health")], 60, "the API answers")
    assert (told.status_code, "Retry-After" in told.headers) == (503, True)
    said = told.json()
    assert (said["code"], said["recommended_action"]) == ("ollama_starting", "wait")
    clear(service)
    assert reset(service)["model"] == GEMMA
    listens.touch()
    service.wait_healthy(60)
    wait_loaded(service, GEMMA)


# The worker dies


def test_the_worker_killed_comes_back(idle):
    runner = idle.load(GEMMA)
    old = idle.worker_pid()
    os.kill(old, signal.SIGKILL)
    idle.wait_healthy(60)
    assert idle.worker_pid() != old
    assert not is_gone(runner)
    assert clear(idle)["unloaded_models"] == [GEMMA]


# In a row


@pytest.mark.parametrize("path", [CLEAR, RESET])
def test_twenty_in_a_row(idle, path):
    for _ in range(20):
        heal(idle, path)
    assert_works(idle)


def test_restarts_in_a_row_never_make_the_launcher_give_up(idle):
    restarts = stats(idle)["ollama"]["restarts"]
    for _ in range(12):
        reset(idle, restart=True)
        idle.wait_healthy(60)
    assert stats(idle)["ollama"]["restarts"] == restarts + 12
    wait_loaded(idle, GEMMA)
    assert_works(idle)


# No model at all


@pytest.fixture(scope="module")
def bare(make_module_service):
    return make_module_service(LLM_MODEL="absent:1b")


@pytest.mark.parametrize("path", [CLEAR, RESET])
def test_with_no_model_both_succeed_at_once_and_in_a_row(bare, others, path):
    reports = [heal(bare, path) for _ in range(20)]
    reports += others.map(lambda _: heal(bare, path), range(20))
    assert all(report.get("model") is None for report in reports)
    assert health(bare)["models_count"] == 0


def test_with_no_model_a_restart_loads_none(bare):
    assert reset(bare, restart=True)["model_state"] == "none"
    bare.wait_healthy(60)
    assert health(bare)["recommended_action"] == "none"


@pytest.mark.parametrize("fault", [ollama_dead, ollama_hung])
def test_with_no_model_and_ollama_dead_or_hung_both_succeed(bare, others, fault):
    bare.wait_healthy(60)
    with fault(bare):
        list(others.map(lambda path: heal(bare, path), BOTH_TEN_TIMES))
    bare.wait_healthy(60)


def verdict(service):
    return service.get("/health").json()


@pytest.mark.parametrize("self_heal", ["on", "off"])
def test_no_restart_for_a_runner_that_sigkill_does_not_end(make_service, gguf, self_heal):
    """No restart ends it; the first reset is early, and the later ones know that it stays."""
    service = make_service(models={GEMMA: gguf}, LLM_MODEL=GEMMA, LLM_SELF_HEAL=self_heal)
    runner = service.load(GEMMA)
    server = service.ollama_pid()
    with unkillable(runner):
        said = error(service.post(RESET), 503, "runner_ending")
        assert said["recommended_action"] == "wait"
        wait_for(lambda: verdict(service).get("code") == "runner_survived", 30, "the verdict")
        for path in (RESET, CLEAR):
            said = error(service.post(path), 503, "runner_survived")
            assert said["recommended_action"] == "reboot_host"
        assert verdict(service)["recommended_action"] == "reboot_host"
        assert service.ollama_pid() == server
    wait_for(lambda: is_gone(runner), 10, "its end")
    service.wait_healthy(60)
