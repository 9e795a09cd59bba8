"""The runner of a declared training: K trials trained together, each with its own report, decision, checkpoint and end.

After an epoch all values are written in one statement, then all decisions are taken from one read, so that no decision
depends on the order of the seats. What is decided on one trial, in this order: a loss that is not finite ends it as diverged;
its last epoch, or a rule of its own that ends it early, as complete; else the pruner may end it. So the pruner is never
asked about a trial that has just ended, and what that one reported stays among what others are held against at its epochs.

With the loop as the executor K is 1, and this is one trial after the other.
"""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn, Protocol

import optuna

from hpo.errors import Diverged, Parked
from hpo.queue.models import Claim
from hpo.queue.start import SuggestedParams, TrialReceipt
from hpo.search import array_pruners
from hpo.spec.failures import SPOILING, Kind, kind_of
from hpo.spec.space import Tree
from hpo.spec.training import TrainConfig
from hpo.storage.connect import FAILURES
from hpo.study.study import Study
from hpo.train.build.executor import Executor, stack_key_of
from hpo.train.epoch import EpochResult
from hpo.train.run import Run
from hpo.worker.attempt import Attempt, Ending, end_all
from hpo.worker.checkpoints import CheckpointManager
from hpo.worker.client import Lease, QueueClient
from hpo.worker.runner import ClaimRequest
from hpo.worker.signals import StopSignal
from hpo.worker.trial import LeasedTrial

log = logging.getLogger(__name__)
Outcome = Callable[[], Any]  # how a trial ends, as `attempt.end_all` wants it
LOOK_SECONDS = 0.02  # between two looks at whether one of several trials must let go


@dataclass(frozen=True, eq=False)
class Proposal:
    """A trial and what it is to be trained by."""

    attempt: Attempt
    trial: LeasedTrial
    pinned: Tree  # the study's tree with a value at each leaf, which are not checked together yet
    suggested: SuggestedParams


@dataclass(eq=False)
class Seat:
    """One trial in training."""

    attempt: Attempt
    trial: LeasedTrial
    run: Run
    checkpoints: CheckpointManager
    config: TrainConfig

    @functools.cached_property
    def stack_key(self) -> str:
        """What its run may be trained together with: optimizer and schedule, seed and epochs may differ."""
        return stack_key_of(self.run, self.config.training)

    @property
    def lease(self) -> Lease:
        return self.trial.lease


class Trainer(Protocol):
    """What a declared study trains."""

    def propose(self, trial: LeasedTrial) -> tuple[Tree, SuggestedParams]:
        """Return the tree pinned to what the sampler proposes for a trial, and what to write of it."""

    def seat(self, attempt: Attempt, trial: LeasedTrial, pinned: Tree) -> Seat:
        """Make a trial's run of a pinned tree, at epoch 0 or where its checkpoint stands."""

    def executor(self, seat: Seat) -> Executor:
        """Return an empty executor for runs like this one."""

    def receipt_of(self, seat: Seat) -> TrialReceipt:
        """Return what a trial is being made from, once its executor has it."""

    def halve(self, stack_key: str) -> None:
        """Make stacks of this key of half the slots from now on, in every process on this machine."""

    def train_alone(self, stack_key: str) -> None:
        """Train the trials of this key one by one from now on, in this process."""


class StackedRunner:
    """Trains the trials of a declared study."""

    def __init__(self, study: Study, trainer: Trainer, client: QueueClient, stopping: StopSignal) -> None:
        self._study = study
        self._trainer = trainer
        self._client = client
        self._stopping = stopping
        self._seats: list[Seat] = []
        self._executor: Executor | None = None
        self._stack_key = ""
        self._look_at = 0.0
        self._ended: list[Kind | None] = []

    # --- trials come ------------------------------------------------------------------------------------------------

    def wants(self) -> ClaimRequest | None:
        """Ask for one trial, which decides on the stack, then for as many as that has room for."""
        if any(kind in SPOILING for kind in self._ended):
            return None  # the process is to start afresh
        if self._executor is None:
            return ClaimRequest(count=1)
        free = self._executor.slots - len(self._seats)
        if not free:
            return None
        return ClaimRequest(count=free, stack_key=self._stack_key, waiting_at_most=self._executor.slots)

    def take(self, claims: Sequence[Claim]) -> None:
        """Begin with these trials: all are proposed, what was proposed is written at once, then they are built and placed."""
        client = self._client
        leases = [client.lease(claim, self._stopping) for claim in claims]
        with self._study.storage.optuna.snapshot(self._study.study_id):
            proposals = [found for lease in leases if (found := self._propose(Attempt(self._study, lease)))]
        client.write(client.ledger.write_suggested, [proposal.suggested for proposal in proposals])
        made = [seated for proposal in proposals if (seated := self._seat(proposal))]
        client.write(client.ledger.record_receipts, made)

    def _propose(self, attempt: Attempt) -> Proposal | None:
        """Open a trial and let the sampler propose for it; None if that ended the attempt."""
        trial = attempt.open()
        if trial is None:
            self._close(attempt)
            return None
        try:
            attempt.lease.let_go()
            with attempt.at_work():
                pinned, suggested = self._trainer.propose(trial)
        except BaseException as error:  # of user code as well: whatever it is, it ends this trial's attempt
            self._give_up(attempt, trial, error)
            return None
        return Proposal(attempt, trial, pinned, suggested)

    def _seat(self, proposal: Proposal) -> TrialReceipt | None:
        """Build a trial's run and place it; return what it is made from, None if it came to no slot."""
        attempt, trial = proposal.attempt, proposal.trial
        try:
            attempt.lease.check()
            attempt.lease.let_go()
            with attempt.at_work():
                seat = self._trainer.seat(attempt, trial, proposal.pinned)
        except BaseException as error:
            self._give_up(attempt, trial, error)
            return None
        if not seat.run.finished:
            return self._place(seat)
        attempt.end(trial, partial(_complete, seat))  # its last worker was gone before it could say so
        self._close(attempt)
        return None

    def _give_up(self, attempt: Attempt, trial: LeasedTrial, error: BaseException) -> None:
        attempt.end(trial, partial(_raise, error))
        self._close(attempt)

    def _place(self, seat: Seat) -> TrialReceipt | None:
        """Give a trial its slot and return what it is made from, or park it until a stack of its kind is opened."""
        try:
            if self._executor is None:
                self._executor, self._stack_key = self._trainer.executor(seat), seat.stack_key
            if seat.stack_key != self._stack_key:
                self._let_wait(seat)
                return None
            self._executor.put(seat.run)
            receipt_of = self._trainer.receipt_of(seat)
        except BaseException as error:
            self._fail_to_place(seat, error)
            return None
        seat.lease.started_at = time.monotonic()  # what came before is not its training
        self._seats.append(seat)
        return receipt_of

    def _let_wait(self, seat: Seat) -> None:
        self._client.retry(lambda: self._client.ledger.park(seat.lease.claim, stack_key=seat.stack_key))
        self._client.remove(seat.lease)
        log.info("trial %d waits for a stack of its own kind", seat.trial.number, extra={"action": "trial_waits"})

    def _fail_to_place(self, seat: Seat, error: BaseException) -> None:
        """End an attempt that came to no slot; that there is no memory for a stack is no trial's fault."""
        is_alone = self._executor is not None and self._executor.slots == 1
        if kind_of(error) is Kind.OUT_OF_MEMORY and not is_alone:
            self._trainer.halve(seat.stack_key)
            self._ended.append(Kind.OUT_OF_MEMORY)
            error = Parked("there was no memory for a stack of so many trials")
        seat.attempt.end(seat.trial, partial(_raise, error))
        if self._executor is not None and seat.run in self._executor.runs:
            self._executor.remove(seat.run)
        self._close(seat.attempt)

    def go_without(self) -> None:
        """Close the gaps: nobody is there to fill them."""
        if self._executor is not None:
            self._executor.compact()

    # --- an epoch ---------------------------------------------------------------------------------------------------

    @property
    def is_busy(self) -> bool:
        return bool(self._seats or self._ended)

    def advance(self) -> list[Kind | None]:
        """Train one epoch of all trials, or as much of it as they may."""
        if self._seats:
            self._train()
        if not self._seats:
            self._executor = None
        ended, self._ended = self._ended, []
        return ended

    def _train(self) -> None:
        assert self._executor is not None
        try:
            results = dict(zip(self._executor.runs, self._executor.train_epoch(self._must_look_up), strict=False))
        except BaseException as error:  # a user's model is in there, and may raise anything
            self._break_up(error)
            return
        if results:
            self._judge([(seat, results[seat.run]) for seat in self._seats])
        self._end({seat: partial(_left_amid, seat) for seat in self._seats if seat.lease.must_end()})

    def _must_look_up(self) -> bool:
        """Say whether some trial must let go; asked before every batch, and of several trials not each time."""
        now = time.monotonic()
        if len(self._seats) > 1 and now < self._look_at:
            return False
        self._look_at = now + LOOK_SECONDS
        return any(seat.lease.must_end() for seat in self._seats)

    def _judge(self, epoch: Sequence[tuple[Seat, EpochResult]]) -> None:
        """Report an epoch of all trials, then end those that are to end, and save the others where that is due."""
        metric = self._study.spec.metric
        reports = [seat.trial.reporting(result.epoch, result.judged(metric), result.numbers) for seat, result in epoch]
        self._client.report(reports, since=self._study.storage.optuna.low(self._study.study_id))
        for (seat, _), report in zip(epoch, reports, strict=True):
            seat.trial.take_note(report)
            seat.checkpoints.unrecorded.append(report)
        ends: dict[Seat, Outcome] = {}
        for seat, result in epoch:
            if not (math.isfinite(result.train_loss) and math.isfinite(result.validation_loss)):
                ends[seat] = partial(_diverged, seat, result)
            elif seat.run.finished:  # nothing is left to save by pruning
                ends[seat] = partial(_complete, seat)
        undecided = [seat for seat, _ in epoch if seat not in ends]
        self._end(ends)
        ends = {}
        for seat, decision in zip(undecided, self._decide(undecided), strict=True):
            if isinstance(decision, Exception):
                ends[seat] = partial(_raise, decision)
            elif decision:
                ends[seat] = partial(_pruned, seat)
        self._end(ends)
        for seat in undecided:
            if seat not in ends:
                self._save(seat)

    def _decide(self, seats: Sequence[Seat]) -> Sequence[bool | Exception]:
        """Ask the pruner about all trials at once; while the storage is away it ends none, and if it fails, that ends them."""
        if not seats or self._client.is_cut_off:
            return [False] * len(seats)
        study = self._study
        study.storage.optuna.set_known_finished(study.study_id, self._client.finished)

        def ask() -> list[bool]:
            return array_pruners.decide(study.optuna, [seat.trial.frozen for seat in seats])

        try:
            return self._client.ask_optuna(ask) or [False] * len(seats)
        except optuna.exceptions.UpdateFinishedTrialError:  # one of them, by another program: each learns for itself
            return [seat.lease.is_lost or self._decide_alone(seat) for seat in seats]
        except FAILURES:
            raise
        except Exception as error:
            return [error] * len(seats)

    def _decide_alone(self, seat: Seat) -> bool:
        try:
            return seat.trial.pruner_says_stop()
        except optuna.exceptions.UpdateFinishedTrialError:
            seat.lease.lose()
            return False

    def _save(self, seat: Seat) -> None:
        try:
            seat.lease.check()
            seat.checkpoints.save_if_due(seat.run.epoch)
        except BaseException as error:
            self._end({seat: partial(_raise, error)})

    # --- trials go --------------------------------------------------------------------------------------------------

    def _end(self, outcomes: Mapping[Seat, Outcome]) -> None:
        """End trials by what their outcomes return or raise, and give their slots free."""
        end_all([Ending(seat.attempt, seat.trial, outcome) for seat, outcome in outcomes.items()])
        for seat in outcomes:
            self._seats.remove(seat)
            if self._executor is not None:
                self._executor.remove(seat.run)
            self._close(seat.attempt)

    def _close(self, attempt: Attempt) -> None:
        self._client.remove(attempt.lease)
        self._ended.append(attempt.lease.failed_by)

    def _break_up(self, error: BaseException) -> None:
        """End the attempts of all trials after an exception amid a step.

        One alone is the one to blame. Of several nobody knows whose fault it was: they go on from their checkpoints, in
        smaller stacks where memory ran out, else one by one; a CUDA error, after which the process is spoiled, counts for
        each of them, and the last attempt that it leaves a trial is one alone.
        """
        kind = kind_of(error)
        self._executor = None  # a step that failed may have spoiled all that it holds
        if len(self._seats) > 1 and kind is not Kind.CUDA_ERROR:
            log.warning("a stack of %d trials broke up: %s", len(self._seats), error)
            error.__traceback__ = None  # its frames hold on to what filled the memory
            shrink = self._trainer.halve if kind is Kind.OUT_OF_MEMORY else self._trainer.train_alone
            shrink(self._stack_key)
            outcome = partial(_raise, Parked("the stack that it was trained in broke up"))
        else:
            outcome = partial(_raise, error)
        self._end(dict.fromkeys(self._seats, outcome))
        if kind in SPOILING:
            self._ended.append(kind)

    def park(self) -> None:
        self._end({seat: partial(_parked, seat) for seat in self._seats})

    def leave(self, error: BaseException) -> None:
        for seat in self._seats:
            if seat.attempt.is_over:  # its end was written before those of others could not be
                continue
            try:
                seat.attempt.end(seat.trial, partial(_keep_place, seat, error))
            except BaseException:  # the same error, as a rule, which is raised in the end
                log.debug("trial %d is left", seat.trial.number, exc_info=True)


# --- outcomes --------------------------------------------------------------------------------------------------------


def _raise(error: BaseException) -> NoReturn:
    raise error


def _diverged(seat: Seat, result: EpochResult) -> NoReturn:
    seat.lease.check()
    raise Diverged(f"epoch {result.epoch}: loss {result.train_loss}, validation loss {result.validation_loss}")


def _pruned(seat: Seat) -> NoReturn:
    seat.lease.check()
    raise optuna.TrialPruned(f"epoch {seat.run.epoch}")


def _complete(seat: Seat) -> float:
    seat.lease.check()
    if seat.lease.is_cut_off:
        seat.checkpoints.save(seat.run.epoch)  # the end may be long in coming
    value = seat.trial.judge(None)
    seat.checkpoints.save_if_leading(value)
    if seat.run.stopped_by:
        seat.trial.end_reason = f"stopped after epoch {seat.run.epoch} by {seat.run.stopped_by}"
    return value


def _left_amid(seat: Seat) -> NoReturn:
    """Keep the place of a trial that must let go, if it has one to keep, and say why it must."""
    if seat.lease.keeps_its_place:
        seat.checkpoints.save(seat.run.epoch)
    seat.lease.let_go()
    raise Parked(f"trial {seat.trial.number}: parked after epoch {seat.run.epoch}")


def _keep_place(seat: Seat, error: BaseException) -> NoReturn:
    if seat.lease.keeps_its_place:
        seat.checkpoints.save(seat.run.epoch)
    raise error


def _parked(seat: Seat) -> NoReturn:
    seat.lease.check()
    seat.checkpoints.save(seat.run.epoch)
    raise Parked(f"trial {seat.trial.number}: its worker starts afresh")
