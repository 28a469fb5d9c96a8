"""DuckDB: a connection with a bounded memory, its errors, and texts quoted for SQL."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from dti_dist.errors import UserError

# With it 100 million interactions took a process of 6.3 GiB; what stays free caches the spill.
_MOST_MEMORY = 6 << 30
_MORE_ROOM = "Raise --memory-limit, lower --threads, or free disk space beside the output."
NO_HIVE = "hive_partitioning=false"
SET_UTC = "SET TimeZone = 'UTC'"  # for dates without a zone


@dataclass(frozen=True)
class Workspace:
    """A DuckDB connection, and a scratch folder that is removed at the end."""

    connection: duckdb.DuckDBPyConnection
    folder: Path


@contextmanager
def open_workspace(
    folder: str | None = None,
    name: str = "dti-dist",
    memory_limit: str | None = None,
    threads: int | None = None,
) -> Iterator[Workspace]:
    """DuckDB with a scratch folder to spill to, which is removed at the end.

    Args:
        folder: where the scratch folder is made; None: the system's temporary folder.
        name: what the scratch folder is named after.
        memory_limit: DuckDB's, such as "8GB"; None: 70 % of the machine's memory, at most 6 GiB.

    Raises:
        UserError: DuckDB refuses the limit or the number of threads.
    """
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}.work-", dir=folder) as scratch:
        config: dict[str, Any] = {"temp_directory": f"{scratch}/spill"}
        if memory_limit:
            config["memory_limit"] = memory_limit
        if threads:
            config["threads"] = threads
        with sql_errors("starting DuckDB with --memory-limit and --threads as given"):
            connection = duckdb.connect(f"{scratch}/work.duckdb", config=config)
            if not memory_limit:
                _limit_memory(connection)
            connection.execute(SET_UTC)
        try:
            yield Workspace(connection, Path(scratch))
        finally:
            connection.close()


def _limit_memory(connection: duckdb.DuckDBPyConnection) -> None:
    """At most 70 % of what DuckDB takes the machine, or its container, to have.

    Its own limit is 80 % of that; percentages are known to its newer releases only.
    """
    mebibytes = min(memory_bytes(connection) * 7 // 8, _MOST_MEMORY) >> 20
    connection.execute(f"SET memory_limit = '{mebibytes}MiB'")


def memory_bytes(connection: duckdb.DuckDBPyConnection) -> int:
    """Bytes, which DuckDB writes as "6.0 GiB"."""
    setting = connection.sql("SELECT current_setting('memory_limit')").fetchall()[0][0]
    number, unit = setting.split()
    return round(float(number) * 1024 ** ("bytes", "KiB", "MiB", "GiB", "TiB").index(unit))


@contextmanager
def sql_errors(doing: str, advice: str = _MORE_ROOM, where: str = "") -> Iterator[None]:
    """Turn DuckDB's errors into UserErrors: what failed, and DuckDB's own short reason.

    Args:
        advice: what to do where memory or disk ran out, as far as the command has options for it.
        where: the file that is read.
    """
    try:
        yield
    except duckdb.OutOfMemoryException as error:
        raise UserError(
            f"{doing} ran out of memory or disk: {short_reason(error)}. {advice}"
        ) from error
    except duckdb.Error as error:
        place = f" in {where}" if where else ""
        raise UserError(f"{doing} failed{place}: {short_reason(error)}") from error


def short_reason(error: Exception) -> str:
    """The first line of DuckDB's message, without the name of its kind; of CSV the reason too."""
    first, *others = str(error).strip().split("\n")
    first = re.sub(r"^[A-Z][A-Za-z ]*Error: ", "", first)
    if first.startswith("CSV Error"):
        reasons = [line for line in others if line and not line.startswith("Original Line")]
        return ": ".join([first, *reasons[:1]]).rstrip(".")
    return first


def literal(text: str) -> str:
    """An SQL string."""
    return "'" + text.replace("'", "''") + "'"


def paths(files: Iterable[str]) -> str:
    """A list of files for DuckDB's readers, which take brackets and stars in a path for a glob."""
    return "[" + ", ".join(literal(re.sub(r"[*?[]", r"[\g<0>]", file)) for file in files) + "]"


def parquet(files: Iterable[str], options: str = "") -> str:
    """A table function that reads Parquet files; a folder named user=anna is no column."""
    return f"read_parquet({paths(files)}, {NO_HIVE}{options})"


def quote(name: str) -> str:
    """An SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def stream(connection: duckdb.DuckDBPyConnection, query: str, rows: int) -> pa.RecordBatchReader:
    """The result as record batches of at most so many rows, on a cursor of its own: DuckDB allows
    one unfinished result per cursor. Older releases call it fetch_record_batch."""
    relation = connection.cursor().sql(query)
    read = getattr(relation, "to_arrow_reader", None) or relation.fetch_record_batch
    return read(rows)
