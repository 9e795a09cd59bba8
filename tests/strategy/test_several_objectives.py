"""Studies of several objectives and of bounded ones, from their trials' training to the front and back."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
from optuna.trial import FrozenTrial, TrialState

from hpo.errors import MismatchError, StudyError
from hpo.final import train as final
from hpo.final import user_objective
from hpo.queue.models import Claim
from hpo.queue.reaper import fail_leases_of
from hpo.spec.study_file import StudySpec
from hpo.storage.connect import Storage, connect, plain_url
from hpo.storage.tables import hpo_trials, trial_values
from hpo.study import control, export, resolve, results, retention
from hpo.study import study as studies
from hpo.study.fork import fork_study
from hpo.study.resolve import StudyFile
from hpo.study.status import read, summarize
from hpo.study.study import Study
from hpo.study.trial_history import finished, history
from hpo.train.build import costs
from hpo.view import dashboard, pages
from hpo.worker import loop as worker_loop
from hpo.worker.signals import StopSignal
from tests.support.declared import DOCUMENT, Asked, work
from tests.support.trials import MakeStudy, claim_one
from tests.view.test_dashboard import caller

TWO = {"accuracy": "maximize", "params": "minimize"}
WIDTHS = [[4], [8], [16]]
PARAMS = {f"[{width}]": 64 * width + 2 * width + 10 * width + 10 for width in (4, 8, 16)}  # no bias before a norm
SPEC: dict[str, Any] = {
    **DOCUMENT,
    "model": {"name": "mlp", "widths": {"choices": WIDTHS}},
    "optimizer": {"name": "sgd", "lr": {"low": 1e-3, "high": 1e-1, "log": True}},
    "schedule": {"name": "constant"},
    "objectives": TWO,
    "pruner": {"name": "median", "n_startup_trials": 1, "n_min_trials": 1},
}


def made(place: Storage, folder: Path, trials: int, **changes: Any) -> Study:
    spec = StudySpec.from_document({**SPEC, "budget": {"trials": trials}, **changes})
    resolved = resolve.resolve(spec, folder).model_copy(update={"checkpoints": str(folder / "checkpoints")})
    return studies.create_or_join(place, resolved, code_folder=folder, code_digest="")


@pytest.fixture
def make(lite: Storage, tmp_path: Path) -> MakeStudy:
    return lambda trials, **changes: made(lite, tmp_path, trials, **changes)


@contextmanager
def as_optuna(study: Study) -> Iterator[optuna.Study]:
    """Open the study in Optuna's own storage."""
    opened = optuna.storages.RDBStorage(plain_url(study.storage.url))
    try:
        yield optuna.load_study(study_name=study.name, storage=opened)
    finally:
        opened.engine.dispose()


def ended(study: Study) -> list[FrozenTrial]:
    """Return the trials as Optuna's own storage reads them."""
    with as_optuna(study) as plain:
        return plain.get_trials(deepcopy=False)


def check_ends(study: Study) -> None:
    """Check what is written of every trial against its curve and its model."""
    limits: Mapping[str, str] = study.spec.constraints
    for trial in ended(study):
        curve = results.best(study, number=trial.number)[0].curves["validation_accuracy"]
        first, params = max(curve), PARAMS[trial.params["model.widths"]]
        assert trial.state in (TrialState.COMPLETE, TrialState.PRUNED)
        assert trial.values == [first, params]
        assert trial.user_attrs["hpo:cost:params"] == params
        wanted = {"params": params / 800 - 1, "accuracy": (0.25 - first) / 0.25}
        assert trial.constraints == pytest.approx({name: wanted[name] for name in limits})


BOUNDS = {"params": "<= 800", "accuracy": ">= 0.25"}


@pytest.mark.parametrize(
    ("storage_kind", "executor"),
    [
        ("sqlite", "loop"),
        ("postgres", "stack"),
        pytest.param("sqlite", "stack", marks=pytest.mark.soak),
        pytest.param("postgres", "loop", marks=pytest.mark.soak),
    ],
    indirect=["storage_kind"],
)
def test_every_trial_ends_with_all_its_values(place: Storage, tmp_path: Path, executor: str) -> None:
    study = made(place, tmp_path, 12, executor=executor, slots=3, constraints=BOUNDS)
    assert work(study) == 0
    check_ends(study)
    trials = ended(study)
    assert {trial.state for trial in trials} == {TrialState.COMPLETE, TrialState.PRUNED}
    front = results.best(study, k=None)
    with as_optuna(study) as plain:
        best, names = plain.best_trials, plain.metric_names
    assert sorted(result.number for result in front) == sorted(trial.number for trial in best)
    assert all(trial.values[1] <= 800 for trial in best)
    assert names == ["accuracy", "params"]
    summary = summarize(study)
    assert [(one.number, one.values) for one in summary.front] == [(result.number, result.values) for result in front]
    assert summary.infeasible == sum(
        trial.state == TrialState.COMPLETE and max(trial.constraints.values()) > 0 for trial in trials
    )


def test_a_trial_is_pruned_by_those_only_that_are_no_larger(make: MakeStudy) -> None:
    study = make(14, training={"epochs": 4, "batch_size": 64})
    assert work(study) == 0
    pruned = [trial for trial in ended(study) if trial.state == TrialState.PRUNED]
    assert pruned
    for trial in pruned:
        step = max(trial.intermediate_values)
        rivals = [
            other.intermediate_values[step]
            for other in ended(study)
            if other.state == TrialState.COMPLETE and other.number < trial.number and other.values[1] <= trial.values[1]
        ]
        assert sum(value >= trial.intermediate_values[step] for value in rivals) >= len(rivals) / 2 > 0


SAMPLERS: dict[str, dict[str, Any]] = {
    "tpe": {"name": "tpe", "n_startup_trials": 3},
    "tpe one by one": {"name": "tpe", "n_startup_trials": 3, "multivariate": False},
    "nsga2": {"name": "nsga2", "population_size": 3},
    "nsga3": {"name": "nsga3", "population_size": 3},
    "gp": {"name": "gp", "n_startup_trials": 3},
    "random": {"name": "random"},
    "qmc": {"name": "qmc"},
}
OF_TWO, OF_ONE = ("tpe", "tpe one by one", "nsga2", "nsga3", "gp"), ("tpe", "gp")  # in every run: they read constraints


@pytest.mark.parametrize(
    ("objectives", "sampler"),
    [
        pytest.param(
            objectives, SAMPLERS[name], id=f"{of}-{name}", marks=() if name in in_every_run else pytest.mark.soak
        )
        for of, objectives, in_every_run in (("two", TWO, OF_TWO), ("one", {}, OF_ONE))
        for name in SAMPLERS
    ],
)
def test_a_sampler_that_can_goes_on_beside_pruned_trials_and_bounds(
    make: MakeStudy, sampler: dict[str, Any], objectives: dict[str, str]
) -> None:
    study = make(
        9, sampler=sampler, objectives=objectives, constraints=BOUNDS, training={"epochs": 2, "batch_size": 256}
    )
    work(study)
    states = [trial.state for trial in ended(study)]
    assert len(states) == 9
    assert set(states) <= {TrialState.COMPLETE, TrialState.PRUNED}
    assert all(len(trial.values) == max(1, len(objectives)) for trial in ended(study))


def test_tpe_learns_from_pruned_trials_by_the_first_objective(make: MakeStudy) -> None:
    """A TPE of several objectives learns from pruned trials by the first."""
    study = make(2, sampler={"name": "tpe", "n_startup_trials": 1}, pruner={"name": "none"})
    for state, value in ((TrialState.PRUNED, 0.1), (TrialState.PRUNED, 0.7), (TrialState.PRUNED, 0.4)):
        template = optuna.trial.create_trial(state=state, values=[value, 3.0], intermediate_values={1: value})
        study.optuna.add_trial(template)
    from optuna.samplers._tpe.sampler import _split_trials

    from hpo.strategy.tpe import FirstJudged

    below, _ = _split_trials(FirstJudged(study.optuna), study.optuna.get_trials(deepcopy=False), 1)
    assert [trial.values[0] for trial in below] == [0.7]


def test_one_objective_with_bounds_has_the_best_that_keeps_them(make: MakeStudy) -> None:
    study = make(12, objectives={}, constraints={"params": "<= 500"}, pruner={"name": "none"})
    work(study)
    feasible = [trial for trial in ended(study) if trial.user_attrs["hpo:cost:params"] <= 500]
    wanted = min(feasible, key=lambda trial: (-trial.value, trial.number))
    assert results.best(study)[0].number == wanted.number
    assert study.optuna.best_trial.number == wanted.number
    summary = summarize(study)
    assert summary.best is not None
    assert (summary.best.number, summary.front, summary.infeasible) == (wanted.number, [], 12 - len(feasible))
    assert retention.leaders(study) == [wanted.number]
    assert f"bounds   {12 - len(feasible)} complete trials violate a constraint" in pages.status_text(summary)


def test_where_every_trial_violates_a_bound_there_is_no_result(make: MakeStudy, tmp_path: Path) -> None:
    study = make(2, constraints={"params": "<= 5"})
    work(study)
    with pytest.raises(StudyError, match="has no result: each of its 2 complete trials violates a constraint"):
        export.export(study, tmp_path / "best.toml", top=1)
    assert "no result yet: 2 complete trials violate a constraint" in pages.status_text(summarize(study))
    assert export.export(study, tmp_path / "best.toml", number=1)


# --- what befalls trials ----------------------------------------------------------------------------------------------


def test_a_trial_that_goes_on_keeps_its_costs_and_comes_to_the_same(
    make: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(1, 99))
    monkeypatch.setitem(costs.MEASURES, "latency_ms", lambda *_: float(next(clock)))
    monkeypatch.setattr("hpo.train.build.measurement_cache.recall", lambda _: None)
    monkeypatch.setattr("hpo.worker.stacked_runner.LOOK_SECONDS", 0.0)
    changes = {
        "objectives": {**TWO, "latency_ms": "minimize"},
        "pruner": {"name": "none"},
        "executor": "stack",
        "slots": 2,
    }
    whole = make(4, name="whole", **changes)
    work(whole)
    broken = make(4, name="broken", **changes)
    assert work(broken, Asked(20)) == 0
    assert any(trial.state == TrialState.RUNNING for trial in ended(broken))
    before = {trial.number: trial.user_attrs for trial in ended(broken)}
    assert work(broken, name="other") == 0
    for one, other in zip(ended(whole), ended(broken), strict=True):
        assert one.values[:2] == other.values[:2]
        assert other.values[2] == other.user_attrs["hpo:cost:latency_ms"]
        assert before.get(one.number, other.user_attrs) == other.user_attrs  # measured once


def test_trials_that_others_end_have_all_their_values_too(make: MakeStudy) -> None:
    study = make(
        3, constraints=BOUNDS, failures={"lost_worker": {"retries": 0, "then": "prune"}}, training={"epochs": 40}
    )
    assert work(study, Asked(100)) == 0
    (parked,) = [trial.number for trial in ended(study) if trial.state == TrialState.RUNNING]
    control.stop_trial(study, parked)
    ledger = study.ledger("doomed")
    assert isinstance(claim_one(ledger), Claim)
    assert fail_leases_of(ledger, "doomed", "killed") == 1  # before it told what it costs
    stopped, lost = ended(study)
    assert (stopped.state, lost.state) == (TrialState.PRUNED, TrialState.PRUNED)
    first = stopped.intermediate_values[max(stopped.intermediate_values)]
    params = PARAMS[stopped.params["model.widths"]]
    assert stopped.values == [first, params]
    assert stopped.constraints == pytest.approx({"params": params / 800 - 1, "accuracy": (0.25 - first) / 0.25})
    assert (lost.values, lost.constraints) == (None, {})


def test_a_trial_that_diverges_ends_with_its_costs(make: MakeStudy) -> None:
    study = make(
        1, optimizer={"name": "sgd", "lr": {"low": 1e30, "high": 1e31}}, training={"epochs": 3, "batch_size": 64}
    )
    work(study)
    (trial,) = ended(study)
    assert trial.state == TrialState.PRUNED
    with study.storage.engine.connect() as connection:
        rows = (
            connection.execute(sa.select(trial_values.c.objective).order_by(trial_values.c.objective)).scalars().all()
        )
        outcome = connection.execute(sa.select(hpo_trials.c.outcome)).scalar_one()
    assert outcome == "diverged"
    assert rows in ([], [0, 1])  # all or none


# --- the front, shown and taken ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = tmp_path_factory.mktemp("several")
    place = connect(f"sqlite:///{folder}/studies.db", create=True)
    study = made(place, folder, 12, constraints={"memory_mb": "<= 1"})
    work(study)
    return study


def test_the_front_is_exported_and_replays(searched: Study, tmp_path: Path) -> None:
    front = results.best(searched, k=None)
    assert len(front) > 1
    with pytest.raises(StudyError) as caught:
        export.export(searched, tmp_path / "best.toml")
    said = str(caught.value).splitlines()
    assert said[0].startswith("study 'digits' has several objectives and no single best trial")
    assert [line.split()[1].rstrip(":") for line in said[1:]] == [str(result.number) for result in front]
    files = [*export.export(searched, tmp_path / "best.toml", whole_front=True)]
    assert [file.name for file in files] == [f"best.{rank}.toml" for rank in range(1, len(front) + 1)]
    document = tomllib.loads(files[-1].read_text())
    assert not {"objectives", "constraints"} & document.keys()
    assert document["model"]["widths"] == front[-1].params["model.widths"]
    assert document["receipt"]["values"] == front[-1].values
    assert document["receipt"]["constraints"] == front[-1].constraints
    assert final.replay(final.prepare(files[-1]), lambda _: None) == []
    assert [file.name for file in export.export(searched, tmp_path / "top.toml", top=2)] == ["top.1.toml", "top.2.toml"]
    (one,) = export.export(searched, tmp_path / "one.toml", number=front[1].number)
    assert StudySpec.load(one).receipt["trial"] == front[1].number
    assert sorted(retention.leaders(searched)) == sorted(result.number for result in front)
    kept = {folder.name for folder in searched.checkpoints.iterdir() if folder.is_dir()}
    assert kept == {searched.trial_folder(result.number).name for result in front}


def test_the_front_is_shown(searched: Study) -> None:
    reading = read(searched)
    summary, front = reading.summary, results.best(searched, k=None)
    assert read(searched, reading.past).summary.front == summary.front  # carried on, and not read again
    assert summary.best is not None
    assert summary.best.number == front[0].number
    text = pages.status_text(summary)
    assert text.splitlines()[0] == "digits  (maximize accuracy, minimize params, sampler random, pruner median)"
    assert [line.split()[-1] for line in text.splitlines() if line.startswith("front ")] == [
        str(r.number) for r in front
    ]
    table = pages.front_text(front, 120).splitlines()
    assert table[0].split() == ["front", "trial", "accuracy", "params", "model.widths", "optimizer.lr"]
    assert [line.split()[0] for line in table[1:]] == [str(result.number) for result in front]
    turned = pages.front_text(front, 30).splitlines()
    assert max(map(len, turned)) <= 40
    rows: dict[str, list[str]] = {}
    for name, *cells in (line.removeprefix("front").split() for line in turned):
        rows.setdefault(name, []).extend(cells)
    assert list(map(list, zip(*[[name, *cells] for name, cells in rows.items()], strict=True))) == [
        line.removeprefix("front").split() for line in table
    ]
    shown = pages.to_json(summary)
    assert shown["objectives"] == TWO
    assert shown["front"] == [{"number": result.number, "values": result.values} for result in front]
    lines = [pages.finished_line(trial, summary) for trial in finished(searched, list(_ids(searched)), total=12)]
    assert all(" params=" in line and f"(front of {len(front)})" in line for line in lines)
    told = pages.history_text(history(searched, front[0].number))
    assert f"accuracy={front[0].values['accuracy']:.4f}" in told
    assert "\nbound    memory_mb: kept" in told
    assert f"front of {len(front)}" in pages.status_table([summary])


def test_the_dashboard_shows_the_front(searched: Study) -> None:
    status, body = caller(dashboard.app(searched.storage, write=False))("GET", f"/api/studies/{searched.study_id}")
    assert status == 200
    told = json.loads(body)
    front = [result.number for result in results.best(searched, k=None)]
    assert sorted(trial["number"] for trial in told["best_trials"]) == sorted(front)
    assert told["objective_names"] == ["accuracy", "params"]
    assert told["directions"] == ["maximize", "minimize"]


def _ids(study: Study) -> list[int]:
    return [trial._trial_id for trial in ended(study)]


def test_a_fork_holds_its_trials_against_its_own_bounds(searched: Study) -> None:
    def forked(name: str, **changes: Any) -> Study:
        spec = StudySpec.from_document({**SPEC, "constraints": {"memory_mb": "<= 1"}, **changes, "name": name})
        wanted = resolve.resolve(spec, searched.code_folder)
        file = StudyFile(
            path=Path("x.toml"), loaded=wanted, spec=wanted, code_folder=searched.code_folder, code_digest=""
        )
        forked = fork_study(searched, file)
        told.append((forked.taken, sum(forked.left.values())))
        return studies.join(searched.storage, name)

    told: list[tuple[int, int]] = []
    tighter = forked("tighter", constraints={"params": "<= 500"})
    assert told == [(12, 0)]
    for old, new in zip(ended(searched), ended(tighter), strict=True):
        assert new.values == old.values
        assert new.constraints == {"params": old.values[1] / 500 - 1}
    assert {one.values["params"] for one in summarize(tighter).front} == {PARAMS["[4]"]}
    forked("unmeasured", constraints={"latency_ms": "<= 1"})
    assert told[-1] == (0, 12)
    with pytest.raises(MismatchError, match="objectives: study 'digits' has"):
        forked("other", objectives={**TWO, "memory_mb": "minimize"})


# --- objectives of the user's own -------------------------------------------------------------------------------------

MINE = """
import optuna

def pair(trial):
    x = trial.suggest_float("x", 0, 1)
    return x, 1 - x

def triple(trial):
    return 1.0, 2.0, 3.0

def bounded(trial):
    x = trial.suggest_float("x", 0, 1)
    trial.set_constraint("x", 0.5 - x)
    return x

def curved(trial):
    trial.set_user_attr("hpo:cost:size", 1.0)
    trial.report(0.5 if trial.number else 0.9, 1)
    if trial.should_prune():
        raise optuna.TrialPruned()
    return 0.9, 1.0
"""


def own(place: Storage, folder: Path, function: str, trials: int, **changes: Any) -> Study:
    (folder / "mine.py").write_text(MINE)
    base = {
        "name": function,
        "objective": f"mine.py:{function}",
        "sampler": {"name": "random"},
        "pruner": {"name": "none"},
    }
    spec = StudySpec.from_document({**base, "budget": {"trials": trials}, **changes})
    resolved = resolve.resolve(spec, folder).model_copy(update={"checkpoints": str(folder / "checkpoints")})
    study = studies.create_or_join(place, resolved, code_folder=folder, code_digest="")
    worker_loop.work(study, worker_loop.build_objective(study, folder), study.ledger("w"), StopSignal())
    return study


PAIR = {"objectives": {"a": "maximize", "b": "maximize"}}


@pytest.mark.both
def test_an_own_objective_returns_several_values(place: Storage, tmp_path: Path) -> None:
    study = own(place, tmp_path, "pair", 5, **PAIR, constraints={"a": ">= 0.5"})
    for trial in ended(study):
        x = trial.params["x"]
        assert trial.values == [x, 1 - x]
        assert trial.constraints == {"a": (0.5 - x) / 0.5}
    front = results.best(study, k=None)
    assert sorted(result.number for result in front) == [t.number for t in ended(study) if t.params["x"] >= 0.5]
    (file,) = export.export(study, tmp_path / "one.toml", number=front[0].number)
    spec = final.load_pinned(file)
    again = user_objective.run(spec, file, tmp_path)
    assert again.value == front[0].values
    assert user_objective.difference(spec, file, again) is None


def test_an_own_objective_that_returns_another_number_of_values_fails(lite: Storage, tmp_path: Path) -> None:
    study = own(lite, tmp_path, "triple", 1, **PAIR)
    (trial,) = ended(study)
    assert (trial.state, trial.values) == (TrialState.FAIL, None)
    assert "return 2 numbers: a, b" in history(study, 0).failures[0].message


def test_an_own_objective_s_constraints_count(lite: Storage, tmp_path: Path) -> None:
    study = own(lite, tmp_path, "bounded", 6, direction="minimize")
    feasible = [trial for trial in ended(study) if trial.params["x"] >= 0.5]
    assert 0 < len(feasible) < 6
    wanted = min(feasible, key=lambda trial: trial.values[0]).number
    best = summarize(study).best
    assert best is not None
    assert best.number == results.best(study)[0].number == study.optuna.best_trial.number == wanted


def test_an_own_objective_with_costs_is_pruned(lite: Storage, tmp_path: Path) -> None:
    """An own objective that tells its costs is pruned and ends without values."""
    pruner = {"name": "median", "n_startup_trials": 1, "n_min_trials": 1}
    study = own(lite, tmp_path, "curved", 2, objectives={"accuracy": "maximize", "size": "minimize"}, pruner=pruner)
    assert [(trial.state, trial.values) for trial in ended(study)] == [
        (TrialState.COMPLETE, [0.9, 1.0]),
        (TrialState.PRUNED, None),
    ]
