"""Of checkpoint files those stay that somebody may yet go on from, or that belong to the best trials; all others go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from hpo.queue.models import Checkpoint
from hpo.study import retention
from hpo.study.checkpoint_store import FolderStore
from hpo.study.retention import delete_stale, file_name, is_kept, stale
from hpo.study.study import Study
from hpo.train import checkpoint
from hpo.worker import pending_reports
from tests.support.trials import MakeStudy, begin, run


def touched(folder: Path, *names: str) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()
    return [folder / name for name in names]


def left(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def tidy(folder: Path, attempt: int, keep: list[Path]) -> None:
    store = FolderStore(folder.parent)
    retention.tidy(store, folder.name, attempt, keep=[store.name_of(str(file)) for file in keep])


# --- the files of one trial -------------------------------------------------------------------------------------------


def test_no_two_checkpoints_have_one_name() -> None:
    assert file_name(2, 7, 123) == "attempt-2-epoch-7-123.pt"
    names = {file_name(a, e, s) for a in (1, 11) for e in (1, 11) for s in (1, 11)}
    assert len(names) == 8
    assert all(retention.OF_ATTEMPT.fullmatch(name) for name in names)


def test_of_this_attempt_and_those_before_only_what_is_to_be_kept_stays(tmp_path: Path) -> None:
    kept = touched(tmp_path, file_name(1, 9, 1), file_name(2, 5, 1), "attempt-2-handover.json")
    touched(tmp_path, file_name(1, 5, 1), file_name(2, 4, 1), "attempt-1-handover.json")
    later = touched(tmp_path, file_name(3, 1, 1), "attempt-3-handover.json", file_name(10, 1, 1), file_name(20, 1, 1))
    tidy(tmp_path, 2, keep=kept)
    assert left(tmp_path) == {file.name for file in [*kept, *later]}


def test_what_killed_workers_were_writing_goes(tmp_path: Path) -> None:
    """What killed workers were writing goes and what a later attempt is writing stays."""
    unfinished = [f".attempt-{n}-epoch-5-1.0123abcd.pt" for n in (1, 2, 3)]
    notes = [f".attempt-{n}-handover.0123abcd.json" for n in (1, 2, 3)]
    touched(tmp_path, *unfinished, *notes)
    tidy(tmp_path, 2, keep=[])
    assert left(tmp_path) == {unfinished[2], notes[2]}


def test_the_files_that_are_written_are_those_that_are_tidied(
    tmp_path: Path, make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The names of what a killed worker leaves are made elsewhere."""
    folder, killed = tmp_path / "trial-000000", set()
    store = FolderStore(tmp_path)
    folder.mkdir()

    def kill(*names: object) -> None:
        killed.update(left(folder))
        raise KeyboardInterrupt

    _, claim, trial = begin(make_study())
    found = Checkpoint(epoch=3, path="/c.pt", digest="d")
    with monkeypatch.context() as patched:
        patched.setattr("os.replace", kill)
        with pytest.raises(KeyboardInterrupt):
            pending_reports.leave(store, trial, found)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(folder / file_name(claim.attempt, 3, 1), {})
    note = folder.parent / pending_reports.leave(store, trial, found)
    checkpoint.save(folder / file_name(claim.attempt, 3, 1), {})
    assert len(killed) == 2
    touched(folder, *killed)
    tidy(folder, claim.attempt, keep=[note])
    assert left(folder) == {note.name}


def test_strange_files_in_a_trial_s_folder_stay(tmp_path: Path) -> None:
    strange = ["notes.txt", "attempt-x-epoch-1-1.pt", "my-attempt-1-epoch-1-1.pt", "..attempt-1-epoch-1-1.pt"]
    touched(tmp_path, *strange, file_name(1, 1, 1))
    tidy(tmp_path, 2, keep=[])
    assert left(tmp_path) == set(strange)


def test_a_folder_that_is_not_there_is_tidy(tmp_path: Path) -> None:
    tidy(tmp_path / "trial-000000", 1, keep=[])
    assert left(tmp_path) == set()


# --- which trials lead ------------------------------------------------------------------------------------------------


def ended(make_study: MakeStudy, keep: int, *values: float, direction: str = "minimize") -> Study:
    """Return a study whose trials ended with these values."""
    study = make_study(trials=99, direction=direction, recovery={"keep_checkpoints": keep})
    for value in values:
        run(study, value)
    return study


@pytest.mark.parametrize(
    ("keep", "direction", "number", "value", "expected"),
    [
        pytest.param(2, "minimize", 3, 0.25, True, id="better than the last that is kept"),
        pytest.param(2, "minimize", 3, 0.05, True, id="better than all"),
        pytest.param(2, "minimize", 3, 0.35, False, id="worse"),
        pytest.param(2, "minimize", 3, 0.3, False, id="as good, but later"),
        pytest.param(2, "minimize", -1, 0.3, True, id="as good, and earlier"),
        pytest.param(2, "maximize", 3, 0.35, True, id="better, if more is better"),
        pytest.param(2, "maximize", 3, 0.25, False, id="worse, if more is better"),
        pytest.param(2, "maximize", 3, 0.3, False, id="as good, but later, if more is better"),
        pytest.param(3, "minimize", 3, 0.5, False, id="all places are taken"),
        pytest.param(4, "minimize", 3, 99.0, True, id="a place is free"),
        pytest.param(0, "minimize", 3, -99.0, False, id="none is kept"),
    ],
)
def test_a_trial_leads_if_its_value_puts_it_among_those_that_are_kept(
    keep: int, direction: str, number: int, value: float, expected: bool, make_study: MakeStudy
) -> None:
    study = ended(make_study, keep, 0.1, 0.3, 0.4 if direction == "minimize" else 0.3, direction=direction)
    assert is_kept(study, number, value) is expected


def test_what_leads_before_its_end_is_what_is_swept_around_after_it(make_study: MakeStudy) -> None:
    values = [0.5, 0.5, 0.25, 0.5, 0.125, 0.25, 0.125]
    study = ended(make_study, 2)
    kept: set[str] = set()
    for number, value in enumerate(values):
        if is_kept(study, number, value):
            kept.add(study.trial_folder(number).name)
            touched(study.trial_folder(number), file_name(1, 1, 1))
        run(study, value)
        kept -= {folder.name for folder in delete_stale(study)}
        ranked = sorted(range(number + 1), key=lambda one: (values[one], one))
        assert kept == {study.trial_folder(one).name for one in ranked[:2]}
    assert left(study.checkpoints) == {*kept, "study.uid"}


def test_only_complete_trials_take_a_place_among_the_best(make_study: MakeStudy) -> None:
    study = ended(make_study, 1, 0.5)
    run(study, 0.1, state=TrialState.PRUNED)
    assert is_kept(study, 9, 0.4)
    assert not is_kept(study, 9, 0.6)


# --- the folders of a study -------------------------------------------------------------------------------------------


def with_folders(study: Study, *numbers: int) -> None:
    for number in numbers:
        touched(study.trial_folder(number), file_name(1, 1, 1), ".attempt-1-epoch-2-1.0123abcd.pt")


def names(study: Study, *numbers: int) -> set[str]:
    return {study.trial_folder(number).name for number in numbers}


@pytest.mark.both
def test_which_folders_are_deleted(make_study: MakeStudy) -> None:
    """Folders of settled trials that do not lead are swept and no others."""
    study = ended(make_study, 1, 0.5, 0.25, 0.75)  # of numbers 0, 1, 2
    run(study, 0.125, state=TrialState.PRUNED)  # 3
    parked = begin(study)  # 4
    begin(study)  # 5
    study.optuna.ask()  # 6: foreign
    parked[0].park(parked[1])
    with_folders(study, 0, 1, 2, 3, 4, 5, 6, 7)  # there is no trial 7 yet
    assert [folder.name for folder in stale(study)] == sorted(names(study, 0, 2, 3))
    assert [folder.name for folder in delete_stale(study)] == sorted(names(study, 0, 2, 3))
    assert left(study.checkpoints) == names(study, 1, 4, 5, 6, 7) | {"study.uid"}
    assert left(study.trial_folder(1)) == {file_name(1, 1, 1), ".attempt-1-epoch-2-1.0123abcd.pt"}
    assert delete_stale(study) == []


def test_looking_for_what_is_stale_removes_nothing(make_study: MakeStudy) -> None:
    study = ended(make_study, 0, 0.5)
    with_folders(study, 0)
    assert [folder.name for folder in stale(study)] == ["trial-000000"]
    assert study.trial_folder(0).is_dir()


@pytest.mark.parametrize("keep", [0, 1, 3])
@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_as_many_of_the_best_trials_keep_their_folder_as_the_study_says(
    keep: int, direction: str, make_study: MakeStudy
) -> None:
    values = [0.5, 0.25, 0.5, 0.75, 0.25]
    study = ended(make_study, keep, *values, direction=direction)
    with_folders(study, *range(5))
    delete_stale(study)
    sign = 1 if direction == "minimize" else -1
    best = sorted(range(5), key=lambda number: (sign * values[number], number))[:keep]
    assert left(study.checkpoints) == names(study, *best) | {"study.uid"}


def test_another_study_s_trial_is_no_reason_to_deletion(make_study: MakeStudy) -> None:
    """A trial of another study of the same number is no reason to sweep."""
    study, other = make_study(trials=9), make_study(trials=9, name="other")
    begin(study)
    run(other, 0.5), run(other, 0.25)
    with_folders(study, 0)
    assert delete_stale(study) == []


@pytest.mark.parametrize(
    "name",
    ["trial-000001 copy", "trial-x", "trial-", "trial--00001", "xtrial-000001", "trial-000001.bak", "logs", "trial-1"],
)
def test_folders_of_strange_names_stay(name: str, make_study: MakeStudy) -> None:
    study = ended(make_study, 0, 0.5, 0.5)
    touched(study.checkpoints / name, "mine")
    assert delete_stale(study) == []
    assert left(study.checkpoints) == {name, "study.uid"}


def test_a_folder_of_a_strange_name_does_not_hide_the_trial_s_own(make_study: MakeStudy) -> None:
    study = ended(make_study, 0, 0.5, 0.5)
    for name in ("trial-1", "trial-01", "trial-0000001"):
        touched(study.checkpoints / name, "mine")
    with_folders(study, 1)
    assert delete_stale(study) == [study.trial_folder(1)]


@pytest.mark.parametrize("digits", [10, 19, 20, 100])
def test_a_folder_of_a_number_that_no_trial_can_have_disturbs_nobody(digits: int, make_study: MakeStudy) -> None:
    study = ended(make_study, 0, 0.5)
    touched(study.checkpoints / f"trial-{'9' * digits}", "mine")
    with_folders(study, 0)
    assert delete_stale(study) == [study.trial_folder(0)]


def test_a_file_with_a_trial_s_name_is_left_alone(make_study: MakeStudy) -> None:
    study = ended(make_study, 0, 0.5)
    touched(study.checkpoints, "trial-000000")
    delete_stale(study)
    assert left(study.checkpoints) == {"trial-000000", "study.uid"}


@pytest.mark.parametrize("gone", ["missing", "a file"])
def test_a_checkpoint_folder_that_cannot_be_read_costs_no_trial(
    gone: str, make_study: MakeStudy, caplog: pytest.LogCaptureFixture
) -> None:
    study = ended(make_study, 1, 0.5)
    (study.checkpoints / "study.uid").unlink()
    study.checkpoints.rmdir()
    if gone == "a file":
        study.checkpoints.touch()
    assert delete_stale(study) == []
    assert "cannot be read" in caplog.text


def test_a_folder_that_vanishes_meanwhile_is_deleted(make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    study = ended(make_study, 0, 0.5)
    with_folders(study, 0)
    found: Any = stale(study)
    delete_stale(study)  # another worker's
    monkeypatch.setattr(retention, "_settled", lambda _: dict(enumerate(found)))
    assert delete_stale(study) == found
