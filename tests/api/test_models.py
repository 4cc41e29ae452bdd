"""Info, health, stats, lists and delete of a working service, and the whole job in one go."""

import json
import os
import shutil

import psutil
import pytest

from helpers.answers import GEMMA, clear, health, stats
from helpers.models import blob_path, file_digest, manifest_path
from helpers.waiting import wait_for


@pytest.fixture
def quiet(service):
    """The shared service with nothing loaded."""
    clear(service)
    return service


def names(service):
    answer = service.get("/api/models").json()
    assert answer["count"] == len(answer["models"])
    return {model["name"] for model in answer["models"]}


def entry(service, name=GEMMA):
    return next(m for m in service.get("/api/models").json()["models"] if m["name"] == name)


def copy(service, source, destination):
    body = {"source": source, "destination": destination}
    assert service.ollama("POST", "/api/copy", json=body).ok


def delete(service, model, **fields):
    return service.delete("/api/models/delete", json={"model": model, **fields})


def test_info_says_what_runs(service):
    info = service.get("/api/info").json()
    wanted = {
        "service": "llm-service",
        "ollama_url": service.ollama_url,
        "default_model": GEMMA,
        "api_port": service.port,
        "context_length": 4096,
        "models_path": str(service.models),
    }
    assert info.items() >= wanted.items()
    assert info["ollama_version"] == service.ollama("GET", "/api/version").json()["version"]


@pytest.mark.parametrize("path", ["/health", "/health?deep=1"])
def test_health_of_a_working_service(quiet, path):
    quiet.load(GEMMA)
    answer = quiet.get(path)
    assert answer.status_code == 200
    wanted = {
        "status": "healthy",
        "models_count": 1,
        "models": [GEMMA],
        "loaded": [GEMMA],
        "gpu": "none",
        "recommended_action": "none",
    }
    assert answer.json().items() >= wanted.items()


def test_the_list_follows_changes_made_through_either_port(service):
    assert names(service) == {GEMMA}
    for name in ("one", "two"):
        copy(service, "gemma", name)
        assert f"{name}:latest" in names(service)
    assert service.ollama("DELETE", "/api/delete", json={"model": "one"}).ok
    assert names(service) == {GEMMA, "two:latest"}
    assert delete(service, "two").json()["status"] == "success"
    assert names(service) == {GEMMA}


def test_a_loaded_model_shows_as_such(quiet):
    quiet.load("gemma")
    model = entry(quiet)
    assert model["loaded"] is True
    assert model["expires_at"].endswith("Z")
    assert isinstance(model["size_vram"], int)
    (loaded,) = quiet.get("/api/models/loaded").json()["loaded_models"]
    assert loaded["name"] == GEMMA and loaded["context_length"] == 4096
    assert clear(quiet)["unloaded_models"] == [GEMMA]
    model = entry(quiet)
    assert model["loaded"] is False and model["expires_at"] is None


def test_stats_of_a_loaded_model(quiet):
    runner = quiet.load("gemma")

    def shown():  # what it holds moves a little after it was loaded
        memory_mb = pytest.approx(runner.memory_info().rss / 2**20, rel=0.1)
        return [each for each in stats(quiet)["runners"] if each["memory_mb"] == memory_mb]

    (shown,) = wait_for(shown, 60, "the watch sees the loaded runner")
    assert shown["pid"] == runner.pid and shown["model"] == GEMMA

    def added_up():  # at the end of a look, in whose middle a runner's own figure shows already
        told = stats(quiet)
        return told["process_memory_mb"] >= shown["memory_mb"] and told

    told = wait_for(added_up, 60, "the service's memory with the runner's")
    assert told["ollama"]["pid"] == quiet.ollama_pid() and told["ollama"]["restarts"] == 0
    assert told["gpu_utilization"] == told["gpu_memory"] == told["gpu_temperature"] == "N/A"
    assert told["memory"]["total_mb"] == psutil.virtual_memory().total >> 20


def test_the_cpu_use_of_a_generating_runner_shows(quiet):
    generation = quiet.generate("gemma")

    def cpu_percent():
        return max((each["cpu_percent"] for each in stats(quiet)["runners"]), default=0)

    # On a busy machine it gets a small part of a core; an idle runner has none.
    wait_for(lambda: cpu_percent() > 5, 60, "the CPU use of a generating runner")
    generation.close()


def test_delete_unloads_first_and_counts_what_came_free(quiet, make_gguf_variant):
    gguf = make_gguf_variant(1)
    quiet.add_model("own", gguf)
    blob = blob_path(quiet.models, file_digest(str(gguf)))
    blob.unlink()
    shutil.copyfile(gguf, blob)  # of a hard link nothing comes free
    copy(quiet, "own", "twin")
    runner = quiet.load("own")
    # The weights are those of the other name, too.
    answer = quiet.delete("/api/models/delete?model=twin").json()
    assert answer["status"] == "success" and answer["freed_bytes"] < 10_000
    freed = delete(quiet, "own").json()["freed_bytes"]
    assert 0 <= freed - gguf.stat().st_size < 50_000
    assert not runner.is_running()
    assert names(quiet) == {GEMMA}
    gone = delete(quiet, "own")
    assert gone.status_code == 404 and gone.json()["code"] == "model_not_found"


def test_a_copy_shows_under_which_name_it_is_loaded(quiet):
    copy(quiet, "gemma", "twin")
    quiet.load("twin")
    shown = {name: entry(quiet, name) for name in (GEMMA, "twin:latest")}
    told = {name: (each["loaded"], each["loaded_as"]) for name, each in shown.items()}
    assert told == {GEMMA: (True, "twin:latest"), "twin:latest": (True, "twin:latest")}

    def taken():  # other tests may have left parts of downloads beside
        manifest = json.loads(manifest_path(quiet.models, GEMMA).read_text())
        layers = [*manifest["layers"], manifest["config"]]
        blobs = {blob_path(quiet.models, layer["digest"]) for layer in layers}
        return sum(each.stat().st_blocks * 512 for each in blobs)

    # Within the minute after which the disk is read anew: a file that was written just now may
    # take a block more once the kernel has decided where it lies.
    wait_for(lambda: stats(quiet)["disk"]["models_bytes"] == taken(), 90, "each blob once")
    clear(quiet)
    assert entry(quiet)["loaded_as"] is None
    assert delete(quiet, "twin").ok


def test_a_delete_never_takes_another_model_than_the_one_named(service):
    """Ollama takes the end of `m:local` for where to run, and would delete `m:latest`."""
    for name in ("m", "m:local"):
        copy(service, "gemma", name)
    there = {GEMMA, "m:latest", "m:local"}
    try:
        assert names(service) == there
        refused = delete(service, "m:local", force=True)
        assert (refused.status_code, refused.json()["code"]) == (409, "model_not_addressable")
        assert "m:latest" in refused.json()["error"] and names(service) == there
        cleared = service.post("/api/cache/clear", json={"model": "m:local"})
        assert cleared.status_code == 200
        assert delete(service, "m").json()["message"] == "m is deleted."
        assert names(service) == there - {"m:latest"}
        assert delete(service, "m:local").status_code == 409
    finally:
        manifest_path(service.models, "m:local").unlink()
    assert names(service) == {GEMMA}


@pytest.mark.parametrize(
    "text",
    [
        "null",
        "{}",
        '{"schemaVersion":2,"layers":null}',
        '{"manifests":[{"digest":"sha256:0","platform":{}}]}',
    ],
)
def test_what_is_listed_can_be_cleared_and_deleted(service, text):
    """A model in the cloud, or an index that was pulled, has no files."""
    path = manifest_path(service.models, "bare")
    path.parent.mkdir()
    path.write_text(text)
    assert names(service) == {GEMMA, "bare:latest"}
    for path in ("/api/cache/clear", "/api/session/reset"):
        assert service.post(path, json={"model": "bare"}).status_code == 200
    assert delete(service, "bare").json()["status"] == "success"
    assert names(service) == {GEMMA}
    assert service.post("/api/session/reset").json()["model"] == GEMMA  # no failed load is left


def test_delete_refuses_a_busy_model_unless_forced(quiet, make_gguf_variant):
    quiet.add_model("own", make_gguf_variant(1))
    generation = quiet.generate("own")
    busy = delete(quiet, "own")
    assert busy.status_code == 409 and busy.json()["code"] == "model_busy"
    assert busy.json()["error"].startswith("own loads, or is in the middle of an answer")
    assert not generation.done
    assert delete(quiet, "own", force=True).status_code == 200
    assert generation.wait(60).error
    assert names(quiet) == {GEMMA}


def test_the_main_job_from_pull_to_delete(quiet, registry, make_gguf_variant):
    gguf = make_gguf_variant(2)
    name = registry.add("ns/gemma:latest", gguf)
    answer = quiet.post("/api/models/pull", json={"model": name, "insecure": True})
    last = json.loads(list(answer.iter_lines())[-1])
    assert last["status"] == "success" and last["percent"] == 100
    assert name in names(quiet)
    body = {"model": name, "prompt": "1 2 3 4", "raw": True, "stream": False}
    said = quiet.ollama(
        "POST", "/api/generate", json={**body, "options": {"num_predict": 4}}
    ).json()
    assert said["done"] and said["response"]
    cleared = clear(quiet)
    assert cleared["verified"] and cleared["unloaded_models"] == [name]
    assert delete(quiet, name).json()["freed_bytes"] >= gguf.stat().st_size
    assert health(quiet)["models"] == [GEMMA]


def test_what_a_delete_would_free_is_told_before(make_service, make_gguf_variant):
    weights = [make_gguf_variant(1), make_gguf_variant(2)]
    service = make_service(models=dict(zip(("a:latest", "b:latest"), weights, strict=True)))
    for blob in (service.models / "blobs").iterdir():  # the helper's are hard links
        shutil.copyfile(blob, f"{blob}.own")
        os.replace(f"{blob}.own", blob)
    copy(service, "a:latest", "c:latest")
    assert entry(service, "a:latest")["frees_bytes"] < 10_000  # the copy keeps the weights
    told = entry(service, "b:latest")["frees_bytes"]
    assert told >= weights[1].stat().st_size
    freed = delete(service, "b:latest").json()["freed_bytes"]
    assert told <= freed < told + 100_000  # with the manifest and what Ollama noted
    delete(service, "c:latest")
    assert entry(service, "a:latest")["frees_bytes"] >= weights[0].stat().st_size
