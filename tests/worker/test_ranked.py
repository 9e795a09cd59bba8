"""Trials on several processes in a worker: one answer for all ranks, and rank 0's value."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from optuna.trial import TrialState

from hpo.errors import SpecError
from hpo.launch.logs import Tail
from hpo.spec.study_file import StudySpec
from hpo.study.study import Study
from tests.integration.processes import failures
from tests.support.trials import MakeStudy
from tests.worker.test_command import only, work

RANKED = """
import json, os, pathlib
import optuna
def train(config, trial):
    rank = int(os.environ["RANK"])
    print("hello", rank, flush=True)
    said = {"config": config, "number": trial.number, "pruned_at": None}
    try:
        for epoch in range(9):
            trial.report(100.0 * rank + epoch, epoch)
            if trial.should_prune():
                said["pruned_at"] = epoch
                raise optuna.TrialPruned("enough")
        trial.set_user_attr("of", rank)
        return 10.0 + rank
    finally:
        pathlib.Path(__file__).with_name(f"{trial.number}-{rank}.json").write_text(json.dumps(said))
"""
SPACE = {"lr": {"low": 0.1, "high": 1.0}, "epochs": 9}


def ranked(make_study: MakeStudy, text: str, **document: object) -> Study:
    settings = {"objective": None, "train": "ranked.py:train", "space": SPACE, "processes_per_trial": 2, **document}
    study = make_study(trials=1, **settings)
    (study.code_folder / "ranked.py").write_text(text)
    return study


def told(study: Study, rank: int) -> dict[str, object]:
    found: dict[str, object] = json.loads((study.code_folder / f"0-{rank}.json").read_text())
    return found


def test_all_ranks_get_the_same_values_and_rank_0_gives_the_trial_s(make_study: MakeStudy) -> None:
    study = ranked(make_study, RANKED, pruner={"name": "none"})
    assert work(study) == 0
    trial = only(study)
    assert (trial.state, trial.value, trial.user_attrs["of"]) == (TrialState.COMPLETE, 10.0, 0)
    assert trial.intermediate_values == {epoch: float(epoch) for epoch in range(9)}
    assert told(study, 0) == told(study, 1)
    assert told(study, 0)["config"] == {"lr": trial.params["lr"], "epochs": 9}
    lines = Tail(study.logs, trial=0).lines()
    assert sorted(line for line in lines if "hello" in line) == ["[rank 1] hello 1", "hello 0"]


def test_ranks_are_pruned_at_the_same_epoch(make_study: MakeStudy) -> None:
    """By rank 0's report. The values of rank 1 alone would go on."""
    study = ranked(make_study, RANKED, direction="minimize", pruner={"name": "threshold", "upper": 3.5})
    assert work(study) == 0
    trial = only(study)
    assert (trial.state, trial.value, max(trial.intermediate_values)) == (TrialState.PRUNED, 4.0, 4)
    assert [told(study, rank)["pruned_at"] for rank in (0, 1)] == [4, 4]


def test_an_objective_asks_for_its_parameters_in_every_rank(make_study: MakeStudy) -> None:
    text = """
import os, pathlib
def objective(trial):
    found = [trial.suggest_float("x", 0, 1), trial.suggest_int("n", 1, 9), trial.suggest_categorical("c", ["a", None])]
    assert trial.params == dict(zip("xnc", found))
    pathlib.Path(__file__).with_name(f"asked-{os.environ['RANK']}").write_text(repr(found))
    return found[0]
"""
    study = ranked(make_study, text, train=None, space={}, objective="ranked.py:objective")
    work(study)
    trial = only(study)
    assert trial.state is TrialState.COMPLETE
    expected = repr([trial.params[name] for name in "xnc"])
    assert [(study.code_folder / f"asked-{rank}").read_text() for rank in (0, 1)] == [expected] * 2


def test_ranks_that_are_out_of_step_are_told(make_study: MakeStudy) -> None:
    text = "import os\ndef train(config, trial):\n    trial.report(1.0, 3 + int(os.environ['RANK']))\n    return 1.0\n"
    study = ranked(make_study, text)
    work(study)
    (failure,) = failures(study)
    assert failure.kind == "exception"
    assert failure.message.startswith("rank 1 is at step 4 where rank 0 was at step 3; let all ranks call trial.report")


def test_the_rank_that_fails_is_named_with_its_last_line(make_study: MakeStudy) -> None:
    text = "import os\ndef train(config, trial):\n    assert os.environ['RANK'] == '0', 'no luck'\n    trial.report(1.0, 1)\n"
    study = ranked(make_study, text + "    import time; time.sleep(600)\n")
    work(study)
    (failure,) = failures(study)
    assert failure.message == "rank 1 ended with exit code 1; its last line: AssertionError: no luck"


def test_a_command_runs_once_for_each_rank_and_rank_0_is_read(make_study: MakeStudy, tmp_path: Path) -> None:
    script = "import os; print('loss', 5.0 + int(os.environ['RANK']), os.environ['WORLD_SIZE'])"
    study = make_study(
        trials=1,
        objective=None,
        command=[sys.executable, "-c", script, "{lr}"],
        metric=r"loss (?P<value>\S+) 3",
        space={"lr": SPACE["lr"]},
        processes_per_trial=3,
    )
    assert work(study) == 0
    assert (only(study).state, only(study).intermediate_values) == (TrialState.COMPLETE, {1: 5.0})
    lines = [line for line in Tail(study.logs, trial=0).lines() if "loss" in line]
    assert sorted(lines) == ["[rank 1] loss 6.0 3", "[rank 2] loss 7.0 3", "loss 5.0 3"]


def test_which_studies_have_ranks() -> None:
    base = {"name": "x", "objective": "x.py:f", "direction": "minimize"}
    given: list[dict[str, int]] = [{}, {"processes_per_trial": 1}, {"processes_per_trial": 2}]
    alone, one, two = (StudySpec.from_document({**base, **more}) for more in given)
    assert (alone.fingerprint, alone.processes, alone.has_program) == (one.fingerprint, 1, False)
    assert (two.fingerprint != one.fingerprint, two.processes, two.has_program) == (True, 2, True)
    parts = {"data": {"name": "digits"}, "model": {"name": "mlp"}, "optimizer": {"name": "sgd"}}
    with pytest.raises(SpecError, match="processes_per_trial = 2: a declared training fills a GPU with several trials"):
        StudySpec.from_document({"name": "x", "processes_per_trial": 2, **parts})
    with pytest.raises(SpecError, match=r"recovery\.rank_timeout: '0s' is not a duration"):
        StudySpec.from_document({**base, "recovery": {"rank_timeout": "0s"}})
