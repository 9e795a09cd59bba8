"""The output of `hpo after`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from hpo import text
from hpo.study.format import range_text, value_text

if TYPE_CHECKING:
    from hpo.final.after.report import Variant, VariantReport

WIDTH = 120  # characters
UNITS = ("B", "KiB", "MiB", "GiB")


def report_text(report: VariantReport) -> str:
    """Return the report: the table of variants, the uncertainty by Monte Carlo dropout, and the files."""
    console = Console(width=WIDTH, color_system=None, markup=False, emoji=False)
    with console.capture() as capture:
        console.print(_table(report))
    lines = [*(line.rstrip() for line in capture.get().splitlines()), *_doubt(report)]
    lines += [
        f"{one.file}: {size_text(one.bytes)}, outputs within {one.largest_difference:.1e} of the model's on {one.images} rows"
        for variant in report.variants
        for one in variant.files
    ]
    return text.page(lines)


def _table(report: VariantReport) -> Table:
    table = Table(
        title=f"{text.safe(report.folder)}, on {report.validation_images} validation rows",
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    is_regression = report.variants[0].score.accuracy is None
    quality = ("rmse", "change", "loss") if is_regression else ("accuracy", "95 % interval", "change", "loss", "same")
    for head in ("variant", *quality, "zeros", "parameters", "size"):
        table.add_column(head, justify="left" if head == "variant" else "right", overflow="fold")
    for variant in report.variants:
        table.add_row(*_row(variant, report.variants[0]))
    return table


def _row(variant: Variant, first: Variant) -> list[str]:
    score = variant.score
    return [
        text.short(variant.name),
        *_quality(variant, first),
        f"{score.zeros:.1%}",
        f"{score.parameters:,}",
        size_text(score.bytes),
    ]


def _quality(variant: Variant, first: Variant) -> list[str]:
    """Return the columns on how good a variant is, and how far from the first."""
    score, before = variant.score, first.score
    if score.rmse is not None and before.rmse is not None:
        change = "" if variant is first else f"{score.rmse - before.rmse:+.4g}"
        return [value_text(score.rmse), change, value_text(score.loss)]
    assert score.accuracy is not None
    assert before.accuracy is not None
    assert score.agreement is not None
    change = "" if variant is first else f"{score.accuracy - before.accuracy:+.4f}"
    interval = range_text(variant.interval) if variant.interval else "-"
    return [f"{score.accuracy:.4f}", interval, change, value_text(score.loss), f"{score.agreement:.1%}"]


def _doubt(report: VariantReport) -> list[str]:
    found = report.mc_dropout
    if found is None:
        return []
    return [
        f"Monte Carlo dropout, {found['passes']:.0f} passes: accuracy {found['accuracy']:.4f}, loss {value_text(found['loss'])}, "
        f"spread of the predicted class {found['spread']:.4f}",
        f"entropy {found['entropy']:.4f} nats (right predictions {found['entropy_of_right']:.4f}, wrong predictions "
        f"{found['entropy_of_wrong']:.4f}), mutual information {found['mutual_information']:.4f}",
    ]


def size_text(count: int) -> str:
    """Return a number of bytes in B, KiB, MiB or GiB."""
    value = float(count)
    for unit in UNITS:
        if value < 1024 or unit == UNITS[-1]:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError  # the last unit takes all
