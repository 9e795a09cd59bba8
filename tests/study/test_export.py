"""Export, final training and replay: a trial becomes a file, the file becomes the trial's curve again."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import tomli_w
import torch
from optuna.trial import TrialState

import hpo
from hpo.errors import CheckpointError, MismatchError, SpecError, StudyError
from hpo.final import openings, user_objective
from hpo.final import train as final
from hpo.spec.study_file import StudySpec
from hpo.storage.connect import connect, plain_url
from hpo.storage.tables import hpo_test_openings
from hpo.study import export, resolve, results, trial_history
from hpo.study import study as studies
from hpo.study.interval import wilson
from hpo.study.study import Study
from hpo.train import checkpoint, loop
from hpo.worker import loop as worker_loop
from hpo.worker.objective import declared
from hpo.worker.signals import StopSignal
from tests.support.declared import DOCUMENT, nothing, quiet
from tests.support.trials import claim_one, finish_claim

TRIALS = 5


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A finished study of five trials on the digits, one of them failed."""
    folder = tmp_path_factory.mktemp("searched")
    place = connect(f"sqlite:///{folder}/studies.db", create=True)
    spec = resolve.resolve(StudySpec.from_document({**DOCUMENT, "budget": {"trials": TRIALS}}), folder)
    study = studies.create_or_join(place, spec, code_folder=folder, code_digest="")
    ledger = study.ledger("w")
    failed = claim_one(ledger)
    finish_claim(ledger, failed, TrialState.FAIL, None, outcome="exception", reason="boom")
    worker_loop.work(study, declared(study, folder), study.ledger("w"), StopSignal())
    return study


@pytest.fixture
def best_file(searched: Study, tmp_path: Path) -> Path:
    (path,) = export.export(searched, tmp_path / "best.toml")
    return path


def test_the_best_trial_s_file_holds_its_values_and_only_its_branches(searched: Study, best_file: Path) -> None:
    winner = results.best(searched)[0]
    document = tomllib.loads(best_file.read_text())
    name = winner.params["optimizer.name"]
    assert document["optimizer"]["name"] == name
    assert document["optimizer"]["lr"] == winner.params["optimizer.lr"]
    assert document["model"]["dropout"] == winner.params["model.dropout"]
    assert [key for key, value in document["optimizer"].items() if isinstance(value, dict)] == [name]
    assert not {"budget", "sampler", "pruner"} & document.keys()
    assert StudySpec.load(best_file).is_pinned
    assert document["receipt"]["trial"] == winner.number
    assert document["receipt"]["value"] == winner.value
    assert document["receipt"]["seed"] == winner.receipt["seed"]
    known = wilson(winner.value, 270)
    assert winner.interval == known
    assert document["receipt"]["validation_images"] == 270
    assert document["receipt"]["value_interval"] == [known.low, known.high]
    assert document["receipt"]["curves"]["validation_loss"] == winner.curves["validation_loss"]


def test_the_same_trial_is_exported_to_the_same_bytes(searched: Study, best_file: Path, tmp_path: Path) -> None:
    (again,) = export.export(searched, tmp_path / "again.toml")
    assert again.read_bytes() == best_file.read_bytes()


def test_the_top_k_get_their_rank_in_the_name(searched: Study, tmp_path: Path) -> None:
    written = export.export(searched, tmp_path / "best.toml", top=3)
    assert [path.name for path in written] == ["best.1.toml", "best.2.toml", "best.3.toml"]
    values = [tomllib.loads(path.read_text())["receipt"]["value"] for path in written]
    assert values == sorted(values, reverse=True)


def test_a_trial_without_a_result_is_not_exported(searched: Study, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="0"):
        export.export(searched, tmp_path / "x.toml", number=0)
    with pytest.raises(StudyError, match="99"):
        export.export(searched, tmp_path / "x.toml", number=99)
    assert list(tmp_path.iterdir()) == []


def test_every_exported_trial_replays_bit_for_bit(searched: Study, tmp_path: Path) -> None:
    for number in range(1, TRIALS):
        (path,) = export.export(searched, tmp_path / f"{number}.toml", number=number)
        assert final.replay(final.prepare(path), quiet) == []


def test_a_replay_of_a_changed_config_says_where_it_differs(best_file: Path) -> None:
    document = tomllib.loads(best_file.read_text())
    document["optimizer"]["lr"] *= 1.01
    best_file.write_text(tomli_w.dumps(document))
    differences = final.replay(final.prepare(best_file), quiet)
    assert differences[0].epoch == 1
    assert {one.metric for one in differences} >= {"train_loss"}


def test_what_the_final_training_leaves(searched: Study, best_file: Path, tmp_path: Path) -> None:
    """The final training leaves weights metrics and logs and tests once."""
    training, folder = final.prepare(best_file), tmp_path / "run"
    metrics = final.train(training, folder, stop=lambda: False, progress=quiet, before_test=nothing)
    assert metrics is not None
    assert metrics["value"] == results.best(searched)[0].value
    assert metrics["test_images"] == 270
    assert 0.0 <= metrics["test_accuracy"] <= 1.0
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert (folder / "config.toml").read_bytes() == best_file.read_bytes()
    names = sorted({path.name.split(".")[0] for path in folder.iterdir()})
    assert names == ["config", "events", "metrics", "steps", "trajectory", "weights"]
    run = training.run()
    run.model.load_state_dict(checkpoint.load(folder / "weights.pt"))
    assert final.finished(training, folder) == metrics
    with pytest.raises(StudyError, match="another finished training"):
        final.train(final.prepare(best_file, seed=1), folder, stop=lambda: False, progress=quiet, before_test=nothing)


def test_the_weights_kept_are_those_of_the_best_epoch(best_file: Path, tmp_path: Path) -> None:
    training = final.prepare(best_file)
    metrics = final.train(training, tmp_path / "run", stop=lambda: False, progress=quiet, before_test=nothing)
    assert metrics is not None
    run = training.run()
    for result in loop.train(run):
        if result.epoch == metrics["epoch"]:
            break
    kept = checkpoint.load(tmp_path / "run" / "weights.pt")
    assert all(torch.equal(value, kept[name]) for name, value in run.model.state_dict().items())


def test_a_stopped_final_training_goes_on_to_the_same_result(best_file: Path, tmp_path: Path) -> None:
    training = final.prepare(best_file)
    whole = final.train(training, tmp_path / "whole", stop=lambda: False, progress=quiet, before_test=nothing)
    asked = iter(range(1000))
    assert (
        final.train(training, tmp_path / "broken", stop=lambda: next(asked) > 25, progress=quiet, before_test=nothing)
        is None
    )
    assert (tmp_path / "broken" / "checkpoint.pt").exists()
    again = final.train(training, tmp_path / "broken", stop=lambda: False, progress=quiet, before_test=nothing)

    def timeless(metrics: dict[str, Any] | None) -> Any:
        assert metrics is not None
        return [{k: v for k, v in row.items() if k != "seconds"} for row in metrics["history"]], metrics["test_loss"]

    assert timeless(again) == timeless(whole)
    assert not (tmp_path / "broken" / "checkpoint.pt").exists()


def test_a_folder_of_another_training_is_left_alone(searched: Study, best_file: Path, tmp_path: Path) -> None:
    final.train(final.prepare(best_file), tmp_path / "run", stop=lambda: False, progress=quiet, before_test=nothing)
    before = (tmp_path / "run" / "metrics.json").read_bytes()
    others = [t for t in range(1, TRIALS) if t != results.best(searched)[0].number]
    (other,) = export.export(searched, tmp_path / "other.toml", number=others[0])
    with pytest.raises(StudyError, match="another finished training"):
        final.train(final.prepare(other), tmp_path / "run", stop=lambda: False, progress=quiet, before_test=nothing)
    assert (tmp_path / "run" / "metrics.json").read_bytes() == before


def test_a_config_with_ranges_is_not_trained_and_each_range_is_named(tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text(tomli_w.dumps(DOCUMENT))
    with pytest.raises(SpecError) as refused:
        final.prepare(path)
    assert "model.dropout" in str(refused.value)
    assert "optimizer.lr" in str(refused.value)
    assert "hpo run" in str(refused.value)


def test_every_opening_is_recorded_first(searched: Study, best_file: Path) -> None:
    """Every opening is recorded before it happens and gets its own result."""
    spec, url = StudySpec.load(best_file), plain_url(searched.storage.url)

    def results_of_openings() -> list[Any]:
        with searched.storage.engine.connect() as connection:
            rows = connection.execute(sa.select(hpo_test_openings).order_by(hpo_test_openings.c.opening_id)).all()
        assert {row.trial_number for row in rows} == {results.best(searched)[0].number}
        return [row.metrics and json.loads(row.metrics)["test_accuracy"] for row in rows]

    assert spec.receipt["test_split"] == "sealed"
    folders = [str(Path(name).absolute()) for name in ("run", "other")]
    for folder, accuracy, after in (("run", 0.5, [0.5]), ("other", 0.75, [0.5, 0.75])):
        assert openings.announce(spec, Path(folder), url) is None
        assert results_of_openings() == [*after[:-1], None]
        for _ in range(2):  # said again when the finished training is asked for: changes nothing
            told = openings.complete(spec, Path(folder), url, {"test_accuracy": accuracy, "test_loss": 1.0})
            assert told == folders[: len(after)]
        assert results_of_openings() == after
    number = results.best(searched)[0].number
    assert trial_history.history(searched, number).tested == folders
    assert trial_history.history(searched, number - 1).tested == []
    for exported, count in ((number, 2), (1 + number % (TRIALS - 1), 0)):
        (again,) = export.export(searched, best_file, number=exported)
        assert (
            StudySpec.load(again).receipt["test_split"] == f"openings in this study: 2, {count} of them for this trial"
        )
    assert "no such file" in (openings.announce(spec, Path("run"), "sqlite:////nowhere/x.db") or "")


def test_the_opening_is_announced_before_the_result(best_file: Path, tmp_path: Path) -> None:
    """The opening is announced after the last epoch and before the result."""
    seen: list[object] = []
    final.train(
        final.prepare(best_file),
        tmp_path / "run",
        stop=lambda: False,
        progress=lambda result: seen.append(result.epoch),
        before_test=lambda: seen.append((tmp_path / "run" / "metrics.json").exists()),
    )
    assert seen == [1, 2, 3, False]


def test_another_seed_does_not_go_on_from_this_one_s_checkpoint(best_file: Path, tmp_path: Path) -> None:
    asked = iter(range(1000))
    first = final.prepare(best_file, seed=1)
    stopped = final.train(first, tmp_path / "run", stop=lambda: next(asked) > 25, progress=quiet, before_test=nothing)
    assert stopped is None
    before = (tmp_path / "run" / "config.toml").read_bytes()
    best_file.write_text(best_file.read_text() + "\n# changed\n")
    with pytest.raises(StudyError, match="another training, unfinished"):
        final.train(
            final.prepare(best_file, seed=2), tmp_path / "run", stop=lambda: False, progress=quiet, before_test=nothing
        )
    assert (tmp_path / "run" / "config.toml").read_bytes() == before


def test_a_damaged_checkpoint_of_a_final_training_is_told_with_the_mend(best_file: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint.pt").write_bytes(b"junk")
    with pytest.raises(CheckpointError, match=r"remove .*checkpoint\.pt"):
        final.train(final.prepare(best_file), tmp_path / "run", stop=lambda: False, progress=quiet, before_test=nothing)


def test_a_config_that_only_has_another_receipt_is_the_same_training(best_file: Path, tmp_path: Path) -> None:
    metrics = final.train(
        final.prepare(best_file), tmp_path / "run", stop=lambda: False, progress=quiet, before_test=nothing
    )
    best_file.write_text(best_file.read_text().replace("trials_tried = 5", "trials_tried = 99"))
    assert final.finished(final.prepare(best_file), tmp_path / "run") == metrics


def test_an_own_objective_s_winner_is_exported_and_run_again(make_study: Callable[..., Study], tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def objective(trial):\n    return trial.suggest_float('x', -1, 1) ** 2 + trial.number\n"
    )
    study = make_study(trials=3)
    finish_claim(
        study.ledger("w"), claim_one(study.ledger("w")), TrialState.FAIL, None, outcome="exception"
    )  # the best is not 0
    worker_loop.work(study, worker_loop.build_objective(study, tmp_path), study.ledger("w"), StopSignal())
    (path,) = export.export(study, tmp_path / "best.toml")
    spec = final.load_pinned(path)
    assert not {"data", "model", "training", "metric"} & tomllib.loads(path.read_text()).keys()
    assert spec.params == results.best(study)[0].params
    assert user_objective.run(spec, path, final.find_code_folder(spec, path)).value == results.best(study)[0].value
    assert spec.receipt["test_split"] == "unknown: hpo does not see which data your objective reads"


@pytest.mark.parametrize(("reports", "where"), [(True, "best.objects"), (False, "objects")])
def test_an_own_loop_s_winner_says_where_its_weights_are(
    make_study: Callable[..., Study], tmp_path: Path, reports: bool, where: str
) -> None:
    def objective(trial: Any) -> float:
        for epoch in hpo.epochs(trial, 3, model=torch.nn.Linear(1, 1)):
            if reports:
                trial.report(abs(epoch - 1), epoch)
        return 0.0

    study = make_study(trials=1)
    worker_loop.work(study, objective, study.ledger("w"), StopSignal())
    (path,) = export.export(study, tmp_path / "best.toml")
    receipt = final.load_pinned(path).receipt
    assert receipt["checkpoint"] == results.best(study)[0].checkpoint
    assert (receipt["weights"], receipt.get("best_step")) == (where, 1 if reports else None)


@pytest.mark.parametrize(("returned", "value"), [("np.float32(0.5)", 0.5), ("'0.25'", 0.25), ("1", 1.0)])
def test_an_own_objective_s_number_is_what_a_search_takes_for_one(tmp_path: Path, returned: str, value: float) -> None:
    (tmp_path / "mine.py").write_text(f"import numpy as np\ndef objective(trial):\n    return {returned}\n")
    path = tmp_path / "best.toml"
    path.write_text('objective = "mine.py:objective"\ndirection = "minimize"\n[params]\ny = 1.0\n')
    assert user_objective.run(final.load_pinned(path), path, tmp_path).value == value


def test_an_own_objective_s_value_must_be_finite(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def objective(trial):\n    return float('nan')\n")
    path = tmp_path / "best.toml"
    path.write_text('objective = "mine.py:objective"\ndirection = "minimize"\n[params]\ny = 1.0\n')
    with pytest.raises(StudyError, match="not a finite number"):
        user_objective.run(final.load_pinned(path), path, tmp_path)


def test_a_missing_parameter_of_an_own_objective_is_named(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def objective(trial):\n    return trial.suggest_float('x', -1, 1) ** 2\n")
    path = tmp_path / "best.toml"
    path.write_text('objective = "mine.py:objective"\ndirection = "minimize"\n[params]\ny = 1.0\n')
    with pytest.raises(SpecError, match="x"):
        user_objective.run(final.load_pinned(path), path, tmp_path)


def test_a_trial_on_spreadsheets_goes_through_spec_export_and_replay(tmp_path: Path) -> None:
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir()
    elsewhere.mkdir()
    rows = [f"{label * 90},{label * 40},{row},{255 - row}" for row in range(90) for label in (0, 1)]
    (home / "images.csv").write_text("\n".join(rows))
    (home / "labels.csv").write_text("no\nyes\n" * 90)
    told = {"name": "csv", "images": "images.csv", "labels": "labels.csv", "shape": [1, 4], "folds": 4, "fold": 1}
    document = {**DOCUMENT, "data": told, "budget": {"trials": 2}}
    spec = resolve.resolve(StudySpec.from_document(document), home)
    assert StudySpec.from_document(spec.document).fingerprint == spec.fingerprint
    study = studies.create_or_join(
        connect(f"sqlite:///{tmp_path}/studies.db", create=True), spec, code_folder=home, code_digest=""
    )
    worker_loop.work(study, declared(study, home), study.ledger("w"), StopSignal())
    (path,) = export.export(study, elsewhere / "best.toml")  # the files are not beside it, but where the study had them
    assert tomllib.loads(path.read_text())["data"] == spec.data
    training = final.prepare(path)
    assert final.replay(training, quiet) == []
    metrics = final.train(training, elsewhere / "run", stop=lambda: False, progress=quiet, before_test=nothing)
    assert metrics is not None
    assert (metrics["classes"], metrics["test_images"]) == (["no", "yes"], 27)
    (home / "images.csv").write_text("\n".join(["1,1,1,1", *rows[1:]]))
    with pytest.raises(MismatchError):
        declared(study, home)
