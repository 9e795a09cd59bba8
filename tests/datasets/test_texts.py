"""Source `text`: words and bytes of a column, with a vocabulary of the training part alone."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hpo import data
from hpo.data import SOURCES, Source
from tests.datasets.test_sources import refused

CPU = torch.device("cpu")
CSV = (
    "text,y,share,who\n"
    '"The cat, the CAT!",0,train,a\n'
    "a dog,1,train,b\n"
    "the dog the end,1,train,a\n"
    "none of a bird,0,val,c\n"
)


def read(folder: Path, content: str = CSV, **options: object) -> Source:
    (folder / "t.csv").write_text(content)
    return SOURCES["text"](path=str(folder / "t.csv"), target="y", **options)


def test_words_of_the_training_part_are_the_vocabulary(tmp_path: Path) -> None:
    found = read(tmp_path, part="share", length=5)
    assert (found.kind, found.inputs.dtype, found.inputs.shape) == ("tokens", torch.int64, (3, 5))
    assert found.notes == ("1 of 4 texts have more than length = 5 words and are cut",)
    fitted = found.fit(found.inputs)
    assert fitted.about == {"level": "word", "lower": True, "length": 5, "words": ["the", "cat", "dog"]}
    assert fitted.vocabulary == 5
    assert fitted.transform(found.inputs).tolist() == [[2, 3, 1, 2, 3], [1, 4, 0, 0, 0], [2, 4, 2, 1, 0]]
    assert fitted.transform(found.validation_inputs).tolist() == [[1, 1, 1, 1, 0]]
    splits = data.load(replace(found, test_inputs=found.inputs, test_targets=found.targets), split_seed=0, device=CPU)
    assert (splits.vocabulary, splits.about, splits.validation.inputs.tolist()) == (5, fitted.about, [[1, 1, 1, 1, 0]])
    again = pickle.loads(pickle.dumps(fitted.transform))
    assert torch.equal(again(found.inputs), fitted.transform(found.inputs))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"least": 1}, ["the", "cat", "dog", "a", "!", ",", "end"]),  # frequent first, then by letter as `sorted` does
        ({"least": 1, "words": 2}, ["the", "cat"]),
        ({"least": 1, "lower": False}, ["the", "dog", "!", ",", "CAT", "The", "a", "cat", "end"]),
        ({"length": 1}, ["the"]),
    ],
)
def test_options_of_words(tmp_path: Path, options: dict, words: list[str]) -> None:
    found = read(tmp_path, part="share", **options)
    kept = found.fit(found.inputs).about["words"]
    assert sorted(kept) == sorted(words)
    assert kept[0:1] == words[0:1]


def test_bytes_need_no_vocabulary(tmp_path: Path) -> None:
    found = read(tmp_path, CSV.replace("a dog", "é"), level="byte", length=3)
    fitted = found.fit(found.inputs)
    assert (fitted.vocabulary, fitted.about) == (258, {"level": "byte", "length": 3})
    encoded = fitted.transform(found.inputs)
    assert encoded[1].tolist() == [0xC3 + 2, 0xA9 + 2, 0]
    assert encoded[0].tolist() == [ord("T") + 2, ord("h") + 2, ord("e") + 2]


def test_a_text_may_be_none_and_other_columns_are_left_out(tmp_path: Path) -> None:
    found = read(tmp_path, "text,y,extra\nNone,0,\nnan,1,\n", least=1, length=1)
    assert found.fit(found.inputs).about["words"] == ["nan", "none"]
    assert found.notes == ()
    assert read(tmp_path, "text,y\na b,0\nc,1\n", length=7).notes == (
        "the longest text has 2 words; length = 2 would hold it",
    )
    assert read(tmp_path, group="who").groups.tolist() == [0, 1, 0, 2]


def test_a_vocabulary_without_words_is_refused(tmp_path: Path) -> None:
    found = read(tmp_path, "text,y\na b,0\nc,1\n")
    with pytest.raises(
        ValueError, match=r"^no word occurs 2 times in the 2 texts of the training part; write least = 1"
    ):
        found.fit(found.inputs)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("text,y\na,0\n,1\n", {}, "row 3, column 1 (text): holds no text; write one, or remove the row"),
        ("text,y\na,0\n' ',1\n", {"column": "t"}, "column = 't': there is no such column; its columns are text, y"),
        ("text,y\na,0\nb,0\n", {}, "column 2 (y): is '0' in all training rows, so there is nothing to predict"),
        ("text,y\na,0\nb,1\n", {"column": "y"}, "column 'y' is named by column and by another option; remove one"),
        ("text,y\na,0\nb,1\n", {"missing_values": ["1"]}, "row 3, column 2 (y): is missing; give each row a target"),
    ],
)
def test_bad_texts_are_told_by_row_and_column(tmp_path: Path, content: str, options: dict, message: str) -> None:
    with refused(message):
        read(tmp_path, content, **options)
