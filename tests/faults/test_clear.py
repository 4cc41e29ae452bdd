"""Clear against stopped, busy, idle and orphaned runners."""

import threading
import time
from pathlib import Path

import pytest

from helpers.answers import (
    CLEAR,
    GEMMA,
    RESET,
    ask,
    clear,
    heal,
    stats,
    wait_loaded,
)
from helpers.causes import (
    SMALL,
    Waiting,
    begun,
    clear_under_way,
    hung_runner,
    ollama_dead,
    ollama_hung,
)
from helpers.frozen import unkillable
from helpers.generation import Generation
from helpers.models import manifest_path
from helpers.processes import is_gone, suspend
from helpers.raw import dial
from helpers.waiting import wait_for
from llm_service.processes import is_ending

# On two busy cores a busy runner that answers late would be hung.
PATIENT = {"llm_service.clearing.CLEAR_RUNNER_S": 0.5}


@pytest.fixture(scope="module")
def module_service(make_module_service, gguf):
    return make_module_service(
        models={GEMMA: gguf}, LLM_MODEL=GEMMA, LLM_CONTEXT_LENGTH=4096, constants=PATIENT
    )


@pytest.fixture
def trio(make_trio):
    return make_trio(constants=PATIENT)


def own_mb(process):
    """Return what it holds beside the model's file, whose pages stay in the page cache."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) >> 10


# One runner


@pytest.mark.parametrize("path", [CLEAR, RESET])
def test_a_runner_stopped_in_mid_answer_is_ended_and_its_caller_told(idle, path):
    waiting = hung_runner(idle)
    report = heal(idle, path)
    assert is_gone(waiting.runner)
    assert waiting.status() == 500
    if path == CLEAR:
        pid = waiting.runner.pid
        assert report["killed"] == [{"pid": pid, "model": GEMMA, "reason": "hung"}]
        assert report["unloaded_models"] == [GEMMA]
        assert report["verified"] is True
    else:
        wait_loaded(idle, GEMMA)
    ask(idle)


def test_a_busy_runner_is_ended_by_default_and_its_caller_told(idle):
    waiting = Waiting(idle)
    report = clear(idle)
    pid = waiting.runner.pid
    assert report["killed"] == [{"pid": pid, "model": GEMMA, "reason": "busy"}]
    assert report["verified"] is True
    assert is_gone(waiting.runner)
    assert waiting.status() == 500
    (wait,) = [step for step in report["steps"] if step["step"] == "wait"]
    assert 1 < wait["seconds"] < 2
    ask(idle)


@pytest.mark.parametrize("fields", [{}, {"model": GEMMA}, {"name": "Gemma"}])
def test_without_force_a_busy_runner_goes_on_and_is_named(idle, fields):
    busy = idle.generate(GEMMA)
    (runner,) = idle.runners()
    report = clear(idle, force=False, **fields)
    assert (report["killed"], report["unloaded_models"], report["verified"]) == ([], [], False)
    assert GEMMA in report["message"]
    assert not is_gone(runner)
    busy.goes_on()
    busy.close()


def test_a_runner_that_ends_its_answer_in_time_is_not_killed(idle):
    # On a machine that has other things to do, three tokens can take longer than a clear waits.
    for _ in range(3):
        idle.load(GEMMA)
        busy = Generation(idle.ollama_port, GEMMA, num_predict=4)
        wait_for(lambda one=busy: one.tokens, 60, "the first token")
        report = clear(idle)
        if not report["killed"]:
            break
    assert (report["killed"], report["unloaded_models"], report["verified"]) == ([], [GEMMA], True)
    assert busy.wait(30).error is None


def test_a_model_deleted_in_the_middle_of_its_clear_is_no_bug(idle, gguf, others):
    idle.add_model("going:latest", gguf)
    busy = idle.generate(GEMMA)
    first = begun(idle, others, clear, force=False)  # which waits for the busy one
    second = others.submit(idle.post, CLEAR, json={"model": "going"})  # waits for its turn
    time.sleep(0.7)  # it shall have come
    assert not first.done()
    manifest_path(idle.models, "going:latest").unlink()
    assert second.result().status_code == 200
    assert first.result()["left"] == [GEMMA]
    busy.close()


def test_an_idle_model_goes_without_a_kill(idle):
    runner = idle.load(GEMMA)
    report = clear(idle)
    assert (report["killed"], report["unloaded_models"], report["verified"]) == ([], [GEMMA], True)
    assert is_gone(runner)
    assert idle.runners() == []


def test_an_idle_runner_that_is_stopped_goes_too(idle):
    runner = idle.load(GEMMA)
    suspend(runner)
    assert clear(idle)["unloaded_models"] == [GEMMA]
    assert is_gone(runner)


def test_with_nothing_loaded_it_is_a_success(idle):
    report = clear(idle)
    assert (report["killed"], report["unloaded_models"], report["verified"]) == ([], [], True)
    assert report["memory"]["freed_mb"] == 0


def test_it_ends_an_orphan(idle):
    orphan = idle.load(GEMMA)
    with ollama_dead(idle):
        assert not is_gone(orphan)
        wait_for(
            lambda: [runner["state"] for runner in stats(idle)["runners"]] == ["orphan"],
            30,
            "the watch sees the orphan",
        )
        report = clear(idle)
        assert report["killed"] == [{"pid": orphan.pid, "model": GEMMA, "reason": "orphan"}]
        assert report["verified"] and report["unloaded_models"] == [GEMMA]
        assert is_gone(orphan)


def test_a_caller_who_leaves_does_not_stop_it(idle):
    waiting = hung_runner(idle)
    with dial(idle) as sock:
        head = f"POST {CLEAR} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n"
        sock.sendall(head.encode())
        time.sleep(0.2)  # it shall be under way
    # Sooner than the watch would end it: a runner is silent after ten seconds.
    wait_for(lambda: is_gone(waiting.runner), 8, "the runner is ended all the same")


def test_a_runner_that_takes_its_time_to_die_is_no_failure(idle, others):
    """As one of 40 GB does. Within the time of a clear it has gone."""
    runner = idle.load(GEMMA)
    with ollama_hung(idle):
        with unkillable(runner):
            clearing = others.submit(clear, idle)
            wait_for(lambda: is_ending(runner), 30, "the signal")
            time.sleep(1.8)
        assert clearing.result()["verified"] is True
    assert is_gone(runner)


@pytest.mark.parametrize("path", [CLEAR, RESET])
@pytest.mark.parametrize("stopped", [False, True])
def test_the_memory_that_came_free_is_measured(idle, path, stopped):
    seen = []
    # The rest of the machine may take as much in the same moment.
    for _ in range(5):
        clear(idle)
        waiting = Waiting(idle)
        held_mb = own_mb(waiting.runner)
        if stopped:
            suspend(waiting.runner)
        memory = heal(idle, path)["memory"]
        assert memory["source"] == "system"
        assert memory["freed_mb"] == max(0, memory["before_mb"] - memory["after_mb"])
        seen.append(memory["freed_mb"])
        if held_mb / 4 < seen[-1] < held_mb * 2:
            return
    raise AssertionError(f"a runner with {held_mb} MB of its own was ended; came free: {seen}")


def test_it_is_verified_while_a_client_keeps_asking(idle, others):
    enough = threading.Event()
    body = {"model": GEMMA, "prompt": "1 2", "stream": False, "options": {"num_predict": 5}}

    def keep_asking():
        while not enough.is_set():
            idle.ollama("POST", "/api/generate", json=body)

    asking = [others.submit(keep_asking) for _ in range(2)]
    idle.load(GEMMA)
    try:
        for _ in range(6):
            there = {runner.pid for runner in idle.runners()}
            report = clear(idle)
            assert report["verified"] is True
            assert not there & {runner.pid for runner in idle.runners()}
            assert not there & {new["pid"] for new in report["new_runners"]}
            wait_for(idle.runners, 60, "the client's next runner")
    finally:
        enough.set()
    for each in asking:
        each.result()


# Several models


def test_several_models_unload_side_by_side(trio):
    runners = [trio.load(f"m{n}") for n in (1, 2, 3)]
    assert len(trio.runners()) == 3
    report = clear(trio)
    assert (report["killed"], report["verified"]) == ([], True)
    assert report["unloaded_models"] == ["m1:latest", "m2:latest", "m3:latest"]
    assert all(map(is_gone, runners))


def test_hung_busy_and_idle_ones_at_once_are_cleared_in_time(trio):
    hung, busy = Waiting(trio, "m1:latest"), Waiting(trio, "m2:latest")
    idle_one = trio.load("m3")
    suspend(hung.runner)
    report = clear(trio)
    killed = {each["pid"]: (each["model"], each["reason"]) for each in report["killed"]}
    assert killed == {
        hung.runner.pid: ("m1:latest", "hung"),
        busy.runner.pid: ("m2:latest", "busy"),
    }
    assert report["verified"] and len(report["unloaded_models"]) == 3
    assert (hung.status(), busy.status()) == (500, 500)
    assert is_gone(idle_one)


def test_clearing_one_model_leaves_the_others(trio):
    one, two = trio.load("m1"), Waiting(trio, "m2:latest")
    report = clear(trio, model="m1")
    assert (report["unloaded_models"], report["verified"]) == (["m1:latest"], True)
    assert is_gone(one)
    assert not is_gone(two.runner) and two.answer is None
    suspend(two.runner)
    three = trio.load("m3")
    assert [killed["reason"] for killed in clear(trio, name="M2:latest")["killed"]] == ["hung"]
    assert not is_gone(three)


def test_runners_that_others_start_meanwhile_are_told_apart(trio, others):
    clearing, new = clear_under_way(trio, others)
    report = clearing.result()
    assert report["verified"] is True
    assert report["new_runners"] == [{"pid": new.pid, "model": SMALL}]
    assert report["unloaded_models"] == ["m1:latest"]
    assert not is_gone(new)
