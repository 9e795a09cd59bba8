"""The dashboard sends what OWASP asks of an administration page; pages of other sites cannot frame it, post to it or read it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults

import pytest

from hpo.storage.connect import Storage
from hpo.view import dashboard, guard
from tests.support.trials import make

#: https://github.com/OWASP/www-project-secure-headers, ci/headers_add.json of 2026-07-19; without Clear-Site-Data, which is
#: for a logout, and without what holds over TLS alone.
POLICY = (
    "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; form-action 'self'; "
    "base-uri 'self'; object-src 'none'; frame-ancestors 'none'"
)
EXPECTED = {
    "Cache-Control": "no-store, max-age=0",
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-DNS-Prefetch-Control": "off",
    "X-Frame-Options": "deny",
    "X-Permitted-Cross-Domain-Policies": "none",
}
PERMISSIONS = {
    "accelerometer=()", "autoplay=()", "camera=()", "cross-origin-isolated=()", "display-capture=()", "encrypted-media=()",
    "fullscreen=()", "geolocation=()", "gyroscope=()", "keyboard-map=()", "magnetometer=()", "microphone=()", "midi=()",
    "payment=()", "picture-in-picture=()", "publickey-credentials-get=()", "screen-wake-lock=()", "sync-xhr=(self)", "usb=()",
    "web-share=()", "xr-spatial-tracking=()", "clipboard-read=()", "clipboard-write=()", "gamepad=()", "hid=()",
    "idle-detection=()", "interest-cohort=()", "serial=()", "unload=()",
}  # fmt: skip
HOST = "127.0.0.1:8080"


class Browser:
    """Asks a dashboard as a browser does."""

    def __init__(self, place: Storage, *, write: bool) -> None:
        self.app = dashboard.app(place, write)

    def __call__(self, method: str, path: str, body: Any = None, **environ: str) -> tuple[int, dict[str, str], bytes]:
        sent = b"" if body is None else json.dumps(body).encode()
        asked: dict[str, Any] = {
            "REQUEST_METHOD": method,
            "PATH_INFO": path,
            "HTTP_HOST": HOST,
            "wsgi.input": io.BytesIO(sent),
        }
        asked |= {"CONTENT_LENGTH": str(len(sent)), "CONTENT_TYPE": "application/json", **environ}
        setup_testing_defaults(asked)
        told: list[tuple[str, list[tuple[str, str]]]] = []
        answer = self.app(asked, lambda status, headers, *_: told.append((status, headers)))
        found = b"".join(answer)
        getattr(answer, "close", lambda: None)()
        status, headers = told[0]
        assert len({name.lower() for name, _ in headers}) == len(headers)
        return int(status.split()[0]), dict(headers), found


@pytest.fixture
def writable(lite: Storage, tmp_path: Path) -> Browser:
    make(lite, tmp_path).optuna.ask()
    return Browser(lite, write=True)


PATHS = [
    "/",
    "/dashboard",
    "/api/studies",
    "/api/studies/1",
    "/api/studies/9",
    "/csv/1",
    "/static/bundle.js",
    "/nothing",
]


def test_every_answer_has_the_headers(writable: Browser) -> None:
    for path in PATHS:
        _, headers, _ = writable("GET", path)
        assert {name: headers.get(name) for name in EXPECTED} == EXPECTED, path
        assert set(headers["Permissions-Policy"].split(", ")) == PERMISSIONS
        assert [name for name in headers if name.lower().startswith("access-control-") or name == "Server"] == []
    status, headers, _ = writable("GET", "/api/studies", HTTP_HOST="evil.example")
    assert (status, {name: headers.get(name) for name in EXPECTED}) == (403, EXPECTED)


def test_a_header_of_the_application_s_own_is_replaced_however_it_is_written() -> None:
    named = [*guard.HEADERS, *guard.OVER_TLS]

    def app(_environ: Any, start: Any) -> list[bytes]:
        start("200 OK", [(spelt(name), "theirs") for name in named for spelt in (str, str.lower, str.upper)])
        return []

    told: list[tuple[str, str]] = []
    asked = {"REQUEST_METHOD": "GET", "HTTP_HOST": HOST}
    list(guard.guarded(app, write=False)(asked, lambda _status, headers: told.extend(headers)))
    assert told == list(guard.HEADERS.items())


@pytest.mark.parametrize(
    "host",
    ["evil.example@127.0.0.1", "@127.0.0.1", "127.0.0.1/@evil.example", "127.0.0.1?evil", "127.0.0.1#evil", "127.0.0.1\t", ""],
)  # fmt: skip
def test_a_host_is_a_host_alone(host: str, writable: Browser) -> None:
    assert writable("GET", "/api/studies", HTTP_HOST=host)[0] == 403


def test_head_is_answered_as_get_without_a_body(lite: Storage) -> None:
    readable = Browser(lite, write=False)
    assert readable("HEAD", "/api/studies")[::2] == (200, b"")
    assert readable("HEAD", "/api/studies", HTTP_HOST="evil.example")[::2] == (403, b"")
    assert readable("HEAD", "/api/studies", HTTP_SEC_FETCH_SITE="cross-site")[::2] == (403, b"")


def test_over_tls_browsers_are_told_to_stay_there(writable: Browser) -> None:
    plain, secure = (writable("GET", "/api/studies", **{"wsgi.url_scheme": scheme})[1] for scheme in ("http", "https"))
    assert "Strict-Transport-Security" not in plain
    assert secure["Strict-Transport-Security"] == "max-age=63072000; includeSubDomains"
    assert secure["Content-Security-Policy"] == f"{POLICY}; upgrade-insecure-requests"


def test_the_page_has_no_script_of_its_own_in_it(writable: Browser) -> None:
    """Else the policy would keep it from running."""
    _, _, page = writable("GET", "/dashboard")
    assert page.count(b"<script") == page.count(b'<script defer src="/static/bundle.js">') == 1
    assert b" onload=" not in page
    assert b"javascript:" not in page


TOLD = {"state": "Fail"}
FOREIGN = {
    "another origin": {"HTTP_ORIGIN": "https://evil.example"},
    "another port": {"HTTP_ORIGIN": "http://127.0.0.1:9999", "HTTP_SEC_FETCH_SITE": "same-site"},
    "another port, no origin": {"HTTP_SEC_FETCH_SITE": "same-site"},
    "a sandboxed frame": {"HTTP_ORIGIN": "null", "HTTP_SEC_FETCH_SITE": "cross-site"},
    "another site": {"HTTP_SEC_FETCH_SITE": "cross-site", "HTTP_SEC_FETCH_MODE": "cors"},
    "a prefix of ours": {"HTTP_ORIGIN": f"http://{HOST}.evil.example"},
    "ours as a user": {"HTTP_ORIGIN": f"http://{HOST}@evil.example"},
    "a broken origin": {"HTTP_ORIGIN": "http://[::1"},
    "a site unheard of": {"HTTP_SEC_FETCH_SITE": "new-kind"},
}


ASKED = {"POST": "/api/trials/1/tell", "DELETE": "/api/studies/1", "OPTIONS": "/api/studies", "GET": "/api/studies"}


@pytest.mark.parametrize("sender", FOREIGN)
def test_another_site_can_neither_post_nor_read(sender: str, writable: Browser) -> None:
    for method, path in ASKED.items():
        status, _, body = writable(method, path, TOLD, **FOREIGN[sender])
        assert (status, "may not read or change studies here" in json.loads(body)["reason"]) == (403, True), method
    assert json.loads(writable("GET", "/api/studies/1")[2])["trials"][0]["state"] == "Running"


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""]
)
def test_a_form_of_a_browser_that_does_not_say_from_where_is_refused(kind: str, writable: Browser) -> None:
    assert writable("POST", "/api/trials/1/tell", TOLD, CONTENT_TYPE=kind)[0] == 403


def test_a_link_from_another_site_opens_the_page_and_a_frame_does_not(writable: Browser) -> None:
    link = {"HTTP_SEC_FETCH_SITE": "cross-site", "HTTP_SEC_FETCH_MODE": "navigate"}
    assert writable("GET", "/dashboard", HTTP_SEC_FETCH_DEST="document", **link)[0] == 200
    for framed in ("iframe", "frame", "object", "embed"):
        assert writable("GET", "/dashboard", HTTP_SEC_FETCH_DEST=framed, **link)[0] == 403
    assert writable("POST", "/api/trials/1/tell", TOLD, HTTP_SEC_FETCH_DEST="document", **link)[0] == 403


@pytest.mark.parametrize(
    "sender",
    [
        {},
        {"HTTP_ORIGIN": f"http://{HOST}"},
        {
            "HTTP_ORIGIN": f"http://{HOST}",
            "HTTP_SEC_FETCH_SITE": "same-origin",
            "CONTENT_TYPE": "application/json; charset=x",
        },
    ],
)
def test_our_own_page_and_a_program_may_post(sender: dict[str, str], writable: Browser) -> None:
    assert writable("POST", "/api/trials/1/tell", TOLD, **sender)[0] == 204


def test_what_the_dashboard_says_of_its_failures_is_safe(capsys: pytest.CaptureFixture[str]) -> None:
    dashboard.ErrorLog().write("Traceback\nValueError: \x1b[2J\n")
    assert capsys.readouterr().err == "  Traceback\n  ValueError: \\x1b[2J\n"
