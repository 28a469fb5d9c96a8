"""A signal on any rank becomes a stop that all ranks agree on at the next step."""

from __future__ import annotations

import signal
from types import FrameType

STOPPED_BY_SIGNAL = 75  # EX_TEMPFAIL: the job is not done; start it again and it goes on

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignal:
    """Remembers that SIGTERM or SIGUSR1 came; the loop asks at each step."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous = {number: signal.signal(number, self._remember) for number in _SIGNALS}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name

    def restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
