"""A few real steps on the machine at hand: what a step of the run takes there."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch

from dti_dist.config import RunConfig
from dti_dist.console import say
from dti_dist.data.stream import Batch, PackStream, Share, StreamPlan
from dti_dist.host import rank_threads
from dti_dist.inputs import Inputs
from dti_dist.model.heads import Head
from dti_dist.ranks import Ranks, choose_device, join_process_group, leave_process_group
from dti_dist.training.engine import Engine
from dti_dist.training.machine import memory_gib
from dti_dist.zero.partition import Partitioned

_STEPS = 4  # timed, after one that is not: it compiles, and makes the optimizer's state
_MICRO_STEPS = 2  # of a step, at most: they are alike


@dataclass(frozen=True)
class Calibration:
    """Medians of one rank alone, in seconds.

    Attributes:
        micro_step: forward and backward pass of a micro-batch.
        forward: of a micro-batch without gradients, as validation does.
        step: the optimizer's, of all parameters that train.
        data: packing of a micro-batch in this process.
        memory_gib: peak of the process on a CPU, of its tensors on a GPU.
    """

    micro_step: float
    forward: float
    step: float
    data: float
    memory_gib: float

    def seconds(
        self, config: RunConfig, world: int, steps: int, validation_micro_steps: int
    ) -> tuple[float, float]:
        """Of a run's steps and of its validations, which `world` ranks share.

        Each rank steps its share of the optimizer's state. Communication is not in it.
        """
        training = config.training
        micro_steps = training.global_batch_packs // (world * training.micro_batch_packs)
        data = 0.0 if config.data.prefetch else self.data  # else packed ahead by a thread
        of_step = micro_steps * (self.micro_step + data) + self.step / world
        return steps * of_step, validation_micro_steps * (self.forward + data)


def calibrate(config: RunConfig, inputs: Inputs, plan: StreamPlan, world: int) -> Calibration:
    """Train some steps of real packs with the real engine, as one rank, and throw them away.

    Args:
        world: ranks of the run, which share this machine's cores, as many as have a GPU here.
    """
    training = config.training
    packs = training.micro_batch_packs
    micro_steps = min(training.global_batch_packs // (world * packs), _MICRO_STEPS)
    alone = training.model_copy(update={"global_batch_packs": packs * micro_steps})
    on_gpu = choose_device(training.device).type == "cuda"
    here = min(world, torch.cuda.device_count()) if on_gpu else world
    threads = training.cpu_threads or rank_threads(here)
    ranks = join_process_group(training.device, training.collective_timeout_minutes, threads)
    try:
        say(f"calibrating: {_STEPS + 1} steps of {micro_steps} x {packs} packs on {ranks.device}")
        model = inputs.hollow_model().train()
        inputs.fill(model, Partitioned(alone, ranks))
        if training.activation_checkpointing:
            model.enable_activation_checkpointing()
        engine = Engine(model, alone, ranks)
        stream = PackStream(plan, Share(packs * micro_steps, packs))
        return _measure(engine, stream, ranks, micro_steps)
    finally:
        leave_process_group()


def _measure(engine: Engine, stream: PackStream, ranks: Ranks, micro_steps: int) -> Calibration:
    device = ranks.device
    times: dict[str, list[float]] = {"micro_step": [], "step": [], "data": [], "forward": []}
    packs = iter(stream)

    def timed(name: str, work: Callable[[], Any]) -> Any:
        _wait(device)
        began = time.perf_counter()
        found = work()
        _wait(device)
        times[name].append(time.perf_counter() - began)
        return found

    def next_batch() -> Batch:
        nonlocal packs
        batch = next(packs, None)
        if batch is None:  # a small data set is read again
            packs = iter(stream)
            batch = next(packs)
        return batch.to(device)

    def forward_and_backward(batch: Batch, scale: float) -> None:
        engine.backward(Head.loss(engine(batch), batch) * scale)

    for _ in range(_STEPS + 1):
        for micro_step in range(micro_steps):
            batch = timed("data", next_batch)
            scale = micro_steps / max(batch.step_targets, 1)
            timed("micro_step", partial(forward_and_backward, batch, scale))
            if micro_step == micro_steps - 1:
                timed("step", engine.step)
            else:
                engine.step()
    peak = memory_gib(device)
    engine.eval()
    with torch.no_grad():
        for _ in range(_STEPS):
            timed("forward", partial(engine, batch))
    first = {"micro_step": micro_steps, "data": micro_steps, "step": 1, "forward": 1}
    return Calibration(
        **{name: median(taken[first[name] :]) for name, taken in times.items()}, memory_gib=peak
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
