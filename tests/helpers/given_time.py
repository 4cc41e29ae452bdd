"""Time that passes where the code under test waits, and not by itself.

    clock = Clock(under_way)
    clock.rule(monkeypatch, watch, healing)     in these modules, for `time` and `wait_until`
    clock.sleep(2)                              at once it is two seconds later
    clock.after(0.3, act)                       acts once that much has passed
    SERVER                                      a program that stands for Ollama with two runners

What real processes do takes real time, in which none passes here: `under_way()` tells whether
something of theirs is about to come. So no deadline is missed because the machine is busy.
"""

import threading
import time

from llm_service.processes import life, runs, unreaped

PAUSE_S = 0.002  # in real time, while something is under way
# Starts two runners and says which; reaps them late, as on a busy machine.
SERVER = """
import os, time
runners = [os.spawnlp(os.P_NOWAIT, "sleep", "sleep", "600") for _ in range(2)]
print(*runners, flush=True)
for _ in runners:
    os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
    time.sleep(0.05)
    os.wait()
time.sleep(600)
"""


class Clock:
    """Stands in for the module `time`, of which the rest is as it is."""

    def __init__(self, under_way=bool):
        self._under_way = under_way
        self._now = time.monotonic()
        self._due = []  # (when, act)
        self._lock = threading.RLock()

    def __getattr__(self, name):
        return getattr(time, name)

    def rule(self, monkeypatch, *modules):
        """Have these modules take the time of this clock, and wait by it."""
        for module in modules:
            monkeypatch.setattr(module, "time", self)
            if hasattr(module, "wait_until"):
                monkeypatch.setattr(module, "wait_until", self.wait_until)

    def monotonic(self):
        return self._now

    def after(self, seconds, act):
        with self._lock:
            self._due.append((self._now + seconds, act))

    def sleep(self, seconds):
        """Let the time pass, with all that is due meanwhile, once nothing is under way."""
        while self._under_way():
            time.sleep(PAUSE_S)
        with self._lock:
            until = self._now + seconds
            while due := [each for each in self._due if each[0] <= until]:
                first = min(due, key=lambda each: each[0])
                self._due.remove(first)
                self._now, act = first
                act()
            self._now = until

    def wait_until(self, condition, deadline):
        """Do what processes.wait_until does."""
        while not condition():
            if self._now >= deadline:
                return False
            if self._under_way():
                time.sleep(PAUSE_S)
            else:
                self.sleep(min([deadline, *(when for when, _ in self._due)]) - self._now)
        return True


def ends_soon(runner, server):
    """Tell whether a runner is about to end, or to be reaped by its server."""
    seen = life(runner)
    return seen.dying and (seen.alive or (runs(server) and unreaped(runner, server)))
