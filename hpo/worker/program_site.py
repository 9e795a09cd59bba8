"""What a worker does for a trial's program: its folder, its output, and where the trial goes on after a kill."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
from collections.abc import Sequence

from hpo.files import atomic_write
from hpo.own.output import KeptOutput
from hpo.queue.models import Checkpoint
from hpo.storage.tables import UNREAD_KEY
from hpo.study import program_folder, retention
from hpo.study.study import Study
from hpo.worker import descendants, pending_reports
from hpo.worker.signals import LAST_ACT_SECONDS
from hpo.worker.trial import LeasedTrial

log = logging.getLogger(__name__)
GRACE_SHARE = 0.9  # of the time that the worker has to park; the rest is for its own writes
COMMAND_FILE = "command.json"  # in the trial's folder; what the program was started with


class ProgramSite:
    """A program's site in a worker, for one attempt.

    The program saves what it likes in its folder. If it names its epochs, each reported epoch is recorded as one from which
    the trial goes on. Then the next attempt keeps the values and the folder. Otherwise both are emptied.
    """

    def __init__(self, study: Study, trial: LeasedTrial) -> None:
        recovery, attempt = study.spec.recovery, trial.lease.claim.attempt
        self._study = study
        self._trial = trial
        self._home = study.trial_folder(trial.number)
        self.folder = program_folder.of_attempt(self._home, attempt)
        self.reports = self._home / f"attempt-{attempt}-reports.jsonl"
        self.grace = GRACE_SHARE * (recovery.grace_seconds - min(LAST_ACT_SECONDS, recovery.grace_seconds / 2))
        self._output = KeptOutput(study.logs, trial.number)
        self._command_digest = ""
        self._others: frozenset[int] = frozenset()

    def begin(self, words: Sequence[str]) -> None:
        """Make the folder for a program. It is emptied unless the program has named an epoch and saved something.

        Raises OSError if the disk fails.
        """
        if not self._study.sees_checkpoints:
            raise FileNotFoundError(
                errno.ENOENT, "the study's checkpoint folder is not there; mount its disk", self._study.store.place
            )
        attempt = self._trial.lease.claim.attempt
        if self._trial.lease.claim.checkpoint is not None:
            self._go_on(attempt)
        if not self.known():
            program_folder.delete(self._home, attempt)
        self.folder.mkdir(parents=True, exist_ok=True)
        retention.tidy(self._study.store, self._home.name, attempt, keep=())
        self._write_command(words)
        self._trial.lease.unrecorded = []
        self._trial.parks_in_reports = False  # the program may save first
        self._others = descendants.children()
        self._output.begin(attempt)

    def _go_on(self, attempt: int) -> None:
        """Take over what the last attempt has saved. Without that, forget the curve and start again."""
        program_folder.take_over(self._home, attempt)
        if not program_folder.holds_files(self.folder):
            log.warning("trial %d starts again: its folder %s holds no files", self._trial.number, self.folder)
            self._trial.start_over()

    def _write_command(self, words: Sequence[str]) -> None:
        content = json.dumps(list(words)).encode()
        with atomic_write(self._home / COMMAND_FILE) as part:
            part.write_bytes(content)
        self._command_digest = hashlib.sha256(content).hexdigest()

    def known(self) -> dict[int, float]:
        """Return the values of earlier attempts by epoch, if the program goes on after them."""
        return dict(zip(sorted(self._trial.cached.intermediate_values), self._trial.curve, strict=True))

    def keep(self, output: bytes) -> None:
        """Keep what the program has printed."""
        self._output.write(output)

    def let_go(self) -> None:
        """Raise the Signal that ends the attempt, if there is one."""
        self._trial.client.let_go(self._trial.lease)

    def start_over(self) -> None:
        """Forget the values of earlier attempts, since the program begins again at its first epoch."""
        self._trial.start_over()

    def note_unread(self, last: int, first: int) -> None:
        """Note at the trial that the program saved epochs whose values no worker read. They lie between these two."""
        trial = self._trial
        log.warning(
            "trial %d: no value is known between epoch %d of an earlier attempt and epoch %d: the program saved epochs that "
            "no worker read",
            trial.number,
            last,
            first,
        )
        known = trial.user_attrs.get(UNREAD_KEY, [])
        if [last, first] not in known:  # else the last attempt was killed after it had noted this
            trial.client.calls.ask_optuna(lambda: trial.set_user_attr(UNREAD_KEY, [*known, [last, first]]))

    def record(self) -> None:
        """Record that the trial goes on after its last epoch. If the storage fails, leave that to the next attempt."""
        trial, path = self._trial, self._home / COMMAND_FILE
        reached = Checkpoint(epoch=trial.last_step, path=str(path), digest=self._command_digest)
        if not trial.client.record_checkpoint(trial.lease, reached):
            try:
                pending_reports.leave(self._study.store, trial, reached)
            except OSError as error:
                log.warning(
                    "trial %d: epoch %d could not be left to a later attempt: %s", trial.number, reached.epoch, error
                )

    def end(self) -> None:
        """End what the program has left running, also outside of its process group."""
        descendants.end(but=self._others)

    def record_final(self) -> None:
        """Do nothing: each epoch is recorded already."""
