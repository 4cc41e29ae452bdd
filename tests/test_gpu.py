"""gpu.py, on a stand-in for NVIDIA's library where there is no GPU that could show these states.

The stand-in is a real shared library: what it answers stands in a file, read anew at each call.
"""
import concurrent.futures
import contextlib
import ctypes
import json
import os
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

import gpu
from conftest import ROOT, wait_for

NVML = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static long say(const char *what, long otherwise) {
    char word[64]; long value, found = otherwise;
    FILE *file = fopen(getenv("NVML_ANSWERS"), "r");
    while (file && fscanf(file, "%63s %ld", word, &value) == 2) if (!strcmp(word, what)) found = value;
    if (file) fclose(file);
    return found;
}
static int code(const char *call) {
    while (say(call, 0) == -1) usleep(10000);  /* -1: does not return until the file says otherwise */
    return say(call, 0);
}
int nvmlInitWithFlags(unsigned flags) { return code("init"); }
int nvmlShutdown(void) { return code("shutdown"); }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = say("gpus", 1); return code("count"); }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
    *handle = (void *)(long)(index + 1); return code("handle");
}
int nvmlDeviceGetName(void *handle, char *name, unsigned size) { strcpy(name, "Stand-in"); return code("name"); }
int nvmlDeviceGetUUID(void *handle, char *uuid, unsigned size) {
    sprintf(uuid, "GPU-%ld", (long)handle - 1); return code("uuid");
}
int nvmlDeviceGetTemperature(void *handle, int sensor, unsigned *celsius) {
    *celsius = say("celsius", 54); return code("temperature");
}
int nvmlDeviceGetPowerUsage(void *handle, unsigned *mw) { *mw = 70250; return code("power"); }
int nvmlDeviceGetUtilizationRates(void *handle, unsigned *rates) {
    rates[0] = say("percent", 37); rates[1] = 0; return code("utilization");
}
int nvmlDeviceGetMemoryInfo(void *handle, unsigned long long *memory) {
    memory[0] = 65536ull << 20; memory[2] = (say("used", 5120) + 615ull) << 20; return code("memory_v1");
}
#ifndef OLD
int nvmlDeviceGetMemoryInfo_v2(void *handle, void *info) {
    unsigned long long *memory = (unsigned long long *)info + 1;  /* after the version */
    memory[0] = 65536ull << 20; memory[1] = 615ull << 20; memory[3] = (unsigned long long)say("used", 5120) << 20;
    return code("memory");
}
#endif
"""
SAMPLER = """
import json, sys, threading, time
import gpu
for line in sys.stdin:
    began = time.monotonic()
    reading = gpu.sample()
    print(json.dumps([reading, time.monotonic() - began, threading.active_count()]), flush=True)
"""
NOT_SUPPORTED, NO_PERMISSION, DRIVER_NOT_LOADED, LIBRARY_NOT_FOUND = 3, 4, 9, 12
FUNCTION_NOT_FOUND, GPU_IS_LOST, RM_VERSION_MISMATCH, VERSION_MISMATCH, UNKNOWN = 13, 15, 18, 25, 999
HANG = -1


class Nvml:
    """The library in a folder of its own, and a process that samples it on demand."""

    def __init__(self, folder, *flags):
        self.answers, source = folder / "answers", folder / "nvml.c"
        source.write_text(NVML)
        subprocess.run(["cc", "-shared", "-fPIC", "-w", *flags, "-o", folder / "libnvidia-ml.so.1", source], check=True)
        self.env = {"LD_LIBRARY_PATH": str(folder), "NVML_ANSWERS": str(self.answers)}
        self.say()
        self._sampler = subprocess.Popen([sys.executable, "-c", SAMPLER], cwd=ROOT, env={**os.environ, **self.env},
                                         text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def say(self, **answers):
        new = self.answers.with_suffix(".new")
        new.write_text("".join(f"{name} {value}\n" for name, value in answers.items()))
        new.rename(self.answers)

    def sample(self, **answers):
        self.say(**answers)
        return self.sample_again()

    def sample_again(self):
        print("sample", file=self._sampler.stdin, flush=True)
        reading, seconds, threads = json.loads(self._sampler.stdout.readline())
        return SimpleNamespace(**reading, seconds=seconds, threads=threads)

    def close(self):
        self._sampler.kill()
        self._sampler.communicate()


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


def test_every_figure_of_every_gpu_is_told(nvml):
    seen = nvml.sample(gpus=2)
    figures = {"name": "Stand-in", "utilization_percent": 37, "memory_used_mb": 5120, "memory_total_mb": 65536,
               "temperature_c": 54, "power_w": 70.2}
    assert seen.state == "ok"
    assert seen.gpus == [{"index": 0, "uuid": "GPU-0", **figures}, {"index": 1, "uuid": "GPU-1", **figures}]
    assert gpu.memory_mb({"gpus": seen.gpus}) == (10240, 131072)


def test_zero_is_a_figure(nvml):
    assert nvml.sample(percent=0, celsius=0, used=0).gpus[0] == {
        "index": 0, "name": "Stand-in", "uuid": "GPU-0", "utilization_percent": 0, "memory_used_mb": 0,
        "memory_total_mb": 65536, "temperature_c": 0, "power_w": 70.2}


@pytest.mark.parametrize("call", ["init", "count", "handle"])
@pytest.mark.parametrize("code, state", [
    (DRIVER_NOT_LOADED, "none"), (LIBRARY_NOT_FOUND, "none"), (RM_VERSION_MISMATCH, "driver_mismatch"),
    (GPU_IS_LOST, "lost"), (UNKNOWN, "lost"), (NO_PERMISSION, "no_permission")])
def test_an_error_is_its_state_and_passes_with_its_cause(nvml, call, code, state):
    seen = nvml.sample(**{call: code})
    assert (seen.state, seen.gpus) == (state, [])
    seen = nvml.sample()
    assert (seen.state, len(seen.gpus)) == ("ok", 1)


def test_a_gpu_that_falls_off_the_bus_later_is_lost_and_found_again(nvml):
    assert nvml.sample().state == "ok"
    for call in ("memory", "utilization", "temperature", "name"):
        assert nvml.sample(**{call: GPU_IS_LOST}).state == "lost"
    assert nvml.sample(memory=GPU_IS_LOST, shutdown=UNKNOWN).state == "lost"
    assert nvml.sample().state == "ok"


def test_no_gpu_in_the_machine_is_none(nvml):
    seen = nvml.sample(gpus=0)
    assert (seen.state, seen.gpus) == ("none", [])


def run(code, **env):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **env}, capture_output=True,
                          text=True, timeout=30, check=True).stdout.strip()


def test_no_library_is_none(tmp_path):
    with contextlib.suppress(OSError):
        ctypes.CDLL("libnvidia-ml.so.1")
        pytest.skip("this machine has NVIDIA's library")
    assert run("import gpu; print(gpu.sample())", LD_LIBRARY_PATH=str(tmp_path)) == "{'state': 'none', 'gpus': []}"


def test_a_file_that_is_no_library_is_none(tmp_path):
    (tmp_path / "libnvidia-ml.so.1").write_bytes(b"")
    assert run("import gpu; print(gpu.sample()['state'])", LD_LIBRARY_PATH=str(tmp_path)) == "none"


def test_memory_that_is_the_systems_is_unified_and_the_rest_is_told(nvml):
    seen = nvml.sample(memory=NOT_SUPPORTED)
    assert seen.state == "unified"
    assert seen.gpus[0] | {"name": None, "uuid": None} == {
        "index": 0, "name": None, "uuid": None, "utilization_percent": 37, "memory_used_mb": None,
        "memory_total_mb": None, "temperature_c": 54, "power_w": 70.2}
    assert gpu.memory_mb({"gpus": seen.gpus}) == (None, None)


def test_an_old_jetson_without_the_library_is_unified(monkeypatch, tmp_path):
    (tmp_path / "compatible").write_text("nvidia,p3737-0000\0nvidia,tegra234\0")
    monkeypatch.setattr(gpu.pathlib, "Path", lambda path: tmp_path / os.path.basename(path))
    assert gpu._state(gpu.pynvml.NVMLError_LibraryNotFound()) == "unified"


def test_a_mig_slice_without_permission_says_so(nvml):
    seen = nvml.sample(memory=NO_PERMISSION, utilization=NOT_SUPPORTED)
    assert seen.state == "no_permission"
    assert (seen.gpus[0]["utilization_percent"], seen.gpus[0]["memory_used_mb"]) == (None, None)


def test_one_bad_gpu_shows_beside_good_ones(nvml):
    assert nvml.sample(gpus=8).state == "ok"
    assert nvml.sample(gpus=8, memory=NOT_SUPPORTED).state == "unified"


@pytest.mark.parametrize("what", ["temperature", "power", "utilization", "name", "uuid"])
def test_a_figure_that_the_device_does_not_say_is_null(nvml, what):
    seen = nvml.sample(**{what: NOT_SUPPORTED})
    named = {"temperature": "temperature_c", "power": "power_w", "utilization": "utilization_percent"}
    assert seen.state == "ok"
    assert [key for key, value in seen.gpus[0].items() if value is None] == [named.get(what, what)]


@pytest.mark.parametrize("code", [VERSION_MISMATCH, FUNCTION_NOT_FOUND])
def test_a_driver_without_the_newer_memory_call_is_asked_by_the_older(nvml, code):
    seen = nvml.sample(memory=code)
    assert (seen.state, seen.gpus[0]["memory_used_mb"]) == ("ok", 5120 + 615)


def test_a_library_without_the_newer_memory_call_is_asked_by_the_older(make_nvml):
    seen = make_nvml("-DOLD").sample()
    assert (seen.state, seen.gpus[0]["memory_used_mb"]) == ("ok", 5120 + 615)


def test_old_memory_call_not_supported_is_unified_too(make_nvml):
    assert make_nvml("-DOLD").sample(memory_v1=NOT_SUPPORTED).state == "unified"


@pytest.mark.parametrize("call", ["init", "count", "memory", "utilization"])
def test_a_call_that_hangs_costs_its_time_once_and_one_thread_and_passes(nvml, call):
    threads = nvml.sample().threads if call != "init" else 1
    first = nvml.sample(**{call: HANG})
    assert (first.state, first.gpus) == ("unresponsive", [])
    assert first.seconds < 1
    for _ in range(20):
        again = nvml.sample_again()
        assert again.state == "unresponsive"
        assert again.seconds < 0.1
        assert again.threads == threads + 1
    nvml.say()
    wait_for(lambda: nvml.sample_again().state == "ok", 5, "the GPU answers again")
    assert nvml.sample_again().threads == threads


def test_many_callers_of_a_hanging_gpu_share_one_thread(nvml):
    nvml.say(count=HANG)
    code = ("import concurrent.futures, gpu, threading, time\nbegan = time.monotonic()\n"
            "with concurrent.futures.ThreadPoolExecutor(32) as pool:\n"
            "    states = set(pool.map(lambda _: gpu.sample()['state'], range(200)))\n"
            "print(states, time.monotonic() - began < 2, [t.name for t in threading.enumerate()])")
    assert run(code, **nvml.env) == "{'unresponsive'} True ['MainThread', 'nvml']"


def test_every_state_has_its_own_word_and_an_action():
    assert set(gpu.ACTIONS) == {"ok", "none", "unified", "lost", "driver_mismatch", "no_permission", "unresponsive"}
    assert set(gpu.ACTIONS.values()) <= {"none", "wait", "reset_session", "restart_service", "reboot_host"}


@pytest.fixture
def gpu_service(nvml, make_service, gguf):
    one = make_service(models={"gemma:latest": gguf}, LLM_MODEL="gemma:latest", **nvml.env)
    one.nvml = nvml
    return one


def seconds_of(answer, limit):
    assert answer.elapsed.total_seconds() < limit
    return answer


def test_the_service_shows_the_gpu_and_each_of_its_states(gpu_service):
    service, nvml = gpu_service, gpu_service.nvml
    stats = service.get("/api/stats").json()
    assert (stats["gpu"], stats["gpu_utilization"], stats["gpu_memory"], stats["gpu_temperature"]) == (
        "ok", "37%", "5120MB / 65536MB", "54°C")
    assert service.get("/health").json()["gpu"] == "ok"
    for state, action, answers in [
            ("driver_mismatch", "reboot_host", {"init": RM_VERSION_MISMATCH, "count": RM_VERSION_MISMATCH}),
            ("no_permission", "restart_service", {"count": NO_PERMISSION}), ("none", "none", {"gpus": 0}),
            ("unified", "none", {"memory": NOT_SUPPORTED}), ("unresponsive", "reboot_host", {"count": HANG})]:
        nvml.say(**answers)
        for _ in range(3):
            stats = seconds_of(service.get("/api/stats"), 1).json()
            health = seconds_of(service.get("/health"), 3)
            assert (stats["gpu"], stats["recommended_action"]) == (state, action)
            assert health.status_code == 200
            assert (health.json()["gpu"], health.json()["recommended_action"]) == (state, action)
        cleared = seconds_of(service.post("/api/cache/clear"), 4)
        assert (cleared.status_code, cleared.json()["memory"]["source"]) == (200, "system")
        assert "-1" not in json.dumps(stats["gpus"]) and not [g for g in stats["gpus"] if g["memory_total_mb"] == 0]
        nvml.say()
        wait_for(lambda: service.get("/api/stats").json()["gpu"] == "ok", 5, "the GPU is back")


def test_a_lost_gpu_is_unhealthy_and_the_service_must_be_restarted(gpu_service):
    gpu_service.nvml.say(count=UNKNOWN)
    health = gpu_service.get("/health")
    assert health.status_code == 503
    told = health.json()
    assert (told["status"], told["code"], told["recommended_action"]) == ("unhealthy", "gpu_lost", "restart_service")
    assert "restart" in told["error"].lower() or "restart" in told["reason"].lower()
    assert gpu_service.post("/api/cache/clear").status_code == 200
    gpu_service.nvml.say()
    assert gpu_service.get("/health").status_code == 200


def test_the_memory_of_a_clear_is_measured_by_nvml(gpu_service):
    service, nvml = gpu_service, gpu_service.nvml
    service.load("gemma:latest")
    busy = service.generate("gemma:latest")
    with concurrent.futures.ThreadPoolExecutor() as pool:
        clearing = pool.submit(service.post, "/api/cache/clear")
        time.sleep(0.7)  # within the time that a busy runner gets
        nvml.say(used=1120)
        report = clearing.result().json()
    assert report["memory"] == {"source": "nvml", "before_mb": 5120, "after_mb": 1120, "freed_mb": 4000}
    busy.wait(5)
