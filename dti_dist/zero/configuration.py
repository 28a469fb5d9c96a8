"""DeepSpeed, and its configuration in a run: a JSON file, completed by the section `training`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from dti_dist.config import AUTO, RunConfig, TrainingConfig
from dti_dist.errors import UserError

_FOLDERS = (
    Path(__file__).resolve().parents[2] / "deepspeed_configs",  # a checkout
    Path(sys.prefix) / "share" / "dti-dist" / "deepspeed_configs",  # an installed wheel
)
# Of a DeepSpeed configuration: what the section `training` sets.
_DECIDED_BY_THE_RUN = {
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "bf16",
    "fp16",
    "optimizer",
    "scheduler",
}


def micro_steps_per_step(training: TrainingConfig, world: int) -> int:
    """Micro-steps in a step. Raises UserError where ranks don't divide the global batch."""
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


def refuse_parts_of_4_bits(config: RunConfig) -> None:
    """Raise UserError where ZeRO-3 would have to partition weights in 4 bits."""
    name = config.training.deepspeed
    if not config.model.lora.load_in_4bit or name == AUTO:
        return
    if read_deepspeed(name)["zero_optimization"]["stage"] == 3:
        raise UserError(
            f"training.deepspeed {name!r}: expected ZeRO stage 1 or 2 with "
            "model.lora.load_in_4bit=true, found stage 3, which would have to partition weights in "
            "4 bits. Set training.deepspeed to zero1, zero2 or auto: every rank then holds all of "
            "these weights."
        )


def deepspeed_config(training: TrainingConfig, world: int) -> dict[str, Any]:
    """The JSON file that the config names, completed with what only the run knows."""
    config = read_deepspeed(training.deepspeed)
    micro_steps = micro_steps_per_step(training, world)
    if training.precision == "bf16" and micro_steps > 1:
        # DeepSpeed would add up micro-steps' gradients in bf16, which doubles their error.
        config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    return {
        **config,
        "train_micro_batch_size_per_gpu": training.micro_batch_packs,
        "gradient_accumulation_steps": micro_steps,
        "gradient_clipping": training.gradient_clipping,
        "bf16": {"enabled": training.precision == "bf16"},
        "steps_per_print": 10**12,
    }


def read_deepspeed(name: str) -> dict[str, Any]:
    """The JSON file of a `training.deepspeed`. Raises UserError where the run can't follow it."""
    config = _read(name)
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage not in (1, 2, 3):
        raise UserError(
            f"training.deepspeed {name!r}: expected zero_optimization.stage 1, 2 or 3, found "
            f"{stage}. Checkpoints and evaluation rely on ZeRO's sharded state."
        )
    parallel = config.get("sequence_parallel_size", 1)
    if parallel != 1:
        raise UserError(
            f"training.deepspeed {name!r}: sequence_parallel_size {parallel} would replace the "
            "isolation mask by plain causal attention. Remove it; packs are the unit of "
            "parallelism."
        )
    if clash := sorted(_DECIDED_BY_THE_RUN & set(config)):
        raise UserError(
            f"training.deepspeed {name!r} sets {', '.join(clash)}, which the run's own config "
            "decides. Remove them from the JSON file and use the section `training`."
        )
    return config


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
        f"training.deepspeed {name!r}: no such name, and no such file: nothing is at "
        f"{Path(name).absolute()}. Names: {', '.join(known)}; or give the path of a DeepSpeed "
        "JSON file."
    )


def import_deepspeed() -> Any:
    """DeepSpeed, kept from compiling an extension before the first step on a CPU.

    It is one for inference. Compiling takes a compiler and up to a minute, and a job that is killed
    meanwhile leaves a lock behind that every later job waits for, forever.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
