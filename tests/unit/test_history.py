"""The last hour: what is kept of it, for how long, and how much memory that takes."""

import sys

import pytest

from llm_service.history import GPUS_KEPT, MARKS_KEPT, History

HOUR = 360  # samples


class Machine:
    """Figures, and clocks that a test turns."""

    def __init__(self, gpus=0):
        self.now, self.wall = 1000.0, 1_800_000_000.0
        gpu = {"utilization_percent": 12, "memory_used_mb": 70_000}
        self.stats = {
            "cpu_percent": 7.5,
            "memory": {"used_mb": 2276},
            "runners": [],
            "gpus": [dict(gpu) for _ in range(gpus)],
            "healed": {"last": None},
            "ollama": {"pid": 1, "uptime_seconds": 50},
            "callers": {"waiting": 2},
        }
        self.history = History(lambda: self.stats, lambda: self.now, lambda: self.wall)

    def pass_by(self, samples=1):
        for _ in range(samples):
            self.now += 10
            self.wall += 10
            self.history.take()

    def answer(self, since=0):
        return self.history.answer(since)

    def marks(self):
        return [(mark["kind"], mark["at"]) for mark in self.answer()["marks"]]


@pytest.fixture
def machine():
    return Machine()


def test_a_sample_has_a_value_for_each_series():
    machine = Machine(gpus=2)
    runner = {"tokens_per_second": 30.5}
    machine.stats["runners"] = [
        {**runner, "state": "busy"},
        {**runner, "state": "busy"},
        {**runner, "state": "stuck"},
    ]
    machine.stats["gpus"][1]["utilization_percent"] = None
    machine.pass_by()
    answer = machine.answer()
    named = dict(zip(["at", *answer["series"]], answer["samples"][0], strict=True))
    assert named == {
        "at": 1_800_000_010,
        "cpu_percent": 7.5,
        "memory_mb": 2276,
        "tokens_per_second": 61,
        "waiting": 2,
        "gpu0_percent": 12,
        "gpu0_memory_mb": 70_000,
        "gpu1_percent": None,
        "gpu1_memory_mb": 70_000,
    }


def test_an_hour_is_kept_and_no_more(machine):
    machine.pass_by(HOUR + 7)
    samples = machine.answer()["samples"]
    assert len(samples) == HOUR
    assert samples[-1][0] - samples[0][0] == 3590


def test_who_asks_again_gets_only_what_is_new(machine):
    machine.pass_by(5)
    first = machine.answer()
    assert first["complete"] and len(first["samples"]) == 5
    again = machine.answer(first["next"])
    assert not again["complete"] and again["samples"] == []
    machine.pass_by(2)
    again = machine.answer(first["next"])
    assert not again["complete"] and len(again["samples"]) == 2


@pytest.mark.parametrize("since", [1, 9_999_999_999], ids=["long ago", "of another service"])
def test_who_has_missed_something_gets_all(machine, since):
    machine.pass_by(5)
    answer = machine.answer(since)
    assert answer["complete"] and len(answer["samples"]) == 5


def test_a_clock_that_jumps_leaves_the_distances(machine):
    machine.pass_by(3)
    machine.history.mark("cleared")
    machine.wall += 40_000_000
    machine.pass_by(3)
    answer = machine.answer()
    times = [sample[0] for sample in answer["samples"]]
    assert [b - a for a, b in zip(times, times[1:], strict=False)] == [10] * 5
    assert times[-1] == round(machine.wall)
    assert len(answer["marks"]) == 1


def test_a_gpu_that_comes_later_was_not_known_before(machine):
    machine.pass_by()
    machine.stats["gpus"] = [{"utilization_percent": 1, "memory_used_mb": 2}]
    machine.pass_by()
    machine.stats["gpus"] = []
    machine.pass_by()
    samples = machine.answer()["samples"]
    assert [sample[-2:] for sample in samples] == [[None, None], [1, 2], [None, None]]


def test_what_happened_is_marked_once_and_for_an_hour(machine):
    machine.pass_by()
    machine.history.mark("cleared", freed_mb=300)
    machine.stats["healed"]["last"] = {
        "at": "then",
        "what": "llama",
        "freed_mb": 5,
        "evidence": "x",
    }
    machine.pass_by()
    machine.stats["ollama"] = {"pid": None, "uptime_seconds": None}
    machine.pass_by()
    machine.stats["ollama"] = {"pid": 2, "uptime_seconds": 4}
    machine.pass_by(2)
    kinds = [kind for kind, _ in machine.marks()]
    assert kinds == ["restarted", "healed", "cleared"]  # the newest first
    healed = machine.answer()["marks"][1]
    assert healed == {"at": healed["at"], "kind": "healed", "what": "llama", "freed_mb": 5}
    machine.pass_by(HOUR)
    assert machine.marks() == []


def test_what_was_before_the_service_is_no_event(machine):
    machine.stats["healed"]["last"] = {"at": "then", "what": "llama"}
    machine.pass_by()
    assert [kind for kind, _ in machine.marks()] == ["healed"]  # it is of this service's life
    machine.pass_by()
    assert len(machine.marks()) == 1


def test_an_hour_of_sixteen_gpus_takes_less_than_100_kib():
    machine = Machine(gpus=GPUS_KEPT + 2)
    machine.pass_by(HOUR)
    for _ in range(MARKS_KEPT + 5):
        machine.history.mark("healed", what="a" * 80, why="b" * 80, freed_mb=5)
    assert weight(vars(machine.history)) < 100 * 1024


def weight(value, seen=None):
    """Return the bytes of an object and of what it holds, but for functions and locks."""
    seen = set() if seen is None else seen
    if id(value) in seen or callable(value):
        return 0
    seen.add(id(value))
    held = [*value.keys(), *value.values()] if isinstance(value, dict) else value
    inner = 0
    if not isinstance(value, (str, bytes)) and hasattr(held, "__iter__"):
        inner = sum(weight(each, seen) for each in held)
    return sys.getsizeof(value) + inner
