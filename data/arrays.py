"""Images from NumPy's archives of arrays, as Keras ships its data sets too."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hpo.data.files import BadFile, File, existing
from hpo.data.source import Source

Arrays = Mapping[str, npt.NDArray[Any]]


def npz(
    *,
    path: File,
    images: str = "images",
    labels: str = "labels",
    test_images: str = "test_images",
    test_labels: str = "test_labels",
    channels_last: bool = False,
) -> Source:
    """Return images from a file that `numpy.savez` wrote; BadFile names the array and what is wrong with it.

    Args:
        path: the file.
        images: name of the array of pixels: integers from 0 to 255, [N, C, H, W], or [N, H, W] for grey images.
        labels: name of the array of labels [N], as integers or as text; classes are numbered in their order.
        test_images: name of the pixels of a test split of its own; the file may have none.
        test_labels: name of its labels.
        channels_last: whether images are [N, H, W, C].
    """
    found = existing(path, "path")
    try:
        if not zipfile.is_zipfile(found):  # numpy would take it for pickled objects, and advise to trust them
            raise BadFile(f"{found}: is no archive of arrays that can be read; write it by numpy.savez")
        with open(found, "rb") as file, np.load(file, allow_pickle=False) as archive:
            wanted = {images, labels, *({test_images, test_labels} & set(archive.files))}
            arrays = {name: archive[name] for name in wanted & set(archive.files)}
            held = archive.files
    except (ValueError, TypeError, OSError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise BadFile(f"{found}: is no archive of arrays that can be read: {error}") from error
    for name in (images, labels):
        if name not in arrays:
            raise BadFile(f"{found}: holds no array {name!r}; it has {', '.join(held) or 'none'}")
    classes = np.unique(arrays[labels])
    has_test = test_images in arrays and test_labels in arrays
    return Source(
        images=_pixels(found, arrays, images, channels_last),
        labels=_labels(found, arrays, labels, classes, images),
        num_classes=len(classes),
        classes=tuple(map(str, classes)),
        test_images=_pixels(found, arrays, test_images, channels_last) if has_test else None,
        test_labels=_labels(found, arrays, test_labels, classes, test_images) if has_test else None,
    )


def _pixels(path: Path, arrays: Arrays, name: str, channels_last: bool) -> Tensor:
    values = arrays[name]
    if values.dtype.kind not in "iu" or values.ndim not in (3, 4) or 0 in values.shape:
        raise BadFile(f"{path}: {name} is {values.dtype} {list(values.shape)}; give integers [N, C, H, W] or [N, H, W]")
    outside = np.argwhere((values < 0) | (values > 255))
    if len(outside):
        place: tuple[int, ...] = tuple(outside[0].tolist())
        raise BadFile(f"{path}: {name}{list(place)} is {values[place]}; pixels go from 0 to 255")
    if values.ndim == 3:
        values = values[:, None]
    elif channels_last:
        values = values.transpose(0, 3, 1, 2)
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.uint8))


def _labels(path: Path, arrays: Arrays, name: str, classes: Sequence[Any] | npt.NDArray[Any], beside: str) -> Tensor:
    values = arrays[name]
    if values.dtype.kind not in "iuUS" or values.shape != arrays[beside].shape[:1]:
        raise BadFile(
            f"{path}: {name} is {values.dtype} {list(values.shape)} beside {len(arrays[beside])} {beside}; "
            "give each a whole number or a text"
        )
    strangers = np.flatnonzero(~np.isin(values, classes))
    if len(strangers):
        raise BadFile(f"{path}: {name}[{strangers[0]}] is {values[strangers[0]]}, no class of the training images")
    return torch.from_numpy(np.searchsorted(classes, values).astype(np.int64))
