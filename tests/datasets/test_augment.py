"""Augmentation in training: what becomes of each image is its run's own, in a loop, in a stack, in any company."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from hpo import data
from hpo.data import Augmentation, Source, Splits, Strength, Tone, draw
from hpo.data.augment.drawn import STAGES, stages
from hpo.data.augment.strength import Fill
from hpo.errors import SpecError
from hpo.final import train as final
from hpo.models import mlp
from hpo.spec.seeds import derive
from hpo.spec.training import Augment
from hpo.strategy.lint import lint
from hpo.study import export, resolve
from hpo.train import loop
from hpo.train.build import check
from hpo.train.run import Run
from tests.support.declared import work
from tests.support.stacks import CLASSES, Trial, apart, numbers, stack_of, stop_before, train, weights

STRENGTHS: dict[str, Strength] = {
    "crop": Strength(crop=2),
    "crop, edge": Strength(crop=3, fill="edge"),
    "crop, reflect": Strength(crop=3, fill="reflect", horizontal_flip=0.5),
    "horizontal flip": Strength(horizontal_flip=0.5),
    "vertical flip": Strength(vertical_flip=0.5),
    "resized crop": Strength(resized_crop=0.7),
    "rotation": Strength(rotation=20.0),
    "rotation, edge": Strength(rotation=20.0, crop=1, fill="edge"),
    "rotation, reflect": Strength(rotation=20.0, crop=1, fill="reflect"),
    "translation": Strength(translation=0.2),
    "scale": Strength(scale=0.3),
    "shear": Strength(shear=15.0),
    "brightness": Strength(brightness=0.5),
    "contrast": Strength(contrast=0.5),
    "saturation": Strength(saturation=0.5),
    "hue": Strength(hue=0.2),
    "trivial augment": Strength(trivial_augment=1.0),
    "erasing": Strength(erasing=0.5),
    "mixup": Strength(mixup=0.4),
    "cutmix": Strength(cutmix=1.0),
    "all": Strength(crop=1, rotation=9.0, hue=0.1, trivial_augment=0.5, erasing=0.5, mixup=1.0, cutmix=1.0),
}


@pytest.fixture(scope="module")
def splits() -> Splits:
    """Coloured images, in a batch of which there are 19: not what a lane of a convolution holds."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(80) % CLASSES
    images = torch.randint(0, 200, (80, 3, 8, 8), dtype=torch.uint8, generator=generator)
    images[:, 0, 0] += (labels * 20).to(torch.uint8)[:, None]
    return data.load(Source(inputs=images, targets=labels, num_classes=CLASSES), split_seed=0, device="cpu")


def trial(splits: Splits, strength: Strength, seed: int = 0, **changes: Any) -> Trial:
    def build() -> torch.nn.Module:
        return mlp((3, 8, 8), CLASSES, widths=[7])

    options = {"augment": strength} | changes.pop("options", {})
    return Trial(splits=splits, build=build, seed=seed, epochs=2, batch_size=19, options=options, **changes)


def without_norm() -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(192, 7), torch.nn.Tanh(), torch.nn.Linear(7, CLASSES)
    )


def state(run: Run) -> dict[str, Any]:
    return {name: tensor.tolist() for name, tensor in weights(run).items()}


def losses(run: Run) -> list[float]:
    return [result.train_loss for result in loop.train(run)]


@pytest.mark.parametrize("name", STRENGTHS)
def test_a_run_of_a_stack_is_augmented_as_alone(splits: Splits, name: str) -> None:
    """Bit for bit in a stack of its own, else but for rounding; whatever it is augmented by changes its training."""
    neighbours = [Strength(), STRENGTHS["all"], STRENGTHS["crop"]]
    for dtype in (torch.float32, torch.float64):
        trials = [
            trial(splits, strength, seed, dtype=dtype) for seed, strength in enumerate([STRENGTHS[name], *neighbours])
        ]
        runs = [one.run() for one in trials]
        results = train(stack_of(runs))
        for run, one in zip(runs, trials, strict=True):
            if dtype == torch.float64:
                assert apart(numbers(results[run]), numbers(loop.train(one.run()))) <= 1e-10
            else:
                alone = one.run()
                assert numbers(train(stack_of([alone]))[alone]) == numbers(results[run])
                assert state(alone) == state(run)
    assert losses(trial(splits, STRENGTHS[name]).run()) != losses(trial(splits, Strength()).run())


@pytest.mark.parametrize("name", ["crop", "rotation", "all"])
def test_a_batch_in_pieces_is_augmented_and_mixed_as_a_whole(splits: Splits, name: str) -> None:
    whole, pieces = (
        dataclasses.replace(trial(splits, STRENGTHS[name], options={"accumulation": count}), build=without_norm)
        for count in (1, 3)
    )
    assert apart(numbers(loop.train(whole.run())), numbers(loop.train(pieces.run()))) <= 1e-10


def test_an_epoch_left_amid_goes_on_with_its_own_draws(splits: Splits) -> None:
    one = trial(splits, STRENGTHS["all"])
    whole = losses(one.run())
    run = one.run()
    assert list(loop.train(run, stop_before(1))) == []
    other = one.run()
    other.load_state_dict(run.state_dict())
    assert losses(other) == whole


def test_epochs_and_seeds_have_draws_of_their_own(splits: Splits) -> None:
    def shown(run: Run) -> dict[str, Any]:
        drawn = run.drawn()
        assert drawn is not None
        assert drawn.mixing is not None
        return {name: numbers.tolist() for name, numbers in drawn.stages.items()} | {"mix": drawn.mixing.share.tolist()}

    run = trial(splits, STRENGTHS["all"]).run()
    first = shown(run)
    assert shown(run) == first
    next(iter(loop.train(run)))
    for other in (shown(run), shown(trial(splits, STRENGTHS["all"], seed=1).run())):
        assert [name for name in first if first[name] == other[name]] == []
    assert len(set(map(tuple, first["colour"]))) > 20


def test_what_was_searched_before_there_was_more_replays(splits: Splits) -> None:
    """Crops and mirrored images are drawn as ever, whatever else a later version may draw."""
    run = trial(splits, Strength(crop=2, horizontal_flip=0.5)).run()
    drawn = run.drawn()
    assert drawn is not None
    assert list(drawn.stages) == ["move, mean"]
    uniform = torch.rand(
        (run.steps_per_epoch * 19, 3), generator=torch.Generator().manual_seed(derive(0, "augment", 0))
    )
    expected = [(uniform[:, :2] * 5).floor() - 2, (uniform[:, 2:] < 0.5).float(), torch.zeros(len(uniform), 1)]
    assert torch.equal(drawn.stages["move, mean"], torch.cat(expected, 1))


@pytest.mark.parametrize("name", STRENGTHS)
def test_what_is_idle_leaves_every_bit(splits: Splits, name: str) -> None:
    """What nobody asks for is not there and what is idle leaves every bit."""
    strength = STRENGTHS[name]

    def random(purpose: str) -> torch.Generator:
        return torch.Generator().manual_seed(len(purpose))

    assert draw(Strength(), 2, 5, (8, 8), random) is None
    drawn = draw(strength, 2, 5, (8, 8), random)
    assert drawn is not None
    assert list(drawn.stages) == stages(strength)
    geometry = {name for name in drawn.stages if name.startswith(("move", "warp"))}
    assert len(geometry) <= 1
    assert (drawn.mixing is not None) == bool(strength.mixup or strength.cutmix)
    tone = Tone(splits.mean, splits.std, splits.white)
    shown = torch.randn((15, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    both = Augmentation([None, drawn, None], 5, 0, tone, torch.device("cpu"))
    found = both.images(shown.clone(), 1)
    assert torch.equal(found[:5], shown[:5])
    assert torch.equal(found[10:], shown[10:])
    assert not torch.equal(found[5:10], shown[5:10])
    alone = Augmentation([drawn], 5, 0, tone, torch.device("cpu"))
    assert torch.equal(found[5:10], alone.images(shown[5:10].clone(), 1))
    labels = torch.arange(15).view(3, 5) % CLASSES
    mixed, mixed_alone = both.labels(labels, 1), alone.labels(labels[1], 1)
    if mixed is None or mixed_alone is None:
        assert mixed is mixed_alone is drawn.mixing is None
        return
    assert torch.equal(mixed.weight[::2], torch.ones(2, 5))
    assert torch.equal(mixed.partners[::2], labels[::2])
    assert torch.equal(mixed.weight[1], mixed_alone.weight)
    assert torch.equal(mixed.partners[1], mixed_alone.partners)


def test_images_that_fill_up_a_batch_stay_finite_and_are_no_partners(splits: Splits) -> None:
    drawn = draw(STRENGTHS["all"], 2, 5, (8, 8), lambda purpose: torch.Generator().manual_seed(len(purpose)))
    tone = Tone(splits.mean, splits.std, splits.white)
    shown = torch.randn((2, 5, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    filled = torch.cat([shown, torch.zeros(2, 3, 3, 8, 8)], 1).flatten(0, 1)
    device = torch.device("cpu")
    found = Augmentation([drawn, drawn], 5, 3, tone, device).images(filled, 0).view(2, 8, 3, 8, 8)
    assert torch.equal(
        found[:, :5],
        Augmentation([drawn, drawn], 5, 0, tone, device).images(shown.flatten(0, 1), 0).view(2, 5, 3, 8, 8),
    )
    assert found.isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", STRENGTHS)
def test_a_gpu_shows_what_a_cpu_shows(splits: Splits, name: str) -> None:
    drawn = draw(STRENGTHS[name], 2, 40, (8, 8), lambda purpose: torch.Generator().manual_seed(len(purpose)))
    shown = torch.randn((80, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    found = []
    for device in (torch.device("cpu"), torch.device("cuda")):
        tone = Tone(splits.mean.to(device), splits.std.to(device), splits.white)
        augmentation = Augmentation([None, drawn], 40, 0, tone, device)
        found.append(augmentation.images(shown.to(device, copy=True), 1).cpu())
    # Where a value stands between two levels of a posterized or equalized image, rounding decides.
    assert ((found[0] - found[1]).abs() > 1e-4).double().mean() < 0.01


def test_every_stage_is_reached_and_every_field_is_the_study_files() -> None:
    assert {name for strength in STRENGTHS.values() for name in stages(strength)} == set(STAGES)
    defaults = {field.name: field.default for field in dataclasses.fields(Strength)}
    assert Augment().model_dump() == defaults
    assert get_args(Fill) == get_args(Augment.model_fields["fill"].annotation)


# --- a study ------------------------------------------------------------------------------------------------------------

SEARCHED = {
    "crop": {"low": 0, "high": 2},
    "fill": {"choices": ["mean", "edge", "reflect"]},
    "rotation": {"low": 0.0, "high": 15.0},
    "brightness": {"low": 0.0, "high": 0.3},
    "trivial_augment": {"choices": [0.0, 0.5]},
    "erasing": {"low": 0.0, "high": 0.5},
    "mixup": {"low": 0.1, "high": 1.0, "log": True},
    "cutmix": {"choices": [0.0, 1.0]},
}


@pytest.mark.parametrize("storage_kind", ["sqlite"])
@pytest.mark.parametrize("executor", ["loop", "stack"])
def test_strengths_are_searched_exported_and_replayed_bit_for_bit(
    make_digits: Any,
    tmp_path: Path,
    executor: str,
) -> None:
    study = make_digits(4, executor=executor, augment=SEARCHED)
    assert work(study) == 0
    for path in export.export(study, tmp_path / "best.toml", top=3):
        training = final.prepare(path)
        assert training.executor == executor
        assert training.config.augment.mixup > 0
        assert final.replay(training, lambda result: None) == []


REFUSED = [
    ("rotate = 5", "augment takes no 'rotate'.*rotation"),
    ("hue = 0.6", "augment.hue = 0.6"),
    ("resized_crop = 1.0", "augment.resized_crop = 1.0"),
    ("mixup = -1.0", "augment.mixup = -1.0"),
    ('fill = "wrap"', "augment.fill = 'wrap'"),
    ("crop = 1.5", "augment.crop = 1.5"),
]


@pytest.mark.parametrize(("line", "said"), REFUSED)
def test_an_unknown_name_or_a_strength_out_of_bounds_is_told(tmp_path: Path, line: str, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        resolve.read(write(tmp_path, line))


def write(folder: Path, lines: str) -> Path:
    file = folder / "s.toml"
    file.write_text(
        '[data]\nname = "digits"\n[model]\nname = "mlp"\nwidths = [8]\n[optimizer]\nname = "sgd"\n'
        f"lr = {{ low = 0.01, high = 0.1, log = true }}\n[training]\nbatch_size = 256\n[augment]\n{lines}\n"
    )
    return file


@pytest.mark.parametrize("storage_kind", ["sqlite"])
@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "hue = 0.1",
            r"augment\.hue = 0\.1: the images have 1 channel, but only images with 3 have colours; remove it",
        ),
        ("saturation = { choices = [0.5, 0.0] }", r"augment\.saturation = 0\.5: the images have 1 channel"),
        ("crop = { low = 0, high = 8 }", r"augment\.crop = 8: moves images of 8x8 pixels out of view; give at most 7"),
    ],
)
def test_what_cannot_be_done_to_images_is_refused(make_digits: Any, tmp_path: Path, line: str, said: str) -> None:
    """What cannot be done to such images is refused by a check and by a worker."""
    found = resolve.read(write(tmp_path, line))
    with pytest.raises(SpecError, match=said):
        check.examine(found.spec, found.code_folder, workers=1)
    study = make_digits(4, augment=found.spec.augment)
    with pytest.raises(SpecError, match=said):
        work(study)
    assert study.optuna.trials == []


def test_a_check_tells_what_does_nothing(tmp_path: Path) -> None:
    """Pinned, it is seen from the file; searched, from training at both ends."""
    found = resolve.read(
        write(tmp_path, "erasing_area = 0.2\nmixup = 0.0\nmix_probability = { low = 0.1, high = 0.9 }")
    )
    assert lint(found.spec) == ["augment.erasing_area = 0.2: has no effect without erasing; remove it"]
    assert check.examine(found.spec, found.code_folder, workers=1).unused == [
        "augment.mix_probability = { low = 0.1, high = 0.9 }: has no effect on a training; nothing uses it, remove it",
    ]
