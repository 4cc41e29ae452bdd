"""The page in a real browser, against the running service with a real Ollama."""

import pytest
from selenium.common.exceptions import (
    ElementClickInterceptedException,
    ElementNotInteractableException,
    NoSuchElementException,
    StaleElementReferenceException,
)
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

import helpers.waiting
from helpers.answers import GEMMA, clear
from helpers.browser import start_browser
from helpers.listener import PULL, pulls, running_pulls
from helpers.models import config_json

MARKUP = "<img src=x onerror=alert(1)>"
# The page may take an element away, or move it, while a test looks at it.
NOT_YET = (
    ElementClickInterceptedException,
    ElementNotInteractableException,
    NoSuchElementException,
    StaleElementReferenceException,
)


def wait_for(predicate, timeout, what):
    """Do as helpers.waiting does, on a page that changes meanwhile."""

    def steady():
        try:
            return predicate()
        except NOT_YET:
            return False

    return helpers.waiting.wait_for(steady, timeout, what)


class Page:
    def __init__(self, browser, service):
        self.browser, self.service = browser, service
        self.open()

    def open(self):
        self.browser.get(self.service.url + "/")
        self.wait_text("state", "The service")

    def element(self, id):
        return self.browser.find_element(By.ID, id)

    def text(self, id):
        return self.element(id).text

    def click(self, id):
        def clicked():
            self.element(id).click()
            return True

        wait_for(clicked, 5, f"#{id} to click on")

    def wait_text(self, id, part, timeout=20):
        wait_for(lambda: part in self.text(id), timeout, f"{part!r} in #{id}")

    def row(self, list, model):
        """Return a model's row in `models` or `pulls`, or None."""
        rows = self.browser.find_elements(By.CSS_SELECTOR, f"#{list} > li")
        return next((row for row in rows if row.get_attribute("data-model") == model), None)

    def row_text(self, list, model):
        row = self.row(list, model)
        return row.text if row else ""

    def wait_row(self, list, model, part, timeout=20):
        """Wait until a row says this."""
        what = f"{part!r} in the row of {model}"
        wait_for(lambda: part in self.row_text(list, model), timeout, what)

    def wait_no_row(self, list, model):
        wait_for(lambda: self.row(list, model) is None, 20, f"the row of {model} to go")

    def press(self, list, model, label):
        """Click on a row's button."""

        def pressed():
            row = self.row(list, model)
            for button in row.find_elements(By.TAG_NAME, "button") if row else ():
                if button.text == label:
                    button.click()
                    return True
            return False

        wait_for(pressed, 10, f"the button {label}")

    def answer(self, id):
        """Answer the question that is open."""
        wait_for(lambda: self.element("ask").get_attribute("open"), 5, "the question")
        self.click(id)
        wait_for(lambda: not self.element("ask").get_attribute("open"), 5, "the question to go")

    def download(self, model):
        self.element("pull-name").clear()
        self.element("pull-name").send_keys(model, Keys.ENTER)

    def progress(self, model):
        row = self.row("pulls", model)
        bars = row.find_elements(By.TAG_NAME, "progress") if row else []
        return float(bars[0].get_attribute("value")) if bars and bars[0].is_displayed() else 0

    def complaints(self):
        log = self.browser.get_log("browser")
        return [entry["message"] for entry in log if entry["level"] == "SEVERE"]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    one = start_browser(tmp_path_factory.mktemp("browser"))
    yield one
    one.quit()


@pytest.fixture(scope="module")
def page_service(make_module_service, gguf):
    return make_module_service(models={GEMMA: gguf}, LLM_MODEL=GEMMA, LLM_CONTEXT_LENGTH=2048)


@pytest.fixture
def page(browser, page_service, gguf):
    """The page of a service with gemma:latest, not loaded, and no download under way."""
    page_service.add_model(GEMMA, gguf)
    clear(page_service)
    browser.get_log("browser")  # what a test before has caused
    yield Page(browser, page_service)
    browser.get("about:blank")
    for pull in running_pulls(page_service):
        page_service.delete(PULL, json={"model": pull["model"]})


def insecure_pull(page, name):
    """Start what the page then shows; it cannot itself, as the tests' registry has no TLS."""
    body = {"model": name, "insecure": True, "detach": True}
    assert page.service.post(PULL, json=body).status_code == 202


def test_what_is_there_shows_without_a_complaint_of_the_browser(page):
    page.wait_row("models", GEMMA, "not loaded")
    row = page.row_text("models", GEMMA)
    assert "253.1 MB" in row and "Q4_K_M" in row
    page.wait_text("meters", "System memory")
    page.wait_text("meters", "free")
    assert page.complaints() == []


# Downloads


def test_a_download_shows_its_progress_also_after_a_reload_and_then_the_model(
    page, registry, make_gguf_variant
):
    name = registry.add("ns/other:latest", make_gguf_variant(1))
    registry.rate = 30e6
    insecure_pull(page, name)
    first = wait_for(lambda: page.progress(name), 20, "progress")
    page.open()
    wait_for(lambda: page.progress(name) > first, 20, "further progress after the reload")
    page.wait_row("pulls", name, "%")
    page.wait_row("pulls", name, "/s")
    registry.rate = None
    page.wait_row("models", name, "MB", 30)
    page.wait_row("pulls", name, "downloaded")
    page.service.delete("/api/models/delete", json={"model": name})


def test_a_download_is_cancelled_by_its_button(page, registry):
    name = registry.add_random("ns/big:latest", 200)
    registry.rate = 5e6
    insecure_pull(page, name)
    wait_for(lambda: page.progress(name), 20, "progress")
    page.press("pulls", name, "Cancel")
    page.wait_row("pulls", name, "Cancelled")
    assert pulls(page.service)[0]["state"] == "cancelled"
    wait_for(lambda: registry.active == 0, 10, "the end of the transfer")


def test_a_download_that_fails_says_why(page):
    page.download("no-such-host.invalid/ns/model")
    page.wait_row("pulls", "no-such-host.invalid/ns/model", "check the network")


# Markup


def test_markup_as_a_name_is_refused_and_stays_text(page):
    page.download(MARKUP)
    page.wait_text("pull-error", "must be a model name")
    assert page.browser.find_elements(By.CSS_SELECTOR, "#pull-error img") == []


def test_markup_from_ollama_stays_text(page, make_gguf_variant):
    marked = config_json(quantization=MARKUP)
    page.service.add_model("marked:latest", make_gguf_variant(2), marked)
    page.wait_row("models", "marked:latest", MARKUP)
    assert page.browser.find_elements(By.CSS_SELECTOR, "#models img") == []
    page.service.delete("/api/models/delete", json={"model": "marked:latest"})


# Clear, unload, delete


def test_clear_asks_then_frees_a_loaded_model_and_says_so(page):
    page.service.load("gemma")
    page.wait_row("models", GEMMA, "loaded, in system memory")
    page.click("clear")
    page.answer("ask-no")
    assert page.service.runners()
    page.click("clear")
    page.answer("ask-yes")
    page.wait_text("outcome", "Cache cleared: 1 unloaded")
    assert "all gone" in page.text("outcome") and not page.service.runners()
    page.wait_row("models", GEMMA, "not loaded")


def test_unload_and_delete_ask_first(page):
    page.service.load("gemma")
    page.wait_row("models", GEMMA, "loaded, in")
    page.press("models", GEMMA, "Unload")
    page.answer("ask-yes")
    page.wait_row("models", GEMMA, "not loaded")
    page.press("models", GEMMA, "Delete")
    page.answer("ask-yes")
    page.wait_no_row("models", GEMMA)
    page.wait_text("outcome", "came free")
    page.wait_text("no-models", "No models yet")
    assert page.service.get("/api/models").json()["count"] == 0


# Polling


def test_polling_keeps_the_focus(page):
    page.wait_row("models", GEMMA, "not loaded")
    button = page.row("models", GEMMA).find_element(By.CSS_SELECTOR, "button.danger")
    page.browser.execute_script("arguments[0].focus()", button)
    before = page.service.log().count("GET /api/models ")

    def rounds():
        return page.service.log().count("GET /api/models ") - before

    wait_for(lambda: rounds() >= 2, 20, "two rounds of polling")
    assert page.browser.switch_to.active_element == button


def test_nothing_is_polled_while_the_page_is_hidden(page):
    page.browser.execute_script(
        """Object.defineProperty(document, 'hidden', {value: true});
        document.dispatchEvent(new Event('visibilitychange'))"""
    )
    # A round under way goes on; its pauses are five seconds.
    page.browser.execute_async_script("setTimeout(arguments[0], 3000)")
    seen = page.service.log().count("GET /health")
    page.browser.execute_async_script("setTimeout(arguments[0], 6500)")
    assert page.service.log().count("GET /health") == seen


# Services of their own


def test_it_says_that_the_service_is_away_and_comes_back_by_itself(browser, make_service):
    service = make_service()
    page = Page(browser, service)
    service.stop()
    page.wait_text("state", "not reachable")
    make_service(LLM_API_PORT=service.port)
    page.wait_text("state", "The service works")
    browser.get("about:blank")


def test_the_token_is_asked_for_once_and_kept_for_the_tab(browser, make_service):
    page = Page(browser, make_service(LLM_API_TOKEN="secret"))

    def give(token):
        wait_for(lambda: page.element("token").get_attribute("open"), 10, "the question")
        field = page.element("token-input")
        field.clear()
        field.send_keys(token, Keys.ENTER)

    give("wrong")
    page.wait_text("token-text", "not the right one")
    give("secret")
    page.wait_text("meters", "System memory")
    page.open()
    page.wait_text("meters", "System memory")
    assert not page.element("token").get_attribute("open")
    browser.get("about:blank")
