"""Builds a run from a pinned config: loads its data and builds its model, optimizer and schedule.

The search, the final training, the replay and `hpo check` all use this module, so a config means the same everywhere.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from hpo import data, models
from hpo.errors import SpecError, shown
from hpo.spec import metrics, space, usercode
from hpo.spec.space import Tree
from hpo.spec.study_file import StudySpec
from hpo.spec.training import Part, TrainConfig
from hpo.train import eval_metrics
from hpo.train.batches import steps_per_epoch
from hpo.train.build import registry
from hpo.train.build.shape import shape_of
from hpo.train.inputs import endless_batches
from hpo.train.monitors import Watch
from hpo.train.optim import losses, param_groups, warmup
from hpo.train.optim.losses import Loss
from hpo.train.optim.penalties import Penalties
from hpo.train.optim.schedules import Schedule
from hpo.train.randomness import MaskRule, initial_model
from hpo.train.run import Run

RGB = 3  # channels
SIDES = " ([channels, height, width])"
OUTPUT = {"classification": "class", "binary": "label", "multilabel": "label", "regression": "target"}
PREPARING_BATCH = 128  # rows per batch of a model's preparation: lsuv, or a step of the autoencoder


def load_splits(config: TrainConfig, split_seed: int, folder: Path, device: torch.device) -> data.Splits:
    """Return the training and validation split of the config's data on the device. The test split stays sealed."""
    return split(config, load_source(config, folder), split_seed, device)


def data_digest(config: TrainConfig, split_seed: int, folder: Path) -> str:
    """Return the digest of the training and validation split of the config's data."""
    return load_splits(config, split_seed, folder, torch.device("cpu")).digest


def load_source(config: TrainConfig, folder: Path) -> data.Source:
    """Return the config's data before the split."""
    return registry.call("data", config.data, folder)  # type: ignore[no-any-return]


def split(config: TrainConfig, source: data.Source, split_seed: int, device: torch.device) -> data.Splits:
    """Return the training and validation split of a config's source; SpecError if it cannot be split."""
    try:
        return data.load(source, split_seed=split_seed, device=device)
    except ValueError as error:
        raise SpecError(f"data {config.data.name}: {error}") from error


def load_test(config: TrainConfig, split_seed: int, folder: Path, device: torch.device) -> data.Split:
    """Return the test split. Only `hpo.final` may call this."""
    return data.load_test(load_source(config, folder), split_seed=split_seed, device=device)


def check_images(config: TrainConfig, splits: data.Splits) -> None:
    """Raise SpecError if the config's augmentation does not fit the data."""
    if splits.kind != "image" or data.some(splits.train.inputs).dtype != torch.uint8:
        if named := sorted(config.augment.model_fields_set):
            raise SpecError(
                f"augment.{named[0]} = {shown(getattr(config.augment, named[0]))}: the data has no images of whole "
                "numbers from 0 to 255, and only such are augmented; remove [augment]"
            )
        return
    channels, *sides = data.some(splits.train.inputs).shape[1:]
    if config.augment.crop >= min(sides):
        raise SpecError(
            f"augment.crop = {config.augment.crop}: moves images of {sides[0]}x{sides[1]} pixels out of view; "
            f"give at most {min(sides) - 1}, better a few pixels"
        )
    for name in ("saturation", "hue"):
        value = getattr(config.augment, name)
        if value and channels != RGB:
            raise SpecError(
                f"augment.{name} = {value}: the images have {channels} channel{'s' if channels > 1 else ''}, but only images "
                f"with {RGB} have colours; remove it"
            )


def build_run(
    config: TrainConfig,
    splits: data.Splits,
    seed: int,
    folder: Path,
    device: torch.device,
    *,
    accumulation: int = 1,
    dtype: torch.dtype | None = None,
    by_step: bool = False,
    masks: MaskRule | None = None,
) -> Run:
    """Return the run of a config at epoch 0; SpecError if it cannot be built or does not fit the data.

    Args:
        splits: training and validation data.
        seed: the trial's seed.
        folder: folder of the study file.
        device: device of the model.
        accumulation: micro-batches per batch.
        dtype: number type of the weights; None: the model's own.
        by_step: whether loss and norms of every step are kept in `Run.monitor`.
        masks: how dropout masks are drawn; None: as is best on the device.
    """
    check_images(config, splits)
    training = config.training
    check_sampling(config, splits)
    loss = build_loss(config.loss, splits, folder, device)
    outputs = splits.outputs * losses.outputs_per_target(loss)

    def build() -> nn.Module:
        model = registry.call("model", config.model, folder, shape_of(splits), outputs)
        try:
            return models.prepare(model, endless_batches(splits, PREPARING_BATCH))
        except ValueError as error:
            raise SpecError(f"model {config.model.name}: {error}") from error

    model = initial_model(build, seed)  # on the CPU
    if device.type != "cpu" or dtype is not None:
        model = model.to(device, dtype)
    steps = steps_per_epoch(len(splits.train.targets), training.batch_size)
    optimizer = registry.call("optimizer", config.optimizer, folder, model)
    param_groups.set_rates(optimizer)
    return Run(
        model=model,
        optimizer=optimizer,
        schedule=schedule_of(config, steps, folder),
        splits=splits,
        epochs=training.epochs,
        batch_size=training.batch_size,
        sampling=training.sampling or "shuffled",
        seed=seed,
        precision=training.precision,
        accumulation=accumulation,
        augment=data.Strength(**config.augment.model_dump()),
        clip_norm=training.clip_norm,
        clip_value=training.clip_value,
        loss=loss,
        penalised=Penalties(l1=training.l1 or 0.0, l2=training.l2 or 0.0, max_norm=training.max_norm),
        averaging=registry.call("averaging", config.averaging, folder),
        sam_rho=config.sam.rho,
        stopping=config.stopping if config.stopping.model_fields_set else None,
        watch=_watch(config, by_step=by_step),
        masks=masks,
    )


def _watch(config: TrainConfig, *, by_step: bool) -> Watch:
    """Return what a config's run measures: what `watch` names, and what its stopping rules need."""
    watch = config.watch
    return Watch(
        metrics=tuple(metrics.further(watch.metrics)),
        norms=watch.norms or by_step or config.stopping.gradient_norm is not None,
        noise=watch.noise,
        resources=watch.resources,
        by_step=by_step,
    )


def schedule_of(config: TrainConfig, steps: int, folder: Path) -> Schedule:
    """Return the config's schedule, after its warm-up if it has one.

    Args:
        steps: optimizer steps per epoch.
    """
    length = steps * (config.training.schedule_epochs or config.training.epochs)
    if config.warmup is None:
        return registry.call("schedule", config.schedule, folder, length)  # type: ignore[no-any-return]
    lengths = warmup.Lengths(schedule=length, epoch=steps)
    warming = registry.prepared("warmup", config.warmup, folder, lengths)
    schedule = registry.call("schedule", config.schedule, folder, length - warming)
    if not warming:
        return schedule  # type: ignore[no-any-return]
    return warmup.before(schedule, warming, registry.call("warmup", config.warmup, folder, lengths))


def check_metrics(spec: StudySpec, config: TrainConfig, splits: data.Splits) -> None:
    """Raise SpecError if a metric that a study judges, measures or monitors does not go with the data's task."""
    named = {
        "metric" if not spec.objectives else "the first of [objectives]": spec.metric,
        "stopping.monitor": config.stopping.monitor,
    }
    for path, name in named.items():
        eval_metrics.check(path, filter(None, [name]), splits.task, splits.num_classes)
    eval_metrics.check("watch.metrics", config.watch.metrics, splits.task, splits.num_classes)


def check_sampling(config: TrainConfig, splits: data.Splits) -> None:
    """Raise SpecError if balanced batches are wanted of data without classes."""
    if config.training.sampling == "balanced" and splits.task not in ("classification", "binary"):
        raise SpecError(
            f'training.sampling = "balanced": needs one class for each {splits.unit}, but the task of the data is '
            f"{splits.task}; remove it"
        )


def build_loss(part: Part | None, splits: data.Splits, folder: Path, device: torch.device) -> Loss:
    """Return a loss by name, or the task's own, tested on two rows; SpecError if it is not a loss for these targets."""
    part = part or Part(name=losses.BY_TASK[splits.task], options={}, paths={})
    _refuse_another_task(part, splits)
    loss = registry.call("loss", part, folder)
    try:
        loss = losses.weighted(loss, splits.train.targets, splits.outputs)
    except ValueError as error:
        raise SpecError(f"loss {part.name}: {error}") from error
    outputs = splits.outputs * losses.outputs_per_target(loss)
    try:
        return losses.try_out(loss, outputs, _two_targets(splits), device)
    except Exception as error:  # a user's own loss may raise anything
        raise SpecError(f"loss {part.name}: {type(error).__name__}: {error}") from error


def _refuse_another_task(part: Part, splits: data.Splits) -> None:
    """Raise SpecError if one of our losses does not go with the data's task."""
    if part.name not in losses.TASKS:
        return
    if splits.task not in losses.TASKS[part.name]:
        raise SpecError(
            f'loss.name = "{part.name}": does not go with the task of the data, {splits.task}; take one of '
            f"{', '.join(losses.for_task(splits.task))}, or leave [loss] out for {losses.BY_TASK[splits.task]}"
        )
    if splits.task == "regression" and (smoothing := part.options.get("label_smoothing")):
        path = part.paths.get("label_smoothing", "loss.label_smoothing")
        raise SpecError(f"{path} = {smoothing}: the data has no labels but numbers, which are not smoothed; remove it")


def _two_targets(splits: data.Splits) -> torch.Tensor:
    """Return targets of two rows: the first and the last class, or those of the first row."""
    if splits.task == "classification":
        return torch.tensor([0, splits.num_classes - 1])
    return splits.train.targets[:1].expand(2, -1)


def try_out(spec: StudySpec, splits: data.Splits, folder: Path, device: torch.device) -> None:
    """Raise SpecError if the metric, or a part of a training in the search space, does not work with this data.

    So the fault is found before it costs a trial.
    """
    tree = spec.tree
    for variant in space.variants(tree):
        config = TrainConfig.from_tree(variant)
        check_metrics(spec, config, splits)
        check_images(config, splits)
        check_sampling(config, splits)
    try_models(tree, splits, folder)
    try_losses(tree, splits, folder, device)


def try_models(tree: Tree, splits: data.Splits, folder: Path) -> None:
    """Build every one of our models at each end of the space, without memory for its weights.

    SpecError lists the models that cannot be built. Reasons are images that are too small, widths that do not fit or
    would need terabytes, and missing files of weights.
    """
    problems: dict[str, None] = {}
    for variant in space.variants({"model": tree["model"]}):
        part = Part.from_tree("model", variant["model"])
        if part.name not in models.MODELS:
            continue  # a user's own may compute with its weights when it is built
        try:
            registry.without_memory(part, folder, shape_of(splits), splits.outputs)
        except SpecError as error:
            problems |= dict.fromkeys(error.lines)
    if problems:
        raise SpecError(*problems)


def try_own_model(run: Run, name: str) -> None:
    """Raise SpecError if a user's own model fails on two rows of this data, or its loss fails on the model's output.

    The run is not to be trained afterwards: the forward pass may have changed its model.

    Args:
        run: a new run.
        name: the model's name.
    """
    if name in models.MODELS:
        return
    rows = next(run.validation_inputs.split(2))
    outputs = run.splits.outputs * losses.outputs_per_target(run.loss)
    count = len(data.some(rows))
    targets = _two_targets(run.splits)[-count:].to(run.device)
    shape = data.each(rows, lambda one: list(one.shape[1:]))
    try:
        with torch.no_grad():
            output = run.model.eval()(rows)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the user's own code may raise anything
        said = f"{type(error).__name__}: {error}{usercode.where(error)}"
        raise SpecError(
            f"model {name}: fails on {run.splits.unit}s of {shape}{SIDES if run.splits.kind == 'image' else ''}: {said}"
        ) from error
    try:
        run.loss(output, targets)
    except Exception as error:  # likewise
        got = f"a tensor {list(output.shape)}" if isinstance(output, torch.Tensor) else f"a {type(output).__name__}"
        said = f"{type(error).__name__}: {str(error).rstrip('.')}"
        raise SpecError(
            f"model {name}: returns {got} for {count} {run.splits.unit}s, on which the loss fails: {said}; "
            f"return a tensor {[count, outputs]}, one number for each {run.splits.unit} and {OUTPUT[run.splits.task]}"
        ) from error


def try_losses(tree: Tree, splits: data.Splits, folder: Path, device: torch.device) -> None:
    """Raise SpecError if a loss in the search space does not work with this data."""
    for variant in space.variants({key: tree[key] for key in tree.keys() & {"loss"}}):
        for section, part in variant.items():
            build_loss(Part.from_tree(section, part), splits, folder, device)
