"""What a run will read, from the plan of its stream: exact counts, and who attends to whom."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from dti_dist.attention.chunked import ChunkedPlan
from dti_dist.attention.flex import FlexPlan
from dti_dist.attention.intervals import VisibleIntervals
from dti_dist.console import progress
from dti_dist.data.epochs import EpochPlan
from dti_dist.data.index import read_block
from dti_dist.data.layout import PackShape
from dti_dist.data.samples import Units, block_words, interaction_lengths
from dti_dist.data.sequences import SequenceBlock
from dti_dist.data.stream import Batch, PackStream, Share, StreamPlan
from dti_dist.model.ctr_model import CTRModel

_MEASURED_PACKS = 8  # whose intervals are counted; packs hold random users, so few are enough


@dataclass(frozen=True)
class EpochCounts:
    """What a run reads of one epoch. `tokens` is what the layers run on, [SUM] included."""

    epoch: int
    steps: int
    packs: int
    samples: int
    targets: int
    tokens: int


@dataclass(frozen=True)
class Workload:
    """What a run reads in all its epochs.

    Attributes:
        epochs: of each epoch that is begun; the last may be cut by training.max_steps.
        pack_runs: packs that the engine runs, those that only fill up an epoch's last step
            included.
        pack: shape of each pack.
    """

    epochs: tuple[EpochCounts, ...]
    global_packs: int
    pack: PackShape

    def _sum(self, name: str) -> int:
        return sum(getattr(epoch, name) for epoch in self.epochs)

    @property
    def steps(self) -> int:
        return self._sum("steps")

    @property
    def pack_runs(self) -> int:
        return self.steps * self.global_packs

    @property
    def targets(self) -> int:
        return self._sum("targets")

    @property
    def tokens(self) -> int:
        return self._sum("tokens")

    @property
    def fill(self) -> float:
        """Share of the tokens run that are none of padding."""
        return self.tokens / (self.pack_runs * (self.pack.computed_body + self.pack.slots))

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return {
            **{
                name: self._sum(name) for name in ("steps", "packs", "samples", "targets", "tokens")
            },
            "tokens_per_target": self.tokens / self.targets,
            "pack_runs": self.pack_runs,
            "pack_tokens": self.pack.length,
            "pack_slots": self.pack.slots,
            "body_tokens": self.pack.computed_body,
            "fill": self.fill,
            "epochs": [asdict(epoch) for epoch in self.epochs],
        }


def workload(plan: StreamPlan, global_packs: int, max_steps: int | None) -> Workload:
    """Count what a run reads of a plan. Where interactions are shared, the data is read once."""
    counted: list[EpochCounts] = []
    left = max_steps
    for epoch in plan.epochs:
        steps = epoch.steps(global_packs)
        if left is not None:
            steps = min(steps, left)
            left -= steps
        if steps:
            counted.append(_count(plan, epoch, steps, min(steps * global_packs, epoch.packs)))
    return Workload(tuple(counted), global_packs, plan.shape)


def steps_for(plan: StreamPlan, global_packs: int, targets: int) -> int:
    """The fewest optimizer steps that train on so many targets, or all steps of the plan."""
    of_step = np.concatenate(
        [
            np.add.reduceat(
                epoch.pack_targets.astype(np.int64), np.arange(0, epoch.packs, global_packs)
            )
            for epoch in plan.epochs
        ]
    )
    return min(int(np.searchsorted(np.cumsum(of_step), targets)) + 1, len(of_step))


def _count(plan: StreamPlan, epoch: EpochPlan, steps: int, packs: int) -> EpochCounts:
    targets = int(epoch.pack_targets[:packs].sum(dtype=np.int64))
    whole, index = packs == epoch.packs, plan.index
    if whole and plan.shape.body is None:
        samples, body_tokens = len(index.tokens), int(index.tokens.sum(dtype=np.int64))
    else:
        samples = body_tokens = 0
        for of_pack_samples, of_pack_tokens in _pack_sizes(plan, epoch, packs):
            samples += of_pack_samples
            body_tokens += of_pack_tokens
    return EpochCounts(epoch.epoch, steps, packs, samples, targets, body_tokens + targets)


def _pack_sizes(plan: StreamPlan, epoch: EpochPlan, packs: int) -> Iterator[tuple[int, int]]:
    """Samples and body tokens of an epoch's first packs, window after window."""
    shared = plan.shape.body is not None
    with progress("counting shared interactions", packs, "packs", shared) as bar:
        for number in range(len(epoch.windows)):
            wanted = min(packs - int(epoch.first_pack[number]), packs)
            if wanted <= 0:
                return
            window = epoch.window(number)
            bounds = window.pack_bounds[: wanted + 1]
            chosen = window.by_pack[: bounds[-1]]
            if shared:
                of_pack = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
                tokens = _distinct_tokens(plan, window.row_groups, chosen, of_pack)
            else:
                slices = [plan.index.samples_of(group) for group in window.row_groups]
                in_window = np.concatenate([plan.index.tokens[s] for s in slices])
                tokens = int(in_window[chosen].sum(dtype=np.int64))
            bar.advance(len(bounds) - 1)
            yield len(chosen), tokens


def _distinct_tokens(
    plan: StreamPlan, row_groups: tuple[int, ...], chosen: np.ndarray, of_pack: np.ndarray
) -> int:
    """Tokens of the distinct interactions and profiles of each pack, as packing lays them out,
    summed.

    Args:
        chosen: [samples] of the window; of_pack: [samples] the pack of each.
    """
    tokens = plan.tokens
    block = SequenceBlock.join(
        [
            read_block(plan.dataset, plan.index.row_groups[g], tokens, plan.samples.for_training)
            for g in row_groups
        ]
    )
    samples = plan.samples.cut(block).take(chosen)
    units = Units.of(samples, block)
    place, labelled = units.source, units.labelled
    texts, kinds = tokens.text_numbers(block.item_ids[place], block_words(block, tokens, place))
    text_in_pack = of_pack[units.sample] * kinds + texts
    _, first = np.unique(text_in_pack, return_index=True)
    labels = len(np.unique((text_in_pack * 2 + block.labels[place])[labelled]))
    text_tokens = int((interaction_lengths(block, tokens)[place[first]] - 1).sum())
    of_profiles = 0
    if tokens.profiles is not None and block.profile is not None:
        pairs = np.stack([of_pack, block.profile[samples.row]])
        of_profiles = int(tokens.profiles.lengths[np.unique(pairs, axis=1)[1]].sum())
    return text_tokens + labels + len(tokens.prefix) * len(np.unique(of_pack)) + of_profiles


@dataclass(frozen=True)
class Pairs:
    """Pairs of a query and a key in one pack, summed over the layers; means over some packs.

    Attributes:
        visible: that the masks let see each other.
        doubled: those of them whose scores are made of twice the head's dimensions.
        chunked, flex: that each backend computes, whose chunks and blocks hold more.
        plan_bytes: of the chunked backend's masks.
    """

    visible: float
    doubled: float
    chunked: float
    flex: float
    plan_bytes: float


def first_packs(plan: StreamPlan, packs: int = _MEASURED_PACKS) -> list[Batch]:
    """The first packs of the first epoch, one a batch."""
    first = replace(plan, epochs=plan.epochs[:1])
    stream = iter(PackStream(first, Share(1, 1)))
    found = [batch for batch, _ in zip(stream, range(packs), strict=False)]
    stream.close()  # type: ignore[attr-defined]
    return found


def count_pairs(model: CTRModel, batches: list[Batch]) -> Pairs:
    """Count from the visible intervals of some packs. No weights are needed."""
    found = np.array([_pairs(model, batch) for batch in batches])
    return Pairs(*found.mean(axis=0).tolist())


def _calls(model: CTRModel, batch: Batch) -> list[tuple[VisibleIntervals, int, int]]:
    """The attention of a forward pass: of body tokens and of slots, by window, in how many layers,
    and in how many of them scores are doubled. Nobody reads the last layer's body."""
    scheme, layout = model.scheme, batch.layout
    body, readout = Counter(scheme.windows.body[:-1]), Counter(scheme.windows.readout)
    doubled: Counter[int] = Counter()
    if layout.profile_end is not None:
        layers_of = enumerate(scheme.windows.readout)
        doubled.update(window for layer, window in layers_of if scheme.doubles_scores(layer))
    return [(scheme.body(layout, window), layers, 0) for window, layers in body.items()] + [
        (scheme.readout(layout, window), layers, doubled[window])
        for window, layers in readout.items()
    ]


def _visible(intervals: VisibleIntervals) -> int:
    """The ranges of a query are disjoint, so their lengths add up."""
    return int((intervals.end - intervals.start).clamp(min=0).sum(dtype=torch.int64))


def _pairs(model: CTRModel, batch: Batch) -> tuple[float, ...]:
    packs = len(batch.tokens)
    visible = doubled = chunked = flex = plan_bytes = 0
    for intervals, layers, of_doubled in _calls(model, batch):  # which share a plan
        readout = intervals.start.shape[2] != intervals.key_length
        (plan,) = ChunkedPlan.build(intervals.for_windows(1), chunk=32 if readout else 128)
        cells = sum(chunk.visible.numel() for chunk in plan.chunks)
        (flex_plan,) = FlexPlan.build(intervals.for_windows(1))
        blocks = flex_plan.blocks
        computed = int(blocks.kv_num_blocks.sum() + blocks.full_kv_num_blocks.sum())
        # A bool, and for slots an int32 distance beside it.
        plan_bytes += cells * (5 if readout else 1)
        seen = _visible(intervals)
        visible += layers * seen
        doubled += of_doubled * seen
        chunked += layers * cells
        flex += layers * computed * 128**2
    return tuple(found / packs for found in (visible, doubled, chunked, flex, plan_bytes))
