"""Small data sets in the very formats that torchvision reads, with its tables of checksums changed to match."""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
from torchvision import datasets

COUNTS = {True: 120, False: 30}  # images of the training and of the test part
rng = np.random.default_rng(0)


def pixels(of_training: bool, *shape: int) -> np.ndarray:
    return rng.integers(0, 256, (COUNTS[of_training], *shape), dtype=np.uint8)


def labels(of_training: bool, classes: int) -> np.ndarray:
    return np.arange(COUNTS[of_training], dtype=np.int64) % classes


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def write(path: Path, content: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return md5(content)


def idx(kind: Any, home: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[np.ndarray, np.ndarray]]:
    """MNIST's own format: a magic number, the sizes big-endian, the bytes; zipped."""
    made, resources = [], []
    for of_training, prefix in ((True, "train"), (False, "t10k")):
        images, numbers = pixels(of_training, 28, 28), labels(of_training, 10)
        for name, values in ((f"{prefix}-images-idx3-ubyte.gz", images), (f"{prefix}-labels-idx1-ubyte.gz", numbers)):
            head = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, dtype=">i4").tobytes()
            content = gzip.compress(head + values.astype(np.uint8).tobytes())
            resources.append((name, write(home / kind.__name__ / "raw" / name, content)))
        made.append((images[:, None], numbers))
    monkeypatch.setattr(kind, "resources", resources)
    return made


def batches(kind: Any, home: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[np.ndarray, np.ndarray]]:
    """CIFAR's: pickled rows of 3072 bytes, in an archive."""
    hundred = kind is datasets.CIFAR100
    names = [f"class {number}" for number in range(100 if hundred else 10)]
    files: dict[str, bytes] = {kind.meta["filename"]: pickle.dumps({kind.meta["key"]: names})}
    made = []
    for of_training, listed in ((True, kind.train_list), (False, kind.test_list)):
        images, numbers = pixels(of_training, 3, 32, 32), labels(of_training, len(names) if not hundred else 15)
        rows = np.array_split(np.arange(len(images)), len(listed))
        for (name, _), of_batch in zip(listed, rows, strict=True):
            key = "fine_labels" if hundred else "labels"
            batch = {"data": images[of_batch].reshape(len(of_batch), -1), key: numbers[of_batch].tolist()}
            files[name] = pickle.dumps(batch)
        made.append((images, numbers))
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{kind.base_folder}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    monkeypatch.setattr(kind, "tgz_md5", write(home / kind.filename, archive.getvalue()))
    for table in ("train_list", "test_list"):
        monkeypatch.setattr(kind, table, [[name, md5(files[name])] for name, _ in getattr(kind, table)])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5(files[kind.meta["filename"]])})
    return made


def matlab(kind: Any, home: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[np.ndarray, np.ndarray]]:
    """SVHN's: a MATLAB file of [H, W, C, N], the digit 0 called 10."""
    made, table = [], dict(kind.split_list)
    for of_training, part in ((True, "train"), (False, "test")):
        images, numbers = pixels(of_training, 3, 32, 32), labels(of_training, 10)
        url, name, _ = table[part]
        called = np.where(numbers == 0, 10, numbers).astype(np.uint8)[:, None]
        content = io.BytesIO()
        scipy.io.savemat(content, {"X": images.transpose(2, 3, 1, 0), "y": called})
        table[part] = [url, name, write(home / name, content.getvalue())]
        made.append((images, numbers))
    monkeypatch.setattr(kind, "split_list", table)
    return made


#: source -> torchvision's class, how its files are written, one of them
PUBLISHED = {
    "mnist": (datasets.MNIST, idx, "MNIST/raw/train-images-idx3-ubyte.gz"),
    "fashion_mnist": (datasets.FashionMNIST, idx, "FashionMNIST/raw/t10k-labels-idx1-ubyte.gz"),
    "kmnist": (datasets.KMNIST, idx, "KMNIST/raw/t10k-images-idx3-ubyte.gz"),
    "cifar10": (datasets.CIFAR10, batches, "cifar-10-python.tar.gz"),
    "cifar100": (datasets.CIFAR100, batches, "cifar-100-python.tar.gz"),
    "svhn": (datasets.SVHN, matlab, "test_32x32.mat"),
}
