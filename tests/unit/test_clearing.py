"""What a sparing clear says of a runner that is still there after the wait."""

import time

import psutil
import pytest

import app
from ollama_client import Runner, ServiceError

NAME = "m:latest"


@pytest.fixture
def clearing(monkeypatch):
    """Factory: the report of a sparing clear of one runner that does not go in time."""
    runner = Runner(psutil.Process(), None, "1")

    def make(slots, accepts=True):
        def unload(*_):
            if not accepts:
                raise ServiceError("ollama_error", "no")

        monkeypatch.setattr(app, "UNLOAD_WAIT_S", 0.05)
        monkeypatch.setattr(app.watch, "known_runners", lambda: [runner])
        monkeypatch.setattr(app.processes, "runners", lambda: [runner])
        monkeypatch.setattr(app.ollama, "ps", lambda *_: [{"name": NAME}])
        monkeypatch.setattr(app.ollama, "unload", unload)
        monkeypatch.setattr(app.ollama, "runner_slots", lambda *_: slots)
        return app.Clearing(None, False, time.monotonic() + 3).run()

    return make


def test_an_idle_one_is_about_to_be_unloaded_and_not_busy(clearing):
    # Ollama unloads one after another, and waits for the memory of each for some seconds.
    report = clearing([{"is_processing": False}])
    assert (report["left"], report["unloaded_models"]) == ([], [NAME])
    assert report["verified"] is False


@pytest.mark.parametrize("slots", [[{"is_processing": True}], None])
def test_a_busy_one_or_one_that_does_not_tell_is_left_and_named(clearing, slots):
    report = clearing(slots)
    assert (report["left"], report["unloaded_models"]) == ([NAME], [])


def test_an_idle_one_that_ollama_does_not_unload_is_left_and_named(clearing):
    report = clearing([{"is_processing": False}], accepts=False)
    assert (report["left"], report["unloaded_models"]) == ([NAME], [])
