"""Why an attempt at a trial failed, by kind, and what a study does about each kind.

A kind is read off the exception, the ones behind it included. What is done: the trial is parked for another attempt, at
most `retries` times for each kind, then it ends as FAIL or PRUNED.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, Literal

import pydantic
from annotated_types import Ge, Le

from hpo.errors import Diverged, HpoError, Signal, TimeUp, Unasked

LONGEST_MESSAGE = 500  # characters of a failure's line; the traceback has them all


class Kind(StrEnum):
    """What an attempt can fail by."""

    OUT_OF_MEMORY = "out_of_memory"  #: of the GPU or of the machine
    CUDA_ERROR = "cuda_error"  #: anything else that CUDA, cuDNN, cuBLAS or NCCL raise: the process is spoiled
    DIVERGED = "diverged"  #: a loss or a result that is no finite number
    EXCEPTION = "exception"  #: raised by user code, SystemExit included
    DATA_ERROR = "data_error"  #: reading files or a DataLoader's worker failed
    TIME_LIMIT = "time_limit"  #: the trial trained for longer than budget.trial_timeout
    LOST_WORKER = "lost_worker"  #: its worker died, in whatever way, or fell silent for longer than its lease
    LEASE_LOST = (
        "lease_lost"  #: a worker came back to find its trial taken: it drops the trial, which goes on elsewhere
    )


#: After these the worker's process starts afresh: what they leave behind would fail the next trial too.
SPOILING = frozenset({Kind.OUT_OF_MEMORY, Kind.CUDA_ERROR})


class Policy(pydantic.BaseModel):
    """What is done about one kind of failure."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True)

    retries: Annotated[int, Ge(0), Le(100)]
    """Further attempts at a trial after failures of this kind."""
    then: Literal["fail", "prune"]
    """How the trial ends after the last: FAIL, or PRUNED with the last finite value that it reported."""


class MemoryPolicy(Policy):
    """What is done when memory runs out."""

    halve: bool
    """Whether each retry starts over with gradients accumulated over micro-batches of half the size: the same batch."""


class Policies(pydantic.BaseModel):
    """The section [failures] of a study file."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True)

    out_of_memory: MemoryPolicy = MemoryPolicy(retries=4, then="fail", halve=True)
    cuda_error: Policy = Policy(retries=2, then="fail")
    diverged: Policy = Policy(retries=0, then="prune")
    exception: Policy = Policy(retries=0, then="fail")
    data_error: Policy = Policy(retries=1, then="fail")
    time_limit: Policy = Policy(retries=0, then="prune")
    lost_worker: Policy = Policy(retries=2, then="fail")
    in_a_row: Annotated[int, Ge(1)] = 10
    """Trials ended by one kind, one after the other, that stop the study."""

    @pydantic.field_validator("*", mode="before")
    @classmethod
    def _fill(cls, given: Any, info: pydantic.ValidationInfo) -> Any:
        """Let a file change a part of a policy."""
        assert info.field_name is not None
        default = cls.model_fields[info.field_name].default
        fills = isinstance(given, dict) and isinstance(default, Policy)
        return {**default.model_dump(), **given} if fills else given

    def of(self, kind: Kind) -> Policy:
        """Return the policy of a kind."""
        policy: Policy = getattr(self, kind.value)
        return policy


@dataclass(frozen=True, kw_only=True)
class Failure:
    """One failed attempt: its kind, what was said in a line, and where it happened."""

    kind: Kind
    message: str
    traceback: str | None = None

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """Return the failure that an exception means."""
        told = "".join(traceback.format_exception(error))
        return cls(kind=kind_of(error), message=_in_a_line(error), traceback=told)


class Verdict(StrEnum):
    """What was done about a failure."""

    RETRY = "retry"  #: parked: the next claim makes another attempt
    PRUNE = "prune"  #: settled as PRUNED
    FAIL = "fail"  #: settled as FAIL
    DROP = "drop"  #: nothing: the trial is in other hands, or a person has ended it


def kind_of(error: BaseException) -> Kind:
    """Return the kind of the first exception, from the raised one to its causes, that shows one; else EXCEPTION."""
    return next((kind for one in _chain(error) for kind, shows in SIGNS.items() if shows(one)), Kind.EXCEPTION)


def signal_behind(error: BaseException) -> Signal | None:
    """Return the Signal that an exception came after, as from user code that cleans up when a trial must let go."""
    return next((one for one in _chain(error) if isinstance(one, Signal)), None)


def _text(error: BaseException) -> str:
    """Return what an exception says, whatever its own code for that does."""
    try:
        return str(error)
    except Exception:
        return ""


def _in_a_line(error: BaseException) -> str:
    name = type(error).__qualname__
    module = type(error).__module__
    said = _text(error).strip().splitlines()
    if isinstance(error, HpoError | Signal) and said:
        return said[0][:LONGEST_MESSAGE]  # ours say what was wrong, the value and the mend
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
    """Say whether an error is of a class of this name: torch's own ones, without loading torch to ask."""
    return any(kind.__name__ == name for kind in type(error).__mro__)


def _says(error: BaseException, *texts: str) -> bool:
    return isinstance(error, RuntimeError) and any(text in _text(error) for text in texts)


def _is_out_of_memory(error: BaseException) -> bool:
    # torch's allocator for the CPU, and the libraries below CUDA, raise a plain RuntimeError.
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


#: kind -> does an exception show it; the first that fits counts
SIGNS: Mapping[Kind, Callable[[BaseException], bool]] = {
    Kind.TIME_LIMIT: lambda error: isinstance(error, TimeUp),
    Kind.LOST_WORKER: lambda error: isinstance(error, Unasked),
    Kind.DIVERGED: lambda error: isinstance(error, Diverged),
    Kind.OUT_OF_MEMORY: _is_out_of_memory,
    Kind.CUDA_ERROR: _is_cuda_error,
    Kind.DATA_ERROR: _is_data_error,
}
