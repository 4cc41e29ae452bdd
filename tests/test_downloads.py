"""Downloads, from the tests' registry through the real Ollama, with faults injected while they run."""
import concurrent.futures
import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import threading
import time

import psutil
import pytest

import ollama_client
from conftest import Service, blob_path, servers, wait_for
from ollama_client import Downloads, Ollama, Store
from registry import FakeOllama, http, ndjson

PULL = "/api/models/pull"


class Listener:
    """A client of a streamed pull, in a thread: .lines so far, .at (when each came), .status, .done."""

    def __init__(self, service, model, **fields):
        self.lines, self.at, self.status, self.done = [], [], None, False
        self.answer = service.post(PULL, json={"model": model, "insecure": True, **fields}, stream=True)
        self.status = self.answer.status_code
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self):
        with contextlib.suppress(Exception):  # the client leaves by closing
            for line in self.answer.iter_lines():
                self.lines.append(json.loads(line))
                self.at.append(time.monotonic())
        self.done = True

    def until(self, predicate, what, timeout=30):
        return wait_for(lambda: any(predicate(line) for line in list(self.lines)), timeout, f"{what} in {self.lines[-2:]}")

    def flowing(self, megabytes=1):
        self.until(lambda line: line.get("completed_bytes", 0) >= megabytes * 1e6, f"{megabytes} MB")
        return self

    def leave(self):
        self.answer.raw.shutdown()
        self.answer.close()

    def end(self, timeout=60):
        wait_for(lambda: self.done, timeout, f"the end of the stream {self.lines[-1:]}")
        return self.lines[-1]


def pulls(service):
    return service.get(PULL).json()["pulls"]


def pull_of(service, model):
    return next((pull for pull in pulls(service) if pull["model"] == model), None)


def is_whole(service, registry, name):
    return all(blob_path(service.models, layer["digest"]).stat().st_size == layer["size"] for layer in registry.layers(name))


def assert_in_order(lines):
    """What holds for every stream: one last line, and percent that never falls and is 100 with success alone."""
    ends = [line for line in lines if "error" in line or line.get("status") == "success"]
    assert ends == lines[-1:]
    percents = [line["percent"] for line in lines if "percent" in line]
    assert percents == sorted(percents)
    assert all(percent < 100 for percent in percents[:-1])
    assert "error" in lines[-1] or percents[-1] == 100


@pytest.fixture(scope="module")
def plain(ollama_binary):
    with servers(functools.partial(Service, binary=ollama_binary)) as make:
        yield make()


# What a pull answers

def test_a_download_streams_ollamas_lines_with_overall_figures(plain, registry):
    name = registry.add_random("ns/figures:latest", 60)
    registry.rate = 20e6
    listener = Listener(plain, name)
    assert listener.status == 200
    assert listener.answer.headers["Content-Type"] == "application/x-ndjson"
    assert listener.answer.headers["Transfer-Encoding"] == "chunked"
    last = listener.end()
    assert_in_order(listener.lines)
    assert last["total_bytes"] == last["completed_bytes"] == registry.size(name)
    statuses = [line["status"] for line in listener.lines]
    assert {"pulling manifest", "verifying sha256 digest", "success"} <= set(statuses)
    middle = [line for line in listener.lines if line.get("bytes_per_second")]
    assert middle and all(isinstance(line["eta_seconds"], int) for line in middle)
    assert all(5e6 < line["bytes_per_second"] < 60e6 for line in middle[5:])
    progress = [at for at, line in zip(listener.at, listener.lines) if line["status"].startswith("pulling ")]
    assert max(sum(1 for at in progress if start <= at < start + 1) for start in progress) <= 5 + 3 + 1  # and a change of layer each


def test_without_stream_the_answer_comes_at_the_end(plain, registry):
    name = registry.add_random("ns/plain:latest", 10)
    answer = plain.post(PULL, json={"model": name, "insecure": True, "stream": False})
    assert answer.status_code == 200 and answer.json()["status"] == "success"
    assert answer.json()["total_bytes"] == registry.size(name)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("fault, status, code", [
    ("unknown", 404, "model_not_found"), ("down", 502, "registry_unreachable"), ("broken", 502, "ollama_error"),
    ("bad name", 400, "bad_model_name"), ("corrupt", 502, "digest_mismatch")])
def test_a_failure_has_its_status(plain, registry, fault, status, code, stream):
    name = registry.add_random("ns/fault:latest", 2, seed=len(fault) + stream * 100)
    if fault == "unknown":
        name = name.replace("fault", "unknown")
    elif fault == "down":
        registry.down()
    elif fault == "broken":
        registry.manifest_status = 500
    elif fault == "bad name":
        name = "../fault"
    elif fault == "corrupt":
        registry.corrupt.add(registry.layers(name)[0]["digest"])
    answer = plain.post(PULL, json={"model": name, "insecure": True, "stream": stream})
    if fault == "corrupt" and stream:  # it shows after the last byte only
        lines = [json.loads(line) for line in answer.iter_lines()]
        assert_in_order(lines)
        assert lines[-1]["code"] == code
    else:
        assert (answer.status_code, answer.json()["code"]) == (status, code)
        assert answer.json()["error"].endswith(".")
    assert not [model for model in plain.get("/api/models").json()["models"] if "fault" in model["name"]]


def test_an_answer_begins_after_a_while_though_it_is_not_known_how_it_stands(make_service, registry):
    service = make_service(constants={"app.KNOWN_S": 1})
    name = registry.add_random("ns/late:latest", 1)
    registry.manifest_delay = 4
    listener = Listener(service, name)
    assert listener.status == 200 and not listener.done
    assert listener.end()["status"] == "success"
    assert_in_order(listener.lines)


# Listeners

def test_two_listeners_of_one_model_share_one_download(plain, registry):
    name = registry.add_random("ns/shared:latest", 60)
    registry.rate = 30e6
    first = Listener(plain, name).flowing()
    second = Listener(plain, name.upper().replace("LOCALHOST", "localhost"))
    assert pull_of(plain, name)["listeners"] == 2
    assert second.lines or wait_for(lambda: second.lines, 5, "a line for who came later")
    assert second.lines[0]["completed_bytes"] > 1e6
    assert first.end()["status"] == second.end()["status"] == "success"
    assert first.lines[-1] == second.lines[-1]
    assert registry.bytes_sent() < registry.size(name) * 1.05


def test_thirty_listeners_all_get_success(plain, registry):
    name = registry.add_random("ns/many:latest", 60)
    registry.rate = 20e6
    with concurrent.futures.ThreadPoolExecutor(30) as pool:
        listeners = list(pool.map(lambda _: Listener(plain, name), range(30)))
    for listener in listeners:
        assert listener.end()["status"] == "success"
        assert_in_order(listener.lines)
    assert registry.bytes_sent() < registry.size(name) * 1.05


@pytest.mark.parametrize("stalled", [False, True])
def test_with_the_last_listener_the_download_stops_and_the_next_goes_on_from_there(plain, registry, stalled):
    name = registry.add_random("ns/left:latest", 100, seed=stalled)
    registry.rate = 20e6
    first, second = Listener(plain, name), Listener(plain, name)
    first.flowing(10)
    first.leave()
    second.flowing(15)
    registry.stall = stalled
    second.leave()
    left = time.monotonic()
    wait_for(lambda: pull_of(plain, name)["state"] == "cancelled", 5, "the end of the download")
    assert time.monotonic() - left < 3  # the contract's 2 s, with room for a busy machine
    wait_for(lambda: registry.active == 0, 5, "the end of the transfers")
    registry.stall, registry.rate = False, None
    again = Listener(plain, name)
    assert again.end()["status"] == "success"
    assert_in_order(again.lines)
    assert registry.bytes_sent() < registry.size(name) * 1.1
    assert is_whole(plain, registry, name)


def test_while_ollama_is_silent_a_line_comes_every_second(plain, registry):
    name = registry.add_random("ns/silent:latest", 20)
    registry.rate = 10e6
    listener = Listener(plain, name).flowing()
    os.kill(plain.ollama_pid(), signal.SIGSTOP)
    try:
        start = len(listener.lines)
        wait_for(lambda: len(listener.lines) >= start + 4, 8, "four lines of a silent Ollama")
        gaps = [b - a for a, b in zip(listener.at[start:], listener.at[start + 1:])]
        assert max(gaps) < 1.5
    finally:
        os.kill(plain.ollama_pid(), signal.SIGCONT)
    assert listener.end()["status"] == "success"


def test_detached_it_goes_on_without_listeners(plain, registry):
    name = registry.add_random("ns/detached:latest", 40)
    registry.rate = 20e6
    answer = plain.post(PULL, json={"model": name, "insecure": True, "detach": True})
    assert answer.status_code == 202
    listener = Listener(plain, name).flowing()
    listener.leave()
    pull = wait_for(lambda: (p := pull_of(plain, name)) and p["state"] == "success" and p, 20, "success")
    assert pull["detached"] and pull["percent"] == 100 and pull["ended_at"].endswith("+00:00")


# The list, cancel, purge

def test_the_list_shows_what_runs_and_what_ended(plain, registry):
    name = registry.add_random("ns/listed:latest", 50)
    registry.rate = 10e6
    listener = Listener(plain, name).flowing()
    running = pull_of(plain, name)
    assert running["state"] == "running" and running["listeners"] == 1 and 0 < running["percent"] < 100
    assert running["bytes_per_second"] > 0 and running["ended_at"] is None
    cancelled = plain.delete(PULL, json={"model": name})
    assert cancelled.status_code == 200 and cancelled.json()["freed_bytes"] == 0
    assert listener.end()["code"] == "cancelled"
    assert_in_order(listener.lines)
    assert pull_of(plain, name)["state"] == "cancelled"
    assert plain.delete(PULL, json={"model": name}).status_code == 404


def test_ended_downloads_are_kept_in_a_bounded_number(make_service, registry):
    service = make_service(constants={"ollama_client.ENDED_KEPT": 3})
    for number in range(5):
        assert service.post(PULL, json={"model": f"localhost:{registry.port}/ns/none:{number}", "insecure": True}).status_code == 404
    assert [pull["model"][-1] for pull in pulls(service)] == ["4", "3", "2"]


@pytest.mark.parametrize("while_it_runs", [True, False])
def test_purge_removes_the_parts(plain, registry, while_it_runs):
    name = registry.add_random("ns/purged:latest", 50, seed=while_it_runs)
    registry.rate = 20e6
    before = plain.get("/api/stats").json()["disk"]["partial_bytes"]
    listener = Listener(plain, name).flowing(10)
    if not while_it_runs:
        plain.delete(PULL, json={"model": name})
        listener.end()
    assert plain.get("/api/stats").json()["disk"]["partial_bytes"] > before + 5e6
    answer = plain.delete(PULL, json={"model": name, "purge": True})
    assert answer.status_code == 200 and answer.json()["freed_bytes"] > 5e6
    assert plain.get("/api/stats").json()["disk"]["partial_bytes"] == before
    registry.rate = None
    assert Listener(plain, name).end()["status"] == "success"


# Reconnects

def reconnects(listener):
    return [line["status"] for line in listener.lines if line.get("status", "").startswith("reconnecting")]


def test_a_download_outlives_the_death_of_ollama(make_service, registry):
    service = make_service()
    name = registry.add_random("ns/killed:latest", 60)
    registry.rate = 15e6
    listener = Listener(service, name).flowing(10)
    os.kill(service.ollama_pid(), signal.SIGKILL)
    assert listener.end()["status"] == "success"
    assert_in_order(listener.lines)
    assert reconnects(listener) and is_whole(service, registry, name)


def test_a_download_outlives_a_cut_connection_and_a_reset_session(plain, registry):
    name = registry.add_random("ns/cut:latest", 60)
    registry.rate = 15e6
    listener = Listener(plain, name).flowing(5)
    registry.cut(reset=True)
    assert plain.post("/api/session/reset", json={"restart": True}).status_code == 200
    assert listener.end()["status"] == "success"
    assert_in_order(listener.lines)
    assert reconnects(listener) and is_whole(plain, registry, name)


def test_a_stall_is_noticed_and_mended_without_losing_a_byte(make_service, registry):
    service = make_service(constants={"ollama_client.STALL_S": 2})
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
    service = make_service(constants={"ollama_client.STALL_S": 1, "ollama_client.MAX_RECONNECTS": 2})
    name = registry.add_random("ns/hopeless:latest", 60)
    registry.rate = 20e6
    listener = Listener(service, name).flowing(10)
    registry.stall = True
    last = listener.end()
    assert_in_order(listener.lines)
    assert last["code"] == "pull_interrupted" and "goes on from here" in last["error"]
    registry.stall, registry.rate = False, None
    assert Listener(service, name).end()["status"] == "success"
    assert registry.bytes_sent() < registry.size(name) * 1.1


def test_a_pull_right_after_a_cancel_works(plain, registry):
    name = registry.add_random("ns/quick:latest", 40)
    registry.rate = 20e6
    for _ in range(5):
        listener = Listener(plain, name)
        wait_for(lambda: listener.lines, 10, "a line")
        plain.delete(PULL, json={"model": name})
    registry.rate = None
    assert Listener(plain, name).end()["status"] == "success"


def test_a_hundred_cancels_and_resumes_lose_nothing(ollama_server, registry):
    server = ollama_server()
    downloads = Downloads(Ollama(server.url), Store(server.models), 4)
    name = registry.add_random("ns/hundred:latest", 100)
    registry.rate = 5e6
    for _ in range(100):
        download, lines = downloads.pull(name, insecure=True)
        # In mid-layer: cancelled at the instant in which a layer begins, Ollama 0.34 itself may panic.
        next(line for line in lines if "error" in line or 0 < line.get("completed", 0) < line["total"])
        downloads.cancel(name)
    registry.rate = None
    download, lines = downloads.pull(name, insecure=True)
    *_, last = lines
    assert last.get("status") == "success", last
    for layer in registry.layers(name):  # Ollama has verified the digests; these are the files
        digest = subprocess.run(["sha256sum", blob_path(server.models, layer["digest"])], capture_output=True, text=True)
        assert f"sha256:{digest.stdout.split()[0]}" == layer["digest"]
    assert registry.bytes_sent() < registry.size(name) * 1.5


def test_a_part_older_than_an_hour_survives_a_restart_of_ollama(make_service, registry):
    service = make_service()
    name = registry.add_random("ns/aged:latest", 60)
    registry.rate = 20e6
    listener = Listener(service, name).flowing(15)
    service.delete(PULL, json={"model": name})
    listener.end()
    wait_for(lambda: registry.active == 0, 5, "the end of the transfers")
    parts = list((service.models / "blobs").glob("*-partial*"))
    for part in parts:
        os.utime(part, (time.time() - 7200,) * 2)
    assert parts and service.post("/api/session/reset", json={"restart": True}).status_code == 200
    service.wait_healthy(10)
    registry.rate = None
    assert Listener(service, name).end()["status"] == "success"
    assert registry.bytes_sent() < registry.size(name) * 1.1


def test_sigterm_ends_the_streams_with_their_last_line_and_the_parts_stay(make_service, registry):
    first = make_service()
    name = registry.add_random("ns/term:latest", 100)
    registry.rate = 20e6
    listener = Listener(first, name).flowing(20)
    assert first.stop() == 0
    assert listener.end()["code"] == "shutting_down"
    assert_in_order(listener.lines)
    registry.rate = None
    second = make_service(OLLAMA_MODELS=first.models)
    assert Listener(second, name).end()["status"] == "success"
    assert registry.bytes_sent() < registry.size(name) * 1.1


# Limits

def test_one_download_too_many_is_refused(make_service, registry):
    service = make_service(LLM_MAX_PULLS=2)
    registry.rate = 1e6
    names = [registry.add_random(f"ns/slot{n}:latest", 20, seed=n) for n in range(3)]
    listeners = [Listener(service, name).flowing(0.1) for name in names[:2]]
    refused = service.post(PULL, json={"model": names[2], "insecure": True})
    assert refused.status_code == 429 and refused.json()["code"] == "too_many_pulls" and int(refused.headers["Retry-After"])
    assert Listener(service, names[0]).status == 200  # who joins takes no slot
    assert service.get("/health").status_code == 200
    listeners[0].leave()
    service.delete(PULL, json={"model": names[0]})
    assert Listener(service, names[2]).status == 200


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("no small file system: mounting a tmpfs takes root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_what_does_not_fit_is_refused_before_a_byte_is_written(make_service, registry, small_disk):
    service = make_service(OLLAMA_MODELS=small_disk, constants={"ollama_client.DISK_RESERVE_BYTES": 8 << 20})
    name = registry.add_random("ns/toobig:latest", 100)
    registry.rate = 20e6
    answer = service.post(PULL, json={"model": name, "insecure": True})
    assert answer.status_code == 507 and answer.json()["code"] == "disk_full"
    assert "needs" in answer.json()["error"] and "MB" in answer.json()["error"]
    assert shutil.disk_usage(small_disk).free > 50e6


def test_a_disk_that_fills_meanwhile_stops_the_download_before_it_is_full(make_service, registry, small_disk):
    service = make_service(OLLAMA_MODELS=small_disk, constants={"ollama_client.DISK_RESERVE_BYTES": 8 << 20})
    name = registry.add_random("ns/fits:latest", 40)
    registry.rate = 5e6
    listener = Listener(service, name).flowing(3)
    (small_disk / "other").write_bytes(bytes(20_000_000))
    last = listener.end()
    assert_in_order(listener.lines)
    assert last["code"] == "disk_full"
    (small_disk / "other").unlink()
    registry.rate = None
    assert Listener(service, name).end()["status"] == "success"


def test_a_300_mb_download_takes_no_memory_of_the_api(make_service, registry):
    service = make_service()
    worker = psutil.Process(service.worker_pid())
    Listener(service, registry.add_random("ns/warm:latest", 5, seed=7)).end()
    before = worker.memory_info().rss
    assert Listener(service, registry.add_random("ns/large:latest", 300)).end()["status"] == "success"
    assert worker.memory_info().rss - before < 5e6


# An Ollama that does not speak as Ollama does

STRANGE = {
    "HTML": http("<html>hello</html>", type="text/html"),
    "half a line": ndjson({"status": "pulling manifest"}) + b'{"status": "pull',
    "10 MB without an end": ndjson({"status": "pulling manifest"}) + b'{"status": "' + b"x" * 10_000_000,
    "negative sizes": ndjson({"status": "pulling 1", "digest": "sha256:" + "1" * 64, "total": -5, "completed": -7}),
    "sizes in words": ndjson({"status": "pulling 1", "digest": "sha256:" + "1" * 64, "total": "5"}),
    "a list": ndjson(["status"]),
    "nothing": b"",
}


@pytest.mark.parametrize("answer", STRANGE.values(), ids=STRANGE.keys())
def test_a_strange_answer_is_a_clear_error(monkeypatch, tmp_path, answer):
    monkeypatch.setattr(ollama_client, "MAX_RECONNECTS", 1)
    with FakeOllama({"/api/pull": answer}) as fake:
        downloads = Downloads(Ollama(fake.url), Store(tmp_path), 4)
        download, lines = downloads.pull("gemma")
        *_, last = lines
    assert last["code"] in ("bad_answer", "pull_interrupted", "ollama_unreachable") and last["error"].endswith(".")
    assert download.error.status in (502, 503)
    assert downloads.list()[0]["state"] == "error"
