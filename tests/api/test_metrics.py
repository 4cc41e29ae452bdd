"""/metrics, read by Prometheus' own parser."""

import socket

import pytest
from prometheus_client.parser import text_string_to_metric_families

import app
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
    "llm_healings_failed": ("counter", []),
    "llm_callers_connections": ("gauge", []),
    "llm_callers_waiting": ("gauge", []),
    "llm_callers_longest_wait_seconds": ("gauge", []),
    "llm_ollama_restarts": ("counter", []),
}
ASKED = {  # once these were asked for
    "llm_models_damaged": ("gauge", []),
    "llm_models_newer": ("gauge", []),
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
    "llm_runner_answers": ("gauge", ["model", "pid"]),
}
OF_MODELS = {
    "llm_runner_tokens": ("counter", ["model"]),
    "llm_runner_seconds": ("counter", ["model"]),
    "llm_runner_prompt_tokens": ("counter", ["model"]),
    "llm_runner_prompt_seconds": ("counter", ["model"]),
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
    "answers": 2,
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
def told(monkeypatch):
    """Return what /metrics says where /api/stats has these figures."""
    app.machine.measure()
    base = app.stats_report.report()

    def tell(**figures):
        monkeypatch.setattr(app.stats_report, "report_of", lambda _server: base | figures)
        return parse(app.metrics_report.text())

    return tell


def test_every_metric_is_there_with_its_type_and_labels(service):
    service.load(GEMMA, num_predict=1)
    service.post("/api/models/verify?stream=false")
    service.get("/api/models/updates")
    wanted = ALWAYS | ASKED | OF_RUNNERS | OF_MODELS  # the sums are there a moment earlier
    families = wait_for(
        lambda: (found := scrape(service)).keys() >= wanted.keys() and found, 60, "all of them"
    )
    assert shapes(families) == wanted
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
    families = told(gpu="ok", gpus=[SILENT], cpu_percent=None, disk=None, callers=None)
    unknown = {*OF_GPUS, *OF_RUNNERS, "llm_cpu_utilization_ratio"} - {"llm_board_power_watts"}
    unknown |= {name for name in ALWAYS if name.startswith(("llm_disk", "llm_callers"))}
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
    assert value(families, "llm_runner_answers", **labels) == 2
    assert value(families, "llm_runner_memory_bytes", **labels) == 3 * 2**20
    assert value(families, "llm_runner_state", **labels, state="busy") == 1


def test_two_runners_of_one_model_are_two(told):
    families = told(runners=[RUNNER, {**RUNNER, "pid": 8, "state": "orphan"}])
    assert len(families["llm_runner_state"].samples) == 2


@pytest.mark.parametrize("up", [True, False])
def test_up_is_what_health_says(told, monkeypatch, up):
    monkeypatch.setattr(app.metrics_report, "_is_up", lambda _server: up)
    assert value(told(), "llm_up") == up


@pytest.mark.parametrize("state", ["none", "ok", "lost"])
def test_the_state_of_the_gpus_is_a_label(told, state):
    assert value(told(gpu=state), "llm_gpu_state", state=state) == 1


# Counted by the runners themselves


def sums(service):
    """Return what the four totals of the model are."""
    families = scrape(service)
    return [value(families, name, model=GEMMA) if name in families else 0 for name in OF_MODELS]


def ask(service, **options):
    """Ask for a short answer; return the tokens and the prompt's tokens that it took."""
    body = {"model": GEMMA, "raw": True, "stream": False, "prompt": f"{options} and more"}
    answer = service.ollama("POST", "/api/generate", json={**body, "options": options}).json()
    return answer["eval_count"], answer["prompt_eval_count"]


def test_tokens_are_counted_exactly_also_of_answers_shorter_than_a_look(service):
    clear(service)  # what other tests have asked is counted by now, or never
    tokens, seconds, prompt_tokens, prompt_seconds = sums(service)
    taken = [ask(service, num_predict=n, seed=n) for n in range(1, 9)]
    expected = tokens + sum(each for each, _ in taken)
    wait_for(lambda: sums(service)[0] >= expected, 60, "all tokens are counted")
    after = sums(service)
    assert after[0] == expected
    assert 0 < after[2] - prompt_tokens <= sum(each for _, each in taken)  # some were cached
    assert after[1] > seconds and after[3] > prompt_seconds
    clear(service)


def test_what_was_counted_does_not_fall_when_a_runner_is_replaced(service):
    clear(service)
    before, _, *_ = sums(service)
    tokens, _ = ask(service, num_predict=5)  # it may end by itself sooner
    wait_for(lambda: sums(service)[0] >= before + tokens, 60, "the tokens are counted")
    before = sums(service)
    clear(service)
    assert sums(service) == before
    tokens, _ = ask(service, num_predict=7)
    wait_for(lambda: sums(service)[0] >= before[0] + tokens, 60, "the next runner's, too")
    assert sums(service)[0] == before[0] + tokens
    clear(service)


def test_callers_are_told(service):
    with socket.create_connection(("127.0.0.1", service.ollama_port)) as caller:
        caller.sendall(b"POST /api/generate HTTP/1.1\r\n")  # half a request

        def seen():  # right after he has come his wait is rounded to 0.0 s
            told = stats(service)["callers"]
            return told["waiting"] == 1 and told["longest_wait_s"] > 0 and told

        told = wait_for(seen, 60, "he is seen")
        families = scrape(service)
    assert told["connections"] >= 1 and told["longest_wait_s"] > 0
    assert value(families, "llm_callers_waiting") == 1
    assert value(families, "llm_callers_connections") >= 1
    assert value(families, "llm_callers_longest_wait_seconds") > 0
    wait_for(lambda: stats(service)["callers"]["waiting"] == 0, 60, "he has left")


def test_what_was_never_asked_for_is_left_out(told):
    assert not told().keys() & ASKED.keys()


def test_what_was_found_last_is_counted(told, monkeypatch):
    monkeypatch.setattr(app.verifying, "damaged_count", lambda: 2)
    monkeypatch.setattr(app.updates, "newer_count", lambda: 0)
    families = told()
    assert value(families, "llm_models_damaged") == 2
    assert value(families, "llm_models_newer") == 0
