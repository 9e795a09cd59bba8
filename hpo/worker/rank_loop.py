"""The user's own training loop in a rank: `hpo.epochs` saves in a file of each rank, at epochs that the worker names."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from hpo.errors import Signal
from hpo.own.rank_channel import SAVED, Ask, EndOfEpoch, Task, file_of

if TYPE_CHECKING:
    from hpo.train.user_state import UserState

KEPT = 2  # saved epochs of a rank: another rank may not have saved the last one yet


class RankLoop:
    """The loop of one rank. All ranks save after the same epochs, and go on after the last one that all have saved."""

    def __init__(self, task: Task, ask: Callable[[Ask], Any]) -> None:
        self._task = task
        self._ask = ask
        self._rank, self._count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self._state: UserState | None = None

    def epochs(self, count: int, objects: Mapping[str, Any]) -> Iterator[int]:
        """Yield the epochs that are left, counted from 0."""
        for epoch in range(self._begin(objects, before=count), count):
            yield epoch
            self._end_epoch(epoch + 1, is_forced=False, is_last=epoch + 1 == count)

    def resume(self, objects: Mapping[str, Any]) -> int:
        """Load the rank's file of the last epoch that all ranks have saved; return how many epochs are finished.

        Raises RuntimeError for a second loop in the trial, TypeError or CheckpointError for objects that cannot be saved, and
        MismatchError if the file does not fit them.
        """
        return self._begin(objects)

    def _begin(self, objects: Mapping[str, Any], *, before: int | None = None) -> int:
        """Begin the loop, as `resume` does. Files of this epoch or a later one are not loaded: no epoch would be left."""
        from hpo.train import checkpoint
        from hpo.train.user_state import UserState

        if self._state is not None:
            raise RuntimeError("hpo.epochs or hpo.resume was called twice; a trial has one loop")
        self._state = state = UserState(objects)
        self._ask(Ask(call="loop"))
        start = self._task.resumes_at if before is None or self._task.resumes_at < before else 0
        if start:
            state.load_state_dict(checkpoint.load(file_of(self._task.save_to, start, self._rank, self._count)))
        checkpoint.refuse_objects(state.state_dict())
        return start

    def save(self, epoch: int) -> None:
        """Save the state after so many finished epochs; the trial is parked here if it is to be."""
        self._end_epoch(epoch, is_forced=True, is_last=False)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"{name}: a callback of hpo.integrations works in a trial with one process; with processes_per_trial write the "
            "loop with hpo.epochs"
        )

    def _end_epoch(self, epoch: int, *, is_forced: bool, is_last: bool) -> None:
        if self._state is None:
            raise RuntimeError("hpo.save was called before hpo.resume; call hpo.resume first")
        self._state.epoch = epoch
        answer: EndOfEpoch = self._ask(Ask(step="epoch", arguments=(is_forced, is_last, epoch)))
        if answer.saves:
            self._write(epoch, self._state)
        if answer.parks:
            raise Signal(f"trial {self._task.number} is parked after {epoch} epochs")

    def _write(self, epoch: int, state: UserState) -> None:
        from hpo.train import checkpoint

        folder = self._task.save_to
        checkpoint.save(file_of(folder, epoch, self._rank, self._count), state.state_dict())
        own = [
            match for file in folder.iterdir() if (match := SAVED.fullmatch(file.name)) and int(match[2]) == self._rank
        ]
        for match in sorted(own, key=lambda match: int(match[1]))[:-KEPT]:
            with suppress(FileNotFoundError):
                (folder / match[0]).unlink()
