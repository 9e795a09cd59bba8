"""Sources by name, and their parts on a device; every keyword-only parameter of a source function is an
option of it.

`load` returns what a search may see. Only `load_test` gives the test part, and only the final training calls
it. This package knows torch, numpy and scikit-learn, and nothing of studies.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from data.augment import Augmentation, Drawn, MixedLabels, Strength, Tone, draw
from data.digits import digits
from data.source import Source, Split, Splits
from data.split import stratified, stratified_without_test

SOURCES: dict[str, Callable[..., Source]] = {"digits": digits}

__all__ = [
    "SOURCES",
    "Augmentation",
    "Drawn",
    "MixedLabels",
    "Source",
    "Split",
    "Splits",
    "Strength",
    "Tone",
    "digits",
    "draw",
    "load",
    "load_test",
]


def load(source: Source, *, split_seed: int, device: torch.device | str) -> Splits:
    """Bring the training and the validation part of a source to a device."""
    if source.test_images is None:
        train, validation, _ = stratified(source.labels, split_seed)
    else:
        train, validation = stratified_without_test(source.labels, split_seed)
    parts = [source.images[train], source.labels[train], source.images[validation], source.labels[validation]]
    mean, std = _channel_statistics(parts[0])
    digest = _digest(parts)
    train_images, train_labels, validation_images, validation_labels = (part.to(device) for part in parts)
    return Splits(
        train=Split(images=train_images, labels=train_labels),
        validation=Split(images=validation_images, labels=validation_labels),
        num_classes=source.num_classes,
        mean=mean.to(device),
        std=std.to(device),
        digest=digest,
        white=int(parts[0].max()),
    )


def load_test(source: Source, *, split_seed: int, device: torch.device | str) -> Split:
    """Bring the sealed test part to a device: the source's own, else the one that `load` left out at this
    seed.
    """
    if source.test_images is not None and source.test_labels is not None:
        return Split(images=source.test_images.to(device), labels=source.test_labels.to(device))
    _, _, test = stratified(source.labels, split_seed)
    return Split(images=source.images[test].to(device), labels=source.labels[test].to(device))


def _channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and std [C] of uint8 images by counting each pixel value: exact, and without a float copy
    of them.
    """
    values = torch.arange(256, dtype=torch.float64)
    channels = images.transpose(0, 1).flatten(1)  # [C, N*H*W]
    shares = torch.stack([channel.bincount(minlength=256) for channel in channels]).double() / channels.shape[1]
    mean = (shares * values).sum(1)
    std = (shares * (values - mean[:, None]).square()).sum(1).sqrt()
    return mean.float(), torch.where(std > 0, std, 1.0).float()


def _digest(parts: list[Tensor]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{part.dtype}{list(part.shape)}".encode())
        digest.update(part.contiguous().cpu().numpy().data)
    return digest.hexdigest()
