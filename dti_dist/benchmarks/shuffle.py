"""How well an epoch's order mixes the file's: where samples that lie side by side end up."""

from __future__ import annotations

from typing import Any

import numpy as np

from dti_dist.data.epochs import EpochPlan


def places_in_epoch(epoch: EpochPlan) -> tuple[np.ndarray, np.ndarray]:
    """[samples] each, in the order of the files: place in the epoch's order, and pack."""
    index = epoch.index
    place = np.empty(len(index.tokens), dtype=np.int64)
    pack = np.empty(len(index.tokens), dtype=np.int64)
    done = 0
    for number, row_groups in enumerate(epoch.windows):
        window = epoch.window(number)
        slices = [index.samples_of(group) for group in row_groups]
        in_files = np.concatenate([np.arange(s.start, s.stop) for s in slices])[window.by_pack]
        place[in_files] = np.arange(done, done + len(in_files))
        packs = np.diff(window.pack_bounds)
        pack[in_files] = epoch.first_pack[number] + np.repeat(np.arange(len(packs)), packs)
        done += len(in_files)
    return place, pack


def shuffle_quality(epoch: EpochPlan) -> dict[str, Any]:
    """How far apart neighbours of the files end up, in samples and as shares of the epoch.

    Neighbours of a perfect shuffle lie 1 - 1/√2 = 0.29 of the epoch apart in the median.
    """
    place, pack = places_in_epoch(epoch)
    apart = np.abs(np.diff(place))
    low, median, high = (float(np.quantile(apart, q)) for q in (0.05, 0.5, 0.95))
    # The other end of the scale: how far a sample is moved from its place in the files.
    moved = np.abs(place - np.arange(len(place)))
    return {
        "samples": len(place),
        "windows": len(epoch.windows),
        "neighbours_apart": {"p5": low, "median": median, "p95": high},
        "neighbours_apart_share": median / len(place),
        "neighbours_in_one_pack": float((np.diff(pack) == 0).mean()),
        "moved_share": float(np.median(moved)) / len(place),
    }
