"""Clear, reset, health and stats against real faults: stopped, killed, busy and orphaned processes."""
import concurrent.futures
import contextlib
import ctypes
import functools
import mmap
import os
import signal
import socket
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest
import requests

from conftest import CACHE, Generation, Service, call, marked, servers, wait_for
from ollama_client import Processes, Store

GEMMA = "gemma:latest"
CLEAR, RESET = "/api/cache/clear", "/api/session/reset"
LIMIT = {CLEAR: 4, RESET: 4.5, "/health": 3, "/api/stats": 1}


def post(service, path, limit=None, **fields):
    """A clear or reset that must succeed in its time, sent as the watchdog does if there are no fields."""
    answer = service.post(path, **({"json": fields} if fields else {}))
    seconds, report = answer.elapsed.total_seconds(), answer.json()
    steps = {step["step"]: step["seconds"] for step in report.get("steps", ())}
    print(f"{path} {fields or ''}: {seconds:.2f} s {report.get('message')} {steps}")
    assert answer.status_code == 200, answer.text
    assert seconds < (limit or LIMIT[path])
    assert report["status"] == "success"
    assert {CLEAR: "cache cleared", RESET: "session reset"}[path] in report["message"].lower()
    assert all(set(step) == {"step", "ok", "seconds", "detail"} for step in report["steps"])
    return report


def refused(service, path, status, **fields):
    answer = service.post(path, json=fields)
    assert answer.elapsed.total_seconds() < LIMIT[path]
    assert answer.status_code == status, answer.text
    assert answer.json()["status"] == "error"
    return answer.json()


def health(service, status=200, **query):
    answer = service.get("/health", params=query)
    assert answer.elapsed.total_seconds() < (10 if query else LIMIT["/health"])
    assert answer.status_code == status, answer.text
    return answer.json()


def stats(service):
    answer = service.get("/api/stats")
    assert answer.elapsed.total_seconds() < LIMIT["/api/stats"]
    return answer.json()


def wait_loaded(service, *names):
    def loaded():
        return {m["name"] for m in service.get("/api/models/loaded").json().get("loaded_models", ())} >= set(names)
    wait_for(loaded, 60, f"{names} loaded")


def ask(service, name=GEMMA):
    """A short generation that works."""
    answer = service.ollama("POST", "/api/generate", json={"model": name, "prompt": "1 2 3 4", "stream": False,
                                                           "options": {"num_predict": 3}}, timeout=120)
    assert answer.status_code == 200 and answer.json()["eval_count"] > 0, answer.text


def gone(process):
    """Dead; where its parent hangs or died it may stay as a zombie for a while, which holds no memory."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def own_mb(process):
    """What it holds beside the model's file, whose pages stay in the page cache."""
    return int(Path(f"/proc/{process.pid}/status").read_text().partition("RssAnon:")[2].split()[0]) >> 10


def port_of(runner):
    words = runner.cmdline()
    return words[words.index("--port") + 1]


class Waiting:
    """A caller who waits for the whole of a long answer, as n8n does; there once its runner is in the middle of it."""

    def __init__(self, service, name=GEMMA):
        self.answer = None
        self._thread = threading.Thread(target=self._run, args=(service, name), daemon=True)
        self.runner = service.load(name)
        self._thread.start()
        slots = f"http://127.0.0.1:{port_of(self.runner)}/slots"
        wait_for(lambda: any(slot["is_processing"] for slot in call("GET", slots).json()), 30, "an answer under way")

    def _run(self, service, name):
        body = {"model": name, "prompt": " ".join(map(str, range(1, 15))), "raw": True, "stream": False,
                "options": {"temperature": 0, "num_predict": 100_000}}
        with contextlib.suppress(requests.RequestException):
            self.answer = service.ollama("POST", "/api/generate", json=body, timeout=120)

    def status(self, timeout=5):
        self._thread.join(timeout)
        assert self.answer is not None, f"the waiting caller got no answer within {timeout} s"
        return self.answer.status_code


def launcher(service):
    """All that start.sh is made of, but for what it runs."""
    words = ("gunicorn", "serve", "llama-server")
    return [p for p in service.processes() if not any(word in part for part in p.cmdline() for word in words)]


@contextlib.contextmanager
def ollama_dead(service):
    """Ollama killed, and nobody there to start it again."""
    stopped = launcher(service)
    for process in stopped:
        process.suspend()
    server = psutil.Process(service.ollama_pid())
    server.kill()
    wait_for(lambda: gone(server), 5, "Ollama is dead")
    try:
        yield
    finally:
        for process in stopped:
            process.resume()
    service.wait_healthy(20)


@contextlib.contextmanager
def ollama_hung(service):
    server = psutil.Process(service.ollama_pid())
    server.suspend()
    try:
        yield server
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            server.resume()


@pytest.fixture
def idle(service):
    """The module's service with nothing loaded and Ollama well, whatever the test before left."""
    service.wait_healthy(30)
    post(service, CLEAR)
    return service


@pytest.fixture
def trio(make_service, make_gguf_variant):
    """A service with three models that can be loaded at once; the first is its default."""
    models = {f"m{n}:latest": make_gguf_variant(n) for n in (1, 2, 3)}
    return make_service(models=models, LLM_MODEL="m1", LLM_CONTEXT_LENGTH=1024, OLLAMA_MAX_LOADED_MODELS=3)


@pytest.fixture(scope="module")
def others():
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        yield pool


# Runners: stopped, busy, idle


@pytest.mark.parametrize("path", [CLEAR, RESET])
def test_a_runner_stopped_in_mid_answer_is_ended_and_its_caller_told(idle, path):
    waiting = Waiting(idle)
    waiting.runner.suspend()
    report = post(idle, path)
    assert gone(waiting.runner)
    assert waiting.status() == 500
    if path == CLEAR:
        assert report["killed"] == [{"pid": waiting.runner.pid, "model": GEMMA, "reason": "hung"}]
        assert report["unloaded_models"] == [GEMMA]
        assert report["verified"] is True
    else:
        wait_loaded(idle, GEMMA)
    ask(idle)


def test_a_busy_runner_is_ended_by_default_and_its_caller_told(idle):
    waiting = Waiting(idle)
    report = post(idle, CLEAR)
    assert report["killed"] == [{"pid": waiting.runner.pid, "model": GEMMA, "reason": "busy"}]
    assert report["verified"] is True
    assert gone(waiting.runner)
    assert waiting.status() == 500
    wait = next(step for step in report["steps"] if step["step"] == "wait")
    assert 1 < wait["seconds"] < 2
    ask(idle)


@pytest.mark.parametrize("fields", [{}, {"model": GEMMA}, {"name": "Gemma"}])
def test_without_force_a_busy_runner_goes_on_and_is_named(idle, fields):
    busy = idle.generate(GEMMA)
    runner, = idle.runners()
    report = post(idle, CLEAR, force=False, **fields)
    assert (report["killed"], report["unloaded_models"], report["verified"]) == ([], [], False)
    assert GEMMA in report["message"]
    assert not gone(runner)
    so_far = busy.tokens
    wait_for(lambda: busy.tokens > so_far or busy.done, 5, "the answer goes on")
    assert not busy.done
    busy.close()


def test_a_runner_that_ends_its_answer_in_time_is_not_killed(idle):
    for _ in range(3):  # on a machine that has other things to do, three tokens can take longer than a clear waits
        idle.load(GEMMA)
        busy = Generation(idle.ollama_port, GEMMA, num_predict=4)
        wait_for(lambda: busy.tokens, 60, "the first token")
        report = post(idle, CLEAR)
        if not report["killed"]:
            break
    assert (report["killed"], report["unloaded_models"], report["verified"]) == ([], [GEMMA], True)
    assert busy.wait(2).error is None


def test_an_idle_model_goes_without_a_kill(idle):
    runner = idle.load(GEMMA)
    report = post(idle, CLEAR)
    assert (report["killed"], report["unloaded_models"], report["verified"]) == ([], [GEMMA], True)
    assert gone(runner)
    assert idle.runners() == []


@pytest.mark.parametrize("path", [CLEAR, RESET])
@pytest.mark.parametrize("stopped", [False, True])
def test_the_memory_that_came_free_is_measured(idle, path, stopped):
    seen = []
    for _ in range(5):  # the rest of the machine may take as much in the same moment, the host of a virtual one too
        post(idle, CLEAR)
        waiting = Waiting(idle)
        held_mb = own_mb(waiting.runner)
        if stopped:
            waiting.runner.suspend()
        memory = post(idle, path)["memory"]
        assert memory["source"] == "system"
        assert memory["freed_mb"] == max(0, memory["before_mb"] - memory["after_mb"])
        seen.append(memory["freed_mb"])
        if held_mb / 4 < seen[-1] < held_mb * 2:
            return
    assert False, f"a runner with {held_mb} MB of its own was ended, and these came free: {seen}"


def test_an_idle_runner_that_is_stopped_goes_too(idle):
    runner = idle.load(GEMMA)
    runner.suspend()
    assert stats(idle)["runners"][0]["state"] == "stopped"
    assert post(idle, CLEAR)["unloaded_models"] == [GEMMA]
    assert gone(runner)


@pytest.mark.parametrize("path", [CLEAR, RESET])
@pytest.mark.parametrize("body", [{}, {"data": ""}, {"data": "{}"}, {"json": {"model": None}}])
def test_the_watchdogs_bare_call_is_taken(idle, path, body):
    with requests.Session() as session:
        session.trust_env = False
        answer = session.post(idle.url + path, timeout=5, **body)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("path", [CLEAR, RESET])
def test_a_post_without_any_header_of_a_body_is_taken(idle, path):
    with socket.create_connection(("127.0.0.1", idle.port), 5) as sock:
        sock.sendall(f"POST {path} HTTP/1.1\r\nHost: llm-service:11435\r\nConnection: close\r\n\r\n".encode())
        assert sock.recv(100).startswith(b"HTTP/1.1 200 ")


def test_clear_with_nothing_loaded_is_a_success(idle):
    report = post(idle, CLEAR)
    assert (report["killed"], report["unloaded_models"], report["verified"]) == ([], [], True)
    assert report["memory"]["freed_mb"] >= 0


@pytest.mark.parametrize("path", [CLEAR, RESET])
def test_a_model_that_does_not_exist_is_a_404_and_nothing_happens(idle, path):
    runner = idle.load(GEMMA)
    assert refused(idle, path, 404, model="absent:1b")["code"] == "model_not_found"
    assert not gone(runner)


@pytest.mark.parametrize("path", [CLEAR, RESET])
@pytest.mark.parametrize("fields", [
    {"model": "../x"}, {"model": 7}, {"model": "a", "name": "b"}, {"force": "x", "restart": "x"}])
def test_what_makes_no_sense_is_a_400(idle, path, fields):
    refused(idle, path, 400, **fields)


def test_a_caller_who_leaves_does_not_stop_a_clear(idle):
    waiting = Waiting(idle)
    waiting.runner.suspend()
    with socket.create_connection(("127.0.0.1", idle.port), 5) as sock:
        sock.sendall(f"POST {CLEAR} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n".encode())
        time.sleep(0.2)  # it shall be under way
    wait_for(lambda: gone(waiting.runner), 4, "the runner is ended all the same")


# Several models


def test_several_models_unload_side_by_side(trio):
    runners = [trio.load(f"m{n}") for n in (1, 2, 3)]
    assert len(trio.runners()) == 3
    report = post(trio, CLEAR)
    assert (report["killed"], report["verified"]) == ([], True)
    assert report["unloaded_models"] == ["m1:latest", "m2:latest", "m3:latest"]
    assert all(map(gone, runners))


def test_hung_busy_and_idle_ones_at_once_are_cleared_in_time(trio):
    hung, busy = Waiting(trio, "m1:latest"), Waiting(trio, "m2:latest")
    idle_one = trio.load("m3")
    hung.runner.suspend()
    report = post(trio, CLEAR)
    assert {killed["pid"]: (killed["model"], killed["reason"]) for killed in report["killed"]} == {
        hung.runner.pid: ("m1:latest", "hung"), busy.runner.pid: ("m2:latest", "busy")}
    assert report["verified"] and len(report["unloaded_models"]) == 3
    assert (hung.status(), busy.status()) == (500, 500)
    assert gone(idle_one)


def test_clearing_one_model_leaves_the_others(trio):
    one, two = trio.load("m1"), Waiting(trio, "m2:latest")
    report = post(trio, CLEAR, model="m1")
    assert (report["unloaded_models"], report["verified"]) == (["m1:latest"], True)
    assert gone(one)
    assert not gone(two.runner) and two.answer is None
    two.runner.suspend()
    three = trio.load("m3")
    assert [killed["reason"] for killed in post(trio, CLEAR, name="M2:latest")["killed"]] == ["hung"]
    assert not gone(three)


def test_runners_that_others_start_meanwhile_are_told_apart(trio, others):
    waiting = Waiting(trio, "m1:latest")
    waiting.runner.suspend()
    clearing = others.submit(post, trio, CLEAR)
    time.sleep(0.3)  # what is loaded has been listed by then
    new = trio.load("m2")
    report = clearing.result()
    assert report["verified"] is True
    assert report["new_runners"] == [{"pid": new.pid, "model": "m2:latest"}]
    assert report["unloaded_models"] == ["m1:latest"]
    assert not gone(new)


def test_clear_is_verified_while_a_client_keeps_asking(idle, others):
    stop = threading.Event()

    def keep_asking():
        while not stop.is_set():
            idle.ollama("POST", "/api/generate", json={"model": GEMMA, "prompt": "1 2", "stream": False,
                                                       "options": {"num_predict": 5}})

    asking = [others.submit(keep_asking) for _ in range(2)]
    idle.load(GEMMA)
    try:
        for _ in range(6):
            there = {runner.pid for runner in idle.runners()}
            report = post(idle, CLEAR)
            assert report["verified"] is True
            assert not there & {runner.pid for runner in idle.runners()}
            assert not there & {new["pid"] for new in report["new_runners"]}
            wait_for(idle.runners, 30, "the client's next runner")
    finally:
        stop.set()
    for each in asking:
        each.result()


# Ollama itself


def test_ollama_hung_is_told_and_a_reset_brings_it_back(idle):
    idle.load(GEMMA)
    restarts = stats(idle)["ollama"]["restarts"]
    with ollama_hung(idle) as server:
        told = health(idle, 503)
        assert told["status"] == "unhealthy"
        assert (told["code"], told["recommended_action"]) == ("ollama_hung", "reset_session")
        assert stats(idle)["ollama"]["pid"] == server.pid
        post(idle, RESET)
        assert gone(server)
    began = time.monotonic()
    wait_for(lambda: idle.ollama("GET", "/api/version", timeout=1).ok, 5, "Ollama answers again")
    print(f"Ollama answers {time.monotonic() - began:.2f} s after the reset")
    assert idle.ollama_pid() != server.pid
    assert stats(idle)["ollama"]["restarts"] == restarts + 1
    wait_loaded(idle, GEMMA)
    assert health(idle)["recommended_action"] == "none"
    ask(idle)


def test_ollama_and_a_runner_hung_in_mid_answer_are_reset_in_time(idle):
    waiting = Waiting(idle)
    waiting.runner.suspend()
    with ollama_hung(idle):
        post(idle, RESET)
    assert gone(waiting.runner)
    wait_loaded(idle, GEMMA)
    ask(idle)


def test_clear_frees_the_memory_of_a_hung_ollama(idle):
    runner = idle.load(GEMMA)
    with ollama_hung(idle):
        report = post(idle, CLEAR)
        assert report["verified"] is True
        assert [killed["pid"] for killed in report["killed"]] == [runner.pid]
        assert report["unloaded_models"] == [GEMMA]
        assert gone(runner)
    ask(idle)


def test_ollama_killed_with_a_model_loaded_comes_back_without_an_orphan(idle):
    orphan = idle.load(GEMMA)
    restarts, old = stats(idle)["ollama"]["restarts"], idle.ollama_pid()
    began = time.monotonic()
    os.kill(old, signal.SIGKILL)
    wait_for(lambda: gone(orphan), 5, "the orphan is gone")
    wait_for(lambda: idle.ollama_pid() != old and idle.get("/health", timeout=3).ok, 5, "health is back")
    seconds = time.monotonic() - began
    print(f"health 200 {seconds:.2f} s after the kill")
    assert seconds < 5
    told = stats(idle)
    assert (told["ollama"]["pid"], told["ollama"]["restarts"]) == (idle.ollama_pid(), restarts + 1)
    assert told["ollama"]["uptime_seconds"] < 10
    assert told["runners"] == []
    ask(idle)


def test_clear_ends_an_orphan(idle):
    orphan = idle.load(GEMMA)
    with ollama_dead(idle):
        assert not gone(orphan)
        assert [runner["state"] for runner in stats(idle)["runners"]] == ["orphan"]
        report = post(idle, CLEAR)
        assert report["killed"] == [{"pid": orphan.pid, "model": GEMMA, "reason": "orphan"}]
        assert report["verified"] and report["unloaded_models"] == [GEMMA]
        assert gone(orphan)


def test_with_ollama_dead_both_answer_and_health_says_wait(idle, others):
    with ollama_dead(idle):
        told = health(idle, 503)
        assert (told["code"], told["recommended_action"]) == ("ollama_dead", "wait")
        assert stats(idle)["ollama"]["pid"] is None
        for _ in range(3):
            assert post(idle, CLEAR)["verified"] is True
        list(others.map(lambda path: post(idle, path), [CLEAR, RESET] * 10))
    wait_loaded(idle, GEMMA)  # the reset's loading goes on


def test_the_worker_killed_comes_back(idle):
    runner = idle.load(GEMMA)
    old, began = idle.worker_pid(), time.monotonic()
    os.kill(old, signal.SIGKILL)
    wait_for(lambda: idle.get("/health", timeout=1).status_code == 200, 3, "the API is back")
    print(f"health 200 {time.monotonic() - began:.2f} s after the worker's kill")
    assert idle.worker_pid() != old
    assert not gone(runner)
    assert post(idle, CLEAR)["unloaded_models"] == [GEMMA]


# Reset and what it loads


@pytest.mark.parametrize("fields", [{}, {"model": "gemma"}, {"restart": True}, {"restart": True, "model": GEMMA}])
def test_reset_loads_the_default_or_the_named_model(idle, fields):
    old = idle.ollama_pid()
    report = post(idle, RESET, **fields)
    assert report["model"] in (GEMMA, "gemma")
    assert report["model_state"] in ("loading", "loaded")
    assert (idle.ollama_pid() != old) == bool(fields.get("restart"))
    wait_loaded(idle, GEMMA)
    assert health(idle)["loaded"] == [GEMMA]


def test_reset_loads_the_named_one_else_the_default_else_what_was_loaded(trio, make_service, make_gguf_variant):
    assert post(trio, RESET, model="m2")["model"] == "m2"
    wait_loaded(trio, "m2:latest")
    assert post(trio, RESET)["model"] == "m1"
    wait_loaded(trio, "m1:latest")
    assert health(trio)["loaded"] == ["m1:latest"]
    other = make_service(models={"m3:latest": make_gguf_variant(3)}, LLM_MODEL="absent:1b", LLM_CONTEXT_LENGTH=1024)
    report = post(other, RESET)
    assert (report["model"], report["model_state"]) == (None, "none")
    assert other.runners() == []
    other.load("m3")
    assert post(other, RESET)["model"] == "m3:latest"
    wait_loaded(other, "m3:latest")
    assert post(other, RESET, restart=True)["model"] == "m3:latest"
    wait_loaded(other, "m3:latest")


def test_reset_while_the_model_loads(idle, others):
    runners = []
    for _ in range(3):
        loading = others.submit(idle.ollama, "POST", "/api/generate", json={"model": GEMMA})
        runners.append(wait_for(idle.runners, 10, "a runner that loads")[0])
        report = post(idle, RESET)
        assert report["model"] == GEMMA
        loading.result(30)
    wait_loaded(idle, GEMMA)
    assert all(map(gone, runners))
    ask(idle)


def test_reset_during_the_load_of_the_reset_before(idle):
    for restart in (False, True, False, False):
        assert post(idle, RESET, restart=restart)["model"] == GEMMA
    wait_loaded(idle, GEMMA)
    assert len(idle.runners()) == 1
    ask(idle)


def test_a_model_that_does_not_load_shows_in_health(make_service, gguf):
    service = make_service(models={GEMMA: gguf}, LLM_MODEL=GEMMA)
    for blob in (service.models / "blobs").iterdir():
        if blob.stat().st_size > 1 << 20:
            blob.unlink()
            blob.write_bytes(b"GGUF" + bytes(1 << 16))
    report = post(service, RESET)
    assert report["model"] == GEMMA and report["model_state"] != "loaded"
    wait_for(lambda: health(service)["load"]["state"] == "failed", 20, "the outcome of the load")
    load = health(service)["load"]
    assert load["model"] == GEMMA and load["error"]


# One run at a time


@pytest.mark.parametrize("path", [CLEAR, RESET])
def test_twenty_at_once_share_one_run(idle, others, path):
    waiting = Waiting(idle)
    waiting.runner.suspend()
    answers = list(others.map(lambda _: post(idle, path), range(20)))
    assert "1 ended" in [step["detail"] for step in answers[0]["steps"] if step["step"] == "end_runners"]
    assert len({str(each) for each in answers}) == 1
    assert waiting.status() == 500
    service_works_after_all(idle)


def service_works_after_all(service):
    service.wait_healthy(10)
    ask(service)
    assert len(service.runners()) == 1


@pytest.mark.parametrize("path", [CLEAR, RESET])
def test_twenty_in_a_row(idle, path):
    for _ in range(20):
        post(idle, path)
    service_works_after_all(idle)


def test_resets_with_a_restart_in_a_row_never_make_the_launcher_give_up(idle):
    restarts = stats(idle)["ollama"]["restarts"]
    for _ in range(12):
        post(idle, RESET, restart=True)
        idle.wait_healthy(5)
    assert stats(idle)["ollama"]["restarts"] == restarts + 12
    wait_loaded(idle, GEMMA)
    service_works_after_all(idle)


def test_restarts_at_once_share_one_restart(idle, others):
    restarts = stats(idle)["ollama"]["restarts"]
    list(others.map(lambda _: post(idle, RESET, restart=True), range(20)))
    wait_loaded(idle, GEMMA)
    assert stats(idle)["ollama"]["restarts"] == restarts + 1


def test_clear_and_reset_of_all_sorts_at_once(idle, others):
    Waiting(idle).runner.suspend()
    calls = [(CLEAR, {}), (RESET, {}), (CLEAR, {"force": False}), (RESET, {"restart": True}), (CLEAR, {"model": GEMMA}),
             (RESET, {"model": GEMMA})]

    def send(one):
        path, fields = one
        answer = idle.post(path, json=fields)
        assert answer.elapsed.total_seconds() < 5
        return answer.status_code, answer.text

    for status, text in others.map(send, calls * 3):
        assert status == 200, text
    wait_loaded(idle, GEMMA)
    service_works_after_all(idle)


def test_a_clear_during_a_reset_answers_with_the_resets_clearing(idle, others):
    waiting = Waiting(idle)
    waiting.runner.suspend()
    resetting = others.submit(post, idle, RESET, restart=True)
    time.sleep(0.4)
    cleared = post(idle, CLEAR)
    assert gone(waiting.runner)
    assert [killed["pid"] for killed in cleared["killed"]] == [waiting.runner.pid]
    assert resetting.result()["steps"][:len(cleared["steps"])] == cleared["steps"]
    wait_loaded(idle, GEMMA)


def test_a_reset_during_a_clear_takes_it_as_its_first_step(idle, others):
    waiting = Waiting(idle)
    waiting.runner.suspend()
    clearing = others.submit(post, idle, CLEAR)
    time.sleep(0.4)
    report = post(idle, RESET)
    cleared = clearing.result()
    assert [killed["pid"] for killed in cleared["killed"]] == [waiting.runner.pid]
    assert report["steps"][:len(cleared["steps"])] == cleared["steps"]
    assert report["memory"] == cleared["memory"]
    wait_loaded(idle, GEMMA)


def test_a_reset_during_a_clear_of_one_model_clears_all(trio, others):
    hung = Waiting(trio, "m1:latest")
    hung.runner.suspend()
    other = trio.load("m2")
    clearing = others.submit(post, trio, CLEAR, model="m1")
    time.sleep(0.4)
    report = post(trio, RESET, model="m3")
    assert clearing.result()["verified"] is True
    assert gone(hung.runner) and gone(other)
    assert report["model"] == "m3"
    wait_loaded(trio, "m3:latest")


def test_a_clear_of_all_after_one_of_a_model_under_way_clears_all_in_time(trio, others):
    hung, busy = Waiting(trio, "m1:latest"), Waiting(trio, "m2:latest")
    hung.runner.suspend()
    clearing = others.submit(post, trio, CLEAR, model="m1")
    time.sleep(0.2)
    report = post(trio, CLEAR)
    assert report["verified"] is True
    assert gone(busy.runner)
    clearing.result()


# No model, no Ollama


@pytest.fixture(scope="module")
def bare(ollama_binary):
    """A service without any model."""
    with servers(functools.partial(Service, binary=ollama_binary)) as make:
        yield make(LLM_MODEL="absent:1b")


def test_with_no_model_both_succeed_at_once_and_in_a_row(bare, others):
    for path in (CLEAR, RESET):
        reports = [post(bare, path) for _ in range(20)] + list(others.map(lambda _: post(bare, path), range(20)))
        assert all(report.get("model") is None for report in reports)
    assert post(bare, RESET, restart=True)["model_state"] == "none"
    bare.wait_healthy(5)
    assert health(bare)["models_count"] == 0
    assert health(bare, deep=1)["recommended_action"] == "none"


def test_with_no_model_and_ollama_dead_or_hung_both_succeed(bare, others):
    with ollama_dead(bare):
        list(others.map(lambda path: post(bare, path), [CLEAR, RESET] * 10))
    with ollama_hung(bare):
        list(others.map(lambda path: post(bare, path), [CLEAR, RESET] * 10))
    bare.wait_healthy(10)


# An Ollama of someone else, and strangers


@pytest.fixture
def foreign(ollama_server, make_service, gguf):
    """An Ollama started outside, and the service on its address."""
    outside = ollama_server()
    outside.add_model(GEMMA, gguf)
    one = make_service(OLLAMA_HOST=f"127.0.0.1:{outside.port}", OLLAMA_MODELS=outside.models, LLM_MODEL=GEMMA)
    one.outside = outside
    return one


def runners_of(outside):
    return [p for p in marked(outside.mark) if "--model" in p.cmdline()]


def test_a_foreign_ollama_is_cleared_by_its_api_alone(foreign):
    assert foreign.outside.process.poll() is None and foreign.state_lines() == []
    call("POST", foreign.ollama_url + "/api/generate", json={"model": GEMMA})
    runner, = runners_of(foreign.outside)
    report = post(foreign, CLEAR)
    assert (report["unloaded_models"], report["killed"], report["verified"]) == ([GEMMA], [], True)
    assert report["managed"] is False
    assert gone(runner)


def test_a_foreign_ollama_is_never_ended_and_the_answer_says_so(foreign):
    busy = foreign.outside.generate(GEMMA)
    runner, = runners_of(foreign.outside)
    said = refused(foreign, CLEAR, 409)
    assert said["code"] == "model_busy" and "not started by the service" in said["error"]
    assert refused(foreign, RESET, 409)["code"] == "model_busy"
    left = post(foreign, CLEAR, force=False)
    assert left["verified"] is False and GEMMA in left["message"]
    assert not gone(runner) and not busy.done
    busy.close()
    wait_for(lambda: not runners_of(foreign.outside) or post(foreign, CLEAR)["verified"], 10, "it ends by itself")
    answer = foreign.post(RESET, json={"restart": True})
    assert answer.elapsed.total_seconds() < LIMIT[RESET]
    assert "not started by the service" in answer.text
    assert foreign.outside.process.poll() is None
    assert foreign.ollama("GET", "/api/version").ok
    assert stats(foreign)["ollama"]["restarts"] == 0


def test_a_foreign_ollama_hung_is_told_in_time_and_left_alone(foreign):
    foreign.outside.suspend()
    told = health(foreign, 503)
    assert told["recommended_action"] == "restart_service"
    for path in (CLEAR, RESET):
        answer = foreign.post(path)
        assert answer.elapsed.total_seconds() < LIMIT[path]
        assert answer.status_code in (503, 504)
        assert "not started by the service" in answer.json()["error"]
    foreign.outside.resume()
    foreign.wait_healthy(5)
    assert foreign.outside.process.poll() is None


def test_with_a_foreign_ollama_gone_both_succeed_at_once_and_in_a_row(foreign, others):
    foreign.outside.terminate()
    assert health(foreign, 503)["recommended_action"] == "restart_service"
    for path in (CLEAR, RESET):
        for _ in range(20):
            post(foreign, path)
        list(others.map(lambda _: post(foreign, path), range(20)))


def test_a_strangers_ollama_and_runner_are_never_touched(idle, ollama_server, gguf):
    stranger = ollama_server()
    stranger.add_model(GEMMA, gguf)
    busy = stranger.generate(GEMMA)
    runner, = runners_of(stranger)
    runner.suspend()
    idle.load(GEMMA)
    assert runner.pid not in [each["pid"] for each in stats(idle)["runners"]]
    for path, fields in ((CLEAR, {}), (RESET, {"restart": True}), (CLEAR, {"model": GEMMA})):
        report = post(idle, path, **fields)
        assert runner.pid not in [each["pid"] for each in report.get("killed", []) + report.get("new_runners", [])]
    runner.resume()
    so_far = busy.tokens
    wait_for(lambda: busy.tokens > so_far or busy.done, 10, "the stranger's answer goes on")
    assert not busy.done and stranger.process.poll() is None
    busy.close()


@pytest.fixture
def recorded(ollama_server, gguf, tmp_path):
    """A real server with a runner, and a function that makes a Processes with a record of it."""
    server = ollama_server()
    server.add_model(GEMMA, gguf)
    call("POST", server.url + "/api/generate", json={"model": GEMMA})
    started = int(Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")[2].split()[19])

    def processes(pid=server.pid, offset=0):
        (tmp_path / "state").write_text(f"{pid} {started + offset} 3\n")
        return Processes(tmp_path / "state")
    return server, processes


def test_a_record_with_another_start_time_is_void(recorded):
    server, processes = recorded
    ours = processes()
    assert ours.server().pid == server.pid
    found, = ours.runners()
    assert found.process.pid == runners_of(server)[0].pid
    for offset in (1, -1):
        void = processes(offset=offset)
        assert void.server() is None
        assert void.all() == [] and void.runners() == []
        assert void.end_server(0.1) is True
        assert server.process.poll() is None
    ours.end(found.process._replace(started=found.process.started + 1))
    assert runners_of(server)[0].is_running()


def test_runners_of_a_dead_server_are_found_by_its_session(recorded):
    server, processes = recorded
    server.kill()
    dead = processes()
    assert dead.server() is None
    orphan, = dead.runners()
    assert orphan.process.parent != server.pid
    dead.end(orphan.process)
    wait_for(lambda: not dead.alive(orphan.process), 2, "the orphan is gone")
    assert dead.runners() == []


# Health


def test_deep_health_tells_ok_busy_and_hung(make_service, make_gguf_variant):
    service = make_service(models={"m1:latest": make_gguf_variant(1), "m2:latest": make_gguf_variant(2)},
                           LLM_CONTEXT_LENGTH=1024, constants={"app.DEEP_S": 2})
    assert health(service, deep=1)["busy"] is False
    runner = service.load("m1", num_ctx=2048)
    told = health(service, deep=1)
    assert (told["busy"], told["recommended_action"]) == (False, "none")
    assert not gone(runner) and len(service.runners()) == 1  # its own context length did not make Ollama reload it
    busy = service.generate("m2")
    told = health(service, deep=1)
    assert (told["busy"], told["recommended_action"]) == (True, "none")
    assert not busy.done
    next(each for each in service.runners() if each.pid != runner.pid).suspend()
    assert health(service)["recommended_action"] == "none"
    told = health(service, 503, deep=1)
    assert (told["code"], told["recommended_action"]) == ("runner_hung", "reset_session")
    post(service, RESET)
    assert health(service, deep=1)["busy"] is False
    runner = service.load("m1")
    runner.suspend()
    assert health(service, 503, deep=1)["code"] == "runner_hung"
    post(service, RESET)
    service.wait_healthy(5)
    assert health(service, deep=1)["recommended_action"] == "none"


def test_deep_health_with_ollama_hung(idle):
    with ollama_hung(idle):
        assert health(idle, 503, deep=1)["recommended_action"] == "reset_session"


@pytest.fixture
def slow_ollama(ollama_binary, tmp_path):
    """An `ollama` whose server takes a while until it listens, as on a machine with GPUs."""
    wrapper = tmp_path / "ollama"
    wrapper.write_text(f'#!/bin/sh\n[ "$1" = serve ] && sleep 4\nexec {ollama_binary} "$@"\n')
    wrapper.chmod(0o755)
    return f"{tmp_path}:{os.environ['PATH']}"


def test_while_ollama_starts_health_says_wait_and_both_succeed(slow_ollama, make_service, gguf):
    service = make_service(models={GEMMA: gguf}, LLM_MODEL=GEMMA, PATH=slow_ollama, wait=False)
    told, = wait_for(lambda: [service.get("/health")], 10, "the API answers")  # a 503 is false by itself
    assert (told.status_code, "Retry-After" in told.headers) == (503, True)
    assert (told.json()["code"], told.json()["recommended_action"]) == ("ollama_starting", "wait")
    post(service, CLEAR)
    assert post(service, RESET)["model"] == GEMMA
    service.wait_healthy(20)
    wait_loaded(service, GEMMA)


def test_a_model_store_that_cannot_be_read_is_unhealthy(make_service, gguf):
    service = make_service(models={GEMMA: gguf}, LLM_MODEL=GEMMA)
    manifests = service.models / "manifests"
    manifests.rename(service.models / "away")
    manifests.write_text("not a directory")
    told = health(service, 503)
    assert (told["code"], told["recommended_action"]) == ("model_store_unreadable", "restart_service")
    for path in (CLEAR, RESET):
        post(service, path)
    manifests.unlink()
    (service.models / "away").rename(manifests)
    service.wait_healthy(10)


def test_a_disk_that_is_full_is_a_warning_and_needs_no_restart(make_service):
    told = health(make_service(constants={"app.DISK_LOW_BYTES": 1 << 60}))
    assert (told["status"], told["recommended_action"]) == ("healthy", "none")
    assert "disk" in told["warning"].lower() and "delete" in told["warning"].lower()


def test_healthy_says_what_is_there(idle):
    idle.load(GEMMA)
    told = health(idle)
    assert told.items() >= {"status": "healthy", "models_count": 1, "models": [GEMMA], "loaded": [GEMMA], "gpu": "none",
                            "recommended_action": "none"}.items()
    runner, = stats(idle)["runners"]
    assert (runner["model"], runner["state"]) == (GEMMA, "running")
    assert runner["memory_mb"] > 100
    assert stats(idle)["process_memory_mb"] > runner["memory_mb"]


# Downloads and the page cache


def test_a_download_survives_a_reset_that_restarts_ollama(idle, registry, others):
    name = registry.add_random("ns/big:latest", 120)
    registry.rate = 12e6
    lines, shown = [], threading.Event()

    def pull():
        with idle.post("/api/models/pull", json={"model": name, "insecure": True}, stream=True, timeout=60) as answer:
            assert answer.status_code == 200, answer.text
            for line in answer.iter_lines():
                lines.append(requests.models.complexjson.loads(line))
                if lines[-1].get("percent", 0) > 15:
                    shown.set()

    pulling = others.submit(pull)
    assert shown.wait(30)
    post(idle, RESET, restart=True)
    registry.rate = None
    pulling.result(60)
    assert lines[-1]["status"] == "success" and lines[-1]["percent"] == 100
    percents = [line["percent"] for line in lines]
    assert percents == sorted(percents)
    assert any("reconnecting" in line["status"] for line in lines)
    assert registry.bytes_sent() < registry.size(name) * 1.4
    assert name in health(idle)["models"]
    assert idle.delete("/api/models/delete", json={"model": name}).ok


def resident_bytes(path):
    """How much of a file is in the page cache."""
    size = path.stat().st_size
    libc = ctypes.CDLL(None, use_errno=True)
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as view:
        start = ctypes.c_char.from_buffer(view)
        pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        done = libc.mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(size), pages)
        del start
        assert done == 0, os.strerror(ctypes.get_errno())
    return sum(page & 1 for page in pages) * mmap.PAGESIZE


def test_dropping_the_page_cache_takes_the_models_out_of_memory():
    with tempfile.TemporaryDirectory(dir=CACHE / "tests") as folder:  # not on a tmpfs, which is the page cache
        blobs = Path(folder, "blobs")
        blobs.mkdir()
        weights, other = blobs / f"sha256-{'0' * 64}", blobs.parent / "other"
        for file in (weights, other):
            file.write_bytes(os.urandom(8 << 20))
            with file.open("rb+") as handle:
                os.fsync(handle.fileno())
            file.read_bytes()
            assert resident_bytes(file) == 8 << 20
        Store(folder).drop_page_cache()
        assert resident_bytes(weights) == 0
        assert resident_bytes(other) == 8 << 20
