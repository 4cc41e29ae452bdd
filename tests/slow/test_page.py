"""The page in a real browser, against the running service with a real Ollama.

Where a GPU's figures or a certain moment are needed, a stand-in plays answers back.
"""

import os
import re
import time
from datetime import UTC, datetime

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
from helpers.answers import GEMMA, ask, clear, reset
from helpers.browser import start_browser
from helpers.frozen import frozen
from helpers.listener import PULL, pulls, running_pulls
from helpers.models import config_json
from helpers.page_stub import H100, PageStub, gpu_stats, model, runner
from helpers.processes import suspend

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

    def open_anew(self):
        """Open the page without its history, which a poll under way would write again."""
        self.run("sessionStorage.clear(); Storage.prototype.setItem = () => {}")
        self.open()

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
        """Return the row of a model, a chart or a meter by its key, or None."""
        rows = self.browser.find_elements(By.CSS_SELECTOR, f"#{list} > *")
        return next((row for row in rows if row.get_attribute("data-key") == model), None)

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

    # What the page looks like

    def run(self, script, *arguments):
        return self.browser.execute_script(script, *arguments)

    def resize(self, width, height=1000):
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def prefer(self, scheme):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def state(self, model):
        """Return the words and the classes of a model's runner."""
        row = self.row("models", model)
        state = row.find_element(By.CLASS_NAME, "state")
        return state.text, state.get_attribute("class")

    def charts(self):
        """Return the keys of the charts that are there."""
        rows = self.browser.find_elements(By.CSS_SELECTOR, "#charts > *")
        return [row.get_attribute("data-key") for row in rows]

    def curve(self, chart):
        """Return a chart's points: [(x, y)] in 600 seconds and 100 parts, for each line."""
        path = self.row("charts", chart).find_element(By.CSS_SELECTOR, "path").get_attribute("d")
        lines = [re.findall(r"([\d.]+) ([\d.]+)", line) for line in path.split("M")[1:]]
        return [[(float(x), float(y)) for x, y in line] for line in lines]

    def marks(self, chart):
        return len(self.row("charts", chart).find_elements(By.CSS_SELECTOR, "line.mark"))

    def focus(self, model, label):
        """Focus a button of a model's row as a keyboard does; return it."""
        selector = f"button[aria-label='{label} {model}']"
        button = self.row("models", model).find_element(By.CSS_SELECTOR, selector)
        self.run("arguments[0].focus()", button)
        return button

    def focused(self):
        return self.run("return document.activeElement.ariaLabel || document.activeElement.id")

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
    one = Page(browser, page_service)
    one.open_anew()
    yield one
    browser.get("about:blank")
    for pull in running_pulls(page_service):
        page_service.delete(PULL, json={"model": pull["model"]})


class StubPage(Page):
    """The page of a stand-in, which polls when the test says so; the stand-in's clock, too."""

    def __init__(self, browser, stub):
        self.now = time.time()
        stub.clock = lambda: self.now
        super().__init__(browser, stub)

    def poll(self, seconds=0):
        """Have the page poll once more, so many seconds later."""
        self.now += seconds
        # A round under way may have asked before the test changed what there is.
        wait_for(lambda: self.run("return timer !== null"), 10, "the end of a round")
        before = self.service.rounds

        def polled():
            self.run("clearTimeout(timer); return poll()")
            return self.service.rounds > before

        wait_for(polled, 10, "a round of polling")


@pytest.fixture
def stub():
    one = PageStub()
    yield one
    one.close()


@pytest.fixture
def stub_page(browser, stub):
    browser.get_log("browser")
    yield StubPage(browser, stub)
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    browser.get("about:blank")


def insecure_pull(page, name):
    """Start what the page then shows; it cannot itself, as the tests' registry has no TLS."""
    body = {"model": name, "insecure": True, "detach": True}
    assert page.service.post(PULL, json=body).status_code == 202


def test_what_is_there_shows_without_a_complaint_of_the_browser(page):
    page.wait_row("models", GEMMA, "not loaded")
    row = page.row_text("models", GEMMA)
    assert "253.1 MB" in row and "Q4_K_M" in row
    page.wait_text("charts", "System memory")
    page.wait_text("meters", "free of")
    assert page.complaints() == []


# History


def test_without_a_gpu_the_charts_are_the_systems_and_nothing_says_na(page):
    wait_for(lambda: page.charts() == ["cpu", "ram", "tokens"], 20, "the charts")
    assert "N/A" not in page.text("charts") + page.text("meters")
    assert "GPU" not in page.text("charts") + page.text("meters")
    first = wait_for(lambda: len(page.curve("ram")[0]), 5, "a line")
    wait_for(lambda: len(page.curve("ram")[0]) > first, 20, "a longer line")


def test_a_gpus_figures_are_drawn_as_they_were_recorded(stub, stub_page):
    stub.stats |= gpu_stats(*H100[0])
    stub_page.open_anew()
    wait_for(lambda: stub_page.charts() == ["load", "vram", "tokens"], 10, "the charts")
    for figures in H100[1:]:
        stub.stats |= gpu_stats(*figures)
        stub_page.poll(5)
        load, used_mb, celsius, _ = figures
        used = used_mb * 2**20 / 1e9
        assert f"{load} %" in stub_page.row_text("charts", "load")
        assert f"{used:.0f} GB of 86 GB" in stub_page.row_text("charts", "vram") or used < 10
        assert f"{celsius}°C" in stub_page.row_text("meters", "temperature")
    (points,) = stub_page.curve("load")
    assert [100 - y for _, y in points] == [load for load, *_ in H100]
    assert [x for x, _ in points] == [600 - 5 * n for n in reversed(range(len(H100)))]
    assert stub_page.text("gpus") == "NVIDIA H100 80GB HBM3"
    assert "System memory" in stub_page.text("meters")
    assert stub_page.complaints() == []


def test_several_gpus_are_named_once(stub, stub_page):
    stub.stats |= gpu_stats(*H100[10], gpus=2)
    stub_page.poll()
    assert stub_page.text("gpus") == "2 × NVIDIA H100 80GB HBM3"


def test_ten_minutes_are_kept_also_over_a_reload_and_a_gap_is_no_line(stub, stub_page):
    assert stub.stats["gpu"] == "none"
    for _ in range(70):
        stub_page.poll(10)
    (line,) = stub_page.curve("cpu")
    assert line[0][0] == 10 and line[-1][0] == 600  # ten minutes ago is at 0
    stub_page.open()
    stub_page.poll(5)
    (line,) = stub_page.curve("cpu")
    assert line[-1][0] == 600 and len(line) > 55
    stub_page.poll(120)
    assert [len(line) > 1 for line in stub_page.curve("cpu")] == [True, False]


def test_a_figure_that_is_not_known_for_a_moment_leaves_its_chart_in_place(stub, stub_page):
    stub.stats |= gpu_stats(*H100[10])
    stub_page.poll(5)
    stub.stats |= {"gpu": "unresponsive", "gpus": [], "gpu_utilization": "N/A"}
    stub_page.poll(5)
    assert "not known now" in stub_page.row_text("charts", "load")


def test_tokens_per_second_are_those_of_all_busy_runners(stub, stub_page):
    stub.stats["runners"] = [
        runner("a", "busy", 3, 40.5, pid=1),
        runner("b", "busy", 3, 20.25, pid=2),
        runner("c", "stuck", 3, 99.0, pid=3),
    ]
    stub_page.poll(5)
    assert "60.8" in stub_page.row_text("charts", "tokens")


def test_a_clear_a_reset_and_a_restart_by_others_are_marks_with_words(page):
    service = page.service
    page.wait_text("charts", "System memory")
    clear(service)
    page.wait_text("marks", "Memory cleared.")
    reset(service)
    page.wait_text("marks", "Session reset.")
    os.kill(service.ollama_pid(), 9)
    page.wait_text("marks", "Ollama restarted.", 60)
    service.wait_healthy(60)
    rows = len(page.browser.find_elements(By.CSS_SELECTOR, "#marks > *"))
    wait_for(lambda: page.marks("tokens") == page.marks("ram") == rows, 10, "a line for each")
    assert re.search(r"\d · \d\d:\d\d:\d\d ", page.text("marks"))


def test_a_healing_before_the_page_was_opened_is_marked_where_it_was(stub, stub_page):
    at = datetime.fromtimestamp(stub_page.now - 300, UTC).isoformat()
    last = {"at": at, "what": "llama3.1:8b", "why": "silent: its /health", "freed_mb": 512}
    stub.stats["healed"] = {"runners": 1, "ollama": 0, "last": last}
    stub_page.open_anew()
    stub_page.wait_text("marks", "Healed llama3.1:8b (silent: its /health): 512 MB came free.")
    line = stub_page.row("charts", "tokens").find_element(By.CSS_SELECTOR, "line.mark")
    assert 49 < float(line.get_attribute("x1").rstrip("%")) < 51
    stub_page.poll(10)
    assert stub_page.marks("tokens") == 1
    stub_page.poll(600)
    assert stub_page.marks("tokens") == 0 and stub_page.text("marks") == ""


def test_what_happened_while_the_page_was_away_says_so(stub, stub_page):
    stub_page.poll(5)
    stub.stats["resets"] = 1
    stub_page.poll(300)
    stub_page.wait_text("marks", "Session reset while this page was away.")


# Runners


def test_a_frozen_runner_shows_as_busy_and_then_as_healed_with_the_mark(browser, freezable):
    page = Page(browser, freezable())
    service = page.service
    answer = service.generate(GEMMA)
    wait_for(lambda: re.match(r"busy, [1-9][\d.]* tokens/s", page.state(GEMMA)[0]), 60, "busy")
    assert "work" in page.state(GEMMA)[1]
    with frozen(service.runners()[0]):
        page.wait_text("marks", f"Healed {GEMMA} (stuck: for ", 60)
        wait_for(lambda: page.marks("tokens") and page.marks("cpu"), 10, "the mark in the charts")
        page.wait_row("models", GEMMA, "not loaded")
    answer.wait(10)
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
        page.wait_text("state", f"The runner of {GEMMA} is stuck: for ")
        assert "Reset the session below." in page.text("state")
        said = page.text("state"), words
        rounds = page.service.log().count("GET /api/stats ")
        more = lambda: page.service.log().count("GET /api/stats ") >= rounds + 2  # noqa: E731
        wait_for(more, 20, "two rounds of polling")
        assert said == (page.text("state"), page.state(GEMMA)[0])  # calm
        page.click("reset")
        page.answer("ask-yes")
        page.wait_text("marks", "Session reset.")
    answer.wait(10)
    page.wait_row("models", GEMMA, "idle", 60)
    page.wait_text("state", "The service works.")
    browser.get("about:blank")


def test_a_stopped_runner_shows_as_silent(browser, freezable):
    page = Page(browser, freezable(LLM_SELF_HEAL="off"))
    suspend(page.service.load(GEMMA))
    page.service.ollama("GET", "/api/version")
    page.wait_row("models", GEMMA, "silent since", 90)
    browser.get("about:blank")


@pytest.mark.parametrize(
    "state, words, colour",
    [
        ("loading", "loading", "work"),
        ("idle", "idle", "good"),
        ("busy", "busy, 31.2 tokens/s", "work"),
        ("stuck", "stuck since", "bad"),
        ("silent", "silent since", "bad"),
        ("ghost", "ghost since", "bad"),
        ("orphan", "orphan since", "warn"),
    ],
)
def test_each_state_has_its_word_and_colour(stub, stub_page, state, words, colour):
    stub.models = [model("llama3.1:8b", share=0.615)]
    stub.stats["runners"] = [runner("llama3.1:8b", state, 12, 31.2)]
    stub_page.poll()
    said, classes = stub_page.state("llama3.1:8b")
    assert said.startswith(words) and colour in classes.split()
    row = stub_page.row_text("models", "llama3.1:8b")
    assert "61 % on the GPU" in row and "stays loaded" in row


def test_a_runner_whose_model_is_gone_shows_too(stub, stub_page):
    stub.stats["runners"] = [runner(None, "orphan", 12, pid=77)]
    stub_page.poll()
    assert "unknown model, process 77" in stub_page.row_text("models", "77")
    assert stub_page.row("models", "77").find_elements(By.TAG_NAME, "button") == []


def test_what_hangs_does_not_hide_what_is_known(stub, stub_page):
    stub.models = [model("llama3.1:8b", share=1)]
    stub_page.poll()
    stub.models = None
    stub.health = {"status": "unhealthy", "reason": "Ollama runs but does not answer."}
    stub.health |= {"recommended_action": "reset_session"}
    stub_page.poll()
    assert stub_page.text("state").endswith("does not answer. Reset the session below.")
    assert "llama3.1:8b" in stub_page.text("models")


# Warnings


def test_a_model_beside_its_gpu_is_a_sentence_at_the_top(browser, make_service, gguf, nvml):
    page = Page(browser, make_service(models={GEMMA: gguf}, LLM_MODEL=GEMMA, **nvml.env))
    wait_for(lambda: page.charts() == ["load", "vram", "tokens"], 20, "the charts of a GPU")
    assert "37 %" in page.row_text("charts", "load")
    assert "5.4 GB of 69 GB" in page.row_text("charts", "vram")
    assert page.text("warnings") == ""
    page.service.load(GEMMA)
    page.wait_text("warnings", f"of {GEMMA} lie in system memory")
    assert "Ollama sees no GPU, whatever LLM_GPU_LAYERS says" in page.text("warnings")
    nvml.say(init=15, count=15)  # the GPU is lost
    page.wait_text("state", "GPU is lost", 30)
    browser.get("about:blank")


def test_a_full_disk_is_a_sentence_at_the_top(browser, make_service):
    page = Page(browser, make_service(constants={"llm_service.health.DISK_LOW_BYTES": 1 << 60}))
    page.wait_text("warnings", "The disk is almost full: delete a model, or prune.")
    top = page.run("return document.getElementById('warnings').getBoundingClientRect().bottom")
    assert top <= page.run("return document.querySelector('main').getBoundingClientRect().top")
    browser.get("about:blank")


# Disk


def test_what_a_prune_would_free_is_told_and_freed(page):
    unused = page.service.models / "blobs" / f"sha256-{'ab' * 32}"
    unused.write_bytes(bytes(12_300_000))
    hours_ago = time.time() - 7200
    os.utime(unused, (hours_ago, hours_ago))
    page.wait_text("disk", "a prune would free 12.3 MB", 90)
    assert "Models take 253.1 MB" in page.text("disk")
    page.click("prune")
    page.answer("ask-no")
    assert unused.exists()
    page.click("prune")
    page.answer("ask-yes")
    page.wait_text("outcome", "came free")
    assert not unused.exists()
    page.wait_text("disk", "a prune would free 0.0 MB", 90)
    wait_for(lambda: page.element("prune").get_attribute("aria-disabled") == "true", 5, "off")


def test_verify_asks_and_is_a_download_with_verify(stub, stub_page):
    stub.models = [model("gemma3:270m")]
    stub_page.poll()
    stub_page.press("models", "gemma3:270m", "Verify")
    stub_page.answer("ask-yes")
    body = {"model": "gemma3:270m", "verify": True, "detach": True}
    wait_for(lambda: stub.sent == [("POST", "/api/models/pull", body)], 5, "the request")


# Downloads


def test_a_download_shows_its_progress_also_after_a_reload_and_then_the_model(
    page, registry, make_gguf_variant
):
    name = registry.add("ns/other:latest", make_gguf_variant(1))
    registry.rate = 10e6
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
    seen = page.service.log().count("GET /api/stats ")
    page.browser.execute_async_script("setTimeout(arguments[0], 6500)")
    assert page.service.log().count("GET /api/stats ") == seen


BOXES = """return [...document.querySelectorAll("h1, h2, li, .meter, .meter *, button, svg, p")]
    .filter((each) => each.checkVisibility() && !each.closest(".chart > *"))
    .map((each) => [each.tagName, each.textContent.slice(0, 20).replace(/[0-9.]+/g, "#"),
      ...["x", "y", "height"].map((side) => each.getBoundingClientRect()[side])].join(" "))"""


def test_nothing_moves_and_a_selection_stays_while_figures_change(stub, stub_page):
    stub.models = [model(name, share=1) for name in ("llama3.1:8b", "gemma3:270m")]
    boxes = []
    for n, figures in enumerate([*H100[3:12], *H100[3:12]]):
        stub.stats |= gpu_stats(*figures)
        stub.stats["runners"] = [runner("llama3.1:8b", "busy", n, 9.9 + 11 * n)]
        stub.stats["disk"]["free_bytes"] += 10_000_000_000 * (-1) ** n
        stub_page.poll(5)
        if n == 8:
            stub_page.run("""getSelection().selectAllChildren(
                document.querySelector('#models .name'))""")
        if n >= 8:
            boxes.append(stub_page.run(BOXES))
    assert [set(each) ^ set(boxes[0]) for each in boxes] == [set()] * len(boxes)
    assert stub_page.run("return getSelection().toString()").strip() == "llama3.1:8b"


def test_the_focus_stays_when_a_row_above_goes_and_finds_a_place_when_its_own_does(stub, stub_page):
    stub.models = [model(name) for name in ("a", "b", "c")]
    stub_page.poll()
    stub_page.focus("b", "Delete")
    stub.models = [model(name) for name in ("new", "b", "c")]
    stub_page.poll()
    assert stub_page.focused() == "Delete b"
    stub.models = [model("c")]
    stub_page.poll()
    assert stub_page.focused() == "h-models"


# Keyboard and screen reader


def test_a_question_is_asked_and_answered_by_keys_alone(stub, stub_page):
    stub.models = [model("a", share=1)]
    stub_page.poll()
    for label, path in (("Unload", "/api/cache/clear"), ("Delete", "/api/models/delete")):
        stub_page.focus("a", label).send_keys(Keys.ENTER)
        wait_for(lambda: stub_page.focused() == "ask-no", 5, "the question")
        stub_page.browser.switch_to.active_element.send_keys(Keys.ESCAPE)
        wait_for(lambda what=label: stub_page.focused() == f"{what} a", 5, "the focus is back")
        assert stub.sent == []
        stub_page.browser.switch_to.active_element.send_keys(Keys.ENTER)
        wait_for(lambda: stub_page.focused() == "ask-no", 5, "the question")
        stub_page.element("ask-yes").send_keys(Keys.ENTER)
        wait_for(lambda: stub.sent, 5, "the request")
        assert stub.sent.pop()[1:] == (path, {"model": "a"})
        wait_for(lambda what=label: stub_page.focused() == f"{what} a", 5, "the focus is back")


def test_whatever_is_there_has_a_role_and_a_name(stub, stub_page):
    stub.models = [model("a", share=1)]
    stub.stats |= gpu_stats(*H100[10])
    stub.pulls = [
        {
            "model": "b",
            "state": "running",
            "status": "pulling",
            "percent": 41.3,
            "completed_bytes": 1,
            "total_bytes": 2,
            "bytes_per_second": 3,
            "eta_seconds": 4,
        }
    ]
    stub_page.poll()
    tree = stub_page.browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    named = [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in tree
        if not node["ignored"]
    ]
    need_names = ("button", "image", "meter", "progressbar", "ProgressIndicator", "textbox", "log")
    assert not [role for role, name in named if role in need_names and not name]
    words = "GPU load: 38 %, in the last ten minutes at most 38 %"

    assert ("image", words) in named
    assert ("button", "Unload a") in named and ("textbox", "Model") in named
    assert ("log", "What happened in the last ten minutes") in named
    assert {role for role, _ in named} >= {"status", "region", "heading", "list", "listitem"}


# Sizes and colours

NAMES = ("gemma3:270m", "hf.co/bartowski/Llama-3.2-1B-Instruct-GGUF:Q4_K_M", "llama3.1:8b")
# The lines in which a name is set, found by the height at which each of its letters stands.
LINES = """const lines = [], text = arguments[0].firstChild, range = document.createRange();
    for (let at = 0, last = null; at < text.length; at++) {
      range.setStart(text, at); range.setEnd(text, at + 1);
      const { top } = range.getBoundingClientRect();
      if (top !== last) lines.push("");
      lines[lines.length - 1] += text.data[at]; last = top; }
    return lines;"""


@pytest.mark.parametrize("gpu", [True, False], ids=["gpu", "no_gpu"])
@pytest.mark.parametrize("width", [390, 1440, 2560])
def test_it_fits_and_names_wrap_between_words(stub, stub_page, width, gpu):
    stub.models = [model(name, share=1) for name in NAMES]
    stub.stats["runners"] = [runner(name, "busy", 5, 131.5, pid=len(name)) for name in NAMES]
    stub.stats |= gpu_stats(*H100[10]) if gpu else {}
    stub_page.resize(width)
    stub_page.poll()
    wide = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert stub_page.run(wide) <= 0
    for name in NAMES:
        lines = stub_page.run(
            LINES, stub_page.row("models", name).find_element(By.CLASS_NAME, "name")
        )
        assert "".join(lines) == name
        assert all(line[-1] in "/-" for line in lines[:-1]), lines
        assert len(lines) == 1 or width == 390 and len(name) > 20
    used = stub_page.run("return document.querySelector('main').getBoundingClientRect().width")
    assert used >= min(width, 2400) - 2 * 16 - 15  # the margins, a scroll bar


# The contrast of each text with what lies behind it, by WCAG's formula: those below 4.5.
CONTRAST = """const light = (colour) => { const [r, g, b] = colour.match(/[0-9.]+/g).map((part) =>
      (part /= 255) <= .03928 ? part / 12.92 : ((part + .055) / 1.055) ** 2.4);
      return .2126 * r + .7152 * g + .0722 * b; };
    const behind = (each) => { for (; each; each = each.parentElement) {
      const colour = getComputedStyle(each).backgroundColor;
      if (!/, 0\\)$/.test(colour)) return colour; } return "rgb(255, 255, 255)"; };
    return [...document.querySelectorAll("body *")].filter((each) => each.checkVisibility() &&
      [...each.childNodes].some((node) => node.nodeType === 3 && node.data.trim()) &&
      each.ariaDisabled !== "true").map((each) => {
        const style = getComputedStyle(each);
        const own = each.closest("svg") ? style.fill : style.color;
        const [a, b] = [own, behind(each)].map(light).sort((x, y) => y - x);
        return [each.tagName, each.textContent, (a + .05) / (b + .05)]; });"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read(stub, stub_page, scheme):
    states = ("busy", "idle", "loading", "stuck", "orphan")
    stub.models = [model(state, share=1) for state in states] + [model("not loaded")]
    stub.stats["runners"] = [runner(state, state, 5, 9, pid=len(state)) for state in states]
    stub.stats |= gpu_stats(*H100[10])
    stub.health |= {"warnings": [{"code": "disk_low", "message": "The disk is almost full."}]}
    stub_page.prefer(scheme)
    stub_page.poll()
    stub.stats["clears"] = 1
    stub_page.poll(5)
    seen = stub_page.run(CONTRAST)
    assert len(seen) > 40
    assert [each for each in seen if each[2] < 4.5] == []
    ground = stub_page.run("return getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(243, 245, 248)", "dark": "rgb(18, 21, 26)"}[scheme]


# Services of their own


@pytest.fixture
def freezable(make_service, gguf):
    """Makes services that soon say of a runner that it is stuck."""

    def make(**env):
        return make_service(
            models={GEMMA: gguf},
            constants={"llm_service.watch.LOOK_S": 0.5},
            LLM_MODEL=GEMMA,
            LLM_CONTEXT_LENGTH=2048,
            LLM_STUCK_SECONDS=5,
            **env,
        )

    return make


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
    page.wait_text("charts", "System memory")
    page.open()
    page.wait_text("charts", "System memory")
    assert not page.element("token").get_attribute("open")
    browser.get("about:blank")
