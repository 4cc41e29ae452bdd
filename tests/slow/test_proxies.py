"""The page behind real proxies that end TLS: its own calls pass, those of other sites do not."""

import contextlib

import pytest

from helpers.answers import CLEAR
from helpers.proxies import KINDS, NAME, PASSES_HOST, Proxy

OWN = {"Sec-Fetch-Site": "same-origin"}


@pytest.fixture(scope="module")
def named(make_module_service):
    return make_module_service(LLM_ALLOWED_HOSTS=NAME)


@pytest.fixture
def make_proxy(named, tmp_path):
    with contextlib.ExitStack() as stack:

        def make(kind, **options):
            proxy = Proxy(kind, tmp_path, named.port, **options)
            stack.callback(proxy.close)
            return proxy

        yield make


def code(answer):
    return answer.json()["code"]


@pytest.mark.parametrize("prefix", ["", "/llm"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_page_works_through_a_proxy_that_ends_tls(make_proxy, kind, prefix):
    proxy = make_proxy(kind)
    page = proxy.call("GET", prefix + "/")
    assert (page.status_code, "<title>" in page.text) == (200, True)
    assert proxy.call("GET", prefix + "/health").status_code == 200
    answer = proxy.call("POST", prefix + CLEAR, Origin=f"https://{proxy.host}", **OWN)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_of_another_site_stays_out_through_each_proxy(make_proxy, kind):
    proxy = make_proxy(kind)
    for site in ("cross-site", "same-site", "same-origin"):
        headers = {"Origin": "https://evil.example", "Sec-Fetch-Site": site}
        assert proxy.call("POST", CLEAR, **headers).status_code == 403
    answer = proxy.call("POST", CLEAR, Origin="https://evil.example")
    assert (answer.status_code, code(answer)) == (403, "origin_not_allowed")


@pytest.mark.parametrize("kind", KINDS)
def test_a_foreign_name_that_leads_to_the_proxy_stays_out(make_proxy, kind):
    proxy = make_proxy(kind)
    host = f"evil.example:{proxy.port}"
    answer = proxy.call("POST", CLEAR, Host=host, Origin=f"https://{host}", **OWN)
    assert (answer.status_code, code(answer)) == (403, "host_not_allowed")


@pytest.mark.parametrize("kind", PASSES_HOST)
def test_where_the_proxy_rewrites_host_no_origin_is_the_own_one(make_proxy, kind):
    proxy = make_proxy(kind, rewrites_host=True)
    for host in (proxy.host, f"evil.example:{proxy.port}"):
        answer = proxy.call("POST", CLEAR, Host=host, Origin=f"https://{host}", **OWN)
        assert (answer.status_code, code(answer)) == (403, "origin_not_allowed")
