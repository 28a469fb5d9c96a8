"""Packs in the order of training, for any number of ranks and workers, from any step on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from dti_dist.data.dataset import Dataset
from dti_dist.data.index import EpochPlan, SplitIndex, read_block
from dti_dist.data.item_tokens import ItemTokens
from dti_dist.data.packing import Pack, PackShape, build_pack
from dti_dist.data.samples import IntArray, Samples, make_samples
from dti_dist.data.sequences import SequenceBlock

_UNIT_PADDING = 64  # unit arrays grow in these strides, so that few sizes occur


@dataclass(frozen=True)
class Batch:
    """One rank's packs of one micro-step as tensors; see Pack for the fields ([B, …] each).

    Attributes:
        step: optimizer step since the start of the run; epoch: its epoch.
        step_targets: targets of the whole optimizer step, over all ranks and micro-steps.
        last_of_step: whether this micro-step ends the optimizer step.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    unit: torch.Tensor
    unit_start: torch.Tensor
    unit_first: torch.Tensor
    prefix_start: torch.Tensor
    prefix_end: torch.Tensor
    readout_end: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    target_row: torch.Tensor
    target_position: torch.Tensor
    body_tokens: int
    step: int
    epoch: int
    step_targets: int
    last_of_step: bool

    @staticmethod
    def collate(packs: list[Pack], **about_step: Any) -> Batch:
        units = max(len(pack.unit_first) for pack in packs)
        units = -(-max(units, 1) // _UNIT_PADDING) * _UNIT_PADDING

        def stack(name: str) -> torch.Tensor:
            return torch.from_numpy(np.stack([getattr(pack, name) for pack in packs]))

        def padded(name: str, size: int) -> torch.Tensor:
            rows = [getattr(pack, name) for pack in packs]
            last = [row[-1] if name == "unit_start" else 0 for row in rows]
            return torch.from_numpy(
                np.stack(
                    [
                        np.pad(row, (0, size - len(row)), constant_values=value)
                        for row, value in zip(rows, last, strict=True)
                    ]
                )
            )

        return Batch(
            tokens=stack("tokens"),
            positions=stack("positions"),
            unit=stack("unit"),
            unit_start=padded("unit_start", units + 1),
            unit_first=padded("unit_first", units),
            prefix_start=padded("prefix_start", units),
            prefix_end=padded("prefix_end", units),
            readout_end=stack("readout_end"),
            labels=stack("labels"),
            weights=stack("weights"),
            target_row=stack("target_row"),
            target_position=stack("target_position"),
            body_tokens=sum(pack.body_tokens for pack in packs),
            **about_step,
        )

    def _map(self, change: Any) -> Batch:
        tensors = {k: change(v) for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return replace(self, **tensors)

    def to(self, device: torch.device) -> Batch:
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        return self._map(lambda tensor: tensor.pin_memory())


@dataclass(frozen=True)
class Share:
    """How an optimizer step's packs are shared out: G = ranks x micro-steps x micro_packs."""

    global_packs: int
    micro_packs: int
    rank: int = 0
    ranks: int = 1

    @property
    def micro_steps(self) -> int:
        return self.global_packs // (self.ranks * self.micro_packs)

    def of_micro_step(self, micro_step: int) -> range:
        """Which of the step's packs this rank reads in a micro-step."""
        first = (micro_step * self.ranks + self.rank) * self.micro_packs
        return range(first, first + self.micro_packs)


@dataclass(frozen=True)
class SampleSettings:
    """n, k and the least context of a target."""

    n: int
    k: int
    min_context: int


@dataclass(frozen=True)
class StreamPlan:
    """All epochs of a run over one split. Small, and equal on every rank."""

    dataset: Dataset
    index: SplitIndex
    tokens: ItemTokens
    shape: PackShape
    samples: SampleSettings
    window_interactions: int
    seed: int
    epochs: int
    shuffle: bool

    def epoch(self, epoch: int) -> EpochPlan:
        return EpochPlan(
            self.index, self.shape, self.window_interactions, self.seed, epoch, self.shuffle
        )

    def steps_per_epoch(self, global_packs: int) -> list[int]:
        """Optimizer steps of each epoch, the last of an epoch filled up with empty packs."""
        return [
            -(-sum(window.packs for window in self.epoch(epoch)) // global_packs)
            for epoch in range(self.epochs)
        ]


class PackStream(IterableDataset):
    """This rank's batches from optimizer step `start_step` on, to the end of the last epoch.

    Which samples make up step s depends on (data, settings, seed, s) alone: ranks, workers and
    micro-steps only share them out.
    """

    def __init__(
        self, plan: StreamPlan, share: Share, steps_per_epoch: list[int], start_step: int = 0
    ):
        self.plan = plan
        self.share = share
        self.steps_per_epoch = steps_per_epoch
        self.start_step = start_step

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        first_step = 0
        for epoch, steps in enumerate(self.steps_per_epoch):
            if first_step + steps > self.start_step:
                yield from self._epoch(epoch, first_step, steps, number, workers)
            first_step += steps

    def _epoch(
        self, epoch: int, first_step: int, steps: int, worker: int, workers: int
    ) -> Iterator[Batch]:
        reader = _EpochReader(self.plan, epoch)
        share, G = self.share, self.share.global_packs
        for step in range(max(self.start_step - first_step, 0), steps):
            for micro_step in range(share.micro_steps):
                # Numbered over the whole run: the loader takes from its workers in turn.
                at = (first_step + step - self.start_step) * share.micro_steps + micro_step
                if at % workers != worker:
                    continue
                wanted = [step * G + pack for pack in share.of_micro_step(micro_step)]
                yield Batch.collate(
                    [reader.pack(pack) for pack in wanted],
                    step=first_step + step,
                    epoch=epoch,
                    step_targets=reader.targets(step * G, (step + 1) * G),
                    last_of_step=micro_step == share.micro_steps - 1,
                )


class _EpochReader:
    """Builds an epoch's packs by number; packs are asked for in rising order."""

    def __init__(self, plan: StreamPlan, epoch: int):
        self.plan = plan
        self.epoch_plan = plan.epoch(epoch)
        self.windows = self.epoch_plan.windows()
        # Sizes alone are kept of all windows, so that memory grows with packs and not samples.
        targets = [window.pack_targets for window in self.epoch_plan]
        self.first_pack = np.cumsum([0] + [len(window) for window in targets])
        self.targets_before = np.cumsum(np.concatenate([[0], *targets]))
        self.open_window = -1

    def targets(self, first_pack: int, end_pack: int) -> int:
        last = len(self.targets_before) - 1
        return int(
            self.targets_before[min(end_pack, last)] - self.targets_before[min(first_pack, last)]
        )

    def pack(self, number: int) -> Pack:
        if number >= self.first_pack[-1]:
            return self._empty_pack()
        window = int(np.searchsorted(self.first_pack, number, side="right")) - 1
        if window != self.open_window:
            self._open(window)
        at = number - self.first_pack[window]
        chosen = self.by_pack[self.pack_bounds[at] : self.pack_bounds[at + 1]]
        return build_pack(self.samples.take(chosen), self.block, self.plan.tokens, self.plan.shape)

    def _open(self, number: int) -> None:
        plan, window = self.plan, self.epoch_plan.window(number, self.windows[number])
        self.block = SequenceBlock.join(
            [
                read_block(plan.dataset, plan.index.row_groups[g], bool(plan.tokens.gaps))
                for g in window.row_groups
            ]
        )
        settings = plan.samples
        self.samples = make_samples(
            self.block.offsets,
            self.block.target_start,
            settings.n,
            settings.k,
            settings.min_context,
        )
        # Samples grouped by pack, in the order of the epoch within each.
        grouped = np.argsort(window.pack_of, kind="stable")
        self.by_pack: IntArray = window.order[grouped]
        self.pack_bounds: IntArray = np.searchsorted(
            window.pack_of[grouped], np.arange(window.packs + 1)
        )
        self.open_window = number

    def _empty_pack(self) -> Pack:
        none = np.empty(0, dtype=np.int64)
        block = SequenceBlock(
            none.astype(np.int32), none.astype(np.int8), none, np.zeros(1, np.int64), none, none
        )
        return build_pack(Samples(none, none, none, none), block, self.plan.tokens, self.plan.shape)


def batches(
    stream: PackStream, workers: int, prefetch: int, pin_memory: bool = False
) -> DataLoader[Batch]:
    """The stream, packed ahead by worker processes. Workers are spawned: s3fs can't be forked."""
    return DataLoader(
        stream,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        multiprocessing_context="spawn" if workers else None,
        pin_memory=pin_memory,
    )
