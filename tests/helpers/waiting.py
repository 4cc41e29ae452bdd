"""One HTTP call, and waiting for something to become true."""

import time

import psutil
import requests


def call(method, url, **options):
    """Send a request without proxies, on a connection of its own; options as in requests."""
    with requests.Session() as session:
        session.trust_env = False
        return session.request(method, url, **{"timeout": 60, **options})


def wait_for(predicate, timeout, what):
    """Poll until the predicate is true; return its value.

    A refused connection and a process that has gone count as "not yet".
    """
    until = time.monotonic() + timeout
    while True:
        try:
            if value := predicate():
                return value
        except (requests.RequestException, psutil.NoSuchProcess, ProcessLookupError) as error:
            value = error
        assert time.monotonic() < until, f"{what}: not within {timeout} s (last seen: {value!r})"
        time.sleep(0.02)
