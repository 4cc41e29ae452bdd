"""Models that are loaded by order, and with LLM_PRELOAD by nobody's."""

import os
import shutil
import signal

import psutil
import pytest

from helpers.answers import GEMMA, clear, error, health, reset, wait_looks
from helpers.embedding import add_embedding_model
from helpers.waiting import wait_for

LOAD = "/api/models/load"


def loaded(service):
    """Return the loaded models' names; none while Ollama starts."""
    listed = service.get("/api/models/loaded").json().get("loaded_models", ())
    return {model["name"] for model in listed}


def wait_loaded(service, *names):
    wait_for(lambda: loaded(service) == set(names), 60, f"{names} loaded")


def load_state(service):
    load = service.get("/health").json().get("load")
    return load and load["state"]


def state_by_order(service, model):
    return service.post(LOAD, json={"name": model}).json()["model_state"]


# By order


def test_a_model_is_loaded_by_order(trio):
    answer = trio.post(LOAD, json={"model": "m2"})
    assert answer.status_code == 202
    body = answer.json()
    assert body["model_state"] in ("loading", "loaded")
    assert (body["status"], body["model"]) == ("accepted", "m2")
    wait_loaded(trio, "m2:latest")
    wait_for(lambda: load_state(trio) == "loaded", 30, "its state")
    # On a busy machine it may be asked for longer than an order waits.
    wait_for(lambda: state_by_order(trio, "m2") == "loaded", 30, "it is said at once")
    trio.post(LOAD, json={"model": "m3"})
    wait_loaded(trio, "m2:latest", "m3:latest")  # it unloads no other
    error(trio.post(LOAD, json={"model": "nowhere"}), 404, "model_not_found")
    error(trio.post(LOAD), 400, "model_missing")
    assert loaded(trio) == {"m2:latest", "m3:latest"}


@pytest.mark.parametrize("embeds", [False, True])
def test_a_clear_takes_back_a_load_that_waits_for_its_turn(make_service, make_gguf_variant, embeds):
    """Ollama would begin it after the clear, once the busy runner has gone."""
    service = make_service(
        models={f"m{n}:latest": make_gguf_variant(n) for n in (1, 2)[: 2 - embeds]},
        OLLAMA_MAX_LOADED_MODELS=1,
    )
    if embeds:
        add_embedding_model(service.models, "m2:latest")
    busy = service.generate("m1:latest")
    assert service.post(LOAD, json={"model": "m2"}).status_code == 202
    wait_looks(service)
    assert load_state(service) == "loading" and loaded(service) == {"m1:latest"}
    clear(service)
    assert busy.wait(30).error
    wait_looks(service, 3)
    assert (loaded(service), load_state(service)) == (set(), "cancelled")


# At the start


def preloading(make_service, gguf, **options):
    return make_service(
        **{"models": {GEMMA: gguf}, "LLM_PRELOAD": "on", "LLM_MODEL": GEMMA, **options}
    )


def test_the_model_is_there_without_a_call_after_the_start_and_each_restart(make_service, gguf):
    service = preloading(make_service, gguf)
    wait_loaded(service, GEMMA)
    os.kill(service.ollama_pid(), signal.SIGKILL)
    wait_for(lambda: len(service.state_lines()) == 2, 60, "a new Ollama")
    service.wait_healthy(60)
    wait_loaded(service, GEMMA)
    clear(service)
    wait_looks(service)
    assert loaded(service) == set()  # once for each server


def test_after_a_healing_of_the_server_it_is_there_again(make_service, gguf):
    service = preloading(make_service, gguf)
    wait_loaded(service, GEMMA)
    hung = service.ollama_pid()
    os.kill(hung, signal.SIGSTOP)
    wait_for(lambda: service.ollama_pid() != hung, 120, "the healing")
    service.wait_healthy(60)
    wait_loaded(service, GEMMA)


def test_by_default_nothing_is_loaded(make_service, gguf):
    service = preloading(make_service, gguf, LLM_PRELOAD=None)
    wait_looks(service, 3)
    assert (loaded(service), load_state(service)) == (set(), None)


def test_a_model_that_is_not_there_is_not_downloaded(make_service, gguf):
    service = preloading(make_service, gguf, LLM_MODEL="other")
    wait_looks(service, 3)
    body = health(service)
    assert (loaded(service), body["load"], body["warnings"]) == (set(), None, [])
    assert service.get("/api/models/pull").json()["count"] == 0
    assert '"/api/pull"' not in service.log()


def test_an_ollama_that_is_killed_in_the_middle_of_the_load_loads_again(make_service, gguf):
    service = preloading(make_service, gguf, wait=False)
    runner = wait_for(lambda: next(iter(service.runners()), None), 60, "the runner")
    runner.suspend()
    os.kill(service.ollama_pid(), signal.SIGKILL)
    wait_for(lambda: len(service.state_lines()) == 2, 60, "a new Ollama")
    wait_loaded(service, GEMMA)
    wait_for(lambda: load_state(service) == "loaded", 30, "its state")
    wait_for(lambda: not psutil.pid_exists(runner.pid), 30, "the end of the orphan")
    service.wait_healthy(60)


@pytest.fixture
def too_little_memory():
    """Words before a command that leave it too little memory for the model's buffers."""
    if not shutil.which("prlimit"):
        pytest.skip("no prlimit")
    return "prlimit", f"--data={300 << 20}"


def test_a_model_that_does_not_fit_is_a_warning_and_no_fault(
    make_service, whole_gguf, too_little_memory
):
    service = preloading(
        make_service,
        whole_gguf,
        wrapper=too_little_memory,
        constants={"llm_service.loading.RETRIES_S": (0.5, 0.5)},
    )
    wait_for(lambda: load_state(service) == "failed", 120, "the last try")
    body = health(service)
    (warning,) = body["warnings"]
    assert warning["code"] == "load_failed"
    assert GEMMA in warning["message"]
    assert service.log().count("trying again in 0.5 s") == 2
    wait_looks(service)
    assert load_state(service) == "failed"  # and it stays so


def test_a_reset_that_restarts_loads_its_own_model_alone(make_service, make_gguf_variant):
    service = make_service(
        models={f"m{n}:latest": make_gguf_variant(n) for n in (1, 2)},
        LLM_PRELOAD="on",
        LLM_MODEL="m1",
        LLM_CONTEXT_LENGTH=1024,
        OLLAMA_MAX_LOADED_MODELS=3,
    )
    wait_loaded(service, "m1:latest")
    reset(service, model="m2", restart=True)
    wait_loaded(service, "m2:latest")
    wait_looks(service, 3)
    assert loaded(service) == {"m2:latest"}
