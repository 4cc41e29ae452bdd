"""The page in a real browser, against the running service with a real Ollama."""
import shutil
import subprocess

import pytest
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.chrome.service import Service as Driver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

import conftest


def wait_for(predicate, timeout, what):
    """As conftest's, on a page that may take an element away while it is looked at."""
    def steady():
        try:
            return predicate()
        except StaleElementReferenceException:
            return False
    return conftest.wait_for(steady, timeout, what)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    paths = shutil.which("chromium"), shutil.which("chromedriver")
    if not all(paths):
        pytest.skip("no browser: chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = paths[0]
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync",
                 "--disable-component-update", "--no-first-run", f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=Driver(paths[1], log_output=subprocess.DEVNULL))
    yield driver
    driver.quit()


class Page:
    def __init__(self, browser, url):
        self.browser, self.url = browser, url
        self.open()

    def open(self):
        self.browser.get(self.url + "/")
        self.wait_text("state", "The service")

    def text(self, id):
        return self.browser.find_element(By.ID, id).text

    def wait_text(self, id, part, timeout=20):
        wait_for(lambda: part in self.text(id), timeout, f"{part!r} in #{id}, which says {self.text(id)!r}")

    def row(self, list, model):
        return next((row for row in self.browser.find_elements(By.CSS_SELECTOR, f"#{list} > li")
                     if row.get_attribute("data-model") == model), None)

    def press(self, list, model, label):
        def pressed():
            next(b for b in self.row(list, model).find_elements(By.TAG_NAME, "button") if b.text == label).click()
            return True

        wait_for(pressed, 5, f"the button {label}")

    def say_yes(self):
        wait_for(lambda: self.browser.find_element(By.ID, "ask").get_attribute("open"), 5, "the question")
        self.browser.find_element(By.ID, "ask-yes").click()

    def download(self, model):
        field = self.browser.find_element(By.ID, "pull-name")
        field.send_keys(model, Keys.ENTER)

    def progress(self, model):
        row = self.row("pulls", model)
        bars = row.find_elements(By.TAG_NAME, "progress") if row else []
        return float(bars[0].get_attribute("value")) if bars and bars[0].is_displayed() else None

    def complaints(self):
        return [entry["message"] for entry in self.browser.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.fixture
def page(browser, make_service, gguf):
    service = make_service(models={"gemma:latest": gguf}, LLM_MODEL="gemma:latest", LLM_CONTEXT_LENGTH=2048)
    page = Page(browser, service.url)
    page.service = service
    yield page
    browser.get("about:blank")


def insecure_pull(page, name):
    """Starts what the page then shows; it cannot itself, as the tests' registry has no TLS."""
    assert page.service.post("/api/models/pull", json={"model": name, "insecure": True, "detach": True}).status_code == 202


def test_what_is_there_shows_without_a_complaint_of_the_browser(page):
    wait_for(lambda: page.row("models", "gemma:latest"), 10, "the model")
    row = page.row("models", "gemma:latest").text
    assert "253.1 MB" in row and "Q4_K_M" in row and "not loaded" in row
    assert "System memory" in page.text("meters") and "free" in page.text("meters")
    assert page.complaints() == []


def test_a_download_shows_its_progress_also_after_a_reload_and_then_the_model(page, registry, make_gguf_variant):
    name = registry.add("ns/other:latest", make_gguf_variant(1))
    registry.rate = 30e6
    insecure_pull(page, name)
    first = wait_for(lambda: page.progress(name), 15, "progress")
    page.open()
    wait_for(lambda: (page.progress(name) or 0) > first, 15, "further progress after the reload")
    assert "%" in page.row("pulls", name).text and "/s" in page.row("pulls", name).text
    registry.rate = None
    wait_for(lambda: page.row("models", name), 30, "the model in the list")
    wait_for(lambda: "downloaded" in page.row("pulls", name).text, 10, "the download's outcome")


def test_a_download_is_cancelled_by_its_button(page, registry):
    name = registry.add_random("ns/big:latest", 200)
    registry.rate = 5e6
    insecure_pull(page, name)
    wait_for(lambda: page.progress(name), 15, "progress")
    page.press("pulls", name, "Cancel")
    wait_for(lambda: "Cancelled" in page.row("pulls", name).text, 10, "the cancelled download")
    assert page.service.get("/api/models/pull").json()["pulls"][0]["state"] == "cancelled"
    wait_for(lambda: registry.active == 0, 10, "the end of the transfer")


def test_a_download_that_fails_says_why(page):
    page.download("no-such-host.invalid/ns/model")
    wait_for(lambda: (row := page.row("pulls", "no-such-host.invalid/ns/model")) and "check the network" in row.text, 20,
             "the reason")


def test_markup_as_a_name_is_refused_and_stays_text(page):
    page.download("<img src=x onerror=alert(1)>")
    page.wait_text("pull-error", "must be a model name")
    assert page.browser.find_elements(By.CSS_SELECTOR, "#pull-error img") == []


def test_markup_from_ollama_stays_text(page):
    text, images = page.browser.execute_script("""
        const list = document.getElementById("models");
        rows(list, [{model: arguments[0], name: arguments[0], size: 1, loaded: false, details: {quantization_level: arguments[0]}}], modelRow);
        return [list.textContent, list.getElementsByTagName("img").length];""", "<img src=x onerror=alert(1)>")
    assert text.count("<img src=x") == 2 and images == 0


def test_clear_asks_then_frees_a_loaded_model_and_says_so(page):
    page.service.load("gemma")
    wait_for(lambda: "loaded, in system memory" in page.row("models", "gemma:latest").text, 15, "the model as loaded")
    page.browser.find_element(By.ID, "clear").click()
    wait_for(lambda: page.browser.find_element(By.ID, "ask").get_attribute("open"), 5, "the question")
    page.browser.find_element(By.ID, "ask-no").click()
    assert page.service.runners()
    page.browser.find_element(By.ID, "clear").click()
    page.say_yes()
    page.wait_text("outcome", "Cache cleared: 1 unloaded")
    assert "all gone" in page.text("outcome") and not page.service.runners()
    wait_for(lambda: "not loaded" in page.row("models", "gemma:latest").text, 10, "the model as unloaded")


def test_unload_and_delete_ask_first(page):
    page.service.load("gemma")
    wait_for(lambda: "loaded, in" in page.row("models", "gemma:latest").text, 15, "the model as loaded")
    page.press("models", "gemma:latest", "Unload")
    page.say_yes()
    wait_for(lambda: "not loaded" in page.row("models", "gemma:latest").text, 10, "the model as unloaded")
    page.press("models", "gemma:latest", "Delete")
    page.say_yes()
    wait_for(lambda: page.row("models", "gemma:latest") is None, 10, "the row to go")
    page.wait_text("outcome", "came free")
    page.wait_text("no-models", "No models yet")
    assert page.service.get("/api/models").json()["count"] == 0


def test_polling_keeps_the_focus(page):
    wait_for(lambda: page.row("models", "gemma:latest"), 10, "the model")
    button = page.row("models", "gemma:latest").find_element(By.CSS_SELECTOR, "button.danger")
    page.browser.execute_script("arguments[0].focus()", button)
    before = page.service.log().count("GET /api/models ")
    wait_for(lambda: page.service.log().count("GET /api/models ") > before + 1, 20, "two rounds of polling")
    assert page.browser.switch_to.active_element == button


def test_it_says_that_the_service_is_away_and_comes_back_by_itself(page, make_service):
    service = page.service
    service.stop()
    page.wait_text("state", "not reachable")
    make_service(LLM_API_PORT=service.port)
    page.wait_text("state", "The service works")


def test_the_token_is_asked_for_once_and_kept_for_the_tab(browser, make_service):
    service = make_service(LLM_API_TOKEN="secret")
    page = Page(browser, service.url)
    dialog = browser.find_element(By.ID, "token")
    for given, then in (("wrong", "not the right one"), ("secret", None)):
        wait_for(lambda: dialog.get_attribute("open"), 10, "the question for the token")
        field = browser.find_element(By.ID, "token-input")
        field.clear()
        field.send_keys(given, Keys.ENTER)
        if then:
            page.wait_text("token-text", then)
    page.wait_text("meters", "System memory")
    page.open()
    page.wait_text("meters", "System memory")
    assert not browser.find_element(By.ID, "token").get_attribute("open")
    browser.get("about:blank")


def test_nothing_is_polled_while_the_page_is_hidden(page):
    page.browser.execute_script("""
        Object.defineProperty(document, 'hidden', {value: true}); document.dispatchEvent(new Event('visibilitychange'))""")
    wait_for(lambda: page.browser.execute_script("return timer !== null"), 10, "the end of the round under way")
    seen = page.service.log().count("GET /health")
    wait_for(lambda: page.service.get("/api/info").ok and page.browser.execute_async_script(
        "setTimeout(() => arguments[0](true), 6500)"), 10, "more than a poll's pause")
    assert page.service.log().count("GET /health") == seen
