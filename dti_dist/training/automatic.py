"""Settings that are `auto`, decided once the model and the packs are known."""

from __future__ import annotations

from dataclasses import replace

import torch

from dti_dist.config import AUTO, RunConfig
from dti_dist.console import say
from dti_dist.costs.memory import Demand
from dti_dist.costs.settings import MARGIN, Option, Room, decide, decided
from dti_dist.costs.shape import ModelShape
from dti_dist.costs.workload import count_pairs, first_packs
from dti_dist.data.stream import StreamPlan
from dti_dist.gpus import CPU
from dti_dist.host import memory_bytes
from dti_dist.model.ctr_model import CTRModel
from dti_dist.ranks import Ranks
from dti_dist.training.job import Job
from dti_dist.words import gib


def with_decided(job: Job, model: CTRModel, plan: StreamPlan) -> Job:
    """The job with what its config leaves open as rank 0 decides it, by the memory that it sees.

    It is what `dti-dist plan` says for such ranks; the run's folder keeps it. All ranks must call
    this at once.

    Args:
        model: may be hollow.
    """
    config, ranks = job.config, job.ranks
    if config.training.is_decided:
        return job

    def decide_here() -> RunConfig | None:
        if not ranks.is_main:
            return None
        room = _room(ranks)
        option = decide(_demand(config, model, plan, ranks), ranks.world, room)
        job.folder.keep(decided(config, option))
        say(_words(config, option, room))
        return decided(config, option)

    found = ranks.each(decide_here)[0]
    assert found is not None
    return replace(job, config=found)


def _room(ranks: Ranks) -> Room:
    of_host = memory_bytes() / ranks.local_world
    if ranks.device.type == CPU:
        return Room(of_host)
    _, total = torch.cuda.mem_get_info(ranks.device)
    return Room(total, "cuda", of_host)


def _demand(config: RunConfig, model: CTRModel, plan: StreamPlan, ranks: Ranks) -> Demand:
    packs = first_packs(plan)
    # Only the chunked backend, on a CPU, has masks that take much.
    masks = count_pairs(model, packs).plan_bytes if ranks.device.type == CPU else 0.0
    batch_bytes = sum(batch.nbytes for batch in packs) / len(packs)
    shape = ModelShape.of(model, plan.tokens.profiles is not None)
    return Demand(config, shape, plan.shape, batch_bytes, masks)


def _words(config: RunConfig, option: Option, room: Room) -> str:
    setting = option.setting
    values = {"deepspeed": setting.deepspeed, "activation_checkpointing": setting.checkpointing}
    chosen = ", ".join(
        f"training.{name}={str(value).lower()}"
        for name, value in values.items()
        if getattr(config.training, name) == AUTO
    )
    takes = f"a rank takes about {gib(option.memory.peak)} of {gib(room.memory)} GiB"
    if option.memory.host:
        takes += f", and {gib(option.memory.host)} of the host's memory"
    if option.fits:
        return f"chosen automatically: {chosen}; {takes}"
    return (
        f"WARNING: by estimate nothing fits with {MARGIN:.0%} of the memory left free. What takes "
        f"least is tried: {chosen}; {takes}. `dti-dist plan` with this config says what would fit."
    )
