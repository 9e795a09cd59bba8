"""A study's command and its metric: what is refused before the first trial, and what is read from a line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import hpo
from hpo.errors import ProgramError, SpecError
from hpo.spec.program import Command, PrintedMetric
from hpo.spec.study_file import StudySpec
from hpo.study import resolve

PATTERN = r"epoch (?P<epoch>\S+) acc=(?P<value>\S*)"


def document(**changes: Any) -> dict[str, Any]:
    found = {
        "name": "mine",
        "command": ["sh", "train.sh", "--lr={lr}", "{model.width}"],
        "metric": PATTERN,
        "direction": "maximize",
        "space": {"lr": {"low": 0.1, "high": 0.2}, "model": {"width": 3}},
    }
    return {key: value for key, value in {**found, **changes}.items() if value is not None}


def test_a_command_s_defaults_and_its_identity() -> None:
    spec = StudySpec.from_document(document())
    assert (spec.value, spec.metric, spec.own_kind, spec.is_declared) == ("last", PATTERN, "command", False)
    assert StudySpec.from_document(document(metric=None)).metric == ""
    assert StudySpec.from_document(spec.document) == spec
    assert StudySpec.from_document(document(metric=None)).fingerprint != spec.fingerprint
    assert StudySpec.from_document(StudySpec.from_document(document(metric=None)).document).metric == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"command": []}, 'command = []: names no program; write ["python", "train.py", "--lr", "{lr}"]'),
        ({"command": [" ", "{lr}"]}, "command = [' ', '{lr}']: names no program"),
        ({"command": "sh train.sh"}, "command = 'sh train.sh': input should be a"),
        (
            {"command": ["sh", "{lr}"]},
            "space.model.width: has no place in command; write {model.width} into one of its words",
        ),
        ({"space": {"lr": {"low": 1, "high": 2}}}, "command: {model.width} has no range in [space]"),
        (
            {"command": ["sh", "{lR}", "{lr}{model.width}"]},
            "command: {lR} has no range in [space] (did you mean 'lr'?); add lR = ",
        ),
        (
            {"space": {"l r": {"low": 1, "high": 2}}, "command": ["sh"]},
            "space.'l r': cannot stand in a place; rename it to letters, digits, _ and -",
        ),
        ({"command": ["sh", '{"lr": {lr}}']}, "has a single {; write {{ for a brace"),
        (
            {"command": ["sh", "${l r}", "{lr}"]},
            "command: '{l r}' in '${l r}' names no parameter; write {name}, or {{ and }}",
        ),
        (
            {"space": None},
            "space: missing; command = ['sh', 'train.sh', '--lr={lr}', '{model.width}'] needs [space] with ranges",
        ),
        ({"direction": None}, 'direction: needed with a command; write "maximize" or "minimize"'),
        (
            {"metric": "accuracy"},
            "metric = 'accuracy': has no group `value`; write 'acc=(?P<value>\\S+)', or \"json:KEY\"",
        ),
        ({"metric": "acc=(?P<value>"}, "metric = 'acc=(?P<value>': is not a pattern of Python's re: missing )"),
        ({"metric": r"\d"}, r"metric = '\d': has no group `value`"),
        ({"metric": "(?P<value>.)(?P<step>.)"}, "has a group 'step'; only `value` and `epoch` are read, so rename it"),
        ({"metric": "json: "}, "metric = 'json: ': names no key"),
        ({"value": "worst"}, "value: 'worst' is not a rule"),
        ({"objective": "mine.py:f"}, "objective = 'mine.py:f': cannot stand beside command = ['sh',"),
        ({"train": "mine.py:f"}, "train = 'mine.py:f': cannot stand beside command = ['sh',"),
        ({"optimizer": {"name": "sgd"}}, "optimizer: belongs to a declared training, not to command = ['sh',"),
        ({"params": {"lr": 1}}, "params: does not belong to command = ['sh',"),
        (
            {"objectives": {"a": "minimize", "b": "minimize"}},
            "objectives: a command gives one value, its metric; remove",
        ),
        ({"constraints": {"value": "<= 1"}}, "constraints: a command gives one value, its metric; remove"),
        (
            {
                "command": ["sh", "{name}", "{sgd.momentum}"],
                "space": {"name": {"choices": ["sgd", "adam"]}, "sgd": {"momentum": {"low": 0.1, "high": 0.9}}},
            },
            "space.sgd: has values under one choice of space.name alone; a command needs a value for each place",
        ),
    ],
)
def test_what_is_refused_before_the_first_trial(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as raised:
        StudySpec.from_document(document(**changes))
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (
            "no-such-program",
            "command = ['no-such-program', ...]: there is no such program on PATH; give its path, or install it",
        ),
        ("./none", "command = ['./none', ...]: there is no such program in {folder}; give its path, or install it"),
        ("train.sh", "command = ['train.sh', ...]: is not on PATH; write \"./train.sh\" for the file in {folder}"),
        (
            "./train.sh",
            "command = ['./train.sh', ...]: may not be run; `chmod +x {folder}/train.sh`, or name its interpreter",
        ),
    ],
)
def test_a_program_that_is_not_found_is_refused(tmp_path: Path, program: str, message: str) -> None:
    (tmp_path / "train.sh").write_text("echo")
    spec = StudySpec.from_document(document(command=[program, "{lr}", "{model.width}"]))
    with pytest.raises(SpecError) as raised:
        resolve.resolve(spec, tmp_path)
    assert message.format(folder=tmp_path) in str(raised.value)


def test_python_is_found_beside_this_one_if_it_is_not_on_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    Command.parse(["python"]).refuse_missing(tmp_path)
    with pytest.raises(SpecError, match="'sh'"):
        Command.parse(["sh"]).refuse_missing(tmp_path)


def test_the_files_that_a_command_names_are_the_study_s_code(tmp_path: Path) -> None:
    """A change of the program is noticed as one of an objective is; so is one of its data files."""
    spec = StudySpec.from_document(document())
    assert resolve.digest_code(spec, tmp_path) == ""
    digests = []
    for text in ("echo one", "echo two"):
        (tmp_path / "train.sh").write_text(text)
        digests.append(resolve.load_and_digest(spec, tmp_path))
    assert len({*digests, ""}) == 3
    assert resolve.check_stored(spec, tmp_path) == digests[1]


def test_what_lies_elsewhere_or_is_large_is_no_code(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    folder.mkdir()
    for name, size in {"study/small.bin": 2**20, "study/large.bin": 2**20 + 1, "other.py": 1}.items():
        (tmp_path / name).write_bytes(bytes(size))
    names = ["small.bin", "large.bin", "../other.py", str(tmp_path / "other.py"), str(folder / "small.bin")]
    command = Command.parse(["/bin/sh", *names, "long " * 100])
    assert command.files(folder) == [folder / name for name in ("small.bin", "large.bin", "small.bin")]
    assert command.code(folder) == [folder / "small.bin"] * 2


def test_values_become_words() -> None:
    command = Command.parse(["{a}", "--b={b}", "{{{c}}}", "{d}{e}", "x"])
    values = {"a": 1e-05, "b": 3, "c": False, "d": "two words ", "e": [1, "x"]}
    assert command.filled(values) == ["1e-05", "--b=3", "{false}", 'two words [1, "x"]', "x"]


@pytest.mark.parametrize(
    ("metric", "line", "found"),
    [
        (PATTERN, "  epoch 3 acc=0.5,", None),
        (PATTERN, "epoch 3.0 acc=5e-1 end", (0.5, 3)),
        (PATTERN, "epoch x acc=0.5", None),
        (PATTERN, "epoch -1 acc=0.5", None),
        (PATTERN, "epoch 99999999999 acc=0.5", None),
        (PATTERN, "nothing", ()),
        (r"(epoch (?P<epoch>\d+) )?acc=(?P<value>[\d.]+)", "acc=0.5", (0.5, None)),
        (r"acc.*?(?P<value>[0-9.]+)", "acc-0.5: 0.25", (0.5, None)),
        (r"acc: (?P<value>[0-9.]+)", f"{'x' * 2040}acc: 0.5", (0.5, None)),
        (r"acc: (?P<value>[0-9.]+)", f"{'x' * 2043}acc: 0.5", ()),
        ("json:a", '{"a": 1, "epoch": true}', None),
        ("json:a", '{"a": true}', None),
        ("json:a", '{"a": "0.5", "epoch": "2"}', (0.5, 2)),
        ("json:a", '{"a": null}', ()),
        ("json:a", "[" * 100_000, ()),
        ("", "acc=1", ()),
    ],
)
def test_what_a_line_says(metric: str, line: str, found: tuple[float, int | None] | tuple[()] | None) -> None:
    """None stands for what is refused, () for a line without a value."""
    reading = PrintedMetric.parse(metric)
    if found is None:
        with pytest.raises(ProgramError):
            reading.find(line)
        return
    said = reading.find(line)
    assert (() if said is None else (said.value, said.epoch)) == found


@pytest.mark.parametrize(
    ("metric", "line", "number", "part"),
    [
        ("loss=(?P<value>[0-9.]+)", "loss=3.2e-05", "3.2e-05", "3.2"),
        ("loss=(?P<value>[0-9]+)", "loss=1E7,", "1E7", "1"),
        ("loss=(?P<value>[0-9])", "loss=12", "12", "1"),
        ("loss=(?P<value>[0-9]+)", "loss=0.25", "0.25", "0"),
        ("loss.*?(?P<value>[0-9.]+)", "loss: -0.5", "-0.5", "0.5"),
        ("loss.*?(?P<value>[0-9]+)", "loss: .5", ".5", "5"),
        ("(?P<value>[0-9]+)$", "loss=1e-7", "1e-7", "7"),
    ],
)
def test_a_part_of_a_number_is_no_value(metric: str, line: str, number: str, part: str) -> None:
    with pytest.raises(ProgramError) as raised:
        PrintedMetric.parse(metric).find(line)
    assert str(raised.value) == (
        f"the pattern cuts the number {number} to '{part}' in the line '{line}'; write (?P<value>\\S+)"
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f'{{"v": 1{"0" * 400}}}', f"the metric 1{'0' * 99}"),
        (f'{{"v": 1, "epoch": 1{"0" * 400}}}', f"the epoch 1{'0' * 99}"),
        ('{"v": 1, "epoch": 2147483647}', "the epoch 2147483647 is not a whole number from 0 to 2147483646, in"),
    ],
)
def test_what_is_too_large_is_refused(line: str, message: str) -> None:
    with pytest.raises(ProgramError) as raised:
        PrintedMetric.parse("json:v").find(line)
    assert str(raised.value).startswith(message)


# --- hpo.report -------------------------------------------------------------------------------------------------------


def test_a_report_outside_of_a_trial_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HPO_REPORTS", raising=False)
    with pytest.raises(
        RuntimeError, match=r"hpo\.report\(0.5, 1\): this process is not of a trial; it works in a program"
    ):
        hpo.report(0.5, 1)


def test_a_report_takes_a_number_and_an_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPO_REPORTS", str(tmp_path / "reports"))
    with pytest.raises(TypeError, match=r"hpo\.report: value 'much' is a str, not a number"):
        hpo.report("much", 1)
    for epoch in (-1, 0.5):
        with pytest.raises(ValueError, match="is not a whole number from 0"):
            hpo.report(0.5, epoch)
    hpo.report(0.5, 0)
    hpo.report(float("nan"), epoch=2)
    assert (tmp_path / "reports").read_text() == '{"value": 0.5, "epoch": 0}\n{"value": NaN, "epoch": 2}\n'
