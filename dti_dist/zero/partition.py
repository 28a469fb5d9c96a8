"""A model kept in parts, one on each rank: its weights on their way there, and what it predicts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dti_dist.config import TrainingConfig
from dti_dist.model.weights import Placement
from dti_dist.ranks import Ranks
from dti_dist.zero.configuration import deepspeed_config, import_deepspeed, read_deepspeed

T = TypeVar("T")
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def for_predictions(training: TrainingConfig, dtype: torch.dtype, ranks: Ranks) -> Placement:
    """As the run's ZeRO stage says: all weights on each rank, or under stage 3 a part of them."""
    if ranks.world == 1 or read_deepspeed(training.deepspeed)["zero_optimization"]["stage"] < 3:
        return Placement(dtype, ranks.device)
    (precision,) = (name for name, of in _DTYPES.items() if of == dtype)
    step = {"micro_batch_packs": 1, "global_batch_packs": ranks.world}  # none is taken
    return Partitioned(training.model_copy(update={"precision": precision, **step}), ranks)


class Partitioned(Placement):
    """Weights read by rank 0, sent to all, and kept as ZeRO's stage says: whole, or a part each."""

    def __init__(self, training: TrainingConfig, ranks: Ranks):
        super().__init__(_DTYPES[training.precision], ranks.device)
        self._ranks = ranks
        self._config = deepspeed_config(training, ranks.world)
        self._partitions = self._config["zero_optimization"]["stage"] == 3
        self._first: Any = None
        self._staging = torch.empty(0, dtype=self.dtype, device=self.device)

    def by_reader(self, make: Callable[[], T]) -> T | None:
        made: list[T] = []
        self._ranks.each(lambda: made.append(make()) if self._ranks.is_main else None)
        return made[0] if made else None

    def place(
        self, shape: torch.Size, read: Callable[[], Tensor], dtype: torch.dtype | None = None
    ) -> nn.Parameter:
        parameter = nn.Parameter(self._memory(shape, dtype or self.dtype))
        if self._ranks.is_main:
            parameter.data.copy_(read())
        if not self._partitions:
            dist.broadcast(parameter.data.view(torch.uint8), 0)
        elif self._first is None:
            self._first = parameter
            import_deepspeed().zero.Init(
                module=nn.ParameterList([parameter]), config_dict_or_path=self._config
            )
        else:
            self._first.convert_to_zero_parameters(param_list=[parameter])
        if self._partitions:
            self._clear_padding(parameter)
        return parameter

    def _clear_padding(self, parameter: Any) -> None:
        """DeepSpeed fills the last part up with whatever is in memory, and checkpoints have it."""
        part = parameter.ds_tensor
        own = parameter.ds_numel - self._ranks.rank * part.numel()
        part.data[max(own, 0) :].zero_()

    def predictor(self, model: nn.Module) -> Callable[[Any], Tensor]:
        """All ranks must call it equally often: each gathers the parts that it needs."""
        engine, *_ = import_deepspeed().initialize(
            model=model, config=self._config, dist_init_required=False
        )
        engine.eval()
        return engine

    def _memory(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """For a whole tensor. Of one that is then partitioned it is used again for the next.

        If it were freed instead, what stays of each would lie between the gaps in glibc's heap.
        """
        if not self._partitions:
            return torch.empty(shape, dtype=dtype, device=self.device)
        assert dtype == self.dtype, "ZeRO-3 partitions weights of one dtype"
        if self._staging.numel() < shape.numel():
            self._staging = torch.empty(shape.numel(), dtype=self.dtype, device=self.device)
        return self._staging[: shape.numel()].view(shape)
