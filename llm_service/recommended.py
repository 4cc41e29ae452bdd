"""Models to begin with: Ollama's list and two small ones, and how large they are."""

from llm_service.errors import ServiceError
from llm_service.registry import Asking, Registries
from llm_service.sharing import SharedRun, in_parallel
from llm_service.store import Store
from llm_service.updates import SAME_FOR_ALL, ended_since, pull_sizes, read_content
from ollama_client import Json, Ollama, name_place

THEIRS_MOST = 10
ONE_S = 10  # a registry about one model
ALL_S = 2 * ONE_S + 5
# Ollama's list has none for a small machine. The memory is that of the files, of a context of
# 8,192, of the buffers for a batch and of a process on a GPU; the size is about that of 2026.
SMALL = [
    {
        "name": "llama3.2:1b",
        "description": "Small and quick, also on a CPU",
        "vram_bytes": 2_400_000_000,
        "size_bytes": 1_320_000_000,
    },
    {
        "name": "llama3.1:8b",
        "description": "An all-rounder",
        "vram_bytes": 6_900_000_000,
        "size_bytes": 4_920_000_000,
    },
]
NOT_ASKED: Json = {
    "size_bytes": None,
    "download_bytes": None,
    "code": None,
    "reason": None,
}
NO_SIZE = "What its registry sent is no manifest."


class Recommended:
    """Lists them, and asks their registries when told to."""

    def __init__(
        self,
        ollama: Ollama,
        store: Store,
        registries: Registries,
        one_s: float = ONE_S,
    ):
        self._ollama = ollama
        self._store = store
        self._registries = registries
        self._one_s = one_s
        self._runs = SharedRun(ended_since)

    def models(self, sizes: bool) -> Json:
        """Return the answer of ``GET /api/models/recommendations``."""
        small = {each["name"] for each in SMALL}
        theirs = self._ollama.recommendations()
        others = [each for each in theirs if each["name"] not in small]
        listed = [*SMALL, *others[:THEIRS_MOST]]
        models = [{**NOT_ASKED, **each} for each in listed]
        if sizes:
            models = self._runs.get(lambda: self._with_sizes(models), ALL_S)
        return {"models": models}

    def _with_sizes(self, models: list[Json]) -> list[Json]:
        """Ask about the first one alone: what stops it mostly stops all."""
        asking = self._registries.asking()
        first, *others = models
        told = self._with_size(first, asking)
        if told["code"] in SAME_FOR_ALL:
            same = {"code": told["code"], "reason": told["reason"]}
            return [{**each, **same} for each in models]

        def ask(model: Json) -> Json:
            return self._with_size(model, asking)

        return [told, *in_parallel(ask, others)]

    def _with_size(self, model: Json, asking: Asking) -> Json:
        """Return the model with what a pull of it would fetch, or why nobody knows."""
        try:
            sizes = self._sizes(model["name"], asking)
        except ServiceError as e:
            return {**model, "code": e.code, "reason": str(e)}
        return {**model, **pull_sizes(self._store, sizes)}

    def _sizes(self, name: str, asking: Asking) -> dict[str, int]:
        place = name_place(name)
        if not place:
            raise ServiceError("bad_model_name", "This is no model's name.")
        host, namespace, model, tag = place
        raw = asking.manifest(host, f"{namespace}/{model}", tag, self._one_s)
        content = read_content(raw)
        if not content:
            raise ServiceError("registry_error", NO_SIZE)
        return content.sizes
