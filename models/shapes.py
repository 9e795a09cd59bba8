"""Shapes of one input, by kind of data: what a model function is given to build from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TableShape:
    """A row of a table. A model gets a dict: `numbers` [B, numbers] and `categories` [B, len(categories)].

    A dict lacks the kind of column that the table has none of.
    """

    numbers: int
    """Number of columns with numbers."""
    categories: tuple[int, ...] = ()
    """Number of codes of each column with categories. Code 0 is a value that is missing or was not in training."""


@dataclass(frozen=True, kw_only=True)
class TokenShape:
    """A text as int64 codes [B, length]. Code 0 is padding, code 1 is a word that was not in training."""

    length: int
    vocabulary: int
    """Number of codes, with those of padding and of unknown words."""


#: A tuple is an image [C, H, W], a series [C, T] or features [F]. A dict of tuples is for a user's own model.
Shape = tuple[int, ...] | TableShape | TokenShape | dict[str, tuple[int, ...]]
