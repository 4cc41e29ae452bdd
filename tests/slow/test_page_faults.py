"""The page in a real browser, of services of their own, to which something happens."""

import re

import psutil
import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from helpers.answers import GEMMA, ask
from helpers.frozen import frozen
from helpers.page import Page, wait_for
from helpers.processes import suspend


@pytest.fixture
def freezable(make_service, gguf):
    """Makes services that soon say of a runner that it is stuck."""

    def make(**env):
        return make_service(
            models={GEMMA: gguf},
            constants={"llm_service.watch.LOOK_S": 0.5, "llm_service.watch.LONG_IDLE_S": 8},
            LLM_MODEL=GEMMA,
            LLM_CONTEXT_LENGTH=2048,
            LLM_STUCK_SECONDS=5,
            **env,
        )

    return make


# Runners


def test_a_frozen_runner_shows_as_busy_and_then_as_healed_with_the_mark(browser, freezable):
    page = Page(browser, freezable())
    service = page.service
    answer = service.generate(GEMMA)
    wait_for(lambda: re.match(r"busy, [1-9][\d.]* tokens/s", page.state(GEMMA)[0]), 60, "busy")
    assert "work" in page.state(GEMMA)[1]
    with frozen(service.runners()[0]):
        page.wait_text("marks", f"Healed: {GEMMA} (stuck)", 60)
        last = service.get("/api/stats").json()["healed"]["last"]
        assert last["evidence"] and last["state"] == "stuck"
        shown = service.get("/api/stats?evidence=false").json()["healed"]["last"]
        assert shown == {key: last[key] for key in last if key != "evidence"}
        page.wait_row("models", GEMMA, "not loaded")
    answer.wait(60)
    assert "came free" in page.text("marks") and answer.error
    ask(service)
    page.wait_row("models", GEMMA, "idle")
    page.wait_text("state", "The service works.")
    browser.get("about:blank")


def test_a_frozen_runner_that_nobody_heals_shows_as_stuck_and_what_to_do(browser, freezable):
    page = Page(browser, freezable(LLM_SELF_HEAL="off"))
    answer = page.service.generate(GEMMA)
    with frozen(page.service.runners()[0]):
        page.wait_row("models", GEMMA, "stuck since", 60)
        words, classes = page.state(GEMMA)
        assert re.fullmatch(r"stuck since \d\d:\d\d:\d\d", words) and "bad" in classes
        page.wait_text("state", f"The runner of {GEMMA} is stuck: it works and makes no progress.")
        page.wait_text("advice", "Reset session")
        said = page.text("state"), words
        page.next_rounds(3)
        assert said == (page.text("state"), page.state(GEMMA)[0])  # calm
        page.element("advice").find_element(By.TAG_NAME, "button").click()
        page.answer("ask-yes")
        page.wait_text("messages", "The session is reset")
    answer.wait(60)
    page.wait_row("models", GEMMA, "idle", 60)
    page.wait_text("state", "The service works.")
    browser.get("about:blank")


def test_a_stopped_runner_shows_as_silent(browser, freezable):
    page = Page(browser, freezable(LLM_SELF_HEAL="off"))
    suspend(page.service.load(GEMMA))
    page.service.ollama("GET", "/api/version")
    page.wait_row("models", GEMMA, "silent since", 90)
    browser.get("about:blank")


# Warnings


def test_a_model_beside_its_gpu_is_a_sentence_at_the_top(browser, make_service, gguf, nvml):
    page = Page(browser, make_service(models={GEMMA: gguf}, LLM_MODEL=GEMMA, **nvml.env))
    wait_for(lambda: page.rows_of("gpus"), 60, "the GPU")
    assert "37 %" in page.text("gpus") and "5.4 GB of 69 GB" in page.text("gpus")
    assert page.text("warnings") == ""
    page.service.load(GEMMA)
    # The service's own sentence begins likewise: it shows until the list of models tells, too.
    page.wait_text("warnings", "Ollama sees no GPU, whatever LLM_GPU_LAYERS says")
    assert f"of {GEMMA} lie in system memory" in page.text("warnings")
    nvml.say(init=15, count=15)  # the GPU is lost
    page.wait_text("state", "GPU is lost")
    browser.get("about:blank")


def test_a_full_disk_is_a_sentence_at_the_top(browser, make_service):
    constants = {"llm_service.health.DISK_LOW_BYTES": 1 << 60}
    page = Page(browser, make_service(constants=constants))
    page.wait_text("warnings", "The disk is almost full")
    top = page.run("return document.getElementById('warnings').getBoundingClientRect().bottom")
    assert top <= page.run("return document.querySelector('main').getBoundingClientRect().top")
    browser.get("about:blank")


# Disk


def test_what_a_prune_would_free_is_told_and_freed(browser, make_service):
    constants = {"llm_service.store.PRUNE_AGE_S": 2, "llm_service.machine.DISK_LOOK_S": 5}
    page = Page(browser, make_service(constants=constants))
    unused = page.service.models / "blobs" / f"sha256-{'ab' * 32}"
    unused.write_bytes(bytes(12_300_000))
    page.wait_text("disk", "files that no model uses 12 MB", 90)
    page.click("prune")
    wait_for(lambda: page.text("ask-yes") == "Prune, frees 12 MB", 30, "the verb")
    page.answer("ask-no")
    assert unused.exists()
    page.click("prune")
    page.answer("ask-yes")
    page.wait_text("messages", "1 file removed, 12 MB came free.")
    assert not unused.exists()
    page.wait_text("disk", "files that no model uses 0 MB", 90)
    wait_for(lambda: page.element("prune").get_attribute("aria-disabled") == "true", 30, "off")
    browser.get("about:blank")


# The service and its token


def test_it_says_that_the_service_is_away_and_comes_back_by_itself(browser, make_service):
    service = make_service()
    page = Page(browser, service)
    service.stop()
    page.wait_text("state", "The service has not been reachable since")
    make_service(LLM_API_PORT=service.port)
    page.wait_text("state", "The service works")
    browser.get("about:blank")


def test_it_says_that_the_api_hangs(browser, make_service):
    service = make_service()
    page = Page(browser, service)
    page.wait_text("state", "The service works")
    worker = psutil.Process(service.worker_pid())
    suspend(worker)
    page.wait_text("state", "The service has not answered since")
    wait_for(lambda: "old" in page.old("stats"), 60, "the age of the figures")
    worker.resume()
    page.wait_text("state", "The service works")
    browser.get("about:blank")


def test_the_token_is_asked_for_once_and_kept_for_all_tabs(browser, make_service):
    page = Page(browser, make_service(LLM_API_TOKEN="secret"))

    def give(token):
        wait_for(lambda: page.element("token").get_attribute("open"), 30, "the question")
        field = page.element("token-input")
        field.clear()
        field.send_keys(token, Keys.ENTER)

    give("wrong")
    page.wait_text("token-text", "not the right one")
    give("secret")
    page.wait_text("meters", "System memory")
    first = browser.current_window_handle
    browser.switch_to.new_window("tab")
    page.open()
    page.wait_text("meters", "System memory")
    assert not page.element("token").get_attribute("open")
    browser.close()
    browser.switch_to.window(first)
    browser.get("about:blank")
