"""Hides the secrets in storage URLs and in drivers' messages.

A password may stand in many parts of a URL: as user, host, database or option. So only parts that are known to be
harmless are shown. All others become ***.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from urllib.parse import quote, quote_plus

from sqlalchemy.engine import URL

HIDDEN = "***"
WORD = re.compile(r"[\w.-]+")
PATH = re.compile(r"[\w.~ -]*(/[\w./~ -]*|\.[A-Za-z]{1,7}\d?)")  # has a slash, or ends like a file's name
HOST = re.compile(r"([\w.-]+|/[\w./-]*)(:\d+)?(,([\w.-]+|/[\w./-]*)(:\d+)?)*")
#: Option -> the values that are shown, None for no value. The names of other options are not shown.
OPTIONS = {
    **dict.fromkeys(("user", "dbname"), WORD),
    **dict.fromkeys(("host", "hostaddr"), HOST),
    **dict.fromkeys(("port", "connect_timeout"), re.compile(r"\d+(,\d+)*")),
    "sslmode": re.compile("disable|allow|prefer|require|verify-ca|verify-full"),
    "target_session_attrs": re.compile("any|read-write|read-only|primary|standby|prefer-standby"),
    "mode": re.compile("ro|rw|rwc|memory"),
    **dict.fromkeys(("password", "sslpassword", "passfile", "options", "service", "sslcert", "sslkey"), None),
}
OF_A_USER = re.compile(r"((?:(?:postgres(?:ql)?|mysql|sqlite)(?:\+\w+)?:(?://)?)?[\w.-]+):.*@([\w.:/-]*)")
SETTING = re.compile(r"\s*(\w+)(\s*=\s*)('[^']*'|[^\s']+)")
IN_A_URL = re.compile(r"(\w[\w+.-]*://)[^\s'\"]+")
AFTER_A_WORD = re.compile(r"(?i)(pass\w*\s*[=:]\s*)('[^']*'|\"[^\"]*\"|[^\s&,;]+)")
SHORTEST_PART = 3  # characters; shorter parts of a secret are not looked for by themselves


def redacted_url(url: URL) -> str:
    """Return the URL with *** for its password and for all other parts that may hold a secret."""
    is_file = url.get_backend_name() == "sqlite"
    shown = URL.create(
        url.drivername,
        username=_shown(url.username, WORD),
        password=None if url.password is None else HIDDEN,
        host=url.host if _is_address(url.host) else _shown(url.host, HOST),
        port=url.port,
        database=url.database if is_file else _shown(url.database, WORD),
        query={key if key in OPTIONS else HIDDEN: _option(key, value) for key, value in url.query.items()},
    )
    return shown.render_as_string(hide_password=False).replace(quote(HIDDEN), HIDDEN)


def redacted_text(text: str) -> str:
    """Return a text that is not a URL without its secrets.

    A file's path is shown whole. A user with a host, and libpq's settings, are shown without their secrets. Any other
    text becomes ***, since a single word may be a password.
    """
    scheme, _, rest = text.partition(":")
    if PATH.fullmatch(text) or (scheme == "sqlite" and PATH.fullmatch(rest)):
        return text
    if found := OF_A_USER.fullmatch(text):
        return f"{found[1]}:{HIDDEN}@{found[2]}"
    settings = [found.groups() for found in SETTING.finditer(text)]
    names = [name.lower().removeprefix("pg") for name, _, _ in settings]
    if SETTING.sub("", text) or not all(name in OPTIONS for name in names):
        return HIDDEN
    return " ".join(
        f"{word}{sign}{_option(name, value)}" for name, (word, sign, value) in zip(names, settings, strict=True)
    )


def redacted_message(message: str, url: URL | None = None) -> str:
    """Return a driver's message without URLs, passwords, and the hidden parts of this URL."""
    message = AFTER_A_WORD.sub(rf"\1{HIDDEN}", IN_A_URL.sub(rf"\1{HIDDEN}", message))
    for secret in sorted(set(_secrets(url)) if url else (), key=len, reverse=True):
        message = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", HIDDEN, message)
        if len(secret) > SHORTEST_PART:
            message = message.replace(secret, HIDDEN)
    return message


def _shown(part: str | None, harmless: re.Pattern[str]) -> str | None:
    return part if not part or harmless.fullmatch(part) else HIDDEN


def _option(key: str, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
    harmless = OPTIONS.get(key)
    values = [value] if isinstance(value, str) else value
    return value if harmless and all(map(harmless.fullmatch, values)) else HIDDEN


def _is_address(host: str | None) -> bool:
    try:
        ipaddress.ip_address(host or "")
    except ValueError:
        return False
    return True


def _secrets(url: URL) -> Iterator[str]:
    """Yield what `redacted_url` hides, whole and in parts, as it is and in URL encoding."""
    hidden = [url.password or ""]
    hidden += [part for part in (url.username, url.database) if part and not WORD.fullmatch(part)]
    hidden += [url.host] if url.host and not _is_address(url.host) and not HOST.fullmatch(url.host) else []
    for key, value in url.query.items():
        hidden += [] if key in OPTIONS else [key]
        hidden += [] if _option(key, value) == value else [value] if isinstance(value, str) else value
    for one in hidden:
        parts = [part for part in re.split(r"[\s=&:@,;'\"]+", one) if len(part) >= SHORTEST_PART]
        for secret in filter(None, (one, *parts)):
            yield from {secret, quote(secret, safe=""), quote_plus(secret)}
