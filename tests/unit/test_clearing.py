"""What a clear does and says where Ollama takes its time to unload, as it does on a GPU.

There it waits up to 5 s for the memory of each model, and lists the next one meanwhile, whatever
has become of its runner. On a CPU it does not wait.
"""

import concurrent.futures
import itertools
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

import app
from helpers.given_time import SERVER, Clock, ends_soon
from helpers.processes import suspend
from helpers.waiting import wait_for
from llm_service import clearing, processes, reports, session, sharing, watch
from llm_service.clearing import Clearing
from llm_service.errors import TimedOut
from llm_service.manifests import Manifest
from llm_service.models import not_unloaded
from llm_service.processes import Runner, alive, end
from llm_service.reports import clear_failure, clear_message
from llm_service.session import Session, reset_suits
from ollama_client import ServiceError

DIGESTS = {"big:latest": "b" * 64, "small:latest": "5" * 64}
BUSY, IDLE = [{"is_processing": True}], [{"is_processing": False}]


def manifest(name, digest):
    """Return the manifest of a model of these weights."""
    return Manifest(name, [f"sha256:{digest}"], set(), True, (digest,), (f"of {name}",))


class Gpu:
    """An Ollama that lists both models on, and ends only the runner of small when it is asked.

    .server .runners        their processes; the runners by name
    .slots                  what each runner says
    .refused                the models that it does not unload, and says so
    .listed                 those that it lists
    """

    def __init__(self, server):
        self.server = psutil.Process(server.pid)
        pids = map(int, server.stdout.readline().split())
        self.runners = {name: psutil.Process(pid) for name, pid in zip(DIGESTS, pids, strict=True)}
        self.slots = {"big:latest": IDLE, "small:latest": IDLE}
        self.refused, self.listed = [], list(DIGESTS)
        self.clock = Clock(self._ends)

    def _ends(self):
        """Tell whether a runner is about to end."""
        return any(ends_soon(runner, self.server) for runner in self.runners.values())

    def known_runners(self):
        """Return the runners; the port of each is its name."""
        return [
            Runner(process, DIGESTS[name], name)
            for name, process in self.runners.items()
            if process.is_running()
        ]

    def unload(self, name, *_):
        if name in self.refused:
            raise ServiceError("ollama_error", "no")
        if name == "small:latest" and self.slots[name] == IDLE:
            end(self.runners[name], signal.SIGTERM)
            psutil.wait_procs([self.runners[name]], 20)

    def ps(self, *_):
        return [{"name": name, "digest": f"of {name}"} for name in self.listed]

    def clear(self, force, model=None):
        clearing = Clearing(app.watch, model, force, self.clock.monotonic() + 30)
        clearing.run()
        return clearing.report


@pytest.fixture
def gpu(monkeypatch):
    with subprocess.Popen([sys.executable, "-IS", "-c", SERVER], stdout=subprocess.PIPE) as server:
        one = Gpu(server)
        manifests = {name: [manifest(name, digest)] for name, digest in DIGESTS.items()}
        one.clock.rule(monkeypatch, clearing, processes, reports, session, sharing, watch)
        monkeypatch.setattr(app, "session", Session(app.watch, app.downloads, app.MODEL))
        monkeypatch.setattr(app.watch, "known_runners", one.known_runners)
        monkeypatch.setattr(app.processes, "runners", one.known_runners)
        monkeypatch.setattr(app.processes, "unknown_children", list)
        monkeypatch.setattr(app.processes, "server", lambda: one.server)
        monkeypatch.setattr(app.store.manifests, "there", lambda: manifests)
        # As in a service that runs: on a busy machine what was read last has to do.
        monkeypatch.setattr(app.store.manifests, "_read", (None, manifests))
        monkeypatch.setattr(app.ollama, "version", lambda *_: "0")
        monkeypatch.setattr(app.ollama, "ps", one.ps)
        monkeypatch.setattr(app.ollama, "unload", one.unload)
        monkeypatch.setattr(app.ollama, "runner_health", lambda *_: "ok")
        monkeypatch.setattr(app.ollama, "runner_slots", lambda name, *_: one.slots[name])
        yield one
        for process in [one.server, *one.runners.values()]:
            end(process)


def ended(gpu, report):
    """Return what was ended: by its name, why; it has the right numbers and is gone."""
    for each in report["killed"]:
        assert each["pid"] == gpu.runners[each["model"]].pid
        assert not alive(gpu.runners[each["model"]])
    return {each["model"]: each["reason"] for each in report["killed"]}


@pytest.mark.parametrize(("slots", "reason"), [(BUSY, "busy"), (IDLE, "idle")])
def test_a_model_that_is_listed_on_without_a_runner_is_cleared(gpu, slots, reason):
    gpu.slots["big:latest"] = slots
    report = gpu.clear(force=True)
    assert ended(gpu, report) == {"big:latest": reason}
    assert (report["left"], report["unloaded_models"]) == ([], sorted(DIGESTS))
    assert report["verified"] is True


def test_one_whose_end_ollama_waits_for_is_not_cleared(gpu):
    gpu.slots = dict.fromkeys(DIGESTS, BUSY)
    suspend(gpu.server)  # so that it reaps none
    report = gpu.clear(force=True)
    assert report["verified"] is False
    assert report["left"] == sorted(DIGESTS)


def test_one_whose_end_ollama_heeds_while_it_is_asked_is_cleared(gpu, monkeypatch):
    """There may be no time for another question: what is told is looked at once more."""
    monkeypatch.setattr(clearing, "VERIFY_WAIT_S", 0)
    gpu.slots = dict.fromkeys(DIGESTS, BUSY)
    gpu.server.suspend()  # so that it reaps none

    def ps(*_):
        if not any(map(alive, gpu.runners.values())):
            gpu.server.resume()
            psutil.wait_procs(gpu.runners.values(), 20)
        return gpu.ps()

    monkeypatch.setattr(app.ollama, "ps", ps)
    report = gpu.clear(force=True)
    assert (report["verified"], report["left"]) == (True, [])


def test_an_idle_one_that_ollama_has_not_unloaded_in_time_is_ended_by_a_sparing_clear(gpu):
    report = gpu.clear(force=False)
    assert ended(gpu, report) == {"big:latest": "idle"}
    assert (report["left"], report["unloaded_models"]) == ([], sorted(DIGESTS))
    assert report["verified"] is True


@pytest.mark.parametrize("slots", [BUSY, None])
def test_a_busy_one_or_one_that_does_not_tell_is_spared_and_named(gpu, slots):
    gpu.slots["big:latest"] = slots
    report = gpu.clear(force=False)
    assert gpu.runners["big:latest"].is_running()
    assert (report["killed"], report["verified"]) == ([], False)
    assert (report["left"], report["unloaded_models"]) == (["big:latest"], ["small:latest"])


def test_one_that_does_not_listen_yet_is_spared_whatever_is_answered_on_its_port(gpu, monkeypatch):
    """A clear with force ends it as busy: it loads."""
    monkeypatch.setattr(clearing, "listens", lambda _, port: port != "big:latest")
    assert gpu.clear(force=False)["left"] == ["big:latest"]
    assert ended(gpu, gpu.clear(force=True)) == {"big:latest": "busy"}


def test_one_that_was_asked_since_the_clear_began_is_spared(gpu, monkeypatch):
    tasks = itertools.count()
    gpu.refused = ["small:latest"]

    def slots(*_):
        return [{"is_processing": False, "id_task": next(tasks)}]

    monkeypatch.setattr(app.ollama, "runner_slots", slots)
    report = gpu.clear(force=False)
    assert gpu.runners["big:latest"].is_running()
    assert (report["killed"], report["left"]) == ([], sorted(DIGESTS))
    assert ended(gpu, gpu.clear(force=True)) == dict.fromkeys(DIGESTS, "idle")


def test_one_that_did_not_tell_at_first_what_it_was_at_is_spared(gpu, monkeypatch):
    late = set(DIGESTS)

    def slots(name, *_):
        if name in late:
            late.remove(name)
            raise TimedOut("ollama_timeout", "late")
        return IDLE

    monkeypatch.setattr(app.ollama, "runner_slots", slots)
    report = gpu.clear(force=False)
    assert (report["killed"], report["left"]) == ([], ["big:latest"])


def test_a_sparing_clear_ends_the_idle_one_and_spares_the_busy_one(gpu):
    gpu.slots["small:latest"] = BUSY
    report = gpu.clear(force=False)
    assert ended(gpu, report) == {"big:latest": "idle"}
    assert gpu.runners["small:latest"].is_running()
    assert (report["left"], report["unloaded_models"]) == (["small:latest"], ["big:latest"])
    assert report["verified"] is False


def test_an_idle_one_that_ollama_does_not_unload_is_spared_and_named(gpu):
    gpu.refused.append("big:latest")
    report = gpu.clear(force=False)
    assert gpu.runners["big:latest"].is_running()
    assert (report["killed"], report["verified"]) == ([], False)
    assert (report["left"], report["unloaded_models"]) == (["big:latest"], ["small:latest"])


@pytest.mark.parametrize("call", ["ps", "unload"])
def test_an_ollama_that_takes_a_second_to_answer_still_unloads_for_a_sparing_clear(
    gpu, call, monkeypatch
):
    """It does while it ends another runner."""
    in_time = getattr(gpu, call)

    def late(*arguments):
        if arguments[-1] < 1:
            raise TimedOut("ollama_timeout", "late")
        return in_time(*arguments)

    monkeypatch.setattr(app.ollama, call, late)
    report = gpu.clear(force=False)
    assert (report["left"], report["unloaded_models"]) == ([], sorted(DIGESTS))
    assert ended(gpu, gpu.clear(force=True)) == {}


@pytest.mark.parametrize("call", ["ps", "unload"])
def test_one_that_ollama_was_too_late_to_unload_is_not_called_busy(gpu, call, monkeypatch):
    def late(*_):
        raise TimedOut("ollama_timeout", "late")

    monkeypatch.setattr(app.ollama, call, late)
    report = gpu.clear(force=False, model="big:latest")
    assert report["left"] == ["big:latest"]
    assert clear_message(report).endswith(", not unloaded by Ollama: big:latest.")
    error = not_unloaded("big:latest", report)
    assert error.code == "ollama_timeout" and "in the middle of an answer" not in str(error)


def test_a_busy_one_is_called_that(gpu):
    gpu.slots["big:latest"] = BUSY
    report = gpu.clear(force=False, model="big:latest")
    assert clear_message(report).endswith(", still busy: big:latest.")
    assert not_unloaded("big:latest", report).code == "model_busy"


@pytest.mark.parametrize("model", [None, "big:latest"])
def test_one_that_was_not_loaded_yet_is_spared_and_named(gpu, model):
    gpu.listed.remove("big:latest")  # somebody waits for it
    report = gpu.clear(force=False, model=model)
    assert gpu.runners["big:latest"].is_running()
    assert (report["killed"], report["left"]) == ([], ["big:latest"])


def test_a_ghost_is_named_beside_a_busy_one(gpu):
    gpu.slots["small:latest"] = BUSY
    suspend(gpu.server)  # so that it reaps none
    report = gpu.clear(force=False)
    assert (report["left"], report["unloaded_models"]) == (sorted(DIGESTS), [])


@pytest.fixture
def late():
    """A runner that is started later."""
    with subprocess.Popen(["sleep", "60"]) as one:
        yield psutil.Process(one.pid)
        one.kill()


def test_a_clear_during_a_reset_ends_what_was_started_after_the_resets_clearing(
    gpu, late, monkeypatch
):
    reports = []

    def look(*_):  # a reset does so at its end, while others may call
        monkeypatch.setattr(app.watch, "look", lambda *_: None)
        gpu.runners["late:latest"] = late
        gpu.slots["late:latest"] = BUSY
        reports.append(app.session.clear())

    monkeypatch.setitem(DIGESTS, "late:latest", "1" * 64)
    monkeypatch.setattr(app.session.loader, "order", lambda *_: "loading")
    monkeypatch.setattr(app.watch, "look", look)
    app.session.reset()
    assert [each["pid"] for each in reports[0]["killed"]] == [late.pid]
    assert not alive(late)


def test_who_comes_during_a_reset_shares_it_though_its_own_load_has_begun(gpu, late, monkeypatch):
    came = []

    def order(*_):
        gpu.runners["big:latest"] = late
        came.append(app.session._arrival())
        return "loading"

    monkeypatch.setattr(app.session.loader, "order", order)
    monkeypatch.setattr(app.watch, "look", lambda *_: None)
    app.session.reset("big")
    outcome = app.session.resets._last
    assert reset_suits(outcome, outcome.key, came[0])
    stranger = Runner(psutil.Process(), "2" * 64, None)
    assert not reset_suits(outcome, outcome.key, came[0]._replace(runners=[stranger]))


@pytest.mark.usefixtures("gpu")
def test_a_reset_waits_for_a_clear_that_takes_all_of_its_time(monkeypatch):
    """Where a dead runner is not reaped a clear does, and a reset's own would have less."""
    run, under_way = Clearing.run, threading.Event()

    def slowly(clearing):
        under_way.set()
        time.sleep(session.CLEAR_S - 0.7)
        run(clearing)

    monkeypatch.setattr(Clearing, "run", slowly)
    monkeypatch.setattr(app.watch, "look", lambda *_: None)
    monkeypatch.setattr(app.session.loader, "order", lambda *_: "loading")
    monkeypatch.setattr(session, "RESET_S", 30)  # a busy machine takes longer for what follows
    first = threading.Thread(target=app.session.clear)
    first.start()
    assert under_way.wait(30)
    done = app.session.clears_done
    assert app.session.reset()["status"] == "success"
    first.join()
    assert app.session.clears_done == done


def test_a_reset_has_time_for_its_clear_where_others_have_held_it_up(gpu, monkeypatch):
    """A clear that spares what is busy serves no reset, which has a second from its turn on."""
    monkeypatch.setattr(app.watch, "look", lambda *_: None)
    monkeypatch.setattr(app.session.loader, "order", lambda *_: "loading")
    monkeypatch.setattr(session, "RESET_S", 30)  # what follows has all the time it takes
    with concurrent.futures.ThreadPoolExecutor() as others:
        with app.session.clears.turn(1):
            resetting = others.submit(app.session.reset)
            wait_for(lambda: app.session._reset_came, 30, "the reset")
            time.sleep(0.1)  # then it waits for its turn
            gpu.clock.sleep(session.CLEAR_S - 1 - session.ENDING_S + 0.1)
        assert resetting.result()["status"] == "success"


@pytest.mark.usefixtures("gpu")
def test_a_reset_that_came_too_late_is_no_failure_of_who_came_later(monkeypatch):
    """A healing held all up for long; there is time for the second, and for the first not."""
    monkeypatch.setattr(app.watch, "look", lambda *_: None)
    monkeypatch.setattr(app.session.loader, "order", lambda *_: "loading")
    early = app.session._arrival()
    early = early._replace(at=early.at - 10)
    key = (None, False)
    with pytest.raises(ServiceError) as caught:
        app.session.resets.get(lambda: app.session._reset(None, False, early), 5, key, early)
    assert caught.value.code == "timeout"
    late = app.session._arrival()._replace(at=early.at + 1)
    assert not reset_suits(app.session.resets._last, key, late)


@pytest.mark.parametrize(("parent", "killed"), [("dead", True), ("server", False)])
def test_one_that_may_be_either_models_is_ended_for_one_where_it_serves_nobody(
    gpu, monkeypatch, parent, killed
):
    there = app.store.manifests.there()
    another = manifest("another", DIGESTS["big:latest"])
    there |= {"another:latest": [another]}
    gpu.listed.remove("big:latest")
    if parent == "dead":
        monkeypatch.setattr(app.processes, "server", lambda: None)
    report = gpu.clear(force=True, model="another")
    assert [each["reason"] for each in report["killed"]] == ["orphan"] * killed
    assert alive(gpu.runners["big:latest"]) is not killed
    assert report["verified"] is killed
    pid = gpu.runners["big:latest"].pid
    assert report["unknown_processes"] == [pid] * (not killed)
    if not killed:
        assert report["left"] == [f"process {pid}"]
        assert clear_failure(report).code == "runner_unknown"


@pytest.mark.parametrize(
    ("survives", "code", "action"),
    [(False, "runner_ending", "wait"), (True, "runner_survived", "reboot_host")],
)
def test_a_reboot_is_advised_only_where_sigkill_has_not_helped_for_long(
    gpu, monkeypatch, survives, code, action
):
    monkeypatch.setattr("llm_service.clearing.end", lambda _: None)
    monkeypatch.setattr(app.watch, "survives", lambda _: survives)
    report = gpu.clear(force=True)
    assert report["killed"] and report["left"] and not report["verified"]
    failure = clear_failure(report)
    assert (failure.code, failure.fields["recommended_action"]) == (code, action)


def test_a_disk_that_hangs_holds_up_no_clear(gpu, monkeypatch):
    """Its manifests are read by a thread that is not waited for; what was read last counts."""
    gpu.slots["big:latest"] = BUSY
    known = app.store.manifests.there()
    monkeypatch.setattr(app.store.manifests, "_read", (None, known))
    goes_on = threading.Event()
    readings = []

    def hang():
        readings.append(threading.current_thread())
        goes_on.wait(60)
        return {}

    monkeypatch.setattr(app.store.manifests, "there", hang)
    try:
        report = app.session.clear("big:latest", True)
        assert ended(gpu, report) == {"big:latest": "busy"}
        assert all(reading.is_alive() for reading in readings)
        assert len(readings) == 1
    finally:
        goes_on.set()
        for reading in readings:
            reading.join(30)
