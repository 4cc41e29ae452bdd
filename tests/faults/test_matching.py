"""Runners and names that do not match one to one, on a real Ollama."""

import os
import shutil
import signal

import pytest

from helpers.answers import CLEAR, ask, clear, error, reset, stats
from helpers.causes import Waiting
from helpers.embedding import split_embedding_model
from helpers.gpu_ollama import RENAMING, gpu_ollama
from helpers.models import config_json, manifest_path
from helpers.processes import is_gone
from helpers.waiting import wait_for

A, B = "a:latest", "b:latest"  # of the same weights


def listed(service):
    """Return what Ollama lists: [(name, the beginning of the digest)]."""
    models = service.ollama("GET", "/api/ps").json()["models"]
    return [(model["name"], model["digest"][:12]) for model in models]


def load(service, name, keep_alive=-1):
    """Load a model for good; return its runner."""
    before = {each.pid for each in service.runners()}
    body = {"model": name, "keep_alive": keep_alive}
    assert service.ollama("POST", "/api/generate", json=body).ok
    (runner,) = [each for each in service.runners() if each.pid not in before]
    return runner


def shown(service):
    """Return the models of the runners that the watch shows, by their pids."""
    return {each["pid"]: each["model"] for each in stats(service)["runners"]}


def wait_seen(service, *runners):
    wait_for(lambda: shown(service).keys() == {each.pid for each in runners}, 30, "they are seen")


def delete(service, name, **fields):
    return service.delete("/api/models/delete", json={"model": name, **fields})


@pytest.fixture(scope="module")
def made(make_module_service, make_gguf_variant):
    return make_module_service(
        models={A: make_gguf_variant(1)},
        LLM_MODEL="a",
        LLM_CONTEXT_LENGTH=1024,
        # On two busy cores a busy runner that answers late would be hung.
        constants={"llm_service.clearing.CLEAR_RUNNER_S": 0.5},
    )


@pytest.fixture
def kin(made, make_gguf_variant):
    """A service with two models of the same weights alone, nothing loaded, Ollama's list empty."""
    made.wait_healthy(60)
    clear(made)
    wait_for(lambda: listed(made) == [], 60, "nothing is listed")
    shutil.rmtree(made.models / "manifests")  # what a test before has left
    made.add_model(A, make_gguf_variant(1))
    made.add_model(B, make_gguf_variant(1), config_json(size="another"))
    return made


def update(service, name, gguf):
    """Give a name to another model, as a pull or a create does; return the old line."""
    (before,) = [line for line in listed(service) if line[0] == name]
    service.add_model(name, gguf)
    return before


# Several models of the same weights


def test_clearing_an_idle_model_leaves_the_answer_of_another_of_the_same_weights(kin):
    busy = kin.generate(A)
    (runner,) = kin.runners()
    report = clear(kin, model=B)
    assert (report["killed"], report["left"], report["unloaded_models"]) == ([], [], [])
    assert report["verified"] is True
    busy.goes_on()
    busy.close()
    assert [name for name, _ in listed(kin)] == [A] and not is_gone(runner)


@pytest.mark.parametrize("force", [False, True])
def test_deleting_an_idle_model_leaves_the_answer_of_another_of_the_same_weights(kin, force):
    busy = kin.generate(A)
    answer = delete(kin, B, force=force)
    assert answer.status_code == 200, answer.text
    assert answer.json()["freed_bytes"] < 10_000
    busy.goes_on()
    busy.close()


def test_a_model_that_loads_is_not_ended_for_another_of_the_same_weights(kin, others):
    loading = others.submit(kin.load, A)
    (runner,) = wait_for(kin.runners, 60, "the runner of the load")
    answer = kin.post(CLEAR, json={"model": B})
    if answer.status_code != 200:  # it loads for longer than a clear may wait
        assert error(answer, 503, "runner_unknown")["unknown_processes"] == [runner.pid]
    assert loading.result() == runner and not is_gone(runner)
    assert clear(kin, model=B)["verified"] is True
    assert not is_gone(runner)


def test_the_runner_of_one_is_taken_over_by_the_other_with_other_options(kin):
    first = kin.load(A)
    second = kin.load(B, num_ctx=512)
    assert is_gone(first) and [name for name, _ in listed(kin)] == [B]
    wait_for(lambda: shown(kin) == {second.pid: B}, 30, "the watch shows B")
    assert clear(kin, model=A)["unloaded_models"] == []
    report = clear(kin, model=B)
    assert (report["unloaded_models"], report["verified"]) == ([B], True)
    assert is_gone(second)


def test_a_copy_is_cleared_by_either_name(kin):
    body = {"source": A, "destination": "copy"}
    assert kin.ollama("POST", "/api/copy", json=body).ok
    runner = kin.load(A)
    report = clear(kin, model="copy")
    assert report["unloaded_models"] and report["verified"] is True
    assert is_gone(runner) and listed(kin) == []
    delete(kin, "copy")


# Updated and deleted while it is loaded


@pytest.mark.parametrize("model", [None, A])
@pytest.mark.parametrize("seen", [True, False])
def test_the_runner_of_an_old_version_goes_and_its_line_too(kin, make_gguf_variant, model, seen):
    old = load(kin, A)
    if seen:
        wait_seen(kin, old)
    update(kin, A, make_gguf_variant(2))
    report = clear(kin, **({"model": model} if model else {}))
    assert (report["killed"], report["left"], report["unloaded_models"]) == ([], [], [A])
    assert report["verified"] is True
    assert is_gone(old) and listed(kin) == []
    assert {each["name"] for each in kin.ollama("GET", "/api/tags").json()["models"]} == {A, B}


def test_old_and_new_version_are_both_of_that_model(kin, make_gguf_variant):
    old = load(kin, A, keep_alive="5m")
    update(kin, A, make_gguf_variant(2))
    new = load(kin, A)
    assert [name for name, _ in listed(kin)] == [A, A]
    shown_as = {each["name"]: each for each in kin.get("/api/models").json()["models"]}
    assert shown_as[A]["expires_at"] > "2100"  # as the version that is on the disk
    wait_for(lambda: shown(kin) == {old.pid: A, new.pid: A}, 30, "both are shown")
    report = clear(kin, model=A)
    assert (report["left"], report["unloaded_models"], report["verified"]) == ([], [A], True)
    assert is_gone(old) and is_gone(new) and listed(kin) == []


def test_a_busy_old_version_is_spared_and_named_or_ended(kin, make_gguf_variant):
    old = Waiting(kin, A)
    update(kin, A, make_gguf_variant(2))
    new = load(kin, A)
    report = clear(kin, model=A, force=False)
    assert (report["left"], report["verified"]) == ([A], False)
    assert is_gone(new) and not is_gone(old.runner)
    assert error(delete(kin, A), 409, "model_busy")
    report = clear(kin, model=A)
    assert report["killed"] == [{"pid": old.runner.pid, "model": A, "reason": "busy"}]
    assert report["verified"] is True
    assert is_gone(old.runner) and listed(kin) == []
    assert old.status() == 500


def test_an_update_to_the_same_weights_is_cleared_by_its_name(kin, make_gguf_variant):
    old = load(kin, A)
    kin.add_model(A, make_gguf_variant(1), config_json(size="third"))
    report = clear(kin, model=A)
    assert (report["unloaded_models"], report["verified"]) == ([A], True)
    assert is_gone(old) and listed(kin) == []


def test_what_was_deleted_while_it_was_loaded_goes_with_its_line(kin, make_gguf_variant):
    kin.add_model("gone:latest", make_gguf_variant(3))
    runner = load(kin, "gone")
    wait_seen(kin, runner)
    assert kin.ollama("DELETE", "/api/delete", json={"model": "gone"}).ok
    report = clear(kin)
    assert (report["killed"], report["unloaded_models"]) == ([], ["gone:latest"])
    assert is_gone(runner) and listed(kin) == []
    assert not manifest_path(kin.models, "llm-service/unload").parent.exists()


def test_the_watch_cleans_the_list_of_an_old_version_that_was_killed(kin, make_gguf_variant):
    old = load(kin, A)
    wait_seen(kin, old)
    update(kin, A, make_gguf_variant(2))
    new = load(kin, A)
    old.kill()
    wait_for(lambda: len(listed(kin)) == 1, 60, "one version is listed")
    assert not is_gone(new)
    ask(kin, A)


def test_a_service_that_has_forgotten_all_clears_an_old_version(kin, make_gguf_variant):
    old = load(kin, A)
    update(kin, A, make_gguf_variant(2))
    kin.delete("/api/models/delete", json={"model": B})
    worker = kin.worker_pid()
    os.kill(worker, signal.SIGKILL)
    wait_for(lambda: kin.worker_pid() not in (None, worker), 60, "another worker")
    kin.wait_healthy(60)
    report = clear(kin, model=A)
    assert (report["left"], report["unloaded_models"], report["verified"]) == ([], [A], True)
    assert is_gone(old) and listed(kin) == []


def test_a_model_of_several_files_is_told_from_another_of_the_same_files(kin):
    parts = split_embedding_model()
    kin.add_model("parts:latest", parts, config_json("bert", "8M", "F32"))
    kin.add_model("twin:latest", parts, config_json("bert", "8M", "another"))
    body = {"model": "parts", "input": ["a"], "keep_alive": -1}
    assert kin.ollama("POST", "/api/embed", json=body).ok
    (runner,) = kin.runners()
    wait_for(lambda: shown(kin) == {runner.pid: "parts:latest"}, 30, "it is shown")
    assert clear(kin, model="twin")["unloaded_models"] == []
    assert not is_gone(runner)
    kin.add_model("parts:latest", parts[:1], config_json("bert", "8M", "updated"))
    for name in ("twin", "parts"):
        report = clear(kin, model=name)
        assert report["verified"] is True
    assert (report["killed"], report["unloaded_models"]) == ([], ["parts:latest"])
    assert is_gone(runner) and listed(kin) == []
    for name in ("twin", "parts"):
        delete(kin, name)


# Processes that nobody can name


@pytest.fixture(scope="module")
def renaming(make_module_service, make_gguf_variant, ollama_binary, tmp_path_factory):
    """A service whose Ollama starts its runners with another option."""
    return make_module_service(
        binary=gpu_ollama(tmp_path_factory.mktemp("renaming"), ollama_binary, RENAMING),
        models={A: make_gguf_variant(1), "other:latest": make_gguf_variant(2)},
        LLM_MODEL="a",
        LLM_CONTEXT_LENGTH=1024,
    )


def test_a_model_whose_process_is_not_known_stays_loaded(renaming):
    for name in (A, "other:latest"):
        ask(renaming, name)
    before = sorted(listed(renaming))
    looks = set()

    def looked():
        looks.add(stats(renaming)["looked_at"])
        return len(looks) > 4 or sorted(listed(renaming)) != before

    wait_for(looked, 60, "four more looks")
    assert sorted(listed(renaming)) == before


def test_an_idle_model_whose_process_is_not_known_is_cleared(renaming):
    ask(renaming, A)
    report = clear(renaming, model=A)
    assert (report["unloaded_models"], report["left"], report["verified"]) == ([A], [], True)
    assert A not in [name for name, _ in listed(renaming)]


def test_no_clear_is_verified_while_a_process_that_is_not_known_holds_the_model(renaming):
    busy = renaming.generate(A)
    for fields in ({}, {"model": A}):
        answer = renaming.post(CLEAR, json=fields)
        report = error(answer, 503, "runner_unknown")
        assert (report["verified"], report["left"]) == (False, [A])
        assert answer.elapsed.total_seconds() < 4
    assert clear(renaming, model="other")["verified"] is True
    assert clear(renaming, force=False)["verified"] is False
    busy.goes_on()
    assert reset(renaming)["model_state"] in ("loading", "loaded")
    assert busy.wait(30).error
    renaming.wait_healthy(60)
