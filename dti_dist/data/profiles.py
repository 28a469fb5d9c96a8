"""Profiles, the users' own texts, tokenised once per tokenizer and template."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dti_dist.console import progress, say
from dti_dist.data import array_folder
from dti_dist.data.dataset import Dataset
from dti_dist.data.template import Piece, Template
from dti_dist.data.text_encoder import TextEncoder

_BATCH = 8192  # profiles tokenised in one call


@dataclass(frozen=True)
class ProfileTokens:
    """Token ids of each distinct profile.

    Attributes:
        tokens: [total] int32, all profiles' tokens end to end.
        offsets: [profiles + 1] int64; profile p is tokens[offsets[p] : offsets[p + 1]].
        fingerprint: changes with profiles, template or tokenizer.
    """

    tokens: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    fingerprint: str = ""

    @staticmethod
    def of(encoded: Iterable[Sequence[int]]) -> ProfileTokens:
        """Of these token ids."""
        rows = list(encoded)
        lengths = np.array([len(ids) for ids in rows], dtype=np.int64)
        return ProfileTokens(
            np.fromiter(chain.from_iterable(rows), dtype=np.int32),
            np.concatenate([[0], lengths.cumsum()]),
        )

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        offsets = np.asarray(self.offsets)
        return offsets[1:] - offsets[:-1]

    @property
    def longest(self) -> int:
        """Tokens of the longest profile."""
        return int(self.lengths.max(initial=0))

    def __len__(self) -> int:
        return len(self.offsets) - 1


class ProfileEncoder:
    """Tokenises profiles under a template that has them.

    Args:
        tokenizer: of transformers, with a fast backend.
        sum_id: token id of [SUM].
    """

    def __init__(self, tokenizer: Any, template: Template, sum_id: int):
        self._template, self._limit = template, template.config.max_profile_tokens
        self._piece = Piece(template.config.profile or "")
        self._encoder = TextEncoder(tokenizer, replace(template, pieces=(self._piece,)), sum_id)

    def encode(self, rows: Sequence[Mapping[str, str | None]]) -> tuple[list[list[int]], int]:
        """Token ids of each profile, a mapping of its columns, and how many were cut."""
        known = [self._template.profile_values(row) for row in rows]
        encoded = self._encoder.encode(
            [self._encoder.text(self._piece, values) for values in known]
        )
        cut = sum(len(ids) > self._limit for ids in encoded)
        return [ids[: self._limit] for ids in encoded], cut


def load_profiles(
    dataset: Dataset, template: Template, tokenizer: Any, sum_id: int, cache_dir: Path
) -> ProfileTokens | None:
    """Open the cached tokens of the data set's profiles, or tokenise and cache them.

    None where the template has no profile. Safe when several processes build at once.
    """
    if not template.config.profile:
        return None
    config = template.config
    parts = [
        {
            path: entry.sha256
            for path, entry in dataset.manifest.files.items()
            if path.startswith("profiles/")
        },
        [config.profile, config.missing, config.max_profile_tokens, config.label_words],
        tokenizer.backend_tokenizer.to_str(),
        sum_id,
    ]
    mark = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_dir / f"profile-tokens-{mark}"
    if array_folder.load(folder) is None:
        encoder = ProfileEncoder(tokenizer, template, sum_id)
        found = _tokenise(dataset, template, encoder)
        array_folder.save(folder, {"tokens": found.tokens, "offsets": found.offsets})
    stored = array_folder.load(folder)
    assert stored is not None, f"{folder} was removed while it was in use"
    return ProfileTokens(stored[0]["tokens"], stored[0]["offsets"], mark)


def _tokenise(dataset: Dataset, template: Template, encoder: ProfileEncoder) -> ProfileTokens:
    table = dataset.profiles_table().select(list(template.profile_columns))
    encoded: list[list[int]] = []
    cut = 0
    with progress("tokenising profiles", table.num_rows, "profiles") as bar:
        for batch in table.to_batches(max_chunksize=_BATCH):
            ids, longer = encoder.encode(batch.to_pylist())
            encoded += ids
            cut += longer
            bar.advance(len(ids))
    if cut:
        say(
            f"{cut:,} of {table.num_rows:,} profiles were cut at template.max_profile_tokens = "
            f"{template.config.max_profile_tokens} tokens."
        )
    return ProfileTokens.of(encoded)
