"""What to say of a run whose first losses are worse than a constant prediction's."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dti_dist.config import TrainingConfig

# Nats above the labels' entropy: at the start, and after the warm-up.
_FAR_ABOVE, _ABOVE = 0.5, 0.02


def of_bad_start(
    loss: float,
    rates: Sequence[tuple[float, float]],
    settings: TrainingConfig,
    step: int,
    warmup_steps: int,
) -> str | None:
    """What to say after the first logged steps, and after the first ones past the warm-up.

    Args:
        loss: the mean of the steps since the last logged one, in nats.
        rates: of each task the weight of its loss, and the share of label 1 among what is trained
            on.
        step: the last of them, counted from 1.
        warmup_steps: of the run's schedule.
    """
    entropy = -sum(
        weight * p * math.log(p) for weight, rate in rates for p in (rate, 1 - rate) if p > 0
    )
    every = settings.log_every
    constant = (
        f"always predicting the label rate, {', '.join(f'{rate:.3g}' for _, rate in rates)}, has "
        f"{entropy:.3g}."
    )
    remedy = (
        "What helps: a longer training.warmup_fraction (now "
        f"{settings.warmup_fraction:g}) or a lower training.learning_rate (now "
        f"{settings.learning_rate:g})."
    )
    # NaN is reported as what it is, elsewhere.
    if step == every and loss > entropy + _FAR_ABOVE:
        return (
            f"The loss of the first {every} steps is {loss:.3g}; {constant} From such a start "
            f"gradients spike. {remedy}"
        )
    first_after = (-(-warmup_steps // every) + 1) * every
    if step == first_after and loss > entropy + _ABOVE:
        return (
            f"After the warm-up, in steps {step - every + 1:,} to {step:,}, the loss is "
            f"{loss:.3g}; {constant} {remedy}"
        )
    return None
