"""A real Ollama, without the service."""

import contextlib
import os
import signal
import subprocess
from pathlib import Path

import psutil

from helpers.generation import Generation
from helpers.models import add_model
from helpers.places import MARK
from helpers.ports import NOWHERE, free_port
from helpers.processes import kill, mark, marked
from helpers.waiting import call, wait_for

COMMON_ENV = {
    # More threads than that, and tests that run side by side would slow each other down.
    "LLAMA_ARG_THREADS": "1",
    # A runner would first try out what fits a GPU, which is half of the CPU of a load.
    "LLAMA_ARG_FIT": "off",
    # No model's name may reach a registry of the world. A proxy is not asked for loopback.
    "HTTPS_PROXY": f"http://{NOWHERE}",
    "https_proxy": f"http://{NOWHERE}",
}

# An Ollama whose runners give way a little: what waits for an answer of the API should not wait
# for the models of other tests. A kernel may share the CPU between sessions first
# (sched_autogroup): a nice value counts within a session alone.
GIVING_WAY = """#!/bin/sh
read -r _ _ _ _ _ session _ </proc/$$/stat
[ "$session" != $$ ] || {{ echo 5 >/proc/$$/autogroup; }} 2>/dev/null
exec nice -n 5 "{}" "$@"
"""


def giving_way(folder, binary):
    """Write a program `ollama` that starts this one so that it gives way to others."""
    program = Path(folder, "giving-way", "ollama")
    program.parent.mkdir(exist_ok=True)
    program.write_text(GIVING_WAY.format(binary))
    program.chmod(0o755)
    return program


class OllamaServer:
    """`ollama serve`: .url .port .pid .models (the store's path) .process (its Popen)."""

    def __init__(self, folder, binary, **env):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.models = Path(folder) / "models"
        self.logfile = Path(folder) / "ollama.log"
        self.binary = giving_way(folder, binary)
        self.env = {
            **os.environ,
            **COMMON_ENV,
            "HOME": folder,
            "OLLAMA_HOST": f"127.0.0.1:{self.port}",
            "OLLAMA_MODELS": str(self.models),
            "OLLAMA_NOPRUNE": "1",
            "GIN_MODE": "release",
            MARK: mark(self.port),
            **env,
        }

    def start(self):
        """Start it, for the first time or again, and wait for its first answer."""
        with open(self.logfile, "a") as log:
            self.process = subprocess.Popen(
                [self.binary, "serve"],
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        wait_for(lambda: call("GET", self.url + "/api/version").ok, 60, "Ollama's first answer")

    @property
    def pid(self):
        return self.process.pid

    def log(self):
        return self.logfile.read_text(errors="replace")

    def add_model(self, name, gguf):
        add_model(self.models, name, gguf)

    def generate(self, name, **options):
        return Generation(self.port, name, **options).flowing()

    def runners(self):
        found = []
        for process in marked(mark(self.port)):
            with contextlib.suppress(psutil.Error):  # it has ended meanwhile
                if "--model" in process.cmdline():
                    found.append(process)
        return found

    def suspend(self):
        self.process.send_signal(signal.SIGSTOP)

    def resume(self):
        self.process.send_signal(signal.SIGCONT)

    def kill(self):
        """End it by SIGKILL: its runners stay, as orphans."""
        self.process.kill()
        self.process.wait()

    def terminate(self):
        self.process.terminate()
        self.process.wait(15)

    def stop(self):
        kill(marked(mark(self.port)))
        self.process.wait()
        # A runner takes a moment to give its memory back.
        wait_for(lambda: not marked(mark(self.port)), 30, "the end of its runners")
