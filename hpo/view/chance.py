"""What chance does to a value that was chosen as the best of many, and what the test says of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hpo.spec import metrics
from hpo.study import interval
from hpo.study.format import range_text, value_text, with_interval
from hpo.study.interval import IMAGES_KEY

if TYPE_CHECKING:
    from hpo.study.status import Summary


def choice_lines(summary: Summary) -> list[str]:
    """Return two lines on what chance does to the best value of a search.

    There are none for one trial, for several objectives and for an objective of the user's own, whose values may be exact.
    """
    tried = summary.counts["complete"] + summary.counts["pruned"]
    best = summary.best
    if best is None or summary.metric is None or tried < 2:
        return []
    epochs = ", each at its best epoch," if summary.value_rule == "best" else ""
    if best.interval:
        second = _rivals(best.rivals or 0, best.interval.images)
    elif metrics.is_share(summary.metric):
        second = "no interval: the trial does not name its number of images"
    else:
        second = f"no interval for {summary.metric}: values of single images are not kept"
    return [
        f"chance   the best of {tried} trials{epochs} is partly luck",
        f"         {second}",
    ]


def _rivals(rivals: int, images: int) -> str:
    if not rivals:
        return "no other complete trial lies within its interval"
    others = "1 other complete trial lies" if rivals == 1 else f"{rivals:,} other complete trials lie"
    return f"{others} within its interval, of {images:,} images"


def outcome_lines(metrics_found: Mapping[str, Any], metric: str, *, tried: int) -> list[str]:
    """Return the lines on a final training's validation and test.

    Args:
        metrics_found: what `final.train` returns.
        metric: the study's metric.
        tried: trials of the search behind the config; 0 if none is known.
    """
    found = metrics_found
    images, value, epoch = found.get(IMAGES_KEY), found["value"], found["epoch"]
    shown = with_interval(value, interval.of_metric(metric, value, images))
    lines = [f"validation {metric} {shown}, with the weights of epoch {epoch}"]
    if found["overfits_since"] is not None:
        lines.append(
            f"overfits since epoch {found['overfits_since']}: the validation loss rose while the training loss fell"
        )
    accuracy = found["test_accuracy"]
    test = with_interval(accuracy, interval.of_metric("accuracy", accuracy, found["test_images"]))
    return [*lines, f"test accuracy {test}", *_outside(found, metric, images, tried)]


def seeds_lines(metrics_found: Mapping[str, Any], metric: str) -> list[str]:
    """Return the lines on final trainings with several seeds: each one, and the means with their intervals.

    Args:
        metrics_found: what `final.several.train` returns.
        metric: the study's metric.
    """
    trainings, means, images = metrics_found["trainings"], metrics_found["means"], metrics_found["test_images"]
    folders = max(len(one["folder"]) for one in trainings)
    lines = [f"{'':<{folders}}  validation {metric}  test accuracy  test loss"]
    for one in trainings:
        value, accuracy, loss = (value_text(one[key]) for key in ("value", "test_accuracy", "test_loss"))
        lines.append(f"{one['folder']:<{folders}}  {value:>{len(metric) + 11}}  {accuracy:>13}  {loss:>9}")
    shown = {"test_accuracy": "test accuracy", "test_loss": "test loss", "value": f"validation {metric}"}
    for key, name in shown.items():
        found = means[key]
        told = f"{value_text(found['value'])} ({value_text(found['low'])} to {value_text(found['high'])})"
        lines.append(f"{name} {told}, standard deviation {value_text(found['deviation'])}")
    accuracy = means["test_accuracy"]["value"]
    whole = range_text(interval.wilson(accuracy, images))
    return [
        *lines,
        f"means of {len(trainings)} seeds with 95 % intervals by Student's t, for this test part",
        f"for other test parts of {images:,} images: accuracy {whole}",
    ]


def _outside(found: Mapping[str, Any], metric: str, images: int | None, tried: int) -> list[str]:
    """Return a line if the test value lies outside the validation's interval; for a metric without one, that of the accuracy."""
    name = metric if metrics.is_share(metric) else "accuracy"
    value = found["value"] if name == metric else found["history"][found["epoch"] - 1]["validation_accuracy"]
    test, known = found[f"test_{name}"], interval.of_metric(name, value, images)
    if known is None or test in known:
        return []
    where = f"test {name} {value_text(test)} lies outside the interval of validation {name}, {range_text(known)}"
    if test > known.high:
        return [f"{where}: by chance, or because the two parts differ"]
    why = f"the best of {tried} trials was partly luck" if tried > 1 else "by chance"
    return [f"{where}: {why}, or the two parts differ; expect the test value"]
