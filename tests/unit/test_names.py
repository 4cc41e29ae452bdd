"""Model names, addresses, times. Ollama's own idea of a name is asked for in api/test_names.py."""

import pytest

from app import STATUS
from helpers.names import NO_NAMES, TAKEN
from ollama_client import (
    SPACES,
    ServiceError,
    check_name,
    dial_url,
    name_key,
    place_key,
    plain_key,
    timestamp,
    trimmed,
)


@pytest.mark.parametrize("name", TAKEN, ids=lambda name: ascii(name)[:30])
def test_a_name_is_taken_without_the_blanks_around_it(name):
    assert check_name(name) == name.strip(SPACES)


@pytest.mark.parametrize(
    "value",
    [*NO_NAMES, None, 7, 1.5, True, [], ["gemma"], {}, {"model": "gemma"}, b"gemma"],
    ids=lambda value: ascii(value)[:30],
)
def test_what_is_no_name_is_refused(value):
    with pytest.raises(ServiceError) as refused:
        check_name(value)
    assert (refused.value.code, STATUS[refused.value.code]) == ("bad_model_name", 400)


@pytest.mark.parametrize(
    "one, other",
    [
        ("gemma", "gemma:latest"),
        ("Gemma", "gemma:LATEST"),
        ("library/gemma", "gemma"),
        ("registry.ollama.ai/library/gemma:latest", "gemma"),
        ("registry.ollama.ai/user/m", "user/m:latest"),
        ("HF.co/Org/Repo:q4_k_m", "hf.co/org/repo:Q4_K_M"),
        ("https://h/n/m", "h/n/m"),
        ("https:///n/m", "n/m"),
        ("gemma:local", "gemma"),
        ("gemma: Local ", "gemma"),
        ("gemma:8b:local", "gemma:8b"),
        ("h:1/n/m:local", "h:1/n/m"),
        ("gemma:8b:cloud", "gemma:8b-cloud"),
        ("gemma:8B-CLOUD", "gemma:8b-cloud"),
        ("h:1/n/m:cloud", "H:1/n/M:Cloud"),
    ],
)
def test_names_of_one_model_have_one_key(one, other):
    assert name_key(one) == name_key(other)


def test_a_manifest_is_told_from_what_ollama_takes_its_name_for():
    """Ollama lists `gemma:local`, and takes it for `gemma:latest` where it is asked for it."""
    assert plain_key("Gemma:local") == "gemma:local" != name_key("gemma:local")
    assert place_key("registry.ollama.ai", "library", "Gemma", "local") == "gemma:local"
    assert place_key("HF.co", "Org", "m", "Q4") == plain_key("hf.co/org/m:q4") == "hf.co/org/m:q4"
    assert place_key("h", "library", "m", "latest") == plain_key("h/library/m")
    assert plain_key("gemma:8b:local") is None


@pytest.mark.parametrize(
    "text",
    [
        "/models",
        '"/models"',
        "'/models'",
        "/models\r",
        " /models\t\r\n",
        "\"'/models'\"",
        ' "/models" ',
    ],
)
def test_a_setting_is_trimmed_as_ollama_trims_it(text):
    assert trimmed(text) == "/models"


@pytest.mark.parametrize(
    "text, value", [('""', ""), ('" /m "', " /m "), ("/a'b", "/a'b"), ("", "")]
)
def test_what_lies_inside_of_quotes_stays(text, value):
    assert trimmed(text) == value


def test_names_of_different_models_have_different_keys():
    names = [
        "gemma",
        "gemma:2b",
        "gemma2",
        "user/gemma",
        "library2/gemma",
        "h/library/gemma",
        "h:1/library/gemma",
        "h:2/library/gemma",
        "h/user/gemma",
        "hf.co/library/gemma",
        "hf.co/gemma",
    ]
    assert len({name_key(name) for name in names}) == len(names)


@pytest.mark.parametrize(
    "setting, url",
    [
        ("", "http://127.0.0.1:11434"),
        ("0.0.0.0", "http://127.0.0.1:11434"),
        ("0.0.0.0:1234", "http://127.0.0.1:1234"),
        (":1234", "http://127.0.0.1:1234"),
        ("127.0.0.1", "http://127.0.0.1:11434"),
        ("example.com", "http://example.com:11434"),
        ("example.com:80", "http://example.com:80"),
        ("http://example.com", "http://example.com:80"),
        ("https://example.com", "https://example.com:443"),
        ("https://example.com:1/path", "https://example.com:1"),
        ("::", "http://[::1]:11434"),
        ("::1", "http://[::1]:11434"),
        ("[::]", "http://[::1]:11434"),
        ("[::]:99", "http://[::1]:99"),
        ("[::1]:99", "http://[::1]:99"),
        ("http://[::]:5", "http://[::1]:5"),
        ("http://0.0.0.0:11434/", "http://127.0.0.1:11434"),
        (" 127.0.0.1:1 ", "http://127.0.0.1:1"),
        ('"0.0.0.0"', "http://127.0.0.1:11434"),
        ("'0.0.0.0:99'", "http://127.0.0.1:99"),
        ("localhost:1", "http://localhost:1"),
        ("example.com:99999", "http://example.com:11434"),
        ("example.com:port", "http://example.com:11434"),
        ("0.0.0.0:1234\r", "http://127.0.0.1:1234"),
        ("'\t127.0.0.1:1 '\r\n", "http://127.0.0.1:1"),
        ("example.com:", "http://example.com:11434"),
        ("http://example.com:99999/x", "http://example.com:80"),
        ("http://example.com/a:b", "http://example.com:80"),
        ("ollama.com", "https://ollama.com:443"),
        ("0:0::1", "http://[::1]:11434"),
        ("[::1", "http://[::1]:11434"),
    ],
)
def test_ollama_host_is_read_as_ollama_reads_it(setting, url):
    assert dial_url(setting) == url


def test_times_are_iso_8601_utc():
    assert timestamp(0.5) == "1970-01-01T00:00:00+00:00"
    assert timestamp(None) is None
