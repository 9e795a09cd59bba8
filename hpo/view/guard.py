"""Access control of the dashboard, and the security headers of its pages.

The dashboard has no login. Anybody who can reach the address may read, and with `--write` change. Pages of other sites in a
user's browser are kept out: they cannot frame the dashboard, post to it or read from it.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Collection, Iterable
from typing import Any
from urllib.parse import SplitResult, urlsplit

from hpo.view.compressed import App, Environ, Headers, StartResponse

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
ANY_ADDRESS = frozenset({"0.0.0.0", "::"})
OWN_PAGES = ("same-origin", "none")  # values of Sec-Fetch-Site: our own page, or an address typed by a person
NOT_ALLOWED = (
    "accelerometer autoplay camera cross-origin-isolated display-capture encrypted-media fullscreen geolocation gyroscope "
    "keyboard-map magnetometer microphone midi payment picture-in-picture publickey-credentials-get screen-wake-lock usb "
    "web-share xr-spatial-tracking clipboard-read clipboard-write gamepad hid idle-detection interest-cohort serial unload"
)
#: The pages of optuna-dashboard set inline styles and draw charts into data and blob images.
POLICY = (
    "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; form-action 'self'; "
    "base-uri 'self'; object-src 'none'; frame-ancestors 'none'"
)
#: The list of the OWASP Secure Headers Project of July 2026, without Clear-Site-Data. That header is for a logout, which does
#: not exist here, and it would delete the cookies of all other programs on this host.
HEADERS = {
    "Cache-Control": "no-store, max-age=0",
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": ", ".join([*(f"{name}=()" for name in NOT_ALLOWED.split()), "sync-xhr=(self)"]),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-DNS-Prefetch-Control": "off",
    "X-Frame-Options": "deny",
    "X-Permitted-Cross-Domain-Policies": "none",
}
#: Only behind a TLS proxy. Over HTTP browsers ignore the first header, and the second would break the pages.
OVER_TLS = {
    "Strict-Transport-Security": "max-age=63072000; includeSubDomains",
    "Content-Security-Policy": f"{POLICY}; upgrade-insecure-requests",
}
OUR_NAMES = {name.lower() for name in HEADERS | OVER_TLS}


def guarded(app: App, write: bool, hosts: Collection[str] = ()) -> App:
    """Return a WSGI application that refuses forbidden requests and adds the security headers to every answer.

    Args:
        app: the application to protect.
        write: allow requests that change studies.
        hosts: host names and addresses to accept in addition to the loopback. An entry of ANY_ADDRESS accepts all numeric
            addresses; they are safe from DNS rebinding.
    """

    def answer(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        ours = HEADERS | (OVER_TLS if environ.get("wsgi.url_scheme") == "https" else {})

        def start(status: str, headers: Headers, *further: Any) -> Any:
            kept = [(name, value) for name, value in headers if name.lower() not in OUR_NAMES]
            return start_response(status, [*kept, *ours.items()], *further)

        reason = refusal(environ, write, hosts)
        if reason is None:
            return app(environ, start)
        body = json.dumps({"reason": reason}).encode()
        start("403 Forbidden", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]

    return answer


def refusal(environ: Environ, write: bool, hosts: Collection[str]) -> str | None:
    """Return why a request is refused, None if it is allowed."""
    host, method = environ.get("HTTP_HOST", ""), environ["REQUEST_METHOD"]
    asked = _split(f"//{host}")
    is_a_host = asked.netloc == host and "@" not in host  # without path, query or user
    if not is_a_host or not _is_ours(asked.hostname or "", hosts):
        return f"the dashboard is not served under the name {host!r}; open http://127.0.0.1 with its port"
    if (origin := environ.get("HTTP_ORIGIN")) is not None and _split(origin).netloc.lower() != host.lower():
        return f"a page of {origin} may not read or change studies here"
    site = environ.get("HTTP_SEC_FETCH_SITE")
    if site not in (None, *OWN_PAGES) and not _is_a_followed_link(environ):
        return "a page of another site may not read or change studies here"
    if method in ("GET", "HEAD"):
        return None
    if not write:
        return "the dashboard is read-only; `hpo dashboard --write` allows changes"
    # Current browsers send Origin or Sec-Fetch-Site with a form. An older one cannot send a form as JSON.
    if (
        method == "POST"
        and origin is site is None
        and environ.get("CONTENT_TYPE", "").split(";")[0] != "application/json"
    ):
        return "a change must be sent as application/json"
    return None


def _is_a_followed_link(environ: Environ) -> bool:
    """Return whether the request is a link that a person followed from another site, not a frame."""
    wanted = {"REQUEST_METHOD": "GET", "HTTP_SEC_FETCH_MODE": "navigate", "HTTP_SEC_FETCH_DEST": "document"}
    return all(environ.get(key) == value for key, value in wanted.items())


def _split(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError:  # brackets without an address
        return urlsplit("")


def _is_ours(name: str, hosts: Collection[str]) -> bool:
    return name in LOOPBACK or name in hosts or (not ANY_ADDRESS.isdisjoint(hosts) and is_address(name))


def is_address(name: str) -> bool:
    """Return whether a host name is a numeric IP address."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
