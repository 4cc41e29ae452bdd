"""The client of Ollama's API on a real Ollama: connections that are kept, and restarts."""

import psutil
import pytest

from app import STATUS
from ollama_client import Ollama, ServiceError


def connections(port):
    return [c for c in psutil.Process().net_connections("tcp") if c.raddr and c.raddr.port == port]


def test_calls_share_a_connection_also_after_errors(ollama_server):
    server = ollama_server()
    ollama = Ollama(server.url)
    for _ in range(50):
        ollama.version()
        ollama.tags()
        ollama.ps()
        with pytest.raises(ServiceError) as refused:
            ollama.delete("nothing")
        assert (refused.value.code, STATUS[refused.value.code]) == ("model_not_found", 404)
    assert len(connections(server.port)) == 1


def test_a_restarted_ollama_is_reached_at_the_next_call(ollama_server):
    server = ollama_server()
    ollama = Ollama(server.url)
    for _ in range(3):
        assert ollama.version()
        server.kill()
        with pytest.raises(ServiceError) as refused:
            ollama.version()
        assert (refused.value.code, STATUS[refused.value.code]) == ("ollama_unreachable", 503)
        server.start()
