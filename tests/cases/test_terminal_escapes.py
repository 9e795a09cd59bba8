"""Foreign text reaches the terminal safe: no control character, no line that looks like ours, nothing endless."""

from __future__ import annotations

import ast
import dataclasses
import io
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import optuna
import pytest
import sqlalchemy as sa
from rich.console import Console

from hpo import cli, text
from hpo.cli.app import quiet_optuna
from hpo.errors import Mistakes, SpecError
from hpo.spec.failures import Failure
from hpo.storage.connect import connect
from hpo.storage.tables import hpo_studies, studies
from hpo.study.status import summarize
from hpo.study.study import Study, join
from hpo.view.live import LiveView
from hpo.worker import attempt
from tests.support.paths import ROOT
from tests.support.trials import begin, end_trial, make

#: Clears the screen, sets the title, rings, forges a line, reverses text, hides, ends a line in other ways, deletes.
HOSTILE = "\x1b[2J\x1b]0;x\x07\nwinner   trial 9\r\x9b1m\u202ea\u2066b\u200bc\ufeffd\u2028e\x85f\x7f[red]"
SHOWN = r"\x1b[2J\x1b]0;x\x07\nwinner   trial 9\r\x9b1m\u202ea\u2066b\u200bc\ufeffd\u2028e\x85f\x7f[red]"
LONG = "n" * 10_000
Hpo = Callable[..., tuple[int, str]]


@pytest.fixture
def hpo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Hpo:
    """Run a command in a folder of its own; return its exit code and all that it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HPO_STORAGE", raising=False)

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["hpo", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        told = capsys.readouterr()
        assert isinstance(ended.value.code, int | None)
        return ended.value.code or 0, told.out + told.err

    return run


def assert_safe(told: str) -> None:
    assert [character for character in told if not character.isprintable() and character != "\n"] == []
    assert [line for line in told.splitlines() if line.startswith("winner   trial 9")] == []


def assert_short(told: str) -> None:
    assert max(map(len, told.splitlines()), default=0) <= text.LONGEST_LINE + len("error: ")
    assert LONG not in told


# --- what is made of a text -------------------------------------------------------------------------------------------


def test_what_a_terminal_obeys_or_hides_is_escaped_and_what_is_printable_stays() -> None:
    assert text.safe(HOSTILE) == SHOWN
    assert text.safe("\ud800 \udc9b \U000e0041 \t") == r"\ud800 \udc9b \U000e0041 \t"
    for plain in ("Größe 0.1 ± 2", "学習率", "α=β²", "🎉", "a\u00a0b\u3000c", r"C:\new"):
        assert text.safe(plain) == plain
    assert text.safe(text.safe(HOSTILE)) == text.safe(HOSTILE)


def test_what_is_long_loses_its_middle_and_says_so() -> None:
    found = text.short(LONG)
    assert len(found) == text.LONGEST_NAME
    assert found.count("…(10000 characters)…") == 1
    assert text.short("n" * text.LONGEST_NAME) == "n" * text.LONGEST_NAME
    assert text.safe(LONG) == text.safe(text.safe(LONG))


class Pair(NamedTuple):
    left: str
    right: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Holder:
    pair: Pair


def test_texts_are_made_safe_wherever_they_are_held() -> None:
    assert text.all_safe((HOSTILE, [HOSTILE], 1)) == (SHOWN, [SHOWN], 1)
    assert text.all_safe({HOSTILE}) == {SHOWN}
    assert text.all_safe(frozenset({(HOSTILE, None)})) == frozenset({(SHOWN, None)})
    assert text.all_safe(Holder(Pair(HOSTILE, (HOSTILE,)))) == Holder(Pair(SHOWN, (SHOWN,)))
    assert text.all_safe({"key": (HOSTILE,)}) == {"key": (SHOWN,)}


def test_each_argument_of_an_error_is_a_line() -> None:
    mistakes = Mistakes()
    mistakes.add(SpecError(f"first: {HOSTILE}", "second"))
    with pytest.raises(SpecError) as caught:
        mistakes.raise_if_any()
    assert str(caught.value) == f"first: {SHOWN}\nsecond"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_no_encoding_makes_a_print_crash(encoding: str) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
    text.say("3 × 学 ━ \udc9b", to=stream)
    stream.seek(0)
    times = {"ascii": r"3 \xd7 \u5b66 \u2501", "latin-1": r"3 × \u5b66 \u2501", "utf-8": "3 × 学 ━"}
    assert stream.read() == f"{times[encoding]} " + r"\udc9b" + "\n"


def test_optuna_s_own_log_lines_are_safe() -> None:
    quiet_optuna()
    for handler in logging.getLogger("optuna").handlers:
        assert isinstance(handler.formatter, text.Formatter)


def test_log_lines_and_warnings_are_safe() -> None:
    told = io.StringIO()
    handler = logging.StreamHandler(told)
    handler.setFormatter(text.Formatter("%(levelname)s %(message)s"))
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "f", 1, "%s", (HOSTILE,), sys.exc_info())
    handler.emit(record)
    assert_safe(told.getvalue())
    assert told.getvalue().startswith(f"ERROR {SHOWN}\n    Traceback")
    assert text.warning_line(HOSTILE, UserWarning, "f.py", 3) == f"f.py:3: UserWarning: {SHOWN}\n"


# --- every print ------------------------------------------------------------------------------------------------------

#: Where something else than `say`, `say_page` and `say_json` prints: there itself, on a console that is captured and read
#: as lines, above the live picture, and into a notebook's HTML.
DOORS = {"text.py": 2, "view/variants.py": 1, "view/live.py": 1, "view/notebook.py": 1}


def prints(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call):
        return False
    called = ast.unparse(node.func)
    return called in ("print", "sys.stdout.write", "sys.stderr.write") or called.endswith(
        (".echo", ".secho", "console.print", "console.out", "print_exc", "print_exception")
    )


def test_every_print_goes_through_the_one_door_and_no_error_holds_a_newline_in_a_line() -> None:
    printing: dict[str, int] = {}
    broken = []
    for file in sorted((ROOT / "hpo").rglob("*.py")):
        name, nodes = str(file.relative_to(ROOT / "hpo")), list(ast.walk(ast.parse(file.read_text())))
        if count := sum(map(prints, nodes)):
            printing[name] = count
        raised = [node for node in nodes if isinstance(node, ast.Raise) and "RuntimeError" not in ast.unparse(node)]
        broken += [f"{name}:{node.lineno}" for node in raised if any(map(has_newline, ast.walk(node)))]
    assert printing == DOORS
    assert broken == []


def has_newline(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" in node.value


# --- every command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def hostile(tmp_path: Path) -> Study:
    """A study in which everything that can have a foreign name has one: finished, failed, running and parked trials."""
    (tmp_path / "x.py").write_text("def f(trial): return 1.0\n")
    place = connect(f"sqlite:///{tmp_path}/studies.db", create=True)
    made = make(place, tmp_path)
    for number in range(4):  # the last one is parked, and no other takes it up
        ledger, claim, trial = begin(made, worker=f"{HOSTILE}:{LONG}")
        trial.suggest_categorical(HOSTILE, [HOSTILE, LONG, "[/red] :smile:"])
        trial.suggest_categorical(LONG, [HOSTILE, False])
        trial.set_user_attr(HOSTILE, HOSTILE)
        trial.report(0.5, 1)
        if number == 0:
            end_trial(trial, optuna.trial.TrialState.COMPLETE, 0.5, reason=HOSTILE)
        if number == 1:
            error = ValueError(f"\n{HOSTILE}{LONG}")
            error.add_note(HOSTILE)
            attempt.fail(trial, Failure.of(error))
        if number == 3:
            ledger.park(claim)
    with place.engine.begin() as connection:
        connection.execute(sa.update(studies).values(study_name=HOSTILE))
        connection.execute(sa.update(hpo_studies).values(stop_reason=HOSTILE, hold="stopped"))
    optuna.create_study(storage=place.optuna, study_name=f"{HOSTILE}2").ask()
    place.close()
    return made


STUDY_FILE = f"""
{json.dumps(HOSTILE)} = 1
name = {json.dumps(HOSTILE)}
objective = {json.dumps(f"{HOSTILE}.py:f")}
[data]
{json.dumps(HOSTILE)} = {{ choices = [{json.dumps(HOSTILE)}, 1] }}
"""
OBJECTIVE = f"def f(trial):\n    raise ValueError({HOSTILE!r})\n"
FILE = f"{HOSTILE[:-5].replace('/', '')}\udcff.toml"
#: command -> arguments; every command is tried with a hostile study, file, option, and what a driver says of them.
COMMANDS: dict[str, list[list[str]]] = {
    "init": [[FILE], [f"{HOSTILE}/x.toml"]],
    "check": [["wrong.toml"], ["raising.toml"], [FILE], [HOSTILE]],
    "run": [["wrong.toml"], [FILE], ["x.toml", "--name", HOSTILE], ["x.toml", "--timeout", HOSTILE]],
    "worker": [["none"], [HOSTILE, "--code", HOSTILE], [HOSTILE, "--storage", f"sqlite:///{HOSTILE}"]],
    "launch": [
        [HOSTILE], ["x.toml", "--on", HOSTILE], ["x.toml", "--on", "slurm", "--workers", "2", "--print"],
        [HOSTILE, "--on", "slurm", "--workers", "2"], ["x.toml", "--set", HOSTILE],
    ],
    "fleet": [[HOSTILE], [HOSTILE, "--json"], ["none"]],
    "scale": [[HOSTILE, "2"], [HOSTILE, "0"]],
    "recall": [[HOSTILE], ["none"]],
    "status": [
        [], [HOSTILE], ["none"], [HOSTILE, "--json"], ["--json"], [HOSTILE, HOSTILE], [LONG],
        *([HOSTILE, "--trial", str(number)] for number in range(1, 4)), [HOSTILE, "--trial", "1", "--json"],
    ],
    "logs": [[HOSTILE], [HOSTILE, "--worker", "0"], [HOSTILE, "--trial", "0"], ["none"]],
    "dashboard": [["--host", HOSTILE], ["--host", "192.0.2.1"]],
    "pause": [[HOSTILE], [LONG]],
    "resume": [[HOSTILE], ["none"]],
    "stop": [[HOSTILE], [HOSTILE, "--trial", "0"], [HOSTILE, "--trial", "3"]],
    "doctor": [[], [HOSTILE], ["--repair"], [HOSTILE, "--fail", "0"], ["--storage", f"sqlite:///{HOSTILE}"]],
    "enqueue": [[HOSTILE, f"{HOSTILE}=1"], [HOSTILE, HOSTILE], ["none", "x=1"], [HOSTILE, "--file", FILE]],
    "confirm": [[HOSTILE], ["none"], [HOSTILE, "--delta", HOSTILE], [f"{HOSTILE}.toml"]],
    "import_": [
        [HOSTILE, HOSTILE], ["sqlite:///studies.db", HOSTILE, "--like", "x.toml"],
        ["sqlite:///studies.db", "none", "--like", "wrong.toml"],
    ],
    "report": [[HOSTILE], [HOSTILE, "-o", f"{HOSTILE}.html"], [HOSTILE, "--format", HOSTILE], ["none"], [LONG]],
    "export": [[HOSTILE], [HOSTILE, "-o", f"{HOSTILE}.toml"], [HOSTILE, "--trial", "1"], [HOSTILE, "--top", "2"]],
    "train": [["best.toml"], ["best.toml", "-o", HOSTILE], ["raising.toml"], [HOSTILE], [HOSTILE, "--replay"]],
    "after": [[HOSTILE], [HOSTILE, HOSTILE], [HOSTILE, "--export", HOSTILE]],
    "mlflow": [["none"], [HOSTILE, "--to", "sqlite:///runs.db"], [HOSTILE, "--to", HOSTILE]],
    "replay": [[HOSTILE], [f"{HOSTILE}.npz"], ["none", "--sampler", HOSTILE], [HOSTILE, "--set", HOSTILE]],
    "fork": [[HOSTILE, "new", "x.toml"], [HOSTILE, HOSTILE, "x.toml"], ["none", "new", "wrong.toml"]],
    "copy": [
        ["sqlite:///studies.db", "sqlite:///copy.db", "--keep-source"], [HOSTILE, HOSTILE], ["sqlite:///studies.db", HOSTILE],
        ["sqlite:///studies.db", "sqlite:///other.db", HOSTILE, "--keep-source", "--json"],
        ["sqlite:///studies.db", "sqlite:///third.db", "none"], ["sqlite:///studies.db", "sqlite:///copy.db", HOSTILE],
    ],
    "delete": [[LONG], [HOSTILE, "--yes"]],
    HOSTILE: [[]],
}  # fmt: skip


def test_every_command_prints_hostile_names_safely(hostile: Study, hpo: Hpo, tmp_path: Path) -> None:
    assert {command.callback.__name__ for command in cli.app.registered_commands} == set(COMMANDS) - {HOSTILE}
    own = 'objective = "x.py:f"\ndirection = "maximize"\n'
    (tmp_path / "x.toml").write_text(own)
    (tmp_path / "wrong.toml").write_text(STUDY_FILE)
    (tmp_path / "raising.toml").write_text('objective = "raising.py:f"\ndirection = "maximize"\n[params]\nx = 1\n')
    (tmp_path / "raising.py").write_text(OBJECTIVE)
    hostile.logs.mkdir()
    (hostile.logs / "worker-a-1-0.log").write_text(f"{HOSTILE}\n", newline="")
    for command, tries in COMMANDS.items():
        for arguments in tries:
            _, told = hpo(command.rstrip("_"), *arguments)
            assert told, (command, arguments)
            assert_safe(told)
            if "--json" in arguments:  # which a program reads, whole
                assert json.loads(told)
            else:
                assert_short(told)


def test_the_live_view_draws_hostile_names_safely(hostile: Study, tmp_path: Path) -> None:
    place = connect(f"sqlite:///{tmp_path}/studies.db")
    summary = dataclasses.replace(summarize(join(place, HOSTILE)), name=HOSTILE)
    drawn = io.StringIO()
    view = LiveView(
        console=Console(file=drawn, width=4000, force_terminal=True, color_system=None, _environ={"TERM": "xterm"})
    )
    with view:
        view.update(summary, [])
        view.say(HOSTILE)
    place.close()
    told = drawn.getvalue()
    for control in (
        "\x1b[2J",
        "\x1b]0",
        "\x07",
        "\x9b",
        "\u202e",
        "\u2066",
        "\u200b",
        "\ufeff",
        "\u2028",
        "\x85",
        "\x7f",
    ):
        assert control not in told
    assert "[red]" in told
    assert "\nwinner" not in told
    assert LONG not in told


def test_a_picture_is_drawn_only_where_its_characters_can_be_written() -> None:
    for encoding, draws in (("utf-8", True), ("ascii", False)):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        assert (
            bool(LiveView(console=Console(file=stream, force_terminal=True, _environ={"TERM": "xterm"})).live) == draws
        )


def test_what_user_code_ends_the_process_with_is_printed_safely(hpo: Hpo, tmp_path: Path) -> None:
    (tmp_path / "leaving.py").write_text(f"import sys\ndef f(trial): sys.exit({HOSTILE!r})\n")
    (tmp_path / "l.toml").write_text('objective = "leaving.py:f"\ndirection = "maximize"\n[params]\nx = 1\n')
    code, told = hpo("train", "l.toml")
    assert code == 1
    assert told == f"{SHOWN}\n"
