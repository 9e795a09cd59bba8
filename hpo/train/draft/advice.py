"""Metric, model, training and budget that suit a source, each with its reason."""

from __future__ import annotations

import math

import torch

from hpo.data import Source, some
from hpo.train.draft.page import Line, Section

FEW, MANY = 2_000, 50_000  # rows
UNEVEN = 3.0  # times that the largest class has the rows of the smallest
SMALL_SIDE = 16  # pixels, below which an image has little to convolve
TRIALS = 64


def sections(source: Source, name: str, data: Section) -> list[Section]:
    """Return the sections of a study file for this source."""
    count = len(source.targets)
    return [
        Section("", [Line("name", name), _metric(source)]),
        data,
        Section("model", _model(source, count)),
        Section("training", _training(count)),
        Section("optimizer", _optimizer()),
        Section("schedule", [Line("name", {"choices": ["constant", "cosine"]}, "whether the rate falls to 0")]),
        Section("budget", [Line("trials", TRIALS, "of the study in all; more find better ones, ever more slowly")]),
    ]


def _metric(source: Source) -> Line:
    if source.task == "regression":
        names = f", here {', '.join(source.target_names)}" if source.target_names else ""
        return Line("metric", "rmse", f"the root of the mean squared error, in the target's own units{names}")
    if source.task == "multilabel":
        return Line("metric", "macro_f1", "the mean F1 of the labels, so that a rare label counts as much as others")
    counts = _counts(source)
    share = f"the largest class has {max(counts):,} rows and the smallest {min(counts):,}"
    if max(counts) <= UNEVEN * min(counts):
        return Line("metric", "accuracy", f"the share of right classes: {share}")
    if source.task == "binary":
        return Line("metric", "auroc", f"accuracy would hardly see the rare class: {share}")
    return Line("metric", "balanced_accuracy", f"the mean over the classes, so that rare ones count: {share}")


def _counts(source: Source) -> list[int]:
    classes = source.targets[:, 0].long() if source.task == "binary" else source.targets
    found: list[int] = torch.bincount(classes, minlength=max(2, source.num_classes)).tolist()
    return found


def _model(source: Source, count: int) -> list[Line]:
    dropout = Line("dropout", {"low": 0.0, "high": 0.5}, "against learning rows by heart")
    wide = [32, 64, 128] if count < FEW else [64, 128, 256]
    widths = Line(
        "widths", {"choices": [[wide[0]], [wide[1], wide[0]], [wide[2], wide[1]]]}, "units of the hidden layers"
    )
    if source.kind == "image":
        _, height, width = some(source.inputs).shape[1:]
        if min(height, width) < SMALL_SIDE:
            return [Line("name", "mlp", f"images of {height}x{width} are small for convolutions"), widths, dropout]
        channels = Line("channels", {"choices": [[16, 32], [16, 32, 64], [32, 64, 128]]}, "of the convolutions")
        return [Line("name", "cnn", "convolutions for images; resnet18 is larger and slower"), channels, dropout]
    if source.kind == "series":
        channels = Line("channels", {"choices": [[32, 64], [32, 64, 128]]}, "of the convolutions")
        kernel = Line("kernel", {"choices": [3, 7, 15]}, "steps that a convolution sees at once")
        return [
            Line("name", "cnn1d", "convolutions over time; gru, lstm and transformer are slower"),
            channels,
            kernel,
            dropout,
        ]
    if source.kind == "tokens":
        size = Line("embedding_size", {"choices": [32, 64]}, "numbers for each token")
        return [Line("name", "cnn1d", "convolutions over tokens; gru and transformer are slower"), size, dropout]
    return [Line("name", "mlp", "a multilayer perceptron"), widths, dropout]


def _training(count: int) -> list[Line]:
    batch = 2 ** min(8, max(4, round(math.log2(max(1, count / 40)))))
    return [
        Line("epochs", 30 if count < MANY else 15, f"{count:,} rows"),
        Line("batch_size", batch, f"about {max(1, count // batch):,} steps an epoch"),
    ]


def _optimizer() -> list[Line]:
    return [
        Line("name", "adamw", "good in most cases at one of these rates"),
        Line("lr", {"low": 1e-4, "high": 3e-2, "log": True}, "the most important value of all"),
        Line("weight_decay", {"low": 1e-6, "high": 1e-1, "log": True}),
    ]
