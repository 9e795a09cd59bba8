"""Kinds of failure of a trial's attempt, and the policy of a study for each kind.

The kind is found from the exception and its causes. A failed trial is parked for another attempt, at most `retries` times
for each kind. After the last attempt it ends as FAIL or PRUNED.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, Literal

import pydantic
from annotated_types import Ge, Gt, Le

from hpo.errors import Diverged, HpoError, ProgramError, Signal, TimeUp, Unasked

LONGEST_MESSAGE = 500  # characters; the traceback holds the whole message


class Kind(StrEnum):
    """The kind of an attempt's failure."""

    OUT_OF_MEMORY = "out_of_memory"  #: GPU or main memory ran out
    CUDA_ERROR = "cuda_error"  #: another error of CUDA or its libraries; the process is unusable after it
    DIVERGED = "diverged"  #: a loss or result is not finite, or the divergence guard ended the trial
    EXCEPTION = "exception"  #: any other exception of user code, SystemExit included
    DATA_ERROR = "data_error"  #: a file or a DataLoader worker failed
    TIME_LIMIT = "time_limit"  #: the trial trained for longer than budget.trial_timeout
    LOST_WORKER = "lost_worker"  #: the worker died, or did not renew its lease in time
    LEASE_LOST = "lease_lost"  #: another worker owns the trial now; this worker drops it


#: After these kinds the worker process restarts: its state would fail the next trial too.
SPOILING = frozenset({Kind.OUT_OF_MEMORY, Kind.CUDA_ERROR})


class Policy(pydantic.BaseModel):
    """The policy for one kind of failure."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True)

    retries: Annotated[int, Ge(0), Le(100)]
    """Further attempts of a trial after failures of this kind."""
    then: Literal["fail", "prune"]
    """The trial's state after the last attempt: FAIL, or PRUNED with its last finite reported value."""


class DivergencePolicy(Policy):
    """The policy for trials that diverged, and the divergence guard."""

    retries: Annotated[int, Ge(0), Le(100)] = 0
    then: Literal["fail", "prune"] = "prune"
    patience: Annotated[int, Ge(0), Le(100_000)] = 3
    """Diverging reports in a row after which the guard ends a trial. 0 turns the guard off."""
    factor: Annotated[float, Gt(1)] = 100.0
    """A report diverges if it is not finite, or worse by this factor than all earlier reports."""


class MemoryPolicy(Policy):
    """The policy for out-of-memory failures."""

    halve: bool
    """Whether each retry starts again with micro-batches of half the size. Gradients are accumulated, so the batch stays the
    same."""


class Policies(pydantic.BaseModel):
    """The section [failures] of a study file."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True)

    out_of_memory: MemoryPolicy = MemoryPolicy(retries=4, then="fail", halve=True)
    """GPU or main memory ran out. With `halve`, each retry starts again with micro-batches of half the size."""
    cuda_error: Policy = Policy(retries=2, then="fail")
    """Another error of CUDA, cuDNN, cuBLAS, cuSOLVER or NCCL."""
    diverged: DivergencePolicy = DivergencePolicy()
    """A loss or result is not finite. Or `patience` reports in a row are not finite, or worse by `factor` than all earlier
    ones."""
    exception: Policy = Policy(retries=0, then="fail")
    """Any other exception of user code, SystemExit included."""
    data_error: Policy = Policy(retries=1, then="fail")
    """A file or a DataLoader worker failed."""
    time_limit: Policy = Policy(retries=0, then="prune")
    """The trial trained for longer than budget.trial_timeout."""
    lost_worker: Policy = Policy(retries=2, then="fail")
    """The worker died, or did not renew its lease in time."""
    in_a_row: Annotated[int, Ge(1)] = 10
    """Consecutive trials ended by the same kind that stop the study."""

    @pydantic.field_validator("*", mode="before")
    @classmethod
    def _fill(cls, given: Any, info: pydantic.ValidationInfo) -> Any:
        """Fill a partly written policy from its default."""
        assert info.field_name is not None
        default = cls.model_fields[info.field_name].default
        fills = isinstance(given, dict) and isinstance(default, Policy)
        return {**default.model_dump(exclude_unset=True), **given} if fills else given

    def instead_of(self, earlier: Policies) -> Policies:
        """Return these policies for a study that has had others. A study without a guard gets one only if these name it."""
        if earlier.diverged.patience or "patience" in self.diverged.model_fields_set:
            return self
        return self.model_copy(update={"diverged": self.diverged.model_copy(update={"patience": 0})})

    def of(self, kind: Kind) -> Policy:
        """Return the policy of a kind."""
        policy: Policy = getattr(self, kind.value)
        return policy


@dataclass(frozen=True, kw_only=True)
class Failure:
    """One failed attempt: its kind, a one-line message and the traceback; of a program the last lines of its output."""

    kind: Kind
    message: str
    traceback: str | None = None

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """Return the failure of an attempt that raised this exception."""
        # Of a program its last lines tell more than where hpo noticed its end.
        of_program = next((one for one in _chain(error) if isinstance(one, ProgramError)), None)
        told = "".join(traceback.format_exception(error)) if of_program is None else str(of_program)
        return cls(kind=kind_of(error), message=_in_a_line(error), traceback=told)


class Verdict(StrEnum):
    """The reaction to a failure."""

    RETRY = "retry"  #: parked for another attempt
    PRUNE = "prune"  #: settled as PRUNED
    FAIL = "fail"  #: settled as FAIL
    DROP = "drop"  #: nothing was written: another worker owns the trial, or a person ended it


def kind_of(error: BaseException) -> Kind:
    """Return the kind of the first exception in the chain that matches a kind, else EXCEPTION.

    The chain goes from the raised exception to its causes.
    """
    return next((kind for one in _chain(error) for kind, shows in SIGNS.items() if shows(one)), Kind.EXCEPTION)


def signal_behind(error: BaseException) -> Signal | None:
    """Return the first Signal in an exception's chain, None without one.

    User code may raise while it cleans up after a Signal.
    """
    return next((one for one in _chain(error) if isinstance(one, Signal)), None)


def _text(error: BaseException) -> str:
    """Return an exception's message, "" if its `__str__` raises."""
    try:
        return str(error)
    except Exception:
        return ""


def _in_a_line(error: BaseException) -> str:
    name = type(error).__qualname__
    module = type(error).__module__
    said = _text(error).strip().splitlines()
    if isinstance(error, HpoError | Signal) and said:
        return said[0][:LONGEST_MESSAGE]  # our own messages need no type in front
    named = name if module in ("builtins", "__main__") else f"{module}.{name}"
    return f"{named}: {said[0]}"[:LONGEST_MESSAGE] if said else named


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        yield found
        seen.add(id(found))
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)


def _named(error: BaseException, name: str) -> bool:
    """Return whether an error's class or a base class has this name. So torch's classes are found without importing torch."""
    return any(kind.__name__ == name for kind in type(error).__mro__)


def _says(error: BaseException, *texts: str) -> bool:
    return isinstance(error, RuntimeError) and any(text in _text(error) for text in texts)


def _is_out_of_memory(error: BaseException) -> bool:
    # torch's CPU allocator and the CUDA libraries raise a plain RuntimeError.
    texts = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
    return isinstance(error, MemoryError) or _named(error, "OutOfMemoryError") or _says(error, *texts)


def _is_cuda_error(error: BaseException) -> bool:
    texts = (
        "CUDA error",
        "CUDA driver error",
        "CUDNN_STATUS",
        "cuDNN error",
        "CUBLAS_STATUS",
        "CUSOLVER_STATUS",
        "NCCL error",
    )
    return _named(error, "AcceleratorError") or _says(error, *texts)


def _is_data_error(error: BaseException) -> bool:
    if isinstance(error, OSError | EOFError) or "in DataLoader worker process" in _text(error):
        return True
    return _says(error, "DataLoader worker")


#: kind -> whether an exception is of this kind; the first match counts
SIGNS: Mapping[Kind, Callable[[BaseException], bool]] = {
    Kind.TIME_LIMIT: lambda error: isinstance(error, TimeUp),
    Kind.LOST_WORKER: lambda error: isinstance(error, Unasked),
    Kind.DIVERGED: lambda error: isinstance(error, Diverged),
    Kind.OUT_OF_MEMORY: _is_out_of_memory,
    Kind.CUDA_ERROR: _is_cuda_error,
    Kind.DATA_ERROR: _is_data_error,
}
