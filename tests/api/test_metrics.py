"""/metrics, read by Prometheus' own parser."""

import importlib

import pytest
from prometheus_client.parser import text_string_to_metric_families

from helpers.answers import GEMMA, clear, stats
from helpers.waiting import wait_for

# Every metric of the contract: its type, and the labels of its samples.
ALWAYS = {
    "llm_up": ("gauge", []),
    "llm_gpu_state": ("gauge", ["state"]),
    "llm_memory_used_bytes": ("gauge", []),
    "llm_memory_total_bytes": ("gauge", []),
    "llm_process_memory_bytes": ("gauge", []),
    "llm_cpu_utilization_ratio": ("gauge", []),
    "llm_disk_free_bytes": ("gauge", []),
    "llm_disk_total_bytes": ("gauge", []),
    "llm_disk_partial_bytes": ("gauge", []),
    "llm_disk_unused_bytes": ("gauge", []),
    "llm_models_loaded": ("gauge", []),
    "llm_downloads_running": ("gauge", []),
    "llm_downloads": ("counter", ["outcome"]),
    "llm_clears": ("counter", []),
    "llm_resets": ("counter", []),
    "llm_healings": ("counter", ["what"]),
    "llm_ollama_restarts": ("counter", []),
}
OF_GPUS = {
    "llm_gpu_utilization_ratio": ("gauge", ["gpu"]),
    "llm_gpu_memory_used_bytes": ("gauge", ["gpu"]),
    "llm_gpu_memory_total_bytes": ("gauge", ["gpu"]),
    "llm_gpu_temperature_celsius": ("gauge", ["gpu"]),
    "llm_gpu_power_watts": ("gauge", ["gpu"]),
    "llm_board_power_watts": ("gauge", ["gpu"]),
}
OF_RUNNERS = {
    "llm_runner_state": ("gauge", ["model", "pid", "state"]),
    "llm_runner_memory_bytes": ("gauge", ["model", "pid"]),
    "llm_runner_tokens_per_second": ("gauge", ["model", "pid"]),
    "llm_runner_tokens": ("counter", ["model", "pid"]),
}
GPU = {
    "index": 0,
    "utilization_percent": 37,
    "memory_used_mb": 5120,
    "memory_total_mb": 65536,
    "temperature_c": 54,
    "power_w": 61.5,
    "board_power_w": None,
}
SILENT = {**dict.fromkeys(GPU), "index": 1, "board_power_w": 12.3}
RUNNER = {
    "pid": 7,
    "model": "m:latest",
    "state": "busy",
    "memory_mb": 3,
    "tokens": 12,
    "tokens_per_second": 1.5,
}


def parse(text):
    """Return {metric: family}; the text must be as Prometheus takes it, each metric once."""
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families)
    assert text.endswith("\n")
    return {family.name: family for family in families}


def shapes(families):
    return {
        name: (family.type, sorted(family.samples[0].labels)) for name, family in families.items()
    }


def value(families, name, **labels):
    (found,) = [each.value for each in families[name].samples if each.labels == labels]
    return found


def scrape(service):
    answer = service.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    return parse(answer.text)


@pytest.fixture
def app():
    module = importlib.import_module("app")
    module.machine.measure()
    return module


@pytest.fixture
def told(app, monkeypatch):
    """Return what /metrics says where /api/stats has these figures."""
    base = app.figures.stats()

    def tell(**figures):
        monkeypatch.setattr(app.figures, "stats", lambda: base | figures)
        return parse(app.figures.metrics_text())

    return tell


def test_every_metric_is_there_with_its_type_and_labels(service):
    service.load(GEMMA, num_predict=1)
    families = wait_for(
        lambda: (found := scrape(service)) and "llm_runner_state" in found and found, 10, "a runner"
    )
    assert shapes(families) == ALWAYS | OF_RUNNERS
    for family in families.values():
        assert family.documentation
        for sample in family.samples:
            assert sample.name == family.name + ("_total" if family.type == "counter" else "")
    clear(service)


def test_the_figures_are_those_of_stats_in_base_units(service):
    families, shown = scrape(service), stats(service)
    assert value(families, "llm_memory_total_bytes") == shown["memory"]["total_mb"] * 2**20
    assert value(families, "llm_disk_total_bytes") == shown["disk"]["total_bytes"]
    assert value(families, "llm_ollama_restarts") == shown["ollama"]["restarts"]
    assert value(families, "llm_gpu_state", state=shown["gpu"]) == 1
    assert 0 <= value(families, "llm_cpu_utilization_ratio") <= 1


def test_clears_and_resets_are_counted(service):
    def counts():
        families = scrape(service)
        return value(families, "llm_clears"), value(families, "llm_resets")

    clears, resets = counts()
    clear(service)
    assert counts() == (clears + 1, resets)
    assert service.post("/api/session/reset").status_code == 200
    assert counts() == (clears + 2, resets + 1)  # a reset clears, too
    clear(service)


def test_the_ends_of_downloads_are_counted(service):
    before = scrape(service)
    body = {"model": "127.0.0.1:1/no/such", "insecure": True}
    assert service.post("/api/models/pull", json=body).status_code == 502
    after = scrape(service)
    error = {"outcome": "error"}
    assert value(after, "llm_downloads", **error) == value(before, "llm_downloads", **error) + 1


def test_a_gpu_in_base_units(told):
    families = told(gpu="ok", gpus=[GPU, SILENT])
    assert {name: shapes(families)[name] for name in OF_GPUS} == OF_GPUS
    assert value(families, "llm_gpu_utilization_ratio", gpu="0") == 0.37
    assert value(families, "llm_gpu_memory_used_bytes", gpu="0") == 5 * 2**30
    assert value(families, "llm_gpu_memory_total_bytes", gpu="0") == 64 * 2**30
    assert value(families, "llm_gpu_temperature_celsius", gpu="0") == 54
    assert value(families, "llm_gpu_power_watts", gpu="0") == 61.5
    assert value(families, "llm_board_power_watts", gpu="1") == 12.3


def test_what_is_unknown_is_left_out(told):
    families = told(gpu="ok", gpus=[SILENT], cpu_percent=None, disk=None)
    unknown = {*OF_GPUS, *OF_RUNNERS, "llm_cpu_utilization_ratio"} - {"llm_board_power_watts"}
    unknown |= {name for name in ALWAYS if name.startswith("llm_disk")}
    assert not unknown & families.keys()
    assert [each.labels for each in told(gpus=[GPU, SILENT])["llm_gpu_power_watts"].samples] == [
        {"gpu": "0"}
    ]


def test_zero_is_a_figure(told):
    families = told(gpus=[{**GPU, "utilization_percent": 0}], cpu_percent=0.0)
    assert value(families, "llm_gpu_utilization_ratio", gpu="0") == 0
    assert value(families, "llm_cpu_utilization_ratio") == 0


@pytest.mark.parametrize("name", ['a"b', "a\\b", "a\nb", 'a\\n"} 1\nb', "ä", None])
def test_labels_are_escaped(told, name):
    families = told(runners=[{**RUNNER, "model": name}])
    labels = {"model": name or "unknown", "pid": "7"}
    assert value(families, "llm_runner_tokens", **labels) == 12
    assert value(families, "llm_runner_memory_bytes", **labels) == 3 * 2**20
    assert value(families, "llm_runner_state", **labels, state="busy") == 1


def test_two_runners_of_one_model_are_two(told):
    families = told(runners=[RUNNER, {**RUNNER, "pid": 8, "state": "orphan"}])
    assert len(families["llm_runner_state"].samples) == 2


@pytest.mark.parametrize("up", [True, False])
def test_it_is_up_where_health_finds_no_fault(app, told, monkeypatch, up):
    monkeypatch.setattr(app.figures, "_is_up", lambda: up)
    families = told(gpu="lost")
    assert value(families, "llm_up") == up
    assert value(families, "llm_gpu_state", state="lost") == 1
