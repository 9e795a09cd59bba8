"""Findings of health checks in the terminal."""

from __future__ import annotations

from hpo.analysis.health import Finding
from hpo.view.findings import WIDTH, finding_lines


def test_findings_are_wrapped_and_what_is_to_be_pasted_is_not() -> None:
    pasted = "  lr = { low = 0.0001, high = 1.0, log = true }" + "  # a comment that makes the line long" * 3
    found = Finding(
        name="near a bound", text="word " * 30 + "end.", mend=f"Search a wider range:\n  [optimizer]\n{pasted}"
    )
    lines = finding_lines([found, found])
    assert lines[0].startswith("health   near a bound: word word")
    assert lines[:6] == lines[6:]
    assert lines[3:6] == ["         Search a wider range:", "           [optimizer]", f"         {pasted}"]
    assert all(len(line) <= WIDTH for line in lines if pasted not in line)
    assert finding_lines([]) == []


def test_foreign_text_cannot_steer_the_terminal() -> None:
    [line, mend] = finding_lines([Finding(name="failures", text="\x1b[2J", mend="  \x1b]0;")])
    assert line == "health   failures: \\x1b[2J"
    assert mend == "           \\x1b]0;"
