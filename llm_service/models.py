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
        loaded = [loaded_entry(model) for model in self._watch.server_state.loaded_now()]
        return {"loaded_models": loaded, "count": len(loaded)}

    def prune(self, older_than_s: float, dry_run: bool) -> Json:
        """Return the answer of ``POST /api/models/prune``."""
        freed, files = self._downloads.prune(older_than_s, dry_run)
        would = "would come free" if dry_run else "came free"
        return {
            "status": "success",
            "message": f"{freed // MB} MB of {files} unused files {would}.",
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
        self._watch.ollama.version(1)  # one that hangs would look busy
        cleared = self._session.clear(model, force)
        if not cleared["verified"]:
            words = 'loads, or is in the middle of an answer: try again, or send "force": true'
            if cleared["unknown_processes"]:
                pid = cleared["unknown_processes"][0]
                words = f"may be what process {pid} loads: try again when it has loaded"
            raise ServiceError("model_busy", f"{model} {words}.")
        self._check_deletable(model)  # the files may be others now
        files = self._store.files_of(model)
        try:
            self._watch.ollama.delete(model)
        except ServiceError as e:  # it may have taken the manifest before it failed
            if name_key(model) in self._store.manifests.there():
                raise
            log.warning("delete %s: some of its files stay: %s", model, e)
        return bytes_freed([file for file in files if not os.path.lexists(file.path)])

    def _check_deletable(self, model: str) -> None:
        self._store.manifests.check_deletable(model)
        self._store.require(model)

    def _list(self) -> str:
        loaded = self._watch.server_state.loaded_now()
        by_name = {model["name"]: model for model in loaded}
        by_digest = {model.get("digest"): model for model in loaded}
        by_both = {(model["name"], model.get("digest")): model for model in loaded}
        own = self._own_bytes()
        listed = []
        for model in self._watch.server_state.tags(LIST_S):
            name = model["name"]
            digest = model.get("digest")
            match = by_both.get((name, digest))
            if not match:  # an old version has that name yet, or a copy was loaded by its own
                match = by_name.get(name) or by_digest.get(digest, {})
            entry = model_entry(model, match)
            entry["frees_bytes"] = own.get(plain_key(name) or "")
            listed.append(entry)
        answer = {"models": listed, "count": len(listed)}
        return json.dumps(answer, separators=(",", ":")) + "\n"

    def _own_bytes(self) -> dict[str, int]:
        """Map each model's key to what a delete would free."""
        signature = self._store.signature()
        known, own = self._own
        if signature is None or signature != known:
            own = own_bytes(self._store)
            self._own = signature, own
        return own


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
                paths.append(str(store.blob(digest)))
        own[key] = bytes_freed(seen_files(paths))
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
        return timestamp(datetime.datetime.fromisoformat(moment).timestamp())
    except (ValueError, OverflowError):
        return None
