"""Web pages of other sites in a real browser: what reaches the service, and what does not."""

import http.server
import re
import threading

import pytest

from helpers.answers import CLEAR, GEMMA, GETS, RESET
from helpers.browser import start_browser
from helpers.listener import PULL
from helpers.ports import free_port
from helpers.waiting import wait_for

PAGE = b"<!doctype html><title>another site</title>"
JSON = {"Content-Type": "application/json"}
NAMES = "MAP evil.example 127.0.0.1, MAP good.example 127.0.0.1"
FETCH = """
    const done = arguments[arguments.length - 1];
    fetch(arguments[0], arguments[1])
        .then(async r => done([r.status, await r.text()]))
        .catch(e => done([0, String(e)]))"""
IMAGE = """
    const [url, done] = arguments;
    const image = new Image();
    image.onload = image.onerror = () => done();
    image.src = url"""
BEACON = "return navigator.sendBeacon(arguments[0], '{}')"
FORM = """
    const form = document.createElement('form');
    form.method = 'post';
    form.enctype = 'text/plain';
    form.action = arguments[0];
    document.body.append(form);
    form.submit()"""
SANDBOX = """
    const [url, done] = arguments;
    const frame = document.createElement('iframe');
    frame.sandbox = 'allow-scripts';
    onmessage = () => done();
    frame.srcdoc = `<script>fetch('${url}', {method: 'POST', mode: 'no-cors'})
        .finally(() => parent.postMessage(1, '*'))</script>`;
    document.body.append(frame)"""


class Elsewhere(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(PAGE)))
        self.end_headers()
        self.wfile.write(PAGE)

    def log_message(self, *_):
        """Stay quiet."""


@pytest.fixture(scope="module")
def elsewhere():
    """The port of another site."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", free_port()), Elsewhere)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    one = start_browser(folder, f"--host-resolver-rules={NAMES}")
    yield one
    one.quit()


@pytest.fixture(scope="module")
def visited_service(make_module_service, gguf, elsewhere):
    return make_module_service(
        models={GEMMA: gguf},
        LLM_MODEL=GEMMA,
        LLM_ALLOWED_ORIGINS=f"http://good.example:{elsewhere}",
    )


@pytest.fixture
def visited(visited_service, gguf):
    """A service with a loaded model, which a call that got through would unload or delete."""
    visited_service.add_model(GEMMA, gguf)
    visited_service.load(GEMMA)
    return visited_service


def fetch(browser, url, **init):
    """Return what a page's script gets of a call: [status, body], or [0, the error]."""
    return browser.execute_async_script(FETCH, url, init)


def assert_untouched(service):
    assert service.get("/api/models/loaded").json()["count"] == 1
    assert service.get("/api/models").json()["count"] == 1


def wait_code(browser, code):
    """Wait until the browser shows this error: the address is there before the text."""
    shown = f'"code":"{code}"'
    wait_for(lambda: shown in browser.page_source.replace(" ", ""), 30, shown)


def assert_all_refused(log):
    calls = re.findall(r"INFO \S+ (\S+) (/\S*) (\d{3}) ", log)
    # The icon is asked for by the service's own error page, on which the form has ended.
    icon = ("GET", "/favicon.ico", "404")
    assert {call for call in calls if call[2] != "403"} <= {icon}
    assert [path for _, path, _ in calls].count("/health") == 2  # a 200 of it leaves no line
    assert len(calls) > 25


def test_a_page_of_another_site_gets_nothing_and_does_nothing(browser, visited, elsewhere):
    url = visited.url
    browser.get(f"http://evil.example:{elsewhere}/")
    before = len(visited.log())
    for path in GETS:
        assert fetch(browser, url + path)[0] == 0
        assert fetch(browser, url + path, mode="no-cors")[0] == 0  # opaque: no status, no text
    bodies = {CLEAR: "{}", RESET: '{"restart":true}', PULL: '{"model":"a/b"}'}
    ways = [
        {"mode": "no-cors"},
        {"headers": JSON},
        {},
        {"mode": "no-cors", "credentials": "include"},
    ]
    for path, body in bodies.items():
        for init in ways:
            assert fetch(browser, url + path, method="POST", body=body, **init)[0] == 0
    delete = f"{url}/api/models/delete?model={GEMMA}"
    assert fetch(browser, delete, method="DELETE")[0] == 0
    browser.execute_async_script(IMAGE, url + "/api/models")
    assert browser.execute_script(BEACON, url + CLEAR)
    browser.execute_script(FORM, url + CLEAR)
    wait_for(lambda: url in browser.current_url, 30, "the form's answer")
    wait_code(browser, "origin_not_allowed")
    clears = len(ways) + 2  # the beacon and the form
    wait_for(lambda: visited.log()[before:].count(f" {CLEAR} 403") == clears, 30, "all lines")
    assert_all_refused(visited.log()[before:])
    assert_untouched(visited)


def test_a_page_in_a_sandbox_gets_nothing(browser, visited, elsewhere):
    before = len(visited.log())
    browser.get(f"http://evil.example:{elsewhere}/")
    browser.execute_async_script(SANDBOX, visited.url + CLEAR)
    wait_for(lambda: f"POST {CLEAR} 403" in visited.log()[before:], 30, "the refusal in the log")
    assert_untouched(visited)


def test_a_name_bound_anew_to_this_machine_gets_nothing(browser, visited):
    browser.get(f"http://evil.example:{visited.port}/")
    wait_code(browser, "host_not_allowed")
    for path in GETS:
        status, body = fetch(browser, path)
        assert status == 403 and "host_not_allowed" in body
    for path in (CLEAR, RESET):
        assert fetch(browser, path, method="POST")[0] == 403
    assert fetch(browser, f"/api/models/delete?model={GEMMA}", method="DELETE")[0] == 403
    assert_untouched(visited)


@pytest.mark.parametrize("own", [False, True], ids=["allowed", "own"])
def test_an_allowed_site_and_the_own_page_can_do_all(browser, visited, elsewhere, own):
    base = "" if own else visited.url
    browser.get(visited.url + "/" if own else f"http://good.example:{elsewhere}/")
    for path in GETS:
        assert fetch(browser, base + path)[0] == 200
    assert fetch(browser, base + CLEAR, method="POST", body="{}", headers=JSON)[0] == 200
    nothing = {"method": "DELETE", "headers": JSON, "body": '{"model":"nothing"}'}
    status, body = fetch(browser, base + "/api/models/delete", **nothing)
    assert status == 404 and "model_not_found" in body
