"""What of the environment reaches Ollama: what a real env(1) makes of the changes."""

import re
import subprocess

import pytest

from llm_service.environment import RUNNER_SETTINGS, blinding, changes

BLINDING = [
    "LLAMA_API_KEY",
    "LLAMA_ARG_API_KEY",
    "LLAMA_ARG_API_KEY_FILE",
    "LLAMA_ARG_API_PREFIX",
    "LLAMA_ARG_ENDPOINT_SLOTS",
    "LLAMA_ARG_NO_ENDPOINT_SLOTS",
    "LLAMA_ARG_LOG_FILE",
    "LLAMA_ARG_LOG_VERBOSITY",
    "LLAMA_ARG_NO_LOG_PREFIX",
]
HARMLESS = ["LLAMA_ARG_THREADS", "LLAMA_CACHE", "LLAMA_ARG_ENDPOINT_METRICS", "OLLAMA_ORIGINS"]


def ollamas(environ, context_length="8192", gpu_layers="33"):
    """Return the environment that Ollama gets."""
    words = changes(environ, context_length, gpu_layers)
    printed = subprocess.run(
        ["/usr/bin/env", *words, "/usr/bin/env", "-0"], env=environ, stdout=subprocess.PIPE
    )
    assert printed.returncode == 0
    return dict(entry.split("=", 1) for entry in printed.stdout.decode().split("\0")[:-1])


@pytest.mark.parametrize("name", BLINDING)
@pytest.mark.parametrize("value", ["", "0", "secret"])
def test_what_blinds_the_watch_does_not_reach_ollama(name, value):
    assert blinding({name: value, "PATH": "/bin"}) == [name]
    assert name not in ollamas({name: value})


def test_what_does_not_blind_it_reaches_ollama():
    environ = dict.fromkeys(HARMLESS, "1")
    assert blinding(environ) == []
    assert ollamas(environ).items() >= environ.items()


@pytest.mark.parametrize("name", [*RUNNER_SETTINGS, "LLAMA_ARG_CHAT_TEMPLATE_FILE"])
def test_what_is_set_to_nothing_is_not_set(name):
    assert ollamas({name: ""}).get(name) == ollamas({}).get(name)


def test_an_empty_variable_of_others_stays():
    assert ollamas({"CUDA_VISIBLE_DEVICES": ""})["CUDA_VISIBLE_DEVICES"] == ""


def test_ollama_never_sees_the_token():
    assert "LLM_API_TOKEN" not in ollamas({"LLM_API_TOKEN": "secret"})


@pytest.mark.parametrize(
    "environ, gpu_layers, layers",
    [
        ({}, "33", "33"),
        ({}, "-1", "all"),
        ({}, "auto", None),
        ({"LLAMA_ARG_N_GPU_LAYERS": ""}, "7", "7"),
        ({"LLAMA_ARG_N_GPU_LAYERS": ""}, "auto", None),
        ({"LLAMA_ARG_N_GPU_LAYERS": "5"}, "-1", "5"),
    ],
)
def test_the_layers_are_the_settings_unless_the_runners_own_is_given(environ, gpu_layers, layers):
    assert ollamas(environ, gpu_layers=gpu_layers).get("LLAMA_ARG_N_GPU_LAYERS") == layers


def test_each_pattern_refuses_nonsense():
    for pattern, takes in RUNNER_SETTINGS.values():
        assert not re.fullmatch(pattern, "abc") and not re.fullmatch(pattern, "")
        assert takes
