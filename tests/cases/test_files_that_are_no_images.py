"""Whatever lies in a class's folder and gives no image is in the list of files to mend or remove; nothing hangs or swells."""

from __future__ import annotations

import os
import resource
import socket
import struct
import zlib
from pathlib import Path

import pytest

from hpo.data import SOURCES
from hpo.data.files import BadFile
from tests.support import pictures

SIDE = 13_000  # of a square of 169 megapixels


def png(path: Path, side: int) -> None:
    """Write an empty grey PNG of any size without holding its pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(side + 1)) for _ in range(side)) + packer.flush()
    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))


def test_all_are_listed_together(tmp_path: Path) -> None:
    root = pictures.classes(tmp_path, 2)
    cat = root / "cat"
    png(cat / "bomb.png", SIDE)
    os.mkfifo(cat / "fifo.png")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(cat / "s.png"))
    os.symlink("/dev/zero", cat / "zero.png")
    os.symlink("nowhere.png", cat / "gone.png")
    os.symlink("/nowhere", cat / "folder")
    os.symlink("loop.png", cat / "loop.png")
    (cat / "empty.png").touch()
    (cat / "text.png").write_text("text")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BadFile) as caught:
        SOURCES["image_folder"](root=str(root), size=2)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # KiB
    head, *lines = str(caught.value).splitlines()
    assert head == "9 of 13 files cannot be used; mend or remove them:"
    assert [line.removeprefix(f"{cat}/") for line in lines] == [
        "bomb.png: has 13000x13000 pixels, more than 89,478,485 in all; make it smaller",
        "empty.png: is empty",
        "fifo.png: is a FIFO and no file",
        "folder: is a link to /nowhere, which is not there",
        "gone.png: is a link to nowhere.png, which is not there",
        "loop.png: is a link to loop.png, which is not there",
        "s.png: is a socket and no file",
        f"text.png: cannot identify image file '{cat}/text.png'",
        "zero.png: is a device and no file",
    ]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read any file")
def test_a_file_that_may_not_be_read_is_listed(tmp_path: Path) -> None:
    root = pictures.classes(tmp_path, 2)
    (root / "cat" / "000.png").chmod(0)
    (root / "dog" / "deep").mkdir(mode=0)
    with pytest.raises(BadFile) as caught:
        SOURCES["image_folder"](root=str(root), size=2)
    assert str(caught.value).splitlines()[1:] == [
        f"{root}/cat/000.png: Permission denied",
        f"{root}/dog/deep: permission denied",
    ]


def test_the_first_reading_lists_them_too(tmp_path: Path) -> None:
    root = pictures.classes(tmp_path, 2)
    os.symlink("nowhere.png", root / "cat" / "gone.png")
    with pytest.raises(BadFile, match="1 of 5 files cannot be used"):
        SOURCES["image_folder"](root=str(root), size=2, reading=1)


@pytest.mark.parametrize(
    ("name", "options"),
    [("npz", {"path": "fifo"}), ("csv", {"images": "fifo", "labels": "fifo"}), ("image_folder", {"root": "fifo"})],
)
def test_a_fifo_in_the_place_of_a_file_is_refused(tmp_path: Path, name: str, options: dict) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(BadFile, match=r"fifo': is (a FIFO, socket or device; name a file|not a folder; name)"):
        SOURCES[name](**{key: str(tmp_path / value) for key, value in options.items()})


def test_a_broken_class_folder_is_told(tmp_path: Path) -> None:
    root = pictures.classes(tmp_path, 2)
    os.symlink("/nowhere", root / "emu")
    with pytest.raises(BadFile, match="emu: is a link to /nowhere, which is not there"):
        SOURCES["image_folder"](root=str(root), size=2)
