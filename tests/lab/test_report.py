"""What replays with many seeds show together, and the command that prints it."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hpo import cli
from hpo.errors import SpecError, StudyError
from hpo.lab import plan as plans
from hpo.lab import replay, report
from hpo.lab import table as tables
from hpo.lab.plan import Plan
from hpo.lab.report import Quartiles
from hpo.lab.table import Again, Ending, Table
from hpo.view import replays
from tests.support.tables import DECLARED, falling, row, table


def plan(found: Table, pruner: str = "none", workers: int = 1, **settings: float) -> Plan:
    return plans.make(found, sampler="recorded", pruner=pruner, workers=workers, **settings)


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_the_goal_the_regrets_and_the_share_that_missed() -> None:
    """Trial 1 of three is the best: 8 of 12 epochs are over when it ends, and half of the budget is over at epoch 6."""
    found = table(row(0, [9.0, 8.0, 7.0, 6.0]), row(1, [5.0, 4.0, 3.0, 2.0]), row(2, [9.0] * 4))
    shown = report.replay_all(plan(found), seeds=30, processes=1)
    assert (shown.seeds, shown.epochs, shown.reached_after, shown.missed) == (1, 12, (8.0,), 0.0)
    assert {share: regret.median for share, regret in shown.regrets.items()} == {0.25: 5.0, 0.5: 2.0, 1.0: 0.0}
    assert (shown.table.best, shown.table.goal, shown.table.at_goal, shown.complete) == (2.0, 2.0, 1, 3)
    short = report.replay_all(dataclasses.replace(plan(found), epochs=6), seeds=30, processes=1)
    assert (short.reached_after, short.missed, short.regrets[1.0].median) == ((math.inf,), 1.0, 2.0)


def test_quartiles_are_numbers_of_replays() -> None:
    assert Quartiles.of([4.0, 1.0, 3.0, 2.0, math.inf]) == Quartiles(low=2.0, median=3.0, high=4.0)
    assert Quartiles.of([1.0, math.inf, math.inf]).median == math.inf


def test_processes_change_nothing() -> None:
    once = plans.make(table(*falling(30)), sampler="random", pruner="none", workers=3, epochs=1000)
    shown = [report.replay_all(once, seeds=3, processes=count) for count in (1, 2)]
    times = dict.fromkeys(("sampler_seconds", "suggestion_seconds", "pruner_seconds"), 0.0)
    assert dataclasses.replace(shown[0], **times) == dataclasses.replace(shown[1], **times)
    assert len(set(shown[0].reached_after)) > 1


# --- would this pruner have killed my winner? -------------------------------------------------------------------------

LATE = [row(0, [5.0, 4.0, 3.0]), row(1, [6.0, 3.0, 2.0]), row(2, [9.0, 8.0, 1.0])]  # the last wins by its last epoch


def test_the_winner_s_fate() -> None:
    killed = report.replay_all(plan(table(*LATE), "successive_halving"), seeds=9, processes=1).winner
    kept = report.replay_all(plan(table(*LATE), "median"), seeds=9, processes=1).winner
    assert killed == report.Winner(number=2, value=1.0, epochs=3, ended=1, pruned_after=(1,), diverged=0)
    assert kept == report.Winner(number=2, value=1.0, epochs=3, ended=1, pruned_after=(), diverged=0)


@pytest.mark.parametrize(
    ("ended", "pruned_after", "said"),
    [
        (0, (), "Unknown: it did not end within the budget"),
        (1, (), "No"),
        (9, (), "No, in none of 9 replays"),
        (9, (1, 3), "Yes, in 2 of 9 replays, after epoch 2 of 8"),
    ],
)
def test_the_winner_s_fate_in_a_sentence(ended: int, pruned_after: tuple[int, ...], said: str) -> None:
    winner = report.Winner(number=4, value=0.5, epochs=8, ended=ended, pruned_after=pruned_after, diverged=0)
    asked = "would median have ended the winner, trial 4 (0.5000)? "
    assert replays.winner_text(winner, "median") == asked + said


# --- trained again ----------------------------------------------------------------------------------------------------


def test_what_the_best_trial_comes_to_when_it_is_trained_again() -> None:
    """The last trial is the best one as recorded, and the second of three when it is trained again."""
    values = (0.5, 9.0, 2.0)
    found = table(
        *(dataclasses.replace(one, again=Again(value=v, curve=())) for one, v in zip(LATE, values, strict=True))
    )
    shown = report.replay_all(plan(found), seeds=1, processes=1)
    only = Quartiles(low=2.0, median=2.0, high=2.0)
    assert shown.retrained == report.Retrained(rows=3, replays=1, value=only, rank=only)
    assert replays.report_text(shown).splitlines()[-1] == (
        "again    with another seed the best trial of a replay has 2.0000 (2.0000 to 2.0000), rank 2 (2 to 2) "
        "of the 3 trials that were trained again"
    )
    diverged = table(*LATE[:2], dataclasses.replace(LATE[2], again=Again(value=None, curve=())))
    value = report.replay_all(plan(diverged), seeds=1, processes=1).retrained
    assert value is not None
    assert value.value == Quartiles(low=math.inf, median=math.inf, high=math.inf)


def test_a_best_trial_that_was_not_trained_again_is_counted_apart() -> None:
    found = table(dataclasses.replace(LATE[0], again=Again(value=0.5, curve=())), *LATE[1:])
    shown = report.replay_all(plan(found), seeds=1, processes=1)
    assert shown.retrained == report.Retrained(rows=1, replays=0, value=None, rank=None)
    assert replays.report_text(shown).splitlines()[-1] == (
        "again    no replay has its best trial among the 1 trials that were trained again"
    )
    assert report.replay_all(plan(table(*LATE)), seeds=1, processes=1).retrained is None


# --- cut curves -------------------------------------------------------------------------------------------------------

CUT = [*falling(8), row(8, [1.0], Ending.CUT), row(9, [1.0, 1.0], Ending.CUT)]


def test_too_many_cut_curves_are_refused() -> None:
    with pytest.raises(StudyError, match=r"^2 of 10 trials were cut off .* more than 10%; .* pruner = \"none\""):
        report.replay_all(plan(table(*CUT)), seeds=1, processes=1)
    with pytest.raises(StudyError, match=r"^2 of 10 trials were cut off"):
        plans.make(table(*CUT), sampler="random", pruner="none")
    assert report.replay_all(plan(table(*CUT), most_cut=0.2), seeds=1, processes=1).unknown == 2


def test_a_sampler_is_given_no_cut_curve() -> None:
    course = replay.run(plans.make(table(*CUT), sampler="random", pruner="none", most_cut=0.2, epochs=1000), 0)
    assert sorted(end.number for end in course.ends) == list(range(8))


def test_a_cut_curve_that_the_pruner_ends_earlier_is_known() -> None:
    found = plan(table(*falling(8), row(8, [900.0] * 3, Ending.CUT), row(9, [900.0] * 3, Ending.CUT)), "median")
    assert report.replay_all(found, seeds=1, processes=1).unknown == 0


# --- names and options ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"sampler": "x"}, r"--sampler x: there is no such sampler; known: .*cmaes, .*, qmc, random, recorded, tpe"),
        ({"pruner": "asha"}, r"--pruner asha: there is no such pruner; known: .*hyperband, "),
        ({"settings": ["pruner.interval_steps=x"]}, r"pruner\.interval_steps = 'x': input should be a valid integer"),
        (
            {"settings": ["interval_steps=3"]},
            r"--set interval_steps=3: is not an option; write --set sampler\.KEY=VALUE",
        ),
        (
            {"sampler": "recorded", "settings": ["sampler.x=1"]},
            r"--set sampler\.x: the recorded order takes no options",
        ),
        ({"slots": 4}, r"--slots 4: the study has an objective of its own, .* leave --slots out, and set --workers to"),
        ({"settings": ["pruner.name=none"]}, r"--set pruner\.name=none: is not an option; write --pruner none"),
        ({"settings": ["failures.diverged.then=fail"]}, r"--set failures\.diverged\.then: changes nothing in a replay"),
    ],
)
def test_wrong_names_and_options_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        plans.make(table(*falling(3)), **{"sampler": "tpe", "pruner": "median", **given})


def test_a_stack_has_at_most_an_even_share_of_the_trials_and_an_epoch_within_the_budget() -> None:
    found = table(*falling(7), document=DECLARED)
    for workers, slots, most in ((1, 64, 7), (2, 64, 4), (2, 3, 3), (9, 3, 1)):
        made = plans.make(found, sampler="random", pruner="none", workers=workers, slots=slots, epochs=64)
        assert made.slots == most
    assert plans.make(found, sampler="random", pruner="none", workers=2, slots=64, epochs=4).slots == 4
    with pytest.raises(
        SpecError, match=r"--slots 64: an epoch of a stack of 4 trials is more than the budget of 3 epochs; "
    ):
        plans.make(found, sampler="random", pruner="none", workers=2, slots=64, epochs=3)
    short = table(*falling(50, epochs=1), document=DECLARED)  # so the budget is 40 epochs by default
    with pytest.raises(SpecError, match=r"the budget of 40 epochs; write --epochs 50 or more, or --slots 40 or less"):
        plans.make(short, sampler="random", pruner="none", workers=1, slots=50)


def test_options_are_those_of_a_study_file() -> None:
    settings = ["sampler.n_startup_trials=3", "pruner.reduction_factor=4"]
    spec = plans.make(table(*falling(3, epochs=7)), sampler="tpe", pruner="hyperband", settings=settings).spec
    assert (spec.sampler["n_startup_trials"], spec.sampler["multivariate"]) == (3, True)
    assert spec.pruner == {"name": "hyperband", "min_resource": 1, "max_resource": 7, "reduction_factor": 4}


# --- the command ------------------------------------------------------------------------------------------------------

Hpo = Callable[..., tuple[int, str, str]]


@pytest.fixture
def hpo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Hpo:
    """Run `hpo replay` in a folder with the table made.npz; return its exit code and what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HPO_STORAGE", raising=False)
    tables.save(table(*LATE), tmp_path / "made.npz")

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["hpo", "replay", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        told = capsys.readouterr()
        return int(ended.value.code or 0), told.out, told.err

    return run


def test_the_command_answers_in_one_sentence(hpo: Hpo) -> None:
    code, out, err = hpo("made.npz", "--sampler", "recorded", "--pruner", "successive_halving", "--workers", "1")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert (
        lines[0] == "table    made: 3 whole curves of up to 3 epochs; minimize value, best 1.0000, top 1 % from 1.0000"
    )
    assert lines[1] == "replay   sampler recorded, pruner successive_halving, 1 worker, 1 replay of 5 epochs"
    assert lines[2] == "top 1 %  missed by 1 of 1 (100%)"
    assert lines[-1] == (
        "winner   would successive_halving have ended the winner, trial 2 (1.0000)? Yes, after epoch 1 of 3"
    )


def test_the_command_tells_the_stacks(hpo: Hpo, tmp_path: Path) -> None:
    tables.save(table(*falling(8), document=DECLARED), tmp_path / "stacks.npz")
    given = ("--sampler", "recorded", "--pruner", "none", "--workers", "2", "--slots", "3", "--seeds", "1")
    code, out, _ = hpo("stacks.npz", *given)
    assert (code, out.splitlines()[1]) == (
        0,
        "replay   sampler recorded, pruner none, 2 workers with stacks of 3, 1 replay of 32 epochs",
    )
    unknown = "note     the table does not know which trials may share a stack; here all of them may"
    assert unknown in out.splitlines()
    known = [replace(one, stack_key=f"of {one.number % 2}") for one in falling(8)]
    tables.save(table(*known, document=DECLARED), tmp_path / "stacks.npz")
    code, out, _ = hpo("stacks.npz", *given)
    assert (code, unknown in out.splitlines()) == (0, False)
    code, out, _ = hpo("stacks.npz", *given, "--json")
    shown = json.loads(out)
    assert (shown["workers"], shown["slots"], shown["table"]["stack_keys"]) == (2, 3, 2)


def test_the_command_prints_json(hpo: Hpo) -> None:
    code, out, _ = hpo(
        "made.npz", "--sampler", "random", "--pruner", "none", "--seeds", "2", "--processes", "1", "--json"
    )
    found = json.loads(out)
    assert (code, found["seeds"], found["epochs"], found["table"]["goal"], found["winner"]) == (0, 2, 9, 1.0, None)


def test_the_command_says_what_is_wrong(hpo: Hpo) -> None:
    assert hpo("other.npz") == (
        2,
        "",
        "error: other.npz: no such file; `hpo replay STUDY --save FILE` writes one\n",
    )
    code, _, err = hpo("digits")
    assert (code, "studies.db: no such file" in err) == (2, True)
