"""Images, features, series and tokens from NumPy archives of arrays (`.npz`), the format of Keras's data sets too."""

from __future__ import annotations

from typing import Any

from hpo.data.archive import Key, read
from hpo.data.array_inputs import Holds, fit_of, form_of, inputs_of
from hpo.data.array_keys import keys_of
from hpo.data.array_targets import targets_of
from hpo.data.files import File, existing_file
from hpo.data.names import Part
from hpo.data.source import Reading, Source, Task


def npz(
    *,
    path: File,
    images: str = "images",
    labels: str = "labels",
    validation_images: str | None = None,
    validation_labels: str | None = None,
    test_images: str = "test_images",
    test_labels: str = "test_labels",
    channels_last: bool | None = None,
    holds: Holds | None = None,
    task: Task | None = None,
    positive: str | None = None,
    group: str | None = None,
    time: str | None = None,
    reading: Reading = 2,
) -> Source:
    """Return images, features, series or tokens from a file that `numpy.savez` wrote.

    Arrays with other names than the options say are found by their usual names, such as x_train, y_train, x_val, inputs or
    train_images. BadFile names the array and the fault.

    Args:
        path: the file.
        images: array of inputs. Images are integers from 0 to 255: [N, C, H, W], [N, H, W, C], or [N, H, W] for grey ones.
            Real numbers are features [N, F] or measured images [N, C, H, W].
        labels: array of labels: whole numbers or texts [N] or [N, 1], or one-hot rows [N, K]. Classes are numbered by
            sorted label. Real numbers [N] or [N, T] are the targets of a regression.
        validation_images: array of inputs of the validation part, if the file has one.
        validation_labels: array of labels of the validation part.
        test_images: array of inputs of the test part, if the file has one.
        test_labels: array of labels of the test part.
        channels_last: whether images are [N, H, W, C] (default: decided by their shape), or series [N, T, C].
        holds: what the inputs are, if type and shape leave it open: image, features [N, F], series [N, C, T] or [N, T], or
            tokens [N, L], whole numbers with 0 for padding and 1 for unknown ones.
        task: classification, binary, multilabel (rows of 0 and 1, [N, L]) or regression (default: by the labels).
        positive: the label of a binary target that counts as positive (default: 1, true, yes or positive).
        group: array of groups [N] of the training rows, such as patients, for a split by group.
        time: array of times [N] of the training rows, numbers or dates, for a split by time.
        reading: 1 reads as hpo did before December 2026: arrays only by the names in the options, and channels first
            unless `channels_last` is true.
    """
    wanted: dict[Key, str | None] = {
        ("train", "images"): images,
        ("train", "labels"): labels,
        ("validation", "images"): validation_images,
        ("validation", "labels"): validation_labels,
        ("test", "images"): test_images,
        ("test", "labels"): test_labels,
    }
    archive = read(existing_file(path, "path"), wanted, reading, {"group": group, "time": time})
    form = form_of(archive, holds, channels_last)
    targets = targets_of(archive, task, positive)
    parts: list[Part] = [part for part in ("train", "validation", "test") if archive.has(part)]
    tensors: dict[str, Any] = {}
    for part in parts:
        prefix = "" if part == "train" else f"{part}_"
        tensors[f"{prefix}inputs"] = inputs_of(archive, part, form)
        tensors[f"{prefix}targets"] = targets.values[part]
    return Source(
        **tensors,
        **targets.about_source,
        **keys_of(archive, group, time),
        notes=(*archive.notes, *form.notes, *targets.notes),
        place=archive.place,
        fit=fit_of(form),
        reading=reading,
    )
