"""Checkpoints in a bucket of S3, Google Cloud Storage or Azure, through obstore.

A name is unique, so a checkpoint is one PUT, without a rename. The machine's folder keeps what this machine has written or
read. A request that fails makes the next seconds' requests fail at once: a training that waits for a dead server at each
step would stand still.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from hpo.errors import CheckpointError, StorageError, StudyError
from hpo.files import atomic_write
from hpo.spec import bucket_url
from hpo.spec.bucket_url import CREDENTIALS
from hpo.storage.redaction import HIDDEN, redacted_message
from hpo.study.checkpoint_store import PROBE_FILE, digest_of, names_in

log = logging.getLogger(__name__)
Answer = TypeVar("Answer")

PART = (
    16 * 2**20
)  # bytes of one request, where a file is too large for a single one; an upload sends 12 of them at a time
ONE_PUT = 256 * 2**20  # bytes up to which a file is one request; it is held in memory
CONNECT_SECONDS = 5.0
DOWNLOAD_SECONDS = 60.0  # of one request of a person who loads weights
RETRIES = 3  # of one request, after a dropped connection or an error 5xx
QUIET_SECONDS = 5.0  # after a failure, in which no request is sent
QUIET_FACTOR = 3.0  # of the time that the failed request has taken, in which none is sent either
SECRETS = re.compile(r"(AWS|AZURE|GOOGLE)_\w*(KEY|SECRET|TOKEN|PASSWORD|ACCOUNT|SAS)\w*")  # environment variables
CODE = re.compile(r"<Code>(\w+)</Code>")
CAUSE = re.compile(r'message: "([^"]*)"|error: "([^"]*)"')
STATUS = re.compile(r"status code: (\d{3})((?: [A-Z][A-Za-z]+)*)")  # with the words of the standard, not the server's
TEMPORARY = ("408", "429")  # beside 5xx: statuses after which a later try may succeed
#: What credentials of S3 may come from, beside the service of a machine at Amazon.
OF_S3 = (
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)
NO_EXTRA = "obstore is not installed; pip install 'hpo-torch[s3]'"
ALLOWED = "the credentials must allow to get, put, list and delete objects"


class BucketError(OSError):
    """Raised when a bucket does not do what it is asked. The message shows no secret.

    Attributes:
        what: what is wrong, without the place; also as `strerror`, like the other errors of files.
        mend: what to do about it.
        is_outage: whether a later try may succeed without a change.
    """

    def __init__(self, place: str, what: str, mend: str, *, is_outage: bool = False) -> None:
        super().__init__(f"{place}: {what}; {mend}")
        self.what = self.strerror = what
        self.mend = mend
        self.is_outage = is_outage


class BucketStore:
    """A prefix of a bucket that holds one study, with a folder of this machine."""

    is_folder = False

    def __init__(self, url: str, folder: Path, *, patience: float) -> None:
        """Open nothing yet.

        Args:
            url: the study's URL, without credentials.
            folder: this machine's folder of the study.
            patience: the longest time in seconds that one request may take.
        """
        self.place = url
        self.folder = folder
        self._patience = patience
        self._opened: tuple[int, Any] | None = None  # the process, and its client: a client does not survive a fork
        self._failing_since: float | None = None
        self._quiet_until = 0.0
        self._failure: BucketError | None = None
        self._known: dict[str, set[str]] = {}  # a trial's folder -> what this process knows to lie in the bucket

    @property
    def is_away(self) -> bool:
        return time.monotonic() < self._quiet_until

    @property
    def failing_seconds(self) -> float:
        return 0.0 if self._failing_since is None else time.monotonic() - self._failing_since

    def place_of(self, name: str) -> str:
        return f"{self.place}/{name}"

    def name_of(self, place: str) -> str:
        return place.removeprefix(f"{self.place}/")

    # --- files --------------------------------------------------------------------------------------------------------

    def put(self, name: str, file: Path | None = None) -> None:
        found = file or self.folder / name
        is_large = found.stat().st_size > ONE_PUT
        self._known_in(name).add(name)  # a server that was too slow to answer may have it all the same
        self._ask(lambda obs, client: obs.put(client, name, found, use_multipart=is_large, chunk_size=PART))

    def get(self, name: str, digest: str | None = None) -> Path:
        file = self.folder / name
        if digest is not None and digest_of(file) == digest:
            return file
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as part:
            self._ask(lambda obs, client: _download(obs, client, name, part))
        return file

    def exists(self, name: str) -> bool:
        was_away = self.is_away
        try:
            self._ask(lambda obs, client: obs.head(client, name))
        except FileNotFoundError:
            return False
        except OSError as error:
            if not was_away:  # else it has been said
                log.warning("it is not known whether %s is there: %s", self.place_of(name), error)
            return False
        return True

    def names(self, folder: str, *, anew: bool = False) -> set[str]:
        if anew or folder not in self._known:
            self._known[folder] = {*self._listed(f"{folder}/")}
        return self._known[folder] | names_in(self.folder, folder)

    def trials(self) -> set[str]:
        found = {name.partition("/")[0] for name in self._listed("")}  # some servers name empty folders too
        return found | ({file.name for file in self.folder.iterdir()} if self.folder.is_dir() else set())

    def sizes(self) -> dict[str, int]:
        return self._listed("")

    def delete(self, names: Iterable[str]) -> None:
        for name in (names := [*names]):
            (self.folder / name).unlink(missing_ok=True)
        there = [name for name in names if name in self._known_in(name)]
        if there:
            self._delete(there)

    def delete_trial(self, folder: str) -> None:
        try:
            self._delete([*self._listed(f"{folder}/")])
        except OSError as error:
            log.debug("%s stays for now: %s", self.place_of(folder), error)
            return
        shutil.rmtree(self.folder / folder, ignore_errors=True)
        self._known.pop(folder, None)

    def delete_all(self) -> None:
        self._delete([*self._listed("")])
        if self.folder.exists():
            shutil.rmtree(self.folder)

    def _listed(self, prefix: str) -> dict[str, int]:
        found = self._ask(lambda obs, client: obs.list(client, prefix or None).collect())
        return {one["path"]: one["size"] for one in found if one["path"].startswith(prefix)}

    def _delete(self, names: list[str]) -> None:
        if names:
            try:
                self._ask(_deletion(names))
            except FileNotFoundError:  # Google and Azure refuse the whole if one is missing, S3 does not
                for name in names:
                    with suppress(FileNotFoundError):
                        self._ask(_deletion([name]))
        for name in names:
            self._known_in(name).discard(name)

    def _known_in(self, name: str) -> set[str]:
        return self._known.setdefault(name.rpartition("/")[0], set())

    # --- is it the study's own? ---------------------------------------------------------------------------------------

    def check_writable(self) -> None:
        name = f"check-{uuid.uuid4().hex}"
        try:
            self._ask(lambda obs, client: obs.put(client, name, b"hpo", use_multipart=False))
            self._ask(lambda obs, client: obs.delete(client, [name]))
        except BucketError as error:
            raise self._refusal(error) from None

    def mark(self, uid: str) -> None:
        try:
            self._ask(lambda obs, client: obs.put(client, PROBE_FILE, uid.encode(), use_multipart=False))
        except BucketError as error:
            raise self._refusal(error) from None
        self.folder.mkdir(parents=True, exist_ok=True)

    def is_of(self, uid: str) -> bool:
        try:
            return self._probe() == uid
        except OSError:
            return False

    def why_unseen(self, uid: str) -> tuple[str, str]:  # noqa: ARG002
        try:
            self._probe()
        except FileNotFoundError:
            return f"the study's object {PROBE_FILE} is not there", self._right_bucket
        except BucketError as error:
            return error.what, error.mend
        return f"the object {PROBE_FILE} is of another study", self._right_bucket

    def why_missing(self, waiting: int, uid: str) -> str | None:
        try:
            self._probe()
        except BucketError as error:
            raise self._refusal(error) from None
        except FileNotFoundError:
            return (
                f"checkpoints {self.place}: the object {PROBE_FILE} is missing, and {waiting} trials are to go on from there; "
                f"{self._right_bucket}. If they are lost, let them start again: put the text {uid} into that object"
            )
        return None

    def _probe(self) -> str:
        content = self._ask(lambda obs, client: obs.get(client, PROBE_FILE).bytes())
        return bytes(content).decode(errors="replace")

    def _refusal(self, error: BucketError) -> StorageError | StudyError:
        said = f"checkpoints {self.place.rpartition('/')[0]}: {error.what}; {error.mend}"
        return StorageError(said) if error.is_outage else StudyError(said)

    @property
    def _scheme(self) -> str:
        return self.place.partition(":")[0]

    @property
    def _right_bucket(self) -> str:
        return f"check that {CREDENTIALS[self._scheme]} are those of the bucket in which the study was made"

    # --- requests -----------------------------------------------------------------------------------------------------

    def _ask(self, call: Callable[[Any, Any], Answer]) -> Answer:
        """Return what a call of obstore returns. Raises FileNotFoundError for a missing object, else BucketError."""
        if self._failure is not None and self.is_away:
            raise self._failure.with_traceback(None)  # else it gathers the frames of each raise
        try:
            import obstore
        except ImportError:
            raise BucketError(self.place, NO_EXTRA, "or name a folder by `checkpoints = PATH`") from None
        began = time.monotonic()
        try:
            answer = call(obstore, self._client())
        except Exception as error:  # obstore raises its own errors, and Python's for some
            if isinstance(error, FileNotFoundError) and "NoSuchBucket" not in str(error):
                self._note_answer()
                raise FileNotFoundError(errno.ENOENT, "there is no such object", self.place) from None
            if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
                raise  # of a file of this machine
            raise self._note_failure(error, time.monotonic() - began) from None  # its text may hold a secret
        self._note_answer()
        return answer

    def _client(self) -> Any:
        if self._opened is None or self._opened[0] != os.getpid():
            from obstore.store import from_url

            patience = timedelta(seconds=self._patience)
            is_plain = os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://")
            options = {"timeout": patience, "connect_timeout": timedelta(seconds=CONNECT_SECONDS)}
            client = from_url(
                self.place,
                client_options={**options, "allow_http": True} if is_plain else options,
                retry_config={"max_retries": RETRIES, "retry_timeout": patience},
            )
            self._opened = os.getpid(), client
        return self._opened[1]

    def _note_answer(self) -> None:
        if self._failing_since is not None:
            log.info("checkpoints %s: answers again after %.0f s", self.place, self.failing_seconds)
        self._failing_since = self._failure = None
        self._quiet_until = 0.0

    def _note_failure(self, error: Exception, seconds: float) -> BucketError:
        failure = _explained(self.place, error)
        if self._scheme == "s3" and not any(name in os.environ for name in OF_S3):
            what = f"{failure.what}, and no AWS_ACCESS_KEY_ID is set"
            failure = BucketError(self.place, what, failure.mend, is_outage=failure.is_outage)
        self._failure = failure
        if self._failing_since is None:
            self._failing_since = time.monotonic()
        self._quiet_until = time.monotonic() + QUIET_SECONDS + QUIET_FACTOR * seconds
        return failure


@contextmanager
def downloaded(place: str) -> Iterator[Path]:
    """Yield a temporary file with the content of a checkpoint at its place. Raises CheckpointError if it cannot be read."""
    bucket_url.check(place, "the checkpoint")
    url, _, name = place.rpartition("/")
    with tempfile.TemporaryDirectory() as folder:
        try:
            file = BucketStore(url, Path(folder), patience=DOWNLOAD_SECONDS).get(name)
        except OSError as error:
            raise CheckpointError(f"checkpoint {place} cannot be read: {error.strerror}") from None
        yield file


def _deletion(names: list[str]) -> Callable[[Any, Any], object]:
    return lambda obs, client: obs.delete(client, names)


def _download(obs: Any, client: Any, name: str, file: Path) -> None:
    """Write an object to a file, in parts that one request's time is enough for."""
    size = obs.head(client, name)["size"]
    with file.open("wb") as opened:
        for start in range(0, size, PART):
            opened.write(obs.get_range(client, name, start=start, end=min(size, start + PART)))


def _explained(place: str, error: Exception) -> BucketError:
    """Return the error of obstore in words of ours. Of a server's answer only its codes are shown."""
    said = str(error)
    source = CREDENTIALS[place.partition(":")[0]]
    named, status = CODE.search(said), STATUS.search(said)
    code = named[1] if named else "".join(status.groups()) if status else ""
    if type(error).__name__ in ("PermissionDeniedError", "UnauthenticatedError"):
        return BucketError(place, f"access is denied ({code})", f"check {source}; {ALLOWED}")
    if "NoSuchBucket" in said or type(error).__name__ == "NotFoundError":
        return BucketError(place, "there is no such bucket", f"make it, or check its name and {source}")
    if "TimedOut" in said or "timed out" in said:
        mend = "check the network; a large checkpoint needs a longer `recovery.grace`, half of which a request may take"
        return BucketError(place, "the server did not answer in time", mend, is_outage=True)
    if cause := CAUSE.search(said):
        what = f"the server cannot be reached ({_without_secrets(cause[1] or cause[2])})"
        return BucketError(place, what, f"check the network and {source}", is_outage=True)
    if code == "RequestTimeout" or (status and (status[1] in TEMPORARY or status[1].startswith("5"))):
        return BucketError(place, f"the server fails at present ({code})", "try again later", is_outage=True)
    if code:
        return BucketError(place, f"the server refused ({code})", f"check {source}; {ALLOWED}")
    return BucketError(place, _without_secrets(said.partition("\n")[0]), f"check {source}")


def _without_secrets(text: str) -> str:
    for name, value in os.environ.items():
        if value and SECRETS.fullmatch(name):
            text = text.replace(value, HIDDEN)
    return redacted_message(text)
