"""Whether a captured step may be used on this machine's device, found out once by a child process.

The child captures the step, replays three steps, and compares the runs with those of the same steps without a graph. It
times both. Only a graph that computes the same and is faster is used. A child that dies takes no worker with it.

    python -m hpo.train.build.graph_check REQUEST.json      what the child runs; it writes verdict.json beside
"""

from __future__ import annotations

import json
import logging
import math
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hpo.files import write_json
from hpo.spec.study_file import StudySpec
from hpo.spec.training import TrainConfig
from hpo.train import graphs
from hpo.train.build import assemble, executor, measurement_cache
from hpo.train.build.executor import Choice, Executor
from hpo.train.stack import sizing

log = logging.getLogger(__name__)
STEPS = 3
TOLERANCE = 1e-6  # relative, in float32 with the same kernels
SECONDS = 300  # after which a child is killed
COMMAND = [sys.executable, "-P", "-m", "hpo.train.build.graph_check"]  # -P: a folder `hpo` at hand is not ours
VERDICT = "verdict.json"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a child is to try."""

    config: dict[str, Any]
    folder: str  # of the study file
    split_seed: int
    device: str
    executor: str
    slots: int


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether the step is captured, and the reason."""

    used: bool
    why: str


def with_graph(
    choice: Choice, spec: StudySpec, config: TrainConfig, stack_key: str, folder: Path, device: torch.device
) -> Choice:
    """Return a choice whose step is captured if that computes the same and is faster. The answer is remembered."""
    if not graphs.can_capture(device):
        return choice
    key = f"{executor.key_of(spec, stack_key, folder, device)} graph {choice.executor} {choice.slots}"
    verdict = _remembered(key)
    if verdict is None:
        log.info("trying whether a step can be captured as a graph, once for each architecture")
        request = Request(
            config=config.model_dump(mode="json"),
            folder=str(folder.absolute()),
            split_seed=spec.split_seed,
            device=str(device),
            executor=choice.executor,
            slots=choice.slots,
        )
        verdict = tried(request)
        measurement_cache.keep(key, asdict(verdict))
    return replace(choice, captures=verdict.used, graph=verdict.why)


def _remembered(key: str) -> Verdict | None:
    kept = measurement_cache.recall(key)
    try:
        return Verdict(**kept)
    except TypeError:  # nothing is remembered, or it has the format of another version
        return None


def tried(request: Request) -> Verdict:
    """Let a child try a graph and return its verdict. A child that dies or hangs says no."""
    with tempfile.TemporaryDirectory(prefix="hpo-graph-") as made:
        file = Path(made) / "request.json"
        write_json(file, asdict(request))
        try:
            done = subprocess.run(
                [*COMMAND, str(file)], stdin=subprocess.DEVNULL, capture_output=True, timeout=SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            return Verdict(used=False, why=f"the process that tried it did not end within {SECONDS} s")
        answer = file.with_name(VERDICT)
        if done.returncode == 0 and answer.exists():
            return Verdict(**json.loads(answer.read_text()))
    said = done.stderr.decode(errors="replace").strip().splitlines()
    return Verdict(
        used=False, why=f"the process that tried it {_ended(done.returncode)}" + (f": {said[-1]}" if said else "")
    )


def _ended(code: int) -> str:
    """Return how a process ended."""
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
    return f"was ended by {name}"


# --- in the child ---------------------------------------------------------------------------------------------------------


def examine(request: Request) -> Verdict:
    """Train the same runs with and without a graph, compare them and time both."""
    config, device, folder = (
        TrainConfig.model_validate(request.config),
        torch.device(request.device),
        Path(request.folder),
    )
    torch.set_num_threads(config.training.threads)
    splits = assemble.load_splits(config, request.split_seed, folder, device)

    def filled(*, captures: bool) -> Executor:
        runs = [executor.measured_run(config, folder, device, seed, splits, None) for seed in range(request.slots)]
        choice = Choice(executor=request.executor, slots=request.slots, why="", captures=captures)
        made = choice.build(runs[0])
        for run in runs:
            made.put(run)
        return made

    plain, captured = filled(captures=False), filled(captures=True)
    for one in (plain, captured):
        _train(one, STEPS)
    if captured.capture_failure is not None:
        return Verdict(used=False, why=f"the step cannot be captured: {captured.capture_failure}")
    apart = difference(captured, plain)
    if not apart <= TOLERANCE:
        return judged(apart, math.nan, math.nan)
    return judged(apart, *(sizing.step_seconds(one.train_epoch, device) for one in (captured, plain)))


def judged(apart: float, captured: float, plain: float) -> Verdict:
    """Return the verdict.

    Args:
        apart: relative difference after STEPS steps.
        captured: seconds per step with the graph.
        plain: seconds per step without.
    """
    if not apart <= TOLERANCE:  # so that NaN is a difference
        return Verdict(
            used=False, why=f"{STEPS} replayed steps differ by {apart:.1e} from those without, more than 1e-06"
        )
    times = f"{1e3 * captured:.2f} ms a step, without {1e3 * plain:.2f} ms"
    return Verdict(used=captured < plain, why=f"{STEPS} replayed steps equal those without within 1e-06; {times}")


def _train(trained: Executor, steps: int) -> None:
    taken = 0

    def stop() -> bool:
        nonlocal taken
        taken += 1
        return taken > steps

    while taken <= steps:
        trained.train_epoch(stop)


@torch.no_grad()
def difference(one: Executor, other: Executor) -> float:
    """Return the largest relative difference of the runs of two executors: of weights and statistics, and of losses."""
    found = []
    for mine, theirs in zip(one.runs, other.runs, strict=True):
        pairs = [(mine.loss_sum, theirs.loss_sum)]
        wanted = theirs.model.state_dict()
        pairs += [(value, wanted[name]) for name, value in mine.model.state_dict().items()]
        for value, other_value in pairs:
            a, b = value.double(), other_value.double()
            found.append((a - b).norm() / b.norm().clamp(min=1e-30) if b.norm() > 0 else (a - b).norm())
    return float(torch.stack(found).cpu().max())


def main(file: Path) -> None:
    """Answer a request."""
    write_json(file.with_name(VERDICT), asdict(examine(Request(**json.loads(file.read_text())))))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
