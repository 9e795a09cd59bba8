"""A graph is used only after a child process has shown on this device that it computes the same and is faster."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from hpo.files import write_json
from hpo.spec import space
from hpo.spec.study_file import StudySpec
from hpo.spec.training import TrainConfig
from hpo.study import resolve
from hpo.train import graphs
from hpo.train.build import assemble, graph_check, measurement_cache
from hpo.train.build.executor import Choice
from hpo.train.build.graph_check import Verdict, judged
from hpo.train.stack import sizing
from hpo.train.stack.row_gradients import RowGradients
from tests.support import twin, twin_graphs
from tests.support.declared import DOCUMENT
from tests.support.stacks import digits

ROOT = Path(__file__).parents[2]
#: A child that has the pretended device.
CHILD = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from hpo.train.build import graph_check
from tests.support import twin_graphs
with twin_graphs.plugged_in():
    graph_check.main(Path(sys.argv[1]))
"""
#: A child that answers without trying.
ANSWERS = """
import json, pathlib, sys
file = pathlib.Path(sys.argv[1])
request = json.loads(file.read_text())
why = " ".join(str(request[key]) for key in ("device", "executor", "slots"))
file.with_name("verdict.json").write_text(json.dumps({"used": True, "why": why}))
"""
DIES = "import os; os.kill(os.getpid(), 11)"
WIDE = Choice(executor="stack", slots=4, why="measured")


@pytest.fixture(autouse=True)
def plugged_in() -> Iterator[None]:
    with twin_graphs.plugged_in():
        yield


LONG = 10**6  # runs that are ahead


def asked(
    folder: Path, choice: Choice = WIDE, device: torch.device = twin.DEVICE, *, runs: float = LONG, epochs: int = 3
) -> Choice:
    document = {**DOCUMENT, "executor": "stack", "training": {"epochs": epochs, "batch_size": 64}}
    spec = resolve.resolve(StudySpec.from_document(document), folder)
    config = TrainConfig.from_tree(space.middle(spec.tree, {}))
    run = assemble.build_run(config, digits(device=device), 0, folder, device)
    return graph_check.with_graph(choice, spec, config, run, folder, device, runs=runs)


def kept() -> list[dict[str, object]]:
    return list(json.loads(measurement_cache.home().read_text()).values())


@pytest.mark.soak  # the child loads torch; `examine`, which it calls, is tested below
def test_a_child_captures_compares_and_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_check, "COMMAND", [sys.executable, "-c", CHILD])
    found = asked(tmp_path)
    assert found.graph.startswith("3 replayed steps equal those without within 1e-06; "), found.graph
    assert kept() == [{"used": found.captures, "why": found.graph, "lasts": True}]


def test_a_verdict_is_asked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_check, "COMMAND", [sys.executable, "-c", ANSWERS])
    found = asked(tmp_path)
    assert (found.captures, found.graph) == (True, "twin:0 stack 4")
    assert kept() == [{"used": True, "why": "twin:0 stack 4", "lasts": True}]
    monkeypatch.setattr(graph_check, "COMMAND", [sys.executable, "-c", DIES])
    assert asked(tmp_path) == found  # no second child
    other = asked(tmp_path, dataclasses.replace(WIDE, slots=2))  # another size is another question
    assert (other.captures, other.graph) == (False, "the process that tried it was ended by SIGSEGV")
    assert len(kept()) == 2


def test_a_child_that_fails_means_no_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_check, "COMMAND", [sys.executable, "-c", "raise SystemExit('no kernel image')"])
    found = asked(tmp_path)
    assert (found.captures, found.graph) == (False, "the process that tried it ended with exit code 1: no kernel image")
    assert len(kept()) == 1


@pytest.mark.parametrize(
    ("child", "why"),
    [
        ("import time; time.sleep(60)", "did not end within 0.2 s"),
        ("import os; os.kill(os.getpid(), 15)", "was ended by SIGTERM"),
        ("import os; os.kill(os.getpid(), 9)", "was ended by SIGKILL"),
        ("raise SystemExit('CUDA out of memory. Tried to allocate')", "exit code 1: CUDA out of memory. Tried to allocate"),
    ],
)  # fmt: skip
def test_what_the_next_child_may_find_otherwise_is_not_remembered(
    child: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A person ended it, or other processes had taken the memory."""
    monkeypatch.setattr(graph_check, "COMMAND", [sys.executable, "-c", child])
    monkeypatch.setattr(graph_check, "SECONDS", 0.2 if "sleep" in child else 60)
    found = asked(tmp_path)
    assert (found.captures, found.graph) == (
        False,
        f"the process that tried it {why}".replace(" exit", " ended with exit"),
    )
    assert not measurement_cache.home().exists()


def test_where_few_steps_are_left_nothing_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A try takes longer than the graph would save. An answer that is there already is used."""
    monkeypatch.setattr(graph_check, "COMMAND", [sys.executable, "-c", ANSWERS])
    few = asked(tmp_path, runs=100)  # of 3 epochs with a step, in stacks of 4
    assert (few.captures, few.graph) == (
        False, "not tried: a worker has about 75 steps left at most; a try pays from 20,000 on"
    )  # fmt: skip
    assert asked(tmp_path).captures
    assert asked(tmp_path, runs=100).captures
    alone = Choice(executor="loop", slots=1, why="measured")
    assert asked(tmp_path, alone).graph == (
        "a trial has 3 steps at most, and each is captured anew; this pays from 1,000 on"
    )
    assert asked(tmp_path, alone, epochs=1_000).captures


def test_while_another_process_tries_a_worker_waits_and_then_takes_its_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph_check, "COMMAND", [sys.executable, "-c", ANSWERS])
    with ThreadPoolExecutor(1) as other, FileLock(measurement_cache.home().with_name("graph.lock")):
        waiting = other.submit(asked, tmp_path)
        with pytest.raises(TimeoutError):
            waiting.result(0.3)
        monkeypatch.setattr(graph_check, "_remembered", lambda key: Verdict(used=False, why="theirs"))
    assert waiting.result().graph == "theirs"


def test_a_model_that_the_child_cannot_load_is_named(tmp_path: Path) -> None:
    """The child answers by a file, since the last line that it prints is often a hint of CUDA's to developers."""
    document = {**DOCUMENT, "model": {"name": "mine.py:net"}}
    (tmp_path / "mine.py").write_text("def another(shape, outputs): ...\n")
    config = TrainConfig.from_tree(space.middle(StudySpec.from_document(document).tree, {}))
    request = graph_check.Request(
        config=config.model_dump(mode="json"), folder=str(tmp_path), split_seed=0, device="cpu", executor="loop", slots=1
    )  # fmt: skip
    write_json(tmp_path / "request.json", dataclasses.asdict(request))
    graph_check.main(tmp_path / "request.json")
    said = json.loads((tmp_path / "verdict.json").read_text())
    assert (said["used"], said["lasts"]) == (False, True)
    assert said["why"].startswith("the process that tried it failed: SpecError: ")
    assert "mine.py:net" in said["why"]


def test_where_no_device_captures_nothing_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_check, "COMMAND", [])
    assert asked(tmp_path, device=torch.device("cpu")) == WIDE


@pytest.mark.parametrize(
    ("verdict", "used", "why"),
    [
        (judged(1e-7, 0.001, 0.004), True, "equal those without within 1e-06; 1.00 ms a step, without 4.00 ms"),
        (judged(1e-7, 0.004, 0.0041), False, "4.00 ms a step, without 4.10 ms: too small a gain"),
        (judged(1e-7, 0.004, 0.001), False, "equal those without within 1e-06; 4.00 ms a step, without 1.00 ms"),
        (judged(2e-6, 0.001, 0.004), False, "differ by 2.0e-06 from those without, more than 1e-06"),
        (judged(math.nan, 0.001, 0.004), False, "differ by nan"),
    ],
)
def test_only_what_is_equal_and_faster_is_used(verdict: Verdict, used: bool, why: str) -> None:
    assert verdict.used is used
    assert why in verdict.why


def test_a_number_that_is_baked_in_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The captured step reads the batch from a tensor. One that keeps the first batch's rows must not be used."""
    spec = resolve.resolve(StudySpec.from_document({**DOCUMENT, "executor": "stack"}), tmp_path)
    config = TrainConfig.from_tree(space.middle(spec.tree, {}))
    request = graph_check.Request(
        config=config.model_dump(mode="json"), folder=str(tmp_path), split_seed=0, device=str(twin.DEVICE),
        executor="stack", slots=2,
    )  # fmt: skip
    monkeypatch.setattr(sizing, "SECONDS", 0)  # two timed steps are enough here
    monkeypatch.setattr(assemble, "load_splits", lambda *arguments: digits(device=twin.DEVICE))
    assert graph_check.examine(request).why.startswith("3 replayed steps equal")
    alone = graph_check.examine(dataclasses.replace(request, executor="loop", slots=1))
    assert alone.why.startswith("3 replayed steps equal")
    compute, first = RowGradients._compute, []

    def baked(rows: RowGradients, batches: torch.Tensor, *more: object) -> None:
        first.append(batches.clone())
        compute(rows, first[0] if rows._captured else batches, *more)

    monkeypatch.setattr(RowGradients, "_compute", baked)
    verdict = graph_check.examine(request)
    assert not verdict.used
    assert "3 replayed steps differ by" in verdict.why


def test_a_choice_says_what_it_captures(tmp_path: Path) -> None:
    """With fewer slots nothing is known of the graph."""
    wide = dataclasses.replace(WIDE, captures=True, graph="equal and faster")
    assert wide.limited(4, "x") == wide
    assert (wide.limited(2, "x").captures, wide.limited(2, "x").graph) == (False, "")
    assert Choice.from_dict(dataclasses.asdict(wide)) == wide
    assert graphs.can_capture(twin.DEVICE)
    assert not graphs.can_capture(torch.device("cpu"))
