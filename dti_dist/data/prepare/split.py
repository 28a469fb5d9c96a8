"""Cut whole histories into the sequences of train, valid and test. Knows numpy, and no engine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from dti_dist.data.dataset import SPLITS, SplitRule, sequence_schema


@dataclass(frozen=True)
class Histories:
    """Whole histories of some users, one after the other, each in time order.

    Attributes:
        user_ids: [users]
        lengths: [users] interactions of each
        columns: [interactions] item_id, label, timestamp, input_order (and probability; and, where
            a column says it, split as its place in SPLITS, which never falls within a history)
    """

    user_ids: pa.Array
    lengths: np.ndarray
    columns: dict[str, np.ndarray]


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
    """Per split: [users] the place of its first target in the history, and of its end."""
    lengths = histories.lengths
    if rule.rule == "leave-last":
        ends = [lengths - 2, lengths - 1]
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


def inside(histories: Histories, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    """[interactions] whether each lies in its user's range [begin, end)."""
    lengths = histories.lengths
    position = positions(lengths)
    return (position >= np.repeat(begin, lengths)) & (position < np.repeat(end, lengths))


def sequence_starts(begin: np.ndarray, end: np.ndarray, context_limit: int) -> np.ndarray:
    """[users] the place of the first interaction of a sequence whose targets are [begin, end);
    ``end`` where there are none."""
    return np.where(end > begin, np.maximum(begin - context_limit, 0), end)


def cut_sequences(
    histories: Histories, begin: np.ndarray, end: np.ndarray, context_limit: int
) -> pa.RecordBatch:
    """The sequences whose targets are [begin, end), for the users who have any."""
    has_targets = end > begin
    start = sequence_starts(begin, end, context_limit)
    kept = inside(histories, start, end)
    offsets = np.concatenate([[0], np.cumsum((end - start)[has_targets])])

    def lists(column: str, kind: pa.DataType) -> pa.ListArray:
        values = pa.array(histories.columns[column][kept], type=kind)
        return pa.ListArray.from_arrays(pa.array(offsets, type=pa.int32()), values)

    return pa.RecordBatch.from_arrays(
        [
            histories.user_ids.filter(pa.array(has_targets)),
            lists("item_id", pa.int32()),
            lists("label", pa.int8()),
            lists("timestamp", pa.int64()),
            pa.array((begin - start)[has_targets], type=pa.int32()),
        ],
        schema=sequence_schema(),
    )
