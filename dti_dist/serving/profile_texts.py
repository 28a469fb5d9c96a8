"""The tokens of users' profiles: a data set's, and others as they come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from dti_dist.data.profiles import ProfileEncoder, ProfileTokens
from dti_dist.data.samples import IntArray
from dti_dist.data.template import Template
from dti_dist.errors import UserError, nearest
from dti_dist.serving.texts import as_text

Profile = Mapping[str, str | None]


class ProfileTexts:
    """Rows of profile tokens, which grow with each new profile.

    Args:
        base: of a data set, which keep their rows; None without one.
        template, tokenizer: how a profile becomes tokens.
        remembered: new profiles that are kept; with one more it forgets them all, and `generation`
            changes, for rows of before no longer hold.
    """

    def __init__(
        self,
        base: ProfileTokens | None,
        template: Template,
        tokenizer: Any,
        sum_id: int,
        remembered: int = 1_000_000,
    ):
        self._base = ProfileTokens.of([]) if base is None else base
        self._template, self._tokenizer, self._sum_id = template, tokenizer, sum_id
        self._remembered = remembered
        self._new: list[list[int]] = []
        self._row_of: dict[tuple[str, ...], int] = {}
        self._tokens: ProfileTokens | None = self._base
        self.generation = 0

    @cached_property
    def _encoder(self) -> ProfileEncoder:
        return ProfileEncoder(self._tokenizer, self._template, self._sum_id)

    @property
    def tokens(self) -> ProfileTokens:
        """All rows so far."""
        if self._tokens is None:
            base, new = self._base, ProfileTokens.of(self._new)
            self._tokens = ProfileTokens(
                np.concatenate([base.tokens, new.tokens]),
                np.concatenate([base.offsets, base.offsets[-1] + new.offsets[1:]]),
            )
        return self._tokens

    @property
    def longest(self) -> int:
        """Most tokens that a profile can have."""
        return self._template.config.max_profile_tokens

    def rows_of(self, profiles: Sequence[Profile | None]) -> IntArray:
        """[profiles] the row of each; None is one of which nothing is known.

        Raises:
            UserError: a profile is no mapping, names another column than the template, or holds
                what is no text.
        """
        columns = self._template.profile_columns
        values = [self._values(given, number) for number, given in enumerate(profiles)]
        new = [one for one in dict.fromkeys(values) if one not in self._row_of]
        if len(self._row_of) + len(new) > self._remembered and self._row_of:
            self._row_of.clear()
            self._new.clear()
            self.generation += 1
            new = [*dict.fromkeys(values)]
        if new:
            rows = [dict(zip(columns, one, strict=True)) for one in new]
            first = len(self._base) + len(self._new)
            self._new += self._encoder.encode(rows)[0]
            self._row_of |= {one: first + number for number, one in enumerate(new)}
            self._tokens = None
        return np.array([self._row_of[one] for one in values], dtype=np.int64)

    def _values(self, given: Profile | None, number: int) -> tuple[str, ...]:
        columns = self._template.profile_columns
        if given is None:
            given = {}
        if not isinstance(given, Mapping):
            raise UserError(
                f"Profile of request {number}: expected a mapping with some of the columns "
                f"{', '.join(columns)}, which template.profile names; found "
                f"{type(given).__name__}."
            )
        for name in given:
            if name not in columns:
                raise UserError(
                    f"Profile of request {number}: expected some of the columns "
                    f"{', '.join(columns)}, which template.profile names; found {name!r}."
                    f"{nearest(str(name), columns)}"
                )
        return tuple(
            as_text(given.get(name), f"Profile of request {number}, {name}") for name in columns
        )
