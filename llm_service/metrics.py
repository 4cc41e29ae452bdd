"""All figures for Prometheus."""

import itertools
import typing

import psutil

from llm_service.downloads import Downloads
from llm_service.processes import MB
from llm_service.stats import Stats
from llm_service.updates import Updates
from llm_service.verifying import Verifying
from llm_service.watch import Watch
from ollama_client import Json

Labels = typing.Mapping[str, object]
Sample = tuple[str, str, Labels, float | None]


class Metrics:
    """The text of ``GET /metrics``."""

    def __init__(
        self,
        stats: Stats,
        watch: Watch,
        downloads: Downloads,
        is_up: typing.Callable[[psutil.Process | None], bool],
        verifying: Verifying,
        updates: Updates,
    ):
        """``is_up(server)`` tells whether /health finds no fault."""
        self._stats = stats
        self._watch = watch
        self._downloads = downloads
        self._is_up = is_up
        self._verifying = verifying
        self._updates = updates

    def text(self) -> str:
        """Return all figures in Prometheus' text format; what nobody knows is left out."""
        families: dict[str, list[str]] = {}
        for name, about, labels, value in self._samples():
            if value is None:
                continue
            if name not in families:
                kind = "counter" if name.endswith("_total") else "gauge"
                families[name] = [f"# HELP {name} {about}", f"# TYPE {name} {kind}"]
            families[name].append(f"{name}{label_text(labels)} {round(value, 6)}")
        lines = itertools.chain.from_iterable(families.values())
        return "\n".join(lines) + "\n"

    def _samples(self) -> typing.Iterator[Sample]:
        """Yield each figure: its name, what it is, its labels, its value in base units."""
        server = self._watch.processes.server()
        stats = self._stats.report_of(server)
        yield "llm_up", "1 where /health finds no fault.", {}, self._is_up(server)
        yield "llm_gpu_state", "1 for the state of the GPUs.", {"state": stats["gpu"]}, 1
        for each in stats["gpus"]:
            yield from gpu_samples(each)
        yield from machine_samples(stats)
        yield from caller_samples(stats["callers"] or {})
        for each in stats["runners"]:
            yield from runner_samples(each)
        for model, totals in self._watch.totals.by_model.items():
            yield from model_samples(model, totals)
        yield from self._work_samples(stats)

    def _work_samples(self, stats: Json) -> typing.Iterator[Sample]:
        """Yield the figures of what the service and Ollama have done."""
        running = self._downloads.running_count()
        yield "llm_models_loaded", "Models in memory.", {}, len(self._watch.loaded)
        damaged = self._verifying.damaged_count()
        yield "llm_models_damaged", "Not whole at the last verify.", {}, damaged
        newer = self._updates.newer_count()
        yield "llm_models_newer", "Newer in their registries when last asked.", {}, newer
        yield "llm_downloads_running", "Downloads under way.", {}, running
        for outcome, count in self._downloads.counts.items():
            yield "llm_downloads_total", "Ended downloads.", {"outcome": outcome}, count
        yield "llm_clears_total", "Clears, also of resets and deletes.", {}, stats["clears"]
        yield "llm_resets_total", "Resets done.", {}, stats["resets"]
        for what in ("runners", "ollama"):
            count = stats["healed"][what]
            yield "llm_healings_total", "Healed by the service.", {"what": what}, count
        failed = stats["healed"]["failed"]
        yield "llm_healings_failed_total", "What could not be healed.", {}, failed
        restarts = stats["ollama"]["restarts"]
        yield "llm_ollama_restarts_total", "Restarts of Ollama.", {}, restarts


def gpu_samples(card: Json) -> typing.Iterator[Sample]:
    """Yield the figures of a GPU."""
    labels = {"gpu": card["index"]}
    yield (
        "llm_gpu_utilization_ratio",
        "Load of a GPU.",
        labels,
        ratio(card["utilization_percent"]),
    )
    yield (
        "llm_gpu_memory_used_bytes",
        "GPU memory in use.",
        labels,
        in_bytes(card["memory_used_mb"]),
    )
    yield (
        "llm_gpu_memory_total_bytes",
        "GPU memory.",
        labels,
        in_bytes(card["memory_total_mb"]),
    )
    yield "llm_gpu_temperature_celsius", "GPU temperature.", labels, card["temperature_c"]
    yield "llm_gpu_power_watts", "Power that a GPU draws.", labels, card["power_w"]
    yield "llm_board_power_watts", "Power that the board draws.", labels, card["board_power_w"]


def machine_samples(stats: Json) -> typing.Iterator[Sample]:
    """Yield the figures of memory, CPU and the models' disk."""
    memory = stats["memory"]
    yield (
        "llm_memory_used_bytes",
        "The machine's memory in use.",
        {},
        in_bytes(memory["used_mb"]),
    )
    yield (
        "llm_memory_total_bytes",
        "The machine's memory.",
        {},
        in_bytes(memory["total_mb"]),
    )
    yield (
        "llm_process_memory_bytes",
        "API, Ollama, runners.",
        {},
        in_bytes(stats["process_memory_mb"]),
    )
    yield "llm_cpu_utilization_ratio", "Load of the CPU.", {}, ratio(stats["cpu_percent"])
    disk = (stats["disk"] or {}).get
    yield "llm_disk_free_bytes", "Free on the models' disk.", {}, disk("free_bytes")
    yield "llm_disk_total_bytes", "Size of the models' disk.", {}, disk("total_bytes")
    yield "llm_disk_partial_bytes", "Unfinished downloads.", {}, disk("partial_bytes")
    yield "llm_disk_unused_bytes", "What a prune would free.", {}, disk("unused_bytes")


def runner_samples(runner: Json) -> typing.Iterator[Sample]:
    """Yield the figures of a runner."""
    labels = {"model": runner["model"] or "unknown", "pid": runner["pid"]}
    state = {**labels, "state": runner["state"]}
    speed = runner["tokens_per_second"]
    yield "llm_runner_state", "1 for the state of a runner.", state, 1
    yield "llm_runner_memory_bytes", "Memory of a runner.", labels, in_bytes(runner["memory_mb"])
    yield "llm_runner_tokens_per_second", "Speed.", labels, speed
    yield "llm_runner_answers", "Answers under way.", labels, runner["answers"]


def model_samples(model: str, totals: typing.Mapping) -> typing.Iterator[Sample]:
    """Yield what all runners of a model have done since the service's start."""
    labels = {"model": model}
    yield (
        "llm_runner_tokens_total",
        "Tokens decoded.",
        labels,
        totals.get("tokens"),
    )
    yield (
        "llm_runner_seconds_total",
        "Time of decoding.",
        labels,
        totals.get("seconds"),
    )
    yield (
        "llm_runner_prompt_tokens_total",
        "Prompt tokens computed, without cached ones.",
        labels,
        totals.get("prompt_tokens"),
    )
    yield (
        "llm_runner_prompt_seconds_total",
        "Time of computing prompts.",
        labels,
        totals.get("prompt_seconds"),
    )


def caller_samples(callers: Json) -> typing.Iterator[Sample]:
    """Yield how many callers of Ollama there are and wait; {} where the kernel does not tell."""
    yield (
        "llm_callers_connections",
        "Connections to Ollama.",
        {},
        callers.get("connections"),
    )
    yield (
        "llm_callers_waiting",
        "Callers of Ollama that wait for an answer.",
        {},
        callers.get("waiting"),
    )
    yield (
        "llm_callers_longest_wait_seconds",
        "The longest wait of them.",
        {},
        callers.get("longest_wait_s"),
    )


def in_bytes(megabytes: float | None) -> float | None:
    """Return MB as bytes; None stays None."""
    return None if megabytes is None else megabytes * MB


def ratio(percent: float | None) -> float | None:
    """Return a percentage as a ratio; None stays None."""
    return None if percent is None else percent / 100


def label_text(labels: Labels) -> str:
    """Write labels as Prometheus takes them, with their values escaped."""
    pairs = []
    for name, value in labels.items():
        escaped = str(value).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        pairs.append(f'{name}="{escaped}"')
    return f"{{{','.join(pairs)}}}" if pairs else ""
