"""Commands that show studies: status, dashboard."""

from __future__ import annotations

from typing import Annotated

import typer

from hpo import text
from hpo.cli.app import JsonOption, StorageOption, app, quiet_optuna, storage_url


@app.command()
def status(
    study: Annotated[str | None, typer.Argument(help="Name of a study; all of them if left out.")] = None,
    trial: Annotated[
        int | None, typer.Option("--trial", min=0, help="This trial in full, with its failures' tracebacks.")
    ] = None,
    storage: StorageOption = None,
    json: JsonOption = False,
) -> None:
    """Show how studies stand: trials by state, best so far, what runs, what is parked, what failed."""
    from hpo.errors import SpecError
    from hpo.storage.connect import connect
    from hpo.study import plain
    from hpo.view import live

    if trial is not None and study is None:
        raise SpecError(f"--trial {trial}: name the study of the trial: hpo status STUDY --trial {trial}")
    quiet_optuna()
    place = connect(storage_url(storage))
    if study is None:
        summaries = plain.statuses(place)
        tell([live.to_json(one) for one in summaries], live.status_table(summaries), json=json)
    elif trial is None:
        summary = plain.summarize(plain.open_any(place, study))
        tell(live.to_json(summary), live.status_text(summary), json=json)
    else:
        found = plain.history(plain.open_any(place, study), trial)
        tell(live.to_json(found), live.history_text(found), json=json)


def tell(document: object, page: str, *, json: bool) -> None:
    """Print what a program reads, or what a person reads."""
    if json:
        text.say_json(document)
    else:
        text.say_page(page)


@app.command()
def dashboard(
    storage: StorageOption = None,
    host: Annotated[str, typer.Option("--host", help="Address to serve on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port to serve on.")] = 8080,
    write: Annotated[bool, typer.Option("--write", help="Allow changes, by anybody who reaches the address.")] = False,
) -> None:
    """Serve optuna-dashboard for the storage, read-only."""
    from hpo.storage.connect import connect
    from hpo.view import dashboard as web

    quiet_optuna()
    web.serve(connect(storage_url(storage)), host, port, write)
