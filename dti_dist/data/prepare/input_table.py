"""Files of one format as one table, whose columns have one type in all of them.

What a file says of its types is taken as it is (Parquet), or found by reading every row (CSV, JSON
lines): a sample of rows says nothing about the others.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NoReturn

import duckdb

from dti_dist.data.prepare.files import InputFile, find_files
from dti_dist.errors import UserError, nearest
from dti_dist.sql import NO_HIVE, literal, parquet, paths, quote, sql_errors

Family = Literal["bool", "integer", "number", "text", "time", "null", "binary", "other"]
NULL = "NULL"  # the type of a column without values
_AT_ONCE = 16  # files that are opened
_DELIMITERS = (",", "\t", ";", "|")
_LONGEST_LINE = 1 << 24  # bytes of a CSV row
_CSV_LIMITS = f"max_line_size={_LONGEST_LINE}, buffer_size={2 * _LONGEST_LINE}"
_WHOLE = r"\s*[+-]?(0|[1-9][0-9]{0,17})\s*"
_NUMBER = r"\s*[+-]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]{1,3})?\s*"
_TRUTH = r"(?i)true|false"
_OF_TEXT = {
    "integer": "{} = 'integer'",
    "number": "{} IN ('integer', 'number')",
    "bool": "{} = 'bool'",
}
_OF_JSON = {  # a number may be whole
    "bool": "{} = 'BOOLEAN'",
    "integer": "{} IN ('BIGINT', 'UBIGINT')",
    "number": "{} IN ('BIGINT', 'UBIGINT', 'DOUBLE')",
    "text": "{} = 'VARCHAR'",
    "list": "{} = 'ARRAY'",
    "object": "{} = 'OBJECT'",
}


@dataclass(frozen=True)
class Relation:
    """How files that are alike are read.

    Attributes:
        reader, options: a table function, and what follows its list of files.
        projection: what is selected of it.
        types: of the columns in the files; DuckDB casts to those of the first file.
    """

    reader: str
    options: str
    projection: str = "*"
    types: tuple[str | None, ...] = ()

    def sql(self, files: Sequence[str]) -> str:
        return f"SELECT {self.projection} FROM {self.reader}({paths(files)}{self.options})"


@dataclass(frozen=True)
class FileScan:
    """A SELECT over files that may also be read one by one.

    Attributes:
        select: ends before its FROM.
        files: in order, each with how it is read.
    """

    select: str
    files: tuple[tuple[str, Relation], ...]

    @staticmethod
    def of_parquet(select: str, files: Sequence[str]) -> FileScan:
        """Of files with the same columns."""
        relation = Relation("read_parquet", f", {NO_HIVE}")
        return FileScan(select, tuple((file, relation) for file in files))

    def query(self) -> str:
        runs: list[tuple[Relation, list[str]]] = []
        for file, relation in self.files:
            if not runs or runs[-1][0] != relation:
                runs.append((relation, []))
            runs[-1][1].append(file)
        together = " UNION ALL ".join(relation.sql(files) for relation, files in runs)
        return f"{self.select} FROM ({together}) AS input"

    def one_by_one(self) -> list[tuple[str, FileScan]]:
        return [(file, FileScan(self.select, ((file, how),))) for file, how in self.files]


# Runs a scan of counts and gives them: one row, or one for each file.
Survey = Callable[[FileScan], list[dict[str, int]]]


def survey_with_duckdb(
    connection: duckdb.DuckDBPyConnection, scan: FileScan
) -> list[dict[str, int]]:
    with naming_the_file(connection, "reading the columns", scan):
        found = connection.sql(scan.query())
        return [dict(zip(found.columns, row, strict=True)) for row in found.fetchall()]


@dataclass(frozen=True)
class Column:
    """Of one file.

    Attributes:
        sql: its value over what the reader gives; of CSV and JSON as text.
        type: DuckDB's; None: text that may stand for another type.
        json_type, json_list: SQL for the type that a JSON value has (NULL for null), and for its
            text, a list's elements joined by commas.
    """

    sql: str
    type: str | None
    json_type: str | None = None
    json_list: str | None = None


# A column's name, and what gives the SQL of its value for one file.
Value = tuple[str, Callable[[Column], str]]


def as_it_is(column: Column) -> str:
    return column.sql


def as_type(kind: str) -> Callable[[Column], str]:
    if kind == NULL:
        return lambda column: NULL
    return lambda column: column.sql if column.type == kind else f"CAST({column.sql} AS {kind})"


def _text_type(column: Column) -> str:
    """What a text is written as, or text; each condition is tried where none before it holds."""
    kinds = {"integer": _WHOLE, "number": _NUMBER, "bool": _TRUTH}
    tried = " ".join(
        f"WHEN regexp_full_match({column.sql}, {literal(pattern)}) THEN {literal(kind)}"
        for kind, pattern in kinds.items()
    )
    return f"CASE {tried} WHEN {column.sql} IS NOT NULL THEN 'text' END"


def _json_type(column: Column) -> str:
    assert column.json_type is not None
    return column.json_type


@dataclass(frozen=True)
class _Opened:
    file: InputFile
    reader: str
    options: str
    columns: dict[str, Column]


@dataclass(frozen=True)
class InputTable:
    """Opened files.

    Attributes:
        what: the table, for messages: "the events".
        notes: lines for the summary.
    """

    what: str
    files: tuple[_Opened, ...]
    notes: list[str]
    _connection: duckdb.DuckDBPyConnection = field(repr=False)

    @staticmethod
    def open(
        connection: duckdb.DuckDBPyConnection,
        what: str,
        paths: Sequence[str],
        wanted: Sequence[str],
        names: Sequence[str] = (),
    ) -> InputTable:
        """
        Args:
            wanted: columns that will be asked for; of CSV they tell the delimiter.
            names: of the columns of CSV files without a header.
        """
        files, notes = find_files(connection, what, paths)
        if names and files[0].format != "csv":
            raise UserError(
                f"--columns {','.join(names)}: expected with it CSV files, which may have no "
                f"header; found {files[0].path}. Leave it out."
            )
        opening = {"parquet": _open_parquet, "csv": _open_csv, "json": _open_json}

        def open_one(file: InputFile) -> _Opened:
            of_file = connection.cursor()
            try:
                with sql_errors(f"{what}: reading", where=file.path):
                    return opening[file.format](of_file, file, wanted, names)
            finally:
                of_file.close()

        with ThreadPoolExecutor(_AT_ONCE if len(files) > 1 else 1) as pool:
            opened = list(pool.map(open_one, files))
        if files[0].format == "json":  # a key that a file lacks is null there
            keys = {key: column for file in opened for key, column in file.columns.items()}
            opened = [replace(file, columns=keys) for file in opened]
        return InputTable(what, tuple(opened), notes, connection)

    @property
    def names(self) -> list[str]:
        """Columns of all files, in the order of their first appearance."""
        return list(dict.fromkeys(name for file in self.files for name in file.columns))

    def require(self, column: str, option: str) -> None:
        """Raise UserError where a file lacks the column."""
        if not self.names:  # JSON lines have no header
            raise UserError(
                f"{self.what}: expected rows, found none: {self.files[0].file.path} has no rows. "
                "Check the paths."
            )
        if column not in self.names:
            raise UserError(
                f"{option} {column}: expected a column of {self.what}; found "
                f"{_listed(self.names)}.{nearest(column, self.names)}{self._no_header()}"
            )
        for file in self.files:
            if column not in file.columns:
                raise UserError(
                    f"{option} {column}: expected this column in every file of {self.what}; "
                    f"{file.file.path} has only {_listed(list(file.columns))}. Add it there, or "
                    "leave the file out."
                )

    def _no_header(self) -> str:
        first = self.files[0]
        if first.file.format != "csv" or not any(re.search(r"^[\d.:-]+$", n) for n in self.names):
            return ""
        return (
            f" {first.file.path} seems to have no header: name its columns with --columns, such as "
            "--columns user,item,time,rating."
        )

    def families(self, column: str) -> dict[Family, str]:
        """What the column's values are, each with a file where they are so."""
        found: dict[Family, str] = {}
        for file in self.files:
            found.setdefault(family(file.columns[column].type or "VARCHAR"), file.file.path)
        if len(found) > 1:
            found.pop("null", None)
        return found

    def is_text(self, column: str) -> bool:
        """Whether the values are text that may stand for another type."""
        return any(file.columns[column].type is None for file in self.files)

    @property
    def is_json(self) -> bool:
        return self.files[0].file.format == "json"

    def one_type(self, column: str, option: str) -> str:
        """The type that holds the values of all files, as their schemas have it.

        Raises:
            UserError: numbers in one file and text in another, and the like.
        """
        types = {file.columns[column].type or "VARCHAR" for file in self.files}
        types = {t for t in types if family(t) != "null"} or {NULL}
        if len(types) == 1:
            return types.pop()
        families = self.families(column)
        if len(families) > 1 and not families.keys() <= {"bool", "integer", "number"}:
            self.refuse_families(column, option)
        if "number" in families:
            return "DOUBLE"  # not what SQL makes of an integer and a float32
        nulls = " UNION ALL ".join(f"SELECT NULL::{kind} AS value" for kind in sorted(types))
        (widest,) = self._connection.sql(f"SELECT typeof(value) FROM ({nulls}) LIMIT 1").fetchall()
        return widest[0]

    def refuse_families(self, column: str, option: str) -> NoReturn:
        (one, here), (other, there) = list(self.families(column).items())[:2]
        raise UserError(
            f"{option}: expected {column} to be of one kind in all files of {self.what}; found "
            f"{_A[one]} in {here} and {_A[other]} in {there}. Convert the column."
        )

    def type_in(self, column: str, path: str) -> str:
        """Of a file."""
        (found,) = (file for file in self.files if file.file.path == path)
        return found.columns[column].type or "VARCHAR"

    def scan(self, select: str, values: Mapping[str, Value]) -> FileScan:
        """A scan over files in which each value has the name that it is given here."""
        relations: dict[Relation, Relation] = {}  # so that equal ones are one object
        files = []
        for file in self.files:
            projection = ", ".join(
                f"{make(file.columns[column])} AS {quote(name)}"
                for name, (column, make) in values.items()
            )
            types = tuple(file.columns[column].type for column, _ in values.values())
            relation = Relation(file.reader, file.options, projection or "1", types)
            files.append((file.file.path, relations.setdefault(relation, relation)))
        return FileScan(select, tuple(files))

    def survey(
        self, survey: Survey, counts: Mapping[str, str], values: Mapping[str, Value]
    ) -> dict[str, int]:
        """Counts, given as SQL aggregates, over all rows of all files."""
        if not counts:
            return {}
        select = ", ".join(f"{sql} AS {quote(name)}" for name, sql in counts.items())
        rows = survey(self.scan(f"SELECT {select}", values))
        return {name: sum(row[name] for row in rows) for name in counts}

    def first_row(self, condition: str, values: Mapping[str, Value]) -> tuple[str, Any]:
        """Where a condition first holds, as "row 7 of FILE", and the first value there.

        Rows are counted from 1, a header not.
        """
        names = ", ".join(map(quote, values))
        for file, scan in self.scan("SELECT *", values).one_by_one():
            numbered = f"SELECT row_number() OVER () AS row, {names} FROM ({scan.query()})"
            query = f"SELECT * FROM ({numbered}) WHERE {condition} ORDER BY row LIMIT 1"
            if found := self._connection.sql(query).fetchall():
                return f"row {found[0][0]:,} of {file}", found[0][1]
        raise AssertionError(condition)


class Typing:
    """The types of columns whose text may stand for other types, found in a survey of all rows.

    A column has the narrowest type that all of its values are written as: ``007`` is text.
    """

    def __init__(self, table: InputTable, columns: Sequence[str]):
        self._table, self._columns = table, [c for c in columns if table.is_text(c)]
        self.values: dict[str, Value] = {}
        self.counts: dict[str, str] = {}
        for number, column in enumerate(self._columns):
            name = f"typed {number}"
            self.values[name] = (column, _json_type if table.is_json else _text_type)
            conditions = _OF_JSON if table.is_json else _OF_TEXT
            self.counts[f"{number} all"] = f"count({quote(name)})"
            for what, condition in conditions.items():
                holds = condition.format(quote(name))
                self.counts[f"{number} {what}"] = f"count(CASE WHEN {holds} THEN 1 END)"

    def types(self, found: Mapping[str, Any], options: Mapping[str, str]) -> dict[str, str]:
        """By column, from the values of `counts`.

        Raises:
            UserError: numbers and text in one column of JSON lines, and the like.
        """
        return {
            column: self._type(number, column, found, options[column])
            for number, column in enumerate(self._columns)
        }

    def _type(self, number: int, column: str, found: Mapping[str, Any], option: str) -> str:
        def has_only(what: str) -> bool:
            return found[f"{number} {what}"] == found[f"{number} all"]

        if not found[f"{number} all"]:
            return NULL
        for what, kind in (("integer", "BIGINT"), ("number", "DOUBLE"), ("bool", "BOOLEAN")):
            if has_only(what):
                return kind
        if self._table.is_json and not has_only("text"):
            counts = {what: found[f"{number} {what}"] for what in _OF_JSON}
            counts["number"] -= counts["integer"]
            kinds = [what for what, count in counts.items() if count]
            raise UserError(
                f"{option}: expected {column} to be of one kind in all rows of {self._table.what}; "
                f"found {' and '.join(kinds)}. Convert the column."
            )
        return "VARCHAR"


def family(kind: str) -> Family:
    """What values of a type of DuckDB are."""
    if kind in ("VARCHAR", "UUID") or kind.startswith("ENUM"):
        return "text"
    if kind == "BOOLEAN":
        return "bool"
    if re.fullmatch(r"U?(TINY|SMALL|BIG|HUGE)?INT(EGER)?", kind):
        return "integer"
    if kind in ("FLOAT", "DOUBLE") or kind.startswith("DECIMAL"):
        return "number"
    if kind == "DATE" or kind.startswith("TIMESTAMP"):
        return "time"
    if kind == "BLOB":
        return "binary"
    return "null" if kind in ('"NULL"', "NULL") else "other"


_A: dict[Family, str] = {
    "bool": "true and false",
    "integer": "integers",
    "number": "numbers",
    "text": "text",
    "time": "dates or timestamps",
    "binary": "bytes",
    "null": "nulls alone",
    "other": "something else",
}


@contextmanager
def naming_the_file(
    connection: duckdb.DuckDBPyConnection, doing: str, scan: FileScan
) -> Iterator[None]:
    """As `sql_errors`; of files that can't be read, the error names the first."""
    try:
        yield
    except duckdb.Error as error:
        broken = "" if isinstance(error, duckdb.OutOfMemoryException) else _broken(connection, scan)
        with sql_errors(doing, where=broken):
            raise


def _broken(connection: duckdb.DuckDBPyConnection, scan: FileScan) -> str:
    """The first file that can't be read; empty where each can."""
    for file, alone in scan.one_by_one():
        try:
            query = f"SELECT max(hash(input)) FROM ({alone.query()}) AS input"
            connection.sql(query).fetchall()
        except duckdb.Error:
            return file
    return ""


def _listed(names: list[str], most: int = 20) -> str:
    shown = [name if len(name) <= 40 else f"{name[:40]}…" for name in names[:most]]
    return ", ".join(shown) + (f" and {len(names) - most} more" if len(names) > most else "")


def _open_parquet(
    connection: duckdb.DuckDBPyConnection, file: InputFile, _wanted: Sequence[str], _: Sequence[str]
) -> _Opened:
    rows = connection.sql(f"DESCRIBE SELECT * FROM {parquet([file.path])}").fetchall()
    names = [row[0] for row in rows]
    if any(re.search(r"_\d+$", name) for name in names):  # DuckDB renames a, A to a, A_1
        names = _names_in_parquet(connection, file.path)
    columns = {name: Column(quote(row[0]), row[1]) for name, row in zip(names, rows, strict=True)}
    return _Opened(file, "read_parquet", f", {NO_HIVE}", columns)


def _names_in_parquet(connection: duckdb.DuckDBPyConnection, path: str) -> list[str]:
    """As the file has them, from its tree of columns in depth-first order."""
    (_, of_root), *nodes = connection.sql(
        f"SELECT name, coalesce(num_children, 0) FROM parquet_schema({paths([path])})"
    ).fetchall()
    names: list[str] = []
    below = 0  # nodes of a nested column that are still to come
    for name, children in nodes:
        if below:
            below -= 1
        else:
            names.append(name)
        below += children
    assert len(names) == of_root
    return names


def _open_json(
    connection: duckdb.DuckDBPyConnection, file: InputFile, _wanted: Sequence[str], _: Sequence[str]
) -> _Opened:
    reader = "read_ndjson_objects"
    found = connection.sql(
        "SELECT DISTINCT unnest(json_keys(json)) AS key "
        f"FROM {reader}({paths([file.path])}) ORDER BY key"
    ).fetchall()

    def column(key: str) -> Column:
        path = '$."{}"'.format(key.replace('"', '\\"'))
        place, elements = literal(path), literal(f"{path}[*]")
        kind, text = f"json_type(json, {place})", f"json ->> {place}"
        joined = f"array_to_string(json_extract_string(json, {elements}), ', ')"
        return Column(
            text,
            None,
            f"nullif({kind}, 'NULL')",
            f"CASE {kind} WHEN 'ARRAY' THEN {joined} WHEN 'OBJECT' THEN error({literal(key)} || "
            f"': expected text, found an object') ELSE {text} END",
        )

    return _Opened(file, reader, "", {key: column(key) for (key,) in found})


def _open_csv(
    connection: duckdb.DuckDBPyConnection,
    file: InputFile,
    wanted: Sequence[str],
    names: Sequence[str],
) -> _Opened:
    path = paths([file.path])
    first = connection.sql(
        f"SELECT line FROM read_csv({path}, auto_detect=false, header=false, delim='\x1f', "
        f"quote='', escape='', columns={{'line': 'VARCHAR'}}, {_CSV_LIMITS}) LIMIT 1"
    ).fetchall()
    if not first or first[0][0] is None:
        raise UserError(f"{file.path}: expected a first row, found none. Remove the file.")
    line = first[0][0].lstrip("\ufeff")
    headers = {
        delimiter: next(csv.reader([line], delimiter=delimiter)) for delimiter in _DELIMITERS
    }

    def fit(delimiter: str) -> tuple[bool, int]:
        found = headers[delimiter]
        right = len(found) == len(names) if names else set(wanted) <= set(found)
        return right, len(found)

    delimiter = max(_DELIMITERS, key=fit)
    header = list(names) or headers[delimiter]
    if names and len(headers[delimiter]) != len(names):
        raise UserError(
            f"--columns {','.join(names)}: expected as many names as {file.path} has columns, "
            f"{len(headers[delimiter])}; found {len(names)}."
        )
    twice = [name for name in wanted if header.count(name) > 1]
    if twice:
        raise UserError(
            f"{file.path}: expected one column {twice[0]}, found {header.count(twice[0])} of that "
            "name. Rename the others."
        )
    escape = _escape(connection, path, delimiter, not names)
    columns = {f"c{number}": "VARCHAR" for number in range(len(header))}
    options = (
        f", auto_detect=false, header={str(not names).lower()}, skip=0, columns={columns}, "
        f"delim={literal(delimiter)}, quote='\"', escape={literal(escape)}, {_CSV_LIMITS}"
    )
    found = {name: Column(quote(f"c{n}"), None) for n, name in enumerate(header)}
    return _Opened(file, "read_csv", options, found)


def _escape(connection: duckdb.DuckDBPyConnection, path: str, delimiter: str, header: bool) -> str:
    """What stands before a quote inside quotes: another quote, or a backslash."""
    with suppress(duckdb.Error):  # what is wrong is said where all rows are read
        (found,) = connection.sql(
            f"SELECT Escape FROM sniff_csv({path[1:-1]}, delim={literal(delimiter)}, quote='\"', "
            f"header={str(header).lower()}, skip=0, all_varchar=true, {_CSV_LIMITS})"
        ).fetchall()
        if found[0] == "\\":
            return "\\"
    return '"'
