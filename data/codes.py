"""The encoding of a source's inputs: its own, else the codes of tokens and categories that the training part has."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from hpo.data.inputs import CATEGORIES, Inputs, kind_of, some
from hpo.data.source import Fitted, Source
from hpo.data.tables.encoding import fit_categories
from hpo.data.tokens import fit_codes


def fit_of(source: Source) -> Callable[[Inputs], Fitted] | None:
    """Return what makes the encoding of the inputs, None if they stay as they are."""
    if source.fit is None and source.kind == "tokens":
        return fit_codes
    has_categories = isinstance(source.inputs, dict) and source.kind == "table" and CATEGORIES in source.inputs
    return fit_categories if source.fit is None and has_categories else source.fit


def encoded(inputs: Inputs, fitted: Fitted) -> Inputs:
    """Return encoded inputs; ValueError if rows are lost, or if codes are not those that the encoding says."""
    found = fitted.transform(inputs)
    if len(some(found)) != len(some(inputs)):
        raise ValueError(
            f"fit: its transform made {len(some(found))} rows of {len(some(inputs))}; return each row in its place"
        )
    kind = kind_of(found)
    if isinstance(found, Tensor) and kind == "tokens":
        _refuse_other_codes([found], [fitted.vocabulary], f"vocabulary = {fitted.vocabulary}")
    elif isinstance(found, dict) and kind == "table" and CATEGORIES in found:
        _refuse_other_codes(found[CATEGORIES].unbind(1), fitted.categories, f"categories = {fitted.categories}")
    return found


def _refuse_other_codes(columns: Sequence[Tensor], counts: Sequence[int], said: str) -> None:
    if len(columns) != len(counts):
        raise ValueError(f"fit: {said} for {len(columns)} columns of codes; give each its number of codes")
    for codes, count in zip(columns, counts, strict=True):
        lowest, highest = int(codes.min()), int(codes.max())
        if lowest < 0 or highest >= count:
            raise ValueError(
                f"fit: codes go from {lowest} to {highest}, and {said}; codes go from 0 to that number - 1"
            )
