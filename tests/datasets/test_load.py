from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from hpo import data
from hpo.data import SOURCES, Source, Splits, Stored
from hpo.data.split import parted


def source(per_class: int = 40, num_classes: int = 3, **changes) -> Source:
    count = per_class * num_classes
    values = {
        "images": torch.randint(
            0, 256, (count, 2, 4, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
        ),
        "labels": torch.arange(count) % num_classes,
        "num_classes": num_classes,
    }
    return Source(**(values | changes))


def stratified(labels: torch.Tensor, seed: int, **own: object) -> tuple[torch.Tensor, ...]:
    images = torch.zeros((len(labels), 1, 1, 1), dtype=torch.uint8)
    return parted(Source(inputs=images, targets=labels, num_classes=int(labels.max()) + 1, **own), seed)


def load(given: Source, split_seed: int = 0) -> Splits:
    return data.load(given, split_seed=split_seed, device="cpu")


def test_the_digits_are_the_whole_set_of_scikit_learn() -> None:
    digits = SOURCES["digits"]()
    assert digits.images.shape == (1797, 1, 8, 8)
    assert (int(digits.images.min()), int(digits.images.max())) == (0, 16)
    assert digits.labels.unique().tolist() == list(range(10))
    assert digits.test_inputs is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": torch.zeros(120, 2, 4, 5).double()}, "inputs are torch.float64.*; give images as uint8 or float32"),
        ({"images": torch.zeros(120, 4, 5, dtype=torch.uint8)}, r"\[120, 4, 5\]; give images as .* \[N, C, H, W\]"),
        ({"images": torch.zeros(0, 2, 4, 5, dtype=torch.uint8)}, "none of its sides may be 0"),
        ({"labels": torch.zeros(120, dtype=torch.int32)}, "targets are torch.int32; give class numbers as torch.int64"),
        ({"labels": torch.zeros(119, dtype=torch.int64)}, r"targets have shape \[119\] beside 120 inputs"),
        ({"labels": torch.full((120,), 3)}, r"run from 3 to 3; with num_classes = 3 they must lie in 0..2"),
        ({"labels": torch.full((120,), -1)}, "run from -1 to -1"),
        ({"num_classes": 1}, "num_classes = 1: a source needs at least 2"),
        ({"test_labels": torch.zeros(1, dtype=torch.int64)}, "only one of test_inputs and test_targets"),
        (
            {"test_images": torch.zeros(1, 2, 4, 4, dtype=torch.uint8), "test_labels": torch.zeros(1).long()},
            r"test_inputs are torch.uint8 \[2, 4, 4\] a row, inputs torch.uint8 \[2, 4, 5\]",
        ),
        (
            {"test_images": torch.zeros(2, 2, 4, 5, dtype=torch.uint8), "test_labels": torch.zeros(1).long()},
            r"test_targets have shape \[1\] beside 2 test_inputs",
        ),
    ],
)
def test_a_malformed_source_is_refused_with_the_mend(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        source(**changes)


def test_the_parts_are_disjoint_cover_everything_and_are_70_15_15() -> None:
    labels = torch.arange(1000) % 10
    parts = stratified(labels, 5)
    assert [len(part) for part in parts] == [700, 150, 150]
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(1000))
    for part in parts:
        assert labels[part].bincount().unique().tolist() == [len(part) // 10]


def test_without_a_test_part_the_split_is_85_15() -> None:
    own = {"test_inputs": torch.zeros(1, 1, 1, 1, dtype=torch.uint8), "test_targets": torch.zeros(1, dtype=torch.int64)}
    train, validation, _ = stratified(torch.arange(1000) % 10, 5, **own)
    assert (len(train), len(validation)) == (850, 150)
    assert torch.equal(torch.cat([train, validation]).sort().values, torch.arange(1000))


def test_a_split_depends_on_its_seed_alone() -> None:
    labels = torch.arange(300) % 3
    assert all(map(torch.equal, stratified(labels, 2**40 + 1), stratified(labels, 2**40 + 1)))
    assert not torch.equal(stratified(labels, 1)[2], stratified(labels, 2)[2])


@pytest.mark.parametrize(
    ("own", "fewest"), [((), 8), (("test",), 7), (("validation",), 7), (("validation", "test"), 1)]
)
@pytest.mark.parametrize("common", [10, 50, 333, 1000])
def test_the_rarest_class_is_in_every_part(own, fewest, common) -> None:
    """The rarest class allowed is in every part and a rarer one is refused."""

    def of(labels: list[int]) -> Source:
        few = {"images": torch.zeros((len(labels), 1, 1, 1), dtype=torch.uint8), "labels": torch.tensor(labels)}
        shipped = {f"{part}_{name}": value[:2] for part in own for name, value in few.items()}
        return Source(**few, **shipped, num_classes=2)

    for seed in range(5):
        parts = zip(("train", "validation", "test"), parted(of([0] * common + [1] * fewest), seed), strict=True)
        assert all((rows >= common).any() for part, rows in parts if part not in own)
    if fewest > 1:
        with pytest.raises(ValueError, match=f"class 1 has {fewest - 1} images.*at least {fewest}"):
            parted(of([0] * common + [1] * (fewest - 1)), 0)


def test_load_and_load_test_share_nothing_and_leave_nothing_out() -> None:
    given = source()
    splits = load(given)
    test = data.load_test(given, split_seed=0, device="cpu")
    assert [len(part.targets) for part in (splits.train, splits.validation, test)] == [84, 18, 18]
    rows = torch.cat([part.inputs.flatten(1) for part in (splits.train, splits.validation, test)])
    assert len(rows.unique(dim=0)) == len(given.images)


def test_what_load_returns_has_no_test_part() -> None:
    assert [field.name for field in fields(load(source()))] == [
        "train",
        "validation",
        "num_classes",
        "mean",
        "std",
        "digest",
        "task",
        "classes",
        "target_names",
        "target_mean",
        "target_std",
        "categories",
        "vocabulary",
        "about",
        "white",
        "notes",
        "test_count",  # their number, and none of them
    ]


class Sealed(Stored):
    """Images that may be counted and not read."""

    def take(self, which: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the test part was opened")


def test_load_counts_a_shipped_test_part_and_does_not_read_it() -> None:
    sealed = Sealed(store=source().images, rows=torch.arange(11))
    assert load(source(test_inputs=sealed, test_targets=torch.arange(11) % 3)).test_count == 11


def test_a_test_split_of_the_source_is_used_as_it_is() -> None:
    test_images = torch.full((2, 2, 4, 5), 7, dtype=torch.uint8)
    given = source(test_images=test_images, test_labels=torch.tensor([1, 2]))
    splits = load(given)
    assert (len(splits.train.targets), len(splits.validation.targets)) == (102, 18)
    test = data.load_test(given, split_seed=0, device="cpu")
    assert torch.equal(test.inputs, test_images)
    assert test.targets.tolist() == [1, 2]


def test_statistics_are_per_channel_and_of_the_training_part_alone() -> None:
    splits = load(source())
    pixels = splits.train.inputs.double()
    torch.testing.assert_close(splits.mean.double(), pixels.mean((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(splits.std.double(), pixels.std((0, 2, 3), correction=0), rtol=1e-6, atol=0)
    assert splits.mean.dtype == splits.std.dtype == torch.float32


def test_a_constant_channel_has_standard_deviation_one() -> None:
    images = source().images.clone()
    images[:, 1] = 9
    splits = load(source(images=images))
    assert splits.mean[1].item() == 9.0
    assert splits.std[1].item() == 1.0


def test_the_digest_tells_data_and_splits_apart() -> None:
    images = source().images.clone()
    digest = load(source()).digest
    assert len(digest) == 64
    assert load(source()).digest == digest
    assert load(source(), split_seed=1).digest != digest
    used = stratified(source().labels, 0)[0][0]
    images[used, 0, 0, 0] ^= 1
    assert load(source(images=images)).digest != digest


def test_the_digest_does_not_open_the_test_part() -> None:
    images = source().images.clone()
    images[stratified(source().labels, 0)[2]] = 0
    assert load(source(images=images)).digest == load(source()).digest
