"""Commands that are printed to be pasted do what they say, whatever names stand in them."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpo import cli, text
from hpo.cli.app import again_option
from hpo.errors import MismatchError, SpecError, StudyError
from hpo.spec.study_file import StudySpec
from hpo.storage.connect import Storage
from hpo.study import control, results
from hpo.study import study as studies
from hpo.study.doctor import examine
from hpo.study.status import summarize
from hpo.study.study import Study
from hpo.view import pages
from tests.support.paths import ROOT
from tests.support.trials import begin, make

NAME = "my study / v2 100%"
QUOTED = "'my study / v2 100%'"
WORDS = [
    "plain", "my study / v2 100%", "", "a'b", 'a"b', "$HOME `id` $(id)", "a\\b", "!!", "*?[a]{b,c}~", "a;b|c&d>e<f#g", "Größe 学",
    "\x1b[2J", "two\nlines", "tab\t'quote' \\ !!", "\u202ereversed", "\udcff", "\x07\x31", "\u00a0",
]  # fmt: skip


def as_bash_reads(words: str) -> list[bytes]:
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {words}"], capture_output=True, check=True)
    return done.stdout.split(b"\0")[:-1]


def test_a_shell_reads_each_word_as_it_was() -> None:
    quoted = [text.quoted(word) for word in WORDS]
    assert as_bash_reads(" ".join(quoted)) == [os.fsencode(word) for word in WORDS]
    assert all(word.isprintable() for word in quoted)


def test_a_word_that_starts_with_a_dash_is_no_option() -> None:
    assert text.command("status", "-x", options="--trial 3") == "hpo status --trial 3 -- -x"
    assert text.command("status", "x", options="--trial 3") == "hpo status x --trial 3"


def test_a_word_too_long_to_be_shown_is_not_cut_to_another_one() -> None:
    assert text.command("worker", "n" * 10_000) == "hpo worker NAME_OF_10000_CHARACTERS"


def test_what_no_shell_can_pass_on_is_not_shown_as_another_word() -> None:
    assert text.command("worker", "a\0b") == "hpo worker NAME_WITH_A_NULL_CHARACTER"


def test_a_command_is_never_cut(capsys: pytest.CaptureFixture[str]) -> None:
    words = [letter * text.LONGEST_WORD for letter in "abcdefgh"]
    text.say_command("wrote " + "p" * 5000 + "\n; next: ", text.command("run", *words), "\x1b, or else")
    (line,) = capsys.readouterr().out.splitlines()
    before, _, after = line.partition("hpo run ")
    assert len(before) == text.LONGEST_LINE
    assert before.endswith("p\\n; next: ")
    assert after == " ".join(words) + "\\x1b, or else"


def test_every_command_on_standard_output_is_printed_so() -> None:
    """`say` cuts what is too long."""
    cutting = re.compile(r"text\.say\([^\n]*(\bnext: |text\.command|\{again\})")
    found = [file.name for file in (ROOT / "hpo" / "cli").glob("*.py") if cutting.search(file.read_text())]
    assert found == []


def test_a_storage_is_quoted_too() -> None:
    assert again_option("given", None, "sqlite:////my files/s.db") == "--storage 'sqlite:////my files/s.db'"
    assert again_option("given", None, "postgresql://u:***@h/d") == '--storage "$HPO_STORAGE"'


@pytest.fixture
def study(lite: Storage, tmp_path: Path) -> Study:
    return make(lite, tmp_path, name=NAME)


def message(raising: Callable[[], Any]) -> str:
    with pytest.raises((MismatchError, SpecError, StudyError)) as caught:
        raising()
    return str(caught.value)


def test_errors_tell_commands_that_can_be_pasted(study: Study, tmp_path: Path) -> None:
    other = StudySpec.from_document({"name": NAME, "objective": "other.py:f", "direction": "maximize"})
    told = [
        message(lambda: results.best(study)),
        message(lambda: control.stop_trial(study, 7)),
        message(lambda: studies.create_or_join(study.storage, other, code_folder=tmp_path, code_digest="")),
    ]
    study.optuna.ask()
    told.append(message(lambda: control.stop_trial(study, 0)))
    begin(study)
    told.append(message(lambda: control.fail_foreign(study, 1)))
    commands = [command for line in told for command in line.split("`")[1::2] if NAME in command]
    assert commands == [
        f"hpo status {QUOTED}",
        f"hpo status {QUOTED}",
        f"hpo fork {QUOTED} NEW FILE",
        f"hpo doctor {QUOTED} --fail 0",
        f"hpo stop {QUOTED} --trial 1",
    ]


def test_what_is_shown_tells_commands_that_can_be_pasted(study: Study, tmp_path: Path) -> None:
    study.optuna.ask()
    control.pause(study)
    mends = [finding.mend for finding in examine(study.storage, NAME, repair=False)]
    assert f"hpo resume {QUOTED}" in mends
    assert f"if that is dead: hpo doctor {QUOTED} --fail 0" in mends
    assert f"paused   workers wait; hpo resume {QUOTED}" in pages.status_text(summarize(study)).splitlines()


def test_no_message_puts_a_name_into_a_command_by_itself() -> None:
    """`text.command` and `text.quoted` do it; a number needs neither."""
    verbs = "|".join(command.callback.__name__ for command in cli.app.registered_commands if command.callback)
    unquoted = re.compile(rf"hpo ({verbs}) [^`\"']*\{{(?!quoted|text\.quoted|command|text\.command|fail|trial)[^`\"]*")
    found = [
        f"{file.name}: {match.group()}"
        for file in (ROOT / "hpo").rglob("*.py")
        for match in unquoted.finditer(file.read_text())
    ]
    assert found == []


def test_a_path_with_spaces_is_quoted_in_messages(tmp_path: Path) -> None:
    path = tmp_path / "my files" / "a study.toml"
    told = message(lambda: StudySpec.load(path))
    assert f"`hpo init '{path}'` writes one" in told
    assert shlex.split(told.split("`")[1]) == ["hpo", "init", str(path)]
