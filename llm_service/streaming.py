"""Long answers: their places, and whether somebody still reads them."""

import contextlib
import json
import math
import select
import threading
import time
import typing

from flask import Response, request

from llm_service.downloads import Download
from llm_service.trying import Trial
from llm_service.verifying import Check
from ollama_client import Json, ServiceError

STREAMS = 64
FIRST_NEWS_S = 10.5  # then a pull streams without knowing how it stands; a TLS handshake has 10
HALF_CLOSED_S = 1.2  # then a client that sends nothing more shows whether it still reads


class Streams:
    """The places for long answers; each of these holds a thread."""

    def __init__(self) -> None:
        self._places = threading.BoundedSemaphore(STREAMS)

    def download(self, download: Download, lines: typing.Iterable[Json]) -> Response:
        """Answer with a download's lines as they come; an early error has its own status."""
        leave = self._take(download)
        try:
            download.wait_for_news(FIRST_NEWS_S, Client().has_left)
        except ServiceError:
            leave()
            raise
        response = ndjson(lines)
        response.call_on_close(leave)
        return response

    def check(self, check: Check) -> Response:
        """Answer with a check's lines as they come."""
        leave = self._take(check)
        response = ndjson(check.lines())
        response.call_on_close(leave)
        return response

    def whole(self, download: Download | Check) -> Json:
        """Answer with the end of a download or check, with the status that fits."""
        leave = self._take(download)
        download.wait_for_end(Client().has_left)
        leave()
        if download.error:
            raise download.error
        return download.last_line()

    def _take(self, download: Download | Check) -> typing.Callable[[], None]:
        """Take one of the places for long answers; return what gives it back."""
        if not self._places.acquire(blocking=False):
            download.leave()
            raise ServiceError(
                "too_many_streams",
                f"{STREAMS} answers are streaming: try again, or use detach.",
            )

        def leave() -> None:
            self._places.release()
            download.leave()

        return leave


def stream_trial(trial: Trial) -> Response:
    """Answer with the lines of an answer as they come; an early error has its own status."""
    try:
        lines = trial.lines(FIRST_NEWS_S)
    except ServiceError:
        trial.close()
        raise
    response = ndjson(lines)
    response.call_on_close(trial.close)
    return response


def ndjson(lines: typing.Iterable[Json]) -> Response:
    """Answer with a line of JSON each, which no proxy shall hold back."""
    return Response(
        (json.dumps(line) + "\n" for line in lines),
        mimetype="application/x-ndjson",
        headers={"X-Accel-Buffering": "no"},
    )


def unless_known(response: Response) -> Response:
    """Spare who asks again and again what has not changed, by its ETag."""
    response.add_etag()
    response.make_conditional(request)
    return response


class Client:
    """Who sent the request under way, as far as the connection tells."""

    def __init__(self) -> None:
        self._socket = request.environ.get("gunicorn.socket")
        self._speaks_1_1 = request.environ.get("SERVER_PROTOCOL") == "HTTP/1.1"
        self._closed_at: float | None = None

    def has_left(self) -> bool:
        """Tell whether nobody reads the answer any more, before a byte of it is written.

        Who has closed one direction may still read. An interim answer shows it: every client of
        HTTP/1.1 skips it, and where nobody reads, the connection breaks.
        """
        if not self._socket:
            return False
        poll = select.poll()
        poll.register(self._socket, select.POLLRDHUP)
        events = poll.poll(0)
        if not events:
            return False
        if events[0][1] & (select.POLLERR | select.POLLHUP) or not self._speaks_1_1:
            return True
        now = time.monotonic()
        self._closed_at = self._closed_at or now
        if now - self._closed_at >= HALF_CLOSED_S:
            self._closed_at = math.inf  # once
            with contextlib.suppress(OSError):
                self._socket.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        return False
