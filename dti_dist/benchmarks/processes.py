"""What a process and all that it started use, as Linux counts it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


def cpu_seconds(pid: int, without: int | None = None) -> float:
    """User and system time, that of ended children included.

    On a busy machine it says what one core does, where wall time says how busy the machine is.

    Args:
        without: a child left out, with all that it started.
    """
    total = 0
    for member in _family(pid, without):
        fields = _read(member, "stat").rpartition(")")[2].split()
        total += sum(map(int, fields[11:15]))  # utime, stime, and those of waited-for children
    return total / _TICKS


def resident_mib(pid: int, without: int | None = None) -> float:
    """Resident memory; pages that several processes share count in each."""
    pages = [_read(member, "statm").split() for member in _family(pid, without)]
    return sum(int(fields[1]) for fields in pages if fields) * _PAGE / 2**20


def _family(pid: int, without: int | None) -> Iterator[int]:
    if pid == without:
        return
    yield pid
    for thread in _threads(pid):
        for child in _read(pid, f"task/{thread}/children").split():
            yield from _family(int(child), without)


def _threads(pid: int) -> list[str]:
    try:
        return os.listdir(f"/proc/{pid}/task")
    except OSError:  # it ended
        return []


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text()
    except OSError:
        return ""
