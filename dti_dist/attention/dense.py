"""The mask as a boolean matrix and plain softmax attention: for tests and pictures only."""

from __future__ import annotations

import torch
from torch import Tensor

from dti_dist.attention.intervals import VisibleIntervals


def dense_mask(intervals: VisibleIntervals) -> Tensor:
    """The mask as bool [B, Tq, Tk]; True where the query sees the key."""
    key = torch.arange(intervals.key_length, device=intervals.start.device)
    inside = (intervals.start[..., None] <= key) & (key < intervals.end[..., None])
    return inside.any(dim=0)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Softmax attention in the dtype of its inputs; memory O(Tq·Tk).

    Args:
        q: [B, Hq, Tq, D].
        k, v: [B, Hkv, Tk, D], Hq a multiple of Hkv.
        mask: bool [B, Tq, Tk].
        scale: factor of the scores.

    Returns:
        [B, Hq, Tq, D].
    """
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = (q @ k.mT * scale).masked_fill(~mask[:, None], -torch.inf)
    return scores.softmax(dim=-1) @ v
