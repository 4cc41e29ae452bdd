"""Downloads against a registry, an Ollama and a disk that fail while they run."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from helpers.answers import reset
from helpers.causes import ollama_hung
from helpers.listener import (
    PULL,
    Listener,
    assert_in_order,
    is_whole,
    pulls,
)
from helpers.models import blob_path
from helpers.waiting import wait_for
from llm_service.downloads import Downloads
from llm_service.processes import Processes
from llm_service.store import Store
from ollama_client import Ollama


@pytest.fixture(scope="module")
def plain(make_module_service):
    """The file's service, without a model."""
    return make_module_service()


def assert_goes_on(service, registry, name):
    """Assert that the next pull ends well, and downloads only what is missing."""
    registry.stall, registry.rate = False, None
    assert Listener(service, name).end()["status"] == "success"
    assert registry.bytes_sent() < registry.size(name) * 1.1


# How it stands is not known yet, or no more


def test_an_answer_begins_after_a_while_though_it_is_not_known_how_it_stands(
    make_service, registry
):
    service = make_service(constants={"llm_service.streaming.FIRST_NEWS_S": 1})
    name = registry.add_random("ns/late:latest", 1)
    registry.manifest_delay = 4
    listener = Listener(service, name)
    assert listener.status == 200 and not listener.done
    assert listener.end()["status"] == "success"
    assert_in_order(listener.lines)


def test_while_ollama_is_silent_a_line_comes_every_second(plain, registry):
    name = registry.add_random("ns/silent:latest", 20)
    registry.rate = 10e6
    listener = Listener(plain, name).flowing()
    with ollama_hung(plain):
        start = len(listener.lines)
        wait_for(lambda: len(listener.lines) >= start + 4, 20, "four lines of a silent Ollama")
        at = listener.at[start:]
        gaps = [after - before for before, after in zip(at, at[1:], strict=False)]
        assert max(gaps) < 2
    assert listener.end()["status"] == "success"


def test_ended_downloads_are_kept_in_a_bounded_number(make_service, registry):
    service = make_service(constants={"llm_service.downloads.ENDED_KEPT": 3})
    for number in range(5):
        name = f"localhost:{registry.port}/ns/none:{number}"
        assert service.post(PULL, json={"model": name, "insecure": True}).status_code == 404

    def kept():
        return [pull["model"][-1] for pull in pulls(service)] == ["4", "3", "2"]

    wait_for(kept, 30, "the last three")


# Reconnects


def test_a_download_outlives_the_death_of_ollama(plain, registry):
    name = registry.add_random("ns/killed:latest", 60)
    registry.rate = 15e6
    listener = Listener(plain, name).flowing(10)
    os.kill(plain.ollama_pid(), signal.SIGKILL)
    assert listener.end()["status"] == "success"
    assert_in_order(listener.lines)
    assert listener.reconnects() and is_whole(plain, registry, name)


def test_a_download_outlives_a_cut_connection_and_a_reset_session(plain, registry):
    plain.wait_healthy(60)
    name = registry.add_random("ns/cut:latest", 60)
    registry.rate = 15e6
    listener = Listener(plain, name).flowing(5)
    registry.cut(reset=True)
    reset(plain, restart=True)
    assert listener.end()["status"] == "success"
    assert_in_order(listener.lines)
    assert listener.reconnects() and is_whole(plain, registry, name)
    assert registry.bytes_sent() < registry.size(name) * 1.4
    plain.wait_healthy(60)
    assert name in plain.get("/health").json()["models"]


def test_a_stall_is_noticed_and_mended_without_losing_a_byte(make_service, registry):
    service = make_service(constants={"llm_service.downloads.STALL_S": 2})
    name = registry.add_random("ns/stalled:latest", 60)
    registry.rate = 20e6
    listener = Listener(service, name).flowing(10)
    registry.stall = True
    listener.until(lambda line: line["status"].startswith("reconnecting (1 of"), "a reconnect")
    registry.stall = False
    assert listener.end()["status"] == "success"
    assert_in_order(listener.lines)
    assert registry.bytes_sent() < registry.size(name) * 1.1


def test_it_gives_up_after_a_bound_and_says_that_the_next_pull_goes_on(make_service, registry):
    constants = {"llm_service.downloads.STALL_S": 1, "llm_service.downloads.MAX_RECONNECTS": 2}
    service = make_service(constants=constants)
    name = registry.add_random("ns/hopeless:latest", 60)
    registry.rate = 20e6
    listener = Listener(service, name).flowing(10)
    registry.stall = True
    last = listener.end()
    assert_in_order(listener.lines)
    assert last["code"] == "pull_interrupted" and "goes on from here" in last["error"]
    assert_goes_on(service, registry, name)


def test_a_part_older_than_an_hour_survives_a_restart_of_ollama(plain, registry):
    plain.wait_healthy(60)
    name = registry.add_random("ns/aged:latest", 60)
    registry.rate = 20e6
    listener = Listener(plain, name).flowing(15)
    store = Store(plain.models)
    assert store.parts("*")
    plain.delete(PULL, json={"model": name})
    last = listener.end()
    wait_for(lambda: registry.active == 0, 30, "the end of the transfers")
    left = store.parts("*")
    assert left, (last, registry.bytes_sent(), os.listdir(plain.models / "blobs"))
    for part in left:
        os.utime(part, (time.time() - 7200,) * 2)
    reset(plain, restart=True)
    plain.wait_healthy(60)
    assert_goes_on(plain, registry, name)


def test_sigterm_ends_the_streams_with_their_last_line_and_the_parts_stay(make_service, registry):
    first = make_service()
    name = registry.add_random("ns/term:latest", 100)
    registry.rate = 20e6
    listener = Listener(first, name).flowing(20)
    assert first.stop() == 0
    assert listener.end()["code"] == "shutting_down"
    assert_in_order(listener.lines)
    second = make_service(OLLAMA_MODELS=first.models)
    assert_goes_on(second, registry, name)


def test_a_hundred_cancels_and_resumes_lose_nothing(ollama_server, registry):
    server = ollama_server()
    downloads = Downloads(Ollama(server.url), Store(server.models), Processes("/none"), 4)
    name = registry.add_random("ns/hundred:latest", 100)
    registry.rate = 2e6
    for _ in range(100):
        _, lines = downloads.pull(name, insecure=True)
        # In mid-layer: cancelled at the instant in which a layer begins, Ollama 0.34 may panic.
        next(
            line
            for line in lines
            if "error" in line or 0 < line.get("completed", 0) < line["total"]
        )
        downloads.cancel(name)
    registry.rate = None
    _, lines = downloads.pull(name, insecure=True)
    *_, last = lines
    assert last.get("status") == "success", last
    for layer in registry.layers(name):  # Ollama has verified the digests; these are the files
        blob = blob_path(server.models, layer["digest"])
        said = subprocess.run(["sha256sum", blob], capture_output=True, text=True, check=True)
        assert f"sha256:{said.stdout.split()[0]}" == layer["digest"]
    assert registry.bytes_sent() < registry.size(name) * 1.5


# Limits


def test_one_download_too_many_is_refused(make_service, registry):
    service = make_service(LLM_MAX_PULLS=2)
    registry.rate = 1e6
    names = [registry.add_random(f"ns/slot{n}:latest", 20, seed=n) for n in range(3)]
    listeners = [Listener(service, name).flowing(0.1) for name in names[:2]]
    refused = service.post(PULL, json={"model": names[2], "insecure": True})
    assert refused.status_code == 429 and refused.json()["code"] == "too_many_pulls"
    assert int(refused.headers["Retry-After"])
    assert Listener(service, names[0]).status == 200  # who joins takes no slot
    assert service.get("/health").status_code == 200
    listeners[0].leave()
    service.delete(PULL, json={"model": names[0]})
    assert Listener(service, names[2]).status == 200


def test_what_does_not_fit_is_refused_before_a_byte_is_written(on_small_disk, registry, small_disk):
    name = registry.add_random("ns/toobig:latest", 100)
    registry.rate = 20e6
    answer = on_small_disk.post(PULL, json={"model": name, "insecure": True})
    assert answer.status_code == 507 and answer.json()["code"] == "disk_full"
    assert "needs" in answer.json()["error"] and "MB" in answer.json()["error"]
    assert shutil.disk_usage(small_disk).free > 50e6


def test_a_disk_that_fills_meanwhile_stops_the_download_before_it_is_full(
    on_small_disk, registry, small_disk
):
    name = registry.add_random("ns/fits:latest", 40)
    registry.rate = 5e6
    listener = Listener(on_small_disk, name).flowing(3)
    other = Path(small_disk, "other")
    other.write_bytes(bytes(20_000_000))
    last = listener.end()
    assert_in_order(listener.lines)
    assert last["code"] == "disk_full"
    other.unlink()
    registry.rate = None
    assert Listener(on_small_disk, name).end()["status"] == "success"


def test_a_300_mb_download_takes_no_memory_of_the_api(plain, registry):
    plain.wait_healthy(60)
    worker = psutil.Process(plain.worker_pid())
    Listener(plain, registry.add_random("ns/warm:latest", 5, seed=7)).end()
    before = worker.memory_info().rss
    large = registry.add_random("ns/large:latest", 300)
    assert Listener(plain, large).end()["status"] == "success"
    assert worker.memory_info().rss - before < 5e6
