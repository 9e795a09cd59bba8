"""Functions as a notebook's cell makes them: of the module `__main__`, in no file."""

from __future__ import annotations

from typing import Any

#: A cell, or a module, with an objective that trains until there is a file `go` in the current folder.
SLOW = """
import pathlib, time
def objective(trial):
    x = trial.suggest_float("x", 0, 1)
    pathlib.Path(f"begun-{trial.number}").touch()
    while not pathlib.Path("go").exists():
        trial.report(x, 1)
        time.sleep(0.05)
    return x
"""


def cell(*sources: str) -> Any:
    """Run one cell after another in a fresh notebook and return its function `f`."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for source in sources:
        exec(compile(source, "<cell>", "exec"), names)
    return names["f"]
