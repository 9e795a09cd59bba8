"""Which executor a study gets: measured once, remembered for as long as nothing has changed, and always explained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hpo.data import Splits
from hpo.spec import space
from hpo.spec.study_file import StudySpec
from hpo.spec.training import TrainConfig
from hpo.study import resolve
from hpo.train.build import assemble, executor, measurement_cache
from hpo.train.build.executor import Choice
from hpo.train.run import Run
from hpo.train.stack import sizing
from hpo.train.stack.layers import Forward
from tests.support.declared import DOCUMENT

CPU = torch.device("cpu")


def prepared(folder: Path, **changes: object) -> tuple[StudySpec, TrainConfig, Splits]:
    spec = resolve.resolve(StudySpec.from_document({**DOCUMENT, "executor": "auto", **changes}), folder)
    config = TrainConfig.from_tree(space.middle(spec.tree, {}))
    return spec, config, assemble.load_splits(config, spec.split_seed, folder, CPU)


def test_what_was_measured_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    size = sizing.Size(slots=8, rates={1: 100.0, 8: 400.0})

    def measure(
        forward: Forward,
        make: Callable[[int], Run],
        step: float,
        *,
        may_lose: bool,
        need: sizing.Need | None,
        sharers: int,
    ) -> sizing.Size:
        assert (need, sharers) == (None, 1)  # memory is not counted on a CPU
        calls.append(may_lose)
        return size

    monkeypatch.setattr(sizing, "measure", measure)
    spec, config, splits = prepared(tmp_path)
    first = executor.choose(spec, config, splits, tmp_path, CPU)
    assert (first.executor, first.slots) == ("stack", 8)
    assert "4.0 times as fast as one" in first.why
    assert executor.choose(spec, config, splits, tmp_path, CPU) == first
    assert calls == [True]
    forced, *_ = prepared(tmp_path, executor="stack")
    executor.choose(forced, config, splits, tmp_path, CPU)
    assert calls == [True, False]  # another wish is another question
    measurement_cache.home().write_text("{ not json")
    executor.choose(spec, config, splits, tmp_path, CPU)
    assert calls == [True, False, True]
    kept = json.loads(measurement_cache.home().read_text())
    measurement_cache.home().write_text(json.dumps({key: {"of": "another version"} for key in kept}))
    executor.choose(spec, config, splits, tmp_path, CPU)
    assert calls == [True, False, True, True]


def test_what_is_remembered_depends_on_code_in_every_folder() -> None:
    """A stack's code lies two folders below `hpo.train`'s, a model's elsewhere."""
    names = {"/".join(file.parts[-3:]) for file in executor.code_files()}
    assert {"train/stack/forward.py", "train/optim/sam.py", "hpo/train/loop.py", "hpo/models/mlp.py"} <= names
    assert all(file.is_file() for file in executor.code_files())


def test_the_loop_is_taken_where_no_stack_is_faster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = sizing.Size(slots=1, rates={1: 100.0, 2: 90.0, 4: 80.0})
    monkeypatch.setattr(sizing, "measure", lambda *arguments, **settings: slow)
    choice = executor.choose(*prepared(tmp_path), tmp_path, CPU)
    assert (choice.executor, choice.slots) == ("loop", 1)
    assert "1: 100, 2: 90, 4: 80" in choice.why


def test_a_slow_step_is_not_measured_further(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "step_alone", lambda run: 3.0)
    choice = executor.choose(*prepared(tmp_path), tmp_path, CPU)
    assert (choice.executor, choice.slots) == ("loop", 1)
    assert "a step takes 3.00 s" in choice.why


@pytest.mark.parametrize("wish", [{"executor": "loop"}, {"slots": 1}])
def test_one_at_a_time_is_the_loop_unmeasured(tmp_path: Path, wish: dict[str, object]) -> None:
    choice = executor.choose(*prepared(tmp_path, **wish), tmp_path, CPU)
    assert (choice.executor, choice.slots) == ("loop", 1)
    assert not measurement_cache.home().exists()


def test_measuring_climbs_until_twice_as_many_are_no_faster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, config, splits = prepared(tmp_path)
    seconds = {2: 0.011, 4: 0.012, 8: 0.013, 16: 0.026, 32: 0.052}
    monkeypatch.setattr(sizing, "_stacked_step", lambda forward, runs: seconds[len(runs)])

    def make(seed: int) -> Run:
        return assemble.build_run(config, splits, seed, tmp_path, CPU)

    found = sizing.measure(None, make, 0.01)  # it is measured by the table above
    assert found.slots == 8
    assert list(found.rates) == [1, 2, 4, 8, 16, 32]  # two misses end it


def test_memory_that_runs_out_ends_the_climb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, config, splits = prepared(tmp_path)

    def step(forward: Forward, runs: list[Run]) -> float:
        if len(runs) > 4:
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"
            )
        return 0.01

    monkeypatch.setattr(sizing, "_stacked_step", step)
    found = sizing.measure(None, lambda seed: assemble.build_run(config, splits, seed, tmp_path, CPU), 0.01)
    assert found.slots == 4


def test_a_choice_with_one_slot_is_the_loop() -> None:
    wide = Choice(executor="vmap", slots=16, why="measured")
    assert (wide.limited(4, "x").executor, wide.limited(4, "x").slots) == ("vmap", 4)
    assert (wide.limited(1, "x").executor, wide.limited(1, "x").slots) == ("loop", 1)
    assert wide.limited(16, "x") == wide


def test_why_a_small_budget_is_trained_one_by_one_is_told_first(tmp_path: Path) -> None:
    spec = resolve.resolve(StudySpec.from_document({**DOCUMENT, "slots": "auto", "sampler": {"name": "tpe"}}), tmp_path)
    wide = Choice(executor="stack", slots=4, why="4 together train 1.9 times as fast as one")
    found = executor.spread(wide, spec, budget=10, fleet=2)
    assert (found.executor, found.slots) == ("loop", 1)
    assert found.why == (
        "no more than 1 at once of 10 trials in 2 workers, since tpe learns from finished trials; "
        "without this limit: 4 together train 1.9 times as fast as one"
    )
