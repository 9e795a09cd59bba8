"""What `hpo check` prints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hpo import text
from hpo.spec import space
from hpo.spec.study_file import StudySpec
from hpo.study.format import amount_text, duration, value_text

if TYPE_CHECKING:
    from hpo.train.build.check import Findings


def spec_text(spec: StudySpec) -> str:
    """Return the study's own settings and its resolved space, one line each."""
    rule = f"{spec.value} epoch" if spec.value in ("best", "last") else spec.value or "as the objective returns it"
    goals = spec.goals
    goal = f"{spec.direction} {spec.objective or 'validation ' + spec.metric}"
    if spec.objectives:
        several = ", ".join(f"{direction} {name}" for name, direction in spec.objectives.items())
        goal = f"{several} of {spec.objective}" if spec.objective else several
    lines = [
        f"study {spec.name}: {goal}, value: {rule}, seed {spec.seed}",
        *([f"bounds: {', '.join(map(str, goals.bounds))}"] if goals.bounds else []),
        f"budget: {spec.budget.trials} trials" + (f", {spec.budget.timeout} a run" if spec.budget.timeout else ""),
        f"sampler: {_named(spec.sampler)}",
        f"pruner: {_named(spec.pruner)}",
        f"fingerprint: {spec.fingerprint[:12]}",
    ]
    if spec.objective:
        return text.page([*lines, "space: in the objective's own suggest calls"])
    found = dict(space.parameters(spec.tree))
    width = max((len(text.short(path)) for path in found), default=0)
    return text.page(
        [
            *lines,
            "",
            "space:",
            *(f"  {text.short(path):<{width}}  {parameter}" for path, parameter in found.items()),
            "",
            "constants:",
        ]
        + [f"  {line}" for line in _constants(spec)]
    )


def _named(table: dict[str, object]) -> str:
    options = ", ".join(f"{key} = {json.dumps(value)}" for key, value in table.items() if key != "name")
    return f"{table['name']}" + (f" ({options})" if options else "")


def _constants(spec: StudySpec) -> list[str]:
    def walk(tree: space.Tree, path: str) -> list[str]:
        lines = []
        for key, value in tree.items():
            here = f"{path}.{key}" if path else key
            if isinstance(value, dict):
                lines += walk(value, here)
            elif not isinstance(value, space.Range | space.Choices):
                lines.append(f"{here} = {json.dumps(value)}")
        return lines

    return walk(spec.tree, "")


def findings_text(spec: StudySpec, found: Findings, workers: int) -> str:
    """Return the model's table, the measured epoch and the cost of the budget."""
    epoch = found.epoch
    cost = found.budget_seconds(spec.budget.trials, workers)
    lines = [
        "",
        "model (the middle of the space):",
        *found.model.splitlines(),
        *([f"weights: {found.weights}"] if found.weights else []),
        "",
        f"one epoch on {found.device}: {epoch.seconds:.3f} s, training loss {value_text(epoch.train_loss)}, "
        f"validation accuracy {value_text(epoch.validation_accuracy)}",
        *([f"costs of it: {costs}"] if (costs := _costs(found)) else []),
        f"executor: {found.choice.executor}"
        + (f", {found.choice.slots} trials at a time in each worker" if found.choice.slots > 1 else "")
        + f": {found.choice.why}",
        f"budget: at most {spec.budget.trials} trials x {found.longest_trial_epochs} epochs = {duration(cost)} "
        f"with {workers} worker{'s' if workers > 1 else ''}; pruning and training several at once make it less",
        "",
    ]
    return text.page(lines)


def _costs(found: Findings) -> str:
    return ", ".join(f"{name} {amount_text(cost)}" for name, cost in found.costs.items())


def warnings_text(warnings: Sequence[str]) -> str:
    """Return a line for each warning, or that there is none."""
    return text.page(f"warning: {line}" for line in warnings) or "no warnings"
