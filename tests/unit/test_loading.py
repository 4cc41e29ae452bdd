"""Loads in the background."""

import threading

import pytest

from helpers.waiting import wait_for
from llm_service.errors import ServiceError, Unreachable
from llm_service.loading import Loader


class Ollama:
    """Loads what it is asked for once it is let; raises what is next in ``errors``."""

    def __init__(self):
        self.url = "http://127.0.0.1:9"
        self.loads, self.errors, self.is_own = [], [], True
        self.go_on = threading.Event()
        self.go_on.set()

    def check(self):
        if not self.is_own:
            raise Unreachable("ollama_unreachable", "another's")

    def request(self, _url, model, *_):
        return Request(self, model)


class Request:
    """One request to load; .closed once it was taken back."""

    def __init__(self, ollama, model):
        self.ollama, self.model, self.closed = ollama, model, False

    def __iter__(self):
        self.ollama.loads.append(self.model)
        self.ollama.go_on.wait(60)
        if self.closed:
            raise ServiceError("shutting_down", "closed")
        if self.ollama.errors:
            raise self.ollama.errors.pop(0)
        yield {"done": True}

    def close(self):
        self.closed = True
        self.ollama.go_on.set()


@pytest.fixture
def ollama():
    return Ollama()


def make(ollama, answers=lambda: True, retries_s=(0.01, 0.01)):
    return Loader(ollama, answers, retries_s, ollama.request)


def test_a_load_that_ends_at_once_is_loaded(ollama):
    loader = make(ollama)
    assert loader.order("m", 30) == "loaded"
    assert loader.load == {"model": "m", "state": "loaded", "error": None, "code": None}


def test_a_load_that_fails_is_tried_again(ollama):
    ollama.errors = [Unreachable("ollama_unreachable", "gone"), ServiceError("ollama_error", "x")]
    loader = make(ollama)
    assert loader.order("m", 30) == "loaded"
    assert ollama.loads == ["m"] * 3


def test_after_the_last_try_it_has_failed_with_its_reason(ollama):
    ollama.errors = [ServiceError("ollama_error", f"try {n}") for n in range(9)]
    loader = make(ollama)
    loader.order("m", 30)
    wait_for(lambda: loader.load["state"] == "failed", 30, "the last try")
    assert (ollama.loads, loader.load["error"]) == (["m"] * 3, "try 2")


def test_another_on_its_port_is_not_asked_to_load(ollama):
    ollama.is_own = False
    loader = make(ollama)
    loader.order("m", 30)
    wait_for(lambda: loader.load["state"] == "failed", 30, "the last try")
    assert (ollama.loads, loader.load["code"]) == ([], "ollama_unreachable")


def test_where_no_other_try_would_help_there_is_none(ollama):
    ollama.errors = [ServiceError("model_not_found", "none")]
    loader = make(ollama)
    loader.order("m", 30)
    wait_for(lambda: loader.load["state"] == "failed", 30, "failed")
    assert ollama.loads == ["m"]


def test_it_waits_for_a_server_that_starts(ollama):
    starts = iter([False, False, True])
    loader = make(ollama, lambda: next(starts))
    assert loader.order("m", 30) == "loaded"


def test_a_newer_order_replaces_one_that_waits(ollama):
    ready = threading.Event()
    loader = make(ollama, ready.is_set)
    assert loader.order("old", 0) == "loading"
    old = loader.load
    loader.order("new", 0)
    ready.set()
    wait_for(lambda: loader.load["state"] == "loaded", 30, "the new one")
    assert ollama.loads == ["new"] and old["state"] == "cancelled"


def test_what_a_clear_ends_is_no_failure_and_is_not_tried_again(ollama):
    ollama.go_on.clear()
    ollama.errors = [ServiceError("ollama_error", "the runner was ended")]
    loader = make(ollama)
    loader.order("m", 0)
    wait_for(lambda: ollama.loads, 30, "the load")
    loader.cancel_for("other")
    assert loader.load["state"] == "loading"
    loader.cancel_for("m:latest")  # which takes the request back
    wait_for(lambda: not [t for t in threading.enumerate() if t.name == "load m"], 30, "its end")
    assert (loader.load["state"], ollama.loads) == ("cancelled", ["m"])


def test_a_newer_order_takes_the_request_of_the_older_one_back(ollama):
    ollama.go_on.clear()
    loader = make(ollama)
    loader.order("old", 0)
    wait_for(lambda: ollama.loads, 30, "the load")
    assert loader.order("new", 30) == "loaded"
    assert ollama.loads == ["old", "new"]


def test_a_bug_is_a_load_that_has_failed(ollama):
    ollama.errors = [KeyError("done")]
    loader = make(ollama)
    loader.order("m", 30)
    wait_for(lambda: loader.load["state"] == "failed", 30, "failed")
    assert loader.load["error"] == "KeyError('done')"
