"""Clear, reset and recover where Ollama unloads as on a GPU: one model every five seconds."""

import threading
import time

import pytest
import requests

from helpers.answers import RESET, ask, clear, heal, health, stats
from helpers.causes import Waiting
from helpers.frozen import unkillable
from helpers.gpu_ollama import gpu_ollama
from helpers.processes import is_gone
from helpers.waiting import wait_for

M1, M2 = "m1:latest", "m2:latest"


@pytest.fixture(scope="module")
def shared(make_module_service, make_gguf_variant, ollama_binary, tmp_path_factory):
    return make_module_service(
        binary=gpu_ollama(tmp_path_factory.mktemp("gpu"), ollama_binary),
        models={M1: make_gguf_variant(1), M2: make_gguf_variant(2)},
        LLM_MODEL=M1,
        LLM_CONTEXT_LENGTH=1024,
        # On two busy cores a runner that answers late would be hung or busy, and an Ollama that is
        # held for a moment would be too late.
        constants={
            "llm_service.clearing.CLEAR_RUNNER_S": 1,
            "llm_service.clearing.PATIENT_ASK_S": 15,
            "llm_service.session.CLEAR_S": 20,
        },
    )


@pytest.fixture
def on_gpu(shared):
    """The service with nothing loaded, and Ollama at rest."""
    shared.wait_healthy(60)
    clear(shared)
    wait_for(lambda: listed(shared) == [], 60, "Ollama to list nothing")
    return shared


def listed(service):
    return [each["name"] for each in service.ollama("GET", "/api/ps").json()["models"]]


def does_not_list(service):
    try:
        service.ollama("GET", "/api/ps", timeout=1)
    except requests.Timeout:
        return True
    return False


def test_ollama_lists_a_model_on_whose_turn_comes_later(on_gpu):
    # What the others rest on: without it they would pass for no reason.
    for name in (M1, M2):
        on_gpu.load(name)
    for name in (M1, M2):
        on_gpu.ollama("POST", "/api/generate", json={"model": name, "keep_alive": 0})
    wait_for(lambda: len(on_gpu.runners()) == 1, 3, "the first one to go")
    time.sleep(1)
    assert len(on_gpu.runners()) == len(listed(on_gpu)) == 1


def test_a_clear_of_a_busy_and_an_idle_one_is_a_success(on_gpu):
    idle, busy = on_gpu.load(M1), Waiting(on_gpu, M2)
    report = clear(on_gpu)
    assert report["verified"] is True and report["left"] == []
    assert report["unloaded_models"] == [M1, M2]
    assert report["killed"] == [{"pid": busy.runner.pid, "model": M2, "reason": "busy"}]
    assert is_gone(idle) and is_gone(busy.runner)
    assert report["memory"]["freed_mb"] > 0
    ask(on_gpu, M2)


def test_a_clear_of_two_idle_ones_ends_the_one_whose_turn_has_not_come(on_gpu):
    runners = [on_gpu.load(M1), on_gpu.load(M2)]
    report = clear(on_gpu)
    assert report["verified"] is True and report["left"] == []
    assert [each["reason"] for each in report["killed"]] == ["idle"]
    assert all(map(is_gone, runners))


def test_a_reset_restarts_nothing(on_gpu):
    runners = [on_gpu.load(M1), on_gpu.load(M2)]
    before = stats(on_gpu)["ollama"]
    report = heal(on_gpu, RESET)
    assert all(map(is_gone, runners))
    assert stats(on_gpu)["ollama"]["pid"] == before["pid"]
    assert "end_ollama" not in [step["step"] for step in report["steps"]]
    wait_for(lambda: health(on_gpu)["load"]["state"] == "loaded", 60, "m1 to be loaded")


def test_recover_frees_all_that_is_idle_and_says_so(on_gpu):
    runners = [on_gpu.load(M1), on_gpu.load(M2)]
    answer = on_gpu.post("/api/gpu/recover").json()
    assert (answer["unloaded_models"], answer["can_retry"]) == ([M1, M2], True)
    assert all(map(is_gone, runners))


def test_a_sparing_clear_leaves_the_busy_one(on_gpu):
    idle, busy = on_gpu.load(M1), on_gpu.generate(M2)
    report = clear(on_gpu, force=False)
    assert (report["left"], report["unloaded_models"]) == ([M2], [M1])
    assert (report["killed"], report["verified"]) == ([], False)
    assert is_gone(idle)
    busy.goes_on()
    busy.close()


def test_a_sparing_clear_spares_one_that_is_asked_again_and_again(on_gpu):
    on_gpu.load(M1)
    answers = []
    stop = threading.Event()

    def caller():
        body = {"model": M2, "prompt": "1 2", "stream": False, "options": {"num_predict": 1}}
        while not stop.wait(0.5):  # in which it is idle
            answers.append(on_gpu.ollama("POST", "/api/generate", json=body).status_code)

    thread = threading.Thread(target=caller)
    thread.start()
    try:
        wait_for(lambda: len(answers) > 1, 60, "answers of m2")
        on_gpu.ollama("POST", "/api/generate", json={"model": M1, "keep_alive": 0})
        report = clear(on_gpu, force=False)
    finally:
        stop.set()
        thread.join()
    assert (report["killed"], report["left"]) == ([], [M2])
    assert set(answers) == {200}


def test_an_idle_one_is_deleted_once_ollama_has_ended_another_runner(
    on_gpu, make_gguf_variant, others
):
    """Until then it neither lists nor unloads any."""
    on_gpu.add_model("m3:latest", make_gguf_variant(3))
    on_gpu.load("m3")
    with unkillable(on_gpu.load(M1)):
        on_gpu.ollama("POST", "/api/generate", json={"model": M1, "keep_alive": 0})
        wait_for(lambda: does_not_list(on_gpu), 30, "an Ollama that waits for its end")
        answer = others.submit(on_gpu.delete, "/api/models/delete", json={"model": "m3"})
        time.sleep(1)
        assert not answer.done()
    answer = answer.result()
    assert (answer.status_code, answer.json()["status"]) == (200, "success")


def test_a_delete_of_an_idle_one_does_not_call_it_busy(on_gpu, make_gguf_variant):
    on_gpu.add_model("m3:latest", make_gguf_variant(3))
    on_gpu.load(M1)
    on_gpu.load("m3")
    on_gpu.ollama("POST", "/api/generate", json={"model": M1, "keep_alive": 0})
    answer = on_gpu.delete("/api/models/delete", json={"model": "m3"})
    assert (answer.status_code, answer.json()["status"]) == (200, "success")
