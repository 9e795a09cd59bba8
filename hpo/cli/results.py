"""Commands that use the results of a study: export, train, mlflow, fork, import."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hpo import text
from hpo.cli.app import (
    CodeOption,
    StorageOption,
    again_option,
    app,
    examples,
    quiet_optuna,
    study_of,
    users_folder,
)
from hpo.loading import uncollected
from hpo.strategy.quiet import quiet_warnings
from hpo.worker.signals import StopSignal

if TYPE_CHECKING:
    from hpo.final.train import FinalTraining
    from hpo.spec.study_file import StudySpec
    from hpo.storage.connect import Storage
    from hpo.study.plain import PlainStudy
    from hpo.study.resolve import StudyFile
    from hpo.study.source import Source
    from hpo.study.study import Study
    from hpo.train.epoch import EpochResult

MLFLOW_STORE = "sqlite:///mlflow.db"  # as MLflow itself
MOST_NUMBERS = 20  # of trials in a message
MLFLOW_SECONDS = 5.0  # between two exports


@app.command(
    epilog=examples("hpo export digits -o best.toml", "hpo export digits --top 3", "hpo export digits --trial 11")
)
def export(
    study: Annotated[str, typer.Argument(help="Name of the study, or its study file.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="File to write.")] = Path("best.toml"),
    trial: Annotated[int | None, typer.Option("--trial", min=0, help="Export this trial instead of the best.")] = None,
    top: Annotated[
        int | None, typer.Option("--top", min=1, help="Export the best K trials: best.1.toml, best.2.toml, ...")
    ] = None,
    front: Annotated[
        bool, typer.Option("--front", help="Export the Pareto front of several objectives: best.1.toml, ...")
    ] = False,
    confirmed: Annotated[
        bool, typer.Option("--confirmed", help="Export the trial that `hpo confirm` found best, or within delta of it.")
    ] = False,
    storage: StorageOption = None,
) -> None:
    """Write the config of the best trial, with all values pinned and a receipt of its origin.

    A study with several objectives has no best trial: choose a trial with --trial, or export the Pareto front with --front.
    """
    from hpo.errors import SpecError
    from hpo.receipt import BEST_STEP
    from hpo.study import export as exporting
    from hpo.study import plain
    from hpo.study.format import value_text, with_interval
    from hpo.view import words

    chosen = {
        f"--trial {trial}": trial is not None,
        f"--top {top}": top is not None,
        "--front": front,
        "--confirmed": confirmed,
    }
    given = [option for option, is_given in chosen.items() if is_given]
    if len(given) > 1:
        raise SpecError(f"{' and '.join(given)} cannot be combined; remove one")
    quiet_warnings()
    name, place = study_of(study, storage)
    opened = plain.open_any(place, name)
    before = {*output.parent.iterdir()} if output.parent.is_dir() else set()
    number, receipt = winner_of(opened) if confirmed else (trial, None)
    written = exporting.export(opened, output, number=number, top=top, whole_front=front, confirmed=receipt)
    for path, result in written.items():
        again = text.command("train", path, options=f"-o {text.quoted(f'runs/{path.stem}')}")
        first = ""
        if isinstance(opened, plain.PlainStudy):
            first = 'Optuna made the study and does not know its objective: add objective = "file.py:function", then '
        verb = "replaced" if path in before else "wrote"
        value = "" if result.values else f", {with_interval(result.value, result.interval)}"
        text.say_command(f"{verb} {path}: trial {result.number}{value}; next: {first}", again)
        if origin := exporting.taken_from(opened, result):
            text.say(f"note: this study has not trained it; it took the result from {words.origin(origin)}")
        if isinstance(opened, plain.PlainStudy) or opened.spec.is_declared or not result.checkpoint:
            continue
        if opened.spec.has_program:
            text.say(f"what its program saved: {result.checkpoint}")
        else:
            of_step = f" of step {result.receipt[BEST_STEP]}" if BEST_STEP in result.receipt else ""
            text.say_command(f"its weights{of_step}: ", f"hpo.load_weights({result.checkpoint!r})")
    if receipt is not None:
        text.say(f"confirmed by {receipt['runs']} runs: mean {value_text(receipt['mean'])}, in {receipt['study']!r}")
        if lines := newer_of(opened, again_option(storage, None, place.shown)):
            text.say_page("\n".join(lines))
    elif trial is None and (lines := warnings_of(opened, again_option(storage, None, place.shown))):
        text.say_page("\n".join(lines))


def winner_of(opened: Study | PlainStudy) -> tuple[int, dict[str, Any]]:
    """Return the number of the confirmed trial and what a receipt says of it. Raises StudyError without a verdict."""
    from hpo.analysis import confirmation
    from hpo.errors import StudyError
    from hpo.study.study import Study

    if not isinstance(opened, Study):
        raise StudyError(f"study {opened.name!r} was made by Optuna; hpo confirms only studies of its own")
    return confirmation.winner(opened)


def newer_of(opened: Study | PlainStudy, again: str) -> list[str]:
    """Return lines on good trials that the search has added since its confirmation."""
    from hpo.analysis import confirmation
    from hpo.study.study import Study
    from hpo.view import confirmed

    found = confirmation.read(opened) if isinstance(opened, Study) else None
    return confirmed.newer_lines(found, again) if found else []


def warnings_of(opened: Study | PlainStudy, again: str) -> list[str]:
    """Return lines on chance, and on leaders that tie or lie within the noise, for a trial chosen by its value."""
    from hpo.study import plain
    from hpo.study.study import Study
    from hpo.view import chance, confirmed

    summary = plain.summarize(opened)
    own = confirmed.choice_lines(opened, summary.best, again) if isinstance(opened, Study) else []
    return [*chance.choice_lines(summary), *own]


@app.command(
    epilog=examples(
        "hpo train best.toml -o runs/digits", "hpo train best.toml --seeds 5", "hpo train best.toml --replay"
    )
)
def train(
    config: Annotated[Path, typer.Argument(help="Pinned config, as `hpo export` writes it.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", help="Folder for weights, metrics and logs. Default: runs/ and the config's name."
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Seed. Default: the seed of the trial.")] = None,
    several: Annotated[
        int | None,
        typer.Option(
            "--seeds", min=2, max=10_000, help="Train with so many new seeds, and test all models in one opening."
        ),
    ] = None,
    replay: Annotated[
        bool, typer.Option("--replay", help="Repeat the trial and compare its curves, without a test.")
    ] = False,
    storage: StorageOption = None,
    code: CodeOption = None,
) -> None:
    """Train a pinned config and test it. Writes weights, metrics and TensorBoard logs.

    Each new folder opens the test split again. The study records every opening.
    """
    from hpo.errors import SpecError

    with uncollected():
        from hpo.final import train as final
        from hpo.view import chance

        quiet_optuna()
        gc.freeze()  # what is loaded is no garbage
    if several is not None and replay:
        raise SpecError(f"--seeds {several} and --replay cannot be combined: a replay has the trial's seed; remove one")
    spec = final.load_pinned(config)
    folder = code or final.find_code_folder(spec, config)
    output = output or Path("runs") / config.stem
    if not spec.is_declared:
        if several is not None:
            raise SpecError(
                f"--seeds {several}: your {own_word(spec)} gets the seed of its trial, and hpo sees no test part of it; "
                "remove --seeds"
            )
        raise typer.Exit(train_own(spec, config, folder, output, seed=seed, replaying=replay, storage=storage))
    with users_folder():
        training = final.prepare(config, seed=seed, code_folder=folder)
    text.say(final.describe(training, several))
    for note in training.splits.notes:
        text.say(f"data: {note}")
    if replay:
        raise typer.Exit(show_replay(training))
    with uncollected():
        from hpo.final import openings
        from hpo.storage.connect import storage_url
        from hpo.view.pages import openings_text

        gc.freeze()
    url = storage_url(storage, seen(spec.receipt.get("storage")))
    if several is not None:
        train_several(training, several, output, url)
        return
    metrics = final.finished(training, output)
    if metrics is not None:
        text.say(f"{output} holds this training, already finished; the test split is not opened again")
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
        text.say(f"stopped; the same command continues from {output / final.CHECKPOINT}")
        raise typer.Exit(stopping.exit_code)
    opened = openings.complete(spec, output, url, metrics)
    if metrics["stopped_by"]:
        text.say(f"stopped after epoch {len(metrics['history'])} by {metrics['stopped_by']}")
    text.say_page(text.page(chance.outcome_lines(metrics, spec.metric, tried=spec.receipt.get("trials_tried", 0))))
    if opened:
        text.say(f"test split of trial {spec.receipt.get('trial')}: {openings_text(opened)}")
    text.say(f"in {output}: weights.pt, metrics.json, config.toml, TensorBoard logs{drawn(output)}")


def train_several(training: FinalTraining, count: int, output: Path, url: str) -> None:
    """Train with several seeds, test all models in one opening, and print the mean."""
    from hpo.final import openings
    from hpo.final import several as final
    from hpo.view import chance
    from hpo.view.pages import openings_text

    spec, several = training.spec, final.SeveralSeeds(first=training, count=count)
    metrics = final.finished(several, output)
    if metrics is not None:
        text.say(f"{output} holds these trainings, already finished; the test split is not opened again")
    else:
        stopping = StopSignal.installed()
        metrics = final.train(
            several,
            output,
            stop=stopping,
            began=lambda one, place: text.say(f"seed {place} of {count}: {one.seed}"),
            progress=show_epoch,
            before_test=lambda: note_unrecorded(openings.announce(spec, output, url, trainings=count)),
        )
    if metrics is None:
        text.say(f"stopped; the same command continues in {output}")
        raise typer.Exit(stopping.exit_code)
    opened = openings.complete(spec, output, url, final.test_means(metrics))
    text.say_page(text.page(chance.seeds_lines(metrics, spec.metric)))
    if opened:
        text.say(f"test split of trial {spec.receipt.get('trial')}: {openings_text(opened)}")
    text.say(
        f"in {output}: metrics.json, and {several.names[0]} to {several.names[-1]} with weights.pt and logs of each"
    )


def drawn(output: Path) -> str:
    """Return the name of the training's plot, or what is missing to draw it."""
    from hpo.final.trajectory import FILE

    return f", {FILE}" if (output / FILE).exists() else " (no trajectory.svg: needs matplotlib, the extra `plots`)"


def seen(url: str | None) -> str | None:
    """Return a receipt's storage URL, None if its password was hidden."""
    return url if url and "***" not in url else None


def note_unrecorded(reason: str | None) -> None:
    if reason:
        text.say(f"note: the opening of the test split could not be recorded in the study: {reason}", to=sys.stderr)


def train_own(
    spec: StudySpec,
    config: Path,
    folder: Path,
    output: Path,
    *,
    seed: int | None,
    replaying: bool,
    storage: str | None,
) -> int:
    """Run the user's own objective once with its pinned parameters. Return the exit code."""
    from hpo.errors import SpecError, StudyError
    from hpo.files import write_json
    from hpo.final import program_site, user_objective
    from hpo.receipt import receipt
    from hpo.storage.connect import storage_url
    from hpo.study import program_folder

    if seed is not None:
        raise SpecError(f"--seed {seed}: an objective of your own gets the seed of its trial; remove --seed")
    if not replaying and (output / "metrics.json").exists():
        raise StudyError(f"{output}: holds the result of an earlier run; remove it, or name another folder with -o")
    earlier, why_none = user_objective.earlier_trials(spec, storage_url(storage, seen(spec.receipt.get("storage"))))
    if why_none:
        text.say(f"note: trial.study holds no other trial: {why_none}", to=sys.stderr)
    with users_folder(), program_site.given(spec, output, replaying=replaying) as site:
        done = user_objective.run(spec, config, folder, earlier, loop=site)
    told = "the program's value is" if spec.command else "the objective returned"
    text.say(f"{told} {done.value!r}")
    if replaying:
        return say_difference(spec, user_objective.difference(spec, config, done))
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StudyError(f"{output}: cannot be written: {error.strerror}; name another folder with -o") from None
    made = receipt(folder=folder, device=f"of the {own_word(spec)}'s choice", threads=None)
    write_json(output / "metrics.json", {"value": done.value, "params": spec.params or spec.space, "receipt": made})
    has_saved = site is not None and program_folder.holds_files(site.folder)
    text.say(f"in {output}: metrics.json{', checkpoint/' if has_saved else ''}")
    return 0


def own_word(spec: StudySpec) -> str:
    """Return what a user's own training is called in messages."""
    return "program" if spec.command else "objective"


def say_difference(spec: StudySpec, difference: str | None) -> int:
    """Print whether the replay of a user's own objective equals the trial. Return the exit code."""
    trial, curves = spec.receipt["trial"], spec.receipt.get("curves", {})
    if difference is None:
        steps = max(map(len, curves.values()), default=0)
        text.say(f"replay of trial {trial}: the value and the curve of {steps} steps equal the trial's bit for bit")
        return 0
    why = f"the {own_word(spec)} draws something without a seed, or its code, its data or a package changed"
    text.say(f"replay of trial {trial} differs {difference}; {why}")
    return 1


def show_replay(training: FinalTraining) -> int:
    """Repeat the receipt's trial and print whether its curves are equal. Return the exit code."""
    from hpo.final import train as final

    differences = final.replay(training, show_epoch)
    for one in differences:
        text.say(f"epoch {one.epoch} {one.metric}: trial {one.trial!r}, replay {one.replay!r}", to=sys.stderr)
    trial, epochs = training.spec.receipt.get("trial"), final.curve_length(training)
    equal = (
        "bit for bit" if training.repeats_exactly else f"within {final.TOLERANCE}, since it ran as {training.executor}"
    )
    verdict = "differ from the trial's" if differences else f"equal the trial's {equal}"
    text.say(f"replay of trial {trial}: the curves of {epochs} epochs {verdict}")
    return 1 if differences else 0


def show_epoch(result: EpochResult) -> None:
    from hpo.study.format import value_text

    known = {"validation_accuracy": result.validation_accuracy, **result.watched}
    further = {name: value for name, value in known.items() if name.startswith("validation_") and value is not None}
    text.say(
        f"epoch {result.epoch:>4}  train loss {value_text(result.train_loss)}  "
        f"validation loss {value_text(result.validation_loss)}  "
        + "".join(f"{name.replace('_', ' ', 1)} {value_text(value)}  " for name, value in further.items())
        + f"lr {result.learning_rate:.2e}  {result.seconds:.2f} s"
    )


@app.command(epilog=examples("hpo mlflow digits", "hpo mlflow digits --to sqlite:////home/me/mlflow.db --follow"))
def mlflow(
    study: Annotated[str, typer.Argument(help="Name of the study, or its study file.")],
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            help="MLflow's tracking URI. Default: $MLFLOW_TRACKING_URI, else sqlite:///mlflow.db; no server needed.",
        ),
    ] = None,
    follow: Annotated[
        bool, typer.Option("-f", "--follow", help="Go on until the study is over, or until Ctrl-C.")
    ] = False,
    storage: StorageOption = None,
) -> None:
    """Write a study into MLflow: a run for the study, and in it a run for each trial. The study itself is only read.

    A second call updates the runs. Call it for one study only once at a time.
    """
    from hpo.errors import SpecError
    from hpo.spec import extras
    from hpo.study import study as studies

    if (why := extras.missing("mlflow")) is not None:
        raise SpecError(f"hpo mlflow: {why}")
    quiet_warnings()
    name, place = study_of(study, storage)
    joined = studies.join(place, name)
    from hpo.view.mlflow_runs import Exporter  # takes 3 s

    uri = to or os.environ.get("MLFLOW_TRACKING_URI") or MLFLOW_STORE
    exporter = Exporter(joined, uri)
    summary = exporter.export()
    while follow and not summary.is_over:
        time.sleep(MLFLOW_SECONDS)
        summary = exporter.export()
    text.say(f"wrote {sum(summary.counts.values()) - summary.counts['waiting']} trials of {name!r} to {exporter.shown}")


LackingOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Value that old trials had for a parameter that they lack."),
]
RenameOption = Annotated[
    list[str] | None, typer.Option("--rename", metavar="OLD=NEW", help="New name of an old parameter.")
]


@app.command(
    epilog=examples("hpo fork digits digits-2 study.toml", "hpo fork mine mine-2 mine.toml --set momentum=0.9")
)
def fork(
    study: Annotated[str, typer.Argument(help="Name of the study to take trials from.")],
    name: Annotated[str, typer.Argument(help="Name of the new study.")],
    file: Annotated[Path, typer.Argument(help="Study file of the new study.")],
    lacking: LackingOption = None,
    rename: RenameOption = None,
    storage: StorageOption = None,
    code: CodeOption = None,
) -> None:
    """Create a new study from a changed file and copy the finished trials that fit its space.

    A parameter that old trials lack has the constant of the old study, else the value of --set. One that is a constant in the
    new file must have had that value.

    To learn the space of your own objective, hpo calls it with the parameters of each trial. A call ends at the first report,
    or 5 s after the last parameter. After 60 s of calls, a trial is copied if all trials with the same choices fit so far.
    Such trials are named.
    """
    from hpo.storage.connect import connect, storage_url
    from hpo.study import plain, resolve, source

    with users_folder():
        found = resolve.read(file, name=name, code_folder=code)
    quiet_optuna()
    url = storage_url(storage, found.spec.storage)
    plain.open_any(connect(url), study)  # before our tables are created, if they do not exist
    place = connect(url, create=True)
    taking = source.of(plain.open_any(place, study))
    take_trials(taking, found, place, lacking, rename, storage=storage)


@app.command(
    "import",
    epilog=examples(
        "hpo import sqlite:///old.db theirs --like study.toml",
        "hpo import journal.log theirs --like study.toml --rename lr=optimizer.lr",
    ),
)
def import_(
    url: Annotated[str, typer.Argument(help="Storage of the Optuna study: a URL, or the file of a JournalStorage.")],
    study: Annotated[str, typer.Argument(help="Name of the Optuna study.")],
    file: Annotated[Path, typer.Option("--like", help="Study file of the new study.")],
    name: Annotated[
        str | None, typer.Option("--as", help="Name of the new study. Default: the name in the file.")
    ] = None,
    lacking: LackingOption = None,
    rename: RenameOption = None,
    storage: StorageOption = None,
    code: CodeOption = None,
) -> None:
    """Create a new study that begins with the finished trials of an Optuna study, from any of Optuna's storages.

    The trials keep their values, curves and states, and the sampler learns from them. The budget is not charged for them. What
    does not fit the new space is listed. Nothing is written to the Optuna study.
    """
    from hpo.storage.connect import connect, storage_url
    from hpo.study import resolve, source

    with users_folder():
        found = resolve.read(file, name=name, code_folder=code)
    quiet_optuna()
    with source.opened(url, study) as taking:
        place = connect(storage_url(storage, found.spec.storage), create=True)
        take_trials(taking, found, place, lacking, rename, storage=storage, may_be_empty=False)


def take_trials(
    source: Source,
    found: StudyFile,
    place: Storage,
    lacking: list[str] | None,
    rename: list[str] | None,
    *,
    storage: str | None,
    may_be_empty: bool = True,
) -> None:
    """Make a study with the trials of another one that fit, and print what became of them.

    Args:
        source: the other study.
        found: the new study.
        place: its storage.
        lacking: words such as `lr=0.1`: values of parameters that old trials lack.
        rename: words such as `lr=optimizer.lr`: new names of old parameters.
        storage: the option of the command.
        may_be_empty: make the study also if no trial fits.
    """
    from hpo.spec import configuration
    from hpo.study.fork import NOT_ASKED_KEY, fork_study

    names = {old: str(new) for old, new in configuration.of_words(rename or []).items()}
    values = configuration.of_words(lacking or [])
    forked = fork_study(source, found, place, lacking=values, renamed=names, may_be_empty=may_be_empty)
    name, study = found.spec.name, source.name
    left = sum(forked.left.values())
    text.say(f"made study {name!r} with {forked.taken} trials of {study!r}; {left} do not fit the new space")
    for why, numbers in forked.left_behind.items():
        text.say(f"  {len(numbers)} left: {why}: {some(numbers)}")
    if forked.unfinished:
        told = ", ".join(f"{count} {word}" for word, count in forked.unfinished.items())
        text.say(f"  without a result, so not taken: {told}")
    if forked.assumed:
        text.say(
            f"  {len(forked.assumed)} taken without a call, after {forked.asked} calls: every called trial with the same choices "
            "fits; if the objective's parameters depend on a number, some of these may lack one"
        )
        text.say(f"  they have the user attribute {NOT_ASKED_KEY}; in {study!r} they are {some(forked.assumed)}")
    if forked.taken and forked.changed:
        text.say("other constants than in the old study, so the values may differ from those of new trials:")
        for line in forked.changed:
            text.say(f"  {line}")
    if not found.spec.is_declared or source.spec is None:
        text.say("their values are taken as they are; hpo cannot know whether the new code gives the same values")
    if found.spec.start:
        text.say(f"queued from [[start]]: {len(found.spec.start)}, also if an old trial has had the same values")
    again = again_option(storage, found.spec.storage, place.shown)
    options = f"--name {text.quoted(name)} {again}".strip()
    text.say_command("next: ", text.command("run", found.path, options=options))


def some(numbers: Sequence[int]) -> str:
    """Return the numbers of trials, the first MOST_NUMBERS of them."""
    further = f" and {len(numbers) - MOST_NUMBERS} more" if len(numbers) > MOST_NUMBERS else ""
    return ", ".join(map(str, numbers[:MOST_NUMBERS])) + further
