"""What is healed and how often; the lanes of clear, reset and healing; loads."""

import collections
import logging
import threading
import time
import typing

import psutil

import gpu
from llm_service.clearing import (
    Clearing,
    Steps,
    clear_failure,
    clear_message,
    used_mb,
)
from llm_service.downloads import Downloads
from llm_service.matching import ListCleaner
from llm_service.processes import MB, Runner, wait_until
from llm_service.runner_state import RunnerState
from llm_service.sharing import Outcome, SharedRun
from llm_service.watch import HUNG_LOOKS, STARTING_S, Watch
from ollama_client import Json, ServiceError, name_key, timestamp

log = logging.getLogger("llm-service")
CLEAR_S = 3.7
RESET_S = 3.9
SHARE_S = 0.4  # a run may end that much late, and who shares it waits for that
HEALINGS = 3  # of one model in HEALINGS_S, then it is left alone
HEALINGS_S = 1800


class Healing:
    """Clear and reset, one run at a time; who comes meanwhile shares what fits."""

    def __init__(self, watch: Watch, downloads: Downloads, default_model: str, self_heal: bool):
        self._watch, self._downloads = watch, downloads
        self._ollama, self._store, self._processes = watch.ollama, watch.store, watch.processes
        self._default_model = default_model
        self.self_heal = self_heal
        self.healed: Json = {"runners": 0, "ollama": 0, "last": None}
        self._healings: dict[str | None, list[float]] = collections.defaultdict(list)
        self._cleaner = ListCleaner(watch.matching, self._processes)
        self.load: Json | None = None  # the last background load: model, state, error
        self.clears_done = 0
        self.resets_done = 0
        self._clears = SharedRun(clear_suits)
        self._resets = SharedRun(reset_suits)
        self._reset_began: float | None = None  # of the reset under way
        self._restarted_at = 0.0

    def clear(self, model: str | None = None, force: bool = True) -> Json:
        """Unload all models or one; with ``force`` end the runners left. Returns the report."""
        report = self._clear(model, force, time.monotonic() + CLEAR_S)
        if force and not report["verified"]:
            raise clear_failure(report)
        return {"status": "success", "message": clear_message(report), **report}

    def reset(self, model: str | None = None, restart: bool = False) -> Json:
        """Clear all, restart Ollama where it must be, load the model that is due."""
        came = time.monotonic()
        key = (model and name_key(model), restart)
        self._store.require(model)
        return self._resets.get(
            lambda: self._reset(model, restart, came),
            RESET_S + SHARE_S,
            key,
            came,
        )

    def recover(self) -> Json:
        """Clear what is idle; answer as the service that this one replaces does."""
        report = self.clear(force=False)
        memory = report["memory"]
        total_mb = gpu.memory_totals(gpu.sample())[1]
        free_mb = psutil.virtual_memory().available // MB
        return {
            "status": "recovered",
            "freed_mb": memory["freed_mb"],
            "free_mb": total_mb - memory["after_mb"] if total_mb else free_mb,
            "unloaded_models": report["unloaded_models"],
            "can_retry": not report["left"],
        }

    def end_runner(self, runner: Runner, model: str | None) -> int:
        """End one runner, and only that one; return the MB that came free."""
        with self._clears.turn(CLEAR_S):
            deadline = time.monotonic() + CLEAR_S
            clearing = Clearing(self._watch, model, True, deadline, only=runner)
            clearing.run()
            self._watch.look()
        return clearing.report["memory"]["freed_mb"]

    def restart_server(self) -> int:
        """End a server that hangs or has a ghost; return the MB that came free."""
        with self._resets.turn(RESET_S), self._clears.turn(RESET_S):
            runners = self._watch.known_runners()
            _, before_mb = used_mb(runners)
            self._restart(Steps(), time.monotonic() + RESET_S, grace_s=0)
            _, after_mb = used_mb(runners)
            self._watch.look()
        return max(0, before_mb - after_mb)

    def _clear(self, model: str | None, force: bool, deadline: float) -> Json:
        self._store.require(model)

        def work() -> Clearing:
            self.clears_done += 1
            clearing = Clearing(self._watch, model, force, deadline)
            clearing.run()
            if not self._reset_began:  # a reset looks at its end
                self._watch.look(deadline)
            return clearing

        key = (model and name_key(model), force)
        at = self._reset_began or time.monotonic()  # during a reset its clear will do
        came = Arrival(at, self._watch.known_runners())
        limit_s = deadline - time.monotonic() + SHARE_S
        return self._clears.get(work, limit_s, key, came).report

    def _reset(self, model: str | None, restart: bool, came: float) -> Json:
        self._reset_began = came
        try:
            cleared = self._clear(None, True, came + CLEAR_S - 1)
            steps = Steps(cleared["steps"])
            self._restart_if_due(cleared["verified"], restart, came, steps)
            self._watch.look(came + RESET_S + SHARE_S)
        finally:
            self._reset_began = None
        due = self._model_due(model, cleared["unloaded_models"])
        state = self._load(due, came + RESET_S) if due else "none"
        said = (
            f"{due} is {state}"
            if due
            else f"no model to load ({self._default_model} is not downloaded)"
        )
        steps.note("load", True, said)
        self.resets_done += 1
        return {
            "status": "success",
            "message": f"Session reset, {said}.",
            "steps": steps,
            "model": due,
            "model_state": state,
            "memory": cleared["memory"],
            "managed": True,
        }

    def _restart_if_due(self, verified: bool, restart: bool, came: float, steps: Steps) -> None:
        """Restart a server that hangs, has a ghost, or shall be restarted."""
        server = self._processes.server()
        if server and self._watch.server_state.starting(server):
            steps.note("start_ollama", True, "it is starting")
            return
        answers = self._watch.server_state.answers()
        steps.note("ask_ollama", answers, "answers", "does not answer")
        healthy = answers and verified
        if healthy and (not restart or self._restarted_at > came):
            return
        deadline = came + RESET_S
        grace_s = 0.0
        if healthy:  # with time left for the next server
            grace_s = min(1, deadline - time.monotonic() - 0.5)
        if not self._restart(steps, deadline, grace_s) and server:
            raise ServiceError(
                "restart_incomplete",
                "Ollama was ended, and the new one has not answered yet: ask /health, which says "
                "when it does.",
                recommended_action="wait",
                steps=steps,
            )

    def _restart(self, steps: Steps, deadline: float, grace_s: float) -> bool:
        """End the server, heed SIGTERM or not, and wait for the launcher's new one."""
        self._downloads.reconnect()  # while Ollama still keeps their parts
        ended = self._processes.end_server(grace_s)
        steps.note("end_ollama", ended, "ended", "it does not end")
        answers = wait_until(self._watch.server_state.answers, deadline)
        steps.note("start_ollama", answers, "answers", "being started by the launcher")
        self._restarted_at = time.monotonic()
        return answers

    def _load(self, model: str, deadline: float) -> str:
        """Load in the background; return how it stands at the deadline, or after a moment."""
        load = self.load = {"model": model, "state": "loading", "error": None}

        def work() -> None:
            wait_until(self._watch.server_state.answers, time.monotonic() + STARTING_S)
            try:
                if self.load is load:  # else a later reset has taken over
                    self._ollama.load(model)
                load["state"] = "loaded"
            except ServiceError as e:
                log.error("load %s: %s", model, e)
                load.update(state="failed", error=str(e))

        loader = threading.Thread(target=work, name=f"load {model}", daemon=True)
        loader.start()
        left_s = deadline - time.monotonic()
        loader.join(max(0, min(0.3, left_s)))
        return "loaded" if load["state"] == "loaded" else "loading"

    def _model_due(self, model: str | None, unloaded: list[str]) -> str | None:
        """Return the first that is downloaded: the one named, the default, what was loaded."""
        there = self._store.models()
        for name in (model, self._default_model, *unloaded):
            if name and name_key(name) in there:
                return name
        return None

    # Healing by the service itself

    def action(self, state: RunnerState) -> str:
        """Return what heals this runner's fault, as /health recommends it."""
        if not self.self_heal or state.healed == "ghost":  # and the restart has not helped
            return "reset_session"
        # What was killed gets its time until it is a ghost.
        return "wait" if state.healed or self._may_heal(state.model) else "restart_service"

    def _may_heal(self, model: str | None) -> bool:
        since = time.monotonic() - HEALINGS_S
        return sum(at > since for at in self._healings[model]) < HEALINGS

    def after_look(self) -> None:
        """Heal what the watch has just seen, if the service heals by itself."""
        if self.self_heal:
            self._heal()

    def _heal(self) -> None:
        """End what is stuck, silent or a ghost, and only that, and a server that hangs."""
        self._cleaner.clean(self._watch.loaded, self._watch.held.values())
        for state in self._watch.faults():
            if state.healed != state.state and self._may_heal(state.model):
                self._heal_runner(state)
            if state.healed == "ghost":
                return  # with a new server the other faults are past
        if self._watch.server_state.hung(self._processes.server()):
            why = f"hung: no answer to /api/version in {HUNG_LOOKS} looks"
            self._note_healing("ollama", "Ollama", why, self.restart_server())

    def _heal_runner(self, state: RunnerState) -> None:
        fault = state.state
        model = state.model
        why = f"{fault}: {state.evidence}"
        if fault == "ghost":
            self._note_healing("ollama", model, why, self.restart_server())
        else:
            self._note_healing("runners", model, why, self.end_runner(state.runner, model))
        state.healed = fault
        self._healings[model].append(time.monotonic())

    def _note_healing(self, what: str, name: str | None, why: str, freed_mb: int) -> None:
        log.error("healed %s, which was %s (%d MB came free)", name, why, freed_mb)
        healed = dict(self.healed)  # whole for who reads it meanwhile
        healed[what] += 1
        healed["last"] = {
            "at": timestamp(time.time()),
            "what": name,
            "why": why,
            "freed_mb": freed_mb,
        }
        self.healed = healed


class Arrival(typing.NamedTuple):
    """When a caller of a clear came (monotonic), and the runners that were there then."""

    at: float
    runners: list[Runner]


def clear_suits(outcome: Outcome, key: object, came: Arrival) -> bool:
    """A clear serves who came before its end, asked for the same or less, and met no other runner.

    One that was started after the clear's own begin, and before this caller came, is his to see
    go.
    """
    fits = outcome.ended >= came.at and outcome.key in (key, (None, True))
    return fits and outcome.value is not None and outcome.value.serves(came.runners)


def reset_suits(outcome: Outcome, key: typing.Any, came: float) -> bool:
    """A reset serves who came before its end and asked for the same, or for no restart."""
    model, _restart = key
    return outcome.ended >= came and outcome.key in (key, (model, True))
