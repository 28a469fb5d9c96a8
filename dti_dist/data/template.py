"""The prompt's text: prefix, interactions, label words and time gaps, rendered from item columns."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass

from dti_dist.config import TemplateConfig
from dti_dist.errors import UserError, nearest

TIME_GAPS: tuple[tuple[int, str], ...] = (
    (60 * 60, ""),  # the same sitting needs no word
    (24 * 60 * 60, "\n(hours later)"),
    (7 * 24 * 60 * 60, "\n(days later)"),
    (30 * 24 * 60 * 60, "\n(weeks later)"),
    (365 * 24 * 60 * 60, "\n(months later)"),
)
LONGEST_TIME_GAP = "\n(years later)"
"""Upper bounds in seconds with the words for a gap below them; then what is longer than all."""


@dataclass(frozen=True)
class Template:
    """A template whose columns are known to exist."""

    config: TemplateConfig
    columns: tuple[str, ...]

    @staticmethod
    def for_items(config: TemplateConfig, item_text_columns: Sequence[str]) -> Template:
        """Raises UserError when the item template names a column that the items don't have."""
        try:
            fields = [name for _, name, _, _ in string.Formatter().parse(config.item) if name]
        except ValueError as error:
            raise UserError(
                f"template.item {config.item!r} is not a format string: {error}. "
                "Write columns in braces, as in '{title}:'."
            ) from error
        if not fields:
            raise UserError(
                f"template.item {config.item!r} names no item column, so all items would read "
                f"alike. Use at least one of: {', '.join(item_text_columns)}."
            )
        for field in fields:
            if field not in item_text_columns:
                raise UserError(
                    f"template.item names the column {field!r}, which the items don't have."
                    f"{nearest(field, item_text_columns)} "
                    f"Item text columns: {', '.join(item_text_columns)}."
                )
        return Template(config, tuple(dict.fromkeys(fields)))

    def item_text(self, row: dict[str, str]) -> str:
        return self.config.item.format_map(row)

    def gap_words(self) -> list[str]:
        """One text per gap bucket, shortest gap first; empty without time gaps."""
        if not self.config.time_gaps:
            return []
        return [words for _, words in TIME_GAPS] + [LONGEST_TIME_GAP]
