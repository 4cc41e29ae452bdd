"""A process whose main thread stands while its other threads go on, as ptrace does it.

So stands a runner whose kernel on the GPU never returns: its decode loop is its main thread.
"""

import contextlib
import ctypes
import multiprocessing
import os
import threading

PTRACE_SEIZE, PTRACE_INTERRUPT = 0x4206, 0x4207
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


@contextlib.contextmanager
def frozen(process, reap=True):
    """Hold a process's main thread, until it is killed or the block ends.

    With ``reap`` false it becomes a ghost when it is killed: dead, and its parent is not told.
    """
    ready = _spawn.Queue()
    tracer = _spawn.Process(target=_trace, args=(process.pid, ready, reap), daemon=True)
    tracer.start()
    try:
        error = ready.get(timeout=20)
        assert error is None, error
        yield process
    finally:
        tracer.kill()
        tracer.join()
