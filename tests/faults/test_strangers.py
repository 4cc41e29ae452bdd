"""What the service did not start is never touched."""

import contextlib

import psutil

from helpers.answers import CLEAR, GEMMA, RESET, heal, stats
from helpers.fake_ollama import FakeOllama
from helpers.nonsense import SANE_ANSWERS
from helpers.processes import kill, suspend
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


def test_a_strangers_ollama_on_the_port_of_one_that_has_died_is_asked_nothing(make_service, gguf):
    """As a system's service is, which waits for just that."""
    service = make_service(models={GEMMA: gguf}, LLM_MODEL=GEMMA)
    launcher = psutil.Process(service.process.pid)
    suspend(launcher)  # else its next Ollama might be first
    kill([psutil.Process(service.ollama_pid())])

    def take_over():
        with contextlib.suppress(OSError):  # the killed one has the port yet
            return FakeOllama(SANE_ANSWERS, service.ollama_port)

    with wait_for(take_over, 30, "the port") as stranger:
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
        health = service.get("/health")
        assert health.status_code == 503, health.text
        wait_for(lambda: stats(service)["looked_at"] != looked_at, 30, "a look of the watch")
        assert stranger.calls == []
    launcher.resume()
    service.wait_healthy(60)
    assert service.get("/api/models").json()["models"][0]["name"] == GEMMA
