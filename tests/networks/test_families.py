"""Every model of the table trains: small ones on the digits, large ones one step on images of their smallest size."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import tomli_w
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models as theirs
from torchvision.models.vision_transformer import VisionTransformer

from hpo import data
from hpo.models import MODELS, SMALLEST, adopt_dropout, shapes, use_generator
from hpo.models.activations import Activation
from hpo.models.depth import StochasticDepth
from hpo.models.dropout import Dropout
from hpo.models.inits import Init
from hpo.models.norms import Norm
from hpo.models.tables import TableOptions
from hpo.spec import options, space
from hpo.spec.study_file import StudySpec
from hpo.spec.training import TrainConfig
from hpo.study import resolve
from hpo.train import loop
from hpo.train.build import assemble, registry
from hpo.train.inputs import Batch
from hpo.train.randomness import initial_model
from hpo.train.stack import architecture, forward, select
from hpo.train.stack.layers import Pass, Unstackable
from tests.support import stacks
from tests.support.stacks import Trial

CPU = torch.device("cpu")
LARGE = [name for name in SMALLEST if name not in ("mlp", "cnn", "wide_resnet")]

# --- the options of mlp and cnn on the digits ------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    **{f"activation {name}": {"activation": name} for name in get_args(Activation)},
    "leaky slope": {"activation": "leaky_relu", "negative_slope": 0.2},
    "elu alpha": {"activation": "elu", "alpha": 0.5},
    "rrelu slopes": {"activation": "rrelu", "lower": 0.1, "upper": 0.5},
    "softplus beta": {"activation": "softplus", "beta": 2.0},
    "swish beta": {"activation": "swish", "beta": 1.5},
    "swish, learned": {"activation": "swish", "learn_beta": True},
    **{f"norm {name}": {"norm": name} for name in get_args(Norm)},
    "groups": {"norm": "group", "groups": 2},
    "norm's momentum and eps": {"norm": "batch", "norm_momentum": 0.3, "norm_eps": 1e-3},
    **{f"init {name}": {"init": name} for name in get_args(Init)},
    "init's deviation": {"init": "normal", "init_std": 0.1, "zero_biases": True},
    "depth": {"depth": 2},
    "residual": {"depth": 2, "residual": True, "stochastic_depth": 0.2},
    "dropout": {"dropout": 0.2, "input_dropout": 0.1},
    "pretrain": {"pretrain": "autoencoder", "pretrain_steps": 20, "pretrain_lr": 3e-3},
    "freeze": {"freeze": 1, "unfreeze_every": 1, "layer_rate": 0.5},
}
SIZES = {"mlp": {"widths": [32]}, "cnn": {"channels": [8, 16]}}


@pytest.fixture(scope="module")
def digits() -> data.Splits:
    splits = data.load(data.SOURCES["digits"](), split_seed=0, device=CPU)
    few = data.Split(inputs=splits.train.inputs[:512], targets=splits.train.targets[:512])
    return dataclasses.replace(splits, train=few)


def config_of(model: dict[str, Any], **training: Any) -> TrainConfig:
    tree = {
        "data": {"name": "digits"},
        "model": model,
        "optimizer": {"name": "adam", "lr": 3e-3},
        "schedule": {"name": "constant"},
        "training": {"epochs": 2, "batch_size": 32, **training},
    }
    return registry.read(tree, Path())


# An activation or an initialisation is the same module in both models; the two walk ways of their own elsewhere.
ALIKE = [option for option in OPTIONS if option.startswith(("activation", "init"))]


@pytest.mark.parametrize(
    ("option", "name"),
    [
        *((option, "mlp") for option in OPTIONS),
        *((option, "cnn") for option in OPTIONS if option not in ALIKE),
        *(pytest.param(option, "cnn", marks=pytest.mark.soak) for option in ALIKE),
    ],
)
def test_every_option_trains_on_the_digits_and_again_to_the_same_curve(
    digits: data.Splits, name: str, option: str
) -> None:
    config = config_of({"name": name, **SIZES[name], **OPTIONS[option]})
    first, again = (list(loop.train(assemble.build_run(config, digits, 3, Path(), CPU))) for _ in range(2))
    assert first[1].train_loss < first[0].train_loss
    assert [dataclasses.replace(r, seconds=0.0) for r in first] == [dataclasses.replace(r, seconds=0.0) for r in again]


def test_every_option_of_mlp_and_cnn_is_among_those_trained() -> None:
    tried = {key for chosen in (*OPTIONS.values(), *SIZES.values()) for key in chosen}
    # tests/networks/test_transfer.py, test_blocks.py, test_inputs.py
    elsewhere = {"weights", "keep", "block_dropout", *TableOptions.__annotations__}
    for name in SIZES:
        assert set(options.model_of(MODELS[name], 2).model_fields) <= tried | elsewhere


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_goes_through_a_file_and_back(tmp_path: Path, option: str) -> None:
    """As an export does: what is resolved is written, read, and means the same."""
    model = {"name": "cnn", **SIZES["cnn"], **OPTIONS[option]}
    document = {"name": "s", "data": {"name": "digits"}, "model": model, "optimizer": {"name": "sgd", "lr": 0.1}}
    resolved = resolve.resolve(StudySpec.from_document(document), tmp_path)
    pinned = tomllib.loads(tomli_w.dumps({**resolved.document, **space.lower(resolved.tree)}))
    again = resolve.resolve(StudySpec.from_document(pinned), tmp_path)
    assert again.fingerprint == resolved.fingerprint
    assert {key: again.tree["model"][key] for key in model} == model


def test_options_that_are_not_given_are_no_part_of_a_study() -> None:
    assert set(options.defaults(MODELS["mlp"], 2)) == {"widths", "dropout", "norm", "activation"}
    assert set(options.defaults(MODELS["cnn"], 2)) == {"channels", "dropout", "norm", "activation"}


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ({"activation": "elu", "alpha": 0.5}, {"activation": "elu", "alpha": 1.5}, True),
        ({"activation": "swish", "beta": 0.5}, {"activation": "swish", "beta": 1.5}, True),
        ({"residual": True, "stochastic_depth": 0.0}, {"residual": True, "stochastic_depth": 0.2}, True),
        ({"input_dropout": 0.1}, {"input_dropout": 0.2}, True),
        ({"init": "lsuv"}, {"init": "orthogonal"}, True),
        ({"activation": "rrelu"}, {"activation": "rrelu"}, True),
        ({"activation": "rrelu", "lower": 0.1}, {"activation": "rrelu", "lower": 0.2}, False),
        ({"norm_eps": 1e-5}, {"norm_eps": 1e-4}, False),
        ({"freeze": 1}, {}, False),
    ],
)
def test_runs_share_a_stack_whatever_their_slopes_and_rates(
    digits: data.Splits, one: dict[str, Any], other: dict[str, Any], equal: bool
) -> None:
    runs = [assemble.build_run(config_of({"name": "mlp", **chosen}), digits, 0, Path(), CPU) for chosen in (one, other)]
    assert (architecture.digest(runs[0].model) == architecture.digest(runs[1].model)) is equal


# --- large models --------------------------------------------------------------------------------------------------------------


def images_for(name: str, channels: int = 1) -> torch.Tensor:
    side = SMALLEST[name][0]
    return torch.randn(4, channels, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["wide_resnet", *LARGE])
def test_a_model_takes_a_step_on_images_of_its_smallest_size(name: str) -> None:
    images = images_for(name)
    model = initial_model(lambda: MODELS[name](tuple(images.shape[1:]), 10), 0)
    logits = model(images)
    assert logits.shape == (4, 10)
    F.cross_entropy(logits, torch.arange(4)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", [name for name in MODELS if "image" in shapes.TAKES.get(name, ("image",))])
def test_every_model_of_images_has_a_smallest_size_and_says_so_below_it(name: str) -> None:
    for side, stem in zip(SMALLEST[name], ("small", "full"), strict=True):
        chosen = {"stem": stem} if "stem" in options.model_of(MODELS[name], 2).model_fields else {}
        with torch.device("meta"):
            MODELS[name]((3, side, side), 10, **chosen)
            if side > 1:
                with pytest.raises(ValueError, match="pixels"):
                    MODELS[name]((3, side, side - 1), 10, **chosen)


def test_a_vit_wants_squares_of_whole_patches() -> None:
    with torch.device("meta"):
        for shape in ((1, 16, 20), (1, 18, 18)):
            with pytest.raises(
                ValueError, match=r"square images whose side is a multiple of 4 pixels .* for instance to 16"
            ):
                MODELS["vit_b_16"](shape, 10)


TORCHVISIONS: dict[str, Callable[[], nn.Module]] = {
    **{name: getattr(theirs, name) for name in ("resnet18", "resnet34", "resnet50", "efficientnet_b0")},
    **{name: getattr(theirs, f"{name}_bn") for name in ("vgg11", "vgg13", "vgg16", "vgg19")},
    "mobilenet_v3": theirs.mobilenet_v3_small,
    "vit_b_16": lambda: VisionTransformer(224, 16, 12, 12, 768, 3072),
}


@pytest.mark.parametrize("name", LARGE)
def test_a_network_with_a_full_stem_has_torchvisions_names_and_shapes(name: str) -> None:
    with torch.device("meta"):
        ours, its = MODELS[name]((3, 224, 224), 1000, stem="full"), TORCHVISIONS[name]()
    assert [(key, t.shape) for key, t in ours.state_dict().items()] == [
        (k, t.shape) for k, t in its.state_dict().items()
    ]


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v3"])
def test_a_network_with_a_full_stem_gives_torchvisions_logits(name: str) -> None:
    its = TORCHVISIONS[name]().eval()
    ours = MODELS[name]((3, 64, 64), 1000, stem="full").eval()
    ours.load_state_dict(its.state_dict())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), its(x))


def test_positions_of_a_vit_are_interpolated(tmp_path: Path) -> None:
    positions = torch.randn(1, 5, 768)
    torch.save({"encoder.pos_embedding": positions}, tmp_path / "large.pt")
    model = MODELS["vit_b_16"]((1, 16, 16), 10, weights=str(tmp_path / "large.pt"))
    found = model.encoder.pos_embedding
    assert found.shape == (1, 17, 768)
    assert torch.equal(found[:, 0], positions[:, 0])
    grid, before = found[0, 1:].view(4, 4, 768), positions[0, 1:].view(2, 2, 768)
    torch.testing.assert_close(grid[::3, ::3], before)  # corners stay where they were


@pytest.mark.parametrize("name", ["resnet18", "wide_resnet", "efficientnet_b0"])
def test_all_that_a_model_draws_comes_from_its_generator(name: str) -> None:
    images = images_for(name)
    model = initial_model(lambda: MODELS[name](tuple(images.shape[1:]), 10, stochastic_depth=0.5, dropout=0.1), 0)
    assert {StochasticDepth, Dropout} <= {type(module) for module in model.modules()}
    assert not any(type(module).__module__.startswith("torchvision.ops.stoch") for module in model.modules())
    logits = []
    for seed in (0, 0, 1):
        use_generator(model, torch.Generator().manual_seed(seed))
        before = torch.get_rng_state()
        features: list[torch.Tensor] = []
        handle = list(model.modules())[-1].register_forward_pre_hook(lambda _m, x, kept=features: kept.append(x[0]))
        with torch.no_grad():
            model(images)
        handle.remove()
        assert torch.equal(torch.get_rng_state(), before)
        logits.append(features[0])
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])


def test_a_wide_resnet_has_the_papers_parameters() -> None:
    """36.5 million of WRN-28-10 and 2.7 of WRN-16-4 on CIFAR-10 (Zagoruyko & Komodakis 2016, tables 4 and 5)."""
    with torch.device("meta"):
        counts = [
            sum(p.numel() for p in MODELS["wide_resnet"]((3, 32, 32), 10, depth=depth, width=width).parameters())
            for depth, width in ((28, 10), (16, 4), (40, 4))
        ]
    assert [round(count / 1e6, 1) for count in counts] == [36.5, 2.7, 8.9]


STACKED: dict[str, dict[str, Any]] = {
    "wide_resnet": {"depth": 10, "width": 1, "dropout": 0.1, "stochastic_depth": 0.3},
    "mobilenet_v3": {},
}


@pytest.mark.parametrize("name", STACKED)
def test_convolutional_networks_train_in_a_stack_as_alone(name: str) -> None:
    chosen, side = STACKED[name], SMALLEST[name][0]
    splits = stacks.digits(40, side)

    def make(seed: int, some: data.Splits, dtype: torch.dtype | None) -> Any:
        trial = Trial(
            splits=some,
            build=lambda: MODELS[name]((1, side, side), stacks.CLASSES, **chosen),
            lr=1e-3,
            seed=seed,
            dtype=dtype or torch.float32,
        )
        return trial.run()

    assert select.find(make, splits, 8).name == "stack"


@pytest.mark.parametrize("name", [name for name in LARGE if name != "vit_b_16"])
def test_every_convolutional_network_has_a_stacked_form(name: str) -> None:
    side = SMALLEST[name][0]
    with torch.device("meta"):
        model = MODELS[name]((1, side, side), 10, dropout=0.1)
    assert forward.StackedForward(adopt_dropout(model)).name == "stack"


class OtherInValidation(forward.StackedForward):
    """A stacked form that is right in training and wrong in validation."""

    def __call__(self, at: Pass, inputs: Batch) -> torch.Tensor:
        logits = super().__call__(at, inputs)
        return logits if torch.is_grad_enabled() else 1.5 * logits


def test_a_stacked_form_that_differs_in_validation_is_told_as_that(digits: data.Splits) -> None:
    """The two losses that differ are shown, not the training's, which are equal."""
    config = config_of({"name": "mlp", "widths": [8]})

    def make(seed: int, splits: data.Splits, dtype: torch.dtype | None) -> Any:
        return assemble.build_run(config, splits, seed, Path(), CPU, dtype=dtype)

    with pytest.raises(Unstackable, match=r"reach a validation loss of \S+, but alone \S+") as caught:
        select.check(lambda run: OtherInValidation(run.model), make, digits, 8)
    together, alone = re.findall(r"\d\.\d{5,}", str(caught.value))
    assert together != alone


def test_rrelu_is_left_to_the_loop(digits: data.Splits) -> None:
    config = config_of({"name": "mlp", "widths": [8], "activation": "rrelu"})

    def make(seed: int, splits: data.Splits, dtype: torch.dtype | None) -> Any:
        return assemble.build_run(config, splits, seed, Path(), CPU, dtype=dtype)

    with pytest.raises(Unstackable, match=r"\(RReLU\) has no stacked form; .* draws a slope for each element"):
        select.find(make, digits, 8)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["wide_resnet", *LARGE])
def test_a_large_model_trains_on_enlarged_digits(digits: data.Splits, name: str) -> None:
    side = max(8, SMALLEST[name][0])
    images = digits.train.inputs.repeat_interleave(side // 8, 2).repeat_interleave(side // 8, 3)
    train = data.Split(inputs=images, targets=digits.train.targets)
    few = data.Split(inputs=images[:64], targets=digits.train.targets[:64])
    splits = dataclasses.replace(digits, train=train, validation=few)
    config = config_of({"name": name}, epochs=3)
    config = config.model_copy(
        update={"optimizer": config.optimizer.model_copy(update={"options": {"lr": 1e-4 if "v" in name else 1e-3}})}
    )
    results = list(loop.train(assemble.build_run(config, splits, 0, Path(), CPU)))
    assert results[-1].train_loss < 0.9 * results[0].train_loss
