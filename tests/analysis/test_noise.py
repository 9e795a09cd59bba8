"""The noise of trials' values, and how many trials lie within it of the best."""

from __future__ import annotations

import math

from hpo.analysis import noise


def test_a_share_moves_by_one_image_and_a_loss_has_no_such_step() -> None:
    found = noise.of_one_item("accuracy", 270)
    assert found == noise.Noise(size=1 / 270, source="one of 270 validation examples")
    assert noise.of_one_item("loss", 270) is None
    assert noise.of_one_item("accuracy", None) is None


def test_ties_and_neighbours_of_the_best_are_counted() -> None:
    item = noise.of_one_item("top_2_accuracy", 270)
    values = [268 / 270, 268 / 270, 267 / 270, 266 / 270, math.nan]
    found = noise.closeness(values, "maximize", item)
    assert (found.tied, found.within, found.is_close) == (2, 3, True)
    assert noise.closeness([3.0, 1.0, 2.0], "minimize", None) == noise.Closeness(tied=1, within=1, noise=None)
    assert noise.closeness([], "minimize", None).tied == 0


def test_the_larger_of_two_noises_counts() -> None:
    runs = noise.of_runs(0.01, 25)
    assert noise.larger(noise.of_one_item("accuracy", 270), runs, None) == runs
    assert noise.of_runs(math.nan, 0) is None
    assert noise.larger() is None
