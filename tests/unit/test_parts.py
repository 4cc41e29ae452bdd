"""The records of unfinished downloads, as Ollama writes them and as a crash leaves them."""

import json
import os

import pytest

from helpers.given_time import Clock
from llm_service import store as module
from llm_service.downloads import Downloads
from llm_service.errors import failure
from llm_service.parts import usable
from llm_service.processes import Processes
from llm_service.store import Store

DIGEST = "ab" * 32
OTHER = "cd" * 32


def record(number, size=9, completed=0):
    return json.dumps({"N": number, "Offset": 9 * number, "Size": size, "Completed": completed})


@pytest.fixture
def write(tmp_path):
    """Write files of an unfinished download by what stands behind ``-partial``."""
    (tmp_path / "blobs").mkdir()

    def write(digest=DIGEST, **contents):
        paths = []
        for suffix, content in contents.items():
            number = suffix.removeprefix("n").replace("data", "")
            name = f"sha256-{digest}-partial" + (f"-{number}" if number else "")
            path = tmp_path / "blobs" / name
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
            paths.append(path)
        return paths

    return write


@pytest.mark.parametrize(
    "contents",
    [
        {"n0": record(0)},
        {"data": b"x", "n0": record(0, completed=9)},
        {"n0": record(0), "n1": record(1), "n2": record(2)},
        {"data": b"xxxx"},  # Ollama begins anew
    ],
)
def test_what_ollama_can_go_on_from_is_usable(write, contents):
    assert usable(write(**contents))


@pytest.mark.parametrize(
    "contents",
    [
        {"n0": b""},
        {"n0": b'{"N":0,"Off'},
        {"n0": bytes(40)},
        {"n0": b"\xff\xfe"},
        {"n0": b"null"},
        {"n0": b"[]"},
        {"n0": b"{}"},
        {"n0": b"[" * 100_000},
        {"n0": record(1)},
        {"n0": record(0, size=9, completed=10)},
        {"n0": record(0, completed=-1)},
        {"n1": record(1)},
        {"data": b"x", "n0": record(0), "n2": record(2)},
        {"nx": record(0)},
    ],
)
@pytest.mark.usefixtures("no_garbage")
def test_a_record_that_makes_no_sense_or_is_missing_is_not(write, contents):
    assert not usable(write(**contents))


@pytest.mark.usefixtures("write")
def test_a_folder_or_a_link_in_place_of_a_file_is_not(tmp_path):
    folder = tmp_path / "blobs" / f"sha256-{DIGEST}-partial-0"
    folder.mkdir()
    link = tmp_path / "blobs" / f"sha256-{OTHER}-partial"
    link.symlink_to("/nowhere")
    assert not usable([folder]) and not usable([link])


def test_a_file_that_goes_meanwhile_is_no_damage(write):
    (path,) = write(n1=record(1))
    path.unlink()
    assert usable([path])


def test_the_store_tells_whose_parts_are_damaged_and_what_all_take(write, tmp_path):
    write(n0=b"")
    write(OTHER, data=b"x" * 9000, n0=record(0))
    store = Store(tmp_path)
    assert store.damaged_parts() == {DIGEST}
    sizes = store.part_sizes()
    assert sizes[DIGEST] == 0 and sizes[OTHER] >= 9000


def test_whole_files_that_no_model_names_are_unverified(write, tmp_path):
    write(n0=record(0))
    named, unnamed = "11" * 32, "22" * 32
    for digest in (named, unnamed):
        (tmp_path / "blobs" / f"sha256-{digest}").write_bytes(b"x")
    place = tmp_path / "manifests/registry.ollama.ai/library/m"
    place.mkdir(parents=True)
    layer = {"mediaType": "x", "digest": f"sha256:{named}", "size": 1}
    (place / "latest").write_text(json.dumps({"layers": [layer]}))
    (place / "empty").write_text('{"error":"no"}')
    store = Store(tmp_path)
    assert store.unverified() == {unnamed}
    assert store.names_nothing("m:empty")
    assert not store.names_nothing("m") and not store.names_nothing("m:none")


class Broken:
    """An Ollama whose pull fails on a part's record, of which no line tells whose it is."""

    def pull(self, _model, _insecure):
        return self

    def __iter__(self):
        yield {"status": "pulling manifest"}
        raise failure("EOF", pull=True)

    def close(self):
        pass


@pytest.mark.parametrize("held", [False, True])
def test_a_purge_removes_damaged_parts_of_which_no_line_tells(write, tmp_path, monkeypatch, held):
    Clock().rule(monkeypatch, module)
    data, broken = write(data=b"x" * 9000, n0=b"")
    processes = Processes("/none")
    store = Store(tmp_path)
    downloads = Downloads(Broken(), store, processes, 1)
    file = os.open(data, os.O_RDONLY)  # by this very process
    download, _ = downloads.pull("m", detach=True)
    download.thread.join(20)
    assert download.error.code == "parts_damaged" and "purge" in str(download.error)
    assert broken.exists()  # what is open is left
    if not held:
        os.close(file)
    assert bool(downloads.cancel("m", purge=True)) == (not held)
    assert broken.exists() == held
    if held:
        os.close(file)
