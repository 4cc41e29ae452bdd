"""Which model each runner holds, by what Ollama itself identifies it."""

import contextlib
import logging
import re
import threading
import time
import typing

from llm_service.errors import ServiceError
from llm_service.manifests import Manifest, Manifests
from llm_service.processes import Processes, Runner
from ollama_client import Json, Ollama, name_key

log = logging.getLogger("llm-service")
UNLOAD_ASK_S = 0.4
REPLACED_S = 10  # a runner first seen now may have been started for what was there so long ago
# A model of several files is started by links in a folder that is named after its manifest.
SPLIT = re.compile(r"/\.ollama-split-([0-9a-f]{12})-")
Version = tuple[str, str | None]  # of a model: the key of its name, the digest of its manifest


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
        clock: typing.Callable[[], float] = time.monotonic,
    ):
        self._ollama, self._manifests, self._clock = ollama, manifests, clock
        self._seen: dict[str, Manifest] = {}  # by digest: all that were ever seen
        self._on_disk: dict[Version, float] = {}  # and when that was so last
        self._lines: dict[Runner, Json] = {}  # by which a runner was listed last
        self._started_for: dict[Runner, frozenset[Version]] = {}  # as far as the weights tell
        self._lock = threading.Lock()

    def match(
        self, runners: list[Runner], loaded: list[Json], fresh: bool = True
    ) -> dict[Runner, Held]:
        """Tell what each of these runners holds that have not ended.

        ``fresh`` reads the manifests first; without it, what was read last is good enough.
        """
        there = [runner for runner in runners if runner.process.is_running()]
        if fresh:
            self.look_at_disk()
        with self._lock:
            self._forget_ended()
            for runner in there:
                if not self._started_for.get(runner):
                    self._started_for[runner] = self._made_of(runner)
            lines = self._match_lines(there, loaded)
            self._lines |= lines
            nameless = self._unknown_versions(loaded, lines)
            return {runner: self._held(runner, lines.get(runner), nameless) for runner in runners}

    def versions(self, model: str, loaded: list[Json]) -> set[Version]:
        """Return all versions of a model, by any of its names, that a runner may hold."""
        key = name_key(model)
        with self._lock:
            known = {*self._on_disk, *map(version, [*loaded, *self._lines.values()])}
        ids = {digest for name, manifest in self._there() if name == key for digest in manifest.ids}
        return {each for each in known if each[0] == key or each[1] in ids}

    def unload(self, line: Json, runner: Runner | None = None) -> bool:
        """Ask Ollama to let go of what it lists in this line; return whether it says yes."""
        try:
            with self._unloadable_name(line, runner) as name:
                self._ollama.unload(name, UNLOAD_ASK_S)
        except ServiceError as e:
            log.warning("unload %s: %s", line["name"], e)
            return False
        return True

    @contextlib.contextmanager
    def _unloadable_name(self, line: Json, runner: Runner | None) -> typing.Iterator[str]:
        """Give a name by which Ollama unloads just what it lists in this line.

        Raises ServiceError where there is none: its own may be another version's by now.
        """
        there = self._there()
        own = name_key(line["name"])
        digest = line.get("digest", "")
        seen = self._seen.get(digest)
        weights = seen.weights if seen else ()
        if runner and runner.digest and not seen:
            weights = (runner.digest,)
        same = [key for key, other in there if weights and other.weights == weights]
        same += [key for key, other in there if digest in other.ids]
        if own in same or own not in dict(there) and not weights:
            yield line["name"]
        elif same:
            yield same[0]
        elif weights:
            with self._manifests.lent_name(weights) as name:
                yield name
        else:
            raise ServiceError("model_not_found", f"{line['name']} is another version's name now.")

    def _there(self) -> list[tuple[str, Manifest]]:
        """Return the models on the disk that Ollama can load: the key of each and its manifest."""
        found = self._manifests.there().items()
        return [(key, each) for key, several in found for each in several if each.layers]

    def look_at_disk(self) -> None:
        """Note which models are there; a slow disk holds up nobody who matches meanwhile."""
        there, now = self._there(), self._clock()
        with self._lock:
            for key, manifest in there:
                for digest in manifest.ids:
                    self._seen[digest] = manifest
                    self._on_disk[key, digest] = now

    def _forget_ended(self) -> None:
        for known in (self._lines, self._started_for):
            for runner in [each for each in known if not each.process.is_running()]:
                del known[runner]

    def _made_of(self, runner: Runner) -> frozenset[Version]:
        """Return the models that a new runner may have been started for; those there now first."""
        fitting = {each: at for each, at in self._on_disk.items() if self._fits(runner, each)}
        since = self._clock() - REPLACED_S
        young = {each for each, at in fitting.items() if at >= since}
        return frozenset(young or fitting)

    def _fits(self, runner: Runner, model: Version) -> bool:
        """Tell whether a runner's command line names this model, or its weights."""
        key, digest = model
        if runner.digest:
            manifest = self._seen.get(digest or "")
            return manifest is not None and manifest.weights[:1] == (runner.digest,)
        split = SPLIT.search(runner.model)
        if split:
            return (digest or "").startswith(split[1])
        return name_key(runner.model) == key

    def _match_lines(self, runners: list[Runner], loaded: list[Json]) -> dict[Runner, Json]:
        """Pair those that fit nothing else: first as before, then by what the lines tell."""
        found: dict[Runner, Json] = {}
        free = {version(line): line for line in loaded}
        for runner in runners:
            before = self._lines.get(runner)
            if before and version(before) in free:
                found[runner] = free.pop(version(before))
        left = [runner for runner in runners if runner not in found]
        for each in list(free):
            fitting = [runner for runner in left if self._fits(runner, each)]
            new = [runner for runner in fitting if runner not in self._lines]
            if len(new or fitting) == 1:
                (runner,) = new or fitting
                found[runner] = free.pop(each)
                left.remove(runner)
        unknown = [line for line in free.values() if not self._is_known(line)]
        nameless = [runner for runner in left if not self._started_for[runner]]
        if len(unknown) == len(nameless) == 1:
            found[nameless[0]] = unknown[0]
        return found

    def _is_known(self, line: Json) -> bool:
        return line.get("digest") in self._seen

    def _unknown_versions(self, loaded: list[Json], lines: dict[Runner, Json]) -> set[Version]:
        """Return what is listed, and matches no runner, and of which no manifest was seen."""
        matched = set(map(version, lines.values()))
        unknown = {version(line) for line in loaded if not self._is_known(line)}
        return unknown - matched

    def _held(self, runner: Runner, line: Json | None, nameless: set[Version]) -> Held:
        """Say what is known of a runner, whether it is listed (``line``) or not."""
        listed = line or self._lines.get(runner)
        if listed:
            return Held(listed["name"], line, frozenset([version(listed)]))
        may_be = self._started_for.get(runner, frozenset())
        manifests = {self._seen[digest].ids for _, digest in may_be if digest}
        name = min(may_be)[0] if len(manifests) == 1 and not nameless else None
        return Held(name, None, may_be | nameless)


def version(line: Json) -> Version:
    """Return which version of which model a line of ``/api/ps`` lists."""
    return name_key(line["name"]), line.get("digest")


class ListCleaner:
    """Has Ollama let go of what it lists without a process: the runner was killed from outside."""

    def __init__(self, matching: Matching, processes: Processes):
        self._matching, self._processes = matching, processes
        self._found: dict[Version, Json] = {}  # at the last look

    def clean(self, loaded: list[Json], runners: typing.Collection[Held]) -> None:
        """Unload what has had no process for two looks."""
        before = self._found
        self._found = self._without_process(loaded, runners)
        for each in self._found.keys() & before.keys():
            self._matching.unload(self._found[each])

    def _without_process(
        self, loaded: list[Json], runners: typing.Collection[Held]
    ) -> dict[Version, Json]:
        """Return the lines of ``/api/ps`` that no child of the server may stand behind."""
        matched = {version(held.line) for held in runners if held.line}
        unlisted = [held for held in runners if not held.line]
        found = {version(line): line for line in loaded}
        for each in list(found):
            if each in matched or any(held.may_be_one_of({each}) for held in unlisted):
                del found[each]
        return found if found and not self._processes.unknown_children() else {}
