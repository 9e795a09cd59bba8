"""The runner of a declared training: K trials train together, each with its own report, decision, checkpoint and end.

After an epoch all values are written in one statement. Then all decisions are made from one read, so no decision
depends on the order of the trials. The first match decides: a loss that is not finite, or the divergence guard, diverged.
The last epoch or early stopping, COMPLETE. The pruner, PRUNED. So the pruner is never asked about a trial that has just
ended. The values of that trial are still compared with those of others.

With the loop as the executor K is 1, and one trial trains after the other.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NoReturn, Protocol

import optuna

from hpo.errors import Diverged, Parked
from hpo.queue.start import SuggestedParams, TrialReceipt
from hpo.spec.failures import SPOILING, Kind, kind_of
from hpo.storage.connect import FAILURES
from hpo.strategy import array_pruners
from hpo.study.study import Study
from hpo.train.build.executor import Executor
from hpo.train.epoch import EpochResult
from hpo.worker.attempt import Attempt, Outcome, end_all
from hpo.worker.client import ClaimRequest, QueueClient
from hpo.worker.lease import Lease

log = logging.getLogger(__name__)
LOOK_SECONDS = 0.02  # between two checks whether one of several attempts must end


class Trainer(Protocol):
    """The trainer of a declared study."""

    def propose(self, attempt: Attempt) -> SuggestedParams:
        """Pin the study's tree to the sampler's suggestions for a trial. Return the suggestions, which the caller writes."""

    def build(self, attempt: Attempt) -> None:
        """Build a trial's run from its pinned tree, and load its checkpoint if there is one."""

    def executor(self, attempt: Attempt) -> Executor:
        """Return an empty executor for runs like this one."""

    def receipt_of(self, attempt: Attempt) -> TrialReceipt:
        """Return the receipt of a trial that an executor holds."""

    def halve(self, stack_key: str) -> None:
        """Halve the slots of later stacks of this key, in every process on this machine."""

    def train_alone(self, stack_key: str) -> None:
        """Train the trials of this key one by one from now on, in this process."""


class StackedRunner:
    """Trains the trials of a declared study."""

    def __init__(self, study: Study, trainer: Trainer, client: QueueClient) -> None:
        self._study = study
        self._trainer = trainer
        self._client = client
        self._attempts: list[Attempt] = []
        self._executor: Executor | None = None
        self._stack_key = ""
        self._look_at = 0.0
        self._ended: list[Kind | None] = []

    # --- trials come ------------------------------------------------------------------------------------------------

    def wants(self) -> ClaimRequest | None:
        """Ask for one trial, which decides on the stack, then for as many as the stack has free slots."""
        if any(kind in SPOILING for kind in self._ended):
            return None  # the process must restart
        if self._executor is None:
            return ClaimRequest(count=1)
        free = self._executor.slots - len(self._attempts)
        if not free:
            return None
        return ClaimRequest(count=free, stack_key=self._stack_key, waiting_at_most=self._executor.slots)

    def take(self, leases: Sequence[Lease]) -> None:
        """Start these trials: suggest for all of them, write the suggestions in one transaction, then build and place them."""
        attempts = deque(Attempt(self._study, self._client, lease) for lease in leases)
        with self._study.storage.optuna.snapshot(self._study.study_id):
            suggested = [self._propose(attempt) for attempt in attempts]
        self._client.write_suggested([found for found in suggested if found])
        receipts = []
        for found in suggested:
            attempt = attempts.popleft()  # an attempt without a slot is freed here, with its model
            if found and (receipt := self._build(attempt)):
                receipts.append(receipt)
            del attempt
        self._client.record_receipts(receipts)

    def _propose(self, attempt: Attempt) -> SuggestedParams | None:
        """Open a trial and let the sampler suggest its parameters. Return None if that ended the attempt."""
        if not attempt.open():
            self._close(attempt)
            return None
        try:
            attempt.let_go()
            with attempt.at_work():
                return self._trainer.propose(attempt)
        except BaseException as error:  # also from user code; any error ends this attempt
            self._give_up(attempt, error)
            return None

    def _build(self, attempt: Attempt) -> TrialReceipt | None:
        """Build a trial's run and place it. Return its receipt; None if it got no slot."""
        try:
            attempt.lease.check()
            attempt.let_go()
            with attempt.at_work():
                self._trainer.build(attempt)
        except BaseException as error:
            self._give_up(attempt, error)
            return None
        if not attempt.run.finished:
            return self._place(attempt)
        attempt.end(partial(_complete, attempt))  # its last worker was gone before it could write the end
        self._close(attempt)
        return None

    def _give_up(self, attempt: Attempt, error: BaseException) -> None:
        attempt.end(partial(_raise, error))
        self._close(attempt)

    def _place(self, attempt: Attempt) -> TrialReceipt | None:
        """Give a trial a slot and return its receipt, or park it until a stack of its key is open."""
        try:
            if self._executor is None:
                self._executor, self._stack_key = self._trainer.executor(attempt), attempt.stack_key
            if attempt.stack_key != self._stack_key:
                self._let_wait(attempt)
                return None
            self._executor.put(attempt.run)
            receipt_of = self._trainer.receipt_of(attempt)
        except BaseException as error:
            self._fail_to_place(attempt, error)
            return None
        attempt.lease.started_at = time.monotonic()  # building it is not training time
        self._attempts.append(attempt)
        return receipt_of

    def _let_wait(self, attempt: Attempt) -> None:
        self._client.park(attempt.lease, stack_key=attempt.stack_key)
        self._client.held.remove(attempt.lease)
        log.info(
            "trial %d is parked until a stack of its kind is open", attempt.number, extra={"action": "trial_waits"}
        )

    def _fail_to_place(self, attempt: Attempt, error: BaseException) -> None:
        """End an attempt that got no slot. If memory was too small for a stack, the trial is parked and does not fail."""
        is_alone = self._executor is not None and self._executor.slots == 1
        if kind_of(error) is Kind.OUT_OF_MEMORY and not is_alone:
            self._trainer.halve(attempt.stack_key)
            self._ended.append(Kind.OUT_OF_MEMORY)
            error = Parked("there was not enough memory for the stack")
        attempt.end(partial(_raise, error))
        if self._executor is not None and attempt.run in self._executor.runs:
            self._executor.remove(attempt.run)
        self._close(attempt)

    def go_without(self) -> None:
        """Close the gaps in the stack, because no trial is there to fill them."""
        if self._executor is not None:
            self._executor.compact()

    # --- an epoch ---------------------------------------------------------------------------------------------------

    @property
    def is_busy(self) -> bool:
        return bool(self._attempts or self._ended)

    def advance(self) -> list[Kind | None]:
        """Train one epoch of all trials, or a part of it if an attempt must end."""
        if self._attempts:
            self._train()
        if not self._attempts:
            self._executor = None
        ended, self._ended = self._ended, []
        return ended

    def _train(self) -> None:
        assert self._executor is not None
        try:
            results = dict(zip(self._executor.runs, self._executor.train_epoch(self._must_look_up), strict=False))
        except BaseException as error:  # a user's model may raise anything
            self._break_up(error)
            return
        if results:
            self._judge([(attempt, results[attempt.run]) for attempt in self._attempts])
        self._end({attempt: partial(_left_amid, attempt) for attempt in self._attempts if attempt.must_end()})

    def _must_look_up(self) -> bool:
        """Return whether an attempt must end. It is called before every batch. Several attempts are checked less often."""
        now = time.monotonic()
        if len(self._attempts) > 1 and now < self._look_at:
            return False
        self._look_at = now + LOOK_SECONDS
        return any(attempt.must_end() for attempt in self._attempts)

    def _judge(self, epoch: Sequence[tuple[Attempt, EpochResult]]) -> None:
        """Report an epoch of all trials, end those that must end, and save the others if that is due."""
        self._report(epoch)
        self._end({attempt: outcome for attempt, result in epoch if (outcome := _own_end(attempt, result))})
        left = [*self._attempts]
        self._end(self._pruned(left))
        for attempt in left:
            if attempt in self._attempts:
                self._save(attempt)

    def _report(self, epoch: Sequence[tuple[Attempt, EpochResult]]) -> None:
        metric = self._study.spec.metric
        reports = [one.trial.reporting(result.epoch, result.judged(metric), result.numbers) for one, result in epoch]
        self._client.report(reports)
        for (attempt, _), report in zip(epoch, reports, strict=True):
            attempt.trial.take_note(report)

    def _pruned(self, attempts: Sequence[Attempt]) -> dict[Attempt, Outcome]:
        """Return the outcomes of the trials that the pruner ends."""
        return {
            attempt: partial(_raise, decision) if isinstance(decision, Exception) else partial(_prune, attempt)
            for attempt, decision in zip(attempts, self._ask_the_pruner(attempts), strict=True)
            if decision
        }

    def _ask_the_pruner(self, attempts: Sequence[Attempt]) -> Sequence[bool | Exception]:
        """Ask the pruner about all trials at once. If it raises an error, that error ends each of them.

        While the storage fails, no trial is pruned.
        """
        if not attempts or self._client.calls.is_cut_off:
            return [False] * len(attempts)
        study = self._study
        study.storage.optuna.set_known_finished(study.study_id, self._client.finished)

        def ask() -> list[bool]:
            return array_pruners.decide(study.optuna, [attempt.trial.frozen for attempt in attempts])

        try:
            return self._client.calls.ask_optuna(ask) or [False] * len(attempts)
        except optuna.exceptions.UpdateFinishedTrialError:  # another program ended one: ask one by one
            return [attempt.lease.is_lost or self._decide_alone(attempt) for attempt in attempts]
        except FAILURES:
            raise
        except Exception as error:
            return [error] * len(attempts)

    def _decide_alone(self, attempt: Attempt) -> bool:
        try:
            return attempt.trial.pruner_says_stop()
        except optuna.exceptions.UpdateFinishedTrialError:
            attempt.lease.is_lost = True
            return False

    def _save(self, attempt: Attempt) -> None:
        try:
            attempt.lease.check()
            attempt.checkpoints.save_if_due(attempt.run.epoch)
        except BaseException as error:
            self._end({attempt: partial(_raise, error)})

    # --- trials go --------------------------------------------------------------------------------------------------

    def _end(self, outcomes: Mapping[Attempt, Outcome]) -> None:
        """End trials by what their outcomes return or raise, and free their slots."""
        end_all(outcomes)
        for attempt in outcomes:
            self._attempts.remove(attempt)
            if self._executor is not None:
                self._executor.remove(attempt.run)
            self._close(attempt)

    def _close(self, attempt: Attempt) -> None:
        self._client.held.remove(attempt.lease)
        self._ended.append(attempt.failed_by)

    def _break_up(self, error: BaseException) -> None:
        """End the attempts of all trials after an exception in the middle of an epoch.

        A single trial fails by it. With several, the trial to blame is unknown, so all are parked. They continue from
        their checkpoints, in stacks of half the slots if memory ran out, else one by one. A CUDA error makes the
        process unusable, so it counts as a failure of each trial. The last attempt that it leaves a trial is trained
        alone.
        """
        kind = kind_of(error)
        self._executor = None  # a failed step may have damaged all that it holds
        if len(self._attempts) > 1 and kind is not Kind.CUDA_ERROR:
            log.warning("a stack of %d trials failed, its trials are parked: %s", len(self._attempts), error)
            error.__traceback__ = None  # its frames keep the memory in use
            shrink = self._trainer.halve if kind is Kind.OUT_OF_MEMORY else self._trainer.train_alone
            shrink(self._stack_key)
            outcome = partial(_raise, Parked("the stack that it was trained in failed"))
        else:
            outcome = partial(_raise, error)
        self._end(dict.fromkeys(self._attempts, outcome))
        if kind in SPOILING:
            self._ended.append(kind)

    def park(self) -> None:
        self._end({attempt: partial(_parked, attempt) for attempt in self._attempts})

    def leave(self, error: BaseException) -> None:
        for attempt in self._attempts:
            if attempt.is_over:  # its end was written before the error
                continue
            try:
                attempt.end(partial(_keep_place, attempt, error))
            except BaseException:  # usually the same error, which the caller raises
                log.debug("trial %d is left leased", attempt.number, exc_info=True)


# --- outcomes --------------------------------------------------------------------------------------------------------


def _raise(error: BaseException) -> NoReturn:
    raise error


def _own_end(attempt: Attempt, result: EpochResult) -> Outcome | None:
    """Return the trial's outcome if this epoch ends it without the pruner; None if not."""
    if why := _why_diverged(attempt, result):
        return partial(_diverged, attempt, why)
    return partial(_complete, attempt) if attempt.run.finished else None  # pruning would save nothing


def _why_diverged(attempt: Attempt, result: EpochResult) -> str | None:
    """Return why a trial diverged: its loss is not finite, or the divergence guard ends it. Return None if it did not."""
    if not (math.isfinite(result.train_loss) and math.isfinite(result.validation_loss)):
        return f"epoch {result.epoch}: loss {result.train_loss}, validation loss {result.validation_loss}"
    return attempt.trial.why_diverged("epoch", f"validation {attempt.study.spec.metric}")


def _diverged(attempt: Attempt, why: str) -> NoReturn:
    attempt.lease.check()
    raise Diverged(why)


def _prune(attempt: Attempt) -> NoReturn:
    attempt.lease.check()
    raise optuna.TrialPruned(attempt.by_the_pruner(attempt.run.epoch, "epoch"))


def _complete(attempt: Attempt) -> float:
    attempt.lease.check()
    if attempt.client.calls.is_cut_off:
        attempt.checkpoints.save(attempt.run.epoch)  # it may take long until the end can be written
    value = attempt.trial.judge(None)
    attempt.checkpoints.save_if_leading(value)
    if attempt.run.stopped_by:
        attempt.end_reason = f"stopped after epoch {attempt.run.epoch} by {attempt.run.stopped_by}"
    return value


def _left_amid(attempt: Attempt) -> NoReturn:
    """Save a trial whose attempt must end, unless it is lost or ended by a person. Raise the Signal that says why."""
    if attempt.lease.keeps_its_place:
        attempt.checkpoints.save(attempt.run.epoch)
    attempt.let_go()
    raise Parked(f"trial {attempt.number}: parked after epoch {attempt.run.epoch}")


def _keep_place(attempt: Attempt, error: BaseException) -> NoReturn:
    if attempt.lease.keeps_its_place:
        attempt.checkpoints.save(attempt.run.epoch)
    raise error


def _parked(attempt: Attempt) -> NoReturn:
    attempt.lease.check()
    attempt.checkpoints.save(attempt.run.epoch)
    raise Parked(f"trial {attempt.number}: its worker restarts")
