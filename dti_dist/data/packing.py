"""Which samples share a pack, and how large packs are."""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from dti_dist.data.item_tokens import ItemTokens
from dti_dist.data.layout import PackShape, build_pack
from dti_dist.data.samples import IntArray, Samples, sample_lengths
from dti_dist.data.sequences import SequenceBlock
from dti_dist.errors import UserError

_MEASURED_PACKS = 8
_OPEN_PACKS = 64  # more would fill a little better, and mix neighbours of the order further apart


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
