"""A download's end and its first news, on an Ollama that says what a test wants."""

import threading

import pytest

from helpers.given_time import Clock
from helpers.waiting import wait_for
from llm_service import store as module
from llm_service.downloads import Download, Downloads
from llm_service.processes import Processes
from llm_service.store import Store
from ollama_client import ServiceError

MANIFEST = {"status": "pulling manifest"}
LAYER = {"status": "pulling abc", "digest": "sha256:" + "a" * 64, "total": 10, "completed": 10}
VERIFYING = {"status": "verifying sha256 digest"}
BROKEN = ServiceError("digest_mismatch", "The data was damaged.")


class Script:
    """Stands for Ollama: each pull says these lines, and raises what is an error."""

    def __init__(self, *lines):
        self.lines = lines

    def pull(self, _model, _insecure):
        return self

    def __iter__(self):
        for line in self.lines:
            if isinstance(line, ServiceError):
                raise line
            yield line

    def close(self):
        pass


def ended(folder, *lines):
    """Run a download to its end, which its listener has slept through."""
    downloads = Downloads(Script(*lines), Store(folder), Processes("/none"), 1)
    download, listened = downloads.pull("m")
    download.thread.join(60)
    assert downloads.running_count() == 0 and len(downloads.list()) == 1
    return download, listened


@pytest.mark.parametrize("news", [LAYER, VERIFYING])
def test_an_error_after_the_first_news_is_the_last_line_whatever_the_timing(tmp_path, news):
    download, listened = ended(tmp_path, MANIFEST, news, BROKEN)
    download.wait_for_news(0)
    first, second, last = listened
    assert [first["status"], second["status"]] == [MANIFEST["status"], news["status"]]
    assert last == {"error": "The data was damaged.", "code": "digest_mismatch"}


@pytest.mark.parametrize("lines", [(BROKEN,), (MANIFEST, BROKEN)])
def test_an_error_before_the_first_news_is_raised(tmp_path, lines):
    download, _ = ended(tmp_path, *lines)
    with pytest.raises(ServiceError, match="damaged"):
        download.wait_for_news(0)


def test_a_connection_that_was_given_up_just_now_is_told_with_its_status(tmp_path):
    """Between its end and Ollama's line that tells of it there is a moment."""
    told = threading.Event()

    class GivesUp(Script):
        def __iter__(self):
            told.wait(60)
            raise BROKEN
            yield

    def connecting():
        looks.append(len(looks) < 2)
        if not looks[-1]:
            threading.Timer(0.05, told.set).start()
        return looks[-1]

    looks = []
    processes = Processes("/none")
    processes.connecting = connecting
    download, _ = Downloads(GivesUp(), Store(tmp_path), processes, 1).pull("m")
    with pytest.raises(ServiceError, match="damaged"):
        download.wait_for_news(0)
    assert looks == [True, True, False]


def test_success_is_the_one_last_line(tmp_path):
    download, listened = ended(tmp_path, MANIFEST, LAYER, VERIFYING, {"status": "success"})
    download.wait_for_news(0)
    *others, last = listened
    assert last["status"] == "success" and last["percent"] == 100
    assert [line["percent"] for line in others] == [0, 99.9, 99.9]


def test_who_joins_late_and_begins_to_read_later_sees_no_progress_fall(tmp_path):
    """What was said between the two is older than what there is when the reading begins."""
    tools = Downloads(Script(), Store(tmp_path), Processes("/none"), 1)
    download = Download(tools, "m", insecure=False, verify=False)
    download._note(MANIFEST)
    lines = download.join(detach=False, verify=False)
    download._note({**LAYER, "completed": 1})
    download._note({**LAYER, "completed": 5})
    percents = [next(lines)["percent"], next(lines)["percent"]]
    assert percents == sorted(percents)


class Endless(Script):
    """Says its lines and then nothing, until it is closed."""

    def __init__(self, *lines):
        super().__init__(*lines)
        self.closed = threading.Event()

    def __iter__(self):
        yield from super().__iter__()
        self.closed.wait(120)

    def close(self):
        self.closed.set()


@pytest.mark.parametrize("shared", [True, False])
def test_a_purge_spares_what_another_download_shares(tmp_path, monkeypatch, shared):
    Clock().rule(monkeypatch, module)
    (tmp_path / "blobs").mkdir()
    part = tmp_path / "blobs" / f"sha256-{'a' * 64}-partial-0"
    part.write_bytes(b"x" * 5000)
    downloads = Downloads(Endless(LAYER), Store(tmp_path), Processes("/none"), 2)
    first, _ = downloads.pull("first", detach=True)
    wait_for(first.digests, 30, "the layer of the first")
    if shared:
        downloads.ollama = Endless(LAYER)
        second, _ = downloads.pull("second", detach=True)
        wait_for(second.digests, 30, "the layer of the second")
    freed = downloads.cancel("first", purge=True)
    assert part.exists() == shared and bool(freed) == (not shared)
    downloads.close()
