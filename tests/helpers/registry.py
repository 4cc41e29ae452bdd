"""A model registry with faults: what `ollama pull` asks of one.

    with Registry() as registry:
        name = registry.add("ns/gemma:latest", gguf)       # a path, or bytes
        name = registry.add_random("ns/big:latest", 300)   # MB, layers of 60, 30 and 10 %
        requests.post(ollama + "/api/pull", json={"model": name, "insecure": True})

A random model can be pulled, and not loaded. Faults take effect at once, also on transfers under
way:

    registry.rate = 20e6            bytes/s over all connections; None: as fast as it goes
    registry.stall = True           connections are taken, no byte more is sent; False: go on
    registry.stall_after(count)     the same, once that many more bytes of blobs went out
    registry.cut()                  ends the connections; Ollama keeps the bytes of the part
    registry.cut(reset=True)        by RST: Ollama takes the part's bytes off its count again
    registry.down(), registry.up()  connections are refused; there again, at the same port
    registry.corrupt.add(digest)    flips bytes of a blob; .discard(digest) heals
    registry.manifest_delay = 3     seconds before a manifest is answered
    registry.manifest_status = 500  None: the manifest itself
    registry.faults["head"] = reset what a step does instead of its work; see helpers/faults.py

With `Registry(tls=context)`, of helpers/tls.py, it speaks HTTPS alone.

What it tells:

    registry.layers(name)           [{"mediaType", "digest", "size"}, …], the config last
    registry.size(name)             the sum of their sizes
    registry.bytes_sent(digest)     bytes handed to the kernel; None: of all blobs.
                                    A few MB of them may die in socket buffers
    registry.requests[key]          GETs so far, of a digest or of "ns/big:latest" (the manifest)
    registry.active                 blob transfers open now
"""

import contextlib
import hashlib
import json
import math
import mmap
import os
import random
import select
import socket
import ssl
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from helpers.faults import reset
from helpers.models import MEDIA, config_json, config_layer, file_digest, manifest_json
from helpers.ports import free_port

MIB = 1 << 20
MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
# The steps of a pull: what the path is of, and whether the body is wanted.
STEPS = {
    ("manifests", True): "manifest",
    ("token", True): "token",
    ("blobs", False): "head",
    ("blobs", True): "blob",
    ("direct", True): "data",
}


class _Random:
    """Seeded content of any size from one block; only the first bytes of each block differ."""

    def __init__(self, size, seed):
        self.size = size
        self.block = memoryview(random.Random(seed).randbytes(MIB))
        digest = hashlib.sha256()
        offset = 0
        while offset < size:
            piece = self.read(offset, size - offset)
            digest.update(piece)
            offset += len(piece)
        self.digest = "sha256:" + digest.hexdigest()

    def read(self, offset, count):
        number, inside = divmod(offset, MIB)
        if inside < 8:
            return memoryview(number.to_bytes(8, "big"))[inside:][:count]
        return self.block[inside : inside + count]


class _Bytes:
    def __init__(self, data, digest=None):
        self.view = memoryview(data)
        self.size = len(data)
        self.digest = digest or "sha256:" + hashlib.sha256(data).hexdigest()

    def read(self, offset, count):
        return self.view[offset : offset + min(count, MIB)]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def shutdown_request(self, request):
        self.close_request(request)  # a FIN before it would hide the RST of cut(reset=True)

    def handle_error(self, request, client_address):
        pass


class _Handler(BaseHTTPRequestHandler):
    # HTTP/1.0 on purpose: one request a connection, so that a cut connection is a cut request.

    def setup(self):
        self.registry = self.server.registry
        self.epoch = self.registry.epoch
        if self.registry.tls and "connect" not in self.registry.faults:
            self.shake_hands()
        super().setup()

    def shake_hands(self):
        """Begin TLS; where that fails, take what the client has sent meanwhile.

        Else the kernel resets the connection, and the client may not read why.
        """
        tls = self.registry.tls
        self.request = tls.wrap_socket(self.request, True, do_handshake_on_connect=False)
        try:
            self.request.do_handshake()
        except ssl.SSLError:
            number = self.request.fileno()
            while select.select([number], [], [], 5)[0] and os.read(number, 1 << 16):
                pass
            raise

    def handle(self):
        with contextlib.suppress(OSError):
            self.registry.faults.get("connect", _Handler.answer_all)(self)

    def finish(self):
        super().finish()
        self.request.close()  # TLS has another socket than the server

    def answer_all(self):
        super().handle()

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        try:
            self.registry.allow(self, 0)
            kind, key = self.registry.find(self.path)
            if body and kind != "direct":  # the redirect and what it leads to are one request
                self.registry.count(requests=key)
            fault = self.registry.faults.get(STEPS.get((kind, body)))
            if fault:
                fault(self)
            elif kind == "manifests":
                self.manifest(self.registry.models[key], body)
            elif kind == "blobs" and body:
                self.head(307, 0, Location=self.registry.direct_url(key))
            elif kind:
                self.blob(self.registry.blobs[key], body)
            else:
                self.head(404, 0)
        except OSError:
            if self.registry.resets:
                reset(self)

    def head(self, status, length, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": length, **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def manifest(self, layers, body):
        until = time.monotonic() + self.registry.manifest_delay
        while time.monotonic() < until:
            self.wait(0, 0.02)
        status = self.registry.manifest_status or 200
        data = manifest_json(layers) if status == 200 else b"injected by the test"
        self.head(status, len(data), Content_Type=MANIFEST)
        if body:
            self.push(memoryview(data))

    def blob(self, blob, body):
        start, end = 0, blob.size
        asked = self.headers.get("Range")
        if asked:
            start, end = (int(edge) for edge in asked.removeprefix("bytes=").split("-"))
            end += 1
            self.head(206, end - start, Content_Range=f"bytes {start}-{end - 1}/{blob.size}")
        else:
            self.head(200, end)
        if not body:
            return
        self.registry.count(active=1)
        try:
            while start < end:
                piece = blob.read(
                    start, self.registry.allow(self, min(end - start, MIB - start % MIB))
                )
                if blob.digest in self.registry.corrupt:
                    piece = memoryview(bytes([piece[0] ^ 255]) + piece[1:])
                # Counted first: who has received the last one shall find it counted
                self.registry.count(sent=blob.digest, bytes=len(piece))
                try:
                    self.push(piece)
                except OSError:
                    self.registry.count(sent=blob.digest, bytes=-len(piece))
                    raise
                start += len(piece)
        finally:
            self.registry.count(active=-1)

    def push(self, data):
        if self.registry.tls:
            self.wait(0, 0)
            self.connection.sendall(data)
            return
        while data:
            if self.wait(select.POLLOUT, 0.05):
                try:
                    data = data[self.connection.send(data, socket.MSG_DONTWAIT) :]
                except BlockingIOError:
                    pass

    def wait(self, events, seconds):
        """Polls the connection; raises if the client left or the test cut it."""
        poll = select.poll()
        poll.register(self.connection, events | select.POLLRDHUP)
        seen = poll.poll(seconds * 1000)
        if self.epoch != self.registry.epoch or (seen and seen[0][1] & ~events):
            raise ConnectionAbortedError
        return bool(seen)


class Registry:
    def __init__(self, tls=None):
        self.tls = tls
        self.faults = {}
        self.port = free_port()
        self.rate = None
        self.corrupt = set()
        self.manifest_delay = 0
        self.manifest_status = None
        self.requests = Counter()
        self.active = 0
        self.models, self.blobs = {}, {}
        self.epoch, self.resets = 0, False
        self._sent = Counter()
        self._lock = threading.Lock()
        self._granted, self._limit = 0, math.inf
        self._credit, self._credited = 0, time.monotonic()
        self._server = None
        self.up()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def close(self):
        self.down()

    def add(self, name, gguf, params=None, template=None, extra_layers=(), config=None):
        """Publish a model; return the name to pull by. extra_layers: [(media type, bytes), …]."""
        if isinstance(gguf, bytes):
            model = _Bytes(gguf)
        else:
            with open(gguf, "rb") as file:
                model = _Bytes(
                    mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), file_digest(str(gguf))
                )
        layers = [(MEDIA + "model", model)]
        layers += [(MEDIA + "template", _Bytes(template.encode()))] if template else []
        layers += [(MEDIA + "params", _Bytes(json.dumps(params).encode()))] if params else []
        layers += [(media, _Bytes(data)) for media, data in extra_layers]
        return self._publish(name, layers, config or config_json())

    def add_random(self, name, size_mb, seed=None, shares=(0.6, 0.3, 0.1)):
        """Publish a model with content of its own for each name, or for each seed."""
        size = int(size_mb * 1e6)
        layers = [
            (
                MEDIA + ("adapter" if n else "model"),
                _Random(max(1, int(size * share)), f"{seed or name} {n}"),
            )
            for n, share in enumerate(shares)
        ]
        return self._publish(name, layers, config_json())

    def _publish(self, name, layers, config):
        if "/" not in name or ":" not in name:
            raise ValueError(f"{name}: wants ns/model:tag")
        self.blobs.update({blob.digest: blob for _, blob in layers})
        last = config_layer(config)
        self.blobs[last["digest"]] = _Bytes(config)
        self.models[name] = [
            {"mediaType": media, "digest": blob.digest, "size": blob.size} for media, blob in layers
        ] + [last]
        return f"localhost:{self.port}/{name}"

    def layers(self, name):
        return self.models[name.removeprefix(f"localhost:{self.port}/")]

    def size(self, name):
        return sum(layer["size"] for layer in self.layers(name))

    def bytes_sent(self, digest=None):
        with self._lock:
            return self._sent[digest] if digest else self._sent.total()

    @property
    def stall(self):
        return self._granted >= self._limit

    @stall.setter
    def stall(self, on):
        self._limit = 0 if on else math.inf

    def stall_after(self, count):
        with self._lock:
            self._limit = self._granted + count

    def cut(self, reset=False):
        self.resets = reset
        self.epoch += 1

    def down(self):
        if self._server:
            self._server.shutdown()
            self._server.server_close()
            self._server = None
        self.cut()

    def up(self):
        self._server = _Server(("127.0.0.1", self.port), _Handler)
        self._server.registry = self
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def direct_url(self, digest):
        """Return where a blob's content is: a host of another name."""
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}/direct/{digest}"

    def find(self, path):
        """Return what a path names.

        A "manifests" and name, a "blobs" or "direct" and digest, a "token" and nothing.
        """
        *front, kind, last = path.partition("?")[0].split("/")
        if last == "token":
            return last, None
        if kind in ("blobs", "direct") and last in self.blobs:
            return kind, last
        name = "/".join(front).removeprefix("/v2/") + ":" + last
        return ("manifests" if kind == "manifests" and name in self.models else None), name

    def count(self, requests=None, sent=None, bytes=0, active=0):
        with self._lock:
            self.active += active
            if requests:
                self.requests[requests] += 1
            if sent:
                self._sent[sent] += bytes

    def allow(self, handler, wanted):
        """Wait until bytes may go out; return how many of the wanted ones.

        With 0 wanted it waits until nothing stalls.
        """
        while True:
            with self._lock:
                room = min(wanted or 1, self._limit - self._granted)
                if self.rate and wanted:
                    now, most = time.monotonic(), max(1, self.rate / 20)
                    # At most 50 ms' worth is saved up: the rate holds at once, whatever went on.
                    self._credit = min(self._credit + (now - self._credited) * self.rate, most)
                    self._credited = now
                    # Nor a few bytes at a time, which would cost more than the transfer itself.
                    enough = self._credit >= min(room, most, 1 << 15)
                    room = min(room, int(self._credit)) if enough else 0
                    self._credit -= max(room, 0)
                if room > 0:
                    self._granted += room if wanted else 0
                    return room
            handler.wait(0, 0.01)
