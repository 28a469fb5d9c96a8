"""Requests: candidates to be scored after one history, and how they share packs.

All candidates of a request lie behind one copy of its context, each with a [SUM] of its own, and
take the same place in the prompt: `Pack.unit_place`. Each is scored as the target of a
sliding-window prompt, at the cost of its own text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dti_dist.data.item_tokens import ItemTokens
from dti_dist.data.packing import Pack, PackShape, ranges
from dti_dist.data.samples import IntArray
from dti_dist.data.sequences import gap_bucket


@dataclass(frozen=True)
class Requests:
    """Requests end to end; R requests, H interactions of history, C candidates.

    Attributes:
        history_items: [H] rows of the item tokens, each request's at most n, oldest first.
        history_labels: [H] 0 or 1.
        history_gaps: [H] bucket of the time since the interaction before; all 0 without time gaps.
        history_offsets: [R + 1].
        candidate_items: [C].
        candidate_gaps: [R] bucket of the time since the last interaction of the history.
        candidate_offsets: [R + 1].
    """

    history_items: IntArray
    history_labels: npt.NDArray[np.int8]
    history_gaps: IntArray
    history_offsets: IntArray
    candidate_items: IntArray
    candidate_gaps: IntArray
    candidate_offsets: IntArray

    def __len__(self) -> int:
        return len(self.candidate_gaps)


_NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True)
class RawRequests:
    """Requests as they come, before histories are cut to what a target may see.

    Attributes:
        items, candidates: rows of the item tokens; -1 where an item has no text.
        timestamps: [H] seconds, or None where they are not known.
        times: [R] seconds, when each request is made; None or the largest int64: after all.
    """

    items: IntArray
    labels: npt.NDArray[np.int8]
    timestamps: IntArray | None
    offsets: IntArray
    candidates: IntArray
    candidate_offsets: IntArray
    times: IntArray | None


@dataclass(frozen=True)
class CutRequests:
    """What is scored, and what was left out of histories.

    Attributes:
        scored: [scored] which candidates of the raw requests have a text: those of `requests`.
        context: [R] interactions that each request's candidates see.
        without_text, future, older: interactions of histories whose item has no text, that are not
            before the request, that are more than n back.
        sorted: requests whose histories were not in time order and were sorted.
    """

    requests: Requests
    scored: IntArray
    context: IntArray
    without_text: int
    future: int
    older: int
    sorted: int


def cut_requests(raw: RawRequests, n: int, time_gaps: bool) -> CutRequests:
    """Each request with the last n interactions before it, and its candidates that have a text.

    Time gaps are those of the whole history: an interaction that is left out for its age, and
    only such, still is the one before.
    """
    R = len(raw.offsets) - 1
    request = np.arange(R).repeat(np.diff(raw.offsets))
    known = raw.items >= 0
    past = np.ones(len(known), dtype=bool)
    times = np.full(R, _NEVER) if raw.times is None else raw.times
    kept = np.arange(len(known))
    disordered = 0
    if raw.timestamps is not None:
        past = raw.timestamps < times[request]
        order = np.lexsort((raw.timestamps, request))
        disordered = len(np.unique(request[order != kept]))
        kept = order
    kept = kept[(known & past)[kept]]
    of = request[kept]
    gaps, last_gaps = np.zeros(len(kept), dtype=np.int64), np.zeros(R, dtype=np.int64)
    ends = np.searchsorted(of, np.arange(R), side="right")
    if time_gaps and len(kept):
        assert raw.timestamps is not None, "time gaps need timestamps"
        stamps = raw.timestamps[kept]
        gaps = np.where(np.diff(of, prepend=-1) > 0, 0, gap_bucket(np.diff(stamps, prepend=0)))
        has_history = np.bincount(of, minlength=R) > 0
        last = stamps[np.maximum(ends - 1, 0)]
        last_gaps = np.where(has_history, gap_bucket(times - last), 0)
    recent = np.arange(len(kept)) >= (ends - n)[of]
    context = np.bincount(of[recent], minlength=R)
    has_text = raw.candidates >= 0
    scored = np.flatnonzero(has_text)
    of_candidate = np.arange(R).repeat(np.diff(raw.candidate_offsets))
    return CutRequests(
        requests=Requests(
            history_items=raw.items[kept[recent]],
            history_labels=raw.labels[kept[recent]],
            history_gaps=gaps[recent],
            history_offsets=np.concatenate([[0], np.cumsum(context)]),
            candidate_items=raw.candidates[scored],
            candidate_gaps=last_gaps,
            candidate_offsets=np.concatenate(
                [[0], np.cumsum(np.bincount(of_candidate[scored], minlength=R))]
            ),
        ),
        scored=scored,
        context=context,
        without_text=int((~known).sum()),
        future=int((known & ~past).sum()),
        older=int((~recent).sum()),
        sorted=disordered,
    )


@dataclass(frozen=True)
class Pieces:
    """What goes into one pack: runs of candidates, each with its request's context.

    Attributes:
        request: [pieces]; first, end: [pieces] its candidates, counted over all requests.
    """

    request: IntArray
    first: IntArray
    end: IntArray


def pack_requests(requests: Requests, tokens: ItemTokens, pack_tokens: int) -> Iterator[Pieces]:
    """Cut the candidates, in order, into packs of at most about `pack_tokens` tokens.

    A request that fits into a pack is not parted. Of a longer one each piece repeats the context.
    A context longer than a pack gets one candidate at a time. Requests without candidates are in
    no pack.
    """
    text = tokens.lengths + 1  # with its [SUM]
    gaps = tokens.gap_lengths if tokens.gaps else np.zeros(1, dtype=np.int64)
    context = len(tokens.prefix) + _sums(
        text[requests.history_items] + gaps[requests.history_gaps], requests.history_offsets
    )
    candidates = np.diff(requests.candidate_offsets)
    costs = text[requests.candidate_items] + gaps[requests.candidate_gaps].repeat(candidates)
    ends = np.concatenate([[0], np.cumsum(costs)])
    open_pieces: list[tuple[int, int, int]] = []
    room = pack_tokens
    for request in np.flatnonzero(candidates).tolist():
        first, last = requests.candidate_offsets[request : request + 2].tolist()
        whole = int(context[request] + ends[last] - ends[first])
        if whole > room and open_pieces:
            yield _as_pieces(open_pieces)
            open_pieces, room = [], pack_tokens
        while whole > room:
            holds = int(ends[first] + room - context[request])
            end = max(int(np.searchsorted(ends, holds, side="right")) - 1, first + 1)
            if end >= last:
                break
            yield _as_pieces([(request, first, end)])
            first, whole = end, int(context[request] + ends[last] - ends[end])
        open_pieces.append((request, first, last))
        room -= whole
    if open_pieces:
        yield _as_pieces(open_pieces)


def _as_pieces(pieces: list[tuple[int, int, int]]) -> Pieces:
    return Pieces(*np.array(pieces, dtype=np.int64).T)


def _sums(values: IntArray, offsets: IntArray) -> IntArray:
    ends = np.concatenate([[0], np.cumsum(values)])
    return ends[offsets[1:]] - ends[offsets[:-1]]


@dataclass(frozen=True)
class RequestPack:
    """A pack of pieces, and what stands where in it.

    Attributes:
        pack: `target_position` counts candidates over all requests; `target_row` is the request.
        text: [U, 2] item and gap bucket of each unit; -1 of a prefix.
        labels: [U] label of each interaction; -1 where there is no label token.
    """

    pack: Pack
    shape: PackShape
    text: IntArray
    labels: npt.NDArray[np.int8]


def build_request_pack(
    requests: Requests,
    pieces: Pieces,
    tokens: ItemTokens,
    filled_up: Callable[[int], int] = lambda size: size,
) -> RequestPack:
    """Lay out pieces end to end: prefix, context with labels, then candidates without.

    Args:
        filled_up: to what length so many tokens, or slots, are padded.
    """
    P = len(tokens.prefix)
    history = np.diff(requests.history_offsets)[pieces.request]
    count = history + pieces.end - pieces.first
    end_of_piece = count.cumsum()
    first_of_piece = end_of_piece - count

    # Interactions and candidates of all pieces, end to end.
    piece = np.arange(len(count)).repeat(count)
    nth = np.arange(len(piece)) - first_of_piece[piece]
    is_candidate = nth >= history[piece]
    place = np.where(
        is_candidate,
        pieces.first[piece] + nth - history[piece],
        requests.history_offsets[pieces.request][piece] + nth,
    )
    items, gaps = np.empty_like(place), np.empty_like(place)
    labels = np.full(len(place), -1, dtype=np.int8)
    of_history, of_candidates = place[~is_candidate], place[is_candidate]
    items[~is_candidate] = requests.history_items[of_history]
    items[is_candidate] = requests.candidate_items[of_candidates]
    gaps[~is_candidate] = requests.history_gaps[of_history]
    gaps[is_candidate] = requests.candidate_gaps[pieces.request[piece[is_candidate]]]
    labels[~is_candidate] = requests.history_labels[of_history]

    # Where each lies; the prefix of a piece lies before its first one.
    gap_lengths = tokens.gap_lengths[gaps] if tokens.gaps else np.zeros_like(items)
    text_lengths = tokens.lengths[items]
    lengths = gap_lengths + text_lengths + ~is_candidate
    end = lengths.cumsum() + P * (piece + 1)
    start = end - lengths
    used = int(end[-1])
    piece_start = start[first_of_piece] - P

    # Units in order: with a prefix, one more before each piece.
    has_prefix = int(P > 0)
    unit = np.arange(len(items)) + has_prefix * (piece + 1)
    units = len(items) + has_prefix * len(count)
    unit_lengths = np.full(units, P)
    unit_lengths[unit] = lengths
    unit_start = np.concatenate([[0], unit_lengths.cumsum()]).astype(np.int32)
    unit_first, unit_place = np.arange(units, dtype=np.int32), np.arange(units, dtype=np.int32)
    unit_first[unit] = unit[first_of_piece][piece]
    first_candidate = first_of_piece + history
    unit_place[unit[is_candidate]] = unit[first_candidate][piece[is_candidate]]
    prefix_start, prefix_end = np.zeros((2, units), dtype=np.int32)
    prefix_start[unit] = piece_start[piece]
    prefix_end[unit] = piece_start[piece] + P

    slots = int(is_candidate.sum())
    shape = PackShape(filled_up(used), filled_up(slots))
    L, T = shape.length, shape.length + shape.slots
    ids, positions = np.zeros((2, T), dtype=np.int64)
    ids[ranges(start + gap_lengths, text_lengths)] = np.asarray(tokens.tokens)[
        ranges(np.asarray(tokens.offsets)[items], text_lengths)
    ]
    ids[end[~is_candidate] - 1] = np.asarray(tokens.label_ids)[labels[~is_candidate]]
    if tokens.gaps:
        gap_offsets = tokens.gap_lengths.cumsum() - tokens.gap_lengths
        ids[ranges(start, gap_lengths)] = np.concatenate(tokens.gaps)[
            ranges(gap_offsets[gaps], gap_lengths)
        ]
    ids[piece_start[:, None] + np.arange(P)] = tokens.prefix
    position_of_start = start - piece_start[piece]
    position_of_start[is_candidate] = (start[first_candidate] - piece_start)[piece[is_candidate]]
    positions[ranges(start, lengths)] = ranges(position_of_start, lengths)
    positions[piece_start[:, None] + np.arange(P)] = np.arange(P)
    unit_of_token = np.full(T, -1, dtype=np.int32)
    unit_of_token[:used] = np.arange(units, dtype=np.int32).repeat(unit_lengths)

    tail = slice(L, L + slots)
    ids[tail] = tokens.sum_id
    positions[tail] = (position_of_start + lengths)[is_candidate]
    unit_of_token[tail] = unit[is_candidate]

    def of_slots(values: np.ndarray | int, unused: int, dtype: type) -> np.ndarray:
        array: np.ndarray = np.full(shape.slots, unused, dtype=dtype)
        array[:slots] = values
        return array

    text = np.full((units, 2), -1, dtype=np.int64)
    text[unit] = np.stack([items, gaps], axis=1)
    label_of_unit = np.full(units, -1, dtype=np.int8)
    label_of_unit[unit] = labels
    pack = Pack(
        tokens=ids,
        positions=positions,
        unit=unit_of_token,
        unit_start=unit_start,
        unit_first=unit_first,
        prefix_start=prefix_start,
        prefix_end=prefix_end,
        readout_end=of_slots(end[is_candidate], 0, np.int32),
        labels=of_slots(0, 0, np.float32),
        used=of_slots(1, 0, np.float32),
        target_row=of_slots(pieces.request[piece[is_candidate]], -1, np.int64),
        target_position=of_slots(of_candidates, -1, np.int32),
        body_tokens=used,
        unit_place=unit_place,
    )
    return RequestPack(pack, shape, text, label_of_unit)
