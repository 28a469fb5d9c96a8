"""A small log of impressions, as `prepare events` reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dti_dist.cli import main

ITEMS, USERS, REQUESTS = 400, 40, 12
SIZES = [1, 2, 3, 5, 8, 10]


def prepare_impressions(folder: Path) -> Path:
    """Requests of 1 to 300 items, up to three of them clicked, which alone are history."""
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for user in range(USERS):
        for request in range(REQUESTS):
            size = 300 if (user, request) in [(3, 11), (5, 4)] else int(rng.choice(SIZES))
            clicked = rng.choice(size, min(size, int(rng.integers(0, 4))), replace=False)
            time = 1_700_000_000 + request * 90_000 + int(rng.integers(0, 80_000))
            rows += [
                {
                    "user": f"u{user}",
                    "request": f"{user}-{request}",
                    "item": f"i{item}",
                    "time": time + int(rng.integers(0, 30)),
                    "click": place in clicked,
                }
                for place, item in enumerate(rng.choice(ITEMS, size, replace=False))
            ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "log.parquet")
    titles = [f"{['red', 'blue', 'green'][i % 3]} thing {i}" for i in range(ITEMS)]
    items = {"item": [f"i{i}" for i in range(ITEMS)], "title": titles}
    pq.write_table(pa.table(items), folder / "items.parquet")
    command = ["prepare", "events", f"{folder}/log.parquet", "--items", f"{folder}/items.parquet"]
    command += ["--user-col", "user", "--item-col", "item", "--time-col", "time"]
    command += ["--request-col", "request", "--label", "click", "--history", "label = 1"]
    command += ["--text-cols", "title", "--out", str(folder / "data")]
    assert main(command) == 0
    return folder / "data"
