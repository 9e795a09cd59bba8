"""What one training run needs, every value pinned: the meaning of a study file once nothing is left to search.

`TrainConfig` is the one model that checks values; a search checks it at both ends of each range and at every choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pydantic
from annotated_types import Ge, Gt, Le, Lt

from hpo.errors import SpecError, shown
from hpo.spec import options
from hpo.spec.metrics import Metric
from hpo.spec.space import Tree, branches

SECTIONS = (
    "data",
    "augment",
    "model",
    "loss",
    "optimizer",
    "sam",
    "schedule",
    "warmup",
    "averaging",
    "training",
    "stopping",
    "watch",
)
#: Sections that a file may leave out, and that are then no part of its identity.
OPTIONAL = ("augment", "loss", "sam", "warmup", "averaging", "stopping", "watch")
#: What a part is that may be left out, if it is; no warm-up is none.
UNSAID: dict[str, Tree] = {"loss": {"name": "cross_entropy"}, "averaging": {"name": "none"}}
Positive = Annotated[int, Ge(1)]
Epochs = Annotated[int, Ge(1), Le(1_000_000)]
Probability = Annotated[float, Ge(0), Le(1)]


class Part(pydantic.BaseModel):
    """A data source, model, loss, optimizer, schedule, warm-up or averaging by name, with the options of that name."""

    model_config = pydantic.ConfigDict(frozen=True, strict=True)

    name: str
    options: dict[str, Any]
    paths: dict[str, str]  # option -> where it stands in the file, for messages

    @classmethod
    def from_tree(cls, section: str, part: Mapping[str, Any]) -> Part:
        """Read `{ name, option, ..., <name> = { option, ... } }`; SpecError without a name or for a doubled option."""
        name = part.get("name")
        if name is None:
            raise SpecError(f'{section}.name: missing; write name = "..."')
        if not isinstance(name, str):
            article = "an" if section[0] in "aeiou" else "a"
            raise SpecError(f'{section}.name: {shown(name)} is not the name of {article} {section}; write name = "..."')
        found = {key: value for key, value in part.items() if key != "name" and not isinstance(value, dict)}
        paths = {key: f"{section}.{key}" for key in found}
        for key, value in branches(part).get(name, {}).items():
            if key in found:
                raise SpecError(f"{section}.{name}.{key}: {section}.{key} is given as well; keep one of the two")
            found[key], paths[key] = value, f"{section}.{name}.{key}"
        return cls(name=name, options=found, paths=paths)


class Training(pydantic.BaseModel):
    """How long and on how much at a time a model is trained."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True)

    epochs: Epochs = 20
    batch_size: Annotated[int, Ge(1), Le(2**24)] = 32
    schedule_epochs: Epochs | None = None
    """Length of the learning-rate schedule; the run's own epochs if not given."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 trains under autocast; weights stay float32."""
    threads: Annotated[int, Ge(1), Le(4096)] = 1
    """CPU threads of one trial. Curves repeat bit for bit only with the same number."""
    clip_norm: Annotated[float, Gt(0)] | None = None
    """A longer gradient (2-norm over all parameters) is shortened to this."""
    clip_value: Annotated[float, Gt(0)] | None = None
    """Each element of the gradient is kept within this of 0."""
    l1: Annotated[float, Ge(0)] | None = None
    """Of the sum of the weights' absolute values, what the loss has in addition; biases and norms are left alone."""
    l2: Annotated[float, Ge(0)] | None = None
    """Likewise of half the sum of their squares: coupled weight decay, whatever the optimizer."""
    max_norm: Annotated[float, Gt(0)] | None = None
    """After each step, a unit's longer incoming weights (2-norm) are scaled down to this."""


class Augment(pydantic.BaseModel):
    """How strongly training images are changed, each image by draws of its own; in the order in which they are changed.

    All that moves pixels is one change: what comes into sight again on the way is there again.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True)

    crop: Annotated[int, Ge(0)] = 0
    """Pixels by which an image may be moved each way."""
    fill: Literal["mean", "edge", "reflect"] = "mean"
    """What is seen beyond the border: the training part's mean, the outermost pixels, or the image mirrored at them."""
    horizontal_flip: Probability = 0.0
    """Probability with which an image is mirrored."""
    vertical_flip: Probability = 0.0
    """Probability with which an image is turned upside down."""
    resized_crop: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Share of the area that is cut away at most, before the rest is enlarged to full size (Szegedy et al. 2015 cut 0.92)."""
    resized_crop_ratio: Annotated[float, Ge(1)] = 4 / 3
    """Ratio of the sides of what is left, at most, either way."""
    rotation: Annotated[float, Ge(0), Le(180)] = 0.0
    """Degrees by which an image is turned at most, either way; so below."""
    translation: Annotated[float, Ge(0), Le(1)] = 0.0
    """Share of its side by which an image is moved at most, in whole pixels."""
    scale: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Share by which an image becomes larger or smaller at most."""
    shear: Annotated[float, Ge(0), Lt(90)] = 0.0
    """Degrees by which an image is sheared at most, along each side."""
    brightness: Annotated[float, Ge(0)] = 0.0
    """A factor is drawn from 1 - this, or 0, to 1 + this; so in the two below."""
    contrast: Annotated[float, Ge(0)] = 0.0
    """Away from the image's mean grey, or towards it."""
    saturation: Annotated[float, Ge(0)] = 0.0
    """Away from each pixel's grey, or towards it; for RGB."""
    hue: Annotated[float, Ge(0), Le(0.5)] = 0.0
    """Turns of the colour wheel at most, either way; for RGB."""
    trivial_augment: Probability = 0.0
    """Probability with which an image gets one of fourteen operations by a drawn amount (Müller & Hutter 2021 take 1)."""
    erasing: Probability = 0.0
    """Probability with which a box of an image is hidden by the mean (Zhong et al. 2017)."""
    erasing_area: Annotated[float, Ge(0.02), Le(1)] = 0.33
    """Share of the area that the box has at most; 0.02 is the least."""
    mixup: Annotated[float, Ge(0)] = 0.0
    """Alpha: an image is mixed with another of its batch by a share from Beta(alpha, alpha) (Zhang et al. 2018)."""
    cutmix: Annotated[float, Ge(0)] = 0.0
    """Alpha: a box of an image is another's, its area from Beta(alpha, alpha) (Yun et al. 2019); at even odds with mixup."""
    mix_probability: Probability = 1.0
    """Probability with which an image is mixed at all."""


class Sam(pydantic.BaseModel):
    """Sharpness-aware minimisation, around any optimizer (Foret et al. 2021)."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True)

    rho: Annotated[float, Ge(0)] = 0.0
    """How far the weights are moved uphill (2-norm over all parameters) to where the gradient is taken; 0 is without."""


STOPPING_RULES = ("patience", "gl", "pq", "up", "max_seconds", "gradient_norm")  # any of them ends a trial
STOPPING_NEEDS = {  # keys that mean something beside one of these rules only
    "monitor": ("patience",),
    "min_delta": ("patience",),
    "min_relative": ("patience",),
    "strip": ("pq", "up"),
}


class Stopping(pydantic.BaseModel):
    """By which of its own rules a trial ends before its last epoch; any of them is enough (`train/early_stopping.py`)."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True)

    patience: Positive | None = None
    """Epochs without an improvement of what is monitored."""
    monitor: Metric | None = None
    """Of which metric patience asks an improvement on the validation part; the study's own if not given."""
    min_delta: Annotated[float, Ge(0)] = 0.0
    """By how much a value must be better than the best one to count as an improvement."""
    min_relative: Annotated[float, Ge(0)] = 0.0
    """Likewise, as a share of the best one."""
    gl: Annotated[float, Gt(0)] | None = None
    """Percent by which the validation loss may be above its lowest so far: GL(alpha)."""
    pq: Annotated[float, Gt(0)] | None = None
    """Generalisation loss in percent over the strip's training progress in thousandths, at most: PQ(alpha, k)."""
    up: Positive | None = None
    """Strips in a row at whose ends the validation loss was higher than at the one before: UP(s)."""
    strip: Annotated[int, Ge(2)] = 5
    """Epochs of a strip, for pq and up: k."""
    max_seconds: Annotated[float, Gt(0)] | None = None
    """Training time, validation included, after which no further epoch is begun."""
    gradient_norm: Annotated[float, Gt(0)] | None = None
    """An epoch whose mean 2-norm of the gradient is below this is the last one."""
    min_epochs: Positive = 1
    """Epochs that are trained whatever the rules say."""

    def refuse_idle(self) -> None:
        """Raise SpecError if there is nothing to stop by, or something that no rule asks for."""
        if not any(getattr(self, rule) is not None for rule in STOPPING_RULES):
            raise SpecError(f"stopping: has no rule to stop by; add one of {', '.join(STOPPING_RULES)}")
        for key, rules in STOPPING_NEEDS.items():
            if key in self.model_fields_set and all(getattr(self, rule) is None for rule in rules):
                raise SpecError(
                    f"stopping.{key} = {shown(getattr(self, key))}: goes with stopping.{' or stopping.'.join(rules)}; "
                    "add that or remove this"
                )


class WatchSection(pydantic.BaseModel):
    """What is measured in every epoch beside losses, accuracy, learning rate and seconds. Nothing of it changes a training."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True)

    metrics: list[Metric] = []
    """Further metrics of the validation part: macro_f1, auroc, calibration_error, top_K_accuracy for any K."""
    norms: bool = False
    """The gradient's 2-norm before clipping, mean over the epoch's steps, and the parameters' at its end."""
    noise: bool = False
    """The variance of minibatch gradients and the gradient noise scale; keeps one more gradient."""
    resources: bool = False
    """Training images a second, and the most memory the process has had."""


Table = Training | Augment | Sam | Stopping | WatchSection
#: Sections that are a table of values, and no part chosen by name.
TABLES: dict[str, type[Table]] = {
    "augment": Augment,
    "sam": Sam,
    "training": Training,
    "stopping": Stopping,
    "watch": WatchSection,
}


class TrainConfig(pydantic.BaseModel):
    """One training run."""

    model_config = pydantic.ConfigDict(frozen=True)

    data: Part
    augment: Augment = Augment()
    model: Part
    loss: Part
    optimizer: Part
    sam: Sam = Sam()
    schedule: Part
    warmup: Part | None = None
    averaging: Part
    training: Training
    stopping: Stopping = Stopping()
    watch: WatchSection = WatchSection()

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> TrainConfig:
        """Read a pinned tree of the sections; SpecError names path, value and mend."""
        tree = UNSAID | dict(tree)
        read: dict[str, Any] = {
            section: read_section(section, tree[section]) for section in SECTIONS if section in tree
        }
        config = cls(**read)
        config._refuse_two_owners_of_momentum()
        return config

    def _refuse_two_owners_of_momentum(self) -> None:
        if not self.schedule.options.get("cycle_momentum"):
            return
        for key in ("momentum", "beta1"):
            if key in self.optimizer.options:
                raise SpecError(
                    f"{self.optimizer.paths[key]} = {shown(self.optimizer.options[key])}: would be overwritten by "
                    f"{self.schedule.paths['cycle_momentum']} = true; remove one of the two"
                )


def read_section(section: str, table: Mapping[str, Any]) -> Part | Table:
    """Read one pinned section by itself; SpecError lists paths, values and mends."""
    if section not in TABLES:
        return Part.from_tree(section, table)
    model = TABLES[section]
    try:
        found = model.model_validate(table)
    except pydantic.ValidationError as error:
        paths = {key: f"{section}.{key}" for key in table}
        raise SpecError(*options.explain(error, paths, section, model)) from None
    if isinstance(found, Stopping):
        found.refuse_idle()
    return found


def with_sections(tree: Mapping[str, Any]) -> Tree:
    """Return the sections of a tree, with those that may be left out and are not empty then filled in."""
    return {"schedule": {"name": "constant"}, "training": {}} | {key: tree[key] for key in SECTIONS if key in tree}


def training_defaults() -> Tree:
    """Return what a training section says if it says nothing."""
    return Training().model_dump(exclude_none=True)
