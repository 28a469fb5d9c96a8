"""The item table: checked, numbered, and what becomes of interactions whose item has no text.

DuckDB on this machine has all tables of items, whichever engine reads the interactions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from dti_dist.data.dataset import UnknownItems, item_schema
from dti_dist.data.prepare.duck import DuckTables
from dti_dist.data.prepare.source import Source
from dti_dist.data.prepare.tables import Tables, listed
from dti_dist.errors import UserError
from dti_dist.options import UnknownItemRule
from dti_dist.sql import quote, stream

# The share of interactions without text from which on the ids look like another table's.
_MANY = 0.1
_OR_EMPTY = "coalesce({}, '')"
_DOING = "reading the item table"
_COUNTING = "checking the items of the interactions"


def load_items(duck: DuckTables, source: Source) -> None:
    """Make the table ``given_items``: source_id and texts, empty where they are null.

    The table ``known_items``, of a data set that is appended to, is there, or is made without rows.
    Raises UserError for ids that are missing or occur twice.
    """
    texts = duck.text_columns
    if not texts or {"item_id", "source_id"} & set(texts):
        raise UserError(
            "item text columns: expected at least one, and none named item_id or source_id, which "
            f"the data set uses itself; found {', '.join(texts) or 'none'}."
        )
    query = f"SELECT source_id, {_names(texts, _OR_EMPTY)} FROM ({source.items})"
    duck.create("given_items", query, _DOING, source.item_files)
    (without_id,) = duck.rows(
        "SELECT count(*) AS items FROM given_items WHERE coalesce(source_id, '') = ''", _DOING
    )
    if without_id["items"]:
        raise UserError(
            f"{source.name}: expected an id for every row of the item table; "
            f"{without_id['items']:,} rows have none (null or empty). Remove those rows."
        )
    (repeated,) = duck.rows(
        "SELECT count(*) AS ids, array_agg(source_id ORDER BY source_id)[:3] AS examples FROM "
        "(SELECT source_id FROM given_items GROUP BY source_id HAVING count(*) > 1)",
        _DOING,
    )
    if repeated["ids"]:
        raise UserError(
            f"{source.name}: expected one row per item in the item table; {repeated['ids']:,} ids "
            f"have several, e.g. {listed(repeated['examples'])}. Remove the duplicates."
        )
    columns = ["item_id BIGINT", *(f"{quote(name)} VARCHAR" for name in ("source_id", *texts))]
    duck.connection.execute(f"CREATE TABLE IF NOT EXISTS known_items ({', '.join(columns)})")


@dataclass(frozen=True)
class Unknown:
    """Items of interactions that have no text in the item table.

    Attributes:
        items, interactions: how many.
        total: of all interactions.
        examples: the first ids.
    """

    items: int
    interactions: int
    total: int
    examples: list[str]


def number_items(duck: DuckTables, tables: Tables, rule: UnknownItemRule) -> Unknown:
    """Make the tables ``items`` (item_schema, with dense ids in the order of source_id),
    ``interacted`` (characters, words and interactions of each item that has text) and
    ``told_items``, in DuckDB.

    Those of ``known_items``, if there are any, keep their ids and texts, and come first. Under
    ``id`` all items without text have their id in every text column, and those of ``events`` that
    have no row get one.

    Raises:
        UserError: an item of ``events`` has no text, which ``fail`` refuses; under ``id`` too if it
            is one of ``known_items``.
    """
    names, blank = _names(duck.text_columns), is_blank(duck.text_columns)
    counted = "SELECT item_id AS source_id, count(*) AS interactions FROM events GROUP BY item_id"
    tables.bring("item_counts", counted, _COUNTING)
    new = "ANTI JOIN known_items USING (source_id)"
    duck.define(
        "item_texts",
        f"SELECT true AS is_known, source_id, {names} FROM known_items UNION ALL "
        f"SELECT false AS is_known, source_id, {names} FROM given_items {new}",
    )
    duck.create(
        "unknown_items",
        "SELECT item_counts.source_id, interactions, is_known FROM item_counts LEFT JOIN "
        f"item_texts USING (source_id) WHERE is_known IS NULL OR {blank}",
        _COUNTING,
    )
    if rule != "drop":
        _refuse_known(duck)
    if rule == "fail":
        _refuse(duck, "is_known IS NULL", "have an item with no row in the item table")
        _refuse(duck, "NOT is_known", f"have an item with no text (null or blank in {names})")
    given = _filled_with_ids(duck) if rule == "id" else "FROM given_items"
    number = "(SELECT count(*) FROM known_items) + row_number() OVER (ORDER BY source_id) - 1"
    duck.create(
        "items",
        f"SELECT item_id, source_id, {names} FROM known_items UNION ALL "
        f"SELECT {number} AS item_id, source_id, {names} FROM ({given}) {new}",
        _DOING,
    )
    duck.define("told_items", f"SELECT item_id, source_id FROM items WHERE NOT {blank}")
    _measure(duck)
    (found,) = duck.rows(
        "SELECT count(*) AS items, coalesce(CAST(sum(interactions) AS BIGINT), 0) AS interactions, "
        "(SELECT CAST(sum(interactions) AS BIGINT) FROM item_counts) AS total FROM unknown_items",
        _COUNTING,
    )
    return Unknown(**found, examples=_examples(duck))


def is_blank(text_columns: Sequence[str]) -> str:
    """SQL for whether an item has no text."""
    return f"trim(concat_ws('', {_names(text_columns)})) = ''"


def _names(text_columns: Sequence[str], value: str = "{}") -> str:
    """A select list of the text columns; ``value`` is SQL over each one's name."""
    names = map(quote, text_columns)
    if value == "{}":
        return ", ".join(names)
    return ", ".join(f"{value.replace('{}', name)} AS {name}" for name in names)


def _refuse(duck: DuckTables, condition: str, problem: str) -> None:
    (found,) = duck.rows(
        "SELECT CAST(sum(interactions) AS BIGINT) AS interactions, count(*) AS items "
        f"FROM unknown_items WHERE {condition}",
        _COUNTING,
    )
    if found["items"]:
        raise UserError(
            f"{duck.name}: {found['interactions']:,} interactions {problem}; {found['items']:,} "
            f"such items, e.g. {listed(_examples(duck, condition))}. Add them to the item table, "
            "or say with --unknown-items drop or id what becomes of them."
        )


def _refuse_known(duck: DuckTables) -> None:
    if found := _examples(duck, "is_known"):
        raise UserError(
            f"{duck.name}: expected items that the data set has with text, or not at all; it has "
            f"{listed(found)} without, and an append changes no item. Use --unknown-items drop, or "
            "prepare all of it again."
        )


def _filled_with_ids(duck: DuckTables) -> str:
    """A SELECT of ``given_items`` and of what has no row among them, all with text."""
    blank = is_blank(duck.text_columns)
    filled = _names(duck.text_columns, f"CASE WHEN {blank} THEN source_id ELSE {{}} END")
    return (
        f"SELECT source_id, {filled} FROM given_items UNION ALL "
        f"SELECT source_id, {_names(duck.text_columns, 'source_id')} FROM unknown_items "
        "WHERE is_known IS NULL"
    )


def _measure(duck: DuckTables) -> None:
    text = f"concat_ws(' ', {_names(duck.text_columns)})"
    duck.create(
        "interacted",
        f"SELECT interactions, length(trim({text}))::BIGINT AS characters, "
        f"len(regexp_extract_all({text}, '\\S+'))::BIGINT AS words "
        f"FROM item_counts JOIN items USING (source_id) WHERE NOT {is_blank(duck.text_columns)}",
        "measuring the texts",
    )


def _examples(duck: DuckTables, condition: str = "true") -> list[str]:
    found = duck.rows(
        f"SELECT source_id FROM unknown_items WHERE {condition} ORDER BY source_id LIMIT 3",
        _COUNTING,
    )
    return [row["source_id"] for row in found]


def keep_known(
    tables: Tables, rule: UnknownItemRule, unknown: Unknown
) -> tuple[UnknownItems | None, list[str]]:
    """Make the relation ``known_events``, and give what ``dataset.json`` says of the others, and
    lines for the summary. Raises UserError where nothing is left."""
    if rule == "fail" or not unknown.items:
        tables.define("known_events", "SELECT * FROM events")
        return None, []
    about: dict[str, Any] = {"items": unknown.items, "interactions": unknown.interactions}
    many = unknown.interactions >= _MANY * unknown.total
    warning, advice = ("WARNING: ", ". Check --item-key and --text-cols") if many else ("", "")
    count = f"{unknown.interactions:,} ({unknown.interactions / unknown.total:.1%})"
    examples = f"e.g. {listed(unknown.examples)}{advice}"
    if rule == "id":
        tables.define("known_events", "SELECT * FROM events")
        return UnknownItems(rule="id", **about), [
            f"{warning}items whose text is their id, for they have no other: {unknown.items:,}; "
            f"interactions with them: {count}; {examples}"
        ]
    if unknown.interactions == unknown.total:
        raise UserError(
            f"{tables.name}: expected with --unknown-items drop interactions whose item has text; "
            f"all {unknown.total:,} have none, {examples}."
        )
    by_item = "JOIN told_items ON events.item_id = told_items.source_id"
    tables.define("known_events", f"SELECT * FROM events SEMI {by_item}")
    (found,) = tables.rows(
        f"SELECT count(DISTINCT user_id) AS users FROM events ANTI {by_item}", _COUNTING
    )
    return UnknownItems(rule="drop", users=found["users"], **about), [
        f"{warning}interactions left out, for their item has no text: {count}; users who had such: "
        f"{found['users']:,}; items: {unknown.items:,}, {examples}"
    ]


def empty_texts(duck: DuckTables, first: int = 0) -> list[str]:
    """Lines for the summary about the items from this id on that lack a text."""
    counts = _names(duck.text_columns, "count(CASE WHEN trim({}) = '' THEN 1 END)")
    of_items = f"FROM items WHERE item_id >= {first}"
    (total,) = duck.rows(f"SELECT count(*) AS items {of_items}", _DOING)
    (found,) = duck.rows(f"SELECT {counts} {of_items}", _DOING)
    return [
        f"items without {text}: {count:,} of {total['items']:,}"
        for text, count in found.items()
        if count
    ]


def item_batches(duck: DuckTables, first: int = 0) -> Iterator[pa.RecordBatch]:
    """The items from this id on, batches of ``item_schema``."""
    schema = item_schema(duck.text_columns)
    columns = ", ".join(quote(name) for name in schema.names)
    query = f"SELECT {columns} FROM items WHERE item_id >= {first} ORDER BY item_id"
    for batch in stream(duck.connection, query, 65_536):
        yield from pa.Table.from_batches([batch]).cast(schema).to_batches()
