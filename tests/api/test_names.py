"""The service's idea of a name against Ollama's own."""

import json

import pytest

from helpers.names import NO_NAMES, TAKEN
from ollama_client import SPACES, ServiceError, check_name


def taken(name):
    try:
        return check_name(name) == name.strip(SPACES)
    except ServiceError as error:
        assert error.code == "bad_model_name"
        return False


def test_a_name_is_taken_exactly_if_ollama_takes_it(service):
    def theirs(name):
        # Ollama's delete parses the name as its pull does, and asks no registry.
        sent = json.dumps({"model": name})
        status = service.ollama("DELETE", "/api/delete", data=sent).status_code
        assert status in (400, 404), (name, status)
        return status == 404

    names = TAKEN + NO_NAMES
    assert {name: taken(name) for name in names} == {name: theirs(name) for name in names}


@pytest.mark.parametrize("name", ["gemma:cloud:local", "a:x-cloud:local", "a:local-cloud"])
def test_a_name_that_ollama_alone_refuses_is_a_400_too(service, name):
    answer = service.post("/api/models/pull", json={"model": name})
    assert (answer.status_code, answer.json()["code"]) == (400, "bad_model_name")
