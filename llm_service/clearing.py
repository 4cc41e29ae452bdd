"""One clear: choose, unload, wait, end, measure, report."""

import contextlib
import logging
import time
import typing

import psutil

import gpu
from llm_service.processes import Runner, alive, end, is_orphan, memory_mb, unreaped, wait_until
from llm_service.runner_state import is_working
from llm_service.sharing import in_parallel
from llm_service.watch import Watch, model_names
from ollama_client import Json, Ollama, ServiceError, name_key

log = logging.getLogger("llm-service")
CLEAR_ASK_S = 0.4  # for each question of a clear
CLEAR_RUNNER_S = 0.2  # the same to a runner
UNLOAD_WAIT_S = 1.5
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
        """Choose all, a model, or of a model's runners ``only`` one."""
        self.steps = Steps()
        self._watch = watch
        self._ollama, self._store = watch.ollama, watch.store
        self._processes = watch.processes
        self._force = force
        self._deadline = deadline
        self._there = self._watch.known_runners()
        self._before = used_mb(self._there)
        loaded = self._list()
        # The runners, with their models' names
        self._mine = model_names(self._there, loaded, self._store.models())
        self._asked = [each["name"] for each in loaded]  # what Ollama is asked to unload
        self._listed = keys_of(self._asked)
        if model:
            self._choose(model)
        if only:  # a name that was updated since is another runner's
            self._asked = self._asked if model and only in self._mine else []
            self._mine = {only: model}
        names = list(filter(None, self._mine.values()))
        names += self._asked
        self._names = {name_key(name): name for name in names}
        self._unloading: set[str] = set()  # keys of what Ollama has agreed to unload
        self._killed: dict[Runner, str] = {}  # and why
        self._ghosts: list[Runner] = []  # dead ones whose end Ollama waits for

    def run(self) -> Json:
        """Do it; return the report."""
        self._unloading = unload(self._ollama, self._asked)
        if self._asked:
            names = ", ".join(self._asked)
            self.steps.note("unload", bool(self._unloading), names, names)
        if self._unloading:
            until = min(time.monotonic() + UNLOAD_WAIT_S, self._deadline - KILL_RESERVE_S)
            gone = wait_until(lambda: not self._left(), until)
            self.steps.note("wait", gone, "all gone", "busy or hung ones stay")
        self._end_runners()
        return self._report()

    def _list(self) -> list[Json]:
        try:
            loaded = self._ollama.ps(CLEAR_ASK_S)
        except ServiceError as e:
            self.steps.note("list", False, "", str(e))
            return []
        self.steps.note("list", True, f"{len(loaded)} loaded")
        return loaded

    def _choose(self, model: str) -> None:
        """Leave all other models alone. A runner may serve several names of one blob."""
        key = name_key(model)
        digests = self._store.models().get(key, [])  # it may have been deleted meanwhile
        self._asked = [name for name in self._asked if name_key(name) == key]
        mine = [
            runner
            for runner, name in self._mine.items()
            if runner.digest in digests or (name and name_key(name) == key)
        ]
        if mine and not self._asked:
            self._asked = [model]
        self._mine = {runner: self._asked[0] for runner in mine}

    def _left(self) -> list[Runner]:
        return [runner for runner in self._mine if alive(runner.process)]

    def _end_runners(self) -> None:
        """End by SIGKILL what is left and due."""
        in_parallel(self._end_if_due, self._left())
        if not self._killed:
            return
        until = min(time.monotonic() + KILL_WAIT_S, self._deadline)
        wait_until(lambda: not any(alive(each.process) for each in self._killed), until)
        self.steps.note("end_runners", True, f"{len(self._killed)} ended")
        # Ollama lists a busy one that was killed until it is asked
        unload(self._ollama, self._asked)

    def _end_if_due(self, runner: Runner) -> None:
        """End it; without ``force`` only if it is idle and Ollama, which had it, lets it go.

        Ollama takes one after another. On a GPU it waits up to 5 s for the memory of each.
        """
        name = self._mine[runner]
        reason = self._reason_to_end(runner)
        agreed = keys_of([name]) & self._listed & self._unloading
        if not self._force and (reason != "idle" or not agreed):
            return
        self._killed[runner] = reason
        end(runner.process)
        level = logging.INFO if reason == "idle" else logging.ERROR
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

    def _report(self) -> Json:
        wait_until(self._is_let_go, min(time.monotonic() + VERIFY_WAIT_S, self._deadline))
        left = self._left()
        held = left + self._ghosts
        self.steps.note("verify", not held, "gone", "still there")
        stay = keys_of(map(self._mine.get, held))
        gone = self._names.keys() - stay
        unknown = [f"process {each.process.pid}" for each in held if not self._mine[each]]
        return {
            "unloaded_models": sorted(self._names[key] for key in gone),
            "killed": [
                {"pid": runner.process.pid, "model": self._mine[runner], "reason": reason}
                for runner, reason in self._killed.items()
            ],
            "left": sorted(self._names[key] for key in stay) + unknown,
            "new_runners": [
                {"pid": runner.process.pid, "model": name}
                for runner, name in self._new_runners().items()
            ],
            "memory": self._memory(),
            "verified": not held,
            "survived": bool(left),
            "managed": True,
            "steps": self.steps,
        }

    def _new_runners(self) -> dict[Runner, str | None]:
        """Return the runners that other callers have started since, with their models."""
        new = [runner for runner in self._processes.runners() if runner not in self._there]
        return model_names(new, [], self._store.models())

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
        listed: set[str] = set()
        with contextlib.suppress(ServiceError):
            listed = keys_of(each["name"] for each in self._ollama.ps(CLEAR_ASK_S))
        listed -= keys_of(self._new_runners().values())
        listed -= keys_of(map(self._mine.get, self._left()))
        return not self._ghosts and not listed.intersection(self._names)

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


def keys_of(names: typing.Iterable[str | None]) -> set[str]:
    """Return the keys of those names that are known."""
    return {name_key(name) for name in names if name}


def used_mb(runners: list[Runner]) -> tuple[str, int]:
    """Measure where the models lie: the source and the MB in use.

    Where the GPU does not tell, it is what the runners hold: the machine's figure moves by
    itself.
    """
    source, used = gpu.memory_in_use(gpu.sample())
    if used is None:
        used = sum(memory_mb(runner.process) for runner in runners)
    return source, used


def unload(ollama: Ollama, names: list[str]) -> set[str]:
    """Ask for all of them at once; return the keys of those that Ollama took."""

    def ask(name: str) -> str | None:
        try:
            ollama.unload(name, CLEAR_ASK_S)
            return name
        except ServiceError as e:
            log.warning("unload %s: %s", name, e)
            return None

    return keys_of(in_parallel(ask, names))


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
    words = "Ollama goes on listing a runner that is dead: POST /api/session/reset."
    return ServiceError("runner_ghost", words, recommended_action="reset_session", **report)
