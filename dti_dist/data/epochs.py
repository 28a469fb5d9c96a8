"""The plan of an epoch: which samples lie in which pack, so that its steps are known first."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dti_dist.console import progress
from dti_dist.data import array_folder
from dti_dist.data.index import SINGLE_PROCESS, ProcessGroup, SplitIndex
from dti_dist.data.layout import PackShape
from dti_dist.data.packing import assign_packs
from dti_dist.data.samples import IntArray

_FORMAT = 1  # raise when windows are drawn or packs are filled in another way


@dataclass(frozen=True)
class Order:
    """In which order a run reads a split.

    With `shuffle`, row groups are drawn from the whole split in random order, windows of about
    `window_interactions` are cut from that order, samples are shuffled within a window, and packs
    are filled within it.
    """

    window_interactions: int
    seed: int
    shuffle: bool


@dataclass(frozen=True)
class Window:
    """Row groups that are in memory together, and which of their samples lie in each pack.

    Attributes:
        row_groups: indexes into SplitIndex.row_groups, in reading order.
        by_pack: [samples] the window's samples, counted in reading order, pack after pack.
        pack_bounds: [packs + 1] bounds of each pack in `by_pack`.
    """

    row_groups: tuple[int, ...]
    by_pack: IntArray
    pack_bounds: IntArray


@dataclass(frozen=True)
class EpochPlan:
    """Which samples lie in which pack of an epoch: a function of (index, order, epoch) alone.

    Attributes:
        first_pack: [windows + 1] bounds of each window's packs.
        pack_targets: [packs] unsigned, targets in each pack.
        pack_totals: [packs, tasks] `SplitIndex.totals` of each pack's samples.
    """

    index: SplitIndex
    shape: PackShape
    order: Order
    epoch: int
    first_pack: IntArray
    pack_targets: npt.NDArray[np.unsignedinteger]
    pack_totals: npt.NDArray[np.number] | None

    @property
    def packs(self) -> int:
        return len(self.pack_targets)

    def steps(self, global_packs: int) -> int:
        """Optimizer steps, the last filled up with empty packs."""
        return -(-self.packs // global_packs)

    def totals(self, packs: slice) -> tuple[float, ...]:
        """[tasks] what the losses of these packs are divided by: targets with a known label."""
        if self.pack_totals is None:
            return (float(self.pack_targets[packs].sum(dtype=np.int64)),)
        return tuple(self.pack_totals[packs].sum(axis=0, dtype=np.float64).tolist())

    @cached_property
    def windows(self) -> list[tuple[int, ...]]:
        return _windows(self.index, self.order, self.epoch)

    def windows_of(self, packs: IntArray) -> list[int]:
        """The number of the window that each pack lies in."""
        return (np.searchsorted(self.first_pack, packs, side="right") - 1).tolist()

    def window(self, number: int) -> Window:
        order, pack_of = _fill(
            self.index, self.shape, self.order, self.epoch, number, self.windows[number]
        )
        grouped = np.argsort(pack_of, kind="stable")
        packs = int(self.first_pack[number + 1] - self.first_pack[number])
        return Window(
            self.windows[number],
            order[grouped],
            np.searchsorted(pack_of[grouped], np.arange(packs + 1)),
        )


def _windows(index: SplitIndex, order: Order, epoch: int) -> list[tuple[int, ...]]:
    groups = np.arange(len(index.row_groups))
    if order.shuffle:
        groups = np.random.default_rng([order.seed, epoch]).permutation(groups)
    windows: list[list[int]] = [[]]
    held = 0
    for group in groups.tolist():
        size = int(index.interactions[group])
        if windows[-1] and held + size > order.window_interactions:
            windows.append([])
            held = 0
        windows[-1].append(group)
        held += size
    return [tuple(window) for window in windows if window]


def _fill(
    index: SplitIndex,
    shape: PackShape,
    order: Order,
    epoch: int,
    number: int,
    row_groups: tuple[int, ...],
) -> tuple[IntArray, IntArray]:
    """[samples] each: the window's samples in the epoch's order, and the pack of each there."""
    slices = [index.samples_of(group) for group in row_groups]
    tokens = np.concatenate([index.tokens[s] for s in slices]).astype(np.int64)
    targets = np.concatenate([index.targets[s] for s in slices]).astype(np.int64)
    samples = np.arange(len(tokens))
    if order.shuffle:
        samples = np.random.default_rng([order.seed, epoch, number]).permutation(samples)
    return samples, assign_packs(tokens[samples], targets[samples], shape)


def plan_epochs(
    index: SplitIndex,
    shape: PackShape,
    order: Order,
    epochs: int,
    cache_dir: Path,
    group: ProcessGroup = SINGLE_PROCESS,
) -> tuple[EpochPlan, ...]:
    """Open the plans of a run's epochs from the cache, or make them, so that steps are exact.

    All processes of `group` must call this at once; they share the work.
    """
    different = epochs if order.shuffle else min(epochs, 1)
    folders = [cache_dir / f"packs-{_mark(index, shape, order, e)}" for e in range(different)]

    def missing() -> set[int]:
        return {e for e, folder in enumerate(folders) if array_folder.load(folder) is None}

    to_make = sorted(set().union(*group.each(missing)))
    if to_make:
        places = [
            (epoch, number, row_groups)
            for epoch in to_make
            for number, row_groups in enumerate(_windows(index, order, epoch))
        ]
        mine = places[group.rank :: group.world]
        shares = group.each(lambda: _count(index, shape, order, mine, group.rank == 0))
        group.first_on_node(lambda: _keep(folders, to_make, places, shares))
    made = []
    for epoch in range(epochs):
        stored = array_folder.load(folders[min(epoch, different - 1)])
        assert stored is not None, "the cache was removed while it was in use"
        first_pack = np.asarray(stored[0]["first_pack"])
        of_packs = stored[0]["pack_targets"], stored[0].get("pack_totals")
        made.append(EpochPlan(index, shape, order, epoch, first_pack, *of_packs))
    return tuple(made)


def _mark(index: SplitIndex, shape: PackShape, order: Order, epoch: int) -> str:
    about = [_FORMAT, index.fingerprint, len(index.tokens), shape.length, shape.slots]
    settings = [*about, order.window_interactions, order.seed, order.shuffle, epoch]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class _Packs:
    """[packs] of one window: as of EpochPlan."""

    targets: npt.NDArray[np.unsignedinteger]
    totals: npt.NDArray[np.number] | None


def _count(
    index: SplitIndex,
    shape: PackShape,
    order: Order,
    places: list[tuple[int, int, tuple[int, ...]]],
    visible: bool,
) -> list[_Packs]:
    """The packs of these windows."""
    found = []
    samples = sum(
        s.stop - s.start for _, _, groups in places for s in map(index.samples_of, groups)
    )
    with progress("planning packs", samples, "samples", visible) as bar:
        for epoch, number, row_groups in places:
            in_order, pack_of = _fill(index, shape, order, epoch, number, row_groups)
            of_samples = np.concatenate([np.r_[index.samples_of(g)] for g in row_groups])[in_order]
            targets = np.bincount(pack_of, weights=index.targets[of_samples]).astype(np.int64)
            totals = None
            if index.totals is not None:
                columns = index.totals[of_samples].T
                totals = np.column_stack([np.bincount(pack_of, column) for column in columns])
            found.append(_Packs(array_folder.smallest(targets), totals))
            bar.advance(len(in_order))
    return found


def _keep(
    folders: list[Path],
    epochs: list[int],
    places: list[tuple[int, int, tuple[int, ...]]],
    shares: list[list[_Packs]],
) -> None:
    world = len(shares)
    for epoch in epochs:
        if array_folder.holds(folders[epoch]):
            continue
        of_windows = [
            shares[at % world][at // world] for at, place in enumerate(places) if place[0] == epoch
        ]
        none = np.empty(0, dtype=np.uint8)
        totals = [packs.totals for packs in of_windows if packs.totals is not None]
        array_folder.save(
            folders[epoch],
            {
                "first_pack": np.cumsum([0] + [len(packs.targets) for packs in of_windows]),
                "pack_targets": np.concatenate([none, *(packs.targets for packs in of_windows)]),
                **({"pack_totals": np.concatenate(totals)} if totals else {}),
            },
        )
