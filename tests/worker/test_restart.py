"""When a worker's process starts afresh, and that nothing of the old one but its number and its command is left."""

from __future__ import annotations

import json
import mmap
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from hpo.spec.failures import SPOILING, Kind
from hpo.spec.recovery import Recovery
from hpo.worker import restart
from hpo.worker.restart import MIB, RestartPolicy
from hpo.worker.signals import ASKING
from tests.support.waiting import PATIENCE, ended, heard

# --- when to restart --------------------------------------------------------------------------------------------------


def of_size(mib: int) -> mmap.mmap:
    """Return this much new memory; an allocator may reuse memory that the process already has."""
    memory = mmap.mmap(-1, mib * MIB)
    for _ in range(mib):
        memory.write(b"x" * MIB)
    return memory


@pytest.mark.parametrize("kind", [*Kind, None])
def test_only_what_spoils_a_process_ends_it_after_one_trial(kind: Kind | None) -> None:
    reason = RestartPolicy(Recovery()).reason(kind)
    assert reason == (f"after {kind}" if kind in SPOILING else None)
    assert {Kind.OUT_OF_MEMORY, Kind.CUDA_ERROR} == SPOILING


def test_a_process_that_was_spoiled_later_on_starts_afresh_as_well() -> None:
    policy = RestartPolicy(Recovery())
    assert [policy.reason(kind) for kind in (None, Kind.EXCEPTION, Kind.CUDA_ERROR)] == [None, None, "after cuda_error"]


def test_a_process_starts_afresh_after_so_many_trials() -> None:
    """A process starts afresh after so many trials failed ones among them."""
    policy = RestartPolicy(Recovery(recycle_trials=3))
    assert [policy.reason(kind) for kind in (None, Kind.EXCEPTION, None)] == [None, None, "after 3 trials"]


def test_a_study_may_ask_for_a_process_for_every_trial() -> None:
    assert RestartPolicy(Recovery(recycle_trials=1)).reason(None) == "after 1 trials"


def test_a_process_that_grew_after_its_first_trial_starts_afresh() -> None:
    policy = RestartPolicy(Recovery(recycle_growth_mb=64))
    needed = [of_size(128)]  # by the first trial, and by every one
    assert policy.reason(None) is None
    assert policy.reason(None) is None
    needed.append(of_size(128))
    reason = policy.reason(None)
    assert reason is not None
    assert reason.startswith("after growing by ")
    assert 100 <= int(reason.split()[3]) <= 256
    needed.pop()
    assert policy.reason(None) is None  # and one that gave it back does not


def test_growing_by_less_is_none() -> None:
    policy = RestartPolicy(Recovery(recycle_growth_mb=512))
    assert policy.reason(None) is None
    grown = of_size(64)
    assert policy.reason(None) is None
    assert len(grown) == 64 * MIB


def test_the_size_of_this_process_is_that_of_what_it_holds() -> None:
    before = restart.resident()
    held = of_size(64)
    assert restart.resident() - before > 48 * MIB
    assert len(held) == 64 * MIB


@pytest.mark.parametrize(
    ("command", "again"),
    [
        (["-m", "hpo", "worker", "digits"], ["-m", "hpo", "worker", "--as", "me", "digits"]),
        (["-m", "hpo", "worker", "--", "-odd"], ["-m", "hpo", "worker", "--as", "me", "--", "-odd"]),
        (["-m", "hpo", "worker", "digits", "--as", "you"], ["-m", "hpo", "worker", "digits", "--as", "you"]),
        (["program.py"], ["program.py"]),
    ],
)
def test_a_worker_that_starts_afresh_keeps_its_name(command: list[str], again: list[str]) -> None:
    assert restart.named(command, "me") == again
    assert restart.named(command, None) == command


# --- processes --------------------------------------------------------------------------------------------------------

BEGIN = """
import atexit, contextlib, json, os, psutil, signal, subprocess, sys, threading, time
from pathlib import Path
from hpo.worker import restart
from hpo.worker.restart import leave, start_afresh
from hpo.worker.signals import ASKING, StopSignal

HERE = Path(__file__).parent
stopping = StopSignal.installed()

def say(word):
    print(word, flush=True)

def lives():
    file = HERE / "lives.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

def live(**facts):
    with (HERE / "lives.jsonl").open("a") as file:
        print(json.dumps({"pid": os.getpid(), **facts}), file=file)

def wait_for(condition, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()
"""


class Program:
    """A program that may start itself afresh, and what it left in its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.running: list[subprocess.Popen[str]] = []

    def start(self, text: str, *arguments: str) -> subprocess.Popen[str]:
        script = self.folder / "program.py"
        script.write_text(BEGIN + text)
        process = subprocess.Popen(
            [sys.executable, str(script), *arguments],
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.running.append(process)
        return process

    def run(self, text: str, *arguments: str, code: int = 0) -> str:
        """Run a program to its end and return what it said."""
        said, errors = (process := self.start(text, *arguments)).communicate(timeout=PATIENCE)
        assert process.returncode == code, said + errors
        return said

    @property
    def lives(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "lives.jsonl").read_text().splitlines()]


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Program]:
    made = Program(tmp_path)
    yield made
    for process in made.running:
        with process:
            process.kill()


def is_dead(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def test_what_a_fresh_process_has_of_the_old_one(program: Program) -> None:
    """A fresh process has the number the command and the folder of the old one."""
    text = """
live(folder=os.getcwd(), command=sys.orig_argv[1:], parent=os.getppid(), variable=os.environ.get("MINE"))
os.chdir("/")
os.environ["MINE"] = "kept"
if len(lives()) < 3:
    start_afresh(stopping)
sys.exit(7)
"""
    process = program.start(text, "--an argument", "")
    assert ended(process) == 7
    command = [str(program.folder / "program.py"), "--an argument", ""]
    fresh = {"pid": process.pid, "folder": str(program.folder), "command": command, "parent": psutil.Process().pid}
    assert program.lives == [{**fresh, "variable": None}, *[{**fresh, "variable": "kept"}] * 2]


def test_memory_and_open_files_do_not_outlive_a_process(program: Program) -> None:
    text = """
def is_open(descriptor):
    with contextlib.suppress(OSError):
        return bool(os.fstat(descriptor))
    return False

live(size=restart.resident() // restart.MIB, open=[number for number in (0, 1, 2, 77, 1000) if is_open(number)])
if len(lives()) < 2:
    held = bytearray(b"x") * (256 * restart.MIB)
    file = open(HERE / "held", "w")
    for number in (77, 1000):
        os.dup2(file.fileno(), number, inheritable=True)
    start_afresh(stopping)
"""
    program.run(text)
    first, second = program.lives
    assert second["open"] == first["open"] == [0, 1, 2]
    assert second["size"] < first["size"] + 100


def test_child_processes_do_not_outlive_a_process(program: Program) -> None:
    text = """
if not lives():
    child = subprocess.Popen(["sh", "-c", "sleep 600 & echo $!; wait"], stdout=subprocess.PIPE, text=True)
    deaf = subprocess.Popen(["sh", "-c", "trap '' TERM; echo; exec sleep 600"], stdout=subprocess.PIPE, text=True)
    deaf.stdout.readline()
    live(children=[child.pid, int(child.stdout.readline()), deaf.pid])
    start_afresh(stopping)
live()
"""
    program.run(text)
    first, second = program.lives
    assert first["pid"] == second["pid"]
    assert all(is_dead(child) for child in first["children"])


def test_a_fresh_process_has_no_dead_children(program: Program) -> None:
    text = """
live(children=[child.pid for child in psutil.Process().children()])
if len(lives()) < 3:
    subprocess.Popen(["sleep", "600"])
    start_afresh(stopping)
"""
    program.run(text)
    assert [life["children"] for life in program.lives] == [[], [], []]


def test_user_code_s_exit_handlers_run_before_a_fresh_start(program: Program) -> None:
    """What user code wants done at its end is done before a process is replaced."""
    text = """
def at_exit():
    sys.stdout.write("at exit, ")

atexit.register(at_exit)
live()
sys.stdout.write(f"life {len(lives())}, ")
if len(lives()) < 3:
    start_afresh(stopping)
"""
    assert program.run(text) == "life 1, at exit, life 2, at exit, life 3, at exit, "


def test_a_process_is_replaced_without_a_word(program: Program) -> None:
    process = program.start("live()\nif len(lives()) < 6:\n    start_afresh(stopping)")
    assert process.communicate(timeout=PATIENCE) == ("", "")
    assert len(program.lives) == 6


def test_a_process_that_hangs_is_replaced_from_a_thread(program: Program) -> None:
    """A process whose main thread hangs is replaced from another one without ado."""
    text = """
if not lives():
    live()
    atexit.register(lambda: say("at exit"))
    threading.Thread(target=start_afresh, args=(stopping,), kwargs={"at_once": True}).start()
    time.sleep(600)
live()
say("fresh")
wait_for(stopping)
leave(stopping.exit_code)
"""
    process = program.start(text)
    assert heard(process) == "fresh"
    process.terminate()
    assert ended(process) == 143
    assert program.lives == [{"pid": process.pid}] * 2


@pytest.mark.parametrize("spoil", ['restart.FOLDER = "/no/such/folder"', 'sys.executable = "/no/such/python"'])
def test_a_process_that_cannot_be_replaced_ends(spoil: str, program: Program) -> None:
    program.run(f"{spoil}\nlive()\nstart_afresh(stopping)", code=1)
    assert len(program.lives) == 1


# --- and signals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", ASKING)
def test_a_process_asked_to_stop_is_not_replaced(number: signal.Signals, program: Program) -> None:
    """A process that is asked to stop while it winds up is not replaced."""
    text = """
@atexit.register
def wind_up():
    say("winding up")
    wait_for(stopping)

live()
start_afresh(stopping)
say(f"not replaced, holds back: {set(ASKING) & signal.pthread_sigmask(signal.SIG_BLOCK, [])}")
sys.exit(stopping.exit_code)
"""
    process = program.start(text)
    assert heard(process) == "winding up"
    process.send_signal(number)
    assert heard(process) == "not replaced, holds back: set()"
    assert ended(process) == 128 + number
    assert len(program.lives) == 1


def test_a_process_that_was_asked_to_stop_before_is_not_replaced(program: Program) -> None:
    program.run("live()\nstopping.request()\nstart_afresh(stopping)\nsys.exit(stopping.exit_code)", code=143)
    assert len(program.lives) == 1


@pytest.mark.parametrize("number", ASKING)
def test_a_fresh_process_hears_signals(number: signal.Signals, program: Program) -> None:
    text = """
live()
if len(lives()) < 3:
    start_afresh(stopping)
say(f"ready, holds back: {set(ASKING) & signal.pthread_sigmask(signal.SIG_BLOCK, [])}")
wait_for(stopping)
sys.exit(stopping.exit_code)
"""
    process = program.start(text)
    assert heard(process) == "ready, holds back: set()"
    process.send_signal(number)
    assert ended(process) == 128 + number


def test_a_signal_at_the_last_instant_reaches_the_fresh_process(program: Program) -> None:
    text = """
live()
if len(lives()) < 2:
    def chdir(folder):  # the first step after the last look
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)

    os.chdir = chdir
    start_afresh(stopping)
wait_for(stopping)
sys.exit(stopping.exit_code)
"""
    process = program.start(text)
    assert ended(process) in (143, -signal.SIGTERM)  # told, or ended on the spot: but asked to stop it does not go on


# --- leaving ----------------------------------------------------------------------------------------------------------


def test_leaving_does_what_is_to_be_done(program: Program) -> None:
    """Leaving does what is to be done at the end and writes what was said."""
    text = """
def at_exit(word):
    sys.stdout.write(f"{word} ")

for word in ("second", "first"):
    atexit.register(at_exit, word)
sys.stdout.write("said ")
leave(7)
say("never")
"""
    assert program.run(text, code=7) == "said first second "


def test_a_handler_that_fails_at_the_end_keeps_nobody(program: Program) -> None:
    text = """
def fail(error):
    raise error

atexit.register(say, "the last")
for error in (ValueError("boom"), SystemExit(3)):
    atexit.register(fail, error)
leave(7)
"""
    assert "the last" in program.run(text, code=7).splitlines()


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param('sys.stdout = open("/dev/full", "w"); sys.stdout.write("lost")', id="a full disk"),
        pytest.param("sys.stdout.close()", id="closed by user code"),
    ],
)
def test_what_cannot_be_written_at_the_end_keeps_nobody(spoil: str, program: Program) -> None:
    program.run(f"{spoil}\nleave(7)", code=7)


def test_a_thread_of_user_code_that_comes_to_an_end_is_waited_for(program: Program) -> None:
    text = """
def finish():
    time.sleep(0.3)
    say("finished")

threading.Thread(target=finish).start()
atexit.register(say, "at exit")
leave(0)
"""
    assert program.run(text) == "finished\nat exit\n"


THREADS = """
restart.THREADS_SECONDS = 0.3
for _ in range(3):
    threading.Thread(target=time.sleep, args=(600,)).start()
live()
"""


def test_threads_of_user_code_that_never_end_do_not_hold_up_the_end(program: Program) -> None:
    assert program.run(THREADS + 'atexit.register(say, "at exit")\nleave(7)', code=7) == "at exit\n"


def test_endless_threads_do_not_hold_up_a_fresh_start(program: Program) -> None:
    """Threads of user code that never end do not hold up a fresh start."""
    program.run(THREADS + "if len(lives()) < 2:\n    start_afresh(stopping)\nleave(7)", code=7)
    assert len(program.lives) == 2


def test_an_idle_pool_of_threads_does_not_hold_up_the_end(program: Program) -> None:
    text = """
from concurrent.futures import ThreadPoolExecutor

restart.THREADS_SECONDS = 600.0
pool = ThreadPoolExecutor(1)
assert pool.submit(int).result() == 0
leave(7)
"""
    program.run(text, code=7)  # within PATIENCE: Python itself sends such a pool home at its end


@pytest.mark.parametrize("end", ["leave(7)", "start_afresh(stopping)"])
def test_a_child_process_that_never_ends_does_not_hold_up_the_end(end: str, program: Program) -> None:
    text = f"""
import multiprocessing

if lives():
    leave(7)
restart.THREADS_SECONDS = 0.3
child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
child.start()
live(child=child.pid)
{end}
"""
    process = program.start(text)
    try:
        assert process.wait(timeout=PATIENCE) == 7
    finally:
        child = program.lives[0]["child"]
        if not is_dead(child):
            psutil.Process(child).kill()
