"""What a model must know of one row of the data."""

from __future__ import annotations

from hpo.data import Splits, some
from hpo.data.inputs import NUMBERS
from hpo.models.shapes import Shape, TableShape, TokenShape


def shape_of(splits: Splits) -> Shape:
    """Return the shape of one row: of its tensor, of a table, of tokens, or of several tensors by name."""
    inputs = splits.train.inputs
    if isinstance(inputs, dict):
        if splits.kind == "named":
            return {name: tuple(one.shape[1:]) for name, one in inputs.items()}
        numbers = inputs[NUMBERS].shape[1] if NUMBERS in inputs else 0
        return TableShape(numbers=numbers, categories=splits.categories)
    if splits.kind == "tokens":
        return TokenShape(length=some(inputs).shape[1], vocabulary=splits.vocabulary)
    return tuple(inputs.shape[1:])
