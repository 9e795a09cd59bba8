"""Manifests as YAML that people read and every parser understands alike."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import yaml

# A word that no YAML parser, of version 1.1 or 1.2, takes for a number, a date or a boolean. Others are quoted.
WORD = re.compile(r"[A-Za-z/][A-Za-z0-9_./:=@-]+")


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]  # PyYAML has no types
    def ignore_aliases(self, _: Any) -> bool:
        return True  # equal parts are written out


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    style = "|" if "\n" in value else None if WORD.fullmatch(value) else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)


def dump(documents: Sequence[Any]) -> str:
    """Return documents as one YAML stream."""
    text: str = yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, explicit_start=len(documents) > 1, width=120)
    return text
