"""Packs in the order of training, for any number of ranks and workers, from any step on."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from dti_dist.data.dataset import BadShard, Dataset
from dti_dist.data.epochs import EpochPlan, Window
from dti_dist.data.index import SplitIndex, read_block
from dti_dist.data.item_tokens import ItemTokens
from dti_dist.data.packing import Pack, PackShape, SharedBody, build_pack, multiple_of_128
from dti_dist.data.samples import Samples, make_samples, sample_lengths
from dti_dist.data.sequences import SequenceBlock
from dti_dist.errors import UserError

_READERS = 4  # threads that read row groups: an object store answers slowly, but many at once
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
        skipped: what could not be read and was left out, since the batch before.
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
    used: torch.Tensor
    target_row: torch.Tensor
    target_position: torch.Tensor
    body_tokens: int
    step: int
    epoch: int
    step_targets: int
    last_of_step: bool
    skipped: tuple[str, ...] = ()
    unit_place: torch.Tensor | None = None
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
        candidates = packs[0].unit_place is not None
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
            used=stack("used"),
            target_row=stack("target_row"),
            target_position=stack("target_position"),
            body_tokens=sum(pack.body_tokens for pack in packs),
            unit_place=stack_padded("unit_place", units) if candidates else None,
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
    """All epochs of a run over one split. Small, and equal on every rank.

    Attributes:
        skip_bad: leave out what can't be read any more, instead of raising BadShard.
    """

    dataset: Dataset
    tokens: ItemTokens
    samples: SampleSettings
    epochs: tuple[EpochPlan, ...]
    skip_bad: bool = False

    @property
    def index(self) -> SplitIndex:
        return self.epochs[0].index

    @property
    def shape(self) -> PackShape:
        return self.epochs[0].shape

    def steps_per_epoch(self, global_packs: int) -> list[int]:
        """Optimizer steps of each epoch, the last of an epoch filled up with empty packs."""
        return [epoch.steps(global_packs) for epoch in self.epochs]


class PackStream(IterableDataset):
    """This rank's batches from optimizer step `start_step` on, to the end of the last epoch.

    Which samples make up step s depends on (data, settings, seed, s) alone: ranks, workers and
    micro-steps only share them out.
    """

    def __init__(self, plan: StreamPlan, share: Share, start_step: int = 0):
        self.plan = plan
        self.share = share
        self.start_step = start_step

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        share, G = self.share, self.share.global_packs
        pool = ThreadPoolExecutor(_READERS, "read-ahead")
        windows = _Windows(self.plan, pool)
        first_step = 0
        try:
            for epoch in self.plan.epochs:
                steps = epoch.steps(G)
                for step in range(max(self.start_step - first_step, 0), steps):
                    step_targets = epoch.pack_targets[step * G : (step + 1) * G].sum(dtype=np.int64)
                    for micro_step in range(share.micro_steps):
                        # Numbered over the whole run: the loader takes from its workers in turn.
                        at = (first_step + step - self.start_step) * share.micro_steps + micro_step
                        if at % workers != number:
                            continue
                        wanted = [step * G + pack for pack in share.of_micro_step(micro_step)]
                        yield Batch.collate(
                            [windows.pack(epoch, pack) for pack in wanted],
                            self.plan.shape,
                            step=first_step + step,
                            epoch=epoch.epoch,
                            step_targets=int(step_targets),
                            last_of_step=micro_step == share.micro_steps - 1,
                            skipped=windows.newly_skipped(),
                        )
                first_step += steps
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


class _OpenWindow:
    """A window's sequences in memory, and its packs."""

    def __init__(self, plan: StreamPlan, window: Window, blocks: list[SequenceBlock | None]):
        self.plan, self.window = plan, window
        settings = plan.samples
        found = [block for block in blocks if block is not None]
        self.block = SequenceBlock.join(found) if found else SequenceBlock.empty()
        self.samples = make_samples(
            self.block.offsets,
            self.block.target_start,
            settings.n,
            settings.k,
            settings.min_context,
        )
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
    """Opens windows as packs of them are asked for, in rising order, and reads the next one ahead.

    Two windows are in memory at most, so memory does not grow with the data.
    """

    def __init__(self, plan: StreamPlan, pool: Executor):
        self.plan, self.pool = plan, pool
        self.ahead: dict[tuple[int, int], list[Future[SequenceBlock]]] = {}
        self.opened: tuple[int, int] | None = None
        self.skipped: list[str] = []

    def pack(self, epoch: EpochPlan, number: int) -> Pack:
        if number >= epoch.packs:
            return self._empty_pack()
        window = epoch.window_of(number)
        place = (epoch.epoch, window)
        if place != self.opened:
            reading = self.ahead.pop(place, None) or self._read(epoch, window)
            for unused in self.ahead.values():
                for future in unused:
                    future.cancel()
            self.ahead.clear()
            self._read_ahead(epoch, window)
            self.window = _OpenWindow(
                self.plan, epoch.window(window), [self._block(block) for block in reading]
            )
            self.opened = place
        return self.window.pack(number - int(epoch.first_pack[window]))

    def newly_skipped(self) -> tuple[str, ...]:
        """What could not be read since the last call."""
        skipped, self.skipped = tuple(self.skipped), []
        return skipped

    def _read(self, epoch: EpochPlan, window: int) -> list[Future[SequenceBlock]]:
        return [
            self.pool.submit(_read_indexed, self.plan, group) for group in epoch.windows[window]
        ]

    def _read_ahead(self, epoch: EpochPlan, window: int) -> None:
        if window + 1 < len(epoch.windows):
            self.ahead[epoch.epoch, window + 1] = self._read(epoch, window + 1)
        elif epoch.epoch + 1 < len(self.plan.epochs):
            following = self.plan.epochs[epoch.epoch + 1]
            self.ahead[following.epoch, 0] = self._read(following, 0)

    def _block(self, reading: Future[SequenceBlock]) -> SequenceBlock | None:
        try:
            return reading.result()
        except BadShard as error:
            if not self.plan.skip_bad:
                raise
            self.skipped.append(str(error))
            return None

    def _empty_pack(self) -> Pack:
        none = np.empty(0, dtype=np.int64)
        samples = Samples(none, none, none, none)
        return build_pack(samples, SequenceBlock.empty(), self.plan.tokens, self.plan.shape)


def _read_indexed(plan: StreamPlan, group: int) -> SequenceBlock:
    """Read a row group and see that it is the one that was indexed."""
    place = plan.index.row_groups[group]
    block = read_block(plan.dataset, place, plan.tokens)
    settings, indexed = plan.samples, plan.index.samples_of(group)
    samples = make_samples(
        block.offsets, block.target_start, settings.n, settings.k, settings.min_context
    )
    samples = samples.take(np.arange(min(indexed.stop - indexed.start, len(samples))))
    if not (
        len(block.rows) == place.rows
        and len(block.item_ids) == plan.index.interactions[group]
        and np.array_equal(sample_lengths(samples, block, plan.tokens), plan.index.tokens[indexed])
        and np.array_equal(samples.targets, plan.index.targets[indexed])
    ):
        raise BadShard(
            f"{place.part} of {plan.dataset.uri}, row group {place.number}: expected the samples "
            "that were indexed, found others. The file was replaced: prepare data into a folder "
            "of its own, and start a new run on it.",
            place.part,
            place.number,
        )
    return block


class _Guarded(IterableDataset):
    """A stream whose errors cross from a worker to its rank as they are, without a traceback."""

    def __init__(self, stream: PackStream):
        self.stream = stream

    def __iter__(self) -> Iterator[Batch | UserError]:
        try:
            yield from self.stream
        except UserError as error:
            yield error


def batches(
    stream: PackStream, workers: int, prefetch: int, pin_memory: bool = False
) -> Iterator[Batch]:
    """The stream, packed ahead by worker processes, which start with this call.

    Workers are spawned: s3fs can't be forked.
    """
    loader: DataLoader[Batch | UserError] = DataLoader(
        _Guarded(stream),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        multiprocessing_context="spawn" if workers else None,
        pin_memory=pin_memory,
    )
    return _unguarded(iter(loader))


def _unguarded(loaded: Iterator[Batch | UserError]) -> Iterator[Batch]:
    for batch in loaded:
        if isinstance(batch, UserError):
            raise batch
        yield batch
