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
    monkeypatch.setattr(one.server_state, "is_quiet", lambda: True)
    runner = processes.Runner(watch.psutil.Process(), None, "1")
    state = RunnerState(runner, 0.0, STUCK_S)
    state.note(Look(1.0, health="ok", slots=[FRESH]))
    one._states = {runner: state}
    one._cpu_spent(runner.process)
    one.loaded = [{"name": "m:latest"}]
    one.well = True
    one.state = state
    return one


def answer(one):
    one.state.note(Look(3.0, health="ok", slots=[slot()], active=True))


MOVES = {
    "the server works": lambda one: setattr(one.server_state, "is_quiet", lambda: False),
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
    assert resting.nothing_moves()
    move(resting)
    assert not resting.nothing_moves()


def test_a_runner_that_has_ended_is_looked_at(resting, monkeypatch):
    def gone(process):
        raise watch.psutil.NoSuchProcess(process.pid)

    monkeypatch.setattr(watch, "cpu_seconds", gone)
    assert not resting.nothing_moves()


@pytest.mark.parametrize(
    ("cpu_ms", "passed_s", "works"),
    [(0.4, 2, False), (0.6, 2, True), (0.6, 0.1, True), (0.9, 4, False), (1.1, 4, True)],
)
def test_what_it_uses_while_it_waits_is_no_work_however_long_that_was(cpu_ms, passed_s, works):
    assert watch.works(cpu_ms / 1000, passed_s) is works


class Stop(BaseException):
    """The end of what goes on for ever."""


def looks_of(one, monkeypatch, seconds, moves_at):
    """Return when it looks wholly in so many seconds, and when the machine may rest."""
    clock, looked, rested = Clock(), [], []
    clock.rule(monkeypatch, watch)
    began = clock.monotonic()

    def passed():
        return round(clock.monotonic() - began)

    def stop():
        raise Stop

    def look():
        looked.append(passed())
        if one.machine.quiet:
            rested.append(passed())

    monkeypatch.setattr(one, "nothing_moves", lambda: passed() not in moves_at)
    monkeypatch.setattr(one, "look", look)
    clock.after(seconds, stop)
    with pytest.raises(Stop):
        one._run(after_look=bool)
    return looked, rested


def test_where_nothing_moves_for_long_it_looks_one_time_in_two(resting, monkeypatch):
    looked, rested = looks_of(resting, monkeypatch, 21, moves_at=[0])
    assert looked == [0, 2, 4, 8, 12, 16, 20]
    assert rested == [8, 12, 16, 20]


def test_what_moves_ends_the_rest_at_once(resting, monkeypatch):
    looked, rested = looks_of(resting, monkeypatch, 31, moves_at=[0, 14])
    assert looked == [0, 2, 4, 8, 12, 14, 16, 18, 22, 26, 30]
    assert rested == [8, 12, 22, 26, 30]
