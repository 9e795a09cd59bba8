"""Models for tables, features, series and texts: which inputs they take, what they compute, and what padding does not change."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from torch import Tensor, nn

from hpo.models import MODELS, prepare, shapes
from hpo.models.recurrent import Recurrent
from hpo.models.shapes import Shape, TokenShape
from hpo.models.tables import (
    CategoryEmbedding,
    PeriodicEmbedding,
    QuantileEmbedding,
    TableFeatures,
    TableOptions,
    number_embedding,
)
from hpo.models.tokens import TokenEmbedding
from hpo.spec import options, space
from hpo.spec.study_file import StudySpec
from hpo.train.build import registry
from hpo.train.optim import param_groups
from tests.support.inputs import MODELS_OF, SEQUENTIAL, SHAPES, TABLE, TEXT, batch


@pytest.mark.parametrize("name", MODELS_OF)
def test_a_model_maps_its_inputs_to_outputs_that_depend_on_every_weight(name: str) -> None:
    model, kind, chosen = MODELS_OF[name]
    built = MODELS[model](SHAPES[kind], 4, **chosen)
    outputs = built(batch(SHAPES[kind]))
    assert outputs.shape == (6, 4)
    outputs.square().sum().backward()
    assert [key for key, p in built.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize("name", MODELS_OF)
def test_a_models_options_go_through_a_file_and_back(name: str, tmp_path: Path) -> None:
    """As an export does: what is resolved is written, read, and means the same."""
    model, _, chosen = MODELS_OF[name]
    document = {"name": "s", "data": {"name": "digits"}, "model": {"name": model, **chosen}}
    resolved = registry.resolve(
        StudySpec.from_document({**document, "optimizer": {"name": "sgd", "lr": 0.1}}), tmp_path
    )
    pinned = tomllib.loads(tomli_w.dumps({**resolved.document, **space.lower(resolved.tree)}))
    again = registry.resolve(StudySpec.from_document(pinned), tmp_path)
    assert again.fingerprint == resolved.fingerprint
    assert {key: again.tree["model"][key] for key in chosen} == chosen


def test_every_own_option_of_the_models_is_tried() -> None:
    for model in SEQUENTIAL:
        same = ("gru", "lstm") if model in ("gru", "lstm") else (model,)
        tried = {key for name, _, chosen in MODELS_OF.values() if name in same for key in chosen}
        assert set(options.defaults(MODELS[model], 2)) - {"norm", "activation", "channels"} <= tried
    tried = {key for _, _, chosen in MODELS_OF.values() for key in chosen}
    assert set(TableOptions.__annotations__) <= tried


@pytest.mark.parametrize("name", MODELS)
def test_a_model_refuses_other_inputs_and_names_those_that_take_them(name: str) -> None:
    for shape in SHAPES.values():
        kind = shapes.kind_of(shape)
        if kind in shapes.TAKES.get(name, ("image",)):
            continue
        with pytest.raises(ValueError, match=rf"^{name} takes .*, but the inputs are ") as caught, torch.device("meta"):
            MODELS[name](shape, 4)
        mend = str(caught.value).rpartition("; take ")[2]
        if kind == "named":
            assert mend == 'a model of your own, name = "file.py:function"'
        else:
            named = mend.replace(" or ", ", ").split(", ")
            assert named
            assert all(kind in shapes.TAKES.get(one, ("image",)) and one in MODELS for one in named)


def test_inputs_of_four_dimensions_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"shape \[2, 3, 4, 5\] are neither features \[F\], series \[C, T\] nor images"
    ):
        MODELS["mlp"]((2, 3, 4, 5), 4)


@pytest.mark.parametrize(
    ("model", "shape", "chosen", "message"),
    [
        ("mlp", (2, 20), {"embedding": "linear"}, r'embedding = "linear": embeds the numbers of tables .* series of shape'),
        ("cnn1d", (2, 3), {}, r"channels = \[32, 64\] halves 3 steps 2 times, which leaves no step; give at most 1 entries"),
        ("transformer", (2, 8), {"width": 10}, r"heads = 4 does not divide width = 10; give one of \[1, 2, 5, 10\]"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_are_refused(model: str, shape: Shape, chosen: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MODELS[model](shape, 4, **chosen)


# --- tables ---------------------------------------------------------------------------------------------------------------


def test_the_features_of_a_table_are_numbers_then_one_vector_for_each_category() -> None:
    features = TableFeatures(TABLE, {"category_size": 5})
    table = batch(TABLE)
    assert isinstance(embedding := features.categories, CategoryEmbedding)
    found = features(table)
    assert torch.equal(found[:, :3], table["numbers"])
    for row, codes in enumerate(table["categories"]):
        assert torch.equal(found[row, 3:8], embedding.weight[codes[0]])
        assert torch.equal(found[row, 8:], embedding.weight[4 + codes[1]])


def test_a_code_that_a_column_lacks_counts_as_unseen() -> None:
    embedding = CategoryEmbedding((4, 2), 3)
    known, wrong = embedding(torch.tensor([[0, 1], [2, 0]])), embedding(torch.tensor([[4, 1], [2, -7]]))
    assert torch.equal(known, wrong)


def test_codes_that_training_may_lack_start_as_zeros() -> None:
    assert torch.equal(CategoryEmbedding((4, 2), 3).weight.abs().sum(1) == 0, torch.tensor([1, 0, 0, 0, 1, 0]).bool())
    assert torch.equal(TokenEmbedding(4, 3).weight.abs().sum(1) == 0, torch.tensor([1, 1, 0, 0]).bool())


@pytest.mark.parametrize("kind", ["linear", "periodic", "quantile"])
def test_biases_of_embedded_numbers_have_no_weight_decay(kind: Any) -> None:
    embedding = number_embedding(2, {"embedding": kind})
    assert embedding is not None
    assert [p is embedding.bias for p in param_groups.split(embedding)[1]["params"]] == [True]


def test_a_periodic_embedding_is_a_linear_layer_of_sines_and_cosines() -> None:
    embedding = PeriodicEmbedding(2, 3, 4, 0.5)
    x = torch.randn(5, 2)
    angle = 2 * torch.pi * x[:, :, None] * embedding.frequency  # [B, F, frequencies]
    code = torch.cat([angle.cos(), angle.sin()], 2)
    expected = torch.relu(torch.einsum("bfk,fsk->bfs", code, embedding.weight).flatten(1) + embedding.bias)
    torch.testing.assert_close(embedding(x), expected)


def code_of(embedding: QuantileEmbedding, x: Tensor) -> Tensor:
    """Return the piecewise linear encoding [N, bins] of one number: an identity in place of the linear layer."""
    bins = embedding.edge.shape[1]
    with torch.no_grad():
        embedding.weight.copy_(torch.eye(bins))
        embedding.bias.fill_(100.0)  # beyond ReLU's bend
    return embedding(x.view(-1, 1)) - 100


def test_quantile_bins_are_filled_from_the_left_and_the_outer_ones_go_on() -> None:
    embedding = QuantileEmbedding(1, 4, 4)
    embedding.fit(torch.tensor([0.0, 1.0, 2.0, 2.0, 4.0, 4.0, 4.0, 4.0, 8.0]).view(-1, 1))
    # quantiles: 0, 2, 4, 4, 8; the third bin has no width
    found = code_of(embedding, torch.tensor([-1.0, 0.0, 1.0, 3.0, 6.0, 8.0, 12.0, 1e6]))
    expected = [
        [-0.5, 0, 0, 0],
        [0, 0, 0, 0],
        [0.5, 0, 0, 0],
        [1, 0.5, 0, 0],
        [1, 1, 0, 0.5],
        [1, 1, 0, 1],
        [1, 1, 0, 2],
        [1, 1, 0, 11],
    ]
    torch.testing.assert_close(found, torch.tensor(expected), atol=2e-5, rtol=0)


def test_a_column_of_one_value_has_an_empty_code() -> None:
    embedding = QuantileEmbedding(1, 3, 3)
    embedding.fit(torch.full((9, 1), 5.0))
    assert torch.equal(code_of(embedding, torch.tensor([4.0, 5.0, 6.0])), torch.zeros(3, 3))


@pytest.mark.parametrize("kind", ["table", "features"])
def test_preparing_places_the_edges_at_the_quantiles_of_training_rows(kind: str) -> None:
    rows = torch.rand(128, 3) * torch.tensor([1.0, 2.0, 4.0])

    def batches() -> Iterator[Any]:
        while True:
            yield {"numbers": rows, "categories": torch.zeros(128, 2, dtype=torch.int64)} if kind == "table" else rows

    model = MODELS["mlp"](SHAPES[kind], 4, embedding="quantile", bins=4)
    prepare(model, batches())
    [embedding] = [module for module in model.modules() if isinstance(module, QuantileEmbedding)]
    expected = torch.quantile(rows.double(), torch.linspace(0, 1, 5, dtype=torch.float64), 0).t().float()
    torch.testing.assert_close(embedding.edge, expected[:, :4], atol=0.03, rtol=0)
    assert "0.numbers.edge" in model.state_dict() or "0.edge" in model.state_dict()


def test_an_autoencoder_restores_the_numbers_of_a_table_and_refuses_texts() -> None:
    def batches(shape: Shape) -> Iterator[Any]:
        while True:
            yield batch(shape)

    how = {"pretrain": "autoencoder", "pretrain_steps": 2}
    prepare(MODELS["mlp"](TABLE, 4, **how), batches(TABLE))
    with pytest.raises(
        ValueError, match='pretrain = "autoencoder" restores numbers, but the inputs have categories or words'
    ):
        prepare(MODELS["gru"](TEXT, 4, **how), batches(TEXT))  # fmt: skip


# --- sequences ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cell", "theirs"), [("gru", nn.GRU), ("lstm", nn.LSTM)])
@pytest.mark.parametrize("by_steps", [False, True])
def test_a_recurrent_layer_is_torchs(cell: Any, theirs: Any, by_steps: bool) -> None:
    its, ours = theirs(3, 5, batch_first=True).double(), Recurrent(cell, 3, 5).double()
    ours.load_state_dict({key.removesuffix("_l0"): value for key, value in its.state_dict().items()})
    ours.by_steps = by_steps
    x = torch.randn(4, 7, 3, dtype=torch.float64)
    torch.testing.assert_close(ours(x), its(x)[0], atol=1e-12, rtol=0)


@pytest.mark.parametrize("by_steps", [False, True])
def test_a_network_of_both_directions_is_torchs(by_steps: bool) -> None:
    its = nn.LSTM(2, 5, num_layers=2, bidirectional=True, batch_first=True).double()
    ours = MODELS["lstm"]((2, 7), 10, width=5, depth=2, bidirectional=True).double()
    state = {}
    for key, value in its.state_dict().items():
        inner, _, place = key.partition("_l")
        state[f"layers.{place[0]}.{'back' if 'reverse' in place else 'ahead'}.{inner}"] = value
    state |= {"head.weight": torch.eye(10, dtype=torch.float64), "head.bias": torch.zeros(10, dtype=torch.float64)}
    ours.load_state_dict(state)
    for module in ours.modules():
        if isinstance(module, Recurrent):
            module.by_steps = by_steps
    x = torch.randn(4, 2, 7, dtype=torch.float64)
    _, (last, _) = its(x.transpose(1, 2))
    torch.testing.assert_close(ours(x), torch.cat([last[2], last[3]], 1), atol=1e-12, rtol=0)


@pytest.mark.parametrize("pooling", ["last", "mean", "max"])
@pytest.mark.parametrize("model", ["gru", "lstm", "transformer"])
def test_padding_changes_nothing(model: str, pooling: str) -> None:
    if model == "transformer" and pooling == "last":
        pooling = "mean"
    short, long = TokenShape(length=6, vocabulary=11), TokenShape(length=9, vocabulary=11)
    more = {} if model == "transformer" else {"bidirectional": True, "depth": 2}
    one, other = (MODELS[model](shape, 4, pooling=pooling, **more).double() for shape in (short, long))
    state = one.state_dict()
    if model == "transformer":  # positions that the shorter text lacks
        state["position"] = torch.cat([state["position"], torch.randn(3, 64, dtype=torch.float64)])
    other.load_state_dict(state)
    codes = torch.tensor([[5, 3, 2, 0, 0, 0], [1, 0, 4, 7, 8, 9], [0, 0, 0, 0, 0, 0]])
    padded = torch.cat([codes, torch.zeros(3, 3, dtype=torch.int64)], 1)
    assert one(codes).isfinite().all()
    torch.testing.assert_close(other(padded), one(codes), atol=1e-12, rtol=0)


def test_padding_is_embedded_as_zero_and_stays_so() -> None:
    embedding = TokenEmbedding(5, 3)
    found = embedding(torch.tensor([[1, 2, 0]]))
    assert torch.equal(found[0, :, 2], torch.zeros(3))
    found.sum().backward()
    assert embedding.weight.grad is not None
    assert torch.equal(embedding.weight.grad[0], torch.zeros(3))


def test_a_transformer_reads_patches_and_fills_the_last_with_zeros() -> None:
    model = MODELS["transformer"]((2, 7), 4, patch=3, width=8, heads=2)
    x = torch.randn(5, 2, 7)
    filled = torch.cat([x, torch.zeros(5, 2, 2)], 2)
    assert model.position.shape == (3, 8)
    expected = torch.stack([model.first.linear(filled[:, :, s : s + 3].flatten(1)) for s in (0, 3, 6)], 2)
    torch.testing.assert_close(model.first(x), expected)
    assert MODELS["transformer"]((2, 1000), 4).position.shape[0] == 63  # patches of 16 steps
