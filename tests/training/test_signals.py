"""Signals become a stop that the loop sees; what else runs in the job is left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from dti_dist.training.signals import StopSignal

SECONDS = 30


@pytest.fixture
def stop():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    handler = signal.getsignal(signal.SIGUSR1)
    made = StopSignal()
    yield made
    made.restore()
    assert made.received is None
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
    assert signal.getsignal(signal.SIGUSR1) == handler


def wait_for(stop: StopSignal) -> str:
    deadline = time.monotonic() + SECONDS
    while stop.received is None:
        assert time.monotonic() < deadline, "no signal arrived"
    return stop.received


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_is_seen(stop, name):
    os.kill(os.getpid(), getattr(signal, name))
    assert wait_for(stop) == name


def test_a_program_that_a_rank_started_survives_a_signal_to_every_process(stop):
    """Started by the main thread and by another, as a compiler's pool is."""
    children = []

    def start() -> None:
        children.append(
            subprocess.Popen(
                [sys.executable, "-c", "print(input())"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )

    start()
    other = threading.Thread(target=start)
    other.start()
    other.join()
    for child in children:
        child.send_signal(signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert wait_for(stop) == "SIGUSR1"
    assert [child.communicate("alive", timeout=SECONDS)[0] for child in children] == ["alive\n"] * 2
