"""A thin client of Ollama's API, and the names that all modules share.

``Ollama`` is the client of the HTTP API, ``Stream`` the progress lines of one pull. Everything
raises ``ServiceError``.
"""

import contextlib
import datetime
import functools
import ipaddress
import json
import logging
import math
import queue
import re
import time
import typing
import urllib.parse

import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import HTTPError

from llm_service.errors import Interrupted, ServiceError, TimedOut, Unreachable, clean, failure

Json = dict[str, typing.Any]

CONNECT_S = 1
ANSWER_S = 4  # callers have a limit too: the watchdog's is 5 s
# A load, or a verification in a pull, takes as long as Ollama lets it: whose limit ends a load that
# makes no progress (OLLAMA_LOAD_TIMEOUT). A caller who leaves before aborts it.
NO_LIMIT = math.inf
ANSWER_LIMIT_BYTES = 1 << 25
LINE_LIMIT_BYTES = 1 << 18

log = logging.getLogger("llm-service")

# ---------------------------------------------------------------------------------------
# Names and addresses
# ---------------------------------------------------------------------------------------

# Of Ollama's types/model: Name.IsValid, and ParseNameBare for how they are put together.
_HOST = r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,349}"
_NAMESPACE = r"[A-Za-z0-9_][A-Za-z0-9_-]{0,79}"
_WORD = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}"
_SCHEME = "[a-z0-9+.-]*://"
_PLACE = rf"(?:(?:{_SCHEME})?(?P<host>{_HOST})/|{_SCHEME}/)?(?P<namespace>{_NAMESPACE})/"
_NAME = re.compile(rf"(?:{_PLACE})?(?P<model>{_WORD})(?::(?P<tag>{_WORD}))?", re.I | re.A)
MANIFEST_PLACE = re.compile(rf"{_HOST}/{_NAMESPACE}/{_WORD}/{_WORD}")
DIGEST = re.compile(r"sha256[:-]([0-9a-f]{64})", re.I)
# What Go's strings.TrimSpace takes off.
SPACES = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000"
SPACES += "".join(map(chr, range(0x2000, 0x200B)))


def trimmed(setting: str) -> str:
    """Return a setting of the environment as Ollama reads it (its envconfig.Var)."""
    return setting.strip(SPACES).strip("\"'")


def check_name(name: object) -> str:
    """Return the model name as Ollama takes it. Raises ServiceError ``bad_model_name``."""
    text = name.strip(SPACES) if isinstance(name, str) else ""
    if not _NAME.fullmatch(_without_source(text)):
        raise ServiceError(
            "bad_model_name",
            '"model" must be a model name such as llama3.1:8b, user/model:tag or '
            "hf.co/org/repo:Q4_K_M.",
        )
    return text


@functools.lru_cache(256)  # each look asks for those of all that is loaded
def name_key(name: str) -> str:
    """Reduce a name to what Ollama takes for the same model: no defaults, lower case."""
    return plain_key(_without_source(name)) or name.lower()


def plain_key(name: str) -> str | None:
    """Do the same without a word at the end that says where to run; None for no name."""
    place = name_place(name.lower())
    return place_key(*place) if place else None


def name_place(name: str) -> tuple[str, str, str, str] | None:
    """Return host, namespace, model and tag; None for no name."""
    parts = _NAME.fullmatch(name)
    if not parts:
        return None
    host, namespace = parts["host"] or "registry.ollama.ai", parts["namespace"] or "library"
    return host, namespace, parts["model"], parts["tag"] or "latest"


def place_key(host: str, namespace: str, model: str, tag: str) -> str:
    """Return the key of the model whose manifest lies at ``host/namespace/model/tag``."""
    place = f"{host}/{namespace}/".lower()
    place = place.removeprefix("registry.ollama.ai/").removeprefix("library/")
    return f"{place}{model}:{tag}".lower()


def _without_source(name: str) -> str:
    """Return the name of the manifest: a trailing ``:local`` or ``:cloud`` says where to run.

    It is Ollama's modelref.NormalizePullName; "" where the name says that twice.
    """
    base, source = _split_source(name)
    if source and _split_source(base)[1]:
        return ""
    if source != "cloud":
        return base
    return base + ("-cloud" if base.rfind(":") > base.rfind("/") else ":cloud")


def _split_source(name: str) -> tuple[str, str]:
    base, colon, last = name.rpartition(":")
    last = last.strip(SPACES)
    word = last.lower()
    if colon and word in ("cloud", "local"):
        return base, word
    if colon and word.endswith("-cloud") and "/" not in word:
        return f"{base}:{last[:-6]}", "cloud"
    return name, ""


def dial_url(ollama_host: str) -> str:
    """Turn OLLAMA_HOST, in any of the ways that Ollama takes it, into the URL to dial."""
    scheme, host, port = _read_address(ollama_host)
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def listen_address(ollama_host: str) -> tuple[str, int]:
    """Return the host and port that Ollama listens on; ``dial_url`` gives those to dial."""
    _, host, port = _read_address(ollama_host)
    return host, port


def _read_address(ollama_host: str) -> tuple[str, str, int]:
    """Return scheme, host and port, as Ollama's envconfig.Host does."""
    text = trimmed(ollama_host).strip(SPACES)
    scheme, found, rest = text.partition("://")
    if not found:
        scheme, rest = "", text
    if text == "ollama.com":
        scheme, rest = "https", "ollama.com:443"
    default = {"http": 80, "https": 443}.get(scheme, 11434)
    place, _, _ = rest.partition("/")
    host, port = _split_port(place)
    if re.search(r"[][\s]", host):
        raise ValueError(f"{host} is no host")
    number = default
    if re.fullmatch("[0-9]{1,9}", port):
        number = int(port)
    if number > 65535:
        number = default
    return scheme or "http", host or "127.0.0.1", number


def _split_port(place: str) -> tuple[str, str]:
    """Return host and port, "" where there is none. [net.SplitHostPort]"""
    parts = re.fullmatch(r"(\[[^][]*\]|[^][:]*):([^][:]*)", place)
    if parts:
        return parts[1].strip("[]"), parts[2]
    with contextlib.suppress(ValueError):
        return str(ipaddress.ip_address(place.strip("[]"))), ""
    return place, ""


def timestamp(seconds: float | None) -> str | None:
    """Format a Unix time as ISO 8601 UTC; None stays None."""
    if seconds is None:
        return None
    moment = datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc)
    return moment.isoformat(timespec="seconds")


# ---------------------------------------------------------------------------------------
# Ollama: the API, thin
# ---------------------------------------------------------------------------------------


class Ollama:
    """A client of Ollama's API at ``url``. Methods raise ServiceError, in ``timeout_s``."""

    def __init__(self, url: str, is_own: typing.Callable[[], bool] = lambda: True):
        """``is_own()`` is asked before each request: whether the service's own server is there."""
        self.url = url
        self._is_own = is_own
        self._session = requests.Session()
        self._session.trust_env = False  # a proxy in the environment is not for loopback
        self._session.mount(url, HTTPAdapter(pool_maxsize=64))
        self._prepared: dict[str, requests.PreparedRequest] = {}

    def check(self) -> None:
        """Raise ServiceError ``ollama_unreachable`` where another one may have its port."""
        if not self._is_own():
            raise self._unreachable()

    def version(self, timeout_s: float = ANSWER_S) -> str | None:
        """Return the server's version, such as "0.34.4"."""
        return self._json("GET", "/api/version", timeout_s=timeout_s).get("version")

    def tags(self, timeout_s: float = ANSWER_S) -> list[Json]:
        """Return the models on disk: name, size, modified_at, digest, details."""
        return self._models("/api/tags", timeout_s)

    def ps(self, timeout_s: float = ANSWER_S) -> list[Json]:
        """Return the loaded models: name, size, size_vram, context_length, expires_at."""
        return self._models("/api/ps", timeout_s)

    def recommendations(self, timeout_s: float = ANSWER_S) -> list[Json]:
        """Return what Ollama recommends to run here: name, description, vram_bytes."""
        path = "/api/experimental/model-recommendations"
        found = self._json("GET", path, timeout_s=timeout_s).get("recommendations")
        local = [each for each in found or [] if each.get("vram_bytes")]  # others are in the cloud
        return [
            {
                "name": each.get("model"),
                "description": each.get("description"),
                "vram_bytes": each["vram_bytes"],
            }
            for each in local
        ]

    def load(self, model: str, timeout_s: float = NO_LIMIT, **fields: typing.Any) -> None:
        """Load a model, however long it takes; by ``/api/embed`` one that cannot generate.

        ``fields`` are others of the request, such as ``options`` and ``keep_alive``.
        """
        try:
            self._json("POST", "/api/generate", {"model": model, **fields}, timeout_s)
        except ServiceError as e:
            if "does not support generate" not in str(e):
                raise
            fields["input"] = []
            self._json("POST", "/api/embed", {"model": model, **fields}, timeout_s)

    def unload(self, model: str, timeout_s: float = ANSWER_S) -> None:
        """Ask for the model's memory back. Ollama says yes at once, whatever comes of it."""
        self._json("POST", "/api/generate", {"model": model, "keep_alive": 0}, timeout_s)

    def delete(self, model: str) -> None:
        """Delete a model's manifest, and the blobs that no other model shares."""
        self._request("DELETE", "/api/delete", {"model": model}, ANSWER_S).close()

    def pull(self, model: str, insecure: bool = False) -> "Stream":
        """Return the progress of a pull, which begins, or is joined, with the first line."""
        body = {"model": model, "insecure": insecure, "stream": True}
        return Stream(lambda: self._request("POST", "/api/pull", body, NO_LIMIT))

    def runner_health(self, port: str | None, timeout_s: float) -> str:
        """Ask a runner's own port: "ok", "loading" (or nothing listens yet) or "silent"."""
        try:
            self._request("GET", runner_url(port, "health"), None, timeout_s).close()
        except TimedOut:
            return "silent"
        except Unreachable:
            return "loading"
        except ServiceError as e:
            if "loading" in str(e).lower():
                return "loading"
        return "ok"

    def runner_slots(self, port: str | None, timeout_s: float) -> list[Json] | None:
        """Return a runner's slots, as llama.cpp's server tells them; None if it has none.

        Raises ServiceError ``ollama_timeout`` where it does not answer.
        """
        try:
            slots = self._json("GET", runner_url(port, "slots"), None, timeout_s, list)
        except TimedOut:
            raise
        except ServiceError:
            return None
        return slots if all(isinstance(slot, dict) for slot in slots) else None

    def runner_metrics(self, port: str | None, timeout_s: float) -> str:
        """Return a runner's own counters in Prometheus' text format; "" where it has none.

        Raises ServiceError ``ollama_timeout`` where it does not answer.
        """
        deadline = time.monotonic() + timeout_s
        try:
            with self._request("GET", runner_url(port, "metrics"), None, timeout_s) as response:
                return _read(response, deadline).decode(errors="replace")
        except TimedOut:
            raise
        except ServiceError:
            return ""

    def _models(self, path: str, timeout_s: float) -> list[Json]:
        models = self._json("GET", path, timeout_s=timeout_s).get("models")
        if not isinstance(models, list) or not all(map(_is_model, models)):
            raise ServiceError("bad_answer", f"Ollama's answer to {path} is not a list of models.")
        return models

    def _json(
        self,
        method: str,
        path: str,
        body: Json | None = None,
        timeout_s: float = ANSWER_S,
        kind: type = dict,
    ) -> typing.Any:
        deadline = time.monotonic() + timeout_s
        with self._request(method, path, body, timeout_s) as response:
            try:
                answer = json.loads(_read(response, deadline))
            except (ValueError, RecursionError):
                answer = None
        if not isinstance(answer, kind):
            raise ServiceError(
                "bad_answer",
                f"The answer to {path} makes no sense: is {self.url} an Ollama?",
            )
        return answer

    def _request(
        self, method: str, path: str, body: Json | None, timeout_s: float
    ) -> requests.Response:
        """Send a request to a path of Ollama's, or to the whole URL of a runner."""
        if path.startswith("/"):
            self.check()
        read_s = None if timeout_s == NO_LIMIT else timeout_s
        try:
            response = self._session.send(
                self._prepare(method, path, body),
                timeout=(min(CONNECT_S, timeout_s), read_s),
                stream=True,
                allow_redirects=False,
            )
        except requests.Timeout as e:
            raise TimedOut(
                "ollama_timeout",
                "Ollama did not answer in time: if it stays so, POST /api/session/reset.",
            ) from e
        except requests.RequestException as e:
            raise self._unreachable() from e
        if response.status_code >= 300:
            with response:
                raise _refusal(response, pull=path == "/api/pull")
        return response

    def _unreachable(self) -> Unreachable:
        return Unreachable(
            "ollama_unreachable",
            f"Ollama is not reachable at {self.url}: if it is not just starting, "
            "POST /api/session/reset.",
        )

    def _prepare(self, method: str, path: str, body: Json | None) -> requests.PreparedRequest:
        if path in self._prepared:
            return self._prepared[path]
        url = urllib.parse.urljoin(self.url, path)
        # A connection that is kept costs a runner CPU and a thread.
        headers = {} if path.startswith("/") else {"Connection": "close"}
        request = requests.Request(method, url, headers, json=body)
        prepared = self._session.prepare_request(request)
        if method == "GET" and not headers:  # asked all the time: it is a third of the CPU
            self._prepared[path] = prepared
        return prepared


def runner_url(port: str | None, path: str) -> str:
    """Return the URL of a runner's own port."""
    return f"http://127.0.0.1:{port}/{path}"


def _is_model(model: object) -> bool:
    return (
        isinstance(model, dict)
        and isinstance(model.get("name"), str)
        and isinstance(model.get("digest", ""), str)
    )


def _read(response: requests.Response, deadline: float) -> bytes:
    """Read a whole answer; the timeout of requests is for each byte only."""
    pieces = []
    size = 0
    try:
        while piece := response.raw.read1(1 << 20, decode_content=True):
            pieces.append(piece)
            size += len(piece)
            if size > ANSWER_LIMIT_BYTES:
                raise ServiceError("bad_answer", "Ollama's answer is larger than 32 MiB.")
            if time.monotonic() > deadline:
                raise TimedOut("ollama_timeout", "Ollama's answer took too long: try again.")
    except (HTTPError, OSError) as e:
        raise TimedOut("ollama_timeout", "Ollama broke off in mid-answer: try again.") from e
    return b"".join(pieces)


def _refusal(response: requests.Response, pull: bool) -> ServiceError:
    """Turn an answer that is no success into a ServiceError."""
    try:
        message = json.loads(_read(response, time.monotonic() + ANSWER_S))["error"]
    except (ValueError, KeyError, TypeError, RecursionError, ServiceError):
        return ServiceError(
            "bad_answer",
            f"Ollama answered {response.status_code} without a reason: see its log.",
        )
    if response.status_code == 404:
        return ServiceError(
            "model_not_found",
            f"{clean(message)}: GET /api/models lists what is downloaded; where it lists this "
            "model, a file of it is missing, and a pull restores it.",
        )
    return failure(message, pull)


# ---------------------------------------------------------------------------------------
# Stream: the progress lines of one pull
# ---------------------------------------------------------------------------------------


class Stream:
    """The progress lines of one pull, as dicts. ``close`` may come from another thread.

    Raises the error that Ollama answers or a line carries, ``pull_interrupted`` where the
    connection breaks, ``bad_answer`` for what is no progress line.
    """

    def __init__(self, request: typing.Callable[[], requests.Response]):
        self._request = request
        self._response: requests.Response | None = None
        self._closed = False

    def __iter__(self) -> typing.Iterator[Json]:
        response = self._response = self._request()
        if self._closed:  # while it was asked for
            self.close()
        rest = b""
        try:
            for chunk in response.iter_content(1 << 16):
                *lines, rest = (rest + chunk).split(b"\n")
                if len(rest) > LINE_LIMIT_BYTES:
                    raise ServiceError("bad_answer", "Ollama sent a line without an end.")
                yield from map(_progress, filter(None, lines))
            if rest:
                yield _progress(rest)
        except (requests.RequestException, AttributeError) as e:  # the latter: closed meanwhile
            raise Interrupted(
                "pull_interrupted",
                "The connection to Ollama broke: pull again, it goes on from here.",
            ) from e
        finally:
            response.close()

    def close(self) -> None:
        """End the connection, also one that is not open yet: so Ollama stops the pull."""
        self._closed = True
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # it has ended by itself
            if self._response:
                self._response.raw.shutdown()


def read_into(lines: "queue.SimpleQueue[Json | Exception]", stream: Stream) -> None:
    """Put a pull's lines into a queue, and at its end the exception that says why.

    It is a thread of its own: ``requests`` fixes the timeout when the request is sent, and
    Ollama is silent while it verifies.
    """
    try:
        for line in stream:
            lines.put(line)
        raise Interrupted("pull_interrupted", "Ollama ended the pull before it was done.")
    except Exception as e:
        lines.put(e)


def _progress(line: bytes) -> Json:
    try:
        progress = json.loads(line)
    except (ValueError, RecursionError):
        progress = None
    if isinstance(progress, dict):
        if progress.get("error") is not None:
            raise failure(progress["error"], pull=True)
        words = progress.get("status"), progress.get("digest", "")
        sizes = progress.get("total", 0), progress.get("completed", 0)
        proper = all(type(size) is int and 0 <= size < 1 << 63 for size in sizes)
        if proper and all(isinstance(word, str) for word in words):
            return progress
    raise ServiceError("bad_answer", "Ollama sent something that is no progress line.")
