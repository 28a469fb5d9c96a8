"""Tokenizers: from the model, from a GGUF file, or trained on the item text; with [SUM] added."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from dti_dist.data.dataset import Dataset
from dti_dist.data.item_vocabulary import Hashes, ItemVocabulary
from dti_dist.data.template import Template

SUM_TOKEN = "[SUM]"
ITEM_TOKEN = "[ITEM]"  # an item whose vector is not known


def train_tokenizer(dataset: Dataset, template: Template, vocab_size: int) -> Any:
    """A byte-level BPE tokenizer of the item texts, with the label words as single tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(template.config.label_words) - 1,
        special_tokens=["<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(dataset, template), trainer)
    # Whole words only: " No" must not be cut out of " Nova".
    tokenizer.add_tokens(
        [
            AddedToken(word, single_word=True, normalized=False)
            for word in template.config.label_words
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")


def add_sum_token(tokenizer: Any) -> int:
    """Add [SUM] where it is missing and return its id."""
    if SUM_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [SUM_TOKEN]})
    return int(tokenizer.convert_tokens_to_ids(SUM_TOKEN))


def add_item_token(tokenizer: Any) -> None:
    """Add [ITEM] where it is missing."""
    tokenizer.add_tokens([ITEM_TOKEN], special_tokens=True)


def vocabulary_of(tokenizer: Any) -> int:
    """Embedding rows that a tokenizer needs."""
    return max(tokenizer.get_vocab().values()) + 1


def item_vocabulary(tokenizer: Any, hashes: Hashes) -> ItemVocabulary:
    """That of a tokenizer with [ITEM]: ids of items follow those of its tokens."""
    unknown = int(tokenizer.convert_tokens_to_ids(ITEM_TOKEN))
    return ItemVocabulary(unknown, vocabulary_of(tokenizer), hashes)


def pieces(tokenizer: Any, ids: Sequence[int], behind: int) -> tuple[str, ...]:
    """The text of each token; tokens that make a character only together have one piece together.

    Joined, the pieces are the text of all the tokens.

    Args:
        behind: a token that lies before them, for some decoders drop a space that begins a text.
    """

    def decoded(end: int) -> str:
        return str(tokenizer.decode([behind, *ids[:end]], clean_up_tokenization_spaces=False))

    found, known = [], decoded(0)
    for end in range(1, len(ids) + 1):
        text = decoded(end)
        whole = len(text) > len(known) and not text.endswith("\ufffd")
        if whole or end == len(ids):
            found.append(text[len(known) :])
            known = text
    return tuple(found)


def _texts(dataset: Dataset, template: Template) -> Iterator[str]:
    yield from (words for words in template.gap_words() if words)
    if template.config.prefix:
        yield template.config.prefix
    rows: Iterable[dict[str, str]] = (
        row
        for batch in dataset.items_table().select(list(template.columns)).to_batches(8192)
        for row in batch.to_pylist()
    )
    for piece in template.event_pieces:
        yield from map(piece.text, piece.rows())
    yield from (piece.text(row) for row in rows for piece in template.item_pieces)
    if template.config.profile:
        table = dataset.profiles_table().select(list(template.profile_columns))
        for batch in table.to_batches(8192):
            values = map(template.profile_values, batch.to_pylist())
            yield from map(template.config.profile.format_map, values)
