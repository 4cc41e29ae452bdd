"""A thread held by ptrace: to all others its process looks as if its work never returned."""

import contextlib
import ctypes
import os
import threading

from helpers.waiting import wait_for

SEIZE, INTERRUPT, DETACH = 0x4206, 0x4207, 17
WALL = 0x40000000  # of waitpid: also threads

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


def _ptrace(request, tid):
    if _libc.ptrace(request, tid, None, None) == -1:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


@contextlib.contextmanager
def main_thread_held(process):
    """Hold a process's main thread; its other threads go on, and SIGKILL ends it as ever."""
    stands, release = threading.Event(), threading.Event()

    def trace():
        # Only the thread that seized may detach, and its end would let the held one go.
        _ptrace(SEIZE, process.pid)
        _ptrace(INTERRUPT, process.pid)
        while not release.wait(0.02):
            # Until the tracer has seen a death, the parent does not learn of it.
            with contextlib.suppress(ChildProcessError):
                if os.waitpid(process.pid, WALL | os.WNOHANG)[0]:
                    stands.set()
        with contextlib.suppress(OSError):
            _ptrace(DETACH, process.pid)

    tracer = threading.Thread(target=trace, daemon=True)
    tracer.start()
    try:
        wait_for(stands.is_set, 10, f"the main thread of {process} stands")
        yield
    finally:
        release.set()
        tracer.join(10)
