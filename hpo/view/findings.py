"""The findings of health checks in the terminal: short lines of at most 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hpo import text

if TYPE_CHECKING:
    from hpo.analysis.evidence import Evidence
    from hpo.analysis.health import Finding

WIDTH = 80
LABEL = "health   "
INDENT = " " * len(LABEL)


def finding_lines(findings: Sequence[Finding]) -> list[str]:
    """Return the lines on these findings, none for a healthy study. Lines to be pasted are not wrapped."""
    lines: list[str] = []
    for finding in findings:
        told = _wrapped(f"{finding.name}: {finding.text}", LABEL)
        for line in finding.mend.split("\n"):
            told += [INDENT + text.safe(line)] if line.startswith("  ") else _wrapped(line, INDENT)
        lines += told
    return lines


def healthy_line(evidence: Evidence) -> str:
    """Return the line on a study in which nothing is wrong."""
    return f"{LABEL}nothing found, in {evidence.finished:,} finished trials"


def _wrapped(foreign: str, first: str) -> list[str]:
    return textwrap.wrap(
        text.safe(foreign), WIDTH, initial_indent=first, subsequent_indent=INDENT, break_on_hyphens=False
    )
