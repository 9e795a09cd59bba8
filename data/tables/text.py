"""Texts from a column of a CSV or Parquet file."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from annotated_types import Ge

from hpo.data.files import File, OptionalFile
from hpo.data.source import Source, Task
from hpo.data.tables.column import Column
from hpo.data.tables.frame import Label, parts_of, read
from hpo.data.tables.keys import keys_of
from hpo.data.tables.parts import source_of
from hpo.data.tables.targets import targets_of
from hpo.data.tokens import Lengths, Level, as_bytes, as_words, fit_bytes, fit_words


def text(
    *,
    path: File,
    target: Label | list[Label],
    column: Label = "text",
    validation: OptionalFile = None,
    test: OptionalFile = None,
    level: Level = "word",
    length: Annotated[int, Ge(1)] = 128,
    words: Annotated[int, Ge(1)] = 20_000,
    least: Annotated[int, Ge(1)] = 2,
    lower: bool = True,
    task: Task | None = None,
    positive: str | None = None,
    missing_values: list[str] | None = None,
    part: Label | None = None,
    group: Label | None = None,
    time: Label | None = None,
    header: bool = True,
    delimiter: str | None = None,
) -> Source:
    """Return texts as tokens, one text a row of a CSV or Parquet file. Nothing is downloaded.

    Code 0 is padding, code 1 an unknown word. The vocabulary holds words of the training part alone. Columns that no option
    names are left out. BadFile names row and column.

    Args:
        path: file, CSV or by its ending `.parquet`.
        target: column to predict, or a list of several.
        column: column of texts.
        validation: file of the validation part, with the same columns.
        test: file of the test part, with the same columns.
        level: whether a token is a word or a sign (word), or a byte of UTF-8 (byte).
        length: tokens of a text. Longer texts are cut, shorter ones are filled up with code 0.
        words: most words in the vocabulary, the most frequent ones.
        least: times that a word occurs in the training part at least, to be in the
        lower: whether words that differ in case alone are one word. It is of no effect with bytes.
        task: classification, binary, multilabel or regression (default: as in `table`, by the values of the target).
        positive: the value of a binary target that counts as positive (default: 1, true, yes or positive).
        missing_values: texts that stand for a missing value in other columns than that of the texts.
        part: column with train, validation and test, which become the parts.
        group: column of groups, such as authors, for a split by group.
        time: column of dates or numbers, for a split by time.
        header: whether the first row of a CSV file names the columns.
        delimiter: character between two values (default: the most frequent of comma, semicolon, tabulator and bar).
    """
    frame = read(parts_of(path, validation, test), header=header, delimiter=delimiter, missing=missing_values)
    keys = keys_of(frame, part=part, group=group, time=time)
    place = frame.index(column, "column")
    aims = frame.targets(target)
    if place in aims or place in keys.columns:
        raise frame.bad(f"column {frame.names[place]!r} is named by column and by another option; remove one")
    targets = targets_of([Column(frame, aim, "target") for aim in aims], keys.in_training, task, positive)
    texts = Column(frame, place).texts()
    if level == "byte":
        codes, lengths = as_bytes(texts, length)
        return source_of(codes, targets, keys, frame, fit=fit_bytes, notes=_notes(lengths, length, "bytes"))
    codes, known, lengths = as_words(texts, length, lower)
    fit = partial(fit_words, words=known, most=words, least=least, lower=lower)
    return source_of(codes, targets, keys, frame, fit=fit, notes=_notes(lengths, length, "words"))


def _notes(lengths: Lengths, length: int, tokens: str) -> tuple[str, ...]:
    cut, longest = int((lengths > length).sum()), int(lengths.max())
    if cut:
        return (f"{cut} of {len(lengths)} texts have more than length = {length} {tokens} and are cut",)
    return (f"the longest text has {longest} {tokens}; length = {longest} would hold it",) if longest < length else ()
