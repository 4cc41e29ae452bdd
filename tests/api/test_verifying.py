"""Verify and updates on the shared service, whose models no registry has."""

import pytest

from helpers.answers import GEMMA, error
from helpers.listener import VERIFY, Listener, assert_in_order
from helpers.models import blob_path, file_digest, manifest_path

UPDATES = "/api/models/updates"


def test_a_verify_streams_its_progress_and_its_outcome(service, gguf):
    listener = Listener(service, None, VERIFY)
    last = listener.end()
    assert listener.answer.headers["Content-Type"] == "application/x-ndjson"
    assert listener.answer.headers["X-Accel-Buffering"] == "no"
    assert_in_order(listener.lines)
    assert last["total_bytes"] == last["completed_bytes"] > gguf.stat().st_size
    found = {model["name"]: model for model in last["models"]}
    whole = {"name": GEMMA, "ok": True, "damaged": [], "missing": [], "unreadable": []}
    assert found[GEMMA] == whole
    for line in listener.lines[:-1]:
        assert line["status"].startswith("checking ")
        assert line["bytes_per_second"] >= 0
        assert line["completed_bytes"] <= line["total_bytes"]


def test_a_verify_without_a_body_reads_all(service):
    answer = service.post(f"{VERIFY}?stream=false")
    assert answer.status_code == 200
    listed = {model["name"] for model in service.get("/api/models").json()["models"]}
    assert {model["name"] for model in answer.json()["models"]} == listed


def test_a_verify_as_one_answer_names_what_is_damaged(service, gguf):
    small = gguf.parent / "small.gguf"
    small.write_bytes(b"GGUF, damaged")
    service.add_model("broken", small)
    blob = blob_path(service.models, file_digest(str(small)))
    try:
        blob.unlink()
        blob.write_bytes(b"GGUF, Damaged")
        answer = service.post(VERIFY, json={"model": "broken", "stream": False})
        (model,) = answer.json()["models"]
        assert answer.status_code == 200
        assert (model["name"], model["ok"]) == ("broken:latest", False)
        assert model["damaged"] == [file_digest(str(small))]
        assert blob.read_bytes() == b"GGUF, Damaged"  # it changes nothing
    finally:
        manifest_path(service.models, "broken").unlink()
        manifest_path(service.models, "broken").parent.rmdir()
        blob.unlink()
        small.unlink()


@pytest.mark.parametrize("stream", [True, False])
def test_a_model_that_is_not_there_is_a_404_before_anything_streams(service, stream):
    error(service.post(VERIFY, json={"model": "nowhere", "stream": stream}), 404, "model_not_found")
    error(service.get(f"{UPDATES}?model=nowhere"), 404, "model_not_found")


def test_updates_tell_why_nothing_is_known(service):
    """The tests' proxy is not there, and no name of theirs reaches a registry of the world."""
    answer = service.get(UPDATES)
    assert answer.status_code == 200
    body = answer.json()
    listed = {model["name"] for model in service.get("/api/models").json()["models"]}
    assert {model["name"] for model in body["models"]} == listed
    assert body["count"] == len(listed)
    for model in body["models"]:
        assert (model["state"], model["code"]) == ("unknown", "proxy_error")
        assert "HTTPS_PROXY" in model["reason"]


def test_insecure_is_of_one_model(service):
    error(service.get(f"{UPDATES}?insecure=true"), 400, "bad_field")
    error(service.get(f"{UPDATES}?insecure=perhaps&model={GEMMA}"), 400, "bad_field")
