"""What a registry says of a model's manifest, asked by the rules of Ollama 0.34.

Names in brackets are Ollama's functions whose rule a line follows. Nobody logs in: no key, no
password and no cookie is sent.
"""

import contextlib
import hashlib
import json
import re
import typing
import urllib.parse

from llm_service.errors import BLOCKED_REDIRECT, LOGIN, NO_MANIFEST, ServiceError, clean
from llm_service.network import (
    CHECK_PROXY,
    PORTS,
    Answer,
    Conversation,
    Environment,
    Url,
    tls_context,
)

REDIRECTS = 10
MANIFEST_TYPE = "application/vnd.docker.distribution.manifest.v2+json"
_OWNED = re.compile(r"(.*\.)?(ollama\.com|ollama\.ai|hf\.co|huggingface\.co)")
# What a status of a registry's means: code, and what to do.
REFUSALS = {
    401: ("registry_denied", LOGIN),
    403: ("registry_denied", LOGIN),
    404: ("model_not_found", "it does not know this name"),
    407: ("proxy_error", CHECK_PROXY),
    410: ("model_not_found", "it does not know this name any more"),
    412: ("ollama_too_old", "update Ollama"),
    429: ("registry_busy", "it limits requests: try again in some minutes"),
}
REDIRECTIONS = (301, 302, 303, 307, 308)


class Registries:
    """Asks registries, with the proxies and certificate authorities of an environment."""

    def __init__(self, environment: Environment, agent: typing.Callable[[], str]):
        """``agent()`` returns the name by which a registry is asked."""
        self._environment = environment
        self._agent = agent

    def asking(self, insecure: bool = False) -> "Asking":
        """Return what asks, with the authorities as they are now; ``insecure``: without TLS."""
        return Asking(
            self._environment,
            self._agent(),
            insecure,
        )


class Asking:
    """Asks registries from any number of threads."""

    def __init__(self, environment: Environment, agent: str, insecure: bool):
        self._environment = environment
        self._context = tls_context(environment)
        self._insecure = insecure
        self._agent = agent

    def manifest(self, host: str, path: str, tag: str, limit_s: float) -> bytes:
        """Return a model's manifest, as its registry has it. Raises ServiceError."""
        scheme = "http" if self._insecure else "https"
        url = parse(f"{scheme}://{host}/v2/{path}/manifests/{tag}")
        with Conversation(self._environment, self._context, limit_s) as conversation:
            return Dialogue(conversation, self._agent, self._insecure).manifest(url)


class Dialogue:
    """What is said to one registry for one manifest."""

    def __init__(self, conversation: Conversation, agent: str, insecure: bool):
        self._conversation = conversation
        self._insecure = insecure
        self._headers = {"User-Agent": agent, "Accept": MANIFEST_TYPE}

    def manifest(self, url: Url) -> bytes:
        """Return a manifest. [server.pullModelManifest, makeRequestWithRetry]"""
        answer = self._get(url)
        if answer.status == 401:
            challenge = answer.headers.get("WWW-Authenticate", "")
            token = self._token(url, challenge)
            answer = self._get(url, token)
        if answer.status != 200:
            raise refusal(answer.status)
        self._check_digest(answer)
        return answer.body

    def _check_digest(self, answer: Answer) -> None:
        said = answer.headers.get("Docker-Content-Digest")
        digest = hashlib.sha256(answer.body).hexdigest()
        if said and said != f"sha256:{digest}":
            raise ServiceError(
                "registry_error",
                "The registry's manifest has another digest than it says: ask who runs it.",
            )

    def _token(self, url: Url, challenge: str) -> str:
        """Return the token that a registry gives to anybody. [server.getAuthorizationToken]"""
        fields = dict(re.findall(r'(realm|service|scope)="([^"]*)"', challenge))
        realm = parse(fields.get("realm", ""))
        if not same_site(realm, url):
            raise refusal(401)
        query = urllib.parse.parse_qsl(realm.query)
        query.append(("service", fields.get("service", "")))
        for scope in fields.get("scope", "").split(" "):
            query.append(("scope", scope))
        text = urllib.parse.urlencode(query)
        answer = self._get(realm._replace(query=text))
        token: typing.Any = None
        with contextlib.suppress(ValueError, RecursionError, AttributeError):
            token = json.loads(answer.body).get("token")
        is_token = isinstance(token, str) and re.fullmatch("[!-~]+", token)
        if answer.status != 200 or not is_token:
            raise refusal(401)
        return token

    def _get(self, url: Url, token: str | None = None) -> Answer:
        """Ask, and follow redirects; a token goes to its own host alone. [server.makeRequest]"""
        target = url
        for _ in range(REDIRECTS + 1):
            headers = dict(self._headers)
            if token and same_site(target, url):
                headers["Authorization"] = f"Bearer {token}"
            answer = self._conversation.get(target, headers)
            location = answer.headers.get("Location")
            if answer.status not in REDIRECTIONS or not location:
                return answer
            target = parse(urllib.parse.urljoin(target.geturl(), location))
            if not self._may_redirect(url, target):
                raise ServiceError(
                    "registry_redirect",
                    f"It redirects: {BLOCKED_REDIRECT}.",
                )
        raise ServiceError(
            "registry_redirect",
            "Its redirects lead nowhere: ask who runs it.",
        )

    def _may_redirect(self, url: Url, target: Url) -> bool:
        """Tell whether Ollama follows a redirect; it never goes from TLS to none."""
        if self._insecure:
            return target.scheme in PORTS
        if target.scheme != "https":
            return False
        hosts = (url.hostname or "", target.hostname or "")
        owned = all(map(_OWNED.fullmatch, hosts))
        return owned or target.netloc == url.netloc


def parse(address: str) -> Url:
    """Split an address. Raises ServiceError."""
    try:
        return urllib.parse.urlsplit(address)
    except ValueError as e:
        raise ServiceError("registry_error", f"The registry names no address: {clean(e)}.") from e


def refusal(status: int) -> ServiceError:
    """Turn a status that is no success into a ServiceError with advice."""
    code, advice = REFUSALS.get(status, ("registry_refused", "check the name and the tag"))
    if status >= 500:
        code, advice = "registry_error", "the registry fails: try again later"
    elif status < 400:
        code, advice = "registry_error", NO_MANIFEST
    return ServiceError(code, f"The registry answers {status}: {advice}.")


def same_site(one: Url, other: Url) -> bool:
    """Tell whether two addresses have scheme, host and port in common."""
    return (one.scheme, one.netloc) == (other.scheme, other.netloc)
