"""Searching from Python: `hpo.search` and `hpo.open`."""

from __future__ import annotations

import numbers
import operator
import os
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpo import text
from hpo.api.borders import called
from hpo.api.settings import WAYS, document
from hpo.api.study import Study
from hpo.errors import SpecError, StudyError, located

if TYPE_CHECKING:
    from hpo.launch.search import Ending, Opened
    from hpo.spec.study_file import StudySpec
    from hpo.study.status import Summary

CALL = Path("hpo.search")  # in messages, in the place of a study file
STORAGE = 'a URL, such as "sqlite:///studies.db"'
_opening = threading.Lock()  # user code is imported by one search at a time


def search(
    what: str | os.PathLike[str] | Callable[..., Any],
    /,
    *,
    name: str | None = None,
    trials: int | None = None,
    workers: int | None = None,
    gpus: str | None = None,
    per_gpu: str | int = "auto",
    timeout: str | float | None = None,
    storage: str | None = None,
    code: str | os.PathLike[str] | None = None,
    allow_code_change: bool = False,
    progress: bool = True,
    **settings: Any,
) -> Study:
    """Search as `hpo run` does: make or join the study, run workers until the budget is spent, return the study.

    ```python
    study = hpo.search("digits.toml", workers=2)
    study = hpo.search(objective, name="mine", trials=50, direction="maximize")
    study = hpo.search(train, name="mine", direction="maximize", space={"lr": {"low": 1e-4, "high": 0.1, "log": True}})
    ```

    A second call with the same arguments goes on with the study. An interrupt parks the running trials, then KeyboardInterrupt
    is raised.

    Args:
        what: a study file, or a function that returns a number. It takes a trial, or with a `space` a dict and a trial.
        name: the study's name. A file has one; a function's study needs it.
        trials: the study's trials in all, over every call.
        workers: processes on this machine. By default one per GPU, without a GPU one per core. 0 only makes the study.
        gpus: the GPUs to use: numbers or UUIDs such as "0,1", or "all" or "none". By default all that nobody else uses.
        per_gpu: how many workers share a GPU. "auto" means one.
        timeout: the time limit of this call, in seconds or such as "30m". Unfinished trials are parked.
        storage: the database's URL. By default $HPO_STORAGE, then that of the file, then sqlite:///studies.db.
        code: the folder of a study file's own code, if it is not the file's folder.
        allow_code_change: go on although the code has changed. The study records the change.
        progress: show the progress on stderr, or in a notebook below the cell.
        settings: for a function, what a study file would say, such as `direction="minimize"`, `sampler="random"`,
            `recovery={"checkpoint_every": "10s"}`. A part may be its name alone.

    Raises SpecError for a wrong file, setting or function. Raises MismatchError if the study was made with other settings or
    other code. Raises StorageError if the database fails. Raises StudyError if no worker could go on, if the study stopped
    itself, or if every trial has failed.
    """
    from hpo.launch import search as steps
    from hpo.launch.placement import sharers
    from hpo.spec import optuna_calls, user_path
    from hpo.view import notebook

    optuna_calls.check_not_importing()
    limit = _seconds(timeout)
    _refuse_no_text("storage", storage, STORAGE)
    workers = _count("workers", workers, least=0)
    _refuse_no_text("gpus", gpus, 'a text, such as "0,1", "all" or "none"')
    shared = sharers(per_gpu, "per_gpu")
    trials = _count("trials", trials, least=1)
    view = notebook.view(is_quiet=not progress)
    folder: Path | None  # of the code
    with tempfile.TemporaryDirectory(prefix="hpo-") as pickles, view, _opening, user_path.borrowed():
        if callable(what):
            _refuse_beside_a_function(settings, code)
            file = CALL
            loaded, folder = _of_function(what, name, settings, Path(pickles))
        else:
            if not isinstance(what, str | os.PathLike):
                raise TypeError(f"hpo.search: {what!r} has type {type(what).__name__}; give a study file or a function")
            file, folder = Path(what), None if code is None else Path(code)
            if settings:
                raise TypeError(
                    f"hpo.search: {', '.join(settings)}: write it into {file}; only a function takes settings"
                )
            loaded = steps.load(file, view, name=name, code=folder)
        if workers != 0:
            steps.warm_up(loaded)
        with called():
            placement = steps.place_workers(loaded, workers, gpus=gpus, per_gpu=shared)
            found = steps.complete(loaded, file, view, code=folder, workers=len(placement.places))
            from hpo.storage.connect import storage_url

            url = storage_url(storage, found.spec.storage)
            opened = steps.open_study(found, view, url=url, trials=trials, allow_code_change=allow_code_change)
    with called():
        if why := steps.nothing_to_do(opened):
            if opened.standing.hold or opened.standing.stop_reason:
                text.say(why, to=sys.stderr)
        elif placement.places:
            ending = steps.run(
                opened,
                view,
                placement=placement,
                limit=steps.time_limit(found, limit),
                allow_code_change=allow_code_change,
                may_exit=False,
            )
            _raise_signal(ending)
            _raise_failures(opened, ending)
        _raise_if_broken(opened)
    return Study(opened.study.storage, opened.study.name)


def open_study(name: str, *, storage: str | None = None) -> Study:
    """Open a study, also one that Optuna made, which is only read.

    Args:
        name: the study's name.
        storage: the database's URL. By default $HPO_STORAGE, then sqlite:///studies.db.

    Raises StudyError if there is no such study, StorageError if there is no such database.
    """
    _refuse_no_text("name", name, "the study's name, a text")
    _refuse_no_text("storage", storage, STORAGE)
    with called():
        from hpo.storage.connect import connect, storage_url
        from hpo.study import plain

        place = connect(storage_url(storage), only_reads=True)
        plain.open_any(place, name)
        return Study(place, name)


def _refuse_beside_a_function(settings: dict[str, Any], code: object) -> None:
    if wrong := [key for key in ("objective", "train", "command") if key in settings]:
        raise SpecError(f"hpo.search: {', '.join(wrong)}: the function is what is searched; leave it out")
    if code is not None:
        raise SpecError(f"hpo.search: code = {code!r}: only a study file takes it; leave it out for a function")


def _seconds(timeout: str | float | None) -> float | None:
    from hpo.spec.durations import seconds

    if isinstance(timeout, str):
        return seconds(timeout, "timeout")
    if timeout is not None and (isinstance(timeout, bool) or not isinstance(timeout, numbers.Real) or not timeout > 0):
        raise SpecError(f'timeout = {timeout!r}: is no time; give seconds above 0, or a text such as "30m"')
    return None if timeout is None else float(timeout)


def _refuse_no_text(key: str, value: object, mend: str) -> None:
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{key} = {value!r}: has type {type(value).__name__}; give {mend}")


def _count(key: str, value: int | None, *, least: int) -> int | None:
    """Return a number of things. Whole numbers of NumPy count, True does not."""
    if value is None:
        return None
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if isinstance(value, bool) or number < least:
        raise SpecError(f"{key} = {value!r}: give a whole number from {least} on")
    return number


def _of_function(
    function: Callable[..., Any], name: str | None, settings: dict[str, Any], pickles: Path
) -> tuple[StudySpec, Path]:
    """Return the spec of a function's study, and the folder that its code is loaded from.

    Args:
        pickles: the folder for a function that cannot be imported.
    """
    from hpo.spec import pickled, usercode
    from hpo.spec.study_file import StudySpec

    if name is None:
        raise SpecError('hpo.search: name: missing; a function\'s study needs one, such as name="mine"')
    given = document(settings)
    with located(CALL):
        found = usercode.reference_of(function)
        reference = found.reference if found else pickled.write(function, pickles)
        kind = "train" if "space" in settings else "objective"
        spec = StudySpec.from_document({"name": name, kind: reference, **given})
        if kind == "train" and spec.is_pinned:
            raise SpecError(f"space: has no range or choices to search; {WAYS}")
    return spec, found.folder if found else pickles


def _raise_signal(ending: Ending) -> None:
    """Hand a signal that ended the search on to the handlers of the caller: for Ctrl-C, raise KeyboardInterrupt."""
    if ending.exit_code > 128:
        signal.raise_signal(ending.exit_code - 128)
        raise KeyboardInterrupt


def _raise_failures(opened: Opened, ending: Ending) -> None:
    """Raise StudyError if workers failed and trials are left to do. Warn if the others have done them."""
    if not ending.last_words:
        return
    lines = ending.last_words.splitlines()
    if not ending.is_deleted and _standing(opened).is_over:
        warnings.warn("\n".join(lines), stacklevel=3)
    else:
        raise StudyError(f"study {opened.study.name!r}: its workers failed", *lines)


def _raise_if_broken(opened: Opened) -> None:
    """Raise StudyError if the study stopped itself, or if every trial has failed."""
    from hpo.view import words

    summary = _standing(opened)
    if not summary.has_failed:
        return
    why = words.held(summary) or "every trial has failed"
    raise StudyError(
        f"study {summary.name!r}: {why}",
        *(f"  {words.failures(failure)}, the last: {failure.message}" for failure in summary.failures),
        f"  the workers' logs: {summary.logs}",
    )


def _standing(opened: Opened) -> Summary:
    from hpo.study import study as studies
    from hpo.study.status import summarize

    return summarize(studies.join(opened.study.storage, opened.study.name))
