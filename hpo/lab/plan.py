"""What is to be replayed: the table, the sampler, the pruner, the workers and the budget."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from hpo.errors import SpecError, StudyError
from hpo.lab.table import Ending, Table
from hpo.spec.failures import Policy
from hpo.spec.study_file import StudySpec, as_meant
from hpo.strategy import pruners, samplers

RECORDED = "recorded"  # the sampler that keeps the recorded order
FULL_TRIALS = 40  # of the default budget
GUARD = "failures.diverged"
SECTIONS = ("sampler", "pruner", GUARD)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A replay, to be done with several seeds."""

    table: Table
    spec: StudySpec  # the table's, with the sampler and the pruner of the replay
    keeps_order: bool  # the recorded trials begin in their order; no sampler is asked
    workers: int
    slots: int  # trials that a worker trains together
    epochs: int | None  # the budget over all workers; None: all recorded trials
    most_cut: float  # largest share of trials whose curve may be cut off where it is asked for

    @property
    def sampler(self) -> str:
        return RECORDED if self.keeps_order else str(self.spec.sampler["name"])


def make(
    table: Table,
    *,
    sampler: str,
    pruner: str,
    settings: Sequence[str] = (),
    workers: int = 8,
    slots: int = 1,
    epochs: int | None = None,
    most_cut: float = 0.1,
) -> Plan:
    """Return the checked plan of a replay.

    Args:
        table: the recorded trials.
        sampler: a sampler's name, or "recorded".
        pruner: a pruner's name.
        settings: options of the two and of the divergence guard as KEY=VALUE, such as "pruner.reduction_factor=4".
        workers: the number of simulated workers.
        slots: the number of trials that each worker trains together. It is at most an even share of the trials, as in a run.
        epochs: the budget; by default that of FULL_TRIALS full trials, or all trials in the recorded order.
        most_cut: the largest share of trials whose curve may be cut off where it is asked for.

    Raises SpecError for a wrong name or option and for slots that no worker has, StudyError if too many curves are cut off.
    """
    keeps_order = sampler == RECORDED
    _refuse_unknown("sampler", sampler, [*samplers.SAMPLERS, RECORDED])
    _refuse_unknown("pruner", pruner, pruners.PRUNERS)
    chosen = _chosen(settings)
    if keeps_order and chosen["sampler"]:
        key = next(iter(chosen["sampler"]))
        raise SpecError(f"--set sampler.{key}: the recorded order takes no options; remove it")
    if pruner == "hyperband" and not table.spec.is_declared:
        chosen["pruner"].setdefault("max_resource", max(table.last_step, 1))
    tables = {
        "sampler": {"name": "random" if keeps_order else sampler, **chosen["sampler"]},
        "pruner": {"name": pruner, **chosen["pruner"]},
    }
    recorded = _with_guard(table, chosen[GUARD])
    spec = pruners.resolve(samplers.resolve(recorded.model_copy(update=tables)))
    if not keeps_order:
        _refuse_cut_rows(table, most_cut)
        epochs = epochs or FULL_TRIALS * table.longest
    trials = len(table.rows if keeps_order else table.whole)
    slots = _slots(table, slots, most=math.ceil(trials / workers), epochs=epochs)
    return Plan(
        table=table,
        spec=spec,
        keeps_order=keeps_order,
        workers=workers,
        slots=slots,
        epochs=epochs,
        most_cut=most_cut,
    )


def _refuse_unknown(kind: str, name: str, known: Collection[str]) -> None:
    if name not in known:
        raise SpecError(f"--{kind} {name}: there is no such {kind}; known: {', '.join(sorted(known))}")


def _slots(table: Table, slots: int, *, most: int, epochs: int | None) -> int:
    """Return the slots of a worker, `most` at most.

    Raises SpecError for stacks that no worker trains, and for a budget below one epoch of a stack.
    """
    if slots > 1 and not table.spec.is_declared:
        raise SpecError(
            f"--slots {slots}: the study has an objective of its own, which a worker trains one trial at a time; leave --slots "
            "out, and set --workers to the number of trials at the same time"
        )
    found = min(slots, most)
    if epochs is not None and epochs < found:
        raise SpecError(
            f"--slots {slots}: an epoch of a stack of {found} trials is more than the budget of {epochs} epochs; write "
            f"--epochs {found} or more, or --slots {epochs} or less"
        )
    return found


def _chosen(settings: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the options by section. Raises SpecError for what is none."""
    chosen: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for setting in settings:
        section, key, value = _read(setting)
        if key == "name" and section != GUARD:
            raise SpecError(f"--set {setting}: is not an option; write --{section} {value}")
        chosen[section][key] = value
    return chosen


def _with_guard(table: Table, given: dict[str, Any]) -> StudySpec:
    """Return the table's spec with options of the divergence guard. Raises SpecError for a wrong one."""
    if not given:
        return table.spec
    if without := sorted(given.keys() & Policy.model_fields.keys()):
        raise SpecError(
            f"--set {GUARD}.{without[0]}: changes nothing in a replay; remove it, the guard has patience and factor"
        )
    failures = {"failures": {"diverged": table.spec.failures.diverged.model_dump() | given}}
    return StudySpec.from_document(as_meant({**table.document, **failures}))


def _read(setting: str) -> tuple[str, str, Any]:
    """Read one KEY=VALUE. A value is written as in a study file. A bare word is text."""
    path, is_given, written = setting.partition("=")
    section, _, key = path.strip().rpartition(".")
    if not is_given or section not in SECTIONS or not key:
        raise SpecError(
            f"--set {setting}: is not an option; write --set sampler.KEY=VALUE, --set pruner.KEY=VALUE or, for the divergence "
            f"guard, --set {GUARD}.patience=3"
        )
    try:
        return section, key, tomllib.loads(f"value = {written}")["value"]
    except tomllib.TOMLDecodeError:
        return section, key, written.strip()


def _refuse_cut_rows(table: Table, most: float) -> None:
    """Raise StudyError if so many trials were cut off that those left are a selection."""
    cut, whole = table.count(Ending.CUT), len(table.whole)
    if cut > most * (cut + whole):
        raise too_many_cut(f"{cut} of {cut + whole} trials", most)


def too_many_cut(which: str, most: float) -> StudyError:
    """Return the error for too many curves that end before the replay does."""
    return StudyError(
        f"{which} were cut off by a pruner, the divergence guard or a person before the replay is through with them, more than "
        f'{most:.0%}; what they would have become is unknown; record the study again with pruner = "none", or allow more with '
        "--most-cut"
    )
