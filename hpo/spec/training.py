"""The config of one training run: a study file with all values pinned.

`TrainConfig` checks the values. A search is checked at both ends of each range and at every choice.
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
#: Optional sections. A section that is left out is not a part of the study's identity.
OPTIONAL = ("augment", "loss", "sam", "warmup", "averaging", "stopping", "watch")
#: Defaults of optional parts. The default of `warmup` is none, and that of `loss` is decided by the data's task.
UNSAID: dict[str, Tree] = {"averaging": {"name": "none"}}
Positive = Annotated[int, Ge(1)]
Epochs = Annotated[int, Ge(1), Le(1_000_000)]
Probability = Annotated[float, Ge(0), Le(1)]


class Part(pydantic.BaseModel):
    """A data source, model, loss, optimizer, schedule, warm-up or averaging: its name and its options."""

    model_config = pydantic.ConfigDict(frozen=True, strict=True)

    name: str
    options: dict[str, Any]
    paths: dict[str, str]  # option -> its dotted path in the file, for messages

    @classmethod
    def from_tree(cls, section: str, part: Mapping[str, Any]) -> Part:
        """Read `{ name, option, ..., <name> = { option, ... } }`; SpecError without a name or for a repeated option."""
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
                raise SpecError(f"{section}.{name}.{key}: {section}.{key} is given too; keep one of the two")
            found[key], paths[key] = value, f"{section}.{name}.{key}"
        return cls(name=name, options=found, paths=paths)


class Training(pydantic.BaseModel):
    """Settings of the training loop."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True)

    epochs: Epochs = 20
    batch_size: Annotated[int, Ge(1), Le(2**24)] = 32
    sampling: Literal["shuffled", "balanced"] | None = None
    """Order of an epoch's rows. shuffled, the default: each row once at most. balanced: classes are equally frequent, so the rows
    of a rare class come several times and some of a frequent one do not."""
    schedule_epochs: Epochs | None = None
    """Length of the learning-rate schedule in epochs; `epochs` by default."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Number type. bfloat16 trains under autocast; the weights stay float32."""
    threads: Annotated[int, Ge(1), Le(4096)] = 1
    """CPU threads of one trial. Curves repeat bit for bit only with the same number of threads."""
    clip_norm: Annotated[float, Gt(0)] | None = None
    """Largest 2-norm of the gradient over all parameters. A longer gradient is scaled down."""
    clip_value: Annotated[float, Gt(0)] | None = None
    """Largest absolute value of each element of the gradient. Larger elements are clipped."""
    l1: Annotated[float, Ge(0)] | None = None
    """Factor of the L1 penalty, the sum of |w| over all weights. Biases and norms are left out."""
    l2: Annotated[float, Ge(0)] | None = None
    """Factor of the L2 penalty, half the sum of w² over the same weights: coupled weight decay with any optimizer."""
    max_norm: Annotated[float, Gt(0)] | None = None
    """Largest 2-norm of a unit's incoming weights. Longer ones are scaled down after each step."""


class Augment(pydantic.BaseModel):
    """Augmentation of the training images, applied in the order of these options. Each image gets its own random draws. All
    moves of pixels are composed into one transform, so an image is resampled once.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True)

    crop: Annotated[int, Ge(0)] = 0
    """Largest shift of an image in pixels, in each direction."""
    fill: Literal["mean", "edge", "reflect"] = "mean"
    """Pixels beyond the border: the mean of the training part, the outermost pixels, or the mirrored image."""
    horizontal_flip: Probability = 0.0
    """Probability of a left-right flip."""
    vertical_flip: Probability = 0.0
    """Probability of an upside-down flip."""
    resized_crop: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Largest share of the area that is cropped away. The rest is resized to full size (Szegedy et al. 2015 use 0.92)."""
    resized_crop_ratio: Annotated[float, Ge(1)] = 4 / 3
    """Largest aspect ratio of the resized crop, wide or high."""
    rotation: Annotated[float, Ge(0), Le(180)] = 0.0
    """Largest rotation in degrees, in both directions."""
    translation: Annotated[float, Ge(0), Le(1)] = 0.0
    """Largest shift as a share of the side, in whole pixels and in both directions."""
    scale: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Largest relative change of the size, up or down."""
    shear: Annotated[float, Ge(0), Lt(90)] = 0.0
    """Largest shear along each side in degrees, in both directions."""
    brightness: Annotated[float, Ge(0)] = 0.0
    """Brightness is multiplied by a factor from max(0, 1 - x) to 1 + x, where x is this value."""
    contrast: Annotated[float, Ge(0)] = 0.0
    """The same for the distance from the image's mean grey."""
    saturation: Annotated[float, Ge(0)] = 0.0
    """The same for the distance from each pixel's grey; for RGB."""
    hue: Annotated[float, Ge(0), Le(0.5)] = 0.0
    """Largest hue shift in turns of the colour wheel, in both directions; for RGB."""
    trivial_augment: Probability = 0.0
    """Probability of one of fourteen operations at a random strength (Müller & Hutter 2021 use 1)."""
    erasing: Probability = 0.0
    """Probability that a box of the image is replaced by the mean (Zhong et al. 2017)."""
    erasing_area: Annotated[float, Ge(0.02), Le(1)] = 0.33
    """Largest share of the area that the box covers; the smallest is 0.02."""
    mixup: Annotated[float, Ge(0)] = 0.0
    """Alpha of mixup: an image is blended with another of its batch, with a share from Beta(alpha, alpha) (Zhang et al. 2018)."""
    cutmix: Annotated[float, Ge(0)] = 0.0
    """Alpha of CutMix: a box of another image is pasted in, its area from Beta(alpha, alpha) (Yun et al. 2019). With mixup each
    of the two has probability 0.5."""
    mix_probability: Probability = 1.0
    """Probability that an image is mixed."""


class Sam(pydantic.BaseModel):
    """Sharpness-aware minimisation, around any optimizer (Foret et al. 2021)."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True)

    rho: Annotated[float, Ge(0)] = 0.0
    """Length of the ascent step (2-norm over all parameters) before the gradient is computed; 0 turns it off."""


STOPPING_RULES = ("patience", "gl", "pq", "up", "max_seconds", "gradient_norm")  # any of them ends a trial
STOPPING_NEEDS = {  # key -> the rules that use it
    "monitor": ("patience",),
    "min_delta": ("patience",),
    "min_relative": ("patience",),
    "strip": ("pq", "up"),
}


class Stopping(pydantic.BaseModel):
    """Early-stopping rules of a trial. The trial ends as soon as one of them applies (`train/early_stopping.py`).

    `gl`, `pq` and `up` are from Prechelt, "Early Stopping - But When?", 1998.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True)

    patience: Positive | None = None
    """Number of epochs without an improvement of the monitored metric."""
    monitor: Metric | None = None
    """Validation metric that patience monitors; the study's metric by default."""
    min_delta: Annotated[float, Ge(0)] = 0.0
    """A value counts as an improvement if it is better than the best one by more than this."""
    min_relative: Annotated[float, Ge(0)] = 0.0
    """The same, as a share of the best value."""
    gl: Annotated[float, Gt(0)] | None = None
    """Largest generalisation loss, GL(alpha): percent of the validation loss above its minimum so far."""
    pq: Annotated[float, Gt(0)] | None = None
    """Largest quotient of generalisation loss (percent) and training progress of the strip (thousandths), PQ(alpha, k)."""
    up: Positive | None = None
    """Number of successive strips in which the validation loss rose, UP(s)."""
    strip: Annotated[int, Ge(2)] = 5
    """Epochs of a strip for pq and up: k."""
    max_seconds: Annotated[float, Gt(0)] | None = None
    """Training time in seconds, validation included, after which no further epoch starts."""
    gradient_norm: Annotated[float, Gt(0)] | None = None
    """Training ends after an epoch whose mean gradient 2-norm is below this value."""
    min_epochs: Positive = 1
    """Epochs that are trained before any rule can apply."""

    def refuse_idle(self) -> None:
        """Raise SpecError if no rule is given, or if an option is given whose rule is not."""
        if not any(getattr(self, rule) is not None for rule in STOPPING_RULES):
            raise SpecError(f"stopping: has no rule; add one of {', '.join(STOPPING_RULES)}")
        for key, rules in STOPPING_NEEDS.items():
            if key in self.model_fields_set and all(getattr(self, rule) is None for rule in rules):
                raise SpecError(
                    f"stopping.{key} = {shown(getattr(self, key))}: needs stopping.{' or stopping.'.join(rules)}; "
                    f"add it or remove {key}"
                )


class WatchSection(pydantic.BaseModel):
    """Further measurements of each epoch, beside losses, accuracy, learning rate and seconds. They do not change the training."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True)

    metrics: list[Metric] = []
    """Further validation metrics, such as macro_f1, auroc, rmse or top_K_accuracy for any K. They must go with the task of the
    data."""
    norms: bool = False
    """The 2-norm of the gradient before clipping, averaged over the epoch's steps, and of the parameters at the epoch's end."""
    noise: bool = False
    """The variance of minibatch gradients and the gradient noise scale. It needs memory for one more gradient."""
    resources: bool = False
    """Training examples per second and peak memory of the process in MiB."""


Table = Training | Augment | Sam | Stopping | WatchSection
#: Sections that are a table of values, not a part chosen by name.
TABLES: dict[str, type[Table]] = {
    "augment": Augment,
    "sam": Sam,
    "training": Training,
    "stopping": Stopping,
    "watch": WatchSection,
}


class TrainConfig(pydantic.BaseModel):
    """The config of one training run."""

    model_config = pydantic.ConfigDict(frozen=True)

    data: Part
    augment: Augment = Augment()
    model: Part
    loss: Part | None = None
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
        """Read a pinned tree of sections; SpecError names path, value and mend."""
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
    """Read one pinned section; SpecError lists paths, values and mends."""
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
    """Return the training sections of a tree, with the defaults of `schedule` and `training`."""
    return {"schedule": {"name": "constant"}, "training": {}} | {key: tree[key] for key in SECTIONS if key in tree}


def training_defaults() -> Tree:
    """Return the defaults of the section [training]."""
    return Training().model_dump(exclude_none=True)
