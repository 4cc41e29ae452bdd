"""The LLM Service: a management API beside Ollama.

It lists, downloads and deletes models, tells the truth about the machine, and gets GPU memory
back when things go wrong. gunicorn serves it (``gunicorn app:app``) by gunicorn.conf.py. There
is one worker, so that all state is in one place. This file holds the settings, the objects of the
service, the answers' errors, who is let in, and the routes; ``llm_service`` does the work.
"""

import hmac
import json
import logging
import os
import re
import socket
import sys
import types
import urllib.parse

from flask import Flask, Response, request
from gunicorn.http import errors as http_errors
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

from llm_service.access import CORS_HEADERS, SAFE_HEADERS, host_allowed, short_origin
from llm_service.callers import Callers
from llm_service.downloads import Downloads
from llm_service.environment import RUNNER_SETTINGS
from llm_service.fields import read_flag, read_number
from llm_service.healing import Healing
from llm_service.health import Health
from llm_service.history import History
from llm_service.machine import Machine
from llm_service.matching import Matching
from llm_service.metrics import Metrics
from llm_service.models import Models
from llm_service.processes import Processes
from llm_service.recommended import Recommended
from llm_service.registry import Registries
from llm_service.server_work import ServerWork
from llm_service.session import Session
from llm_service.stats import Stats
from llm_service.store import PRUNE_AGE_S, Store
from llm_service.streaming import Streams, stream_trial, unless_known
from llm_service.trying import Trials
from llm_service.updates import Updates
from llm_service.verifying import Verifying
from llm_service.watch import Watch
from ollama_client import Json, Ollama, ServiceError, check_name, dial_url, trimmed

VERSION = "1.2.0"

# ---------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------

_HOST = r"([A-Za-z0-9_][A-Za-z0-9._-]*|\[[0-9A-Fa-f:.]+\])"
_ORIGIN = rf"[a-z][a-z0-9+.-]*://{_HOST}(:[0-9]+)?"
_NUMBER = "[1-9][0-9]{0,8}"
KUBERNETES_LINK = (
    "Kubernetes has set it for a Service of this name: set enableServiceLinks: false in the pod"
)
_PORT = "[1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]"


def of_ollama(name: str) -> str:
    """Return a setting that Ollama reads too, as it reads it; "" where it is not set."""
    return trimmed(os.environ.get(name, ""))


def setting(name: str, default: str, pattern: str, takes: str) -> str:
    """Return a setting of the environment; end the start where it makes no sense."""
    value = (of_ollama(name) if name.startswith("OLLAMA_") else os.environ.get(name)) or default
    if not re.fullmatch(pattern, value):
        shown = "(not shown)" if name == "LLM_API_TOKEN" else ascii(value)
        if value.startswith("tcp://"):
            takes += f". {KUBERNETES_LINK}"
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
PRELOAD = setting("LLM_PRELOAD", "off", "on|off", "on or off") == "on"
LONG_ANSWER_S = int(
    setting("LLM_LONG_ANSWER_S", "3600", _NUMBER, "a whole number of seconds from 1")
)
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
    OLLAMA_URL = dial_url(of_ollama("OLLAMA_HOST"))
    OLLAMA_PORT = urllib.parse.urlsplit(OLLAMA_URL).port or 0
except ValueError:
    wrong = ascii(os.environ["OLLAMA_HOST"])
    sys.exit(f"llm-service: OLLAMA_HOST is {wrong}; it takes an address such as 127.0.0.1:11434")
MODELS_PATH = of_ollama("OLLAMA_MODELS") or os.path.expanduser("~/.ollama/models")
STATE_FILE = os.environ.get("LLM_STATE_FILE") or os.devnull  # the launcher's record
for _name, (_pattern, _takes) in RUNNER_SETTINGS.items():
    setting(_name, "", f"({_pattern})?", _takes)

BODY_LIMIT_BYTES = 64 * 1024
SILENT_CLIENT_S = 30  # then a client that neither sends nor takes anything is given up

# ---------------------------------------------------------------------------------------
# Objects of the service
# ---------------------------------------------------------------------------------------

logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
log = logging.getLogger("llm-service")

processes = Processes(STATE_FILE, int(os.environ.get("LLM_ENDED_FD") or -1))
ollama = Ollama(OLLAMA_URL, is_own=lambda: processes.serves(OLLAMA_PORT))
store = Store(MODELS_PATH)
downloads = Downloads(ollama, store, processes, MAX_PULLS)
machine = Machine(store, downloads, Matching(ollama, store.manifests, processes))
server_work = ServerWork(processes, OLLAMA_PORT, MODELS_PATH)
callers = Callers(OLLAMA_PORT, stuck_s=STUCK_S, works=server_work.is_seen)
watch = Watch(ollama, store, processes, machine, callers, stuck_s=STUCK_S)
session = Session(watch, downloads, default_model=MODEL)
healing = Healing(watch, session, self_heal=SELF_HEAL, preload=PRELOAD)
health_report = Health(
    watch,
    session,
    healing,
    gpu_layers=GPU_LAYERS,
    long_answer_s=LONG_ANSWER_S,
)
verifying = Verifying(store)
registries = Registries(os.environ, lambda: registry_agent())
updates = Updates(store, registries)
recommended = Recommended(ollama, store, registries)
stats_report = Stats(watch, session, healing)
metrics_report = Metrics(
    stats_report,
    watch,
    downloads,
    health_report.is_up,
    verifying,
    updates,
)
history = History(stats_report.report)
trials = Trials(ollama)
catalogue = Models(watch, session, downloads)
streams = Streams()

app = Flask(__name__)
# werkzeug cuts a chunked body off there and says nothing, so one byte more than the limit.
app.config["MAX_CONTENT_LENGTH"] = BODY_LIMIT_BYTES + 1
app.json.sort_keys = False  # type: ignore[attr-defined]
app.url_map.strict_slashes = False
app.url_map.merge_slashes = False


# ---------------------------------------------------------------------------------------
# Error answers
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
    "verify_running": 409,
    "model_not_addressable": 409,
    "store_read_only": 409,
    "encoding_not_supported": 415,
    "too_many_pulls": 429,
    "too_many_streams": 429,
    "try_under_way": 429,
    "bug": 500,
    "callers_starved": 503,
    "gpu_lost": 503,
    "model_store_unreadable": 503,
    "ollama_dead": 503,
    "ollama_hung": 503,
    "ollama_starting": 503,
    "ollama_unreachable": 503,
    "restart_incomplete": 503,
    "runner_ending": 503,
    "runner_ghost": 503,
    "runner_silent": 503,
    "runner_stuck": 503,
    "runner_survived": 503,
    "runner_unknown": 503,
    "shutting_down": 503,
    "ollama_timeout": 504,
    "timeout": 504,
    "disk_full": 507,
}

CALLERS_FAULTS = (400, 401, 403, 415)

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
    status = STATUS.get(error.code, 502)
    if request.path == "/health" and status not in CALLERS_FAULTS:
        status = 503  # also for a code that is another status elsewhere
    elif status > 500:
        log.warning("%s %r: %s: %s", request.method, request.path, error.code, error)
    return error_answer(status, error.code, str(error), error.fields)


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


@app.before_request
def read_body():
    """Take the body off the connection first: the next request comes behind it."""
    if (request.content_length or 0) <= BODY_LIMIT_BYTES:
        body_bytes()


@app.before_request
def check_site():
    """Refuse what a web page on another site sends, by Origin or by DNS rebinding."""
    if not host_allowed(request.headers.get("Host", "localhost"), ALLOWED_HOSTS):
        raise ServiceError(
            "host_not_allowed",
            "This host name is not answered for: add it to LLM_ALLOWED_HOSTS.",
        )
    origin = request.headers.get("Origin")
    site = request.headers.get("Sec-Fetch-Site")
    own_file = request.path.startswith("/static/")  # browsers ask for modules with an Origin
    if origin is not None and not own_file and not origin_allowed(origin):
        advice = "add it to LLM_ALLOWED_ORIGINS"
        if site in (None, "same-origin"):
            advice = f"a proxy must pass the browser's Host on as it is; or {advice}"
        message = f"Calls from this origin are refused: {advice}."
        raise ServiceError("origin_not_allowed", message)
    if origin is None and site == "cross-site":
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
        headers.update(CORS_HEADERS)
    if response.status_code == 204:
        headers.pop("Content-Type", None)
    headers.update(SAFE_HEADERS)
    headers.setdefault("Cache-Control", "no-store")
    return response


def origin_allowed(origin: str) -> bool:
    """Tell whether an origin is the service's own or an allowed one.

    The own one is that of Host. Another scheme, as where a proxy ends TLS, wants the word of the
    browser; no header of a proxy is believed.
    """
    origin = short_origin(origin)
    scheme = request.scheme
    if request.headers.get("Sec-Fetch-Site") == "same-origin":
        scheme = origin.partition("://")[0]
    own = short_origin(f"{scheme}://{request.host}")
    return origin in {own, *map(short_origin, ALLOWED_ORIGINS)}


# ---------------------------------------------------------------------------------------
# Reading a request
# ---------------------------------------------------------------------------------------


def arguments(model: bool, any_body: bool = False, **defaults: bool | int) -> types.SimpleNamespace:
    """Parse the body and the query to ``model`` (checked), and flags and numbers by defaults.

    ``model`` true means that it must be there; ``any_body`` that JSON which is no object is as
    good as none, as programs send a number or a list where nobody has asked for a body.
    """
    given: Json = {**request.args, **body_object(any_body)}
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


def prompt_given() -> str:
    """Return the body's prompt."""
    prompt = body_object().get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise ServiceError("bad_field", '"prompt" must be a text.')
    return prompt


def body_object(any_body: bool = False) -> Json:
    """Return the body's JSON object; {} where there is no body, or any that is no object."""
    data = body_bytes()
    try:
        given = json.loads(data) if data.strip() else {}
    except (ValueError, RecursionError) as e:
        raise bad_json() from e
    if isinstance(given, dict):
        return given
    if not any_body:
        raise bad_json()
    return {}


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
    return health_report.report()


@app.get("/metrics")
def metrics():
    """Tell the same figures to Prometheus."""
    return Response(metrics_report.text(), content_type="text/plain; version=0.0.4; charset=utf-8")


@app.get("/api/info")
def info():
    """Tell what runs here, and with which settings."""
    return service_info()


@app.get("/api/stats")
def stats():
    """Tell the load of the GPU, the machine and the service's own processes."""
    asked = arguments(model=False, evidence=True)
    told = stats_report.report()
    last = told["healed"]["last"]
    if last and not asked.evidence:  # 50 lines, which who polls does not want each time
        short = {key: value for key, value in last.items() if key != "evidence"}
        told["healed"] = {**told["healed"], "last": short}
    return told


@app.get("/api/history")
def last_hour():
    """Tell the figures of the last hour, or those since the `next` of an earlier answer."""
    return history.answer(int(arguments(model=False, since=0).since))


@app.get("/api/models")
def models():
    """List the models on disk."""
    return unless_known(Response(catalogue.list(), mimetype="application/json"))


@app.get("/api/models/loaded")
def loaded_models():
    """List the models in memory."""
    return catalogue.loaded()


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
    return streams.download(download, lines) if asked.stream else streams.whole(download)


@app.get("/api/models/pull")
def pulls():
    """List the downloads under way and the last ended ones."""
    listed = downloads.list()
    return unless_known(app.json.response({"pulls": listed, "count": len(listed)}))


@app.delete("/api/models/pull")
def cancel_pull():
    """Cancel a download; with ``purge`` its parts go too."""
    asked = arguments(model=True, purge=False)
    freed = downloads.cancel(asked.model, asked.purge)
    message = f"The download of {asked.model} is cancelled."
    return {"status": "success", "message": message, "freed_bytes": freed}


@app.post("/api/models/verify")
def verify():
    """Read the files of a model, or of all, against their digests."""
    asked = arguments(model=False, stream=True)
    check = verifying.start(asked.model)
    return streams.check(check) if asked.stream else streams.whole(check)


@app.get("/api/models/updates")
def model_updates():
    """Ask the registries what is newer, and how much a pull would fetch."""
    asked = arguments(model=False, insecure=False)
    if asked.insecure and not asked.model:
        raise ServiceError("bad_field", '"insecure" wants a "model": it is of one registry.')
    return updates.ask(asked.model, asked.insecure)


@app.post("/api/models/load")
def load():
    """Load a model in the background."""
    asked = arguments(model=True)
    store.require(asked.model)
    state = session.loader.order(asked.model)
    return {"status": "accepted", "model": asked.model, "model_state": state}, 202


@app.post("/api/models/prune")
def prune():
    """Remove what no model uses."""
    asked = arguments(model=False, older_than_s=PRUNE_AGE_S, dry_run=False)
    return catalogue.prune(asked.older_than_s, asked.dry_run)


@app.delete("/api/models/delete")
def delete():
    """Unload and delete a model."""
    asked = arguments(model=True, force=False)
    freed = catalogue.delete(asked.model, asked.force)
    message = f"{asked.model} is deleted."
    return {"status": "success", "message": message, "freed_bytes": freed}


@app.post("/api/models/try")
def try_model():
    """Ask a model one prompt, for a person who wants to see whether it works."""
    asked = arguments(model=True)
    return stream_trial(trials.start(asked.model, prompt_given()))


@app.get("/api/models/recommendations")
def recommendations():
    """List models to begin with; with ``sizes`` their registries are asked how large they are."""
    return recommended.models(arguments(model=False, sizes=False).sizes)


@app.post("/api/cache/clear")
def cache_clear():
    """Get the memory of the loaded models back."""
    asked = arguments(model=False, any_body=True, force=True)
    report = session.clear(asked.model, asked.force)
    history.mark("cleared", model=asked.model, freed_mb=report["memory"]["freed_mb"])
    return report


@app.post("/api/session/reset")
def session_reset():
    """Clear, restart Ollama where it needs it, and load the model that is due."""
    asked = arguments(model=False, any_body=True, restart=False)
    report = session.reset(asked.model, asked.restart)
    history.mark("reset", model=report["model"], freed_mb=report["memory"]["freed_mb"])
    return report


@app.post("/api/gpu/recover")
def gpu_recover():
    """Clear what is idle, answered as the service that this one replaces does."""
    report = session.recover()
    history.mark("cleared", model=None, freed_mb=report["freed_mb"])
    return report


# ---------------------------------------------------------------------------------------
# The service itself
# ---------------------------------------------------------------------------------------


def service_info() -> Json:
    """Return the answer of ``GET /api/info``."""
    return {
        "service": "llm-service",
        "version": VERSION,
        "hostname": socket.gethostname(),
        "ollama_url": ollama.url,
        "ollama_version": watch.server_state.known_version(),
        "default_model": MODEL,
        "api_port": API_PORT,
        "context_length": int(CONTEXT_LENGTH),
        "gpu_layers": GPU_LAYERS,
        "models_path": MODELS_PATH,
    }


def registry_agent() -> str:
    """Return what registries are told: which Ollama would pull, as they serve it by that."""
    version = watch.server_state.known_version()
    return f"ollama/{version} llm-service/{VERSION}" if version else f"llm-service/{VERSION}"
