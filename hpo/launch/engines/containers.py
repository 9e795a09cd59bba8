"""What workers in containers need of the machine that launches them: the storage's address, the code, the checkpoints."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from hpo.errors import LaunchError
from hpo.launch.engines.engine import Request
from hpo.storage.connect import parse_url
from hpo.storage.redaction import HIDDEN, redacted_url

LONGEST_NAME = 57  # a pod's host name is its Job's, a dash and the index; it has 63 characters at most
HERE = ("", "localhost", "127.0.0.1", "::1")  # hosts that are another machine within a container


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where containers run, for messages."""

    name: str  # such as "pods"
    section: str  # of the study file


def storage_of(request: Request, given: str | None, place: Place) -> str:
    """Return the URL of the storage for containers, without its password. Raises LaunchError if they cannot use it.

    Args:
        request: what is launched.
        given: `storage` of the engine's section, the URL as containers reach it.
        place: where they run.
    """
    url = parse_url(given or request.storage)
    mend = f'{place.section}.storage = "postgresql://USER@HOST/DATABASE"'
    if given and url.password:
        raise LaunchError(f"{place.section}.storage: holds a password, which would be shown; write it without: {mend}")
    if url.get_backend_name() == "sqlite":
        raise LaunchError(
            f"storage {redacted_url(url)}: {place.name} cannot use a SQLite file; name a Postgres, {mend}, or let one be "
            f"started: {place.section}.postgres = true"
        )
    bare = url.set(drivername="postgresql")._replace(password=None)  # `set` keeps what is None
    shown = redacted_url(bare)
    if HIDDEN in shown:
        raise LaunchError(f"storage {shown}: its URL may hold a secret; name one without it: {mend}")
    if (url.host or "") in HERE or (url.host or "").startswith("/"):
        raise LaunchError(
            f"storage {shown}: is this machine's own address, which {place.name} do not reach; name the one that they "
            f"reach: {mend}"
        )
    return shown


def own_code(request: Request, patterns: Sequence[str], key: str) -> Mapping[str, bytes]:
    """Return the files that a study needs beside an installed hpo, by their path below the study's folder.

    Args:
        request: what is launched.
        patterns: names and patterns of files.
        key: the key of the study file that holds the patterns, for messages.

    Raises LaunchError for a pattern without a file, if the study has code of its own.
    """
    found: dict[str, bytes] = {}
    folder = request.code_folder
    if request.making is not None:  # a container makes the study from it
        found[request.making.name] = request.making.read_bytes()
    if not request.needs_code:
        return found
    for pattern in patterns:
        files = (
            []
            if PurePosixPath(pattern).is_absolute()
            else sorted(file for file in folder.glob(pattern) if file.is_file())
        )
        if not files:
            raise LaunchError(
                f"{key} = {json.dumps(list(patterns))}: {pattern!r} fits no file in {folder}; name the files of the study's code"
            )
        found |= {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}
    return found


def refuse_hidden_folder(request: Request, mounted: Iterable[str], place: Place, mend: str) -> None:
    """Raise LaunchError if containers do not see the folder of checkpoints, or if it would go with the container.

    Args:
        request: what is launched.
        mounted: the paths in a container that outlast it.
        place: where they run.
        mend: the setting that mounts a folder, with a place {folder}.
    """
    given = request.checkpoints
    if given is None:
        raise LaunchError(
            f"checkpoints: not given, so they would lie in {place.name} and go with them; write checkpoints = "
            '"s3://BUCKET/PREFIX" or a folder that is mounted, or set HPO_CHECKPOINTS'
        )
    if "://" in given:
        return
    folder = PurePosixPath(given)
    if not any(folder.is_relative_to(path) for path in mounted):
        mend = mend.format(folder=json.dumps(str(folder)))
        raise LaunchError(
            f"checkpoints {folder}: {place.name} do not see this folder; mount it: {mend}, or use object storage, such as "
            'checkpoints = "s3://BUCKET/PREFIX"'
        )


def short_name(request: Request) -> str:
    """Return a name for what is made in an engine, from the study, the launch and its first slot. No other launch has it."""
    slug = re.sub(r"[^a-z0-9]+", "-", request.study.lower()).strip("-")
    digest = hashlib.sha256(f"{request.study}\n{request.storage}\n{request.uid}".encode()).hexdigest()[:6]
    parts = [digest, *([str(request.launch)] if request.launch is not None else [])]
    parts += [str(request.slots.start)] if request.slots.start else []
    tail = "-".join(parts)
    room = LONGEST_NAME - len("hpo--") - len(tail)
    return "-".join(part for part in ("hpo", slug[:room].strip("-"), tail) if part)


def escaped(word: str) -> str:
    """Return a word in which neither Kubernetes nor Compose finds a variable."""
    return word.replace("$", "$$")
