"""The figures of /api/stats, and the same for Prometheus."""

import time
import typing

import gpu
from llm_service.downloads import Downloads
from llm_service.healing import Healing
from llm_service.processes import MB, age_s
from llm_service.session import Session
from llm_service.watch import Watch
from ollama_client import Json, timestamp


class Figures:
    """The figures of the machine, of what runs on it and of what the service did."""

    def __init__(
        self,
        watch: Watch,
        session: Session,
        healing: Healing,
        downloads: Downloads,
        is_up: typing.Callable[[], bool],
    ):
        """``is_up()`` tells whether /health finds no fault."""
        self._watch, self._session, self._healing = watch, session, healing
        self._downloads, self._is_up = downloads, is_up
        self._machine = watch.machine
        self._processes = watch.processes

    def stats(self) -> Json:
        """Return the answer of ``GET /api/stats``. What the watch sees is as of its last look."""
        reading = self._machine.gpu
        memory = self._machine.memory
        server = self._processes.server()
        return {
            **gpu_strings(reading),
            "process_memory_mb": self._watch.process_memory_mb,
            "cpu_percent": self._machine.cpu_percent,
            "timestamp": timestamp(time.time()),
            "gpu": reading["state"],
            "gpus": reading["gpus"],
            "recommended_action": gpu.ACTIONS[reading["state"]],
            "memory": {
                "total_mb": memory.total // MB,
                "used_mb": (memory.total - memory.available) // MB,
                "available_mb": memory.available // MB,
                "percent": memory.percent,
            },
            "disk": self._machine.disk,
            "runners": self._watch.runners(),
            "looked_at": timestamp(self._watch.looked_at),
            "ollama": {
                "pid": server.pid if server else None,
                "uptime_seconds": round(age_s(server)) if server else None,
                "restarts": self._processes.restarts(),
            },
            "healed": self._healing.healed,
            "clears": self._session.clears_done,
            "resets": self._session.resets_done,
        }

    def metrics_text(self) -> str:
        """Return all figures in Prometheus' text format; what nobody knows is left out."""
        rows = self._metric_rows()
        lines = []
        for name, about, place in METRICS:
            group, figure = place.split()
            factor = BASE_UNITS.get(figure.rpartition("_")[2], 1)
            samples = [
                f"{name}{labels} {round(row[figure] * factor, 6)}"
                for labels, row in rows[group]
                if row.get(figure) is not None
            ]
            if samples:
                kind = "counter" if name.endswith("_total") else "gauge"
                lines += [f"# HELP {name} {about}", f"# TYPE {name} {kind}", *samples]
        return "\n".join(lines) + "\n"

    def _metric_rows(self) -> dict[str, list[tuple[str, Json]]]:
        """Return all figures by their group in METRICS, as rows of (labels, figures)."""
        stats = self.stats()
        service = {
            **stats,
            "up": int(self._is_up()),
            "models_loaded": len(self._watch.loaded),
            "downloads_running": self._downloads.running_count(),
        }
        runners = [
            (runner, {"model": runner["model"] or "unknown", "pid": runner["pid"]})
            for runner in stats["runners"]
        ]
        return {
            "service": [("", service)],
            "memory": [("", stats["memory"])],
            "disk": [("", stats["disk"] or {})],
            "ollama": [("", stats["ollama"])],
            "gpu_state": [(label_text(state=stats["gpu"]), {"is": 1})],
            "gpus": [(label_text(gpu=each["index"]), each) for each in stats["gpus"]],
            "runners": [(label_text(**labels), runner) for runner, labels in runners],
            "runner_state": [
                (label_text(**labels, state=runner["state"]), {"is": 1})
                for runner, labels in runners
            ],
            "downloads": [
                (label_text(outcome=outcome), {"ended": count})
                for outcome, count in self._downloads.counts.items()
            ],
            "healings": [
                (label_text(what=what), {"done": stats["healed"][what]})
                for what in ("runners", "ollama")
            ],
        }


def gpu_strings(reading: Json) -> Json:
    """Put the figures as the dashboard shows them: the busiest GPU, all memory together."""
    used, total = gpu.memory_totals(reading)
    utilization = highest(reading, "utilization_percent")
    temperature = highest(reading, "temperature_c")
    return {
        "gpu_utilization": "N/A" if utilization is None else f"{utilization}%",
        "gpu_memory": "N/A" if total is None else f"{used}MB / {total}MB",
        "gpu_temperature": "N/A" if temperature is None else f"{temperature}°C",
    }


def highest(reading: Json, figure: str) -> int | None:
    """Return the highest of a figure over all GPUs that tell it."""
    figures = [each[figure] for each in reading["gpus"]]
    known = [each for each in figures if each is not None]
    return max(known, default=None)


# Name, help; then the group of rows and the figure in them, which metric_rows gives.
METRICS = [
    ("llm_up", "1 where the last look found no fault.", "service up"),
    ("llm_gpu_state", "1 for the state of the GPUs.", "gpu_state is"),
    ("llm_gpu_utilization_ratio", "Load of a GPU.", "gpus utilization_percent"),
    ("llm_gpu_memory_used_bytes", "GPU memory in use.", "gpus memory_used_mb"),
    ("llm_gpu_memory_total_bytes", "GPU memory.", "gpus memory_total_mb"),
    ("llm_gpu_temperature_celsius", "GPU temperature.", "gpus temperature_c"),
    ("llm_gpu_power_watts", "Power that a GPU draws.", "gpus power_w"),
    ("llm_board_power_watts", "Power that the board draws.", "gpus board_power_w"),
    ("llm_memory_used_bytes", "The machine's memory in use.", "memory used_mb"),
    ("llm_memory_total_bytes", "The machine's memory.", "memory total_mb"),
    ("llm_process_memory_bytes", "API, Ollama, runners.", "service process_memory_mb"),
    ("llm_cpu_utilization_ratio", "Load of the CPU.", "service cpu_percent"),
    ("llm_disk_free_bytes", "Free on the models' disk.", "disk free_bytes"),
    ("llm_disk_total_bytes", "Size of the models' disk.", "disk total_bytes"),
    ("llm_disk_partial_bytes", "Unfinished downloads.", "disk partial_bytes"),
    ("llm_disk_unused_bytes", "What a prune would free.", "disk unused_bytes"),
    ("llm_models_loaded", "Models in memory.", "service models_loaded"),
    ("llm_runner_state", "1 for the state of a runner.", "runner_state is"),
    ("llm_runner_memory_bytes", "Memory of a runner.", "runners memory_mb"),
    ("llm_runner_tokens_per_second", "Speed.", "runners tokens_per_second"),
    ("llm_runner_tokens_total", "Tokens decoded.", "runners tokens"),
    ("llm_downloads_running", "Downloads under way.", "service downloads_running"),
    ("llm_downloads_total", "Ended downloads.", "downloads ended"),
    ("llm_clears_total", "Clears, also of resets and deletes.", "service clears"),
    ("llm_resets_total", "Resets done.", "service resets"),
    ("llm_healings_total", "Healed by the service.", "healings done"),
    ("llm_ollama_restarts_total", "Restarts of Ollama.", "ollama restarts"),
]
BASE_UNITS = {"mb": MB, "percent": 0.01}  # by the last word of a figure's name


def label_text(**labels: object) -> str:
    """Write labels as Prometheus takes them, with their values escaped."""
    pairs = []
    for name, value in labels.items():
        escaped = str(value).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        pairs.append(f'{name}="{escaped}"')
    return f"{{{','.join(pairs)}}}"
