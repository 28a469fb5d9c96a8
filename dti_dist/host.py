"""The cores and the memory that a process may use: a scheduler or a container limits both."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")
_UNLIMITED = 2**60  # version 1 writes the largest page-aligned number


def cores(cgroups: Path = _CGROUPS, membership: Path = _MEMBERSHIP) -> int:
    """Cores that this process may keep busy: those it may run on, or its cgroups' least quota."""
    quotas = [max(int(quota), 1) for quota in _quotas(cgroups, membership)]
    return min([len(os.sched_getaffinity(0)), *quotas])


def rank_threads(ranks: int) -> int:
    """Threads of each of so many ranks that share this process's cores."""
    return max(cores() // ranks, 1)


def place() -> tuple[str, list[int]]:
    """The machine and its cores that this process may run on."""
    return socket.gethostname(), sorted(os.sched_getaffinity(0))


def memory_bytes(cgroups: Path = _CGROUPS, membership: Path = _MEMBERSHIP) -> int:
    """The machine's memory, or the least limit of the process's cgroups.

    Args:
        cgroups: where they are mounted; membership: which this process is in.
    """
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *(limit for limit, _ in _limits(cgroups, membership))])


def free_memory_bytes(
    cgroups: Path = _CGROUPS,
    membership: Path = _MEMBERSHIP,
    meminfo: Path = Path("/proc/meminfo"),
) -> int:
    """What may still be taken of `memory_bytes`; the page cache, which gives way, is free."""
    (machine,) = (
        int(line.split()[1]) * 1024
        for line in meminfo.read_text().splitlines()
        if line.startswith("MemAvailable:")
    )
    return min([machine, *(limit - used for limit, used in _limits(cgroups, membership))])


def _groups(controller: str, cgroups: Path, membership: Path) -> Iterator[tuple[Path, bool]]:
    """The process's cgroup, those around it, and whether they are of version 2."""
    with suppress(OSError):
        for line in membership.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                root = cgroups
            elif controller in controllers.split(","):
                root = cgroups / controller
            else:
                continue
            # In a container the path is the host's, and its root is mounted in the place.
            folder = root / path.lstrip("/")
            for place in [folder, *folder.parents]:
                yield place, root == cgroups
                if place == root:
                    break


def _quotas(cgroups: Path, membership: Path) -> Iterator[float]:
    """Seconds on cores in each second."""
    for group, second in _groups("cpu", cgroups, membership):
        with suppress(OSError, ValueError):  # no quota is "max", -1, or no file
            if second:
                quota, period = (group / "cpu.max").read_text().split()
            else:
                quota, period = (
                    (group / f"cpu.cfs_{what}_us").read_text() for what in ("quota", "period")
                )
            if int(quota) > 0:
                yield int(quota) / int(period)


def _limits(cgroups: Path, membership: Path) -> Iterator[tuple[int, int]]:
    """Each limit of memory with what is used of it."""
    for group, second in _groups("memory", cgroups, membership):
        if second:
            name, usage, cache = "memory.max", "memory.current", "inactive_file"
        else:
            name, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        with suppress(OSError, ValueError):  # no limit is "max", or no file
            limit = int((group / name).read_text())
            if limit < _UNLIMITED:
                yield limit, _used(group, usage, cache)


def _used(place: Path, usage: str, cache: str) -> int:
    with suppress(OSError, ValueError):
        used = int((place / usage).read_text())
        counts = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
        return used - int(counts.get(cache, 0))
    return 0
