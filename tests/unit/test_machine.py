"""The machine is read beside the watch."""

import os
import threading

import pytest

from helpers.waiting import wait_for
from llm_service import machine as module
from llm_service.callers import Callers
from llm_service.downloads import Downloads
from llm_service.machine import Machine
from llm_service.matching import Matching
from llm_service.processes import Processes
from llm_service.store import Store
from llm_service.watch import Watch
from ollama_client import Ollama


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A machine and a watch of a store; ``go_on`` lets the disk answer."""
    monkeypatch.setattr(module, "LOOK_S", 0.02)
    monkeypatch.setattr(module, "SLOW_S", 0.05)
    ollama, processes, store = Ollama("http://127.0.0.1:9"), Processes(os.devnull), Store(tmp_path)
    matching = Matching(ollama, store.manifests, processes)
    one = Machine(store, Downloads(ollama, store, processes, 1), matching)
    one.watch = Watch(ollama, store, processes, one, Callers(9, 1, bool), stuck_s=1)
    one.go_on = threading.Event()
    one.store = store
    yield one
    one.go_on.set()


def test_a_disk_that_does_not_answer_holds_up_no_look_at_the_runners(place, monkeypatch):
    for name in ("models", "free_bytes", "disk", "writable", "signature", "changed_ns"):
        monkeypatch.setattr(place.store, name, lambda: place.go_on.wait(30))
    place.start()
    wait_for(place.store_is_slow, 30, "the look is slow")
    looked_at = place.watch.looked_at
    place.watch.look()
    assert place.watch.looked_at > looked_at
    place.go_on.set()
    wait_for(lambda: not place.store_is_slow(), 30, "the disk answers")


def test_a_disk_that_does_not_answer_holds_up_no_figure_of_the_gpu(place, monkeypatch):
    monkeypatch.setattr(place.store, "models", lambda: place.go_on.wait(30))
    readings = iter(range(10**6))
    monkeypatch.setattr("gpu.sample", lambda: {"state": "ok", "gpus": [], "n": next(readings)})
    place.start()
    wait_for(place.store_is_slow, 30, "the look is slow")
    wait_for(lambda: place.gpu["n"] > 3, 30, "the GPU is read on")


def test_a_bug_of_a_look_ends_no_looking(place, monkeypatch, caplog):
    errors = iter([TypeError("a bug")])

    def models():
        for error in errors:
            raise error
        return {"m:latest": []}

    monkeypatch.setattr(place.store, "models", models)
    place.start()
    wait_for(lambda: place.models, 30, "the next look")
    assert "TypeError: a bug" in caplog.text


@pytest.mark.parametrize("states", [["lost"] * 2 + ["ok", "lost"], ["ok"] * 4])
def test_a_gpu_that_is_lost_now_and_then_is_not_lost(place, monkeypatch, states):
    for state in states:
        monkeypatch.setattr("gpu.sample", lambda state=state: {"state": state, "gpus": []})
        place.measure()
        assert not place.gpu_is_lost()


def test_a_gpu_that_stays_lost_is_lost(place, monkeypatch):
    monkeypatch.setattr("gpu.sample", lambda: {"state": "lost", "gpus": []})
    for _ in range(3):
        place.measure()
    assert place.gpu_is_lost()


@pytest.mark.parametrize(
    ("state", "action"), [("lost", "restart_service"), ("driver_mismatch", "reboot_host")]
)
def test_one_bad_answer_of_a_gpu_restarts_and_reboots_nothing(place, monkeypatch, state, action):
    advised = []
    for said in (state, "ok", state, state, state):
        monkeypatch.setattr("gpu.sample", lambda said=said: {"state": said, "gpus": []})
        place.measure()
        advised.append(place.gpu_action())
    assert advised == ["wait", "none", "wait", "wait", action]


@pytest.mark.parametrize(
    ("quiet", "same_looks", "times"), [(True, 3, 2), (False, 3, 1), (True, 2, 1)]
)
def test_it_rests_with_the_watch_once_the_gpus_state_counts(place, quiet, same_looks, times):
    place.quiet = quiet
    place._same_looks = same_looks
    assert place.pause_s() == times * module.LOOK_S
