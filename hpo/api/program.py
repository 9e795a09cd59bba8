"""What the program of a command calls: `report`."""

from __future__ import annotations

import json
import os


def report(value: float, epoch: int) -> None:
    """Send a value from a program that `hpo` has started by `command = [...]`. Any process of the program may call this.

    Args:
        value: the metric, a number.
        epoch: a whole number from 0. Each epoch has one value.

    Raises RuntimeError in a process that no command's trial has started. Raises TypeError for a value that is no number, and
    ValueError for an epoch that is no whole number.
    """
    file = os.environ.get("HPO_REPORTS")
    if file is None:
        raise RuntimeError(
            f"hpo.report({value!r}, {epoch!r}): this process is not of a trial; it works in a program that `hpo run` or "
            "`hpo train` starts by command = [...]; an objective calls trial.report"
        )
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"hpo.report: value {value!r} is a {type(value).__name__}, not a number") from None
    if int(epoch) != epoch or epoch < 0:
        raise ValueError(f"hpo.report: epoch {epoch!r} is not a whole number from 0")
    line = json.dumps({"value": number, "epoch": int(epoch)})
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.write(descriptor, f"{line}\n".encode())  # one write, so that lines of several processes do not mix
    finally:
        os.close(descriptor)
