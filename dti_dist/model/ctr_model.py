"""The model that is trained: a causal LM's backbone, the isolation mask, and a head on [SUM]."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from dti_dist.attention import backend as attention_backend
from dti_dist.attention.backend import AttentionPlans
from dti_dist.attention.intervals import LayerWindows, PackLayout, layer_windows
from dti_dist.config import AttentionConfig
from dti_dist.data.stream import Batch
from dti_dist.model.families import check_family


class LabelWordHead(nn.Module):
    """The language-model head, asked for the label words alone.

    Computing two rows of the vocabulary's logits instead of all gives the same softmax over the
    two words at a small part of the cost.
    """

    def __init__(self, lm_head: nn.Linear, label_ids: tuple[int, int]):
        super().__init__()
        self.weight = lm_head.weight
        self.label_ids: torch.Tensor
        self.register_buffer("label_ids", torch.tensor(label_ids), persistent=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[B, S, hidden] → [B, S] float32: the logit of label 1 minus that of label 0."""
        no, yes = _at_least_float32(F.embedding(self.label_ids, self.weight))
        return _at_least_float32(hidden) @ (yes - no)


class LinearHead(nn.Module):
    """One new linear layer on [SUM]'s last hidden state."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, hidden_size))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[B, S, hidden] → [B, S] float32 logits."""
        return _at_least_float32(hidden) @ _at_least_float32(self.weight[0])


def _at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class CTRModel(nn.Module):
    """Packs in, one logit per [SUM] slot out."""

    def __init__(
        self,
        causal_lm: Any,
        head: str,
        label_ids: tuple[int, int],
        n: int,
        attention: AttentionConfig,
        has_prefix: bool = False,
        longest_span: int | None = None,
    ):
        super().__init__()
        check_family(causal_lm.config, longest_span)
        attention_backend.register()
        self.config = causal_lm.config
        self.backbone = causal_lm.base_model
        self.backbone.set_attn_implementation("dti")
        self.head_kind = head
        self.head: LabelWordHead | LinearHead = (
            LabelWordHead(causal_lm.get_output_embeddings(), label_ids)
            if head == "yes_no"
            else LinearHead(causal_lm.config.hidden_size)
        )
        self.windows: LayerWindows = layer_windows(
            attention.policy, n, causal_lm.config.num_hidden_layers, attention.budget
        )
        self.attention_backend = attention.backend
        self.has_prefix = has_prefix

    def enable_activation_checkpointing(self) -> None:
        backbone = self.backbone
        # Renamed in transformers 5.2x; the old name warns there.
        enable = getattr(
            backbone, "activation_checkpointing_enable", backbone.gradient_checkpointing_enable
        )
        enable({"use_reentrant": False})

    def forward(self, batch: Batch) -> torch.Tensor:
        """[B, S] float32 logits of label 1; those of unused slots are finite and meaningless."""
        layout = PackLayout(
            unit=batch.unit,
            unit_start=batch.unit_start,
            unit_first=batch.unit_first,
            prefix_start=batch.prefix_start,
            prefix_end=batch.prefix_end,
            readout_end=batch.readout_end,
        )
        plans = AttentionPlans(
            layout,
            self.windows,
            self.attention_backend,
            body_sees_prefix=self.has_prefix,
            readout_sees_prefix=self.has_prefix,
        )
        hidden = self.backbone(
            input_ids=batch.tokens,
            position_ids=batch.positions,
            attention_plans=plans,
            use_cache=False,
        ).last_hidden_state
        return self.head(hidden[:, layout.body_length :])


def click_loss(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Sum of the binary cross-entropies of the used [SUM] slots, in float32."""
    losses = F.binary_cross_entropy_with_logits(logits, batch.labels, reduction="none")
    return (losses * batch.weights).sum()
