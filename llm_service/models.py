"""Answers about the models on the disk and in memory."""

import collections
import datetime
import json
import logging
import os
import typing

from llm_service.downloads import Downloads
from llm_service.files import bytes_freed, seen_files
from llm_service.processes import MB
from llm_service.reports import not_agreed
from llm_service.session import CLEAR_S, Session
from llm_service.sharing import SharedRun, began_since
from llm_service.store import Store
from llm_service.watch import Watch
from ollama_client import Json, ServiceError, name_key, plain_key, timestamp

log = logging.getLogger("llm-service")
LIST_S = 1.2


class Models:
    """Lists, deletes and prunes models."""

    def __init__(self, watch: Watch, session: Session, downloads: Downloads):
        self._watch = watch
        self._session = session
        self._downloads = downloads
        self._store = watch.store
        self._listing = SharedRun(began_since)
        self._own: tuple[tuple | None, dict[str, int]] = (None, {})  # with the store's signature

    def list(self) -> str:
        """Return the answer of ``GET /api/models``, as JSON text."""
        return self._listing.get(self._list, CLEAR_S)

    def loaded(self) -> Json:
        """Return the answer of ``GET /api/models/loaded``."""
        lines = self._watch.server_state.loaded_now()
        loaded = [loaded_entry(line) for line in lines]
        return {
            "loaded_models": loaded,
            "count": len(loaded),
        }

    def prune(self, older_than_s: float, dry_run: bool) -> Json:
        """Return the answer of ``POST /api/models/prune``."""
        freed, files = self._downloads.prune(older_than_s, dry_run)
        freed_mb = freed // MB
        would = "would come free" if dry_run else "came free"
        return {
            "status": "success",
            "message": f"{freed_mb} MB of {files} unused files {would}.",
            "freed_bytes": freed,
            "files": files,
        }

    def delete(self, model: str, force: bool) -> int:
        """Unload and delete a model; return the bytes that came free."""
        self._store.check_changeable()
        self._check_deletable(model)
        if self._downloads.running(model):
            words = f"{model} is being downloaded: cancel that first."
            raise ServiceError("model_being_pulled", words)
        self._watch.ollama.version(1)  # with one that hangs nothing is unloaded
        cleared = self._session.clear(model, force)
        if not cleared["verified"]:
            raise not_unloaded(model, cleared)
        self._check_deletable(model)  # the files may be others now
        files = self._store.files_of(model)
        try:
            self._watch.ollama.delete(model)
        except ServiceError as e:  # it may have taken the manifest before it failed
            there = self._store.manifests.there()
            if name_key(model) in there:
                raise
            log.warning("delete %s: some of its files stay: %s", model, e)
        gone = [file for file in files if not os.path.lexists(file.path)]
        return bytes_freed(gone)

    def _check_deletable(self, model: str) -> None:
        """Raise ServiceError where it is not there, or Ollama would delete another one."""
        self._store.manifests.check_deletable(model)
        self._store.require(model)

    def _list(self) -> str:
        """Make the answer: every model on the disk, and what of it is loaded."""
        loaded = LoadedLines(self._watch.server_state.loaded_now())
        signature = self._store.signature()
        own = self._own_bytes(signature)
        listed = []
        for model in self._watch.server_state.tags(LIST_S, signature):
            key = plain_key(model["name"]) or ""
            entry = model_entry(model, loaded.line_of(model))
            entry["frees_bytes"] = own.get(key)
            listed.append(entry)
        answer = {
            "models": listed,
            "count": len(listed),
        }
        text = json.dumps(answer, separators=(",", ":"))
        return text + "\n"

    def _own_bytes(self, signature: tuple | None) -> dict[str, int]:
        """Map each model's key to what a delete would free, in the store of this signature."""
        known, own = self._own
        if signature is None or signature != known:
            own = own_bytes(self._store)
            self._own = signature, own
        return own


def not_unloaded(model: str, report: Json) -> ServiceError:
    """Make the error of a model that a clear has not unloaded."""
    if not_agreed(report):
        words = f"Ollama did not unload {model} in time"
        return ServiceError("ollama_timeout", f'{words}: try again, or send "force": true.')
    words = 'loads, or is in the middle of an answer: try again, or send "force": true'
    if report["unknown_processes"]:
        pid = report["unknown_processes"][0]
        words = f"may be what process {pid} loads: try again when it has loaded"
    return ServiceError("model_busy", f"{model} {words}.")


class LoadedLines:
    """The lines of ``/api/ps``, to be found by the models on the disk."""

    def __init__(self, lines: list[Json]):
        self._by_name: dict[str, Json] = {}
        self._by_digest: dict[str | None, Json] = {}
        self._by_both: dict[tuple[str, str | None], Json] = {}
        for line in lines:
            name = line["name"]
            digest = line.get("digest")
            self._by_name[name] = line
            self._by_digest[digest] = line
            self._by_both[name, digest] = line

    def line_of(self, model: Json) -> Json:
        """Return the line of a model; {} where it is not loaded."""
        name = model["name"]
        digest = model.get("digest")
        line = self._by_both.get((name, digest))
        # Else an old version has that name yet, or a copy was loaded by its own
        line = line or self._by_name.get(name)
        return line or self._by_digest.get(digest, {})


def own_bytes(store: Store) -> dict[str, int]:
    """Map each model's key to the bytes of the files that no other model names."""
    models = store.models()
    users: collections.Counter[str] = collections.Counter()
    for digests in models.values():
        users.update(set(digests))
    own = {}
    for key, digests in models.items():
        paths = []
        for digest in set(digests):
            if users[digest] == 1:
                path = store.blob(digest)
                paths.append(str(path))
        files = seen_files(paths)
        own[key] = bytes_freed(files)
    return own


def model_entry(model: Json, loaded: Json) -> Json:
    """Describe a model on disk; ``loaded`` is its line of ``/api/ps``, or {}."""
    return {
        "name": model["name"],
        "size": model.get("size"),
        "modified_at": utc(model.get("modified_at")),
        "digest": model.get("digest"),
        "details": model.get("details") or {},
        "loaded": bool(loaded),
        "loaded_as": loaded.get("name"),
        "loaded_digest": loaded.get("digest"),
        "size_vram": loaded.get("size_vram"),
        "expires_at": utc(loaded.get("expires_at")),
        "size_loaded": loaded.get("size"),
        "context_length": loaded.get("context_length"),
    }


def loaded_entry(model: Json) -> Json:
    """Describe a model in memory by its line of ``/api/ps``."""
    return {
        "name": model["name"],
        "size": model.get("size"),
        "size_vram": model.get("size_vram"),
        "context_length": model.get("context_length"),
        "expires_at": utc(model.get("expires_at")),
    }


def utc(moment: typing.Any) -> str | None:
    """Bring Ollama's time, which carries its own zone, to UTC."""
    if not isinstance(moment, str):
        return None
    if moment.endswith("Z"):
        return moment
    try:
        at = datetime.datetime.fromisoformat(moment)
        return timestamp(at.timestamp())
    except (ValueError, OverflowError):
        return None
