"""Attention on a CPU in O(L·window): query chunks, each against its own slices of keys."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dti_dist.attention.intervals import VisibleIntervals
from dti_dist.attention.readout import ScoreBias

# F.scaled_dot_product_attention runs these two on a CPU. Called directly, they hand out the
# logsumexp, so that the backward pass needs no graph, and no full-size gradient, per chunk.
_flash_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class _Chunk:
    """Neighbouring queries of one pack, and the keys that any of them sees.

    Attributes:
        visible: bool [queries, keys].
        distance, log_weight: [queries, keys] of ScoreBias, where there is one.
    """

    pack: int
    queries: slice
    keys: list[slice]
    visible: Tensor
    distance: Tensor | None
    log_weight: Tensor | None


@dataclass(frozen=True)
class ChunkedPlan:
    """The chunks of a batch of packs; made once, used by every layer with the same window."""

    chunks: list[_Chunk]
    slopes: Tensor | None

    @classmethod
    def build(
        cls, intervals: VisibleIntervals, bias: ScoreBias | None = None, chunk: int = 128
    ) -> list[ChunkedPlan]:
        """Cut the queries of every pack into chunks of ``chunk`` tokens.

        A longer chunk means fewer calls, and more keys that only some of its queries see.

        Args:
            intervals: of W windows.

        Returns:
            a plan for each window.
        """
        slopes = None if bias is None else bias.slopes
        return [cls(_chunks(seen, bias, chunk), slopes) for seen in intervals.by_window()]


def _chunks(intervals: VisibleIntervals, bias: ScoreBias | None, chunk: int) -> list[_Chunk]:
    start, end = intervals.start.cpu().numpy(), intervals.end.cpu().numpy()
    _, packs, length = start.shape
    return [
        _make_chunk(
            pack, slice(first, min(first + chunk, length)), start[:, pack], end[:, pack], bias
        )
        for pack in range(packs)
        for first in range(0, length, chunk)
    ]


def _make_chunk(
    pack: int, queries: slice, start: np.ndarray, end: np.ndarray, bias: ScoreBias | None
) -> _Chunk:
    start, end = start[:, queries], end[:, queries]  # [R, queries]
    keys = _union(start, end)
    position = np.concatenate([np.arange(key.start, key.stop) for key in keys])
    visible = (start[..., None] <= position) & (position < end[..., None])
    distance = log_weight = None
    if bias is not None:
        query = torch.arange(queries.start, queries.stop)[:, None]
        pairs = (torch.tensor(pack), query, torch.from_numpy(position))
        distance = None if bias.slopes is None else bias.distance(*pairs)
        log_weight = None if bias.log_weights is None else bias.log_weight(*pairs)
    seen = torch.from_numpy(visible.any(axis=0))
    return _Chunk(pack, queries, keys, seen, distance, log_weight)


def _union(start: np.ndarray, end: np.ndarray) -> list[slice]:
    """The union of half-open ranges as disjoint slices in order."""
    nonempty = start < end
    start, end = start[nonempty], end[nonempty]
    order = np.argsort(start)
    start, reach = start[order], np.maximum.accumulate(end[order])
    gap = np.flatnonzero(start[1:] > reach[:-1])
    firsts = start[np.concatenate([[0], gap + 1])]
    lasts = reach[np.concatenate([gap, [-1]])]
    return [slice(int(first), int(last)) for first, last in zip(firsts, lasts, strict=True)]


def chunked_attention(q: Tensor, k: Tensor, v: Tensor, plan: ChunkedPlan, scale: float) -> Tensor:
    """Softmax attention over the visible keys of every query, with gradients.

    Args:
        q: [B, Hq, Tq, Dk], on a CPU.
        k: [B, Hkv, Tk, Dk], Hq a multiple of Hkv; v: [B, Hkv, Tk, D], Dk at least D.
        plan: built from the intervals of the same B packs.
        scale: factor of the scores.

    Returns:
        [B, Hq, Tq, D].
    """
    wider = q.shape[-1] - v.shape[-1]
    if wider:  # the kernel wants them alike
        return _ChunkedAttention.apply(q, k, F.pad(v, (0, wider)), plan, scale)[..., :-wider]
    return _ChunkedAttention.apply(q, k, v, plan, scale)


class _ChunkedAttention(torch.autograd.Function):
    # Query heads are seen as [Hkv, G, Tq, D] and keys as [Hkv, G, Tk, D] with stride 0 along the
    # G query heads of a group: the kernel takes the groups for a batch, and nothing is repeated.

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: ChunkedPlan, scale: float
    ) -> Tensor:
        q, k, v = _dense_rows(q), _dense_rows(k), _dense_rows(v)
        out = torch.empty_like(q)
        logsumexp = torch.empty(q.shape[:3], dtype=_accumulator(q.dtype))
        groups = q.shape[1] // k.shape[1]
        for chunk, mask in _with_masks(plan, q.dtype, groups):
            chunk_out, chunk_logsumexp = _flash_forward(
                _queries(q, chunk, groups),
                _keys(k, chunk, groups),
                _keys(v, chunk, groups),
                attn_mask=mask,
                scale=scale,
            )
            _queries(out, chunk, groups).copy_(chunk_out)
            _queries(logsumexp, chunk, groups).copy_(chunk_logsumexp)
        ctx.save_for_backward(q, k, v, out, logsumexp)
        ctx.plan, ctx.scale = plan, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, logsumexp = ctx.saved_tensors
        grad_q = torch.empty_like(q)
        # Neighbouring chunks share keys, so their gradients add up: not in 8 bits of mantissa.
        grad_k = torch.zeros_like(k, dtype=_accumulator(k.dtype))
        grad_v = torch.zeros_like(v, dtype=_accumulator(v.dtype))
        groups = q.shape[1] // k.shape[1]
        for chunk, mask in _with_masks(ctx.plan, q.dtype, groups):
            chunk_grad_q, chunk_grad_k, chunk_grad_v = _flash_backward(
                _queries(grad_out, chunk, groups),
                _queries(q, chunk, groups),
                _keys(k, chunk, groups),
                _keys(v, chunk, groups),
                _queries(out, chunk, groups),
                _queries(logsumexp, chunk, groups),
                dropout_p=0.0,
                is_causal=False,
                attn_mask=mask,
                scale=ctx.scale,
            )
            _queries(grad_q, chunk, groups).copy_(chunk_grad_q)
            _add_to_keys(grad_k, chunk, chunk_grad_k)
            _add_to_keys(grad_v, chunk, chunk_grad_v)
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), None, None


def _with_masks(
    plan: ChunkedPlan, dtype: torch.dtype, groups: int
) -> Iterator[tuple[_Chunk, Tensor]]:
    """Chunks with what is added to their scores: [queries, keys], or [Hkv, G, queries, keys]."""
    for chunk in plan.chunks:
        if chunk.log_weight is None:
            mask = torch.full(chunk.visible.shape, -torch.inf, dtype=dtype)
            mask.masked_fill_(chunk.visible, 0.0)
        else:
            mask = chunk.log_weight.to(dtype).masked_fill(~chunk.visible, -torch.inf)
        if plan.slopes is not None and chunk.distance is not None:
            by_head = plan.slopes.to(dtype).view(-1, groups, 1, 1)
            mask = mask - by_head * chunk.distance
        yield chunk, mask


def _queries(x: Tensor, chunk: _Chunk, groups: int) -> Tensor:
    """[B, Hq, Tq, …] → a view [Hkv, G, queries, …]."""
    return x[chunk.pack, :, chunk.queries].unflatten(0, (-1, groups))


def _keys(x: Tensor, chunk: _Chunk, groups: int) -> Tensor:
    """[B, Hkv, Tk, D] → [Hkv, G, keys, D], the same memory for all G."""
    parts = [x[chunk.pack, :, keys] for keys in chunk.keys]
    joined = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    return joined[:, None].expand(-1, groups, -1, -1)


def _add_to_keys(grad: Tensor, chunk: _Chunk, chunk_grad: Tensor) -> None:
    """Add [Hkv, G, keys, D] to the chunk's slices of [B, Hkv, Tk, D]."""
    summed = chunk_grad.sum(dim=1, dtype=grad.dtype)
    lengths = [keys.stop - keys.start for keys in chunk.keys]
    for keys, part in zip(chunk.keys, summed.split(lengths, dim=1), strict=True):
        grad[chunk.pack, :, keys] += part


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _dense_rows(x: Tensor) -> Tensor:
    """The kernels read D values in a row, without asking for the stride between them."""
    return x if x.stride(-1) == 1 else x.contiguous()
