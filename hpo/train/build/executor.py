"""Choice of the executor for runs of one kind on this machine, and of the number of runs that it trains together.

The choice is measured once and then remembered.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from hpo import models
from hpo.data import Splits
from hpo.receipt import processor
from hpo.spec import usercode
from hpo.spec.study_file import StudySpec
from hpo.spec.training import Stopping, TrainConfig, Training
from hpo.strategy import auto_sampler
from hpo.train import devices
from hpo.train.build import assemble, measurement_cache
from hpo.train.epoch import EpochResult
from hpo.train.loop import Loop
from hpo.train.memory import in_gibibytes
from hpo.train.monitors import Watch
from hpo.train.optim.losses import own_kind
from hpo.train.run import Run
from hpo.train.stack import architecture, select, sizing
from hpo.train.stack.layers import Unstackable
from hpo.train.stack.row_state import order_of
from hpo.train.stack.select import Make
from hpo.train.stack.sizing import Need, Size
from hpo.train.stack.stack import Stack

log = logging.getLogger(__name__)
ENDLESS = 10**6  # epochs of a run that is only measured
TAME_RATE = 0.01  # largest learning rate of a measured run, since a diverging run shows nothing
#: Samplers that learn from finished trials.
MODEL_BASED = ("tpe", "fidelity_tpe", "gp", "cmaes", "nsga2", "nsga3")
GENERATIONS = 4  # fewest rounds of such a sampler's budget: trials suggested together do not learn from each other
Executor = Loop | Stack


@dataclass(frozen=True, kw_only=True)
class Choice:
    """An executor and the number of runs that it trains together."""

    executor: str  # "loop", "stack" or "vmap"
    slots: int
    why: str  # the reason, one line of text
    need: Need | None = None  # the memory of stacks; None if it was not counted, as on a CPU
    captures: bool = False  # whether the step is captured as a graph, see `graph_check.py`
    graph: str = ""  # why it is captured, or is not; "" where no device could

    @classmethod
    def from_dict(cls, kept: Any) -> Choice:
        """Return a choice that was kept by `asdict`; TypeError if it has the format of another version."""
        found = cls(**kept)
        return replace(found, need=found.need and Need(**kept["need"]))

    def build(self, like: Run) -> Executor:
        """Return an empty executor for runs like this one."""
        if self.executor == "loop":
            return Loop(captures=self.captures)
        return Stack(select.of(self.executor, like), like, self.slots, captures=self.captures)

    def limited(self, most: int, because: str) -> Choice:
        """Return this choice with at most `most` slots; `because` completes the reason."""
        if self.slots <= most:
            return self
        executor = self.executor if most > 1 else "loop"
        why = f"no more than {most} {because}; without this limit: {self.why}"
        return replace(self, executor=executor, slots=most, why=why, captures=False, graph="")  # tried with other slots

    def within(self, device: torch.device, sharers: int) -> Choice:
        """Return this choice with as many slots as fit into what is free on the device now, or into this process's part of it."""
        free = devices.free_bytes(device, sharers)
        if self.need is None or free is None:
            return self
        shared = f" for each of {sharers} workers" if sharers > 1 else ""
        sizes = f"{in_gibibytes(self.need.of(self.slots))} for {self.slots}, {in_gibibytes(free)} free{shared}"
        return self.limited(self.need.most(free), f"fit into {sizing.SHARE:.0%} of the device's free memory ({sizes})")


def train(executor: Executor, run: Run, stop: Callable[[], bool]) -> Iterator[EpochResult]:
    """Train one run alone, yielding one result per epoch, to its end or until `stop` returns true."""
    executor.put(run)
    while not run.finished:
        results = executor.train_epoch(stop)
        if not results:
            return
        yield from results


def stack_key_of(run: Run, training: Training) -> str:
    """Return the stack key: runs with the same key can be trained in one stack.

    Schedule, seed, epochs and our own losses may differ. Optimizers may differ if they own the same parameters in the
    same order.
    """
    trained = order_of(run.optimizer, {parameter: name for name, parameter in run.model.named_parameters()})
    common = (trained, run.batch_size, run.accumulation, training.precision, training.threads, run.alone)
    watched = [run.watch] if run.watch != Watch() else []
    return architecture.digest(run.model, *common, own_kind(run.loss), run.computes_statistics, *watched)


def choose(
    spec: StudySpec, config: TrainConfig, splits: Splits, folder: Path, device: torch.device, *, sharers: int = 1
) -> Choice:
    """Return how runs of this config are trained on this device, by the spec's options and by measurement.

    The first call for a kind of run takes some seconds: stacks are checked against single runs, then measured.

    Args:
        spec: the study's settings.
        config: of the runs.
        splits: the data.
        folder: the folder of the user's code.
        device: where runs are trained.
        sharers: how many workers share the device.
    """
    if spec.executor == "loop" or spec.slots == 1:
        why = 'executor = "loop"' if spec.executor == "loop" else "slots = 1"
        return Choice(executor="loop", slots=1, why=f"the study says {why}")
    make = partial(measured_run, config, folder, device)
    key = key_of(spec, stack_key_of(make(0, splits, None), config.training), folder, device, sharers)
    with contextlib.suppress(TypeError):  # nothing is remembered, or it has the format of another version
        return Choice.from_dict(measurement_cache.recall(key)).within(device, sharers)
    log.info("measuring how many trials are best trained together, once for each architecture")
    choice = _measure(spec, make, splits, config.training.batch_size, sharers)
    measurement_cache.keep(key, asdict(choice))
    return choice.within(device, sharers)


def measured_run(
    config: TrainConfig, folder: Path, device: torch.device, seed: int, splits: Splits, dtype: torch.dtype | None
) -> Run:
    """Return a run that is only measured: it has no end, and no rate at which it would diverge."""
    training, options = config.training, dict(config.optimizer.options)
    changes = {"epochs": ENDLESS, "schedule_epochs": training.schedule_epochs or training.epochs}
    if isinstance(options.get("lr"), float):
        options["lr"] = min(options["lr"], TAME_RATE)
    optimizer = config.optimizer.model_copy(update={"options": options})
    tried = config.model_copy(
        update={"training": training.model_copy(update=changes), "optimizer": optimizer, "stopping": Stopping()}
    )
    return assemble.build_run(tried, splits, seed, folder, device, dtype=dtype)


def key_of(spec: StudySpec, stack_key: str, folder: Path, device: torch.device, sharers: int = 1) -> str:
    """Return the key under which a choice is remembered on this machine.

    It contains digests of the user's code and of ours, since the same layers may be run differently. It contains how many workers
    share the device, since none of them measures a stack that needs more than its part of the memory.
    """
    shared = (sharers,) if sharers > 1 else ()
    known = (torch.__version__, processor(), devices.name(device), _our_code(), *shared)
    described = repr((*known, usercode.digest(spec.code_references, folder), stack_key, spec.executor, spec.slots))
    return hashlib.sha256(described.encode()).hexdigest()[:32]


def code_files() -> list[Path]:
    """Return our files on which speed and equality may depend. These are all of `hpo.models` and `hpo.train`, to miss none."""
    packages = (Path(models.__file__).parent, Path(__file__).parents[1])
    return [file for package in packages for file in sorted(package.rglob("*.py"))]


@cache
def _our_code() -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in code_files())).hexdigest()


def _measure(spec: StudySpec, make: Make, splits: Splits, batch_size: int, sharers: int) -> Choice:
    measures = spec.slots == "auto"
    step = sizing.step_alone(make(0, splits, None)) if measures else 0.0
    if spec.executor == "auto" and step > sizing.SLOW_STEP_SECONDS:
        return Choice(
            executor="loop", slots=1, why=f"a step takes {step:.2f} s, so the overhead of calls does not matter"
        )
    try:
        forward = select.find(make, splits, batch_size)
    except Unstackable as reason:
        return Choice(executor="loop", slots=1, why=f"cannot be trained as one model: {reason}")
    need = sizing.need_of(forward, make, splits) if devices.free_bytes(splits.device) is not None else None
    if not measures:
        why = f"the study says slots = {spec.slots}"
        return Choice(executor=forward.name, slots=int(spec.slots), why=why, need=need)
    may_lose = spec.executor == "auto"
    found = sizing.measure(
        forward, lambda seed: make(seed, splits, None), step, may_lose=may_lose, need=need, sharers=sharers
    )
    rates = f"{splits.unit}s/s by trials together: " + ", ".join(
        f"{slots}: {rate:,.0f}" for slots, rate in found.rates.items()
    )
    if found.slots == 1:
        return Choice(executor="loop", slots=1, why=f"faster than a stack; {rates}")
    gain = found.rates[found.slots] / found.rates[1]
    why = f"{found.slots} together train {gain:.1f} times as fast as one{_memory_words(found, need)}; {rates}"
    return Choice(executor=forward.name, slots=found.slots, why=why, need=need)


def _memory_words(found: Size, need: Need | None) -> str:
    """Return the counted and the measured memory of the best stack, "" if they are not known."""
    if need is None or found.peak is None:
        return ""
    return f", in {in_gibibytes(found.peak)} at most (predicted {in_gibibytes(need.of(found.slots))})"


def spread(choice: Choice, spec: StudySpec, *, budget: int, fleet: int) -> Choice:
    """Limit the slots, so that other workers get their share of the budget and a sampler can learn between rounds.

    Args:
        budget: trials that are left.
        fleet: number of workers.
    """
    most, learns = -(-budget // fleet), ""
    sampler = auto_sampler.name_of(spec)
    if spec.slots == "auto" and sampler in MODEL_BASED:
        most = max(1, most // GENERATIONS)
        learns = f", since {sampler} learns from finished trials"
    return choice.limited(most, f"at once of {budget} trials in {fleet} worker{'s' if fleet > 1 else ''}{learns}")


def remember(
    choice: Choice, spec: StudySpec, stack_key: str, folder: Path, device: torch.device, *, sharers: int = 1
) -> None:
    """Remember a choice for runs of this stack key, for every process on this machine that shares its device with as many."""
    measurement_cache.keep(key_of(spec, stack_key, folder, device, sharers), asdict(choice))
