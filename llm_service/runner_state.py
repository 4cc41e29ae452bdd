"""A runner's states and the rules that lead to them."""

import collections
import dataclasses

from llm_service.processes import Runner, cpu_seconds
from ollama_client import Json

GAP_S = 6  # between two looks: the machine was asleep, what was counted is void
STUCK_LOOKS = 10
SILENT_S = 10  # three looks at least, as two are never further apart than GAP_S
GHOST_S = 10
WORKING_SHARE = 0.05  # of a core, by which a runner's main thread shows that it computes
SLOW_FACTOR = 10  # more patience for a model that is not wholly on the GPU and computes


@dataclasses.dataclass
class Look:
    """What one look at a runner saw. ``slots`` is None where it was not asked or has none."""

    at: float  # monotonic
    health: str = "unasked"  # or "ok", "loading", "silent", "dead", "orphan"
    slots: list[Json] | None = None
    late: bool = False  # /slots has not answered
    main_cpu_s: float = 0.0  # CPU time of the main thread
    working: bool = False  # it has used CPU since the last look
    active: bool = False  # something may have changed
    due: bool = False  # it is to be asked
    on_gpu: bool = False  # the model lies there wholly


class RunnerState:
    """One runner's state by the rules in the README. It has no clock of its own."""

    def __init__(self, runner: Runner, now: float, stuck_s: float):
        self.runner = runner
        self._stuck_s = stuck_s
        self.process = runner.process
        self.model: str | None = None
        self.state = "loading"
        self.since = now
        self.evidence = ""  # of a fault, as it was at the verdict
        self.healed: str | None = None  # the fault that it was healed of
        self.tokens = 0
        self.tokens_per_second = 0.0
        self.memory_mb = 0
        self.cpu_percent = 0.0
        self.under_way = True  # at the last look
        self._cpu_s = 0.0
        self._cpu_at = now  # when that was read
        self._worked = False  # used CPU at the last look, if it has no slots
        self.asked_at = now
        self._looked_at = now
        self._step_s = 0.0  # between the last two looks
        self._counters: list[tuple] = []  # of each slot: task, prompt tokens, tokens decoded
        # The last looks without progress; it is full once these are enough for a verdict.
        self._still: collections.deque[Look] = collections.deque(maxlen=STUCK_LOOKS)
        self._begin_count(now)

    def cpu_spent(self, now: float) -> tuple[float, float]:
        """Return the CPU seconds since the last call, and the seconds that passed."""
        cpu_s, at = self._cpu_s, self._cpu_at
        self._cpu_s, self._cpu_at = cpu_seconds(self.process), now
        return self._cpu_s - cpu_s, now - at

    def note(self, look: Look) -> None:
        """Note a look and come to the state that follows."""
        self._step_s = look.at - self._looked_at
        self._looked_at = look.at
        self.tokens_per_second = 0.0
        if self._step_s > GAP_S:
            self._begin_count(look.at)
        state = self._judge(look)
        if state != self.state:
            self.state = state
            self.since = look.at

    def _begin_count(self, now: float) -> None:
        self._began = {"stuck": now}  # since when each fault shows
        self._still.clear()

    def _judge(self, look: Look) -> str:
        if look.health == "silent":
            self.under_way = True  # so that it is asked again
            words = "its /health has not answered"
            return self._judge_fault("silent", look, SILENT_S, words, self.state)
        self._began.pop("silent", None)
        if look.health == "dead":
            words = "it has been dead and Ollama waits for its end"
            return self._judge_fault("ghost", look, GHOST_S, words, self.state)
        if look.health == "ok":
            return self._judge_work(look)
        self._begin_count(look.at)
        if look.health == "unasked":
            return self.state
        self.under_way = look.health == "loading"
        return look.health

    def _judge_work(self, look: Look) -> str:
        if look.late:
            self.under_way = True
            moved = False
        elif look.slots is None:
            # One look without CPU is no idleness: on a busy machine it may have got none.
            self.under_way = moved = look.working or self._worked
            self._worked = look.working
        else:
            self.under_way = is_working(look.slots)
            moved = self._count_tokens(look.slots)
        if moved or not self.under_way:
            self._begin_count(look.at)
            return "busy" if self.under_way else "idle"
        self._still.append(look)
        if len(self._still) < STUCK_LOOKS:
            return "busy"
        words = f"its counters have stood at {self._counters}"
        if look.late:
            words = "its /slots has not answered"
        return self._judge_fault("stuck", look, self._patience_s(look), words, "busy")

    def _judge_fault(
        self, fault: str, look: Look, patience_s: float, words: str, until_then: str
    ) -> str:
        """Return the fault as the state once it has shown for so long."""
        seconds = look.at - self._began.setdefault(fault, look.at)
        if seconds < patience_s:
            return until_then
        if self.state != fault:
            self.evidence = f"for {seconds:.0f} s {words}"
        return fault

    def _patience_s(self, look: Look) -> float:
        """One batch of a large model takes minutes on a CPU, and moves no counter meanwhile."""
        first = self._still[0]
        used_s = look.main_cpu_s - first.main_cpu_s
        computes = used_s >= WORKING_SHARE * (look.at - first.at)
        return self._stuck_s * SLOW_FACTOR if computes and not look.on_gpu else self._stuck_s

    def _count_tokens(self, slots: list[Json]) -> bool:
        """Count what was decoded since the last look; return whether any counter moved."""
        before = self._counters
        self._counters = list(map(slot_counters, slots))
        new = 0
        for (old_task, _, old), (task, _, decoded) in zip(before, self._counters, strict=False):
            goes_on = task == old_task and decoded >= old  # its end sets it to 0
            new += decoded - old if goes_on else decoded
        self.tokens += new
        self.tokens_per_second = round(new / max(self._step_s, 0.1), 1)
        return self._counters != before

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
        }


def is_working(slots: list[Json]) -> bool:
    """Tell whether something is under way in a runner's slots."""
    return any(slot.get("is_processing") for slot in slots)


def slot_counters(slot: Json) -> tuple[object, object, int]:
    """Return a slot's task, the prompt tokens processed for it and the tokens decoded."""
    token = slot.get("next_token") or {}
    token = token[0] if isinstance(token, list) else token
    decoded = token.get("n_decoded")
    if not isinstance(decoded, int):
        decoded = 0
    return slot.get("id_task"), slot.get("n_prompt_tokens_processed"), decoded
