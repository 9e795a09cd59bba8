"""Who may ask the dashboard for what, and what browsers are told about its pages.

The dashboard has no login. Whoever reaches the address may read, and with `--write` change. What is kept out are pages of
other sites in the browser of somebody who may: they cannot frame it, post to it or read from it.
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
OWN_PAGES = ("same-origin", "none")  # Sec-Fetch-Site: a page of ours, or a person who typed the address
NOT_ALLOWED = (
    "accelerometer autoplay camera cross-origin-isolated display-capture encrypted-media fullscreen geolocation gyroscope "
    "keyboard-map magnetometer microphone midi payment picture-in-picture publickey-credentials-get screen-wake-lock usb "
    "web-share xr-spatial-tracking clipboard-read clipboard-write gamepad hid idle-detection interest-cohort serial unload"
)
#: The pages style themselves as they run, and draw charts into images.
POLICY = (
    "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; form-action 'self'; "
    "base-uri 'self'; object-src 'none'; frame-ancestors 'none'"
)
#: The OWASP Secure Headers Project's list of July 2026. Clear-Site-Data is for a logout, and there is none; it would take the
#: cookies of every other program on this host.
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
#: Only behind a proxy that speaks TLS. Over HTTP browsers ignore the first, and the second would break the pages.
OVER_TLS = {
    "Strict-Transport-Security": "max-age=63072000; includeSubDomains",
    "Content-Security-Policy": f"{POLICY}; upgrade-insecure-requests",
}
OUR_NAMES = {name.lower() for name in HEADERS | OVER_TLS}


def guarded(app: App, write: bool, hosts: Collection[str] = ()) -> App:
    """Return a WSGI application that refuses what it should not be asked, and sends the headers with every answer.

    Args:
        write: let requests through that change studies.
        hosts: names and addresses it is served under besides those of the loopback; one of ANY_ADDRESS lets in every
            address in numbers, which no DNS name can stand behind.
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
    """Return why a request is refused, None if it is let in."""
    host, method = environ.get("HTTP_HOST", ""), environ["REQUEST_METHOD"]
    asked = _split(f"//{host}")
    is_a_host = asked.netloc == host and "@" not in host  # and no path, query or user beside it
    if not is_a_host or not _is_ours(asked.hostname or "", hosts):
        return f"the dashboard is not served under the name {host!r}; open it as http://127.0.0.1 with its port"
    if (origin := environ.get("HTTP_ORIGIN")) is not None and _split(origin).netloc.lower() != host.lower():
        return f"a page of {origin} may not change studies here, nor read them"
    site = environ.get("HTTP_SEC_FETCH_SITE")
    if site not in (None, *OWN_PAGES) and not _is_a_followed_link(environ):
        return "a page of another site may not change studies here, nor read them"
    if method in ("GET", "HEAD"):
        return None
    if not write:
        return "the dashboard is read-only; `hpo dashboard --write` lets changes in"
    # No browser of today sends a form without saying from where; one that does cannot send JSON so.
    if (
        method == "POST"
        and origin is site is None
        and environ.get("CONTENT_TYPE", "").split(";")[0] != "application/json"
    ):
        return "a change is sent as application/json"
    return None


def _is_a_followed_link(environ: Environ) -> bool:
    """Say whether a person comes here from another site's page, in a tab of its own rather than in a frame."""
    wanted = {"REQUEST_METHOD": "GET", "HTTP_SEC_FETCH_MODE": "navigate", "HTTP_SEC_FETCH_DEST": "document"}
    return all(environ.get(key) == value for key, value in wanted.items())


def _split(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError:  # brackets that hold no address
        return urlsplit("")


def _is_ours(name: str, hosts: Collection[str]) -> bool:
    return name in LOOPBACK or name in hosts or (not ANY_ADDRESS.isdisjoint(hosts) and is_address(name))


def is_address(name: str) -> bool:
    """Say whether a name of a host is an address in numbers."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
