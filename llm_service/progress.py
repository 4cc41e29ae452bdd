"""The arithmetic of a download: percent, bytes, speed, time to go."""

import collections

from ollama_client import Json, ServiceError

PROGRESS_S = 0.2
SPEED_WINDOW_S = 10
LAYERS_LIMIT = 1000


class Progress:
    """What a download has of each layer, and how fast it comes. Times are monotonic seconds."""

    def __init__(self, now: float):
        self.layers: dict[str, list[int]] = {}  # digest: [completed, total], as Ollama shows them
        self.moved_at = now  # when the last byte came
        self.part = (0, 100)  # what goes on now is from here to there of the whole work, in %
        self._percent = 0.0
        self.received = 0
        self._speed: collections.deque[tuple[float, int]] = collections.deque()

    def note(self, line: Json, now: float) -> None:
        """Note one of Ollama's progress lines, or one of the same form."""
        digest = line.get("digest")
        if digest:
            self._note_layer(digest, line.get("completed", 0), line.get("total", 0), now)
        if digest or line["status"].startswith("verifying"):
            # Ollama has gone on. The last line of a layer may stay below its total.
            for layer, sizes in self.layers.items():
                if layer == digest:
                    break
                sizes[0] = sizes[1]

    def _note_layer(self, digest: str, completed: int, total: int, now: float) -> None:
        completed = min(completed, total)
        before, _ = self.layers.get(digest, (completed, 0))  # it may be from an earlier pull
        if completed > before or digest not in self.layers:
            self.moved_at = now
        self.received += max(0, completed - before)
        self.layers[digest] = [completed, total]
        if len(self.layers) > LAYERS_LIMIT:
            raise ServiceError("bad_answer", "Ollama speaks of more layers than a model has.")
        if not self._speed or now - self._speed[-1][0] >= PROGRESS_S:
            self._speed.append((now, self.received))
        while now - self._speed[0][0] > SPEED_WINDOW_S:
            self._speed.popleft()

    def set_layers(self, sizes: dict[str, int], completed: bool) -> None:
        """Replace the layers by a model's files: to check them, or at the end."""
        self.layers = {
            f"sha256:{digest}": [size if completed else 0, size] for digest, size in sizes.items()
        }

    def completed_bytes(self) -> int:
        """Return how much of the layers seen so far is there."""
        return sum(completed for completed, _ in self.layers.values())

    def figures(self, now: float, state: str = "running") -> Json:
        """Return percent (never falls, 100 only with success), bytes, speed and ETA.

        ``state`` is the download's.
        """
        completed = self.completed_bytes()
        total = sum(total for _, total in self.layers.values())
        if total:
            start, end = self.part
            percent = start + (end - start) * completed / total
            self._percent = max(self._percent, min(99.9, int(percent * 10) / 10))
        speed = 0
        if self._speed and state == "running":
            began, received = self._speed[0]
            speed = int((self.received - received) / max(now - began, PROGRESS_S))
        return {
            "percent": 100.0 if state == "success" else self._percent,
            "completed_bytes": completed,
            "total_bytes": total,
            "bytes_per_second": speed,
            "eta_seconds": (total - completed) // speed if speed else None,
        }
