"""Groups of parameters that share a learning rate and weight decay."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from dti_dist.config import TrainingConfig
from dti_dist.model.ctr_model import CTRModel
from dti_dist.model.heads import task_parameter

_NEW_RATE_FACTOR = 30.0  # with a pretrained model


@dataclass(frozen=True)
class Group:
    """
    Attributes:
        rate: its learning rate over training.learning_rate.
        decays: whether weight decay applies, as to all but vectors.
    """

    parameters: list[nn.Parameter]
    rate: float
    decays: bool


def groups_of(model: CTRModel, training: TrainingConfig) -> list[Group]:
    """The groups of what trains: by layer with training.layer_decay, and what is new.

    Their number and order do not depend on learning rates, so that a run can go on with others.
    A layer as wide as the model (the head `linear`, vectors of tasks) does not count as new: at a
    rate that suits a number or a small table it would be far off within a few steps.
    """
    layers, of_new = len(model.backbone.layers), training.new_rate_factor
    if of_new is None:
        of_new = _NEW_RATE_FACTOR if model.is_pretrained else 1.0
    new = {
        p for name, p in model.extra.items() if not name.startswith(f"head.{task_parameter('')}")
    }
    found: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        height = layers + 2 if parameter in new else _height(name, layers)
        if training.layer_decay == 1 and height <= layers + 1:
            height = 0
        decays = len(getattr(parameter, "ds_shape", parameter.shape)) >= 2
        found.setdefault((height, decays), []).append(parameter)
    return [
        Group(
            parameters,
            of_new if height > layers + 1 else training.layer_decay ** (layers + 1 - height),
            decays,
        )
        for (height, decays), parameters in sorted(found.items(), key=lambda entry: entry[0][0])
    ]


def _height(name: str, layers: int) -> int:
    """0 for input embeddings, from 1 on for decoder layers, and one more for what follows them."""
    if "embed_tokens" in name:
        return 0
    layer = re.search(r"\.layers\.(\d+)\.", name)
    return int(layer[1]) + 1 if layer else layers + 1
