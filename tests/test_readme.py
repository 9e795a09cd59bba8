"""What the README names is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hpo.spec.failures import Kind, Policies
from hpo.spec.study_file import StudySpec

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
TESTS = "\n".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))


@pytest.mark.parametrize("prefix", sorted(set(re.findall(r"`(test_\w+?)_?\.\.\.`", README))))
def test_every_test_that_the_readme_names_is_there(prefix: str) -> None:
    assert re.search(rf"def {prefix}\w*\(", TESTS)


def test_every_kind_of_failure_stands_in_the_readme_with_its_policy() -> None:
    for kind in Kind:
        (row,) = re.findall(rf"^\| `{kind}`.*", README, re.MULTILINE)
        if kind is Kind.LEASE_LOST:
            continue
        policy = Policies().of(kind)
        _, _, attempts, then, *_ = (cell.strip() for cell in row.split("|"))
        assert attempts.startswith(str(policy.retries) if policy.retries else "none"), row
        assert then.startswith("FAIL" if policy.then == "fail" else "PRUNED"), row


def test_the_template_shows_the_defaults(tmp_path: Path) -> None:
    template = (ROOT / "hpo" / "spec" / "template.toml").read_text()
    file = tmp_path / "study.toml"
    plain = StudySpec.load(_written(file, template))
    shown = re.sub(r"^# ?", "", template[template.index("# [recovery]") :], flags=re.MULTILINE)
    assert StudySpec.load(_written(file, template + shown)).document == plain.document


def _written(file: Path, text: str) -> Path:
    file.write_text(text)
    return file
