"""What editors, archives and file systems leave in a class's folder is no image of it, and one file is one image.

ipython's checkpoints below a class are a known trap of torchvision's ImageFolder: copies of training images get into validation.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from hpo.data import SOURCES, Source
from hpo.data.files import BadFile
from hpo.data.listing import listed_as_before
from tests.support import pictures


def read(root: Path, **options: object) -> Source:
    return SOURCES["image_folder"](root=str(root), size=2, colour="grey", **options)


def checkpoints(root: Path) -> None:
    shutil.copytree(root / "cat", root / "cat" / ".ipynb_checkpoints")


def resource_forks(root: Path) -> None:
    shutil.copy(root / "cat" / "000.png", root / "cat" / "._000.png")


def mac_archive(root: Path) -> None:
    shutil.copytree(root / "cat", root / "__MACOSX" / "cat")
    shutil.copytree(root / "cat", root / "cat" / "__MACOSX")


def thumbnails(root: Path) -> None:
    shutil.copytree(root / "dog", root / "dog" / "@eaDir" / "001.png")
    (root / "dog" / "Thumbs.db").write_bytes(b"x")
    (root / ".DS_Store").write_bytes(b"x")


def snapshots(root: Path) -> None:
    shutil.copytree(root / "cat", root / "cat" / "~snapshot")
    shutil.copytree(root / "dog", root / "#snapshot" / "dog")


def mac_trash(root: Path) -> None:
    shutil.copytree(root / "cat", root / "Network Trash Folder")


def recovered(root: Path) -> None:
    shutil.copytree(root / "dog", root / "lost+found" / "dog")
    shutil.copytree(root / "dog", root / "dog" / ".Trash-0" / "files")


def links(root: Path) -> None:
    os.symlink(root / "cat" / "000.png", root / "cat" / "x.png")
    os.link(root / "cat" / "001.png", root / "cat" / "y.png")


def cycles(root: Path) -> None:
    pictures.cycle(root / "cat")
    os.symlink("..", root / "dog" / "up", target_is_directory=True)
    (root / "dog" / "up").unlink()
    os.symlink(".", root / "dog" / "here", target_is_directory=True)


@pytest.mark.parametrize(
    "spoil",
    [checkpoints, resource_forks, mac_archive, thumbnails, snapshots, mac_trash, recovered, links, cycles],
    ids=lambda one: one.__name__,
)
def test_only_files_of_one_s_own_are_images_each_once(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    root = pictures.classes(tmp_path / "root", 3)
    spoil(root)
    found = read(root)
    assert found.classes == ("cat", "dog")
    assert found.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert found.images.flatten(1)[:, 0].tolist() == [0, 1, 2, 3, 4, 5]


def test_what_was_left_out_is_said(tmp_path: Path) -> None:
    root = pictures.classes(tmp_path / "root", 3)
    checkpoints(root)
    links(root)
    pictures.write(root, 1)
    (root / "dog" / "notes.txt").write_text("x")
    assert read(root).notes == (
        f"hidden files, left out: {root}/cat/.ipynb_checkpoints",
        "links to images of the same class, each taken once: 2",
        f"images outside of classes, left out: {root}/000.png",
        "files without the ending of an image, left out: 1 .txt",
    )


@pytest.mark.parametrize(("to", "kind"), [("dog/x.png", "class"), ("../test/cat/x.png", "part")])
def test_one_file_in_two_classes_or_parts_is_refused(tmp_path: Path, to: str, kind: str) -> None:
    root, test_root = pictures.classes(tmp_path / "root", 3), pictures.classes(tmp_path / "test", 2, start=10)
    os.link(root / "cat" / "000.png", root / to)
    with pytest.raises(BadFile) as caught:
        read(root, test_root=str(test_root))
    assert str(caught.value).splitlines() == [
        "1 of 11 files cannot be used; mend or remove them:",
        f"{(root if kind == 'class' else test_root) / to.removeprefix('../test/')}: is the same file as "
        f"{root}/cat/000.png, of another {kind}",
    ]


def test_a_link_out_of_a_class_into_another_is_refused(tmp_path: Path) -> None:
    root = pictures.classes(tmp_path / "root", 2)
    os.symlink(root, root / "dog" / "up", target_is_directory=True)
    with pytest.raises(BadFile, match=r"dog/up/cat/000.png: is the same file as .*/cat/000.png, of another class"):
        read(root)


def test_a_class_may_be_a_link_to_a_folder_elsewhere(tmp_path: Path) -> None:
    root = pictures.classes(tmp_path / "root", 2, names=("cat",))
    pictures.write(tmp_path / "elsewhere" / "deep", 2, 2)
    os.symlink(tmp_path / "elsewhere", root / "dog", target_is_directory=True)
    assert read(root).labels.tolist() == [0, 0, 1, 1]


def test_the_first_reading_takes_hidden_files_as_it_did(tmp_path: Path) -> None:
    root = pictures.classes(tmp_path / "root", 3)
    checkpoints(root)
    resource_forks(root)
    found = read(root, reading=1)
    assert found.labels.tolist() == [0] * 7 + [1] * 3
    assert len(listed_as_before(root, None).parts["train"]) == 10
