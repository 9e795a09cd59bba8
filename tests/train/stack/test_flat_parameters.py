from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hpo.train.stack.flat_parameters import ALIGNMENT, FlatParameters, own_tensors


class Model(nn.Module):
    """A model with one weight in two places, one module in two, a buffer likewise, and a parameter behind a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 5), nn.Linear(3, 5, bias=False)
        self.b.weight = self.a.weight
        self.norm = nn.BatchNorm1d(5)
        self.again = self.norm
        self.other = nn.BatchNorm1d(5, affine=False)
        self.other.running_mean = self.norm.running_mean


TRAINED = ["norm.weight", "a.weight"]


@pytest.fixture
def model() -> Model:
    model = Model()
    for tensor in (*model.parameters(), model.norm.running_mean, model.norm.running_var):
        nn.init.normal_(tensor)
    return model


@pytest.fixture
def rows(model: Model) -> FlatParameters:
    return FlatParameters(model, TRAINED, 3)


def test_trained_parameters_come_first(rows: FlatParameters) -> None:
    """Trained parameters come first in their order and others have no gradient."""
    assert list(rows.spans)[:2] == TRAINED
    assert rows.spans == {
        "norm.weight": (0, 5),
        "a.weight": (16, 31),
        "a.bias": (32, 37),
        "norm.bias": (48, 53),
    }
    assert rows.values.shape == (3, 64)
    assert rows.gradients.shape == rows.moments[0].shape == (3, 32)
    assert [p is q for p, q in zip(rows.leaves, map(rows.parameters.get, TRAINED), strict=True)] == [True, True]
    assert {name for name, parameter in rows.parameters.items() if parameter.requires_grad} == {
        *TRAINED,
        "b.weight",
    } | {"again.weight"}


def test_every_parameter_of_every_row_begins_a_cache_line(rows: FlatParameters) -> None:
    assert all(stacked.data_ptr() % 64 == 0 for stacked in rows.parameters.values())
    assert rows.values.stride(0) * rows.values.element_size() % 64 == 0
    assert ALIGNMENT * rows.values.element_size() == 64


def test_a_model_that_is_adopted_keeps_its_values_and_shows_its_row(rows: FlatParameters, model: Model) -> None:
    before = copy.deepcopy(model.state_dict())
    weight = model.a.weight
    rows.adopt(1, model)
    assert model.a.weight is weight is model.b.weight
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    with torch.no_grad():
        rows.parameters["a.weight"][1].fill_(7.0)
        rows.parameters["again.weight"][1].fill_(8.0)
        rows.buffers["other.running_mean"][1].fill_(9.0)
    assert model.b.weight.eq(7.0).all()
    assert model.norm.weight.eq(8.0).all()
    assert model.again.running_mean.eq(9.0).all()
    assert model.other.running_mean is model.norm.running_mean
    assert not rows.values[[0, 2]].any()


def test_two_names_are_one_tensor(rows: FlatParameters) -> None:
    assert rows.parameters["b.weight"] is rows.parameters["a.weight"]
    assert rows.buffers["again.running_var"] is rows.buffers["norm.running_var"]
    assert rows.buffers["other.running_mean"] is rows.buffers["norm.running_mean"]
    assert rows.buffers["other.running_var"] is not rows.buffers["norm.running_var"]


def test_a_model_moves_from_row_to_row_and_out_again(rows: FlatParameters, model: Model) -> None:
    before = copy.deepcopy(model.state_dict())
    rows.adopt(0, model)
    other = FlatParameters(model, TRAINED, 2)
    other.adopt(1, model)
    for tensor in (rows.values, *rows.buffers.values()):
        tensor.fill_(0)  # what it left is no matter
    own_tensors(model)
    for tensor in (other.values, *other.buffers.values()):
        tensor.fill_(1)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert model.b.weight is model.a.weight
    assert model.other.running_mean is model.norm.running_mean
    assert model.a.weight.untyped_storage().nbytes() == 15 * 4


def test_nothing_is_left_of_a_row_that_was_no_number(rows: FlatParameters, model: Model) -> None:
    rows.values.fill_(torch.nan)
    rows.gradients.fill_(torch.nan)
    rows.adopt(2, model)
    assert rows.values[2].isfinite().all()
    assert not rows.gradients[2].any()
    assert rows.values[:2].isnan().all()


def test_a_snapshot_brings_the_buffers_back(rows: FlatParameters, model: Model) -> None:
    rows.adopt(2, model)
    before = copy.deepcopy(model.state_dict())
    kept = rows.snapshot(2)
    for buffer in rows.buffers.values():
        buffer.fill_(3)
    rows.restore(2, kept)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert rows.buffers["norm.running_var"][:2].eq(3).all()
