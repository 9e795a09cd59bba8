"""What chance does to a value that was chosen as the best of many, and what the test says of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hpo.spec import metrics
from hpo.study import interval
from hpo.study.format import range_text, value_text, with_interval
from hpo.study.interval import MULTILABEL, TEST_IMAGES_KEY

if TYPE_CHECKING:
    from hpo.study.status import Best, Summary


def choice_lines(summary: Summary) -> list[str]:
    """Return two lines on what chance does to the best value of a search.

    There are none for one trial, for several objectives and for an objective of the user's own, whose values may be exact.
    """
    tried = summary.counts["complete"] + summary.counts["pruned"]
    best = summary.best
    if best is None or summary.metric is None or tried < 2:
        return []
    epochs = ", each at its best epoch," if summary.value_rule == "best" else ""
    return [
        f"chance   the best of {tried} trials{epochs} is partly luck",
        f"         {_rivals(best) if best.interval else _why_no_interval(best, summary.metric)}",
    ]


def _why_no_interval(best: Best, metric: str) -> str:
    if not metrics.is_share(metric):
        return f"no interval for {metric}: values of single examples are not kept"
    if best.task == MULTILABEL:
        return f"no interval for {metric}: the labels of an example are not independent"
    return "no interval: the trial does not name its number of examples"


def _rivals(best: Best) -> str:
    if not best.rivals:
        return "no other complete trial lies within its interval"
    others = "1 other complete trial lies" if best.rivals == 1 else f"{best.rivals:,} other complete trials lie"
    return f"{others} within its interval, of {best.interval.images:,} examples" if best.interval else others


def outcome_lines(metrics_found: Mapping[str, Any], metric: str, *, tried: int) -> list[str]:
    """Return the lines on a final training's validation and test.

    Args:
        metrics_found: what `final.train` returns.
        metric: the study's metric.
        tried: trials of the search behind the config; 0 if none is known.
    """
    found = metrics_found
    images, value, epoch = interval.counted(found), found["value"], found["epoch"]
    shown = with_interval(value, interval.of_metric(metric, value, images))
    lines = [f"validation {metric} {shown}, with the weights of epoch {epoch}"]
    if found["overfits_since"] is not None:
        lines.append(
            f"overfits since epoch {found['overfits_since']}: the validation loss rose while the training loss fell"
        )
    count, names = interval.counted(found, TEST_IMAGES_KEY), metrics.of_test(found, metric)
    for name in [one for one in names if one != "loss"] or names:
        test = found[f"test_{name}"]
        lines.append(f"test {name} {with_interval(test, interval.of_metric(name, test, count))}")
    return [*lines, *_outside(found, metric, images, tried)]


def seeds_lines(metrics_found: Mapping[str, Any], metric: str) -> list[str]:
    """Return the lines on final trainings with several seeds: each one, and the means with their intervals.

    Args:
        metrics_found: what `final.several.train` returns.
        metric: the study's metric.
    """
    trainings, means = metrics_found["trainings"], metrics_found["means"]
    tests = {f"test_{name}": f"test {name}" for name in metrics.of_test(means, metric)}
    heads = {"value": f"validation {metric}", **tests}
    folders = max(len(one["folder"]) for one in trainings)
    lines = ["  ".join([f"{'':<{folders}}", *heads.values()])]
    for one in trainings:
        shown = (f"{value_text(one[key]):>{len(head)}}" for key, head in heads.items())
        lines.append("  ".join([f"{one['folder']:<{folders}}", *shown]))
    for key, name in {**tests, "value": heads["value"]}.items():
        found = means[key]
        told = f"{value_text(found['value'])} ({value_text(found['low'])} to {value_text(found['high'])})"
        lines.append(f"{name} {told}, standard deviation {value_text(found['deviation'])}")
    lines.append(f"means of {len(trainings)} seeds with 95 % intervals by Student's t, for this test part")
    return [*lines, *_other_parts(means, interval.counted(metrics_found, TEST_IMAGES_KEY))]


def _other_parts(means: Mapping[str, Any], images: int | None) -> list[str]:
    """Return a line on the accuracy on other test parts, if there is an interval."""
    if images is None or "test_accuracy" not in means:
        return []
    whole = range_text(interval.wilson(means["test_accuracy"]["value"], images))
    return [f"for other test parts of {images:,} examples: accuracy {whole}"]


def _outside(found: Mapping[str, Any], metric: str, images: int | None, tried: int) -> list[str]:
    """Return a line if the test value lies outside the validation's interval; for a metric without one, that of the accuracy."""
    name = metric if metrics.is_share(metric) else "accuracy"
    if f"test_{name}" not in found:
        return []
    value = found["value"] if name == metric else found["history"][found["epoch"] - 1]["validation_accuracy"]
    test, known = found[f"test_{name}"], interval.of_metric(name, value, images)
    if known is None or test in known:
        return []
    where = f"test {name} {value_text(test)} lies outside the interval of validation {name}, {range_text(known)}"
    if test > known.high:
        return [f"{where}: by chance, or because the two parts differ"]
    why = f"the best of {tried} trials was partly luck" if tried > 1 else "by chance"
    return [f"{where}: {why}, or the two parts differ; expect the test value"]
