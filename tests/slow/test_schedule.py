"""A schedule of two and three faults at once; no good answer is lost.

A good answer is one whose runner and server have no fault, or one that passes by itself before
its time is over.
"""

import contextlib
import os
import random
import signal
import threading
import time

import psutil
import pytest

from helpers.answers import ask, stats
from helpers.frozen import frozen
from helpers.processes import is_gone
from helpers.waiting import wait_for

SEED = int(os.environ.get("LLM_TEST_SCHEDULE_SEED") or 28)
SECONDS = int(os.environ.get("LLM_TEST_SCHEDULE_S") or 60)
STUCK_S = 5
MODELS = ["m1:latest", "m2:latest"]


class Round:
    """An answer of each model under way, and the faults that meet them at once."""

    def __init__(self, service, faults):
        self.service, self.faults = service, faults
        self.answers = {name: service.generate(name) for name in MODELS}
        self.runners = {name: service.load(name) for name in MODELS}
        self.server = psutil.Process(service.ollama_pid())
        self.threads, self.errors = [], []
        self.stack = contextlib.ExitStack()

    def begin(self):
        """Have all faults at the same moment."""
        ready = threading.Barrier(len(self.faults))
        for what, fault in self.faults.items():
            one = threading.Thread(target=self._begin_one, args=(ready, what, fault))
            self.threads.append(one)
            one.start()

    def _begin_one(self, ready, what, fault):
        ready.wait(30)
        try:
            fault(self, what)
        except (psutil.NoSuchProcess, AssertionError) as error:
            # Another fault has ended it: a process that exits cannot be traced any more.
            process = self.runners.get(what, self.server)
            try:
                wait_for(lambda: is_gone(process), 30, "its end")
            except AssertionError:
                self.errors.append(f"{what}: {error!r}")

    def other(self, name):
        """Return the runner of the other model."""
        return next(self.runners[each] for each in MODELS if each != name)

    def end(self):
        self.stack.close()
        for one in self.threads:
            one.join(90)
            assert not one.is_alive(), "a fault goes on"
        assert not self.errors


# Faults of a runner that stay


def hold(one, name):
    """Have its decode loop stand, as when a kernel on the GPU never returns."""
    one.stack.enter_context(frozen(one.runners[name], answering=False))


def stop(one, name):
    one.runners[name].suspend()


def kill(one, name):
    one.runners[name].kill()


def become_a_ghost(one, name):
    one.stack.enter_context(frozen(one.runners[name], reap=False, answering=False))
    one.runners[name].kill()


# Faults of a runner that pass


def hold_for_a_moment(one, name):
    with frozen(one.runners[name], answering=False):
        time.sleep(STUCK_S / 2)


def stop_for_a_moment(one, name):
    one.runners[name].suspend()
    time.sleep(STUCK_S / 2)
    one.runners[name].resume()


def hold_until_the_other_ends(one, name):
    """Stand as long as the other runner does, as on one GPU where one kernel holds both."""
    with frozen(one.runners[name], answering=False):
        wait_for(lambda: is_gone(one.other(name)), 60, "the other runner is ended")


# Faults of the server


def stop_server(one, _):
    one.server.suspend()


def kill_server(one, _):
    one.server.kill()


def stop_server_for_a_moment(one, _):
    one.server.suspend()
    time.sleep(STUCK_S / 2)
    one.server.send_signal(signal.SIGCONT)


STAYING = (hold, stop, kill)
PASSING = (hold_for_a_moment, stop_for_a_moment)
SERVER = (stop_server, kill_server, stop_server_for_a_moment)
ENDS_SERVER = (become_a_ghost, stop_server, kill_server)


def schedule(chance):
    """Yield rounds without end: what has which fault."""
    pairs = (
        lambda: (chance.choice(STAYING), chance.choice(STAYING)),
        lambda: (chance.choice(STAYING), chance.choice(PASSING)),
        lambda: (hold_until_the_other_ends, hold_until_the_other_ends),
        lambda: (become_a_ghost, chance.choice((*STAYING, *PASSING))),
        lambda: (chance.choice(PASSING), chance.choice(PASSING)),
    )
    third = []
    while True:
        # Each pair once before any comes again, with a third fault in every other round.
        for number, pair in enumerate(chance.sample(pairs, len(pairs))):
            names = chance.sample(MODELS, 2)
            faults = dict(zip(names, pair(), strict=True))
            if number % 2:  # the server is killed once in three: the launcher bears some deaths
                third = third or chance.sample(SERVER, len(SERVER))
                faults["server"] = third.pop()
            yield faults


def good(one):
    """Return the models whose answers must go on."""
    faults = one.faults
    if any(fault in ENDS_SERVER for fault in faults.values()):
        return []
    if faults[MODELS[0]] == hold_until_the_other_ends:  # either may be ended, and only one
        ended = [name for name in MODELS if one.answers[name].done]
        return [name for name in MODELS if name not in ended[:1]]
    return [name for name in MODELS if faults[name] in PASSING]


def told(faults):
    return {what: fault.__name__ for what, fault in faults.items()}


def healed(service):
    return stats(service)["healed"]


def wait_looked(service):
    """Wait for some more looks of the watch."""
    seen = set()

    def looked():
        seen.add(service.get("/health").json().get("looked_at"))
        return len(seen - {None}) > 3

    wait_for(looked, 60, "some more looks")


def play(service, faults):
    """Have the faults of one round; assert that all becomes well by itself, and nothing is lost."""
    before = healed(service)
    one = Round(service, faults)
    began = time.monotonic()
    try:
        one.begin()
        lost = len(MODELS) - len(good(one))
        if faults[MODELS[0]] == hold_until_the_other_ends:
            lost = max(lost, 1)
        answers = one.answers.values()
        wait_for(lambda: sum(each.done for each in answers) >= lost, 90, f"{lost} are ended")
        service.wait_healthy(90)
        wait_looked(service)  # what is to be healed, rightly or wrongly, has been
        survivors = good(one)
        assert len(survivors) == len(MODELS) - lost
        for name in survivors:
            one.answers[name].goes_on(60)
            assert not is_gone(one.runners[name])
            one.answers[name].close()
        after = healed(service)
        last = after["last"] or {}
        seconds = time.monotonic() - began
        print(f"{seconds:5.1f} s {told(faults)}: {last.get('what')} {last.get('why')}")
        assert after["failed"] == before["failed"]
        assert after["runners"] - before["runners"] <= lost
    finally:
        one.end()
    for name in MODELS:
        ask(service, name)


@pytest.mark.timeout(300 + 3 * SECONDS)
def test_faults_at_once_end_no_good_answer(make_service, make_gguf_variant):
    service = make_service(
        models={name: make_gguf_variant(n) for n, name in enumerate(MODELS, 1)},
        LLM_MODEL="m1",
        LLM_CONTEXT_LENGTH=1024,
        LLM_STUCK_SECONDS=STUCK_S,
        # More looks and more healings than in half an hour of real life.
        constants={"llm_service.watch.LOOK_S": 0.5, "llm_service.healing.HEALINGS": 1000},
    )
    rounds = schedule(random.Random(SEED))
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        play(service, next(rounds))
