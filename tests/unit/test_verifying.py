"""Files read against their digests, in stores made without Ollama."""

import ctypes
import mmap
import os
import shutil
import threading

import pytest

from helpers.models import add_model, blob_path, file_digest, manifest_path
from helpers.waiting import wait_for
from llm_service import verifying
from llm_service.errors import ServiceError
from llm_service.store import Store
from llm_service.verifying import STEP_BYTES, Verifying


@pytest.fixture
def models(tmp_path):
    folder = tmp_path / "models"
    folder.mkdir()
    return folder


@pytest.fixture
def add(models, tmp_path):
    """Adds a model with weights of its own; returns the path of these."""

    def one(name, size=3_000_000):
        file = tmp_path / f"weights of {name.replace('/', ' ')}"
        block = os.urandom(min(size, 100_000))
        file.write_bytes((block * (size // len(block) + 1))[:size])
        add_model(models, name, file)
        file.unlink()  # so that no other name has what will be damaged
        return blob_path(models, file_digest(str(file)))

    return one


@pytest.fixture
def verify(models):
    """Verifies; returns the last line."""

    def one(model=None):
        *_, last = Verifying(Store(models)).start(model).lines()
        return last

    return one


def digest(blob):
    return blob.name.replace("-", ":")


def flip(blob, at=1_234_567):
    with blob.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def bad(last):
    """Return what is wrong: {model: (damaged, missing, unreadable)}."""
    assert last["status"] == "success"
    found = {}
    for each in last["models"]:
        wrong = each["damaged"], each["missing"], each["unreadable"]
        assert each["ok"] is (wrong == ([], [], []))
        if not each["ok"]:
            found[each["name"]] = wrong
    return found


def test_whole_models_are_whole(add, verify):
    blobs = [add(name) for name in ("gemma:latest", "User/Model:Tag")]
    last = verify()
    assert bad(last) == {}
    assert [each["name"] for each in last["models"]] == ["gemma:latest", "User/Model:Tag"]
    assert last["percent"] == 100.0
    assert last["completed_bytes"] == last["total_bytes"] > sum(b.stat().st_size for b in blobs)


def test_a_store_without_models_is_whole(verify):
    assert bad(verify()) == {}


def test_what_is_wrong_is_found_among_a_hundred_models(add, verify, models):
    blobs = [add(f"m{n:03}:latest", 20_000) for n in range(100)]
    flip(blobs[17], 19_999)
    os.truncate(blobs[41], 19_999)
    blobs[63].unlink()
    blobs[88].write_bytes(b"")
    with blobs[99].open("ab") as file:
        file.write(b"x")
    last = verify()
    assert len(last["models"]) == 100
    assert bad(last) == {
        "m017:latest": ([digest(blobs[17])], [], []),
        "m041:latest": ([digest(blobs[41])], [], []),
        "m063:latest": ([], [digest(blobs[63])], []),
        "m088:latest": ([digest(blobs[88])], [], []),
        "m099:latest": ([digest(blobs[99])], [], []),
    }
    before = {path: path.stat() for path in models.rglob("*")}
    verify()
    assert {path: path.stat().st_mtime_ns for path in models.rglob("*")} == {
        path: about.st_mtime_ns for path, about in before.items()
    }  # it changes nothing


def test_a_file_of_two_models_is_read_once_and_told_of_both(add, verify, models):
    blob = add("one:latest")
    for name in ("two", "three"):
        copy = manifest_path(models, f"{name}:latest")
        copy.parent.mkdir(parents=True)
        shutil.copyfile(manifest_path(models, "one:latest"), copy)
    flip(blob)
    last = verify()
    assert bad(last) == {
        f"{name}:latest": ([digest(blob)], [], []) for name in ("one", "three", "two")
    }
    assert last["total_bytes"] < 2 * blob.stat().st_size


def test_one_model_is_read_alone(add, verify):
    one, two = add("one:latest"), add("two:latest")
    flip(two)
    last = verify("ONE")
    assert [each["name"] for each in last["models"]] == ["one:latest"]
    assert (bad(last), last["total_bytes"] < one.stat().st_size * 1.5) == ({}, True)
    with pytest.raises(ServiceError) as raised:
        verify("nowhere")
    assert raised.value.code == "model_not_found"


def test_what_is_no_file_is_told(add, verify, models):
    blob = add("one:latest")
    blob.unlink()
    blob.mkdir()
    assert bad(verify()) == {"one:latest": ([digest(blob)], [], [])}
    blob.rmdir()
    os.mkfifo(blob)
    assert bad(verify()) == {"one:latest": ([digest(blob)], [], [])}
    blob.unlink()
    blob.symlink_to(models / "nowhere")
    assert bad(verify()) == {"one:latest": ([], [digest(blob)], [])}
    blob.unlink()
    blob.symlink_to(blob)
    assert bad(verify()) == {"one:latest": ([], [], [digest(blob)])}
    blob.unlink()
    blob.symlink_to("/proc/self/mem")  # its first page reads as a disk that fails: EIO
    assert bad(verify()) == {"one:latest": ([digest(blob)], [], [])}


def test_a_manifest_that_ollama_refuses_is_a_damaged_file(add, verify, models):
    add("one:latest")
    path = manifest_path(models, "two:latest")
    path.parent.mkdir()
    path.write_bytes(bytes(500))  # as after a power cut
    place = "manifests/registry.ollama.ai/library/two/latest"
    assert bad(verify()) == {"two:latest": ([place], [], [])}
    assert bad(verify("two")) == {"two:latest": ([place], [], [])}


def test_progress_rises_to_its_end(add, models, monkeypatch):
    monkeypatch.setattr(verifying, "LINE_S", 0.005)
    blob, *_ = [add(f"m{n}:latest", 30_000_000) for n in range(3)]
    store = Store(models)
    with Gate(store, blob) as gate:  # it may be fast, and the first line knows no sizes yet
        told = Verifying(store).start(None).lines()
        first = next(told)
        gate.wait()
        held = [next(told) for _ in range(3)]
    *others, last = told
    lines = [first, *held, *others]
    assert all(line["status"].startswith("checking ") for line in lines)
    percents = [line["percent"] for line in lines]
    assert percents == sorted(percents)
    assert max(percents) < 100
    assert {line["total_bytes"] for line in lines[1:]} == {last["total_bytes"]}


# Beside others


def test_one_at_a_time(add, models):
    blob = add("one:latest")
    store = Store(models)
    checks = Verifying(store)
    with Gate(store, blob) as gate:
        first = checks.start(None)
        gate.wait()
        with pytest.raises(ServiceError) as raised:
            checks.start("one")
        assert raised.value.code == "verify_running"
    first.thread.join()
    assert first.last_line()["status"] == "success"
    assert bad(list(checks.start("one").lines())[-1]) == {}


class Gate:
    """Holds a check before it opens a file, until the `with` is left."""

    def __init__(self, store, blob):
        self._blob, self._original = blob, store.blob
        self._store = store
        self._came, self._go = threading.Event(), threading.Event()

    def wait(self):
        assert self._came.wait(60)

    def open(self):
        self._go.set()

    def _pass(self, digest):
        path = self._original(digest)
        held = threading.current_thread().name.startswith("ThreadPool")
        if path == self._blob and held and not self._go.is_set():
            self._came.set()
            assert self._go.wait(60)
        return path

    def __enter__(self):
        self._store.blob = self._pass
        return self

    def __exit__(self, *_):
        self.open()


def test_it_ends_when_its_caller_leaves(add, models):
    blob = add("one:latest")
    store = Store(models)
    checks = Verifying(store)
    with Gate(store, blob) as gate:
        check = checks.start(None)
        lines = check.lines()
        next(lines)
        gate.wait()
        lines.close()
        check.leave()
        gate.open()
        check.thread.join(60)
    assert not check.thread.is_alive()
    assert check.last_line()["code"] == "cancelled"
    assert checks.damaged_count() is None


def test_it_ends_with_the_service(add, models):
    blob = add("one:latest")
    store = Store(models)
    checks = Verifying(store)
    with Gate(store, blob) as gate:
        check = checks.start(None)
        gate.wait()
        checks.close()
    assert [line.get("code") for line in check.lines()][-1] == "shutting_down"
    with pytest.raises(ServiceError) as raised:
        checks.start(None)
    assert raised.value.code == "shutting_down"


def update(models, name, blob, new):
    """Do what a pull of a new version does, with the old one removed."""
    path = manifest_path(models, name)
    text = path.read_text()
    fresh = blob_path(models, file_digest(str(new)))
    shutil.copyfile(new, fresh)
    text = text.replace(digest(blob), file_digest(str(new)))
    path.write_text(text)
    blob.unlink()
    return fresh


@pytest.mark.parametrize("damaged", [False, True])
def test_an_update_meanwhile_is_read_too(add, models, tmp_path, damaged):
    blob = add("one:latest")
    new = tmp_path / "new version"
    new.write_bytes(os.urandom(50_000))
    store = Store(models)
    with Gate(store, blob) as gate:
        check = Verifying(store).start(None)
        gate.wait()
        fresh = update(models, "one:latest", blob, new)
        if damaged:
            flip(fresh, 1)
    found = bad(list(check.lines())[-1])
    assert found == ({"one:latest": ([digest(fresh)], [], [])} if damaged else {})


def test_a_repair_meanwhile_is_seen(add, models, tmp_path):
    blob = add("one:latest")
    whole = tmp_path / "whole"
    shutil.copyfile(blob, whole)
    other = add("two:latest")
    flip(blob)
    store = Store(models)
    with Gate(store, other) as gate:
        check = Verifying(store).start(None)
        gate.wait()
        wait_for(lambda: check._reading.sizes()[0] >= blob.stat().st_size, 30, "the file read")
        blob.unlink()
        shutil.move(whole, blob)
    assert bad(list(check.lines())[-1]) == {}


def test_a_model_deleted_meanwhile_is_no_damaged_one(add, models):
    blob = add("one:latest")
    add("two:latest")
    store = Store(models)
    with Gate(store, blob) as gate:
        check = Verifying(store).start(None)
        gate.wait()
        manifest_path(models, "one:latest").unlink()
        blob.unlink()
    last = list(check.lines())[-1]
    assert [each["name"] for each in last["models"]] == ["two:latest"]
    assert bad(last) == {}


def test_the_count_is_of_the_last_checks(add, models):
    one, _two = add("one:latest"), add("two:latest")
    checks = Verifying(Store(models))
    assert checks.damaged_count() is None
    flip(one)
    for model, count in ((None, 1), ("two", 1), ("one", 1)):
        list(checks.start(model).lines())
        assert checks.damaged_count() == count
    flip(one)
    list(checks.start("one").lines())
    assert checks.damaged_count() == 0


# The page cache


def cached_bytes(path):
    """Return how much of a file is in the page cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    size = path.stat().st_size
    with path.open("rb") as file:
        address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    pages = ctypes.create_string_buffer((size + mmap.PAGESIZE - 1) // mmap.PAGESIZE)
    assert libc.mincore(address, size, pages) == 0
    libc.munmap(address, size)
    return sum(byte & 1 for byte in pages.raw) * mmap.PAGESIZE


@pytest.fixture
def blob(add):
    """A file of three steps, the last a short one, of which nothing is in the page cache."""
    blob = add("one:latest", 2 * STEP_BYTES + 3_000_000)
    with blob.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached_bytes(blob):
        pytest.skip("this file system keeps its pages: a tmpfs")
    return blob


def test_the_page_cache_is_not_filled(blob, verify):
    assert bad(verify()) == {}
    assert cached_bytes(blob) < 1_000_000  # the kernel may be at work on some pages just then


def test_what_was_in_the_page_cache_stays(blob, verify):
    """A model that is in use would have to be read again."""
    blob.read_bytes()
    there = cached_bytes(blob)
    assert there > 40_000_000  # the kernel may have taken some pages back already
    assert bad(verify()) == {}
    assert cached_bytes(blob) > there / 2  # as above


def test_what_was_there_in_part_stays_in_part(blob, verify):
    with blob.open("rb") as file:
        file.read(STEP_BYTES)
    assert bad(verify()) == {}
    assert STEP_BYTES / 2 < cached_bytes(blob) < STEP_BYTES + 4_000_000  # and what is read ahead
