"""Prompts laid out in a pack: token ids, and the layout that the attention's masks come from."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dti_dist.attention.layout import PackLayout, Record, SharedBody
from dti_dist.data.dataset import UNKNOWN
from dti_dist.data.item_tokens import ItemTokens
from dti_dist.data.samples import (
    IntArray,
    Samples,
    Units,
    block_words,
    labelled_units,
    ranges,
)
from dti_dist.data.sequences import SequenceBlock

_UNIT_STRIDE = 64  # unit arrays grow in these strides, so that few sizes occur


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

    @property
    def computed_body(self) -> int:
        """Tokens that the layers run on beside the slots."""
        return self.length if self.body is None else self.body


@dataclass(frozen=True)
class Pack(Record):
    """Packs as the model reads them, as tensors [B, …]; of one pack, without B.

    Attributes:
        tokens: [B, Tb] ids: of the L tokens of samples end to end, or of the Lb tokens of a shared
            body; then of S [SUM] slots.
        layout: what lies where.
        labels: [B, S] float32, 0 or 1.
        used: [B, S] float32, 1 for slots with a target, 0 for the others.
        weight: [B, S] float32, what each target counts in the loss; 0 for slots without one.
        target_row, target_position: [B, S] which interaction of the split is the target; -1 unused.
        body_tokens: tokens without padding that the layers run on, slots not counted.
        further_labels: [B, S, tasks - 1] float32, labels of the tasks beside the main one: 0, 1,
            or UNKNOWN, as of slots without a target. None: there is one task.
    """

    tokens: Tensor
    layout: PackLayout
    labels: Tensor
    used: Tensor
    weight: Tensor
    target_row: Tensor
    target_position: Tensor
    body_tokens: int
    further_labels: Tensor | None = None

    @property
    def targets(self) -> int:
        return int(self.used.sum())


@dataclass(frozen=True)
class Prompts:
    """What goes into a pack: prompts end to end; I interactions.

    The last interactions of a prompt may be candidates: each is a target behind the history before
    its request, without a label token.

    Attributes:
        count: [prompts] interactions of each; prompt: [I] the prompt of each.
        items: [I] rows of the item tokens.
        words: [I, W] rows of the words.
        labels: [I] 0 or 1; a candidate's is not read.
        targets: [targets] which interactions get a [SUM] slot, in order.
        weight: [targets] what each counts; None: 1.
        target_row, target_position: [targets] which interaction of the split, or of the requests.
        further_labels: [targets, tasks - 1] as of Pack.
        candidates: [prompts] how many of its interactions are candidates.
        place: [I] how many interactions of its prompt lie before its request. Both are None where
            each interaction is alone in its request, and none a candidate.
        profiles: [prompts] rows of the tokens' profiles; None where the tokens have none.
    """

    count: IntArray
    prompt: IntArray
    items: npt.NDArray[np.integer]
    words: IntArray
    labels: npt.NDArray[np.int8]
    targets: IntArray
    target_row: IntArray
    target_position: IntArray
    candidates: IntArray | None = None
    place: IntArray | None = None
    weight: npt.NDArray[np.float32] | None = None
    further_labels: npt.NDArray[np.int8] | None = None
    profiles: IntArray | None = None

    @property
    def labelled(self) -> npt.NDArray[np.bool_]:
        """[I] whether a label token follows: not behind candidates."""
        return labelled_units(self.count, self.candidates)

    def text_lengths(self, tokens: ItemTokens) -> IntArray:
        """[I] tokens of each one's text."""
        return tokens.text_lengths(self.items, self.words)

    def body_length(self, tokens: ItemTokens) -> int:
        """L at least."""
        fronts = len(tokens.prefix) * len(self.count) + int(self.profile_lengths(tokens).sum())
        return int(self.text_lengths(tokens).sum() + self.labelled.sum()) + fronts

    def profile_lengths(self, tokens: ItemTokens) -> IntArray:
        """[prompts] tokens of each one's profile."""
        if self.profiles is None:
            return np.zeros(len(self.count), dtype=np.int64)
        assert tokens.profiles is not None, "tokens with profiles"
        return tokens.profiles.lengths[self.profiles]

    def units(self, tokens: ItemTokens) -> IntArray:
        """[I] the unit of each; each prompt's profile and prefix, if any, lie before its first."""
        unit = np.arange(len(self.items))
        fronts = (self.profiles is not None) + (len(tokens.prefix) > 0)
        if fronts:
            unit += fronts * (self.prompt + 1)
        return unit

    def profile_units(self, tokens: ItemTokens) -> IntArray:
        """[prompts] the unit of each one's profile, where there are some."""
        first = self.units(tokens)[self.count.cumsum() - self.count]
        return first - 1 - (len(tokens.prefix) > 0)


def build_pack(
    samples: Samples, block: SequenceBlock, tokens: ItemTokens, shape: PackShape
) -> Pack:
    """Lay samples end to end in a pack. No samples at all give a pack without targets."""
    units = Units.of(samples, block)
    row = samples.row[units.sample[units.targets]]
    further = block.further_labels
    prompts = Prompts(
        count=units.count,
        prompt=units.sample,
        items=block.item_ids[units.source],
        words=block_words(block, tokens, units.source),
        labels=block.labels[units.source],
        targets=units.targets,
        target_row=block.rows[row],
        target_position=units.source[units.targets] - block.offsets[row],
        candidates=units.candidates,
        place=units.place,
        weight=None if block.weight is None else block.weight[units.source[units.targets]],
        further_labels=None if further is None else further[units.source[units.targets]],
        profiles=None if tokens.profiles is None else _profiles(block)[samples.row],
    )
    return lay_out(prompts, tokens, shape)


def _profiles(block: SequenceBlock) -> IntArray:
    assert block.profile is not None, "profiles need the profile column"
    return block.profile.astype(np.int64)


def lay_out(prompts: Prompts, tokens: ItemTokens, shape: PackShape) -> Pack:
    """Lay prompts end to end: each one's profile, its prefix, then its interactions, text and label
    token.

    Where the shape has a `body`, equal interactions are also laid out once each.
    """
    P, L = len(tokens.prefix), shape.length
    items, words, labels = prompts.items, prompts.words, prompts.labels
    count, prompt, target = prompts.count, prompts.prompt, prompts.targets
    end_of_prompt = count.cumsum()
    first_of_prompt = end_of_prompt - count

    # Where each interaction lies in the body, each prompt's profile and prefix before its first.
    has_profiles, profile_lengths = prompts.profiles is not None, prompts.profile_lengths(tokens)
    text = prompts.text_lengths(tokens)
    labelled: slice | npt.NDArray[np.bool_] = slice(None)
    lengths = text + 1
    if prompts.candidates is not None:
        labelled = prompts.labelled
        lengths = text + labelled
    end = lengths.cumsum()
    if P:
        end += P * (prompt + 1)
    if has_profiles:
        end += profile_lengths.cumsum()[prompt]
    start = end - lengths
    text_end = end - 1 if prompts.candidates is None else start + text
    body_tokens = int(end[-1]) if len(end) else 0
    prompt_start = start[first_of_prompt] - P
    prompt_tokens = end[end_of_prompt - 1] - prompt_start

    # Units in body order.
    unit_of = prompts.units(tokens)
    unit_lengths = lengths
    fronts = has_profiles + bool(P)
    if fronts:
        unit_lengths = np.full(len(items) + len(count) * fronts, P)
        unit_lengths[unit_of] = lengths
    if has_profiles:
        profile_unit = prompts.profile_units(tokens)
        unit_lengths[profile_unit] = profile_lengths
    units = len(unit_lengths)
    room = -(-max(units, 1) // _UNIT_STRIDE) * _UNIT_STRIDE
    unit_start = np.full(room + 1, body_tokens, dtype=np.int32)
    unit_start[0] = 0
    unit_lengths.cumsum(out=unit_start[1 : units + 1])
    unit_first, prefix_start, prefix_end = np.zeros((3, room), dtype=np.int32)
    unit_first[:units] = np.arange(units)
    unit_first[unit_of] = unit_of[first_of_prompt][prompt]
    if P:
        prefix_start[unit_of] = prompt_start[prompt]
        prefix_end[unit_of] = prompt_start[prompt] + P

    profiles = profile_start = profile_end = None
    if prompts.profiles is not None:
        at = ranges(prompt_start - profile_lengths, profile_lengths)
        profiles = _Profiles(prompts.profiles, profile_lengths, at)
        profile_start, profile_end = np.zeros((2, room), dtype=np.int32)
        profile_start[:units] = (prompt_start - profile_lengths).repeat(count + fronts)
        profile_end[:units] = prompt_start.repeat(count + fronts)
        profile_start[profile_unit] = profile_end[profile_unit] = 0

    # The body.
    ids = np.zeros(L + shape.slots, dtype=np.int64)
    write_texts(ids, tokens, items, words, start, body_tokens)
    ids[text_end[labelled]] = np.asarray(tokens.label_ids)[labels[labelled]]
    if P:
        ids[prompt_start[:, None] + np.arange(P)] = tokens.prefix
    position = np.zeros(L + shape.slots, dtype=np.int64)
    zero = prompt_start.repeat(prompt_tokens + profile_lengths)
    if profiles is not None:
        ids[profiles.at] = profile_ids(profiles.rows, tokens)
        zero[profiles.at] -= profile_lengths.repeat(profile_lengths)
    np.subtract(np.arange(body_tokens), zero, out=position[:body_tokens])
    unit = np.empty(L + shape.slots, dtype=np.int32)
    unit[:body_tokens] = np.arange(units, dtype=np.int32).repeat(unit_lengths)
    unit[body_tokens:] = -1

    # Slots: one for each target, in order.
    used = len(target)
    slots = slice(L, L + used)
    ids[slots] = tokens.sum_id
    position[slots] = text_end[target] - prompt_start[prompt[target]]
    unit[slots] = unit_of[target]

    unit_place = context_end = None
    if prompts.place is not None:
        begins = first_of_prompt[prompt] + prompts.place  # the first of its request or behind it
        (candidate,) = (~prompts.labelled).nonzero()
        shift = start[candidate] - start[begins[candidate]]
        position[ranges(start[candidate], text[candidate])] -= shift.repeat(text[candidate])
        behind = np.zeros(len(items), dtype=np.int64)
        behind[candidate] = shift
        position[slots] -= behind[target]
        unit_place, context_end = np.zeros((2, room), dtype=np.int32)
        unit_place[:units] = context_end[:units] = np.arange(units)
        unit_place[unit_of[candidate]] = unit_of[begins[candidate]]
        context_end[unit_of] = unit_of[begins]

    def tail(values: np.ndarray | int, unused: int, dtype: type) -> Tensor:
        array: np.ndarray = np.empty((shape.slots, *np.shape(values)[1:]), dtype=dtype)
        array[:used] = values
        array[used:] = unused
        return torch.from_numpy(array)

    shared = None
    if shape.body is not None:
        # A run is an interaction with the prefix of the prompt after it.
        runs = np.diff(start, append=body_tokens)
        texts, _ = tokens.text_numbers(items, words)
        shared_ids, shared = _share(
            texts,
            labels,
            prompts.labelled,
            start,
            text,
            runs,
            prompt_start,
            P,
            ids[:L],
            profiles,
        )
        body_tokens = len(shared_ids)
        ids = np.concatenate([shared_ids, ids[L:]])
    return Pack(
        tokens=torch.from_numpy(ids),
        layout=PackLayout(
            unit=torch.from_numpy(unit),
            position=torch.from_numpy(position),
            unit_start=torch.from_numpy(unit_start),
            unit_first=torch.from_numpy(unit_first),
            prefix_start=torch.from_numpy(prefix_start),
            prefix_end=torch.from_numpy(prefix_end),
            readout_end=tail(text_end[target], 0, np.int32),
            unit_place=None if unit_place is None else torch.from_numpy(unit_place),
            unit_context_end=None if context_end is None else torch.from_numpy(context_end),
            profile_start=None if profile_start is None else torch.from_numpy(profile_start),
            profile_end=None if profile_end is None else torch.from_numpy(profile_end),
            shared=shared,
        ),
        labels=tail(labels[target], 0, np.float32),
        used=tail(1, 0, np.float32),
        weight=tail(1 if prompts.weight is None else prompts.weight, 0, np.float32),
        target_row=tail(prompts.target_row, -1, np.int64),
        target_position=tail(prompts.target_position, -1, np.int32),
        body_tokens=body_tokens,
        further_labels=None
        if prompts.further_labels is None
        else tail(prompts.further_labels, UNKNOWN, np.float32),
    )


def write_texts(
    ids: npt.NDArray[np.int64],
    tokens: ItemTokens,
    items: npt.NDArray[np.integer],
    words: IntArray,
    start: IntArray,
    end: int,
) -> None:
    """Write the texts of interactions with items [I] and words [I, W] into `ids`.

    Args:
        ids: from the first start on, what is no text gets values without a meaning.
        start: [I] where each text begins, in order.
        end: where the last one and what belongs to it ends.
    """
    if not len(items):
        return
    if len(tokens.of_item) == 1:  # the usual case, where each step counts
        source, begin, runs_begin = np.asarray(tokens.offsets)[items], start, start
    else:
        J, of_item = tokens.item_pieces, np.array(tokens.of_item)
        pieces = items[:, None].astype(np.int64) * J + np.arange(J)
        source = np.asarray(tokens.offsets)[pieces]
        lengths = np.empty((len(items), len(of_item)), dtype=np.int64)
        lengths[:, of_item] = np.asarray(tokens.offsets)[pieces + 1] - source
        lengths[:, ~of_item] = tokens.word_lengths[words]
        of_words = lengths[:, ~of_item].ravel()
        piece_begin = start[:, None] + lengths.cumsum(axis=1) - lengths
        begin = piece_begin[:, of_item]
        runs_begin = begin.copy()
        runs_begin[:, 0] = start
    # Reading all of it as text of items, and then writing what is none, is fastest. A run is an
    # item's piece with what stands between it and the next.
    runs_begin = runs_begin.ravel()
    runs = np.empty_like(runs_begin)
    np.subtract(runs_begin[1:], runs_begin[:-1], out=runs[:-1])
    runs[-1] = end - runs_begin[-1]
    item_tokens = np.asarray(tokens.tokens)  # indexing is faster without the memory map's class
    place = np.arange(start[0], end)
    place += (source - begin).ravel().repeat(runs)
    ids[start[0] : end] = item_tokens.take(place, mode="clip")
    if tokens.words:
        to, of = piece_begin[:, ~of_item].ravel(), tokens.word_offsets[words].ravel()
        ids[ranges(to, of_words)] = tokens.word_tokens[ranges(of, of_words)]


def profile_ids(profiles: IntArray, tokens: ItemTokens) -> npt.NDArray[np.int32]:
    """The tokens of some profiles, end to end."""
    assert tokens.profiles is not None, "tokens with profiles"
    starts = np.asarray(tokens.profiles.offsets)[profiles]
    return np.asarray(tokens.profiles.tokens)[ranges(starts, tokens.profiles.lengths[profiles])]


@dataclass(frozen=True)
class _Profiles:
    """Profiles of samples.

    Attributes:
        rows, lengths: [samples] the profile of each, and its tokens.
        at: where these lie in the body, sample after sample.
    """

    rows: IntArray
    lengths: IntArray
    at: IntArray


_OF_TOKENS = ("position", "start", "end")


def _share(
    texts: npt.NDArray[np.integer],
    labels: npt.NDArray[np.int8],
    labelled: npt.NDArray[np.bool_],
    start: IntArray,
    lengths: IntArray,
    runs: IntArray,
    prefix_at: IntArray,
    prefix_length: int,
    body: npt.NDArray[np.int64],
    profiles: _Profiles | None,
) -> tuple[npt.NDArray[np.int64], SharedBody]:
    """The distinct interactions, and behind them the distinct profiles, once each: token ids [Lb],
    and how they lie.

    Args:
        texts: [interactions] equal numbers mean equal texts in all pieces.
        labels: [interactions] 0 or 1; labelled: whether a token of it follows the text.
        start, lengths: [interactions] where each text lies in `body`, and its tokens.
        runs: [interactions] tokens from the start of each text to that of the next.
        prefix_at: [samples] where each sample's prefix lies in `body`.
        body: [L] token ids of all samples end to end.
    """
    _, first, unit = np.unique(texts, return_index=True, return_inverse=True)
    occurs = np.zeros((len(first), 2), dtype=np.int64)
    occurs[unit[labelled], labels[labelled]] = 1
    prefix = prefix_length if len(prefix_at) else 0
    unit_start, shared = distinct_texts(lengths[first], occurs.sum(axis=1), prefix)

    begin = int(start[0]) if len(start) else 0
    end_of_samples = begin + int(runs.sum())
    source = np.zeros(len(body), dtype=np.int64)
    np.add(
        np.arange(begin, end_of_samples),
        (unit_start[unit] - start).repeat(runs),
        out=source[begin:end_of_samples],
    )
    label_at = unit_start[unit] + lengths + occurs[unit, 0] * labels
    source[(start + lengths)[labelled]] = label_at[labelled]
    if prefix:
        source[prefix_at[:, None] + np.arange(prefix)] = np.arange(prefix)
    if profiles is not None:
        _, first, which = np.unique(profiles.rows, return_index=True, return_inverse=True)
        profile_start, laid = distinct_profiles(profiles.lengths[first], len(shared.position))
        source[profiles.at] = ranges(profile_start[which], profiles.lengths)
        joined = {n: torch.cat([vars(shared)[n], vars(laid)[n]]) for n in _OF_TOKENS}
        shared = replace(shared, profiles=laid.profiles, **joined)
    tokens = np.empty(len(shared.position), dtype=np.int64)
    tokens[source[:end_of_samples]] = body[:end_of_samples]
    return tokens, replace(shared, source=torch.from_numpy(source))


def distinct_profiles(lengths: IntArray, behind: int = 0) -> tuple[IntArray, SharedBody]:
    """Profiles end to end, behind so many tokens of another kind.

    Args:
        lengths: [profiles] tokens of each.

    Returns:
        [profiles] where each begins, and how their tokens lie, with an empty `source`.
    """
    starts = behind + lengths.cumsum() - lengths
    place = behind + np.arange(int(lengths.sum()))
    start_seen = starts.repeat(lengths)
    return starts, SharedBody(
        position=torch.from_numpy(place - start_seen),
        start=torch.from_numpy(start_seen.astype(np.int32)),
        end=torch.from_numpy(place.astype(np.int32)),
        source=torch.empty(0, dtype=torch.int64),
        profiles=torch.tensor([behind]),
    )


def distinct_texts(
    text_lengths: IntArray, labels: IntArray, prefix: int
) -> tuple[IntArray, SharedBody]:
    """Texts end to end behind a prefix, each with the label tokens that occur after it.

    A text token sees the text before it; a label token, the whole text and no other label.

    Args:
        text_lengths: [texts] tokens of each.
        labels: [texts] how many label tokens lie behind each, 0 to 2.
        prefix: tokens of the prefix.

    Returns:
        [texts] where each begins, and the layout of one pack, with an empty `source`.
    """
    unit_length = text_lengths + labels
    unit_end = prefix + unit_length.cumsum()
    unit_start = unit_end - unit_length
    used = int(unit_end[-1]) if len(unit_end) else prefix
    place = np.arange(used)
    start_seen = np.zeros(used, dtype=np.int32)
    start_seen[prefix:] = unit_start.repeat(unit_length)
    end_seen = place.astype(np.int32)
    second_label = unit_end[labels == 2] - 1
    end_seen[second_label] -= 1
    position = place - start_seen
    position[prefix:] += prefix
    position[second_label] -= 1
    return unit_start, SharedBody(
        position=torch.from_numpy(position),
        start=torch.from_numpy(start_seen),
        end=torch.from_numpy(end_seen),
        source=torch.empty(0, dtype=torch.int64),
    )
