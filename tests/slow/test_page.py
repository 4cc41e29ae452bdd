"""The page in a real browser, against the running service with a real Ollama.

What a GPU or a certain moment is needed for is in test_page_views.py, faults are in
test_page_faults.py.
"""

import os
import re

import pytest
from selenium.webdriver.common.by import By

from helpers.answers import GEMMA, clear, reset
from helpers.generation import PROMPT
from helpers.listener import PULL, pulls, running_pulls
from helpers.models import blob_path, config_json, file_digest
from helpers.page import Page, wait_for
from helpers.ports import free_port

MARKUP = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def page_service(make_module_service, gguf):
    return make_module_service(models={GEMMA: gguf}, LLM_MODEL=GEMMA, LLM_CONTEXT_LENGTH=2048)


@pytest.fixture
def page(browser, page_service, gguf):
    """The page of a service with gemma:latest, not loaded, and no download under way."""
    page_service.add_model(GEMMA, gguf)
    clear(page_service)
    for each in page_service.get("/api/models").json()["models"]:
        if each["name"] != GEMMA:  # of a test that has failed
            page_service.delete("/api/models/delete", json={"model": each["name"]})
    browser.get_log("browser")  # what a test before has caused
    one = Page(browser, page_service)
    one.open_anew()
    yield one
    browser.get("about:blank")
    for pull in running_pulls(page_service):
        page_service.delete(PULL, json={"model": pull["model"]})


def insecure_pull(page, name):
    """Start what the page then shows."""
    body = {"model": name, "insecure": True, "detach": True}
    assert page.service.post(PULL, json=body).status_code == 202


def pulled(page, name):
    """Have it downloaded, and wait for its end."""
    insecure_pull(page, name)
    page.wait_row("models", name, "not loaded", 60)
    wait_for(lambda: not running_pulls(page.service), 60, "the end of the download")


def test_what_is_there_shows_without_a_complaint_of_the_browser(page):
    page.wait_row("models", GEMMA, "not loaded")
    row = page.row_text("models", GEMMA)
    assert "162 MB on the disk" in row and "Q4_K_M" in row
    page.wait_text("meters", "free")
    page.wait_text("gpu-state", "No GPU: models run on the CPU.")
    page.wait_text("about", "Ollama 0.")
    assert page.complaints() == []


def test_an_idle_tab_leaves_no_line_in_the_log(page):
    page.next_rounds()
    start = len(page.service.log())
    page.next_rounds(4)
    page.service.get("/api/info?last")  # its line comes behind those of the page
    wait_for(lambda: "/api/info?last" in page.service.log()[start:], 30, "the last line")
    lines = page.service.log()[start:].splitlines()
    assert len([line for line in lines if " INFO 127.0.0.1 " in line]) == 1, lines


# The last hour


def test_without_a_gpu_the_charts_are_the_systems_and_nothing_says_na(page):
    wait_for(lambda: {"cpu", "ram", "tokens"} <= set(page.charts()), 60, "the charts")
    shown = page.text("charts") + page.text("meters")
    assert "N/A" not in shown and "GPU" not in shown

    def points():  # a sample that came late begins another line
        return sum(map(len, page.curve("ram")))

    first = points()
    wait_for(lambda: points() > first, 60, "a longer line")


def test_another_tab_and_a_reload_show_the_same_hour(page):
    def drawn():
        wait_for(lambda: "cpu" in page.charts(), 60, "the charts")
        return [y for line in page.curve("cpu") for _, y in line]

    here = wait_for(lambda: len(drawn()) > 1 and drawn(), 60, "two samples")
    page.open_anew()  # as a new tab does, it knows nothing by itself
    assert drawn()[: len(here)] == here


def test_a_clear_a_reset_and_a_restart_by_others_are_marks_with_words(page):
    service = page.service
    wait_for(lambda: "ram" in page.charts(), 60, "the charts")
    clear(service)
    page.wait_text("marks", "Memory cleared")
    reset(service)
    page.wait_text("marks", "Session reset")
    os.kill(service.ollama_pid(), 9)
    page.wait_text("marks", "Ollama restarted.", 60)
    service.wait_healthy(60)
    assert re.search(r"\d · \d\d:\d\d:\d\d ", page.text("marks"))

    def lines():
        return len(page.rows_of("marks"))

    wait_for(lambda: page.marks("tokens") == page.marks("ram") == lines(), 60, "a line for each")


# Downloads


def test_a_download_shows_its_progress_also_after_a_reload_and_then_the_model(
    page, registry, make_gguf_variant
):
    name = registry.add("ns/other:latest", make_gguf_variant(1))
    registry.rate = 3e6  # so that it is under way for longer than what follows may take
    insecure_pull(page, name)
    first = wait_for(lambda: page.progress(name), 60, "progress")
    page.open()
    wait_for(lambda: page.progress(name) > first, 60, "further progress after the reload")
    page.wait_row("pulls", name, "%")
    page.wait_row("pulls", name, "/s")
    registry.rate = None
    page.wait_row("models", name, "MB", 90)
    page.wait_text("messages", f"{name} is downloaded, 162 MB.")
    page.service.delete("/api/models/delete", json={"model": name})


def test_a_download_is_cancelled_and_resumed_by_its_buttons(page, registry):
    name = registry.add_random("ns/big:latest", 200)
    registry.rate = 2e6
    insecure_pull(page, name)
    wait_for(lambda: page.progress(name), 60, "progress")
    page.press("pulls", name, "Cancel")
    page.wait_row("ended-pulls", name, "MB of it are kept.")
    assert pulls(page.service)[0]["state"] == "cancelled"
    wait_for(lambda: registry.active == 0, 30, "the end of the transfer")
    page.press("ended-pulls", name, "Resume")
    wait_for(lambda: page.service.get(PULL).json()["pulls"][0]["state"] != "cancelled", 30, "it")


def test_a_download_that_fails_says_why(page):
    name = f"127.0.0.1:{free_port()}/ns/model"
    page.download(name)
    page.wait_row("ended-pulls", name, "Check the machine's network")


def test_a_registry_without_tls_is_offered_and_used(page, registry, make_gguf_variant):
    name = registry.add("ns/plain:latest", make_gguf_variant(3))
    page.download(name)
    page.wait_row("ended-pulls", name, "This registry has no TLS")
    page.press("ended-pulls", name, "Download without TLS")
    page.answer("ask-yes")
    page.wait_row("models", name, "not loaded", 60)
    page.service.delete("/api/models/delete", json={"model": name})


# Markup


def test_markup_as_a_name_is_refused_and_stays_text(page):
    page.download(MARKUP)
    page.wait_text("pull-error", "This is no model's name.")
    assert page.browser.find_elements(By.CSS_SELECTOR, "#pull-error img") == []


def test_markup_from_ollama_stays_text(page, make_gguf_variant):
    marked = config_json(quantization=MARKUP)
    page.service.add_model("marked:latest", make_gguf_variant(2), marked)
    page.wait_row("models", "marked:latest", MARKUP)
    assert page.browser.find_elements(By.CSS_SELECTOR, "#models img") == []
    page.service.delete("/api/models/delete", json={"model": "marked:latest"})


# Checking files, and updates


def test_files_are_read_and_the_damaged_ones_told(page, make_gguf_variant):
    own = make_gguf_variant(5)
    page.service.add_model("own:latest", own)
    page.press("models", GEMMA, "Check files")
    page.wait_text("messages", f"The files of {GEMMA} are whole.", 60)
    blob = blob_path(page.service.models, file_digest(own))
    text = bytearray(blob.read_bytes())
    text[-1] ^= 1
    blob.unlink()  # the helper's are hard links
    blob.write_bytes(text)
    page.press("models", "own:latest", "Check files")
    page.wait_text("messages", "own:latest: 1 file damaged.", 60)
    assert blob.exists()
    page.service.delete("/api/models/delete", json={"model": "own:latest"})


def test_an_update_of_a_registry_without_tls_is_looked_for_after_a_warning(
    page, registry, make_gguf_variant
):
    name = registry.add("ns/plain:latest", make_gguf_variant(6))
    pulled(page, name)
    page.next_rounds()  # else that end is told later, in the place of what is waited for below
    page.press("models", name, "Update")
    page.wait_text("ask-text", "has no TLS", 60)
    page.answer("ask-yes")
    page.wait_text("messages", f"{name} is the registry's newest.", 60)
    registry.add(name.partition("/")[2], make_gguf_variant(7))
    page.press("models", name, "Update")
    page.answer("ask-yes")
    wait_for(lambda: page.text("ask-yes").startswith("Update, fetches 162 MB"), 60, "the size")
    page.answer("ask-yes")
    page.wait_text("messages", f"{name} is downloaded", 60)
    page.service.delete("/api/models/delete", json={"model": name})


# Try, clear, unload, delete


def test_a_prompt_is_answered_with_its_speed(page):
    # The model may go on for as long as a try may take.
    short = {"model": "short", "from": GEMMA, "parameters": {"stop": ["e"]}, "stream": False}
    assert page.service.ollama("POST", "/api/create", json=short, timeout=60).ok
    page.press("models", "short:latest", "Try")
    page.element("try-prompt").send_keys("Say hello.")
    page.click("try-ask")
    wait_for(lambda: page.text("try-answer"), 60, "the answer")
    page.wait_text("try-figures", "tokens/s", 60)
    wait_for(lambda: not page.element("try-stop").is_displayed(), 120, "its end")
    assert re.search(r"^\d+ tokens · [\d.]+ tokens/s", page.text("try-figures"))
    page.click("try-close")
    page.wait_row("models", "short:latest", "idle")


@pytest.mark.parametrize("way", ["try-stop", "try-close"])
def test_an_answer_is_stopped(page, way):
    page.press("models", GEMMA, "Try")
    page.element("try-prompt").send_keys(PROMPT)  # to another one the answer may be short
    page.click("try-ask")
    wait_for(lambda: len(page.text("try-answer")) > 5, 60, "the answer")
    page.click(way)
    page.wait_row("models", GEMMA, "idle")
    if way == "try-stop":
        page.wait_text("try-figures", "Stopped.")
        page.click("try-close")


def test_an_answer_whose_runner_dies_is_told_as_that(page):
    page.press("models", GEMMA, "Try")
    page.element("try-prompt").send_keys(PROMPT)
    page.click("try-ask")
    wait_for(lambda: len(page.text("try-answer")) > 5, 60, "the answer")
    page.service.runners()[0].kill()
    page.wait_text("try-figures", "The model's process ended in the middle of the answer.")
    page.click("try-close")


def test_a_version_that_an_update_has_replaced_is_told_until_it_is_unloaded(
    page, registry, make_gguf_variant
):
    name = registry.add("ns/next:latest", make_gguf_variant(8))
    pulled(page, name)
    page.service.load(name)
    registry.add("ns/next:latest", make_gguf_variant(9))
    insecure_pull(page, name)
    page.wait_row("models", name, "loaded, idle (its version from before the update)", 60)
    page.press("models", name, "Unload")
    page.answer("ask-yes")
    page.wait_row("models", name, "not loaded", 60)
    page.service.delete("/api/models/delete", json={"model": name})


def test_a_model_is_loaded_by_its_button(page):
    page.press("models", GEMMA, "Load")
    page.wait_text("messages", GEMMA)
    page.wait_row("models", GEMMA, "loaded, idle", 60)
    assert page.service.runners()


def test_clear_asks_then_frees_a_loaded_model_and_says_so(page):
    page.service.load("gemma")
    page.wait_row("models", GEMMA, "loaded, idle")
    page.click("clear")
    page.answer("ask-no")
    assert page.service.runners()
    page.click("clear")
    page.answer("ask-yes")
    page.wait_text("messages", "The memory is cleared: 1 model unloaded")
    assert not page.service.runners()
    page.wait_row("models", GEMMA, "not loaded")


def test_unload_and_delete_ask_first(page):
    page.service.load("gemma")
    page.wait_row("models", GEMMA, "loaded, idle")
    page.press("models", GEMMA, "Unload")
    page.answer("ask-yes")
    page.wait_row("models", GEMMA, "not loaded")
    page.press("models", GEMMA, "Delete")
    page.answer("ask-yes")
    page.wait_no_row("models", GEMMA)
    page.wait_text("messages", "came free")
    page.wait_text("no-models", "No models yet")
    assert page.service.get("/api/models").json()["count"] == 0


# Polling


def test_polling_keeps_the_focus(page):
    page.wait_row("models", GEMMA, "not loaded")
    button = page.focus(GEMMA, "Delete")
    page.next_rounds()
    assert page.browser.switch_to.active_element == button


def test_nothing_is_polled_while_the_page_is_hidden(page):
    page.browser.execute_script(
        """Object.defineProperty(document, 'hidden', {value: true});
        document.dispatchEvent(new Event('visibilitychange'))"""
    )
    # A round under way goes on: its calls have six seconds. The pauses are five seconds.
    page.browser.execute_async_script("setTimeout(arguments[0], 7000)")
    seen = page.rounds()
    page.browser.execute_async_script("setTimeout(arguments[0], 6500)")
    assert page.rounds() == seen
