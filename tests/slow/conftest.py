"""Fixtures of the tests in a browser and behind proxies.

browser      a headless Chromium, one for each file
named        a service with gemma:latest that answers to the name of the proxies
make_proxy   starts proxies before a port; see helpers/proxies.py
stub         the stand-in of the service; see helpers/page_stub.py
stub_page    its page
"""

import contextlib

import pytest

from helpers.answers import GEMMA
from helpers.browser import start_browser
from helpers.page import StubPage
from helpers.page_stub import PageStub
from helpers.proxies import NAME, Proxy


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    one = start_browser(tmp_path_factory.mktemp("browser"))
    yield one
    one.quit()


@pytest.fixture(scope="module")
def named(make_module_service, gguf):
    return make_module_service(models={GEMMA: gguf}, LLM_MODEL=GEMMA, LLM_ALLOWED_HOSTS=NAME)


@pytest.fixture
def make_proxy(tmp_path):
    with contextlib.ExitStack() as stack:

        def make(kind, upstream, **options):
            proxy = Proxy(kind, tmp_path, upstream, **options)
            stack.callback(proxy.close)
            return proxy

        yield make


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
