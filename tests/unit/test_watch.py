"""The watch leaves out every other look where nothing moves."""

import pytest

from helpers.given_time import Clock
from helpers.watches import FRESH, STUCK_S, make_watch, slot
from llm_service import processes, watch
from llm_service.runner_state import Look, RunnerState


@pytest.fixture
def resting(monkeypatch):
    """A watch of one idle runner; ``used`` are the CPU seconds of that."""
    one = make_watch()
    one.used = 1.0
    monkeypatch.setattr(watch, "cpu_seconds", lambda _: one.used)
    monkeypatch.setattr(one.server_state, "_is_quiet", lambda: True)
    runner = processes.Runner(watch.psutil.Process(), None, "1")
    state = RunnerState(runner, 0.0, STUCK_S)
    state.note(Look(1.0, health="ok", slots=[FRESH]))
    one._states = {runner: state}
    one._cpu_spent(runner.process)
    one.loaded = [{"name": "m:latest"}]
    one.server_state._listed = (None, 0.0, one.loaded)
    one.well = True
    one.state = state
    return one


def answer(one):
    one.state.note(Look(3.0, health="ok", slots=[slot()], active=True))


MOVES = {
    "the server works": lambda one: setattr(one.server_state, "_is_quiet", lambda: False),
    "the server has told another": lambda one: setattr(one, "loaded", list(one.loaded)),
    "a runner is dead": lambda one: one.state.note(Look(3.0, health="dead")),
    "a runner works": lambda one: setattr(one, "used", 1.001),
    "a runner has become another": lambda one: setattr(one, "used", 0.5),
    "a runner answers": answer,
    "a runner is silent": lambda one: one.state.note(Look(3.0, health="silent")),
    "somebody waits": lambda one: setattr(one.callers, "report", {"waiting": 1}),
    "a model has no process": lambda one: one.loaded.append({"name": "n:latest"}),
    "a runner has just come": lambda one: one._cpu.clear(),
    "the last look failed": lambda one: setattr(one, "well", False),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_what_moves_is_looked_at(resting, move):
    assert resting.glances() is not None
    move(resting)
    assert resting.glances() is None


def test_a_runner_that_has_ended_is_looked_at(resting, monkeypatch):
    def gone(process):
        raise watch.psutil.NoSuchProcess(process.pid)

    monkeypatch.setattr(watch, "cpu_seconds", gone)
    assert resting.glances() is None


class Stop(BaseException):
    """The end of what goes on for ever."""


def run(one, monkeypatch, seconds, look, **replaced):
    """Have the watch go on for so many seconds; ``look(passed_s)`` stands for its look.

    So do others that are given, for what is called so.
    """
    clock = Clock()
    clock.rule(monkeypatch, watch)
    began = clock.monotonic()

    def passed():
        return round(clock.monotonic() - began)

    def stop():
        raise Stop

    for name, act in {"look": look, **replaced}.items():
        monkeypatch.setattr(one, name, lambda act=act: act(passed()))
    clock.after(seconds, stop)
    with pytest.raises(Stop):
        one._run(after_look=bool)


def looks_of(one, monkeypatch, seconds, moves_at):
    """Return when it looks wholly in so many seconds, and when the machine may rest."""
    looked, rested = [], []

    def look(passed_s):
        looked.append(passed_s)
        if one.machine.quiet:
            rested.append(passed_s)

    def glances(passed_s):
        return None if passed_s in moves_at else {}

    run(one, monkeypatch, seconds, look, glances=glances)
    return looked, rested


def test_where_nothing_moves_for_long_it_looks_one_time_in_two(resting, monkeypatch):
    looked, rested = looks_of(resting, monkeypatch, 21, moves_at=[0])
    assert looked == [0, 2, 4, 8, 12, 16, 20]
    assert rested == [8, 12, 16, 20]


def test_what_moves_ends_the_rest_at_once(resting, monkeypatch):
    looked, rested = looks_of(resting, monkeypatch, 31, moves_at=[0, 14])
    assert looked == [0, 2, 4, 8, 12, 14, 16, 18, 22, 26, 30]
    assert rested == [8, 12, 22, 26, 30]


def test_what_two_seconds_take_tells_work_from_rest_also_in_a_pause(resting, monkeypatch):
    """A decode loop that stands leaves a request little to do, and it is to be asked."""
    active = []

    def used(_process):
        passed_s = watch.time.monotonic() - began
        return 0.00015 * passed_s + 0.0003 * (passed_s > 11)

    def look(passed_s):
        if resting._glance(resting.state, None).active:
            active.append(passed_s)

    began = watch.time.monotonic()
    monkeypatch.setattr(watch, "cpu_seconds", used)
    resting._cpu_spent(resting.state.process)
    run(resting, monkeypatch, 25, look)
    assert active == [12]
