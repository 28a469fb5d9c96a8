"""One row group of user sequences as flat arrays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from dti_dist.data.dataset import (
    NO_RULES,
    InteractionRules,
    StoredColumn,
    further_tasks,
    label_column,
    sequence_schema,
    stored_field,
    stored_values,
)
from dti_dist.data.template import GAP, MOMENTS, TIME_GAPS
from dti_dist.errors import UserError

_OWN = {*sequence_schema().names, "profile"}  # columns that a block has a field for


def gap_bucket(seconds: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The time gap's number in TIME_GAPS; len(TIME_GAPS) for the longest ones."""
    return np.searchsorted([bound for bound, _ in TIME_GAPS], seconds, side="right")


def moment_codes(
    name: str, seconds: npt.NDArray[np.int64], time_zone: str
) -> npt.NDArray[np.int64]:
    """Each time's number in MOMENTS[name].

    Raises UserError where this machine does not know the time zone.
    """
    zone = None if time_zone == "UTC" else time_zone  # without one no database is needed
    try:
        moments = pa.array(seconds, pa.int64()).cast(pa.timestamp("s", zone))
        found = pc.hour(moments) if name == "hour" else pc.day_of_week(moments)
    except pa.ArrowInvalid as error:
        raise UserError(
            f"template.time_zone: {time_zone!r} is not known on this machine: {error}. Install "
            "the time zone database, the package tzdata of most Linux distributions."
        ) from error
    return found.to_numpy(zero_copy_only=False)


@dataclass(frozen=True)
class RequestBounds:
    """Where the requests of a block begin, and its history.

    Attributes:
        start: [interactions] the first interaction of its request, counted in the block.
        before: [interactions + 1] how much history of the block lies before it.
        leads: [interactions] whether it is its request's first history.
        history: [interactions]
    """

    start: npt.NDArray[np.int64]
    before: npt.NDArray[np.int64]
    leads: npt.NDArray[np.bool_]
    history: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class SequenceBlock:
    """User sequences end to end.

    Attributes:
        item_ids: [interactions] int32 dense item ids.
        labels: [interactions] int8, 0 or 1.
        timestamps: [interactions] int64 seconds, or None where not read.
        offsets: [rows + 1] int64; row r is offsets[r] … offsets[r + 1].
        target_start: [rows] int64; never inside of a request.
        rows: [rows] int64, row numbers in the whole split.
        by_request: a row's interactions of one time are a request: none knows another's label.
            Else each is a request of its own.
        profile: [rows] rows of the data set's profiles; None where not read.
        stored: [interactions] each StoredColumn of the data set, by name.
    """

    item_ids: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int8]
    timestamps: npt.NDArray[np.int64] | None
    offsets: npt.NDArray[np.int64]
    target_start: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]
    by_request: bool = False
    profile: npt.NDArray[np.integer] | None = None
    stored: Mapping[str, np.ndarray] = field(default_factory=dict)
    _codes: dict[tuple[str, str], npt.NDArray[np.int64]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def weight(self) -> npt.NDArray[np.float32] | None:
        """[interactions] what each counts as a target; None: 1."""
        return self.stored.get("weight")

    def for_training(self) -> SequenceBlock:
        """Without the targets that training is not to see."""
        kept = self.stored.get("is_kept")
        if kept is None:
            return self
        is_target = kept if self.is_target is None else self.is_target & kept
        return replace(self, stored={**self.stored, "is_target": is_target})

    @property
    def is_history(self) -> npt.NDArray[np.bool_] | None:
        """[interactions] whether later targets may see it; None: all."""
        return self.stored.get("is_history")

    @property
    def is_target(self) -> npt.NDArray[np.bool_] | None:
        """[interactions] whether it may be a target; None: all."""
        return self.stored.get("is_target")

    @cached_property
    def further_labels(self) -> npt.NDArray[np.int8] | None:
        """[interactions, tasks - 1] labels of the tasks beside the main one, in the data set's
        order: 0, 1 or UNKNOWN. None: there is one task."""
        tasks = further_tasks(self.stored)
        return np.stack([self.stored[label_column(t)] for t in tasks], axis=1) if tasks else None

    @cached_property
    def requests(self) -> RequestBounds:
        """Where requests begin, and how much history lies before."""
        total = len(self.item_ids)
        place = np.arange(total)
        history = np.ones(total, dtype=bool) if self.is_history is None else self.is_history
        before = np.concatenate([[0], np.cumsum(history)])
        if not self.by_request:
            return RequestBounds(place, before, history, history)
        assert self.timestamps is not None, "requests need the timestamps column"
        opens = np.ones(total, dtype=bool)
        opens[1:] = self.timestamps[1:] != self.timestamps[:-1]
        opens[self.offsets[:-1][np.diff(self.offsets) > 0]] = True
        start = np.maximum.accumulate(np.where(opens, place, 0)) if total else place
        leads = history & (before[:-1] == before[start])
        return RequestBounds(start, before, leads, history)

    @cached_property
    def gap_buckets(self) -> npt.NDArray[np.int64]:
        """[interactions] bucket of the time from the last history before its request to it; 0
        where there is none."""
        assert self.timestamps is not None, "time gaps need the timestamps column"
        found = self.requests
        before = found.before[found.start]
        known = before > found.before[self.offsets[:-1].repeat(np.diff(self.offsets))]
        gaps = np.zeros(len(self.item_ids), dtype=np.int64)
        last = found.history.nonzero()[0][before[known] - 1]
        gaps[known] = self.timestamps[known] - self.timestamps[last]
        return gap_bucket(gaps)

    def codes(self, name: str, time_zone: str) -> npt.NDArray[np.int64]:
        """[interactions] which of a piece's texts each has, by the piece's field."""
        if name == GAP:
            return self.gap_buckets
        if name not in MOMENTS:
            none = np.empty(0, dtype=np.int64)  # a block of nothing has no columns
            return self.stored[stored_field(name)] if len(self.item_ids) else none
        key = name, time_zone
        if key not in self._codes:
            assert self.timestamps is not None, "hours and weekdays need the timestamps column"
            self._codes[key] = moment_codes(name, self.timestamps, time_zone)
        return self._codes[key]

    @staticmethod
    def empty(rules: InteractionRules = NO_RULES) -> SequenceBlock:
        none = np.empty(0, dtype=np.int64)
        return SequenceBlock(
            none.astype(np.int32),
            none.astype(np.int8),
            none,
            np.zeros(1, np.int64),
            none,
            none,
            rules.requests is not None,
            none,
            {column.name: none.astype(column.type.to_pandas_dtype()) for column in rules.stored},
        )

    @staticmethod
    def from_arrow(rows: pa.RecordBatch, first_row: int, by_request: bool = False) -> SequenceBlock:
        def flat(name: str) -> np.ndarray:
            return rows[name].flatten().to_numpy(zero_copy_only=False)

        lengths = rows["item_ids"].value_lengths().to_numpy(zero_copy_only=False)
        return SequenceBlock(
            item_ids=flat("item_ids"),
            labels=flat("labels"),
            timestamps=flat("timestamps") if "timestamps" in rows.schema.names else None,
            offsets=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
            target_start=rows["target_start"].to_numpy().astype(np.int64),
            rows=np.arange(first_row, first_row + rows.num_rows),
            by_request=by_request,
            profile=rows["profile"].to_numpy() if "profile" in rows.schema.names else None,
            stored={
                name: values
                for name in rows.schema.names
                if name not in _OWN and (values := stored_values(rows, name)) is not None
            },
        )

    @staticmethod
    def join(blocks: list[SequenceBlock]) -> SequenceBlock:
        """Several blocks as one, in the order given."""
        bases = np.cumsum([0] + [len(block.item_ids) for block in blocks])

        def joined(arrays: Iterable[np.ndarray | None]) -> np.ndarray | None:
            known = [array for array in arrays if array is not None]
            return np.concatenate(known) if known else None

        return SequenceBlock(
            item_ids=np.concatenate([block.item_ids for block in blocks]),
            labels=np.concatenate([block.labels for block in blocks]),
            timestamps=joined(block.timestamps for block in blocks),
            offsets=np.concatenate(
                [[0]] + [b.offsets[1:] + base for b, base in zip(blocks, bases, strict=False)]
            ),
            target_start=np.concatenate([block.target_start for block in blocks]),
            rows=np.concatenate([block.rows for block in blocks]),
            by_request=blocks[0].by_request,
            profile=joined(block.profile for block in blocks),
            stored={
                name: np.concatenate([block.stored[name] for block in blocks])
                for name in blocks[0].stored
            },
        )


def find_fault(
    rows: pa.RecordBatch, items: int, stored: Sequence[StoredColumn] = (), profiles: int = 0
) -> tuple[int, str] | None:
    """The first row that breaks the format, and what was expected and found there; else None.

    Args:
        rows: some or all columns of sequence_schema.
        items, profiles: how many there are.
        stored: what the data set's sequences have beside.
    """
    nullable = {column.name for column in stored if column.nullable}
    lists = [name for name in rows.schema.names if pa.types.is_list(rows.schema.field(name).type)]
    of_rows = [name for name in ("target_start", "profile") if name in rows.schema.names]
    for name in [*lists, *of_rows]:
        column = rows[name]
        if column.null_count:
            row = int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))
            return row, f"{name}: expected a value, found null"
    lengths = rows["item_ids"].value_lengths().to_numpy(zero_copy_only=False)
    ends = np.cumsum(lengths)

    def first(bad: np.ndarray) -> tuple[int, int]:
        """The row and the place in it of the first element that is bad."""
        at = int(np.argmax(bad))
        row = int(np.searchsorted(ends, at, side="right"))
        return row, at - int(ends[row] - lengths[row])

    for name in lists:
        differ = rows[name].value_lengths().to_numpy(zero_copy_only=False) != lengths
        if differ.any():
            row = int(np.argmax(differ))
            found = f"{int(lengths[row])} and {len(rows[name][row])}"
            return row, f"item_ids and {name}: expected lists of one length, found {found}"
        values = rows[name].flatten()
        if values.null_count and name not in nullable:
            row, at = first(values.is_null().to_numpy(zero_copy_only=False))
            return row, f"{name}[{at}]: expected a value, found null"
    for name, end, expected in (
        ("labels", 2, "0 or 1"),
        ("item_ids", items, f"0 to {items - 1}, a row of the item table"),
        *(
            (column.name, column.below, f"0 to {column.below - 1}")
            for column in stored
            if column.below is not None and column.name in rows.schema.names
        ),
    ):
        values = rows[name].flatten().fill_null(0).to_numpy()
        bad = (values < 0) | (values >= end)
        if bad.any():
            row, at = first(bad)
            return row, f"{name}[{at}]: expected {expected}, found {rows[name][row][at]}"
    if "weight" in rows.schema.names:
        values = rows["weight"].flatten().to_numpy()
        bad = ~((values >= 0) & np.isfinite(values))
        if bad.any():
            row, at = first(bad)
            return row, f"weight[{at}]: expected a number that is 0 or more, found {values[bad][0]}"
    start = rows["target_start"].to_numpy()
    bad = (start < 0) | (start > lengths)
    if bad.any():
        row = int(np.argmax(bad))
        return row, f"target_start: expected 0 to {int(lengths[row])}, found {start[row]}"
    if "profile" in of_rows:
        profile = rows["profile"].to_numpy()
        bad = (profile < 0) | (profile >= profiles)
        if bad.any():
            row = int(np.argmax(bad))
            expected = f"0 to {profiles - 1}, a row of the table of profiles"
            return row, f"profile: expected {expected}, found {profile[row]}"
    return None
