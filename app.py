"""The LLM Service: a management API beside Ollama.

It lists, downloads and deletes models, tells the truth about the machine, and gets GPU memory
back when things go wrong. gunicorn serves it and reads its own settings from here too
(`gunicorn -c python:app app:app`): one worker, so that all state is in one place.
"""

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
import signal
import socket
import struct
import sys
import threading
import time
import types
import urllib.parse

import gunicorn.glogging
import gunicorn.util
import gunicorn.workers.gthread
import psutil
from flask import Flask, Response, request
from gunicorn.http.errors import ParseException
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

import gpu
from ollama_client import (ANSWER_S, Downloads, Ollama, OllamaError, Processes, Store,
                           check_name, dial_url, name_key, timestamp)

# Settings, and gunicorn's hooks for the start

_HOST = r"([A-Za-z0-9_][A-Za-z0-9._-]*|\[[0-9A-Fa-f:.]+\])"
_ORIGIN = rf"[a-z][a-z0-9+.-]*://{_HOST}(:[0-9]+)?"
_NUMBER = "[1-9][0-9]{0,8}"
SETTINGS = {  # what each takes, as a pattern and in words; unset or empty means the default
    "LLM_MODEL": ("[A-Za-z0-9_][A-Za-z0-9._:/@-]*", "a model's name, such as llama3.1:8b"),
    "LLM_CONTEXT_LENGTH": (_NUMBER, "a whole number from 1, such as 8192"),
    "OLLAMA_CONTEXT_LENGTH": (_NUMBER, "a whole number from 1, such as 8192"),
    "LLM_GPU_LAYERS": ("0|[1-9][0-9]{0,5}|auto|all|-1", "a whole number from 0, all (or -1), or auto"),
    "LLM_STUCK_SECONDS": (_NUMBER, "a whole number of seconds from 1"),
    "LLM_SELF_HEAL": ("on|off", "on or off"),
    "LLM_API_HOST": ("[A-Za-z0-9._:-]+", "the IP address or the host name to listen on"),
    "LLM_API_PORT": ("[1-9][0-9]{0,4}", "a port, 1 to 65535"),
    "LLM_API_TOKEN": ("[!-~]*", "letters, digits and signs, no spaces"),
    "LLM_MAX_PULLS": ("[1-9][0-9]{0,3}", "a whole number from 1"),
    "LLM_ALLOWED_HOSTS": (f"{_HOST}(, *{_HOST})*", "host names, separated by commas"),
    "LLM_ALLOWED_ORIGINS": (
        f"{_ORIGIN}(, *{_ORIGIN})*", "origins such as https://host:port, separated by commas"),
}


def check_settings():
    """Stop the start with one line that names the setting which makes no sense."""
    for name, (pattern, takes) in SETTINGS.items():
        value = os.environ.get(name, "")
        too_high = name == "LLM_API_PORT" and value.isdecimal() and int(value) > 65535
        if value and (too_high or not re.fullmatch(pattern, value)):
            shown = "(not shown)" if name == "LLM_API_TOKEN" else ascii(value)
            sys.exit(f"llm-service: {name} is {shown}; it takes {takes}")
    try:
        dial_url(os.environ.get("OLLAMA_HOST", ""))
    except ValueError:
        value = ascii(os.environ["OLLAMA_HOST"])
        sys.exit(f"llm-service: OLLAMA_HOST is {value}; it takes an address such as 127.0.0.1:11434")


def on_starting(server):
    """Stop the start with one line where Ollama has no home, or one of the two addresses is not free."""
    check_home()
    ollama_host = os.environ.get("OLLAMA_HOST") or "127.0.0.1:11434"
    addresses = [
        (f"LLM_API_HOST={host}, LLM_API_PORT={API_PORT}", host, API_PORT,
         "stop what listens there, or set another address"),
        (f"OLLAMA_HOST={ollama_host}", *listen_address(ollama_host),
         "stop what listens there (a system's Ollama by: systemctl stop ollama) and give this service "
         "its OLLAMA_MODELS, or set another OLLAMA_HOST"),
    ]
    with contextlib.ExitStack() as listening:  # at both at once, as they could be the same
        for setting, address, port, advice in addresses:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            try:
                listening.enter_context(socket.create_server((address, port), family=family))
            except (OSError, UnicodeError) as error:  # the latter for a name such as a..b
                taken = getattr(error, "errno", None) == errno.EADDRINUSE
                reason = in_the_way(port) if taken else str(error).partition(" (while")[0]
                sys.exit(f"llm-service: cannot listen at {setting} ({reason}): {advice}")


def check_home():
    """Stop the start with one line where Ollama cannot make its key, which it does before anything else."""
    folder = os.path.expanduser("~/.ollama")
    with contextlib.suppress(OSError):
        os.makedirs(folder, exist_ok=True)
    if not os.path.exists(f"{folder}/id_ed25519") and not os.access(folder, os.W_OK | os.X_OK):
        user = os.geteuid()
        sys.exit(f"llm-service: user {user} cannot write to {folder}, where Ollama keeps its key and its models "
                 f"(in Docker: the volume): run as its owner, chown -R {user} it, or set another HOME")


def listen_address(ollama_host):
    """Return host and port that Ollama listens on; `dial_url` gives those to dial."""
    dialled = urllib.parse.urlsplit(dial_url(ollama_host))
    wildcard = {"127.0.0.1": "0.0.0.0", "::1": "::"}.get(dialled.hostname)
    if wildcard and wildcard in ollama_host and dialled.hostname not in ollama_host:
        return wildcard, dialled.port
    return dialled.hostname, dialled.port


def in_the_way(port):
    """Name the process that listens on a port, as far as the system tells."""
    with contextlib.suppress(psutil.Error, OSError):
        for each in psutil.net_connections("tcp"):
            if each.status == psutil.CONN_LISTEN and each.laddr.port == port and each.pid:
                return f"{psutil.Process(each.pid).name()}, process {each.pid}, listens there"
    return "another user's process listens there"


def when_ready(server):
    """Write what Ollama's environment needs, for the launcher, which waits for it."""
    layers = {"-1": "all", "auto": None}.get(GPU_LAYERS, GPU_LAYERS)
    defaults = {"OLLAMA_CONTEXT_LENGTH": CONTEXT_LENGTH, "OLLAMA_NOPRUNE": 1, "LLAMA_ARG_N_GPU_LAYERS": layers}
    needed = {name: os.environ.get(name) or default for name, default in defaults.items()}
    lines = [f"{name}={value}\n" for name, value in needed.items() if value is not None]
    if file := os.environ.get("LLM_STATE_FILE"):
        pathlib.Path(f"{file}.env.new").write_text("".join(lines))
        os.replace(f"{file}.env.new", f"{file}.env")
    log.info("listening at http://%s", bind)


check_settings()
# End of settings and hooks

VERSION = "1.0.0"
MODEL = os.environ.get("LLM_MODEL") or "llama3.1:8b"
TOKEN = os.environ.get("LLM_API_TOKEN", "")
ALLOWED_HOSTS = {h.strip().lower() for h in os.environ.get("LLM_ALLOWED_HOSTS", "").split(",") if h.strip()}
ALLOWED_ORIGINS = {o.strip().lower().rstrip("/") for o in os.environ.get("LLM_ALLOWED_ORIGINS", "").split(",") if o.strip()}
API_PORT = int(os.environ.get("LLM_API_PORT") or 11435)
CONTEXT_LENGTH = int(os.environ.get("OLLAMA_CONTEXT_LENGTH") or os.environ.get("LLM_CONTEXT_LENGTH") or 8192)
GPU_LAYERS = os.environ.get("LLM_GPU_LAYERS") or "33"
MODELS_PATH = os.environ.get("OLLAMA_MODELS") or os.path.expanduser("~/.ollama/models")
BODY_LIMIT_BYTES = 64 * 1024
STREAMS = 64
CLIENT_S = 30  # of a client that neither sends nor takes anything
KNOWN_S = 10  # until a pull's answer begins all the same
HEALTH_ASK_S, HEALTH_LIST_S = 0.6, 1.4  # two questions and the list: within 3 s
DEEP_S = 8
CLEAR_S = 3.7
RESET_S = 3.9
SHARE_S = 0.3  # a run may end that much after its limit, and who shares it waits for that
UNLOAD_WAIT_S = 1.5
STARTING_S = 300  # from its start until a server has answered once: it looks for GPUs first, and answers nobody
CPU_WINDOW_S = 1
DISK_LOW_BYTES = 1 << 30
MB = 1024 * 1024
CSP = ("default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
       "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'")
FOREIGN = "This Ollama was not started by the service, which leaves its processes alone."
PROCESS_STATES = {"T": "stopped", "t": "stopped", "D": "blocked"}

host = os.environ.get("LLM_API_HOST") or "127.0.0.1"
bind = f"[{host}]:{API_PORT}" if ":" in host else f"{host}:{API_PORT}"
workers = 1
worker_class = "gthread"
threads = 256  # made on demand; a stream or a slow client holds one
worker_connections = 1024
timeout = 30  # of the worker's own loop, not of a request
graceful_timeout = 5
keepalive = 30
control_socket_disable = True
loglevel = "warning"  # without a line for each step of its own start
forwarded_allow_ips = ""  # nobody may rewrite scheme or path by headers

logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
log = logging.getLogger("llm-service")
ollama = Ollama(dial_url(os.environ.get("OLLAMA_HOST", "")))
store = Store(MODELS_PATH)
processes = Processes(os.environ.get("LLM_STATE_FILE"))
downloads = Downloads(ollama, store, int(os.environ.get("LLM_MAX_PULLS") or 4))
streams = threading.BoundedSemaphore(STREAMS)

app = Flask(__name__)
app.config["MAX_CONTENT_LENGTH"] = BODY_LIMIT_BYTES + 1  # werkzeug cuts a chunked body off there, and says nothing
app.json.sort_keys = False
app.url_map.strict_slashes = False
app.url_map.merge_slashes = False


class logger_class(gunicorn.glogging.Logger):
    """gunicorn's logger, with one line a request, at a fifth of its cost, and one for a client that was given up."""

    def access(self, resp, req, environ, request_time):
        log.info("%s %s %s %s %s bytes %d ms", environ.get("REMOTE_ADDR"), environ.get("REQUEST_METHOD"),
                 ascii(environ.get("RAW_URI"))[1:-1], resp.status.partition(" ")[0], resp.sent,
                 request_time.total_seconds() * 1000)

    def exception(self, msg, *args, **kwargs):
        if isinstance(sys.exc_info()[1], BlockingIOError):
            log.warning("a client neither sent nor took anything for %d s", CLIENT_S)
        else:
            super().exception(msg, *args, **kwargs)


def pre_fork(server, worker):
    """Keep what is imported out of the collector's way, so that both processes share its pages: 8 MB."""
    gc.freeze()


def pre_request(worker, req):
    """Have the connection closed, and say so, where the body may not be read to its end: too long, or in chunks."""
    fields = dict(req.headers)
    if "TRANSFER-ENCODING" in fields or int(fields.get("CONTENT-LENGTH", 0)) > BODY_LIMIT_BYTES:
        req.force_close()


def post_worker_init(worker):
    """Let gunicorn's own errors be JSON, and its SIGTERM end the downloads and so the streams."""
    gunicorn.util.write_error = write_error
    gunicorn.util.close_graceful = close_aside
    gunicorn.workers.gthread.DEFAULT_WORKER_DATA_TIMEOUT = 0.2  # a thread is not for waiting on a silent client
    for listener in worker.sockets:  # what it accepts inherits this: half a request holds a thread no longer
        listener.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", CLIENT_S, 0))
        listener.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", CLIENT_S, 0))
    end_worker = signal.getsignal(signal.SIGTERM)

    def end(signum, frame):
        threading.Thread(target=downloads.close, daemon=True).start()
        end_worker(signum, frame)

    signal.signal(signal.SIGTERM, end)


class ApiError(Exception):
    """Root of this module's errors: what is answered, and with which status."""

    def __init__(self, status, code, message, **fields):
        super().__init__(message)
        self.status, self.code, self.fields = status, code, fields


@app.before_request
def read_body():
    """Take the body off the connection before anything is answered: the next request comes behind it."""
    if (request.content_length or 0) <= BODY_LIMIT_BYTES:
        body_bytes()


@app.before_request
def guard():
    """Refuse what a web page on another site, or someone without the token, sends."""
    if not host_allowed(request.headers.get("Host", "localhost")):
        raise ApiError(403, "host_not_allowed", "This host name is not answered for: add it to LLM_ALLOWED_HOSTS.")
    origin = request.headers.get("Origin")
    if origin is not None and not origin_allowed(origin):
        raise ApiError(403, "origin_not_allowed", "Calls from this origin are refused: add it to LLM_ALLOWED_ORIGINS.")
    if origin is None and request.headers.get("Sec-Fetch-Site") == "cross-site":
        raise ApiError(403, "cross_site", "Calls from another site are refused: add its origin to LLM_ALLOWED_ORIGINS.")
    if request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers:
        return Response(status=204)
    if TOKEN and not (request.method in ("GET", "HEAD") and (request.path in ("/", "/health") or request.path.startswith("/static/"))):
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.encode(), TOKEN.encode()):
            raise ApiError(401, "token_wanted", "Send the token: Authorization: Bearer <LLM_API_TOKEN>.")
    if (request.content_length or 0) > BODY_LIMIT_BYTES:
        raise RequestEntityTooLarge


@app.after_request
def finish(response):
    """Add the headers that keep browsers in bounds."""
    headers = response.headers
    origin = request.headers.get("Origin")
    if origin and origin_allowed(origin):
        headers["Access-Control-Allow-Origin"] = origin
        headers["Access-Control-Allow-Methods"] = "GET, POST, DELETE, OPTIONS"
        headers["Access-Control-Allow-Headers"] = "Authorization, Content-Type"
        headers["Access-Control-Expose-Headers"] = "Retry-After"
        headers["Access-Control-Max-Age"] = "600"
    headers["Vary"] = "Origin"
    headers["X-Content-Type-Options"] = "nosniff"
    headers["Content-Security-Policy"] = CSP
    headers.setdefault("Cache-Control", "no-store")
    return response


@app.errorhandler(ApiError)
def refused(error):
    return answer(error.status, error.code, str(error), **error.fields)


@app.errorhandler(OllamaError)
def failed(error):
    log.warning("%s %r: %s: %s", request.method, request.path, error.code, error)
    return answer(error.status, error.code, str(error))


@app.errorhandler(concurrent.futures.TimeoutError)
def overdue(error):
    return answer(504, "timeout", "The run under way did not end in time: try again.")


@app.errorhandler(HTTPException)
def http_error(error):
    sentences = {404: "There is no such path: the README tells what there is.",
                 405: f"This path takes {', '.join(getattr(error, 'valid_methods', None) or ())}: send one of these.",
                 413: "The body is over 64 KiB: send less."}
    body, status, headers = answer(error.code, re.sub(r"\W+", "_", error.name.lower()),
                                   sentences.get(error.code, f"{error.name}: check the request."))
    return body, status, {**headers, **{name: value for name, value in error.get_headers() if name == "Allow"}}


@app.errorhandler(Exception)
def bug(error):
    log.exception("%s %r: a bug", request.method, request.path)
    return answer(500, "bug", "This is a bug in the service: its log tells more.")


@app.get("/")
def page():
    """Show the page for people."""
    return app.send_static_file("index.html")


@app.get("/health")
def health():
    """Tell whether the service works, and what would heal it."""
    report = check_health()
    if request.args.get("deep") in ("1", "true"):
        report.update(check_deep())
    return report


@app.get("/api/info")
def info():
    """Tell what runs here, and with which settings."""
    try:
        known_version = version(1)
    except OllamaError:
        known_version = None
    return {"service": "llm-service", "version": VERSION, "ollama_url": ollama.url, "ollama_version": known_version,
            "default_model": MODEL, "api_port": API_PORT, "context_length": CONTEXT_LENGTH,
            "gpu_layers": GPU_LAYERS, "models_path": MODELS_PATH}


@app.get("/api/stats")
def stats():
    """Tell the load of the GPU, the machine and the service's own processes."""
    return machine_stats()


@app.get("/api/models")
def models():
    """List the models on disk."""
    return Response(listing.get(), mimetype="application/json")


@app.get("/api/models/loaded")
def loaded_models():
    """List the models in memory."""
    listed = [{"name": m["name"], "size": m.get("size"), "size_vram": m.get("size_vram"),
               "context_length": m.get("context_length"), "expires_at": utc(m.get("expires_at"))} for m in ollama.ps()]
    return {"loaded_models": listed, "count": len(listed)}


@app.post("/api/models/pull")
def pull():
    """Download a model, or join its download."""
    asked = arguments(model=True, stream=True, insecure=False, detach=False)
    download, lines = downloads.pull(asked.model, asked.insecure, asked.detach)
    if asked.detach:
        return {"status": "accepted", "message": "The download goes on by itself: GET /api/models/pull shows it.", "model": asked.model}, 202
    return follow(download, lines, asked.stream)


@app.get("/api/models/pull")
def pulls():
    """List the downloads under way and the last ended ones."""
    listed = downloads.list()
    return {"pulls": listed, "count": len(listed)}


@app.delete("/api/models/pull")
def cancel_pull():
    """Cancel a download; with `purge` its parts go too."""
    asked = arguments(model=True, purge=False)
    freed = downloads.cancel(asked.model, asked.purge)
    return {"status": "success", "message": f"The download of {asked.model} is cancelled.", "freed_bytes": freed}


@app.delete("/api/models/delete")
def delete():
    """Unload and delete a model."""
    asked = arguments(model=True, force=False)
    freed = delete_model(asked.model, asked.force)
    return {"status": "success", "message": f"{asked.model} is deleted.", "freed_bytes": freed}


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


def answer(status, code, message, **fields):
    kind = {"/health": "unhealthy", "/api/cache/clear": "error", "/api/session/reset": "error"}.get(request.path)
    headers = {"Retry-After": "5"} if status in (429, 503) else {}
    return {**({"status": kind} if kind else {}), **fields, "error": message, "code": code}, status, headers


def close_aside(sock, close=gunicorn.util.close_graceful):
    """Wait for a client to close outside of gunicorn's main loop, where that stops all others."""
    threading.Thread(target=close, args=(sock,), daemon=True).start()


def write_error(sock, status, reason, message):
    """Write what gunicorn refuses by itself, as JSON (it would send HTML)."""
    body = json.dumps({"error": f"{reason}: check how the request is written.", "code": "bad_request"}).encode()
    sock.sendall(f"HTTP/1.1 {status} {reason}\r\nConnection: close\r\nContent-Type: application/json\r\n"
                 f"Content-Length: {len(body)}\r\n\r\n".encode() + body)


@functools.lru_cache(256)
def host_allowed(host):
    """Tell a name that only this machine or its network gives from one of the web (DNS rebinding)."""
    try:
        name = (urllib.parse.urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return False
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        return "." not in name or name.endswith((".local", ".internal", ".localhost")) or name in ALLOWED_HOSTS


def origin_allowed(origin):
    return origin.lower() in (f"{request.scheme}://{request.host}".lower(), *ALLOWED_ORIGINS)


def arguments(model, **flags):
    """Parse the body, or the query, to a namespace of `model` (checked) and the flags.

    `model` true means that it must be there; a flag's default tells that it is a boolean.
    """
    words = {"true": True, "1": True, "false": False, "0": False}
    query = {key: words.get(value, value) if key in flags else value for key, value in request.args.items()}
    given = {**query, **request_object()}
    names = [given[key] for key in ("model", "name") if given.get(key) is not None]
    if len(names) == 2 and names[0] != names[1]:
        raise ApiError(400, "bad_model_name", '"model" and "name" differ: send one of them.')
    if not names and model:
        raise ApiError(400, "model_missing", 'Say which model: {"model": "llama3.1:8b"}.')
    found = {"model": check_name(names[0]) if names else None}
    for flag, default in flags.items():
        found[flag] = default if given.get(flag) is None else given[flag]
        if not isinstance(found[flag], bool):
            raise ApiError(400, "bad_field", f'"{flag}" must be true or false.')
    return types.SimpleNamespace(**found)


def request_object():
    if request.headers.get("Content-Encoding", "identity") != "identity":
        raise ApiError(415, "encoding_not_supported", "Send the body uncompressed.")
    data = body_bytes()
    try:
        given = json.loads(data) if data.strip() else {}
    except (ValueError, RecursionError):
        given = None
    if not isinstance(given, dict):
        raise bad_json()
    return given


def body_bytes():
    """Return the whole body. Raises ApiError for one that is damaged or cut off, RequestEntityTooLarge."""
    try:
        data = request.get_data()
    except (ParseException, OSError) as e:  # damaged chunks, a client that left
        raise bad_json() from e
    if len(data) > BODY_LIMIT_BYTES:
        raise RequestEntityTooLarge
    if len(data) < (request.content_length or 0):
        raise bad_json()
    return data


def bad_json():
    return ApiError(400, "bad_json", 'The body must be a JSON object such as {"model": "llama3.1:8b"}.')


def tags(timeout_s=ANSWER_S):
    """Return the models on disk, asked for anew unless the store is certainly as it was."""
    signature = store.signature() if processes.managed else None
    return _tags_of(signature, timeout_s) if signature else ollama.tags(timeout_s)


@functools.lru_cache(2)  # health has another timeout
def _tags_of(signature, timeout_s):
    return ollama.tags(timeout_s)


def version(timeout_s):
    """Return Ollama's version, asked for once of each server."""
    server = processes.server()
    return _version_of(server.pid, server.started, timeout_s) if server else ollama.version(timeout_s)


@functools.lru_cache(2)
def _version_of(pid, started, timeout_s):
    return ollama.version(timeout_s)


def list_models():
    loaded = ollama.ps()
    by_name, by_digest = ({m.get(key): m for m in loaded} for key in ("name", "digest"))
    listed = [model_entry(m, by_name.get(m["name"]) or by_digest.get(m.get("digest"))) for m in tags()]
    return json.dumps({"models": listed, "count": len(listed)}, separators=(",", ":")) + "\n"


def model_entry(model, loaded):
    loaded = loaded or {}
    return {"name": model["name"], "size": model.get("size"), "modified_at": utc(model.get("modified_at")),
            "digest": model.get("digest"), "details": model.get("details") or {}, "loaded": bool(loaded),
            "size_vram": loaded.get("size_vram"), "expires_at": utc(loaded.get("expires_at")),
            "size_loaded": loaded.get("size"), "context_length": loaded.get("context_length")}


def utc(moment):
    """Bring Ollama's time, which carries its own zone, to UTC."""
    if not isinstance(moment, str) or moment.endswith("Z"):
        return moment
    try:
        return timestamp(datetime.datetime.fromisoformat(moment).timestamp())
    except (ValueError, OverflowError):
        return None


def follow(download, lines, streamed):
    """Answer with a download's lines as they come, or with its end; with its error's status first."""
    if not streams.acquire(blocking=False):
        download.leave()
        raise ApiError(429, "too_many_streams", f"{STREAMS} answers are streaming: try again, or use detach.")

    def leave():
        streams.release()
        download.leave()

    download.known.wait(KNOWN_S) if streamed else download.ended.wait()
    if download.error or not streamed:
        leave()
        if download.error:
            raise download.error
        return download.last_line()
    response = Response((json.dumps(line) + "\n" for line in lines), mimetype="application/x-ndjson",
                        headers={"X-Accel-Buffering": "no"})
    response.call_on_close(leave)
    return response


def delete_model(model, force):
    """Return the bytes that came free; None where the model store is out of sight."""
    if downloads.running(model):
        raise OllamaError("model_being_pulled", f"{model} is being downloaded: cancel that first.")
    ollama.version(1)  # one that hangs would look busy
    if not healer.clear(model, force)["verified"]:
        raise OllamaError("model_busy", f'{model} is in the middle of an answer: try again, or send "force": true.')
    digests = store.models().get(name_key(model))
    before = store.sizes(digests or ())
    ollama.delete(model)
    return digests and sum(before.values()) - sum(store.sizes(digests).values())


def check_health():
    """Return the health report, or raise the 503 that tells what would heal it."""
    reading = gpu.sample()
    if reading["state"] == "lost":
        raise unhealthy("gpu_lost", "The GPU is lost to this container: restart it; if that does not help, reboot the host.", gpu.ACTIONS["lost"])
    try:
        known_version = version(HEALTH_ASK_S)
        loaded = [m["name"] for m in ollama.ps(HEALTH_ASK_S)]
        names = [m["name"] for m in tags(HEALTH_LIST_S)]
    except OllamaError as e:
        raise unhealthy(*diagnose(e)) from e
    free = store.free_bytes()
    return {"status": "healthy", "models_count": len(names), "models": names, "loaded": loaded,
            "ollama_version": known_version, "gpu": reading["state"], "recommended_action": gpu.ACTIONS[reading["state"]],
            "load": healer.load,
            "warning": "The disk is almost full: delete a model." if (free or DISK_LOW_BYTES) < DISK_LOW_BYTES else None}


def unhealthy(code, reason, action):
    return ApiError(503, code, reason, reason=reason, recommended_action=action)


def diagnose(error):
    """Tell code, reason and the action that heals from the error that Ollama's API gave."""
    server = processes.server()
    if not processes.managed:
        return error.code, f"{error} {FOREIGN}", "restart_service"
    if starting(server):
        return "ollama_starting", "Ollama is starting.", "wait"
    if error.code == "ollama_timeout":
        return "ollama_hung", "Ollama runs but does not answer.", "reset_session"
    if error.code != "ollama_unreachable":
        return "model_store_unreadable", f"Ollama cannot list the models: {error}", "restart_service"
    if server is None:
        return "ollama_dead", "Ollama has ended and is being started again.", "wait"
    return "ollama_unreachable", "Ollama runs but takes no connection.", "reset_session"


def starting(server):
    """Tell whether this server has not answered yet and still may take its time."""
    if not processes.launched():  # the launcher starts the API first, and may be installing Ollama
        return True
    uptime_s = processes.uptime_s(server) if server else STARTING_S
    answered_s = time.monotonic() - ollama.answered_at
    return uptime_s < STARTING_S and answered_s > uptime_s


def check_deep():
    """Ask each loaded completion model for one token; tell hung from busy by the runner's own port."""
    able = {m["name"] for m in tags() if "completion" in m.get("capabilities", ["completion"])}
    asked = [m for m in ollama.ps() if m["name"] in able]
    return {"busy": any(in_parallel(probe_model, asked)), "probed": [m["name"] for m in asked]}


def probe_model(model):
    """Return whether the model is too busy to answer in time."""
    name = model["name"]
    try:
        ollama.one_token(name, model.get("context_length"), DEEP_S)
        return False
    except OllamaError as e:
        if e.code != "ollama_timeout":
            raise unhealthy("runner_failed", f"{name} does not generate: {e}", "reset_session") from e
    for runner in processes.runners():
        if runner.digest in store.models().get(name_key(name), ()) and not ollama.runner_answers(runner.port):
            raise unhealthy("runner_hung", f"The runner of {name} hangs.", "reset_session")
    return True


def in_parallel(work, items):
    """Do the work for each item at once; return the results, raise the first error."""
    if not items:
        return []
    with concurrent.futures.ThreadPoolExecutor(len(items)) as pool:
        return list(pool.map(work, items))


def machine_stats():
    reading, memory, server = gpu.sample(), psutil.virtual_memory(), processes.server()
    runners = processes.runners()
    orphaned = {r.process for r in runners if not server or r.process.parent != server.pid}
    shown = gpu_strings(reading, memory)
    return {
        **shown,
        "process_memory_mb": sum(resident_mb(pid) for pid in own_pids()),
        "cpu_percent": cpu.percent("machine", cpu_seconds(), psutil.cpu_count()),
        "timestamp": timestamp(time.time()),
        "gpu": reading["state"],
        "gpus": reading["gpus"],
        "recommended_action": gpu.ACTIONS[reading["state"]],
        "memory": {"total_mb": memory.total // MB, "used_mb": (memory.total - memory.available) // MB,
                   "available_mb": memory.available // MB, "percent": memory.percent},
        "disk": store.disk(),
        "runners": [{"pid": r.process.pid, "model": model_of(r), "memory_mb": resident_mb(r.process.pid),
                     "cpu_percent": cpu.percent(r.process.pid, cpu_seconds(r.process.pid)),
                     "state": "orphan" if r.process in orphaned else PROCESS_STATES.get(r.process.state, "running")}
                    for r in runners],
        "ollama": {"pid": server and server.pid, "uptime_seconds": server and round(processes.uptime_s(server)),
                   "restarts": processes.restarts()},
    }


def gpu_strings(reading, memory):
    """Put the figures as the dashboard shows them: the busiest GPU, all memory together."""
    def most(figure):
        return max((g[figure] for g in reading["gpus"] if g[figure] is not None), default=None)

    used, total = gpu.memory_mb(reading)
    if reading["state"] == "unified":
        used, total = (memory.total - memory.available) // MB, memory.total // MB
    utilization, temperature = most("utilization_percent"), most("temperature_c")
    return {"gpu_utilization": "N/A" if utilization is None else f"{utilization}%",
            "gpu_memory": "N/A" if total is None else f"{used}MB / {total}MB",
            "gpu_temperature": "N/A" if temperature is None else f"{temperature}°C"}


def own_pids():
    return {os.getpid(), os.getppid(), *(p.pid for p in processes.all())}


def resident_mb(pid):
    try:
        return psutil.Process(pid).memory_info().rss // MB
    except psutil.Error:
        return 0


def cpu_seconds(pid=None):
    """Return the CPU time that a process, or all of the machine, has used."""
    if pid is None:
        times = psutil.cpu_times()
        return sum(times[:8]) - times.idle - times.iowait
    try:
        return sum(psutil.Process(pid).cpu_times()[:2])
    except psutil.Error:
        return 0


class CpuMeter:
    """Percent of CPU since a reading at least CPU_WINDOW_S old; never waits for one."""

    def __init__(self):
        self._readings = {}

    def percent(self, key, seconds, cpus=1):
        """Return the percent since the last reading; None at the first."""
        now = time.monotonic()
        at, then, percent = self._readings.get(key, (0, None, None))
        if now - at >= CPU_WINDOW_S:
            percent = None if then is None else round(max(0, seconds - then) / (now - at) / cpus * 100, 1)
            self._readings[key] = now, seconds, percent
        while len(self._readings) > 64:  # runners come and go
            self._readings.pop(next(iter(self._readings)))
        return percent


@functools.lru_cache(64)
def model_of(runner):
    """Return the name of the model that a runner holds, by its blob; None if no name has it."""
    return next((name for name, digests in store.models().items() if digests[0] == runner.digest), None)


def used_memory():
    """Measure where the models lie: `(source, used_mb)`."""
    used, _ = gpu.memory_mb(gpu.sample())
    memory = psutil.virtual_memory()
    return ("system", (memory.total - memory.available) // MB) if used is None else ("nvml", used)


class Batch:
    """Shares one piece of work among callers, and yet each gets an outcome begun after its call.

    Who comes while the work runs shares the next run with all who came meanwhile.
    """

    def __init__(self, work):
        self._work, self._lock, self._turn, self._next = work, threading.Lock(), threading.Lock(), None

    def get(self):
        with self._lock:
            first = self._next is None
            if first:
                self._next = concurrent.futures.Future()
            mine = self._next
        if first:
            with self._turn:
                with self._lock:
                    self._next = None
                settle(mine, self._work)
        return mine.result()


class Lane:
    """Runs one piece of work at a time; a call that fits the one under way shares its outcome."""

    def __init__(self):
        self._lock, self._run = threading.Lock(), None

    def do(self, key, work, seconds, fits):
        deadline = time.monotonic() + seconds
        while True:
            with self._lock:
                run = self._run
                if run is None:
                    mine = self._run = concurrent.futures.Future()
                    mine.key = key
            if run is None:
                settle(mine, work)
                self._run = None
                return mine.result()
            if fits(run.key):
                return run.result(deadline - time.monotonic() + SHARE_S)
            if not concurrent.futures.wait([run], deadline - time.monotonic()).done:
                raise concurrent.futures.TimeoutError


def settle(future, work):
    try:
        future.set_result(work())
    except Exception as e:
        future.set_exception(e)


class Steps(list):
    def run(self, step, work, detail):
        """Do a step and note how it went; return its result, None if Ollama failed it."""
        began, result, ok = time.monotonic(), None, True
        try:
            result = work()
            words = detail(result)
        except OllamaError as e:
            ok, words = False, str(e)
        self.append({"step": step, "ok": ok and result is not False,
                     "seconds": round(time.monotonic() - began, 3), "detail": words})
        return result


class Healer:
    """Clear and reset, one run at a time; a call that comes meanwhile shares the run under way."""

    def __init__(self):
        self.load = None  # the last background load: {"model", "state", "error"}
        self._clears, self._resets = Lane(), Lane()
        self._resets_clear = None  # what the reset under way clears

    def clear(self, model=None, force=True):
        """Unload all models or one; with `force` end the runners left. Returns the report."""
        clearing = self._resets_clear
        return clearing.result(CLEAR_S + SHARE_S) if clearing else self._clear_once(model, force)

    def reset(self, model=None, restart=False):
        """Clear all, restart Ollama where it must be, load the model that is due."""
        key = (model and name_key(model), restart)
        return self._resets.do(key, lambda: self._reset(model, restart), RESET_S, key.__eq__)

    def _clear_once(self, model, force):
        key = (model and name_key(model), force)
        return self._clears.do(key, lambda: self._clear(model, force), CLEAR_S, {key, (None, True)}.__contains__)

    def _clear(self, model, force):
        must_exist(model)
        steps, (source, before_mb) = Steps(), used_memory()
        runners = {runner: model_of(runner) for runner in processes.runners()}
        mine = [r for r in runners if not model or r.digest in installed()[name_key(model)]]
        loaded = steps.run("list", list_loaded, lambda names: ", ".join(names) or "nothing is loaded") or []
        asked = [model] if model and mine else [n for n in loaded if not model or name_key(n) == name_key(model)]

        def left():
            return [r for r in mine if processes.alive(r.process)]

        def gone():
            return not left() if processes.managed else not set(asked) & set(list_loaded())

        deadline = time.monotonic() + UNLOAD_WAIT_S
        if asked and steps.run("unload", lambda: unload(asked), lambda ok: ", ".join(asked)):
            steps.run("wait", lambda: wait_until(gone, deadline), lambda ok: "all gone" if ok else "busy or hung ones stay")
        killed = []
        if force and left():
            killed = steps.run("end_runners", lambda: end_runners(left(), runners), lambda ended: f"{len(ended)} ended")
        verified = bool(steps.run("verify", gone, lambda ok: "gone" if ok else "still there"))
        if gpu.sample()["state"] == "unified":
            store.drop_page_cache()
        after_mb = used_memory()[1]
        listed = {name_key(name): name for name in loaded}  # as Ollama spells them
        keys = {name_key(n) for n in asked} if model else {*map(name_key, asked), *filter(None, map(runners.get, mine))}
        stay = keys & ({name_key(model)} if model else set(map(runners.get, left()))) if left() else set()
        stay = stay if processes.managed or verified else keys
        report = {
            "unloaded_models": sorted(listed.get(k, k) for k in keys - stay), "killed": killed,
            "left": sorted(listed.get(k, k) for k in stay),
            "new_runners": [{"pid": r.process.pid, "model": model_of(r)} for r in processes.runners() if r not in runners],
            "memory": {"source": source, "before_mb": before_mb, "after_mb": after_mb,
                       "freed_mb": max(0, before_mb - after_mb)},
            "verified": verified, "managed": processes.managed, "steps": steps}
        if force and not verified and processes.managed:
            raise ApiError(503, "runner_survived", "A runner does not end, not even by SIGKILL: reboot the host.",
                           recommended_action="reboot_host", **report)
        if force and not verified:
            raise ApiError(409, "model_busy", "The model is in the middle of an answer: wait for its end, or restart that "
                           f"Ollama. {FOREIGN}", **report)
        return {"status": "success", "message": clear_message(report), **report}

    def _reset(self, model, restart):
        must_exist(model)
        deadline = time.monotonic() + RESET_S
        clearing = self._resets_clear = concurrent.futures.Future()
        settle(clearing, lambda: self._clear_once(None, True))
        try:
            return self._restart_and_load(clearing.result(), model, restart, deadline)
        finally:
            self._resets_clear = None

    def _restart_and_load(self, cleared, model, restart, deadline):
        steps = Steps(cleared["steps"])
        answers = steps.run("ask_ollama", lambda: ollama.version(0.4), "version {}".format)
        if starting(processes.server()):
            steps.run("start_ollama", lambda: True, lambda ok: "it is starting and answers nobody yet")
        elif processes.managed and (restart or not answers):
            downloads.reconnect()  # while Ollama still keeps their parts
            ended = processes.server()  # None: it is dead, and the launcher is at work already
            grace_s = min(1, deadline - time.monotonic() - 0.5) if answers else 0  # a hung one heeds no SIGTERM
            steps.run("end_ollama", lambda: processes.end_server(grace_s), lambda ok: "ended" if ok else "it does not end")
            steps.run("start_ollama", lambda: wait_until(answering, deadline),
                      lambda ok: "answers" if ok else "being started by the launcher")
            if ended and not steps[-1]["ok"]:
                raise ApiError(503, "restart_incomplete", f"Ollama was ended, and {self._missing()}: ask /health, which says "
                               "when it is there.", recommended_action="wait", steps=steps)
        elif restart:
            steps.run("end_ollama", lambda: False, lambda ok: FOREIGN)
        there = installed()
        due = next((m for m in [model, MODEL, *cleared["unloaded_models"]] if m and name_key(m) in there), None)
        state = self._load(due, deadline) if due else "none"
        said = f"{due} is {state}" if due else f"no model to load ({MODEL} is not downloaded)"
        steps.append({"step": "load", "ok": True, "seconds": 0, "detail": said})
        return {"status": "success", "message": f"Session reset, {said}.{foreign()}", "steps": steps, "model": due,
                "model_state": state, "memory": cleared["memory"], "managed": processes.managed}

    def _missing(self):
        return "the new one has not answered yet" if processes.server() else "the launcher has not started the new one yet"

    def _load(self, model, deadline):
        """Load in the background; return how it stands at the deadline, or after a moment."""
        load = self.load = {"model": model, "state": "loading", "error": None}

        def work():
            wait_until(answering, time.monotonic() + STARTING_S)
            try:
                if self.load is load:  # else a later reset has taken over
                    ollama.load(model)
                load["state"] = "loaded"
            except OllamaError as e:
                log.error("load %s: %s", model, e)
                load.update(state="failed", error=str(e))

        loader = threading.Thread(target=work, name=f"load {model}", daemon=True)
        loader.start()
        loader.join(max(0, min(0.5, deadline - time.monotonic())))
        return "loaded" if load["state"] == "loaded" else "loading"


def installed():
    """Map the `name_key`s of the models on disk to their blobs' digests, or to () where those are out of sight."""
    if processes.managed:
        return store.models()
    try:
        return {name_key(m["name"]): () for m in ollama.tags(1)}
    except OllamaError:
        return {}


def must_exist(model):
    if model and name_key(model) not in installed():
        raise OllamaError("model_not_found", f"There is no model {model}: GET /api/models lists what is downloaded.")


def list_loaded():
    """Return the loaded models' names; none where an Ollama that is not ours is not there at all."""
    try:
        return [m["name"] for m in ollama.ps(0.4)]
    except OllamaError as e:
        if processes.managed:
            raise
        if e.code != "ollama_unreachable":
            raise ApiError(e.status, e.code, f"Ollama does not answer: restart it. {FOREIGN}") from e
        return []


def unload(names):
    """Ask for all of them at once; return whether Ollama took at least one."""
    def ask(name):
        try:
            ollama.unload(name, 0.4)
            return True
        except OllamaError as e:
            log.warning("unload %s: %s", name, e)

    return any(in_parallel(ask, names))


def answering():
    try:
        return bool(ollama.version(0.5))
    except OllamaError:
        return False


def end_runners(runners, names):
    """End runners by SIGKILL; return `[{"pid", "model", "reason": "busy|hung|orphan"}]`."""
    server, ended = processes.server(), []
    answers = in_parallel(lambda r: r.process.state not in "Tt" and ollama.runner_answers(r.port, 0.2), runners)
    for runner, busy in zip(runners, answers):
        orphan = not server or runner.process.parent != server.pid
        why = "orphan" if orphan else "busy" if busy else "hung"
        log.error("ending runner %d of %s: %s", runner.process.pid, names[runner], why)
        processes.end(runner.process)
        ended.append({"pid": runner.process.pid, "model": names[runner], "reason": why})
    wait_until(lambda: not any(processes.alive(r.process) for r in runners), time.monotonic() + 0.9)
    return ended


def clear_message(report):
    done = [f"{len(report['unloaded_models'])} unloaded", f"{report['memory']['freed_mb']} MB came free"] \
        if report["unloaded_models"] or report["killed"] else [] if report["left"] else ["nothing was loaded"]
    done += [f"{len(report['killed'])} runner{'s' * (len(report['killed']) > 1)} ended"] * bool(report["killed"])
    done += [f"still busy: {', '.join(report['left'])}"] * bool(report["left"])
    return f"Cache cleared: {', '.join(done)}.{foreign()}"


def foreign():
    return "" if processes.managed else f" {FOREIGN}"


def wait_until(condition, deadline):
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.02)
    return True


listing = Batch(list_models)
cpu = CpuMeter()
cpu.percent("machine", cpu_seconds())
healer = Healer()
