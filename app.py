"""The LLM Service: a management API beside Ollama.

It lists, downloads and deletes models, tells the truth about the machine, and gets GPU memory
back when things go wrong. gunicorn serves it and reads its own settings from here too
(``gunicorn -c python:app app:app``). There is one worker, so that all state is in one place.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import datetime
import errno
import functools
import gc
import hmac
import ipaddress
import json
import logging
import math
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
from http import HTTPStatus

import psutil
from flask import Flask, Response, request
from gunicorn.glogging import Logger
from gunicorn.http import errors as http_errors
from gunicorn.workers.gthread import ThreadWorker
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

import gpu
from ollama_client import (
    ANSWER_S,
    DISK_RESERVE_BYTES,
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
    cpu_clock_s,
    dial_url,
    dying,
    end,
    failure,
    listen_address,
    name_key,
    runs,
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
    found = set()
    for item in text.lower().split(","):
        found.add(item.strip().rstrip("/"))
    return found - {""}


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
LINGER_BYTES = 16 << 20  # of a refused body are taken, so that its client reads the answer
FIRST_NEWS_S = 10  # then a pull starts to stream without knowing how it stands
ASK_S = 0.6  # two such questions and a list stay within the 3 s of /health
LIST_S = 1.2
CLEAR_S = 3.7
RESET_S = 3.9
SHARE_S = 0.4  # a run may end that much late, and who shares it waits for that
HEALTH_S = 3
CLEAR_ASK_S = 0.4  # for each question of a clear
CLEAR_RUNNER_S = 0.2  # the same to a runner
UNLOAD_WAIT_S = 1.5
KILL_WAIT_S = 0.9
VERIFY_WAIT_S = 0.6
KILL_RESERVE_S = 1.2  # of a clear's time, to end runners and to measure
STARTING_S = 300
LOOK_S = 2
DISK_LOW_BYTES = DISK_RESERVE_BYTES  # where downloads stop, too
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
    return checks.get(check_health, HEALTH_S)


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
    loaded = list(map(loaded_entry, watch.server.loaded_now()))
    return {"loaded_models": loaded, "count": len(loaded)}


@app.post("/api/models/pull")
def pull():
    """Download a model, or join its download."""
    asked = arguments(
        model=True,
        stream=True,
        insecure=False,
        detach=False,
        verify=False,
    )
    download, lines = downloads.pull(
        asked.model,
        asked.insecure,
        asked.detach,
        asked.verify,
    )
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


@functools.lru_cache(2)  # a clear has another time limit
def tags_of(_signature: tuple, timeout_s: float) -> list[Json]:
    """Return the models of a store with this signature."""
    return ollama.tags(timeout_s)


def list_models() -> str:
    """Return the answer of ``GET /api/models``, as JSON text."""
    loaded = watch.server.loaded_now()
    by_name = {model["name"]: model for model in loaded}
    by_digest = {model.get("digest"): model for model in loaded}
    listed = []
    for model in tags(LIST_S):
        match = by_name.get(model["name"])
        if not match:
            match = by_digest.get(model.get("digest"), {})
        listed.append(model_entry(model, match))
    answer = {"models": listed, "count": len(listed)}
    return json.dumps(answer, separators=(",", ":")) + "\n"


def began_since(outcome: Outcome, _key: object, came: float) -> bool:
    """An answer serves who came before it was begun: it is as fresh as one's own."""
    return outcome.began >= came


listing = SharedRun(began_since)
checks = SharedRun(began_since)


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
    if watch.gpu["state"] == "lost":
        words = "The GPU is lost to this container: restart it; if that fails, reboot the host."
        raise unhealthy("gpu_lost", words, gpu.ACTIONS["lost"])
    server = watch.process  # before it is asked: the next one may be there afterwards
    try:
        names = [model["name"] for model in tags(LIST_S)]
        loaded = loaded_or_seen()
    except ServiceError as e:
        raise unhealthy(*diagnose(e, server)) from e
    watch.raise_fault()
    warnings = find_warnings(watch.gpu, loaded)
    return {
        "status": "healthy",
        "models_count": len(names),
        "models": names,
        "loaded": [model["name"] for model in loaded],
        "ollama_version": watch.server.known_version(),
        "gpu": watch.gpu["state"],
        "recommended_action": gpu.ACTIONS[watch.gpu["state"]],
        "load": healer.load,
        "runners": watch.runners(),
        "looked_at": timestamp(watch.looked_at),
        "warnings": warnings,
        "warning": warnings[0]["message"] if warnings else None,
    }


def loaded_or_seen() -> list[Json]:
    """Return what Ollama has loaded, or had at the last look while it holds its lock.

    It holds it while it settles with a runner, for 20 s; only a server that does not answer
    ``/api/version`` either hangs.
    """
    try:
        return watch.server.loaded_now(ASK_S)
    except ServiceError as e:
        if e.code != "ollama_timeout":
            raise
        server = processes.server()
        ollama.version(ASK_S)
        watch.server.note_answer(server)
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
    if server is None or processes.ending(server):
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
    # Ollama may list dead ones, and one that still loads has not filled its memory.
    there = {each["model"] for each in watch.runners() if each["state"] != "loading"}
    warnings += gpu_warnings(reading, [each for each in loaded if each["name"] in there])
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
    used_mb, _ = gpu.memory_totals(reading)
    for model in loaded:
        words = part_on_cpu(model, used_mb)
        if words:
            warnings.append(("model_on_cpu", words))
    claimed_mb = sum(bytes_of(model, "size_vram") for model in loaded) // MB
    if used_mb is not None and claimed_mb > used_mb:
        words = (
            f"Ollama says that {claimed_mb} MB of its models lie on the GPU, of which only "
            f"{used_mb} MB are in use: the models run on the CPU. {GPU_ADVICE}"
        )
        warnings.append(("gpu_not_used", words))
    return warnings


def part_on_cpu(model: Json, used_mb: int | None) -> str:
    """Say how much of a model lies in system memory, and what to do; "" where nothing should.

    ``used_mb`` is the memory in use on the GPUs.
    """
    size_mb = bytes_of(model, "size") // MB
    vram_mb = bytes_of(model, "size_vram") // MB
    if GPU_LAYERS == "0" or vram_mb >= size_mb:
        return ""
    hidden = not vram_mb or (used_mb is not None and vram_mb > used_mb)
    advice = NO_GPU_ADVICE if hidden else PARTLY_ADVICE
    missing = f"{size_mb - vram_mb} of {size_mb} MB of {model['name']} lie in system memory"
    return f"{missing}, which is slow. {advice}"


def bytes_of(model: Json, key: str) -> int:
    """Return a figure of a line of ``/api/ps``; 0 where it is none."""
    figure = model.get(key)
    return figure if isinstance(figure, int) else 0


# ---------------------------------------------------------------------------------------
# Stats and metrics
# ---------------------------------------------------------------------------------------


def machine_stats() -> Json:
    """Return the answer of ``GET /api/stats``. What the watch sees is as of its last look."""
    reading = watch.gpu
    memory = watch.memory
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
        "disk": watch.disk,
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
    known = [each for each in figures if each is not None]
    return max(known, default=None)


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
        "up": watch.up if stats["gpu"] != "lost" else 0,
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

RUNNER_ASK_S = 0.5  # for each question of a look
LONG_IDLE_S = 30  # then a runner is asked though it uses no CPU
GAP_S = 6  # between two looks: the machine was asleep, what was counted is void
STUCK_LOOKS = 10
SILENT_S = 10  # three looks at least, as two are never further apart than GAP_S
GHOST_S = 10
WORKING_SHARE = 0.05  # of a core, by which a runner's main thread shows that it computes
SLOW_FACTOR = 10  # more patience for a model that is not wholly on the GPU and computes
WAKE_CPU_S = 0.0005  # a request takes 1 ms, two seconds of an idle runner 0.05 ms
# What Ollama's server uses at rest, and for one /api/ps; a change of models takes 1 ms more.
QUIET_CPU_S = 0.0002
QUESTION_CPU_S = 0.001
HUNG_LOOKS = 15
HEALINGS = 3  # of one model in HEALINGS_S, then it is left alone
HEALINGS_S = 1800
DISK_LOOK_S = 60


@dataclasses.dataclass
class Look:
    """What one look at a runner saw. ``slots`` is None where it was not asked or has none."""

    at: float  # monotonic
    health: str = "unasked"  # or "ok", "loading", "silent", "dead", "orphan"
    slots: list[Json] | None = None
    late: bool = False  # /slots has not answered
    main_cpu_s: float = 0.0  # CPU time of the main thread
    working: bool = False  # it has used CPU since the last look
    active: bool = False  # something may have changed
    due: bool = False  # it is to be asked
    on_gpu: bool = False  # the model lies there wholly


class RunnerState:
    """One runner's state by the rules in the README. It has no clock of its own."""

    def __init__(self, runner: Runner, now: float):
        self.runner = runner
        self.process = runner.process
        self.model: str | None = None
        self.state = "loading"
        self.since = now
        self.evidence = ""  # of a fault, as it was at the verdict
        self.healed: str | None = None  # the fault that it was healed of
        self.tokens = 0
        self.tokens_per_second = 0.0
        self.memory_mb = 0
        self.cpu_percent = 0.0
        self.under_way = True  # at the last look
        self._cpu_s = 0.0
        self._cpu_at = now  # when that was read
        self._worked = False  # used CPU at the last look, if it has no slots
        self.asked_at = now
        self._looked_at = now
        self._step_s = 0.0  # between the last two looks
        self._counters: list[tuple] = []  # of each slot: task, prompt tokens, tokens decoded
        # The last looks without progress; it is full once these are enough for a verdict.
        self._still: collections.deque[Look] = collections.deque(maxlen=STUCK_LOOKS)
        self._begin_count(now)

    def cpu_spent(self, now: float) -> tuple[float, float]:
        """Return the CPU seconds since the last call, and the seconds that passed."""
        cpu_s, at = self._cpu_s, self._cpu_at
        self._cpu_s, self._cpu_at = cpu_seconds(self.process), now
        return self._cpu_s - cpu_s, now - at

    def note(self, look: Look) -> None:
        """Note a look and come to the state that follows."""
        self._step_s = look.at - self._looked_at
        self._looked_at = look.at
        self.tokens_per_second = 0.0
        if self._step_s > GAP_S:
            self._begin_count(look.at)
        state = self._judge(look)
        if state != self.state:
            self.state = state
            self.since = look.at

    def _begin_count(self, now: float) -> None:
        self._began = {"stuck": now}  # since when each fault shows
        self._still.clear()

    def _judge(self, look: Look) -> str:
        if look.health == "silent":
            self.under_way = True  # so that it is asked again
            words = "its /health has not answered"
            return self._judge_fault("silent", look, SILENT_S, words, self.state)
        self._began.pop("silent", None)
        if look.health == "dead":
            words = "it has been dead and Ollama waits for its end"
            return self._judge_fault("ghost", look, GHOST_S, words, self.state)
        if look.health == "ok":
            return self._judge_work(look)
        self._begin_count(look.at)
        if look.health == "unasked":
            return self.state
        self.under_way = look.health == "loading"
        return look.health

    def _judge_work(self, look: Look) -> str:
        if look.late:
            self.under_way = True
            moved = False
        elif look.slots is None:
            # One look without CPU is no idleness: on a busy machine it may have got none.
            self.under_way = moved = look.working or self._worked
            self._worked = look.working
        else:
            self.under_way = is_working(look.slots)
            moved = self._count_tokens(look.slots)
        if moved or not self.under_way:
            self._begin_count(look.at)
            return "busy" if self.under_way else "idle"
        self._still.append(look)
        if len(self._still) < STUCK_LOOKS:
            return "busy"
        words = f"its counters have stood at {self._counters}"
        if look.late:
            words = "its /slots has not answered"
        return self._judge_fault("stuck", look, self._patience_s(look), words, "busy")

    def _judge_fault(
        self, fault: str, look: Look, patience_s: float, words: str, until_then: str
    ) -> str:
        """Return the fault as the state once it has shown for so long."""
        seconds = look.at - self._began.setdefault(fault, look.at)
        if seconds < patience_s:
            return until_then
        if self.state != fault:
            self.evidence = f"for {seconds:.0f} s {words}"
        return fault

    def _patience_s(self, look: Look) -> float:
        """One batch of a large model takes minutes on a CPU, and moves no counter meanwhile."""
        first = self._still[0]
        used_s = look.main_cpu_s - first.main_cpu_s
        computes = used_s >= WORKING_SHARE * (look.at - first.at)
        return STUCK_S * SLOW_FACTOR if computes and not look.on_gpu else STUCK_S

    def _count_tokens(self, slots: list[Json]) -> bool:
        """Count what was decoded since the last look; return whether any counter moved."""
        before = self._counters
        self._counters = list(map(slot_counters, slots))
        new = 0
        for (old_task, _, old), (task, _, decoded) in zip(before, self._counters, strict=False):
            goes_on = task == old_task and decoded >= old  # its end sets it to 0
            new += decoded - old if goes_on else decoded
        self.tokens += new
        self.tokens_per_second = round(new / max(self._step_s, 0.1), 1)
        return self._counters != before

    def report(self, now: float) -> Json:
        """Return the line of ``runners`` in /health and /api/stats."""
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


def is_working(slots: list[Json]) -> bool:
    """Tell whether something is under way in a runner's slots."""
    return any(slot.get("is_processing") for slot in slots)


def slot_counters(slot: Json) -> tuple[object, object, int]:
    """Return a slot's task, the prompt tokens processed for it and the tokens decoded."""
    token = slot.get("next_token") or {}
    token = token[0] if isinstance(token, list) else token
    decoded = token.get("n_decoded")
    if not isinstance(decoded, int):
        decoded = 0
    return slot.get("id_task"), slot.get("n_prompt_tokens_processed"), decoded


class ServerState:
    """Whether the server has answered since it was started, and for how long it is silent."""

    def __init__(self):
        self.version: str | None = None
        self._answered: psutil.Process | None = None
        self._silent_looks = 0
        # The server of the last answer of /api/ps, its CPU time then, and the answer
        self._listed: tuple[psutil.Process | None, float, list[Json]] = (None, 0.0, [])

    def starting(self, server: psutil.Process) -> bool:
        """Tell whether this server has not answered yet and still may take its time."""
        age_s = time.time() - server.create_time()
        return server != self._answered and age_s < STARTING_S

    def hung(self, server: psutil.Process | None) -> bool:
        """Tell whether this server answered once and is silent for good."""
        known = server is not None and server == self._answered
        return known and self._silent_looks >= HUNG_LOOKS

    def note_answer(self, server: psutil.Process | None) -> None:
        """Note that this server has answered."""
        if server != self._answered:
            self.version = None  # it may be another one now
        self._answered = server
        self._silent_looks = 0

    def note_silence(self) -> None:
        """Note that the server has not answered a look."""
        self._silent_looks += 1

    def ask_loaded(self, server: psutil.Process | None, timeout_s: float) -> list[Json]:
        """Ask this server what it has loaded: ``/api/ps``."""
        before_s = cpu_clock_s(server)
        loaded = ollama.ps(timeout_s)
        self.note_answer(server)
        after_s = cpu_clock_s(server)
        if after_s - before_s < QUESTION_CPU_S:  # else it may have done more than answer
            self._listed = server, after_s, loaded
        return loaded

    def loaded_now(self, timeout_s: float = ANSWER_S) -> list[Json]:
        """Return what is loaded, without a question where the server has done nothing since.

        A stopped one is asked, which tells that it hangs.
        """
        asked, cpu_s, loaded = self._listed
        if asked and not self._silent_looks and runs(asked):
            if 0 <= cpu_clock_s(asked) - cpu_s < QUIET_CPU_S:
                return loaded
        return self.ask_loaded(processes.server(), timeout_s)

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
        self.up = 0  # 1 where the last look found nothing wrong
        self.process: psutil.Process | None = None  # Ollama's server
        self.gpu: Json
        self.memory: typing.Any  # of the machine, as psutil tells it
        self.cpu_percent: float | None = None
        self.process_memory_mb = 0
        self.store_writable = True
        self._own: list[psutil.Process | None] = []  # gunicorn's two
        self.disk: Json | None = None
        self.healed: Json = {"runners": 0, "ollama": 0, "last": None}
        self._lock = threading.Lock()
        self._states: dict[Runner, RunnerState] = {}
        self._disk_key: object = None
        self._unmatched: set[str] = set()  # models without a process at the last look
        self._healings: dict[str | None, list[float]] = collections.defaultdict(list)

    def start(self) -> None:
        """Begin to watch."""
        self._own = [psutil.Process(), psutil.Process().parent()]
        self.measure()
        threading.Thread(target=self._run, name="watch", daemon=True).start()

    def runners(self) -> list[Json]:
        """Return the runners as of the last look."""
        now = time.monotonic()
        return [state.report(now) for state in self._states.values()]

    def is_stuck(self, runner: Runner) -> bool:
        """Tell whether a runner was stuck at the last look."""
        return runner in self._states and self._states[runner].state == "stuck"

    def known_runners(self) -> list[Runner]:
        """Return the runners that live, and those seen earlier whose end Ollama waits for."""
        server = processes.server()
        living = processes.runners()
        others = self._states.keys() - living
        return living + [runner for runner in others if unreaped(runner.process, server)]

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

    def look(self, deadline: float | None = None) -> None:
        """Look at everything once; before a deadline only if there is time for a hang."""
        wait_s = 60.0
        if deadline:
            wait_s = max(0, deadline - time.monotonic() - 3 * RUNNER_ASK_S)
        if not wait_s or not self._lock.acquire(timeout=wait_s):
            return
        try:
            server = self.process = processes.server()
            self._ask_server(server)
            self._find_runners()
            self._look_at_runners(server)
            self._look_at_machine(server)
            self.up = int(self._is_well(server))
            self.looked_at = time.time()
        finally:
            self._lock.release()

    def _run(self) -> None:
        while True:
            try:
                self.look()
                if SELF_HEAL:
                    self._heal()
            except ServiceError as e:
                log.warning("the watch: %s", e)
            except Exception:
                self.up = 0
                log.exception("the watch: a bug")
            time.sleep(LOOK_S)

    # Looking

    def _ask_server(self, server: psutil.Process | None) -> None:
        """Ask what is loaded. Ollama may hold its lock: only its version tells that it hangs."""
        try:
            self.loaded = self.server.ask_loaded(server, RUNNER_ASK_S)
        except ServiceError:
            if server is None:
                self.loaded = []
            if answering():
                self.server.note_answer(server)
            else:
                self.server.note_silence()

    def _find_runners(self) -> None:
        """Keep a state for each runner; one whose server has reaped it is forgotten."""
        now = time.monotonic()
        known = self.known_runners()
        names = model_names(known, self.loaded) if known else {}
        states = {}
        for runner, name in names.items():
            state = self._states.get(runner) or RunnerState(runner, now)
            state.model = name or state.model
            states[runner] = state
        self._states = states

    def _look_at_runners(self, server: psutil.Process | None) -> None:
        """Look at what costs nothing; ask a runner only where something may have changed."""

        def ask(seen: tuple[RunnerState, Look]) -> None:
            state, look = seen
            self._ask(state, look)
            with contextlib.suppress(psutil.Error):
                state.cpu_spent(time.monotonic())  # what the asking took does not count

        looks = []
        for state in self._states.values():
            with contextlib.suppress(psutil.Error):  # it has ended: the next look forgets it
                looks.append((state, self._glance(state, server)))
        due = [(state, look) for state, look in looks if look.due]
        in_parallel(ask, due)
        for state, look in looks:
            state.note(look)

    def _glance(self, state: RunnerState, server: psutil.Process | None) -> Look:
        look = Look(time.monotonic())
        process = state.process
        spent_s, passed_s = state.cpu_spent(look.at)
        state.memory_mb = memory_mb(process)
        state.cpu_percent = process.cpu_percent()
        look.working = spent_s > WORKING_SHARE * passed_s
        look.active = state.under_way or spent_s > WAKE_CPU_S
        if is_orphan(process, server):
            look.health = "orphan"
        elif dying(process):
            look.health = "dead"
        else:
            look.due = look.active or look.at - state.asked_at >= LONG_IDLE_S
        return look

    def _ask(self, state: RunnerState, look: Look) -> None:
        """Ask a runner's own port. An idle one is asked for its health only: /slots is logged."""
        port = state.runner.port
        state.asked_at = look.at
        look.health = ollama.runner_health(port, RUNNER_ASK_S)
        if look.health != "ok" or not look.active:
            return
        with contextlib.suppress(psutil.Error):
            look.main_cpu_s = main_thread_cpu_s(state.process)
        for model in self.loaded:
            if model["name"] == state.model:
                look.on_gpu = 0 < bytes_of(model, "size") <= bytes_of(model, "size_vram")
        try:
            look.slots = ollama.runner_slots(port, RUNNER_ASK_S)
        except ServiceError:
            look.late = True

    def measure(self) -> None:
        """Take the figures of the machine."""
        self.gpu = gpu.sample()
        self.memory = psutil.virtual_memory()
        self.cpu_percent = psutil.cpu_percent()  # since the look before

    def _look_at_machine(self, server: psutil.Process | None) -> None:
        self.measure()
        runners_mb = sum(state.memory_mb for state in self._states.values())
        self.process_memory_mb = runners_mb + sum(map(memory_mb, [*self._own, server]))
        downloading = downloads.running_count()  # parts grow, and their folder does not change
        minute = time.monotonic() // DISK_LOOK_S
        free = store.free_bytes()
        key = (store.signature(), store.changed_ns(), downloading, minute, free is None)
        if downloading or key != self._disk_key:
            self.disk = store.disk()
            self.store_writable = store.writable()
            self._disk_key = key
        elif self.disk:  # what others write to the disk
            self.disk = {**self.disk, "free_bytes": free}

    def _is_well(self, server: psutil.Process | None) -> bool:
        if server is None or self.server.starting(server) or self.server.hung(server):
            return False
        return not self._faults()

    # Healing

    def _faults(self) -> list[RunnerState]:
        """Return the runners with a fault. A ghost of the server before holds nobody up."""
        return [
            state
            for state in self._states.values()
            if state.state in ("stuck", "silent")
            or (state.state == "ghost" and unreaped(state.process, processes.server()))
        ]

    def _action(self, state: RunnerState) -> str:
        if not SELF_HEAL or state.healed == "ghost":  # and the restart has not helped
            return "reset_session"
        # What was killed gets its time until it is a ghost.
        return "wait" if state.healed or self._may_heal(state.model) else "restart_service"

    def _may_heal(self, model: str | None) -> bool:
        since = time.monotonic() - HEALINGS_S
        return sum(at > since for at in self._healings[model]) < HEALINGS

    def _heal(self) -> None:
        """End what is stuck, silent or a ghost, and only that, and a server that hangs."""
        self._clean_list()
        for state in self._faults():
            if state.healed != state.state and self._may_heal(state.model):
                self._heal_runner(state)
            if state.healed == "ghost":
                return  # with a new server the other faults are past
        if self.server.hung(processes.server()):
            why = f"hung: no answer to /api/version in {HUNG_LOOKS} looks"
            self._note_healing("ollama", "Ollama", why, healer.restart_server())

    def _heal_runner(self, state: RunnerState) -> None:
        fault = state.state
        model = state.model
        why = f"{fault}: {state.evidence}"
        if fault == "ghost":
            self._note_healing("ollama", model, why, healer.restart_server())
        else:
            self._note_healing("runners", model, why, healer.end_runner(state.runner, model))
        state.healed = fault
        self._healings[model].append(time.monotonic())

    def _note_healing(self, what: str, name: str | None, why: str, freed_mb: int) -> None:
        log.error("healed %s, which was %s (%d MB came free)", name, why, freed_mb)
        healed = dict(self.healed)  # whole for who reads it meanwhile
        healed[what] += 1
        healed["last"] = {
            "at": timestamp(time.time()),
            "what": name,
            "why": why,
            "freed_mb": freed_mb,
        }
        self.healed = healed

    def _clean_list(self) -> None:
        """Have Ollama unload what it lists and what has had no process for two looks.

        Its runner was killed from outside. With a runner whose model is unknown, or as many
        runners as models, nobody can tell.
        """
        living = [state for state in self._states.values() if alive(state.process)]
        models = [state.model for state in living]
        names: set[str] = set()
        if None not in models and len(models) < len(self.loaded):
            names = {model["name"] for model in self.loaded}.difference(models)
        again = names & self._unmatched
        self._unmatched = names
        with contextlib.suppress(ServiceError):
            for name in again and again & unloadable(self.loaded):
                ollama.unload(name, ASK_S)


def cpu_seconds(process: psutil.Process) -> float:
    """Return the CPU time of a process, as exactly as it can be had."""
    used_s = cpu_clock_s(process)
    return sum(process.cpu_times()[:2]) if math.isnan(used_s) else used_s


def main_thread_cpu_s(process: psutil.Process) -> float:
    """Return the CPU time of the thread that decodes, whose id is the process's."""
    threads = {thread.id: thread for thread in process.threads()}
    main = threads[process.pid]
    return main.user_time + main.system_time


def memory_mb(process: psutil.Process | None) -> int:
    """Return the memory of a process; 0 where it has ended."""
    try:
        return process.memory_info().rss // MB if process else 0
    except psutil.Error:
        return 0


def is_orphan(process: psutil.Process, server: psutil.Process | None) -> bool:
    """Tell whether a runner's server has died."""
    return server is None or process.ppid() != server.pid


def unreaped(process: psutil.Process, server: psutil.Process | None) -> bool:
    """Tell whether a runner is dead or killed, and its server still waits for its end."""
    try:
        return not is_orphan(process, server) and dying(process)
    except psutil.Error:
        return False


def model_names(runners: list[Runner], loaded: list[Json]) -> dict[Runner, str | None]:
    """Map runners to their models' names: by the blob, else as the only one that is left."""
    listed = {name_key(model["name"]): model["name"] for model in loaded}
    by_digest: dict[str | None, str] = {}
    for key, (digest, *_) in store.models().items():
        if key in listed or digest not in by_digest:  # of several, the one that Ollama shows
            by_digest[digest] = listed.get(key, key)
    found = {runner: by_digest.get(runner.digest) for runner in runners}
    others = [runner for runner, name in found.items() if name is None]
    left = set(listed.values()).difference(found.values())
    if len(others) == 1 and len(left) == 1:
        found[others[0]] = left.pop()
    return found


watch = Watch()

# ---------------------------------------------------------------------------------------
# Clear and reset
# ---------------------------------------------------------------------------------------


class Steps(list):
    """The steps of a clear or reset, as they are answered."""

    def __init__(self, steps: typing.Iterable[Json] = ()):
        super().__init__(steps)
        self._began = time.monotonic()  # of the step under way

    def note(self, step: str, ok: bool, done: str, failed: str = "") -> None:
        """Note how a step went that has just ended."""
        now = time.monotonic()
        seconds = round(now - self._began, 3)
        detail = done if ok else failed
        self.append(
            {
                "step": step,
                "ok": ok,
                "seconds": seconds,
                "detail": detail,
            }
        )
        self._began = now


class Clearing:
    """One clear: choose, unload, wait, end, measure, report."""

    def __init__(self, model: str | None, force: bool, deadline: float, only: Runner | None = None):
        """Choose all, a model, or of a model's runners ``only`` one."""
        self.steps = Steps()
        self._force = force
        self._deadline = deadline
        self._there = watch.known_runners()
        self._before = used_mb(self._there)
        loaded = self._list()
        self._mine = model_names(self._there, loaded)  # the runners, with their models' names
        self._asked = [each["name"] for each in loaded]  # what Ollama is asked to unload
        self._listed = keys_of(self._asked)
        if model:
            self._choose(model)
        if only:  # a name that was updated since is another runner's
            self._asked = self._asked if model and only in self._mine else []
            self._mine = {only: model}
        names = list(filter(None, self._mine.values()))
        names += self._asked
        self._names = {name_key(name): name for name in names}
        self._unloading: set[str] = set()  # keys of what Ollama has agreed to unload
        self._killed: dict[Runner, str] = {}  # and why
        self._ghosts: list[Runner] = []  # dead ones whose end Ollama waits for

    def run(self) -> Json:
        """Do it; return the report."""
        self._unloading = unload(self._asked)
        if self._asked:
            names = ", ".join(self._asked)
            self.steps.note("unload", bool(self._unloading), names, names)
        if self._unloading:
            until = min(time.monotonic() + UNLOAD_WAIT_S, self._deadline - KILL_RESERVE_S)
            gone = wait_until(lambda: not self._left(), until)
            self.steps.note("wait", gone, "all gone", "busy or hung ones stay")
        self._end_runners()
        return self._report()

    def _list(self) -> list[Json]:
        try:
            loaded = ollama.ps(CLEAR_ASK_S)
        except ServiceError as e:
            self.steps.note("list", False, "", str(e))
            return []
        self.steps.note("list", True, f"{len(loaded)} loaded")
        return loaded

    def _choose(self, model: str) -> None:
        """Leave all other models alone. A runner may serve several names of one blob."""
        key = name_key(model)
        digests = store.models().get(key, [])  # it may have been deleted meanwhile
        self._asked = [name for name in self._asked if name_key(name) == key]
        mine = [
            runner
            for runner, name in self._mine.items()
            if runner.digest in digests or (name and name_key(name) == key)
        ]
        if mine and not self._asked:
            self._asked = [model]
        self._mine = {runner: self._asked[0] for runner in mine}

    def _left(self) -> list[Runner]:
        return [runner for runner in self._mine if alive(runner.process)]

    def _end_runners(self) -> None:
        """End by SIGKILL what is left and due."""
        in_parallel(self._end_if_due, self._left())
        if not self._killed:
            return
        until = min(time.monotonic() + KILL_WAIT_S, self._deadline)
        wait_until(lambda: not any(alive(each.process) for each in self._killed), until)
        self.steps.note("end_runners", True, f"{len(self._killed)} ended")
        unload(self._asked)  # Ollama lists a busy one that was killed until it is asked

    def _end_if_due(self, runner: Runner) -> None:
        """End it; without ``force`` only if it is idle and Ollama, which had it, lets it go.

        Ollama takes one after another. On a GPU it waits up to 5 s for the memory of each.
        """
        name = self._mine[runner]
        reason = reason_to_end(runner)
        agreed = keys_of([name]) & self._listed & self._unloading
        if not self._force and (reason != "idle" or not agreed):
            return
        self._killed[runner] = reason
        end(runner.process)
        level = logging.INFO if reason == "idle" else logging.ERROR
        log.log(level, "ending runner %d of %s: %s", runner.process.pid, name, reason)

    def _report(self) -> Json:
        wait_until(self._is_let_go, min(time.monotonic() + VERIFY_WAIT_S, self._deadline))
        left = self._left()
        held = left + self._ghosts
        self.steps.note("verify", not held, "gone", "still there")
        stay = keys_of(map(self._mine.get, held))
        gone = self._names.keys() - stay
        unknown = [f"process {each.process.pid}" for each in held if not self._mine[each]]
        return {
            "unloaded_models": sorted(self._names[key] for key in gone),
            "killed": [
                {"pid": runner.process.pid, "model": self._mine[runner], "reason": reason}
                for runner, reason in self._killed.items()
            ],
            "left": sorted(self._names[key] for key in stay) + unknown,
            "new_runners": [
                {"pid": runner.process.pid, "model": name}
                for runner, name in self._new_runners().items()
            ],
            "memory": self._memory(),
            "verified": not held,
            "survived": bool(left),
            "managed": True,
            "steps": self.steps,
        }

    def _new_runners(self) -> dict[Runner, str | None]:
        """Return the runners that other callers have started since, with their models."""
        new = [runner for runner in processes.runners() if runner not in self._there]
        return model_names(new, [])

    def _is_let_go(self) -> bool:
        """Note the ghosts; tell whether there are none, and Ollama lists only what is left.

        A model that is listed without a runner holds nothing: its turn to be unloaded has not
        come. Nor does an Ollama that does not answer.
        """
        self._ghosts = []
        if not answering():
            return True
        server = processes.server()
        dead = [runner for runner in self._mine if not alive(runner.process)]
        self._ghosts = [runner for runner in dead if unreaped(runner.process, server)]
        listed: set[str] = set()
        with contextlib.suppress(ServiceError):
            listed = keys_of(each["name"] for each in ollama.ps(CLEAR_ASK_S))
        listed -= keys_of(self._new_runners().values())
        listed -= keys_of(map(self._mine.get, self._left()))
        return not self._ghosts and not listed.intersection(self._names)

    def _memory(self) -> Json:
        """Measure what came free."""
        if gpu.sample()["memory_shared"]:
            store.drop_page_cache()
        source, before_mb = self._before
        _, after_mb = used_mb(self._there)
        freed_mb = max(0, before_mb - after_mb)
        return {
            "source": source,
            "before_mb": before_mb,
            "after_mb": after_mb,
            "freed_mb": freed_mb,
        }


class Healer:
    """Clear and reset, one run at a time; who comes meanwhile shares what fits."""

    def __init__(self):
        self.load: Json | None = None  # the last background load: model, state, error
        self.clears_done = 0
        self.resets_done = 0
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
        came = time.monotonic()
        key = (model and name_key(model), restart)
        must_exist(model)
        return self._resets.get(
            lambda: self._reset(model, restart, came),
            RESET_S + SHARE_S,
            key,
            came,
        )

    def recover(self) -> Json:
        """Clear what is idle; answer as the service that this one replaces does."""
        report = self.clear(force=False)
        memory = report["memory"]
        total_mb = gpu.memory_totals(gpu.sample())[1]
        free_mb = psutil.virtual_memory().available // MB
        return {
            "status": "recovered",
            "freed_mb": memory["freed_mb"],
            "free_mb": total_mb - memory["after_mb"] if total_mb else free_mb,
            "unloaded_models": report["unloaded_models"],
            "can_retry": not report["left"],
        }

    def end_runner(self, runner: Runner, model: str | None) -> int:
        """End one runner, and only that one; return the MB that came free."""
        with self._clears.turn(CLEAR_S):
            deadline = time.monotonic() + CLEAR_S
            report = Clearing(model, True, deadline, only=runner).run()
            watch.look()
        return report["memory"]["freed_mb"]

    def restart_server(self) -> int:
        """End a server that hangs or has a ghost; return the MB that came free."""
        with self._resets.turn(RESET_S), self._clears.turn(RESET_S):
            runners = watch.known_runners()
            _, before_mb = used_mb(runners)
            self._restart(Steps(), time.monotonic() + RESET_S, grace_s=0)
            _, after_mb = used_mb(runners)
            watch.look()
        return max(0, before_mb - after_mb)

    def _clear(self, model: str | None, force: bool, deadline: float) -> Json:
        must_exist(model)

        def work() -> Json:
            self.clears_done += 1
            report = Clearing(model, force, deadline).run()
            if not self._reset_began:  # a reset looks at its end
                watch.look(deadline)
            return report

        key = (model and name_key(model), force)
        came = self._reset_began or time.monotonic()  # during a reset its clear will do
        limit_s = deadline - time.monotonic() + SHARE_S
        return self._clears.get(work, limit_s, key, came)

    def _reset(self, model: str | None, restart: bool, came: float) -> Json:
        self._reset_began = came
        try:
            cleared = self._clear(None, True, came + CLEAR_S - 1)
            steps = Steps(cleared["steps"])
            self._restart_if_due(cleared["verified"], restart, came, steps)
            watch.look(came + RESET_S + SHARE_S)
        finally:
            self._reset_began = None
        due = model_due(model, cleared["unloaded_models"])
        state = self._load(due, came + RESET_S) if due else "none"
        said = f"{due} is {state}" if due else f"no model to load ({MODEL} is not downloaded)"
        steps.note("load", True, said)
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

    def _restart_if_due(self, verified: bool, restart: bool, came: float, steps: Steps) -> None:
        """Restart a server that hangs, has a ghost, or shall be restarted."""
        server = processes.server()
        if server and watch.server.starting(server):
            steps.note("start_ollama", True, "it is starting")
            return
        answers = answering()
        steps.note("ask_ollama", answers, "answers", "does not answer")
        healthy = answers and verified
        if healthy and (not restart or self._restarted_at > came):
            return
        deadline = came + RESET_S
        grace_s = 0.0
        if healthy:  # with time left for the next server
            grace_s = min(1, deadline - time.monotonic() - 0.5)
        if not self._restart(steps, deadline, grace_s) and server:
            raise ServiceError(
                "restart_incomplete",
                "Ollama was ended, and the new one has not answered yet: ask /health, which says "
                "when it does.",
                recommended_action="wait",
                steps=steps,
            )

    def _restart(self, steps: Steps, deadline: float, grace_s: float) -> bool:
        """End the server, heed SIGTERM or not, and wait for the launcher's new one."""
        downloads.reconnect()  # while Ollama still keeps their parts
        ended = processes.end_server(grace_s)
        steps.note("end_ollama", ended, "ended", "it does not end")
        answers = wait_until(answering, deadline)
        steps.note("start_ollama", answers, "answers", "being started by the launcher")
        self._restarted_at = time.monotonic()
        return answers

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
        left_s = deadline - time.monotonic()
        loader.join(max(0, min(0.3, left_s)))
        return "loaded" if load["state"] == "loaded" else "loading"


def clear_suits(outcome: Outcome, key: object, came: float) -> bool:
    """A clear serves who came before its end and asked for the same, or for less."""
    return outcome.ended >= came and outcome.key in (key, (None, True))


def reset_suits(outcome: Outcome, key: typing.Any, came: float) -> bool:
    """A reset serves who came before its end and asked for the same, or for no restart."""
    model, _restart = key
    return outcome.ended >= came and outcome.key in (key, (model, True))


def reason_to_end(runner: Runner) -> str:
    """Tell what a runner is that is still there: "orphan", "hung", "busy" or "idle"."""
    with contextlib.suppress(psutil.Error):
        if is_orphan(runner.process, processes.server()):
            return "orphan"
    silent = ollama.runner_health(runner.port, CLEAR_RUNNER_S) == "silent"
    if silent or watch.is_stuck(runner):
        return "hung"
    return "busy" if is_busy(runner) else "idle"


def is_busy(runner: Runner) -> bool:
    """Tell whether something is under way in a runner, also where that cannot be told."""
    try:
        slots = ollama.runner_slots(runner.port, CLEAR_RUNNER_S)
    except ServiceError:
        return True
    return slots is None or is_working(slots)


def keys_of(names: typing.Iterable[str | None]) -> set[str]:
    """Return the keys of those names that are known."""
    return {name_key(name) for name in names if name}


def used_mb(runners: list[Runner]) -> tuple[str, int]:
    """Measure where the models lie: the source and the MB in use.

    Where the GPU does not tell, it is what the runners hold: the machine's figure moves by
    itself.
    """
    source, used = gpu.memory_in_use(gpu.sample())
    if used is None:
        used = sum(memory_mb(runner.process) for runner in runners)
    return source, used


def unload(names: list[str]) -> set[str]:
    """Ask for all of them at once; return the keys of those that Ollama took."""

    def ask(name: str) -> str | None:
        try:
            ollama.unload(name, CLEAR_ASK_S)
            return name
        except ServiceError as e:
            log.warning("unload %s: %s", name, e)
            return None

    return keys_of(in_parallel(ask, names))


def unloadable(loaded: list[Json]) -> set[str]:
    """Return the names by which these lines of ``/api/ps`` can be unloaded.

    One that was deleted or updated while it was loaded has no name any more.
    """
    there = {model.get("digest") for model in tags(ASK_S)}
    return {model["name"] for model in loaded if model.get("digest") in there}


def model_due(model: str | None, unloaded: list[str]) -> str | None:
    """Return the first that is downloaded: the one named, the default, what was loaded."""
    there = store.models()
    for name in (model, MODEL, *unloaded):
        if name and name_key(name) in there:
            return name
    return None


def answering() -> bool:
    """Tell whether Ollama answers."""
    try:
        return bool(ollama.version(CLEAR_ASK_S))
    except ServiceError:
        return False


def clear_message(report: Json) -> str:
    """Say in a sentence what a clear did."""
    unloaded, killed, left = report["unloaded_models"], report["killed"], report["left"]
    if not unloaded and not killed and not left:
        return "Cache cleared: nothing was loaded."
    done = f"{len(unloaded)} unloaded, {report['memory']['freed_mb']} MB came free"
    if killed:
        done += f", {len(killed)} runner(s) ended"
    if left:
        done += f", still busy: {', '.join(left)}"
    return f"Cache cleared: {done}."


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
            listens = each.status == psutil.CONN_LISTEN
            here = each.laddr[1:2] == (port,)
            if listens and here and each.pid:
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
    length = int(fields.get("CONTENT-LENGTH", 0))
    if "TRANSFER-ENCODING" in fields or length > BODY_LIMIT_BYTES:
        req.force_close()


def post_worker_init(worker):
    """Begin to watch, in the one process that answers; bound what a silent client takes.

    The connections inherit the limit: half a request holds a thread no longer.
    """
    limit = struct.pack("ll", SILENT_CLIENT_S, 0)
    for listener in worker.sockets:
        listener.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        listener.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
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

    def access(self, resp, req, environ, request_time):
        told = self.atoms(resp, req, environ, request_time)
        if told["U"] in self.QUIET_PATHS and told["s"] == "200":
            return
        told["uri"] = ascii(environ["RAW_URI"])[1:-1]
        log.info("%(h)s %(m)s %(uri)s %(s)s %(B)d bytes %(M)d ms", told)

    def exception(self, msg, *args, **kwargs):
        if isinstance(sys.exc_info()[1], BlockingIOError):
            words = "a client neither sent nor took anything for %d s"
            log.warning(words, SILENT_CLIENT_S)
        else:
            super().exception(msg, *args, **kwargs)


class ServiceWorker(ThreadWorker):
    """gunicorn's threaded worker, with JSON errors and closings that lose no answer."""

    def handle_exit(self, sig, frame):
        """End the downloads, and so the streams, at SIGTERM."""
        threading.Thread(target=downloads.close, daemon=True).start()
        super().handle_exit(sig, frame)

    def handle(self, conn):
        """Wait for a client to close here: in the main loop, gunicorn would stop others."""
        goes_on = super().handle(conn)
        if not goes_on:
            let_client_close(conn.sock)
        return goes_on

    def handle_error(self, _req, client, addr, exc):
        """Answer what gunicorn refuses by itself as JSON."""
        if isinstance(exc, http_errors.ParseException):
            status = HTTPStatus(getattr(exc, "code", 400))
            self.log.warning("Invalid request from %s: %s", addr[0], ascii(str(exc)))
        else:
            status = HTTPStatus.INTERNAL_SERVER_ERROR
            self.log.exception("Error handling request")
        error = f"{status.phrase}: check how the request is written."
        body = json.dumps({"error": error, "code": "bad_request"})
        head = (
            f"HTTP/1.1 {status.value} {status.phrase}\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        with contextlib.suppress(OSError):
            client.sendall((head + body).encode())


def let_client_close(sock: socket.socket) -> None:
    """Wait until the client has read the answer and closes.

    What it still sends is taken, or the kernel would reset the connection and drop the answer.
    """
    taken = 0
    deadline = time.monotonic() + 2
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_WR)
        while taken < LINGER_BYTES and time.monotonic() < deadline:
            sock.settimeout(max(0.01, deadline - time.monotonic()))
            piece = sock.recv(1 << 16)
            if not piece:
                break
            taken += len(piece)
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RD)  # so that gunicorn does not wait again


worker_class = ServiceWorker
logger_class = ServiceLogger
