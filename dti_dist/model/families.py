"""The model families whose attention is known to follow the isolation mask."""

from __future__ import annotations

from typing import Any

from dti_dist.errors import UserError

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")


def check_family(config: Any, longest_span: int | None = None) -> None:
    """Refuse what the isolation mask can't express.

    Args:
        config: a transformers config.
        longest_span: tokens that a query may look back, where known.

    Raises:
        UserError: for another family, or for layers whose own sliding window is shorter than what
            a target must see.
    """
    if config.model_type not in SUPPORTED:
        raise UserError(
            f"Model family {config.model_type!r} is not supported. "
            f"Supported: {', '.join(SUPPORTED)}."
        )
    kinds = getattr(config, "layer_types", None)
    sliding = kinds is None or "sliding_attention" in kinds
    window = getattr(config, "sliding_window", None) if sliding else None
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    if window is not None and longest_span is not None and longest_span > window:
        raise UserError(
            f"This {config.model_type} model has layers that see {window} tokens back, but a "
            f"target must see up to {longest_span} tokens. Lower sample.context or "
            "template.max_item_tokens."
        )
