"""The prompt's text: prefix, interactions, label words and time gaps, from item columns."""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from dti_dist.config import TemplateConfig
from dti_dist.data.dataset import EventField
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

GAP = ""  # what picks the words for a time gap; no field of a template has this name

# Fields that an interaction's time gives, and their values.
MOMENTS: dict[str, tuple[str, ...]] = {
    "hour": tuple(f"{hour:02}" for hour in range(24)),
    "weekday": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
}


@dataclass(frozen=True)
class Piece:
    """A part of an interaction's text that is tokenised by itself.

    Attributes:
        format: a format string.
        field: what of the interaction picks one of `values`; None: the item fills the format.
        values: of the field.
    """

    format: str
    field: str | None = None
    values: tuple[str, ...] = ()

    def text(self, row: Mapping[str, str]) -> str:
        return self.format.format_map(row)

    def rows(self) -> list[dict[str, str]]:
        """What `text` takes for each value."""
        assert self.field is not None
        return [{self.field: value} for value in self.values]


@dataclass(frozen=True)
class Template:
    """A template whose fields are known to exist.

    A piece ends with a field: a literal belongs to the field behind it, the last literal to the
    last field. Fields of the item that follow each other are in one piece.

    Attributes:
        columns: of items.
        pieces: of an interaction's text, in order; without the words for a time gap before them.
        profile_columns: of users.
        borders: of fields that are numbers: between the classes that `pieces` show.
    """

    config: TemplateConfig
    columns: tuple[str, ...]
    pieces: tuple[Piece, ...]
    profile_columns: tuple[str, ...] = ()
    borders: Mapping[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)

    @staticmethod
    def alone(
        config: TemplateConfig,
        of_events: Mapping[str, Sequence[str]] | None = None,
        borders: Mapping[str, tuple[float, ...]] | None = None,
    ) -> Template:
        """The template of items that have whatever columns it names.

        Args:
            of_events: fields that are not the item's but the interaction's, and their values.
            borders: of those that are numbers.
        """
        of_events = of_events or {}
        columns = tuple(name for name in _fields(config) if name not in of_events)
        for name in columns:
            if "." in name or "[" in name:
                raise _not_a_format(config.item, ValueError(f"{name!r} is more than a column"))
        pieces = _pieces(config, of_events)
        return Template(config, columns, pieces, _profile_columns(config), borders or {})

    @staticmethod
    def for_items(
        config: TemplateConfig,
        item_text_columns: Sequence[str],
        user_text_columns: Sequence[str] = (),
        event_columns: Sequence[EventField] = (),
    ) -> Template:
        """An item's column goes before a field of the interaction that has the same name.

        Args:
            event_columns: of the events.

        Raises UserError when the item template is not a format string of these, or that of the
        profile not one of the users' columns.
        """
        of_events: dict[str, Sequence[str]] = dict(MOMENTS)
        of_events |= {column.name: (config.missing, *column.values) for column in event_columns}
        of_events = {k: v for k, v in of_events.items() if k not in item_text_columns}
        fields = _fields(config)
        borders = {
            column.name: column.borders
            for column in event_columns
            if column.borders and column.name in fields and column.name in of_events
        }
        columns = tuple(name for name in fields if name not in of_events)
        profile_columns = _profile_columns(config, user_text_columns)
        if not columns:
            raise UserError(
                f"template.item {config.item!r} names no item column, so all items would read "
                f"alike. Use at least one of: {', '.join(item_text_columns)}."
            )
        for field in columns:
            if field not in item_text_columns:
                raise UserError(
                    f"template.item names the column {field!r}, which the items don't have."
                    f"{nearest(field, [*item_text_columns, *of_events])} "
                    f"Item text columns: {', '.join(item_text_columns)}."
                    + (
                        f" Event columns: {', '.join(column.name for column in event_columns)}."
                        if event_columns
                        else ""
                    )
                )
        try:
            pieces = _pieces(config, of_events)
            template = Template(config, columns, pieces, profile_columns, borders)
            for piece in template.pieces:
                piece.text(dict.fromkeys(fields, ""))
        except (ValueError, LookupError, AttributeError) as error:  # such as {title:d}
            raise _not_a_format(config.item, error) from error
        return template

    @property
    def item_pieces(self) -> tuple[Piece, ...]:
        return tuple(piece for piece in self.pieces if piece.field is None)

    @property
    def event_pieces(self) -> tuple[Piece, ...]:
        return tuple(piece for piece in self.pieces if piece.field is not None)

    def profile_values(self, row: Mapping[str, str | None]) -> dict[str, str]:
        """What the profile's format takes of a user, with a text for what is not known."""
        values = {name: row.get(name) or "" for name in self.profile_columns}
        return {
            name: value if value.strip() else self.config.missing for name, value in values.items()
        }

    def gap_words(self) -> list[str]:
        """One text per gap bucket, shortest gap first; empty without time gaps."""
        if not self.config.time_gaps:
            return []
        return [words for _, words in TIME_GAPS] + [LONGEST_TIME_GAP]


def with_literals(item: str, change: Callable[[str], str]) -> str:
    """A format string with its words changed, and its fields as they are."""
    return "".join(
        change(literal).replace("{", "{{").replace("}", "}}") + field
        for literal, _, field in _parsed(item)
    )


def _parsed(item: str) -> list[tuple[str, str | None, str]]:
    """Each literal, the name of the field behind it, and that field as it is written."""
    found = []
    for literal, name, spec, conversion in string.Formatter().parse(item):
        how = f"!{conversion}" if conversion else ""
        # An empty spec is as none.
        found.append((literal, name, "" if name is None else f"{{{name}{how}:{spec}}}"))
    return found


def _fields(config: TemplateConfig) -> tuple[str, ...]:
    try:
        return _names(config.item)
    except ValueError as error:
        raise _not_a_format(config.item, error) from error


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for _, name, _ in _parsed(text) if name is not None))


def _pieces(config: TemplateConfig, of_events: Mapping[str, Sequence[str]]) -> tuple[Piece, ...]:
    pieces: list[Piece] = []
    text = ""
    for literal, name, written in _parsed(config.item):
        text += literal.replace("{", "{{").replace("}", "}}") + written
        if name is None:  # before a brace that is one, or at the end
            continue
        if name in of_events:
            pieces.append(Piece(text, name, tuple(of_events[name])))
        elif pieces and pieces[-1].field is None:
            pieces.append(Piece(pieces.pop().format + text))
        else:
            pieces.append(Piece(text))
        text = ""
    if pieces:
        pieces[-1] = replace(pieces[-1], format=pieces[-1].format + text)
    return tuple(pieces)


def _profile_columns(
    config: TemplateConfig, user_text_columns: Sequence[str] | None = None
) -> tuple[str, ...]:
    """Columns that the profile names; of those given, where some are given."""
    if config.profile is None:
        return ()
    try:
        fields = _names(config.profile)
        config.profile.format_map(dict.fromkeys(fields, ""))
    except (ValueError, LookupError, AttributeError) as error:  # such as {age:d}
        raise UserError(
            f"template.profile {config.profile!r} is not a format string of user text columns: "
            f"{error}. Write columns in braces, as in '{{age}} {{gender}}', and a brace itself "
            "twice."
        ) from error
    known = fields if user_text_columns is None else user_text_columns
    if not fields:
        raise UserError(
            f"template.profile {config.profile!r} names no user text column, so all users would "
            "read alike. Text that is the same for all belongs in template.prefix."
        )
    for field in fields:
        if field not in known:
            has = (
                f"User text columns: {', '.join(known)}."
                if known
                else "It has none: prepare it with some (events --users TABLE --user-text-cols, "
                "movielens), or leave template.profile out."
            )
            raise UserError(
                f"template.profile names the column {field!r}, which the users of the data set "
                f"don't have.{nearest(field, known)} {has}"
            )
    return fields


def _not_a_format(item: str, error: Exception) -> UserError:
    return UserError(
        f"template.item {item!r} is not a format string of item columns: {error}. "
        "Write columns in braces, as in '{title}:', and a brace itself twice."
    )
