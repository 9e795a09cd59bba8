"""The command line: parse, call, print. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import contextlib
import json as jsons
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hpo import __version__
from hpo.errors import Fault, StorageError
from hpo.signals import StopSignal

if TYPE_CHECKING:
    from hpo.final import Training
    from hpo.spec import StudySpec
    from hpo.study import Study
    from hpo.train.loop import EpochResult

app = typer.Typer(
    name="hpo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Hyperparameter search for PyTorch: one study, many workers, nothing lost, a config that trains.",
)

DEFAULT_STORAGE = "sqlite:///studies.db"
StorageOption = Annotated[
    str | None,
    typer.Option(
        "--storage", help="sqlite:///FILE or postgresql://USER@HOST/DB; else $HPO_STORAGE, else sqlite:///studies.db"
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for a program and nothing else.")]
CodeOption = Annotated[Path | None, typer.Option("--code", help="Folder of your own code, if not the study file's.")]
CodeChangeOption = Annotated[
    bool, typer.Option("--allow-code-change", help="Go on although your own code changed; the study records it.")
]
NameOption = Annotated[str | None, typer.Option("--name", help="Name of the study, instead of the file's.")]


def main() -> None:
    """Run the command line; a fault is one clear message and exit code 2, never a traceback."""
    try:
        app()
    except Fault as fault:
        print(f"error: {fault}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # before a command has handlers of its own
        sys.exit(130)
    except Exception as error:
        storages = sys.modules.get("hpo.storage")  # not imported yet: then it was not the storage
        if storages is None or not isinstance(error, storages.FAILURES):
            raise
        print(f"error: the storage failed: {storages.cause(error)}", file=sys.stderr)
        sys.exit(2)


def show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    del version  # shown by its callback


def storage_url(given: str | None, of_file: str | None = None) -> str:
    """Return the storage to use: the option, else the environment, else the file, else studies.db here."""
    return given or os.environ.get("HPO_STORAGE") or of_file or DEFAULT_STORAGE


@app.command()
def init(file: Annotated[Path, typer.Argument(help="Study file to write.")] = Path("study.toml")) -> None:
    """Write a commented study file to start from."""
    from importlib import resources

    from hpo.errors import SpecError

    template = resources.files("hpo").joinpath("templates/study.toml").read_text()
    placeholder = '"my-study"'
    try:
        with file.open("x") as handle:
            handle.write(template.replace(placeholder, jsons.dumps(file.stem).ljust(len(placeholder))))
    except FileExistsError:
        raise SpecError(f"{file}: is there already; name another file") from None
    except OSError as error:
        raise SpecError(f"{file}: cannot be written: {error.strerror}") from None
    typer.echo(f"wrote {file}; next: hpo check {file}")


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="Study file.")],
    workers: Annotated[int | None, typer.Option("--workers", min=1, help="Workers to reckon the cost with.")] = None,
    code: CodeOption = None,
) -> None:
    """Explain a study file: its space, its model, one measured epoch, what the budget costs, likely mistakes."""
    from hpo import studyfile
    from hpo.fleet.local import default_workers
    from hpo.view import checked

    found = studyfile.read(file, code_folder=code)
    typer.echo(checked.spec_text(found.spec))
    if found.spec.objective:
        from hpo.lint import lint

        typer.echo(checked.warnings_text(lint(found.spec)))
        return
    from hpo.check import examine

    typer.echo(checked.findings_text(found.spec, examine(found.spec, found.code_folder), workers or default_workers()))


@app.command()
def run(
    file: Annotated[Path, typer.Argument(help="Study file.")],
    storage: StorageOption = None,
    workers: Annotated[
        int | None,
        typer.Option("--workers", min=0, help="Local workers: one per GPU, else one per core; 0 only makes the study."),
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
    from hpo import search as searching
    from hpo import storage as storages
    from hpo import study as studies
    from hpo import studyfile
    from hpo.errors import SpecError
    from hpo.fleet.local import Fleet, default_workers, last_words
    from hpo.spec import seconds
    from hpo.summary import summarize
    from hpo.view.live import LiveView

    limit = seconds(timeout, "--timeout") if timeout else None
    with contextlib.redirect_stdout(sys.stderr):  # what your own code prints when it is imported is no result
        found = studyfile.read(file, name=name, code_folder=code)
    if found.spec.is_pinned:
        raise SpecError(f"{file}: holds no range, so there is nothing to search; train it with `hpo train {file}`")
    if limit is None and found.spec.budget.timeout:
        limit = seconds(found.spec.budget.timeout, "budget.timeout")
    quiet_optuna()
    place = storages.connect(storage_url(storage, found.spec.storage), create=True)
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
    if summarize(study).is_over:
        reason = study.stop_reason or "the budget is spent; --trials N raises it"
        typer.echo(f"nothing is left to do: {reason}", err=True)
    elif not count:
        typer.echo(f"made study {study.name!r}; next: hpo worker {study.name}{again} on each machine", err=True)
    else:
        fleet = Fleet(study, count, code_folder=found.code_folder, allow_code_change=allow_code_change)
        code_of_exit = searching.search(study, fleet, view, timeout=limit)
        if fleet.failed:
            typer.echo(last_words(fleet.failed), err=True)
            code_of_exit = code_of_exit or fleet.exit_code
    report_end(studies.join(place, study.name), json=json, drawn=view.has_drawn, again=again)
    raise typer.Exit(code_of_exit)


def again_option(given: str | None, of_file: str | None, shown: str) -> str:
    """Return what the next commands need to find the storage; nothing where they find it as this one did."""
    if given is None and ("HPO_STORAGE" in os.environ or of_file is None):
        return ""
    return ' --storage "$HPO_STORAGE"' if "***" in shown else f" --storage {shown}"


def report_end(study: Study, *, json: bool, drawn: bool, again: str) -> None:
    """Print how a run ended: the winner and what to do with it, why there is none, or how to go on.

    Args:
        drawn: the terminal still shows the live view's last picture.
        again: what the next commands need to find the storage.
    """
    from hpo.errors import StudyError
    from hpo.results import best
    from hpo.summary import summarize
    from hpo.view import live

    summary = summarize(study)
    if json:
        typer.echo(jsons.dumps(live.to_json(summary)))
        return
    if not drawn:
        typer.echo(live.status_text(summary))
    if not summary.is_over:
        typer.echo("next     the same command goes on from here, or hpo status for what holds it up")
        return
    try:
        typer.echo(live.winner_text(best(study)[0]))
        typer.echo(f"next     hpo export {study.name}{again} -o best.toml && hpo train best.toml -o runs/{study.name}")
    except StudyError as error:
        typer.echo(str(error), err=True)


@app.command()
def worker(
    study: Annotated[str, typer.Argument(help="Name of the study, or a study file to hold against it.")],
    storage: StorageOption = None,
    code: CodeOption = None,
    allow_code_change: CodeChangeOption = False,
    parent: Annotated[int | None, typer.Option("--parent", hidden=True, help="Leave when this process dies.")] = None,
    name: Annotated[str | None, typer.Option("--as", hidden=True, help="Name to hold leases under.")] = None,
) -> None:
    """Join a study from anywhere with one more process; space, sampler and pruner come from the study."""
    from hpo import storage as storages
    from hpo import study as studies
    from hpo import studyfile
    from hpo import worker as workers
    from hpo.fleet.local import TRY_AGAIN

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    quiet_optuna()
    stopping = StopSignal.installed()
    mine = studyfile.read(Path(study), code_folder=code) if study.endswith(".toml") else None
    url = storage_url(storage, mine.spec.storage if mine else None)
    try:
        place = storages.connect(url, patience=storages.BUSY_SECONDS if parent else None)
        joined = studies.join(place, mine.spec.name if mine else study)
        folder = code.absolute() if code else mine.code_folder if mine else joined.code_folder
        digest = studyfile.load_and_digest(joined.spec, folder)
        studies.check_worker(
            joined, mine=mine.spec if mine else None, code_digest=digest, allow_code_change=allow_code_change
        )
        ledger = joined.ledger(name or workers.new_name())
        logging.info("joined study %r in %s as %s", joined.name, place.shown, ledger.worker)
        code_of_exit = workers.work(joined, workers.build_objective(joined, folder), ledger, stopping, parent=parent)
    except StorageError as error:
        if parent is None:
            raise
        logging.error("%s", error)
        code_of_exit = TRY_AGAIN  # the fleet starts another worker after a while
    logging.info("leaving with exit code %d", code_of_exit)
    if parent is not None:
        workers.leave(code_of_exit)
    raise typer.Exit(code_of_exit)


@app.command()
def status(
    study: Annotated[str | None, typer.Argument(help="Name of a study; all of them if left out.")] = None,
    storage: StorageOption = None,
    json: JsonOption = False,
) -> None:
    """Show how studies stand: trials by state, best so far, what runs, what is parked, what failed."""
    from hpo import storage as storages
    from hpo import study as studies
    from hpo.summary import statuses, summarize
    from hpo.view import live

    quiet_optuna()
    place = storages.connect(storage_url(storage))
    if study is None:
        summaries = statuses(place)
        typer.echo(jsons.dumps([live.to_json(one) for one in summaries]) if json else live.status_table(summaries))
        return
    summary = summarize(studies.join(place, study))
    typer.echo(jsons.dumps(live.to_json(summary)) if json else live.status_text(summary))


@app.command()
def dashboard(
    storage: StorageOption = None,
    host: Annotated[str, typer.Option("--host", help="Address to serve on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port to serve on.")] = 8080,
    write: Annotated[bool, typer.Option("--write", help="Allow changes, by anybody who reaches the address.")] = False,
) -> None:
    """Serve optuna-dashboard for the storage, read-only."""
    from hpo import storage as storages
    from hpo.view import dashboard as web

    quiet_optuna()
    web.serve(storages.connect(storage_url(storage)), host, port, write)


@app.command()
def export(
    study: Annotated[str, typer.Argument(help="Name of the study.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="File to write.")] = Path("best.toml"),
    trial: Annotated[int | None, typer.Option("--trial", min=0, help="This trial instead of the best.")] = None,
    top: Annotated[int, typer.Option("--top", min=1, help="The best K, as best.1.toml, best.2.toml, ...")] = 1,
    storage: StorageOption = None,
) -> None:
    """Write the best trial's full config, every value pinned, with a receipt of what it was made from."""
    from hpo import export as exporting
    from hpo import storage as storages
    from hpo import study as studies
    from hpo.errors import SpecError

    if trial is not None and top > 1:
        raise SpecError(f"--trial {trial} and --top {top} do not go together; leave one out")
    quiet_optuna()
    opened = studies.join(storages.connect(storage_url(storage)), study)
    for path in exporting.export(opened, output, number=trial, top=top):
        typer.echo(f"wrote {path}; next: hpo train {path} -o runs/{path.stem}")


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="Pinned config, as `hpo export` writes it.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder for weights, metrics, logs.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Another seed than the trial's.")] = None,
    replay: Annotated[
        bool, typer.Option("--replay", help="Train the trial again and compare its curves; no test.")
    ] = False,
    storage: StorageOption = None,
    code: CodeOption = None,
) -> None:
    """Train a pinned config to the end, open the test split once, leave weights, metrics and TensorBoard logs."""
    from hpo import final

    quiet_optuna()
    spec = final.load_pinned(config)
    folder = code or final.find_code_folder(spec, config)
    output = output or Path("runs") / config.stem
    if spec.objective:
        raise typer.Exit(train_own(spec, config, folder, output, seed=seed, replaying=replay))
    training = final.prepare(config, seed=seed, code_folder=folder)
    typer.echo(final.describe(training))
    if replay:
        raise typer.Exit(show_replay(training))
    from hpo import openings

    url = storage_url(storage, seen(spec.receipt.get("storage")))
    metrics = final.finished(training, output)
    if metrics is not None:
        typer.echo(f"{output} holds this training, finished; the test split stays shut")
    else:
        stopping = StopSignal.installed()
        metrics = final.train(
            training,
            output,
            stop=stopping,
            progress=show_epoch,
            before_test=lambda: note_unrecorded(openings.announce(spec, output, url)),
        )
    if metrics is None:
        typer.echo(f"stopped; the same command goes on from {output / final.CHECKPOINT}")
        raise typer.Exit(stopping.exit_code)
    openings.complete(spec, output, url, metrics)
    typer.echo(f"validation {spec.metric} {metrics['value']:.4f}, with the weights of epoch {metrics['epoch']}")
    typer.echo(f"test accuracy {metrics['test_accuracy']:.4f} on {metrics['test_images']} images, opened once")
    typer.echo(f"in {output}: weights.pt, metrics.json, config.toml, TensorBoard logs")


def seen(url: str | None) -> str | None:
    """Return a receipt's storage if it is whole: a password is not in it."""
    return url if url and "***" not in url else None


def note_unrecorded(reason: str | None) -> None:
    if reason:
        typer.echo(f"note: the opening of the test split is in no ledger: {reason}", err=True)


def train_own(spec: StudySpec, config: Path, folder: Path, output: Path, *, seed: int | None, replaying: bool) -> int:
    """Run an objective of the user's own once with its pinned parameters; return the exit code."""
    from hpo import owntrain
    from hpo.errors import SpecError, StudyError
    from hpo.jsonfile import write_json
    from hpo.receipt import receipt

    if seed is not None:
        raise SpecError(f"--seed {seed}: an objective of your own seeds itself; leave it out")
    value = owntrain.run(spec, config, folder)
    typer.echo(f"the objective returned {value!r}")
    if replaying:
        repeats = owntrain.repeats(spec, config, value)
        typer.echo(
            f"trial {spec.receipt['trial']} had {spec.receipt['value']!r}: {'the same' if repeats else 'another'}"
        )
        return 0 if repeats else 1
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StudyError(f"{output}: cannot be written: {error.strerror}; name another folder with -o") from None
    made = receipt(folder=folder, device="of the objective's choice", threads=None)
    write_json(output / "metrics.json", {"value": value, "params": spec.params, "receipt": made})
    typer.echo(f"in {output}: metrics.json")
    return 0


def show_replay(training: Training) -> int:
    """Train the receipt's trial again and say whether its curves came out the same; return the exit code."""
    from hpo import final

    differences = final.replay(training, show_epoch)
    for one in differences:
        typer.echo(f"epoch {one.epoch} {one.metric}: trial {one.trial!r}, replay {one.replay!r}", err=True)
    trial, epochs = training.spec.receipt.get("trial"), final.curve_length(training)
    verdict = "differ from the trial's" if differences else "equal the trial's bit for bit"
    typer.echo(f"replay of trial {trial}: the curves of {epochs} epochs {verdict}")
    return 1 if differences else 0


def show_epoch(result: EpochResult) -> None:
    typer.echo(
        f"epoch {result.epoch:>4}  train loss {result.train_loss:.4f}  validation loss {result.validation_loss:.4f}  "
        f"validation accuracy {result.validation_accuracy:.4f}  lr {result.learning_rate:.2e}  {result.seconds:.2f} s"
    )


@app.command()
def fork(
    study: Annotated[str, typer.Argument(help="Name of the study to take trials from.")],
    name: Annotated[str, typer.Argument(help="Name of the new study.")],
    file: Annotated[Path, typer.Argument(help="Study file of the new study.")],
    storage: StorageOption = None,
    code: CodeOption = None,
) -> None:
    """Make a new study from a changed file and take along the finished trials that fit into its space."""
    from hpo import forking, studyfile
    from hpo import storage as storages
    from hpo import study as studies

    found = studyfile.read(file, name=name, code_folder=code)
    quiet_optuna()
    place = storages.connect(storage_url(storage, found.spec.storage))
    taken, left = forking.fork(studies.join(place, study), found)
    typer.echo(f"made study {name!r} with {taken} trials of {study!r}; {left} do not fit the new space")
    again = again_option(storage, found.spec.storage, place.shown)
    typer.echo(f"next: hpo run {file} --name {name}{again}")


def quiet_optuna() -> None:
    """Keep Optuna's log lines out of ours, and its notes that what the study file chose by name is experimental."""
    import optuna

    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
