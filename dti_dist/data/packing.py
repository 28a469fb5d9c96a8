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
        labels, weights: [S] float32 label, and 1 for used slots.
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
    weights: npt.NDArray[np.float32]
    target_row: npt.NDArray[np.int64]
    target_position: npt.NDArray[np.int32]
    body_tokens: int
    shared: SharedBody | None = None

    @property
    def targets(self) -> int:
        return int(self.weights.sum())


def build_pack(
    samples: Samples, block: SequenceBlock, tokens: ItemTokens, shape: PackShape
) -> Pack:
    """Lay samples end to end in a pack. No samples at all give a zero-weight pack.

    Where the shape has a `body`, equal interactions are also laid out once each.
    """
    P = len(tokens.prefix)
    count = samples.end - samples.first  # interactions per sample
    interactions = int(count.sum())

    # Interactions of all samples, end to end: which of the block, and of which sample.
    sample = np.repeat(np.arange(len(samples)), count)
    first_of_sample = np.cumsum(count) - count
    position_in_row = samples.first[sample] + np.arange(interactions) - first_of_sample[sample]
    source = block.offsets[samples.row[sample]] + position_in_row
    items, labels = block.item_ids[source], block.labels[source]

    # Where each interaction starts in the body. Each sample's prefix lies before its first one.
    gaps = block.gap_buckets[source] if tokens.gaps else None
    gap_lengths = np.zeros(interactions, np.int64) if gaps is None else tokens.gap_lengths[gaps]
    text_lengths = tokens.lengths[items]
    lengths = gap_lengths + text_lengths + 1
    start = np.cumsum(lengths) - lengths + P * (sample + 1)
    body_tokens = int(lengths.sum()) + P * len(samples)
    label_at = start + lengths - 1

    body = np.zeros(shape.length, dtype=np.int64)
    text_start = start + gap_lengths
    item_tokens = np.asarray(tokens.tokens)  # indexing is faster without the memory map's class
    body[_ranges(text_start, text_lengths)] = item_tokens[
        _ranges(np.asarray(tokens.offsets)[items], text_lengths)
    ]
    body[label_at] = np.asarray(tokens.label_ids)[labels]
    if gaps is not None:
        flat_gaps = np.concatenate(tokens.gaps)
        gap_offsets = np.cumsum(tokens.gap_lengths) - tokens.gap_lengths
        body[_ranges(start, gap_lengths)] = flat_gaps[_ranges(gap_offsets[gaps], gap_lengths)]
    sample_start = start[first_of_sample] - P
    if P:
        body[_ranges(sample_start, np.full(len(samples), P))] = np.tile(tokens.prefix, len(samples))

    # Units in body order: with a prefix, one more before each sample's interactions.
    prefixes = int(P > 0)
    unit_of_interaction = np.arange(interactions) + prefixes * (sample + 1)
    units = interactions + prefixes * len(samples)
    unit_start = np.full(units + 1, body_tokens, dtype=np.int32)
    unit_start[unit_of_interaction] = start
    unit_first = np.arange(units, dtype=np.int32)
    unit_first[unit_of_interaction] = unit_of_interaction[first_of_sample][sample]
    prefix_start = np.zeros(units, dtype=np.int32)
    prefix_end = np.zeros(units, dtype=np.int32)
    if P:
        unit_start[unit_of_interaction[first_of_sample] - 1] = sample_start
        prefix_start[unit_of_interaction] = sample_start[sample]
        prefix_end[unit_of_interaction] = sample_start[sample] + P

    # Slots: one for each target, in order.
    target = np.flatnonzero(position_in_row >= samples.first_target[sample])
    used = len(target)
    end = label_at[target]

    def tail(values: np.ndarray, unused: int = 0, dtype: type = np.int64) -> np.ndarray:
        array: np.ndarray = np.full(shape.slots, unused, dtype=dtype)
        array[:used] = values
        return array

    positions = np.zeros(shape.length, dtype=np.int64)
    sample_tokens = np.diff(np.append(sample_start, body_tokens))
    positions[:body_tokens] = np.arange(body_tokens) - np.repeat(sample_start, sample_tokens)
    unit = np.full(shape.length, -1, dtype=np.int32)
    unit[:body_tokens] = np.repeat(np.arange(units), np.diff(unit_start))
    shared = None
    if shape.body is not None:
        texts = items if gaps is None else gaps * len(tokens.lengths) + items
        shared = _share(texts, labels, start, lengths - 1, sample_start, P, body)
    return Pack(
        tokens=np.concatenate([body, tail(np.full(used, tokens.sum_id))]),
        positions=np.concatenate([positions, tail(positions[end])]),
        unit=np.concatenate([unit, tail(unit_of_interaction[target], -1, np.int32)]),
        unit_start=unit_start,
        unit_first=unit_first,
        prefix_start=prefix_start,
        prefix_end=prefix_end,
        readout_end=tail(end, 0, np.int32),
        labels=tail(labels[target], 0, np.float32),
        weights=tail(np.ones(used), 0, np.float32),
        target_row=tail(block.rows[samples.row[sample[target]]], -1),
        target_position=tail(position_in_row[target], -1, np.int32),
        body_tokens=body_tokens if shared is None else len(shared.tokens),
        shared=shared,
    )


def _share(
    texts: IntArray,
    labels: npt.NDArray[np.int8],
    start: IntArray,
    lengths: IntArray,
    prefix_at: IntArray,
    prefix_length: int,
    body: npt.NDArray[np.int64],
) -> SharedBody:
    """Lay out the distinct interactions once each.

    Args:
        texts: [interactions] equal numbers mean equal texts (gap words and item).
        labels: [interactions] 0 or 1.
        start, lengths: [interactions] where each text lies in `body`, and its tokens.
        prefix_at: [samples] where each sample's prefix lies in `body`.
        body: [L] token ids of all samples end to end.
    """
    _, first, unit = np.unique(texts, return_index=True, return_inverse=True)
    occurs = np.zeros((len(first), 2), dtype=np.int64)
    occurs[unit, labels] = 1
    text_length, labels_of_text = lengths[first], occurs.sum(axis=1)
    prefix = prefix_length if len(prefix_at) else 0
    unit_length = text_length + labels_of_text
    unit_start = prefix + np.cumsum(unit_length) - unit_length

    label_place = unit_start[unit] + lengths + occurs[unit, 0] * labels
    source = np.zeros(len(body), dtype=np.int64)
    source[_ranges(start, lengths)] = _ranges(unit_start[unit], lengths)
    source[start + lengths] = label_place
    source[_ranges(prefix_at, np.full(len(prefix_at), prefix))] = np.tile(
        np.arange(prefix), len(prefix_at)
    )
    used = prefix + int(unit_length.sum())
    tokens = np.zeros(used, dtype=np.int64)
    end_of_samples = int((start + lengths)[-1]) + 1 if len(start) else 0
    tokens[source[:end_of_samples]] = body[:end_of_samples]

    # A text token sees the text before it; a label token, the whole text.
    of_text = np.repeat(np.arange(len(first)), unit_length)
    text_start = unit_start[of_text]
    seen = np.minimum(np.arange(prefix, used) - text_start, text_length[of_text])
    in_prefix = np.arange(prefix)
    return SharedBody(
        tokens=tokens,
        positions=np.concatenate([in_prefix, prefix + seen]),
        start=np.concatenate([np.zeros(prefix), text_start]).astype(np.int32),
        end=np.concatenate([in_prefix, text_start + seen]).astype(np.int32),
        source=source,
    )


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> IntArray:
    """start, start + 1, …, start + length - 1 of each range, end to end."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(starts - (ends - lengths), lengths)
