"""What every source can be told: classes, a subset, folds; and how that stands in a study file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hpo import data
from hpo.data import SOURCES, Source, Splits, select
from hpo.data.split import parted
from hpo.errors import SpecError
from hpo.spec.study_file import StudySpec
from hpo.spec.training import TrainConfig
from hpo.study import resolve
from hpo.train import loop
from hpo.train.build import assemble, registry

NAMES = ("ant", "bee", "cat", "dog")


def source(count: int = 400, **changes) -> Source:
    """Return images whose only pixel is their number modulo 256, of four classes in turn."""
    images = (torch.arange(count) % 256).to(torch.uint8).view(-1, 1, 1, 1)
    values = {"images": images, "labels": torch.arange(count) % 4, "num_classes": 4, "classes": NAMES}
    return Source(**(values | changes))


def load(given: Source, split_seed: int = 0) -> Splits:
    return data.load(given, split_seed=split_seed, device="cpu")


@pytest.mark.parametrize(
    ("classes", "names", "numbers"),
    [
        (["dog", "ant"], ("dog", "ant"), [3, 0]),
        ([2, "bee"], ("cat", "bee"), [2, 1]),
        ([["ant", "bee"], ["dog"]], ("ant+bee", "dog"), [[0, 1], [3]]),
        ([1, ["cat", 0]], ("bee", "cat+ant"), [[1], [2, 0]]),
    ],
)
def test_classes_are_kept_and_numbered_anew(classes: list, names: tuple, numbers: list) -> None:
    test_labels = torch.tensor([3, 2, 1, 0])
    given = source(test_images=source(4).images, test_labels=test_labels)
    splits = load(select(given, classes=classes))
    test = data.load_test(select(given, classes=classes), split_seed=0, device="cpu")
    assert (splits.classes, splits.num_classes) == (names, 2)
    for part in (splits.train, splits.validation):
        for new, old in enumerate(numbers):
            seen = part.inputs[part.targets == new].flatten().long() % 4  # the class that the pixel tells
            assert sorted(set(seen.tolist())) == sorted([old] if isinstance(old, int) else old)
    wanted = {old: new for new, group in enumerate(numbers) for old in ([group] if isinstance(group, int) else group)}
    assert test.targets.tolist() == [wanted[old] for old in [3, 2, 1, 0] if old in wanted]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": ["ant", "cow"]}, "no class 'cow'; write a number from 0 to 3 or 'ant', 'bee', 'cat', 'dog'"),
        ({"classes": [0, 4]}, "there is no class 4; write a number from 0 to 3"),
        ({"classes": ["ant"]}, "name at least 2, each once, and none empty"),
        ({"classes": ["ant", 0]}, "name at least 2, each once, and none empty"),
        ({"classes": ["ant", []]}, "name at least 2, each once, and none empty"),
        ({"folds": 5}, "folds = 5, fold = None: give both, with fold from 0 to 4"),
        ({"fold": 1}, "folds = None, fold = 1: give both"),
        ({"folds": 5, "fold": 5}, "folds = 5, fold = 5: give both, with fold from 0 to 4"),
        (
            {"subset": 341},
            "subset = 341: train and validation have 340 images in 4 classes; give a number from 26 to 340",
        ),
        ({"subset": 16}, "subset = 16: train and validation have 340 images"),
        ({"folds": 90, "fold": 0}, "class 'ant' has 85 images (first: image "),
    ],
)
def test_what_a_source_does_not_hold_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        load(select(source(), **options))
    assert message in str(caught.value)


@pytest.mark.parametrize("own_test", [False, True])
def test_folds_cover_everything_once_beside_the_same_sealed_test_part(own_test: bool) -> None:
    shipped = {"test_images": source(8).images, "test_labels": source(8).labels} if own_test else {}
    given = source(**shipped)
    plain = parted(given, 3)
    held = []
    for fold in range(5):
        train, validation, test = parted(select(given, folds=5, fold=fold), 3)
        assert torch.equal(test, plain[2])
        assert torch.equal(torch.cat([train, validation]).sort().values, torch.cat(plain[:2]).sort().values)
        assert given.labels[validation].bincount().unique().numel() <= 2
        held.append(validation)
    assert torch.equal(torch.cat(held).sort().values, torch.cat(plain[:2]).sort().values)
    assert len({load(select(given, folds=5, fold=fold)).digest for fold in range(5)}) == 5


def test_a_subset_is_stratified_nested_and_leaves_the_test_part_whole() -> None:
    given = source()
    whole = parted(given, 1)
    small, large = (parted(select(given, subset=count), 1) for count in (40, 200))
    assert (len(small[0]), len(small[1]), len(large[0]) + len(large[1])) == (33, 7, 200)
    for of_small, of_large, of_whole in zip(small[:2], large[:2], whole[:2], strict=True):
        assert set(of_small.tolist()) < set(of_large.tolist()) < set(of_whole.tolist())
        counts = given.labels[of_small].bincount(minlength=4)
        assert counts.max() - counts.min() <= 1
    assert torch.equal(small[2], whole[2])


def test_names_of_classes_must_be_as_many_as_classes() -> None:
    with pytest.raises(ValueError, match="2 names of classes for 4 classes; give one for each"):
        source(classes=("a", "b"))


# --- in a study file --------------------------------------------------------------------------------------------------

OWN = """
from hpo.data import Source
import torch

def mine(*, subset: str = "all"):
    assert subset == "all"
    return Source(images=torch.zeros(40, 1, 2, 2, dtype=torch.uint8), labels=torch.arange(40) % 4, num_classes=4)
"""


def spec(folder: Path, **options) -> StudySpec:
    document = {
        "name": "x",
        "data": {"name": "digits", **options},
        "model": {"name": "mlp", "widths": [4]},
        "optimizer": {"name": "sgd", "lr": 0.1},
    }
    return resolve.resolve(StudySpec.from_document(document), folder)


def splits(folder: Path, **options) -> Splits:
    config = TrainConfig.from_tree(spec(folder, **options).tree)
    return assemble.load_splits(config, 0, folder, torch.device("cpu"))


def test_the_options_of_all_sources_stand_beside_the_source_s_own(tmp_path: Path) -> None:
    assert splits(tmp_path, name="fake", count=200, classes=[3, [1, 2]]).num_classes == 2
    assert len(splits(tmp_path, subset=100).train.targets) == 82
    assert "subset" not in spec(tmp_path).data  # what is not said is no part of a study's identity
    (tmp_path / "mine.py").write_text(OWN)
    own = splits(tmp_path, name="mine.py:mine", classes=[0, 1], subset="all")  # its own option of that name
    assert own.num_classes == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"folds": 1, "fold": 0}, "data.folds = 1: input should be greater than or equal to 2"),
        ({"subsets": 3}, "data.subsets: data digits takes no 'subsets' (did you mean 'subset'?)"),
        ({"classes": "ant"}, "data.classes = 'ant': input should be a list"),
        (
            {"fold": {"choices": [0, 1]}, "folds": 2},
            "data.fold = { choices = [0, 1] }: trials are compared on the same",
        ),
        ({"classes": [0, 11]}, "data digits: classes: there is no class 11"),
        ({"subset": 5000}, "data digits: subset = 5000: train and validation have 1527 images"),
    ],
)
def test_a_wrong_option_is_told_with_its_path(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        splits(tmp_path, **options)
    assert message in str(caught.value)


def test_files_are_looked_up_beside_the_study_file(tmp_path: Path) -> None:
    (tmp_path / "i.csv").write_text("1,2,3,4\n" * 40)
    (tmp_path / "l.csv").write_text("a\nb\n" * 20)
    options = {"name": "csv", "images": "i.csv", "labels": str(tmp_path / "l.csv")}
    assert splits(tmp_path, **options).train.inputs.shape == (28, 1, 2, 2)
    assert registry.files(spec(tmp_path, **options)) == ["i.csv", str(tmp_path / "l.csv")]


def test_the_made_up_images_are_learnt(tmp_path: Path) -> None:
    config = TrainConfig.from_tree(spec(tmp_path, name="fake", count=500).tree)
    run = assemble.build_run(config, splits(tmp_path, name="fake", count=500), 0, tmp_path, torch.device("cpu"))
    results = list(loop.train(run))[:2]
    assert results[1].train_loss < results[0].train_loss


def test_every_source_says_what_it_is() -> None:
    assert all((function.__doc__ or "").startswith("Return ") for function in SOURCES.values())


def test_a_shared_option_that_does_not_fit_own_data_is_told_as_ours(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OWN)
    with pytest.raises(SpecError) as caught:
        splits(tmp_path, name="mine.py:mine", split="group")
    assert str(caught.value).startswith(
        'data mine.py:mine: split = "group": the data names no groups; a table or npz takes'
    )
