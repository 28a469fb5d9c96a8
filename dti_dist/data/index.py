"""The index of a split: every sample's size, kept beside the data so that steps are known first."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dti_dist.config import SampleConfig
from dti_dist.console import progress
from dti_dist.data.dataset import Dataset, iter_sequences
from dti_dist.data.item_tokens import ItemTokens
from dti_dist.data.packing import PackShape, assign_packs
from dti_dist.data.samples import IntArray, make_samples, sample_lengths
from dti_dist.data.sequences import SequenceBlock

_FORMAT = 1  # raise when what is stored, or the cutting of samples, changes


@dataclass(frozen=True)
class RowGroup:
    """Where one block of user sequences lies."""

    part: str
    number: int
    first_row: int


@dataclass(frozen=True)
class SplitIndex:
    """Sizes of all samples of a split, row group after row group.

    Attributes:
        row_groups: where the sequences lie.
        interactions: [row groups] interactions in each.
        sample_offsets: [row groups + 1] bounds of each row group's samples.
        tokens: [samples] int32 body tokens; targets: [samples] uint16.
        row_targets: [rows] int32 targets of each user sequence.
    """

    row_groups: tuple[RowGroup, ...]
    interactions: IntArray
    sample_offsets: IntArray
    tokens: npt.NDArray[np.int32]
    targets: npt.NDArray[np.uint16]
    row_targets: npt.NDArray[np.int32]
    fingerprint: str

    @property
    def total_targets(self) -> int:
        return int(self.targets.sum(dtype=np.int64))

    def samples_of(self, row_group: int) -> slice:
        return slice(*self.sample_offsets[row_group : row_group + 2].tolist())

    def first_users(self, max_targets: int | None, k: int) -> SplitIndex:
        """The index of the first whole users that have `max_targets` together.

        Rows lie in the order of a hash of the user, so these are users drawn at random, the same
        ones for any n, k and paradigm. For streams without shuffling.
        """
        if max_targets is None or max_targets >= self.total_targets:
            return self
        rows = int(np.searchsorted(np.cumsum(self.row_targets), max_targets)) + 1
        samples = int((-(-self.row_targets[:rows] // k)).sum())
        groups = int(np.searchsorted(self.sample_offsets, samples))
        return replace(
            self,
            row_groups=self.row_groups[:groups],
            interactions=self.interactions[:groups],
            sample_offsets=np.minimum(self.sample_offsets[: groups + 1], samples),
            tokens=self.tokens[:samples],
            targets=self.targets[:samples],
            row_targets=self.row_targets[:rows],
        )


def read_block(dataset: Dataset, row_group: RowGroup, timestamps: bool) -> SequenceBlock:
    """Read one row group. Raises BadShard naming the file and row group when it can't be read."""
    columns = ["item_ids", "labels", "target_start"] + (["timestamps"] if timestamps else [])
    split = row_group.part.split("/")[0]
    place = [(row_group.part, row_group.number)]
    (batch,) = iter_sequences(dataset, split, columns, place)
    return SequenceBlock.from_arrow(batch.rows, row_group.first_row)


def load_or_build(
    dataset: Dataset, split: str, sample: SampleConfig, tokens: ItemTokens, cache_dir: Path
) -> SplitIndex:
    """Open the split's index from the cache, or read the split once and build it."""
    mark = _fingerprint(dataset, split, sample, tokens)
    path = cache_dir / f"index-{split}-{mark}.npz"
    row_groups = _row_groups(dataset, split)
    if not path.exists():
        _build(dataset, split, sample, tokens, row_groups, path)
    with np.load(path) as stored:
        return SplitIndex(
            row_groups=row_groups,
            interactions=stored["interactions"],
            sample_offsets=stored["sample_offsets"],
            tokens=stored["tokens"],
            targets=stored["targets"],
            row_targets=stored["row_targets"],
            fingerprint=mark,
        )


def _fingerprint(dataset: Dataset, split: str, sample: SampleConfig, tokens: ItemTokens) -> str:
    files = [(part.path, part.sha256) for part in dataset.parts(split)]
    settings = [_FORMAT, files, tokens.fingerprint, sample.context, sample.k, sample.min_context]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _row_groups(dataset: Dataset, split: str) -> tuple[RowGroup, ...]:
    groups: list[RowGroup] = []
    first_row = 0
    for part in dataset.parts(split):
        with dataset.open_part(part) as file:
            metadata = file.metadata
        for number in range(metadata.num_row_groups):
            groups.append(RowGroup(part.path, number, first_row))
            first_row += metadata.row_group(number).num_rows
    return tuple(groups)


def _build(
    dataset: Dataset,
    split: str,
    sample: SampleConfig,
    tokens: ItemTokens,
    row_groups: tuple[RowGroup, ...],
    path: Path,
) -> None:
    sizes: list[npt.NDArray[np.int32]] = []
    targets: list[npt.NDArray[np.uint16]] = []
    row_targets: list[npt.NDArray[np.int32]] = []
    interactions: list[int] = []
    with progress(f"indexing {split}", len(row_groups), "row groups") as bar:
        for row_group in row_groups:
            block = read_block(dataset, row_group, timestamps=bool(tokens.gaps))
            samples = make_samples(
                block.offsets, block.target_start, sample.context, sample.k, sample.min_context
            )
            sizes.append(sample_lengths(samples, block, tokens).astype(np.int32))
            targets.append(samples.targets.astype(np.uint16))
            of_rows = np.bincount(samples.row, samples.targets, minlength=len(block.rows))
            row_targets.append(of_rows.astype(np.int32))
            interactions.append(len(block.item_ids))
            bar.advance()
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.npz")
    np.savez(
        staging,
        interactions=np.array(interactions, dtype=np.int64),
        sample_offsets=np.cumsum([0] + [len(size) for size in sizes]),
        tokens=np.concatenate(sizes),
        targets=np.concatenate(targets),
        row_targets=np.concatenate(row_targets),
    )
    os.replace(staging, path)


@dataclass(frozen=True)
class Window:
    """Row groups that are in memory together, and their samples in the order of the epoch.

    Attributes:
        row_groups: indexes into SplitIndex.row_groups, in reading order.
        order: [samples] a permutation of the window's samples, counted in reading order.
        pack_of: [samples] the pack, counted in the window, of each sample in `order`.
        packs: how many packs the window fills.
        pack_targets: [packs] targets in each pack.
    """

    row_groups: tuple[int, ...]
    order: IntArray
    pack_of: IntArray
    pack_targets: IntArray

    @property
    def packs(self) -> int:
        return len(self.pack_targets)


@dataclass(frozen=True)
class EpochPlan:
    """Which samples lie in which pack of an epoch: a function of (index, seed, epoch) alone.

    With `shuffle`, row groups are drawn from the whole split in random order, windows of about
    `window_interactions` are cut from that order, samples are shuffled within a window, and packs
    are filled within it.
    """

    index: SplitIndex
    shape: PackShape
    window_interactions: int
    seed: int
    epoch: int
    shuffle: bool

    def windows(self) -> list[tuple[int, ...]]:
        groups = np.arange(len(self.index.row_groups))
        if self.shuffle:
            groups = np.random.default_rng([self.seed, self.epoch]).permutation(groups)
        windows: list[list[int]] = [[]]
        held = 0
        for group in groups.tolist():
            size = int(self.index.interactions[group])
            if windows[-1] and held + size > self.window_interactions:
                windows.append([])
                held = 0
            windows[-1].append(group)
            held += size
        return [tuple(window) for window in windows if window]

    def window(self, number: int, row_groups: tuple[int, ...]) -> Window:
        slices = [self.index.samples_of(group) for group in row_groups]
        tokens = np.concatenate([self.index.tokens[s] for s in slices]).astype(np.int64)
        targets = np.concatenate([self.index.targets[s] for s in slices]).astype(np.int64)
        order = np.arange(len(tokens))
        if self.shuffle:
            order = np.random.default_rng([self.seed, self.epoch, number]).permutation(order)
        pack_of = assign_packs(tokens[order], targets[order], self.shape)
        pack_targets = np.bincount(pack_of, weights=targets[order]).astype(np.int64)
        return Window(row_groups, order, pack_of, pack_targets)

    def __iter__(self) -> Iterator[Window]:
        for number, row_groups in enumerate(self.windows()):
            yield self.window(number, row_groups)
