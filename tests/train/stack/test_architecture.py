"""What must be equal of models for one stack to hold them."""

from __future__ import annotations

import hashlib

from torch import nn

from hpo.models import MODELS
from hpo.train.stack import architecture


def named(module: str) -> nn.Module:
    """Return a layer of a type that is said to be defined in this module."""
    return type("Block", (nn.Identity,), {"__module__": module})()


def test_our_models_are_called_as_older_versions_called_them() -> None:
    """A parked trial has the digest stored; version 0.1 imported our models without `hpo.`."""
    layers = nn.ModuleList([named("hpo.models.wide_resnet")])
    old = ": torch.nn.modules.container.ModuleList []\n0: models.wide_resnet.Block []"
    assert architecture.digest(layers) == digest_of(old)


def test_a_users_own_models_are_not_taken_for_ours() -> None:
    """A file `models/wide_resnet.py` of the user's own may hold another `Block`."""
    ours, theirs = (architecture.digest(named(f"{root}models.wide_resnet")) for root in ("hpo.", ""))
    assert ours != theirs


def test_another_width_is_another_architecture() -> None:
    small, large = (MODELS["mlp"]((1, 8, 8), 10, widths=[width]) for width in (8, 16))
    assert architecture.digest(small) != architecture.digest(large)
    assert architecture.digest(small) == architecture.digest(MODELS["mlp"]((1, 8, 8), 10, widths=[8]))


def digest_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def test_any_attribute_makes_another_architecture() -> None:
    """Models that differ in any attribute are of different architectures."""

    class Net(nn.Module):
        def __init__(self, skips: list[int]) -> None:
            super().__init__()
            self._skips = skips
            self.layer = nn.Linear(4, 4)

    assert architecture.digest(Net([0, 2])) == architecture.digest(Net([0, 2]))
    assert architecture.digest(Net([0, 2])) != architecture.digest(Net([2, 0]))
