"""One clear: choose, unload, wait, end, measure, report."""

import contextlib
import logging
import time
import typing

import psutil

import gpu
from llm_service.answers import slot_counters
from llm_service.matching import Held, version
from llm_service.processes import (
    Runner,
    alive,
    end,
    is_orphan,
    listens,
    may_hold_model,
    memory_mb,
    unreaped,
    wait_until,
)
from llm_service.reports import Steps
from llm_service.runner_state import is_working
from llm_service.sharing import in_parallel
from llm_service.watch import Watch
from ollama_client import Json, ServiceError, name_key

log = logging.getLogger("llm-service")
CLEAR_ASK_S = 0.4  # for each question of a clear
CLEAR_RUNNER_S = 0.2  # the same to a runner
# For each question to Ollama without ``force``, as then nothing is ended in its place: while it
# ends another runner, its list and its unloads wait.
PATIENT_ASK_S = 1.5
UNLOAD_WAIT_S = 1.5
NAME_WAIT_S = 1.0  # for a line of /api/ps that tells what a runner is for
NAME_PAUSE_S = 0.1
KILL_WAIT_S = 0.9
VERIFY_WAIT_S = 0.6
LET_GO_PAUSE_S = 0.02
KILL_RESERVE_S = 1.2  # of a clear's time, to end runners and to measure
REPORT_RESERVE_S = 1.0  # the same, to verify and to measure
NOTHING_KNOWN = Held(None, None, frozenset())


class Clearing:
    """One clear: choose, unload, wait, end, measure, report."""

    def __init__(
        self,
        watch: Watch,
        model: str | None,
        force: bool,
        deadline: float,
    ):
        """Choose all models or one; nothing is done yet."""
        self.steps = Steps()
        self.report: Json = {}
        self._watch = watch
        self._matching = watch.matching
        self._ollama = watch.ollama
        self._processes = watch.processes
        self._model = model
        self._force = force
        self._deadline = deadline
        self._there = watch.known_runners()
        self._before = used_mb(self._there)
        children = self._processes.unknown_children()
        self._strangers = list(filter(may_hold_model, children))
        self._loaded: list[Json] = []  # the lines of /api/ps
        self._held: dict[Runner, Held] = {}
        self._mine: list[Runner] = []  # to be ended
        self._asked: list[Json] = []  # lines that Ollama is asked to unload
        self._spared: list[Runner] = []  # what may hold the memory and is not ours to end
        self._choose()
        self._agreed: list[Json] = []  # lines that Ollama has agreed to unload
        self._killed: dict[Runner, str] = {}  # and why
        self._work: dict[Runner, list] = {}  # what each was at last before it was asked to go
        self._ghosts: list[Runner] = []  # dead ones whose end Ollama waits for

    def run(self) -> None:
        """Do it; the report tells how it went."""
        if not self._force:
            in_parallel(self._note_work, living(self._mine))
        self._agreed = self._unload()
        if self._asked:
            names = ", ".join(line["name"] for line in self._asked)
            self.steps.note("unload", bool(self._agreed), names, names)
        if self._agreed:
            self._wait()
        self._end_runners()
        until = self._until(VERIFY_WAIT_S)
        while not self._is_let_go() and time.monotonic() < until:
            time.sleep(LET_GO_PAUSE_S)
        self.report = self._report()

    def look_again(self, until: float) -> Json:
        """Return the report as it is by now; wait until then for what was told to end."""
        wait_until(lambda: not living(self._killed), until)
        self._ghosts = self._find_ghosts()
        self.report = {**self.report, **self._outcome()}
        return self.report

    def serves(self, runners: list[Runner]) -> bool:
        """Tell whether all of these were there when it began, or are gone."""
        others = [runner for runner in runners if runner not in self._there]
        return not living(others)

    def _until(self, seconds: float, reserve_s: float = 0) -> float:
        """Return until when a step may wait, with so much of the clear's time left for others."""
        until = time.monotonic() + seconds
        latest = self._deadline - reserve_s
        return min(until, latest)

    def _patience_s(self) -> float:
        """Return for how long a question to Ollama may wait."""
        if self._force:
            return CLEAR_ASK_S
        left_s = self._until(PATIENT_ASK_S, KILL_RESERVE_S) - time.monotonic()
        return max(CLEAR_ASK_S, left_s)

    def _holders(self) -> list[Runner]:
        """Return what lives and may hold the memory, ours to end or not."""
        return living(self._mine + self._spared)

    # Choosing

    def _choose(self) -> None:
        """Choose what to ask Ollama for, and the runners that may have to be ended."""
        error = self._look()
        if self._model is None:
            self._mine = self._there
            self._asked = self._loaded
            self._spared = self._strangers
        else:
            # While a runner loads, it may be for one or another model of the same weights.
            until = self._until(NAME_WAIT_S, 2 * KILL_RESERVE_S)
            self._choose_model(self._model)
            while self._spared and not error and time.monotonic() < until:
                time.sleep(NAME_PAUSE_S)
                error = self._look()
                self._choose_model(self._model)
        self.steps.note("list", not error, f"{len(self._loaded)} loaded", error)

    def _look(self) -> str:
        """Ask what is loaded, and match it to what was there; return why Ollama does not tell."""
        error = ""
        self._loaded = []
        try:
            self._loaded = self._ollama.ps(self._patience_s())
        except ServiceError as e:
            error = str(e)
        there = self._there + self._strangers
        self._held = self._matching.match(there, self._loaded)
        return error

    def _choose_model(self, model: str) -> None:
        """Leave all other models alone."""
        versions = self._matching.versions(model, self._loaded)
        server = self._processes.server()
        self._asked = [line for line in self._loaded if version(line) in versions]
        self._mine = []
        self._spared = []
        for runner, held in self._held.items():
            if not held.may_be_one_of(versions):
                continue
            # An orphan that may be one of two models: nobody's answer comes from it.
            sure = held.is_one_of(versions) or is_orphan(runner.process, server)
            if sure and runner in self._there:
                self._mine.append(runner)
            else:
                self._spared.append(runner)

    def _held_by(self, runner: Runner) -> Held:
        """Return what is known of the model of a runner."""
        return self._held.get(runner, NOTHING_KNOWN)

    def _name(self, runner: Runner) -> str | None:
        """Return the model of a runner; None where nobody knows."""
        name = self._held_by(runner).name
        if name is None and runner in self._mine:
            name = self._model
        return name

    # Unloading and ending

    def _unload(self) -> list[Json]:
        """Ask for all at once; return the lines that Ollama has agreed to unload."""

        def ask(line: Json) -> list[Json]:
            holder = None
            for runner, held in self._held.items():
                if held.line is line:
                    holder = runner
            agreed = self._matching.unload(line, holder, self._patience_s())
            return [line] if agreed else []

        agreed = []
        for lines in in_parallel(ask, self._asked):
            agreed += lines
        return agreed

    def _wait(self) -> None:
        """Give Ollama time to end them."""
        until = self._until(UNLOAD_WAIT_S, KILL_RESERVE_S)
        gone = wait_until(lambda: not self._holders(), until)
        self.steps.note("wait", gone, "all gone", "busy or hung ones stay")

    def _end_runners(self) -> None:
        """End by SIGKILL what is left and due."""
        in_parallel(self._end_if_due, living(self._mine))
        if not self._killed:
            return
        # A large one takes seconds: as long as there is time, as a failure restarts all
        until = max(self._until(KILL_WAIT_S), self._deadline - REPORT_RESERVE_S)
        ended = wait_until(lambda: not living(self._killed), until)
        count = len(self._killed)
        self.steps.note("end_runners", ended, f"{count} ended", f"{count} told to end")
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
        pid = runner.process.pid
        name = self._name(runner)
        log.log(level, "ending runner %d of %s: %s", pid, name, reason)

    def _reason_to_end(self, runner: Runner) -> str:
        """Tell what a runner is that is still there: "orphan", "hung", "busy" or "idle"."""
        with contextlib.suppress(psutil.Error):
            server = self._processes.server()
            if is_orphan(runner.process, server):
                return "orphan"
        if not listens(runner.process, runner.port):
            return "busy"  # it loads, and its port may be another's
        health = self._ollama.runner_health(runner.port, CLEAR_RUNNER_S)
        if health == "silent" or self._watch.is_stuck(runner):
            return "hung"
        return "busy" if self._is_busy(runner) else "idle"

    def _slots(self, runner: Runner) -> list[Json] | None:
        """Return a runner's slots; None where it does not tell."""
        try:
            return self._ollama.runner_slots(runner.port, CLEAR_RUNNER_S)
        except ServiceError:
            return None

    def _note_work(self, runner: Runner) -> None:
        """Note what a runner was at last, by which it shows that it has been asked since."""
        slots = self._slots(runner)
        if slots:
            self._work[runner] = work_of(slots)

    def _is_busy(self, runner: Runner) -> bool:
        """Tell whether something is under way in a runner, also where that cannot be told.

        Without ``force`` so is one that has been asked since the clear began: while it is looked
        at, the next request of its callers may be on its way.
        """
        slots = self._slots(runner)
        if slots is None or is_working(slots):
            return True
        if self._force:
            return False
        known = self._work.get(runner)
        return work_of(slots) != known

    # Reporting

    def _report(self) -> Json:
        """Tell what is gone, what was ended and what is left."""
        if self._ghosts:  # Ollama may have been slow to list what it has
            self._ghosts = self._find_ghosts()
        left = living(self._mine)
        unknown = living(self._spared)
        stay = left + self._ghosts + unknown
        self.steps.note("verify", not stay, "gone", "still there")
        names = by_key(map(self._name, self._mine))
        names |= by_key(line["name"] for line in self._asked)
        kept = by_key(map(self._name, stay))
        gone = names.keys() - kept.keys()
        nameless = []
        for runner in stay:
            if self._name(runner) is None:
                nameless.append(f"process {runner.process.pid}")
        return {
            "unloaded_models": sorted(names[key] for key in gone),
            "killed": self._tell_killed(),
            "left": sorted(kept.values()) + nameless,
            "new_runners": self._tell_new_runners(),
            "memory": self._memory(),
            **self._outcome(),
            "managed": True,
            "steps": self.steps,
        }

    def _outcome(self) -> Json:
        """Tell whether all is gone, and what is not."""
        left = living(self._mine)
        unknown = living(self._spared)
        return {
            "verified": not (left or unknown or self._ghosts),
            "survived": any(map(self._watch.survives, left)),
            "ending": bool(left),
            "unknown_processes": [runner.process.pid for runner in unknown],
        }

    def _tell_killed(self) -> list[Json]:
        """Return the runners that were ended, and why."""
        told = []
        for runner, reason in self._killed.items():
            entry = {
                "pid": runner.process.pid,
                "model": self._name(runner),
                "reason": reason,
            }
            told.append(entry)
        return told

    def _tell_new_runners(self) -> list[Json]:
        """Return the runners that other callers have started since, and their models."""
        told = []
        for runner, held in self._new_runners().items():
            entry = {
                "pid": runner.process.pid,
                "model": held.name,
            }
            told.append(entry)
        return told

    def _is_let_go(self) -> bool:
        """Note the ghosts; tell whether there are none, and Ollama lists only what is left.

        A model that is listed without a runner holds nothing: its turn to be unloaded has not
        come. Nor does an Ollama that does not answer.
        """
        self._ghosts = []
        if not self._watch.server_state.answers():
            return True
        self._ghosts = self._find_ghosts()
        with contextlib.suppress(ServiceError):
            self._loaded = self._ollama.ps(CLEAR_ASK_S)
        listed = set(map(version, self._loaded))
        listed.intersection_update(map(version, self._asked))
        still_held = list(map(self._held_by, self._holders()))
        still_held += self._new_runners().values()
        for held in still_held:
            if held.line:
                listed.discard(version(held.line))
        return not self._ghosts and not listed

    def _find_ghosts(self) -> list[Runner]:
        """Return the dead runners whose end Ollama waits for."""
        server = self._processes.server()
        found = []
        for runner in self._mine:
            if not alive(runner.process) and unreaped(runner.process, server):
                found.append(runner)
        return found

    def _new_runners(self) -> dict[Runner, Held]:
        """Return the runners that other callers have started since."""
        runners = self._processes.runners()
        matched = self._matching.match(runners, self._loaded)
        found = {}
        for runner, held in matched.items():
            if runner not in self._there:
                found[runner] = held
        return found

    def _memory(self) -> Json:
        """Measure what came free."""
        if gpu.sample()["memory_shared"]:
            self._watch.store.drop_page_cache()
        source, before_mb = self._before
        _, after_mb = used_mb(self._there)
        freed_mb = max(0, before_mb - after_mb)
        return {
            "source": source,
            "before_mb": before_mb,
            "after_mb": after_mb,
            "freed_mb": freed_mb,
        }


def work_of(slots: list[Json]) -> list[tuple]:
    """Return what a runner is at, or was at last, by its slots."""
    return list(map(slot_counters, slots))


def by_key(names: typing.Iterable[str | None]) -> dict[str, str]:
    """Return those names that are known, by their keys."""
    found = {}
    for name in names:
        if name:
            found[name_key(name)] = name
    return found


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
