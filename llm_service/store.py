"""The model files as Ollama sees them, read and cleaned without asking it."""

import contextlib
import glob
import json
import os
import pathlib
import re
import shutil
import stat
import time
import typing

from llm_service.processes import OpenFiles
from ollama_client import DIGEST, Json, ServiceError, clean, name_key

PURGE_S = 2  # the most that a purge waits
PURGE_PAUSE_S = 0.3
PRUNE_AGE_S = 3600  # an `ollama create` uploads long before it writes the manifest
# The names that Ollama gives to files in blobs/: a digest, a part, an upload under way.
_BLOB_FILE = re.compile(r"sha256-(?:[0-9a-fA-F]{64}(?:-partial.*)?|\d+|.*\.tmp)")


class Store:
    """The model files under OLLAMA_MODELS, without asking Ollama. Sizes are bytes on disk."""

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path)
        self._signature: tuple[tuple[str, int, int], ...] = ()
        self._models: tuple[tuple | None, dict[str, list[str]]] = (None, {})  # with its signature

    def models(self) -> dict[str, list[str]]:
        """Map each model's ``name_key`` to its digests (hex), those of the weights first."""
        signature = self.signature()
        known, models = self._models
        if signature is None or signature != known:
            models = self._read_models()
            self._models = signature, models
        return models

    def require(self, model: str | None) -> None:
        """Raise ServiceError ``model_not_found`` for a model that is not downloaded."""
        if model and name_key(model) not in self.models():
            raise ServiceError(
                "model_not_found",
                f"There is no model {model}: GET /api/models lists what is downloaded.",
            )

    def _read_models(self) -> dict[str, list[str]]:
        found = {}
        for file in self._files("manifests/*/*/*/*"):
            try:
                manifest = json.loads(file.read_bytes())
                layers = [*manifest["layers"], manifest.get("config") or {}]
                layers.sort(key=lambda layer: not layer.get("mediaType", "").endswith(".model"))
                names = " ".join(layer.get("digest") or "" for layer in layers)
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
                continue  # a manifest that Ollama would not list either
            digests = DIGEST.findall(names.lower())
            if digests:
                *place, tag = file.parts[-4:]
                found[name_key(f"{'/'.join(place)}:{tag}")] = digests
        return found

    def signature(self) -> tuple | None:
        """Return what changes whenever a model does; None where that is not certain."""
        known = self._signature
        young_ns = time.time_ns() - 10**9
        try:
            # What is known is looked at first: that takes a call for each, a walk many.
            if not known or known != tuple(_stamp(path) for path, *_ in known):
                root = f"{self.path}/manifests"
                paths = [root, *(entry.path for entry in _entries_below(root))]
                known = tuple(map(_stamp, paths))
        except OSError:
            known = ()
        if any(changed_ns > young_ns for _, changed_ns, _ in known):
            known = ()  # one more change might not show
        self._signature = known
        return known or None

    def blob(self, digest: str) -> pathlib.Path:
        """Return the path of the blob with this digest (hex)."""
        return self.path / "blobs" / f"sha256-{digest}"

    def sizes(self, digests: typing.Iterable[str]) -> dict[str, int]:
        """Map these digests to their blobs' bytes, as far as they are there."""
        found = {}
        for digest in digests:
            with contextlib.suppress(OSError):
                found[digest] = self.blob(digest).stat().st_size
        return found

    def changed_ns(self) -> int:
        """Return when a blob or part was last added or removed."""
        try:
            return (self.path / "blobs").stat().st_mtime_ns
        except OSError:
            return 0

    def free_bytes(self) -> int | None:
        """Return the free bytes of the models' disk; None if there is no store."""
        try:
            return shutil.disk_usage(self.path).free
        except OSError:
            return None

    def disk(self) -> Json | None:
        """Return total, free, partial and unused bytes; None if there is no store.

        ``unused_bytes`` is what a prune would free, None where that cannot be known.
        """
        try:
            usage = shutil.disk_usage(self.path)
        except OSError:
            return None
        unused = None
        with contextlib.suppress(ServiceError, OSError):
            unused = sum(size for _, size in self._unused(PRUNE_AGE_S))
        return {
            "path": str(self.path),
            "total_bytes": usage.total,
            "free_bytes": usage.free,
            "partial_bytes": sum(map(_size, self.parts("*"))),
            "unused_bytes": unused,
        }

    def writable(self) -> bool:
        """Tell whether the service's user may write wherever a pull or a delete does."""
        for pattern in (".", "blobs", "manifests/**", "blobs/*-partial*"):
            for path in self._files(pattern):
                allowed = os.access(path, os.W_OK, effective_ids=True)
                if not allowed and path.exists():
                    return False
        return True

    def parts(self, digest: str) -> list[pathlib.Path]:
        """Return the files of an unfinished download of this digest ("*": of all)."""
        return list(self._files(f"blobs/sha256-{digest}-partial*"))

    def prune(
        self,
        older_than_s: float,
        files: "OpenFiles",
        dry_run: bool = False,
        only: set[str] | None = None,
    ) -> tuple[int, int]:
        """Remove blobs and parts that no manifest names; return (freed bytes, files).

        ``files`` are those that processes have open, ``only`` limits it to blobs of these
        digests. Raises ServiceError ``manifest_unreadable`` or ``model_being_pulled``, with
        nothing removed.
        """
        self.check_at_rest(files)
        sizes = []
        for path, size in self._unused(older_than_s):
            wanted = only is None or _digest_of(path.name) in only
            if wanted and path.name not in files.held:
                sizes.append(size)
                if not dry_run:
                    path.unlink(missing_ok=True)
        return sum(sizes), len(sizes)

    def make_old(self, digests: typing.Collection[str]) -> None:
        """Let these blobs be old enough for any prune: they are no upload under way."""
        old = time.time() - PRUNE_AGE_S
        for digest in self.sizes(digests):
            os.utime(self.blob(digest), (old, old))

    def purge(
        self,
        digests: typing.Collection[str],
        held: typing.Callable[[], set[str]],
        limit_s: float = PURGE_S,
    ) -> int:
        """Remove the parts of these digests that no process has open; return freed bytes.

        While a cancelled pull dies, Ollama may still write the record of a part, and a record
        without its data would corrupt the next pull. So this looks until none reappears, but
        no longer than ``limit_s``.
        """
        freed = quiet = 0
        deadline = time.monotonic() + limit_s
        while quiet < 2 and time.monotonic() < deadline - PURGE_PAUSE_S:
            time.sleep(PURGE_PAUSE_S)
            parts = [part for digest in digests for part in self.parts(digest)]
            quiet = 0 if parts else quiet + 1
            names = held() if parts else set()
            for part in parts:
                # A record belongs to the data, which alone is open all the time.
                if part.name not in names and part.name[:79] not in names:
                    freed += _size(part)
                    part.unlink(missing_ok=True)
        return freed

    def drop_page_cache(self) -> None:
        """Give the page cache of the blobs back: shared memory counts it as the GPU's."""
        for file in self._files("blobs/sha256-*"):
            with contextlib.suppress(OSError), file.open("rb") as f:
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def check_at_rest(self, files: "OpenFiles") -> None:
        """Refuse while Ollama writes a file of the store, or reads one that has no manifest yet."""
        named = self._named()
        new = {name for name in files.of_server if _digest_of(name) not in named}
        if any(map(_BLOB_FILE.fullmatch, files.written | new)):
            raise ServiceError(
                "model_being_pulled",
                "Ollama is at work on the model store: wait for the pull or create to end.",
            )

    def _unused(self, older_than_s: float) -> list[tuple[pathlib.Path, int]]:
        """Return (path, bytes) of what a prune may remove; no bytes where a link stays."""
        old = []
        now = time.time()
        for path in self._files("blobs/sha256-*"):
            with contextlib.suppress(FileNotFoundError):
                about = path.lstat()
                ours = stat.S_ISREG(about.st_mode) and _BLOB_FILE.fullmatch(path.name)
                if ours and now - about.st_mtime >= older_than_s:
                    old.append((path, about.st_blocks * 512 if about.st_nlink == 1 else 0))
        named = self._named()  # after the blobs: a model's manifest is written last
        return [(path, size) for path, size in old if _digest_of(path.name) not in named]

    def _named(self) -> set[str]:
        """Return every digest that any manifest file names, whatever its place and form."""
        found: set[str] = set()
        file = root = self.path / "manifests"
        try:
            for entry in _entries_below(root) if os.path.lexists(root) else ():
                if not entry.is_dir():
                    file = pathlib.Path(entry)
                    # Written anew, as a text may be in any encoding, with any escapes.
                    text = json.dumps(json.loads(file.read_bytes()))
                    found.update(DIGEST.findall(text.lower()))
        except (OSError, ValueError, RecursionError) as e:
            raise ServiceError(
                "manifest_unreadable",
                f"A manifest cannot be read, so what its model needs is unknown: pull or delete "
                f"that model, then try again ({clean(file)}: {clean(e)}).",
            ) from e
        return found

    def _files(self, pattern: str) -> typing.Iterator[pathlib.Path]:
        """Yield what fits; pathlib's own fails where Ollama removes a folder meanwhile."""
        return map(self.path.joinpath, glob.iglob(pattern, root_dir=self.path, recursive=True))


def _entries_below(folder: str | os.PathLike[str]) -> typing.Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            yield entry
            if entry.is_dir():
                yield from _entries_below(entry)


def _stamp(path: str) -> tuple[str, int, int]:
    about = os.stat(path)
    return path, about.st_mtime_ns, about.st_size


def _digest_of(name: str) -> str:
    """Return the digest in the name of a blob or of a part of one."""
    return name[7:71].lower()


def _size(file: pathlib.Path) -> int:
    """Return the bytes that a file takes on the disk (parts are sparse), 0 if it is gone."""
    try:
        return file.stat().st_blocks * 512
    except OSError:
        return 0
