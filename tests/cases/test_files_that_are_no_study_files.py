"""Whatever a file holds or is, reading it as a study file ends with one message, at once, and never with a traceback."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hpo.errors import SpecError, StudyError
from hpo.files import read_json
from hpo.final.train import load_pinned
from hpo.study import resolve

SMALL = '[data]\nname = "digits"\n[model]\nname = "mlp"\nwidths = [8]\n[optimizer]\nname = "sgd"\nlr = 0.1\n'
OWN = 'objective = "mine.py:f"\ndirection = "minimize"\n[params]\nx = '
DEEP = "nested more than 64 deep; a study file needs a handful"
OF_64_BITS = "write an integer of 64 bits, or text in quotes"
NEW_LINE = (
    'is not a path, it holds a control character; in "..." a backslash begins an escape; write a path in single quotes'
)
AS_ESCAPES = "; in \"...\" a backslash begins an escape; write a path in single quotes: 'C:\\data'"


def widths(text: str) -> str:
    return SMALL.replace("widths = [8]", f"widths = {text}")


CONTENTS: dict[str, tuple[str | bytes, str]] = {
    "900 nested lists": (widths("[" * 900 + "]" * 900), f"lists are {DEEP}"),
    "100 nested lists": (widths("[" * 100 + "]" * 100), f"model.widths...: tables and lists are {DEEP}"),
    "3,000 nested tables": (
        f"{SMALL}[model{'.a' * 3000}]",
        f"...: tables and lists are {DEEP}",
    ),
    "300 nested tables of parameters": (f"{OWN}{'{a=' * 300}1{'}' * 300}", f"tables and lists are {DEEP}"),
    "200 nested choices": (widths("{choices=[" * 200 + "1" + "]}" * 200), f"lists are {DEEP}"),
    "5,000 digits": (f"seed = {'9' * 5000}\n{SMALL}", f"the integer in line 1 has thousands of digits; {OF_64_BITS}"),
    "400 digits": (f"{SMALL}momentum = {'9' * 400}", f"optimizer.momentum: is an integer of 1329 bits; {OF_64_BITS}"),
    "20,000 bits": (f"{OWN}0x{'f' * 5000}", f"params.x: is an integer of 20000 bits; {OF_64_BITS}"),
    "2,000 choices": (
        widths(f"{{choices={list(range(1, 2001))}}}"),
        "model.widths: has 2,000 choices, at most 1,000 are possible; for numbers write a range, "
        "{ low = ..., high = ... }",
    ),
    "UTF-16": (SMALL.encode("utf-16"), "is UTF-16; save it as UTF-8"),
    "UTF-16 of the other order": (b"\xfe\xff" + SMALL.encode("utf-16-be"), "is UTF-16; save it as UTF-8"),
    "UTF-32": (SMALL.encode("utf-32"), "is UTF-32; save it as UTF-8"),
    "UTF-16 without a mark": (SMALL.encode("utf-16-le"), "is not text: a zero byte in line 1; save it as UTF-8"),
    "Latin-1": (f"{SMALL}# déjà".encode("latin-1"), "is not UTF-8: byte 0xe9 in line 9; save it as UTF-8"),
    "zero bytes": (SMALL.encode() + bytes(100), "is not text: a zero byte in line 9; save it as UTF-8"),
    "a path of Windows": (
        f'checkpoints = "C:\\Users\\me"\n{SMALL}',
        f"not TOML: Invalid hex value (at line 1, column 20){AS_ESCAPES}",
    ),
    "another path of Windows": (
        f'checkpoints = "C:\\data"\n{SMALL}',
        f"not TOML: Unescaped '\\' in a string (at line 1, column 20){AS_ESCAPES}",
    ),
    "a path of Windows that is TOML": (f'checkpoints = "C:\\new"\n{SMALL}', f"checkpoints = 'C:\\new': {NEW_LINE}"),
    "data at such a path": (
        SMALL.replace('"digits"', '"image_folder"\nroot = "D:\\test"'),
        f"data.root = 'D:\\test': {NEW_LINE}",
    ),
    "another fault of TOML": ("a = 'b\n", 'not TOML: Expected "\'" (at end of document)'),
}


@pytest.mark.parametrize("case", CONTENTS)
def test_a_file_that_cannot_be_used_is_told_in_one_line(case: str, tmp_path: Path) -> None:
    content, message = CONTENTS[case]
    file = tmp_path / "s.toml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    for read in (resolve.read, load_pinned):
        if read is load_pinned and case == "data at such a path":
            continue  # what an option means is asked later there
        with pytest.raises(SpecError) as caught:
            read(file)
        said = str(caught.value)
        assert said.startswith(f"{file}: ")
        assert message in said
        assert said.count("\n") == 0
        assert len(said) < len(str(file)) + 300


def test_python_code_is_told_to_need_a_study_file(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def f(trial): return 1.0\n")
    with pytest.raises(SpecError) as caught:
        resolve.read(tmp_path / "mine.py")
    assert str(caught.value) == (
        f"{tmp_path / 'mine.py'}: is Python code, not TOML; "
        'write a study file that names its function: objective = "mine.py:FUNCTION"'
    )


@pytest.mark.parametrize("encoded", [b"\xef\xbb\xbf" + SMALL.encode(), SMALL.replace("\n", "\r\n").encode()])
def test_what_an_editor_on_windows_writes_is_read(encoded: bytes, tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_bytes(encoded)
    assert resolve.read(tmp_path / "s.toml").spec.model["widths"] == [8]


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.toml")
    with (tmp_path / "huge.toml").open("wb") as file:
        file.truncate(2**40)  # of which no byte lies on the disk
    said = {
        tmp_path / "pipe.toml": "cannot be read: it is a pipe; write it to a file first",
        tmp_path: "cannot be read: it is a folder; name the file in it",
        Path("/dev/zero"): "cannot be read: it is a device",
        tmp_path / "huge.toml": "is larger than 64 MiB; is it the right file?",
    }
    for path, message in said.items():
        for read in (resolve.read, load_pinned):
            with pytest.raises(SpecError) as caught:
                read(path)
            assert str(caught.value) == f"{path}: {message}"


def test_a_receipt_that_was_edited_is_told(tmp_path: Path) -> None:
    file = tmp_path / "best.toml"
    wrong = 'seed = "seven"\naccumulation = 0\nexecutor = "fast"\ncode_folder = 3\ncurves = { loss = "low" }\n'
    file.write_text(f"{SMALL}[receipt]\n{wrong}")
    with pytest.raises(SpecError) as caught:
        load_pinned(file)
    keys = ["code_folder", "executor", "seed", "accumulation", "curves.loss"]
    assert [line.partition(" = ")[0] for line in str(caught.value).splitlines()] == [
        f"{file}: receipt.{k}" for k in keys
    ]


@pytest.mark.parametrize("content", ["", "[1]", "[" * 100_000, '{"a": ', "\xff"])
def test_a_result_that_is_no_json_any_more_is_told(content: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text(content, encoding="latin-1")
    with pytest.raises(StudyError, match=r"metrics.json: .*; restore it, or name another folder"):
        read_json(tmp_path / "metrics.json")
