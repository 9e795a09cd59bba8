"""Our storage and Optuna's own RDBStorage on one database at the same time: each sees what the other wrote.

Optuna's RDBStorage is taken plain, without the cache that a study puts before it: it reads every row anew and so says what
is in the database. Ours is opened once and lives through everything, for what it keeps in memory is what could be old.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from hpo.storage import tables
from hpo.storage.connect import Storage, connect, plain_url
from tests.support import racing

pytestmark = pytest.mark.both

MINIMIZE, MAXIMIZE = StudyDirection.MINIMIZE, StudyDirection.MAXIMIZE
DISTRIBUTIONS = {
    "x": FloatDistribution(0.0, 1.0),
    "lr": FloatDistribution(1e-6, 1.0, log=True),
    "n": IntDistribution(1, 9),
    "c": CategoricalDistribution(["a", None, 3, 0.5, True]),
}
Written = list[dict[str, Any]]  # trials, in words that compare even where a value is not a number


@pytest.fixture
def plain(place: Storage) -> Iterator[BaseStorage]:
    """Optuna's own storage on the database of `place`."""
    with racing.opened(plain_url(place.url), "plain") as opened:
        yield opened


def written(trial: FrozenTrial) -> dict[str, Any]:
    """Return all of a trial; `repr` tells -0.0 from 0.0 and 1 from 1.0, and two NaNs are alike."""
    return {
        "ids": (trial._trial_id, trial.number),
        "state": trial.state,
        "values": repr(trial.values),
        "times": (trial.datetime_start, trial.datetime_complete),
        "params": [repr(item) for item in trial.params.items()],  # in the order in which they were suggested
        "distributions": [repr(item) for item in trial.distributions.items()],
        "curve": repr(sorted(trial.intermediate_values.items())),
        "user": repr(sorted(trial.user_attrs.items())),
        "system": repr(sorted(trial.system_attrs.items())),
    }


def trials_in(place: BaseStorage, study_id: int, **which: Any) -> Written:
    return [written(trial) for trial in place.get_all_trials(study_id, **which)]


def answer(ask: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a storage answers, or the kind of its error."""
    try:
        return ask(*arguments)
    except (KeyError, ValueError, RuntimeError) as error:
        return type(error)


def everything(place: BaseStorage, study_id: int) -> dict[str, Any]:
    """Return all that a storage says about a study."""
    trials = place.get_all_trials(study_id)
    ids = [trial._trial_id for trial in trials]
    best = answer(place.get_best_trial, study_id)
    return {
        "trials": [written(trial) for trial in trials],
        "one by one": [written(place.get_trial(trial_id)) for trial_id in ids],
        "shared": trials_in(place, study_id, deepcopy=False),
        "by state": [trials_in(place, study_id, states=(state,)) for state in TrialState],
        "counts": [place.get_n_trials(study_id, state) for state in (None, *TrialState)],
        "numbers": [place.get_trial_number_from_id(trial_id) for trial_id in ids],
        "ids": [place.get_trial_id_from_study_id_trial_number(study_id, trial.number) for trial in trials],
        "params": [repr(place.get_trial_params(trial_id)) for trial_id in ids],
        "internal": [place.get_trial_param(t._trial_id, name) for t in trials for name in t.params],
        "user": [repr(sorted(place.get_trial_user_attrs(trial_id).items())) for trial_id in ids],
        "system": [repr(sorted(place.get_trial_system_attrs(trial_id).items())) for trial_id in ids],
        "best": best if isinstance(best, type) else best.value,
        "of the study": (
            place.get_study_name_from_id(study_id),
            place.get_study_directions(study_id),
            repr(sorted(place.get_study_user_attrs(study_id).items())),
            repr(sorted(place.get_study_system_attrs(study_id).items())),
        ),
    }


def studies_in(place: BaseStorage) -> list[Any]:
    return [
        (study._study_id, study.study_name, study.directions, study.user_attrs, study.system_attrs)
        for study in place.get_all_studies()
    ]


def rewrite(place: Storage, trial_id: int, keep: int, curve: dict[int, float]) -> None:
    """Take away a trial's curve after a step and write another, in one transaction as our ledger does."""
    table = tables.intermediate_values
    rows = []
    for step, value in curve.items():
        number, kind = tables.stored(value)
        rows.append({"trial_id": trial_id, "step": step, "intermediate_value": number, "intermediate_value_type": kind})
    with place.engine.begin() as connection:
        connection.execute(table.delete().where(table.c.trial_id == trial_id, table.c.step > keep))
        if rows:
            connection.execute(table.insert(), rows)


# --- at random ------------------------------------------------------------------------------------------------------


class Play:
    """Random acts on a few studies, each by one of the storages, ours or Optuna's."""

    def __init__(self, place: Storage, writers: list[BaseStorage], rng: random.Random, *, deletes: bool) -> None:
        self.place = place
        self.writers = writers
        self.witness = writers[-1]  # who says which studies and trials there are
        self.rng = rng
        self.names = iter(range(1000))
        self.acts = [self.trial, self.trial, self.param, self.report, self.report, self.attribute, self.state]
        self.acts += [self.state, self.study_attribute, self.cut_back] + [self.new_study] * deletes
        if deletes:
            self.acts.append(self.delete_study)
        for _ in range(2):
            self.new_study()

    @property
    def writer(self) -> BaseStorage:
        return self.rng.choice(self.writers)

    @property
    def studies(self) -> list[int]:
        return [study._study_id for study in self.witness.get_all_studies()]

    def value(self) -> float:
        return self.rng.choice([self.rng.uniform(-1, 1)] * 4 + [math.nan, math.inf, -math.inf, -0.0])

    def any_trial(self) -> FrozenTrial | None:
        trials = self.witness.get_all_trials(self.rng.choice(self.studies))
        unfinished = [trial for trial in trials if not trial.state.is_finished()]
        chosen = unfinished if self.rng.random() < 0.9 else trials
        return self.rng.choice(chosen) if chosen else None

    def act(self) -> None:
        self.rng.choice(self.acts)()

    def on_a_trial(self, change: Callable[[int], Any]) -> None:
        """Change a trial; a finished one is refused, also by a storage that has last seen it running."""
        trial = self.any_trial()
        if trial is None:
            return
        if trial.state.is_finished():
            with pytest.raises(UpdateFinishedTrialError):
                change(trial._trial_id)
        else:
            change(trial._trial_id)

    def new_study(self) -> None:
        name = f"study {next(self.names)}"
        study_id = self.writer.create_new_study([self.rng.choice([MINIMIZE, MAXIMIZE])], name)
        for _ in range(self.rng.randint(0, 3)):
            self.writer.create_new_trial(study_id, self.template())

    def delete_study(self) -> None:
        if len(self.studies) > 1:
            self.writer.delete_study(max(self.studies))  # whose ids SQLite gives to the next one

    def template(self) -> FrozenTrial | None:
        rng = self.rng
        state = rng.choice([None, *TrialState])
        if state is None:
            return None
        names = rng.sample(list(DISTRIBUTIONS), rng.randint(0, 4))
        return optuna.create_trial(
            state=state,
            value=rng.random() if state == TrialState.COMPLETE else None,
            params={name: self.drawn(name) for name in names},
            distributions={name: DISTRIBUTIONS[name] for name in names},
            user_attrs={key: self.word() for key in rng.sample("abc", rng.randint(0, 3))},
            system_attrs={key: self.word() for key in rng.sample("abc", rng.randint(0, 3))},
            intermediate_values={step: self.value() for step in rng.sample(range(9), rng.randint(0, 5))},
        )

    def drawn(self, name: str) -> Any:
        distribution: Any = DISTRIBUTIONS[name]
        match distribution:
            case CategoricalDistribution():
                return self.rng.choice(distribution.choices)
            case IntDistribution():
                return self.rng.randint(distribution.low, distribution.high)
        return self.rng.uniform(distribution.low, distribution.high)

    def word(self) -> Any:
        return self.rng.choice([None, 1, 0.5, "ä'\"\n", {"k": [1, {"deep": "x" * 3000}]}, [], "1", True])

    def trial(self) -> None:
        self.writer.create_new_trial(self.rng.choice(self.studies), self.template())

    def param(self) -> None:
        writer = self.writer
        trial = self.any_trial()
        if trial is None or trial.state.is_finished():
            return
        for name in self.rng.sample(list(DISTRIBUTIONS), 4):
            if name not in trial.params:
                internal = DISTRIBUTIONS[name].to_internal_repr(self.drawn(name))
                writer.set_trial_param(trial._trial_id, name, internal, DISTRIBUTIONS[name])
                return

    def report(self) -> None:
        writer, step, value = self.writer, self.rng.randint(0, 9), self.value()
        self.on_a_trial(lambda trial_id: writer.set_trial_intermediate_value(trial_id, step, value))

    def attribute(self) -> None:
        writer = self.writer
        write = self.rng.choice([writer.set_trial_user_attr, writer.set_trial_system_attr])
        key, word = self.rng.choice("abc"), self.word()
        self.on_a_trial(lambda trial_id: write(trial_id, key, word))

    def state(self) -> None:
        writer = self.writer
        state = self.rng.choice(list(TrialState))
        values = [self.rng.random()] if state == TrialState.COMPLETE else None
        self.on_a_trial(lambda trial_id: writer.set_trial_state_values(trial_id, state, values))

    def study_attribute(self) -> None:
        writer = self.writer
        write = self.rng.choice([writer.set_study_user_attr, writer.set_study_system_attr])
        write(self.rng.choice(self.studies), self.rng.choice("abc"), self.word())

    def cut_back(self) -> None:
        """Take away a running trial's last steps and its system attributes, and mostly report other values there."""
        trial = self.any_trial()
        if trial is None or trial.state != TrialState.RUNNING:
            return
        keep = self.rng.randint(-1, 5)
        again = [step for step in trial.intermediate_values if step > keep and self.rng.random() < 0.8]
        rewrite(self.place, trial._trial_id, keep, {step: self.value() for step in again})
        attributes = tables.trial_system_attributes
        with self.place.engine.begin() as connection:
            connection.execute(attributes.delete().where(attributes.c.trial_id == trial._trial_id))


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.soak) for seed in (1, 2))])
def test_a_storage_of_ours_that_lives_long_sees_all_that_either_writes(
    place: Storage, plain: BaseStorage, seed: int
) -> None:
    play = Play(place, [place.optuna, plain], random.Random(seed), deletes=True)
    gone: set[int] = set()
    seen: set[int] = set()
    for step in range(100 if seed else 30):
        play.act()
        assert studies_in(place.optuna) == studies_in(plain)
        gone, seen = seen - set(play.studies), seen | set(play.studies)
        for study_id in play.studies:
            assert trials_in(place.optuna, study_id) == trials_in(plain, study_id), f"step {step}"
        for study_id in gone:
            with pytest.raises(KeyError):
                place.optuna.get_all_trials(study_id)
        if step % 10 == 0:
            for study_id in play.studies:
                assert everything(place.optuna, study_id) == everything(plain, study_id), f"step {step}"


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.soak)])
def test_a_storage_of_optunas_that_lives_long_sees_all_that_ours_writes(place: Storage, seed: int) -> None:
    """As a study of plain Optuna holds it, with its cache, which knows of no study that was deleted elsewhere."""
    url = plain_url(place.url)
    with racing.opened(url, "cached") as cached, racing.opened(url, "plain") as plain:
        play = Play(place, [place.optuna], random.Random(seed), deletes=False)
        for step in range(60 if seed else 25):
            play.act()
            # Without a cache, Optuna's storage reads all anew each time.
            with racing.opened(url, "ours") if step % 6 == 0 else nullcontext(plain) as fresh:
                assert studies_in(fresh) == studies_in(cached)
                for study_id in play.studies:
                    assert trials_in(cached, study_id) == trials_in(fresh, study_id), f"step {step}"
        for study_id in play.studies:
            assert everything(cached, study_id) == everything(place.optuna, study_id) == everything(plain, study_id)


# --- what is hardest to see -----------------------------------------------------------------------------------------


def test_a_curve_rewritten_at_the_same_steps_is_seen(place: Storage, plain: BaseStorage) -> None:
    """On SQLite the new rows have the ids of the old ones: neither their number nor the last of them has changed."""
    study_id = place.optuna.create_new_study([MINIMIZE])
    trial_id = plain.create_new_trial(study_id)
    for step in (1, 2, 3):
        plain.set_trial_intermediate_value(trial_id, step, 0.1)
    for values in ([0.4, 0.5], [math.nan, 0.6], [0.7, math.inf], [0.8]):
        place.optuna.get_all_trials(study_id)
        rewrite(place, trial_id, 1, dict(enumerate(values, start=2)))
        expected = {1: 0.1} | dict(enumerate(values, start=2))
        assert repr(sorted(place.optuna.get_trial(trial_id).intermediate_values.items())) == repr(
            sorted(expected.items())
        )
        assert trials_in(place.optuna, study_id) == trials_in(plain, study_id)


def again(place: BaseStorage, direction: StudyDirection, template: FrozenTrial | None) -> tuple[int, list[int]]:
    """Make a study of the same name with three trials: after a deletion, SQLite gives it the ids of the one before."""
    study_id = place.create_new_study([direction], "again")
    return study_id, [place.create_new_trial(study_id, template) for _ in range(3)]


STATES_AND_STARTS = [
    (TrialState.COMPLETE, True),
    (TrialState.RUNNING, True),
    (TrialState.WAITING, False),
    (TrialState.FAIL, False),  # a queued trial that was failed before it started
]


@pytest.mark.parametrize(("state", "has_started"), STATES_AND_STARTS)
def test_a_study_with_deleted_ids_has_none_of_their_trials(
    place: Storage, plain: BaseStorage, state: TrialState, has_started: bool
) -> None:
    """A study that got the ids of a deleted one has none of its trials."""
    for value in (0.1, 0.2, 0.3):
        template = optuna.create_trial(
            state=state, value=value if state == TrialState.COMPLETE else None, user_attrs={"v": value}
        )
        template.datetime_start = template.datetime_start if has_started else None
        study_id, ids = again(plain, MINIMIZE, template)
        assert trials_in(place.optuna, study_id) == trials_in(plain, study_id)
        assert [written(place.optuna.get_trial(trial_id)) for trial_id in ids] == trials_in(plain, study_id)
        assert place.optuna.get_n_trials(study_id, state) == 3
        plain.delete_study(study_id)
        with pytest.raises(KeyError):
            place.optuna.get_all_trials(study_id)


def test_a_finished_trial_is_forgotten_with_its_study(place: Storage, plain: BaseStorage) -> None:
    """Its id is now that of a trial of another study, which had been there all along."""
    first, _ = again(plain, MINIMIZE, optuna.create_trial(value=0.5))
    other = plain.create_new_study([MINIMIZE], "other")
    place.optuna.get_all_trials(first)
    place.optuna.get_all_trials(other)
    plain.delete_study(first)
    fresh = plain.create_new_trial(other)
    assert written(place.optuna.get_trial(fresh)) == written(plain.get_trial(fresh))
    assert place.optuna.get_trial_params(fresh) == {}
    assert trials_in(place.optuna, other) == trials_in(plain, other)


def test_a_study_with_a_deleted_one_s_id_has_its_own_name(place: Storage, plain: BaseStorage) -> None:
    """A study that got the id of a deleted one has its own name and directions."""
    for name, directions in [("a", [MINIMIZE]), ("b", [MAXIMIZE]), ("c", [MAXIMIZE, MINIMIZE])]:
        study_id = plain.create_new_study(directions, name)
        assert place.optuna.get_study_name_from_id(study_id) == name
        assert place.optuna.get_study_directions(study_id) == directions
        plain.delete_study(study_id)
        with pytest.raises(KeyError):
            place.optuna.get_study_name_from_id(study_id)


def test_parameters_of_a_deleted_study_bind_none_that_got_its_ids(place: Storage, plain: BaseStorage) -> None:
    for distribution in (DISTRIBUTIONS["x"], DISTRIBUTIONS["c"], DISTRIBUTIONS["n"]):
        study_id, ids = again(plain, MINIMIZE, None)
        for trial_id in ids:
            place.optuna.set_trial_param(trial_id, "p", 1, distribution)
        assert trials_in(place.optuna, study_id) == trials_in(plain, study_id)
        plain.delete_study(study_id)


def test_steps_that_fill_64_bits_are_read(tmp_path: Path) -> None:
    place = connect(f"sqlite:///{tmp_path}/studies.db", create=True)  # Postgres refuses them
    study_id = place.optuna.create_new_study([MINIMIZE], "tokens")
    trial_id = place.optuna.create_new_trial(study_id)
    for step, value in ((3_000_000_000, 0.5), (2, 0.25)):
        place.optuna.set_trial_intermediate_value(trial_id, step, value)
    for state in (TrialState.RUNNING, TrialState.COMPLETE):
        if state == TrialState.COMPLETE:
            place.optuna.set_trial_state_values(trial_id, state, [1.0])
        (trial,) = place.optuna.get_all_trials(study_id)
        assert trial.intermediate_values == {2: 0.25, 3_000_000_000: 0.5}
        assert place.optuna.columns(study_id).complete == int(state == TrialState.COMPLETE)
    place.close()


def test_a_study_that_another_has_deleted_is_gone(place: Storage, plain: BaseStorage) -> None:
    study_id, ids = again(place.optuna, MINIMIZE, optuna.create_trial(state=TrialState.RUNNING))
    place.optuna.set_trial_param(ids[0], "x", 0.5, DISTRIBUTIONS["x"])
    place.optuna.get_all_trials(study_id)
    plain.delete_study(study_id)
    for ask in (
        lambda: place.optuna.get_all_trials(study_id),
        lambda: place.optuna.get_n_trials(study_id),
        lambda: place.optuna.create_new_trial(study_id),
        lambda: place.optuna.delete_study(study_id),
        lambda: place.optuna.set_study_user_attr(study_id, "k", 1),
        lambda: place.optuna.get_study_user_attrs(study_id),
        lambda: place.optuna.get_trial(ids[0]),
        lambda: place.optuna.set_trial_param(ids[0], "y", 0.5, DISTRIBUTIONS["x"]),
        lambda: place.optuna.set_trial_user_attr(ids[0], "k", 1),
        lambda: place.optuna.set_trial_intermediate_value(ids[0], 1, 0.5),
        lambda: place.optuna.set_trial_state_values(ids[0], TrialState.FAIL),
    ):
        with pytest.raises(KeyError):
            ask()
    assert place.optuna.get_all_studies() == []


def test_a_trial_that_our_storage_has_never_seen_can_be_written_to(place: Storage, plain: BaseStorage) -> None:
    study_id = plain.create_new_study([MINIMIZE])
    trial_id = plain.create_new_trial(study_id)
    place.optuna.set_trial_param(trial_id, "x", 0.5, DISTRIBUTIONS["x"])
    place.optuna.set_trial_intermediate_value(trial_id, 1, 0.25)
    place.optuna.set_trial_system_attr(trial_id, "k", [1])
    assert place.optuna.set_trial_state_values(trial_id, TrialState.COMPLETE, [0.125])
    [trial] = plain.get_all_trials(study_id)
    assert (trial.params, trial.intermediate_values, trial.system_attrs) == ({"x": 0.5}, {1: 0.25}, {"k": [1]})
    assert (trial.state, trial.value) == (TrialState.COMPLETE, 0.125)


def test_a_trial_that_another_has_finished_is_refused(place: Storage, plain: BaseStorage) -> None:
    study_id = place.optuna.create_new_study([MINIMIZE])
    trial_id = place.optuna.create_new_trial(study_id)
    assert place.optuna.get_trial(trial_id).state == TrialState.RUNNING
    plain.set_trial_state_values(trial_id, TrialState.COMPLETE, [0.5])
    before = trials_in(plain, study_id)
    for write in (
        lambda: place.optuna.set_trial_param(trial_id, "x", 0.5, DISTRIBUTIONS["x"]),
        lambda: place.optuna.set_trial_intermediate_value(trial_id, 1, 0.5),
        lambda: place.optuna.set_trial_user_attr(trial_id, "k", 1),
        lambda: place.optuna.set_trial_system_attr(trial_id, "k", 1),
        lambda: place.optuna.set_trial_state_values(trial_id, TrialState.FAIL),
        lambda: place.optuna.set_trial_state_values(trial_id, TrialState.RUNNING),
    ):
        with pytest.raises(UpdateFinishedTrialError):
            write()
    assert trials_in(plain, study_id) == before == trials_in(place.optuna, study_id)


@pytest.mark.parametrize("first", ["ours", "optuna's"])
def test_a_parameter_of_another_kind_than_the_other_wrote_is_refused(
    place: Storage, plain: BaseStorage, first: str
) -> None:
    one, other = (place.optuna, plain) if first == "ours" else (plain, place.optuna)
    study_id = place.optuna.create_new_study([MINIMIZE])
    trials = [place.optuna.create_new_trial(study_id), place.optuna.create_new_trial(study_id)]
    other.get_all_trials(study_id)
    one.set_trial_param(trials[0], "x", 0.5, DISTRIBUTIONS["x"])
    for distribution in (DISTRIBUTIONS["n"], CategoricalDistribution([0.5, 0.6])):
        with pytest.raises(ValueError):
            other.set_trial_param(trials[1], "x", 1, distribution)
    other.set_trial_param(trials[1], "x", 1.5, FloatDistribution(1.0, 2.0))  # another range of the same kind is let in
    assert trials_in(place.optuna, study_id) == trials_in(plain, study_id)


def test_a_name_that_the_other_has_taken_is_refused(place: Storage, plain: BaseStorage) -> None:
    for one, other, name in [(place.optuna, plain, "a"), (plain, place.optuna, "b")]:
        one.create_new_study([MINIMIZE], name)
        with pytest.raises(optuna.exceptions.DuplicatedStudyError):
            other.create_new_study([MAXIMIZE], name)
    assert [study.study_name for study in place.optuna.get_all_studies()] == ["a", "b"]


def test_two_objectives_are_read_as_optuna_reads_them(place: Storage, plain: BaseStorage) -> None:
    for writer in (place.optuna, plain):
        study_id = writer.create_new_study([MINIMIZE, MAXIMIZE])
        running = writer.create_new_trial(study_id)
        writer.set_trial_state_values(running, TrialState.COMPLETE, [0.5, math.inf])
        writer.create_new_trial(study_id, optuna.create_trial(values=[-math.inf, 2.0]))
        assert everything(place.optuna, study_id) == everything(plain, study_id)
        found = optuna.load_study(study_name=writer.get_study_name_from_id(study_id), storage=place.optuna)
        assert [trial.values for trial in found.best_trials] == [[0.5, math.inf], [-math.inf, 2.0]]


# --- races ----------------------------------------------------------------------------------------------------------


def test_trials_of_four_processes_are_numbered_without_a_gap(place: Storage) -> None:
    """Half of them by ours and half by Optuna's own, each 25."""
    study_id = place.optuna.create_new_study([MINIMIZE])
    done = optuna.create_trial(value=1.0, params={"x": 0.5}, distributions={"x": DISTRIBUTIONS["x"]})
    kinds = ["ours", "plain", "ours", "cached"]
    templates = [None, done, None, None, done] * 5
    url = plain_url(place.url)
    made = racing.race(racing.create, [url] * 4, kinds, [study_id] * 4, [templates] * 4)
    assert sorted(number for mine in made for _, number in mine) == list(range(100))
    trials = place.optuna.get_all_trials(study_id)
    assert [trial.number for trial in trials] == list(range(100))
    assert {(trial._trial_id, trial.number) for trial in trials} == {pair for mine in made for pair in mine}


def test_a_waiting_trial_that_two_processes_reach_for_is_run_once(place: Storage) -> None:
    """Optuna's own hands one out twice on SQLite, where it reads the state before it has the lock."""
    study_id = place.optuna.create_new_study([MINIMIZE])
    waiting = optuna.create_trial(state=TrialState.WAITING)
    ids = [place.optuna.create_new_trial(study_id, waiting) for _ in range(100)]
    kinds = ["ours", "ours" if place.is_sqlite else "plain"]
    got = racing.race(racing.pop, [plain_url(place.url)] * 2, kinds, [ids] * 2)
    assert sorted(got[0] + got[1]) == ids
    assert {trial.state for trial in place.optuna.get_all_trials(study_id)} == {TrialState.RUNNING}


# --- Optuna's programs ----------------------------------------------------------------------------------------------


@pytest.fixture
def root_logger() -> Iterator[None]:
    """Take from the root logger what `optuna` adds: a handler on a stream that pytest closes, and the level DEBUG."""
    root = logging.getLogger()
    level, handlers = root.level, set(root.handlers)
    yield
    root.setLevel(level)
    for handler in set(root.handlers) - handlers:
        root.removeHandler(handler)


@pytest.fixture
def cli(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: Storage, root_logger: None
) -> Callable[..., Any]:
    """Run `optuna COMMAND --storage URL ... -f json` and return what it printed."""
    from optuna import cli

    def run(command: str, *arguments: str) -> Any:
        capsys.readouterr()
        line = ["optuna", command, "--storage", plain_url(place.url), *arguments, "-f", "json"]
        monkeypatch.setattr("sys.argv", line)
        assert cli.main() == 0
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # which the command has set to its own taste
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            gc.collect()  # its connections, which it leaves open for the end of a process
        return json.loads(capsys.readouterr().out)

    return run


@pytest.mark.parametrize(
    "storage_kind", ["sqlite", pytest.param("postgres", marks=pytest.mark.soak)], indirect=True
)  # Optuna's programs ask the same of either
def test_optuna_s_command_line_beside_ours(place: Storage, cli: Callable[..., Any]) -> None:
    """Optuna's command line shows a study of ours and ours the trials it makes."""
    study = optuna.create_study(storage=place.optuna, study_name="demo", direction="maximize")
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1) + trial.number, n_trials=3)
    shown = cli("trials", "--study-name", "demo")
    assert [(row["number"], row["state"], row["value"], row["params"]) for row in shown] == [
        (trial.number, "COMPLETE", trial.value, trial.params) for trial in study.trials
    ]
    assert [(row["name"], row["n_trials"]) for row in cli("studies")] == [("demo", 3)]
    assert cli("best-trial", "--study-name", "demo")["number"] == 2
    space = json.dumps(
        {"x": {"name": "FloatDistribution", "attributes": {"low": 0, "high": 1, "step": None, "log": False}}}
    )
    asked = cli("ask", "--study-name", "demo", "--search-space", space)
    assert study.trials[-1].state == TrialState.RUNNING
    assert (study.trials[-1].number, study.trials[-1].params) == (asked["number"], asked["params"])
    study.tell(asked["number"], 9.0)
    assert cli("best-trial", "--study-name", "demo")["value"] == 9.0


def test_a_study_of_ours_is_loaded_and_evaluated_by_url_alone(place: Storage) -> None:
    study = optuna.create_study(storage=place.optuna, study_name="demo", sampler=optuna.samplers.RandomSampler(seed=1))
    study.optimize(lambda trial: 10 * trial.suggest_float("x", 0, 1) + trial.suggest_float("y", 0, 1), n_trials=20)
    with racing.opened(plain_url(place.url), "cached") as theirs:
        loaded = optuna.load_study(study_name="demo", storage=theirs)
        assert written(loaded.best_trial) == written(study.best_trial)
        assert written(study.best_trial) == written(min(study.trials, key=lambda trial: trial.values[0]))
        assert [written(trial) for trial in loaded.trials] == [written(trial) for trial in study.trials]
        evaluate = optuna.importance.PedAnovaImportanceEvaluator
        importances = [optuna.importance.get_param_importances(one, evaluator=evaluate()) for one in (study, loaded)]
        assert importances[0] == importances[1]
        assert list(importances[0]) == ["x", "y"]
        copied = optuna.copy_study(
            from_study_name="demo", from_storage=place.optuna, to_storage=theirs, to_study_name="copy"
        )
    assert copied is None
    assert [trial.params for trial in optuna.load_study(study_name="copy", storage=place.optuna).trials] == [
        trial.params for trial in study.trials
    ]
    [summary, _] = optuna.get_all_study_summaries(place.optuna)
    assert (summary.study_name, summary.n_trials, summary.best_trial.number) == ("demo", 20, study.best_trial.number)


def test_a_data_frame_is_made_of_a_study_of_ours(place: Storage) -> None:
    pytest.importorskip("pandas")
    study = optuna.create_study(storage=place.optuna)
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=3)
    frame = study.trials_dataframe()
    assert frame["value"].tolist() == frame["params_x"].tolist() == [trial.value for trial in study.trials]
