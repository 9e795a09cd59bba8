"""What the benchmarks train on, made once by a seeded generator and kept in a file that all sides read.

Each class has a few prototypes, smooth random fields; an image is one of them, moved by some pixels, weakened or
strengthened, under noise. That can be learned but not at once: an MLP with a good configuration classifies 19 of 20
images after nine epochs, with a bad one half of them or none. Nothing is downloaded, and no side makes its images while
the clock runs: whoever compares calls `file` first.

The table and the key points are made for a measurement of speed. Nothing else should be read from their results.

A study file of `hpo` names a source of `bench_parts.py`; the scripts without `hpo` call `read`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

CLASSES = 10
VERSION = 1  # raised when the generator changes: files of another version are not read
COARSE = 6  # grid points along an edge from which a prototype's smooth field is drawn

Images = npt.NDArray[np.uint8]  # [N, H, W, C], as PIL wants them
Labels = npt.NDArray[np.int64]  # [N]
Floats = npt.NDArray[np.float32]
COLUMNS = 30  # of the table
EDGE, POINTS, INK = (
    96,
    15,
    3.0,
)  # key points: pixels along an edge, points of an image, width of a point's blot in pixels


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one set of images is made."""

    edge: int  # pixels
    channels: int
    prototypes: int  # of a class
    shift: int  # pixels, at most, along either axis
    noise: float  # standard deviation, that of a prototype's pixels being 1


RECIPES = {
    "grey28": Recipe(edge=28, channels=1, prototypes=3, shift=2, noise=2.5),
    "colour32": Recipe(edge=32, channels=3, prototypes=3, shift=4, noise=2.2),
}


def file(name: str, images: int) -> Path:
    """Return the file of so many images or rows by name; it is made now if it is not there."""
    folder = Path(tempfile.gettempdir()) / f"hpo-benchmark-data-{os.getuid()}"
    path = folder / f"{name}-{images}-v{VERSION}.npz"
    if not path.exists():
        folder.mkdir(exist_ok=True)
        pixels, labels = OTHERS[name](images) if name in OTHERS else made(RECIPES[name], images)
        unfinished = folder / f"{os.getpid()}.npz"
        np.savez(unfinished, images=pixels, labels=labels)
        unfinished.replace(path)
    return path


def read(name: str, images: int) -> tuple[Any, Any]:
    """Return images and labels, or other inputs and targets, by name."""
    with np.load(file(name, images)) as found:
        return found["images"], found["labels"]


def made(recipe: Recipe, images: int) -> tuple[Images, Labels]:
    """Draw images of each class in equal number, in random order."""
    random = np.random.default_rng(20)
    prototypes = _prototypes(recipe, random)
    labels = random.permutation(np.arange(images) % CLASSES)
    which = random.integers(recipe.prototypes, size=images)
    shifts = random.integers(-recipe.shift, recipe.shift + 1, size=(images, 2))
    strengths = random.uniform(0.6, 1.4, size=images)
    pixels = np.empty((images, recipe.edge, recipe.edge, recipe.channels), dtype=np.uint8)
    for row in range(images):
        field = np.roll(prototypes[labels[row], which[row]], shifts[row], axis=(0, 1))
        noisy = strengths[row] * field + recipe.noise * random.standard_normal(field.shape)
        pixels[row] = np.clip(128 + 32 * noisy, 0, 255)
    return pixels, labels.astype(np.int64)


def _prototypes(recipe: Recipe, random: np.random.Generator) -> npt.NDArray[np.float64]:
    """Return smooth fields [class, prototype, H, W, C] with mean 0 and deviation 1."""
    coarse = random.standard_normal((CLASSES, recipe.prototypes, COARSE, COARSE, recipe.channels))
    weights = _smooth(recipe.edge)
    fields = np.einsum("ya,xb,kpabc->kpyxc", weights, weights, coarse)
    fields -= fields.mean(axis=(2, 3), keepdims=True)
    return np.asarray(fields / fields.std(axis=(2, 3), keepdims=True))


def _smooth(edge: int) -> npt.NDArray[np.float64]:
    """Return weights [edge, COARSE] that spread coarse values over an edge that closes on itself, as `roll` takes it."""
    apart = np.abs(np.arange(edge)[:, None] / edge - np.arange(COARSE)[None] / COARSE)
    around = np.minimum(apart, 1 - apart) * COARSE
    return np.asarray(np.exp(-(around**2)))


def table(rows: int) -> tuple[Floats, Floats]:
    """Draw a table [N, 30] and one number for each row [N, 1], by a small random network with noise."""
    random = np.random.default_rng(21)
    columns = random.standard_normal((rows, COLUMNS))
    hidden = np.tanh(columns @ random.standard_normal((COLUMNS, 16)) / 4)
    numbers = hidden @ random.standard_normal((16, 1)) + 0.5 * random.standard_normal((rows, 1))
    return columns.astype(np.float32), numbers.astype(np.float32)


def keypoints(images: int) -> tuple[Images, Floats]:
    """Draw grey images [N, 96, 96, 1] of 15 blots, and the places of the blots in pixels [N, 30]."""
    random = np.random.default_rng(22)
    usual = random.uniform(20, EDGE - 20, size=(POINTS, 2))
    places = usual + random.normal(0, 5, size=(images, 1, 2)) + random.normal(0, 2, size=(images, POINTS, 2))
    line = np.arange(EDGE)
    pixels = np.empty((images, EDGE, EDGE, 1), dtype=np.uint8)
    for number, points in enumerate(places):
        falls = np.exp(-((line - points[..., None]) ** 2) / (2 * INK**2))  # [points, 2, edge]
        ink = np.einsum("pi,pj->ij", falls[:, 0], falls[:, 1])
        pixels[number, :, :, 0] = np.clip(160 * ink + 20 * random.standard_normal((EDGE, EDGE)) + 40, 0, 255)
    return pixels, places.reshape(images, -1).astype(np.float32)


OTHERS: dict[str, Callable[[int], tuple[Any, Any]]] = {"table": table, "keypoints": keypoints}
