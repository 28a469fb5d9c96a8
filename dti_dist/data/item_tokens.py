"""Item text tokenised once per tokenizer and template, then read through a memory map."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dti_dist.console import progress, say
from dti_dist.data import array_folder
from dti_dist.data.dataset import Dataset
from dti_dist.data.template import Template
from dti_dist.data.text_encoder import TextEncoder
from dti_dist.errors import UserError

_BATCH = 8192  # items tokenised in one call: enough for the tokenizer's own threads
_RULE = "texts make no control tokens"  # tokens of before were made by another


@dataclass(frozen=True)
class ItemTokens:
    """Token ids of each item's text, and of the template's fixed pieces.

    Attributes:
        tokens: [total] int32, all items' tokens end to end.
        offsets: [items + 1] int64; item i is tokens[offsets[i] : offsets[i + 1]].
        label_ids: token ids of label 0 and label 1.
        prefix: [P] int32, the prompt's prefix.
        gaps: token ids of each time-gap bucket; empty without time gaps.
        sum_id: token id of [SUM].
        fingerprint: changes with items, template or tokenizer.
    """

    tokens: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    label_ids: tuple[int, int]
    prefix: npt.NDArray[np.int32]
    gaps: tuple[npt.NDArray[np.int32], ...]
    sum_id: int
    fingerprint: str

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        offsets = np.asarray(self.offsets)
        return offsets[1:] - offsets[:-1]

    @cached_property
    def gap_lengths(self) -> npt.NDArray[np.int64]:
        """[gap buckets] tokens of each bucket's words."""
        return np.array([len(gap) for gap in self.gaps], dtype=np.int64)

    @property
    def longest_interaction(self) -> int:
        """Tokens of the longest interaction: gap words, item text and label."""
        return int(self.gap_lengths.max(initial=0)) + int(self.lengths.max()) + 1


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
    parts = [
        json.dumps(files, sort_keys=True),
        template.config.model_dump_json(),
        tokenizer.backend_tokenizer.to_str(),
        str(sum_id),
        _RULE,
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def load_or_build(
    dataset: Dataset, template: Template, tokenizer: Any, sum_id: int, cache_dir: Path
) -> ItemTokens:
    """Open the cached item tokens, or tokenise the items and cache them.

    Safe when several processes build at once: each writes a folder of its own and the first
    rename wins.
    """
    mark = fingerprint(dataset, template, tokenizer, sum_id)
    folder = cache_dir / f"item-tokens-{mark}"
    label_ids = label_token_ids(tokenizer, template.config.label_words)
    if array_folder.load(folder) is None:
        encoder = TextEncoder(tokenizer, template, sum_id)
        array_folder.save(folder, _tokenise(dataset, template, encoder))
    tokens, offsets = _open(folder)
    return ItemTokens(
        tokens=tokens,
        offsets=offsets,
        label_ids=label_ids,
        prefix=np.asarray(encode(tokenizer, template.config.prefix), dtype=np.int32),
        gaps=tuple(
            np.asarray(encode(tokenizer, words), dtype=np.int32) for words in template.gap_words()
        ),
        sum_id=sum_id,
        fingerprint=mark,
    )


def _open(folder: Path) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    stored = array_folder.load(folder)
    assert stored is not None, f"{folder} was removed while it was in use"
    return stored[0]["tokens"], stored[0]["offsets"]


def _tokenise(dataset: Dataset, template: Template, encoder: TextEncoder) -> dict[str, np.ndarray]:
    table = dataset.items_table().select(["source_id", *template.columns])
    limit = template.config.max_item_tokens
    tokens: list[npt.NDArray[np.int32]] = []
    lengths: list[npt.NDArray[np.int64]] = []
    cut = 0
    with progress("tokenising items", table.num_rows, "items") as bar:
        for batch in table.to_batches(max_chunksize=_BATCH):
            rows = batch.to_pylist()
            encoded = encoder.encode([encoder.text(item) for item in rows])
            full = np.array([len(ids) for ids in encoded])
            if not full.all():
                item = rows[int(np.argmin(full))]
                raise UserError(
                    f"Item {item['source_id']!r} has no tokens under template.item "
                    f"{template.config.item!r}. Give the item a text, or the template a word."
                )
            cut += int((full > limit).sum())
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
