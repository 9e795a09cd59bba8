"""A failing storage is borne for a while, and nothing is done twice for it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage
from optuna.trial import TrialState

from hpo.errors import LostLease, NoAnswer, Outage, StorageBusy
from hpo.storage import retry
from hpo.storage.connect import OUTAGES, Storage, connect
from hpo.storage.optuna_storage import OptunaStorage
from hpo.storage.retry import Retry, within
from tests.support.trials import MakeStudy, begin, finish_claim
from tests.support.waiting import PATIENCE, wait_for

ATTRIBUTE = "INSERT INTO trial_user_attributes"  # somewhere in the statement
MAXIMIZE = optuna.study.StudyDirection.MAXIMIZE
FLOAT = optuna.distributions.FloatDistribution(0, 1)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(retry, "LONGEST_PAUSE_SECONDS", 0.04)


def closed() -> sa.exc.OperationalError:
    return sa.exc.OperationalError("SELECT", {}, Exception("the server closed the connection"))


class Clock:
    """A clock that only pauses move: so a busy machine makes no try late."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(retry, "time", found)
    return found


class Failing:
    """An action that fails so often, and then works."""

    def __init__(self, times: float, error: Callable[[], BaseException] = closed) -> None:
        self.times = times
        self.error = error
        self.calls = 0

    def __call__(self) -> str:
        self.calls += 1
        if self.calls <= self.times:
            raise self.error()
        return "done"


# --- patience ---------------------------------------------------------------------------------------------------------


def test_what_works_is_done_once() -> None:
    action = Failing(0)
    assert Retry(60.0)(action) == "done"
    assert action.calls == 1


def of_kind(kind: type[Exception]) -> Exception:
    return kind("SELECT", {}, Exception("boom")) if issubclass(kind, sa.exc.DBAPIError) else kind("boom")


@pytest.mark.parametrize("kind", OUTAGES)
def test_every_kind_of_outage_is_borne_until_the_storage_works_again(kind: type[Exception]) -> None:
    action = Failing(3, lambda: of_kind(kind))
    assert Retry(60.0)(action) == "done"
    assert action.calls == 4


def test_an_outage_is_told_once_and_in_the_driver_s_words(caplog: pytest.LogCaptureFixture) -> None:
    retry = Retry(60.0)
    retry(Failing(3))
    assert caplog.text.count("the storage fails, waiting for it: the server closed the connection") == 1
    retry(Failing(1))
    assert caplog.text.count("waiting for it") == 2  # another outage


def test_retry_ends_with_an_outage_that_names_the_cause(clock: Clock) -> None:
    action = Failing(float("inf"))
    with pytest.raises(Outage, match=r"^the server closed the connection$") as raised:
        Retry(0.3)(action)
    assert 0.3 <= clock.now < 0.3 + retry.LONGEST_PAUSE_SECONDS
    assert isinstance(raised.value.__cause__, sa.exc.OperationalError)
    assert action.calls > 3


def test_no_retry_is_one_try() -> None:
    action = Failing(1)
    with pytest.raises(Outage):
        Retry(0.0)(action)
    assert action.calls == 1


@pytest.mark.usefixtures("clock")
def test_retry_begins_anew_with_every_action() -> None:
    retry = Retry(0.2)
    for _ in range(3):
        with pytest.raises(Outage):
            retry(Failing(float("inf")))
        assert retry(Failing(2)) == "done"


def test_a_process_that_was_asked_to_stop_bears_little(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    monkeypatch.setattr(retry, "STOPPING_SECONDS", 0.2)
    with pytest.raises(Outage):
        Retry(3600.0, lambda: True)(Failing(float("inf")))
    assert 0.2 <= clock.now < 0.2 + retry.LONGEST_PAUSE_SECONDS
    assert Retry(3600.0, lambda: True)(Failing(2)) == "done"  # but not nothing


def test_a_process_that_stops_bears_no_more_than_it_would_have(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    monkeypatch.setattr(retry, "STOPPING_SECONDS", 3600.0)
    with pytest.raises(Outage):
        Retry(0.1, lambda: True)(Failing(float("inf")))
    assert 0.1 <= clock.now < 0.1 + retry.LONGEST_PAUSE_SECONDS


def test_a_stop_that_comes_amid_an_outage_shortens_it(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    monkeypatch.setattr(retry, "STOPPING_SECONDS", 0.1)
    action = Failing(float("inf"))
    with pytest.raises(Outage):
        Retry(3600.0, lambda: action.calls > 3)(action)
    assert 0.1 <= clock.now < 0.1 + retry.LONGEST_PAUSE_SECONDS


@pytest.mark.parametrize(
    "error",
    [
        lambda: sa.exc.DataError("INSERT", {}, Exception("value too long")),
        lambda: sa.exc.IntegrityError("INSERT", {}, Exception("not unique")),
        lambda: sa.exc.ProgrammingError("SELECT", {}, Exception("no such table")),
        lambda: StorageInternalError("no outage behind it"),
        lambda: KeyError("no trial"),
        lambda: LostLease("another has it"),
        KeyboardInterrupt,
    ],
)
def test_what_no_waiting_mends_passes_at_once(error: Callable[[], BaseException]) -> None:
    action = Failing(1, error)
    with pytest.raises(type(error())):
        Retry(60.0)(action)
    assert action.calls == 1


def test_another_error_after_an_outage_passes_as_well() -> None:
    errors = iter([closed(), closed(), KeyError("no trial")])
    with pytest.raises(KeyError):
        Retry(60.0)(Failing(3, lambda: next(errors)))


def test_what_is_borne_can_be_chosen() -> None:
    retry = Retry(60.0, passing=(StorageBusy,))
    assert retry(Failing(2, lambda: StorageBusy("starting up"))) == "done"
    with pytest.raises(sa.exc.OperationalError):
        retry(Failing(2))


def test_suspended_retry_lets_an_outage_through() -> None:
    """Suspended patience lets an outage through and is itself again after."""
    retry = Retry(60.0)
    action = Failing(1)
    with pytest.raises(sa.exc.OperationalError), retry.without_retry(60.0):
        retry(action)
    assert action.calls == 1
    assert retry(Failing(2)) == "done"


def test_suspended_retry_waits_for_an_answer_so_long_and_no_longer() -> None:
    retry, answer = Retry(60.0), threading.Event()
    with pytest.raises(NoAnswer), retry.without_retry(0.05):
        retry(answer.wait)
    answer.set()
    assert retry(Failing(0)) == "done"


def test_retry_waits_only_between_two_tries() -> None:
    retry, seen, failing = Retry(60.0), [], threading.Event()

    def action() -> None:
        seen.append(retry.is_waiting)
        if not failing.is_set():
            raise closed()

    thread = threading.Thread(target=retry, args=(action,), daemon=True)
    assert not retry.is_waiting
    thread.start()
    wait_for(lambda: retry.is_waiting)
    failing.set()
    thread.join(PATIENCE)
    assert not retry.is_waiting
    assert set(seen) == {False}


def test_retry_that_ended_waits_no_more() -> None:
    retry = Retry(0.1)
    with pytest.raises(Outage):
        retry(Failing(float("inf")))
    assert not retry.is_waiting


# --- an answer in time ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("result", [1, None, False])
def test_a_result_in_time_is_returned(result: object) -> None:
    assert within(20.0, lambda: result) is result


@pytest.mark.parametrize("error", [ValueError("no"), closed(), LostLease("lost"), SystemExit(3)])
def test_an_error_in_time_is_raised(error: BaseException) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(type(error)) as raised:
        within(20.0, fail)
    assert raised.value is error


def test_calls_one_after_the_other_share_threads() -> None:
    assert len({within(20.0, threading.current_thread) for _ in range(20)}) < 20


def test_a_call_beside_one_that_hangs_has_a_thread_of_its_own() -> None:
    answer, threads = threading.Event(), []

    def hang() -> None:
        threads.append(threading.current_thread())
        answer.wait(PATIENCE)

    with pytest.raises(NoAnswer):
        within(0.1, hang)
    assert within(20.0, threading.current_thread) is not threads[0]
    answer.set()


def test_a_forked_child_calls_in_a_thread_of_its_own() -> None:
    """Its parent's threads are not in it."""
    within(20.0, threading.current_thread)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = within(20.0, lambda: 0)
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_no_answer_in_time_is_an_outage_and_the_action_may_still_be_done() -> None:
    answer, done = threading.Event(), threading.Event()

    def slow() -> None:
        answer.wait(PATIENCE)
        done.set()

    with pytest.raises(NoAnswer, match=r"no answer from the storage for 0\.1 s"):
        within(0.1, slow)
    assert not done.is_set()
    answer.set()
    assert done.wait(PATIENCE)
    assert NoAnswer in OUTAGES


def test_an_error_after_the_time_disturbs_nobody() -> None:
    answer, threads = threading.Event(), []

    def late() -> None:
        threads.append(threading.current_thread())
        answer.wait(PATIENCE)
        raise ValueError("too late")

    with pytest.raises(NoAnswer):
        within(0.1, late)
    answer.set()
    threads[0].join(PATIENCE)  # what a thread raises unheard is an error of every test here


# --- Optuna's storage -------------------------------------------------------------------------------------------------


@contextmanager
def cut(place: Storage, statement: str, at: Callable[[int], bool]) -> Iterator[list[str]]:
    """Cut the connection before statements that begin like this, by their number from 1; yield those that were tried."""
    tried: list[str] = []

    def fail(_: object, __: object, text: str, *others: object) -> None:
        if statement in text:
            tried.append(text)
            if at(len(tried)):
                raise closed()

    sa.event.listen(place.engine, "before_cursor_execute", fail)
    try:
        yield tried
    finally:
        sa.event.remove(place.engine, "before_cursor_execute", fail)


CALLS: dict[str, Callable[[OptunaStorage, int, int], object]] = {
    "create_new_study": lambda one, study, trial: one.create_new_study([MAXIMIZE], "other"),
    "delete_study": lambda one, study, trial: one.delete_study(study),
    "set_study_user_attr": lambda one, study, trial: one.set_study_user_attr(study, "key", 1),
    "set_study_system_attr": lambda one, study, trial: one.set_study_system_attr(study, "key", 1),
    "get_study_id_from_name": lambda one, study, trial: one.get_study_id_from_name("demo"),
    "get_study_name_from_id": lambda one, study, trial: one.get_study_name_from_id(study),
    "get_study_directions": lambda one, study, trial: one.get_study_directions(study),
    "get_study_user_attrs": lambda one, study, trial: one.get_study_user_attrs(study),
    "get_study_system_attrs": lambda one, study, trial: one.get_study_system_attrs(study),
    "get_all_studies": lambda one, study, trial: len(one.get_all_studies()),
    "create_new_trial": lambda one, study, trial: one.create_new_trial(study),
    "set_trial_param": lambda one, study, trial: one.set_trial_param(trial, "x", 0.5, FLOAT),
    "set_trial_state_values": lambda one, study, trial: one.set_trial_state_values(trial, TrialState.COMPLETE, [1.0]),
    "set_trial_intermediate_value": lambda one, study, trial: one.set_trial_intermediate_value(trial, 1, 0.5),
    "set_trial_user_attr": lambda one, study, trial: one.set_trial_user_attr(trial, "key", 1),
    "set_trial_system_attr": lambda one, study, trial: one.set_trial_system_attr(trial, "key", 1),
    "get_trial": lambda one, study, trial: one.get_trial(trial),
    "get_trial_id_from_study_id_trial_number": (
        lambda one, study, trial: one.get_trial_id_from_study_id_trial_number(study, 0)
    ),
    "get_trial_number_from_id": lambda one, study, trial: one.get_trial_number_from_id(trial),
    "get_trial_params": lambda one, study, trial: one.get_trial_params(trial),
    "get_trial_user_attrs": lambda one, study, trial: one.get_trial_user_attrs(trial),
    "get_trial_system_attrs": lambda one, study, trial: one.get_trial_system_attrs(trial),
    "get_all_trials": lambda one, study, trial: one.get_all_trials(study),
    "get_n_trials": lambda one, study, trial: one.get_n_trials(study),
    "columns": lambda one, study, trial: len(one.columns(study)),
    "view": lambda one, study, trial: one.view(study)[1],
}


@pytest.mark.parametrize("name", CALLS)
def test_every_call_of_a_storage_is_under_retry(place: Storage, name: str) -> None:
    study_id = place.optuna.create_new_study([MAXIMIZE], "demo")
    trial_id = place.optuna.create_new_trial(study_id)
    with cut(place, "", lambda n: n == 1) as tried:
        found = CALLS[name](replace(place, retry=Retry(60.0)).optuna, study_id, trial_id)
    assert len(tried) > 1  # the first was cut off
    if name.startswith("get_") and name != "get_all_studies":
        assert found == CALLS[name](place.optuna, study_id, trial_id)


def test_the_calls_under_retry_are_all_that_a_storage_has() -> None:
    public = {name for name in vars(BaseStorage) if not name.startswith("_") and callable(getattr(BaseStorage, name))}
    # These three ask the ones above, or nobody.
    assert public - CALLS.keys() == {"get_best_trial", "get_trial_param", "remove_session", "check_trial_is_updatable"}


@pytest.mark.both
def test_a_patient_storage_passes_values_both_ways(place: Storage) -> None:
    wrapped = replace(place, retry=Retry(60.0)).optuna
    study_id = wrapped.create_new_study([optuna.study.StudyDirection.MAXIMIZE], study_name="demo")
    trial_id = wrapped.create_new_trial(study_id, template_trial=None)
    wrapped.set_trial_param(trial_id, "x", 0.25, FLOAT)
    wrapped.set_trial_intermediate_value(trial_id, step=3, intermediate_value=0.5)
    wrapped.set_trial_user_attr(trial_id, key="mine", value=[1, "two"])
    wrapped.set_trial_system_attr(trial_id, "theirs", {"three": 4})
    wrapped.set_study_user_attr(study_id, "note", "text")
    assert wrapped.set_trial_state_values(trial_id, TrialState.COMPLETE, values=[0.75])
    assert wrapped.get_study_id_from_name("demo") == study_id
    assert wrapped.get_study_directions(study_id) == [optuna.study.StudyDirection.MAXIMIZE]
    assert wrapped.get_n_trials(study_id, (TrialState.COMPLETE,)) == 1
    assert wrapped.get_trial_param(trial_id, "x") == 0.25
    assert wrapped.get_best_trial(study_id) == place.optuna.get_trial(trial_id)
    (trial,) = wrapped.get_all_trials(study_id, deepcopy=False, states=(TrialState.COMPLETE,))
    assert (trial.params, trial.intermediate_values, trial.value) == ({"x": 0.25}, {3: 0.5}, 0.75)
    assert (trial.user_attrs, trial.system_attrs) == ({"mine": [1, "two"]}, {"theirs": {"three": 4}})


def test_an_outage_is_borne_by_a_storage_that_has_retry(make_study: MakeStudy) -> None:
    study = make_study()
    _, claim, _ = begin(study)
    with cut(study.storage, ATTRIBUTE, lambda n: n == 1), pytest.raises(sa.exc.OperationalError):
        study.storage.optuna.set_trial_user_attr(claim.trial_id, "key", "value")  # so it looks without patience
    with cut(study.storage, ATTRIBUTE, lambda n: n <= 3) as tried:
        replace(study.storage, retry=Retry(60.0)).optuna.set_trial_user_attr(claim.trial_id, "key", "value")
    assert len(tried) == 4
    assert study.optuna.trials[0].user_attrs == {"key": "value"}


def test_an_outage_that_lasts_ends_retry_with_the_driver_s_words(make_study: MakeStudy) -> None:
    study = make_study()
    _, claim, _ = begin(study)
    wrapped = replace(study.storage, retry=Retry(0.1)).optuna
    with (
        cut(study.storage, ATTRIBUTE, lambda n: True),
        pytest.raises(Outage, match=r"^the server closed the connection$"),
    ):
        wrapped.set_trial_user_attr(claim.trial_id, "key", "value")


def test_a_read_that_fails_is_borne_as_well(make_study: MakeStudy) -> None:
    study = make_study()
    begin(study)
    with cut(study.storage, "SELECT", lambda n: n <= 2):
        (trial,) = replace(study.storage, retry=Retry(60.0)).optuna.get_all_trials(study.study_id)
    assert trial.state == TrialState.RUNNING


def test_what_postgres_refuses_for_good_is_raised_at_once(postgres_url: str) -> None:
    place = connect(postgres_url, create=True)
    try:
        wrapped = replace(place, retry=Retry(3600.0)).optuna
        study_id = wrapped.create_new_study([optuna.study.StudyDirection.MINIMIZE])
        trial_id = wrapped.create_new_trial(study_id)
        with cut(place, ATTRIBUTE, lambda n: False) as tried, pytest.raises(sa.exc.DataError):
            wrapped.set_trial_user_attr(trial_id, "k" * 600, "value")
        assert len(tried) == 1
        wrapped.set_trial_user_attr(trial_id, "k", "value")
        assert wrapped.get_trial_user_attrs(trial_id) == {"k": "value"}
    finally:
        place.close()


def test_what_optuna_itself_refuses_is_raised_at_once(make_study: MakeStudy) -> None:
    study = make_study()
    ledger, claim, _ = begin(study)
    wrapped = replace(study.storage, retry=Retry(3600.0)).optuna
    with pytest.raises(KeyError):
        wrapped.get_trial(10**6)
    finish_claim(ledger, claim, TrialState.COMPLETE, 1.0, outcome="complete")
    with pytest.raises(optuna.exceptions.UpdateFinishedTrialError):
        wrapped.set_trial_user_attr(claim.trial_id, "key", "value")


@pytest.mark.both
@pytest.mark.parametrize("name", ["set_trial_param", "set_trial_user_attr", "set_trial_system_attr"])
def test_a_write_whose_answer_was_lost_is_made_again_and_stands_once(name: str, make_study: MakeStudy) -> None:
    study = make_study()
    _, claim, _ = begin(study)
    answers: list[object] = []

    def unheard(action: Callable[[], Any]) -> Any:
        answers.append(action())
        if len(answers) == 1:
            raise closed()
        return answers[-1]

    retry = Retry(60.0)
    value = (0.25, FLOAT) if name == "set_trial_param" else ("value",)
    with_retry = replace(study.storage, retry=lambda action: retry(lambda: unheard(action))).optuna
    getattr(with_retry, name)(claim.trial_id, "key", *value)
    assert len(answers) == 2
    (trial,) = study.optuna.get_trials()
    found = {"set_trial_param": trial.params, "set_trial_user_attr": trial.user_attrs}.get(name, trial.system_attrs)
    assert found == {"key": value[0]}
