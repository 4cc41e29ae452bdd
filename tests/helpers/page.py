"""The page in a browser: what a person sees of it and does."""

import re
import time

from selenium.common.exceptions import (
    ElementClickInterceptedException,
    ElementNotInteractableException,
    NoSuchElementException,
    StaleElementReferenceException,
)
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

import helpers.waiting

# The page may take an element away, or move it, while a test looks at it.
NOT_YET = (
    ElementClickInterceptedException,
    ElementNotInteractableException,
    NoSuchElementException,
    StaleElementReferenceException,
)


WORDS_OF_METERS = ("value", "low", "high")
# Has the page poll so many times. It takes no new round before it has done with the last.
ROUNDS = """
    const [count, done] = arguments, main = document.getElementById("main");
    const ask = () => document.dispatchEvent(new Event("poll"));
    let left = count;
    const seen = new MutationObserver(() => {
      left -= 1;
      if (left > 0) return setTimeout(ask);
      seen.disconnect();
      done();
    });
    seen.observe(main, { attributeFilter: ["data-rounds"] });
    ask();"""


def wait_for(predicate, timeout, what):
    """Do as helpers.waiting does, on a page that changes meanwhile.

    A look at it takes 10 ms of CPU time, and it changes at its rounds of some seconds.
    """

    def steady():
        try:
            return predicate()
        except NOT_YET:
            return False

    return helpers.waiting.wait_for(steady, timeout, what, pause_s=0.25)


def can_be_used(button):
    """Tell whether a click on a button would do anything: its last act may not be over."""
    return button.get_attribute("aria-disabled") != "true"


class Page:
    def __init__(self, browser, service):
        self.browser, self.service = browser, service
        self.open()

    def open(self):
        self.browser.get(self.service.url + "/")
        self.wait_text("state", "The service")

    def open_anew(self):
        """Open the page without what it has kept in the browser."""
        self.run("localStorage.clear()")
        self.open()

    def rounds(self):
        """Tell how often the page has polled."""
        return int(self.element("main").get_attribute("data-rounds") or 0)

    def next_rounds(self, count=2):
        """Wait for so many rounds; of two, the second began after the call."""
        self.browser.execute_async_script(ROUNDS, count)

    def element(self, id):
        return self.browser.find_element(By.ID, id)

    def text(self, id):
        return self.element(id).text

    def click(self, id):
        def clicked():
            button = self.element(id)
            return can_be_used(button) and (button.click() or True)

        wait_for(clicked, 30, f"#{id} to click on")

    def wait_text(self, id, part, timeout=60):
        wait_for(lambda: part in self.text(id), timeout, f"{part!r} in #{id}")

    def rows_of(self, list):
        return self.browser.find_elements(By.CSS_SELECTOR, f"#{list} > *")

    def row(self, list, model):
        """Return the row of a model, a chart or a meter by its key, or None."""
        found = self.browser.find_elements(
            By.CSS_SELECTOR, f'#{list} > [data-key="{model.lower()}" i]'
        )
        return found[0] if found else None

    def meter(self, list, key, *under):
        """Return value, low and high of a meter."""
        path = " ".join(f'[data-key="{each}"]' for each in (key, *under))
        bar = self.browser.find_element(By.CSS_SELECTOR, f"#{list} {path} meter")
        return {name: self.run(f"return arguments[0].{name}", bar) for name in WORDS_OF_METERS}

    def row_text(self, list, model):
        row = self.row(list, model)
        return row.text if row else ""

    def wait_row(self, list, model, part, timeout=60):
        """Wait until a row says this."""
        what = f"{part!r} in the row of {model}"
        wait_for(lambda: part in self.row_text(list, model), timeout, what)

    def wait_no_row(self, list, model):
        wait_for(lambda: self.row(list, model) is None, 60, f"the row of {model} to go")

    def press(self, list, model, label):
        """Click on a row's button, in its fold too."""

        def pressed():
            row = self.row(list, model)
            for fold in row.find_elements(By.CSS_SELECTOR, ".more") if row else ():
                self.run("arguments[0].open = true", fold)
            for button in row.find_elements(By.TAG_NAME, "button") if row else ():
                if button.text == label and can_be_used(button):
                    self.run("arguments[0].scrollIntoView({block: 'center'})", button)
                    button.click()
                    return True
            return False

        wait_for(pressed, 60, f"the button {label}")

    def buttons(self, list, model):
        """Return the words of a row's buttons that can be seen."""
        row = self.row(list, model)
        return [each.text for each in row.find_elements(By.TAG_NAME, "button") if each.text]

    def answer(self, id):
        """Answer the question that is open, or opens."""
        wait_for(lambda: self.element("ask").get_attribute("open"), 60, "the question")
        asked = self.text("ask-text")
        self.click(id)
        # Another question may follow at once. That of a closed dialog is "".
        wait_for(lambda: self.text("ask-text") != asked, 30, "the question to go")
        self.settle()

    def settle(self):
        """Let the page hear that a dialog was closed: the event comes after the closing itself."""
        self.browser.execute_async_script("setTimeout(arguments[0])")

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
        selector = f'#models > [data-key="{model.lower()}" i] .state'
        state = self.browser.find_element(By.CSS_SELECTOR, selector)
        return state.text, state.get_attribute("class")

    def charts(self):
        """Return the keys of the charts that are there."""
        rows = self.browser.find_elements(By.CSS_SELECTOR, "#charts > *")
        return [row.get_attribute("data-key") for row in rows]

    def curve(self, chart):
        """Return the points of a chart's first series: [(x, y)] of 600 and 100, for each line."""
        (path, *_) = self.drawn(chart, "path", "d")
        lines = [re.findall(r"([\d.]+) ([\d.]+)", line) for line in path.split("M")[1:]]
        return [[(float(x), float(y)) for x, y in line] for line in lines]

    def drawn(self, chart, selector, attribute):
        """Return an attribute of each such element of a chart, which each round draws anew."""
        script = """return [...document.querySelectorAll(arguments[0])]
            .map((each) => each.getAttribute(arguments[1]))"""
        return self.run(script, f"#charts > [data-key={chart}] {selector}", attribute)

    def old(self, source):
        """Return what a part of the page says of its age."""
        selector = f"[data-source={source}].old > .age, [data-source={source}].old > .head .age"
        return "".join(each.text for each in self.browser.find_elements(By.CSS_SELECTOR, selector))

    def marks(self, chart):
        return len(self.drawn(chart, "line.mark", "x1"))

    def focus(self, model, label):
        """Focus a button of a model's row as a keyboard does; return it."""
        selector = f"button[aria-label='{label} {model}']"
        row = self.row("models", model)
        for fold in row.find_elements(By.CSS_SELECTOR, ".more"):
            self.run("arguments[0].open = true", fold)
        button = row.find_element(By.CSS_SELECTOR, selector)
        self.run("arguments[0].focus()", button)
        return button

    def focused(self):
        return self.run("return document.activeElement.ariaLabel || document.activeElement.id")

    def complaints(self):
        log = self.browser.get_log("browser")
        return [entry["message"] for entry in log if entry["level"] == "SEVERE"]


class StubPage(Page):
    """The page of a stand-in, which polls when the test says so; the stand-in's clock, too."""

    def __init__(self, browser, stub):
        self.now = time.time()
        stub.clock = lambda: self.now
        super().__init__(browser, stub)
        # Without a model the page asks for these beside its rounds.
        wait_for(lambda: self.rows_of("suggestions"), 60, "the models to begin with")

    def poll(self, seconds=0):
        """Have the page poll, so many seconds later."""
        self.now += seconds
        self.next_rounds()
