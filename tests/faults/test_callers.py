"""Who waits for Ollama in vain, on a real Ollama and on one that never answers some requests."""

import threading
import time

import pytest

from helpers.answers import GEMMA, reset, stats, wait_looks
from helpers.deaf_ollama import stand_in
from helpers.generation import ENDLESS, PROMPT
from helpers.impatient import STUCK_S, VERDICT_S, health, impatient
from helpers.waiting import call, wait_for


class Caller:
    """Somebody who waits for an answer: .status once he has it, 0 if he was cut off."""

    def __init__(self, service, path="/api/generate", **body):
        self.status = None
        url = service.ollama_url + path
        threading.Thread(target=self._run, args=(url, body), daemon=True).start()

    def _run(self, url, body):
        try:
            self.status = call("POST", url, json=body, timeout=600).status_code
        except OSError:
            self.status = 0


def generating(service, num_ctx, **fields):
    options = {**ENDLESS, "num_predict": 5, "num_ctx": num_ctx}
    body = {"model": GEMMA, "prompt": PROMPT, "raw": True, "options": options}
    return Caller(service, **body, **fields)


def waiting(service):
    callers = stats(service)["callers"]  # None before the first look
    return callers and callers["waiting"]


class Starved:
    """A scheduler that waits for ever, as soon as .first has left.

    The runner is to be reloaded for .last once it is idle; by who comes meanwhile and wants to
    keep it the scheduler misses that.
    """

    def __init__(self, service):
        self.first = service.generate(GEMMA, num_ctx=1024)
        self.last = generating(service, num_ctx=2048)
        wait_for(lambda: waiting(service) == 1, 60, "one waits")
        # So far the kernel has seen the request. The scheduler must have, before the next comes.
        wait_looks(service, 1)
        self.second = generating(service, num_ctx=1024, keep_alive=-1)
        wait_for(lambda: waiting(service) == 2, 60, "two wait")
        # The same, before the first leaves.
        wait_looks(service, 1)

    def begin(self):
        self.first.close()
        wait_for(lambda: self.second.status == 200, 120, "the second is answered")
        return self


@pytest.fixture
def make(make_service, gguf):
    return impatient(make_service, gguf)


def find_warning(service):
    """Return the one warning, of callers who wait; that of a slow Ollama may stand beside it."""
    told = health(service)
    assert told["status"] == "healthy", told
    others = [each for each in told["warnings"] if each["code"] != "ollama_slow"]
    assert [each["code"] for each in others] in ([], ["callers_waiting"])
    return others and others[0]


def test_a_scheduler_that_waits_for_ever_is_found_and_healed(make):
    service = make()
    starved = Starved(service).begin()

    def found():  # it may be healed between two questions
        told = health(service).get("code")
        return told == "callers_starved" or stats(service)["healed"]["ollama"]

    wait_for(found, VERDICT_S, "the fault")
    wait_for(lambda: stats(service)["healed"]["ollama"] == 1, 60, "the healing")
    wait_for(lambda: starved.last.status == 0, 30, "who waited is told")
    healed = stats(service)["healed"]["last"]
    assert healed["ok"] and healed["why"].startswith("starved: ")
    assert healed["evidence"]["callers"]["waiting"] == 1
    # What its goroutines waited for, passed on a moment later.
    wait_for(lambda: "(*Scheduler).processPending" in service.log(), 30, "what Ollama prints")
    service.wait_healthy(60)
    assert service.load(GEMMA, num_ctx=2048)


def test_without_self_healing_a_reset_heals_it(make):
    service = make(LLM_SELF_HEAL="off")
    starved = Starved(service).begin()
    wait_for(lambda: health(service).get("code") == "callers_starved", VERDICT_S, "the fault")
    assert health(service)["recommended_action"] == "reset_session"
    metrics = service.get("/metrics").text
    assert "\nllm_up 0\n" in metrics and "\nllm_callers_waiting 1\n" in metrics
    reset(service)
    wait_for(lambda: starved.last.status == 200, 60, "who waited is answered")
    service.wait_healthy(60)
    assert stats(service)["healed"]["last"] is None


def test_while_others_are_served_it_is_a_warning(make):
    service = make()
    starved = Starved(service)
    warning = wait_for(lambda: find_warning(service), VERDICT_S, "a warning")
    assert warning["longest_wait_s"] >= STUCK_S
    starved.first.goes_on()
    assert stats(service)["healed"]["last"] is None


def test_beside_a_pull_it_is_a_warning_and_a_fault_thereafter(make, registry):
    service = make()
    name = registry.add_random("ns/stalled:latest", 20)
    registry.stall_after(5_000_000)
    Starved(service).begin()
    pull = {"model": name, "insecure": True, "detach": True}
    assert service.post("/api/models/pull", json=pull).status_code == 202
    wait_for(lambda: find_warning(service), VERDICT_S, "the warning")
    wait_looks(service, 3)
    assert find_warning(service)
    assert service.delete("/api/models/pull", json={"model": name}).ok
    wait_for(lambda: stats(service)["healed"]["ollama"] == 1, VERDICT_S, "the healing")


# An Ollama that answers all but those who want a model


@pytest.fixture
def deaf(make_service, tmp_path):
    return make_service(PATH=stand_in(tmp_path), LLM_STUCK_SECONDS=STUCK_S)


def test_requests_that_are_never_answered(deaf):
    callers = [Caller(deaf, model="m", prompt="Why?") for _ in range(3)]
    wait_for(lambda: waiting(deaf) == 3, 60, "three wait")
    wait_for(lambda: stats(deaf)["healed"]["ollama"] == 1, VERDICT_S + 20, "the healing")
    wait_for(lambda: all(each.status == 0 for each in callers), 30, "they are told")
    assert "callers have waited" in stats(deaf)["healed"]["last"]["why"]


def test_where_a_reset_does_not_help_the_next_one_restarts_ollama(make_service, tmp_path):
    """Else who does as /health says would reset for ever, and end each time what works."""
    service = make_service(PATH=stand_in(tmp_path), LLM_STUCK_SECONDS=STUCK_S, LLM_SELF_HEAL="off")
    caller = Caller(service, model="m", prompt="Why?")

    def obey():
        told = health(service)
        if told["recommended_action"] == "reset_session":
            reset(service)
        return caller.status == 0

    wait_for(obey, VERDICT_S + 20, "he is told")
    service.wait_healthy(60)
    assert stats(service)["resets"] == 2


def test_answers_to_others_are_none_to_who_waits(deaf):
    """Every check of every peer asks for these."""
    Caller(deaf, model="m", prompt="Why?")

    def seen():
        for path in ("/api/version", "/api/tags", "/api/ps"):
            assert deaf.ollama("GET", path).ok
            time.sleep(0.3)  # or the server has something to compute
        return stats(deaf)["healed"]["ollama"] == 1

    wait_for(seen, VERDICT_S + 20, "the healing")
    assert "callers have waited" in stats(deaf)["healed"]["last"]["why"]
