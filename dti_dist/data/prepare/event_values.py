"""The values of event columns, and classes of numbers, which interactions keep as codes."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from dti_dist.data.classes import class_texts
from dti_dist.data.dataset import NO_RULES, EventField, InteractionRules
from dti_dist.data.prepare.columns import with_codes
from dti_dist.data.prepare.tables import Tables
from dti_dist.errors import UserError
from dti_dist.sql import literal

_MOST_VALUES = 10_000  # each is tokenised, and has a line in dataset.json
_MOST_NUMBERS = 1_000  # a text says little of a number that is nearly never seen again


def number_values(tables: Tables, before: InteractionRules = NO_RULES) -> list[str]:
    """Give the rules of ``tables`` the values of event columns, and ``columns`` their codes. Makes
    the table ``event_values`` (field, value, code) of texts.

    Values and borders that a data set has ``before`` keep their codes; new values come behind them,
    sorted. Gives lines for the summary.

    Raises UserError for a column of too many values, and for classes of one number or none.
    """
    if not tables.rules.event_columns:
        return []
    known = {field.name: field for field in before.event_columns}
    fields, codes, notes = [], [], []
    for field in tables.rules.event_columns:
        old = known.get(field.name, field)
        if field.classes:
            fields.append(old if old.borders else _with_classes(tables, field))
            notes += _fewer_classes(fields[-1])
            continue
        fields.append(_with_values(tables, old))
        codes += [
            {"field": field.name, "value": value, "code": code}
            for code, value in enumerate(fields[-1].values, start=1)
        ]
    schema = pa.schema([("field", pa.string()), ("value", pa.string()), ("code", pa.int32())])
    tables.add("event_values", pa.Table.from_pylist(codes, schema), "numbering the values")
    tables.rules = tables.rules.model_copy(update={"event_columns": tuple(fields)})
    tables.columns = with_codes(tables.columns, fields)
    return notes


def _with_values(tables: Tables, field: EventField) -> EventField:
    """The field with new values behind those that it has."""
    old = field.values
    rows = tables.rows(
        f"SELECT DISTINCT {field.stored} AS value FROM interactions "
        f"WHERE {field.stored} <> '' LIMIT {_MOST_VALUES + 1 + len(old)}",
        f"finding the values of {field.name}",
    )
    new = sorted({row["value"] for row in rows} - set(old))
    _refuse_many(field.name, [*old, *new])
    return field.model_copy(update={"values": (*old, *new)})


def _with_classes(tables: Tables, field: EventField) -> EventField:
    """The field with the borders of its classes: of W numbers in order those at the places jW/N,
    rounded down, for j from 1 to N - 1. Equal ones are one, and none is the least number."""
    assert field.classes is not None
    counted, places = f"counted_{field.stored}", f"places_{field.stored}"
    doing = f"finding the classes of {field.name}"
    tables.create(
        counted,
        f"SELECT {field.stored} AS value, count(*) AS interactions FROM interactions WHERE "
        f"{field.stored} IS NOT NULL GROUP BY {field.stored}",
        doing,
    )
    (found,) = tables.rows(
        "SELECT count(*) AS numbers, min(value) AS least, CAST(sum(interactions) AS BIGINT) AS "
        f"total FROM {counted}",
        doing,
    )
    if found["numbers"] < 2:
        one = "one number alone" if found["numbers"] else "none"
        raise UserError(
            f"--bucket {field.name}={field.classes}: expected different numbers; found {one} in "
            f"all interactions. Leave {field.name} out of --bucket and --event-cols."
        )
    wanted = {j * found["total"] // field.classes for j in range(1, field.classes)}
    tables.add(places, pa.table({"place": pa.array(sorted(wanted), pa.int64())}), doing)
    rows = tables.rows(
        "SELECT DISTINCT value FROM (SELECT value, interactions, CAST(sum(interactions) OVER "
        f"(ORDER BY value) AS BIGINT) AS behind FROM {counted}) AS ordered JOIN {places} ON "
        "place < behind AND place >= behind - interactions",
        doing,
    )
    # + 0.0: of the two zeros that which has no sign.
    borders = tuple(sorted({row["value"] + 0.0 for row in rows} - {found["least"]}))
    # Most interactions have the least number: the classes are it, and what is above.
    borders = borders or _above(tables, counted, found["least"], doing)
    return field.model_copy(update={"values": class_texts(borders), "borders": borders})


def _above(tables: Tables, counted: str, number: float, doing: str) -> tuple[float, ...]:
    (found,) = tables.rows(
        f"SELECT min(value) AS next FROM {counted} WHERE value > "
        f"CAST({literal(repr(number))} AS DOUBLE)",
        doing,
    )
    return (found["next"],)


def _fewer_classes(field: EventField) -> list[str]:
    if field.classes == len(field.values):
        return []
    return [
        f"classes of {field.name}: {len(field.values):,} instead of {field.classes:,}, for many "
        "interactions have the same number"
    ]


def _refuse_many(name: str, values: Sequence[str]) -> None:
    numbers = all(map(_is_number, values))
    most = _MOST_NUMBERS if numbers else _MOST_VALUES
    if len(values) <= most:
        return
    what = "different numbers" if numbers else "different texts"
    remedy = (
        f"Put them into classes, such as '10 to 20', with --bucket {name}=10"
        if numbers
        else "Leave out what is rare or says nothing of a click, such as ids of sessions"
    )
    raise UserError(
        f"--event-cols {name}: expected at most {most:,} {what}; found more, such as "
        f"{values[0]!r} and {values[-1]!r}. {remedy}, or leave the column out."
    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
