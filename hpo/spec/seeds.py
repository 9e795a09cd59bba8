"""Seeds derived from names, so that every random draw belongs to one trial and one purpose."""

from __future__ import annotations

import hashlib


def derive(*parts: int | str) -> int:
    """Return a seed in [0, 2**63) that depends on every part and on their order.

    `derive(trial_seed, "order", epoch)` gives the seed of one epoch's batch order; no two purposes share a stream.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1
