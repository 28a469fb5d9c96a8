"""Group, sort and split interactions into user sequences with DuckDB: one machine, out of core.

DuckDB reads, checks and joins, and spills to disk what its memory limit does not hold. It sorts as
many users at a time as fit into memory. The sorted interactions flow once through Python, a bounded
number of users at a time, where whole histories are cut into the splits' sequences with numpy and
written.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from dti_dist.console import progress, say
from dti_dist.data import storage
from dti_dist.data.dataset import Manifest, RequestRule, SplitRule, item_schema
from dti_dist.data.prepare import statistics
from dti_dist.data.prepare.findings import Findings
from dti_dist.data.prepare.input_table import FileScan, naming_the_file
from dti_dist.data.prepare.requests import flags, form_requests
from dti_dist.data.prepare.split import Histories, cut_sequences, inside, target_ranges
from dti_dist.data.prepare.tables import (
    Tables,
    UserCounts,
    check_events,
    choose_split,
    count_days,
    count_users,
    date_and_time,
    item_sizes_select,
    listed,
    read_statistics,
    refuse_empty_split,
    refuse_split_without_targets,
    split_place,
    targets_of,
)
from dti_dist.data.prepare.writer import DatasetWriter
from dti_dist.errors import UserError
from dti_dist.options import BuildOptions
from dti_dist.sql import Workspace, memory_bytes, open_workspace, quote, sql_errors, stream

# The share of interactions that have another's time from which on they look like requests.
_MANY = 0.1
# About 30 bytes each in Python: enough to make numpy's overhead vanish, little to hold in memory.
_INTERACTIONS_AT_A_TIME = 1 << 20
# Of an interaction while DuckDB sorts it. What does not fit would be spilled, at 31 bytes each.
_SORTED_BYTES = 48
_SORTING_SHARE = 0.75  # of DuckDB's memory


@dataclass(frozen=True)
class Source:
    """What a source hands to the engine.

    Attributes:
        name: of the data set, for people.
        events: a SELECT that gives, in input order, user_id, item_id (strings), time_us
            (microseconds since epoch), label (boolean or number), where it is known the click's
            true probability, and what ``requests`` asks for: request (string), is_history and
            is_target (boolean).
        items: a SELECT that gives source_id and the text columns, all strings.
        text_columns: their names.
        requests: which interactions form a request; None: each one alone.
        description: what ``dataset.json`` says under ``source``.
        notes: lines for the summary.
        split_column: the column of the input that ``events`` gives as split, a string: which split
            an interaction belongs to. None: ``events`` gives none, and the options say it.
        event_files, item_files: the same as ``events`` and ``items``, file by file: for engines
            that share them out, and to say where a row is.
    """

    name: str
    events: str
    items: str
    text_columns: list[str]
    requests: RequestRule | None = None
    description: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    split_column: str | None = None
    event_files: FileScan | None = None
    item_files: FileScan | None = None


@dataclass(frozen=True)
class Summary:
    """What was built. ``str()`` of it is for people."""

    uri: str
    manifest: Manifest
    notes: list[str]
    seconds: float
    written: list[str] | None = None  # files, where not all of the data set

    def __str__(self) -> str:
        manifest, counts = self.manifest, self.manifest.counts
        described = statistics.describe(manifest.statistics) if manifest.statistics else []
        lines = [
            f"{manifest.name}: {counts.interactions:,} interactions of {counts.users:,} users "
            f"with {counts.items:,} items, label rate {manifest.label_rate:.4f}",
            *described,
            "",
            f"{'split':<6} {'sequences':>11} {'targets':>13} {'label rate':>11}   "
            "first and last target",
        ]
        for split, found in counts.splits.items():
            lines.append(
                f"{split:<6} {found.rows:>11,} {found.targets:>13,} "
                f"{found.clicks / found.targets:>11.4f}   "
                f"{date_and_time(found.first_timestamp)} … {date_and_time(found.last_timestamp)}"
            )
        written = list(manifest.files) if self.written is None else self.written
        size = sum(manifest.files[path].bytes for path in written) / 1e6
        lines += ["", *(f"note: {note}" for note in self.notes)]
        lines.append(
            f"wrote {len(written)} files, {size:,.1f} MB, in {self.seconds:.1f} s: {self.uri}"
        )
        return "\n".join(lines)


class Engine(Tables, Protocol):
    """Tables of an engine that also sorts and writes."""

    def write_sequences(
        self, writer: DatasetWriter, users: UserCounts, rule: SplitRule, options: BuildOptions
    ) -> tuple[Findings, dict[str, float]]:
        """Cut every history into the splits' sequences and write them.

        Gives what was found on the way, and the AUC of the true click probabilities on valid and
        test where they are known.
        """


def build_dataset(
    read_source: Callable[[Workspace], Source],
    out_uri: str,
    options: BuildOptions,
    engine: Callable[[DuckTables, Source, DatasetWriter], Engine] | None = None,
) -> Summary:
    """Build a prepared data set and publish it at ``out_uri`` when it is complete.

    ``engine`` reads the interactions, given the tables of items and the writer that has written
    them; by default DuckDB does.

    Raises UserError, and publishes nothing, for an existing target without ``force``, for input
    that breaks what Source promises, and for an empty split.
    """
    started = time.monotonic()
    with (
        storage.publish_folder(out_uri, options.force) as staging,
        workspace_beside(out_uri, options) as workspace,
        DatasetWriter(
            staging, options.shard_interactions, options.row_group_interactions
        ) as writer,
    ):
        source = read_source(workspace)
        duck = DuckTables(workspace, source)
        load_items(duck, source)
        writer.write_items(item_batches(duck), source.text_columns)
        if engine is None:
            load_events(duck, source)
        tables = engine(duck, source, writer) if engine else duck
        check_events(tables)
        of_requests = form_requests(tables)
        users = count_users(tables, options.min_interactions)
        days = count_days(tables, targets_of(tables, users.kept_events))
        rule = choose_split(
            tables,
            options.split,
            options.fractions,
            days,
            users.kept_events,
            options.split_times,
        )
        refuse_empty_split(rule, users, days)
        say(f"sorting {users.interactions:,} interactions")
        found, ceiling = tables.write_sequences(writer, users, rule, options)
        refuse_split_without_targets(writer.splits)
        manifest = writer.finish(
            name=source.name,
            interactions=users.interactions,
            users=users.users,
            users_left_out=users.users_left_out,
            interactions_left_out=users.interactions_left_out,
            context_limit=options.context_limit,
            split=rule,
            requests=source.requests,
            item_text_columns=source.text_columns,
            source=source.description | ({"ceiling": ceiling} if ceiling else {}),
            statistics=read_statistics(tables, users.per_user, days, found.requests()),
        )
    notes = [*source.notes, *of_requests]
    if manifest.label_rate in (0, 1):
        notes.append(
            f"WARNING: all labels are {manifest.label_rate:g}, so there is nothing to learn. Check "
            "the label's expression: texts are compared letter by letter"
        )
    if found.out_of_order:
        notes.append(
            f"interactions out of time order in the input, now sorted: {found.out_of_order:,}"
        )
    if note := _shared_times(found):
        notes.append(note)
    if users.users_left_out:
        notes.append(
            f"users left out, for they have fewer than {options.min_interactions} interactions: "
            f"{users.users_left_out:,}"
        )
    notes.append(
        f"targets without history before their request: {found.targets_without_history:,} of "
        f"{found.targets:,}; training and evaluation leave them out unless sample.min_context is 0"
    )
    if ceiling:
        known = ", ".join(f"{split} {auc:.4f}" for split, auc in ceiling.items())
        notes.append(f"AUC of the true click probabilities, which no model can beat: {known}")
    return Summary(out_uri, manifest, notes, time.monotonic() - started)


def _shared_times(found: Findings) -> str | None:
    """What to say where requests are off."""
    if not found.at_shared_times:
        return None
    share = found.at_shared_times / found.interactions
    said = (
        f"{found.at_shared_times:,} interactions ({share:.1%}) have the second of another of their "
        "user, and each counts as a request of its own: a target sees the labels of those before it"
    )
    if share < _MANY:
        return said
    return (
        f"WARNING: {said}. Where they were shown together, serving can't know these: use "
        "--requests time, or for events --request-col"
    )


def workspace_beside(out_uri: str, options: BuildOptions) -> AbstractContextManager[Workspace]:
    """A workspace that spills beside a local output, or where the options say."""
    parent, name = storage.parent_and_name(out_uri)
    beside = parent if storage.is_local(out_uri) else None
    return open_workspace(
        options.temp_directory or beside, name, options.memory_limit, options.threads
    )


class DuckTables:
    """The raw interactions as tables of DuckDB; see Engine."""

    def __init__(self, workspace: Workspace, source: Source):
        self.connection = workspace.connection
        self.name, self.text_columns = source.name, source.text_columns
        self.split_column = source.split_column
        self.requests = source.requests
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
    ) -> tuple[Findings, dict[str, float]]:
        findings = Findings()
        ceilings = {split: statistics.Ceiling() for split in ("valid", "test")}
        with (
            sql_errors("sorting the interactions"),
            progress("writing", users.interactions, "interactions") as bar,
        ):
            for some in histories(self):
                findings += Findings.of(some)
                for split, begin, end in target_ranges(some, rule):
                    batch = cut_sequences(some, begin, end, options.context_limit)
                    writer.write_sequences(split, batch)
                    if "probability" in some.columns and split in ceilings:
                        targets = inside(some, begin, end)
                        ceilings[split].add(
                            some.columns["probability"][targets], some.columns["label"][targets]
                        )
                bar.advance(int(some.lengths.sum()))
        found = {split: ceiling.auc() for split, ceiling in ceilings.items()}
        return findings, {split: auc for split, auc in found.items() if auc is not None}


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


def events_query(tables: DuckTables, source: Source, scan: str) -> str:
    """A SELECT for the table ``events`` over ``scan``, which is the source's. Raises UserError for
    a label that is no number."""
    with sql_errors(f"{source.name}: reading the interactions"):
        found = tables.connection.sql(source.events)
        types = dict(zip(found.columns, map(str, found.types), strict=True))
    if not re.match(r"BOOL|U?[A-Z]*INT|FLOAT|DOUBLE|DECIMAL", types["label"]):
        raise UserError(
            f"{source.name}: expected the label to be a boolean, or a number that is 0 or 1; found "
            f'{types["label"]}. Use a comparison, e.g. --label "rating >= 4" or '
            "\"event = 'click'\"."
        )
    for flag, option in [("is_history", "--history"), ("is_target", "--context-only")]:
        if types.get(flag, "BOOLEAN") != "BOOLEAN":
            raise UserError(
                f"{source.name}: expected {option} to be a condition; found {types[flag]}. Use a "
                f'comparison, e.g. {option} "label = 1".'
            )
    known = "".join(
        f", {name}"
        for name in ("probability", "split", "request", "is_history", "is_target")
        if name in types
    )
    return (
        "SELECT user_id, item_id, time_us, CAST(floor(time_us / 1000000) AS BIGINT) AS timestamp, "
        f"CAST(label AS DOUBLE) AS label{known} FROM ({scan})"
    )


def load_events(tables: DuckTables, source: Source) -> None:
    """Make the table ``events``; the rowid of what it shows is the input order."""
    query = events_query(tables, source, source.events)
    say(f"{source.name}: reading the interactions")
    tables.create("stored_events", query, "reading the interactions", source.event_files)
    tables.connection.execute(
        "CREATE VIEW events AS SELECT rowid AS input_order, * FROM stored_events"
    )


def item_batches(tables: DuckTables, first: int = 0) -> Iterator[pa.RecordBatch]:
    """The items from this id on, batches of ``item_schema``."""
    schema = item_schema(tables.text_columns)
    columns = ", ".join(quote(name) for name in schema.names)
    query = f"SELECT {columns} FROM items WHERE item_id >= {first} ORDER BY item_id"
    for batch in stream(tables.connection, query, 65_536):
        yield from pa.Table.from_batches([batch]).cast(schema).to_batches()


def histories(tables: DuckTables) -> Iterator[Histories]:
    """The histories of all ``users``, in the order of the MD5 of their id."""
    connection = tables.connection
    connection.execute(
        "CREATE TABLE ranks AS SELECT *, row_number() OVER (ORDER BY md5(user_id), user_id) AS "
        "rank FROM users"
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
            yield Histories(user_ids, lengths[start:end], columns, tables.requests)
            start = end


def _sorted_interactions(tables: DuckTables) -> Iterator[pa.RecordBatch]:
    """The interactions of all ``ranks`` by rank, time and input order.

    Where they do not fit into memory at once, the users are sorted part by part: interactions as
    they are stored take a third of the disk that their sort would spill to.
    """
    connection = tables.connection
    columns = {
        "item_id": "items.item_id::INTEGER",
        "label": "interactions.label::TINYINT",
        "timestamp": "interactions.timestamp",
        "input_order": "interactions.input_order",
    }
    if "probability" in connection.table("interactions").columns:
        columns["probability"] = "interactions.probability"
    if tables.split_column:
        columns["split"] = f"({split_place('interactions.split')})::TINYINT"
    columns |= {flag: f"interactions.{flag}" for flag in flags(tables.requests)}
    values = ", ".join(f"{sql} AS {name}" for name, sql in columns.items())
    ranked = (
        f"SELECT ranks.rank, interactions.time_us, {values} FROM interactions "
        "JOIN ranks ON interactions.user_id = ranks.user_id "
        "JOIN items ON interactions.item_id = items.source_id"
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
