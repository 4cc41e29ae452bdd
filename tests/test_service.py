"""The service end to end, as `./start.sh` starts it: launcher, settings, endpoints."""
import json
import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest

from conftest import ROOT, call, wait_for
from registry import free_port


def run_start(*arguments, **env):
    return subprocess.run(["./start.sh", *arguments], cwd=ROOT, env={**os.environ, **env}, stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("name, value", [
    ("LLM_CONTEXT_LENGTH", "many"), ("LLM_CONTEXT_LENGTH", "0"), ("LLM_GPU_LAYERS", "-2"), ("LLM_GPU_LAYERS", "every"),
    ("LLM_API_PORT", "65536"), ("LLM_API_PORT", "http"), ("LLM_MAX_PULLS", "0"), ("LLM_MODEL", "../etc/passwd"),
    ("LLM_ALLOWED_HOSTS", "http://dashboard"), ("LLM_ALLOWED_ORIGINS", "dashboard"), ("LLM_API_TOKEN", "two words")])
def test_a_setting_that_makes_no_sense_stops_the_start_with_one_line(name, value):
    ended = run_start(**{name: value})
    assert ended.returncode == 1 and ended.stdout == ""
    assert len(ended.stderr.splitlines()) == 1 and name in ended.stderr and "takes" in ended.stderr


@pytest.mark.parametrize("name, value", [("LLM_API_HOST", "nowhere.invalid"), ("LLM_API_HOST", "192.0.2.1"), ("OLLAMA_HOST", "http://[bad")])
def test_an_address_that_cannot_be_listened_on_stops_the_start_with_one_line(name, value):
    ended = run_start(**{"LLM_API_PORT": str(free_port()), "LLM_VENV": sys.prefix, name: value})
    assert ended.returncode == 1 and ended.stdout == ""
    assert len(ended.stderr.splitlines()) == 1 and f"{name}=" in ended.stderr and value in ended.stderr


def test_an_unknown_argument_is_refused():
    ended = run_start("--fast")
    assert ended.returncode == 1 and "--fast" in ended.stderr


def test_a_set_up_machine_is_not_set_up_again():
    ended = run_start("--setup", "tests/requirements.txt")
    python, ollama = ended.stdout.splitlines()
    assert ended.returncode == 0 and ended.stderr == ""
    assert os.access(python, os.X_OK) and os.access(ollama, os.X_OK)


def test_a_taken_api_port_stops_the_start(make_service):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        service = make_service(wait=False, LLM_API_PORT=port)
        assert service.process.wait(20) == 1
        assert "LLM_API_PORT" in service.log() and str(port) in service.log()


def test_an_ollama_port_taken_by_something_else_stops_the_start(make_service):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        service = make_service(wait=False, OLLAMA_HOST=f"127.0.0.1:{taken.getsockname()[1]}")
        assert service.process.wait(20) == 1
        assert "OLLAMA_HOST" in service.log()


def test_an_ollama_that_is_there_is_used_and_left_alone(make_service, ollama_server):
    ollama = ollama_server()
    service = make_service(OLLAMA_HOST=f"127.0.0.1:{ollama.port}", OLLAMA_MODELS=str(ollama.models))
    assert service.get("/api/stats").json()["ollama"]["pid"] is None
    service.stop()
    assert ollama.process.poll() is None and call("GET", ollama.url + "/api/version").ok


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_it_ends_within_10_s_with_status_0_and_leaves_no_process(make_service, gguf, sig):
    service = make_service(models={"gemma": gguf})
    service.generate("gemma")
    began = time.monotonic()
    assert service.stop(sig) == 0
    assert time.monotonic() - began < 10


def test_it_ends_within_10_s_though_ollama_hangs(make_service):
    service = make_service()
    os.kill(service.ollama_pid(), signal.SIGSTOP)
    began = time.monotonic()
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(15) == 0
    assert time.monotonic() - began < 10
    assert not service.processes()


def test_gunicorns_death_ends_all_with_its_status(make_service):
    service = make_service()
    master = psutil.Process(service.worker_pid()).ppid()
    os.kill(master, signal.SIGKILL)
    assert service.process.wait(20) == 128 + signal.SIGKILL
    wait_for(lambda: not service.processes(), 5, "the end of all processes")


def test_five_deaths_of_ollama_within_a_minute_end_the_service(make_service):
    service = make_service()
    for _ in range(5):
        pid = service.ollama_pid()
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: service.process.poll() is not None or service.ollama_pid() != pid, 15, "the next Ollama")
    assert service.process.wait(20) == 1
    wait_for(lambda: not service.processes(), 5, "the end of all processes")


def test_a_killed_launcher_leaves_nothing_that_disturbs_the_next_start(make_service, gguf):
    first = make_service(models={"gemma": gguf})
    first.load("gemma")
    first.process.kill()
    first.process.wait()
    wait_for(lambda: not first.processes(), 15, "the end of all that the killed launcher started")
    second = make_service(LLM_API_PORT=first.port, OLLAMA_HOST=f"127.0.0.1:{first.ollama_port}")
    assert second.get("/health").json()["status"] == "healthy"


def test_health_says_wait_while_ollama_starts(make_service, tmp_path, ollama_binary):
    slow = tmp_path / "ollama"
    slow.write_text(f'#!/bin/sh\nsleep 3\nexec {ollama_binary} "$@"\n')
    slow.chmod(0o755)
    service = make_service(wait=False, PATH=f"{tmp_path}:{os.environ['PATH']}")
    answer, = wait_for(lambda: [service.get("/health")], 20, "the API's first answer")  # a 503 alone would be false
    assert answer.status_code == 503
    assert answer.json()["recommended_action"] == "wait" and answer.headers["Retry-After"]
    service.wait_healthy(20)


def test_context_length_and_gpu_layers_hold_for_callers_of_ollamas_own_port(make_service, gguf):
    service = make_service(models={"gemma": gguf}, LLM_CONTEXT_LENGTH=1536, LLM_GPU_LAYERS=7)
    runner = service.load("gemma")
    command = runner.cmdline()
    assert command[command.index("-c") + 1] == "1536"
    assert runner.environ()["LLAMA_ARG_N_GPU_LAYERS"] == "7"
    info = service.get("/api/info").json()
    assert info["context_length"] == 1536 and info["gpu_layers"] == "7"
    assert service.get("/api/models/loaded").json()["loaded_models"][0]["context_length"] == 1536


def test_ollamas_own_context_length_wins_and_auto_leaves_the_layers_to_ollama(make_service, gguf):
    service = make_service(models={"gemma": gguf}, OLLAMA_CONTEXT_LENGTH=1024, LLM_CONTEXT_LENGTH=2048, LLM_GPU_LAYERS="auto")
    runner = service.load("gemma")
    assert runner.cmdline()[runner.cmdline().index("-c") + 1] == "1024"
    assert "LLAMA_ARG_N_GPU_LAYERS" not in runner.environ()
    assert service.get("/api/info").json()["context_length"] == 1024


def test_info_says_what_runs(service):
    info = service.get("/api/info").json()
    assert info.items() >= {"service": "llm-service", "ollama_url": service.ollama_url, "default_model": "gemma:latest",
                            "api_port": service.port, "models_path": str(service.models)}.items()
    assert info["ollama_version"] == service.ollama("GET", "/api/version").json()["version"]


def test_health_of_a_working_service(service):
    answer = service.get("/health")
    assert answer.status_code == 200
    assert answer.json().items() >= {"status": "healthy", "models_count": 1, "models": ["gemma:latest"], "gpu": "none",
                                     "recommended_action": "none"}.items()


def test_the_list_follows_changes_made_through_either_port(service, gguf):
    def listed():
        answer = service.get("/api/models").json()
        assert answer["count"] == len(answer["models"])
        return {model["name"] for model in answer["models"]}

    assert listed() == {"gemma:latest"}
    for name in ("one", "two"):
        assert service.ollama("POST", "/api/copy", json={"source": "gemma", "destination": name}).ok
        assert f"{name}:latest" in listed()
    assert service.ollama("DELETE", "/api/delete", json={"model": "one"}).ok
    assert listed() == {"gemma:latest", "two:latest"}
    assert service.delete("/api/models/delete", json={"model": "two"}).json()["status"] == "success"
    assert listed() == {"gemma:latest"}


def test_a_loaded_model_shows_as_such(service):
    service.load("gemma")
    model, = service.get("/api/models").json()["models"]
    assert model["loaded"] is True and model["expires_at"].endswith("Z") and isinstance(model["size_vram"], int)
    loaded, = service.get("/api/models/loaded").json()["loaded_models"]
    assert loaded["name"] == "gemma:latest" and loaded["context_length"] == 4096
    assert service.post("/api/cache/clear").json()["unloaded_models"] == ["gemma:latest"]
    model, = service.get("/api/models").json()["models"]
    assert model["loaded"] is False and model["expires_at"] is None


def test_stats_of_a_loaded_model(service):
    runner = service.load("gemma")
    stats = service.get("/api/stats").json()
    shown, = stats["runners"]
    assert shown["pid"] == runner.pid and shown["model"] == "gemma:latest" and shown["state"] == "running"
    assert shown["memory_mb"] == pytest.approx(runner.memory_info().rss / 2**20, rel=0.1)
    assert stats["process_memory_mb"] >= shown["memory_mb"]
    assert stats["ollama"]["pid"] == service.ollama_pid() and stats["ollama"]["restarts"] == 0
    assert stats["gpu_utilization"] == stats["gpu_memory"] == stats["gpu_temperature"] == "N/A"
    assert stats["memory"]["total_mb"] == psutil.virtual_memory().total >> 20
    assert stats["disk"]["partial_bytes"] == 0


def test_cpu_use_is_that_of_the_time_since_the_reading_before(service):
    generation = service.generate("gemma")
    wait_for(lambda: (service.get("/api/stats").json()["runners"][0]["cpu_percent"] or 0) > 30, 20,
             "the CPU use of a generating runner")
    generation.close()


def test_delete_unloads_first_and_counts_what_came_free(make_service, gguf):
    service = make_service(models={"gemma": gguf})
    assert service.ollama("POST", "/api/copy", json={"source": "gemma", "destination": "twin"}).ok
    runner = service.load("gemma")
    shared = service.delete("/api/models/delete?model=twin").json()
    assert shared["status"] == "success" and shared["freed_bytes"] < 10_000  # the weights are gemma's, too
    answer = service.delete("/api/models/delete", json={"model": "gemma"}).json()
    assert answer["freed_bytes"] >= gguf.stat().st_size
    assert not runner.is_running() and service.get("/api/models").json()["models"] == []
    gone = service.delete("/api/models/delete", json={"model": "gemma"})
    assert gone.status_code == 404 and gone.json()["code"] == "model_not_found"


def test_delete_refuses_a_busy_model_unless_forced(make_service, gguf):
    service = make_service(models={"gemma": gguf})
    generation = service.generate("gemma")
    busy = service.delete("/api/models/delete", json={"model": "gemma"})
    assert busy.status_code == 409 and busy.json()["code"] == "model_busy" and not generation.done
    assert service.delete("/api/models/delete", json={"model": "gemma", "force": True}).status_code == 200
    assert generation.wait(10).error
    assert service.get("/api/models").json()["count"] == 0


def test_the_main_job_from_pull_to_delete(make_service, registry, gguf):
    service = make_service()
    name = registry.add("ns/gemma:latest", gguf)
    lines = [json.loads(line) for line in
             service.post("/api/models/pull", json={"model": name, "insecure": True}).iter_lines()]
    assert lines[-1]["status"] == "success" and lines[-1]["percent"] == 100
    assert [model["name"] for model in service.get("/api/models").json()["models"]] == [name]
    said = service.ollama("POST", "/api/generate", json={"model": name, "prompt": "1 2 3 4", "raw": True, "stream": False,
                                                         "options": {"num_predict": 4}}).json()
    assert said["done"] and said["response"]
    cleared = service.post("/api/cache/clear").json()
    assert cleared["verified"] and "cache cleared" in cleared["message"].lower()
    assert service.delete("/api/models/delete", json={"model": name}).json()["freed_bytes"] >= gguf.stat().st_size

