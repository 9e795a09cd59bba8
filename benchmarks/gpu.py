"""Optuna alone against `hpo run` on one GPU, and our executors against each other, in turn; see `vs_optuna.py`.

One process a side (`--processes`): one GPU trains, and our side puts its trials into one worker. The rival's DataLoaders have
processes of their own, as scripts for a GPU do. `loop` trains a worker's trials one by one, `stack` many as one model.
Without a GPU there is nothing to measure: a message, exit code 0.

    python benchmarks/gpu.py --repeats 3
    python benchmarks/gpu.py --task mlp28 --slots 32
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the benchmarks are no package that is installed

from benchmarks import comparison, tasks
from benchmarks.comparison import Comparison
from benchmarks.sides import HpoSide, OptunaSide, Side
from hpo.spec.study_file import StudySpec


def main() -> None:
    """Parse the command line and compare, if there is a GPU."""
    parser = comparison.parser(__doc__, chosen=list(tasks.STUDY_FILES), pruners=list(tasks.PRUNERS))
    parser.add_argument("--processes", type=int, default=1, help="of each side (default 1)")
    parser.add_argument(
        "--loader-workers", type=int, default=4, help="processes of the rival's DataLoaders (default 4)"
    )
    given = parser.parse_args()
    if not has_gpu():
        print("gpu.py: torch sees no CUDA device here, so there is nothing to measure")
        return
    Comparison(
        sides={"optuna": OptunaSide(), **our_sides()},
        tasks=comparison.tasks_of(given),
        options=comparison.options_of(given, gpu=True, processes=given.processes, loader_workers=given.loader_workers),
        repeats=given.repeats,
        json=given.json,
    ).run()


def has_gpu() -> bool:
    """Say whether torch could train on a GPU."""
    import torch  # here: `--help` does without

    return torch.cuda.is_available()


def our_sides() -> dict[str, Side]:
    """Return a side for each executor that a study file can name, or one if it can name none."""
    if "executor" not in StudySpec.model_fields:
        return {"hpo": HpoSide()}
    return {f"hpo-{executor}": HpoSide(executor=executor) for executor in ("loop", "stack")}


if __name__ == "__main__":
    main()
