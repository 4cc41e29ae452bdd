"""Which model each runner holds, by what Ollama itself identifies it."""

import contextlib
import logging
import re
import threading
import time
import typing

from llm_service.errors import ServiceError
from llm_service.manifests import Manifest, Manifests, loadable
from llm_service.processes import Processes, Runner, is_orphan
from ollama_client import Json, Ollama, name_key

log = logging.getLogger("llm-service")
UNLOAD_ASK_S = 0.4
REPLACED_S = 10  # what was there so long before a runner was first seen, or after, may be its model
# A model of several files is started by links in a folder that is named after its manifest.
SPLIT = re.compile(r"/\.ollama-split-([0-9a-f]{12})-")
Version = tuple[str, str]  # of a model: the key of its name, and the digest of its manifest


class Held(typing.NamedTuple):
    """What is known of the model that a runner holds."""

    name: str | None  # as Ollama shows it; None where it may be one of several
    line: Json | None  # of /api/ps, where it is listed
    may_be: frozenset[Version]  # empty where nobody knows

    def is_one_of(self, versions: set[Version]) -> bool:
        """Tell whether it certainly holds one of these."""
        return bool(self.may_be) and self.may_be <= versions

    def may_be_one_of(self, versions: set[Version]) -> bool:
        """Tell whether it may hold one of these."""
        return not self.may_be or not self.may_be.isdisjoint(versions)


class Matching:
    """Matches runners to the lines of ``/api/ps``.

    Ollama starts one runner for the same weights, and lists it by the name and the manifest for
    which it was loaded. Other models of these weights use it, too. It goes on when its manifest
    is replaced or deleted, so what was seen is remembered.
    """

    def __init__(
        self,
        ollama: Ollama,
        manifests: Manifests,
        processes: Processes,
        clock: typing.Callable[[], float] = time.monotonic,
    ):
        self._ollama = ollama
        self._manifests = manifests
        self._processes = processes
        self._clock = clock
        self._seen: dict[str, Manifest] = {}  # by digest: all that were ever seen
        self._on_disk: dict[Version, float] = {}  # and when that was so last
        self._lines: dict[Runner, Json] = {}  # by which a runner was listed last
        self._first_seen: dict[Runner, float] = {}
        self._started_for: dict[Runner, frozenset[Version]] = {}  # as far as the weights tell
        self._lock = threading.Lock()

    def match(
        self,
        runners: list[Runner],
        loaded: list[Json],
        fresh: bool = True,
    ) -> dict[Runner, Held]:
        """Tell what each of these runners holds. Only the server's own children are listed.

        ``fresh`` reads the manifests first; without it, what was read last is good enough.
        """
        if fresh:
            self.look_at_disk()
        server = self._processes.server()
        with self._lock:
            self._look_at(runners)
            children = []
            for runner in runners:
                if not is_orphan(runner.process, server):
                    children.append(runner)
            lines = self._match_lines(children, loaded)
            self._lines |= lines
            unseen = self._unseen(loaded)
            unseen.difference_update(map(version, lines.values()))
            held = {}
            for runner in runners:
                held[runner] = self._held(runner, lines.get(runner), unseen)
            return held

    def versions(self, model: str, loaded: list[Json]) -> set[Version]:
        """Return all versions of a model, by any of its names, that a runner may hold."""
        key = name_key(model)
        ids: set[str] = set()
        for name, manifest in self._there():
            if name == key:
                ids.update(manifest.ids)
        with self._lock:
            known = {*self._on_disk}
            known.update(map(version, self._lines.values()))
        known.update(map(version, loaded))
        return {each for each in known if each[0] == key or each[1] in ids}

    def has_seen(self, runners: typing.Iterable[Runner]) -> bool:
        """Tell whether all of these were there when it matched last."""
        return all(runner in self._first_seen for runner in runners)

    def unload(
        self,
        line: Json,
        runner: Runner | None = None,
        timeout_s: float = UNLOAD_ASK_S,
    ) -> bool:
        """Ask Ollama to let go of what it lists in this line; return whether it says yes."""
        try:
            with self._unloadable_name(line, runner) as name:
                self._ollama.unload(name, timeout_s)
        except ServiceError as e:
            log.warning("unload %s: %s", line["name"], e)
            return False
        return True

    @contextlib.contextmanager
    def _unloadable_name(self, line: Json, runner: Runner | None) -> typing.Iterator[str]:
        """Give a name by which Ollama unloads just what it lists in this line.

        Raises ServiceError where there is none: its own may be another version's by now.
        """
        own, digest = version(line)
        weights = self._weights(digest, runner)
        same: list[str] = []
        names: set[str] = set()
        for key, manifest in self._there():
            names.add(key)
            if digest in manifest.ids or weights and weights == manifest.weights:
                same.append(key)
        if own in same:
            yield line["name"]
        elif same:
            yield same[0]
        elif weights:
            with self._manifests.lent_name(weights) as name:
                yield name
        elif own in names:
            words = f"{line['name']} is another version's name by now."
            raise ServiceError("model_not_found", words)
        else:
            yield line["name"]

    def _weights(self, digest: str, runner: Runner | None) -> tuple[str, ...]:
        """Return the weights of a manifest, or of the runner where nobody has seen that one."""
        if digest in self._seen:
            return self._seen[digest].weights
        if runner and runner.digest:
            return (runner.digest,)
        return ()

    # What is there

    def _there(self) -> typing.Iterator[tuple[str, Manifest]]:
        """Yield the models on the disk that Ollama can load: the key of each and its manifest."""
        there = self._manifests.soon()
        return loadable(there)

    def look_at_disk(self) -> None:
        """Note which models are there; a slow disk holds up nobody who matches meanwhile."""
        there = self._manifests.soon()
        self.note_models(there)

    def note_models(self, manifests: dict[str, list[Manifest]]) -> None:
        """Note which models are there, by manifests that were read just now."""
        now = self._clock()
        with self._lock:
            for key, manifest in loadable(manifests):
                for digest in manifest.ids:
                    self._seen[digest] = manifest
                    self._on_disk[key, digest] = now

    def _look_at(self, runners: list[Runner]) -> None:
        """Note what new runners were started for, and forget those that have ended."""
        now = self._clock()
        for runner in runners:
            since = self._first_seen.setdefault(runner, now)
            before = self._started_for.get(runner, frozenset())
            if not before or now - since < REPLACED_S:
                self._started_for[runner] = before | self._made_of(runner)
        for runner in list(self._first_seen):
            if runner in runners or runner.process.is_running():
                continue
            self._lines.pop(runner, None)
            del self._first_seen[runner], self._started_for[runner]

    def _made_of(self, runner: Runner) -> frozenset[Version]:
        """Return the models that a new runner may have been started for, the latest alone."""
        since = self._clock() - REPLACED_S
        fitting = set()
        latest = set()
        for each, at in self._on_disk.items():
            if self._fits(runner, each):
                fitting.add(each)
                if at >= since:
                    latest.add(each)
        return frozenset(latest or fitting)

    def _fits(self, runner: Runner, model: Version) -> bool:
        """Tell whether a runner's command line names this model, or its weights."""
        key, digest = model
        split = SPLIT.search(runner.model)
        if split:
            return digest.startswith(split[1])
        if not runner.digest:
            return name_key(runner.model) == key
        seen = self._seen.get(digest)
        if seen is None:
            return False
        return seen.weights[:1] == (runner.digest,)

    # What belongs together

    def _match_lines(self, runners: list[Runner], loaded: list[Json]) -> dict[Runner, Json]:
        """Pair runners and lines: as before, then by what fits alone, then the last two."""
        free = {version(line): line for line in loaded}
        found: dict[Runner, Json] = {}
        for runner in runners:
            before = self._lines.get(runner)
            if before and version(before) in free:
                found[runner] = free.pop(version(before))
        for each in list(free):
            fitting = self._only_one_for(each, runners, found)
            if fitting:
                found[fitting] = free.pop(each)
        left = [runner for runner in runners if runner not in found]
        return found | self._last_two(left, free)

    def _last_two(
        self,
        runners: list[Runner],
        free: dict[Version, Json],
    ) -> dict[Runner, Json]:
        """Pair the only runner and the only line of which nobody knows the manifest."""
        unseen = self._unseen(free.values())
        nameless = [runner for runner in runners if not self._started_for[runner]]
        if len(unseen) == len(nameless) == 1:
            return {nameless[0]: free[unseen.pop()]}
        return {}

    def _only_one_for(
        self,
        listed: Version,
        runners: list[Runner],
        found: dict[Runner, Json],
    ) -> Runner | None:
        """Return the one that fits and has no line yet; a new one before one that had another."""
        fitting = []
        for runner in runners:
            if runner not in found and self._fits(runner, listed):
                fitting.append(runner)
        new = [runner for runner in fitting if runner not in self._lines]
        chosen = new or fitting
        return chosen[0] if len(chosen) == 1 else None

    def _unseen(self, loaded: typing.Iterable[Json]) -> set[Version]:
        """Return those lines' versions of which nobody has seen the manifest."""
        found = set()
        for line in loaded:
            key, digest = version(line)
            if digest not in self._seen:
                found.add((key, digest))
        return found

    def _held(self, runner: Runner, line: Json | None, unseen: set[Version]) -> Held:
        """Say what is known of a runner, whether it is listed (``line``) or not."""
        listed = line or self._lines.get(runner)
        if listed:
            only = frozenset([version(listed)])
            return Held(listed["name"], line, only)
        started_for = self._started_for[runner]
        ids = {self._seen[digest].ids for _, digest in started_for}
        name = None
        if len(ids) == 1 and not unseen:
            name, _ = min(started_for)
        return Held(name, None, started_for | unseen)


class ListCleaner:
    """Has Ollama let go of what it lists without a process: the runner was killed from outside."""

    def __init__(self, matching: Matching, processes: Processes):
        self._matching = matching
        self._processes = processes
        self._found: dict[Version, Json] = {}  # at the last look

    def due(self, loaded: list[Json], runners: typing.Collection[Held]) -> list[Json]:
        """Return the lines of ``/api/ps`` that have had no process for two looks."""
        before = self._found
        self._found = self._without_process(loaded, runners)
        return [line for each, line in self._found.items() if each in before]

    def clean(self, lines: list[Json]) -> None:
        """Unload these, which may read the models' disk."""
        for line in lines:
            # Who has asked for it since has it loaded anew
            if self._matching.has_seen(self._processes.runners()):
                self._matching.unload(line)

    def _without_process(
        self,
        loaded: list[Json],
        runners: typing.Collection[Held],
    ) -> dict[Version, Json]:
        """Return the lines of ``/api/ps`` that no child of the server may stand behind."""
        found = {version(line): line for line in loaded}
        for held in runners:
            if held.line:
                found.pop(version(held.line), None)
            elif not held.may_be:
                return {}
            for each in held.may_be:
                found.pop(each, None)
        if found and self._processes.unknown_children():
            return {}
        return found


def version(line: Json) -> Version:
    """Return which version of which model a line of ``/api/ps`` lists."""
    return name_key(line["name"]), line.get("digest") or ""
