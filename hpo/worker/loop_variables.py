"""The local variables of a user's loop that a checkpoint does not hold: they would start anew after a kill."""

from __future__ import annotations

import dis
import logging
import re
import sysconfig
from collections.abc import Collection, Mapping
from types import FrameType
from typing import Any

from hpo.train.user_state import can_be_saved

log = logging.getLogger(__name__)
PLAIN = (bool, int, float, str, type(None), list, tuple, dict, set)
MENTION = re.compile("(LOAD|STORE)_(?:FAST|DEREF|NAME|CLOSURE)")  # of a local variable, in the name of an instruction
LIBRARIES = tuple(f"{sysconfig.get_path(name)}/" for name in ("stdlib", "purelib", "platlib"))


class LoopVariables:
    """Watches the function that runs a loop, and warns once of what it carries from epoch to epoch."""

    def __init__(self, frame: FrameType, objects: Mapping[str, Any]) -> None:
        """Warn of objects with a state that the loop was not given.

        Args:
            frame: of the function that runs the loop. That of a library, such as a progress bar, is not watched.
            objects: what is saved, by name.
        """
        self._frame = None if frame.f_code.co_filename.startswith(LIBRARIES) else frame
        if self._frame is None:
            return
        variables, saved = dict(frame.f_locals), {id(value) for value in objects.values()}
        for name in forgotten(variables, objects.values()):
            log.warning("%s is not given to hpo.epochs: after a kill it starts anew; give %s=%s", name, name, name)
        self._before = {name: one for name, one in variables.items() if type(one) in PLAIN and id(one) not in saved}
        self._lengths = {name: len(one) for name, one in self._before.items() if isinstance(one, list | dict | set)}

    def warn_of_carried(self) -> None:
        """Warn of plain variables from before the loop that its body reads first and that the first epoch changed."""
        frame, self._frame = self._frame, None
        if frame is None:
            return
        read, assigned = mentions(frame)
        changed = {name for name in self._lengths.keys() & read if len(self._before[name]) != self._lengths[name]}
        if suspects := self._before.keys() & read & assigned:
            # Only if needed: before Python 3.13 a frame keeps what it shows here, the last batch too.
            now = frame.f_locals
            changed |= {name for name in suspects if now.get(name) is not self._before[name]}
        for name in sorted(changed):
            log.warning(
                "%s changes from epoch to epoch and is not saved: after a kill it starts at its first value; "
                "keep it in a dict and give that to hpo.epochs",
                name,
            )
        self._before.clear()


def mentions(frame: FrameType) -> tuple[set[str], set[str]]:
    """Return the names that the body of a frame's current `for` loop reads before it assigns them, and all that it assigns."""
    code = [*dis.get_instructions(frame.f_code)]
    loop = next((one for one in code if one.offset == frame.f_lasti), None)
    if loop is None or loop.opname != "FOR_ITER":
        return set(), set()
    first: dict[str, str] = {}
    assigned: set[str] = set()
    for one in code:
        if loop.offset < one.offset < loop.argval:
            # Since Python 3.13 an instruction may mention two names, such as LOAD_FAST_LOAD_FAST.
            names = one.argval if isinstance(one.argval, tuple) else (one.argval,)
            for kind, name in zip(MENTION.findall(one.opname), names, strict=False):
                first.setdefault(name, kind)
                assigned |= {name} if kind == "STORE" else set()
    return {name for name, kind in first.items() if kind == "LOAD"}, assigned


def forgotten(variables: Mapping[str, Any], objects: Collection[Any]) -> list[str]:
    """Return the names of objects with a state of their own that are neither given nor a part of a given module."""
    given = {id(value) for value in objects}
    parts = {id(part) for value in objects if hasattr(value, "modules") for part in value.modules()}
    return [name for name, value in variables.items() if id(value) not in given | parts and can_be_saved(value)]
