"""Two hosts, each in a network namespace without a default route, share a study. One is cut off and comes back.

Both hosts are in namespaces of their own. A host in the machine's own network would still reach addresses that no longer
exist, through its default route.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import sqlalchemy as sa

from hpo.spec.study_file import StudySpec
from hpo.storage import sql
from hpo.storage.connect import connect
from hpo.storage.tables import hpo_failures, hpo_trials
from hpo.study import study as studies
from hpo.study.study import Study
from tests.engines.needed import as_root, program
from tests.support.postgres import ROLE, PostgresServer
from tests.support.waiting import PATIENCE, wait_for

pytestmark = pytest.mark.engines

TRIALS, EPOCHS = 6, 4
OBJECTIVE = """
import os, time
from pathlib import Path

FOLDER = Path(__file__).parent
HOST = int(os.environ["FLEET_HOST"])


def wait(name):
    while not (FOLDER / name).exists():
        time.sleep(0.02)


def objective(trial):
    for epoch in range(1, 5):
        trial.report(float(HOST), epoch)
        if HOST == 2 and trial.number == 0 and epoch == 2:
            (FOLDER / "ready to be cut off").touch()
            wait("trial 0 was finished elsewhere")
    if HOST == 1 and trial.number == 1:
        wait("trial 0 was lost")
    if HOST == 1 and trial.number == 2:
        wait("host 2 works again")
    if HOST == 2 and trial.number > 2:
        (FOLDER / "host 2 works again").touch()
    return float(HOST)
"""  # a trial's values are the number of the host that reported them


def ip(*arguments: str) -> None:
    subprocess.run([program("ip", "iproute2"), *arguments], check=True, capture_output=True, text=True)


class Host:
    """A network namespace with one neighbour, this machine."""

    def __init__(self, number: int, net: int) -> None:
        self.number = number
        self.name = f"hpo-{os.getpid()}-{number}"
        self.wire = f"hpo{os.getpid() % 100000}-{number}"  # at most 15 characters
        self.database = f"10.213.{net}.{4 * number + 1}"
        self.address = f"10.213.{net}.{4 * number + 2}"

    def set_up(self) -> None:
        ip("netns", "add", self.name)
        ip("link", "add", self.wire, "type", "veth", "peer", "name", "eth0", "netns", self.name)
        ip("address", "add", f"{self.database}/30", "dev", self.wire)
        ip("-n", self.name, "address", "add", f"{self.address}/30", "dev", "eth0")
        ip("-n", self.name, "link", "set", "eth0", "up")
        ip("link", "set", self.wire, "up")

    def remove(self) -> None:
        subprocess.run([program("ip", "iproute2"), "netns", "delete", self.name], check=False, capture_output=True)

    def cut_off(self) -> None:
        ip("link", "set", self.wire, "down")

    def reconnect(self) -> None:
        ip("link", "set", self.wire, "up")

    @contextmanager
    def worker(self, study: Study, server: PostgresServer, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
        """Run `hpo worker` on this host. Its log is in the folder."""
        url = f"postgresql://{ROLE}@{self.database}:{server.port}/postgres"
        command = ["ip", "netns", "exec", self.name, sys.executable, "-m", "hpo", "worker", study.name]
        environment = {**os.environ, "HPO_STORAGE": url, "FLEET_HOST": str(self.number)}
        with self.log(folder).open("wb") as log:
            process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def log(self, folder: Path) -> Path:
        return folder / f"host-{self.number}.log"


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    as_root("makes network namespaces")
    made = [Host(number, os.getpid() % 250 + 1) for number in (1, 2)]
    try:
        for host in made:
            host.set_up()
        yield made
    finally:
        for host in made:
            host.remove()


@pytest.fixture
def server(hosts: list[Host]) -> Iterator[PostgresServer]:
    folder = Path(tempfile.mkdtemp(prefix="hpo-pg-", dir="/tmp"))
    folder.chmod(0o755)
    with PostgresServer(folder, addresses=[host.database for host in hosts]) as running:
        yield running


def test_a_host_is_cut_off_for_longer_than_a_lease_and_comes_back(
    hosts: list[Host], server: PostgresServer, tmp_path: Path
) -> None:
    """Its trial is finished by the other host, its late reports change nothing, and it takes further trials."""
    one, two = hosts
    (tmp_path / "mine.py").write_text(OBJECTIVE)
    document = {
        "name": "shared",
        "objective": "mine.py:objective",
        "direction": "maximize",
        "budget": {"trials": TRIALS},
    }
    document |= {"checkpoints": str(tmp_path / "checkpoints"), "recovery": {"lease": "6s"}, "pruner": {"name": "none"}}
    place = connect(server.url, create=True)
    study = studies.create_or_join(place, StudySpec.from_document(document), code_folder=tmp_path, code_digest="")

    def failures() -> Counter[tuple[str, str]]:
        with sql.reading(place.engine) as connection:
            found = connection.execute(sa.select(hpo_failures.c.kind, hpo_failures.c.verdict))
            return Counter((kind, verdict) for kind, verdict in found)

    def settled(number: int) -> Callable[[], bool]:
        return lambda: study.optuna.get_trials(deepcopy=False)[number].state.is_finished()

    with two.worker(study, server, tmp_path) as second:
        wait_for((tmp_path / "ready to be cut off").exists)
        with one.worker(study, server, tmp_path) as first:
            wait_for(lambda: len(study.optuna.get_trials(deepcopy=False)) == 2)  # the other host has begun trial 1
            two.cut_off()
            wait_for(lambda: failures() == {("lost_worker", "retry"): 1})
            (tmp_path / "trial 0 was lost").touch()
            wait_for(settled(0))
            (tmp_path / "trial 0 was finished elsewhere").touch()
            wait_for(lambda: "the storage fails, training goes on" in two.log(tmp_path).read_text())
            two.reconnect()
            assert first.wait(PATIENCE) == second.wait(PATIENCE) == 0

    trials = study.optuna.get_trials(deepcopy=False)
    assert Counter(trial.state.name for trial in trials) == {"COMPLETE": TRIALS}
    assert failures() == {("lost_worker", "retry"): 1, ("lease_lost", "drop"): 1}
    with sql.reading(place.engine) as connection:
        attempts = connection.execute(sa.select(hpo_trials.c.attempt).order_by(hpo_trials.c.trial_id)).scalars()
        assert list(attempts) == [2, *[1] * (TRIALS - 1)]
    values = [{trial.value, *trial.intermediate_values.values()} for trial in trials]
    assert values[:3] == [{1.0}, {1.0}, {1.0}]  # nothing of host 2 is left in trial 0
    assert all(len(found) == 1 for found in values)
    assert {2.0} in values
    assert [list(trial.intermediate_values) for trial in trials] == [list(range(1, EPOCHS + 1))] * TRIALS
    place.close()
