"""Commands for workers on an engine: launch, fleet, scale, recall."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hpo import text
from hpo.cli.app import (
    CodeChangeOption,
    CodeOption,
    JsonOption,
    NameOption,
    StorageOption,
    app,
    examples,
    quiet_optuna,
    study_of,
)
from hpo.strategy.quiet import quiet_warnings

if TYPE_CHECKING:
    from hpo.study.study import Study


@app.command(
    epilog=examples(
        "hpo launch study.toml --on slurm --workers 32",
        "hpo launch digits --on slurm --workers 32 --set slurm.partition=gpu --print",
        "hpo launch study.toml --on ray --workers 8 --gpus-per-worker 0.25",
    )
)
def launch(
    study: Annotated[str, typer.Argument(help="Study file, which makes or joins its study, or the name of a study.")],
    on: Annotated[str | None, typer.Option("--on", help="Engine: slurm, ray, kubernetes or compose.")] = None,
    workers: Annotated[int | None, typer.Option("--workers", min=1, max=10_000, help="Number of workers.")] = None,
    gpus: Annotated[
        float | None, typer.Option("--gpus-per-worker", min=0, help="GPUs of a worker, such as 1 or 0.25.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A key of the section launch, such as slurm.partition=gpu."),
    ] = None,
    print_only: Annotated[
        bool, typer.Option("--print", help="Print the script or manifest. Nothing is submitted or recorded.")
    ] = False,
    trials: Annotated[
        int | None, typer.Option("--trials", min=1, max=2**31 - 1, help="Number of trials of the study in total.")
    ] = None,
    storage: StorageOption = None,
    name: NameOption = None,
    code: CodeOption = None,
    allow_code_change: CodeChangeOption = False,
) -> None:
    """Start workers on Slurm, Ray, Kubernetes or Compose. They leave by themselves when the budget is spent.

    The password of the storage reaches the workers by the environment. No script, manifest or command line holds it.
    """
    from hpo.errors import LaunchError
    from hpo.launch import launching
    from hpo.launch.launching import Wanted
    from hpo.spec.study_file import StudySpec
    from hpo.storage.connect import connect, parse_url, storage_url
    from hpo.storage.redaction import redacted_url
    from hpo.study import study as studies

    quiet_optuna()
    is_file = study.endswith(".toml")
    if trials is not None and (print_only or not is_file):
        raise LaunchError(
            f"--trials {trials}: "
            + ("--print changes no study" if print_only else f"{study!r} is a study's name, and a file is needed")
            + "; leave --trials out, or raise the budget first: "
            + f"`{text.command('run', study if is_file else 'FILE', options=f'--trials {trials} --workers 0')}`"
        )
    if is_file and print_only:
        spec = StudySpec.load(Path(study), name=name)
        wanted = Wanted.of(spec.launch.with_settings(settings or []), on=on, workers=workers, gpus=gpus)
        shown = redacted_url(parse_url(storage_url(storage, spec.storage)))
        folder = code or Path(study).parent
        page = launching.printed_of_file(Path(study), wanted, spec, code_folder=folder, storage=shown)
        text.say_page(page.rstrip("\n"))
        return
    if is_file:
        from hpo.launch import search
        from hpo.view.live import LiveView

        view = LiveView(is_quiet=True)
        with view:
            loaded = search.load(Path(study), view, name=name, code=code)
            wanted = Wanted.of(loaded.launch.with_settings(settings or []), on=on, workers=workers, gpus=gpus)
            found = search.complete(loaded, Path(study), view, code=code, workers=0)
            url = storage_url(storage, found.spec.storage)
            opened = search.open_study(found, view, url=url, trials=trials, allow_code_change=allow_code_change)
        joined, folder = opened.study, opened.code_folder
    else:
        joined = studies.join(connect(storage_url(storage)), study)
        wanted = Wanted.of(joined.spec.launch.with_settings(settings or []), on=on, workers=workers, gpus=gpus)
        folder = code or joined.code_folder
    if print_only:
        page = launching.printed(joined, wanted, code_folder=folder)
        text.say_page(page.rstrip("\n"))
        return
    made = launching.launch(joined, wanted, code_folder=folder, allow_code_change=allow_code_change)
    for doubt in launching.doubts(joined, made):
        text.say_page(f"note: {doubt}", to=sys.stderr)
    count = f"{made.slots} worker{'s' * (made.slots > 1)}"
    text.say(f"launch {made.number} of {joined.name!r}: {count} on {made.engine}")
    text.say_command("next     ", text.command("fleet", joined.name))


@app.command(epilog=examples("hpo fleet digits", "hpo fleet study.toml --json"))
def fleet(
    study: Annotated[str, typer.Argument(help="Name of the study, or its study file.")],
    storage: StorageOption = None,
    json: JsonOption = False,
) -> None:
    """Show who works on a study: host, GPU, trials, speed, last seen; and every launch."""
    from hpo.launch import launching
    from hpo.study import study as studies
    from hpo.study.fleet import read_fleet
    from hpo.view.fleet import fleet_json, fleet_text

    quiet_warnings()
    name, place = study_of(study, storage)
    found = read_fleet(studies.join(place, name))
    states = {one.number: launching.present(one) for one in found.launches if one.recalled_at is None}
    if json:
        text.say_json(fleet_json(found, states))
    else:
        text.say_page(fleet_text(found, states))


@app.command(epilog=examples("hpo scale digits 8", "hpo scale digits 0"))
def scale(
    study: Annotated[str, typer.Argument(help="Name of the study, or its study file.")],
    workers: Annotated[int, typer.Argument(min=0, max=10_000, help="Number of launched workers.")],
    storage: StorageOption = None,
) -> None:
    """Change the number of launched workers. More are started as in the newest launch. Surplus ones park and leave."""
    from hpo.launch import launching

    joined = _joined(study, storage)
    change = launching.scale(joined, workers)
    if workers == change.before:
        text.say(f"{joined.name!r} has {workers} launched workers already")
        return
    began = sum(map(len, change.added.values()))
    leave = sum(map(len, change.retired.values()))
    within = joined.spec.recovery.lease_seconds / 6
    what = f"{began} start" if began else f"{leave} park their trials and leave, within about {within:.0f} s"
    text.say(f"{joined.name!r}: from {change.before} to {workers} launched workers; {what}")


@app.command(epilog=examples("hpo recall digits"))
def recall(
    study: Annotated[str, typer.Argument(help="Name of the study, or its study file.")], storage: StorageOption = None
) -> None:
    """Call all launched workers back: they park their trials and leave, and their jobs are cancelled."""
    from hpo.launch import launching

    joined = _joined(study, storage)
    said = launching.recall(joined)
    if not said:
        text.say(f"{joined.name!r} has no open launch")
    for number, why in said.items():
        done = f"launch {number} of {joined.name!r} is called back"
        if why:
            text.say_page(f"{done}; its jobs were not cancelled, so workers leave by themselves:\n{why}")
        else:
            text.say(f"{done}: its jobs are cancelled, its workers park their trials and leave")


def _joined(study: str, storage: str | None) -> Study:
    from hpo.spec.study_file import StudySpec
    from hpo.storage.connect import connect, storage_url
    from hpo.study import study as studies

    quiet_optuna()
    spec = StudySpec.load(Path(study)) if study.endswith(".toml") else None
    return studies.join(connect(storage_url(storage, spec.storage if spec else None)), spec.name if spec else study)
