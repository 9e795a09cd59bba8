"""The command line: parse, call, print."""

from __future__ import annotations

from hpo.cli import looking, searching, steering, using
from hpo.cli.app import app, main

__all__ = ["app", "looking", "main", "searching", "steering", "using"]
