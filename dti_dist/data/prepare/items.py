"""The item table: its rows checked and numbered."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

from dti_dist.data.dataset import item_schema
from dti_dist.data.prepare.duck import DuckTables
from dti_dist.data.prepare.source import Source
from dti_dist.data.prepare.tables import item_sizes_select, listed
from dti_dist.errors import UserError
from dti_dist.sql import quote, stream


def load_items(tables: DuckTables, source: Source, known: str | None = None) -> None:
    """Make the tables ``items`` (item_schema), with dense ids in the order of source_id, and
    ``item_sizes``. Items of the relation ``known`` keep their ids and texts, and come first.
    Raises UserError for ids that are missing or occur twice."""
    texts = tables.text_columns
    if not texts or {"item_id", "source_id"} & set(texts):
        raise UserError(
            "item text columns: expected at least one, and none named item_id or source_id, which "
            f"the data set uses itself; found {', '.join(texts) or 'none'}."
        )
    doing = "reading the item table"
    names = ", ".join(quote(text) for text in texts)
    columns = ", ".join(f"coalesce({quote(text)}, '') AS {quote(text)}" for text in texts)
    query = f"SELECT source_id, {columns} FROM ({source.items})"
    tables.create("given_items", query, doing, source.item_files)
    (without_id,) = tables.rows(
        "SELECT count(*) AS items FROM given_items WHERE coalesce(source_id, '') = ''", doing
    )
    if without_id["items"]:
        raise UserError(
            f"{source.name}: expected an id for every row of the item table; "
            f"{without_id['items']:,} rows have none (null or empty). Remove those rows."
        )
    (repeated,) = tables.rows(
        "SELECT count(*) AS ids, array_agg(source_id ORDER BY source_id)[:3] AS examples FROM "
        "(SELECT source_id FROM given_items GROUP BY source_id HAVING count(*) > 1)",
        doing,
    )
    if repeated["ids"]:
        raise UserError(
            f"{source.name}: expected one row per item in the item table; {repeated['ids']:,} ids "
            f"have several, e.g. {listed(repeated['examples'])}. Remove the duplicates."
        )
    number = "row_number() OVER (ORDER BY source_id) - 1"
    if known is None:
        items = f"SELECT {number} AS item_id, source_id, {names} FROM given_items"
    else:
        items = (
            f"SELECT item_id, source_id, {names} FROM {known} UNION ALL "
            f"SELECT (SELECT count(*) FROM {known}) + {number}, source_id, {names} FROM "
            f"given_items ANTI JOIN {known} USING (source_id)"
        )
    tables.create("items", items, doing)
    tables.create("item_sizes", f"{item_sizes_select(texts)} FROM items", doing)


def item_batches(tables: DuckTables, first: int = 0) -> Iterator[pa.RecordBatch]:
    """The items from this id on, batches of ``item_schema``."""
    schema = item_schema(tables.text_columns)
    columns = ", ".join(quote(name) for name in schema.names)
    query = f"SELECT {columns} FROM items WHERE item_id >= {first} ORDER BY item_id"
    for batch in stream(tables.connection, query, 65_536):
        yield from pa.Table.from_batches([batch]).cast(schema).to_batches()
