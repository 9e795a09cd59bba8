"""Commands that control a study: pause, resume, stop, enqueue, delete, doctor."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hpo import text
from hpo.cli.app import StorageOption, app, examples, open_to_read, quiet_optuna
from hpo.strategy.quiet import quiet_warnings

if TYPE_CHECKING:
    from hpo.storage.connect import Storage
    from hpo.study.queued_trials import QueuedTrial
    from hpo.study.study import Study

MOST_NAMES = 8  # parameters in a message
MOST_LEFT = 20  # lines on what a file has and the study does not search

StudyArgument = Annotated[str, typer.Argument(help="Name of the study.")]


@app.command(epilog=examples("hpo pause digits"))
def pause(study: StudyArgument, storage: StorageOption = None) -> None:
    """Pause a study: park running trials with a checkpoint. Workers wait until `hpo resume`."""
    from hpo.storage.connect import connect, storage_url
    from hpo.study import control
    from hpo.study import study as studies

    quiet_optuna()
    control.pause(studies.join(connect(storage_url(storage)), study))
    told = f"paused: running trials of {study!r} are parked at their next batch or report; next: "
    text.say_command(told, text.command("resume", study))


@app.command(epilog=examples("hpo resume digits"))
def resume(study: StudyArgument, storage: StorageOption = None) -> None:
    """Resume a study that was paused, was stopped, or stopped itself after too many failures in a row."""
    from hpo.storage.connect import connect, storage_url
    from hpo.study import control
    from hpo.study import study as studies

    quiet_optuna()
    was = control.resume(studies.join(connect(storage_url(storage)), study))
    text.say(f"{study!r} goes on; it was {was}" if was else f"{study!r} was neither paused nor stopped")


@app.command(epilog=examples("hpo stop digits", "hpo stop digits --trial 11", "hpo stop digits --now"))
def stop(
    study: StudyArgument,
    trial: Annotated[int | None, typer.Option("--trial", min=0, help="End only this trial.")] = None,
    now: Annotated[
        bool, typer.Option("--now", help="Also end running and parked trials, with their current values.")
    ] = False,
    storage: StorageOption = None,
) -> None:
    """Stop a study: no new trial is started, running trials are finished. `hpo resume` undoes it."""
    from hpo.storage.connect import connect, storage_url
    from hpo.study import control
    from hpo.study import study as studies

    quiet_optuna()
    joined = studies.join(connect(storage_url(storage)), study)
    if trial is not None:
        ended = control.stop_trial(joined, trial)
        text.say(f"trial {trial} has ended" if ended else f"trial {trial} ends at its next batch or report")
        return
    left = control.stop(joined, now=now)
    what = "end at their next batch or report" if now else "are still finished"
    text.say(f"stopped: no new trial is started in {study!r}" + (f"; {left} open trials {what}" if left else ""))


@app.command(
    epilog=examples(
        "hpo enqueue digits optimizer.name=adamw optimizer.lr=1e-3",
        "hpo enqueue digits --file best.toml",
        "hpo enqueue my-objective x=0.5",
    )
)
def enqueue(
    study: StudyArgument,
    values: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME=VALUE]...", help="Values of one configuration.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", help="Configurations as [[start]] tables, or a config as `hpo export` writes it."),
    ] = None,
    unknown: Annotated[
        bool, typer.Option("--unknown", help="Take parameters that no trial of your own objective has had yet.")
    ] = False,
    storage: StorageOption = None,
) -> None:
    """Queue known configurations. Workers take them before new trials. What is left out, the sampler chooses.

    Nothing is written if a name or a value is wrong. A queued trial counts as one of the budget once it begins.
    """
    from hpo.errors import SpecError, located
    from hpo.spec import configuration
    from hpo.storage.connect import connect, storage_url
    from hpo.study import configuration_file, queued_trials
    from hpo.study import study as studies

    if bool(values) == bool(file):
        raise SpecError("hpo enqueue: give either values such as lr=1e-3, or --file")
    quiet_optuna()
    joined = studies.join(connect(storage_url(storage)), study)
    given, left = [configuration.of_words(values or [])], []
    if file is not None:
        found = configuration_file.read(file, joined.spec)
        given, left = found.configurations, found.left
    with located(file) if file else nullcontext():
        queued = queued_trials.enqueue(joined, given, unknown=unknown)
    for one in queued:
        tell_queued(joined, one)
    tell_some(left, f"of {file}, not taken")
    tell_when(joined)


def tell_queued(study: Study, trial: QueuedTrial) -> None:
    """Print a queued trial, and what was not checked of it."""
    from hpo.spec import configuration

    text.say(f"queued trial {trial.number} of {study.name!r}: {configuration.text(trial.values)}")
    if trial.missing:
        further = f" and {len(trial.missing) - MOST_NAMES} more" if len(trial.missing) > MOST_NAMES else ""
        text.say(f"  the sampler chooses {', '.join(trial.missing[:MOST_NAMES])}{further}")
    if trial.unknown:
        text.say(
            f"  not checked, since no trial has had it: {', '.join(trial.unknown)}; "
            "what the objective does not ask for is ignored, and the worker's log says so"
        )


def tell_some(lines: list[str], why: str) -> None:
    """Print lines under a reason, at most MOST_LEFT of them."""
    for line in lines[:MOST_LEFT]:
        text.say(f"  {why}: {line}")
    if len(lines) > MOST_LEFT:
        text.say(f"  {why}: {len(lines) - MOST_LEFT} more")


def tell_when(study: Study) -> None:
    """Print why queued trials will not begin by themselves, if they will not."""
    from hpo.study.status import summarize
    from hpo.view import words

    summary = summarize(study)
    left, waiting = summary.budget - summary.spent, summary.counts["waiting"]
    if why := words.held(summary):
        text.say(f"  they begin once the study goes on; it is {why}")
    elif waiting > left:
        needed = summary.own_budget + waiting - left
        are = "is" if waiting == 1 else "are"
        again = text.command("run", "FILE", options=f"--trials {needed}")
        text.say_command(f"  {waiting} {are} queued and {max(0, left)} left of the budget: `", again, "` begins all")


@app.command(epilog=examples("hpo delete digits", "hpo delete digits --yes"))
def delete(
    study: StudyArgument,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    storage: StorageOption = None,
) -> None:
    """Delete a study with its trials, checkpoints and logs. It cannot be undone. Refused while workers are at work on it."""
    from hpo.storage.connect import connect, storage_url
    from hpo.study import deletion
    from hpo.study import study as studies

    quiet_warnings()
    joined = studies.join(connect(storage_url(storage)), study)
    deletion.refuse_if_at_work(joined)
    held = deletion.holdings(joined)
    if not yes and not typer.confirm(text.safe(f"delete study {study!r} for good: {held.text}?")):
        text.say("nothing was deleted")
        raise typer.Exit(1)
    deletion.delete(joined)
    text.say(f"deleted study {study!r}: {held.text}")


@app.command(epilog=examples("hpo doctor", "hpo doctor digits --repair", "hpo doctor --workers 64"))
def doctor(
    study: Annotated[str | None, typer.Argument(help="Name of a study. Default: all studies.")] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Repair every problem that needs no decision from you.")
    ] = False,
    fail: Annotated[
        int | None, typer.Option("--fail", min=0, help="Set this RUNNING trial of another program to FAIL.")
    ] = None,
    release: Annotated[
        int | None,
        typer.Option("--release", min=0, help="Park this trial, whose worker on another machine is gone."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Check whether the storage can serve this many workers.")
    ] = None,
    storage: StorageOption = None,
) -> None:
    """Check studies and their storage for problems. Exit code 1 if some are left."""
    from hpo.storage.connect import connect, storage_url
    from hpo.study import doctor

    quiet_warnings()
    writes = repair or fail is not None or release is not None
    place = connect(storage_url(storage)) if writes else open_to_read(storage)
    if fail is not None or release is not None:
        _end_by_hand(place, study, fail, release)
    problems = 0
    for finding in doctor.findings(place, study, repair=repair, workers=workers):
        text.say_page(finding.text)
        problems += finding.is_ill
    text.say(f"{problems} to mend" if problems else "nothing to mend")
    raise typer.Exit(1 if problems else 0)


def _end_by_hand(place: Storage, study: str | None, fail: int | None, release: int | None) -> None:
    from hpo.errors import SpecError
    from hpo.study import control
    from hpo.study import study as studies

    if study is None:
        option = f"--fail {fail}" if fail is not None else f"--release {release}"
        raise SpecError(f"{option}: needs the name of the trial's study; add it after `hpo doctor`")
    opened = studies.join(place, study)
    if fail is not None:
        control.fail_foreign(opened, fail)
        text.say(f"trial {fail} of {study!r} is FAIL now")
    if release is not None:
        control.release(opened, release)
        text.say(f"trial {release} of {study!r} is parked now")
