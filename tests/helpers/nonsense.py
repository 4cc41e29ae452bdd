"""What an Ollama should never answer, and a program that answers it.

`stand_in(folder)` writes the program; the service finds it as `ollama` on its PATH.
"""

import json
import os
import sys
import time
from pathlib import Path

from helpers.fake_ollama import FakeOllama, chunked, drip, http, ndjson, never
from helpers.places import ROOT


def _dripping(sock):
    sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n")
    drip(b" " * 100, 0.5)(sock)


def _listed(**fields):
    return http(json.dumps({"models": [{"name": "a", **fields}]}))


def _layer(digest="sha256:0", **sizes):
    return {"status": "pulling 0", "digest": digest, **sizes}


SUCCESS = {"status": "success"}
REDIRECT = b"HTTP/1.1 302 X\r\nLocation: http://evil.example/\r\nContent-Length: 0\r\n\r\n"
SANE = "sane"
ANSWERS = {
    "html": http("<html>It works!</html>", type="text/html"),
    "an html error": http("<html>", 502, "text/html"),
    "half a line": chunked(b'{"sta'),
    "a line and a half": ndjson({"status": "pulling manifest"}) + b'{"status": "pull',
    "cut off": chunked(b'{"status":"x"}\n', end=False),
    "nothing": b"",
    "no http": b"\x16\x03\x01" * 99,
    "a line of 10 MB": ndjson({"status": "x" * 10_000_000}),
    "10 MB without an end": ndjson({"status": "pulling manifest"}) + b'{"status":"' + b"x" * 10**7,
    "a list": http("[]"),
    "null": http("null"),
    "numbers": http('{"models": 7, "version": 7}'),
    "models without names": http('{"models": [{}], "version": null}'),
    "odd models": _listed(size="x", modified_at=7, expires_at=[], details=7, digest={}),
    "odd times": _listed(
        modified_at="9999-99-99T99:99:99+99:99", expires_at="0001-01-01T00:00:00+14:00"
    ),
    "negative sizes": ndjson(_layer(total=-5, completed=-7)),
    "sizes in words": ndjson(_layer(total="5")),
    "more than all": ndjson(_layer(total=5, completed=10**18), SUCCESS),
    "an odd digest": ndjson(_layer("../../x", total=5, completed=5), SUCCESS),
    "escapes": http('{"error": "\\u001b[31m\\nFORGED"}', 500),
    "an odd error": http('{"error": {"a": [1]}}', 500),
    "deep": http("[" * 100_000),
    "a redirect": REDIRECT,
    "a 204": b"HTTP/1.1 204 X\r\n\r\n",
    "a 999": http("{}", 999),
    "a byte at a time": _dripping,
    "never": never,
}
SANE_ANSWERS = {
    "/api/version": http('{"version":"0.0.0"}'),
    "/api/tags": http('{"models":[]}'),
    "/api/ps": http('{"models":[]}'),
}


class NonsenseOllama(FakeOllama):
    """Answers every path by the word that stands in a file."""

    def __init__(self, port, file):
        self.file = file
        super().__init__({}, port)

    def answer_to(self, path):
        word = self.file.read_text()
        return SANE_ANSWERS.get(path, b"") if word == SANE else ANSWERS[word]


def stand_in(folder):
    """Write the program; return (the PATH to find it by, the file that takes the word)."""
    file, program = Path(folder, "answer"), Path(folder, "ollama")
    file.write_text(SANE)
    program.write_text(
        f"#!/bin/sh\nPYTHONPATH={ROOT}/tests exec {sys.executable} -m helpers.nonsense {file}\n"
    )
    program.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}", file


if __name__ == "__main__":
    NonsenseOllama(int(os.environ["OLLAMA_HOST"].rpartition(":")[2]), Path(sys.argv[1]))
    while True:
        time.sleep(60)
