"""What the service did not start is never touched."""

from helpers.answers import CLEAR, GEMMA, RESET, heal, stats
from helpers.processes import suspend


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
