"""HpoCallback in transformers' own Trainer, with a tiny model of random weights: reports, prunes, saves, resumes, parks."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import optuna
import pytest
import torch
from optuna.trial import TrialState

import hpo
from hpo.study.results import best
from hpo.worker.signals import StopSignal
from tests.integration.processes import failures, rows
from tests.support.trials import MakeStudy
from tests.support.user_loops import EVERY_EPOCH, killed, once, record, trials, work

EPOCHS = 5


@pytest.fixture(scope="module", autouse=True)
def training() -> ModuleType:
    """The training, imported before a worker is forked. Its modules are no garbage, which each training collects."""
    pytest.importorskip("transformers")
    from tests.callbacks import transformers_training

    gc.collect()
    gc.freeze()
    return transformers_training


def objective(folder: Path, **options: Any) -> Callable[[optuna.Trial], float]:
    from tests.callbacks import transformers_training

    return transformers_training.objective(folder, **options)


@pytest.mark.parametrize(
    "style",
    [
        {},
        {"eval_strategy": "steps", "eval_steps": 3, "gradient_accumulation_steps": 1},
        {"patience": 1, "metric_for_best_model": "loss", "load_best_model_at_end": True, "save_strategy": "epoch"},
    ],
    ids=["by epoch", "within epochs", "early stopping"],
)
def test_a_training_resumes_to_the_undisturbed_curve(
    make_study: MakeStudy, tmp_path: Path, style: dict[str, Any]
) -> None:
    """Killed before the first checkpoint, in the middle, and at the last evaluation."""
    undisturbed = make_study(name="undisturbed", trials=1)
    steps: list[tuple[int, int]] = []
    work(undisturbed, objective(tmp_path / "undisturbed", hook=lambda *at: steps.append(at), **style))
    assert [trial.state for trial in trials(undisturbed)] == [TrialState.COMPLETE]
    moments = [steps[0], steps[len(steps) // 2], steps[-1]]
    seen = tmp_path / "seen"
    kill = once(tmp_path, *moments)

    def hook(number: int, step: int) -> None:
        with seen.open("a") as file:
            file.write(f"{number}.{step} ")
        kill(number, step)

    study = make_study(trials=1, recovery=EVERY_EPOCH, failures={"lost_worker": {"retries": 9}})
    for _ in moments:
        assert killed(study, objective(tmp_path / "out", hook=hook, **style))
    assert not killed(study, objective(tmp_path / "out", hook=hook, **style))
    assert record(study) == record(undisturbed)
    assert sorted(seen.read_text().split()) == sorted(f"{number}.{step}" for number, step in [*steps, *moments])


def test_a_trial_parks_after_the_evaluation_in_which_its_worker_is_told_to_stop(
    make_study: MakeStudy, tmp_path: Path
) -> None:
    study, seen, stopping = make_study(trials=1, recovery={"checkpoint_every": "1h"}), [], StopSignal()

    def hook(_: int, step: int) -> None:
        seen.append(step)
        if step == 4:
            stopping.request()

    work(study, objective(tmp_path, hook=hook), stopping)
    (row,) = rows(study)
    assert (row.settled, row.lease_until, row.checkpoint_epoch) == (False, None, 1)
    assert work(study, objective(tmp_path, hook=hook)) == 0
    assert seen == [4, 8, 12, 16, 20]
    assert sorted(trials(study)[0].intermediate_values) == list(range(EPOCHS))
    assert failures(study) == []
    assert [file.name for file in study.trial_folder(0).iterdir() if not file.name.startswith("attempt-")] == []
    assert [*tmp_path.glob("[0-9]*/*")] == []  # the checkpoints in between are not left to the user


def test_the_pruner_ends_a_trial_and_the_best_weights_are_kept(
    make_study: MakeStudy, tmp_path: Path, training: ModuleType
) -> None:
    pruner = {"name": "threshold", "upper": 0.5, "n_warmup_steps": 2}
    study = make_study(trials=2, recovery={"keep_checkpoints": 1}, pruner=pruner)
    work(study, objective(tmp_path, monitor="number"))
    assert [(trial.state, len(trial.intermediate_values)) for trial in trials(study)] == [
        (TrialState.COMPLETE, EPOCHS),
        (TrialState.PRUNED, 3),
    ]
    (found,) = best(study)
    assert found.checkpoint is not None
    state, weights = torch.load(found.checkpoint, weights_only=True), hpo.load_weights(found.checkpoint)["transformers"]
    assert (state["epoch"], state["best"]["step"]) == (EPOCHS, 0)  # of equal values the first is the best
    assert state["objects"]["transformers"].keys() == weights.keys()
    training.tiny().load_state_dict(weights)


def test_the_same_objective_runs_under_plain_optuna(tmp_path: Path) -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(objective(tmp_path, eval_strategy="steps", eval_steps=8), n_trials=1)
    assert sorted(study.trials[0].intermediate_values) == [8, 16, 20]


# --- wrong use --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"monitor": "accuracy"},
            "HpoCallback(monitor='eval_accuracy'): the evaluations have no such metric; they have epoch,",
        ),
        ({"with_checkpoint": False}, "trainer.train was not given resume_from_checkpoint=callback.checkpoint"),
        ({"eval_strategy": "no"}, 'HpoCallback reports evaluations, but eval_strategy is "no"'),
        (
            {"save_strategy": "best", "metric_for_best_model": "loss"},
            'HpoCallback cannot save with save_strategy="best"',
        ),
        ({"save_only_model": True}, "a checkpoint with save_only_model=True cannot be resumed"),
    ],
    ids=["no metric", "no checkpoint", "no evaluation", "save best", "model only"],
)
def test_wrong_use_fails_the_trial(make_study: MakeStudy, tmp_path: Path, options: dict[str, Any], said: str) -> None:
    study = make_study(trials=1)
    work(study, objective(tmp_path, **options))
    assert said in failures(study)[0].message


def test_a_folder_of_another_trial_is_refused(make_study: MakeStudy, tmp_path: Path) -> None:
    from hpo.integrations.transformers import OWNER

    study = make_study(trials=2)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / OWNER).touch()  # as a kill amid its write leaves it
    work(study, objective(tmp_path / "out", own_folder=False, save_strategy="epoch"))
    assert [trial.state for trial in trials(study)] == [TrialState.COMPLETE, TrialState.FAIL]
    assert f"output_dir='{tmp_path}/out' belongs to trial 0; give each trial its own" in failures(study)[0].message
