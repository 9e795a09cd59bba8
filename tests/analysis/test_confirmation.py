"""Confirmations of real studies: which seeds, folds and data their runs have, what a cut-off one does, what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpo.analysis import confirmation, leaders, verdict
from hpo.analysis.confirmation import Confirmation, Request
from hpo.analysis.leaders import Leader
from hpo.errors import MismatchError, SpecError, StudyError
from hpo.own import training
from hpo.queue import workers
from hpo.storage import study_rows, trial_writes
from hpo.storage.connect import Storage, connect
from hpo.storage.tables import FOLD_KEY
from hpo.study import export, resolve, results
from hpo.study import study as studies
from hpo.study.status import summarize
from hpo.study.study import Study
from hpo.view import confirmed
from hpo.worker import loop as worker_loop
from hpo.worker.objective import declared
from hpo.worker.signals import StopSignal
from tests.support.declared import DOCUMENT, made, work
from tests.support.trials import begin

STACKED = {
    **DOCUMENT,
    "executor": "stack",
    "slots": 4,
    "budget": {"trials": 4},
    "training": {"epochs": 1, "batch_size": 128},
    "model": {"name": "mlp", "widths": [8]},
    "optimizer": {"name": "sgd", "lr": {"low": 1e-3, "high": 1e-1, "log": True}},
    "schedule": {"name": "constant"},
}
OWN = {"name": "own", "direction": "maximize", "sampler": {"name": "random"}, "pruner": {"name": "none"}}


def enlisted(source: Study, **wanted: Any) -> Study:
    request: Request = confirmation.ask(source, **{"top": None, "runs": None, "delta": None, **wanted})
    digest = confirmation.check_unchanged(source, source.code_folder)
    return confirmation.enlist(request, source.code_folder, digest)


def read(source: Study) -> Confirmation:
    found = confirmation.read(source)
    assert found is not None
    return found


def receipts(study: Study) -> list[dict[str, Any]]:
    return [results.best(study, number=number)[0].receipt for number in range(len(study.optuna.trials))]


def own_study(place: Storage, folder: Path, code: str, trials: int = 3, **document: Any) -> Study:
    """Make a study of a user's own objective and run it to its end."""
    (folder / "mine.py").write_text(code)
    return worked(
        made(place, folder, {**OWN, "objective": "mine.py:objective", "budget": {"trials": trials}, **document})
    )


def worked(study: Study) -> Study:
    objective = training.load(study.spec, study.code_folder)
    assert worker_loop.work(study, objective, study.ledger("w"), StopSignal()) == 0
    return study


def test_runs_have_common_fresh_seeds_and_the_data_of_the_search(lite: Storage, tmp_path: Path) -> None:
    source = made(lite, tmp_path, STACKED)
    assert work(source) == 0
    sister = enlisted(source, top=3, runs=2, delta=0.02)
    assert (sister.name, sister.budget, summarize(sister).counts["waiting"]) == ("digits/confirm", 6, 6)
    assert confirmation.ask(source, top=3, runs=2, delta=0.02).adds is False
    assert work(sister) == 0
    searched, ran = receipts(source), receipts(sister)
    assert Counter(one["seed"] for one in ran) == dict.fromkeys({one["seed"] for one in ran}, 3)
    assert len({one["seed"] for one in ran}) == 2
    assert not {one["seed"] for one in searched} & {one["seed"] for one in ran}
    assert {(one["data_digest"], one["split_seed"]) for one in ran} == {(searched[0]["data_digest"], 0)}
    assert {one["executor"] for one in ran} == {"stack"}
    found = read(source)
    assert (found.is_complete, found.settled, found.seeded, found.is_exact) == (True, 6, True, False)
    assert [one.left_out for one in found.leaders] == ["", "", ""]
    assert [one.number for one in found.leaders] == [one.number for one in leaders.choose(source, 3)]
    assert found.verdict is not None
    assert found.verdict.leader in [one.number for one in found.leaders]
    for one in found.leaders:  # the very configurations, each twice
        params = results.best(source, number=one.number)[0].params
        ours = [trial for trial in sister.optuna.trials if trial.user_attrs["hpo:run"]["trial"] == one.number]
        assert [results.best(sister, number=trial.number)[0].params for trial in ours] == [params, params]

    again = enlisted(source, runs=3)  # a second look adds the third run of each, with one more seed
    assert (again.uid, again.budget, summarize(again).counts["waiting"]) == (sister.uid, 9, 3)
    assert read(source).verdict == found.verdict  # until its runs have ended
    assert work(again) == 0
    assert len({one["seed"] for one in receipts(again)}) == 3
    later = read(source).verdict
    assert later is not None
    assert (later.look, read(source).looks) == (2, [2, 3])


def test_runs_go_over_the_folds_after_that_of_the_search(lite: Storage, tmp_path: Path) -> None:
    """And the validation part of a fold is that of a study of this fold."""
    folds = {"data": {"name": "digits", "folds": 3, "fold": 1}}
    source = made(lite, tmp_path, {**STACKED, **folds})
    assert work(source) == 0
    sister = enlisted(source, top=2, runs=3)
    assert work(sister) == 0
    by_fold = {
        trial.user_attrs[FOLD_KEY]: one["data_digest"]
        for trial, one in zip(sister.optuna.trials, receipts(sister), strict=True)
    }
    assert [trial.user_attrs[FOLD_KEY] for trial in sister.optuna.trials] == [0, 0, 1, 1, 2, 2]
    runs = {trial.user_attrs["hpo:run"]["run"]: trial.user_attrs[FOLD_KEY] for trial in sister.optuna.trials}
    assert runs == {0: 2, 1: 0, 2: 1}
    assert by_fold[1] == receipts(source)[0]["data_digest"]
    spec = source.spec.model_copy(update={"data": {**source.spec.data, "fold": 2}})
    assert by_fold[2] == resolve.data_digest(spec, tmp_path)
    assert len(set(by_fold.values())) == 3
    assert read(source).folds == 3
    assert read(source).is_complete


def test_a_worker_that_is_stopped_leaves_runs_that_another_ends(lite: Storage, tmp_path: Path) -> None:
    source = made(lite, tmp_path, STACKED)
    assert work(source) == 0
    sister, stopping = enlisted(source, top=2, runs=2), StopSignal()
    objective, calls = declared(sister, tmp_path), [0]
    real = objective.build

    def build(attempt: Any) -> None:
        calls[0] += 1
        if calls[0] == 3:
            stopping.request()
        real(attempt)

    objective.build = build  # type: ignore[method-assign]
    worker_loop.work(sister, objective, sister.ledger("one"), stopping)
    found = read(source)
    assert not found.is_complete
    assert found.verdict is None
    with pytest.raises(
        StudyError, match=r"has no verdict yet: \d of 4 runs have ended; `hpo confirm digits` shows more"
    ):
        confirmation.winner(source)
    assert enlisted(source).uid == sister.uid
    assert work(sister, name="two") == 0
    assert read(source).is_complete


RANDOM = """
import random
def objective(trial):
    return 10 * trial.suggest_int("x", 1, 1000) + random.random()
"""


def test_a_fresh_seed_reaches_the_user_s_own_objective(lite: Storage, tmp_path: Path) -> None:
    source = own_study(lite, tmp_path, RANDOM)
    worked(enlisted(source, runs=3, delta=0.1))
    found = read(source)
    drawn = {one.number: [value % 1 for (value,) in one.runs] for one in found.leaders}
    first, *others = drawn.values()
    assert all(other == pytest.approx(first, abs=1e-9) for other in others)  # run r has one seed for all
    assert len({round(value, 6) for value in first}) == 3
    assert first[0] != pytest.approx(found.leaders[0].seen[0] % 1, abs=1e-6)
    assert found.verdict is not None
    assert (found.verdict.kind, found.verdict.leader) == ("best", results.best(source)[0].number)
    number, receipt = confirmation.winner(source)
    written = export.export(source, tmp_path / "best.toml", number=number, confirmed=receipt)
    assert "[receipt.confirmed]" in next(iter(written)).read_text()
    assert (receipt["verdict"], receipt["runs"], len(receipt["leaders"])) == ("best", 3, 3)


def test_a_fresh_seed_reaches_a_program(lite: Storage, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import os, sys\nprint('value', int(os.environ['HPO_SEED']) + float(sys.argv[1]))\n"
    )
    document = {
        **OWN,
        "command": ["python", "mine.py", "{x}"],
        "space": {"x": {"low": 0.0, "high": 0.5}},
        "metric": "value (?P<value>.*)",
        "budget": {"trials": 2},
    }
    source = worked(made(lite, tmp_path, document))
    worked(enlisted(source, runs=2))
    runs = [[int(value) for (value,) in one.runs] for one in read(source).leaders]
    assert runs[0] == runs[1]
    assert runs[0][0] != runs[0][1]


def test_code_with_a_seed_of_its_own_is_exact(lite: Storage, tmp_path: Path) -> None:
    code = "def objective(trial):\n    return float(trial.suggest_int('x', 1, 1000))\n"
    source = own_study(lite, tmp_path, code)
    worked(enlisted(source, runs=2))
    found = read(source)
    assert (found.is_exact, found.seeded) == (True, False)


FRAGILE = """
import random
from pathlib import Path
def objective(trial):
    x = trial.suggest_int("x", 1, 1000)
    if "hpo:run" in trial.user_attrs and x == int(Path(__file__).with_name("best.txt").read_text()):
        raise ValueError("not this time")
    return x + random.random()
"""


def test_a_leader_whose_runs_fail_is_named_and_left_out(lite: Storage, tmp_path: Path) -> None:
    source = own_study(lite, tmp_path, FRAGILE)
    (tmp_path / "best.txt").write_text(str(results.best(source)[0].params["x"]))
    worked(enlisted(source, runs=2))
    found = read(source)
    assert [one.left_out for one in found.leaders] == ["2 of its 2 runs have no value: failed or diverged", "", ""]
    assert found.verdict is not None
    assert found.verdict.leader == found.leaders[1].number


SEVERAL = """
import random
def objective(trial):
    x = trial.suggest_int("x", 1, 1000)
    return float(x) + random.random() / 100, float(x)
"""


def test_later_trials_that_were_better_than_the_last_leader_are_counted(lite: Storage, tmp_path: Path) -> None:
    code = "def objective(trial):\n    trial.suggest_float('x', 0, 1)\n    return float(trial.number)\n"
    source = own_study(lite, tmp_path, code, trials=3)
    enlisted(source, top=2, runs=2)
    assert (read(source).leaders[-1].seen, read(source).newer) == ((1.0,), 0)
    source = own_study(lite, tmp_path, code, trials=5)  # goes on
    assert read(source).newer == 2
    assert "newer    2 later trials were better in the search than the last leader" in confirmed.page(read(source))


def test_of_a_front_each_point_has_its_means_and_dominance(lite: Storage, tmp_path: Path) -> None:
    """The first value rises with x, and the second is to fall: all points are on the front, and stay there."""
    aims = {"objectives": {"good": "maximize", "dear": "minimize"}}
    document = {key: value for key, value in OWN.items() if key != "direction"} | aims
    (tmp_path / "mine.py").write_text(SEVERAL)
    source = worked(made(lite, tmp_path, {**document, "objective": "mine.py:objective", "budget": {"trials": 3}}))
    worked(enlisted(source, runs=2))
    found = read(source)
    assert len(found.leaders) == 3
    assert [one.dominance for one in found.leaders] == [None, None, None]
    assert [[len(one.runs), len(one.means)] for one in found.leaders] == [[2, 2]] * 3
    assert [one.means[1].deviation for one in found.leaders] == [0.0] * 3
    last = confirmed.page(found).splitlines()[-5:-2]  # of the second objective, which is exact
    assert [line.split()[3:] for line in last] == [["all", "equal", "0", "2"]] * 3
    with pytest.raises(StudyError, match="several objectives"):
        confirmation.winner(source)


def test_ties_are_broken_by_the_validation_loss() -> None:
    given = {1: (0.9, 0.4), 2: (0.9, 0.3), 3: (0.8, 0.1), 4: (0.9, math.nan), 5: (0.9, None), 6: (0.95, 9.0)}
    some = [
        Leader(number=n, params={}, values=(value,), attributes={}, loss=loss) for n, (value, loss) in given.items()
    ]
    assert [one.number for one in leaders.in_order(some, "maximize")] == [6, 2, 1, 4, 5, 3]
    assert [one.number for one in leaders.in_order(some, "minimize")] == [3, 2, 1, 4, 5, 6]


def test_ties_are_told_with_the_command_that_decides_and_then_with_the_verdict(lite: Storage, tmp_path: Path) -> None:
    code = "def objective(trial):\n    return float(min(trial.suggest_int('x', 1, 1000), 1))\n"
    source = own_study(lite, tmp_path, code)
    assert confirmed.choice_lines(source, None) == [
        "close    3 trials tie at the best value",
        "         which is best: hpo confirm own",
    ]
    worked(enlisted(source, runs=2))
    first = min(one.number for one in read(source).leaders)
    assert confirmed.choice_lines(source, None) == [
        f"confirmed trial {first} is within 0.005 of the best: hpo export own --confirmed"
    ]


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def searched(lite: Storage, tmp_path: Path) -> Study:
    return own_study(lite, tmp_path, RANDOM)


@pytest.mark.parametrize(
    ("wanted", "error", "said"),
    [
        ({"delta": 0.0}, SpecError, "--delta 0: must be above 0"),
        ({"delta": float("nan")}, SpecError, "--delta nan: must be above 0"),
        ({"runs": 1}, SpecError, "--seeds 1: must be at least 2"),
        ({"top": 1}, SpecError, "--top 1: must be at least 2"),
        ({"top": 9}, StudyError, "has 3 trials with different parameters complete, and --top 9 asks for more"),
    ],
)
def test_wrong_numbers_are_refused(searched: Study, wanted: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        enlisted(searched, **wanted)
    assert studies.all_names(searched.storage) == ["own"]


def test_a_study_without_a_complete_trial_is_refused(lite: Storage, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(RANDOM)
    source = made(lite, tmp_path, {**OWN, "objective": "mine.py:objective"})
    with pytest.raises(StudyError, match="has no complete trial that violates nothing, so there is nothing to confirm"):
        enlisted(source)


def test_a_search_that_still_runs_is_refused(searched: Study) -> None:
    more = studies.create_or_join(
        searched.storage,
        searched.spec,
        code_folder=searched.code_folder,
        code_digest="",
        trials_budget=9,
        allow_code_change=True,
    )
    ledger, _, _ = begin(more)
    workers.register(ledger)
    with pytest.raises(
        StudyError, match=r"the search is still running, and its leaders may change: .* 1 of its workers are alive"
    ):
        enlisted(searched)
    assert studies.all_names(searched.storage) == ["own"]


def test_changed_code_is_refused(lite: Storage, tmp_path: Path, searched: Study) -> None:
    (tmp_path / "mine.py").write_text(RANDOM.replace("10 *", "11 *"))
    with pytest.raises(MismatchError, match=r"code: the search was made with [0-9a-f]{12}, in .* it is [0-9a-f]{12}"):
        enlisted(searched)
    assert studies.all_names(lite) == ["own"]


def test_changed_data_is_refused(lite: Storage, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)

    def write(seed: int) -> None:
        images = rng.integers(0, 255, (60, 8, 8), dtype=np.uint8)
        np.savez(tmp_path / "data.npz", images=images, labels=np.arange(60) % 2)

    write(0)
    source = made(lite, tmp_path, {**STACKED, "data": {"name": "npz", "path": "data.npz"}})
    assert work(source) == 0
    write(1)
    with pytest.raises(
        MismatchError, match=r"data: the search was made on [0-9a-f]{12}, here the data is [0-9a-f]{12}"
    ):
        enlisted(source)
    assert studies.all_names(lite) == ["digits"]


def test_a_study_of_the_sister_s_name_that_is_no_confirmation_is_left_alone(lite: Storage, searched: Study) -> None:
    spec = searched.spec.model_copy(update={"name": "own/confirm"})
    studies.create_or_join(lite, spec, code_folder=searched.code_folder, code_digest="")
    with pytest.raises(StudyError, match="study 'own/confirm' is not a confirmation; delete it"):
        enlisted(searched)


def test_the_leaders_of_a_confirmation_stay(searched: Study) -> None:
    worked(enlisted(searched, top=2, runs=2))
    with pytest.raises(StudyError, match="is confirmed with 2 leaders, --top asks for 3; leave --top out, or delete"):
        enlisted(searched, top=3)
    sister = confirmation.find(searched)
    assert sister is not None
    with pytest.raises(StudyError, match="is a confirmation itself"):
        enlisted(sister)


# --- cut off, and at the same time ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("module", "name"), [(trial_writes, "insert_queued"), (study_rows, "set_user_attributes")])
def test_a_confirmation_that_was_cut_off_while_it_was_made_is_made_whole(
    searched: Study, monkeypatch: pytest.MonkeyPatch, module: Any, name: str
) -> None:
    """The first one ends it before our row of the sister is written, the second one with a row that is held."""

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module, name, killed)
        with pytest.raises(KeyboardInterrupt):
            enlisted(searched)
    assert confirmation.find(searched) is None
    assert confirmation.read(searched) is None
    sister = enlisted(searched, runs=2)
    assert (sister.stop_reason, summarize(sister).counts["waiting"]) == (None, 6)


@pytest.mark.both
def test_two_calls_at_once_queue_the_runs_once(
    make_study: Callable[..., Study], place: Storage, tmp_path: Path
) -> None:
    source = own_study(place, tmp_path, RANDOM)
    other = connect(place.url.render_as_string(hide_password=False))
    theirs = studies.join(other, "own")
    requests = [confirmation.ask(one, top=2, runs=3, delta=None) for one in (source, theirs)]
    digest = confirmation.check_unchanged(source, source.code_folder)
    sisters = [confirmation.enlist(request, source.code_folder, digest) for request in requests]
    assert [summarize(one).counts["waiting"] for one in sisters] == [6, 6]
    other.close()


def test_the_study_attributes_that_an_objective_reads_are_handed_on(lite: Storage, tmp_path: Path) -> None:
    code = "def objective(trial):\n    return trial.suggest_int('x', 1, 99) + trial.study.user_attrs.get('more', 0)\n"
    source = own_study(lite, tmp_path, code)
    source.optuna.set_user_attr("more", 1000)
    worked(enlisted(source, runs=2))
    assert [one.means[0].value - one.seen[0] for one in read(source).leaders] == [1000.0] * 3


def test_an_undecided_confirmation_names_the_runs_and_the_difference_that_would_decide(searched: Study) -> None:
    worked(enlisted(searched, runs=2))
    near = {1: [0.5, 0.7, 0.6], 2: [0.6, 0.55, 0.61]}
    undecided = dataclasses.replace(
        read(searched), verdict=verdict.judge(near, delta=0.01, direction="maximize"), looks=[3]
    )
    page = confirmed.page(undecided)
    assert undecided.verdict is not None
    found = re.search(r"would decide; another leader may be better than trial 1 by (\S+)", page)
    assert found is not None
    wider = re.search(r"or accept a larger difference: hpo confirm own --delta (\S+)", page)
    assert wider is not None
    assert verdict.judge(near, delta=float(wider[1]), direction="maximize").kind == "within"
    assert f"hpo confirm own --seeds {3 + (undecided.verdict.more or 0)}" in page


def test_a_confirmation_is_json(searched: Study) -> None:
    worked(enlisted(searched, runs=2))
    found = json.loads(json.dumps(confirmed.to_json(read(searched))))
    assert (found["verdict"]["kind"], found["is_complete"]) == ("best", True)
    page = confirmed.page(read(searched))
    assert f"verdict  trial {found['verdict']['leader']} is best (error at most 10%)" in page
    assert max(map(len, page.splitlines())) <= 80
