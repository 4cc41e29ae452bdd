"""The model store, read without Ollama."""

import os
import shutil
import threading
import time

import pytest

from helpers.models import add_model, blob_path, manifest_path
from ollama_client import Store, name_key


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
        past = time.time() - 60 - len(seen)
        for folder, _, files in os.walk(models / "manifests"):
            for path in (folder, *(os.path.join(folder, file) for file in files)):
                if os.stat(path).st_mtime > time.time() - 30:
                    os.utime(path, (past, past))
        seen.append(Store(models).signature())

    # No manifests, so nothing to tell a change by.
    assert Store(models).signature() is None
    add_model(models, "stays", weights)
    note_signature()
    add_model(models, "library/other", weights)
    note_signature()
    shutil.rmtree(manifest_path(models, "other").parent)
    note_signature()
    assert None not in seen and len(set(seen)) == 3


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
        b"null",
        b"7",
        b"\xff",
        b"{}",
        b'{"layers":null,"config":{}}',
        b'{"layers":[7],"config":{}}',
        b'{"layers":[],"config":null}',
        b'{"layers":[],"config":{"digest":"sha256:../../x"}}',
        b'{"layers":[],"config":{"digest":7}}',
        b'{"layers":[{"mediaType":7,"digest":"x"}],"config":{}}',
        b'{"layers":[{"mediaType":null}],"config":{}}',
        b"[" * 100_000,
    ],
    ids=lambda manifest: repr(manifest[:40]),
)
def test_a_damaged_manifest_hides_no_other_model(models, weights, manifest):
    add_model(models, "gemma", weights)
    add_model(models, "broken", weights)
    manifest_path(models, "broken").write_bytes(manifest)
    assert set(Store(models).models()) == {"gemma:latest"}


def test_a_blob_that_is_missing_takes_no_bytes(models, weights):
    add_model(models, "gemma", weights)
    digest, config = Store(models).models()["gemma:latest"]
    blob_path(models, f"sha256:{digest}").unlink()
    assert set(Store(models).sizes([digest, config])) == {config}


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
