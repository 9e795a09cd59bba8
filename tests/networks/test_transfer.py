"""Weights from a file, from torchvision by name, and what is trained of them when."""

from __future__ import annotations

import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpo import models
from hpo.models import MODELS, cnn, freezing, mlp
from hpo.models.transfer import reuse
from hpo.spec.study_file import StudySpec
from hpo.spec.training import TrainConfig, Training, with_sections
from hpo.study import resolve
from hpo.train import loop
from hpo.train.build import assemble, registry
from hpo.train.build.executor import stack_key_of
from hpo.train.checkpoint import save
from hpo.train.optim import averaging, param_groups
from hpo.train.optim.optimizers import OPTIMIZERS
from hpo.train.stack.layers import Unstackable
from tests.support import stacks
from tests.support.stacks import CLASSES, Trial, apart, stack_of

SHAPE = (1, 8, 8)


def named(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(model: nn.Module, before: nn.Module) -> list[str]:
    """Return the parameters that two models have alike."""
    theirs = before.state_dict()
    return [n for n, p in model.named_parameters() if theirs[n].shape == p.shape and torch.equal(theirs[n], p)]


@pytest.fixture
def before(tmp_path: Path) -> tuple[nn.Module, str]:
    """A model that was trained on another task, of seven classes, and its file, as `hpo train` writes it."""
    torch.manual_seed(1)
    model = mlp(SHAPE, 7, widths=[6, 5], norm="none")
    save(tmp_path / "weights.pt", dict(model.state_dict()))
    return model, str(tmp_path / "weights.pt")


@pytest.mark.parametrize(
    ("options", "alike", "new"),
    [
        ({}, ["1.weight", "1.bias", "4.weight", "4.bias"], ("7.weight", "7.bias")),
        ({"keep": 1}, ["1.weight", "1.bias"], ("4.weight", "4.bias", "7.weight", "7.bias")),
        ({"keep": 0}, [], ("1.weight", "1.bias", "4.weight", "4.bias", "7.weight", "7.bias")),
        ({"keep": 3}, ["1.weight", "1.bias", "4.weight", "4.bias"], ("7.weight", "7.bias")),
        ({"widths": [6, 4]}, ["1.weight", "1.bias"], ("4.weight", "4.bias", "7.weight", "7.bias")),
    ],
)
def test_layers_that_match_are_taken_over_and_the_head_is_new(
    before: tuple[nn.Module, str], options: dict[str, Any], alike: list[str], new: tuple[str, ...]
) -> None:
    theirs, file = before
    model = mlp(SHAPE, 9, **{"widths": [6, 5], "norm": "none", **options}, weights=file)
    assert same(model, theirs) == alike
    report = reuse(model)
    assert report is not None
    assert (report.taken, report.new) == (len(alike), new)
    assert str(report) == f"{file}: {len(alike)} tensors loaded; new: {', '.join(new)}"


def test_a_head_is_taken_over_only_where_all_layers_are_kept(before: tuple[nn.Module, str]) -> None:
    theirs, file = before
    options: dict[str, Any] = {"widths": [6, 5], "norm": "none", "weights": file}
    assert len(same(mlp(SHAPE, 7, **options), theirs)) == 4
    assert len(same(mlp(SHAPE, 7, **options, keep=3), theirs)) == 6
    assert reuse(mlp(SHAPE, 7)) is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"weights": "no/such.pt"}, "weights = 'no/such.pt': there is no such file; give none, default, IMAGENET1K_V1"),
        ({"weights": "{folder}/text.pt"}, "text.pt': cannot be read as weights: "),
        ({"weights": "{folder}/list.pt"}, r"list.pt': is not a state dict \(tensors by name\)"),
        (
            {"weights": "{folder}/other.pt"},
            r"none of its 1 tensors .* it has a \[2\]; the model has 1.weight \[64, 64\]",
        ),
        ({"weights": "default"}, "weights = 'default': torchvision has no weights for this model; give none, or"),
        ({"weights": "{folder}/other.pt", "init": "lsuv"}, 'init = "lsuv" would scale the loaded weights too'),
        ({"keep": 4}, "keep = 4: the model has 3 layers with its head; give at most 3"),
        ({"freeze": 3}, "freeze = 3: the model has 3 layers; freeze at most 2 of them"),
    ],
)
def test_what_is_wrong_with_weights_is_told(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    (tmp_path / "text.pt").write_text("no weights")
    torch.save([1], tmp_path / "list.pt")
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pt")
    options = {key: value.format(folder=tmp_path) if key == "weights" else value for key, value in options.items()}
    with pytest.raises(ValueError, match=said):
        mlp(SHAPE, CLASSES, **options)


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_the_first_convolution_takes_the_same_share_of_each_channel(tmp_path: Path, channels: int) -> None:
    colour = cnn((3, 8, 8), 7, channels=[5], norm="none")
    torch.save(colour.state_dict(), tmp_path / "colour.pt")
    model = cnn((channels, 8, 8), 7, channels=[5], norm="none", weights=str(tmp_path / "colour.pt"), keep=2)
    gray = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(model(gray.expand(-1, channels, -1, -1)), colour(gray.expand(-1, 3, -1, -1)))


# --- torchvision's, from the folder that torch.hub downloads to ---------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of downloads of its own, and no way to anything that is not in it."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nobody listens
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(urllib.request, "_opener", None)  # which would keep this way for whatever test comes next
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    return tmp_path / "hub" / "checkpoints"


def put(folder: Path, name: str, version: str) -> nn.Module:
    """Put a file where torchvision would put this download, and return the model that it is of."""
    import torchvision

    model: nn.Module = torchvision.models.get_model(name)
    weights = torchvision.models.get_model_weights(name)[version]
    torch.save(model.state_dict(), folder / weights.url.rpartition("/")[2])
    return model


def test_torchvision_s_weights_are_taken_by_name(hub: Path) -> None:
    """Torchvision's weights are taken by name and adapted to gray images."""
    theirs = put(hub, "resnet18", "IMAGENET1K_V1")
    model = MODELS["resnet18"]((1, 64, 64), 10, weights="IMAGENET1K_V1")
    report = reuse(model)
    assert report is not None
    assert report.new == ("fc.weight", "fc.bias")
    assert len(same(model, theirs)) == len(list(theirs.parameters())) - 3
    torch.testing.assert_close(model.conv1.weight, theirs.conv1.weight.sum(1, keepdim=True))
    small = reuse(MODELS["resnet18"]((3, 8, 8), 10, weights="default"))
    assert small is not None
    assert small.new == ("conv1.weight", "fc.weight", "fc.bias")  # of 3x3, no 7x7


def test_without_a_connection_the_file_and_its_place_are_told(hub: Path) -> None:
    with pytest.raises(ValueError, match="'default': cannot be downloaded") as caught:
        MODELS["mobilenet_v3"]((3, 16, 16), 10, weights="default")
    assert f"at {hub}/mobilenet_v3_small-047dcff4.pth yourself" in str(caught.value)
    assert "put https://download.pytorch.org/models/mobilenet_v3_small-047dcff4.pth" in str(caught.value)


def test_a_name_that_torchvision_has_not_is_told_with_those_it_has() -> None:
    with pytest.raises(
        ValueError, match="'IMAGENET1K_V9': torchvision has IMAGENET1K_V1 for resnet18; give one of them"
    ):
        MODELS["resnet18"](SHAPE, 10, weights="IMAGENET1K_V9")


# --- what is trained when -------------------------------------------------------------------------------------------------


def trained(model: nn.Module) -> list[bool]:
    """Return for each layer whether all of it is trained; none is trained in part."""
    found = []
    for layer in freezing.layers(model):
        wants = {p.requires_grad for _, module in layer for p in module.parameters(recurse=False)}
        assert len(wants) == 1
        found.append(wants.pop())
    return found


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, [1, 1, 1]), ({"freeze": "none"}, [1, 1, 1]), ({"freeze": 1}, [0, 1, 1]), ({"freeze": "features"}, [0, 0, 1])],
)
@pytest.mark.parametrize("build", [mlp, cnn])
def test_layers_are_frozen_from_the_input_on(build: Any, options: dict[str, Any], expected: list[int]) -> None:
    assert trained(build(SHAPE, CLASSES, **options)) == [bool(each) for each in expected]


@pytest.mark.parametrize("name", ["vgg11", "resnet18", "wide_resnet", "mobilenet_v3", "efficientnet_b0", "vit_b_16"])
def test_the_features_of_a_network_are_all_but_its_last_layer(name: str) -> None:
    with torch.device("meta"):
        model = MODELS[name]((1, 32, 32), 10, freeze="features")
    *body, last = trained(model)
    assert last
    assert not any(body)
    heads = [(n, list(p.shape)) for n, p in model.named_parameters() if p.requires_grad]
    assert [shape[0] for _, shape in heads] == [10, 10]


def run_of(splits: Any, epochs: int = 6, **options: Any) -> Any:
    return Trial(splits=splits, build=lambda: mlp(SHAPE, CLASSES, widths=[7, 5], **options), epochs=epochs).run()


def test_frozen_layers_stay_bit_for_bit(splits: Any) -> None:
    """Frozen layers stay bit for bit with their batch norms and the others train."""
    run = run_of(splits, freeze=1)
    before = named(run.model)
    results = list(loop.train(run))
    kept = [name for name, tensor in named(run.model).items() if torch.equal(tensor, before[name])]
    of_norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    assert kept == ["1.weight", *(f"2.{key}" for key in of_norm)]
    assert results[-1].train_loss < results[0].train_loss


@pytest.mark.parametrize("build", [mlp, cnn])
@pytest.mark.parametrize("found", [averaging.none(), averaging.swa(start=0.3)])
def test_frozen_statistics_are_judged(splits: Any, build: Any, found: Any) -> None:
    """Frozen statistics are those that are judged whatever else looks at the model."""
    trial = Trial(
        splits=splits, build=lambda: build(SHAPE, CLASSES, freeze=1), dtype=torch.float32, epochs=4, lr=0.05
    )  # float32, as a convolution's images are laid out for it
    run = replace(trial, options={"averaging": found}).run()
    before = named(run.model)
    list(loop.train(run))
    after = run.judged_weights()
    statistics = [name for name in before if "running" in name or "num_batches" in name]
    assert [name for name in statistics if torch.equal(after[name], before[name])] == statistics[:3]
    assert len(statistics) == 6


@pytest.mark.parametrize("options", [{}, {"decoupled": True, "weight_decay": 0.1}])
def test_momentum_begins_where_a_layer_is_thawed(splits: Any, options: dict[str, Any]) -> None:
    def sgd(parameters: Any, lr: float) -> torch.optim.Optimizer:
        return OPTIMIZERS["sgd"](parameters, lr=lr, momentum=0.9, **options)

    model = mlp(SHAPE, CLASSES, widths=[7, 5], norm="layer", freeze=2, unfreeze_every=1)
    run = Trial(splits=splits, build=lambda: model, optimizer=sgd, epochs=3).run()
    held = [len(run.optimizer.state) for _ in loop.train(run)]
    assert held == sorted(set(held))
    assert held[-1] == len(list(model.parameters()))


def test_layers_are_thawed_one_by_one_from_the_top(splits: Any) -> None:
    run = run_of(splits, freeze="features", unfreeze_every=2)
    seen, previous = [], named(run.model)
    for _ in loop.train(run):
        now = named(run.model)
        seen.append([not torch.equal(now[name], previous[name]) for name in ("1.weight", "5.weight", "9.weight")])
        previous = now
    only_head, two, all_three = [False, False, True], [False, True, True], [True, True, True]
    assert seen == [only_head, only_head, two, two, all_three, all_three]


def test_a_thawing_goes_on_where_it_was_stopped(splits: Any) -> None:
    options = {
        "freeze": "features",
        "unfreeze_every": 1,
        "layer_rate": 0.5,
        "pretrain": "autoencoder",
        "pretrain_steps": 2,
    }
    whole = list(loop.train(run_of(splits, **options)))
    run = run_of(splits, **options)
    first = [next(loop.train(run)), next(loop.train(run))]
    again = run_of(splits, **options)
    again.load_state_dict(run.state_dict())
    rest = list(loop.train(again))
    assert [r.validation_loss for r in (*first, *rest)] == [r.validation_loss for r in whole]


def test_pre_trained_layers_have_a_rate_of_their_own() -> None:
    model = mlp(SHAPE, CLASSES, widths=[7, 5], norm="none", layer_rate=0.1, pretrain="autoencoder")
    optimizer = torch.optim.AdamW(param_groups.split(model, decay="all"), lr=0.02, weight_decay=0.3)
    param_groups.set_rates(optimizer)
    head, rest = optimizer.param_groups
    assert [p.shape[0] for p in head["params"]] == [CLASSES] * 2
    assert sorted(p.shape[0] for p in rest["params"]) == [5, 5, 7, 7]
    assert (head["lr"], rest["lr"]) == (0.02, pytest.approx(0.002))
    assert head["weight_decay"] == rest["weight_decay"] == 0.3
    assert len(param_groups.split(mlp(SHAPE, CLASSES), decay="all")) == 1


@pytest.mark.parametrize(
    ("rate", "before", "expected"), [(1.0, "autoencoder", 0.01), (0.1, "autoencoder", 0.001), (0.1, "none", 0.01)]
)
def test_a_run_reports_the_whole_rate(splits: Any, rate: float, before: str, expected: float) -> None:
    """A run reports the whole rate and steps by that of pre trained layers."""
    chosen = {"name": "mlp", "widths": [7], "norm": "none", "layer_rate": rate}
    chosen |= {"pretrain": before, "pretrain_steps": 2}
    optimizer = {"name": "sgd", "lr": 0.01}
    tree = {"data": {"name": "digits"}, "model": chosen, "optimizer": optimizer, **with_sections({})}
    run = assemble.build_run(TrainConfig.from_tree(tree), splits, 0, Path(), torch.device("cpu"))
    rates = {tuple(p.shape): group["lr"] for group in run.optimizer.param_groups for p in group["params"]}
    assert rates == {
        (CLASSES, 7): 0.01,
        (CLASSES,): 0.01,
        (7, 64): pytest.approx(expected),
        (7,): pytest.approx(expected),
    }
    assert next(loop.train(run)).learning_rate == 0.01


def slowed(parameters: Any, lr: float) -> torch.optim.Optimizer:
    """Return an optimizer of a trial's model, whose first four parameters are pre-trained."""
    listed = list(parameters)
    return torch.optim.SGD([{"params": listed[4:]}, {"params": listed[:4], "lr": 0.1 * lr}], lr=lr)


def test_frozen_layers_and_layer_rates_are_stacked(splits: Any) -> None:
    """Frozen layers and layer rates are stacked where no batch norm is held."""

    def build() -> nn.Module:
        return mlp(SHAPE, CLASSES, widths=[7, 5], norm="layer", freeze=1, layer_rate=0.1)

    trials = Trial(splits=splits, build=build, optimizer=slowed, epochs=5).several(2)
    assert apart(stacks.together(trials), [trial.by_plain_torch() for trial in trials]) <= 1e-10


def test_runs_of_any_layer_rate_share_a_stack(splits: Any) -> None:
    """Runs share a stack whatever the rate of their pre trained layers."""

    def partition(**options: Any) -> str:
        return stack_key_of(run_of(splits, norm="layer", **options), Training())

    assert partition(layer_rate=0.1) == partition(layer_rate=0.3)
    assert len({partition(layer_rate=0.1), partition(layer_rate=0.1, freeze=1), partition()}) == 3
    assert partition(freeze=1) != partition(freeze=1, unfreeze_every=2)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"freeze": 1}, "its frozen batch norms keep their running statistics"),
        ({"freeze": 1, "unfreeze_every": 3, "norm": "none"}, "its layers are unfrozen one by one"),
    ],
)
def test_what_the_loop_alone_can_freeze_is_told_to_the_stack(splits: Any, options: dict[str, Any], why: str) -> None:
    with pytest.raises(Unstackable, match=why):
        stack_of([run_of(splits, **options)])


def test_models_without_freezing_are_not_concerned() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[0].requires_grad_(False)
    freezing.enter_epoch(model, 3)
    assert model[1].training
    assert not model[0].weight.requires_grad
    assert not any(hasattr(p, freezing.FACTOR) for p in model.parameters())
    assert freezing.why_alone(model) is None
    assert models.freezing.freezing(model) is None


@pytest.mark.parametrize(
    ("weights", "files"), [("w.pt", ["w.pt"]), ("none", []), ("default", []), ("IMAGENET1K_V2", [])]
)
def test_a_config_asks_for_the_files_of_its_weights_and_for_no_names(weights: str, files: list[str]) -> None:
    document = {
        "name": "s",
        "data": {"name": "digits"},
        "model": {"name": "resnet18", "weights": weights},
        "optimizer": {"name": "sgd", "lr": 0.1},
    }
    assert registry.files(StudySpec.from_document(document)) == files


def test_what_a_file_of_weights_holds_counts_as_code_of_the_study(tmp_path: Path) -> None:
    document = {
        "name": "s",
        "data": {"name": "digits"},
        "model": {"name": {"choices": ["mlp", "cnn"]}, "cnn": {"weights": {"choices": ["none", "a.pt", "b.pt"]}}},
        "optimizer": {"name": "sgd", "lr": 0.1},
    }
    spec = StudySpec.from_document(document)
    assert registry.weights(spec) == ["a.pt", "b.pt"]
    assert resolve.digest_code(spec, tmp_path) == ""
    digests = []
    for name, content in [("a.pt", b"1"), ("b.pt", b"1"), ("b.pt", b"2")]:
        (tmp_path / name).write_bytes(content)
        digests.append(resolve.digest_code(spec, tmp_path))
    assert len({"", *digests}) == 4
