"""A job that fails at random, event after event: what formulas of goodput must agree with."""

from __future__ import annotations

import numpy as np

from dti_dist.costs.goodput import Failures


def simulated_goodput(failures: Failures, work: float, count: int, seed: int) -> float:
    """Useful share of the time until the `count`-th failure."""
    rng = np.random.default_rng(seed)
    clock, kept = 0.0, 0.0  # kept: seconds of training in the last complete checkpoint
    fails_at = rng.exponential(failures.mtbf)
    starts_at = 0.0  # when training goes on
    for _ in range(count):
        trained, clock, complete_at = kept, starts_at, starts_at
        while clock < fails_at:
            # Train, and let the checkpoint before become complete; then save.
            trained, clock = trained + work, max(clock + work, complete_at) + failures.stall
            complete_at = clock + failures.write
            if complete_at <= fails_at:
                kept = trained
        starts_at = fails_at + failures.restart
        fails_at += rng.exponential(failures.mtbf)
    return kept / (starts_at - failures.restart)
