"""Models to begin with, and how large they are, asked of a real registry on this machine."""

import types

import pytest

from helpers.faults import answer
from helpers.models import blob_path
from helpers.ports import free_port
from llm_service.recommended import NOT_ASKED, SMALL, THEIRS_MOST, Recommended
from llm_service.registry import Registries
from llm_service.store import Store


@pytest.fixture
def registry(tls_registry):
    return tls_registry


@pytest.fixture
def make(tmp_path, authority, monkeypatch):
    """Make one whose Ollama recommends these names, and no small one is added."""
    monkeypatch.setattr("llm_service.recommended.SMALL", [])
    (tmp_path / "blobs").mkdir()

    def made(*names):
        ollama = types.SimpleNamespace(recommendations=lambda: [entry(name) for name in names])
        environment = {"SSL_CERT_FILE": str(authority.pem)}
        registries = Registries(environment, lambda: "ollama/0.34.4")
        return Recommended(ollama, Store(tmp_path), registries, one_s=2)

    return made


def entry(name):
    return {"name": name, "description": "d", "vram_bytes": 12_000_000_000}


def test_nothing_is_asked_without_being_told_to(make, registry):
    name = registry.add("ns/m:latest", b"weights" * 100)
    assert make(name).models(sizes=False)["models"] == [{**entry(name), **NOT_ASKED}]
    assert not registry.requests


def test_what_a_pull_would_fetch_is_told_for_each(make, registry, tmp_path):
    names = [registry.add(f"ns/m{n}:latest", bytes([n]) * 100 * (n + 1)) for n in range(3)]
    names.append(registry.add("ns/m:latest", b"shared" * 100).removesuffix(":latest"))
    layer = registry.layers("ns/m0:latest")[0]
    blob_path(tmp_path, layer["digest"]).write_bytes(bytes(100))
    told = make(*names).models(sizes=True)["models"]
    assert [each["name"] for each in told] == names
    sizes = [registry.size(f"ns/m{n}:latest") for n in ("0", "1", "2", "")]
    assert [each["size_bytes"] for each in told] == sizes
    assert [each["download_bytes"] for each in told] == [sizes[0] - 100, *sizes[1:]]
    assert {each["code"] for each in told} == {None}


def test_why_a_size_is_not_known_is_told_and_the_others_are(make, registry):
    there = registry.add("ns/m:latest", b"weights")
    gone = there.replace("/m:", "/gone:")
    first, second, third = make(gone, there, gone).models(sizes=True)["models"]
    assert first["code"] == third["code"] == "model_not_found" and first["reason"]
    assert first["size_bytes"] is first["download_bytes"] is None
    assert second["size_bytes"] == registry.size("ns/m:latest")


def test_what_stops_one_stops_all_after_one_question(make, registry):
    name = registry.add("ns/m:latest", b"weights")
    closed = f"localhost:{free_port()}/ns/m:latest"
    told = make(closed, name).models(sizes=True)["models"]
    assert {each["code"] for each in told} == {"registry_unreachable"}
    assert not registry.requests


def test_what_is_no_manifest_has_no_size(make, registry):
    name = registry.add("ns/m:latest", b"weights")
    registry.faults["manifest"] = answer(200, b"<p>Log in.</p>")
    (told,) = make(name).models(sizes=True)["models"]
    assert (told["code"], told["size_bytes"]) == ("registry_error", None)
    (told,) = make("no name at all").models(sizes=True)["models"]
    assert told["code"] == "bad_model_name"


def test_ollamas_list_is_bounded_and_follows_the_small_ones(make, monkeypatch):
    monkeypatch.setattr("llm_service.recommended.SMALL", SMALL)
    names = ["llama3.1:8b", *(f"m{n}" for n in range(40))]
    listed = [each["name"] for each in make(*names).models(sizes=False)["models"]]
    assert listed == ["llama3.2:1b", "llama3.1:8b", *names[1 : THEIRS_MOST + 1]]
