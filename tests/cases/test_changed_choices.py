"""An objective of the user's own whose parameters changed amid a study: found before a trial is spent; a fork takes trials along.

"CategoricalDistribution does not support dynamic value space" is among the most asked questions about Optuna.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from optuna.trial import FrozenTrial, TrialState

from hpo.cli.results import fork
from hpo.errors import MismatchError
from hpo.queue.models import Claim
from hpo.storage.connect import plain_url
from hpo.study import asked, resolve
from hpo.study import study as studies
from hpo.study.fork import Forked, fork_study
from hpo.study.status import summarize
from hpo.study.study import Study
from hpo.worker import loop as worker_loop
from hpo.worker.signals import StopSignal
from tests.support.trials import MakeStudy, claim_one

pytestmark = pytest.mark.filterwarnings("ignore:Choices for a categorical distribution should be")
OLD = "c = trial.suggest_categorical('c', ['a', 'b']); x = trial.suggest_float('x', 0.0, 1.0)"
DONE, TRIALS = 4, 9


def write(folder: Path, body: str, file: str = "mine.py") -> None:
    (folder / file).write_text(f"def objective(trial):\n    {body}\n    return 0.5\n")


def work(study: Study, folder: Path, body: str) -> None:
    """Run a worker with this code, of which a study may know already."""
    write(folder, body)
    scope: dict = {}
    exec((folder / "mine.py").read_text(), scope)
    worker_loop.work(study, scope["objective"], study.ledger("w"), StopSignal())


def begun(make_study: MakeStudy, folder: Path, body: str = OLD) -> Study:
    """Return a study with some trials by a code, which is about to go on with another one."""
    study = make_study(trials=DONE)
    work(study, folder, body)
    return changed(study, TRIALS)


def changed(study: Study, trials: int) -> Study:
    return studies.create_or_join(
        study.storage,
        study.spec,
        code_folder=study.code_folder,
        code_digest="another",
        trials_budget=trials,
        allow_code_change=True,
    )


def trials_of(study: Study) -> list[FrozenTrial]:
    return study.optuna.get_trials(deepcopy=False)


CHANGES = {
    "one more choice": (
        "c = trial.suggest_categorical('c', ['a', 'b', 'd'])",
        "c: the study has one of 'a', 'b', the objective asks for one of 'a', 'b', 'd'",
    ),
    "another order": (
        "c = trial.suggest_categorical('c', ['b', 'a'])",
        "c: the study has one of 'a', 'b', the objective asks for one of 'b', 'a'",
    ),
    "tuples": (
        "c = trial.suggest_categorical('c', [('a',), 'b'])",
        "c: the study has one of 'a', 'b', the objective asks for one of ['a'], 'b'",
    ),
    "another kind": (
        "x = trial.suggest_int('x', 0, 9)",
        "x: the study has a number from 0.0 to 1.0, the objective asks for an integer from 0 to 9",
    ),
    "by its logarithm": (
        "n = trial.suggest_int('n', 1, 3); x = trial.suggest_float('x', 0.1, 1.0, log=True)",
        "x: the study has a number from 0.0 to 1.0, the objective asks for a number from 0.1 to 1.0 by its logarithm",
    ),
    "caught": (
        "\n    try: c = trial.suggest_categorical('c', [1, 2])\n    except Exception: pass",
        "c: the study has one of 'a', 'b', the objective asks for one of 1, 2",
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_the_worker_leaves_and_no_trial_is_spent(make_study: MakeStudy, tmp_path: Path, case: str) -> None:
    body, said = CHANGES[case]
    study = begun(make_study, tmp_path)
    with pytest.raises(MismatchError) as refused:
        work(study, tmp_path, body)
    assert str(refused.value) == f"{said}; undo the change, or copy the trials with `hpo fork own NEW FILE`"
    assert [trial.state for trial in trials_of(study)] == [TrialState.COMPLETE] * DONE + [TrialState.WAITING]
    assert trials_of(study)[-1].params == {}
    summary = summarize(study)
    assert (summary.spent, summary.failures, summary.counts["parked"]) == (DONE, [], 0)
    work(study, tmp_path, OLD)  # the change is undone
    assert [trial.state for trial in trials_of(study)] == [TrialState.COMPLETE] * TRIALS


def test_a_trial_that_had_begun_before_is_parked_again(make_study: MakeStudy, tmp_path: Path) -> None:
    study = begun(make_study, tmp_path)
    ledger = study.ledger("gone")
    claim = claim_one(ledger)
    assert isinstance(claim, Claim)
    study.storage.optuna.set_trial_param(claim.trial_id, "c", 1, trials_of(study)[0].distributions["c"])
    ledger.park(claim)
    with pytest.raises(MismatchError):
        work(study, tmp_path, CHANGES["one more choice"][0])
    assert summarize(study).counts["parked"] == 1
    assert trials_of(study)[-1].params == {"c": "b"}
    work(study, tmp_path, OLD)
    assert len(trials_of(study)) == TRIALS


def test_what_a_trial_was_queued_with_stays(make_study: MakeStudy, tmp_path: Path) -> None:
    study = begun(make_study, tmp_path)
    study.optuna.enqueue_trial({"x": 0.25, "c": "a"})
    with pytest.raises(MismatchError):
        work(study, tmp_path, f"x = trial.suggest_float('x', 0.0, 1.0); {CHANGES['one more choice'][0]}")
    work(study, tmp_path, OLD)
    assert trials_of(study)[DONE].params == {"c": "a", "x": 0.25}


def test_unchanged_code_that_asks_for_this_and_that_fails_by_name(make_study: MakeStudy, tmp_path: Path) -> None:
    """As before: which trials can be had is the objective's affair."""
    study = make_study(trials=3)
    work(study, tmp_path, "trial.suggest_categorical('c', list(range(1 + trial.number)))")
    assert [trial.state for trial in trials_of(study)] == [TrialState.COMPLETE, TrialState.FAIL, TrialState.FAIL]
    assert summarize(study).failures[0].message == (
        "ValueError: c: the study has one of 0, the objective asks for one of 0, 1, 2; "
        "Optuna allows one distribution per parameter, so ask for the same in every trial"
    )


def test_changed_code_that_asks_for_the_same_goes_on(make_study: MakeStudy, tmp_path: Path) -> None:
    study = begun(make_study, tmp_path)
    work(study, tmp_path, f"{OLD}; trial.suggest_int('new', 1, 3)")
    assert [trial.state for trial in trials_of(study)] == [TrialState.COMPLETE] * TRIALS


# --- a fork -----------------------------------------------------------------------------------------------------------


def forked(study: Study, folder: Path, body: str) -> tuple[Forked, Study]:
    write(folder, body, "new.py")
    (folder / "new.toml").write_text(
        'name = "new"\nobjective = "new.py:objective"\ndirection = "minimize"\n[sampler]\nname = "tpe"\n'
        '[pruner]\nname = "none"\n[budget]\ntrials = 3\n'
    )
    result = fork_study(study, resolve.read(folder / "new.toml"))
    return result, studies.join(study.storage, "new")


def source(make_study: MakeStudy, folder: Path, body: str, *queued: dict) -> Study:
    study = make_study(trials=len(queued))
    for params in queued:
        study.optuna.enqueue_trial(params)
    work(study, folder, body)
    return study


FORKS = {
    "the same": (OLD, 3, {}),
    "one more choice": (OLD.replace("'b'", "'b', 'd'"), 3, {}),
    "one choice less": (OLD.replace("'a', ", ""), 1, {"its c is not one of 'b'": 2}),
    "a narrower range": (OLD.replace("1.0", "0.4"), 2, {"its x is not a number from 0.0 to 0.4": 1}),
    "a wider range": (OLD.replace("1.0", "2.0"), 3, {}),
    "by its logarithm": (OLD.replace("0.0, 1.0", "0.1, 1.0, log=True"), 3, {}),
    "one parameter more": (
        OLD + "; trial.suggest_int('n', 1, 2)",
        0,
        {"has no n, for which the objective asks now": 3},
    ),
    "one parameter less": (
        "c = trial.suggest_categorical('c', ['a', 'b'])",
        0,
        {"has x, for which the objective does not ask": 3},
    ),
    "one parameter more of some": (
        OLD + "\n    if c == 'b': trial.suggest_int('n', 1, 2)",
        2,
        {"has no n, for which the objective asks now": 1},
    ),
    "one parameter more below a number": (
        OLD + "\n    if x < 0.3: trial.suggest_int('n', 1, 2)",
        2,
        {"has no n, for which the objective asks now": 1},
    ),
    "a failure": (
        "c = trial.suggest_categorical('c', ['a', 'b']); 1 / 0",
        0,
        {"has x, for which the objective does not ask; the objective failed by ZeroDivisionError: division by zero": 3},
    ),
    "reports": (OLD + "\n    trial.report(x, 1)\n    raise SystemExit", 3, {}),
}


@pytest.mark.parametrize("case", FORKS)
def test_a_fork_takes_along_what_fits(make_study: MakeStudy, tmp_path: Path, case: str) -> None:
    body, taken, left = FORKS[case]
    queued = [{"c": "a", "x": 0.25}, {"c": "a", "x": 0.5}, {"c": "b", "x": 0.375}]
    result, new = forked(source(make_study, tmp_path, OLD, *queued), tmp_path, body)
    assert (result.taken, result.left) == (taken, left)
    assert [trial.params in queued for trial in trials_of(new)] == [True] * taken
    if case in ("one more choice", "by its logarithm", "one choice less"):
        worker_loop.work(new, worker_loop.build_objective(new, tmp_path), new.ledger("w"), StopSignal())
        assert [trial.state for trial in trials_of(new)] == [TrialState.COMPLETE] * (taken + 3)


def test_choices_of_every_type_are_taken_along(make_study: MakeStudy, tmp_path: Path) -> None:
    old = "trial.suggest_categorical('c', [1, True, (1, 2), None])"
    study = source(make_study, tmp_path, old, *({"c": value} for value in (1, True, [1, 2], None)))
    result, new = forked(study, tmp_path, old.replace("None", "None, 'new', 1.0"))
    assert (result.taken, result.left) == (4, {})
    assert [repr(trial.params["c"]) for trial in trials_of(new)] == ["1", "True", "[1, 2]", "None"]


BELOW_A_NUMBER = OLD + "\n    if x < 0.3: trial.suggest_int('n', 1, 2)"


@pytest.fixture
def slow_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each call take 25 s by the clock, so that three are made in the time for calls."""
    ticks = itertools.count(step=25.0)
    monkeypatch.setattr(asked, "time", SimpleNamespace(monotonic=lambda: next(ticks)))


@pytest.mark.usefixtures("slow_calls")
def test_a_trial_that_was_not_asked_is_taken_if_all_with_its_choices_fit_and_is_marked(
    make_study: MakeStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = [0.5, 0.75, 0.875, 0.25, 0.625]  # the fourth one lacks n, which nobody has found out
    study = source(make_study, tmp_path, OLD, *({"c": "a", "x": x} for x in numbers))
    result, new = forked(study, tmp_path, BELOW_A_NUMBER)
    assert (result.taken, result.asked, result.assumed, result.left) == (5, 3, [3, 4], {})
    attributes = [(trial.params["x"], trial.user_attrs.get("hpo:not_asked")) for trial in trials_of(new)]
    assert attributes == list(zip(numbers, [None, None, None, True, True], strict=True))
    monkeypatch.setattr(asked, "ASKING_SECONDS", math.inf)  # a fork of the fork calls all of them
    again = fork_study(new, resolve.read(tmp_path / "new.toml", name="again"))
    assert (again.taken, again.asked, again.assumed) == (4, 5, [])
    assert again.left == {"has no n, for which the objective asks now": 1}
    assert not any("hpo:not_asked" in trial.user_attrs for trial in trials_of(studies.join(new.storage, "again")))


@pytest.mark.usefixtures("slow_calls")
def test_a_trial_that_was_not_asked_is_left_if_those_with_its_choices_differ(
    make_study: MakeStudy, tmp_path: Path
) -> None:
    numbers = [0.5, 0.25, 0.75, 0.125, 0.875]
    queued = [*({"c": "a", "x": x} for x in numbers), {"c": "b", "x": 0.5}]
    result, new = forked(source(make_study, tmp_path, OLD, *queued), tmp_path, BELOW_A_NUMBER)
    assert (result.taken, result.asked, result.assumed) == (3, 4, [])
    assert result.left == {
        "has no n, for which the objective asks now": 1,
        "was not asked within 60 s, and trials with the same choices are asked for different parameters": 2,
    }
    assert [trial.params for trial in trials_of(new)] == [queued[0], queued[2], queued[5]]


@pytest.mark.usefixtures("slow_calls")
def test_a_range_that_depends_on_a_number_is_a_difference_too(make_study: MakeStudy, tmp_path: Path) -> None:
    old = "x = trial.suggest_float('x', 0.0, 1.0); y = trial.suggest_float('y', 0.0, 1.0)"
    study = source(make_study, tmp_path, old, *({"x": x, "y": 0.125} for x in (0.5, 0.25, 0.75, 0.625)))
    result, new = forked(study, tmp_path, old.replace("'y', 0.0, 1.0", "'y', 0.0, x"))
    assert (result.taken, result.asked, result.assumed, sum(result.left.values())) == (3, 3, [], 1)
    assert [
        trial.distributions["y"].high  # type: ignore[attr-defined]
        for trial in trials_of(new)
    ] == [0.5, 0.25, 0.75]


@pytest.mark.usefixtures("slow_calls")
def test_a_trial_that_was_not_asked_is_left_if_none_with_its_choices_fits(
    make_study: MakeStudy, tmp_path: Path
) -> None:
    study = source(make_study, tmp_path, OLD, *({"c": "a", "x": x} for x in (0.5, 0.25, 0.75, 0.625)))
    result, _ = forked(study, tmp_path, OLD + "; trial.suggest_int('n', 1, 2)")
    assert (result.taken, result.asked, result.assumed) == (0, 3, [])
    why = "has no n, for which the objective asks now"
    assert result.left == {why: 3, f"was not asked within 60 s, and a trial with the same choices {why}": 1}


@pytest.mark.usefixtures("slow_calls")
def test_the_command_names_trials_that_were_not_asked(
    make_study: MakeStudy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = source(make_study, tmp_path, OLD, *({"c": "a", "x": n / 32} for n in range(25)))
    forked(study, tmp_path, OLD)  # writes the files too
    capsys.readouterr()
    fork("own", "named", tmp_path / "new.toml", storage=plain_url(study.storage.url))
    assert capsys.readouterr().out.splitlines()[:3] == [
        "made study 'named' with 25 trials of 'own'; 0 do not fit the new space",
        "  22 taken without a call, after 3 calls: every called trial with the same choices fits; if the objective's parameters "
        "depend on a number, some of these may lack one",
        "  they have the user attribute hpo:not_asked; in 'own' they are 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, "
        "18, 19, 20, 21, 22 and 2 more",
    ]
