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
    from hpo.data import Overview
    from hpo.train.build.check import Findings

WIDEST_NAME = 40  # characters of a class's name in its column
MOST_CLASSES = 40  # in the table of data
ABREAST = 6  # examples in a line
SHADES = " .:-=+*#%@"  # of an example, from black to white


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
    """Return what the data holds, the model's table, the measured epoch and the cost of the budget."""
    epoch = found.epoch
    cost = found.budget_seconds(spec.budget.trials, workers)
    lines = [
        "",
        *_data_lines(found.data),
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


def _data_lines(found: Overview) -> list[str]:
    """Return parts and classes with their counts, what is to be said of the files, and an example of the first classes."""
    parts = list(found.counts)
    names = [text.short(name) for name in found.classes]
    width = min(WIDEST_NAME, max(map(len, [*names, "class"])))
    totals = [sum(found.counts[part]) for part in parts]
    heads = [f"{part} (own)" if part in found.shipped else part for part in parts]

    def row(name: str, values: Sequence[object]) -> str:
        return f"  {name:<{width}}  " + "  ".join(
            f"{value!s:>{len(head)}}" for value, head in zip(values, heads, strict=True)
        )

    rows = [
        row(name, [found.counts[part][number] for part in parts]) for number, name in enumerate(names[:MOST_CLASSES])
    ]
    more = len(names) - MOST_CLASSES
    return [
        f"data: {sum(totals)} images {found.shape} as [channels, height, width], {len(names)} classes",
        row("class", heads),
        *rows,
        *([f"  ... and {more} more classes"] if more > 0 else []),
        row("all", totals),
        *(f"  note: {note}" for note in found.notes),
        *([_copies(found.copies, sum(found.counts["validation"]))] if found.copies else []),
        *_example_lines(names, found.examples),
    ]


def _copies(copies: int, validation: int) -> str:
    return (
        f"  note: {copies} of {validation} validation images are training images too, pixel for pixel; what they score is "
        "no measure of new images: remove copies from the data"
    )


def _example_lines(names: Sequence[str], examples: Sequence[Sequence[Sequence[float]]]) -> list[str]:
    """Return the examples side by side, each under its class's name."""
    lines: list[str] = []
    for start in range(0, len(examples), ABREAST):
        some = examples[start : start + ABREAST]
        wide = len(some[0][0])
        lines += ["", "  " + "  ".join(f"{name[:wide]:<{wide}}" for name in names[start : start + len(some)])]
        for line in zip(*some, strict=True):
            lines.append("  " + "  ".join("".join(map(_shade, row)) for row in line))
    return lines


def _shade(brightness: float) -> str:
    return SHADES[min(len(SHADES) - 1, int(brightness * len(SHADES)))]


def _costs(found: Findings) -> str:
    return ", ".join(f"{name} {amount_text(cost)}" for name, cost in found.costs.items())


def warnings_text(warnings: Sequence[str]) -> str:
    """Return a line for each warning, or that there is none."""
    return text.page(f"warning: {line}" for line in warnings) or "no warnings"
