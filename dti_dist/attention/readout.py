"""How [SUM] reads: its positions, what it forgets, and states that interactions share.

Body tokens keep the attention of their model. What [SUM] reads may differ in four ways, each of
which is a change of its own attention call:

- positions: under ``alibi`` [SUM] has no position id. Its query is not rotated, it reads un-rotated
  keys, and a score gets -slope_h · (tokens between). Under ``rope`` it has the position of its
  target's label token. Where body tokens were rotated by other positions than those in the sample
  (``isolated`` restarts them), keys are rotated by the difference: rotations add up.
- forgetting (``reset``): beside each context token's key and value there are those of its initial
  embedding, and the two share the token's weight by the distance of its interaction.
- the profile: [SUM] reads it as if it stood directly behind it, wherever its target lies. Under
  ``alibi`` that is a distance of 0. Under ``rope`` one query can't have two positions, so queries
  and keys get a second half: see `ProfileReading`.
- sharing (``isolated``): keys and values of distinct interactions are brought into the order of the
  samples, where intervals are contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dti_dist.attention.intervals import VisibleIntervals
from dti_dist.attention.layout import PackLayout


@dataclass(frozen=True)
class ScoreBias:
    """What a readout score gets beside the mask; integer arrays, and two small tables.

    bias[b, h, q, key] = -slopes[h] · max(query_position[b, q] - key_position[b, key], 0)
    + log_weights[memory of key, query_unit[b, q] - key_unit[b, key]]

    Attributes:
        slopes: [Hq] float32 of ALiBi; None: no first term.
        log_weights: [2, n + 1] float32, of a token's state and of its initial embedding, by the
            distance of interactions; None: no second term.
        query_position, query_unit: [B, S] int32.
        key_position, key_unit: [B, Tk] int32.
        initial_from: keys from here on are initial embeddings.
    """

    slopes: Tensor | None
    log_weights: Tensor | None
    query_position: Tensor
    key_position: Tensor
    query_unit: Tensor
    key_unit: Tensor
    initial_from: int

    # Both take queries and keys by their indices, in any shape.

    def distance(self, b: Tensor, q: Tensor, key: Tensor) -> Tensor:
        """Tokens between, which the slopes multiply."""
        return (self.query_position[b, q] - self.key_position[b, key]).clamp(min=0)

    def log_weight(self, b: Tensor, q: Tensor, key: Tensor) -> Tensor:
        """What `log_weights` say of a query and a key."""
        assert self.log_weights is not None
        apart = self.query_unit[b, q] - self.key_unit[b, key]
        apart = apart.clamp(0, self.log_weights.shape[1] - 1)
        return self.log_weights[(key >= self.initial_from).long(), apart]


@lru_cache
@torch.inference_mode(False)
def alibi_slopes(heads: int, device: torch.device | None = None) -> Tensor:
    """[heads] float32: 2^(-8h / heads) for h = 1 … heads (Press et al., arXiv 2108.12409)."""
    return torch.exp2(-8.0 * torch.arange(1, heads + 1, device=device) / heads)


@lru_cache
@torch.inference_mode(False)
def _log_weights(forgetting: tuple[float, ...], device: torch.device) -> Tensor:
    """[2, n + 1] float32 for ScoreBias."""
    alpha = torch.tensor(forgetting, dtype=torch.float64, device=device)
    return torch.stack([torch.log1p(-alpha), torch.log(alpha)]).float()


_NO_DISTANCE = 2**30  # as a key's unit or position: never behind its query


def score_bias(
    layout: PackLayout, slopes: Tensor | None, forgetting: Tensor | None
) -> ScoreBias | None:
    """The bias of all readout scores of a batch; None where there is none.

    Args:
        slopes: [Hq] under ``alibi``, else None.
        forgetting: [n + 1] alpha by distance under ``reset``, else None.
    """
    if slopes is None and forgetting is None:
        return None
    device, length = layout.unit.device, layout.length
    position, unit = layout.position.int(), layout.unit.int()
    place = layout.place_of(unit)
    log_weights = None
    key_position, key_unit = position, place
    in_profile = None
    if layout.profile_end is not None:
        in_profile = layout.before(layout.profile_end)
        key_position = torch.where(in_profile, _NO_DISTANCE, position)
    if forgetting is not None:
        log_weights = _log_weights(tuple(forgetting.tolist()), device)
        # Neither prefix nor profile is an interaction: they are never forgotten.
        no_interaction = layout.before(layout.prefix_end)
        if in_profile is not None:
            no_interaction |= in_profile
        key_unit = torch.where(no_interaction, _NO_DISTANCE, place)
        key_unit = torch.cat([key_unit, key_unit[:, :length]], dim=1)
        key_position = torch.cat([key_position, key_position[:, :length]], dim=1)
    return ScoreBias(
        slopes=slopes,
        log_weights=log_weights,
        query_position=position[:, length:].contiguous(),
        key_position=key_position.contiguous(),
        query_unit=place[:, length:].contiguous(),
        key_unit=key_unit.contiguous(),
        initial_from=layout.unit.shape[1],
    )


def with_initial_memory(intervals: VisibleIntervals, length: int) -> VisibleIntervals:
    """Readout intervals over `length` more keys, the initial embeddings of the context.

    The first range of a query, its context, is seen there too.
    """
    behind = intervals.key_length
    context, context_end = intervals.start[..., :1, :, :], intervals.end[..., :1, :, :]
    empty = context >= context_end
    start = torch.where(empty, 0, context + behind)
    end = torch.where(empty, 0, context_end + behind)
    return replace(
        intervals,
        start=torch.cat([intervals.start, start], dim=-3),
        end=torch.cat([intervals.end, end], dim=-3),
        key_length=behind + length,
    )


@dataclass(frozen=True)
class Turn:
    """A rotation of keys by a number of positions each, on top of what their model did.

    Attributes:
        cos, sin: [B, L, 1, R / 2] of the angles, float32 or more; R rotary dimensions.
    """

    cos: Tensor
    sin: Tensor

    @staticmethod
    def by(positions: Tensor, inverse_frequencies: Tensor) -> Turn:
        """Angles are made in float64: there are long samples, and few tokens."""
        angles = positions[..., None, None].double() * inverse_frequencies.double()
        dtype = torch.promote_types(inverse_frequencies.dtype, torch.float32)
        return Turn(angles.cos().to(dtype), angles.sin().to(dtype))

    def __call__(self, keys: Tensor) -> Tensor:
        """[B, L, H, D] → the same, its first R dimensions rotated in half-split pairs."""
        half = self.cos.shape[-1]
        first, second, rest = keys.split([half, half, keys.shape[-1] - 2 * half], dim=-1)
        cos, sin = self.cos, self.sin
        turned = [first * cos - second * sin, second * cos + first * sin]
        return torch.cat([*(part.to(keys.dtype) for part in turned), rest], dim=-1)


@dataclass(frozen=True)
class ProfileReading:
    """Rotary positions for [SUM] of its profile, which stands directly before it at any place.

    A rotary score depends on the distance alone, and the slots of a sample have many to its
    profile. So scores are made of twice the dimensions: in the first half a query meets the
    interactions, as it is; in the second, turned to the end of the profile, the profile's keys.

    Attributes:
        in_profile: [B, 1, Tk, 1] which keys are of a profile.
        turn: [B, S] of queries.
    """

    in_profile: Tensor
    turn: Turn

    @staticmethod
    def of(layout: PackLayout, keys: int, inverse_frequencies: Tensor) -> ProfileReading | None:
        """None where no sample has a profile.

        Args:
            keys: Tk, of which those behind the T tokens are of no profile.
        """
        if layout.profile_start is None or layout.profile_end is None:
            return None
        total, length = layout.unit.shape[1], layout.length
        unit = layout.unit[:, length:].clamp(min=0).long()
        ends_at = (layout.profile_end - layout.profile_start).gather(1, unit)
        in_profile = F.pad(layout.before(layout.profile_end), (0, keys - total))
        by = ends_at - layout.position[:, length:]
        return ProfileReading(in_profile[:, None, :, None], Turn.by(by, inverse_frequencies))

    def __call__(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """[B, Hq, S, D] and [B, Hkv, Tk, D] → [B, Hq, S, 2 D] and [B, Hkv, Tk, 2 D]."""
        turned = self.turn(queries.transpose(1, 2)).transpose(1, 2)
        halves = keys.masked_fill(self.in_profile, 0), keys.masked_fill(~self.in_profile, 0)
        return torch.cat([queries, turned], dim=-1), torch.cat(halves, dim=-1)


def restarted_positions(layout: PackLayout) -> Tensor:
    """[B, L] positions that restart behind the prefix with each interaction: ``isolated``.

    A profile's begin at 0.
    """
    length = layout.length
    unit = layout.unit[:, :length]
    index = unit.clamp(min=0).long()
    prefix = (layout.prefix_end - layout.prefix_start).gather(1, index)
    place = torch.arange(length, device=unit.device)
    return torch.where(unit < 0, 0, place - layout.unit_start.gather(1, index) + prefix)


def states_of(keys: Tensor, values: Tensor) -> Tensor:
    """[B, Lb, H, D] each → [B · Lb, H, 2 D]: what [SUM] reads of each token."""
    return torch.cat([keys, values], dim=-1).flatten(0, 1)


def in_sample_order(states: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Bring keys and values of kept states to where they stand in the samples.

    Args:
        states: [tokens, H, 2 D], of which there may be far more than are read.
        rows: [B, L] the token that stands at each place.

    Returns:
        [B, L, H, D] each, float32 for half precision.
    """
    _, heads, width = states.shape
    wide = torch.promote_types(states.dtype, torch.float32)
    found = F.embedding(rows, states.flatten(1)).unflatten(-1, (heads, width)).to(wide)
    return found[..., : width // 2], found[..., width // 2 :]


def read_shared(
    k: Tensor, v: Tensor, body: int, rows: Tensor, turn: Turn | None
) -> tuple[Tensor, Tensor]:
    """What [SUM] reads where interactions are shared: the samples in their order, then the slots.

    Args:
        k, v: [B, H, Tb, D], of a shared body and then the slots.
        body: Lb.
        rows: [B, L] which of the B · Lb tokens stands at each place of the samples.
        turn: of the keys, at their places.

    Returns:
        [B, H, L + S, D] each.
    """
    cos, sin = (None, None) if turn is None else (turn.cos[..., 0, :], turn.sin[..., 0, :])
    keys, values = _ReadShared.apply(k.transpose(1, 2), v.transpose(1, 2), body, rows, cos, sin)
    return keys.transpose(1, 2), values.transpose(1, 2)


class _ReadShared(torch.autograd.Function):
    # Samples are several times as long as the body that they share, so what counts is how often
    # memory of their length is gone over: keys and values are gathered together, keys turn where
    # they lie, and no graph is kept.

    @staticmethod
    def forward(
        ctx: Any,
        keys: Tensor,
        values: Tensor,
        body: int,
        rows: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        (packs, total, heads, width), length = keys.shape, rows.shape[1]
        wide = torch.promote_types(keys.dtype, torch.float32)
        states = states_of(keys[:, :body], values[:, :body]).to(wide)
        read = states.new_empty(packs, length + total - body, heads, 2 * width)
        for of_pack, rows_of_pack in zip(read, rows, strict=True):
            torch.index_select(states, 0, rows_of_pack, out=of_pack[:length])
        if cos is not None and sin is not None:
            first, second = _halves(read[:, :length], cos)
            turned = (first * cos[:, :, None]).sub_(second * sin[:, :, None])
            second.mul_(cos[:, :, None]).add_(first * sin[:, :, None])
            first.copy_(turned)
        read[:, length:, :, :width] = keys[:, body:]
        read[:, length:, :, width:] = values[:, body:]
        read = read.to(keys.dtype)
        ctx.save_for_backward(rows, cos, sin)
        ctx.body = body
        return read[..., :width], read[..., width:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_keys: Tensor, grad_values: Tensor) -> tuple[Tensor | None, ...]:
        rows, cos, sin = ctx.saved_tensors
        (packs, _, heads, width), length = grad_keys.shape, rows.shape[1]
        # Where many places share a state, their gradients add up: not in 8 bits of mantissa.
        wide = torch.promote_types(grad_keys.dtype, torch.float32)
        grad = grad_keys.new_empty(packs, length, heads, 2 * width, dtype=wide)
        grad[..., :width] = grad_keys[:, :length]
        grad[..., width:] = grad_values[:, :length]
        if cos is not None:
            first, second = _halves(grad, cos)
            turned = (first * cos[:, :, None]).add_(second * sin[:, :, None])
            second.mul_(cos[:, :, None]).sub_(first * sin[:, :, None])
            first.copy_(turned)
        # That of an embedding: on a GPU it sorts the indices, so sums are deterministic.
        of_states = torch.ops.aten.embedding_dense_backward(
            grad.view(packs, length, -1), rows, packs * ctx.body, -1, False
        ).view(packs, ctx.body, heads, 2 * width)
        grad_k, grad_v = (
            torch.cat([of_states[..., part].to(slots.dtype), slots[:, length:]], dim=1)
            for part, slots in (
                (slice(width), grad_keys),
                (slice(width, None), grad_values),
            )
        )
        return grad_k, grad_v, None, None, None, None


def _halves(states: Tensor, cos: Tensor) -> tuple[Tensor, Tensor]:
    """Views [B, L, H, R / 2] of the two halves of the keys' rotary dimensions."""
    half = cos.shape[-1]
    return states[..., :half], states[..., half : 2 * half]
