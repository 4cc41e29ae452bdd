"""The answers under way in a runner, and what all answers of a model have come to."""

import collections
import re
import typing

from ollama_client import Json

# llama-server's names of the totals that are kept of each model.
TOTALS = {
    "llamacpp:prompt_tokens_total": "prompt_tokens",
    "llamacpp:prompt_seconds_total": "prompt_seconds",
    "llamacpp:tokens_predicted_total": "tokens",
    "llamacpp:tokens_predicted_seconds_total": "seconds",
}

NUMBER = r"[0-9]{1,15}(\.[0-9]*)?(e[+-]?[0-9]{1,2})?"


class Answer(typing.NamedTuple):
    """An answer under way."""

    task: object  # its number in the runner
    began: float  # when it was seen first
    tokens: int  # decoded so far


class Answers:
    """The answers under way in one runner, by its slots. It has no clock of its own."""

    def __init__(self):
        self._by_slot: dict[int, Answer] = {}

    def __len__(self) -> int:
        return len(self._by_slot)

    def note(self, now: float, slots: list[Json]) -> None:
        """Note what a look at the slots saw."""
        under_way = {}
        for number, slot in enumerate(slots):
            if not slot.get("is_processing"):
                continue
            task, _, tokens = slot_counters(slot)
            began = now
            known = self._by_slot.get(number)
            if known and known.task == task:
                began = known.began
            under_way[number] = Answer(task, began, tokens)
        self._by_slot = under_way

    def longer_than(self, seconds: float, now: float) -> list[Answer]:
        """Return the answers that have been under way for longer."""
        answers = self._by_slot.values()
        return [each for each in answers if now - each.began > seconds]


class Totals:
    """The runners' own counters, added up for each model over all of its runners."""

    def __init__(self):
        self.by_model: dict[str, typing.Mapping[str, float]] = {}
        self._told: dict[object, dict[str, float]] = {}

    def note(self, runner: object, model: str, told: dict[str, float]) -> None:
        """Note what a runner has told since its start: ``{"tokens": 12, …}``."""
        totals: dict[str, float] = collections.defaultdict(int, self.by_model.get(model, {}))
        before = self._told.setdefault(runner, {})
        for name, count in told.items():
            known = before.get(name, 0)
            totals[name] += max(0, count - known)
            before[name] = count
        self.by_model = {  # whole for who reads it meanwhile
            **self.by_model,
            model: totals,
        }

    def keep(self, runners: set) -> None:
        """Forget all runners but these; what the others did stays in the totals."""
        for runner in self._told.keys() - runners:
            del self._told[runner]


def totals_of(text: str) -> dict[str, float]:
    """Return the totals in an answer of a runner's ``/metrics``.

    Its averages are left out: each question sets them back for everybody.
    """
    found = {}
    for line in text.splitlines():
        name, _, value = line.partition(" ")
        if name in TOTALS and re.fullmatch(NUMBER, value):
            found[TOTALS[name]] = float(value)
    return found


def slot_counters(slot: Json) -> tuple[object, object, int]:
    """Return a slot's task, the prompt tokens processed for it and the tokens decoded."""
    token = slot.get("next_token") or {}
    if isinstance(token, list):
        token = token[0]
    decoded = token.get("n_decoded")
    if not isinstance(decoded, int):
        decoded = 0
    return slot.get("id_task"), slot.get("n_prompt_tokens_processed"), decoded
