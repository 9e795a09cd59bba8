"""The command of the replay laboratory: replay."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hpo import text
from hpo.cli.app import JsonOption, StorageOption, app, examples, quiet_optuna, study_of

if TYPE_CHECKING:
    from hpo.lab.table import Table


@app.command(
    epilog=examples(
        "hpo replay digits --sampler recorded --pruner hyperband",
        "hpo replay digits --save digits.npz",
        "hpo replay digits.npz --sampler tpe --pruner hyperband --set pruner.reduction_factor=4",
    )
)
def replay(
    study: Annotated[
        str, typer.Argument(metavar="STUDY|TABLE", help="Name of a study, its study file, or a table (.npz).")
    ],
    sampler: Annotated[
        str, typer.Option("--sampler", help="A sampler's name, or recorded: the trials begin in their recorded order.")
    ] = "tpe",
    pruner: Annotated[str, typer.Option("--pruner", help="A pruner's name.")] = "median",
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="An option of the sampler, the pruner or the divergence guard, such as pruner.n_warmup_steps=3. May be "
            "repeated.",
        ),
    ] = None,
    workers: Annotated[int, typer.Option("--workers", min=1, max=4096, help="Number of simulated workers.")] = 8,
    slots: Annotated[
        int,
        typer.Option(
            "--slots",
            min=1,
            max=4096,
            help="Number of trials that each worker trains together, at most an even share of all.",
        ),
    ] = 1,
    seeds: Annotated[int, typer.Option("--seeds", min=1, max=10_000, help="Number of replays.")] = 30,
    epochs: Annotated[
        int | None,
        typer.Option(
            "--epochs",
            min=1,
            help="Budget of a replay over all workers. Default: 40 full trials, or all recorded ones.",
        ),
    ] = None,
    most_cut: Annotated[
        float,
        typer.Option("--most-cut", min=0.0, max=1.0, help="Largest share of trials whose curve may have been cut off."),
    ] = 0.1,
    processes: Annotated[
        int | None, typer.Option("--processes", min=1, max=4096, help="Number of processes. Default: one per core.")
    ] = None,
    save: Annotated[Path | None, typer.Option("--save", help="Only write the study's trials as a table.")] = None,
    storage: StorageOption = None,
    json: JsonOption = False,
) -> None:
    """Replay a sampler and a pruner on recorded curves. Nothing is trained, and the study is only read.

    Simulated workers of different speeds train the trials of a study or a table, one at a time or `--slots` of them in a
    stack. The nearest unused trial stands for each proposal of the sampler. Record the study with sampler random and pruner
    none.
    """
    from hpo.lab import plan, report, table
    from hpo.view import replays

    quiet_optuna()
    found = recorded(study, storage)
    if save is not None:
        table.save(found, save)
        text.say(f"wrote {save}: {len(found.rows)} trials of {found.name!r}, {save.stat().st_size / 1000:,.0f} kB")
        return
    planned = plan.make(
        found,
        sampler=sampler,
        pruner=pruner,
        settings=settings or [],
        workers=workers,
        slots=slots,
        epochs=epochs,
        most_cut=most_cut,
    )
    shown = report.replay_all(planned, seeds, processes or len(os.sched_getaffinity(0)))
    if json:
        text.say_json(replays.to_json(shown))
    else:
        text.say_page(replays.report_text(shown))


def recorded(word: str, storage: str | None) -> Table:
    """Return the table in a file, or of a study."""
    from hpo.lab import recording, table
    from hpo.study import plain

    if word.endswith(table.SUFFIX):
        found = table.load(Path(word))
        recording.check(found, word)
        return found
    name, place = study_of(word, storage)
    return recording.record(plain.open_any(place, name))
