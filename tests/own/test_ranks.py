"""The ranks of one trial as processes: their environment, their output, and how they end."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest

from hpo.errors import Unasked
from hpo.own.rank_channel import file_of, take_up
from hpo.own.ranks import ADDRESS, Port, Ranks
from tests.support.waiting import PATIENCE, wait_for


def ranks(tmp_path: Path, script: str, kept: list[bytes], *, count: int = 2, timeout: float = PATIENCE) -> Ranks:
    return Ranks(
        ["sh", "-c", script],
        count,
        folder=tmp_path,
        environment={"PATH": os.environ["PATH"], "HPO_REPORTS": str(tmp_path / "reports")},
        keep=kept.append,
        timeout=timeout,
        reports=tmp_path / "reports",
    )


def output(running: Ranks) -> str:
    """Return what rank 0 prints until all ranks have ended."""
    found = b""
    while running.running or running.is_open:
        found += running.read(0.1)
    return found.decode()


def test_ranks_have_the_environment_of_torchrun(tmp_path: Path) -> None:
    kept: list[bytes] = []
    script = "echo $RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT $HPO_REPORTS"
    with ranks(tmp_path, script, kept) as running:
        *own, port, reports = output(running).split()
        assert running.exit_code == 0
    assert (own, reports) == (["0", "0", "2", "2", "127.0.0.1"], str(tmp_path / "reports"))
    assert b"".join(kept).decode() == f"[rank 1] 1 1 2 2 127.0.0.1 {port} /dev/null\n"


def test_lines_of_ranks_do_not_mix(tmp_path: Path) -> None:
    """A line of rank 0 is not cut by one of rank 1, and a last line without an end is kept too."""
    kept: list[bytes] = []
    first = 'printf "half "; while [ ! -e go ]; do sleep 0.02; done; echo line'
    script = f"if [ $RANK = 0 ]; then {first}; else echo one; printf two; touch go; fi"
    said = b""
    with ranks(tmp_path, script, kept) as running:
        while running.running or running.is_open:
            said += running.read(0.1)
            assert said.endswith(b"\n") or not kept
    assert said == b"half line\n"
    assert b"".join(kept) == b"[rank 1] one\n[rank 1] two\n"


@pytest.mark.parametrize(
    ("script", "name", "code"),
    [
        ("[ $RANK = 1 ] || exec sleep 600; echo no; exit 3", "rank 1", 3),
        ("[ $RANK = 2 ] && kill -9 $$; sleep 0.2; exit 1", "rank 2", -9),  # the others fail since it is gone
    ],
)
def test_one_rank_that_fails_ends_all(tmp_path: Path, script: str, name: str, code: int) -> None:
    with ranks(tmp_path, script, [], count=3) as running:
        while running.exit_code is None:
            running.read(0.1)
        running.read(0.1)  # what it printed last
        assert (running.exit_code, running.name) == (code, name)
        assert running.last_lines == (["no"] if code == 3 else [])
    assert running.running == []


def test_silent_ranks_are_ended_and_a_stopped_one_is_named(tmp_path: Path) -> None:
    script = "[ $RANK = 1 ] && kill -STOP $$; exec sleep 600"
    with ranks(tmp_path, script, [], timeout=0.1) as running:
        wait_for(lambda: running._programs[1].status == "is stopped")
        with pytest.raises(Unasked) as caught:
            output(running)
    said = str(caught.value)
    assert said.startswith("no rank has printed or reported anything for 0.1 s (recovery.rank_timeout): rank 0 is ")
    assert said.endswith(", rank 1 is stopped")


def test_a_report_is_a_sign_of_life(tmp_path: Path) -> None:
    with ranks(tmp_path, "exec sleep 600", [], timeout=0.05) as running:
        for _ in range(3):
            time.sleep(0.06)
            with (tmp_path / "reports").open("a") as file:
                file.write("x\n")
            assert running.read(0) == b""
        time.sleep(0.06)
        with pytest.raises(Unasked):
            running.read(0)


def test_a_port_is_kept_for_rank_0() -> None:
    """Another process cannot get it by chance. Rank 0 can, since its store reuses addresses."""
    one, two = Port(), Port()
    assert one.number != two.number
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind((ADDRESS, one.number))
    with socket.socket() as store:
        store.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        store.bind((ADDRESS, one.number))
        store.listen()
        with socket.create_connection((ADDRESS, one.number)):
            pass
    one.close()
    two.close()


def test_ranks_go_on_after_an_epoch_that_all_have_saved(tmp_path: Path) -> None:
    """What one rank has saved later is deleted: the next attempt must not go on with files of two attempts."""
    assert take_up(tmp_path / "missing", 2) == 0
    for epoch, rank, count in [(2, 0, 2), (2, 1, 2), (4, 0, 2), (4, 1, 2), (6, 0, 2), (8, 0, 1)]:
        file_of(tmp_path, epoch, rank, count).touch()
    (tmp_path / "other.pt").touch()
    assert take_up(tmp_path, 2) == 4
    assert take_up(tmp_path, 1) == 8
    left = {file.name for file in tmp_path.iterdir()}
    kept = {file_of(tmp_path, epoch, rank, 2).name for epoch in (2, 4) for rank in (0, 1)}
    assert left == {*kept, "other.pt", "epoch-8-rank-0-of-1.pt"}
