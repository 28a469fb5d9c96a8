"""A signal on any rank becomes a stop that all ranks agree on at the next step."""

from __future__ import annotations

import signal
import threading
from types import FrameType

STOPPED_BY_SIGNAL = 75  # EX_TEMPFAIL: the job is not done; start it again and it goes on

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

_THREAD = "signals"

_received: list[str] = []


def listen() -> None:
    """Remember SIGTERM and SIGUSR1 from now on, for the StopSignal that is made later.

    A launcher may signal a rank's children too: compilers, trackers, conversions. They inherit
    blocked signals, and not handlers, so SIGUSR1, which nothing else uses, is blocked here and
    taken by a thread.
    """
    for number in _SIGNALS:
        signal.signal(number, _remember)
    if not any(thread.name == _THREAD for thread in threading.enumerate()):
        threading.Thread(target=_take, name=_THREAD, daemon=True).start()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})


def _take() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
    threading.Event().wait()


def _remember(number: int, frame: FrameType | None) -> None:
    _received.append(signal.Signals(number).name)


class StopSignal:
    """Whether SIGTERM or SIGUSR1 came; the loop asks at each step."""

    def __init__(self) -> None:
        self._previous = {number: signal.getsignal(number) for number in _SIGNALS}
        self._blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        listen()

    @property
    def received(self) -> str | None:
        """The first one's name."""
        return _received[0] if _received else None

    def restore(self) -> None:
        """Leave the process as it was found."""
        for number, handler in self._previous.items():
            if handler is not None:  # None: one that was not set from Python
                signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._blocked)
        _received.clear()
