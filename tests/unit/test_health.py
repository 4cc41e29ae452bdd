"""What /health says of an Ollama that gave no answer."""

import contextlib
import os
import subprocess
import sys
import threading
import time

import psutil
import pytest

import app
from helpers.waiting import wait_for
from llm_service.errors import ServiceError, TimedOut, Unreachable
from llm_service.health import ASK_S, COMPUTING_SHARE
from llm_service.processes import Runner, alive, cpu_clock_s
from llm_service.runner_state import RunnerState
from llm_service.server_state import HUNG_LOOKS, ServerState


@pytest.fixture
def server(monkeypatch):
    """A process that stands for an Ollama which has answered once."""
    with subprocess.Popen(["sleep", "60"]) as started:
        process = psutil.Process(started.pid)
        wait_for(lambda: process.status() == psutil.STATUS_SLEEPING, 30, "it has begun")
        monkeypatch.setattr(app.processes, "server", lambda: process)
        monkeypatch.setattr(app.processes, "_ended", None)
        monkeypatch.setattr(app.processes, "ever_started", lambda: True)
        state = ServerState(app.ollama, app.store, app.processes)
        monkeypatch.setattr(app.watch, "server_state", state)
        state.note_answer(process)
        yield started
        started.kill()


def diagnosis(error, asked):
    code, _reason, action = app.health_report.diagnose(error("code", "no answer"), asked)
    return code, action


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize(
    ("error", "expected"),
    [(TimedOut, "ollama_hung"), (Unreachable, "ollama_unreachable")],
)
def test_one_that_lives_needs_a_reset(error, expected):
    assert diagnosis(error, app.processes.server()) == (expected, "reset_session")


def test_one_that_is_dead_and_not_reaped_is_started_again(server):
    server.kill()
    assert diagnosis(Unreachable, app.processes.server()) == ("ollama_dead", "wait")


def test_one_that_is_reaped_while_its_error_is_looked_into_is_started_again(server):
    """It dies, and takes the connection with it, while /health waits for its answer."""
    server.kill()
    server.wait()
    assert diagnosis(Unreachable, app.processes.server()) == ("ollama_dead", "wait")


@pytest.mark.usefixtures("server")
def test_one_that_was_told_to_end_is_started_again(tmp_path, monkeypatch):
    """At SIGTERM Ollama closes its connections, and waits for its runners."""
    asked = app.processes.server()
    monkeypatch.setattr(app.processes, "state_file", tmp_path / "state")
    seen = []
    monkeypatch.setattr(
        app.processes, "_send", lambda *_: seen.append(diagnosis(Unreachable, asked))
    )
    assert not app.processes.end_server(0)
    assert alive(asked) and set(seen) == {("ollama_dead", "wait")}


# Slow is not hung


@pytest.fixture
def slow(monkeypatch, server):
    """An Ollama that answers /api/version, and lists nothing in time."""
    monkeypatch.setattr(app.watch, "server", psutil.Process(server.pid))

    def late(*_):
        raise TimedOut("ollama_timeout", "late")

    monkeypatch.setattr(app.ollama, "tags", late)
    monkeypatch.setattr(app.ollama, "ps", late)
    monkeypatch.setattr(app.ollama, "version", lambda *_: "0.0.0")
    monkeypatch.setattr(app.store, "signature", lambda: None)
    monkeypatch.setattr(app.machine, "models", {"here:latest": ["a" * 64]})
    monkeypatch.setattr(app.watch, "loaded", [{"name": "here:latest"}])
    return monkeypatch


@pytest.mark.parametrize("what", ["tags", "ps", "the disk"])
def test_slow_lists_are_a_warning_and_what_was_seen_last(slow, what):
    if what == "ps":
        slow.setattr(app.ollama, "tags", lambda *_: [{"name": "here:latest"}])
    if what == "the disk":
        slow.setattr(app.machine, "_began", time.monotonic() - 60)
        slow.setattr(app.store, "signature", lambda: pytest.fail("the disk was read"))
    told = app.health_report.check()
    assert (told["status"], told["recommended_action"]) == ("healthy", "none")
    assert told["models"] == told["loaded"] == ["here:latest"]
    assert "ollama_slow" in [each["code"] for each in told["warnings"]]


def test_where_the_version_does_not_answer_either_it_hangs(slow):
    def late(*_):
        raise TimedOut("ollama_timeout", "late")

    slow.setattr(app.ollama, "version", late)
    with pytest.raises(ServiceError) as caught:
        app.health_report.check()
    assert caught.value.code == "ollama_hung"
    assert caught.value.fields["recommended_action"] == "reset_session"


# Not for ever: who ends the tests by a signal leaves it behind.
COMPUTES = """
import time
print(flush=True)
until = time.monotonic() + 120
while time.monotonic() < until: pass
"""


def compute():
    """Return a process that has begun to compute."""
    command = [sys.executable, "-IS", "-c", COMPUTES]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    with process.stdout:
        process.stdout.readline()
    return process


def starve(process):
    """Let another process have the CPU of this one, which gets 0.3 % of it; return the other."""
    os.sched_setscheduler(process.pid, os.SCHED_IDLE, os.sched_param(0))
    cpu = {min(os.sched_getaffinity(process.pid))}
    os.sched_setaffinity(process.pid, cpu)
    other = compute()
    os.sched_setaffinity(other.pid, cpu)
    return other


@pytest.mark.parametrize("starved", [False, True])
def test_one_that_computes_is_slow_until_it_has_been_silent_for_long(slow, starved):
    """As one that reads thousands of texts which somebody has sent to be embedded."""

    def late(*_):
        if not starved:
            due_s = cpu_clock_s(busy) + COMPUTING_SHARE * ASK_S
            wait_for(lambda: cpu_clock_s(busy) > due_s, 30, "it has computed all the while")
        raise TimedOut("ollama_timeout", "late")

    slow.setattr(app.ollama, "version", late)
    busy = compute()
    others = [busy]
    try:
        process = psutil.Process(busy.pid)
        slow.setattr(app.processes, "server", lambda: process)
        slow.setattr(app.watch, "server", process)
        state = app.watch.server_state
        state.note_answer(process)
        if starved:
            others.append(starve(process))
        told = app.health_report.check()
        assert told["status"] == "healthy"
        assert "ollama_slow" in [each["code"] for each in told["warnings"]]
        for _ in range(HUNG_LOOKS):
            state.note_silence(process)
        with pytest.raises(ServiceError) as caught:
            app.health_report.check()
        assert caught.value.code == "ollama_hung"
    finally:
        with contextlib.suppress(PermissionError):  # else one that is starved takes long to end
            os.sched_setscheduler(busy.pid, os.SCHED_OTHER, os.sched_param(0))
        for each in reversed(others):
            each.kill()
            each.wait()


def test_who_waits_too_long_for_another_callers_check_is_told_to_wait(slow):
    go_on = threading.Event()
    slow.setattr(app.health_report, "check", lambda: go_on.wait(60))
    slow.setattr("llm_service.health.HEALTH_S", 0.2)
    first = threading.Thread(target=app.health_report.report)
    first.start()
    wait_for(app.health_report._checks._lock.locked, 30, "the first check")
    with pytest.raises(ServiceError) as caught:
        app.health_report.report()
    go_on.set()
    first.join()
    assert (caught.value.code, caught.value.fields["recommended_action"]) == ("timeout", "wait")


@pytest.mark.parametrize(
    ("ended_s", "there", "expected"),
    [
        (5, False, ("ollama_dead", "wait")),
        (61, False, ("ollama_dead", "restart_service")),
        (5, True, ("ollama_dead", "wait")),
        (16, True, ("ollama_dead", "reboot_host")),
    ],
)
@pytest.mark.usefixtures("server")
def test_an_end_is_waited_for_but_not_for_ever(monkeypatch, ended_s, there, expected):
    state = app.watch.server_state
    monkeypatch.setattr(state, "ended_s", lambda: ended_s)
    monkeypatch.setattr(app.processes, "ending", lambda _: True)
    if not there:
        monkeypatch.setattr(app.processes, "server", lambda: None)
    assert diagnosis(Unreachable, None) == expected


def test_a_store_without_rights_gets_none_by_a_restart():
    error = ServiceError("store_not_writable", "permission denied")
    assert app.health_report.diagnose(error, None)[::2] == ("model_store_unreadable", "wait")


# What the metric says


@pytest.mark.parametrize(
    ("answered", "state", "up"),
    [(True, "answering", True), (False, "starting", False), (True, "silent", False)],
)
@pytest.mark.usefixtures("server")
def test_it_is_up_only_where_the_server_that_is_there_has_answered(
    monkeypatch, answered, state, up
):
    known = app.watch.server_state
    monkeypatch.setattr(known, "answered", app.processes.server() if answered else None)
    monkeypatch.setattr(known, "state", state)
    monkeypatch.setattr(app.watch, "well", True)
    assert app.health_report.is_up(app.processes.server()) is up


@pytest.mark.parametrize("looks", [1, 3])
def test_a_gpu_is_lost_after_three_looks(monkeypatch, looks):
    monkeypatch.setattr(app.machine, "gpu", {**app.machine.gpu, "state": "lost"})
    monkeypatch.setattr(app.machine, "_same_looks", looks)
    assert (app.health_report._gpu_fault() is not None) is (looks == 3)


# Callers and long answers


@pytest.fixture
def callers(monkeypatch):
    """What is known of who waits for Ollama."""
    known = app.watch.callers
    report = {"connections": 3, "waiting": 2, "longest_wait_s": 130.0}
    monkeypatch.setattr(known, "report", report)
    for name in ("starved", "_queue"):
        monkeypatch.setattr(known, name, "")
    return known


@pytest.mark.usefixtures("server")
def test_who_waits_in_vain_makes_it_a_503_and_not_up(callers, slow):
    slow.setattr(app.watch, "well", True)
    slow.setattr(app.watch.server_state, "state", "answering")
    slow.setattr(app.watch.ollama, "tags", lambda *_: [])
    slow.setattr(app.watch.server_state, "loaded_now", lambda *_: [])
    assert app.health_report.is_up(app.processes.server())
    callers.starved = "callers have waited for up to 130 s"
    assert not app.health_report.is_up(app.processes.server())
    with pytest.raises(ServiceError) as caught:
        app.health_report.check()
    assert caught.value.code == "callers_starved"
    assert caught.value.fields["recommended_action"] == "wait"
    assert "130 s" in caught.value.fields["reason"]


def warnings():
    return app.health_report.find_warnings(app.machine.gpu, [])


@pytest.fixture
def on_gpus(monkeypatch):
    """Return which warnings there are of models {name: (its GPUs, MB that Ollama claims)}."""

    def warned(used, models):
        gpus = [
            {"index": n, "name": "H200", "uuid": f"GPU-{n}", "memory_used_mb": mb}
            for n, mb in enumerate(used)
        ]
        reading = {"state": "ok", "memory_shared": False, "gpus": gpus}
        states = []
        for name, (seen, _) in models.items():
            state = RunnerState(Runner(psutil.Process(), None, None, gpus=seen), 0, 120)
            state.model, state.loaded_at = name, 1.0
            states.append(state)
        monkeypatch.setattr(app.watch, "states", lambda: states)
        monkeypatch.setattr(app.watch, "gpu_read_at", 2.0)
        monkeypatch.setattr(app.health_report, "_gpu_layers", "33")
        loaded = [
            {"name": name, "size": 4400 << 20, "size_vram": claimed << 20}
            for name, (_, claimed) in models.items()
        ]
        told = app.health_report.find_warnings(reading, loaded)
        return [each for each in told if each["code"] in ("model_on_cpu", "gpu_not_used")]

    return warned


@pytest.mark.parametrize(
    ("used", "models", "named"),
    [
        # Another program's 20 GB lie on the first one
        ((20_000, 0), {"a": ("1", 4400)}, ["GPU 1,"]),
        ((20_000, 0), {"a": ("", 4400)}, ["the GPU,"]),
        ((20_000, 5000), {"a": ("1", 4400)}, []),
        ((5000, 5000), {"a": ("0", 4400), "b": ("1", 4400)}, []),
        ((10_000, 0), {"a": ("0", 4400), "b": ("1", 4400)}, ["GPU 1,"]),
        ((5000, 5000), {"a": ("1", 4400), "b": ("1", 4400)}, ["GPU 1,"]),
        ((2500, 2500), {"a": ("0,1", 4400)}, []),
        ((2000, 2000), {"a": ("0,1", 4400)}, ["GPU 0, 1,"]),
        ((5000, 2500), {"a": ("0,1", 4400), "b": ("0", 4400)}, ["GPU 0, 1,"]),
        ((2500, 2500), {"a": (None, 4400)}, []),
    ],
)
def test_what_ollama_claims_is_measured_on_the_model_s_own_gpus(on_gpus, used, models, named):
    told = [each["message"] for each in on_gpus(used, models)]
    assert len(told) == len(named)
    assert all(name in message for name, message in zip(named, told, strict=True))


@pytest.mark.parametrize(("seen", "advice"), [("1", "LLM_GPU_LAYERS=all"), ("", "sees no GPU")])
def test_advice_for_a_model_on_the_cpu_is_by_its_own_gpus(on_gpus, seen, advice):
    first, *_ = on_gpus((20_000, 3000), {"a": (seen, 2500)})
    assert first["code"] == "model_on_cpu" and advice in first["message"]


def test_who_waits_for_long_is_a_warning_with_figures(callers):
    assert "callers_waiting" not in {each["code"] for each in warnings()}
    callers._queue = "2 callers of Ollama have waited for up to 130 s"
    (warning,) = [each for each in warnings() if each["code"] == "callers_waiting"]
    assert warning["message"].startswith("2 callers of Ollama have waited for up to 130 s")
    assert (warning["waiting"], warning["longest_wait_s"]) == (2, 130.0)


@pytest.mark.parametrize(("loaded", "warned"), [("m:7b", True), ("M:latest", False)])
def test_a_load_that_has_failed_is_no_news_once_the_model_is_loaded(monkeypatch, loaded, warned):
    load = {"model": "m", "state": "failed", "error": "no memory"}
    monkeypatch.setattr(app.session.loader, "load", load)
    told = app.health_report.find_warnings(app.machine.gpu, [{"name": loaded}])
    assert ("load_failed" in {each["code"] for each in told}) is warned


@pytest.mark.parametrize(("age_s", "warned"), [(3590, False), (3610, True)])
def test_an_answer_of_more_than_an_hour_is_a_warning(monkeypatch, age_s, warned):
    state = RunnerState(Runner(psutil.Process(), None, None), 0, 120)
    state.model = "m:latest"
    state.answers.note(time.monotonic() - age_s, [{"is_processing": True, "id_task": 7}])
    monkeypatch.setattr(app.watch, "_states", {state.runner: state})
    told = [each for each in warnings() if each["code"] == "long_answer"]
    assert len(told) == warned
    for each in told:
        assert (each["model"], each["task"], each["tokens"]) == ("m:latest", 7, 0)
        assert 3600 < each["seconds"] < 3620
