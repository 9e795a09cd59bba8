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

from hpo.data import statistics
from hpo.data.arrays import npz
from hpo.data.augment import Augmentation, Drawn, MixedLabels, Strength, Tone, draw
from hpo.data.codes import encoded, fit_of
from hpo.data.digits import digits
from hpo.data.fake import fake
from hpo.data.files import FILE
from hpo.data.folder import image_folder
from hpo.data.inputs import Inputs, Kind, are_resident, each, head, placed, selected, some
from hpo.data.leaks import Leak, leaks
from hpo.data.overview import Overview, contact_sheet, overview
from hpo.data.published import cifar10, cifar100, fashion_mnist, kmnist, mnist, svhn
from hpo.data.select import select
from hpo.data.source import Fitted, Source, Split, Splits, Task
from hpo.data.split import notes_on, parted
from hpo.data.spreadsheet import spreadsheets
from hpo.data.stored import CPU, Stored, chunks
from hpo.data.tables import series, table, text

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
    "table": table,
    "series": series,
    "text": text,
    "fake": fake,
}

__all__ = [
    "FILE",
    "SOURCES",
    "Augmentation",
    "Drawn",
    "Fitted",
    "Inputs",
    "Kind",
    "Leak",
    "MixedLabels",
    "Overview",
    "Source",
    "Split",
    "Splits",
    "Stored",
    "Strength",
    "Task",
    "Tone",
    "contact_sheet",
    "digits",
    "draw",
    "each",
    "head",
    "leaks",
    "load",
    "load_test",
    "overview",
    "select",
    "some",
]


def load(source: Source, *, split_seed: int, device: torch.device | str) -> Splits:
    """Return the training and validation split of a source.

    Targets are on the device. Inputs are too if they fit; else they stay in their store. ValueError if a class has too
    few rows for a split. All statistics and encodings come from the training split.

    Args:
        split_seed: decides which rows belong to which split.
    """
    device = torch.device(device)
    train, validation, test = parted(source, split_seed)
    resident = are_resident(source.inputs, len(train) + len(validation), device, source.resident)
    parts = [_taken(source, None, train), _taken(source, source.own_validation, validation)]
    fit = fit_of(source)
    raw = [placed(inputs, CPU, resident or fit is not None) for inputs, _ in parts]
    targets = [one for _, one in parts]
    fitted = None if fit is None else fit(raw[0])
    inputs = raw if fitted is None else [encoded(one, fitted) for one in raw]
    mean, std, white = statistics.of_inputs(inputs[0])
    moments = statistics.of_targets(targets[0]) if source.task == "regression" else None
    known = [
        Split(inputs=placed(x, device, resident), targets=_targets(y, moments).to(device))
        for x, y in zip(inputs, targets, strict=True)
    ]
    return Splits(
        train=known[0],
        validation=known[1],
        task=source.task,
        num_classes=source.num_classes,
        mean=each(mean, lambda one: one.to(device)),
        std=each(std, lambda one: one.to(device)),
        target_mean=None if moments is None else moments[0].to(device),
        target_std=None if moments is None else moments[1].to(device),
        digest=_digest([inputs[0], targets[0], inputs[1], targets[1]]),
        classes=source.classes,
        target_names=source.target_names,
        categories=fitted.categories if fitted else (),
        vocabulary=fitted.vocabulary if fitted else 0,
        about=fitted.about if fitted else {},
        white=white,
        notes=(*source.notes, *notes_on(source, train, validation, test)),
        test_count=len(test),
    )


def load_test(source: Source, *, split_seed: int, device: torch.device | str) -> Split:
    """Return the sealed test split of a source, on the device or in its store as in `load`.

    It is the test part that the source ships, else the rows that `load` left out for this seed.
    """
    device = torch.device(device)
    train, _, rows = parted(source, split_seed)
    inputs, targets = _taken(source, source.own_test, rows)
    of_training = _taken(source, None, train)
    if fit := fit_of(source):
        inputs = encoded(placed(inputs, CPU, resident=True), fit(placed(of_training[0], CPU, resident=True)))
    moments = statistics.of_targets(of_training[1]) if source.task == "regression" else None
    resident = are_resident(source.inputs, len(targets), device, source.resident)
    return Split(inputs=placed(inputs, device, resident), targets=_targets(targets, moments).to(device))


def _taken(source: Source, own: tuple[Inputs, Tensor] | None, rows: Tensor) -> tuple[Inputs, Tensor]:
    """Return inputs and targets of a part by their rows, from the source's own part if it ships one."""
    inputs, targets = own or (source.inputs, source.targets)
    return selected(inputs, rows), targets[rows]


def _targets(targets: Tensor, moments: statistics.Moments | None) -> Tensor:
    return targets if moments is None else (targets - moments[0]) / moments[1]


def _digest(parts: list[Inputs]) -> str:
    digest = hashlib.sha256()
    named = [sorted(part.items()) if isinstance(part, dict) else [("", part)] for part in parts]
    for name, rows in (one for part in named for one in part):
        digest.update(f"{name}{rows.dtype}{list(rows.shape)}".encode())
        for chunk in chunks(rows):
            digest.update(chunk.contiguous().numpy().data)
    return digest.hexdigest()
