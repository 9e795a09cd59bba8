"""Where source names what is private to another package: its modules, its functions, attributes of its objects."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Names:
    """The private names that a package has, and its classes by their short names."""

    everywhere: set[str] = field(default_factory=set)
    members: dict[str, set[str]] = field(default_factory=dict)  # by class
    bases: dict[str, set[str]] = field(default_factory=dict)  # likewise

    def inherited(self, cls: str) -> set[str]:
        """Return the private members of a class and of those that it derives from."""
        bases = self.bases.get(cls, set()) - {cls}
        return self.members.get(cls, set()).union(*map(self.inherited, bases))


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def names_of(folder: Path) -> Names:
    """Read the private names of a package from its source."""
    found = Names()
    for file in folder.rglob("*.py"):
        tree = ast.parse(file.read_text())
        defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        found.everywhere |= {name for name in defined | {file.stem} if is_private(name)}
        for cls in classes(tree):
            members = set(_members(cls))
            found.everywhere |= members
            found.members.setdefault(cls.name, set()).update(members)
            found.bases.setdefault(cls.name, set()).update(base_names(cls))
    return found


def classes(tree: ast.AST) -> Iterator[ast.ClassDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef))


def base_names(cls: ast.ClassDef) -> Iterator[str]:
    for base in cls.bases:
        bare = base.value if isinstance(base, ast.Subscript) else base
        if isinstance(bare, ast.Name | ast.Attribute):
            yield bare.id if isinstance(bare, ast.Name) else bare.attr


def _members(cls: ast.ClassDef) -> Iterator[str]:
    """Yield the private names that a class defines, in its body or on `self`."""
    for node in ast.walk(cls):
        if isinstance(node, ast.FunctionDef) and node in cls.body:
            names = [node.name]
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value):
            names = [node.attr]
        elif isinstance(node, ast.Assign | ast.AnnAssign) and node in cls.body:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [target.id for target in targets if isinstance(target, ast.Name)]
        else:
            continue
        yield from filter(is_private, names)


def _is_self(node: ast.expr) -> bool:
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id == "super"
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


class Reaches(ast.NodeVisitor):
    """What modules name of a package's private things.

    That is an import of a private name or from a private module; an attribute of that name of any object but `self`, also
    by `getattr`; and, in a class that derives from one of the package's, through however many of ours, an attribute of `self`
    or a method.
    """

    def __init__(self, package: str, theirs: Names, ours: Iterable[ast.AST]) -> None:
        """Look for these names of a package.

        Args:
            ours: all modules whose classes may lie between.
        """
        self._package = package
        self._theirs = theirs
        self._bases = {cls.name: set(base_names(cls)) for tree in ours for cls in classes(tree)}
        self._derived: list[set[str]] = [set()]  # what the classes around here have of the package
        self._found: set[str] = set()

    def of(self, tree: ast.AST) -> set[str]:
        """Return what a module names."""
        self._bases |= {cls.name: set(base_names(cls)) for cls in classes(tree)}
        self._found = set()
        self.visit(tree)
        return self._found

    def visit_Import(self, node: ast.Import) -> None:
        self._take_imported(alias.name for alias in node.names)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        self._take_imported(f"{node.module}.{alias.name}" for alias in node.names)

    def _take_imported(self, paths: Iterable[str]) -> None:
        for path in paths:
            first, *others = path.split(".")
            if first == self._package and any(map(is_private, others)):
                self._found.add(path)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        derived = self._inherited(node.name)
        methods = {child.name for child in node.body if isinstance(child, ast.FunctionDef)}
        self._found |= {name for name in methods & derived if is_private(name)}
        self._derived.append(derived)
        self.generic_visit(node)
        self._derived.pop()

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if is_private(node.attr):
            known = self._derived[-1] if _is_self(node.value) else self._theirs.everywhere
            self._found |= {node.attr} & known
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Name) and node.func.id in ("getattr", "setattr", "hasattr", "delattr"):
            texts = {one.value for one in node.args if isinstance(one, ast.Constant) and isinstance(one.value, str)}
            self._found |= {name for name in texts & self._theirs.everywhere if is_private(name)}
        self.generic_visit(node)

    def _inherited(self, cls: str, seen: frozenset[str] = frozenset()) -> set[str]:
        """Return the private members that a class of ours has from the package. Two classes may have the same bare name."""
        seen |= {cls}
        bases = self._bases.get(cls, set()) - seen
        return set().union(
            *(self._inherited(b, seen) if b in self._bases else self._theirs.inherited(b) for b in bases)
        )
