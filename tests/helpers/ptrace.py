"""The decode loop of a runner that stands, while its HTTP threads go on answering."""

import contextlib
import ctypes
import os
import threading
import time

SEIZE, INTERRUPT, DETACH = 0x4206, 0x4207, 17
WALL = 0x40000000  # threads that were made by clone, too


class HeldLoop:
    """Holds the main thread of a process by ptrace, as a kernel on a GPU that never returns.

    The tracer is a thread of this process, since ptrace knows threads; it also reaps the
    process when it is killed, as otherwise its parent is not told.

        with HeldLoop(pid): …      .release() lets it go on
    """

    def __init__(self, pid):
        self.pid = pid
        self._held, self._done = threading.Event(), threading.Event()
        self._error = None
        self._thread = threading.Thread(target=self._trace, daemon=True)
        self._thread.start()
        assert self._held.wait(5) and not self._error, f"ptrace of {pid}: {self._error}"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.release()

    def release(self):
        self._done.set()
        self._thread.join(5)

    def _trace(self):
        libc = ctypes.CDLL(None, use_errno=True)
        libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
        for request in (SEIZE, INTERRUPT):
            if libc.ptrace(request, self.pid, None, None):
                self._error = os.strerror(ctypes.get_errno())
                self._held.set()
                return
        while not self._done.is_set():
            with contextlib.suppress(ChildProcessError):
                pid, status = os.waitpid(self.pid, WALL | os.WNOHANG)
                if pid and os.WIFSTOPPED(status):
                    self._held.set()
                elif pid:  # it is dead and reaped
                    return
            time.sleep(0.01)
        libc.ptrace(DETACH, self.pid, None, None)
