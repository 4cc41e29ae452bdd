"""A client of a streamed pull or verify, and what holds for every such stream."""

import contextlib
import json
import threading
import time

from helpers.models import blob_path
from helpers.waiting import wait_for

PULL, VERIFY = "/api/models/pull", "/api/models/verify"


class Listener:
    """Reads the lines of a pull, or of what another path streams, in a thread.

    .answer         of requests
    .status         of HTTP
    .lines .at      so far, and when each came
    .done           the stream has ended
    """

    def __init__(self, service, model, path=PULL, **fields):
        self.lines, self.at, self.done = [], [], False
        body = {"model": model, "insecure": True, **fields}
        self.answer = service.post(path, json=body, stream=True)
        self.status = self.answer.status_code
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self):
        with contextlib.suppress(Exception):  # the client leaves by closing
            for line in self.answer.iter_lines():
                self.lines.append(json.loads(line))
                self.at.append(time.monotonic())
        self.done = True

    def until(self, predicate, what, timeout=60):
        """Wait for a line like that."""

        def seen():
            return any(predicate(line) for line in list(self.lines))

        return wait_for(seen, timeout, f"{what} in {self.lines[-2:]}")

    def flowing(self, megabytes=1):
        """Wait until so much has come."""
        self.until(
            lambda line: line.get("completed_bytes", 0) >= megabytes * 1e6, f"{megabytes} MB"
        )
        return self

    def leave(self):
        self.answer.raw.shutdown()
        self.answer.close()

    def end(self, timeout=120):
        """Wait for the end; return the last line."""
        wait_for(lambda: self.done, timeout, f"the end of the stream {self.lines[-1:]}")
        return self.lines[-1]

    def reconnects(self):
        """Return the status lines that speak of reconnects."""
        statuses = [line.get("status", "") for line in self.lines]
        return [status for status in statuses if status.startswith("reconnecting")]


def pulls(service):
    return service.get(PULL).json()["pulls"]


def pull_of(service, model):
    """Return what the list says of one model's download, or None."""
    return next((pull for pull in pulls(service) if pull["model"] == model), None)


def running_pulls(service):
    return [pull for pull in pulls(service) if pull["state"] == "running"]


def is_whole(service, registry, name):
    """Tell whether each blob of a model is there in its size."""
    return all(
        blob_path(service.models, layer["digest"]).stat().st_size == layer["size"]
        for layer in registry.layers(name)
    )


def assert_in_order(lines):
    """Assert what holds for every stream.

    It has one last line; `percent` never falls, and is 100 with success alone.
    """
    ends = [line for line in lines if "error" in line or line.get("status") == "success"]
    assert ends == lines[-1:]
    percents = [line["percent"] for line in lines if "percent" in line]
    assert percents == sorted(percents)
    assert all(percent < 100 for percent in percents[:-1])
    assert "error" in lines[-1] or percents[-1] == 100
