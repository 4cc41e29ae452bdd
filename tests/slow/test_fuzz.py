"""A service fed with anything at all answers by the contract, and has no bug to log."""

import http.client
import json
import random
import threading
from collections import Counter
from urllib.parse import quote

import pytest

from helpers.answers import GEMMA, GETS, ROUTES, STATUSES, WITH_BODY, shaped
from helpers.ports import NOWHERE
from helpers.waiting import wait_for

CLIENTS, REQUESTS_EACH = 5, 200
FIELDS = ["model", "name", "stream", "insecure", "detach", "force", "purge", "deep"]
METHODS = ["GET", "POST", "DELETE", "PUT", "PATCH", "OPTIONS", "HEAD", "TRACE", "PROPFIND"]
HEADERS = {
    "Content-Type": ["application/json", "text/plain", "\xff"],
    "Origin": ["null", "http://evil.example"],
    "Sec-Fetch-Site": ["cross-site", "none"],
    "Authorization": ["Bearer x", "\xff"],
    "Accept": ["text/html"],
    "Content-Encoding": ["gzip", "identity"],
    "X-Http-Method-Override": ["DELETE"],
    "Range": ["bytes=0-1"],
    "If-None-Match": ["*"],
    "X-Forwarded-For": ["1.2.3.4"],
}


class Fuzz:
    """Seeded requests over all routes."""

    def __init__(self, seed, registry_name):
        self.random = random.Random(seed)
        self.names = [
            GEMMA,
            "gemma",
            "Gemma:LATEST",
            "nothing",
            "library/nothing",
            registry_name,
            f"{NOWHERE}/ns/m:t",
            "localhost:1/ns/m",
            "../x",
            "a:b:c",
            "",
            "\x1b[31m",
            "x" * 5000,
            "a//b",
        ]

    def text(self):
        """Return any text, with two slashes at the end: a name of no registry of the world."""
        few, many = self.random.randrange(128), self.random.randrange(0xD800)
        count = self.random.randrange(12)
        return "".join(chr(self.random.choice((few, many))) for _ in range(count)) + "//"

    def value(self, depth=0):
        kinds = [
            lambda: None,
            lambda: self.random.choice((True, False)),
            self.text,
            lambda: self.random.choice(self.names),
            lambda: self.random.choice((0, -1, 1 << 64, 1e308, -0.0)),
            lambda: self.random.randrange(10**9),
        ]
        if depth < 4:
            count = self.random.randrange(4)
            kinds += [
                lambda: [self.value(depth + 1) for _ in range(count)],
                lambda: {self.text(): self.value(depth + 1) for _ in range(count)},
            ]
        return self.random.choice(kinds)()

    def fields(self):
        given = {}
        for key in [*FIELDS, self.text()]:
            if self.random.random() >= (0.7 if key == "model" else 0.25):
                continue
            if self.random.random() < 0.4:
                given[key] = self.value()
            elif key in ("model", "name"):
                given[key] = self.random.choice(self.names)
            else:
                given[key] = self.random.choice((True, False))
        if self.random.random() < 0.02:
            given["restart"] = True
        return given

    def body(self):
        how = self.random.random()
        if how < 0.08:
            return b""
        if how < 0.16:
            return json.dumps(self.value()).encode()
        if how < 0.24:
            return self.random.randbytes(self.random.randrange(300))
        text = json.dumps(self.fields()).encode()
        if how < 0.34:
            at = self.random.randrange(len(text))
            text = text[:at] + self.random.randbytes(self.random.randrange(3)) + text[at + 1 :]
        return text if how < 0.98 else text.ljust(self.random.choice((65536, 65537, 70_000)))

    def path(self):
        with_body = [path for _, path in WITH_BODY]
        elsewhere = ["/static/x", f"/api/{self.random.random()}"]
        path = self.random.choice([*GETS, *with_body * 3, *elsewhere])
        if self.random.random() < 0.2:
            keys = self.random.choices(["model", "name", "force", "deep", "stream", "x"], k=2)
            path += "?" + "&".join(f"{key}={quote(str(self.value()))[:200]}" for key in keys)
        return path

    def headers(self):
        headers = {"Host": "127.0.0.1"}
        for name, values in HEADERS.items():
            if self.random.random() < 0.04:
                headers[name] = self.random.choice(values)
        return headers

    def method(self, path):
        usual = [method for method, each in ROUTES if each == path.partition("?")[0]]
        often = usual and self.random.random() < 0.85
        return self.random.choice(usual if often else METHODS)

    def request(self):
        path = self.path()
        return self.method(path), path, self.body(), self.headers()


class Clients:
    """Some clients that send a fuzz's requests, each on a connection that it keeps."""

    def __init__(self, service, fuzz, gguf):
        self.service, self.fuzz, self.gguf = service, fuzz, gguf
        self.statuses, self.failures, self.lock = Counter(), [], threading.Lock()

    def run(self):
        threads = [threading.Thread(target=self._client) for _ in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _client(self):
        connection = http.client.HTTPConnection("127.0.0.1", self.service.port, timeout=30)
        for _ in range(REQUESTS_EACH):
            with self.lock:
                asked = self.fuzz.request()
            try:
                self._send(connection, *asked)
            except Exception as error:  # each is told
                self.failures.append((*asked, repr(error)[:600]))
                connection.close()
            if len(asked[2]) > 60_000:
                # The server closes a connection whose long body was refused unread.
                connection.close()
        connection.close()

    def _send(self, connection, method, path, body, headers):
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        data = answer.read()
        with self.lock:
            self.statuses[answer.status] += 1
        if method == "HEAD":
            assert answer.status in STATUSES
        else:
            shaped(answer.status, answer.headers, data, path)
        if method == "DELETE" and answer.status == 200:
            # So that requests that find the model go on being tried.
            self.service.add_model(GEMMA, self.gguf)


@pytest.fixture(scope="module")
def fuzzed(make_module_service, gguf):
    return make_module_service(models={GEMMA: gguf}, LLM_MODEL=GEMMA)


@pytest.mark.parametrize("seed", range(4))
def test_no_request_on_any_route_is_a_500(fuzzed, gguf, registry, seed):
    fuzzed.add_model(GEMMA, gguf)
    fuzzed.wait_healthy(30)
    fuzz = Fuzz(seed, registry.add_random("ns/small:latest", 0.2))
    clients = Clients(fuzzed, fuzz, gguf)
    clients.run()
    print(sorted(clients.statuses.items()))
    told = "\n".join(map(str, clients.failures[:20]))
    assert not clients.failures, f"{len(clients.failures)}\n{told}"
    # It has come past the parsing.
    assert set(clients.statuses) >= {200, 400, 403, 404, 405, 413, 415, 502}
    wait_for(lambda: fuzzed.get("/health").ok, 30, "/health after the fuzz run")
    assert ": a bug" not in fuzzed.log() and "Traceback" not in fuzzed.log()
