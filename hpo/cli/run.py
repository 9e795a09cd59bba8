"""Commands that make and run a study: init, check, run, worker. Nothing heavy is imported before one of them needs it."""

from __future__ import annotations

import contextlib
import json as jsons
import logging
import os
import shutil
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
    again_option,
    app,
    quiet_optuna,
    storage_url,
)
from hpo.errors import StorageError, located
from hpo.worker.signals import StopSignal

if TYPE_CHECKING:
    from hpo.study.resolve import StudyFile
    from hpo.study.status import Summary
    from hpo.study.study import Study
    from hpo.worker.loop import Objective


@app.command()
def init(file: Annotated[Path, typer.Argument(help="Study file to write.")] = Path("study.toml")) -> None:
    """Write a commented study file to start from."""
    from importlib import resources

    from hpo.errors import SpecError
    from hpo.spec.study_file import check_name

    check_name(file.stem, f"{file}: name")
    template = resources.files("hpo.spec").joinpath("template.toml").read_text()
    placeholder = '"my-study"'
    try:
        with file.open("x") as handle:
            handle.write(template.replace(placeholder, jsons.dumps(file.stem).ljust(len(placeholder))))
    except FileExistsError:
        raise SpecError(f"{file}: is there already; name another file") from None
    except OSError as error:
        raise SpecError(f"{file}: cannot be written: {error.strerror}") from None
    text.say_command(f"wrote {file}; next: ", text.command("check", file))


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="Study file.")],
    workers: Annotated[int | None, typer.Option("--workers", min=1, help="Workers to reckon the cost with.")] = None,
    images: Annotated[
        Path | None, typer.Option("--images", help="Write training images of each class to this PNG file.")
    ] = None,
    code: CodeOption = None,
) -> None:
    """Explain a study file: its space, its data, its model, one measured epoch, what the budget costs, likely mistakes."""
    from hpo.launch.local import default_workers
    from hpo.search.lint import lint
    from hpo.study import resolve
    from hpo.view import checked

    found = resolve.read(file, code_folder=code)
    text.say_page(checked.spec_text(found.spec))
    warnings = lint(found.spec)
    if not found.spec.objective:
        from hpo.train.build.check import examine

        count = workers or default_workers()
        with located(file):
            findings = examine(found.spec, found.code_folder, count, sheet=images)
        text.say_page(checked.findings_text(found.spec, findings, count))
        if images:
            text.say(f"wrote {images}: a row for each class, in the order above")
        warnings += findings.untyped + findings.unused
    text.say_page(checked.warnings_text(warnings))


@app.command()
def run(
    file: Annotated[Path, typer.Argument(help="Study file.")],
    storage: StorageOption = None,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers", min=0, max=4096, help="Local workers: one per GPU, else one per core; 0 only makes the study."
        ),
    ] = None,
    trials: Annotated[
        int | None, typer.Option("--trials", min=1, max=2**31 - 1, help="Trials of the study in all.")
    ] = None,
    timeout: Annotated[str | None, typer.Option("--timeout", help="Wall clock of this run, such as 30m.")] = None,
    name: NameOption = None,
    json: JsonOption = False,
    code: CodeOption = None,
    allow_code_change: CodeChangeOption = False,
) -> None:
    """Search: make or join the study, start workers, show progress, end when the budget is spent, name the winner."""
    from hpo.errors import SpecError
    from hpo.launch import fork_server
    from hpo.spec.study_file import StudySpec

    try:
        loaded = StudySpec.load(file, name=name)
    except SpecError:
        from hpo.study import resolve

        resolve.read(file, name=name, code_folder=code)  # which tells of what is wrong with values as well
        raise
    if workers != 0:
        fork_server.warm_up(
            None if loaded.objective else loaded.executor
        )  # while this process loads the rest for itself

    from hpo.launch import launcher
    from hpo.launch.local import Fleet, default_workers, last_words
    from hpo.spec.durations import seconds
    from hpo.storage.connect import FAILURES, check_connections, connect
    from hpo.storage.tables import Hold
    from hpo.study import resolve
    from hpo.study import study as studies
    from hpo.study.status import summarize
    from hpo.view import live
    from hpo.view.live import LiveView

    limit = seconds(timeout, "--timeout") if timeout else None
    with contextlib.redirect_stdout(sys.stderr):  # what your own code prints when it is imported is no result
        found = resolve.complete(loaded, file, code_folder=code)
    if found.spec.is_pinned:
        raise SpecError(
            f"{file}: holds no range, so there is nothing to search; train it with `{text.command('train', file)}`"
        )
    if limit is None and found.spec.budget.timeout:
        limit = seconds(found.spec.budget.timeout, "budget.timeout")
    quiet_optuna()
    place = connect(storage_url(storage, found.spec.storage), create=True)
    is_new = found.spec.name not in studies.names(place)
    if not is_new:
        with contextlib.redirect_stdout(sys.stderr):
            found = found.in_format(studies.join(place, found.spec.name).spec.format)
    study = studies.create_or_join(
        place,
        found.spec,
        code_folder=found.code_folder,
        code_digest=found.code_digest,
        trials_budget=trials,
        allow_code_change=allow_code_change,
    )
    count = next(n for n in (workers, found.spec.workers, default_workers()) if n is not None)
    code_of_exit = 0
    again = again_option(storage, found.spec.storage, place.shown)
    view = LiveView(json=json)
    standing = summarize(study)
    if standing.hold:
        text.say(f"nothing is started: {live.held(standing)}", to=sys.stderr)
    elif standing.is_over:
        reason = study.stop_reason or "the budget is spent; --trials N raises it"
        text.say(f"nothing is left to do: {reason}", to=sys.stderr)
    elif not count:
        next_one = text.command("worker", study.name, options=again)
        text.say_command(f"made study {study.name!r}; next: ", next_one, " on each machine", to=sys.stderr)
    else:
        check_connections(place, count)
        fleet = Fleet(study, count, code_folder=found.code_folder, allow_code_change=allow_code_change)
        code_of_exit = launcher.run_workers(study, fleet, view, timeout=limit)
        if fleet.failed:
            text.say_page(last_words(fleet.failed), to=sys.stderr)
            code_of_exit = code_of_exit or fleet.exit_code
        if is_new and fleet.refused and not study.optuna.get_trials(deepcopy=False):
            place.optuna.delete_study(study.study_id)  # the file is wrong in what only a worker sees, such as its data
            raise typer.Exit(code_of_exit)
    try:
        summary = report_end(studies.join(place, study.name), json=json, drawn=view.has_drawn, again=again)
    except FAILURES:
        if not code_of_exit:
            raise
        raise typer.Exit(code_of_exit) from None
    raise typer.Exit(code_of_exit or int(summary.hold == Hold.BROKEN))


def report_end(study: Study, *, json: bool, drawn: bool, again: str) -> Summary:
    """Print how a run ended, the winner or the front and what to do with it, why there is none, or how to go on.

    Returns the summary.

    Args:
        drawn: the terminal still shows the live view's last picture.
        again: what the next commands need to find the storage.
    """
    from hpo.errors import StudyError
    from hpo.study.results import best
    from hpo.study.status import summarize
    from hpo.view import live

    summary = summarize(study)
    if json:
        text.say_json(live.to_json(summary))
        return summary
    if not drawn:
        text.say_page(live.status_text(summary))
    if summary.hold:
        text.say_command("next     ", text.command("resume", study.name, options=again), ", then the same command")
        return summary
    if not summary.is_over:
        text.say("next     the same command goes on from here, or hpo status for what holds it up")
        return summary
    try:
        winners = best(study, k=None) if summary.objectives else best(study)
        if summary.objectives:
            text.say_page(live.front_text(winners, shutil.get_terminal_size((120, 24)).columns))
            front = text.command("export", study.name, options=f"{again} --front".strip())
            text.say_command("next     ", front, ", or --trial N")
            return summary
        text.say_page(live.winner_text(winners[0]))
        export = text.command("export", study.name, options=f"{again} -o best.toml".strip())
        train = text.command("train", "best.toml", options=f"-o {text.quoted(f'runs/{study.name}')}")
        text.say_command("next     ", f"{export} && {train}")
    except StudyError as error:
        text.say_page(str(error), to=sys.stderr)
    return summary


@app.command()
def worker(
    study: Annotated[str, typer.Argument(help="Name of the study, or a study file to hold against it.")],
    storage: StorageOption = None,
    code: CodeOption = None,
    allow_code_change: CodeChangeOption = False,
    parent: Annotated[int | None, typer.Option("--parent", hidden=True, help="Leave when this process dies.")] = None,
    name: Annotated[str | None, typer.Option("--as", hidden=True, help="Name to hold leases under.")] = None,
    fleet: Annotated[int, typer.Option("--fleet", hidden=True, min=1, help="Workers that share the budget.")] = 1,
    mark: Annotated[
        Path | None, typer.Option("--mark", hidden=True, help="File for the exit code when leaving in order.")
    ] = None,
) -> None:
    """Join a study from anywhere with one more process; space, sampler and pruner come from the study."""
    from hpo.errors import Fault, MismatchError, Outage, StorageGone
    from hpo.launch.local import AGAIN, TRY_AGAIN, USAGE_ERROR, say_last
    from hpo.queue import workers
    from hpo.spec.study_file import Recovery
    from hpo.storage import descriptors
    from hpo.study import resolve
    from hpo.worker import loop as worker_loop
    from hpo.worker import restart

    logging.raiseExceptions = False  # a log that user code has closed is no reason to end
    said = logging.StreamHandler(sys.stderr)
    said.setFormatter(text.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[said])
    quiet_optuna()
    say_last(mark, "")  # the process before this one has started afresh
    stopping = StopSignal.installed(grace=Recovery().grace_seconds, is_supervised=parent is not None)
    mine = resolve.read(Path(study), code_folder=code) if study.endswith(".toml") else None
    url = storage_url(storage, mine.spec.storage if mine else None)
    try:
        try:
            joined, objective = enlist(url, study, mine, code, stopping, allow_code_change=allow_code_change)
        except Fault:  # no trial is at hand yet that could be to blame
            say_last(mark, USAGE_ERROR)
            raise
        if joined.storage.file is not None:
            os.environ.update(joined.storage.file.handed_on)  # to this process, should it start afresh
        ledger = joined.ledger(name or workers.new_name())
        stopping.end_within(joined.spec.recovery.grace_seconds, last_act=lambda: worker_loop.let_go(ledger, stopping))
        descriptors.watch(joined.storage.engine, worker_loop.end_cut_off)
        logging.info("joined study %r in %s as %s", joined.name, joined.storage.shown, ledger.worker)
        code_of_exit = worker_loop.work(joined, objective, ledger, stopping, parent=parent, fleet=fleet)
    except MismatchError:  # of changed code that does not fit the study: the trial at hand was handed back
        say_last(mark, USAGE_ERROR)
        raise
    except (StorageError, Outage) as error:
        if parent is None and (isinstance(error, StorageGone) or not stopping()):
            raise StorageError(str(error)) from error
        logging.error("%s", error)
        code_of_exit = stopping.exit_code or TRY_AGAIN  # the fleet starts another worker after a while
    if code_of_exit == worker_loop.RECYCLE:
        say_last(mark, AGAIN)
        restart.start_afresh(stopping)
        code_of_exit = stopping.exit_code
    logging.info("leaving with exit code %d", code_of_exit)
    say_last(mark, code_of_exit)
    if parent is not None:
        restart.leave(code_of_exit)
    raise typer.Exit(code_of_exit)


def enlist(
    url: str,
    name: str,
    mine: StudyFile | None,
    code: Path | None,
    stopping: StopSignal,
    *,
    allow_code_change: bool,
) -> tuple[Study, Objective]:
    """Join the study and make its objective ready; a storage that has no room just now is waited for, one that is not
    there is an error at once.
    """
    from hpo.errors import StorageBusy
    from hpo.spec.study_file import Recovery
    from hpo.storage.connect import OUTAGES, connect
    from hpo.storage.retry import Retry
    from hpo.study import resolve
    from hpo.study import study as studies
    from hpo.worker import loop as worker_loop
    from hpo.worker import restart

    def attempt() -> tuple[Study, Objective]:
        with contextlib.ExitStack() as undone:
            place = connect(url)
            undone.callback(place.close)
            joined = studies.join(place, mine.spec.name if mine else name)
            file = mine.in_format(joined.spec.format) if mine else None
            folder = code.absolute() if code else file.code_folder if file else joined.code_folder
            digest = resolve.load_and_digest(joined.spec, folder)
            studies.check_worker(
                joined, mine=file.spec if file else None, code_digest=digest, allow_code_change=allow_code_change
            )
            objective = worker_loop.build_objective(joined, folder)
            undone.pop_all()
        return joined, objective

    # The study's own `recovery.outage_patience` is not known before the study is read.
    borne = StorageError if restart.MARK in os.environ else StorageBusy
    retry = Retry(Recovery().outage_seconds, stopping, passing=(borne, *OUTAGES))
    return retry(attempt)
