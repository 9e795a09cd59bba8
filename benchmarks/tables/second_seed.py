"""Trains the best fifth of a table's trials again, with another seed of the training and the same split.

What they come to is written into the table. So a search can be done on one seed and scored on the other.

    $ python benchmarks/tables/second_seed.py mlp
"""

from __future__ import annotations

import argparse
import math
import tempfile
import tomllib
from pathlib import Path

import tomli_w

import hpo
from hpo.lab import recording
from hpo.lab import table as tables
from hpo.lab.table import Table
from hpo.storage.connect import connect
from hpo.study import study as studies

HERE = Path(__file__).parent
SHARE = 0.2  # of the complete trials
SEED = 1  # the tables are recorded with seed 0


def trained_again(first: Table, file: Path, folder: Path) -> Table:
    """Search the best trials of a table again, as queued trials of a study of their own in this folder.

    Args:
        first: the table.
        file: the study file that it was recorded with.
        folder: where the study and its file are kept. What is there goes on.
    """
    chosen = first.complete[: math.ceil(SHARE * len(first.complete))]
    document = tomllib.loads(file.read_text())
    document |= {"name": f"{first.name}-again", "seed": SEED, "budget": {"trials": len(chosen)}}
    document["data"]["split_seed"] = first.spec.split_seed
    again, storage = folder / "again.toml", f"sqlite:///{folder / 'studies.db'}"
    again.write_text(tomli_w.dumps(document))
    study = hpo.search(again, workers=0, storage=storage, code=file.parent)
    if not study.optuna.trials:
        for place in chosen:
            study.optuna.enqueue_trial(first.rows[place].external)
    hpo.search(again, workers=1, storage=storage, code=file.parent)
    opened = connect(storage)
    second = recording.record(studies.join(opened, study.name))
    opened.close()
    return second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("table", help="name of a table of this folder, such as mlp")
    parser.add_argument("--folder", type=Path, help="where to keep the study; default: nowhere")
    given = parser.parse_args()
    file = HERE / f"{given.table}.npz"
    first = tables.load(file)
    with tempfile.TemporaryDirectory(prefix="hpo-again-") as passing:
        folder = (given.folder or Path(passing)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        found = first.trained_again(trained_again(first, file.with_suffix(".toml"), folder))
    tables.save(found, file)
    print(f"{file}: {len(found.again_order)} trials trained again, {file.stat().st_size / 1000:,.0f} kB")


if __name__ == "__main__":
    main()
