"""Commands that use a study's result: export, train, fork."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hpo import text
from hpo.cli.app import CodeOption, StorageOption, again_option, app, quiet_optuna, storage_url
from hpo.worker.signals import StopSignal

if TYPE_CHECKING:
    from hpo.final.train import FinalTraining
    from hpo.spec.study_file import StudySpec
    from hpo.train.epoch import EpochResult


@app.command()
def export(
    study: Annotated[str, typer.Argument(help="Name of the study.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="File to write.")] = Path("best.toml"),
    trial: Annotated[int | None, typer.Option("--trial", min=0, help="This trial instead of the best.")] = None,
    top: Annotated[
        int | None, typer.Option("--top", min=1, help="The best K, as best.1.toml, best.2.toml, ...")
    ] = None,
    front: Annotated[
        bool, typer.Option("--front", help="All trials that none beats in several objectives, as best.1.toml, ...")
    ] = False,
    storage: StorageOption = None,
) -> None:
    """Write the best trial's full config, every value pinned, with a receipt of what it was made from.

    Of several objectives no trial is the best: one is chosen by --trial, or all that none beats are written by --front.
    """
    from hpo.errors import SpecError
    from hpo.storage.connect import connect
    from hpo.study import export as exporting
    from hpo.study import plain

    chosen = {f"--trial {trial}": trial is not None, f"--top {top}": top is not None, "--front": front}
    given = [option for option, is_given in chosen.items() if is_given]
    if len(given) > 1:
        raise SpecError(f"{' and '.join(given)} do not go together; leave one out")
    quiet_optuna()
    opened = plain.open_any(connect(storage_url(storage)), study)
    for path in exporting.export(opened, output, number=trial, top=top, whole_front=front):
        again = text.command("train", path, options=f"-o {text.quoted(f'runs/{path.stem}')}")
        first = ""
        if isinstance(opened, plain.PlainStudy):
            first = 'Optuna made the study and does not know its objective: add objective = "file.py:function", then '
        text.say_command(f"wrote {path}; next: {first}", again)


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
    from hpo.final import train as final

    quiet_optuna()
    spec = final.load_pinned(config)
    folder = code or final.find_code_folder(spec, config)
    output = output or Path("runs") / config.stem
    if spec.objective:
        raise typer.Exit(train_own(spec, config, folder, output, seed=seed, replaying=replay, storage=storage))
    training = final.prepare(config, seed=seed, code_folder=folder)
    text.say(final.describe(training))
    for note in training.splits.notes:
        text.say(f"data: {note}")
    if replay:
        raise typer.Exit(show_replay(training))
    from hpo.final import openings

    url = storage_url(storage, seen(spec.receipt.get("storage")))
    metrics = final.finished(training, output)
    if metrics is not None:
        text.say(f"{output} holds this training, finished; the test split stays shut")
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
        text.say(f"stopped; the same command goes on from {output / final.CHECKPOINT}")
        raise typer.Exit(stopping.exit_code)
    openings.complete(spec, output, url, metrics)
    if metrics["stopped_by"]:
        text.say(f"stopped after epoch {len(metrics['history'])} by {metrics['stopped_by']}")
    text.say(f"validation {spec.metric} {metrics['value']:.4f}, with the weights of epoch {metrics['epoch']}")
    if metrics["overfits_since"] is not None:
        text.say(
            f"overfits since epoch {metrics['overfits_since']}: the validation loss rose while the training loss fell"
        )
    text.say(f"test accuracy {metrics['test_accuracy']:.4f} on {metrics['test_images']} images, opened once")
    text.say(f"in {output}: weights.pt, metrics.json, config.toml, TensorBoard logs{drawn(output)}")


def drawn(output: Path) -> str:
    """Say that there is a picture of the training, or what it takes to get one."""
    from hpo.final.trajectory import FILE

    return f", {FILE}" if (output / FILE).exists() else " (no trajectory.svg: needs matplotlib, the extra `plots`)"


def seen(url: str | None) -> str | None:
    """Return a receipt's storage if it is whole: a password is not in it."""
    return url if url and "***" not in url else None


def note_unrecorded(reason: str | None) -> None:
    if reason:
        text.say(f"note: the opening of the test split is in no ledger: {reason}", to=sys.stderr)


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
    """Run an objective of the user's own once with its pinned parameters; return the exit code."""
    from hpo.errors import SpecError, StudyError
    from hpo.files import write_json
    from hpo.final import user_objective
    from hpo.receipt import receipt

    if seed is not None:
        raise SpecError(f"--seed {seed}: an objective of your own seeds itself; leave it out")
    earlier, why_none = user_objective.earlier_trials(spec, storage_url(storage, seen(spec.receipt.get("storage"))))
    if why_none:
        text.say(f"note: the objective finds no other trial in trial.study: {why_none}", to=sys.stderr)
    value = user_objective.run(spec, config, folder, earlier)
    text.say(f"the objective returned {value!r}")
    if replaying:
        repeats = user_objective.repeats(spec, config, value)
        had = spec.receipt["values" if spec.objectives else "value"]
        text.say(f"trial {spec.receipt['trial']} had {had!r}: {'the same' if repeats else 'another'}")
        return 0 if repeats else 1
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StudyError(f"{output}: cannot be written: {error.strerror}; name another folder with -o") from None
    made = receipt(folder=folder, device="of the objective's choice", threads=None)
    write_json(output / "metrics.json", {"value": value, "params": spec.params, "receipt": made})
    text.say(f"in {output}: metrics.json")
    return 0


def show_replay(training: FinalTraining) -> int:
    """Train the receipt's trial again and say whether its curves came out the same; return the exit code."""
    from hpo.final import train as final

    differences = final.replay(training, show_epoch)
    for one in differences:
        text.say(f"epoch {one.epoch} {one.metric}: trial {one.trial!r}, replay {one.replay!r}", to=sys.stderr)
    trial, epochs = training.spec.receipt.get("trial"), final.curve_length(training)
    equal = (
        "bit for bit" if training.repeats_exactly else f"within {final.TOLERANCE}, for it ran as {training.executor}"
    )
    verdict = "differ from the trial's" if differences else f"equal the trial's {equal}"
    text.say(f"replay of trial {trial}: the curves of {epochs} epochs {verdict}")
    return 1 if differences else 0


def show_epoch(result: EpochResult) -> None:
    further = {name: value for name, value in result.watched.items() if name.startswith("validation_")}
    text.say(
        f"epoch {result.epoch:>4}  train loss {result.train_loss:.4f}  validation loss {result.validation_loss:.4f}  "
        f"validation accuracy {result.validation_accuracy:.4f}  "
        + "".join(f"{name.replace('_', ' ')} {value:.4f}  " for name, value in further.items())
        + f"lr {result.learning_rate:.2e}  {result.seconds:.2f} s"
    )


@app.command()
def fork(
    study: Annotated[str, typer.Argument(help="Name of the study to take trials from.")],
    name: Annotated[str, typer.Argument(help="Name of the new study.")],
    file: Annotated[Path, typer.Argument(help="Study file of the new study.")],
    storage: StorageOption = None,
    code: CodeOption = None,
) -> None:
    """Make a new study from a changed file and take along the finished trials that fit into its space.

    An objective of your own is called with the parameters of trials to learn its space. A call ends at the first report, or 5 s
    after the last parameter.
    """
    from hpo.storage.connect import connect
    from hpo.study import plain, resolve
    from hpo.study.fork import fork_study

    found = resolve.read(file, name=name, code_folder=code)
    quiet_optuna()
    url = storage_url(storage, found.spec.storage)
    plain.open_any(connect(url), study)  # before our tables are made, where they are not
    place = connect(url, create=True)
    forked = fork_study(plain.open_any(place, study), found)
    left = sum(forked.left.values())
    text.say(f"made study {name!r} with {forked.taken} trials of {study!r}; {left} do not fit the new space")
    for why, count in forked.left.items():
        text.say(f"  {count} left: {why}")
    if found.spec.objective:
        text.say("their values are taken as they are; whether the new code would come to the same, you know")
    again = again_option(storage, found.spec.storage, place.shown)
    options = f"--name {text.quoted(name)} {again}".strip()
    text.say_command("next: ", text.command("run", file, options=options))
