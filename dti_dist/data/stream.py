"""Packs in the order of training, for any number of ranks, from any step on."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch

from dti_dist.attention.layout import padded, stack
from dti_dist.data.dataset import BadShard, Dataset
from dti_dist.data.epochs import EpochPlan, Window
from dti_dist.data.index import SplitIndex, read_block, totals_of
from dti_dist.data.item_tokens import ItemTokens
from dti_dist.data.layout import Pack, PackShape, build_pack
from dti_dist.data.packing import multiple_of_128
from dti_dist.data.samples import Samples, SampleSettings, sample_lengths
from dti_dist.data.sequences import SequenceBlock

_READERS = 4  # threads that read row groups: an object store answers slowly, but many at once


@dataclass(frozen=True)
class Batch(Pack):
    """One rank's packs of one micro-step, [B, …] each.

    Attributes:
        step: optimizer step since the start of the run; epoch: its epoch.
        step_targets: targets of the whole optimizer step, over all ranks and micro-steps;
            step_weight: what they count together.
        task_scales: [tasks] what the sum of each task's losses counts; empty: 1 each. The sum over
            tasks, packs and ranks, divided by step_weight, is then the loss of the step: of each
            task the mean over its known labels, times the task's weight.
        last_of_step: whether this micro-step ends the optimizer step.
        skipped: what could not be read and was left out, since the batch before.
    """

    step: int = 0
    epoch: int = 0
    step_targets: int = 0
    step_weight: float = 0.0
    task_scales: tuple[float, ...] = ()
    last_of_step: bool = True
    skipped: tuple[str, ...] = ()

    @property
    def length(self) -> int:
        """L, the tokens of a pack's samples."""
        return self.layout.length

    @staticmethod
    def collate(packs: list[Pack], shape: PackShape, **about_step: Any) -> Batch:
        body = shape.length if shape.body is None else _shared_length(packs, shape.body)
        if len(packs) > 1 or shape.body is not None:
            units = max(len(pack.layout.unit_first) for pack in packs)
            packs = [
                replace(
                    pack,
                    tokens=_with_longer_body(pack.tokens, body, shape.slots),
                    layout=pack.layout.padded(units, body),
                )
                for pack in packs
            ]
        whole = vars(stack(packs)) | {"body_tokens": sum(pack.body_tokens for pack in packs)}
        return Batch(**whole, **about_step)

    def pin_memory(self) -> Batch:
        return self.map(lambda tensor: tensor.pin_memory())


def _shared_length(packs: list[Pack], usual: int) -> int:
    """Lb: a constant of the run. The rare batch that needs more gets an eighth more."""
    longest = max(pack.layout.body_length for pack in packs)
    stride = multiple_of_128(max(usual // 8, 1))
    return usual + -(-max(longest - usual, 0) // stride) * stride


def _with_longer_body(tokens: torch.Tensor, body: int, slots: int) -> torch.Tensor:
    if len(tokens) == body + slots:
        return tokens
    own, tail = tokens.split([len(tokens) - slots, slots])
    return torch.cat([padded(own, body), tail])


@dataclass(frozen=True)
class Share:
    """How an optimizer step's packs are shared out: G = ranks x micro-steps x micro_packs."""

    global_packs: int
    micro_packs: int
    rank: int = 0
    ranks: int = 1

    def __post_init__(self) -> None:
        if self.global_packs % (self.ranks * self.micro_packs):
            raise ValueError(
                f"{self.global_packs} packs of a step can't be shared out evenly over {self.ranks} "
                f"ranks with {self.micro_packs} packs a micro-step"
            )

    @property
    def micro_steps(self) -> int:
        return self.global_packs // (self.ranks * self.micro_packs)

    def of_micro_step(self, micro_step: int) -> range:
        """Which of the step's packs this rank reads in a micro-step."""
        first = (micro_step * self.ranks + self.rank) * self.micro_packs
        return range(first, first + self.micro_packs)


@dataclass(frozen=True)
class StreamPlan:
    """All epochs of a run over one split. Small, and equal on every rank.

    Attributes:
        skip_bad: leave out what can't be read any more, instead of raising BadShard.
        task_weights: [tasks] of their losses; empty: 1 each.
    """

    dataset: Dataset
    tokens: ItemTokens
    samples: SampleSettings
    epochs: tuple[EpochPlan, ...]
    skip_bad: bool = False
    task_weights: tuple[float, ...] = ()

    def task_scales(self, totals: tuple[float, ...]) -> tuple[float, ...]:
        """`Batch.task_scales` of a step with these `EpochPlan.totals`."""
        if len(totals) == 1:
            return ()
        weights = self.task_weights or (1.0,) * len(totals)
        return tuple(
            weight * totals[0] / known if known else 0.0
            for weight, known in zip(weights, totals, strict=True)
        )

    @property
    def index(self) -> SplitIndex:
        return self.epochs[0].index

    @property
    def shape(self) -> PackShape:
        return self.epochs[0].shape

    def steps_per_epoch(self, global_packs: int) -> list[int]:
        """Optimizer steps of each epoch, the last of an epoch filled up with empty packs."""
        return [epoch.steps(global_packs) for epoch in self.epochs]


class PackStream:
    """This rank's batches from optimizer step `start_step` on, to the end of the last epoch.

    Which samples make up step s depends on (data, settings, seed, s) alone: ranks and micro-steps
    only share them out.
    """

    def __init__(self, plan: StreamPlan, share: Share, start_step: int = 0):
        self.plan = plan
        self.share = share
        self.start_step = start_step

    def __iter__(self) -> Iterator[Batch]:
        share, G = self.share, self.share.global_packs
        pool = ThreadPoolExecutor(_READERS, "read-ahead")
        windows = _Windows(self.plan, pool, self._windows_in_order())
        first_step = 0
        try:
            for epoch in self.plan.epochs:
                steps = epoch.steps(G)
                for step in range(max(self.start_step - first_step, 0), steps):
                    packs = slice(step * G, (step + 1) * G)
                    step_targets = epoch.pack_targets[packs].sum(dtype=np.int64)
                    totals = epoch.totals(packs)
                    for micro_step in range(share.micro_steps):
                        wanted = [step * G + pack for pack in share.of_micro_step(micro_step)]
                        yield Batch.collate(
                            [windows.pack(epoch, pack) for pack in wanted],
                            self.plan.shape,
                            step=first_step + step,
                            epoch=epoch.epoch,
                            step_targets=int(step_targets),
                            step_weight=totals[0],
                            task_scales=self.plan.task_scales(totals),
                            last_of_step=micro_step == share.micro_steps - 1,
                            skipped=windows.newly_skipped(),
                        )
                first_step += steps
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _windows_in_order(self) -> Iterator[tuple[EpochPlan, int]]:
        """Those in which this rank has packs: of many ranks each needs few of small windows."""
        share, G = self.share, self.share.global_packs
        of_step = np.concatenate([share.of_micro_step(m) for m in range(share.micro_steps)])
        first_step = 0
        for epoch in self.plan.epochs:
            steps, last = epoch.steps(G), -1
            for step in range(max(self.start_step - first_step, 0), steps):
                packs = step * G + of_step
                for window in epoch.windows_of(packs[packs < epoch.packs]):
                    if window != last:
                        yield epoch, window
                    last = window
            first_step += steps


class _OpenWindow:
    """A window's sequences in memory, and its packs."""

    def __init__(self, plan: StreamPlan, window: Window, blocks: list[SequenceBlock | None]):
        self.plan, self.window = plan, window
        found = [block for block in blocks if block is not None]
        self.block = (
            SequenceBlock.join(found) if found else SequenceBlock.empty(plan.dataset.manifest)
        )
        self.samples = plan.samples.cut(self.block)
        slices = [plan.index.samples_of(group) for group in window.row_groups]
        readable = np.repeat(
            [block is not None for block in blocks], [s.stop - s.start for s in slices]
        )
        self.readable = None if readable.all() else readable
        self.place = np.cumsum(readable) - 1  # in `samples`, of a sample counted in the window

    def pack(self, number: int) -> Pack:
        chosen = self.window.by_pack[slice(*self.window.pack_bounds[number : number + 2])]
        if self.readable is not None:
            chosen = self.place[chosen[self.readable[chosen]]]
        return build_pack(self.samples.take(chosen), self.block, self.plan.tokens, self.plan.shape)


class _Windows:
    """Opens windows in the order in which packs of them are asked for, and reads the next ahead.

    Two windows are in memory at most, so memory does not grow with the data.
    """

    def __init__(self, plan: StreamPlan, pool: Executor, order: Iterator[tuple[EpochPlan, int]]):
        self.plan, self.pool, self.order = plan, pool, order
        self.opened: tuple[int, int] | None = None
        self.skipped: list[str] = []
        self._read_ahead()

    def pack(self, epoch: EpochPlan, number: int) -> Pack:
        if number >= epoch.packs:
            return self._empty_pack()
        (window,) = epoch.windows_of(np.array([number]))
        if (epoch.epoch, window) != self.opened:
            assert (epoch.epoch, window) == self.ahead
            reading = self.reading
            self._read_ahead()
            self.window = _OpenWindow(
                self.plan, epoch.window(window), [self._block(block) for block in reading]
            )
            self.opened = epoch.epoch, window
        return self.window.pack(number - int(epoch.first_pack[window]))

    def newly_skipped(self) -> tuple[str, ...]:
        """What could not be read since the last call."""
        skipped, self.skipped = tuple(self.skipped), []
        return skipped

    def _read_ahead(self) -> None:
        for epoch, window in islice(self.order, 1):
            self.ahead = epoch.epoch, window
            self.reading = [
                self.pool.submit(_read_indexed, self.plan, group) for group in epoch.windows[window]
            ]

    def _block(self, reading: Future[SequenceBlock]) -> SequenceBlock | None:
        try:
            return reading.result()
        except BadShard as error:
            if not self.plan.skip_bad:
                raise
            self.skipped.append(str(error))
            return None

    def _empty_pack(self) -> Pack:
        block = SequenceBlock.empty(self.plan.dataset.manifest)
        return build_pack(Samples.none(), block, self.plan.tokens, self.plan.shape)


def _read_indexed(plan: StreamPlan, group: int) -> SequenceBlock:
    """Read a row group and see that it is the one that was indexed."""
    place = plan.index.row_groups[group]
    block = read_block(plan.dataset, place, plan.tokens, plan.samples.for_training)
    samples, indexed = plan.samples.cut(block), plan.index.samples_of(group)
    samples = samples.take(np.arange(min(indexed.stop - indexed.start, len(samples))))
    if not (
        len(block.rows) == place.rows
        and len(block.item_ids) == plan.index.interactions[group]
        and np.array_equal(sample_lengths(samples, block, plan.tokens), plan.index.tokens[indexed])
        and np.array_equal(samples.targets, plan.index.targets[indexed])
        and _same_totals(totals_of(samples, block, plan.samples), plan.index.totals, indexed)
    ):
        raise BadShard(
            f"{place.part} of {plan.dataset.uri}, row group {place.number}: expected the samples "
            "that were indexed, found others. The file was replaced: prepare data into a folder "
            "of its own, and start a new run on it.",
            place.part,
            place.number,
        )
    return block


def _same_totals(found: np.ndarray | None, expected: np.ndarray | None, indexed: slice) -> bool:
    if found is None or expected is None:
        return found is expected
    return np.array_equal(found, expected[indexed])


def batches(
    stream: PackStream, prefetch: int, device: torch.device | None = None
) -> Iterator[Batch]:
    """The stream's batches, packed ahead by a thread, which starts with this call.

    A thread is enough: it packs many times faster than a model computes, and most of its work is
    numpy's, which lets the engine's thread run.

    Args:
        prefetch: batches that are packed ahead; 0 packs each when it is asked for.
        device: where batches will go; for a GPU they are made in pinned memory.
    """
    on_gpu = device is not None and device.type == "cuda"
    made = (batch.pin_memory() if on_gpu else batch for batch in stream)
    if not prefetch:
        return made
    # A new thread is on GPU 0, where pinning would open a context for every rank.
    start = partial(torch.cuda.set_device, device) if on_gpu else None
    pool = ThreadPoolExecutor(1, "pack-ahead", initializer=start)
    ahead = deque(pool.submit(next, made, None) for _ in range(prefetch))
    return _packed_ahead(made, ahead, pool)


def _packed_ahead(
    made: Iterator[Batch], ahead: deque[Future[Batch | None]], pool: Executor
) -> Iterator[Batch]:
    try:
        while (batch := ahead.popleft().result()) is not None:
            ahead.append(pool.submit(next, made, None))
            yield batch
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
