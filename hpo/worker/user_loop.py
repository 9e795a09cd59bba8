"""The user's own training loop in a worker: where it resumes, when it saves, when it lets its trial go."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpo.errors import MismatchError, Outage, Parked
from hpo.queue.start import TrialReceipt
from hpo.receipt import BEST_STEP
from hpo.study.study import Study
from hpo.text import command
from hpo.worker.trial import LeasedTrial

if TYPE_CHECKING:
    from hpo.queue.models import Checkpoint
    from hpo.train.user_state import UserState
    from hpo.worker.checkpoints import CheckpointManager


class UserLoop:
    """The loop of one attempt. An objective without a loop of ours never makes a checkpoint."""

    def __init__(self, study: Study, trial: LeasedTrial) -> None:
        self._study = study
        self._trial = trial
        self._checkpoints: CheckpointManager | None = None
        self._final: Checkpoint | None = None  # of the last epoch; recorded once the objective has returned
        self._final_best: dict[str, Any] | None = None  # what `UserState.best` was when that file was written

    def epochs(self, count: int, objects: Mapping[str, Any]) -> Iterator[int]:
        """Yield the epochs that are left, counted from 0.

        After each epoch's body a checkpoint is saved if one is due, if the trial is to be parked, and after the last epoch.
        """
        start = self.resume(objects)
        if 0 < start >= count:
            self._start_over(f"has all {count} epochs")
        from hpo.worker.loop_variables import LoopVariables

        variables = LoopVariables(sys._getframe(1), objects)
        try:
            for epoch in range(start, count):
                yield epoch
                variables.warn_of_carried()
                if epoch == start:
                    self.refuse_objects()  # what the first epoch has put into them, before more epochs are spent
                self.end_epoch(epoch + 1, is_last=epoch + 1 == count)
        finally:
            self._trial.parks_in_reports = True

    def resume(self, objects: Mapping[str, Any]) -> int:
        """Load the trial's checkpoint into the objects, if it has one; return how many epochs are finished.

        From now on reports do not park the trial. It is parked where the loop saves, with a checkpoint.

        Raises RuntimeError for a second loop in the trial, or after a report. Raises TypeError or CheckpointError for objects
        that cannot be saved. Raises MismatchError if the checkpoint does not fit them.
        """
        if self._checkpoints is not None:
            raise RuntimeError(
                f"trial {self._trial.number}: hpo.epochs or hpo.resume was called twice; a trial has one loop"
            )
        if self._trial.has_reported:
            raise RuntimeError(
                f"trial {self._trial.number}: report was called before hpo.epochs or hpo.resume; call it within the loop"
            )
        if self._study.spec.format == 1:
            mend = f"make a new one with `{command('fork', self._study.name)} NEW FILE`"
            raise MismatchError(f"study {self._study.name!r} counts steps as earlier versions of hpo did; {mend}")
        from hpo.train import checkpoint  # torch comes in here
        from hpo.train.user_state import UserState
        from hpo.worker.checkpoints import CheckpointManager

        goals = self._study.spec.goals
        state = UserState(objects, None if goals.are_several else goals.directions[goals.first])
        self._checkpoints = CheckpointManager(self._study, state, self._trial)
        try:
            self._checkpoints.resume()
        except MismatchError:
            if self._study.spec.failures.exception.retries:
                self._trial.start_over()  # the next attempt begins at epoch 0
            raise
        checkpoint.refuse_objects(state.state_dict())  # now, and not when the first checkpoint is due
        if state.has_ended:
            self._start_over("is from the loop's end")
        self._trial.user_state = state
        self._trial.parks_in_reports = False
        return state.epoch

    def save(self, epoch: int) -> None:
        """Save the state after so many finished epochs, and park the trial if the worker is stopping.

        Raises RuntimeError before `resume`.
        """
        checkpoints = self._saved_by()
        checkpoints.run.epoch = epoch
        checkpoints.save(self._trial.last_step)
        self._trial.saved_epochs = epoch
        self._trial.client.let_go(self._trial.lease)

    def record_final(self) -> None:
        """Record the loop's last checkpoint, once the objective has returned. A loop that was left early has none yet.

        It is not recorded before: a killed attempt then trains the last epochs again, and the code after the loop finds its
        variables. If the storage fails, this waits for it. Otherwise the next attempt would find the loop at its end.
        """
        state = self._trial.user_state
        if state is None:
            return
        if self._final is None or state.best is not self._final_best:  # a report after the loop was the best
            self._write_final(state)
        if (found := self._final) is None:
            return
        client, lease, checkpoints = self._trial.client, self._trial.lease, self._saved_by()
        client.flush(lease)
        if not checkpoints.put_patiently(found):
            return
        checkpoints.record(found, is_stored=True, is_last=True)
        if self._final_best is not None and checkpoints.recorded == found:
            step = {BEST_STEP: self._final_best["step"]}
            client.record_receipts([TrialReceipt(claim=lease.claim, receipt=step)])

    # --- for loops that a library runs ------------------------------------------------------------------------------------

    def end_epoch(self, epoch: int, *, is_last: bool) -> None:
        """Save the state after so many finished epochs if a checkpoint is due, and park the trial if it is to be parked.

        The last epoch's checkpoint is always written. It is recorded once the objective has returned.
        """
        checkpoints, step, state = self._saved_by(), self._trial.last_step, self._trial.user_state
        assert state is not None
        state.epoch = epoch
        if is_last:
            self._write_final(state)
            self._trial.parks_in_reports = True
            return
        try:
            self._trial.client.let_go(self._trial.lease)
        except (Parked, Outage):
            checkpoints.save(step)
            raise
        checkpoints.save_if_due(step)

    def wants_save(self) -> bool:
        """Return whether `end_epoch` would save now. Raises a Signal that ends the attempt without a checkpoint."""
        try:
            self._trial.client.let_go(self._trial.lease)
        except (Parked, Outage):
            return True
        return self._saved_by().is_due

    def refuse_objects(self) -> None:
        """Raise CheckpointError if the objects that `resume` got cannot be saved as they are now."""
        from hpo.train import checkpoint

        checkpoint.refuse_objects(self._saved_by().run.state_dict())

    def restore_random(self) -> None:
        """Restore the global random numbers of the checkpoint again, after code that drew some. Do nothing without one."""
        if self._trial.user_state is not None:
            self._trial.user_state.restore_random()

    def scratch_folder(self) -> Path:
        """Return a new folder for files of this attempt. It is removed with the trial's checkpoints."""
        folder = self._saved_by().folder
        for left in folder.glob("files-*"):
            shutil.rmtree(left, ignore_errors=True)
        found = folder / f"files-{self._trial.lease.claim.attempt}"
        found.mkdir(parents=True)
        return found

    def _write_final(self, state: UserState) -> None:
        """Write the state of the loop's end, to be recorded later. If the disk does not take it, a file before it stays."""
        state.has_ended = True
        found = self._saved_by().write(self._trial.last_step)
        if found is not None:
            self._final, self._final_best = found, state.best

    def _start_over(self, why: str) -> None:
        """Let the next attempt begin at epoch 0: nothing is left to train, but the code after the loop has not run."""
        number = self._trial.number
        self._trial.start_over()
        raise Parked(f"trial {number}: its checkpoint {why}, but the objective did not return; it starts over")

    def _saved_by(self) -> CheckpointManager:
        if self._checkpoints is None:
            raise RuntimeError(
                f"trial {self._trial.number}: hpo.save was called before hpo.resume; call hpo.resume first"
            )
        return self._checkpoints
