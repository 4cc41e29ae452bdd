"""One HTTP call, and waiting for something to become true."""

import time

import psutil
import requests

LONGEST_PAUSE_S = 0.5


def call(method, url, **options):
    """Send a request without proxies, on a connection of its own; options as in requests."""
    with requests.Session() as session:
        session.trust_env = False
        return session.request(method, url, **{"timeout": 60, **options})


def wait_for(predicate, timeout, what, pause_s=0.02):
    """Poll until the predicate is true; return its value.

    A refused connection and a process that has gone count as "not yet". Who has waited long is
    in no hurry: polling all the time would take half of what the tests compute.
    """
    began = time.monotonic()
    until = began + timeout
    while True:
        try:
            if value := predicate():
                return value
        except (requests.RequestException, psutil.NoSuchProcess, ProcessLookupError) as error:
            value = error
        now = time.monotonic()
        assert now < until, f"{what}: not within {timeout} s (last seen: {value!r})"
        time.sleep(min(LONGEST_PAUSE_S, pause_s + (now - began) / 8))
