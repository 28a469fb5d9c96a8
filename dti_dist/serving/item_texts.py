"""The tokens of items that are scored: a data set's, and others as they come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np

from dti_dist.data.classes import class_codes
from dti_dist.data.dataset import EventField
from dti_dist.data.item_tokens import (
    ItemTokens,
    encode,
    event_words,
    gap_words,
    label_token_ids,
    order_of_pieces,
)
from dti_dist.data.item_vocabulary import ItemVocabulary
from dti_dist.data.samples import IntArray
from dti_dist.data.template import MOMENTS, Template
from dti_dist.data.text_encoder import TextEncoder
from dti_dist.errors import UserError, nearest
from dti_dist.serving.profile_texts import ProfileTexts
from dti_dist.serving.texts import as_id, as_number, as_text

Item = str | Mapping[str, str]

ITEM_ID = "item_id"
"""The key of an item's id in a mapping; read where items have vectors."""


class _Known(NamedTuple):
    """What tells one item from another: the texts of its pieces, and the token of its vector."""

    texts: tuple[str, ...]
    token: int | None = None


class ItemTexts:
    """Rows of item tokens, which grow with each new text.

    Args:
        base: tokens that are known from the start; they keep their rows.
        template, tokenizer: how an item becomes tokens.
        remembered: new texts that are kept by `rows_of`; with one more it forgets them all.
    """

    def __init__(
        self, base: ItemTokens, template: Template, tokenizer: Any, remembered: int = 1_000_000
    ):
        self.template = template
        self._base, self._tokenizer, self._remembered = base, tokenizer, remembered
        self._new: list[list[int]] = []
        self._row_of: dict[_Known, int] = {}
        self._tokens: ItemTokens | None = base
        self.generation = 0
        self.profiles: ProfileTexts | None = None
        if base.profiles is not None or (template and template.config.profile):
            self.profiles = ProfileTexts(base.profiles, template, tokenizer, base.sum_id)

    @staticmethod
    def none_yet(
        template: Template, tokenizer: Any, sum_id: int, vocabulary: ItemVocabulary | None = None
    ) -> ItemTexts:
        """Without a data set's items.

        Args:
            vocabulary: of items that have vectors.

        Raises:
            UserError: a label word is not one token of the tokenizer.
        """
        config = template.config
        encoder = TextEncoder(tokenizer, template, sum_id)
        base = ItemTokens(
            tokens=np.empty(0, dtype=np.int32),
            offsets=np.zeros(1, dtype=np.int64),
            label_ids=label_token_ids(tokenizer, config.label_words),
            prefix=np.array(encode(tokenizer, config.prefix), dtype=np.int32),
            words=(*gap_words(template, tokenizer), *event_words(template, encoder)),
            of_item=order_of_pieces(template),
            sum_id=sum_id,
            fingerprint="",
            time_zone=config.time_zone,
            vocabulary=vocabulary,
        )
        items = ItemTexts(base, template, tokenizer)
        items.__dict__["encoder"] = encoder
        return items

    @cached_property
    def encoder(self) -> TextEncoder:
        """Made when it is first needed; a large vocabulary takes a second."""
        return TextEncoder(self._tokenizer, self.template, self._base.sum_id)

    @property
    def tokens(self) -> ItemTokens:
        """All rows so far, of items and profiles."""
        if self._tokens is None:
            new = np.fromiter(chain.from_iterable(self._new), dtype=np.int32)
            lengths = [len(ids) for ids in self._new]
            self._tokens = replace(
                self._base,
                tokens=np.concatenate([self._base.tokens, new]),
                offsets=np.concatenate(
                    [self._base.offsets, self._base.offsets[-1] + np.cumsum(lengths, dtype=int)]
                ),
            )
        if self.profiles is not None and self._tokens.profiles is not self.profiles.tokens:
            self._tokens = replace(self._tokens, profiles=self.profiles.tokens)
        return self._tokens

    @property
    def longest_interaction(self) -> int:
        """Most tokens that an interaction can have: words, cut texts of an item, its own token, a
        label."""
        limit, own = self.template.config.max_item_tokens, self._base.vocabulary is not None
        return self._base.longest_words + self._base.item_pieces * limit + own + 1

    def rows_of(self, items: Sequence[Item]) -> IntArray:
        """[items] the row of each, by its text, and by its id (ITEM_ID) where items have vectors;
        -1 where it has no text or no tokens.

        `generation` changes when rows of before no longer hold.

        Raises:
            UserError: an item lacks a column of the template, or is not text.
        """
        texts = self._known(items)
        new = [text for text in dict.fromkeys(texts) if text and text not in self._row_of]
        if len(self._row_of) + len(new) > self._remembered and self._row_of:
            self._row_of.clear()
            self._new.clear()
            self.generation += 1
            new = [text for text in dict.fromkeys(texts) if text]
        for text, row in zip(new, self._add(new), strict=True):
            self._row_of[text] = int(row)
        rows = [self._row_of.get(text, -1) if text else -1 for text in texts]
        return np.array(rows, dtype=np.int64)

    def event_codes(self, items: Sequence[Item]) -> tuple[dict[str, IntArray], int]:
        """[items] by event column, the code of each one's value; 0 where it has none, or one that
        the model has not learned. And how many of the latter there are.

        Raises:
            UserError: a value is not text, or of a column of numbers no number.
        """
        found, unseen = {}, 0
        for name, column in self.event_columns.items():
            values = [item.get(name) if isinstance(item, Mapping) else None for item in items]
            places = [f"Item {number}, {name}" for number in range(len(items))]
            if column.borders:
                found[name] = class_codes(list(map(as_number, values, places)), column.borders)
                continue
            texts, codes = list(map(as_text, values, places)), self._codes[name]
            found[name] = np.array([codes.get(text, 0) for text in texts], dtype=np.int64)
            unseen += sum(text not in codes for text in texts if text)
        return found, unseen

    @cached_property
    def event_columns(self) -> dict[str, EventField]:
        """Those that the template names."""
        return {
            name: EventField(
                name=name, values=piece.values[1:], borders=self.template.borders.get(name, ())
            )
            for piece in self.template.event_pieces
            for name in [str(piece.field)]
            if name not in MOMENTS
        }

    @cached_property
    def _codes(self) -> dict[str, dict[str, int]]:
        """By event column, the code of each value."""
        return {
            name: {value: code for code, value in enumerate(column.values, start=1)}
            for name, column in self.event_columns.items()
        }

    def keep(self, items: Sequence[Item]) -> IntArray:
        """New rows that hold for good, one for each item; -1 for one without text.

        Raises:
            UserError: as of `rows_of`.
        """
        rows = self._add(self._known(items))
        self._base, self._new = self.tokens, []
        return rows

    def _add(self, items: Sequence[_Known | None]) -> IntArray:
        if not items:
            return np.empty(0, dtype=np.int64)
        pieces, limit = self._base.item_pieces, self.template.config.max_item_tokens
        texts = chain.from_iterable(item.texts for item in items if item)
        encoded = iter(self.encoder.encode([*texts]))
        of_items = [[*islice(encoded, pieces)] if item else [] for item in items]
        has_tokens = np.array([any(item) for item in of_items])
        first = len(self._base.lengths) + len(self._new) // pieces
        rows = np.where(has_tokens, first + np.cumsum(has_tokens) - 1, -1)
        for item, found in zip(of_items, items, strict=True):
            if any(item):
                self._new += [ids[:limit] for ids in item]
                if found and found.token is not None:
                    self._new[-1] = [*self._new[-1], found.token]
        self._tokens = None
        return rows

    def _known(self, items: Sequence[Item]) -> list[_Known | None]:
        """What tells each item from the others; None for one without text."""
        texts = [self._texts(item, number) for number, item in enumerate(items)]
        vocabulary = self._base.vocabulary
        if vocabulary is None:
            return [_Known(text) if text else None for text in texts]
        ids = [item.get(ITEM_ID) if isinstance(item, Mapping) else None for item in items]
        named = [as_id(name, f"Item {number}, {ITEM_ID}") for number, name in enumerate(ids)]
        tokens = vocabulary.tokens_of(named).tolist()
        return [_Known(text, n) if text else None for text, n in zip(texts, tokens, strict=True)]

    def _texts(self, item: Item, number: int) -> tuple[str, ...]:
        """The template's texts of an item; none where all of its columns are empty."""
        columns = self.template.columns
        if isinstance(item, str):
            if len(columns) > 1:
                raise UserError(
                    f"Item {number}: expected a mapping with the columns {', '.join(columns)}, "
                    f"which template.item names; found the text {item!r:.60}."
                )
            item = {columns[0]: item}
        if not isinstance(item, Mapping):
            raise UserError(
                f"Item {number}: expected a text or a mapping of columns to texts, found "
                f"{type(item).__name__}."
            )
        values = {}
        for column in columns:
            if column not in item:
                raise UserError(
                    f"Item {number}: expected the columns {', '.join(columns)}, which "
                    f"template.item names; {column!r} is missing.{nearest(column, item)}"
                )
            values[column] = as_text(item[column], f"Item {number}, {column}")
        if not any(map(str.strip, values.values())):
            return ()
        return tuple(self.encoder.text(piece, values) for piece in self.template.item_pieces)
