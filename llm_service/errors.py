"""The errors that callers are told: what failed, where, and what to do.

Ollama tells an error as a text. ``failure`` decides first by where it arose (the registry's
status line, the connection to it, the file system, a file's content, Ollama itself), then
by its words: what a registry says is no fact of this machine.
"""

import contextlib
import re
import typing

TEXT_LIMIT = 300


class ServiceError(Exception):
    """What went wrong, as a caller is told it.

    ``code`` is a machine word, the message a sentence that says what to do. ``fields`` go
    into the answer beside them. app.py knows the HTTP status of each code.
    """

    def __init__(self, code: str, message: str, **fields: object):
        super().__init__(message)
        self.code = code
        self.fields = fields


class TimedOut(ServiceError):
    """Who was asked took the question and did not answer in time."""


class Unreachable(ServiceError):
    """Who was asked cannot be reached, or cannot serve for now."""


class Interrupted(ServiceError):
    """A transfer broke off, and may go on from where it was."""


KINDS: dict[str, type[ServiceError]] = {
    "registry_unreachable": Unreachable,
    "registry_busy": Unreachable,
    "registry_error": Unreachable,
    "pull_interrupted": Interrupted,
}
NO_LAYER = "the registry names a file that it does not have: pull another tag"
NO_MANIFEST = (
    "no registry answers there, but perhaps a portal or proxy in its place: check the "
    "registry's name and the network"
)
NO_REDIRECT = (
    "Ollama takes a file only from another host, to which the registry must redirect by a "
    "307: pull from one that does"
)
BLOCKED_REDIRECT = (
    "Ollama refuses a redirect to another host: pull by the name of the host that it leads "
    'to; "insecure": true lifts that, but asks without TLS'
)
LOGIN = (
    "there is no such model, or it wants a login: check the name; Ollama logs in by its "
    "key, ~/.ollama/id_ed25519.pub, which an account at the registry must know"
)
OWN_AUTHORITY = (
    "if an authority of your own signs there, put its certificate (PEM) into a folder, set "
    "SSL_CERT_DIR to that folder, and start the service again"
)
OTHER_NAME = "it is of another host: pull by a name that it is valid for"
CLOCK = "check this machine's clock (`date`), then the registry's certificate"
ASK_REGISTRY = "ask who runs the registry"
NOT_INSECURE = 'leave "insecure" out'
INSECURE = 'send "insecure": true for a registry without TLS'
CHECK_NAME = "check the name and the tag"
CHECK_DNS = "check the registry's name, and this machine's name service (DNS)"
CHECK_NETWORK = "check the network, and the registry's name and port"
CLOSED = f'{CHECK_NETWORK}; leave "insecure" out for a registry with TLS'
GOES_ON = "pull again: it goes on from here"
DAMAGED_ON_ITS_WAY = (
    "the data was damaged on its way: pull again; if it stays so, the registry or a proxy "
    "damages it"
)
VERIFY = 'POST /api/models/pull with "verify": true checks its files and repairs them'
PURGE = 'DELETE /api/models/pull with "purge": true, then pull again'
FREE_SPACE = "delete a model or enlarge the disk, then pull again"
CHOWN = "give the model store to the service's user (chown -R), then try again"
WRITABLE = "the model store is mounted read-only: change it where it is writable"
SEE_KERNEL = "the disk, or the way to it, fails: see the kernel's log (dmesg)"
SMALLER = "take a smaller model or context, or set LLM_GPU_LAYERS=auto"
ASK_AGAIN = "its runner ended in the middle of the answer: ask again; the log tells more"
NO_MLX = "its library for such models is not here: pull a GGUF version of the model"

# Where an error arose, by how its text is made; then by its words: code and advice. The first
# that fits counts, and a place ends with what fits all. The texts are of Go and Ollama 0.34;
# an address in quotes is left out of what is searched, since a registry may choose it.
_PHASE = r"^(?:Error: |pull model manifest: |max retries exceeded: )*"
_JSON = r"invalid character|unexpected end of JSON|json: cannot unmarshal"
Place = tuple[str, list[tuple[str, str, str]]]
FILE_SYSTEM: Place = (
    _PHASE + r"(?:open|read|write|mkdir|remove|rename|l?stat|truncate|close) /|^\[Errno",
    [
        ("(?i)no space left|quota exceeded|file too large", "disk_full", FREE_SPACE),
        ("(?i)read-only", "store_read_only", WRITABLE),
        ("(?i)permission denied|operation not permitted", "store_not_writable", CHOWN),
        ("(?i)input/output error|needs cleaning|stale", "disk_failing", SEE_KERNEL),
        ("id_ed25519", "registry_denied", "restart the service: Ollama then makes its key"),
        ("too many open files", "ollama_error", "POST /api/session/reset"),
        ("-partial", "parts_damaged", PURGE),
        ("", "store_damaged", "remove what is in the way at this path, then try again"),
    ],
)
REGISTRY: list[Place] = [
    (  # its status line
        _PHASE + r"(?:unexpected status code |status )?\d{3}(?::|$)",
        [
            ("(?i)to (?:an )?HTTPS (?:server|port)", "registry_insecure", NOT_INSECURE),
            (r"\b412\b|(?i:newer version of Ollama)", "ollama_too_old", "update Ollama"),
            (r"\b40[137]\b", "registry_denied", LOGIN),
            (r"\b4(?:04|10)\b", "model_not_found", CHECK_NAME),
            (r"\b429\b", "registry_busy", "it limits requests: try again in some minutes"),
            (r"\b(?:5\d\d|408)\b", "registry_error", "the registry fails: try again later"),
            (r"\b3\d\d\b", "registry_redirect", NO_REDIRECT),
            ("", "registry_refused", CHECK_NAME),
        ],
    ),
    (
        _PHASE + "file does not exist",
        [
            ("^pull", "model_not_found", CHECK_NAME),
            ("", "registry_refused", NO_LAYER),
        ],
    ),
    (_PHASE + "(?:realm host|unauthorized)", [("", "registry_denied", LOGIN)]),
    (  # a proxy, whose answer to CONNECT is its status in words
        '"": (?:proxyconnect|socks connect|(?!EOF$)[A-Z][A-Za-z ]+$)',
        [("", "proxy_error", "check HTTPS_PROXY and NO_PROXY, and what the proxy allows")],
    ),
    (
        "blocked redirect|redirect target|m redirects|many redirects|Location header",
        [
            ("no Location", "registry_redirect", NO_REDIRECT),
            ("blocked|not allowed", "registry_redirect", BLOCKED_REDIRECT),
            ("", "registry_redirect", ASK_REGISTRY),
        ],
    ),
    (  # TLS
        "x509|tls: |TLS handshake|HTTP response to HTTPS|insecure protocol",
        [
            ("is after|is before|not yet valid", "registry_certificate", CLOCK),
            ("valid for|doesn't contain", "registry_certificate", OTHER_NAME),
            ("x509", "registry_certificate", OWN_AUTHORITY),
            ("insecure|HTTP response|not look like", "registry_insecure", INSECURE),
            ("timeout", "registry_unreachable", CHECK_NETWORK),
            ("", "registry_certificate", ASK_REGISTRY),
        ],
    ),
    (  # the connection
        r'""|\bdial |\blookup |(?:read|write) (?:tcp|udp)|deadline exceeded|'
        "stream error|http2?: |"
        "^pull model manifest: (?:unexpected )?EOF",
        [
            ("too many open files", "ollama_error", "POST /api/session/reset"),
            ("lookup ", "registry_unreachable", CHECK_DNS),
            ("^max retries|context canceled", "pull_interrupted", GOES_ON),
            ("malformed|reset by peer|EOF", "registry_unreachable", CLOSED),
            ("", "registry_unreachable", CHECK_NETWORK),
        ],
    ),
    (  # its manifest
        f"^pull model manifest: (?:{_JSON})|digest is empty|invalid digest",
        [("", "registry_error", NO_MANIFEST)],
    ),
    ("digest mismatch|size mismatch", [("", "digest_mismatch", DAMAGED_ON_ITS_WAY)]),
]
HERE: list[Place] = [
    (  # a runner in the middle of an answer
        "while running the model|model runner has unexpectedly stopped",
        [
            ("(?i)out of memory|allocate", "out_of_memory", SMALLER),
            ("", "answer_interrupted", ASK_AGAIN),
        ],
    ),
    (  # a model's files, as a load reads them
        "GGUF|llama_model_load|error loading model|llama-server process",
        [
            ("(?i)unknown .*architecture", "ollama_too_old", "update Ollama"),
            ("(?i)out of memory|allocate|more system memory", "out_of_memory", SMALLER),
            ("GGUF|load", "model_damaged", VERIFY),
        ],
    ),
    (
        "",  # Ollama itself
        [
            ("invalid model name|name .* is invalid|not both", "bad_model_name", CHECK_NAME),
            ("MLX", "mlx_missing", NO_MLX),
            ("not found", "model_not_found", CHECK_NAME),
            ("newer version of Ollama", "ollama_too_old", "update Ollama"),
            ("(?i)out of memory|more system memory", "out_of_memory", SMALLER),
            (
                "context canceled|max retries exceeded|unexpected EOF|broken pipe",
                "pull_interrupted",
                GOES_ON,
            ),
        ],
    ),
]
# The whole text of an error that a file's content gives, with no word about the file.
_CONTENT = re.compile(rf"(?:unexpected )?EOF|(?:{_JSON}).*")
_QUOTED = re.compile(r'"[a-z]+://[^"]*"')
_ADDRESS = re.compile(r"\b([a-z][a-z0-9+]*://)(?:[^\s\"'/?#@]*@)?([^\s\"'?#]*)[^\s\"']*")
_TAG = re.compile(r"</?[A-Za-z!?][^>]*>")


def failure(message: object, pull: bool = False) -> ServiceError:
    """Turn an error text, of a ``pull`` or anything else, into an error with advice."""
    text, words = clean(message), _QUOTED.sub('""', str(message))
    if _CONTENT.fullmatch(words):
        if pull:
            words = f"The record of a part is damaged ({text}): {PURGE}."
            return ServiceError("parts_damaged", words)
        return ServiceError("model_damaged", f"A file of it is damaged ({text}): {VERIFY}.")
    places = [FILE_SYSTEM, *(REGISTRY if pull else ()), *HERE]
    rows = next(rows for place, rows in places if re.search(place, words))
    for pattern, code, advice in rows:
        if re.search(pattern, words):
            return KINDS.get(code, ServiceError)(code, f"{text}: {advice}.")
    return ServiceError("ollama_error", f"Ollama says: {text}. Its log may tell more.")


@contextlib.contextmanager
def file_errors() -> typing.Iterator[None]:
    """Turn what the file system refuses into a ServiceError with advice."""
    try:
        yield
    except OSError as e:
        raise failure(e) from e


def clean(text: object) -> str:
    """Keep a text to one short printable line, without secrets in addresses."""
    shown = _TAG.sub(" ", _ADDRESS.sub(r"\1\2", str(text)))
    shown = re.sub(r"[^\x20-\x7e\u00a0-\ud7ff]|\s+", " ", shown).strip()
    if len(shown) > TEXT_LIMIT:  # the reason stands at the end
        shown = f"{shown[:100]} … {shown[103 - TEXT_LIMIT :]}"
    return shown.rstrip(" .:")
