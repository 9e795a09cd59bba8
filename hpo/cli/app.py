"""The command line's frame: the application, its ends, and the options that several commands share."""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from hpo import __version__, text
from hpo.errors import Fault

app = typer.Typer(
    name="hpo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Hyperparameter search for PyTorch: one study, many workers, nothing lost, a config that trains.",
)

#: Of every mistake in a command line. typer has no public name for it, and keeps it in another module in each version.
ClickException = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

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
    speak_safely()
    try:
        code = app(standalone_mode=False)
    except Fault as fault:
        text.say_page(f"error: {fault}", to=sys.stderr)
        code = 2
    except KeyboardInterrupt:  # before a command has handlers of its own
        code = 130
    except typer.Abort as aborted:  # typer's own, in place of an interrupt or of an input that ended
        interrupted = isinstance(aborted.__cause__, KeyboardInterrupt)
        if not interrupted:
            text.say(f"error: aborted: {aborted.__cause__ or 'no answer was given'}", to=sys.stderr)
        code = 130 if interrupted else 1
    except SystemExit as ended:
        code = ended.code
    except Exception as error:
        storages = sys.modules.get("hpo.storage.connect")  # not imported yet: then it was not the storage
        if isinstance(error, ClickException):
            tell_usage(error)
            code = 2
        elif storages is not None and isinstance(error, storages.FAILURES):
            text.say(f"error: the storage failed: {storages.cause(error)}", to=sys.stderr)
            code = 2
        else:
            text.say_page(text.traceback_page(error), to=sys.stderr)
            code = 1
    if not isinstance(code, int | None):  # as user code may end a process
        text.say(code, to=sys.stderr)
        code = 1
    sys.exit(code)


def speak_safely() -> None:
    """Make log lines and warnings safe to show, as all that we print ourselves."""
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(text.Formatter())
    warnings.formatwarning = text.warning_line


def tell_usage(error: Exception) -> None:
    """Print what is wrong with a command line, and how the command is used."""
    told = io.StringIO()
    error.show(file=told)  # type: ignore[attr-defined]
    if said := told.getvalue().rstrip("\n"):  # nothing is wrong where help was asked for by giving nothing
        text.say_page(said, to=sys.stderr)


def command() -> None:
    """Be the command `hpo`, whose end is that of all it started.

    Where torch is loaded the process ends without taking the interpreter apart, which takes a second.
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


def storage_url(given: str | None, of_file: str | None = None) -> str:
    """Return the storage to use: the option, else the environment, else the file, else studies.db here."""
    return given or os.environ.get("HPO_STORAGE") or of_file or DEFAULT_STORAGE


def again_option(given: str | None, of_file: str | None, shown: str) -> str:
    """Return what the next commands need to find the storage; nothing where they find it as this one did."""
    if given is None and ("HPO_STORAGE" in os.environ or of_file is None):
        return ""
    return '--storage "$HPO_STORAGE"' if "***" in shown else f"--storage {text.quoted(shown)}"


def quiet_optuna() -> None:
    """Keep Optuna's log lines out of ours, and its notes that what the study file chose by name is experimental, and that
    its own storage keeps no choices but scalars.
    """
    import optuna

    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    warnings.filterwarnings("ignore", message="Choices for a categorical distribution should be")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    for handler in logging.getLogger("optuna").handlers:  # its own, with a format of its own
        handler.setFormatter(text.Formatter())
