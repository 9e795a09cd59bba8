"""A program as a child process: how it starts, what is read of it, and that nothing of it stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hpo.errors import ProgramError
from hpo.own.process import LONGEST_LINE, Lines, Program
from hpo.worker import descendants
from tests.support.waiting import PATIENCE, wait_for


def started(folder: Path, script: str) -> Program:
    return Program(["/bin/sh", "-c", script], folder=folder, environment={"PATH": os.defpath, "WORD": "given"})


def printed(running: Program) -> bytes:
    """Read a program's output to its end."""
    found = b""
    while running.is_open or running.exit_code is None:
        found += running.read(PATIENCE)
    return found


def number(running: Program) -> int:
    """Return the number that a program prints next."""
    line = b""
    while not line.endswith(b"\n"):
        line += running.read(PATIENCE)
    return int(line)


def test_a_program_runs_in_its_folder_with_its_environment_and_without_input(tmp_path: Path) -> None:
    with started(tmp_path, "pwd; echo $WORD; cat; echo wrong >&2; exit 3") as running:
        assert printed(running).decode().splitlines() == [str(tmp_path), "given", "wrong"]
        assert running.exit_code == 3


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("exit 0", 0),
        ("kill -SEGV $$", -signal.SIGSEGV),
        ("sh -c 'kill -TERM $$'; exit $?", -signal.SIGTERM),  # as a shell tells it
        ("exit 255", 255),
    ],
)
def test_how_it_ended(tmp_path: Path, script: str, code: int) -> None:
    with started(tmp_path, script) as running:
        printed(running)
        assert running.exit_code == code


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["./none"], "command: './none' cannot be started: No such file or directory"),
        (["./data.txt"], "command: './data.txt' cannot be started: Permission denied"),
        (["echo", "a\0b"], "command: 'echo' cannot be started: embedded null byte"),
    ],
)
def test_what_cannot_be_started_leaves_no_process(tmp_path: Path, words: list[str], why: str) -> None:
    (tmp_path / "data.txt").write_text("no program")
    before = descendants.children()
    with pytest.raises(ProgramError) as raised:
        Program(words, folder=tmp_path, environment={"PATH": os.defpath})
    assert str(raised.value) == why
    assert descendants.children() == before


def test_sigterm_reaches_the_whole_group_and_leaving_kills_what_ignores_it(tmp_path: Path) -> None:
    script = "trap '' TERM; (trap 'echo told' TERM; sleep 100 & echo $!; wait) & wait; wait; exec sleep 100"
    with started(tmp_path, script) as running:
        sleeper = number(running)
        running.terminate()
        assert running.read(PATIENCE) == b"told\n"
        assert running.exit_code is None
    wait_for(lambda: not descendants.is_alive(sleeper))


def test_a_program_in_a_group_of_its_own_is_told_and_killed(tmp_path: Path) -> None:
    """As under `timeout`, which makes itself the leader of one."""
    script = "trap 'echo told' TERM; echo $$; while :; do sleep 0.02; done"
    words = ["timeout", "1000", "/bin/sh", "-c", script]
    with Program(words, folder=tmp_path, environment={"PATH": os.defpath}) as running:
        shell = number(running)
        running.terminate()
        said = b""
        while b"told\n" not in said:  # the shell may first say that its `sleep` was terminated
            said += running.read(PATIENCE)
    assert running.exit_code is not None
    wait_for(lambda: not descendants.is_alive(shell))


def test_a_grandchild_that_holds_the_output_open_is_killed(tmp_path: Path) -> None:
    with started(tmp_path, "sleep 100 & echo $!; exit 0") as running:
        sleeper = number(running)
        wait_for(lambda: running.exit_code == 0)
        assert running.is_open
        assert running.read(0.01) == b""
    wait_for(lambda: not descendants.is_alive(sleeper))


WORKER = """
import os, signal, sys
from pathlib import Path
from hpo.own.process import Program
script = "trap '' TERM HUP; sleep 1000 & echo $! $$; wait"
with Program([*sys.argv[1:], "/bin/sh", "-c", script], folder=Path("/"), environment=dict(os.environ)) as running:
    print(running.read(300).decode(), end="", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("before", [[], ["timeout", "1000"], ["setsid"]], ids=["plain", "timeout", "setsid"])
def test_no_program_outlives_a_worker_that_is_killed(before: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", WORKER, *before], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL
    left = [int(word) for word in done.stdout.split()]
    assert len(left) == 2
    wait_for(lambda: not any(map(descendants.is_alive, left)))


def test_lines_are_cut_at_newlines_and_carriage_returns() -> None:
    lines = Lines()
    assert lines.of(b"epoch 1\r 10%\r") == ["epoch 1", " 10%"]
    assert lines.of(b" 20") == []
    assert lines.of(b"%\r\nepo\n\nch") == [" 20%", "epo"]
    assert lines.of(b"\xff\xe2\x82") == []
    assert lines.rest() == ["ch\ufffd\ufffd"]
    assert lines.rest() == []


def test_a_long_line_is_cut() -> None:
    lines = Lines()
    for _ in range(3):
        assert lines.of(b"x" * LONGEST_LINE) == []
    assert lines.of(b"y\n" + b"z" * 2 * LONGEST_LINE + b"\nend\n") == ["x" * LONGEST_LINE, "z" * LONGEST_LINE, "end"]
