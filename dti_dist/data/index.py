"""The index of a split: every sample's size, kept on disk so that start-up never reads the data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from dti_dist.console import progress
from dti_dist.data import array_folder
from dti_dist.data.dataset import UNKNOWN, BadShard, Dataset, Part, iter_sequences
from dti_dist.data.item_tokens import ItemTokens
from dti_dist.data.samples import IntArray, Samples, SampleSettings, sample_lengths
from dti_dist.data.sequences import SequenceBlock, find_fault

_FORMAT = 3  # raise when what is stored, or the cutting of samples, changes
_FEWEST_SHOWN = 20  # row groups: fewer are read before a bar could be seen

T = TypeVar("T")


class ProcessGroup(Protocol):
    """Processes that build at once and share the work; `dti_dist.ranks.Ranks` is one."""

    @property
    def rank(self) -> int: ...

    @property
    def world(self) -> int: ...

    @property
    def local_rank(self) -> int: ...

    def each(self, make: Callable[[], T]) -> list[T]:
        """Call `make` in each process and return all results; an error in one ends all."""
        ...

    def first_on_node(self, make: Callable[[], T]) -> T:
        """Call `make` in one process of each node first, so that the others find its files."""
        ...


class _SingleProcess:
    rank, world, local_rank = 0, 1, 0

    def each(self, make: Callable[[], T]) -> list[T]:
        return [make()]

    def first_on_node(self, make: Callable[[], T]) -> T:
        return make()


SINGLE_PROCESS = _SingleProcess()


@dataclass(frozen=True)
class RowGroup:
    """Where one block of user sequences lies."""

    part: str
    number: int
    first_row: int
    rows: int


@dataclass(frozen=True)
class LeftOut:
    """A part, or one row group of it, that could not be read."""

    part: str
    row_group: int | None
    rows: int
    reason: str


@dataclass(frozen=True)
class SplitIndex:
    """Sizes of all samples of a split, row group after row group.

    Large arrays are memory maps, which the ranks of a node share. They take the fewest
    bytes that hold their values: 3 or 4 a sample, and 1 or 2 a row.

    Attributes:
        row_groups: where the sequences lie.
        interactions: [row groups] interactions in each.
        sample_offsets: [row groups + 1] bounds of each row group's samples.
        tokens: [samples] unsigned, body tokens; targets: [samples] unsigned.
        row_targets: [rows of these row groups] unsigned, targets of each user sequence.
        totals: [samples, tasks] what the targets whose label of a task is known count together:
            their weights, or else their number. None: one task without weights.
        left_out: what could not be read, where that is allowed.
        fingerprint: changes with data, tokenizer, sample settings and what was left out.
        folder: where the index lies.
    """

    row_groups: tuple[RowGroup, ...]
    interactions: IntArray
    sample_offsets: IntArray
    tokens: npt.NDArray[np.unsignedinteger]
    targets: npt.NDArray[np.unsignedinteger]
    row_targets: npt.NDArray[np.unsignedinteger]
    totals: npt.NDArray[np.number] | None
    left_out: tuple[LeftOut, ...]
    fingerprint: str
    folder: Path

    @property
    def total_targets(self) -> int:
        return int(self.targets.sum(dtype=np.int64))

    def samples_of(self, row_group: int) -> slice:
        return slice(*self.sample_offsets[row_group : row_group + 2].tolist())

    def first_users(self, max_targets: int | None) -> SplitIndex:
        """The index of the first whole users that have `max_targets` together.

        Rows lie in the order of a hash of the user, so these are users drawn at random, the same
        ones for any n, k and paradigm. For streams without shuffling.
        """
        if max_targets is None or max_targets >= self.total_targets:
            return self
        of_row = np.cumsum(self.row_targets, dtype=np.int64)
        rows = int(np.searchsorted(of_row, max_targets)) + 1
        of_sample = np.cumsum(self.targets, dtype=np.int64)
        samples = int(np.searchsorted(of_sample, of_row[rows - 1])) + 1
        return self._first(samples, rows)

    def _first(self, samples: int, rows: int) -> SplitIndex:
        if samples == len(self.tokens):
            return self
        groups = int(np.searchsorted(self.sample_offsets, samples))
        return replace(
            self,
            row_groups=self.row_groups[:groups],
            interactions=self.interactions[:groups],
            sample_offsets=np.minimum(self.sample_offsets[: groups + 1], samples),
            tokens=self.tokens[:samples],
            targets=self.targets[:samples],
            row_targets=self.row_targets[:rows],
            totals=None if self.totals is None else self.totals[:samples],
        )


def read_block(
    dataset: Dataset, row_group: RowGroup, tokens: ItemTokens, for_training: bool = False
) -> SequenceBlock:
    """Read one row group.

    Args:
        for_training: leave out the targets that training is not to see, as in all of train.

    Raises BadShard naming the file, the row group and where it can the row: what can't be read, a
    null, sequences of unequal length, a label other than 0 and 1, an unknown item or profile.
    """
    split = row_group.part.split("/")[0]
    place = [(row_group.part, row_group.number)]
    (batch,) = iter_sequences(dataset, split, needed_columns(dataset, tokens), place)
    profiles = 0 if tokens.profiles is None else len(tokens.profiles)
    fault = find_fault(batch.rows, len(tokens.lengths), dataset.manifest.stored, profiles)
    if fault is not None:
        row, problem = fault
        raise BadShard(
            f"{batch.part.uri}, row group {row_group.number}, row {row}: {problem}. "
            "Run prepare again, or set data.on_bad_shard=skip to go on without this row group.",
            row_group.part,
            row_group.number,
        )
    block = SequenceBlock.from_arrow(batch.rows, row_group.first_row, dataset.has_requests)
    return block.for_training() if for_training or split == "train" else block


def needed_columns(dataset: Dataset, tokens: ItemTokens) -> list[str]:
    """Of sequences, for prompts. Timestamps only where texts need them, or they make requests;
    profiles and event columns only where they are read."""
    read = {words.field for words in tokens.words}
    fields = dataset.manifest.event_columns
    skipped = {"user_id", *(field.stored for field in fields if field.name not in read)}
    if tokens.profiles is None:
        skipped.add("profile")
    if not (tokens.needs_times or dataset.has_requests):
        skipped.add("timestamps")
    return [name for name in dataset.sequence_columns if name not in skipped]


def load_or_build(
    dataset: Dataset,
    split: str,
    settings: SampleSettings,
    tokens: ItemTokens,
    cache_dir: Path,
    group: ProcessGroup = SINGLE_PROCESS,
    skip_bad: bool = False,
) -> SplitIndex:
    """Open the split's index from the cache, or read the split once and build it.

    All processes of `group` must call this at once; they share the reading. Safe when several
    jobs build at once.

    Args:
        skip_bad: leave out parts and row groups that can't be read, instead of raising BadShard.
    """
    whole = cache_dir / f"index-{split}-{_fingerprint(dataset, split, settings, tokens)}"
    # What was left out once stays left out while a run may skip, so that its order stays.
    readable = whole.with_name(f"{whole.name}-readable")
    for folder in [readable, whole] if skip_bad else [whole]:
        marks = set(group.each(partial(_fingerprint_at, folder)))
        if len(marks) == 1 and None not in marks:  # the caches of all nodes agree
            return _open(folder)
    parts = dataset.parts(split)
    # The footers first: a part can hold half of the data, so parts are no fair share.
    mine = range(group.rank, len(parts), group.world)
    footers = group.each(lambda: [_row_groups(dataset, parts[at]) for at in mine])
    places, left_out = _places(parts, _in_order(footers, len(parts)), skip_bad)
    rank, world = group.rank, group.world
    shares = group.each(
        lambda: _index_share(dataset, split, settings, tokens, places[rank::world], skip_bad, rank)
    )
    found = _in_order(shares, len(places))
    left_out += [
        LeftOut(place.part, place.number, place.rows, reason)
        for place, reason in zip(places, found, strict=True)
        if isinstance(reason, str)
    ]
    good = [
        (place, sizes)
        for place, sizes in zip(places, found, strict=True)
        if isinstance(sizes, _Sizes)
    ]
    folder = readable if left_out else whole
    group.first_on_node(lambda: _keep(folder, good, left_out))
    return _open(folder)


def _fingerprint_at(folder: Path) -> str | None:
    return None if array_folder.load(folder) is None else _open(folder).fingerprint


def _in_order(shares: list[list[T]], total: int) -> list[T]:
    """Results of every world-th place, as one list."""
    return [shares[at % len(shares)][at // len(shares)] for at in range(total)]


def _fingerprint(dataset: Dataset, split: str, settings: SampleSettings, tokens: ItemTokens) -> str:
    files = [(part.path, part.sha256) for part in dataset.parts(split)]
    n, k, min_context = settings.n, settings.k, settings.min_context
    parts = [_FORMAT, files, tokens.fingerprint, n, k, min_context]
    if dataset.has_requests:
        parts.append("requests")
    if dataset.manifest.keep_negatives is not None and settings.for_training:
        parts.append("for training")
    if dataset.manifest.weight or dataset.manifest.tasks:
        parts.append("totals")
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _row_groups(dataset: Dataset, part: Part) -> list[int] | BadShard:
    """Rows of each row group of a part, or what is wrong with it."""
    try:
        with dataset.open_part(part) as file:
            metadata = file.metadata
            rows = [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)]
    except BadShard as error:
        return error
    if sum(rows) != part.rows:
        return BadShard(
            f"{part.uri}: expected {part.rows:,} rows, as in dataset.json; found {sum(rows):,}. "
            "The file was replaced: copy it again, or run prepare again.",
            part.path,
        )
    return rows


def _places(
    parts: list[Part], footers: list[list[int] | BadShard], skip_bad: bool
) -> tuple[list[RowGroup], list[LeftOut]]:
    """The row groups of all parts, and the parts without any that can be read."""
    places: list[RowGroup] = []
    left_out: list[LeftOut] = []
    first_row = 0
    for part, rows in zip(parts, footers, strict=True):
        if isinstance(rows, BadShard):
            if not skip_bad:
                raise rows
            left_out.append(LeftOut(part.path, None, part.rows, str(rows)))
            first_row += part.rows
            continue
        for number, count in enumerate(rows):
            places.append(RowGroup(part.path, number, first_row, count))
            first_row += count
    return places, left_out


@dataclass(frozen=True)
class _Sizes:
    """What the index keeps of one row group."""

    interactions: int
    tokens: npt.NDArray[np.unsignedinteger]
    targets: npt.NDArray[np.unsignedinteger]
    row_targets: npt.NDArray[np.unsignedinteger]
    totals: npt.NDArray[np.number] | None


def _index_share(
    dataset: Dataset,
    split: str,
    settings: SampleSettings,
    tokens: ItemTokens,
    places: list[RowGroup],
    skip_bad: bool,
    rank: int,
) -> list[_Sizes | str]:
    """The sizes of these row groups, or why one can't be read."""
    found: list[_Sizes | str] = []
    seen = rank == 0 and len(places) >= _FEWEST_SHOWN
    with progress(f"indexing {split}", len(places), "row groups", seen) as bar:
        for place in places:
            try:
                block = read_block(dataset, place, tokens, settings.for_training)
            except BadShard as error:
                if not skip_bad:
                    raise
                found.append(str(error))
            else:
                found.append(_sizes(block, settings, tokens))
            bar.advance()
    return found


def _sizes(block: SequenceBlock, settings: SampleSettings, tokens: ItemTokens) -> _Sizes:
    samples = settings.cut(block)
    of_rows = np.bincount(samples.row, samples.targets, minlength=len(block.rows))
    return _Sizes(
        len(block.item_ids),
        array_folder.smallest(sample_lengths(samples, block, tokens)),
        array_folder.smallest(samples.targets),
        array_folder.smallest(of_rows),
        totals_of(samples, block, settings),
    )


def totals_of(
    samples: Samples, block: SequenceBlock, settings: SampleSettings
) -> npt.NDArray[np.number] | None:
    """`SplitIndex.totals` of the first samples that the settings cut."""
    further, weight = block.further_labels, block.weight
    if further is None and weight is None:
        return None
    at = settings.targets(block)[: samples.targets.sum()]
    counted = np.ones((len(at), 1), dtype=np.int64)
    if weight is not None:
        counted = weight[at, None].astype(np.float64)
    if further is not None:
        counted = np.concatenate([counted, counted * (further[at] != UNKNOWN)], axis=1)
    first = np.cumsum(samples.targets) - samples.targets
    totals = np.add.reduceat(counted, first) if len(first) else counted
    return array_folder.smallest(totals) if weight is None else totals.astype(np.float32)


def _keep(folder: Path, good: list[tuple[RowGroup, _Sizes]], left_out: list[LeftOut]) -> None:
    parts = sorted({place.part for place, _ in good})
    about = {"parts": parts, "left_out": [vars(entry) for entry in left_out]}
    if array_folder.holds(folder, about):
        return
    number_of = {part: number for number, part in enumerate(parts)}
    row_groups = [
        (number_of[place.part], place.number, place.first_row, place.rows, sizes.interactions)
        for place, sizes in good
    ]
    none = np.empty(0, dtype=np.uint8)
    totals = [sizes.totals for _, sizes in good if sizes.totals is not None]
    array_folder.save(
        folder,
        {
            **({"totals": np.concatenate(totals)} if totals else {}),
            "row_groups": np.array(row_groups, dtype=np.int64).reshape(-1, 5),
            "sample_offsets": np.cumsum([0] + [len(sizes.tokens) for _, sizes in good]),
            **{
                name: np.concatenate([none, *(getattr(sizes, name) for _, sizes in good)])
                for name in ("tokens", "targets", "row_targets")
            },
        },
        about,
    )


def _open(folder: Path) -> SplitIndex:
    stored = array_folder.load(folder)
    assert stored is not None, f"{folder} was removed while it was in use"
    arrays, about = stored
    row_groups = np.asarray(arrays["row_groups"])
    left_out = about["left_out"]
    lost = [(entry["part"], entry["row_group"], entry["rows"]) for entry in left_out]
    name = folder.name.removesuffix("-readable")
    mark = hashlib.sha256(json.dumps([name, lost]).encode()).hexdigest()[:16]
    return SplitIndex(
        row_groups=tuple(
            RowGroup(about["parts"][part], number, first_row, rows)
            for part, number, first_row, rows, _ in row_groups.tolist()
        ),
        interactions=row_groups[:, 4],
        sample_offsets=np.asarray(arrays["sample_offsets"]),
        tokens=arrays["tokens"],
        targets=arrays["targets"],
        row_targets=arrays["row_targets"],
        totals=arrays.get("totals"),
        left_out=tuple(LeftOut(**entry) for entry in left_out),
        fingerprint=mark,
        folder=folder,
    )
