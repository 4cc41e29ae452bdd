"""One answer for a person who wants to see whether a model works."""

import contextlib
import http.client
import json
import queue
import socket
import threading
import time
import typing
import urllib.parse

from llm_service.errors import ServiceError, failure
from ollama_client import Json, Ollama

TOKENS_MOST = 2000
TRY_S = 120
CONNECT_S = 1
GENERATE, EMBED = "/api/generate", "/api/embed"
BEAT_S = 0.5  # two writes show that the listener has left


class Trials:
    """Passes prompts to Ollama, one at a time."""

    def __init__(self, ollama: Ollama, limit_s: float = TRY_S):
        self._ollama, self._limit_s = ollama, limit_s
        self._turn = threading.Lock()
        self._trial: Trial | None = None

    def start(self, model: str, prompt: str) -> "Trial":
        """Begin an answer, which must be closed.

        Raises ServiceError ``try_under_way`` or ``ollama_unreachable``.
        """
        self._ollama.check()
        if not self._turn.acquire(blocking=False):
            raise ServiceError("try_under_way", "Another try is under way: wait for its end.")
        generation = Generation(self._ollama.url, model, prompt)
        self._trial = Trial(generation, self._limit_s, self._turn.release)
        return self._trial

    def close(self) -> None:
        """End the answer under way: the service stops."""
        if self._trial:
            self._trial.close()


class Trial:
    """An answer under way, read by a thread."""

    def __init__(
        self,
        generation: "Generation",
        limit_s: float,
        on_close: typing.Callable[[], None],
    ):
        self._generation, self._limit_s = generation, limit_s
        self._until = time.monotonic() + limit_s
        self._closing = threading.Lock()
        self._on_close: typing.Callable[[], None] | None = on_close
        self._news: queue.Queue[Json | ServiceError | None] = queue.Queue()
        threading.Thread(target=self._read, name="try", daemon=True).start()

    def lines(self, first_s: float) -> typing.Iterator[Json]:
        """Return the lines as they come. Raises the error that comes within so many seconds."""
        with contextlib.suppress(queue.Empty):
            first = self._news.get(timeout=first_s)
            if isinstance(first, ServiceError):
                raise first
            self._news.queue.appendleft(first)  # only this thread takes from it
        return self._lines()

    def close(self) -> None:
        """End the connection, so that Ollama stops; let the next one try."""
        self._generation.close()
        with self._closing:
            on_close, self._on_close = self._on_close, None
        if on_close:
            on_close()

    def _lines(self) -> typing.Iterator[Json]:
        """Yield Ollama's lines, an empty piece while there is none, an error at last."""
        while True:
            left_s = self._until - time.monotonic()
            try:
                news = self._news.get(timeout=max(0, min(BEAT_S, left_s)))
            except queue.Empty:
                news = self._generation.empty_piece()
                if left_s <= 0:
                    words = f"The answer was cut off after {self._limit_s:g} s."
                    news = ServiceError("timeout", words)
            if news is None:
                break
            if isinstance(news, ServiceError):
                self.close()
                yield {"error": str(news), "code": news.code}
                return
            yield news
        self.close()  # before the end is sent: who has read that may try anew at once

    def _read(self) -> None:
        """Pass the lines on; None is the end."""
        try:
            for line in self._generation:
                self._news.put(line)
            self._news.put(None)
        except ServiceError as e:
            self._news.put(e)


class Generation:
    """Ollama's lines for one prompt. ``close`` ends it at any moment, also while it loads.

    Without a prompt the model is loaded, and nothing else; by EMBED one that cannot generate. It
    keeps a connection of its own: requests gives none that can be ended before the answer has
    begun.
    """

    def __init__(self, url: str, model: str, prompt: str = "", path: str = GENERATE):
        parts = urllib.parse.urlsplit(url)
        secure = parts.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        self._connection = kind(parts.hostname or "", parts.port, timeout=CONNECT_S)
        self._model, self._prompt, self._path = model, prompt, path
        self._socket: socket.socket | None = None
        self._closed = False

    def __iter__(self) -> typing.Iterator[Json]:
        body: Json = {"model": self._model}
        if self._path == EMBED:
            body["input"] = []
        if self._prompt:
            body |= {"prompt": self._prompt, "options": {"num_predict": TOKENS_MOST}}
        try:
            self._connection.connect()
            self._socket = self._connection.sock
            self._socket.settimeout(None)  # a load may take long; whoever waits closes
            if self._closed:
                raise ConnectionAbortedError
            self._connection.request("POST", self._path, json.dumps(body))
            done = False
            response = self._connection.getresponse()
            for line in map(read_line, response):
                yield line
                done = line.get("done") is True or "embeddings" in line
            if not done:
                raise ConnectionAbortedError
        except (OSError, http.client.HTTPException, AttributeError) as e:
            if self._closed:  # and somebody still listens
                raise ServiceError("shutting_down", "The service is stopping: try later.") from e
            words = "The connection to Ollama broke: try again."
            raise ServiceError("ollama_unreachable", words) from e
        finally:
            self._connection.close()

    def empty_piece(self) -> Json:
        """Return a line as Ollama writes them, with nothing in it."""
        return {"model": self._model, "response": "", "done": False}

    def close(self) -> None:
        """End the connection."""
        self._closed = True
        with contextlib.suppress(OSError):
            if self._socket:
                self._socket.shutdown(socket.SHUT_RDWR)


def read_line(line: bytes) -> Json:
    """Parse a line of Ollama's; raise the error that it is, also that of an answer's body."""
    try:
        answer = json.loads(line)
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict):
        raise ServiceError("bad_answer", "Ollama sent something that is no answer.")
    if answer.get("error") is not None:
        raise failure(answer["error"])
    return answer
