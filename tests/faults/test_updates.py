"""What is newer in a registry, asked by the service beside a real Ollama that pulls from it."""

import subprocess

import pytest

from helpers.answers import error
from helpers.faults import stall
from helpers.listener import PULL
from helpers.registry import Registry
from helpers.waiting import wait_for

UPDATES = "/api/models/updates"


@pytest.fixture(scope="module")
def service(make_module_service, authority):
    """Its environment trusts the registry, for Ollama and for the service alike."""
    return make_module_service(SSL_CERT_FILE=authority.pem, OLLAMA_NO_CLOUD=1)


@pytest.fixture
def registry(authority):
    # Ollama wants the files of another host name, with the same certificate.
    with Registry(tls=authority.context()) as one:
        yield one


def pull(service, name):
    answer = service.post(PULL, json={"model": name, "stream": False}, timeout=60)
    assert answer.status_code == 200, answer.text


def states(service, **options):
    answer = service.get(UPDATES, **options)
    assert answer.status_code == 200
    return {model["name"]: model for model in answer.json()["models"]}


def of(entry):
    return entry["state"], entry["download_bytes"]


def test_what_a_pull_would_fetch_is_what_it_fetches(service, registry):
    shared = b"shared by both versions" * 10_000
    name = registry.add("ns/a:latest", b"GGUF, first", template="x", config=shared)
    pull(service, name)
    assert of(states(service)[name]) == ("current", 0)
    registry.add("ns/a:latest", b"GGUF, second version", template="x", config=shared)
    before = registry.bytes_sent()
    told = states(service)[name]
    assert of(told) == ("newer", len(b"GGUF, second version"))
    assert told["size_bytes"] == registry.size(name)
    pull(service, name)
    assert registry.bytes_sent() - before == told["download_bytes"]
    assert of(states(service)[name]) == ("current", 0)


def test_models_made_here_are_told_as_such(service, registry, gguf):
    name = registry.add("ns/b:latest", gguf)
    pull(service, name)
    copy = {"source": name, "destination": "copied:latest"}
    assert service.ollama("POST", "/api/copy", json=copy).ok
    made = {"model": name, "from": name, "system": "Be brief.", "stream": False}
    answer = service.ollama("POST", "/api/create", json=made)
    assert answer.ok, answer.text
    told = states(service, params={"model": name})
    assert (told[name]["state"], told[name]["code"]) == ("unknown", "made_here")
    assert told[name]["made_here"]
    told = states(service)
    assert told["copied:latest"]["state"] == "unknown"  # no registry can be reached for it
    assert not told["copied:latest"]["made_here"]


README_LINES = """
curl -s {url}/api/models/updates | grep -o '"name":"[^"]*","state":"newer"' | cut -d'"' -f4 |
  while read -r model; do curl -N {url}/api/models/pull -d "{{\\"model\\":\\"$model\\"}}"; done
"""


def test_the_readmes_lines_update_all(service, registry):
    names = [registry.add(f"ns/{n}:latest", f"GGUF {n}".encode()) for n in "cde"]
    for name in names:
        pull(service, name)
    for n in "ce":
        registry.add(f"ns/{n}:latest", f"GGUF {n}, newer".encode())
    wanted = dict(zip(names, ("newer", "current", "newer"), strict=True))
    assert {name: states(service)[name]["state"] for name in names} == wanted
    assert "\nllm_models_newer 2\n" in service.get("/metrics").text
    lines = README_LINES.format(url=service.url)
    shown = subprocess.run(["bash", "-c", lines], capture_output=True, text=True, check=True)
    assert shown.stdout.count('"status": "success"') == 2
    assert {states(service)[name]["state"] for name in names} == {"current"}
    assert "\nllm_models_newer 0\n" in service.get("/metrics").text


def test_a_registry_that_hangs_holds_up_nothing_else(service, registry, others):
    name = registry.add("ns/f:latest", b"GGUF")
    pull(service, name)
    registry.faults["manifest"] = stall
    asked = others.submit(states, service, params={"model": name}, timeout=40)
    wait_for(lambda: registry.requests["ns/f:latest"] >= 2, 30, "the question")
    assert service.get("/health").status_code == 200
    assert service.get("/api/models").status_code == 200
    told = asked.result()[name]
    assert (told["state"], told["code"]) == ("unknown", "registry_unreachable")


def test_a_registry_without_tls_is_asked_only_when_bidden(service):
    with Registry() as plain:
        name = plain.add("ns/g:latest", b"GGUF")
        body = {"model": name, "insecure": True, "stream": False}
        assert service.post(PULL, json=body).status_code == 200
        before = plain.requests.total()
        told = states(service, params={"model": name})[name]
        assert (told["code"], plain.requests.total()) == ("registry_insecure", before)
        told = states(service, params={"model": name, "insecure": "true"})[name]
        assert told["state"] == "current"
    error(service.get(f"{UPDATES}?insecure=true"), 400, "bad_field")
