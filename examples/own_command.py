"""A plain script that knows nothing of hpo: arguments come in, and each epoch's metric is printed.

It needs Python alone. It goes on from its last epoch if $HPO_CHECKPOINT_DIR holds one.
"""

import argparse
import json
import math
import os
import random
from pathlib import Path

EPOCHS = 15
IMAGES = 200
FOLDER = os.environ.get("HPO_CHECKPOINT_DIR")


def points(seed: int) -> list[tuple[float, float, int]]:
    """Return points of two rings, and the ring of each."""
    draw = random.Random(seed)
    found = []
    for number in range(IMAGES):
        angle, radius = draw.uniform(0, 2 * math.pi), draw.gauss(1 + number % 2, 0.35)
        found.append((radius * math.cos(angle), radius * math.sin(angle), number % 2))
    return found


def features(x: float, y: float) -> list[float]:
    return [1.0, x, y, x * x, y * y, x * y]


def chance(weights: list[float], x: float, y: float) -> float:
    return 1 / (1 + math.exp(-sum(w * f for w, f in zip(weights, features(x, y), strict=True))))


def train_epoch(weights: list[float], lr: float, decay: float, epoch: int) -> list[float]:
    data = points(seed=0)
    random.Random(epoch).shuffle(data)
    for x, y, ring in data:
        error = chance(weights, x, y) - ring
        weights = [w - lr * (error * f + decay * w) for w, f in zip(weights, features(x, y), strict=True)]
    return weights


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--weight-decay", type=float, default=0.0)
    given = parser.parse_args()
    saved = Path(FOLDER, "state.json") if FOLDER else None
    epoch, weights = 0, [0.0] * 6
    if saved and saved.exists():
        epoch, weights = json.loads(saved.read_text())
    while epoch < EPOCHS:
        weights = train_epoch(weights, given.lr, given.weight_decay, epoch)
        epoch += 1
        right = sum((chance(weights, x, y) > 0.5) == ring for x, y, ring in points(seed=1))
        print(f"epoch {epoch}/{EPOCHS}  val_acc={right / IMAGES:.4f}")
        if saved:
            part = saved.with_suffix(".part")
            part.write_text(json.dumps([epoch, weights]))
            part.replace(saved)  # whole or not at all


if __name__ == "__main__":
    main()
