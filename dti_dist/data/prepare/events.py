"""Flat event logs (Parquet, CSV or JSON lines, local or any fsspec URL) and an item table."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from dti_dist.data.dataset import EventField, InteractionRules, RequestRule, label_column
from dti_dist.data.prepare.input_table import (
    Column,
    FileScan,
    InputTable,
    Survey,
    Typing,
    Value,
    as_type,
    family,
    naming_the_file,
    survey_with_duckdb,
)
from dti_dist.data.prepare.label import Expression, read_tasks
from dti_dist.data.prepare.source import Source
from dti_dist.data.prepare.times import TimeColumn, TimeRule
from dti_dist.data.template import MOMENTS
from dti_dist.errors import UserError, nearest
from dti_dist.options import RequestOptions
from dti_dist.sql import Workspace, quote

_ANY_TIME, _ANY_REQUESTS = TimeRule(), RequestOptions()
# Beside the names of columns in expressions.
_USER, _ITEM, _SPLIT, _REQUEST = "\x01user", "\x01item", "\x01split", "\x01request"
_FIELD = "\x01field"  # and the name of an event column
_LABEL = "label"
_MOST_CLASSES = 1_000


@dataclass(frozen=True)
class EventColumns:
    """``item`` is the column of the events; ``item_key`` that of the item table.

    Attributes:
        time_rule: how times are written.
        names: of the columns of CSV events without a header.
        split: the column that says train, valid or test.
        user_key, user_texts: of the users' table.
    """

    user: str
    item: str
    time: str
    item_key: str
    texts: tuple[str, ...]
    time_rule: TimeRule = _ANY_TIME
    names: tuple[str, ...] = ()
    split: str | None = None
    user_key: str | None = None
    user_texts: tuple[str, ...] = ()


def read_events(
    workspace: Workspace,
    paths: Sequence[str],
    items: Sequence[str],
    columns: EventColumns,
    label: str | Sequence[str],
    name: str = "events",
    survey: Survey | None = None,
    requests: RequestOptions = _ANY_REQUESTS,
    default_requests: Literal["time", "none"] = "time",
    weight: str | None = None,
    keep_negatives: float | None = None,
    users: Sequence[str] = (),
    event_cols: Sequence[str] = (),
    bucket: Sequence[str] = (),
) -> Source:
    """Event files and an item table as a Source, and a table of users, where there is one.

    ``paths``, ``items`` and ``users`` are files, folders, globs or fsspec URLs, of Parquet, CSV or
    JSON lines. ``label`` is an expression, or several as ``NAME=EXPRESSION``, the main one first.
    ``bucket`` are columns of numbers among ``event_cols`` as ``NAME=CLASSES``.
    Timestamps without a zone count as UTC. ``survey`` runs aggregates over the files, by default
    with DuckDB; ``default_requests`` counts where ``requests`` does not say. Raises UserError
    naming the option that is at fault.
    """
    connection = workspace.connection
    labels = (label,) if isinstance(label, str) else label
    fields = _event_fields(event_cols, columns.texts, bucket)
    rules = _rules(requests, default_requests, labels, weight, keep_negatives, fields)
    rule = rules.requests
    main = rules.tasks[0].label if rules.tasks else labels[0]
    expression = Expression(connection, main)
    conditions = _expressions(connection, rules)
    ids = {"--user-col": columns.user, "--item-col": columns.item}
    if rule and rule.column:
        ids["--request-col"] = rule.column
    named = ids | {"--time-col": columns.time}
    if columns.split is not None:
        named["--split-column"] = columns.split
    of_conditions = [name for condition in conditions.values() for name in condition.names]
    wanted = (*named.values(), *expression.names, *of_conditions, *event_cols)
    events = InputTable.open(connection, "the events", paths, wanted, columns.names)
    for option, column in named.items():
        events.require(column, option)
    for column in event_cols:
        events.require(column, "--event-cols")
    using = dict.fromkeys(expression.columns(events.names), expression.option)
    has_label = any(column.lower() == _LABEL for column in events.names)
    for condition in conditions.values():
        known = events.names if has_label else [*events.names, _LABEL]
        for column in condition.columns(known):
            if has_label or column != _LABEL:
                using.setdefault(column, condition.option)
    for column, option in using.items():
        events.require(column, option)
    time = TimeColumn(events, columns.time, columns.time_rule)
    classed = {
        field.name: f"--bucket {field.name}={field.classes}" for field in fields if field.classes
    }
    typed_columns = [*using, *classed, *(ids.values() if events.is_json else ())]
    typing = Typing(events, list(dict.fromkeys(typed_columns)))
    found = events.survey(
        survey or partial(survey_with_duckdb, connection),
        typing.counts | time.counts,
        typing.values | time.values,
    )
    options = {column: option for option, column in ids.items()}
    typed = typing.types(found, options | using | classed)
    types = {c: typed.get(c) or events.one_type(c, option) for c, option in using.items()}
    time_us, unit, notes = time.read(found)
    values: dict[str, Value] = {
        _USER: _id(events, columns.user, "--user-col", typed),
        _ITEM: _id(events, columns.item, "--item-col", typed),
        **time.values,
        **{column: (column, as_type(kind)) for column, kind in types.items()},
    }
    select = (
        f"SELECT {quote(_USER)} AS user_id, {quote(_ITEM)} AS item_id, {time_us} AS time_us, "
        f"{expression.sql(types)} AS {_LABEL}"
    )
    if columns.split is not None:
        values[_SPLIT] = (columns.split, _as_text)
        select += f", {quote(_SPLIT)} AS split"
    if rule and rule.column:
        values[_REQUEST] = _id(events, rule.column, "--request-col", typed)
        select += f", {quote(_REQUEST)} AS request"
    for field in fields:
        values[_FIELD + field.name] = (
            _number(events, field.name, classed[field.name], typed)
            if field.classes
            else _text(events, field.name, "--event-cols")
        )
        select += f", {quote(_FIELD + field.name)} AS {field.stored}"
    # An expression of a SELECT may name an earlier one; a column of that name comes before it.
    known_types = types if has_label else types | {_LABEL: expression.type(types)}
    for flag, condition in conditions.items():
        value = condition.sql(known_types)
        select += f", {f'NOT {value}' if flag == 'is_target' else value} AS {flag}"
    table = _open_items(connection, items, columns.item_key, columns.texts)
    event_files, item_files = events.scan(select, values), table.scan()
    user_table = _open_users(connection, users, columns)
    user_files = user_table.scan() if user_table else None
    return Source(
        name=name,
        events=event_files.query(),
        event_files=event_files,
        items=item_files.query(),
        item_files=item_files,
        text_columns=list(columns.texts),
        split_column=columns.split,
        rules=rules.model_copy(update={"user_text_columns": list(columns.user_texts)}),
        users=user_files.query() if user_files else None,
        user_files=user_files,
        description={
            "kind": "events",
            "paths": list(paths),
            "items": list(items),
            **({"users": list(users)} if users else {}),
            "columns": {
                "user": columns.user,
                "item": columns.item,
                "time": columns.time,
                "item_key": columns.item_key,
                **({} if columns.split is None else {"split": columns.split}),
                **({"user_key": columns.user_key or columns.user} if users else {}),
            },
            "label": main,
            "time_unit": unit,
        },
        notes=[
            f"timestamps in {columns.time} are read as {unit}",
            *notes,
            *events.notes,
            *table.table.notes,
            *(user_table.table.notes if user_table else ()),
        ],
    )


def _rules(
    options: RequestOptions,
    default: Literal["time", "none"],
    labels: Sequence[str],
    weight: str | None,
    keep_negatives: float | None,
    fields: tuple[EventField, ...],
) -> InteractionRules:
    by = "column" if options.request_col else options.requests or default
    requests = None
    if by != "none":
        requests = RequestRule(
            by=by,
            column=options.request_col,
            history=options.history,
            context_only=options.context_only,
        )
    return InteractionRules(
        requests=requests,
        tasks=read_tasks(labels),
        weight=weight,
        keep_negatives=keep_negatives,
        event_columns=fields,
    )


def _event_fields(
    names: Sequence[str], texts: Sequence[str], bucket: Sequence[str]
) -> tuple[EventField, ...]:
    """Raises UserError for a name that is no field of a template or has another meaning there, and
    for classes of another column."""
    seen: set[str] = set()
    for name in names:
        problem = None
        if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name):
            problem = "a name of letters, digits and _"
        elif name in MOMENTS:
            problem = "another name, since that tells the interaction's time in a template"
        elif name in texts:
            problem = "another name than that of a text column of the items"
        elif name.lower() in seen:
            problem = "names that differ in more than the case of letters"
        if problem:
            raise UserError(f"--event-cols {name}: expected {problem}. Rename the column.")
        seen.add(name.lower())
    classes = _classes(bucket, names)
    return tuple(EventField(name=name, classes=classes.get(name)) for name in names)


def _classes(bucket: Sequence[str], names: Sequence[str]) -> dict[str, int]:
    """How many classes each column of numbers is put into."""
    classes: dict[str, int] = {}
    for one in bucket:
        name, _, count = one.rpartition("=")
        if not name or not count.isdecimal() or not 2 <= int(count) <= _MOST_CLASSES:
            raise UserError(
                f"--bucket {one}: expected a column and a number of classes from 2 to "
                f"{_MOST_CLASSES:,}, such as price=10."
            )
        if name not in names:
            raise UserError(
                f"--bucket {one}: expected a column of --event-cols; found "
                f"{', '.join(names) or 'none'} there.{nearest(name, names)} Add it, or leave "
                "--bucket out."
            )
        if name in classes:
            raise UserError(f"--bucket {one}: expected each column once. Leave one out.")
        classes[name] = int(count)
    return classes


def _expressions(
    connection: duckdb.DuckDBPyConnection, rules: InteractionRules
) -> dict[str, Expression]:
    """By the column of events that each gives: is_target is where --context-only fails."""
    rule = rules.requests
    given = {
        **{
            label_column(task.name): (f"--label {task.name}=", task.label)
            for task in rules.tasks[1:]
        },
        "is_history": ("--history", rule and rule.history),
        "is_target": ("--context-only", rule and rule.context_only),
        "weight": ("--weight", rules.weight),
    }
    return {
        name: Expression(connection, text, option) for name, (option, text) in given.items() if text
    }


def read_item_table(
    connection: duckdb.DuckDBPyConnection, paths: Sequence[str], key: str, texts: Sequence[str]
) -> pa.Table:
    """source_id and the text columns of an item table, all strings.

    Raises UserError for a missing file or column, a missing or repeated id, or bytes that are no
    UTF-8.
    """
    table = _open_items(connection, paths, key, texts, "the text column")
    scan = table.scan()
    with naming_the_file(connection, "the item table: reading", scan):
        found = connection.sql(scan.query()).to_arrow_table()
    ids = found["source_id"]
    empty = pc.sum(pc.fill_null(pc.equal(ids, ""), True)).as_py() or 0
    if empty:
        raise UserError(
            f"the item table: expected an id in every row; {empty:,} have none (null or empty). "
            f"Remove these rows, or check --item-key {key}."
        )
    if len(ids.unique()) < len(ids):
        counts = ids.value_counts()
        again = next(count["values"].as_py() for count in counts if count["counts"].as_py() > 1)
        raise UserError(
            f"the item table: expected each id once; {len(ids) - len(ids.unique()):,} rows repeat "
            f"one, e.g. {again!r}. Keep one row for each item."
        )
    return found


@dataclass(frozen=True)
class _Texts:
    """A table of texts by id, and the values that are read of it."""

    table: InputTable
    values: dict[str, Value]

    def scan(self) -> FileScan:
        return self.table.scan("SELECT *", self.values)


def _open_users(
    connection: duckdb.DuckDBPyConnection, paths: Sequence[str], columns: EventColumns
) -> _Texts | None:
    if bool(paths) != bool(columns.user_texts):
        given, missing = ("--users", "--user-text-cols")[:: 1 if paths else -1]
        raise UserError(
            f"{given}: expected {missing} with it; found none. A table of users goes with the "
            "names of its text columns."
        )
    if not paths:
        return None
    key = columns.user_key or columns.user
    return _open_texts(
        connection,
        paths,
        ("user_id", key, "--user-key"),
        columns.user_texts,
        "--user-text-cols",
        "the users' table",
    )


def _open_items(
    connection: duckdb.DuckDBPyConnection,
    paths: Sequence[str],
    key: str,
    texts: Sequence[str],
    text_option: str = "--text-cols",
) -> _Texts:
    named = ("source_id", key, "--item-key")
    return _open_texts(connection, paths, named, texts, text_option, "the item table")


def _open_texts(
    connection: duckdb.DuckDBPyConnection,
    paths: Sequence[str],
    named: tuple[str, str, str],
    texts: Sequence[str],
    text_option: str,
    what: str,
) -> _Texts:
    """``named``: what the id is called, its column, and the option that says so."""
    name, key, option = named
    table = InputTable.open(connection, what, paths, (key, *texts))
    table.require(key, option)
    for text in texts:
        table.require(text, text_option)
    typed = {}
    if table.is_json:
        typing = Typing(table, [key])
        found = table.survey(partial(survey_with_duckdb, connection), typing.counts, typing.values)
        typed = typing.types(found, {key: option})
    values = {name: _id(table, key, option, typed)}
    return _Texts(table, values | {text: _text(table, text, text_option) for text in texts})


def _id(table: InputTable, column: str, option: str, typed: Mapping[str, str]) -> Value:
    """Ids as text. Floats are refused: their text is "1.0", which equals no "1"."""
    found = {family(typed[column]): ""} if column in typed else table.families(column)
    for kind, file in found.items():
        if kind not in ("text", "integer", "binary", "null"):
            types = typed.get(column) or table.type_in(column, file)
            raise UserError(
                f"{option} {column}: expected ids that are strings or integers; found {types} in "
                f"{file or table.what}. Convert the column, or name another."
            )
    if len(found) > 1:
        table.refuse_families(column, f"{option} {column}")
    return column, _as_text


def _number(table: InputTable, column: str, option: str, typed: Mapping[str, str]) -> Value:
    """The column as doubles; NaN and infinities are null."""
    found = {family(typed[column]): ""} if column in typed else table.families(column)
    for kind, file in found.items():
        if kind not in ("integer", "number", "null"):
            raise UserError(
                f"{option}: expected a column of numbers; found "
                f"{typed.get(column) or table.type_in(column, file)} in {file or table.what}. "
                "Convert the column, or leave --bucket out."
            )

    def as_number(found: Column) -> str:
        number = found.sql
        if found.type == "FLOAT" or (found.type or "").startswith("DECIMAL"):
            # The number that its digits say, as a request gives it: 0.1, not the nearest float32.
            number = f"CAST({number} AS VARCHAR)"
        number = f"CAST({number} AS DOUBLE)"
        return f"CASE WHEN isfinite({number}) THEN {number} END"

    return column, as_number


def _as_text(column: Column) -> str:
    if column.type == "BLOB":
        return f"decode({column.sql})"
    return column.sql if column.type is None else f"CAST({column.sql} AS VARCHAR)"


def _text(table: InputTable, column: str, option: str) -> Value:
    """The column as text; a list's elements are joined by commas, and NaN is no text."""
    for file in table.files:
        kind = file.columns[column].type or "VARCHAR"
        if (
            kind.startswith(("STRUCT", "MAP", "UNION", "VARIANT"))
            or kind.endswith(")[]")
            or (kind.endswith("[][]"))
        ):
            raise UserError(
                f"{option} {column}: expected text, numbers or lists of them; found {kind} in "
                f"{file.file.path}. Select the field that is wanted, or convert the column."
            )

    def as_text(found: Column) -> str:
        if found.json_list is not None:
            return found.json_list
        if found.type is not None and found.type.endswith("]"):
            return f"array_to_string({found.sql}, ', ')"
        if found.type in ("FLOAT", "DOUBLE"):
            return f"CASE WHEN NOT isnan({found.sql}) THEN CAST({found.sql} AS VARCHAR) END"
        return _as_text(found)

    return column, as_text
