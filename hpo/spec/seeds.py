"""Seeds derived from names, so that each random stream belongs to one trial and one purpose."""

from __future__ import annotations

import hashlib
import random
import sys


def derive(*parts: int | str) -> int:
    """Return a seed in [0, 2**63) that depends on all parts and on their order.

    `derive(trial_seed, "order", epoch)` is the seed of one epoch's batch order.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1


def of_trial(study_seed: int, number: int) -> int:
    """Return the seed from which everything random in a trial is derived."""
    return derive(study_seed, "trial", number)


def seed_globals(seed: int) -> None:
    """Seed the global generators of Python and, as far as they are imported, of NumPy and of torch with its devices."""
    random.seed(seed)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(seed % 2**32)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(seed)
