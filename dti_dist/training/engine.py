"""The DeepSpeed engine around the model: its configuration, optimizer and learning rate."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dti_dist.config import TrainingConfig
from dti_dist.errors import UserError
from dti_dist.ranks import Ranks

_FOLDERS = (
    Path(__file__).resolve().parents[2] / "deepspeed_configs",  # a checkout
    Path(sys.prefix) / "share" / "dti-dist" / "deepspeed_configs",  # an installed wheel
)


def micro_steps_per_step(training: TrainingConfig, world: int) -> int:
    """Gradient-accumulation steps. Raises UserError when ranks don't divide the global batch."""
    per_micro_step = world * training.micro_batch_packs
    if training.global_batch_packs % per_micro_step:
        raise UserError(
            f"training.global_batch_packs {training.global_batch_packs} must be a multiple of "
            f"ranks x training.micro_batch_packs = {world} x {training.micro_batch_packs} = "
            f"{per_micro_step}, so that every rank has equal work. Set it to "
            f"{-(-training.global_batch_packs // per_micro_step) * per_micro_step}, or change the "
            "number of ranks."
        )
    return training.global_batch_packs // per_micro_step


def deepspeed_config(training: TrainingConfig, world: int) -> dict[str, Any]:
    """The JSON file that the config names, completed with what only the run knows."""
    config = _read(training.deepspeed)
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage not in (1, 2, 3):
        raise UserError(
            f"training.deepspeed {training.deepspeed!r}: expected zero_optimization.stage 1, 2 or "
            f"3, found {stage}. Checkpoints and evaluation rely on ZeRO's sharded state."
        )
    parallel = config.get("sequence_parallel_size", 1)
    if parallel != 1:
        raise UserError(
            f"training.deepspeed {training.deepspeed!r}: sequence_parallel_size {parallel} would "
            "replace the isolation mask by plain causal attention. Remove it; packs are the unit "
            "of parallelism."
        )
    ours = {
        "train_micro_batch_size_per_gpu": training.micro_batch_packs,
        "gradient_accumulation_steps": micro_steps_per_step(training, world),
        "gradient_clipping": training.gradient_clipping,
        "bf16": {"enabled": training.precision == "bf16"},
    }
    clash = sorted(set(ours) & set(config) | {"optimizer", "scheduler", "fp16"} & set(config))
    if clash:
        raise UserError(
            f"training.deepspeed {training.deepspeed!r} sets {', '.join(clash)}, which the run's "
            "own config decides. Remove them from the JSON file and use the section `training`."
        )
    return {**config, **ours, "steps_per_print": 10**12}


def _read(name: str) -> dict[str, Any]:
    candidates = [Path(name), *(folder / f"{name}.json" for folder in _FOLDERS)]
    for path in candidates:
        if path.is_file():
            try:
                return json.loads(path.read_text())
            except json.JSONDecodeError as error:
                raise UserError(f"DeepSpeed config {path} is not valid JSON: {error}") from error
    known = sorted({file.stem for folder in _FOLDERS for file in folder.glob("*.json")})
    raise UserError(
        f"training.deepspeed {name!r}: no such file, and no such name. "
        f"Names: {', '.join(known)}; or give the path of a DeepSpeed JSON file."
    )


def start_engine(model: nn.Module, training: TrainingConfig, ranks: Ranks) -> Any:
    """Wrap the model; parameters are partitioned over the ranks from here on."""
    import deepspeed

    # A C++ extension for inference, which DeepSpeed would compile before the first step on a CPU.
    # That takes a compiler and up to a minute, and a job killed meanwhile leaves a lock behind that
    # every later job waits for, forever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

    settings = deepspeed_config(training, ranks.world)
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": training.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=training.learning_rate,
        betas=training.betas,
    )
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=settings, dist_init_required=False
    )
    _restore_buffers(engine.module, buffers)
    return engine


def _restore_buffers(model: nn.Module, buffers: dict[str, torch.Tensor]) -> None:
    """Give buffers back the precision that DeepSpeed's cast to bf16 took: rotary frequencies."""
    for name, buffer in buffers.items():
        module_name, _, own_name = name.rpartition(".")
        module = model.get_submodule(module_name)
        setattr(module, own_name, buffer.to(getattr(module, own_name).device))


def learning_rate(step: int, total_steps: int, training: TrainingConfig) -> float:
    """Linear warm-up from 0, then cosine to the minimum, as a function of the step alone.

    Args:
        step: the optimizer step about to be taken, from 0.
    """
    warmup = round(training.warmup_fraction * total_steps)
    if step < warmup:
        return training.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(total_steps - warmup, 1)
    floor = training.min_learning_rate_fraction
    return training.learning_rate * (
        floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    )


def set_learning_rate(engine: Any, value: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = value
