"""Published data sets, through torchvision's classes: downloaded once, verified by checksum, kept as raw pixels.

A file that lies in `data_dir()` where torchvision would put it is used instead of a download.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpo.data.cache import cached, keep
from hpo.data.files import BadFile, data_dir
from hpo.data.source import Source

DIGITS = [str(digit) for digit in range(10)]


@dataclass(frozen=True, kw_only=True)
class File:
    """A file of a data set."""

    path: str  # below the data folder
    url: str | None  # None for a file that is unpacked from an archive
    md5: str


@dataclass(frozen=True, kw_only=True)
class Format:
    """How to use one kind of torchvision's data set classes."""

    files: Callable[[Any], list[File]]
    open: Callable[[Any, str, bool], Any]  # class, folder, whether the training part -> data set
    pixels: Callable[[Any], Any]  # [N, C, H, W]
    labels: Callable[[Any], Any]


def mnist() -> Source:
    """Return 70,000 handwritten digits [1, 28, 28] (LeCun et al. 1998). 10,000 of them are the test split."""
    return _published("MNIST", IDX)


def fashion_mnist() -> Source:
    """Return 70,000 images of clothing [1, 28, 28] in ten classes (Xiao et al. 2017). 10,000 are the test split."""
    return _published("FashionMNIST", IDX)


def kmnist() -> Source:
    """Return 70,000 cursive Japanese characters [1, 28, 28] in ten classes (Clanuwat et al. 2018).

    10,000 of them are the test split.
    """
    return _published("KMNIST", IDX)


def cifar10() -> Source:
    """Return 60,000 photographs [3, 32, 32] in ten classes (Krizhevsky 2009). 10,000 of them are the test split."""
    return _published("CIFAR10", BATCHES)


def cifar100() -> Source:
    """Return 60,000 photographs [3, 32, 32] in a hundred classes (Krizhevsky 2009). 10,000 of them are the test split."""
    return _published("CIFAR100", BATCHES)


def svhn() -> Source:
    """Return 99,289 digits of house numbers [3, 32, 32] (Netzer et al. 2011). 26,032 of them are the test split."""
    return _published("SVHN", MATLAB)


def _published(name: str, form: Format) -> Source:
    from torchvision import datasets  # here, since other sources do not need it

    kind = getattr(datasets, name)
    files = form.files(kind)
    key = [file.md5 for file in files]
    return cached(name.lower(), key, lambda folder: keep(folder, _read(kind, form, files, folder)))


def _read(kind: Any, form: Format, files: list[File], unfinished: Path) -> Source:
    """Let torchvision download, verify and read a data set in a temporary folder of the unfinished cache entry.

    torchvision trusts unpacked files by their names. So nothing may be left of a process that was killed.
    """
    home = data_dir()
    with tempfile.TemporaryDirectory(dir=unfinished) as folder:
        for file in files:
            _link(home / file.path, Path(folder) / file.path, file.md5)
        try:
            train, test = (form.open(kind, folder, of_training) for of_training in (True, False))
        except (OSError, RuntimeError) as error:
            raise BadFile(*_how_to_get(home, files, error)) from error
    classes = [str(name) for name in getattr(train, "classes", DIGITS)]
    return Source(
        inputs=_pixels(form.pixels(train)),
        targets=_labels(form.labels(train)),
        num_classes=len(classes),
        classes=tuple(classes),
        test_inputs=_pixels(form.pixels(test)),
        test_targets=_labels(form.labels(test)),
    )


def _link(path: Path, link: Path, md5: str) -> None:
    """Link an existing file where torchvision looks for it; BadFile if its checksum is wrong."""
    from torchvision.datasets.utils import calculate_md5

    if not path.is_file():
        return
    found = calculate_md5(path)
    if found != md5:
        raise BadFile(f"{path}: has MD5 {found}, but the published file has {md5}; remove it, or download it again")
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(path)


def _how_to_get(home: Path, files: list[File], error: Exception) -> list[str]:
    cause = str(error).strip().splitlines()[-1:] or [type(error).__name__]
    missing = [f"  {home / file.path} from {file.url} (MD5 {file.md5})" for file in files if file.url is not None]
    return [f"cannot be downloaded ({cause[0]}); put these files there by hand (HPO_DATA_DIR):", *missing]


def _pixels(values: Any) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values))


def _labels(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.int64)


def _idx_files(kind: Any) -> list[File]:
    folder = f"{kind.__name__}/raw"
    return [File(path=f"{folder}/{name}", url=f"{kind.mirrors[0]}{name}", md5=md5) for name, md5 in kind.resources]


def _batch_files(kind: Any) -> list[File]:
    unpacked = [*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])]
    inside = [File(path=f"{kind.base_folder}/{name}", url=None, md5=md5) for name, md5 in unpacked]
    return [File(path=kind.filename, url=kind.url, md5=kind.tgz_md5), *inside]


def _matlab_files(kind: Any) -> list[File]:
    parts = [kind.split_list[part] for part in ("train", "test")]
    return [File(path=name, url=url, md5=md5) for url, name, md5 in parts]


def _open(kind: Any, folder: str, of_training: bool) -> Any:
    return kind(folder, train=of_training, download=True)


def _open_part(kind: Any, folder: str, of_training: bool) -> Any:
    return kind(folder, split="train" if of_training else "test", download=True)


def _grey(found: Any) -> Any:
    return found.data.numpy()[:, None]


def _channels_first(found: Any) -> Any:
    return found.data.transpose(0, 3, 1, 2)


IDX = Format(files=_idx_files, open=_open, pixels=_grey, labels=attrgetter("targets"))
BATCHES = Format(files=_batch_files, open=_open, pixels=_channels_first, labels=attrgetter("targets"))
MATLAB = Format(files=_matlab_files, open=_open_part, pixels=attrgetter("data"), labels=attrgetter("labels"))
