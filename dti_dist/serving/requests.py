"""Requests: candidates to be scored after one history, and how they share packs.

All candidates of a request lie behind one copy of its context, each with a [SUM] of its own, and
take the same place in the prompt, as those of training and evaluation do. Each is scored as the
target of a sliding-window prompt, at the cost of its own text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dti_dist.data.item_tokens import ItemTokens
from dti_dist.data.layout import Pack, PackShape, Prompts, lay_out
from dti_dist.data.samples import IntArray
from dti_dist.data.sequences import gap_bucket


@dataclass(frozen=True)
class Requests:
    """Requests end to end; R requests, H interactions of history, C candidates.

    Attributes:
        history_items: [H] rows of the item tokens, each request's at most n, oldest first.
        history_labels: [H] 0 or 1.
        history_gaps: [H] bucket of the time since the interaction before; all 0 without time gaps.
        history_place: [H] how many of its request's history lie before what the user was shown
            with it; all before itself, where each interaction was shown alone.
        history_offsets: [R + 1].
        candidate_items: [C].
        candidate_gaps: [R] bucket of the time since the last interaction of the history.
        candidate_offsets: [R + 1].
    """

    history_items: IntArray
    history_labels: npt.NDArray[np.int8]
    history_gaps: IntArray
    history_place: IntArray
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


def cut_requests(raw: RawRequests, n: int, time_gaps: bool, by_request: bool) -> CutRequests:
    """Each request with the last n interactions before it, and its candidates that have a text.

    Time gaps are those of the whole history: an interaction that is left out for its age, and
    only such, still is the one before.

    Args:
        by_request: interactions of one time were shown at once, and none sees another of them.
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
    nth = np.arange(len(kept))
    ends = np.searchsorted(of, np.arange(R), side="right")
    shown = nth  # the first of what was shown at once
    if by_request and raw.timestamps is not None:
        stamps = raw.timestamps[kept]
        opens = (np.diff(of, prepend=-1) > 0) | (np.diff(stamps, prepend=0) != 0)
        shown = np.maximum.accumulate(np.where(opens, nth, 0))
    gaps, last_gaps = np.zeros(len(kept), dtype=np.int64), np.zeros(R, dtype=np.int64)
    if time_gaps and len(kept):
        assert raw.timestamps is not None, "time gaps need timestamps"
        stamps = raw.timestamps[kept]
        before = np.maximum(shown - 1, 0)
        gaps = np.where(of[before] == of, gap_bucket(stamps - stamps[before]), 0)
        has_history = np.bincount(of, minlength=R) > 0
        last = stamps[np.maximum(ends - 1, 0)]
        last_gaps = np.where(has_history, gap_bucket(times - last), 0)
    recent = nth >= (ends - n)[of]
    context = np.bincount(of[recent], minlength=R)
    oldest = ends - context
    has_text = raw.candidates >= 0
    scored = np.flatnonzero(has_text)
    of_candidate = np.arange(R).repeat(np.diff(raw.candidate_offsets))
    return CutRequests(
        requests=Requests(
            history_items=raw.items[kept[recent]],
            history_labels=raw.labels[kept[recent]],
            history_gaps=gaps[recent],
            history_place=np.maximum(shown - oldest[of], 0)[recent],
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
    """A pack of pieces, and what was laid out in it.

    Attributes:
        pack: `target_position` counts candidates over all requests; `target_row` is the request.
    """

    pack: Pack
    shape: PackShape
    prompts: Prompts


def build_request_pack(
    requests: Requests,
    pieces: Pieces,
    tokens: ItemTokens,
    shape_of: Callable[[int, int], PackShape] = PackShape,
) -> RequestPack:
    """Lay pieces end to end: prefix, context with labels, then candidates without.

    Args:
        shape_of: what a pack of so many tokens and so many candidates is padded to.
    """
    prompts = _prompts(requests, pieces, with_gaps=bool(tokens.gaps))
    slots = len(prompts.targets)
    shape = shape_of(prompts.body_length(tokens), slots)
    return RequestPack(lay_out(prompts, tokens, shape), shape, prompts)


def _prompts(requests: Requests, pieces: Pieces, with_gaps: bool) -> Prompts:
    candidates = pieces.end - pieces.first
    history = np.diff(requests.history_offsets)[pieces.request]
    count = history + candidates
    piece = np.arange(len(count)).repeat(count)
    nth = np.arange(len(piece)) - (count.cumsum() - count)[piece]
    is_candidate = nth >= history[piece]
    from_history = (requests.history_offsets[pieces.request][piece] + nth)[~is_candidate]
    from_candidates = (pieces.first[piece] + nth - history[piece])[is_candidate]
    request = pieces.request[piece[is_candidate]]

    def interactions(of_history: np.ndarray, of_candidates: np.ndarray | int) -> np.ndarray:
        values = np.empty(len(piece), dtype=of_history.dtype)
        values[~is_candidate] = of_history
        values[is_candidate] = of_candidates
        return values

    gaps = requests.history_gaps[from_history], requests.candidate_gaps[request]
    return Prompts(
        count=count,
        prompt=piece,
        items=interactions(
            requests.history_items[from_history], requests.candidate_items[from_candidates]
        ),
        gaps=interactions(*gaps) if with_gaps else None,
        labels=interactions(requests.history_labels[from_history], 0),
        targets=np.flatnonzero(is_candidate),
        target_row=request,
        target_position=from_candidates,
        candidates=candidates,
        place=interactions(requests.history_place[from_history], history[piece[is_candidate]]),
    )
