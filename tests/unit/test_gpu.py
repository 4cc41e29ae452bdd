"""gpu.py on a stand-in for pynvml: every state of a GPU, and every way not to answer."""

import concurrent.futures
import ctypes
import threading
import time
import unittest.mock

import pynvml
import pytest

from helpers.fake_nvml import (
    CALLS,
    DRIVER_NOT_LOADED,
    FUNCTION_NOT_FOUND,
    GPU_IS_LOST,
    LIBRARY_NOT_FOUND,
    NO_PERMISSION,
    NOT_SUPPORTED,
    RESERVE_MB,
    RM_VERSION_MISMATCH,
    UNKNOWN,
    VERSION_MISMATCH,
    FakeNvml,
    Gpu,
    load_gpu,
)
from helpers.waiting import wait_for

FIGURES = {
    "index": 0,
    "name": "Stand-in",
    "uuid": "GPU-0",
    "utilization_percent": 37,
    "memory_used_mb": 5120,
    "memory_total_mb": 65_536,
    "temperature_c": 54,
    "power_w": 70.2,
    "board_power_w": None,
    "power_rail": None,
}


@pytest.fixture
def nvml():
    fake = FakeNvml(Gpu())
    yield fake
    fake.answer()  # lets a call go that still hangs


@pytest.fixture
def gpu(nvml):
    return load_gpu("/nowhere", nvml)  # without any of a Jetson's files


def test_every_figure_of_every_gpu_is_told(gpu, nvml):
    nvml.gpus.append(Gpu(uuid="GPU-1", used_mb=1024))
    reading = gpu.sample()
    second = FIGURES | {"index": 1, "uuid": "GPU-1", "memory_used_mb": 1024}
    assert reading == {
        "state": "ok",
        "memory_shared": False,
        "memory_source": "nvml",
        "gpus": [FIGURES, second],
    }
    assert gpu.memory_totals(reading) == (6144, 131_072)
    assert gpu.fullest(reading) == (5120, 65_536)
    assert gpu.memory_in_use(reading) == ("nvml", 6144)


def test_zero_is_a_figure(gpu, nvml):
    nvml.gpus = [Gpu(percent=0, celsius=0, used_mb=0, milliwatts=0)]
    zeros = {"utilization_percent": 0, "memory_used_mb": 0, "temperature_c": 0, "power_w": 0}
    reading = gpu.sample()
    assert reading["gpus"] == [FIGURES | zeros]
    assert gpu.memory_totals(reading) == (0, 65_536)
    assert gpu.memory_in_use(reading) == ("nvml", 0)


@pytest.mark.parametrize("call", CALLS[:3])
@pytest.mark.parametrize(
    ("code", "state"),
    [
        (DRIVER_NOT_LOADED, "none"),
        (LIBRARY_NOT_FOUND, "none"),
        (RM_VERSION_MISMATCH, "driver_mismatch"),
        (GPU_IS_LOST, "lost"),
        (UNKNOWN, "lost"),
        (NO_PERMISSION, "no_permission"),
    ],
)
def test_an_error_is_its_state_and_passes_with_its_cause(gpu, nvml, call, code, state):
    nvml.answer(**{call: code})
    for _ in range(2):
        reading = gpu.sample()
        assert (reading["state"], reading["gpus"]) == (state, [])
        assert gpu.memory_totals(reading) == (None, None)
        assert gpu.memory_in_use(reading) == ("system", None)
    nvml.answer()
    assert gpu.sample()["gpus"] == [FIGURES]


def test_a_library_of_another_version_is_a_driver_mismatch(gpu, nvml, monkeypatch):
    def mismatch():
        raise pynvml.NVMLLibraryMismatchError("the library is older than pynvml")

    monkeypatch.setattr(nvml, "nvmlDeviceGetCount", mismatch)  # not an NVMLError
    assert gpu.sample()["state"] == "driver_mismatch"


@pytest.mark.parametrize("call", CALLS[1:])
@pytest.mark.parametrize("code", [GPU_IS_LOST, UNKNOWN])
def test_a_gpu_that_falls_off_the_bus_later_is_lost_and_found_again(gpu, nvml, call, code):
    assert gpu.sample()["state"] == "ok"
    nvml.answer(**{call: code})
    assert (gpu.sample()["state"], gpu.sample()["gpus"]) == ("lost", [])
    nvml.answer(**{call: code}, nvmlShutdown=UNKNOWN)
    assert gpu.sample()["state"] == "lost"
    nvml.answer()
    assert gpu.sample()["state"] == "ok"


def test_the_library_is_initialised_once(gpu, nvml):
    for _ in range(5):
        gpu.sample()
    assert (nvml.calls.count("nvmlInit"), nvml.calls.count("nvmlShutdown")) == (1, 0)


def test_no_gpu_in_the_machine_is_none(gpu, nvml):
    nvml.gpus = []
    assert gpu.sample() == {
        "state": "none",
        "memory_shared": False,
        "memory_source": None,
        "gpus": [],
    }


@pytest.mark.parametrize("library", ["missing", "empty"])
def test_no_library_and_a_file_that_is_no_library_are_none(tmp_path, monkeypatch, library):
    (tmp_path / "empty").write_bytes(b"")
    load = ctypes.CDLL
    monkeypatch.setattr(ctypes, "CDLL", lambda _: load(str(tmp_path / library)))
    gpu = load_gpu("/nowhere")  # on the real pynvml
    assert (gpu.sample()["state"], gpu.sample()["gpus"]) == ("none", [])
    assert gpu.pynvml is None, "2 MB for nothing"


@pytest.mark.parametrize(("pause_s", "searches"), [(60, 1), (0, 3)])
def test_a_library_that_is_missing_is_looked_for_again_after_a_pause(
    monkeypatch, pause_s, searches
):
    library = unittest.mock.Mock(side_effect=OSError("no such file"))
    monkeypatch.setattr(ctypes, "CDLL", library)
    gpu = load_gpu("/nowhere")
    gpu.LIBRARY_S = pause_s
    assert [gpu.sample(30)["state"] for _ in range(3)] == ["none"] * 3
    assert library.call_count == searches


@pytest.mark.parametrize(
    ("call", "figure"),
    [
        ("nvmlDeviceGetName", "name"),
        ("nvmlDeviceGetUUID", "uuid"),
        ("nvmlDeviceGetUtilizationRates", "utilization_percent"),
        ("nvmlDeviceGetTemperature", "temperature_c"),
        ("nvmlDeviceGetPowerUsage", "power_w"),
    ],
)
@pytest.mark.parametrize("code", [NOT_SUPPORTED, NO_PERMISSION, FUNCTION_NOT_FOUND])
def test_a_figure_that_the_device_does_not_say_is_null(gpu, nvml, call, figure, code):
    nvml.answer(**{call: code})
    reading = gpu.sample()
    assert (reading["state"], reading["gpus"]) == ("ok", [FIGURES | {figure: None}])


@pytest.mark.parametrize("code", [VERSION_MISMATCH, FUNCTION_NOT_FOUND])
def test_a_driver_without_the_newer_memory_call_is_asked_by_the_older(gpu, nvml, code):
    nvml.answer(v2=code)
    reading = gpu.sample()
    assert reading["state"] == "ok"
    assert reading["gpus"] == [FIGURES | {"memory_used_mb": 5120 + RESERVE_MB}]


def test_a_mig_slice_without_permission_says_so(gpu, nvml):
    nvml.answer(nvmlDeviceGetMemoryInfo=NO_PERMISSION, nvmlDeviceGetUtilizationRates=NOT_SUPPORTED)
    reading = gpu.sample()
    untold = {"utilization_percent": None, "memory_used_mb": None, "memory_total_mb": None}
    assert (reading["state"], reading["memory_shared"]) == ("no_permission", False)
    assert reading["gpus"] == [FIGURES | untold]
    assert gpu.memory_totals(reading) == (None, None)
    assert gpu.memory_in_use(reading) == ("system", None)


@pytest.mark.parametrize("bad", [0, 3, 7])
def test_one_bad_gpu_shows_beside_good_ones(gpu, nvml, monkeypatch, bad):
    nvml.gpus = [Gpu() for _ in range(8)]
    whole = nvml.nvmlDeviceGetMemoryInfo

    def memory(handle, version=None):
        if handle is nvml._handles[bad]:
            raise pynvml.NVMLError(NO_PERMISSION)
        return whole(handle, version)

    monkeypatch.setattr(nvml, "nvmlDeviceGetMemoryInfo", memory)
    reading = gpu.sample()
    assert reading["state"] == "no_permission"
    assert [g["memory_used_mb"] for g in reading["gpus"]].count(None) == 1
    assert gpu.memory_totals(reading) == (7 * 5120, 7 * 65_536)
    assert gpu.memory_in_use(reading) == ("nvml", 7 * 5120)


@pytest.mark.parametrize(
    ("memories", "shown"),
    [
        ([(64_000, 65_536), (0, 65_536)], (64_000, 65_536)),
        ([(20_000, 131_072), (16_000, 16_384)], (16_000, 16_384)),
        ([(None, None), (5, 65_536)], (5, 65_536)),
        ([(None, None)], (None, None)),
        ([], (None, None)),
    ],
)
def test_one_that_is_full_is_not_hidden_by_one_that_is_empty(gpu, memories, shown):
    gpus = [{"memory_used_mb": used, "memory_total_mb": total} for used, total in memories]
    assert gpu.fullest({"gpus": gpus}) == shown


A, B = ({"index": n, "name": "H200", "uuid": f"GPU-{n}f-1"} for n in (0, 1))


@pytest.mark.parametrize(
    ("setting", "seen"),
    [
        (None, [A, B]),
        ("", []),
        ("-1", []),
        ("2", []),
        ("1", [B]),
        (" 1 , 0", [B, A]),
        ("0,7,1", [A]),
        ("GPU-1f-1", [B]),
        ("GPU-1", [B]),
        ("GPU-", []),
        ("GPU-5,0", []),
        ("MIG-1f", [A, B]),
    ],
)
def test_a_process_sees_the_gpus_that_cuda_shows_it(gpu, setting, seen):
    assert gpu.visible([A, B], setting) == seen


@pytest.mark.parametrize(
    ("other", "setting", "seen"),
    [({"name": "L4"}, "1", 2), ({"name": "L4"}, "GPU-1f", 1), ({"uuid": None}, "GPU-1f", 2)],
)
def test_where_cudas_order_or_names_are_not_known_it_may_be_any(gpu, other, setting, seen):
    assert len(gpu.visible([A | other, B], setting)) == seen


def readers():
    """Return the threads that read a GPU: other tests may have left others."""
    return {thread for thread in threading.enumerate() if thread.name == "gpu"}


@pytest.mark.parametrize("call", CALLS)
def test_a_call_that_hangs_costs_its_time_once_and_one_thread_and_passes(gpu, nvml, call):
    before = readers()
    nvml.answer(call)
    began = time.monotonic()
    first = gpu.sample(0.05)
    assert time.monotonic() - began >= 0.05
    assert (first["state"], first["gpus"]) == ("slow", [])
    began = time.monotonic()
    for _ in range(20):
        assert gpu.sample(20) == first
        (reader,) = readers() - before
        assert reader.daemon  # the process may end
    assert time.monotonic() - began < 20  # no one has waited
    assert gpu.memory_totals(first) == (None, None)
    assert gpu.memory_in_use(first) == ("system", None)
    nvml.answer()
    wait_for(lambda: gpu.sample()["state"] != "slow", 30, "the GPU answers")
    assert gpu.sample(30)["gpus"] == [FIGURES]
    assert readers() - before == {reader}  # which reads on


def test_where_no_thread_can_be_started_the_next_sample_tries_again(gpu, monkeypatch):
    with monkeypatch.context() as full:
        full.setattr(threading.Thread, "start", unittest.mock.Mock(side_effect=RuntimeError))
        with pytest.raises(RuntimeError):
            gpu.sample()
    assert gpu.sample(30)["gpus"] == [FIGURES]


def waited(gpu, seconds, step):
    """Return the states of a GPU that is asked again and again while it does not answer."""
    now = iter(range(0, seconds + 1, step))
    return [gpu.sample(0.01, lambda at=at: at)["state"] for at in now]


def test_a_gpu_that_does_not_answer_is_slow_for_thirty_seconds(gpu, nvml):
    nvml.answer("nvmlDeviceGetCount")
    states = waited(gpu, 34, 2)
    assert states == ["slow"] * 15 + ["unresponsive"] * 3
    nvml.answer()


def test_a_pause_of_the_service_is_no_time_that_a_gpu_had(gpu, nvml):
    nvml.answer("nvmlDeviceGetCount")
    assert waited(gpu, 3600 * 4, 3600) == ["slow"] * 5
    nvml.answer()


def test_an_error_of_our_own_is_logged_and_is_no_state_of_the_gpu(gpu, monkeypatch, caplog):
    assert gpu.sample()["state"] == "ok"

    def broken(*_):
        raise TypeError("a bug")

    monkeypatch.setattr(gpu, "_read_nvml", broken)
    reading = gpu.sample()
    assert (reading["state"], reading["gpus"]) == ("ok", [FIGURES])
    assert "TypeError: a bug" in caplog.text
    monkeypatch.setattr(gpu, "_last", gpu.NOTHING_READ)
    assert gpu.sample()["state"] == "unknown"


def test_many_callers_of_a_hanging_gpu_share_one_thread(gpu, nvml):
    nvml.answer("nvmlDeviceGetCount")
    began = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        states = set(pool.map(lambda _: gpu.sample(1)["state"], range(200)))
    assert states == {"slow"}
    assert time.monotonic() - began < 6  # 200 callers by 32 in turn: 7 s if each waited
    assert nvml.calls == ["nvmlInit", "nvmlDeviceGetCount"]


def test_callers_at_the_same_time_share_a_reading(gpu, nvml):
    nvml.answer("nvmlDeviceGetCount")
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        answers = [pool.submit(gpu.sample, 5) for _ in range(32)]
        while "nvmlDeviceGetCount" not in nvml.calls:
            time.sleep(0.001)
        nvml.answer()
        assert all(answer.result()["gpus"] == [FIGURES] for answer in answers)
    assert nvml.calls.count("nvmlInit") == 1


def test_the_default_time_limit_leaves_the_stats_their_second(gpu):
    assert gpu.TIMEOUT_S <= 0.5


def test_every_state_has_its_own_word_and_an_action(gpu):
    assert gpu.ACTIONS == {
        "ok": "none",
        "none": "none",
        "unified": "none",
        "lost": "restart_service",
        "driver_mismatch": "reboot_host",
        "no_permission": "none",
        "slow": "wait",
        "unresponsive": "reboot_host",
        "unknown": "none",
    }
