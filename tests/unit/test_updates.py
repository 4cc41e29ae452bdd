"""What the registries have, asked of real ones on this machine."""

import hashlib
import json
import threading
import time

import pytest

from helpers.faults import Silent, answer, cut, redirect, reset, speak, stall, wants_token
from helpers.models import add_model, blob_path, config_json, manifest_json
from helpers.ports import free_port
from helpers.registry import Registry
from llm_service.errors import ServiceError
from llm_service.registry import Registries
from llm_service.store import Store
from llm_service.updates import Updates


def agent():
    return "ollama/0.34.4 llm-service/1.2.0"


@pytest.fixture
def registry(tls_registry):
    return tls_registry


@pytest.fixture
def models(tmp_path):
    folder = tmp_path / "models"
    folder.mkdir()
    return folder


@pytest.fixture
def updates(models, authority):
    environment = authority.alone
    return Updates(Store(models), Registries(environment, agent), all_s=60, one_s=30)


def install(models, registry, name):
    """Write what a pull of this model would."""
    key = name.partition("/")[2]
    for layer in registry.layers(key):
        path = blob_path(models, layer["digest"])
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(registry.blobs[layer["digest"]].read(0, layer["size"]))
    write_manifest(models, name, manifest_json(registry.layers(key)))


def write_manifest(models, name, data):
    place, _, tag = name.rpartition(":")
    path = models / "manifests" / place / tag
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def state(updates, name, **options):
    """Return what is said of one model."""
    found = {
        each["name"]: each for each in updates.ask(None, **{"insecure": False, **options})["models"]
    }
    return found[name]


def of(entry):
    return entry["state"], entry["code"]


def test_a_model_is_current_until_its_registry_has_another_one(updates, models, registry):
    name = registry.add("ns/m:latest", b"weights" * 100, params={"a": 1}, template="x")
    install(models, registry, name)
    found = state(updates, name)
    assert found == {
        "name": name,
        "state": "current",
        "made_here": False,
        "code": None,
        "reason": None,
        "size_bytes": registry.size(name),
        "download_bytes": 0,
    }
    assert updates.newer_count() == 0
    registry.add("ns/m:latest", b"other weights" * 100, params={"a": 1}, template="x")
    found = state(updates, name)
    assert of(found) == ("newer", None)
    assert found["size_bytes"] == registry.size(name)
    assert found["download_bytes"] == 1300  # what both have in common is there
    assert updates.newer_count() == 1


def test_a_tag_that_was_moved_to_a_version_that_is_there_costs_nothing(updates, models, registry):
    old = registry.add("ns/m:1", b"one" * 100)
    new = registry.add("ns/m:2", b"two" * 100)
    for name in (old, new):
        install(models, registry, name)
    registry.models["ns/m:1"] = registry.models["ns/m:2"]
    found = state(updates, old)
    assert (of(found), found["download_bytes"]) == (("newer", None), 0)
    assert of(state(updates, new)) == ("current", None)


def test_what_is_missing_of_a_current_model_counts(updates, models, registry):
    name = registry.add("ns/m:latest", b"weights" * 100)
    install(models, registry, name)
    blob_path(models, registry.layers(name)[0]["digest"]).unlink()
    found = state(updates, name)
    assert (of(found), found["download_bytes"]) == (("current", None), 700)


def test_a_layer_that_is_named_twice_counts_once(updates, models, registry):
    data = b"twice" * 100
    name = registry.add("ns/m:latest", data, extra_layers=[("application/x", data)])
    write_manifest(models, name, b"{}")
    found = state(updates, name)
    assert of(found) == ("newer", None)
    assert found["size_bytes"] == found["download_bytes"] == 500 + len(config_json())


def test_the_content_counts_and_neither_time_nor_spaces_nor_order(updates, models, registry):
    name = registry.add("ns/m:latest", b"weights" * 100, params={"a": 1})
    install(models, registry, name)
    other = json.loads(manifest_json(registry.layers(name)))
    other["layers"].reverse()
    other["annotations"] = {"created": "today"}
    for layer in other["layers"]:
        layer["digest"] = layer["digest"].upper().replace("SHA256", "sha256")
    write_manifest(models, name, json.dumps(other, indent=2).encode())
    assert of(state(updates, name)) == ("current", None)
    # The same files in another part: a template that was a system prompt.
    other["layers"][0]["mediaType"] += ".other"
    write_manifest(models, name, json.dumps(other).encode())
    found = state(updates, name)
    assert (of(found), found["download_bytes"]) == (("newer", None), 0)


def test_a_model_that_its_registry_does_not_know(updates, models, registry):
    name = registry.add("ns/m:latest", b"weights" * 100)
    install(models, registry, name)
    del registry.models["ns/m:latest"]
    found = state(updates, name)
    assert of(found) == ("unknown", "not_in_registry")
    assert (found["size_bytes"], found["download_bytes"]) == (None, None)
    assert found["reason"]


def made_here(layers):
    """Return a manifest as Ollama writes it itself: as Go does, with a line feed."""
    text = json.dumps(json.loads(manifest_json(layers)), separators=(",", ":"))
    return text.encode() + b"\n"


def test_a_model_that_was_made_here_is_none_to_update(updates, models, registry):
    name = registry.add("ns/m:latest", b"weights" * 100)
    install(models, registry, name)
    write_manifest(models, name, made_here(registry.layers(name)))
    assert of(state(updates, name)) == ("current", None)
    registry.add("ns/m:latest", b"other weights" * 100)
    assert of(state(updates, name)) == ("unknown", "made_here")
    del registry.models["ns/m:latest"]
    assert of(state(updates, name)) == ("unknown", "made_here")
    assert updates.newer_count() == 0


# Tokens


TOKEN = json.dumps({"token": "for-anybody"})


def private(registry, realm=None, token=TOKEN):
    """Let the registry want a token for its manifests; return the tokens that it gets."""
    sent = []
    challenge = wants_token(realm or f"https://localhost:{registry.port}/token?x=1")

    def act(handler):
        sent.append(handler.headers.get("Authorization"))
        if sent[-1] == "Bearer for-anybody":
            handler.manifest(registry.models["ns/m:latest"], True)
        else:
            challenge(handler)

    registry.faults["manifest"] = act
    registry.faults["token"] = answer(200, token)
    return sent


@pytest.fixture
def name(models, registry):
    found = registry.add("ns/m:latest", b"weights" * 100)
    install(models, registry, found)
    return found


def test_a_token_for_anybody_is_asked_for(updates, registry, name):
    sent = private(registry)
    assert of(state(updates, name)) == ("current", None)
    assert sent == [None, "Bearer for-anybody"]


def test_a_registry_that_wants_a_login_is_told(updates, registry, name):
    for status in (401, 403):
        registry.faults["manifest"] = answer(status, "no")
        assert of(state(updates, name)) == ("unknown", "registry_denied")
    private(registry, token=json.dumps({"token": "another"}))
    assert of(state(updates, name)) == ("unknown", "registry_denied")


@pytest.mark.parametrize(
    "token",
    [
        "",
        "[]",
        "null",
        "{}",
        '{"token": 3}',
        '{"token": ""}',
        '{"token": "a\\r\\nX: y"}',
        "[" * 5000,
    ],
)
@pytest.mark.usefixtures("no_garbage")
def test_what_is_no_token_is_not_sent(updates, registry, name, token):
    sent = private(registry, token=token)
    assert of(state(updates, name)) == ("unknown", "registry_denied")
    assert set(sent) == {None}


@pytest.mark.parametrize(
    "realm", ["https://127.0.0.1:{}/token", "http://localhost:{}/token", "x", "http://["]
)
def test_no_token_is_taken_of_another_place(updates, registry, name, realm):
    asked = []
    private(registry, realm.format(registry.port))
    registry.faults["token"] = asked.append
    assert state(updates, name)["code"] in ("registry_denied", "registry_error")
    assert asked == []


# Redirects


def test_a_redirect_within_the_registry_is_followed(updates, registry, name):
    path = "/v2/ns/m/manifests/latest"
    registry.models["ns/n:latest"] = registry.models["ns/m:latest"]

    def act(handler):
        if handler.path == path:
            redirect("/v2/ns/n/manifests/latest")(handler)
        else:
            handler.manifest(registry.models["ns/m:latest"], True)

    registry.faults["manifest"] = act
    assert of(state(updates, name)) == ("current", None)


@pytest.mark.parametrize(
    "place",
    [
        "https://127.0.0.1:{}/v2/ns/m/manifests/latest",
        "http://localhost:{}/v2/ns/m/manifests/latest",
        "file:///etc/passwd",
        "https://hf.co/v2/ns/m/manifests/latest",
        "/v2/ns/m/manifests/latest",
    ],
    ids=["another host", "no TLS", "a file", "hf.co", "to itself"],
)
def test_no_other_redirect_is_followed(updates, registry, name, place):
    registry.faults["manifest"] = redirect(place.format(registry.port))
    assert of(state(updates, name)) == ("unknown", "registry_redirect")


def test_no_token_goes_along_to_another_host(updates, models):
    """An insecure question is led anywhere, as by Ollama; the token is not."""
    sent = []
    with Registry() as other:
        plain = other.add("ns/m:latest", b"weights" * 100)
        install(models, other, plain)
        layers = other.models["ns/m:latest"]

        def second(handler):
            sent.append(handler.headers.get("Authorization"))
            handler.manifest(layers, True)

        def first(handler):
            if handler.headers.get("Host").startswith("127"):
                second(handler)
            elif handler.headers.get("Authorization"):
                url = f"http://127.0.0.1:{other.port}/v2/ns/m/manifests/latest"
                redirect(url)(handler)
            else:
                wants_token(f"http://localhost:{other.port}/token")(handler)

        other.faults["manifest"] = first
        other.faults["token"] = answer(200, TOKEN)
        found = updates.ask(plain, insecure=True)["models"]
    assert [of(each) for each in found] == [("current", None)]
    assert sent == [None]


def test_without_tls_is_never_asked_unbidden(updates, models):
    with Registry() as plain:
        name = plain.add("ns/m:latest", b"weights" * 100)
        install(models, plain, name)
        assert of(state(updates, name)) == ("unknown", "registry_insecure")
        assert plain.requests.total() == 0
        assert of(updates.ask(name, insecure=True)["models"][0]) == ("current", None)


# Registries that fail or lie


def drip(handler):
    handler.head(200, 10_000)
    while not handler.wait(0, 0.02):
        handler.push(memoryview(b" "))


def huge(handler):
    handler.head(200, 10_000_000_000)
    while True:
        handler.push(memoryview(b" " * (1 << 20)))


def manifest(**changes):
    layer = {"mediaType": "x", "digest": "sha256:" + 64 * "0", "size": 3, **changes}
    return json.dumps({"layers": [layer], "config": None})


@pytest.mark.parametrize(
    "act, code",
    [
        (drip, "registry_unreachable"),
        (stall, "registry_unreachable"),
        (huge, "registry_error"),
        (reset, "registry_unreachable"),
        (cut(), "registry_error"),
        (speak(b"no HTTP"), "registry_error"),
        (answer(500), "registry_error"),
        (answer(304), "registry_error"),
        (answer(412), "ollama_too_old"),
        (answer(429), "registry_busy"),
        (answer(418), "registry_refused"),
        (answer(200, "<html>please log in</html>"), "registry_error"),
        (answer(200, "[" * 100_000), "registry_error"),
        (answer(200, "{}"), "registry_error"),
        (answer(200, '{"layers": []}'), "registry_error"),
        (answer(200, '{"manifests": [{"digest": "sha256:0"}]}'), "registry_error"),
        (answer(200, manifest(digest="sha256:../../etc")), "registry_error"),
        (answer(200, manifest(size=-1)), "registry_error"),
        (answer(200, manifest(size="3")), "registry_error"),
        (answer(200, manifest(size=1 << 80)), "registry_error"),
        (answer(200, manifest(), Docker_Content_Digest="sha256:" + 64 * "1"), "registry_error"),
    ],
)
@pytest.mark.usefixtures("no_garbage")
def test_a_registry_that_fails_or_lies_costs_an_unknown(updates, registry, name, act, code):
    if act in (drip, stall):
        updates._one_s = 1
    registry.faults["manifest"] = act
    found = state(updates, name)
    assert of(found) == ("unknown", code)
    assert len(found["reason"]) > 20


def test_a_digest_that_is_the_manifests_own_is_no_lie(updates, registry, name):
    data = manifest_json(registry.layers(name))
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    registry.faults["manifest"] = answer(200, data, Docker_Content_Digest=digest)
    assert of(state(updates, name)) == ("current", None)


@pytest.mark.usefixtures("name")
def test_a_certificate_that_nobody_trusts_is_told(models):
    updates = Updates(Store(models), Registries({}, agent))
    found = updates.ask(None, False)["models"]
    assert [of(each) for each in found] == [("unknown", "registry_certificate")]


# Many


def test_one_that_hangs_holds_up_no_other(updates, models, registry):
    updates._one_s = 1
    names = []
    for n in range(12):
        names.append(registry.add(f"ns/m{n}:latest", b"weights" * (n + 1)))
        install(models, registry, names[-1])
    with Silent() as silent:
        for n in range(12):  # before the others, by their names
            write_manifest(models, f"127.0.0.1:{silent.port}/ns/s{n}:latest", b"{}")
        found = updates.ask(None, False)["models"]
    states = {each["name"]: of(each) for each in found}
    assert [states.pop(name) for name in names] == [("current", None)] * 12
    assert set(states.values()) == {("unknown", "registry_unreachable")}
    assert len(states) == 12


def test_what_was_not_asked_in_time_is_unknown(models, authority, registry):
    environment = authority.alone
    updates = Updates(Store(models), Registries(environment, agent), all_s=8, one_s=30)
    names = [registry.add(f"ns/m{n:02}:latest", b"weights") for n in range(12)]
    for name in names:
        install(models, registry, name)
    registry.faults["manifest"] = lambda handler: (
        stall(handler) if "/m0" not in handler.path else answer(404)(handler)
    )
    found = {each["name"]: each["code"] for each in updates.ask(None, False)["models"]}
    assert [found.pop(name) for name in names[:10]] == ["not_in_registry"] * 10
    assert set(found) == set(names[10:])
    assert set(found.values()) <= {"timeout", "registry_unreachable"}


def test_four_are_asked_at_a_time(updates, models, registry):
    lock, now, most = threading.Lock(), [0], [0]

    def act(handler):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        until = time.monotonic() + 5
        while most[0] < 4 and time.monotonic() < until:  # a busy machine starts threads late
            handler.wait(0, 0.02)
        handler.wait(0, 0.1)
        with lock:
            now[0] -= 1
        answer(404)(handler)

    registry.faults["manifest"] = act
    for n in range(12):
        install(models, registry, registry.add(f"ns/m{n}:latest", b"weights"))
    updates.ask(None, False)
    assert most == [4]


@pytest.mark.usefixtures("name")
def test_all_callers_at_once_share_one_round(updates, registry, others):
    registry.manifest_delay = 2  # all have come by then
    calls = [others.submit(updates.ask, None, False) for _ in range(8)]
    answers = [call.result() for call in calls]
    assert all(answer == answers[0] for answer in answers)
    assert registry.requests["ns/m:latest"] == 1


def test_one_model_is_asked_about_alone(updates, models, registry, name):
    other = registry.add("ns/other:latest", b"other")
    install(models, registry, other)
    assert [each["name"] for each in updates.ask(name.upper(), False)["models"]] == [name]
    assert registry.requests["ns/other:latest"] == 0
    with pytest.raises(ServiceError) as raised:
        updates.ask("nowhere", False)
    assert raised.value.code == "model_not_found"


def test_the_count_is_of_the_last_asking(updates, models, registry, name):
    other = registry.add("ns/other:latest", b"other")
    install(models, registry, other)
    registry.add("ns/other:latest", b"newer")
    registry.add("ns/m:latest", b"newer")
    assert updates.newer_count() is None
    updates.ask(name, False)
    assert updates.newer_count() == 1
    updates.ask(None, False)
    assert updates.newer_count() == 2
    install(models, registry, name)
    updates.ask(name, False)
    assert updates.newer_count() == 1


def test_a_name_without_a_host_is_the_public_registrys(models, tmp_path):
    weights = tmp_path / "weights"
    weights.write_bytes(b"weights")
    for name in ("gemma:latest", "user/gemma:tag"):
        add_model(models, name, weights)
    nowhere = f"http://127.0.0.1:{free_port()}"
    updates = Updates(Store(models), Registries({"HTTPS_PROXY": nowhere}, agent))
    found = updates.ask(None, False)["models"]
    assert {each["name"]: of(each) for each in found} == {
        "gemma:latest": ("unknown", "proxy_error"),
        "user/gemma:tag": ("unknown", "proxy_error"),
    }
