"""The prompt's text: prefix, interactions, label words and time gaps, from item columns."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass

from dti_dist.config import TemplateConfig
from dti_dist.errors import UserError, nearest

# Upper bounds in seconds, each with the words for a gap below it.
TIME_GAPS: tuple[tuple[int, str], ...] = (
    (60 * 60, ""),  # the same sitting needs no word
    (24 * 60 * 60, "\n(hours later)"),
    (7 * 24 * 60 * 60, "\n(days later)"),
    (30 * 24 * 60 * 60, "\n(weeks later)"),
    (365 * 24 * 60 * 60, "\n(months later)"),
)
LONGEST_TIME_GAP = "\n(years later)"  # for all that is longer


@dataclass(frozen=True)
class Template:
    """A template whose columns are known to exist."""

    config: TemplateConfig
    columns: tuple[str, ...]

    @staticmethod
    def alone(config: TemplateConfig) -> Template:
        """The template of items that have whatever columns it names."""
        columns = _columns(config)
        for name in columns:
            if "." in name or "[" in name:
                raise _not_a_format(config.item, ValueError(f"{name!r} is more than a column"))
        return Template(config, columns)

    @staticmethod
    def for_items(config: TemplateConfig, item_text_columns: Sequence[str]) -> Template:
        """Raises UserError when the item template is not a format string of the items' columns."""
        fields = _columns(config)
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
        template = Template(config, fields)
        try:
            template.item_text(dict.fromkeys(fields, ""))
        except (ValueError, LookupError, AttributeError) as error:  # such as {title:d}
            raise _not_a_format(config.item, error) from error
        return template

    def item_text(self, row: dict[str, str]) -> str:
        return self.config.item.format_map(row)

    def gap_words(self) -> list[str]:
        """One text per gap bucket, shortest gap first; empty without time gaps."""
        if not self.config.time_gaps:
            return []
        return [words for _, words in TIME_GAPS] + [LONGEST_TIME_GAP]


def _columns(config: TemplateConfig) -> tuple[str, ...]:
    try:
        pieces = list(string.Formatter().parse(config.item))
    except ValueError as error:
        raise _not_a_format(config.item, error) from error
    return tuple(dict.fromkeys(name for _, name, _, _ in pieces if name is not None))


def _not_a_format(item: str, error: Exception) -> UserError:
    return UserError(
        f"template.item {item!r} is not a format string of item columns: {error}. "
        "Write columns in braces, as in '{title}:', and a brace itself twice."
    )
