"""Memory that ran out: what held it, and which settings need less."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

from dti_dist.config import RunConfig
from dti_dist.costs.memory import States, offloads, states
from dti_dist.costs.shape import NOTHING_QUANTIZED, Quantized
from dti_dist.errors import RunFailed
from dti_dist.ranks import Ranks
from dti_dist.words import GIB
from dti_dist.zero.configuration import read_deepspeed


def is_out_of_memory(error: BaseException) -> bool:
    """Of a GPU, or of the CPU allocator."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def out_of_memory(
    error: BaseException,
    config: RunConfig,
    ranks: Ranks,
    parameters: int,
    trained: int,
    quantized: Quantized = NOTHING_QUANTIZED,
) -> RunFailed:
    """The error in a user's words, with figures and the settings that help, best first."""
    training = config.training
    zero = read_deepspeed(training.deepspeed)["zero_optimization"]
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

    def held_by(zero: dict[str, Any], world: int) -> States:
        accumulates = training.global_batch_packs > world * training.micro_batch_packs
        return states(parameters, trained, zero, training.precision, world, accumulates, quantized)

    held = held_by(zero, ranks.world)
    host = f", and {held.host / GIB:.2f} GiB on the host" if held.host else ""
    lines.append(
        f"Weights, gradients and optimizer take {held.on_device / GIB:.2f} GiB a rank{host} "
        f"({parameters:,} parameters, {trained:,} trained, {training.precision}, ZeRO stage "
        f"{zero['stage']}, {ranks.world} rank(s)). The rest are communication buffers, and "
        f"activations of {training.micro_batch_packs} pack(s) of {config.pack.length:,} body "
        "tokens, which grow with both. What helps:"
    )
    advice = _advice(config, zero, ranks.world, held_by)
    return RunFailed("\n  ".join(["\n".join(lines), *advice]))


def _advice(
    config: RunConfig,
    zero: dict[str, Any],
    world: int,
    held_by: Callable[[dict[str, Any], int], States],
) -> list[str]:
    training, lora = config.training, config.model.lora

    def gib(zero: dict[str, Any], world: int) -> str:
        return f"{held_by(zero, world).on_device / GIB:.2f} GiB"

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
    if zero["stage"] < 3 and not lora.load_in_4bit:
        advice.append(
            "training.deepspeed=zero3, in a new run_dir: weights, gradients and optimizer take "
            f"{gib({'stage': 3}, world)} a rank instead of {gib(zero, world)}"
        )
    if not (offloads(zero, "param") and offloads(zero, "optimizer")):
        advice.append(
            f"more ranks: with {2 * world}, weights, gradients and optimizer take "
            f"{gib(zero, 2 * world)} a rank"
        )
        if not lora.load_in_4bit:
            advice.append(
                "training.deepspeed=zero3_offload, in a new run_dir: they move to the host"
            )
    if not lora.rank and config.model.name != "scratch":
        advice.append(
            "model.lora.rank=16, in a new run_dir: no gradients and optimizer for the rest"
        )
    elif lora.rank and not lora.load_in_4bit:
        advice.append(
            "model.lora.load_in_4bit=true and training.deepspeed=zero2, in a new run_dir: the "
            "decoder's weights take 4.5 bits each on every rank"
        )
    if config.pack.length > 1024:
        advice.append(
            f"a shorter pack.length (now {config.pack.length:,}) and as much more "
            "training.global_batch_packs, in a new run_dir"
        )
    return advice
