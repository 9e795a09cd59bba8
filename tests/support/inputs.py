"""Models for every kind of input, a batch of each kind, and data of each kind that can be learned."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from hpo import data
from hpo.data import Source, Splits
from hpo.models.shapes import Shape, TableShape, TokenShape

SEQUENTIAL = ("cnn1d", "gru", "lstm", "transformer")
TABLE = TableShape(numbers=3, categories=(4, 2))
TEXT = TokenShape(length=9, vocabulary=11)
SHAPES: dict[str, Shape] = {
    "image": (1, 8, 8),
    "series": (2, 20),
    "features": (3,),
    "table": TABLE,
    "numbers": TableShape(numbers=3),
    "categories": TableShape(numbers=0, categories=(4, 2)),
    "tokens": TEXT,
    "named": {"left": (2,)},
}


def batch(shape: Shape, count: int = 6) -> Any:
    generator = torch.Generator().manual_seed(0)
    if isinstance(shape, TableShape):
        numbers = {"numbers": torch.randn(count, shape.numbers, generator=generator)} if shape.numbers else {}
        codes = [torch.randint(0, size, (count,), generator=generator) for size in shape.categories]
        return numbers | ({"categories": torch.stack(codes, 1)} if codes else {})
    if isinstance(shape, TokenShape):
        return torch.randint(1, shape.vocabulary, (count, shape.length), generator=generator)
    assert isinstance(shape, tuple)
    return torch.randn(count, *shape, generator=generator)


#: A model's options and the kind of its inputs; each option of a model is in one of them.
MODELS_OF: dict[str, tuple[str, str, dict[str, Any]]] = {
    **{f"mlp of {kind}": ("mlp", kind, {}) for kind in ("image", "series", "features", "table", "numbers", "categories")},
    **{
        f"mlp of {kind}, {embedding}": ("mlp", kind, {"embedding": embedding, "embedding_size": 5})
        for kind in ("features", "table")
        for embedding in ("none", "linear", "periodic", "quantile")
    },
    "mlp, sizes of a table": ("mlp", "table", {"embedding": "quantile", "bins": 4, "category_size": 3}),
    "mlp, frequencies": ("mlp", "table", {"embedding": "periodic", "frequencies": 4, "frequency_scale": 1.0}),
    **{f"{name} of {kind}": (name, kind, {}) for name in SEQUENTIAL for kind in ("series", "tokens")},
    "cnn1d, deep": ("cnn1d", "series", {"channels": [4, 6], "kernel": 3, "depth": 2, "residual": True, "norm": "layer"}),
    "cnn1d, every step": ("cnn1d", "series", {"pooling": "none", "dropout": 0.1, "block_dropout": 0.1}),
    "cnn1d of words": ("cnn1d", "tokens", {"pooling": "max", "embedding_size": 5, "activation": "swiglu"}),
    "gru, both ways": ("gru", "series", {"bidirectional": True, "depth": 2, "width": 5, "dropout": 0.2}),
    "lstm, mean of words": ("lstm", "tokens", {"bidirectional": True, "pooling": "mean", "embedding_size": 5}),
    "gru, most of words": ("gru", "tokens", {"pooling": "max"}),
    "transformer, patches": ("transformer", "series", {"patch": 3, "width": 12, "heads": 3, "hidden": 7, "depth": 1}),
    "transformer, most of words": ("transformer", "tokens", {"pooling": "max", "dropout": 0.1}),
}  # fmt: skip


@cache
def splits_of(kind: str, task: str = "classification", count: int = 80, device: str = "cpu") -> Splits:
    """Return data of a kind whose targets depend on the inputs."""
    inputs = batch(SHAPES[kind], count)
    if kind == "tokens":
        inputs[::2, 5:] = 0  # padding
    seen = next(iter(inputs.values())) if isinstance(inputs, dict) else inputs
    total = seen.flatten(1).double().sum(1)
    targets: dict[str, Tensor] = {
        "classification": (total.argsort().argsort() * 4 // count).long(),
        "binary": (total > total.median())[:, None],
        "multilabel": torch.stack([total > total.median(), total > total.mean()], 1),
        "regression": torch.stack([total, total.square(), total.abs(), 3 - total], 1).float(),
    }
    shape = SHAPES[kind]
    source = Source(
        inputs=inputs,
        targets=targets[task],
        task=task,
        num_classes=4 if task == "classification" else 0,
        fit=lambda given: data.Fitted(
            transform=lambda inputs: inputs,
            categories=shape.categories if isinstance(shape, TableShape) else (),
            vocabulary=shape.vocabulary if isinstance(shape, TokenShape) else 0,
        ),
    )
    return data.load(source, split_seed=0, device=device)
