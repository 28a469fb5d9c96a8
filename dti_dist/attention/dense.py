"""The mask as a boolean matrix and plain softmax attention: for tests and pictures only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dti_dist.attention.intervals import VisibleIntervals
from dti_dist.attention.readout import ScoreBias


def dense_mask(intervals: VisibleIntervals) -> Tensor:
    """The mask as bool [B, Tq, Tk]; True where the query sees the key."""
    key = torch.arange(intervals.key_length, device=intervals.start.device)
    inside = (intervals.start[..., None] <= key) & (key < intervals.end[..., None])
    return inside.any(dim=0)


def layer_mask(body: Tensor, readout: Tensor) -> Tensor:
    """One layer's mask, the rows of [SUM] below those of the body, which sees no [SUM].

    Args:
        body: bool [B, Tq, L].
        readout: bool [B, Sq, T].

    Returns:
        bool [B, Tq + Sq, T].
    """
    return torch.cat([F.pad(body, (0, readout.shape[-1] - body.shape[-1])), readout], dim=1)


def through_layers(queries: Tensor, masks: Sequence[Tensor]) -> Tensor:
    """What reaches the queries through all layers: the composition of the layers' masks.

    Args:
        queries: bool [Q, T], each a set of tokens whose last states are asked about.
        masks: bool [T, T] of each layer, the first layer first.

    Returns:
        bool [Q, T], the tokens before the first layer that reach some token of each query.
    """
    for mask in reversed(masks):
        queries = queries.float() @ mask.float() > 0
    return queries


@dataclass(frozen=True)
class DensePlan:
    """The mask and the bias of every score.

    Attributes:
        mask: bool [B, Tq, Tk].
        bias: [B, Hq or 1, Tq, Tk] float64; 0 without.
    """

    mask: Tensor
    bias: Tensor

    @classmethod
    def build(cls, intervals: VisibleIntervals, bias: ScoreBias | None = None) -> list[DensePlan]:
        """A plan for each of W windows."""
        return [cls.of(seen, bias) for seen in intervals.by_window()]

    @classmethod
    def of(cls, intervals: VisibleIntervals, bias: ScoreBias | None) -> DensePlan:
        mask = dense_mask(intervals)
        total = torch.zeros(1, 1, 1, 1, dtype=torch.float64, device=mask.device)
        if bias is not None:
            b, q, key = (torch.arange(size, device=mask.device) for size in mask.shape)
            pairs = (b[:, None, None, None], q[:, None], key)
            if bias.slopes is not None:
                total = total - bias.slopes[:, None, None] * bias.distance(*pairs)
            if bias.log_weights is not None:
                total = total + bias.log_weight(*pairs)
        return cls(mask, total)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, plan: DensePlan, scale: float) -> Tensor:
    """Softmax attention in the dtype of its inputs; memory O(Tq·Tk).

    Args:
        q: [B, Hq, Tq, Dk].
        k: [B, Hkv, Tk, Dk], Hq a multiple of Hkv; v: [B, Hkv, Tk, D].
        plan: of the same B packs.
        scale: factor of the scores.

    Returns:
        [B, Hq, Tq, D].
    """
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = q @ k.mT * scale + plan.bias.to(q.dtype)
    return scores.masked_fill(~plan.mask[:, None], -torch.inf).softmax(dim=-1) @ v
