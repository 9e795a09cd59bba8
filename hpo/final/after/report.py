"""The work of `hpo after`: scores each recipe on the validation part, estimates uncertainty, writes files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpo import data
from hpo.errors import StudyError
from hpo.files import write_json
from hpo.final import train as final
from hpo.final.after import files, mcdropout
from hpo.final.after.deployed import Deployed
from hpo.final.after.files import Exported
from hpo.final.after.raw import first, named
from hpo.final.after.scores import Score, outputs, score
from hpo.final.after.steps import Recipe
from hpo.final.after.trained import Trained, on_cpu
from hpo.receipt import receipt
from hpo.study.interval import Interval, wilson
from hpo.train import devices
from hpo.train.inputs import Batch

REPORT = "after.json"
DOUBT = "mc_dropout.csv"
COMPARED = 256  # validation rows on which a file is compared with the model
#: What a file's outputs are, by task.
OUTPUTS: dict[data.Task, str] = {
    "classification": "logits float32 ['batch', classes]; their softmax is the probability of each class",
    "binary": "logits float32 ['batch', 1]; their sigmoid is the probability of the second of the classes",
    "multilabel": "logits float32 ['batch', labels]; their sigmoid is the probability of each label",
    "regression": "predictions float32 ['batch', targets] in original units",
}
AS_TRAINED = Recipe(name="trained", steps=())


@dataclass(frozen=True, kw_only=True)
class Variant:
    """The trained model after a recipe: its score and its files."""

    name: str
    score: Score
    interval: Interval | None  # of the accuracy; None without one, or if labels of one row depend on each other
    files: list[Exported] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)  # the reasons why files could not be written


@dataclass(frozen=True, kw_only=True)
class VariantReport:
    """The report of `hpo after`: the trained model first, then the recipes in order. `mc_dropout` is of the trained model."""

    folder: str
    validation_images: int
    variants: list[Variant]
    mc_dropout: dict[str, float] | None
    unfit: list[str]  # why a recipe or Monte Carlo dropout is missing
    receipt: dict[str, Any]

    @property
    def refused(self) -> list[str]:
        """The reasons for all results that are missing, each once."""
        return [*dict.fromkeys([*self.unfit, *(why for variant in self.variants for why in variant.refused)])]

    def to_json(self) -> dict[str, Any]:
        """Return the report in plain JSON types."""
        return asdict(self)


def make(
    trained: Trained, recipes: Sequence[Recipe], output: Path, *, passes: int | None, formats: Sequence[str]
) -> VariantReport:
    """Make, score and export the variants. Write all files and the report to `output`, and return the report.

    Recipes and formats that are not supported or not installed are listed in the report; the others still run.

    Args:
        trained: the trained model.
        recipes: the variants to make.
        output: the output folder.
        passes: the number of passes of Monte Carlo dropout; None for no estimate.
        formats: the export formats.

    Raises StudyError if the folder cannot be written.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StudyError(f"{output}: cannot be written: {error.strerror}; name another folder with -o") from None
    made_from = _receipt(trained)
    splits = trained.training.splits
    part = splits.validation
    shown = data.each(first(part.inputs, COMPARED), Tensor.cpu)
    reference = outputs(trained.deployed(trained.model), part.inputs, trained.batch)
    variants: list[Variant] = []
    unfit: list[str] = []
    for recipe in [AS_TRAINED, *recipes]:
        try:
            model = trained.deployed(recipe.apply(trained.copy(), trained.calibration()))
        except StudyError as error:
            unfit.append(str(error))
            continue
        scored = score(model, outputs(model, part.inputs, trained.batch), reference, part, splits)
        has_interval = scored.accuracy is not None and splits.task != "multilabel"
        interval = wilson(scored.accuracy, len(part.targets)) if has_interval and scored.accuracy is not None else None
        variant = Variant(name=recipe.name, score=scored, interval=interval)
        for one in formats:
            try:
                variant.files.append(_export(model, shown, output / f"{recipe.name}.{one}", made_from, recipe))
            except StudyError as error:
                variant.refused.append(str(error))
        variants.append(variant)
    doubt = None
    if passes:
        try:
            doubt = _doubt(trained, part, passes, output)
        except StudyError as error:
            unfit.append(str(error))
    report = VariantReport(
        folder=str(trained.folder),
        validation_images=len(part.targets),
        variants=variants,
        mc_dropout=doubt,
        unfit=unfit,
        receipt=made_from | {"output": str(output.absolute())},
    )
    write_json(output / REPORT, report.to_json())
    return report


def _export(model: Deployed, inputs: Batch, path: Path, made_from: dict[str, Any], recipe: Recipe) -> Exported:
    told = {"recipe": recipe.name, "input": _described(inputs), **made_from}
    is_coarse = any(step.name not in ("fold", "prune", "channels") for step in recipe.steps)
    return files.export(on_cpu(model), inputs, path, told, is_coarse=is_coarse)


def _described(inputs: Batch) -> str:
    """Return type, shape and meaning of the inputs of an exported model, in the order in which it takes them."""
    said = []
    for name, one in named(inputs, "").items():
        kind = str(one.dtype).removeprefix("torch.")
        meaning = ", raw pixels" if one.dtype == torch.uint8 else ""
        said.append(f"{name} {kind} {['batch', *one.shape[1:]]}{meaning}".strip())
    return "; ".join(said)


def _doubt(trained: Trained, part: data.Split, passes: int, output: Path) -> dict[str, float]:
    if trained.training.splits.task != "classification":
        raise StudyError(
            f'--mc-dropout: goes with task = "classification", and this is {trained.training.splits.task}; remove --mc-dropout'
        )
    model = trained.deployed(trained.copy())
    doubt = mcdropout.sample(model, part.inputs, passes=passes, seed=trained.training.seed, batch=trained.batch)
    mcdropout.write(output / DOUBT, doubt, part)
    return doubt.summary(part.targets)


def _receipt(trained: Trained) -> dict[str, Any]:
    training = trained.training
    return receipt(
        folder=training.folder,
        device=devices.name(training.device),
        threads=torch.get_num_threads(),
        identity=training.identity,
        weights_sha256=trained.weights_sha256,
        data_digest=training.splits.digest,
        split_seed=training.spec.split_seed,
        seed=training.seed,
        task=training.splits.task,
        outputs=OUTPUTS[training.splits.task],
        classes=list(training.splits.classes),
        **final.units(training.splits),
    )
