"""Columns that interactions have beside user, item, time and label: one declaration of each.

Engines read, check, join and keep the columns of a Source by these declarations, and name none.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from dti_dist.data.dataset import (
    SPLITS,
    UNKNOWN,
    EventField,
    InteractionRules,
    TaskRule,
    label_column,
)
from dti_dist.errors import UserError
from dti_dist.sql import literal

_NUMBERS = r"U?[A-Z]*INT(EGER)?|FLOAT|DOUBLE|DECIMAL.*"
NUMBER_OR_BOOLEAN = rf"BOOLEAN|{_NUMBERS}"


@dataclass(frozen=True)
class EventColumn:
    """A column of the table ``events``. Its values are those of one interaction.

    Attributes:
        name: there, and in ``interactions``.
        kind: condition: true or false; label: 0 or 1, or true or false; number; text. Labels and
            numbers are kept as doubles.
        option: what asked for it, for messages: ``--history 'label = 1'``.
        missing: what every interaction must have, in words, and what having none looks like; None:
            it may be null.
        allowed: SQL condition that holds for values; None: all are allowed.
        expected: what those are, in words; remedy: what to do about others.
        kept: SQL for the value that histories and sequences hold; None: they hold none.
    """

    name: str
    kind: Literal["condition", "label", "number", "text"]
    option: str
    missing: tuple[str, str] | None = None
    allowed: str | None = None
    expected: str = ""
    remedy: str = ""
    kept: str | None = None

    @property
    def is_missing(self) -> str:
        """SQL condition: an interaction lacks it."""
        return f"coalesce({self.name}, '') = ''" if self.kind == "text" else f"{self.name} IS NULL"

    def read(self, found: str) -> str:
        """SQL for it in a SELECT of ``events``, where DuckDB has found this type.

        Raises:
            UserError: it is another type than its kind.
        """
        if self.kind == "condition" and found != "BOOLEAN":
            option = self.option.split()[0]
            raise UserError(
                f"expected {option} to be a condition; found {found}. Use a comparison, e.g. "
                f'{option} "label = 1".'
            )
        if self.kind == "label" and not re.fullmatch(NUMBER_OR_BOOLEAN, found):
            raise UserError(
                f"expected {self.option or 'the label'} to be a boolean, or a number that is 0 or "
                f'1; found {found}. Use a comparison, e.g. --label "rating >= 4" or '
                "\"event = 'click'\"."
            )
        if self.kind == "number" and not re.fullmatch(NUMBER_OR_BOOLEAN, found):
            raise UserError(
                f"{self.option}: expected a number; found {found}. Cast it, or name another."
            )
        if self.kind in ("label", "number"):
            return f"CAST({self.name} AS DOUBLE) AS {self.name}"
        return self.name


MAIN_LABEL = EventColumn(
    "label",
    "label",
    "",
    missing=("a label", "null"),
    allowed="label IN (0, 1)",
    expected="a label of 0 or 1",
    remedy='Use an expression that is true for a click, e.g. --label "rating >= 4".',
)


def _further_label(task: TaskRule) -> EventColumn:
    name = label_column(task.name)
    return EventColumn(
        name,
        "label",
        f"--label {task.name}={task.label!r}",
        allowed=f"{name} IN (0, 1)",
        expected="a label of 0, 1 or null",
        remedy=f'Use an expression that is true or false, e.g. --label "{task.name}=rating >= 4".',
        kept=f"CAST(coalesce({name}, {UNKNOWN}) AS TINYINT)",
    )


def kept_values(columns: Iterable[EventColumn], rules: InteractionRules) -> dict[str, str]:
    """What histories hold of ``interactions`` beside item, label and time: SQL by name."""
    values = {column.name: column.kept for column in columns if column.kept}
    if rules.keep_negatives is not None:
        # Of nothing but the interaction, so that any part of a log draws the same.
        drawn = "left(md5(concat_ws('|', {0}.user_id, {0}.item_id, {0}.timestamp)), 8)"
        bound = literal(f"{round(rules.keep_negatives * 2**32):08x}")
        values["is_kept"] = f"{{0}}.label = 1 OR {drawn} < {bound}".format("interactions")
    return values


def with_codes(
    columns: Iterable[EventColumn], fields: Iterable[EventField]
) -> tuple[EventColumn, ...]:
    """The columns, those of ``fields`` with the codes that these have now."""
    codes = {field.stored: _code(field) for field in fields}
    return tuple(replace(column, kept=codes.get(column.name, column.kept)) for column in columns)


def _code(field: EventField) -> str:
    """SQL for the code of a field's value in ``interactions``; see `number_values`."""
    if field.classes:
        value = f"interactions.{field.stored}"
        code = _class(value, field.borders, 1)
        return f"CAST(CASE WHEN {value} IS NULL THEN 0 ELSE {code} END AS INTEGER)"
    found = (
        f"SELECT max(code) FROM event_values WHERE field = {literal(field.name)} "
        f"AND value = interactions.{field.stored}"
    )
    return f"CAST(coalesce(({found}), 0) AS INTEGER)"


def _class(value: str, borders: Sequence[float], first: int) -> str:
    """SQL for the class of a number, where they count from ``first``: by halves, since an engine
    tries one WHEN after another."""
    if not borders:
        return str(first)
    middle = len(borders) // 2
    below = _class(value, borders[:middle], first)
    above = _class(value, borders[middle + 1 :], first + middle + 1)
    border = f"CAST({literal(repr(borders[middle]))} AS DOUBLE)"
    return f"CASE WHEN {value} < {border} THEN {below} ELSE {above} END"


def split_place(column: str) -> str:
    """SQL for the place in SPLITS of what a column says."""
    cases = " ".join(f"WHEN {literal(split)} THEN {n}" for n, split in enumerate(SPLITS))
    return f"CASE {column} {cases} END"


def event_columns(
    rules: InteractionRules, split_column: str | None, probabilities: Iterable[str]
) -> tuple[EventColumn, ...]:
    """What ``events`` has for the rules, for the splits and of known click probabilities."""
    columns = []
    if split_column:
        columns.append(
            EventColumn(
                "split",
                "text",
                f"--split-column {split_column}",
                allowed=f"coalesce(split, '') IN ({', '.join(map(literal, SPLITS))})",
                expected="train, valid or test, in these letters,",
                remedy="Rename the values, or remove these rows.",
                kept=f"CAST({split_place('split')} AS TINYINT)",
            )
        )
    requests = rules.requests
    if requests and requests.by == "column":
        what = (f"a request in {requests.column}", "null or empty")
        columns.append(EventColumn("request", "text", f"--request-col {requests.column}", what))
    for name, option, expression in [
        ("is_history", "--history", requests and requests.history),
        ("is_target", "--context-only", requests and requests.context_only),
    ]:
        if expression:
            what = (f"true or false of {option} {expression!r}", "null")
            columns.append(
                EventColumn(name, "condition", f"{option} {expression!r}", what, kept=name)
            )
    if rules.weight:
        columns.append(
            EventColumn(
                "weight",
                "number",
                f"--weight {rules.weight!r}",
                (f"a number of --weight {rules.weight!r}", "null"),
                allowed="weight >= 0 AND weight < 3e38",
                expected="a number that is 0 or more",
                remedy="Use an expression that is, such as coalesce(dwell, 1).",
                kept="CAST(weight AS FLOAT)",
            )
        )
    columns += map(_further_label, rules.tasks[1:])
    columns += [
        EventColumn(
            field.stored,
            "number" if field.classes else "text",
            f"--event-cols {field.name}",
            kept=_code(field),
        )
        for field in rules.event_columns
    ]
    columns += [EventColumn(name, "number", "", kept=name) for name in probabilities]
    return tuple(columns)
