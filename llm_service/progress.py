"""The arithmetic of a download: percent, bytes, speed, time to go."""

import collections
import math

from ollama_client import Json, ServiceError

PROGRESS_S = 0.2
SPEED_WINDOW_S = 10
LAYERS_LIMIT = 1000


class Progress:
    """What a download has of each layer, and how fast it comes.

    Times are monotonic seconds.
    """

    def __init__(self, now: float):
        # digest: [completed, total], as Ollama shows them
        self.layers: dict[str, list[int]] = {}
        self.moved_at = now  # when the last byte came
        # What goes on now is from here to there of the whole work, in %
        self.part = (0, 100)
        self.received = 0  # bytes
        self._percent = 0.0
        self._speed: collections.deque[tuple[float, int]] = collections.deque()

    def note(self, line: Json, now: float) -> None:
        """Note one of Ollama's progress lines, or one of the same form."""
        digest = line.get("digest")
        if digest:
            completed = line.get("completed", 0)
            total = line.get("total", 0)
            self._note_layer(digest, completed, total, now)
        if digest or line["status"].startswith("verifying"):
            self._complete_until(digest)

    def set_layers(self, sizes: dict[str, int], completed: bool) -> None:
        """Replace the layers by a model's files: to check them, or at the end."""
        self.layers = {}
        for digest, size in sizes.items():
            there = size if completed else 0
            self.layers[f"sha256:{digest}"] = [there, size]

    def completed_bytes(self) -> int:
        """Return how much of the layers seen so far is there."""
        there = (completed for completed, _ in self.layers.values())
        return sum(there)

    def figures(self, now: float, state: str = "running") -> Json:
        """Return percent (never falls, 100 only with success), bytes, speed and ETA.

        ``state`` is the download's.
        """
        completed = self.completed_bytes()
        sizes = (total for _, total in self.layers.values())
        total = sum(sizes)
        if total:
            self._note_percent(completed / total)
        speed = 0
        if state == "running":
            speed = self._bytes_per_second(now)
        left = total - completed
        return {
            "percent": 100.0 if state == "success" else self._percent,
            "completed_bytes": completed,
            "total_bytes": total,
            "bytes_per_second": speed,
            "eta_seconds": left // speed if speed else None,
        }

    def _note_layer(
        self,
        digest: str,
        completed: int,
        total: int,
        now: float,
    ) -> None:
        completed = min(completed, total)
        before = completed  # what is new here may be from an earlier pull
        if digest in self.layers:
            before = self.layers[digest][0]
            self.received += max(0, completed - before)
        if completed > before or digest not in self.layers:
            self.moved_at = now
        self.layers[digest] = [completed, total]
        if len(self.layers) > LAYERS_LIMIT:
            words = "Ollama speaks of more layers than a model has."
            raise ServiceError("bad_answer", words)
        self._note_speed(now)

    def _complete_until(self, digest: str | None) -> None:
        """Ollama has gone on to this layer: the last line of one may stay below its total."""
        for layer, sizes in self.layers.items():
            if layer == digest:
                break
            sizes[0] = sizes[1]

    def _note_percent(self, share: float) -> None:
        start, end = self.part
        percent = start + (end - start) * share
        percent = int(percent * 10) / 10
        percent = min(99.9, percent)
        self._percent = max(self._percent, percent)

    def _note_speed(self, now: float) -> None:
        noted = self._speed
        last, _ = noted[-1] if noted else (-math.inf, 0)
        if now - last >= PROGRESS_S:
            sample = (now, self.received)
            noted.append(sample)
        while now - noted[0][0] > SPEED_WINDOW_S:
            noted.popleft()

    def _bytes_per_second(self, now: float) -> int:
        if not self._speed:
            return 0
        began, before = self._speed[0]
        seconds = max(now - began, PROGRESS_S)
        return int((self.received - before) / seconds)
