"""Which sampler `auto` stands for in a study, and why."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hpo.errors import SpecError
from hpo.spec import space
from hpo.spec.study_file import BY_SPACE, STANDS_FOR, StudySpec

MODEL = "fidelity_tpe"
FIRST = 10  # trials that the model sees before it suggests
TINY_GRID = 32  # points; of a study from before the record
MOST_POINTS = 256  # of a grid that is chosen because the budget covers it


@dataclass(frozen=True, kw_only=True)
class AutoChoice:
    """A sampler, those of its options that are not its defaults, and the reason, one line of text."""

    name: str
    why: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def table(self) -> dict[str, Any]:
        """The choice as a study file's section `sampler`."""
        return {"name": self.name, **self.options}


def choose(spec: StudySpec) -> AutoChoice:
    """Return what `auto` stands for: what the study has recorded, else what a new study of this spec records.

    A study from before the record chooses by its space and draws its first trials at random, as it always did. The first
    records were a name alone. Then every fourth trial of the model is drawn at random, as it was when they were made.
    """
    record = spec.sampler.get(STANDS_FOR)
    if record is None:
        return _by_budget(spec)
    if record == BY_SPACE:
        return _by_space(spec)
    if isinstance(record, str):
        record = {"name": record, **(_start(spec) if record == MODEL else {})}
    name, options = record["name"], {key: value for key, value in record.items() if key != "name"}
    return AutoChoice(name=name, why="it was chosen when the study was made", options=options)


def name_of(spec: StudySpec) -> str:
    """Return the name of the sampler that suggests: what `auto` stands for, else the spec's own."""
    name: str = spec.sampler["name"]
    return choose(spec).name if name == "auto" else name


def _by_budget(spec: StudySpec) -> AutoChoice:
    """Return what a new study gets: the grid if the budget covers all points, else the model."""
    if several := _of_several(spec):
        return several
    points, trials = _points(spec), spec.budget.trials
    if 2 <= points <= min(trials, MOST_POINTS):
        why = f"the budget of {trials:,} trials covers all {points} points of the space; the study ends after them"
        return AutoChoice(name="grid", why=why)
    return AutoChoice(name=MODEL, why=_why_the_model(spec, points), options={"explore": 0, **_start(spec)})


def _by_space(spec: StudySpec) -> AutoChoice:
    """Return what a study from before the record gets: the grid of a tiny space, else the model."""
    if several := _of_several(spec):
        return several
    points = _points(spec)
    if 2 <= points <= TINY_GRID:
        return AutoChoice(name="grid", why=f"the space has {points} points, and the study ends after them")
    why = f"the space is no grid of 2 to {TINY_GRID} points"
    return AutoChoice(name=MODEL, why=why, options={"group": True} if spec.objective else {})


def _of_several(spec: StudySpec) -> AutoChoice | None:
    """Return the choice for several objectives and for constraints, None without them."""
    if not spec.objectives and not spec.constraints:
        return None
    return AutoChoice(name="tpe", why=f"there are {'several objectives' if spec.objectives else 'constraints'}")


def _points(spec: StudySpec) -> int:
    """Return the number of points of the space, 0 if it is no grid or is not known."""
    try:
        return space.grid_points(spec.tree) if spec.tree else 0
    except SpecError:  # a real range without a step, or a conditional space
        return 0


def _start(spec: StudySpec) -> dict[str, Any]:
    """Return the model's options for the space: how the first trials are drawn, and whether in groups."""
    if spec.objective:
        return {"group": True}  # the space may be conditional; a flat one is one group
    return {} if space.is_conditional(spec.tree) else {"start": "qmc"}


def _why_the_model(spec: StudySpec, points: int) -> str:
    trials, workers = spec.budget.trials, spec.workers or 1
    if not spec.tree:
        why = "the space is in the objective's own suggest calls"
    elif points < 2:
        why = "the space is no grid"
    elif points > trials:
        why = f"the budget of {trials:,} trials does not cover the {points:,} points of the space"
    else:
        why = f"the space has {points:,} points, more than {MOST_POINTS}"
    if trials <= max(FIRST, workers):  # so many begin before any can be ranked
        how = "by qmc" if _start(spec).get("start") == "qmc" else "at random"
        return f"{why}; a budget of {trials} trials is too small to learn from, so they are drawn {how}"
    return why
