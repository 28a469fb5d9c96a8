"""Samples into packs: which go together, and the arrays that the model reads."""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from dti_dist.data.item_tokens import ItemTokens
from dti_dist.data.samples import IntArray, Samples, sample_lengths
from dti_dist.data.sequences import SequenceBlock
from dti_dist.errors import UserError

_MEASURED_PACKS = 8
_OPEN_PACKS = 64  # more would fill a little better, and mix neighbours of the order further apart


@dataclass(frozen=True)
class PackShape:
    """Constants of a run.

    Attributes:
        length: L, tokens of a pack's samples end to end.
        slots: S, [SUM] slots.
        body: tokens that the layers run on where equal interactions are shared, about; a pack
            that needs more gets more. None: no sharing, the body is the L tokens.
    """

    length: int
    slots: int
    body: int | None = None


def pack_shape(
    length: int,
    slots: int | None,
    sample_tokens: npt.NDArray[np.integer],
    sample_targets: npt.NDArray[np.integer],
) -> PackShape:
    """The pack's constants, with the readout tail sized from the samples when not given.

    Raises UserError when a sample doesn't fit, naming the length or slots it needs.
    """
    longest, most = int(sample_tokens.max(initial=0)), int(sample_targets.max(initial=0))
    if longest > length:
        raise UserError(
            f"pack.length {length} is too short for the longest sample, which has {longest} "
            f"tokens. Set pack.length={multiple_of_128(longest)} or more, or lower "
            "sample.context, sample.targets or template.max_item_tokens."
        )
    if slots is None:
        tokens = int(sample_tokens.sum(dtype=np.int64))
        expected = length * int(sample_targets.sum(dtype=np.int64)) / max(tokens, 1)
        slots = multiple_of_128(max(int(1.1 * expected), most, 1))
    elif most > slots:
        raise UserError(
            f"pack.readout_slots {slots} is too few for a sample with {most} targets. "
            f"Set pack.readout_slots={multiple_of_128(most)} or leave it out."
        )
    return PackShape(length, slots)


def multiple_of_128(value: int) -> int:
    return -(-value // 128) * 128


def with_shared_body(
    shape: PackShape, samples: Samples, block: SequenceBlock, tokens: ItemTokens
) -> PackShape:
    """The shape with a body for equal interactions, each once, measured on some packs of samples.

    Packs hold random users, so their bodies are nearly equally long: 3 % above the longest of some
    is enough for nearly all, and the length stays constant.
    """
    lengths = sample_lengths(samples, block, tokens)
    pack_of = assign_packs(lengths, samples.targets, shape)
    fullest = np.argsort(-np.bincount(pack_of, lengths), kind="stable")[:_MEASURED_PACKS]
    shared = replace(shape, body=0)
    longest = max(
        build_pack(samples.take(np.flatnonzero(pack_of == p)), block, tokens, shared).body_tokens
        for p in fullest
    )
    return replace(shape, body=min(multiple_of_128(int(longest * 1.03)), shape.length))


def assign_packs(tokens: IntArray, targets: IntArray, shape: PackShape) -> IntArray:
    """[samples] the pack that each sample goes to, by best fit in the order given.

    A sample goes to the open pack with the least room that still holds it; the fullest pack closes
    when too many are open. Packs are numbered in the order they open, so neighbours in the order
    stay near each other.
    """
    pack_of = np.empty(len(tokens), dtype=np.int64)
    open_packs: list[tuple[int, int]] = []  # (room, pack), sorted
    slots_left: dict[int, int] = {}
    packs = 0
    for sample, (needed, wanted) in enumerate(zip(tokens.tolist(), targets.tolist(), strict=True)):
        at = bisect_left(open_packs, (needed, -1))
        while at < len(open_packs) and slots_left[open_packs[at][1]] < wanted:
            at += 1
        if at < len(open_packs):
            room, pack = open_packs.pop(at)
        else:
            room, pack = shape.length, packs
            slots_left[pack] = shape.slots
            packs += 1
            if len(open_packs) == _OPEN_PACKS:
                del slots_left[open_packs.pop(0)[1]]
        insort(open_packs, (room - needed, pack))
        slots_left[pack] -= wanted
        pack_of[sample] = pack
    return pack_of


@dataclass(frozen=True)
class SharedBody:
    """The distinct interactions of a pack, each once; Lb tokens.

    First the prefix, once for all samples. Then for each distinct text (gap words and item) its
    tokens, and a label token for each label that occurs after it. A token sees the prefix, then
    start … end - 1, then itself: of two labels of a text, none sees the other.

    Attributes:
        tokens, positions: [Lb] token id; position, which restarts behind the prefix with each text.
        start, end: [Lb] the tokens of its own text before it.
        source: [L] which of these tokens stands at each place of the samples end to end.
    """

    tokens: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    start: npt.NDArray[np.int32]
    end: npt.NDArray[np.int32]
    source: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Pack:
    """One pack as integer arrays; L tokens of samples end to end, then S [SUM] slots; U units.

    A unit is an interaction (gap words, item text, label token) or a sample's prefix.

    Attributes:
        tokens, positions: [L + S] token id and position within the sample.
        unit: [L + S] the token's unit, of a slot its target's; -1 for padding.
        unit_start: [U + 1] first body token of each unit.
        unit_first: [U] first interaction of the unit's sample; of a prefix, itself.
        prefix_start, prefix_end: [U] body span of the sample's prefix; empty without one.
        readout_end: [S] where what a slot may see ends: its target's label token.
        unit_place: [U] of candidates after one context, the first of them; None without candidates.
        labels: [S] float32, 0 or 1.
        used: [S] float32, 1 for slots with a target, 0 for the others.
        target_row, target_position: [S] which interaction of the split is the target; -1 unused.
        body_tokens: tokens without padding that the layers run on, slots not counted.
        shared: the body where equal interactions are shared; else the L tokens are the body.
    """

    tokens: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    unit: npt.NDArray[np.int32]
    unit_start: npt.NDArray[np.int32]
    unit_first: npt.NDArray[np.int32]
    prefix_start: npt.NDArray[np.int32]
    prefix_end: npt.NDArray[np.int32]
    readout_end: npt.NDArray[np.int32]
    labels: npt.NDArray[np.float32]
    used: npt.NDArray[np.float32]
    target_row: npt.NDArray[np.int64]
    target_position: npt.NDArray[np.int32]
    body_tokens: int
    unit_place: npt.NDArray[np.int32] | None = None
    shared: SharedBody | None = None

    @property
    def targets(self) -> int:
        return int(self.used.sum())


def build_pack(
    samples: Samples, block: SequenceBlock, tokens: ItemTokens, shape: PackShape
) -> Pack:
    """Lay samples end to end in a pack. No samples at all give a zero-weight pack.

    Where the shape has a `body`, equal interactions are also laid out once each.
    """
    P, L = len(tokens.prefix), shape.length
    count = samples.end - samples.first  # interactions per sample
    end_of_sample = count.cumsum()
    first_of_sample = end_of_sample - count
    interactions = int(count.sum())

    # Interactions of all samples, end to end: which of the block, and of which sample.
    sample = np.arange(len(samples)).repeat(count)
    position_in_row = np.arange(interactions) + (samples.first - first_of_sample)[sample]
    source = position_in_row + block.offsets[samples.row][sample]
    items, labels = block.item_ids[source], block.labels[source]

    # Where each interaction lies in the body. Each sample's prefix lies before its first one.
    gaps = block.gap_buckets[source] if tokens.gaps else None
    lengths = tokens.lengths[items] + 1
    if gaps is not None:
        gap_lengths = tokens.gap_lengths[gaps]
        lengths += gap_lengths
    end = lengths.cumsum()
    if P:
        end += P * (sample + 1)
    start, label_at = end - lengths, end - 1
    body_tokens = int(end[-1]) if interactions else 0
    sample_start = start[first_of_sample] - P
    sample_tokens = end[end_of_sample - 1] - sample_start

    # Units in body order: with a prefix, one more before each sample's interactions.
    unit_of_interaction = np.arange(interactions)
    unit_lengths = lengths
    if P:
        unit_of_interaction += sample + 1
        unit_lengths = np.full(interactions + len(samples), P)
        unit_lengths[unit_of_interaction] = lengths
    units = len(unit_lengths)
    first_unit = unit_of_interaction[first_of_sample]
    unit_start = np.zeros(units + 1, dtype=np.int32)
    unit_lengths.cumsum(out=unit_start[1:])
    unit_first = np.arange(units, dtype=np.int32)
    unit_first[unit_of_interaction] = first_unit[sample]
    prefix_start = np.zeros(units, dtype=np.int32)
    prefix_end = np.zeros(units, dtype=np.int32)
    if P:
        prefix_start[unit_of_interaction] = sample_start[sample]
        prefix_end[unit_of_interaction] = sample_start[sample] + P

    # The body. Reading all of it as item text, and then writing what is none, is fastest. A run
    # is an interaction with the prefix of the sample after it.
    place = np.arange(body_tokens)
    runs = lengths
    if P:
        runs = lengths.copy()
        runs[end_of_sample[:-1] - 1] += P
    text_at = np.asarray(tokens.offsets)[items] - start
    if gaps is not None:
        text_at -= gap_lengths
    item_tokens = np.asarray(tokens.tokens)  # indexing is faster without the memory map's class
    ids = np.zeros(L + shape.slots, dtype=np.int64)
    ids[P:body_tokens] = item_tokens.take(place[P:] + text_at.repeat(runs), mode="clip")
    ids[label_at] = np.asarray(tokens.label_ids)[labels]
    if gaps is not None:
        flat_gaps = np.concatenate(tokens.gaps)
        gap_offsets = tokens.gap_lengths.cumsum() - tokens.gap_lengths
        ids[ranges(start, gap_lengths)] = flat_gaps[ranges(gap_offsets[gaps], gap_lengths)]
    if P:
        ids[sample_start[:, None] + np.arange(P)] = tokens.prefix
    positions = np.zeros(L + shape.slots, dtype=np.int64)
    np.subtract(place, sample_start.repeat(sample_tokens), out=positions[:body_tokens])
    unit = np.empty(L + shape.slots, dtype=np.int32)
    unit[:body_tokens] = np.arange(units, dtype=np.int32).repeat(unit_lengths)
    unit[body_tokens:] = -1

    # Slots: one for each target, in order.
    (target,) = (position_in_row >= samples.first_target[sample]).nonzero()
    used = len(target)
    slots = slice(L, L + used)
    readout_end = label_at[target]
    ids[slots] = tokens.sum_id
    positions[slots] = positions[readout_end]
    unit[slots] = unit_of_interaction[target]

    def tail(values: np.ndarray | int, unused: int, dtype: type) -> np.ndarray:
        array: np.ndarray = np.empty(shape.slots, dtype=dtype)
        array[:used] = values
        array[used:] = unused
        return array

    shared = None
    if shape.body is not None:
        texts = items if gaps is None else gaps * len(tokens.lengths) + items
        shared = _share(texts, labels, start, lengths - 1, runs, sample_start, P, ids[:L])
    return Pack(
        tokens=ids,
        positions=positions,
        unit=unit,
        unit_start=unit_start,
        unit_first=unit_first,
        prefix_start=prefix_start,
        prefix_end=prefix_end,
        readout_end=tail(readout_end, 0, np.int32),
        labels=tail(labels[target], 0, np.float32),
        used=tail(1, 0, np.float32),
        target_row=tail(block.rows[samples.row[sample[target]]], -1, np.int64),
        target_position=tail(position_in_row[target], -1, np.int32),
        body_tokens=body_tokens if shared is None else len(shared.tokens),
        shared=shared,
    )


def _share(
    texts: IntArray,
    labels: npt.NDArray[np.int8],
    start: IntArray,
    lengths: IntArray,
    runs: IntArray,
    prefix_at: IntArray,
    prefix_length: int,
    body: npt.NDArray[np.int64],
) -> SharedBody:
    """Lay out the distinct interactions once each.

    Args:
        texts: [interactions] equal numbers mean equal texts (gap words and item).
        labels: [interactions] 0 or 1.
        start, lengths: [interactions] where each text lies in `body`, and its tokens.
        runs: [interactions] tokens from the start of each text to that of the next.
        prefix_at: [samples] where each sample's prefix lies in `body`.
        body: [L] token ids of all samples end to end.
    """
    _, first, unit = np.unique(texts, return_index=True, return_inverse=True)
    occurs = np.zeros((len(first), 2), dtype=np.int64)
    occurs[unit, labels] = 1
    text_length, labels_of_text = lengths[first], occurs.sum(axis=1)
    prefix = prefix_length if len(prefix_at) else 0
    unit_length = text_length + labels_of_text
    unit_end = prefix + unit_length.cumsum()
    unit_start = unit_end - unit_length
    used = int(unit_end[-1]) if len(first) else prefix

    end_of_samples = prefix + int(runs.sum())
    source = np.zeros(len(body), dtype=np.int64)
    np.add(
        np.arange(prefix, end_of_samples),
        (unit_start[unit] - start).repeat(runs),
        out=source[prefix:end_of_samples],
    )
    source[start + lengths] = unit_start[unit] + lengths + occurs[unit, 0] * labels
    if prefix:
        source[prefix_at[:, None] + np.arange(prefix)] = np.arange(prefix)
    tokens = np.empty(used, dtype=np.int64)
    tokens[source[:end_of_samples]] = body[:end_of_samples]

    # A text token sees the text before it; a label token, the whole text.
    place = np.arange(used)
    start_seen = np.zeros(used, dtype=np.int32)
    start_seen[prefix:] = unit_start.repeat(unit_length)
    end_seen = place.astype(np.int32)
    second_label = unit_end[labels_of_text == 2] - 1
    end_seen[second_label] -= 1
    positions = place - start_seen
    positions[prefix:] += prefix
    positions[second_label] -= 1
    return SharedBody(
        tokens=tokens, positions=positions, start=start_seen, end=end_seen, source=source
    )


def ranges(starts: np.ndarray, lengths: np.ndarray) -> IntArray:
    """start, start + 1, …, start + length - 1 of each range, end to end."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(starts - (ends - lengths), lengths)
