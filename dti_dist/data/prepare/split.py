"""Cut whole histories into the sequences of train, valid and test. Knows numpy, and no engine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from dti_dist.data.dataset import (
    NO_RULES,
    SPLITS,
    UNKNOWN,
    InteractionRules,
    SplitRule,
    sequence_schema,
)

# Lists of sequences, and what they list; the others have the name of what they list.
_LISTED = {"item_ids": "item_id", "labels": "label", "timestamps": "timestamp"}


def listed_column(name: str) -> str:
    """The column of Histories that a list of sequences lists."""
    return _LISTED.get(name, name)


@dataclass(frozen=True)
class Histories:
    """Whole histories of some users, one after the other, each in time order.

    Attributes:
        user_ids: [users]
        lengths: [users] interactions of each
        columns: [interactions] item_id, label, timestamp, input_order, and what is kept of each
            EventColumn; split is a place in SPLITS, which never falls within a history; profile,
            where users have texts, is the same within a history
    """

    user_ids: pa.Array
    lengths: np.ndarray
    columns: dict[str, np.ndarray]
    rules: InteractionRules = NO_RULES

    @property
    def by_request(self) -> bool:
        """Whether interactions of one time are a request; else each one is."""
        return self.rules.requests is not None

    @property
    def starts(self) -> np.ndarray:
        """[users] where each one's history begins."""
        return np.cumsum(self.lengths) - self.lengths

    def begins_request(self) -> np.ndarray:
        """[interactions] whether each is the first of its request."""
        if not self.by_request:
            return np.ones(int(self.lengths.sum()), dtype=bool)
        return (positions(self.lengths) == 0) | self.changes_time()

    def changes_time(self) -> np.ndarray:
        """[interactions] whether each has another time than the one before it."""
        timestamps = self.columns["timestamp"]
        return np.diff(timestamps, prepend=timestamps[:1] - 1) != 0

    def is_target(self) -> np.ndarray:
        """[interactions] whether each may be a target."""
        return self.columns.get("is_target", np.ones(int(self.lengths.sum()), dtype=bool))

    def history_before(self) -> np.ndarray:
        """[interactions] how much history its user has before each."""
        is_history = self.columns.get("is_history")
        if is_history is None:
            return positions(self.lengths)
        before = np.cumsum(is_history) - is_history
        return before - np.repeat(before[self.starts], self.lengths)

    def history_before_request(self) -> np.ndarray:
        """[interactions] how much history its user has before the request of each."""
        firsts = np.flatnonzero(self.begins_request())
        sizes = np.diff(firsts, append=self.lengths.sum())
        return np.repeat(self.history_before()[firsts], sizes)

    def history_until(self, place: np.ndarray) -> np.ndarray:
        """[users] how much history each has before a place in it."""
        is_history = self.columns.get("is_history")
        if is_history is None:
            return place
        before = np.concatenate([[0], np.cumsum(is_history)])
        return before[self.starts + place] - before[self.starts]


def positions(lengths: np.ndarray) -> np.ndarray:
    """[interactions] the place of each in its own history, from 0."""
    starts = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) - np.repeat(starts, lengths)


def disorder(histories: Histories) -> int:
    """How many interactions come before their user's preceding one in the input."""
    later = positions(histories.lengths)[1:] > 0
    return int(np.count_nonzero((np.diff(histories.columns["input_order"]) < 0) & later))


def target_ranges(
    histories: Histories, rule: SplitRule
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Per split: [users] the place of its first interaction in the history, and of its end."""
    lengths = histories.lengths
    if rule.rule == "leave-last":
        ends = _last_two(histories)
    else:
        owner = np.repeat(np.arange(len(lengths)), lengths)
        ends = [
            np.bincount(owner[_is_before(split, histories, rule)], minlength=len(lengths))
            for split in ("valid", "test")
        ]
    bounds = [np.zeros_like(lengths), *ends, lengths]
    yield from zip(SPLITS, bounds[:-1], bounds[1:], strict=True)


def _is_before(split: str, histories: Histories, rule: SplitRule) -> np.ndarray:
    """[interactions] whether each belongs to an earlier split."""
    if rule.boundaries is None:
        return histories.columns["split"] < SPLITS.index(split)
    return histories.columns["timestamp"] < rule.boundaries[split]


def _last_two(histories: Histories) -> list[np.ndarray]:
    """[users] where the last request but one that has targets begins, and where the last one. A
    user who has only one has it for both."""
    lengths = histories.lengths
    if not histories.by_request:
        return [np.maximum(lengths - 2, 0), np.maximum(lengths - 1, 0)]
    firsts = np.flatnonzero(histories.begins_request())
    firsts = firsts[np.logical_or.reduceat(histories.is_target(), firsts)]
    owner = np.searchsorted(np.cumsum(lengths), firsts, side="right")
    ends = np.cumsum(np.bincount(owner, minlength=len(lengths)))
    counts = np.diff(ends, prepend=0)
    places = np.append(firsts - histories.starts[owner], 0)
    last, before = places[ends - 1], places[ends - np.minimum(counts, 2)]
    return [np.where(counts > 0, place, lengths) for place in (before, last)]


def inside(histories: Histories, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    """[interactions] whether each lies in its user's range [begin, end)."""
    lengths = histories.lengths
    position = positions(lengths)
    return (position >= np.repeat(begin, lengths)) & (position < np.repeat(end, lengths))


def context_lengths(
    begin: np.ndarray, end: np.ndarray, history: np.ndarray, context_limit: int
) -> np.ndarray:
    """[users] context interactions of the sequence of [begin, end), before which a user has so much
    history."""
    return np.where(end > begin, np.minimum(history, context_limit), 0)


def left_out_of_train(histories: Histories) -> np.ndarray:
    """[interactions] whether train has no use for each: training is not to see it as a target, and
    later targets don't see it."""
    kept = histories.columns.get("is_kept")
    is_history = histories.columns.get("is_history")
    if kept is None or is_history is None:
        return np.zeros(int(histories.lengths.sum()), dtype=bool)
    return ~kept & ~is_history


def cut_sequences(
    histories: Histories, split: str, begin: np.ndarray, end: np.ndarray, context_limit: int
) -> pa.RecordBatch:
    """The sequences of [begin, end) behind their context, for the users who have any."""
    history = histories.history_until(begin)
    context = context_lengths(begin, end, history, context_limit)
    if "is_history" in histories.columns:
        oldest = np.repeat(history - context, histories.lengths)
        kept = inside(histories, np.zeros_like(begin), begin) & histories.columns["is_history"]
        kept &= histories.history_before() >= oldest
        kept |= inside(histories, begin, end)
    else:
        kept = inside(histories, begin - context, end)
    if split == "train":
        kept &= ~left_out_of_train(histories)
    owner = np.repeat(np.arange(len(histories.lengths)), histories.lengths)
    lengths = np.bincount(owner[kept], minlength=len(histories.lengths))
    # Without interactions of its own, a row would be context of nothing.
    has_row = lengths > context
    kept &= has_row[owner]
    offsets = np.concatenate([[0], np.cumsum(lengths[has_row])])

    nullable = {column.name for column in histories.rules.stored if column.nullable}

    def lists(column: str, kind: pa.ListType) -> pa.ListArray:
        found = histories.columns[column][kept]
        unknown = found == UNKNOWN if column in nullable else None
        values = pa.array(found, type=kind.value_type, mask=unknown)
        return pa.ListArray.from_arrays(pa.array(offsets, type=pa.int32()), values)

    schema = sequence_schema(histories.rules)
    columns = {
        "user_id": histories.user_ids.filter(pa.array(has_row)),
        "target_start": pa.array(context[has_row], type=pa.int32()),
    }
    if histories.rules.user_text_columns:
        profile = histories.columns["profile"][histories.starts]
        columns["profile"] = pa.array(profile[has_row], type=pa.int32())
    return pa.RecordBatch.from_arrays(
        [
            columns[field.name]
            if field.name in columns
            else lists(listed_column(field.name), field.type)
            for field in schema
        ],
        schema=schema,
    )
