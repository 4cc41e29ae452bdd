"""gunicorn's settings, which it finds by itself: where it listens, hooks, worker and logger."""

import contextlib
import errno
import gc
import json
import os
import pathlib
import socket
import struct
import sys
import threading
import time
import typing
from http import HTTPStatus

import psutil
from gunicorn.glogging import Logger
from gunicorn.http import errors as http_errors
from gunicorn.workers.gthread import ThreadWorker

from app import (
    API_HOST,
    API_PORT,
    BODY_LIMIT_BYTES,
    CONTEXT_LENGTH,
    GPU_LAYERS,
    SILENT_CLIENT_S,
    STATE_FILE,
    app,
    downloads,
    healing,
    history,
    log,
    machine,
    of_ollama,
    trials,
    verifying,
    watch,
)
from llm_service import environment
from ollama_client import listen_address

LINGER_BYTES = 16 << 20  # of a refused body are taken, so that its client reads the answer
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
    ollama_host = of_ollama("OLLAMA_HOST") or "127.0.0.1:11434"
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
    """Write how Ollama's environment differs, for the launcher, which waits for it."""
    words = environment.changes(os.environ, CONTEXT_LENGTH, GPU_LAYERS)
    kept_back = environment.blinding(os.environ)
    if kept_back:
        reason = "its runners could not be watched"
        log.warning("kept from Ollama, as %s: %s", reason, ", ".join(kept_back))
    if STATE_FILE != os.devnull:
        pathlib.Path(f"{STATE_FILE}.env.new").write_text("".join(f"{word}\n" for word in words))
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
    machine.start()
    watch.start(healing.after_look)
    history.start()


def tell_keep_alive(answer: typing.Callable) -> typing.Callable:
    """Wrap the WSGI app: say for how long a kept connection stays open.

    gunicorn drops this header where the app sets it, and knows the time. A client of Node's that
    pauses for just so long lost 105 of 800 requests without it, and none with it.
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

    QUIET_PATHS = (
        *("/health", "/livez", "/metrics"),
        *("/api/stats", "/api/models", "/api/models/pull", "/api/history"),  # the page's
    )

    def access(self, resp, req, environ, request_time):
        told = self.atoms(resp, req, environ, request_time)
        is_well = told["m"] == "GET" and told["s"] in ("200", "304")
        if is_well and told["U"] in self.QUIET_PATHS:
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
        """End what streams at SIGTERM."""
        for streaming in (downloads, trials, verifying):
            threading.Thread(target=streaming.close, daemon=True).start()
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
