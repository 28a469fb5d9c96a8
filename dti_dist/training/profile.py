"""A torch profiler's trace of some steps, and what held the GPU's memory then."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from dti_dist.config import ProfileConfig
from dti_dist.console import say
from dti_dist.ranks import Ranks

_MEMORY_EVENTS = 100_000  # the latest allocations whose stacks a snapshot holds


class Profiler:
    """Traces the steps that `training.profile` names; a context that ends with the job.

    Args:
        folder: gets ``rank-R-steps-A-B.json.gz``, for Perfetto or chrome://tracing, and on a GPU
            ``rank-R-steps-A-B.pickle``, for pytorch.org/memory_viz.
    """

    def __init__(self, settings: ProfileConfig, ranks: Ranks, folder: Path):
        begin = settings.from_step
        wanted = begin is not None and ranks.rank in settings.ranks
        self._steps = range(begin, begin + settings.steps) if begin and wanted else range(0)
        self._ranks, self._folder = ranks, folder
        self._on_gpu = ranks.device.type == "cuda"
        self._trace: Any = None
        self._first = self._last = 0

    def __enter__(self) -> Profiler:
        return self

    def __exit__(self, *_: object) -> None:
        self._write()

    @contextmanager
    def around(self, step: int) -> Iterator[None]:
        """Trace what the block does, where `step`, counted from 1, is one of those wanted."""
        if step not in self._steps:
            yield
            return
        if self._trace is None:
            self._begin(step)
        self._last = step
        with record_function(f"step {step}"):
            yield
        if step == self._steps[-1]:
            self._write()

    def _begin(self, step: int) -> None:
        self._first = step
        if self._on_gpu:
            torch.cuda.memory._record_memory_history(max_entries=_MEMORY_EVENTS)
        gpu = [ProfilerActivity.CUDA] if self._on_gpu else []
        self._trace = profile(activities=[ProfilerActivity.CPU, *gpu])
        self._trace.start()

    def _write(self) -> None:
        """What was traced so far, where anything was: a signal may end a job between the steps."""
        trace, self._trace = self._trace, None
        if trace is None:
            return
        name = f"rank-{self._ranks.rank}-steps-{self._first}-{self._last}"
        try:
            trace.stop()
            self._folder.mkdir(parents=True, exist_ok=True)
            trace.export_chrome_trace(str(self._folder / f"{name}.json.gz"))
            if self._on_gpu:
                torch.cuda.memory._dump_snapshot(str(self._folder / f"{name}.pickle"))
                torch.cuda.memory._record_memory_history(enabled=None)
        except (OSError, RuntimeError) as error:
            say(f"The trace of steps {self._first} to {self._last} was not written: {error}")
        else:
            say(f"steps {self._first} to {self._last} are traced in {self._folder}")
