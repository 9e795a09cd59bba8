"""Signals as a request."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from hpo.signals import ASKING, StopSignal

PROGRAM = """
import sys, time
from hpo.signals import StopSignal
stopping = StopSignal.installed()
print("ready", flush=True)
while not stopping():
    time.sleep(0.01)
print("asked", flush=True)
if "stubborn" in sys.argv:
    time.sleep(60)
sys.exit(stopping.exit_code)
"""


def start(*arguments: str) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def ended(process: subprocess.Popen[str]) -> int:
    process.communicate(timeout=20)
    return process.returncode


@pytest.mark.parametrize("number", ASKING)
def test_the_first_signal_asks_and_the_exit_code_names_it(number: signal.Signals) -> None:
    process = start()
    process.send_signal(number)
    assert ended(process) == 128 + number


def test_the_second_signal_ends_a_process_that_does_not_look_up() -> None:
    process = start("stubborn")
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    assert process.stdout.readline() == "asked\n"
    process.send_signal(signal.SIGTERM)
    assert ended(process) == 128 + signal.SIGTERM


def test_a_request_from_inside_counts_as_sigterm_unless_a_signal_came_first() -> None:
    stopping = StopSignal()
    assert (stopping(), stopping.exit_code) == (False, 0)
    stopping.request()
    assert (stopping(), stopping.exit_code) == (True, 143)
    stopping.received = signal.SIGINT
    stopping.request()
    assert stopping.exit_code == 130
