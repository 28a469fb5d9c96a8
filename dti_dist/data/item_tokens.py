"""Texts of interactions tokenised piece by piece, once; items read through a memory map."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dti_dist.console import progress, say
from dti_dist.data import array_folder
from dti_dist.data.dataset import Dataset
from dti_dist.data.item_vocabulary import ItemVocabulary
from dti_dist.data.profiles import ProfileTokens, load_profiles
from dti_dist.data.template import GAP, MOMENTS, Template
from dti_dist.data.text_encoder import TextEncoder
from dti_dist.errors import UserError

_BATCH = 8192  # items tokenised in one call: enough for the tokenizer's own threads
_OF_PROFILES = {"profile", "max_profile_tokens", "missing"}  # settings that items don't depend on
_RULE = "texts make no control tokens"  # tokens of before were made by another
_MOST_NUMBERS = 1 << 40  # of texts: room for a pack's number beside them

Numbers = npt.NDArray[np.integer]


@dataclass(frozen=True)
class Words:
    """A piece of an interaction's text that is one of a few texts.

    Attributes:
        field: what picks the text: a field of the template, or GAP.
        texts: token ids of each.
    """

    field: str
    texts: tuple[npt.NDArray[np.int32], ...]


@dataclass(frozen=True)
class ItemTokens:
    """Token ids of the pieces of interactions, and of the template's fixed parts.

    An interaction's text has J pieces of its item and W pieces of words, in an order that is the
    same for all interactions. All words are rows of one table, those of the first piece first.

    Attributes:
        tokens: [total] int32, all items' tokens end to end.
        offsets: [items * J + 1] int64; tokens[offsets[p] : offsets[p + 1]] is piece p % J of item
            p // J.
        label_ids: token ids of label 0 and label 1.
        prefix: [P] int32, the prompt's prefix.
        words: [W] pieces; where there are words for time gaps, they are the first.
        of_item: [J + W] whether each piece of an interaction is its item's.
        sum_id: token id of [SUM].
        fingerprint: changes with items, profiles, template or tokenizer.
        time_zone: in which hours and weekdays are told.
        profiles: of users; None where the template has no profile.
        vocabulary: of items whose token is the last of their text; None where none has one.
    """

    tokens: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    label_ids: tuple[int, int]
    prefix: npt.NDArray[np.int32]
    words: tuple[Words, ...]
    of_item: tuple[bool, ...]
    sum_id: int
    fingerprint: str
    time_zone: str = "UTC"
    profiles: ProfileTokens | None = None
    vocabulary: ItemVocabulary | None = None

    @cached_property
    def item_pieces(self) -> int:
        """J."""
        return sum(self.of_item)

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """[items] tokens of all pieces of each."""
        offsets = np.asarray(self.offsets)[:: self.item_pieces]
        return offsets[1:] - offsets[:-1]

    @cached_property
    def word_tokens(self) -> npt.NDArray[np.int32]:
        """All words end to end."""
        none = np.empty(0, dtype=np.int32)
        return np.concatenate([none, *(text for words in self.words for text in words.texts)])

    @cached_property
    def word_lengths(self) -> npt.NDArray[np.int64]:
        """[rows of words]"""
        lengths = [len(text) for words in self.words for text in words.texts]
        return np.array(lengths, dtype=np.int64)

    @cached_property
    def word_offsets(self) -> npt.NDArray[np.int64]:
        """[rows of words] where each begins in `word_tokens`."""
        return self.word_lengths.cumsum() - self.word_lengths

    @cached_property
    def first_word(self) -> npt.NDArray[np.int64]:
        """[W] the row of each piece's first text."""
        sizes = np.array([len(words.texts) for words in self.words], dtype=np.int64)
        return sizes.cumsum() - sizes

    @cached_property
    def has_gaps(self) -> bool:
        return any(words.field == GAP for words in self.words)

    @cached_property
    def needs_times(self) -> bool:
        """Whether a text depends on when its interaction was."""
        return self.has_gaps or self.has_moments

    @cached_property
    def has_moments(self) -> bool:
        return any(words.field in MOMENTS for words in self.words)

    @cached_property
    def longest_words(self) -> int:
        """Most tokens of an interaction's words."""
        return sum(max(map(len, words.texts)) for words in self.words)

    @property
    def longest_interaction(self) -> int:
        """Tokens of the longest interaction: words, item text and label."""
        return self.longest_words + int(self.lengths.max()) + 1

    def word_rows(self, count: int, codes: Callable[[str], Numbers | int]) -> npt.NDArray[np.int64]:
        """[count, W] the words of some interactions.

        Args:
            codes: [count] by a piece's field, which of its texts each interaction has; a number
                where all have the same.
        """
        rows = np.empty((count, len(self.words)), dtype=np.int64)
        for piece, words in enumerate(self.words):
            rows[:, piece] = codes(words.field)
        return rows + self.first_word

    def text_lengths(self, items: Numbers, words: Numbers) -> npt.NDArray[np.int64]:
        """[I] tokens of the texts of interactions with items [I] and words [I, W]."""
        lengths: npt.NDArray[np.int64] = self.lengths[items]
        return lengths + self.word_lengths[words].sum(axis=1) if self.words else lengths

    def text_numbers(self, items: Numbers, words: Numbers) -> tuple[npt.NDArray[np.int64], int]:
        """[I] equal numbers mean texts that are equal in all pieces; and what they are below."""
        numbers, below = np.zeros(len(items), dtype=np.int64), 1
        kinds = [*(len(piece.texts) for piece in self.words), len(self.lengths)]
        for values, most in zip([*(words - self.first_word).T, items], kinds, strict=True):
            if below * most > _MOST_NUMBERS:
                found, numbers = np.unique(numbers, return_inverse=True)
                below = len(found)
            numbers, below = numbers * most + values, below * most
        return numbers, below


def encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def label_token_ids(tokenizer: Any, label_words: tuple[str, str]) -> tuple[int, int]:
    """Ids of the label words. Raises UserError unless each is one token and they differ."""
    ids = []
    for label, word in enumerate(label_words):
        tokens = encode(tokenizer, word)
        if len(tokens) != 1:
            pieces = tokenizer.convert_ids_to_tokens(tokens)
            raise UserError(
                f"template.label_words: {word!r} (label {label}) must be a single token of this "
                f"tokenizer, found {len(tokens)}: {pieces}. Choose words that are single tokens; "
                "a leading space often matters, as in ' Yes'."
            )
        ids.append(tokens[0])
    if ids[0] == ids[1]:
        raise UserError(f"template.label_words must differ, found {label_words!r}.")
    return ids[0], ids[1]


def fingerprint(dataset: Dataset, template: Template, tokenizer: Any, sum_id: int) -> str:
    files = {
        path: entry.sha256
        for path, entry in dataset.manifest.files.items()
        if path.startswith("items/")
    }
    of_events = template.event_pieces
    parts = [
        json.dumps(files, sort_keys=True),
        template.config.model_dump_json(
            exclude=_OF_PROFILES | (set() if of_events else {"time_zone"})
        ),
        tokenizer.backend_tokenizer.to_str(),
        str(sum_id),
        _RULE,
    ]
    if of_events:
        parts.append(json.dumps([(piece.field, piece.values) for piece in of_events]))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def load_or_build(
    dataset: Dataset,
    template: Template,
    tokenizer: Any,
    sum_id: int,
    cache_dir: Path,
    vocabulary: ItemVocabulary | None = None,
) -> ItemTokens:
    """Open the cached item tokens, or tokenise the items and cache them.

    Safe when several processes build at once: each writes a folder of its own and the first
    rename wins.

    Args:
        vocabulary: of items, whose tokens follow their texts.
    """
    mark = fingerprint(dataset, template, tokenizer, sum_id)
    if vocabulary is not None:
        mark += f"-{vocabulary.fingerprint}"
    folder = cache_dir / f"item-tokens-{mark}"
    label_ids = label_token_ids(tokenizer, template.config.label_words)
    if array_folder.load(folder) is None:
        encoder = TextEncoder(tokenizer, template, sum_id)
        arrays = _tokenise(dataset, template, encoder)
        if vocabulary is not None:
            ids = dataset.items_table()["source_id"].to_pylist()
            arrays = _with_items(arrays, vocabulary.tokens_of(ids))
        if template.event_pieces:
            arrays |= _flat(event_words(template, encoder))
        array_folder.save(folder, arrays)
    stored = array_folder.load(folder)
    assert stored is not None, f"{folder} was removed while it was in use"
    arrays, _ = stored
    profiles = load_profiles(dataset, template, tokenizer, sum_id, cache_dir)
    return ItemTokens(
        tokens=arrays["tokens"],
        offsets=arrays["offsets"],
        label_ids=label_ids,
        prefix=np.asarray(encode(tokenizer, template.config.prefix), dtype=np.int32),
        words=(*gap_words(template, tokenizer), *_as_words(template, arrays)),
        of_item=order_of_pieces(template),
        sum_id=sum_id,
        fingerprint=mark if profiles is None else f"{mark}-{profiles.fingerprint}",
        time_zone=template.config.time_zone,
        profiles=profiles,
        vocabulary=vocabulary,
    )


def _with_items(
    arrays: dict[str, np.ndarray], of_items: npt.NDArray[np.int32]
) -> dict[str, np.ndarray]:
    """A token more behind the last piece of each item."""
    tokens, offsets = arrays["tokens"], arrays["offsets"]
    pieces = (len(offsets) - 1) // len(of_items)
    more = (np.arange(len(offsets)) // pieces).clip(max=len(of_items))
    return {
        "tokens": np.insert(tokens, offsets[pieces::pieces], of_items),
        "offsets": offsets + more,
    }


def order_of_pieces(template: Template) -> tuple[bool, ...]:
    """Whether each piece of an interaction is its item's; words for time gaps come first."""
    gaps = [False] * template.config.time_gaps
    return (*gaps, *(piece.field is None for piece in template.pieces))


def gap_words(template: Template, tokenizer: Any) -> tuple[Words, ...]:
    """The piece of time gaps, where there is one."""
    texts = [np.array(encode(tokenizer, words), dtype=np.int32) for words in template.gap_words()]
    return (Words(GAP, tuple(texts)),) if texts else ()


def event_words(template: Template, encoder: TextEncoder) -> tuple[Words, ...]:
    """The pieces that a field of the interaction picks, long texts cut as those of items."""
    limit = template.config.max_item_tokens
    return tuple(
        Words(
            str(piece.field),
            tuple(
                np.array(ids[:limit], dtype=np.int32)
                for ids in encoder.encode([encoder.text(piece, row) for row in piece.rows()])
            ),
        )
        for piece in template.event_pieces
    )


def _flat(pieces: tuple[Words, ...]) -> dict[str, np.ndarray]:
    texts = [text for words in pieces for text in words.texts]
    ends = np.cumsum([0, *map(len, texts)], dtype=np.int64)
    return {"word_tokens": np.concatenate(texts), "word_offsets": ends}


def _as_words(template: Template, arrays: Mapping[str, np.ndarray]) -> Iterator[Words]:
    """What `_flat` has made arrays."""
    if not template.event_pieces:
        return
    tokens, offsets = np.asarray(arrays["word_tokens"]), arrays["word_offsets"]
    texts = iter(np.split(tokens, offsets[1:-1]))
    for piece in template.event_pieces:
        yield Words(str(piece.field), tuple(islice(texts, len(piece.values))))


def _tokenise(dataset: Dataset, template: Template, encoder: TextEncoder) -> dict[str, np.ndarray]:
    table = dataset.items_table().select(["source_id", *template.columns])
    pieces, limit = template.item_pieces, template.config.max_item_tokens
    tokens: list[npt.NDArray[np.int32]] = []
    lengths: list[npt.NDArray[np.int64]] = []
    cut = 0
    with progress("tokenising items", table.num_rows, "items") as bar:
        for batch in table.to_batches(max_chunksize=_BATCH):
            rows = batch.to_pylist()
            texts = [encoder.text(piece, item) for item in rows for piece in pieces]
            encoded = encoder.encode(texts)
            full = np.array([len(ids) for ids in encoded])
            of_items = full.reshape(-1, len(pieces))
            if not of_items.any(axis=1).all():
                item = rows[int(np.argmin(of_items.any(axis=1)))]
                raise UserError(
                    f"Item {item['source_id']!r} has no tokens under template.item "
                    f"{template.config.item!r}. Give the item a text, or the template a word."
                )
            cut += int((of_items > limit).any(axis=1).sum())
            lengths.append(np.minimum(full, limit))
            tokens.append(
                np.fromiter(chain.from_iterable(ids[:limit] for ids in encoded), dtype=np.int32)
            )
            bar.advance(len(rows))
    if cut:
        say(
            f"{cut:,} of {table.num_rows:,} item texts were cut at template.max_item_tokens = "
            f"{limit} tokens."
        )
    offsets = np.cumsum(np.concatenate([[0], *lengths]))
    return {"tokens": np.concatenate(tokens), "offsets": offsets}
