"""A command in a worker: what is read of its program, how its trial ends, and where it goes on after a kill."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
from optuna.trial import TrialState

from hpo.errors import StorageError, StudyError
from hpo.final import user_objective
from hpo.final.program_site import ShownProgram
from hpo.launch.logs import Tail
from hpo.own import command as own_command
from hpo.own import output
from hpo.own.process import OutOfMemoryCount
from hpo.queue import reaper
from hpo.queue.ledger import Ledger
from hpo.spec import seeds
from hpo.spec.study_file import StudySpec
from hpo.storage.connect import connect, plain_url
from hpo.storage.tables import UNREAD_KEY, hpo_trials, intermediate_values
from hpo.study import control
from hpo.study.study import Study, join
from hpo.study.trial_history import history
from hpo.view.pages import history_text
from hpo.worker import descendants
from hpo.worker import loop as worker_loop
from hpo.worker.program_site import ProgramSite
from hpo.worker.signals import StopSignal
from tests.integration.processes import failures
from tests.support.trials import MakeStudy, begin, refused, row_of
from tests.support.waiting import wait_for

BY_EPOCH = r"epoch (?P<epoch>\d+) loss (?P<value>\S+)"
BY_VALUE = r"loss (?P<value>\S+)"
QUICK = {"grace": "2s"}
#: Trains to epoch 5 and saves each in its folder.
RESUMES = """
cd $HPO_CHECKPOINT_DIR
epoch=$(cat epoch 2>/dev/null || echo 0)
echo from $epoch >> $SEEN
while [ $epoch -lt 5 ]; do
    epoch=$((epoch + 1))
    eval "$BEFORE"
    echo epoch $epoch loss 0.$((9 - epoch))
    echo $epoch > epoch
    eval "$AFTER"
done
"""
WHOLE = {1: 0.8, 2: 0.7, 3: 0.6, 4: 0.5, 5: 0.4}


@pytest.fixture
def make(make_study: MakeStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Study]:
    """Make a study whose command runs a shell script with the value of `x`."""
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))

    def make(script: str, *, trials: int = 1, metric: str | None = BY_EPOCH, **document: Any) -> Study:
        braced = script.replace("{", "{{").replace("}", "}}")
        given = {"command": ["sh", "-c", braced, "script", "{x}"], "space": {"x": {"low": 0.0, "high": 1.0}}}
        settings = {"objective": None, "recovery": QUICK, **given, **document}
        return make_study(trials=trials, **({} if metric is None else {"metric": metric}), **settings)

    return make


def seen(tmp_path: Path) -> list[str]:
    return (tmp_path / "seen").read_text().splitlines()


def work(study: Study, stopping: StopSignal | None = None) -> int:
    objective = worker_loop.build_objective(study, study.code_folder)
    return worker_loop.work(study, objective, study.ledger("w"), stopping or StopSignal())


def only(study: Study) -> optuna.trial.FrozenTrial:
    (trial,) = study.optuna.get_trials(deepcopy=False)
    return trial


def reason(study: Study) -> str:
    """Return why the only trial failed."""
    *_, last = failures(study)
    return str(last.message)


# --- what is read -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "script", "curve"),
    [
        (BY_EPOCH, "echo epoch 2 loss 1.5; echo noise; echo epoch 0 loss 3", {0: 3.0, 2: 1.5}),
        (BY_EPOCH, "printf 'epoch 1 loss 2\\repoch 2 loss 1\\r\\nepoch 3 loss 0.5'", {1: 2.0, 2: 1.0, 3: 0.5}),
        (BY_EPOCH, "printf '\\377\\376 epoch 1 loss 2 \\200\\n'; echo epoch 2 loss 1e-3 >&2", {1: 2.0, 2: 0.001}),
        (BY_EPOCH, "echo epoch 1 loss 2; echo epoch 1 loss 2.0; echo epoch 2 loss nan; echo epoch 3 loss 1", None),
        (BY_VALUE, "echo loss 3; echo loss 2; echo loss 3", {1: 3.0, 2: 2.0, 3: 3.0}),
        (
            "json:v",
            """echo '{"v": 3}'; echo '{"v"'; echo '[1]'; echo '{"w": 1}'; echo ' {"v": 1e0} '""",
            {1: 3.0, 2: 1.0},
        ),
        ("json:v", """echo '{"epoch": 4, "v": 3}'; echo '{"epoch": 7.0, "v": 1}'""", {4: 3.0, 7: 1.0}),
    ],
)
def test_values_are_read_from_the_output(
    make: Callable[..., Study], metric: str, script: str, curve: dict[int, float] | None
) -> None:
    study = make(script, metric=metric)
    assert work(study) == 0
    trial = only(study)
    assert trial.state is TrialState.COMPLETE
    if curve is None:
        assert [*trial.intermediate_values] == [1, 2, 3]
        assert math.isnan(trial.intermediate_values[2])
    else:
        assert trial.intermediate_values == curve
    assert trial.value == trial.intermediate_values[max(trial.intermediate_values)]


def test_a_value_may_be_the_best_epoch_s(make: Callable[..., Study]) -> None:
    study = make("echo loss 2; echo loss 1; echo loss 3", metric=BY_VALUE, value="best")
    work(study)
    assert only(study).value == 1.0


def test_a_python_program_sends_values_itself(make: Callable[..., Study], tmp_path: Path) -> None:
    """Also from a child of its own; no metric is needed, and nothing printed."""
    (tmp_path / "train.py").write_text(
        "import subprocess, sys, hpo\n"
        "if len(sys.argv) > 1:\n"
        "    hpo.report(float(sys.argv[1]), 1)\n"
        "    subprocess.run([sys.executable, __file__], check=True)\n"
        "else:\n"
        "    hpo.report(0.25, epoch=2)\n"
        "assert not {'torch', 'optuna', 'sqlalchemy'} & set(sys.modules)\n"
    )
    study = make("", metric=None, command=[sys.executable, "train.py", "{x}"])
    work(study)
    assert only(study).intermediate_values == {1: only(study).params["x"], 2: 0.25}
    assert only(study).value == 0.25


def test_what_the_program_is_told(make: Callable[..., Study], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setenv("HPO_STORAGE", "postgresql://me:secret@host/db")
    words = ["{x}", "--n={deep.n}", "{{{flag}}}", "{text}", "{list}", "{HPO_SEED}", "{HPO_CHECKPOINT_DIR}"]
    space = {"x": {"low": 0.5, "high": 0.5}, "deep": {"n": {"low": 4, "high": 4}}, "flag": True}
    space |= {"text": {"choices": ["a b"]}, "list": {"choices": [[1, 2]]}}
    script = (
        'for word in "$@"; do echo "$word" >> $SEEN; done; env | grep -E "^(HPO|CUDA)_" | sort >> $SEEN; echo loss 1'
    )
    study = make("", metric=BY_VALUE, command=["sh", "-c", script, "script", *words], space=space, seed=5)
    work(study)
    seed = str(seeds.of_trial(5, 0) % 2**31)
    folder = study.trial_folder(0)
    assert seen(tmp_path) == [
        *("0.5", "--n=4", "{true}", "a b", "[1, 2]", seed, f"{folder}/checkpoint-1"),
        "CUDA_VISIBLE_DEVICES=3",
        f"HPO_CACHE={os.environ['HPO_CACHE']}",
        f"HPO_CHECKPOINT_DIR={folder}/checkpoint-1",
        f"HPO_DATA_DIR={os.environ['HPO_DATA_DIR']}",
        f"HPO_REPORTS={folder}/attempt-1-reports.jsonl",
        f"HPO_SEED={seed}",
        "HPO_STUDY=own",
        "HPO_TRIAL=0",
    ]


def test_a_hundred_megabytes_of_output_are_read_and_bounded(make: Callable[..., Study]) -> None:
    study = make(
        "head -c 100000000 /dev/zero; echo; echo loss 1; yes progress | head -c 2000000; echo; echo loss 2",
        metric=BY_VALUE,
    )
    work(study)
    assert only(study).intermediate_values == {1: 1.0, 2: 2.0}
    assert sum(file.stat().st_size for file in study.logs.iterdir()) < 1.2 * 2**20
    assert Tail(study.logs, trial=0).lines()[-1] == "loss 2"


# --- how it ends ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "kind", "message"),
    [
        (
            "echo 'all is well'",
            "exception",
            f"the program ended without a value: no line matches metric = '{BY_VALUE}'",
        ),
        ("true", "exception", "; it printed nothing"),
        (
            "echo loss many",
            "exception",
            "the metric 'many' is not a number, in the line 'loss many'; let `metric` match",
        ),
        (
            "echo loss 1; echo Bad: no data >&2; exit 3",
            "exception",
            "the program ended with exit code 3; its last line: Bad:",
        ),
        (
            "echo torch.OutOfMemoryError: CUDA out of memory.; exit 1",
            "out_of_memory",
            "exit code 1; its last line: torch.Out",
        ),
        (
            "echo RuntimeError: CUDA error: an illegal access; echo; exit 1",
            "cuda_error",
            "its last line: RuntimeError: CUDA",
        ),
        ("echo loss 1; kill -SEGV $$", "exception", "the program was killed by SIGSEGV; its last line: loss 1"),
        ("kill -35 $$", "exception", "the program was killed by signal 35; it printed nothing"),
        ("kill -KILL $$", "lost_worker", "the program was killed by SIGKILL; it printed nothing"),
        ("sh -c 'kill -TERM $$'; exit $?", "lost_worker", "the program was killed by SIGTERM"),
        ("echo loss nan", "diverged", "the objective returned nan"),
    ],
)
def test_a_failure_is_of_its_kind_and_shows_the_last_lines(
    make: Callable[..., Study], monkeypatch: pytest.MonkeyPatch, script: str, kind: str, message: str
) -> None:
    monkeypatch.setattr(own_command, "CONFIRM_SECONDS", 0.0)
    once = {name: {"retries": 0, "then": "fail"} for name in ("out_of_memory", "cuda_error", "lost_worker", "diverged")}
    study = make(script, metric=BY_VALUE, failures=once)
    work(study)
    assert only(study).state is TrialState.FAIL
    assert [row.kind for row in failures(study)] == [kind]
    assert message in reason(study)
    if kind in ("exception", "lost_worker"):
        assert failures(study)[0].traceback.startswith(reason(study)[:100])  # not where hpo saw it


def test_a_program_that_the_system_killed_for_memory_ran_out_of_it(
    make: Callable[..., Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_command, "CONFIRM_SECONDS", 0.0)
    monkeypatch.setattr(OutOfMemoryCount, "has_grown", lambda self: True)
    study = make("kill -KILL $$", failures={"out_of_memory": {"retries": 0}})
    work(study)
    assert [row.kind for row in failures(study)] == ["out_of_memory"]


@pytest.mark.parametrize(
    ("end", "why"), [("exit 3", "ended with exit code 3"), ("kill -KILL $$", "was killed by SIGKILL")]
)
def test_hpo_train_says_in_a_line_why_the_program_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str, why: str
) -> None:
    monkeypatch.setattr(own_command, "CONFIRM_SECONDS", 0.0)
    words = {"command": ["sh", "-c", f"echo loss 1; echo no data; {end}", "sh", "{x}"], "space": {"x": 0.5}}
    document = {"name": "own", "direction": "minimize", "metric": BY_VALUE, "receipt": {"trial": 0}, **words}
    with pytest.raises(StudyError) as raised:
        user_objective.run(StudySpec.from_document(document), Path("best.toml"), tmp_path, loop=ShownProgram(tmp_path))
    assert str(raised.value) == f"best.toml: the program {why}; its last line: no data"


def test_two_values_for_one_epoch_fail(make: Callable[..., Study]) -> None:
    study = make("echo epoch 1 loss 3; echo epoch 2 loss 2; echo epoch 2 loss 2.5; sleep 100")
    work(study)
    assert only(study).state is TrialState.FAIL
    assert only(study).intermediate_values == {1: 3.0, 2: 2.0}
    assert reason(study).startswith(
        "the program gave two values for epoch 2: 2.0, then 2.5 in the line 'epoch 2 loss 2.5'"
    )


def test_an_epoch_that_is_no_whole_number_fails(make: Callable[..., Study]) -> None:
    study = make("""echo '{"epoch": 0.5, "v": 1}'; sleep 100""", metric="json:v")
    work(study)
    assert reason(study).startswith("the epoch 0.5 is not a whole number from 0 to 2147483646, in")


THRESHOLD = {"pruner": {"name": "threshold", "upper": 5.0}}


@pytest.mark.parametrize("trap", ["trap 'echo told >> $SEEN; exit 0' TERM", "trap 'echo told >> $SEEN; exit 1' TERM"])
def test_a_pruned_program_is_told_and_its_exit_code_says_nothing(
    make: Callable[..., Study], tmp_path: Path, trap: str
) -> None:
    study = make(
        f"{trap}; echo epoch 1 loss 1; echo epoch 2 loss 9; sleep 100 & wait; echo epoch 3 loss 1", **THRESHOLD
    )
    work(study)
    assert only(study).state is TrialState.PRUNED
    assert only(study).intermediate_values == {1: 1.0, 2: 9.0}
    assert row_of_only(study).reason == "by the pruner threshold at step 2, with 9.0000"
    assert seen(tmp_path) == ["told"]
    assert not study.trial_folder(0).exists()


def row_of_only(study: Study) -> Any:
    from hpo.queue.models import Claim

    claim = Claim(trial_id=only(study)._trial_id, number=0, attempt=1, began=None)
    return row_of(study, claim)


@pytest.mark.usefixtures("adopting")
def test_a_program_that_ignores_sigterm_is_killed_after_the_grace(make: Callable[..., Study], tmp_path: Path) -> None:
    """Its children too, also one that has left its group."""
    script = (
        "trap '' TERM; (setsid sleep 100 & echo $! >> $SEEN); sleep 100 & echo $! >> $SEEN; echo epoch 1 loss 9; wait"
    )
    study = make(script, recovery={"grace": "1s"}, **THRESHOLD)
    work(study)
    assert only(study).state is TrialState.PRUNED
    pids = [int(line) for line in seen(tmp_path)]
    assert len(pids) == 2
    wait_for(lambda: not any(map(descendants.is_alive, pids)))


@pytest.mark.parametrize("before", [[], ["timeout", "1000"]], ids=["plain", "in a group of its own"])
def test_a_time_limit_ends_it(make: Callable[..., Study], before: list[str]) -> None:
    words = [*before, "sh", "-c", "echo epoch 1 loss 2; exec sleep 1000", "script", "{x}"]
    study = make("", command=words, budget={"trials": 1, "trial_timeout": "1s"})
    work(study)
    assert only(study).state is TrialState.PRUNED
    assert only(study).value == 2.0
    assert [row.kind for row in failures(study)] == ["time_limit"]


@pytest.mark.usefixtures("fast_ticks")
def test_hpo_stop_ends_it(make: Callable[..., Study], tmp_path: Path) -> None:
    study = make("echo epoch 1 loss 2; echo ready >> $SEEN; sleep 100")
    with at_mark(tmp_path, lambda: control.stop_trial(again(study), 0)):
        work(study)
    assert only(study).state.is_finished()
    assert failures(study) == []


@pytest.mark.usefixtures("fast_ticks")
def test_a_lost_lease_kills_it_at_once(make: Callable[..., Study], tmp_path: Path) -> None:
    study = make("trap '' TERM; echo $$ > $SEEN.pid; echo epoch 1 loss 2; echo ready >> $SEEN; sleep 100")
    stopping = StopSignal()

    def take_away() -> None:
        other = again(study)
        stopping.request()  # so that this worker does not claim it again
        reaper.fail_leases_of(other.ledger("launcher"), "w", "taken away")

    with at_mark(tmp_path, take_away):
        work(study, stopping)
    wait_for(lambda: not descendants.is_alive(int((tmp_path / "seen.pid").read_text())))


def again(study: Study) -> Study:
    """Return the study with connections of its own, for another thread."""
    return join(connect(plain_url(study.storage.url)), study.name)


class at_mark:
    """Does something in another thread once the program has written to the file `seen`."""

    def __init__(self, tmp_path: Path, act: Callable[[], object]) -> None:
        def wait_and_act() -> None:
            wait_for((tmp_path / "seen").exists)
            act()

        self._thread = threading.Thread(target=wait_and_act)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._thread.join()


# --- where it goes on -------------------------------------------------------------------------------------------------


def test_a_parked_program_saves_and_goes_on_from_there(
    make: Callable[..., Study], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it prints after SIGTERM counts, and that it exits with 0 does not complete the trial."""
    monkeypatch.setenv(
        "BEFORE",
        "[ $epoch != 3 ] || [ -e $SEEN.parked ] || { trap told=1 TERM; touch $SEEN.parked; sleep 100 & wait; }",
    )
    monkeypatch.setenv("AFTER", "[ -z $told ] || exit 0")
    study, stopping = make(RESUMES), StopSignal()
    with at_mark(tmp_path, lambda: (wait_for((tmp_path / "seen.parked").exists), stopping.request())):
        assert work(study, stopping) == 128 + signal.SIGTERM
    assert only(study).state is TrialState.RUNNING
    assert only(study).intermediate_values == {1: 0.8, 2: 0.7, 3: 0.6}
    work(study)
    assert only(study).state is TrialState.COMPLETE
    assert only(study).intermediate_values == WHOLE
    assert seen(tmp_path) == ["from 0", "from 3"]
    assert failures(study) == []
    saved = history(study, 0).checkpoint
    assert saved == str(study.trial_folder(0) / "checkpoint-2")
    assert Path(saved, "epoch").read_text() == "5\n"  # the best trial's folder is kept


def test_the_output_of_all_trials_is_bounded(make: Callable[..., Study], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "ALL_BYTES", 25_000)
    study = make("head -c 10000 /dev/zero | tr '\\0' x; echo; echo epoch 1 loss 1", trials=4)
    work(study)
    kept = [number for number in range(4) if output.head(study.logs, number).exists()]
    assert kept == [1, 2, 3]  # at the start of trial 3 there were 30,000 bytes
    assert [trial.value for trial in study.optuna.get_trials(deepcopy=False)] == [1.0] * 4


#: In a script: wait until the test has seen the reports, then kill the worker.
KILL = "until [ -e $SEEN.reported ]; do sleep 0.02; done; sleep 100 & echo $! $$ > $SEEN.pids; kill -KILL $PPID; wait"


def killed(study: Study, tmp_path: Path, reports: int) -> None:
    """Run a worker in a fork of this process that its program kills, and let another one have the trial.

    Args:
        tmp_path: the program is told by the file `seen.reported` there that its reports are recorded.
        reports: their number.
    """
    child = os.fork()
    if child == 0:
        try:
            work(again(study))
        finally:
            os._exit(1)
    wait_for(lambda: recorded(study) == reports)
    (tmp_path / "seen.reported").touch()
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    reaper.fail_leases_of(study.ledger("launcher"), "w", "killed by SIGKILL")


def recorded(study: Study) -> int:
    """Return how many reports there are, if the trial goes on after the last of them or has no epochs."""
    with study.storage.engine.connect() as connection:
        steps = connection.execute(sa.select(intermediate_values.c.step)).scalars().all()
        reached = connection.execute(sa.select(hpo_trials.c.checkpoint_epoch)).scalar()
    return len(steps) if study.spec.metric == BY_VALUE or reached == max(steps, default=None) else -1


@pytest.mark.both
def test_after_a_kill_of_the_worker_nothing_runs_on_and_the_trial_resumes(
    make: Callable[..., Study], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BEFORE", f"[ $epoch != 3 ] || [ -e $SEEN.pids ] || {{ {KILL}; }}")
    study = make(RESUMES)
    killed(study, tmp_path, 2)
    wait_for(lambda: not any(descendants.is_alive(int(pid)) for pid in (tmp_path / "seen.pids").read_text().split()))
    work(study)
    assert only(study).state is TrialState.COMPLETE
    assert only(study).intermediate_values == WHOLE
    assert seen(tmp_path) == ["from 0", "from 2"]
    assert [row.kind for row in failures(study)] == ["lost_worker"]


def test_a_program_that_outlives_its_attempt_reaches_no_file_of_the_next(
    make: Callable[..., Study], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as one whose worker was stopped for longer than the lease. Here it has left the group that is killed."""
    late = "exec 2>&-; until [ -e $SEEN.go ]; do sleep 0.02; done; echo 9 > $HPO_CHECKPOINT_DIR/epoch; echo $? > $SEEN.tried"
    first = f"[ $epoch != 3 ] || [ -e $SEEN.pids ] || {{ setsid sh -c '{late}' & {KILL}; }}"
    second = "[ $epoch != 4 ] || { touch $SEEN.go; until [ -e $SEEN.tried ]; do sleep 0.02; done; cat epoch >> $SEEN; }"
    monkeypatch.setenv("BEFORE", f"{first}; {second}")
    study = make(RESUMES)
    killed(study, tmp_path, 2)
    work(study)
    assert seen(tmp_path) == ["from 0", "from 2", "3"]
    assert (tmp_path / "seen.tried").read_text() != "0\n"
    assert only(study).intermediate_values == WHOLE


def test_a_disk_that_is_not_mounted_is_no_empty_folder(
    make: Callable[..., Study], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attempt fails. The trial does not start over."""
    monkeypatch.setenv("BEFORE", f"[ $epoch != 3 ] || [ -e $SEEN.pids ] || {{ {KILL}; }}")
    study = make(RESUMES, trials=2)
    killed(study, tmp_path, 2)
    study.checkpoints.rename(tmp_path / "elsewhere")
    study.checkpoints.mkdir()  # the mount point
    work(study)
    assert {(row.kind, "mount its disk" in row.message) for row in failures(study)[1:]} == {("data_error", True)}
    assert seen(tmp_path) == ["from 0"]
    assert [trial.intermediate_values for trial in study.optuna.trials] == [{1: 0.8, 2: 0.7}, {}]
    assert list(study.checkpoints.glob("trial-*")) == []  # the second trial has saved nothing there either


@pytest.mark.parametrize(
    ("metric", "save"),
    [(BY_EPOCH, ""), (BY_VALUE, "touch $HPO_CHECKPOINT_DIR/saved; ")],
    ids=["saves nothing", "no epoch"],
)
def test_a_program_that_cannot_go_on_starts_again_with_its_curve(
    make: Callable[..., Study], tmp_path: Path, metric: str, save: str
) -> None:
    """In an empty folder."""
    script = (
        f"ls $HPO_CHECKPOINT_DIR | wc -l >> $SEEN; {save} n=$(cat $SEEN | wc -l); echo epoch 1 loss 0.$n; "
        f"[ $n = 2 ] || {{ {KILL}; }}; echo epoch 2 loss 0.5"
    )
    study = make(script, metric=metric)
    killed(study, tmp_path, 1)
    work(study)
    assert [int(line) for line in seen(tmp_path)] == [0, 0]
    assert only(study).intermediate_values == {1: 0.2, 2: 0.5}


def test_a_program_that_begins_again_in_spite_of_its_files_gives_a_new_curve(
    make: Callable[..., Study], tmp_path: Path
) -> None:
    script = (
        "touch $HPO_CHECKPOINT_DIR/saved; echo run >> $SEEN; n=$(cat $SEEN | wc -l); echo epoch 0 loss 0.$n; "
        f"echo epoch 1 loss 0.$n; [ $n = 2 ] || {{ {KILL}; }}"
    )
    study = make(script)
    killed(study, tmp_path, 2)
    work(study)
    assert only(study).intermediate_values == {0: 0.2, 1: 0.2}


def test_of_an_epoch_that_comes_again_the_first_value_counts(
    make: Callable[..., Study], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A program that saves every second epoch repeats some after a kill; what differs is told."""
    script = (
        "cd $HPO_CHECKPOINT_DIR; touch saved; echo run >> $SEEN; n=$(cat $SEEN | wc -l); "
        f"[ $n = 2 ] || {{ echo epoch 1 loss 0.1; echo epoch 2 loss 0.1; echo epoch 3 loss 0.1; {KILL}; }}; "
        "echo epoch 2 loss 0.1; echo epoch 3 loss 0.$n; echo epoch 4 loss 0.4"
    )
    study = make(script)
    killed(study, tmp_path, 3)
    with caplog.at_level(logging.WARNING, logger="hpo.own.command"):
        work(study)
    assert only(study).intermediate_values == {1: 0.1, 2: 0.1, 3: 0.1, 4: 0.4}
    said = "trial 0: epoch 3 gave 0.1 in an earlier attempt and gives 0.2 now; the first one counts"
    assert [record.getMessage() for record in caplog.records if record.name == "hpo.own.command"] == [said]


def test_epochs_that_nobody_read_are_told(
    make: Callable[..., Study], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    script = (
        "cd $HPO_CHECKPOINT_DIR; touch saved; echo run >> $SEEN; n=$(cat $SEEN | wc -l); "
        f"[ $n = 2 ] || {{ echo epoch 1 loss 0.1; echo epoch 3 loss 0.1; echo epoch 5 loss 0.1; {KILL}; }}; "
        "echo epoch 11 loss 0.1; echo epoch 13 loss 0.1"
    )
    study = make(script)
    killed(study, tmp_path, 3)
    with caplog.at_level(logging.WARNING, logger="hpo.worker.program_site"):
        work(study)
    assert [*only(study).intermediate_values] == [1, 3, 5, 11, 13]
    said = (
        "trial 0: no value is known between epoch 5 of an earlier attempt and epoch 11: the program saved epochs that no "
        "worker read"
    )
    assert [record.getMessage() for record in caplog.records if record.name == "hpo.worker.program_site"] == [said]
    found = history(study, 0)
    assert found.unread == [[5, 11]]
    assert "gap      between epochs 5 and 11: the program saved epochs that no worker read" in history_text(found)


def test_a_gap_is_noted_once(make: Callable[..., Study]) -> None:
    """The worker may be killed after it has noted the gap and before it has reported the epoch after it."""
    study = make("true")
    site = ProgramSite(study, begin(study)[2])
    for first in (7, 7, 9):
        site.note_unread(3, first)
    assert only(study).user_attrs[UNREAD_KEY] == [[3, 7], [3, 9]]


def test_an_outage_that_lasts_too_long_costs_no_value(make: Callable[..., Study], tmp_path: Path) -> None:
    """The program is parked, and what it gave meanwhile is left to the next attempt."""
    script = (
        "cd $HPO_CHECKPOINT_DIR; [ ! -e saved ] || { echo epoch 5 loss 0.5; exit 0; }; "
        "trap 'echo epoch 4 loss 0.4; touch saved; exit 0' TERM; echo epoch 1 loss 0.1; echo epoch 2 loss 0.2; "
        "echo ready >> $SEEN; until [ -e $SEEN.cut ]; do sleep 0.02; done; echo epoch 3 loss 0.3; sleep 100 & wait"
    )
    study = make(script, recovery={**QUICK, "outage_patience": "1s"})
    with pytest.MonkeyPatch.context() as patches:

        def cut() -> None:
            other = again(study)
            wait_for(lambda: recorded(other) == 2)
            for name in ("report", "record_checkpoint", "renew_all"):
                patches.setattr(Ledger, name, refused)
            (tmp_path / "seen.cut").touch()

        with at_mark(tmp_path, cut), pytest.raises(StorageError, match="the storage has failed for 1 s"):
            work(study)
    reaper.release_leases_of(study.ledger("launcher"), "w")
    work(study)
    assert only(study).state is TrialState.COMPLETE
    assert only(study).intermediate_values == {1: 0.1, 2: 0.2, 3: 0.3, 4: 0.4, 5: 0.5}


def test_a_program_that_is_done_already_completes_its_trial(make: Callable[..., Study], tmp_path: Path) -> None:
    """It printed its last epoch before a kill, and finds nothing left to do."""
    script = (
        "cd $HPO_CHECKPOINT_DIR; echo run >> $SEEN; [ ! -e done ] || exit 0; echo epoch 1 loss 0.7; touch done; "
    ) + KILL
    study = make(script)
    killed(study, tmp_path, 1)
    work(study)
    assert only(study).state is TrialState.COMPLETE
    assert only(study).value == 0.7


def test_the_command_is_written_beside_the_program_s_folder(make: Callable[..., Study]) -> None:
    study = make("echo epoch 1 loss 1")
    work(study)
    words = json.loads((study.trial_folder(0) / "command.json").read_text())
    assert words == ["sh", "-c", "echo epoch 1 loss 1", "script", repr(only(study).params["x"])]
