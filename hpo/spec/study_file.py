"""The study file: read, checked for shape, fingerprinted.

`StudySpec` is the file with its defaults filled. What a value means (does `sgd` take it, is it in bounds) is decided
where the parts are known, in `hpo.train.build.registry`; here stand the grammar and the study's own settings.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import pydantic
from annotated_types import Ge, Le

from hpo.errors import Mistakes, SpecError, located, shown
from hpo.spec import metrics, objectives, options, space, toml_file, usercode
from hpo.spec.curve import Direction, ValueRule
from hpo.spec.durations import seconds
from hpo.spec.failures import Policies
from hpo.spec.metrics import Metric
from hpo.spec.objectives import OWN_VALUE, Goals
from hpo.spec.space import Choices
from hpo.spec.training import OPTIONAL, SECTIONS, Positive, with_sections
from hpo.text import command

MAX_NAME = 200  # characters; Optuna's column holds 512
#: Raised when the meaning of a study file changes; stands in front of every fingerprint. 1: up to November 2026.
FORMAT: Final = 2
#: Sources whose files are read in another way since format 2, which their option `reading` says, with the defaults that
#: options of theirs had before.
READ_ANEW: dict[str, dict[str, Any]] = {"image_folder": {}, "csv": {}, "npz": {"channels_last": False}}
#: How a study is run, not what it is: the last `hpo run` sets them.
MANAGED = ("budget", "recovery", "failures", "executor", "slots")
UNIDENTIFYING = {*MANAGED, "workers", "storage", "checkpoints"}  # may differ between two runs of one study
MAX_TRIALS = 2**31 - 1  # what an integer column of Postgres holds
MAX_WORKERS = 4096  # on one machine
MAX_CHOICES = 1000  # each is checked with every part of every other section, and stands in the row of every trial
#: What is checked against one another: where one of these is wrong, the others are not asked.
JUDGED_TOGETHER = {*SECTIONS, "objective", "params", "metric", "direction", "objectives", "constraints", "value"}
LEFT_OUT_IF_EMPTY = (*OPTIONAL, "objectives", "constraints")  # no part of a study's identity then


class Budget(pydantic.BaseModel):
    """How much may be spent on the study in all."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True)

    trials: Annotated[int, Ge(1), Le(MAX_TRIALS)] = 64
    """Rows of the study in any state but WAITING, over all runs."""
    timeout: str | None = None
    """Wall clock of one `hpo run`, such as "30m"; what still runs is parked for the next one."""
    trial_timeout: str | None = None
    """Training time of one trial; failures.time_limit says what happens then. Epochs that a checkpoint carried over count."""

    @property
    def trial_seconds(self) -> float | None:
        return seconds(self.trial_timeout, "budget.trial_timeout") if self.trial_timeout else None


class Recovery(pydantic.BaseModel):
    """How workers hold on to trials, and let go of them."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True)

    lease: str = "60s"
    """A worker that is silent for longer loses its trial; renewed three times as often."""
    grace: str = "30s"
    """From the signal that asks a worker to stop until its process is gone, parked or not."""
    outage_patience: str = "10m"
    """How long a worker bears a failing storage, training on meanwhile, before it leaves."""
    checkpoint_every: str = "30s"
    """Training time between two checkpoints, each at an epoch's end; "0s" is every epoch."""
    keep_checkpoints: Annotated[int, Ge(0), Le(MAX_TRIALS)] = 1
    """Of how many finished trials, the best ones, the last checkpoint is kept; of several objectives all of the front."""
    recycle_trials: Positive = 10_000
    """Trials after which a worker's process starts afresh."""
    recycle_growth_mb: Positive = 2048
    """Growth of a worker's resident memory, in MiB, likewise."""

    @property
    def lease_seconds(self) -> float:
        return seconds(self.lease, "recovery.lease")

    @property
    def grace_seconds(self) -> float:
        return seconds(self.grace, "recovery.grace")

    @property
    def outage_seconds(self) -> float:
        return seconds(self.outage_patience, "recovery.outage_patience")

    @property
    def checkpoint_seconds(self) -> float:
        return seconds(self.checkpoint_every, "recovery.checkpoint_every", zero=True)


class StudySpec(pydantic.BaseModel):
    """A study file with its defaults filled."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal[1, 2] = FORMAT
    """What the rest of the file means: 2, or as an earlier version of hpo read it. A file joins a study in the study's format."""
    name: str
    seed: Annotated[int, Ge(0)] = 0
    objective: Annotated[str, pydantic.StringConstraints(min_length=1)] | None = None
    """An Optuna objective of the user's own, "file.py:function"; then the training sections are left out."""
    params: dict[str, Any] = {}
    """Pinned parameters of such an objective, as `hpo export` writes them."""
    metric: Metric = "accuracy"
    """What the validation curve shows, for the declared objective: accuracy, loss, macro_f1, auroc, calibration_error or
    top_K_accuracy for any K."""
    direction: Direction | None = None
    objectives: dict[str, Direction] = {}
    """Two or more by name, in their order: first what the curve shows, then costs; the trials that none beats are a front."""
    constraints: dict[str, str] = {}
    """Soft bounds by name, such as "<= 1e6", on the first objective or on costs."""
    value: str | None = None
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
    executor: Literal["auto", "loop", "stack"] = "auto"
    """How trials are trained: one by one (loop), or several as one model (stack) where the model allows it; auto measures."""
    slots: Literal["auto"] | Annotated[int, Ge(1), Le(2**16)] = "auto"
    """Trials that a worker trains together in a stack; auto measures."""
    workers: Annotated[int, Ge(1), Le(MAX_WORKERS)] | None = None
    storage: str | None = None
    checkpoints: str | None = None
    receipt: dict[str, Any] = {}
    """What a pinned file was made from; ignored by a search."""

    @classmethod
    def load(cls, path: Path, *, name: str | None = None) -> StudySpec:
        """Read a study file or a pinned config; SpecError names the file, the key, the value and the mend.

        Args:
            name: takes the place of the file's own name for the study.
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
        """Check a document and fill the study's own defaults; SpecError lists keys, values and mends."""
        document = dict(document)
        spec, wrong, mistakes = cls._shaped(document)
        if "name" not in wrong:
            with mistakes.collect():
                check_name(spec.name, "name")
        for key in document:
            if key not in (*SECTIONS, *wrong, "params", "receipt"):
                with mistakes.collect():
                    _check_plain(document[key], key)
        if not wrong & JUDGED_TOGETHER:
            with mistakes.collect():
                spec = spec._with_defaults()
        with mistakes.collect():
            _check_durations(spec)
        for key in ("storage", "checkpoints"):
            with mistakes.collect():
                check_path(getattr(spec, key), key)
        for section in [] if spec.objective else SECTIONS:
            with mistakes.collect():
                _lifted(spec, section)
        mistakes.raise_if_any()
        return spec

    @classmethod
    def rest_of(cls, document: Mapping[str, Any]) -> StudySpec:
        """Return a spec of those keys of a wrong document that can be read, for the sake of what their values get wrong."""
        spec, _, _ = cls._shaped(dict(document))
        unread: space.Tree = {section: {} for section in SECTIONS if not _can_lift(spec, section)}
        return spec.model_copy(update=unread)

    @classmethod
    def _shaped(cls, document: dict[str, Any]) -> tuple[StudySpec, set[str], Mistakes]:
        """Return a document as far as its keys have the shape that they must have, the keys that have not, and what they say."""
        mistakes = Mistakes()
        try:
            return cls.model_validate(document), set(), mistakes
        except pydantic.ValidationError as error:
            mistakes.add(SpecError(*options.explain(error, {}, "a study file", cls)))
            wrong = {str(found["loc"][0]) for found in error.errors()}
        right = {key: value for key, value in document.items() if key not in wrong}
        return cls.model_validate({"name": "", **right}), wrong, mistakes

    def _with_defaults(self) -> StudySpec:
        """Return the spec with the study's own defaults; SpecError lists what does not go together or is no rule."""
        mistakes = Mistakes()
        spec = self._with_objective_defaults() if self.objective else self._with_training_defaults()
        for part in ("rule", "goals"):
            with mistakes.collect():
                getattr(spec, part)
        mistakes.raise_if_any()
        return spec

    def _with_objective_defaults(self) -> StudySpec:
        given = [section for section in SECTIONS if getattr(self, section)]
        if given:
            why = f"goes with a declared training, not with objective = {self.objective!r}; remove it"
            raise SpecError(*(f"{section}: {why}" for section in given))
        if self.objectives:
            objectives.check_own(self.objectives)
            return self._with_first_direction()
        if self.constraints:
            raise SpecError(
                f"constraints.{next(iter(self.constraints))}: goes with named [objectives]; "
                "an objective of your own with one value calls trial.set_constraint(name, value)"
            )
        if self.direction is None:
            raise SpecError('direction: needed with an objective of your own; write "maximize" or "minimize"')
        return self

    def _with_first_direction(self) -> StudySpec:
        first, direction = next(iter(self.objectives.items()))
        if self.direction not in (None, direction):
            raise SpecError(
                f"direction = {self.direction!r}: objectives.{first} is to be {direction}d; remove direction"
            )
        return self.model_copy(update={"direction": direction})

    def _with_training_defaults(self) -> StudySpec:
        missing = [section for section in ("data", "model", "optimizer") if not getattr(self, section)]
        if self.params and len(missing) == 3:
            raise SpecError('objective: missing; [params] are its: add objective = "file.py:function"')
        if missing:
            mend = 'with name = "...", or objective = "file.py:function"'
            raise SpecError(*(f"{section}: missing; add [{section}] {mend}" for section in missing))
        if self.params:
            raise SpecError("params: goes with an objective of your own; write the values into their sections")
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
        """Return a loaded, unresolved spec as another format reads it."""
        return StudySpec.from_document({**self.document, "format": number, "receipt": self.receipt})

    def _with_training_filled(self) -> StudySpec:
        direction = metrics.direction(self.metric)
        if self.direction not in (None, direction):
            raise SpecError(f"direction = {self.direction!r}: {self.metric} is to be {direction}d; remove direction")
        filled = {"direction": direction, "value": self.value or "best"}
        sections = with_sections(self.model_dump(include=set(SECTIONS), exclude_defaults=True))
        if self.format == 1:
            sections["data"] = _as_read_before(sections["data"])
        return self.model_copy(update=filled | _with_what_is_judged(sections, self.metric))

    @property
    def rule(self) -> ValueRule | None:
        """The rule for a trial's value; None keeps what an objective of the user's own reports and returns."""
        assert self.direction is not None
        return ValueRule.parse(self.value, self.direction) if self.value else None

    @property
    def goals(self) -> Goals:
        """What trials are judged by; SpecError for a bound that is none."""
        assert self.direction is not None
        first = OWN_VALUE if self.objective else self.metric
        directions = self.objectives or {first: self.direction}
        known = directions if self.objective else (*directions, *objectives.COSTS)
        return Goals(directions=directions, bounds=objectives.bounds_of(self.constraints, known))

    @property
    def tree(self) -> space.Tree:
        """The training sections with ranges and choices lifted out; empty for an objective of the user's own."""
        if self.objective:
            return {}
        given = {section: getattr(self, section) for section in SECTIONS}
        return {
            section: space.lift(table, section) for section, table in given.items() if table or section not in OPTIONAL
        }

    @property
    def is_pinned(self) -> bool:
        """Say whether nothing is left to search."""
        return bool(self.params) if self.objective else not list(space.parameters(self.tree))

    @property
    def code_references(self) -> list[str]:
        """Every name in the spec that means code of the user's own, such as "mine.py:objective"."""
        if self.objective:
            return [self.objective]
        names = [part.get("name") for part in self.tree.values()]
        listed = [option for name in names for option in (name.options if isinstance(name, Choices) else [name])]
        return [name for name in listed if isinstance(name, str) and usercode.is_reference(name)]

    @property
    def document(self) -> dict[str, Any]:
        """The spec as plain JSON and TOML values, without what was left unset."""
        left_out = {section for section in LEFT_OUT_IF_EMPTY if not getattr(self, section)}
        found = self.model_dump(exclude_none=True, exclude={"receipt", *left_out})
        if self.format == 1:  # which had neither key
            del found["format"]
            if found["data"].get("reading") == 1:
                del found["data"]["reading"]
        return found

    @property
    def identity(self) -> dict[str, Any]:
        """The part of the document that two workers of one study must share."""
        found = {key: value for key, value in self.document.items() if key not in UNIDENTIFYING}
        if self.objectives:  # whose order counts
            found["objectives"] = [list(objective) for objective in self.objectives.items()]
        return found

    def managed_by(self, other: StudySpec) -> StudySpec:
        """Return this spec with the other's settings for how a study is run."""
        return self.model_copy(update={key: getattr(other, key) for key in MANAGED})

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the identity, the format in front."""
        text = json.dumps([self.format, self.identity], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def _as_read_before(data: space.Tree) -> space.Tree:
    """Return a section `data` that says to read as format 1 did, where that makes a difference."""
    name, classes = str(data.get("name")), data.get("classes")
    if name in READ_ANEW:
        return {"reading": 1} | READ_ANEW[name] | data
    listed = classes if isinstance(classes, list) else []
    wanted = [one for entry in listed for one in (entry if isinstance(entry, list) else [entry])]
    has_numbers = any(isinstance(one, int) for one in wanted)
    return {"reading": 1} | data if has_numbers and usercode.is_reference(name) else data


def _with_what_is_judged(sections: space.Tree, metric: str) -> space.Tree:
    """Return the sections with patience told what to monitor, and with every metric measured that a trial is judged by."""
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
    """Return what a study file or a pinned config says, a name included; SpecError if it cannot be read at all."""
    try:
        found = toml_file.read(path)
    except FileNotFoundError:
        raise SpecError(f"{path}: no such file; `{command('init', path)}` writes one to start from") from None
    found.setdefault("name", path.stem)
    receipt = found.get("receipt")
    was_resolved = isinstance(receipt, dict) and "fingerprint" in receipt
    return as_meant(found) if was_resolved else found


def as_meant(document: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a document that was resolved before, maybe by an earlier version, with what it meant by leaving it out.

    Every default of its day stands in it. So an optimizer without `decay` is from before there was a choice, and a document
    without `format` is from before there were several.
    """
    if not isinstance(document, Mapping):  # which is told later
        return document
    document = {"format": 1, **document}
    optimizer = document.get("optimizer")
    if not isinstance(optimizer, dict) or not optimizer:
        return document
    tables = [optimizer, *(value for value in optimizer.values() if isinstance(value, dict))]
    if any("decay" in table for table in tables):
        return document
    return {**document, "optimizer": {**optimizer, "decay": "all"}}


def _check_durations(spec: StudySpec) -> None:
    mistakes = Mistakes()
    for key in ("timeout", "trial_timeout"):
        if text := getattr(spec.budget, key):
            with mistakes.collect():
                seconds(text, f"budget.{key}")
    for key in ("lease_seconds", "grace_seconds", "outage_seconds", "checkpoint_seconds"):
        with mistakes.collect():
            getattr(spec.recovery, key)
    mistakes.raise_if_any()


def check_name(name: str, path: str) -> None:
    """Refuse a study's name that a command line would take for something else."""
    if not name.isprintable() or name != name.strip() or not 0 < len(name) <= MAX_NAME:
        raise SpecError(f"{path} = {name!r}: is no name for a study; use 1 to {MAX_NAME} printable characters")
    if name.startswith("-") or name.endswith(".toml"):
        raise SpecError(f"{path} = {name!r}: a command would take it for an option or a file; choose another name")


def check_path(value: Any, path: str) -> None:
    """Refuse a path with a control character in it: as a rule a backslash of Windows that TOML took for an escape."""
    if isinstance(value, str) and not value.isprintable():
        raise SpecError(f"{path} = {shown(value)}: is no path, for it holds a control character; {toml_file.ESCAPES}")


def _lifted(spec: StudySpec, section: str) -> space.Tree:
    """Return a section with its ranges and choices lifted out; SpecError lists what is wrong of its grammar."""
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
    space.check_branches({section: lifted})
    if spec.format > 1:
        _refuse_many_choices({section: lifted})
    return lifted


def _refuse_many_choices(tree: space.Tree) -> None:
    for path, parameter in space.parameters(tree):
        if isinstance(parameter, Choices) and len(parameter.options) > MAX_CHOICES:
            raise SpecError(
                f"{path}: has {len(parameter.options):,} choices, at most {MAX_CHOICES:,} are possible; numbers are "
                "better searched as a range, { low = ..., high = ... }"
            )


def _can_lift(spec: StudySpec, section: str) -> bool:
    mistakes = Mistakes()
    with mistakes.collect():
        _lifted(spec, section)
    return not mistakes


def _check_plain(value: Any, path: str) -> None:
    """Refuse what TOML can write and JSON cannot: dates, times, nan and inf; SpecError lists it."""
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
    """Return a line for each key in which two specs' identities differ: path, the study's value, the file's value."""
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
        is_subtree = isinstance(value, dict) and not value.keys() & {"low", "high", "choices"}
        flat |= _flat(value, here) if is_subtree else {here: value}
    return flat


def _shown(flat: Mapping[str, Any], key: str) -> str:
    return json.dumps(flat[key]) if key in flat else "nothing"
