"""Memory that ran out: what held it, and which settings need less."""

from __future__ import annotations

import re

import torch

from dti_dist.config import RunConfig
from dti_dist.errors import RunFailed
from dti_dist.ranks import Ranks

GIB = 2**30


def is_out_of_memory(error: BaseException) -> bool:
    """Of a GPU, or of the CPU allocator."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def state_bytes(parameters: int, trainable: int, stage: int, precision: str, world: int) -> int:
    """Bytes a rank that weights, gradients and AdamW's state take under a ZeRO stage.

    A trained parameter has its weight and gradient in the run's precision, and in float32 a weight
    to step from and two moments (ZeRO, arXiv 1910.02054, section 3.1); a frozen one its weight.
    DeepSpeed keeps the weight to step from beside the model's own in fp32 too.
    """
    width = 2 if precision == "bf16" else 4
    weights, gradients = width * parameters, width * trainable
    optimizer = 12 * trainable
    if stage >= 1:
        optimizer //= world
    if stage >= 2:
        gradients //= world
    if stage >= 3:
        weights //= world
    return weights + gradients + optimizer


def out_of_memory(
    error: BaseException,
    config: RunConfig,
    ranks: Ranks,
    parameters: int,
    trainable: int,
    stage: int,
) -> RunFailed:
    """The error in a user's words, with figures and the settings that help, best first."""
    training = config.training
    states = state_bytes(parameters, trainable, stage, training.precision, ranks.world)
    asked = re.search(r"allocate ([\d.]+ \w+|\d+ bytes)", str(error))
    lines = [
        f"rank {ranks.rank}: {'GPU' if ranks.device.type == 'cuda' else 'CPU'} memory ran out"
        + (f" when {asked[1]} more were asked for." if asked else "."),
    ]
    if ranks.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(ranks.device)
        peak = torch.cuda.max_memory_allocated(ranks.device)
        reserved = torch.cuda.memory_reserved(ranks.device)
        lines.append(
            f"The GPU has {total / GIB:.1f} GiB, {free / GIB:.1f} of them free; this rank's "
            f"tensors held {peak / GIB:.1f} GiB at their peak, its allocator "
            f"{reserved / GIB:.1f} GiB."
        )
    lines.append(
        f"Weights, gradients and optimizer take {states / GIB:.2f} GiB a rank ({parameters:,} "
        f"parameters, {trainable:,} trained, {training.precision}, ZeRO stage {stage}, "
        f"{ranks.world} rank(s)); the rest are activations of {training.micro_batch_packs} pack(s) "
        f"of {config.pack.length:,} body tokens, and grow with both. What helps:"
    )
    lines += [f"  {advice}" for advice in _advice(config, stage, states, parameters, ranks.world)]
    return RunFailed("\n".join(lines))


def _advice(config: RunConfig, stage: int, states: int, parameters: int, world: int) -> list[str]:
    training = config.training
    advice = []
    if training.micro_batch_packs > 1:
        advice.append(
            f"training.micro_batch_packs=1 (now {training.micro_batch_packs}): activations by that "
            "factor, with the same result"
        )
    if not training.activation_checkpointing:
        advice.append(
            "training.activation_checkpointing=true: one layer's activations at a time, for about "
            "a third more computing"
        )
    if stage < 3:
        least = state_bytes(parameters, parameters, 3, training.precision, world)
        advice.append(
            f"training.deepspeed=zero3, in a new run_dir: at most {least / GIB:.2f} GiB a rank "
            f"instead of {states / GIB:.2f}"
        )
    of_twice = state_bytes(parameters, parameters, stage, training.precision, 2 * world)
    advice.append(
        f"more ranks: with {2 * world}, {of_twice / GIB:.2f} GiB a rank at most for weights, "
        "gradients and optimizer"
    )
    if "offload" not in training.deepspeed:
        advice.append("training.deepspeed=zero3_offload, in a new run_dir: they move to the host")
    if not config.model.lora.rank and config.model.name != "scratch":
        advice.append(
            "model.lora.rank=16, in a new run_dir: no gradients and optimizer for the rest"
        )
    if config.pack.length > 1024:
        advice.append(
            f"a shorter pack.length (now {config.pack.length:,}) and as much more "
            "training.global_batch_packs, in a new run_dir"
        )
    return advice
