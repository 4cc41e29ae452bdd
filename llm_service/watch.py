"""One thread looks at the server, the runners and the machine, and tells what it saw."""

import contextlib
import logging
import threading
import time
import typing

import psutil

import gpu
from llm_service.downloads import Downloads
from llm_service.manifests import is_lent
from llm_service.matching import Held, Matching
from llm_service.processes import (
    Processes,
    Runner,
    cpu_clock_s,
    dying,
    is_orphan,
    main_thread_cpu_s,
    memory_mb,
    runs,
    unreaped,
)
from llm_service.runner_state import WORKING_SHARE, Look, RunnerState
from llm_service.sharing import in_parallel
from llm_service.store import Store
from ollama_client import ANSWER_S, Json, Ollama, ServiceError

log = logging.getLogger("llm-service")
ASK_S = 0.6  # two such questions and a list stay within the 3 s of /health
ASK_VERSION_S = 0.4
RUNNER_ASK_S = 0.5  # for each question of a look
LONG_IDLE_S = 30  # then a runner is asked though it uses no CPU
STARTING_S = 300
LOOK_S = 2
WAKE_CPU_S = 0.0005  # a request takes 1 ms, two seconds of an idle runner 0.05 ms
# What Ollama's server uses at rest, and for one /api/ps; a change of models takes 1 ms more.
QUIET_CPU_S = 0.0002
QUESTION_CPU_S = 0.001
HUNG_LOOKS = 15
DISK_LOOK_S = 60


class ServerState:
    """Whether the server has answered since it was started, and for how long it is silent."""

    def __init__(self, ollama: Ollama, store: Store, processes: Processes):
        self.version: str | None = None
        self._ollama, self._store, self._processes = ollama, store, processes
        self._tags: tuple[tuple, list[Json]] = ((), [])  # with the store's signature
        self._answered: psutil.Process | None = None
        self._silent_looks = 0
        # The server of the last answer of /api/ps, its CPU time then, and the answer
        self._listed: tuple[psutil.Process | None, float, list[Json]] = (None, 0.0, [])

    def starting(self, server: psutil.Process) -> bool:
        """Tell whether this server has not answered yet and still may take its time."""
        age_s = time.time() - server.create_time()
        return server != self._answered and age_s < STARTING_S

    def hung(self, server: psutil.Process | None) -> bool:
        """Tell whether this server answered once and is silent for good."""
        known = server is not None and server == self._answered
        return known and self._silent_looks >= HUNG_LOOKS

    def note_answer(self, server: psutil.Process | None) -> None:
        """Note that this server has answered."""
        if server != self._answered:
            self.version = None  # it may be another one now
        self._answered = server
        self._silent_looks = 0

    def note_silence(self) -> None:
        """Note that the server has not answered a look."""
        self._silent_looks += 1

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
        """Return what is loaded, without a question where the server has done nothing since.

        A stopped one is asked, which tells that it hangs.
        """
        asked, cpu_s, loaded = self._listed
        if asked and not self._silent_looks and runs(asked):
            if 0 <= cpu_clock_s(asked) - cpu_s < QUIET_CPU_S:
                return loaded
        return self.ask_loaded(self._processes.server(), timeout_s)

    def known_version(self) -> str | None:
        """Return the version; asked for once a server."""
        if self.version is None:
            with contextlib.suppress(ServiceError):
                self.version = self._ollama.version(RUNNER_ASK_S)
        return self.version

    def tags(self, timeout_s: float) -> list[Json]:
        """Return the models on disk, asked for anew unless the store is certainly as it was."""
        signature = self._store.signature()
        known, models = self._tags
        if not signature or signature != known:
            models = self._ollama.tags(timeout_s)
            models = [model for model in models if not is_lent(model["name"])]
            self._tags = signature or (), models
        return models

    def answers(self, timeout_s: float = ASK_VERSION_S) -> bool:
        """Tell whether Ollama answers."""
        try:
            return bool(self._ollama.version(timeout_s))
        except ServiceError:
            return False


class Watch:
    """Looks at the server, the runners, CPU and disk every LOOK_S; requests read what it saw."""

    def __init__(
        self,
        ollama: Ollama,
        store: Store,
        processes: Processes,
        downloads: Downloads,
        stuck_s: float,
    ):
        self.ollama, self.store, self.processes = ollama, store, processes
        self._downloads, self._stuck_s = downloads, stuck_s
        self.server_state = ServerState(ollama, store, processes)
        self.matching = Matching(ollama, store.manifests)
        self.held: dict[Runner, Held] = {}  # what each runner holds, as of the last look
        self.loaded: list[Json] = []  # /api/ps at the last look that got it
        self.looked_at = time.time()
        self.up = 0  # 1 where the last look found nothing wrong
        self.server: psutil.Process | None = None  # at the last look
        self.gpu: Json
        self.memory: typing.Any  # of the machine, as psutil tells it
        self.cpu_percent: float | None = None
        self.process_memory_mb = 0
        self.store_writable = True
        self._own: list[psutil.Process | None] = []  # gunicorn's two
        self.disk: Json | None = None
        self._lock = threading.Lock()
        self._states: dict[Runner, RunnerState] = {}
        self._disk_key: object = None

    def start(self, after_look: typing.Callable[[], None]) -> None:
        """Begin to watch; ``after_look`` is called after each look, in the watch's thread."""
        self.store.manifests.take_names_back()
        self._own = [psutil.Process(), psutil.Process().parent()]
        self.measure()
        run = threading.Thread(target=self._run, args=(after_look,), name="watch", daemon=True)
        run.start()

    def runners(self) -> list[Json]:
        """Return the runners as of the last look."""
        now = time.monotonic()
        return [state.report(now) for state in self._states.values()]

    def is_stuck(self, runner: Runner) -> bool:
        """Tell whether a runner was stuck at the last look."""
        state = self._states.get(runner)  # once: another thread replaces them
        return state is not None and state.state == "stuck"

    def known_runners(self) -> list[Runner]:
        """Return the runners that live, and those seen earlier whose end Ollama waits for."""
        server = self.processes.server()
        living = self.processes.runners()
        others = self._states.keys() - living
        return living + [runner for runner in others if unreaped(runner.process, server)]

    def look(self, deadline: float | None = None) -> None:
        """Look at everything once; before a deadline only if there is time for a hang."""
        wait_s = 60.0
        if deadline:
            wait_s = max(0, deadline - time.monotonic() - 3 * RUNNER_ASK_S)
        if not wait_s or not self._lock.acquire(timeout=wait_s):
            return
        try:
            server = self.server = self.processes.server()
            self._ask_server(server)
            self._find_runners()
            self._look_at_runners(server)
            self._look_at_machine(server)
            self.up = int(self._is_well(server))
            self.looked_at = time.time()
        finally:
            self._lock.release()

    def _run(self, after_look: typing.Callable[[], None]) -> None:
        while True:
            try:
                self.look()
                after_look()
            except ServiceError as e:
                log.warning("the watch: %s", e)
            except Exception:
                self.up = 0
                log.exception("the watch: a bug")
            time.sleep(LOOK_S)

    # Looking

    def _ask_server(self, server: psutil.Process | None) -> None:
        """Ask what is loaded. Ollama may hold its lock: only its version tells that it hangs."""
        try:
            self.loaded = self.server_state.ask_loaded(server, RUNNER_ASK_S)
        except ServiceError:
            if server is None:
                self.loaded = []
            if self.server_state.answers():
                self.server_state.note_answer(server)
            else:
                self.server_state.note_silence()

    def _find_runners(self) -> None:
        """Keep a state for each runner; one whose server has reaped it is forgotten."""
        now = time.monotonic()
        states = {}
        self.held = self.matching.match(self.known_runners(), self.loaded)
        for runner, held in self.held.items():
            state = self._states.get(runner) or RunnerState(runner, now, self._stuck_s)
            state.model = held.name or state.model
            states[runner] = state
        self._states = states

    def _look_at_runners(self, server: psutil.Process | None) -> None:
        """Look at what costs nothing; ask a runner only where something may have changed."""

        def ask(seen: tuple[RunnerState, Look]) -> None:
            state, look = seen
            self._ask(state, look)
            with contextlib.suppress(psutil.Error):
                state.cpu_spent(time.monotonic())  # what the asking took does not count

        looks = []
        for state in self._states.values():
            with contextlib.suppress(psutil.Error):  # it has ended: the next look forgets it
                looks.append((state, self._glance(state, server)))
        due = [(state, look) for state, look in looks if look.due]
        in_parallel(ask, due)
        for state, look in looks:
            state.note(look)

    def _glance(self, state: RunnerState, server: psutil.Process | None) -> Look:
        look = Look(time.monotonic())
        process = state.process
        spent_s, passed_s = state.cpu_spent(look.at)
        state.memory_mb = memory_mb(process)
        state.cpu_percent = process.cpu_percent()
        look.working = spent_s > WORKING_SHARE * passed_s
        look.active = state.under_way or spent_s > WAKE_CPU_S
        if is_orphan(process, server):
            look.health = "orphan"
        elif dying(process):
            look.health = "dead"
        else:
            look.due = look.active or look.at - state.asked_at >= LONG_IDLE_S
        return look

    def _ask(self, state: RunnerState, look: Look) -> None:
        """Ask a runner's own port. An idle one is asked for its health only: /slots is logged."""
        port = state.runner.port
        state.asked_at = look.at
        look.health = self.ollama.runner_health(port, RUNNER_ASK_S)
        if look.health != "ok" or not look.active:
            return
        with contextlib.suppress(psutil.Error):
            look.main_cpu_s = main_thread_cpu_s(state.process)
        for model in self.loaded:
            if model["name"] == state.model:
                look.on_gpu = 0 < bytes_of(model, "size") <= bytes_of(model, "size_vram")
        try:
            look.slots = self.ollama.runner_slots(port, RUNNER_ASK_S)
        except ServiceError:
            look.late = True

    def measure(self) -> None:
        """Take the figures of the machine."""
        self.gpu = gpu.sample()
        self.memory = psutil.virtual_memory()
        self.cpu_percent = psutil.cpu_percent()  # since the look before

    def _look_at_machine(self, server: psutil.Process | None) -> None:
        self.measure()
        runners_mb = sum(state.memory_mb for state in self._states.values())
        self.process_memory_mb = runners_mb + sum(map(memory_mb, [*self._own, server]))
        downloading = (
            self._downloads.running_count()
        )  # parts grow, and their folder does not change
        minute = time.monotonic() // DISK_LOOK_S
        free = self.store.free_bytes()
        key = (self.store.signature(), self.store.changed_ns(), downloading, minute, free is None)
        if downloading or key != self._disk_key:
            self.disk = self.store.disk()
            self.store_writable = self.store.writable()
            self._disk_key = key
        elif self.disk:  # what others write to the disk
            self.disk = {**self.disk, "free_bytes": free}

    def _is_well(self, server: psutil.Process | None) -> bool:
        if server is None or self.server_state.starting(server) or self.server_state.hung(server):
            return False
        return not self.faults()

    def faults(self) -> list[RunnerState]:
        """Return the runners with a fault. A ghost of the server before holds nobody up."""
        return [
            state
            for state in self._states.values()
            if state.state in ("stuck", "silent")
            or (state.state == "ghost" and unreaped(state.process, self.processes.server()))
        ]

    def states(self) -> list[RunnerState]:
        """Return the state of each runner as of the last look."""
        return list(self._states.values())


def bytes_of(model: Json, key: str) -> int:
    """Return a figure of a line of ``/api/ps``; 0 where it is none."""
    figure = model.get(key)
    return figure if isinstance(figure, int) else 0
