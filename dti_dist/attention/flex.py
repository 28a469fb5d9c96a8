"""FlexAttention over visible intervals: the path on GPUs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

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
_LOG_BLOCK = 7
BLOCK = 1 << _LOG_BLOCK
# The smallest side of a Triton matrix product.
_MIN_HEAD_DIM = 16
# Graphs of one process: (body, readout) x (with, without gradients) x (train, eval shapes), and
# room. Dynamo's default of 8 is just those. Who needs more says so: `allow_graphs`.
_most_graphs = 32

_graphs = 0


class Blocks(NamedTuple):
    """The blocks of a mask, in the form and order that BlockMask takes: int32 [B, 1, rows] each
    row's number of blocks, and [B, 1, rows, columns] which ones, those first.

    Rows are blocks of queries and columns of keys, with `q` the other way round. Full blocks, in
    which each query sees each key, are not among the others.
    """

    kv_num_blocks: Tensor
    kv_indices: Tensor
    full_kv_num_blocks: Tensor
    full_kv_indices: Tensor
    q_num_blocks: Tensor
    q_indices: Tensor
    full_q_num_blocks: Tensor
    full_q_indices: Tensor


@dataclass(frozen=True)
class FlexPlan:
    """The blocks of a batch of packs; made once, used by every layer with the same window."""

    intervals: VisibleIntervals
    blocks: Blocks
    bias: ScoreBias | None

    @classmethod
    def build(cls, intervals: VisibleIntervals, bias: ScoreBias | None = None) -> list[FlexPlan]:
        """Derive the blocks from the intervals' ends, without ever evaluating the mask.

        Args:
            intervals: of W windows.

        Returns:
            a plan for each window. Their number does not change the number of operators.

        Raises:
            UserError: the number of queries or keys is not a multiple of 128.
        """
        for what, length in (
            ("queries", intervals.start.shape[-1]),
            ("keys", intervals.key_length),
        ):
            if length % BLOCK:
                raise UserError(
                    f"FlexAttention needs lengths that are multiples of {BLOCK}; found {length} "
                    f"{what}. Pad body and readout tail to a multiple of {BLOCK}, or use the "
                    f"chunked backend."
                )
        blocks = _partial_and_full(intervals)
        parts = [*_ordered(blocks), *_ordered(blocks.mT)]  # [2 · W, …] each
        kv_counts, kv_indices, q_counts, q_indices = (part.unbind() for part in parts)
        windows = intervals.by_window()
        W = len(windows)
        return [
            cls(
                of_window,
                Blocks(
                    *(kv_counts[w], kv_indices[w], kv_counts[W + w], kv_indices[W + w]),
                    *(q_counts[w], q_indices[w], q_counts[W + w], q_indices[W + w]),
                ),
                bias,
            )
            for w, of_window in enumerate(windows)
        ]

    @property
    def block_mask(self) -> BlockMask:
        return _block_mask(self.intervals.start, self.intervals.end, self.blocks)


def _block_mask(start: Tensor, end: Tensor, blocks: Blocks) -> BlockMask:
    rows, columns = blocks.kv_indices.shape[-2:]
    return BlockMask(
        (rows * BLOCK, columns * BLOCK),
        *blocks,
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=_interval_test(start, end),
    )


def _partial_and_full(intervals: VisibleIntervals) -> Tensor:
    """Bool [2 · W, B, Tq/128, Tk/128]: blocks of which some pairs are visible, then those of all.

    Counted is how many (query, range) pairs of a block of queries touch a block of keys, and how
    many cover all of it: by prefix sums of +1 where ranges of blocks begin and -1 where they end.
    """
    start, end = intervals.start, intervals.end
    windows, ranges, packs, length = start.shape
    rows, columns = length // BLOCK, intervals.key_length // BLOCK + 1
    # Divided by 128, rounded down and up.
    first = torch.stack([start, start + (BLOCK - 1)]) >> _LOG_BLOCK
    last = torch.stack([end + (BLOCK - 1), end]) >> _LOG_BLOCK
    covers = ((start < end) & (first < last)).int()  # else it adds 0, wherever
    row = _rows(rows, columns, start.device)
    delta = torch.zeros(
        (2, windows, ranges, packs, rows * columns), dtype=torch.int32, device=start.device
    )
    delta.scatter_add_(-1, row + first, covers)
    delta.scatter_add_(-1, row + last, -covers)
    counts = delta.sum(dim=2, dtype=torch.int32).unflatten(-1, (rows, columns))
    touched, covered = counts.cumsum(dim=-1)[..., :-1].unbind()
    full = covered == BLOCK
    return torch.cat([(touched > 0) ^ full, full])


# Outside of inference mode: a later training pass may read what is kept.
@lru_cache
@torch.inference_mode(False)
def _rows(rows: int, columns: int, device: torch.device) -> Tensor:
    """[128 · rows] where the row of each query begins."""
    begins = torch.arange(0, rows * columns, columns, device=device)
    return begins.repeat_interleave(BLOCK, output_size=rows * BLOCK)


@lru_cache
@torch.inference_mode(False)
def _columns(columns: int, device: torch.device) -> Tensor:
    return torch.arange(columns, dtype=torch.int32, device=device)


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Bool [..., rows, columns] → counts [..., 1, rows] and indices [..., 1, rows, columns]."""
    before = blocks.cumsum(dim=-1)
    counts = before[..., -1:]
    column = _columns(blocks.shape[-1], blocks.device)
    place = torch.where(blocks, before - 1, counts + column - before)
    indices = _aligned(blocks.shape, blocks.device)
    indices.scatter_(-1, place, column.expand(blocks.shape))
    per_row = counts.mT
    return _aligned(per_row.shape, blocks.device).copy_(per_row), indices.unsqueeze(-3)


def _aligned(shape: torch.Size, device: torch.device) -> Tensor:
    """An empty int32 tensor, of which each `tensor[w]` is contiguous and begins at 16 bytes.

    Compiled kernels assume that of their inputs, and would copy others in each call.
    """
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    strides[0] = -(-strides[0] // 4) * 4
    return torch.empty_strided(shape, strides, dtype=torch.int32, device=device)


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
        q: [B, Hq, Tq, Dk], Dk at least 16.
        k: [B, Hkv, Tk, Dk], Hq a multiple of Hkv; v: [B, Hkv, Tk, D].
        plan: built from the intervals of the same B packs, on the same device.
        scale: factor of the scores.

    Returns:
        [B, Hq, Tq, D].

    Raises:
        UserError: the head dim is too small, gradients are asked for on a CPU, or the fused
            kernel cannot be had (torch.compile is off, too many shapes): never the dense path.
    """
    seen = plan.intervals
    arguments = (q, k, v, seen.start, seen.end, plan.blocks, plan.bias, scale)
    try:
        return _run(*arguments)
    except _NotCompiled:
        pass
    return _compile_and_run(*arguments)


def compiled_graphs() -> int:
    """How many graphs this process has compiled for FlexAttention; constant after warm-up."""
    return _graphs


class _NotCompiled(UserError):
    """What was to run compiled runs as plain Python."""


def _fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    end: Tensor,
    blocks: Blocks,
    bias: ScoreBias | None,
    scale: float,
) -> Tensor:
    # Dynamo runs this line only while it traces. Reached in any other way (nothing compiled yet,
    # compilation disabled), flex_attention would quietly build the whole score matrix.
    if not torch.compiler.is_compiling():
        raise _NotCompiled(
            "FlexAttention must be compiled, and torch.compile is switched off. Unset "
            "TORCH_COMPILE_DISABLE and TORCHDYNAMO_DISABLE, or use the chunked backend on a CPU."
        )
    out: Tensor = flex_attention(
        q,
        k,
        v,
        score_mod=None if bias is None else _biased(bias),
        block_mask=_block_mask(start, end, blocks),
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out


def _counting_inductor(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
    global _graphs
    _graphs += 1
    return lookup_backend("inductor")(graph, inputs)


# Each layer calls, and while it does a GPU may run dry; so the host does no more than it must. Of
# torch.compile's guards it checks those of the arguments and of torch's modes, and not that no
# function of torch was replaced. What is compiled already runs without dynamo's compiling mode.
_compiled = torch.compile(
    _fused,
    backend=_counting_inductor,
    fullgraph=True,  # else dynamo goes on without compiling at its recompile limit
    options={"guard_filter_fn": torch.compiler.skip_guard_on_globals_unsafe},
)
_run = torch._dynamo.run(_fused)


def _compile_and_run(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> Tensor:
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
    # A patch of dynamo's config costs 0.1 ms and holds for one thread: here that is no matter.
    settings = {"automatic_dynamic_shapes": False, "recompile_limit": _most_graphs}
    try:
        with torch._dynamo.config.patch(settings):
            return _compiled(q, k, v, *others)
    except FailOnRecompileLimitHit as error:
        raise UserError(
            f"FlexAttention is compiled once for each combination of shapes, dtype and gradient "
            f"mode; this process needs more than {_most_graphs} graphs, the last for queries "
            f"{tuple(q.shape)} and keys {tuple(k.shape)}. Keep the pack lengths constant."
        ) from error


def allow_graphs(count: int) -> None:
    """Let this process compile so many graphs at least."""
    global _most_graphs
    _most_graphs = max(count, _most_graphs)
