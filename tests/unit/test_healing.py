"""What is healed, on real processes that stand for Ollama and its runners."""

import contextlib
import functools
import os
import signal
import subprocess
import sys
import threading

import psutil
import pytest

from helpers.given_time import SERVER, Clock, ends_soon
from helpers.processes import suspend
from helpers.waiting import wait_for
from llm_service import clearing, healing, processes, reports, runner_state, session, sharing, watch
from llm_service.callers import Callers
from llm_service.downloads import Downloads
from llm_service.errors import ServiceError, TimedOut
from llm_service.healing import HEALINGS, ORPHAN_S, Healing
from llm_service.machine import Machine
from llm_service.manifests import Manifest
from llm_service.matching import Matching
from llm_service.processes import Processes, Runner, alive, end, life
from llm_service.server_state import HUNG_LOOKS
from llm_service.session import Session
from llm_service.store import Store
from llm_service.watch import Watch
from ollama_client import Ollama

STUCK_S = 0.2
A, B = "a:latest", "b:latest"
DIGESTS = {A: "a" * 64, B: "b" * 64}


def slot(decoded):
    return {"id_task": 1, "is_processing": True, "next_token": [{"n_decoded": decoded}]}


def sleeps(process):
    """Tell whether a runner's stand-in has begun, and does nothing."""
    return process.name() == "sleep" and process.status() == psutil.STATUS_SLEEPING


def lives(process):
    """Tell whether it is there and no zombie; it may be reaped meanwhile."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


class Place:
    """A watch and a healing of two models that stand, and what was signalled.

    Its time is .clock's. What is done beside gets more real time than the service gives it.

    .ended          names of what was ended by the watch
    .on_end         called with the name when one is about to be ended
    .decoded        tokens of each model, which stand until they are changed
    """

    def __init__(self, server, monkeypatch):
        self.server = psutil.Process(server.pid)
        pids = list(map(int, server.stdout.readline().split()))
        self.process = dict(zip((A, B), map(psutil.Process, pids), strict=True))
        for each in self.process.values():  # what its start takes would look like work
            wait_for(lambda each=each: sleeps(each), 30, "it has begun")
        self.decoded = {A: 5, B: 5}
        self.clock = Clock(self._ends)
        modules = clearing, healing, processes, reports, session, sharing, watch
        self.clock.rule(monkeypatch, *modules)
        self.ended, self.on_end, self.kills = [], lambda _: None, True
        ollama, store = Ollama("http://127.0.0.1:9"), Store("/nonexistent")
        self.found = Processes(os.devnull)
        self.answers = True
        stand_ins = {
            (ollama, "ps"): lambda *_: self._answer(
                [{"name": name, "digest": name} for name in DIGESTS]
            ),
            (ollama, "version"): lambda *_: self._answer("0"),
            (ollama, "unload"): lambda *_: None,
            (ollama, "runner_health"): lambda *_: "ok",
            (ollama, "runner_slots"): lambda name, *_: [slot(self.decoded[name])],
            (self.found, "server"): lambda: self.server if self.server.is_running() else None,
            (self.found, "runners"): self._runners,
            (self.found, "ever_started"): lambda: True,
            (store.manifests, "there"): lambda: {
                name: [Manifest(name, ["sha256:" + digest], set(), True, (digest,), (name,))]
                for name, digest in DIGESTS.items()
            },
        }
        for (owner, name), stand_in in stand_ins.items():
            monkeypatch.setattr(owner, name, stand_in)
        monkeypatch.setattr(healing, "ASK_S", 30)
        # Each look asks the server, which has nothing to do here
        monkeypatch.setattr("llm_service.server_state.LONG_QUIET_S", 0)
        downloads = Downloads(ollama, store, self.found, 1)
        machine = Machine(store, downloads, Matching(ollama, store.manifests, self.found))
        machine.matching.look_at_disk()
        callers = Callers(9, STUCK_S, works=bool)
        self.watch = Watch(ollama, store, self.found, machine, callers, STUCK_S, self._end)
        self.session = Session(self.watch, downloads, default_model="none")
        self.healing = Healing(self.watch, self.session, self_heal=True)

    def _answer(self, answer):
        if not self.answers:
            raise TimedOut("ollama_timeout", "no answer")
        return answer

    def _ends(self):
        """Tell whether a process is about to end."""
        server = life(self.server)
        ending = [ends_soon(runner, self.server) for runner in self.process.values()]
        return (server.dying and server.alive) or any(ending)

    def _runners(self):
        return [
            Runner(process, DIGESTS[name], name)
            for name, process in self.process.items()
            if lives(process)
        ]

    def _end(self, process):
        (name,) = (name for name, each in self.process.items() if each == process)
        self.on_end(name)
        self.ended.append(name)
        if self.kills:
            end(process)

    def look(self, looks=1):
        for _ in range(looks):
            self.watch.look()
            self.clock.sleep(STUCK_S / 8)
        return {state.model: state.state for state in self.watch.states()}


@pytest.fixture
def place(monkeypatch):
    with subprocess.Popen([sys.executable, "-IS", "-c", SERVER], stdout=subprocess.PIPE) as server:
        one = Place(server, monkeypatch)
        yield one
        for process in [one.server, *one.process.values()]:
            end(process)


def test_the_second_of_two_that_stood_is_left_alone_once_it_goes_on(place):
    """One kernel holds the GPU of both: as soon as the one is ended the other goes on."""
    place.on_end = lambda _: place.decoded.update({A: 6, B: 6})
    assert place.look(14) == {A: "stuck", B: "stuck"}
    place.healing.after_look()
    assert len(place.ended) == 1
    (other,) = {A, B} - set(place.ended)
    assert place.process[other].is_running()
    assert (place.healing.healed["runners"], place.healing.healed["failed"]) == (1, 0)
    assert place.look()[other] == "busy"


def test_it_is_left_alone_too_where_it_goes_on_a_moment_after_the_end(place):
    place.on_end = lambda _: place.clock.after(0.3, lambda: place.decoded.update({A: 6, B: 6}))
    assert place.look(14) == {A: "stuck", B: "stuck"}
    place.healing.after_look()
    assert len(place.ended) == 1


def test_it_is_left_alone_too_where_its_next_step_takes_long(place):
    """A batch of a long prompt takes seconds, also on a GPU: it gets its whole time anew."""
    assert place.look(14) == {A: "stuck", B: "stuck"}
    for _ in range(3):
        place.healing.after_look()
        place.look()
    assert len(place.ended) == 1
    (other,) = {A, B} - set(place.ended)
    assert place.look(4)[other] == "busy"


@pytest.mark.parametrize("looked", [True, False])
def test_one_that_stood_is_left_alone_where_a_clear_has_ended_the_other(place, monkeypatch, looked):
    """A clear looks at its end only where it has time for that; its healing may have waited."""
    assert place.look(14) == {A: "stuck", B: "stuck"}
    with monkeypatch.context() as patched:
        if not looked:
            patched.setattr(place.watch, "look", lambda *_: None)
        place.session.clear(A, True)
    place.healing.after_look()
    assert place.ended == [] and not alive(place.process[A])
    assert place.look(4) == {B: "busy"}


def test_one_that_stands_is_left_alone_while_the_other_is_about_to_end(place, monkeypatch):
    monkeypatch.setattr(healing, "KILL_WAIT_S", 0.2)
    place.kills = False  # it takes its time
    place.look(14)
    for _ in range(3):
        place.healing.after_look()
        place.look()
    assert len(place.ended) == 1


def test_two_that_stand_each_for_itself_are_both_ended_one_after_the_other(place):
    for healed in (1, 2):
        place.look(14)
        place.healing.after_look()
        assert place.healing.healed["runners"] == healed
    assert sorted(place.ended) == [A, B]


def test_one_that_stands_is_stuck_though_others_come_and_go(place):
    """Only by the end of one that stood itself may it go on."""
    place.decoded[B] = 1
    for _ in range(14):
        place.decoded[B] += 1
        place.look()
    end(place.process[B])
    wait_for(lambda: not place.process[B].is_running(), 30, "its end")
    assert place.look() == {A: "stuck"}


def test_one_that_has_gone_on_since_the_last_look_is_not_ended(place, caplog):
    caplog.set_level("INFO")
    place.look(14)
    place.decoded = {A: 9, B: 9}
    place.healing.after_look()
    assert place.ended == []
    assert place.healing.healed["runners"] == 0
    assert "left alone, as it is busy now" in caplog.text


def test_one_that_goes_on_while_ollama_is_asked_to_unload_it_is_not_ended(place, monkeypatch):
    place.decoded[B] = 6
    for _ in range(14):
        place.decoded[B] += 1
        place.look()
    monkeypatch.setattr(place.watch.ollama, "unload", lambda *_: place.decoded.update({A: 7}))
    place.healing.after_look()
    assert place.ended == []


def test_one_that_sigkill_does_not_end_is_told_as_failed_and_only_a_reboot_helps(
    place, monkeypatch
):
    place.kills = False
    place.look(14)
    monkeypatch.setattr(healing, "KILL_WAIT_S", 0.2)
    monkeypatch.setattr(healing, "GHOST_S", 0.1)
    place.healing.after_look()
    place.clock.sleep(0.2)
    place.healing.after_look()
    assert place.healing.healed["runners"] == 0
    assert place.healing.healed["failed"] == 2
    assert place.healing.healed["last"]["ok"] is False
    state = place.watch.states()[0]
    assert place.healing.action(state) == "reboot_host"  # though its state is what it was
    state.survives = True  # as its looks say after GHOST_S
    assert place.healing.action(state) == "reboot_host"
    assert state in place.watch.faults()


def test_one_that_has_ended_at_last_needs_no_reboot(place, monkeypatch):
    """Its server has not let it go yet, as it stands: that is a ghost."""
    place.look(14)
    suspend(place.server)
    monkeypatch.setattr(place.healing, "_may_heal", lambda _: True)
    state = place.watch.faults()[0]
    state.survives = True
    place.healing._unended.add(state.runner)
    assert place.healing.action(state) == "reboot_host"
    end(state.process)
    wait_for(lambda: not alive(state.process), 30, "its end")
    assert state in place.watch.faults()
    assert place.healing.action(state) == "wait"
    assert not place.watch.survives(state.runner)


def test_a_runner_that_has_gone_since_the_last_look_is_no_fault(place):
    place.look(14)
    gone, other = place.watch.faults()
    end(gone.process)
    wait_for(lambda: not gone.process.is_running(), 30, "its end")
    assert place.watch.faults() == [other]


def test_a_model_that_becomes_a_ghost_after_its_end_was_healed_once(place):
    for _ in range(2):
        place.look(14)
        place.healing.after_look()
    assert [len(place.healing._healings[name]) for name in (A, B)] == [1, 1]
    state = runner_state.RunnerState(Runner(place.process[A], None, None), 0, STUCK_S)
    place.healing._healed_of[state.runner] = "stuck"
    place.healing._note_try(state.runner, A, "ghost")
    assert len(place.healing._healings[A]) == 1


def test_after_three_healings_it_is_left_alone_and_says_so(place):
    place.look(14)
    for name in (A, B):
        place.healing._healings[name] = [place.clock.monotonic()] * HEALINGS
    place.healing.after_look()
    assert place.ended == []
    assert {place.healing.action(state) for state in place.watch.faults()} == {"restart_service"}


def test_the_verdict_keeps_its_evidence(place):
    place.look(14)
    place.healing.after_look()
    last = place.healing.healed["last"]
    assert last["ok"] is True and last["why"].startswith("stuck: for ")
    assert last["evidence"]["counters"] == [(1, None, 5)]
    assert {"gpus", "ollama_said"} <= last["evidence"].keys()


def test_living_orphans_are_ended_where_the_launcher_has_left_them(place):
    place.look()
    end(place.server)
    wait_for(lambda: place.look() == {A: "orphan", B: "orphan"}, 30, "orphans")
    place.healing.after_look()
    assert place.ended == []  # the launcher gets its time
    for state in place.watch.states():
        state.since -= ORPHAN_S
    place.healing.after_look()
    assert sorted(place.ended) == [A, B]


def free_at_looks(place, monkeypatch):
    """Return, as it grows, whether at each look from now on a clear could have begun."""
    look, free = place.watch.look, []

    def noted(*args):
        try:
            with place.session.clears.turn(0):
                free.append(True)
        except ServiceError:
            free.append(False)
        look(*args)

    monkeypatch.setattr(place.watch, "look", noted)
    return free


def test_who_clears_does_not_wait_for_the_look_after_the_healing_of_a_runner(place, monkeypatch):
    place.look(14)
    place.decoded[B] = 6  # it goes on
    free = free_at_looks(place, monkeypatch)
    place.healing.after_look()
    assert place.ended == [A]
    assert free == [True]


def test_who_clears_does_not_wait_for_the_look_after_a_restart(place, monkeypatch):
    monkeypatch.setattr("llm_service.server_state.HUNG_LOOKS", 3)
    monkeypatch.setattr(place.session, "restart", lambda *_: "")
    monkeypatch.setattr("llm_service.healing.GONE_S", 0)
    place.look()
    place.answers = False
    place.decoded = {A: 6, B: 6}
    place.look(4)
    free = free_at_looks(place, monkeypatch)
    place.healing.after_look()
    assert place.healing.healed["ollama"] == 1
    assert free == [True]


def test_a_server_that_answers_again_is_not_ended(place, monkeypatch):
    ended = []
    monkeypatch.setattr(place.found, "end_server", lambda *_: ended.append(1) or True)
    monkeypatch.setattr("llm_service.server_state.HUNG_LOOKS", 3)
    place.look()
    place.answers = False
    place.decoded = {A: 6, B: 6}
    place.look(4)
    assert place.watch.server_state.hung(place.server)
    place.answers = True
    place.healing.after_look()
    assert ended == [] and place.healing.healed["ollama"] == 0


def test_a_restart_that_brings_no_new_server_is_told_as_failed(place, monkeypatch):
    monkeypatch.setattr("llm_service.session.RESET_S", 0.5)
    monkeypatch.setattr("llm_service.healing.RESET_S", 0.5)
    monkeypatch.setattr("llm_service.server_state.HUNG_LOOKS", 3)

    def end_server(*_):
        end(place.server)
        place.server.wait(30)
        return True

    monkeypatch.setattr(place.found, "end_server", end_server)
    place.look()
    place.answers = False
    place.look(4)
    place.healing.after_look()
    healed = place.healing.healed
    assert (healed["ollama"], healed["failed"], healed["last"]["ok"]) == (0, 1, False)
    assert place.healing.server_action() == "restart_service"


def test_a_server_that_does_not_end_is_told_as_failed_once(place, monkeypatch):
    """How its end goes on is told by /health; no second SIGKILL does more than the first."""
    sent = []
    monkeypatch.setattr("llm_service.healing.RESET_S", 0.5)
    monkeypatch.setattr("llm_service.server_state.HUNG_LOOKS", 3)
    monkeypatch.setattr(place.found, "_send", lambda _, sig: sent.append(sig))
    place.look()
    place.answers = False
    place.look(4)
    for _ in range(2):
        place.healing.after_look()
    assert place.healing.healed["failed"] == 1
    assert place.found.ending(place.server)
    assert sent.count(signal.SIGKILL) == 1


def test_a_server_that_dies_while_it_is_asked_once_more_is_not_healed(place, monkeypatch):
    ended = []
    monkeypatch.setattr("llm_service.server_state.HUNG_LOOKS", 3)
    monkeypatch.setattr(place.found, "end_server", lambda *_: ended.append(True) or True)

    def answers(*_):
        end(place.server)
        wait_for(lambda: not alive(place.server), 30, "its end")
        return False

    place.look()
    place.answers = False
    place.look(4)
    monkeypatch.setattr(place.watch.server_state, "answers", answers)
    place.healing.after_look()
    assert not ended and place.healing.healed["last"] is None


def test_the_next_server_is_left_alone_by_a_healing_that_has_waited_for_a_reset(place, monkeypatch):
    turn, ended = place.session.resets.turn, []

    @contextlib.contextmanager
    def after_a_reset(limit_s):
        with turn(limit_s):
            monkeypatch.setattr(place.found, "server", psutil.Process)  # it has begun another one
            yield

    monkeypatch.setattr(place.session.resets, "turn", after_a_reset)
    monkeypatch.setattr(place.found, "end_server", lambda *_: ended.append(True) or True)
    place.look(1)
    place.answers = False
    place.look(HUNG_LOOKS)
    assert place.watch.server_state.hung(place.server)
    place.healing.after_look()
    assert not ended and place.healing.healed["ollama"] == 0


def test_a_runner_that_goes_by_its_unload_is_healed(place, monkeypatch):
    """Ollama ends an idle one itself, also one that is stopped."""

    def unload(name, *_):
        end(place.process[name])
        wait_for(lambda: not place.process[name].is_running(), 5, "its end")

    monkeypatch.setattr(place.watch.ollama, "unload", unload)
    place.look(14)
    place.decoded[B] = 6  # it goes on
    place.healing.after_look()
    assert place.ended == [] and place.healing.healed["runners"] == 1
    assert place.healing.healed["last"]["what"] == A


# Callers who wait in vain


@pytest.fixture
def starved(place, monkeypatch):
    """A server whose callers wait in vain, until .starved is ""."""
    for name in place.decoded:
        place.decoded[name] = 0
    callers = place.watch.callers
    monkeypatch.setattr(callers, "look", lambda *_: None)
    monkeypatch.setattr(place.found, "end_server", lambda *_: end(place.server) or True)
    monkeypatch.setattr(place.session, "restart", lambda *_: place.found.end_server() and "")
    callers.report = {"connections": 1, "waiting": 1, "longest_wait_s": 130.0}
    callers.suspicion = "callers have waited for up to 130 s"
    callers.confirm()
    return callers


def test_a_server_whose_callers_wait_in_vain_is_restarted(place, starved):
    assert place.healing.starved_action() == "wait"
    place.healing.after_look()
    assert place.healing.healed["ollama"] == 1
    last = place.healing.healed["last"]
    assert last["why"] == f"starved: {starved.starved}"
    assert last["evidence"]["callers"] == starved.report


@pytest.mark.usefixtures("starved")
def test_what_a_restart_frees_is_measured_once_the_runners_are_gone(place, monkeypatch):
    """A new server may be there before the last one's runners have given their memory back."""

    def restart(*_):
        end(place.server)
        for number, runner in enumerate(place.process.values(), 1):
            place.clock.after(number / 5, functools.partial(end, runner))
        return ""

    def used_mb(runners):
        return "nvml", 100 * sum(alive(runner.process) for runner in runners)

    monkeypatch.setattr(place.session, "restart", restart)
    monkeypatch.setattr(healing, "used_mb", used_mb)
    place.look()
    place.healing.after_look()
    assert place.healing.healed["last"]["freed_mb"] == 200


def test_one_whose_callers_are_answered_right_before_is_left_alone(place, starved):
    starved.look = lambda *_: setattr(starved, "starved", "")
    place.healing.after_look()
    assert place.healing.healed["last"] is None
    assert place.server.is_running()


@pytest.mark.usefixtures("starved")
def test_after_three_such_healings_it_is_left_alone(place, monkeypatch):
    monkeypatch.setattr(place.found, "ending", lambda _: False)  # as another one is there
    for _ in range(HEALINGS + 1):
        place.healing.after_look()
    assert place.healing.healed["ollama"] == HEALINGS
    assert place.healing.starved_action() == "restart_service"


def test_without_self_healing_it_is_left_to_a_reset(place, starved):
    place.healing.self_heal = False
    place.healing.after_look()
    assert place.healing.healed["last"] is None
    assert place.healing.starved_action() == "reset_session"
    assert place.server.is_running() and starved.starved


@pytest.fixture
def suspected(place, starved, monkeypatch):
    """The same before it was looked into: .queue tells whether a load goes through."""
    starved.starved = ""
    starved.queue = []
    place.look(1)
    monkeypatch.setattr(
        place.watch.ollama, "load", lambda *_, **fields: starved.queue.pop()(fields)
    )
    return starved


def test_who_waits_is_not_starved_where_a_load_goes_through_the_queue(place, suspected):
    asked = []

    def load(fields):
        asked.append(fields["options"])
        end(place.process[A])  # as the model is loaded anew
        wait_for(lambda: len(place.found.runners()) == 1, 20, "its end")

    suspected.queue = [lambda fields: asked.append(fields["options"]), load]
    place.healing.after_look()
    assert place.server.is_running() and not suspected.starved
    assert place.healing.healed["last"] is None
    assert asked[0].pop("num_thread") and asked[0] == asked[1]  # it is put back as it was


def test_who_waits_is_starved_where_no_load_goes_through_the_queue(place, suspected):
    def load(_):
        raise TimedOut("timeout", "no answer")

    suspected.queue = [load]
    place.healing.after_look()
    assert suspected.starved == suspected.suspicion
    assert place.healing.healed["ollama"] == 1


def test_without_self_healing_it_is_found_out_too_and_nothing_is_healed(place, suspected):
    def load(_):
        raise TimedOut("timeout", "no answer")

    suspected.queue = [load]
    place.healing.self_heal = False
    place.healing.after_look()
    assert suspected.starved == suspected.suspicion and not suspected.queue
    assert place.healing.healed["last"] is None
    assert place.server.is_running()


def test_a_load_that_is_answered_past_the_queue_tells_nothing(place, suspected, monkeypatch):
    """So answers a model that is loaded as it is tried, and one for MLX: it is unloaded first."""
    unloaded = []

    def unload(name, *_):
        unloaded.append(name)
        end(place.process[A])
        wait_for(lambda: len(place.found.runners()) == 1, 20, "its end")

    def load(_):
        assert unloaded
        raise TimedOut("timeout", "no answer")

    monkeypatch.setattr(place.watch.ollama, "unload", unload)
    suspected.queue = [load, lambda _: None]  # the last comes first
    place.healing.after_look()
    assert suspected.starved and not suspected.queue


def test_a_model_that_was_deleted_while_it_was_loaded_tells_nothing(place, suspected, monkeypatch):
    def load(_):
        raise ServiceError("model_not_found", "no such model")

    suspected.queue = [load] * len(place.watch.loaded)
    monkeypatch.setattr(place.healing._session, "any_model", lambda: None)
    place.healing.after_look()
    assert suspected.starved and not suspected.queue


def test_a_disk_that_hangs_holds_up_no_kill(place, monkeypatch):
    """Which name still reaches a model is asked of the manifests."""
    go_on = threading.Event()
    monkeypatch.setattr(healing, "ASK_S", 0.6)
    place.look(14)
    monkeypatch.setattr(place.watch.store.manifests, "there", lambda: go_on.wait(120) and {})

    def heal_both():
        place.healing.after_look()
        place.look(14)
        place.healing.after_look()

    began = threading.Thread(target=heal_both, daemon=True)
    began.start()
    try:
        wait_for(lambda: sorted(place.ended) == [A, B], 60, "both are ended")
    finally:
        go_on.set()
        began.join()


def test_an_error_of_what_comes_before_it_keeps_no_runner_from_being_healed(place, monkeypatch):
    def broken(*_):
        raise TypeError("a bug")

    place.look(14)
    monkeypatch.setattr(place.healing._cleaner, "due", broken)
    for _ in range(2):
        with contextlib.suppress(TypeError):
            place.healing.after_look()
        place.look(14)
    assert sorted(place.ended) == [A, B]
