"""The service, as ./start.sh starts it."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from helpers.generation import Generation
from helpers.models import add_model
from helpers.ollama_server import COMMON_ENV, giving_way
from helpers.places import CACHE, MARK, ROOT
from helpers.ports import free_port
from helpers.processes import kill, mark, marked
from helpers.waiting import call, wait_for
from ollama_client import trimmed

# Python imports a module of this name at its start: here in gunicorn's processes alone.
OTHER_CONSTANTS = """
import importlib, sys
if "gunicorn" in sys.orig_argv:
    for name, value in {}.items():
        module, _, constant = name.rpartition(".")
        module = importlib.import_module(module)
        getattr(module, constant)  # an error for one that is not there
        setattr(module, constant, value)
"""
# Constants for a service on the small disk, which is smaller than what it keeps free else.
SMALL_RESERVE = {"llm_service.downloads.DISK_RESERVE_BYTES": 8 << 20}


class Service:
    """A service on ports and a store of its own.

    models      {"name": path of a GGUF}: those that are there from the start
    wait        False: do not wait for a healthy /health
    wrapper     words before the command, such as setpriv's
    constants   {"llm_service.downloads.STALL_S": 5}: other values for constants of modules
    env         settings; None removes a variable

    .url .port                      of the management API
    .ollama_url .ollama_port        of its Ollama
    .models                         the store's path
    .process                        the Popen of start.sh
    """

    def __init__(self, folder, binary, models=None, wait=True, constants=None, wrapper=(), **env):
        self.port = int(env.get("LLM_API_PORT") or free_port())
        host = trimmed(env.get("OLLAMA_HOST") or "").strip()
        self.ollama_port = int(host.rpartition(":")[2] or free_port())
        self.url = f"http://127.0.0.1:{self.port}"
        self.ollama_url = f"http://127.0.0.1:{self.ollama_port}"
        self.models = Path(trimmed(str(env.get("OLLAMA_MODELS", f"{folder}/models"))))
        self.logfile = Path(folder) / "service.log"
        self.state_file = CACHE / "run" / f"{self.port}.state"
        self.models.mkdir(exist_ok=True)
        for name, gguf in (models or {}).items():
            self.add_model(name, gguf)
        self.env = {
            **os.environ,
            **COMMON_ENV,
            # HOME is elsewhere, so that the user's ~/.ollama is left alone.
            "HOME": folder,
            # What is installed stays in use.
            "XDG_CACHE_HOME": str(CACHE.parent),
            "LLM_API_PORT": str(self.port),
            "OLLAMA_HOST": f"127.0.0.1:{self.ollama_port}",
            "OLLAMA_MODELS": str(self.models),
            "PATH": f"{giving_way(folder, binary).parent}:{os.environ['PATH']}",
            "LLM_VENV": sys.prefix,
            MARK: mark(self.port),
            **env,
        }
        if constants:
            Path(folder, "sitecustomize.py").write_text(OTHER_CONSTANTS.format(constants))
            self.env["PYTHONPATH"] = f"{folder}:{ROOT}"
        self.env = {name: str(value) for name, value in self.env.items() if value is not None}
        self.wait, self.wrapper = wait, wrapper
        self.stopped = False

    def start(self):
        with open(self.logfile, "a") as log:
            # A shell that starts its work in the background has it ignore SIGINT, nohup has it
            # ignore SIGHUP, and what is ignored stays so.
            self.process = subprocess.Popen(
                ["env", "--default-signal=INT,HUP", *self.wrapper, "./start.sh"],
                cwd=ROOT,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        if self.wait:
            self.wait_healthy(60)

    def wait_healthy(self, timeout):
        def healthy():
            assert self.process.poll() is None, f"start.sh ended with {self.process.returncode}"
            return self.get("/health").status_code == 200

        wait_for(healthy, timeout, "/health 200")

    # Requests, each on a connection of its own. A post without options has no body and no
    # content type.

    def get(self, path, **options):
        return call("GET", self.url + path, **options)

    def post(self, path, **options):
        return call("POST", self.url + path, **options)

    def delete(self, path, **options):
        return call("DELETE", self.url + path, **options)

    def ollama(self, method, path, **options):
        """Send a request to Ollama's own port. What it computes may get little of the CPU."""
        return call(method, self.ollama_url + path, **{"timeout": 150, **options})

    # Models

    def add_model(self, name, gguf, config=None):
        add_model(self.models, name, gguf, config)

    def load(self, name, route="generate", **options):
        """Load a model, by "embed" one that cannot generate; return its runner."""
        body = {"model": name, "options": options, "stream": False}
        answer = self.ollama("POST", f"/api/{route}", json=body)
        assert answer.ok, answer.text
        shown = self.ollama("POST", "/api/show", json={"model": name}).json()["modelfile"]
        blob = shown.partition("\nFROM ")[2].split()[0]

        def runner():
            return next((each for each in self.runners() if blob in each.cmdline()), None)

        return wait_for(runner, 30, f"{name}'s runner")

    def generate(self, name, **options):
        """Return a long answer under way, once it flows."""
        return Generation(self.ollama_port, name, **options).flowing()

    # Processes and files

    def log(self):
        return self.logfile.read_text(errors="replace")

    def state_lines(self):
        """Return what the launcher recorded of each Ollama: [[pid, start time, restarts], …]."""
        lines = self.state_file.read_text().splitlines() if self.state_file.exists() else []
        return [[int(part) for part in line.split()] for line in lines]

    def processes(self):
        """Return all that it started."""
        return marked(mark(self.port))

    def ollama_pid(self):
        # The server may answer before the launcher has written who it is
        return wait_for(self.state_lines, 30, "the launcher's record")[-1][0]

    def runners(self):
        """Return its runners, also those of an Ollama that has died."""
        sessions = {line[0] for line in self.state_lines()}
        found = []
        for each in self._with("--model"):
            with contextlib.suppress(ProcessLookupError):  # it has ended just now
                if os.getsid(each.pid) in sessions:
                    found.append(each)
        return found

    def worker_pid(self):
        """Return the one gunicorn process that another one started; None while there is none."""
        gunicorns = {}
        for process in self._with("gunicorn"):
            with contextlib.suppress(psutil.Error):  # it has ended meanwhile
                gunicorns[process.pid] = process.ppid()
        return next((pid for pid, parent in gunicorns.items() if parent in gunicorns), None)

    def launcher(self):
        """Return all that start.sh is made of, without what it runs."""
        words = ("gunicorn", "serve", "llama-server")
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):  # it has ended just now
                if not any(word in part for part in process.cmdline() for word in words):
                    found.append(process)
        return found

    def _with(self, argument):
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if argument in process.cmdline():
                    found.append(process)
        return found

    def stop(self, sig=signal.SIGTERM):
        """End it, assert that nothing of it is left, and return the exit status.

        SIGINT goes to the whole process group, as a terminal's Ctrl-C does.
        """
        if not self.stopped:
            self.stopped = True
            for process in self.processes():
                with contextlib.suppress(psutil.Error):
                    process.resume()
            if self.process.poll() is None:
                (os.killpg if sig == signal.SIGINT else os.kill)(self.process.pid, sig)
            try:
                self.process.wait(20)
                # What was killed, or reads to its end, may be there for a moment more.
                with contextlib.suppress(AssertionError):
                    wait_for(lambda: not self.processes(), 5, "nothing is left")
            finally:
                left = self.processes()
                kill(left)
                self.process.wait()
                for file in self.state_file.parent.glob(f"{self.port}.*"):
                    file.unlink()
            ended = f"start.sh ended with {self.process.returncode}"
            assert not left, f"still there after {ended}: {left}"
        return self.process.returncode
