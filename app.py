"""The LLM Service: a management API beside Ollama.

It lists, downloads and deletes models, tells the truth about the machine, and gets GPU memory
back when things go wrong. gunicorn serves it and reads its own settings from here too
(``gunicorn -c python:app app:app``). There is one worker, so that all state is in one place.
"""

import collections
import concurrent.futures
import contextlib
import datetime
import errno
import functools
import gc
import hmac
import ipaddress
import json
import logging
import os
import pathlib
import re
import socket
import struct
import sys
import threading
import time
import types
import typing
import urllib.parse

import psutil
from flask import Flask, Response, request
from gunicorn.glogging import Logger
from gunicorn.http import errors as http_errors
from gunicorn.workers.gthread import _DEFER, ThreadWorker  # type: ignore[attr-defined]
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

import gpu
from ollama_client import (
    PRUNE_AGE_S,
    Download,
    Downloads,
    Json,
    Ollama,
    Processes,
    Runner,
    ServiceError,
    Store,
    alive,
    check_name,
    clean,
    dial_url,
    dying,
    end,
    failure,
    listen_address,
    name_key,
    timestamp,
    wait_until,
)

VERSION = "1.1.0"

# ---------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------

_HOST = r"([A-Za-z0-9_][A-Za-z0-9._-]*|\[[0-9A-Fa-f:.]+\])"
_ORIGIN = rf"[a-z][a-z0-9+.-]*://{_HOST}(:[0-9]+)?"
_NUMBER = "[1-9][0-9]{0,8}"
_PORT = "[1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]"


def setting(name: str, default: str, pattern: str, takes: str) -> str:
    """Return a setting of the environment; end the start where it makes no sense."""
    value = os.environ.get(name) or default
    if not re.fullmatch(pattern, value):
        shown = "(not shown)" if name == "LLM_API_TOKEN" else ascii(value)
        sys.exit(f"llm-service: {name} is {shown}; it takes {takes}")
    return value


def items(text: str) -> set[str]:
    """Split a list with commas."""
    found = [item.strip().rstrip("/") for item in text.lower().split(",")]
    return set(filter(None, found))


MODEL = setting(
    "LLM_MODEL",
    "llama3.1:8b",
    "[A-Za-z0-9_][A-Za-z0-9._:/@-]*",
    "a model's name, such as llama3.1:8b",
)
CONTEXT_LENGTH = setting(
    "OLLAMA_CONTEXT_LENGTH",
    setting("LLM_CONTEXT_LENGTH", "8192", _NUMBER, "a whole number from 1, such as 8192"),
    _NUMBER,
    "a whole number from 1, such as 8192",
)
GPU_LAYERS = setting(
    "LLM_GPU_LAYERS",
    "33",
    "-1|0|[1-9][0-9]{0,5}|all|auto",
    "a whole number from 0, all (or -1), or auto",
)
STUCK_S = int(setting("LLM_STUCK_SECONDS", "120", _NUMBER, "a whole number of seconds from 1"))
SELF_HEAL = setting("LLM_SELF_HEAL", "on", "on|off", "on or off") == "on"
API_HOST = setting(
    "LLM_API_HOST",
    "127.0.0.1",
    "[A-Za-z0-9._:-]+",
    "the IP address or the host name to listen on",
)
API_PORT = int(setting("LLM_API_PORT", "11435", _PORT, "a port, 1 to 65535"))
TOKEN = setting("LLM_API_TOKEN", "", "[!-~]*", "letters, digits and signs, no spaces")
MAX_PULLS = int(setting("LLM_MAX_PULLS", "4", "[1-9][0-9]{0,3}", "a whole number from 1"))
ALLOWED_HOSTS = items(
    setting(
        "LLM_ALLOWED_HOSTS",
        "",
        f"({_HOST}(, *{_HOST})*)?",
        "host names, separated by commas",
    )
)
ALLOWED_ORIGINS = items(
    setting(
        "LLM_ALLOWED_ORIGINS",
        "",
        f"({_ORIGIN}(, *{_ORIGIN})*)?",
        "origins such as https://host:port, separated by commas",
    )
)
try:
    OLLAMA_URL = dial_url(os.environ.get("OLLAMA_HOST", ""))
except ValueError:
    wrong = ascii(os.environ["OLLAMA_HOST"])
    sys.exit(f"llm-service: OLLAMA_HOST is {wrong}; it takes an address such as 127.0.0.1:11434")
MODELS_PATH = os.environ.get("OLLAMA_MODELS") or os.path.expanduser("~/.ollama/models")
STATE_FILE = os.environ.get("LLM_STATE_FILE") or os.devnull  # the launcher's record

BODY_LIMIT_BYTES = 64 * 1024
STREAMS = 64
SILENT_CLIENT_S = 30  # then a client that neither sends nor takes anything is given up
DEFER_S = 0.2  # then a client that has sent nothing holds no thread
LINGER_BYTES = 16 << 20  # of a refused body are taken, so that its client reads the answer
FIRST_NEWS_S = 10  # then a pull starts to stream without knowing how it stands
ASK_S = 0.6  # two such questions, a list and a GPU sample stay within the 3 s of /health
LIST_S = 1.2
CLEAR_S = 3.7
RESET_S = 3.9
SHARE_S = 0.4  # a run may end that much late, and who shares it waits for that
UNLOAD_WAIT_S = 1.5
KILL_WAIT_S = 0.9
STARTING_S = 300
LOOK_S = 2
DISK_LOW_BYTES = 1 << 30
MB = 1024 * 1024

# ---------------------------------------------------------------------------------------
# Objects of the service
# ---------------------------------------------------------------------------------------

logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
log = logging.getLogger("llm-service")

ollama = Ollama(OLLAMA_URL)
store = Store(MODELS_PATH)
processes = Processes(STATE_FILE)
downloads = Downloads(ollama, store, processes, MAX_PULLS)
streams = threading.BoundedSemaphore(STREAMS)

app = Flask(__name__)
# werkzeug cuts a chunked body off there and says nothing, so one byte more than the limit.
app.config["MAX_CONTENT_LENGTH"] = BODY_LIMIT_BYTES + 1
app.json.sort_keys = False  # type: ignore[attr-defined]
app.url_map.strict_slashes = False
app.url_map.merge_slashes = False


class Outcome:
    """What a piece of work came to, and when it began and ended (monotonic)."""

    def __init__(self, key: object, work: typing.Callable[[], typing.Any]):
        self.key, self.began = key, time.monotonic()
        self._value, self._error = None, None
        try:
            self._value = work()
        except Exception as e:
            self._error = e
        self.ended = time.monotonic()

    def result(self) -> typing.Any:
        """Return the work's result, or raise its error."""
        if self._error:
            raise self._error
        return self._value


class SharedRun:
    """Does a piece of work for one caller at a time; others may share the last outcome."""

    def __init__(self, suits: typing.Callable[[Outcome, object, float], bool]):
        """``suits(outcome, key, came)`` tells whether it serves a caller who came then."""
        self._suits = suits
        self._lock = threading.Lock()
        self._last: Outcome | None = None

    def get(
        self,
        work: typing.Callable[[], typing.Any],
        timeout_s: float,
        key: object = None,
        came: float | None = None,
    ) -> typing.Any:
        """Return what suits, or do the work. Raises ServiceError ``timeout``."""
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


def in_parallel(work: typing.Callable, each: typing.Collection) -> list:
    """Do the work for each item at once; return the results, raise the first error."""
    if len(each) < 2:
        return list(map(work, each))
    with concurrent.futures.ThreadPoolExecutor(len(each)) as pool:
        return list(pool.map(work, each))


# ---------------------------------------------------------------------------------------
# Error answers
# ---------------------------------------------------------------------------------------

# The "status" beside an error, for those whose callers look at it.
STATUS_WORDS = {
    "/health": "unhealthy",
    "/api/cache/clear": "error",
    "/api/session/reset": "error",
}
HTTP_ADVICE = {
    404: "There is no such path: the README tells what there is.",
    413: "The body is over 64 KiB: send less.",
}


def error_answer(
    status: int, code: str, message: str, fields: Json | None = None
) -> tuple[Json, int, dict[str, str]]:
    """Make an answer of the one error shape: body, status, headers."""
    headers = {}
    if status in (429, 503):
        headers["Retry-After"] = "5"
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    body: Json = {}
    if request.path in STATUS_WORDS:
        body["status"] = STATUS_WORDS[request.path]
    body |= fields or {}
    body |= {"error": message, "code": code}
    return body, status, headers


@app.errorhandler(ServiceError)
def answer_service_error(error):
    if error.status > 500 and request.path != "/health":
        log.warning("%s %r: %s: %s", request.method, request.path, error.code, error)
    return error_answer(error.status, error.code, str(error), error.fields)


@app.errorhandler(HTTPException)
def answer_http_error(error):
    message = HTTP_ADVICE.get(error.code, f"{error.name}: check the request.")
    headers = {name: value for name, value in error.get_headers() if name == "Allow"}
    if headers:
        message = f"This path takes {headers['Allow']}: send one of these."
    code = re.sub(r"\W+", "_", error.name.lower())
    body, status, more = error_answer(error.code, code, message)
    return body, status, {**headers, **more}


@app.errorhandler(Exception)
def answer_bug(_error):
    log.exception("%s %r: a bug", request.method, request.path)
    return error_answer(500, "bug", "This is a bug in the service: its log tells more.")


# ---------------------------------------------------------------------------------------
# Who is let in
# ---------------------------------------------------------------------------------------

OPEN_PATHS = ("/", "/health", "/livez")  # without a token
PRIVATE_NAMES = (".local", ".internal", ".localhost", ".lan", ".home.arpa", ".intranet")
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'"
)


@app.before_request
def read_body():
    """Take the body off the connection first: the next request comes behind it."""
    if (request.content_length or 0) <= BODY_LIMIT_BYTES:
        body_bytes()


@app.before_request
def check_site():
    """Refuse what a web page on another site sends, by Origin or by DNS rebinding."""
    if not host_allowed(request.headers.get("Host", "localhost")):
        raise ServiceError(
            "host_not_allowed",
            "This host name is not answered for: add it to LLM_ALLOWED_HOSTS.",
        )
    origin = request.headers.get("Origin")
    if origin is not None and not origin_allowed(origin):
        raise ServiceError(
            "origin_not_allowed",
            "Calls from this origin are refused: add it to LLM_ALLOWED_ORIGINS.",
        )
    if origin is None and request.headers.get("Sec-Fetch-Site") == "cross-site":
        raise ServiceError(
            "cross_site",
            "Calls from another site are refused: add its origin to LLM_ALLOWED_ORIGINS.",
        )


@app.before_request
def answer_preflight():
    """Let a browser ask what it may send; its question carries no token."""
    if request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers:
        return Response(status=204)
    return None


@app.before_request
def check_token():
    """Refuse a call without the token, where one is set."""
    reads = request.method in ("GET", "HEAD")
    if not TOKEN or (reads and is_open(request.path)):
        return
    sent = request.headers.get("Authorization", "")
    scheme, _, given = sent.partition(" ")
    right = hmac.compare_digest(given.encode(), TOKEN.encode())
    if scheme.lower() != "bearer" or not right:
        words = "Send the token: Authorization: Bearer <LLM_API_TOKEN>."
        raise ServiceError("token_wanted", words)


@app.before_request
def check_length():
    """Refuse a body that is too long, before anything looks at it."""
    if (request.content_length or 0) > BODY_LIMIT_BYTES:
        raise RequestEntityTooLarge


@app.before_request
def answer_options():
    """Tell the methods of a path without Flask's empty page."""
    if request.method == "OPTIONS" and request.url_rule:
        allowed = app.make_default_options_response().headers["Allow"]
        return Response(status=204, headers={"Allow": allowed})
    return None


def is_open(path: str) -> bool:
    """Tell whether a path is answered without the token."""
    return path in OPEN_PATHS or path.startswith("/static/")


@app.after_request
def add_headers(response):
    """Add the headers that keep browsers in bounds."""
    headers = response.headers
    origin = request.headers.get("Origin")
    if origin and origin_allowed(origin):
        headers["Access-Control-Allow-Origin"] = origin
        headers["Access-Control-Allow-Methods"] = "GET, POST, DELETE, OPTIONS"
        headers["Access-Control-Allow-Headers"] = "Authorization, Content-Type"
        headers["Access-Control-Expose-Headers"] = "Retry-After"
        headers["Access-Control-Max-Age"] = "600"
    if response.status_code == 204:
        headers.pop("Content-Type", None)
    headers["Vary"] = "Origin"
    headers["X-Content-Type-Options"] = "nosniff"
    headers["Content-Security-Policy"] = CSP
    headers.setdefault("Cache-Control", "no-store")
    return response


@functools.lru_cache(256)
def host_allowed(host: str) -> bool:
    """Tell a name that only this machine or its network gives from one of the web."""
    try:
        name = (urllib.parse.urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return False
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        return "." not in name or name.endswith(PRIVATE_NAMES) or name in ALLOWED_HOSTS


def origin_allowed(origin: str) -> bool:
    """Tell whether an origin is the service's own or an allowed one."""
    own = f"{request.scheme}://{request.host}".lower()
    return origin.lower() in {own, *ALLOWED_ORIGINS}


# ---------------------------------------------------------------------------------------
# Reading a request
# ---------------------------------------------------------------------------------------

FLAG_WORDS = {"true": True, "1": True, "false": False, "0": False}


def arguments(model: bool, **defaults: bool | int) -> types.SimpleNamespace:
    """Parse the body and the query to ``model`` (checked), and flags and numbers by defaults.

    ``model`` true means that it must be there.
    """
    given: Json = {**request.args, **body_object()}
    name, other = given.get("model"), given.get("name")
    if None not in (name, other) and name != other:
        raise ServiceError("bad_model_name", '"model" and "name" differ: send one of them.')
    name = other if name is None else name
    if model and name is None:
        raise ServiceError("model_missing", 'Say which model: {"model": "llama3.1:8b"}.')
    found = types.SimpleNamespace(model=None, **defaults)
    if name is not None:
        found.model = check_name(name)
    for name, default in defaults.items():
        read = read_flag if isinstance(default, bool) else read_number
        if given.get(name) is not None:
            setattr(found, name, read(name, given[name]))
    return found


def read_flag(name: str, value: object) -> bool:
    """Return a flag; a form field sends it as a word."""
    if isinstance(value, str):
        value = FLAG_WORDS.get(value.lower())
    if not isinstance(value, bool):
        raise ServiceError("bad_field", f'"{name}" must be true or false.')
    return value


def read_number(name: str, value: typing.Any) -> float:
    """Return a number from 0; a form field sends it as a word."""
    with contextlib.suppress(ValueError, TypeError):
        number = float(value)
        if 0 <= number < float("inf") and not isinstance(value, bool):
            return number
    raise ServiceError("bad_field", f'"{name}" must be a number from 0.')


def body_object() -> Json:
    """Return the body's JSON object; {} where there is no body."""
    data = body_bytes()
    try:
        given = json.loads(data) if data.strip() else {}
    except (ValueError, RecursionError):
        given = None
    if not isinstance(given, dict):
        raise bad_json()
    return given


def body_bytes() -> bytes:
    """Return the whole body. Raises for one that is damaged, cut off, packed or too long."""
    if request.headers.get("Content-Encoding", "identity") != "identity":
        raise ServiceError("encoding_not_supported", "Send the body uncompressed.")
    try:
        data = request.get_data()
    except (http_errors.ParseException, OSError) as e:  # damaged chunks, a client that left
        raise bad_json() from e
    if len(data) > BODY_LIMIT_BYTES:
        raise RequestEntityTooLarge
    if len(data) < (request.content_length or 0):
        raise bad_json()
    return data


def bad_json() -> ServiceError:
    words = 'The body must be a JSON object such as {"model": "llama3.1:8b"}.'
    return ServiceError("bad_json", words)


# ---------------------------------------------------------------------------------------
# Routes
# ---------------------------------------------------------------------------------------


@app.get("/")
def page():
    """Show the page for people."""
    return app.send_static_file("index.html")


@app.get("/livez")
def livez():
    """Tell that this process answers, whatever Ollama does."""
    return {"status": "alive"}


@app.get("/health")
def health():
    """Tell whether the service works, and what would heal it."""
    return check_health()


@app.get("/metrics")
def metrics():
    """Tell the same figures to Prometheus."""
    return Response(metrics_text(), content_type="text/plain; version=0.0.4; charset=utf-8")


@app.get("/api/info")
def info():
    """Tell what runs here, and with which settings."""
    return service_info()


@app.get("/api/stats")
def stats():
    """Tell the load of the GPU, the machine and the service's own processes."""
    return machine_stats()


@app.get("/api/models")
def models():
    """List the models on disk."""
    return Response(listing.get(list_models, CLEAR_S), mimetype="application/json")


@app.get("/api/models/loaded")
def loaded_models():
    """List the models in memory."""
    loaded = list(map(loaded_entry, ollama.ps()))
    return {"loaded_models": loaded, "count": len(loaded)}


@app.post("/api/models/pull")
def pull():
    """Download a model, or join its download."""
    asked = arguments(model=True, stream=True, insecure=False, detach=False, verify=False)
    download, lines = downloads.pull(asked.model, asked.insecure, asked.detach, asked.verify)
    if asked.detach:
        message = "The download goes on by itself: GET /api/models/pull shows it."
        return {"status": "accepted", "message": message, "model": asked.model}, 202
    return stream_answer(download, lines) if asked.stream else whole_answer(download)


@app.get("/api/models/pull")
def pulls():
    """List the downloads under way and the last ended ones."""
    listed = downloads.list()
    return {"pulls": listed, "count": len(listed)}


@app.delete("/api/models/pull")
def cancel_pull():
    """Cancel a download; with ``purge`` its parts go too."""
    asked = arguments(model=True, purge=False)
    freed = downloads.cancel(asked.model, asked.purge)
    message = f"The download of {asked.model} is cancelled."
    return {"status": "success", "message": message, "freed_bytes": freed}


@app.post("/api/models/prune")
def prune():
    """Remove what no model uses."""
    asked = arguments(model=False, older_than_s=PRUNE_AGE_S, dry_run=False)
    return prune_store(asked.older_than_s, asked.dry_run)


@app.delete("/api/models/delete")
def delete():
    """Unload and delete a model."""
    asked = arguments(model=True, force=False)
    freed = delete_model(asked.model, asked.force)
    message = f"{asked.model} is deleted."
    return {"status": "success", "message": message, "freed_bytes": freed}


@app.post("/api/cache/clear")
def cache_clear():
    """Get the memory of the loaded models back."""
    asked = arguments(model=False, force=True)
    return healer.clear(asked.model, asked.force)


@app.post("/api/session/reset")
def session_reset():
    """Clear, restart Ollama where it needs it, and load the model that is due."""
    asked = arguments(model=False, restart=False)
    return healer.reset(asked.model, asked.restart)


@app.post("/api/gpu/recover")
def gpu_recover():
    """Clear what is idle, answered as the service that this one replaces does."""
    return healer.recover()


# ---------------------------------------------------------------------------------------
# Models and downloads
# ---------------------------------------------------------------------------------------


def service_info() -> Json:
    """Return the answer of ``GET /api/info``."""
    return {
        "service": "llm-service",
        "version": VERSION,
        "ollama_url": ollama.url,
        "ollama_version": watch.server.known_version(),
        "default_model": MODEL,
        "api_port": API_PORT,
        "context_length": int(CONTEXT_LENGTH),
        "gpu_layers": GPU_LAYERS,
        "models_path": MODELS_PATH,
    }


def tags(timeout_s: float) -> list[Json]:
    """Return the models on disk, asked for anew unless the store is certainly as it was."""
    signature = store.signature()
    return tags_of(signature, timeout_s) if signature else ollama.tags(timeout_s)


@functools.lru_cache(2)  # /health has another time limit
def tags_of(_signature: tuple, timeout_s: float) -> list[Json]:
    """Return the models of a store with this signature."""
    return ollama.tags(timeout_s)


def list_models() -> str:
    """Return the answer of ``GET /api/models``, as JSON text."""
    loaded = ollama.ps()
    by_name = {model["name"]: model for model in loaded}
    by_digest = {model.get("digest"): model for model in loaded}
    listed = []
    for model in tags(LIST_S):
        match = by_name.get(model["name"]) or by_digest.get(model.get("digest"))
        listed.append(model_entry(model, match or {}))
    answer = {"models": listed, "count": len(listed)}
    return json.dumps(answer, separators=(",", ":")) + "\n"


listing = SharedRun(lambda outcome, _key, came: outcome.began >= came)


def model_entry(model: Json, loaded: Json) -> Json:
    """Describe a model on disk; ``loaded`` is its line of ``/api/ps``, or {}."""
    return {
        "name": model["name"],
        "size": model.get("size"),
        "modified_at": utc(model.get("modified_at")),
        "digest": model.get("digest"),
        "details": model.get("details") or {},
        "loaded": bool(loaded),
        "size_vram": loaded.get("size_vram"),
        "expires_at": utc(loaded.get("expires_at")),
        "size_loaded": loaded.get("size"),
        "context_length": loaded.get("context_length"),
    }


def loaded_entry(model: Json) -> Json:
    """Describe a model in memory by its line of ``/api/ps``."""
    return {
        "name": model["name"],
        "size": model.get("size"),
        "size_vram": model.get("size_vram"),
        "context_length": model.get("context_length"),
        "expires_at": utc(model.get("expires_at")),
    }


def utc(moment: typing.Any) -> str | None:
    """Bring Ollama's time, which carries its own zone, to UTC."""
    if not isinstance(moment, str):
        return None
    if moment.endswith("Z"):
        return moment
    try:
        return timestamp(datetime.datetime.fromisoformat(moment).timestamp())
    except (ValueError, OverflowError):
        return None


def stream_answer(download: Download, lines: typing.Iterable[Json]) -> Response:
    """Answer with a download's lines as they come; an early error has its own status."""
    leave = take_stream(download)
    try:
        download.wait_for_news(FIRST_NEWS_S)
    except ServiceError:
        leave()
        raise
    response = Response(
        (json.dumps(line) + "\n" for line in lines),
        mimetype="application/x-ndjson",
        headers={"X-Accel-Buffering": "no"},
    )
    response.call_on_close(leave)
    return response


def whole_answer(download: Download) -> Json:
    """Answer with the download's end, with the status that fits."""
    leave = take_stream(download)
    download.thread.join()
    leave()
    if download.error:
        raise download.error
    return download.last_line()


def take_stream(download: Download) -> typing.Callable[[], None]:
    """Take one of the places for long answers; return what gives it back."""
    if not streams.acquire(blocking=False):
        download.leave()
        raise ServiceError(
            "too_many_streams",
            f"{STREAMS} answers are streaming: try again, or use detach.",
        )

    def leave() -> None:
        streams.release()
        download.leave()

    return leave


def prune_store(older_than_s: float, dry_run: bool) -> Json:
    """Return the answer of ``POST /api/models/prune``."""
    freed, files = downloads.prune(older_than_s, dry_run)
    would = "would come free" if dry_run else "came free"
    return {
        "status": "success",
        "message": f"{freed // MB} MB of {files} unused files {would}.",
        "freed_bytes": freed,
        "files": files,
    }


def delete_model(model: str, force: bool) -> int:
    """Unload and delete a model; return the bytes that came free."""
    if downloads.running(model):
        words = f"{model} is being downloaded: cancel that first."
        raise ServiceError("model_being_pulled", words)
    ollama.version(1)  # one that hangs would look busy
    if not healer.clear(model, force)["verified"]:
        raise ServiceError(
            "model_busy",
            f'{model} is in the middle of an answer: try again, or send "force": true.',
        )
    digests = store.models().get(name_key(model), [])
    before = store.sizes(digests).values()
    ollama.delete(model)
    after = store.sizes(digests).values()
    return sum(before) - sum(after)


def must_exist(model: str | None) -> None:
    """Raise ServiceError ``model_not_found`` for a model that is not downloaded."""
    if model and name_key(model) not in store.models():
        raise ServiceError(
            "model_not_found",
            f"There is no model {model}: GET /api/models lists what is downloaded.",
        )


# ---------------------------------------------------------------------------------------
# Health
# ---------------------------------------------------------------------------------------


def check_health() -> Json:
    """Return the health report, or raise the 503 that tells what would heal it."""
    reading = gpu.sample()
    if reading["state"] == "lost":
        words = "The GPU is lost to this container: restart it; if that fails, reboot the host."
        raise unhealthy("gpu_lost", words, gpu.ACTIONS["lost"])
    server = processes.server()  # before it is asked: the next one may be there afterwards
    try:
        names = [model["name"] for model in tags(LIST_S)]
        loaded = loaded_now()
    except ServiceError as e:
        raise unhealthy(*diagnose(e, server)) from e
    watch.server.note_answer(server)
    watch.raise_fault()
    warnings = find_warnings(reading, loaded)
    return {
        "status": "healthy",
        "models_count": len(names),
        "models": names,
        "loaded": [model["name"] for model in loaded],
        "ollama_version": watch.server.known_version(),
        "gpu": reading["state"],
        "recommended_action": gpu.ACTIONS[reading["state"]],
        "load": healer.load,
        "runners": watch.runners(),
        "looked_at": timestamp(watch.looked_at),
        "warnings": warnings,
        "warning": warnings[0]["message"] if warnings else None,
    }


def loaded_now() -> list[Json]:
    """Return what Ollama has loaded, or had at the last look while it holds its lock.

    It holds it while it settles with a runner, for 20 s; only a server that does not answer
    ``/api/version`` either hangs.
    """
    try:
        return ollama.ps(ASK_S)
    except ServiceError as e:
        if e.code != "ollama_timeout":
            raise
        ollama.version(ASK_S)
        return watch.loaded


def unhealthy(code: str, reason: str, action: str) -> ServiceError:
    """Make the 503 of /health."""
    error = ServiceError(code, reason, reason=reason, recommended_action=action)
    error.status = 503  # also for a code that is another status elsewhere
    return error


def diagnose(error: ServiceError, asked: psutil.Process | None) -> tuple[str, str, str]:
    """Tell code, reason and the action that heals from the error of the server asked."""
    server = processes.server()
    if error.code not in ("ollama_timeout", "ollama_unreachable"):
        words = f"Ollama cannot list the models: {error}"
        return "model_store_unreadable", words, "restart_service"
    if server is None and not processes.ever_started():
        return "ollama_starting", "Ollama is about to be started.", "wait"
    if server is None or dying(server):
        return diagnose_end(last_words())
    if server != asked or watch.server.starting(server):
        return "ollama_starting", "Ollama is starting.", "wait"
    if error.code == "ollama_timeout":
        return "ollama_hung", "Ollama runs but does not answer.", "reset_session"
    return "ollama_unreachable", "Ollama runs but takes no connection.", "reset_session"


def diagnose_end(said: str) -> tuple[str, str, str]:
    """Tell the same of an Ollama that has ended, from what it said last."""
    words = "Ollama has ended and is being started again."
    if not said:
        return "ollama_dead", words, "wait"
    reason = failure(said)
    if reason.code == "store_not_writable":
        return reason.code, f"{words} It said: {reason}", "wait"
    return "ollama_dead", f"{words} It said: {clean(said)}.", "wait"


def last_words() -> str:
    """Return what Ollama said at its last end, as the launcher noted it."""
    try:
        return pathlib.Path(f"{STATE_FILE}.reason").read_text(errors="replace").strip()
    except OSError:
        return ""


def find_warnings(reading: Json, loaded: list[Json]) -> list[Json]:
    """Return what does not make the service unhealthy: ``[{"code", "message"}]``."""
    warnings = []
    free = store.free_bytes()
    if free is not None and free < DISK_LOW_BYTES:
        warnings.append(("disk_low", "The disk is almost full: delete a model, or prune."))
    if not watch.store_writable:
        words = f"{store.path} cannot be written: chown -R it to the user of the service."
        warnings.append(("store_not_writable", words))
    if healer.load and healer.load["state"] == "failed":
        words = f"{healer.load['model']} did not load: {healer.load['error']}"
        warnings.append(("load_failed", words))
    running = {runner["model"] for runner in watch.runners()}  # Ollama may list dead ones
    warnings += gpu_warnings(reading, [each for each in loaded if each["name"] in running])
    return [{"code": code, "message": message} for code, message in warnings]


GPU_ADVICE = (
    "Check CUDA_VISIBLE_DEVICES, the container's runtime (LLM_RUNTIME=nvidia) and the driver."
)
NO_GPU_ADVICE = f"Ollama sees no GPU, whatever LLM_GPU_LAYERS says. {GPU_ADVICE}"
PARTLY_ADVICE = (
    "Set LLM_GPU_LAYERS=all where it fits the GPU, else choose a smaller model or context; in "
    "Docker check LLM_RUNTIME=nvidia."
)


def gpu_warnings(reading: Json, loaded: list[Json]) -> list[tuple[str, str]]:
    """Compare where Ollama says that its models lie with what was asked for and measured."""
    warnings: list[tuple[str, str]] = []
    if reading["state"] != "ok" or reading["memory_shared"]:
        return warnings
    for model in loaded if GPU_LAYERS != "0" else ():
        size_mb = bytes_of(model, "size") // MB
        vram_mb = bytes_of(model, "size_vram") // MB
        if vram_mb < size_mb:
            words = (
                f"{size_mb - vram_mb} of {size_mb} MB of {model['name']} lie in system memory, "
                "which is slow. "
            )
            words += PARTLY_ADVICE if vram_mb else NO_GPU_ADVICE
            warnings.append(("model_on_cpu", words))
    claimed_mb = sum(bytes_of(model, "size_vram") for model in loaded) // MB
    used_mb, _ = gpu.memory_totals(reading)
    if used_mb is not None and claimed_mb > used_mb:
        words = (
            f"Ollama says that {claimed_mb} MB of its models lie on the GPU, of which only "
            f"{used_mb} MB are in use: the models run on the CPU. {GPU_ADVICE}"
        )
        warnings.append(("gpu_not_used", words))
    return warnings


def bytes_of(model: Json, key: str) -> int:
    """Return a figure of a line of ``/api/ps``; 0 where it is none."""
    figure = model.get(key)
    return figure if isinstance(figure, int) else 0


# ---------------------------------------------------------------------------------------
# Stats and metrics
# ---------------------------------------------------------------------------------------


def machine_stats() -> Json:
    """Return the answer of ``GET /api/stats``. What the watch sees is as of its last look."""
    reading = gpu.sample()
    memory = psutil.virtual_memory()
    server = processes.server()
    age_s = time.time() - server.create_time() if server else None
    return {
        **gpu_strings(reading),
        "process_memory_mb": watch.process_memory_mb,
        "cpu_percent": watch.cpu_percent,
        "timestamp": timestamp(time.time()),
        "gpu": reading["state"],
        "gpus": reading["gpus"],
        "recommended_action": gpu.ACTIONS[reading["state"]],
        "memory": {
            "total_mb": memory.total // MB,
            "used_mb": (memory.total - memory.available) // MB,
            "available_mb": memory.available // MB,
            "percent": memory.percent,
        },
        "disk": watch.disk and {**watch.disk, "free_bytes": store.free_bytes()},
        "runners": watch.runners(),
        "looked_at": timestamp(watch.looked_at),
        "ollama": {
            "pid": server.pid if server else None,
            "uptime_seconds": None if age_s is None else round(age_s),
            "restarts": processes.restarts(),
        },
        "healed": watch.healed,
        "clears": healer.clears_done,
        "resets": healer.resets_done,
    }


def gpu_strings(reading: Json) -> Json:
    """Put the figures as the dashboard shows them: the busiest GPU, all memory together."""
    used, total = gpu.memory_totals(reading)
    utilization = highest(reading, "utilization_percent")
    temperature = highest(reading, "temperature_c")
    return {
        "gpu_utilization": "N/A" if utilization is None else f"{utilization}%",
        "gpu_memory": "N/A" if total is None else f"{used}MB / {total}MB",
        "gpu_temperature": "N/A" if temperature is None else f"{temperature}°C",
    }


def highest(reading: Json, figure: str) -> int | None:
    """Return the highest of a figure over all GPUs that tell it."""
    figures = [each[figure] for each in reading["gpus"]]
    return max((each for each in figures if each is not None), default=None)


# Name, help; then the group of rows and the figure in them, which metric_rows gives.
METRICS = [
    ("llm_up", "1 where the last look found no fault.", "service up"),
    ("llm_gpu_state", "1 for the state of the GPUs.", "gpu_state is"),
    ("llm_gpu_utilization_ratio", "Load of a GPU.", "gpus utilization_percent"),
    ("llm_gpu_memory_used_bytes", "GPU memory in use.", "gpus memory_used_mb"),
    ("llm_gpu_memory_total_bytes", "GPU memory.", "gpus memory_total_mb"),
    ("llm_gpu_temperature_celsius", "GPU temperature.", "gpus temperature_c"),
    ("llm_gpu_power_watts", "Power that a GPU draws.", "gpus power_w"),
    ("llm_board_power_watts", "Power that the board draws.", "gpus board_power_w"),
    ("llm_memory_used_bytes", "The machine's memory in use.", "memory used_mb"),
    ("llm_memory_total_bytes", "The machine's memory.", "memory total_mb"),
    ("llm_process_memory_bytes", "API, Ollama, runners.", "service process_memory_mb"),
    ("llm_cpu_utilization_ratio", "Load of the CPU.", "service cpu_percent"),
    ("llm_disk_free_bytes", "Free on the models' disk.", "disk free_bytes"),
    ("llm_disk_total_bytes", "Size of the models' disk.", "disk total_bytes"),
    ("llm_disk_partial_bytes", "Unfinished downloads.", "disk partial_bytes"),
    ("llm_disk_unused_bytes", "What a prune would free.", "disk unused_bytes"),
    ("llm_models_loaded", "Models in memory.", "service models_loaded"),
    ("llm_runner_state", "1 for the state of a runner.", "runner_state is"),
    ("llm_runner_memory_bytes", "Memory of a runner.", "runners memory_mb"),
    ("llm_runner_tokens_per_second", "Speed.", "runners tokens_per_second"),
    ("llm_runner_tokens_total", "Tokens decoded.", "runners tokens"),
    ("llm_downloads_running", "Downloads under way.", "service downloads_running"),
    ("llm_downloads_total", "Ended downloads.", "downloads ended"),
    ("llm_clears_total", "Clears, also of resets and deletes.", "service clears"),
    ("llm_resets_total", "Resets done.", "service resets"),
    ("llm_healings_total", "Healed by the service.", "healings done"),
    ("llm_ollama_restarts_total", "Restarts of Ollama.", "ollama restarts"),
]
BASE_UNITS = {"mb": MB, "percent": 0.01}  # by the last word of a figure's name


def metrics_text() -> str:
    """Return all figures in Prometheus' text format; what nobody knows is left out."""
    rows = metric_rows()
    lines = []
    for name, about, place in METRICS:
        group, figure = place.split()
        factor = BASE_UNITS.get(figure.rpartition("_")[2], 1)
        samples = [
            f"{name}{labels} {round(row[figure] * factor, 6)}"
            for labels, row in rows[group]
            if row.get(figure) is not None
        ]
        if samples:
            kind = "counter" if name.endswith("_total") else "gauge"
            lines += [f"# HELP {name} {about}", f"# TYPE {name} {kind}", *samples]
    return "\n".join(lines) + "\n"


def metric_rows() -> dict[str, list[tuple[str, Json]]]:
    """Return all figures by their group in METRICS, as rows of (labels, figures)."""
    stats = machine_stats()
    service = {
        **stats,
        "up": watch.up() if stats["gpu"] != "lost" else 0,
        "models_loaded": len(watch.loaded),
        "downloads_running": downloads.running_count(),
    }
    runners = [
        (runner, {"model": runner["model"] or "unknown", "pid": runner["pid"]})
        for runner in stats["runners"]
    ]
    return {
        "service": [("", service)],
        "memory": [("", stats["memory"])],
        "disk": [("", stats["disk"] or {})],
        "ollama": [("", stats["ollama"])],
        "gpu_state": [(label_text(state=stats["gpu"]), {"is": 1})],
        "gpus": [(label_text(gpu=each["index"]), each) for each in stats["gpus"]],
        "runners": [(label_text(**labels), runner) for runner, labels in runners],
        "runner_state": [
            (label_text(**labels, state=runner["state"]), {"is": 1}) for runner, labels in runners
        ],
        "downloads": [
            (label_text(outcome=outcome), {"ended": count})
            for outcome, count in downloads.counts.items()
        ],
        "healings": [
            (label_text(what=what), {"done": stats["healed"][what]})
            for what in ("runners", "ollama")
        ],
    }


def label_text(**labels: object) -> str:
    """Write labels as Prometheus takes them, with their values escaped."""
    pairs = []
    for name, value in labels.items():
        escaped = str(value).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        pairs.append(f'{name}="{escaped}"')
    return f"{{{','.join(pairs)}}}"


# ---------------------------------------------------------------------------------------
# The watch
# ---------------------------------------------------------------------------------------

RUNNER_ASK_S = 0.5  # for a runner's own port
LONG_IDLE_S = 30  # then a runner is asked though it uses no CPU
GAP_S = 6  # between two looks: the machine was asleep, what was counted is void
STUCK_LOOKS = 10
SILENT_LOOKS, SILENT_S = 3, 10
GHOST_S = 10
WORKING_SHARE = 0.05  # of a core, by which a runner's main thread shows that it computes
SLOW_FACTOR = 10  # more patience for a model that is not wholly on the GPU and computes
WAKE_CPU_S = 0.0005  # a request takes 1 ms, two seconds of an idle runner 0.05 ms
HUNG_LOOKS = 15
HEALINGS, HEALINGS_S = 3, 1800  # so many of one model in that time, then it is left alone
DISK_LOOK_S = 60


class Look(typing.NamedTuple):
    """What one look at a runner saw. ``slots`` is None where it was not asked or has none."""

    at: float  # monotonic
    health: str = "unasked"  # or "ok", "loading", "silent", "dead", "orphan"
    slots: list[Json] | None = None
    late: bool = False  # /slots has not answered
    main_cpu_s: float = 0.0  # CPU time of the main thread
    working: bool = False  # it has used CPU since the last look
    on_gpu: bool = False  # the model lies there wholly


class RunnerState:
    """One runner's state by the rules of the contract. It has no clock of its own."""

    def __init__(self, process: psutil.Process, runner: Runner, now: float):
        self.process, self.runner = process, runner
        self.model: str | None = None
        self.state, self.since = "loading", now
        self.tokens, self.tokens_per_second = 0, 0.0
        self.memory_mb, self.cpu_percent = 0, 0.0
        self.cpu_s = 0.0  # at the last look
        self.under_way = True  # at the last look
        self.asked_at = now
        self.evidence = ""  # as it was at the verdict
        self.healed: str | None = None  # the state that it was healed of
        self._looked_at = now
        self._step_s = 0.0  # between the last two looks
        self._counters: list[tuple] = []
        self._tasks: dict[int, tuple[int, int]] = {}  # slot: (task, tokens decoded)
        self._begin_count(now)

    def note(self, look: Look) -> None:
        """Note a look and come to the state that follows."""
        self._step_s = look.at - self._looked_at
        if self._step_s > GAP_S:
            self._begin_count(look.at)
        self._looked_at = look.at
        self.tokens_per_second = 0.0
        evidence = self.evidence
        state = self._judge(look)
        if state == self.state:
            self.evidence = evidence
        else:
            self.state, self.since = state, look.at

    def _begin_count(self, now: float) -> None:
        self._silent_looks, self._silent_since = 0, now
        self._dead_since: float | None = None
        self._note_progress(now)

    def _note_progress(self, now: float) -> None:
        self._progress_at, self._looks = now, 0
        # Of the last looks without progress: (at, CPU seconds of the main thread).
        self._main_cpu: collections.deque[tuple[float, float]]
        self._main_cpu = collections.deque(maxlen=STUCK_LOOKS)

    def _judge(self, look: Look) -> str:
        if look.health == "silent":
            return self._judge_silence(look.at)
        self._silent_looks = 0
        if look.health == "dead":
            return self._judge_death(look.at)
        if look.health == "ok":
            return self._judge_work(look)
        self._note_progress(look.at)
        if look.health == "unasked":
            return self.state
        self.under_way = look.health == "loading"
        return look.health

    def _judge_silence(self, now: float) -> str:
        if not self._silent_looks:
            self._silent_since = now
        self._silent_looks += 1
        self.under_way = True  # so that it is asked again
        silent_s = now - self._silent_since
        if self._silent_looks < SILENT_LOOKS or silent_s < SILENT_S:
            return self.state
        self.evidence = f"its /health has not answered for {silent_s:.0f} s"
        return "silent"

    def _judge_death(self, now: float) -> str:
        if self._dead_since is None:
            self._dead_since = now
        dead_s = now - self._dead_since
        if dead_s < GHOST_S:
            return self.state
        self.evidence = f"it was killed {dead_s:.0f} s ago and Ollama still waits for its end"
        return "ghost"

    def _judge_work(self, look: Look) -> str:
        if look.late:
            self.under_way, moved = True, False
        elif look.slots is None:  # it has none, or was not asked
            self.under_way, moved = look.working, True
        else:
            self.under_way = any(slot.get("is_processing") for slot in look.slots)
            moved = self._count_tokens(look.slots)
        if self.under_way and not moved:
            return self._judge_standstill(look)
        self._note_progress(look.at)
        return "busy" if self.under_way else "idle"

    def _judge_standstill(self, look: Look) -> str:
        self._looks += 1
        self._main_cpu.append((look.at, look.main_cpu_s))
        still_s = look.at - self._progress_at
        if self._looks < STUCK_LOOKS or still_s < self._patience_s(look):
            return "stuck" if self.state == "stuck" else "busy"
        seen = "/slots does not answer" if look.late else f"its counters stand at {self._counters}"
        self.evidence = f"no progress for {still_s:.0f} s: {seen}"
        return "stuck"

    def _patience_s(self, look: Look) -> float:
        """One batch of a large model takes minutes on a CPU, and moves no counter meanwhile."""
        began, used_s = self._main_cpu[0]
        share = (look.main_cpu_s - used_s) / max(look.at - began, 1)
        computes = not look.on_gpu and share >= WORKING_SHARE
        return STUCK_S * (SLOW_FACTOR if computes else 1)

    def _count_tokens(self, slots: list[Json]) -> bool:
        """Count what was decoded since the last look; return whether any counter moved."""
        counters, new = [], 0
        for number, slot in enumerate(slots):
            task, decoded = slot.get("id_task", -1), decoded_tokens(slot)
            counters.append((task, slot.get("n_prompt_tokens_processed", 0), decoded))
            before = self._tasks.get(number, (task, decoded))
            new += max(0, decoded - before[1]) if before[0] == task else decoded
            self._tasks[number] = task, decoded
        moved = counters != self._counters
        self._counters = counters
        self.tokens += new
        self.tokens_per_second = round(new / max(self._step_s, 0.1), 1)
        return moved

    def holds_up(self, server: psutil.Process | None) -> bool:
        """Tell whether this server waits for the end of this runner, which is dead."""
        return unreaped(self.process, server)

    def report(self, now: float) -> Json:
        """Return the line of ``runners in /health and /api/stats."""
        return {
            "pid": self.process.pid,
            "model": self.model,
            "state": self.state,
            "seconds": round(now - self.since),
            "tokens": self.tokens,
            "tokens_per_second": self.tokens_per_second,
            "memory_mb": self.memory_mb,
            "cpu_percent": self.cpu_percent,
        }


def decoded_tokens(slot: Json) -> int:
    """Return the tokens that a slot of llama.cpp's server has decoded for its task."""
    token = slot.get("next_token") or {}
    token = token[0] if isinstance(token, list) else token
    count = token.get("n_decoded", 0)
    return count if isinstance(count, int) else 0


class ServerState:
    """Whether the server has answered since it was started, and since when it is silent."""

    def __init__(self):
        self.version: str | None = None
        self._answered: psutil.Process | None = None
        self._silent_looks = 0

    def starting(self, server: psutil.Process) -> bool:
        """Tell whether this server has not answered yet and still may take its time."""
        age_s = time.time() - server.create_time()
        return server != self._answered and age_s < STARTING_S

    def hung(self) -> bool:
        """Tell whether the server answered once and is silent for good."""
        return self._silent_looks >= HUNG_LOOKS

    def note_answer(self, server: psutil.Process | None) -> None:
        """Note that this server has answered."""
        if server != self._answered:
            self.version = None  # it may be another one now
        self._answered, self._silent_looks = server, 0

    def note_silence(self, server: psutil.Process | None) -> None:
        """Note that this server has not answered a look, which means little at its start."""
        known = server is not None and server == self._answered
        self._silent_looks = self._silent_looks + 1 if known else 0

    def begin_count(self) -> None:
        """Count silent looks from here."""
        self._silent_looks = 0

    def known_version(self) -> str | None:
        """Return the version; asked for once a server."""
        if self.version is None:
            with contextlib.suppress(ServiceError):
                self.version = ollama.version(RUNNER_ASK_S)
        return self.version


class Watch:
    """Looks at the server, the runners, CPU and disk every LOOK_S; requests read what it saw."""

    def __init__(self):
        self.server = ServerState()
        self.loaded: list[Json] = []  # /api/ps at the last look that got it
        self.looked_at = time.time()
        self.cpu_percent: float | None = None
        self.process_memory_mb = 0
        self.store_writable = True
        self.disk: Json | None = None
        self.healed: Json = {"runners": 0, "ollama": 0, "last": None}
        self._lock = threading.Lock()
        self._states: dict[psutil.Process, RunnerState] = {}
        self._names_key: object = None
        self._disk_key: object = None
        self._unmatched: set[str] = set()  # models without a process at the last look
        self._healings: dict[str, collections.deque[float]] = collections.defaultdict(
            lambda: collections.deque(maxlen=HEALINGS)
        )

    def start(self) -> None:
        """Begin to watch."""
        psutil.cpu_percent()  # it counts from here
        threading.Thread(target=self._run, name="watch", daemon=True).start()

    def runners(self) -> list[Json]:
        """Return the runners as of the last look."""
        now = time.monotonic()
        return [state.report(now) for state in list(self._states.values())]

    def state_of(self, process: psutil.Process) -> str | None:
        """Return the state that a runner was in at the last look."""
        state = self._states.get(process)
        return state.state if state else None

    def known_runners(self) -> list[Runner]:
        """Return the runners of the last look, those that were not reaped included."""
        return [state.runner for state in list(self._states.values())]

    def up(self) -> int:
        """Return 1 where nothing was found to be wrong at the last look, else 0."""
        server = processes.server()
        answers = server is not None and not self.server.starting(server)
        return int(answers and not self.server.hung() and not self._faults())

    def raise_fault(self) -> None:
        """Raise the 503 of /health for a runner that is stuck, silent or a ghost."""
        for state in self._faults():
            words = f"The runner of {state.model or state.process.pid} is "
            words += f"{'a ' if state.state == 'ghost' else ''}{state.state}: {state.evidence}."
            raise ServiceError(
                f"runner_{state.state}",
                words,
                reason=words,
                recommended_action=self._action(state),
                runners=self.runners(),
            )

    def look(self, wait_s: float = 60) -> None:
        """Look at everything once, unless another look takes longer than this."""
        if not self._lock.acquire(timeout=max(0, wait_s)):
            return
        try:
            server = processes.server()
            self._ask_server(server)
            self._find_runners(server)
            self._look_at_runners(server)
            self._look_at_machine(server)
            self.looked_at = time.time()
        finally:
            self._lock.release()

    def look_before(self, deadline: float) -> None:
        """Look before an answer goes out, where there is time for it: a hang costs a second."""
        left_s = deadline - time.monotonic() - 3 * RUNNER_ASK_S
        if left_s > 0:
            self.look(left_s)

    def _run(self) -> None:
        while True:
            try:
                self.look()
                if SELF_HEAL:
                    self._heal()
            except ServiceError as e:
                log.warning("the watch: %s", e)
            except Exception:
                log.exception("the watch: a bug")
            time.sleep(LOOK_S)

    # Looking

    def _ask_server(self, server: psutil.Process | None) -> None:
        """Ask what is loaded. Ollama may hold its lock: only its version tells that it hangs."""
        try:
            self.loaded = ollama.ps(RUNNER_ASK_S)
            self.server.note_answer(server)
        except ServiceError:
            if server is None:
                self.loaded = []
            if answering():
                self.server.note_answer(server)
            else:
                self.server.note_silence(server)

    def _find_runners(self, server: psutil.Process | None) -> None:
        """Keep a state for each runner; one whose server has reaped it is forgotten."""
        found = {runner.process: runner for runner in processes.runners()}
        now, states = time.monotonic(), dict(self._states)
        for process in self._states.keys() - found.keys():
            if not unreaped(process, server):
                del states[process]
        for process in found.keys() - states.keys():
            states[process] = RunnerState(process, found[process], now)
        self._states = states
        key = (store.signature(), frozenset(states), tuple(each["name"] for each in self.loaded))
        if key != self._names_key:
            self._names_key = key
            names = model_names(self.known_runners(), self.loaded)
            for state in states.values():
                state.model = names.get(state.process) or state.model

    def _look_at_runners(self, server: psutil.Process | None) -> None:
        """Look at what costs nothing; ask only where something may have changed."""
        due = []
        for state in self._states.values():
            look, moved = self._glance(state, server)
            active = moved or state.under_way
            idle_long = look.at - state.asked_at >= LONG_IDLE_S
            if look.health == "unasked" and (active or idle_long):
                due.append((state, look, active))
            else:
                state.note(look)
        in_parallel(lambda each: self._ask(*each), due)

    def _glance(self, state: RunnerState, server: psutil.Process | None) -> tuple[Look, bool]:
        """Look at a runner's process; return also whether it has done anything at all."""
        look, spent_s = Look(time.monotonic()), 0.0
        with contextlib.suppress(psutil.Error), state.process.oneshot():
            spent_s = cpu_seconds(state.process) - state.cpu_s
            state.memory_mb = state.process.memory_info().rss // MB
            state.cpu_percent = state.process.cpu_percent()
            if not server or server.pid not in (state.process.ppid(), state.process.pid):
                look = look._replace(health="orphan")
        if look.health != "orphan" and dying(state.process):
            look = look._replace(health="dead")
        state.cpu_s += spent_s
        return look._replace(working=spent_s > WORKING_SHARE * LOOK_S), spent_s > WAKE_CPU_S

    def _ask(self, state: RunnerState, look: Look, active: bool) -> None:
        """Ask a runner's own port. An idle one is asked for its health only: /slots is logged."""
        port = state.runner.port
        look = look._replace(health=ollama.runner_health(port, RUNNER_ASK_S))
        if look.health == "ok" and active:
            entry = next((each for each in self.loaded if each["name"] == state.model), {})
            size, size_vram = bytes_of(entry, "size"), bytes_of(entry, "size_vram")
            look = look._replace(
                on_gpu=0 < size <= size_vram,
                main_cpu_s=main_thread_cpu_s(state.process),
            )
            try:
                look = look._replace(slots=ollama.runner_slots(port, RUNNER_ASK_S))
            except ServiceError:
                look = look._replace(late=True)
        state.note(look)
        state.asked_at = look.at
        with contextlib.suppress(psutil.Error):  # it may have ended meanwhile
            state.cpu_s = cpu_seconds(state.process)  # without what the asking took

    def _look_at_machine(self, server: psutil.Process | None) -> None:
        self.cpu_percent = psutil.cpu_percent()
        memory = sum(state.memory_mb for state in self._states.values())
        for process in (server, psutil.Process(), psutil.Process(os.getppid())):
            with contextlib.suppress(psutil.Error):
                memory += process.memory_info().rss // MB if process else 0
        self.process_memory_mb = memory
        ended = dict(downloads.counts)  # a part has grown until then, and the folder did not change
        key = (store.signature(), store.changed_ns(), ended, time.monotonic() // DISK_LOOK_S)
        if key != self._disk_key or downloads.running_count() or self.disk is None:
            self.disk, self._disk_key = store.disk(), key
            self.store_writable = store.writable()

    # Healing

    def _faults(self) -> list[RunnerState]:
        order = ("ghost", "stuck", "silent")
        faults = [state for state in self._states.values() if state.state in order]
        server = processes.server()  # a ghost of the server before holds nobody up
        faults = [each for each in faults if each.state != "ghost" or each.holds_up(server)]
        return sorted(faults, key=lambda state: order.index(state.state))

    def _action(self, state: RunnerState) -> str:
        if not SELF_HEAL or state.healed == "ghost":  # and the restart has not helped
            return "reset_session"
        # What was killed gets its time until it is a ghost.
        return "wait" if state.healed or self._may_heal(state.model) else "restart_service"

    def _may_heal(self, model: str | None) -> bool:
        times = self._healings[model or "?"]
        return len(times) < HEALINGS or time.monotonic() - times[0] > HEALINGS_S

    def _heal(self) -> None:
        """End what is stuck, silent or a ghost, and only that, and a server that hangs."""
        self._clean_list()
        for state in self._faults():
            if state.healed != state.state and self._may_heal(state.model):
                self._heal_one(state)
        if self.server.hung():
            why = f"it has not answered /api/version in {HUNG_LOOKS} looks"
            freed_mb = healer.restart_server()
            self.server.begin_count()
            self._note_healing("ollama", "Ollama", why, freed_mb)

    def _heal_one(self, state: RunnerState) -> None:
        model, why = state.model, f"{state.state}: {state.evidence}"
        if state.state == "ghost":
            what, freed_mb = "ollama", healer.restart_server()
        else:
            what, freed_mb = "runners", healer.end_runner(state.runner, model)
        state.healed = state.state
        self._healings[model or "?"].append(time.monotonic())
        self._note_healing(what, model, why, freed_mb)

    def _note_healing(self, what: str, name: str | None, why: str, freed_mb: int) -> None:
        log.error("healed %s, which was %s (%d MB came free)", name, why, freed_mb)
        last = {"at": timestamp(time.time()), "what": name, "why": why, "freed_mb": freed_mb}
        self.healed = {**self.healed, what: self.healed[what] + 1, "last": last}

    def _clean_list(self) -> None:
        """Have Ollama unload what it lists and what has had no process for two looks.

        Its runner was killed from outside. With a runner whose model is unknown, nobody can
        tell.
        """
        living = [state.model for state in self._states.values() if alive(state.process)]
        names = {model["name"] for model in self.loaded} - {*living}
        if len(living) >= len(self.loaded) or None in living:
            names = set()
        again, self._unmatched = names & self._unmatched, names
        with contextlib.suppress(ServiceError):
            for name in again and again & unloadable(self.loaded):
                ollama.unload(name, ASK_S)


def cpu_seconds(process: psutil.Process) -> float:
    """Return the CPU time of a process.

    Asked of its clock, as /proc tells it in steps of 10 ms, and a request takes one.
    """
    try:
        return time.clock_gettime(~process.pid << 3 | 2)  # as clock_getcpuclockid makes it
    except OSError:
        return sum(process.cpu_times()[:2])


def unreaped(process: psutil.Process, server: psutil.Process | None) -> bool:
    """Tell whether a runner is dead or killed, and its server still waits for its end."""
    try:
        return server is not None and process.ppid() == server.pid and dying(process)
    except psutil.Error:
        return False


def main_thread_cpu_s(process: psutil.Process) -> float:
    """Return the CPU time of the thread that decodes, whose id is the process's."""
    with contextlib.suppress(psutil.Error):
        for thread in process.threads():
            if thread.id == process.pid:
                return thread.user_time + thread.system_time
    return 0.0


def model_names(runners: list[Runner], loaded: list[Json]) -> dict[psutil.Process, str]:
    """Map runners to their models' names: by the blob, else as the only one that is left."""
    listed = {name_key(model["name"]): model["name"] for model in loaded}
    by_digest: dict[str, str] = {}
    for key, digests in store.models().items():
        if key in listed:  # of several names for one blob the one that Ollama shows
            by_digest[digests[0]] = listed[key]
        by_digest.setdefault(digests[0], key)
    found = {
        runner.process: by_digest[runner.digest] for runner in runners if runner.digest in by_digest
    }
    others = [runner for runner in runners if runner.process not in found]
    left = [name for name in listed.values() if name not in found.values()]
    if len(others) == 1 and len(left) == 1:
        found[others[0].process] = left[0]
    return found


watch = Watch()

# ---------------------------------------------------------------------------------------
# Clear and reset
# ---------------------------------------------------------------------------------------


class Steps(list):
    """The steps of a clear or reset, as they are answered."""

    def run(
        self,
        step: str,
        work: typing.Callable[[], typing.Any],
        detail: typing.Callable[[typing.Any], str],
    ) -> typing.Any:
        """Do a step and note how it went; return its result, None if Ollama failed it."""
        began, result, ok = time.monotonic(), None, True
        try:
            result = work()
            words = detail(result)
        except ServiceError as e:
            ok, words = False, str(e)
        seconds = round(time.monotonic() - began, 3)
        ok = ok and result is not False
        self.append({"step": step, "ok": ok, "seconds": seconds, "detail": words})
        return result


class Clearing:
    """One clear: choose, unload, wait, end, measure, report."""

    def __init__(self, model: str | None, force: bool, deadline: float):
        self.steps = Steps()
        self._model, self._force, self._deadline = model, force, deadline
        known = {*processes.runners(), *watch.known_runners()}  # with those not reaped
        self._there = [runner for runner in known if runner.process.is_running()]
        self._loaded: list[str] = []
        self._names: dict[psutil.Process, str] = {}
        self._killed: list[Json] = []
        self._before_mb = used_mb(self._there)

    def run(self) -> Json:
        """Do it; return the report."""
        mine, asked = self._choose()
        if asked and self.steps.run("unload", lambda: unload(asked), lambda _: ", ".join(asked)):
            until = min(time.monotonic() + UNLOAD_WAIT_S, self._deadline - 1.2)
            self.steps.run(
                "wait",
                lambda: wait_until(lambda: not left_of(mine), until),
                lambda ok: "all gone" if ok else "busy or hung ones stay",
            )
        if self._force and left_of(mine):
            self._killed = self.steps.run(
                "end_runners",
                lambda: self._end_runners(left_of(mine)),
                lambda ended: f"{len(ended)} ended",
            )
            unload(asked)  # Ollama lists a busy one that was killed until it is asked
        names = asked if self._model else [*asked, *filter(None, map(self._name_of, mine))]
        return self._report(mine, {name_key(name): name for name in names})

    def _choose(self) -> tuple[list[Runner], list[str]]:
        """Return the runners and the names that this clear is about."""
        listed = self.steps.run(
            "list", lambda: ollama.ps(0.4), lambda models: f"{len(models)} loaded"
        )
        self._names = model_names(self._there, listed or [])
        self._loaded = [model["name"] for model in listed or []]
        if not self._model:
            return self._there, self._loaded
        key = name_key(self._model)
        digests = store.models().get(key, [])  # it may have been deleted meanwhile
        mine = [
            runner
            for runner in self._there
            if runner.digest in digests or self._key_of(runner) == key
        ]
        listed_as = [name for name in self._loaded if name_key(name) == key]
        return mine, listed_as or ([self._model] if mine else [])

    def _name_of(self, runner: Runner) -> str | None:
        return self._names.get(runner.process)

    def _key_of(self, runner: Runner) -> str:
        return name_key(self._names.get(runner.process, "unknown"))

    def _end_runners(self, runners: list[Runner]) -> list[Json]:
        """End runners by SIGKILL; return ``[{"pid", "model", "reason"}]``."""
        server = processes.server()
        ended = []
        for runner, reason in zip(
            runners, in_parallel(lambda each: reason_to_end(each, server), runners), strict=True
        ):
            log.error(
                "ending runner %d of %s: %s", runner.process.pid, self._name_of(runner), reason
            )
            end(runner.process)
            entry = {"pid": runner.process.pid, "model": self._name_of(runner), "reason": reason}
            ended.append(entry)
        wait_until(lambda: not left_of(runners), time.monotonic() + KILL_WAIT_S)
        return ended

    def _report(self, mine: list[Runner], names: dict[str, str]) -> Json:
        left = {*map(self._key_of, left_of(mine))} & {*names}
        new = [runner for runner in processes.runners() if runner not in self._there]
        new_names = model_names(new, [])
        held = self._held_by_ollama(mine, {*names} - {*map(name_key, new_names.values())})
        verified = self.steps.run(
            "verify",
            lambda: not left_of(mine) and not held,
            lambda ok: "gone" if ok else "still there",
        )
        return {
            "unloaded_models": sorted(names[key] for key in {*names} - left - held),
            "killed": self._killed,
            "left": sorted(names.get(key, key) for key in left | held),
            "new_runners": [{"pid": r.process.pid, "model": new_names.get(r.process)} for r in new],
            "memory": self._memory(),
            "verified": bool(verified),
            "survived": bool(left_of(mine)),
            "managed": True,
            "steps": self.steps,
        }

    def _memory(self) -> Json:
        """Measure what came free."""
        if gpu.sample()["memory_shared"]:
            store.drop_page_cache()
        source, before_mb = self._before_mb
        _, after_mb = used_mb(left_of(self._there))
        freed_mb = max(0, before_mb - after_mb)
        return {
            "source": source,
            "before_mb": before_mb,
            "after_mb": after_mb,
            "freed_mb": freed_mb,
        }

    def _held_by_ollama(self, mine: list[Runner], keys: set[str]) -> set[str]:
        """Return the keys of what an Ollama that answers has not let go.

        It lists a model of these keys, or waits for the end of a runner that is dead. What was
        deleted or updated while it was loaded has no name to unload it by: it stays listed
        until its time is over, and holds nothing.
        """
        if not self._force and left_of(self._there):
            return set()
        server, deadline = processes.server(), min(time.monotonic() + 0.6, self._deadline)
        held: set[str] = set()

        def look() -> bool:
            held.clear()
            dead = [runner for runner in mine if unreaped(runner.process, server)]
            held.update(map(self._key_of, dead))
            with contextlib.suppress(ServiceError):
                held.update(keys & set(map(name_key, unloadable(ollama.ps(0.3)))))
            return not held

        return held if not wait_until(look, deadline) and answering() else set()


class Healer:
    """Clear and reset, one run at a time; who comes meanwhile shares what fits."""

    def __init__(self):
        self.load: Json | None = None  # the last background load: model, state, error
        self.clears_done, self.resets_done = 0, 0
        self._clears = SharedRun(clear_suits)
        self._resets = SharedRun(reset_suits)
        self._reset_began: float | None = None  # of the reset under way
        self._restarted_at = 0.0

    def clear(self, model: str | None = None, force: bool = True) -> Json:
        """Unload all models or one; with ``force`` end the runners left. Returns the report."""
        report = self._clear(model, force, time.monotonic() + CLEAR_S)
        if force and not report["verified"]:
            raise clear_failure(report)
        return {"status": "success", "message": clear_message(report), **report}

    def reset(self, model: str | None = None, restart: bool = False) -> Json:
        """Clear all, restart Ollama where it must be, load the model that is due."""
        came, key = time.monotonic(), (model and name_key(model), restart)
        report = self._resets.get(
            lambda: self._reset(model, restart, came), RESET_S + SHARE_S, key, came
        )
        return report

    def recover(self) -> Json:
        """Clear what is idle; answer as the service that this one replaces does."""
        report = self.clear(force=False)
        total_mb = gpu.memory_totals(gpu.sample())[1]
        memory = psutil.virtual_memory()
        free_mb = total_mb - report["memory"]["after_mb"] if total_mb else memory.available // MB
        return {
            "status": "recovered",
            "freed_mb": report["memory"]["freed_mb"],
            "free_mb": free_mb,
            "unloaded_models": report["unloaded_models"],
            "can_retry": not report["left"],
        }

    def end_runner(self, runner: Runner, model: str | None) -> int:
        """End one runner, and only that one; return the MB that came free."""
        with self._clears.turn(CLEAR_S):
            _, before_mb = used_mb([runner])
            # A name that was updated since is another runner's.
            fits = runner.digest in (None, *store.models().get(name_key(model or ""), []))
            names = [model] if model and fits else []
            unload(names)
            end(runner.process)
            wait_until(lambda: not alive(runner.process), time.monotonic() + KILL_WAIT_S)
            unload(names)
            _, after_mb = used_mb(left_of([runner]))
            watch.look()
        return max(0, before_mb - after_mb)

    def restart_server(self) -> int:
        """End a server that hangs or has a ghost; return the MB that came free."""
        deadline = time.monotonic() + RESET_S
        with self._resets.turn(RESET_S), self._clears.turn(RESET_S):
            runners = processes.runners()
            _, before_mb = used_mb(runners)
            self._restart(Steps(), max(deadline, time.monotonic() + 1), grace_s=0)
            _, after_mb = used_mb(left_of(runners))
            watch.look()
        return max(0, before_mb - after_mb)

    def _clear(self, model: str | None, force: bool, deadline: float) -> Json:
        must_exist(model)
        key = (model and name_key(model), force)

        def work() -> Json:
            self.clears_done += 1
            report = Clearing(model, force, deadline).run()
            if not self._reset_began:  # a reset looks at its end
                watch.look_before(deadline)
            return report

        came = self._reset_began or time.monotonic()
        return self._clears.get(work, deadline - time.monotonic() + SHARE_S, key, came)

    def _reset(self, model: str | None, restart: bool, came: float) -> Json:
        must_exist(model)
        self._reset_began = came
        try:
            cleared = self._clear(None, True, came + CLEAR_S - 1)
            steps = Steps(cleared["steps"])
            self._restart_if_due(cleared, restart, came, steps)
            watch.look_before(came + RESET_S + SHARE_S)
        finally:
            self._reset_began = None
        due = self._model_due(model, cleared["unloaded_models"])
        state = self._load(due, came + RESET_S) if due else "none"
        said = f"{due} is {state}" if due else f"no model to load ({MODEL} is not downloaded)"
        steps.append({"step": "load", "ok": True, "seconds": 0, "detail": said})
        self.resets_done += 1
        return {
            "status": "success",
            "message": f"Session reset, {said}.",
            "steps": steps,
            "model": due,
            "model_state": state,
            "memory": cleared["memory"],
            "managed": True,
        }

    def _restart_if_due(self, cleared: Json, restart: bool, came: float, steps: Steps) -> None:
        """Restart a server that hangs, has a ghost, or shall be restarted."""
        server, deadline = processes.server(), came + RESET_S
        if server and watch.server.starting(server):
            steps.run("start_ollama", lambda: True, lambda _: "it is starting")
            return
        answers = steps.run("ask_ollama", lambda: ollama.version(0.4), "version {}".format)
        healthy = answers and cleared["verified"]
        if healthy and (not restart or self._restarted_at > came):
            return
        grace_s = min(1, deadline - time.monotonic() - 0.5) if healthy else 0
        if not self._restart(steps, deadline, grace_s) and server:
            raise restart_incomplete(steps)

    def _restart(self, steps: Steps, deadline: float, grace_s: float) -> bool:
        """End the server, heed SIGTERM or not, and wait for the launcher's new one."""
        downloads.reconnect()  # while Ollama still keeps their parts
        steps.run(
            "end_ollama",
            lambda: processes.end_server(grace_s),
            lambda ok: "ended" if ok else "it does not end",
        )
        answers = steps.run(
            "start_ollama",
            lambda: wait_until(answering, deadline),
            lambda ok: "answers" if ok else "being started by the launcher",
        )
        self._restarted_at = time.monotonic()
        return bool(answers)

    def _model_due(self, model: str | None, unloaded: list[str]) -> str | None:
        there = store.models()
        for name in (model, MODEL, *unloaded):
            if name and name_key(name) in there:
                return name
        return None

    def _load(self, model: str, deadline: float) -> str:
        """Load in the background; return how it stands at the deadline, or after a moment."""
        load = self.load = {"model": model, "state": "loading", "error": None}

        def work() -> None:
            wait_until(answering, time.monotonic() + STARTING_S)
            try:
                if self.load is load:  # else a later reset has taken over
                    ollama.load(model)
                load["state"] = "loaded"
            except ServiceError as e:
                log.error("load %s: %s", model, e)
                load.update(state="failed", error=str(e))

        loader = threading.Thread(target=work, name=f"load {model}", daemon=True)
        loader.start()
        loader.join(max(0, min(0.3, deadline - time.monotonic())))
        return "loaded" if load["state"] == "loaded" else "loading"


def clear_suits(outcome: Outcome, key: object, came: float) -> bool:
    """A clear serves who came before its end and asked for the same, or for less."""
    return outcome.ended >= came and outcome.key in (key, (None, True))


def reset_suits(outcome: Outcome, key: object, came: float) -> bool:
    """A reset serves who came before its end and asked for the same."""
    return outcome.ended >= came and outcome.key == key


def left_of(runners: list[Runner]) -> list[Runner]:
    """Return those that still live."""
    return [runner for runner in runners if alive(runner.process)]


def reason_to_end(runner: Runner, server: psutil.Process | None) -> str:
    """Tell why a runner must be ended: "orphan", "hung" or "busy"."""
    with contextlib.suppress(psutil.Error):
        if not server or runner.process.ppid() != server.pid:
            return "orphan"
        if runner.process.status() == psutil.STATUS_STOPPED:
            return "hung"
    if watch.state_of(runner.process) in ("stuck", "silent"):
        return "hung"
    return "hung" if ollama.runner_health(runner.port, 0.2) == "silent" else "busy"


def used_mb(runners: list[Runner]) -> tuple[str, int]:
    """Measure where the models lie: the source and the MB in use.

    Where the GPU does not tell, it is what the runners hold: the machine's figure moves by
    itself.
    """
    source, used = gpu.memory_in_use(gpu.sample())
    if used is not None:
        return source, used
    held = 0
    for runner in runners:
        with contextlib.suppress(psutil.Error):
            held += runner.process.memory_info().rss
    return "system", held // MB


def unload(names: list[str]) -> bool:
    """Ask for all of them at once; return whether Ollama took at least one."""

    def ask(name: str) -> bool:
        try:
            ollama.unload(name, 0.4)
            return True
        except ServiceError as e:
            log.warning("unload %s: %s", name, e)
            return False

    return any(in_parallel(ask, names))


def unloadable(loaded: list[Json]) -> set[str]:
    """Return the names by which these lines of ``/api/ps`` can be unloaded.

    One that was deleted or updated while it was loaded has no name any more.
    """
    there = {model.get("digest") for model in tags(ASK_S)}
    return {model["name"] for model in loaded if model.get("digest") in there}


def answering() -> bool:
    """Tell whether Ollama answers."""
    try:
        return bool(ollama.version(0.5))
    except ServiceError:
        return False


def clear_message(report: Json) -> str:
    """Say in a sentence what a clear did."""
    done = []
    if report["unloaded_models"] or report["killed"]:
        done.append(f"{len(report['unloaded_models'])} unloaded")
        done.append(f"{report['memory']['freed_mb']} MB came free")
    elif not report["left"]:
        done.append("nothing was loaded")
    if report["killed"]:
        done.append(f"{len(report['killed'])} runner(s) ended")
    if report["left"]:
        done.append(f"still busy: {', '.join(report['left'])}")
    return f"Cache cleared: {', '.join(done)}."


def restart_incomplete(steps: Steps) -> ServiceError:
    """Make the 503 of a reset whose new server is not there in time."""
    missing = "has not been started by the launcher yet"
    if processes.server():
        missing = "has not answered yet"
    return ServiceError(
        "restart_incomplete",
        f"Ollama was ended, and the new one {missing}: ask /health, which says when it is there.",
        recommended_action="wait",
        steps=steps,
    )


def clear_failure(report: Json) -> ServiceError:
    """Make the 503 of a clear that did not free all."""
    if report["survived"]:
        words = "A runner does not end, not even by SIGKILL: reboot the host."
        return ServiceError("runner_survived", words, recommended_action="reboot_host", **report)
    words = "Ollama goes on listing a runner that is dead: POST /api/session/reset."
    return ServiceError("runner_ghost", words, recommended_action="reset_session", **report)


healer = Healer()

# ---------------------------------------------------------------------------------------
# gunicorn's worker
# ---------------------------------------------------------------------------------------

bind = f"[{API_HOST}]:{API_PORT}" if ":" in API_HOST else f"{API_HOST}:{API_PORT}"
workers = 1
threads = 256  # made on demand; a stream or a slow client holds one
worker_connections = 1024
timeout = 30  # of the worker's own loop, not of a request
graceful_timeout = 5
keepalive = 30
control_socket_disable = True
loglevel = "warning"  # without a line for each step of its own start
forwarded_allow_ips = ""  # nobody may rewrite scheme or path by headers


def on_starting(_server):
    """End the start with one line where Ollama has no home or an address is not free."""
    check_home()
    ollama_host = os.environ.get("OLLAMA_HOST") or "127.0.0.1:11434"
    addresses = [
        (
            f"LLM_API_HOST={API_HOST}, LLM_API_PORT={API_PORT}",
            (API_HOST, API_PORT),
            "stop what listens there, or set another address",
        ),
        (
            f"OLLAMA_HOST={ollama_host}",
            listen_address(ollama_host),
            "stop what listens there (a system's Ollama by: systemctl stop ollama) and give "
            "this service its OLLAMA_MODELS, or set another OLLAMA_HOST",
        ),
    ]
    with contextlib.ExitStack() as listening:  # at both at once, as they could be the same
        for name, (host, port), advice in addresses:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            try:
                listening.enter_context(socket.create_server((host, port), family=family))
            except (OSError, UnicodeError) as e:  # the latter for a name such as a..b
                taken = getattr(e, "errno", None) == errno.EADDRINUSE
                reason = in_the_way(port) if taken else str(e)
                reason = reason.partition(" (")[0]
                sys.exit(f"llm-service: cannot listen at {name} ({reason}): {advice}")


def check_home() -> None:
    """End the start where Ollama cannot make its key, which it does before anything else."""
    folder = os.path.expanduser("~/.ollama")
    with contextlib.suppress(OSError):
        os.makedirs(folder, exist_ok=True)
    writable = os.access(folder, os.W_OK | os.X_OK)
    if not writable and not os.path.exists(f"{folder}/id_ed25519"):
        sys.exit(
            f"llm-service: user {os.geteuid()} cannot write to {folder}, where Ollama keeps its "
            "key and its models (in Docker: the volume): run as its owner, "
            f"chown -R {os.geteuid()} it, or set another HOME"
        )


def in_the_way(port: int) -> str:
    """Name the process that listens on a port, as far as the system tells."""
    with contextlib.suppress(psutil.Error, OSError):
        for each in psutil.net_connections("tcp"):
            listens = each.status == psutil.CONN_LISTEN and each.laddr[1:2] == (port,)
            if listens and each.pid:
                return f"{psutil.Process(each.pid).name()}, process {each.pid}, listens there"
    return "another user's process listens there"


def when_ready(_server):
    """Write what Ollama's environment needs, for the launcher, which waits for it."""
    layers = {"-1": "all", "auto": ""}.get(GPU_LAYERS, GPU_LAYERS)
    needed = {
        "OLLAMA_CONTEXT_LENGTH": CONTEXT_LENGTH,
        "OLLAMA_NOPRUNE": os.environ.get("OLLAMA_NOPRUNE") or "1",
        "LLAMA_ARG_N_GPU_LAYERS": os.environ.get("LLAMA_ARG_N_GPU_LAYERS") or layers,
    }
    lines = [f"{name}={value}\n" for name, value in needed.items() if value]
    if STATE_FILE != os.devnull:
        pathlib.Path(f"{STATE_FILE}.env.new").write_text("".join(lines))
        os.replace(f"{STATE_FILE}.env.new", f"{STATE_FILE}.env")
    log.info("listening at http://%s", bind)


def pre_fork(_server, _worker):
    """Keep what is imported out of the collector's way: both processes share its pages."""
    gc.freeze()


def pre_request(_worker, req):
    """Close the connection, and say so, where the body may not be read to its end."""
    fields = dict(req.headers)
    if "TRANSFER-ENCODING" in fields or int(fields.get("CONTENT-LENGTH", 0)) > BODY_LIMIT_BYTES:
        req.force_close()


def post_worker_init(_worker):
    """Begin to watch, in the one process that answers."""
    watch.start()


def tell_keep_alive(answer: typing.Callable) -> typing.Callable:
    """Wrap the WSGI app: say for how long a kept connection stays open.

    gunicorn drops this header where the app sets it, and knows the time.
    """

    def wrapped(environ, start_response):
        def start(*args):
            write = start_response(*args)
            response = getattr(start_response, "__self__", None)  # gunicorn's
            if response and not response.should_close():
                response.headers.append(("Keep-Alive", f"timeout={keepalive}"))
            return write

        return answer(environ, start)

    return wrapped


app.wsgi_app = tell_keep_alive(app.wsgi_app)  # type: ignore[method-assign]


class ServiceLogger(Logger):
    """gunicorn's logger with one line a request, but none for what is asked all the time."""

    QUIET_PATHS = ("/health", "/livez", "/metrics")

    def access(self, resp, _req, environ, request_time):
        status = resp.status.partition(" ")[0]
        if environ.get("PATH_INFO") in self.QUIET_PATHS and status == "200":
            return
        log.info(
            "%s %s %s %s %s bytes %d ms",
            environ.get("REMOTE_ADDR"),
            environ.get("REQUEST_METHOD"),
            ascii(environ.get("RAW_URI"))[1:-1],
            status,
            resp.sent,
            request_time.total_seconds() * 1000,
        )

    def exception(self, msg, *args, **kwargs):
        if isinstance(sys.exc_info()[1], BlockingIOError):
            words = "a client neither sent nor took anything for %d s"
            log.warning(words, SILENT_CLIENT_S)
        else:
            super().exception(msg, *args, **kwargs)


class ServiceWorker(ThreadWorker):
    """gunicorn's threaded worker, with JSON errors and no thread for a silent client."""

    # What gunicorn refuses by itself, and its status; anything else of its parser is a 400.
    REFUSALS = [
        (http_errors.LimitRequestLine, 414, "URI Too Long"),
        (http_errors.LimitRequestHeaders, 431, "Request Header Fields Too Large"),
        (http_errors.ExpectationFailed, 417, "Expectation Failed"),
        (http_errors.UnsupportedTransferCoding, 501, "Not Implemented"),
        (http_errors.ParseException, 400, "Bad Request"),
        (Exception, 500, "Internal Server Error"),
    ]

    def init_process(self):
        """Let the connections inherit a limit: half a request holds a thread no longer."""
        limit = struct.pack("ll", SILENT_CLIENT_S, 0)
        for listener in self.sockets:
            listener.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
            listener.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        super().init_process()

    def handle_exit(self, sig, frame):
        """End the downloads, and so the streams, at SIGTERM."""
        threading.Thread(target=downloads.close, daemon=True).start()
        super().handle_exit(sig, frame)

    def handle(self, conn):
        """Give a client that has sent nothing back to the poller."""
        if not conn.initialized and not conn.wait_for_data(DEFER_S):
            return _DEFER
        return super().handle(conn)

    def finish_request(self, conn, fs):
        """Wait for a client to close outside of the main loop, where it would stop others."""
        if fs.cancelled() or fs.exception() or fs.result():
            super().finish_request(conn, fs)
        else:
            self.nr_conns -= 1
            threading.Thread(target=close_connection, args=(conn.sock,), daemon=True).start()

    def handle_error(self, _req, client, addr, exc):
        """Answer what gunicorn refuses by itself as JSON."""
        if not isinstance(exc, http_errors.ParseException):
            self.log.exception("Error handling request")
        else:
            self.log.warning("Invalid request from %s: %s", (addr or ["?"])[0], ascii(str(exc)))
        status, reason = next(
            (status, reason) for kind, status, reason in self.REFUSALS if isinstance(exc, kind)
        )
        error = f"{reason}: check how the request is written."
        body = json.dumps({"error": error, "code": "bad_request"})
        head = (
            f"HTTP/1.1 {status} {reason}\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        with contextlib.suppress(OSError):
            client.sendall((head + body).encode())


def close_connection(sock: socket.socket) -> None:
    """Close a connection once its client has read the answer.

    What the client still sends is taken, or the kernel would reset the connection and drop
    the answer.
    """
    taken, deadline = 0, time.monotonic() + 2
    with contextlib.suppress(OSError), sock:
        sock.shutdown(socket.SHUT_WR)
        while taken < LINGER_BYTES and time.monotonic() < deadline:
            sock.settimeout(max(0.01, deadline - time.monotonic()))
            piece = sock.recv(1 << 16)
            if not piece:
                return
            taken += len(piece)


worker_class = ServiceWorker
logger_class = ServiceLogger
