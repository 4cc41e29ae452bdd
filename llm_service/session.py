"""Clear and reset: their lanes, the server's restart, and the load that follows."""

import logging
import time
import typing

import psutil

import gpu
from llm_service.clearing import Clearing
from llm_service.downloads import Downloads
from llm_service.loading import FIRST_S, STARTING_S, Loader
from llm_service.processes import MB, Runner, age_s, wait_until
from llm_service.reports import Steps, clear_failure, clear_message
from llm_service.server_state import VERSION_S
from llm_service.sharing import Outcome, SharedRun
from llm_service.watch import Watch
from ollama_client import Json, ServiceError, name_key

log = logging.getLogger("llm-service")
CLEAR_S = 3.7
RESET_S = 3.7
SHARE_S = 0.78  # a run may end that much late, and who shares it waits for that
SHARE_CLEAR_S = 0.2  # the same of a clear, which answers sooner
ENDING_S = 0.8  # of a clear, to end runners and see them go: with less it is not begun
LATE_CLEAR_S = 1.0  # for the clear of a reset that has waited for others
COMES_S = 0.6  # beyond a reset's time, for a new server to be seen, as a failure restarts all
ANSWERS_S = 0.6  # for it to answer, however late the old one has ended
ASK_S = 0.6  # an answer that may take longer than the first question's
NONE_CAME = "Ollama was told to end, and no new one has come: ask /health, which says more."
TOO_LATE = "Other callers' clears and resets took the time: try again."


class Arrival(typing.NamedTuple):
    """When a caller of a clear came (monotonic), and the runners that were there then."""

    at: float
    runners: list[Runner]


class Done(typing.NamedTuple):
    """A reset that was done: its clear, the answer, and what it has begun to load."""

    clearing: Clearing
    answer: Json
    loads: set[str]  # digests

    def serves(self, runners: list[Runner]) -> bool:
        """Tell whether it has cleared these, but for what it loads itself."""
        return self.clearing.serves([each for each in runners if each.digest not in self.loads])


class Session:
    """Clear and reset, one run at a time; who comes meanwhile shares what fits."""

    def __init__(self, watch: Watch, downloads: Downloads, default_model: str):
        self._watch = watch
        self._downloads = downloads
        self._store = watch.store
        self._processes = watch.processes
        self._default_model = default_model
        self.loader = Loader(watch.ollama, watch.server_state.answers)
        self.clears_done = 0
        self.resets_done = 0
        self.clears = SharedRun(clear_suits)
        self.resets = SharedRun(reset_suits)
        self._reset_came: Arrival | None = None  # whose reset is under way
        self._restarted_at = 0.0
        self._reset_at = 0.0  # when the last one ended

    def clear(self, model: str | None = None, force: bool = True) -> Json:
        """Unload all models or one; with ``force`` end the runners left. Returns the report."""
        came = self._arrival()
        until = came.at + CLEAR_S
        under_way = self._reset_came
        if under_way:  # its own clear will do
            came = came._replace(at=under_way.at)
        clearing = self._clear(model, force, lambda: until, came)
        report = clearing.report
        if force and not report["verified"]:
            raise clear_failure(report)
        return {
            "status": "success",
            "message": clear_message(report),
            **report,
        }

    def reset(self, model: str | None = None, restart: bool = False) -> Json:
        """Clear all, restart Ollama where it must be, load the model that is due."""
        came = self._arrival()
        key = (model and name_key(model), restart)
        self._store.require(model, soon=True)
        done = self.resets.get(
            lambda: self._reset(model, restart, came),
            RESET_S + SHARE_S,
            key,
            came,
        )
        return done.answer

    def recover(self) -> Json:
        """Clear what is idle; answer as the service that this one replaces does."""
        report = self.clear(force=False)
        memory = report["memory"]
        _used_mb, total_mb = gpu.memory_totals(gpu.sample())
        if total_mb:
            free_mb = total_mb - memory["after_mb"]
        else:
            free_mb = psutil.virtual_memory().available // MB
        return {
            "status": "recovered",
            "freed_mb": memory["freed_mb"],
            "free_mb": free_mb,
            "unloaded_models": report["unloaded_models"],
            "can_retry": not report["left"],
        }

    def _arrival(self) -> Arrival:
        return Arrival(time.monotonic(), self._watch.known_runners())

    def _clear(
        self,
        model: str | None,
        force: bool,
        deadline_now: typing.Callable[[], float],
        came: Arrival,
    ) -> Clearing:
        """Clear, or share a clear that serves who came then.

        ``deadline_now`` is asked once it is the caller's turn, which others may delay.
        """
        self._store.require(model, soon=True)

        def work() -> Clearing:
            deadline = deadline_now()
            if time.monotonic() > deadline - ENDING_S:
                raise ServiceError("timeout", TOO_LATE)
            self.clears_done += 1
            self.loader.cancel_for(model)
            clearing = Clearing(self._watch, model, force, deadline)
            clearing.run()
            if not self._reset_came:  # a reset looks at its end
                self._watch.look(deadline)
            return clearing

        key = (model and name_key(model), force)
        # Another caller's clear may take all of its time: it serves a reset, whose own has less.
        until = max(deadline_now(), came.at + CLEAR_S)
        limit_s = until - time.monotonic() + SHARE_CLEAR_S
        return self.clears.get(work, limit_s, key, came)

    def _reset(self, model: str | None, restart: bool, came: Arrival) -> Done:
        self._reset_came = came
        deadline = came.at + RESET_S
        try:
            clearing = self._clear_for_reset(came)
            steps = Steps(clearing.report["steps"])
            wanted = restart and self._restarted_at <= came.at
            self._restart_if_due(clearing, wanted, deadline, steps)
            self._watch.look(deadline + SHARE_CLEAR_S)
            cleared = clearing.look_again(deadline)
            if cleared["ending"]:
                raise clear_failure({**cleared, "steps": steps})
            due = self.model_due(model, cleared["unloaded_models"])
            state, said = self._load(due, deadline)
        finally:
            self._reset_came = None
        steps.note("load", True, said)
        self.resets_done += 1
        self._reset_at = time.monotonic()
        answer = {
            "status": "success",
            "message": f"Session reset, {said}.",
            "steps": steps,
            "model": due,
            "model_state": state,
            "memory": cleared["memory"],
            "managed": True,
        }
        loads = self._store.models(soon=True).get(name_key(due or ""), ())
        return Done(clearing, answer, set(loads))

    def _load(self, due: str | None, deadline: float) -> tuple[str, str]:
        """Have a model loaded; return the state of that, and a sentence's part."""
        if not due:
            return "none", f"no model to load ({self._default_model} is not downloaded)"
        left_s = deadline - time.monotonic()
        state = self.loader.order(due, min(FIRST_S, left_s))
        return state, f"{due} is {state}"

    def _clear_for_reset(self, came: Arrival) -> Clearing:
        """Clear all, with a second left for the restart unless others took that time."""

        def until() -> float:
            early = came.at + CLEAR_S - 1
            late = time.monotonic() + LATE_CLEAR_S
            return max(early, min(late, came.at + CLEAR_S))

        return self._clear(None, True, until, came)

    def _restart_if_due(
        self,
        clearing: Clearing,
        wanted: bool,
        deadline: float,
        steps: Steps,
    ) -> None:
        """Restart a server that is not well, or shall be restarted."""
        server = self._processes.server()
        state = self._watch.server_state
        if server and state.starting(server):
            steps.note("start_ollama", True, "it is starting")
            return
        healthy = self._is_well(clearing, deadline, steps)
        if healthy and not wanted:
            return
        if self._is_new(server):  # it was another one that was asked
            steps.note("start_ollama", True, "it is starting")
            return
        left_s = deadline - time.monotonic()
        if left_s < 0:  # others' runs took it
            raise ServiceError("timeout", TOO_LATE, steps=steps)
        grace_s = 0.0
        if healthy:  # with time left for the next server
            grace_s = min(1, left_s - 0.5)
        failure = self.restart(steps, deadline, grace_s)
        if failure and server:
            raise ServiceError(
                "restart_incomplete",
                NONE_CAME,
                recommended_action=failure,
                steps=steps,
            )

    def _is_well(self, clearing: Clearing, deadline: float, steps: Steps) -> bool:
        """Tell whether the server neither hangs nor has a ghost, and serves who waits.

        Where the reset before this one has not helped them, a restart may.
        """
        if not self._answers(steps):
            return False
        cleared = clearing.look_again(deadline - COMES_S)
        return is_let_go(cleared) and not self._watch.callers.starved_since(self._reset_at)

    def _answers(self, steps: Steps) -> bool:
        """Ask whether the server answers, a second time where it does not."""
        state = self._watch.server_state
        answers = state.answers() or state.answers(ASK_S)
        steps.note("ask_ollama", answers, "answers", "does not answer")
        return answers

    def restart(
        self,
        steps: Steps,
        deadline: float,
        grace_s: float,
        why_s: float = 0,
        until_it_answers: bool = True,
    ) -> str:
        """End the server, heed SIGTERM or not, and wait for the launcher's new one.

        Returns what would heal where that has failed, else "". It is no failure that the new
        one is starting yet, nor that the old one took its time. One that has not ended yet may
        take more: /health tells when only a reboot helps.
        """
        old = self._processes.server()
        self._downloads.reconnect()  # while Ollama still keeps their parts
        ended = self._processes.end_server(grace_s, why_s)
        steps.note("end_ollama", ended, "ended", "it does not end")
        now = time.monotonic()
        until = max(deadline, now)
        if old:  # else it is no failure that none comes
            until += COMES_S
        comes = wait_until(lambda: self._is_new(old), until)
        deadline = max(deadline, now + ANSWERS_S)
        answers = False
        if comes and until_it_answers:
            answers = wait_until(self._is_answering_anew(old, deadline), deadline)
        self._restarted_at = time.monotonic()
        state = "answers" if answers else "it is starting"
        steps.note("start_ollama", comes, state, "none comes")
        if comes:
            return ""
        return "restart_service" if ended else "wait"

    def _is_new(self, old: psutil.Process | None) -> bool:
        """Tell whether there is a server, and another one than that."""
        new = self._processes.server()
        return new is not None and new != old

    def _is_answering_anew(
        self,
        old: psutil.Process | None,
        deadline: float,
    ) -> typing.Callable[[], bool]:
        def answers() -> bool:
            if not self._is_new(old):
                return False
            left_s = deadline - time.monotonic()
            ask_s = min(VERSION_S, max(0.05, left_s))
            return self._watch.server_state.answers(ask_s)

        return answers

    def model_due(self, model: str | None, unloaded: list[str]) -> str | None:
        """Return the first that is downloaded: the one named, the default, what was loaded."""
        there = self._store.models(soon=True)
        for name in (model, self._default_model, *unloaded):
            if name and name_key(name) in there:
                return name
        return None

    def any_model(self) -> str | None:
        """Return the model that would be loaded, or just one that is downloaded."""
        due = self.model_due(None, [])
        if due:
            return due
        for name, digests in self._store.models(soon=True).items():
            if digests:
                return name
        return None

    def load_due(self, server: psutil.Process) -> None:
        """Load what a reset would load, for a server that has just begun to answer.

        Not where a load was ordered since it was started, or is tried again: a reset may want
        another model. Nor where the server is an old one, and this process alone is new.
        """
        if self._reset_came:
            return
        due = self.model_due(None, [])
        newest_s = min(STARTING_S, self.loader.rests_s())
        if due and age_s(server) < newest_s:
            log.info("preloading %s", due)
            self.loader.order(due, 0)


def is_let_go(cleared: Json) -> bool:
    """Tell whether Ollama holds nothing of it; no restart ends what SIGKILL does not."""
    return cleared["verified"] or cleared["ending"]


def clear_suits(outcome: Outcome, key: object, came: Arrival) -> bool:
    """A clear serves who came before its end, asked for the same or less, and met no other runner.

    One that was started after the clear's own begin, and before this caller came, is his to see
    go.
    """
    wishes = key, (None, True)
    if outcome.value is None or outcome.ended < came.at:
        return False
    return outcome.key in wishes and outcome.value.serves(came.runners)


def reset_suits(outcome: Outcome, key: typing.Any, came: Arrival) -> bool:
    """A reset serves who came before its end, asked for the same or less, and met no other runner.

    Its failure is theirs, too, unless it has only come too late.
    """
    model, _restart = key
    wishes = key, (model, True)
    if outcome.ended < came.at or outcome.key not in wishes:
        return False
    if outcome.value is None:
        return getattr(outcome.error, "code", None) != "timeout"
    return outcome.value.serves(came.runners)
