"""The model store, read without Ollama."""

import contextlib
import itertools
import json
import os
import shutil
import threading
import time

import pytest

from app import STATUS
from helpers.given_time import Clock
from helpers.models import add_model, blob_path, manifest_path
from llm_service import store as module
from llm_service.errors import ServiceError
from llm_service.files import bytes_freed
from llm_service.processes import OpenFiles
from llm_service.store import PURGE_S, Store
from ollama_client import name_key

DIGEST, OTHER = "ab12" * 16, "cd34" * 16
PLACES = [
    "registry.ollama.ai/library/gemma/latest",
    "registry.ollama.ai/user/gemma/tag",
    "hf.co/Org/Repo-GGUF/Q4_K_M",
    "localhost:5000/ns/model/1b",
    "example.com/a/b/c/d/e/latest",
    "too/short",
    "loose",
    ".hidden/ns/model/latest",
]


@pytest.fixture
def weights(tmp_path):
    """A small file in the place of a model: a store does not look into it."""
    file = tmp_path / "weights.gguf"
    file.write_bytes(b"GGUF" + os.urandom(50_000))
    return file


@pytest.fixture
def models(tmp_path):
    """The path of a store."""
    folder = tmp_path / "models"
    folder.mkdir()
    return folder


def test_a_stores_models_are_read_from_its_files(models, weights):
    store = Store(models)
    assert store.models() == {}
    assert store.sizes(["0" * 64]) == {}
    assert store.disk()["partial_bytes"] == 0
    for name in ("gemma", "user/Gemma:tag"):
        add_model(models, name, weights)
    assert set(store.models()) == {name_key("gemma"), name_key("user/gemma:tag")}
    digest, config = store.models()["gemma:latest"]
    assert store.sizes([config, digest, "0" * 64]) == {
        digest: weights.stat().st_size,
        config: blob_path(models, f"sha256:{config}").stat().st_size,
    }


def test_a_store_that_is_not_there_is_empty(tmp_path):
    assert Store(tmp_path / "nowhere").disk() is None
    assert Store(tmp_path / "nowhere").models() == {}


def test_a_store_never_looks_as_it_did_before_a_change(models, weights):
    seen = []

    def note_signature():
        # Just changed: the next change might not show.
        assert Store(models).signature() is None
        seen.append(store_of(models).signature())

    # No manifests, so nothing to tell a change by.
    assert Store(models).signature() is None
    add_model(models, "stays", weights)
    note_signature()
    add_model(models, "library/other", weights)
    note_signature()
    shutil.rmtree(manifest_path(models, "other").parent)
    note_signature()
    assert None not in seen and len(set(seen)) == 3


def test_a_change_shows_in_what_is_kept_of_the_store(models, weights):
    store = store_of(models)
    times = itertools.count(time.time() - 1000)
    seen = []

    def note_signature():
        for path in (models / "manifests").rglob("*"):
            if path.stat().st_mtime > time.time() - 500:  # changed just now
                os.utime(path, (past := next(times), past))
        os.utime(models / "manifests", (past := next(times), past))
        first = store.signature()
        seen.append(store.signature())
        assert first in (seen[-1], None)  # not certain, where a file has gone

    add_model(models, "m", weights)
    note_signature()
    add_model(models, "beside:it", weights)
    note_signature()
    add_model(models, "in-another.place/of/one", weights)
    note_signature()
    manifest = manifest_path(models, "m")
    manifest.write_bytes(manifest.read_bytes())  # in place, as long as before
    note_signature()
    manifest.unlink()
    note_signature()
    assert None not in seen and len(set(seen)) == 5
    paths = [path for path, *_ in seen[-1]]
    assert str(manifest) not in paths and str(manifest_path(models, "beside:it")) in paths


def test_a_manifest_of_the_future_leaves_the_store_as_certain_as_any(models, weights):
    add_model(models, "ahead", weights)
    os.utime(manifest_path(models, "ahead"), (time.time() + 10**6,) * 2)
    store = store_of(models)
    before = store.signature()
    assert before and store.signature() == before
    os.utime(manifest_path(models, "ahead"), (time.time() + 10**7,) * 2)
    assert store.signature() not in (before, None)


def test_a_config_that_goes_changes_the_signature_too(models, weights):
    """Ollama lists no model whose config is not there."""
    add_model(models, "m", weights)
    before = store_of(models).signature()
    blob_path(models, f"sha256:{Store(models).models()['m:latest'][1]}").unlink()
    os.utime(models / "blobs", (time.time() - 9, time.time() - 9))
    assert store_of(models).signature() not in (before, None)


def test_a_store_is_read_while_models_come_and_go(models, weights):
    add_model(models, "stays", weights)
    enough = threading.Event()

    def come_and_go():
        while not enough.is_set():
            for n in range(20):
                add_model(models, f"user{n}/m", weights)
            for n in range(20):
                shutil.rmtree(manifest_path(models, f"user{n}/m").parents[1])

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        for _ in range(300):
            assert "stays:latest" in Store(models).models()
            Store(models).signature()
        assert thread.is_alive()
    finally:
        enough.set()
        thread.join()


@pytest.mark.parametrize(
    "manifest",
    [
        b"",
        b"{",
        b"[]",
        b"7",
        b"\xff",
        b'{"layers":[7],"config":{}}',
        b'{"layers":{}}',
        b'{"config":[]}',
        b'{"schemaVersion":"2"}',
        b'{"layers":[{"size":1.5}]}',
        b'{"layers":[{"size":1e3}]}',
        b'{"layers":[{"size":true}]}',
        b'{"layers":[{"size":9223372036854775808}]}',
        b'{"layers":[{"size":NaN}]}',
        b'{"layers":[],"config":{"digest":7}}',
        b'{"layers":[{"mediaType":7,"digest":"x"}],"config":{}}',
        b"\xef\xbb\xbf{}",
        b"[" * 100_000,
    ],
    ids=lambda manifest: repr(manifest[:40]),
)
@pytest.mark.usefixtures("no_garbage")
def test_a_damaged_manifest_hides_no_other_model(models, weights, manifest):
    add_model(models, "gemma", weights)
    add_model(models, "broken", weights)
    manifest_path(models, "broken").write_bytes(manifest)
    assert set(Store(models).models()) == {"gemma:latest"}


@pytest.mark.parametrize(
    "manifest",
    [
        "null",
        "{}",
        '{"layers":null,"config":{}}',
        '{"layers":[],"config":null}',
        '{"layers":[null]}',
        '{"layers":[],"config":{"digest":"sha256:../../x"}}',
        '{"layers":[{"mediaType":null}],"config":{}}',
        '{"manifests":[{"digest":"sha256:DIGEST"}]}',
        '{"layers":[{"digest":"sha256:DIG"}]} and more',
    ],
)
def test_what_ollama_lists_is_a_model_though_it_has_no_files(models, weights, manifest):
    add_model(models, "gemma", weights)
    write_manifest(models, PLACES[1], manifest.replace("DIGEST", DIGEST))
    assert Store(models).models()["user/gemma:tag"] == []


@pytest.mark.parametrize(
    "text, digests",
    [
        ('{"LAYERS":[{"Digest":"sha256:<upper>"}]}', [OTHER.upper()]),
        (
            '{"layers":[{"digest":"sha256-<b>"}],"config":{"digest":"sha256:<a>"}}',
            [OTHER, DIGEST],
        ),
        ('{"layers":[{"digest":"SHA256:<a>"}]}', []),
        ('{"layers":[{"digest":"sha256:<a>0"}]}', []),
        ('{"config":{"digest":"sha256:<a>"},"config":null} and more', [DIGEST]),
        ('{"layers":[{"digest":"sha256\\u003a<a>"}]}', [DIGEST]),
    ],
)
def test_a_manifest_is_read_as_go_reads_it(models, text, digests):
    for word, digest in (("<a>", DIGEST), ("<b>", OTHER), ("<upper>", OTHER.upper())):
        text = text.replace(word, digest)
    write_manifest(models, PLACES[0], text)
    assert Store(models).models()["gemma:latest"] == digests


def test_a_blob_that_is_missing_takes_no_bytes(models, weights):
    add_model(models, "gemma", weights)
    digest, config = Store(models).models()["gemma:latest"]
    blob_path(models, f"sha256:{digest}").unlink()
    assert set(Store(models).sizes([digest, config])) == {config}


@pytest.fixture
def clock(monkeypatch):
    """The clock by which a purge waits."""
    clock = Clock()
    clock.rule(monkeypatch, module)
    return clock


@pytest.mark.usefixtures("clock")
def test_a_purge_takes_the_parts_of_these_blobs_and_nothing_else(models):
    mine, other = "a" * 64, "b" * 64
    blobs = models / "blobs"
    blobs.mkdir()
    stay = {f"sha256-{other}-partial", f"sha256-{mine}"}
    for name in (f"sha256-{mine}-partial", f"sha256-{mine}-partial-0", *stay):
        (blobs / name).write_bytes(b"x" * 8192)
    store = Store(models)
    assert store.disk()["partial_bytes"] == 3 * 8192
    assert store.purge([mine], set) == 2 * 8192
    assert {file.name for file in blobs.iterdir()} == stay


def test_a_purge_leaves_the_parts_that_a_live_pull_has_open(models, clock):
    data, record, other = f"{'a' * 64}-partial", f"{'a' * 64}-partial-0", f"{'b' * 64}-partial"
    for name in (data, record, other):
        write_blob(models, f"sha256-{name}")
    began = clock.monotonic()
    assert Store(models).purge(["a" * 64, "b" * 64], lambda: {f"sha256-{data}"}) == 8192
    assert PURGE_S / 2 < clock.monotonic() - began < PURGE_S
    assert blobs_in(models) == {f"sha256-{data}", f"sha256-{record}"}


# What a prune removes, rule by rule


AHEAD_S = 7200  # a store's clock is, as nobody can set when a file was last changed


def store_of(models):
    """Return the store as it will be in two hours."""
    return Store(models, wall=lambda: time.time() + AHEAD_S)


def write_blob(models, name, age_s=7200.0, folder="blobs"):
    """Write a file of 8 KiB, last modified so long ago by the store's clock; return its path."""
    path = models / folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"x" * 8192)
    os.utime(path, (time.time() + AHEAD_S - age_s,) * 2)
    return path


def write_manifest(models, place, text):
    path = models / "manifests" / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def manifest_of(digest, **config):
    layers = [{"mediaType": "application/vnd.ollama.image.model", "digest": digest}]
    return json.dumps({"schemaVersion": 2, "layers": layers, **config})


def blobs_in(models):
    return {path.name for path in (models / "blobs").iterdir()}


def prune(models, age_s=3600, held=(), written=(), of_server=(), **options):
    files = OpenFiles(set(held), set(written), set(of_server))
    return store_of(models).unused.prune(age_s, files, **options)


def refused(models, **options):
    """Assert that a prune is refused and removes nothing; return the code."""
    before = blobs_in(models)
    with pytest.raises(ServiceError) as caught:
        prune(models, **options)
    assert blobs_in(models) == before
    assert STATUS[caught.value.code] == 409
    return caught.value.code


@pytest.mark.parametrize("digest", [DIGEST, DIGEST.upper()])
@pytest.mark.parametrize("kind", ["{}", "{}-partial", "{}-partial-0", "{}-partial-15", "{}.tmp"])
def test_a_prune_removes_ollamas_kinds_of_files(models, kind, digest):
    write_blob(models, f"sha256-{kind.format(digest)}")
    assert prune(models) == (8192, 1)
    assert blobs_in(models) == set()


def test_a_prune_removes_uploads_that_were_left(models):
    for name in ("sha256-12345", "sha256-3021984811", "sha256-7.tmp"):
        write_blob(models, name)
    assert prune(models) == (3 * 8192, 3)


@pytest.mark.parametrize(
    "name",
    [
        "notes.txt",
        "weights.gguf",
        DIGEST,
        f"sha256:{DIGEST}",
        f"sha256-{DIGEST[:-1]}",
        f"sha256-{DIGEST}0",
        f"sha256-{DIGEST}.bak",
        f"sha256-{DIGEST[:-1]}g",
        f"sha512-{DIGEST}",
        f"SHA256-{DIGEST}",
        f"my-sha256-{DIGEST}",
        "sha256-",
        "sha256-abc",
        "-partial",
    ],
)
def test_a_prune_leaves_other_names(models, name):
    write_blob(models, name)
    assert prune(models, 0) == (0, 0)
    assert blobs_in(models) == {name}


def test_a_prune_leaves_folders_links_and_what_is_no_file(models):
    elsewhere = models / "elsewhere"
    elsewhere.write_bytes(b"x" * 8192)
    blobs = models / "blobs"
    blobs.mkdir()
    (blobs / f"sha256-{'1' * 64}").mkdir()
    (blobs / f"sha256-{'2' * 64}").symlink_to(elsewhere)
    (blobs / f"sha256-{'3' * 64}").symlink_to("nowhere")
    os.mkfifo(blobs / f"sha256-{'4' * 64}")
    for path in (elsewhere, blobs / f"sha256-{'1' * 64}", blobs / f"sha256-{'4' * 64}"):
        os.utime(path, (0, 0))
    assert prune(models, 0) == (0, 0)
    assert len(blobs_in(models)) == 4 and elsewhere.exists()


@pytest.mark.parametrize("age_s, goes", [(3500, False), (3700, True), (-100, False)])
def test_a_prune_removes_what_is_old_enough(models, age_s, goes):
    write_blob(models, f"sha256-{DIGEST}", age_s)
    assert prune(models) == ((8192, 1) if goes else (0, 0))


def test_a_time_in_the_future_is_young_and_protects_from_no_prune_without_an_age(models):
    write_blob(models, f"sha256-{DIGEST}", -9999)
    assert prune(models, 1) == (0, 0)
    assert prune(models, 0) == (8192, 1)


def test_what_was_copied_here_with_its_old_time_is_young(models):
    """As tar and rsync do: the inode has changed just now."""
    os.utime(write_blob(models, f"sha256-{DIGEST}"), (0, 0))
    assert Store(models).unused.prune(60, OpenFiles(set(), set(), set())) == (0, 0)
    assert Store(models).disk()["unused_bytes"] == 0
    assert prune(models) == (8192, 1)


def test_the_bytes_of_a_file_count_where_its_last_link_goes(models):
    path = write_blob(models, f"sha256-{DIGEST}")
    os.link(path, models / "kept.gguf")
    os.link(path, models / "blobs" / f"sha256-{OTHER}")
    assert store_of(models).disk()["unused_bytes"] == 0
    (models / "kept.gguf").unlink()
    assert store_of(models).disk()["unused_bytes"] == 8192
    os.link(path, models / "kept.gguf")
    assert prune(models) == (0, 2)
    assert (models / "kept.gguf").stat().st_nlink == 1
    os.link(models / "kept.gguf", path)
    (models / "kept.gguf").rename(models / "blobs" / f"sha256-{OTHER}")
    assert prune(models) == (8192, 2)


def test_the_bytes_of_a_part_are_those_on_the_disk(models):
    path = write_blob(models, f"sha256-{DIGEST}-partial")
    os.truncate(path, 1 << 30)
    os.utime(path, (0, 0))
    assert store_of(models).disk()["unused_bytes"] == 8192
    assert prune(models) == (8192, 1)


@pytest.mark.parametrize("place", PLACES)
def test_what_a_manifest_names_stays_whatever_its_place(models, place):
    write_manifest(models, place, manifest_of(f"sha256:{DIGEST}"))
    write_blob(models, f"sha256-{DIGEST}")
    write_blob(models, f"sha256-{OTHER}")
    assert prune(models, 0) == (8192, 1)
    assert blobs_in(models) == {f"sha256-{DIGEST}"}


@pytest.mark.parametrize(
    "text",
    [
        manifest_of(f"sha256:{DIGEST}"),
        manifest_of(f"sha256-{DIGEST}"),
        manifest_of(f"SHA256:{DIGEST.upper()}"),
        manifest_of(f"sha256:{OTHER}", config={"digest": f"sha256:{DIGEST}"}),
        manifest_of(f"sha256:{DIGEST}", config=None),
        manifest_of(f"sha256:{DIGEST}", config={"digest": ""}),
        json.dumps({"manifests": [{"digest": f"sha256:{DIGEST}"}]}),
        json.dumps([f"sha256:{DIGEST}"]),
        json.dumps({f"sha256:{DIGEST}": 1}),
        json.dumps({"from": f"/models/blobs/sha256-{DIGEST}"}),
        manifest_of(f"sha256:{DIGEST}").replace("sha256:", "sha256\\u003a"),
        "\ufeff" + manifest_of(f"sha256:{DIGEST}"),
        manifest_of(f"sha256:{DIGEST}").encode("utf-16"),
    ],
)
def test_what_a_manifest_names_stays_whatever_its_form(models, text):
    write_manifest(models, PLACES[0], text)
    for kind in ("", "-partial", "-partial-0", ".tmp"):
        write_blob(models, f"sha256-{DIGEST}{kind}")
        write_blob(models, f"sha256-{DIGEST.upper()}{kind}")
    assert prune(models, 0) == (0, 0)


@pytest.mark.parametrize(
    "text", [b"", b"{", manifest_of(f"sha256:{DIGEST}")[:-20], b"\0" * 300, b"\xff", b"[" * 100_000]
)
@pytest.mark.parametrize("place", PLACES[:4])
@pytest.mark.usefixtures("no_garbage")
def test_a_manifest_that_cannot_be_read_refuses_a_prune(models, place, text):
    write_manifest(models, PLACES[4], manifest_of(f"sha256:{OTHER}"))
    write_manifest(models, place, text)
    write_blob(models, f"sha256-{DIGEST}")
    assert refused(models) == "manifest_unreadable"
    assert refused(models, dry_run=True) == "manifest_unreadable"
    disk = Store(models).disk()
    assert disk["unused_bytes"] is None and disk["free_bytes"] > 0


@pytest.mark.parametrize(
    "place",
    [
        ".DS_Store",
        "registry.ollama.ai/.DS_Store",
        "registry.ollama.ai/library/gemma/latest~",
        "registry.ollama.ai/library/gemma/.latest.swp",
        "registry.ollama.ai/library/gemma/#latest#",
        "registry.ollama.ai/my.namespace/gemma/latest",
        "registry.ollama.ai/library/gemma/latest/README",
        "notes.txt",
    ],
)
@pytest.mark.parametrize("text", [b"", b"\0\1Bud1", b'{"config":'])
def test_what_is_no_models_manifest_is_no_reason_to_refuse(models, place, text):
    write_manifest(models, place, text)
    write_manifest(models, PLACES[2], manifest_of(f"sha256:{OTHER}"))
    for digest in (DIGEST, OTHER):
        write_blob(models, f"sha256-{digest}")
    assert prune(models) == (8192, 1)
    assert blobs_in(models) == {f"sha256-{OTHER}"}


def test_a_folder_a_lock_and_a_pipe_among_the_manifests(models):
    beside = write_manifest(models, PLACES[0], manifest_of(f"sha256:{OTHER}")).parent
    (beside / "folder").mkdir()
    (beside / ".#latest").symlink_to("user@host.1234:99")  # an editor's lock leads nowhere
    os.mkfifo(beside / "#pipe")
    write_blob(models, f"sha256-{DIGEST}")
    assert prune(models) == (8192, 1)
    os.mkfifo(beside / "tag")  # in the place of a model: nobody waits for its writer
    write_blob(models, f"sha256-{DIGEST}")
    assert refused(models) == "manifest_unreadable"


def test_the_manifest_that_cannot_be_read_is_named(models):
    write_manifest(models, PLACES[3], b"{")
    with pytest.raises(ServiceError, match=PLACES[3]):
        prune(models)


def test_manifests_that_are_not_reached_refuse_a_prune(models):
    write_blob(models, f"sha256-{DIGEST}")
    gone = models / "manifests"
    gone.symlink_to("nowhere")  # a disk that is not mounted
    assert refused(models) == "manifest_unreadable"
    gone.unlink()
    write_manifest(models, PLACES[0], manifest_of(f"sha256:{OTHER}"))
    link = gone / "hf.co"
    link.symlink_to("nowhere")
    assert refused(models) == "manifest_unreadable"
    link.unlink()
    link.symlink_to(gone)  # without an end, and all of it can be read
    assert prune(models) == (8192, 1)


@pytest.fixture
def as_nobody(models):
    """Run as another user, who owns the store."""
    if os.geteuid():
        pytest.skip("another user takes root")
    for folder in (models, *models.parents):
        if os.stat(folder).st_uid == 0 and not os.stat(folder).st_mode & 1:
            os.chmod(folder, 0o755)

    @contextlib.contextmanager
    def become():
        for path in (models, *models.rglob("*")):
            os.chown(path, 65534, 65534)
        os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(0)

    return become


def test_a_folder_of_manifests_that_cannot_be_listed_refuses_a_prune(models, as_nobody):
    write_blob(models, f"sha256-{DIGEST}")
    manifest = write_manifest(models, PLACES[0], manifest_of(f"sha256:{DIGEST}"))
    manifest.parent.chmod(0)
    with as_nobody():
        assert refused(models) == "manifest_unreadable"
    manifest.parent.chmod(0o755)
    manifest.chmod(0)
    with as_nobody():
        assert refused(models) == "manifest_unreadable"


def test_a_store_is_found_by_its_links(models, tmp_path):
    for name in ("blobs", "manifests"):
        (tmp_path / "real" / name).mkdir(parents=True)
        (models / name).symlink_to(tmp_path / "real" / name)
    (tmp_path / "link").symlink_to(models)
    write_manifest(models, PLACES[0], manifest_of(f"sha256:{DIGEST}"))
    for digest in (DIGEST, OTHER):
        write_blob(models, f"sha256-{digest}")
    assert store_of(tmp_path / "link").disk()["unused_bytes"] == 8192
    assert prune(tmp_path / "link", held=[f"sha256-{OTHER}"]) == (0, 0)
    assert prune(tmp_path / "link") == (8192, 1)
    assert blobs_in(models) == {f"sha256-{DIGEST}"}


def test_links_below_manifests_are_followed(models, tmp_path):
    other = tmp_path / "other"
    write_manifest(other, "ns/model/latest", manifest_of(f"sha256:{DIGEST}"))
    (models / "manifests").mkdir()
    (models / "manifests/hf.co").symlink_to(other / "manifests")
    write_blob(models, f"sha256-{DIGEST}")
    assert prune(models, 0) == (0, 0)


def test_what_a_process_holds_stays(models):
    for digest in (DIGEST, OTHER):
        write_blob(models, f"sha256-{digest}")
    assert prune(models, held=[f"sha256-{DIGEST}"]) == (8192, 1)
    assert prune(models, held=[f"sha256-{DIGEST}"]) == (0, 0)
    assert prune(models) == (8192, 1)


@pytest.mark.parametrize("kind", ["sha256-" + OTHER, f"sha256-{OTHER}-partial", "sha256-123"])
def test_while_ollama_writes_to_the_store_a_prune_is_refused(models, kind):
    write_manifest(models, PLACES[0], manifest_of(f"sha256:{OTHER}"))
    write_blob(models, f"sha256-{DIGEST}")
    assert refused(models, written=[kind]) == "model_being_pulled"
    assert prune(models, written=["service.log", "history"]) == (8192, 1)


def test_while_ollama_reads_what_has_no_manifest_yet_a_prune_is_refused(models):
    """A pull that verifies needs other blobs too, which may be old ones."""
    write_manifest(models, PLACES[0], manifest_of(f"sha256:{OTHER}"))
    write_blob(models, f"sha256-{DIGEST}")
    assert refused(models, of_server=[f"sha256-{DIGEST}"]) == "model_being_pulled"
    assert prune(models, of_server=[f"sha256-{OTHER}"]) == (8192, 1)


def test_a_dry_run_tells_the_same_and_removes_nothing(models):
    write_blob(models, f"sha256-{DIGEST}")
    write_blob(models, f"sha256-{OTHER}-partial")
    assert prune(models, dry_run=True) == (16384, 2)
    assert len(blobs_in(models)) == 2
    assert prune(models) == (16384, 2)


def test_limited_to_some_digests_a_prune_leaves_the_others(models):
    for name in (DIGEST, f"{DIGEST}-partial", OTHER):
        write_blob(models, f"sha256-{name}", 0)
    prune(models, 0, only={DIGEST})
    assert blobs_in(models) == {f"sha256-{OTHER}"}
    prune(models, 0, only=set())
    assert blobs_in(models) == {f"sha256-{OTHER}"}


def test_an_empty_store_has_nothing_to_prune(models, tmp_path):
    assert prune(models) == prune(tmp_path / "nowhere") == (0, 0)
    assert store_of(models).disk()["unused_bytes"] == 0


def test_unused_and_partial_bytes(models):
    write_manifest(models, PLACES[0], manifest_of(f"sha256:{DIGEST}"))
    write_blob(models, f"sha256-{DIGEST}")
    assert store_of(models).disk()["unused_bytes"] == 0
    write_blob(models, f"sha256-{OTHER}")
    write_blob(models, f"sha256-{OTHER}-partial")
    write_blob(models, f"sha256-{'1' * 64}", 60)  # young: a create may need it
    disk = store_of(models).disk()
    assert (disk["unused_bytes"], disk["partial_bytes"]) == (16384, 8192)


# What belongs to a blob


def metadata_in(models):
    return {path.name for path in (models / "metadata").iterdir()}


def test_what_ollama_has_read_in_a_blob_goes_with_it(models):
    write_manifest(models, PLACES[0], manifest_of(f"sha256:{OTHER}"))
    for digest in (DIGEST, OTHER):
        write_blob(models, f"sha256-{digest}")
        write_blob(models, f"sha256-{digest}.json", 0, folder="metadata")
    write_blob(models, f"sha256-{'1' * 64}.json", 0, folder="metadata")  # its blob has gone
    write_blob(models, ".gguf-metadata-123.tmp", folder="metadata")
    stay = {f"sha256-{OTHER}.json", ".gguf-metadata-9.tmp", "notes.json", f"sha256-{'2' * 64}.txt"}
    for name in stay:
        write_blob(models, name, 60, folder="metadata")
    held = [f"sha256-{DIGEST}"]
    assert prune(models, held=held, only={DIGEST}) == (0, 0)
    assert store_of(models).disk()["unused_bytes"] == 4 * 8192
    assert prune(models) == (4 * 8192, 4)
    assert metadata_in(models) == stay


def test_a_blob_that_is_removed_to_be_repaired_leaves_nothing_read_in_it(models):
    write_blob(models, f"sha256-{DIGEST}")
    for digest in (DIGEST, OTHER):
        write_blob(models, f"sha256-{digest}.json", folder="metadata")
    store = Store(models)
    store.remove_blob(DIGEST)
    store.remove_blob(DIGEST)
    assert blobs_in(models) == set()
    assert metadata_in(models) == {f"sha256-{OTHER}.json"}


def test_an_old_versions_blobs_are_unused_at_once_until_they_are_used_again(models):
    path = write_blob(models, f"sha256-{DIGEST}", 0)
    store = store_of(models)
    assert store.disk()["unused_bytes"] == 0
    store.note_replaced([DIGEST, OTHER])
    assert store.disk()["unused_bytes"] == 8192
    os.utime(path)  # as a create does that uses it
    os.utime(path, (time.time() + AHEAD_S,) * 2)
    assert store.disk()["unused_bytes"] == 0


def taken(path):
    """Return what a file takes, once the kernel has decided where it lies."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return path.stat().st_blocks * 512


def test_models_take_what_du_says(models, weights):
    for name in ("one", "two"):
        add_model(models, name, weights)
    write_blob(models, f"sha256-{DIGEST}-partial")
    blobs = [path for path in (models / "blobs").iterdir() if path.name.find("partial") < 0]
    one, other = map(taken, blobs)
    disk = Store(models).disk()
    assert (disk["models_bytes"], disk["read_only"]) == (one + other, False)


def test_what_comes_free_with_a_model_is_what_no_link_keeps(models, weights):
    add_model(models, "m", weights)
    manifest = manifest_path(models, "m")
    digest, config = Store(models).models()["m:latest"]
    blob = blob_path(models, f"sha256:{digest}")
    files = Store(models).files_of("M")
    assert {file.name for file in files} == {"latest", f"sha256-{config}", blob.name}
    small = taken(manifest) + taken(blob_path(models, f"sha256:{config}"))
    assert bytes_freed(files) == small  # `weights` is a link to it
    weights.unlink()
    assert bytes_freed(Store(models).files_of("m")) == small + taken(blob)
    blob.rename(models / "elsewhere")
    blob.symlink_to(models / "elsewhere")
    assert bytes_freed(Store(models).files_of("m")) == small + blob.lstat().st_blocks * 512


# What Ollama would delete


@pytest.mark.parametrize(
    "places, name, code",
    [
        (["library/m/latest"], "m", None),
        (["library/m/latest"], "M:Latest", None),
        (["library/m/latest", "library/m/local"], "m", None),
        (["library/m/latest", "library/m/local"], "m:local", "model_not_addressable"),
        (["library/m/latest"], "m:local", "model_not_addressable"),
        (["library/m/local"], "m:local", "model_not_addressable"),
        (["library/m/8b"], "m:8b:local", None),
        (["library/m/8b-cloud"], "m:8b:cloud", None),
        (["library/m/cloud"], "m:cloud", None),
        (["library/m/latest", "library/M/latest"], "m", "model_not_addressable"),
        ([], "m", None),
        ([], "m:local", None),
    ],
)
def test_no_other_model_is_deleted_than_the_one_named(models, places, name, code):
    for place in places:
        write_manifest(models, f"registry.ollama.ai/{place}", "{}")
    check = Store(models).manifests.check_deletable
    if code:
        with pytest.raises(ServiceError) as caught:
            check(name)
        assert caught.value.code == code
    else:
        check(name)


@pytest.mark.parametrize("text", ["", "{", '{"layers":{}}'])
def test_a_model_whose_manifest_ollama_refuses_cannot_be_deleted(models, text):
    write_manifest(models, PLACES[0], text)
    with pytest.raises(ServiceError, match="ollama cp") as caught:
        Store(models).manifests.check_deletable("gemma")
    assert caught.value.code == "manifest_unreadable"


@pytest.mark.parametrize(
    "text, refuses",
    [
        (manifest_of(f"sha256-{DIGEST}"), True),
        (manifest_of(f"sha256:{DIGEST}")[:-3], True),
        (manifest_of(f"sha256:{DIGEST}"), False),
        (manifest_of(f"sha256:{OTHER}"), False),
        (json.dumps({"layers": [{"from": f"/models/blobs/sha256-{DIGEST}"}]}), False),
    ],
)
def test_what_another_model_needs_is_not_deleted(models, text, refuses):
    write_manifest(models, PLACES[0], manifest_of(f"sha256:{DIGEST}"))
    write_manifest(models, PLACES[1], text)
    write_manifest(models, f"{PLACES[0]}~", manifest_of(f"sha256-{DIGEST}"))
    write_blob(models, f"sha256-{DIGEST}")
    check = Store(models).manifests.check_deletable
    with pytest.raises(ServiceError, match=PLACES[1]) if refuses else contextlib.nullcontext():
        check("gemma")
    blob_path(models, f"sha256:{DIGEST}").unlink(missing_ok=True)
    check("gemma")


def test_a_manifest_to_which_others_are_links_is_not_deleted(models):
    """Ollama lists nothing at all while a link among the manifests leads nowhere."""
    file = write_manifest(models, PLACES[0], "{}")
    (file.parent / "copy").symlink_to(file)
    check = Store(models).manifests.check_deletable
    check("gemma:copy")
    with pytest.raises(ServiceError, match="library/gemma/copy"):
        check("gemma")


def test_a_model_that_ollama_takes_for_another_one_is_told_as_such(models):
    write_manifest(models, "registry.ollama.ai/library/m/local", "{}")
    store = Store(models)
    assert set(store.models()) == {"m:local"}
    with pytest.raises(ServiceError, match="m:latest") as caught:
        store.require("m:local")
    assert caught.value.code == "model_not_found"


def test_a_model_without_a_config_is_a_model(models):
    for place, config in ((PLACES[0], {}), (PLACES[1], {"config": {"digest": ""}})):
        write_manifest(models, place, manifest_of(f"sha256:{DIGEST}", **config))
    assert Store(models).models() == {"gemma:latest": [DIGEST], "user/gemma:tag": [DIGEST]}


# A store of another user


def test_a_store_of_ones_own_is_writable(models, tmp_path, as_nobody):
    assert Store(tmp_path / "nowhere").writable()
    with as_nobody():
        assert Store(models).writable()
    write_manifest(models, PLACES[0], manifest_of(f"sha256:{DIGEST}"))
    write_blob(models, f"sha256-{OTHER}-partial-0")
    with as_nobody():
        assert Store(models).writable()


@pytest.mark.parametrize(
    "path",
    [
        ".",
        "blobs",
        "manifests",
        "manifests/registry.ollama.ai/library/gemma",
        f"manifests/{PLACES[0]}",
        f"blobs/sha256-{OTHER}-partial-0",
    ],
)
def test_a_store_of_which_a_piece_is_anothers_is_not_writable(models, as_nobody, path):
    write_manifest(models, PLACES[0], manifest_of(f"sha256:{DIGEST}"))
    write_blob(models, f"sha256-{OTHER}-partial-0")
    with as_nobody():
        os.seteuid(0)
        os.chown(models / path, 0, 0)
        os.seteuid(65534)
        assert not Store(models).writable()
