"""Leases on SQLite follow no wall clock: a step, a sleep, a fresh start of the machine, and another machine.

Nobody can set the clock of the machine that tests run on. A process of its own is given other clocks: by a time namespace,
which needs root, and by a library in front of the C library's, which needs a compiler.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from hpo.errors import StudyError
from hpo.queue import lease_clock, workers
from hpo.queue.models import Claim
from hpo.queue.reaper import Reaper
from hpo.storage import clock, sql
from hpo.storage.connect import Storage
from hpo.storage.tables import hpo_failures, hpo_trials, hpo_workers
from hpo.study import control, doctor
from hpo.study.query import trouble
from hpo.study.status import summarize
from hpo.study.study import Study
from tests.support.rows import rows
from tests.support.trials import claim_one, make, reap

STEP = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
int clock_gettime(clockid_t which, struct timespec *now) {
    int (*real)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(which, now);
    if (which == CLOCK_REALTIME) now->tv_sec += atol(getenv("STEP"));
    return result;
}
int gettimeofday(struct timeval *now, void *zone) {
    struct timespec found;
    clock_gettime(CLOCK_REALTIME, &found);
    now->tv_sec = found.tv_sec;
    now->tv_usec = found.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *now) {
    struct timespec found;
    clock_gettime(CLOCK_REALTIME, &found);
    if (now) *now = found.tv_sec;
    return found.tv_sec;
}
"""
REAP = """
import sys, time
import sqlalchemy as sa
from hpo.queue import reaper
from hpo.storage import sql
from hpo.storage.connect import connect
from hpo.study import doctor, study
demo = study.join(connect(sys.argv[1]), "demo")
with sql.writing(demo.storage.engine) as connection:
    print(float(connection.execute(sa.select(sql.now(connection))).scalar_one()) - float(sys.argv[2]))
    print(reaper.reap(connection, demo.ledger("reaper")))
print([finding.what for finding in doctor._clock_steps(demo, False)])
"""
LEASE = 600.0  # longer than a busy machine takes to start a process


@pytest.fixture
def demo(lite: Storage, tmp_path: Path) -> Study:
    """A study of which a living worker of this machine holds a trial."""
    study = make(lite, tmp_path)
    ledger = study.ledger("living", lease_seconds=LEASE)
    workers.register(ledger)
    assert isinstance(claim_one(ledger), Claim)
    return study


def reap_elsewhere(study: Study, *wrapper: str, **environment: str) -> tuple[float, int, str]:
    """Reap in a process under other clocks; return by how much its wall clock is ahead, what it took, and doctor's words."""
    command = [*wrapper, sys.executable, "-c", REAP, f"sqlite:///{study.storage.url.database}", str(time.time())]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
    ahead, taken, said = done.stdout.splitlines()
    return float(ahead), int(taken), said


def in_a_time_namespace(**offsets: int) -> list[str]:
    wrapper = ["unshare", "-T", *(f"--{name}={seconds}" for name, seconds in offsets.items())]
    if shutil.which("unshare") is None or subprocess.run([*wrapper, "true"], capture_output=True).returncode:
        pytest.skip("needs root for a time namespace")
    return wrapper


def test_a_step_and_a_sleep_take_no_trial(demo: Study, tmp_path: Path) -> None:
    step = 36000
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    (tmp_path / "step.c").write_text(STEP)
    library = tmp_path / "step.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, tmp_path / "step.c", "-ldl"], check=True)
    asleep = in_a_time_namespace(boottime=7200)
    ahead, taken, said = reap_elsewhere(demo, *asleep, LD_PRELOAD=str(library), STEP=str(step + 7200))
    assert ahead == pytest.approx(step + 7200, abs=60)
    assert taken == 0
    assert f"the clock of this machine was set by {step:+d}."[:-1] in said
    assert "after worker living had begun" in said


def test_time_awake_takes_the_trial(demo: Study) -> None:
    awake = in_a_time_namespace(monotonic=int(LEASE) + 1, boottime=int(LEASE) + 1)
    _, taken, _ = reap_elsewhere(demo, *awake)
    assert taken == 1


def set_rows(study: Study, table: sa.Table, **values: Any) -> None:
    with sql.writing(study.storage.engine) as connection:
        connection.execute(table.update().values(**values))


def host() -> str:
    return (clock.name() or "").partition("@")[2]


def test_a_lease_names_its_clock_and_is_far_ahead_for_an_hpo_of_before(demo: Study) -> None:
    (row,) = rows(demo)
    assert row.lease_clock == clock.name() == f"{clock.BOOT_FILE.read_text().strip()}@{os.uname().nodename}"
    assert row.lease_until == pytest.approx(1e10 + time.monotonic() + LEASE, abs=30)
    demo.ledger("living").park(Claim(trial_id=row.trial_id, number=0, attempt=1))
    assert [(row.lease_until, row.lease_clock) for row in rows(demo)] == [(None, None)]


def test_after_a_fresh_start_of_the_machine_its_trials_are_free_at_once(demo: Study) -> None:
    """Even to a reaper that has just started alone, which leaves leases of this boot for half a lease."""
    set_rows(demo, hpo_trials, lease_clock=f"an-earlier-boot@{host().upper()}", lease_until=1e12)
    set_rows(demo, hpo_workers, clock=f"an-earlier-boot@{host()}")
    assert summarize(demo).counts["parked"] == 1
    (found,) = [one.what for one in doctor._dead_leases(demo, False)]
    assert found == "trial 0 is RUNNING without a live lease; its worker was living"
    assert isinstance(claim_one(demo.ledger("new", lease_seconds=-1.0)), Claim)  # of this boot, and out as well
    assert Reaper(demo.ledger("new"))() == 1
    assert [row.lease_until is None for row in rows(demo)] == [True, False]
    with demo.storage.engine.connect() as connection:
        (failure,) = connection.execute(sa.select(hpo_failures)).all()
    assert (failure.kind, failure.verdict) == ("lost_worker", "retry")
    assert failure.message == "its machine was restarted (living)"


@pytest.mark.parametrize("until", [0.0, 1e12])
def test_a_trial_of_another_machine_is_left_to_it(until: float, demo: Study) -> None:
    set_rows(demo, hpo_trials, lease_clock="another-boot@another-host", lease_until=until)
    set_rows(demo, hpo_workers, clock="another-boot@another-host")
    assert reap(demo) == 0
    assert Reaper(demo.ledger("new"))() == 0
    assert summarize(demo).counts["running"] == 1
    assert list(doctor._dead_leases(demo, True)) == []
    (found,) = doctor._elsewhere(demo, False)
    assert found.what == "trial 0 is held by living of another machine, whose clock cannot be read here"
    assert found.mend == "if that worker is gone: hpo doctor demo --release 0"
    control.release(demo, 0)
    assert trouble.held_elsewhere(demo) == []
    assert summarize(demo).counts["parked"] == 1
    with pytest.raises(StudyError, match="trial 0 of study 'demo' is not held by another machine"):
        control.release(demo, 0)


def test_a_trial_of_this_machine_is_not_given_away(demo: Study) -> None:
    with pytest.raises(StudyError, match="a lease of this machine expires by itself"):
        control.release(demo, 0)


@pytest.mark.parametrize(
    ("other", "is_old_boot"),
    [
        ("b@my_host", True),
        ("b@MY_HOST", True),
        ("b@myxhost", False),
        ("b@your.my_host", False),
        ("b@my_host.local", False),
    ],
)
def test_a_host_is_known_by_its_whole_name(
    other: str, is_old_boot: bool, lite: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clock, "name", lambda: "a@my_host")
    with lite.engine.connect() as connection:
        stopped = connection.execute(sa.select(lease_clock.has_stopped("sqlite", sa.literal(other)))).scalar_one()
    assert bool(stopped) == is_old_boot == (not lease_clock.is_elsewhere(other))


@pytest.mark.parametrize(("ahead", "wanted"), [(-1.0, 1), (60.0, 0)])
def test_a_lease_of_an_hpo_of_before_runs_out_by_the_wall_clock(ahead: float, wanted: int, demo: Study) -> None:
    set_rows(demo, hpo_trials, lease_clock=None, lease_until=time.time() + ahead)
    assert summarize(demo).counts["running"] == 1 - wanted
    assert reap(demo) == wanted


def test_where_boots_cannot_be_told_apart_the_wall_clock_is_used(
    lite: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clock, "name", lambda: None)
    assert lease_clock.name("sqlite") is None
    moments = [(time.time() - 60, None), (time.time() + 60, None), (0.0, "boot@host")]
    passed = [lease_clock.has_passed("sqlite", sa.literal(at), sa.literal(by, sa.String())) for at, by in moments]
    with lite.engine.connect() as connection:
        assert list(map(bool, connection.execute(sa.select(*passed)).one())) == [True, False, False]


@pytest.mark.parametrize("by", ["since", "while it worked"])
def test_doctor_tells_a_step(by: str, demo: Study) -> None:
    assert list(doctor._clock_steps(demo, False)) == []
    if by == "since":
        set_rows(demo, hpo_workers, booted_at=hpo_workers.c.booted_at - 3600, left_at=1.0)
    else:
        set_rows(demo, hpo_workers, clock_skew=3600.0)
    (found,) = doctor._clock_steps(demo, False)
    assert found.what == "the clock of this machine was set by +3600.0 s after worker living had begun"
    assert not found.is_ill


def test_a_worker_notes_a_step_as_it_works(demo: Study) -> None:
    set_rows(demo, hpo_workers, booted_at=hpo_workers.c.booted_at + 100)
    with sql.writing(demo.storage.engine) as connection:
        workers.stamp(connection, demo.ledger("living"))
    with demo.storage.engine.connect() as connection:
        skew = connection.execute(sa.select(hpo_workers.c.clock_skew)).scalar_one()
    assert skew == pytest.approx(-100.0, abs=1.0)
