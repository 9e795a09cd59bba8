"""The declared objective: a trial becomes a config, the config a run. The one file that knows both Optuna's trials and torch."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from hpo.data import Splits
from hpo.queue.start import SuggestedParams, TrialReceipt
from hpo.receipt import receipt
from hpo.spec import seeds, space, usercode
from hpo.spec.training import TrainConfig
from hpo.study import study as studies
from hpo.study.study import Study
from hpo.train.batches import can_halve
from hpo.train.build import assemble, costs
from hpo.train.build.executor import Choice, Executor, choose, remember, spread
from hpo.train.loop import Loop
from hpo.train.run import Run
from hpo.worker.attempt import Attempt
from hpo.worker.checkpoints import CheckpointManager
from hpo.worker.client import QueueClient
from hpo.worker.signals import StopSignal
from hpo.worker.stacked_runner import Seat, StackedRunner
from hpo.worker.trial import LeasedTrial

log = logging.getLogger(__name__)
MANY_PARTITIONS = 16  # that a worker measures


def trial_seed(study_seed: int, number: int) -> int:
    """Return the seed from which everything random in a trial is derived."""
    return seeds.derive(study_seed, "trial", number)


def declared(study: Study, folder: Path) -> Declared:
    """Return the objective of a declared study; the data is loaded once, here, and must be the study's own."""
    device = assemble.pick_device()
    first = TrainConfig.from_tree(next(space.variants(study.spec.tree)))
    splits = assemble.load_splits(first, study.spec.seed, folder, device)
    studies.check_data(study, splits.digest)
    for note in splits.notes:
        log.warning("data: %s", note, extra={"action": "data"})
    assemble.try_out(study.spec.tree, splits, folder, device)
    assemble.build_run(first, splits, seed=0, folder=folder, device=device)  # what cannot be built must cost no trial
    return Declared(study, splits, folder, device)


class Declared:
    """What a declared study trains, in this process."""

    def __init__(self, study: Study, splits: Splits, folder: Path, device: torch.device) -> None:
        self._study = study
        self._splits = splits
        self._folder = folder
        self._device = device
        self._choices: dict[str, Choice] = {}
        self._fleet = 1

    def runner(self, study: Study, client: QueueClient, stopping: StopSignal, fleet: int) -> StackedRunner:
        """Return who trains the study's trials, in one of so many workers."""
        self._fleet = fleet
        return StackedRunner(study, self, client, stopping)

    def propose(self, trial: LeasedTrial) -> tuple[space.Tree, SuggestedParams]:
        """Return the tree pinned to what the sampler proposes for a trial, and what to write of it."""
        tree = self._study.spec.tree
        trial.read_queued(tree)
        return trial.suggested(partial(space.suggest, tree))

    def seat(self, attempt: Attempt, trial: LeasedTrial, pinned: space.Tree) -> Seat:
        """Make a trial's run of a pinned tree, at epoch 0 or where its checkpoint stands."""
        config = TrainConfig.from_tree(pinned)  # what is refused here is written: the trial ends with its parameters
        accumulation = trial.lease.claim.accumulation
        batch = min(config.training.batch_size, len(self._splits.train.labels))
        if can_halve(batch, accumulation):
            trial.finer_accumulation = 2 * accumulation
        run = self._build(config, trial_seed(self._study.spec.seed, trial.number), accumulation=accumulation)
        trial.learn_costs(lambda: self._costs(run, config))
        checkpoints = CheckpointManager(attempt.study, run, trial)
        checkpoints.resume()
        return Seat(attempt, trial, run, checkpoints, config)

    def executor(self, seat: Seat) -> Executor:
        """Return an empty executor for runs like this one."""
        torch.set_num_threads(seat.config.training.threads)
        if seat.run.accumulation > 1:
            return Loop()
        choice = self._choice(seat)
        if seat.lease.claim.alone:
            choice = choice.limited(1, "after attempts that took their worker along")
        began = seat.run.executors
        if choice.slots == 1 and began and self._study.spec.executor != "loop":
            choice = replace(choice, executor=began[-1])  # the curve stays of one piece
        log.info("%s, slots %d: %s", choice.executor, choice.slots, choice.why, extra={"action": "executor"})
        return choice.build(seat.run)

    def _choice(self, seat: Seat) -> Choice:
        if seat.stack_key not in self._choices:
            spec = self._study.spec
            if len(self._choices) >= MANY_PARTITIONS:
                why = f"more than {MANY_PARTITIONS} architectures, batch sizes, ...: few trials have one in common"
                return Choice(executor="loop", slots=1, why=why)
            found = choose(spec, seat.config, self._splits, self._folder, self._device)
            self._choices[seat.stack_key] = spread(found, spec, budget=self._study.budget, fleet=self._fleet)
        return self._choices[seat.stack_key]

    def _build(self, config: TrainConfig, seed: int, *, accumulation: int) -> Run:
        return assemble.build_run(config, self._splits, seed, self._folder, self._device, accumulation=accumulation)

    def _costs(self, run: Run, config: TrainConfig) -> dict[str, float]:
        """Return what the model of a run costs, as far as the study's trials are judged by it."""
        spec = self._study.spec
        return costs.measure(
            spec.goals.costs,
            run,
            threads=config.training.threads,
            device=assemble.device_name(self._device),
            code=usercode.digest(spec.code_references, self._folder),
        )

    def receipt_of(self, seat: Seat) -> TrialReceipt:
        """Return what a trial is being made from, once its executor has it."""
        found = receipt(
            folder=self._folder,
            device=assemble.device_name(self._device),
            threads=seat.config.training.threads,
            executor="+".join(dict.fromkeys(seat.run.executors)),
            accumulation=seat.run.accumulation,
            seed=seat.run.seed,
            parameters=sum(parameter.numel() for parameter in seat.run.model.parameters()),
            split_seed=self._study.spec.seed,
            data_digest=self._splits.digest,
        )
        return TrialReceipt(claim=seat.lease.claim, receipt=found, stack_key=seat.stack_key)

    def halve(self, stack_key: str) -> None:
        """Make stacks of this key of half the slots from now on, in every process on this machine."""
        untried = Choice(executor="loop", slots=1, why="memory ran out while a stack was tried")
        choice = self._choices.get(stack_key, untried)
        self._choices[stack_key] = choice.limited(max(1, choice.slots // 2), "since memory ran out")
        remember(self._choices[stack_key], self._study.spec, stack_key, self._folder, self._device)

    def train_alone(self, stack_key: str) -> None:
        """Train the trials of this key one by one from now on, in this process."""
        self._choices[stack_key] = self._choices[stack_key].limited(1, "since a stack broke up")
