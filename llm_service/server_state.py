"""What is known of Ollama's server: whether it starts, answers or hangs, and what it says."""

import contextlib
import logging
import time
import typing

import psutil

from llm_service.manifests import is_lent
from llm_service.processes import Processes, age_s, cpu_clock_s, runs
from llm_service.runner_state import GAP_S
from llm_service.store import Store
from ollama_client import ANSWER_S, Json, Ollama, ServiceError

log = logging.getLogger("llm-service")
VERSION_S = 0.4
STARTING_S = 300
HUNG_LOOKS = 15
# What Ollama's server uses at rest, and for one /api/ps; a change of models takes 1 ms more.
QUIET_CPU_S = 0.0002
QUESTION_CPU_S = 0.001
LONG_QUIET_S = 7  # then a look asks it all the same


class ServerState:
    """Whether the server has answered since it was started, and for how long it is silent."""

    def __init__(
        self,
        ollama: Ollama,
        store: Store,
        processes: Processes,
        clock: typing.Callable[[], float] = time.monotonic,
        age: typing.Callable[[psutil.Process], float] = age_s,
    ):
        """Nothing is known yet.

        ``clock()`` gives monotonic seconds, ``age(process)`` its seconds since its start.
        """
        self._clock = clock
        self._age = age
        self.version: str | None = None
        self.state = "not started"  # then "starting", "answering", "silent", "ended"
        self.answered: psutil.Process | None = None  # the server that has answered last
        self._ollama = ollama
        self._store = store
        self._processes = processes
        self._tags: tuple[tuple, list[Json]] = ((), [])  # with the store's signature
        # The server that is silent, and at how many looks in a row it was
        self._silent: tuple[psutil.Process | None, int] = (None, 0)
        self._since = self._looked_at = self._clock()
        self._asked_at = self._since  # by a look
        # The server of the last answer of /api/ps, its CPU time then, and the answer
        self._listed: tuple[psutil.Process | None, float, list[Json]] = (None, 0.0, [])

    def starting(self, server: psutil.Process) -> bool:
        """Tell whether this server has not answered yet and still may take its time."""
        return server != self.answered and self._age(server) < STARTING_S

    def hung(self, server: psutil.Process | None) -> bool:
        """Tell whether this server is silent for good: it has answered, or had its time."""
        silent, looks = self._silent
        if server is None or server != silent or self.starting(server):
            return False
        return looks >= HUNG_LOOKS

    def ended_s(self) -> float:
        """Return for how many seconds there has been no server; 0 where there is one."""
        return self._clock() - self._since if self.state == "ended" else 0.0

    def note_answer(self, server: psutil.Process | None) -> None:
        """Note that this server has answered."""
        if server != self.answered:
            self.version = None  # it may be another one now
        self.answered = server
        self._silent = server, 0
        self._change("answering")

    def note_silence(self, server: psutil.Process | None, counts: bool = True) -> None:
        """Note that this server has not answered a look, or that there is none.

        ``counts`` is whether it is one of the looks in a row that tell a hang.
        """
        now = self._clock()
        known, looks = self._silent
        goes_on = server == known and now - self._looked_at <= GAP_S
        self._silent = server, (looks if goes_on else 0) + counts
        self._looked_at = now
        if server is None:
            if self._processes.ever_started():
                self._change("ended")
        elif self._processes.ending(server):
            self._change("ended")
        else:
            self._change("starting" if self.starting(server) else "silent")

    def _change(self, state: str) -> None:
        """Take on a state. Each change is one line of the log."""
        if state != self.state:
            words = "Ollama is %s, after %.0f s of %s"
            log.info(words, state, self._clock() - self._since, self.state)
            self.state = state
            self._since = self._clock()

    def ask_loaded(self, server: psutil.Process | None, timeout_s: float) -> list[Json]:
        """Ask this server what it has loaded: ``/api/ps``."""
        before_s = cpu_clock_s(server)
        loaded = self._ollama.ps(timeout_s)
        self.note_answer(server)
        after_s = cpu_clock_s(server)
        if after_s - before_s < QUESTION_CPU_S:  # else it may have done more than answer
            self._listed = server, after_s, loaded
        return loaded

    def loaded_now(self, timeout_s: float = ANSWER_S) -> list[Json]:
        """Return what is loaded; a server that has done nothing since is not asked again.

        A stopped one is asked, which tells that it hangs.
        """
        if self._is_quiet():
            return self._listed[2]
        return self.ask_loaded(self._processes.server(), timeout_s)

    def look_at_loaded(self, server: psutil.Process | None, timeout_s: float) -> list[Json]:
        """Do the same for a look of the watch, which also finds a server that hangs without work.

        What it is asked takes it as much CPU as the service.
        """
        now = self._clock()
        asked, _, loaded = self._listed
        recent = now - self._asked_at < LONG_QUIET_S
        if recent and server == asked and self._is_quiet():
            return loaded
        self._asked_at = now
        return self.ask_loaded(server, timeout_s)

    def rests_since(self, loaded: list[Json]) -> bool:
        """Tell whether the server has done nothing since it gave this very answer."""
        told = self._listed[2]
        return told is loaded and self._is_quiet()

    def _is_quiet(self) -> bool:
        """Tell whether the server has done nothing since it was asked, and can answer."""
        asked, cpu_s, _ = self._listed
        if asked is None or self.state != "answering" or not runs(asked):
            return False
        used_s = cpu_clock_s(asked) - cpu_s
        return 0 <= used_s < QUIET_CPU_S

    def known_version(self) -> str | None:
        """Return the version; asked for once a server."""
        if self.version is None:
            with contextlib.suppress(ServiceError):
                self.version = self._ollama.version(VERSION_S)
        return self.version

    def tags(self, timeout_s: float, signature: tuple | None = None) -> list[Json]:
        """Return the models on disk: as known where the store is certainly as it was.

        ``signature`` is the store's, by a caller who has just read it.
        """
        signature = signature or self._store.signature()
        known, models = self._tags
        if not signature or signature != known:
            models = self._ollama.tags(timeout_s)
            models = [model for model in models if not is_lent(model["name"])]
            self._tags = signature or (), models
        return models

    def answers(self, timeout_s: float = VERSION_S) -> bool:
        """Tell whether Ollama answers."""
        try:
            return bool(self._ollama.version(timeout_s))
        except ServiceError:
            return False
