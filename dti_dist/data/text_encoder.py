"""Texts to token ids, where a text is only text: it can't make the tokenizer's control tokens."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

from dti_dist.data.template import Piece, Template, with_literals


class TextEncoder:
    """Tokenises texts of items and interactions under a template.

    A control token is [SUM], a special token, or another added one (such as Qwen's ``<think>``)
    that is neither a label word nor of letters, digits and spaces alone. A title that spells one
    gets the tokens of its characters. The template's own words make control tokens as they always
    do, and so does its prefix, which is not encoded here. All other texts get the ids that the
    tokenizer gives them.

    Args:
        tokenizer: of transformers, with a fast backend.
        sum_id: token id of [SUM].
    """

    def __init__(self, tokenizer: Any, template: Template, sum_id: int):
        backend = tokenizer.backend_tokenizer
        names = _control_tokens(backend, template.config.label_words, sum_id)
        # The same tokenizer, but for control tokens' names, which no text can know.
        hidden = {name: secrets.token_hex(16) for name in names}
        self._encode = _renamed(backend, hidden).encode_batch_fast
        hide = _replacing(hidden)
        self._formats = {
            piece.format: with_literals(piece.format, hide) for piece in template.pieces
        }

    def text(self, piece: Piece, row: Mapping[str, str]) -> str:
        """A piece's text, for `encode`: the template's control tokens have other names in it."""
        return self._formats[piece.format].format_map(row)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text that `text` gave."""
        return [found.ids for found in self._encode(list(texts), add_special_tokens=False)]


def _control_tokens(backend: Tokenizer, label_words: tuple[str, str], sum_id: int) -> list[str]:
    added = [
        token.content
        for token in backend.get_added_tokens_decoder().values()
        if token.special or not (token.content in label_words or _is_words(token.content))
    ]
    sum_token = backend.id_to_token(sum_id)
    return list(dict.fromkeys(added if sum_token is None else [*added, sum_token]))


def _is_words(content: str) -> bool:
    return all(character.isalnum() or character.isspace() for character in content)


def _renamed(backend: Tokenizer, names: Mapping[str, str]) -> Tokenizer:
    """A tokenizer whose tokens have other names, and the same ids."""

    def renamed(name: str) -> str:
        return names.get(name, name)

    whole = json.loads(backend.to_str())
    # Added tokens stay in their places: ids are counted by them.
    for token in whole["added_tokens"]:
        token["content"] = renamed(token["content"])
    model = whole["model"]
    if isinstance(model["vocab"], list):  # Unigram
        model["vocab"] = [[renamed(name), score] for name, score in model["vocab"]]
    else:
        model["vocab"] = {renamed(name): number for name, number in model["vocab"].items()}
    if model.get("unk_token") is not None:
        model["unk_token"] = renamed(model["unk_token"])
    if "merges" in model:
        model["merges"] = [
            pair for pair in model["merges"] if not {*pair, "".join(pair)} & names.keys()
        ]
    # They don't change ids, and name tokens.
    whole.update(truncation=None, padding=None, post_processor=None, decoder=None)
    return Tokenizer.from_str(json.dumps(whole))


def _replacing(names: Mapping[str, str]) -> Callable[[str], str]:
    """The longest name is found first, as tokenizers do."""
    longest_first = sorted(names, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
    return lambda text: pattern.sub(lambda found: names[found[0]], text)
