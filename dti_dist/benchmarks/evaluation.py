"""`dti-dist benchmark evaluation`: time and memory of metrics over many targets, without a model.

Writes synthetic predictions as `dti-dist evaluate` keeps them, then computes metrics and intervals
from the file under a memory limit of DuckDB, and prints the time of each step and the largest
resident set that the process had until then.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa

from dti_dist.evaluation import predictions_file
from dti_dist.evaluation.bootstrap import draw, intervals, read_groups
from dti_dist.evaluation.metrics import measure
from dti_dist.evaluation.request_metrics import measure_requests
from dti_dist.evaluation.slices import measure_slices
from dti_dist.sql import open_workspace

AT_A_TIME = 1 << 20
ITEMS = 100_000
T = TypeVar("T")


def synthetic(targets: int, per_user: int, shown: int = 1) -> Iterator[pa.RecordBatch]:
    """Batches of predictions_file.SCHEMA: about 4 % clicks, a month, probabilities that fit.

    A user's targets, `shown` after `shown`, have one time.
    """
    random = np.random.default_rng(0)
    at_a_time = max(AT_A_TIME // shown, 1) * shown
    for first in range(0, targets, at_a_time):
        number = np.arange(first, min(first + at_a_time, targets))
        probability = 1 / (1 + np.exp(3.5 - random.normal(size=len(number))))
        row = number // per_user
        columns = [
            np.char.add("user-", row.astype(str)),
            np.char.add("item-", random.integers(ITEMS, size=len(number)).astype(str)),
            1_700_000_000
            + random.integers(30 * 86_400, size=len(number))[::shown].repeat(shown)[: len(number)],
            (random.random(len(number)) < probability).astype(np.int8),
            probability.astype(np.float32),
            row,
            (number % per_user).astype(np.int32),
        ]
        yield pa.RecordBatch.from_arrays(
            [pa.array(c) for c in columns], schema=predictions_file.SCHEMA
        )


def benchmark_evaluation(
    targets: int, per_user: int, memory_limit: str, work: Path, by_day: bool, shown: int = 1
) -> None:
    """Print each step's time and the peak of resident memory, then the metrics.

    Args:
        shown: targets of a request; those by request are measured where there are several.
    """

    def timed(step: str, function: Callable[[], T]) -> T:
        start = time.monotonic()
        result = function()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"{step:<32} {time.monotonic() - start:>8.1f} s   peak {peak:.2f} GiB", flush=True)
        return result

    work.mkdir(parents=True, exist_ok=True)
    file = work / "predictions.parquet"
    by_request = shown > 1
    about = predictions_file.About(
        "synthetic", "test", "streaming", "synthetic", requests=by_request
    )
    batches = synthetic(targets, per_user, shown)
    timed("(writing synthetic predictions)", lambda: predictions_file.write(batches, file, about))
    print(f"{file.stat().st_size / targets:.1f} bytes a target")
    with open_workspace(str(work), memory_limit=memory_limit) as workspace:
        connection = workspace.connection
        days = ", floor(timestamp / 86400)::BIGINT AS slice_0"
        timed(
            "reading",
            lambda: predictions_file.load_targets(
                connection, file, days if by_day else "", by_request=by_request
            ),
        )
        figures = timed("metrics", lambda: measure(connection, "targets", 0.1))
        if by_request:
            figures |= timed("metrics by request", lambda: measure_requests(connection, "targets"))
        groups = timed(
            "sums of groups of users",
            lambda: read_groups(connection, "targets", figures["users"], by_request=by_request),
        )
        drawn = draw(len(groups), 1_000)
        found = timed("1,000 resamples", lambda: intervals(figures, groups, drawn))
        if by_day:
            timed("a slice", lambda: measure_slices(connection, ["day"], by_request, drawn))
    for name, bounds in found.items():
        interval = "" if bounds is None else f"   {bounds[0]:.6f} to {bounds[1]:.6f}"
        print(f"{name:<20} {figures[name]:.6f}{interval}")
