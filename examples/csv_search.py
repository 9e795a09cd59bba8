"""Writes the two tables that csv_search.toml searches on: scikit-learn's digits, as spreadsheets hold them.

python examples/csv_search.py
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

from sklearn.datasets import load_digits


def write(name: str, rows: Iterable[Iterable[object]]) -> None:
    path = Path(__file__).with_name(name)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    print(f"wrote {path}")


if __name__ == "__main__":
    images, labels = load_digits(return_X_y=True)  # pixels from 0 to 16
    header = [[f"pixel {row},{column}" for row in range(8) for column in range(8)]]
    write("csv_images.csv", header + [[round(255 * pixel / 16) for pixel in image] for image in images.tolist()])
    write("csv_labels.csv", [["digit"]] + [[f"digit {label}"] for label in labels.tolist()])
