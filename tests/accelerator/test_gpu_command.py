"""`make gpu`: what it installs, how it holds a device against the CPU, and the table that it prints."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_machine, tasks
from benchmarks.gpu_agreement import Agreement, Disagreement, relative
from benchmarks.gpu_ways import STACK, STACK_AS_GRAPH, Way
from hpo.train.epoch import EpochResult
from hpo.train.run import Run
from tests.support import twin, twin_graphs


@dataclass(frozen=True, kw_only=True)
class WrongWay(Way):
    """A way whose weights begin somewhat off."""

    factor: float

    def finished(self, runs: list[Run]) -> list[list[EpochResult]]:
        with torch.no_grad():
            for run in runs:
                list(run.model.parameters())[-2].mul_(self.factor)  # of the last layer, after all norms
        return super().finished(runs)


def wrong(factor: float) -> Way:
    return WrongWay(name="wrong", executor="loop", factor=factor)


def test_a_device_is_held_against_the_cpu() -> None:
    """A captured stack on the pretended device agrees. Weights that are off by 0.1 % differ in the first step."""
    with twin_graphs.plugged_in():
        agreement = Agreement(task=tasks.load("mlp28"), device=twin.DEVICE, images=400, epochs=1, seeds=2)
        assert agreement.check(STACK_AS_GRAPH).startswith("mlp28, stack as a graph: first step ")
        with pytest.raises(Disagreement, match=r"mlp28, wrong on twin:0: first step, train_loss is .* than 1e-05"):
            agreement.check(wrong(1.001))
        with pytest.raises(Disagreement, match=r"float64, epoch 1, \w+_loss is .* more than 1e-08"):
            agreement._curve(wrong(1 + 1e-6))
        vars(agreement)["_finals_on_cpu"] = [0.98, 0.99]  # 400 images are not learned in two steps
        with pytest.raises(Disagreement, match=r"mean final accuracy is 0\.\d+, but on the CPU 0\.98"):
            agreement._final(STACK)


def test_not_a_number_is_a_difference() -> None:
    agreement = Agreement(task=tasks.load("digits"), device=torch.device("cpu"))
    with pytest.raises(Disagreement, match="loss is nan"):
        agreement._refuse(STACK, "loss", float("nan"), 1.0, relative(float("nan"), 1.0), 1e-5)


def test_the_table_has_a_row_for_each_way(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--task", "mlp28", "--images", "400", "--loader-workers", "0", "--slots", "2", "--no-check"]
    assert gpu.main([*small, "--device", "cpu", "--repeats", "2", "--seconds", "0"]) == 0
    rows = [
        line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| mlp28")
    ]
    assert [(row[1], row[2], row[-1]) for row in rows] == [
        ("plain script", "1", "2"),
        ("loop", "1", "2"),
        ("stack", "2", "2"),
    ]
    late = [*small, "--device", "cpu", "--minutes", "0"]
    assert gpu.main(late) == 1
    assert "not measured, since 0 minutes were over: mlp28" in capsys.readouterr().out


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gpu.main([]) == 1
    assert "torch sees no CUDA device here" in capsys.readouterr().err


def test_what_is_there_is_not_installed_again(tmp_path: Path) -> None:
    assert gpu_machine.missing(sys.path, gpu_machine.requirements()) == []
    for name, version in (("torch", "2.11.0+cu130"), ("pydantic_core", "2.1"), ("pydantic", "2.8.9")):
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    wanted = {"torch": "torch>=2.11", "pydantic": "pydantic>=2.9", "pydantic-core": "pydantic-core", "numpy": "numpy"}
    assert gpu_machine.missing([str(tmp_path)], wanted) == ["pydantic>=2.9", "numpy"]
    first = tmp_path / "first" / "pydantic-2.11.dist-info"  # the one that is imported
    first.mkdir(parents=True)
    (first / "METADATA").write_text("Metadata-Version: 2.1\nName: pydantic\nVersion: 2.11\n")
    path = [str(first.parent), str(tmp_path)]
    assert gpu_machine.missing(path, wanted) == ["numpy"]
    command = gpu_machine.installing("python", ["numpy"], gpu_machine.versions(path), "wheels")
    assert command[-5:] == ["--no-index", "--find-links", "wheels", "numpy", "torch==2.11.0+cu130"]
    assert gpu_machine.installing("python", ["torch>=2.12"], gpu_machine.versions(path), None)[-1] == "torch>=2.12"
