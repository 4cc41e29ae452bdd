"""The disk: nothing is left behind, and nothing damaged is kept."""

import hashlib
import itertools
import json
import os
import random
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest

from helpers.answers import clear, error, health, stats
from helpers.listener import PULL, Listener, assert_in_order, is_whole, pull_of
from helpers.models import MEDIA, blob_path, file_digest
from helpers.registry import MIB
from helpers.service import SMALL_RESERVE
from helpers.waiting import wait_for

PRUNE, DELETE = "/api/models/prune", "/api/models/delete"


@pytest.fixture(scope="module")
def plain(make_module_service):
    """The file's service."""
    return make_module_service()


@pytest.fixture(autouse=True)
def empty_store(request):
    """Leave no model and no part in the file's service, whatever its manifests were made to be."""
    yield
    if "plain" not in request.fixturenames:
        return
    service = request.getfixturevalue("plain")
    for each in service.get(PULL).json()["pulls"]:
        if each["state"] == "running":
            service.delete(PULL, json={"model": each["model"]})
    for model in service.get("/api/models").json()["models"]:
        service.delete(DELETE, json={"model": model["name"], "force": True})
    shutil.rmtree(service.models / "manifests", ignore_errors=True)
    (service.models / "manifests").mkdir(exist_ok=True)
    wait_for(lambda: service.post(PRUNE, json={"older_than_s": 0}).ok, 60, "a prune")


def content(seed, megabytes=1):
    return random.Random(seed).randbytes(int(megabytes * MIB))


def publish(registry, name, *seeds, megabytes=1):
    """Publish a model with a layer for each seed; return the name to pull by."""
    first, *others = (content(seed, megabytes) for seed in seeds)
    extra = [(MEDIA + "adapter", layer) for layer in others]
    return registry.add(name, first, extra_layers=extra)


def pull(service, name, **fields):
    """Pull a model; assert success and the order of the lines, and return the lines."""
    listener = Listener(service, name, **fields)
    assert listener.end()["status"] == "success", listener.lines[-1]
    assert_in_order(listener.lines)
    words = [line["status"] for line in listener.lines[:-1]]
    assert not [status for status in words if "success" in status]
    return listener.lines


def blobs(service):
    """Return the names of the files in the store."""
    return {path.name for path in (service.models / "blobs").iterdir()}


def blobs_of(registry, *names):
    layers = itertools.chain.from_iterable(map(registry.layers, names))
    return {layer["digest"].replace(":", "-") for layer in layers}


def prune(service, **fields):
    answer = service.post(PRUNE, json=fields)
    assert answer.status_code == 200, answer.text
    assert answer.json()["status"] == "success"
    return answer.json()


class OllamaPull(threading.Thread):
    """A pull on Ollama's own port: .lines so far."""

    def __init__(self, service, name):
        super().__init__(daemon=True)
        self.service, self.name_, self.lines = service, name, []
        self.start()

    def run(self):
        body = {"model": self.name_, "insecure": True}
        answer = self.service.ollama("POST", "/api/pull", json=body, stream=True)
        for line in answer.iter_lines():
            self.lines.append(json.loads(line))

    def flowing(self):
        """Wait until a part of it is there."""
        wait_for(lambda: any(line.get("completed") for line in self.lines), 30, "bytes")
        return self

    def end(self):
        self.join(60)
        assert not self.is_alive() and self.lines[-1] == {"status": "success"}


def disk_size(*files):
    """Return the bytes that files take on the disk for good: writeback may add a block."""
    for file in files:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    return sum(file.stat().st_blocks * 512 for file in files)


def wait_unused(service, size):
    """Wait until the figure is that: where no file comes or goes, it is read once a minute."""
    wait_for(lambda: stats(service)["disk"]["unused_bytes"] == size, 90, "unused_bytes")


# Updates


def test_an_update_leaves_nothing_of_the_old_version_but_what_others_share(plain, registry):
    name = publish(registry, "ns/updated:latest", 1, 2, 3)
    other = publish(registry, "ns/other:latest", 1, 4)
    for each in (name, other):
        pull(plain, each)
    before = blobs_of(registry, name)
    publish(registry, "ns/updated:latest", 5, 2)
    pull(plain, name)
    assert blobs(plain) == blobs_of(registry, name, other)
    gone = {f"sha256-{hashlib.sha256(content(seed)).hexdigest()}" for seed in (1, 3)}
    assert before - blobs(plain) == gone - blobs_of(registry, other)
    assert "warning" not in pull(plain, name)[-1]  # twice the same
    assert blobs(plain) == blobs_of(registry, name, other)
    assert is_whole(plain, registry, name) and is_whole(plain, registry, other)


def test_an_update_of_what_two_names_share_leaves_it_to_the_other(plain, registry):
    name = publish(registry, "ns/shared:latest", 1)
    pull(plain, name)
    copied = plain.ollama("POST", "/api/copy", json={"source": name, "destination": "copy"})
    assert copied.ok
    old = blobs_of(registry, name)
    publish(registry, "ns/shared:latest", 2)
    pull(plain, name)
    assert blobs(plain) == old | blobs_of(registry, name)


def test_an_update_that_fails_leaves_the_old_version(plain, registry):
    name = publish(registry, "ns/failing:latest", 1)
    pull(plain, name)
    old = blobs_of(registry, name)
    publish(registry, "ns/failing:latest", 2)
    registry.corrupt.add(registry.layers(name)[0]["digest"])
    assert Listener(plain, name).end()["code"] == "digest_mismatch"
    assert old <= blobs(plain)


def test_an_update_beside_another_download_is_unused_until_a_prune(plain, registry):
    name = publish(registry, "ns/beside:latest", 1)
    pull(plain, name)
    old = registry.layers(name)[0]
    slow = registry.add_random("ns/slow:latest", 30)
    registry.rate = 2e6
    listener = Listener(plain, slow).flowing()
    publish(registry, "ns/beside:latest", 2)
    pull(plain, name)
    assert blob_path(plain.models, old["digest"]).exists()
    size = disk_size(blob_path(plain.models, old["digest"]))
    wait_unused(plain, size)
    error(plain.post(PRUNE), 409, "model_being_pulled")
    registry.rate = None
    assert listener.end()["status"] == "success"
    assert prune(plain)["freed_bytes"] == size
    assert blobs(plain) == blobs_of(registry, name, slow)


def test_an_update_while_the_old_version_is_loaded(plain, registry, gguf, make_gguf_variant):
    name = registry.add("ns/loaded:latest", gguf)
    pull(plain, name)
    generation = plain.generate(name, use_mmap=True)  # else the runner has no file open
    registry.add("ns/loaded:latest", make_gguf_variant(1))
    assert "old version stay until a prune" in pull(plain, name)[-1]["warning"]
    generation.goes_on()
    old = blob_path(plain.models, file_digest(str(gguf)))
    assert old.exists()
    (metadata,) = (plain.models / "metadata").glob(f"{old.name}.json")
    size = disk_size(old, metadata)
    wait_unused(plain, size)
    assert prune(plain)["files"] == 0 and old.exists()
    generation.goes_on()
    report = clear(plain)
    assert report["verified"] and not plain.runners()
    would = prune(plain, dry_run=True)
    assert would["freed_bytes"] == size and old.exists()
    assert prune(plain)["freed_bytes"] == size
    assert not old.exists() and not metadata.exists()
    wait_unused(plain, 0)
    plain.load(name)
    clear(plain)


def test_a_model_that_was_updated_while_it_is_loaded_can_be_deleted(
    plain, registry, gguf, make_gguf_variant
):
    name = registry.add("ns/idle:latest", gguf)
    pull(plain, name)
    plain.load(name)
    registry.add("ns/idle:latest", make_gguf_variant(1))
    pull(plain, name)
    answer = plain.delete(DELETE, json={"model": name, "force": True})
    assert answer.status_code == 200 and answer.json()["freed_bytes"] >= gguf.stat().st_size, (
        answer.text
    )
    wait_for(lambda: not plain.runners(), 30, "the end of the runner")


# Prune beside what needs the files


def test_a_prune_beside_a_download_is_refused(plain, registry):
    name = registry.add_random("ns/running:latest", 20)
    registry.rate = 2e6
    listener = Listener(plain, name).flowing()
    error(plain.post(PRUNE), 409, "model_being_pulled")
    error(plain.post(PRUNE, json={"older_than_s": 0, "dry_run": True}), 409, "model_being_pulled")
    registry.rate = None
    assert listener.end()["status"] == "success" and is_whole(plain, registry, name)


def test_a_prune_beside_a_stalled_pull_of_ollamas_own_is_refused(plain, registry):
    name = registry.add_random("ns/stalled:latest", 20)
    registry.stall_after(8_000_000)
    pulling = OllamaPull(plain, name)
    wait_for(lambda: registry.stall and registry.bytes_sent() > 1e6, 30, "a stall")
    error(plain.post(PRUNE), 409, "model_being_pulled")
    error(plain.post(PRUNE, json={"older_than_s": 0}), 409, "model_being_pulled")
    registry.stall = False
    pulling.end()
    assert is_whole(plain, registry, name)
    assert registry.bytes_sent() < registry.size(name) * 1.1


def test_prunes_never_take_what_a_pull_of_ollamas_own_counts_on(plain, registry):
    """Of an old file it says that it is there, long before its manifest names it."""
    left = publish(registry, "ns/left:latest", 1, 2)
    pull(plain, left)
    shutil.rmtree(plain.models / "manifests")
    (plain.models / "manifests").mkdir()
    name = publish(registry, "ns/counts:latest", 1, 5, 2, megabytes=1)
    big = registry.add_random("ns/big:latest", 150, shares=(1,))
    registry.models["ns/counts:latest"].insert(1, registry.layers(big)[0])
    registry.rate = 100e6
    pulling = OllamaPull(plain, name)
    wait_for(lambda: registry.bytes_sent() > 1e6, 30, "the first bytes")
    statuses = set()
    while pulling.is_alive():
        statuses.add(plain.post(PRUNE, json={"older_than_s": 0}).status_code)
    pulling.end()
    assert statuses <= {200, 409} and 409 in statuses
    assert is_whole(plain, registry, name)


def test_a_prune_beside_a_create_leaves_its_upload(plain, gguf):
    digest = file_digest(str(gguf))
    reached, go_on = threading.Event(), threading.Event()

    def slowly():
        with open(gguf, "rb") as file:
            yield file.read(50_000_000)
            reached.set()
            go_on.wait(60)
            yield from iter(lambda: file.read(MIB), b"")

    uploads = []

    def upload():
        uploads.append(plain.ollama("POST", f"/api/blobs/{digest}", data=slowly()))

    uploading = threading.Thread(target=upload)
    uploading.start()
    reached.wait(60)
    wait_for(lambda: plain.post(PRUNE).status_code == 409, 30, "a refusal in mid-upload")
    go_on.set()
    uploading.join(60)
    assert uploads[0].status_code == 201
    assert prune(plain)["files"] == 0
    body = {"model": "made", "files": {"made.gguf": digest}, "stream": False}
    created = plain.ollama("POST", "/api/create", json=body)
    assert created.ok, created.text
    assert prune(plain, older_than_s=0)["freed_bytes"] == 0
    plain.load("made")
    clear(plain)


def test_a_prune_takes_the_parts_of_a_cancelled_download(plain, registry):
    name = registry.add_random("ns/cancelled:latest", 40)
    registry.rate = 20e6
    listener = Listener(plain, name).flowing(10)
    plain.delete(PULL, json={"model": name})
    listener.end()
    wait_for(lambda: plain.post(PRUNE).ok, 60, "the end of the transfers")
    assert any("-partial" in each for each in blobs(plain))  # not old enough
    wait_for(lambda: stats(plain)["disk"]["partial_bytes"] > 5e6, 30, "partial_bytes")
    assert prune(plain)["files"] == 0
    assert prune(plain, older_than_s=0)["freed_bytes"] > 5e6
    assert blobs(plain) == set()
    registry.rate = None
    pull(plain, name)


def test_a_prune_of_a_half_written_manifest_is_refused(plain, registry):
    name = publish(registry, "ns/kept:latest", 1)
    pull(plain, name)
    broken = plain.models / "manifests/hf.co/org/repo/Q4_K_M"
    broken.parent.mkdir(parents=True)
    (manifest,) = plain.models.glob("manifests/localhost*/ns/kept/latest")
    broken.write_bytes(manifest.read_bytes()[:-30])
    answer = error(plain.post(PRUNE, json={"older_than_s": 0}), 409, "manifest_unreadable")
    assert "hf.co/org/repo/Q4_K_M" in answer["error"]
    broken.unlink()
    assert prune(plain, older_than_s=0)["files"] == 0


def test_an_update_beside_a_manifest_that_cannot_be_read_says_what_it_left(plain, registry):
    name = publish(registry, "ns/leaving:latest", 1)
    pull(plain, name)
    empty = plain.models / "manifests/registry.ollama.ai/library/empty/latest"
    empty.parent.mkdir(parents=True)
    empty.touch()
    publish(registry, "ns/leaving:latest", 2)
    warning = pull(plain, name)[-1]["warning"]
    assert "1 MB of the old version stay" in warning and "library/empty/latest" in warning
    answer = error(plain.delete(DELETE, json={"model": "empty"}), 409, "manifest_unreadable")
    assert "ollama cp" in answer["error"]
    # What it advises works.
    copy = {"source": name, "destination": "empty"}
    assert plain.ollama("POST", "/api/copy", json=copy).ok
    assert plain.delete(DELETE, json={"model": "empty"}).ok
    assert prune(plain, older_than_s=0)["files"] == 1
    assert blobs(plain) == blobs_of(registry, name)


@pytest.mark.parametrize("fields", [{"older_than_s": -1}, {"older_than_s": "x"}, {"dry_run": 7}])
def test_a_prune_with_a_field_that_makes_no_sense_is_refused(plain, fields):
    error(plain.post(PRUNE, json=fields), 400, "bad_field")


# Purge


def test_a_purge_leaves_a_live_pull_of_ollamas_own_alone(plain, registry):
    name = registry.add_random("ns/alive:latest", 40)
    registry.rate = 5e6
    listener = Listener(plain, name).flowing(3)
    pulling = OllamaPull(plain, name).flowing()  # it has joined the same parts
    began = time.monotonic()
    answer = plain.delete(PULL, json={"model": name, "purge": True})
    assert time.monotonic() - began < 2.5
    assert answer.status_code == 200 and answer.json()["freed_bytes"] == 0
    listener.end()
    assert any("-partial-0" in each for each in blobs(plain))
    registry.rate = None
    pulling.end()
    assert is_whole(plain, registry, name)
    assert registry.bytes_sent() < registry.size(name) * 1.1


# Verify


def flip(path, at=1000):
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


DAMAGES = {
    "flipped": flip,
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "longer": lambda path: os.truncate(path, path.stat().st_size + 1),
    "missing": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("number", [0, 1])
def test_verify_repairs_a_model_and_downloads_only_what_is_damaged(plain, registry, damage, number):
    name = publish(registry, "ns/damaged:latest", 1, 2, 3, megabytes=3)
    pull(plain, name)
    layer = registry.layers(name)[number]
    path = blob_path(plain.models, layer["digest"])
    DAMAGES[damage](path)
    sent = registry.bytes_sent()
    if damage != "missing":
        pull(plain, name)  # Ollama trusts what is there
        assert registry.bytes_sent() == sent
    lines = pull(plain, name, verify=True)
    assert file_digest_now(path) == layer["digest"]
    assert is_whole(plain, registry, name)
    assert registry.bytes_sent() == sent + layer["size"]
    said = [line["status"] for line in lines if line["status"].startswith("removed 1 damaged")]
    assert len(said) == (damage != "missing")
    assert any(line["status"].startswith("checking ") for line in lines)


def file_digest_now(path):
    with open(path, "rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def test_a_model_of_250_mb_with_one_flipped_bit_is_whole_afterwards(plain, registry):
    name = registry.add_random("ns/large:latest", 250, shares=(1,))
    pull(plain, name)
    layer = registry.layers(name)[0]
    path = blob_path(plain.models, layer["digest"])
    flip(path, 200_000_000)
    registry.rate = 60e6
    lines = pull(plain, name, verify=True)
    assert file_digest_now(path) == layer["digest"]
    checking = [line for line in lines if line["status"].startswith("checking ")]
    assert all(50 <= line["percent"] < 100 for line in checking)
    assert lines[-1]["total_bytes"] == registry.size(name)


def test_verify_of_a_healthy_model_downloads_nothing(plain, registry):
    name = publish(registry, "ns/healthy:latest", 1, 2, megabytes=20)
    pull(plain, name)
    asked = registry.requests.copy()
    lines = pull(plain, name, verify=True)
    again = registry.requests - asked
    assert set(again) == {"ns/healthy:latest"}  # the manifest alone
    assert not [line for line in lines if line["status"].startswith("removed")]
    assert lines[-1]["total_bytes"] == registry.size(name)


def test_verify_of_a_model_that_is_not_there_downloads_and_checks_it(plain, registry):
    name = publish(registry, "ns/fresh:latest", 1, 2)
    lines = pull(plain, name, verify=True)
    assert is_whole(plain, registry, name)
    assert any(line["status"].startswith("checking ") for line in lines)


def test_what_ollama_read_in_a_blob_goes_where_that_is_repaired_or_replaced(plain, registry):
    """While that is there, it never reads the head of the blob again."""
    name = publish(registry, "ns/read:latest", 1, 2)
    pull(plain, name)
    first, second = (layer["digest"].replace(":", "-") for layer in registry.layers(name)[:2])
    folder = plain.models / "metadata"
    folder.mkdir(exist_ok=True)
    for blob in (first, second):
        (folder / f"{blob}.json").write_text('{"kv":{"general.architecture":"damaged"}}')
    flip(plain.models / "blobs" / first)
    pull(plain, name, verify=True)
    assert is_whole(plain, registry, name)
    assert not (folder / f"{first}.json").exists() and (folder / f"{second}.json").exists()
    publish(registry, "ns/read:latest", 1, 3)
    pull(plain, name)
    assert second not in blobs(plain) and not (folder / f"{second}.json").exists()


def test_verify_and_update_in_one(plain, registry):
    name = publish(registry, "ns/both:latest", 1, 2)
    pull(plain, name)
    flip(blob_path(plain.models, registry.layers(name)[1]["digest"]))
    publish(registry, "ns/both:latest", 3, 2)
    pull(plain, name, verify=True)
    assert blobs(plain) == blobs_of(registry, name)
    for layer in registry.layers(name):
        assert file_digest_now(blob_path(plain.models, layer["digest"])) == layer["digest"]


def test_who_joins_with_verify_gets_it(plain, registry):
    name = publish(registry, "ns/joined:latest", 1, 2, 3, megabytes=5)
    pull(plain, name)
    path = blob_path(plain.models, registry.layers(name)[0]["digest"])
    flip(path)
    registry.manifest_delay = 2
    first = Listener(plain, name, detach=True)
    assert first.status == 202
    second = Listener(plain, name, verify=True)
    assert second.end()["status"] == "success"
    assert_in_order(second.lines)
    assert file_digest_now(path) == registry.layers(name)[0]["digest"]


def made_here(plain, registry):
    """Copy a model to a name that the registry does not know; return it and a blob of it."""
    name = publish(registry, "ns/base:latest", 1, 2)
    pull(plain, name)
    made = name.replace("base", "made")
    assert plain.ollama("POST", "/api/copy", json={"source": name, "destination": made}).ok
    plain.ollama("DELETE", "/api/delete", json={"model": name})
    return made, blob_path(plain.models, registry.layers(name)[0]["digest"])


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_of_a_model_that_the_registry_does_not_know_is_named(
    plain, registry, damage, stream
):
    made, path = made_here(plain, registry)
    DAMAGES[damage](path)
    before = blobs(plain)
    body = {"model": made, "insecure": True, "verify": True, "stream": stream}
    answer = plain.post(PULL, json=body)
    last = answer.text.strip().splitlines()[-1]
    assert '"model_damaged"' in last and path.name[7:19] in last
    assert blobs(plain) == before


def test_verify_of_a_healthy_model_that_the_registry_does_not_know(plain, registry):
    made, _ = made_here(plain, registry)
    before = blobs(plain)
    body = {"model": made, "insecure": True, "verify": True, "stream": False}
    answer = error(plain.post(PULL, json=body), 404, "model_not_found")
    assert "undamaged" in answer["error"] and blobs(plain) == before
    unknown = {**body, "model": made.replace("made", "nowhere")}
    assert "undamaged" not in error(plain.post(PULL, json=unknown), 404)["error"]


def test_a_check_can_be_cancelled(plain, registry):
    name = registry.add_random("ns/check:latest", 3, shares=(1,))
    pull(plain, name)
    layer = registry.layers(name)[0]
    path = blob_path(plain.models, layer["digest"])
    os.truncate(path, 30_000_000_000)  # which takes many seconds to read, whatever the machine
    listener = Listener(plain, name, verify=True)
    listener.until(lambda line: line.get("status", "").startswith("checking"), "the check")
    plain.delete(PULL, json={"model": name})
    assert listener.end()["code"] == "cancelled"
    assert_in_order(listener.lines)
    os.truncate(path, layer["size"])
    assert is_whole(plain, registry, name)


# A store that cannot be written

NO_OVERRIDE = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search,-fowner,-chown"]


@pytest.fixture
def make_unprivileged(make_service):
    """Makes a service of a root that has no more rights than others."""
    if os.geteuid() or not shutil.which("setpriv"):
        pytest.skip("files of another user take root and setpriv")

    def make(**options):
        return make_service(wrapper=NO_OVERRIDE, **options)

    return make


def give_to(user, folder):
    for path in (folder, *folder.rglob("*")):
        os.chown(path, user, user)


@pytest.fixture
def foreign(make_service, make_unprivileged, registry):
    """A service whose store, with a model, another user owns; and that model's name."""
    first = make_service()
    name = publish(registry, "ns/foreign:latest", 1)
    pull(first, name)
    first.stop()
    give_to(1000, first.models)
    constants = {"llm_service.machine.DISK_LOOK_S": 2}
    return make_unprivileged(OLLAMA_MODELS=first.models, constants=constants), name


def warnings(service):
    return {each["code"]: each["message"] for each in health(service)["warnings"]}


def test_a_store_that_cannot_be_written_is_told_by_health(foreign):
    service, name = foreign
    wait_for(lambda: "store_not_writable" in warnings(service), 60, "the warning")
    assert "chown" in warnings(service)["store_not_writable"]
    assert health(service)["models"] == [name]
    give_to(0, service.models)
    wait_for(lambda: "store_not_writable" not in warnings(service), 60, "the warning's end")


def test_what_fails_on_permissions_says_so(foreign, registry):
    service, name = foreign
    other = publish(registry, "ns/other:latest", 2)
    for stream in (True, False):
        body = {"model": other, "insecure": True, "stream": stream}
        answer = service.post(PULL, json=body)
        last = answer.text.strip().splitlines()[-1]
        assert '"store_not_writable"' in last and "chown" in last, last
    publish(registry, "ns/foreign:latest", 3)
    assert Listener(service, name).end()["code"] == "store_not_writable"
    answer = error(service.delete(DELETE, json={"model": name}), 502, "store_not_writable")
    assert "chown" in answer["error"]
    shutil.rmtree(service.models / "manifests/registry.ollama.ai", ignore_errors=True)
    (manifest,) = service.models.glob("manifests/localhost*/ns/foreign/latest")
    manifest.unlink()
    before = blobs(service)
    body = {"older_than_s": 0}
    answer = error(service.post(PRUNE, json=body), 502, "store_not_writable")
    assert "chown" in answer["error"]
    assert before and blobs(service) == before


def test_an_ollama_that_cannot_start_because_of_its_store(make_unprivileged, tmp_path):
    models = tmp_path / "models"
    models.mkdir()
    os.chown(models, 1000, 1000)
    service = make_unprivileged(OLLAMA_MODELS=models, wait=False)

    def told():
        answer = service.get("/health").json()
        return answer.get("code") == "store_not_writable" and answer

    answer = wait_for(told, 60, "the reason")
    assert "permission denied" in answer["reason"] and "chown" in answer["reason"]
    assert "permission denied" in service.log()
    os.chown(models, 0, 0)
    service.wait_healthy(60)


# A store that is mounted read-only


@pytest.fixture
def read_only(make_service, small_disk, registry):
    """A service whose store, with a model, is mounted read-only; and that model's name."""
    first = make_service(OLLAMA_MODELS=small_disk / "models", constants=SMALL_RESERVE)
    name = publish(registry, "ns/read:latest", 1)
    pull(first, name)
    first.stop()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    return make_service(OLLAMA_MODELS=small_disk / "models"), name


def test_a_read_only_store_serves_and_refuses_what_would_change_it(read_only, registry):
    service, name = read_only
    told = health(service)
    assert (told["status"], told["models"], warnings(service)) == ("healthy", [name], {})
    assert wait_for(lambda: stats(service)["disk"], 30, "the disk")["read_only"] is True
    before = blobs(service)
    publish(registry, "ns/read:latest", 2)
    for answer in (
        service.post(PULL, json={"model": name, "insecure": True}),
        service.delete(DELETE, json={"model": name}),
        service.post(PRUNE, json={"older_than_s": 0}),
    ):
        told = error(answer, 409, "store_read_only")
        assert "read-only" in told["error"] and "chown" not in told["error"]
    assert prune(service, dry_run=True, older_than_s=0)["files"] == 0
    assert blobs(service) == before
    clear(service)


# Blobs on a disk of their own


def test_the_disk_is_the_one_that_the_blobs_lie_on(make_service, small_disk, tmp_path, registry):
    models = tmp_path / "models"
    models.mkdir()
    (models / "blobs").symlink_to(small_disk)
    service = make_service(OLLAMA_MODELS=models, constants=SMALL_RESERVE)
    disk = wait_for(lambda: stats(service)["disk"], 30, "the disk")
    assert disk["total_bytes"] == shutil.disk_usage(small_disk).total
    assert disk["blobs_path"] == str(small_disk)
    name = registry.add_random("ns/large:latest", 70)
    registry.rate = 20e6
    last = Listener(service, name).end()
    assert last["code"] == "disk_full" and str(small_disk) in last["error"]


# A small disk


def test_a_disk_that_fills_while_it_verifies(on_small_disk, small_disk, registry):
    name = registry.add_random("ns/repaired:latest", 30, shares=(0.9, 0.1))
    pull(on_small_disk, name)
    path = blob_path(small_disk, registry.layers(name)[0]["digest"])
    flip(path)
    registry.rate = 5e6
    listener = Listener(on_small_disk, name, verify=True)
    listener.until(lambda line: line["status"].startswith("removed"), "the damage")
    listener.until(lambda line: line.get("completed", 0) > 3e6, "the download")
    other = small_disk / "other"
    other.write_bytes(bytes(34_000_000))
    last = listener.end()
    assert last["code"] == "disk_full" and "needs" in last["error"]
    assert_in_order(listener.lines)
    assert shutil.disk_usage(small_disk).free > 0
    other.unlink()
    registry.rate = None
    pull(on_small_disk, name)
    assert file_digest_now(path) == registry.layers(name)[0]["digest"]


def test_a_disk_that_fills_while_it_updates_leaves_the_old_version(on_small_disk, registry):
    name = registry.add_random("ns/full:latest", 36)
    pull(on_small_disk, name)
    old = blobs_of(registry, name)
    registry.add_random("ns/full:latest", 36, seed="new")
    assert Listener(on_small_disk, name).end()["code"] == "disk_full"
    assert old <= blobs(on_small_disk)
    assert pull_of(on_small_disk, name)["state"] == "error"
