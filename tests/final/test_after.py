"""After training: what is folded, pruned, quantised, sampled and exported, held against formulas and the eager model."""

from __future__ import annotations

import copy
import csv
import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpo import data
from hpo.errors import SpecError, StudyError
from hpo.final import train as final
from hpo.final.after import files, mcdropout, report, steps, trained
from hpo.final.after.deployed import Deployed
from hpo.final.after.fold import fold
from hpo.final.after.prune import channels, prune
from hpo.final.after.raw import first
from hpo.final.after.scores import outputs
from hpo.final.after.trained import Trained
from hpo.models import Dropout
from hpo.spec import extras
from tests.cli.test_commands import Hpo, hpo

__all__ = ["hpo"]  # a fixture

CONFIG = """
name = "digits"
[data]
name = "digits"
[model]
name = "cnn"
dropout = 0.3
[training]
epochs = 4
[optimizer]
name = "adamw"
lr = 0.005
"""
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `hpo train` leaves of a convolutional network with batch norm and dropout."""
    place = tmp_path_factory.mktemp("after")
    (place / "best.toml").write_text(CONFIG)
    training = final.prepare(place / "best.toml")
    final.train(training, place / "run", stop=lambda: False, progress=lambda result: None, before_test=lambda: None)
    return place / "run"


@pytest.fixture(scope="module")
def run(folder: Path) -> Trained:
    return trained.load(folder)


@pytest.fixture
def images(run: Trained) -> Tensor:
    """Normalised training images."""
    found = run.calibration()
    assert isinstance(found, Tensor)
    return found


def test_the_model_is_taken_up_as_it_was_left(run: Trained) -> None:
    part = run.training.splits.validation
    found = outputs(run.deployed(run.model), part.inputs, run.batch)
    epoch = run.metrics["history"][run.metrics["epoch"] - 1]
    assert (found.argmax(1) == part.targets).double().mean().item() == epoch["validation_accuracy"]
    assert nn.functional.cross_entropy(found, part.targets).item() == pytest.approx(epoch["validation_loss"], rel=1e-6)
    assert epoch["validation_accuracy"] > 0.9


def test_images_in_store_are_scored_like_resident_ones(run: Trained) -> None:
    raw = run.training.splits.validation.inputs
    stored = data.Stored(store=raw.cpu().flip(0), rows=torch.arange(len(raw)).flip(0), device=raw.device)
    model = run.deployed(run.copy())
    assert torch.equal(outputs(model, stored, 100), outputs(model, raw, 100))
    assert torch.equal(first(stored, 7), raw[:7])
    sampled = [mcdropout.sample(model, images, passes=3, seed=0, batch=100) for images in (stored, raw)]
    assert torch.equal(sampled[0].mean, sampled[1].mean)


# --- folding ------------------------------------------------------------------------------------------------------------


class Shared(nn.Module):
    """One convolution before two norms: its weights cannot take both in. The last one is alone, and is folded."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.one, self.two = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.last, self.three = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(self.conv(self.one(self.conv(x))))
        return self.three(self.last(x)).flatten(1)


class Residual(nn.Module):
    """A layer whose output goes elsewhere too stays; the other one is folded."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.last, self.head = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.head(self.last(x + self.norm(x))).flatten(1)


FOLDED: dict[str, tuple[Callable[[], nn.Module], int]] = {  # model, batch norms that stay
    "conv": (lambda: nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten()), 0),
    "biased": (lambda: nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.BatchNorm2d(6), nn.Flatten()), 0),
    "plain norm": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(75, 4), nn.BatchNorm1d(4, affine=False)), 0),
    "linear": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(75, 4, bias=False), nn.BatchNorm1d(4), nn.GELU()), 0),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(3, 5, 3), nn.BatchNorm2d(5), nn.Flatten()), 0),
    "norm first": (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten()), 1),
    "shared": (Shared, 2),
    "residual": (Residual, 1),
}


@pytest.mark.parametrize("name", FOLDED)
def test_folding_is_exact_but_for_rounding(name: str) -> None:
    build, staying = FOLDED[name]
    torch.manual_seed(0)
    model = build().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.affine:
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    x = torch.randn(16, 3, 5, 5, dtype=torch.float64)
    model(3 * x + 1)  # running statistics of their own
    model.eval()
    folded = fold(model, x)
    assert sum(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) for m in folded.modules()) == staying
    assert torch.allclose(folded(x), model(x), rtol=1e-12, atol=1e-12)


def test_without_a_norm_to_fold_the_user_is_told(images: Tensor) -> None:
    with pytest.raises(StudyError, match="no batch norm directly follows"):
        fold(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), images.cpu())


# --- pruning ------------------------------------------------------------------------------------------------------------


def weights(model: nn.Module) -> list[Tensor]:
    return [m.weight.detach() for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_the_smallest_weights_of_all_layers_are_pruned(run: Trained, images: Tensor, share: float) -> None:
    before = torch.cat([w.flatten() for w in weights(run.model)])
    pruned = prune(run.copy(), images, share=share)
    after = torch.cat([w.flatten() for w in weights(pruned)])
    count = round(share * len(before))
    kept = before.abs() > before.abs().kthvalue(count).values
    assert torch.equal(after, torch.where(kept, before, torch.zeros_like(before)))
    assert int((after == 0).sum()) == count
    assert set(pruned.state_dict()) == set(run.model.state_dict())


@pytest.mark.parametrize("share", [0.25, 0.99])
def test_channels_of_the_smallest_norm_are_pruned(run: Trained, images: Tensor, share: float) -> None:
    """Channels of the smallest norm are pruned but none of the last layer."""
    folded = fold(run.model, images)
    pruned = channels(fold(run.model, images), images, share=share)
    *hidden, last = zip(weights(folded), weights(pruned), strict=True)
    assert torch.equal(*last)
    for before, after in hidden:
        norms = before.flatten(1).norm(dim=1)
        count = min(round(share * len(norms)), len(norms) - 1)
        dead = torch.zeros(len(norms), dtype=torch.bool, device=norms.device)
        dead[norms.argsort()[:count]] = True
        assert torch.equal(after, before * ~dead.view(-1, 1, 1, 1))
    first = next(m for m in pruned.modules() if isinstance(m, nn.Conv2d))
    out = first(images).amax((0, 2, 3)).abs() + first(images).amin((0, 2, 3)).abs()
    assert int((out == 0).sum()) == min(round(share * 16), 15)  # the bias is gone as well


# --- fewer bits ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(run: Trained, tmp_path_factory: pytest.TempPathFactory) -> report.VariantReport:
    """Every step by itself and a recipe of two."""
    pytest.importorskip("torchao")
    return report.make(
        run, [steps.read(text) for text in RECIPES], tmp_path_factory.mktemp("out"), passes=5, formats=[]
    )


RECIPES = ["fold", "prune=0.3", "channels=0.1", "bf16", "fp16", "int8", "int8_weights", "int8_static", "fold+fp16"]


def test_every_step_leaves_a_model_that_is_scored_beside_the_trained_one(measured: report.VariantReport) -> None:
    assert [variant.name for variant in measured.variants] == ["trained", *RECIPES]
    first, *others = (variant.score for variant in measured.variants)
    assert first.agreement == 1.0
    for variant, score in zip(measured.variants[1:], others, strict=True):
        near = 0.15 if variant.name.startswith("channels") else 0.02
        assert abs(score.accuracy - first.accuracy) <= near, variant.name
        assert score.agreement >= 1 - near
    sizes = {variant.name: variant.score.bytes for variant in measured.variants}
    for name, most in {
        "bf16": 0.51,
        "fp16": 0.51,
        "fold": 1.0,
        "int8": 0.9,
        "int8_weights": 0.9,
        "int8_static": 0.35,
    }.items():
        assert sizes[name] < most * sizes["trained"], name
    zeros = {variant.name: variant.score.zeros for variant in measured.variants}
    assert zeros["prune=0.3"] == pytest.approx(0.3, abs=0.02)
    assert {step.name for recipe in map(steps.read, RECIPES) for step in recipe.steps} == set(steps.STEPS)


@pytest.mark.parametrize("name", ["int8", "int8_weights"])
def test_int8_weights_lie_within_half_a_step_of_the_trained_ones(run: Trained, images: Tensor, name: str) -> None:
    pytest.importorskip("torchao")
    quantised = steps.read(name).apply(run.copy(), images)
    (linear,) = (m for m in run.model.modules() if isinstance(m, nn.Linear))
    (found,) = (m for m in quantised.modules() if isinstance(m, nn.Linear))
    step = linear.weight.abs().amax(1, keepdim=True) / 127
    assert ((found.weight.dequantize() - linear.weight).abs() <= 0.51 * step).all()  # torchao rounds the scale as well
    assert not torch.equal(found.weight.dequantize(), linear.weight)


# --- files --------------------------------------------------------------------------------------------------------------

LACKING = {"bf16.onnx": "bfloat16", "int8.onnx": "_int_mm"}  # file -> what its refusal names


def load(path: Path) -> Callable[[Tensor], Tensor]:
    if path.suffix == ".pt2":
        return torch.export.load(path).module()
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    assert (given.name, given.type, given.shape[1:]) == ("images", "tensor(uint8)", [1, 8, 8])
    return lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0])


SHORT = ["fold.pt2", "fold.onnx", "bf16.pt2", "fp16.onnx", "int8.pt2", "int8_static.onnx"]
ALL = [f"{recipe}.{kind}" for recipe in ["trained", *RECIPES] for kind in files.FORMATS]


@torch.no_grad()
@pytest.mark.parametrize(
    "name", [name if name in SHORT else pytest.param(name, marks=pytest.mark.soak) for name in ALL]
)
def test_a_file_gives_the_model_s_logits(run: Trained, images: Tensor, tmp_path: Path, name: str) -> None:
    """A file takes raw images in any number and gives the model's logits."""
    for package in ("torchao", "onnxruntime"):
        pytest.importorskip(package)
    recipe = name.rpartition(".")[0]
    exact = recipe in ("trained", "fold", "prune=0.3", "channels=0.1")
    raw = run.training.splits.validation.inputs.cpu()
    model = run.deployed(run.copy() if recipe == "trained" else steps.read(recipe).apply(run.copy(), images))
    if name in LACKING:
        with pytest.raises(StudyError, match=f"{name}: onnx cannot hold this model.*{LACKING[name]}"):
            files.export(trained.on_cpu(model), raw, tmp_path / name, {}, is_coarse=not exact)
        assert list(tmp_path.iterdir()) == []
        return
    if name == "int8_static.onnx" and "vnni" not in Path("/proc/cpuinfo").read_text():
        # onnxruntime's 8-bit products saturate at 16 bits where the CPU has no instruction for them: the file is refused.
        with pytest.raises(StudyError, match=r"its logits differ .* was removed"):
            files.export(trained.on_cpu(model), raw, tmp_path / name, {}, is_coarse=not exact)
        assert list(tmp_path.iterdir()) == []
        return
    told = files.export(trained.on_cpu(model), raw, tmp_path / name, {}, is_coarse=not exact)
    expected = model(raw.to(DEVICE)).cpu()
    exported = load(tmp_path / told.file)
    for count in (1, 7, len(raw)):
        assert torch.allclose(exported(raw[:count]), expected[:count], rtol=0, atol=1e-4 if exact else 0.1)
        assert torch.equal(exported(raw[:count]).argmax(1), expected[:count].argmax(1)) or not exact


def test_a_file_carries_its_receipt(run: Trained, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    made = report.make(run, [], tmp_path, passes=None, formats=["pt2", "onnx"])
    assert (made.refused, [file.file for file in made.variants[0].files]) == ([], ["trained.pt2", "trained.onnx"])
    extra = {files.RECEIPT: ""}
    torch.export.load(tmp_path / "trained.pt2", extra_files=extra)
    (prop,) = (p for p in onnx.load(tmp_path / "trained.onnx").metadata_props if p.key == files.RECEIPT)
    for text in (extra[files.RECEIPT], prop.value):
        receipt = json.loads(text)
        assert receipt["recipe"] == "trained"
        assert receipt["identity"] == run.metrics["identity"]
        assert receipt["weights_sha256"] == trained.load(run.folder).weights_sha256
    assert not list(tmp_path.glob(".*"))


@torch.no_grad()
def test_attention_is_pruned_with_the_rest(images: Tensor) -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    named = [name for name, value in model.named_parameters() if value.ndim == 2]
    assert len(named) == 4  # in and out of the attention, two linear layers
    pruned = prune(copy.deepcopy(model), images, share=0.5)
    assert sum(int((pruned.get_parameter(name) == 0).sum()) for name in named) == 256
    assert pruned(torch.ones(2, 3, 8)).shape == (2, 3, 8)


class Bessel(nn.Module):
    """A model with a function that ONNX has not."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.i1(x).flatten(1)


def test_an_operation_that_onnx_lacks_is_named_and_leaves_no_file(run: Trained, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model = Deployed(Bessel(), run.training.splits).eval()
    raw = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    with pytest.raises(StudyError, match=r"model.onnx: onnx cannot hold this model: .*i1"):
        files.export(model, raw, tmp_path / "model.onnx", {}, is_coarse=False)
    assert list(tmp_path.iterdir()) == []


# --- Monte Carlo dropout ------------------------------------------------------------------------------------------------


def test_doubt_is_what_the_formulas_say_of_the_passes(run: Trained) -> None:
    raw = run.training.splits.validation.inputs[:50]
    model, passes = run.deployed(run.copy()), 12
    doubt = mcdropout.sample(model, raw, passes=passes, seed=5, batch=50)
    seen: list[Tensor] = []
    handle = model.register_forward_hook(lambda _m, _x, out: seen.append(out.double().softmax(1)))
    again = mcdropout.sample(model, raw, passes=passes, seed=5, batch=50)
    handle.remove()
    p = torch.stack(seen)  # [passes, N, classes]
    assert len(p) == passes
    assert torch.equal(doubt.mean, again.mean)
    mean = p.mean(0)
    entropy = -(mean * mean.log()).sum(1)
    close: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-12}
    assert torch.allclose(doubt.mean, mean, **close)
    assert torch.allclose(doubt.spread, p.std(0), **close)
    assert torch.allclose(doubt.entropy, entropy, **close)
    assert torch.allclose(doubt.mutual_information, entropy + (p * p.log()).sum(2).mean(0), **close)
    assert (doubt.spread.amax(1) > 0).all()
    assert (doubt.entropy <= math.log(10)).all()
    assert not torch.equal(mcdropout.sample(model, raw, passes=passes, seed=6, batch=50).mean, doubt.mean)


@pytest.mark.parametrize("kind", [Dropout, nn.Dropout])
def test_the_spread_of_one_dropped_unit_is_the_bernoulli_s(kind: type[nn.Module]) -> None:
    model = nn.Sequential(nn.Flatten(), kind(0.25), nn.Linear(1, 2, bias=False)).eval()
    with torch.no_grad():
        model[2].weight.copy_(torch.tensor([[3.0], [0.0]]))
    doubt = mcdropout.sample(model, torch.ones(400, 1, 1, 1), passes=200, seed=0, batch=400)
    kept, dropped = 1 / (1 + math.exp(-3.0 / 0.75)), 0.5
    assert doubt.mean[:, 0].mean().item() == pytest.approx(0.75 * kept + 0.25 * dropped, abs=0.003)
    assert doubt.spread[:, 0].mean().item() == pytest.approx(math.sqrt(0.75 * 0.25) * (kept - dropped), abs=0.003)


def test_sampling_leaves_the_model_and_torch_s_generator_as_they_were(run: Trained) -> None:
    model = run.deployed(nn.Sequential(run.copy(), nn.Dropout(0.5))).eval()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    mcdropout.sample(model, run.training.splits.validation.inputs[:9], passes=3, seed=1, batch=4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in model.modules())


# --- the command --------------------------------------------------------------------------------------------------------


def test_the_command_tells_and_keeps_what_it_found(
    folder: Path, hpo: Hpo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "load_test", None)  # the test part stays shut
    code, out, err = hpo("after", str(folder), "fold", "prune=0.5", "--mc-dropout", "4", "--export", "pt2", "-o", "out")
    assert (code, err) == (0, "")
    assert out.split("variant")[0].strip() == f"{folder}, on 270 validation rows"
    assert [name for name in ("trained", "fold", "prune=0.5", "Monte Carlo dropout, 4 passes") if name not in out] == []
    kept = json.loads((tmp_path / "out" / report.REPORT).read_text())
    names = ["after.json", "fold.pt2", "mc_dropout.csv", "prune=0.5.pt2", "trained.pt2"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    rows = list(csv.DictReader((tmp_path / "out" / report.DOUBT).read_text().splitlines()))
    assert len(rows) == kept["validation_images"] == 270
    right = sum(row["label"] == row["predicted"] for row in rows) / 270
    assert right == pytest.approx(kept["mc_dropout"]["accuracy"])
    assert sum(float(rows[0][f"mean_{one}"]) for one in range(10)) == pytest.approx(1, abs=1e-4)
    code, out, _ = hpo("after", str(folder), "fold", "--json", "-o", "more")
    again = json.loads(out)
    assert code == 0
    assert [v["score"] for v in again["variants"]] == [v["score"] for v in kept["variants"][:2]]
    assert again == json.loads((tmp_path / "more" / report.REPORT).read_text())


def test_a_file_that_a_format_cannot_hold_is_an_error_beside_the_rest(folder: Path, hpo: Hpo, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    code, out, err = hpo("after", str(folder), "bf16", "--export", "onnx", "-o", "out")
    assert code == 1
    assert err.startswith("error: bf16.onnx: onnx cannot hold this model")
    assert "trained.onnx: " in out
    assert not (tmp_path / "out" / "bf16.onnx").exists()


def test_what_does_not_go_with_the_model_is_an_error_beside_the_rest(folder: Path, hpo: Hpo, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "dry")
    (tmp_path / "dry" / "config.toml").write_text(CONFIG.replace("dropout = 0.3", "dropout = 0.0"))
    metrics = json.loads((tmp_path / "dry" / "metrics.json").read_text())
    identity = final.prepare(tmp_path / "dry" / "config.toml", seed=metrics["receipt"]["seed"]).identity
    (tmp_path / "dry" / "metrics.json").write_text(json.dumps(metrics | {"identity": identity}))
    code, out, err = hpo("after", "dry", "fold+fold", "prune=.5", "--mc-dropout", "5")
    assert code == 1
    no_norm, no_dropout = err.splitlines()
    assert no_norm.startswith("error: fold+fold: fold: no batch norm directly follows")
    assert "the model has no dropout module with p above 0" in no_dropout
    kept = json.loads((tmp_path / "dry" / "after" / report.REPORT).read_text())
    assert [variant["name"] for variant in kept["variants"]] == ["trained", "prune=.5"]
    assert kept["variants"][1]["score"]["zeros"] == pytest.approx(0.5, abs=0.02)
    assert [f"error: {why}" for why in kept["unfit"]] == err.splitlines()
    assert "prune=.5" in out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["none"], "none: no such folder; `hpo train best.toml -o none` makes one"),
        (["empty"], "empty: holds no training of `hpo train`, since it has no metrics.json"),
        (["own"], "own: has no weights.pt; an objective of your own saves none"),
        (["halted"], "halted: its training is not finished; `hpo train halted/config.toml -o halted` continues it"),
        (["edited"], "edited/config.toml: is not the config that edited/metrics.json was made from"),
        (["other"], "other/weights.pt: does not fit the model that its config builds now"),
        (["run", "squash"], "squash: there is no step 'squash' (known: "),
        (["run", "fold+prune"], "fold+prune: prune needs its share; write prune=0.5"),
        (["run", "prune=1.5"], "prune = 1.5: input should be less than 1"),
        (["run", "channels=half"], "channels = 'half': input should be a valid number"),
        (["run", "bf16=2"], "bf16=2: bf16 takes no value; write bf16"),
        (["run", "--export", "onx"], "--export onx: there is no such format (did you mean 'onnx'?)"),
    ],
)
def test_wrong_input_is_told(folder: Path, hpo: Hpo, tmp_path: Path, arguments: list[str], told: str) -> None:
    for name in ("run", "halted", "edited", "other"):
        shutil.copytree(folder, tmp_path / name)
    (tmp_path / "empty").mkdir()
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "metrics.json").write_text('{"value": 1.0}')
    (tmp_path / "halted" / "checkpoint.pt").touch()
    (tmp_path / "edited" / "config.toml").write_text(CONFIG.replace("0.005", "0.5"))
    torch.save({"0.weight": torch.zeros(1)}, tmp_path / "other" / "weights.pt")
    code, _, err = hpo("after", *arguments)
    assert code == 2
    assert told in err


def test_a_missing_extra_is_named_beside_the_rest(
    folder: Path, hpo: Hpo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("torchao", "onnxscript"):
        monkeypatch.setitem(sys.modules, package, None)
    code, _, err = hpo("after", str(folder), "int8", "prune=.5", "fold+int8_static", "--export", "onnx", "-o", "out")
    assert (code, err.splitlines()) == (
        1,
        [
            f"error: int8: needs torchao, which is not installed: {extras.install('int8')}",
            f"error: fold+int8_static: int8_static: needs torchao, which is not installed: {extras.install('int8')}",
            f"error: --export onnx: needs onnxscript, which is not installed: {extras.install('onnx')}",
        ],
    )
    made = json.loads((tmp_path / "out" / report.REPORT).read_text())
    assert [(variant["name"], variant["files"]) for variant in made["variants"]] == [("trained", []), ("prune=.5", [])]
    assert os.listdir(tmp_path / "out") == [report.REPORT]


def test_a_recipe_s_fault_names_the_recipe() -> None:
    with pytest.raises(SpecError, match=r"fold\+: there is no step ''"):
        steps.read("fold+")
