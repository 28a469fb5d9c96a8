"""Tokens that stand for items themselves, beside the tokens of texts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

FILE = "items.npy"
"""The hashes, beside a tokenizer's files."""

Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class ItemVocabulary:
    """The items that have a vector, each with a token id above those of the tokenizer.

    Ids of items are kept as hashes of 64 bits: of 100 million items, two share one with a
    probability of 0.03 %.

    Attributes:
        unknown: token id of [ITEM], which stands for all other items.
        first: token id of the first item.
        hashes: [items] of their source_id.
    """

    unknown: int
    first: int
    hashes: Hashes

    def __len__(self) -> int:
        return len(self.hashes)

    def tokens_of(self, source_ids: Iterable[str]) -> npt.NDArray[np.int32]:
        """The token id of each."""
        wanted = hashed(source_ids)
        if not len(self):
            return np.full(len(wanted), self.unknown, dtype=np.int32)
        order, ordered = self._ordered
        place = np.searchsorted(ordered, wanted).clip(max=len(ordered) - 1)
        tokens = np.where(ordered[place] == wanted, self.first + order[place], self.unknown)
        return tokens.astype(np.int32)

    @cached_property
    def _ordered(self) -> tuple[npt.NDArray[np.int64], Hashes]:
        order = np.argsort(self.hashes, kind="stable")
        return order, self.hashes[order]

    def in_words(self, ids: npt.NDArray[np.integer]) -> npt.NDArray[np.integer]:
        """The same tokens with [ITEM] for each item, which a tokenizer can decode."""
        return np.where(ids >= self.first, self.unknown, ids)

    @property
    def fingerprint(self) -> str:
        content = np.array([self.unknown, self.first], dtype=np.uint64).tobytes()
        return hashlib.sha256(content + self.hashes.tobytes()).hexdigest()[:16]


def hashed(source_ids: Iterable[str]) -> Hashes:
    """[items] 64 bits of each id's hash."""
    digests = b"".join(
        hashlib.blake2b(name.encode(), digest_size=8).digest() for name in source_ids
    )
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


def extended(known: Hashes, source_ids: Iterable[str]) -> Hashes:
    """What is known, in its order, and behind it what is new."""
    found = hashed(source_ids)
    return np.concatenate([known, found[~np.isin(found, known)]])
