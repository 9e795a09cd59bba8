"""Images that do not fit are read batch by batch, and everything comes out as if they were resident, bit for bit."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from hpo import data
from hpo.data import SOURCES, Source, Split, Splits, Stored, Strength, select
from hpo.data import stored as storing
from hpo.spec.failures import Kind, kind_of
from hpo.train import loop
from hpo.train.inputs import AHEAD, PreparedTensor
from hpo.train.randomness import initial_model
from hpo.train.run import Run
from hpo.train.stack import select as select_forward
from hpo.train.validation import assess
from tests.support.stacks import Trial, stack_of, stop_before, timeless, train, weights
from tests.train.test_loop import Noisy, build_cnn, build_mlp, make


def source() -> Source:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % 3
    images = torch.randint(0, 200, (120, 1, 8, 8), dtype=torch.uint8, generator=generator)
    images[:, 0, 0] += (labels * 20).to(torch.uint8)[:, None]
    return Source(inputs=images, targets=labels, num_classes=3)


def load(*, resident: bool | None, **options: Any) -> Splits:
    return data.load(select(source(), resident=resident, **options), split_seed=0, device="cpu")


def both(**options: Any) -> list[Splits]:
    found = [load(resident=resident, **options) for resident in (True, False)]
    assert [isinstance(splits.train.inputs, Stored) for splits in found] == [False, True]
    return found


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("options", [{}, {"classes": [2, 0]}, {"folds": 3, "fold": 1, "subset": 60}])
def test_what_is_known_of_the_data_is_the_same(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storing, "CHUNK", 640)  # ten images at a time
    resident, streamed = both(**options)
    assert streamed.digest == resident.digest
    assert torch.equal(streamed.mean, resident.mean)
    assert torch.equal(streamed.std, resident.std)
    assert streamed.train.inputs.shape == resident.train.inputs.shape
    everything = torch.arange(len(resident.train.inputs))
    assert torch.equal(streamed.train.inputs.take(everything), resident.train.inputs)
    tests = [data.load_test(select(source(), resident=r, **options), split_seed=0, device="cpu") for r in (True, False)]
    model = initial_model(build_mlp, 0)
    evaluated = [assess(model, test, splits=resident) for test in tests]
    assert evaluated[0] == evaluated[1]


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (build_mlp, {}),
        (build_cnn, {"augment": Strength(crop=1, horizontal_flip=0.5), "accumulation": 3}),
        (Noisy, {}),  # draws from torch's own generator
    ],
)
def test_the_loop_trains_the_same_also_when_it_was_stopped_amid_an_epoch(
    build: Callable[[], Any], options: dict[str, Any]
) -> None:
    resident, streamed = both()
    whole = make(resident, build, **options)
    expected = timeless(list(loop.train(whole)))
    run = make(streamed, build, **options)
    assert list(loop.train(run, stop_before(2))) == []
    assert timeless(list(loop.train(run))) == expected
    assert same(weights(whole), weights(run))


def test_a_run_that_comes_amid_an_epoch() -> None:
    """A stack trains the same also with a run that comes amid an epoch."""

    def trained(splits: Splits) -> tuple[list[Any], list[dict[str, Tensor]]]:
        options = {"augment": Strength(crop=1)}
        runs = [
            trial.run() for trial in Trial(splits=splits, epochs=3, dtype=torch.float32, options=options).several(3)
        ]
        assert list(loop.train(runs[2], stop_before(2))) == []
        results = train(stack_of(runs, 4))
        return [timeless(results[run]) for run in runs], [weights(run) for run in runs]

    resident, streamed = both()
    (expected, expected_weights), (results, found_weights) = trained(resident), trained(streamed)
    assert results == expected
    assert all(map(same, expected_weights, found_weights))


def test_a_stack_is_found_for_streamed_images() -> None:
    _, streamed = both()

    def fresh(seed: int, splits: Splits, dtype: torch.dtype | None) -> Run:
        return Trial(splits=splits, seed=seed, dtype=dtype or torch.float32, epochs=3).run()

    assert select_forward.find(fresh, streamed, 20).name == "stack"


def test_batches_are_read_ahead_by_one_thread_that_ends_with_them() -> None:
    _, streamed = both()
    reads: list[int] = []

    class Noted(Stored):
        def take(self, which: Tensor) -> Tensor:
            reads.append(len(which))
            return super().take(which)

    images = Noted(store=source().images, rows=torch.arange(120))
    fed = PreparedTensor(images, streamed.mean, streamed.std, torch.float32).feed(torch.arange(120).split(10))
    assert reads == []
    next(fed)
    while len(reads) < AHEAD + 1:
        time.sleep(0.001)
    time.sleep(0.05)
    assert reads == [10] * (AHEAD + 1)
    before = threading.active_count()
    del fed
    assert threading.active_count() == before - 1


def test_an_error_of_the_disk_is_the_trial_s_data_error() -> None:
    class Broken(Stored):
        def take(self, which: Tensor) -> Tensor:
            raise OSError(5, "Input/output error")

    splits = load(resident=True)
    broken = Split(inputs=Broken(store=source().images, rows=torch.arange(84)), targets=splits.train.targets)
    with pytest.raises(OSError, match="Input/output error") as caught:
        list(loop.train(make(data.Splits(**{**vars(splits), "train": broken}))))
    assert kind_of(caught.value) is Kind.DATA_ERROR


def test_the_size_decides_where_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(load(resident=None).train.inputs, Tensor)
    monkeypatch.setattr(storing, "SHARE_OF_CPU", 1e-12)
    assert isinstance(load(resident=None).train.inputs, Stored)
    assert isinstance(load(resident=None).validation.inputs, Stored)
    assert isinstance(load(resident=True).train.inputs, Tensor)


def test_a_folder_of_images_is_read_from_the_disk_alone(tmp_path: Path) -> None:
    for name, value in (("a", 50), ("b", 200)):
        (tmp_path / name).mkdir()
        for number in range(10):
            Image.new("L", (4, 4), value + number).save(tmp_path / name / f"{number}.png")
    given = SOURCES["image_folder"](root=str(tmp_path), size=4, colour="grey")
    splits = data.load(select(given, resident=False, classes=["b", "a"]), split_seed=0, device="cpu")
    assert isinstance(splits.train.inputs, Stored)
    place = splits.train.inputs.store.data_ptr()
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    [name] = [m[-1] for m in maps if int(m[0].split("-")[0], 16) <= place < int(m[0].split("-")[1], 16)]
    assert name.endswith("/images.npy")
    values = splits.train.inputs.take(torch.arange(len(splits.train.targets))).flatten(1).double().mean(1)
    assert ((values >= 200) == (splits.train.targets == 0)).all()
