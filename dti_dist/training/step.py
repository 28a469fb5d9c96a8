"""One optimizer step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from dti_dist.data.stream import Batch
from dti_dist.model.heads import Head
from dti_dist.ranks import Ranks
from dti_dist.training.engine import Engine
from dti_dist.training.signals import StopSignal


@dataclass(frozen=True)
class Step:
    """What a step did. Sums are over all ranks.

    Attributes:
        loss_sum: over the step's targets, each times its weight; weight: the sum of these.
        data_wait_s: how long this rank waited for batches.
        left_out: whether loss or gradients were not finite, so that the weights were left alone.
        stop: whether a rank received a signal to stop.
        skipped: why parts of the data were left out, each once.
        batches: this rank's, on its device.
    """

    epoch: int
    loss_sum: float
    targets: int
    weight: float
    tokens: int
    data_wait_s: float
    left_out: bool
    stop: bool
    skipped: list[str]
    batches: list[Batch]


def take_step(
    engine: Engine,
    stream: Iterator[Batch],
    step: int,
    learning_rate: float,
    seed: int,
    ranks: Ranks,
    stop: StopSignal,
) -> Step:
    """Take optimizer step `step`, counted from 0, with the stream's next batches."""
    engine.learning_rate = learning_rate
    # So that a resumed run's dropout is that of one without interruption.
    torch.manual_seed(hash((seed, step, ranks.rank)))
    loss_sum, tokens, waited = torch.zeros((), device=ranks.device), 0, 0.0
    batches: list[Batch] = []
    for micro_step in range(engine.micro_steps):
        began = time.perf_counter()
        batch = next(stream)
        waited += time.perf_counter() - began
        assert batch.step == step, "the stream and the loop must count alike"
        batches.append(batch.to(ranks.device))
        loss = Head.loss(engine(batches[-1]), batches[-1])
        loss_sum += loss.detach()
        tokens += batch.body_tokens + int(batch.used.sum())
        # DeepSpeed averages over ranks and micro-steps. Wanted is the mean over the step's targets,
        # however they are spread.
        scale = ranks.world * engine.micro_steps / (batch.step_weight or 1.0)
        engine.backward(loss * (scale + _nan_unless_finite(loss)))
        if micro_step == engine.micro_steps - 1:
            # DeepSpeed too waits here, for the norm of the gradients. Waiting behind the optimizer
            # would leave a GPU without work until the next forward pass is under way.
            skipped = [reason for batch in batches for reason in batch.skipped]
            total, all_tokens, stopping, skips = ranks.sum(
                loss_sum.item(),
                float(tokens),
                float(stop.received is not None),
                float(len(skipped)),
            )
        left_out = engine.step()
    if skips:
        skipped = [reason for of_rank in ranks.each(lambda: skipped) for reason in of_rank]
    return Step(
        epoch=batch.epoch,
        loss_sum=total,
        targets=batch.step_targets,
        weight=batch.step_weight,
        tokens=int(all_tokens),
        data_wait_s=waited,
        left_out=left_out,
        stop=stopping > 0,
        skipped=list(dict.fromkeys(skipped)),
        batches=batches,
    )


def _nan_unless_finite(loss: torch.Tensor) -> torch.Tensor:
    """0, or NaN for a loss that is not finite: known to the device alone, so nobody waits.

    NaN in one rank's gradients is NaN in all ranks' sums, and DeepSpeed leaves such a step out. An
    infinite loss can have finite gradients.
    """
    return 0 * loss.detach()
