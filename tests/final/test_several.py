"""`hpo train --seeds`: several trainings of one config, tested in one opening of the test split."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import sqlalchemy as sa
from scipy import stats

from hpo import data
from hpo.errors import StudyError
from hpo.files import write_json
from hpo.final import several, trajectory
from hpo.final import train as final
from hpo.final.after import trained
from hpo.final.several import SeveralSeeds
from hpo.spec import seeds
from hpo.storage.connect import connect
from hpo.storage.tables import hpo_test_openings
from hpo.study import export
from tests.cli.test_commands import Hpo, hpo
from tests.support.declared import DOCUMENT, made, nothing, quiet, work

__all__ = ["hpo"]  # a fixture

PINNED = """
name = "digits"
[data]
name = "digits"
[model]
name = "mlp"
widths = [8]
[training]
epochs = 2
batch_size = 256
[optimizer]
name = "adamw"
lr = 0.02
"""
OWN = {
    "objective": 'objective = "mine.py:objective"\ndirection = "minimize"\n[params]\nx = 1.0\n',
    "objective of a config": 'train = "mine.py:train"\ndirection = "minimize"\n[space]\nx = 1.0\n',
    "program": f'command = ["{sys.executable}", "-c", "print({{x}})"]\ndirection = "minimize"\n[space]\nx = 1.0\n',
}


@pytest.fixture(autouse=True)
def no_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save the seconds of matplotlib, as where it is not installed."""
    monkeypatch.setattr(trajectory, "can_draw", lambda: False)


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> SeveralSeeds:
    """Two trainings of two epochs of four batches."""
    path = tmp_path_factory.mktemp("config") / "best.toml"
    path.write_text(PINNED)
    return SeveralSeeds(first=final.prepare(path), count=2)


class Stop:
    """Stops a training after so many batches of all trainings."""

    def __init__(self, batches: int) -> None:
        self.left = batches

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


def run(ready: SeveralSeeds, folder: Path, **changes: Any) -> dict[str, Any] | None:
    given = {"stop": lambda: False, "began": lambda one, place: None, "progress": quiet, "before_test": nothing}
    return several.train(ready, folder, **given | changes)


def what_came_out(metrics: dict[str, Any] | None) -> dict[str, Any]:
    assert metrics is not None
    return {key: value for key, value in metrics.items() if key != "receipt"}


@pytest.fixture(scope="module")
def whole(ready: SeveralSeeds, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of trainings that nothing has stopped."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(trajectory, "can_draw", lambda: False)
        run(ready, folder)
    return folder


def test_each_seed_is_an_ordinary_training_and_the_mean_is_student_s(
    ready: SeveralSeeds, whole: Path, tmp_path: Path
) -> None:
    metrics = several.finished(ready, whole)
    assert metrics is not None
    values = [one["test_accuracy"] for one in metrics["trainings"]]
    low, high = stats.t.interval(0.95, 1, loc=fmean(values), scale=stats.sem(values))
    found = metrics["means"]["test_accuracy"]
    assert (found["value"], found["runs"]) == (fmean(values), 2)
    assert (found["low"], found["high"]) == pytest.approx((max(0.0, low), min(1.0, high)), rel=1e-12)
    assert all(0 <= metrics["means"][key][end] <= 1 for key in ("value", "test_accuracy") for end in ("low", "high"))
    for training, one in zip(ready.trainings, metrics["trainings"], strict=True):
        home, folder = whole / one["folder"], tmp_path / one["folder"]
        alone = final.train(training, folder, stop=lambda: False, progress=quiet, before_test=nothing)
        assert alone is not None
        kept = ("value", "test_accuracy", "test_loss")
        assert {key: alone[key] for key in kept} == {key: one[key] for key in kept}
        assert json.loads((home / "metrics.json").read_text())["identity"] == alone["identity"]
        assert (home / "weights.pt").read_bytes() == (folder / "weights.pt").read_bytes()
        assert not (home / "checkpoint.pt").exists()


def test_the_test_part_is_opened_once_and_after_all_trainings(
    ready: SeveralSeeds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    load_test = data.load_test

    def opened(*arguments: Any, **named: Any) -> data.Split:
        told.append("opened")
        return load_test(*arguments, **named)

    monkeypatch.setattr(data, "load_test", opened)
    run(
        ready,
        tmp_path / "all",
        began=lambda one, place: told.append(f"began {place}"),
        before_test=lambda: told.append("recorded"),
    )
    assert told == ["began 1", "began 2", "recorded", "opened"]


@pytest.mark.parametrize("batches", [3, 8, 13], ids=["amid the first", "between", "amid the last"])
def test_a_stopped_call_goes_on_to_the_same_result(
    ready: SeveralSeeds, whole: Path, tmp_path: Path, batches: int
) -> None:
    assert run(ready, tmp_path / "all", stop=Stop(batches)) is None
    assert several.finished(ready, tmp_path / "all") is None
    if (tmp_path / "all" / "seed-1" / "checkpoint.pt").exists():
        with pytest.raises(StudyError, match=r"the same `hpo train --seeds` as before, with -o .*/all, continues it"):
            trained.load(tmp_path / "all" / "seed-1")
    found = what_came_out(run(ready, tmp_path / "all"))
    assert found == what_came_out(several.finished(ready, whole))


class Killed(BaseException):
    """The end of a process at this point."""


@pytest.mark.parametrize("last", ["seed-1", "seed-2", ""])
def test_a_call_that_was_killed_while_it_tested_tests_again(
    last: str, ready: SeveralSeeds, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the result of a training, or after the common one: the next call trains nothing."""
    folder = tmp_path / "all"

    def killing(path: Path, values: dict[str, Any]) -> None:
        write_json(path, values)
        if path == folder / last / "metrics.json":
            raise Killed

    with monkeypatch.context() as patched:
        for module in (several, final):
            patched.setattr(module, "write_json", killing)
        with pytest.raises(Killed):
            run(ready, folder)
    began: list[int] = []
    found = several.finished(ready, folder) or run(ready, folder, began=lambda one, place: began.append(place))
    assert (what_came_out(found), began) == (what_came_out(several.finished(ready, whole)), [])
    assert [*folder.rglob("checkpoint.pt")] == []


def test_a_folder_of_another_run_is_left_alone(ready: SeveralSeeds, tmp_path: Path) -> None:
    folder = tmp_path / "all"
    assert run(ready, folder, stop=Stop(3)) is None
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    with pytest.raises(StudyError, match="holds 2 trainings of another config or seed, or another number of them"):
        run(SeveralSeeds(first=ready.first, count=3), folder)
    with pytest.raises(StudyError, match="holds trainings with several seeds; name another folder with -o"):
        final.train(ready.first, folder, stop=lambda: False, progress=quiet, before_test=nothing)
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before
    assert final.train(ready.first, tmp_path / "one", stop=Stop(3), progress=quiet, before_test=nothing) is None
    with pytest.raises(StudyError, match="one: holds another training; name another folder with -o"):
        run(ready, tmp_path / "one")


def test_no_training_has_the_trial_s_seed(ready: SeveralSeeds) -> None:
    """The trial was chosen with its seed, so a training with it is no fresh one."""
    found = [training.seed for training in ready.trainings]
    assert found == [seeds.derive(ready.first.seed, "final", place) for place in range(2)]
    assert ready.first.seed not in found


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_records_who_opened_the_test_part_and_after_how_many_trials(hpo: Hpo, tmp_path: Path) -> None:
    place = connect(f"sqlite:///{tmp_path}/studies.db", create=True)
    study = made(place, tmp_path, {**DOCUMENT, "training": {"epochs": 1}, "budget": {"trials": 2}})
    assert work(study) == 0
    export.export(study, tmp_path / "best.toml")
    command = ("train", "best.toml", "--seeds", "2", "-o", "out")
    code, said, complaint = hpo(*command)
    assert (code, complaint) == (0, "")
    with place.engine.connect() as connection:
        (row,) = connection.execute(sa.select(hpo_test_openings)).all()
    place.close()
    assert (row.trainings, row.trials_tried, row.folder) == (2, 2, str(tmp_path / "out"))
    assert "@" in row.opened_by
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert json.loads(row.metrics)["test_accuracy"] == metrics["means"]["test_accuracy"]["value"]
    assert "means of 2 seeds with 95 % intervals by Student's t, for this test part" in said
    code, said, _ = hpo("status", "digits", "--trial", str(row.trial_number))
    assert f"by {row.opened_by}: 2 models, the trial chosen from 2" in said
    assert "the test split is not opened again" in hpo(*command)[1]
    assert (
        hpo("after", "out")[2]
        == "error: out: holds trainings with several seeds; name one of them, such as out/seed-1\n"
    )
    assert hpo("after", "out/seed-1", "-o", "after")[0] == 0


@pytest.mark.parametrize("kind", OWN)
def test_an_own_training_is_refused(hpo: Hpo, tmp_path: Path, kind: str) -> None:
    (tmp_path / "mine.py").write_text("def objective(trial): return 1.0\n\n\ndef train(config, trial): return 1.0\n")
    (tmp_path / "own.toml").write_text(OWN[kind])
    code, said, complaint = hpo("train", "own.toml", "--seeds", "2")
    assert (code, said) == (2, "")
    assert complaint == (
        f"error: --seeds 2: your {kind.split()[0]} gets the seed of its trial, and hpo sees no test part of it; remove --seeds\n"
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--seeds", "0"), "Invalid value for '--seeds': Input should be greater than or equal to 2"),
        (("--seeds", "1"), "Invalid value for '--seeds': Input should be greater than or equal to 2"),
        (
            ("--seeds", "2", "--replay"),
            "error: --seeds 2 and --replay cannot be combined: a replay has the trial's seed",
        ),
    ],
)
def test_wrong_options_write_nothing(hpo: Hpo, tmp_path: Path, options: tuple[str, ...], said: str) -> None:
    (tmp_path / "best.toml").write_text(PINNED)
    code, out, complaint = hpo("train", "best.toml", *options)
    assert (code, out) == (2, "")
    assert said in " ".join(complaint.split())
    assert [path.name for path in tmp_path.iterdir()] == ["best.toml"]
