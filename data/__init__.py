"""Data sources by name, and their splits on a device.

The keyword-only parameters of a source function are the source's options. `load` returns the training and validation
split. Only `load_test` returns the test split, and only the final training calls it. This package knows torch, numpy
and scikit-learn, and nothing of studies.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from hpo.data.arrays import npz
from hpo.data.augment import Augmentation, Drawn, MixedLabels, Strength, Tone, draw
from hpo.data.digits import digits
from hpo.data.fake import fake
from hpo.data.files import FILE
from hpo.data.folder import image_folder
from hpo.data.overview import Overview, contact_sheet, overview
from hpo.data.published import cifar10, cifar100, fashion_mnist, kmnist, mnist, svhn
from hpo.data.select import select
from hpo.data.source import Source, Split, Splits
from hpo.data.split import parted
from hpo.data.spreadsheet import spreadsheets
from hpo.data.stored import Images, Stored, as_stored, brought, chunks, fits

SOURCES: dict[str, Callable[..., Source]] = {
    "digits": digits,
    "mnist": mnist,
    "fashion_mnist": fashion_mnist,
    "kmnist": kmnist,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "svhn": svhn,
    "image_folder": image_folder,
    "csv": spreadsheets,
    "npz": npz,
    "fake": fake,
}

__all__ = [
    "FILE",
    "SOURCES",
    "Augmentation",
    "Drawn",
    "MixedLabels",
    "Overview",
    "Source",
    "Split",
    "Splits",
    "Stored",
    "Strength",
    "Tone",
    "contact_sheet",
    "digits",
    "draw",
    "load",
    "load_test",
    "overview",
    "select",
]


def load(source: Source, *, split_seed: int, device: torch.device | str) -> Splits:
    """Return the training and validation split of a source.

    Labels are on the device. Images are too if they fit; else they stay in their store. ValueError if a class has too
    few images for a split.

    Args:
        split_seed: decides which images belong to which split.
    """
    device = torch.device(device)
    train, validation, test = parted(source, split_seed)
    resident = _is_resident(source, len(train) + len(validation), device)
    stored = [_taken(source, None, train), _taken(source, source.own_validation, validation)]
    seen, labels = [brought(images, torch.device("cpu"), resident) for images, _ in stored], [one for _, one in stored]
    mean, std, white = _channel_statistics(seen[0])
    return Splits(
        train=Split(images=_moved(seen[0], device), labels=labels[0].to(device)),
        validation=Split(images=_moved(seen[1], device), labels=labels[1].to(device)),
        num_classes=source.num_classes,
        mean=mean.to(device),
        std=std.to(device),
        digest=_digest([seen[0], labels[0], seen[1], labels[1]]),
        classes=source.classes,
        white=white,
        notes=source.notes,
        test_count=len(test),
    )


def load_test(source: Source, *, split_seed: int, device: torch.device | str) -> Split:
    """Return the sealed test split of a source, on the device or in its store as in `load`.

    It is the test part that the source ships, else the images that `load` left out for this seed.
    """
    device = torch.device(device)
    _, _, rows = parted(source, split_seed)
    images, labels = _taken(source, source.own_test, rows)
    return Split(images=brought(images, device, _is_resident(source, len(labels), device)), labels=labels.to(device))


def _taken(source: Source, own: tuple[Images, Tensor] | None, rows: Tensor) -> tuple[Stored, Tensor]:
    """Return images and labels of a part by their rows, from the source's own part if it ships one."""
    images, labels = own or (source.images, source.labels)
    return as_stored(images)[rows], labels[rows]


def _is_resident(source: Source, images: int, device: torch.device) -> bool:
    """Return whether this number of images goes into the device's memory: by option, else by their size."""
    return fits(images * source.images.shape[1:].numel(), device) if source.resident is None else source.resident


def _moved(images: Images, device: torch.device) -> Images:
    return images.to(device) if isinstance(images, Tensor) else brought(images, device, resident=False)


def _channel_statistics(images: Images) -> tuple[Tensor, Tensor, int]:
    """Return mean and std [C] of uint8 images, and their highest value.

    They are computed from counts of each pixel value. This is exact and needs no float copy of the images.
    """
    values = torch.arange(256, dtype=torch.float64)
    counts = torch.zeros((images.shape[1], 256), dtype=torch.int64)
    for chunk in chunks(images):
        channels = chunk.transpose(0, 1).flatten(1)  # [C, N*H*W]
        counts += torch.stack([channel.bincount(minlength=256) for channel in channels])
    shares = counts.double() / (images.shape.numel() // images.shape[1])
    mean = (shares * values).sum(1)
    std = (shares * (values - mean[:, None]).square()).sum(1).sqrt()
    white = int(counts.sum(0).nonzero().max())
    return mean.float(), torch.where(std > 0, std, 1.0).float(), white


def _digest(parts: list[Images]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{part.dtype}{list(part.shape)}".encode())
        for chunk in chunks(part):
            digest.update(chunk.contiguous().numpy().data)
    return digest.hexdigest()
