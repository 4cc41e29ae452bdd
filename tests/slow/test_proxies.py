"""Calls and streams through real proxies: the page's own calls pass, other sites' do not."""

import pytest

from helpers.answers import CLEAR
from helpers.line_server import LineServer
from helpers.listener import PULL, pull_of
from helpers.proxies import KINDS
from helpers.waiting import wait_for

OWN = {"Sec-Fetch-Site": "same-origin"}


@pytest.fixture
def line_server():
    one = LineServer()
    yield one
    one.close()


def code(answer):
    return answer.json()["code"]


# Whose calls pass


@pytest.mark.parametrize("prefix", ["", "/llm"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_pages_calls_pass(make_proxy, named, kind, prefix):
    proxy = make_proxy(kind, named.port)
    page = proxy.call("GET", prefix + "/")
    assert (page.status_code, "<title>" in page.text) == (200, True)
    assert proxy.call("GET", prefix + "/health").status_code == 200
    answer = proxy.call("POST", prefix + CLEAR, Origin=proxy.url, **OWN)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("kind", KINDS)
def test_calls_of_another_site_stay_out(make_proxy, named, kind):
    proxy = make_proxy(kind, named.port)
    for site in ("cross-site", "same-site", "same-origin"):
        headers = {"Origin": "https://evil.example", "Sec-Fetch-Site": site}
        assert proxy.call("POST", CLEAR, **headers).status_code == 403
    answer = proxy.call("POST", CLEAR, Origin="https://evil.example")
    assert (answer.status_code, code(answer)) == (403, "origin_not_allowed")


@pytest.mark.parametrize("kind", KINDS)
def test_a_foreign_name_that_leads_to_the_proxy_stays_out(make_proxy, named, kind):
    proxy = make_proxy(kind, named.port)
    host = f"evil.example:{proxy.port}"
    answer = proxy.call("POST", CLEAR, Host=host, Origin=f"https://{host}", **OWN)
    assert (answer.status_code, code(answer)) == (403, "host_not_allowed")


@pytest.mark.parametrize("kind", KINDS)
def test_where_the_proxy_rewrites_host_no_origin_is_the_own_one(make_proxy, named, kind):
    proxy = make_proxy(kind, named.port, rewrites_host=True)
    for host in (proxy.host, f"evil.example:{proxy.port}"):
        answer = proxy.call("POST", CLEAR, Host=host, Origin=f"https://{host}", **OWN)
        assert (answer.status_code, code(answer)) == (403, "origin_not_allowed")
        assert "Host" in answer.json()["error"] and "LLM_ALLOWED_ORIGINS" in answer.json()["error"]


# Streams


@pytest.mark.parametrize("kind", KINDS)
def test_each_line_comes_before_the_next_one_is_sent(make_proxy, line_server, kind):
    proxy = make_proxy(kind, line_server.port)
    line_server.send(b"line 0\n")
    with proxy.stream("GET", "/lines") as answer:
        for number in range(1, 20):
            assert answer.readline() == b"line %d\n" % (number - 1)
            line_server.send(b"line %d\n" % number)
        line_server.end()
        assert answer.read() == b"line 19\n"


@pytest.mark.parametrize("kind", KINDS)
def test_a_pull_ends_when_its_listener_has_left_the_proxy(make_proxy, named, registry, kind):
    registry.rate = 2e6
    name = registry.add_random("ns/big:latest", 100)
    proxy = make_proxy(kind, named.port)
    with proxy.stream("POST", PULL, {"model": name, "insecure": True}) as answer:
        wait_for(lambda: b'"completed_bytes": 0' not in answer.readline(), 60, "a byte")
        assert pull_of(named, name)["state"] == "running"
    wait_for(lambda: pull_of(named, name)["state"] == "cancelled", 30, "the end of the pull")
