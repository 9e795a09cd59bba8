"""The encoding of a table's inputs, made from the training part alone: category lists, and what stands for missing numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from hpo.data.inputs import CATEGORIES, NUMBERS, Inputs
from hpo.data.names import in_order
from hpo.data.source import Fitted

#: What is done with missing values: nothing is trained, or their number becomes the mean or the median of the training part,
#: or the mean beside a column of 0 and 1 that says so.
Missing = Literal["refuse", "mean", "median", "indicator"]


@dataclass(frozen=True, kw_only=True, eq=False)
class TableEncoding:
    """Renumbers categories, and fills missing numbers or marks them. It can be pickled."""

    lookups: tuple[Tensor, ...]  # of each categorical column: int64, the new code by the code of the file
    fills: Tensor | None  # float32 [F], what missing numbers become; None: they stay
    marked: Tensor  # int64 [K], columns of numbers that get a column of marks

    def __call__(self, inputs: Inputs) -> Inputs:
        """Return the encoded inputs."""
        assert isinstance(inputs, dict)
        found = dict(inputs)
        if CATEGORIES in inputs:
            columns = inputs[CATEGORIES].unbind(1)
            new = [lookup[codes] for lookup, codes in zip(self.lookups, columns, strict=True)]
            found[CATEGORIES] = torch.stack(new, dim=1)
        if NUMBERS in inputs:
            found[NUMBERS] = self._numbers(inputs[NUMBERS])
        return found

    def _numbers(self, numbers: Tensor) -> Tensor:
        marks = numbers[:, self.marked].isnan().float()
        filled = numbers if self.fills is None else torch.where(numbers.isnan(), self.fills, numbers)
        return torch.cat([filled, marks], dim=1) if len(self.marked) else filled


def fit_table(
    inputs: Inputs,
    *,
    numbers: Sequence[str],
    categories: Sequence[str],
    texts: Sequence[Sequence[str]],
    missing: Missing,
) -> Fitted:
    """Return the encoding that the inputs of the training part make.

    Args:
        inputs: `numbers` float32 [N, F], NaN where one is missing, and `categories` int64 [N, C], by the codes of the file.
        numbers: names of the columns of numbers.
        categories: names of the categorical columns.
        texts: of each categorical column, the texts of the codes 1, 2, and so on, in the order of the file.
        missing: the rule for missing numbers.
    """
    assert isinstance(inputs, dict)
    lookups, kept = [], {}
    for place, name in enumerate(categories):
        codes = np.unique(inputs[CATEGORIES][:, place].numpy()).tolist()
        seen = in_order(texts[place][code - 1] for code in codes if code)
        number = {text: code for code, text in enumerate(seen, start=1)}
        lookups.append(torch.tensor([0, *(number.get(text, 0) for text in texts[place])]))
        kept[name] = seen
    known = inputs.get(NUMBERS, torch.empty(len(next(iter(inputs.values()))), 0))
    is_marked = known.isnan().any(0) if missing == "indicator" else torch.zeros(known.shape[1], dtype=torch.bool)
    marked = is_marked.nonzero().flatten()
    fills = _medians(known) if missing == "median" else None
    marks = [f"{numbers[place]} is missing" for place in marked.tolist()]
    return Fitted(
        transform=TableEncoding(lookups=tuple(lookups), fills=fills, marked=marked),
        categories=tuple(len(seen) + 1 for seen in kept.values()),
        about={
            "numbers": [*numbers, *marks],
            "categories": kept,
            "missing": missing,
            **({} if fills is None else {"medians": fills.tolist()}),
        },
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class SeenCodes:
    """Renumbers the codes of categories; those that the training part lacks become 0. It can be pickled."""

    columns: tuple[Tensor, ...]  # of each column: int64, 0 and the codes of the training part, sorted

    def __call__(self, inputs: Inputs) -> Inputs:
        """Return the encoded inputs."""
        assert isinstance(inputs, dict)
        given = inputs[CATEGORIES].unbind(1)
        new = [_places(codes.contiguous(), seen) for codes, seen in zip(given, self.columns, strict=True)]
        return inputs | {CATEGORIES: torch.stack(new, dim=1)}


def _places(codes: Tensor, seen: Tensor) -> Tensor:
    """Return the place of each code among the sorted ones, 0 for a code that is not there."""
    places = torch.searchsorted(seen, codes).clamp(max=len(seen) - 1)
    return torch.where(seen[places] == codes, places, 0)


def fit_categories(inputs: Inputs) -> Fitted:
    """Return the encoding of a table whose categories come as codes, by those of the training part."""
    assert isinstance(inputs, dict)
    seen = tuple(torch.from_numpy(np.union1d(codes.numpy(), 0)) for codes in inputs[CATEGORIES].unbind(1))
    return Fitted(
        transform=SeenCodes(columns=seen),
        categories=tuple(map(len, seen)),
        about={"categories": {str(number): codes[1:].tolist() for number, codes in enumerate(seen, start=1)}},
    )


def _medians(numbers: Tensor) -> Tensor:
    """Return the median of each column, as the mean of the two values in the middle; 0 for a column without values."""
    columns = [column[~np.isnan(column)] for column in numbers.double().numpy().T]
    return torch.tensor([float(np.median(column)) if len(column) else 0.0 for column in columns], dtype=torch.float32)
