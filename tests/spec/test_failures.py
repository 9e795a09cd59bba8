"""What an exception means, on the errors that torch and the system really raise, and what a study file may say of it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from hpo.errors import Diverged, LostLease, Outage, Parked, Signal, SpecError, Stopped, TimeUp
from hpo.spec.failures import (
    LONGEST_MESSAGE,
    DivergencePolicy,
    Failure,
    Kind,
    MemoryPolicy,
    Policies,
    Policy,
    kind_of,
    signal_behind,
)
from hpo.spec.study_file import StudySpec
from tests.conftest import OWN_OBJECTIVE

CUDA_SAYS = (
    "CUDA error: device-side assert triggered\n"
    "CUDA kernel errors might be asynchronously reported at some other API call."
)


def raised(act: Callable[[], object]) -> BaseException:
    """Return what is raised."""
    try:
        act()
    except BaseException as error:
        return error
    pytest.fail("nothing was raised")


# --- kinds ------------------------------------------------------------------------------------------------------------

ERRORS: dict[str, tuple[BaseException, Kind]] = {
    "torch's allocator": (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), Kind.OUT_OF_MEMORY),
    "its older name": (torch.cuda.OutOfMemoryError("CUDA out of memory."), Kind.OUT_OF_MEMORY),
    "Python": (MemoryError(), Kind.OUT_OF_MEMORY),
    "the driver": (RuntimeError("CUDA driver error: out of memory"), Kind.OUT_OF_MEMORY),
    "a kernel": (torch.AcceleratorError("CUDA error: out of memory"), Kind.OUT_OF_MEMORY),
    "cuBLAS, memory": (
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        Kind.OUT_OF_MEMORY,
    ),
    "cuDNN, memory": (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), Kind.OUT_OF_MEMORY),
    "an accelerator": (torch.AcceleratorError(CUDA_SAYS), Kind.CUDA_ERROR),
    "CUDA": (RuntimeError(CUDA_SAYS), Kind.CUDA_ERROR),
    "cuDNN": (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), Kind.CUDA_ERROR),
    "cuBLAS": (
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`"),
        Kind.CUDA_ERROR,
    ),
    "cuSOLVER": (RuntimeError("cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR"), Kind.CUDA_ERROR),
    "NCCL": (RuntimeError("NCCL error in: ProcessGroupNCCL.cpp:1275, unhandled cuda error"), Kind.CUDA_ERROR),
    "the driver, else": (RuntimeError("CUDA driver error: invalid argument"), Kind.CUDA_ERROR),
    "a loss": (Diverged("the loss is nan"), Kind.DIVERGED),
    "the clock": (TimeUp("trained for longer than budget.trial_timeout"), Kind.TIME_LIMIT),
    "a missing file": (FileNotFoundError(errno.ENOENT, "No such file or directory"), Kind.DATA_ERROR),
    "a full disk": (OSError(errno.ENOSPC, "No space left on device"), Kind.DATA_ERROR),
    "a permission": (PermissionError(errno.EACCES, "Permission denied"), Kind.DATA_ERROR),
    "a connection": (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), Kind.DATA_ERROR),
    "a file cut off": (EOFError("Ran out of input"), Kind.DATA_ERROR),
    "an ordinary one": (ValueError("3 classes for 10"), Kind.EXCEPTION),
    "a plain RuntimeError": (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), Kind.EXCEPTION),
    "words of CUDA in another class": (ValueError("CUDA error: I only quote it"), Kind.EXCEPTION),
    "words of memory in another class": (KeyError("out of memory"), Kind.EXCEPTION),
    "the user's sys.exit": (SystemExit(3), Kind.EXCEPTION),
    "a recursion": (RecursionError("maximum recursion depth exceeded"), Kind.EXCEPTION),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_is_of_the_kind_that_its_class_or_its_text_shows(name: str) -> None:
    error, kind = ERRORS[name]
    assert kind_of(error) is kind


class Broken(Dataset[int]):
    """A data set of which no row can be read."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        if self.error is None:
            os._exit(1)
        raise self.error


REAL: dict[str, tuple[Callable[[], object], Kind]] = {
    "torch's allocator for the CPU": (lambda: torch.empty(2**60, dtype=torch.uint8), Kind.OUT_OF_MEMORY),
    "numpy": (lambda: np.empty(2**58, dtype=np.uint8), Kind.OUT_OF_MEMORY),
    "a file": (lambda: Path("/no/such/file").read_text(), Kind.DATA_ERROR),
    "torch.load": (lambda: torch.load("/no/such/file"), Kind.DATA_ERROR),
    "a DataLoader": (lambda: list(DataLoader(Broken(KeyError("label")), num_workers=1)), Kind.DATA_ERROR),
    "a DataLoader's killed worker": (lambda: list(DataLoader(Broken(None), num_workers=1)), Kind.DATA_ERROR),
    "a DataLoader without workers": (lambda: list(DataLoader(Broken(KeyError("label")))), Kind.EXCEPTION),
    "memory in a DataLoader": (lambda: list(DataLoader(Broken(MemoryError()), num_workers=1)), Kind.OUT_OF_MEMORY),
    "shapes": (lambda: torch.ones(2, 3) @ torch.ones(2, 3), Kind.EXCEPTION),
}


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # a DataLoader's way to start its workers
@pytest.mark.parametrize("name", REAL)
def test_what_torch_and_the_system_raise_is_of_its_kind(name: str) -> None:
    act, kind = REAL[name]
    assert Failure.of(raised(act)).kind is kind


def over(inner: BaseException, how: str) -> BaseException:
    """Return a ValueError raised while `inner` was handled: with it as its `cause`, as mere `context`, or `hidden`."""

    def act() -> None:
        try:
            raise inner
        except BaseException as error:
            if how == "cause":
                raise ValueError("while building the model") from error
            if how == "hidden":
                raise ValueError("while building the model") from None
            raise ValueError("while building the model")  # noqa: B904  (as user code forgets to)

    return raised(act)


@pytest.mark.parametrize("inner", [MemoryError(), RuntimeError(CUDA_SAYS), Diverged("nan"), EOFError()], ids=repr)
@pytest.mark.parametrize("how", ["cause", "context"])
def test_a_kind_is_found_behind_the_error_that_was_raised(inner: BaseException, how: str) -> None:
    assert kind_of(over(inner, how)) is kind_of(inner)
    assert kind_of(over(over(inner, "context"), how)) is kind_of(inner)


def test_what_user_code_hides_with_from_none_stays_hidden() -> None:
    assert kind_of(over(MemoryError(), "hidden")) is Kind.EXCEPTION


def test_a_named_cause_goes_before_the_context() -> None:
    def act() -> None:
        try:
            raise MemoryError
        except MemoryError:
            raise ValueError("no") from Diverged("nan")

    assert kind_of(raised(act)) is Kind.DIVERGED


def test_of_several_kinds_in_a_chain_the_outermost_counts() -> None:
    error = OSError("cannot write the crash report")
    error.__context__ = MemoryError()
    assert kind_of(error) is Kind.DATA_ERROR


def test_a_chain_that_bites_its_tail_ends() -> None:
    one, other = ValueError("one"), ValueError("other")
    one.__cause__, other.__cause__ = other, one
    assert kind_of(one) is Kind.EXCEPTION
    assert Failure.of(one).message == "ValueError: one"


@pytest.mark.parametrize("how", ["cause", "context"])
@pytest.mark.parametrize("signal", [Parked, Stopped, TimeUp, LostLease, Outage])
def test_a_signal_is_found_behind_what_user_code_raised_as_it_cleaned_up(how: str, signal: type[Signal]) -> None:
    inner = signal("let go")
    assert signal_behind(inner) is inner
    assert signal_behind(over(over(inner, "context"), how)) is inner
    assert signal_behind(over(inner, "hidden")) is None
    assert signal_behind(over(ValueError(), how)) is None


class Mute(Exception):
    """An error that cannot be told."""

    def __str__(self) -> str:
        raise RuntimeError("nor this")


def test_an_error_that_cannot_be_told_is_a_failure_all_the_same() -> None:
    failure = Failure.of(raised(lambda: exec("raise Mute", {"Mute": Mute})))
    assert failure.kind is Kind.EXCEPTION
    assert "Mute" in failure.message


# --- what is kept of an error -----------------------------------------------------------------------------------------


def test_a_failure_keeps_what_led_there() -> None:
    """A failure keeps what was said and where it happened with all that led there."""
    failure = Failure.of(over(RuntimeError("the cause of it all"), "cause"))
    assert failure.message == "ValueError: while building the model"
    assert failure.traceback is not None
    assert failure.traceback.startswith("Traceback (most recent call last):\n")
    assert failure.traceback.endswith("ValueError: while building the model\n")
    assert "RuntimeError: the cause of it all" in failure.traceback
    assert 'test_failures.py", line ' in failure.traceback


@pytest.mark.parametrize(
    ("error", "start"),
    [
        (ValueError("one\ntwo"), "ValueError: one"),
        (torch.AcceleratorError(CUDA_SAYS), "torch.AcceleratorError: CUDA error: device-side assert triggered"),
        (ValueError("\n\nblank lines first"), "ValueError:"),
        (ValueError(), "ValueError"),
        (SystemExit(3), "SystemExit: 3"),
        (SyntaxError("invalid syntax", ("mine.py", 3, 1, "a b\n")), "SyntaxError: invalid syntax"),
    ],
    ids=lambda given: type(given).__name__,
)
def test_the_message_is_one_line_that_names_the_error(error: BaseException, start: str) -> None:
    message = Failure.of(error).message
    assert message.startswith(start)
    assert len(message.splitlines()) == 1


def test_a_long_message_is_cut() -> None:
    """A message is cut where a table could not hold it and the traceback has all of it."""
    failure = Failure.of(ValueError("x" * 100_000))
    assert len(failure.message) == LONGEST_MESSAGE
    assert failure.message.startswith("ValueError: xxx")
    assert failure.traceback is not None
    assert "x" * 100_000 in failure.traceback


def test_a_note_on_an_error_does_not_take_the_place_of_its_message() -> None:
    error = ValueError("3 classes for 10")
    error.add_note("while reading train.csv")
    failure = Failure.of(error)
    assert failure.message.startswith("ValueError: 3 classes for 10")
    assert failure.traceback is not None
    assert "while reading train.csv" in failure.traceback


# --- policies ---------------------------------------------------------------------------------------------------------


def policies(**failures: Any) -> Policies:
    return StudySpec.from_document({**OWN_OBJECTIVE, "failures": failures}).failures


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"exception": {"tries": 2}}, "failures.exception.tries: failures.exception takes no 'tries'"),
    ({"exception": {"retrys": 2}}, "failures.exception.retrys: failures.exception takes no 'retrys' (did you mean"),
    ({"cuda_error": {"halve": True}}, "failures.cuda_error.halve: failures.cuda_error takes no 'halve'"),
    ({"exceptions": {"retries": 2}}, "failures.exceptions: failures takes no 'exceptions' (did you mean 'exc"),
    ({"lease_lost": {"retries": 2}}, "failures.lease_lost: failures takes no 'lease_lost'"),
    ({"exception": {"retries": -1}}, "failures.exception.retries = -1: input should be greater than or equal to 0"),
    ({"exception": {"retries": 101}}, "failures.exception.retries = 101: input should be less than or equal to 100"),
    ({"exception": {"retries": True}}, "failures.exception.retries = true: input should be a valid integer"),
    ({"exception": {"retries": "2"}}, "failures.exception.retries = '2': input should be a valid integer"),
    ({"exception": {"then": "park"}}, "failures.exception.then = 'park': input should be 'fail' or 'prune'"),
    ({"out_of_memory": {"halve": 1}}, "failures.out_of_memory.halve = 1: input should be true or false"),
    ({"exception": 3}, "failures.exception = 3: is not a table; write its keys under [failures.exception]"),
    ({"in_a_row": 0}, "failures.in_a_row = 0: input should be greater than or equal to 1"),
    ({"in_a_row": "10"}, "failures.in_a_row = '10': input should be a valid integer"),
    ({"in_a_row": {"retries": 1}}, "failures.in_a_row = { retries = 1 }: input should be a valid integer"),
]


@pytest.mark.parametrize(("given", "message"), REFUSALS, ids=lambda given: str(given)[:40])
def test_a_wrong_policy_is_refused_with_its_place(given: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as caught:
        policies(**given)
    assert str(caught.value).startswith(message)


def test_a_file_changes_a_part_of_a_policy_and_keeps_the_rest() -> None:
    changed = policies(exception={"retries": 3}, out_of_memory={"halve": False}, diverged={"then": "fail"})
    assert changed.exception == Policy(retries=3, then="fail")
    assert changed.out_of_memory == MemoryPolicy(retries=4, then="fail", halve=False)
    assert changed.diverged == DivergencePolicy(retries=0, then="fail", patience=3, factor=100.0)
    default = Policies().model_dump()
    touched = {"exception", "out_of_memory", "diverged"}
    assert {k: v for k, v in changed.model_dump().items() if k not in touched} == {
        k: v for k, v in default.items() if k not in touched
    }


def test_a_study_without_a_word_on_failures_has_the_defaults() -> None:
    assert policies() == Policies()
    assert StudySpec.from_document(OWN_OBJECTIVE).failures == Policies()


def test_policies_survive_the_way_through_a_study_s_document() -> None:
    spec = StudySpec.from_document({**OWN_OBJECTIVE, "failures": {"exception": {"retries": 3}, "in_a_row": 4}})
    assert StudySpec.from_document(spec.document).failures == spec.failures


def test_every_kind_that_can_end_an_attempt_has_a_policy() -> None:
    for kind in set(Kind) - {Kind.LEASE_LOST}:  # whoever lost its lease has no say in the trial any more
        assert isinstance(Policies().of(kind), Policy)
