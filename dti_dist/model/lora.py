"""Low-rank adapters (LoRA, QLoRA) beside frozen weights, with [SUM]'s embedding trained."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from dti_dist.config import LoraConfig
from dti_dist.errors import UserError, nearest
from dti_dist.model.ctr_model import CTRModel
from dti_dist.model.nf4 import NF4, Linear4bit, require_bitsandbytes
from dti_dist.model.weights import BaseWeights, Reader, Stored, mark_stored, stored


def require_packages(config: LoraConfig) -> None:
    """Raises UserError where peft is missing, or bitsandbytes and the config asks for 4 bits."""
    if config.load_in_4bit:
        require_bitsandbytes()
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"model.lora.rank needs the package peft, and {error.name!r} is missing. Install it "
            "with: pip install 'dti-dist[lora]'. Or set model.lora.rank=0 to train all weights."
        ) from error


class SumEmbedding(nn.Module):
    """Input embeddings whose row of [SUM] is a parameter of its own, so that it alone can train.

    The row starts as the table's, and is scaled as the table's own forward pass scales (Gemma).
    """

    def __init__(self, table: Any, sum_id: int):
        super().__init__()
        self.table = table
        self.num_embeddings: int = table.num_embeddings
        self.row = nn.Parameter(table.weight[sum_id].detach().clone())
        if (where := stored(table.weight)) is not None:
            mark_stored(self.row, Stored(where.name, rows=sum_id))
        self.sum_id = sum_id

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[B, T] token ids → [B, T, hidden]."""
        scale = getattr(self.table, "embed_scale", None)
        row = self.row if scale is None else self.row * scale.to(self.row.dtype)
        return torch.where((ids == self.sum_id)[..., None], row, self.table(ids))


def add_adapters(model: CTRModel, config: LoraConfig, sum_id: int, seed: int) -> None:
    """Freeze the model; add what trains: adapters, [SUM]'s embedding, and what is new in the
    head and beside it.

    With `load_in_4bit` the decoder's frozen linear layers are quantized when the model is filled.

    The head `yes_no` stays frozen: it is the vocabulary's, and often the input embeddings too. At
    the start the adapters add nothing, so the model computes what it did before.

    Raises:
        UserError: for target modules that the decoder layers lack.
    """
    import peft

    backbone = model.backbone
    adapters = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=_target_modules(backbone, config.target_modules),
    )
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(adapters, backbone)
    if config.load_in_4bit:
        _keep_in_4_bits(backbone.layers, NF4(config.double_quant))
    backbone.set_input_embeddings(SumEmbedding(backbone.get_input_embeddings(), sum_id))
    for parameter in model.new:
        parameter.requires_grad_(True)


def _target_modules(backbone: Any, wanted: list[str] | None) -> list[str]:
    known = sorted(
        {
            name.rpartition(".")[2]
            for name, module in backbone.layers.named_modules()
            if isinstance(module, nn.Linear)
        }
    )
    for name in wanted or []:
        if name not in known:
            raise UserError(
                f"model.lora.target_modules: the decoder layers have no linear layer {name!r}."
                f"{nearest(name, known)} Known: {', '.join(known)}."
            )
    return wanted or known


def _keep_in_4_bits(layers: nn.Module, form: NF4) -> None:
    """Have the frozen linear layers quantized when they are filled."""
    for parent in list(layers.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear) and not layer.weight.requires_grad:
                weight: Any = layer.weight
                where = stored(weight)
                assert where is not None, "only a hollow model is quantized as it is filled"
                mark_stored(weight, replace(where, kept_as=form))
                setattr(parent, name, Linear4bit(layer))


def is_adapted(model: CTRModel) -> bool:
    return isinstance(model.backbone.get_input_embeddings(), SumEmbedding)


def merged(model: CTRModel, name: str, read: Reader) -> torch.Tensor:
    """A weight of the model without adapters: with what its adapters add, and [SUM]'s row in place.

    Args:
        model: with adapters or without; those that train have their values.
        name: of the weight in a model without adapters.
        read: values of the weights beneath.
    """
    owner_name, _, own = name.rpartition(".")
    owner: Any = model.get_submodule(owner_name)
    if not is_adapted(model):
        return read(name, getattr(owner, own))
    from peft.tuners.lora import LoraLayer

    embeddings = model.backbone.get_input_embeddings()
    if isinstance(owner, LoraLayer):
        value = read(f"{owner_name}.base_layer.{own}", getattr(owner.get_base_layer(), own))
        return value + owner.get_delta_weight("default") if own == "weight" else value
    if owner is embeddings:
        name, owner = f"{owner_name}.table.{own}", embeddings.table
    parameter = getattr(owner, own)
    value = read(name, parameter)
    if parameter is embeddings.table.weight:
        value = value.clone()
        value[embeddings.sum_id] = embeddings.row
    return value


def base_fingerprint(model: CTRModel, weights: BaseWeights) -> str | None:
    """Tells base models apart by their frozen decoder layers; None where all weights train.

    Checkpoints leave frozen weights out, so they are right only with the base model of the run.

    Args:
        weights: what `model` is filled from.
    """
    digest, frozen = hashlib.sha256(), False
    for name, parameter in model.backbone.layers.named_parameters():
        where = stored(parameter)
        if not parameter.requires_grad and where is not None:
            frozen = True
            shape, sample = weights.sample(where.name)
            digest.update(f"{name} {shape}".encode())
            digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16] if frozen else None
