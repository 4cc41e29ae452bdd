"""An Ollama that takes every request, and never answers those of one kind.

`stand_in(folder)` writes the program; the service finds it as `ollama` on its PATH.
"""

import os
import socketserver
import sys
import time
from pathlib import Path

from helpers.fake_ollama import FakeOllama, http, never
from helpers.nonsense import SANE_ANSWERS
from helpers.places import ROOT


def generate(sock):
    """Read files, as for a model that is named, and leave it at that."""
    Path(socketserver.__file__).read_bytes()
    never(sock)


def stand_in(folder):
    """Write the program; return the PATH to find it by."""
    program = Path(folder, "ollama")
    command = f"exec {sys.executable} -m helpers.deaf_ollama"
    program.write_text(f"#!/bin/sh\nPYTHONPATH={ROOT}/tests {command}\n")
    program.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


if __name__ == "__main__":
    port = int(os.environ["OLLAMA_HOST"].rpartition(":")[2])
    FakeOllama({**SANE_ANSWERS, "/api/show": http("{}"), "/api/generate": generate}, port)
    while True:
        time.sleep(60)
