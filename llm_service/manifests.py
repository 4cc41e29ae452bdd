"""The manifests of a model store, read as Ollama reads them.

Names in brackets are Ollama's own functions (0.34.4) whose rule a line follows.
"""

import collections
import contextlib
import glob
import hashlib
import json
import os
import pathlib
import re
import secrets
import shutil
import stat
import threading
import typing

from llm_service.errors import ServiceError, clean, file_errors
from llm_service.files import Ages, below, stamp
from ollama_client import DIGEST, MANIFEST_PLACE, Json, name_key, place_key, plain_key

MANIFEST_LIMIT_BYTES = 1 << 24
SOON_S = 0.5
LENT = "llm-service/unload"  # a model of which each tag is a name lent for a moment
_WEIGHTS = "application/vnd.ollama.image.model"
_BLOB_DIGEST = re.compile(r"sha256[:-][0-9a-fA-F]{64}")  # [manifest.ValidateDigest]


class Manifest(typing.NamedTuple):
    """A file where Ollama looks for a model's manifest, or another one beside these."""

    path: str
    layers: list[str] | None  # digests, those of the weights first; None: Ollama refuses it
    named: set[str]  # every digest that its text names, in lower case
    whole: bool  # whether that are all
    weights: tuple[str, ...] = ()  # digests (hex) of their files, in the order of the manifest
    ids: tuple[str, ...] = ()  # its own digests (hex): by one of these Ollama lists what it loaded

    @property
    def digests(self) -> list[str]:
        """Return the digests (hex), those of the weights first."""
        return [digest[7:] for digest in self.layers or []]

    @property
    def place(self) -> str:
        """Return ``host/namespace/model/tag``."""
        parts = self.path.split("/")
        return "/".join(parts[-4:])

    @property
    def name(self) -> str:
        """Return the name as Ollama shows it. [Name.DisplayShortest]"""
        host, namespace, model, tag = self.place.split("/")
        if host.lower() != "registry.ollama.ai":
            return f"{host}/{namespace}/{model}:{tag}"
        if namespace.lower() != "library":
            return f"{namespace}/{model}:{tag}"
        return f"{model}:{tag}"


def loadable(manifests: dict[str, list[Manifest]]) -> typing.Iterator[tuple[str, Manifest]]:
    """Yield the models that Ollama can load: the key of each and its manifest."""
    for key, found in manifests.items():
        for manifest in found:
            if manifest.layers:
                yield key, manifest


class Manifests:
    """What lies under ``manifests/`` of a store."""

    def __init__(self, store: pathlib.Path, ages: Ages):
        self._ages = ages
        self._root, self._blobs = f"{store}/manifests", f"{store}/blobs"
        self._lent = pathlib.Path(self._root, "registry.ollama.ai", LENT)
        self._lending = threading.Lock()
        self._signature: tuple[tuple, ...] = ()
        self._read: tuple[tuple | None, dict[str, list[Manifest]]] = (None, {})
        self._late: threading.Thread | None = None  # a reading that the disk keeps waiting

    @property
    def last(self) -> tuple[tuple | None, dict[str, list[Manifest]]]:
        """Return signature and manifests as they were read last, without a look at the disk."""
        return self._read

    def there(self) -> dict[str, list[Manifest]]:
        """Map keys to the files where Ollama looks; several differ in upper and lower case."""
        signature = self.signature()
        known, manifests = self._read
        if signature is None or signature != known:
            manifests = self._read_manifests()
            self._read = signature, manifests
        return manifests

    def soon(self, limit_s: float = SOON_S) -> dict[str, list[Manifest]]:
        """Return what is there, or what was there last where the disk takes longer to tell.

        For what a hanging disk must not hold up, and may be a moment old.
        """
        found: list[dict[str, list[Manifest]]] = []

        def read() -> None:
            found.append(self.there())

        late = self._late
        if late is None or not late.is_alive():
            reading = threading.Thread(target=read, daemon=True)
            reading.start()
            reading.join(limit_s)
            self._late = reading
        if found:
            return found[0]
        return self._read[1]

    @contextlib.contextmanager
    def lent_name(self, weights: typing.Iterable[str]) -> typing.Iterator[str]:
        """Give weights a name for a moment: by it Ollama reaches what has lost its own."""
        tag = secrets.token_hex(8)
        layers = [{"mediaType": _WEIGHTS, "digest": f"sha256:{digest}"} for digest in weights]
        with self._lending:
            try:
                with file_errors():
                    self._lent.mkdir(parents=True, exist_ok=True)
                    manifest = json.dumps({"schemaVersion": 2, "layers": layers})
                    (self._lent / tag).write_text(manifest)
                yield f"{LENT}:{tag}"
            finally:
                self.take_names_back()

    def take_names_back(self) -> None:
        """Remove the names that were lent, also those that an end in between has left."""
        shutil.rmtree(self._lent, ignore_errors=True)
        with contextlib.suppress(OSError):  # there may be none, or one of a user
            self._lent.parent.rmdir()

    def of(self, model: str | None) -> list[Manifest]:
        """Return the manifests of a model, or of all. Raises ServiceError ``model_not_found``."""
        there = self.there()
        if model is None:
            return [manifest for key in sorted(there) for manifest in there[key]]
        found = there.get(name_key(model), [])
        if not found:
            raise ServiceError(
                "model_not_found",
                f"There is no model {model}: GET /api/models lists what is downloaded.",
            )
        return found

    def check_deletable(self, model: str) -> None:
        """Raise ServiceError where Ollama would delete another one, or what another one needs."""
        key, plain = name_key(model), plain_key(model)
        there = self.there()
        if plain and plain != key and (plain in there or key in there):
            raise ServiceError(
                "model_not_addressable",
                f"Ollama takes the end of {model} for where to run, and would delete "
                f"{key}: nothing was deleted. Name {key}, or remove the file of {plain} "
                f"under {self._root}.",
            )
        found = there.get(key)
        if not found:
            return
        if len(found) > 1:
            places = " and ".join(each.place for each in found)
            raise ServiceError(
                "model_not_addressable",
                f"Ollama cannot tell {places} apart: remove one of these files first.",
            )
        if found[0].layers is None:
            raise self.unreadable(found[0].path, "Ollama refuses it")
        for other in self._hurt_by_deleting(found[0]):
            raise ServiceError(
                "model_not_addressable",
                f"With {model} Ollama would remove what {other.place} needs: that is a "
                "link to it, cannot be read, or writes digests in another way. Mend or "
                "remove that first.",
            )

    def _hurt_by_deleting(self, model: Manifest) -> list[Manifest]:
        """Return what would lose its file or a blob with a model.

        [Manifest.RemoveLayers] compares how digests are written, and reads no other manifests.
        """
        others = []
        for each in self.of(None):
            if each.path != model.path:
                others.append(each)
        going = self._going_with(model, others)
        file = None  # of which others may be links
        if not os.path.islink(model.path):
            file = os.path.realpath(model.path)
        hurt = []
        for other in others:
            is_link = os.path.realpath(other.path) == file
            if is_link or _needs(other, going):
                hurt.append(other)
        return hurt

    def _going_with(self, model: Manifest, others: list[Manifest]) -> set[str]:
        """Return the blobs (hex) that Ollama would remove with a model."""
        in_use: set[str] = set()
        for other in others:
            in_use.update(other.layers or [])
        going = set()
        for digest in model.layers or []:
            path = f"{self._blobs}/sha256-{digest[7:]}"
            if digest not in in_use and os.path.lexists(path):
                going.add(digest[7:])
        return going

    def signature(self) -> tuple | None:
        """Return what changes whenever a model does; None where that is not certain."""
        self._ages.note_clock()
        known = self._signature
        try:
            # What is known is looked at first: that takes a call for each, a walk many.
            if not known or known != tuple(stamp(path) for path, *_ in known):
                paths = [self._blobs, self._root]
                paths += [entry.path for entry in below(self._root)]
                known = tuple(map(stamp, paths))
        except OSError:
            known = ()
        if any(self._ages.just_now(changed_ns) for _, changed_ns, *_ in known):
            known = ()  # one more change might not show
        self._signature = known
        return known or None

    def named(self) -> set[str]:
        """Return every digest that any manifest file names, whatever its place and form."""
        found: set[str] = set()
        path = self._root
        if not os.path.lexists(path):
            return found
        try:
            for entry in below(path):
                path = entry.path
                if not entry.is_dir():
                    found |= self._named_by(path)
        except OSError as e:
            raise self.unreadable(path, e) from e
        return found

    def _named_by(self, path: str) -> set[str]:
        """Return what one file names; raise where a model's manifest cannot be read."""
        place = os.path.relpath(path, self._root)
        if not os.path.exists(path):  # a link to a disk that is not mounted may be a folder
            place += "/x" * (3 - place.count("/"))
        models = MANIFEST_PLACE.fullmatch(place)
        try:
            manifest = read_manifest(path)
        except OSError:
            if models and os.path.lexists(path):
                raise
            return set()
        if models and not manifest.whole:
            raise self.unreadable(path, "it is no JSON")
        return manifest.named

    def unreadable(self, path: str, reason: object) -> ServiceError:
        name = os.path.relpath(path, self._root)
        return ServiceError(
            "manifest_unreadable",
            f"The manifest of {clean(name)} cannot be read, so what that model needs is "
            "unknown: pull it again, or copy another model over it (ollama cp) and delete "
            f"it; if it is none, remove the file {clean(path)} ({clean(reason)}).",
        )

    def _read_manifests(self) -> dict[str, list[Manifest]]:
        found = collections.defaultdict(list)
        for path in glob.iglob("*/*/*/*", root_dir=self._root):  # [manifest.Manifests]
            file = f"{self._root}/{path}"
            if MANIFEST_PLACE.fullmatch(path) and not os.path.isdir(file):
                try:
                    manifest = read_manifest(file)
                except OSError:
                    manifest = Manifest(file, None, set(), False)
                key = place_key(*path.split("/"))
                if not is_lent(key):
                    found[key].append(manifest)
        return dict(found)


def is_lent(name: str) -> bool:
    """Tell whether a model's name is one that was lent for a moment."""
    return name_key(name).startswith(f"{LENT}:")


def read_manifest(path: str) -> Manifest:
    """Read a file as Ollama does, and for every digest in it. Raises OSError."""
    about = os.stat(path)
    if not stat.S_ISREG(about.st_mode) or about.st_size > MANIFEST_LIMIT_BYTES:
        return Manifest(path, None, set(), False)
    raw = pathlib.Path(path).read_bytes()
    found = [raw.decode("latin-1")]
    layers = text = None
    weights: tuple[str, ...] = ()
    with contextlib.suppress(ValueError, RecursionError):
        layers, weights = _layers(raw.decode(errors="replace"))
        found += layers
    with contextlib.suppress(ValueError, RecursionError):
        text = json.dumps(json.loads(raw))  # it may be in any encoding, with any escapes
        found.append(text)
    words = " ".join(found).lower()
    named = set(DIGEST.findall(words))
    whole = layers is not None or text is not None
    # Ollama may or may not have read the line's end behind the manifest.
    ids = []
    for part in dict.fromkeys((raw, raw.rstrip())):
        ids.append(hashlib.sha256(part).hexdigest())
    return Manifest(path, layers, named, whole, weights, tuple(ids))


def _layers(text: str) -> tuple[list[str], tuple[str, ...]]:
    """Return the digests that Ollama reads in a manifest, and those of the weights alone (hex).

    Raises ValueError where Ollama refuses it.

    [manifest.ParseNamedManifest]: Go takes keys in any case, reads null as nothing, and looks at
    nothing behind the first value.
    """
    manifest, _ = _GO_JSON.raw_decode(text.lstrip(" \t\r\n"))
    manifest = _fields(manifest, schemaversion=int, mediatype=str, config=dict, layers=list)
    kinds = {"mediatype": str, "digest": str, "size": int, "from": str, "name": str}
    listed = [*manifest.get("layers", []), manifest.get("config")]
    layers = [_fields(layer, **kinds) for layer in listed]
    layers.sort(key=lambda layer: layer.get("mediatype") != _WEIGHTS)
    digests, weights = [], []
    for layer in layers:
        digest = layer.get("digest", "")
        if _BLOB_DIGEST.fullmatch(digest):
            digests.append(digest)
            if layer.get("mediatype") == _WEIGHTS:
                weights.append(digest[7:])
    return digests, tuple(weights)


def _fields(value: typing.Any, **kinds: type) -> Json:
    """Return an object whose fields are of these types, as Go's decoder wants them."""
    fields = value
    if value is None:
        fields = {}
    if not isinstance(fields, dict):
        raise ValueError("it is no object")
    for name, kind in kinds.items():
        field: typing.Any = fields.get(name)
        if field is not None and type(field) is not kind:
            raise ValueError(f"{name} is of another type")
        if isinstance(field, int) and abs(field) >= 1 << 63:
            raise ValueError(f"{name} is too large")
    return fields


def _go_object(pairs: list[tuple[str, typing.Any]]) -> Json:
    fields = {}
    for key, value in pairs:
        if value is not None:
            fields[key.casefold()] = value
    return fields


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is no JSON")


_GO_JSON = json.JSONDecoder(object_pairs_hook=_go_object, parse_constant=_no_constant)


def _needs(manifest: Manifest, going: set[str]) -> bool:
    if manifest.layers is None:
        return not manifest.named.isdisjoint(map(str.lower, going))
    return not going.isdisjoint(manifest.digests)
