"""The model families whose attention is known to follow the isolation mask, and how they differ."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dti_dist.errors import UserError

SUPPORTED = (
    "gemma",
    "granite",
    "llama",
    "mistral",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
)

# Rotary tables that are a function of the position alone. The others, dynamic and longrope, choose
# frequencies by the longest position of the batch.
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def check_family(config: Any, longest_span: int | None = None) -> None:
    """Refuse what the isolation mask can't express.

    Args:
        config: a transformers config.
        longest_span: tokens that a query may look back, where known.

    Raises:
        UserError: for another family, for rotary positions that depend on the batch, or for layers
            whose own sliding window is shorter than what a target must see.
    """
    if config.model_type not in SUPPORTED:
        raise UserError(
            f"Model family {config.model_type!r} is not supported. "
            f"Supported: {', '.join(SUPPORTED)}."
        )
    rope_type = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope_type not in _ROPE_TYPES:
        raise UserError(
            f"This {config.model_type} model has rotary positions of type {rope_type!r}, which "
            "choose their frequencies by the longest position of a batch, so a prediction would "
            f"depend on the other samples of its batch. Choose a model with "
            f"one of: {', '.join(_ROPE_TYPES)}."
        )
    window = _sliding_window(config)
    if window is not None and longest_span is not None and longest_span > window:
        raise UserError(
            f"This {config.model_type} model has layers that see {window} tokens back, but a "
            f"target must see up to {longest_span} tokens. Lower sample.context or "
            "template.max_item_tokens."
        )


def _sliding_window(config: Any) -> int | None:
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and "sliding_attention" not in kinds:
        return None
    if getattr(config, "use_sliding_window", True) is False:
        return None
    return getattr(config, "sliding_window", None)


def rotary_layers(backbone: Any) -> tuple[bool, ...]:
    """Whether each layer rotates queries and keys; SmolLM3 has layers without positions."""
    return tuple(bool(getattr(layer.self_attn, "use_rope", True)) for layer in backbone.layers)


def make_rotary_tables_exact(rotary: Any) -> None:
    """Let a rotary embedding compute its angles in float64; its tables keep their dtype.

    Transformers' float32 angles are rounded by 3e-5 at position 1,000, so a target far into a
    streaming prompt would not be rotated quite as in its sliding-window prompt.
    """

    def exact(
        module: Any,
        args: tuple[Tensor, ...],
        kwargs: dict[str, Tensor],
        rounded: tuple[Tensor, ...],
    ) -> tuple[Tensor, Tensor]:
        positions = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
        angles = positions[..., None].double() * module.inv_freq.double()
        angles = torch.cat([angles, angles], dim=-1)
        scaling, dtype = module.attention_scaling, rounded[0].dtype
        return (angles.cos() * scaling).to(dtype), (angles.sin() * scaling).to(dtype)

    rotary.register_forward_hook(exact, with_kwargs=True)


def logits_divisor(config: Any) -> float:
    """What a family divides its vocabulary logits by; Granite does."""
    return float(getattr(config, "logits_scaling", 1.0))


def initial_memory(layer: Any, initial: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values that a layer makes of initial embeddings: its norm, its projections.

    Args:
        layer: a decoder layer.
        initial: [B, L, hidden] what the first layer reads.

    Returns:
        Un-rotated keys, and values, [B, L, Hkv, D] each.
    """
    attention = layer.self_attn
    norm = getattr(layer, "input_layernorm", None)  # OLMo 2 normalises behind the attention
    states = initial if norm is None else norm(initial)
    heads, width = attention.config.num_key_value_heads, attention.head_dim
    if hasattr(attention, "qkv_proj"):
        keys, values = attention.qkv_proj(states)[..., -2 * heads * width :].chunk(2, dim=-1)
    else:
        keys, values = attention.k_proj(states), attention.v_proj(states)
    by_head = (*initial.shape[:-1], heads, width)
    if hasattr(attention, "k_norm"):  # of a whole row in OLMo 2, of each head in Qwen3
        whole_row = attention.config.model_type == "olmo2"
        keys = attention.k_norm(keys if whole_row else keys.reshape(by_head))
    return keys.reshape(by_head), values.reshape(by_head)
