"""Making and joining studies, on SQLite and on Postgres."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import optuna
import pytest

from hpo.errors import MismatchError, StudyError
from hpo.queue.models import Checkpoint
from hpo.spec.study_file import StudySpec
from hpo.storage import sql, study_rows
from hpo.storage.connect import Storage, connect, parse_url, plain_url
from hpo.storage.optuna_private import as_in_optimize, stop_was_requested
from hpo.storage.tables import UID_KEY
from hpo.strategy import samplers
from hpo.study import study as studies
from hpo.study.checkpoint_store import PROBE_FILE
from hpo.study.status import summarize
from hpo.study.study import Study
from hpo.view.pages import status_text
from tests.conftest import OWN_OBJECTIVE
from tests.support import racing
from tests.support.trials import MakeStudy, claim_one

pytestmark = pytest.mark.both


def spec_of(study: Study, **changes: object) -> StudySpec:
    return StudySpec.from_document({**study.spec.document, **changes})


def join_again(study: Study, wanted: StudySpec, **settings: object) -> Study:
    arguments = {"code_folder": study.code_folder, "code_digest": "", **settings}
    return studies.create_or_join(study.storage, wanted, **arguments)


def test_a_study_is_joined_with_the_spec_it_was_made_with(make_study: MakeStudy) -> None:
    made = make_study(trials=7, seed=3)
    joined = studies.join(made.storage, "own")
    assert (joined.uid, joined.spec, joined.budget) == (made.uid, made.spec, 7)
    assert joined.spec.fingerprint == made.spec.fingerprint
    assert made.optuna.user_attrs[UID_KEY] == made.uid


def test_making_a_study_twice_joins_it(make_study: MakeStudy) -> None:
    assert make_study().uid == make_study().uid


def test_another_spec_is_refused_with_each_difference_and_the_ways_out(make_study: MakeStudy) -> None:
    made = make_study()
    wanted = spec_of(made, seed=5, pruner={"name": "median"})
    with pytest.raises(MismatchError) as refused:
        join_again(made, wanted)
    message = str(refused.value)
    assert "seed: the study has 0, the file has 5" in message
    assert 'pruner.name: the study has "none", the file has "median"' in message
    assert "--name" in message
    assert "hpo fork own" in message


def test_a_larger_budget_is_no_disagreement_and_stays(make_study: MakeStudy) -> None:
    made = make_study(trials=5)
    assert join_again(made, spec_of(made, budget={"trials": 9})).budget == 9
    assert join_again(made, spec_of(made, budget={"trials": 5})).budget == 9


def test_a_budget_given_by_hand_is_taken_as_it_is(make_study: MakeStudy) -> None:
    made = make_study(trials=5)
    assert join_again(made, made.spec, trials_budget=3).budget == 3


def test_a_study_records_what_auto_stands_for_and_one_from_before_the_record_chooses_by_its_space(
    make_study: MakeStudy,
) -> None:
    made = make_study(trials=5, sampler={"name": "auto"})
    wanted = spec_of(made, sampler={"name": "auto"})
    record = made.spec.sampler["stands_for"]
    assert record == samplers.settled(made.spec).sampler
    assert (record["name"], record["explore"], record["group"], record["start"]) == ("fidelity_tpe", 0, True, "random")
    assert join_again(made, wanted, trials_budget=500).spec == made.spec
    with sql.writing(made.storage.engine) as connection:
        study_rows.update(connection, made.uid, spec=json.dumps(wanted.document))
    for old in (studies.join(made.storage, "own"), join_again(made, wanted)):
        assert old.spec.sampler == {"name": "auto", "stands_for": "by its space"}
        assert old.spec.fingerprint == made.spec.fingerprint


def test_workers_storage_and_checkpoints_may_differ(make_study: MakeStudy, tmp_path: Path) -> None:
    made = make_study()
    other = spec_of(made, workers=9, storage="sqlite:///elsewhere.db", checkpoints=str(tmp_path / "other"))
    joined = join_again(made, other)
    assert (joined.uid, joined.checkpoints) == (made.uid, made.checkpoints)


def test_a_study_of_plain_optuna_is_not_taken_for_ours(place: Storage, make_study: MakeStudy) -> None:
    theirs = optuna.create_study(study_name="own", storage=place.optuna)
    theirs.add_trial(optuna.trial.create_trial(value=1.0))
    with pytest.raises(MismatchError, match="1 trials and was not made by hpo"):
        make_study()
    with pytest.raises(StudyError, match=r"study .own. in .* was made by Optuna"):
        studies.join(place, "own")


def test_an_unknown_study_is_answered_with_the_nearest_name(make_study: MakeStudy) -> None:
    made = make_study(name="digits")
    with pytest.raises(StudyError, match="did you mean 'digits'"):
        studies.join(made.storage, "digit")


def test_a_storage_without_our_tables_is_said_to_hold_no_study(bare_url: str) -> None:
    theirs = optuna.storages.RDBStorage(plain_url(parse_url(bare_url)))
    optuna.create_study(study_name="own", storage=theirs)
    theirs.engine.dispose()
    place = connect(bare_url)
    assert studies.names(place) == []
    with pytest.raises(StudyError, match=r"study .own. in .* was made by Optuna"):
        studies.join(place, "own")
    place.close()


def test_changed_code_is_refused_until_it_is_allowed_and_then_recorded(make_study: MakeStudy) -> None:
    made = make_study()
    claim_one(made.ledger("w"))
    with pytest.raises(MismatchError, match="--allow-code-change"):
        join_again(made, made.spec, code_digest="b" * 64)
    assert summarize(made).code_changes == 0
    join_again(made, made.spec, code_digest="b" * 64, allow_code_change=True)
    told = "code     1 change of your code accepted by --allow-code-change; trials of different code are compared"
    assert told in status_text(summarize(made)).splitlines()
    join_again(made, made.spec, code_digest="b" * 64)  # recorded: no longer unknown
    join_again(made, made.spec, code_digest="")


@pytest.mark.parametrize("recorded", ["syntax text", "text"], ids=["now", "by an earlier version"])
def test_a_study_takes_its_code_by_syntax_or_by_text(make_study: MakeStudy, recorded: str) -> None:
    made = make_study()
    join_again(made, made.spec, code_digest=recorded)
    claim_one(made.ledger("w"))
    join_again(made, made.spec, code_digest="syntax text")
    if recorded != "text":
        join_again(made, made.spec, code_digest="syntax comment")
    with pytest.raises(MismatchError, match=r"\((syntax|text) is now another\)"):
        join_again(made, made.spec, code_digest="another comment")


def test_code_that_no_trial_has_run_may_still_be_mended(make_study: MakeStudy) -> None:
    made = make_study()
    join_again(made, made.spec, code_digest="b" * 64)
    claim_one(made.ledger("w"))
    with pytest.raises(MismatchError, match="--allow-code-change"):
        join_again(made, made.spec, code_digest="")


def test_the_first_worker_s_data_is_the_study_s_data(make_study: MakeStudy) -> None:
    made = make_study()
    studies.check_data(made, "a" * 64)
    studies.check_data(made, "a" * 64)
    with pytest.raises(MismatchError, match="data: the study was made on aaaaaaaaaaaa"):
        studies.check_data(made, "b" * 64)


def test_a_worker_that_does_not_see_the_checkpoints_is_refused(make_study: MakeStudy) -> None:
    made = make_study()
    studies.check_worker(made, mine=None, code_digest="", allow_code_change=False)
    (made.checkpoints / PROBE_FILE).unlink()
    with pytest.raises(MismatchError, match="mount it"):
        studies.check_worker(made, mine=None, code_digest="", allow_code_change=False)


def test_a_worker_s_own_file_must_agree(make_study: MakeStudy) -> None:
    made = make_study()
    with pytest.raises(MismatchError, match="seed"):
        studies.check_worker(made, mine=spec_of(made, seed=1), code_digest="", allow_code_change=False)


def test_a_checkpoint_folder_that_cannot_be_made_is_told(place: Storage, tmp_path: Path) -> None:
    """A checkpoint folder that cannot be made is told and nothing is written."""
    (tmp_path / "file").write_text("")
    wrong = StudySpec.from_document({**OWN_OBJECTIVE, "checkpoints": str(tmp_path / "file")})
    with pytest.raises(StudyError, match="checkpoints"):
        studies.create_or_join(place, wrong, code_folder=tmp_path, code_digest="")
    assert optuna.get_all_study_names(place.optuna) == []
    mended = wrong.model_copy(update={"checkpoints": str(tmp_path / "folder")})
    made = studies.create_or_join(place, mended, code_folder=tmp_path, code_digest="")
    assert made.checkpoints == tmp_path / "folder" / made.uid


def test_a_missing_folder_with_checkpoints_of_open_trials_is_not_made_anew(make_study: MakeStudy) -> None:
    """Its disk may not be mounted. A folder that a person has made says that the checkpoints are lost."""
    made = make_study()
    ledger = made.ledger("w")
    claim = claim_one(ledger)
    shutil.rmtree(made.checkpoints)
    assert make_study().sees_checkpoints  # nothing was lost
    ledger.record_checkpoint(claim, Checkpoint(epoch=1, path="c.pt", digest="d"))
    shutil.rmtree(made.checkpoints)
    with pytest.raises(
        MismatchError, match=r"the folder is missing, and 1 trials are to go on from it; mount its disk"
    ):
        make_study()
    assert not made.checkpoints.exists()
    made.checkpoints.mkdir()
    assert make_study().sees_checkpoints


def test_a_study_of_plain_optuna_in_the_other_direction_is_not_adopted(place: Storage, make_study: MakeStudy) -> None:
    optuna.create_study(study_name="own", storage=place.optuna, direction="maximize")
    with pytest.raises(MismatchError, match="other directions: maximize"):
        make_study()


def test_processes_that_make_one_study_at_once_all_get_it(bare_url: str, tmp_path: Path) -> None:
    """Processes that make the same storage and study at once all get it."""
    uids = racing.race(racing.make_study, [bare_url] * 4, [{**OWN_OBJECTIVE, "checkpoints": str(tmp_path)}] * 4)
    assert len(set(uids)) == 1


def test_study_stop_is_allowed_only_inside_our_loop_and_is_seen(make_study: MakeStudy) -> None:
    made = make_study()
    with pytest.raises(RuntimeError):
        made.optuna.stop()
    with as_in_optimize(made.optuna):
        made.optuna.stop()
    assert stop_was_requested(made.optuna)


def test_names_lists_only_studies_of_ours(make_study: MakeStudy, place: Storage) -> None:
    assert studies.names(place) == []
    make_study(name="b")
    make_study(name="a")
    optuna.create_study(study_name="theirs", storage=place.optuna)
    assert studies.names(place) == ["b", "a"]
