"""Parts by name: ours or the user's own, their defaults filled, each value checked by the part that takes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hpo.errors import SpecError
from hpo.models import MODELS
from hpo.spec.study_file import StudySpec
from hpo.spec.training import Part
from hpo.train.build import registry

DOCUMENT: dict[str, Any] = {
    "name": "s",
    "data": {"name": "digits"},
    "model": {"name": "mlp"},
    "optimizer": {"name": "sgd", "lr": 0.1},
}


def resolved(folder: Path, **changes: Any) -> StudySpec:
    return registry.resolve(StudySpec.from_document(DOCUMENT | changes), folder)


def fault(folder: Path, **changes: Any) -> list[str]:
    with pytest.raises(SpecError) as caught:
        resolved(folder, **changes)
    return str(caught.value).splitlines()


def test_a_name_is_ours_or_the_users_own(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def net(shape, classes): pass\n")
    assert registry.function("model", "mlp", tmp_path) is MODELS["mlp"]
    assert registry.function("model", "mine.py:net", tmp_path).__name__ == "net"


def test_the_defaults_of_each_choice_stand_in_its_own_branch(tmp_path: Path) -> None:
    choice = {"choices": ["sgd", "adam"]}
    optimizer = {"name": choice, "lr": 0.1, "weight_decay": {"low": 0.0, "high": 0.1}, "sgd": {"momentum": 0.5}}
    assert resolved(tmp_path, optimizer=optimizer).optimizer == {
        "name": choice,
        "lr": 0.1,
        "weight_decay": {"low": 0.0, "high": 0.1},
        "decay": "weights",
        "sgd": {"momentum": 0.5, "nesterov": False, "decoupled": False},
        "adam": {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "decoupled": False},
    }


def test_a_single_choice_is_filled_as_well(tmp_path: Path) -> None:
    """A single choice and a plain name with a branch are filled as well."""
    one = resolved(tmp_path, optimizer={"name": {"choices": ["sgd"]}, "lr": 0.1}).optimizer
    filled = {"weight_decay": 0.0, "momentum": 0.0, "nesterov": False, "decoupled": False}
    assert one["sgd"] == filled
    plain = resolved(tmp_path, optimizer={"name": "sgd", "sgd": {"lr": 0.1}}).optimizer
    assert plain == {"name": "sgd", "sgd": {"lr": 0.1}, "decay": "weights"} | filled


def test_resolving_twice_changes_nothing_and_every_variant_still_fits(tmp_path: Path) -> None:
    changes = {
        "optimizer": {"name": {"choices": ["sgd", "adam", "adagrad"]}, "lr": {"low": 0.1, "high": 1.0}},
        "schedule": {"name": {"choices": ["constant", "onecycle", "step"]}},
        "model": {"name": {"choices": ["mlp", "cnn"]}},
    }
    once = resolved(tmp_path, **changes)
    assert registry.resolve(once, tmp_path) == once


def test_an_option_of_every_optimizer_stands_once(tmp_path: Path) -> None:
    """An option of every optimizer stands once unless one choice says otherwise."""
    choice = {"choices": ["sgd", "muon"]}
    found = resolved(tmp_path, optimizer={"name": choice, "lr": 0.1, "sgd": {"decay": "all"}})
    assert "decay" not in found.optimizer
    assert [found.optimizer[name]["decay"] for name in choice["choices"]] == ["all", "weights"]
    assert registry.resolve(found, tmp_path) == found
    assert fault(tmp_path, optimizer={"name": "sgd", "lr": 0.1, "decay": "biases"}) == [
        "optimizer.decay = 'biases': input should be 'weights' or 'all'"
    ]


def test_an_own_optimizer_is_given_groups(tmp_path: Path) -> None:
    """The user's own optimizer is given groups and keeps an option of its own."""
    (tmp_path / "mine.py").write_text(
        "import torch\ndef plain(groups, *, lr: float): return torch.optim.SGD(groups, lr=lr, weight_decay=0.5)\n"
        "def own(groups, *, decay: float = 0.25): return torch.optim.SGD(groups, lr=1.0, weight_decay=decay)\n"
    )
    layer = nn.Linear(2, 2)

    def decays(**options: Any) -> list[float]:
        name = options.pop("name")
        built = registry.call("optimizer", Part(name=name, options=options, paths={}), tmp_path, layer)
        return [group["weight_decay"] for group in built.param_groups]

    assert decays(name="mine.py:plain", lr=0.1) == [0.5, 0.0]
    assert decays(name="mine.py:plain", lr=0.1, decay="all") == [0.5]
    assert decays(name="mine.py:own", decay=0.75) == [0.75, 0.0]
    optimizer = {"name": "mine.py:own"}
    assert resolved(tmp_path, optimizer=optimizer).optimizer == {"name": "mine.py:own", "decay": 0.25}


def test_a_momentum_that_the_schedule_owns_is_not_filled_in(tmp_path: Path) -> None:
    cycling = {"name": "onecycle", "cycle_momentum": True}
    for name, key in (("sgd", "momentum"), ("adam", "beta1")):
        found = resolved(tmp_path, schedule=cycling, optimizer={"name": name, "lr": 0.1})
        assert key not in found.optimizer
        assert registry.resolve(found, tmp_path) == found


def test_the_users_own_part_has_its_options_checked_as_ours_are(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from typing import Annotated\nfrom annotated_types import Ge\n"
        "def net(shape, classes, *, width: Annotated[int, Ge(1)], deep: bool = True): pass\n"
    )
    own = {"name": "mine.py:net", "width": {"low": 1, "high": 4}}
    assert resolved(tmp_path, model=own).model == own | {"deep": True}
    assert fault(tmp_path, model={"name": "mine.py:net"}) == ["model.width: model mine.py:net needs 'width'; add it"]
    assert fault(tmp_path, model={"name": "mine.py:net", "width": {"choices": [0, 2]}}) == [
        "model.width = 0: input should be greater than or equal to 1"
    ]
    assert fault(tmp_path, model=own | {"shape": 3}) == [
        "model.shape: model mine.py:net takes no 'shape'; "
        "hpo calls it with the shape of one input and the number of outputs before its options"
    ]


def test_a_shared_option_must_fit_every_choice(tmp_path: Path) -> None:
    optimizer = {"name": {"choices": ["sgd", "adam", "adagrad"]}, "lr": 0.1, "momentum": 0.9}
    assert fault(tmp_path, optimizer=optimizer) == [
        "optimizer.momentum: optimizer adam takes no 'momentum' (known: beta1, beta2, decay, decoupled, eps, "
        "lr, weight_decay)",
        "optimizer.momentum: optimizer adagrad takes no 'momentum' (known: decay, eps, lr, weight_decay)",
    ]


@pytest.mark.parametrize(
    ("section", "source", "message"),
    [
        ("model", "def f(s, c): raise ValueError('too deep')", "model mine.py:f: ValueError: too deep"),
        (
            "model",
            "def f(classes, width=3): return len(width)",
            "model mine.py:f: TypeError: object of type 'NoneType' has no len(); "
            "hpo calls it with the shape of one input and the number of outputs before its options",
        ),
        ("model", "def f(s, c): return 3", "model mine.py:f: returned a int, not a Module"),
        ("data", "def f(): return [1]", "data mine.py:f: returned a list, not a Source"),
        (
            "data",
            "def f(): open('/no/such/x')",
            "data mine.py:f: FileNotFoundError: [Errno 2] No such file or directory: '/no/such/x'",
        ),
        ("optimizer", "def f(params): return None", "optimizer mine.py:f: returned a NoneType, not a Optimizer"),
        ("schedule", "def f(length): return 1.0", "schedule mine.py:f: returned a float, not a Callable"),
    ],
)
def test_a_part_that_refuses_or_returns_something_else_is_named(
    section: str, source: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(source + "\n")
    given = [nn.Linear(2, 2)] if section == "optimizer" else [None] * registry.KINDS[section].given
    with pytest.raises(SpecError) as caught:
        registry.call(section, Part(name="mine.py:f", options={}, paths={}), tmp_path, *given)
    assert str(caught.value) == message


def test_a_network_that_halves_its_image_away_is_a_fault_of_the_file(tmp_path: Path) -> None:
    part = Part(name="cnn", options={"channels": [4, 4, 4, 4]}, paths={})
    with pytest.raises(SpecError, match=r"^model cnn: channels = \[4, 4, 4, 4\] halves an image of 8x8"):
        registry.call("model", part, tmp_path, (1, 8, 8), 10)


def test_what_is_called_gets_our_arguments_and_its_options(tmp_path: Path) -> None:
    model = registry.call("model", Part(name="mlp", options={"widths": [3]}, paths={}), tmp_path, (1, 2, 2), 5)
    assert model(torch.zeros(2, 1, 2, 2)).shape == (2, 5)
    assert [p.shape[0] for p in model.parameters() if p.ndim == 2] == [3, 5]


def test_a_pinned_config_is_checked_part_by_part(tmp_path: Path) -> None:
    tree = {**{key: DOCUMENT[key] for key in ("data", "model")}, "schedule": {"name": "constant"}, "training": {}}
    registry.read(tree | {"optimizer": {"name": "sgd", "lr": 0.1}}, tmp_path)
    with pytest.raises(SpecError, match=r"^optimizer.lr = -1: input should be greater than 0$"):
        registry.read(tree | {"optimizer": {"name": "sgd", "lr": -1}}, tmp_path)
