"""The service's reading of a store against Ollama's own, on many stores made from seeds.

Each store is made twice: Ollama is asked to change the one, the service the other.
"""

import os
import random
import shutil
import time
from collections import Counter

import pytest

from helpers.answers import clear
from helpers.models import add_model, blob_path, file_digest
from helpers.stores import TORN, SeededStore, disk_bytes
from helpers.waiting import wait_for
from llm_service.errors import ServiceError
from llm_service.processes import OpenFiles
from llm_service.store import Store
from ollama_client import check_name, name_key

SEED = int(os.environ.get("LLM_TEST_STORES_SEED") or 29)
STORES = int(os.environ.get("LLM_TEST_STORES") or 500)
NOTHING_OPEN = OpenFiles(set(), set(), set())
DELETE, PRUNE, CLEAR = "/api/models/delete", "/api/models/prune", "/api/cache/clear"
SOURCES = ("local", "cloud")


@pytest.fixture(scope="module")
def linked(make_module_service, tmp_path_factory):
    """A service whose OLLAMA_MODELS is a link that can be turned to any store."""
    folder = tmp_path_factory.mktemp("linked")
    (folder / "first").mkdir()
    (folder / "link").symlink_to(folder / "first")
    service = make_module_service(OLLAMA_MODELS=folder / "link", OLLAMA_NO_CLOUD=1)
    service.link = folder / "link"
    return service


def turn(service, store):
    new = service.link.with_name("new")
    new.symlink_to(store.path)
    new.rename(service.link)


class Comparison:
    """One seed: ``theirs`` is Ollama's to change, ``ours`` the service's."""

    def __init__(self, service, folder, seed, done):
        self.service, self.random, self.done = service, random.Random(seed), done
        self.theirs = SeededStore(folder / "theirs", seed)
        self.ours = SeededStore(folder / "ours", seed)

    def listed(self):
        answer = self.service.ollama("GET", "/api/tags")
        assert answer.ok, answer.text
        return {model["name"] for model in answer.json()["models"]}

    def lists(self):
        turn(self.service, self.theirs)
        listed = self.listed()  # which writes metadata
        turn(self.service, self.ours)
        assert self.listed() == listed
        told = self.service.get("/api/models").json()["models"]
        assert {model["name"] for model in told} == listed
        there = Store(self.ours.path).models()
        keys = {key_of(place) for place in self.ours.places if self.ours.readable(place)}
        assert there.keys() == keys and {listed_key(name) for name in listed} <= keys
        self.done["listed"] += len(listed)

    def clears(self):
        name = self.some_name()
        answer = self.service.post(CLEAR, json={"model": name})
        known = name_key(name) in {key_of(place) for place in self.theirs.places}
        readable = name_key(name) in Store(self.ours.path).models()
        assert answer.status_code == (200 if readable else 404), answer.text
        assert known or not readable
        self.done[f"clear {answer.status_code}"] += 1

    def deletes(self):
        name = self.some_name()
        turn(self.service, self.theirs)
        before = self.theirs.files()
        theirs = self.service.ollama("DELETE", "/api/delete", json={"model": name})
        removed = removed_since(before, self.theirs)
        turn(self.service, self.ours)
        before = self.ours.files()
        ours = self.service.delete(DELETE, json={"model": name})
        gone = removed_since(before, self.ours)
        wrong = self.is_wrong(name, removed)
        context = (
            f"{name} {self.ours.places} {theirs.status_code} {theirs.text} {removed} {ours.text}"
        )
        # Ollama may stop half-way, before it comes to what another model needs.
        careful = theirs.status_code == 500 and ours.status_code == 409
        if wrong or not removed or careful:
            assert not ours.ok and not gone, context
            meant = {listed_key(plain(each)) for each in (name, name.removesuffix(":local"))}
            is_there = not meant.isdisjoint(map(key_of, self.ours.places))
            assert ours.status_code == (409 if wrong or is_there else 404), context
        else:
            assert ours.ok and gone == removed, context
            self.check_freed(ours.json()["freed_bytes"], before, gone)
        self.done[f"delete {ours.status_code}{' not as Ollama' if wrong else ''}"] += 1

    def is_wrong(self, name, removed):
        """Tell whether Ollama has removed another model, or what another model needs."""
        key = listed_key(plain(name))
        matches = [place for place in self.theirs.places if key_of(place) == key]
        gone = {path for path in removed if "anifests/" in path}
        if gone and [path.split("anifests/")[1] for path in gone] != matches:
            return True
        others = self.theirs.places.keys() - set(matches)
        if not all((self.theirs.path / "manifests" / place).exists() for place in others):
            return True  # a link to the one that was removed
        blobs = {path.rpartition("sha256-")[2][:64] for path in removed if "blobs/" in path}
        lower = {blob.lower() for blob in blobs}
        return any(
            self.theirs.needs[place] & (blobs if self.theirs.readable(place) else lower)
            for place in others
        )

    def check_freed(self, freed, before, gone):
        left = {(each.st_dev, each.st_ino) for each in self.ours.files().values()}
        lost = [before[path] for path in gone]
        free = disk_bytes(each for each in lost if (each.st_dev, each.st_ino) not in left)
        assert freed == free, (gone, self.ours.places)

    def prunes(self, by_service):
        later = Store(self.ours.path, wall=lambda: time.time() + 7200)
        before, names = self.ours.files(), self.listed()
        torn = [place for place, kind in self.ours.places.items() if kind in TORN]
        torn = [place for place in torn if (self.ours.path / "manifests" / place).exists()]
        unused = later.disk()["unused_bytes"]
        if torn:
            assert unused is None
            told = self.service.post(PRUNE, json={"older_than_s": 0}).json()
            assert told["code"] == "manifest_unreadable"
            assert any(place in told["error"] for place in torn)
            assert not removed_since(before, self.ours)
            self.done["prune refused"] += 1
            return
        due = self.due(before, older_than_s=0 if by_service else 3600)
        if by_service:
            answer = self.service.post(PRUNE, json={"older_than_s": 0}).json()
            freed, files = answer["freed_bytes"], answer["files"]
        else:
            freed, files = later.unused.prune(3600, NOTHING_OPEN)
            assert freed == unused
        gone = removed_since(before, self.ours)
        assert gone == due and files == len(gone), (self.ours.places, gone ^ due)
        self.check_freed(freed, before, gone)
        assert self.listed() == names
        self.done["pruned files"] += len(gone)

    def due(self, files, older_than_s):
        """Return what a prune has to remove, by the rules of the contract."""
        named, due, blobs = self.ours.named(), set(), {}
        for path, about in files.items():
            folder, _, name = path.rpartition("/")
            if folder.endswith("blobs"):
                blobs[name] = path
                digest, _, rest = name.removeprefix("sha256-").partition("-partial")
                ours = is_hex(digest) or digest.isdecimal() or name.endswith(".tmp")
                is_file = (about.st_mode & 0o170000) == 0o100000
                young = older_than_s and about.st_mtime > time.time() + older_than_s
                kept = digest.removesuffix(".tmp").lower() in named
                if name.startswith("sha256-") and ours and is_file and not young and not kept:
                    due.add(path)
        for path in files:
            folder, _, name = path.rpartition("/")
            if folder.endswith("metadata"):
                blob = name.removesuffix(".json")
                valid = is_hex(blob.removeprefix("sha256-")) and name.endswith(".json")
                if valid and (blobs.get(blob) in due or blob not in blobs):
                    due.add(path)
                if name.startswith(".gguf-metadata-"):
                    due.add(path)
        return due

    def tells_the_disk(self):
        disk = Store(self.ours.path).disk()
        usage = shutil.disk_usage(self.ours.path / "blobs")
        assert disk["total_bytes"] == usage.total
        assert disk["blobs_path"] == os.path.realpath(self.ours.path / "blobs")
        blobs = []
        for place in filter(self.ours.readable, self.ours.places):
            if (self.ours.path / "manifests" / place).exists():
                paths = [self.ours.path / f"blobs/sha256-{each}" for each in self.ours.needs[place]]
                blobs += [path.stat() for path in paths if path.exists()]
        assert disk["models_bytes"] == disk_bytes(blobs)

    def some_name(self):
        """Return a model's name as people write it, or one with a word that says where to run."""
        place = self.random.choice([*self.ours.places, "registry.ollama.ai/library/none/latest"])
        host, namespace, model, tag = place.split("/")
        name = f"{model}:{tag}"
        if self.random.random() < 0.2 and tag not in SOURCES and not tag.endswith("-cloud"):
            name += f":{self.random.choice(SOURCES)}"
        if tag == "latest" and self.random.random() < 0.5:
            name = name.replace(":latest", "", 1)
        full = f"{host}/{namespace}/{name}"
        return full.removeprefix("registry.ollama.ai/library/")


def plain(name):
    """Return the name that people mean: a word is a tag where it can be one."""
    colons = name.rpartition("/")[2].count(":")
    if colons < 2:
        return name if colons else f"{name}:latest"
    base, _, source = name.rpartition(":")
    return base if source == "local" else f"{base}-cloud"


def is_hex(text):
    return len(text) == 64 and not set(text.lower()) - set("0123456789abcdef")


def key_of(place):
    """Return the key of a manifest's place: as Ollama lists it, in lower case."""
    host, namespace, model, tag = place.lower().split("/")
    return listed_key(f"{host}/{namespace}/{model}:{tag}")


def listed_key(name):
    return name.lower().removeprefix("registry.ollama.ai/").removeprefix("library/")


def removed_since(before, store):
    return before.keys() - store.files().keys()


@pytest.mark.timeout(100 + STORES)
def test_a_store_is_read_as_ollama_reads_it(linked, tmp_path):
    print(f"LLM_TEST_STORES_SEED={SEED} LLM_TEST_STORES={STORES}")
    done = Counter()
    for number in range(STORES):
        folder = tmp_path / str(number)
        one = Comparison(linked, folder, f"{SEED}/{number}", done)
        try:
            one.lists()
            one.tells_the_disk()
            one.clears()
            one.deletes()
            one.tells_the_disk()
            one.prunes(by_service=number % 50 == 0)
        except AssertionError as error:
            raise AssertionError(f"store {SEED}/{number}: {error}") from error
        turn(linked, one.theirs)
        shutil.rmtree(folder / "ours")
        if number:
            shutil.rmtree(tmp_path / str(number - 1), ignore_errors=True)
    print(dict(sorted(done.items())))
    outcomes = {"delete 200", "delete 404", "delete 409", "delete 409 not as Ollama"}
    assert outcomes | {"clear 200", "clear 404", "prune refused", "pruned files"} <= done.keys()


def test_what_is_left_can_still_be_loaded(linked, tmp_path, gguf):
    """A real model of two names in stores of every kind: one name goes, then what is unused."""
    for number in range(4):
        store = SeededStore(tmp_path / str(number), f"{SEED}/load/{number}")
        for name in ("user/real:latest", "user/real:other"):
            add_model(store.path, name, gguf)
        turn(linked, store)
        answer = linked.delete(DELETE, json={"model": "user/real:other"})
        assert answer.ok and answer.json()["freed_bytes"] < 10_000, answer.text
        pruned = linked.post(PRUNE, json={"older_than_s": 0})
        assert pruned.ok or set(store.places.values()) & set(TORN), pruned.text
        blob = blob_path(store.path, file_digest(str(gguf)))
        assert blob.stat().st_size == gguf.stat().st_size
        linked.load("user/real")
        clear(linked)


def test_a_link_that_leads_nowhere_in_the_place_of_a_manifest_is_named(linked, tmp_path):
    """Ollama itself then lists nothing, and finds no model."""
    store = SeededStore(tmp_path / "store", f"{SEED}/link")
    manifest = store.path / "manifests/registry.ollama.ai/library/nowhere/latest"
    manifest.parent.mkdir(parents=True)
    manifest.symlink_to("not-mounted")
    turn(linked, store)
    before = store.files()
    assert linked.ollama("GET", "/api/tags").status_code == 500
    told = wait_for(lambda: (a := linked.get("/health").json()).get("code") and a, 60, "a 503")
    assert told["recommended_action"] == "wait" and "nowhere/latest" in told["reason"]
    assert "nowhere/latest" in linked.get("/api/models").json()["error"]
    for answer in (
        linked.delete(DELETE, json={"model": "nowhere"}),
        linked.post(PRUNE, json={"older_than_s": 0}),
    ):
        assert (answer.status_code, answer.json()["code"]) == (409, "manifest_unreadable")
        assert "nowhere/latest" in answer.json()["error"]
    assert not removed_since(before, store)
    manifest.unlink()
    linked.wait_healthy(60)


def test_names_are_taken_as_ollama_takes_them(linked):
    """Put together at random of what names are made of."""
    pieces = (
        "a B m latest local cloud -cloud Local 8b 8b-cloud library registry.ollama.ai h:1 hf.co"
    )
    pieces = [
        *pieces.split(),
        "http://",
        "://",
        ":",
        "/",
        ".",
        "-",
        "_",
        " ",
        "\t",
        "\u2003",
        "\x1f",
    ]
    chance = random.Random(SEED)
    names = {"".join(chance.choices(pieces, k=chance.randint(1, 6))) for _ in range(1500)}

    def theirs(name):
        return linked.ollama("DELETE", "/api/delete", json={"model": name}).status_code != 400

    def ours(name):
        try:
            return bool(check_name(name))
        except ServiceError:
            return False

    taken = {name for name in names if theirs(name)}
    assert {name for name in names if ours(name)} == taken
    assert 200 < len(taken) < len(names) - 200
