"""What /health says of a damaged store and a full disk; the page cache."""

import ctypes
import mmap
import os
import tempfile
from pathlib import Path

import pytest

from helpers.answers import CLEAR, GEMMA, RESET, heal, health
from helpers.causes import ollama_hung
from helpers.places import RUNS
from helpers.waiting import wait_for
from llm_service.store import Store


@pytest.mark.parametrize("path", ["/health", "/health?deep=1"])
def test_a_hung_ollama_is_unhealthy(idle, path):
    with ollama_hung(idle):
        answer = idle.get(path)
    assert answer.status_code == 503
    assert answer.elapsed.total_seconds() < 3
    assert answer.json()["recommended_action"] == "reset_session"


def test_a_model_store_that_cannot_be_read_is_unhealthy(make_service, gguf):
    service = make_service(models={GEMMA: gguf}, LLM_MODEL=GEMMA)
    manifests = service.models / "manifests"
    manifests.rename(service.models / "away")
    manifests.write_text("not a directory")
    told = health(service, 503)
    assert (told["code"], told["recommended_action"]) == ("model_store_unreadable", "wait")
    assert str(manifests) in told["reason"] and "remove what is in the way" in told["reason"]
    for path in (CLEAR, RESET):
        heal(service, path)
    manifests.unlink()
    (service.models / "away").rename(manifests)
    service.wait_healthy(60)


def test_a_disk_that_is_full_is_a_warning_and_needs_no_restart(make_service):
    service = make_service(constants={"llm_service.health.DISK_LOW_BYTES": 1 << 60})
    # The disk is told as of the last look.
    told = wait_for(lambda: health(service)["warning"] and health(service), 30, "a warning")
    assert (told["status"], told["recommended_action"]) == ("healthy", "none")
    assert "disk" in told["warning"].lower() and "delete" in told["warning"].lower()


def resident_bytes(path):
    """Return how much of a file is in the page cache."""
    size = path.stat().st_size
    libc = ctypes.CDLL(None, use_errno=True)
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as view:
        start = ctypes.c_char.from_buffer(view)
        pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        address = ctypes.c_void_p(ctypes.addressof(start))
        done = libc.mincore(address, ctypes.c_size_t(size), pages)
        del start
        assert done == 0, os.strerror(ctypes.get_errno())
    return sum(page & 1 for page in pages) * mmap.PAGESIZE


def test_dropping_the_page_cache_takes_the_models_out_of_memory():
    RUNS.mkdir(parents=True, exist_ok=True)
    # Not on a tmpfs, which is the page cache.
    with tempfile.TemporaryDirectory(dir=RUNS) as folder:
        blobs = Path(folder, "blobs")
        blobs.mkdir()
        weights, other = blobs / f"sha256-{'0' * 64}", blobs.parent / "other"
        for file in (weights, other):
            file.write_bytes(os.urandom(8 << 20))
            with file.open("rb+") as handle:
                os.fsync(handle.fileno())
            file.read_bytes()
            assert resident_bytes(file) > 7 << 20  # the kernel may take some pages for others
        Store(folder).drop_page_cache()
        assert resident_bytes(weights) < 1 << 20  # or still have some in hand
        assert resident_bytes(other) > 7 << 20
