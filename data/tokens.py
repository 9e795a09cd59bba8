"""Texts as tokens: words or bytes. Code 0 is padding, code 1 an unknown word."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hpo.data.inputs import Inputs
from hpo.data.source import Fitted

Level = Literal["word", "byte"]
Lengths = npt.NDArray[np.int64]

PADDING, UNKNOWN, FIRST = 0, 1, 2
BYTES = 256
MOST_CODES = 10_000_000  # each has a row of weights in a model
_WORD = re.compile(r"\w+|[^\w\s]")


def words_of(text: str, lower: bool) -> Iterator[str]:
    """Yield the words of a text: runs of letters and digits, and single signs."""
    composed = unicodedata.normalize("NFC", text)
    return (found[0] for found in _WORD.finditer(composed.casefold() if lower else composed))


def as_bytes(texts: Sequence[str], length: int) -> tuple[Tensor, Lengths]:
    """Return the first `length` bytes of each text, int64 [N, length], and their number in each text."""
    found = [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64) + FIRST for text in texts]
    return _padded(found, length), np.array([len(one) for one in found])


def as_words(texts: Sequence[str], length: int, lower: bool) -> tuple[Tensor, list[str], Lengths]:
    """Return the first `length` words of each text, int64 [N, length], all words by code, and their number in each text.

    Codes are given in the order of the texts. `fit_words` makes a vocabulary of them. Numbers above `length` are not counted
    further: they are `length + 1`.
    """
    known: dict[str, int] = {}
    found, counts = [], []
    for text in texts:
        words = list(islice(words_of(text, lower), length + 1))
        counts.append(len(words))
        codes = [known.setdefault(word, FIRST + len(known)) for word in words[:length]]
        found.append(np.array(codes, dtype=np.int64))
    return _padded(found, length), list(known), np.array(counts)


def _padded(rows: Sequence[np.ndarray[tuple[int], np.dtype[np.int64]]], length: int) -> Tensor:
    found = np.full((len(rows), length), PADDING, dtype=np.int64)
    for number, row in enumerate(rows):
        found[number, : len(row)] = row[:length]
    return torch.from_numpy(found)


@dataclass(frozen=True, kw_only=True, eq=False)
class Renumbering:
    """Renumbers tokens. It can be pickled."""

    codes: Tensor  # int64, the new code by the code of the file; the last one is for all codes from there on

    def __call__(self, inputs: Inputs) -> Inputs:
        """Return the tokens under their new codes."""
        assert isinstance(inputs, Tensor)
        return self.codes[inputs.clamp(max=len(self.codes) - 1)]


def fit_words(inputs: Inputs, *, words: Sequence[str], most: int, least: int, lower: bool) -> Fitted:
    """Return the vocabulary of the training part: its most frequent words. All others are unknown; ValueError without any.

    Args:
        inputs: tokens of the training part, by the codes of the file.
        words: all words of the file, from code 2.
        most: most words that are kept.
        least: times that a kept word occurs at least.
        lower: whether case was left out, for `about`.
    """
    assert isinstance(inputs, Tensor)
    counts = inputs.flatten().bincount(minlength=FIRST + len(words))[FIRST:].tolist()
    frequent = [number for number, count in enumerate(counts) if count >= least]
    if not frequent:
        raise ValueError(
            f"no word occurs {least} times in the {len(inputs)} texts of the training part; write least = 1"
        )
    kept = sorted(frequent, key=lambda number: (-counts[number], words[number]))[:most]
    codes = torch.full((FIRST + len(words),), UNKNOWN)
    codes[PADDING] = PADDING
    codes[[FIRST + number for number in kept]] = torch.arange(FIRST, FIRST + len(kept))
    about = {"level": "word", "lower": lower, "length": inputs.shape[1], "words": [words[number] for number in kept]}
    return Fitted(transform=Renumbering(codes=codes), vocabulary=FIRST + len(kept), about=about)


def fit_bytes(inputs: Inputs) -> Fitted:
    """Return the vocabulary of bytes, which no data changes."""
    assert isinstance(inputs, Tensor)
    same = Renumbering(codes=torch.arange(FIRST + BYTES))
    return Fitted(transform=same, vocabulary=FIRST + BYTES, about={"level": "byte", "length": inputs.shape[1]})


def fit_codes(inputs: Inputs) -> Fitted:
    """Return the vocabulary of tokens that come as codes: those of the training part keep theirs, all others are unknown."""
    assert isinstance(inputs, Tensor)
    if int(inputs.max()) > MOST_CODES:
        raise ValueError(f"tokens go up to {int(inputs.max())}; codes go from 0 to {MOST_CODES:,}, so number them anew")
    seen = inputs.flatten().bincount(minlength=FIRST) > 0
    codes = torch.where(seen, torch.arange(len(seen)), UNKNOWN)
    codes[PADDING] = PADDING
    known = seen[FIRST:].nonzero().flatten() + FIRST
    about = {"level": "code", "length": inputs.shape[1], "codes": known.tolist()}
    beyond = torch.tensor([UNKNOWN])
    return Fitted(transform=Renumbering(codes=torch.cat([codes, beyond])), vocabulary=len(codes), about=about)
