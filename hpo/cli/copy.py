"""The command that copies studies from one storage to another: copy."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from hpo import text
from hpo.cli.app import JsonOption, app, examples
from hpo.strategy.quiet import quiet_warnings

if TYPE_CHECKING:
    from hpo.storage.connect import Storage
    from hpo.study.copying import Copied


@app.command(
    epilog=examples(
        'hpo copy sqlite:///studies.db "$HPO_STORAGE"',
        'hpo copy sqlite:///studies.db "$HPO_STORAGE" digits --checkpoints /shared/hpo',
        'hpo copy "$HPO_STORAGE" sqlite:///archive.db digits --keep-source',
    )
)
def copy(
    source: Annotated[str, typer.Argument(metavar="FROM", help="Database with the studies, as for --storage.")],
    target: Annotated[
        str, typer.Argument(metavar="TO", help="Database to copy them into. A missing SQLite file is made.")
    ],
    studies: Annotated[
        list[str] | None, typer.Argument(metavar="[STUDY]...", help="Names of studies. Default: all studies.")
    ] = None,
    checkpoints: Annotated[
        str | None,
        typer.Option(
            "--checkpoints",
            help="Folder or bucket to copy checkpoints into. Default: as for a new study in that database.",
        ),
    ] = None,
    no_checkpoints: Annotated[
        bool, typer.Option("--no-checkpoints", help="Copy no checkpoints: unfinished trials start again.")
    ] = False,
    keep_source: Annotated[
        bool,
        typer.Option("--keep-source", help="Let workers go on with the old study, too. Its copy goes its own way."),
    ] = False,
    json: JsonOption = False,
) -> None:
    """Copy studies into another database, with their checkpoints. Nothing is overwritten, and each study arrives whole.

    The copy is counted and compared. Afterwards the old study is held, so that nobody goes on with it by accident. Refused
    while workers are at work on it.
    """
    from hpo.analysis.confirmation import SUFFIX
    from hpo.errors import SpecError
    from hpo.storage.connect import connect
    from hpo.study import copying
    from hpo.study import study as known

    if checkpoints is not None and no_checkpoints:
        raise SpecError(f"--checkpoints {checkpoints} and --no-checkpoints cannot be combined; remove one")
    quiet_warnings()
    old = connect(source, only_reads=keep_source)
    names = list(dict.fromkeys(studies or known.all_names(old)))
    copying.refuse_unfit(old, names)
    new = connect(target, create=True)
    copying.refuse_clash(old, new, names)
    done = []
    for name in names:
        copied = copying.copy_study(
            old, new, name, to=checkpoints, checkpoints=not no_checkpoints, hold=not keep_source
        )
        done.append(copied)
        if not json:
            tell(copied, old, new)
    if not json:
        there = {*known.all_names(old)} - {*names, *known.all_names(new)}
        for sister in (f"{name}{SUFFIX}" for name in names):
            if sister in there:
                text.say(f"not copied: {text.quoted(sister)}, the confirmation; it is a study of its own: name it, too")
    if json:
        text.say_json([as_json(one, old, new) for one in done])


def tell(copied: Copied, old: Storage, new: Storage) -> None:
    """Print what was copied, what became of the old study, and how the new one goes on."""
    rows, tables = sum(one.rows for one in copied.tables), len(copied.tables)
    trials = copied.rows_of("trials")
    text.say(
        f"copied {copied.name!r}: {counted(trials, 'trial')}; {rows:,} rows of {tables} tables compared, all equal"
    )
    if copied.files is not None:
        files = copied.files
        text.say(f"  {counted(files.checkpoints, 'checkpoint')} in {files.store.place} ({files.size / 2**20:.1f} MiB)")
    if copied.open:
        text.say(f"  {counted(copied.open, 'trial')} parked, which the next worker goes on with")
    if copied.foreign:
        text.say(f"  {counted(copied.foreign, 'trial')} RUNNING in another program, with which nobody goes on there")
    if copied.is_held:
        again = text.command("resume", copied.name, options=storage_option(old, "FROM"))
        text.say_command("  the old study is held; to work on it all the same: ", again)
    if copied.files is None:
        text.say_command("  next: ", text.command("status", copied.name, options=storage_option(new, "TO")))
    else:
        text.say_command("  next: ", text.command("run", options=f"FILE {storage_option(new, 'TO')}"))


def storage_option(place: Storage, argument: str) -> str:
    """Return the `--storage` option of a next command.

    Args:
        place: the storage.
        argument: the word for it in the usage of this command. It stands for a URL with a secret.
    """
    if "***" not in place.shown:
        return f"--storage {text.quoted(place.shown)}"
    from hpo.storage.connect import parse_url, storage_url

    is_default = "HPO_STORAGE" in os.environ and parse_url(storage_url(None)) == place.url
    return '--storage "$HPO_STORAGE"' if is_default else f"--storage {argument}"


def counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def as_json(copied: Copied, old: Storage, new: Storage) -> dict[str, object]:
    """Return what was copied, with the count and the digest of each table."""
    return {
        "study": text.short(copied.name),
        "from": old.shown,
        "to": new.shown,
        "tables": {one.name: {"rows": one.rows, "digest": one.digest} for one in copied.tables},
        "checkpoints": None if copied.files is None else copied.files.store.place,
        "parked": copied.open,
        "foreign": copied.foreign,
        "held": copied.is_held,
    }
