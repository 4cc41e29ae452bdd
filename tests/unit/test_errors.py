"""Real error texts, and what is made of them: where it failed decides, then the words.

The texts are Ollama's own, as 0.34.4 said them to the tests' registry, or stand in its source.
"""

import pytest

from llm_service.errors import Interrupted, ServiceError, Unreachable, clean, failure, file_errors

MANIFEST = "pull model manifest: "
GET = 'Get "https://registry.example/v2/ns/m/manifests/latest": '
HEAD = 'Head "https://registry.example/v2/ns/m/blobs/sha256:00": '
BLOBS = "/models/blobs/sha256-00"
SIGNED = "https://cdn.example/blob?X-Amz-Signature=" + "5ec" * 200

REGISTRY = [
    # Its status line
    ("pull model manifest: 400: tag is no quantization", "registry_refused", "the name and the ta"),
    (
        "pull model manifest: 400: Client sent an HTTP request to an HTTPS server.",
        "registry_insecure",
        "leave",
    ),
    ("pull model manifest: 401", "registry_denied", "login"),
    ("pull model manifest: 403: ", "registry_denied", "login"),
    ("403: ", "registry_denied", "login"),
    ("pull model manifest: 410: ", "model_not_found", "the name and the tag"),
    ("pull model manifest: 412: wants 0.40", "ollama_too_old", "update Ollama"),
    ("pull model manifest: 400: requires a newer version of Ollama", "ollama_too_old", "update"),
    ("pull model manifest: 418: a teapot", "registry_refused", "the name and the tag"),
    ("pull model manifest: 429: slow down", "registry_busy", "some minutes"),
    ("500: no space left on device", "registry_error", "the registry fails: try again later"),
    ("502: permission denied", "registry_error", "try again later"),
    ("unexpected status code 302", "registry_redirect", "by a 307"),
    ("max retries exceeded: status 403", "registry_denied", "login"),
    ("max retries exceeded: status 503", "registry_error", "try again later"),
    # Who may have it
    (f'{MANIFEST}realm host "" does not match original host "hf.co"', "registry_denied", "login"),
    (f"{MANIFEST}unauthorized: access denied", "registry_denied", "login"),
    (
        f"{MANIFEST}open /root/.ollama/id_ed25519: no such file or directory",
        "registry_denied",
        "restart",
    ),
    (f"{MANIFEST}file does not exist", "model_not_found", "the name and the tag"),
    ("file does not exist", "registry_refused", "another tag"),
    # Redirects
    (f"{MANIFEST}{GET}blocked redirect to a different host", "registry_redirect", "the host that"),
    (f'Head "{SIGNED}": blocked redirect to a different host', "registry_redirect", "the host th"),
    (
        "max retries exceeded: redirect target not allowed: 127.0.0.1 is not a public address",
        "registry_redirect",
        "the host that",
    ),
    ("http: no Location header in response", "registry_redirect", "by a 307"),
    (
        f"{MANIFEST}{GET}maximum redirects exceeded (10) for directURL",
        "registry_redirect",
        "who runs",
    ),
    # The manifest
    (f"{MANIFEST}invalid character '<' looking for beginning of value", "registry_error", "portal"),
    (f"{MANIFEST}unexpected end of JSON input", "registry_error", "portal"),
    (f"{MANIFEST}json: cannot unmarshal array into Go value", "registry_error", "portal"),
    ("ns/m: digest is empty", "registry_error", "portal"),
    ("invalid digest format", "registry_error", "portal"),
    ("digest mismatch, file must be downloaded again: want a, got b", "digest_mismatch", "on its"),
    ("max retries exceeded: size mismatch", "digest_mismatch", "on its way"),
]
WAY = [
    # The proxy
    (
        f"{MANIFEST}{GET}proxyconnect tcp: dial tcp 10.0.0.1:3128: connect: refused",
        "proxy_error",
        "PROXY",
    ),
    (
        f"{MANIFEST}{GET}proxyconnect tcp: tls: first record does not look like",
        "proxy_error",
        "PROXY",
    ),
    (f"{MANIFEST}{GET}Forbidden", "proxy_error", "HTTPS_PROXY"),
    (f"{MANIFEST}{GET}Proxy Authentication Required", "proxy_error", "HTTPS_PROXY"),
    (
        f"{MANIFEST}{GET}socks connect tcp 10.0.0.1:1080->r:443: unknown error",
        "proxy_error",
        "PROXY",
    ),
    # TLS
    (
        f"{MANIFEST}{GET}tls: failed to verify certificate: x509: certificate signed by "
        "unknown authority",
        "registry_certificate",
        "SSL_CERT_DIR",
    ),
    (
        f"{MANIFEST}{GET}tls: failed to verify certificate: x509: certificate has expired or is "
        "not yet valid: current time 2026-01-02T00:00:00Z is after 2026-01-01T00:00:00Z",
        "registry_certificate",
        "clock",
    ),
    (
        f"{MANIFEST}{GET}tls: failed to verify: x509: certificate is valid for a, not b",
        "registry_certificate",
        "of another host",
    ),
    (f"{MANIFEST}{GET}remote error: tls: certificate required", "registry_certificate", "who runs"),
    (
        f"{MANIFEST}{GET}remote error: tls: protocol version not supported",
        "registry_certificate",
        "who runs",
    ),
    (f"{MANIFEST}{GET}net/http: TLS handshake timeout", "registry_unreachable", "network"),
    (
        f"{MANIFEST}{GET}http: server gave HTTP response to HTTPS client",
        "registry_insecure",
        "insecure",
    ),
    (
        f"{MANIFEST}{GET}tls: first record does not look like a TLS handshake",
        "registry_insecure",
        "insecure",
    ),
    ("insecure protocol http", "registry_insecure", '"insecure": true'),
    # The connection
    (
        f"{MANIFEST}{GET}dial tcp: lookup r on 10.0.0.2:53: no such host",
        "registry_unreachable",
        "(DNS)",
    ),
    (f"{MANIFEST}{GET}dial tcp: lookup r: i/o timeout", "registry_unreachable", "(DNS)"),
    (
        f"{MANIFEST}{GET}dial tcp 1.2.3.4:443: connect: connection refused",
        "registry_unreachable",
        "network",
    ),
    (f"{MANIFEST}{GET}dial tcp 1.2.3.4:443: i/o timeout", "registry_unreachable", "network"),
    (
        f"{MANIFEST}{GET}dial tcp 1.2.3.4:443: connect: no route to host",
        "registry_unreachable",
        "network",
    ),
    (
        f"{MANIFEST}{GET}dial tcp [::1]:443: connect: network is unreachable",
        "registry_unreachable",
        "network",
    ),
    (f"{MANIFEST}{GET}dial tcp: address 99999: invalid port", "registry_unreachable", "port"),
    (f"{MANIFEST}{GET}dial tcp 1.2.3.4:443: socket: too many open files", "ollama_error", "reset"),
    (
        f"{MANIFEST}{GET}read tcp 1.1.1.1:2->3.3.3.3:4: read: connection reset by peer",
        "registry_unreachable",
        "out",
    ),
    (f"{MANIFEST}{GET}EOF", "registry_unreachable", "network"),
    (f"{MANIFEST}unexpected EOF", "registry_unreachable", "network"),
    (
        f"{MANIFEST}read tcp 1.1.1.1:2->3.3.3.3:4: read: connection reset by peer",
        "registry_unreachable",
        "out",
    ),
    (
        f'{MANIFEST}{GET}net/http: HTTP/1.x broken: malformed HTTP response "SSH-2"',
        "registry_unreachable",
        "port",
    ),
    (f"{HEAD}EOF", "registry_unreachable", "network"),
    ("context deadline exceeded", "registry_unreachable", "network"),
    (f"max retries exceeded: {GET}EOF", "pull_interrupted", "goes on from here"),
    (
        f"max retries exceeded: {GET}dial tcp 1.2.3.4:443: connect: connection refused",
        "pull_interrupted",
        "on f",
    ),
    ("max retries exceeded: unexpected EOF", "pull_interrupted", "goes on from here"),
    ("max retries exceeded: EOF", "pull_interrupted", "goes on from here"),
    (
        "stream error: stream ID 1; INTERNAL_ERROR; received from peer",
        "registry_unreachable",
        "network",
    ),
    ("context canceled", "pull_interrupted", "goes on from here"),
    (f"{HEAD}context canceled", "pull_interrupted", "goes on from here"),
]
FILES = [
    (f"write {BLOBS}-partial: no space left on device", "disk_full", "enlarge"),
    (f"max retries exceeded: write {BLOBS}-partial: no space left on device", "disk_full", "enl"),
    (f"write {BLOBS}-partial-0: disk quota exceeded", "disk_full", "enlarge"),
    (f"write {BLOBS}-partial: file too large", "disk_full", "enlarge"),
    (f"open {BLOBS}-partial: permission denied", "store_not_writable", "chown"),
    (f"open {BLOBS}-partial-0: read-only file system", "store_read_only", "mounted read-only"),
    (
        "mkdir /models/blobs: permission denied: ensure path elements are traversable",
        "store_not_writable",
        "chown",
    ),
    ("Error: mkdir /models: permission denied", "store_not_writable", "chown"),
    (f"read {BLOBS}: input/output error", "disk_failing", "dmesg"),
    (f"open {BLOBS}: too many open files", "ollama_error", "reset"),
    (f"remove {BLOBS}-partial-0: no such file or directory", "parts_damaged", "purge"),
    (f"read {BLOBS}-partial-0: is a directory", "parts_damaged", "purge"),
    ("mkdir /models/blobs: not a directory", "store_damaged", "in the way"),
    ("stat /models/manifests/r/ns/m/latest: no such file or directory", "store_damaged", "in the"),
    ("write /models/GGUF x509/blobs/sha256-00-partial: no space left on device", "disk_full", ""),
]
RUNNING = "an error was encountered while running the model"
CONTENT = [
    (f'read GGUF metadata "{BLOBS}": EOF', "model_damaged", "verify"),
    (f'read GGUF metadata "{BLOBS}": error reading GGUF item 20: EOF', "model_damaged", "verify"),
    (f'read GGUF metadata "{BLOBS}": unsupported file type [0 0 0 0]', "model_damaged", "verify"),
    (f'read GGUF metadata "{BLOBS}": offset+size exceeds file size', "model_damaged", "verify"),
    (
        f"exit status 1: error loading model: failed to load model from {BLOBS}",
        "model_damaged",
        "verify",
    ),
    ("error loading model: unknown model architecture: 'next'", "ollama_too_old", "update"),
    ("error loading model: unable to allocate CUDA0 buffer", "out_of_memory", "smaller"),
    ("model requires more system memory (8 GiB) than is available", "out_of_memory", "smaller"),
    ("EOF", "model_damaged", "verify"),
    ("unexpected end of JSON input", "model_damaged", "verify"),
    ("llama-server process has terminated: signal: killed", "ollama_error", "log"),
    (f"{RUNNING}: unexpected EOF", "answer_interrupted", "ask again"),
    (f"{RUNNING}: CUDA error: out of memory", "out_of_memory", "smaller"),
    ("model runner has unexpectedly stopped, this may be due to", "answer_interrupted", "again"),
    ('Post "http://127.0.0.1:4/completion": dial tcp 127.0.0.1:4: EOF', "ollama_error", "log"),
    (
        "this model requires MLX support, but the MLX runtime is not available",
        "mlx_missing",
        "GGUF",
    ),
    ("MLX not available: libmlxc.so not found", "mlx_missing", "GGUF"),
    ("invalid model name", "bad_model_name", "the name"),
    ("model 'm' not found", "model_not_found", "the name"),
]


@pytest.mark.parametrize("text, code, advice", REGISTRY + WAY + FILES)
def test_an_error_of_a_pull_has_the_code_and_the_advice_of_where_it_arose(text, code, advice):
    error = failure(text, pull=True)
    assert (error.code, advice in str(error)) == (code, True), str(error)


@pytest.mark.parametrize("text, code, advice", FILES + CONTENT)
def test_an_error_of_anything_else_says_nothing_about_a_registry(text, code, advice):
    error = failure(text)
    assert (error.code, advice in str(error)) == (code, True), str(error)


@pytest.mark.parametrize(
    "text",
    [
        "EOF",
        "unexpected EOF",
        r"invalid character '\x00' looking for beginning of value",
        "json: cannot unmarshal array into Go value of type server.jsonBlobDownloadPart",
        "unexpected end of JSON input",
    ],
)
def test_a_text_about_a_content_alone_is_a_parts_record_in_a_pull_and_a_models_file_else(text):
    assert failure(text, pull=True).code == "parts_damaged"
    assert "purge" in str(failure(text, pull=True))
    assert failure(text).code == "model_damaged"


@pytest.mark.parametrize(
    "words", ["no space left on device", "permission denied", "x509", "EOF", "not found"]
)
def test_what_a_registry_says_is_no_fact_of_this_machine(words):
    assert failure(f"pull model manifest: 403: {words}", pull=True).code == "registry_denied"
    url = f'Head "https://cdn.example/{words}?a={words}": blocked redirect to a different host'
    assert failure(url, pull=True).code == "registry_redirect"


@pytest.mark.parametrize(
    "text, kind",
    [
        (f"{MANIFEST}{GET}EOF", Unreachable),
        ("pull model manifest: 503: ", Unreachable),
        ("pull model manifest: 429: ", Unreachable),
        ("context canceled", Interrupted),
        ("max retries exceeded: EOF", Interrupted),
        ("pull model manifest: 403: ", ServiceError),
        ("max retries exceeded: redirect target not allowed", ServiceError),
        ("digest mismatch", ServiceError),
    ],
)
def test_only_what_may_pass_by_itself_is_of_a_kind_that_a_download_outlives(text, kind):
    assert type(failure(text, pull=True)) is kind


# What is shown


def test_an_address_is_shown_without_its_signature_and_its_user():
    text = f'Head "{SIGNED}": blocked; parse "http://me:secret@proxy:3128/?t=1#x": no'
    shown = clean(text)
    assert shown == 'Head "https://cdn.example/blob": blocked; parse "http://proxy:3128/": no'


def test_the_reason_is_shown_however_long_the_text_before_it():
    path = "https://cdn.example/" + "a" * 900
    error = failure(f'Head "{path}": blocked redirect to a different host', pull=True)
    assert "blocked redirect to a different host: Ollama refuses" in str(error)
    assert len(clean(path)) <= 300


def test_a_page_of_html_is_shown_as_its_text():
    page = "403: <!DOCTYPE html>\n<html><head><title>Blocked</title></head><body> by policy</body>"
    assert clean(page) == "403: Blocked by policy"


def test_what_the_file_system_refuses_is_told_with_advice():
    with pytest.raises(ServiceError, match="/nowhere/at/all") as caught, file_errors():
        open("/nowhere/at/all")
    assert caught.value.code == "store_damaged"
    with pytest.raises(ServiceError, match="enlarge") as caught, file_errors():
        raise OSError(28, "No space left on device", "/models/blobs/redirect EOF")
    assert caught.value.code == "disk_full"
