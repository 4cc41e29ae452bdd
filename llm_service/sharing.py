"""One run for many callers, and work done at once."""

import concurrent.futures
import contextlib
import threading
import time
import typing

from ollama_client import ServiceError


class Outcome:
    """What a piece of work came to, and when it began and ended (monotonic).

    ``value`` is None where the work failed, by ``error``.
    """

    def __init__(self, key: object, work: typing.Callable[[], typing.Any]):
        self.key, self.began = key, time.monotonic()
        self.value: typing.Any = None
        self.error: Exception | None = None
        try:
            self.value = work()
        except Exception as e:
            self.error = e
        self.ended = time.monotonic()

    def result(self) -> typing.Any:
        """Return the work's result, or raise its error."""
        if self.error:
            raise self.error
        return self.value


class SharedRun:
    """Does a piece of work for one caller at a time; others may share the last outcome."""

    def __init__(self, suits: typing.Callable[[Outcome, object, typing.Any], bool]):
        """``suits(outcome, key, came)`` tells whether it serves a caller who came then."""
        self._suits = suits
        self._lock = threading.Lock()
        self._last: Outcome | None = None

    def get(
        self,
        work: typing.Callable[[], typing.Any],
        timeout_s: float,
        key: object = None,
        came: typing.Any = None,
    ) -> typing.Any:
        """Return what suits, or do the work. Raises ServiceError ``timeout``.

        ``came`` is what ``suits`` wants to know of a caller: the time of the call, unless given.
        """
        came = time.monotonic() if came is None else came
        with self.turn(timeout_s):
            if self._last is None or not self._suits(self._last, key, came):
                self._last = Outcome(key, work)
            outcome = self._last
        return outcome.result()

    @contextlib.contextmanager
    def turn(self, timeout_s: float) -> typing.Iterator[None]:
        """Keep all others out."""
        if not self._lock.acquire(timeout=max(0, timeout_s)):
            raise ServiceError("timeout", "The run under way did not end in time: try again.")
        try:
            yield
        finally:
            self._lock.release()


def began_since(outcome: Outcome, _key: object, came: float) -> bool:
    """An answer serves who came before it was begun: it is as fresh as one's own."""
    return outcome.began >= came


def in_parallel(work: typing.Callable, each: typing.Collection) -> list:
    """Do the work for each item at once; return the results, raise the first error."""
    if len(each) < 2:
        return list(map(work, each))
    with concurrent.futures.ThreadPoolExecutor(len(each)) as pool:
        return list(pool.map(work, each))
