"""One clear: choose, unload, wait, end, measure, report."""

import contextlib
import logging
import time
import typing

import psutil

import gpu
from llm_service.matching import Held, version
from llm_service.processes import (
    Runner,
    alive,
    end,
    is_orphan,
    may_hold_model,
    memory_mb,
    unreaped,
    wait_until,
)
from llm_service.runner_state import is_working
from llm_service.sharing import in_parallel
from llm_service.watch import Watch
from ollama_client import Json, ServiceError, name_key

log = logging.getLogger("llm-service")
CLEAR_ASK_S = 0.4  # for each question of a clear
CLEAR_RUNNER_S = 0.2  # the same to a runner
UNLOAD_WAIT_S = 1.5
NAME_WAIT_S = 1.0  # for a line of /api/ps that tells what a runner is for
NAME_PAUSE_S = 0.1
KILL_WAIT_S = 0.9
VERIFY_WAIT_S = 0.6
KILL_RESERVE_S = 1.2  # of a clear's time, to end runners and to measure


class Steps(list):
    """The steps of a clear or reset, as they are answered."""

    def __init__(self, steps: typing.Iterable[Json] = ()):
        super().__init__(steps)
        self._began = time.monotonic()  # of the step under way

    def note(self, step: str, ok: bool, done: str, failed: str = "") -> None:
        """Note how a step went that has just ended."""
        now = time.monotonic()
        seconds = round(now - self._began, 3)
        detail = done if ok else failed
        self.append(
            {
                "step": step,
                "ok": ok,
                "seconds": seconds,
                "detail": detail,
            }
        )
        self._began = now


class Clearing:
    """One clear: choose, unload, wait, end, measure, report."""

    def __init__(
        self,
        watch: Watch,
        model: str | None,
        force: bool,
        deadline: float,
        only: Runner | None = None,
    ):
        """Choose all, a model, or ``only`` one runner, which holds ``model``."""
        self.steps = Steps()
        self._watch, self._matching = watch, watch.matching
        self._ollama, self._store = watch.ollama, watch.store
        self._processes = watch.processes
        self._model = model
        self._force = force
        self._deadline = deadline
        self._there = watch.known_runners()
        self._before = used_mb(self._there)
        children = self._processes.unknown_children()
        self._strangers = list(filter(may_hold_model, children))
        # To be ended; to be unloaded; what may hold the memory, too, and is not ours to end
        self._mine: list[Runner] = []
        self._asked: list[Json] = []
        self._spared: list[Runner] = []
        self._choose(only)
        self._agreed: list[Json] = []  # lines that Ollama has agreed to unload
        self._killed: dict[Runner, str] = {}  # and why
        self._ghosts: list[Runner] = []  # dead ones whose end Ollama waits for
        self.report: Json = {}

    def run(self) -> None:
        """Do it; the report tells how it went."""
        self._agreed = self._unload()
        if self._asked:
            names = ", ".join(line["name"] for line in self._asked)
            self.steps.note("unload", bool(self._agreed), names, names)
        if self._agreed:
            until = min(time.monotonic() + UNLOAD_WAIT_S, self._deadline - KILL_RESERVE_S)
            gone = wait_until(lambda: not living(self._mine + self._spared), until)
            self.steps.note("wait", gone, "all gone", "busy or hung ones stay")
        self._end_runners()
        self.report = self._report()

    def serves(self, runners: list[Runner]) -> bool:
        """Tell whether all of these were there when it began, or are gone."""
        return not living([runner for runner in runners if runner not in self._there])

    # Choosing

    def _choose(self, only: Runner | None) -> None:
        error = self._look()
        if only:
            self._mine = [only]
            self._asked = [line for line in [self._held_by(only).line] if line]
        elif self._model:
            # While a runner loads, it may be for one or another model of the same weights.
            until = min(time.monotonic() + NAME_WAIT_S, self._deadline - 2 * KILL_RESERVE_S)
            while not self._choose_model(self._model) and time.monotonic() < until and not error:
                time.sleep(NAME_PAUSE_S)
                error = self._look()
        else:
            self._mine = self._there
            self._asked = self._loaded
            self._spared = self._strangers
        self.steps.note("list", not error, f"{len(self._loaded)} loaded", error)

    def _look(self) -> str:
        """Ask what is loaded, and match it to what was there; return why Ollama does not tell."""
        error = ""
        self._loaded: list[Json] = []
        try:
            self._loaded = self._ollama.ps(CLEAR_ASK_S)
        except ServiceError as e:
            error = str(e)
        self._held = self._matching.match([*self._there, *self._strangers], self._loaded)
        return error

    def _choose_model(self, model: str) -> bool:
        """Leave all other models alone; tell whether each runner is known to hold it or not."""
        versions = self._matching.versions(model, self._loaded)
        self._asked = [line for line in self._loaded if version(line) in versions]
        server = self._processes.server()
        self._mine = []
        self._spared = []
        for runner, held in self._held.items():
            ours = runner in self._there
            unused = ours and is_orphan(runner.process, server)  # nobody's answer comes from it
            if ours and held.is_one_of(versions):
                self._mine.append(runner)
            elif held.may_be_one_of(versions):
                (self._mine if unused else self._spared).append(runner)
        return not self._spared

    def _held_by(self, runner: Runner) -> Held:
        return self._held.get(runner) or Held(None, None, frozenset())

    def _name(self, runner: Runner) -> str | None:
        """Return the model of a runner; None where nobody knows."""
        return self._held_by(runner).name or (self._model if runner in self._mine else None)

    # Unloading and ending

    def _unload(self) -> list[Json]:
        """Ask for all at once; return the lines that Ollama has agreed to unload."""

        def ask(line: Json) -> bool:
            holders = [each for each, held in self._held.items() if held.line is line]
            return self._matching.unload(line, next(iter(holders), None))

        agreed = in_parallel(ask, self._asked)
        return [line for line, yes in zip(self._asked, agreed, strict=True) if yes]

    def _end_runners(self) -> None:
        """End by SIGKILL what is left and due."""
        in_parallel(self._end_if_due, living(self._mine))
        if not self._killed:
            return
        until = min(time.monotonic() + KILL_WAIT_S, self._deadline)
        wait_until(lambda: not living(self._killed), until)
        self.steps.note("end_runners", True, f"{len(self._killed)} ended")
        self._unload()  # Ollama lists a busy one that was killed until it is asked

    def _end_if_due(self, runner: Runner) -> None:
        """End it; without ``force`` only if it is idle and Ollama, which had it, lets it go.

        Ollama takes one after another. On a GPU it waits up to 5 s for the memory of each.
        """
        reason = self._reason_to_end(runner)
        agreed = self._held_by(runner).line in self._agreed
        if not self._force and (reason != "idle" or not agreed):
            return
        self._killed[runner] = reason
        end(runner.process)
        level = logging.INFO if reason == "idle" else logging.ERROR
        name = self._name(runner)
        log.log(level, "ending runner %d of %s: %s", runner.process.pid, name, reason)

    def _reason_to_end(self, runner: Runner) -> str:
        """Tell what a runner is that is still there: "orphan", "hung", "busy" or "idle"."""
        with contextlib.suppress(psutil.Error):
            if is_orphan(runner.process, self._processes.server()):
                return "orphan"
        silent = self._ollama.runner_health(runner.port, CLEAR_RUNNER_S) == "silent"
        if silent or self._watch.is_stuck(runner):
            return "hung"
        return "busy" if self._is_busy(runner) else "idle"

    def _is_busy(self, runner: Runner) -> bool:
        """Tell whether something is under way in a runner, also where that cannot be told."""
        try:
            slots = self._ollama.runner_slots(runner.port, CLEAR_RUNNER_S)
        except ServiceError:
            return True
        return slots is None or is_working(slots)

    # Reporting

    def _report(self) -> Json:
        wait_until(self._is_let_go, min(time.monotonic() + VERIFY_WAIT_S, self._deadline))
        left = living(self._mine)
        unknown = living(self._spared)
        stay = left + self._ghosts + unknown
        self.steps.note("verify", not stay, "gone", "still there")
        kept = by_key(map(self._name, stay))
        names = by_key([*map(self._name, self._mine), *(line["name"] for line in self._asked)])
        nameless = [f"process {each.process.pid}" for each in stay if not self._name(each)]
        return {
            "unloaded_models": sorted(names[key] for key in names.keys() - kept.keys()),
            "killed": [
                {"pid": runner.process.pid, "model": self._name(runner), "reason": reason}
                for runner, reason in self._killed.items()
            ],
            "left": sorted(kept.values()) + nameless,
            "new_runners": [
                {"pid": runner.process.pid, "model": held.name}
                for runner, held in self._new_runners().items()
            ],
            "memory": self._memory(),
            "verified": not stay,
            "survived": bool(left),
            "unknown_processes": [each.process.pid for each in unknown],
            "managed": True,
            "steps": self.steps,
        }

    def _is_let_go(self) -> bool:
        """Note the ghosts; tell whether there are none, and Ollama lists only what is left.

        A model that is listed without a runner holds nothing: its turn to be unloaded has not
        come. Nor does an Ollama that does not answer.
        """
        self._ghosts = []
        if not self._watch.server_state.answers():
            return True
        server = self._processes.server()
        dead = [runner for runner in self._mine if not alive(runner.process)]
        self._ghosts = [runner for runner in dead if unreaped(runner.process, server)]
        with contextlib.suppress(ServiceError):
            self._loaded = self._ollama.ps(CLEAR_ASK_S)
        stay = map(self._held_by, living(self._mine + self._spared))
        lines = [held.line for held in [*self._new_runners().values(), *stay] if held.line]
        listed = set(map(version, self._asked)).intersection(map(version, self._loaded))
        return not self._ghosts and listed <= set(map(version, lines))

    def _new_runners(self) -> dict[Runner, Held]:
        """Return the runners that other callers have started since."""
        now = self._processes.runners()
        held = self._matching.match(now, self._loaded)
        return {runner: held[runner] for runner in held if runner not in self._there}

    def _memory(self) -> Json:
        """Measure what came free."""
        if gpu.sample()["memory_shared"]:
            self._store.drop_page_cache()
        source, before_mb = self._before
        _, after_mb = used_mb(self._there)
        freed_mb = max(0, before_mb - after_mb)
        return {
            "source": source,
            "before_mb": before_mb,
            "after_mb": after_mb,
            "freed_mb": freed_mb,
        }


def by_key(names: typing.Iterable[str | None]) -> dict[str, str]:
    """Return those names that are known, by their keys."""
    return {name_key(name): name for name in names if name}


def living(runners: typing.Iterable[Runner]) -> list[Runner]:
    """Return those that live."""
    return [runner for runner in runners if alive(runner.process)]


def used_mb(runners: list[Runner]) -> tuple[str, int]:
    """Measure where the models lie: the source and the MB in use.

    Where the GPU does not tell, it is what the runners hold: the machine's figure moves by
    itself.
    """
    source, used = gpu.memory_in_use(gpu.sample())
    if used is None:
        used = sum(memory_mb(runner.process) for runner in runners)
    return source, used


def clear_message(report: Json) -> str:
    """Say in a sentence what a clear did."""
    unloaded, killed, left = report["unloaded_models"], report["killed"], report["left"]
    if not unloaded and not killed and not left:
        return "Cache cleared: nothing was loaded."
    done = f"{len(unloaded)} unloaded, {report['memory']['freed_mb']} MB came free"
    if killed:
        done += f", {len(killed)} runner(s) ended"
    if left:
        done += f", still busy: {', '.join(left)}"
    return f"Cache cleared: {done}."


def clear_failure(report: Json) -> ServiceError:
    """Make the 503 of a clear that did not free all."""
    if report["survived"]:
        words = "A runner does not end, not even by SIGKILL: reboot the host."
        return ServiceError("runner_survived", words, recommended_action="reboot_host", **report)
    if report["unknown_processes"]:
        words = (
            f"Process {report['unknown_processes'][0]} may hold that memory, and Ollama does not "
            "say what it is for: if it is not just loading, POST /api/session/reset."
        )
        return ServiceError("runner_unknown", words, recommended_action="reset_session", **report)
    words = "Ollama goes on listing a runner that is dead: POST /api/session/reset."
    return ServiceError("runner_ghost", words, recommended_action="reset_session", **report)
