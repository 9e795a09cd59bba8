"""Commands that create and run a study: init, check, run, worker. Each imports heavy modules only when it runs."""

from __future__ import annotations

import contextlib
import gc
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
    examples,
    quiet_optuna,
    study_of,
)
from hpo.errors import StorageError, located
from hpo.loading import uncollected
from hpo.worker.signals import StopSignal

if TYPE_CHECKING:
    from hpo.study.resolve import StudyFile
    from hpo.study.status import Summary
    from hpo.study.study import Study
    from hpo.worker.loop import Objective


@app.command(
    epilog=examples(
        "hpo init study.toml",
        "hpo init photos.toml --from photos",
        "hpo init prices.toml --from prices.csv --target price",
    )
)
def init(
    file: Annotated[Path, typer.Argument(help="Study file to write.")] = Path("study.toml"),
    data: Annotated[
        str | None,
        typer.Option("--data", help="Your own data: image_folder, csv or npz. Default: the built-in digits."),
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option("--from", help="Look at this data: a folder of images, or a .csv, .tsv, .parquet or .npz file."),
    ] = None,
    target: Annotated[str | None, typer.Option("--target", help="Column to predict, with --from a table.")] = None,
) -> None:
    """Write a commented study file to start from, or one that suits your data."""
    from hpo.errors import SpecError
    from hpo.spec import template
    from hpo.spec.study_file import check_name

    check_name(file.stem, f"{file}: name")
    if data is not None and source is not None:
        raise SpecError("--data and --from: give one; --from looks at the data, --data writes lines to fill in")
    if target is not None and source is None:
        raise SpecError(f"--target {target}: needs --from FILE")
    if file.exists():  # before the data is read, which may take long
        raise SpecError(f"{file}: exists already; name another file")
    if source is None:
        content = template.text(file.stem, data)
    else:
        from hpo.train.draft.draft import draft

        content = draft(file.stem, source, target, file.absolute().parent)
    try:
        with file.open("x") as handle:
            handle.write(content)
    except FileExistsError:
        raise SpecError(f"{file}: exists already; name another file") from None
    except OSError as error:
        raise SpecError(f"{file}: cannot be written: {error.strerror}") from None
    before = f"wrote {file}; next: " + ("say in [data] where your data are, then " if data else "")
    text.say_command(before, text.command("check", file))


@app.command(epilog=examples("hpo check study.toml", "hpo check study.toml --images classes.png"))
def check(
    file: Annotated[Path, typer.Argument(help="Study file.")],
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Number of workers for the estimate of the budget's time.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option("--images", help="Write training images of each class to this PNG file.")
    ] = None,
    code: CodeOption = None,
) -> None:
    """Explain a study file: space, data, model, time of one epoch, cost of the budget, likely mistakes."""
    from hpo.launch.placement import default_workers, spread
    from hpo.spec import imbalance
    from hpo.strategy.lint import lint
    from hpo.study import resolve
    from hpo.view import checked

    sheet = images and images.absolute()  # user code may go to another folder when it is imported
    found = resolve.read(file, code_folder=code)
    text.say_page(checked.spec_text(found.spec))
    warnings = [*lint(found.spec), *imbalance.corrected_twice(found.spec)]
    if found.spec.is_declared:
        from hpo.train.build.check import examine

        count = workers or found.spec.workers or default_workers()
        placed = spread(count)
        with located(file):
            findings = examine(found.spec, found.code_folder, count, sharers=placed.most_sharers, sheet=sheet)
        text.say_page(checked.findings_text(found.spec, findings, count, placed.counted_gpus))
        if images:
            text.say(f"wrote {images}: a row for each class, in the order above")
        warnings += checked.small_part_warnings(found.spec, findings.data)
        warnings += checked.moved_image_warnings(found.spec, findings.data) + findings.untyped + findings.unused
    text.say_page(checked.warnings_text(warnings))


@app.command(
    epilog=examples(
        "hpo run study.toml",
        "hpo run study.toml --workers 4 --trials 128",
        "hpo run study.toml --gpus 0,1 --per-gpu 2",
        "hpo run study.toml --timeout 30m",
    )
)
def run(
    file: Annotated[Path, typer.Argument(help="Study file.")],
    storage: StorageOption = None,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            min=0,
            max=4096,
            help="Number of local workers. Default: one per GPU, without a GPU one per core. 0 only creates the study.",
        ),
    ] = None,
    gpus: Annotated[
        str | None,
        typer.Option(
            "--gpus",
            help='GPUs to use: numbers or UUIDs such as 0,1, or "all" or "none". Default: all that nobody else uses.',
        ),
    ] = None,
    per_gpu: Annotated[
        str, typer.Option("--per-gpu", metavar="auto|K", help="Number of workers that share a GPU. auto: one.")
    ] = "auto",
    trials: Annotated[
        int | None, typer.Option("--trials", min=1, max=2**31 - 1, help="Number of trials of the study in total.")
    ] = None,
    timeout: Annotated[str | None, typer.Option("--timeout", help="Time limit of this run, such as 30m.")] = None,
    name: NameOption = None,
    json: JsonOption = False,
    code: CodeOption = None,
    allow_code_change: CodeChangeOption = False,
) -> None:
    """Run a search: create or join the study, start workers, show progress, print the best trial."""
    from hpo.launch import search

    with uncollected():
        if workers != 0:
            search.warm_up_for(file)  # first of all, since the workers wait for their server
        from hpo.launch.placement import sharers
        from hpo.spec.durations import seconds
        from hpo.view.live import LiveView

        shared = sharers(per_gpu, "--per-gpu")
        given = seconds(timeout, "--timeout") if timeout else None
        view = LiveView(is_quiet=json)
        with view:
            loaded = search.load(file, view, name=name, code=code)
            placement = search.place_workers(loaded, workers, gpus=gpus, per_gpu=shared)
            found = search.complete(loaded, file, view, code=code, workers=len(placement.places))
            quiet_optuna()
            from hpo.storage.connect import storage_url

            url = storage_url(storage, found.spec.storage)
            opened = search.open_study(found, view, url=url, trials=trials, allow_code_change=allow_code_change)
        gc.freeze()  # what is loaded is no garbage
    study = opened.study
    again = again_option(storage, found.spec.storage, study.storage.shown)
    text.say(f"storage  {study.storage.shown} ({opened.joined})", to=sys.stderr)
    ending = search.Ending()
    if why := search.nothing_to_do(opened):
        text.say(why, to=sys.stderr)
    elif not placement.places:
        next_one = text.command("worker", study.name, options=again)
        text.say_command(f"made study {study.name!r}; next: ", next_one, " on each machine", to=sys.stderr)
    else:
        limit = search.time_limit(found, given)
        ending = search.run(opened, view, placement=placement, limit=limit, allow_code_change=allow_code_change)
        if ending.last_words:
            text.say_page(ending.last_words, to=sys.stderr)
        if ending.is_deleted:
            raise typer.Exit(ending.exit_code)
    raise typer.Exit(exit_code(study, ending.exit_code, json=json, drawn=view.has_drawn, again=again))


def exit_code(study: Study, code: int, *, json: bool, drawn: bool, again: str) -> int:
    """Print the end of a run and return the exit code of the command.

    Args:
        study: the study.
        code: the exit code of its workers.
        json: as for `report_end`, like the others.
    """
    from hpo.storage.connect import FAILURES
    from hpo.study import study as studies

    try:
        summary = report_end(studies.join(study.storage, study.name), json=json, drawn=drawn, again=again)
    except FAILURES:
        if not code:
            raise
        return code
    return code or int(summary.has_failed)


def report_end(study: Study, *, json: bool, drawn: bool, again: str) -> Summary:
    """Print the end of a run: the best trial or the Pareto front, the next command, what is wrong. Return the summary.

    Args:
        study: the study.
        json: print JSON only.
        drawn: whether the terminal still shows the last frame of the live view.
        again: the `--storage` option for the next commands.
    """
    from hpo.analysis import evidence
    from hpo.analysis.health import examine
    from hpo.view import pages
    from hpo.view.findings import finding_lines

    found = evidence.read(study)
    if found.summary.is_over:
        found = evidence.with_columns(study, found)
    findings = examine(found)
    if json:
        text.say_json(pages.to_json(found.summary, findings))
        return found.summary
    _tell_end(study, found.summary, drawn=drawn, again=again)
    if lines := finding_lines(findings):
        text.say_page("\n".join(lines))
    return found.summary


def _tell_end(study: Study, summary: Summary, *, drawn: bool, again: str) -> None:
    from hpo.errors import StudyError
    from hpo.storage.tables import Hold
    from hpo.study.export import taken_from
    from hpo.study.results import best
    from hpo.view import chance, confirmed, pages, words

    if not drawn:
        text.say_page(pages.status_text(summary))
    if summary.hold == Hold.SPENT:
        text.say("next     change the limit in [budget], then the same command; or hpo export the best so far")
        return
    if summary.hold:
        text.say_command("next     ", text.command("resume", study.name, options=again), ", then the same command")
        return
    if not summary.is_over:
        text.say("next     the same command continues the study; hpo status shows what is left")
        return
    try:
        winners = best(study, k=None) if summary.objectives else best(study)
        if summary.objectives:
            text.say_page(pages.front_text(winners, shutil.get_terminal_size((120, 24)).columns))
            front = text.command("export", study.name, options=f"{again} --front".strip())
            text.say_command("next     ", front, ", or --trial N")
            return
        own = confirmed.verdict_line(study, again)
        text.say_page("\n".join([pages.winner_text(winners[0]), *chance.choice_lines(summary), *own]))
        if origin := taken_from(study, winners[0]):
            text.say(f"         this study has not trained it; it took the result from {words.origin(origin)}")
        best_file = Path(f"{study.name.replace('/', '-')}-best.toml")
        export = text.command("export", study.name, options=f"{again} -o {text.quoted(best_file)}".strip())
        train = text.command("train", best_file, options=f"-o {text.quoted(f'runs/{best_file.stem}')}")
        text.say_command("next     ", f"{export} && {train}")
    except StudyError as error:
        text.say_page(str(error), to=sys.stderr)


@app.command(epilog=examples("hpo worker digits --storage postgresql://user@host/db", "hpo worker study.toml"))
def worker(
    study: Annotated[str, typer.Argument(help="Name of the study, or a study file that must agree with it.")],
    storage: StorageOption = None,
    code: CodeOption = None,
    allow_code_change: CodeChangeOption = False,
    parent: Annotated[int | None, typer.Option("--parent", hidden=True, help="Leave when this process dies.")] = None,
    name: Annotated[str | None, typer.Option("--as", hidden=True, help="Name to hold leases under.")] = None,
    fleet: Annotated[int, typer.Option("--fleet", hidden=True, min=1, help="Workers that share the budget.")] = 1,
    mark: Annotated[
        Path | None, typer.Option("--mark", hidden=True, help="File for the exit code when leaving in order.")
    ] = None,
    supervised: Annotated[
        bool,
        typer.Option("--supervised", help="End with an exit code that an engine can trust; see docs/clusters.md."),
    ] = False,
    launch: Annotated[int | None, typer.Option("--launch", hidden=True, help="Number of the launch.")] = None,
    slot: Annotated[int, typer.Option("--slot", hidden=True, help="Place in the launch.")] = 0,
    grace: Annotated[
        float | None, typer.Option("--grace", hidden=True, help="Seconds after which the supervisor kills.")
    ] = None,
) -> None:
    """Join a study with one more worker, on any machine. Space, sampler and pruner come from the study."""
    if supervised and parent is None:
        place = [] if launch is None else ["--launch", str(launch), "--slot", str(slot)]
        raise typer.Exit(_supervised([*place, "--fleet", str(fleet)], study, storage, code, allow_code_change, grace))
    from hpo.errors import Fault, MismatchError, Outage, StorageGone
    from hpo.launch import logs
    from hpo.launch.exit_codes import TRY_AGAIN, USAGE_ERROR
    from hpo.launch.slots import AGAIN, say_last
    from hpo.queue import workers
    from hpo.queue.models import Post
    from hpo.spec.recovery import Recovery
    from hpo.storage import descriptors
    from hpo.storage.connect import storage_url
    from hpo.study import resolve
    from hpo.worker import loop as worker_loop
    from hpo.worker import restart

    post = None if launch is None else Post(launch=launch, slot=slot)
    logging.raiseExceptions = False  # user code may close the log; the worker goes on
    said = logging.StreamHandler(sys.stderr)
    said.setFormatter(text.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[said])
    quiet_optuna()
    say_last(mark, "")  # clear the word of the process that restarted as this one
    stopping = StopSignal.installed(grace=Recovery().grace_seconds, is_supervised=parent is not None)
    mine = resolve.read(Path(study), code_folder=code) if study.endswith(".toml") else None
    url = storage_url(storage, mine.spec.storage if mine else None)
    try:
        try:
            joined, objective = enlist(
                url, study, mine, code, stopping, allow_code_change=allow_code_change, is_launched=post is not None
            )
        except Fault as refusal:  # no trial is claimed yet, so no trial is the cause
            say_last(mark, USAGE_ERROR)
            if post is not None and not isinstance(refusal, StorageError):
                from hpo.launch import launching  # loads all engines, which a worker does not need

                launching.note_refusal(url, mine.spec.name if mine else study, post, refusal)
            raise
        if joined.storage.file is not None:
            os.environ.update(joined.storage.file.handed_on)  # for this process after a restart
        ledger = joined.ledger(name or workers.new_name(), post=post)
        stopping.end_within(
            joined.spec.recovery.grace_seconds, last_act=lambda: worker_loop.give_all_back(ledger, stopping)
        )
        descriptors.watch(joined.storage.engine, worker_loop.end_cut_off)
        if post is not None:
            logs.keep_bounded(joined.logs / logs.launched_name(post.launch, post.slot))
        logging.info("joined study %r in %s as %s", joined.name, joined.storage.shown, ledger.worker)
        code_of_exit = worker_loop.work(joined, objective, ledger, stopping, parent=parent, fleet=fleet)
    except MismatchError:  # changed code does not fit the study; the trial was handed back
        say_last(mark, USAGE_ERROR)
        raise
    except (StorageError, Outage) as error:
        if parent is None and (isinstance(error, StorageGone) or not stopping()):
            raise StorageError(str(error)) from error
        logging.error("%s", error)
        code_of_exit = stopping.exit_code or TRY_AGAIN  # the fleet starts another worker after a while
    if code_of_exit == worker_loop.RECYCLE:
        say_last(mark, AGAIN)
        restart.start_afresh(stopping, ledger.worker)
        code_of_exit = stopping.exit_code
    logging.info("leaving with exit code %d", code_of_exit)
    say_last(mark, code_of_exit)
    if parent is not None:
        restart.leave(code_of_exit)
    raise typer.Exit(code_of_exit)


def _supervised(
    arguments: list[str],
    study: str,
    storage: str | None,
    code: Path | None,
    allow_code_change: bool,
    grace: float | None,
) -> int:
    """Run a worker as a child of this process, which loads no more than it needs. Return the exit code."""
    from hpo.launch import supervisor
    from hpo.launch.slots import Dead
    from hpo.worker import descendants

    def release(dead: Dead) -> bool:
        from hpo.launch import releases  # loads Optuna, which only the end of a worker that died needs

        return releases.release_once(lambda: study_of(study, storage), dead)

    arguments += ["--code", str(code)] if code else []
    arguments += ["--allow-code-change"] if allow_code_change else []
    os.environ |= {"HPO_STORAGE": storage} if storage else {}  # not an argument, which other users can read
    descendants.adopt()
    return supervisor.supervise([*arguments, "--", study], grace=grace, release=release)


def enlist(
    url: str,
    name: str,
    mine: StudyFile | None,
    code: Path | None,
    stopping: StopSignal,
    *,
    allow_code_change: bool,
    is_launched: bool = False,
) -> tuple[Study, Objective]:
    """Join the study and build its objective. A busy storage is waited for, a missing one is an error at once.

    A launched worker waits for a server that does not answer too: it did as the study was launched.
    """
    from hpo.errors import StorageAway, StorageBusy
    from hpo.spec.recovery import Recovery
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
            file = mine.joining(joined.spec) if mine else None
            folder = code.absolute() if code else file.code_folder if file else joined.code_folder
            logging.info("loading %s", joined.spec.own_code or "the code of the training")
            digest = resolve.load_and_digest(joined.spec, folder)
            studies.check_worker(
                joined, mine=file.spec if file else None, code_digest=digest, allow_code_change=allow_code_change
            )
            objective = worker_loop.build_objective(joined, folder)
            undone.pop_all()
        return joined, objective

    # The default patience, since the study's own `recovery.outage_patience` is not read yet.
    borne = (StorageError,) if restart.MARK in os.environ else (StorageBusy, *[StorageAway] * is_launched)
    retry = Retry(Recovery().outage_seconds, stopping, passing=(*borne, *OUTAGES))
    return retry(attempt)
