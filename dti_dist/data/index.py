"""The index of a split: every sample's size, kept beside the data so that steps are known first."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
import zipfile
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

_FORMAT = 2  # raise when what is stored, or the cutting of samples, changes


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
        tokens: [samples] int32 body tokens; targets: [samples] int32.
        row_targets: [rows] int32 targets of each user sequence.
    """

    row_groups: tuple[RowGroup, ...]
    interactions: IntArray
    sample_offsets: IntArray
    tokens: npt.NDArray[np.int32]
    targets: npt.NDArray[np.int32]
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


def read_block(dataset: Dataset, row_group: RowGroup, tokens: ItemTokens) -> SequenceBlock:
    """Read one row group. Raises BadShard naming the file and row group when it can't be read."""
    split = row_group.part.split("/")[0]
    place = [(row_group.part, row_group.number)]
    (batch,) = iter_sequences(dataset, split, _columns(tokens), place)
    return SequenceBlock.from_arrow(batch.rows, row_group.first_row)


def _columns(tokens: ItemTokens) -> list[str]:
    """Timestamps are read only where time gaps are written."""
    return ["item_ids", "labels", "target_start"] + (["timestamps"] if tokens.gaps else [])


def load_or_build(
    dataset: Dataset, split: str, sample: SampleConfig, tokens: ItemTokens, cache_dir: Path
) -> SplitIndex:
    """Open the split's index from the cache, or read the split once and build it.

    Safe when several processes build at once: each writes a file of its own, and their content is
    the same.
    """
    mark = _fingerprint(dataset, split, sample, tokens)
    path = cache_dir / f"index-{split}-{mark}.npz"
    stored = _load(path)
    if stored is None:
        stored = _build(dataset, split, sample, tokens)
        _save(path, stored)
    parts = [part.path for part in dataset.parts(split)]
    places = zip(stored.pop("part"), stored.pop("number"), stored.pop("first_row"), strict=True)
    return SplitIndex(
        row_groups=tuple(RowGroup(parts[part], int(n), int(row)) for part, n, row in places),
        fingerprint=mark,
        **stored,
    )


def _fingerprint(dataset: Dataset, split: str, sample: SampleConfig, tokens: ItemTokens) -> str:
    files = [(part.path, part.sha256) for part in dataset.parts(split)]
    settings = [_FORMAT, files, tokens.fingerprint, sample.context, sample.k, sample.min_context]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _load(path: Path) -> dict[str, np.ndarray] | None:
    """None where the file is missing or was cut short, as by a crash of the machine."""
    try:
        with np.load(path) as stored:
            return dict(stored)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None


def _save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.npz")
    try:
        np.savez(staging, allow_pickle=False, **arrays)
        os.replace(staging, path)
    finally:
        staging.unlink(missing_ok=True)


def _build(
    dataset: Dataset, split: str, sample: SampleConfig, tokens: ItemTokens
) -> dict[str, np.ndarray]:
    """The arrays of SplitIndex, and of each row group: part, number in it, first row."""
    parts = {part.path: number for number, part in enumerate(dataset.parts(split))}
    places: list[tuple[int, int, int, int]] = []
    sizes = [np.empty(0, dtype=np.int32)]
    targets = [np.empty(0, dtype=np.int32)]
    row_targets = [np.empty(0, dtype=np.int32)]
    first_row = 0
    with progress(f"indexing {split}", dataset.manifest.counts.splits[split].rows, "rows") as bar:
        for batch in iter_sequences(dataset, split, _columns(tokens)):
            block = SequenceBlock.from_arrow(batch.rows, first_row)
            samples = make_samples(
                block.offsets, block.target_start, sample.context, sample.k, sample.min_context
            )
            sizes.append(sample_lengths(samples, block, tokens).astype(np.int32))
            targets.append(samples.targets.astype(np.int32))
            of_rows = np.bincount(samples.row, samples.targets, minlength=len(block.rows))
            row_targets.append(of_rows.astype(np.int32))
            places.append((parts[batch.part.path], batch.row_group, first_row, len(block.item_ids)))
            first_row += len(block.rows)
            bar.advance(len(block.rows))
    part, number, start, interactions = np.array(places, dtype=np.int64).reshape(-1, 4).T
    return {
        "part": part,
        "number": number,
        "first_row": start,
        "interactions": interactions,
        "sample_offsets": np.cumsum([len(size) for size in sizes]),
        "tokens": np.concatenate(sizes),
        "targets": np.concatenate(targets),
        "row_targets": np.concatenate(row_targets),
    }


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
