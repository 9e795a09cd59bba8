"""The lines that a user's own training loop calls: `epochs`, `resume` and `save`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import optuna

    from hpo.worker.user_loop import UserLoop


def epochs(trial: optuna.Trial, count: int, /, **objects: Any) -> Iterator[int]:
    """Yield the epochs of a training loop, from 0 to `count - 1`, and go on after a kill where the loop stood.

    ```python
    for epoch in hpo.epochs(trial, 30, model=model, optimizer=optimizer, scheduler=scheduler):
        train(model, optimizer)
        scheduler.step()
        trial.report(accuracy(model), epoch)
    ```

    In a worker of `hpo` the last checkpoint is loaded into the objects before the first epoch. A checkpoint is saved after
    an epoch's body: if `recovery.checkpoint_every` has passed, if the trial is to be parked, and after the last epoch. The
    global random numbers of Python, NumPy, torch and CUDA are saved with it. Under `study.optimize` nothing is saved.

    With each report that is the best so far, the weights of all modules among the objects are copied to the CPU's memory.
    Each checkpoint holds this copy, which `load_weights` reads. With several objectives no report is the best.

    Args:
        trial: the trial that the objective got.
        count: how many epochs the whole loop has.
        objects: what changes from epoch to epoch. Each has `state_dict` and `load_state_dict`, or is a `torch.Generator`,
            or a dict that is changed in place. None stands for an object that this run does not have.

    Raises TypeError for an object that cannot be saved, or without objects. Raises CheckpointError for an object whose state
    would need pickle. Raises RuntimeError for a second loop in one
    trial, or after a report. Raises MismatchError if the checkpoint does not fit the objects.
    """
    loop = loop_of(trial)
    if loop is not None:
        return loop.epochs(count, objects)
    return iter(range(count))


def resume(trial: optuna.Trial, /, **objects: Any) -> int:
    """Load the trial's last checkpoint into the objects and return how many epochs are finished, 0 without a checkpoint.

    This is the low-level form of `epochs`, with the same objects and errors. Call `save` after each epoch and after its report.
    """
    loop = loop_of(trial)
    return 0 if loop is None else loop.resume(objects)


def save(trial: optuna.Trial, /, *, epoch: int) -> None:
    """Save the objects that `resume` got. A trial that is to be parked ends here.

    Report an epoch before it is saved. A later report is lost if the worker is killed before the next `save`.

    Args:
        trial: the trial that the objective got.
        epoch: how many epochs are finished.

    Raises RuntimeError if `resume` was not called.
    """
    loop = loop_of(trial)
    if loop is not None:
        loop.save(epoch)


def load_weights(path: Path | str) -> dict[str, Any]:
    """Return the weights in a checkpoint of `epochs` or `save`: the state dict of each module, by its name, on the CPU.

    ```python
    model.load_state_dict(hpo.load_weights(path)["model"])
    ```

    They are the weights at the trial's best report. If the trial reported nothing, or has several objectives, these are the
    states of all objects at the loop's end.

    Args:
        path: the checkpoint, which `hpo export` prints: a file, or a URL in object storage.

    Raises CheckpointError for a file that cannot be read, or that neither `epochs` nor `save` has written.
    """
    from hpo.spec import bucket_url
    from hpo.train import user_state

    if not bucket_url.is_url(str(path)):
        return user_state.load_weights(path)
    from hpo.study import bucket_store

    with bucket_store.downloaded(str(path)) as file:
        return user_state.load_weights(file)


def loop_of(trial: optuna.Trial) -> UserLoop | None:
    """Return the loop of a trial that a worker holds, None for any other trial. For `hpo.integrations`."""
    return getattr(trial, "loop", None)
