"""Stratified parts and folds: the choices of scikit-learn's splitters to the last index, without loading scikit-learn.

Loading scikit-learn takes a second, which each worker would wait for. A version of it that is newer than those whose
choices were compared splits by itself.
"""

from __future__ import annotations

import importlib.metadata
from functools import cache

import numpy as np
import numpy.typing as npt

Positions = npt.NDArray[np.int64]
#: The last minor version of scikit-learn that `tests/datasets/test_stratify.py` compared with this module.
COMPARED = (1, 9)


def held_out(strata: npt.NDArray[np.int64], count: int, seed: int) -> tuple[Positions, Positions]:
    """Return the positions of the rest and of `count` that are held out, each sorted, as `train_test_split` chooses them.

    Args:
        strata: the class of each position. Each class has enough members for both parts.
        seed: a number below 2**32.
    """
    if not _is_compared():
        from sklearn.model_selection import train_test_split

        rest, held = train_test_split(np.arange(len(strata)), test_size=count, stratify=strata, random_state=seed)
        return np.sort(rest), np.sort(held)
    _, numbers, sizes = np.unique(strata, return_inverse=True, return_counts=True)
    members = np.split(np.argsort(numbers, kind="stable"), np.cumsum(sizes)[:-1])
    random = np.random.RandomState(seed)
    kept = _shares(sizes, len(strata) - count, random)
    taken = _shares(sizes - kept, count, random)
    is_rest, is_held = np.zeros(len(strata), bool), np.zeros(len(strata), bool)
    for of_class, first, more in zip(members, kept, taken, strict=True):
        shuffled = of_class[random.permutation(len(of_class))]
        is_rest[shuffled[:first]] = True
        is_held[shuffled[first : first + more]] = True
    return np.flatnonzero(is_rest), np.flatnonzero(is_held)


def fold(strata: npt.NDArray[np.int64], folds: int, number: int, seed: int) -> tuple[Positions, Positions]:
    """Return the positions outside and inside of a fold, each sorted, as a shuffled `StratifiedKFold` chooses them.

    Args:
        strata: the class of each position. Each class has at least `folds` members.
        folds: the number of folds.
        number: the fold, from 0.
        seed: a number below 2**32.
    """
    if not _is_compared():
        from sklearn.model_selection import StratifiedKFold

        parts = StratifiedKFold(folds, shuffle=True, random_state=seed).split(strata, strata)
        outside, inside = list(parts)[number]
        return outside, inside
    _, firsts, found = np.unique(strata, return_index=True, return_inverse=True)
    numbers = np.argsort(np.argsort(firsts))[found]  # classes in order of appearance
    in_order = np.sort(numbers)
    random = np.random.RandomState(seed)
    of_fold = np.empty(len(strata), np.int32)
    sizes = [np.bincount(in_order[start::folds], minlength=len(firsts)) for start in range(folds)]
    for one, size in enumerate(np.transpose(sizes)):
        shuffled = np.arange(folds).repeat(size)
        random.shuffle(shuffled)
        of_fold[numbers == one] = shuffled
    return np.flatnonzero(of_fold != number), np.flatnonzero(of_fold == number)


def _shares(sizes: npt.NDArray[np.int64], count: int, random: np.random.RandomState) -> npt.NDArray[np.int64]:
    """Return how many of each class are among `count`: in proportion, rounded by largest remainder, ties by chance."""
    exact = sizes / sizes.sum() * count
    shares = np.floor(exact)
    missing = int(count - shares.sum())
    remainders = exact - shares
    for value in np.unique(remainders)[::-1] if missing > 0 else ():
        tied = np.flatnonzero(remainders == value)
        added = min(len(tied), missing)
        shares[random.choice(tied, size=added, replace=False)] += 1
        missing -= added
        if not missing:
            break
    rounded: npt.NDArray[np.int64] = shares.astype(np.int64)
    return rounded


@cache
def _is_compared() -> bool:
    """Return whether the installed scikit-learn is one whose choices this module makes."""
    major, minor, *_ = importlib.metadata.version("scikit-learn").split(".")
    return (int(major), int(minor)) <= COMPARED
