"""gpu.py, on a stand-in for NVIDIA's library. To go: unit/test_gpu.py takes its place."""

import contextlib
import ctypes
import os
import subprocess
import sys

import pytest

import gpu
from helpers.nvml import (
    DRIVER_NOT_LOADED,
    FUNCTION_NOT_FOUND,
    GPU_IS_LOST,
    HANG,
    LIBRARY_NOT_FOUND,
    NO_PERMISSION,
    NOT_SUPPORTED,
    RM_VERSION_MISMATCH,
    UNKNOWN,
    VERSION_MISMATCH,
)
from helpers.places import ROOT
from helpers.waiting import wait_for


def test_every_figure_of_every_gpu_is_told(nvml):
    seen = nvml.sample(gpus=2)
    figures = {
        "name": "Stand-in",
        "utilization_percent": 37,
        "memory_used_mb": 5120,
        "memory_total_mb": 65536,
        "temperature_c": 54,
        "power_w": 70.2,
    }
    assert seen.state == "ok"
    assert seen.gpus == [
        {"index": 0, "uuid": "GPU-0", **figures},
        {"index": 1, "uuid": "GPU-1", **figures},
    ]
    assert gpu.memory_mb({"gpus": seen.gpus}) == (10240, 131072)


def test_zero_is_a_figure(nvml):
    assert nvml.sample(percent=0, celsius=0, used=0).gpus[0] == {
        "index": 0,
        "name": "Stand-in",
        "uuid": "GPU-0",
        "utilization_percent": 0,
        "memory_used_mb": 0,
        "memory_total_mb": 65536,
        "temperature_c": 0,
        "power_w": 70.2,
    }


@pytest.mark.parametrize("call", ["init", "count", "handle"])
@pytest.mark.parametrize(
    "code, state",
    [
        (DRIVER_NOT_LOADED, "none"),
        (LIBRARY_NOT_FOUND, "none"),
        (RM_VERSION_MISMATCH, "driver_mismatch"),
        (GPU_IS_LOST, "lost"),
        (UNKNOWN, "lost"),
        (NO_PERMISSION, "no_permission"),
    ],
)
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
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    ).stdout.strip()


def test_no_library_is_none(tmp_path):
    with contextlib.suppress(OSError):
        ctypes.CDLL("libnvidia-ml.so.1")
        pytest.skip("this machine has NVIDIA's library")
    assert (
        run("import gpu; print(gpu.sample())", LD_LIBRARY_PATH=str(tmp_path))
        == "{'state': 'none', 'gpus': []}"
    )


def test_a_file_that_is_no_library_is_none(tmp_path):
    (tmp_path / "libnvidia-ml.so.1").write_bytes(b"")
    assert run("import gpu; print(gpu.sample()['state'])", LD_LIBRARY_PATH=str(tmp_path)) == "none"


def test_memory_that_is_the_systems_is_unified_and_the_rest_is_told(nvml):
    seen = nvml.sample(memory=NOT_SUPPORTED)
    assert seen.state == "unified"
    assert seen.gpus[0] | {"name": None, "uuid": None} == {
        "index": 0,
        "name": None,
        "uuid": None,
        "utilization_percent": 37,
        "memory_used_mb": None,
        "memory_total_mb": None,
        "temperature_c": 54,
        "power_w": 70.2,
    }
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
    named = {
        "temperature": "temperature_c",
        "power": "power_w",
        "utilization": "utilization_percent",
    }
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
    code = (
        "import concurrent.futures, gpu, threading, time\nbegan = time.monotonic()\n"
        "with concurrent.futures.ThreadPoolExecutor(32) as pool:\n"
        "    states = set(pool.map(lambda _: gpu.sample()['state'], range(200)))\n"
        "print(states, time.monotonic() - began < 2, [t.name for t in threading.enumerate()])"
    )
    assert run(code, **nvml.env) == "{'unresponsive'} True ['MainThread', 'nvml']"


def test_every_state_has_its_own_word_and_an_action():
    assert set(gpu.ACTIONS) == {
        "ok",
        "none",
        "unified",
        "lost",
        "driver_mismatch",
        "no_permission",
        "unresponsive",
    }
    assert set(gpu.ACTIONS.values()) <= {
        "none",
        "wait",
        "reset_session",
        "restart_service",
        "reboot_host",
    }
