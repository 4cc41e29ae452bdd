"""The page behind real proxies in a real browser, and what a page of another site gets there."""

import types

import pytest

from helpers.answers import CLEAR, GEMMA
from helpers.browser import start_browser
from helpers.line_server import LineServer
from helpers.page import Page, wait_for
from helpers.proxies import KINDS, NAME

EVIL = "evil.example"
FETCH = """
    const done = arguments[arguments.length - 1];
    fetch(arguments[0], arguments[1])
        .then(async (answer) => done([answer.status, await answer.text()]))
        .catch((error) => done([0, String(error)]))"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """One that finds both names on this machine, and trusts any certificate."""
    names = f"--host-resolver-rules=MAP {NAME} 127.0.0.1, MAP {EVIL} 127.0.0.1"
    folder = tmp_path_factory.mktemp("browser")
    one = start_browser(folder, names, "--ignore-certificate-errors")
    yield one
    one.quit()


@pytest.fixture(scope="module")
def site():
    """A server of another site, for its pages."""
    one = LineServer()
    yield one
    one.close()


def fetch(browser, url, **init):
    """Return what a page's script gets of a call: [status, body], or [0, the error]."""
    return browser.execute_async_script(FETCH, url, init)


def clear_by_button(page):
    page.wait_row("models", GEMMA, "on the disk")
    page.click("clear")
    page.answer("ask-yes")


@pytest.mark.parametrize("prefix", ["", "/llm"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_page_shows_what_is_there_and_its_buttons_work(
    browser, make_proxy, named, kind, prefix
):
    proxy = make_proxy(kind, named.port)
    browser.get_log("browser")
    page = Page(browser, types.SimpleNamespace(url=proxy.url + prefix))
    clear_by_button(page)
    page.wait_text("messages", "The memory is cleared")
    status, body = fetch(browser, "api/models/delete?model=nothing", method="DELETE")
    assert status == 404 and "model_not_found" in body
    browser.get("about:blank")


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_of_another_site_stays_out(browser, make_proxy, named, site, kind):
    proxy = make_proxy(kind, named.port)
    browser.get(f"http://{EVIL}:{site.port}/")
    start = len(named.log())
    for init in ({"mode": "no-cors"}, {}, {"headers": {"Content-Type": "application/json"}}):
        status, _ = fetch(browser, proxy.url + CLEAR, method="POST", body="{}", **init)
        assert status == 0
    wait_for(lambda: named.log()[start:].count(f"{CLEAR} 403") == 3, 20, "three refusals")


@pytest.mark.parametrize("kind", KINDS)
def test_another_name_that_leads_to_the_proxy_stays_out(browser, make_proxy, named, kind):
    proxy = make_proxy(kind, named.port)
    browser.get(proxy.url.replace(NAME, EVIL) + "/")
    assert "host_not_allowed" in browser.page_source
    status, body = fetch(browser, CLEAR, method="POST")
    assert status == 403 and "host_not_allowed" in body


@pytest.mark.parametrize("kind", KINDS)
def test_where_the_proxy_rewrites_host_the_page_says_what_to_set(browser, make_proxy, named, kind):
    proxy = make_proxy(kind, named.port, rewrites_host=True)
    page = Page(browser, types.SimpleNamespace(url=proxy.url))
    clear_by_button(page)
    page.wait_text("messages", "a proxy must pass the browser's Host on")
    browser.get(proxy.url.replace(NAME, EVIL) + "/")
    assert fetch(browser, CLEAR, method="POST")[0] == 403
    browser.get("about:blank")
