"""Every classification model of torchvision and of timm by name: `torchvision:NAME` and `timm:NAME`.

They are built as the library builds them, for the shape of the images and the number of outputs. Nothing is downloaded
unless `weights` asks for it. timm is an extra.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, Unpack

from torch import nn

from hpo.models import shapes
from hpo.models.blocks import Rate
from hpo.models.depth import StochasticDepth
from hpo.models.preparing import Options, prepared
from hpo.models.shapes import Shape
from hpo.models.transfer import State
from hpo.models.vit import with_positions

Build = Callable[..., nn.Module]

AUXILIARY = ("googlenet", "inception_v3")  # torchvision's models with further heads, which are left out


@cache
def of_torchvision(name: str) -> Build:
    """Return the model function of one of torchvision's models."""

    def build(
        shape: Shape,
        outputs: int,
        *,
        dropout: Rate | None = None,
        stochastic_depth: Rate | None = None,
        **options: Unpack[Options],
    ) -> nn.Module:
        """Build a classification model of torchvision, by any name of `torchvision.models.list_models()`.

        It is made for images of 224 pixels. ValueError if the model has no such option.

        Args:
            dropout: dropout probability, if the model has dropout (default: torchvision's).
            stochastic_depth: probability of skipping the last block for an image, if the model can (default:
                torchvision's).
        """
        from torchvision import models, ops  # here, since it takes a second, which other models do not need

        full = f"torchvision:{name}"
        channels, height, width = shapes.image(full, shape)
        rates = {"drop_rate" if name.startswith("densenet") else "dropout": dropout}
        rates["stochastic_depth_prob"] = stochastic_depth
        given: dict[str, Any] = {key: rate for key, rate in rates.items() if rate is not None}
        fixed: dict[str, Any] = {"weights": None, "num_classes": outputs}
        if name in AUXILIARY:
            fixed |= {"aux_logits": False, "init_weights": False}
        if name.startswith("vit_"):
            fixed["image_size"] = _square(full, height, width)
        if name.startswith("maxvit"):
            fixed["input_size"] = (height, width)
        try:
            model = models.get_model(name, **fixed, **given)
        except TypeError as error:
            raise _no_such_option(full, dropout, stochastic_depth, error) from error
        _take_channels(model, channels)
        _replace(model, ops.StochasticDepth, lambda theirs: StochasticDepth(theirs.p) if theirs.mode == "row" else None)
        patch = getattr(model, "patch_size", 0) if name.startswith("vit_") else 0
        return prepared(model, name, options, partial(with_positions, height, patch) if patch else _as_it_is)

    build.__name__ = build.__qualname__ = name
    return build


@cache
def of_timm(name: str) -> Build:
    """Return the model function of one of timm's models."""

    def build(
        shape: Shape,
        outputs: int,
        *,
        dropout: Rate | None = None,
        stochastic_depth: Rate | None = None,
        **options: Unpack[Options],
    ) -> nn.Module:
        """Build a classification model of timm, by any name of `timm.list_models()`.

        A name may end with the tag of weights, as in `timm:resnet18.a1_in1k`. `weights = "default"` loads these, or the
        model's own default. Needs the extra timm. ValueError if the model has no such option.

        Args:
            dropout: dropout probability before the last layer (default: timm's).
            stochastic_depth: probability of skipping the last block for an image, if the model can (default: timm's).
        """
        import timm
        from timm.layers import DropPath

        full = f"timm:{name}"
        channels, height, width = shapes.image(full, shape)
        given: dict[str, Any] = {"drop_rate": dropout, "drop_path_rate": stochastic_depth}
        given = {key: rate for key, rate in given.items() if rate is not None}

        def made(*, pretrained: bool) -> nn.Module:
            common = {"pretrained": pretrained, "num_classes": outputs, "in_chans": channels, **given}
            try:  # transformers must know the size of the images, networks of convolutions take no such argument
                return timm.create_model(name, img_size=(height, width), **common)  # type: ignore[no-any-return]
            except TypeError as error:
                if "img_size" not in str(error):
                    raise _no_such_option(full, dropout, stochastic_depth, error) from error
            try:
                return timm.create_model(name, **common)  # type: ignore[no-any-return]
            except TypeError as error:
                raise _no_such_option(full, dropout, stochastic_depth, error) from error

        def published(source: str) -> State:
            if source != "default":
                raise ValueError(
                    f"weights = {source!r}: timm has its weights by tags; write them into the name, as in "
                    f'"timm:{name.partition(".")[0]}.TAG", with weights = "default"'
                )
            try:
                return made(pretrained=True).state_dict()
            except (OSError, RuntimeError) as error:
                said = str(error).strip().partition("\n")[0]
                raise ValueError(
                    f'weights = "default": timm cannot load weights of {name}: {said}; give a file, or weights = "none"'
                ) from error

        model = made(pretrained=False)
        _replace(model, DropPath, lambda theirs: StochasticDepth(theirs.drop_prob) if theirs.scale_by_keep else None)
        return prepared(model, full, options, published=published)

    build.__name__ = build.__qualname__ = name
    return build


def names_of_torchvision() -> list[str]:
    """Return the names of all classification models of torchvision."""
    from torchvision import models

    return models.list_models(module=models)  # type: ignore[no-any-return]


def names_of_timm() -> list[str]:
    """Return the names of all models of timm, and those with the tag of weights."""
    import timm

    return [*timm.list_models(), *timm.list_pretrained()]


#: By prefix of the name in a study file: the model function of a name, and all names.
LIBRARIES: dict[str, tuple[Callable[[str], Build], Callable[[], list[str]]]] = {
    "torchvision": (of_torchvision, names_of_torchvision),
    "timm": (of_timm, names_of_timm),
}


# --- how their models are fitted to ours -----------------------------------------------------------------------------------


def _as_it_is(state: State) -> State:
    return state


def _square(name: str, height: int, width: int) -> int:
    if height != width:
        raise ValueError(f"{name} needs square images, but these have {height}x{width} pixels; resize them")
    return height


def _no_such_option(name: str, dropout: float | None, depth: float | None, error: TypeError) -> ValueError:
    given = {"dropout": dropout, "stochastic_depth": depth}
    asked = [f"{key} = {rate}" for key, rate in given.items() if rate is not None]
    if not asked:
        return ValueError(f"{name} cannot be built: {error}; take another model")
    return ValueError(f"{' or '.join(asked)}: {name} has no such option ({error}); leave it out")


def _take_channels(model: nn.Module, channels: int) -> None:
    """Replace the first convolution if it is for another number of channels."""
    name, first = next((name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    if first.in_channels == channels:
        return
    place, _, key = name.rpartition(".")
    size: dict[str, Any] = {key: getattr(first, key) for key in ("kernel_size", "stride", "padding", "dilation")}
    made = nn.Conv2d(channels, first.out_channels, bias=first.bias is not None, **size)
    nn.init.kaiming_normal_(made.weight, mode="fan_out", nonlinearity="relu")
    if made.bias is not None:
        nn.init.zeros_(made.bias)
    model.get_submodule(place)._modules[key] = made


def _replace(model: nn.Module, kind: type[nn.Module], ours: Callable[[Any], nn.Module | None]) -> None:
    """Replace each module of this type by what `ours` returns for it; None keeps it.

    So stochastic depth draws from the run's generator.
    """
    for module in list(model.modules()):
        for key, child in module._modules.items():
            if type(child) is kind and (made := ours(child)) is not None:
                module._modules[key] = made
