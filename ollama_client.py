"""All that knows Ollama: its API, its model store, its processes and its downloads.

- ``Ollama`` is a thin client of the HTTP API, ``Stream`` the progress lines of one pull.
- ``Store`` reads and cleans the model files without asking Ollama.
- ``Processes`` finds and ends what the launcher has started.
- ``Progress`` is the arithmetic of a download, ``Download`` runs one, ``Downloads`` owns all.

Everything raises ``ServiceError``.
"""

import collections
import contextlib
import datetime
import errno
import functools
import glob
import hashlib
import itertools
import json
import logging
import math
import os
import pathlib
import queue
import re
import shutil
import signal
import stat
import threading
import time
import typing
import urllib.parse

import psutil
import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import HTTPError

Json = dict[str, typing.Any]

CONNECT_S = 1
ANSWER_S = 4  # callers have a limit too: the watchdog's is 5 s
LOAD_S = 600
PULL_SILENCE_S = 1800  # Ollama is silent while it verifies: minutes for tens of gigabytes
STALL_S = 25  # at 30 s Ollama starts a silent part anew and drops its bytes; a reconnect keeps them
MAX_RECONNECTS = 10
RECONNECT_MAX_S = 8
LINE_S = 0.25  # at the latest, to listeners; two writes show that one has left
PROGRESS_S = 0.2
SPEED_WINDOW_S = 10
PURGE_S = 2  # the most that a purge waits
PURGE_PAUSE_S = 0.3
SETTLED_S = 1  # longer than a pull is between two layers, with no file open
PRUNE_AGE_S = 3600  # an `ollama create` uploads long before it writes the manifest
CHECK_BYTES = 1 << 20
DISK_RESERVE_BYTES = 1 << 30
ANSWER_LIMIT_BYTES = 1 << 25
LINE_LIMIT_BYTES = 1 << 18
LAYERS_LIMIT = 1000
ENDED_KEPT = 20
PF_EXITING = 4  # a process has this flag of Linux' before its files are closed

log = logging.getLogger("llm-service")

# ---------------------------------------------------------------------------------------
# Errors and advice
# ---------------------------------------------------------------------------------------

# The HTTP status of each code. A code that is not here is a 502: Ollama or the registry
# answered with an error.
STATUS = {
    "bad_json": 400,
    "bad_field": 400,
    "bad_model_name": 400,
    "model_missing": 400,
    "token_wanted": 401,
    "host_not_allowed": 403,
    "origin_not_allowed": 403,
    "cross_site": 403,
    "model_not_found": 404,
    "no_such_pull": 404,
    "cancelled": 409,
    "manifest_unreadable": 409,
    "model_being_pulled": 409,
    "model_busy": 409,
    "encoding_not_supported": 415,
    "too_many_pulls": 429,
    "too_many_streams": 429,
    "bug": 500,
    "gpu_lost": 503,
    "model_store_unreadable": 503,
    "ollama_dead": 503,
    "ollama_hung": 503,
    "ollama_starting": 503,
    "ollama_unreachable": 503,
    "restart_incomplete": 503,
    "runner_ghost": 503,
    "runner_silent": 503,
    "runner_stuck": 503,
    "runner_survived": 503,
    "shutting_down": 503,
    "ollama_timeout": 504,
    "timeout": 504,
    "disk_full": 507,
}

# What an error of Ollama's says, our code for it, and what to do about it.
FAILURES = [
    (
        r"insecure protocol|HTTP response to HTTPS|not look like a TLS handshake",
        "registry_insecure",
        'send "insecure": true for a registry without TLS',
    ),
    (r"invalid model name|name .* is invalid|not both", "bad_model_name", "check the name"),
    (r"no space left", "disk_full", "delete a model or enlarge the disk, then pull again"),
    (
        r"permission denied|read-only file system|operation not permitted",
        "store_not_writable",
        "give the model store to the user that the service runs as (chown -R), then try again",
    ),
    (r"file does not exist|not found", "model_not_found", "check the name and the tag"),
    (r"digest mismatch", "digest_mismatch", "the data was damaged on its way: pull again"),
    (
        r"context canceled|max retries exceeded|unexpected EOF|connection reset|broken pipe",
        "pull_interrupted",
        "pull again: it goes on from here",
    ),
    (
        r"no such host|connection refused|i/o timeout|unreachable|no route|deadline exceeded|"
        r"server misbehaving|TLS handshake|\bEOF\b",
        "registry_unreachable",
        "check the network and the registry's name",
    ),
    (
        r"-partial",
        "parts_damaged",
        'DELETE /api/models/pull with "purge": true, then pull again',
    ),
]


class ServiceError(Exception):
    """What went wrong, as a caller is told it.

    ``code`` is a machine word, the message a sentence that says what to do. ``fields`` go into
    the answer beside them. ``status`` is the HTTP status of the code.
    """

    def __init__(self, code: str, message: str, **fields: object):
        super().__init__(message)
        self.code = code
        self.fields = fields
        self.status = STATUS.get(code, 502)


def failure(message: object) -> ServiceError:
    """Turn an error text of Ollama's into a ServiceError with advice."""
    text = clean(message)
    for pattern, code, advice in FAILURES:
        if re.search(pattern, str(message), re.I):
            return ServiceError(code, f"{text}: {advice}.")
    return ServiceError("ollama_error", f"Ollama says: {text}.")


@contextlib.contextmanager
def file_errors() -> typing.Iterator[None]:
    """Turn what the file system refuses into a ServiceError with advice."""
    try:
        yield
    except OSError as e:
        raise failure(e) from e


def clean(text: object) -> str:
    """Keep a text from outside to one short printable line."""
    printable = re.sub(r"[^\x20-\x7e\u00a0-\ud7ff]", " ", str(text))
    return printable[:300].strip().rstrip(".")


# ---------------------------------------------------------------------------------------
# Names and addresses
# ---------------------------------------------------------------------------------------

_WORD = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}"
_NAME = re.compile(
    r"(?:(?:(?:https?://)?(?P<host>[A-Za-z0-9_][A-Za-z0-9_.:-]{0,349})/)?"
    rf"(?P<namespace>[A-Za-z0-9_][A-Za-z0-9_-]{{0,79}})/)?(?P<model>{_WORD})"
    rf"(?::(?P<tag>{_WORD}))?(?P<source>:(?:cloud|local))?"
)
_DIGEST = re.compile(r"sha256[:-]([0-9a-f]{64})", re.I)


def check_name(name: object) -> str:
    """Return the model name as Ollama takes it. Raises ServiceError ``bad_model_name``."""
    text = name.strip(" \t\r\n") if isinstance(name, str) else ""
    if not _NAME.fullmatch(text):
        raise ServiceError(
            "bad_model_name",
            '"model" must be a model name such as llama3.1:8b, user/model:tag or '
            "hf.co/org/repo:Q4_K_M.",
        )
    return text


def name_key(name: str) -> str:
    """Reduce a name to what Ollama takes for the same model: no defaults, lower case."""
    parts = _NAME.fullmatch(name.lower())
    if not parts:
        return name.lower()
    host = parts["host"] or "registry.ollama.ai"
    place = f"{host}/{parts['namespace'] or 'library'}/"
    place = place.removeprefix("registry.ollama.ai/").removeprefix("library/")
    return f"{place}{parts['model']}:{parts['tag'] or 'latest'}{parts['source'] or ''}"


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
    """Return scheme, host and port."""
    scheme, _, rest = ollama_host.strip(" '\"").rpartition("://")
    if rest.count(":") > 1 and not rest.startswith("["):
        rest = f"[{rest}]"
    split = urllib.parse.urlsplit(f"//{rest}")
    port = {"http": 80, "https": 443}.get(scheme, 11434)
    with contextlib.suppress(ValueError):  # Ollama too takes its default then
        port = split.port or port
    return scheme or "http", split.hostname or "127.0.0.1", port


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

    def __init__(self, url: str):
        self.url = url
        self._session = requests.Session()
        self._session.trust_env = False  # a proxy in the environment is not for loopback
        self._session.mount(url, HTTPAdapter(pool_maxsize=64))
        self._prepared: dict[str, requests.PreparedRequest] = {}

    def version(self, timeout_s: float = ANSWER_S) -> str | None:
        """Return the server's version, such as "0.34.4"."""
        return self._json("GET", "/api/version", timeout_s=timeout_s).get("version")

    def tags(self, timeout_s: float = ANSWER_S) -> list[Json]:
        """Return the models on disk: name, size, modified_at, digest, details."""
        return self._models("/api/tags", timeout_s)

    def ps(self, timeout_s: float = ANSWER_S) -> list[Json]:
        """Return the loaded models: name, size, size_vram, context_length, expires_at."""
        return self._models("/api/ps", timeout_s)

    def load(self, model: str) -> None:
        """Load a model, which takes up to LOAD_S; by ``/api/embed`` one that cannot generate."""
        try:
            self._json("POST", "/api/generate", {"model": model}, LOAD_S)
        except ServiceError as e:
            if "does not support generate" not in str(e):
                raise
            self._json("POST", "/api/embed", {"model": model, "input": []}, LOAD_S)

    def unload(self, model: str, timeout_s: float = ANSWER_S) -> None:
        """Ask for the model's memory back. Ollama says yes at once, whatever comes of it."""
        self._json("POST", "/api/generate", {"model": model, "keep_alive": 0}, timeout_s)

    def delete(self, model: str) -> None:
        """Delete a model's manifest, and the blobs that no other model shares."""
        self._request("DELETE", "/api/delete", {"model": model}, ANSWER_S).close()

    def pull(self, model: str, insecure: bool = False) -> "Stream":
        """Return the progress of a pull, which begins, or is joined, with the first line."""
        body = {"model": model, "insecure": insecure, "stream": True}
        return Stream(lambda: self._request("POST", "/api/pull", body, PULL_SILENCE_S))

    def runner_health(self, port: str | None, timeout_s: float) -> str:
        """Ask a runner's own port: "ok", "loading" (or nothing listens yet) or "silent"."""
        try:
            self._request("GET", runner_url(port, "health"), None, timeout_s).close()
        except ServiceError as e:
            if e.code == "ollama_timeout":
                return "silent"
            if e.code == "ollama_unreachable" or "loading" in str(e).lower():
                return "loading"
        return "ok"

    def runner_slots(self, port: str | None, timeout_s: float) -> list[Json] | None:
        """Return a runner's slots, as llama.cpp's server tells them; None if it has none.

        Raises ServiceError ``ollama_timeout`` where it does not answer.
        """
        try:
            slots = self._json("GET", runner_url(port, "slots"), None, timeout_s, list)
        except ServiceError as e:
            if e.code == "ollama_timeout":
                raise
            return None
        return slots if all(isinstance(slot, dict) for slot in slots) else None

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
        try:
            response = self._session.send(
                self._prepare(method, path, body),
                timeout=(min(CONNECT_S, timeout_s), timeout_s),
                stream=True,
                allow_redirects=False,
            )
        except requests.Timeout as e:
            raise ServiceError(
                "ollama_timeout",
                "Ollama did not answer in time: if it stays so, POST /api/session/reset.",
            ) from e
        except requests.RequestException as e:
            raise ServiceError(
                "ollama_unreachable",
                f"Ollama is not reachable at {self.url}: if it is not just starting, "
                "POST /api/session/reset.",
            ) from e
        if response.status_code >= 300:
            with response:
                raise _refusal(response)
        return response

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
                raise ServiceError("ollama_timeout", "Ollama's answer took too long: try again.")
    except (HTTPError, OSError) as e:
        raise ServiceError("ollama_timeout", "Ollama broke off in mid-answer: try again.") from e
    return b"".join(pieces)


def _refusal(response: requests.Response) -> ServiceError:
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
            f"{clean(message)}: GET /api/models lists what is downloaded.",
        )
    return failure(message)


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
            raise ServiceError(
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


def _progress(line: bytes) -> Json:
    try:
        progress = json.loads(line)
    except (ValueError, RecursionError):
        progress = None
    if isinstance(progress, dict):
        if progress.get("error") is not None:
            raise failure(progress["error"])
        words = progress.get("status"), progress.get("digest", "")
        sizes = progress.get("total", 0), progress.get("completed", 0)
        proper = all(type(size) is int and 0 <= size < 1 << 63 for size in sizes)
        if proper and all(isinstance(word, str) for word in words):
            return progress
    raise ServiceError("bad_answer", "Ollama sent something that is no progress line.")


# ---------------------------------------------------------------------------------------
# Store: the model files
# ---------------------------------------------------------------------------------------

# The names that Ollama gives to files in blobs/: a digest, a part, an upload under way.
_BLOB_FILE = re.compile(r"sha256-(?:[0-9a-fA-F]{64}(?:-partial.*)?|\d+|.*\.tmp)")


class Store:
    """The model files under OLLAMA_MODELS, without asking Ollama. Sizes are bytes on disk."""

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path)
        self._signature: tuple[tuple[str, int, int], ...] = ()
        self._models: tuple[tuple | None, dict[str, list[str]]] = (None, {})  # with its signature

    def models(self) -> dict[str, list[str]]:
        """Map each model's ``name_key`` to its digests (hex), those of the weights first."""
        signature = self.signature()
        known, models = self._models
        if signature is None or signature != known:
            models = self._read_models()
            self._models = signature, models
        return models

    def _read_models(self) -> dict[str, list[str]]:
        found = {}
        for file in self._files("manifests/*/*/*/*"):
            try:
                manifest = json.loads(file.read_bytes())
                layers = [*manifest["layers"], manifest.get("config") or {}]
                layers.sort(key=lambda layer: not layer.get("mediaType", "").endswith(".model"))
                names = " ".join(layer.get("digest") or "" for layer in layers)
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
                continue  # a manifest that Ollama would not list either
            digests = _DIGEST.findall(names.lower())
            if digests:
                *place, tag = file.parts[-4:]
                found[name_key(f"{'/'.join(place)}:{tag}")] = digests
        return found

    def signature(self) -> tuple | None:
        """Return what changes whenever a model does; None where that is not certain."""
        known = self._signature
        young_ns = time.time_ns() - 10**9
        try:
            # What is known is looked at first: that takes a call for each, a walk many.
            if not known or known != tuple(_stamp(path) for path, *_ in known):
                root = f"{self.path}/manifests"
                paths = [root, *(entry.path for entry in _entries_below(root))]
                known = tuple(map(_stamp, paths))
        except OSError:
            known = ()
        if any(changed_ns > young_ns for _, changed_ns, _ in known):
            known = ()  # one more change might not show
        self._signature = known
        return known or None

    def blob(self, digest: str) -> pathlib.Path:
        """Return the path of the blob with this digest (hex)."""
        return self.path / "blobs" / f"sha256-{digest}"

    def sizes(self, digests: typing.Iterable[str]) -> dict[str, int]:
        """Map these digests to their blobs' bytes, as far as they are there."""
        found = {}
        for digest in digests:
            with contextlib.suppress(OSError):
                found[digest] = self.blob(digest).stat().st_size
        return found

    def changed_ns(self) -> int:
        """Return when a blob or part was last added or removed."""
        try:
            return (self.path / "blobs").stat().st_mtime_ns
        except OSError:
            return 0

    def free_bytes(self) -> int | None:
        """Return the free bytes of the models' disk; None if there is no store."""
        try:
            return shutil.disk_usage(self.path).free
        except OSError:
            return None

    def disk(self) -> Json | None:
        """Return total, free, partial and unused bytes; None if there is no store.

        ``unused_bytes`` is what a prune would free, None where that cannot be known.
        """
        try:
            usage = shutil.disk_usage(self.path)
        except OSError:
            return None
        unused = None
        with contextlib.suppress(ServiceError, OSError):
            unused = sum(size for _, size in self._unused(PRUNE_AGE_S))
        return {
            "path": str(self.path),
            "total_bytes": usage.total,
            "free_bytes": usage.free,
            "partial_bytes": sum(map(_size, self.parts("*"))),
            "unused_bytes": unused,
        }

    def writable(self) -> bool:
        """Tell whether the service's user may write wherever a pull or a delete does."""
        for pattern in (".", "blobs", "manifests/**", "blobs/*-partial*"):
            for path in self._files(pattern):
                allowed = os.access(path, os.W_OK, effective_ids=True)
                if not allowed and path.exists():
                    return False
        return True

    def parts(self, digest: str) -> list[pathlib.Path]:
        """Return the files of an unfinished download of this digest ("*": of all)."""
        return list(self._files(f"blobs/sha256-{digest}-partial*"))

    def prune(
        self,
        older_than_s: float,
        files: "OpenFiles",
        dry_run: bool = False,
        only: set[str] | None = None,
    ) -> tuple[int, int]:
        """Remove blobs and parts that no manifest names; return (freed bytes, files).

        ``files`` are those that processes have open, ``only`` limits it to blobs of these
        digests. Raises ServiceError ``manifest_unreadable`` or ``model_being_pulled``, with
        nothing removed.
        """
        self.check_at_rest(files)
        sizes = []
        for path, size in self._unused(older_than_s):
            wanted = only is None or _digest_of(path.name) in only
            if wanted and path.name not in files.held:
                sizes.append(size)
                if not dry_run:
                    path.unlink(missing_ok=True)
        return sum(sizes), len(sizes)

    def make_old(self, digests: typing.Collection[str]) -> None:
        """Let these blobs be old enough for any prune: they are no upload under way."""
        old = time.time() - PRUNE_AGE_S
        for digest in self.sizes(digests):
            os.utime(self.blob(digest), (old, old))

    def purge(
        self,
        digests: typing.Collection[str],
        held: typing.Callable[[], set[str]],
        limit_s: float = PURGE_S,
    ) -> int:
        """Remove the parts of these digests that no process has open; return freed bytes.

        While a cancelled pull dies, Ollama may still write the record of a part, and a record
        without its data would corrupt the next pull. So this looks until none reappears, but
        no longer than ``limit_s``.
        """
        freed = quiet = 0
        deadline = time.monotonic() + limit_s
        while quiet < 2 and time.monotonic() < deadline - PURGE_PAUSE_S:
            time.sleep(PURGE_PAUSE_S)
            parts = [part for digest in digests for part in self.parts(digest)]
            quiet = 0 if parts else quiet + 1
            names = held() if parts else set()
            for part in parts:
                # A record belongs to the data, which alone is open all the time.
                if part.name not in names and part.name[:79] not in names:
                    freed += _size(part)
                    part.unlink(missing_ok=True)
        return freed

    def drop_page_cache(self) -> None:
        """Give the page cache of the blobs back: shared memory counts it as the GPU's."""
        for file in self._files("blobs/sha256-*"):
            with contextlib.suppress(OSError), file.open("rb") as f:
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def check_at_rest(self, files: "OpenFiles") -> None:
        """Refuse while Ollama writes a file of the store, or reads one that has no manifest yet."""
        named = self._named()
        new = {name for name in files.of_server if _digest_of(name) not in named}
        if any(map(_BLOB_FILE.fullmatch, files.written | new)):
            raise ServiceError(
                "model_being_pulled",
                "Ollama is at work on the model store: wait for the pull or create to end.",
            )

    def _unused(self, older_than_s: float) -> list[tuple[pathlib.Path, int]]:
        """Return (path, bytes) of what a prune may remove; no bytes where a link stays."""
        old = []
        now = time.time()
        for path in self._files("blobs/sha256-*"):
            with contextlib.suppress(FileNotFoundError):
                about = path.lstat()
                ours = stat.S_ISREG(about.st_mode) and _BLOB_FILE.fullmatch(path.name)
                if ours and now - about.st_mtime >= older_than_s:
                    old.append((path, about.st_blocks * 512 if about.st_nlink == 1 else 0))
        named = self._named()  # after the blobs: a model's manifest is written last
        return [(path, size) for path, size in old if _digest_of(path.name) not in named]

    def _named(self) -> set[str]:
        """Return every digest that any manifest file names, whatever its place and form."""
        found: set[str] = set()
        file = root = self.path / "manifests"
        try:
            for entry in _entries_below(root) if os.path.lexists(root) else ():
                if not entry.is_dir():
                    file = pathlib.Path(entry)
                    # Written anew, as a text may be in any encoding, with any escapes.
                    text = json.dumps(json.loads(file.read_bytes()))
                    found.update(_DIGEST.findall(text.lower()))
        except (OSError, ValueError, RecursionError) as e:
            raise ServiceError(
                "manifest_unreadable",
                f"A manifest cannot be read, so what its model needs is unknown: pull or delete "
                f"that model, then try again ({clean(file)}: {clean(e)}).",
            ) from e
        return found

    def _files(self, pattern: str) -> typing.Iterator[pathlib.Path]:
        """Yield what fits; pathlib's own fails where Ollama removes a folder meanwhile."""
        return map(self.path.joinpath, glob.iglob(pattern, root_dir=self.path, recursive=True))


def _entries_below(folder: str | os.PathLike[str]) -> typing.Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            yield entry
            if entry.is_dir():
                yield from _entries_below(entry)


def _stamp(path: str) -> tuple[str, int, int]:
    about = os.stat(path)
    return path, about.st_mtime_ns, about.st_size


def _digest_of(name: str) -> str:
    """Return the digest in the name of a blob or of a part of one."""
    return name[7:71].lower()


def _size(file: pathlib.Path) -> int:
    """Return the bytes that a file takes on the disk (parts are sparse), 0 if it is gone."""
    try:
        return file.stat().st_blocks * 512
    except OSError:
        return 0


# ---------------------------------------------------------------------------------------
# Processes: the server and the runners
# ---------------------------------------------------------------------------------------


class Runner(typing.NamedTuple):
    """A process that holds one model. ``process`` is its identity: pid and start time."""

    process: psutil.Process
    digest: str | None  # of the weights; None where the command line names another file
    port: str | None


class OpenFiles(typing.NamedTuple):
    """Names of files, without their folders, that the service's processes have open."""

    held: set[str]  # or mapped, by any of them
    written: set[str]
    of_server: set[str]  # which reads a blob while it verifies a pull, creates or pushes


class Processes:
    """The servers that the launcher has recorded in ``state_file``, and their runners.

    Each server leads a session of its own. By its session a runner shows whose it is, also
    when its server has died. A line of the file is "pid start restarts", the start in ticks
    since boot.
    """

    def __init__(self, state_file: str | os.PathLike):
        self.state_file = pathlib.Path(state_file)
        self._read: tuple[object, list[tuple[int, int, int]]] = (None, [])
        self._ended: psutil.Process | None = None  # the server that was last told to end

    def server(self) -> psutil.Process | None:
        """Return the running server, or None."""
        for pid, started, _ in self._records()[-1:]:
            about = _stat(pid)
            if about and about.start == started:
                with contextlib.suppress(psutil.Error):
                    server = _process(pid, started)
                    return server if about.state != "Z" or alive(server) else None
        return None

    def ever_started(self) -> bool:
        """Tell whether the launcher has started a server yet."""
        return bool(self._records())

    def ending(self, server: psutil.Process) -> bool:
        """Tell whether a server was told to end, dies, or has been reaped just now.

        At SIGTERM it takes no connection any more, and lives on until its runners have ended.
        """
        return server == self._ended or dying(server) or not alive(server)

    def restarts(self) -> int:
        """Return how often the launcher had started Ollama anew when ``server`` was called."""
        records = self._read[1]
        return records[-1][2] if records else 0

    def all(self) -> list[psutil.Process]:
        """Return every process of the recorded sessions, zombies included."""
        sessions = set()
        for pid, started, _ in self._records():
            about = _stat(pid)
            if about is None or about.start == started:  # the leader died, the rest may live
                sessions.add(pid)
        found = []
        for pid in psutil.pids():
            try:
                if os.getsid(pid) in sessions:
                    found.append(psutil.Process(pid))
            except (ProcessLookupError, psutil.Error):
                continue  # it has ended
        return found

    def runners(self) -> list[Runner]:
        """Return the living ``llama-server --model …`` and ``ollama runner --model …``."""
        found = []
        for process in self.all():
            with contextlib.suppress(psutil.Error):
                words = process.cmdline() if alive(process) else []
                if "--model" in words and ("llama-server" in words[0] or "runner" in words):
                    options = dict(itertools.pairwise(words))
                    digest = _DIGEST.search(options["--model"].lower())
                    found.append(Runner(process, digest and digest[1], options.get("--port")))
        return found

    def open_files(self) -> OpenFiles:
        """Return what the processes have open.

        Raises ServiceError ``model_being_pulled`` where one does not let itself be read.
        """
        found = OpenFiles(set(), set(), set())
        server = self.server()
        for process in [*self.all(), psutil.Process()]:
            try:
                for file in process.open_files():
                    name = os.path.basename(file.path)
                    found.held.add(name)
                    if file.mode != "r":
                        found.written.add(name)
                    if process == server:
                        found.of_server.add(name)
                found.held.update(_mapped_files(process.pid))
            except psutil.NoSuchProcess:
                continue
            except (psutil.Error, OSError) as e:
                raise ServiceError(
                    "model_being_pulled",
                    f"What process {process.pid} has open cannot be read: try again.",
                ) from e
        return found

    def end_server(self, term_s: float) -> bool:
        """End the server on purpose: the launcher starts a new one at once.

        SIGTERM gets ``term_s``, then it is SIGKILL's turn. Returns whether it is gone.
        """
        server = self.server()
        if server is None:
            return True
        self._ended = server
        pathlib.Path(f"{self.state_file}.ended").write_text(f"{server.pid}\n")
        for sig, seconds in ((signal.SIGTERM, term_s), (signal.SIGKILL, 0.5)):
            end(server, sig)
            if wait_until(lambda: not alive(server), time.monotonic() + seconds):
                return True
        return False

    def _records(self) -> list[tuple[int, int, int]]:
        """Return the lines of the file, which is another one after each start of a server."""
        try:
            about = os.stat(self.state_file)
            key = about.st_ino, about.st_mtime_ns, about.st_size
            if key != self._read[0]:
                words = map(str.split, self.state_file.read_text().splitlines())
                lines = [
                    (int(pid), int(started), int(restarts)) for pid, started, restarts in words
                ]
                self._read = key, lines
            return self._read[1]
        except (OSError, ValueError):
            return []


def alive(process: psutil.Process) -> bool:
    """Tell whether a process lives.

    A zombie is dead, unless it has other threads yet: they hold its memory.
    """
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return process.num_threads() > 1
        return process.is_running()
    except psutil.Error:
        return False


def dying(process: psutil.Process) -> bool:
    """Tell whether a process is dead and not reaped, or was killed and has not ended yet."""
    try:
        status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return False
    pending = re.findall(r"^S(?:ig|hd)Pnd:\s*(\w+)", status, re.MULTILINE)
    killed = any(int(mask, 16) >> (signal.SIGKILL - 1) & 1 for mask in pending)
    about = _stat(process.pid)
    exiting = about is not None and (about.exiting or about.state == "Z")
    return (killed or exiting) and process.is_running()


def runs(process: psutil.Process) -> bool:
    """Tell whether a process is neither dead nor stopped, by a signal or a tracer."""
    about = _stat(process.pid)
    return about is not None and about.state not in "ZXTt"


def cpu_clock_s(process: psutil.Process | None) -> float:
    """Return the CPU time of a process; NaN, which no comparison holds for, if it has none.

    Asked of its clock, as clock_getcpuclockid makes it: /proc tells it in steps of 10 ms, and
    a request takes one. What a running thread uses may show some milliseconds later.
    """
    try:
        return time.clock_gettime(~process.pid << 3 | 2) if process else math.nan
    except OSError:
        return math.nan


def end(process: psutil.Process, sig: int = signal.SIGKILL) -> None:
    """Signal a process, unless its number has passed to another."""
    with contextlib.suppress(psutil.Error):
        process.send_signal(sig)


def wait_until(condition: typing.Callable[[], object], deadline: float) -> bool:
    """Wait for the condition until ``deadline`` (monotonic); return whether it came true."""
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.02)
    return True


class _Stat(typing.NamedTuple):
    """What ``/proc/PID/stat`` says of a process."""

    state: str  # such as "S"
    exiting: bool
    start: int  # in ticks after boot


def _stat(pid: int) -> _Stat | None:
    """Return what there is of a process; None if it is gone.

    Read by hand: psutil gives the start as a time of day, which moves with the clock. Each
    request reads this, and each call lets other threads in: so these are as few as can be.
    """
    try:
        file = os.open(f"/proc/{pid}/stat", os.O_RDONLY)
        try:
            about = os.read(file, 4096)  # all of it
        finally:
            os.close(file)
    except OSError:
        return None
    words = about.rpartition(b")")[2].split()  # the name before may hold anything
    return _Stat(words[0].decode(), bool(int(words[6]) & PF_EXITING), int(words[19]))


@functools.lru_cache(1)
def _process(pid: int, _started: int) -> psutil.Process:
    """Return the process of a record; kept, as each request asks for the server."""
    return psutil.Process(pid)


def _mapped_files(pid: int) -> set[str]:
    """Return the names of the files that a process has mapped.

    Read by hand: psutil measures every mapping, which takes seconds for a large model.
    """
    lines = pathlib.Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines()
    return {line.rpartition("/")[2].removesuffix(" (deleted)") for line in lines if "/" in line}


# ---------------------------------------------------------------------------------------
# Progress: the arithmetic of a download
# ---------------------------------------------------------------------------------------


class Progress:
    """What a download has of each layer, and how fast it comes. Times are monotonic seconds."""

    def __init__(self, now: float):
        self.layers: dict[str, list[int]] = {}  # digest: [completed, total], as Ollama shows them
        self.moved_at = now  # when the last byte came
        self.part = (0, 100)  # what goes on now is from here to there of the whole work, in %
        self._percent = 0.0
        self._received = 0
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
        self._received += max(0, completed - before)
        self.layers[digest] = [completed, total]
        if len(self.layers) > LAYERS_LIMIT:
            raise ServiceError("bad_answer", "Ollama speaks of more layers than a model has.")
        if not self._speed or now - self._speed[-1][0] >= PROGRESS_S:
            self._speed.append((now, self._received))
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
            speed = int((self._received - received) / max(now - began, PROGRESS_S))
        return {
            "percent": 100.0 if state == "success" else self._percent,
            "completed_bytes": completed,
            "total_bytes": total,
            "bytes_per_second": speed,
            "eta_seconds": (total - completed) // speed if speed else None,
        }


# ---------------------------------------------------------------------------------------
# Download: one pull of one model
# ---------------------------------------------------------------------------------------


class Download:
    """One pull of one model, owned by the service; any number of listeners attach to it.

    Its ``thread``, which Downloads starts, decides on stop, stall, disk and reconnect.
    ``state`` is "running", then "success", "error" or "cancelled".
    """

    def __init__(self, tools: "Downloads", model: str, insecure: bool, verify: bool):
        self.model = model
        self.verify = verify
        self.state = "running"
        self.error: ServiceError | None = None
        self.ended_at: float | None = None
        self.thread = threading.Thread(target=self._run, name=f"pull {model}", daemon=True)
        self._tools = tools
        self._store = tools.store
        self._insecure = insecure
        self._started_at = time.time()
        self._progress = Progress(time.monotonic())
        self._stream: Stream | None = None
        self._changed = threading.Condition()  # guards all below, and the progress
        self._listeners = 0
        self._detached = False
        self._joinable = True
        self._stop: ServiceError | None = None
        self._had_news = False  # more than the manifest was seen
        self._line: Json = {"status": "starting"}
        self._said: collections.deque[Json] = collections.deque(maxlen=64)
        self._said_count = 0

    def join(self, detach: bool, verify: bool) -> typing.Iterator[Json] | None:
        """Attach a listener and return its lines; None if the download is about to end.

        Detached, it goes on without listeners, and nobody reads the lines.
        """
        with self._changed:
            if not self._joinable:
                return None
            self.verify |= verify
            self._detached |= detach
            self._listeners += not detach
            return self._lines(self._said_count)

    def leave(self) -> None:
        """Take a listener away; with the last one the download stops."""
        with self._changed:
            self._listeners -= 1
            if self._listeners == 0 and not self._detached:
                words = "The last listener left: pull again, it goes on from here."
                self.stop(ServiceError("cancelled", words))

    def stop(self, error: ServiceError) -> None:
        """End the download with this error."""
        with self._changed:
            self._joinable = False
            self._stop = self._stop or error
            self._changed.notify_all()

    def wait_for_news(self, timeout_s: float) -> None:
        """Wait until a layer was seen; raise the error of a download that ended before."""
        with self._changed:
            self._changed.wait_for(lambda: self._had_news or self.ended_at, timeout_s)
            if self.error and not self._had_news:
                raise self.error

    def reconnect(self) -> None:
        """Break the connection to Ollama; the download makes a new one."""
        if self._stream:
            self._stream.close()

    def digests(self) -> set[str]:
        """Return the digests (hex) of the layers seen so far."""
        with self._changed:
            return set(_DIGEST.findall(" ".join(self._progress.layers)))

    def summary(self) -> Json:
        """Return what ``GET /api/models/pull`` says of it."""
        with self._changed:
            return {
                "model": self.model,
                "state": self.state,
                "status": self._line["status"],
                **self._figures(),
                "listeners": self._listeners,
                "detached": self._detached,
                "error": self.error and str(self.error),
                "code": self.error and self.error.code,
                "started_at": timestamp(self._started_at),
                "ended_at": timestamp(self.ended_at),
            }

    def last_line(self) -> Json:
        """Return the one line that ends the stream."""
        if self.error:
            return {"error": str(self.error), "code": self.error.code}
        return {"status": "success", **self._figures()}

    # The listeners' side

    def _lines(self, seen: int) -> typing.Iterator[Json]:
        """Yield what is said at once, and how far it is while nothing is said."""
        with self._changed:
            joined_late = seen and self.state == "running"
            lines = [{**self._line, **self._figures()}] if joined_late else []
        yield from lines
        while self.state == "running" or seen < self._said_count:
            with self._changed:
                if seen == self._said_count:
                    self._changed.wait(LINE_S)
                new = self._said_count - seen
                seen = self._said_count
                lines = list(self._said)[-new:] if new else [{**self._line, **self._figures()}]
            yield from lines

    def _say(self, line: Json) -> None:
        with self._changed:
            self._said.append(line)
            self._said_count += 1
            self._changed.notify_all()

    def _note(self, line: Json) -> None:
        """Count a line, and show it to the listeners: a change of status at once."""
        with self._changed:
            self._progress.note(line, time.monotonic())
            is_new = line["status"] != self._line["status"]
            self._line = line
            if is_new:
                self._say({**line, **self._figures()})

    def _figures(self) -> Json:
        return self._progress.figures(time.monotonic(), self.state)

    # The owner's side

    def _run(self) -> None:
        error = None
        try:
            with file_errors():
                self._work()
        except ServiceError as e:
            error = e
            log.warning("pull %s: %s: %s", self.model, e.code, e)
        except Exception as e:
            error = ServiceError("bug", f"The download broke on a bug: {clean(e)}.")
            log.exception("pull %s: a bug", self.model)
        code = error.code if error else "success"
        with self._changed:
            self._joinable = False
            self.state = code if code in ("success", "cancelled") else "error"
            self.error = error
            self.ended_at = time.time()
            if not error:
                self._line = {"status": "success"}
            self._say(self.last_line())
        self._tools.note_end(self)

    def _work(self) -> None:
        old = self._digests_there()
        self._progress.part = (0, 50 if self.verify else 100)
        unknown = None
        try:
            self._pull()
        except ServiceError as e:
            if e.code != "model_not_found" or not self.verify or not old:
                raise
            unknown = e
        if self._is_check_wanted():
            self._check_files(unknown)
        new = self._digests_there()
        self._count_files(new, completed=True)  # Ollama shows no line of a layer that comes at once
        self._tools.remove_replaced(self.model, set(old).difference(new))

    def _is_check_wanted(self) -> bool:
        with self._changed:
            self._joinable &= self.verify  # else it is too late to join with verify
            return self.verify

    def _digests_there(self) -> list[str]:
        """Return the digests that the model's manifest names; [] if it is not there."""
        return self._store.models().get(name_key(self.model), [])

    def _count_files(self, digests: list[str], completed: bool) -> None:
        """Count these files as the layers: to check them, or as completed."""
        with self._changed:
            self._progress.set_layers(self._store.sizes(digests), completed)

    def _pull(self) -> None:
        """Pull until success, over as many connections as it takes."""
        failures = most = 0
        while True:
            try:
                return self._follow_connection()
            except ServiceError as e:
                if not self._goes_on_after(e):
                    raise
                reason = e
            completed = self._progress.completed_bytes()
            failures = 1 if completed > most else failures + 1
            most = max(most, completed)
            if failures > MAX_RECONNECTS:
                raise ServiceError(
                    reason.code,
                    f"Gave up after {MAX_RECONNECTS} reconnects without a new byte; the "
                    f"next pull goes on from here. The last reason: {reason}",
                )
            log.warning("pull %s: reconnecting: %s", self.model, reason)
            status = f"reconnecting ({failures} of {MAX_RECONNECTS})"
            self._note({"status": status, "reason": str(reason)})
            with self._changed:
                pause_s = min(RECONNECT_MAX_S, 0.5 * 2 ** (failures - 1))
                self._changed.wait_for(lambda: self._stop, pause_s)

    def _goes_on_after(self, error: ServiceError) -> bool:
        passing = ("ollama_unreachable", "ollama_timeout", "registry_unreachable")
        begun = bool(self._progress.layers)
        return error.code == "pull_interrupted" or (begun and error.code in passing)

    def _follow_connection(self) -> None:
        """Note the lines of one connection; return with Ollama's success."""
        self._progress.moved_at = time.monotonic()
        stream = self._stream = self._tools.ollama.pull(self.model, self._insecure)
        lines: queue.SimpleQueue[Json | Exception] = queue.SimpleQueue()
        threading.Thread(target=read_into, args=(lines, stream), daemon=True).start()
        try:
            while True:
                self._check_stop()
                self._check_stall()  # Ollama repeats its line meanwhile
                with contextlib.suppress(queue.Empty):
                    line = lines.get(timeout=PROGRESS_S)
                    if isinstance(line, Exception):
                        raise line
                    if line["status"] == "success":
                        return
                    self._check_disk(line)  # what does not fit is refused before it is news
                    self._had_news |= line["status"] != "pulling manifest"
                    self._note(line)
        finally:
            stream.close()

    def _check_stop(self) -> None:
        if self._stop:
            raise self._stop

    def _check_stall(self) -> None:
        fetching = self._line["status"].startswith(
            ("starting", "pulling", "reconnecting", "removed")  # else Ollama may verify
        )
        if fetching and time.monotonic() - self._progress.moved_at > STALL_S:
            raise ServiceError("pull_interrupted", f"No byte came for {STALL_S} s.")

    def _check_disk(self, line: Json) -> None:
        free = self._store.free_bytes()
        missing = line.get("total", 0) - line.get("completed", 0)  # the other layers are there
        if free is not None and missing > 0 and free - missing < DISK_RESERVE_BYTES:
            raise ServiceError(
                "disk_full",
                f"The rest of {self.model} needs {missing >> 20} MB and "
                f"{DISK_RESERVE_BYTES >> 20} MB stay free, but {self._store.path} has "
                f"{free >> 20} MB: delete a model or enlarge the disk.",
            )

    # Checking what is there

    def _check_files(self, unknown: ServiceError | None) -> None:
        """Read the model's files; remove those whose content has another digest, and pull again.

        Of a model that is ``unknown`` to the registry nothing is removed.
        """
        digests = self._digests_there()
        self._progress.part = (50, 100)
        self._count_files(digests, completed=False)
        self._had_news = True
        damaged = [digest for digest in digests if not self._is_whole(digest)]
        names = ", ".join(digest[:12] for digest in damaged)
        if unknown:
            found = f"damaged are {names}: create it anew" if damaged else "its files are undamaged"
            raise ServiceError(
                "model_damaged" if damaged else unknown.code,
                f"The registry does not know {self.model}, so nothing was removed; {found}.",
            )
        if damaged:
            for digest in damaged:
                self._store.blob(digest).unlink(missing_ok=True)
            log.warning("pull %s: removed damaged files: %s", self.model, names)
            self._note({"status": f"removed {len(damaged)} damaged: {names}"})
            self._count_files(self._digests_there(), completed=True)
            self._pull()

    def _is_whole(self, digest: str) -> bool:
        total = self._store.sizes([digest]).get(digest, 0)
        line = {"status": f"checking {digest[:12]}", "digest": f"sha256:{digest}", "total": total}
        checksum = hashlib.sha256()
        completed = 0
        self._note(line)
        try:
            with self._store.blob(digest).open("rb", buffering=0) as file:
                while piece := file.read(CHECK_BYTES):
                    self._check_stop()
                    checksum.update(piece)
                    completed += len(piece)
                    self._note({**line, "completed": completed})
        except OSError as e:
            if e.errno not in (errno.ENOENT, errno.EIO):  # missing, unreadable on the disk
                raise
        return checksum.hexdigest() == digest


def read_into(lines: "queue.SimpleQueue[Json | Exception]", stream: Stream) -> None:
    """Put a pull's lines into a queue, and at its end the exception that says why.

    It is a thread of its own: ``requests`` fixes the timeout when the request is sent, and
    Ollama is silent while it verifies.
    """
    try:
        for line in stream:
            lines.put(line)
        raise ServiceError("pull_interrupted", "Ollama ended the pull before it was done.")
    except Exception as e:
        lines.put(e)


# ---------------------------------------------------------------------------------------
# Downloads: all of them
# ---------------------------------------------------------------------------------------


class Downloads:
    """The downloads under way, at most ``limit``, and the last ended ones."""

    def __init__(self, ollama: Ollama, store: Store, processes: Processes, limit: int):
        self.ollama = ollama
        self.store = store
        self._processes = processes
        self._limit = limit
        self._lock = threading.Lock()
        self._running: dict[str, Download] = {}
        self._ended: collections.deque[Download] = collections.deque(maxlen=ENDED_KEPT)
        self._closing: ServiceError | None = None
        self.counts = {"success": 0, "error": 0, "cancelled": 0}  # since the start

    def pull(
        self, model: str, insecure: bool = False, detach: bool = False, verify: bool = False
    ) -> tuple[Download, typing.Iterable[Json]]:
        """Start a download or join the one under way; return it and its lines."""
        key = name_key(model)
        for _ in range(3):
            with self._lock:
                if self._closing:
                    raise self._closing
                download = self._running.get(key)
                if not download:
                    self._check_limit()
                    download = Download(self, model, insecure, verify)
                lines = download.join(detach, verify)  # before it starts: it may fail at once
                if key not in self._running:
                    download.thread.start()
                    self._running[key] = download
            if lines is not None:
                return download, lines
            download.thread.join(2)
        raise ServiceError(
            "model_being_pulled",
            "A download of this model is just being cancelled: try again.",
        )

    def cancel(self, model: str, purge: bool = False) -> int:
        """Cancel a download; return the bytes that ``purge`` freed of its parts.

        The last one that failed can be purged too.
        """
        began = time.monotonic()
        key = name_key(model)
        states = ("running", "error", "cancelled") if purge else ("running",)
        with self._lock:
            known = [*self._ended, *self._running.values()]
        found = [each for each in known if name_key(each.model) == key and each.state in states]
        if not found:
            raise ServiceError(
                "no_such_pull",
                f"No download of {model} is under way: GET /api/models/pull lists them.",
            )
        download = found[-1]
        words = "Cancelled by request: the next pull goes on from what is there."
        download.stop(ServiceError("cancelled", words))
        download.thread.join(2)
        if not purge:
            return 0
        others = [each for each in known if each.state == "running" and each is not download]
        shared = set().union(*(each.digests() for each in others))  # they may be closed just now
        with file_errors():
            return self.store.purge(
                download.digests() - shared,
                lambda: self._processes.open_files().held,
                PURGE_S - (time.monotonic() - began),
            )

    def list(self) -> list[Json]:
        """Return the summaries: those under way, then the ended ones, newest first."""
        with self._lock:
            downloads = [*self._running.values(), *reversed(self._ended)]
        return [download.summary() for download in downloads]

    def running_count(self) -> int:
        """Return how many downloads are under way."""
        return len(self._running)

    def running(self, model: str) -> bool:
        """Tell whether this model is being downloaded."""
        return name_key(model) in self._running

    def prune(self, older_than_s: float, dry_run: bool) -> tuple[int, int]:
        """Remove what no model uses, once nothing of the store has been in use for a while.

        Between two files of a pull Ollama has none open, for a moment. Returns (freed bytes,
        files). Raises ServiceError ``model_being_pulled``, ``manifest_unreadable``.
        """
        until = time.monotonic() + (0 if dry_run else SETTLED_S)
        while True:
            with self._lock, file_errors():
                if self._running:
                    raise ServiceError(
                        "model_being_pulled",
                        "A download is under way: wait for its end, or cancel it.",
                    )
                files = self._processes.open_files()
                self.store.check_at_rest(files)
                if time.monotonic() >= until:
                    return self.store.prune(older_than_s, files, dry_run)
            time.sleep(0.05)

    def remove_replaced(self, model: str, digests: set[str]) -> None:
        """Remove these blobs of a model's old version; what may be needed yet is unused then."""
        if not digests:
            return
        try:
            with self._lock, file_errors():
                self.store.make_old(digests)
                if len(self._running) == 1:  # this one
                    self.store.prune(0, self._processes.open_files(), only=digests)
        except ServiceError as e:
            log.warning("pull %s: the old version stays: %s", model, e)

    def reconnect(self) -> None:
        """Break every download's connection: before Ollama is ended, so that it keeps the parts."""
        for download in list(self._running.values()):
            download.reconnect()

    def close(self) -> None:
        """End all downloads: the service stops."""
        words = "The service is stopping: pull again later, it goes on from here."
        with self._lock:
            self._closing = ServiceError("shutting_down", words)
            downloads = list(self._running.values())
        for download in downloads:
            download.stop(self._closing)

    def note_end(self, download: Download) -> None:
        """Move a download to the ended ones."""
        with self._lock:
            del self._running[name_key(download.model)]
            self._ended.append(download)
            self.counts[download.state] += 1

    def _check_limit(self) -> None:
        if len(self._running) >= self._limit:
            raise ServiceError(
                "too_many_pulls",
                f"{self._limit} downloads are under way: wait for one, cancel one, or "
                "raise LLM_MAX_PULLS.",
            )
