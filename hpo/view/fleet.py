"""The fleet of a study as a printed page and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from hpo import text
from hpo.queue.launches import Launch
from hpo.study.fleet import Fleet, Worker
from hpo.study.format import duration

States = Mapping[int, Mapping[int, str] | None]  # of the slots that an engine still has, by launch
MOST_TRIALS = 4  # numbers in a line
LONGEST_HOST, LONGEST_GPU = 20, 16  # characters


def fleet_text(fleet: Fleet, states: States) -> str:
    """Return the fleet: a line for each launch, then a line for each worker."""
    found = text.all_safe(fleet)
    count, running = len(found.workers), len(found.summary.running)
    lines = [f"{found.summary.name}: {_counted(count, 'worker')} at work, {_counted(running, 'trial')} running"]
    lines += [*(_launch_line(one, found, states.get(one.number)) for one in found.launches)]
    lines += [f"  last refused worker of launch {one.number}: {one.refused}" for one in found.launches if one.refused]
    return text.page([*lines, *_table(found)])


def fleet_json(fleet: Fleet, states: States) -> dict[str, Any]:
    """Return the fleet as JSON values."""
    return {
        "study": fleet.summary.name,
        "workers": [{key: getattr(worker, key) for key in Worker.__dataclass_fields__} for worker in fleet.workers],
        "launches": [
            {
                "launch": one.number,
                "engine": one.engine,
                "workers": len(one.wanted),
                "retired": sorted(one.retired),
                "jobs": [dict(handle) for handle in one.handles],
                "states": states.get(one.number),
                "launched_by": one.launched_by,
                "launched_at": one.launched_at,
                "recalled_at": one.recalled_at,
                "refused": one.refused,
            }
            for one in fleet.launches
        ],
    }


def _launch_line(one: Launch, fleet: Fleet, states: Mapping[int, str] | None) -> str:
    living = sum(worker.launch == one.number for worker in fleet.workers)
    when = f"{datetime.fromtimestamp(one.launched_at):%Y-%m-%d %H:%M}"
    if one.recalled_at is not None:
        how = "called back" + (f", {living} still leave" if living else "")
    else:
        how = f"{living} of {len(one.wanted)} at work" + _queued(one, states)
    return f"launch {one.number}  {one.engine}  {how}  by {one.launched_by} {when}"


def _queued(one: Launch, states: Mapping[int, str] | None) -> str:
    if states is None:
        return f" ({one.engine} cannot be asked from here)"
    pending = sum(state == "pending" for state in states.values())
    jobless, ended = len(one.wanted - one.submitted), len((one.wanted & one.submitted) - states.keys())
    told = {"wait in the queue": pending, "not submitted yet": jobless, "ended": ended}
    return "".join(f", {count} {what}" for what, count in told.items() if count)


def _table(fleet: Fleet) -> list[str]:
    if not fleet.workers:
        return []
    rows = [("WORKER", "HOST", "GPU", "TRIALS", "EPOCHS/S", "SEEN"), *map(_row, fleet.workers)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _row(worker: Worker) -> tuple[str, ...]:
    label = f"pid {worker.pid}" if worker.launch is None else f"{worker.launch}.{worker.slot}"
    speed = "-" if worker.epochs_per_second is None else f"{worker.epochs_per_second:.3g}"
    seen = f"{duration(worker.silent_seconds)} ago"
    return (
        label,
        _cut(worker.host, LONGEST_HOST),
        _cut(worker.gpus or "-", LONGEST_GPU),
        _numbers(worker.trials),
        speed,
        seen,
    )


def _numbers(trials: Sequence[int]) -> str:
    shown = ", ".join(map(str, trials[:MOST_TRIALS])) or "-"
    return shown + (f" and {len(trials) - MOST_TRIALS} more" if len(trials) > MOST_TRIALS else "")


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _cut(word: str, longest: int) -> str:
    return word if len(word) <= longest else f"{word[: longest - 3]}..."
