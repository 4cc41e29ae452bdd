#!/usr/bin/env python3
"""What the service costs over Ollama itself, side by side in one run.

    tests/bench.py [seconds for each measurement, default 3]

It prints tables, and asserts nothing. Requests come from `wrk` where it is installed, else from a
loop in this process, which itself takes a core.
"""

import contextlib
import functools
import http.client
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time

if "LLM_TEST_OLLAMA" not in os.environ:  # by hand: with the packages and the Ollama of the tests
    here = os.path.dirname(os.path.abspath(__file__))
    setup = [f"{here}/../start.sh", "--setup", f"{here}/requirements.txt"]
    said = subprocess.run(setup, stdout=subprocess.PIPE, text=True, check=True).stdout
    python, os.environ["LLM_TEST_OLLAMA"] = said.split()
    os.execv(python, [python, os.path.abspath(__file__), *sys.argv[1:]])

import psutil
import requests

from helpers.models import model_variant, real_model
from helpers.ollama_server import OllamaServer
from helpers.processes import servers
from helpers.registry import Registry
from helpers.service import Service
from helpers.waiting import wait_for

SECONDS = float(sys.argv[1]) if len(sys.argv) > 1 else 3


def row(*cells):
    first, *rest = cells
    print("  ".join([f"{first:<34}", *(f"{cell:>11}" for cell in rest)]), flush=True)


def title(text, *cells):
    print(f"\n{text}")
    row("", *cells)


def load(url, connections, seconds=SECONDS):
    """Return (requests per second, p50 ms, p99 ms)."""
    if wrk := shutil.which("wrk"):
        command = [wrk, "-t1", f"-c{connections}", f"-d{seconds:.0f}s", "--latency", url]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        unit = {"us": 1e-3, "ms": 1, "s": 1e3}
        found = re.findall(r"(?:50|99)%\s+([\d.]+)(us|ms|s)", said)
        p50, p99 = (float(number) * unit[name] for number, name in found)
        return float(re.search(r"Requests/sec:\s+([\d.]+)", said)[1]), p50, p99
    host, _, path = url.removeprefix("http://").partition("/")
    times, until = [], time.monotonic() + seconds

    def client():
        connection = http.client.HTTPConnection(host)
        while time.monotonic() < until:
            began = time.perf_counter()
            connection.request("GET", f"/{path}")
            connection.getresponse().read()
            times.append(time.perf_counter() - began)

    threads = [threading.Thread(target=client) for _ in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    times.sort()
    return len(times) / seconds, times[len(times) // 2] * 1e3, times[int(len(times) * 0.99)] * 1e3


def pss_mb(pids):
    return sum(psutil.Process(pid).memory_full_info().pss for pid in pids) / 2**20


def api_pids(service):
    worker = service.worker_pid()
    return [worker, psutil.Process(worker).ppid()]


def cpu_seconds(pids):
    return sum(sum(psutil.Process(pid).cpu_times()[:2]) for pid in pids)


def endpoints(service, note=""):
    columns = "1 conn.", "4 conn.", "32 conn.", "p50 at 1", "p99 at 4"
    title(f"Requests{note} (requests/s, p50 ms, p99 ms)", *columns)
    own, ours = ("/api/tags", "/api/version"), ("/api/models", "/health", "/api/stats", "/api/info")
    asked = [("Ollama", service.ollama_url, path) for path in own]
    asked += [("service", service.url, path) for path in ours]
    rates = {}
    for name, url, path in asked:
        found = [load(url + path, connections) for connections in (1, 4, 32)]
        rates[path] = found[1][0]
        numbers = [f"{rate:.0f}" for rate, _, _ in found]
        row(f"{name} {path}", *numbers, f"{found[0][1]:.2f}", f"{found[1][2]:.2f}")
    row("/api/models over /api/tags, 4 conn.", f"{rates['/api/models'] / rates['/api/tags']:.1%}")


def listing(make, gguf):
    title("The list as it grows (p50 ms at 1 connection)", "Ollama", "service")
    for count in (1, 100, 1000):
        with servers(make) as start:
            service = start(models={f"m{n}": gguf for n in range(count)})
            urls = service.ollama_url + "/api/tags", service.url + "/api/models"
            row(f"{count} models", *(f"{load(url, 1)[1]:.2f}" for url in urls))


def pull_lines(url, name):
    with requests.post(url, json={"model": name, "insecure": True}, stream=True) as answer:
        return json.loads(list(answer.iter_lines())[-1])


def pulling(make):
    title("A pull of 300 MB, five times in turn", "Ollama", "service", "ratio")
    with Registry() as registry, servers(make) as start:
        service = start()
        pids = api_pids(service)
        relay = service.url + "/api/models/pull"
        pull_lines(relay, registry.add_random("ns/warm:latest", 5, seed=99))
        before, cpu = pss_mb(pids), cpu_seconds(pids)
        times = {service.ollama_url + "/api/pull": [], relay: []}
        for n in range(5):
            for m, url in enumerate(times):
                name = registry.add_random(f"ns/{n}-{m}:latest", 300, seed=1000 + n * 2 + m)
                began = time.perf_counter()
                last = pull_lines(url, name)
                assert last["status"] == "success", last
                times[url].append(time.perf_counter() - began)
                requests.delete(service.ollama_url + "/api/delete", json={"model": name})
        own, relayed = (statistics.median(seconds) for seconds in times.values())
        ratio = statistics.median(b / a for a, b in zip(*times.values(), strict=True))
        row("median seconds", f"{own:.2f}", f"{relayed:.2f}", f"{ratio:.2f}")
        row("API's CPU seconds per GB", "", f"{(cpu_seconds(pids) - cpu) / 1.5:.2f}")
        row("API's memory growth, MB (PSS)", "", f"{pss_mb(pids) - before:.1f}")


def starting(make, gguf, binary):
    title("Start, warm, to the first 200 (median of 5, s)", "ollama", "service", "more")
    alone, whole = [], []
    for _ in range(5):
        with servers(functools.partial(OllamaServer, binary=binary)) as start:
            began = time.perf_counter()
            start()
            alone.append(time.perf_counter() - began)
        with servers(make) as start:
            began = time.perf_counter()
            start(models={"m": gguf})
            whole.append(time.perf_counter() - began)
    own, ours = statistics.median(alone), statistics.median(whole)
    row("", f"{own:.2f}", f"{ours:.2f}", f"{ours - own:.2f}")


def footprint(service):
    title("Footprint of the API's two processes", "PSS MB", "threads", "CPU %")
    pids = api_pids(service)

    def show(what, seconds=5):
        before, began = cpu_seconds(pids), time.monotonic()
        time.sleep(seconds)
        percent = (cpu_seconds(pids) - before) / (time.monotonic() - began) * 100
        row(what, f"{pss_mb(pids):.0f}", psutil.Process(pids[0]).num_threads(), f"{percent:.2f}")

    show("idle", 20)
    sent = 0
    while sent < 10_000:
        sent += load(service.url + "/api/models", 8)[0] * SECONDS
    show(f"idle after {sent:.0f} requests", 20)
    with Registry() as registry, contextlib.ExitStack() as stack:
        registry.rate = 20e6
        name = registry.add_random("ns/eight:latest", 300)
        for _ in range(8):
            body = {"model": name, "insecure": True}
            posted = requests.post(service.url + "/api/models/pull", stream=True, json=body)
            answer = stack.enter_context(posted)
            threading.Thread(target=list, args=(answer.iter_lines(),), daemon=True).start()
        show("with 8 streams", 5)
        requests.delete(service.url + "/api/models/pull", json={"model": name, "purge": True})


def listeners(make):
    title("Listeners of one download (API's CPU %)", "CPU %")
    with Registry() as registry, servers(make) as start:
        service = start()
        pids = api_pids(service)
        for count in (1, 30):
            registry.rate = 20e6
            name = registry.add_random(f"ns/l{count}:latest", 300, seed=count)
            asked = (service.url + "/api/models/pull", name)
            threads = [
                threading.Thread(target=pull_lines, args=asked, daemon=True) for _ in range(count)
            ]
            for thread in threads:
                thread.start()
            time.sleep(2)
            before = cpu_seconds(pids)
            time.sleep(5)
            row(f"{count}", f"{(cpu_seconds(pids) - before) / 5 * 100:.1f}")
            registry.rate = None
            for thread in threads:
                thread.join(30)


def busy_health(make):
    title("With all download slots busy (ms)", "p50", "p99")
    with Registry() as registry, servers(make) as start:
        service = start()

        urls = {
            "service /health": service.url + "/health",
            "Ollama /api/version": service.ollama_url + "/api/version",
        }

        def both(when):
            for name, url in urls.items():
                row(f"{name}, {when}", *(f"{ms:.2f}" for ms in load(url, 1, 3 * SECONDS)[1:]))

        both("idle")
        registry.rate = 8e6
        for n in range(4):
            model = registry.add_random(f"ns/b{n}:latest", 200 * SECONDS, seed=n)
            body = {"model": model, "insecure": True, "detach": True}
            service.post("/api/models/pull", json=body)
        wait_for(lambda: registry.active >= 4, 10, "four transfers")
        # The registry's stand-in and Ollama share the machine: the faster, the less is left.
        for mb in (2, 20):
            registry.rate = 4 * mb * 1e6
            both(f"4 of {mb} MB/s")
            assert registry.active >= 4, "the downloads ended too early"


def clearing(make):
    title("Clear, from the call to the answer (median of 5, ms)", "ms")
    with servers(make) as start:
        models = {f"m{n}": model_variant(n) for n in (1, 2, 3)}
        service = start(models=models, OLLAMA_MAX_LOADED_MODELS=3, OLLAMA_CONTEXT_LENGTH=1024)
        for count in (1, 3):
            times = []
            for _ in range(5):
                for n in range(1, count + 1):
                    service.load(f"m{n}")
                began = time.perf_counter()
                answer = service.post("/api/cache/clear").json()
                times.append((time.perf_counter() - began) * 1e3)
                assert answer["verified"] and len(answer["unloaded_models"]) == count, answer
            row(f"{count} loaded", f"{statistics.median(times):.0f}")


def main():
    binary, gguf = os.environ["LLM_TEST_OLLAMA"], real_model()
    make = functools.partial(Service, binary=binary)
    tool = "wrk" if shutil.which("wrk") else "own loop"
    date = time.strftime("%Y-%m-%d")
    print(f"{date}, {psutil.cpu_count()} cores, {tool}, {SECONDS:.0f} s each")
    with servers(make) as start:
        service = start(models={"gemma": gguf})
        endpoints(service)
        service.load("gemma")
        endpoints(service, ", one model loaded")
        service.post("/api/cache/clear")
        footprint(service)
    listing(make, gguf)
    pulling(make)
    listeners(make)
    busy_health(make)
    starting(make, gguf, binary)
    clearing(make)


if __name__ == "__main__":
    main()
