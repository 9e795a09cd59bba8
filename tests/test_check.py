"""What `hpo check` measures, and the parameters that it finds unused by training at both of their ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpo import check, studyfile
from hpo.errors import SpecError
from hpo.space import Range

OWN_MODEL = """
from torch import nn

def net(shape, classes, *, width: int = 4, ignored: float = 0.0):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, classes))
"""


def examine(folder: Path, text: str) -> check.Findings:
    (folder / "mine.py").write_text(OWN_MODEL)
    (folder / "s.toml").write_text('[data]\nname = "digits"\n' + text)
    found = studyfile.read(folder / "s.toml")
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
    assert found.warnings == []


def test_an_option_that_the_users_own_model_ignores_is_told_and_no_other(tmp_path: Path) -> None:
    found = examine(
        tmp_path,
        '[model]\nname = "mine.py:net"\nwidth = { low = 2, high = 4 }\nignored = { low = 0.0, high = 1.0 }\n'
        '[optimizer]\nname = { choices = ["sgd", "adam"] }\nlr = 0.1\nweight_decay = { choices = [0.0, 0.1] }\n'
        "[optimizer.sgd]\nmomentum = { low = 0.0, high = 0.9 }\nnesterov = { choices = [true, false] }\n"
        '[schedule]\nname = { choices = ["constant", "step"] }\n[schedule.step]\ndrops = { low = 1, high = 3 }\n'
        "[training]\nbatch_size = 256\nepochs = 6\n",
    )
    assert found.warnings == [
        "model.ignored = { low = 0.0, high = 1.0 }: makes no difference to a training; nothing uses it, remove it"
    ]


def test_a_model_that_cannot_be_built_is_a_fault_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"^model cnn: ValueError: channels = .* give at most 3 entries"):
        examine(tmp_path, '[model]\nname = "cnn"\nchannels = [4, 4, 4, 4]\n[optimizer]\nname = "sgd"\nlr = 0.1\n')
