"""Models' files read against their digests, without a registry and without Ollama."""

import concurrent.futures
import contextlib
import errno
import hashlib
import logging
import os
import pathlib
import threading
import time
import typing

from llm_service.errors import ServiceError, clean
from llm_service.manifests import Manifest
from llm_service.store import Store
from ollama_client import Json

PIECE_BYTES = 1 << 18  # it fits into a core's own cache
STEP_BYTES = 1 << 25  # the page cache is given back in steps: each takes time of its own
PROBES = 8  # places of a step that tell whether it was in the page cache before
THREADS = 8  # more read no disk faster
ROUNDS = 3  # of a store that changes meanwhile
LINE_S = 0.25  # two writes show that the caller has left
# Why a file cannot be read: it is not there; the disk fails, or it is no file.
STATES = {
    errno.ENOENT: "missing",
    errno.ENOTDIR: "missing",
    errno.EIO: "damaged",
    errno.EISDIR: "damaged",
    errno.ESPIPE: "damaged",
}
log = logging.getLogger("llm-service")

Stamp = tuple[int, ...] | None


class Reading:
    """Reads files against their digests, several at once."""

    def __init__(self, store: Store, threads: int):
        self.latest = ""  # the file that was begun last
        self.stop: ServiceError | None = None  # what ends it
        self._store = store
        self._threads = threads
        self._found: dict[str, tuple[Stamp, str]] = {}  # digest: the file, its state
        self._sizes: dict[str, list[int]] = {}  # digest: [read, all] bytes

    def read(self, digests: typing.Iterable[str]) -> None:
        """Read these, the largest first: so the threads end at about one time."""
        sizes = self._store.sizes(digests)
        for digest in digests:
            self._sizes[digest] = [0, sizes.get(digest, 0)]
        order = sorted(digests, key=lambda digest: sizes.get(digest, 0), reverse=True)
        with concurrent.futures.ThreadPoolExecutor(self._threads) as pool:
            list(pool.map(self._check, order))

    def has_changed(self, digest: str) -> bool:
        """Tell whether a file is another one than was read."""
        stamp, _ = self._found.get(digest, ((), ""))
        return stamp != stamp_of(self._store.blob(digest))

    def state(self, digest: str) -> str:
        """Return "whole", "damaged", "missing" or "unreadable"."""
        _, state = self._found[digest]
        return state

    def sizes(self) -> tuple[int, int]:
        """Return the bytes that were read, and those of all files."""
        completed = total = 0
        for done, size in list(self._sizes.values()):
            completed += done
            total += size
        return completed, total

    def _check(self, digest: str) -> None:
        self.latest = digest
        path = self._store.blob(digest)
        stamp = stamp_of(path)
        state = "whole"
        try:
            if self._sum_up(path, self._sizes[digest]) != digest.lower():
                state = "damaged"
        except OSError as e:
            state = STATES.get(e.errno or 0, "unreadable")
        if state != "whole":
            log.warning("verify: %s is %s", path.name, state)
        self._found[digest] = stamp, state

    def _sum_up(self, path: pathlib.Path, sizes: list[int]) -> str:
        """Return the digest of a file's content."""
        checksum = hashlib.sha256()
        piece = memoryview(bytearray(PIECE_BYTES))
        with PassingFile(path) as file:
            while count := file.readinto(piece):
                if self.stop:
                    raise self.stop
                checksum.update(piece[:count])
                sizes[0] += count
        return checksum.hexdigest()


class PassingFile:
    """A file that is read once, from its start to its end, and leaves the page cache as it was.

    What was not there before is given back: on a GPU that shares the memory it counts as used.
    """

    def __init__(self, path: os.PathLike):
        self._file = open(path, "rb", buffering=0, opener=open_at_once)
        self._fd = self._file.fileno()
        self._read = self._step = 0  # the place of the next byte, and where its step begins
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        self._keep = True
        self._keep = all(map(self._is_cached, range(PROBES)))

    def __enter__(self) -> "PassingFile":
        return self

    def __exit__(self, *_: object) -> None:
        if not self._keep:
            self._drop(2 * STEP_BYTES)  # with what was read ahead
        self._file.close()

    def readinto(self, piece: memoryview) -> int | None:
        """Read the next bytes; return how many."""
        count = self._file.readinto(piece)
        self._read += count or 0
        length = self._read - self._step
        if length >= STEP_BYTES:
            if not self._keep:
                self._drop(length)
            self._step = self._read
            # What the kernel has read ahead is in the first half.
            self._keep = all(map(self._is_cached, range(PROBES // 2, PROBES)))
        return count

    def _is_cached(self, probe: int) -> bool:
        """Tell whether a place of this step is in the page cache.

        Behind the file's end it is as the step before was.
        """
        place = self._step + probe * STEP_BYTES // PROBES
        try:
            count = os.preadv(self._fd, [bytearray(1)], place, os.RWF_NOWAIT)
        except OSError:
            return False
        return bool(count) or self._keep

    def _drop(self, length: int) -> None:
        os.posix_fadvise(self._fd, self._step, length, os.POSIX_FADV_DONTNEED)


def open_at_once(path: str, flags: int) -> int:
    """Open a file; a pipe of that name would wait for its writer."""
    return os.open(path, flags | os.O_NONBLOCK)


def stamp_of(path: os.PathLike) -> Stamp:
    """Return what changes with a file's content; None where there is none."""
    with contextlib.suppress(OSError):
        about = os.stat(path)
        return about.st_ino, about.st_size, about.st_mtime_ns
    return None


class Check:
    """One reading of the files of one model, or of all, for one caller."""

    def __init__(
        self,
        store: Store,
        model: str | None,
        threads: int,
        on_success: typing.Callable[["Check"], None],
    ):
        self.model = model
        self.error: ServiceError | None = None
        self.models: list[Json] = []  # the outcome
        self.thread = threading.Thread(target=self._run, name="verify", daemon=True)
        self._store = store
        self._on_success = on_success
        self._reading = Reading(store, threads)
        self._percent = 0.0
        self._began = time.monotonic()

    def leave(self) -> None:
        """End it, as its caller does not listen any more."""
        self.stop(ServiceError("cancelled", "The caller left: verify again."))

    def stop(self, error: ServiceError) -> None:
        """End it with this error."""
        self._reading.stop = self._reading.stop or error

    def lines(self) -> typing.Iterator[Json]:
        """Yield how far it is, a few times a second, and at last the outcome."""
        while self.thread.is_alive():
            yield {"status": f"checking {self._reading.latest[:12]}", **self._figures()}
            self.thread.join(LINE_S)
        yield self.last_line()

    def wait_for_end(self, has_left: typing.Callable[[], bool]) -> None:
        """Wait for the end, or until the caller has left."""
        while self.thread.is_alive() and not has_left():
            self.thread.join(LINE_S)

    def last_line(self) -> Json:
        """Return the outcome: the models, or an error."""
        if self.error:
            return {"error": str(self.error), "code": self.error.code}
        return {
            "status": "success",
            **self._figures(),
            "percent": 100.0,
            "models": self.models,
        }

    def _figures(self) -> Json:
        completed, total = self._reading.sizes()
        if total:
            percent = int(1000 * completed / total) / 10
            self._percent = max(self._percent, min(99.9, percent))
        seconds = max(time.monotonic() - self._began, LINE_S)
        speed = int(completed / seconds)
        return {
            "percent": self._percent,
            "completed_bytes": completed,
            "total_bytes": total,
            "bytes_per_second": speed,
            "eta_seconds": (total - completed) // speed if speed else None,
        }

    def _run(self) -> None:
        try:
            self.models = self._work()
            self._on_success(self)
        except ServiceError as e:
            self.error = e
        except Exception as e:
            self.error = ServiceError("bug", f"The check broke on a bug: {clean(e)}.")
            log.exception("verify: a bug")

    def _work(self) -> list[Json]:
        """Read until nothing is another than was read: a pull may go on meanwhile."""
        manifests = self._store.manifests.of(self.model)
        for _ in range(ROUNDS):
            due: set[str] = set()
            for manifest in manifests:
                due.update(digests_of(manifest))
            self._reading.read(list(filter(self._reading.has_changed, due)))
            before = manifests
            manifests = self._store.manifests.of(self.model)
            if manifests == before and not any(map(self._reading.has_changed, due)):
                break
        return [self._report(manifest) for manifest in before]

    def _report(self, manifest: Manifest) -> Json:
        states: dict[str, list[str]] = {
            "damaged": [],
            "missing": [],
            "unreadable": [],
        }
        if manifest.layers is None:  # Ollama refuses it
            states["damaged"].append(f"manifests/{manifest.place}")
        for digest in digests_of(manifest):
            state = self._reading.state(digest)
            if state != "whole":
                states[state].append(f"sha256:{digest}")
        return {
            "name": manifest.name,
            "ok": not any(states.values()),
            **states,
        }


def digests_of(manifest: Manifest) -> list[str]:
    """Return the digests (hex) of a model's files, each once."""
    return list(dict.fromkeys(digest[7:] for digest in manifest.layers or []))


class Verifying:
    """Starts checks, one at a time, and keeps what the last ones found."""

    def __init__(self, store: Store):
        self._store = store
        self._threads = min(THREADS, len(os.sched_getaffinity(0)))
        self._lock = threading.Lock()
        self._check: Check | None = None
        self._closing: ServiceError | None = None
        self._whole: dict[str, bool] | None = None  # each model that was checked

    def damaged_count(self) -> int | None:
        """Return how many models were not whole when last checked; None if none ever was."""
        if self._whole is None:
            return None
        return list(self._whole.values()).count(False)

    def _note(self, check: "Check") -> None:
        whole = dict(self._whole or {}) if check.model else {}
        for model in check.models:
            whole[model["name"]] = model["ok"]
        self._whole = whole

    def start(self, model: str | None) -> Check:
        """Start to check one model, or all. Raises ServiceError."""
        self._store.manifests.of(model)
        with self._lock:
            if self._closing:
                raise self._closing
            if self._check and self._check.thread.is_alive():
                raise ServiceError(
                    "verify_running",
                    "Another check is under way: wait for its end, then try again.",
                )
            self._check = Check(
                self._store,
                model,
                self._threads,
                self._note,
            )
            self._check.thread.start()
        return self._check

    def close(self) -> None:
        """End the check under way: the service stops."""
        with self._lock:
            self._closing = ServiceError("shutting_down", "The service stops: verify again later.")
            if self._check:
                self._check.stop(self._closing)
