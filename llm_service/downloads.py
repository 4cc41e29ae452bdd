"""Downloads that outlive what breaks, and their listeners."""

import collections
import contextlib
import logging
import queue
import threading
import time
import typing

from llm_service.errors import (
    CHECK_NETWORK,
    NO_MANIFEST,
    PURGE,
    Interrupted,
    ServiceError,
    TimedOut,
    Unreachable,
    clean,
    file_errors,
)
from llm_service.files import content_digest
from llm_service.processes import Processes
from llm_service.progress import PROGRESS_S, Progress
from llm_service.store import PURGE_S, Store
from ollama_client import (
    DIGEST,
    Json,
    Ollama,
    Stream,
    name_key,
    read_into,
    timestamp,
)

STALL_S = 25  # at 30 s Ollama starts a silent part anew and drops its bytes; a reconnect keeps them
FIRST_LAYER_S = 33  # at 30 s Ollama gives up a connection that does not come about, and says why
NO_BYTE_S = 75  # then a download that has never had a byte reconnects no more
MAX_RECONNECTS = 10
RECONNECT_MAX_S = 8
LINE_S = 0.25  # at the latest, to listeners; two writes show that one has left
SETTLED_S = 1  # longer than a pull is between two layers, with no file open
DISK_RESERVE_BYTES = 1 << 30
ENDED_KEPT = 20
log = logging.getLogger("llm-service")


class Download:
    """One pull of one model, owned by the service; any number of listeners attach to it.

    Its ``thread``, which Downloads starts, decides on stop, stall, disk and reconnect.
    ``state`` is "running", then "success", "error" or "cancelled".
    """

    def __init__(self, tools: "Downloads", model: str, insecure: bool, verify: bool):
        self.model = model
        self.verify = verify
        self.state = "running"
        self.error: ServiceError | None = None
        self.ended_at: float | None = None
        self.thread = threading.Thread(target=self._run, name=f"pull {model}", daemon=True)
        self._tools = tools
        self._store = tools.store
        self._insecure = insecure
        self._started_at = time.time()
        self._progress = Progress(time.monotonic())
        self._stream: Stream | None = None
        self._changed = threading.Condition()  # guards all below, and the progress
        self._listeners = 0
        self._detached = False
        self._joinable = True
        self._stop: ServiceError | None = None
        self._had_news = False  # more than the manifest was seen
        self._warning = ""  # of a success: what of the old version stays
        self._answered = False  # by Ollama, before now
        self._unverified: set[str] = set()  # what was there as the last connection began
        self._line: Json = {"status": "starting"}
        self._said: collections.deque[Json] = collections.deque(maxlen=64)
        self._said_count = 0

    def join(self, detach: bool, verify: bool) -> typing.Iterator[Json] | None:
        """Attach a listener and return its lines; None if the download is about to end.

        Detached, it goes on without listeners, and nobody reads the lines.
        """
        with self._changed:
            if not self._joinable:
                return None
            self.verify |= verify
            self._detached |= detach
            self._listeners += not detach
            # As of now: what is said from now on, which may be read late, comes after it
            first = [self._line_now()] if self._said_count else []
            return self._lines(self._said_count, first)

    def leave(self) -> None:
        """Take a listener away; with the last one the download stops."""
        with self._changed:
            self._listeners -= 1
            if not self._listeners and not self._detached:
                words = "The last listener left: pull again, it goes on from here."
                self.stop(ServiceError("cancelled", words))

    def stop(self, error: ServiceError) -> None:
        """End the download with this error."""
        with self._changed:
            self._joinable = False
            self._stop = self._stop or error
            self._changed.notify_all()

    def wait_for_news(
        self,
        timeout_s: float,
        has_left: typing.Callable[[], bool] = lambda: False,
    ) -> None:
        """Wait until a layer was seen; raise the error of a download that ended before.

        It takes longer where Ollama waits for a connection, which it soon gives up.
        """
        began = time.monotonic()
        while not self._is_known(LINE_S):
            waited_s = time.monotonic() - began
            over = waited_s >= timeout_s
            if over and waited_s < FIRST_LAYER_S:
                over = not self._tools.processes.connecting()
            if has_left() or over:
                self._is_known(LINE_S)  # what it has just given up, it tells a moment later
                break
        if self.error and not self._had_news:
            raise self.error

    def wait_for_end(self, has_left: typing.Callable[[], bool]) -> None:
        """Wait for the end, or until the listener has left."""
        while self.thread.is_alive() and not has_left():
            self.thread.join(LINE_S)

    def _is_known(self, wait_s: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._had_news or self.state != "running", wait_s)

    def reconnect(self) -> None:
        """Break the connection to Ollama, which is about to end; the download makes a new one."""
        self._answered = True
        if self._stream:
            self._stream.close()

    def digests(self) -> set[str]:
        """Return the digests (hex) of the layers seen so far."""
        with self._changed:
            return set(DIGEST.findall(" ".join(self._progress.layers)))

    def summary(self, part_sizes: dict[str, int]) -> Json:
        """Return what ``GET /api/models/pull`` says of it."""
        kept = sum(part_sizes.get(digest, 0) for digest in self.digests())
        with self._changed:
            return {
                "model": self.model,
                "state": self.state,
                "status": self._line["status"],
                **self._figures(),
                "listeners": self._listeners,
                "detached": self._detached,
                "insecure": self._insecure,
                "kept_bytes": kept,  # in unfinished files
                "error": self.error and str(self.error),
                "code": self.error and self.error.code,
                "started_at": timestamp(self._started_at),
                "ended_at": timestamp(self.ended_at),
            }

    def last_line(self) -> Json:
        """Return the one line that ends the stream."""
        if self.error:
            return {"error": str(self.error), "code": self.error.code}
        warning = {"warning": self._warning} if self._warning else {}
        return {"status": "success", **self._figures(), **warning}

    # The listeners' side

    def _lines(self, seen: int, first: list[Json]) -> typing.Iterator[Json]:
        """Yield these, what is said at once, and how far it is while nothing is said."""
        yield from first
        while self.state == "running" or seen < self._said_count:
            with self._changed:
                if seen == self._said_count:
                    self._changed.wait(LINE_S)
                new = self._said_count - seen
                seen = self._said_count
                lines = list(self._said)[-new:] if new else [self._line_now()]
            yield from lines

    def _say(self, line: Json) -> None:
        with self._changed:
            self._said.append(line)
            self._said_count += 1
            self._changed.notify_all()

    def _note(self, line: Json) -> None:
        """Count a line, and show it to the listeners: a change of status at once."""
        with self._changed:
            self._progress.note(line, time.monotonic())
            is_new = line["status"] != self._line["status"]
            self._line = line
            if is_new:
                self._say(self._line_now())

    def _line_now(self) -> Json:
        """Return the last line with the figures as of now."""
        return {**self._line, **self._figures()}

    def _figures(self) -> Json:
        return self._progress.figures(time.monotonic(), self.state)

    # The owner's side

    def _run(self) -> None:
        error = None
        try:
            with file_errors():
                self._work()
        except ServiceError as e:
            error = e
            log.warning("pull %s: %s: %s", self.model, e.code, e)
        except Exception as e:
            error = ServiceError("bug", f"The download broke on a bug: {clean(e)}.")
            log.exception("pull %s: a bug", self.model)
        code = error.code if error else "success"
        state = code if code in ("success", "cancelled") else "error"
        self._tools.note_end(self, state)  # who reads the last line finds it ended
        with self._changed:
            self._joinable = False
            self.state = state
            self.error = error
            self.ended_at = time.time()
            if not error:
                self._line = {"status": "success"}
            self._say(self.last_line())

    def _work(self) -> None:
        old = self._digests_there()
        self._progress.part = (0, 50 if self.verify else 100)
        unknown = None
        try:
            self._pull()
        except ServiceError as e:
            if e.code != "model_not_found" or not self.verify or not old:
                raise
            unknown = e
        if self._store.names_nothing(self.model):
            self._refuse_manifest()
        there = self._digests_there()
        doubtful = [digest for digest in there if digest in self._unverified]
        checked = there if self._is_check_wanted() else doubtful
        if checked:
            self._check_files(checked, unknown)
        new = self._digests_there()
        self._count_files(new, completed=True)  # Ollama shows no line of a layer that comes at once
        self._warning = self._tools.remove_replaced(self.model, set(old).difference(new))

    def _refuse_manifest(self) -> None:
        """Undo a success with a manifest that names no file: a portal may have answered."""
        with contextlib.suppress(ServiceError):
            self._tools.ollama.delete(self.model)
        raise ServiceError("registry_error", f"The manifest names no file: {NO_MANIFEST}.")

    def _is_check_wanted(self) -> bool:
        with self._changed:
            self._joinable &= self.verify  # else it is too late to join with verify
            return self.verify

    def _digests_there(self) -> list[str]:
        """Return the digests that the model's manifest names; [] if it is not there."""
        return self._store.models().get(name_key(self.model), [])

    def _count_files(self, digests: list[str], completed: bool) -> None:
        """Count these files as the layers: to check them, or as completed."""
        with self._changed:
            self._progress.set_layers(self._store.sizes(digests), completed)

    def _pull(self) -> None:
        """Pull until success, over as many connections as it takes."""
        failures = most = 0
        began = time.monotonic()
        while True:
            try:
                return self._follow_connection()
            except ServiceError as e:
                if self._drops_damaged_parts(e):
                    continue
                if not self._goes_on_after(e):
                    raise
                reason = e
            completed = self._progress.completed_bytes()
            if completed > most:
                failures = 0
                most = completed
            failures += 1
            is_late = not self._progress.received and time.monotonic() - began > NO_BYTE_S
            if failures > MAX_RECONNECTS or is_late:
                raise type(reason)(
                    reason.code,
                    f"Gave up, as no byte came (reconnects: {failures - 1}); the next pull goes on "
                    f"from here. The last reason: {reason} If it stays so: {PURGE}.",
                )
            self._reconnect_after(reason, failures)

    def _reconnect_after(self, reason: ServiceError, failures: int) -> None:
        log.warning("pull %s: reconnecting: %s", self.model, reason)
        self._answered = True  # or hung, and a hung one is started anew
        status = f"reconnecting ({failures} of {MAX_RECONNECTS})"
        self._note({"status": status, "reason": str(reason)})
        with self._changed:
            pause_s = min(RECONNECT_MAX_S, 0.5 * 2 ** (failures - 1))
            self._changed.wait_for(lambda: self._stop, pause_s)

    def _drops_damaged_parts(self, error: ServiceError) -> bool:
        """Remove parts that Ollama cannot go on from, if that was the error."""
        if error.code != "parts_damaged" or not self._tools.drop_damaged_parts(self):
            return False
        log.warning("pull %s: removed damaged parts: %s", self.model, error)
        self._note({"status": "removed damaged parts", "reason": str(error)})
        return True

    def _goes_on_after(self, error: ServiceError) -> bool:
        """Tell whether an error may pass: of who has answered before, Ollama or the registry."""
        of_ollama = error.code.startswith("ollama_")
        known = self._answered if of_ollama else bool(self._progress.layers)
        kinds = (Interrupted, TimedOut, Unreachable) if known else Interrupted
        return isinstance(error, kinds)

    def _follow_connection(self) -> None:
        """Note the lines of one connection; return with Ollama's success."""
        self._unverified = self._store.unverified()
        self._progress.moved_at = time.monotonic()
        stream = self._stream = self._tools.ollama.pull(self.model, self._insecure)
        lines: queue.SimpleQueue[Json | Exception] = queue.SimpleQueue()
        threading.Thread(target=read_into, args=(lines, stream), daemon=True).start()
        try:
            while True:
                self._check_stop()
                self._check_stall()  # Ollama repeats its line meanwhile
                with contextlib.suppress(queue.Empty):
                    line = lines.get(timeout=PROGRESS_S)
                    if isinstance(line, Exception):
                        raise line
                    self._answered = True
                    if line["status"] == "success":
                        return
                    self._check_disk(line)  # what does not fit is refused before it is news
                    self._had_news |= line["status"] != "pulling manifest"
                    self._note(line)
        finally:
            stream.close()

    def _check_stop(self) -> None:
        if self._stop:
            raise self._stop

    def _check_stall(self) -> None:
        """Raise where nothing comes any more. Ollama is silent while it verifies."""
        silent_s = time.monotonic() - self._progress.moved_at
        status = self._line["status"]
        if status.startswith(("starting", "reconnecting", "removed")) and silent_s > STALL_S:
            raise Interrupted("ollama_timeout", f"Ollama has said nothing for {STALL_S} s.")
        if not status.startswith("pulling"):
            return
        if self._progress.layers:
            if silent_s > STALL_S:
                raise Interrupted("pull_interrupted", f"No byte came for {STALL_S} s.")
        elif silent_s > FIRST_LAYER_S:
            raise Unreachable(
                "registry_unreachable",
                f"The registry has not answered for {FIRST_LAYER_S} s: {CHECK_NETWORK}.",
            )

    def _check_disk(self, line: Json) -> None:
        free = self._store.free_bytes()
        missing = line.get("total", 0) - line.get("completed", 0)  # the other layers are there
        if free is not None and missing > 0 and free - missing < DISK_RESERVE_BYTES:
            raise ServiceError(
                "disk_full",
                f"The rest of {self.model} needs {missing >> 20} MB and "
                f"{DISK_RESERVE_BYTES >> 20} MB stay free, but {self._store.where()} has "
                f"{free >> 20} MB: delete a model or enlarge the disk.",
            )

    # Checking what is there

    def _check_files(self, digests: list[str], unknown: ServiceError | None) -> None:
        """Read these files; remove those whose content has another digest, and pull again.

        Of a model that is ``unknown`` to the registry nothing is removed.
        """
        self._progress.part = (50, 100)
        self._count_files(digests, completed=False)
        self._had_news = True
        damaged = [digest for digest in digests if not self._is_whole(digest)]
        names = ", ".join(digest[:12] for digest in damaged)
        if unknown:
            found = f"damaged are {names}: create it anew" if damaged else "its files are undamaged"
            raise ServiceError(
                "model_damaged" if damaged else unknown.code,
                f"The registry does not know {self.model}, so nothing was removed; {found}.",
            )
        if damaged:
            for digest in damaged:
                self._store.remove_blob(digest)
            log.warning("pull %s: removed damaged files: %s", self.model, names)
            self._note({"status": f"removed {len(damaged)} damaged: {names}"})
            self._count_files(self._digests_there(), completed=True)
            self._pull()

    def _is_whole(self, digest: str) -> bool:
        total = self._store.sizes([digest]).get(digest, 0)
        line = {"status": f"checking {digest[:12]}", "digest": f"sha256:{digest}", "total": total}

        def note(completed: int) -> None:
            self._check_stop()
            self._note({**line, "completed": completed})

        return content_digest(self._store.blob(digest), note) == digest


class Downloads:
    """The downloads under way, at most ``limit``, and the last ended ones."""

    def __init__(self, ollama: Ollama, store: Store, processes: Processes, limit: int):
        self.ollama = ollama
        self.store = store
        self.processes = processes
        self._limit = limit
        self._lock = threading.Lock()
        self._running: dict[str, Download] = {}
        self._ended: collections.deque[Download] = collections.deque(maxlen=ENDED_KEPT)
        self._closing: ServiceError | None = None
        self.counts = dict.fromkeys(("success", "error", "cancelled"), 0)  # since the start

    def pull(
        self,
        model: str,
        insecure: bool = False,
        detach: bool = False,
        verify: bool = False,
    ) -> tuple[Download, typing.Iterable[Json]]:
        """Start a download or join the one under way; return it and its lines."""
        self.store.check_changeable()
        key = name_key(model)
        for _ in range(3):
            with self._lock:
                if self._closing:
                    raise self._closing
                download = self._running.get(key)
                if not download:
                    self._check_limit()
                    download = Download(self, model, insecure, verify)
                lines = download.join(detach, verify)  # before it starts: it may fail at once
                if key not in self._running:
                    download.thread.start()
                    self._running[key] = download
            if lines is not None:
                return download, lines
            download.thread.join(2)
        raise ServiceError(
            "model_being_pulled",
            "A download of this model is just being cancelled: try again.",
        )

    def cancel(self, model: str, purge: bool = False) -> int:
        """Cancel a download; return the bytes that ``purge`` freed of its parts.

        The last one that failed can be purged too.
        """
        began = time.monotonic()
        key = name_key(model)
        states = ("running", "error", "cancelled") if purge else ("running",)
        with self._lock:
            known = [*self._ended, *self._running.values()]
        same = [each for each in known if name_key(each.model) == key]
        found = [each for each in same if each.state in states]
        if not found:
            raise ServiceError(
                "no_such_pull",
                f"No download of {model} is under way: GET /api/models/pull lists them.",
            )
        download = found[-1]
        words = "Cancelled by request: the next pull goes on from what is there."
        download.stop(ServiceError("cancelled", words))
        download.thread.join(2)
        if not purge:
            return 0
        digests = download.digests() | self.store.damaged_parts()  # of which no line may tell
        with file_errors():
            return self._purge(digests, download, PURGE_S - (time.monotonic() - began))

    def drop_damaged_parts(self, download: Download) -> bool:
        """Remove the parts that Ollama cannot go on from; tell whether there were any."""
        damaged = self.store.damaged_parts()
        self._purge(damaged, download, PURGE_S)
        return bool(damaged - self.store.damaged_parts())

    def _purge(self, digests: set[str], download: Download, limit_s: float) -> int:
        """Remove these parts, but for those of other downloads: they may be closed just now."""
        with self._lock:
            others = [each for each in self._running.values() if each is not download]
        shared = set().union(*(each.digests() for each in others))
        return self.store.purge(
            digests - shared,
            lambda: self.processes.open_files().held,
            limit_s,
        )

    def list(self) -> list[Json]:
        """Return the summaries: those under way, then the ended ones, newest first."""
        with self._lock:
            downloads = [*self._running.values(), *reversed(self._ended)]
        kept = self.store.part_sizes()
        return [download.summary(kept) for download in downloads]

    def running_count(self) -> int:
        """Return how many downloads are under way."""
        return len(self._running)

    def running(self, model: str) -> bool:
        """Tell whether this model is being downloaded."""
        return name_key(model) in self._running

    def prune(self, older_than_s: float, dry_run: bool) -> tuple[int, int]:
        """Remove what no model uses, once nothing of the store has been in use for a while.

        Between two files of a pull Ollama has none open, for a moment. Returns (freed bytes,
        files). Raises ServiceError ``model_being_pulled``, ``manifest_unreadable``.
        """
        if not dry_run:
            self.store.check_changeable()
        until = time.monotonic() + (0 if dry_run else SETTLED_S)
        while True:
            with self._lock, file_errors():
                if self._running:
                    raise ServiceError(
                        "model_being_pulled",
                        "A download is under way: wait for its end, or cancel it.",
                    )
                files = self.processes.open_files()
                self.store.unused.check_at_rest(files)
                if time.monotonic() >= until:
                    return self.store.unused.prune(older_than_s, files, dry_run)
            time.sleep(0.05)

    def remove_replaced(self, model: str, digests: set[str]) -> str:
        """Remove these blobs of a model's old version; say what stays unused and why, or ""."""
        reason = "another download runs"
        try:
            with self._lock, file_errors():
                self.store.note_replaced(digests)
                if len(self._running) == 1:  # this one
                    reason = "a process has them open"
                    self.store.unused.prune(0, self.processes.open_files(), only=digests)
        except ServiceError as e:
            reason = str(e)
        stays = self.store.sizes(digests.difference(*self.store.models().values()))
        if not stays:
            return ""
        words = f"{sum(stays.values()) >> 20} MB of the old version stay until a prune: {reason}"
        log.warning("pull %s: %s", model, words)
        return words

    def reconnect(self) -> None:
        """Break every download's connection: before Ollama is ended, so that it keeps the parts."""
        for download in list(self._running.values()):
            download.reconnect()

    def close(self) -> None:
        """End all downloads: the service stops."""
        words = "The service is stopping: pull again later, it goes on from here."
        with self._lock:
            self._closing = ServiceError("shutting_down", words)
            downloads = list(self._running.values())
        for download in downloads:
            download.stop(self._closing)

    def note_end(self, download: Download, state: str) -> None:
        """Move a download to the ended ones, and count how it ended."""
        with self._lock:
            del self._running[name_key(download.model)]
            self._ended.append(download)
            self.counts[state] += 1

    def _check_limit(self) -> None:
        if len(self._running) >= self._limit:
            raise ServiceError(
                "too_many_pulls",
                f"{self._limit} downloads are under way: wait for one, cancel one, or "
                "raise LLM_MAX_PULLS.",
            )
