"""Optuna's tables as we write them down: the same statements make them as Optuna's own models do."""

from __future__ import annotations

from typing import Any

import optuna
import pytest
import sqlalchemy as sa
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    IntLogUniformDistribution,
    IntUniformDistribution,
    UniformDistribution,
    distribution_to_json,
    json_to_distribution,
)
from optuna.storages._rdb import models
from sqlalchemy.dialects import postgresql, sqlite

from hpo.storage import tables
from hpo.storage.connect import Storage, plain_url

OURS = {"trials": {tables.trials_by_number.name, tables.trials_by_state.name}}  # indexes that Optuna does not make
THEIRS = {name: table for name, table in models.BaseModel.metadata.tables.items() if name != "version_info"}


def test_every_table_is_written_down() -> None:
    assert set(THEIRS) == set(tables.optunas.tables) - {"alembic_version"}


@pytest.mark.parametrize("name", sorted(THEIRS))
@pytest.mark.parametrize("dialect", [sqlite.dialect(), postgresql.dialect()], ids=["sqlite", "postgresql"])
def test_a_table_is_optunas(name: str, dialect: sa.Dialect) -> None:
    theirs, ours = THEIRS[name], tables.optunas.tables[name]
    made = [str(sa.schema.CreateTable(table).compile(dialect=dialect)) for table in (theirs, ours)]
    assert made[0] == made[1]
    indexes = [
        {(index.name, tuple(column.name for column in index.columns), index.unique) for index in table.indexes}
        for table in (theirs, ours)
    ]
    assert indexes[0] == {index for index in indexes[1] if index[0] not in OURS.get(name, set())}


@pytest.mark.parametrize("name", sorted(THEIRS))
def test_what_a_column_may_hold_is_as_optuna_has_it(name: str) -> None:
    for column in THEIRS[name].columns:
        kind = tables.optunas.tables[name].c[column.name].type
        ours = getattr(kind, "impl", kind)  # of a decorated type
        assert getattr(ours, "enums", None) == getattr(column.type, "enums", None)
        assert getattr(ours, "name", None) == getattr(column.type, "name", None)


def test_the_schema_is_the_one_that_optuna_would_make(lite: Storage) -> None:
    backend = optuna.storages.RDBStorage(plain_url(lite.url))
    assert backend.get_head_version() == tables.SCHEMA_VERSION
    assert tables.has_known_schema(lite.engine)
    with lite.engine.begin() as connection:
        connection.execute(tables.alembic_version.update().values(version_num="v9"))
    assert not tables.has_known_schema(lite.engine)


PARAMS: list[tuple[BaseDistribution, Any]] = [
    (FloatDistribution(0.0, 1.0), 0.25),
    (FloatDistribution(1e-3, 1.0, log=True), 1.0),
    (FloatDistribution(0.0, 1.0, step=0.25), 0.75),
    (IntDistribution(1, 9), 3),
    (IntDistribution(1, 9, step=2), 5),
    *((CategoricalDistribution(["a", True, 0.5, 7, None]), value) for value in ("a", True, 0.5, 7, None)),
]


@pytest.mark.parametrize(("distribution", "value"), PARAMS)
def test_a_parameter_is_read_as_optuna_reads_it(distribution: BaseDistribution, value: Any) -> None:
    text, internal = distribution_to_json(distribution), distribution.to_internal_repr(value)
    read = [tables.restored_param(internal, text), json_to_distribution(text).to_external_repr(internal)]
    assert [repr(one) for one in read] == [repr(value)] * 2
    choices = getattr(distribution, "choices", None)
    assert tables.restored_choices(text) == (choices and list(choices))


@pytest.mark.filterwarnings("ignore:.*has been deprecated:FutureWarning")
@pytest.mark.parametrize("kind", [UniformDistribution, IntUniformDistribution, IntLogUniformDistribution])
def test_a_parameter_of_an_earlier_optuna_is_read_by_optuna(kind: Any) -> None:
    text = distribution_to_json(kind(1, 9))
    assert kind.__name__ in text
    assert repr(tables.restored_param(3.0, text)) == repr(json_to_distribution(text).to_external_repr(3.0))
    assert tables.restored_choices(text) is None
