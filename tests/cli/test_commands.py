"""The command line: wrong input ends with exit code 2, one clear message, and nothing written."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import typer.main
from PIL import Image

from hpo import cli
from hpo.queue import claiming
from hpo.spec import template
from hpo.spec.failures import Kind
from hpo.spec.study_file import StudySpec
from hpo.storage import sql
from hpo.storage.connect import connect
from hpo.storage.tables import hpo_studies
from hpo.study import resolve
from hpo.study import study as studies
from tests.integration.shell import forked
from tests.support import nvidia_smi
from tests.support.trials import begin, claim_one, run

COMMANDS = ["init", "check", "run", "worker", "status", "logs", "dashboard", "pause", "resume", "stop", "doctor"]
COMMANDS += [
    "launch",
    "fleet",
    "scale",
    "recall",
    "enqueue",
    "confirm",
    "report",
    "export",
    "train",
    "fork",
    "import",
    "after",
    "mlflow",
    "replay",
    "copy",
    "delete",
]
DATA, MODEL = '[data]\nname = "digits"\n', '[model]\nname = "mlp"\n'
SMALL = DATA + MODEL + '[optimizer]\nname = "sgd"\nlr = { low = 1e-3, high = 0.1, log = true }\n'
PINNED = DATA + MODEL + '[optimizer]\nname = "sgd"\nlr = 0.1\n'
OWN = 'name = "own"\nobjective = "mine.py:objective"\ndirection = "minimize"\n'

Hpo = Callable[..., tuple[int, str, str]]


@pytest.fixture
def hpo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run a command in an empty folder; return its exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hpo.storage.connect.PROBE_SECONDS", 0.05)
    for name in ("HPO_STORAGE", "HPO_CHECKPOINTS"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["hpo", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        told = capsys.readouterr()
        assert "Traceback" not in told.out + told.err
        code = ended.value.code
        assert code is None or isinstance(code, int)
        return code or 0, told.out, told.err

    return run


TYPERS: dict[str, Any] = {kind.__name__: kind for kind in typer.BadParameter.__mro__}
ENDS: list[tuple[BaseException, int, str]] = [
    (typer.BadParameter("wrong"), 2, "Invalid value: wrong"),
    (TYPERS["UsageError"]("wrong"), 2, "Error: wrong"),
    (TYPERS["ClickException"]("wrong"), 2, "Error: wrong"),
    (typer.Exit(3), 3, ""),
    (typer.Abort(), 1, "error: aborted: no answer was given\n"),
    (EOFError("no more input"), 1, "error: aborted: no more input\n"),
    (KeyboardInterrupt(), 130, ""),
]


@pytest.mark.parametrize(("raised", "code", "said"), ENDS)
def test_no_end_of_typer_s_own_gives_a_traceback(
    raised: BaseException, code: int, said: str, hpo: Hpo, monkeypatch: pytest.MonkeyPatch
) -> None:
    ending = typer.Typer()

    @ending.command()
    def end() -> None:
        raise raised

    monkeypatch.setattr(sys.modules["hpo.cli.app"], "app", ending)
    ended, out, err = hpo()
    assert (ended, out) == (code, "")
    assert said in err
    assert bool(said) == bool(err.strip())


def content(folder: Path) -> dict[str, bytes]:
    """Return every file under a folder; what Python compiles on import is no output of ours."""
    files = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def refused(hpo: Hpo, folder: Path, *arguments: str) -> str:
    """Run a command that must be refused; return its message, without 'error: '."""
    before = content(folder)
    code, out, err = hpo(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert content(folder) == before
    return err.removeprefix("error: ").rstrip("\n")


def make_study(folder: Path, text: str = OWN, name: str = "own.toml") -> studies.Study:
    """Make a study in the folder's studies.db, as `hpo run --workers 0` does."""
    (folder / "mine.py").write_text("def objective(trial): return trial.suggest_float('x', 0.0, 1.0)\n")
    (folder / name).write_text(text)
    found = resolve.read(folder / name)
    place = connect(f"sqlite:///{folder}/studies.db", create=True)
    made = studies.create_or_join(place, found.spec, code_folder=found.code_folder, code_digest=found.code_digest)
    place.close()
    return made


# --- wrong study files ----------------------------------------------------------------------------------------------

WRONG_FILES = {
    "unknown key": ("sead = 1\n" + SMALL, "s.toml: sead: a study file takes no 'sead' (did you mean 'seed'?)"),
    "range with low above high": (
        DATA + MODEL + '[optimizer]\nname = "sgd"\nlr = { low = 1.0, high = 0.1 }',
        "s.toml: optimizer.lr: low = 1.0 is above high = 0.1; swap them",
    ),
    "log range from 0": (
        DATA + MODEL + '[optimizer]\nname = "sgd"\nlr = { low = 0, high = 1, log = true }',
        "s.toml: optimizer.lr: a log range cannot start at low = 0; use a low above 0 or remove log",
    ),
    "empty choices": (
        DATA + MODEL + "[optimizer]\nname = { choices = [] }\nlr = 0.1",
        "s.toml: optimizer.name: choices = [] is empty or not a list; give at least one value in brackets",
    ),
    "child under no choice": (
        SMALL + "[optimizer.adam]\nbeta1 = 0.5",
        "s.toml: optimizer.adam: no choice has this name: optimizer.name is 'sgd'; add 'adam' to the choices "
        "of optimizer.name or remove [optimizer.adam]; a range is { low = ..., high = ... }, a choice is { choices = [...] }",
    ),
    "unknown model": (
        DATA + '[model]\nname = "mpl"\n[optimizer]\nname = "sgd"\nlr = 0.1',
        "s.toml: model.name: there is no model 'mpl' (did you mean 'mlp'?); your own is \"package.module:name\"",
    ),
    "failing import": (
        'objective = "bad.py:objective"\ndirection = "minimize"',
        "s.toml: objective: importing bad.py failed: RuntimeError: no GPU here ({folder}/bad.py:1)",
    ),
    "broken TOML": ("a = = 1", "s.toml: not TOML: Invalid value (at line 1, column 5)"),
}


@pytest.mark.parametrize("case", WRONG_FILES)
@pytest.mark.parametrize("command", ["check", "run", "worker", "fork"])
def test_a_wrong_study_file_is_refused_by_every_command_that_reads_it(
    case: str, command: str, hpo: Hpo, tmp_path: Path
) -> None:
    text, message = WRONG_FILES[case]
    (tmp_path / "s.toml").write_text(text)
    (tmp_path / "bad.py").write_text("raise RuntimeError('no GPU here')\n")
    arguments = ["old", "new", "s.toml"] if command == "fork" else ["s.toml"]
    wanted = message.format(folder=tmp_path) if "{folder}" in message else message
    assert refused(hpo, tmp_path, command, *arguments) == wanted


@pytest.mark.parametrize("command", ["check", "run", "worker", "train"])
def test_a_missing_file_is_refused(command: str, hpo: Hpo, tmp_path: Path) -> None:
    mend = (
        "hpo export STUDY -o no.toml` writes one"
        if command == "train"
        else "hpo init no.toml` writes one to start from"
    )
    assert refused(hpo, tmp_path, command, "no.toml") == f"no.toml: no such file; `{mend}"


def test_pinned_files_are_trained_and_others_searched(hpo: Hpo, tmp_path: Path) -> None:
    """A pinned file has nothing to search and one with ranges nothing to train."""
    (tmp_path / "pinned.toml").write_text(PINNED)
    assert refused(hpo, tmp_path, "run", "pinned.toml") == (
        "pinned.toml: has no range or choices to search; train it with `hpo train pinned.toml`"
    )
    (tmp_path / "s.toml").write_text(SMALL)
    assert refused(hpo, tmp_path, "train", "s.toml") == (
        "s.toml: optimizer.lr = { low = 0.001, high = 0.1, log = true }: is not pinned\n"
        "s.toml: search it with `hpo run s.toml`, or write one value for each of these"
    )


def test_a_wrong_value_in_a_pinned_file_is_refused_by_train(hpo: Hpo, tmp_path: Path) -> None:
    (tmp_path / "pinned.toml").write_text(PINNED.replace("0.1", "-0.1"))
    assert "optimizer.lr = -0.1: input should be greater than 0" in refused(hpo, tmp_path, "train", "pinned.toml")


@pytest.mark.parametrize("timeout", ["5", "0s", "tomorrow"])
def test_a_timeout_that_is_none_is_refused(timeout: str, hpo: Hpo, tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(SMALL)
    assert refused(hpo, tmp_path, "run", "s.toml", "--timeout", timeout) == (
        f"--timeout: {timeout!r} is not a duration; write it like 90s, 30m or 1h30m"
    )


@pytest.mark.parametrize("name", ["", "-x", "x.toml"])
def test_a_name_that_is_none_is_refused(name: str, hpo: Hpo, tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(SMALL)
    assert refused(hpo, tmp_path, "run", "s.toml", f"--name={name}").startswith(f"--name = {name!r}: ")


def test_init_writes_a_file_that_is_right_and_never_over_another(hpo: Hpo, tmp_path: Path) -> None:
    code, out, err = hpo("init", "mine.toml")
    assert (code, out, err) == (0, "wrote mine.toml; next: hpo check mine.toml\n", "")
    assert resolve.read(tmp_path / "mine.toml").spec.name == "mine"
    assert refused(hpo, tmp_path, "init", "mine.toml") == "mine.toml: exists already; name another file"
    assert (
        refused(hpo, tmp_path, "init", "no/mine.toml") == "no/mine.toml: cannot be written: No such file or directory"
    )


@pytest.mark.parametrize("data", template.SECTIONS)
def test_init_writes_the_section_of_a_user_s_own_data(data: str, hpo: Hpo, tmp_path: Path) -> None:
    code, out, err = hpo("init", "mine.toml", "--data", data)
    assert (code, out, err) == (
        0,
        "wrote mine.toml; next: say in [data] where your data are, then hpo check mine.toml\n",
        "",
    )
    assert StudySpec.load(tmp_path / "mine.toml").document["data"].pop("name") == data
    plain, written = template.text("mine").splitlines(), (tmp_path / "mine.toml").read_text().splitlines()
    section = template.SECTIONS[data].splitlines()
    at = written.index("[data]") + 1
    assert written[at : at + len(section)] == section
    assert written[:at] == plain[:at]
    assert written[at + len(section) :] == plain[plain.index("[model]") - 2 :]


def test_init_refuses_a_kind_of_data_that_it_does_not_know(hpo: Hpo, tmp_path: Path) -> None:
    assert refused(hpo, tmp_path, "init", "--data", "npy") == "--data npy: there is no such kind (did you mean 'npz'?)"


# --- storages -------------------------------------------------------------------------------------------------------

STORAGES = {
    "unreachable": (
        "postgresql://u:hunter2@127.0.0.1:1/d",
        r"^storage postgresql\+psycopg://u:\*\*\*@127.0.0.1:1/d: .*refused",
    ),
    "no URL": ("u:hunter2@127.0.0.1/d", r"^storage: 'u:\*\*\*@127.0.0.1/d' is no database URL; use "),
    "not supported": ("mysql://u:hunter2@h/d", "^storage: 'mysql' is not supported; use "),
    "in memory": ("sqlite://", "^storage: a SQLite database in memory cannot be shared by workers; use "),
    "no folder": (
        "sqlite:////no/such/x.db",
        "^storage sqlite:////no/such/x.db: (there is no folder /no/such|no such file)",
    ),
    "no database": ("sqlite:///text.db", "^storage sqlite:///.*/text.db: file is not a database; is it a SQLite file"),
    "locked": ("sqlite:///locked.db", "^storage sqlite:///.*/locked.db: database is locked for 0 s; another program"),
}
USERS = {
    "run": ["run", "own.toml"],
    "worker": ["worker", "own"],
    "status": ["status"],
    "export": ["export", "own"],
    "confirm": ["confirm", "own"],
    "dashboard": ["dashboard"],
    "fork": ["fork", "own", "new", "own.toml"],
    "pause": ["pause", "own"],
    "resume": ["resume", "own"],
    "stop": ["stop", "own"],
    "enqueue": ["enqueue", "own", "x=1"],
    "doctor": ["doctor"],
}


# Every command meets what is told as the URL is read and as the file is opened; every case meets every way of opening.
REFUSED = [("option", command, case) for command in USERS for case in ("no URL", "no database")]
REFUSED += [("option", command, case) for command in ("run", "status", "pause", "doctor") for case in STORAGES]
REFUSED += [("environment", command, "unreachable") for command in USERS]
GRID = [(way, command, case) for way in ("option", "environment") for command in USERS for case in STORAGES]


@pytest.mark.parametrize(
    ("way", "command", "case"),
    [
        one if one in REFUSED else pytest.param(*one, marks=pytest.mark.soak)
        for one in GRID
        if one[1:] != ("worker", "locked")  # a worker waits for a locked one
    ],
)
def test_a_storage_that_cannot_be_used_is_told_without_its_password(
    case: str, command: str, way: str, hpo: Hpo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, message = STORAGES[case]
    (tmp_path / "mine.py").write_text("def objective(trial): return 1.0\n")
    (tmp_path / "own.toml").write_text(OWN)
    (tmp_path / "text.db").write_text("no database at all " * 100)
    holder = sqlite3.connect(tmp_path / "locked.db", isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    arguments = USERS[command]
    if way == "option":
        arguments = [*arguments, "--storage", url]
    else:
        monkeypatch.setenv("HPO_STORAGE", url)
    told = refused(hpo, tmp_path, *arguments)
    holder.close()
    assert re.search(message, told)
    assert "hunter2" not in told


@pytest.mark.parametrize("command", ["worker", "status", "export", "dashboard"])
def test_nothing_but_run_makes_a_storage(command: str, hpo: Hpo, tmp_path: Path) -> None:
    assert refused(hpo, tmp_path, *USERS[command]) == (
        f"storage sqlite:///{tmp_path}/studies.db: no such file; `hpo run` makes it, or name another with --storage"
    )


# --- studies --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["worker", "status", "export"])
def test_an_unknown_study_is_told_with_the_nearest_name(command: str, hpo: Hpo, tmp_path: Path) -> None:
    make_study(tmp_path, OWN.replace('"own"', '"digits"'))
    code, out, err = hpo(command, "digit")
    assert (code, out) == (2, "")
    assert err == f"error: there is no study 'digit' in sqlite:///{tmp_path}/studies.db (did you mean 'digits'?)\n"


def test_the_studies_are_listed_where_a_name_is_wrong_or_missing(hpo: Hpo, tmp_path: Path) -> None:
    for name in ("digits", "own"):
        make_study(tmp_path, OWN.replace('"own"', f'"{name}"'))
    for command in ("export", "logs", "pause"):
        code, out, err = hpo(command, "owm")
        assert (code, out) == (2, "")
        assert err.splitlines()[0].endswith("studies.db (did you mean 'own'?)")
        assert err.splitlines()[1:] == ["  studies: digits, own"]
        code, out, err = hpo(command, "other")
        assert (code, out) == (2, "")
        assert err == f"error: there is no study 'other' in sqlite:///{tmp_path}/studies.db\n  studies: digits, own\n"
        code, out, err = hpo(command)
        assert (code, out) == (2, "")
        assert err.endswith(hpo("status")[1])
    code, _, err = hpo("export", "--storage", "sqlite:///none.db")
    assert (code, "none.db: no such file" in err.splitlines()[-1]) == (2, True)


def test_a_study_file_stands_for_its_study(hpo: Hpo, tmp_path: Path) -> None:
    make_study(tmp_path, f'{OWN}storage = "sqlite:///{tmp_path}/studies.db"\n')
    shown = hpo("status", "own")
    (tmp_path / "elsewhere").mkdir()
    with contextlib.chdir("elsewhere"):
        assert hpo("status", "../own.toml") == shown
        assert hpo("logs", "../own.toml")[2].startswith("error: study 'own': no log")
        assert hpo("export", "../own.toml")[2].startswith("error: study 'own' has no finished trial yet")
        assert hpo("status", "own.toml")[:2] == (2, "")


def test_a_storage_with_no_study_says_how_to_make_one(hpo: Hpo, tmp_path: Path) -> None:
    optuna.create_study(storage=f"sqlite:///{tmp_path}/studies.db", study_name="plain")
    optuna.delete_study(storage=f"sqlite:///{tmp_path}/studies.db", study_name="plain")
    assert hpo("worker", "plain")[2] == (
        f"error: there is no study of hpo in sqlite:///{tmp_path}/studies.db; `hpo run FILE` makes one\n"
    )


def test_a_study_with_no_finished_trial_cannot_be_exported(hpo: Hpo, tmp_path: Path) -> None:
    make_study(tmp_path)
    code, out, err = hpo("export", "own")
    assert (code, out) == (2, "")
    assert err == (
        "error: study 'own' has no finished trial yet (no trial at all); let `hpo run` finish one, "
        "`hpo status own` shows how far it is\n"
    )
    assert not (tmp_path / "best.toml").exists()


def test_a_run_with_far_more_workers_than_cores_is_warned(
    hpo: Hpo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    many = 4 * len(os.sched_getaffinity(0))
    make_study(tmp_path)
    assert hpo("pause", "own")[0] == 0
    for count, told in ((many, []), (many + 1, [f"warning: workers = {many + 1}: this machine has "])):
        code, _, err = hpo("run", "own.toml", "--workers", str(count))
        warnings = [line for line in err.splitlines() if line.startswith("warning: ")]
        assert (code, len(warnings)) == (0, len(told))
        assert "no worker is started" in err
        assert [line for line, start in zip(warnings, told, strict=True) if not line.startswith(start)] == []


@pytest.mark.parametrize("command", [["run", "own.toml", "--workers", "0"], ["worker", "own.toml"]])
def test_a_study_of_another_file_is_refused(command: list[str], hpo: Hpo, tmp_path: Path) -> None:
    """A study made from another file is refused with the difference and the ways out."""
    made = make_study(tmp_path)
    (tmp_path / "own.toml").write_text("seed = 5\n" + OWN)
    code, _, err = hpo(*command)
    assert code == 2
    assert err == (
        "error: study 'own' was made with other settings:\n  seed: the study has 0, the file has 5\n"
        "undo the change, start a new study with --name NEW, or take its trials along with `hpo fork own NEW FILE`\n"
        "(You changed nothing? Then a new version of hpo added an option.)\n"
    )
    place = connect(f"sqlite:///{tmp_path}/studies.db")
    kept = studies.join(place, "own")
    assert (kept.uid, kept.spec) == (made.uid, made.spec)
    assert studies.names(place) == ["own"]
    place.close()


def test_a_larger_budget_is_no_difference(hpo: Hpo, tmp_path: Path) -> None:
    make_study(tmp_path)
    (tmp_path / "own.toml").write_text(OWN + "[budget]\ntrials = 99\n")
    for options, words in (([], "joined, 0 trials"), (["--name", "other"], "new study")):
        code, _, err = hpo("run", "own.toml", "--workers", "0", *options)
        assert (code, err.splitlines()[0]) == (0, f"storage  sqlite:///{tmp_path}/studies.db ({words})")
    place = connect(f"sqlite:///{tmp_path}/studies.db")
    assert studies.join(place, "own").budget == 99
    place.close()


def test_changed_code_is_refused_unless_allowed(hpo: Hpo, tmp_path: Path) -> None:
    made = make_study(tmp_path)
    claim_one(made.ledger("w"))  # code that no trial has run may change
    made.storage.close()
    (tmp_path / "mine.py").write_text("def objective(trial): return 2.0\n")
    code, _, err = hpo("run", "own.toml", "--workers", "0")
    assert code == 2
    assert err.startswith("error: your own code, or a file of weights, changed since the study was made (")
    assert hpo("run", "own.toml", "--workers", "0", "--allow-code-change")[0] == 0


def test_a_storage_that_fails_under_a_command_is_told(hpo: Hpo, tmp_path: Path) -> None:
    """A storage that fails under a command is told without a traceback."""
    make_study(tmp_path)
    connection = sqlite3.connect(tmp_path / "studies.db")
    connection.execute("DROP TABLE hpo_curves")
    connection.execute("DROP TABLE trials")
    connection.close()
    code, _, err = hpo("status", "own")
    assert (code, err.count("\n")) == (2, 1)
    assert err == "error: the storage failed: no such table: trials\n"


# --- help -----------------------------------------------------------------------------------------------------------


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True).stdout


def test_check_tells_what_the_linter_and_the_training_find(hpo: Hpo, tmp_path: Path) -> None:
    """The linter reads the file; that a parameter is unused shows only in training. Both are told, the linter's first."""
    (tmp_path / "digits.toml").write_text(
        'name = "digits"\nexecutor = "loop"\n[data]\nname = "digits"\n[model]\nname = "mlp"\nwidths = [4]\n'
        '[optimizer]\nname = "sgd"\nlr = 0.1\n[training]\nepochs = 1\nbatch_size = 256\n'
        "[augment]\nerasing_area = 0.2\nmixup = 0.0\nmix_probability = { low = 0.1, high = 0.9 }\n"
    )
    code, out, _ = hpo("check", "digits.toml", "--workers", "1", "--images", "sheet.png")
    assert code == 0
    lines = out.splitlines()
    table = lines.index("data: 1797 images [1, 8, 8] as [channels, height, width], 10 classes")
    assert lines[table + 1 : table + 3] == ["  class  train  validation  test", "  0        124          27    27"]
    assert lines[table + 12] == "  all     1257         270   270"
    assert lines[table + 15] == "     +#%+++.        -#@*=        *#%:.        .*#####-.       .:+:       :+%%%#**   "
    assert "wrote sheet.png: a row for each class, in the order above" in lines
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (8 * 34 + 2, 10 * 34 + 2)  # 8 images a row, each 32 pixels wide, and frames of 2
    assert out.splitlines()[-2:] == [
        "warning: augment.erasing_area = 0.2: has no effect without erasing; remove it",
        "warning: augment.mix_probability = { low = 0.1, high = 0.9 }: has no effect on a training; "
        "nothing uses it, remove it",
    ]


def test_check_and_run_warn_of_imbalance_that_is_corrected_twice(hpo: Hpo, tmp_path: Path) -> None:
    (tmp_path / "digits.toml").write_text(
        SMALL
        + '[loss]\nclass_weights = "balanced"\nname = "cross_entropy"\n[training]\nsampling = "balanced"\nepochs = 1\n'
    )
    warned = 'warning: loss.class_weights = "balanced" and training.sampling = "balanced": both at once '
    code, out, _ = hpo("check", "digits.toml", "--workers", "1")
    assert (code, len([line for line in out.splitlines() if line.startswith(warned)])) == (0, 1)
    code, _, err = hpo("run", "digits.toml", "--workers", "0")
    assert (code, len([line for line in err.splitlines() if line.startswith(warned)])) == (0, 1)


def test_check_says_when_gpu_hours_end_the_workers_of_the_file(
    hpo: Hpo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi.install(tmp_path, monkeypatch)  # two GPUs for four workers
    budget = "[budget]\ntrials = 1000000\ngpu_hours = 0.01\n[training]\nepochs = 1\n"
    (tmp_path / "digits.toml").write_text(f"workers = 4\n{SMALL}{budget}")
    code, out, _ = hpo("check", "digits.toml")
    (line,) = [line for line in out.splitlines() if line.startswith("budget: at most ")]
    assert code == 0
    assert " of training with 4 workers, " in line
    assert "; budget.gpu_hours ends it after 18.0 s, about " in line


def test_help_imports_nothing_heavy() -> None:
    """The help of every command, and the version, are shown without torch, Optuna, SQLAlchemy, scikit-learn and numpy."""
    asked = [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)]
    out = python(
        "import sys\nfrom hpo import cli\n"
        f"for arguments in {asked!r}:\n"
        "    sys.argv = ['hpo', *arguments]\n"
        "    try:\n        cli.main()\n    except SystemExit as end:\n        assert not end.code, arguments\n"
        "    heavy = {'torch', 'optuna', 'sqlalchemy', 'sklearn', 'numpy'} & sys.modules.keys()\n"
        "    assert not heavy, (arguments, heavy)\n"
        "print('all shown')"
    )
    assert out.endswith("all shown\n")


def commands() -> dict[str, Any]:
    group = typer.main.get_command(cli.app)
    return dict(group.commands)  # type: ignore[attr-defined]


def test_every_command_is_known_here_and_has_a_help_text() -> None:
    assert sorted(commands()) == sorted(COMMANDS)
    for name, command in commands().items():
        assert command.help, name
        for parameter in command.params:
            assert getattr(parameter, "help", None), f"{name} {parameter.name}"


@pytest.mark.parametrize("command", COMMANDS)
def test_the_examples_of_every_help_are_command_lines(command: str) -> None:
    title, *lines = commands()[command].epilog.split("\n\n")
    assert (title, len(lines) > 0) == ("Examples:", True)
    for line in lines:
        name, *words = line.removeprefix("hpo ").split()
        assert (line.startswith("hpo "), name) == (True, command)
        commands()[command].make_context(name, words)


def test_no_command_and_an_unknown_one_are_usage_errors(hpo: Hpo, tmp_path: Path) -> None:
    assert hpo("serch")[0] == 2
    assert hpo("run")[0] == 2
    assert content(tmp_path) == {}


# --- managing -------------------------------------------------------------------------------------------------------


def test_a_study_is_paused_and_goes_on(hpo: Hpo, tmp_path: Path) -> None:
    made = make_study(tmp_path)
    assert hpo("pause", "own") == (
        0, "paused: running trials of 'own' are parked at their next batch or report; next: hpo resume own\n", "",
    )  # fmt: skip
    assert claim_one(made.ledger("w")) is claiming.Idle.WAIT
    assert hpo("resume", "own") == (0, "'own' goes on; it was paused\n", "")
    assert hpo("resume", "own") == (0, "'own' was neither paused nor stopped\n", "")
    made.storage.close()


def test_a_study_is_stopped_and_goes_on(hpo: Hpo, tmp_path: Path) -> None:
    made = make_study(tmp_path)
    assert hpo("stop", "own") == (0, "stopped: no new trial is started in 'own'\n", "")
    assert claim_one(made.ledger("w")) is claiming.Idle.DONE
    assert hpo("resume", "own") == (0, "'own' goes on; it was stopped: by `hpo stop`\n", "")
    begin(made)
    ledger, claim, _ = begin(made)
    ledger.park(claim)
    assert hpo("stop", "own")[:2] == (
        0, "stopped: no new trial is started in 'own'; 2 open trials are still finished\n",
    )  # fmt: skip
    assert hpo("stop", "own", "--now")[:2] == (
        0, "stopped: no new trial is started in 'own'; 1 open trials end at their next batch or report\n",
    )  # fmt: skip
    made.storage.close()


def test_status_says_last_what_is_wrong_and_what_to_do(hpo: Hpo, tmp_path: Path) -> None:
    made = make_study(tmp_path)
    assert hpo("status", "own", "--health")[1].splitlines()[-1] == "health   nothing found, in 0 finished trials"
    for _ in range(3):
        run(made, 1.0, kind=Kind.EXCEPTION, reason="ValueError: no")
    made.storage.close()
    lines = [
        "health   failures: 3 of 3 attempts failed (100%): 3 × exception. The last:",
        "         ValueError: no.",
        "         Mend the code; hpo status own --trial N shows a traceback.",
    ]
    shown = hpo("status", "own")[1]
    assert shown.splitlines()[-3:] == lines
    assert hpo("status", "own", "--health")[1] == shown
    [finding] = json.loads(hpo("status", "own", "--json")[1])["health"]
    assert finding["name"] == "failures"
    assert hpo("status", "--health") == (
        2, "", "error: --health: checks one study as a whole; write hpo status STUDY --health\n",
    )  # fmt: skip


def test_one_trial_is_stopped(hpo: Hpo, tmp_path: Path) -> None:
    made = make_study(tmp_path)
    ledger, claim, _ = begin(made)
    assert hpo("stop", "own", "--trial", "0") == (0, "trial 0 ends at its next batch or report\n", "")
    ledger.park(claim)
    hpo("stop", "own", "--trial", "0")
    assert hpo("stop", "own", "--trial", "0")[0] == 2  # it is finished
    assert hpo("stop", "own", "--trial", "7") == (
        2, "", "error: study 'own' has no trial 7; `hpo status own` lists those that run\n",
    )  # fmt: skip
    assert hpo("status", "own")[0] == 0
    begun, _, _ = begin(made)  # the study itself goes on
    assert begun.uid == made.uid
    made.storage.close()


@pytest.mark.parametrize(
    "command", [["pause"], ["resume"], ["stop"], ["stop", "--now"], ["doctor"], ["doctor", "--fail", "0"]]
)
def test_orders_to_an_unknown_study_are_refused_with_the_nearest_name(
    command: list[str], hpo: Hpo, tmp_path: Path
) -> None:
    make_study(tmp_path, OWN.replace('"own"', '"digits"'))
    name, *options = command
    assert hpo(name, "digit", *options) == (
        2, "", f"error: there is no study 'digit' in sqlite:///{tmp_path}/studies.db (did you mean 'digits'?)\n",
    )  # fmt: skip


def test_a_fork_that_was_cut_off_is_not_resumed(hpo: Hpo, tmp_path: Path) -> None:
    made = make_study(tmp_path)
    with sql.writing(made.storage.engine) as connection:
        connection.execute(hpo_studies.update().values(hold="forking", stop_reason="a fork into it was cut off"))
    assert hpo("resume", "own") == (2, "", "error: study 'own': a fork into it was cut off\n")
    made.storage.close()


# --- doctor ---------------------------------------------------------------------------------------------------------


def test_a_storage_that_is_well_has_nothing_to_mend(hpo: Hpo, tmp_path: Path) -> None:
    make_study(tmp_path).storage.close()
    for arguments in (["doctor"], ["doctor", "own"], ["doctor", "--repair"], ["doctor", "--workers", "1000"]):
        assert hpo(*arguments) == (0, "nothing to mend\n", "")


def test_what_is_ill_is_told_with_its_mend(hpo: Hpo, tmp_path: Path) -> None:
    """What is ill is told with its mend and exit code 1 until it is repaired."""
    made = make_study(tmp_path)
    claim_one(made.ledger("dead", lease_seconds=-1.0))
    what = "own: trial 0 is RUNNING without a live lease; its worker was dead\n"
    ill = f"ill     {what}        hpo doctor --repair, or any worker, parks it\n"
    for _ in range(2):
        code, out, err = hpo("doctor")
        assert (code, err) == (1, "")
        assert out.endswith(f"{ill}1 to mend\n")
    code, out, _ = hpo("doctor", "own", "--repair")
    assert code == 0
    assert out.endswith(f"mended  {what}nothing to mend\n")
    code, out, _ = hpo("doctor")
    assert (code, out) == (
        0,
        "note    own: trial 0 is parked\n        hpo run, or hpo worker, goes on with it\nnothing to mend\n",
    )
    made.storage.close()


def test_a_trial_of_another_program_is_failed_by_hand_alone(hpo: Hpo, tmp_path: Path) -> None:
    made = make_study(tmp_path)
    made.optuna.ask()
    code, out, _ = hpo("doctor", "--repair")
    assert code == 1
    assert out.startswith("ill     own: trial 0 was started by another program at ")
    assert out.endswith(" UTC\n        if that is dead: hpo doctor own --fail 0\n1 to mend\n")
    assert hpo("doctor", "--fail", "0") == (
        2, "", "error: --fail 0: needs the name of the trial's study; add it after `hpo doctor`\n",
    )  # fmt: skip
    assert hpo("doctor", "own", "--fail", "0") == (0, "trial 0 of 'own' is FAIL now\nnothing to mend\n", "")
    assert hpo("doctor", "own", "--fail", "0") == (
        2, "", "error: trial 0 of study 'own' does not run: it is failed\n",
    )  # fmt: skip
    made.storage.close()


def test_one_study_is_looked_at_if_it_is_named_and_all_of_them_if_not(hpo: Hpo, tmp_path: Path) -> None:
    for name in ("one", "other", "third"):
        made = make_study(tmp_path, OWN.replace('"own"', f'"{name}"'), f"{name}.toml")
        if name != "third":
            made.optuna.ask()
        made.storage.close()
    assert hpo("doctor", "third")[:2] == (0, "nothing to mend\n")
    assert hpo("doctor", "one")[0] == 1
    code, out, _ = hpo("doctor")
    assert (code, out.splitlines()[-1]) == (1, "2 to mend")
    assert "ill     one: " in out
    assert "ill     other: " in out


def test_a_study_whose_spec_cannot_be_read_does_not_hide_the_others(hpo: Hpo, tmp_path: Path) -> None:
    for name in ("bad", "good"):
        made = make_study(tmp_path, OWN.replace('"own"', f'"{name}"'), f"{name}.toml")
    with sql.writing(made.storage.engine) as connection:
        connection.execute(hpo_studies.update().where(hpo_studies.c.uid != made.uid).values(spec="garbage"))
    made.optuna.ask()
    made.storage.close()
    code, out, _ = hpo("doctor", "--repair")
    assert code == 1
    assert "ill     bad: no worker can load its spec: " in out
    assert "ill     good: trial 0 was started by another program" in out


@pytest.mark.parametrize("table", ["filler", "trials"])
def test_a_damaged_file_is_told_whatever_else_can_still_be_read(table: str, hpo: Hpo, tmp_path: Path) -> None:
    made = make_study(tmp_path)
    begin(made)
    made.storage.close()
    connection = sqlite3.connect(tmp_path / "studies.db")
    connection.execute("CREATE TABLE filler (x INTEGER)")
    connection.execute("INSERT INTO filler VALUES (1)")
    connection.commit()
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    (page,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", [table]).fetchone()
    (size,) = connection.execute("PRAGMA page_size").fetchone()
    connection.close()
    with (tmp_path / "studies.db").open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(b"\xff" * size)
    code, out, _ = hpo("doctor")
    assert code == 1
    assert f"sqlite:///{tmp_path}/studies.db: the file is damaged: " in out
    assert "restore a copy of it" in out


def test_a_postgres_that_cannot_carry_the_workers_planned_is_ill(postgres_url: str, tmp_path: Path) -> None:
    connect(postgres_url, create=True).close()

    def doctor(workers: int, code: int) -> str:  # a fork that ends gives back its connections
        return forked(("doctor", "--workers", str(workers), "--storage", postgres_url), tmp_path, {}, code)

    assert doctor(8, code=0) == "nothing to mend\n"
    told = doctor(1000, code=1)
    assert "1000 workers and this process take up to 2002 connections, 2 each; Postgres has " in told
    assert told.endswith("1 to mend\n")


@pytest.mark.parametrize("command", ["status", "doctor", "pause"])
def test_any_command_completes_an_earlier_version_s_storage(command: str, hpo: Hpo, tmp_path: Path) -> None:
    make_study(tmp_path).storage.close()
    connection = sqlite3.connect(tmp_path / "studies.db")
    connection.execute("ALTER TABLE hpo_trials DROP COLUMN accumulation")
    connection.close()
    assert hpo(*USERS[command])[0] == 0
    connection = sqlite3.connect(tmp_path / "studies.db")
    columns = [column for _, column, *_ in connection.execute("PRAGMA table_info(hpo_trials)")]
    connection.close()
    assert "accumulation" in columns


@pytest.mark.parametrize("option", [["--fail", "-1"], ["--workers", "0"], ["--trial", "-1"]])
def test_a_number_out_of_range_is_a_usage_error(option: list[str], hpo: Hpo, tmp_path: Path) -> None:
    command = "stop" if option[0] == "--trial" else "doctor"
    assert hpo(command, "own", *option)[0] == 2
    assert content(tmp_path) == {}


def test_known_configurations_are_queued_and_what_holds_them_up_is_told(hpo: Hpo, tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text(SMALL + "[budget]\ntrials = 1\n")
    assert hpo("run", "small.toml", "--workers", "0")[0] == 0
    assert hpo("enqueue", "small", "optimizer.lr=1e-2") == (0, "queued trial 0 of 'small': optimizer.lr = 0.01\n", "")
    (tmp_path / "best.toml").write_text(PINNED.replace("digits", "mnist"))
    assert hpo("enqueue", "small", "--file", "best.toml")[1].splitlines() == [
        "queued trial 1 of 'small': optimizer.lr = 0.1",
        "  of best.toml, not taken: data.name = 'mnist': here it is 'digits'",
        "  2 are queued and 1 left of the budget: `hpo run FILE --trials 2` begins all",
    ]
    assert hpo("stop", "small")[0] == 0
    held = "  they begin once the study goes on; it is stopped: by `hpo stop`\n"
    assert hpo("enqueue", "small", "optimizer.lr=0.01")[1].endswith(held)


@pytest.mark.parametrize(
    "given", [[], ["optimizer.lr=0.1", "--file", "best.toml"], ["optimizer.lr=1"], ["--file", "no.toml"]]
)
def test_what_cannot_be_queued_writes_nothing(given: list[str], hpo: Hpo, tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text(SMALL)
    (tmp_path / "best.toml").write_text(PINNED)
    hpo("run", "small.toml", "--workers", "0")
    code, out, told = hpo("enqueue", "small", *given)
    assert (code, out) == (2, "")
    assert told.startswith("error: ")
    place = connect(f"sqlite:///{tmp_path}/studies.db")
    assert studies.join(place, "small").optuna.trials == []
    place.close()
