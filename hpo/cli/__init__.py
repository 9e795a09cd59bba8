"""The command line: parse, call, print."""

from __future__ import annotations

from hpo.cli import finishing, looking, searching, steering, using
from hpo.cli.app import app, main

__all__ = ["app", "finishing", "looking", "main", "searching", "steering", "using"]
