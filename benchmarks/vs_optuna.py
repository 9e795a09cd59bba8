"""Optuna alone against `hpo run`, two processes each, in turn: wall clock, seconds per epoch, who reaches whose best when.

Both sides search the same space on the same split with the same layers, batch size, optimizer steps, sampler and pruner;
`plain_optuna.py` is the other side: two processes on one SQLite file. The processes train on the CPU with one torch thread
each, since two of them fill two cores; for that reason, too, the rival's DataLoaders have no processes of their own
(`--loader-workers`). `--default-threads` leaves the rival what torch does by itself.

`--own` lets our side run the rival's objective as it stands. Then both train alike, and all else is compared.

Two things differ from the study files as they stand: a trial's value is its last epoch's, since that is what Optuna's example
returns; and seed, trials, pruner and sampler are the options below. One thing differs between the sides: Optuna's example
asks the pruner after the last epoch, too, and a trial that it ends there counts as pruned. What the pruner cuts
differs by chance, so compare seconds per epoch as well, or `--pruner none`, where all train the same number of epochs.

    python benchmarks/vs_optuna.py --repeats 3
    python benchmarks/vs_optuna.py --task digits --trials 64 --pruner none --json results.json
    python benchmarks/vs_optuna.py --task resnet18

`--gpu` compares on one GPU: one process a side, DataLoaders with processes of their own, and our loop and our stack as two
sides. `gpu.py` measures training alone there, and whether it computes what a CPU computes.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the benchmarks are no package that is installed

from benchmarks import comparison, tasks
from benchmarks.comparison import Comparison
from benchmarks.sides import HpoSide, OptunaSide, OwnSide, Side


def main() -> None:
    """Parse the command line and compare."""
    parser = comparison.parser(__doc__, chosen=["digits", "mlp28", "cnn28"], pruners=list(tasks.PRUNERS))
    parser.add_argument("--storage", metavar="URL", help="database of both sides; default: a new SQLite file per run")
    parser.add_argument("--executor", help="of our side; default: what hpo does by itself")
    parser.add_argument("--own", action="store_true", help="our side runs the objective of the other, unchanged")
    parser.add_argument(
        "--loader-workers",
        type=int,
        help="processes of each DataLoader without hpo's data (default 0; with --gpu 4)",
    )
    parser.add_argument("--gpu", action="store_true", help="on one GPU, with one process a side")
    parser.add_argument("--default-threads", action="store_true", help="leave Optuna's side torch's own thread count")
    given = parser.parse_args()
    if given.gpu:
        refuse_without_gpu()
    workers = given.loader_workers if given.loader_workers is not None else 4 if given.gpu else 0
    own_side: dict[str, Side] = {"hpo": OwnSide() if given.own else HpoSide(executor=given.executor)}
    if given.gpu and not given.own and given.executor is None:
        own_side = {f"hpo-{executor}": HpoSide(executor=executor) for executor in ("loop", "stack")}
    options = comparison.options_of(
        given,
        storage=given.storage,
        loader_workers=workers,
        default_threads=given.default_threads,
        gpu=given.gpu,
        processes=1 if given.gpu else 2,
    )
    Comparison(
        sides={"optuna": OptunaSide(), **own_side},
        tasks=comparison.tasks_of(given),
        options=options,
        repeats=given.repeats,
        json=given.json,
    ).run()


def refuse_without_gpu() -> None:
    """Raise SystemExit if torch cannot train on a GPU."""
    import torch  # here: `--help` does without

    if not torch.cuda.is_available():
        raise SystemExit("--gpu: torch sees no CUDA device here; leave it out to compare on the CPU")


if __name__ == "__main__":
    main()
