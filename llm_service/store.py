"""The model files as Ollama sees them, read and cleaned without asking it.

Names in brackets are Ollama's own functions (0.34.4) whose rule a line follows.
"""

import collections
import contextlib
import glob
import os
import pathlib
import shutil
import time
import typing

from llm_service.errors import ServiceError
from llm_service.files import Ages, File, bytes_freed, seconds_since_boot, seen_files
from llm_service.manifests import Manifest, Manifests
from llm_service.parts import usable
from llm_service.unused import Unused, digest_of
from ollama_client import Json, name_key, plain_key

PURGE_S = 2  # the most that a purge waits
PURGE_PAUSE_S = 0.3
BLOB_NAME_LENGTH = 71  # of sha256-<digest>
PRUNE_AGE_S = 3600  # an `ollama create` uploads long before it writes the manifest


class Store:
    """The model files under OLLAMA_MODELS, without asking Ollama. Sizes are bytes on disk."""

    def __init__(
        self,
        path: str | os.PathLike,
        wall: typing.Callable[[], float] = time.time,
        since_boot: typing.Callable[[], float] = seconds_since_boot,
    ):
        self.path = pathlib.Path(os.path.normpath(path))  # as Go's filepath.Join does
        ages = Ages(wall, since_boot)
        self.manifests = Manifests(self.path, ages)
        self.unused = Unused(self.path, self.manifests, ages)

    # Models

    def models(self, soon: bool = False) -> dict[str, list[str]]:
        """Map each model's ``plain_key`` to its digests (hex), those of the weights first.

        ``soon`` rather gives the last reading than wait for a disk that hangs.
        """
        found: dict[str, list[str]] = {}
        read = self.manifests.there
        if soon:
            read = self.manifests.soon
        for key, manifests in read().items():
            for manifest in manifests:
                if manifest.layers is not None:
                    digests = found.setdefault(key, [])
                    digests.extend(manifest.digests)
        return found

    def signature(self) -> tuple | None:
        """Return what changes whenever a model does; None where that is not certain."""
        return self.manifests.signature()

    def require(self, model: str | None, soon: bool = False) -> None:
        """Raise ServiceError ``model_not_found`` for a model that is not downloaded.

        ``soon`` as in ``models``.
        """
        if model and name_key(model) not in self.models(soon):
            words = f"There is no model {model}"
            if plain_key(model) in self.manifests.soon():
                words += f", which Ollama takes for {name_key(model)}"
            raise ServiceError(
                "model_not_found",
                f"{words}: GET /api/models lists what is downloaded.",
            )

    def names_nothing(self, model: str) -> bool:
        """Tell whether there is a manifest of this model, and it names no file."""
        found = self._manifests_of(model)
        for manifest in found:
            if manifest.layers != []:
                return False
        return bool(found)

    # Blobs and the disk

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

    def files_of(self, model: str) -> list[File]:
        """Return the files that belong to a model, shared ones too."""
        paths = []
        for manifest in self._manifests_of(model):
            paths.append(manifest.path)
            for digest in manifest.digests:
                paths.append(str(self.blob(digest)))
                paths.append(str(self._metadata(digest)))
        return list(seen_files(dict.fromkeys(paths)))

    def remove_blob(self, digest: str) -> None:
        """Remove a blob, and what Ollama has read in it, which it would not read anew."""
        self.blob(digest).unlink(missing_ok=True)
        self._metadata(digest).unlink(missing_ok=True)

    def note_replaced(self, digests: typing.Iterable[str]) -> None:
        """Let these blobs be old enough for any prune: they are no upload under way."""
        paths = [str(self.blob(digest)) for digest in digests]
        self.unused.note_replaced(paths)

    def changed_ns(self) -> int:
        """Return when a blob or part was last added or removed."""
        try:
            return (self.path / "blobs").stat().st_mtime_ns
        except OSError:
            return 0

    def where(self) -> str:
        """Return the folder where the blobs really lie: it may be a link or a mount."""
        return os.path.realpath(self.path / "blobs")

    def free_bytes(self) -> int | None:
        """Return the free bytes of the blobs' disk; None if there is no store."""
        usage = self._usage()
        return usage and usage.free

    def disk(self) -> Json | None:
        """Return total, free, partial and unused bytes; None if there is no store.

        ``unused_bytes`` is what a prune would free, None where that cannot be known.
        ``models_bytes`` is what all models take, shared blobs counted once.
        """
        usage = self._usage()
        if not usage:
            return None
        unused = None
        with contextlib.suppress(ServiceError, OSError):
            unused = bytes_freed(self.unused.find(PRUNE_AGE_S))
        return {
            "path": str(self.path),
            "blobs_path": self.where(),
            "read_only": self.read_only(),
            "total_bytes": usage.total,
            "free_bytes": usage.free,
            "models_bytes": self._models_bytes(),
            "partial_bytes": sum(map(_size, self.parts("*"))),
            "unused_bytes": unused,
        }

    def read_only(self) -> bool:
        """Tell whether a file system of the store is mounted read-only."""
        for folder in ("blobs", "manifests"):
            with contextlib.suppress(OSError):
                flags = os.statvfs(self.path / folder).f_flag
                if flags & os.ST_RDONLY:
                    return True
        return False

    def check_changeable(self) -> None:
        """Raise ServiceError ``store_read_only`` where nothing can be added or removed."""
        if self.read_only():
            raise ServiceError(
                "store_read_only",
                f"The model store {self.path} is mounted read-only: its models can be used, and "
                "none can be downloaded or deleted. Change it where it is writable.",
            )

    def writable(self) -> bool:
        """Tell whether its files are this user's to write; a read-only mount is no fault."""
        if self.read_only():
            return True
        for pattern in (".", "blobs", "manifests/**", "blobs/*-partial*"):
            for path in self._files(pattern):
                allowed = os.access(path, os.W_OK, effective_ids=True)
                if not allowed and path.exists():
                    return False
        return True

    def drop_page_cache(self) -> None:
        """Give the page cache of the blobs back: shared memory counts it as the GPU's."""
        for file in self._files("blobs/sha256-*"):
            with contextlib.suppress(OSError), file.open("rb") as f:
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    # Unfinished downloads

    def parts(self, digest: str) -> list[pathlib.Path]:
        """Return the files of an unfinished download of this digest ("*": of all)."""
        return list(self._files(f"blobs/sha256-{digest}-partial*"))

    def part_sizes(self) -> dict[str, int]:
        """Map the digests of unfinished downloads to the bytes that their files take."""
        found: collections.Counter[str] = collections.Counter()
        for part in self.parts("*"):
            found[digest_of(part.name)] += _size(part)
        return found

    def damaged_parts(self) -> set[str]:
        """Return the digests of unfinished downloads that Ollama cannot go on from."""
        found = collections.defaultdict(list)
        for part in self.parts("*"):
            found[digest_of(part.name)].append(part)
        damaged = set()
        for digest, parts in found.items():
            if not usable(parts):
                damaged.add(digest)
        return damaged

    def unverified(self) -> set[str]:
        """Return the digests of whole files that no model names: of a pull that broke off.

        Ollama checks what one pull has downloaded, at its end; the next one takes what is there.
        """
        whole = set()
        for file in self._files("blobs/sha256-*"):
            if len(file.name) == BLOB_NAME_LENGTH:
                whole.add(digest_of(file.name))
        return whole.difference(*self.models().values())

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
                data = part.name[:79]
                if part.name not in names and data not in names:
                    freed += _size(part)
                    part.unlink(missing_ok=True)
        return freed

    def _models_bytes(self) -> int:
        found = {}
        digests: set[str] = set()
        digests.update(*self.models().values())
        for digest in digests:
            with contextlib.suppress(OSError):
                about = self.blob(digest).stat()
                found[about.st_dev, about.st_ino] = about.st_blocks * 512
        return sum(found.values())

    def _manifests_of(self, model: str) -> list[Manifest]:
        there = self.manifests.there()
        return there.get(name_key(model), [])

    def _usage(self) -> typing.Any:
        for path in (self.path / "blobs", self.path):
            with contextlib.suppress(OSError):
                return shutil.disk_usage(path)
        return None

    def _metadata(self, digest: str) -> pathlib.Path:
        return self.path / "metadata" / f"sha256-{digest}.json"

    def _files(self, pattern: str) -> typing.Iterator[pathlib.Path]:
        """Yield what fits; pathlib's own fails where Ollama removes a folder meanwhile."""
        names = glob.iglob(pattern, root_dir=self.path, recursive=True)
        return map(self.path.joinpath, names)


def _size(file: pathlib.Path) -> int:
    """Return the bytes that a file takes on the disk (parts are sparse), 0 if it is gone."""
    try:
        return file.stat().st_blocks * 512
    except OSError:
        return 0
