"""What is newer in the models' registries than on the disk, and how much a pull would fetch."""

import collections
import json
import pathlib
import threading
import time
import typing

from llm_service.errors import NO_MANIFEST, ServiceError, clean
from llm_service.manifests import Manifest
from llm_service.registry import Asking, Registries
from llm_service.sharing import Outcome, SharedRun
from llm_service.store import Store
from ollama_client import DIGEST, Json, name_key

ALL_S = 29  # for all of it
ONE_S = 10  # one registry about one model
AT_ONCE = 4
LAYER_LIMIT_BYTES = 1 << 50
REFUSALS = 2  # then a registry is asked no more about its other models, if it was one of these
SAME_FOR_ALL = (
    "proxy_error",
    "registry_busy",
    "registry_certificate",
    "registry_insecure",
    "registry_unreachable",
)
ONLY_HERE = "It was made here, and no registry knows it"
UNKNOWN_NAME = "Its registry does not know this name: it is a copy made here, or was removed there"
MADE_HERE = "It was made here: a pull would replace it by what its registry has under this name"
TOO_LATE = "The time was over before its registry had answered: ask for it alone, by ?model="


class Content(typing.NamedTuple):
    """What a manifest names. Its spaces, its order and its time are no content."""

    kinds: set[tuple[str, str]]  # of each layer: media type, digest
    sizes: dict[str, int]  # digest (hex): bytes


class Updates:
    """Asks the registries, for one caller at a time, and keeps what they last said."""

    def __init__(
        self,
        store: Store,
        registries: Registries,
        all_s: float = ALL_S,
        one_s: float = ONE_S,
    ):
        self._store = store
        self._registries = registries
        self._all_s = all_s
        self._one_s = one_s
        self._runs = SharedRun(ended_since)
        self._states: dict[str, str] | None = None  # of each model that was asked about

    def newer_count(self) -> int | None:
        """Return how many were newer when registries were last asked; None if never."""
        if self._states is None:
            return None
        return list(self._states.values()).count("newer")

    def ask(self, model: str | None, insecure: bool) -> Json:
        """Return the answer of ``GET /api/models/updates``, of one model or of all."""
        due = self._store.manifests.of(model)
        deadline = time.monotonic() + self._all_s

        def work() -> Json:
            asking = self._registries.asking(insecure)
            answers = Round(self._store, asking, deadline, self._one_s).run(due)
            self._note(answers, is_all=model is None)
            return {"models": answers, "count": len(answers)}

        key = model and name_key(model), insecure
        return self._runs.get(work, self._all_s, key)

    def _note(self, answers: list[Json], is_all: bool) -> None:
        states = {} if is_all else dict(self._states or {})
        for answer in answers:
            states[answer["name"]] = answer["state"]
        self._states = states


class Round:
    """One question about each of some models, several at once."""

    def __init__(self, store: Store, asking: Asking, deadline: float, one_s: float):
        self._store = store
        self._asking = asking
        self._deadline = deadline
        self._one_s = one_s
        self._left: collections.deque[Manifest] = collections.deque()
        self._answers: dict[str, Json] = {}  # by the manifest's path
        # By host: what tells that it is not worth while to ask it about other models.
        self._refusals: dict[str, list[ServiceError]] = collections.defaultdict(list)

    def run(self, due: list[Manifest]) -> list[Json]:
        """Ask until all have answered, or the time is over."""
        self._left.extend(due)
        threads = []
        for _ in range(min(AT_ONCE, len(due))):
            thread = threading.Thread(target=self._work, name="updates", daemon=True)
            thread.start()
            threads.append(thread)
        for thread in threads:
            thread.join(max(0, self._deadline - time.monotonic()))
        self._left.clear()
        late = ServiceError("timeout", TOO_LATE)
        answers = []
        for manifest in due:
            answer = self._answers.get(manifest.path)
            answers.append(answer or unknown(manifest, late))
        return answers

    def _work(self) -> None:
        while self._left and time.monotonic() < self._deadline:
            try:
                manifest = self._left.popleft()
            except IndexError:  # another thread has taken the last one
                return
            try:
                self._answers[manifest.path] = self._compare(manifest)
            except ServiceError as e:
                self._answers[manifest.path] = unknown(manifest, e)

    def _compare(self, manifest: Manifest) -> Json:
        raw = read(manifest)
        ours = read_content(raw)
        there = read_content(self._fetch(manifest, raw))
        if not there:
            raise ServiceError("registry_error", f"What it sent is no manifest: {NO_MANIFEST}.")
        is_current = ours is not None and ours.kinds == there.kinds
        answer = {
            "name": manifest.name,
            "state": "current" if is_current else "newer",
            "made_here": written_here(raw),
            "code": None,
            "reason": None,
            **pull_sizes(self._store, there.sizes),
        }
        if written_here(raw) and not is_current:
            answer.update(state="unknown", code="made_here", reason=f"{MADE_HERE}.")
        return answer

    def _fetch(self, manifest: Manifest, raw: bytes) -> bytes:
        """Return what the registry has; ask no more where it has failed for all."""
        host, namespace, model, tag = manifest.place.split("/")
        refusals = self._refusals[host]
        if len(refusals) >= REFUSALS:
            raise refusals[-1]
        limit_s = max(0, min(self._one_s, self._deadline - time.monotonic()))
        try:
            return self._asking.manifest(host, f"{namespace}/{model}", tag, limit_s)
        except ServiceError as e:
            if e.code in SAME_FOR_ALL:
                refusals.append(e)
            if e.code != "model_not_found":
                raise
        if written_here(raw):
            raise ServiceError("made_here", f"{ONLY_HERE}.")
        raise ServiceError("not_in_registry", f"{UNKNOWN_NAME}.")


def pull_sizes(store: Store, sizes: dict[str, int]) -> Json:
    """Return the bytes of these files, by digest, and of those that a pull would fetch."""
    present = store.sizes(sizes)
    missing = [size for digest, size in sizes.items() if digest not in present]
    return {
        "size_bytes": sum(sizes.values()),
        "download_bytes": sum(missing),
    }


def read(manifest: Manifest) -> bytes:
    """Return a manifest's text. Raises ServiceError ``manifest_unreadable``."""
    try:
        return pathlib.Path(manifest.path).read_bytes()
    except OSError as e:
        words = f"Its manifest cannot be read: {clean(e)}."
        raise ServiceError("manifest_unreadable", words) from e


def unknown(manifest: Manifest, error: ServiceError) -> Json:
    """Describe a model of which nobody knows whether it is current."""
    return {
        "name": manifest.name,
        "state": "unknown",
        "made_here": error.code == "made_here",
        "code": error.code,
        "reason": str(error),
        "size_bytes": None,
        "download_bytes": None,
    }


def read_content(raw: bytes) -> Content | None:
    """Read a manifest; return None for what is none."""
    kinds = set()
    sizes = {}
    try:
        manifest = json.loads(raw)
        for layer in [*manifest["layers"], manifest.get("config")]:
            if layer is None:
                continue
            digest = DIGEST.fullmatch(layer["digest"])
            size = layer["size"]
            if not digest or type(size) is not int or not 0 <= size < LAYER_LIMIT_BYTES:
                return None
            kinds.add((str(layer.get("mediaType")), digest[1].lower()))
            sizes[digest[1].lower()] = size
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return Content(kinds, sizes) if sizes else None


def written_here(raw: bytes) -> bool:
    """Tell whether an Ollama has written a manifest for what was made with it.

    It keeps a registry's bytes as they came, and ends its own with a line feed.
    [manifest.WriteManifest]
    """
    return raw.startswith(b'{"schemaVersion":2,"mediaType":') and raw.endswith(b"}\n")


def ended_since(outcome: Outcome, key: object, came: float) -> bool:
    """A round serves who came before its end and asked the same."""
    return outcome.ended >= came and outcome.key == key
