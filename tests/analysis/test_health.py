"""Health checks on seeded synthetic studies: a healthy one has no finding, each sick one has its own finding and no other."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from hpo.analysis import confirmation, evidence, noise
from hpo.analysis.evidence import Evidence, Leader
from hpo.analysis.health import CHECKS, QUICK, Finding, correlation, examine
from hpo.analysis.widening import is_natural, widened
from hpo.spec.space import Range
from hpo.storage.connect import Storage
from hpo.strategy.rungs import Ladder
from hpo.study import plain
from hpo.study.status import FailureCount
from tests.view.test_live import summary

TRIALS = 50
EPOCHS = 20
NORMS = ("none", "batch", "group", "layer", "instance")
SPACE: dict[str, BaseDistribution] = {
    "lr": FloatDistribution(1e-4, 1e-1, log=True),
    "decay": FloatDistribution(1e-6, 1e-2, log=True),
    "dropout": FloatDistribution(0.0, 0.5),
    "norm": CategoricalDistribution(NORMS),
}
#: Where the loss is lowest, as a place from 0 to 1 in each range.
MIDDLE = {"lr": 0.55, "decay": 0.45, "dropout": 0.5}
OF_NORM = (0.0, 0.05, 0.05, 0.1, 0.1)


@dataclass(frozen=True, kw_only=True)
class Search:
    """How the trials of a synthetic study come about: a loss by place, and a curve that levels off at it."""

    seed: int = 1
    middle: dict[str, float] = field(default_factory=lambda: dict(MIDDLE))
    weight: dict[str, float] = field(default_factory=lambda: dict.fromkeys(MIDDLE, 1.0))
    of_norm: tuple[float, ...] = OF_NORM
    noise: float = 0.002  # of the loss
    speed: float = 4.0  # epochs in which a curve comes closer to its end by a factor e
    repeats: int = 1  # trials of the same parameters
    misleads: bool = False  # whether early epochs say nothing
    step: float = 0.0  # to whose multiples losses are rounded
    trials: int = TRIALS
    is_local: bool = True  # whether later trials are drawn near good ones

    def made(self) -> list[FrozenTrial]:
        """Return trials at random places and, from the 16th on, near good ones, as a sampler draws them."""
        source = np.random.default_rng(self.seed)
        known: list[tuple[float, dict[str, float], int]] = []
        trials: list[FrozenTrial] = []
        while len(trials) < self.trials:
            places, norm = {name: source.random() for name in MIDDLE}, int(source.integers(len(self.of_norm)))
            if self.is_local and len(known) >= 15 and source.random() < 0.6:
                _, near, norm = sorted(known, key=lambda one: one[0])[int(source.integers(5))]
                places = {name: _reflected(place + source.normal(0, 0.1)) for name, place in near.items()}
            exact = sum(self.weight[name] * (places[name] - self.middle[name]) ** 2 for name in MIDDLE)
            exact += self.of_norm[norm]
            known.append((exact, places, norm))
            params = {"norm": NORMS[norm]} | {name: _at(SPACE[name], places[name]) for name in MIDDLE}
            trials += [self._trial(params, exact, source) for _ in range(self.repeats)]
        return trials

    def _trial(self, params: dict[str, Any], exact: float, source: np.random.Generator) -> FrozenTrial:
        end = 0.1 + exact + source.normal(0, self.noise)
        end = round(end / self.step) * self.step if self.step else end
        starts = 2 + (2 * source.normal() if self.misleads else 2 * exact + 0.1 * source.normal())
        curve = [end + starts * math.exp(-epoch / self.speed) for epoch in range(1, EPOCHS + 1)]
        floor = end - curve[-1] if self.speed > EPOCHS else 0.0  # so that a trial's value is that of its last epoch
        return create_trial(
            params=params,
            distributions=SPACE,
            value=curve[-1] + floor if self.speed > EPOCHS else end,
            intermediate_values={epoch: value + floor for epoch, value in enumerate(curve, start=1)},
        )


def _reflected(place: float) -> float:
    return 1 - abs(1 - abs(place))


def _at(distribution: BaseDistribution, place: float) -> float:
    assert isinstance(distribution, FloatDistribution)
    low, high = distribution.low, distribution.high
    return low * (high / low) ** place if distribution.log else low + place * (high - low)


def seen(place: Storage, trials: list[FrozenTrial], name: str = "synthetic") -> Evidence:
    """Return what the checks see of these trials, as of a declared study with a pruner that decides after 4 epochs."""
    optuna.create_study(storage=place.optuna, study_name=name).add_trials(trials)
    study = plain.open_any(place, name)
    found = evidence.with_columns(study, evidence.read(study))
    return replace(found, ladder=Ladder(first=4, factor=3), declared=frozenset(SPACE))


def of(place: Storage, **changes: Any) -> list[Finding]:
    return examine(seen(place, Search(**changes).made()))


def named(findings: list[Finding]) -> list[str]:
    return [finding.name for finding in findings]


# --- synthetic studies ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_healthy_study_has_no_finding(lite: Storage, seed: int) -> None:
    assert of(lite, seed=seed) == []


SICK: dict[str, dict[str, Any]] = {
    "near a bound": {"middle": MIDDLE | {"lr": 1.5}},
    "curves still rising": {"speed": 60.0},
    "rungs mislead the pruner": {"misleads": True, "seed": 0},
    "one choice dominates": {"of_norm": (0, 0.8, 0.8, 0.8, 0.8), "is_local": False},
    "parameter without effect": {"weight": {"lr": 1.0, "decay": 1.0, "dropout": 0.0}, "is_local": False, "seed": 3},
    "seeds noisier than differences": {"repeats": 5, "noise": 0.5, "seed": 3},
    "leaders tie": {"step": 0.1},
}


@pytest.mark.parametrize("name", SICK)
def test_a_sick_study_has_its_own_finding_alone(lite: Storage, name: str) -> None:
    assert named(of(lite, **SICK[name])) == [name]


CHANGED: dict[str, Callable[[Evidence], Evidence]] = {
    "failures": lambda found: replace(
        found,
        summary=replace(
            found.summary,
            counts=found.summary.counts | {"fail": 10},
            failures=[FailureCount(kind="data_error", count=10, retried=2, message="OSError: no such file")],
        ),
    ),
    "small test part": lambda found: replace(found, summary=replace(found.summary, metric="accuracy"), test_images=30),
    "too few trials": lambda found: replace(
        found, summary=replace(found.summary, counts=found.summary.counts | {"complete": 30}, budget=30, spent=30)
    ),
}


@pytest.mark.parametrize("name", CHANGED)
def test_what_trials_themselves_do_not_show_is_found_alone_too(lite: Storage, name: str) -> None:
    healthy = seen(lite, Search().made())
    assert examine(healthy) == []
    assert named(examine(CHANGED[name](healthy))) == [name]


def test_each_check_has_a_sick_study() -> None:
    assert len(SICK) + len(CHANGED) == len(CHECKS)
    assert CHECKS[: len(QUICK)] == QUICK


# --- what a finding says ----------------------------------------------------------------------------------------------


def test_a_bound_is_told_with_a_wider_range_to_paste(lite: Storage) -> None:
    [finding] = of(lite, **SICK["near a bound"])
    assert finding.text == "lr at its upper end 0.1 in 5 of the best 5 trials."
    assert finding.mend.splitlines() == [
        "Search a wider range; hpo fork takes the trials along:",
        "  lr = { low = 0.0001, high = 1.0, log = true }",
    ]


def test_a_natural_bound_is_a_question_and_a_range_in_code_is_told_in_words(lite: Storage) -> None:
    made = Search(middle=MIDDLE | {"dropout": -0.5}, seed=0).made()
    found = seen(lite, made)
    [finding] = examine(found)
    assert finding.mend == "0 may be the natural end of dropout. Is dropout = 0 as a constant as good?"
    found = replace(found, space=found.space | {"dropout": Range(low=-0.001, high=0.5)}, declared=frozenset())
    [finding] = examine(found)
    assert finding.mend == "Search a wider range of dropout in your code, such as -0.2515 to 0.5."


def test_failures_are_told_by_kind_with_the_mend_for_the_most_frequent(lite: Storage) -> None:
    found = CHANGED["failures"](seen(lite, Search().made()))
    [finding] = examine(found)
    assert finding.text == "10 of 62 attempts failed (16%): 10 × data_error. The last: OSError: no such file."
    assert finding.mend == "Check the files that the message names."
    few = replace(found.summary, failures=[FailureCount(kind="data_error", count=2, retried=0, message="")])
    assert examine(replace(found, summary=few)) == []
    stopped = replace(found.summary, failures=[FailureCount(kind="stopped", count=20, retried=0, message="")])
    assert examine(replace(found, summary=stopped)) == []


@pytest.mark.parametrize(
    ("budget", "over", "is_grid", "expected"),
    [
        (30, True, False, ["too few trials"]),
        (80, False, False, []),  # it still runs
        (30, False, False, ["too few trials"]),  # it runs, and never has enough
        (30, True, True, []),  # a grid is complete
    ],
)
def test_few_trials_are_told_of_what_the_study_will_have(
    budget: int, over: bool, is_grid: bool, expected: list[str]
) -> None:
    counts = {"complete": 20, "running": 0 if over else 3}
    one = summary(counts=counts, budget=budget, spent=budget if over else 23, is_grid=is_grid)
    leader = Leader(number=0, value=0.9, params={"a": 1, "b": 2, "c": 3, "d": 4})
    assert named(examine(Evidence(summary=one, leaders=[leader]))) == expected


def test_sixty_random_trials_are_enough_for_any_number_of_parameters() -> None:
    leader = Leader(number=0, value=0.9, params=dict.fromkeys("abcdefghijklmnop", 0))
    enough = summary(counts={"complete": 59, "running": 0}, budget=59, spent=59)
    assert examine(Evidence(summary=enough, leaders=[leader])) == []


def test_ties_are_told_with_the_noise_and_repeats_of_one_configuration_are_none() -> None:
    values = [0.99, 0.99, 0.9863, 0.98]
    leaders = [Leader(number=n, value=value, params={"x": n}) for n, value in enumerate(values)]
    enough = summary(counts={"complete": 60, "running": 0}, budget=60, spent=60)
    one = Evidence(summary=enough, leaders=leaders)
    [finding] = examine(one)
    assert finding.text == "1 other trial has the best value, 0.9900, so which one leads is chance."
    [finding] = examine(replace(one, noise=noise.of_one_item("accuracy", 270)))
    assert finding.text == (
        "2 other trials have the best value, 0.9900, or differ from it by at most one of 270 validation examples, "
        "so which one leads is chance."
    )
    assert finding.mend == "Train the leaders again with other seeds."
    [finding] = examine(replace(one, can_confirm=True))
    assert finding.mend == "hpo confirm digits trains the leaders again with other seeds and says which is best."
    assert examine(replace(one, is_confirmed=True)) == []
    repeated = [replace(leader, params={"x": 0}) for leader in leaders]
    assert examine(replace(one, leaders=repeated)) == []


def test_the_word_for_a_confirmation_is_that_of_its_module() -> None:
    assert evidence.SISTER == confirmation.SUFFIX


def test_with_several_objectives_only_failures_are_told() -> None:
    failed = [FailureCount(kind="diverged", count=4, retried=0, message="")]
    several = summary(objectives={"loss": "minimize", "size": "minimize"}, failures=failed, counts={"pruned": 4})
    assert named(examine(Evidence(summary=several))) == ["failures"]


# --- parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "is_high", "after"),
    [
        (Range(low=1e-4, high=1e-1, log=True), True, Range(low=1e-4, high=1.0, log=True)),
        (Range(low=1e-4, high=1e-1, log=True), False, Range(low=1e-5, high=1e-1, log=True)),
        (Range(low=0.1, high=0.2, log=True), True, Range(low=0.1, high=0.4, log=True)),
        (Range(low=8, high=64, log=True), True, Range(low=8, high=512, log=True)),
        (Range(low=2, high=64, log=True), False, Range(low=1, high=64, log=True)),
        (Range(low=0.0, high=0.5), True, Range(low=0.0, high=0.75)),
        (Range(low=0.8, high=0.99), True, Range(low=0.8, high=0.995)),  # a share stays below 1
        (Range(low=0.2, high=0.5), False, Range(low=0.05, high=0.5)),
        (Range(low=0.1, high=0.5), False, Range(low=0.0, high=0.5)),
        (Range(low=-1.0, high=1.0), False, Range(low=-2.0, high=1.0)),
        (Range(low=2, high=6), True, Range(low=2, high=8)),
        (Range(low=2, high=3), True, Range(low=2, high=4)),
        (Range(low=32, high=128, step=32), True, Range(low=32, high=160, step=32)),
        (Range(low=0.5, high=1.5, step=0.25), True, Range(low=0.5, high=2.0, step=0.25)),
    ],
)
def test_a_range_is_widened_by_its_scale_and_its_steps(before: Range, is_high: bool, after: Range) -> None:
    wider = widened(before, is_high=is_high)
    assert wider == after
    assert wider.integer == before.integer


def test_the_ends_that_may_be_natural_are_0_a_whole_share_and_a_count_of_1() -> None:
    assert is_natural(Range(low=0.0, high=0.5), is_high=False)
    assert is_natural(Range(low=0.0, high=1.0), is_high=True)
    assert is_natural(Range(low=1, high=8), is_high=False)
    assert not is_natural(Range(low=1e-4, high=0.1, log=True), is_high=False)
    assert not is_natural(Range(low=1, high=8), is_high=True)


def test_the_correlation_among_survivors_is_corrected_to_that_among_all() -> None:
    """Of 4000 pairs with a correlation of 0.6 the better third has less than 0.42; the correction finds that of all again."""
    source = np.random.default_rng(0)
    then = source.normal(size=4000)
    finals = 0.6 * then + 0.8 * source.normal(size=4000)
    everyone, better = np.ones(4000, bool), then > np.quantile(then, 2 / 3)
    whole = correlation(then, finals, everyone, everyone)
    assert whole == pytest.approx(0.6, abs=0.02)
    assert correlation(then, finals, better, better) < 0.42
    assert correlation(then, np.where(better, finals, math.nan), everyone, better) == pytest.approx(whole, abs=0.05)


def test_pruned_trials_are_compared_where_they_were_and_not_beyond(lite: Storage) -> None:
    """Half of the trials are pruned at step 4. Their later values are not made up: the pairs are the other half."""
    made = Search(misleads=True, trials=100, seed=0, is_local=False).made()
    ordered = sorted(made, key=lambda trial: trial.intermediate_values[4])
    for trial in ordered[50:]:
        trial.state, trial.values = TrialState.PRUNED, [trial.intermediate_values[4]]
        trial.intermediate_values = {step: value for step, value in trial.intermediate_values.items() if step <= 4}
    [finding] = [one for one in examine(seen(lite, made)) if one.name == "rungs mislead the pruner"]
    assert finding.text.endswith("from 50 trials.")


def test_whole_steps_have_their_own_share_of_a_range(lite: Storage) -> None:
    """All of the best with the upper one of two values is chance in one study of 16; with the highest of 40 it is not."""
    few, many = Range(low=1, high=2), Range(low=1, high=40)
    for parameter, expected in ((few, []), (many, ["near a bound"])):
        best = [Leader(number=n, value=1.0 - n, params={"x": parameter.high}) for n in range(5)]
        one = summary(counts={"complete": 60, "running": 0}, budget=60, spent=60)
        assert named(examine(Evidence(summary=one, leaders=best, best=best, space={"x": parameter}))) == expected


def test_an_integer_distribution_is_read_as_a_range_of_whole_numbers(lite: Storage) -> None:
    distributions = {"x": IntDistribution(1, 40), "y": CategoricalDistribution((True, None))}
    trials = [
        create_trial(params={"x": 1 + n, "y": None}, distributions=distributions, value=float(n)) for n in range(12)
    ]
    found = seen(lite, trials)
    assert found.space["x"] == Range(low=1, high=40)
    assert found.space["x"].integer
    assert [one.number for one in found.leaders[:3]] == [0, 1, 2]
    assert found.best == []  # a tenth of 12 trials is too few
