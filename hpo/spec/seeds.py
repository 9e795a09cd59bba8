"""Seeds derived from names, so that each random stream belongs to one trial and one purpose."""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Mapping
from typing import Any

SEED_KEY = "hpo:seed"  # user attribute with the seed of a trial that does not get its own from its number


def derive(*parts: int | str) -> int:
    """Return a seed in [0, 2**63) that depends on all parts and on their order.

    `derive(trial_seed, "order", epoch)` is the seed of one epoch's batch order.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1


def of_trial(study_seed: int, number: int, attributes: Mapping[str, Any] | None = None) -> int:
    """Return the seed from which everything random in a trial is derived.

    Args:
        study_seed: the study's seed.
        number: the trial's number.
        attributes: the trial's user attributes, which may give a seed: `hpo confirm` trains several trials with one seed.
    """
    given = (attributes or {}).get(SEED_KEY)
    return derive(study_seed, "trial", number) if given is None else int(given)


def seed_globals(seed: int) -> None:
    """Seed the global generators of Python and, as far as they are imported, of NumPy and of torch with its devices."""
    random.seed(seed)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(seed % 2**32)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(seed)
