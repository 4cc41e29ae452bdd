"""One thread looks at the server and the runners, and tells what it saw."""

import contextlib
import logging
import threading
import time
import typing

import psutil

from llm_service.answers import Totals, totals_of
from llm_service.callers import Callers
from llm_service.machine import Machine
from llm_service.matching import Held
from llm_service.processes import (
    Processes,
    Runner,
    alive,
    cpu_seconds,
    end,
    life,
    listens,
    main_thread_s,
    memory_mb,
    unreaped,
)
from llm_service.runner_state import Look, RunnerState
from llm_service.server_state import ServerState
from llm_service.sharing import in_parallel
from llm_service.store import Store
from ollama_client import Json, Ollama, ServiceError

log = logging.getLogger("llm-service")
RUNNER_ASK_S = 0.5  # for each question of a look
LONG_IDLE_S = 30  # then a runner is asked though it uses no CPU
LOOK_S = 2
QUIET_S = 6  # without any work, until one look in two is left out
WAKE_CPU_S = 0.0005  # a request takes 1 ms, two seconds of an idle runner 0.05 to 0.2 ms
SETTLE_S = 0.02  # after its answers a runner goes on for a moment, on a GPU for over WAKE_CPU_S


class Watch:
    """Looks at the server and the runners every LOOK_S; requests read what it saw.

    It alone owns the runners' states: who wants a runner ended asks it, and it looks again
    before it acts.
    """

    def __init__(
        self,
        ollama: Ollama,
        store: Store,
        processes: Processes,
        machine: Machine,
        callers: Callers,
        stuck_s: float,
        send: typing.Callable[[psutil.Process], None] = end,
    ):
        """``send(process)`` is what ends a runner."""
        self.ollama = ollama
        self.store = store
        self.processes = processes
        self.machine = machine
        self.callers = callers
        self.totals = Totals()
        self._stuck_s = stuck_s
        self._send = send
        self.server_state = ServerState(ollama, store, processes)
        self.matching = machine.matching
        self.held: dict[Runner, Held] = {}  # what each runner holds, as of the last look
        self.loaded: list[Json] = []  # /api/ps at the last look that got it
        # The GPUs as they were before the last look, which saw what may lie there since
        self.gpu = machine.gpu
        self.gpu_read_at = 0.0
        self.looked_at = time.time()
        self.well = False  # whether the last look was done, and not broken off by a bug
        self.server: psutil.Process | None = None  # at the last look
        self.process_memory_mb = 0
        self._own: list[psutil.Process | None] = []  # gunicorn's two
        self._lock = threading.Lock()
        self._states: dict[Runner, RunnerState] = {}
        self._cpu: dict[psutil.Process, tuple[float, float]] = {}  # CPU seconds, and when

    def start(self, after_look: typing.Callable[[], None]) -> None:
        """Begin to watch; ``after_look`` is called after each look, in the watch's thread."""
        self.store.manifests.take_names_back()
        worker = psutil.Process()
        self._own = [worker, worker.parent()]
        thread = threading.Thread(
            target=self._run,
            args=(after_look,),
            name="watch",
            daemon=True,
        )
        thread.start()

    def runners(self) -> list[Json]:
        """Return the runners as of the last look."""
        now = time.monotonic()
        return [state.report(now) for state in self.states()]

    def states(self) -> list[RunnerState]:
        """Return the state of each runner as of the last look."""
        return list(self._states.values())

    def faults(self) -> list[RunnerState]:
        """Return the runners with a fault that are there yet.

        A ghost of the server before holds nobody up, nor does one that has gone since.
        """
        found = []
        for state in self.states():
            if not state.faulty:
                continue
            lives = state.survives or state.state != "ghost"
            holds = lives and alive(state.process)
            if holds or unreaped(state.process, self.processes.server()):
                found.append(state)
        return found

    def is_stuck(self, runner: Runner) -> bool:
        """Tell whether a runner was stuck at the last look."""
        state = self._states.get(runner)
        return state is not None and state.state == "stuck"

    def survives(self, runner: Runner) -> bool:
        """Tell whether SIGKILL has not ended a runner for long."""
        state = self._states.get(runner)
        return state is not None and state.survives and alive(runner.process)

    def known_runners(self) -> list[Runner]:
        """Return the runners that live, and those seen earlier whose end is waited for."""
        living = self.processes.runners()
        known = list(living)
        for runner in list(self._states):
            if runner not in living and self._is_waited_for(runner.process):
                known.append(runner)
        return known

    def look(self, deadline: float | None = None) -> None:
        """Look at everything once; before a deadline only if there is time for a hang.

        A look with a deadline is a caller's: it tells no hang, as many may come at once.
        """
        wait_s = 60.0
        if deadline:
            left_s = deadline - time.monotonic()
            wait_s = max(0, left_s - 3 * RUNNER_ASK_S)
        if not wait_s or not self._lock.acquire(timeout=wait_s):
            return
        try:
            self.gpu_read_at = self.machine.read_at
            self.gpu = self.machine.gpu
            server = self.server = self.processes.server()
            self._ask_server(server, counts=deadline is None)
            self._find_runners()
            self._look_at_runners(self.states(), server)
            self._look_at_callers(server)
            runners_mb = sum(state.memory_mb for state in self.states())
            others_mb = sum(map(memory_mb, [*self._own, server]))
            self.process_memory_mb = runners_mb + others_mb
            self.looked_at = time.time()
            self.well = True
        finally:
            self._lock.release()

    def holds(self, runner: Runner, state: str) -> bool:
        """Look at one runner afresh; tell whether it is in this state still."""
        with self._lock:
            return self._holds(runner, state)

    def end_runner(self, runner: Runner, state: str) -> bool:
        """End a runner if it is in this state still, by a look right before; tell whether."""
        with self._lock:
            still = self._holds(runner, state)
            if still:
                self._send(runner.process)
        return still

    def _holds(self, runner: Runner, state: str) -> bool:
        """Look and tell, for a caller who has the lock."""
        known = self._states.get(runner)
        if known is None or not alive(runner.process):
            return False
        server = self.processes.server()
        self._heed_ends(time.monotonic())
        self._look_at_runners([known], server)
        return known.state == state and alive(runner.process)

    def _run(self, after_look: typing.Callable[[], None]) -> None:
        """Look for as long as the service lives; where nothing moves for long, one time in two."""
        moved_at = time.monotonic()
        rests = False
        while True:
            now = time.monotonic()
            until = now + LOOK_S
            try:
                glances = self.glances()
                if glances is None:
                    moved_at = now
                self.machine.quiet = now - moved_at >= QUIET_S
                rests = self.machine.quiet and not rests
                if glances is not None and rests:
                    self._cpu.update(glances)  # what works shows by the CPU of two seconds
                else:
                    self.look()
                    after_look()
            except ServiceError as e:
                log.warning("the watch: %s", e)
            except Exception:
                self.well = False
                log.exception("the watch: a bug")
            # Not sooner than a second after the last questions: llama-server looks then whether
            # its clients have left.
            left_s = until - time.monotonic()
            time.sleep(max(LOOK_S / 2, left_s))

    # Looking

    def glances(self) -> dict[psutil.Process, tuple[float, float]] | None:
        """Return each runner's CPU seconds and when, where all is as the last look has left it.

        Where something moves: None. Who calls, loads or ends something makes the server or a
        runner use CPU time, which is what costs least to look at.
        """
        callers = self.callers.report
        if not self.well or (callers and callers["waiting"]):
            return None
        if len(self.loaded) != len(self._states):  # a model has no process
            return None
        if not self.server_state.rests_since(self.loaded):
            return None
        found = {}
        for state in self.states():
            used = self._rest(state)
            if used is None:
                return None
            found[state.process] = used
        return found

    def _rest(self, state: RunnerState) -> tuple[float, float] | None:
        """Return a runner's CPU seconds and when, if it has only waited since the last look."""
        before = self._cpu.get(state.process)
        if before is None or not state.rests:
            return None
        now = time.monotonic()
        try:
            used_s = cpu_seconds(state.process)
        except psutil.Error:  # it has ended
            return None
        return (used_s, now) if 0 <= used_s - before[0] <= WAKE_CPU_S else None

    def _ask_server(self, server: psutil.Process | None, counts: bool) -> None:
        """Ask what is loaded. Ollama may hold its lock: only its version tells that it hangs."""
        try:
            if counts:
                self.loaded = self.server_state.look_at_loaded(server, RUNNER_ASK_S)
            else:
                self.loaded = self.server_state.ask_loaded(server, RUNNER_ASK_S)
        except ServiceError:
            if server is None:
                self.loaded = []
            if self.server_state.answers():
                self.server_state.note_answer(server)
            else:
                self.server_state.note_silence(server, counts)

    def _find_runners(self) -> None:
        """Keep a state for each runner; one whose server has reaped it is forgotten."""
        now = time.monotonic()
        self._heed_ends(now)
        known = self.known_runners()
        self.held = self.matching.match(known, self.loaded, fresh=False)
        states = {}
        cpu = {}
        for runner, held in self.held.items():
            state = self._states.get(runner)
            if state is None:
                state = RunnerState(runner, now, self._stuck_s)
            state.model = held.name or state.model
            states[runner] = state
            if runner.process in self._cpu:
                cpu[runner.process] = self._cpu[runner.process]
        self._keep_totals(set(states))
        self._states = states
        self._cpu = cpu

    def _keep_totals(self, runners: set[Runner]) -> None:
        """Count what those have decoded that have gone in the middle of an answer.

        A runner's own total has that at the end of the answer only.
        """
        for state in self.states():
            if state.runner not in runners:
                model = state.model or "unknown"
                told: dict[str, float] = {"tokens": state.tokens}
                self.totals.note(state.runner, model, told)
        self.totals.keep(runners)

    def _heed_ends(self, now: float) -> None:
        """Begin every count anew where one has ended that stood: it may have held the GPU of all.

        What stood for that one has had no time of its own.
        """
        held_up = False
        for state in self.states():
            if state.stands and not alive(state.process):
                held_up = True
        if held_up:
            for state in self.states():
                state.count_anew(now)

    def _look_at_runners(
        self, states: typing.Collection[RunnerState], server: psutil.Process | None
    ) -> None:
        """Look at what costs nothing; ask a runner only where something may have changed."""

        def ask(seen: tuple[RunnerState, Look]) -> None:
            state, look = seen
            self._ask(state, look)
            time.sleep(SETTLE_S)
            with contextlib.suppress(psutil.Error):
                self._cpu_spent(state.process)  # what the asking took does not count

        looks = []
        for state in states:
            with contextlib.suppress(psutil.Error):  # it has ended: the next look forgets it
                look = self._glance(state, server)
                looks.append((state, look))
        due = [(state, look) for state, look in looks if look.due]
        in_parallel(ask, due)
        for state, look in looks:
            state.note(look)
            model = state.model or "unknown"
            told = look.totals or {"tokens": state.tokens}
            if look.due:
                self.totals.note(state.runner, model, told)

    def _look_at_callers(self, server: psutil.Process | None) -> None:
        """Look at who waits for Ollama, and whether anything works for him."""
        now = time.monotonic()
        tasks = sum(state.tasks for state in self.states())
        pid = server.pid if server else 0
        self.callers.look(now, pid, tasks)

    def _is_waited_for(self, process: psutil.Process) -> bool:
        """Tell whether a killed runner is not reaped by its server, or still holds memory."""
        seen = life(process)
        if not seen.dying:
            return False
        return seen.alive or unreaped(process, self.processes.server())

    def _glance(self, state: RunnerState, server: psutil.Process | None) -> Look:
        """Look at what a runner uses and how it stands, without asking it."""
        look = Look(time.monotonic())
        process = state.process
        look.cpu_s, look.passed_s = self._cpu_spent(process)
        state.memory_mb = memory_mb(process)
        if look.passed_s:
            state.cpu_percent = round(100 * look.cpu_s / look.passed_s, 1)
        look.active = state.under_way or look.cpu_s > WAKE_CPU_S
        seen = life(process)
        look.killed = seen.dying and seen.alive
        if server is None or seen.parent != server.pid:
            look.health = "orphan"
        elif seen.dying:
            look.health = "dead"
        else:
            idle_s = look.at - state.asked_at
            look.due = look.active or idle_s >= LONG_IDLE_S
        return look

    def _cpu_spent(self, process: psutil.Process) -> tuple[float, float]:
        """Return the CPU seconds since the last call, and the seconds that passed."""
        now = time.monotonic()
        used_s = cpu_seconds(process)
        before_s, at = self._cpu.get(process, (0.0, now))
        self._cpu[process] = used_s, now
        return used_s - before_s, now - at

    def _ask(self, state: RunnerState, look: Look) -> None:
        """Ask a runner's own port. An idle one is asked for its health only: /slots is logged."""
        port = state.runner.port
        state.asked_at = look.at
        # Until it listens there, the port may be another's: Ollama found it free, and let it go
        if state.loaded_at is None and not listens(state.process, port):
            look.health = "loading"
            return
        look.health = self.ollama.runner_health(port, RUNNER_ASK_S)
        look.on_gpu = self._is_on_gpu(state.model)
        if look.health != "ok" or not look.active:
            return
        look.main_cpu_s, look.main_wait_s = main_thread_s(state.process)
        try:
            look.slots = self.ollama.runner_slots(port, RUNNER_ASK_S)
            metrics = self.ollama.runner_metrics(port, RUNNER_ASK_S)
            look.totals = totals_of(metrics)
        except ServiceError:
            look.late = look.slots is None

    def _is_on_gpu(self, model: str | None) -> bool:
        """Tell whether a model lies wholly there; of an unknown one, whether all do."""
        lines = [line for line in self.loaded if line["name"] == model]
        lines = lines or self.loaded
        for line in lines:
            size = bytes_of(line, "size")
            vram = bytes_of(line, "size_vram")
            if not 0 < size <= vram:
                return False
        return bool(lines)


def bytes_of(model: Json, key: str) -> int:
    """Return a figure of a line of ``/api/ps``; 0 where it is none."""
    figure = model.get(key)
    return figure if isinstance(figure, int) else 0
