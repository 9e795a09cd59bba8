"""The page: one HTML file with its style, its figures and plotly in it. It asks for nothing from a network.

Only the scripts that are written here run: the page's own policy names them by their hashes. So foreign text cannot run, even
if it was not escaped.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

import hpo
from hpo.view.report import sections
from hpo.view.report.figures.figure import Figure
from hpo.view.report.privacy import Privacy
from hpo.view.report.reading import StudyReport

FOLDER = Path(__file__).parent
TEMPLATE = "report.html.j2"
PLOTLY = FOLDER / "plotly-cartesian.min.js"
DRAW = FOLDER / "draw.js"
STYLE = FOLDER / "report.css"
DIGITS = 5  # significant digits of a number in a figure
#: Characters that would end the block of data in the page, or a line in it.
UNSAFE = {ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&\u2028\u2029"}


def render(reports: Sequence[StudyReport], privacy: Privacy) -> str:
    """Return the page on these studies."""
    parts = privacy.clean([sections.part(one, privacy) for one in reports])
    compared = privacy.clean(sections.comparison(reports)) if len(reports) > 1 else None
    found = {
        f"{place}-{figure.name}": figure
        for place, sections_of in enumerate([*(one.sections for one in parts), [compared] if compared else []])
        for section in sections_of
        for figure in section.figures
    }
    scripts = [PLOTLY.read_text(encoding="utf-8"), DRAW.read_text(encoding="utf-8")]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(TEMPLATE).render(
        title=" · ".join(one.name for one in parts),
        parts=parts,
        compared=compared,
        data=Markup(data_block(found)),
        scripts=[Markup(script) for script in scripts],  # ours, with no text of others in them
        style=Markup(STYLE.read_text(encoding="utf-8")),
        policy=_policy(scripts),
        version=hpo.__version__,
        read_at=datetime.fromtimestamp(min(one.read_at for one in reports), UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _policy(scripts: Sequence[str]) -> str:
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{one}'" for one in hashes)
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:"


def data_block(found: dict[str, Figure]) -> str:
    """Return figures by their ids as JSON that may stand in a page."""
    told = {name: plain({"data": one.data, "layout": one.layout}) for name, one in found.items()}
    return json.dumps(told, separators=(",", ":"), allow_nan=False).translate(UNSAFE)


def plain(value: Any) -> Any:
    """Return a value in JSON's types: numbers that are not finite as None, others with DIGITS significant digits."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return _rounded(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {one.name: plain(getattr(value, one.name)) for one in dataclasses.fields(value)}
    return value


def _rounded(value: float) -> float | int | None:
    if not math.isfinite(value):
        return None
    short = float(f"{value:.{DIGITS}g}")
    return int(short) if short.is_integer() and abs(short) < 1e15 else short
