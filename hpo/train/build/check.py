"""Preview of a study file for `hpo check`: its space, its model, one measured epoch, the cost of the budget.

It also has the one lint that needs torch. It trains a few steps at both ends of a parameter to find one without effect.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchinfo

from hpo import data
from hpo.models.transfer import reuse
from hpo.spec import seeds, space, usercode
from hpo.spec.space import Choices, Parameter, Tree
from hpo.spec.study_file import StudySpec
from hpo.spec.training import TrainConfig
from hpo.train import devices
from hpo.train.batches import steps_per_epoch
from hpo.train.build import assemble, costs, executor, graph_check, range_types, registry
from hpo.train.build.executor import Choice
from hpo.train.epoch import EpochResult
from hpo.train.loop import train
from hpo.train.optim.schedules import CurveSchedule

STEPS = 100  # steps per epoch when the rates of schedules are compared
ACTS_LATER = {"model.unfreeze_every"}  # acts between epochs, but a test has only one epoch
TRIED_STEPS = 3  # steps of a test; momentum acts from the second on


@dataclass(frozen=True, kw_only=True)
class Findings:
    """The results of `hpo check` for a study file."""

    parameters: dict[str, Parameter]
    data: data.Overview
    model: str  # torchinfo's table
    weights: str | None  # which pre-trained weights the model has; None if none
    epoch: EpochResult  # the measured epoch, in the middle of the space
    device: str
    longest_trial_epochs: int
    choice: Choice  # executor and slots, in the middle of the space
    untyped: list[str]  # a line for each range whose option has no annotated type, so that its notation decides
    unused: list[str]  # a line for each parameter without effect
    costs: dict[str, float]  # costs that are objectives or bounds, in the middle of the space

    def budget_seconds(self, trials: int, workers: int) -> float:
        """Return the wall-clock seconds of the budget without pruning, one trial after the other in each worker."""
        return trials * self.longest_trial_epochs * self.epoch.seconds / workers


def examine(spec: StudySpec, folder: Path, workers: int, *, sharers: int = 1, sheet: Path | None = None) -> Findings:
    """Load the data, train one epoch in the middle of the space, choose its executor, and find unused parameters.

    SpecError if the study cannot run.

    Args:
        folder: folder of the study file.
        workers: number of workers that will share the budget.
        sharers: how many of them will share a device.
        sheet: PNG file to write, with training images of each class.
    """
    tree = spec.tree
    device = devices.pick()
    config = TrainConfig.from_tree(space.middle(tree, {}))
    source = assemble.load_source(config, folder)
    splits = assemble.split(config, source, spec.split_seed, device)
    if sheet is not None:
        data.contact_sheet(splits, sheet)
    assemble.try_out(spec, splits, folder, device)
    seed = seeds.derive(spec.seed, "check")
    torch.set_num_threads(config.training.threads)
    run = assemble.build_run(config, splits, seed, folder, device)
    taken_over = reuse(run.model)
    assemble.try_own_model(run, config.model.name)
    run = assemble.build_run(config, splits, seed, folder, device)
    table = torchinfo.summary(run.model, input_data=[next(run.inputs.split(run.batch_size))], verbose=0, device=device)
    run = assemble.build_run(config, splits, seed, folder, device)  # a new one, since torchinfo ran the first forward
    measured = costs.measure(
        spec.goals.costs,
        run,
        threads=config.training.threads,
        device=devices.name(device),
        code=usercode.digest(spec.code_references, folder),
    )
    epochs = tree["training"]["epochs"]
    chosen = executor.choose(spec, config, splits, folder, device, sharers=sharers)
    limited = executor.spread(chosen, spec, budget=spec.budget.trials, fleet=workers)
    choice = graph_check.with_graph(limited, spec, config, run, folder, device, runs=spec.budget.trials / workers)
    return Findings(
        parameters=dict(space.parameters(tree)),
        data=data.overview(source, splits, split_seed=spec.split_seed),
        model=str(table),
        weights=None if taken_over is None else str(taken_over),
        epoch=next(train(run)),
        device=devices.name(device),
        choice=choice,
        longest_trial_epochs=int(max(space.ends_of(epochs))),
        untyped=list(range_types.untyped(tree, registry.option_models(folder))),
        unused=list(unused(tree, splits, seed, folder, device)),
        costs=measured,
    )


def unused(tree: Tree, splits: data.Splits, seed: int, folder: Path, device: torch.device) -> Iterator[str]:
    """Yield a line for each parameter of a part whose two ends train to the same weights.

    It is tested in the middle of the space, and then with each choice of the part's other parameters. For
    example, a slope has an effect with one activation only.
    """
    for path, parameter in space.parameters(tree):
        section, *inside = path.split(".")
        if (
            path in ACTS_LATER
            or section in ("training", "stopping")
            or inside == ["name"]
            or len(set(map(str, parameter.ends()))) < 2
        ):
            continue
        branch = {f"{section}.name": inside[0]} if len(inside) > 1 else {}
        ends = (parameter.ends()[0], parameter.ends()[-1])

        def is_idle(
            taken: dict[str, Any], path: str = path, section: str = section, ends: tuple[Any, Any] = ends
        ) -> bool:
            configs = [TrainConfig.from_tree(space.middle(tree, {**taken, path: end})) for end in ends]
            marks = [_mark(config, section, splits, seed, folder, device) for config in configs]
            return bool(marks[0] == marks[1])

        if is_idle(branch) and all(is_idle(branch | other) for other in _choices_beside(tree, section, path)):
            yield f"{path} = {parameter}: has no effect on a training; nothing uses it, remove it"


def _choices_beside(tree: Tree, section: str, path: str) -> Iterator[dict[str, Any]]:
    """Yield each choice of the section's other parameters except the name."""
    for other, parameter in space.parameters({section: tree[section]}):
        if isinstance(parameter, Choices) and other not in (path, f"{section}.name"):
            yield from ({other: option} for option in parameter.options)


def _mark(
    config: TrainConfig, section: str, splits: data.Splits, seed: int, folder: Path, device: torch.device
) -> list[Any]:
    """Return what a parameter of this section must change to have an effect.

    For a schedule or warm-up these are the rates, or the options if the rates depend on a curve. For an averaging it is
    which weights are taken, and their shares. For all other sections these are the trained weights.
    """
    if section in ("schedule", "warmup"):
        schedule = assemble.schedule_of(config, STEPS, folder)
        if isinstance(schedule, CurveSchedule):
            return [config.schedule.options, config.warmup and config.warmup.options]
        return [schedule(step) for step in range(STEPS * config.training.epochs)]
    if section == "averaging":
        averaging, epochs = registry.call("averaging", config.averaging, folder), config.training.epochs
        steps = epochs * steps_per_epoch(len(splits.train.targets), config.training.batch_size)
        begins = [averaging.has_begun(epoch, epochs) for epoch in range(1, epochs + 1)]
        return [averaging.every, begins, [averaging.share(count) for count in range(1, steps + 1)]]
    few = _few(splits.train, TRIED_STEPS * config.training.batch_size)
    run = assemble.build_run(config, dataclasses.replace(splits, train=few, validation=few), seed, folder, device)
    next(train(run))
    return [value.tolist() for value in run.model.state_dict().values()]


def _few(split: data.Split, count: int) -> data.Split:
    """Return at most `count` rows from all over a split, since rows may be sorted by their targets."""
    whole = len(split.targets)
    few = min(count, whole)
    rows = torch.arange(few) * whole // few
    inputs = split.inputs
    chosen = {name: one[rows] for name, one in inputs.items()} if isinstance(inputs, dict) else inputs[rows]
    return data.Split(inputs=chosen, targets=split.targets[rows])
