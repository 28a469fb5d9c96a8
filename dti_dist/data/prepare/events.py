"""Flat event logs (Parquet or CSV, local or any fsspec URL) and an item table."""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import duckdb
import pyarrow as pa

from dti_dist.data import storage
from dti_dist.data.prepare.build import FileScan, Source
from dti_dist.data.prepare.label import label_expression
from dti_dist.errors import UserError, nearest
from dti_dist.sql import Workspace, literal, quote, sql_errors

_FORMATS = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".csv": "csv",
    ".csv.gz": "csv",
    ".csv.zst": "csv",
    ".tsv": "csv",
    ".tsv.gz": "csv",
}
READING_TIMES = "the events: reading the time column"
# The value that a scan gives over all files; where they are read one by one, min or max joins them.
Extreme = Callable[[FileScan, Callable[[list[Any]], Any]], Any]
_SIGNED = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT")
_INTEGERS = (*_SIGNED, *(f"U{name}" for name in _SIGNED))
# Told apart by the largest timestamp: seconds reach 1e11 in the year 5138, and 1e11 milliseconds
# were in 1973. With each, what turns it into microseconds.
_UNITS = (
    (1e11, "seconds", "* 1000000"),
    (1e14, "milliseconds", "* 1000"),
    (1e17, "microseconds", "* 1"),
    (float("inf"), "nanoseconds", "/ 1000"),
)


@dataclass(frozen=True)
class EventColumns:
    """``item`` is the column of the events; ``item_key`` that of the item table."""

    user: str
    item: str
    time: str
    item_key: str
    texts: tuple[str, ...]


@dataclass(frozen=True)
class _Table:
    """Files that are read as one: by a table function, with the type of each column."""

    what: str
    reader: str
    files: tuple[str, ...]
    options: str
    types: dict[str, str]

    def scan(self, select: str) -> FileScan:
        return FileScan(select, self.reader, self.files, self.options)

    def scan_one_by_one(self, select: str) -> FileScan:
        """The same for each file read alone: a CSV file of few rows would suggest other types."""
        types = ", ".join(f"{literal(name)}: {literal(kind)}" for name, kind in self.types.items())
        options = (
            self.options if self.reader == "read_parquet" else f", header=true, types={{{types}}}"
        )
        return FileScan(select, self.reader, self.files, options)

    def type_of(self, column: str, option: str) -> str:
        if column not in self.types:
            raise UserError(
                f"{option} {column}: expected a column of {self.what}; found "
                f"{', '.join(self.types)}.{nearest(column, self.types)}"
            )
        return self.types[column]

    def id_column(self, column: str, option: str) -> str:
        """The column as text. Floats are refused: their text is "1.0", which equals no "1"."""
        found = self.type_of(column, option)
        if found not in ("VARCHAR", "UUID", *_INTEGERS):
            raise UserError(
                f"{option} {column}: expected ids that are strings or integers; found {found} in "
                f"{self.what}. Convert the column, or name another."
            )
        return f"CAST({quote(column)} AS VARCHAR)"


def read_events(
    workspace: Workspace,
    paths: Sequence[str],
    items: Sequence[str],
    columns: EventColumns,
    label: str,
    name: str = "events",
    extreme: Extreme | None = None,
) -> Source:
    """Event files and an item table as a Source.

    ``paths`` and ``items`` are files, folders, globs or fsspec URLs, of Parquet or CSV (with a
    header). The time column may be a date or timestamp, an ISO string, or a number since 1970 in
    seconds, milliseconds, microseconds or nanoseconds, told apart by the largest one's magnitude.
    Timestamps without a zone count as UTC. ``extreme`` reads the smallest or largest value over the
    files, by default with DuckDB. Raises UserError naming the option that is at fault.
    """
    connection = workspace.connection
    ids = (columns.user, columns.item)
    events = _open_table(connection, "the events", paths, text=ids)
    user = events.id_column(columns.user, "--user-col")
    item = events.id_column(columns.item, "--item-col")
    time_us, unit = _time_us(events, columns.time, extreme or partial(_extreme, connection))
    expression = label_expression(connection, label, list(events.types))
    table = _open_table(connection, "the item table", items, (columns.item_key, *columns.texts))
    key = table.id_column(columns.item_key, "--item-key")
    texts = [_text(table, column) for column in columns.texts]
    select = (
        f"SELECT {user} AS user_id, {item} AS item_id, {time_us} AS time_us, {expression} AS label"
    )
    return Source(
        name=name,
        events=events.scan(select).query(),
        event_files=events.scan_one_by_one(select),
        items=table.scan(f"SELECT {key} AS source_id, {', '.join(texts)}").query(),
        text_columns=list(columns.texts),
        description={
            "kind": "events",
            "paths": list(paths),
            "items": list(items),
            "columns": {
                "user": columns.user,
                "item": columns.item,
                "time": columns.time,
                "item_key": columns.item_key,
            },
            "label": label,
            "time_unit": unit,
        },
        notes=[f"timestamps in {columns.time} are read as {unit}"],
    )


def read_item_table(
    connection: duckdb.DuckDBPyConnection, paths: Sequence[str], key: str, texts: Sequence[str]
) -> pa.Table:
    """source_id and the text columns of an item table, all strings.

    Raises UserError for a missing file or column, a missing or repeated id, or bytes that are no
    UTF-8.
    """
    table = _open_table(connection, "the item table", paths, (key, *texts))
    select = ", ".join(_text(table, column) for column in texts)
    scan = table.scan(f"SELECT {table.id_column(key, '--item-key')} AS source_id, {select}")
    with sql_errors(f"the item table: reading {paths[0]}"):
        found = connection.sql(scan.query()).to_arrow_table()
    ids = found["source_id"]
    if ids.null_count:
        raise UserError(
            f"the item table: expected an id in every row; {ids.null_count:,} have none (null). "
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


def _open_table(
    connection: duckdb.DuckDBPyConnection, what: str, paths: Sequence[str], text: Sequence[str]
) -> _Table:
    """Files that DuckDB reads as one table; in CSV the ``text`` columns keep their exact text,
    so that the id 007 does not become 7."""
    files = [file for path in paths for file in _expand(connection, path)]
    kinds = {_kind(file): file for file in files}
    if len(kinds) > 1:
        raise UserError(
            f"{what}: expected files of one format; found {' and '.join(kinds.values())}. "
            "Name only those of one format."
        )
    listed = ", ".join(literal(file) for file in files)
    kind = next(iter(kinds))
    options = "" if kind == "parquet" else ", header=true"
    with sql_errors(f"{what}: reading {files[0]}" + (", …" if len(files) > 1 else "")):
        relation = connection.sql(f"SELECT * FROM read_{kind}([{listed}]{options})")
        if kind == "csv":
            types = ", ".join(
                f"{literal(name)}: 'VARCHAR'" for name in relation.columns if name in text
            )
            options += f", types={{{types}}}" if types else ""
            relation = connection.sql(f"SELECT * FROM read_csv([{listed}]{options})")
        found = dict(zip(relation.columns, map(str, relation.types), strict=True))
    return _Table(what, f"read_{kind}", tuple(files), options, found)


def _expand(connection: duckdb.DuckDBPyConnection, path: str) -> list[str]:
    """The files that a file, folder, glob or URL stands for, sorted. Hidden ones and those that
    begin with an underscore, such as Spark's _SUCCESS, are no data."""
    fs, inner = storage.filesystem(path)
    storage.register(connection, path)
    if fs.isdir(inner):
        found = [
            file
            for file in fs.find(inner)
            if _kind(file, None)
            and not any(
                part.startswith((".", "_")) for part in posixpath.relpath(file, inner).split("/")
            )
        ]
    elif fs.isfile(inner):
        found = [inner]
    else:
        is_glob = any(character in inner for character in "*?[")
        found = [file for file in fs.glob(inner) if fs.isfile(file)] if is_glob else []
    if not found:
        endings = ", ".join(_FORMATS)
        raise UserError(
            f"{path}: expected a file, a folder or a glob of files ({endings}); found nothing "
            "there. Check the path."
        )
    if storage.is_local(path):
        return sorted(found)
    scheme = fs.protocol if isinstance(fs.protocol, str) else fs.protocol[0]
    return [f"{scheme}://{file.lstrip('/')}" for file in sorted(found)]


def _kind(file: str, default: str | None = "unknown") -> str | None:
    for ending, kind in _FORMATS.items():
        if file.lower().endswith(ending):
            return kind
    if default is None:
        return None
    raise UserError(
        f"{file}: expected a file that ends in one of {', '.join(_FORMATS)}. Rename it, or convert "
        "it to Parquet."
    )


def _time_us(events: _Table, column: str, extreme: Extreme) -> tuple[str, str]:
    """An SQL expression for microseconds since epoch, and the unit found."""
    found, name = events.type_of(column, "--time-col"), quote(column)
    if found.startswith(("DATE", "TIMESTAMP")):
        plain = name if "ZONE" in found else f"CAST({name} AS TIMESTAMP)"
        return f"epoch_us({plain})", found.lower()
    if found == "VARCHAR":
        unreadable = f"{name} IS NOT NULL AND TRY_CAST({name} AS TIMESTAMPTZ) IS NULL"
        bad = extreme(
            events.scan_one_by_one(f"SELECT min(CASE WHEN {unreadable} THEN {name} END)"), min
        )
        if bad is not None:
            raise UserError(
                f"--time-col {column}: expected numbers or ISO dates such as 2024-05-01 or "
                f"2024-05-01T12:30:00Z; found {bad!r} in {events.what}. Convert the column."
            )
        return f"epoch_us(CAST({name} AS TIMESTAMPTZ))", "ISO text"
    if found not in _INTEGERS and not found.startswith(("FLOAT", "DOUBLE", "DECIMAL")):
        raise UserError(
            f"--time-col {column}: expected numbers, dates or ISO strings; found {found} in "
            f"{events.what}. Name another column."
        )
    largest = extreme(events.scan_one_by_one(f"SELECT max(abs({name}))::DOUBLE"), max) or 0.0
    unit, to_us = next((unit, to_us) for limit, unit, to_us in _UNITS if largest < limit)
    if found in _INTEGERS:
        # Integers stay integers: 1e18 nanoseconds have more digits than a double.
        return f"CAST({name} AS BIGINT) {to_us.replace('/', '//')}", unit
    return f"CAST(floor({name} {to_us}) AS BIGINT)", unit


def _extreme(connection: duckdb.DuckDBPyConnection, scan: FileScan, _pick: Callable) -> Any:
    with sql_errors(READING_TIMES):
        return connection.sql(scan.query()).fetchall()[0][0]


def _text(table: _Table, column: str) -> str:
    """The column as text; a list's elements are joined by commas."""
    found = table.type_of(column, "--text-cols")
    if found.endswith("[]"):
        return f"array_to_string({quote(column)}, ', ') AS {quote(column)}"
    return f"CAST({quote(column)} AS VARCHAR) AS {quote(column)}"
