"""The rules that divide rows: by group, by time, by quantile, at random; with folds, subsets and shipped parts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from hpo import data
from hpo.data import Source, select
from hpo.data.split import parted
from hpo.data.splitters import MANY_GROUPS, ByGroup

N = 600
PARTS = ("train", "validation", "test")


def source(task: str = "classification", **changes: object) -> Source:
    """Return rows of one feature, their number, with targets of a task."""
    numbers = torch.arange(N)
    targets = {
        "classification": numbers % 3,
        "binary": (numbers % 5 == 0)[:, None],
        "multilabel": torch.stack([numbers % 2 == 0, numbers % 7 == 0], 1),
        "regression": (numbers.float() ** 2)[:, None],
    }
    known = {"num_classes": 3} if task == "classification" else {}
    return Source(**({"inputs": numbers.float()[:, None], "targets": targets[task], "task": task} | known | changes))


def grouped(task: str = "classification", **changes: object) -> Source:
    """Return rows of 61 groups whose sizes differ: from 1 row to 29."""
    sizes = np.random.RandomState(0).permutation(np.r_[np.arange(1, 30), np.full(31, 5), N - 435 - 155])
    return source(task, groups=torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes)), **changes)


def timed(task: str = "classification", **changes: object) -> Source:
    """Return rows in mixed order, three of each time."""
    order = torch.from_numpy(np.random.RandomState(0).permutation(N))
    return source(task, times=order // 3, **changes)


def own(part: str, given: Source, count: int = 20) -> dict[str, object]:
    return {f"{part}_inputs": given.inputs[:count] + N, f"{part}_targets": given.targets[:count]}


def test_no_group_is_in_two_parts_and_sizes_and_classes_come_near() -> None:
    for task in ("classification", "binary", "multilabel", "regression"):
        given = grouped(task)
        parts = parted(given, 0)
        groups = [set(given.groups[rows].tolist()) for rows in parts]
        assert sum(map(len, groups)) == len(set.union(*groups)) == 61
        assert torch.equal(torch.cat(parts).sort().values, torch.arange(N))
        assert [abs(len(rows) / N - share) < 0.04 for rows, share in zip(parts, (0.7, 0.15, 0.15), strict=True)] == [
            True
        ] * 3
        if task == "classification":
            assert all(given.targets[rows].bincount().min() >= 0.25 * len(rows) for rows in parts)
    assert not torch.equal(parted(grouped(), 0)[2], parted(grouped(), 1)[2])
    assert all(map(torch.equal, parted(grouped(), 1), parted(grouped(), 1)))


def test_a_part_begins_after_the_end_of_the_one_before() -> None:
    given = timed("regression")
    train, validation, test = (given.times[rows] for rows in parted(given, 0))
    assert train.max() < validation.min()
    assert validation.max() < test.min()
    assert [len(train), len(validation), len(test)] == [420, 90, 90]
    assert all(map(torch.equal, parted(given, 0), parted(given, 7)))  # a seed changes nothing


def test_rows_of_one_time_stay_together() -> None:
    years = torch.arange(N) // 150  # four years: the last 15 % lie within the last one
    parts = parted(source(times=years), 0)
    assert [years[rows].unique().tolist() for rows in parts] == [[0, 1], [2], [3]]


def test_a_number_is_balanced_by_its_quantiles() -> None:
    given = source("regression")
    decile = torch.arange(N) // 60
    for rows, share in zip(parted(given, 0), (0.7, 0.15, 0.15), strict=True):
        counts = decile[rows].bincount(minlength=10)
        assert ((counts - 60 * share).abs() <= 2).all()
    assert not torch.equal(parted(given, 0)[2], parted(given, 1)[2])


@pytest.mark.parametrize(
    ("made", "rule"),
    [
        (source(), "stratified"),
        (source("regression"), "stratified"),
        (source("multilabel"), "random"),
        (grouped(), "group"),
        (timed(), "time"),
    ],
)
def test_the_rule_follows_from_the_data_and_may_be_written(made: Source, rule: str) -> None:
    assert all(map(torch.equal, parted(select(made), 3), parted(select(made, split=rule), 3)))
    other = select(made, split="stratified" if rule == "random" else "random") if rule != "random" else None
    if other is not None:
        assert not torch.equal(parted(other, 3)[2], parted(made, 3)[2])


@pytest.mark.parametrize("shipped", [(), ("test",)])
@pytest.mark.parametrize("make", [grouped, timed, source])
@pytest.mark.parametrize("task", ["classification", "binary", "multilabel", "regression"])
def test_folds_leave_the_test_part_and_keep_the_rule(make: Callable[..., Source], task: str, shipped: tuple) -> None:
    given = make(task)
    given = make(task, **{name: value for part in shipped for name, value in own(part, given).items()})
    whole = parted(given, 3)
    rest = torch.cat(whole[:2]).sort().values
    held = []
    for fold in range(4):
        train, validation, test = parted(select(given, folds=4, fold=fold), 3)
        assert torch.equal(test, whole[2])
        if make is timed:
            assert given.times[train].max() < given.times[validation].min()
            assert len(held) == 0 or given.times[held[-1]].max() < given.times[validation].min()
        else:
            assert torch.equal(torch.cat([train, validation]).sort().values, rest)
        if make is grouped:
            assert not set(given.groups[train].tolist()) & set(given.groups[validation].tolist())
        held.append(validation)
    found = torch.cat(held).sort().values
    assert torch.equal(found, rest) if make is not timed else len(found) == len(rest) // 5 * 4


def test_very_many_groups_are_put_into_folds_by_chance() -> None:
    rows = np.arange(3 * (MANY_GROUPS + 1))
    splitter = ByGroup(groups=rows // 3, classes=rows % 4)
    held = [splitter.fold(rows, 3, fold, 0)[1] for fold in range(3)]
    assert sorted(np.concatenate(held).tolist()) == rows.tolist()
    assert [len(set((one // 3).tolist())) for one in held] == [3334, 3334, 3333]
    assert all(len(one) == 3 * len(set((one // 3).tolist())) for one in held)


@pytest.mark.parametrize("make", [grouped, timed, source])
@pytest.mark.parametrize("task", ["classification", "multilabel", "regression"])
def test_a_subset_is_of_each_part_and_leaves_the_test_part_whole(make: Callable[..., Source], task: str) -> None:
    given = make(task)
    whole, small, large = parted(given, 1), *(parted(select(given, subset=count), 1) for count in (60, 200))
    assert (len(small[0]) + len(small[1]), len(large[0]) + len(large[1])) == (60, 200)
    for of_small, of_large, of_whole in zip(small[:2], large[:2], whole[:2], strict=True):
        assert set(of_small.tolist()) < set(of_large.tolist()) < set(of_whole.tolist())
    assert torch.equal(small[2], whole[2])


def test_shipped_parts_are_whole_and_the_rest_is_divided_by_the_rule() -> None:
    given = timed()
    train, validation, test = parted(timed(**own("test", given)), 0)
    assert given.times[train].max() < given.times[validation].min()
    assert (len(train), len(validation), test.tolist()) == (510, 90, list(range(20)))
    train, validation, test = parted(grouped(**own("validation", given)), 0)
    groups = grouped().groups
    assert not set(groups[train].tolist()) & set(groups[test].tolist())
    assert validation.tolist() == list(range(20))


def test_the_groups_of_dropped_classes_are_dropped() -> None:
    given = select(grouped(**own("test", grouped()), test_groups=torch.arange(20)), classes=[2, 0])
    assert len(given.groups) == len(given.targets) == 400
    assert len(given.test_groups) == len(given.test_targets) == 13
    assert torch.equal(given.groups, grouped().groups[given.inputs.rows])


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (source(), {"split": "group"}, 'split = "group": the data names no groups; a table or npz takes `group`'),
        (source(), {"split": "time"}, 'split = "time": the data names no times; a table or npz takes `time`'),
        (timed(groups=torch.arange(N)), {}, 'names groups and times; write split = "group" or split = "time"'),
        (source("multilabel"), {"split": "stratified"}, "a row has 2 targets, which cannot be balanced at once"),
        (
            source(**own("test", source()), **own("validation", source())),
            {"split": "random"},
            "has a validation and a test part of its own, so nothing is split",
        ),
        (source(groups=torch.arange(N) // 300), {}, "2 groups are too few for 3 parts that share no group"),
        (
            source(groups=torch.arange(N) % 3),
            {},
            "class 0 (first: row 0) lies in 1 group, and 2 more classes are like it",
        ),
        (grouped(), {"folds": 55, "fold": 0}, "groups; give at most"),
        (source(times=torch.arange(N) // 590), {}, "590 of 600 rows have the first time, 0, so nothing lies before"),
        (source(times=torch.arange(N) // 200), {"folds": 2, "fold": 0}, "have 2 different times"),
        (
            source("regression", inputs=torch.arange(7.0)[:, None], targets=torch.arange(7.0)[:, None]),
            {},
            "7 rows are too few for 3 parts; give at least 8",
        ),
        (
            source("binary", targets=(torch.arange(N) < 3)[:, None]),
            {},
            "class true has 3 rows (first: row 0): too few for every part of a stratified split, which takes at least 8 of "
            'each class; add rows, or write split = "random"',
        ),
    ],
)
def test_what_cannot_be_divided_is_refused(given: Source, options: dict, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        parted(select(given, **options), 0)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("given", "options", "notes"),
    [
        (source(), {}, ()),
        (source("regression"), {}, ("split stratified by quantiles of the target",)),
        (source("multilabel"), {}, ("split at random, not stratified, since a row has 2 targets to balance",)),
        (source(), {"split": "random"}, ("split at random, not stratified",)),
        (timed(), {}, ("split by time, the latest rows last; split_seed has no effect on it",)),
        (
            source(targets=torch.arange(N) // 100, num_classes=6, times=torch.arange(N)),
            {},
            (
                "split by time, the latest rows last; split_seed has no effect on it",
                "train has no row of class 5; validation has no row of class 0, 1, 2, 3",
            ),
        ),
    ],
)
def test_a_note_says_how_rows_are_divided(given: Source, options: dict, notes: tuple) -> None:
    assert data.load(select(given, **options), split_seed=0, device="cpu").notes == notes


def test_a_note_counts_the_groups() -> None:
    [note] = data.load(grouped(), split_seed=0, device="cpu").notes
    counts = [len(set(grouped().groups[rows].tolist())) for rows in parted(grouped(), 0)]
    assert note == "split by group, none in two parts: {} in train, {} in validation, {} in test".format(*counts)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": torch.arange(N).float()}, "groups are torch.float32; give torch.int64"),
        ({"groups": torch.arange(N - 1)}, r"groups have shape \[599\] beside 600 rows; give one for each row"),
        ({"times": torch.full((N,), torch.nan)}, r"times\[0\] is not finite; give each row its time"),
        (
            {**own("test", grouped()), "times": torch.arange(N), "test_times": torch.arange(20).float()},
            "test_times are torch.float32, those of the training part torch.int64; give one type",
        ),
        ({"test_groups": torch.arange(3)}, r"test_groups have shape \[3\] beside 0 rows"),
        (
            {"targets": torch.ones(N, dtype=torch.int64)},
            "targets: class 1 in all 600 rows, so there is nothing to learn",
        ),
    ],
)
def test_groups_times_and_targets_are_checked(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        source(**changes)


def test_a_constant_target_is_named() -> None:
    numbers = torch.stack([torch.arange(N).float(), torch.full((N,), 2.5)], 1)
    with pytest.raises(ValueError, match=r"target 'price': 2\.5 in all 600 rows, so there is nothing to learn"):
        source("regression", targets=numbers, target_names=("age", "price"))
