"""The state of a user's own training loop: its objects, the global random numbers, and how many epochs are finished.

It also keeps the weights of the best reported value, as a copy in the CPU's memory.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from hpo.errors import CheckpointError, MismatchError
from hpo.spec.curve import Direction, is_better
from hpo.train import checkpoint, devices

PAIRS = (("state_dict", "load_state_dict"), ("get_state", "set_state"))  # of modules and of torch.Generator


class UserState:
    """Objects of a user's own loop, saved and loaded together."""

    def __init__(self, objects: Mapping[str, Any], direction: Direction | None = None) -> None:
        """Take the objects by name.

        Args:
            objects: anything with `state_dict` and `load_state_dict`, a `torch.Generator`, or a dict that is changed in
                place. None stands for an object that this run does not have. One with a method `module_state`, which returns the
                state of a module, counts as a module.
            direction: in which reported values improve; None if none of them is the best.

        Raises TypeError for any other object, or if there is none.
        """
        self.objects = {name: value for name, value in objects.items() if value is not None}
        self.epoch = 0  # finished epochs
        self.has_ended = False  # the loop is over, and only the trial's end is missing
        #: The step and the value of the best report, and the weights at that time: the state of each module, by name.
        self.best: dict[str, Any] | None = None
        self._modules = {name: value for name, value in self.objects.items() if _has_weights(value)}
        self._direction = direction if self._modules else None
        self._random: Mapping[str, Any] | None = None  # the loaded states of the global generators
        if not self.objects:
            raise TypeError(
                "hpo.epochs has nothing to save; give it the loop's objects: model=model, optimizer=optimizer"
            )
        for name, value in self.objects.items():
            if not isinstance(value, dict) and _pair(value) is None:
                raise TypeError(
                    f"{name}={type(value).__name__}: cannot be saved; give an object with state_dict and load_state_dict, "
                    "a torch.Generator or a dict"
                )

    def note_report(self, value: float, step: int) -> None:
        """Copy the weights of now if this reported value is the best so far. Of equal values the first one counts."""
        if self._direction is None or not math.isfinite(value):
            return
        if self.best is None or is_better(value, self.best["value"], self._direction):
            weights = {name: _weights_of(module) for name, module in self._modules.items()}
            self.best = {"step": step, "value": value, "objects": checkpoint.on_cpu(weights)}

    def state_dict(self) -> dict[str, Any]:
        """Return the state; tensors are the objects' own, not copies. The global random numbers stay as they are."""
        with _unchanged_random() as random_states:
            state = {
                "epoch": self.epoch,
                "has_ended": self.has_ended,
                "random": random_states,
                "objects": {name: _state_of(value) for name, value in self.objects.items()},
            }
        return state if self._direction is None else {**state, "best": self.best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state into the objects; MismatchError says which object it does not fit and why."""
        saved = state["objects"]
        if saved.keys() != self.objects.keys():
            raise MismatchError(
                f"the checkpoint holds {', '.join(sorted(saved))}, but the loop has {', '.join(sorted(self.objects))}; "
                "give hpo.epochs the same objects as before"
            )
        for name, value in self.objects.items():
            try:
                _load(value, saved[name])
            except Exception as error:
                said = " ".join(str(error).split())
                raise MismatchError(f"the checkpoint does not fit {name}: {said}; undo the change of {name}") from error
        self.epoch, self.has_ended = state["epoch"], state.get("has_ended", False)
        self.best = state.get("best")
        if "best" not in state:  # written by an earlier version: weights of a better epoch may be lost
            self._direction = None
        self._random = state["random"]
        self.restore_random()

    def restore_random(self) -> None:
        """Set the global random numbers to the loaded state, if one was loaded."""
        if self._random is not None:
            _restore_random(self._random)


def load_weights(path: Path | str) -> dict[str, Any]:
    """Return the states to use of what a loop has saved, by the names of its objects, with their tensors on the CPU.

    These are the modules at the best report. Without one they are all objects as they were saved. Raises CheckpointError for
    a file that cannot be read, or that no loop has saved.
    """
    state = checkpoint.load(path)
    if "objects" not in state:
        raise CheckpointError(f"{path} holds no objects of hpo.epochs; give the file that `hpo export` names")
    best = state.get("best")
    found: dict[str, Any] = state["objects"] if best is None else best["objects"]
    return found


def can_be_saved(value: object) -> bool:
    """Return whether a value is an object with a state of its own, such as a module, an optimizer or a generator."""
    with suppress(Exception):  # an object of the user's may raise anything when it is asked
        pair = None if isinstance(value, type) else _pair(value)
        if pair is None or pair == PAIRS[1]:
            return pair is not None
        return isinstance(value, DataLoader) or bool(
            getattr(value, pair[0])()
        )  # a loader begins to read when it is asked
    return False


def _has_weights(value: object) -> bool:
    return isinstance(value, nn.Module) or callable(getattr(value, "module_state", None))


def _weights_of(value: Any) -> Mapping[str, Any]:
    state: Mapping[str, Any] = value.state_dict() if isinstance(value, nn.Module) else value.module_state()
    return state


def _pair(value: object) -> tuple[str, str] | None:
    """Return the names of the methods that read and write an object's state."""
    return next((pair for pair in PAIRS if all(callable(getattr(value, name, None)) for name in pair)), None)


def _state_of(value: Any) -> Any:
    if isinstance(value, dict):
        return copy.deepcopy(value)
    pair = _pair(value)
    assert pair is not None
    return getattr(value, pair[0])()


def _load(value: Any, state: Any) -> None:
    if isinstance(value, dict):
        value.clear()
        value.update(state)
        return
    pair = _pair(value)
    assert pair is not None
    getattr(value, pair[1])(state)


def _random_states() -> dict[str, Any]:
    """Return the states of the global generators of Python, NumPy, torch and the accelerators in use."""
    kind, words, place, has_gauss, gauss = np.random.get_state()
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [
            str(kind),
            torch.from_numpy(np.asarray(words).astype(np.int64)),
            int(place),
            int(has_gauss),
            float(gauss),
        ],
        "torch": torch.get_rng_state(),
    }
    return states | devices.states_of_all()


@contextmanager
def _unchanged_random() -> Iterator[dict[str, Any]]:
    """Yield the states of the global generators, and set them again at the end.

    Some objects draw random numbers when they are asked for their state. A StatefulDataLoader does, since it begins to read.
    """
    states = _random_states()
    yield states
    _restore_random(states)


def _restore_random(states: Mapping[str, Any]) -> None:
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, place, has_gauss, cached = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), place, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    devices.restore_all(states)
