"""The attention of a whole model: plans made once per batch, and the way into transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dti_dist.attention.chunked import ChunkedPlan, chunked_attention
from dti_dist.attention.dense import DensePlan, dense_attention
from dti_dist.attention.flex import FlexPlan, flex_attention_call
from dti_dist.attention.intervals import (
    VisibleIntervals,
)
from dti_dist.attention.layout import PackLayout, SharedBody
from dti_dist.attention.readout import (
    ProfileReading,
    ScoreBias,
    Turn,
    alibi_slopes,
    in_sample_order,
    read_shared,
    restarted_positions,
    score_bias,
    states_of,
)
from dti_dist.attention.scheme import AttentionScheme
from dti_dist.errors import UserError, nearest

ATTENTION_NAME = "dti"

# Slots of a readout chunk lie an interaction apart, so its keys grow with its slots much faster
# than those of a body chunk. Measured at 14 tokens an interaction: 32 is the fastest.
_READOUT_CHUNK = 32


@dataclass(frozen=True)
class _Backend:
    """How a backend plans body and readout attention of several windows, and runs a plan.

    Queries and keys may have another width than values.
    """

    plan_body: Callable[[VisibleIntervals], list[Any]]
    plan_readout: Callable[[VisibleIntervals, ScoreBias | None], list[Any]]
    attention: Callable[[Tensor, Tensor, Tensor, Any, float], Tensor]


_BACKENDS = {
    "flex": _Backend(FlexPlan.build, FlexPlan.build, flex_attention_call),
    "chunked": _Backend(
        ChunkedPlan.build,
        lambda intervals, bias: ChunkedPlan.build(intervals, bias, chunk=_READOUT_CHUNK),
        chunked_attention,
    ),
    "dense": _Backend(DensePlan.build, DensePlan.build, dense_attention),
}


@dataclass(frozen=True)
class KeptStates:
    """What [SUM] reads of isolated interactions, from passes before: a body without running one.

    Attributes:
        layers: [tokens, Hkv, 2 D] keys and values of each layer.
        rows: [B, L] which of the tokens stands at each place of the samples.
    """

    layers: Sequence[Tensor]
    rows: Tensor


class AttentionPlans:
    """The attention of every layer for one batch of packs.

    Layers with the same window share a plan.

    Args:
        layout: of the batch, on the device of the model.
        scheme: of the model.
        inverse_frequencies: [R / 2] of the model's rotary positions; needed where keys are read by
            other positions than the model gave them.
        kept: states of the L tokens; the model is called with the slots alone.
        record: keep the states of a pass over packs without slots, for later ones.

    Attributes:
        positions: [B, T] rotary position ids to call the model with.
        recorded: [B · Tb, Hkv, 2 D] of each layer so far, where states are recorded.
        initial: [B, T, hidden] what the first layer reads; set by the model under ``reset``.

    Raises:
        UserError: the backend is unknown, or cannot run these lengths.
    """

    def __init__(
        self,
        layout: PackLayout,
        scheme: AttentionScheme,
        inverse_frequencies: Tensor | None = None,
        kept: KeptStates | None = None,
        record: bool = False,
    ) -> None:
        backend = scheme.backend
        if backend == "auto":
            backend = "flex" if layout.unit.is_cuda else "chunked"
        if backend not in _BACKENDS:
            raise UserError(
                f"Expected an attention backend among auto, {', '.join(_BACKENDS)}; found "
                f"{backend!r}.{nearest(backend, ['auto', *_BACKENDS])}"
            )
        self.scheme = scheme
        self.initial: Tensor | None = None
        self.recorded: list[Tensor] | None = [] if record else None
        self.body_length = layout.body_length if kept is None else 0
        self.reach = scheme.longest_span or layout.length
        self._backend = _BACKENDS[backend]
        self._kept = kept
        self._rows = None if layout.shared is None else _rows_of(layout.shared)
        self._has_slots = layout.length < layout.unit.shape[1]
        self._place_positions(layout, inverse_frequencies)
        windows = scheme.windows
        # With slots, or for states, nobody reads the body behind the last layer.
        self._planned = windows.body[: -1 if self._has_slots or record else None]
        if kept is not None:
            self._planned = ()
        self._body = self._plan(self._planned, layout, scheme.body, self._backend.plan_body)
        if self._has_slots:
            falling = scheme.positions.falling
            slopes = alibi_slopes(scheme.heads, layout.unit.device) if falling else None
            bias = score_bias(layout, slopes, scheme.forgetting)
            self._readout = self._plan(
                windows.readout,
                layout,
                scheme.readout,
                lambda intervals: self._backend.plan_readout(intervals, bias),
            )

    @staticmethod
    def _plan(
        windows: Iterable[int],
        layout: PackLayout,
        see: Callable[[PackLayout, Tensor], VisibleIntervals],
        build: Callable[[VisibleIntervals], list[Any]],
    ) -> dict[int, Any]:
        """The plan of each window, all of them made at once."""
        distinct = tuple(sorted(set(windows)))
        if not distinct:
            return {}
        intervals = see(layout, _on_device(distinct, layout.unit.device))
        return dict(zip(distinct, build(intervals.for_windows(len(distinct))), strict=True))

    def _place_positions(self, layout: PackLayout, inverse_frequencies: Tensor | None) -> None:
        """Positions that the model rotates by, and by how much [SUM] must turn what it reads."""
        scheme, length = self.scheme, layout.length
        position = layout.position.long()
        in_sample = position[:, :length]
        if layout.shared is not None:
            body = layout.shared.position.long()
            rotated_by = body.gather(1, layout.shared.source.long())
        else:
            body = restarted_positions(layout).long() if scheme.isolated else in_sample
            rotated_by = body
        slots = position[:, length:]
        if not scheme.positions.rotated:
            slots = torch.zeros_like(slots)
        self.positions = slots if self._kept else torch.cat([body, slots], dim=1)
        self._turn = self._turn_initial = None
        self._profile: ProfileReading | None = None
        if scheme.positions.rotated and layout.profile_end is not None:
            keys = layout.unit.shape[1] + (length if scheme.policy.forgets else 0)
            self._profile = ProfileReading.of(layout, keys, _needed(inverse_frequencies))
        if scheme.turns_keys:
            by = in_sample - rotated_by if scheme.positions.rotated else -rotated_by
            self._turn = Turn.by(by, _needed(inverse_frequencies))
        if scheme.policy.forgets and scheme.positions.rotated:
            self._turn_initial = Turn.by(in_sample, _needed(inverse_frequencies))

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Attention of one layer over whole packs.

        Args:
            layer: index of the layer.
            q: [B, Hq, T, D].
            k, v: [B, Hkv, T, D], Hq a multiple of Hkv.
            scale: factor of the scores.

        Returns:
            [B, Hq, T, D]; 0 for the body in the last layer, where there are slots to read.

        Raises:
            UserError: q or k are not of the B packs of T tokens that the plans were made for.
        """
        expected = tuple(self.positions.shape)
        for name, x in (("queries", q), ("keys", k)):
            if (x.shape[0], x.shape[2]) != expected:
                raise UserError(
                    f"Expected {name} of {expected[0]} packs of {expected[1]} tokens, as "
                    f"in the pack layout; found {x.shape[0]} of {x.shape[2]}. Make the "
                    f"AttentionPlans from this batch's layout, and call the model with "
                    f"use_cache=False."
                )
        if self.recorded is not None:
            self.recorded.append(states_of(k.transpose(1, 2), v.transpose(1, 2)))
        length, attention, windows = self.body_length, self._backend.attention, self.scheme.windows
        q_body, q_slots = q.split_with_sizes([length, q.shape[2] - length], dim=2)
        body = None
        if layer < len(self._planned):
            body_plan = self._body[windows.body[layer]]
            k_body, v_body = k.narrow(2, 0, length), v.narrow(2, 0, length)
            body = attention(q_body, k_body, v_body, body_plan, scale)
        if not self._has_slots:
            return torch.zeros_like(q_body) if body is None else body
        keys, values = self._memory(layer, k, v)
        if self._profile is not None and self.scheme.rotates(layer):
            q_slots, keys = self._profile(q_slots, keys)
        readout_plan = self._readout[windows.readout[layer]]
        readout = attention(q_slots, keys, values, readout_plan, scale).transpose(1, 2)
        # In the order of tokens, as the model goes on with it.
        if body is None:
            return F.pad(readout, (0, 0, 0, 0, length, 0)).transpose(1, 2)
        return torch.cat([body.transpose(1, 2), readout], dim=1).transpose(1, 2)

    def _memory(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """[B, Hkv, Tk, D] each: what [SUM] reads. The samples, the slots, initial embeddings."""
        scheme, length = self.scheme, self.body_length
        rotary = self.scheme.rotates(layer)
        turn = self._turn if rotary else None
        if self._rows is not None and self._kept is None:
            return read_shared(k, v, length, self._rows, turn)
        own_order = self._kept is None
        if turn is None and own_order and not scheme.policy.forgets:
            return k, v
        keys, values = k[:, :, :length].transpose(1, 2), v[:, :, :length].transpose(1, 2)
        if self._kept is not None:
            keys, values = in_sample_order(self._kept.layers[layer], self._kept.rows)
        if turn is not None:
            keys = turn(keys)
        parts = [
            (keys, values),
            (k[:, :, length:].transpose(1, 2), v[:, :, length:].transpose(1, 2)),
        ]
        if scheme.initial_memory is not None:
            assert self.initial is not None, "the model sets what its first layer reads"
            keys, values = scheme.initial_memory(layer, self.initial[:, :length])
            if rotary:
                keys = keys * scheme.rotary_scaling
                keys = self._turn_initial(keys) if self._turn_initial is not None else keys
            parts.append((keys, values))
        keys, values = (
            torch.cat([x.to(k.dtype) for x in column], dim=1).transpose(1, 2)
            for column in zip(*parts, strict=True)
        )
        return keys, values


@lru_cache
@torch.inference_mode(False)
def _on_device(windows: tuple[int, ...], device: torch.device) -> Tensor:
    """[W, 1, 1], copied to a GPU once."""
    return torch.tensor(windows, device=device)[:, None, None]


def _rows_of(shared: SharedBody) -> Tensor:
    """[B, L] which of all packs' tokens, end to end, stands at each place."""
    packs, length = shared.position.shape
    return shared.source.long() + torch.arange(packs, device=shared.source.device)[:, None] * length


def _needed(inverse_frequencies: Tensor | None) -> Tensor:
    if inverse_frequencies is None:
        raise UserError(
            "Found no rotary frequencies in this model. With this attention.policy and "
            "attention.positions, [SUM] reads keys at positions other than the model's own, so the "
            "keys must be rotated. Choose a model with rotary positions."
        )
    return inverse_frequencies


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
                f"{type(module).__name__} uses. Choose a model that does not."
            )
    if dropout > 0:
        raise UserError(
            f"Attention {ATTENTION_NAME!r} does not support dropout; found {dropout}. Set "
            f"attention_dropout=0 in the model's config."
        )
    if attention_mask is not None:
        raise UserError(
            f"Attention {ATTENTION_NAME!r} takes its mask from attention_plans; found an "
            f"attention_mask of shape {tuple(attention_mask.shape)} as well. Do not pass one."
        )
    sliding_window = kwargs.get("sliding_window")
    if sliding_window is not None and sliding_window < plans.reach:
        raise UserError(
            f"{type(module).__name__} has a sliding window of {sliding_window} tokens, but a token "
            f"must see up to {plans.reach}. Lower n or the longest item text, or choose a model "
            f"without a sliding window."
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer: Any = module.layer_idx
    out = plans.attend(layer, query, key, value, scale)
    return out.transpose(1, 2).contiguous(), None


def register() -> None:
    """Make ``attn_implementation="dti"`` known to transformers.

    As an attention without a mask function: transformers then builds no mask, and does not look
    into the positions for one, which would make a GPU wait in every forward pass.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, attention_forward)
