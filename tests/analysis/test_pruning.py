"""What a pruner saved and may have cost, how a search went on, and smoothed values: on trials that are counted by hand."""

from __future__ import annotations

from datetime import datetime, timedelta

import numpy as np
import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from hpo.analysis import columns, progress, pruning, surface
from hpo.analysis.columns import Column, Columns
from hpo.storage.connect import Storage
from hpo.study import plain

NOON = datetime(2026, 1, 1, 12)
X = FloatDistribution(0.0, 1.0)


def trial(curve: list[float], *, ends: bool = True, begins: int = 0) -> FrozenTrial:
    """Return a trial of an hour, with this curve from step 1."""
    found = create_trial(
        params={"x": 0.5},
        distributions={"x": X},
        value=curve[-1] if ends else None,
        state=TrialState.COMPLETE if ends else TrialState.PRUNED,
        intermediate_values=dict(enumerate(curve, start=1)),
    )
    found.datetime_start = NOON + timedelta(hours=begins)
    found.datetime_complete = NOON + timedelta(hours=begins + 1)
    return found


def columns_of(place: Storage, trials: list[FrozenTrial]) -> Columns:
    study = optuna.create_study(storage=place.optuna, study_name="theirs")
    study.add_trials(trials)
    return columns.read(plain.open_any(place, "theirs"))


def test_a_pruners_saving_is_counted_and_its_cost_is_estimated_from_complete_trials_alike(lite: Storage) -> None:
    """Ten trials fall by 1 after their first step, ten by 3. A pruned one at 3.5 is like the latter: it would end at 0.5."""
    slow = [trial([10.0 + n, 9.0 + n, 9.0 + n, 9.0 + n]) for n in range(10)]
    fast = [trial([4.0 + n / 100, 2.0, 1.5, 1.0 + n / 100]) for n in range(10)]
    found = pruning.of_study(
        columns_of(lite, [*slow, *fast, trial([3.5], ends=False), trial([12.0, 11.5], ends=False)])
    )
    assert found == pruning.Pruning(pruned=2, trained=83, saved=5, judged=2, missed=1.0)
    assert found.share == pytest.approx(5 / 88)


def test_without_pruned_trials_there_is_nothing_to_say(lite: Storage) -> None:
    assert pruning.of_study(columns_of(lite, [trial([1.0])])) is None


def test_progress_counts_epochs_and_the_hours_in_which_a_trial_ran(lite: Storage) -> None:
    """Two trials run at once, then nothing for 8 hours."""
    found = columns_of(lite, [trial([3.0, 2.0]), trial([4.0]), trial([1.0, 1.0, 1.0], begins=9)])
    went = progress.of_study(found)
    assert went.order.tolist() == [0, 1, 2]
    assert went.epochs.tolist() == [2, 3, 6]
    assert went.hours.tolist() == [1.0, 1.0, 2.0]
    assert went.improvements(found) == [0, 2]


def test_a_sample_keeps_what_it_must_and_its_order() -> None:
    found = progress.sampled(range(1000), 50, keep=[999, 3])
    assert len(found) == 50
    assert {3, 999} <= set(found)
    assert found == sorted(found)
    assert progress.sampled([5, 2], 2) == [5, 2]


def test_a_surface_is_smooth_and_empty_where_no_trial_is() -> None:
    source = np.random.default_rng(0)
    x, y = source.uniform(0, 0.5, 500), source.uniform(0, 1, 500)
    x[0] = np.nan
    found = surface.smooth(
        Column(name="x", distribution=X, values=x), Column(name="y", distribution=X, values=y), 2 * x + y
    )
    assert found.values.shape == (40, 40)
    assert found.values[20, 10] == pytest.approx(2 * found.x[10] + found.y[20], abs=0.05)
    assert np.isnan(found.values[:, -1]).all()
    assert not np.isnan(found.values[:, 5]).any()
