"""Requests: candidates to be scored after one history, and how they share packs.

All candidates of a request lie behind one copy of its context, each with a [SUM] of its own, and
take the same place in the prompt, as those of training and evaluation do. Each is scored as the
target of a sliding-window prompt, at the cost of its own text. Under policies that are exact,
requests of one user share what their contexts have in common: they become a streaming prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from dti_dist.data.item_tokens import ItemTokens
from dti_dist.data.layout import Pack, PackShape, Prompts, lay_out
from dti_dist.data.samples import IntArray, ranges
from dti_dist.data.sequences import gap_bucket, moment_codes
from dti_dist.data.template import GAP, MOMENTS


@dataclass(frozen=True)
class Requests:
    """Requests end to end; R requests, H interactions of history, C candidates.

    A request's context are interactions context_start … context_end - 1, at most n, oldest first.
    Contexts that overlap are parts of one history, and follow each other in the order of time.

    Attributes:
        history_items: [H] rows of the item tokens.
        history_labels: [H] 0 or 1.
        history_words: [H, W] rows of the item tokens' words.
        history_place: [H] the first interaction that the user was shown with it; itself, where each
            was shown alone.
        context_start, context_end: [R].
        candidate_items: [C].
        candidate_words: [C, W].
        candidate_offsets: [R + 1].
        profiles: [R] rows of the tokens' profiles; None where the tokens have none. Contexts that
            overlap have the same.
    """

    history_items: IntArray
    history_labels: npt.NDArray[np.int8]
    history_words: IntArray
    history_place: IntArray
    context_start: IntArray
    context_end: IntArray
    candidate_items: IntArray
    candidate_words: IntArray
    candidate_offsets: IntArray
    profiles: IntArray | None = None

    def __len__(self) -> int:
        return len(self.candidate_offsets) - 1


_NEVER = np.iinfo(np.int64).max
_LONGEST_HISTORY = 1 << 32


@dataclass(frozen=True)
class Whose:
    """Histories of requests as runs of their users' histories, in the order of time.

    Attributes:
        user: [R] the same number for the same user; begins: [R] where in the user's history the
            request's begins.
    """

    user: IntArray
    begins: IntArray


@dataclass(frozen=True)
class RawRequests:
    """Requests as they come, before histories are cut to what a target may see.

    Attributes:
        items, candidates: rows of the item tokens; -1 where an item has no text.
        timestamps: [H] seconds, or None where they are not known.
        times: [R] seconds, when each request is made; None or the largest int64: after all.
        whose: of which users the histories are parts; None: each is its own.
        profiles: [R] rows of the tokens' profiles; None where the tokens have none.
        events: by event column, [H] and [C] codes of its values; of a column that is not there all
            have no value.
        unseen_values: how many of these are none because the model has not learned them.
    """

    items: IntArray
    labels: npt.NDArray[np.int8]
    timestamps: IntArray | None
    offsets: IntArray
    candidates: IntArray
    candidate_offsets: IntArray
    times: IntArray | None
    whose: Whose | None = None
    profiles: IntArray | None = None
    events: Mapping[str, tuple[IntArray, IntArray]] = field(default_factory=dict)
    unseen_values: int = 0


@dataclass(frozen=True)
class CutRequests:
    """What is scored, and what was left out of histories.

    Attributes:
        scored: [scored] the candidates of the raw requests that have a text, in the order in which
            `requests` has them.
        context: [R] interactions that the candidates of each raw request see.
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


def cut_requests(
    raw: RawRequests, n: int, tokens: ItemTokens, by_request: bool, share: bool = False
) -> CutRequests:
    """Each request with the last n interactions before it, and its candidates that have a text.

    Time gaps are those of the whole history: an interaction that is left out for its age, and
    only such, still is the one before.

    Args:
        tokens: of the items; its words need the times of requests and histories, or not.
        by_request: interactions of one time were shown at once, and none sees another of them.
        share: requests of one user share what their contexts have in common.
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
    stamps = raw.timestamps[kept] if raw.timestamps is not None else None
    nth, ends = np.arange(len(kept)), np.searchsorted(of, np.arange(R), side="right")
    recent = nth >= (ends - n)[of]
    context = np.bincount(of[recent], minlength=R)
    order, chosen, start = np.arange(R), nth[recent], np.cumsum(context) - context
    owner = order
    # What one request leaves out for another reason than its age, another would bring back.
    if share and raw.whose is not None and known.all():
        place = (nth - (ends - np.bincount(of, minlength=R))[of])[recent]
        whose = _with_profiles(raw.whose, raw.profiles)
        order, chosen, start = _share(whose, chosen, place, context)
        owner = whose.user
    history = kept[chosen]

    def past_codes(name: str) -> IntArray | int:
        if name not in (GAP, *MOMENTS):
            return raw.events[name][0][history] if name in raw.events else 0
        assert stamps is not None, "texts of times need timestamps"
        if name != GAP:
            return moment_codes(name, stamps[chosen], tokens.time_zone)
        before = np.maximum(_shown_with(of, stamps if by_request else None) - 1, 0)
        return np.where(of[before] == of, gap_bucket(stamps - stamps[before]), 0)[chosen]

    def candidate_codes(name: str) -> IntArray | int:
        request = order[of_candidate]
        if name in MOMENTS:
            return moment_codes(name, times, tokens.time_zone)[request]
        if name != GAP:
            return raw.events[name][1][scored] if name in raw.events else 0
        if stamps is None or not len(stamps):
            return 0
        has_history = np.bincount(of, minlength=R) > 0
        last = stamps[np.maximum(ends - 1, 0)]
        return np.where(has_history, gap_bucket(times - last), 0)[request]

    candidates = np.diff(raw.candidate_offsets)[order]
    scored = ranges(raw.candidate_offsets[order], candidates)
    has_text = raw.candidates[scored] >= 0
    of_candidate = np.arange(R).repeat(candidates)[has_text]
    scored = scored[has_text]
    return CutRequests(
        requests=Requests(
            history_items=raw.items[history],
            history_labels=raw.labels[history],
            history_words=tokens.word_rows(len(chosen), past_codes),
            history_place=_shown_with(
                owner[of[chosen]], stamps[chosen] if by_request and stamps is not None else None
            ),
            context_start=start[order],
            context_end=(start + context)[order],
            candidate_items=raw.candidates[scored],
            candidate_words=tokens.word_rows(len(scored), candidate_codes),
            candidate_offsets=np.concatenate(
                [[0], np.cumsum(np.bincount(of_candidate, minlength=R))]
            ),
            profiles=None if raw.profiles is None else raw.profiles[order],
        ),
        scored=scored,
        context=context,
        without_text=int((~known).sum()),
        future=int((known & ~past).sum()),
        older=int((~recent).sum()),
        sorted=disordered,
    )


def _shown_with(of: IntArray, stamps: IntArray | None) -> IntArray:
    """[H] the first interaction that was shown with each; None: each was shown alone."""
    nth = np.arange(len(of))
    if stamps is None:
        return nth
    opens = (np.diff(of, prepend=-1) != 0) | (np.diff(stamps, prepend=0) != 0)
    return np.maximum.accumulate(np.where(opens, nth, 0))


def _with_profiles(whose: Whose, profiles: IntArray | None) -> Whose:
    """A user with two profiles counts as two, for a prompt has one."""
    if profiles is None:
        return whose
    pairs = np.stack([whose.user, profiles])
    _, first, which = np.unique(pairs, axis=1, return_index=True, return_inverse=True)
    return Whose(first[which.reshape(-1)], whose.begins)


def _share(
    whose: Whose, recent: IntArray, place: IntArray, context: IntArray
) -> tuple[IntArray, IntArray, IntArray]:
    """Each interaction of a user once, though it is in the contexts of several requests.

    Args:
        recent: the interactions of all contexts, request by request; place: where in its request's
            history each lies.
        context: [R] lengths of the contexts.

    Returns:
        the requests, by user and time; which of `recent` stay; [R] where each context begins there.
    """
    request = np.arange(len(context)).repeat(context)
    names = whose.user[request] * _LONGEST_HISTORY + whose.begins[request] + place
    distinct, first = np.unique(names, return_index=True)
    oldest = whose.user * _LONGEST_HISTORY  # of an empty context: before all of the user's
    oldest[request[::-1]] = names[::-1]
    start = np.searchsorted(distinct, oldest)
    return np.lexsort((start + context, whose.user)), recent[first], start


@dataclass(frozen=True)
class Pieces:
    """What goes into one pack: runs of candidates, each with the context of their requests.

    Attributes:
        history_start, history_end: [pieces] the contexts; first, end: [pieces] the candidates.
    """

    history_start: IntArray
    history_end: IntArray
    first: IntArray
    end: IntArray


def pack_requests(requests: Requests, tokens: ItemTokens, pack_tokens: int) -> Iterator[Pieces]:
    """Cut the candidates, in order, into packs of at most about `pack_tokens` tokens.

    A request that fits into a pack is not parted. Of a longer one each piece repeats the context.
    A context longer than a pack gets one candidate at a time. Requests without candidates are in
    no pack.
    """
    fronts = np.full(len(requests), len(tokens.prefix))
    if requests.profiles is not None:
        assert tokens.profiles is not None, "tokens with profiles"
        fronts += tokens.profiles.lengths[requests.profiles]
    # A text with its label, or its [SUM].
    history = _ends(tokens.text_lengths(requests.history_items, requests.history_words) + 1)
    ends = _ends(tokens.text_lengths(requests.candidate_items, requests.candidate_words) + 1)
    candidates = np.diff(requests.candidate_offsets)
    pieces: list[list[int]] = []
    room = pack_tokens
    for request in np.flatnonzero(candidates).tolist():
        first, last = requests.candidate_offsets[request : request + 2].tolist()
        start, end = int(requests.context_start[request]), int(requests.context_end[request])
        context = int(fronts[request]) + int(history[end] - history[start])
        joins = bool(pieces) and start < min(end, pieces[-1][1])
        more = int(history[end] - history[pieces[-1][1]]) if joins else context
        whole = more + int(ends[last] - ends[first])
        if whole > room and pieces:
            yield _as_pieces(pieces)
            pieces, room, joins = [], pack_tokens, False
            whole = context + int(ends[last] - ends[first])
        while whole > room:
            holds = int(ends[first] + room - context)
            part = max(int(np.searchsorted(ends, holds, side="right")) - 1, first + 1)
            if part >= last:
                break
            yield _as_pieces([[start, end, first, part]])
            first, whole = part, context + int(ends[last] - ends[part])
        if joins:
            pieces[-1][1], pieces[-1][3] = end, last
        else:
            pieces.append([start, end, first, last])
        room -= whole
    if pieces:
        yield _as_pieces(pieces)


def _as_pieces(pieces: list[list[int]]) -> Pieces:
    return Pieces(*np.array(pieces, dtype=np.int64).T)


def _ends(lengths: IntArray) -> IntArray:
    return np.concatenate([[0], np.cumsum(lengths)])


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
    """Lay pieces end to end: profile, prefix, context with labels, then candidates without.

    Args:
        shape_of: what a pack of so many tokens and so many candidates is padded to.
    """
    prompts = _prompts(requests, pieces)
    slots = len(prompts.targets)
    shape = shape_of(prompts.body_length(tokens), slots)
    return RequestPack(lay_out(prompts, tokens, shape), shape, prompts)


def _prompts(requests: Requests, pieces: Pieces) -> Prompts:
    candidates = pieces.end - pieces.first
    history = pieces.history_end - pieces.history_start
    count = history + candidates
    piece = np.arange(len(count)).repeat(count)
    nth = np.arange(len(piece)) - (count.cumsum() - count)[piece]
    is_candidate = nth >= history[piece]
    from_history = ranges(pieces.history_start, history)
    from_candidates = ranges(pieces.first, candidates)
    request = np.searchsorted(requests.candidate_offsets, from_candidates, side="right") - 1

    def interactions(of_history: np.ndarray, of_candidates: np.ndarray | int) -> np.ndarray:
        values = np.empty((len(piece), *of_history.shape[1:]), dtype=of_history.dtype)
        values[~is_candidate] = of_history
        values[is_candidate] = of_candidates
        return values

    place = interactions(requests.history_place[from_history], requests.context_end[request])
    return Prompts(
        count=count,
        prompt=piece,
        items=interactions(
            requests.history_items[from_history], requests.candidate_items[from_candidates]
        ),
        words=interactions(
            requests.history_words[from_history], requests.candidate_words[from_candidates]
        ),
        labels=interactions(requests.history_labels[from_history], 0),
        targets=np.flatnonzero(is_candidate),
        target_row=request,
        target_position=from_candidates,
        candidates=candidates,
        place=np.maximum(place - pieces.history_start[piece], 0),
        profiles=None
        if requests.profiles is None
        else requests.profiles[
            np.searchsorted(requests.candidate_offsets, pieces.first, side="right") - 1
        ],
    )
