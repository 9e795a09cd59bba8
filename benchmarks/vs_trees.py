"""The examples on small tables and key points against scikit-learn's trees and linear models, on the same parts.

Our side is what a user does: `hpo run`, `hpo export`, `hpo train`. The rivals have scikit-learn's defaults, see the same
training part, standardised, and are judged on the same test part. This is a comparison of results, not of speed. The
search of our side saw the validation part; the rivals did not need it.

    python benchmarks/vs_trees.py
    python benchmarks/vs_trees.py --only diabetes --seeds 5
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.multioutput import MultiOutputRegressor

sys.path.insert(0, str(Path(__file__).parent.parent))  # the benchmarks are no package that is installed

from hpo.data import load, load_test
from hpo.data.stored import chunks
from hpo.spec.training import TrainConfig
from hpo.study import resolve
from hpo.train.build import assemble

ROOT = Path(__file__).parent.parent
#: Metric of each example on the test part.
EXAMPLES = {"diabetes": "rmse", "wine": "log_loss", "breast_cancer": "auroc", "keypoints": "rmse"}
Parts = tuple[Any, Any, Any, Any]  # inputs and targets of the training and of the test part
REGRESSORS: dict[str, Callable[[], Any]] = {
    "trees": lambda: MultiOutputRegressor(HistGradientBoostingRegressor(random_state=0)),
    "linear": LinearRegression,
}
CLASSIFIERS: dict[str, Callable[[], Any]] = {
    "trees": lambda: HistGradientBoostingClassifier(random_state=0),
    "linear": lambda: LogisticRegression(max_iter=10_000),
}


def ours(name: str, seed: int, folder: Path) -> float:
    """Search, train the best and return its test metric."""
    text = (
        (ROOT / "examples" / f"{name}.toml")
        .read_text()
        .replace(f'name = "{name}"', f'name = "{name}"\nseed = {seed}', 1)
    )
    text = text.replace('name = "small_data:', f'name = "{ROOT / "examples" / "small_data.py"}:').replace(
        "[data]", f"[data]\nsplit_seed = {seed}"
    )
    study, best, run = folder / "study.toml", folder / "best.toml", folder / "run"
    study.write_text(text)
    for arguments in (["run", str(study)], ["export", name, "-o", str(best)], ["train", str(best), "-o", str(run)]):
        subprocess.run([sys.executable, "-m", "hpo", *arguments], check=True, cwd=folder, capture_output=True)
    found: float = json.loads((run / "metrics.json").read_text())[f"test_{EXAMPLES[name]}"]
    return found


def theirs(name: str, seed: int) -> dict[str, float]:
    """Return the rivals' test metric on the same parts."""
    train_x, train_y, test_x, test_y = parts(name, seed)
    metric, found = EXAMPLES[name], {}
    for rival, build in (REGRESSORS if metric == "rmse" else CLASSIFIERS).items():
        model = build().fit(train_x, train_y if metric == "rmse" else train_y.ravel())
        if metric == "rmse":
            squares = (model.predict(test_x).reshape(test_y.shape) - test_y) ** 2
            found[rival] = float(np.sqrt(squares.mean(0)).mean())  # the mean over the targets, as ours
        elif metric == "auroc":
            found[rival] = float(roc_auc_score(test_y, model.predict_proba(test_x)[:, 1]))
        else:
            found[rival] = float(log_loss(test_y, model.predict_proba(test_x), labels=model.classes_))
    return found


def parts(name: str, seed: int) -> Parts:
    """Return the training and the test part as arrays; targets of a regression in original units."""
    resolved = resolve.read(ROOT / "examples" / f"{name}.toml")
    source = assemble.load_source(TrainConfig.from_tree(_pinned(resolved.spec.tree)), resolved.code_folder)
    splits, test = load(source, split_seed=seed, device="cpu"), load_test(source, split_seed=seed, device="cpu")
    mean, std = splits.mean, splits.std
    arrays = []
    for part in (splits.train, test):
        rows = part.inputs["numbers"] if isinstance(part.inputs, dict) else tensor_of(part.inputs)
        if isinstance(mean, dict) and isinstance(std, dict):
            rows = (rows - mean["numbers"]) / std["numbers"]
        targets = part.targets
        if splits.target_std is not None and splits.target_mean is not None:
            targets = targets * splits.target_std + splits.target_mean
        arrays += [rows.flatten(1).numpy(), targets.numpy()]
    return arrays[0], arrays[1], arrays[2], arrays[3]


def tensor_of(rows: Any) -> Any:
    """Return all rows of one tensor, as floats."""
    return torch.cat(list(chunks(rows))).float()


def _pinned(tree: Mapping[str, Any]) -> Any:
    from hpo.spec import space

    return space.middle(dict(tree), {})


def report(name: str, values: Mapping[str, Sequence[float]]) -> str:
    """Return one line: median and range over the seeds of each side."""
    told = [f"{side} {median(found):.4g} ({min(found):.4g}-{max(found):.4g})" for side, found in values.items()]
    return f"{name:14} test {EXAMPLES[name]:9} " + "   ".join(told)


def main() -> None:
    """Compare each example on several splits."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=sorted(EXAMPLES), nargs="*", default=sorted(EXAMPLES))
    parser.add_argument("--seeds", type=int, default=3, help="splits, each with a search of its own")
    given = parser.parse_args()
    for name in given.only:
        values: dict[str, list[float]] = {"hpo": [], "trees": [], "linear": []}
        for seed in range(given.seeds):
            with tempfile.TemporaryDirectory() as folder:
                values["hpo"].append(ours(name, seed, Path(folder)))
            for rival, value in theirs(name, seed).items():
                values[rival].append(value)
        print(report(name, values), flush=True)


if __name__ == "__main__":
    main()
