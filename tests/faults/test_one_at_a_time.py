"""Clear and reset run one at a time; who comes meanwhile shares what fits."""

import pytest

from helpers.answers import (
    CLEAR,
    GEMMA,
    RESET,
    assert_works,
    clear,
    heal,
    reset,
    stats,
    wait_loaded,
)
from helpers.causes import SMALL, Waiting, at_once, begun, clear_under_way, hung_runner
from helpers.processes import is_gone, suspend


def killed_pids(report):
    return [killed["pid"] for killed in report["killed"]]


@pytest.mark.parametrize("path", [CLEAR, RESET])
def test_twenty_at_once_share_one_run(idle, others, path):
    waiting = hung_runner(idle)
    answers = at_once(idle, others, lambda _, began: heal(idle, path, began), range(20))
    details = [step["detail"] for step in answers[0]["steps"] if step["step"] == "end_runners"]
    assert details == ["1 ended"]
    assert len({str(each) for each in answers}) == 1
    assert waiting.status() == 500
    assert_works(idle)


def test_restarts_at_once_share_one_restart(idle, others):
    restarts = stats(idle)["ollama"]["restarts"]
    hung_runner(idle)  # it is cleared before the restart: so long all have to come
    at_once(idle, others, lambda _, began: heal(idle, RESET, began, restart=True), range(20))
    wait_loaded(idle, GEMMA)
    assert stats(idle)["ollama"]["restarts"] == restarts + 1


def test_clear_and_reset_of_all_sorts_at_once(idle, others):
    hung_runner(idle)
    calls = [
        (CLEAR, {}),
        (RESET, {}),
        (CLEAR, {"force": False}),
        (RESET, {"restart": True}),
        (CLEAR, {"model": GEMMA}),
        (RESET, {"model": GEMMA}),
    ]

    def send(one):
        path, fields = one
        answer = idle.post(path, json=fields)
        assert answer.elapsed.total_seconds() < 5
        return answer.status_code, answer.text

    for status, text in others.map(send, calls * 3):
        assert status == 200, text
    wait_loaded(idle, GEMMA)
    assert_works(idle)


def test_a_clear_during_a_reset_answers_with_the_resets_clearing(idle, others):
    waiting = hung_runner(idle)
    resetting = begun(idle, others, reset, restart=True)
    cleared = clear(idle)
    assert is_gone(waiting.runner)
    assert killed_pids(cleared) == [waiting.runner.pid]
    assert resetting.result()["steps"][: len(cleared["steps"])] == cleared["steps"]
    wait_loaded(idle, GEMMA)


def test_a_reset_during_a_clear_takes_it_as_its_first_step(idle, others):
    waiting = hung_runner(idle)
    clearing = begun(idle, others, clear)
    report = reset(idle)
    cleared = clearing.result()
    assert killed_pids(cleared) == [waiting.runner.pid]
    assert report["steps"][: len(cleared["steps"])] == cleared["steps"]
    assert report["memory"] == cleared["memory"]
    wait_loaded(idle, GEMMA)


def test_a_reset_during_a_clear_of_one_model_clears_all(trio, others):
    hung = hung_runner(trio, "m1:latest")
    other = trio.load("m2")
    clearing = begun(trio, others, clear, model="m1")
    report = reset(trio, model="m3")
    assert clearing.result()["verified"] is True
    assert is_gone(hung.runner) and is_gone(other)
    assert report["model"] == "m3"
    wait_loaded(trio, "m3:latest")


def test_a_clear_of_all_after_one_of_a_model_under_way_clears_all_in_time(trio, others):
    hung, busy = Waiting(trio, "m1:latest"), Waiting(trio, "m2:latest")
    suspend(hung.runner)
    clearing = begun(trio, others, clear, model="m1")
    report = clear(trio)
    assert report["verified"] is True
    assert is_gone(busy.runner)
    clearing.result()


@pytest.mark.parametrize("first, second", [({}, {}), ({"model": "m1"}, {}), ({}, {"model": SMALL})])
def test_a_runner_started_during_another_callers_clear_is_gone_too(trio, others, first, second):
    clearing, new = clear_under_way(trio, others, **first)
    report = clear(trio, **second)
    assert report["verified"] is True and SMALL in report["unloaded_models"]
    assert is_gone(new)
    assert clearing.result()["verified"] is True


def test_a_runner_started_during_another_callers_reset_is_gone_too(trio, others):
    resetting, new = clear_under_way(trio, others, reset)
    assert reset(trio)["model"] == "m1"
    assert is_gone(new)
    resetting.result()
    wait_loaded(trio, "m1:latest")


def test_a_delete_during_another_callers_clear_unloads_first(trio, others):
    clearing, new = clear_under_way(trio, others)
    assert trio.delete(f"/api/models/delete?model={SMALL}&force=true").status_code == 200
    assert is_gone(new)
    clearing.result()


def test_resets_at_once_end_what_was_there_when_they_came_and_no_load_of_theirs(idle, others):
    waiting = hung_runner(idle)
    log = idle.log()
    wishes = [{}, {"model": GEMMA}, {"restart": True}, {"model": GEMMA, "restart": True}]
    reports = at_once(
        idle, others, lambda fields, began: heal(idle, RESET, began, **fields), wishes * 3
    )
    assert idle.log().removeprefix(log).count("ending runner ") == 1
    restarts = {
        str(step) for each in reports for step in each["steps"] if step["step"] == "end_ollama"
    }
    assert len(restarts) == 1  # also one restart is enough for all who asked for one
    assert is_gone(waiting.runner)
    wait_loaded(idle, GEMMA)
    assert_works(idle)
