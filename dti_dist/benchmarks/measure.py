"""Timing in rounds, and what a figure needs beside it: spread, machine, versions, command."""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

import dti_dist
from dti_dist.config import RunConfig, TrainingConfig, validate_config
from dti_dist.ranks import choose_device

T = TypeVar("T")


def timed(work: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """What one call returns, and its wall time in seconds, the GPU's work included."""
    started = now(device)
    result = work()
    return result, now(device) - started


def now(device: torch.device) -> float:
    """The clock in seconds, when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Energy:
    """Joules that the processor packages or the GPU took since the last call; None where unread.

    Of a CPU by Linux's powercap (RAPL), which often only root may read; of a GPU by NVML.
    """

    def __init__(self, device: torch.device):
        self._read = _gpu_joules(device) if device.type == "cuda" else _package_joules
        self._before = self._read()

    def since_last(self) -> float | None:
        now, before = self._read(), self._before
        self._before = now
        return None if now is None or before is None or now < before else now - before


def _package_joules() -> float | None:
    try:
        counters = sorted(Path("/sys/class/powercap").glob("intel-rapl:[0-9]*"))
        packages = [path for path in counters if path.name.count(":") == 1]
        return sum(int((p / "energy_uj").read_text()) for p in packages) / 1e6 or None
    except OSError:
        return None


def _gpu_joules(device: torch.device) -> Callable[[], float | None]:
    def read() -> float | None:
        try:
            import pynvml

            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByIndex(device.index or 0)
            return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
        except Exception:  # no such package, or a GPU that does not count
            return None

    return read


def peak_memory_mib(device: torch.device, work: Callable[[], Any]) -> float | None:
    """What one call adds at its peak to what was held before; on a CPU as Linux counts it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the highest so far is now the present
        held = memory_mib("VmRSS")
        work()
        return memory_mib("VmHWM") - held
    except OSError:
        work()
        return None


def memory_mib(name: str) -> float:
    """This process's resident memory (VmRSS) or its highest (VmHWM), as Linux counts it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 2**10


class Turn(NamedTuple):
    """What one work returned in one round, and what that took.

    Attributes:
        processor_s: of all threads; other jobs on the same cores change it less than `seconds`.
    """

    result: Any
    seconds: float
    joules: float | None
    processor_s: float


def in_rounds(
    works: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device
) -> dict[str, list[Turn]]:
    """Each work in each round, after one round that does not count.

    In a round all take turns, so that a noisy minute slows all of them, and ratios within a round
    stay fair.
    """
    energy = Energy(device)
    turns: dict[str, list[Turn]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            energy.since_last()
            began = time.process_time()
            result, seconds = timed(work, device)
            processor_s = time.process_time() - began
            if number:
                turns[name].append(Turn(result, seconds, energy.since_last(), processor_s))
    return turns


Spread = dict[str, float]


def spread(values: Sequence[float]) -> Spread:
    """Median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(values: Sequence[float], bases: Sequence[float]) -> Spread:
    """Of values of the same rounds."""
    return spread([value / base for value, base in zip(values, bases, strict=True)])


def shown(figure: Spread | None, form: str = ",.1f", scale: float = 1.0) -> str:
    """A spread in a table: ``median (least-most)``."""
    if figure is None:
        return "-"
    median, least, most = (format(figure[k] / scale, form) for k in ("median", "min", "max"))
    return f"{median} ({least}-{most})"


def error_bars(figures: Sequence[Spread], scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Medians, and how far below and above them least and most lie, as matplotlib's yerr."""
    median, least, most = (
        np.array([figure[k] for figure in figures]) / scale for k in ("median", "min", "max")
    )
    return median, np.stack([median - least, most - median])


def changed(config: RunConfig, **sections: dict[str, Any]) -> RunConfig:
    """The config with some settings changed."""
    raw = config.model_dump(mode="json")
    for section, values in sections.items():
        raw[section].update(values)
    return validate_config(raw)


def device_and_dtype(training: TrainingConfig) -> tuple[torch.device, torch.dtype]:
    """Those that a run would have; on a CPU it also gets as many threads as the run would."""
    device = choose_device(training.device)
    if device.type == "cpu" and training.cpu_threads:
        torch.set_num_threads(training.cpu_threads)
    return device, torch.bfloat16 if training.precision == "bf16" else torch.float32


def surroundings(device: torch.device) -> dict[str, Any]:
    """Date, hardware, versions and command."""
    import transformers

    return {
        "date": date.today().isoformat(),
        "command": " ".join(["dti-dist", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "versions": {
            "dti-dist": dti_dist.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = {line.split(":")[1].strip() for line in file if line.startswith("model name")}
    except OSError:
        names = set()
    return f"{', '.join(sorted(names)) or platform.processor()}, {os.cpu_count()} cores"
