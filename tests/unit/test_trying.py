"""A try: one at a time, its limit, its errors, and a listener who leaves at any moment."""

import contextlib
import json
import threading

import pytest

from helpers.fake_ollama import FakeOllama, chunked, http, ndjson, never
from helpers.ports import free_port
from helpers.waiting import wait_for
from llm_service.errors import ServiceError
from llm_service.trying import TOKENS_MOST, Trials
from ollama_client import Ollama

GENERATE = "/api/generate"


@pytest.fixture
def fake():
    with FakeOllama({}) as one:
        yield one


@pytest.fixture
def make_trials(fake):
    """Makes trials of an Ollama that answers so."""

    def make(answer, **limits):
        fake.routes[GENERATE] = answer
        return Trials(Ollama(fake.url), **limits)

    return make


LINES = [{"model": "m", "response": "a", "done": False}, {"model": "m", "done": True}]


def test_ollamas_lines_are_passed_on(fake, make_trials):
    trial = make_trials(ndjson(*LINES)).start("m", "Why?")
    assert list(trial.lines(30)) == LINES
    trial.close()
    ((method, path, body),) = fake.calls
    asked = {"model": "m", "prompt": "Why?", "options": {"num_predict": TOKENS_MOST}}
    assert (method, path, json.loads(body)) == ("POST", GENERATE, asked)


def test_one_at_a_time_and_the_next_after_a_close(make_trials):
    trials = make_trials(never)
    first = trials.start("m", "a")
    with pytest.raises(ServiceError) as refused:
        trials.start("m", "a")
    assert refused.value.code == "try_under_way"
    first.close()
    first.close()  # which lets no two others in
    second = trials.start("m", "a")
    with pytest.raises(ServiceError):
        trials.start("m", "a")
    second.close()


@pytest.mark.parametrize(
    "answer, code",
    [
        (http('{"error": "model \'m\' not found"}', 404), "model_not_found"),
        (http("<html>", 502), "bad_answer"),
        (ndjson([1]), "bad_answer"),
        (chunked(b'{"model": "m", "resp', end=False), "bad_answer"),
        (http('{"error": "\\"m\\" does not support generate"}', 400), "ollama_error"),
    ],
    ids=["unknown", "no json", "no object", "cut off", "embedding"],
)
def test_an_early_error_is_raised(make_trials, answer, code):
    trial = make_trials(answer).start("m", "a")
    with pytest.raises(ServiceError) as error:
        trial.lines(30)
    assert error.value.code == code


def test_an_ollama_that_is_away_is_told():
    trials = Trials(Ollama(f"http://127.0.0.1:{free_port()}"))
    with pytest.raises(ServiceError) as error:
        trials.start("m", "a").lines(30)
    assert error.value.code == "ollama_unreachable"


def test_a_late_error_is_the_last_line(make_trials):
    late = ndjson(LINES[0], {"error": "CUDA error: out of memory"})
    trial = make_trials(late).start("m", "a")
    *lines, last = trial.lines(30)
    assert lines == LINES[:1] and last["code"] == "out_of_memory"
    trial.close()


@pytest.mark.parametrize(
    "answer", [ndjson(LINES[0]), chunked(json.dumps(LINES[0]).encode() + b"\n", end=False)]
)
def test_an_answer_without_its_end_is_an_error(make_trials, answer):
    trial = make_trials(answer).start("m", "a")
    *lines, last = trial.lines(30)
    assert lines == LINES[:1] and last["code"] == "ollama_unreachable"
    trial.close()


def test_while_ollama_is_silent_there_are_empty_pieces_until_the_limit(make_trials):
    trial = make_trials(never, limit_s=2).start("m", "a")
    *beats, last = trial.lines(0.1)
    assert beats and all(beat == {"model": "m", "response": "", "done": False} for beat in beats)
    assert last["code"] == "timeout"
    trial.close()


def without_end(sock):
    with contextlib.suppress(OSError):
        sock.sendall(ndjson(LINES[0]))
        while sock.sendall(json.dumps(LINES[0]).encode() + b"\n") is None:
            pass


@pytest.mark.parametrize("answer", [never, without_end])
def test_a_close_ends_the_connection_at_any_moment(fake, make_trials, answer):
    trial = make_trials(answer).start("m", "a")
    wait_for(lambda: fake.calls, 30, "the question")
    trial.close()
    readers = lambda: [t for t in threading.enumerate() if t.name == "try"]  # noqa: E731
    wait_for(lambda: not readers(), 30, "the end of the reader")


def test_the_end_of_the_service_ends_it(make_trials):
    trials = make_trials(never)
    trials.close()  # with none under way
    trial = trials.start("m", "a")
    trials.close()
    with pytest.raises(ServiceError) as error:
        list(trial.lines(30))
    assert error.value.code == "shutting_down"
