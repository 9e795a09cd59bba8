"""The Typer application, its exit codes, and the options that several commands share."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hpo import __version__, text
from hpo.errors import Fault
from hpo.strategy.quiet import quiet_warnings

if TYPE_CHECKING:
    from hpo.storage.connect import Storage

app = typer.Typer(
    name="hpo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Hyperparameter search for PyTorch: one study, many workers, crash-safe, with a config to train at the end.",
    epilog="\n\n".join(
        [
            "Start: hpo init study.toml, then hpo check study.toml, then hpo run study.toml",
            "Your shell completes commands and options after: hpo --install-completion",
        ]
    ),
)

#: The base class of all errors in a command line. typer has no public name for it, and its module differs between versions.
ClickException = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

StorageOption = Annotated[
    str | None,
    typer.Option(
        "--storage",
        help="Database: sqlite:///FILE or postgresql://USER@HOST/DB. Default: $HPO_STORAGE, else sqlite:///studies.db.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print only JSON.")]
CodeOption = Annotated[
    Path | None, typer.Option("--code", help="Folder of your own code. Default: the folder of the study file.")
]
CodeChangeOption = Annotated[
    bool,
    typer.Option("--allow-code-change", help="Continue although your own code changed. The study records the change."),
]
NameOption = Annotated[str | None, typer.Option("--name", help="Name of the study. Default: the name in the file.")]


def main() -> None:
    """Run the command line and exit. A Fault prints its message, without a traceback, and gives exit code 2."""
    speak_safely()
    try:
        code = app(standalone_mode=False)
    except Fault as fault:
        text.say_page(f"error: {fault}", to=sys.stderr)
        code = 2
    except KeyboardInterrupt:  # before a command has installed its own handlers
        code = 130
    except typer.Abort as aborted:  # typer raises it for an interrupt and for the end of the input
        interrupted = isinstance(aborted.__cause__, KeyboardInterrupt)
        if not interrupted:
            text.say(f"error: aborted: {aborted.__cause__ or 'no answer was given'}", to=sys.stderr)
        code = 130 if interrupted else 1
    except SystemExit as ended:
        code = ended.code
    except Exception as error:
        storages = sys.modules.get("hpo.storage.connect")  # if it is not loaded, the storage is not the cause
        if isinstance(error, ClickException):
            tell_usage(error)
            code = 2
        elif storages is not None and isinstance(error, storages.FAILURES):
            text.say(f"error: the storage failed: {storages.cause(error)}", to=sys.stderr)
            code = 2
        else:
            text.say_page(text.traceback_page(error), to=sys.stderr)
            code = 1
    if not isinstance(code, int | None):  # user code may call sys.exit with a message
        text.say(code, to=sys.stderr)
        code = 1
    sys.exit(code)


def speak_safely() -> None:
    """Make log lines and warnings safe to show in a terminal."""
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(text.Formatter())
    warnings.formatwarning = text.warning_line


def tell_usage(error: Exception) -> None:
    """Print the mistake in a command line and the usage of the command."""
    told = io.StringIO()
    error.show(file=told)  # type: ignore[attr-defined]
    if said := told.getvalue().rstrip("\n"):  # empty for `hpo` without arguments, which prints the help
        text.say_page(said, to=sys.stderr)
    parameter = getattr(error, "param", None)
    if getattr(parameter, "name", None) == "study" and type(error).__name__ == "MissingParameter":
        tell_studies(error.ctx.params.get("storage"))  # type: ignore[attr-defined]


def tell_studies(storage: str | None) -> None:
    """Print the studies to choose from, as `hpo status` does, or why they cannot be read."""
    from hpo.storage.connect import FAILURES, cause
    from hpo.study import plain
    from hpo.view import pages

    quiet_warnings()
    try:
        text.say_page(pages.status_table(plain.statuses(open_to_read(storage))), to=sys.stderr)
    except Fault as fault:
        text.say_page(str(fault), to=sys.stderr)
    except FAILURES as error:
        text.say(f"the storage failed: {cause(error)}", to=sys.stderr)


def command() -> None:
    """Run the command `hpo`. When it ends, all processes that it started end too.

    If torch is loaded, the process exits without finalizing the interpreter, which would take a second.
    """
    from hpo.worker import descendants

    descendants.adopt()
    try:
        main()
    except SystemExit as ended:
        if "torch" not in sys.modules:
            raise
        from hpo.worker import restart

        restart.leave(int(ended.code or 0))


def show_version(wanted: bool) -> None:
    if wanted:
        text.say(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    del version  # shown by its callback


def study_of(word: str, storage: str | None) -> tuple[str, Storage]:
    """Return a study's name and its storage, opened to read.

    Args:
        word: the name, or a study file.
        storage: the option.
    """
    if not word.endswith(".toml"):
        return word, open_to_read(storage)
    from hpo.spec.study_file import StudySpec

    spec = StudySpec.load(Path(word))
    return spec.name, open_to_read(storage, spec.storage)


def open_to_read(given: str | None, of_file: str | None = None) -> Storage:
    """Open the storage for a command that writes nothing, so a read-only one will do. Print what cannot be read of it."""
    from hpo.storage.connect import connect, storage_url

    place = connect(storage_url(given, of_file), only_reads=True)
    if place.file is not None and (unread := place.file.unread):
        text.say(f"note: {unread}", to=sys.stderr)
    return place


def again_option(given: str | None, of_file: str | None, shown: str) -> str:
    """Return the `--storage` option that the next commands need, "" if they find the storage without it."""
    if given is None and ("HPO_STORAGE" in os.environ or of_file is None):
        return ""
    return '--storage "$HPO_STORAGE"' if "***" in shown else f"--storage {text.quoted(shown)}"


def examples(*lines: str) -> str:
    """Return the end of a command's help: command lines to start from."""
    return "\n\n".join(["Examples:", *lines])


def users_folder() -> AbstractContextManager[None]:
    """Restore the working folder after the block. User code may change it, as scripts do, and our paths are relative to it."""
    return contextlib.chdir(".")


def quiet_optuna() -> None:
    """Silence Optuna's info messages and some of its warnings."""
    import optuna

    quiet_warnings()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    for handler in logging.getLogger("optuna").handlers:  # Optuna sets its own format
        handler.setFormatter(text.Formatter())
