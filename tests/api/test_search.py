"""`hpo.search` and `hpo.open`: what they return, what they leave as it was, and their errors."""

from __future__ import annotations

import logging
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import tomllib
import warnings
from datetime import timedelta
from enum import Enum, IntEnum
from multiprocessing import forkserver
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import optuna
import pytest

import hpo
from hpo.api.borders import called
from hpo.storage.connect import connect
from hpo.study.study import join
from tests.support.cells import SLOW
from tests.support.waiting import PATIENCE, wait_for


class Size(IntEnum):
    """Its members are numbers to a user."""

    LARGE = 2


class Shade(Enum):
    """Its members are neither numbers nor texts."""

    DARK = 2


def surroundings() -> dict[str, Any]:
    """Return what belongs to the caller's process."""
    return {
        "argv": list(sys.argv),
        "path": list(sys.path),
        "own modules": [name for name in sys.modules if name == "mine"],
        "folder": os.getcwd(),
        "environment": {key: value for key, value in os.environ.items() if key != "PYTEST_CURRENT_TEST"},
        "main": sys.modules["__main__"],
        "filters": list(warnings.filters),
        "verbosity": optuna.logging.get_verbosity(),
        "logging": list(logging.getLogger().handlers),
        "method": multiprocessing.get_start_method(allow_none=True),
        "server": forkserver._forkserver._forkserver_pid,  # type: ignore[attr-defined]  # multiprocessing's own
        "handlers": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
    }


def test_a_file_is_searched_as_hpo_run_does_and_nothing_else_is_changed(here: Path) -> None:
    before = surroundings()
    study = hpo.search("own.toml", workers=1)
    assert surroundings() == before
    trials = study.optuna.trials
    best = min(trials, key=lambda trial: trial.value or 0.0)
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 4
    assert (study.best.number, study.best.value, study.best.params) == (best.number, best.value, best.params)
    assert (study.best.config, study.best.weights) == (best.params, None)
    assert repr(study) == (
        f"<hpo.Study 'own' in sqlite:///{here}/studies.db: 4 of 4 trials finished, "
        f"best {best.value:.4f} by trial {best.number}>"
    )
    assert study._repr_html_().startswith("<pre>own  (minimize, sampler random, pruner median)\n")
    assert list(study.trials_dataframe().columns) == list(study.optuna.trials_dataframe().columns)
    assert study.export("x.toml") == Path("x.toml")
    assert tomllib.loads(Path("x.toml").read_text())["params"] == best.params


def test_a_second_call_goes_on(here: Path) -> None:
    hpo.search("own.toml", workers=1, trials=2, progress=False)
    study = hpo.search("own.toml", workers=1, trials=3)
    assert [trial.number for trial in study.optuna.trials] == [0, 1, 2]
    hpo.search("own.toml", workers=1)  # the larger budget counts, as in `hpo run`
    opened = hpo.open("own", storage="sqlite:///studies.db")
    assert len(opened.optuna.trials) == 4
    assert (opened.best, repr(opened)) == (study.best, repr(study))


def test_an_objective_of_a_module_is_named_by_its_file(here: Path, mine: ModuleType) -> None:
    study = hpo.search(
        mine.objective,
        name="mine",
        trials=2,
        direction="minimize",
        sampler="random",
        pruner={"name": "none"},
        workers=1,
    )
    spec = join(connect("sqlite:///studies.db"), "mine").spec
    assert (spec.objective, spec.sampler, spec.pruner) == ("mine.py:objective", {"name": "random"}, {"name": "none"})
    assert len(study.optuna.trials) == 2


def test_a_function_with_a_space_gets_a_config(here: Path, mine: ModuleType) -> None:
    space = {"optimizer": {"lr": {"low": 0.1, "high": 0.2}}, "factor": 2}
    study = hpo.search(mine.train, name="train", trials=2, direction="minimize", space=space, workers=1)
    assert study.best.config == {"optimizer": {"lr": study.best.params["optimizer.lr"]}, "factor": 2}
    assert study.best.value == 2 * study.best.params["optimizer.lr"]


def test_several_objectives_have_a_front_and_no_best(here: Path, mine: ModuleType) -> None:
    study = hpo.search(
        mine.two, name="two", trials=3, objectives={"a": "minimize", "b": "minimize"}, sampler="random", workers=1
    )
    assert [set(trial.values) for trial in study.front] == [{"a", "b"}] * 3
    with pytest.raises(hpo.StudyError, match=r"has several objectives \(a, b\) and no best trial; use study.front"):
        _ = study.best


def test_an_interrupt_parks_and_the_next_call_goes_on(here: Path) -> None:
    (here / "mine.py").write_text(SLOW)

    def interrupt() -> None:
        wait_for((here / "begun-0").exists)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        hpo.search("own.toml", workers=1, trials=2)
    thread.join()
    assert repr(hpo.open("own")).endswith("0 of 2 trials finished>")
    (here / "go").touch()
    study = hpo.search("own.toml", workers=1)
    assert [trial.state.name for trial in study.optuna.trials] == ["COMPLETE"] * 4
    assert study.trials_dataframe()["number"].tolist() == [0, 1, 2, 3]


def test_outside_the_main_thread_and_with_a_time_limit(here: Path) -> None:
    (here / "mine.py").write_text(SLOW)
    found: list[hpo.Study] = []
    thread = threading.Thread(target=lambda: found.append(hpo.search("own.toml", workers=1, timeout=1.5)))
    thread.start()
    thread.join()
    [study] = found
    assert repr(study).endswith("0 of 4 trials finished>")


def test_values_of_numpy_and_tuples_mean_what_they_mean_in_python(here: Path, mine: ModuleType) -> None:
    hpo.search(
        mine.train,
        name="m",
        direction=optuna.study.StudyDirection.MINIMIZE,
        trials=np.int64(2),
        workers=np.int64(0),
        timeout=np.int64(60),
        seed=np.int64(3),
        sampler={"name": "random"},
        space={"x": {"low": np.float32(0.5), "high": np.float64(1)}, "n": {"choices": (1, Size.LARGE)}, "s": (3, 4)},
    )
    made = join(connect("sqlite:///studies.db"), "m")
    assert (made.spec.seed, made.budget, made.spec.direction) == (3, 2, "minimize")
    assert made.spec.document["space"] == {"x": {"low": 0.5, "high": 1.0}, "n": {"choices": [1, 2]}, "s": [3, 4]}


def test_calls_at_a_time_leave_the_caller_s_settings_as_they_were() -> None:
    """Such as searches in two threads. The first call ends while the second one goes on."""
    optuna.logging.set_verbosity(optuna.logging.DEBUG)
    before, first, second = surroundings(), called(), called()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert optuna.logging.get_verbosity() == optuna.logging.WARNING
    second.__exit__(None, None, None)
    assert surroundings() == before
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def test_a_stopped_study_starts_nothing_until_it_is_resumed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = hpo.search("own.toml", workers=0)
    assert study.stop() == 0
    assert repr(hpo.search("own.toml", workers=1)).endswith("0 of 4 trials finished, stopped: by `hpo stop`>")
    assert "nothing is left to do: by `hpo stop`" in capsys.readouterr().err
    study.resume()
    assert len(hpo.search("own.toml", workers=1).optuna.trials) == 4


def test_an_objective_that_always_fails_is_an_error_with_its_reason(here: Path, mine: ModuleType) -> None:
    arguments: dict[str, Any] = {"name": "bad", "direction": "minimize", "sampler": "random", "workers": 1}
    with pytest.raises(hpo.StudyError) as caught:
        hpo.search(mine.failing, trials=2, **arguments)
    assert str(caught.value).splitlines()[:2] == [
        "study 'bad': every trial has failed",
        "  2 × exception, the last: ValueError: no such luck",
    ]
    with pytest.raises(hpo.StudyError, match="study 'bad': stopped: 10 trials in a row ended by exception"):
        hpo.search(mine.failing, trials=20, **arguments)


def test_workers_that_cannot_go_on_are_an_error_with_their_words(here: Path) -> None:
    (here / "mine.py").write_text(
        "import multiprocessing\nif multiprocessing.parent_process(): raise OSError('no GPU')\ndef objective(trial): return 1.0"
    )
    with pytest.raises(hpo.StudyError, match="study 'own': its workers failed") as caught:
        hpo.search("own.toml", workers=1)
    assert "importing mine.py failed: OSError: no GPU" in str(caught.value)
    with pytest.raises(hpo.StudyError, match="there is no study"):
        hpo.open("own")


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a missing file": ({"what": "x.toml"}, hpo.SpecError, "x.toml: no such file; `hpo init x.toml` writes one"),
    "settings beside a file": (
        {"direction": "minimize"},
        TypeError,
        "hpo.search: direction: write it into own.toml; only a function takes settings",
    ),
    "a number": ({"what": 3}, TypeError, "hpo.search: 3 has type int; give a study file or a function"),
    "no workers": ({"workers": -1}, hpo.SpecError, "workers = -1: give a whole number from 0 on"),
    "a text for trials": ({"trials": "9"}, hpo.SpecError, "trials = '9': give a whole number from 1 on"),
    "no time": ({"timeout": 0}, hpo.SpecError, "timeout = 0: is no time; give seconds above 0"),
    "a wrong time": ({"timeout": "soon"}, hpo.SpecError, "timeout: 'soon' is not a duration"),
    "a flag for a time": ({"timeout": True}, hpo.SpecError, "timeout = True: is no time; give seconds above 0"),
    "an object for a time": (
        {"timeout": timedelta(1)},
        hpo.SpecError,
        "timeout = datetime.timedelta(days=1): is no time",
    ),
    "a path for a storage": (
        {"storage": Path("a.db")},
        TypeError,
        "storage = PosixPath('a.db'): has type PosixPath; give a URL, such as",
    ),
    "another objective": (
        {"what": "objective", "name": "m", "objective": "y.py:other"},
        hpo.SpecError,
        "hpo.search: objective: the function is what is searched; leave it out",
    ),
    "code beside a function": (
        {"what": "objective", "name": "m", "code": "src"},
        hpo.SpecError,
        "hpo.search: code = 'src': only a study file takes it; leave it out for a function",
    ),
    "a wrong storage": ({"storage": "mysql://h/d"}, hpo.StorageError, "'mysql' is not supported"),
    "a function without a name": ({"what": max}, hpo.SpecError, "hpo.search: name: missing"),
    "a misspelt setting": (
        {"what": "objective", "name": "m", "direction": "minimize", "sead": 1},
        hpo.SpecError,
        "hpo.search: sead: a study file takes no 'sead' (did you mean 'seed'?)",
    ),
    "what Optuna calls otherwise": (
        {"what": "objective", "name": "m", "direction": "minimize", "n_trials": 3},
        hpo.SpecError,
        "hpo.search: n_trials: hpo does not take it; write trials=N",
    ),
    "a sampler of Optuna": (
        {"what": "objective", "name": "m", "direction": "minimize", "sampler": optuna.samplers.RandomSampler()},
        hpo.SpecError,
        "each worker makes the sampler itself; give its name, such as sampler='tpe'",
    ),
    "a distribution of Optuna": (
        {
            "what": "objective",
            "name": "m",
            "direction": "minimize",
            "space": {"x": optuna.distributions.FloatDistribution(0, 1)},
        },
        hpo.SpecError,
        "hpo.search: space.x = FloatDistribution(high=1.0, log=False, low=0.0, step=None): has type FloatDistribution; give",
    ),
    "an enum": (
        {"what": "objective", "name": "m", "direction": "minimize", "space": {"x": {"choices": [Shade.DARK]}}},
        hpo.SpecError,
        "hpo.search: space.x.choices[0] = <Shade.DARK: 2>: has type Shade; give a number",
    ),
    "a number that Python has not": (
        {"what": "objective", "name": "m", "direction": "minimize", "space": {"x": np.longdouble(1)}},
        hpo.SpecError,
        "hpo.search: space.x = np.longdouble('1.0'): has type longdouble; give a number",
    ),
    "a space without a range": (
        {"what": "objective", "name": "m", "direction": "minimize", "space": {"x": (0.0, 1.0)}},
        hpo.SpecError,
        'hpo.search: space: has no range or choices to search; a range is {"low": 0.0, "high": 1.0}, choices are',
    ),
    "no direction": ({"what": "objective", "name": "m"}, hpo.SpecError, "hpo.search: direction: needed"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_call_is_told_before_anything_is_written(case: str, here: Path, mine: ModuleType) -> None:
    given, error, message = WRONG[case]
    what = {"objective": mine.objective}.get(given.get("what", ""), given.get("what", "own.toml"))
    rest = {key: value for key, value in given.items() if key != "what"}
    with pytest.raises(error, match=re.escape(message)):
        hpo.search(what, **{"workers": 1, **rest})
    assert not (here / "studies.db").exists()


def test_a_mended_file_and_a_file_of_the_same_name_elsewhere_are_read(here: Path) -> None:
    (here / "mine.py").write_text("def objectiv(trial): return 1.0")
    with pytest.raises(hpo.SpecError, match=r"mine\.py has no 'objective'"):
        hpo.search("own.toml", workers=0)
    (here / "mine.py").write_text("def objective(trial): return 1.0")
    (here / "other").mkdir()
    for name in ("mine.py", "own.toml"):
        (here / "other" / name).write_text((here / name).read_text())
    assert [
        hpo.search(f"{folder}own.toml", name=name, workers=0).name for folder, name in (("", "a"), ("other/", "b"))
    ] == [
        "a",
        "b",
    ]


def test_what_is_missing_when_a_study_is_opened(here: Path) -> None:
    with pytest.raises(TypeError, match="name = 3: has type int; give the study's name, a text"):
        hpo.open(3)
    with pytest.raises(hpo.StorageError, match=r"studies.db: no such file"):
        hpo.open("own")
    hpo.search("own.toml", workers=0)
    with pytest.raises(hpo.StudyError, match=r"there is no study 'oww' in .* \(did you mean 'own'\?\)"):
        hpo.open("oww")
    with pytest.raises(hpo.StudyError, match="has no finished trial yet"):
        _ = hpo.open("own").best
    with pytest.raises(AttributeError, match=r"hpo.Study has no 'best_value'; Optuna's study is at .optuna"):
        _ = hpo.open("own").best_value  # type: ignore[attr-defined]


def test_a_study_that_optuna_made_is_read_and_not_written(here: Path) -> None:
    made = optuna.create_study(storage="sqlite:///studies.db", study_name="plain")
    made.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=2)
    study = hpo.open("plain")
    assert (study.best.params, study.best.config) == (made.best_params, made.best_params)
    with pytest.raises(hpo.StudyError, match="was made by Optuna, not by hpo"):
        study.stop()


def test_a_study_whose_storage_is_gone_can_still_be_shown(here: Path) -> None:
    study = hpo.search("own.toml", workers=0)
    (here / "studies.db").unlink()
    assert repr(study).startswith(f"<hpo.Study 'own' in sqlite:///{here}/studies.db: ")
    with pytest.raises(hpo.StorageError):
        study.stop()


def test_a_script_needs_no_main_guard_and_its_output_is_its_own(here: Path) -> None:
    (here / "script.py").write_text(
        "print('begun', flush=True)\nimport hpo\nprint(hpo.search('own.toml', workers=2).best.number in range(4))\n"
    )
    done = subprocess.run([sys.executable, "script.py"], capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert (done.returncode, done.stdout) == (0, "begun\nTrue\n"), done.stderr
    assert [line.split("  ")[1] for line in done.stderr.splitlines()] == ["complete"] * 4
    assert "\x1b" not in done.stderr
