"""Random faults and calls, after which all is well and nothing is left over."""

import concurrent.futures
import contextlib
import os
import random
import signal
import time
from collections import Counter

import psutil
import pytest
import requests

from helpers.answers import CLEAR, RESET, ask, stats
from helpers.frozen import frozen
from helpers.generation import Generation
from helpers.listener import PULL
from helpers.waiting import wait_for

SEED, STEPS = 5, int(os.environ.get("LLM_TEST_SOAK_STEPS") or 100)
ANSWER_S = 5  # the watchdog's patience
MODELS = ["m1:latest", "m2:latest"]


class Soak:
    def __init__(self, service, registry):
        self.service, self.random = service, random.Random(SEED)
        self.generations, self.kills, self.late, self.wrong = [], [], [], []
        self.statuses, self.longest = Counter(), {}
        self.pullable = registry.add_random("ns/soak:latest", 40)
        self.pool = concurrent.futures.ThreadPoolExecutor(16)
        self.tracers = contextlib.ExitStack()
        registry.rate = 5e6

    def call(self, path, healthy=(200,), method="POST", **fields):
        send = getattr(self.service, method.lower())
        began = time.monotonic()
        try:
            answer = send(path, timeout=30, **({"json": fields} if fields else {}))
            status, text = answer.status_code, answer.text
        except requests.RequestException as error:
            status, text = None, repr(error)
        seconds = time.monotonic() - began
        self.statuses[f"{path} {status}"] += 1
        self.longest[path] = max(seconds, self.longest.get(path, 0))
        if seconds > ANSWER_S:
            self.late.append((path, fields, round(seconds, 2)))
        # Only a reset, or the service itself, ends a ghost.
        ghost = path == CLEAR and status == 503 and '"runner_ghost"' in text
        if status not in healthy and not ghost:
            self.wrong.append((path, fields, status, text[:300]))

    # What callers do

    def clear(self):
        self.call(CLEAR)

    def clear_gently(self):
        self.call(CLEAR, force=False)

    def clear_one(self):
        self.call(CLEAR, model=self.random.choice(MODELS))

    def reset(self):
        self.call(RESET)

    def reset_with_restart(self):
        self.call(RESET, restart=True, model=self.random.choice(MODELS))

    def health(self):
        self.call("/health", (200, 503), "GET")

    def stats(self):
        self.call("/api/stats", method="GET")

    def absent(self):
        self.call(self.random.choice([CLEAR, RESET]), (404,), model="absent:1b")

    def several_at_once(self):
        calls = [
            (CLEAR,),
            (RESET,),
            (CLEAR,),
            (RESET,),
            ("/health", (200, 503), "GET"),
            ("/api/stats", (200,), "GET"),
        ]
        list(self.pool.map(lambda one: self.call(*one), calls))

    def generate(self):
        model = self.random.choice(MODELS)
        self.generations.append(Generation(self.service.ollama_port, model))

    def leave(self):
        if self.generations:
            self.generations.pop(0).close()

    def pull_and_leave(self):
        body = {"model": self.pullable, "insecure": True}
        with (
            contextlib.suppress(requests.RequestException),
            self.service.post(PULL, json=body, stream=True, timeout=(2, 2)) as answer,
        ):
            next(answer.iter_content(100), None)

    # What goes wrong

    def signal_a_runner(self, sig):
        with contextlib.suppress(psutil.NoSuchProcess, IndexError):
            self.random.choice(self.service.runners()).send_signal(sig)

    def signal_ollama(self, sig):
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(self.service.ollama_pid()).send_signal(sig)

    def stop_a_runner(self):
        self.signal_a_runner(signal.SIGSTOP)

    def kill_a_runner(self):
        self.signal_a_runner(signal.SIGKILL)

    def hold(self, runner, reap=True):
        """Have a decode loop stand, as when a kernel on the GPU never returns."""
        with contextlib.suppress(psutil.NoSuchProcess, AssertionError):
            self.tracers.enter_context(frozen(runner, reap, answering=False))  # it may be stopped
            return runner
        return None  # it has ended, or is held already

    def hold_a_runner(self, reap=True):
        with contextlib.suppress(IndexError):
            return self.hold(self.random.choice(self.service.runners()), reap)
        return None

    def hold_all_runners(self):
        """Have the models fail at once, as on one GPU."""
        for model in MODELS:
            self.generations.append(Generation(self.service.ollama_port, model))
        with contextlib.suppress(AssertionError):  # one that fails already is not loaded now
            wait_for(lambda: len(self.service.runners()) == len(MODELS), 3, "both are there")
        list(self.pool.map(self.hold, self.service.runners()))

    def make_a_ghost(self):
        runner = self.hold_a_runner(reap=False)
        if runner:
            runner.kill()

    def stop_ollama(self):
        """Stop one that has answered: one that starts is given 300 s by the contract."""
        pid = self.service.ollama_pid()
        code = self.service.get("/health", timeout=30).json().get("code")
        starts = code in ("ollama_starting", "ollama_dead")
        if not starts and pid == self.service.ollama_pid():
            self.signal_ollama(signal.SIGSTOP)

    def kill_ollama(self):
        # More deaths in a minute are a broken Ollama, with which the launcher ends.
        self.kills = [at for at in self.kills if time.monotonic() - at < 70]
        if len(self.kills) < 3:
            self.kills.append(time.monotonic())
            self.signal_ollama(signal.SIGKILL)


# What is done, and how often compared with the others.
CALLS = {
    Soak.clear: 5,
    Soak.clear_gently: 3,
    Soak.clear_one: 3,
    Soak.reset: 4,
    Soak.reset_with_restart: 2,
    Soak.health: 5,
    Soak.stats: 4,
    Soak.absent: 1,
    Soak.several_at_once: 2,
    Soak.generate: 9,
    Soak.leave: 2,
    Soak.pull_and_leave: 1,
    Soak.stop_a_runner: 5,
    Soak.kill_a_runner: 2,
    Soak.hold_a_runner: 4,
    Soak.hold_all_runners: 2,
    Soak.make_a_ghost: 1,
    Soak.stop_ollama: 2,
    Soak.kill_ollama: 1,
}
FAULTS = (
    Soak.stop_a_runner,
    Soak.kill_a_runner,
    Soak.hold_a_runner,
    Soak.hold_all_runners,
    Soak.make_a_ghost,
    Soak.stop_ollama,
    Soak.kill_ollama,
)


def held(worker):
    """Return the threads and open files of the worker."""
    return worker.num_threads(), worker.num_fds()


def wait_default_loaded(service):
    def loaded():
        return service.get("/health").json().get("loaded") == ["m1:latest"]

    wait_for(loaded, 60, "the default model is loaded")


def answers(service, name):
    """Tell whether a model answers; one that hangs is healed meanwhile."""
    body = {"model": name, "prompt": "1 2 3", "stream": False, "options": {"num_predict": 3}}
    return service.ollama("POST", "/api/generate", json=body, timeout=40).ok


def take_steps(soak, steps, count):
    for number in range(1, count + 1):
        (step,) = soak.random.choices(list(steps), steps.values())
        step(soak)
        # So that faults and calls meet models that load, answer and unload.
        time.sleep(soak.random.uniform(0, 1))
        print(f"{number}: {step.__name__}")
        assert not soak.late and not soak.wrong, f"{soak.late} {soak.wrong}"
        assert soak.service.process.poll() is None, "start.sh ended"
    print(f"{dict(soak.statuses)}, longest: {soak.longest}")


def assert_one_of_each_is_left(service):
    (loaded,) = service.runners()

    def shown():
        return [runner["pid"] for runner in service.get("/api/stats").json()["runners"]]

    wait_for(lambda: shown() == [loaded.pid], 30, "the watch's list")
    running = [" ".join(process.cmdline()) for process in service.processes()]
    assert sum("llama-server" in line for line in running) == 1, running
    assert sum(line.endswith(" serve") for line in running) == 1, running


@pytest.fixture
def soak(make_service, make_gguf_variant, registry):
    models = {name: make_gguf_variant(n) for n, name in enumerate(MODELS, 1)}
    service = make_service(
        models=models,
        LLM_MODEL="m1",
        LLM_CONTEXT_LENGTH=1024,
        LLM_STUCK_SECONDS=5,
        # More looks and more healings than in half an hour of real life.
        constants={"llm_service.watch.LOOK_S": 0.5, "llm_service.healing.HEALINGS": 1000},
    )
    return Soak(service, registry)


def assert_all_answers(soak):
    """Assert that the service has become well by itself, and that each model answers."""
    while soak.generations:
        soak.leave()
    soak.service.wait_healthy(60)
    for name in MODELS:
        wait_for(lambda name=name: answers(soak.service, name), 60, f"{name} answers")
    print(stats(soak.service)["healed"])


@pytest.mark.timeout(120 + 4 * STEPS)
def test_faults_are_healed_without_a_clear_or_a_reset(soak):
    kept = (Soak.health, Soak.stats, Soak.generate, Soak.leave, *FAULTS)
    take_steps(soak, {step: CALLS[step] for step in kept}, STEPS // 2)
    assert_all_answers(soak)
    soak.tracers.close()


@pytest.mark.timeout(120 + 4 * STEPS)
def test_random_faults_and_calls_leave_a_healthy_service(soak):
    service = soak.service
    soak.pull_and_leave()
    for _ in range(3):
        soak.several_at_once()
    worker = psutil.Process(service.worker_pid())
    # The server makes its threads on demand and keeps them: as many as are ever asked at once,
    # before the count.
    list(soak.pool.map(lambda _: soak.call("/health", method="GET"), range(64)))
    # Of those at once a clear may have been the last, which ends a load that is due.
    soak.call(RESET)
    wait_default_loaded(service)
    threads, files = held(worker)

    take_steps(soak, CALLS, STEPS)

    assert_all_answers(soak)
    soak.tracers.close()
    soak.call(RESET)
    service.wait_healthy(60)
    wait_default_loaded(service)
    assert not soak.late and not soak.wrong
    assert service.worker_pid() == worker.pid
    ask(service, "m1")
    assert_one_of_each_is_left(service)
    soak.pool.shutdown()
    wait_for(lambda: held(worker)[0] <= threads, 60, f"no more than {threads} threads")
    # A few more connections to Ollama may be kept open.
    wait_for(lambda: held(worker)[1] <= files + 4, 60, f"no more than {files} open files")
