"""What Ollama prints: all of it is passed on, its last lines and its reason to end are kept."""

import os
import signal
import subprocess
import sys

import psutil
import pytest

from helpers.places import ROOT
from helpers.processes import suspend
from helpers.waiting import wait_for
from llm_service.messages import KEPT_BYTES, last_lines, without_queries

TRACE = b"goroutine 1 [running]:\n" + b"\tmain.go:1 +0x1\n" * 12_000


class Reader:
    """The program, with what it is given to read: .process .state"""

    def __init__(self, folder, **options):
        self.state = folder / "state"
        self.process = subprocess.Popen(
            [sys.executable, "-IS", f"{ROOT}/llm_service/messages.py", self.state],
            stdin=subprocess.PIPE,
            bufsize=0,
            **{"stderr": subprocess.PIPE, **options},
        )

    def end(self, printed=b""):
        """Give it this to the end; return what it passes on."""
        passed = self.process.communicate(printed, timeout=60)[1]
        assert self.process.returncode == 0
        return passed

    def reason(self):
        return self.state.with_name("state.reason").read_text()


@pytest.fixture
def reader(tmp_path):
    one = Reader(tmp_path)
    yield one
    one.process.kill()
    one.process.wait()


def numbered(count):
    return b"".join(b"line %d \xff\n" % number for number in range(count))


def test_all_is_passed_on_as_it_came(reader):
    printed = numbered(100_000) + b"no end of the line"
    assert reader.end(printed) == printed


def test_the_last_lines_are_there_while_it_goes_on(reader):
    reader.process.stdin.write(numbered(60))
    wait_for(lambda: last_lines(reader.state, 50)[-1:] == ["line 59 \ufffd"], 30, "the last line")
    assert len(last_lines(reader.state, 50)) == 50
    reader.process.stdin.write(b"one more\n")
    wait_for(lambda: last_lines(reader.state, 1) == ["one more"], 30, "one more")


def test_what_is_kept_is_bounded_and_never_less_than_asked_for(reader):
    written = 0
    for _ in range(40):
        printed = numbered(2_000)
        reader.process.stdin.write(printed)
        written += len(printed)
        passed = 0
        while passed < len(printed):
            passed += len(os.read(reader.process.stderr.fileno(), len(printed)))
    wait_for(lambda: last_lines(reader.state, 1) == ["line 1999 \ufffd"], 30, "the last line")
    assert len(last_lines(reader.state, 50)) == 50
    sizes = [file.stat().st_size for file in reader.state.parent.glob("state.said*")]
    assert written > 4 * sum(sizes) and max(sizes) <= 2 * KEPT_BYTES


def test_ollama_does_not_wait_where_it_prints_much_between_two_readings(reader):
    reader.process.stdin.write(b"first\n")
    wait_for(lambda: last_lines(reader.state, 1) == ["first"], 30, "the first line")
    suspend(psutil.Process(reader.process.pid))
    os.set_blocking(reader.process.stdin.fileno(), False)
    printed = numbered(40_000)
    taken = reader.process.stdin.write(printed)
    reader.process.send_signal(signal.SIGCONT)
    os.set_blocking(reader.process.stdin.fileno(), True)
    assert taken == len(printed)
    assert reader.end() == b"first\n" + printed


def test_before_anything_was_printed_there_are_no_lines(tmp_path):
    assert last_lines(tmp_path / "state", 50) == []


@pytest.mark.parametrize(
    "printed, reason",
    [
        (b"Error: no\n", "Error: no"),
        (b"loading shared libraries\n", "loading shared libraries"),
        (b"panic: no\n" + TRACE, "panic: no"),
        (b"time=1 level=INFO msg=on\nfatal error: no\n" + TRACE, "fatal error: no"),
        (b"panic: a runner\ntime=1 level=WARN msg=on\n", ""),
        (b"time=1 level=ERROR msg=no\n", "time=1 level=ERROR msg=no"),
        (b"0" * 500 + b"\n", "0" * 300),
        (b"not \xff text\n", "not \ufffd text"),
        (b"", ""),
    ],
    ids=lambda value: ascii(value)[:20],
)
def test_the_reason_is_what_it_said_last(reader, printed, reason):
    assert reader.end(printed) == printed
    assert reader.reason() == f"{reason}\n"


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_does_not_lose_the_last_words(reader, sig):
    reader.process.stdin.write(b"first\n")
    wait_for(lambda: last_lines(reader.state, 1), 30, "that it reads")
    reader.process.send_signal(sig)
    assert reader.end(b"Error: last\n") == b"first\nError: last\n"
    assert reader.reason() == "Error: last\n"


def test_a_log_that_nobody_reads_any_more_does_not_stop_ollama(tmp_path):
    read, write = os.pipe()
    reader = Reader(tmp_path, stderr=write)
    os.close(read)
    os.close(write)
    reader.end(numbered(100_000) + b"Error: no\n")
    assert reader.reason() == "Error: no\n"


def test_a_folder_that_is_gone_does_not_stop_it(tmp_path):
    reader = Reader(tmp_path / "gone")
    printed = numbered(10_000)
    assert reader.end(printed) == printed


@pytest.mark.parametrize(
    "printed, shown",
    [
        (b'err="Get \\"https://cdn/x?sig=5ec\\": EOF"\n', b'err="Get \\"https://cdn/x\\": EOF"\n'),
        (b"http://me:secret@proxy:3128/#a b://c?d", b"http://proxy:3128/ b://c"),
        (b"https://a/b?c https://d?e\nf?g", b"https://a/b https://d\nf?g"),
        (b'[GIN] | POST "/api/pull?x=1"\n', b'[GIN] | POST "/api/pull?x=1"\n'),
        (b"://?", b"://"),
        (b"", b""),
    ],
)
def test_an_address_is_printed_without_its_query_and_its_user(printed, shown):
    assert without_queries(printed) == shown
