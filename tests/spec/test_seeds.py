"""Seeds are derived from names: stable, in range, and different for every purpose."""

from __future__ import annotations

import itertools
from typing import Any

from hpo.spec import seeds


def test_a_seed_is_the_same_on_every_machine_and_in_every_version() -> None:
    assert seeds.derive(0, "trial", 0) == 942392375665244359
    assert seeds.derive(7, "order", 3) == 7999782601154197432


def test_every_part_its_order_and_its_type_count() -> None:
    keys: Any = [(0, "trial", 1), (0, "trial", 2), (1, "trial", 1), (0, "order", 1), ("trial", 0, 1), (0, "trial", "1")]
    keys += [(0, "trial1"), (0, "tri", "al", 1), ("0", "trial", 1), (0,), ()]
    assert len({seeds.derive(*key) for key in keys}) == len(keys)


def test_a_thousand_trials_have_a_thousand_seeds_that_fit_into_63_bits() -> None:
    found = {seeds.derive(study, "trial", number) for study, number in itertools.product(range(4), range(250))}
    assert len(found) == 1000
    assert all(0 <= seed < 2**63 for seed in found)
    assert max(found) > 2**62
