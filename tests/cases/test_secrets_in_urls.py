"""No secret of a storage URL is printed, wherever in the URL it stands, and whoever repeats it."""

from __future__ import annotations

import pytest

from hpo.storage.connect import connect, parse_url
from hpo.storage.redaction import redacted_message, redacted_text, redacted_url

SECRET = "hunter2xyz"
#: A URL with the secret in it -> how it is shown.
URLS = {
    f"postgresql://u:{SECRET}@h:5/d": "postgresql+psycopg://u:***@h:5/d",
    "postgresql://u:p%40hunter2xyz@h/d": "postgresql+psycopg://u:***@h/d",
    f"postgresql://u%3A{SECRET}@h/d": "postgresql+psycopg://***@h/d",
    f"postgresql://u:a/{SECRET}@h/d": "postgresql+psycopg://u:***@h/d",
    f"postgresql://u:a?{SECRET}@h/d": "postgresql+psycopg://u:***@h/d",
    f"postgresql://u:a#{SECRET}@h/d": "postgresql+psycopg://u:***@h/d",
    f"postgresql://h/d?password={SECRET}": "postgresql+psycopg://h/d?password=***",
    f"postgresql://h/d?PASSWORD={SECRET}": "postgresql+psycopg://h/d?***=***",
    f"postgresql://h/d?%70assword={SECRET}": "postgresql+psycopg://h/d?password=***",
    f"postgresql://h/d?sslpassword={SECRET}": "postgresql+psycopg://h/d?sslpassword=***",
    f"postgresql://h/d?options=-c%20a={SECRET}": "postgresql+psycopg://h/d?options=***",
    f"postgresql://h/d?passfile=/x/{SECRET}": "postgresql+psycopg://h/d?passfile=***",
    f"postgresql://h/d?service={SECRET}": "postgresql+psycopg://h/d?service=***",
    f"postgresql://h/d?password=a&{SECRET}=b": "postgresql+psycopg://h/d?***=***&password=***",
    f"postgresql://h/d?port={SECRET}": "postgresql+psycopg://h/d?port=***",
    f"postgresql:///d?host=u:{SECRET}@h": "postgresql+psycopg:///d?host=***",
    f"postgresql:///d?host=h1&host=u:{SECRET}@h": "postgresql+psycopg:///d?host=***",
    f"postgresql://h/d%3Fpassword%3D{SECRET}": "postgresql+psycopg://h/***",
    f"postgresql://h/host=x password={SECRET}": "postgresql+psycopg://h/***",
    f"postgresql://h/d;password={SECRET}": "postgresql+psycopg://h/***",
    f"postgresql://h/d#{SECRET}": "postgresql+psycopg://h/***",
}
HARMLESS = [
    "postgresql+psycopg://u@h:5432/d",
    "postgresql+psycopg://h/my_db-2.x?connect_timeout=2&sslmode=verify-full",
    "postgresql+psycopg://u@/d?host=%2Ftmp%2Fmy-socket",
    "postgresql+psycopg:///d?host=h1%3A5432&host=h2%3A5433&target_session_attrs=read-write",
    "postgresql+psycopg://[::1]:5/d",
]


@pytest.mark.parametrize("url", URLS)
def test_a_url_is_shown_without_its_secret(url: str) -> None:
    parsed = parse_url(url)
    assert redacted_url(parsed) == URLS[url]
    assert SECRET in parsed.render_as_string(hide_password=False)


@pytest.mark.parametrize("url", HARMLESS)
def test_what_is_no_secret_is_shown_whole(url: str) -> None:
    assert redacted_url(parse_url(url)) == url


@pytest.mark.parametrize(
    "given",
    [
        f"u:{SECRET}@h", f"postgresql:u:{SECRET}@h", f"postgresql//u:{SECRET}@h/d", f"host=h password={SECRET}",
        f"password: {SECRET}", f"jdbc:postgresql://h/d?password={SECRET}", f" postgresql://u:{SECRET}@h/d",
        f"postgresql://u:p@h1,u:{SECRET}@h2/d", f"postgresql://u:{SECRET}@h:port/d", f"sqlite:u:{SECRET}@h",
        f"postgresql%3A//u%3A{SECRET}@h/d", SECRET, f"{SECRET}.123456", f" {SECRET} ", f"my {SECRET}", f"sqlite:{SECRET}",
        f"{SECRET}.", f".{SECRET}",
    ],
)  # fmt: skip
def test_what_is_no_url_is_shown_without_what_may_be_a_secret(given: str) -> None:
    assert SECRET not in redacted_text(given)
    with pytest.raises(Exception, match="is no database URL") as caught:
        parse_url(given)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "given",
    [
        "studies.db",
        "./my files/studies.db",
        "my.sqlite3",
        "runs/studies",
        "sqlite:/studies.db",
        "sqlite:studies.db",
        "",
    ],
)
def test_a_file_that_is_no_url_is_shown(given: str) -> None:
    assert redacted_text(given) == given


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql:///d?host=u:{SECRET}@127.0.0.1:1",  # the resolver repeats the host
        f"postgresql://127.0.0.1:1/d?service={SECRET}",  # libpq repeats the service
        f"postgresql://127.0.0.1:1/d?{SECRET}=1",  # and options that it does not know
        f"postgresql://127.0.0.1:1/d?sslmode={SECRET}",  # and wrong values
        f"postgresql://127.0.0.1:1/d?port={SECRET}",  # SQLAlchemy repeats the port
    ],
)
def test_a_driver_that_repeats_the_url_is_not_repeated(url: str) -> None:
    with pytest.raises(Exception, match=r"\*\*\*") as caught:
        connect(url)
    assert SECRET not in str(caught.value)


def test_what_a_driver_says_loses_urls_and_passwords() -> None:
    said = f'cannot open "postgresql://u:{SECRET}@h/d" (password={SECRET}, Password: {SECRET} ): FATAL'
    assert redacted_message(said) == 'cannot open "postgresql://***" (password=***, Password: *** ): FATAL'
    url = parse_url("postgresql://u:a%20b+c@h/d")
    assert redacted_message("no a b+c, no a%20b%2Bc, no cab", url) == "no ***, no ***, no cab"
    short = parse_url("postgresql://u:a@h/d")
    assert redacted_message("a bad 'a' at last", short) == "*** bad '***' at last"
