"""The divergence guard: after which report of a curve it ends a trial, and how the setting is read, kept and shown."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from hpo.errors import SpecError
from hpo.spec.curve import Direction
from hpo.spec.divergence import DivergenceGuard
from hpo.spec.study_file import StudySpec
from hpo.storage import sql
from hpo.storage.connect import Storage
from hpo.storage.tables import hpo_studies
from hpo.study import study as studies
from hpo.study.study import Study

NAN, INF = math.nan, math.inf
OWN = {"name": "own", "objective": "x.py:f", "direction": "minimize"}


def ends_after(curve: list[float], direction: Direction = "minimize", **settings: Any) -> int | None:
    """Return after how many reports the guard ends a trial with this curve, None if it does not."""
    guard = DivergenceGuard(direction=direction, **{"factor": 100.0, "patience": 3, **settings})
    return next((count for count in range(1, len(curve) + 1) if guard.why(curve[:count])), None)


@pytest.mark.parametrize(
    ("curve", "after"),
    [
        ([NAN] * 9, 3),
        ([1.0, 0.9, *[NAN] * 9], 5),
        ([1.0, 0.9, *[1e6] * 9], 5),
        ([INF] * 9, 3),
        ([-INF] * 9, 3),
        ([1.0, 1e6, NAN, INF, 1.0], 4),  # mixed
        ([1.0, 1e6, 1e6, 1.0] * 9, None),  # it recovers each time
        ([NAN, NAN, 1.0] * 9, None),
        ([1.0, 1e6, 1.0, 1e6, 1e6, 1e6], 6),  # one peak does not raise the bound
        ([2.3026] * 99, None),  # at chance for long
        ([1.0, 100.0, 100.0, 100.0], None),  # at the bound, not beyond it
        ([1.0, 100.1, 100.1, 100.1], 4),
        ([1e6] * 9, None),  # the first report sets the scale
        ([1e6, *[1e8] * 3], None),
        ([1e6, *[1.1e8] * 3], 4),
        ([1e-9, *[0.5] * 9], None),  # no bound is below the factor
        ([0.0, 0.0, *[5e3] * 9], None),  # zeros have no scale
        ([0.0, 0.0, 7.0, *[5e3] * 9], 6),
        ([10.0 * 10**place for place in range(30)], None),  # grows, but not at once
        ([5.0, -100.0, -9e9, *[400.0] * 9], None),  # negative: the largest |value| counts
        ([-1.0, -2.0, *[300.0] * 3], 5),
        ([1.0, *[-1e9] * 9], None),  # far better is not worse
        ([], None),
    ],
)
def test_a_loss_ends_after(curve: list[float], after: int | None) -> None:
    assert ends_after(curve) == after


@pytest.mark.parametrize(
    ("curve", "after"),
    [
        ([0.9, *[0.1] * 9, *[0.0] * 9], None),  # an accuracy is bounded
        ([0.1, *[1e6] * 9], None),  # far better
        ([-1.0, *[-1e6] * 9], 4),
        ([0.1, 0.9, *[-1e6] * 9], 5),  # such as a coefficient of determination
        ([0.1, *[NAN] * 9], 4),
    ],
)
def test_a_score_ends_after(curve: list[float], after: int | None) -> None:
    assert ends_after(curve, "maximize") == after


def test_patience_and_factor() -> None:
    curve = [1.0, 11.0, 11.0, 11.0, 11.0]
    assert [ends_after(curve, factor=10.0, patience=patience) for patience in range(6)] == [None, 2, 3, 4, 5, None]


def test_the_bound_is_named() -> None:
    guard = DivergenceGuard(factor=100.0, patience=2, direction="minimize")
    assert guard.why([2.3, 1e6, 1e6]) == "2 reports in a row are not finite or above 230"
    assert guard.why([NAN, NAN]) == "2 reports in a row are not finite"
    assert DivergenceGuard(factor=100.0, patience=1, direction="maximize").why([-3.0, -1e6]) == (
        "the report is not finite or below -300"
    )


# --- its setting ------------------------------------------------------------------------------------------------------


def patience_of(**diverged: Any) -> int:
    return StudySpec.from_document({**OWN, "failures": {"diverged": diverged}}).guard.patience


def test_a_new_study_has_a_guard() -> None:
    assert StudySpec.from_document(OWN).guard == DivergenceGuard(factor=100.0, patience=3, direction="minimize")
    assert (patience_of(then="fail"), patience_of(patience=0), patience_of(patience=7)) == (3, 0, 7)


@pytest.mark.parametrize("wrong", [{"patience": -1}, {"patience": 2.5}, {"factor": 1.0}, {"factr": 9.0}])
def test_a_wrong_setting_is_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=rf"^failures\.diverged\.{next(iter(wrong))}"):
        patience_of(**wrong)


def test_the_guard_is_no_part_of_a_study_s_identity() -> None:
    off = {**OWN, "failures": {"diverged": {"patience": 0}}}
    assert StudySpec.from_document(OWN).fingerprint == StudySpec.from_document(off).fingerprint


def joined(place: Storage, folder: Path, **diverged: Any) -> Study:
    spec = StudySpec.from_document({**OWN, "failures": {"diverged": diverged}} if diverged else OWN)
    return studies.create_or_join(
        place, spec.model_copy(update={"checkpoints": str(folder)}), code_folder=folder, code_digest=""
    )


def without_guard(place: Storage) -> str:
    """Let the stored spec be one from before the guard. Return it."""
    with sql.writing(place.engine) as connection:
        spec = json.loads(connection.execute(sa.select(hpo_studies.c.spec)).scalar_one())
        spec["failures"]["diverged"] = {"retries": 0, "then": "prune"}
        connection.execute(hpo_studies.update().values(spec=json.dumps(spec)))
    return json.dumps(spec)


def test_a_study_from_before_the_guard_keeps_none_until_a_file_names_it(lite: Storage, tmp_path: Path) -> None:
    assert joined(lite, tmp_path).spec.guard.patience == 3
    before = without_guard(lite)
    assert studies.join(lite, "own").spec.guard.patience == 0
    assert joined(lite, tmp_path, retries=0).spec.guard.patience == 0
    with lite.engine.connect() as connection:
        assert connection.execute(sa.select(hpo_studies.c.spec)).scalar_one() == before  # an earlier hpo reads it still
    assert joined(lite, tmp_path, patience=5).spec.guard.patience == 5
    assert joined(lite, tmp_path).spec.guard.patience == 3  # the last run sets it
