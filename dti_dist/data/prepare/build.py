"""Group, sort and split interactions into user sequences with DuckDB: one machine, out of core.

DuckDB reads, checks, joins and sorts, and spills to disk what its memory limit does not hold. The
sorted interactions flow once through Python, a bounded number of users at a time, where whole
histories are cut into the splits' sequences with numpy and written.
"""

from __future__ import annotations

import math
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import duckdb
import numpy as np
import pyarrow as pa
from sklearn.metrics import roc_auc_score

from dti_dist.console import progress, say
from dti_dist.data import storage
from dti_dist.data.dataset import Manifest, SplitRule, item_schema
from dti_dist.data.prepare.split import (
    Histories,
    cut_sequences,
    inside,
    positions,
    target_ranges,
)
from dti_dist.data.prepare.writer import DatasetWriter
from dti_dist.errors import UserError

# About 30 bytes each in Python: enough to make numpy's overhead vanish, little to hold in memory.
_INTERACTIONS_AT_A_TIME = 1 << 20
_FEWEST_INTERACTIONS = 2


@dataclass(frozen=True)
class BuildOptions:
    """How a data set is built; see ``dti-dist prepare events --help``.

    ``fractions`` of the interactions go to train, valid and test under the rule ``time``.
    ``memory_limit`` is DuckDB's, e.g. "8GB" or "70%"; ``temp_directory`` is where it spills,
    by default beside a local output and in the system's temporary folder otherwise.
    """

    split: Literal["time", "leave-last"] = "time"
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    context_limit: int = 256
    shard_interactions: int = 2_000_000
    row_group_interactions: int = 65_536
    memory_limit: str = "70%"
    threads: int | None = None
    temp_directory: str | None = None
    force: bool = False

    def __post_init__(self) -> None:
        total = sum(self.fractions)
        if len(self.fractions) != 3 or min(self.fractions) <= 0 or not math.isclose(total, 1):
            raise UserError(
                "fractions: expected three positive numbers (train, valid, test) that add up to "
                f"1, e.g. 0.8,0.1,0.1; found {', '.join(f'{f:g}' for f in self.fractions)}, which "
                f"add up to {total:g}."
            )
        for name in ("context_limit", "shard_interactions", "row_group_interactions"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: expected at least 1, found {getattr(self, name)}.")


@dataclass(frozen=True)
class Workspace:
    """A DuckDB connection, and a scratch folder that is removed at the end."""

    connection: duckdb.DuckDBPyConnection
    folder: Path


@dataclass(frozen=True)
class Source:
    """What a source hands to the engine.

    Attributes:
        name: of the data set, for people.
        events: a SELECT that gives, in input order, user_id, item_id (strings), time_us
            (microseconds since epoch), label (boolean or number) and, where it is known, the
            click's true probability.
        items: a SELECT that gives source_id and the text columns, all strings.
        text_columns: their names.
        description: what ``dataset.json`` says under ``source``.
        notes: lines for the summary.
    """

    name: str
    events: str
    items: str
    text_columns: list[str]
    description: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Summary:
    """What was built. ``str()`` of it is for people."""

    uri: str
    manifest: Manifest
    interactions_per_user: tuple[int, int, int, int]  # min, median, 90th percentile, max
    notes: list[str]
    seconds: float

    def __str__(self) -> str:
        manifest, counts = self.manifest, self.manifest.counts
        least, median, p90, most = self.interactions_per_user
        lines = [
            f"{manifest.name}: {counts.interactions:,} interactions of {counts.users:,} users "
            f"with {counts.items:,} items, label rate {manifest.label_rate:.4f}",
            f"interactions per user: min {least:,}, median {median:,}, 90 % at most {p90:,}, "
            f"max {most:,}",
            "",
            f"{'split':<6} {'sequences':>11} {'targets':>13} {'label rate':>11}   "
            "first and last target",
        ]
        for split, found in counts.splits.items():
            lines.append(
                f"{split:<6} {found.rows:>11,} {found.targets:>13,} "
                f"{found.clicks / found.targets:>11.4f}   "
                f"{_date(found.first_timestamp)} … {_date(found.last_timestamp)}"
            )
        size = sum(entry.bytes for entry in manifest.files.values()) / 1e6
        lines += ["", *(f"note: {note}" for note in self.notes)]
        lines.append(
            f"wrote {len(manifest.files)} files, {size:,.1f} MB, in {self.seconds:.1f} s: "
            f"{self.uri}"
        )
        return "\n".join(lines)


def build_dataset(
    read_source: Callable[[Workspace], Source], out_uri: str, options: BuildOptions
) -> Summary:
    """Build a prepared data set and publish it at ``out_uri`` when it is complete.

    Raises UserError, and publishes nothing, for an existing target without ``force``, for input
    that breaks what Source promises, and for an empty split.
    """
    started = time.monotonic()
    with (
        storage.publish_folder(out_uri, options.force) as staging,
        _open_workspace(out_uri, options) as workspace,
    ):
        source = read_source(workspace)
        connection = workspace.connection
        _load_items(connection, source)
        _load_events(connection, source)
        per_user, left_out = _rank_users(connection, source)
        rule = _split_rule(connection, options)
        with DatasetWriter(
            staging, options.shard_interactions, options.row_group_interactions
        ) as writer:
            texts = source.text_columns
            writer.write_items(_item_batches(connection, texts), texts)
            disorder, ceiling = _write_sequences(connection, writer, rule, options.context_limit)
            _refuse_empty_split(connection, writer, rule)
            manifest = writer.finish(
                name=source.name,
                users=per_user["users"],
                users_left_out=left_out["users"],
                interactions_left_out=left_out["interactions"],
                context_limit=options.context_limit,
                split=rule,
                item_text_columns=texts,
                source=source.description | ({"ceiling": ceiling} if ceiling else {}),
            )
    notes = list(source.notes)
    if disorder:
        notes.append(f"interactions out of time order in the input, now sorted: {disorder:,}")
    if left_out["users"]:
        notes.append(
            f"users left out, for they have fewer than {_FEWEST_INTERACTIONS} interactions: "
            f"{left_out['users']:,}"
        )
    if ceiling:
        known = ", ".join(f"{split} {auc:.4f}" for split, auc in ceiling.items())
        notes.append(f"AUC of the true click probabilities, which no model can beat: {known}")
    quantiles = (per_user["least"], per_user["median"], per_user["p90"], per_user["most"])
    return Summary(out_uri, manifest, quantiles, notes, time.monotonic() - started)


@contextmanager
def sql_errors(doing: str) -> Iterator[None]:
    """Turn DuckDB's errors into UserErrors: what failed, and DuckDB's own short reason."""
    try:
        yield
    except duckdb.OutOfMemoryException as error:
        raise UserError(
            f"{doing} ran out of memory or disk: {short_reason(error)}. Raise --memory-limit, "
            "lower --threads, or free disk space beside the output."
        ) from error
    except duckdb.Error as error:
        raise UserError(f"{doing} failed: {short_reason(error)}") from error


def short_reason(error: Exception) -> str:
    """The first line of DuckDB's message, without the name of its kind."""
    first = str(error).strip().split("\n")[0]
    return re.sub(r"^[A-Z][A-Za-z ]*Error: ", "", first)


def quote(name: str) -> str:
    """An SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


@contextmanager
def _open_workspace(out_uri: str, options: BuildOptions) -> Iterator[Workspace]:
    beside = options.temp_directory
    if beside is None and storage.is_local(out_uri):
        beside = storage.parent_and_name(out_uri)[0]
    if beside is not None:
        Path(beside).mkdir(parents=True, exist_ok=True)
    name = storage.parent_and_name(out_uri)[1]
    with tempfile.TemporaryDirectory(prefix=f".{name}.work-", dir=beside) as folder:
        config: dict[str, Any] = {
            "memory_limit": options.memory_limit,
            "temp_directory": f"{folder}/spill",
        }
        if options.threads:
            config["threads"] = options.threads
        with sql_errors("starting DuckDB with --memory-limit and --threads as given"):
            connection = duckdb.connect(f"{folder}/work.duckdb", config=config)
            connection.execute("SET TimeZone = 'UTC'")  # for dates without a zone
        try:
            yield Workspace(connection, Path(folder))
        finally:
            connection.close()


def _row(connection: duckdb.DuckDBPyConnection, query: str) -> dict[str, Any]:
    """The only row of a query's result, by column name."""
    result = connection.sql(query)
    return dict(zip(result.columns, result.fetchall()[0], strict=True))


def _stream(connection: duckdb.DuckDBPyConnection, query: str, rows: int) -> pa.RecordBatchReader:
    """The result as record batches of at most so many rows, on a cursor of its own: DuckDB allows
    one unfinished result per cursor. Older releases call it fetch_record_batch."""
    relation = connection.cursor().sql(query)
    read = getattr(relation, "to_arrow_reader", None) or relation.fetch_record_batch
    return read(rows)


def _load_items(connection: duckdb.DuckDBPyConnection, source: Source) -> None:
    texts = source.text_columns
    if not texts or {"item_id", "source_id"} & set(texts):
        raise UserError(
            "item text columns: expected at least one, and none named item_id or source_id, which "
            f"the data set uses itself; found {', '.join(texts) or 'none'}."
        )
    with sql_errors(f"{source.name}: reading the item table"):
        columns = ", ".join(f"coalesce({quote(text)}, '') AS {quote(text)}" for text in texts)
        connection.execute(
            "CREATE TABLE items AS SELECT row_number() OVER (ORDER BY source_id) - 1 AS item_id, "
            f"source_id, {columns} FROM ({source.items})"
        )
        without_id = _row(
            connection, "SELECT count(*) AS items FROM items WHERE source_id IS NULL"
        )["items"]
        repeated = _row(
            connection,
            "SELECT count(*) AS ids, array_agg(source_id ORDER BY source_id)[:3] AS examples FROM "
            "(SELECT source_id FROM items GROUP BY source_id HAVING count(*) > 1)",
        )
    if without_id:
        raise UserError(
            f"{source.name}: expected an id for every row of the item table; {without_id:,} rows "
            "have none. Remove those rows."
        )
    if repeated["ids"]:
        raise UserError(
            f"{source.name}: expected one row per item in the item table; {repeated['ids']:,} ids "
            f"have several, e.g. {_listed(repeated['examples'])}. Remove the duplicates."
        )


def _load_events(connection: duckdb.DuckDBPyConnection, source: Source) -> None:
    """Make the table ``events``; its rowid is the input order."""
    with sql_errors(f"{source.name}: reading the interactions"):
        found = connection.sql(source.events)
        types = dict(zip(found.columns, map(str, found.types), strict=True))
    if not re.match(r"BOOL|U?[A-Z]*INT|FLOAT|DOUBLE|DECIMAL", types["label"]):
        raise UserError(
            f"{source.name}: expected the label to be a boolean, or a number that is 0 or 1; found "
            f'{types["label"]}. Use a comparison, e.g. --label "rating >= 4" or '
            "\"event = 'click'\"."
        )
    probability = ", probability" if "probability" in types else ""
    say(f"{source.name}: reading the interactions")
    with sql_errors(f"{source.name}: reading the interactions"):
        connection.execute(
            "CREATE TABLE events AS SELECT user_id, item_id, time_us, "
            "CAST(floor(time_us / 1000000) AS BIGINT) AS timestamp, "
            f"CAST(label AS DOUBLE) AS label{probability} FROM ({source.events})"
        )
    _check_events(connection, source)


def _check_events(connection: duckdb.DuckDBPyConnection, source: Source) -> None:
    if not _row(connection, "SELECT count(*) AS rows FROM events")["rows"]:
        raise UserError(
            f"{source.name}: expected interactions, found none: the input has no rows. Check the "
            "paths."
        )
    for column, what in [
        ("user_id", "a user"),
        ("item_id", "an item"),
        ("time_us", "a timestamp"),
        ("label", "a label"),
    ]:
        count, first = _offending(connection, f"{column} IS NULL")
        if count:
            raise UserError(
                f"{source.name}: expected {what} in every interaction; {count:,} have none (null)"
                f". The first is {_place(first)}. Remove or fill these rows, or check which column "
                "the command reads."
            )
    count, first = _offending(connection, "label NOT IN (0, 1)")
    if count:
        raise UserError(
            f"{source.name}: expected every label to be 0 or 1; {count:,} are not. The first is "
            f"{first['label']:g} in {_place(first)}. Use an expression that is true for a click, "
            'e.g. --label "rating >= 4".'
        )
    texts = ", ".join(quote(name) for name in source.text_columns)
    for condition, problem in [
        ("items.source_id IS NULL", "have an item with no row in the item table"),
        (
            f"trim(concat_ws('', {texts})) = ''",
            f"have an item with no text (null or blank in {texts})",
        ),
    ]:
        found = _row(
            connection,
            "SELECT sum(interactions) AS interactions, count(*) AS items, "
            "array_agg(item_id ORDER BY item_id)[:3] AS examples FROM (SELECT events.item_id, "
            "count(*) AS interactions FROM events LEFT JOIN items ON events.item_id = "
            f"items.source_id WHERE {condition} GROUP BY events.item_id)",
        )
        if found["items"]:
            raise UserError(
                f"{source.name}: {found['interactions']:,} interactions {problem}; "
                f"{found['items']:,} such items, e.g. {_listed(found['examples'])}. Add them to "
                "the item table, or remove their interactions."
            )


def _offending(connection: duckdb.DuckDBPyConnection, condition: str) -> tuple[int, dict[str, Any]]:
    """How many events meet the condition, and the first of them in input order."""
    found = _row(
        connection, f"SELECT count(*) AS rows, min(rowid) AS first FROM events WHERE {condition}"
    )
    if not found["rows"]:
        return 0, {}
    query = f"SELECT rowid + 1 AS number, * FROM events WHERE rowid = {found['first']}"
    return found["rows"], _row(connection, query)


def _place(event: dict[str, Any]) -> str:
    return f"interaction {event['number']:,} (user {event['user_id']}, item {event['item_id']})"


def _listed(names: list[str]) -> str:
    return ", ".join(repr(name) for name in names)


def _rank_users(
    connection: duckdb.DuckDBPyConnection, source: Source
) -> tuple[dict[str, int], dict[str, int]]:
    """Make the table ``users`` of those with enough interactions, ranked by the MD5 of their id.

    Gives the number of users and quantiles of their interactions, and what is left out.
    """
    with sql_errors("ranking the users"):
        connection.execute(
            "CREATE TABLE all_users AS SELECT user_id, count(*) AS interactions FROM events "
            "GROUP BY user_id"
        )
        connection.execute(
            "CREATE TABLE users AS SELECT *, row_number() OVER (ORDER BY md5(user_id), user_id) "
            f"AS rank FROM all_users WHERE interactions >= {_FEWEST_INTERACTIONS}"
        )
        per_user = _row(
            connection,
            "SELECT count(*) AS users, min(interactions) AS least, max(interactions) AS most, "
            "quantile_disc(interactions, 0.5) AS median, quantile_disc(interactions, 0.9) AS p90 "
            "FROM users",
        )
        left_out = _row(
            connection,
            "SELECT count(*) AS users, coalesce(sum(interactions), 0)::BIGINT AS interactions "
            f"FROM all_users WHERE interactions < {_FEWEST_INTERACTIONS}",
        )
    if not per_user["users"]:
        raise UserError(
            f"{source.name}: expected users with at least {_FEWEST_INTERACTIONS} interactions; all "
            f"{left_out['users']:,} users have fewer. Check the user column."
        )
    return per_user, left_out


def _split_rule(connection: duckdb.DuckDBPyConnection, options: BuildOptions) -> SplitRule:
    if options.split == "leave-last":
        return SplitRule(rule="leave-last")
    total = _row(connection, "SELECT sum(interactions)::BIGINT AS n FROM users")["n"]
    train, valid, _ = options.fractions
    # A boundary is the timestamp that has the nearest to the wanted number of interactions
    # before it; of two equally near, the earlier.
    nearest = "min(struct_pack(distance := abs(before - {}), timestamp := timestamp)).timestamp"
    with sql_errors("finding the split's boundaries"):
        boundaries = _row(
            connection,
            "WITH per_second AS (SELECT timestamp, count(*) AS n FROM events SEMI JOIN users "
            "USING (user_id) GROUP BY timestamp), cumulative AS (SELECT timestamp, "
            "sum(n) OVER (ORDER BY timestamp) - n AS before FROM per_second) "
            f"SELECT {nearest.format(round(total * train))} AS valid, "
            f"{nearest.format(round(total * (train + valid)))} AS test FROM cumulative",
        )
    return SplitRule(rule="time", fractions=options.fractions, boundaries=boundaries)


def _item_batches(
    connection: duckdb.DuckDBPyConnection, texts: list[str]
) -> Iterator[pa.RecordBatch]:
    schema = item_schema(texts)
    columns = ", ".join(quote(name) for name in schema.names)
    reader = _stream(connection, f"SELECT {columns} FROM items ORDER BY item_id", 65_536)
    for batch in reader:
        yield from pa.Table.from_batches([batch]).cast(schema).to_batches()


def _histories(connection: duckdb.DuckDBPyConnection) -> Iterator[Histories]:
    """All users' histories, in the order of rank."""
    probability = ""
    if "probability" in connection.table("events").columns:
        probability = ", probability"
    interactions = _Rows(
        _stream(
            connection,
            "SELECT items.item_id::INTEGER AS item_id, label::TINYINT AS label, timestamp, "
            f"events.rowid AS input_order{probability} FROM events "
            "JOIN users USING (user_id) JOIN items ON events.item_id = items.source_id "
            "ORDER BY users.rank, events.time_us, events.rowid",
            100_000,
        )
    )
    users = _stream(connection, "SELECT user_id, interactions FROM users ORDER BY rank", 10_000)
    for batch in users:
        lengths = np.asarray(batch["interactions"])
        ends = np.cumsum(lengths)
        start = 0
        while start < len(lengths):
            before = ends[start] - lengths[start]
            end = int(np.searchsorted(ends, before + _INTERACTIONS_AT_A_TIME, side="right"))
            end = max(end, start + 1)
            columns = interactions.take(int(ends[end - 1] - before))
            user_ids = batch["user_id"].slice(start, end - start)
            yield Histories(user_ids, lengths[start:end], columns)
            start = end


class _Rows:
    """Takes any number of rows from a stream of record batches."""

    def __init__(self, reader: pa.RecordBatchReader):
        self._reader = reader
        self._held = reader.schema.empty_table()

    def take(self, count: int) -> dict[str, np.ndarray]:
        tables = [self._held]
        missing = count - len(self._held)
        while missing > 0:
            batch = self._reader.read_next_batch()
            tables.append(pa.Table.from_batches([batch]))
            missing -= len(batch)
        rows = pa.concat_tables(tables)
        self._held = rows.slice(count)
        taken = rows.slice(0, count)
        return {name: taken[name].to_numpy() for name in taken.column_names}


def _write_sequences(
    connection: duckdb.DuckDBPyConnection,
    writer: DatasetWriter,
    rule: SplitRule,
    context_limit: int,
) -> tuple[int, dict[str, float] | None]:
    """Cut every history into the splits' sequences and write them.

    Gives the number of interactions that stood out of time order in the input, and the AUC of the
    true click probabilities on valid and test where they are known.
    """
    total = _row(connection, "SELECT sum(interactions)::BIGINT AS n FROM users")["n"]
    disorder = 0
    truths: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {"valid": [], "test": []}
    say(f"sorting {total:,} interactions")
    with (
        sql_errors("sorting the interactions"),
        progress("writing", total, "interactions") as bar,
    ):
        for histories in _histories(connection):
            position = positions(histories.lengths)
            order = histories.columns["input_order"]
            disorder += int(np.count_nonzero((np.diff(order) < 0) & (position[1:] > 0)))
            for split, begin, end in target_ranges(histories, rule):
                writer.write_sequences(split, cut_sequences(histories, begin, end, context_limit))
                if "probability" in histories.columns and split in truths:
                    targets = inside(histories, begin, end)
                    truths[split].append(
                        (
                            histories.columns["label"][targets],
                            histories.columns["probability"][targets],
                        )
                    )
            bar.advance(len(order))
    ceiling = {
        split: float(roc_auc_score(*map(np.concatenate, zip(*found, strict=True))))
        for split, found in truths.items()
        if found and 0 < writer.splits[split].clicks < writer.splits[split].targets
    }
    return disorder, ceiling or None


def _refuse_empty_split(
    connection: duckdb.DuckDBPyConnection, writer: DatasetWriter, rule: SplitRule
) -> None:
    empty = [split for split, counts in writer.splits.items() if not counts.rows]
    if not empty:
        return
    if rule.boundaries is None:
        raise UserError(
            f"the split {', '.join(empty)} is empty: leave-last gives train all but a user's last "
            "two interactions, and no user has three. Use --split time, or more data."
        )
    span = _row(connection, "SELECT min(timestamp) AS first, max(timestamp) AS last FROM events")
    raise UserError(
        f"the split {', '.join(empty)} is empty: timestamps run from {_date(span['first'])} to "
        f"{_date(span['last'])}, valid begins at {_date(rule.boundaries['valid'])} and test at "
        f"{_date(rule.boundaries['test'])}, and equal timestamps can't be parted. Change "
        "--fractions, check the time column, or use --split leave-last."
    )


def _date(timestamp: int | None) -> str:
    if timestamp is None:
        return "never"
    try:
        return datetime.fromtimestamp(timestamp, timezone.utc).strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return f"timestamp {timestamp}"
