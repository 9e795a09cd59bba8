"""The study file: reading, checking and fingerprinting.

`StudySpec` is a study file with its defaults filled in. This module checks the grammar and the study's own settings.
`hpo.train.build.registry` knows the parts, such as `sgd`, and checks their options.
"""

from __future__ import annotations

import hashlib
import json
import math
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import pydantic
from annotated_types import Ge, Le

from hpo.errors import Mistakes, SpecError, located, shown
from hpo.spec import bucket_url, configuration, metrics, objectives, options, pickled, space, toml_file, usercode
from hpo.spec.budget import Budget
from hpo.spec.curve import Direction, ValueRule
from hpo.spec.divergence import DivergenceGuard
from hpo.spec.failures import Policies, Policy
from hpo.spec.launch import Launch
from hpo.spec.objectives import OWN_VALUE, Goals
from hpo.spec.program import Command, PrintedMetric
from hpo.spec.recovery import Recovery
from hpo.spec.space import Choices, Tree
from hpo.spec.training import OPTIONAL, SECTIONS, with_sections
from hpo.text import command

MAX_NAME = 200  # characters; Optuna's column holds 512
#: The version of the file format, part of every fingerprint. It grows when the meaning of a study file changes. Formats
#: 1 and 2 were used up to November 2026.
FORMAT: Final = 3
#: The first format with `data.split_seed`. Before it the study's seed decided the split.
SPLIT_FORMAT = 3
#: Data sources whose files format 2 reads differently, with the defaults that their options had in format 1. The option
#: `reading` selects the format.
READ_ANEW: dict[str, dict[str, Any]] = {"image_folder": {}, "csv": {}, "npz": {"channels_last": False}}
#: Settings of how a study is run. The last `hpo run` sets them.
MANAGED = ("budget", "recovery", "failures", "executor", "slots", "launch")
UNIDENTIFYING = {*MANAGED, "workers", "storage", "checkpoints"}  # may differ between two runs of one study
SPLIT_SEED = "split_seed"  # the option of [data]
#: The option of a stored [sampler] that holds what `auto` stands for in the study. It is no part of a study's identity.
STANDS_FOR = "stands_for"
BY_SPACE = "by its space"  # what it holds in a study that was made before there was such a record
MAX_WORKERS = 4096  # on one machine
MAX_PROCESSES = 64  # of one trial, on one machine
MAX_CHOICES = 1000  # each is checked with every part of every other section, and is stored in every trial's row
#: Keys that are checked against each other. If one of them has a wrong shape, this check is skipped.
JUDGED_TOGETHER = {
    *(*SECTIONS, "objective", "train", "command", "params", "space"),
    *("metric", "direction", "objectives", "constraints", "value", "processes_per_trial"),
}
LEFT_OUT_IF_EMPTY = (
    *OPTIONAL,
    "objectives",
    "constraints",
    "space",
    "start",
)  # if empty, not a part of a study's identity
WITH_SPACE = ("train", "command")  # those of which [space] is the search space


class StudySpec(pydantic.BaseModel):
    """A study file with its defaults filled in."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal[1, 2, 3] = FORMAT
    """Version of the file format; 1 and 2 are formats of earlier versions of hpo. A file joins a study in the study's format."""
    name: str
    """Name of the study in the storage; by default the name of the file."""
    seed: Annotated[int, Ge(0)] = 0
    """Seed of suggestions, weights, batch order and dropout. `data.split_seed` decides the split."""
    objective: Annotated[str, pydantic.StringConstraints(min_length=1)] | None = None
    """The user's own Optuna objective, "file.py:function". It replaces the training sections."""
    train: Annotated[str, pydantic.StringConstraints(min_length=1)] | None = None
    """The user's own training, "file.py:function". It is called with a dict, [space] at the trial's values, and the trial.
    It replaces the training sections."""
    command: list[str] | None = None
    """The user's own program and its arguments, with the trial's values in places such as "{lr}". It replaces the training
    sections."""
    processes_per_trial: Annotated[int, Ge(1), Le(MAX_PROCESSES)] | None = None
    """Processes of one trial of the user's own training, under torchrun's environment, each on a GPU of its own; 1 by default."""
    space: dict[str, Any] = {}
    """The search space of `train` or `command`: ranges, choices and constants. Tables may be nested."""
    start: list[dict[str, Any]] = []
    """Known configurations, which are tried first: a table `[[start]]` for each, with values of some or all parameters. They are
    queued when the study is made."""
    params: dict[str, Any] = {}
    """Pinned parameters of the user's own objective, as `hpo export` writes them."""
    metric: str = "accuracy"
    """Metric of the validation curve, such as accuracy, loss, auroc, rmse or top_K_accuracy for any K. It must go with the task
    of the data, and it decides the direction. With a command, how a value is read from a line of its output: a pattern with the
    group `value` and perhaps `epoch`, or "json:KEY" for JSON lines. Without it they come from `hpo.report` alone."""
    direction: Direction | None = None
    """Direction of the first objective. The metric decides it in a declared training; the user's own objective must give it."""
    objectives: dict[str, Direction] = {}
    """Two or more objectives by name. The first is the metric of the curve, the others are costs. The result is the Pareto
    front: non-dominated, feasible trials."""
    constraints: dict[str, str] = {}
    """Soft bounds by name, such as "<= 1e6", on the first objective or on costs."""
    value: str | None = None
    """A trial's value: "best", "last" or "mean of last K" epochs; "best" in a declared training, "last" with a command. Without
    it the user's own objective decides."""
    data: dict[str, Any] = {}
    augment: dict[str, Any] = {}
    model: dict[str, Any] = {}
    loss: dict[str, Any] = {}
    optimizer: dict[str, Any] = {}
    sam: dict[str, Any] = {}
    schedule: dict[str, Any] = {}
    averaging: dict[str, Any] = {}
    warmup: dict[str, Any] = {}
    training: dict[str, Any] = {}
    stopping: dict[str, Any] = {}
    watch: dict[str, Any] = {}
    sampler: dict[str, Any] = {"name": "tpe"}
    pruner: dict[str, Any] = {"name": "median"}
    budget: Budget = Budget()
    recovery: Recovery = Recovery()
    failures: Policies = Policies()
    launch: Launch = Launch()
    executor: Literal["auto", "loop", "stack"] = "auto"
    """loop trains one trial at a time. stack trains several trials as one model, where the model allows it. auto measures which
    is faster."""
    slots: Literal["auto"] | Annotated[int, Ge(1), Le(2**16)] = "auto"
    """Number of trials in one stack. auto measures the best number."""
    workers: Annotated[int, Ge(1), Le(MAX_WORKERS)] | None = None
    """Worker processes of `hpo run`; by default one per GPU, without a GPU one per CPU core."""
    storage: str | None = None
    """URL of the database: sqlite:///FILE or postgresql://USER@HOST/DB. `--storage` and $HPO_STORAGE come first."""
    checkpoints: str | None = None
    """Folder of checkpoints and worker logs, or a place in object storage: s3://BUCKET/PREFIX, gs:// or az://. By default
    $HPO_CHECKPOINTS, else `.hpo` beside the SQLite file; with Postgres `.hpo` in the current folder."""
    receipt: dict[str, Any] = {}
    """Origin of a pinned config: study, trial, seeds, versions, curves. A search ignores it."""

    @pydantic.field_validator("start", mode="before")
    @classmethod
    def _check_start(cls, start: Any) -> Any:
        return configuration.tables(start)

    @pydantic.field_validator("metric")
    @classmethod
    def _check_metric(cls, metric: str, info: pydantic.ValidationInfo) -> str:
        """Refuse an unknown metric of a training that is not a command's. A wrong command has a message of its own."""
        is_of_command = info.data.get("command", metric) is not None
        return metric if is_of_command else metrics.checked(metric)

    @classmethod
    def load(cls, path: Path, *, name: str | None = None) -> StudySpec:
        """Read a study file or a pinned config.

        Args:
            path: the file.
            name: the name of the study, instead of the file's.

        Raises SpecError that names the file, the key, the value and the mend.
        """
        document = read_document(path)
        with located(path):
            spec = cls.from_document(document)
        if name is None:
            return spec
        check_name(name, "--name")
        return spec.model_copy(update={"name": name})

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> StudySpec:
        """Check a document and fill in the study's own defaults; SpecError lists all mistakes."""
        document = dict(document)
        spec, wrong, mistakes = cls._shaped(document)
        if "name" not in wrong:
            with mistakes.collect():
                check_name(spec.name, "name")
        for key in document:
            if key not in (*SECTIONS, "space", *wrong, "params", "receipt"):
                with mistakes.collect():
                    _check_plain(document[key], key)
        if not wrong & JUDGED_TOGETHER:
            with mistakes.collect():
                spec = spec._with_defaults()
        with mistakes.collect():
            spec.budget.check(has_front=bool(spec.objectives))
        with mistakes.collect():
            spec.recovery.check()
        for key in ("storage", "checkpoints"):
            with mistakes.collect():
                check_path(getattr(spec, key), key)
        for section in SECTIONS if spec.is_declared else ["space"]:
            with mistakes.collect():
                _lifted(spec, section)
        mistakes.raise_if_any()
        return spec

    @classmethod
    def rest_of(cls, document: Mapping[str, Any]) -> StudySpec:
        """Return a spec of the readable keys of a wrong document, so that their values can be checked too."""
        spec, _, _ = cls._shaped(dict(document))
        unread: space.Tree = {section: {} for section in SECTIONS if not _can_lift(spec, section)}
        return spec.model_copy(update=unread)

    @classmethod
    def _shaped(cls, document: dict[str, Any]) -> tuple[StudySpec, set[str], Mistakes]:
        """Return the spec of all keys that have the right shape, the names of the other keys, and their mistakes."""
        mistakes = Mistakes()
        try:
            return cls.model_validate(document), set(), mistakes
        except pydantic.ValidationError as error:
            mistakes.add(SpecError(*options.explain(error, {}, "a study file", cls)))
            wrong = {str(found["loc"][0]) for found in error.errors()}
        unread = {*wrong, "metric"} if "command" in wrong else wrong  # a command decides what a metric is
        right = {key: value for key, value in document.items() if key not in unread}
        return cls.model_validate({"name": "", **right}), wrong, mistakes

    def _with_defaults(self) -> StudySpec:
        """Return the spec with the study's own defaults; SpecError lists keys that contradict each other and wrong rules."""
        mistakes = Mistakes()
        spec = self._with_training_defaults() if self.is_declared else self._with_own_defaults()
        for part in ("rule", "goals"):
            with mistakes.collect():
                getattr(spec, part)
        mistakes.raise_if_any()
        return spec

    def _with_own_defaults(self) -> StudySpec:
        self._refuse_beside_own()
        if self.processes_per_trial == 1:
            return self.model_copy(update={"processes_per_trial": None})._with_own_defaults()
        if self.command is not None:
            return self._with_command_defaults()
        if self.objectives:
            objectives.check_own(self.objectives)
            return self._with_first_direction()
        if self.constraints:
            raise SpecError(
                f"constraints.{next(iter(self.constraints))}: needs named [objectives]; "
                "an objective of your own with one value calls trial.set_constraint(name, value)"
            )
        if self.direction is None:
            raise SpecError('direction: needed with an objective of your own; write "maximize" or "minimize"')
        return self

    def _with_command_defaults(self) -> StudySpec:
        mistakes = Mistakes()
        for key in ("objectives", "constraints"):
            if getattr(self, key):
                mistakes.add(SpecError(f"{key}: a command gives one value, its metric; remove [{key}]"))
        if self.direction is None:
            mistakes.add(SpecError('direction: needed with a command; write "maximize" or "minimize"'))
        spec = self.model_copy(update={"value": self.value or "last"})
        if "metric" not in self.model_fields_set:
            spec = spec.model_copy(update={"metric": ""})
        with mistakes.collect():
            PrintedMetric.parse(spec.metric)
        with mistakes.collect():
            Command.parse(self.command or []).check(self.tree)
        mistakes.raise_if_any()
        return spec

    def _refuse_beside_own(self) -> None:
        """Raise SpecError for keys that contradict the key of the user's own training."""
        key, *others = (key for key in usercode.OWN if getattr(self, key) is not None)
        own = f"{key} = {shown(getattr(self, key))}"
        if others:
            raise SpecError(
                f"{own}: cannot stand beside {others[0]} = {shown(getattr(self, others[0]))}; remove one of them"
            )
        given = [section for section in SECTIONS if getattr(self, section)]
        if given:
            raise SpecError(
                *(f"{section}: belongs to a declared training, not to {own}; remove it" for section in given)
            )
        if key not in WITH_SPACE and self.space:
            raise SpecError(f"space: does not belong to {own}, whose suggest calls are the space; remove [space]")
        if key in WITH_SPACE and not self.space:
            raise SpecError(
                f"space: missing; {own} needs [space] with ranges, such as lr = {{ low = 1e-4, high = 0.1 }}"
            )
        if key in WITH_SPACE and self.params:
            raise SpecError(f"params: does not belong to {own}; write the values into [space]")

    def _with_first_direction(self) -> StudySpec:
        first, direction = next(iter(self.objectives.items()))
        if self.direction not in (None, direction):
            raise SpecError(
                f"direction = {self.direction!r}: objectives.{first} must be {direction}d; remove direction"
            )
        return self.model_copy(update={"direction": direction})

    def _with_training_defaults(self) -> StudySpec:
        if self.processes_per_trial is not None and self.processes_per_trial > 1:
            raise SpecError(
                f"processes_per_trial = {self.processes_per_trial}: a declared training fills a GPU with several trials instead, "
                "as one stack; only a training of your own (train, objective or command) has several processes"
            )
        missing = [section for section in ("data", "model", "optimizer") if not getattr(self, section)]
        if self.params and len(missing) == 3:
            raise SpecError('objective: missing; [params] belong to an objective: add objective = "file.py:function"')
        if self.space and len(missing) == 3:
            raise SpecError('train: missing; [space] belongs to a training of your own: add train = "file.py:function"')
        if self.space:
            raise SpecError("space: belongs to a training of your own; write the ranges into their sections")
        if missing:
            mend = 'with name = "...", or objective = "file.py:function"'
            raise SpecError(*(f"{section}: missing; add [{section}] {mend}" for section in missing))
        if self.params:
            raise SpecError("params: belongs to an objective of your own; write the values into their sections")
        if self.objectives:
            return self._with_metric()._with_training_filled()
        return self._with_training_filled()

    def _with_metric(self) -> StudySpec:
        objectives.check_declared(self.objectives)
        first = next(iter(self.objectives))
        if "metric" in self.model_fields_set and self.metric != first:
            raise SpecError(f"metric = {self.metric!r}: the first of [objectives] is {first}; remove metric")
        return self.model_copy(update={"metric": first})

    def in_format(self, number: int) -> StudySpec:
        """Return a loaded, unresolved spec in another format."""
        found = StudySpec.from_document({**self.document, "format": number, "receipt": self.receipt})
        return found.model_copy(update={"failures": self.failures})  # they know what the file itself says

    def split_like(self, study: StudySpec) -> StudySpec:
        """Return a loaded, unresolved spec with the split seed of a study, unless it names its own."""
        if not self.is_declared or self.format < SPLIT_FORMAT or SPLIT_SEED in self.data:
            return self
        return self.model_copy(update={"data": {**self.data, SPLIT_SEED: study.split_seed}})

    def _with_training_filled(self) -> StudySpec:
        direction = metrics.direction(self.metric)
        if self.direction not in (None, direction):
            raise SpecError(f"direction = {self.direction!r}: {self.metric} must be {direction}d; remove direction")
        filled = {"direction": direction, "value": self.value or "best"}
        sections = with_sections(self.model_dump(include=set(SECTIONS), exclude_defaults=True))
        if self.format == 1:
            sections["data"] = _as_read_before(sections["data"])
        if self.format < SPLIT_FORMAT:
            sections["data"] = _as_split_before(sections["data"], self)
        return self.model_copy(update=filled | _with_what_is_judged(sections, self.metric))

    @property
    def own_kind(self) -> str | None:
        """The key that names the user's own training, one of usercode.OWN; None for a declared training."""
        return next((key for key in usercode.OWN if getattr(self, key) is not None), None)

    @property
    def is_declared(self) -> bool:
        """Whether the training sections declare the training. Otherwise it is the user's own."""
        return self.own_kind is None

    @property
    def processes(self) -> int:
        """How many processes train one trial."""
        return self.processes_per_trial or 1

    @property
    def has_program(self) -> bool:
        """Whether a trial is trained by processes of its own, which save in a folder of the trial."""
        return self.command is not None or self.processes > 1

    @property
    def own_code(self) -> str | None:
        """The user's own training, such as "mine.py:objective" or "python train.py"; None for a declared training."""
        return self.objective or self.train or (shlex.join(self.command) if self.command else None)

    @property
    def split_seed(self) -> int:
        """The seed that decides which images are for training, validation and test, the folds and the subset."""
        return self.seed if self.format < SPLIT_FORMAT else int(self.data.get(SPLIT_SEED, 0))

    @property
    def is_pickled(self) -> bool:
        """Whether the user's own training is a pickled function, which the study's folder holds."""
        return pickled.is_pickled(self.own_code)

    @property
    def rule(self) -> ValueRule | None:
        """The rule for a trial's value. None keeps the value that the user's own objective returns."""
        assert self.direction is not None
        return ValueRule.parse(self.value, self.direction) if self.value else None

    @property
    def guard(self) -> DivergenceGuard:
        """The divergence guard."""
        assert self.direction is not None
        policy = self.failures.diverged
        return DivergenceGuard(factor=policy.factor, patience=policy.patience, direction=self.direction)

    @property
    def goals(self) -> Goals:
        """The objectives and constraints of the study; SpecError for a wrong constraint."""
        assert self.direction is not None
        first = self.metric if self.is_declared else OWN_VALUE
        directions = self.objectives or {first: self.direction}
        known = (*directions, *objectives.COSTS) if self.is_declared else directions
        return Goals(directions=directions, bounds=objectives.bounds_of(self.constraints, known))

    @property
    def tree(self) -> Tree:
        """The training sections, or [space], with Parameters for ranges and choices; empty for a user's own objective."""
        if not self.is_declared:
            return space.lift(self.space, "space")
        given = {section: getattr(self, section) for section in SECTIONS}
        return {
            section: space.lift(table, section) for section, table in given.items() if table or section not in OPTIONAL
        }

    def as_stored(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values of a checked configuration as Optuna stores them: our own suggestions of lists are texts."""
        return {path: value if self.objective else space.encode(value) for path, value in values.items()}

    @property
    def is_pinned(self) -> bool:
        """Whether the spec has nothing to search."""
        return bool(self.params) if self.objective else not list(space.parameters(self.tree))

    @property
    def code_references(self) -> list[str]:
        """All names in the spec that refer to the user's own code, such as "mine.py:objective"."""
        if not self.is_declared:
            return [reference for reference in (self.objective, self.train) if reference]
        names = [part.get("name") for part in self.tree.values()]
        listed = [option for name in names for option in (name.options if isinstance(name, Choices) else [name])]
        return [name for name in listed if isinstance(name, str) and usercode.is_reference(name)]

    @property
    def document(self) -> dict[str, Any]:
        """The spec as plain JSON and TOML values, without unset keys."""
        left_out = {section for section in LEFT_OUT_IF_EMPTY if not getattr(self, section)}
        found = self.model_dump(exclude_none=True, exclude={"receipt", *left_out})
        found["launch"] = self.launch.document
        if not found["launch"]:  # as in studies from before it
            del found["launch"]
        if self.processes_per_trial is None:  # it has no meaning then, and studies from before it lack it
            del found["recovery"]["rank_timeout"]
        if not self.failures.diverged.patience:  # as in studies from before the divergence guard
            found["failures"]["diverged"] = {key: found["failures"]["diverged"][key] for key in Policy.model_fields}
        if self.format == 1:  # it had neither key
            del found["format"]
            if found["data"].get("reading") == 1:
                del found["data"]["reading"]
        return found

    @property
    def identity(self) -> dict[str, Any]:
        """The part of the document that must be equal for all workers of a study."""
        found = {key: value for key, value in self.document.items() if key not in UNIDENTIFYING}
        found["sampler"] = {key: value for key, value in self.sampler.items() if key != STANDS_FOR}
        if self.objectives:  # a list, since their order counts
            found["objectives"] = [list(objective) for objective in self.objectives.items()]
        return found

    def managed_by(self, other: StudySpec) -> StudySpec:
        """Return this spec with the other spec's MANAGED settings."""
        failures = {"failures": other.failures.instead_of(self.failures)}
        return self.model_copy(update={key: getattr(other, key) for key in MANAGED} | failures)

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the format and the identity."""
        text = json.dumps([self.format, self.identity], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def _as_read_before(data: space.Tree) -> space.Tree:
    """Return the section `data` with the options that make format 2 read the data as format 1 did."""
    name, classes = str(data.get("name")), data.get("classes")
    if name in READ_ANEW:
        return {"reading": 1} | READ_ANEW[name] | data
    listed = classes if isinstance(classes, list) else []
    wanted = [one for entry in listed for one in (entry if isinstance(entry, list) else [entry])]
    has_numbers = any(isinstance(one, int) for one in wanted)
    return {"reading": 1} | data if has_numbers and usercode.is_reference(name) else data


def _as_split_before(data: space.Tree, spec: StudySpec) -> space.Tree:
    """Return the section `data` of a format in which the study's seed decides the split. SpecError for another split seed."""
    if SPLIT_SEED not in data or usercode.is_reference(str(data.get("name"))):  # a user's own source may have it
        return data
    if data[SPLIT_SEED] != spec.seed:
        raise SpecError(
            f"data.{SPLIT_SEED} = {shown(data[SPLIT_SEED])}: in format {spec.format} the study's seed decides the split, here "
            f"seed = {spec.seed}; remove {SPLIT_SEED}, or start a new study with --name"
        )
    return {key: value for key, value in data.items() if key != SPLIT_SEED}


def _with_what_is_judged(sections: space.Tree, metric: str) -> space.Tree:
    """Return the sections with a default for `stopping.monitor` and with all metrics that a trial needs in `watch.metrics`."""
    stopping, watch = dict(sections.get("stopping", {})), dict(sections.get("watch", {}))
    if "patience" in stopping:
        stopping.setdefault("monitor", metric)
    monitor = stopping.get("monitor", [])
    choices = monitor.get("choices", []) if isinstance(monitor, dict) else [monitor]
    judged = metrics.further([name for name in (metric, *choices) if isinstance(name, str) and metrics.is_known(name)])
    watched = watch.get("metrics", [])
    if judged and isinstance(watched, list) and all(isinstance(name, str) for name in watched):
        watch["metrics"] = list(dict.fromkeys([*watched, *judged]))
    return sections | {key: table for key, table in (("stopping", stopping), ("watch", watch)) if table}


def read_document(path: Path) -> Mapping[str, Any]:
    """Return the document of a study file or pinned config, a name included; SpecError if the file cannot be read."""
    try:
        found = toml_file.read(path)
    except FileNotFoundError:
        raise SpecError(f"{path}: no such file; `{command('init', path)}` writes one to start from") from None
    found.setdefault("name", path.stem)
    receipt = found.get("receipt")
    was_resolved = isinstance(receipt, dict) and "fingerprint" in receipt
    return as_meant(found) if was_resolved else found


def as_meant(document: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a document that an earlier version may have resolved, with the keys added that did not exist then.

    A resolved document holds every default of its version. An optimizer without `decay` was written before `decay` existed,
    so all weights decay. A document without `format` has format 1. One without `failures.diverged.patience` has no guard.
    One whose sampler is `auto` without a record of what it stands for chooses by its space.
    """
    if not isinstance(document, Mapping):  # reported later
        return document
    document = _with_record_of_auto(without_unnamed_guard({"format": 1, **document}))
    optimizer = document.get("optimizer")
    if not isinstance(optimizer, dict) or not optimizer:
        return document
    tables = [optimizer, *(value for value in optimizer.values() if isinstance(value, dict))]
    if any("decay" in table for table in tables):
        return document
    return {**document, "optimizer": {**optimizer, "decay": "all"}}


def _with_record_of_auto(document: Mapping[str, Any]) -> Mapping[str, Any]:
    sampler = document.get("sampler")
    if not isinstance(sampler, dict) or sampler.get("name") != "auto":
        return document
    return {**document, "sampler": {STANDS_FOR: BY_SPACE, **sampler}}


def without_unnamed_guard(document: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a document from before the divergence guard with the guard turned off."""
    failures = document.get("failures")
    diverged = failures.get("diverged") if isinstance(failures, dict) else None
    if not isinstance(failures, dict) or not isinstance(diverged, dict) or "patience" in diverged:
        return document
    return {**document, "failures": {**failures, "diverged": {**diverged, "patience": 0}}}


def check_name(name: str, path: str) -> None:
    """Raise SpecError for a study name that is not printable or that a command line would misread."""
    if not name.isprintable() or name != name.strip() or not 0 < len(name) <= MAX_NAME:
        raise SpecError(f"{path} = {name!r}: is not a name for a study; use 1 to {MAX_NAME} printable characters")
    if name.startswith("-") or name.endswith(".toml"):
        raise SpecError(f"{path} = {name!r}: a command would read it as an option or a file; choose another name")


def check_path(value: Any, path: str) -> None:
    """Raise SpecError for a path with a control character. Its usual origin is a Windows path with backslashes in "..."."""
    if isinstance(value, str) and not value.isprintable():
        raise SpecError(f"{path} = {shown(value)}: is not a path, it holds a control character; {toml_file.ESCAPES}")
    if path == "checkpoints" and isinstance(value, str) and bucket_url.is_url(value):
        bucket_url.check(value, path)


def _lifted(spec: StudySpec, section: str) -> Tree:
    """Return a section with Parameters for its ranges and choices; SpecError lists mistakes in its grammar."""
    table: space.Tree = getattr(spec, section)
    _check_plain(table, section)
    mistakes = Mistakes()
    lifted: space.Tree = {}
    for key, value in table.items():
        with mistakes.collect():
            lifted |= space.lift({key: value}, section)
    mistakes.raise_if_any()
    if isinstance(name := lifted.get("name"), dict):
        raise SpecError(f"{section}.name: {shown(name)} is neither a name nor a choice; {space.GRAMMAR}")
    if section == "space":
        space.check_free(lifted, section)
    else:
        space.check_branches({section: lifted})
    if spec.format > 1:
        _refuse_many_choices({section: lifted})
    return lifted


def _refuse_many_choices(tree: space.Tree) -> None:
    for path, parameter in space.parameters(tree):
        if isinstance(parameter, Choices) and len(parameter.options) > MAX_CHOICES:
            raise SpecError(
                f"{path}: has {len(parameter.options):,} choices, at most {MAX_CHOICES:,} are possible; for numbers "
                "write a range, { low = ..., high = ... }"
            )


def _can_lift(spec: StudySpec, section: str) -> bool:
    mistakes = Mistakes()
    with mistakes.collect():
        _lifted(spec, section)
    return not mistakes


def _check_plain(value: Any, path: str) -> None:
    """Raise SpecError that lists the values that JSON cannot hold: dates, times, nan and inf."""
    lines = list(_unplain(value, path))
    if lines:
        raise SpecError(*lines)


def _unplain(value: Any, path: str) -> Iterator[str]:
    if isinstance(value, dict):
        yield from (line for key, child in value.items() for line in _unplain(child, f"{path}.{key}"))
    elif isinstance(value, list):
        yield from (line for child in value for line in _unplain(child, path))
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{path}: {value} is not a finite number"
    elif value is not None and not isinstance(value, str | int | float):
        yield f"{path}: {value} is a {type(value).__name__}; write it as text in quotes"


def differences(stored: StudySpec, mine: StudySpec) -> list[str]:
    """Return a line for each difference between two specs' identities: path, the study's value, the file's value."""
    old, new = _flat(stored.identity), _flat(mine.identity)
    return [
        f"{key}: the study has {_shown(old, key)}, the file has {_shown(new, key)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def _flat(tree: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        here = f"{path}.{key}" if path else key
        if isinstance(value, list) and value and all(isinstance(one, dict) for one in value):  # tables of `start`
            value = {str(place): one for place, one in enumerate(value, start=1)}
        is_subtree = isinstance(value, dict) and not value.keys() & {"low", "high", "choices"}
        flat |= _flat(value, here) if is_subtree else {here: value}
    return flat


def _shown(flat: Mapping[str, Any], key: str) -> str:
    return json.dumps(flat[key]) if key in flat else "nothing"
