"""An Ollama that speaks nonsense: every answer of the service is the contract's all the same."""

import json
import re

import psutil
import pytest

from helpers.answers import RESET, ROUTES, shaped
from helpers.listener import PULL, pulls
from helpers.nonsense import ANSWERS, SANE, stand_in
from helpers.ports import NOWHERE
from helpers.waiting import call, wait_for

LIMITS_S = {"/health": 3, "/api/stats": 3, "/api/cache/clear": 5, "/api/session/reset": 5}
SLOW = ("never", "a byte at a time")
# A reset that gets no version takes its whole time: not with every word.
RESET_WORDS = ("html", "null", "never")


@pytest.fixture(scope="module")
def confused(make_module_service, tmp_path_factory):
    """A service on such an Ollama; .says(word) tells what that answers from now on."""
    path, file = stand_in(tmp_path_factory.mktemp("ollama"))
    service = make_module_service(PATH=path, constants={"llm_service.downloads.MAX_RECONNECTS": 1})
    service.says = file.write_text
    return service


@pytest.fixture
def worker(confused):
    """The worker of the service, once that is well; its log and memory are looked at after."""
    confused.says(SANE)
    wait_for(lambda: confused.get("/health").ok, 60, "/health")
    start = len(confused.log())
    process = psutil.Process(confused.worker_pid())
    before = process.memory_info().rss
    yield
    assert not re.search(r": a bug|Traceback|\x1b|^FORGED", confused.log()[start:], re.M)
    assert process.memory_info().rss < before + 60e6


def body_for(method, path):
    if method == "GET":
        return None
    return {"model": f"{NOWHERE}/ns/m:t"} if "models" in path else {}


@pytest.mark.parametrize("word", ANSWERS)
@pytest.mark.usefixtures("worker")
def test_whatever_ollama_sends_the_answer_is_the_contracts(confused, word):
    confused.says(word)
    statuses = {}
    for method, path in ROUTES:
        if PULL in path and word in SLOW:
            continue  # a pull waits for its next line
        if path == RESET and word not in RESET_WORDS:
            continue
        answer = call(method, confused.url + path, json=body_for(method, path), timeout=10)
        statuses[f"{method} {path}"] = answer.status_code
        shaped(answer.status_code, answer.headers, answer.content, path)
        assert answer.elapsed.total_seconds() < LIMITS_S.get(path, 10)
    print(statuses)


BROKEN_PULLS = [
    "html",
    "a line and a half",
    "10 MB without an end",
    "negative sizes",
    "sizes in words",
    "a list",
    "nothing",
]


@pytest.mark.parametrize("word", BROKEN_PULLS)
@pytest.mark.usefixtures("worker")
def test_a_pull_that_ollama_answers_with_nonsense_ends_with_a_clear_error(confused, word):
    confused.says(word)
    name = f"{NOWHERE}/ns/{word.replace(' ', '-')}:t"
    answer = confused.post(PULL, json={"model": name, "stream": False}, timeout=20)
    assert answer.status_code in (502, 503)
    assert answer.json()["code"] in ("bad_answer", "pull_interrupted", "ollama_unreachable")
    streamed = confused.post(PULL, json={"model": name}, timeout=20)
    lines = [json.loads(line) for line in streamed.iter_lines()]
    assert "code" in lines[-1] and "success" not in str(lines)
    # Two or more, where the first ended before its caller had joined it.
    states = [pull["state"] for pull in pulls(confused) if pull["model"] == name]
    assert set(states) == {"error"}
