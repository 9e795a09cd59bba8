"""URLs of buckets: which are read, and that no message shows credentials."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpo.errors import SpecError
from hpo.spec import bucket_url
from hpo.spec.study_file import StudySpec
from tests.conftest import OWN_OBJECTIVE


@pytest.mark.parametrize(
    "url", ["s3://bucket", "s3://my-bucket.eu/a/b_c/d.e=1+2/", "gs://bucket/studies", "az://container/studies"]
)
def test_places_in_object_storage(url: str) -> None:
    assert bucket_url.is_url(url)
    bucket_url.check(url, "checkpoints")
    assert StudySpec.from_document({**OWN_OBJECTIVE, "checkpoints": url}).checkpoints == url


@pytest.mark.parametrize("path", ["folder", "/a/b", "C:/a", "s3:/bucket", "a//b", str(Path.cwd())])
def test_folders_are_no_urls(path: str) -> None:
    assert not bucket_url.is_url(path)


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("http://host/bucket", "http:// is not a place for checkpoints"),
        ("S3://bucket", "S3:// is not a place for checkpoints"),
        ("file:///tmp/c", "file:// is not a place for checkpoints"),
        ("s3://", "is not a place in object storage"),
        ("s3:///prefix", "is not a place in object storage"),
        ("s3://bucket//prefix", "is not a place in object storage"),
        ("s3://bucket/a b", "is not a place in object storage"),
        ("s3://bucket/../other", "is not a place in object storage"),
        ("s3://bucket/{trial}", "is not a place in object storage"),
    ],
)
def test_wrong_urls_are_refused_with_the_grammar(url: str, told: str) -> None:
    with pytest.raises(SpecError, match=told) as refused:
        StudySpec.from_document({**OWN_OBJECTIVE, "checkpoints": url})
    assert str(refused.value).startswith("checkpoints")
    assert "write s3://BUCKET/PREFIX" in str(refused.value)


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIAKEY:topsecret@bucket/prefix",
        "s3://topsecret@bucket",
        "az://container/prefix?sig=topsecret",
        "s3://bucket/prefix#topsecret",
        "s3://bucket/a%2Ftopsecret",
        "https://AKIAKEY:topsecret@host/bucket",
    ],
)
def test_credentials_in_a_url_are_refused_and_not_shown(url: str) -> None:
    with pytest.raises(SpecError) as refused:
        StudySpec.from_document({**OWN_OBJECTIVE, "checkpoints": url})
    assert "topsecret" not in str(refused.value)
    assert "AKIAKEY" not in str(refused.value)
