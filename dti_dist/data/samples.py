"""Which prompts a user sequence becomes, and how many tokens each takes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dti_dist.config import SampleConfig
from dti_dist.data.item_tokens import ItemTokens
from dti_dist.data.sequences import SequenceBlock

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Samples:
    """Prompts over the sequences of one block; all arrays are [samples].

    A sample's interactions are among first … end - 1 of its row; those from first_target on may be
    its targets. Interaction positions count from the start of the row.
    """

    row: IntArray
    first: IntArray
    first_target: IntArray
    end: IntArray
    targets: IntArray

    def __len__(self) -> int:
        return len(self.row)

    def take(self, chosen: IntArray) -> Samples:
        return Samples(*(array[chosen] for array in vars(self).values()))

    @staticmethod
    def none() -> Samples:
        return Samples(*(np.empty(0, dtype=np.int64) for _ in range(5)))


@dataclass(frozen=True)
class SampleSettings:
    """How sequences become prompts.

    Attributes:
        n: context interactions of a prompt, at most.
        k: targets of a prompt, at most. A request of more is a prompt of its own, unless k is 1.
        min_context: interactions with less history before their request are never targets.
        for_training: leave out the targets that training is not to see.
    """

    n: int
    k: int
    min_context: int
    for_training: bool = False

    @staticmethod
    def of(sample: SampleConfig, for_training: bool = False) -> SampleSettings:
        return SampleSettings(sample.context, sample.k, sample.min_context, for_training)

    def cut(self, block: SequenceBlock) -> Samples:
        """Cut each sequence into prompts of at most k targets with up to n context interactions.

        Every target from target_start on with enough history is one exactly once, whatever n and k
        are, so paradigms are compared on the same targets. A request is not cut, so that each of
        its targets has the same context; but with k = 1 each target has a prompt of its own.
        """
        if block.by_request:
            return self._cut_requests(block)
        n, k = self.n, self.k
        lengths = np.diff(block.offsets)
        first = np.maximum(block.target_start, self.min_context)
        count = np.maximum(-(-(lengths - first) // k), 0)
        row = np.repeat(np.arange(len(lengths)), count)
        nth = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
        first_target = first[row] + nth * k
        end = np.minimum(first_target + k, lengths[row])
        return Samples(
            row=row,
            first=np.maximum(first_target - n, 0),
            first_target=first_target,
            end=end,
            targets=end - first_target,
        )

    def targets(self, block: SequenceBlock) -> IntArray:
        """[targets] the interactions of the block that are targets, in order: those of the first
        sample of `cut`, then those of the second, and so on."""
        start, lengths = block.offsets[:-1], np.diff(block.offsets)
        row_of = np.arange(len(lengths)).repeat(lengths)
        requests = block.requests
        before = requests.before[requests.start] - requests.before[start[row_of]]
        place = np.arange(len(row_of)) - start[row_of]
        wanted = (place >= block.target_start[row_of]) & (before >= self.min_context)
        if block.is_target is not None:
            wanted &= block.is_target
        return wanted.nonzero()[0]

    def _cut_requests(self, block: SequenceBlock) -> Samples:
        requests, start, lengths = block.requests, block.offsets[:-1], np.diff(block.offsets)
        targets = self.targets(block)
        row = np.arange(len(lengths)).repeat(lengths)[targets]
        if self.k == 1:
            first, stop = np.arange(len(targets)), np.arange(1, len(targets) + 1)
        else:
            first, stop = self._whole_requests(row, requests.start[targets])
        first_target = targets[first] if self.k == 1 else requests.start[targets[first]]
        row = row[first]
        # The n-th last history before the first target's request.
        (history,) = requests.history.nonzero()
        before = requests.before[requests.start[first_target]]
        context = np.minimum(before - requests.before[start[row]], self.n)
        oldest = history[np.minimum(before - context, len(history) - 1)] if len(history) else 0
        begins = np.where(context > 0, oldest, requests.start[first_target])
        return Samples(
            row=row,
            first=begins - start[row],
            first_target=first_target - start[row],
            end=targets[stop - 1] + 1 - start[row],
            targets=stop - first,
        )

    def _whole_requests(self, row: IntArray, request: IntArray) -> tuple[IntArray, IntArray]:
        """[samples] the first target of each and the one after its last, of targets in order.

        Args:
            row, request: [targets] which are its own.
        """
        total = len(row)
        (opens,) = np.diff(request, prepend=-1, append=-1).nonzero()  # ends with `total`
        (row_ends,) = np.diff(row, append=-1).nonzero()
        row_ends += 1
        at = np.concatenate([[0], row_ends[:-1]]) if total else np.empty(0, dtype=np.int64)
        firsts, stops = [], []
        while len(at):  # one sample of each row at a time
            fit = opens[np.searchsorted(opens, at + self.k, side="right") - 1]
            whole = opens[np.searchsorted(opens, at, side="right")]
            stop = np.minimum(np.maximum(fit, whole), row_ends)
            firsts.append(at)
            stops.append(stop)
            more = stop < row_ends
            at, row_ends = stop[more], row_ends[more]
        if not firsts:
            return at, at
        first, stop = np.concatenate(firsts), np.concatenate(stops)
        order = np.argsort(first)
        return first[order], stop[order]


@dataclass(frozen=True)
class Units:
    """What lies in samples, one after the other; U units.

    Of each sample first its history in time order, then its candidates: targets that stand behind
    the history before their request, without a label token. A target that is its request's first
    history needs no unit beside that.

    Attributes:
        sample: [U]; count: [samples] units of each; candidates: [samples] how many are candidates.
        source: [U] interaction of the block.
        place: [U] how many units of its sample lie before its request; None: all before itself.
        targets: [targets] the unit of each, in time order.
    """

    sample: IntArray
    count: IntArray
    candidates: IntArray | None
    source: IntArray
    place: IntArray | None
    targets: IntArray

    @staticmethod
    def of(samples: Samples, block: SequenceBlock) -> Units:
        start = block.offsets[samples.row]
        count = samples.end - samples.first
        sample = np.arange(len(samples)).repeat(count)
        source = ranges(start + samples.first, count)
        first_target = (start + samples.first_target)[sample]
        if not block.by_request:
            (targets,) = (source >= first_target).nonzero()
            return Units(sample, count, None, source, None, targets)
        requests = block.requests
        request = requests.start[source]
        is_target = source >= first_target
        if block.is_target is not None:
            is_target &= block.is_target[source]
        leads = requests.leads[source]
        # What no target of the sample sees stays away: of the last request's history all but its
        # first, and where its first target has a sample of its own, the request's earlier ones.
        last_request = requests.start[start + samples.end - 1][sample]
        seen = (source < requests.start[first_target]) | (
            (source >= first_target) & ((request < last_request) | (leads & is_target))
        )
        is_history = requests.history[source] & seen
        is_candidate = is_target & ~leads
        (history,), (candidates,) = is_history.nonzero(), is_candidate.nonzero()
        # An interaction's number among units, by what it is one of.
        kept = np.concatenate([history, candidates])
        later = np.arange(len(kept)) >= len(history)
        order = np.lexsort((later, sample[kept]))
        unit = np.empty(len(kept), dtype=np.int64)
        unit[order] = np.arange(len(kept))
        as_history, as_candidate = np.zeros((2, len(source)), dtype=np.int64)
        as_history[history], as_candidate[candidates] = unit[: len(history)], unit[len(history) :]
        targets = np.where(is_candidate, as_candidate, as_history)[is_target]
        before = np.concatenate([[0], np.cumsum(is_history)])
        begins = count.cumsum() - count  # of each sample
        in_sample = np.maximum(request, (start + samples.first)[sample])
        of_request = np.arange(len(source)) - (source - in_sample)
        place = before[of_request] - before[begins[sample]]
        kept = kept[order]
        return Units(
            sample=sample[kept],
            count=np.bincount(sample[kept], minlength=len(samples)),
            candidates=np.bincount(sample[candidates], minlength=len(samples)),
            source=source[kept],
            place=place[kept],
            targets=targets,
        )

    @property
    def labelled(self) -> npt.NDArray[np.bool_]:
        """[U] whether a label token follows: not behind candidates."""
        return labelled_units(self.count, self.candidates)


def labelled_units(count: IntArray, candidates: IntArray | None) -> npt.NDArray[np.bool_]:
    """[units] all but the last `candidates` of each prompt's `count`."""
    total = int(count.sum())
    if candidates is None:
        return np.ones(total, dtype=bool)
    behind = count.cumsum().repeat(count) - np.arange(total)
    return behind > candidates.repeat(count)


def block_words(
    block: SequenceBlock, tokens: ItemTokens, chosen: IntArray | slice = slice(None)
) -> IntArray:
    """[chosen, W] the words of a block's interactions."""
    if not tokens.words:
        total = len(block.item_ids) if isinstance(chosen, slice) else len(chosen)
        return np.empty((total, 0), dtype=np.int64)
    return tokens.word_rows(
        len(block.item_ids[chosen]), lambda name: block.codes(name, tokens.time_zone)[chosen]
    )


def interaction_lengths(block: SequenceBlock, tokens: ItemTokens) -> IntArray:
    """[interactions] tokens of each interaction in a block: all pieces of its text, and a label."""
    return tokens.text_lengths(block.item_ids, block_words(block, tokens)) + 1


def sample_lengths(samples: Samples, block: SequenceBlock, tokens: ItemTokens) -> IntArray:
    """[samples] body tokens of each prompt, profile and prefix included and [SUM] slots not."""
    lengths = interaction_lengths(block, tokens)
    front: IntArray | int = len(tokens.prefix)
    if tokens.profiles is not None:
        assert block.profile is not None, "profiles need the profile column"
        front = front + tokens.profiles.lengths[block.profile[samples.row]]
    if block.by_request:
        units = Units.of(samples, block)
        of_units = lengths[units.source] - ~units.labelled
        body = np.bincount(units.sample, of_units, minlength=len(samples)).astype(np.int64)
        return front + body
    ends = np.concatenate([[0], np.cumsum(lengths)])
    start = block.offsets[samples.row]
    return front + ends[start + samples.end] - ends[start + samples.first]


def ranges(starts: np.ndarray, lengths: np.ndarray) -> IntArray:
    """start, start + 1, …, start + length - 1 of each range, end to end."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(starts - (ends - lengths), lengths)
