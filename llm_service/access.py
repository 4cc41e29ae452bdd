"""Which host names and origins are no foreign web page's, and what browsers are told."""

import ipaddress
import typing
import urllib.parse

# Names that no public registry gives
PRIVATE_NAMES = (".local", ".internal", ".localhost", ".lan", ".home.arpa", ".intranet")
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'"
)
SAFE_HEADERS = {
    "Vary": "Origin",
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": CSP,
}
CORS_HEADERS = {
    "Access-Control-Allow-Methods": "GET, POST, DELETE, OPTIONS",
    "Access-Control-Allow-Headers": "Authorization, Content-Type",
    "Access-Control-Expose-Headers": "Retry-After",
    "Access-Control-Max-Age": "600",
}


def host_allowed(host: str, allowed: typing.Container[str]) -> bool:
    """Tell a name that only this machine or its network gives from one of the web."""
    try:
        name = (urllib.parse.urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return False
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        return "." not in name or name.endswith(PRIVATE_NAMES) or name in allowed


def short_origin(origin: str) -> str:
    """Return an origin in lower case and without its scheme's default port."""
    scheme, separator, host = origin.lower().partition("://")
    port = {"http": ":80", "https": ":443"}.get(scheme)
    if port:
        host = host.removesuffix(port)
    return f"{scheme}{separator}{host}"
