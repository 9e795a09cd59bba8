"""Commands that show studies: status, logs, report, dashboard."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from hpo import text
from hpo.cli.app import (
    JsonOption,
    StorageOption,
    app,
    examples,
    open_to_read,
    quiet_optuna,
    study_of,
)
from hpo.strategy.quiet import quiet_warnings

FOLLOW_SECONDS = 0.5  # between two looks at the logs


@app.command(
    epilog=examples(
        "hpo status",
        "hpo status digits",
        "hpo status study.toml",
        "hpo status digits --trial 11",
        "hpo status digits --health",
    )
)
def status(
    study: Annotated[
        str | None, typer.Argument(help="Name of a study, or its study file. Default: all studies.")
    ] = None,
    trial: Annotated[
        int | None, typer.Option("--trial", min=0, help="Show all of this trial, with the tracebacks of its failures.")
    ] = None,
    health: Annotated[
        bool, typer.Option("--health", help="Make all health checks, those too that read every trial.")
    ] = False,
    storage: StorageOption = None,
    json: JsonOption = False,
) -> None:
    """Show the status of studies: trials by state, best trial, running and parked trials, failures, what is wrong."""
    from hpo.analysis import evidence
    from hpo.analysis.health import examine
    from hpo.errors import SpecError
    from hpo.study import plain
    from hpo.view import chance, pages
    from hpo.view.findings import finding_lines, healthy_line

    if health and (study is None or trial is not None):
        raise SpecError("--health: checks one study as a whole; write hpo status STUDY --health")
    if trial is not None and study is None:
        raise SpecError(f"--trial {trial}: needs the name of the trial's study: hpo status STUDY --trial {trial}")
    quiet_warnings()
    name, place = study_of(study or "", storage)
    if study is None:
        summaries = plain.statuses(place)
        tell([pages.to_json(one) for one in summaries], pages.status_table(summaries), json=json)
    elif trial is None:
        opened = plain.open_any(place, name)
        found = evidence.read(opened)
        if health:
            quiet_optuna()
            found = evidence.with_columns(opened, found)
        findings = examine(found)
        wrong = finding_lines(findings) or ([healthy_line(found)] if health else [])
        page = "\n".join([pages.status_text(found.summary), *chance.choice_lines(found.summary), *wrong])
        tell(pages.to_json(found.summary, findings), page, json=json)
    else:
        history = plain.history(plain.open_any(place, name), trial)
        tell(pages.to_json(history), pages.history_text(history), json=json)


@app.command(
    epilog=examples("hpo logs digits", "hpo logs digits -f", "hpo logs digits --trial 11", "hpo logs digits 1.3 -f")
)
def logs(
    study: Annotated[str, typer.Argument(help="Name of the study, or its study file.")],
    name: Annotated[
        str | None, typer.Argument(metavar="[WORKER]", help="Only this launched worker, named as in `hpo fleet`: 1.3.")
    ] = None,
    worker: Annotated[int | None, typer.Option("--worker", min=0, help="Only this worker of the last run.")] = None,
    trial: Annotated[
        int | None,
        typer.Option(
            "--trial",
            min=0,
            help="Only what was printed while this trial was at work, in any run, and by its command's program.",
        ),
    ] = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on with what is printed, until Ctrl-C.")] = False,
    storage: StorageOption = None,
) -> None:
    """Show what workers and your own code have printed: the logs of the last run, and of the last launch.

    Trials of one stack are trained together, so lines of the others stand among those of a trial.
    """
    from hpo.errors import SpecError, StudyError
    from hpo.launch import launching
    from hpo.launch import logs as worker_logs
    from hpo.study import study as studies
    from hpo.study import trial_history

    if worker is not None and trial is not None:
        raise SpecError(f"--worker {worker} and --trial {trial} cannot be combined; remove one")
    launch = None
    if name is not None:
        launch, worker = worker_named(name, worker, trial)
    quiet_warnings()
    of_study, place = study_of(study, storage)
    joined = studies.join(place, of_study)
    attempts = 0 if trial is None else trial_history.history(joined, trial).attempt
    shown = worker_logs.Tail(joined.logs, worker=worker, trial=trial, launch=launch)
    for line in shown.lines():
        text.say_page(line)
    while follow:
        time.sleep(FOLLOW_SECONDS)
        for line in shown.lines():
            text.say_page(line)
    for line in shown.rest():
        text.say_page(line)
    if why := shown.missing(attempts):
        elsewhere = launching.log_commands(joined, launch, worker)
        raise StudyError(f"study {of_study!r}: {why}", *(f"  of a launched worker: {said}" for said in elsewhere))


def worker_named(name: str, worker: int | None, trial: int | None) -> tuple[int | None, int]:
    """Return the launch, None without one, and the number of a worker. Raises SpecError for a wrong name."""
    from hpo.errors import SpecError

    launch, dot, number = name.rpartition(".")
    if not number.isdecimal() or (dot and not launch.isdecimal()):
        raise SpecError(f"{name}: is no name of a worker; use one of `hpo fleet`, such as 1.3, or a number")
    if worker is not None or trial is not None:
        raise SpecError(f"{name}: cannot be combined with --worker or --trial; remove one")
    return (int(launch) if dot else None), int(number)


@app.command(
    epilog=examples("hpo report digits", "hpo report digits -o digits.csv", "hpo report digits digits-2 -o both.html")
)
def report(
    study: Annotated[list[str], typer.Argument(help="Names of studies, or their study files.", metavar="STUDY...")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="File to write. Default: report.html, or the format's suffix.")
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            "--format", help="html, json, csv, or png, which needs the extra plots. Default: the file's suffix."
        ),
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Name hosts, users, paths and the storage too, which are left out.")
    ] = False,
    storage: StorageOption = None,
) -> None:
    """Write a report on studies into one file, which opens without a network.

    Of one study it shows the result, how it was found, what it took, and what it was made from. Of several it also sets them
    beside each other. The study is only read.
    """
    from hpo.errors import SpecError
    from hpo.study import plain
    from hpo.view.report import output as reports

    path, chosen = reports.choose(output, format)
    reports.check_place(path)
    quiet_optuna()
    found = [study_of(word, storage) for word in study]
    names = [name for name, _ in found]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise SpecError(f"study {twice[0]!r} is named twice; name each study once")
    opened = [plain.open_any(place, name) for name, place in found]
    verb = "replaced" if path.exists() else "wrote"
    size = reports.write(path, chosen, opened, is_full=full)
    text.say(f"{verb} {path}: {', '.join(map(text.short, names))}, {text_size(size)}")


def text_size(size: int) -> str:
    """Return a number of bytes in words."""
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def tell(document: object, page: str, *, json: bool) -> None:
    """Print the document as JSON, or the page as text."""
    if json:
        text.say_json(document)
    else:
        text.say_page(page)


@app.command(epilog=examples("hpo dashboard", "hpo dashboard --port 8081 --write"))
def dashboard(
    storage: StorageOption = None,
    host: Annotated[str, typer.Option("--host", help="Address to serve on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port to serve on.")] = 8080,
    write: Annotated[
        bool, typer.Option("--write", help="Allow changes. There is no login: anybody at the address can make them.")
    ] = False,
) -> None:
    """Serve optuna-dashboard for the storage, read-only by default."""
    from hpo.storage.connect import connect, storage_url
    from hpo.view import dashboard as web

    quiet_optuna()
    place = connect(storage_url(storage)) if write else open_to_read(storage)
    web.serve(place, host, port, write)
