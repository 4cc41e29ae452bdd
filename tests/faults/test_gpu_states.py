"""The service with a GPU of each state, on a stand-in for NVIDIA's library."""

import json
import time

import pytest

from helpers.answers import GEMMA, clear, health, stats
from helpers.causes import begun
from helpers.nvml import HANG, NO_PERMISSION, NOT_SUPPORTED, RM_VERSION_MISMATCH, UNKNOWN
from helpers.waiting import wait_for


@pytest.fixture
def on_gpu(nvml, make_service, gguf):
    service = make_service(models={GEMMA: gguf}, LLM_MODEL=GEMMA, **nvml.env)
    service.nvml = nvml
    # On a busy machine the first reading may be a slow one.
    wait_for(lambda: stats(service)["gpu"] == "ok", 30, "the GPU was read")
    return service


def shown(told):
    return [told[key] for key in ("gpu", "gpu_utilization", "gpu_memory", "gpu_temperature")]


def test_the_gpu_shows(on_gpu):
    assert shown(stats(on_gpu)) == ["ok", "37%", "5120MB / 65536MB", "54°C"]
    assert health(on_gpu)["gpu"] == "ok"


@pytest.mark.parametrize(
    "state, action, answers",
    [
        (
            "driver_mismatch",
            "reboot_host",
            {"init": RM_VERSION_MISMATCH, "count": RM_VERSION_MISMATCH},
        ),
        ("no_permission", "none", {"count": NO_PERMISSION}),
        ("none", "none", {"gpus": 0}),
        ("unified", "none", {"memory": NOT_SUPPORTED}),
        ("slow", "wait", {"count": HANG}),
    ],
)
def test_each_state_shows_and_passes(on_gpu, state, action, answers):
    on_gpu.nvml.say(**answers)
    wait_for(lambda: stats(on_gpu)["gpu"] == state, 30, "the watch has looked")
    if action != "none":
        assert health(on_gpu)["recommended_action"] == "wait"  # one bad answer is no state
    wait_for(lambda: stats(on_gpu)["recommended_action"] == action, 30, "it has lasted")
    for _ in range(3):
        told = stats(on_gpu)
        assert (told["gpu"], told["recommended_action"]) == (state, action)
        said = health(on_gpu)
        assert (said["gpu"], said["recommended_action"]) == (state, action)
    assert clear(on_gpu)["memory"]["source"] == "system"
    assert "-1" not in json.dumps(told["gpus"])
    assert not [gpu for gpu in told["gpus"] if gpu["memory_total_mb"] == 0]
    on_gpu.nvml.say()
    wait_for(lambda: stats(on_gpu)["gpu"] == "ok", 30, "the GPU is back")


def test_a_lost_gpu_is_unhealthy_and_the_service_must_be_restarted(on_gpu):
    on_gpu.nvml.say(count=UNKNOWN)
    wait_for(lambda: stats(on_gpu)["gpu"] == "lost", 30, "the machine was looked at")
    said = health(on_gpu)  # one bad answer is no loss
    assert (said["status"], said["recommended_action"]) == ("healthy", "wait")
    wait_for(lambda: on_gpu.get("/health").status_code == 503, 60, "a loss for some looks")
    told = health(on_gpu, 503)
    assert (told["status"], told["code"]) == ("unhealthy", "gpu_lost")
    assert told["recommended_action"] == "restart_service"
    assert "restart" in told["error"].lower() or "restart" in told["reason"].lower()
    clear(on_gpu)
    on_gpu.nvml.say()
    on_gpu.wait_healthy(60)


def test_the_memory_of_a_clear_is_measured_by_nvml(on_gpu, others):
    busy = on_gpu.generate(GEMMA)
    clearing = begun(on_gpu, others, clear)
    time.sleep(0.5)  # within the time that a busy runner gets
    on_gpu.nvml.say(used=1120)
    memory = clearing.result()["memory"]
    assert memory == {"source": "nvml", "before_mb": 5120, "after_mb": 1120, "freed_mb": 4000}
    busy.wait(30)
