"""URLs of places in object storage: s3://BUCKET/PREFIX, and gs:// and az:// in the same way."""

from __future__ import annotations

import re

from hpo.errors import SpecError

#: Scheme -> the environment variables that its credentials usually come from. No other source is offered.
CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and AWS_ENDPOINT_URL",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
PLACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}(/[A-Za-z0-9._=+-]+)*/?")
GRAMMAR = "write s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or az://CONTAINER/PREFIX, of letters, digits and . _ - = +"


def is_url(text: str) -> bool:
    """Return whether a text is a URL and not the path of a folder."""
    return SCHEME.match(text) is not None


def check(text: str, path: str) -> None:
    """Raise SpecError for a URL that names no place in object storage, or that holds credentials. It shows none of them.

    Args:
        text: the URL.
        path: what holds it: a key or an environment variable.
    """
    match = SCHEME.match(text)
    assert match is not None
    scheme, rest = match[1], text[match.end() :]
    if scheme not in CREDENTIALS:
        raise SpecError(f"{path}: {scheme}:// is not a place for checkpoints; give a folder, or {GRAMMAR}")
    if re.search("[@?#%:]", rest):
        raise SpecError(
            f"{path}: the {scheme}:// URL has more than a bucket and a prefix, perhaps credentials, so it is not shown; "
            f"{GRAMMAR}. Credentials come from the environment: {CREDENTIALS[scheme]}"
        )
    if not PLACE.fullmatch(rest) or {".", ".."} & set(rest.split("/")):
        raise SpecError(f"{path} = {text!r}: is not a place in object storage; {GRAMMAR}")
