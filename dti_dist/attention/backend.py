"""The attention of a whole model: plans made once per batch, and the way into transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dti_dist.attention.chunked import ChunkedPlan, chunked_attention
from dti_dist.attention.dense import dense_attention, dense_mask
from dti_dist.attention.flex import FlexPlan, flex_attention_call
from dti_dist.attention.intervals import (
    LayerWindows,
    PackLayout,
    VisibleIntervals,
    body_intervals,
    readout_intervals,
)
from dti_dist.errors import UserError, nearest

ATTENTION_NAME = "dti"

# Slots of a readout chunk lie an interaction apart, so its keys grow with its slots much faster
# than those of a body chunk. Measured at 14 tokens an interaction: 32 is the fastest.
_READOUT_CHUNK = 32


@dataclass(frozen=True)
class _Backend:
    """How a backend plans body and readout attention, and runs a plan."""

    plan_body: Callable[[VisibleIntervals], Any]
    plan_readout: Callable[[VisibleIntervals], Any]
    attention: Callable[[Tensor, Tensor, Tensor, Any, float], Tensor]


_BACKENDS = {
    "flex": _Backend(FlexPlan.build, FlexPlan.build, flex_attention_call),
    "chunked": _Backend(
        ChunkedPlan.build,
        lambda intervals: ChunkedPlan.build(intervals, chunk=_READOUT_CHUNK),
        chunked_attention,
    ),
    "dense": _Backend(dense_mask, dense_mask, dense_attention),
}


class AttentionPlans:
    """The attention of every layer for one batch of packs.

    Layers with the same window share a plan.

    Args:
        layout: of the batch, on the device of the model.
        windows: of every layer.
        backend: ``flex`` (GPUs), ``chunked`` (CPU), ``dense`` (tests), or ``auto``: by device.
        body_sees_prefix: whether body tokens see their sample's prefix.
        readout_sees_prefix: whether [SUM] does.

    Raises:
        UserError: the backend is unknown, or cannot run these lengths.
    """

    def __init__(
        self,
        layout: PackLayout,
        windows: LayerWindows,
        backend: str = "auto",
        *,
        body_sees_prefix: bool,
        readout_sees_prefix: bool,
    ) -> None:
        if backend == "auto":
            backend = "flex" if layout.unit.is_cuda else "chunked"
        if backend not in _BACKENDS:
            raise UserError(
                f"Expected an attention backend among auto, {', '.join(_BACKENDS)}; found "
                f"{backend!r}.{nearest(backend, ['auto', *_BACKENDS])}"
            )
        self._backend = _BACKENDS[backend]
        self._windows = windows
        self._tokens = tuple(layout.unit.shape)
        self.body_length = layout.body_length
        self._body = {
            w: self._backend.plan_body(body_intervals(layout, w, body_sees_prefix))
            for w in set(windows.body)
        }
        self._readout = {}
        if self.body_length < layout.unit.shape[1]:
            self._readout = {
                w: self._backend.plan_readout(readout_intervals(layout, w, readout_sees_prefix))
                for w in set(windows.readout)
            }

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Attention of one layer over whole packs.

        Args:
            layer: index of the layer.
            q: [B, Hq, T, D].
            k, v: [B, Hkv, T, D], Hq a multiple of Hkv.
            scale: factor of the scores.

        Returns:
            [B, Hq, T, D].

        Raises:
            UserError: q or k are not of the B packs of T tokens that the plans were made for.
        """
        for name, x in (("queries", q), ("keys", k)):
            if (x.shape[0], x.shape[2]) != self._tokens:
                raise UserError(
                    f"Expected {name} of {self._tokens[0]} packs of {self._tokens[1]} tokens, as "
                    f"in the pack layout; found {x.shape[0]} of {x.shape[2]}. Make the "
                    f"AttentionPlans from this batch's layout, and call the model with "
                    f"use_cache=False."
                )
        length, attention = self.body_length, self._backend.attention
        body_plan = self._body[self._windows.body[layer]]
        body = attention(q[:, :, :length], k[:, :, :length], v[:, :, :length], body_plan, scale)
        if not self._readout:
            return body
        readout_plan = self._readout[self._windows.readout[layer]]
        readout = attention(q[:, :, length:], k, v, readout_plan, scale)
        return torch.cat([body, readout], dim=2)


# What some models ask of an attention, by keyword, that would change the scores.
_UNSUPPORTED = {
    "softcap": "soft-capped attention scores (softcap)",
    "s_aux": "attention sinks (s_aux)",
    "position_bias": "an attention position bias (position_bias)",
}


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention that transformers calls as ``attn_implementation="dti"``.

    Call the model with ``attention_plans=AttentionPlans(...)`` and ``use_cache=False``; the extra
    keyword argument reaches every layer.

    Args:
        module: the layer's attention, with its ``layer_idx``.
        query: [B, Hq, T, D].
        key, value: [B, Hkv, T, D].
        attention_mask: None; the plans are the mask.
        scaling: factor of the scores; D^-0.5 by default.
        dropout: 0.

    Returns:
        [B, T, Hq, D], and no attention weights.

    Raises:
        UserError: the plans are missing, or the model asks for what they cannot do.
    """
    plans = kwargs.get("attention_plans")
    if plans is None:
        raise UserError(
            f"Attention {ATTENTION_NAME!r} found no attention_plans. Call the model as "
            f"model(..., attention_plans=AttentionPlans(...)), with the plans of the batch."
        )
    for name, what in _UNSUPPORTED.items():
        if kwargs.get(name) is not None:
            raise UserError(
                f"Attention {ATTENTION_NAME!r} does not support {what}, which "
                f"{type(module).__name__} uses. Choose a model without."
            )
    if dropout > 0:
        raise UserError(
            f"Attention {ATTENTION_NAME!r} does not support dropout; found {dropout}. Set "
            f"attention_dropout=0 in the model's config."
        )
    if attention_mask is not None:
        raise UserError(
            f"Attention {ATTENTION_NAME!r} takes its mask from attention_plans; found an "
            f"attention_mask of shape {tuple(attention_mask.shape)} too. Leave it out."
        )
    sliding_window = kwargs.get("sliding_window")
    if sliding_window is not None and sliding_window < plans.body_length:
        raise UserError(
            f"{type(module).__name__} has a sliding window of {sliding_window} tokens, shorter "
            f"than the {plans.body_length} body tokens of a pack. Use packs of at most "
            f"{sliding_window} body tokens, or a model without a sliding window."
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer: Any = module.layer_idx
    out = plans.attend(layer, query, key, value, scale)
    return out.transpose(1, 2).contiguous(), None


def register() -> None:
    """Make ``attn_implementation="dti"`` known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION_NAME, attention_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, _no_mask)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """The plans are the mask, so transformers need not build one."""
