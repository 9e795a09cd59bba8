"""An Optuna storage on the tables of Optuna's RDBStorage, with fewer statements.

Optuna's samplers, pruners, plots, command line and dashboard work on it. RDBStorage may have the same database open
meanwhile. A write is one statement that checks by itself whether the trial may still be written to. A process reads
each finished trial once. Later reads bring only what is new.
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
from optuna.trial import FrozenTrial, TrialState

from hpo.storage import engine, sql, study_rows, trial_rows, trial_writes
from hpo.storage.finished_trials import FinishedTrials
from hpo.storage.optuna_private import FrozenStudy
from hpo.storage.tables import (
    intermediate_values,
    stored,
    studies,
    study_directions,
    study_system_attributes,
    study_user_attributes,
    trial_params,
    trial_system_attributes,
    trial_user_attributes,
    trials,
    utc,
)
from hpo.storage.trial_cache import CacheUpdate, TrialCache
from hpo.storage.trial_rows import TrialRow

Result = TypeVar("Result")
RetryCall = Callable[[Callable[[], Any]], Any]
NAME_PREFIX = "no-name-"  # as Optuna names a study that was given no name


@dataclass(frozen=True)
class DeferredWrites:
    """Parameters and attributes of a trial that are not written yet: rows of Optuna's tables without the trial's id."""

    params: dict[str, dict[str, Any]] = field(default_factory=dict)  # by parameter
    attributes: dict[str, dict[str, Any]] = field(default_factory=dict)  # system attributes, by key


def do_once(action: Callable[[], Result]) -> Result:
    """Call `action` once, without retrying."""
    return action()


class OptunaStorage(BaseStorage):
    """An Optuna storage on one engine."""

    def __init__(self, opened: sa.Engine, retry: RetryCall = do_once) -> None:
        """Open the tables, which must exist.

        Args:
            opened: the engine.
            retry: calls each transaction, and again while the storage fails. A transaction whose answer was lost is done
                twice. Most then write the same again. A new trial is made twice. A new study and an end are refused.
        """
        self.engine = opened
        self._retry = retry
        self._lock = threading.RLock()
        self._caches: dict[int, TrialCache] = {}
        self._directions: dict[int, list[StudyDirection]] = {}
        self._study_of: dict[int, int] = {}  # by trial id
        self._known: dict[tuple[int, str], BaseDistribution] = {}  # by study id and parameter
        self._begun: dict[int, TrialRow] = {}  # by id; see `prime`
        self._deferred: dict[int, DeferredWrites] = {}  # by trial
        self._looking_once: dict[int, bool] = {}  # by study id: whether a study within `snapshot` was read

    def __getstate__(self) -> dict[str, Any]:
        """Return what another process needs to open the same tables. It holds the password."""
        return {"url": self.engine.url}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(sa.create_engine(state["url"], **engine.arguments(state["url"])))  # type: ignore[misc]

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
                return action()  # over a new connection: the old one broke since its last use

        return self._retry(again_if_cut)  # type: ignore[no-any-return]

    def _writing(self, write: Callable[[sa.Connection], Result], *, once: bool = False) -> Result:
        """Do a transaction.

        Args:
            write: what it does.
            once: whether it writes by one statement.
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
        def delete(connection: sa.Connection) -> None:
            self._lock_study(connection, study_id)
            study_rows.delete(connection, study_id)

        self._writing(delete)
        with self._lock:
            self._caches.pop(study_id, None)
            self._forget(study_id)

    def _forget(self, study_id: int) -> None:
        """Forget a study that is gone."""
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
        self._directions.pop(study_id, None)  # another study may have the id now
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
        """Return the attributes of a study or a trial, None if it does not exist.

        Args:
            owner: the id column of the table of studies or trials.
            key: the id column of the table of attributes.
            owner_id: the study's or trial's id.
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
                if directions[study_id]  # a study without them is being deleted
            ]

        return self._reading(read)

    def _lock_study(self, connection: sa.Connection, study_id: int) -> None:
        if not study_rows.lock(connection, study_id):
            raise _no_study(study_id)

    # --- trials written ---------------------------------------------------------------------------------------------

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        def create(connection: sa.Connection) -> int:
            self._lock_study(connection, study_id)
            if template_trial is None:
                trial_id, _ = trial_writes.insert_trial(connection, study_id, started=utc())
                return trial_id
            [trial_id] = trial_writes.insert_templates(connection, study_id, [template_trial])
            return trial_id

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
        """Within this context, gather the parameters and system attributes that a trial is given. The caller writes them."""
        deferred = self._deferred[trial_id] = DeferredWrites()
        try:
            yield deferred
            self._learn(trial_id, deferred.params)
        finally:
            del self._deferred[trial_id]

    def _learn(self, trial_id: int, params: Mapping[str, Mapping[str, Any]]) -> None:
        """Add parameters to an open trial within `snapshot`, in which the trial is not read again."""
        row = self._looked_at(trial_id)
        if row is not None and params:
            study_id = self._study_of[trial_id]
            row.space = {**row.space, **{name: self._known[study_id, name] for name in params}}
            row.params = (*row.params, *(found["param_value"] for found in params.values()))

    def _looked_at(self, trial_id: int) -> TrialRow | None:
        """Return an open trial as read within `snapshot`, None outside of it or if the trial was not read."""
        study_id = self._study_of.get(trial_id, -1)
        return self._cache(study_id).open.get(trial_id) if self._looking_once.get(study_id) else None

    @contextmanager
    def snapshot(self, study_id: int) -> Iterator[None]:
        """Within this context, read a study's trials once. It is for a process that opens many trials at once.

        Parameters and system attributes that trials are given within the context are added to what was read.
        """
        self._looking_once[study_id] = False
        try:
            yield
        finally:
            del self._looking_once[study_id]

    def _check_compatibility(
        self, connection: sa.Connection, trial_id: int, name: str, distribution: BaseDistribution
    ) -> None:
        """Raise ValueError if another trial of the study has an incompatible distribution of this parameter."""
        try:
            trial_writes.check_against(self._known_distribution(connection, trial_id, name), distribution)
        except ValueError:
            self._refuse(connection, trial_id)  # if the trial has finished, that is raised instead
            # The known distribution may be of a deleted study whose ids SQLite has given to this one.
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
        """Set system attributes by trial id and key, in one transaction. If one trial refuses, none is set."""

        def write(connection: sa.Connection) -> None:
            for trial_id, attributes in sorted(written.items()):  # all processes lock in one order
                self._put(
                    connection, trial_system_attributes, trial_id, *trial_writes.attribute_rows(attributes), key="key"
                )

        self._writing(write)

    def _put(self, connection: sa.Connection, table: sa.Table, trial_id: int, *rows: dict[str, Any], key: str) -> None:
        if not trial_writes.put(connection, table, trial_id, *rows, key=key):
            self._refuse(connection, trial_id)

    def _refuse(self, connection: sa.Connection, trial_id: int) -> None:
        """Raise why a trial refused a write: KeyError if it does not exist, UpdateFinishedTrialError if it has finished."""
        state = connection.execute(sa.select(trials.c.state).where(trials.c.trial_id == trial_id)).scalar_one_or_none()
        if state is None:
            raise _no_trial(trial_id)
        self.check_trial_is_updatable(trial_id, state)

    # --- trials read ------------------------------------------------------------------------------------------------

    def prime(self, study_id: int, begun: TrialRow) -> None:
        """Remember a trial that this process has just made. The first `get_trial` then needs no read."""
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
        """Return a trial's current system attributes. Pruners ask for those of a running trial."""
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
        """Read what is new and return the finished trials of a study in columns.

        Args:
            study_id: the study's id.
            anew: read even if the last report said that nothing is new.
        """
        with self._lock:
            if anew:
                self.set_known_finished(study_id, None)
            return self._read(study_id, whole=False).columns

    def view(self, study_id: int) -> tuple[FinishedTrials, list[TrialRow]]:
        """Read what is new and return the finished trials of a study in columns and the open ones as rows."""
        with self._lock:
            cache = self._read(study_id)
            return cache.columns, list(cache.open.values())

    def rows(self, study_id: int) -> list[TrialRow]:
        """Read what is new and return all trials of a study by number. The rows must not be changed."""
        with self._lock:
            return self._read(study_id).rows()

    def set_known_finished(self, study_id: int, finished: int | None) -> None:
        """Set how many trials of the study have finished. While `columns` has as many, it reads nothing.

        None means that the number is not known.
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
