"""The loop of `own_loop.py` under Ray Tune: `tune.report` after each epoch, with or without a checkpoint.

Runs in an environment of its own that has Ray (see `vs_ray.py`). A checkpoint is saved as Ray's documentation does it: a
temporary folder with one file of `torch.save`. The seconds of each epoch beside its training are written to a file.

    PYTHONPATH=. /tmp/rayenv/bin/python -m benchmarks.plain_ray_loop --epochs 500 --output seconds.json
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import ray  # it has an environment of its own
import torch
from ray import tune
from torch import nn

EPOCH_SECONDS = 0.001


def train(config: dict[str, object], epochs: int, output: str, *, keeps: bool) -> None:  # noqa: ARG001  (Ray's own signature)
    """Run the loop and write what each epoch but the first took beside its training.

    Args:
        epochs: of the trial.
        output: the file.
        keeps: report each epoch with a checkpoint.
    """
    torch.set_num_threads(1)
    model = nn.Linear(64, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    beside, trained = [], 0.0
    for epoch in range(epochs):
        if trained:
            beside.append(time.perf_counter() - trained)
        time.sleep(EPOCH_SECONDS)
        trained = time.perf_counter()
        found = {"loss": -float(epoch)}
        if not keeps:
            tune.report(found)
            continue
        with tempfile.TemporaryDirectory() as folder:
            state = {"epoch": epoch, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state, Path(folder) / "checkpoint.pt")
            tune.report(found, checkpoint=tune.Checkpoint.from_directory(folder))
    Path(output).write_text(json.dumps(beside))


def main() -> None:
    """Run one trial."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=500)
    parser.add_argument("--checkpoints", action="store_true", help="report each epoch with a checkpoint")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ray-") as temporary:
        # Loopback alone, no dashboard, nothing sent to anyone; its files go when it ends.
        os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
        ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, _temp_dir=temporary)
        trainable = tune.with_parameters(
            train, epochs=given.epochs, output=str(given.output.absolute()), keeps=given.checkpoints
        )
        run_config = tune.RunConfig(storage_path=str(Path(temporary) / "results"), verbose=0)
        tune.Tuner(tune.with_resources(trainable, {"cpu": 1}), run_config=run_config).fit()
        ray.shutdown()


if __name__ == "__main__":
    main()
