"""`postgres://` is `postgresql://`, as libpq has it and as hosts of databases print it."""

from __future__ import annotations

import pytest

from hpo.storage.connect import parse_url, plain_url


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg2", "postgres+psycopg"])
def test_every_spelling_is_the_same_place(scheme: str) -> None:
    url = parse_url(f"{scheme}://me:s3cret@db.example:5433/studies?sslmode=require")
    assert plain_url(url) == "postgresql+psycopg://me:s3cret@db.example:5433/studies?sslmode=require"
