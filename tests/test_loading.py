"""Heavy modules are loaded without the garbage collector, which runs again afterwards."""

from __future__ import annotations

import gc

import pytest

from hpo.loading import uncollected


def test_the_collector_runs_again_after_the_block_unless_it_did_not_before() -> None:
    with uncollected():
        assert not gc.isenabled()
        with uncollected():
            pass
        assert not gc.isenabled(), "the inner block has enabled it"
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError), uncollected():
        raise ZeroDivisionError
    assert gc.isenabled()
