"""Hung, dead and busy Ollamas and runners, made on purpose."""

import contextlib
import threading
import time

import psutil
import requests

from helpers.answers import GEMMA, clear, stats
from helpers.embedding import add_embedding_model
from helpers.generation import ENDLESS, PROMPT
from helpers.processes import is_gone, suspend
from helpers.waiting import call, wait_for
from llm_service.sockets import connections

SMALL = "small:latest"


class Waiting:
    """A caller who waits for the whole of a long answer, as n8n does.

    It is there once its .runner is in the middle of the answer.
    """

    def __init__(self, service, name=GEMMA):
        self.answer = None
        self._thread = threading.Thread(target=self._run, args=(service, name), daemon=True)
        self.runner = service.load(name)
        self._thread.start()
        words = self.runner.cmdline()
        slots = f"http://127.0.0.1:{words[words.index('--port') + 1]}/slots"
        wait_for(
            lambda: any(slot["is_processing"] for slot in call("GET", slots).json()),
            60,
            "an answer under way",
        )

    def _run(self, service, name):
        body = {"model": name, "prompt": PROMPT, "raw": True, "stream": False, "options": ENDLESS}
        with contextlib.suppress(requests.RequestException):
            self.answer = service.ollama("POST", "/api/generate", json=body)

    def status(self, timeout=30):
        """Wait for the answer; return its status."""
        self._thread.join(timeout)
        assert self.answer is not None, f"the waiting caller got no answer within {timeout} s"
        return self.answer.status_code


def hung_runner(service, name=GEMMA):
    """Stop a runner in mid-answer; return its caller."""
    waiting = Waiting(service, name)
    suspend(waiting.runner)
    return waiting


@contextlib.contextmanager
def ollama_dead(service):
    """Kill Ollama, with nobody there to start it again until the end."""
    stopped = service.launcher()
    for process in stopped:
        with contextlib.suppress(psutil.NoSuchProcess):  # a program that it ran for a moment
            process.suspend()
    server = psutil.Process(service.ollama_pid())
    server.kill()
    # Its parent is stopped, so it stays as a zombie; its threads end a moment later.
    wait_for(lambda: is_gone(server), 30, "Ollama is dead")
    try:
        yield
    finally:
        for process in stopped:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()
    service.wait_healthy(60)


@contextlib.contextmanager
def ollama_hung(service):
    """Stop Ollama by SIGSTOP."""
    server = psutil.Process(service.ollama_pid())
    suspend(server)
    try:
        yield server
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            server.resume()


def late_ollama(folder, binary):
    """Write an `ollama` whose server listens once there is a file; return their paths."""
    program, listens = folder / "ollama", folder / "listens"
    wait = f"while [ ! -e {listens} ]; do sleep 0.1; done"
    program.write_text(f'#!/bin/sh\n[ "$1" = serve ] && {wait}\nexec {binary} "$@"\n')
    program.chmod(0o755)
    return program, listens


def clear_under_way(service, others, heal=clear, **fields):
    """Begin a clear or reset that waits for a hung m1, and load a small one meanwhile; return both.

    Its load takes a seventh of the CPU time of another's.
    """
    add_embedding_model(service.models, SMALL)
    for _ in range(15):  # on a busy machine a load may take longer than a clear
        clear(service)
        hung_runner(service, "m1:latest")
        clearing = begun(service, others, heal, **fields)
        time.sleep(0.2)  # what is loaded has been listed by then
        new = service.load(SMALL, route="embed")
        if not clearing.done():
            return clearing, new
    raise AssertionError("each load took longer than a clear")


def at_once(service, others, call, items):
    """Call for each item, and return the results; the service stands until all calls are there.

    How fast a busy machine sends them has no part in it: ``call(item, began)`` gets a function
    that says when the service went on.
    """
    resumed = []
    worker = psutil.Process(service.worker_pid())
    suspend(worker)
    try:
        calls = [others.submit(call, each, lambda: resumed[0]) for each in items]

        def there():
            waiting = sum(each.wait_s > 0 for each in connections(service.port))
            return waiting + sum(each.done() for each in calls) >= len(calls)

        wait_for(there, 20, "all calls")  # gunicorn gives up a worker that stands for 30 s
    finally:
        resumed.append(time.monotonic())
        worker.resume()
    return [each.result() for each in calls]


def begun(service, others, heal, **fields):
    """Send a clear or a reset, and return its future once its clear is under way."""
    before = stats(service)["clears"]
    future = others.submit(heal, service, **fields)
    wait_for(lambda: stats(service)["clears"] > before, 30, "the clear")
    return future
