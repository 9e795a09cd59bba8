"""The final training: trains a pinned config from scratch, saves the weights and opens the test split once at the end.

The replay repeats a trial and compares its curves with those in the config's receipt. Both use the training loop of the search,
so a config means the same. This is the only module that opens the test split.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pydantic
import torch
from annotated_types import Ge

from hpo import data
from hpo.errors import CheckpointError, SpecError, StudyError, located
from hpo.files import atomic_write, read_json, write_json
from hpo.final import trajectory
from hpo.final.tensorboard import Boards
from hpo.receipt import receipt
from hpo.spec import options, seeds, space
from hpo.spec.metrics import of_test
from hpo.spec.program import Command
from hpo.spec.study_file import SPLIT_FORMAT, SPLIT_SEED, StudySpec
from hpo.spec.training import TrainConfig
from hpo.study.interval import IMAGES_KEY, TASK_KEY, TEST_IMAGES_KEY
from hpo.text import command, quoted
from hpo.train import checkpoint, devices, validation
from hpo.train.batches import most_pieces
from hpo.train.build import assemble, executor, registry
from hpo.train.build.executor import Choice
from hpo.train.early_stopping import overfits_since
from hpo.train.epoch import EpochResult
from hpo.train.randomness import MaskRule, mask_rule
from hpo.train.run import Run

CHECKPOINT = "checkpoint.pt"
WEIGHTS = "weights.pt"
METRICS = "metrics.json"
CONFIG = "config.toml"
SEVERAL = "seeds.json"  # in the common folder of trainings with several seeds
SAVE_SECONDS = 1.0  # from one checkpoint to the next, at the end of an epoch; a kill costs at most this and an epoch
IN_UNITS = ("validation_mae", "validation_rmse")  # of the data, which may be far below 1
TOLERANCE = 5e-3  # of losses and accuracies between executors: Adam amplifies rounding errors (docs/decisions.md)


class Receipt(pydantic.BaseModel):
    """The keys of a pinned config's receipt that are used here, for checking their types."""

    model_config = pydantic.ConfigDict(frozen=True, strict=True)

    study: str = ""
    study_uid: str = ""
    storage: str = ""
    code_folder: str = ""
    state: str = ""
    executor: Annotated[str, pydantic.StringConstraints(pattern=r"^(loop|stack|vmap)(\+(loop|stack|vmap))*$")] = "loop"
    trial: Annotated[int, Ge(0)] = 0
    trials_tried: Annotated[int, Ge(0)] = 0
    seed: Annotated[int, Ge(0)] = 0
    split_seed: Annotated[int, Ge(0)] = 0
    accumulation: Annotated[int, Ge(1)] = 1
    masks: MaskRule = "generator"
    value: float | None = None
    values: dict[str, float] = {}
    curves: dict[str, list[float]] = {}


@dataclass(frozen=True, kw_only=True)
class FinalTraining:
    """A pinned config that is ready to train."""

    path: Path
    spec: StudySpec
    config: TrainConfig
    folder: Path
    seed: int
    device: torch.device
    splits: data.Splits
    accumulation: int  # micro-batches per batch
    executor: str = "loop"  # the executor of the receipt's trial; several in a row are joined by "+"
    masks: MaskRule = "generator"  # how dropout masks are drawn

    @property
    def identity(self) -> str:
        """The SHA-256 of the config without its receipt, the seed, the micro-batches, the executor and the rule of masks."""
        # Default values of the last three add nothing, so that folders of earlier versions keep their identity.
        made_of = [self.spec.identity, self.seed, *([self.accumulation] if self.accumulation != 1 else [])]
        made_of += [self.executor] if self.executor != "loop" else []
        made_of += [{"masks": self.masks}] if self.masks != "generator" else []
        return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()

    def run(self, *, by_step: bool = False) -> Run:
        """Return the run at epoch 0.

        Args:
            by_step: measure the norms of parameters and gradients in every step.
        """
        return assemble.build_run(
            self.config,
            self.splits,
            self.seed,
            self.folder,
            self.device,
            accumulation=self.accumulation,
            by_step=by_step,
            masks=self.masks,
        )

    def epochs(self, run: Run, stop: Callable[[], bool] = lambda: False) -> Iterator[EpochResult]:
        """Train the run with the executor of the receipt's trial. If the trial had several executors, the loop is used."""
        choice = Choice(executor=self.executor if "+" not in self.executor else "loop", slots=1, why="a receipt")
        return executor.train(choice.build(run), run, stop)

    @property
    def repeats_exactly(self) -> bool:
        """Whether the trial's curve repeats bit for bit on the same CPU type.

        It does for the loop, and for a stack on the CPU with one thread. It does not after a change of executors.
        """
        one_thread = self.device.type == "cpu" and self.config.training.threads == 1
        return self.executor == "loop" or (self.executor == "stack" and one_thread)


def load_pinned(path: Path) -> StudySpec:
    """Read a pinned config; SpecError lists the ranges and choices that are not pinned."""
    if not path.exists():
        raise SpecError(f"{path}: no such file; `hpo export STUDY -o {quoted(path)}` writes one")
    spec = StudySpec.load(path)
    try:
        Receipt.model_validate(spec.receipt)
    except pydantic.ValidationError as error:
        lines = options.explain(error, {key: f"receipt.{key}" for key in spec.receipt}, "receipt", Receipt)
        raise SpecError(*(f"{path}: {line}" for line in lines)) from None
    if spec.objective or spec.is_pinned:
        return spec
    left = [f"{path}: {name} = {found}: is not pinned" for name, found in space.parameters(spec.tree)]
    mend = f"{path}: search it with `{command('run', path)}`, or write one value for each of these"
    raise SpecError(*left, mend)


def prepare(path: Path, *, seed: int | None = None, code_folder: Path | None = None) -> FinalTraining:
    """Read a pinned config and load its data.

    The seed is the given one, else the receipt's, which repeats the trial, else it is derived from the config's seed. The
    receipt's number of micro-batches is used with any seed, since a whole batch did not fit into memory.

    Args:
        path: the config.
        seed: the seed; by default the trial's.
        code_folder: the folder of the user's code; found by `find_code_folder` by default.

    Raises SpecError if the config has ranges left or cannot be trained.
    """
    spec = load_pinned(path)
    folder = code_folder or find_code_folder(spec, path)
    config = registry.read(spec.tree, folder)
    torch.set_num_threads(config.training.threads)
    device = devices.pick()
    splits = assemble.load_splits(config, spec.split_seed, folder, device)
    with located(path):
        assemble.check_metrics(spec, config, splits)
    stored, accumulation = spec.receipt.get("seed"), spec.receipt.get("accumulation", 1)
    if accumulation > most_pieces(config.training.batch_size):
        raise SpecError(
            f"{path}: receipt.accumulation = {accumulation}: training.batch_size = {config.training.batch_size} cannot be cut "
            "into so many micro-batches; remove it"
        )
    return FinalTraining(
        path=path,
        spec=spec,
        config=config,
        folder=folder,
        seed=next(s for s in (seed, stored, seeds.derive(spec.seed, "trial", 0)) if s is not None),
        device=device,
        splits=splits,
        accumulation=accumulation,
        executor=spec.receipt.get("executor", "loop"),
        masks=_masks(spec, device),
    )


def _masks(spec: StudySpec, device: torch.device) -> MaskRule:
    """Return how the receipt's trial drew its dropout masks; without a trial, as a new run on this device draws them.

    Receipts of before there were two rules do not say it. Those trials drew from a generator.
    """
    before: MaskRule = "generator" if "seed" in spec.receipt else mask_rule(device)
    said: MaskRule = spec.receipt.get("masks", before)
    return said


def find_code_folder(spec: StudySpec, path: Path) -> Path:
    """Return the folder of a pinned config's user code and data files: the config's folder if all are there, else the study's."""
    beside = path.parent.absolute()
    if spec.command is not None:
        return _command_folder(Command.parse(spec.command), beside, Path(spec.receipt.get("code_folder", beside)))
    files = [reference.partition(":")[0] for reference in spec.code_references]
    code = [file if file.endswith(".py") else file.split(".")[0] for file in files]
    if all((beside / file).exists() for file in [*code, *registry.files(spec)]):
        return beside
    return Path(spec.receipt.get("code_folder", beside))


def _command_folder(command: Command, beside: Path, before: Path) -> Path:
    """Return the config's folder if it has all files that the command names, else the study's."""
    names = [file.relative_to(before) for file in command.files(before)]
    return beside if names and all((beside / name).is_file() for name in names) else before


def describe(training: FinalTraining, count: int | None = None) -> str:
    """Return a line on the training: model, data, optimizer, schedule, epochs, seed, or the number of seeds, and device."""
    seed = f"seed {training.seed}" if count is None else f"{count} seeds"
    config, device = training.config, devices.name(training.device)
    return (
        f"{training.path}: {config.model.name} on {config.data.name}, {config.optimizer.name} with {config.schedule.name} "
        f"schedule, {config.training.epochs} epochs, {seed}, on {device}"
    )


def finished(training: FinalTraining, folder: Path) -> dict[str, Any] | None:
    """Return the metrics of this training if the folder holds it finished, else None."""
    if not (folder / METRICS).exists():
        return None
    metrics = read_json(folder / METRICS)
    return metrics if metrics.get("identity") == training.identity else None


def train(
    training: FinalTraining,
    folder: Path,
    *,
    stop: Callable[[], bool],
    progress: Callable[[EpochResult], None],
    before_test: Callable[[], None],
) -> dict[str, Any] | None:
    """Train to the end, test once, and write weights, metrics and TensorBoard logs. Return the metrics, None if stopped.

    A stopped training continues from its checkpoint at the next call. A training that ends by early stopping is tested too.

    Args:
        training: the training.
        folder: the output folder.
        stop: asked after each batch; true stops the training.
        progress: called after each epoch.
        before_test: called just before the test split is opened.

    Raises StudyError if the folder holds another training, CheckpointError if its checkpoint cannot be read, and SpecError if the
    receipt's trial was chosen on another split.
    """
    refuse_another_split(training)
    if (folder / METRICS).exists():
        raise StudyError(f"{folder}: holds another finished training; name another folder with -o")
    if (folder / SEVERAL).exists():
        raise StudyError(f"{folder}: holds trainings with several seeds; name another folder with -o")
    fitted = fit(training, folder, stop=stop, progress=progress)
    if fitted is None:
        return None
    before_test()
    metrics = finish(fitted, open_test(training))
    (folder / CHECKPOINT).unlink()
    return metrics


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A training whose epochs are all over and whose model is not tested yet. Its checkpoint lies in its folder."""

    training: FinalTraining
    folder: Path
    run: Run
    kept: _Kept


def fit(
    training: FinalTraining, folder: Path, *, stop: Callable[[], bool], progress: Callable[[EpochResult], None]
) -> Fitted | None:
    """Train to the end without a test, from the checkpoint in the folder if there is one. Return None if stopped."""
    found = resumed(training, folder)
    run, kept = found.run, found.kept
    open_folder(training, folder)
    saved_at = time.monotonic()
    with Boards(folder, epochs=run.epoch, steps_per_epoch=run.steps_per_epoch) as boards:
        for result in training.epochs(run, stop):
            kept.take(training, run, result)
            boards.show(result, run.monitor.trajectory(), overfits=kept.overfits_since is not None)
            if time.monotonic() - saved_at >= SAVE_SECONDS:
                boards.flush()  # first: a resumed training does not log again what comes before its checkpoint
                kept.save(training, run, folder / CHECKPOINT)
                saved_at = time.monotonic()
            progress(result)
    kept.save(training, run, folder / CHECKPOINT)
    return found if run.finished else None


def resumed(training: FinalTraining, folder: Path) -> Fitted:
    """Return a training as its checkpoint has it, or at epoch 0 without one.

    Raises StudyError for a checkpoint of another training, and CheckpointError if it cannot be read.
    """
    run, kept = training.run(by_step=True), _Kept()
    if (folder / CHECKPOINT).exists():
        kept.resume(training, run, folder / CHECKPOINT)
    return Fitted(training=training, folder=folder, run=run, kept=kept)


def is_fitted(training: FinalTraining, folder: Path) -> bool:
    """Return whether the folder holds this training with all its epochs. It may be tested or not."""
    return (folder / CHECKPOINT).exists() and resumed(training, folder).run.finished


def open_test(training: FinalTraining) -> data.Split:
    """Open the test split. The opening is recorded before."""
    return assemble.load_test(training.config, training.spec.split_seed, training.folder, training.device)


def finish(fitted: Fitted, test: data.Split) -> dict[str, Any]:
    """Test the kept weights, write all that a training leaves, and return its metrics. The checkpoint stays."""
    training, run, kept, folder = fitted.training, fitted.run, fitted.kept, fitted.folder
    metrics = _tested(training, run, kept, test)
    with Boards(folder, epochs=run.epoch, steps_per_epoch=run.steps_per_epoch) as boards:
        for name in of_test(metrics, training.spec.metric):
            boards.show_test(f"test_{name}", metrics[f"test_{name}"], run.epoch)
    if trajectory.can_draw():
        trajectory.draw(folder / trajectory.FILE, kept.steps.tolist(), kept.history, kept=metrics["epoch"])
    checkpoint.save(folder / WEIGHTS, kept.weights)
    write_json(folder / METRICS, metrics)
    return metrics


def refuse_another_split(training: FinalTraining) -> None:
    """Raise SpecError if the receipt's trial had another split: the test part would hold examples that it was chosen by."""
    spec = training.spec
    before = spec.receipt.get("split_seed", spec.split_seed)
    if before != spec.split_seed:
        key = "seed" if spec.format < SPLIT_FORMAT else f"data.{SPLIT_SEED}"
        raise SpecError(
            f"{training.path}: {key} = {spec.split_seed}: the trial was chosen with {before}, so examples that it has seen "
            f"would be in the test part; restore {before}, and give another seed of the training by --seed, or remove [receipt]"
        )


class _Kept:
    """The results of a final training so far: the validation curve, all metrics, loss and norms of each step, and the weights.

    The weights are those of the curve's value: with value = "best" the weights of the best epoch, else of the last one.
    """

    def __init__(self) -> None:
        self.curve: list[float] = []
        self.history: list[dict[str, float]] = []
        self.weights: dict[str, Any] = {}
        self.steps = torch.zeros(0, 3)  # [steps, 3]: loss, gradient norm, parameter norm

    @property
    def overfits_since(self) -> int | None:
        training, validation = ([one[name] for one in self.history] for name in ("train_loss", "validation_loss"))
        return overfits_since(training, validation)

    def take(self, training: FinalTraining, run: Run, result: EpochResult) -> None:
        self.curve.append(result.judged(training.spec.metric))
        self.history.append({"epoch": float(result.epoch)} | result.numbers)
        self.steps = torch.cat([self.steps, torch.tensor(run.monitor.trajectory())])
        rule = training.spec.rule
        if rule is None or rule.best_epoch(self.curve) == len(self.curve):
            self.weights = {name: tensor.detach().clone() for name, tensor in run.judged_weights().items()}

    def save(self, training: FinalTraining, run: Run, path: Path) -> None:
        kept = {"curve": self.curve, "history": self.history, "weights": self.weights, "steps": self.steps}
        checkpoint.save(path, {"identity": training.identity, "run": run.state_dict(), **kept})

    def resume(self, training: FinalTraining, run: Run, path: Path) -> None:
        try:
            state = checkpoint.load(path)
            if state["identity"] != training.identity:
                raise StudyError(f"{path.parent}: holds another training, unfinished; name another folder with -o")
            run.load_state_dict(state["run"])
        except CheckpointError as error:
            raise CheckpointError(*error.lines, f"remove {path} to train from the start") from None
        self.curve, self.history, self.weights = state["curve"], state["history"], state["weights"]
        self.steps = state["steps"]


def open_folder(training: FinalTraining, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / CONFIG) as copy:
            copy.write_bytes(training.path.read_bytes())
    except OSError as error:
        raise StudyError(f"{folder}: cannot be written: {error.strerror}; name another folder with -o") from None


def units(splits: data.Splits) -> dict[str, Any]:
    """Return how inputs are encoded and standardised, and targets, as plain values for JSON."""
    found: dict[str, Any] = {
        name: data.each(getattr(splits, name), lambda one: one.tolist()) for name in ("mean", "std")
    }
    if splits.target_mean is not None and splits.target_std is not None:
        found |= {"target_mean": splits.target_mean.tolist(), "target_std": splits.target_std.tolist()}
        found |= {"targets": list(splits.target_names)}
    return found | ({"encoding": splits.about} if splits.about else {})


def _tested(training: FinalTraining, run: Run, kept: _Kept, test: data.Split) -> dict[str, Any]:
    """Assess the kept weights, and return all metrics."""
    run.model.load_state_dict(kept.weights)
    rule = training.spec.rule
    assert rule is not None
    tested = validation.assess(
        run.model,
        test,
        splits=training.splits,
        precision=training.config.training.precision,
        accumulation=training.accumulation,
        loss=run.judging_loss,
        metrics=run.watch.metrics,
    )
    return {
        "identity": training.identity,
        **{f"test_{name}": value for name, value in tested.items()},
        TASK_KEY: training.splits.task,
        TEST_IMAGES_KEY: len(test.targets),
        IMAGES_KEY: len(training.splits.validation.targets),
        "classes": list(training.splits.classes),
        **units(training.splits),
        "value": rule(kept.curve),
        "epoch": rule.best_epoch(kept.curve),
        "stopped_by": run.stopped_by,
        "overfits_since": kept.overfits_since,
        "parameters": sum(parameter.numel() for parameter in run.model.parameters()),
        "history": kept.history,
        "receipt": receipt(
            folder=training.folder,
            device=devices.name(training.device),
            threads=training.config.training.threads,
            executor="loop" if "+" in training.executor else training.executor,
            seed=training.seed,
            masks=run.randomness.rule,
            split_seed=training.spec.split_seed,
            data_digest=training.splits.digest,
            accumulation=training.accumulation,
        ),
    }


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One epoch at which a replay differs from the trial's curve."""

    epoch: int
    metric: str
    trial: float
    replay: float


def replay(training: FinalTraining, progress: Callable[[EpochResult], None]) -> list[Difference]:
    """Repeat the receipt's trial and return the differences between the curves.

    Curves must be equal bit for bit, or within TOLERANCE if `repeats_exactly` is false. The replay trains as many epochs as the
    trial; early stopping is off. Raises StudyError if the receipt holds no curve.
    """
    curves: dict[str, list[float]] = training.spec.receipt.get("curves", {})
    epochs = curve_length(training)
    if not epochs:
        raise StudyError(
            f"{training.path}: has no curve in its receipt; it is not an export, or its trial was copied from another study; "
            "export a trained trial"
        )
    found: list[Difference] = []
    run = training.run()
    run.stopping = None
    for result in training.epochs(run):
        found += _differences(training, result, curves)
        progress(result)
        if result.epoch == epochs:
            break
    return found


def curve_length(training: FinalTraining) -> int:
    """Return the number of epochs of the receipt's trial."""
    return max(map(len, training.spec.receipt.get("curves", {}).values()), default=0)


def _differences(training: FinalTraining, result: EpochResult, curves: dict[str, list[float]]) -> Iterator[Difference]:
    numbers = result.numbers
    for metric, curve in curves.items():
        if result.epoch > len(curve) or metric not in numbers:  # [watch] may have been removed from the file
            continue
        again = numbers[metric]
        then = curve[result.epoch - 1]
        floor = 0.0 if metric in IN_UNITS else TOLERANCE
        near = not training.repeats_exactly and math.isclose(again, then, rel_tol=TOLERANCE, abs_tol=floor)
        if not (same(again, then) or near):
            yield Difference(epoch=result.epoch, metric=metric, trial=then, replay=again)


def same(one: float, other: float) -> bool:
    """Return whether two values are the same number or both NaN."""
    return one == other or (math.isnan(one) and math.isnan(other))
