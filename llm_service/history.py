"""The last hour in memory: a sample every 10 s, and marks of what happened."""

import collections
import logging
import math
import struct
import threading
import time
import typing

from ollama_client import Json, timestamp

INTERVAL_S = 10
SPAN_S = 3600
MARKS_KEPT = 40
TOLD_OF_HEALINGS = ("what", "why", "state", "freed_mb", "ok")
GPUS_KEPT = 16  # so that an hour stays below 100 KiB

log = logging.getLogger("llm-service")


class History:
    """Takes the samples in a thread of its own. Values are numbers or None."""

    def __init__(
        self,
        figures: typing.Callable[[], Json],
        clock: typing.Callable[[], float] = time.monotonic,
        wall_clock: typing.Callable[[], float] = time.time,
    ):
        """``figures`` gives what ``GET /api/stats`` answers."""
        self._figures = figures
        self._clock = clock
        self._wall_clock = wall_clock
        # A sample is the moment (monotonic), then a float for each series.
        self._samples: collections.deque[bytes] = collections.deque(maxlen=SPAN_S // INTERVAL_S)
        self._taken = int(wall_clock())  # counts on, also over a restart of the service
        self._marks: collections.deque[tuple[float, Json]] = collections.deque(maxlen=MARKS_KEPT)
        self._gpus = 0
        self._healed_at: str | None = None  # the last healing that was marked
        self._pid: int | None = None  # Ollama's process at the last sample
        self._lock = threading.Lock()

    def start(self) -> None:
        """Begin to take samples."""
        threading.Thread(target=self._run, name="history", daemon=True).start()

    def take(self) -> None:
        """Take one sample, and note what happened since the last one."""
        stats = self._figures()
        values = sample_of(stats)
        with self._lock:
            self._note_healing(stats["healed"]["last"])
            self._note_restart(stats["ollama"])
            self._gpus = max(self._gpus, min(GPUS_KEPT, len(stats["gpus"])))
            self._samples.append(packed(self._clock(), values))
            self._taken += 1

    def mark(self, kind: str, **fields: object) -> None:
        """Note what has just happened: "cleared", "reset", "healed", "restarted"."""
        with self._lock:
            self._mark(self._clock(), kind, fields)

    def answer(self, since: int) -> Json:
        """Return the answer of ``GET /api/history``: what was taken after ``next`` of another."""
        with self._lock:
            new = self._taken - since
            complete = not 0 <= new <= len(self._samples)
            samples = list(self._samples)
            if not complete:
                samples = samples[len(samples) - new :]
            to_wall = self._wall_clock() - self._clock()
            series = series_names(self._gpus)
            return {
                "timestamp": timestamp(self._wall_clock()),
                "interval_s": INTERVAL_S,
                "span_s": SPAN_S,
                "series": series,
                "samples": [unpacked(each, to_wall, len(series)) for each in samples],
                "complete": complete,
                "next": self._taken,
                "marks": self._marks_shown(to_wall),
            }

    def _run(self) -> None:
        while True:
            try:
                self.take()
            except Exception:
                log.exception("the history misses a sample")
            time.sleep(INTERVAL_S)

    def _note_healing(self, last: Json | None) -> None:
        """Mark a healing, which the service counts."""
        if last is None or last["at"] == self._healed_at:
            return
        self._healed_at = last["at"]
        fields = {}
        for key in TOLD_OF_HEALINGS:
            if key in last:
                fields[key] = last[key]
        self._mark(self._clock(), "healed", fields)

    def _note_restart(self, server: Json) -> None:
        """Mark a restart of Ollama, where its process is another one."""
        pid = server["pid"]
        if pid is None:
            return
        if self._pid not in (None, pid):
            self._mark(self._clock() - server["uptime_seconds"], "restarted", {})
        self._pid = pid

    def _mark(self, at: float, kind: str, fields: Json) -> None:
        self._marks.append((at, {"kind": kind, **fields}))

    def _marks_shown(self, to_wall: float) -> list[Json]:
        """Return the marks of the last hour, the newest first."""
        shown = []
        for at, fields in sorted(self._marks, key=mark_time, reverse=True):
            if self._clock() - at < SPAN_S:
                mark = {"at": timestamp(at + to_wall)}
                shown.append(mark | fields)
        return shown


def mark_time(mark: tuple[float, Json]) -> float:
    """Return when a mark was."""
    return mark[0]


def series_names(gpus: int) -> list[str]:
    """Name the series in the order of a sample's values."""
    names = [
        "cpu_percent",
        "memory_mb",
        "tokens_per_second",
        "waiting",
    ]
    for index in range(gpus):
        names.append(f"gpu{index}_percent")
        names.append(f"gpu{index}_memory_mb")
    return names


def sample_of(stats: Json) -> list[float | None]:
    """Return the values of a sample; None for what is not known."""
    tokens = 0
    for runner in stats["runners"]:
        if runner["state"] == "busy":
            tokens += runner["tokens_per_second"]
    callers = stats.get("callers") or {}
    values = [
        stats["cpu_percent"],
        stats["memory"]["used_mb"],
        tokens,
        callers.get("waiting"),
    ]
    for gpu in stats["gpus"][:GPUS_KEPT]:
        values.append(gpu["utilization_percent"])
        values.append(gpu["memory_used_mb"])
    return values


def packed(at: float, values: list[float | None]) -> bytes:
    """Return a sample as it is kept; NaN for what is not known."""
    numbers = []
    for value in values:
        numbers.append(math.nan if value is None else value)
    return struct.pack(f"d{len(numbers)}f", at, *numbers)


def unpacked(sample: bytes, to_wall: float, length: int) -> list:
    """Return a sample as [Unix time, value or None, …] with a value for each series."""
    count = (len(sample) - struct.calcsize("d")) // struct.calcsize("f")
    at, *numbers = struct.unpack(f"d{count}f", sample)
    line: list[float | None] = [round(at + to_wall)]
    for number in numbers:
        line.append(None if math.isnan(number) else round(number, 1))
    missing = length - count
    return line + [None] * missing
