"""Finding and ending what a test has started."""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

import psutil

from helpers.places import MARK, RUN, RUNS, WHOLE_RUN
from helpers.waiting import wait_for

# What has a log to show when a test fails.
started = []


def mark(port):
    """Return the value of MARK for what listens on this port."""
    return f"{RUN}/{port}"


def marked(value=RUN):
    """Return the living processes that this test process has started, or those of a mark."""
    found, wanted = [], f"{MARK}={value}".encode()
    for pid in psutil.pids():
        with contextlib.suppress(psutil.Error, OSError):
            # A zombie's environment is empty.
            if wanted in Path(f"/proc/{pid}/environ").read_bytes():
                found.append(psutil.Process(pid))
    return found


def kill(processes):
    """End processes that may have ended by themselves."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()


def clean_up():
    """End and remove all that an interrupted run has left, of all its test processes."""
    while left := marked(WHOLE_RUN):
        kill(left)
    for folder in RUNS.glob(f"run-{WHOLE_RUN}-*"):
        shutil.rmtree(folder, ignore_errors=True)


def suspend(process):
    """Stop a process by SIGSTOP, and wait until each of its threads stands."""
    process.suspend()
    tasks = Path(f"/proc/{process.pid}/task")

    def stands():
        states = set()
        for stat in tasks.glob("*/stat"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended just now
                states.add(stat.read_text().rpartition(")")[2].split()[0])
        return states <= {"T"}

    wait_for(stands, 30, f"{process} stands")


def is_gone(process):
    """Tell whether a process is dead, and with it all of its threads.

    Where its parent hangs or has died, it may stay as a zombie, which holds no memory.
    """
    try:
        return not process.is_running() or (
            process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
            and len(os.listdir(f"/proc/{process.pid}/task")) <= 1
        )
    except (psutil.NoSuchProcess, FileNotFoundError):
        return True


@contextlib.contextmanager
def servers(make):
    """Give a factory by make(folder, …).

    What it made is stopped, and its folder removed, at the end.
    """
    with contextlib.ExitStack() as stack:

        def start(*args, **options):
            RUNS.mkdir(parents=True, exist_ok=True)
            folder = tempfile.TemporaryDirectory(prefix=f"run-{WHOLE_RUN}-", dir=RUNS)
            folder = stack.enter_context(folder)
            one = make(folder, *args, **options)
            started.append(one)
            stack.callback(started.remove, one)
            stack.callback(one.stop)
            try:
                one.start()
            except BaseException:
                print(one.log()[-6000:])
                raise
            return one

        yield start


def ticks(pid):
    """Return when a process was started, in ticks after boot."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def record(folder, server):
    """Record a server as the launcher does; return the file."""
    state = folder / "state"
    state.write_text(f"{server.pid} {ticks(server.pid)} 0\n")
    return state
