"""Loads one model in the background: the newest order counts."""

import contextlib
import datetime
import logging
import math
import threading
import time
import typing

from llm_service.errors import TimedOut, Unreachable
from llm_service.processes import wait_until
from llm_service.trying import EMBED, GENERATE, Generation
from ollama_client import Json, Ollama, ServiceError, name_key

log = logging.getLogger("llm-service")
STARTING_S = 300  # for which a server may take its time until it answers
ANSWERING_LOOK_S = 0.2
FIRST_S = 0.3  # a small model is loaded by then
RETRIES_S = (5, 30, 120)
QUEUE_S = 8  # for a load to get through Ollama's queue: a runner ends or begins then
QUEUE_THREADS = 3  # of the runner that is asked for: an option that costs no memory
FOREVER_S = 1e8  # a model that is kept for longer is kept for ever
FINAL = ("model_not_found", "model_damaged", "bad_model_name")  # no other try would help


class Loader:
    """One load at a time; who orders another, or cancels, ends the one that is due."""

    def __init__(
        self,
        ollama: Ollama,
        answers: typing.Callable[[], bool],
        retries_s: typing.Sequence[float] | None = None,
        request: typing.Callable[[str, str, str, str], Generation] = Generation,
    ):
        """``answers()`` tells whether Ollama answers; ``retries_s``: the pauses between tries.

        ``request(url, model, "", path)`` asks for a load when it is read, and takes that back when
        it is closed.
        """
        self.load: Json | None = None  # the last one: model, state, error
        self._ollama = ollama
        self._answers = answers
        self._retries_s = RETRIES_S if retries_s is None else retries_s
        self._request = request
        self._under_way: Generation | None = None  # what Ollama is asked
        self._ordered_at = -math.inf
        self._changed = threading.Condition()

    def order(self, model: str, wait_s: float = FIRST_S) -> str:
        """Load a model in the background; return its state after so many seconds at most.

        ``load`` then has its outcome: "loading", "loaded", "failed" or "cancelled".
        """
        load: Json = {
            "model": model,
            "state": "loading",
            "error": None,
            "code": None,
        }
        with self._changed:
            self._cancel()
            self.load = load
            self._ordered_at = time.monotonic()
        loader = threading.Thread(
            target=self._work,
            args=(load,),
            name=f"load {model}",
            daemon=True,
        )
        loader.start()
        with self._changed:
            self._changed.wait_for(lambda: load["state"] != "loading", max(0, wait_s))
        return "loaded" if load["state"] == "loaded" else "loading"

    def rests_s(self) -> float:
        """Return for how many seconds no load was ordered; 0 while one goes on."""
        if self.load and self.load["state"] == "loading":
            return 0
        return time.monotonic() - self._ordered_at

    def cancel_for(self, model: str | None) -> None:
        """End the load that is due, if it is of this model or of any: it is no failure then."""
        with self._changed:
            due = self.load and (model is None or name_key(self.load["model"]) == name_key(model))
            if due:
                self._cancel()

    def _cancel(self) -> None:
        """End the load, also one that waits in Ollama for its turn."""
        if self.load and self.load["state"] == "loading":
            self.load["state"] = "cancelled"
            if self._under_way:
                self._under_way.close()
        self._changed.notify_all()

    def _work(self, load: Json) -> None:
        for pause_s in (*self._retries_s, None):
            try:
                error = self._try(load)
            except Exception as e:
                log.exception("load %s: a bug", load["model"])
                return self._end(load, "failed", repr(e), "bug")
            if error is None or load["state"] != "loading":
                break
            if pause_s is None or error.code in FINAL:
                log.error("load %s: %s", load["model"], error)
                return self._end(load, "failed", str(error), error.code)
            log.warning("load %s: %s; trying again in %g s", load["model"], error, pause_s)
            load["error"] = str(error)
            self._pause(load, pause_s)
        return self._end(load, "loaded")

    def _try(self, load: Json) -> ServiceError | None:
        """Wait for the server and load the model; return what went wrong."""
        until = time.monotonic() + STARTING_S
        while load["state"] == "loading" and time.monotonic() < until:
            if self._answers():
                break
            self._pause(load, ANSWERING_LOOK_S)
        try:
            self._ask(load)
        except ServiceError as e:
            return e
        return None

    def _ask(self, load: Json) -> None:
        """Have Ollama load it, until it is cancelled. Raises ServiceError."""
        try:
            self._ask_by(load, GENERATE)
        except ServiceError as e:
            if "does not support generate" not in str(e):
                raise
            self._ask_by(load, EMBED)

    def _ask_by(self, load: Json, path: str) -> None:
        """Do so by this path of Ollama's."""
        with self._changed:
            if load["state"] != "loading":
                return
            self._ollama.check()
            request = self._request(self._ollama.url, load["model"], "", path)
            self._under_way = request
        for _ in request:
            pass

    def _pause(self, load: Json, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: load["state"] != "loading", seconds)

    def _end(
        self,
        load: Json,
        state: str,
        error: str | None = None,
        code: str | None = None,
    ) -> None:
        """Note the outcome, unless another order has come meanwhile."""
        with self._changed:
            if load["state"] == "loading":
                load.update(state=state, error=error, code=code)
            self._changed.notify_all()


class QueueTrial:
    """A load of a model that is due to be loaded anew, which Ollama's scheduler must see to.

    A model that is loaded as it is wanted would answer past the scheduler's queue.
    """

    def __init__(self, ollama: Ollama, runners: typing.Callable[[], typing.Collection]):
        """``runners()`` are those that live."""
        self._ollama = ollama
        self._runners = runners

    def passes(self, name: str, line: Json | None) -> bool | None:
        """Tell whether it gets through; None where it has not come to that queue.

        ``line`` of /api/ps is what of the model is loaded.
        """
        fields = loaded_as(line)
        fields["options"]["num_thread"] = QUEUE_THREADS
        try:
            passed = self._load(name, fields)
            if passed is None and line:
                passed = self._load_anew(name, fields)
        except ServiceError as e:
            log.info("%s is not tried: %s", name, e)  # it was deleted while it was loaded
            return None
        return passed

    def _load_anew(self, name: str, fields: Json) -> bool | None:
        """Unload it first: it is loaded as it is tried, or for MLX, which no option changes."""
        before = set(self._runners())
        self._ollama.unload(name)
        until = time.monotonic() + QUEUE_S
        if not wait_until(lambda: set(self._runners()) != before, until):
            return False
        return self._load(name, fields)

    def _load(self, name: str, fields: Json) -> bool | None:
        """Ask for a load. An error of its own has come through the queue, too."""
        before = set(self._runners())
        try:
            self._ollama.load(name, QUEUE_S, **fields)
        except (TimedOut, Unreachable):
            log.info("a load of %s has not got through Ollama's queue in %d s", name, QUEUE_S)
            return set(self._runners()) != before
        except ServiceError as e:
            if e.code == "model_not_found":
                raise
            return "server busy" not in str(e)  # that queue is full
        return set(self._runners()) != before or None

    def restore(self, name: str, line: Json | None) -> None:
        """Have the model as it was, for who comes next. Raises ServiceError."""
        if line:
            self._ollama.load(name, **loaded_as(line))
        else:
            self._ollama.unload(name)


def loaded_as(line: Json | None) -> Json:
    """Return the fields of a request that loads a model as this line of /api/ps has it."""
    fields: Json = {"options": {}}
    if not line:
        return fields
    if isinstance(line.get("context_length"), int):
        fields["options"]["num_ctx"] = line["context_length"]
    with contextlib.suppress(ValueError):
        expires = datetime.datetime.fromisoformat(str(line.get("expires_at")))
        left_s = expires.timestamp() - time.time()
        if left_s > 0:
            fields["keep_alive"] = int(left_s) + 1 if left_s < FOREVER_S else -1
    return fields
