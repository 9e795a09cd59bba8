"""Weights from elsewhere: torchvision's, or a file that `hpo train` left; and which of them are trained on.

Tensors are matched by name and shape. Nothing is downloaded but what `weights` names, once, to where torch.hub keeps it.
"""

from __future__ import annotations

import pickle
import urllib.error
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from hpo.models import freezing
from hpo.models.freezing import Freezing

State = dict[str, Tensor]
FILE_OR_NAME = "file or name"  # marks an option that may name a file; a relative one lies beside the study file
NAMED = "IMAGENET1K_"  # how torchvision's weights are named, with V1, V2 or so behind it


class TransferOptions(TypedDict, total=False):
    """What of a model was trained before, and what is trained on."""

    weights: Annotated[str, FILE_OR_NAME]
    """none, default (torchvision's best), a name of torchvision's such as IMAGENET1K_V1, or a file of weights, such as
    weights.pt of `hpo train`; none if not given."""
    keep: Annotated[int, Ge(0)]
    """How many pre-trained layers are taken over, from the input on; all but the head if not given."""
    freeze: Literal["none", "features"] | Annotated[int, Ge(0)]
    """How many layers are not trained, from the input on; features: all but the head."""
    unfreeze_every: Annotated[int, Ge(1)]
    """Epochs after each of which the last frozen layer is trained as well; never if not given."""
    layer_rate: Annotated[float, Gt(0), Le(1)]
    """Learning rate of the pre-trained layers, as a share of the optimizer's."""


@dataclass(frozen=True, kw_only=True)
class Reuse:
    """What a model took over."""

    source: str
    taken: int  # tensors, of the model's
    new: tuple[str, ...]  # names of parameters that begin as usual

    def __str__(self) -> str:
        return f"{self.source}: {self.taken} tensors taken over; new: {', '.join(self.new) or 'nothing'}"


def reuse(model: nn.Module) -> Reuse | None:
    """Return what a model took over, None if it began from nothing."""
    found = vars(model).get("reuse")
    return found if isinstance(found, Reuse) else None


def transfer(
    model: nn.Module,
    name: str,
    options: TransferOptions,
    adapt: Callable[[State], State] = lambda state: state,
    *,
    fitted: bool = False,
) -> nn.Module:
    """Load what the options name into a model, freeze what they say, and return it.

    Args:
        name: of the model at torchvision, if it has weights there.
        adapt: fits what torchvision or a file has to the model where shapes differ.
        fitted: whether the layers before the head are trained before the training even if nothing is taken over.
    """
    source = options.get("weights", "none")
    count = len(freezing.layers(model))
    keep = options.get("keep", count - 1)
    if keep > count:
        raise ValueError(f"keep = {keep}: the model has {count} layers, its head included; give at most that")
    if source != "none":
        _take_over(model, adapt(_first_convolution(read(source, name), model)), keep, source)
    frozen = options.get("freeze", "none")
    layers = {"none": 0, "features": count - 1}.get(frozen) if isinstance(frozen, str) else frozen
    if layers or "layer_rate" in options:
        how = Freezing(
            frozen=layers or 0,
            every=options.get("unfreeze_every"),
            rate=options.get("layer_rate", 1.0),
            pretrained=keep if source != "none" or fitted else 0,
        )
        freezing.freeze(model, how)
    return model


@torch.no_grad()
def _take_over(model: nn.Module, state: State, keep: int, source: str) -> None:
    ours = model.state_dict()
    kept = freezing.layers(model)[:keep]
    names = [f"{name}.{key}".removeprefix(".") for layer in kept for name, module in layer for key in _own(module)]
    taken = [name for name in names if name in ours and name in state and state[name].shape == ours[name].shape]
    if names and not taken:
        raise ValueError(
            f"weights = {source!r}: none of its {len(state)} tensors is of a name and shape of the model's; "
            f"it has {_some(state)}, the model {_some(ours)}"
        )
    for name in taken:
        ours[name].copy_(state[name])
    new = tuple(name for name, _ in model.named_parameters() if name not in taken)
    vars(model)["reuse"] = Reuse(source=source, taken=len(taken), new=new)


def _own(module: nn.Module) -> list[str]:
    return [key for key, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))]


def _some(state: State) -> str:
    shown = [f"{name} {list(tensor.shape)}" for name, tensor in list(state.items())[:3]]
    return ", ".join([*shown, *(["..."] if len(state) > 3 else [])])


def _first_convolution(state: State, model: nn.Module) -> State:
    """Fit the first convolution's weights to the images' channels: each gets the same share of the sum over all, so that a
    gray image gives what it gave as a coloured one.
    """
    name, ours = next(((name, p) for name, p in model.named_parameters() if p.ndim == 4), ("", None))
    theirs = state.get(name)
    if ours is None or theirs is None or theirs.ndim != 4 or theirs.shape[1] == ours.shape[1]:
        return state
    channels = ours.shape[1]
    return state | {name: theirs.sum(1, keepdim=True).expand(-1, channels, -1, -1) / channels}


# --- where weights come from ----------------------------------------------------------------------------------------------


def is_file(source: str) -> bool:
    """Say whether what `weights` names is a file."""
    return source not in ("none", "default") and not source.startswith(NAMED)


def read(source: str, name: str) -> State:
    """Return the weights that a name or a file holds; ValueError says what is wrong with it, and the mend."""
    return _of_file(Path(source)) if is_file(source) else _torchvisions(source, name)


def _of_file(path: Path) -> State:
    if not path.is_file():
        raise ValueError(
            f"weights = {str(path)!r}: there is no such file; give none, default, {NAMED}V1, or a file that holds a "
            "state dict, such as weights.pt of `hpo train`"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever unpickling comes upon
        told = (
            "it holds more than tensors"
            if isinstance(error, pickle.UnpicklingError)
            else f"{type(error).__name__}: {error}"
        )
        raise ValueError(
            f"weights = {str(path)!r}: is no file of weights that can be read: {told}; save model.state_dict() by torch.save"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"weights = {str(path)!r}: holds no state dict (names with tensors); save model.state_dict()")
    return dict(state)


def _torchvisions(source: str, name: str) -> State:
    from torchvision import models  # here: it takes a second, which models without such weights need not pay

    if name not in models.list_models():
        raise ValueError(f"weights = {source!r}: torchvision has none for this model; give none, or a file")
    known = models.get_model_weights(name)
    listed = [weights.name for weights in known]
    found: Any = known.DEFAULT if source == "default" else next((w for w in known if w.name == source), None)
    if found is None:
        raise ValueError(f"weights = {source!r}: torchvision has {', '.join(listed)} for {name}; give one of them")
    try:
        state: State = found.get_state_dict(progress=False, check_hash=True)
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        place = Path(torch.hub.get_dir()) / "checkpoints" / found.url.rpartition("/")[2]
        raise ValueError(
            f"weights = {source!r}: cannot be downloaded ({error}); put {found.url} at {place} by other means, "
            'or give weights = "none"'
        ) from error
    return dict(state)
