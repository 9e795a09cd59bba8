"""What `hpo check` measures, and the parameters that it finds unused by training at both of their ends."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from hpo.errors import SpecError
from hpo.models import mlp
from hpo.spec.space import Range
from hpo.study import resolve
from hpo.train.build import check

OWN_MODEL = """
from torch import nn

class Fixed(nn.Sequential):
    def forward(self, images):
        return super().forward(images.flatten(1)), images

def coloured(shape, classes):
    return nn.Conv2d(3, classes, 8)

def narrow(shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 5))

def paired(shape, classes):
    return Fixed(nn.Linear(64, classes))

def net(shape, classes, *, width: int = 4, ignored: float = 0.0):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, classes))
"""


def examine(folder: Path, text: str) -> check.Findings:
    (folder / "mine.py").write_text(OWN_MODEL)
    (folder / "s.toml").write_text('[data]\nname = "digits"\n' + text)
    found = resolve.read(folder / "s.toml")
    return check.examine(found.spec, found.code_folder, workers=2)


@pytest.mark.timeout(120)
def test_one_epoch_is_measured_and_the_budget_reckoned_from_it(tmp_path: Path) -> None:
    found = examine(
        tmp_path,
        '[model]\nname = "mlp"\nwidths = [8]\n[optimizer]\nname = "sgd"\nlr = { low = 1e-3, high = 0.1, log = true }\n'
        "[training]\nepochs = { low = 2, high = 7 }\nbatch_size = 128\n",
    )
    assert found.parameters == {
        "optimizer.lr": Range(low=1e-3, high=0.1, log=True),
        "training.epochs": Range(low=2, high=7),
    }
    assert found.epoch.epoch == 1
    assert found.longest_trial_epochs == 7
    assert found.budget_seconds(10, 2) == 10 * 7 * found.epoch.seconds / 2
    assert "Linear" in found.model
    assert found.unused == []


def test_an_option_that_the_users_own_model_ignores_is_told_and_no_other(tmp_path: Path) -> None:
    found = examine(
        tmp_path,
        '[model]\nname = "mine.py:net"\nwidth = { low = 2, high = 4 }\nignored = { low = 0.0, high = 1.0 }\n'
        '[optimizer]\nname = { choices = ["sgd", "adam"] }\nlr = 0.1\nweight_decay = { choices = [0.0, 0.1] }\n'
        "[optimizer.sgd]\nmomentum = { low = 0.0, high = 0.9 }\nnesterov = { choices = [true, false] }\n"
        '[schedule]\nname = { choices = ["constant", "step"] }\n[schedule.step]\ndrops = { low = 1, high = 3 }\n'
        "[training]\nbatch_size = 256\nepochs = 6\n",
    )
    assert found.unused == [
        "model.ignored = { low = 0.0, high = 1.0 }: has no effect on a training; nothing uses it, remove it"
    ]


def test_options_of_schedules_warm_ups_and_decay_are_known_to_be_used(tmp_path: Path) -> None:
    found = examine(
        tmp_path,
        '[model]\nname = "mlp"\nwidths = [4]\n'
        '[optimizer]\nname = "muon"\nlr = 0.01\ndecay = { choices = ["weights", "all"] }\n'
        "[sam]\nrho = { low = 0.01, high = 0.1 }\n"
        '[warmup]\nname = "linear"\nshare = { low = 0.01, high = 0.02 }\nstart_factor = { low = 0.1, high = 0.2 }\n'
        '[schedule]\nname = { choices = ["plateau", "warm_restarts"] }\n'
        "[schedule.plateau]\npatience = { low = 1, high = 9 }\n[schedule.warm_restarts]\ncycles = { low = 1, high = 3 }\n"
        "[training]\nbatch_size = 256\nepochs = 6\n",
    )
    assert found.unused == []
    assert found.choice.executor == "loop"


OWN_FAULTS = {
    "coloured": "fails on images of [1, 8, 8] ([channels, height, width]): RuntimeError: Given groups=1, weight of size "
    "[10, 3, 8, 8], expected input[2, 1, 8, 8] to have 3 channels, but got 1 channels instead",
    "narrow": "returns a tensor [2, 5] for 2 images, on which the loss fails: IndexError: Target 9 is out of bounds; "
    "return a tensor [2, 10], one number for each image and class",
    "paired": "returns a tuple for 2 images, on which the loss fails: AttributeError: 'tuple' object has no attribute "
    "'dtype'; return a tensor [2, 10], one number for each image and class",
}


@pytest.mark.parametrize("name", OWN_FAULTS)
def test_an_own_model_that_does_not_fit_the_data_is_told_without_a_traceback(name: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError) as caught:
        examine(
            tmp_path, f'[model]\nname = "mine.py:{name}"\n[optimizer]\nname = "sgd"\nlr = {{ low = 0.1, high = 1.0 }}\n'
        )
    assert str(caught.value) == f"model mine.py:{name}: {OWN_FAULTS[name]}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '[optimizer]\nname = "adagrad"\nlr = 0.1\n[schedule]\nname = "onecycle"\ncycle_momentum = true\n',
            "schedule.cycle_momentum = true: optimizer adagrad has no momentum",
        ),
        ('[optimizer]\nname = "adagrad"\nlr = 0.1\ndecoupled = true\n', "optimizer adagrad takes no 'decoupled'"),
        (
            '[optimizer]\nname = { choices = ["sgd", "muon"] }\nlr = 0.1\n[warmup]\nname = "linear"\nepochs = 20\n',
            "warmup.epochs = 20: may be as long as the whole schedule, training.epochs = 20",
        ),
        ('[optimizer]\nname = "sgd"\nlr = 0.1\n[sam]\nrho = -1\n', "sam.rho = -1: input should be greater than"),
        ('[optimizer]\nname = "sgd"\nlr = 0.1\n[sam]\nrhu = 1\n', "sam takes no 'rhu' (did you mean 'rho'?)"),
    ],
)
def test_what_does_not_go_together_is_a_fault_of_the_file(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError) as caught:
        examine(tmp_path, '[model]\nname = "mlp"\n' + text)
    assert message in str(caught.value)


def test_an_optimizer_whose_package_is_missing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(
        SpecError, match=r"needs pytorch_optimizer, which is not installed: pip install .*\[soap\]'?; or"
    ):
        examine(
            tmp_path, '[model]\nname = "mlp"\n[optimizer]\nname = { choices = ["soap", "sgd", "adam"] }\nlr = 0.1\n'
        )


def test_an_option_that_has_a_use_with_one_choice_alone_is_not_told(tmp_path: Path) -> None:
    found = examine(
        tmp_path,
        '[model]\nname = "mlp"\nwidths = [8]\nactivation = { choices = ["swish", "elu", "relu"] }\n'
        "alpha = { low = 0.5, high = 2.0 }\nupper = { low = 0.4, high = 0.8 }\n"
        '[optimizer]\nname = "sgd"\nlr = 0.1\n[training]\nbatch_size = 256\n',
    )
    assert [line.split(" = ")[0] for line in found.unused] == ["model.upper"]


def test_a_model_that_cannot_be_built_is_a_fault_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"^model cnn: channels = .* give at most 3 entries"):
        examine(tmp_path, '[model]\nname = "cnn"\nchannels = [4, 4, 4, 4]\n[optimizer]\nname = "sgd"\nlr = 0.1\n')


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (
            'name = { choices = ["mlp", "vit_b_16"] }',
            "model vit_b_16: vit_b_16 needs images of at least 16x16",
        ),
        ('name = "vgg11"', "model vgg11: vgg11 needs images of at least 32x32 pixels here, but these have 8x8"),
        (
            'name = "mlp"\nnorm = "group"\ngroups = { low = 2, high = 3 }',
            "model mlp: groups = 3 does not divide 64",
        ),
        ('name = "mlp"\nweights = "no.pt"', "model mlp: weights = 'no.pt': there is no such file"),
    ],
)
def test_what_cannot_be_built_at_some_end_of_the_space_is_told(tmp_path: Path, model: str, said: str) -> None:
    with pytest.raises(SpecError) as caught:
        examine(tmp_path, f'[model]\n{model}\n[optimizer]\nname = "sgd"\nlr = 0.1\n')
    assert str(caught.value).startswith(said)


def test_weights_beside_the_study_file_are_taken_over_and_reported(tmp_path: Path) -> None:
    torch.save(mlp((1, 8, 8), 7, widths=[8]).state_dict(), tmp_path / "before.pt")
    found = examine(
        tmp_path,
        '[model]\nname = "mlp"\nwidths = [8]\nweights = "before.pt"\n[optimizer]\nname = "sgd"\nlr = 0.1\n'
        "[training]\nbatch_size = 256\n",
    )
    assert found.weights == f"{tmp_path}/before.pt: 6 tensors loaded; new: 4.weight, 4.bias".replace("4.", "5.")
