"""What is healed without being asked, how often, and how it is told."""

import logging
import threading
import time
import typing

import psutil

from llm_service.clearing import living, used_mb
from llm_service.errors import ServiceError
from llm_service.loading import QueueTrial
from llm_service.matching import ListCleaner
from llm_service.processes import Runner, alive, is_ending, unreaped, wait_until
from llm_service.reports import Steps
from llm_service.runner_state import GHOST_S, RunnerState
from llm_service.server_state import HUNG_LOOKS
from llm_service.session import CLEAR_S, RESET_S, Session
from llm_service.watch import Watch
from ollama_client import Json, timestamp

log = logging.getLogger("llm-service")
ASK_S = 0.6  # for each question of a healing
HEALINGS = 3  # of one model in HEALINGS_S, then it is left alone
HEALINGS_S = 1800
KILL_WAIT_S = 0.9
GONE_S = 0.9  # for the runners of a server that has gone to give their memory back
GO_ON_S = 1.5  # between the end of a runner and the fresh look at the next
ORPHAN_S = 5  # the launcher ends them by itself, in about a second
WHY_S = 0.5  # for a hung server to print what each goroutine waits for
SERVER = "Ollama"  # the name under which its healings are told


class Killed(typing.NamedTuple):
    """A runner that healing has killed, and what is to be told of it once it is gone."""

    at: float  # monotonic
    model: str | None
    why: str
    evidence: Json
    before_mb: int


class Healing:
    """Decides what the service heals by itself; the watch looks again before it acts."""

    def __init__(self, watch: Watch, session: Session, self_heal: bool, preload: bool = False):
        """``preload``: load the model that is due whenever a server has begun to answer."""
        self._watch = watch
        self._session = session
        self._processes = watch.processes
        self.self_heal = self_heal
        self._preload = preload
        self.healed: Json = {
            "runners": 0,
            "ollama": 0,
            "failed": 0,
            "last": None,
        }
        self._healings: dict[str | None, list[float]] = {}
        self._healed_of: dict[Runner, str] = {}  # what known runners have been healed of
        self._killed: dict[Runner, Killed] = {}  # which have not ended yet
        self._unended: set[Runner] = set()  # which SIGKILL has not ended in time
        self._server_failure: str | None = None  # what heals, where a restart has failed
        self._preloaded: object = None  # the server that it was done for
        self._under_way: dict[str, threading.Thread] = {}  # what reads the models' disk
        self._cleaner = ListCleaner(watch.matching, watch.processes)
        self._trial = QueueTrial(watch.ollama, watch.processes.runners)

    def action(self, state: RunnerState) -> str:
        """Return what heals this runner's fault, as /health recommends it."""
        outlives = state.survives or state.runner in self._unended
        if outlives and alive(state.process):  # else a restart of the server lets it go
            return "reboot_host"
        if not self.self_heal:
            return "reset_session"
        if self._server_failure:
            return self._server_failure
        # What was killed gets its time until it is a ghost.
        healed = state.runner in self._healed_of or self._may_heal(state.model)
        return "wait" if healed else "restart_service"

    def server_action(self) -> str:
        """Return what heals a server that hangs, as /health recommends it."""
        if self._server_failure:
            return self._server_failure
        return "reset_session" if self._may_heal(SERVER) else "restart_service"

    def starved_action(self) -> str:
        """Return what heals a server whose callers wait in vain, as /health recommends it."""
        if not self.self_heal:
            return "reset_session"
        if self._server_failure:
            return self._server_failure
        return "wait" if self._may_heal(SERVER) else "restart_service"

    def _may_heal(self, name: str | None) -> bool:
        since = time.monotonic() - HEALINGS_S
        recent = [at for at in self._healings.pop(name, ()) if at > since]
        if recent:
            self._healings[name] = recent
        return len(recent) < HEALINGS

    def _count_healing(self, name: str | None) -> None:
        earlier = self._healings.get(name, [])
        self._healings[name] = [*earlier, time.monotonic()]

    def after_look(self) -> None:
        """Do what follows from what the watch has just seen."""
        self._forget_ended()
        self._note_answer(self._watch.server_state.answered)
        self._tell_killed()
        callers = self._watch.callers
        if callers.suspicion and not callers.starved:
            self._beside("queue", self._try_queue)
        if self.self_heal:
            self._heal()
            self._clean_list()

    def _try_queue(self) -> None:
        """Have a load go through Ollama's queue: where it passes, nobody is starved there.

        Also without self-healing: a false alarm would make its owner do far more than that.
        """
        callers = self._watch.callers
        began = time.monotonic()
        for name, line in self._models_to_try():
            passes = self._trial.passes(name, line)
            if passes is None:
                continue
            if passes:
                callers.excuse(began)
                log.info("who waits is not starved: a load of %s went through Ollama's queue", name)
                return self._trial.restore(name, line)
            break
        return callers.confirm()

    def _models_to_try(self) -> typing.Iterator[tuple[str, Json | None]]:
        """Yield names, each with its line of /api/ps: what is loaded, else one that is not."""
        for line in self._watch.loaded:
            yield line["name"], line
        name = self._session.any_model()
        if name:
            yield name, None

    def _clean_list(self) -> None:
        held = list(self._watch.held.values())
        due = self._cleaner.due(self._watch.loaded, held)
        if due:
            self._beside("clean", lambda: self._cleaner.clean(due))

    def _beside(self, name: str, work: typing.Callable[[], object]) -> None:
        """Do what reads the models' disk, and wait a moment for it: that may hang.

        What has not ended is not begun once more.
        """
        before = self._under_way.get(name)
        if before is not None and before.is_alive():
            return

        def logged() -> None:
            try:
                work()
            except ServiceError as e:
                log.warning("%s: %s", name, e)
            except Exception:
                log.exception("%s: a bug", name)

        thread = threading.Thread(target=logged, name=name, daemon=True)
        self._under_way[name] = thread
        thread.start()
        thread.join(ASK_S)

    def _forget_ended(self) -> None:
        there = set()
        for state in self._watch.states():
            there.add(state.runner)
        self._unended &= there
        for runner in list(self._healed_of):
            if runner not in there:
                del self._healed_of[runner]

    def _note_answer(self, answered: psutil.Process | None) -> None:
        """Note that this server answers: no restart is due any more, but a load may be."""
        if answered is None or answered != self._watch.server:
            return
        self._server_failure = None
        if self._preload and answered != self._preloaded:
            self._beside("preload", lambda: self._session.load_due(answered))
        self._preloaded = answered

    def _heal(self) -> None:
        """Heal one fault at a time: each is looked for anew, as the one before may explain it."""
        tried: set[Runner] = set()
        while state := self._next_fault(tried):
            if tried:  # what stood only for the one before needs a moment to show that it goes on
                time.sleep(GO_ON_S)
            tried.add(state.runner)
            if state.state == "ghost":
                self._heal_ghost(state)
                return  # with a new server the other faults are past
            self._heal_runner(state)
        if self._may_heal(SERVER):
            self._heal_server()

    def _heal_server(self) -> None:
        """Restart a server that hangs or starves its callers."""
        callers = self._watch.callers
        if self._watch.server_state.state == "answering" and not callers.starved:
            return
        server = self._processes.server()
        if server and self._processes.ending(server):
            return  # another signal would help no more than the first
        if self._watch.server_state.hung(server):
            why = f"hung: no answer to /api/version in {HUNG_LOOKS} looks"
            self._restart_server(SERVER, why, {}, lambda: self._is_still_hung(server))
        elif callers.starved:
            why = f"starved: {callers.starved}"
            evidence = self._evidence(None)
            evidence["callers"] = callers.report
            self._restart_server(
                SERVER,
                why,
                evidence,
                lambda: self._is_still_starved(server),
            )

    def _next_fault(self, tried: set[Runner]) -> RunnerState | None:
        """Return a runner that is due to be healed now and has not been tried in this turn."""
        now = time.monotonic()
        for state in self._watch.faults() + self._orphans(now):
            healed_of = self._healed_of.get(state.runner)
            if state.runner in tried or state.survives:
                continue
            if state.state == "stuck" and self._killed:
                continue  # it may stand for the one that is about to end
            if healed_of == state.state:
                continue
            # One that becomes a ghost after its end is one healing of the model
            counts = not healed_of and state.state != "orphan"
            if not counts or self._may_heal(state.model):
                return state
        return None

    def _orphans(self, now: float) -> list[RunnerState]:
        """Return the living runners of a server that has gone, which the launcher has left."""
        found = []
        for each in self._watch.states():
            left_s = now - each.since
            if each.state == "orphan" and left_s >= ORPHAN_S and alive(each.process):
                found.append(each)
        return found

    def _heal_runner(self, state: RunnerState) -> None:
        """Unload a runner's model by name and end the runner, if its fault still holds."""
        fault = state.state
        model = state.model
        runner = state.runner
        with self._session.clears.turn(CLEAR_S):
            if not self._watch.holds(runner, fault):
                return self._tell_recovered(state)
            evidence = self._evidence(state)
            why = f"{fault}: {state.evidence or 'its server has gone'}"
            before_mb = used_mb(self._watch.known_runners())[1]
            held = self._watch.held.get(runner)
            line = held.line if held and fault != "orphan" else None
            if line:
                self._beside("unload", lambda: self._watch.matching.unload(line, runner))
            ended = self._watch.end_runner(runner, fault)
            if not ended and not (line and is_ending(runner.process)):
                return self._tell_recovered(state)
            self._note_try(runner, model, fault)
            now = time.monotonic()
            self._killed[runner] = Killed(
                at=now,
                model=model,
                why=why,
                evidence=evidence,
                before_mb=before_mb,
            )
            wait_until(lambda: not alive(runner.process), now + KILL_WAIT_S)
            self._tell_killed()
        self._watch.look()  # who waits to clear need not wait for that
        return None

    def _tell_recovered(self, state: RunnerState) -> None:
        words = "runner %d of %s is left alone, as it is %s now"
        log.info(words, state.process.pid, state.model, state.state)

    def _note_try(self, runner: Runner, model: str | None, fault: str) -> None:
        """Count the healings of a model: one that becomes a ghost after its end is one."""
        if runner not in self._healed_of and fault != "orphan":  # whose server's end was no fault
            self._count_healing(model)
        self._healed_of[runner] = fault

    def _tell_killed(self) -> None:
        """Tell of each runner that was killed how it came out, once that is known."""
        for runner, killed in list(self._killed.items()):
            ended = not alive(runner.process)
            if ended or time.monotonic() - killed.at >= GHOST_S:
                del self._killed[runner]
                if not ended:
                    self._unended.add(runner)
                _, after_mb = used_mb(self._watch.known_runners())
                freed_mb = max(0, killed.before_mb - after_mb)
                self._note_healing(
                    "runners",
                    killed.model,
                    killed.why,
                    freed_mb,
                    ended,
                    killed.evidence,
                )

    def _heal_ghost(self, state: RunnerState) -> None:
        def still() -> bool:
            holds = unreaped(state.process, self._processes.server())
            if holds:
                self._note_try(state.runner, state.model, "ghost")
            return holds

        why = f"ghost: {state.evidence}"
        self._restart_server(state.model, why, self._evidence(state), still)

    def _is_still_hung(self, judged: psutil.Process | None) -> bool:
        """Ask the server that was judged once more: another one has not had its time."""
        if self._watch.server_state.answers(ASK_S) or judged is None:
            return False
        return self._processes.server() == judged and not self._processes.ending(judged)

    def _is_still_starved(self, judged: psutil.Process | None) -> bool:
        """Look at its callers once more."""
        self._watch.look()
        same = judged is not None and self._processes.server() == judged
        return same and bool(self._watch.callers.starved)

    def _restart_server(
        self,
        name: str | None,
        why: str,
        evidence: Json,
        still: typing.Callable[[], bool],
    ) -> None:
        """Have the server started anew where ``still()`` says that its fault holds."""
        with self._session.resets.turn(RESET_S), self._session.clears.turn(RESET_S):
            if not still():
                log.info("%s is left alone: it has recovered", name)
                return
            runners = self._watch.known_runners()
            evidence = evidence or self._evidence(None)
            before_mb = used_mb(runners)[1]
            self._count_healing(SERVER)
            deadline = time.monotonic() + RESET_S
            # Who waits to clear shall not wait for its answer
            failure = self._session.restart(Steps(), deadline, 0, WHY_S, False)
            until = time.monotonic() + GONE_S
            wait_until(lambda: not living(runners), until)
            freed_mb = max(0, before_mb - used_mb(runners)[1])
            no_new_one = failure == "restart_service"  # else /health tells how the end goes on
            self._server_failure = failure if no_new_one else None
            self._note_healing("ollama", name, why, freed_mb, not failure, evidence)
        self._watch.look()

    def _evidence(self, state: RunnerState | None) -> Json:
        """Return the figures as they are at a verdict."""
        return {
            "counters": state.counters if state else [],
            "gpus": self._watch.machine.gpu["gpus"],
            "ollama_said": self._processes.last_lines(),
        }

    def _note_healing(
        self, what: str, name: str | None, why: str, freed_mb: int, ok: bool, evidence: Json
    ) -> None:
        """Tell of a healing as it came out."""
        done = "healed" if ok else "could not heal"
        log.error("%s %s, which was %s (%d MB came free)", done, name, why, freed_mb)
        healed = dict(self.healed)  # whole for who reads it meanwhile
        healed[what if ok else "failed"] += 1
        healed["last"] = {
            "at": timestamp(time.time()),
            "what": name,
            "state": why.partition(":")[0],  # as in `runners`, or "hung"
            "why": why,
            "freed_mb": freed_mb,
            "ok": ok,
            "evidence": evidence,
        }
        self.healed = healed
