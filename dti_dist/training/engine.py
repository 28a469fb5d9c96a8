"""The DeepSpeed engine around the model: its configuration, its steps and its files."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from dti_dist.config import TrainingConfig
from dti_dist.data.stream import Batch
from dti_dist.errors import UserError
from dti_dist.model.ctr_model import CTRModel
from dti_dist.ranks import Ranks
from dti_dist.runs.unpickling import without_code

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
        f"training.deepspeed {name!r}: no such file, and no such name. "
        f"Names: {', '.join(known)}; or give the path of a DeepSpeed JSON file."
    )


class Engine:
    """The model under DeepSpeed: what the package does with DeepSpeed while it trains is here.

    Attributes:
        micro_steps: forward and backward passes in an optimizer step.
        zero_stage: how much of the state DeepSpeed partitions over the ranks.
    """

    def __init__(self, model: CTRModel, training: TrainingConfig, ranks: Ranks):
        """Partition the model's state over the ranks; `model` must not be used directly after."""
        import deepspeed

        # A C++ extension for inference, which DeepSpeed would compile before the first step on a
        # CPU. That takes a compiler and up to a minute, and a job that is killed meanwhile leaves
        # a lock behind that every later job waits for, forever.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        # DeepSpeed would take GPU LOCAL_RANK, which is not there where a task sees one GPU alone.
        gpu = SimpleNamespace(device_rank=ranks.device.index)
        with _one_form_of_checkpoints():
            self._engine, *_ = deepspeed.initialize(
                args=gpu if ranks.device.type == "cuda" else None,
                model=model,
                optimizer=_optimizer(model, training),
                config=deepspeed_config(training, ranks.world),
                dist_init_required=False,
            )
        self.model: CTRModel = self._engine.module
        self.micro_steps: int = self._engine.gradient_accumulation_steps()
        self.zero_stage = int(self._engine.zero_optimization_stage())
        _restore_buffers(self.model, buffers)

    def __call__(self, batch: Batch) -> torch.Tensor:
        """The logits of a batch's targets."""
        return self._engine(batch)

    def backward(self, loss: torch.Tensor) -> None:
        self._engine.backward(loss)

    def step(self) -> bool:
        """End a micro-step; the last of a step updates the weights.

        Returns:
            after the last micro-step, whether the weights were left alone because gradients were
            not finite.
        """
        self._engine.step()
        return bool(self._engine.optimizer.overflow)

    def train(self) -> None:
        self._engine.train()

    def eval(self) -> None:
        self._engine.eval()

    @property
    def learning_rate(self) -> float:
        return self._engine.optimizer.param_groups[0]["lr"]

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = value

    def gradient_norm(self) -> float:
        """Of the last step, before clipping; NaN before there is one."""
        norm = self._engine.get_global_grad_norm()
        return math.nan if norm is None else float(norm)

    def own_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Each weight, or the part of it that this rank holds."""
        for name, parameter in self.model.named_parameters():
            yield name, getattr(parameter, "ds_tensor", parameter).detach()

    def save(self, folder: Path, tag: str, write: Callable[[Any, str], None]) -> None:
        """Have `write(content, path)` called for each file of this rank under ``folder/tag``.

        All ranks must call this at once. Frozen weights are left out: the base model has them.
        """
        self._engine.checkpoint_engine.save = write
        self._engine._copy_recovery_script = lambda path: None  # `dti-dist export` does that better
        self._engine.save_checkpoint(
            str(folder), tag=tag, save_latest=False, exclude_frozen_parameters=True
        )

    def saved_content(self) -> list[Any]:
        """What `save` would have written now. All ranks must call this at once."""
        content: list[Any] = []
        files = self._engine.checkpoint_engine
        files.makedirs = lambda path, exist_ok=False: None
        self.save(Path(), "unwritten", lambda state_dict, path: content.append(state_dict))
        del files.makedirs
        return content

    def load(self, folder: Path, whole: bool) -> None:
        """Restore weights and optimizer from what as many ranks saved.

        Args:
            whole: whether the files have all weights, none of them frozen.
        """
        with without_code():
            path, _ = self._engine.load_checkpoint(
                str(folder.parent),
                tag=folder.name,
                load_module_strict=whole,
                load_lr_scheduler_states=False,
            )
        if path is None:
            raise UserError(f"DeepSpeed could not load the checkpoint {folder}.")

    def load_universal(self, folder: Path, whole: bool) -> None:
        """Restore weights and optimizer from a checkpoint converted for any number of ranks."""
        optimizer = self._engine.optimizer
        hyperparameters = [
            {name: value for name, value in group.items() if name != "params"}
            for group in optimizer.param_groups
        ]
        self._engine._config.load_universal_checkpoint = True
        self.load(folder, whole)
        self._engine._config.load_universal_checkpoint = False
        # DeepSpeed gives all groups the first one's hyperparameters and one counter of steps, which
        # each group would then advance.
        for group, own in zip(optimizer.param_groups, hyperparameters, strict=True):
            group.update(own)
        for moments in optimizer.optimizer.state.values():
            if isinstance(moments.get("step"), torch.Tensor):
                moments["step"] = moments["step"].clone()


@contextmanager
def _one_form_of_checkpoints() -> Iterator[None]:
    """DeepSpeed's ZeRO optimizer for all stages.

    For stage 1 with gradients summed in float32 it would choose another, whose checkpoints can be
    neither read nor converted.
    """
    from deepspeed.runtime.engine import ZERO_OPTIMIZATION, DeepSpeedEngine

    choose = DeepSpeedEngine._do_optimizer_sanity_check
    DeepSpeedEngine._do_optimizer_sanity_check = lambda engine, optimizer: ZERO_OPTIMIZATION
    try:
        yield
    finally:
        DeepSpeedEngine._do_optimizer_sanity_check = choose


def _optimizer(model: nn.Module, training: TrainingConfig) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(
        [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": training.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=training.learning_rate,
        betas=training.betas,
    )


def _restore_buffers(model: nn.Module, buffers: dict[str, torch.Tensor]) -> None:
    """Give buffers, such as rotary frequencies, back the precision that the cast to bf16 took."""
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
