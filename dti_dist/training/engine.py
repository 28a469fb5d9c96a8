"""The DeepSpeed engine around the model: its configuration, its steps and its files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dti_dist.config import TrainingConfig
from dti_dist.data.stream import Batch
from dti_dist.errors import UserError
from dti_dist.model.ctr_model import CTRModel
from dti_dist.model.weights import Reader
from dti_dist.ranks import Ranks
from dti_dist.runs.unpickling import without_code
from dti_dist.training.groups import Group, groups_of
from dti_dist.zero.configuration import deepspeed_config, import_deepspeed


class Engine:
    """The model under DeepSpeed: what the package does with DeepSpeed while it trains is here.

    Attributes:
        micro_steps: forward and backward passes in an optimizer step.
        zero_stage: how much of the state DeepSpeed partitions over the ranks.
    """

    def __init__(self, model: CTRModel, training: TrainingConfig, ranks: Ranks):
        """
        Args:
            model: as `Partitioned` filled it; not to be used directly after.
        """
        self._groups = groups_of(model, training)
        deepspeed = import_deepspeed()
        with _one_form_of_checkpoints():
            self._engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=_optimizer(self._groups, training),
                config=deepspeed_config(training, ranks.world),
                dist_init_required=False,
            )
        self.model: CTRModel = self._engine.module
        self.micro_steps: int = self._engine.gradient_accumulation_steps()
        self.zero_stage = int(self._engine.zero_optimization_stage())

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
        """Of the groups with rate 1."""
        return self._engine.optimizer.param_groups[0]["lr"] / self._groups[0].rate

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        for group, own in zip(self._engine.optimizer.param_groups, self._groups, strict=True):
            group["lr"] = value * own.rate

    def decay_weights(self, value: float) -> None:
        """Set the weight decay, which a checkpoint brings with it, of all but vectors."""
        for group, own in zip(self._engine.optimizer.param_groups, self._groups, strict=True):
            if own.decays:
                group["weight_decay"] = value

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
        every_name = self.model.named_parameters(remove_duplicate=False)
        frozen = {name for name, parameter in every_name if not parameter.requires_grad}

        def write_trained(state_dict: Any, path: str) -> None:
            # DeepSpeed leaves out the first name of a weight with several: a tied table has two.
            if (module := state_dict.get("module")) is not None:
                kept = {name: value for name, value in module.items() if name not in frozen}
                state_dict = {**state_dict, "module": kept}
            write(state_dict, path)

        self._engine.checkpoint_engine.save = write_trained
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

    def keep_float32(self, read: Reader | None, ranks: Ranks) -> None:
        """Have the optimizer begin with these values, which the model holds rounded.

        All ranks must call this at once.

        Args:
            read: float32 values of the weights that train, by name; on rank 0.
        """
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                continue
            value = torch.empty(
                getattr(parameter, "ds_shape", parameter.shape),
                dtype=torch.float32,
                device=ranks.device,
            )
            if read is not None:
                value.copy_(read(name, parameter))
            dist.broadcast(value, 0)
            if (part := getattr(parameter, "ds_tensor", None)) is None:
                safe_set_full_fp32_param(parameter, value)
                continue
            size = part.numel()  # of each rank's part; the last one is filled up
            padded = nn.functional.pad(value.flatten(), (0, ranks.world * size - value.numel()))
            safe_set_local_fp32_param(parameter, padded[ranks.rank * size :][:size])

    def load(self, folder: Path, whole: bool) -> None:
        """Restore weights and optimizer from what as many ranks saved.

        Its hyperparameters stay those of this run.

        Args:
            whole: whether the files have all weights, none of them frozen.
        """
        with self._own_hyperparameters():
            self._load(folder, whole)

    def _load(self, folder: Path, whole: bool) -> None:
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
        """`load` from a checkpoint converted for any number of ranks."""
        self._engine._config.load_universal_checkpoint = True
        # DeepSpeed gives all groups the first one's.
        with self._own_hyperparameters(), _groups_without_a_part(self._engine.optimizer):
            self._load(folder, whole)
        self._engine._config.load_universal_checkpoint = False
        # There is one counter of steps, which each group would then advance. Fused AdamW wants it
        # beside the moments.
        for moments in self._engine.optimizer.optimizer.state.values():
            if isinstance(moments.get("step"), torch.Tensor):
                moments["step"] = moments["step"].to(moments["exp_avg"].device, copy=True)

    @contextmanager
    def _own_hyperparameters(self) -> Iterator[None]:
        """Have what the block loads leave them as they are."""
        optimizer = self._engine.optimizer
        hyperparameters = [
            {name: value for name, value in group.items() if name != "params"}
            for group in optimizer.param_groups
        ]
        yield
        for group, own in zip(optimizer.param_groups, hyperparameters, strict=True):
            group.update(own)


class _NoPart:
    """Stands in for the parameters of a group of which this rank holds no part."""

    _hp_mapping: _NoPart

    def __init__(self) -> None:
        self._hp_mapping = self

    def load_hp_checkpoint_state(self, *_: Any, **__: Any) -> None:
        """No step was counted."""

    def get_optim_state_keys(self) -> list[str]:
        return []


@contextmanager
def _groups_without_a_part(optimizer: Any) -> Iterator[None]:
    """Have ZeRO-1 and 2 of DeepSpeed load a group of fewer numbers than ranks.

    It takes the step from the first parameter that a rank holds a part of, and expects one.
    """
    name = "load_hp_checkpoint_state_from_checkpoint_dir"
    own = getattr(optimizer, name)

    def load(groups_name: str, folder: str) -> None:
        groups = getattr(optimizer, groups_name)
        without = [group for group in groups if all(p._hp_mapping is None for p in group)]
        for group in without:
            group.append(_NoPart())
            optimizer.param_names[group[-1]] = ""
        try:
            own(groups_name, folder)
        finally:
            for group in without:
                del optimizer.param_names[group.pop()]

    setattr(optimizer, name, load)
    try:
        yield
    finally:
        delattr(optimizer, name)


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


def _optimizer(groups: list[Group], training: TrainingConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        [
            {
                "params": group.parameters,
                "weight_decay": training.weight_decay if group.decays else 0.0,
                "lr": training.learning_rate * group.rate,
            }
            for group in groups
        ],
        lr=training.learning_rate,
        betas=training.betas,
        fused=True,  # one pass over memory, without temporaries
    )
