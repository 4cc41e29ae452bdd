"""A restart within a reset: which server is ended, and how long the next one may take to come."""

import os
import time

import psutil
import pytest

from helpers.given_time import Clock
from llm_service import session as session_module
from llm_service.callers import Callers
from llm_service.downloads import Downloads
from llm_service.errors import ServiceError, TimedOut
from llm_service.machine import Machine
from llm_service.matching import Matching
from llm_service.processes import Processes
from llm_service.reports import Steps
from llm_service.session import Session
from llm_service.store import Store
from llm_service.watch import Watch
from ollama_client import Ollama


class Place:
    """A session whose server is what a test says.

    .server()       the server, to be replaced
    .ended          those that were told to end
    .asked()        called at each question to it, none of which it answers
    """

    def __init__(self, monkeypatch):
        self.old, self.new = psutil.Process(), psutil.Process(os.getppid())
        self.server = lambda: self.old
        self.asked = lambda: None
        self.ended = []
        ollama, store = Ollama("http://127.0.0.1:9"), Store("/nonexistent")
        found = Processes(os.devnull)
        monkeypatch.setattr(found, "server", lambda: self.server())
        monkeypatch.setattr(found, "end_server", self._end)
        monkeypatch.setattr(ollama, "version", self._version)
        downloads = Downloads(ollama, store, found, 1)
        machine = Machine(store, downloads, Matching(ollama, store.manifests, found))
        self.watch = Watch(ollama, store, found, machine, Callers(9, 60, works=bool), 60)
        self.watch.server_state.note_answer(self.old)
        self.session = Session(self.watch, downloads, default_model="none")

    def _end(self, *_):
        self.ended.append(self.server())
        return True

    def _version(self, *_):
        self.asked()
        raise TimedOut("ollama_timeout", "no answer")

    def told(self, steps):
        return {step["step"]: step["ok"] for step in steps}


@pytest.fixture
def place(monkeypatch):
    return Place(monkeypatch)


def test_a_new_server_that_comes_late_is_no_failure(place):
    """Where others have the CPU, the launcher may take longer than a reset waits for answers."""
    deadline = time.monotonic() + session_module.ANSWERS_S + 0.5

    def server():
        return place.new if time.monotonic() > deadline + 0.1 else place.old

    place.server = server
    steps = Steps()
    assert place.session.restart(steps, deadline, 0) == ""
    assert place.told(steps) == {"end_ollama": True, "start_ollama": True}


def test_a_server_that_does_not_come_is_told(place):
    steps = Steps()
    assert place.session.restart(steps, time.monotonic(), 0) == "restart_service"
    assert place.told(steps) == {"end_ollama": True, "start_ollama": False}


def test_where_there_was_no_server_none_is_waited_for_beyond_the_time(place, monkeypatch):
    """That none comes is no failure there, and those who share this reset have less time."""
    place.server = lambda: None
    clock = Clock()
    clock.rule(monkeypatch, session_module)
    deadline = clock.monotonic() + 3
    place.session.restart(Steps(), deadline, 0)
    assert clock.monotonic() == deadline


@pytest.mark.parametrize("dead", [False, True])
def test_a_server_that_came_while_the_one_before_was_asked_is_left_alone(place, dead):
    if dead:
        place.server = lambda: None

    def another_comes():
        place.server = lambda: place.new

    place.asked = another_comes
    steps = Steps()
    place.session._restart_if_due(None, False, time.monotonic() + 0.1, steps)
    assert place.ended == []
    assert place.told(steps)["start_ollama"] is True


def test_one_that_does_not_answer_is_ended(place):
    def end(*_):
        place.ended.append(place.server())
        place.server = lambda: place.new
        return True

    place.watch.processes.end_server = end
    steps = Steps()
    place.session._restart_if_due(None, False, time.monotonic() + 0.1, steps)
    assert place.ended == [place.old]
    assert place.told(steps)["start_ollama"] is True


def test_one_that_has_gone_while_it_was_asked_is_waited_for(place):
    def it_goes():
        place.server = lambda: None

    place.asked = it_goes
    steps = Steps()
    with pytest.raises(ServiceError, match="no new one has come"):
        place.session._restart_if_due(None, False, time.monotonic() + 0.1, steps)
    assert place.told(steps)["start_ollama"] is False
