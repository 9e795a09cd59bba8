"""The output of `hpo check`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from hpo import text
from hpo.spec import configuration, space
from hpo.spec.program import JSON
from hpo.spec.study_file import StudySpec
from hpo.study import interval
from hpo.study.format import amount_text, duration, range_text, value_text

if TYPE_CHECKING:
    from hpo.data import Leak, Overview
    from hpo.train.build.check import Findings
    from hpo.train.epoch import EpochResult

WIDEST_NAME = 40  # characters of a class name
MOST_CLASSES = 40  # rows in the table of classes
#: Augmentations that change where things are in an image.
MOVES = (
    "crop",
    "resized_crop",
    "horizontal_flip",
    "vertical_flip",
    "rotation",
    "translation",
    "scale",
    "shear",
    "trivial_augment",
)
ABREAST = 6  # example images side by side
READING = 2  # of data; the usual one is not shown
SHADES = " .:-=+*#%@"  # from black to white


def spec_text(spec: StudySpec) -> str:
    """Return the study's settings, its search space and its constants, one line each."""
    rule = f"{spec.value} epoch" if spec.value in ("best", "last") else spec.value or "as the objective returns it"
    goals = spec.goals
    goal = f"{spec.direction} {spec.own_code or 'validation ' + spec.metric}"
    if spec.objectives:
        several = ", ".join(f"{direction} {name}" for name, direction in spec.objectives.items())
        goal = f"{several} of {spec.own_code}" if spec.own_code else several
    if spec.command is not None:
        goal = f"{spec.direction} {_metric_text(spec.metric)}"
    lines = [
        f"study {spec.name}: {goal}, value: {rule}, seed {spec.seed}",
        *([f"command: {spec.own_code}"] if spec.command else []),
        *([f"bounds: {', '.join(map(str, goals.bounds))}"] if goals.bounds else []),
        f"budget: {', '.join(_budget_words(spec))}",
        f"sampler: {_sampler_text(spec)}",
        f"pruner: {_named(spec.pruner)}{_rungs_text(spec)}",
        f"divergence guard: {spec.guard}",
        f"fingerprint: {spec.fingerprint[:12]}",
    ]
    start = [f"  {configuration.text(one)}" for one in spec.start]
    if start:
        unchecked = ", not checked: hpo does not know the objective's space" if spec.objective else ""
        start = ["", f"start, tried first{unchecked}:", *start]
    if spec.objective:
        return text.page([*lines, "space: in the objective's own suggest calls", *start])
    found = dict(space.parameters(spec.tree))
    constants = [f"  {line}" for line in _constants(spec)]
    width = max((len(text.short(path)) for path in found), default=0)
    return text.page(
        [
            *lines,
            "",
            "space:",
            *(f"  {text.short(path):<{width}}  {parameter}" for path, parameter in found.items()),
            *(["", "constants:", *constants] if constants else []),
            *start,
        ]
    )


def _metric_text(metric: str) -> str:
    """Return where the values of a command come from."""
    if not metric:
        return "what the program sends by hpo.report"
    key = metric.removeprefix(JSON)
    return (
        f"the key {key.strip()} of the output's JSON lines" if key != metric else f"what '{metric}' finds in the output"
    )


def _sampler_text(spec: StudySpec) -> str:
    if spec.sampler["name"] != "auto":
        return _named(spec.sampler)
    from hpo.strategy import auto_sampler, samplers  # loads Optuna

    return f"auto: {_named(samplers.settled(spec).sampler)}, since {auto_sampler.choose(spec).why}"


def _rungs_text(spec: StudySpec) -> str:
    """Return where the pruner `auto` decides, as a continuation of the line."""
    if spec.pruner["name"] != "auto":
        return ""
    from hpo.strategy import pruners

    return f": {pruners.explain_auto(spec)}"


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
            elif not isinstance(value, space.Range | space.Choices) and (here, value) != ("data.reading", READING):
                lines.append(f"{here} = {json.dumps(value)}")
        return lines

    return walk(spec.tree, "")


def _budget_words(spec: StudySpec) -> Iterator[str]:
    """Yield the limits of the budget; the first that is spent ends the search."""
    budget = spec.budget
    yield f"{budget.trials} trials"
    if budget.wall_clock:
        yield f"{budget.wall_clock} wall clock in all"
    if budget.gpu_hours:
        yield f"{budget.gpu_hours:g} GPU-hours"
    if budget.target is not None:
        yield f"until a value of {budget.target:g}"
    if budget.patience:
        yield f"until {budget.patience} trials without a better value"
    if budget.timeout:
        yield f"{budget.timeout} a run"


def _end_words(spec: StudySpec, cost: float, gpus: int) -> str:
    """Return that a limit of time ends the search before its last trial, "" if it does not."""
    budget = spec.budget
    ends = {}
    if budget.wall_clock_seconds is not None:
        ends["wall_clock"] = budget.wall_clock_seconds
    if budget.gpu_hours is not None:
        ends["gpu_hours"] = budget.gpu_hours * 3600 / gpus
    key = min(ends, key=lambda key: ends[key], default="")
    if not key or ends[key] >= cost:
        return ""
    share = int(budget.trials * ends[key] / cost)
    return f"; budget.{key} ends it after {duration(ends[key])}, about {share} such trials"


def findings_text(spec: StudySpec, found: Findings, workers: int, gpus: int) -> str:
    """Return the data's classes, the model's table, the measured epoch and the cost of the budget.

    Args:
        spec: the study's settings.
        found: what was measured.
        workers: the number of workers that share the budget.
        gpus: how many GPUs `budget.gpu_hours` counts while these work.
    """
    epoch = found.epoch
    cost = found.budget_seconds(spec.budget.trials, workers)
    lines = [
        "",
        *_data_lines(found.data),
        "",
        "model (the middle of the space):",
        *found.model.splitlines(),
        *([f"weights: {found.weights}"] if found.weights else []),
        *_padding_lines(spec, found.data),
        "",
        f"one epoch on {found.device}: {epoch.seconds:.3f} s, training loss {value_text(epoch.train_loss)}, "
        + _judged(spec, epoch),
        *([f"costs of this model: {costs}"] if (costs := _costs(found)) else []),
        f"executor: {found.choice.executor}"
        + (f", {found.choice.slots} trials at a time" if found.choice.slots > 1 else ", one trial at a time")
        + " in each worker"
        + f": {found.choice.why}",
        *(
            [f"graph: {'used' if found.choice.captures else 'not used'}: {found.choice.graph}"]
            if found.choice.graph
            else []
        ),
        f"budget: at most {spec.budget.trials} trials x {found.longest_trial_epochs} epochs = {duration(cost)} of training "
        f"with {workers} worker{'s' if workers > 1 else ''}, plus some seconds to start; pruning and stacking reduce this"
        + _end_words(spec, cost, gpus),
        "",
    ]
    return text.page(lines)


def _padding_lines(spec: StudySpec, found: Overview) -> list[str]:
    """Return a note if a model reads the padding of texts as steps."""
    if not found.padding or "cnn1d" not in space.ends_of(spec.tree["model"]["name"]):
        return []
    share = "less than 1%" if found.padding < 0.01 else f"{found.padding:.0%}"
    return [
        f"note: cnn1d reads padding as steps of the text, {share} of all in training, so its results depend on the "
        "length that texts are filled up to; gru, lstm and transformer leave padding out"
    ]


def _judged(spec: StudySpec, epoch: EpochResult) -> str:
    """Return the accuracy of an epoch, or the value of the study's metric where there is none."""
    name = spec.metric if epoch.validation_accuracy is None else "accuracy"
    return f"validation {name} {value_text(epoch.judged(name))}"


def _data_lines(found: Overview) -> list[str]:
    """Return the counts by class and part, the notes on the files, and an example image of the first classes."""
    parts = list(found.rows)
    names = [text.short(name) for name in found.classes]
    head = "label" if found.targets.endswith("labels") else "class"
    width = min(WIDEST_NAME, max(map(len, [*names, head])))
    totals = list(found.rows.values())
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
        f"data: {sum(totals)} {found.inputs}, {found.targets}",
        row(head if names else "", heads),
        *rows,
        *([f"  ... and {more} more"] if more > 0 else []),
        row("all", totals),
        *(f"  note: {note}" for note in found.notes),
        *(f"  note: {_leak_text(leak, found)}" for leak in found.leaks),
        *_example_lines(names, found.examples),
    ]


def _leak_text(leak: Leak, found: Overview) -> str:
    """Return what two parts share, or that their times are mixed, with the mend."""
    earlier, later = ("training" if part == "train" else part for part in (leak.earlier, leak.later))
    some = f"{leak.count} of {leak.whole} {later} {found.unit}s"
    first = f"(first: {leak.places[0]}, like {leak.places[1]})"
    bad = f"they make the {later} score too good"
    if leak.what == "row":
        return (
            f"{some} are copies of {earlier} {found.unit}s {first}; {bad}: remove copies, or give copies one group and split "
            "by group"
        )
    if leak.what == "time":
        mend = "cut the parts by time" if leak.later in found.shipped else 'write split = "time"'
        return (
            f"{some} are older than the latest {earlier} {found.unit} (first: {leak.places[0]}, the latest: {leak.places[1]}); "
            f"where the past tells of the future, {bad}: {mend}"
        )
    mend = "give each group one part" if leak.later in found.shipped else 'write split = "group"'
    return f"{some} have a group of the {earlier} part {first}; {bad}: {mend}"


def small_part_warnings(spec: StudySpec, found: Overview) -> list[str]:
    """Return a line if the validation part has too few rows to compare trials by an accuracy."""
    rows, unit = found.rows["validation"], found.unit
    if not found.classes or not interval.is_too_wide(rows):  # without classes there is no accuracy
        return []
    mends = [f"add {unit}s"]
    halves = (found.rows["train"] + rows) // (3 if found.split == "time" else 2)
    if "validation" not in found.shipped and "folds" not in spec.data and halves > rows:
        mends.append(f"use folds = 2 and fold = 0 in [data] (about {halves} {unit}s)")
    if spec.value in ("best", "last"):
        mends.append('use value = "mean of last 3"')
    return [
        f"data: {rows} validation {unit}s are few: an accuracy of 0.5 on them may be {range_text(interval.wilson(0.5, rows))} "
        f"(95 %), so small differences between trials are chance; {', or '.join(mends)}"
    ]


def moved_image_warnings(spec: StudySpec, found: Overview) -> list[str]:
    """Return a line if images of a regression are moved, since its targets stay as they are."""
    moves = [name for name in MOVES if spec.tree.get("augment", {}).get(name)]
    if found.classes or not moves:
        return []
    return [
        f"augment.{moves[0]}: moves what an image shows, but not its targets; remove it if targets are places, such as "
        "key points"
    ]


def _example_lines(names: Sequence[str], examples: Sequence[Sequence[Sequence[float]]]) -> list[str]:
    """Return the example images side by side, each below the name of its class."""
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
    """Return a line for each warning, or "no warnings"."""
    return text.page(f"warning: {line}" for line in warnings) or "no warnings"
