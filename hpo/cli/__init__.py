"""The command line: parse, call, print.

Each module holds the commands of one purpose. A command imports heavy modules only when it runs. Nothing is computed here.
"""

from __future__ import annotations

from hpo.cli import after, confirm, copy, fleet, lab, manage, results, run, show
from hpo.cli.app import app, command, main

__all__ = ["after", "app", "command", "confirm", "copy", "fleet", "lab", "main", "manage", "results", "run", "show"]

# The order in the help. A command that is missing here fails at import.
ORDER = (
    *("init", "check", "run", "worker", "launch", "fleet", "scale", "recall"),
    *("status", "logs", "pause", "resume", "stop", "enqueue", "doctor", "dashboard"),
    *("confirm", "report", "export", "train", "after", "mlflow", "replay", "fork", "import", "copy", "delete"),
)
app.registered_commands.sort(key=lambda one: ORDER.index(one.name or getattr(one.callback, "__name__", "")))
