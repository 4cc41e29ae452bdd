"""What the service did not start is never touched."""

import contextlib
import os
import signal

import psutil
import pytest

from helpers.answers import CLEAR, GEMMA, RESET, heal, stats
from helpers.fake_ollama import FakeOllama
from helpers.frozen import unkillable
from helpers.nonsense import SANE_ANSWERS
from helpers.processes import suspend
from helpers.waiting import call, wait_for


def test_a_strangers_ollama_and_runner_are_never_touched(idle, ollama_server, gguf):
    stranger = ollama_server()
    stranger.add_model(GEMMA, gguf)
    busy = stranger.generate(GEMMA)
    (runner,) = stranger.runners()
    suspend(runner)
    idle.load(GEMMA)
    assert runner.pid not in [each["pid"] for each in stats(idle)["runners"]]
    for path, fields in ((CLEAR, {}), (RESET, {"restart": True}), (CLEAR, {"model": GEMMA})):
        report = heal(idle, path, **fields)
        named = report.get("killed", []) + report.get("new_runners", [])
        assert runner.pid not in [each["pid"] for each in named]
    runner.resume()
    busy.goes_on()
    assert stranger.process.poll() is None
    busy.close()


@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGTERM])
def test_a_strangers_ollama_on_the_port_of_one_that_ends_is_asked_nothing(make_service, gguf, sig):
    """As a system's service is, which waits for just that. At SIGTERM the port is free at once."""
    service = make_service(models={GEMMA: gguf}, LLM_MODEL=GEMMA)
    launcher = psutil.Process(service.process.pid)
    with contextlib.ExitStack() as stack:
        if sig == signal.SIGTERM:  # it waits for its runner, which does not end
            stack.enter_context(unkillable(service.load(GEMMA)))
        suspend(launcher)  # else its next Ollama might be first
        os.kill(service.ollama_pid(), sig)

        def take_over():
            with contextlib.suppress(OSError):  # the other has the port yet
                return FakeOllama(SANE_ANSWERS, service.ollama_port)

        stranger = stack.enter_context(wait_for(take_over, 30, "the port"))
        wait_for(lambda: service.get("/health").status_code == 503, 60, "the end is told")
        looked_at = stats(service)["looked_at"]
        body = {"model": GEMMA}
        for method, path, options in (
            ("GET", "/api/models", {}),
            ("GET", "/api/models/loaded", {}),
            ("GET", "/api/models/recommendations", {}),
            ("POST", "/api/models/load", {"json": body}),
            ("POST", "/api/models/try", {"json": {**body, "prompt": "Why?"}}),
            ("POST", "/api/models/pull", {"json": {**body, "stream": False}}),
            ("DELETE", "/api/models/delete", {"json": body}),
            ("POST", CLEAR, {"json": {"model": GEMMA}}),
            ("POST", RESET, {}),
        ):
            answer = call(method, service.url + path, **options)
            assert stranger.calls == [], f"{path}: {answer.text}"
        assert service.get("/health").status_code == 503
        wait_for(lambda: stats(service)["looked_at"] != looked_at, 30, "a look of the watch")
        assert stranger.calls == []
    launcher.resume()
    service.wait_healthy(60)
    assert service.get("/api/models").json()["models"][0]["name"] == GEMMA
