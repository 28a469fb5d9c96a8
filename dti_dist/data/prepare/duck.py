"""The raw interactions in DuckDB on one machine, out of core, and from them sorted histories.

DuckDB reads, checks and joins, and spills to disk what its memory limit does not hold. It sorts as
many users at a time as fit into memory. The sorted interactions flow once through Python, a bounded
number of users at a time, where whole histories are cut into the splits' sequences with numpy and
written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from dti_dist.console import progress, say
from dti_dist.data.dataset import SplitRule
from dti_dist.data.prepare import statistics
from dti_dist.data.prepare.columns import MAIN_LABEL, kept_values
from dti_dist.data.prepare.findings import Findings
from dti_dist.data.prepare.input_table import FileScan, naming_the_file
from dti_dist.data.prepare.source import Source
from dti_dist.data.prepare.split import Histories, cut_sequences, inside, target_ranges
from dti_dist.data.prepare.tables import UserCounts
from dti_dist.data.prepare.writer import DatasetWriter
from dti_dist.errors import UserError
from dti_dist.options import BuildOptions
from dti_dist.sql import Workspace, memory_bytes, sql_errors, stream

# About 30 bytes each in Python: enough to make numpy's overhead vanish, little to hold in memory.
_INTERACTIONS_AT_A_TIME = 1 << 20
# Of an interaction while DuckDB sorts it. What does not fit would be spilled, at 31 bytes each.
_SORTED_BYTES = 48
_SORTING_SHARE = 0.75  # of DuckDB's memory


class DuckTables:
    """The raw interactions as tables of DuckDB; see Engine."""

    def __init__(self, workspace: Workspace, source: Source):
        self.connection = workspace.connection
        self.name, self.text_columns = source.name, source.text_columns
        self.split_column = source.split_column
        self.rules, self.columns = source.rules, source.columns
        self._ceilings = source.ceilings
        self._event_files = source.event_files

    def rows(self, query: str, doing: str) -> list[dict[str, Any]]:
        with sql_errors(f"{self.name}: {doing}"):
            result = self.connection.sql(query)
            return [dict(zip(result.columns, row, strict=True)) for row in result.fetchall()]

    def create(self, table: str, query: str, doing: str, files: FileScan | None = None) -> None:
        """As in Tables. An error names which of the files can't be read."""
        doing = f"{self.name}: {doing}"
        with naming_the_file(self.connection, doing, files) if files else sql_errors(doing):
            self.connection.execute(f"CREATE TABLE {table} AS {query}")

    def define(self, table: str, query: str) -> None:
        self.connection.execute(f"CREATE VIEW {table} AS {query}")

    def bring(self, table: str, query: str, doing: str) -> None:
        self.create(table, query, doing)

    def add(self, table: str, rows: pa.Table, doing: str) -> None:
        """Add rows to a table, which the first ones make."""
        with sql_errors(f"{self.name}: {doing}"):
            self.connection.register("added", rows)
            self.connection.execute(
                f"CREATE TABLE IF NOT EXISTS {table} AS SELECT * FROM added LIMIT 0"
            )
            self.connection.execute(f"INSERT INTO {table} SELECT * FROM added")
            self.connection.unregister("added")

    def take_items(self, writer: DatasetWriter) -> None:
        """``number_items`` has made ``told_items`` here."""

    def take_profiles(self, writer: DatasetWriter) -> None:
        self.define("told_profiles", "FROM given_profiles")

    def place(self, input_order: int) -> str:
        row = input_order
        for file, scan in self._event_files.one_by_one() if self._event_files else []:
            (rows,) = self.rows(f"SELECT count(*) AS rows FROM ({scan.query()})", "counting rows")
            if row < rows["rows"]:
                return f"row {row + 1:,} of {file}"
            row -= rows["rows"]
        return f"interaction {input_order + 1:,}"

    def write_sequences(
        self, writer: DatasetWriter, users: UserCounts, rule: SplitRule, options: BuildOptions
    ) -> tuple[Findings, dict[str, dict[str, float]]]:
        findings = Findings()
        ceilings = {
            name: {split: statistics.Ceiling() for split in ("valid", "test")}
            for name in self._ceilings
        }
        with (
            sql_errors("sorting the interactions"),
            progress("writing", users.interactions, "interactions") as bar,
        ):
            for some in histories(self):
                findings += Findings.of(some)
                for split, begin, end in target_ranges(some, rule):
                    batch = cut_sequences(some, split, begin, end, options.context_limit)
                    writer.write_sequences(split, batch)
                    if split == "train":
                        continue
                    for name, column in self._ceilings.items():
                        measured = inside(some, begin, end) & (some.history_before_request() > 0)
                        ceilings[name][split].add(
                            some.columns[column][measured], some.columns["label"][measured]
                        )
                bar.advance(int(some.lengths.sum()))
        return findings, {
            name: {split: auc for split, found in of.items() if (auc := found.auc()) is not None}
            for name, of in ceilings.items()
        }


def events_query(tables: DuckTables, source: Source, scan: str) -> str:
    """A SELECT for the table ``events`` over ``scan``, which is the source's. Raises UserError for
    a label that is no number, or a column that is not of its kind."""
    with sql_errors(f"{source.name}: reading the interactions"):
        found = tables.connection.sql(source.events)
        types = dict(zip(found.columns, map(str, found.types), strict=True))
    columns = (MAIN_LABEL, *source.columns)
    try:
        values = ", ".join(column.read(types[column.name]) for column in columns)
    except UserError as error:
        raise UserError(f"{source.name}: {error}") from error
    return (
        "SELECT user_id, item_id, time_us, CAST(floor(time_us / 1000000) AS BIGINT) AS timestamp, "
        f"{values} FROM ({scan})"
    )


def load_events(tables: DuckTables, source: Source) -> None:
    """Make the table ``events``; the rowid of what it shows is the input order."""
    query = events_query(tables, source, source.events)
    say(f"{source.name}: reading the interactions")
    tables.create("stored_events", query, "reading the interactions", source.event_files)
    tables.connection.execute(
        "CREATE VIEW events AS SELECT rowid AS input_order, * FROM stored_events"
    )


def histories(tables: DuckTables) -> Iterator[Histories]:
    """The histories of all ``users``, in the order of the MD5 of their id."""
    connection = tables.connection
    connection.execute(
        "CREATE TABLE ranks AS SELECT *, row_number() OVER (ORDER BY md5(user_id), user_id) AS "
        f"rank FROM {_users_with_profiles(tables)}"
    )
    interactions = RowStream(_sorted_interactions(tables))
    users = stream(connection, "SELECT user_id, interactions FROM ranks ORDER BY rank", 10_000)
    for batch in users:
        lengths = np.asarray(batch["interactions"])
        ends = np.cumsum(lengths)
        start = 0
        while start < len(lengths):
            before = ends[start] - lengths[start]
            end = int(np.searchsorted(ends, before + _INTERACTIONS_AT_A_TIME, side="right"))
            end = max(end, start + 1)
            taken = interactions.take(int(ends[end - 1] - before))
            columns = {name: taken[name].to_numpy() for name in taken.column_names}
            user_ids = batch["user_id"].slice(start, end - start)
            yield Histories(user_ids, lengths[start:end], columns, tables.rules)
            start = end


def _users_with_profiles(tables: DuckTables) -> str:
    """A FROM clause; profile 0 is that of users of whom nothing is known."""
    if not tables.rules.user_text_columns:
        return "users"
    profile = "coalesce(told_profiles.profile, 0)::INTEGER AS profile"
    return f"(SELECT users.*, {profile} FROM users LEFT JOIN told_profiles USING (user_id))"


def _sorted_interactions(tables: DuckTables) -> Iterator[pa.RecordBatch]:
    """The interactions of all ``ranks`` by rank, time and input order.

    Where they do not fit into memory at once, the users are sorted part by part: interactions as
    they are stored take a third of the disk that their sort would spill to.
    """
    connection = tables.connection
    columns = {
        "item_id": "told_items.item_id::INTEGER",
        "label": "interactions.label::TINYINT",
        "timestamp": "interactions.timestamp",
        "input_order": "interactions.input_order",
    }
    columns |= kept_values(tables.columns, tables.rules)
    if tables.rules.user_text_columns:
        columns["profile"] = "ranks.profile"
    values = ", ".join(f"{sql} AS {name}" for name, sql in columns.items())
    ranked = (
        f"SELECT ranks.rank, interactions.time_us, {values} FROM interactions "
        "JOIN ranks ON interactions.user_id = ranks.user_id "
        "JOIN told_items ON interactions.item_id = told_items.source_id"
    )
    most = max(int(memory_bytes(connection) * _SORTING_SHARE / _SORTED_BYTES), 1)
    parts = connection.sql(
        "SELECT min(rank), max(rank) FROM (SELECT rank, (sum(interactions) OVER (ORDER BY rank) - "
        f"interactions) // {most} AS part FROM ranks) GROUP BY part ORDER BY 1"
    ).fetchall()
    if len(parts) > 1:
        connection.execute(f"CREATE TABLE ranked AS {ranked}")
        ranked = "FROM ranked"

    def part(first: int, last: int) -> pa.RecordBatchReader:
        query = (
            f"SELECT {', '.join(columns)} FROM ({ranked}) WHERE rank BETWEEN {first} AND {last} "
            "ORDER BY rank, time_us, input_order"
        )
        return stream(connection, query, 100_000)

    return (batch for bounds in parts for batch in part(*bounds))


class RowStream:
    """Takes any number of rows from a stream of record batches."""

    def __init__(self, batches: Iterable[pa.RecordBatch]):
        self._batches = iter(batches)
        self._held: list[pa.RecordBatch] = []

    def take(self, count: int) -> pa.Table:
        """The next rows, ``count`` of them: one or more."""
        taken = self._held
        missing = count - sum(map(len, taken))
        while missing > 0:
            taken.append(next(self._batches))
            missing -= len(taken[-1])
        rows = pa.Table.from_batches(taken)
        self._held = rows.slice(count).to_batches()
        return rows.slice(0, count)
