"""Steps on a trained model by name, and recipes of steps: `fold+prune=0.5+int8`.

A step is a function of the model and of standardised training inputs [N, ...]. It returns the changed model and may modify
the given one. A value after `=` is its only keyword-only parameter.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from hpo.errors import SpecError, StudyError, nearest
from hpo.final.after.fold import fold
from hpo.final.after.precision import bf16, fp16
from hpo.final.after.prune import channels, prune
from hpo.final.after.quantize import int8, int8_static, int8_weights
from hpo.spec import extras, options
from hpo.train.inputs import Batch

STEPS: dict[str, Callable[..., nn.Module]] = {
    "fold": fold,
    "prune": prune,
    "channels": channels,
    "bf16": bf16,
    "fp16": fp16,
    "int8": int8,
    "int8_weights": int8_weights,
    "int8_static": int8_static,
}
EXTRA_OF = dict.fromkeys(("int8", "int8_weights", "int8_static"), "int8")  # step -> the extra that it needs
GIVEN = 2  # positional arguments of a step: model and inputs


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step with its options."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Steps that are applied one after the other."""

    name: str
    steps: Sequence[Step]

    def apply(self, model: nn.Module, inputs: Batch) -> nn.Module:
        """Return the model after all steps, in eval mode.

        Raises StudyError that names a step which does not support the model, or whose extra is not installed.
        """
        for step in self.steps:
            try:
                refuse_missing(EXTRA_OF.get(step.name), step.name)
                model = STEPS[step.name](model, inputs, **step.options)
            except StudyError as error:
                raise StudyError(f"{self.name}: {error}" if len(self.steps) > 1 else str(error)) from error
            except RuntimeError as error:  # a device or number type may lack an operation
                raise StudyError(f"{self.name}: {step.name}: {error}") from error
        return model


def read(text: str) -> Recipe:
    """Read a recipe such as `fold+prune=0.5`; SpecError names an unknown step or a wrong value."""
    return Recipe(name=text, steps=[_step(piece.strip(), text) for piece in text.split("+")])


def _step(piece: str, text: str) -> Step:
    name, equals, value = piece.partition("=")
    if name not in STEPS:
        raise SpecError(f"{text}: there is no step {name!r}{nearest(name, STEPS)}")
    takes = list(options.model_of(STEPS[name], GIVEN).model_fields)
    if not takes and equals:
        raise SpecError(f"{text}: {name} takes no value; write {name}")
    if takes and not value:
        raise SpecError(f"{text}: {name} needs its {takes[0]}; write {name}=0.5, for example")
    given = {takes[0]: _value(value)} if takes else {}
    options.check("after", name, STEPS[name], GIVEN, given, dict.fromkeys(given, name))
    return Step(name=name, options=given)


def _value(text: str) -> Any:
    for read_as in (json.loads, float):  # JSON has no .5
        try:
            return read_as(text)
        except ValueError:
            continue
    return text


def refuse_missing(extra: str | None, purpose: str) -> None:
    """Raise StudyError with the command that installs an extra, unless all of it is there."""
    if extra and (why := extras.missing(extra)):
        raise StudyError(f"{purpose}: {why}")
