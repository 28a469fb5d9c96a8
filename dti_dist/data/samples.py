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

    A sample's interactions are first … end - 1 of its row; those from first_target on are its
    targets. Interaction positions count from the start of the row.
    """

    row: IntArray
    first: IntArray
    first_target: IntArray
    end: IntArray

    def __len__(self) -> int:
        return len(self.row)

    @property
    def targets(self) -> IntArray:
        return self.end - self.first_target

    def take(self, chosen: IntArray) -> Samples:
        return Samples(
            self.row[chosen], self.first[chosen], self.first_target[chosen], self.end[chosen]
        )


@dataclass(frozen=True)
class SampleSettings:
    """How sequences become prompts.

    Attributes:
        n: context interactions of a prompt, at most.
        k: targets of a prompt, at most.
        min_context: interactions with fewer before them are never targets.
    """

    n: int
    k: int
    min_context: int

    @staticmethod
    def of(sample: SampleConfig) -> SampleSettings:
        return SampleSettings(sample.context, sample.k, sample.min_context)

    def cut(self, block: SequenceBlock) -> Samples:
        """Cut each sequence into prompts of at most k targets with up to n context interactions.

        Every interaction from max(target_start, min_context) on is a target exactly once, whatever
        n and k are, so paradigms are compared on the same targets.
        """
        n, k = self.n, self.k
        lengths = np.diff(block.offsets)
        first = np.maximum(block.target_start, self.min_context)
        count = np.maximum(-(-(lengths - first) // k), 0)
        row = np.repeat(np.arange(len(lengths)), count)
        nth = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
        first_target = first[row] + nth * k
        return Samples(
            row=row,
            first=np.maximum(first_target - n, 0),
            first_target=first_target,
            end=np.minimum(first_target + k, lengths[row]),
        )


def interaction_lengths(block: SequenceBlock, tokens: ItemTokens) -> IntArray:
    """[interactions] tokens of each interaction in a block: gap words, item text, label."""
    lengths = tokens.lengths[block.item_ids] + 1
    if tokens.gaps:
        lengths += tokens.gap_lengths[block.gap_buckets]
    return lengths


def sample_lengths(samples: Samples, block: SequenceBlock, tokens: ItemTokens) -> IntArray:
    """[samples] body tokens of each prompt, prefix included and [SUM] slots not."""
    ends = np.concatenate([[0], np.cumsum(interaction_lengths(block, tokens))])
    start = block.offsets[samples.row]
    return len(tokens.prefix) + ends[start + samples.end] - ends[start + samples.first]
