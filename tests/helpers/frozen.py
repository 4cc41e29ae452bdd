"""A process whose main thread stands while its other threads go on, as ptrace does it.

So stands a runner whose kernel on the GPU never returns: its decode loop is its main thread.
"""

import contextlib
import ctypes
import itertools
import multiprocessing
import os
import threading

import requests

PTRACE_SEIZE, PTRACE_INTERRUPT = 0x4206, 0x4207
PTRACE_O_TRACEEXIT = 0x40
WALL = 0x40000000
_spawn = multiprocessing.get_context("spawn")


def _trace(pid, ready, reap):
    """Hold the main thread; afterwards let its parent know of its end, or not."""
    libc = ctypes.CDLL(None, use_errno=True)
    for request in (PTRACE_SEIZE, PTRACE_INTERRUPT):
        if libc.ptrace(request, pid, None, None) == -1:
            ready.put(os.strerror(ctypes.get_errno()))
            return
    os.waitpid(pid, WALL)
    ready.put(None)
    if not reap:
        threading.Event().wait()
    with contextlib.suppress(ChildProcessError):
        while os.WIFSTOPPED(os.waitpid(pid, WALL)[1]):
            pass


def _answers(process):
    """Tell whether a runner's other threads go on."""
    port = dict(itertools.pairwise(process.cmdline()))["--port"]
    try:
        requests.get(f"http://127.0.0.1:{port}/health", timeout=2)
    except requests.Timeout:
        return False
    return True


@contextlib.contextmanager
def _traced(process, trace, *options):
    """Have ``trace(pid, ready, *options)`` done beside, until the block ends."""
    ready = _spawn.Queue()
    tracer = _spawn.Process(target=trace, args=(process.pid, ready, *options), daemon=True)
    tracer.start()
    try:
        error = ready.get(timeout=60)
        assert error is None, error
        yield
    finally:
        tracer.kill()
        tracer.join()


@contextlib.contextmanager
def frozen(process, reap=True, answering=True):
    """Hold a process's main thread, until it is killed or the block ends.

    Held while it has a lock that the other threads need, all would stand, which is another
    fault: then it is let go and held once more, unless ``answering`` is false. With ``reap`` false
    it becomes a ghost when it is killed: dead, and its parent is not told.
    """
    for _ in range(10):
        with _traced(process, _trace, reap):
            if not answering or _answers(process):
                yield process
                return
    raise AssertionError("its other threads never answered while it was held")


def _trace_exits(pid, ready):
    """Hold each thread at its exit."""
    libc = ctypes.CDLL(None, use_errno=True)
    for thread in os.listdir(f"/proc/{pid}/task"):
        if libc.ptrace(PTRACE_SEIZE, int(thread), None, PTRACE_O_TRACEEXIT) == -1:
            ready.put(os.strerror(ctypes.get_errno()))
            return
    ready.put(None)
    threading.Event().wait()


def unkillable(process):
    """A process that SIGKILL does not end, as one that waits for a driver."""
    return _traced(process, _trace_exits)
