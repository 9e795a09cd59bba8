"""Our TPE suggests what Optuna's does, to the last bit, whatever the history; and it asks the database little for it."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import Mock

import numpy as np
import optuna
import pytest
import sqlalchemy as sa
from optuna.samplers import TPESampler
from optuna.samplers._tpe.sampler import _split_trials
from optuna.storages import BaseStorage, InMemoryStorage
from optuna.study import StudyDirection
from optuna.trial import BaseTrial, FrozenTrial, TrialState

from hpo.storage.connect import Storage, connect
from hpo.storage.optuna_storage import OptunaStorage
from hpo.storage.trial_rows import TrialRow
from hpo.strategy.tpe import ArrayTPE, RankedTrials

NAME = "s"
STATES = ["COMPLETE", "PRUNED", "FAIL", "RUNNING", "WAITING"]
MIXES: list[list[float]] = [
    [0.7, 0.15, 0.05, 0.05, 0.05],
    [0.05, 0.75, 0.05, 0.1, 0.05],
    [0.3, 0.3, 0.1, 0.2, 0.1],
    [1, 0, 0, 0, 0],
]
SETTINGS: list[dict[str, Any]] = [
    {},
    {"group": True},
    {"constant_liar": False},
    {"group": True, "constant_liar": False},
    {"multivariate": False},
    {"multivariate": False, "constant_liar": False},
    {"n_ei_candidates": 1, "n_startup_trials": 0},
    {"gamma": lambda n: n // 2, "weights": np.ones, "prior_weight": 0.5, "consider_endpoints": True},
]

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning", "ignore::FutureWarning")


# --- histories --------------------------------------------------------------------------------------------------------


def flat(trial: BaseTrial) -> None:
    """Suggest the same parameters in every trial, of every kind."""
    trial.suggest_float("rate", 1e-5, 1.0, log=True)
    trial.suggest_float("drop", 0.0, 0.5)
    trial.suggest_float("decay", 0.0, 1.0, step=0.25)
    trial.suggest_int("layers", 1, 8)
    trial.suggest_int("width", 16, 64, step=16)
    trial.suggest_int("units", 1, 512, log=True)
    trial.suggest_categorical("kind", ["a", None, 3, 0.5, True])
    trial.suggest_int("single", 3, 3)


def conditional(trial: BaseTrial) -> None:
    """Suggest parameters that hang on others, one whose range moves, and one in few trials."""
    trial.suggest_float("rate", 1e-5, 1.0, log=True)
    if trial.suggest_categorical("optimizer", ["sgd", "adam", "lion"]) == "sgd":
        trial.suggest_float("momentum", 0.5, 0.99)
        trial.suggest_categorical("nesterov", [True, False])
    else:
        trial.suggest_float("beta", 0.9, 0.9999)
    trial.suggest_float("moving", 0.0, 1.0 + trial.number % 2)
    trial.suggest_int("steps", 1 + trial.number % 3, 9)
    if trial.number % 7 == 3:
        trial.suggest_int("rare", 1, 4)


def choices(trial: BaseTrial) -> None:
    """Suggest choices alone, of which some are equal and yet not the same."""
    trial.suggest_categorical("x", [1, 2, 3] if trial.number % 2 else [True, 2, 3])
    trial.suggest_categorical("y", ["one"])
    trial.suggest_categorical("z", ["p", "q"])


def sparse(trial: BaseTrial) -> None:
    """Suggest one parameter or none."""
    if trial.number % 5 != 3:
        trial.suggest_float("x", -1.0, 1.0)


SPACES = [flat, conditional, choices, sparse]


def history(seed: int, size: int, define: Any) -> list[FrozenTrial]:
    """Return trials in all states: drawn at random, with equal values, infinite ones, and NaN among what was reported."""
    draws = np.random.RandomState(seed)
    source = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    mix = MIXES[seed % len(MIXES)]
    drawn = []
    for _ in range(size):
        trial = source.ask()
        define(trial)
        drawn.append(past(source.get_trials(deepcopy=False)[-1], TrialState[draws.choice(STATES, p=mix)], draws))
    return drawn


def past(drawn: FrozenTrial, state: TrialState, draws: np.random.RandomState) -> FrozenTrial:
    values = [-np.inf, -1.0, -0.0, 0.0, 0.25, 0.5, 2.0, np.inf]
    reported = draws.choice([*values, np.nan], size=draws.choice([0, 1, 3]))
    params, attributes = partly(drawn.params, draws) if state == TrialState.RUNNING else (drawn.params, {})
    return optuna.trial.create_trial(
        state=state,
        value=draws.choice([*values, draws.rand(), draws.rand()]) if state == TrialState.COMPLETE else None,
        params=params,
        distributions={name: drawn.distributions[name] for name in params},
        system_attrs=attributes,
        intermediate_values={int(3 * draws.rand()) + 3 * step: float(x) for step, x in enumerate(reported)},
    )


def partly(params: dict[str, Any], draws: np.random.RandomState) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return some of the parameters, as those that were suggested already, and others as the relative ones to come."""
    suggested = dict(list(params.items())[: draws.randint(len(params) + 1)])
    text = json.dumps(dict(list(params.items())[draws.randint(2) :]))
    texts: list[list[str]] = [[], [text], [text[:7], text[7:]], [text[:-2]]]  # the last: half of it has arrived
    return suggested, {
        f"tpe:relative_params:{i}": part for i, part in enumerate(texts[draws.randint(len(texts))]) if part
    }


def fill(place: BaseStorage, trials: Sequence[FrozenTrial], direction: StudyDirection, seed: int = 0) -> int:
    """Make a study of trials that started before any ended, and ended in another order; the storage looks now and then.

    Returns:
        the study's id.
    """
    study_id = place.create_new_study([direction], NAME)
    ids = [place.create_new_trial(study_id, started(trial)) for trial in trials]
    for count, position in enumerate(np.random.RandomState(seed).permutation(len(trials))):
        trial = trials[position]
        if trial.state.is_finished():
            place.set_trial_state_values(ids[position], trial.state, trial.values)
        if count % 8 == 0:
            place.get_all_trials(study_id, deepcopy=False)
    return study_id


def started(trial: FrozenTrial) -> FrozenTrial:
    if not trial.state.is_finished():
        return trial
    running = copy.copy(trial)
    running.state, running.values, running.datetime_complete = TrialState.RUNNING, None, None
    return running


# --- both sides -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Storage]:
    """One database for all tests: to make one costs more than a test."""
    opened = connect(f"sqlite:///{tmp_path_factory.mktemp('tpe')}/s.db", create=True)
    yield opened
    opened.close()


@pytest.fixture
def lean(opened: Storage) -> Iterator[OptunaStorage]:
    """A storage as in a fresh process, without a study."""
    place = OptunaStorage(opened.engine)
    yield place
    for study in place.get_all_studies():
        place.delete_study(study._study_id)


@contextmanager
def listing_refused() -> Iterator[None]:
    """Fail where anybody lists the trials of a OptunaStorage, as Optuna's own code does."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("the trials were listed")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OptunaStorage, "get_all_trials", refuse)
        yield


def begin(place: BaseStorage, sampler: TPESampler, pruner: optuna.pruners.BasePruner | None = None) -> optuna.Trial:
    study = optuna.load_study(study_name=NAME, storage=place, sampler=sampler, pruner=pruner)
    return optuna.Trial(study, place.create_new_trial(study._study_id))


def taken_up(trial: optuna.Trial, sampler: TPESampler) -> optuna.Trial:
    """Return the trial as another process opens it."""
    return optuna.Trial(optuna.load_study(study_name=NAME, storage=trial.storage, sampler=sampler), trial._trial_id)


def told(trial: optuna.Trial) -> str:
    """Return all that a sampler left of a trial in the storage, types and last bits included."""
    frozen = trial.storage.get_trial(trial._trial_id)
    return repr((frozen.number, frozen.params, sorted(frozen.system_attrs.items())))


def assert_alike(lean: OptunaStorage, plain: BaseStorage, define: Any, *, seed: int, **settings: Any) -> None:
    """Suggest the next trials' parameters on both sides, and end these trials."""
    for number in range(3):
        theirs = begin(plain, TPESampler(seed=seed + number, **settings))
        define(theirs)
        ours = begin(lean, ArrayTPE(seed=seed + number, **settings))
        with listing_refused():
            define(ours)
        assert told(ours) == told(theirs)
        for trial in (ours, theirs):
            trial.storage.set_trial_state_values(trial._trial_id, TrialState.COMPLETE, [0.1 * number])


# --- the same suggestions ---------------------------------------------------------------------------------------------


def in_every_run(at: int, seed: int) -> bool:
    """Take of each settings half the seeds: each space once, and both directions in turn."""
    return (seed // 4 + seed + at) % 2 == 0


@pytest.mark.parametrize(
    ("settings", "seed"),
    [
        pytest.param(
            settings, seed, id=f"settings{at}-{seed}", marks=() if in_every_run(at, seed) else pytest.mark.soak
        )
        for at, settings in enumerate(SETTINGS)
        for seed in range(8)
    ],
)
def test_every_suggestion_is_optunas(lean: OptunaStorage, settings: dict[str, Any], seed: int) -> None:
    define = SPACES[seed % 4]
    direction = [StudyDirection.MINIMIZE, StudyDirection.MAXIMIZE][seed // 4]
    trials = history(seed + 10 * SETTINGS.index(settings), [14, 40][seed // 2 % 2], define)
    plain = InMemoryStorage()
    fill(plain, trials, direction, seed)
    learnt = lean.columns(fill(lean, trials, direction, seed)).numbers
    assert (np.diff(learnt) < 0).any()
    assert_alike(lean, plain, define, seed=seed, **settings)


@pytest.mark.parametrize("size", [0, 1, 5, 6, 7, 8])
@pytest.mark.parametrize("group", [False, True])
def test_the_start_is_drawn_at_random_as_long_as_optunas(lean: OptunaStorage, size: int, group: bool) -> None:
    plain = InMemoryStorage()
    for place in (lean, plain):
        fill(place, history(3, size, conditional), StudyDirection.MINIMIZE)
    assert_alike(lean, plain, conditional, seed=size, group=group, n_startup_trials=7)


@pytest.mark.parametrize("group", [False, True])
def test_a_long_history_in_which_estimators_take_other_ways(lean: OptunaStorage, group: bool) -> None:
    trials = history(0, 400, conditional)  # Optuna's error function of 2000 numbers and more is another
    plain = InMemoryStorage()
    for place in (lean, plain):
        study_id = place.create_new_study([StudyDirection.MAXIMIZE], NAME)
        for trial in trials:
            place.create_new_trial(study_id, trial)
    assert_alike(lean, plain, conditional, seed=1, group=group)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("direction", [StudyDirection.MINIMIZE, StudyDirection.MAXIMIZE])
def test_good_and_bad_trials_are_optunas(lean: OptunaStorage, direction: StudyDirection, seed: int) -> None:
    study_id = fill(lean, history(seed, 60, flat), direction, seed)
    found = RankedTrials(lean.columns(study_id), direction)
    numbers = lean.columns(study_id).numbers
    study = optuna.load_study(study_name=NAME, storage=lean)
    counting = study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED))
    assert len(found) == len(counting)
    for good in range(len(counting) + 2):
        theirs = _split_trials(study, counting, good)
        ours = found.split(good)
        assert [list(numbers[at]) for at in ours] == [[trial.number for trial in half] for half in theirs]


def test_a_queued_fraction_counts_as_its_int(lean: OptunaStorage) -> None:
    """A queued fraction for a parameter of ints counts as the int that it becomes."""

    def define(trial: BaseTrial) -> None:
        trial.suggest_int("layers", 1, 100)

    plain = InMemoryStorage()
    for place in (lean, plain):
        study = optuna.create_study(study_name=NAME, storage=place)
        for value in range(20):
            study.enqueue_trial({"layers": 1.95 + 7 * value % 50})
            trial = study.ask()
            with pytest.warns(UserWarning, match="out of range"):
                define(trial)
            study.tell(trial, value)
    for seed in range(0, 30, 3):
        assert_alike(lean, plain, define, seed=seed)


def test_earlier_draws_of_a_trial_do_not_count(lean: OptunaStorage) -> None:
    """A trial taken up again does not count what was drawn for it before."""
    plain = InMemoryStorage()
    for place in (lean, plain):
        fill(place, history(3, 12, flat), StudyDirection.MINIMIZE)
    theirs, ours = begin(plain, TPESampler()), begin(lean, ArrayTPE())
    for seed in range(4):
        theirs = taken_up(theirs, TPESampler(seed=seed))
        ours = taken_up(ours, ArrayTPE(seed=seed))
        assert ours.relative_params == theirs.relative_params


@pytest.mark.parametrize("group", [False, True])
def test_hyperbands_brackets_change_nothing_about_it(lean: OptunaStorage, group: bool) -> None:
    trials = history(2, 40, conditional)
    plain = InMemoryStorage()
    for place in (lean, plain):
        fill(place, trials, StudyDirection.MINIMIZE)
    pruner = optuna.pruners.HyperbandPruner(min_resource=1, max_resource=9)
    begin(plain, TPESampler(), pruner).should_prune()  # which makes its brackets
    begin(lean, ArrayTPE())
    assert pruner._n_brackets == 3
    for seed in range(4):
        theirs, ours = (
            begin(place, sampler(seed=seed, group=group), pruner)
            for place, sampler in ((plain, TPESampler), (lean, ArrayTPE))
        )
        conditional(theirs)
        with listing_refused():
            conditional(ours)
        assert told(ours) == told(theirs)


def test_one_sampler_serves_several_trials(lean: OptunaStorage) -> None:
    plain = InMemoryStorage()
    for place in (lean, plain):
        fill(place, history(2, 30, conditional), StudyDirection.MINIMIZE)
    theirs, ours = TPESampler(seed=0), ArrayTPE(seed=0)
    for value in range(4):
        for place, sampler in ((plain, theirs), (lean, ours)):
            trial = begin(place, sampler)
            conditional(trial)
            place.set_trial_state_values(trial._trial_id, TrialState.COMPLETE, [value])
    assert told_last(lean) == told_last(plain)


#: How often the finished trials are parted for six trials: once for each set of parameters that is drawn together, by `group`.
PARTED = {False: 7, True: 4}


@pytest.mark.parametrize("group", [False, True])
def test_trials_opened_together_share_one_look_at_the_history(
    lean: OptunaStorage, group: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each sees the parameters of those before it, as in Optuna. The finished trials are ranked once for all."""
    plain, ranked, settings = InMemoryStorage(), [], {"multivariate": True, "group": group, "constant_liar": True}
    split = RankedTrials.split
    monkeypatch.setattr(RankedTrials, "split", lambda self, good: ranked.append(good) or split(self, good))
    for place in (lean, plain):
        study_id = fill(place, history(2, 30, conditional), StudyDirection.MINIMIZE)
    study_id = lean.get_study_id_from_name(NAME)
    theirs = [begin(plain, TPESampler(seed=seed, **settings)) for seed in range(6)]
    ours = [begin(lean, ArrayTPE(seed=seed, **settings)) for seed in range(6)]
    for trial in theirs:
        conditional(trial)
    with lean.snapshot(study_id):
        for trial in ours:
            lean.prime(study_id, TrialRow.of(lean.get_trial(trial._trial_id)))  # as a worker opens trials
            with lean.deferred_writes(trial._trial_id):
                conditional(trial)
    assert [repr(trial.params) for trial in ours] == [repr(trial.params) for trial in theirs]
    assert len(ranked) == PARTED[group]


def told_last(place: BaseStorage) -> str:
    study = optuna.load_study(study_name=NAME, storage=place)
    return repr([trial.params for trial in study.trials[-4:]])


# --- what Optuna's own code does --------------------------------------------------------------------------------------


def listed(place: OptunaStorage, sampler: TPESampler, define: Any) -> bool:
    """Say whether the trials are listed for a suggestion."""
    with listing_refused():
        try:
            define(begin(place, sampler))
        except AssertionError:
            return True
    return False


@pytest.mark.parametrize("key", ["constraints", "constraints:memory"])
def test_a_study_with_constraints_goes_optunas_way(lean: OptunaStorage, key: str) -> None:
    trials = history(3, 40, conditional)
    for position, trial in enumerate(trials):
        violated = [1.0, -1.0, 0.0, 2.5][position % 4]
        trial.system_attrs = trial.system_attrs | {key: [violated] if key == "constraints" else violated}
    plain = InMemoryStorage()
    for place in (lean, plain):
        fill(place, trials, StudyDirection.MINIMIZE)
    theirs, ours = begin(plain, TPESampler(seed=0)), begin(lean, ArrayTPE(seed=0))
    conditional(theirs)
    conditional(ours)
    assert told(ours) == told(theirs)
    assert listed(lean, ArrayTPE(seed=0), conditional)


def test_several_objectives_go_optunas_way(lean: OptunaStorage) -> None:
    plain = InMemoryStorage()
    for place in (lean, plain):
        study_id = place.create_new_study([StudyDirection.MINIMIZE, StudyDirection.MAXIMIZE], NAME)
        for trial in history(3, 20, flat):
            trial.values = [float(trial.params["layers"]), float(trial.params["width"])]
            place.create_new_trial(study_id, trial)
    theirs, ours = begin(plain, TPESampler(seed=0)), begin(lean, ArrayTPE(seed=0))
    flat(theirs)
    flat(ours)
    assert told(ours) == told(theirs)


@pytest.mark.parametrize("group", [False, True])
def test_another_storage_goes_optunas_way(group: bool) -> None:
    theirs, ours = InMemoryStorage(), InMemoryStorage()
    for place in (theirs, ours):
        fill(place, history(2, 40, conditional), StudyDirection.MINIMIZE)
    trials = begin(theirs, TPESampler(seed=0, group=group)), begin(ours, ArrayTPE(seed=0, group=group))
    for trial in trials:
        conditional(trial)
    assert told(trials[0]) == told(trials[1])


def test_a_warning_of_independent_sampling_is_optunas_to_give(
    lean: OptunaStorage, caplog: pytest.LogCaptureFixture
) -> None:
    fill(lean, history(0, 40, conditional), StudyDirection.MINIMIZE)
    optuna.logging.enable_propagation()
    try:
        conditional(begin(lean, ArrayTPE(seed=0, warn_independent_sampling=True)))
    finally:
        optuna.logging.disable_propagation()
    assert "is sampled independently" in caplog.text


# --- what it costs ----------------------------------------------------------------------------------------------------


@contextmanager
def statements(place: OptunaStorage) -> Iterator[list[str]]:
    """Collect what is sent to the database."""
    sent: list[str] = []

    def note(_: Any, __: Any, statement: str, *___: Any) -> None:
        sent.append(statement)

    sa.event.listen(place.engine, "before_cursor_execute", note)
    try:
        yield sent
    finally:
        sa.event.remove(place.engine, "before_cursor_execute", note)


def cost(place: OptunaStorage, group: bool) -> tuple[int, int]:
    """Return how many statements and how many looks the parameters of one trial take."""
    trial = begin(place, ArrayTPE(seed=0, group=group))
    with statements(place) as sent, pytest.MonkeyPatch.context() as patch:
        view = Mock(wraps=place.view)
        patch.setattr(place, "view", view)
        trial.suggest_float("rate", 1e-5, 1.0, log=True)
        trial.suggest_categorical("optimizer", ["sgd", "adam", "lion"])
        trial.suggest_float("beta", 0.9, 0.9999)
        trial.suggest_float("moving", 0.0, 1.0)
        trial.suggest_int("steps", 1, 9)
    place.set_trial_state_values(trial._trial_id, TrialState.COMPLETE, [0.0])
    return len(sent), view.call_count


@pytest.mark.parametrize("group", [False, True])
def test_looks_at_the_history_once_for_all_parameters_of_a_trial(lean: OptunaStorage, group: bool) -> None:
    trials = history(3, 60, conditional)
    study_id = fill(lean, trials[:20], StudyDirection.MINIMIZE)
    cost(lean, group)  # the storage learns of the parameters' distributions
    before = cost(lean, group)
    for trial in trials[20:]:
        lean.create_new_trial(study_id, trial)
    lean.view(study_id)
    assert before[1] == 1
    assert cost(lean, group) == before
