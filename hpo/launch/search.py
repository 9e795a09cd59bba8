"""One search from its study file to its end: read the file, make or join the study, run workers on this machine.

`hpo run` and `hpo.search` call these functions in their order. Heavy modules are imported where they are needed, so that the
first stages are shown at once.
"""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hpo import text
from hpo.errors import SpecError
from hpo.loading import uncollected

if TYPE_CHECKING:
    from hpo.launch.placement import Placement
    from hpo.spec.study_file import StudySpec
    from hpo.study.resolve import StudyFile
    from hpo.study.status import Summary
    from hpo.study.study import Study
    from hpo.view.live import LiveView


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A study that was made or joined, and what is left to do in it."""

    study: Study
    code_folder: Path  # of the user's code on this machine
    is_new: bool
    standing: Summary  # before this run

    @property
    def joined(self) -> str:
        """Whether the study is new, in words."""
        return "new study" if self.is_new else f"joined, {self.standing.spent} trials"


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How the workers of a run have ended."""

    exit_code: int = 0  # 128 + the signal that ended the run, else 2 or 1 if workers failed
    last_words: str = ""  # of failed workers
    is_deleted: bool = False  # a new study that no worker could join


def load(file: Path, view: LiveView, *, name: str | None, code: Path | None) -> StudySpec:
    """Read a study file without the parts that it names. Raises SpecError that lists all mistakes."""
    view.stage(f"reading {file}")
    from hpo.spec.study_file import StudySpec

    try:
        return StudySpec.load(file, name=name)
    except SpecError:
        from hpo.study import resolve

        resolve.read(file, name=name, code_folder=code)  # its error lists wrong values too
        raise


def warm_up(loaded: StudySpec) -> None:
    """Let the server of the workers load its modules while this process loads its own."""
    from hpo.launch import fork_server

    fork_server.warm_up(loaded.executor if loaded.is_declared else None, measures=bool(loaded.watch.get("metrics")))


def warm_up_for(file: Path) -> None:
    """Do the same before the study file is checked, since the check loads modules too. `load` says what is wrong with a file."""
    from hpo.launch import fork_server
    from hpo.spec import metrics, toml_file, usercode

    with contextlib.suppress(SpecError, OSError):
        document = toml_file.read(file)
        executor = None if document.keys() & {*usercode.OWN} else str(document.get("executor", "auto"))
        watch = document.get("watch")
        watched = watch.get("metrics") if isinstance(watch, dict) else None
        fork_server.warm_up(executor, measures=bool(watched) or document.get("metric", "loss") not in metrics.ALWAYS)


def place_workers(
    loaded: StudySpec, wanted: int | None, *, gpus: str | None = None, per_gpu: int | None = None
) -> Placement:
    """Return the places of the workers to start. Warn of more than this machine can use, and of GPUs that are left to others.

    Args:
        loaded: the study file.
        wanted: how many workers; None for the number in the file, or as many as fill this machine.
        gpus: the GPUs to use: "all", "none" or a list; None for those that nobody else uses.
        per_gpu: how many workers share a GPU; None for one.

    Raises SpecError for GPUs that are not there, and for far too many workers.
    """
    from hpo.launch import placement

    count = loaded.workers if wanted is None else wanted
    if wanted is None and per_gpu is not None:
        count = None
    found = placement.place(count, processes=loaded.processes, wanted=gpus, per_gpu=per_gpu)
    count = len(found.places)
    warning = placement.check_count(count, is_declared=loaded.is_declared, devices=found.gpu_count) if count else None
    for line in [*found.notes(), *([warning] if warning else [])]:
        text.say(f"warning: {line}", to=sys.stderr)
    return found


def complete(loaded: StudySpec, file: Path, view: LiveView, *, code: Path | None, workers: int) -> StudyFile:
    """Resolve a loaded study file. What user code prints during its import goes to stderr. Warn of a double correction.

    Args:
        loaded: what the file says.
        file: the file.
        view: shows what is waited for.
        code: the folder of the user's code, if it is not the file's folder.
        workers: how many workers will be started here.

    Raises SpecError if a value is wrong, if nothing is searched, or if data are missing on a machine that starts workers.
    """
    from hpo.spec import imbalance

    view.stage(f"{loaded.name}: loading {' and '.join(_heavy(loaded))}, some seconds")
    # User code may change the folder, and print.
    with uncollected(), contextlib.chdir("."), contextlib.redirect_stdout(sys.stderr):
        from hpo.study import resolve

        found = resolve.complete(loaded, file, code_folder=code)
    if found.spec.is_pinned:
        raise SpecError(f"{file}: has no range or choices to search; train it with `{text.command('train', file)}`")
    if workers:
        resolve.refuse_missing_data(found)
    for line in imbalance.corrected_twice(found.spec):
        text.say(f"warning: {line}", to=sys.stderr)
    return found


def _heavy(loaded: StudySpec) -> list[str]:
    """Return what takes long to load."""
    if loaded.command is not None:
        return ["Optuna"]
    return ["torch" if loaded.is_declared else "your objective", "Optuna"]


def open_study(found: StudyFile, view: LiveView, *, url: str, trials: int | None, allow_code_change: bool) -> Opened:
    """Make the study, or join it. The storage is made if it is missing.

    Args:
        found: the resolved study.
        view: shows what is waited for.
        url: the storage.
        trials: the study's budget, if it is not the one of its spec.
        allow_code_change: record changed user code instead of refusing it.

    Raises StorageError, MismatchError or StudyError as `connect` and `create_or_join` do.
    """
    view.stage(f"{found.spec.name}: opening its storage")
    from hpo.storage.connect import connect
    from hpo.study import study as studies
    from hpo.study.status import summarize

    place = connect(url, create=True)
    is_new = found.spec.name not in studies.names(place)
    if not is_new:
        with contextlib.chdir("."), contextlib.redirect_stdout(sys.stderr):
            found = found.joining(studies.join(place, found.spec.name).spec)
    study = studies.create_or_join(
        place,
        found.spec,
        code_folder=found.code_folder,
        code_digest=found.code_digest,
        trials_budget=trials,
        allow_code_change=allow_code_change,
    )
    folder = study.code_folder if study.spec.is_pickled else found.code_folder
    return Opened(study=study, code_folder=folder, is_new=is_new, standing=summarize(study))


def nothing_to_do(opened: Opened) -> str:
    """Return why no worker is to be started, "" if there is something to do."""
    from hpo.view import words

    if opened.standing.hold:
        return f"no worker is started: {words.held(opened.standing)}"
    if opened.standing.is_over:
        reason = opened.study.stop_reason or "the budget is spent; --trials N raises it"
        return f"nothing is left to do: {reason}"
    return ""


def time_limit(found: StudyFile, given: float | None) -> float | None:
    """Return the time limit of a run in seconds: the given one, else that of the study file; None without a limit."""
    from hpo.spec.durations import seconds

    timeout = found.spec.budget.timeout
    return seconds(timeout, "budget.timeout") if given is None and timeout else given


def run(
    opened: Opened,
    view: LiveView,
    *,
    placement: Placement,
    limit: float | None,
    allow_code_change: bool,
    may_exit: bool = True,
) -> Ending:
    """Run workers until the budget is spent, the time is up, or a signal arrives. Delete a new study that none could join.

    Args:
        opened: the study.
        view: shows the progress.
        placement: the places of the workers; at least one.
        limit: the time limit in seconds.
        allow_code_change: as for `open_study`.
        may_exit: let a third signal end this process at once.

    Raises StorageError if the storage has too few connections, or fails for longer than `recovery.outage_patience`.
    """
    from hpo.launch import launcher
    from hpo.launch.local import Fleet
    from hpo.launch.slots import last_words
    from hpo.storage.connect import check_connections

    study = opened.study
    check_connections(study.storage, len(placement.places))
    fleet = Fleet(study, placement, code_folder=opened.code_folder, allow_code_change=allow_code_change)
    exit_code = launcher.run_workers(study, fleet, view, timeout=limit, may_exit=may_exit)
    is_deleted = opened.is_new and fleet.refused and _is_ours_alone(opened)
    if is_deleted:  # the file has a mistake that only workers see, such as wrong data
        study.storage.optuna.delete_study(study.study_id)
    return Ending(exit_code=exit_code or fleet.exit_code, last_words=last_words(fleet.failed), is_deleted=is_deleted)


def _is_ours_alone(opened: Opened) -> bool:
    """Return whether a new study has no trials but those of `start`, still queued, and the code that it was made with."""
    from hpo.study.study import join

    study = opened.study
    is_same_code = join(study.storage, study.name).code_folder == opened.code_folder
    held = study.optuna.get_trials(deepcopy=False)
    return is_same_code and [trial.state.name for trial in held] == ["WAITING"] * len(study.spec.start)
