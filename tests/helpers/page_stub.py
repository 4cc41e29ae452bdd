"""A stand-in for the service that serves the page and plays answers back.

The GPU's figures were recorded on an NVIDIA H100 (by nvidia-smi, once a second) that matrix
products kept busy; the machine of the tests has no GPU.
"""

import collections
import contextlib
import hashlib
import http.server
import json
import threading
import time
from datetime import UTC, datetime

from helpers.places import ROOT
from llm_service.access import CSP
from llm_service.recommended import NOT_ASKED, SMALL

# Load in percent, memory in MB, temperature in °C, power in W.
H100 = [
    (0, 0, 33, 68.36),
    (0, 0, 33, 68.33),
    (0, 0, 33, 68.3),
    (0, 18269, 42, 137.65),
    (99, 18269, 50, 681.97),
    (99, 18269, 52, 691.64),
    (99, 18269, 53, 693.0),
    (99, 18269, 53, 690.45),
    (51, 18269, 47, 532.08),
    (40, 18269, 53, 444.42),
    (38, 18269, 49, 413.52),
    (53, 18269, 44, 442.94),
    (99, 18269, 55, 601.9),
    (100, 18269, 55, 694.92),
    (99, 18269, 56, 698.01),
    (100, 18269, 56, 697.58),
    (99, 18269, 57, 697.75),
    (38, 18269, 54, 544.31),
    (50, 18269, 49, 439.65),
    (53, 18269, 46, 441.63),
    (54, 18269, 49, 452.02),
    (99, 18269, 56, 584.86),
    (100, 18269, 57, 686.09),
    (100, 18269, 57, 682.96),
    (100, 18269, 58, 685.68),
    (100, 18269, 58, 684.53),
    (51, 18269, 50, 532.81),
    (38, 18269, 56, 449.99),
    (39, 18269, 55, 442.41),
    (53, 18269, 50, 429.88),
    (99, 18269, 58, 574.36),
    (100, 18269, 58, 688.3),
    (100, 18269, 59, 687.67),
    (0, 18269, 46, 522.92),
    (2, 0, 44, 123.86),
    (0, 0, 43, 124.67),
]
H100_TOTAL_MB = 81559
KINDS = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}


def gpu_stats(load, used_mb, celsius, watts, gpus=1):
    """Return what /api/stats says of GPUs with these figures."""
    one = {
        "name": "NVIDIA H100 80GB HBM3",
        "utilization_percent": load,
        "memory_used_mb": used_mb,
        "memory_total_mb": H100_TOTAL_MB,
        "temperature_c": celsius,
        "power_w": watts,
    }
    return {
        "gpu": "ok",
        "gpus": [{"index": index, "uuid": f"GPU-{index}", **one} for index in range(gpus)],
        "gpu_utilization": f"{load}%",
        "gpu_memory": f"{used_mb}MB / {H100_TOTAL_MB}MB",
        "gpu_temperature": f"{celsius}°C",
    }


def history(series, samples, marks=(), now=None, interval_s=10):
    """Return the answer of /api/history; each sample is what the series were, one in 10 s."""
    now = int(now or time.time())
    first = now - interval_s * (len(samples) - 1)
    return {
        "interval_s": interval_s,
        "span_s": 3600,
        "complete": True,
        "next": now,
        "series": list(series),
        "samples": [[first + interval_s * n, *sample] for n, sample in enumerate(samples)],
        "marks": list(marks),
    }


def pull(model, state="running", **fields):
    """Return an entry of GET /api/models/pull."""
    return {
        "model": model,
        "state": state,
        "status": "pulling a5fd3b62230a" if state == "running" else state,
        "percent": 41.3,
        "completed_bytes": 2_000_000_000,
        "total_bytes": 4_900_000_000,
        "bytes_per_second": 52_000_000,
        "eta_seconds": 56,
        "started_at": "2026-11-28T10:00:00+00:00",
        **fields,
    }


def model(name, size=4_920_753_328, share=None):
    """Return a model's entry in /api/models; `share` of it lies on the GPU, None: not loaded."""
    loaded = share is not None
    return {
        "name": name,
        "size": size,
        "digest": f"digest of {name}",
        "details": {"quantization_level": "Q4_K_M", "context_length": 131072},
        "loaded": loaded,
        "loaded_as": name if loaded else None,
        "size_loaded": size if loaded else None,
        "size_vram": round(size * share) if loaded else None,
        "context_length": 8192 if loaded else None,
        "expires_at": "2318-01-01T00:00:00Z" if loaded else None,
    }


def runner(name, state, seconds=0, speed=0.0, pid=4242):
    """Return a runner's entry in /api/stats."""
    return {
        "pid": pid,
        "model": name,
        "state": state,
        "seconds": seconds,
        "tokens": 0,
        "tokens_per_second": speed,
        "memory_mb": 512,
        "cpu_percent": 0.0,
    }


class Server(http.server.ThreadingHTTPServer):
    # With the usual five a connection that comes with many others waits for a second or three.
    request_queue_size = 64


class PageStub:
    """Plays the service: change `.stats`, `.health`, `.models`, `.pulls` to change its answers.

    With `.models` None it cannot list them. `.answers[(method, path)]` is the answer to an act,
    with `http_status` for its status; a list is a stream of lines.

    .url      of the page; .prefix  a path in front of all its addresses, such as "/llm"
    .polled   how often each path was asked for, those with a query by both
    .sent     what else was asked for: [(method, path, body)]
    .hung     an Event: while it is set, nothing but the page's own files is answered
    .slow     {path: seconds before it is answered}
    .bytes    of all answers
    """

    def __init__(self):
        self.stats = {
            "gpu": "none",
            "gpus": [],
            "gpu_utilization": "N/A",
            "gpu_memory": "N/A",
            "gpu_temperature": "N/A",
            "cpu_percent": 7.5,
            "memory": {"total_mb": 24105, "used_mb": 2276, "available_mb": 21829, "percent": 9.4},
            "disk": {
                "total_bytes": 270_553_174_016,
                "free_bytes": 76_346_208_256,
                "models_bytes": 4_920_753_328,
                "partial_bytes": 0,
                "unused_bytes": 0,
            },
            "runners": [],
            "ollama": {"pid": 372, "uptime_seconds": 4000, "restarts": 0},
            "healed": {"runners": 0, "ollama": 0, "last": None},
            "clears": 0,
            "resets": 0,
        }
        self.health = {"status": "healthy", "gpu": "none", "recommended_action": "none"}
        self.info = {
            "service": "llm-service",
            "version": "1.2.0",
            "hostname": "node1",
            "ollama_url": "http://127.0.0.1:11434",
            "ollama_version": "0.34.4",
            "default_model": "llama3.1:8b",
            "context_length": 8192,
        }
        self.history = history([], [])
        self.recommended = [{**NOT_ASKED, **each} for each in SMALL]
        self.updates = []
        self.models, self.pulls, self.sent, self.polled = [], [], [], collections.Counter()
        self.answers, self.prefix, self.bytes = {}, "", 0
        self.hung, self.slow_lines_s = threading.Event(), 0
        self.slow = {}
        self.clock = time.time  # of `timestamp`
        stub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                stub.answer(self)

            do_POST = do_DELETE = do_GET

            def log_message(self, *args):
                pass

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def answer(self, request):
        length = int(request.headers.get("Content-Length") or 0)
        body = request.rfile.read(length)
        path, asks, _ = request.path.removeprefix(self.prefix).partition("?")
        if asks:
            self.polled[request.path] += 1
        if not request.path.startswith(f"{self.prefix}/"):
            self._send(request, 404, b"<p>Not here.</p>", "text/html")
        elif path == "/" or path.startswith("/static/"):
            file = ROOT / ("static/index.html" if path == "/" else path[1:])
            self._send(request, 200, file.read_bytes(), KINDS[file.suffix])
        else:
            self._answer_call(request, path, json.loads(body) if body else None)

    def _answer_call(self, request, path, body):
        time.sleep(self.slow.get(path, 0))
        while self.hung.is_set():
            time.sleep(0.05)
        answer = self._json(request.command, path, body)
        if isinstance(answer, list):
            self._stream(request, answer)
            return
        bad = answer.get("status") == "unhealthy" or "error" in answer
        status = answer.pop("http_status", 503 if bad else 200)
        self._send(request, status, json.dumps(answer).encode(), "application/json")

    def _send(self, request, status, data, kind):
        tag = f'"{hashlib.sha1(data).hexdigest()}"'
        if request.headers.get("If-None-Match") == tag:
            status, data = 304, b""
        with contextlib.suppress(ConnectionError):  # the page has given up waiting
            request.send_response(status)
            request.send_header("Content-Type", f"{kind}; charset=utf-8")
            request.send_header("Content-Security-Policy", CSP)
            request.send_header("Cache-Control", "no-store")
            request.send_header("ETag", tag)
            if status != 304:
                request.send_header("Content-Length", str(len(data)))
            request.end_headers()
            request.wfile.write(data)
            self.bytes += len(data)

    def _stream(self, request, lines):
        with contextlib.suppress(ConnectionError):
            request.send_response(200)
            request.send_header("Content-Type", "application/x-ndjson")
            request.end_headers()
            for line in lines:
                request.wfile.write(json.dumps(line).encode() + b"\n")
                time.sleep(self.slow_lines_s)
            return
        self.sent.append(("LEFT", request.path, None))

    def _json(self, method, path, body):
        if method != "GET":
            self.sent.append((method, path, body))
            done = {"status": "success", "message": "Done."}
            answer = self.answers.get((method, path), done)
            return answer if isinstance(answer, list) else dict(answer)
        self.polled[path] += 1
        if (method, path) in self.answers:
            return dict(self.answers[method, path])
        if path == "/api/models" and self.models is None:
            return {"error": "Ollama did not answer in time.", "code": "ollama_timeout"}
        now = datetime.fromtimestamp(self.clock(), UTC).isoformat()
        return {
            "/health": dict(self.health),
            "/api/info": dict(self.info),
            "/api/stats": {**self.stats, "timestamp": now},
            "/api/history": {**self.history, "timestamp": now},
            "/api/models": {"models": self.models},
            "/api/models/pull": {"pulls": self.pulls},
            "/api/models/recommendations": {"models": self.recommended},
            "/api/models/updates": {"models": self.updates},
        }[path]

    def close(self):
        self.hung.clear()
        self._server.shutdown()
        self._server.server_close()
