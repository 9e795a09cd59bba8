"""The command line: parse, call, print."""

from __future__ import annotations

from hpo.cli import finishing, looking, searching, steering, using
from hpo.cli.app import app, command, main

__all__ = ["app", "command", "finishing", "looking", "main", "searching", "steering", "using"]

# As a person meets them; one that is not among them fails here.
ORDER = (
    *("init", "check", "run", "worker"),
    *("status", "pause", "resume", "stop", "doctor", "dashboard"),
    *("export", "train", "after", "fork"),
)
app.registered_commands.sort(key=lambda command: ORDER.index(getattr(command.callback, "__name__", "")))
