"""FlexAttention over visible intervals: the path on GPUs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._dynamo import lookup_backend
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from dti_dist.attention.intervals import VisibleIntervals
from dti_dist.attention.readout import ScoreBias
from dti_dist.errors import UserError

# FlexAttention's default block. Other lengths are padded inside its kernels, where gradients can
# be NaN (pytorch#153799).
BLOCK = 128
# The smallest side of a Triton matrix product.
_MIN_HEAD_DIM = 16
# Graphs of one process: (body, readout) x (with, without gradients) x (train, eval shapes), and
# room. Dynamo's default of 8 is just those.
_MAX_GRAPHS = 32

_graphs = 0


@dataclass(frozen=True)
class FlexPlan:
    """The block mask of a batch of packs; made once, used by every layer with the same window."""

    block_mask: BlockMask
    score_mod: Callable[..., Tensor] | None

    @classmethod
    def build(cls, intervals: VisibleIntervals, bias: ScoreBias | None = None) -> FlexPlan:
        """Derive the blocks from the intervals' ends, without ever evaluating the mask.

        Raises:
            UserError: the number of queries or keys is not a multiple of 128.
        """
        for what, length in (
            ("queries", intervals.start.shape[2]),
            ("keys", intervals.key_length),
        ):
            if length % BLOCK:
                raise UserError(
                    f"FlexAttention needs lengths that are multiples of {BLOCK}; found {length} "
                    f"{what}. Pad body and readout tail to a multiple of {BLOCK}, or use the "
                    f"chunked backend."
                )
        start, end = intervals.start, intervals.end
        # The blocks that a range touches, and those that lie wholly inside it.
        touched = _count_queries(intervals, start // BLOCK, (end - 1) // BLOCK + 1) > 0
        full = _count_queries(intervals, (start - 1) // BLOCK + 1, end // BLOCK) == BLOCK
        partial = touched & ~full
        block_mask = BlockMask.from_kv_blocks(
            *_ordered(partial),
            *_ordered(full),
            BLOCK_SIZE=BLOCK,
            mask_mod=_interval_test(start, end),
            compute_q_blocks=False,  # takes as long again as all the rest
        )
        block_mask.q_num_blocks, block_mask.q_indices = _ordered(partial.mT)
        block_mask.full_q_num_blocks, block_mask.full_q_indices = _ordered(full.mT)
        return cls(block_mask, None if bias is None else _biased(bias))


def _count_queries(intervals: VisibleIntervals, first: Tensor, last: Tensor) -> Tensor:
    """How many (query, range) pairs of a query block cover each key block.

    Args:
        intervals: of B packs.
        first, last: [R, B, Tq] the half-open range of key blocks that a range of keys covers.

    Returns:
        [B, Tq/128, Tk/128]: prefix sums of +1 where ranges begin and -1 where they end.
    """
    ranges, packs, length = first.shape
    rows, columns = length // BLOCK, intervals.key_length // BLOCK + 1
    covers = ((intervals.start < intervals.end) & (first < last)).int()
    row = torch.arange(length, device=first.device) // BLOCK
    row = row + torch.arange(packs, device=first.device)[:, None] * rows
    row = row.expand(ranges, -1, -1) * columns
    delta = torch.zeros(packs * rows * columns, dtype=torch.int32, device=first.device)
    # A range that covers nothing adds 0, wherever; its place only has to exist.
    delta.scatter_add_(0, (row + first.clamp(0, columns - 1)).flatten(), covers.flatten())
    delta.scatter_add_(0, (row + last.clamp(0, columns - 1)).flatten(), -covers.flatten())
    return delta.view(packs, rows, columns).cumsum(dim=-1)[..., :-1]


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Bool [B, rows, columns] → FlexAttention's counts [B, 1, rows] and indices of key blocks."""
    before = blocks.cumsum(dim=-1, dtype=torch.int32)
    counts = before[..., -1]
    column = torch.arange(blocks.shape[-1], dtype=torch.int32, device=blocks.device)
    place = torch.where(blocks, before - 1, counts[..., None] + column - before)
    indices = torch.empty_like(before).scatter_(-1, place.long(), column.expand_as(before))
    return counts[:, None].contiguous(), indices[:, None]


def _interval_test(
    start: Tensor, end: Tensor
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    def visible(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        inside = (start[0, b, q] <= kv) & (kv < end[0, b, q])
        for r in range(1, start.shape[0]):
            inside = inside | ((start[r, b, q] <= kv) & (kv < end[r, b, q]))
        return inside

    return visible


def _biased(bias: ScoreBias) -> Callable[..., Tensor]:
    def biased(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        if bias.slopes is not None:
            score = score - bias.slopes[h] * bias.distance(b, q, kv)
        if bias.log_weights is not None:
            score = score + bias.log_weight(b, q, kv)
        return score

    return biased


def flex_attention_call(q: Tensor, k: Tensor, v: Tensor, plan: FlexPlan, scale: float) -> Tensor:
    """Softmax attention over the visible keys of every query, compiled.

    Args:
        q: [B, Hq, Tq, D], D at least 16.
        k, v: [B, Hkv, Tk, D], Hq a multiple of Hkv.
        plan: built from the intervals of the same B packs, on the same device.
        scale: factor of the scores.

    Returns:
        [B, Hq, Tq, D].

    Raises:
        UserError: the head dim is too small, gradients are asked for on a CPU, or the fused
            kernel cannot be had (torch.compile is off, too many shapes): never the dense path.
    """
    if q.shape[-1] < _MIN_HEAD_DIM:
        raise UserError(
            f"FlexAttention needs a head dim of at least {_MIN_HEAD_DIM}; found {q.shape[-1]}. "
            f"Use a model with wider heads, or the chunked backend on a CPU."
        )
    if q.device.type == "cpu" and any(x.requires_grad for x in (q, k, v)):
        raise UserError(
            "FlexAttention has no backward pass on a CPU, and an input requires gradients. "
            "Use the chunked backend on a CPU."
        )
    try:
        return _compiled(q, k, v, plan.block_mask, plan.score_mod, scale)
    except FailOnRecompileLimitHit as error:
        raise UserError(
            f"FlexAttention is compiled once for each combination of shapes, dtype and gradient "
            f"mode; this process needs more than {_MAX_GRAPHS} graphs, the last for queries "
            f"{tuple(q.shape)} and keys {tuple(k.shape)}. Keep the pack lengths constant."
        ) from error


def compiled_graphs() -> int:
    """How many graphs this process has compiled for FlexAttention; constant after warm-up."""
    return _graphs


def _fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: BlockMask,
    score_mod: Callable[..., Tensor] | None,
    scale: float,
) -> Tensor:
    # Dynamo runs this line only while it traces. Reached in any other way (compilation disabled,
    # or given up), flex_attention would quietly build the whole score matrix.
    if not torch.compiler.is_compiling():
        raise UserError(
            "FlexAttention must be compiled, and torch.compile is switched off. Unset "
            "TORCH_COMPILE_DISABLE and TORCHDYNAMO_DISABLE, or use the chunked backend on a CPU."
        )
    out: Tensor = flex_attention(
        q,
        k,
        v,
        score_mod=score_mod,
        block_mask=block_mask,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out


def _counting_inductor(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
    global _graphs
    _graphs += 1
    return lookup_backend("inductor")(graph, inputs)


def _compile(max_graphs: int) -> Callable[..., Tensor]:
    # fullgraph=True makes dynamo raise at its recompile limit, where it would go on without
    # compiling. The limit belongs to the function: a patch of dynamo's config costs 0.1 ms a call,
    # and is not seen by autograd's thread, which recomputes activations.
    options: dict[str, Any] = {"backend": _counting_inductor, "dynamic": False, "fullgraph": True}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        options["recompile_limit"] = max_graphs
        return torch.compile(_fused, **options)
    compiled = torch.compile(_fused, **options)  # an older torch

    def within_limit(*arguments: Any) -> Tensor:
        with torch._dynamo.config.patch(recompile_limit=max_graphs):
            return compiled(*arguments)

    return within_limit


_compiled = _compile(_MAX_GRAPHS)
