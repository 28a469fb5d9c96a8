"""Packs in the order of training, for any number of ranks and workers, from any step on."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from dti_dist.data.dataset import Dataset
from dti_dist.data.index import EpochPlan, SplitIndex, Window, read_block
from dti_dist.data.item_tokens import ItemTokens
from dti_dist.data.packing import Pack, PackShape, SharedBody, build_pack, multiple_of_128
from dti_dist.data.samples import IntArray, Samples, make_samples
from dti_dist.data.sequences import SequenceBlock

_UNIT_PADDING = 64  # unit arrays grow in these strides, so that few sizes occur


@dataclass(frozen=True)
class SharedTokens:
    """The shared body of each pack as tensors; see SharedBody for the fields.

    Attributes:
        position, start, end: [B, Lb]; source: [B, L].
    """

    position: torch.Tensor
    start: torch.Tensor
    end: torch.Tensor
    source: torch.Tensor

    def __getstate__(self) -> dict[str, Any]:
        return _as_arrays(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(_as_tensors(state))


def _as_arrays(fields: Any) -> dict[str, Any]:
    """Pickled as arrays, a batch goes from a worker through its pipe in one piece. Each tensor
    would take a file descriptor and a connection of its own: more time than packing."""
    return {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in vars(fields).items()}


def _as_tensors(state: dict[str, Any]) -> dict[str, Any]:
    return {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in state.items()}


@dataclass(frozen=True)
class Batch:
    """One rank's packs of one micro-step as tensors; see Pack for the fields ([B, …] each).

    Where interactions are shared, `tokens` holds the shared body and then the slots; `unit` and
    `positions` go on counting the samples' tokens.

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
    shared: SharedTokens | None = None

    def __getstate__(self) -> dict[str, Any]:
        return _as_arrays(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(_as_tensors(state))

    @property
    def length(self) -> int:
        """L, the tokens of a pack's samples."""
        return self.unit.shape[1] - self.readout_end.shape[1]

    @staticmethod
    def collate(packs: list[Pack], shape: PackShape, **about_step: Any) -> Batch:
        units = max(len(pack.unit_first) for pack in packs)
        units = -(-max(units, 1) // _UNIT_PADDING) * _UNIT_PADDING

        def stack(name: str) -> torch.Tensor:
            rows = [getattr(pack, name) for pack in packs]
            return torch.from_numpy(np.stack(rows) if len(rows) > 1 else rows[0][None])

        def stack_padded(name: str, size: int) -> torch.Tensor:
            """[B, size], what is missing filled with 0, or with the last unit's end."""
            rows = [getattr(pack, name) for pack in packs]
            table = np.zeros((len(rows), size), dtype=rows[0].dtype)
            for line, row in zip(table, rows, strict=True):
                line[: len(row)] = row
                if name == "unit_start":
                    line[len(row) :] = row[-1]
            return torch.from_numpy(table)

        tokens, shared = stack("tokens"), None
        if shape.body is not None:
            bodies = [pack.shared for pack in packs if pack.shared is not None]
            shared_tokens, shared = _collate_shared(bodies, shape.body)
            tokens = torch.cat([shared_tokens, tokens[:, shape.length :]], dim=1)
        return Batch(
            tokens=tokens,
            positions=stack("positions"),
            unit=stack("unit"),
            unit_start=stack_padded("unit_start", units + 1),
            unit_first=stack_padded("unit_first", units),
            prefix_start=stack_padded("prefix_start", units),
            prefix_end=stack_padded("prefix_end", units),
            readout_end=stack("readout_end"),
            labels=stack("labels"),
            weights=stack("weights"),
            target_row=stack("target_row"),
            target_position=stack("target_position"),
            body_tokens=sum(pack.body_tokens for pack in packs),
            shared=shared,
            **about_step,
        )

    def _map(self, change: Any) -> Batch:
        tensors = {k: change(v) for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        if self.shared is not None:
            tensors["shared"] = SharedTokens(*map(change, vars(self.shared).values()))
        return replace(self, **tensors)

    def to(self, device: torch.device) -> Batch:
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        return self._map(lambda tensor: tensor.pin_memory())


def _collate_shared(bodies: list[SharedBody], usual: int) -> tuple[torch.Tensor, SharedTokens]:
    """Token ids [B, Lb], and what they are.

    Lb is a constant of the run but for the rare batch that needs more, which gets an eighth more.
    """
    longest = max(len(body.tokens) for body in bodies)
    stride = multiple_of_128(max(usual // 8, 1))
    length = usual + -(-max(longest - usual, 0) // stride) * stride

    def stack(name: str) -> torch.Tensor:
        table = np.zeros((len(bodies), length), dtype=getattr(bodies[0], name).dtype)
        for line, body in zip(table, bodies, strict=True):
            line[: len(body.tokens)] = getattr(body, name)
        return torch.from_numpy(table)

    source = torch.from_numpy(np.stack([body.source for body in bodies]))
    return stack("tokens"), SharedTokens(stack("positions"), stack("start"), stack("end"), source)


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
            step_targets = reader.targets(step * G, (step + 1) * G)
            for micro_step in range(share.micro_steps):
                # Numbered over the whole run: the loader takes from its workers in turn.
                at = (first_step + step - self.start_step) * share.micro_steps + micro_step
                if at % workers != worker:
                    continue
                wanted = [step * G + pack for pack in share.of_micro_step(micro_step)]
                yield Batch.collate(
                    [reader.pack(pack) for pack in wanted],
                    self.plan.shape,
                    step=first_step + step,
                    epoch=epoch,
                    step_targets=step_targets,
                    last_of_step=micro_step == share.micro_steps - 1,
                )


class _EpochReader:
    """Builds an epoch's packs by number, which must not fall from one call to the next.

    Windows are planned when they are reached, so an epoch starts without looking at all of it.
    """

    def __init__(self, plan: StreamPlan, epoch: int):
        self.plan = plan
        self.unplanned = iter(plan.epoch(epoch))
        self.planned: deque[Window] = deque()
        self.first_pack = self.end_pack = 0  # bounds of the planned windows
        self.opened: Window | None = None

    def targets(self, first_pack: int, end_pack: int) -> int:
        """How many targets the packs from first_pack to end_pack - 1 have."""
        self._plan(first_pack, end_pack)
        targets = np.concatenate([window.pack_targets for window in self.planned])
        return int(targets[first_pack - self.first_pack : end_pack - self.first_pack].sum())

    def pack(self, number: int) -> Pack:
        self._plan(number, number + 1)
        if number >= self.end_pack:
            return self._empty_pack()
        if self.planned[0] is not self.opened:
            self._open(self.planned[0])
        at = number - self.first_pack
        chosen = self.by_pack[self.pack_bounds[at] : self.pack_bounds[at + 1]]
        return build_pack(self.samples.take(chosen), self.block, self.plan.tokens, self.plan.shape)

    def _plan(self, first_pack: int, end_pack: int) -> None:
        """Hold the windows of these packs: forget those before, so that memory stays bounded."""
        while True:
            while self.planned and self.first_pack + self.planned[0].packs <= first_pack:
                self.first_pack += self.planned.popleft().packs
            if self.end_pack >= end_pack or (window := next(self.unplanned, None)) is None:
                return
            self.planned.append(window)
            self.end_pack += window.packs

    def _open(self, window: Window) -> None:
        plan = self.plan
        self.block = SequenceBlock.join(
            [
                read_block(plan.dataset, plan.index.row_groups[g], plan.tokens)
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
        self.opened = window

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
