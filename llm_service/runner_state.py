"""A runner's states and the rules that lead to them. There is no clock here, and no I/O."""

import collections
import dataclasses
import logging
import math

from llm_service.answers import Answers, slot_counters
from llm_service.processes import Runner
from ollama_client import Json

log = logging.getLogger("llm-service")
GAP_S = 6  # between two looks: the machine was asleep, what was counted is void
STUCK_LOOKS = 10
SILENT_S = 10  # three looks at least, as two are never further apart than GAP_S
GHOST_S = 10
WORKING_SHARE = 0.05  # of a core, by which a runner's main thread shows that it computes
SLOW_FACTOR = 10  # more patience for a model that is not wholly on the GPU and computes

WORKING = ("loading", "busy", "unwatched")  # something goes on there, as far as can be seen
FAULTS = ("stuck", "silent", "ghost")  # what is healed; beside these an orphan is ended


@dataclasses.dataclass
class Look:
    """What one look at a runner saw. ``slots`` is None where it was not asked or has none."""

    at: float  # monotonic
    health: str = "unasked"  # or "ok", "loading", "silent", "dead", "orphan"
    slots: list[Json] | None = None
    totals: dict[str, float] = dataclasses.field(default_factory=dict)  # the runner's own
    late: bool = False  # /slots has not answered
    main_cpu_s: float = 0.0  # CPU time of the main thread
    main_wait_s: float = 0.0  # for which it was ready to run and had no CPU
    cpu_s: float = 0.0  # used since the last look by all of its threads
    passed_s: float = 0.0  # since then
    active: bool = False  # something may have changed
    due: bool = False  # it is to be asked
    on_gpu: bool = False  # the model lies there wholly
    killed: bool = False  # SIGKILL waits for it, and it holds its memory

    @property
    def working(self) -> bool:
        """Tell whether it has used CPU since the last look, however soon that comes."""
        return self.cpu_s > WORKING_SHARE * self.passed_s


class RunnerState:
    """One runner's state by the rules in the README. It has no clock of its own."""

    def __init__(self, runner: Runner, now: float, stuck_s: float):
        self.runner = runner
        self.process = runner.process
        self.model: str | None = None
        self.state = "loading"
        self.loaded_at: float | None = None  # when a look saw it loaded first
        self.since = now
        self.evidence = ""  # of a fault, as it was at the verdict
        self.counters: list[tuple] = []  # of each slot: task, prompt tokens, tokens decoded
        self.survives = False  # SIGKILL has not ended it for GHOST_S
        self.answers = Answers()  # under way
        self.tokens = 0
        self.tokens_per_second = 0.0
        self.memory_mb = 0
        self.cpu_percent = 0.0
        self.under_way = True  # at the last look
        self.active = True  # or it has used CPU since the look before that
        self.asked_at = now
        self._stuck_s = stuck_s
        self._worked = False  # used CPU at the last look, if it has no slots
        self._looked_at = now
        self._step_s = 0.0  # between the last two looks
        self._begin_count(now)

    @property
    def faulty(self) -> bool:
        """Tell whether it is in a state that is healed."""
        return self.state in FAULTS or self.survives

    @property
    def rests(self) -> bool:
        """Tell whether it had nothing to do at the last look, and was not about to end."""
        return self.state == "idle" and not self.under_way and "ghost" not in self._began

    @property
    def tasks(self) -> int:
        """Return how many answers or loads are under way, as far as can be seen."""
        if self.state in WORKING + FAULTS:
            return max(1, len(self.answers))
        return int(self.active)

    @property
    def stands(self) -> bool:
        """Tell whether for some looks something was under way, and no counter has moved."""
        return len(self._still) >= STUCK_LOOKS

    def count_anew(self, now: float) -> None:
        """Begin every count anew: what held it up has ended, and it gets its whole time."""
        self._begin_count(now)

    def note(self, look: Look) -> None:
        """Note a look and come to the state that follows."""
        self.active = look.active
        self._step_s = look.at - self._looked_at
        self._looked_at = look.at
        self.tokens_per_second = 0.0
        if self._step_s > GAP_S:
            self._begin_count(look.at)
        self.survives = look.killed and self._shows("survivor", look) >= GHOST_S
        if not look.killed:
            self._began.pop("survivor", None)
        self._change(self._judge(look), look.at)

    def _change(self, state: str, at: float) -> None:
        """Take on a state. Each change is one line of the log."""
        if state == self.state:
            return
        level = logging.WARNING if state in (*FAULTS, "orphan") else logging.INFO
        pid = self.process.pid
        seconds = at - self.since
        words = "runner %d of %s: %s, after %.0f s of %s"
        log.log(level, words, pid, self.model, state, seconds, self.state)
        if self.state == "loading" and self.loaded_at is None:
            self.loaded_at = at
        self.state = state
        self.since = at

    def _begin_count(self, now: float) -> None:
        self._began = {"stuck": now}  # since when each fault shows
        self._silent_cpu_s = 0.0  # used since its /health has not answered
        self._first_still: Look | None = None  # the first look without progress
        self._still: collections.deque[Look] = collections.deque(maxlen=STUCK_LOOKS)

    def _shows(self, fault: str, look: Look) -> float:
        """Return for how many seconds a fault has shown."""
        return look.at - self._began.setdefault(fault, look.at)

    def _judge(self, look: Look) -> str:
        if look.health == "silent":
            return self._judge_silence(look)
        self._began.pop("silent", None)
        self._silent_cpu_s = 0.0
        if look.health == "dead":
            words = "it has been dead and Ollama waits for its end"
            return self._judge_fault("ghost", look, GHOST_S, words, self.state)
        if look.health == "ok":
            return self._judge_work(look)
        survivor = self._began.get("survivor", look.at)
        self._begin_count(look.at)
        self._began["survivor"] = survivor
        if look.health == "unasked":
            return self.state
        self.under_way = look.health == "loading"
        return look.health

    def _judge_silence(self, look: Look) -> str:
        """Tell silent from slow: thousands of texts to embed keep all HTTP threads waiting.

        What computes has the patience of a batch, what is stopped or waits for ever has not.
        """
        self.under_way = True  # so that it is asked again
        self._silent_cpu_s += look.cpu_s
        patience_s: float = SILENT_S
        if look.working:
            patience_s = max(SILENT_S, self._stuck_s)
            if not look.on_gpu and self._silent_cpu_s < self._stuck_s * SLOW_FACTOR:
                patience_s = math.inf
        words = "its /health has not answered"
        return self._judge_fault("silent", look, patience_s, words, self.state)

    def _judge_work(self, look: Look) -> str:
        busy = "busy"
        if look.late:
            self.under_way = True
            moved = False
        elif look.slots is None:
            # One look without CPU is no idleness: on a busy machine it may have got none.
            self.under_way = moved = look.working or self._worked
            self._worked = look.working
            busy = "unwatched"
        else:
            self.under_way = is_working(look.slots)
            moved = self._count_tokens(look.slots)
            self.answers.note(look.at, look.slots)
        if moved or not self.under_way:
            self._begin_count(look.at)
            return busy if self.under_way else "idle"
        return self._judge_standstill(look)

    def _judge_standstill(self, look: Look) -> str:
        """Tell busy from stuck, where something is under way and no counter moves."""
        self._first_still = self._first_still or look
        self._still.append(look)
        if len(self._still) < STUCK_LOOKS or self._computes_on(self._first_still, look):
            return "busy"
        words = f"its counters have stood at {self.counters}"
        if look.late:
            words = "its /slots has not answered"
        return self._judge_fault("stuck", look, self._stuck_s, words, "busy")

    def _computes_on(self, first: Look, look: Look) -> bool:
        """Tell whether it computes on the CPU, and its patience there is not used up.

        One batch of a large model takes minutes there, and moves no counter meanwhile: so many
        seconds of CPU time, which others on the machine cannot use up.
        """
        before = self._still[0]
        ready_s = look.main_cpu_s + look.main_wait_s - before.main_cpu_s - before.main_wait_s
        computes = ready_s >= WORKING_SHARE * (look.at - before.at)
        used_s = look.main_cpu_s - first.main_cpu_s
        return not look.on_gpu and computes and used_s < self._stuck_s * SLOW_FACTOR

    def _judge_fault(
        self, fault: str, look: Look, patience_s: float, words: str, until_then: str
    ) -> str:
        """Return the fault as the state once it has shown for so long."""
        seconds = self._shows(fault, look)
        if seconds < patience_s:
            return until_then
        if self.state != fault:
            self.evidence = f"for {seconds:.0f} s {words}"
        return fault

    def _count_tokens(self, slots: list[Json]) -> bool:
        """Count what was decoded since the last look; return whether any counter moved."""
        before = self.counters
        self.counters = list(map(slot_counters, slots))
        new = 0
        for (old_task, _, old), (task, _, decoded) in zip(before, self.counters, strict=False):
            goes_on = task == old_task and decoded >= old  # its end sets it to 0
            new += decoded - old if goes_on else decoded
        self.tokens += new
        self.tokens_per_second = round(new / max(self._step_s, 0.1), 1)
        return self.counters != before

    def report(self, now: float) -> Json:
        """Return the line of ``runners`` in /health and /api/stats."""
        return {
            "pid": self.process.pid,
            "model": self.model,
            "state": self.state,
            "seconds": round(now - self.since),
            "tokens": self.tokens,
            "tokens_per_second": self.tokens_per_second,
            "memory_mb": self.memory_mb,
            "cpu_percent": self.cpu_percent,
            "answers": len(self.answers),
        }


def is_working(slots: list[Json]) -> bool:
    """Tell whether something is under way in a runner's slots."""
    return any(slot.get("is_processing") for slot in slots)
