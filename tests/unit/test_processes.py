"""Which processes are the service's own, on stand-ins for a server and its runner."""

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest

from helpers.ports import free_port
from helpers.processes import kill, record, ticks
from helpers.waiting import wait_for
from llm_service import processes
from llm_service.processes import Processes, Runner, age_s, alive, end, life, wait_until

DIGEST = "c" * 64
SLEEP = "import time; time.sleep(60)"


def runner_command(digest=DIGEST, port="1234"):
    return ["llama-server", "-c", SLEEP, "--model", f"/m/blobs/sha256-{digest}", "--port", port]


class StandIn:
    """A server in a session of its own, with a runner as its child.

    .process        of the server (Popen)
    .processes      a Processes with a record of it
    .record(…)      makes one with another record
    """

    def __init__(self, folder):
        self.state = folder / "state"
        program = (
            f"import subprocess, sys; {SLEEP.partition(';')[0]}; "
            f"subprocess.Popen({runner_command()}, executable=sys.executable); time.sleep(60)"
        )
        command = [sys.executable, "-c", program]
        self.process = subprocess.Popen(command, start_new_session=True)
        self.started = ticks(self.process.pid)
        self.processes = self.record()
        wait_for(self.processes.runners, 30, "the runner")

    def record(self, offset=0):
        self.state.write_text(f"1 1 0\n{self.process.pid} {self.started + offset} 3\n")
        return Processes(str(self.state))

    def close(self):
        with contextlib.suppress(psutil.NoSuchProcess):
            for each in psutil.Process(self.process.pid).children():
                each.kill()
        for each in self.processes.runners():
            os.kill(each.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()


@pytest.fixture
def server(tmp_path):
    one = StandIn(tmp_path)
    yield one
    one.close()


def assert_nothing_is_ours(processes):
    assert processes.server() is None
    assert processes.all() == []
    assert processes.runners() == []


def test_a_state_file_that_somebody_has_removed_makes_no_process_a_stranger(server):
    before = server.processes.server(), server.processes.runners()
    server.state.unlink()
    assert before[0] and (server.processes.server(), server.processes.runners()) == before
    assert server.processes.restarts() == 3


@pytest.mark.parametrize(
    "text", ["", "\n", "garbage\n", "1 2\n", "1 2 3 4\n", "x y z\n", "1 2 3\nhalf", "\0\0\0"]
)
def test_a_damaged_state_file_names_no_process(tmp_path, text):
    (tmp_path / "state").write_text(text)
    processes = Processes(str(tmp_path / "state"))
    assert_nothing_is_ours(processes)
    processes.server()
    assert processes.restarts() == 0


def test_without_a_state_file_nothing_is_ours():
    assert_nothing_is_ours(Processes("/nonexistent/state"))


def test_a_recorded_server_and_its_runner_are_found(server):
    processes, pid = server.processes, server.process.pid
    (runner,) = processes.runners()
    assert processes.server().pid == pid
    assert processes.restarts() == 3
    assert (runner.digest, runner.port) == (DIGEST, "1234")
    assert {each.pid for each in processes.all()} == {pid, runner.process.pid}


def test_a_runner_stays_the_same_whatever_its_state_and_its_parent(server):
    (before,) = server.processes.runners()
    before.process.suspend()
    wait_for(lambda: before.process.status() == psutil.STATUS_STOPPED, 30, "it is stopped")
    assert server.processes.runners() == [before]
    server.process.kill()
    server.process.wait()
    wait_for(lambda: before.process.ppid() != server.process.pid, 30, "it has another parent")
    (after,) = server.processes.runners()
    assert after == before and hash(after) == hash(before)


LISTEN = """
import signal, socket, sys, time
one = socket.create_server(("127.0.0.1", int(sys.argv[1])))
signal.signal(signal.SIGTERM, lambda *_: one.close())
while True:
    time.sleep(60)
"""
WRAPPERS = {"itself": [], "a child": ["sh", "-c", '"$@" & wait', "sh"], "setsid": ["setsid", "-w"]}


@pytest.fixture
def server_at():
    """Start servers that listen at a port, and let it go at SIGTERM."""
    started = []

    def start(port, wrapper=()):
        command = [*wrapper, sys.executable, "-c", LISTEN, str(port)]
        started.append(psutil.Popen(command, start_new_session=True))
        return started[-1]

    yield start
    for each in started:
        end_all(each)


def end_all(process):
    """End a process with its children, if it is there yet."""
    with contextlib.suppress(psutil.NoSuchProcess):
        kill([*process.children(recursive=True), process])
    process.wait()


@pytest.mark.parametrize("wrapper", WRAPPERS.values(), ids=WRAPPERS)
def test_a_server_serves_where_it_listens_and_while_it_lives(tmp_path, server_at, wrapper):
    port = free_port()
    server = server_at(port, wrapper)
    there = Processes(record(tmp_path, server))
    wait_for(lambda: there.serves(port), 30, "it listens")
    with socket.create_server(("127.0.0.1", 0)) as anothers:
        assert not there.serves(anothers.getsockname()[1])
    end_all(server)
    assert not there.serves(port)


def test_a_server_that_lets_its_port_go_serves_no_longer_whoever_has_it_then(tmp_path, server_at):
    port = free_port()
    server = server_at(port)
    there = Processes(record(tmp_path, server))
    wait_for(lambda: there.serves(port), 30, "it listens")
    server.terminate()

    def take_over():
        with contextlib.suppress(OSError):
            return socket.create_server(("127.0.0.1", port))

    with wait_for(take_over, 30, "the port"):
        assert not there.serves(port)
        assert server.is_running()


def test_without_a_launcher_whoever_answers_is_the_server_and_with_one_nobody_before_it(tmp_path):
    assert Processes(os.devnull).serves(1)
    assert not Processes(tmp_path / "state").serves(1)


@pytest.mark.parametrize("offset", [1, -1])
def test_a_number_with_another_start_time_is_void(server, offset):
    void = server.record(offset)
    assert_nothing_is_ours(void)
    assert void.end_server(0.1)
    assert server.process.poll() is None


def test_a_runner_of_a_stranger_is_not_ours(server):
    ours = [each.process.pid for each in server.processes.runners()]
    command = runner_command("d" * 64, "9")
    with subprocess.Popen(command, executable=sys.executable, start_new_session=True) as process:
        try:
            wait_for(
                lambda: "--model" in psutil.Process(process.pid).cmdline(),
                30,
                "the stranger's command line",
            )
            assert [each.process.pid for each in server.processes.runners()] == ours
        finally:
            process.kill()


def test_an_orphan_is_still_ours_and_the_server_is_gone(server):
    processes = server.processes
    (runner,) = processes.runners()
    assert processes.end_server(0.5)
    server.process.wait()
    assert processes.server() is None
    (orphan,) = processes.runners()
    assert orphan.process.pid == runner.process.pid
    end(orphan.process)
    wait_for(lambda: not alive(orphan.process), 30, "the orphan's end")
    assert processes.runners() == []


def test_a_zombie_is_dead(server):
    processes = server.processes
    recorded = processes.server()
    for each in processes.runners():
        end(each.process)
    server.process.send_signal(signal.SIGKILL)
    wait_for(lambda: not alive(recorded), 30, "the server's end")
    assert os.path.exists(f"/proc/{server.process.pid}")
    assert processes.server() is None


def test_one_whose_main_thread_has_ended_lives_until_its_last_thread_has():
    """So looks a runner that was killed while a thread of it waits for the GPU's driver."""
    script = (
        "import ctypes, threading, time; threading.Thread(target=time.sleep, args=(60,)).start(); "
        "ctypes.CDLL(None).pthread_exit(None)"
    )
    with subprocess.Popen([sys.executable, "-c", script]) as started:
        process = psutil.Process(started.pid)
        wait_for(lambda: process.status() == psutil.STATUS_ZOMBIE, 30, "the main thread's end")
        assert alive(process) and life(process).dying
        end(process)
        wait_for(lambda: not alive(process), 30, "the end of the last thread")
        assert life(process).dying  # until it is reaped
    assert not life(process).dying


def test_signalling_a_process_that_has_ended_does_nothing(server):
    recorded = server.processes.server()
    server.process.kill()
    server.process.wait()
    end(recorded)


@pytest.mark.parametrize("known", [False, True], ids=["stays unknown", "becomes known"])
def test_a_child_that_becomes_known_as_a_runner_meanwhile_is_no_stranger(
    tmp_path, monkeypatch, known
):
    """Ollama has just begun it: it gets its command line between two readings."""
    processes = Processes(tmp_path / "state")
    child = psutil.Popen(["sleep", "60"])
    process = psutil.Process(child.pid)
    runners = []

    def read_all():
        if known:
            runners.append(Runner(process, "d" * 64, 1))
        return [process]

    monkeypatch.setattr(processes, "server", psutil.Process)
    monkeypatch.setattr(processes, "all", read_all)
    monkeypatch.setattr(processes, "runners", runners.copy)
    try:
        found = [each.process for each in processes.unknown_children()]
    finally:
        child.kill()
        child.wait()
    assert found == ([] if known else [process])


def test_what_begins_another_program_is_no_runner_any_more(tmp_path):
    """As a debugger that llama-server has forked at its crash: first it bears the same words."""
    go = tmp_path / "go"
    program = (
        f"import os, time\nwhile not os.path.exists({str(go)!r}): time.sleep(0.01)\n"
        "os.execlp('sleep', 'sleep', '60')"
    )
    command = ["llama-server", "-c", program, *runner_command()[3:]]
    child = subprocess.Popen(command, executable=sys.executable, start_new_session=True)
    try:
        there = Processes(record(tmp_path, child))
        wait_for(there.runners, 30, "the runner")
        go.touch()
        wait_for(lambda: not there.runners(), 30, "its other program")
    finally:
        child.kill()
        child.wait()


@pytest.mark.parametrize("setting", ["1", "", None])
def test_which_gpus_cuda_shows_a_runner_is_known(tmp_path, monkeypatch, setting):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if setting is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", setting)
    one = subprocess.Popen(runner_command(), executable=sys.executable, start_new_session=True)
    try:
        state = record(tmp_path, one)
        (runner,) = wait_for(Processes(state).runners, 30, "the runner")
        assert runner.gpus == setting
        monkeypatch.setattr(psutil.Process, "environ", forbidden)
        (runner,) = Processes(state).runners()
        assert runner.gpus is None
    finally:
        one.kill()
        one.wait()


def forbidden(process):
    raise psutil.AccessDenied(process.pid)


def test_one_that_could_not_be_read_for_a_moment_lives(server, monkeypatch):
    def no_more_files(*_):
        raise OSError(errno.EMFILE, "too many open files")

    process = psutil.Process(server.process.pid)  # another object: nothing is known of it
    processes._start_ticks.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", no_more_files)
        assert age_s(process) == 0
    assert alive(process) and 0 < age_s(process) < 60


def test_what_comes_true_while_others_have_the_cpu_is_seen():
    """Between a look and the deadline there may be no time for another one."""
    deadline = time.monotonic() + 0.05
    looks = []

    def condition():
        looks.append(time.monotonic())
        if len(looks) == 1:
            time.sleep(0.1)
            return False
        return True

    assert wait_until(condition, deadline)
    assert len(looks) == 2


def test_after_the_deadline_it_looks_once():
    looks = []
    assert not wait_until(lambda: looks.append(1), time.monotonic())
    assert looks == [1]
