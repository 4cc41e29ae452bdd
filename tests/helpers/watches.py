"""A watch whose looks are made by hand, and what a runner tells it."""

import os

from llm_service.callers import Callers
from llm_service.downloads import Downloads
from llm_service.machine import Machine
from llm_service.matching import Matching
from llm_service.processes import Processes
from llm_service.store import Store
from llm_service.watch import Watch
from ollama_client import Ollama

STUCK_S = 40
FRESH = {"id": 0, "is_processing": False}  # before its first request


def make_watch(runners=()):
    """Return a watch of these runners, beside an Ollama that is not there."""
    found = Processes(os.devnull)
    found.runners = lambda: list(runners)
    ollama, store = Ollama("http://127.0.0.1:9"), Store("/nonexistent")
    matching = Matching(ollama, store.manifests, found)
    machine = Machine(store, Downloads(ollama, store, found, 1), matching)
    callers = Callers(9, STUCK_S, works=bool)
    return Watch(ollama, store, found, machine, callers, stuck_s=STUCK_S)


def slot(task=1, decoded=5, prompt=10, active=True):
    """Make a slot as llama.cpp's server tells it."""
    return {
        "id_task": task,
        "is_processing": active,
        "n_prompt_tokens_processed": prompt,
        "next_token": [{"n_decoded": decoded}],
    }
