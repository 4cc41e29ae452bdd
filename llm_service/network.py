"""Questions to other machines, bounded in time and size.

Proxies and certificate authorities come from an environment as Go takes them, and so Ollama. Names
in brackets are Go's functions whose rule a line follows.
"""

import base64
import contextlib
import http.client
import ipaddress
import os
import re
import socket
import ssl
import threading
import time
import typing
import urllib.parse

from llm_service.errors import (
    CHECK_DNS,
    CHECK_NETWORK,
    CLOCK,
    INSECURE,
    NO_MANIFEST,
    OTHER_NAME,
    OWN_AUTHORITY,
    ServiceError,
    Unreachable,
    clean,
)

Environment = typing.Mapping[str, str]
Url = urllib.parse.SplitResult

CONNECT_S = 5
ANSWER_LIMIT_BYTES = 1 << 22
PORTS = {"http": 80, "https": 443}
CHECK_PROXY = "check HTTPS_PROXY and NO_PROXY, and what the proxy allows"
CERTIFICATE_ERRORS = {9: CLOCK, 10: CLOCK, 62: OTHER_NAME, 64: OTHER_NAME}  # of OpenSSL
# [x509.loadSystemRoots]: the first of these files that is there, and all files of these folders
CERTIFICATE_FILES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/pki/tls/cacert.pem",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ssl/cert.pem",
)
CERTIFICATE_FOLDERS = "/etc/ssl/certs:/etc/pki/tls/certs"
_NETWORK = re.compile(r"[0-9a-f.:]+/\d+")
_HOST_PORT = re.compile(r"(?:\[(?P<address>.*)\]|(?P<name>[^:]*)):(?P<port>[^:]*)")
_CERTIFICATE = re.compile(
    rb"-----BEGIN CERTIFICATE-----\s.*?-----END CERTIFICATE-----",
    re.DOTALL,
)


class Answer(typing.NamedTuple):
    """A whole answer."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes


class Conversation:
    """Questions one after the other, for ``limit_s`` in all: then the connection is broken.

    The timeout of a socket is for each byte only.
    """

    def __init__(self, environment: Environment, context: ssl.SSLContext, limit_s: float):
        self._environment, self._context = environment, context
        self._deadline = time.monotonic() + limit_s
        self._timer = threading.Timer(limit_s, self._break)
        self._timer.daemon = True
        self._connection: http.client.HTTPConnection | None = None
        self._socket: socket.socket | None = None  # a connection may forget it while it is read
        self._is_over = False

    def __enter__(self) -> "Conversation":
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def get(self, url: Url, headers: dict[str, str]) -> Answer:
        """Return the answer to a GET request, redirects too. Raises ServiceError."""
        proxy = None
        try:
            proxy = proxy_for(url, self._environment)
            with contextlib.closing(self._connect(url, proxy)) as connection:
                target = url._replace(fragment="")
                if proxy and url.scheme == "http":
                    headers = {**headers, **proxy_headers(proxy)}
                else:
                    target = target._replace(scheme="", netloc="")
                connection.request("GET", target.geturl(), headers=headers)
                with connection.getresponse() as response:
                    return self._read(response)
        except (OSError, http.client.HTTPException, ValueError) as e:
            raise self._failure(e, proxy) from e

    def _connect(self, url: Url, proxy: Url | None) -> http.client.HTTPConnection:
        place = proxy or url
        host, port = place.hostname or "", place.port or PORTS[place.scheme]
        timeout_s = max(0.1, min(CONNECT_S, self._deadline - time.monotonic()))
        connection = http.client.HTTPConnection(host, port, timeout_s)
        if url.scheme == "https":
            connection = http.client.HTTPSConnection(
                host,
                port,
                timeout=timeout_s,
                context=self._context,
            )
        if proxy and url.scheme == "https":
            aim = url.hostname or "", url.port or PORTS["https"]
            connection.set_tunnel(*aim, proxy_headers(proxy))
        self._connection = connection
        connection.connect()
        self._socket = connection.sock
        if self._is_over:
            connection.close()
            raise TimeoutError
        return connection

    def _read(self, response: http.client.HTTPResponse) -> Answer:
        body = response.read(ANSWER_LIMIT_BYTES + 1)
        if self._is_over:
            raise TimeoutError
        if len(body) > ANSWER_LIMIT_BYTES:
            raise ServiceError(
                "registry_error",
                f"The registry's answer is larger than {ANSWER_LIMIT_BYTES >> 20} MiB, as no "
                "manifest is: check the registry's name.",
            )
        if response.length:
            raise http.client.IncompleteRead(body)
        return Answer(response.status, response.headers, body)

    def _break(self) -> None:
        self._is_over = True
        for opened in (self._socket, self._connection and self._connection.sock):
            if opened:
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(opened, socket.SHUT_RDWR)

    def _failure(self, error: Exception, proxy: Url | None) -> ServiceError:
        """Turn what the network refuses into a ServiceError with advice."""
        words = clean(error) or type(error).__name__
        if self._is_over or isinstance(error, TimeoutError):
            words = "The registry did not answer in time"
        elif isinstance(error, ssl.SSLCertVerificationError):
            advice = CERTIFICATE_ERRORS.get(error.verify_code, OWN_AUTHORITY)
            return ServiceError("registry_certificate", f"{words}: {advice}.")
        elif isinstance(error, ssl.SSLError):
            return ServiceError("registry_insecure", f"{words}: {INSECURE}.")
        elif isinstance(error, socket.gaierror):
            return Unreachable("registry_unreachable", f"{words}: {CHECK_DNS}.")
        elif not isinstance(error, OSError):
            return ServiceError("registry_error", f"{words}: {NO_MANIFEST}.")
        if proxy:
            return ServiceError("proxy_error", f"{words}: {CHECK_PROXY}.")
        return Unreachable("registry_unreachable", f"{words}: {CHECK_NETWORK}.")


def tls_context(environment: Environment) -> ssl.SSLContext:
    """Return a client's context that trusts whom Ollama trusts."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    own = environment.get("SSL_CERT_FILE")
    files = (own,) if own else CERTIFICATE_FILES
    found = set(next(filter(None, map(_certificates, files)), ()))
    for folder in (environment.get("SSL_CERT_DIR") or CERTIFICATE_FOLDERS).split(":"):
        with contextlib.suppress(OSError):
            for name in os.listdir(folder):
                found.update(_certificates(os.path.join(folder, name)))
    for certificate in found:
        with contextlib.suppress(ssl.SSLError, ValueError):  # one that is damaged helps nobody
            context.load_verify_locations(cadata=certificate.decode())
    return context


def _certificates(path: str) -> list[bytes]:
    try:
        with open(path, "rb") as file:
            return _CERTIFICATE.findall(file.read())
    except OSError:
        return []


def proxy_for(url: Url, environment: Environment) -> Url | None:
    """Return the proxy by which a URL is asked; None for none. [httpproxy.ProxyFunc]"""
    proxy = _setting(environment, f"{url.scheme}_proxy")
    host, port = url.hostname or "", url.port or PORTS[url.scheme]
    if not proxy or _bypasses(host, port, environment):
        return None
    with contextlib.suppress(ValueError):
        return _parse_proxy(proxy)
    raise ServiceError(
        "proxy_error",
        f"A proxy such as {clean(proxy)} is not asked by this service, though Ollama may ask it.",
    )


def _parse_proxy(proxy: str) -> Url:
    parts = urllib.parse.urlsplit(proxy)
    if not parts.scheme or not parts.netloc:
        parts = urllib.parse.urlsplit(f"http://{proxy}")
    if parts.scheme != "http" or not parts.hostname or parts.port == 0:
        raise ValueError("It is no HTTP proxy")
    return parts


def proxy_headers(proxy: Url) -> dict[str, str]:
    """Return the header with the name and password in a proxy's address."""
    if proxy.username is None:
        return {}
    parts = map(urllib.parse.unquote, (proxy.username, proxy.password or ""))
    word = base64.b64encode(":".join(parts).encode()).decode()
    return {"Proxy-Authorization": f"Basic {word}"}


def _setting(environment: Environment, name: str) -> str:
    return environment.get(name.upper()) or environment.get(name) or ""


def _bypasses(host: str, port: int, environment: Environment) -> bool:
    """Tell whether a host is asked without a proxy. [httpproxy.useProxy]"""
    address = _address(host)
    if host == "localhost" or (address and address.is_loopback):
        return True
    entries = _setting(environment, "no_proxy").lower().split(",")
    return any(_covers(entry.strip(), host, address, port) for entry in entries)


def _covers(entry: str, host: str, address: typing.Any, port: int) -> bool:
    """Tell whether an entry of NO_PROXY is about a host. [httpproxy.config.init]"""
    if entry == "*":
        return True
    if _NETWORK.fullmatch(entry):
        with contextlib.suppress(ValueError):
            return bool(address) and address in ipaddress.ip_network(entry, strict=False)
    parts = _HOST_PORT.fullmatch(entry)
    if parts:
        if parts["port"] not in ("", str(port)):
            return False
        entry = parts["address"] or parts["name"] or ""
    if address:
        return address == _address(entry)
    return _is_within(host, entry)


def _is_within(host: str, domain: str) -> bool:
    """Tell whether a name is in a domain; only one without a leading dot is in itself."""
    name = domain.removeprefix("*") if domain.startswith("*.") else domain
    if not name or host == name:
        return bool(name)
    return host.endswith("." + name.removeprefix("."))


def _address(text: str) -> typing.Any:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None
