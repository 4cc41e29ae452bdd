"""Fixtures of the tests in a browser.

browser      a headless Chromium, one for each file
stub         the stand-in of the service; see helpers/page_stub.py
stub_page    its page
"""

import pytest

from helpers.browser import start_browser
from helpers.page import StubPage
from helpers.page_stub import PageStub


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    one = start_browser(tmp_path_factory.mktemp("browser"))
    yield one
    one.quit()


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
