"""No rank waits for one that has failed, and none waits forever.

Ranks meet in collectives, where one that is missing makes the others wait for the process group's
time-out. Here a thread in each rank learns of a failure elsewhere within a second, and of a step
that does not end, and ends its process.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dti_dist.console import say
from dti_dist.ranks import Ranks, own_store

_POLL_S = 1.0
_GRACE_S = 10.0  # for a rank to end by itself, by the error that a lost peer gives it
_STACKS_S = 10.0  # for all ranks to write their stacks: a launcher kills the others once one ends
_KEY = "dti_dist/failure"
_STACKS_KEY = f"{_KEY}/stacks"


@dataclass(frozen=True)
class Failure:
    """Of the first rank that failed.

    Attributes:
        stalled: no step ended in time; all ranks write their stacks.
    """

    rank: int
    reason: str
    stalled: bool = False


class Watchdog:
    """Watches this rank's steps and the other ranks' failures, in a thread.

    Args:
        minutes: without `beat` after which the job is ended; None: never.
        stacks: folder for every thread's stack then, ``rank-0.txt`` and so on.
    """

    def __init__(
        self,
        ranks: Ranks,
        minutes: float | None,
        stacks: Path,
        end: Callable[[int], Any] = os._exit,
    ):
        self._ranks, self._stacks, self._end = ranks, stacks, end
        self._patience = None if minutes is None else minutes * 60
        self._beat: float | None = None
        self._store = own_store() if ranks.world > 1 else None
        self._own: Failure | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
        self._thread.start()

    def beat(self) -> None:
        """Something went forward. The first call starts the watch over steps."""
        self._beat = time.monotonic()

    def fail(self, error: BaseException, stalled: bool = False) -> Failure:
        """Tell the other ranks that this one ends, and end it soon if it does not end by itself.

        Returns:
            the job's first failure: this one, or another rank's that was told before.
        """
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        self._own = Failure(self._ranks.rank, reason, stalled)
        if self._store is not None:
            with suppress(Exception):  # the store is gone with its host: others see that too
                told = self._store.compare_set(_KEY, "", json.dumps(vars(self._own)))
                return Failure(**json.loads(told))
        return self._own

    def failure_elsewhere(self, wait_s: float = 0.0) -> Failure | None:
        """What another rank said of its end, first of all ranks; None if there is none."""
        deadline = time.monotonic() + wait_s
        while True:
            found = self._read()
            if found is not None:
                return found if found.rank != self._ranks.rank else None
            if time.monotonic() >= deadline:
                return None
            time.sleep(0.1)

    def close(self) -> None:
        self._closed.set()

    def _read(self) -> Failure | None:
        if self._store is None:
            return None
        with suppress(Exception):
            if self._store.check([_KEY]):
                return Failure(**json.loads(self._store.get(_KEY)))
        return None

    def _watch(self) -> None:
        while not self._closed.wait(_POLL_S):
            failure = self.failure_elsewhere()
            if failure is not None:
                if failure.stalled:
                    self._write_stacks()
                    self._await_stacks()
                elif self._closed.wait(_GRACE_S):
                    return
                self._end(1)
            if self._own is not None:
                if not self._closed.wait(_GRACE_S):  # its exit waits for a peer
                    self._end(1)
                return
            beat = self._beat
            if self._patience and beat and time.monotonic() - beat > self._patience:
                reason = (
                    f"no step, batch of a validation or save ended for {self._patience / 60:g} "
                    "minutes (training.watchdog_minutes)"
                )
                if self.fail(TimeoutError(reason), stalled=True) == self._own:
                    say(
                        f"rank {self._ranks.rank}: {reason}. The stacks of all threads are in "
                        f"{self._stacks}; a rank that does not wait in a collective is the one "
                        "that the others wait for. Start the same command again to go on from the "
                        "last checkpoint."
                    )
                self._write_stacks()
                self._await_stacks()
                self._end(1)

    def _await_stacks(self) -> None:
        """Until all ranks have written theirs, or one takes too long."""
        if self._store is None:
            return
        deadline = time.monotonic() + _STACKS_S
        with suppress(Exception):  # the store is gone with its host
            written = self._store.add(_STACKS_KEY, 1)
            while written < self._ranks.world and time.monotonic() < deadline:
                time.sleep(0.1)
                written = self._store.add(_STACKS_KEY, 0)

    def _write_stacks(self) -> None:
        with suppress(OSError):
            self._stacks.mkdir(parents=True, exist_ok=True)
            with (self._stacks / f"rank-{self._ranks.rank}.txt").open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
