"""Models of torchvision and timm by name: built for any channels and outputs, by the names and options of the library."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hpo.errors import SpecError
from hpo.models import shapes
from hpo.models.depth import StochasticDepth
from hpo.models.libraries import LIBRARIES, of_timm, of_torchvision
from hpo.models.transfer import reuse
from hpo.spec import extras, options, space, usercode
from hpo.spec.study_file import StudySpec
from hpo.train.build import registry

#: One model of each family of torchvision, and the side of the images.
FAMILIES = {
    "alexnet": 64,
    "convnext_tiny": 32,
    "densenet121": 32,
    "efficientnet_v2_s": 32,
    "googlenet": 32,
    "inception_v3": 75,
    "maxvit_t": 224,
    "mnasnet0_5": 32,
    "mobilenet_v2": 32,
    "mobilenet_v3_small": 32,
    "resnet18": 32,
    "resnext50_32x4d": 32,
    "shufflenet_v2_x0_5": 32,
    "squeezenet1_1": 32,
    "swin_t": 32,
    "swin_v2_t": 32,
    "vgg11_bn": 32,
    "vit_b_16": 32,
    "wide_resnet50_2": 32,
}
TIMMS = ["test_resnet", "test_vit", "test_convnext", "test_efficientnet", "resnet18.a1_in1k"]


def built(build: Any, side: int, **chosen: Any) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = build((1, side, side), 5, **chosen)
        assert model.eval()(torch.zeros(2, 1, side, side)).shape == (2, 5)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_of_torchvision_takes_gray_images_and_any_number_of_outputs(name: str) -> None:
    built(of_torchvision(name), FAMILIES[name])


def test_the_families_are_all_of_torchvision_but_regnet() -> None:
    """regnet computes its sizes with tensors, which takes real memory."""
    families = {re.split(r"[\d_]", name)[0] for name in FAMILIES}
    names = LIBRARIES["torchvision"][1]()
    assert {re.split(r"[\d_]", name)[0] for name in names} == families | {"regnet"}
    assert of_torchvision("regnet_x_400mf")((1, 32, 32), 5).eval()(torch.zeros(2, 1, 32, 32)).shape == (2, 5)


@pytest.mark.parametrize("name", TIMMS)
def test_a_model_of_timm_takes_gray_images_and_any_number_of_outputs(name: str) -> None:
    pytest.importorskip("timm")
    built(of_timm(name), 32, dropout=0.1)


@pytest.mark.parametrize(("library", "name"), [("torchvision", "efficientnet_b0"), ("timm", "test_efficientnet")])
def test_stochastic_depth_draws_from_the_runs_generator(library: str, name: str) -> None:
    pytest.importorskip(library)
    model = built(LIBRARIES[library][0](name), 32, stochastic_depth=0.5)
    found = [type(module) for module in model.modules() if type(module).__name__ in ("StochasticDepth", "DropPath")]
    assert set(found) == {StochasticDepth}


@pytest.mark.parametrize(
    ("library", "name", "shape", "chosen", "message"),
    [
        ("torchvision", "resnet18", (3, 32, 32), {"dropout": 0.1}, r"dropout = 0.1: torchvision:resnet18 has no such option"),
        ("torchvision", "vit_b_16", (3, 32, 48), {}, r"torchvision:vit_b_16 needs square images, but these have 32x48"),
        ("torchvision", "resnet18", (2, 30), {}, r"torchvision:resnet18 takes images .*, but the inputs are series .*cnn1d"),
        ("timm", "resnet18", (2, 30), {}, r"timm:resnet18 takes images .*, but the inputs are series of shape \[2, 30\]"),
        ("timm", "test_vit", (3, 32, 32), {"weights": "IMAGENET1K_V1"}, r'write them into the name, .* "timm:test_vit.TAG"'),
        ("timm", "test_mambaout", (3, 32, 32), {"weights": "x.pt"}, r"weights = 'x.pt': there is no such file"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(library: str, name: str, shape: Any, chosen: Any, message: str) -> None:
    pytest.importorskip(library)
    with pytest.raises(ValueError, match=message):
        LIBRARIES[library][0](name)(shape, 5, **chosen)


@pytest.mark.parametrize(("library", "name"), [("torchvision", "shufflenet_v2_x0_5"), ("timm", "test_resnet")])
def test_weights_of_a_file_are_loaded_but_for_the_head(library: str, name: str, tmp_path: Path) -> None:
    pytest.importorskip(library)
    build = LIBRARIES[library][0](name)
    trained = build((3, 32, 32), 7)
    torch.save(trained.state_dict(), tmp_path / "w.pt")
    model = build((1, 32, 32), 5, weights=str(tmp_path / "w.pt"), freeze="features")
    assert (taken := reuse(model)) is not None
    head = {key for key, p in model.named_parameters() if len(p) == 5}
    assert set(taken.new) == head == {key for key, p in model.named_parameters() if p.requires_grad}
    convolution = next(p for p in model.parameters() if p.ndim == 4)
    theirs = next(p for p in trained.parameters() if p.ndim == 4)
    torch.testing.assert_close(convolution, theirs.sum(1, keepdim=True))


# --- in a study file ------------------------------------------------------------------------------------------------------


def test_a_librarys_name_is_not_code_of_the_user() -> None:
    assert {f"{name}:" for name in LIBRARIES} == set(usercode.LIBRARIES)
    assert registry.KINDS["model"].libraries is LIBRARIES
    assert "timm" in extras.EXTRAS


def spec_of(model: dict[str, Any]) -> StudySpec:
    document = {"name": "s", "data": {"name": "digits"}, "model": model, "optimizer": {"name": "sgd", "lr": 0.1}}
    return StudySpec.from_document(document)


def test_a_space_of_models_of_libraries_is_resolved_with_the_options_of_each(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    names = ["torchvision:mobilenet_v2", "timm:test_vit", "mlp"]
    spec = spec_of({"name": {"choices": names}, "timm:test_vit": {"dropout": {"low": 0.0, "high": 0.3}}})
    resolved = registry.resolve(spec, tmp_path)
    assert resolved.code_references == []
    assert dict(space.parameters(resolved.tree)).keys() == {"model.name", "model.timm:test_vit.dropout"}
    assert resolved.tree["model"]["mlp"]["widths"] == [64, 32]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"name": "torchvision:resnet19"}, r"model.name: torchvision has no model 'resnet19' \(did you mean 'resnet18'\?\)"),
        ({"name": "torchvision:x"}, r"torchvision has no model 'x' \(the list_models\(\) of torchvision has all\)"),
        ({"name": "torchvision:resnet18", "stem": "small"}, r"model.stem: model torchvision:resnet18 takes no 'stem'"),
        ({"name": "torchvision:resnet18", "dropout": 1.5}, r"model.dropout = 1.5: input should be less than 1"),
    ],
)  # fmt: skip
def test_a_wrong_name_or_option_is_told(model: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=message):
        registry.resolve(spec_of(model), tmp_path)


def test_without_timm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(extras.EXTRAS, "timm", ("timm_of_another_world",))
    registry._refuse_unknown_in_library.cache_clear()
    with pytest.raises(SpecError, match=r"model.name = 'timm:resnet18': needs timm_of_another_world, .*\[timm\]"):
        registry.resolve(spec_of({"name": "timm:resnet18"}), tmp_path)
    registry._refuse_unknown_in_library.cache_clear()


def test_the_options_of_both_libraries_are_ours() -> None:
    fields = [set(options.model_of(build("x"), 2).model_fields) for build, _ in LIBRARIES.values()]
    assert fields[0] == fields[1] > {"dropout", "stochastic_depth", "weights", "freeze"}
    assert shapes.TAKES.get("timm:x", ("image",)) == ("image",)
