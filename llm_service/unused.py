"""What lies in a model store and no model needs.

Names in brackets are Ollama's own functions (0.34.4) whose rule a line follows.
"""

import contextlib
import os
import pathlib
import re
import stat
import typing

from llm_service.errors import ServiceError
from llm_service.files import Ages, File, bytes_freed, seen_files
from llm_service.manifests import Manifests
from llm_service.processes import OpenFiles

# The names that Ollama gives to files in blobs/: a digest, a part, an upload under way; and
# in metadata/: what it has read in a blob, and that while it is written.
_BLOB = re.compile(r"sha256-(?:[0-9a-fA-F]{64}(?:-partial.*)?|\d+|.*\.tmp)")
_METADATA = re.compile(r"sha256-[0-9a-fA-F]{64}\.json")
_METADATA_LEFTOVER = re.compile(r"\.gguf-metadata-.*\.tmp")


class Unused:
    """Finds and removes what no manifest names."""

    def __init__(self, store: pathlib.Path, manifests: Manifests, ages: Ages):
        self._store = store
        self._manifests = manifests
        self._ages = ages
        self._replaced: dict[str, int] = {}  # an old version's blobs: when they last changed

    def prune(
        self,
        older_than_s: float,
        files: OpenFiles,
        dry_run: bool = False,
        only: set[str] | None = None,
    ) -> tuple[int, int]:
        """Remove blobs and parts that no manifest names; return (freed bytes, files).

        ``files`` are those that processes have open, ``only`` limits it to blobs of these
        digests. Raises ServiceError ``manifest_unreadable`` or ``model_being_pulled``, with
        nothing removed.
        """
        self.check_at_rest(files)
        going = self.find(older_than_s, files.held, only)
        if not dry_run:
            for file in going:
                pathlib.Path(file.path).unlink(missing_ok=True)
        return bytes_freed(going), len(going)

    def note_replaced(self, paths: typing.Iterable[str]) -> None:
        """Let these blobs be old enough for any prune: they are no upload under way."""
        for file in seen_files(paths):
            self._replaced[file.name] = file.about.st_ctime_ns

    def check_at_rest(self, files: OpenFiles) -> None:
        """Refuse while Ollama writes a file of the store, or reads one that has no manifest yet."""
        named = self._manifests.named()
        in_use = set(files.written)
        for name in files.of_server:
            if digest_of(name) not in named:
                in_use.add(name)
        if any(map(_BLOB.fullmatch, in_use)):
            raise ServiceError(
                "model_being_pulled",
                "Ollama is at work on the model store: wait for the pull or create to end.",
            )

    def find(
        self,
        older_than_s: float,
        held: typing.Container[str] = (),
        only: set[str] | None = None,
    ) -> list[File]:
        """Return what a prune may remove."""
        old = []
        for file in self._regular("blobs", _BLOB):
            free = file.name not in held and _is_wanted(file.name, only)
            if free and self._is_old(file, older_than_s):
                old.append(file)
        named = self._manifests.named()  # after the blobs: a model's manifest is written last
        going = []
        for file in old:
            if digest_of(file.name) not in named:
                going.append(file)
        names = {file.name for file in going}
        going.extend(self._metadata_without(names, only))
        if only is None:
            going.extend(self._leftovers(older_than_s))
        return going

    def _leftovers(self, older_than_s: float) -> typing.Iterator[File]:
        """Yield what Ollama had begun to write about a blob."""
        for file in self._regular("metadata", _METADATA_LEFTOVER):
            if self._is_old(file, older_than_s):
                yield file

    def _metadata_without(self, going: set[str], only: set[str] | None) -> typing.Iterator[File]:
        """Yield what was read in blobs that go or have gone. [pruneGGUFMetadata]"""
        for file in self._regular("metadata", _METADATA):
            blob = file.name.removesuffix(".json")
            path = self._store / "blobs" / blob
            goes = _is_wanted(blob, only) and not path.exists()
            if goes or blob in going:
                yield file

    def _is_old(self, file: File, older_than_s: float) -> bool:
        """Go by the later of both times: what was copied here carries an old one."""
        about = file.about
        changed = max(about.st_mtime, about.st_ctime)
        if self._ages.age_s(changed) >= older_than_s:
            return True
        return self._replaced.get(file.name) == about.st_ctime_ns

    def _regular(self, folder: str, pattern: re.Pattern) -> typing.Iterator[File]:
        """Yield the files of such names; links and folders are nobody's to remove."""
        with contextlib.suppress(FileNotFoundError):
            entries = os.scandir(self._store / folder)
            for file in seen_files(entry.path for entry in entries):
                is_file = stat.S_ISREG(file.about.st_mode)
                if is_file and pattern.fullmatch(file.name):
                    yield file


def _is_wanted(name: str, only: set[str] | None) -> bool:
    return only is None or digest_of(name) in only


def digest_of(name: str) -> str:
    """Return the digest in the name of a blob or of a part of one."""
    return name[7:71].lower()
