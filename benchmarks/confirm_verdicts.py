"""How often verdicts of `hpo confirm` are wrong: values of known means and noise, beside the naive choice.

    python benchmarks/confirm_verdicts.py --seeds 200

Each seed draws the runs of all leaders: the mean of each, noise that the leaders of one run share (a third of the variance), and
noise of the run alone. *Naive* is the leader that was best in its first run, as a search ends. "A is best"
is wrong if another leader is as good. "A is within delta of the best" is wrong if another leader is better by more.
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hpo.analysis import verdict

SHARED = 0.3  # of the variance of a run
DELTA = 0.005


@dataclass(frozen=True, kw_only=True)
class Case:
    """The true means of some leaders, and the noise of a run."""

    name: str
    means: tuple[float, ...]
    noise: float
    runs: tuple[int, ...] = (5,)  # at each look
    images: int | None = None  # values are shares of so many


CASES = [
    Case(name="one better by 0.01, noise 0.005", means=(0.91, 0.9, 0.9, 0.9, 0.9), noise=0.005),
    Case(name="one better by 0.01, noise 0.01", means=(0.91, 0.9, 0.9, 0.9, 0.9), noise=0.01),
    Case(name="the same, 5, 10 and 20 runs", means=(0.91, 0.9, 0.9, 0.9, 0.9), noise=0.01, runs=(5, 10, 20)),
    Case(name="one better by 0.006, just above delta", means=(0.906, 0.9, 0.9, 0.9, 0.9), noise=0.01, runs=(5, 10, 20)),
    Case(name="all equal", means=(0.9, 0.9, 0.9, 0.9, 0.9), noise=0.01, runs=(5, 10, 20)),
    Case(name="two leaders, equal", means=(0.9, 0.9), noise=0.01, runs=(5, 10, 20)),
    Case(name="two leaders, equal, 2 runs", means=(0.9, 0.9), noise=0.01, runs=(2,)),
    Case(name="two of 0.99, 270 images, 2 runs", means=(0.99, 0.99), noise=0.004, runs=(2,), images=270),
    Case(name="shares near 1, of 270 images", means=(0.99, 0.99, 0.988, 0.985, 0.98), noise=0.004, images=270),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=200)
    seeds = parser.parse_args().seeds
    print(f"| {seeds} seeds, delta {DELTA} | naive wrong | wrong | best | within | not decided |")
    print("|---|---|---|---|---|---|")
    for case in CASES:
        found = counts(case, seeds)
        kinds = [found[kind] for kind in ("naive wrong", "wrong", "best", "within", "undecided")]
        print(f"| {case.name} | {' | '.join(f'{count / seeds:.1%}' for count in kinds)} |")


def counts(case: Case, seeds: int) -> Counter[str]:
    """Return how often each verdict came, and how often it was wrong."""
    found: Counter[str] = Counter()
    for seed in range(seeds):
        drawn = draw(case, np.random.default_rng(seed))
        naive = int(drawn[:, 0].argmax())
        found["naive wrong"] += case.means[naive] < max(case.means)
        looks = [
            verdict.judge(dict(enumerate(drawn[:, :runs].tolist())), delta=DELTA, direction="maximize", look=look)
            for look, runs in enumerate(case.runs, start=1)
        ]
        decided = next(
            (one for one in looks if one.is_decided), looks[-1]
        )  # who asks for more runs until it is decided
        found[decided.kind] += 1
        found["wrong"] += is_wrong(decided, case.means)
    return found


def draw(case: Case, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Return the values of each leader's runs."""
    means, runs = np.array(case.means), case.runs[-1]
    shared, own = rng.standard_normal((1, runs)), rng.standard_normal((len(means), runs))
    values: npt.NDArray[np.float64] = means[:, None] + case.noise * (SHARED**0.5 * shared + (1 - SHARED) ** 0.5 * own)
    if case.images:
        values = np.minimum(1.0, np.round(values * case.images) / case.images)
    return values


def is_wrong(judged: verdict.Verdict, means: tuple[float, ...]) -> bool:
    """Return whether a verdict says something that is not so."""
    others = [mean for number, mean in enumerate(means) if number != judged.leader]
    best, own = max(others), means[judged.leader]
    return (judged.kind == "best" and best >= own) or (judged.kind == "within" and best > own + DELTA)


if __name__ == "__main__":
    main()
