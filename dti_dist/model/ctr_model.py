"""The model that is trained: a causal LM's backbone, the isolation mask, and a head on [SUM]."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from dti_dist.attention import backend as attention_backend
from dti_dist.attention.backend import AttentionPlans, AttentionScheme, KeptStates
from dti_dist.attention.flex import compiled_graphs
from dti_dist.attention.layout import PackLayout, SharedBody
from dti_dist.attention.policies import forgetting_weights, layer_windows, sees_prefix
from dti_dist.config import AttentionConfig
from dti_dist.data.layout import Pack
from dti_dist.model.families import (
    check_family,
    check_head,
    initial_memory,
    logits_divisor,
    make_rotary_tables_exact,
    rotary_layers,
)


class LabelWordHead(nn.Module):
    """The language-model head, asked for the label words alone.

    Computing two rows of the vocabulary's logits instead of all gives the same softmax over the
    two words at a small part of the cost.
    """

    def __init__(self, lm_head: nn.Linear, label_ids: tuple[int, int], divisor: float = 1.0):
        super().__init__()
        self.weight = lm_head.weight
        self.divisor = divisor
        self.label_ids: torch.Tensor
        self.register_buffer("label_ids", torch.tensor(label_ids), persistent=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[B, S, hidden] → [B, S] float32: the logit of label 1 minus that of label 0."""
        no, yes = _at_least_float32(F.embedding(self.label_ids, self.weight))
        return _at_least_float32(hidden) @ (yes - no) / self.divisor


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
    """Packs in, one logit per [SUM] slot out.

    Args:
        causal_lm: a transformers causal LM of a supported family.
        head: ``yes_no`` or ``linear``.
        label_ids: token ids of label 0 and label 1.
        n: context interactions.
        attention: policy, positions and backend.
        prefix_length: tokens of the prompt's prefix.
        longest_span: most tokens that a target looks back on, where known.
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
    ):
        super().__init__()
        check_family(causal_lm.config, longest_span)
        check_head(causal_lm.config, head)
        attention_backend.register()
        self.config = causal_lm.config
        self.backbone = causal_lm.base_model
        self.backbone.set_attn_implementation("dti")
        make_rotary_tables_exact(self.backbone.rotary_emb)
        self.head_kind = head
        self.head: LabelWordHead | LinearHead = (
            LabelWordHead(causal_lm.get_output_embeddings(), label_ids, logits_divisor(self.config))
            if head == "yes_no"
            else LinearHead(self.config.hidden_size)
        )
        self.scheme = self._scheme(n, attention, prefix_length, longest_span)
        _feed_forward_slots_alone(self.backbone.layers[-1])
        if self.scheme.forgetting is not None:
            self.backbone.layers[0].register_forward_pre_hook(_keep_initial, with_kwargs=True)

    def _scheme(
        self, n: int, attention: AttentionConfig, prefix_length: int, longest_span: int | None
    ) -> AttentionScheme:
        isolated, reset = attention.policy == "isolated", attention.policy == "reset"
        layers = self.backbone.layers
        body_sees_prefix, readout_sees_prefix = sees_prefix(attention.policy, prefix_length)
        return AttentionScheme(
            windows=layer_windows(
                attention.policy, n, self.config.num_hidden_layers, attention.budget
            ),
            positions=attention.positions,
            isolated=isolated,
            forgetting=(
                forgetting_weights(n, attention.forgetting.strength, attention.forgetting.shape)
                if reset
                else None
            ),
            initial_memory=(
                (lambda layer, initial: initial_memory(layers[layer], initial)) if reset else None
            ),
            rotary_layers=rotary_layers(self.backbone),
            rotary_scaling=float(self.backbone.rotary_emb.attention_scaling),
            heads=self.config.num_attention_heads,
            body_sees_prefix=body_sees_prefix,
            readout_sees_prefix=readout_sees_prefix,
            prefix_length=prefix_length,
            longest_span=longest_span,
            backend=attention.backend,
        )

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
        """[B, S] float32 logits of label 1; those of unused slots are finite and meaningless.

        Args:
            kept: under `isolated`, the states of the samples' tokens; only slots are run then.
        """
        plans = AttentionPlans(batch.layout, self.scheme, self._inverse_frequencies, kept)
        tokens = batch.tokens if kept is None else batch.tokens[:, batch.layout.length :]
        return self.head(self._hidden(tokens, plans)[:, plans.body_length :])

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
        return self.backbone(
            input_ids=tokens, position_ids=plans.positions, attention_plans=plans, use_cache=False
        ).last_hidden_state


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


def click_loss(logits: torch.Tensor, batch: Pack) -> torch.Tensor:
    """Sum of the binary cross-entropies of the used [SUM] slots, in float32."""
    losses = F.binary_cross_entropy_with_logits(logits, batch.labels, reduction="none")
    return (losses * batch.used).sum()
