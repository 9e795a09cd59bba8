"""The choices of scikit-learn's splitters, made without scikit-learn, and the digits from its file."""

from __future__ import annotations

import importlib.metadata
import sys
from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedKFold, train_test_split

from hpo.data import SOURCES, load, stratify

digits = import_module("hpo.data.digits")  # hpo.data has the function under this name
SEEDS = [0, 1, 7, 2**31, 2**32 - 1]


def vector(*sizes: int) -> np.ndarray:
    """Return labels with so many members of each class, in an order of their own."""
    return np.random.RandomState(len(sizes)).permutation(np.repeat(np.arange(len(sizes)), sizes))


#: Label vectors by name. Equal sizes give equal remainders, so chance decides which classes get one more.
STRATA = {
    "equal": vector(*[20] * 10),
    "equal, one more": vector(*[20] * 9, 21),
    "two halves": vector(50, 50),
    "small": vector(7, 7, 7),
    "skewed": vector(1000, 100, 10, 8),
    "pairs of ties": vector(11, 11, 13, 13, 17, 17, 19),
    "numbers left out": vector(30, 0, 30, 0, 40),
    "negative and large": vector(12, 15, 18) * 10**9 - 5,
    "in order": np.repeat(np.arange(6), 9),
    "many": vector(*range(8, 60)),
    "digits": load_digits().target,
}


def shares(strata: np.ndarray) -> list[int]:
    """Return counts to hold out. Each part gets a member of each class at least."""
    classes = len(np.unique(strata))
    counts = [int(np.ceil(share * len(strata))) for share in (0.15, 0.3, 0.5)]
    return sorted({max(count, classes) for count in counts} | {classes, len(strata) - classes})


@pytest.mark.parametrize("name", STRATA)
def test_what_is_held_out_is_what_train_test_split_holds_out(name: str) -> None:
    strata = STRATA[name]
    for seed in [*SEEDS, *range(100, 105)]:
        for count in shares(strata):
            rest, held = train_test_split(np.arange(len(strata)), test_size=count, stratify=strata, random_state=seed)
            ours = stratify.held_out(strata, count, seed)
            np.testing.assert_array_equal(ours[0], np.sort(rest), f"{seed}, {count}")
            np.testing.assert_array_equal(ours[1], np.sort(held), f"{seed}, {count}")


@pytest.mark.parametrize("name", STRATA)
def test_a_fold_is_that_of_a_stratified_k_fold(name: str) -> None:
    strata = STRATA[name]
    for seed in SEEDS:
        for folds in (2, 3, 5, 7):
            parts = StratifiedKFold(folds, shuffle=True, random_state=seed).split(strata, strata)
            for number, (outside, inside) in enumerate(parts):
                ours = stratify.fold(strata, folds, number, seed)
                np.testing.assert_array_equal(ours[0], outside, f"{seed}, {folds}, {number}")
                np.testing.assert_array_equal(ours[1], inside, f"{seed}, {folds}, {number}")


def test_the_installed_scikit_learn_is_one_of_those_that_were_compared() -> None:
    """If it is a newer one and the tests above pass, raise COMPARED."""
    assert stratify._is_compared()


def test_a_newer_scikit_learn_splits_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    strata = STRATA["skewed"]
    ours = stratify.held_out(strata, 200, 3), stratify.fold(strata, 4, 2, 3)
    asked = []
    monkeypatch.setattr(importlib.metadata, "version", lambda name: asked.append(name) or "1.10.0rc1")
    stratify._is_compared.cache_clear()
    try:
        theirs = stratify.held_out(strata, 200, 3), stratify.fold(strata, 4, 2, 3)
    finally:
        stratify._is_compared.cache_clear()
    assert asked == ["scikit-learn"]
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one[0], other[0])
        np.testing.assert_array_equal(one[1], other[1])


def test_the_digits_are_those_that_scikit_learn_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = load_digits(return_X_y=True)
    read = digits.digits()
    assert torch.equal(read.images.flatten(1).double(), torch.from_numpy(images))
    assert torch.equal(read.labels, torch.from_numpy(labels))
    monkeypatch.setattr(digits, "FILE", digits.FILE.with_name("elsewhere.csv.gz"))
    assert digits._in_the_package() is None
    loaded = digits.digits()
    assert torch.equal(loaded.images, read.images)
    assert torch.equal(loaded.labels, read.labels)


def test_neither_the_digits_nor_their_split_loads_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sklearn.datasets", "sklearn.model_selection"):
        monkeypatch.setitem(sys.modules, name, None)  # an import of it is an error
    source = SOURCES["digits"]()
    assert len(load(source, split_seed=0, device="cpu").train.targets) == 1257
    assert len(load(replace(source, folds=3, fold=1), split_seed=0, device="cpu").train.targets) == 1018
