"""Lists the image files of a folder with their class and part, without opening them."""

from __future__ import annotations

import os
import stat
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Literal

from hpo.data.files import BadFile
from hpo.data.names import Part, part_beside, part_of

Layout = Literal["classes", "parts"]

# Names, in lower case, of what file systems, archives and tools leave among a user's files.
JUNK = {
    *("__macosx", "@eadir", "@__thumb", "#recycle", "@recycle", "$recycle.bin", "lost+found", "__pycache__"),
    *("system volume information", "thumbs.db", "desktop.ini", "#snapshot", "~snapshot", "network trash folder"),
}
SPECIAL = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
SHOWN = 5  # most names in a message
MOST_PARTS = 2  # most folders with images alone that may still be parts without classes


@dataclass(frozen=True, kw_only=True)
class ImageFile:
    """A file that should be an image."""

    path: Path
    label: int  # class number
    state: tuple[int, ...] = ()  # modification time in ns, size in bytes
    fault: str = ""  # why it cannot be used, if this is known without opening it


@dataclass(kw_only=True)
class Listing:
    """The image files of each part, in the order of their paths."""

    classes: list[str]
    parts: dict[Part, list[ImageFile]]
    groups: dict[Part, list[int]] = field(default_factory=dict)  # of each file, if a table names groups
    notes: list[str] = field(default_factory=list)


def listed(root: Path, own: Mapping[Part, Path], layout: Layout | None) -> Listing:
    """Return the images below `root/CLASS/` or `root/PART/CLASS/`; BadFile if the folders are ambiguous.

    Args:
        root: folder of all images, or of the training part.
        own: folders of the parts that are elsewhere.
        layout: whether the folders of the root are classes or parts; None: decided by their names.
    """
    folders = _parts(root, own, layout)
    inner = {part: _class_folders(folder) for part, folder in folders.items()}
    classes = [folder.name for folder in inner["train"]]
    walk = Walk()
    parts: dict[Part, list[ImageFile]] = {}
    for part, folder in folders.items():
        strangers = {found.name for found in inner[part]} - set(classes)
        if strangers:
            raise BadFile(
                f"{folder / min(strangers)}: is not a class of the training images; known: {', '.join(classes)}"
            )
        walk.strays(folder)
        parts[part] = [file for label, name in enumerate(classes) for file in walk.of_class(part, label, folder / name)]
    if layout is None:
        read_as = "classes" if folders["train"] == root else "parts"
        mend = f'write layout = "{read_as}" if the folders of {root.name} are {read_as}'
        _refuse_parts_inside(walk.inside, mend)
        for part, folder in folders.items():
            _refuse_another_level(folder, inner[part], walk.inside, mend)
    return Listing(classes=classes, parts=parts, notes=walk.notes())


def listed_as_before(root: Path, test_root: Path | None) -> Listing:
    """Return the images as format 1 of study files listed them: with hidden files, and folders of parts as classes."""
    folders: dict[Part, Path] = {"train": root}
    if test_root:
        folders["test"] = test_root
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    _refuse_too_few(root, classes)
    parts: dict[Part, list[ImageFile]] = {}
    for part, folder in folders.items():
        strangers = {entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")}
        if strangers - set(classes):
            found = folder / min(strangers - set(classes))
            raise BadFile(f"{found}: is not a class of the training images; known: {', '.join(classes)}")
        parts[part] = []
        for label, name in enumerate(classes):
            paths = [path for path in sorted((folder / name).rglob("*")) if is_image(path.name)]
            _refuse_none(folder / name, paths)
            parts[part] += [image_file(path, label) for path in paths]
    return Listing(classes=classes, parts=parts)


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is hidden or left by a tool, judged by its name."""
    return name.startswith(".") or name.casefold() in JUNK


def is_image(name: str) -> bool:
    """Return whether a file's name has an ending that torchvision's ImageFolder reads."""
    return os.path.splitext(name)[1].lower() in endings()


def endings() -> tuple[str, ...]:
    """Return the endings of image files, in lower case with the dot."""
    from torchvision.datasets.folder import IMG_EXTENSIONS  # here, since other sources do not need torchvision

    return tuple(IMG_EXTENSIONS)


def image_file(path: Path, label: int) -> ImageFile:
    """Return a file with its state or its fault."""
    try:
        state = path.stat()
    except OSError as error:
        return ImageFile(path=path, label=label, fault=_why(path, error))
    kind = SPECIAL.get(stat.S_IFMT(state.st_mode))
    fault = f"is {kind} and no file" if kind else "is empty" if not state.st_size else ""
    return ImageFile(path=path, label=label, state=(state.st_mtime_ns, state.st_size), fault=fault)


def _why(path: Path, error: OSError) -> str:
    if path.is_symlink() and not path.exists():
        return f"is a link to {os.readlink(path)}, which is not there"
    return (error.strerror or str(error)).lower()


# --- parts and classes ------------------------------------------------------------------------------------------------


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(entry for entry in folder.iterdir() if not is_hidden(entry.name))
    except OSError as error:
        raise BadFile(f"{folder}: cannot be read: {error.strerror}") from error


def _folders(folder: Path) -> list[Path]:
    return [entry for entry in _entries(folder) if entry.is_dir()]


def _class_folders(folder: Path) -> list[Path]:
    """Return the folders of a part's classes; BadFile if there are fewer than 2, or for a broken link."""
    entries = _entries(folder)
    for entry in entries:
        if entry.is_symlink() and not entry.exists():
            raise BadFile(f"{entry}: is a link to {os.readlink(entry)}, which is not there; mend or remove it")
    found = [entry for entry in entries if entry.is_dir()]
    _refuse_too_few(folder, [one.name for one in found])
    return found


def _refuse_too_few(folder: Path, names: Sequence[str]) -> None:
    if len(names) < 2:
        inner = _folders(folder / names[0]) if names else []
        hint = f"; or is {folder / names[0]} meant, which has {len(inner)}?" if len(inner) > 1 else ""
        raise BadFile(f"{folder}: has {len(names)} folders; give each class a folder, at least 2{hint}")


def _refuse_none(folder: Path, found: Sequence[object]) -> None:
    if not found:
        raise BadFile(f"{folder}: holds no image file; known endings: {' '.join(endings())}")


def _parts(root: Path, own: Mapping[Part, Path], layout: Layout | None) -> dict[Part, Path]:
    """Return the folder of each part, the training part first; BadFile if names are ambiguous."""
    folders = _folders(root)
    strictly = {folder: part_of(folder.name) for folder in folders}
    loosely = {folder: part_of(folder.name, loosely=True) for folder in folders}
    named = loosely if folders and all(loosely.values()) else strictly
    if layout == "classes" or (layout is None and not any(named.values())):
        if layout is None:
            _refuse_parts_in_names(root, [folder.name for folder in folders])
        return {"train": root, **own}
    found: dict[Part, Path] = {}
    for folder, part in named.items():
        if part is None:
            raise BadFile(_mixture(root, folders, named))
        if part in found:
            raise BadFile(
                f"{root}: {found[part].name} and {folder.name} are both names of the {_called(part)} part; "
                f"{_mend(root, 'rename one')}"
            )
        found[part] = folder
    _refuse_odd_parts(root, found, own)
    return {"train": found["train"], **found, **own}


def _called(part: Part) -> str:
    return "training" if part == "train" else part


def _mend(root: Path, mend: str) -> str:
    return f'{mend}, or write layout = "classes" if all folders of {root.name} are classes'


def _mixture(root: Path, folders: Sequence[Path], named: Mapping[Path, Part | None]) -> str:
    parts = [folder.name for folder in folders if named[folder]]
    others = [folder.name for folder in folders if not named[folder]]
    if not parts:
        return f'{root}: has no folders train and test; remove layout = "parts", or name another root'
    return (
        f"{root}: {', '.join(parts)} may be {'parts' if len(parts) > 1 else 'a part'} of the data or "
        f"{'classes' if len(parts) > 1 else 'a class'}, beside {_some(others)}; "
        f"{_mend(root, 'keep one kind of folders there')}"
    )


def _refuse_odd_parts(root: Path, found: Mapping[Part, Path], own: Mapping[Part, Path]) -> None:
    if "train" not in found:
        names = ", ".join(folder.name for folder in found.values())
        raise BadFile(f"{root}: has {names} but no training part; {_mend(root, 'add a folder train')}")
    for part in found.keys() & own.keys():
        raise BadFile(
            f"{root}: has a {part} part of its own, {found[part].name}, and {part}_root is given; "
            f"remove {part}_root or give root = {str(found['train'])!r}"
        )
    for part, folder in found.items():
        if not _folders(folder):
            raise BadFile(
                f"{folder}: holds no folders of classes, as the {_called(part)} part must; "
                f"{_mend(root, 'remove it, or add them')}"
            )


def _refuse_parts_in_names(root: Path, names: Sequence[str]) -> None:
    """Raise BadFile if names such as train_cat and test_cat hold parts as well as classes."""
    found = [part_beside(name) for name in names]
    parts: dict[str, set[Part]] = defaultdict(set)  # parts in which the rest of a name occurs
    for part, rest in filter(None, found):
        parts[rest].add(part)
    again = [rest for rest in parts if len(parts[rest]) > 1]
    all_hold_parts = None not in found and len(set().union(*parts.values())) > 1
    if len(again) > 1 or (all_hold_parts and (again or any(part_of(name, loosely=True) for name in names))):
        raise BadFile(
            f"{root}: {_some(names)} may be classes in several parts of the data, or all be classes; "
            f"{_mend(root, 'put the classes into the parts, as in train/cat and test/cat')}"
        )


def _refuse_parts_inside(inside: Mapping[Path, Inside], mend: str) -> None:
    """Raise BadFile if a folder of a class holds folders named like parts, at any depth."""
    for folder, held in inside.items():
        parts = [name for name in held.folders if part_of(name)]
        if parts:
            raise BadFile(
                f"{folder}: holds {_some(parts)}, which may be parts of the data; "
                f"put the classes into the parts, as in train/cat and test/cat, or {mend}"
            )


def _refuse_another_level(part: Path, folders: Sequence[Path], inside: Mapping[Path, Inside], mend: str) -> None:
    """Raise BadFile if the classes seem to be one level below the folders taken for the classes of a part."""
    below = {folder: names for folder in folders if (names := _branches(folder, inside))}
    for folder, other in combinations(below, 2):
        common = sorted(below[folder] & below[other])
        if len(common) > 1 or (
            common and below[folder] != below[other] and set(common) in (below[folder], below[other])
        ):
            raise BadFile(
                f"{part}: {folder.name} and {other.name} hold no images but folders of the same names, "
                f"{_some(common)}; are these the classes? Put images directly into the folders of their classes, "
                f"or {mend}"
            )
    deep = [folder.name for folder, names in below.items() if len(names) > 1]
    flat = [one.name for one in folders if one in inside and inside[one].has_images and not inside[one].folders]
    if deep and flat and (len(deep) > 1 or len(flat) <= MOST_PARTS):
        raise BadFile(
            f"{part}: {_some(deep)} hold no images but folders, and {_some(flat)} hold only images; are the folders the "
            f"classes? Put images directly into the folders of their classes, or {mend}"
        )


def _branches(folder: Path, inside: Mapping[Path, Inside]) -> set[str]:
    """Return the names of the folders in a folder without images. A single folder is replaced by the folders in it."""
    if folder not in inside or inside[folder].has_images:
        return set()
    names = inside[folder].folders
    return (_branches(folder / names[0], inside) if len(names) == 1 else set()) or set(names)


def _some(names: Sequence[str]) -> str:
    more = [f"{len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return ", ".join([*names[:SHOWN], *more])


# --- files ------------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Inside:
    """What a folder holds directly."""

    folders: list[str] = field(default_factory=list)
    has_images: bool = False


class Walk:
    """One walk through all parts. It knows files and folders by device and inode, so links do not count twice."""

    def __init__(self) -> None:
        self.inside: dict[Path, Inside] = {}  # by visited folder
        self._taken: dict[tuple[int, int], tuple[Part, int, Path]] = {}
        self._again = 0  # links to images of the same class and part
        self._hidden: list[Path] = []
        self._strays: list[Path] = []
        self._others: Counter[str] = Counter()  # by their ending

    def notes(self) -> list[str]:
        """Return a note on each kind of file that was left out."""
        others = [f"{count} {ending or 'without an ending'}" for ending, count in self._others.most_common()]
        return [
            *([f"hidden files, left out: {_some([str(path) for path in self._hidden])}"] if self._hidden else []),
            *([f"links to images of the same class, each taken once: {self._again}"] if self._again else []),
            *(
                [f"images outside of classes, left out: {_some([str(path) for path in self._strays])}"]
                if self._strays
                else []
            ),
            *([f"files without the ending of an image, left out: {_some(others)}"] if others else []),
        ]

    def strays(self, folder: Path) -> None:
        """Note the image files that lie in a part's folder beside its classes."""
        for path in sorted(folder.iterdir()):
            if is_hidden(path.name):
                self._hidden += [path] if path.is_dir() else []
            elif is_image(path.name) and not path.is_dir():
                self._strays.append(path)

    def of_class(self, part: Part, label: int, folder: Path) -> list[ImageFile]:
        """Return the images of a class in a part, sorted by path; BadFile if there are none."""
        found = sorted(self.below(folder, label), key=lambda file: file.path)
        _refuse_none(folder, found)
        return [file for one in found if (file := self._once(one, part, label)) is not None]

    def below(self, folder: Path, label: int = 0, visited: set[tuple[int, int]] | None = None) -> Iterator[ImageFile]:
        """Yield the image files below a folder. Each folder is visited once."""
        visited = set() if visited is None else visited
        try:
            state = folder.stat()
            entries = list(folder.iterdir())
        except FileNotFoundError:
            return
        except OSError as error:
            yield ImageFile(path=folder, label=label, fault=_why(folder, error))
            return
        if (state.st_dev, state.st_ino) in visited:  # a link to a folder that was visited
            return
        visited.add((state.st_dev, state.st_ino))
        inside = self.inside[folder] = Inside()
        for path in sorted(entries):
            if is_hidden(path.name):
                if path.is_dir() or is_image(path.name):
                    self._hidden.append(path)
            elif path.is_dir():
                inside.folders.append(path.name)
                yield from self.below(path, label, visited)
            elif is_image(path.name) or not path.exists():  # the target of a broken link may have been an image
                inside.has_images = True
                yield image_file(path, label)
            else:
                self._others[path.suffix.lower()] += 1

    def _once(self, file: ImageFile, part: Part, label: int) -> ImageFile | None:
        """Return the file, or None if it was taken before; with a fault if that was for another class or part."""
        if file.fault:
            return file
        state = file.path.stat()
        before = self._taken.setdefault((state.st_dev, state.st_ino), (part, label, file.path))
        if before[2] == file.path:
            return file
        if before[:2] == (part, label):
            self._again += 1
            return None
        kind = "class" if before[1] != label else "part"
        return ImageFile(path=file.path, label=label, fault=f"is the same file as {before[2]}, of another {kind}")
