"""What a server does itself, by a process that stands for it and does what it is told."""

import contextlib
import os
import socket
import subprocess
import sys

import psutil
import pytest

from helpers.faults import Silent
from helpers.processes import record
from helpers.waiting import wait_for
from llm_service import server_work
from llm_service.processes import Processes
from llm_service.server_work import ServerWork

# Each line is done, and answered.
SERVER = """
import os, socket, subprocess, sys
for line in sys.stdin:
    exec(line)
    print(flush=True)
"""


class Server:
    """A process that leads a session and is recorded as a server."""

    def __init__(self, folder, listener):
        self.models = folder / "models"
        (self.models / "blobs").mkdir(parents=True)
        (self.models / "blobs" / "sha256-1").write_text("x")
        self.port = listener.getsockname()[1]
        command = [sys.executable, "-IS", "-c", SERVER]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, text=True, cwd=folder, start_new_session=True
        )
        self.processes = Processes(record(folder, self.process))

    def do(self, line):
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "\n"

    def works(self, port=0, folder=None):
        return ServerWork(self.processes, port, folder or self.models).is_seen()

    def close(self):
        for each in self.processes.all():
            each.kill()
        self.process.wait()


@pytest.fixture
def listener():
    with socket.create_server(("127.0.0.1", 0)) as one:
        yield one


@pytest.fixture
def server(tmp_path, listener):
    one = Server(tmp_path, listener)
    yield one
    one.close()


def test_a_server_that_does_nothing(server):
    assert not server.works()


def test_no_server_does_nothing(tmp_path):
    assert not ServerWork(Processes(tmp_path / "state"), 0, tmp_path).is_seen()


# Files


@pytest.mark.parametrize("mode", ["r", "w", "a"])
def test_a_file_of_the_models_that_is_open(server, mode):
    server.do(f"file = open('models/blobs/sha256-1', {mode!r})")
    assert server.works()
    server.do("file.close()")
    assert not server.works()


def test_a_file_elsewhere_is_no_work(server, tmp_path):
    (tmp_path / "models-of-others").write_text("x")
    server.do("file = open('models-of-others')")
    assert not server.works()


def test_the_models_folder_may_be_a_link(server, tmp_path):
    (tmp_path / "link").symlink_to(server.models)
    server.do("file = open('models/blobs/sha256-1')")
    assert server.works(folder=tmp_path / "link")


# Connections


def test_a_connection_to_others(server):
    server.do(f"other = socket.create_connection(('127.0.0.1', {server.port}))")
    assert server.works()
    server.do("other.close()")
    assert not server.works()


def test_a_connection_that_nobody_takes_yet(server):
    with Silent() as nobody:
        server.do("other = socket.socket(); other.setblocking(False)")
        server.do(f"other.connect_ex(('127.0.0.1', {nobody.port}))")
        (end,) = psutil.Process(server.process.pid).net_connections("tcp")
        assert end.status == psutil.CONN_SYN_SENT
        assert server.works()


def test_callers_are_no_work(server):
    server.do("own = socket.create_server(('127.0.0.1', 0)); accepted = []")
    (end,) = psutil.Process(server.process.pid).net_connections("tcp")
    with socket.create_connection(end.laddr):
        server.do("accepted.append(own.accept())")
        assert not server.works(port=end.laddr.port)
        assert server.works()  # where that is not the port of callers


def test_the_runners_connections_are_no_work(server):
    command = ["llama-server", "-c", "import time; time.sleep(60)", "--model", "m"]
    runner = [*command, "--port", str(server.port)]
    server.do(f"runner = subprocess.Popen({runner}, executable=sys.executable)")
    server.do(f"other = socket.create_connection(('127.0.0.1', {server.port}))")
    wait_for(
        server.processes.runners, 30, "its command line, which the kernel sets after the start"
    )
    assert not server.works()


# Computing


def test_a_server_that_computes(server):
    times = iter([1000, 1000.4, 1000.8])
    work = ServerWork(server.processes, 0, server.models, clock=lambda: next(times))
    assert not work.is_seen()
    server.do("import time; until = time.process_time() + 0.1")
    server.do("while time.process_time() < until: pass")
    assert work.is_seen()
    assert not work.is_seen()


# Children


def test_another_child(server):
    server.do("child = subprocess.Popen(['sleep', '60'])")
    assert server.works()
    server.do("child.kill(); child.wait()")
    assert not server.works()


def test_a_child_that_is_dead_does_nothing(server):
    server.do("child = subprocess.Popen(['true'])")
    (child,) = psutil.Process(server.process.pid).children()
    with contextlib.suppress(psutil.NoSuchProcess):
        while child.status() != psutil.STATUS_ZOMBIE:
            pass
    assert not server.works()


def test_what_may_not_be_read_may_be_work(server, monkeypatch):
    def refuse(_):
        raise PermissionError

    monkeypatch.setattr(server_work, "links", refuse)
    assert server.works()


def test_a_server_that_has_ended_does_nothing(server):
    os.kill(server.process.pid, 9)
    server.process.wait()
    assert not server.works()
