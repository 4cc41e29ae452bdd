#!/usr/bin/env python3
"""What the service costs beside Ollama itself, side by side in one run.

    tests/bench.py                  all sections, in twelve minutes
    tests/bench.py rates growth     these sections

It prints the README's table, and asserts nothing. What is compared is measured in turn, in
several rounds of which the median counts, as other work may run on the machine. A request comes
from a loop in this process, which takes a core of its own.
"""

import contextlib
import datetime
import functools
import importlib
import json
import os
import select
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from pathlib import Path

if "LLM_TEST_OLLAMA" not in os.environ:  # by hand: with the packages and the Ollama of the tests
    here = os.path.dirname(os.path.abspath(__file__))
    setup = [f"{here}/../start.sh", "--setup", f"{here}/requirements.txt"]
    said = subprocess.run(setup, stdout=subprocess.PIPE, text=True, check=True).stdout
    python, os.environ["LLM_TEST_OLLAMA"] = said.split()
    os.environ["PYTHONPATH"] = f"{here}/.."  # the helpers import from the service
    os.execv(python, [python, os.path.abspath(__file__), *sys.argv[1:]])

import psutil
import requests

from helpers.browser import start_browser
from helpers.generation import ENDLESS, PROMPT
from helpers.line_server import LineServer
from helpers.listener import PULL, pull_of
from helpers.models import blob_path, model_variant, real_model
from helpers.ollama_server import OllamaServer
from helpers.places import ROOT
from helpers.processes import servers
from helpers.proxies import KINDS, NAME, PATH, Proxy, stream_of
from helpers.registry import Registry
from helpers.service import Service
from helpers.strangers import program
from helpers.waiting import wait_for

OLLAMA = os.environ["LLM_TEST_OLLAMA"]
make = functools.partial(Service, binary=OLLAMA)

# ---------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------


def row(*cells):
    print(f"| {' | '.join(cells)} |", flush=True)


def machine():
    with open("/proc/cpuinfo") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return f"{psutil.cpu_count()} cores{f' of {names[0]}' if names else ''}"


# ---------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------


def load(url, connections=1, seconds=1.0):
    """Ask on kept connections, one request after the other on each; return the milliseconds."""
    parts = urllib.parse.urlsplit(url)
    request = f"GET {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\n\r\n".encode()
    times, poll, began, until = [], select.poll(), {}, time.perf_counter() + seconds
    with contextlib.ExitStack() as stack:
        clients = {}
        for _ in range(connections):
            client = stack.enter_context(socket.create_connection((parts.hostname, parts.port)))
            clients[client.fileno()] = client
            poll.register(client, select.POLLIN)
            began[client.fileno()] = time.perf_counter()
            client.sendall(request)
        while time.perf_counter() < until:
            for number, _ in poll.poll(100):
                read_answer(clients[number])
                now = time.perf_counter()
                times.append((now - began[number]) * 1e3)
                began[number] = now
                clients[number].sendall(request)
    return times


def read_answer(client):
    """Read one answer to its end."""
    answer = bytearray()
    while True:
        piece = client.recv(1 << 18)
        assert piece, f"the connection ended after {bytes(answer)!r}"
        answer += piece
        head = answer.find(b"\r\n\r\n")
        if head < 0:
            continue
        fields = answer[:head].lower()
        _, found, length = fields.partition(b"content-length:")
        if found and len(answer) >= head + 4 + int(length.partition(b"\r")[0]):
            break
        if not found and answer.endswith(b"\r\n0\r\n\r\n"):  # chunked
            break
    assert answer.startswith(b"HTTP/1.1 200"), bytes(answer)


def shares(values, base):
    """Return the median ratio of values measured in turn."""
    return statistics.median(a / b for a, b in zip(values, base, strict=True))


def api_pids(service):
    worker = service.worker_pid()
    return [worker, psutil.Process(worker).ppid()]


def pss_mb(pids):
    return sum(psutil.Process(pid).memory_full_info().pss for pid in pids) / 2**20


def cpu_s(pids):
    """Return the CPU time of these processes, by their own clocks."""
    return sum(time.clock_gettime(~pid << 3 | 2) for pid in pids)


def cpu_percent(pids, seconds):
    """Return what these processes use of a core."""
    before, began = cpu_s(pids), time.monotonic()
    time.sleep(seconds)
    return (cpu_s(pids) - before) / (time.monotonic() - began) * 100


def pull(url, name, **options):
    """Pull a model; return the seconds that it took."""
    began = time.perf_counter()
    body = {"model": name, "insecure": True, **options}
    with requests.post(url, json=body, stream=True) as answer:
        last = json.loads(list(answer.iter_lines())[-1])
    assert last.get("status") == "success", last
    return time.perf_counter() - began


# ---------------------------------------------------------------------------------------
# Sections
# ---------------------------------------------------------------------------------------


def bench_rates():
    """Requests a second at four connections, with one model loaded."""
    paths = "/livez /api/models /api/models/loaded /health /api/stats /metrics".split()
    with servers(make) as start:
        service = start(models={"gemma": real_model()})
        service.load("gemma", num_ctx=1024)
        pids, base = api_pids(service), service.url + "/api/info"

        def measure(url):
            before = cpu_s(pids)
            count = len(load(url, 4, 0.4))
            return count / 0.4, (cpu_s(pids) - before) / count * 1e3

        urls = [base, *(service.url + path for path in paths), service.ollama_url + "/api/tags"]
        found = {url: [] for url in urls}
        for _ in range(9):
            for url in urls:  # each beside the base, as the machine's speed changes
                found[url].append((*measure(base), *measure(url)))
        for url, values in found.items():
            base_rates, base_ms, own_rates, own_ms = zip(*values, strict=True)
            share = f"{shares(own_rates, base_rates):.0%} of `/api/info`"
            if url.startswith(service.url):
                share += f"; {shares(base_ms, own_ms):.0%} by the API's CPU time"
            whose = "" if url.startswith(service.url) else "Ollama's "
            path = urllib.parse.urlsplit(url).path
            row(f"{whose}`{path}`", f"{statistics.median(own_rates):,.0f}/s", share)


def bench_growth():
    """The answers as the store grows, and the watch."""
    for count in (1, 100, 1000):
        with servers(make) as start:
            service = start(models={f"m{n}": real_model() for n in range(count)})
            time.sleep(4)  # a store that has just changed is not known for certain
            own = statistics.median(load(service.ollama_url + "/api/tags"))
            asked = ("/api/models", "/api/stats", "/health")
            found = [statistics.median(load(service.url + path)) for path in asked]
            figures = ", ".join(
                f"`{path}` {ms:.1f} ms" for path, ms in zip(asked, found, strict=True)
            )
            row(f"{count} models", figures, f"{found[0] / own:.2f} × Ollama's {own:.1f} ms")
            row(f"{count} models: idle", f"{cpu_percent(api_pids(service), 8):.2f} % CPU", "")


def bench_listeners():
    """Listeners of one download."""
    with Registry() as registry, servers(make) as start:
        service = start()
        registry.rate = 40e6
        for count in (1, 30):
            name = registry.add_random(f"ns/l{count}:latest", 600)
            asked = (service.url + "/api/models/pull", name)
            threads = [threading.Thread(target=pull, args=asked) for _ in range(count)]
            for thread in threads:
                thread.start()
            time.sleep(2)
            before = registry.bytes_sent()
            percent = cpu_percent(api_pids(service), 5)
            speed = (registry.bytes_sent() - before) / 5 / 1e6
            row(f"{count} listeners of a pull", f"{percent:.1f} % CPU", f"at {speed:.0f} MB/s")
            registry.rate = None
            for thread in threads:
                thread.join()
            registry.rate = 40e6


def bench_processes():
    """Strangers' processes on the machine."""
    with servers(make) as start:
        service = start(models={"gemma": real_model()})
        service.load("gemma", num_ctx=1024)
        pids = api_pids(service)
        for count in (20, 2000):
            words = f"for n in $(seq {count}); do sleep 600 & done; echo started; wait"
            command = ["sh", "-c", words]
            with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as shell:
                try:
                    shell.stdout.readline()
                    time.sleep(2)
                    asked = ("/api/stats", "/health")
                    found = [statistics.median(load(service.url + path)) for path in asked]
                    figures = ", ".join(
                        f"`{path}` {ms:.1f} ms" for path, ms in zip(asked, found, strict=True)
                    )
                    percent = cpu_percent(pids, 10)
                finally:
                    os.killpg(shell.pid, signal.SIGKILL)
            row(f"{count} more processes", figures, f"idle {percent:.2f} % CPU")


def bench_page():
    """One open tab of the page, with 35 models, while nothing happens."""
    if not shutil.which("chromedriver"):
        row("one tab of the page", "no chromedriver", "")
        return
    sent = """return performance.getEntriesByType("resource")
        .reduce((sum, { transferSize }) => sum + transferSize, 0)"""
    models = {f"m{n}": real_model() for n in range(35)}
    with servers(make) as start, tempfile.TemporaryDirectory() as folder:
        service = start(models=models)
        pids = api_pids(service)
        browser = start_browser(folder)
        try:
            idle, polled = [], []
            for _ in range(3):
                browser.get("about:blank")
                idle.append(cpu_percent(pids, 15))
                browser.get(service.url + "/")
                time.sleep(5)
                before = browser.execute_script(sent)
                polled.append(cpu_percent(pids, 30))
                kilobytes = (browser.execute_script(sent) - before) / 1000
        finally:
            browser.quit()
    percent = statistics.median(polled) - statistics.median(idle)
    row("one tab of the page", f"{percent:.2f} % CPU", f"{kilobytes:.0f} kB in 30 s")


CALLERS = """
import socket, sys
callers = [socket.create_connection(("127.0.0.1", int(sys.argv[1]))) for _ in range(200)]
for caller in callers:
    caller.sendall(b"POST /api/generate HTTP/1.1\\r\\n")
print(flush=True)
sys.stdin.read()
"""


def bench_callers():
    """A look at who waits, and what it costs when idle."""

    def look_ms(count=200):
        before = time.thread_time()
        for n in range(count):
            callers.look(n, service.ollama_pid(), tasks=0)
        return (time.thread_time() - before) / count * 1e3

    sys.path.append(str(ROOT))
    of_callers = importlib.import_module("llm_service.callers").Callers
    with servers(make) as start:
        service = start()
        callers = of_callers(service.ollama_port, stuck_s=120, works=lambda: False)
        none_ms = look_ms()
        idle = cpu_percent(api_pids(service), 20)
        with program(CALLERS, service.ollama_port):
            said = f"{idle:.2f} % CPU when idle, {cpu_percent(api_pids(service), 20):.2f} % beside"
            row("a look at 0 and 200 callers", f"{none_ms:.2f} and {look_ms():.2f} ms CPU", said)


# As start.sh passed on what Ollama prints in version 1.1, to compare with.
LINE_BY_LINE = r"""
said=''
while IFS= read -r line; do
    printf '%s\n' "$line" >&2
    [[ $said == @(Error|panic|fatal error):\ * ]] || said=$line
    [[ $line != time=*\ level=[DIW]* ]] || said=''
done
"""
SHORT_PATH = "/api/generate"
SHORT = {"model": "gemma", "prompt": "1 2", "raw": True, "stream": False}
SHORT["options"] = {"num_predict": 1, "temperature": 0, "num_ctx": 1024}


def bench_log():
    """What it costs to pass on what Ollama prints, and what callers of 11434 notice of it."""
    bare = functools.partial(OllamaServer, binary=OLLAMA)
    with servers(make) as start, servers(bare) as start_bare:
        service, alone = start(models={"gemma": real_model()}), start_bare()
        alone.add_model("gemma", real_model())
        rates = {url: [] for url in (alone.url, service.ollama_url)}
        with requests.Session() as session:
            for n in range(61):
                for url in list(rates)[:: -1 if n % 2 else 1]:  # each as often the first
                    rates[url].append(request_rate(session, url + SHORT_PATH))
        lines = [f"{line}\n".encode() for line in alone.log().splitlines()[-24:]]
    own, passed = (values[1:] for values in rates.values())  # the first ones load the model
    said = f"{shares(passed, own):.3f} × of a bare `ollama serve` that logs to a file"
    row("short requests through 11434", f"{statistics.median(passed):.0f}/s", said)

    program = [sys.executable, "-IS", f"{ROOT}/llm_service/messages.py"]
    with tempfile.TemporaryDirectory() as folder:
        commands = {"bash": ["bash", "-c", LINE_BY_LINE], "ours": [*program, f"{folder}/state"]}
        used = {name: [] for name in commands}
        for _ in range(9):
            for name, command in commands.items():
                used[name].append(line_cpu_us(command, lines, f"{folder}/log"))
    said = f"{shares(used['ours'], used['bash']):.3f} × of {statistics.median(used['bash']):.0f} µs"
    row("a line that Ollama prints", f"{statistics.median(used['ours']):.1f} µs of CPU", said)


def request_rate(session, url):
    """Return the requests a second of one caller, over half a second."""
    count, began = 0, time.perf_counter()
    while time.perf_counter() < began + 0.5:
        session.post(url, json=SHORT).raise_for_status()
        count += 1
    return count / (time.perf_counter() - began)


def line_cpu_us(command, lines, file):
    """Return the CPU time a line of a program that passes on those of 84 requests a second."""
    with open(file, "wb") as log:
        pipe = subprocess.PIPE
        reader = subprocess.Popen(command, stdin=pipe, stdout=log, stderr=log, bufsize=0)
    with reader:
        time.sleep(0.5)
        before = cpu_s([reader.pid])
        for _ in range(150):
            for line in lines:
                reader.stdin.write(line)
            time.sleep(1 / 84)
        count = 150 * len(lines)
        wait_for(lambda: Path(file).read_bytes().count(b"\n") == count, 30, "all lines")
        used = cpu_s([reader.pid]) - before
        reader.stdin.close()
    return used / count * 1e6


def bench_proxies():
    """What proxies add to streamed tokens and lines, and how late they tell of a leaver."""
    with contextlib.ExitStack() as stack:
        start = stack.enter_context(servers(make))
        registry = stack.enter_context(Registry())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        service = start(models={"gemma": real_model()}, LLM_ALLOWED_HOSTS=NAME)
        service.load("gemma", num_ctx=1024)
        for kind in (None, *KINDS):
            if kind and not shutil.which(kind, path=PATH):
                row(kind, "not there", "")
                continue
            through = functools.partial(stream, kind, folder)
            row(f"a line, {kind or 'no proxy'}", *late_lines(through))
            row("a token", *late_tokens(through, service))
            row("a pull whose listener has left", pull_ends(through, service, registry), "")


@contextlib.contextmanager
def stream(kind, folder, port, method, path, body=None):
    """Give a streamed answer that comes through a proxy; None is none."""
    with contextlib.ExitStack() as stack:
        if kind:
            # Ollama on a loopback address answers to no name.
            proxy = Proxy(kind, folder, port, rewrites_host=path == SHORT_PATH)
            stack.callback(proxy.close)
            yield stack.enter_context(proxy.stream(method, path, body))
        else:
            yield stack.enter_context(stream_of(port, method, path, body, {}))


def told(late, left_s):
    """Return two cells."""
    *most, last = sorted(seconds * 1e3 for seconds in late)
    of_200 = f"; 95 % below {most[len(most) * 95 // 100]:.1f}, the latest {last:.0f} ms"
    said = f"{statistics.median(late) * 1e3:.1f} ms late"
    return said + of_200, f"a leaver is noticed after {left_s:.2f} s"


def late_lines(through):
    """Tell how late 200 lines come that are sent 20 ms apart, each with its time."""
    late, upstream = [], LineServer()

    def send():
        while not upstream.left.wait(0.02):
            upstream.send(f"{time.monotonic()}\n".encode())

    upstream.send(b"a proxy may hold the head back until then\n")
    with contextlib.closing(upstream):
        with through(upstream.port, "GET", "/lines") as answer:
            answer.readline()
            threading.Thread(target=send, daemon=True).start()
            while len(late) < 200:
                sent = float(answer.readline())
                late.append(time.monotonic() - sent)
            began = time.monotonic()
        upstream.left.wait(60)
    return told(late, time.monotonic() - began)


def late_tokens(through, service):
    """Tell how late 200 tokens come, by when Ollama says that it has made them."""
    late, asked = [], service.log().count(SHORT_PATH)
    body = {**SHORT, "prompt": PROMPT, "stream": True, "options": {**ENDLESS, "num_ctx": 1024}}
    with through(service.ollama_port, "POST", SHORT_PATH, body) as answer:
        while len(late) < 200:
            made = json.loads(answer.readline())["created_at"]
            late.append(time.time() - datetime.datetime.fromisoformat(made).timestamp())
        began = time.monotonic()
    wait_for(lambda: service.log().count(SHORT_PATH) > asked, 60, "Ollama's line on the request")
    return told(late, time.monotonic() - began)


def pull_ends(through, service, registry):
    """Return after how many seconds a download ends whose listener has left the proxy."""
    registry.rate = 8e6
    name = registry.add_random(f"ns/{registry.bytes_sent()}:latest", 200)
    with through(service.port, "POST", PULL, {"model": name, "insecure": True}) as answer:
        wait_for(lambda: b'"completed_bytes": 0' not in answer.readline(), 60, "a byte")
        began = time.monotonic()
    wait_for(lambda: pull_of(service, name)["state"] != "running", 60, "the end of the pull")
    return f"ends after {time.monotonic() - began:.1f} s"


def bench_start():
    """The start, warm."""

    def first(url):
        while True:
            with contextlib.suppress(requests.RequestException):
                if requests.get(url, timeout=1).ok:
                    return time.perf_counter()
            time.sleep(0.005)

    alone, own, whole = [], [], []
    for _ in range(5):
        with servers(functools.partial(OllamaServer, binary=OLLAMA)) as start:
            began = time.perf_counter()
            first(start().url + "/api/version")
            alone.append(time.perf_counter() - began)
        with servers(functools.partial(make, wait=False)) as start:
            began = time.perf_counter()
            service = start(models={"gemma": real_model()})
            own.append(first(service.ollama_url + "/api/version") - began)
            whole.append(first(service.url + "/health") - began)
    after = statistics.median(b - a for a, b in zip(own, whole, strict=True))
    row(
        "start to the first 200 of `/health`",
        f"{statistics.median(whole):.2f} s",
        f"{after:.2f} s after Ollama's first answer; `ollama serve` alone "
        f"{statistics.median(alone):.2f} s",
    )


def bench_footprint():
    """Memory after requests, and the CPU when idle, with two models loaded."""
    with servers(make) as start:
        models = {f"m{n}": model_variant(n) for n in (1, 2)}
        service = start(models=models, OLLAMA_MAX_LOADED_MODELS=2)
        for name in models:
            service.load(name, num_ctx=1024)
        for path in ("/api/models", "/health", "/api/stats", "/metrics"):
            load(service.url + path, 32, 2)
        time.sleep(3)
        pids = api_pids(service)
        row("memory of the API's two processes", f"{pss_mb(pids):.0f} MB", "PSS, after load")
        percent = cpu_percent(pids, 60)
        row("CPU when idle", f"{percent:.2f} %", "of a core, two models loaded, over 60 s")


def bench_pull():
    """A pull of 1 GB beside Ollama's own, in turn."""
    with Registry() as registry, servers(make) as start:
        service = start()
        times = {service.ollama_url + "/api/pull": [], service.url + "/api/models/pull": []}
        name = registry.add_random("ns/big:latest", 1000)
        pids, used = api_pids(service), []
        for n in range(8):
            for url in list(times)[:: -1 if n % 2 else 1]:  # each as often the first
                before = cpu_s(pids)
                times[url].append(pull(url, name))
                used.append(cpu_s(pids) - before)
                requests.delete(service.ollama_url + "/api/delete", json={"model": name})
        own, ours = times.values()
        ratio = shares(ours, own)
        said = f"{ratio:.2f} × Ollama's {statistics.median(own):.1f} s; "
        said += f"fastest by fastest {min(ours) / min(own):.2f}; API's CPU time {max(used):.2f} s"
        row("a pull of 1 GB", f"{statistics.median(ours):.1f} s", said)


def bench_verify():
    """A verify, of one file and of several, beside that of a pull and `sha256sum`, in turn."""
    with Registry() as registry, servers(make) as start:
        service = start()
        names = [registry.add_random(f"ns/{n}:latest", 500, shares=(1,)) for n in range(4)]
        big = registry.add_random("ns/big:latest", 2000, shares=(1,))
        for group in ([big], names):
            for name in group:
                pull(service.url + "/api/models/pull", name)
            compare_verifies(service, registry, group)
            for name in group:
                requests.delete(service.ollama_url + "/api/delete", json={"model": name})


def compare_verifies(service, registry, names):
    """Print MB/s of 2 GB in the cache, that all of these read as often."""
    url = service.url + "/api/models"
    files = [blob_path(service.models, registry.layers(name)[0]["digest"]) for name in names]
    ways = {
        "`sha256sum`": lambda: subprocess.run(["sha256sum", *files], stdout=subprocess.DEVNULL),
        "pull": lambda: [pull(url + "/pull", name) for name in names],
        "pull with `verify`": lambda: [pull(url + "/pull", name, verify=True) for name in names],
        "verify": lambda: requests.post(url + "/verify", json={"stream": False}),
    }
    times = {way: [] for way in ways}
    for _ in range(5):
        for way, work in ways.items():
            # A verify has taken them out of the cache.
            subprocess.run(["cat", *files], stdout=subprocess.DEVNULL, check=True)
            began = time.perf_counter()
            work()
            times[way].append(time.perf_counter() - began)
    downloads = times.pop("pull")
    times["pull with `verify`"] = [
        both - alone for both, alone in zip(times["pull with `verify`"], downloads, strict=True)
    ]
    *_, ours = times.values()
    rates = {way: 2000 / statistics.median(seconds) for way, seconds in times.items()}
    said = ", ".join(
        f"{rate:,.0f} MB/s by {way} ({shares(times[way], ours):.1f} × that)"
        for way, rate in list(rates.items())[:-1]
    )
    row(f"verify of 2 GB, files: {len(files)}", f"{rates['verify']:,.0f} MB/s", said)


SECTIONS = {
    name.removeprefix("bench_"): section
    for name, section in list(globals().items())
    if name.startswith("bench_")
}


def main():
    names = sys.argv[1:] or list(SECTIONS)
    if unknown := set(names) - set(SECTIONS):
        sys.exit(f"no section {', '.join(unknown)}: there are {', '.join(SECTIONS)}")
    print(f"{time.strftime('%Y-%m-%d')}, {machine()}\n")
    row("what", "figure", "beside")
    row("---", "---", "---")
    for name in names:
        SECTIONS[name]()


if __name__ == "__main__":
    main()
