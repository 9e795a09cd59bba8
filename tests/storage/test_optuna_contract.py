"""What Optuna demands of any storage, and of samplers and pruners on one: its own test suites, run on ours.

`optuna.testing` ships `StorageTestCase`, all of which runs here on SQLite and on Postgres, and four suites for samplers,
which make their studies in memory; here they make them in our storage, on SQLite, with samplers built as workers build
them: a fresh one for each trial. It ships no suite for pruners. So each pruner of ours decides next to Optuna's own, whose
study is kept in memory, on random histories: the same decisions and the same marks left on the trials.

Of the samplers, TPE alone, which is our own, goes through Optuna's suites in every run: how a sampler is built and what it
reads is the same for all. The suites with the others are for the soak; in every run each of them suggests a few points. Grid
goes by a test of its own: Optuna's suites draw from spaces of their choice, and a grid has but its own.
"""

from __future__ import annotations

import gc
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, InMemoryStorage
from optuna.testing.pytest_samplers import (
    BasicSamplerTestCase,
    MultiObjectiveSamplerTestCase,
    RelativeSamplerTestCase,
    SingleOnlySamplerTestCase,
)
from optuna.testing.pytest_storages import StorageTestCase
from optuna.trial import FrozenTrial, TrialState

from hpo.spec.study_file import StudySpec
from hpo.storage import tables
from hpo.storage.connect import Storage, connect, plain_url
from hpo.strategy import pruners, samplers
from tests.support import emptied

# --- the storage ----------------------------------------------------------------------------------------------------


@pytest.mark.both
class TestOurStorageKeepsOptunasContract(StorageTestCase):
    """All of Optuna's suite; each of its tests takes `storage`, and finds it empty."""

    @pytest.fixture(name="storage")
    def ours(self, place: Storage) -> BaseStorage:
        return place.optuna

    @pytest.mark.filterwarnings(
        "ignore::ResourceWarning"
    )  # nobody closes what was unpickled: collected here, not later
    def test_pickle_storage(self, storage: BaseStorage) -> None:
        super().test_pickle_storage(storage)
        gc.collect()


# --- samplers -------------------------------------------------------------------------------------------------------


class AFreshSamplerEachTrial(BaseSampler):
    """What the workers of a study do together: none of them has a sampler that has seen the trial before."""

    def __init__(self, name: str, options: dict[str, Any]) -> None:
        document = {"name": "s", "objective": "mine.py:f", "direction": "minimize"}
        self.spec = samplers.resolve(StudySpec.from_document({**document, "sampler": {"name": name, **options}}))
        self.made: dict[int, BaseSampler] = {}

    def of(self, trial: FrozenTrial) -> BaseSampler:
        if trial.number not in self.made:
            self.made[trial.number] = samplers.build(self.spec, trial.number)
        return self.made[trial.number]

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self.of(trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self.of(trial).sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self.of(trial).sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self.of(trial).before_trial(study, trial)

    def after_trial(self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Any) -> None:
        self.of(trial).after_trial(study, trial, state, values)


def made_anew(name: str, *, label: str = "", marks: Any = (), **options: Any) -> Any:
    """Return a parameter for `sampler`: what makes the sampler of this name."""
    return pytest.param(lambda: AFreshSamplerEachTrial(name, options), id=label or name, marks=marks)


# No start-up at random, as in Optuna's own tests. But for gp, whose every suggestion takes a large part of a second:
# of the tests with 20 trials it suggests the last two, but in `gp-at-once`.
SOAK = pytest.mark.soak
TPE, CMAES = made_anew("tpe", n_startup_trials=0), made_anew("cmaes", marks=SOAK, n_startup_trials=0)
GP = made_anew("gp", marks=SOAK, n_startup_trials=18)
GP_AT_ONCE = made_anew("gp", label="gp-at-once", marks=SOAK, n_startup_trials=0)
NSGA2, RANDOM, QMC = (made_anew(name, marks=SOAK) for name in ("nsga2", "random", "qmc"))


@pytest.fixture(scope="module")
def shared(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Storage]:
    """One storage for all studies of the samplers' tests, which are many and have names of their own."""
    opened = connect(emptied.sqlite_copy(template, tmp_path_factory.mktemp("shared")))
    yield opened
    opened.close()


class InOurStorage:
    """Studies that are made without a storage, which Optuna would keep in memory, are made in ours."""

    @pytest.fixture(autouse=True)
    def kept_in_ours(self, shared: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
        usual = optuna.storages.get_storage
        monkeypatch.setattr(
            optuna.storages, "get_storage", lambda given: usual(shared.optuna if given is None else given)
        )

    @pytest.fixture
    def sampler(self, request: pytest.FixtureRequest) -> Callable[[], BaseSampler]:
        return request.param


EACH = [
    *(made_anew(name, n_startup_trials=2) for name in ("tpe", "cmaes", "gp")),
    *(made_anew(name) for name in ("nsga2", "random", "qmc")),
]


@pytest.mark.parametrize("sampler", EACH, indirect=True)
class TestEachSampler(InOurStorage):
    def test_suggests_in_our_storage(self, shared: Storage, sampler: Any) -> None:
        """A study of each sampler lies in our storage, and a few trials of two parameters complete there."""
        study = optuna.create_study(sampler=sampler())
        assert study._storage is shared.optuna
        study.optimize(lambda trial: trial.suggest_float("x", 0, 1) + trial.suggest_float("y", 0, 1), n_trials=4)
        with shared.engine.connect() as connection:
            trials = sa.select(tables.trials.c.state).where(tables.trials.c.study_id == study._study_id)
            assert connection.execute(trials).scalars().all() == [TrialState.COMPLETE] * 4
        assert len({tuple(trial.params.values()) for trial in study.trials}) == 4


def one_of_each(*distributions: BaseDistribution) -> pytest.MarkDecorator:
    """Let a test of Optuna's take these distributions, of which the soak has those whose range alone is another one."""
    seen: list[Any] = []
    given = []
    for one in distributions:
        kind = (type(one), getattr(one, "log", None), getattr(one, "step", None))
        given.append(pytest.param(one, marks=SOAK if kind in seen and kind[0] is not CategoricalDistribution else ()))
        seen.append(kind)
    return pytest.mark.parametrize("distribution", given)


FLOATS = [
    FloatDistribution(-1.0, 1.0),
    FloatDistribution(0.0, 1.0),
    FloatDistribution(-1.0, 0.0),
    FloatDistribution(1e-7, 1.0, log=True),
    FloatDistribution(-10, 10, step=0.1),
    FloatDistribution(-10.2, 10.2, step=0.1),
]
INTS = [
    IntDistribution(-10, 10),
    IntDistribution(0, 10),
    IntDistribution(-10, 0),
    IntDistribution(-10, 10, step=2),
    IntDistribution(0, 10, step=2),
    IntDistribution(-10, 0, step=2),
    IntDistribution(1, 100, log=True),
]
CHOICES = [CategoricalDistribution(choices) for choices in ((1, 2, 3), ("a", "b", "c"), (1, "a"))]


@pytest.mark.parametrize("sampler", [TPE, CMAES, NSGA2, RANDOM, QMC, GP, GP_AT_ONCE], indirect=True)
class TestEverySamplerOnOurStorage(InOurStorage, BasicSamplerTestCase):
    @one_of_each(*FLOATS)
    def test_float(self, sampler: Callable[[], BaseSampler], distribution: FloatDistribution) -> None:
        super().test_float(sampler, distribution)

    @one_of_each(*INTS)
    def test_int(self, sampler: Callable[[], BaseSampler], distribution: IntDistribution) -> None:
        super().test_int(sampler, distribution)


@pytest.mark.parametrize("sampler", [TPE, CMAES, GP_AT_ONCE], indirect=True)
class TestSamplersThatLookAtAllParametersAtOnceOnOurStorage(InOurStorage, RelativeSamplerTestCase):
    pass


@pytest.mark.parametrize("sampler", [TPE, NSGA2, RANDOM, QMC, GP], indirect=True)
class TestSamplersWithTwoObjectivesOnOurStorage(InOurStorage, MultiObjectiveSamplerTestCase):
    @one_of_each(*FLOATS, *INTS, *CHOICES)
    def test_multi_objective_sample_independent(
        self, sampler: Callable[[], BaseSampler], distribution: BaseDistribution
    ) -> None:
        super().test_multi_objective_sample_independent(sampler, distribution)


@pytest.mark.parametrize("sampler", [CMAES], indirect=True)
class TestCmaEsRefusesTwoObjectivesOnOurStorage(InOurStorage, SingleOnlySamplerTestCase):
    pass


def test_a_grid_on_our_storage_is_walked_once_by_two_processes_storages(shared: Storage) -> None:
    """Optuna's suites ask a sampler for parameters of their own choice, which a grid does not have."""
    points: dict[str, Any] = {"x": [0.1, 0.2, 0.3], "y": ["a", "b"]}
    sampler = AFreshSamplerEachTrial("grid", {"search_space": points})
    study = optuna.create_study(storage=shared.optuna, sampler=sampler)
    other = connect(plain_url(shared.url))
    studies = [study, optuna.load_study(study_name=study.study_name, storage=other.optuna, sampler=sampler)]

    def objective(trial: optuna.Trial) -> float:
        return trial.suggest_categorical("x", points["x"]) + len(trial.suggest_categorical("y", points["y"]))

    for turn in range(6):
        studies[turn % 2].optimize(objective, n_trials=1)
    other.close()
    walked = [tuple(trial.params.values()) for trial in study.get_trials()]
    assert sorted(walked) == [(x, y) for x in points["x"] for y in points["y"]]


# --- pruners --------------------------------------------------------------------------------------------------------

OPTIONS: dict[str, Callable[[random.Random], dict[str, Any]]] = {
    "none": lambda rng: {},
    "median": lambda rng: percentiles(rng),
    "percentile": lambda rng: {"percentile": rng.choice([0.0, 25.0, 60.0, 100.0])} | percentiles(rng),
    "successive_halving": lambda rng: {
        "min_resource": rng.choice([1, 2]),
        "reduction_factor": rng.choice([2, 3]),
        "min_early_stopping_rate": rng.choice([0, 1]),
    },
    "hyperband": lambda rng: {"max_resource": rng.choice([4, 9]), "reduction_factor": rng.choice([2, 3])},
    "threshold": lambda rng: {
        "lower": rng.choice([-0.5, 0.1]),
        "upper": rng.choice([0.7, 2.0]),
        "n_warmup_steps": rng.choice([0, 2]),
        "interval_steps": rng.choice([1, 3]),
    },
    "patient": lambda rng: {
        "patience": rng.choice([1, 2]),
        "min_delta": rng.choice([0.0, 0.2]),
        "wrapped": rng.choice(["none", "median", "percentile", "successive_halving"]),
    },
}
REPORTED = [*(tenth / 10 for tenth in range(10)), math.nan, math.nan, math.inf, -math.inf]


def percentiles(rng: random.Random) -> dict[str, Any]:
    return {
        "n_startup_trials": rng.choice([0, 3, 6]),
        "n_warmup_steps": rng.choice([0, 2]),
        "interval_steps": rng.choice([1, 2, 3]),
        "n_min_trials": rng.choice([1, 3]),
    }


def optunas_own(name: str, options: dict[str, Any]) -> optuna.pruners.BasePruner:
    """Return Optuna's pruner for a pruner of ours; none of its own is like `patient`."""
    given = dict(options)
    match name:
        case "patient":
            defaults = {"median": percentile_defaults(), "percentile": {"percentile": 25.0} | percentile_defaults()}
            inner = given.pop("wrapped")
            wrapped = None if inner == "none" else optunas_own(inner, defaults.get(inner, {}))
            return pruners.Patient(wrapped, **given)
        case "none":
            return optuna.pruners.NopPruner()
        case "median":
            return optuna.pruners.MedianPruner(**given)
        case "percentile":
            return optuna.pruners.PercentilePruner(**given)
        case "successive_halving":
            return optuna.pruners.SuccessiveHalvingPruner(**{"min_resource": 1, "reduction_factor": 3} | given)
        case "hyperband":
            return optuna.pruners.HyperbandPruner(**given)
    assert name == "threshold"
    return optuna.pruners.ThresholdPruner(**given)


def percentile_defaults() -> dict[str, Any]:
    return {"n_startup_trials": 5, "n_warmup_steps": 0, "interval_steps": 1, "n_min_trials": 3}


class Pair:
    """A study of ours and its twin in memory, to which everything is done alike."""

    def __init__(self, place: Storage, name: str, rng: random.Random) -> None:
        options = OPTIONS[name](rng)
        self.rng = rng
        self.place = place
        self.decided: list[bool] = []
        self.what = f"{name} {options}"
        direction = rng.choice(["minimize", "maximize"])
        given: dict[str, Any] = {"direction": direction, "study_name": f"twin-{rng.random()}"}  # of one name: Hyperband
        self.studies = [
            optuna.create_study(storage=place.optuna, pruner=pruners.PRUNERS[name](**options), **given),
            optuna.create_study(storage=InMemoryStorage(), pruner=optunas_own(name, options), **given),
        ]
        self.running: dict[int, list[optuna.Trial]] = {}

    def add_history(self) -> None:
        rng = self.rng
        state = rng.choice([TrialState.COMPLETE, TrialState.COMPLETE, *TrialState])
        curve = {step: rng.choice(REPORTED) for step in range(rng.choice([0, 1]), 10) if rng.random() < 0.7}
        marks = {f"completed_rung_{rung}": rng.random() for rung in range(rng.choice([0, 0, 1, 2]))}
        trial = optuna.create_trial(
            state=state,
            value=rng.random() if state == TrialState.COMPLETE else None,
            intermediate_values=curve,
            system_attrs=marks,
            params={"x": rng.random()},
            distributions={"x": FloatDistribution(0, 1)},
        )
        for study in self.studies:
            study.add_trial(trial)

    def start(self) -> None:
        trials = [study.ask() for study in self.studies]  # a waiting one, if there is one
        assert trials[0].number == trials[1].number
        self.running[trials[0].number] = trials

    def report(self, number: int) -> None:
        steps = self.studies[1].get_trials(deepcopy=False)[number].intermediate_values
        step = max(steps, default=0) + self.rng.choice([1, 1, 1, 2, 3])
        value = self.rng.choice(REPORTED)
        for trial in self.running[number]:
            trial.report(value, step)

    def decide(self, number: int) -> None:
        ours, theirs = (bool(trial.should_prune()) for trial in self.running[number])
        assert ours == theirs, f"{self.what}: trial {number}, decision {len(self.decided)}"
        self.decided.append(ours)

    def end(self, number: int) -> None:
        state = self.rng.choice([TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL])
        value = self.rng.random() if state == TrialState.COMPLETE else None
        for study, trial in zip(self.studies, self.running.pop(number), strict=True):
            study.tell(trial, value, state)

    def cut_back(self, number: int) -> None:
        """Take a trial up again where its checkpoint stands, as our workers do: later steps and rungs are gone."""
        epoch = self.rng.randint(0, 4)
        ours, theirs = self.running[number]
        inner = theirs.storage.get_trial(theirs._trial_id)
        for step in [step for step in inner.intermediate_values if step > epoch]:
            del inner.intermediate_values[step]
        inner.system_attrs.clear()
        steps, marks = tables.intermediate_values, tables.trial_system_attributes
        with self.place.engine.begin() as connection:
            connection.execute(steps.delete().where(steps.c.trial_id == ours._trial_id, steps.c.step > epoch))
            connection.execute(marks.delete().where(marks.c.trial_id == ours._trial_id))
        self.running[number] = [
            optuna.Trial(study, trial._trial_id) for study, trial in zip(self.studies, (ours, theirs), strict=True)
        ]

    def play(self, events: int) -> None:
        for _ in range(12):
            self.add_history()
        for _ in range(events):
            if len(self.running) < 3 or self.rng.random() < 0.1:
                self.start()
            number = self.rng.choice(list(self.running))
            match self.rng.choices(["report", "again", "end", "back"], [20, 2, 2, 2])[0]:
                case "report":
                    self.report(number)
                    self.decide(number)
                case "again":
                    self.decide(number)
                case "end":
                    self.end(number)
                case "back":
                    self.cut_back(number)

    def marks(self) -> list[list[dict[str, Any]]]:
        """Return, of each study, what pruners have written on the trials."""
        return [[trial.system_attrs for trial in study.get_trials()] for study in self.studies]


@pytest.mark.filterwarnings("ignore:All-NaN:RuntimeWarning")  # Optuna's pruners ask numpy for the best of none
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # and for what is half way between infinities
@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_a_pruner_on_our_storage_decides_as_optunas_own_does_in_memory(place: Storage, name: str) -> None:
    decided = []
    for seed in range(3):
        pair = Pair(place, name, random.Random(f"{name} {seed}"))
        pair.play(40)
        ours, theirs = pair.marks()
        assert ours == theirs
        decided += pair.decided
    assert set(decided) == ({False} if name == "none" else {False, True})
