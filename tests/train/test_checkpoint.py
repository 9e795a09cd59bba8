from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hpo.errors import CheckpointError
from hpo.train import checkpoint


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    state: Any = {
        "epoch": 3,
        "weights": OrderedDict(w=torch.arange(4.0)),
        "groups": [{"betas": (0.9, 0.99), "x": None}],
    }
    digest = checkpoint.save(tmp_path / "7" / "a.pt", state)
    loaded = checkpoint.load(tmp_path / "7" / "a.pt", digest)
    assert torch.equal(loaded["weights"].pop("w"), state["weights"].pop("w"))
    assert loaded == state


def test_the_digest_is_the_sha256_of_the_file(tmp_path: Path) -> None:
    digest = checkpoint.save(tmp_path / "a.pt", {"epoch": 1})
    assert digest == hashlib.sha256((tmp_path / "a.pt").read_bytes()).hexdigest()


def test_saving_leaves_one_file_and_replaces_an_older_one(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "a.pt", {"epoch": 1})
    checkpoint.save(tmp_path / "a.pt", {"epoch": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]
    assert checkpoint.load(tmp_path / "a.pt") == {"epoch": 2}


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_save_leaves_the_older_file_and_no_rest(tmp_path: Path, monkeypatch, failing: str) -> None:
    checkpoint.save(tmp_path / "a.pt", {"epoch": 1})

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(tmp_path / "a.pt", {"epoch": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]
    assert checkpoint.load(tmp_path / "a.pt") == {"epoch": 1}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"value": np.float64(0.5)}, r"state\['value'\] is .*float64.*; write \.item\(\)$"),
        ({"value": np.zeros(2)}, r"state\['value'\] is .*ndarray.*; write torch\.from_numpy\(\.\.\.\)$"),
        ({"a": [1, {"b": Path("x")}]}, r"state\['a'\]\[1\]\['b'\] is .*Path"),
        ({"a": {Path("x"): 1}}, "has the key .*Path"),
    ],
)
def test_a_state_that_could_not_be_read_back_is_refused_at_saving(tmp_path: Path, state, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        checkpoint.save(tmp_path / "a.pt", state)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_is_named_with_what_to_check(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"a\.pt cannot be opened \(No such file.*checkpoint folder"):
        checkpoint.load(tmp_path / "a.pt")


def test_another_digest_is_refused(tmp_path: Path) -> None:
    digest = checkpoint.save(tmp_path / "a.pt", {"epoch": 1})
    checkpoint.save(tmp_path / "a.pt", {"epoch": 2})
    with pytest.raises(CheckpointError, match=f"but {digest} is recorded.*epoch 0"):
        checkpoint.load(tmp_path / "a.pt", digest)


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 cut"])
def test_an_unreadable_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be read by torch"):
        checkpoint.load(tmp_path / "a.pt")


def test_a_cut_file_is_refused(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "a.pt", {"weights": torch.zeros(1000)})
    content = (tmp_path / "a.pt").read_bytes()
    for size in (100, len(content) // 2, len(content) - 1):
        (tmp_path / "a.pt").write_bytes(content[:size])
        with pytest.raises(CheckpointError, match="cannot be read"):
            checkpoint.load(tmp_path / "a.pt")


class Harmful:
    def __reduce__(self) -> tuple:
        return (os.mkdir, ("harm",))


def test_a_file_that_would_run_code_is_refused_unrun(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"x": Harmful()}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.load(tmp_path / "a.pt")
    assert not Path("harm").exists()


def test_a_file_without_a_dict_is_refused(tmp_path: Path) -> None:
    torch.save([1], tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="holds a list, not a dict"):
        checkpoint.load(tmp_path / "a.pt")


def saved_size(path: Path, state: dict) -> int:
    checkpoint.save(path, state)
    return path.stat().st_size


def test_a_view_is_written_without_what_it_is_a_view_of(tmp_path: Path) -> None:
    rows = torch.arange(100_000.0).view(100, 1000)
    nested: Any = {"a": rows[3, :500].view(5, 100), "b": [rows[4].t(), (rows[:, 7],)], "c": OrderedDict(d=rows[5, 3])}
    size = saved_size(tmp_path / "a.pt", nested)
    alone = {"a": rows[3, :500].clone().view(5, 100), "b": [rows[4].clone(), (rows[:, 7].clone(),)]}
    assert size <= saved_size(tmp_path / "b.pt", alone | {"c": OrderedDict(d=rows[5, 3].clone())}) + 200
    loaded = checkpoint.load(tmp_path / "a.pt")
    torch.testing.assert_close(loaded, nested, rtol=0, atol=0)
    assert type(loaded["c"]) is OrderedDict
    assert type(loaded["b"][1]) is tuple
    assert nested["a"].untyped_storage().nbytes() == 400_000  # the state itself is left as it is


def test_what_is_shared_stays_shared(tmp_path: Path) -> None:
    whole, rows = torch.zeros(1000), torch.zeros(10, 1000)
    state = {"a": whole, "b": whole.view(10, 100), "c": rows[1], "d": rows[1].view(1000), "e": rows[2]}
    assert saved_size(tmp_path / "a.pt", state) < 3 * 4000 + 3000
    loaded = checkpoint.load(tmp_path / "a.pt")
    for one, other, same in (("a", "b", True), ("c", "d", True), ("c", "e", False)):
        assert (loaded[one].untyped_storage().data_ptr() == loaded[other].untyped_storage().data_ptr()) == same


def test_a_model_s_state_stays_small(tmp_path: Path) -> None:
    """A model's state keeps its versions and expanded tensors stay small."""
    state: Any = torch.nn.BatchNorm1d(3).state_dict()
    one = torch.zeros(1)
    size = saved_size(tmp_path / "a.pt", {"model": state, "wide": one.expand(100_000)})
    assert size < 5000
    loaded = checkpoint.load(tmp_path / "a.pt")
    assert loaded["model"]._metadata == state._metadata
    assert loaded["wide"].shape == (100_000,)
