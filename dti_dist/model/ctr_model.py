"""The model that is trained: a causal LM's backbone, the isolation mask, and a head on [SUM]."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from dti_dist.attention import backend as attention_backend
from dti_dist.attention.backend import AttentionPlans, KeptStates
from dti_dist.attention.flex import compiled_graphs
from dti_dist.attention.layout import PackLayout, SharedBody
from dti_dist.attention.scheme import POSITIONS, AttentionScheme
from dti_dist.config import AttentionConfig
from dti_dist.data.layout import Pack
from dti_dist.model.families import (
    check_family,
    initial_memory,
    make_rotary_tables_exact,
    rotary_layers,
)
from dti_dist.model.heads import HEADS
from dti_dist.model.item_vectors import ItemVectors


class CTRModel(nn.Module):
    """Packs in, one logit per [SUM] slot and task out.

    Args:
        causal_lm: a transformers causal LM of a supported family.
        head: a name in heads.HEADS.
        label_ids: token ids of label 0 and label 1.
        n: context interactions.
        attention: policy, positions and backend.
        prefix_length: tokens of the prompt's prefix.
        longest_span: most tokens that a target looks back on, where known.
        keep_negatives: the share of label 0 that is trained on. In evaluation mode logits of the
            main task are of all: the odds of label 1 are by so much lower.
        further_tasks: names of what is predicted beside the main task.
        items: vectors of items, if they have any.
    """

    def __init__(
        self,
        causal_lm: Any,
        head: str,
        label_ids: tuple[int, int],
        n: int,
        attention: AttentionConfig,
        prefix_length: int = 0,
        longest_span: int | None = None,
        keep_negatives: float | None = None,
        further_tasks: Sequence[str] = (),
        items: ItemVectors | None = None,
    ):
        super().__init__()
        check_family(causal_lm.config, longest_span)
        HEADS[head].check(causal_lm.config)
        attention_backend.register()
        self.config = causal_lm.config
        self.backbone = causal_lm.base_model
        self.backbone.set_attn_implementation("dti")
        make_rotary_tables_exact(self.backbone.rotary_emb)
        self.head = HEADS[head].of(causal_lm, label_ids)
        self.correction = math.log(keep_negatives) if keep_negatives else 0.0
        self.head.add_tasks(further_tasks)
        self.items = items
        self.is_pretrained = False
        self.scheme = self._scheme(n, attention, prefix_length, longest_span)
        _feed_forward_slots_alone(self.backbone.layers[-1])
        if self.scheme.policy.forgets:
            self.backbone.layers[0].register_forward_pre_hook(_keep_initial, with_kwargs=True)

    def _scheme(
        self, n: int, attention: AttentionConfig, prefix_length: int, longest_span: int | None
    ) -> AttentionScheme:
        layers = self.backbone.layers
        policy = attention.chosen_policy
        memory = (
            (lambda layer, initial: initial_memory(layers[layer], initial))
            if policy.forgets
            else None
        )
        return AttentionScheme(
            policy=policy,
            n=n,
            layers=self.config.num_hidden_layers,
            positions=POSITIONS[attention.positions],
            prefix_length=prefix_length,
            initial_memory=memory,
            rotary_layers=rotary_layers(self.backbone),
            rotary_scaling=float(self.backbone.rotary_emb.attention_scaling),
            heads=self.config.num_attention_heads,
            longest_span=longest_span,
            backend=attention.backend,
        )

    def begin_at(self, label_rates: Sequence[float], pretrained: bool) -> None:
        """Have training begin with each task's label rate as its predictions.

        Args:
            pretrained: whether the backbone is.
        """
        self.is_pretrained = pretrained
        self.head.begin_at(label_rates, pretrained)

    @property
    def extra(self) -> dict[str, nn.Parameter]:
        """By name what no class of transformers has room for: of the head all but its weight, and
        the vectors of items."""
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if name.startswith(("head.", "items.")) and name != "head.weight"
        }

    @property
    def new(self) -> list[nn.Parameter]:
        """What a pretrained model lacks; adapters and [SUM]'s embedding aside."""
        return [*self.extra.values(), *([self.head.weight] if self.head.is_new else [])]

    @property
    def attention_graphs(self) -> int:
        """How many graphs this process has compiled for FlexAttention; 0 on the chunked path."""
        return compiled_graphs()

    def enable_activation_checkpointing(self) -> None:
        backbone = self.backbone
        # Renamed in transformers 5.2x; the old name warns there.
        enable = getattr(
            backbone, "activation_checkpointing_enable", backbone.gradient_checkpointing_enable
        )
        enable({"use_reentrant": False})

    def forward(self, batch: Pack, kept: KeptStates | None = None) -> torch.Tensor:
        """[B, S] float32 logits of label 1; those of unused slots are finite and meaningless. With
        further tasks [B, S, tasks], the main one first.

        Args:
            kept: under `isolated`, the states of the samples' tokens; only slots are run then.
        """
        plans = AttentionPlans(batch.layout, self.scheme, self._inverse_frequencies, kept)
        tokens = batch.tokens if kept is None else batch.tokens[:, batch.layout.length :]
        logits = self.head(self._hidden(tokens, plans)[:, plans.body_length :])
        if self.training or not self.correction:
            return logits
        if not self.head.tasks:
            return logits + self.correction
        return torch.cat([logits[..., :1] + self.correction, logits[..., 1:]], dim=-1)

    def states(self, tokens: torch.Tensor, body: SharedBody) -> list[torch.Tensor]:
        """What [SUM] reads of isolated interactions in each layer: [B · Lb, Hkv, 2 D] each.

        Args:
            tokens: [B, Lb] ids of the interactions' tokens.
            body: how they lie; `source` is not read.
        """
        assert self.scheme.isolated, "states of interactions depend on what is before them"
        layout = PackLayout.of_shared_body(body.to(tokens.device))
        plans = AttentionPlans(layout, self.scheme, self._inverse_frequencies, record=True)
        self._hidden(tokens, plans)
        assert plans.recorded is not None
        return plans.recorded

    @property
    def _inverse_frequencies(self) -> torch.Tensor:
        return self.backbone.rotary_emb.inv_freq

    def _hidden(self, tokens: torch.Tensor, plans: AttentionPlans) -> torch.Tensor:
        read = {"input_ids": tokens}
        if self.items is not None:
            read = {"inputs_embeds": self.items(tokens, self.backbone.get_input_embeddings())}
        return self.backbone(
            **read, position_ids=plans.positions, attention_plans=plans, use_cache=False
        ).last_hidden_state


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the parameters but not the buffers: rotary frequencies need float32.

    Quantized ones stay as they are.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def _feed_forward_slots_alone(last_layer: Any) -> None:
    """Spare the body the last layer's feed-forward part: only [SUM] is read behind it."""
    body = {"length": 0}

    def note_length(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        body["length"] = kwargs["attention_plans"].body_length

    last_layer.register_forward_pre_hook(note_length, with_kwargs=True)
    last_layer.mlp.register_forward_pre_hook(lambda mlp, args: (args[0][:, body["length"] :],))
    last_layer.mlp.register_forward_hook(
        lambda mlp, args, out: F.pad(out, (0, 0, body["length"], 0))
    )


def _keep_initial(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before the first layer: what it reads is what `reset` forgets toward."""
    plans: AttentionPlans = kwargs["attention_plans"]
    plans.initial = args[0] if args else kwargs["hidden_states"]
