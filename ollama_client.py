"""All that knows Ollama: its API, its model store, its processes and its downloads.

`Ollama` is a thin client of the HTTP API, `Store` reads the models' files, `Processes` finds and
ends what the launcher started, `Downloads` owns the pulls that callers listen to.
"""

import collections
import contextlib
import datetime
import glob
import json
import logging
import os
import pathlib
import re
import shutil
import signal
import threading
import time
import urllib.parse

import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import HTTPError

CONNECT_S = 1
ANSWER_S = 4  # callers, too, have a limit: the watchdog's is 5 s
LOAD_S = 600
VERIFY_S = 1800  # Ollama is silent while it verifies: minutes for tens of gigabytes
STALL_S = 25  # at 30 s Ollama starts a silent part anew and drops what it had of it; a reconnect keeps it
MAX_RECONNECTS = 10
RECONNECT_MAX_S = 8
HEARTBEAT_S = 0.8  # two writes tell that a listener has left: below 2 s together
PROGRESS_S = 0.2
SPEED_WINDOW_S = 10
DISK_RESERVE_BYTES = 1 << 30
ANSWER_LIMIT_BYTES = 1 << 25
LINE_LIMIT_BYTES = 1 << 18
LAYERS_LIMIT = 1000
ENDED_KEPT = 20
ENDED_KEPT_S = 3600
TICKS = os.sysconf("SC_CLK_TCK")

STATUS = {  # of the codes that are not 502, "Ollama or the registry answered with an error"
    "bad_model_name": 400, "model_not_found": 404, "no_such_pull": 404, "model_busy": 409,
    "model_being_pulled": 409, "cancelled": 409, "too_many_pulls": 429, "bug": 500,
    "ollama_unreachable": 503, "shutting_down": 503, "ollama_timeout": 504, "disk_full": 507,
}
FAILURES = [  # what an error of Ollama's says, our code for it, what to do about it
    (r"insecure protocol|HTTP response to HTTPS|not look like a TLS handshake", "registry_insecure",
     'send "insecure": true for a registry without TLS'),
    (r"invalid model name|name .* is invalid|not both", "bad_model_name", "check the name"),
    (r"no space left", "disk_full", "delete a model or enlarge the disk, then pull again"),
    (r"file does not exist|not found", "model_not_found", "check the name and the tag"),
    (r"digest mismatch", "digest_mismatch", "the data was damaged on its way: pull again"),
    (r"context canceled|max retries exceeded|unexpected EOF|connection reset|broken pipe",
     "pull_interrupted", "pull again: it goes on from here"),
    (r"no such host|connection refused|i/o timeout|unreachable|no route|deadline exceeded|"
     r"server misbehaving|TLS handshake|\bEOF\b", "registry_unreachable", "check the network and the registry's name"),
    (r"-partial", "parts_damaged", 'DELETE /api/models/pull with "purge": true, then pull again'),
]

log = logging.getLogger("llm-service")


class OllamaError(Exception):
    """Root of this module's errors: a sentence that says what to do, a machine word, its HTTP status."""

    def __init__(self, code, message):
        super().__init__(message)
        self.code, self.status = code, STATUS.get(code, 502)


_WORD = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}"
_NAME = re.compile(
    r"(?:(?:(?:https?://)?(?P<host>[A-Za-z0-9_][A-Za-z0-9_.:-]{0,349})/)?"
    rf"(?P<namespace>[A-Za-z0-9_][A-Za-z0-9_-]{{0,79}})/)?(?P<model>{_WORD})"
    rf"(?::(?P<tag>{_WORD}))?(?P<source>:(?:cloud|local))?")
_DIGEST = re.compile(r"sha256[:-]([0-9a-f]{64})")


def check_name(name):
    """Return the model name as Ollama takes it. Raises OllamaError `bad_model_name`."""
    name = name.strip(" \t\r\n") if isinstance(name, str) else ""
    if not _NAME.fullmatch(name):
        raise OllamaError("bad_model_name", '"model" must be a model name such as llama3.1:8b, '
                          "user/model:tag or hf.co/org/repo:Q4_K_M.")
    return name


def name_key(name):
    """Reduce a name to what Ollama takes for the same model: defaults left out, case ignored."""
    parts = _NAME.fullmatch(name.lower())
    if not parts:
        return name.lower()
    host, namespace = parts["host"] or "registry.ollama.ai", parts["namespace"] or "library"
    place = f"{host}/{namespace}/".removeprefix("registry.ollama.ai/").removeprefix("library/")
    return f"{place}{parts['model']}:{parts['tag'] or 'latest'}{parts['source'] or ''}"


def dial_url(ollama_host):
    """Turn OLLAMA_HOST, in any of the ways that Ollama takes it, into the URL to dial."""
    scheme, _, rest = ollama_host.strip(" '\"").rpartition("://")
    if rest.count(":") > 1 and not rest.startswith("["):
        rest = f"[{rest}]"
    split, default = urllib.parse.urlsplit(f"//{rest}"), {"http": 80, "https": 443}.get(scheme, 11434)
    host = {None: "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(split.hostname, split.hostname)
    try:
        port = split.port or default
    except ValueError:  # Ollama, too, takes its default instead
        port = default
    return f"{scheme or 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


def timestamp(seconds):
    """Format a Unix time as ISO 8601 UTC; None stays None."""
    return seconds and datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).isoformat(timespec="seconds")


class Ollama:
    """A client of Ollama's API at `url`; its methods raise OllamaError, after `timeout_s` at the latest."""

    def __init__(self, url):
        self.url = url
        self._session = requests.Session()
        self._session.trust_env = False  # a proxy in the environment is not for loopback
        self._session.mount(url, HTTPAdapter(pool_maxsize=64))
        self._prepared = {}
        self.answered_at = float("-inf")  # by time.monotonic(), the last time

    def version(self, timeout_s=ANSWER_S):
        """Return the server's version, such as "0.34.4"."""
        return self._json("GET", "/api/version", timeout_s=timeout_s).get("version")

    def tags(self, timeout_s=ANSWER_S):
        """Return the models on disk: `[{"name", "size", "modified_at", "digest", "details"}]`."""
        return self._models("/api/tags", timeout_s)

    def ps(self, timeout_s=ANSWER_S):
        """Return the loaded models: `[{"name", "size", "size_vram", "context_length", "expires_at"}]`."""
        return self._models("/api/ps", timeout_s)

    def load(self, model, timeout_s=LOAD_S):
        """Load a model; by `/api/embed` one that cannot generate."""
        try:
            self._json("POST", "/api/generate", {"model": model}, timeout_s)
        except OllamaError as e:
            if "does not support generate" not in str(e):
                raise
            self._json("POST", "/api/embed", {"model": model, "input": []}, timeout_s)

    def unload(self, model, timeout_s=ANSWER_S):
        """Ask for the model's memory back. Ollama says yes at once, whatever comes of it."""
        self._json("POST", "/api/generate", {"model": model, "keep_alive": 0}, timeout_s)

    def one_token(self, model, context_length, timeout_s):
        """Generate one token, with the context it was loaded with: another value reloads it."""
        self._json("POST", "/api/generate", {
            "model": model, "prompt": "Hi", "raw": True, "stream": False,
            "options": {"num_predict": 1, "num_ctx": context_length}}, timeout_s)

    def delete(self, model, timeout_s=ANSWER_S):
        """Delete a model's manifest, and the blobs that no other model shares."""
        self._request("DELETE", "/api/delete", {"model": model}, timeout_s).close()

    def pull(self, model, insecure=False):
        """Start or join a pull; return its progress as a `Stream`."""
        return Stream(self._request("POST", "/api/pull", {
            "model": model, "insecure": insecure, "stream": True}, VERIFY_S))

    def runner_answers(self, port, timeout_s=1):
        """Tell whether a runner answers on its own port, which it does while it generates."""
        try:
            self._request("GET", f"http://127.0.0.1:{port}/health", timeout_s=timeout_s).close()
        except OllamaError as e:
            return e.code not in ("ollama_timeout", "ollama_unreachable")
        return True

    def _models(self, path, timeout_s):
        models = self._json("GET", path, timeout_s=timeout_s).get("models")
        if not isinstance(models, list) or not all(isinstance(m, dict) and isinstance(m.get("name"), str)
                                                   and isinstance(m.get("digest", ""), str) for m in models):
            raise OllamaError("bad_answer", f"Ollama's answer to {path} is not a list of models.")
        return models

    def _json(self, method, path, body=None, timeout_s=ANSWER_S):
        deadline = time.monotonic() + timeout_s
        with self._request(method, path, body, timeout_s) as response:
            try:
                answer = json.loads(_read(response, deadline))
            except (ValueError, RecursionError):
                answer = None
        if not isinstance(answer, dict):
            raise OllamaError("bad_answer", f"The answer to {path} is no JSON object: is {self.url} an Ollama?")
        return answer

    def _request(self, method, path, body=None, timeout_s=ANSWER_S):
        request = self._prepared.get((method, path)) if body is None else None
        if request is None:
            url = urllib.parse.urljoin(self.url, path)
            request = self._session.prepare_request(requests.Request(method, url, json=body))
            if body is None and path.startswith("/"):
                self._prepared[method, path] = request
        try:
            response = self._session.send(request, timeout=(min(CONNECT_S, timeout_s), timeout_s),
                                          stream=True, allow_redirects=False)
        except requests.Timeout as e:
            raise OllamaError("ollama_timeout", "Ollama did not answer in time: if it stays so, "
                              "POST /api/session/reset.") from e
        except requests.RequestException as e:
            raise OllamaError("ollama_unreachable", f"Ollama is not reachable at {self.url}: if it is not "
                              "just starting, POST /api/session/reset.") from e
        if path.startswith("/"):  # else a runner's
            self.answered_at = time.monotonic()
        if response.status_code >= 300:
            with response:
                raise _error(response)
        return response


def _read(response, deadline):
    pieces, size = [], 0
    try:
        while piece := response.raw.read1(1 << 20, decode_content=True):
            pieces.append(piece)
            size += len(piece)
            if size > ANSWER_LIMIT_BYTES:
                raise OllamaError("bad_answer", "Ollama's answer is larger than this service reads.")
            if time.monotonic() > deadline:
                raise OllamaError("ollama_timeout", "Ollama's answer took too long: try again.")
    except (HTTPError, OSError) as e:
        raise OllamaError("ollama_timeout", "Ollama broke off in mid-answer: try again.") from e
    return b"".join(pieces)


def _error(response):
    try:
        message = json.loads(_read(response, time.monotonic() + ANSWER_S))["error"]
    except (ValueError, KeyError, TypeError, RecursionError, OllamaError):
        return OllamaError("bad_answer", f"Ollama answered {response.status_code} without a reason: see its log.")
    if response.status_code == 404:
        return OllamaError("model_not_found", f"{_clean(message)}: GET /api/models lists what is downloaded.")
    return _failure(message)


def _failure(message):
    for pattern, code, advice in FAILURES:
        if re.search(pattern, str(message), re.I):
            return OllamaError(code, f"{_clean(message)}: {advice}.")
    return OllamaError("ollama_error", f"Ollama says: {_clean(message)}.")


def _clean(text):
    """Keep a text from outside to one short printable line."""
    return re.sub(r"[^\x20-\x7e\u00a0-\ud7ff]", " ", str(text))[:300].strip().rstrip(".")


class Stream:
    """The progress lines of one pull, as dicts; `close` may be called from another thread.

    Raises the error that a line carries, `pull_interrupted` where the connection breaks,
    `bad_answer` for what is no progress line.
    """

    def __init__(self, response):
        self._response = response

    def __iter__(self):
        rest = b""
        try:
            for chunk in self._response.iter_content(1 << 16):
                *lines, rest = (rest + chunk).split(b"\n")
                if len(rest) > LINE_LIMIT_BYTES:
                    raise OllamaError("bad_answer", "Ollama sent a progress line without an end.")
                yield from map(_progress, filter(None, lines))
            if rest:
                yield _progress(rest)
        except (requests.RequestException, AttributeError) as e:  # the latter: closed meanwhile
            raise OllamaError("pull_interrupted", "The connection to Ollama broke: pull again, it goes on from here.") from e
        finally:
            self._response.close()

    def close(self):
        try:
            self._response.raw.shutdown()
        except (OSError, ValueError, RuntimeError):
            pass  # it has ended by itself


def _progress(line):
    try:
        progress = json.loads(line)
        if "error" in progress:
            raise _failure(progress["error"])
        sizes = [progress.get("total", 0), progress.get("completed", 0)]
        words = [progress["status"], progress.get("digest", "")]
        if any(type(n) is not int or not 0 <= n < 1 << 63 for n in sizes) or not all(isinstance(w, str) for w in words):
            raise ValueError("not Ollama's types")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise OllamaError("bad_answer", "Ollama sent something that is not a progress line.") from e
    return progress


class Store:
    """The model files under OLLAMA_MODELS, read without asking Ollama."""

    def __init__(self, path):
        self.path = pathlib.Path(path)

    def models(self):
        """Map each model's `name_key` to the digests of its blobs, the model layer first."""
        root, found = self.path / "manifests", {}
        for file in glob.iglob("*/*/*/*", root_dir=root):  # pathlib's fails where Ollama removes a folder meanwhile
            try:
                manifest = json.loads((root / file).read_bytes())
                layers = sorted(manifest["layers"], key=lambda layer: not layer["mediaType"].endswith(".model"))
                digests = [_DIGEST.fullmatch(blob["digest"])[1] for blob in [*layers, manifest["config"]]]
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
                continue  # a manifest that Ollama would not list either
            place, _, tag = file.rpartition("/")
            found[name_key(f"{place}:{tag}")] = digests
        return found

    def sizes(self, digests):
        """Map these blobs' digests to their bytes, as far as they are there."""
        found = {}
        for digest in digests:
            with contextlib.suppress(OSError):
                found[digest] = (self.path / "blobs" / f"sha256-{digest}").stat().st_size
        return found

    def signature(self):
        """Return what changes whenever a model is added, changed or deleted; None where that is not certain."""
        try:
            found = tuple(sorted(_entries(self.path / "manifests", 4)))
        except OSError:
            return None
        # A file changed twice within one tick of the clock would look the same.
        latest = max(changed_ns for _, changed_ns, _ in found)
        return found if time.time() - latest / 1e9 > 1 else None

    def free_bytes(self):
        """Return the free bytes of the models' disk; None if the store is elsewhere."""
        try:
            return shutil.disk_usage(self.path).free
        except OSError:
            return None

    def disk(self):
        """Return `{"path", "total_bytes", "free_bytes", "partial_bytes"}`; None if the store is elsewhere."""
        if (free := self.free_bytes()) is None:
            return None
        return {"path": str(self.path), "total_bytes": shutil.disk_usage(self.path).total, "free_bytes": free,
                "partial_bytes": sum(map(_size, self._parts("*")))}

    def purge(self, digests):
        """Remove the parts of these blobs; return the bytes that came free.

        While a cancelled pull dies, Ollama may still write the record of a part, and a record
        without its data would corrupt the next pull: so this looks again until none reappears.
        """
        freed, quiet = 0, 0
        while quiet < 2:
            time.sleep(0.3)
            parts = [part for digest in digests for part in self._parts(digest)]
            quiet = 0 if parts else quiet + 1
            for part in parts:
                freed += _size(part)
                part.unlink(missing_ok=True)
        return freed

    def drop_page_cache(self):
        """Give the page cache of the blobs back: shared memory counts it as used by the GPU."""
        for file in (self.path / "blobs").glob("sha256-*"):
            with contextlib.suppress(OSError), file.open("rb") as f:
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def _parts(self, digest):
        return (self.path / "blobs").glob(f"sha256-{digest}-partial*")


def _entries(folder, depth):
    """Yield (path, changed_ns, size) of a folder and of all in it; os.scandir, for this is on the hot path."""
    yield str(folder), os.stat(folder).st_mtime_ns, 0
    with os.scandir(folder) as entries:
        for entry in entries:
            if depth > 1 and entry.is_dir():
                yield from _entries(entry.path, depth - 1)
            elif depth == 1:
                stat = entry.stat()
                yield entry.path, stat.st_mtime_ns, stat.st_size


def _size(file):
    """Return the bytes that a file takes on the disk (parts are sparse), 0 if it is gone."""
    try:
        return file.stat().st_blocks * 512
    except OSError:
        return 0


Process = collections.namedtuple("Process", "pid started parent state")  # started: in ticks after boot
Runner = collections.namedtuple("Runner", "process digest port")


class Processes:
    """The Ollama servers that the launcher recorded in `state_file`, and their runners.

    Each server runs in a session of its own: by its session a runner shows whose it is also when
    its server has died. Without a state file the Ollama is not ours: nothing is found or ended.
    """

    def __init__(self, state_file):
        self.managed = bool(state_file)
        self._state_file = pathlib.Path(state_file or os.devnull)

    def server(self):
        """Return the running server's Process, or None."""
        records = self._records()
        return _process(*records[-1][:2]) if records else None

    def launched(self):
        """Tell whether the launcher has started a server at all."""
        return bool(self._records())

    def restarts(self):
        """Return how often the launcher has started Ollama anew."""
        records = self._records()
        return records[-1][2] if records else 0

    def all(self):
        """Return every living Process of the recorded sessions."""
        sessions = {pid for pid, started, _ in self._records()
                    if (leader := _stat(pid)) is None or leader.started == started}
        found = []
        for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if sessions else ():
            with contextlib.suppress(ProcessLookupError):
                if os.getsid(pid) in sessions and (process := _process(pid)):
                    found.append(process)
        return found

    def runners(self):
        """Return a Runner for each `llama-server --model …` or `ollama runner …` among them."""
        found = []
        for process in self.all():
            try:
                words = pathlib.Path(f"/proc/{process.pid}/cmdline").read_text(errors="replace").split("\0")
            except OSError:
                continue
            if "--model" in words and ("llama-server" in words[0] or "runner" in words):
                options = dict(zip(words, words[1:]))
                digest = _DIGEST.search(options["--model"])
                found.append(Runner(process, digest and digest[1], options.get("--port")))
        return found

    def alive(self, process):
        return _process(process.pid, process.started) is not None

    def uptime_s(self, process):
        return time.clock_gettime(time.CLOCK_BOOTTIME) - process.started / TICKS

    def end(self, process, sig=signal.SIGKILL):
        """Signal a process, unless its number has passed to another."""
        if self.alive(process):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, sig)

    def end_server(self, term_s):
        """End the server on purpose, so that the launcher starts a new one at once.

        SIGTERM gets `term_s`, then it is SIGKILL's turn. Returns whether the server is gone.
        """
        server = self.server()
        if server is None:
            return True
        self._state_file.with_name(f"{self._state_file.name}.ended").write_text(f"{server.pid}\n")
        for sig, seconds in ((signal.SIGTERM, term_s), (signal.SIGKILL, 0.5)):
            deadline = time.monotonic() + seconds
            self.end(server, sig)
            while time.monotonic() < deadline:
                if not self.alive(server):
                    return True
                time.sleep(0.02)
        return False

    def _records(self):
        try:
            words = map(str.split, self._state_file.read_text().splitlines())
            return [(int(pid), int(started), int(restarts)) for pid, started, restarts in words]
        except (OSError, ValueError):
            return []


def _stat(pid):
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    fields = stat.rpartition(b")")[2].split()  # the name before may hold anything
    return Process(pid, int(fields[19]), int(fields[1]), fields[0].decode())


def _process(pid, started=None):
    """Return the Process, or None if it is dead or, by its start time, another.

    A zombie is dead once its other threads are gone too: until then they hold the memory.
    """
    process = _stat(pid)
    if process is None or started not in (None, process.started):
        return None
    try:
        return process if process.state not in "ZX" or len(os.listdir(f"/proc/{pid}/task")) > 1 else None
    except OSError:
        return None


class Download:
    """One pull of one model, owned by the service; any number of listeners attach to it.

    A link thread reads Ollama's stream and may hang; the download's own thread watches it,
    reconnects, and decides the one end: `state` "success", "error" or "cancelled".
    """

    def __init__(self, ollama, store, model, insecure, on_end):
        self.model, self.insecure = model, insecure
        self.state, self.error, self.ended_at = "running", None, None
        self.layers = {}  # digest: [completed, total], in the manifest's order
        self.known = threading.Event()  # how it stands: a layer was seen, or it has ended
        self.ended = threading.Event()
        self._ollama, self._store, self._on_end = ollama, store, on_end
        self._listeners, self._detached, self._started_at = 0, False, time.time()
        self._changed = threading.Condition()
        self._line, self._said, self._said_count = {"status": "starting"}, collections.deque(maxlen=64), 0
        self._link, self._stop = None, None
        self._percent, self._received, self._moved_at = 0.0, 0, time.monotonic()
        self._speed = collections.deque()
        threading.Thread(target=self._run, name=f"pull {model}", daemon=True).start()

    def join(self, detach):
        """Attach a listener and return its lines; None if the download is about to end.

        Detached, there are no lines, and the download goes on without listeners.
        """
        with self._changed:
            if self._stop or self.state != "running":
                return None
            self._detached = self._detached or detach
            self._listeners += not detach
            return () if detach else self._lines(self._said_count)

    def leave(self):
        """Take a listener away; with the last one the download stops."""
        with self._changed:
            self._listeners -= 1
            if self._listeners == 0 and not self._detached:
                self.stop(OllamaError("cancelled", "The last listener left: pull again, it goes on from here."))

    def stop(self, error):
        """End the download with this error; `ended` tells when it has."""
        with self._changed:
            self._stop = self._stop or error
            self._changed.notify_all()

    def summary(self):
        """Return what `GET /api/models/pull` says of it."""
        with self._changed:
            return {"model": self.model, "state": self.state, "status": self._line["status"], **self._figures(),
                    "listeners": self._listeners, "detached": self._detached,
                    "error": self.error and str(self.error), "code": self.error and self.error.code,
                    "started_at": timestamp(self._started_at), "ended_at": timestamp(self.ended_at)}

    def last_line(self):
        if self.error:
            return {"error": str(self.error), "code": self.error.code}
        return {"status": "success", **self._figures()}

    def take(self, link, progress):
        """Note one of Ollama's progress lines, unless its link was given up."""
        digest, status, now = progress.get("digest"), progress["status"], time.monotonic()
        with self._changed:
            if link is not self._link:
                return
            if digest:
                total = progress.get("total", 0)
                before, self.layers[digest] = self.layers.get(digest), [min(progress.get("completed", 0), total), total]
                gained = self.layers[digest][0] - before[0] if before else 0
                self._received += max(0, gained)
                if gained > 0 or not before:
                    self._moved_at = now
                if len(self.layers) > LAYERS_LIMIT:
                    raise OllamaError("bad_answer", "Ollama speaks of more layers than a model has.")
            if digest or not status.startswith("pulling"):
                for layer, sizes in self.layers.items():
                    if layer == digest:
                        break
                    sizes[0] = sizes[1]  # Ollama has gone on: a layer's last line may stay below its total
            if not self._speed or now - self._speed[-1][0] >= PROGRESS_S:
                self._speed.append((now, self._received))
                while now - self._speed[0][0] > SPEED_WINDOW_S:
                    self._speed.popleft()
            changed = status != self._line["status"]
            self._line = {k: progress[k] for k in ("status", "digest", "total", "completed") if k in progress}
            if changed:
                self._say(self._line)
        if changed and digest:
            self._guard_disk()
        if digest or not status.startswith("pulling"):
            self.known.set()

    def reconnect(self):
        if self._link:
            self._link.close()

    def wake(self):
        with self._changed:
            self._changed.notify_all()

    def _lines(self, seen):
        shown, shown_at, late = None, 0, seen > 0
        while True:
            with self._changed:
                if shown or not late:
                    self._changed.wait_for(lambda: self._said_count > seen or self.ended.is_set(), PROGRESS_S)
                lines = list(self._said)[seen - self._said_count:] if self._said_count > seen else []
                seen, line, ended = self._said_count, self._line, self.state != "running"
                if not lines and not ended and (line is not shown or time.monotonic() - shown_at >= HEARTBEAT_S):
                    lines = [{**line, **self._figures()}]
            if lines:
                yield from lines
                shown, shown_at = line, time.monotonic()
            if ended:
                yield self.last_line()
                return

    def _say(self, line):
        self._line = line
        self._moved_at = time.monotonic()
        self._said.append({**line, **self._figures()})
        self._said_count += 1
        self._changed.notify_all()

    def _figures(self):
        completed, total = (sum(sizes) for sizes in zip([0, 0], *self.layers.values()))
        if total:
            self._percent = max(self._percent, min(99.9, completed * 1000 // total / 10))
        speed = 0
        if self._speed and self.state == "running":
            began, received = self._speed[0]
            speed = int((self._received - received) / max(time.monotonic() - began, PROGRESS_S))
        return {"percent": 100.0 if self.state == "success" else self._percent, "completed_bytes": completed,
                "total_bytes": total, "bytes_per_second": speed, "eta_seconds": (total - completed) // speed if speed else None}

    def _run(self):
        error = _error_of(self.model, self._pull)
        if error:
            log.log(logging.INFO if error.code == "cancelled" else logging.WARNING,
                    "pull %s: %s: %s", self.model, error.code, error)
        with self._changed:
            if not error:  # Ollama shows no line of a layer that comes at once
                blobs = self._store.sizes(self._store.models().get(name_key(self.model), ()))
                self.layers.update({f"sha256:{digest}": [size, size] for digest, size in blobs.items()})
                self._line = {"status": "success"}
            self.error, self.ended_at = error, time.time()
            self.state = "success" if not error else "cancelled" if error.code == "cancelled" else "error"
        self._on_end(self)
        self.ended.set()
        self.known.set()
        self.wake()

    def _pull(self):
        failures, mark = 0, 0
        while True:
            link = self._link = _Link(self._ollama, self)
            try:
                return self._watch(link)
            except OllamaError as e:
                begun = self.layers and e.code in ("ollama_unreachable", "ollama_timeout", "registry_unreachable")
                if e.code != "pull_interrupted" and not begun:
                    raise
                completed = self._figures()["completed_bytes"]
                failures, mark = (1, completed) if completed > mark else (failures + 1, mark)
                if failures > MAX_RECONNECTS:
                    raise OllamaError(e.code, f"Gave up after {MAX_RECONNECTS} reconnects without a new byte; "
                                      f"the next pull goes on from here. The last reason: {e}") from e
                log.warning("pull %s: reconnecting: %s", self.model, e)
                with self._changed:
                    self._say({"status": f"reconnecting ({failures} of {MAX_RECONNECTS}): {e}"})
                    self._changed.wait_for(lambda: self._stop, min(RECONNECT_MAX_S, 0.5 * 2 ** (failures - 1)))
            finally:
                link.close()

    def _watch(self, link):
        while link.outcome is None:
            with self._changed:
                self._changed.wait_for(lambda: link.outcome or self._stop, 1)
                silent_s, status = time.monotonic() - self._moved_at, self._line["status"]
            if self._stop:
                raise self._stop
            self._guard_disk()
            if silent_s > STALL_S and status.startswith(("pulling", "starting", "reconnecting")):
                raise OllamaError("pull_interrupted", f"No byte came for {STALL_S} s.")
        if link.outcome is not True:
            raise link.outcome

    def _guard_disk(self):
        free, layers = self._store.free_bytes(), list(self.layers.values())
        missing = sum(total - completed for completed, total in layers)
        if free is not None and missing and free - missing < DISK_RESERVE_BYTES:
            raise OllamaError("disk_full", f"The rest of {self.model} needs {missing >> 20} MB and "
                              f"{DISK_RESERVE_BYTES >> 20} MB stay free, but {self._store.path} has {free >> 20} MB: "
                              "delete a model or enlarge the disk.")


class _Link(threading.Thread):
    """The reader of one connection; its `outcome` becomes True for success, or an OllamaError."""

    def __init__(self, ollama, download):
        super().__init__(name=f"link {download.model}", daemon=True)
        self.outcome, self._stream, self._closed = None, None, False
        self._ollama, self._download = ollama, download
        self.start()

    def run(self):
        self.outcome = _error_of(self._download.model, self._read) or True
        self._download.wake()

    def _read(self):
        self._stream = self._ollama.pull(self._download.model, self._download.insecure)
        if self._closed:
            self._stream.close()
        for progress in self._stream:
            if progress["status"] == "success":
                return
            self._download.take(self, progress)
        raise OllamaError("pull_interrupted", "Ollama ended the pull without success: pull again, it goes on from here.")

    def close(self):
        self._closed = True
        if self._stream:
            self._stream.close()


def _error_of(model, work):
    """Do the work; return the OllamaError that it ended with, or None."""
    try:
        work()
    except OllamaError as e:
        return e
    except Exception as e:
        log.exception("pull %s: a bug", model)
        return OllamaError("bug", f"The download broke on a bug: {_clean(e)}.")


class Downloads:
    """The downloads under way, at most `limit`, and the last ended ones."""

    def __init__(self, ollama, store, limit):
        self._ollama, self._store, self._limit = ollama, store, limit
        self._lock = threading.Lock()
        self._running, self._ended = {}, collections.deque(maxlen=ENDED_KEPT)
        self._closing = None

    def pull(self, model, insecure=False, detach=False):
        """Start a download or join the one under way; return it and its lines. Raises OllamaError."""
        key = name_key(model)
        for _ in range(3):
            with self._lock:
                if self._closing:
                    raise self._closing
                if key not in self._running:
                    if len(self._running) >= self._limit:
                        raise OllamaError("too_many_pulls", f"{self._limit} downloads are under way: wait for one, "
                                          "cancel one, or raise LLM_MAX_PULLS.")
                    self._running[key] = Download(self._ollama, self._store, model, insecure, self._on_end)
                download = self._running[key]
                lines = download.join(detach)
            if lines is not None:
                return download, lines
            download.ended.wait(2)
        raise OllamaError("model_being_pulled", "A download of this model is just being cancelled: try again.")

    def cancel(self, model, purge=False):
        """Cancel a download; return the bytes that `purge` freed of its parts. Raises OllamaError."""
        key = name_key(model)
        with self._lock:
            unfinished = [d for d in self._ended if name_key(d.model) == key and d.state != "success"]
            download = self._running.get(key) or (unfinished[-1] if purge and unfinished else None)
        if download is None:
            raise OllamaError("no_such_pull", f"No download of {model} is under way: GET /api/models/pull lists them.")
        next_pull = "its parts are removed" if purge else "pull again, it goes on from here"
        download.stop(OllamaError("cancelled", f"Cancelled by request: {next_pull}."))
        download.ended.wait(2)
        with self._lock:
            others = {digest for d in self._running.values() for digest in d.layers}
        digests = [found[1] for found in map(_DIGEST.fullmatch, set(download.layers) - others) if found]
        return self._store.purge(digests) if purge else 0

    def list(self):
        """Return the summaries: those under way, then the ended ones, newest first."""
        with self._lock:
            while self._ended and time.time() - self._ended[0].ended_at > ENDED_KEPT_S:
                self._ended.popleft()
            downloads = [*self._running.values(), *reversed(self._ended)]
        return [download.summary() for download in downloads]

    def reconnect(self):
        """Break every download's connection: before Ollama is ended, so that it keeps the parts."""
        for download in list(self._running.values()):
            download.reconnect()

    def running(self, model):
        return name_key(model) in self._running

    def close(self):
        """End all downloads: the service stops."""
        with self._lock:
            self._closing = OllamaError("shutting_down", "The service is stopping: pull again later, it goes on from here.")
            downloads = list(self._running.values())
        for download in downloads:
            download.stop(self._closing)

    def _on_end(self, download):
        with self._lock:
            del self._running[name_key(download.model)]
            self._ended.append(download)
