"""The command that trains the leaders of a study again and judges them."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from hpo import text
from hpo.cli.app import CodeOption, JsonOption, StorageOption, again_option, app, examples, quiet_optuna


@app.command(
    epilog=examples("hpo confirm digits", "hpo confirm digits --top 3 --seeds 10", "hpo confirm digits --delta 0.002")
)
def confirm(
    study: Annotated[str, typer.Argument(help="Name of the study, or its study file.")],
    top: Annotated[
        int | None, typer.Option("--top", help="Number of leaders. Default: 5; of a Pareto front at most 20.")
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option("--seeds", help="Runs of each leader, each with a fresh seed. Default: 5. More may follow later."),
    ] = None,
    delta: Annotated[
        float | None,
        typer.Option("--delta", help="Difference of the value that does not matter to you. Default: 0.005."),
    ] = None,
    storage: StorageOption = None,
    workers: Annotated[
        int | None,
        typer.Option("--workers", min=1, max=4096, help="Number of local workers. Default: as for `hpo run`."),
    ] = None,
    timeout: Annotated[str | None, typer.Option("--timeout", help="Time limit of this call, such as 30m.")] = None,
    json: JsonOption = False,
    code: CodeOption = None,
) -> None:
    """Train the best trials again with common fresh seeds, and say which is best.

    The runs are trials of a study named STUDY/confirm, on the same data and the same split; the test part stays sealed. The same
    command continues after an interruption, and prints the verdict when all runs have ended. Any worker may help: hpo worker
    STUDY/confirm.
    """
    from hpo.analysis import confirmation
    from hpo.launch import search
    from hpo.spec.durations import seconds
    from hpo.spec.study_file import StudySpec
    from hpo.storage.connect import connect, storage_url
    from hpo.study import study as studies
    from hpo.study.status import summarize
    from hpo.view import confirmed
    from hpo.view.live import LiveView

    limit = seconds(timeout, "--timeout") if timeout else None
    spec = StudySpec.load(Path(study)) if study.endswith(".toml") else None
    of_file = spec.storage if spec else None
    view, ending = LiveView(is_quiet=json), search.Ending()
    with view:
        view.stage(f"{study}: opening its storage")
        quiet_optuna()
        place = connect(storage_url(storage, of_file))
        source = studies.join(place, spec.name if spec else study)
        request = confirmation.ask(source, top=top, runs=seeds, delta=delta)
        folder = code.absolute() if code else source.code_folder
        if request.adds:
            view.stage(f"{source.name}: comparing code and data with those of the search")
            with (
                contextlib.chdir("."),
                contextlib.redirect_stdout(sys.stderr),
            ):  # user code may change the folder, and print
                digest = confirmation.check_unchanged(source, folder)
            sister = confirmation.enlist(request, folder, digest)
        else:
            assert request.sister is not None
            sister = request.sister
            confirmation.remember_delta(sister, request.plan)
        placement = search.place_workers(source.spec, workers)
    standing = summarize(sister)
    opened = search.Opened(study=sister, code_folder=sister.code_folder, is_new=False, standing=standing)
    if standing.is_over or standing.hold:
        if standing.spent < sister.budget:
            text.say(f"no worker is started: {search.nothing_to_do(opened)}", to=sys.stderr)
    else:
        leaders, runs = len(request.plan.leaders), request.plan.runs
        text.say(
            f"confirms {source.name!r}: {leaders} leaders, {runs} runs of each, as trials of {sister.name!r}",
            to=sys.stderr,
        )
        ending = search.run(opened, view, placement=placement, limit=limit, allow_code_change=False)
        if ending.last_words:
            text.say_page(ending.last_words, to=sys.stderr)
    found = confirmation.read(source)
    assert found is not None
    if json:
        text.say_json(confirmed.to_json(found))
    else:
        text.say_page(confirmed.page(found, again_option(storage, of_file, place.shown)))
        if not found.is_complete:
            text.say("next     the same command continues the confirmation")
    raise typer.Exit(ending.exit_code)
