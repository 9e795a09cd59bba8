"""Ray Tune with Optuna's sampler and ASHA against `hpo run`, two trials at a time each, in turn; see `vs_optuna.py`.

The other side is `plain_ray.py`: OptunaSearch with our sampler's settings, ASHAScheduler with our rungs, two concurrent
trials of one CPU each, the training function of `plain_optuna.py`. Its time includes `ray.init`. Ray starts a process for
each trial, as it does by default; `--reuse-actors` lets it train many trials in one. Ray must not enter the project's own
environment, so it gets one that borrows torch and Optuna from there:

    python -m venv /tmp/rayenv
    /tmp/rayenv/bin/pip install "ray[tune]"
    echo "$PWD/.venv/lib/python3.11/site-packages" > /tmp/rayenv/lib/python3.11/site-packages/borrowed.pth
    python benchmarks/vs_ray.py --python /tmp/rayenv/bin/python --repeats 3

What differs by Ray's own design: a trial that ASHA ended is complete to its sampler, with the last value it had; an
accuracy is judged against a quantile of its rung rather than by its place in it.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the benchmarks are no package that is installed

from benchmarks import comparison, tasks
from benchmarks.comparison import Comparison
from benchmarks.sides import HpoSide, RaySide

NEEDED = "import optuna, ray.tune.search.optuna, sklearn, torch, torchvision"


def main() -> None:
    """Parse the command line and compare."""
    parser = comparison.parser(
        __doc__, chosen=["digits", "mlp28", "cnn28"], pruners=["asha", "none"], metrics=["accuracy"]
    )
    parser.add_argument(
        "--python", default="/tmp/rayenv/bin/python", help="an interpreter with Ray (default %(default)s)"
    )
    parser.add_argument("--reuse-actors", action="store_true", help="let Ray train many trials in one process")
    parser.add_argument("--executor", help="of our side; default: what hpo does by itself")
    given = parser.parse_args()
    refuse_unless_it_has_ray(given.python)
    Comparison(
        sides={
            "ray": RaySide(python=given.python, reuse_actors=given.reuse_actors),
            "hpo": HpoSide(executor=given.executor),
        },
        tasks=comparison.tasks_of(given, tasks.TRIALS_OF_RAY),
        options=comparison.options_of(given),
        repeats=given.repeats,
        json=given.json,
    ).run()


def refuse_unless_it_has_ray(python: str) -> None:
    """Raise SystemExit, with how to make one, if there is no such interpreter or Ray is not in it."""
    how = "\n".join((__doc__ or "").splitlines()[7:12])
    try:
        found = subprocess.run([python, "-c", NEEDED], capture_output=True, text=True, check=False, cwd="/")
    except OSError as error:
        raise SystemExit(f"{python}: {error.strerror}; an environment with Ray is made by\n{how}") from None
    if found.returncode:
        raise SystemExit(
            f"{python} cannot do '{NEEDED}':\n{found.stderr[-800:]}an environment with Ray is made by\n{how}"
        )


if __name__ == "__main__":
    main()
