"""Optuna's storage of our own: the same tables as its RDBStorage, few statements, and nothing read twice.

Optuna's samplers, pruners, plots, command line and dashboard work on it, and RDBStorage may have the same database open
meanwhile. A write is one statement that checks by itself whether the trial may still be written to. What has finished is
read once in a process; a look at the study brings what is new.
"""

from __future__ import annotations

import copy
import json
import threading
import uuid
from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import sqlalchemy as sa
from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.exceptions import DuplicatedStudyError
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial, TrialState

from hpo.storage import engine, sql, trial_rows, trial_writes
from hpo.storage.finished_trials import FinishedTrials
from hpo.storage.tables import (
    hpo_trials,
    intermediate_values,
    stored,
    studies,
    study_directions,
    study_system_attributes,
    study_user_attributes,
    trial_heartbeats,
    trial_params,
    trial_system_attributes,
    trial_user_attributes,
    trial_values,
    trials,
    utc,
)
from hpo.storage.trial_cache import CacheUpdate, TrialCache
from hpo.storage.trial_rows import TrialRow

Result = TypeVar("Result")
RetryCall = Callable[[Callable[[], Any]], Any]
NAME_PREFIX = "no-name-"  # as Optuna calls a study that was given no name


@dataclass(frozen=True)
class DeferredWrites:
    """What a trial was given and is not written yet: rows of Optuna's tables without the trial's id, by their keys."""

    params: dict[str, dict[str, Any]] = field(default_factory=dict)
    attributes: dict[str, dict[str, Any]] = field(default_factory=dict)  # system attributes


def do_once(action: Callable[[], Result]) -> Result:
    """Call `action` once, without retrying."""
    return action()


class OptunaStorage(BaseStorage):
    """Optuna's tables through one engine."""

    def __init__(self, opened: sa.Engine, retry: RetryCall = do_once) -> None:
        """Open the tables, which are there.

        Args:
            retry: does each transaction, again while the storage fails. A transaction whose answer was lost is done twice.
                It writes the same twice, but for a new trial, of which there are two then, and for a new study or an
                end, which are refused the second time.
        """
        self.engine = opened
        self._retry = retry
        self._lock = threading.RLock()
        self._caches: dict[int, TrialCache] = {}
        self._directions: dict[int, list[StudyDirection]] = {}
        self._study_of: dict[int, int] = {}  # by the ids of trials that were written to
        self._known: dict[tuple[int, str], BaseDistribution] = {}  # of a study's parameters
        self._begun: dict[int, TrialRow] = {}  # by id; see `prime`
        self._deferred: dict[int, DeferredWrites] = {}  # by trial
        self._looking_once: dict[int, bool] = {}  # studies of which one look is to do, and whether it was had

    def __getstate__(self) -> dict[str, Any]:
        """Return what another process needs to open the same tables, the password included."""
        return {"url": self.engine.url}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(sa.create_engine(state["url"], **engine.arguments(state["url"])))  # type: ignore[misc]

    def with_retry(self, retry: RetryCall) -> OptunaStorage:
        """Return this storage with another way of retrying."""
        return OptunaStorage(self.engine, retry)

    def _reading(self, read: Callable[[sa.Connection], Result]) -> Result:
        def action() -> Result:
            with sql.reading(self.engine) as connection:
                return read(connection)

        def again_if_cut() -> Result:
            try:
                return action()
            except sa.exc.DBAPIError as error:
                if not error.connection_invalidated:
                    raise
                return action()  # over another connection: this one had broken since its last use

        return self._retry(again_if_cut)  # type: ignore[no-any-return]

    def _writing(self, write: Callable[[sa.Connection], Result], *, once: bool = False) -> Result:
        """Do a transaction.

        Args:
            once: it writes by one statement.
        """
        transaction = sql.writing_once if once else sql.writing

        def action() -> Result:
            with transaction(self.engine) as connection:
                return write(connection)

        return self._retry(action)  # type: ignore[no-any-return]

    # --- studies ----------------------------------------------------------------------------------------------------

    def create_new_study(self, directions: Sequence[StudyDirection], study_name: str | None = None) -> int:
        name = f"{NAME_PREFIX}{uuid.uuid4()}" if study_name is None else study_name

        def create(connection: sa.Connection) -> int:
            inserted = connection.execute(studies.insert().values(study_name=name).returning(studies.c.study_id))
            study_id = int(inserted.scalar_one())
            rows = [
                {"study_id": study_id, "objective": objective, "direction": direction}
                for objective, direction in enumerate(directions)
            ]
            connection.execute(study_directions.insert(), rows)
            return study_id

        try:
            return self._writing(create)
        except sa.exc.IntegrityError:
            raise DuplicatedStudyError(f"there is a study {name!r} already") from None

    def delete_study(self, study_id: int) -> None:
        of_study = sa.select(trials.c.trial_id).where(trials.c.study_id == study_id)

        def delete(connection: sa.Connection) -> None:
            self._lock_study(connection, study_id)
            for table in (hpo_trials, trials):  # in the order in which reports lock them, who then find the study gone
                locked = sa.select(table.c.trial_id).where(table.c.trial_id.in_(of_study)).order_by(table.c.trial_id)
                connection.execute(locked.with_for_update())
            for table in _OF_TRIAL:
                connection.execute(table.delete().where(table.c.trial_id.in_(of_study)))
            for table in _OF_STUDY:
                connection.execute(table.delete().where(table.c.study_id == study_id))

        self._writing(delete)
        with self._lock:
            self._caches.pop(study_id, None)
            self._forget(study_id)

    def _forget(self, study_id: int) -> None:
        """Forget what was known of a study that is gone."""
        self._directions.pop(study_id, None)
        self._known = {key: known for key, known in self._known.items() if key[0] != study_id}
        self._study_of = {trial: study for trial, study in self._study_of.items() if study != study_id}

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        self._set_study_attribute(study_user_attributes, study_id, key, value)

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        self._set_study_attribute(study_system_attributes, study_id, key, value)

    def _set_study_attribute(self, table: sa.Table, study_id: int, key: str, value: Any) -> None:
        row = {"study_id": study_id, "key": key, "value_json": json.dumps(value)}

        def write(connection: sa.Connection) -> None:
            self._lock_study(connection, study_id)
            sql.upsert(connection, table, row, key=["study_id", "key"])

        self._writing(write)

    def get_study_id_from_name(self, study_name: str) -> int:
        found = sa.select(studies.c.study_id).where(studies.c.study_name == study_name)
        study_id = self._reading(lambda connection: connection.execute(found).scalar_one_or_none())
        if study_id is None:
            raise KeyError(f"there is no study {study_name!r}")
        self._directions.pop(study_id, None)  # whoever opens a study gets those of the one that has the id now
        return int(study_id)

    def get_study_name_from_id(self, study_id: int) -> str:
        found = sa.select(studies.c.study_name).where(studies.c.study_id == study_id)
        name = self._reading(lambda connection: connection.execute(found).scalar_one_or_none())
        self._directions.pop(study_id, None)  # likewise
        if name is None:
            raise _no_study(study_id)
        return str(name)

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        known = self._directions.get(study_id)
        if known is None:
            found = sa.select(study_directions.c.direction).where(study_directions.c.study_id == study_id)
            ordered = found.order_by(study_directions.c.objective)
            known = self._reading(lambda connection: list(connection.execute(ordered).scalars()))
            if not known:
                raise _no_study(study_id)
            self._directions[study_id] = known
        return list(known)

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        return self._study_attributes(study_user_attributes, study_id)

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        return self._study_attributes(study_system_attributes, study_id)

    def _study_attributes(self, table: sa.Table, study_id: int) -> dict[str, Any]:
        found = self._attributes(studies.c.study_id, table.c.study_id, study_id)
        if found is None:
            raise _no_study(study_id)
        return found

    def _attributes(self, owner: sa.Column[int], key: sa.Column[int], owner_id: int) -> dict[str, Any] | None:
        """Return the attributes of a study or a trial, None if there is no such one.

        Args:
            owner: the id in the table of studies or trials.
            key: the id in the table of attributes.
        """
        table = key.table
        found = sa.select(table.c.key, table.c.value_json).select_from(owner.table.outerjoin(table, key == owner))
        rows = self._reading(lambda connection: connection.execute(found.where(owner == owner_id)).all())
        return {name: json.loads(text) for name, text in rows if name is not None} if rows else None

    def get_all_studies(self) -> list[FrozenStudy]:
        def read(connection: sa.Connection) -> list[FrozenStudy]:
            named = connection.execute(sa.select(studies.c.study_id, studies.c.study_name).order_by(studies.c.study_id))
            found = {row.study_id: row.study_name for row in named}
            directions: dict[int, list[StudyDirection]] = {study_id: [] for study_id in found}
            ordered = sa.select(study_directions).order_by(study_directions.c.study_id, study_directions.c.objective)
            for row in connection.execute(ordered):
                directions.get(row.study_id, []).append(row.direction)
            users, systems = (
                _by_study(connection, table) for table in (study_user_attributes, study_system_attributes)
            )
            return [
                FrozenStudy(
                    study_name=name,
                    direction=None,
                    directions=directions[study_id],
                    user_attrs=users[study_id],
                    system_attrs=systems[study_id],
                    study_id=study_id,
                )
                for study_id, name in found.items()
                if directions[study_id]  # else it is being deleted
            ]

        return self._reading(read)

    def _lock_study(self, connection: sa.Connection, study_id: int) -> None:
        if not trial_writes.lock_study(connection, study_id):
            raise _no_study(study_id)

    # --- trials written ---------------------------------------------------------------------------------------------

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        def create(connection: sa.Connection) -> int:
            self._lock_study(connection, study_id)
            if template_trial is None:
                trial_id, _ = trial_writes.insert_trial(connection, study_id, started=utc())
                return trial_id
            return trial_writes.insert_template(connection, study_id, template_trial)

        return self._writing(create)

    def set_trial_param(
        self, trial_id: int, param_name: str, param_value_internal: float, distribution: BaseDistribution
    ) -> None:
        row = {
            "param_name": param_name,
            "param_value": param_value_internal,
            "distribution_json": distribution_to_json(distribution),
        }

        deferred = self._deferred.get(trial_id)

        def check(connection: sa.Connection) -> None:
            self._check_compatibility(connection, trial_id, param_name, distribution)

        def write(connection: sa.Connection) -> None:
            check(connection)
            self._put(connection, trial_params, trial_id, row, key="param_name")

        if deferred is None:
            self._writing(write, once=True)
        else:
            if self._known.get((self._study_of.get(trial_id, -1), param_name)) != distribution:
                self._reading(check)
            deferred.params[param_name] = row
        self._known.setdefault((self._study_of[trial_id], param_name), distribution)

    @contextmanager
    def deferred_writes(self, trial_id: int) -> Iterator[DeferredWrites]:
        """Do not write the parameters and system attributes that a trial is given within, but gather them, for the caller to
        write.
        """
        deferred = self._deferred[trial_id] = DeferredWrites()
        try:
            yield deferred
            self._learn(trial_id, deferred.params)
        finally:
            del self._deferred[trial_id]

    def _learn(self, trial_id: int, params: Mapping[str, Mapping[str, Any]]) -> None:
        """Know the parameters of an open trial, which no other look within `snapshot` would find."""
        row = self._looked_at(trial_id)
        if row is not None and params:
            study_id = self._study_of[trial_id]
            row.space = {**row.space, **{name: self._known[study_id, name] for name in params}}
            row.params = (*row.params, *(found["param_value"] for found in params.values()))

    def _looked_at(self, trial_id: int) -> TrialRow | None:
        """Return an open trial as it is known within `snapshot`; None outside of it, or if it is not known."""
        study_id = self._study_of.get(trial_id, -1)
        return self._cache(study_id).open.get(trial_id) if self._looking_once.get(study_id) else None

    @contextmanager
    def snapshot(self, study_id: int) -> Iterator[None]:
        """Let all that `view` shows within come from one look, the first, and from the parameters and system attributes that
        trials are given within: for a process that opens many trials at once.
        """
        self._looking_once[study_id] = False
        try:
            yield
        finally:
            del self._looking_once[study_id]

    def _check_compatibility(
        self, connection: sa.Connection, trial_id: int, name: str, distribution: BaseDistribution
    ) -> None:
        """Refuse a distribution that cannot be the parameter's, as another trial of the study has it: ValueError."""
        try:
            trial_writes.check_against(self._known_distribution(connection, trial_id, name), distribution)
        except ValueError:
            self._refuse(connection, trial_id)  # that the trial has finished is told first
            # What is known may be of a study that was deleted since, whose ids SQLite gave to this one.
            self._known.pop((self._study_of.pop(trial_id), name), None)
            trial_writes.check_against(self._known_distribution(connection, trial_id, name), distribution)

    def distribution_of(self, trial_id: int, name: str) -> BaseDistribution | None:
        """Return the distribution of a parameter in a trial's study, None if the study does not know it."""
        return self._reading(lambda connection: self._known_distribution(connection, trial_id, name))

    def _known_distribution(self, connection: sa.Connection, trial_id: int, name: str) -> BaseDistribution | None:
        """Return the distribution of a parameter in a trial's study, None if the study does not know it."""
        if trial_id not in self._study_of:
            found = sa.select(trials.c.study_id).where(trials.c.trial_id == trial_id)
            study_id = connection.execute(found).scalar_one_or_none()
            if study_id is None:
                raise _no_trial(trial_id)
            self._study_of[trial_id] = study_id
        key = (self._study_of[trial_id], name)
        return self._known.get(key) or trial_rows.distribution_in(connection, *key)

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        once = (TrialState.WAITING,) if state == TrialState.RUNNING else trial_writes.UNFINISHED

        def write(connection: sa.Connection) -> bool:
            if not trial_writes.set_state(connection, trial_id, state, once=once):
                self._refuse(connection, trial_id)
                return False
            trial_writes.put_values(connection, trial_id, values or [])
            return True

        return self._writing(write)

    def set_trial_intermediate_value(self, trial_id: int, step: int, intermediate_value: float) -> None:
        value, kind = stored(float(intermediate_value))
        row = {"step": step, "intermediate_value": value, "intermediate_value_type": kind}
        self._writing(
            lambda connection: self._put(connection, intermediate_values, trial_id, row, key="step"), once=True
        )

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        self._set_trial_attribute(trial_user_attributes, trial_id, key, value)

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        if (deferred := self._deferred.get(trial_id)) is not None:
            deferred.attributes[key] = {"key": key, "value_json": json.dumps(value)}
        else:
            self._set_trial_attribute(trial_system_attributes, trial_id, key, value)
        if (row := self._looked_at(trial_id)) is not None:
            row.system_attributes[key] = json.dumps(value)

    def _set_trial_attribute(self, table: sa.Table, trial_id: int, key: str, value: Any) -> None:
        row = {"key": key, "value_json": json.dumps(value)}
        self._writing(lambda connection: self._put(connection, table, trial_id, row, key="key"), once=True)

    def set_system_attributes(self, written: Mapping[int, Mapping[str, Any]]) -> None:
        """Set system attributes of trials, by id and key, in one transaction: all of them, or none if a trial refuses."""

        def write(connection: sa.Connection) -> None:
            for trial_id, attributes in sorted(written.items()):  # in one order in all processes
                self._put(
                    connection, trial_system_attributes, trial_id, *trial_writes.attribute_rows(attributes), key="key"
                )

        self._writing(write)

    def _put(self, connection: sa.Connection, table: sa.Table, trial_id: int, *rows: dict[str, Any], key: str) -> None:
        if not trial_writes.put(connection, table, trial_id, *rows, key=key):
            self._refuse(connection, trial_id)

    def _refuse(self, connection: sa.Connection, trial_id: int) -> None:
        """Say why a trial cannot be written to: KeyError for one that is not there, UpdateFinishedTrialError."""
        state = connection.execute(sa.select(trials.c.state).where(trials.c.trial_id == trial_id)).scalar_one_or_none()
        if state is None:
            raise _no_trial(trial_id)
        self.check_trial_is_updatable(trial_id, state)

    # --- trials read ------------------------------------------------------------------------------------------------

    def prime(self, study_id: int, begun: TrialRow) -> None:
        """Take note of a trial that this process has just made: the first who asks for it gets it without a look."""
        self._begun[begun.trial_id] = begun
        self._study_of[begun.trial_id] = study_id

    def get_trial(self, trial_id: int) -> FrozenTrial:
        if (begun := self._begun.pop(trial_id, None)) is not None:
            return begun.frozen()
        row = self._reading(lambda connection: trial_rows.read_one(connection, trial_id))
        if row is None:
            raise _no_trial(trial_id)
        return row.frozen()

    def get_trial_id_from_study_id_trial_number(self, study_id: int, trial_number: int) -> int:
        found = sa.select(trials.c.trial_id).where(trials.c.study_id == study_id, trials.c.number == trial_number)
        trial_id = self._reading(lambda connection: connection.execute(found).scalar_one_or_none())
        if trial_id is None:
            raise KeyError(f"there is no trial with number {trial_number} in the study with id {study_id}")
        return int(trial_id)

    def get_trial_system_attrs(self, trial_id: int) -> dict[str, Any]:
        """Return a trial's system attributes as they are now: pruners ask for those of a trial that runs."""
        found = self._attributes(trials.c.trial_id, trial_system_attributes.c.trial_id, trial_id)
        if found is None:
            raise _no_trial(trial_id)
        deferred = self._deferred.get(trial_id, DeferredWrites()).attributes
        return {**found, **{key: json.loads(row["value_json"]) for key, row in deferred.items()}}

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        with self._lock:
            found = self._read(study_id).trials(states)
        return copy.deepcopy(found) if deepcopy else found

    def columns(self, study_id: int, *, anew: bool = False) -> FinishedTrials:
        """Return the finished trials of a study in columns, after a look at what is new.

        Args:
            anew: look even if nothing is new by what was heard at the last report.
        """
        with self._lock:
            if anew:
                self.set_known_finished(study_id, None)
            return self._read(study_id, whole=False).columns

    def view(self, study_id: int) -> tuple[FinishedTrials, list[TrialRow]]:
        """Return the finished trials of a study in columns and the open ones as they are stored, after a look at what is new."""
        with self._lock:
            cache = self._read(study_id)
            return cache.columns, list(cache.open.values())

    def rows(self, study_id: int) -> list[TrialRow]:
        """Return all trials of a study as they are stored, by number, after a look at what is new; not to be changed."""
        with self._lock:
            return self._read(study_id).rows()

    def low(self, study_id: int) -> int:
        """Return a number below which all trials of the study are known to have finished."""
        with self._lock:
            return self._cache(study_id).low

    def set_known_finished(self, study_id: int, finished: int | None) -> None:
        """Take note of how many trials of the study have finished: `columns` need not look while it knows as many.

        None forgets that.
        """
        with self._lock:
            self._cache(study_id).known_finished = finished

    def _cache(self, study_id: int) -> TrialCache:
        if study_id not in self._caches:
            self._caches[study_id] = TrialCache(study_id)
        return self._caches[study_id]

    def _read(self, study_id: int, *, whole: bool = True) -> TrialCache:
        cache = self._cache(study_id)
        if not whole and cache.known_finished == len(cache.columns):
            return cache
        if whole and self._looking_once.get(study_id):
            return cache

        def look(connection: sa.Connection) -> CacheUpdate:
            news = cache.look(connection, whole=whole)
            if news.is_empty and not connection.execute(_name_of(study_id)).first():
                raise _no_study(study_id)
            return news

        news = self._reading(look)
        if news.is_anew:
            self._forget(study_id)
        cache.take_in(news)
        if whole and study_id in self._looking_once:
            self._looking_once[study_id] = True
        return cache


_OF_TRIAL = (
    trial_heartbeats,
    intermediate_values,
    trial_values,
    trial_params,
    trial_user_attributes,
    trial_system_attributes,
)
_OF_STUDY = (trials, study_user_attributes, study_system_attributes, study_directions, studies)


def _name_of(study_id: int) -> sa.Select[Any]:
    return sa.select(studies.c.study_name).where(studies.c.study_id == study_id)


def _no_study(study_id: int) -> KeyError:
    return KeyError(f"there is no study with id {study_id}")


def _no_trial(trial_id: int) -> KeyError:
    return KeyError(f"there is no trial with id {trial_id}")


def _by_study(connection: sa.Connection, table: sa.Table) -> defaultdict[int, dict[str, Any]]:
    found: defaultdict[int, dict[str, Any]] = defaultdict(dict)
    for row in connection.execute(sa.select(table)):
        found[row.study_id][row.key] = json.loads(row.value_json)
    return found
