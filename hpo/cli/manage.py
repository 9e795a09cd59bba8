"""Commands that steer a study: pause, resume, stop, doctor."""

from __future__ import annotations

from typing import Annotated

import typer

from hpo import text
from hpo.cli.app import StorageOption, app, quiet_optuna, storage_url

StudyArgument = Annotated[str, typer.Argument(help="Name of the study.")]


@app.command()
def pause(study: StudyArgument, storage: StorageOption = None) -> None:
    """Park what runs, with a checkpoint, and let the workers wait until `hpo resume`."""
    from hpo.storage.connect import connect
    from hpo.study import control
    from hpo.study import study as studies

    quiet_optuna()
    control.pause(studies.join(connect(storage_url(storage)), study))
    told = f"paused: running trials of {study!r} are parked at their next batch or report; next: "
    text.say_command(told, text.command("resume", study))


@app.command()
def resume(study: StudyArgument, storage: StorageOption = None) -> None:
    """Go on with a study that was paused, stopped, or stopped itself after too many failures in a row."""
    from hpo.storage.connect import connect
    from hpo.study import control
    from hpo.study import study as studies

    quiet_optuna()
    was = control.resume(studies.join(connect(storage_url(storage)), study))
    text.say(f"{study!r} goes on; it was {was}" if was else f"{study!r} was neither paused nor stopped")


@app.command()
def stop(
    study: StudyArgument,
    trial: Annotated[int | None, typer.Option("--trial", min=0, help="End this trial alone.")] = None,
    now: Annotated[
        bool, typer.Option("--now", help="End running and parked trials too, with the values they have.")
    ] = False,
    storage: StorageOption = None,
) -> None:
    """Start no new trial from now on; what runs is still finished. `hpo resume` takes it back."""
    from hpo.storage.connect import connect
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


@app.command()
def doctor(
    study: Annotated[str | None, typer.Argument(help="Name of a study; all of them if left out.")] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Mend what can be mended without a decision of yours.")
    ] = False,
    fail: Annotated[
        int | None, typer.Option("--fail", min=0, help="Make this RUNNING trial of another program FAIL.")
    ] = None,
    release: Annotated[
        int | None,
        typer.Option("--release", min=0, help="Park this trial of a worker on another machine, which is gone."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Workers that the storage is to carry.")
    ] = None,
    storage: StorageOption = None,
) -> None:
    """Look for what ails studies and their storage; exit code 1 if something is left to mend."""
    from hpo.errors import SpecError
    from hpo.storage.connect import connect
    from hpo.study import control, doctor
    from hpo.study import study as studies

    quiet_optuna()
    place = connect(storage_url(storage))
    if fail is not None:
        if study is None:
            raise SpecError(f"--fail {fail}: name the study of the trial: hpo doctor STUDY --fail {fail}")
        control.fail_foreign(studies.join(place, study), fail)
        text.say(f"trial {fail} of {study!r} is FAIL now")
    if release is not None:
        if study is None:
            raise SpecError(f"--release {release}: name the study of the trial, behind `hpo doctor`")
        control.release(studies.join(place, study), release)
        text.say(f"trial {release} of {study!r} is parked now")
    ills = 0
    for finding in doctor.findings(place, study, repair=repair, workers=workers):
        text.say_page(finding.text)
        ills += finding.is_ill
    text.say(f"{ills} to mend" if ills else "nothing to mend")
    raise typer.Exit(1 if ills else 0)
