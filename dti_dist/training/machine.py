"""What a job runs on: devices, memory and versions."""

from __future__ import annotations

import platform
import resource
import socket
import sys
from collections import Counter
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from dti_dist import __version__
from dti_dist.ranks import Ranks


def surroundings(ranks: Ranks) -> dict[str, Any]:
    """What the job runs on and with: no paths, of names only rank 0's machine.

    All ranks must call this at once.
    """
    found = ranks.each(lambda: (socket.gethostname(), device_name(ranks.device)))
    hosts, devices = zip(*found, strict=True)
    versions = {"dti-dist": __version__, "python": platform.python_version()}
    for package in ("torch", "deepspeed", "transformers"):
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "ranks": ranks.world,
        "machines": len(set(hosts)),
        "host": hosts[0],
        "devices": dict(Counter(devices)),
        "versions": versions,
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def memory_gib(device: torch.device) -> float:
    """Peak memory of this rank: allocated on its GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes * (1 if sys.platform == "darwin" else 1024) / 2**30
