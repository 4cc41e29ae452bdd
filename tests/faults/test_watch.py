"""Real faults, and a service that sees and heals them without being asked to.

Timings here are the contract's limits, and short ones set on purpose.
"""

import os
import re
import signal
import sys
import time

import psutil
import pytest

import app
from helpers.answers import CLEAR, GEMMA, ask, clear, error, health, reset, stats, wait_loaded
from helpers.causes import Waiting
from helpers.embedding import add_embedding_model
from helpers.frozen import frozen
from helpers.generation import Generation
from helpers.places import ROOT
from helpers.ports import free_port
from helpers.processes import is_gone, suspend
from helpers.waiting import wait_for
from llm_service.processes import Runner
from llm_service.runner_state import RunnerState

M1, M2 = "m1:latest", "m2:latest"
STUCK_S = 3
# So that ten looks are over in three seconds, and all the other times are as short.
QUICK = {
    "llm_service.watch.LOOK_S": 0.3,
    "llm_service.runner_state.GAP_S": 4,
    "llm_service.runner_state.GHOST_S": 2,
    "llm_service.runner_state.SILENT_S": 2,
    "llm_service.watch.LONG_IDLE_S": 2,
    "llm_service.server_state.HUNG_LOOKS": 8,
}


# A stand-in: `ollama serve` with one `ollama runner`, which works as long as there is a file.
STAND_IN = """#!{python}
import json, os, signal, subprocess, sys, time
sys.path.insert(0, "{tests}")
from helpers.fake_ollama import FakeOllama, http
MODEL = {{"name": "mlx:latest", "size": 300 << 20, "size_vram": 300 << 20}}
SANE = {{"/api/version": http('{{"version": "0.0.0"}}'), "/api/tags": http('{{"models": []}}')}}
if sys.argv[1] == "serve":
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # which reaps
    port = os.environ["OLLAMA_HOST"].rpartition(":")[2]
    subprocess.Popen([__file__, "runner", "--model", "mlx:latest", "--port", "{port}"])
    routes = SANE | {{"/api/ps": http(json.dumps({{"models": [MODEL]}}))}}
else:
    port, routes = {port}, {{"/health": http("{{}}")}}
with FakeOllama(routes, int(port)):
    while True:
        while sys.argv[1] == "runner" and os.path.exists(os.environ["WORK"]):
            pass
        time.sleep(0.05)
"""


class Faults:
    """What /health said of a fault, and what healed it."""

    def __init__(self, service):
        self.service, self.began = service, time.monotonic()
        self.seen = []

    def told(self):
        """Ask /health once; keep what it said and when."""
        answer = self.service.get("/health")
        seconds = time.monotonic() - self.began
        assert answer.elapsed.total_seconds() < 3
        said = answer.json()
        verdict = said.get("code", "healthy"), said["recommended_action"]
        if verdict not in self.seen:
            print(f"{seconds:5.1f} s: {verdict}")
            self.seen.append(verdict)
        return said

    def wait(self, condition, timeout, what):
        """Poll /health until it says what is waited for."""
        wait_for(lambda: condition(self.told()), timeout, what)

    def wait_healed(self, timeout, **counts):
        """Wait until so many were healed and all is well; return the last healing."""

        def healed():
            self.told()
            so_far = stats(self.service)["healed"]
            return {key: so_far[key] for key in counts} == counts and so_far

        found = wait_for(healed, timeout, f"healed: {counts}")
        self.wait(lambda said: said["status"] == "healthy", 60, "healthy again")
        print(f"{time.monotonic() - self.began:5.1f} s: healed {found['last']}")
        return found["last"]

    def works(self, name):
        """Assert that the next answer of a model works."""
        began = time.monotonic()
        ask(self.service, name)
        print(f"the next answer of {name} took {time.monotonic() - began:.1f} s")


def state_of(service, runner):
    """Return the state of a runner; None for one that is not listed."""
    shown = {each["pid"]: each["state"] for each in stats(service)["runners"]}
    return shown.get(runner.pid)


def wait_state(service, runner, state):
    wait_for(lambda: state_of(service, runner) == state, 60, f"{runner.pid} is {state}")


@pytest.fixture(scope="module")
def quick(make_module_service, make_gguf_variant):
    """A service of two models that looks often, and heals."""
    return make_module_service(
        models={name: make_gguf_variant(n) for n, name in enumerate((M1, M2), 1)},
        LLM_MODEL="m1",
        LLM_CONTEXT_LENGTH=1024,
        LLM_STUCK_SECONDS=STUCK_S,
        constants=QUICK | {"llm_service.healing.HEALINGS": 1000},
    )


@pytest.fixture
def well(quick):
    """The same, with nothing loaded; and what was healed before is counted away."""
    quick.wait_healthy(60)
    clear(quick)
    before = stats(quick)["healed"]
    quick.healed = {key: before[key] for key in ("runners", "ollama")}
    return quick


def more(service, **counts):
    return {key: service.healed[key] + counts.get(key, 0) for key in service.healed}


@pytest.fixture(scope="module")
def off(make_module_service, make_gguf_variant):
    """A service that heals nothing by itself."""
    return make_module_service(
        models={M1: make_gguf_variant(1)},
        LLM_MODEL="m1",
        LLM_CONTEXT_LENGTH=1024,
        LLM_STUCK_SECONDS=STUCK_S,
        LLM_SELF_HEAL="off",
        constants=QUICK,
    )


# A decode loop that stands


def test_one_of_two_is_stuck_and_the_other_goes_on(well):
    held, other = Waiting(well, M1), well.generate(M2)
    server, started = well.ollama_pid(), len(well.log())
    with frozen(held.runner):
        faults = Faults(well)
        last = faults.wait_healed(60, **more(well, runners=1))
        assert is_gone(held.runner)
        assert held.status() == 500
    assert set(faults.seen) <= {("healthy", "none"), ("runner_stuck", "wait")}
    assert last["what"] == M1 and last["why"].startswith("stuck: for ")
    assert well.log()[started:].count(" ERROR healed ") == 1
    other.goes_on()
    other.close()
    faults.works(M1)
    assert well.ollama_pid() == server


def test_a_loop_held_while_idle_is_stuck_once_it_is_asked(well):
    runner = well.load(M1)
    wait_state(well, runner, "idle")
    with frozen(runner):
        faults = Faults(well)
        caller = Generation(well.ollama_port, M1)
        faults.wait_healed(60, **more(well, runners=1))
    assert caller.wait(30).status == 500 or caller.error
    faults.works(M1)


@pytest.mark.parametrize("busy", [True, False])
def test_a_ghost_is_healed_by_a_restart_of_the_server(well, busy):
    runner = Waiting(well, M1).runner if busy else well.load(M1)
    server = well.ollama_pid()
    with frozen(runner, reap=False):
        runner.kill()
        faults = Faults(well)
        last = faults.wait_healed(60, **more(well, ollama=1))
    allowed = {"none", "wait"}
    assert {seen for seen in faults.seen if seen[1] not in allowed} == set()
    assert last["why"].startswith("ghost: ")
    assert well.ollama_pid() != server
    faults.works(M1)


def test_a_stuck_one_that_is_not_reaped_is_healed_as_a_ghost(well):
    held = Waiting(well, M1)
    with frozen(held.runner, reap=False):
        faults = Faults(well)
        faults.wait_healed(60, **more(well, runners=1, ollama=1))
    assert ("runner_stuck", "reset_session") not in faults.seen
    faults.works(M1)


# Stopped


@pytest.mark.parametrize("busy", [True, False])
def test_a_stopped_runner_is_silent_and_ended(well, busy):
    waiting = Waiting(well, M1) if busy else None
    runner = waiting.runner if busy else well.load(M1)
    server = well.ollama_pid()
    suspend(runner)
    faults = Faults(well)
    last = faults.wait_healed(60, **more(well, runners=1))
    assert is_gone(runner)
    assert set(faults.seen) <= {("healthy", "none"), ("runner_silent", "wait")}
    assert last["why"].startswith("silent: ")
    if busy:
        assert waiting.status() == 500
    faults.works(M1)
    assert well.ollama_pid() == server


def test_a_stopped_server_is_restarted(well):
    well.load(M1)
    server = psutil.Process(well.ollama_pid())
    suspend(server)
    faults = Faults(well)
    last = faults.wait_healed(90, **more(well, ollama=1))
    assert ("ollama_hung", "reset_session") in faults.seen
    assert is_gone(server) and last["what"] == "Ollama"
    faults.works(M1)


# Killed


def tokens_of(service, name):
    """Return what the runners of a model have decoded, as /metrics tells it."""
    found = re.findall(
        rf'^llm_runner_tokens_total{{model="{name}"}} (\S+)', service.get("/metrics").text, re.M
    )
    return float(found[0]) if found else 0


def test_what_a_runner_decoded_before_it_was_killed_is_counted(well):
    """Its own totals rise at the end of an answer only."""
    before = tokens_of(well, M1)
    generation = well.generate(M1)
    (runner,) = well.runners()

    def tokens():
        return stats(well)["runners"][0]["tokens"]

    wait_for(lambda: tokens() > 10, 60, "some tokens")
    seen = tokens()
    runner.kill()
    generation.wait(60)
    wait_for(lambda: tokens_of(well, M1) >= before + seen, 30, "they are counted")


def test_a_killed_server_comes_back_and_is_not_counted(well):
    runner = well.load(M1)
    os.kill(well.ollama_pid(), signal.SIGKILL)
    faults = Faults(well)
    faults.wait(lambda said: said["status"] == "unhealthy", 10, "seen")
    faults.wait(lambda said: said["status"] == "healthy", 60, "healthy again")
    assert is_gone(runner)
    assert {action for _, action in faults.seen} <= {"none", "wait"}
    faults.works(M1)
    assert stats(well)["healed"]["ollama"] == well.healed["ollama"]


def test_a_busy_runner_killed_from_outside_leaves_the_list_and_the_server(well):
    waiting, server = Waiting(well, M1), well.ollama_pid()
    other = well.generate(M2)
    waiting.runner.kill()
    faults = Faults(well)
    faults.wait(lambda said: said.get("loaded") == [M2], 60, "the list is clean")
    assert faults.seen == [("healthy", "none")]
    other.goes_on()
    other.close()
    faults.works(M1)
    assert well.ollama_pid() == server
    so_far = stats(well)["healed"]
    assert {key: so_far[key] for key in well.healed} == well.healed


# What is healthy


def test_a_batch_that_takes_longer_than_the_time_is_busy(well, others):
    runner = well.load(M1, num_ctx=8192)
    wait_state(well, runner, "idle")
    prompt = " ".join(map(str, range(280)))  # a batch of 1,024 tokens takes 4 s or more
    body = {"model": M1, "prompt": prompt, "raw": True, "stream": False}
    body["options"] = {"num_ctx": 8192, "num_predict": 1}
    began = time.monotonic()
    answer = others.submit(well.ollama, "POST", "/api/generate", json=body)
    wait_state(well, runner, "busy")
    seen = set()
    while not answer.done():
        seen.add(state_of(well, runner))
        time.sleep(0.1)
    print(f"{answer.result().json()['prompt_eval_count']} in {time.monotonic() - began:.1f} s")
    assert seen <= {"busy", "idle"} and answer.result().status_code == 200
    wait_state(well, runner, "idle")


def test_a_pause_of_everything_is_no_verdict(well):
    waiting, other = Waiting(well, M1), well.generate(M2)
    for process in well.processes():
        process.suspend()
    time.sleep(STUCK_S + 3)
    for process in reversed(well.processes()):
        process.resume()
    faults = Faults(well)
    until = time.monotonic() + 4
    while time.monotonic() < until:
        faults.told()
    assert {code for code, _ in faults.seen} == {"healthy"}
    other.goes_on()
    other.close()
    assert waiting.answer is None and not is_gone(waiting.runner)
    so_far = stats(well)["healed"]
    assert {key: so_far[key] for key in well.healed} == well.healed


def test_a_model_deleted_while_it_is_loaded_is_no_fault(well, make_gguf_variant):
    well.add_model("gone:latest", make_gguf_variant(3))
    runner = well.load("gone")
    assert well.ollama("DELETE", "/api/delete", json={"model": "gone"}).status_code == 200
    faults = Faults(well)
    busy = well.generate(M2)
    faults.wait(lambda _: state_of(well, runner) == "idle", 60, "idle")
    assert clear(well)["verified"] is True
    faults.told()
    assert is_gone(runner)
    busy.wait(30)
    assert {code for code, _ in faults.seen} <= {"healthy"}
    faults.works(M2)


def test_a_model_updated_while_it_is_stuck_loses_no_other_runner(well, make_gguf_variant):
    well.add_model("new:latest", make_gguf_variant(3))
    old = Waiting(well, "new:latest")
    well.add_model("new:latest", make_gguf_variant(4))
    with frozen(old.runner):
        runner = well.load("new")
        assert runner != old.runner
        Faults(well).wait_healed(60, **more(well, runners=1))
        assert is_gone(old.runner) and not is_gone(runner)
    wait_state(well, runner, "idle")


# Runners of other kinds


def test_a_runner_without_slots_is_unwatched_while_it_uses_cpu(make_service, tmp_path):
    """MLX has none, and neither has Ollama's older runner."""
    program, work = tmp_path / "ollama", tmp_path / "work"
    port = free_port()
    program.write_text(STAND_IN.format(python=sys.executable, tests=ROOT / "tests", port=port))
    program.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    service = make_service(PATH=path, WORK=work, LLM_STUCK_SECONDS=1, constants=QUICK)
    (runner,) = wait_for(service.runners, 30, "the runner")
    wait_state(service, runner, "idle")
    work.touch()
    wait_state(service, runner, "unwatched")
    until = time.monotonic() + 5
    while time.monotonic() < until:
        assert state_of(service, runner) == "unwatched"
        time.sleep(0.05)  # else the questions take the CPU that it shall use
    assert [each["model"] for each in stats(service)["runners"]] == ["mlx:latest"]
    work.unlink()
    wait_state(service, runner, "idle")
    suspend(runner)
    Faults(service).wait_healed(60, runners=1)
    assert is_gone(runner)


EMBEDDER = "embedder:latest"
TEXT = "some words to embed " * 30


def embed(service, count):
    """Embed so many texts; return the answer."""
    body = {"model": EMBEDDER, "input": [f"{number} {TEXT}" for number in range(count)]}
    return service.ollama("POST", "/api/embed", json=body)


@pytest.fixture
def embedder(well):
    """The runner of an embedding model, which cannot generate."""
    add_embedding_model(well.models, EMBEDDER)
    assert reset(well, model=EMBEDDER)["model"] == EMBEDDER
    wait_loaded(well, EMBEDDER)
    (runner,) = well.runners()
    wait_state(well, runner, "idle")
    return runner


def test_embeddings_are_work_and_no_standstill(well, embedder, others):
    """Some at a time, as one takes 0.2 s, and ten times that where others have the CPU."""
    seen, began = set(), time.monotonic()
    while time.monotonic() - began < 4 * STUCK_S:
        answer = others.submit(embed, well, 20)
        while not answer.done():
            seen.add(state_of(well, embedder))
            time.sleep(0.1)
        assert answer.result().status_code == 200
        assert len(answer.result().json()["embeddings"]) == 20
    assert "busy" in seen and seen <= {"busy", "idle"}
    wait_state(well, embedder, "idle")


def test_an_embedding_that_stands_is_stuck_and_healed(well, embedder, others):
    with frozen(embedder):
        answer = others.submit(embed, well, 1)
        last = Faults(well).wait_healed(60, **more(well, runners=1))
        assert answer.result().status_code >= 400
    assert last["what"] == EMBEDDER
    assert embed(well, 1).status_code == 200


# What Ollama says of the GPU


@pytest.mark.parametrize(
    "claimed, used, layers, codes",
    [
        (0, 5120, 33, ["model_on_cpu"]),
        (150, 5120, 33, ["model_on_cpu"]),
        (300, 5120, 33, []),
        (0, 5120, 0, []),
        (300, 100, 33, ["gpu_not_used"]),
        (150, 0, 33, ["model_on_cpu", "gpu_not_used"]),
    ],
)
def test_what_ollama_says_of_the_gpu_is_checked(monkeypatch, claimed, used, layers, codes):
    reading = {"memory_shared": False}
    monkeypatch.setattr(app.health_report, "_gpu_layers", str(layers))
    model = {"name": "m", "size": 300 << 20, "size_vram": claimed << 20}
    found = app.health_report.gpu_warnings(reading, [model], {"m": {0: used}})
    assert [code for code, _ in found] == codes
    for code, words in found:
        wanted = {"model_on_cpu": "LLM_GPU_LAYERS", "gpu_not_used": "driver"}[code]
        assert wanted in words and "LLM_RUNTIME" in words


def test_where_the_gpu_is_hidden_more_layers_are_no_advice(monkeypatch):
    reading = {"memory_shared": False}
    places = {"m": {0: 0}}
    monkeypatch.setattr(app.health_report, "_gpu_layers", "33")
    model = {"name": "m", "size": 300 << 20, "size_vram": 150 << 20}
    (code, words), _ = app.health_report.gpu_warnings(reading, [model], places)
    assert code == "model_on_cpu" and "LLM_GPU_LAYERS=all" not in words
    places["m"] = {0: 151}
    ((code, words),) = app.health_report.gpu_warnings(reading, [model], places)
    assert code == "model_on_cpu" and "LLM_GPU_LAYERS=all" in words
    for all_layers in ("all", "-1"):
        monkeypatch.setattr(app.health_report, "_gpu_layers", all_layers)
        ((code, words),) = app.health_report.gpu_warnings(reading, [model], places)
        assert code == "model_on_cpu" and "smaller model" in words and "LAYERS=" not in words


@pytest.mark.parametrize(("loaded_at", "codes"), [(None, []), (7.1, []), (6.9, ["gpu_not_used"])])
def test_a_model_that_was_not_loaded_when_the_gpu_was_read_is_not_measured(
    monkeypatch, loaded_at, codes
):
    gpu = {"index": 0, "memory_used_mb": 0, "memory_total_mb": 65536}
    reading = {"state": "ok", "memory_shared": False, "gpus": [gpu]}
    runner = RunnerState(Runner(psutil.Process(), None, None), 0, 120)
    runner.model, runner.loaded_at = "m", loaded_at
    monkeypatch.setattr(app.watch, "states", lambda: [runner])
    monkeypatch.setattr(app.watch, "gpu_read_at", 7.0)
    model = {"name": "m", "size": 300 << 20, "size_vram": 300 << 20}
    found = app.health_report.find_warnings(reading, [model])
    assert [each["code"] for each in found if each["code"] != "disk_low"] == codes


def test_a_model_in_system_memory_beside_a_gpu_is_a_warning(make_service, nvml, gguf):
    service = make_service(models={GEMMA: gguf}, LLM_MODEL=GEMMA, **nvml.env)
    assert health(service)["warnings"] == []
    service.load(GEMMA)
    # Only of a runner that the watch has seen: Ollama may list dead ones.
    told = wait_for(lambda: health(service)["warnings"] and health(service), 60, "a warning")
    (warning,) = told["warnings"]
    assert (told["status"], warning["code"]) == ("healthy", "model_on_cpu")
    assert GEMMA in warning["message"] and told["warning"] == warning["message"]


# The log


def test_nothing_is_logged_while_two_models_are_idle(well):
    runners = [well.load(name) for name in (M1, M2)]
    for runner in runners:
        wait_state(well, runner, "idle")
    for _ in range(3):  # a list of what has changed within a second is asked for once more
        health(well)  # where the list of models is new, Ollama warns of their templates
        time.sleep(1)
    # Ollama keeps its connections to a runner for five seconds. Their end may cost the runner so
    # much CPU that the next look asks it once more.
    time.sleep(9)
    start = len(well.log())
    for _ in range(20):
        health(well)
        assert well.get("/livez").json() == {"status": "alive"}
        assert well.get("/metrics").ok
        time.sleep(0.3)
    assert well.log()[start:] == ""


# Without self-healing


def test_without_self_healing_health_says_what_a_reset_then_heals(off):
    held = Waiting(off, M1)
    with frozen(held.runner):
        faults = Faults(off)
        faults.wait(lambda said: said.get("code") == "runner_stuck", 60, "stuck")
        assert faults.seen[-1] == ("runner_stuck", "reset_session")
        assert off.get("/livez").json() == {"status": "alive"}
        assert not is_gone(held.runner)
        assert reset(off)["model"] == "m1"
        assert is_gone(held.runner)
    wait_loaded(off, M1)
    health(off)
    faults.works(M1)
    assert stats(off)["healed"] == {"runners": 0, "ollama": 0, "failed": 0, "last": None}


def test_without_self_healing_a_reset_heals_a_ghost(off):
    off.wait_healthy(60)
    clear(off)  # whatever the test before left
    runner, server = off.load(M1), off.ollama_pid()
    with frozen(runner, reap=False):
        runner.kill()
        faults = Faults(off)
        faults.wait(lambda said: said.get("code") == "runner_ghost", 60, "a ghost")
        assert faults.seen[-1] == ("runner_ghost", "reset_session")
        told = error(off.post(CLEAR), 503, "runner_ghost")
        assert (told["recommended_action"], told["verified"]) == ("reset_session", False)
        reset(off)
        assert off.ollama_pid() != server
        off.wait_healthy(60)
    wait_loaded(off, M1)
    faults.works(M1)


# Again and again


def test_after_three_healings_the_model_is_left_alone(make_service, make_gguf_variant):
    service = make_service(
        models={M1: make_gguf_variant(1)},
        LLM_MODEL="m1",
        LLM_CONTEXT_LENGTH=1024,
        constants=QUICK | {"llm_service.runner_state.SILENT_S": 1},
    )
    for number in range(1, 4):
        suspend(service.load(M1))
        Faults(service).wait_healed(60, runners=number)
    fourth = service.load(M1)
    suspend(fourth)
    faults = Faults(service)
    faults.wait(lambda said: said.get("code") == "runner_silent", 60, "silent")
    assert faults.seen[-1] == ("runner_silent", "restart_service")
    assert not is_gone(fourth)
    clear(service)
    service.wait_healthy(60)
