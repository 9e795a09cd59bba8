"""Masks by counting: the words pass a statistical battery, and every executor, chunk and device has the same masks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hpo.models import mlp
from hpo.models.dropout import LEVELS
from hpo.train import counted_masks, loop
from hpo.train.counted_masks import CALLS_APART, CountedMasks, Stream, signed, words
from tests.support.stacks import Trial, apart, digits, numbers, stop_before, train
from tests.train.stack.test_broadcast_optimizers import stack_of

CPU = torch.device("cpu")
WORDS = 2**15  # of a stream
LIKELY = 5.0  # standard deviations


def drawn(seed: int, first: int = 0, count: int = WORDS) -> np.ndarray:
    stream = Stream.of(seed)
    keys, steps = torch.tensor([signed(stream.key)]), torch.tensor([signed(stream.step)])
    return words(keys, steps, torch.arange(first, first + count)).numpy().view(np.uint64)


def bits_of(found: np.ndarray) -> np.ndarray:
    return np.unpackbits(found.view(np.uint8))


def monobit(bits: np.ndarray) -> float:
    """Return by how many standard deviations the number of ones differs from half (NIST SP 800-22, frequency)."""
    return abs(2.0 * bits.sum() - len(bits)) / math.sqrt(len(bits))


def runs(bits: np.ndarray) -> float:
    """Return the same of the number of changes from bit to bit (NIST SP 800-22, runs)."""
    changes, most = np.count_nonzero(bits[1:] != bits[:-1]), len(bits) - 1
    return abs(2.0 * changes - most) / math.sqrt(most)


def chi_square(values: np.ndarray, bins: int) -> float:
    """Return by how many standard deviations chi-square of these values differs from its mean."""
    counts, expected = np.bincount(values, minlength=bins), len(values) / bins
    return abs(((counts - expected) ** 2 / expected).sum() - (bins - 1)) / math.sqrt(2.0 * (bins - 1))


def serial(found: np.ndarray) -> float:
    """Return it for pairs of successive bytes (Knuth, serial test)."""
    of_bytes = found.view(np.uint8).astype(np.int64)
    return chi_square(of_bytes[::2] * 256 + of_bytes[1::2], 2**16)


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Return it for the number of equal bits of two streams."""
    return monobit(bits_of(one ^ other))


STREAMS = {
    "one trial": drawn(1),
    "the next trial": drawn(2),
    "the next call": drawn(1, first=CALLS_APART),
    "the next step": drawn(1, first=WORDS),
    "far along": drawn(1, first=2**39),
}


@pytest.mark.parametrize("name", STREAMS)
def test_words_pass_the_battery(name: str) -> None:
    """Monobit, runs, serial, chi-square of the 16-bit draws of a mask, and of each bit by itself."""
    found = STREAMS[name]
    bits = bits_of(found)
    assert monobit(bits) < LIKELY
    assert runs(bits) < LIKELY
    assert serial(found) < LIKELY
    assert chi_square(found.view(np.uint16).astype(np.int64), 2**16) < LIKELY
    by_place = (found[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    assert (np.abs(2.0 * by_place.sum(0) - WORDS) / math.sqrt(WORDS)).max() < LIKELY
    for lag in (1, 2, 64):
        assert correlation(found[lag:], found[:-lag]) < LIKELY


def test_streams_are_not_correlated() -> None:
    found = list(STREAMS.values())
    pairs = [(one, other) for place, one in enumerate(found) for other in found[:place]]
    assert max(correlation(one, other) for one, other in pairs) < LIKELY


def test_the_words_are_those_of_splitmix64_with_a_step_of_its_own() -> None:
    """Against the plain formula in Python's integers, which no device can round or overflow in another way."""
    stream, whole = Stream.of(7), 2**64
    for place in (0, 1, 12345, CALLS_APART + 5):
        state = (stream.key + place * stream.step) % whole
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % whole
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % whole
        assert drawn(7, place, 1)[0] == state ^ (state >> 31)


def masks(streams: list[Stream | None], steps: int = 12) -> CountedMasks:
    made = CountedMasks(CPU)
    made.begin(streams, [0] * len(streams), steps)
    return made


def test_masks_do_not_depend_on_company_nor_on_how_far_ahead_they_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = [LEVELS // 2, LEVELS, LEVELS // 4]
    streams = [Stream.of(seed) for seed in range(3)]
    together, alone = masks(list(streams)), masks([streams[2]])
    monkeypatch.setattr(counted_masks, "MEMORY", 1)
    one_by_one = masks(list(streams))
    for step in range(12):
        for each in (together, alone, one_by_one):
            each.go_to(step)
        for elements in (7, 16):  # two calls of a step
            found = together.factors(kept, elements, torch.float32)
            assert found is not None
            assert torch.equal(found, one_by_one.factors(kept, elements, torch.float32))
            assert torch.equal(found[2:], alone.factors(kept[2:], elements, torch.float32))
            assert found[1].eq(1).all()
            assert set(found[2].unique().tolist()) <= {0.0, 4.0}


def test_all_calls_of_a_step_share_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that are drawn before it is known how many calls there are."""
    monkeypatch.setattr(counted_masks, "MEMORY", 4 * 2 * 16 * 6)  # six steps of two rows of one call
    made = masks([Stream.of(seed) for seed in range(2)])
    for step in range(12):
        made.go_to(step)
        found = [made.factors([LEVELS // 2] * 2, 16, torch.float32) for _ in range(3)]
        held = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in found if one is not None}
        assert len(held) == 3
        assert sum(held.values()) <= counted_masks.MEMORY


def noisy() -> Trial:
    return Trial(
        splits=digits(),
        build=lambda: mlp((1, 8, 8), 3, widths=[7, 5], dropout=0.3),
        epochs=3,
        options={"masks": "counter"},
    )


def test_a_stack_has_the_masks_of_the_loop() -> None:
    trials = noisy().several(3)
    together = [trial.run() for trial in trials]
    results = train(stack_of(together))
    for trial, run in zip(trials, together, strict=True):
        assert apart(numbers(results[run]), numbers(loop.train(trial.run()))) <= 1e-10


def test_a_run_resumes_with_the_rule_of_its_checkpoint() -> None:
    """Also within an epoch. A checkpoint without a rule is of a run with a generator, as all once were."""
    for rule in ("counter", "generator"):
        trial = Trial(**{**vars(noisy()), "options": {"masks": rule}})
        other = Trial(**{**vars(noisy()), "options": {"masks": "counter" if rule == "generator" else "generator"}})
        whole = numbers(loop.train(trial.run()))
        left = trial.run()
        list(loop.train(left, stop_before(6)))  # within the second epoch
        assert left.batch
        assert ("masks" in left.state_dict()) == (rule == "counter")
        resumed = other.run()
        assert resumed.randomness.rule != rule
        resumed.load_state_dict(left.state_dict())
        assert resumed.randomness.rule == rule
        assert apart(numbers(loop.train(resumed)), whole[1:]) == 0.0
        assert apart(numbers(loop.train(other.run())), whole) > 1e-6


def test_runs_of_both_rules_share_a_stack() -> None:
    rules = ("counter", "generator", "counter")
    trials = [
        Trial(**{**vars(trial), "options": {"masks": rule}})
        for trial, rule in zip(noisy().several(3), rules, strict=True)
    ]
    runs_ = [trial.run() for trial in trials]
    results = train(stack_of(runs_))
    for trial, run in zip(trials, runs_, strict=True):
        assert apart(numbers(results[run]), numbers(loop.train(trial.run()))) <= 1e-10
