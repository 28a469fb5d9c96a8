"""The distinct values of event columns, which interactions keep as codes."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from dti_dist.data.dataset import NO_RULES, EventField, InteractionRules
from dti_dist.data.prepare.tables import Tables
from dti_dist.errors import UserError

_MOST_VALUES = 10_000  # each is tokenised, and has a line in dataset.json
_MOST_NUMBERS = 1_000  # a text says little of a number that is nearly never seen again


def number_values(tables: Tables, before: InteractionRules = NO_RULES) -> InteractionRules:
    """Make the table ``event_values`` (field, value, code), and give the rules with the values.

    Values that a data set has ``before`` keep their codes; new ones come behind them, sorted.

    Raises UserError for a column of too many values.
    """
    if not tables.rules.event_columns:
        return tables.rules
    known = {field.name: field.values for field in before.event_columns}
    fields = []
    for field in tables.rules.event_columns:
        old = known.get(field.name, ())
        most = _MOST_VALUES + 1 + len(old)
        rows = tables.rows(
            f"SELECT DISTINCT {field.stored} AS value FROM interactions "
            f"WHERE {field.stored} <> '' LIMIT {most}",
            f"finding the values of {field.name}",
        )
        new = sorted({row["value"] for row in rows} - set(old))
        _refuse_many(field.name, [*old, *new])
        fields.append(EventField(name=field.name, values=(*old, *new)))
    codes = [
        {"field": field.name, "value": value, "code": code}
        for field in fields
        for code, value in enumerate(field.values, start=1)
    ]
    schema = pa.schema([("field", pa.string()), ("value", pa.string()), ("code", pa.int32())])
    tables.add("event_values", pa.Table.from_pylist(codes, schema), "numbering the values")
    return tables.rules.model_copy(update={"event_columns": tuple(fields)})


def _refuse_many(name: str, values: Sequence[str]) -> None:
    numbers = all(map(_is_number, values))
    most = _MOST_NUMBERS if numbers else _MOST_VALUES
    if len(values) <= most:
        return
    what = "different numbers" if numbers else "different texts"
    remedy = (
        "Put them into a few classes first, such as '10 to 20'"
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
