"""Signals as a request."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from hpo.worker.signals import ASKING, StopSignal
from tests.conftest import HANDLERS
from tests.support.signals import Handlers
from tests.support.waiting import PATIENCE, ended, heard

PROGRAM = """
import sys, time
from hpo.worker.signals import StopSignal
stopping = StopSignal.installed()
print("ready", flush=True)
while not stopping():
    time.sleep(0.01)
print("asked", flush=True)
if "stubborn" in sys.argv:
    time.sleep(60)
sys.exit(stopping.exit_code)
"""

BEGIN = """
import ctypes, logging, os, signal, sys, threading, time
from hpo.worker.signals import ASKING, StopSignal

def say(word):
    print(word, flush=True)

def wait_for(condition):
    while not condition():
        time.sleep(0.01)

def say_when_asked():
    wait_for(stopping)
    say("asked")

def be_stuck_in_c():  # a mutex locked twice: no signal makes this call return
    threading.Thread(target=say_when_asked, daemon=True).start()
    mutex, lock = ctypes.create_string_buffer(128), ctypes.CDLL(None).pthread_mutex_lock
    say("ready")
    while True:
        lock(mutex)

def let_an_hour_pass():
    now = time.monotonic()
    time.monotonic = lambda: now + 3600

def outlive(child):  # the child's signal was its own; this process still hears its own ones
    time.sleep(0.3)
    say(f"{child} {stopping()}")
    os.kill(os.getpid(), signal.SIGTERM)
    wait_for(stopping)
    sys.exit(stopping.exit_code)
"""

started: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def no_process_is_left_behind() -> Iterator[None]:
    yield
    while started:
        with started.pop() as process:
            process.kill()  # after a failure: what is stuck in C would stay for good


def start(*arguments: str, program: str = PROGRAM) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    started.append(process)
    assert heard(process) == "ready"
    return process


def outcome(process: subprocess.Popen[str]) -> tuple[int, list[str], str]:
    """Return the exit code, the lines said since, and the errors."""
    output, errors = process.communicate(timeout=PATIENCE)
    return process.returncode, output.splitlines(), errors


def test_a_command_in_this_process_leaves_nothing_to_later_tests() -> None:
    """Its thread ends a process at the second signal. So the signals of later tests ended the process of the tests."""
    before = Handlers.now()
    assert before == HANDLERS
    heard_of = StopSignal.installed()
    HANDLERS.restore()
    assert Handlers.now() == before
    signal.signal(signal.SIGUSR2, lambda *_: None)
    signal.raise_signal(signal.SIGUSR2)
    signal.raise_signal(signal.SIGUSR2)
    assert not heard_of()


@pytest.mark.parametrize("number", ASKING)
def test_the_first_signal_asks_and_the_exit_code_names_it(number: signal.Signals) -> None:
    process = start()
    process.send_signal(number)
    assert ended(process) == 128 + number


def test_the_second_signal_ends_a_process_that_does_not_look_up() -> None:
    process = start("stubborn")
    process.send_signal(signal.SIGINT)
    assert heard(process) == "asked"
    process.send_signal(signal.SIGTERM)
    assert ended(process) == 128 + signal.SIGTERM


@pytest.mark.parametrize("number", ASKING)
def test_a_stuck_process_is_ended_after_its_grace(number: signal.Signals) -> None:
    """A process stuck in c notices a signal and is ended after its grace."""
    program = """
stopping = StopSignal.installed(grace=600)
stopping.end_within(1, lambda: say("last act"))
be_stuck_in_c()
"""
    process = start(program=BEGIN + program)
    process.send_signal(number)
    code, lines, errors = outcome(process)
    assert (code, lines) == (128 + number, ["asked", "last act"])
    assert errors.count("did not exit within 1 s") == 1


def test_the_second_signal_ends_a_process_stuck_in_c_within_its_grace() -> None:
    program = """
stopping = StopSignal.installed(grace=600)
be_stuck_in_c()
"""
    process = start(program=BEGIN + program)
    process.send_signal(signal.SIGTERM)
    assert heard(process) == "asked"
    process.send_signal(signal.SIGUSR1)
    assert outcome(process) == (128 + signal.SIGUSR1, [], "")


def test_without_a_grace_a_stuck_process_stays() -> None:
    """Without a grace a process stuck in c stays until the second signal."""
    process = start(program=BEGIN + "stopping = StopSignal.installed(); be_stuck_in_c()")
    process.send_signal(signal.SIGTERM)
    assert heard(process) == "asked"
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=2)
    process.send_signal(signal.SIGTERM)
    assert ended(process) == 128 + signal.SIGTERM


def test_one_signal_sent_twice_in_a_row_is_one_request() -> None:
    program = """
stopping = StopSignal.installed()
now = time.monotonic()
time.monotonic = lambda: now
say("ready")
for _ in range(2):
    os.kill(os.getpid(), signal.SIGTERM)
wait_for(stopping)
time.sleep(0.3)
sys.exit(7)
"""
    assert ended(start(program=BEGIN + program)) == 7


def test_a_request_from_a_thread_starts_the_grace() -> None:
    program = """
stopping = StopSignal.installed(grace=1)
threading.Timer(0.2, stopping.request).start()
be_stuck_in_c()
"""
    code, lines, _ = outcome(start(program=BEGIN + program))
    assert (code, lines) == (128 + signal.SIGTERM, ["asked"])


@pytest.mark.parametrize("change", ["stopping.end_within(3600)", "stopping.grace = 3600"])
def test_a_grace_that_is_set_after_the_signal_counts_from_the_signal(change: str) -> None:
    program = f"""
stopping = StopSignal.installed()
say("ready")
wait_for(stopping)
let_an_hour_pass()
{change}
time.sleep(600)
"""
    process = start(program=BEGIN + program)
    process.send_signal(signal.SIGINT)
    assert ended(process) == 128 + signal.SIGINT


@pytest.mark.parametrize("act", ["lambda: time.sleep(600)", "lambda: sys.exit('no')", "lambda: 1 / 0"])
def test_a_last_act_that_hangs_or_fails_does_not_hold_up_the_end(act: str) -> None:
    program = f"""
stopping = StopSignal.installed()
stopping.end_within(0.1, {act})
be_stuck_in_c()
"""
    process = start(program=BEGIN + program)
    process.send_signal(signal.SIGTERM)
    code, _, errors = outcome(process)
    assert code == 128 + signal.SIGTERM
    assert "Traceback" not in errors


def test_a_log_that_hangs_holds_up_neither_the_last_act_nor_the_end() -> None:
    program = """
stopping = StopSignal.installed()
stopping.end_within(1, lambda: say("last act"))
logging.basicConfig()
logging.getLogger().handlers[0].acquire()
be_stuck_in_c()
"""
    process = start(program=BEGIN + program)
    process.send_signal(signal.SIGTERM)
    code, lines, _ = outcome(process)
    assert (code, lines) == (128 + signal.SIGTERM, ["asked", "last act"])


def test_a_process_that_leaves_within_its_grace_has_its_own_exit_code() -> None:
    program = """
stopping = StopSignal.installed()
stopping.end_within(600, lambda: say("last act"))
say("ready")
wait_for(stopping)
sys.exit(7)
"""
    process = start(program=BEGIN + program)
    process.send_signal(signal.SIGTERM)
    assert outcome(process) == (7, [], "")


def test_a_signal_does_not_cut_short_what_the_main_thread_waits_for() -> None:
    program = """
stopping = StopSignal.installed()
began = time.monotonic()
say("ready")
time.sleep(1)
sys.exit(7 if stopping() and time.monotonic() - began >= 1 else 1)
"""
    process = start(program=BEGIN + program)
    process.send_signal(signal.SIGTERM)
    assert ended(process) == 7


def test_other_signals_with_handlers_ask_for_nothing() -> None:
    program = """
handled = []
stopping = StopSignal.installed()
signal.signal(signal.SIGWINCH, lambda number, frame: handled.append(number))
signal.signal(signal.SIGCHLD, lambda number, frame: handled.append(number))
say("ready")
for number in (signal.SIGWINCH, signal.SIGCHLD) * 2:
    os.kill(os.getpid(), number)
wait_for(lambda: len(handled) == 4)
time.sleep(0.3)
sys.exit(1 if stopping() else 7)
"""
    assert ended(start(program=BEGIN + program)) == 7


@pytest.mark.parametrize("end", ["close", "stop"])
def test_a_signal_is_noticed_in_and_after_an_event_loop(end: str) -> None:
    """A signal is noticed in and after an event loop that took the wakeup descriptor."""
    program = f"""
import asyncio
stopping = StopSignal.installed()
loop = asyncio.new_event_loop()
loop.add_signal_handler(signal.SIGWINCH, loop.stop)
loop.call_soon(os.kill, os.getpid(), signal.SIGWINCH)
loop.run_forever()
loop.{end}()
say("ready")
wait_for(stopping)
say("asked")
time.sleep(600)
"""
    process = start(program=BEGIN + program)
    process.send_signal(signal.SIGTERM)
    assert heard(process) == "asked"
    process.send_signal(signal.SIGINT)
    assert ended(process) == 128 + signal.SIGINT


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_forked_child_dies_of_its_signal_and_its_parent_is_not_asked(number: signal.Signals) -> None:
    program = f"""
stopping = StopSignal.installed(grace=600)
say("ready")
for _ in range(50):
    child = os.fork()
    if not child:
        time.sleep(600)
        os._exit(1)
    os.kill(child, {number})  # even while it is still being born
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status), status
outlive(os.WTERMSIG(status))
"""
    process = start(program=BEGIN + program)
    assert outcome(process) == (128 + signal.SIGTERM, [f"{number} False"], "")


def test_a_child_forked_in_a_thread_dies_of_its_signal() -> None:
    """A child forked in a thread by multiprocessing dies of its signal as well."""
    program = """
import multiprocessing
stopping = StopSignal.installed()
say("ready")
def fork():
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    child.start()
    child.terminate()
    child.join()
    codes.append(child.exitcode)
codes = []
thread = threading.Thread(target=fork)
thread.start()
thread.join()
outlive(codes[0])
"""
    process = start(program=BEGIN + program)
    assert outcome(process) == (128 + signal.SIGTERM, ["-15 False"], "")


def test_a_forked_child_has_the_default_handlers() -> None:
    """In a forked child the defaults are back but for user code's and a request stays there."""
    program = """
stopping = StopSignal.installed()
say("ready")
mask = {signal.SIGWINCH}
signal.pthread_sigmask(signal.SIG_SETMASK, mask)
signal.signal(signal.SIGUSR1, own := lambda number, frame: None)
child = os.fork()
if not child:
    stopping.request()
    handlers = [signal.getsignal(number) for number in ASKING]
    assert handlers == [signal.default_int_handler, signal.SIG_DFL, own, signal.SIG_DFL], handlers
    assert signal.set_wakeup_fd(-1) == -1
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask
    os._exit(7 if stopping() and not os.waitstatus_to_exitcode(os.system("true")) else 1)
assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask
outlive(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    process = start(program=BEGIN + program)
    assert outcome(process) == (128 + signal.SIGTERM, ["7 False"], "")


def test_a_request_from_inside_counts_as_sigterm() -> None:
    """A request from inside counts as sigterm unless a signal came first."""
    stopping = StopSignal()
    assert (stopping(), stopping.exit_code) == (False, 0)
    stopping.request()
    assert (stopping(), stopping.exit_code) == (True, 143)
    stopping.received = signal.SIGINT
    stopping.request()
    assert stopping.exit_code == 130


def test_one_that_is_not_installed_only_keeps_what_it_is_told() -> None:
    stopping = StopSignal()
    stopping.end_within(0.0, lambda: pytest.fail("nothing watches it"))
    stopping.request()
    assert (stopping(), stopping.grace) == (True, 0.0)


WORKER = """
import sys, time
from hpo.worker.signals import StopSignal

stopping = StopSignal.installed(grace=600, is_supervised=True)
print("ready", flush=True)
while not stopping():
    time.sleep(0.01)
print("asked", flush=True)
sys.stdin.readline()
sys.exit(stopping.exit_code)
"""


@pytest.fixture
def of_a_fleet() -> Iterator[subprocess.Popen[str]]:
    """A process that is asked to stop by a parent, and takes its time."""
    command = [sys.executable, "-c", WORKER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_second_signal_does_not_end_a_worker_of_a_fleet(
    second: signal.Signals, of_a_fleet: subprocess.Popen[str]
) -> None:
    """A second signal does not end a process whose parent passes signals on."""
    assert of_a_fleet.stdout is not None
    of_a_fleet.send_signal(signal.SIGTERM)
    assert of_a_fleet.stdout.readline() == "asked\n"
    for _ in range(3):
        time.sleep(0.2)  # too far apart to be one request
        of_a_fleet.send_signal(second)
    time.sleep(0.3)
    assert of_a_fleet.poll() is None
    of_a_fleet.communicate("that is all\n", timeout=PATIENCE)
    assert of_a_fleet.returncode == 143  # by the first
