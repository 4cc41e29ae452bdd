"""An Ollama that takes every request, and never answers those of one kind.

`stand_in(folder)` writes the program; the service finds it as `ollama` on its PATH. With
`WORKING_RUNNER` in the environment it has a runner that works and tells nothing of it, as MLX's.
"""

import os
import socketserver
import subprocess
import sys
import time
from pathlib import Path

from helpers.fake_ollama import FakeOllama, http, never
from helpers.nonsense import SANE_ANSWERS
from helpers.places import ROOT
from helpers.ports import free_port


def generate(sock):
    """Read files, as for a model that is named, and leave it at that."""
    Path(socketserver.__file__).read_bytes()
    never(sock)


def stand_in(folder):
    """Write the program; return the PATH to find it by."""
    program = Path(folder, "ollama")
    command = f"exec {sys.executable} -m helpers.deaf_ollama $*"
    program.write_text(f"#!/bin/sh\nPYTHONPATH={ROOT}/tests {command}\n")
    program.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def serve():
    """Take requests, and have a runner where one is wanted."""
    port = int(os.environ["OLLAMA_HOST"].rpartition(":")[2])
    FakeOllama({**SANE_ANSWERS, "/api/show": http("{}"), "/api/generate": generate}, port)
    if "WORKING_RUNNER" in os.environ:
        words = ["runner", "--model", "mlx:latest", "--port", str(free_port())]
        subprocess.Popen([sys.executable, "-m", "helpers.deaf_ollama", *words])


def work(port):
    """Use a sixth of a core."""
    FakeOllama({"/health": http("{}")}, port)
    while True:
        until = time.process_time() + 0.05
        while time.process_time() < until:
            pass
        time.sleep(0.25)


if __name__ == "__main__":
    if "runner" in sys.argv:
        work(int(sys.argv[-1]))
    serve()
    while True:
        time.sleep(60)
