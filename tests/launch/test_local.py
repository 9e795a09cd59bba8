"""Local workers: which device each gets, what happens when one dies."""

from __future__ import annotations

import importlib.util
import os
import signal
import sqlite3
import tempfile
import threading
import time
from multiprocessing import current_process, forkserver, get_context
from pathlib import Path

import psutil
import pytest
from optuna.trial import TrialState

from hpo.errors import SpecError
from hpo.launch import fork_server, search
from hpo.launch.launcher import Interrupt, catching_signals
from hpo.launch.local import Fleet
from hpo.launch.placement import check_count
from hpo.launch.slots import CRASHES, SERVER_GONE, last_words
from hpo.queue.models import Claim
from hpo.study.study import Study
from hpo.worker.signals import ASKING, ORDER
from tests.support.nvidia_smi import A, B, install
from tests.support.trials import MakeStudy, claim_one
from tests.support.waiting import PATIENCE, wait_for


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program in the place of nvidia-smi that lists two GPUs."""
    return install(tmp_path, monkeypatch)


@pytest.mark.usefixtures("nvidia_smi")
def test_a_number_of_workers_beyond_the_machine_is_told_with_its_numbers() -> None:
    cores, memory = len(os.sched_getaffinity(0)), psutil.virtual_memory().total
    machine = f"this machine has {cores} cores, 2 GPUs and {memory / 2**30:.0f} GiB of memory"
    many = 4 * max(cores, 2)
    assert check_count(many, is_declared=True) is None
    told = f"workers = {many + 1}: {machine}; more than {many} workers slow each other down"
    assert check_count(many + 1, is_declared=True) == told
    for is_declared, each in ((True, 150), (False, 25)):
        most = memory // (each * 2**20)
        check_count(most, is_declared=is_declared)
        with pytest.raises(SpecError) as caught:
            check_count(most + 1, is_declared=is_declared)
        assert str(caught.value) == (
            f"workers = {most + 1}: {machine}, and each worker takes {each} MiB or more; start at most {most}"
        )


def objective_file(study: Study, text: str) -> None:
    (study.code_folder / "mine.py").write_text(text)


def tend_to_the_end(fleet: Fleet) -> None:
    wait_for(lambda: not fleet.tend())


SEEN = """
import os, pathlib, time
HERE = pathlib.Path(__file__).parent
def objective(trial):
    (HERE / f"seen-{os.getpid()}").write_text(
        f"{os.environ.get('CUDA_VISIBLE_DEVICES')} {os.environ['OMP_NUM_THREADS']} {os.environ['HPO_STORAGE']}")
    while len(list(HERE.glob("seen-*"))) < 2:  # each worker has one of the two trials
        time.sleep(0.02)
    return 0.0
"""


@pytest.mark.usefixtures("nvidia_smi")
def test_each_worker_sees_its_own_gpu_one_thread_and_the_storage(make_study: MakeStudy) -> None:
    study = make_study(trials=2)
    objective_file(study, SEEN)
    fleet = Fleet(study, 2, code_folder=study.code_folder, allow_code_change=True)
    fleet.start()
    tend_to_the_end(fleet)
    assert fleet.failed == [], last_words(fleet.failed)
    seen = sorted(path.read_text() for path in study.code_folder.glob("seen-*"))
    url = study.storage.url.render_as_string(hide_password=False)
    assert seen == [f"{A} 1 {url}", f"{B} 1 {url}"]


SLOW_TO_LOAD = """
import pathlib, time
while not pathlib.Path(__file__).with_name("go").exists():
    time.sleep(0.02)
def objective(trial):
    return 0.0
"""


def test_what_workers_do_before_they_train_is_known(make_study: MakeStudy) -> None:
    """A run can say what it waits for, while user code is loaded or data is prepared."""
    study = make_study(trials=2)
    objective_file(study, SLOW_TO_LOAD)
    fleet = Fleet(study, 2, code_folder=study.code_folder, allow_code_change=True)
    fleet.start()
    wait_for(lambda: fleet.doing() == {"loading mine.py:objective": 2})
    (study.code_folder / "go").touch()
    tend_to_the_end(fleet)
    assert fleet.doing() == {}


CRASHING_ONCE = """
import os, pathlib, signal
def objective(trial):
    mark = pathlib.Path(__file__).with_name("crashed")
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return float(trial.number)
"""


def test_a_crashed_worker_is_started_again_and_its_trial_goes_on_at_once(make_study: MakeStudy) -> None:
    study = make_study(trials=2)
    objective_file(study, CRASHING_ONCE)
    fleet = Fleet(study, 1, code_folder=study.code_folder, allow_code_change=True)
    fleet.start()
    tend_to_the_end(fleet)
    assert fleet.slots[0].exit_codes == [-signal.SIGKILL, 0]
    assert fleet.failed == []
    assert [(trial.state, trial.value) for trial in study.optuna.trials] == [
        (TrialState.COMPLETE, 0.0),
        (TrialState.COMPLETE, 1.0),
    ]


def test_a_worker_that_always_crashes_is_given_up_and_reported(make_study: MakeStudy) -> None:
    study = make_study(trials=2)
    objective_file(study, "import os\nos._exit(7)\n")  # before it has a trial that could be to blame
    fleet = Fleet(study, 1, code_folder=study.code_folder, allow_code_change=True)
    fleet.start()
    tend_to_the_end(fleet)
    assert fleet.slots[0].exit_codes == [7] * CRASHES
    assert [slot.index for slot in fleet.failed] == [0]
    assert fleet.exit_code == 1
    assert "worker 0 ended with exit code 7" in last_words(fleet.failed)


def test_a_worker_that_refuses_is_not_started_again(make_study: MakeStudy) -> None:
    study = make_study(trials=2)
    objective_file(study, "raise ImportError('no such thing')\n")
    fleet = Fleet(study, 1, code_folder=study.code_folder)
    fleet.start()
    tend_to_the_end(fleet)
    assert fleet.slots[0].exit_codes == [2]
    assert fleet.exit_code == 2
    assert "no such thing" in last_words(fleet.failed)
    assert study.optuna.trials == []


REPORTING = """
import time
def objective(trial):
    for step in range(1, 1000):
        trial.report(1.0, step)
        trial.should_prune()
        time.sleep(0.05)
"""


def test_whatever_ends_the_parent_s_loop_its_workers_park_first(make_study: MakeStudy) -> None:
    study = make_study(trials=2)
    objective_file(study, REPORTING)
    fleet = Fleet(study, 1, code_folder=study.code_folder, allow_code_change=True)
    fleet.start()
    try:
        deadline = time.monotonic() + PATIENCE
        while not any(trial.intermediate_values for trial in study.optuna.get_trials(deepcopy=False)):
            assert fleet.tend() == 1
            assert time.monotonic() < deadline, "gave up waiting"
            time.sleep(0.05)
    finally:
        fleet.end()
    assert fleet.slots[0].exit_codes == [128 + signal.SIGTERM]
    again = claim_one(study.ledger("next"))
    assert isinstance(again, Claim)
    assert (again.number, again.attempt) == (0, 2)


def test_a_signal_is_passed_on_while_the_main_thread_waits_for_the_storage(
    make_study: MakeStudy, tmp_path: Path
) -> None:
    """A worker that got the same signal waits for its parent's word only so long. timeout(1) sends each signal twice."""
    study = make_study()
    fleet = Fleet(study, 1, code_folder=study.code_folder)
    worker = fleet.slots[0].process = get_context("spawn").Process(target=time.sleep, args=(600,))
    worker.start()
    holding = sqlite3.connect(tmp_path / "busy.db", check_same_thread=False)
    holding.execute("BEGIN EXCLUSIVE")

    def interrupt_it() -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        worker.join(PATIENCE)
        holding.rollback()

    sending = threading.Timer(0.1, interrupt_it)
    with catching_signals(Interrupt(fleet)) as interrupt:
        sending.start()
        sqlite3.connect(tmp_path / "busy.db", timeout=PATIENCE).execute("BEGIN EXCLUSIVE")
    sending.join()
    assert worker.exitcode == -ORDER
    assert interrupt.received == [signal.SIGTERM]


FORKED = """
import gc, os, pathlib, sys
import numpy
def objective(trial):
    assert gc.isenabled(), "the server loads modules without it"
    told = [os.getsid(0) == os.getpid(), os.getppid(), sys.orig_argv[1:4], os.getcwd(), os.readlink("/proc/self/fd/0")]
    pathlib.Path(__file__).with_name(f"told-{trial.number}").write_text(repr(told))
    pathlib.Path(__file__).with_name(f"drawn-{trial.number}").write_text(repr(numpy.random.random()))
    return 0.0
"""


def test_a_signal_to_the_group_leaves_the_server(make_study: MakeStudy) -> None:
    """A signal to the whole group leaves the server that workers are forked from."""
    study = make_study(trials=2)
    objective_file(study, FORKED)
    fleet = Fleet(study, 1, code_folder=study.code_folder, allow_code_change=True)
    fleet.start()
    server = server_of_workers()
    for number in ASKING:
        os.kill(server, number)
    tend_to_the_end(fleet)
    assert fleet.slots[0].exit_codes == [0]
    assert server_of_workers() == server
    told = [(study.code_folder / f"told-{number}").read_text() for number in range(2)]
    assert told == [repr([True, server, ["-P", "-m", "hpo"], os.getcwd(), os.devnull])] * 2


def server_of_workers() -> int:
    (server,) = fork_server.ids()
    return server


def test_a_killed_server_is_started_anew(make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is killed costs its workers and another one is started."""
    monkeypatch.setattr("hpo.launch.slots.RESTART_SECONDS", 0.01)
    study = make_study(trials=2)
    objective_file(study, FORKED)
    fleet = Fleet(study, 1, code_folder=study.code_folder, allow_code_change=True)
    fork_server.warm_up(None)
    os.kill(server_of_workers(), signal.SIGSTOP)
    killing = threading.Timer(0.3, os.kill, [server_of_workers(), signal.SIGKILL])
    killing.start()
    fleet.start()  # meanwhile
    killing.join()
    tend_to_the_end(fleet)
    assert fleet.slots[0].exit_codes == [SERVER_GONE, 0]
    environment = Path(f"/proc/{server_of_workers()}/environ").read_bytes().split(b"\0")
    assert b"PYTHONSAFEPATH=1" in environment  # else a folder `hpo` at hand would be taken for ours
    assert "PYTHONSAFEPATH" not in os.environ


def test_searches_in_two_threads_leave_the_environment_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one begins while the first one starts the server, and would end after it."""
    before, entered, second = dict(os.environ), list[str](), threading.Event()
    first_ended = threading.Event()

    def ensure_running() -> None:
        entered.append(threading.current_thread().name)
        if len(entered) == 1:
            other.start()
            second.wait(0.3)  # in vain, if one call at a time changes the environment
        else:
            second.set()
            first_ended.wait(PATIENCE)

    monkeypatch.setattr(fork_server.SERVER, "ensure_running", ensure_running)
    other = threading.Thread(target=fork_server.warm_up, args=[None], name="other")
    fork_server.warm_up(None)
    first_ended.set()
    other.join()
    assert entered == [threading.current_thread().name, "other"]
    assert dict(os.environ) == before


@pytest.mark.timeout(60)
def test_orphans_are_left_if_a_worker_s_start_would_have_to_be_waited_for(make_study: MakeStudy) -> None:
    """The third Ctrl-C ends `hpo run` at once, also while the server loads torch."""
    fleet = Fleet(make_study(), 1, code_folder=Path())
    with fork_server._starting:
        fleet.end_orphans(may_wait=False)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('name = "s"', [("auto", False)]),
        ('objective = "mine.py:f"', [(None, False)]),
        ('executor = "loop"', [("loop", False)]),
        ('executor = "stack"\nmetric = "rmse"', [("stack", True)]),
        ('metric = "loss"\nwatch.metrics = ["r2"]', [("auto", True)]),
        ("watch = 1", [("auto", False)]),
        ("name = ", []),
    ],
)
def test_the_server_starts_before_the_study_file_is_checked(
    content: str, expected: list[tuple[str | None, bool]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that cannot be read starts none. `load` says what is wrong with it."""
    started: list[tuple[str | None, bool]] = []
    monkeypatch.setattr(fork_server, "warm_up", lambda executor, *, measures: started.append((executor, measures)))
    (tmp_path / "study.toml").write_text(content)
    search.warm_up_for(tmp_path / "study.toml")
    search.warm_up_for(tmp_path / "missing.toml")
    assert started == expected


def test_the_server_loads_modules_that_exist() -> None:
    """multiprocessing passes over a module that cannot be imported, and each worker would load it by itself."""
    for name in fork_server.ANY + fork_server.DECLARED + fork_server.MEASURES + fork_server.COMPILER:
        assert importlib.util.find_spec(name) is not None, name


def test_a_worker_draws_the_random_numbers_of_its_trial(make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        fork_server, "ANY", [*fork_server.ANY, "numpy.random"]
    )  # as scikit-learn does, for a declared study
    fork_server.warm_up(None)
    os.kill(server_of_workers(), signal.SIGKILL)
    drawn = []
    for seed in (0, 0, 1):
        study = make_study(trials=1, name=f"study-{len(drawn)}", seed=seed)
        objective_file(study, FORKED)
        fleet = Fleet(study, 1, code_folder=study.code_folder, allow_code_change=True)
        fleet.start()
        tend_to_the_end(fleet)
        drawn.append((study.code_folder / "drawn-0").read_text())
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]


def test_a_long_temporary_folder_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long temporary folder does not keep the server from its socket."""
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    monkeypatch.setattr(current_process(), "_config", {**vars(current_process())["_config"], "tempdir": None})
    monkeypatch.setattr(fork_server, "SERVER", forkserver.ForkServer())
    fork_server.warm_up(None)
    assert tempfile.gettempdir() == str(long)
