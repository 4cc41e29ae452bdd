"""Downloads from the tests' registry, through the real Ollama."""

import concurrent.futures
import json
import threading
import time

import pytest

from helpers.listener import (
    PULL,
    Listener,
    assert_in_order,
    is_whole,
    pull_of,
    running_pulls,
)
from helpers.models import blob_path
from helpers.waiting import wait_for


def partial_bytes(service):
    return service.get("/api/stats").json()["disk"]["partial_bytes"]


def pull(service, model, **fields):
    return service.post(PULL, json={"model": model, "insecure": True, **fields})


def cancel(service, model, **fields):
    return service.delete(PULL, json={"model": model, **fields})


# What a pull answers


def test_a_download_streams_ollamas_lines_with_overall_figures(service, registry):
    name = registry.add_random("ns/figures:latest", 60)
    registry.rate = 20e6
    began = time.monotonic()
    listener = Listener(service, name)
    assert listener.status == 200
    assert listener.answer.headers["Content-Type"] == "application/x-ndjson"
    assert listener.answer.headers["Transfer-Encoding"] == "chunked"
    last = listener.end()
    assert_in_order(listener.lines)
    assert last["total_bytes"] == last["completed_bytes"] == registry.size(name)
    statuses = {line["status"] for line in listener.lines}
    assert {"pulling manifest", "verifying sha256 digest", "success"} <= statuses
    middle = [line for line in listener.lines if line.get("bytes_per_second")]
    assert middle and all(isinstance(line["eta_seconds"], int) for line in middle)
    # On a busy machine less comes than the registry would send.
    for at, line in list(zip(listener.at, listener.lines, strict=True))[5:]:
        if line.get("bytes_per_second"):
            average = line["completed_bytes"] / (at - began)
            assert min(5e6, average / 4) < line["bytes_per_second"] < 60e6


class Pauses:
    """Measures for how long this process is held up by others of a busy machine."""

    def __enter__(self):
        self._ended, self._longest_s = threading.Event(), 0
        self._thread = threading.Thread(target=self._measure)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._ended.set()
        self._thread.join()

    def longest_s(self):
        return self._longest_s

    def _measure(self):
        before = time.monotonic()
        while not self._ended.wait(0.02):
            now = time.monotonic()
            self._longest_s = max(self._longest_s, now - before - 0.02)
            before = now


def test_at_most_five_progress_lines_come_in_a_second(service, registry):
    name = registry.add_random("ns/often:latest", 60)
    registry.rate = 20e6
    with Pauses() as pauses:
        listener = Listener(service, name)
        assert listener.end()["status"] == "success"
    came = zip(listener.at, listener.lines, strict=True)
    progress = [at for at, line in came if line["status"].startswith("pulling ")]
    most = max(sum(start <= at < start + 1 for at in progress) for start in progress)
    # Each of the three layers begins with a change of status; and a clock's tick. What comes while
    # this process is held up is read at once afterwards.
    assert most <= 5 * (1 + pauses.longest_s()) + 3 + 1


def test_without_stream_the_answer_comes_at_the_end(service, registry):
    name = registry.add_random("ns/plain:latest", 10)
    answer = pull(service, name, stream=False)
    assert answer.status_code == 200 and answer.json()["status"] == "success"
    assert answer.json()["total_bytes"] == registry.size(name)


def break_registry(registry, fault):
    """Break it in this way; return the name to pull."""
    name = registry.add_random("ns/fault:latest", 2, seed=fault)
    if fault == "unknown":
        return name.replace("fault", "unknown")
    if fault == "down":
        registry.down()
    elif fault == "broken":
        registry.manifest_status = 500
    elif fault == "corrupt":
        registry.corrupt.add(registry.layers(name)[0]["digest"])
    return name


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    "fault, status, code",
    [
        ("unknown", 404, "model_not_found"),
        ("down", 502, "registry_unreachable"),
        ("broken", 502, "registry_error"),
    ],
)
def test_a_failure_has_its_status(service, registry, fault, status, code, stream):
    answer = pull(service, break_registry(registry, fault), stream=stream)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert answer.json()["error"].endswith(".")
    assert "fault" not in service.get("/api/models").text


@pytest.mark.parametrize("stream", [True, False])
def test_a_damaged_layer_shows_after_its_last_byte(service, registry, stream):
    answer = pull(service, break_registry(registry, "corrupt"), stream=stream)
    lines = [json.loads(line) for line in answer.iter_lines()]
    assert_in_order(lines)
    assert lines[-1]["code"] == "digest_mismatch"
    assert answer.status_code == (200 if stream else 502)
    assert "fault" not in service.get("/api/models").text


# Listeners


def test_two_listeners_of_one_model_share_one_download(service, registry):
    name = registry.add_random("ns/shared:latest", 60)
    registry.rate = 10e6
    first = Listener(service, name).flowing()
    second = Listener(service, name.upper().replace("LOCALHOST", "localhost"))
    assert pull_of(service, name)["listeners"] == 2
    wait_for(lambda: second.lines, 30, "a line for who came later")
    assert second.lines[0]["completed_bytes"] > 1e6
    assert first.end()["status"] == second.end()["status"] == "success"
    assert first.lines[-1] == second.lines[-1]
    assert registry.bytes_sent() < registry.size(name) * 1.05


def test_thirty_listeners_all_get_success(service, registry):
    name = registry.add_random("ns/many:latest", 60)
    registry.rate = 20e6
    with concurrent.futures.ThreadPoolExecutor(30) as pool:
        listeners = list(pool.map(lambda _: Listener(service, name), range(30)))
    for listener in listeners:
        assert listener.end()["status"] == "success"
        assert_in_order(listener.lines)
    assert registry.bytes_sent() < registry.size(name) * 1.05


@pytest.mark.parametrize("stalled", [False, True])
def test_with_the_last_listener_the_download_stops_and_the_next_goes_on_from_there(
    service, registry, stalled
):
    name = registry.add_random("ns/left:latest", 100, seed=stalled)
    registry.rate = 20e6
    first, second = Listener(service, name), Listener(service, name)
    first.flowing(10)
    first.leave()
    second.flowing(15)
    registry.stall = stalled
    second.leave()
    # The contract's 2 s, with room for a busy machine.
    wait_for(lambda: pull_of(service, name)["state"] == "cancelled", 4, "the download's end")
    wait_for(lambda: registry.active == 0, 30, "the end of the transfers")
    registry.stall, registry.rate = False, None
    again = Listener(service, name)
    assert again.end()["status"] == "success"
    assert_in_order(again.lines)
    assert registry.bytes_sent() < registry.size(name) * 1.1
    assert is_whole(service, registry, name)


def test_detached_it_goes_on_without_listeners(service, registry):
    name = registry.add_random("ns/detached:latest", 40)
    registry.rate = 4e6  # it still runs when the listener leaves
    assert pull(service, name, detach=True).status_code == 202
    listener = Listener(service, name).flowing()
    listener.leave()
    registry.rate = None
    wait_for(lambda: pull_of(service, name)["state"] == "success", 60, "success")
    ended = pull_of(service, name)
    assert ended["detached"] and ended["percent"] == 100
    assert ended["ended_at"].endswith("+00:00")


# The list, cancel, purge


def test_the_list_shows_what_runs_and_what_ended(service, registry):
    name = registry.add_random("ns/listed:latest", 50)
    registry.rate = 4e6
    listener = Listener(service, name).flowing()
    wait_for(lambda: pull_of(service, name)["bytes_per_second"] > 0, 30, "a speed")
    running = pull_of(service, name)
    assert running["state"] == "running" and running["listeners"] == 1
    assert 0 < running["percent"] < 100
    assert running["ended_at"] is None
    cancelled = cancel(service, name)
    assert cancelled.status_code == 200 and cancelled.json()["freed_bytes"] == 0
    assert listener.end()["code"] == "cancelled"
    assert_in_order(listener.lines)
    assert pull_of(service, name)["state"] == "cancelled"
    assert cancel(service, name).status_code == 404


@pytest.mark.parametrize("while_it_runs", [True, False])
def test_purge_removes_the_parts(service, registry, while_it_runs):
    name = registry.add_random("ns/purged:latest", 50, seed=while_it_runs)
    registry.stall_after(25_000_000)  # in the first layer's file, which grows no more
    listener = Listener(service, name).flowing(8)
    if not while_it_runs:
        cancel(service, name)
        listener.end()

    def parts():
        blobs = [blob_path(service.models, layer["digest"]) for layer in registry.layers(name)]
        return [part for blob in blobs for part in blob.parent.glob(f"{blob.name}-partial*")]

    assert parts()
    wait_for(lambda: partial_bytes(service) > 5e6, 60, "the watch sees the parts")
    assert pull_of(service, name)["kept_bytes"] > 5e6
    answer = cancel(service, name, purge=True)
    assert answer.status_code == 200 and answer.json()["freed_bytes"] > 5e6
    assert not parts() and pull_of(service, name)["kept_bytes"] == 0
    registry.stall = False
    assert Listener(service, name).end()["status"] == "success"


def test_a_pull_right_after_a_cancel_works(service, registry):
    name = registry.add_random("ns/quick:latest", 40)
    registry.rate = 20e6
    for _ in range(5):
        listener = Listener(service, name)
        wait_for(lambda one=listener: one.lines, 30, "a line")
        cancel(service, name)
    registry.rate = None
    assert Listener(service, name).end()["status"] == "success"


@pytest.fixture(autouse=True)
def no_pull_left(service):
    """What a test has downloaded goes, so that the next finds the shared service as it was."""
    yield
    for each in running_pulls(service):
        cancel(service, each["model"])
    for model in service.get("/api/models").json()["models"]:
        if model["name"].startswith("localhost:"):
            service.delete("/api/models/delete", json={"model": model["name"]})
