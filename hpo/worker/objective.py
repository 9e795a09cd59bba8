"""The declared objective: a trial becomes a config, and the config becomes a run. Torch is imported here."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import torch

from hpo.data import Splits
from hpo.queue.start import SuggestedParams, TrialReceipt
from hpo.receipt import receipt
from hpo.spec import seeds, space, usercode
from hpo.spec.training import Part, TrainConfig
from hpo.storage.tables import FOLD_KEY
from hpo.study import study as studies
from hpo.study.interval import IMAGES_KEY, TASK_KEY, TEST_IMAGES_KEY
from hpo.study.study import Study
from hpo.train import devices
from hpo.train.batches import can_halve
from hpo.train.build import assemble, costs
from hpo.train.build.executor import Choice, Executor, choose, remember, spread, stack_key_of
from hpo.train.build.graph_check import with_graph
from hpo.train.loop import Loop
from hpo.train.run import Run
from hpo.worker.attempt import Attempt
from hpo.worker.checkpoints import CheckpointManager
from hpo.worker.client import QueueClient
from hpo.worker.gpu_share import gpu_sharers
from hpo.worker.stacked_runner import StackedRunner

log = logging.getLogger(__name__)
MANY_PARTITIONS = 16  # stack keys that a worker measures at most
OF_FOLD = " fold "  # in a stack key; a stack has the data of one fold, but each fold is trained in the same way
FOLDS_KEPT = 2  # splits in memory for trials of other folds than the study's
LOST = (
    3  # stack keys of one model that are slower than the loop, before any is faster; others of it are not measured then
)


def declared(study: Study, folder: Path) -> Declared:
    """Return the objective of a declared study. The data is loaded here, once.

    Raises MismatchError if the study was made with other data.
    """
    device = devices.pick()
    first = TrainConfig.from_tree(next(space.variants(study.spec.tree)))
    log.info("preparing the data: %s", first.data.name)
    splits = assemble.load_splits(first, study.spec.split_seed, folder, device)
    studies.check_data(study, splits.digest)
    for note in splits.notes:
        log.warning("data: %s", note, extra={"action": "data"})
    log.info("trying out the model and its parts")
    assemble.try_out(study.spec, splits, folder, device)
    # A model that cannot be built or applied must not fail a trial.
    run = assemble.build_run(first, splits, seed=0, folder=folder, device=device)
    assemble.try_own_model(run, first.model.name)
    return Declared(study, splits, folder, device)


class Declared:
    """The trainer of a declared study in this process."""

    def __init__(self, study: Study, splits: Splits, folder: Path, device: torch.device) -> None:
        self._study = study
        self._splits = splits
        self._folder = folder
        self._device = device
        self._choices: dict[str, Choice] = {}
        self._slots_of: dict[str, list[int]] = {}  # measured, for each stack key of a model
        self._fleet = 1
        self._sharers = gpu_sharers()
        self._splits_of_fold = lru_cache(FOLDS_KEPT)(self._load_fold)

    def runner(self, study: Study, client: QueueClient, fleet: int) -> StackedRunner:
        """Return the runner of the study's trials.

        Args:
            fleet: the run's number of workers.
        """
        self._fleet = fleet
        return StackedRunner(study, self, client)

    def propose(self, attempt: Attempt) -> SuggestedParams:
        """Pin the study's tree to the sampler's suggestions for a trial. Return the suggestions, which the caller writes."""
        tree = self._study.spec.tree
        attempt.trial.read_queued(tree)
        attempt.pinned, given = attempt.trial.suggested(partial(space.suggest, tree))
        return given

    def build(self, attempt: Attempt) -> None:
        """Build a trial's run from its pinned tree, and load its checkpoint if there is one."""
        config = TrainConfig.from_tree(attempt.pinned)  # the parameters are already written if this refuses them
        accumulation = attempt.lease.claim.accumulation
        fold = attempt.trial.user_attrs.get(FOLD_KEY)
        splits = self._splits if fold is None else self._splits_of_fold(fold)
        batch = min(config.training.batch_size, len(splits.train.targets))
        if can_halve(batch, accumulation):
            attempt.finer_accumulation = 2 * accumulation
        seed = seeds.of_trial(self._study.spec.seed, attempt.number, attempt.trial.user_attrs)
        run = self._run_of(config, splits, seed, accumulation=accumulation)
        attempt.trial.learn_costs(lambda: self._costs(run, config))
        attempt.config, attempt.run = config, run
        attempt.stack_key = stack_key_of(run, config.training) + ("" if fold is None else f"{OF_FOLD}{fold}")
        attempt.checkpoints = CheckpointManager(attempt.study, run, attempt.trial)
        attempt.checkpoints.resume()

    def executor(self, attempt: Attempt) -> Executor:
        """Return an empty executor for runs like this one."""
        torch.set_num_threads(attempt.config.training.threads)
        if attempt.run.accumulation > 1:
            return Loop()
        choice = self._choice(attempt)
        if attempt.lease.claim.alone:
            choice = choice.limited(1, "after failures that count for all trials of a worker")
        began = attempt.run.executors
        if choice.slots == 1 and began and self._study.spec.executor != "loop":
            # One executor trains the whole curve. A graph was tried with another one.
            choice = replace(choice, executor=began[-1], captures=choice.captures and began[-1] == choice.executor)
        log.info("%s, slots %d: %s", choice.executor, choice.slots, choice.why, extra={"action": "executor"})
        if choice.graph:
            log.info(
                "%s graph: %s", "with a" if choice.captures else "without a", choice.graph, extra={"action": "executor"}
            )
        return choice.build(attempt.run)

    def _choice(self, attempt: Attempt) -> Choice:
        key = attempt.stack_key.partition(OF_FOLD)[0]
        if key not in self._choices:
            spec = self._study.spec
            if len(self._choices) >= MANY_PARTITIONS:
                why = (
                    f"more than {MANY_PARTITIONS} kinds of stack (architecture, batch size, ...): few trials share one"
                )
                return Choice(executor="loop", slots=1, why=why)
            if self._is_lost(model := attempt.config.model.name):
                why = f"no stack of the first {LOST} architectures of {model} was faster"
                return Choice(executor="loop", slots=1, why=why)
            found = choose(spec, attempt.config, self._splits, self._folder, self._device, sharers=self._sharers)
            self._slots_of.setdefault(model, []).append(found.slots)
            limited = spread(found, spec, budget=self._study.budget, fleet=self._fleet)
            runs = self._study.budget / (self._fleet * (len(self._choices) + 1))  # kinds of stack share the budget
            known = (spec, attempt.config, attempt.run, self._folder, self._device)
            self._choices[key] = with_graph(limited, *known, runs=runs)
        return self._choices[key]

    def _is_lost(self, model: str) -> bool:
        """Return whether measuring more architectures of a model costs more than a stack may save."""
        spec, found = self._study.spec, self._slots_of.get(model, [])
        return spec.executor == spec.slots == "auto" and len(found) >= LOST and max(found) == 1

    def _run_of(self, config: TrainConfig, splits: Splits, seed: int, *, accumulation: int) -> Run:
        return assemble.build_run(config, splits, seed, self._folder, self._device, accumulation=accumulation)

    def _load_fold(self, fold: int) -> Splits:
        """Return the study's training and validation part at another fold. The test part is the same."""
        tree = next(space.variants(self._study.spec.tree))
        source = Part.from_tree("data", tree["data"])
        config = TrainConfig.from_tree({**tree, "data": {"name": source.name, **source.options, "fold": fold}})
        log.info("preparing fold %d of the data", fold)
        return assemble.load_splits(config, self._study.spec.split_seed, self._folder, self._device)

    def _costs(self, run: Run, config: TrainConfig) -> dict[str, float]:
        """Return the costs of a run's model that the study has as objectives or constraints."""
        spec = self._study.spec
        return costs.measure(
            spec.goals.costs,
            run,
            threads=config.training.threads,
            device=devices.name(self._device),
            code=usercode.digest(spec.code_references, self._folder),
        )

    def receipt_of(self, attempt: Attempt) -> TrialReceipt:
        """Return the receipt of a trial that an executor holds."""
        found = receipt(
            folder=self._folder,
            device=devices.name(self._device),
            threads=attempt.config.training.threads,
            executor="+".join(dict.fromkeys(attempt.run.executors)),
            masks=attempt.run.randomness.rule,
            accumulation=attempt.run.accumulation,
            seed=attempt.run.seed,
            parameters=sum(parameter.numel() for parameter in attempt.run.model.parameters()),
            split_seed=self._study.spec.split_seed,
            data_digest=attempt.run.splits.digest,
            **{
                IMAGES_KEY: len(attempt.run.splits.validation.targets),
                TEST_IMAGES_KEY: attempt.run.splits.test_count,
                TASK_KEY: attempt.run.splits.task,
            },
        )
        return TrialReceipt(claim=attempt.lease.claim, receipt=found, stack_key=attempt.stack_key)

    def halve(self, stack_key: str) -> None:
        """Halve the slots of later stacks of this key, in every process on this machine."""
        key = stack_key.partition(OF_FOLD)[0]
        untried = Choice(executor="loop", slots=1, why="memory ran out while a stack was measured")
        choice = self._choices.get(key, untried)
        self._choices[key] = choice.limited(max(1, choice.slots // 2), "since memory ran out")
        remember(self._choices[key], self._study.spec, key, self._folder, self._device, sharers=self._sharers)

    def train_alone(self, stack_key: str) -> None:
        """Train the trials of this key one by one from now on, in this process."""
        key = stack_key.partition(OF_FOLD)[0]
        self._choices[key] = self._choices[key].limited(1, "since a stack failed")
