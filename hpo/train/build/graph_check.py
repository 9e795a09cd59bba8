"""Whether a captured step may be used on this machine's device, found out once by a child process.

The child captures the step, replays three steps, and compares the runs with those of the same steps without a graph. It
times both. Only a graph that computes the same and is faster is used. A child that dies takes no worker with it.

A try takes ten seconds or more: the child loads torch and the data. So it is only made where many steps are left.

    python -m hpo.train.build.graph_check REQUEST.json      what the child runs; it writes verdict.json beside
"""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from hpo.files import write_json
from hpo.spec.study_file import StudySpec
from hpo.spec.training import TrainConfig
from hpo.train import devices, graphs
from hpo.train.build import assemble, executor, measurement_cache
from hpo.train.build.executor import Choice
from hpo.train.run import Run
from hpo.train.stack import sizing

log = logging.getLogger(__name__)
STEPS = 3
TOLERANCE = 1e-6  # relative, in float32 with the same kernels
GAIN = sizing.GAIN  # smallest gain in speed that makes a graph worth its memory
SECONDS = 300  # after which a child is killed
LEAST_STEPS = 20_000  # of a worker that make a try worth it, if a graph saves half a millisecond a step
LEAST_STEPS_ALONE = 1_000  # of a run in the loop, which is captured anew for each run
#: A child that was ended so tells nothing of its graph: a person, a scheduler or the kernel ended it.
FROM_OUTSIDE = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL)
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
    lasts: bool = True  # whether another try would say the same


def with_graph(
    choice: Choice, spec: StudySpec, config: TrainConfig, run: Run, folder: Path, device: torch.device, *, runs: float
) -> Choice:
    """Return a choice whose step is captured if that computes the same and is faster. The answer is remembered.

    Args:
        run: a run of the kind that is trained.
        runs: how many runs of this kind a worker will train at most.
    """
    if not graphs.can_capture(device):
        return choice
    steps = run.epochs * run.steps_per_epoch
    if choice.executor == "loop" and steps < LEAST_STEPS_ALONE:
        why = f"a trial has {steps:,} steps at most, and each is captured anew; this pays from {LEAST_STEPS_ALONE:,} on"
        return replace(choice, captures=False, graph=why)
    stack_key = executor.stack_key_of(run, config.training)
    key = f"{executor.key_of(spec, stack_key, folder, device)} graph {choice.executor} {choice.slots}"
    verdict = _remembered(key)
    left = round(steps * runs / choice.slots)
    if verdict is None and left < LEAST_STEPS:
        why = f"not tried: a worker has about {left:,} steps left at most; a try pays from {LEAST_STEPS:,} on"
        return replace(choice, captures=False, graph=why)
    if verdict is None:
        request = Request(
            config=config.model_dump(mode="json"),
            folder=str(folder.absolute()),
            split_seed=spec.split_seed,
            device=str(device),
            executor=choice.executor,
            slots=choice.slots,
        )
        verdict = _tried_once(key, request, device)
    return replace(choice, captures=verdict.used, graph=verdict.why)


def _tried_once(key: str, request: Request, device: torch.device) -> Verdict:
    """Let a child try, one at a time on this machine. The other workers wait and take the answer over."""
    home = measurement_cache.home().parent
    home.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(home / "graph.lock", timeout=SECONDS):
            verdict = _remembered(key)
            if verdict is None:
                log.info("trying whether a step can be captured as a graph, once for each architecture")
                devices.release_unused(device)  # for the child
                verdict = tried(request)
                if verdict.lasts:
                    measurement_cache.keep(key, asdict(verdict))
            return verdict
    except Timeout:
        return Verdict(used=False, why=f"another process was trying one for more than {SECONDS} s", lasts=False)


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
            return Verdict(used=False, why=f"the process that tried it did not end within {SECONDS} s", lasts=False)
        answer = file.with_name(VERDICT)
        if done.returncode == 0 and answer.exists():
            return Verdict(**json.loads(answer.read_text()))
    said = done.stderr.decode(errors="replace").strip().splitlines()
    last = said[-1] if said else ""
    return Verdict(
        used=False,
        why=f"the process that tried it {_ended(done.returncode)}" + (f": {last}" if last else ""),
        lasts=-done.returncode not in FROM_OUTSIDE and last != "KeyboardInterrupt" and not _is_of_memory(last),
    )


def _is_of_memory(message: str) -> bool:
    """Return whether an error's message tells of memory, of which there may be more next time."""
    return "out of memory" in message.lower()


def _ended(code: int) -> str:
    """Return how a process ended."""
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
    return f"was ended by {name}"


# --- in the child ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What some steps made of the runs, and the time of further steps."""

    states: list[dict[str, Tensor]]  # by run: weights, statistics and the sum of losses, float64 on the CPU
    seconds: float  # per step
    failure: str | None  # why the step could not be captured


def examine(request: Request) -> Verdict:
    """Train the same runs with and without a graph, one after the other to save memory. Compare them and their times."""
    config = TrainConfig.model_validate(request.config)
    device, folder = torch.device(request.device), Path(request.folder)
    torch.set_num_threads(config.training.threads)
    splits = assemble.load_splits(config, request.split_seed, folder, device)

    def trained(*, captures: bool) -> Trained:
        runs = [executor.measured_run(config, folder, device, seed, splits, None) for seed in range(request.slots)]
        made = Choice(executor=request.executor, slots=request.slots, why="", captures=captures).build(runs[0])
        for run in runs:
            made.put(run)
        _train(made, STEPS)
        states = [_state(run) for run in made.runs]
        return Trained(
            states=states, seconds=sizing.step_seconds(made.train_epoch, device), failure=made.capture_failure
        )

    captured = trained(captures=True)
    if captured.failure is not None:
        why = f"the step cannot be captured: {captured.failure}"
        return Verdict(used=False, why=why, lasts=not _is_of_memory(why))
    plain = trained(captures=False)
    return judged(difference(captured.states, plain.states), captured.seconds, plain.seconds)


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
    is_faster = GAIN * captured <= plain
    times = f"{1e3 * captured:.2f} ms a step, without {1e3 * plain:.2f} ms" + (
        "" if is_faster else ": too small a gain"
    )
    return Verdict(used=is_faster, why=f"{STEPS} replayed steps equal those without within 1e-06; {times}")


def _train(trained: executor.Executor, steps: int) -> None:
    taken = 0

    def stop() -> bool:
        nonlocal taken
        taken += 1
        return taken > steps

    while taken <= steps:
        trained.train_epoch(stop)


def _state(run: Run) -> dict[str, Tensor]:
    found = {"sum of losses": run.loss_sum, **run.model.state_dict()}
    return {name: value.detach().cpu().double() for name, value in found.items()}


def difference(some: list[dict[str, Tensor]], others: list[dict[str, Tensor]]) -> float:
    """Return the largest relative difference of a tensor of a run."""
    found = []
    for mine, theirs in zip(some, others, strict=True):
        for name, value in theirs.items():
            size = value.norm()
            found.append((mine[name] - value).norm() / (size if size > 0 else 1.0))
    return float(torch.stack(found).max())


def main(file: Path) -> None:
    """Answer a request. An error is an answer, too."""
    try:
        verdict = examine(Request(**json.loads(file.read_text())))
    except Exception as error:
        said = f"{type(error).__name__}: {error}".splitlines()[
            0
        ]  # further lines of CUDA's errors say how to debug them
        verdict = Verdict(used=False, why=f"the process that tried it failed: {said}", lasts=not _is_of_memory(said))
    write_json(file.with_name(VERDICT), asdict(verdict))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
