"""Pre-trained weights from torchvision or from a file of `hpo train`, and which layers are trained further.

Tensors are matched by name and shape. Only the weights that the option `weights` names are downloaded, once, into the
folder of torch.hub.
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
Published = Callable[[str], State]  # weights by the value of the option `weights`
FILE_OR_NAME = "file or name"  # marks an option that may name a file; a relative path starts at the study file
NAMED = "IMAGENET1K_"  # torchvision's names of weights begin so; V1, V2 or the like follows


class TransferOptions(TypedDict, total=False):
    """Options of pre-trained weights and frozen layers."""

    weights: Annotated[str, FILE_OR_NAME]
    """none (default), default (torchvision's best), one of torchvision's names such as IMAGENET1K_V1, or a file of weights
    such as weights.pt of `hpo train`."""
    keep: Annotated[int, Ge(0)]
    """Number of layers that get the pre-trained weights, from the input (default: all but the head)."""
    freeze: Literal["none", "features"] | Annotated[int, Ge(0)]
    """Number of layers that are not trained, from the input. features: all but the head."""
    unfreeze_every: Annotated[int, Ge(1)]
    """Epochs between two unfreezings, each of which unfreezes the last frozen layer (default: never)."""
    layer_rate: Annotated[float, Gt(0), Le(1)]
    """Learning-rate multiplier for pre-trained layers (default 1)."""


@dataclass(frozen=True, kw_only=True)
class Reuse:
    """Which pre-trained tensors a model has."""

    source: str
    taken: int  # number of the model's tensors that were loaded
    new: tuple[str, ...]  # names of the parameters with fresh initial values

    def __str__(self) -> str:
        return f"{self.source}: {self.taken} tensors loaded; new: {', '.join(self.new) or 'none'}"


def reuse(model: nn.Module) -> Reuse | None:
    """Return the `Reuse` of a model, or None if no weights were loaded."""
    found = vars(model).get("reuse")
    return found if isinstance(found, Reuse) else None


def transfer(
    model: nn.Module,
    name: str,
    options: TransferOptions,
    adapt: Callable[[State], State] = lambda state: state,
    *,
    fitted: bool = False,
    published: Published | None = None,
) -> nn.Module:
    """Load weights into a model and freeze its layers, as the options say; return the model.

    ValueError if the weights cannot be read or do not fit, or if the model has too few layers.

    Args:
        name: torchvision's name of the model, if torchvision has weights for it.
        adapt: fits loaded weights to the model where their shapes differ.
        fitted: whether the layers below the head are pre-trained even if no weights are loaded.
        published: returns the weights of a name; None: torchvision's.
    """
    source = options.get("weights", "none")
    if source == "none" and not options.keys() & {"keep", "freeze", "layer_rate"}:
        return model
    count = len(freezing.layers(model))
    keep = options.get("keep", count - 1)
    if keep > count:
        raise ValueError(f"keep = {keep}: the model has {count} layers with its head; give at most {count}")
    if source != "none":
        _take_over(model, adapt(_first_convolution(read(source, name, published), model)), keep, source)
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
            f"weights = {source!r}: none of its {len(state)} tensors has the name and shape of a tensor of the model; "
            f"it has {_some(state)}; the model has {_some(ours)}"
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
    """Fit the first convolution's weights to the number of channels of the images.

    Each channel gets an equal share of the sum over all channels. So a gray image gives the same output as before as
    RGB.
    """
    name, ours = next(((name, p) for name, p in model.named_parameters() if p.ndim == 4), ("", None))
    theirs = state.get(name)
    if ours is None or theirs is None or theirs.ndim != 4 or theirs.shape[1] == ours.shape[1]:
        return state
    channels = ours.shape[1]
    return state | {name: theirs.sum(1, keepdim=True).expand(-1, channels, -1, -1) / channels}


# --- where weights come from ----------------------------------------------------------------------------------------------


def is_file(source: str) -> bool:
    """Return whether the option `weights` names a file."""
    return source not in ("none", "default") and not source.startswith(NAMED)


def read(source: str, name: str, published: Published | None = None) -> State:
    """Return the weights of a file, or published ones; ValueError if they cannot be had.

    Args:
        name: torchvision's name of the model.
        published: returns the weights of a name; None: torchvision's.
    """
    if is_file(source):
        return _of_file(Path(source))
    return _torchvisions(source, name) if published is None else published(source)


def _of_file(path: Path) -> State:
    if not path.is_file():
        raise ValueError(
            f"weights = {str(path)!r}: there is no such file; give none, default, {NAMED}V1, or a file with a "
            "state dict, such as weights.pt of `hpo train`"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling may raise any exception
        told = (
            "it holds more than tensors"
            if isinstance(error, pickle.UnpicklingError)
            else f"{type(error).__name__}: {error}"
        )
        raise ValueError(
            f"weights = {str(path)!r}: cannot be read as weights: {told}; save model.state_dict() with torch.save"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"weights = {str(path)!r}: is not a state dict (tensors by name); save model.state_dict()")
    return dict(state)


def _torchvisions(source: str, name: str) -> State:
    from torchvision import models  # here, since it takes a second, which models without these weights do not need

    if name not in models.list_models():
        raise ValueError(f"weights = {source!r}: torchvision has no weights for this model; give none, or a file")
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
            f"weights = {source!r}: cannot be downloaded ({error}); put {found.url} at {place} yourself, "
            'or give weights = "none"'
        ) from error
    return dict(state)
