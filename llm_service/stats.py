"""The load of the GPU, the machine and the service's own processes."""

import time

import psutil

import gpu
from llm_service.healing import Healing
from llm_service.processes import MB, age_s
from llm_service.session import Session
from llm_service.watch import Watch
from ollama_client import Json, timestamp


class Stats:
    """The figures of ``GET /api/stats``."""

    def __init__(self, watch: Watch, session: Session, healing: Healing):
        self._watch = watch
        self._session = session
        self._healing = healing
        self._machine = watch.machine
        self._processes = watch.processes

    def report(self) -> Json:
        """Return the answer of ``GET /api/stats``. What the watch sees is as of its last look."""
        return self.report_of(self._processes.server())

    def report_of(self, server: psutil.Process | None) -> Json:
        """Return ``report()`` for a caller who knows the server that is there."""
        reading = self._machine.gpu
        return {
            **gpu_strings(reading),
            "process_memory_mb": self._watch.process_memory_mb,
            "cpu_percent": self._machine.cpu_percent,
            "timestamp": timestamp(time.time()),
            "gpu": reading["state"],
            "gpus": reading["gpus"],
            "recommended_action": self._machine.gpu_action(),
            "memory": self._memory(),
            "disk": self._machine.disk,
            "runners": self._watch.runners(),
            "callers": self._watch.callers.report,
            "looked_at": timestamp(self._watch.looked_at),
            "ollama": self._ollama(server),
            "healed": self._healing.healed,
            "clears": self._session.clears_done,
            "resets": self._session.resets_done,
        }

    def _memory(self) -> Json:
        memory = self._machine.memory
        used = memory.total - memory.available
        return {
            "total_mb": memory.total // MB,
            "used_mb": used // MB,
            "available_mb": memory.available // MB,
            "percent": memory.percent,
        }

    def _ollama(self, server: psutil.Process | None) -> Json:
        told: Json = {"pid": None, "uptime_seconds": None}
        if server:
            told["pid"] = server.pid
            told["uptime_seconds"] = round(age_s(server))
        told["restarts"] = self._processes.restarts()
        return told


def gpu_strings(reading: Json) -> Json:
    """Put the figures as the dashboard shows them: each of the GPU where it is highest."""
    used, total = gpu.fullest(reading)
    load = highest(reading, "utilization_percent")
    celsius = highest(reading, "temperature_c")
    load_text = told(load, "%")
    celsius_text = told(celsius, "°C")
    memory_text = told(total, "MB")
    if total is not None:
        memory_text = f"{used}MB / {memory_text}"
    return {
        "gpu_utilization": load_text,
        "gpu_memory": memory_text,
        "gpu_temperature": celsius_text,
    }


def told(figure: object, unit: str) -> str:
    """Return a figure with its unit; "N/A" where there is none."""
    return "N/A" if figure is None else f"{figure}{unit}"


def highest(reading: Json, figure: str) -> int | None:
    """Return the highest of a figure over all GPUs that tell it."""
    figures = [each[figure] for each in reading["gpus"]]
    known = [each for each in figures if each is not None]
    return max(known, default=None)
