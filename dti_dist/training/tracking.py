"""What a run writes down while it trains: metrics.jsonl, and a line or a bar for people."""

from __future__ import annotations

import json
import os
import platform
import resource
import socket
import sys
import time
from collections import Counter
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dti_dist import __version__
from dti_dist.console import say
from dti_dist.ranks import Ranks
from dti_dist.training.trackers import Trackers

_PEAK_BF16_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "B200": 2250e12}
"""Dense bf16 peaks from the vendor's datasheets, by a part of the device's name."""


class MetricsFile:
    """metrics.jsonl: one JSON object a line, appended and flushed; rank 0 writes.

    Attributes:
        before: ``last_step`` that an earlier job has logged, and, where it said so, how it
            ``ended``; empty for the first job.
    """

    def __init__(self, path: Path, resume_step: int, trackers: Trackers):
        """Lines of steps after `resume_step` are dropped: they will be taken again."""
        self.path = path
        self._trackers = trackers
        lines = path.read_text().splitlines() if path.exists() else []
        found = [(line, json.loads(line)) for line in lines if line.endswith("}")]
        self.before: dict[str, Any] = {}
        if found:
            last = found[-1][1]
            self.before["last_step"] = max(record["step"] for _, record in found)
            if "ended" in last:
                self.before["ended"] = last["ended"]
        staging = path.with_name(f".{path.name}.partial")
        kept = [line for line, record in found if record["step"] <= resume_step]
        staging.write_text("".join(f"{line}\n" for line in kept))
        os.replace(staging, path)
        self._file = path.open("a")

    def write(self, record: dict[str, Any]) -> None:
        """Append a line, with the time of day in seconds since 1970."""
        timed = {"step": record["step"], "time": round(time.time(), 3), **record}
        self._file.write(json.dumps(timed) + "\n")
        self._file.flush()
        if "started" not in record:  # its numbers are no figures
            self._trackers.write(timed)

    def close(self) -> None:
        self._file.close()
        self._trackers.close()


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


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 peak where it is known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAK_BF16_FLOPS.items() if part in name), None)


class Interval:
    """Sums since the last logged step."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.steps = 0
        self.loss_sum = 0.0
        self.targets = 0
        self.tokens = 0
        self.data_wait_s = 0.0

    def figures(self) -> dict[str, float]:
        seconds = time.perf_counter() - self.started
        return {
            "loss": self.loss_sum / max(self.targets, 1),
            "targets": self.targets,
            "tokens": self.tokens,
            "targets_per_s": self.targets / seconds,
            "tokens_per_s": self.tokens / seconds,
            "data_wait_s": self.data_wait_s / self.steps,
            "step_s": seconds / self.steps,
        }


class StepDisplay:
    """A bar on a terminal, a line per logged step elsewhere; silent on other ranks."""

    def __init__(self, ranks: Ranks, total_steps: int, first_step: int):
        self.total_steps = total_steps
        self.main = ranks.is_main
        self.bar = (
            tqdm(total=total_steps, initial=first_step, desc="training", unit="step")
            if self.main and sys.stderr.isatty()
            else None
        )

    def step(self) -> None:
        if self.bar is not None:
            self.bar.update()

    def logged(self, record: dict[str, Any]) -> None:
        if not self.main:
            return
        if self.bar is not None:
            self.bar.set_postfix(
                loss=f"{record['loss']:.4f}", targets_s=f"{record['targets_per_s']:,.0f}"
            )
            return
        left = (self.total_steps - record["step"]) * record["step_s"]
        say(
            f"step {record['step']:,}/{self.total_steps:,}  loss {record['loss']:.4f}  "
            f"lr {record['learning_rate']:.2e}  grad {record['grad_norm']:.2f}  "
            f"{record['targets_per_s']:,.0f} targets/s  {record['tokens_per_s']:,.0f} tokens/s  "
            f"wait {record['data_wait_s'] * 1e3:.0f} ms  ETA {_duration(left)}"
        )

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
