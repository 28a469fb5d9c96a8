"""Group, sort and split interactions with Spark, on the cluster of whoever runs it.

The data set equals DuckDB's for the same input, file for file: the same items and ids, rows, row
groups and parts, counts and statistics. With the same release of pyarrow on driver and executors
the files are the same bytes; ``source`` in ``dataset.json`` names the input in both.

- Each executor task reads whole files of interactions, by DuckDB and the same SELECT as on one
  machine: the label is the same SQL, and the place of a row in its file orders equal times. So
  input of many files is read by many tasks, and one large file by one.
- The item table goes through DuckDB on the driver, out of core. Of the interactions the driver
  sees sums alone, and each user's id and number of interactions, which stream through it: from
  them it finds where the parts begin.
- Spark sorts interactions into histories; tasks cut these with numpy, Spark sorts the sequences
  into parts, and tasks write them, a part in one task.

Executors need this package, and ``--out`` where both they and the driver can write.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import posixpath
import re
import shutil
import sys
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from itertools import pairwise
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dti_dist.console import say
from dti_dist.data import storage
from dti_dist.data.dataset import SEQUENCE_SCHEMA, SPLITS, FileEntry, SplitCounts, SplitRule
from dti_dist.data.prepare.build import (
    BuildOptions,
    DuckTables,
    FileScan,
    Source,
    Summary,
    events_query,
    item_batches,
    load_items,
    manifest_fields,
    summary_notes,
    workspace_beside,
)
from dti_dist.data.prepare.events import READING_TIMES
from dti_dist.data.prepare.split import (
    Histories,
    cut_sequences,
    disorder,
    sequence_starts,
    target_ranges,
)
from dti_dist.data.prepare.tables import (
    UserCounts,
    check_events,
    choose_split,
    count_days,
    count_users,
    item_sizes_select,
    read_statistics,
    refuse_empty_split,
)
from dti_dist.data.prepare.writer import (
    Cutter,
    DatasetWriter,
    FolderWriter,
    add_counts,
    count_targets,
    make_manifest,
    sequence_lengths,
    write_manifest,
)
from dti_dist.errors import UserError
from dti_dist.sql import SET_UTC, sql_errors, stream

# An interaction's place in the input: its file's number, and its row in a file of fewer than 2^40.
_ROW_BITS = 40
_ROWS_AT_A_TIME = 100_000
_INTERACTIONS_AT_A_TIME = 1 << 18
_EVENT_SCHEMA = pa.schema(
    [
        ("user_id", pa.string()),
        ("item_id", pa.string()),
        ("time_us", pa.int64()),
        ("timestamp", pa.int64()),
        ("label", pa.float64()),
        ("input_order", pa.int64()),
    ]
)
_ITEM_SCHEMA = pa.schema(
    [
        ("item_id", pa.int64()),
        ("source_id", pa.string()),
        ("blank", pa.bool_()),
        ("characters", pa.int64()),
        ("words", pa.int64()),
    ]
)
# A sequence, the part it belongs to, and what its task found out of order.
_PLACED_SCHEMA = pa.schema(
    [
        ("split", pa.string()),
        ("part", pa.int32()),
        ("out_of_order", pa.int64()),
        *SEQUENCE_SCHEMA,
    ]
)
_SPARK_TYPES = {
    pa.string(): "string",
    pa.bool_(): "boolean",
    pa.int8(): "tinyint",
    pa.int32(): "int",
    pa.int64(): "bigint",
    pa.float64(): "double",
}

Key = tuple[str, str]  # MD5 of the user's id, and the id: the order of rows
Batches = Iterable[pa.RecordBatch]


def build_with_spark(
    read_source: Callable[..., Source],
    out_uri: str,
    options: BuildOptions,
    master: str | None = None,
) -> Summary:
    """Build a prepared data set as ``build_dataset`` does, on Spark.

    ``read_source`` also takes ``extreme``, see ``read_events``. ``master`` is Spark's, by default
    that of the environment or of spark-submit.

    Raises UserError as ``build_dataset``, and where PySpark or Java is missing.
    """
    started = time.monotonic()
    with (
        _session(master) as spark,
        storage.publish_folder(out_uri, options.force) as staging,
        workspace_beside(out_uri, options) as workspace,
        ExitStack() as stack,
    ):
        source = read_source(workspace, extreme=_SparkExtreme(spark))
        duck = DuckTables(workspace, source)
        load_items(duck, source)
        scan = source.event_files
        if scan is None:
            raise UserError(
                f"{source.name}: --engine spark reads event files; use --engine duckdb."
            )
        query = events_query(duck, source, "{}")
        with DatasetWriter(
            staging, options.shard_interactions, options.row_group_interactions
        ) as writer:
            writer.write_items(item_batches(duck), source.text_columns)
        tables = stack.enter_context(closing(_SparkTables(spark, source)))
        say(f"{source.name}: reading the interactions")
        tables.scan("events", scan, query, _EVENT_SCHEMA)
        parts = tuple(storage.join(staging, path) for path in sorted(writer.files))
        sizes = FileScan(item_sizes_select(source.text_columns), "read_parquet", parts)
        tables.scan("item_sizes", sizes, "SELECT * FROM ({})", _ITEM_SCHEMA)
        check_events(tables)
        users = count_users(tables)
        days = count_days(tables, users.kept_events)
        rule = choose_split(tables, options.split, options.fractions, days, users.kept_events)
        say(f"sorting {users.interactions:,} interactions")
        plan = _plan_parts(tables, users, rule, options)
        refuse_empty_split([split for split in SPLITS if not plan[split]], rule, days)
        out_of_order, splits = _write_parts(
            tables, users, rule, options, plan, staging, writer.files
        )
        manifest = make_manifest(
            writer.items,
            splits,
            writer.files,
            users=users.users,
            split=rule,
            statistics=read_statistics(tables, users.per_user, days),
            **manifest_fields(source, options, users, {}),
        )
        write_manifest(staging, manifest)
    notes = summary_notes(source, users, out_of_order, {})
    return Summary(out_uri, manifest, notes, time.monotonic() - started)


# --- the session ----------------------------------------------------------------------------


@contextmanager
def _session(master: str | None) -> Iterator[Any]:
    """A session with views of its own, in the context that is there or in a new one."""
    missing = [name for name in ("pyspark", "pandas") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"--engine spark: expected PySpark and what it needs; {' and '.join(missing)} is not "
            "installed. Install the extra: pip install 'dti-dist[spark]'"
        )
    from pyspark import SparkContext
    from pyspark.sql import SparkSession

    running = SparkContext._active_spark_context is not None
    submitted = "PYSPARK_GATEWAY_PORT" in os.environ
    if not (running or submitted or os.environ.get("JAVA_HOME") or shutil.which("java")):
        raise UserError(
            "--engine spark: expected Java, which Spark runs on; found no java on PATH and no "
            "JAVA_HOME. Install Java 17 or newer, e.g. apt install openjdk-17-jre-headless, or use "
            "--engine duckdb."
        )
    if (master or "local").startswith("local"):
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    builder = SparkSession.builder.appName("dti-dist prepare")
    if not running:
        builder = builder.config("spark.log.level", "ERROR")
        if master:
            builder = builder.master(master)
    root = builder.getOrCreate()
    try:
        yield root.newSession()
    finally:
        if not running:
            root.stop()


@contextmanager
def _task_errors() -> Iterator[None]:
    """Bring a UserError that a task raised back as one."""
    from pyspark.errors import PythonException

    try:
        yield
    except PythonException as error:
        name = re.escape(f"{UserError.__module__}.{UserError.__qualname__}")
        if told := re.findall(rf"^{name}: (.*)$", str(error), flags=re.MULTILINE):
            raise UserError(told[-1]) from error
        if missing := re.findall(r"^ModuleNotFoundError: (.*)$", str(error), flags=re.MULTILINE):
            raise UserError(
                f"--engine spark: expected dti-dist in the Python of the executors; found: "
                f"{missing[-1]}. Install it there, or set PYSPARK_PYTHON to a Python that has it."
            ) from error
        raise


def _schema(arrow: pa.Schema) -> str:
    """The same in Spark's words."""

    def name(kind: pa.DataType) -> str:
        if pa.types.is_list(kind):
            return f"array<{_SPARK_TYPES[kind.value_type]}>"
        return _SPARK_TYPES[kind]

    return ", ".join(f"`{field.name}` {name(field.type)}" for field in arrow)


def _files(spark: Any, files: tuple[str, ...]) -> Any:
    """A frame of file numbers and names, each in a partition of its own."""
    rows = spark.sparkContext.parallelize(list(enumerate(files)), len(files))
    return spark.createDataFrame(rows, "number bigint, file string")


# --- tables ---------------------------------------------------------------------------------


class _SparkTables:
    """The raw interactions as views of Spark; see Tables."""

    def __init__(self, spark: Any, source: Source):
        self.spark = spark
        self.name, self.text_columns = source.name, source.text_columns
        self._kept: list[Any] = []

    def close(self) -> None:
        for frame in self._kept:
            frame.unpersist()

    def rows(self, query: str, doing: str) -> list[dict[str, Any]]:
        with _task_errors():
            return [row.asDict() for row in self.spark.sql(query).collect()]

    def create(self, table: str, query: str, doing: str) -> None:
        self._keep(table, self.spark.sql(query))

    def input_number(self, input_order: int) -> int:
        (found,) = self.rows(
            f"SELECT count(*) AS before FROM events WHERE input_order < {input_order}", ""
        )
        return found["before"] + 1

    def scan(self, table: str, scan: FileScan, query: str, schema: pa.Schema) -> None:
        """Make a table of what ``query`` selects of the scan ``{}`` of each file."""
        read = _Read(scan, query, schema, f"{self.name}: reading the interactions")
        self._keep(table, _files(self.spark, scan.files).mapInArrow(read, _schema(schema)))

    def _keep(self, table: str, frame: Any) -> None:
        from pyspark import StorageLevel

        self._kept.append(frame.persist(StorageLevel.DISK_ONLY))
        frame.createOrReplaceTempView(table)


class _SparkExtreme:
    """A scan's smallest or largest value over all files; see ``read_events``."""

    def __init__(self, spark: Any):
        self._spark = spark

    def __call__(self, scan: FileScan, pick: Callable[[list[Any]], Any]) -> Any:
        with _task_errors():
            found = _files(self._spark, scan.files).mapInArrow(_ReadOne(scan), "value string")
            values = [json.loads(row.value) for row in found.collect()]
        values = [value for value in values if value is not None]
        return pick(values) if values else None


# --- what tasks do: instances of these travel to the executors ------------------------------


def _connect(file: str) -> duckdb.DuckDBPyConnection:
    connection = duckdb.connect(config={"threads": 1, "memory_limit": "1GB"})
    connection.execute(SET_UTC)
    if not storage.is_local(file):
        connection.register_filesystem(storage.filesystem(file)[0])
    return connection


class _Read:
    """Reads files in the order of their rows."""

    def __init__(self, scan: FileScan, query: str, schema: pa.Schema, doing: str):
        self._scan, self._query, self._schema, self._doing = scan, query, schema, doing

    def __call__(self, batches: Batches) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for number, file in zip(*batch.to_pydict().values(), strict=True):
                yield from self._file(number, file)

    def _file(self, number: int, file: str) -> Iterator[pa.RecordBatch]:
        query = self._query.replace("{}", self._scan.query((file,)), 1)
        row = number << _ROW_BITS
        with sql_errors(self._doing):
            for batch in stream(_connect(file), query, _ROWS_AT_A_TIME):
                table = pa.Table.from_batches([batch])
                if "input_order" in self._schema.names:
                    order = pa.array(np.arange(row, row + len(table)))
                    table = table.append_column("input_order", order)
                row += len(table)
                yield from table.select(self._schema.names).cast(self._schema).to_batches()


class _ReadOne:
    """Gives, as JSON, the one value that a scan finds in each file."""

    def __init__(self, scan: FileScan):
        self._scan = scan

    def __call__(self, batches: Batches) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            values = []
            for file in batch["file"].to_pylist():
                with sql_errors(READING_TIMES):
                    query = self._scan.query((file,))
                    values.append(json.dumps(_connect(file).sql(query).fetchall()[0][0]))
            yield pa.RecordBatch.from_pydict({"value": pa.array(values, pa.string())})


def _serialise(batches: Batches) -> Iterator[pa.RecordBatch]:
    """Each batch as one value: many rows reach the driver as fast as their bytes."""
    for batch in batches:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch)
        yield pa.RecordBatch.from_pydict({"rows": [sink.getvalue().to_pybytes()]})


class _Cut:
    """Cuts interactions, sorted by user, time and place in the input, into sequences of parts."""

    def __init__(
        self,
        rule: SplitRule,
        context_limit: int,
        plan: dict[str, list[Key]],
        at_a_time: int = _INTERACTIONS_AT_A_TIME,
    ):
        self._rule, self._context_limit, self._plan = rule, context_limit, plan
        self._at_a_time = at_a_time

    def __call__(self, batches: Batches) -> Iterator[pa.RecordBatch]:
        held: list[pa.RecordBatch] = []
        for batch in batches:
            held.append(batch)
            if sum(map(len, held)) >= self._at_a_time:
                rows = pa.Table.from_batches(held).combine_chunks()
                # The last user may have more interactions in the next batch.
                last = int(_starts(rows)[-1])
                if last:
                    yield from self._sequences(rows.slice(0, last))
                held = rows.slice(last).to_batches()
        if held:
            yield from self._sequences(pa.Table.from_batches(held).combine_chunks())

    def _sequences(self, rows: pa.Table) -> Iterator[pa.RecordBatch]:
        starts = _starts(rows)
        histories = Histories(
            user_ids=rows["user_id"].take(pa.array(starts)).combine_chunks(),
            lengths=np.diff([*starts, len(rows)]),
            columns={
                name: rows[name].to_numpy()
                for name in ("item_id", "label", "timestamp", "input_order")
            },
        )
        out_of_order = disorder(histories)
        for split, begin, end in target_ranges(histories, self._rule):
            batch = cut_sequences(histories, begin, end, self._context_limit)
            if not len(batch):
                continue
            parts = [
                bisect_right(self._plan[split], _key(user)) - 1
                for user in batch["user_id"].to_pylist()
            ]
            found = np.zeros(len(batch), dtype=np.int64)
            found[0], out_of_order = out_of_order, 0
            yield pa.RecordBatch.from_arrays(
                [
                    pa.array([split] * len(batch)),
                    pa.array(parts, type=pa.int32()),
                    pa.array(found),
                    *batch.columns,
                ],
                schema=_PLACED_SCHEMA,
            )


def _starts(rows: pa.Table) -> np.ndarray:
    """[users] the first row of each user in rows sorted by user."""
    users = rows["user_id"].combine_chunks()
    changes = np.asarray(pc.not_equal(users.slice(1), users.slice(0, len(users) - 1)))
    return np.concatenate([[0], np.flatnonzero(changes) + 1])


def _key(user: str) -> Key:
    return hashlib.md5(user.encode(), usedforsecurity=False).hexdigest(), user


class _Write:
    """Writes parts from sequences sorted by split, part and key, and gives a report of each."""

    def __init__(self, uri: str, shard_interactions: int, row_group_interactions: int):
        self._uri = uri
        self._limits = (shard_interactions, row_group_interactions)

    def __call__(self, batches: Batches) -> Iterator[pa.RecordBatch]:
        part: _Part | None = None
        for batch in filter(len, batches):
            splits, parts = batch["split"].to_pylist(), batch["part"].to_pylist()
            places = list(zip(splits, parts, strict=True))
            changes = [n for n, (one, two) in enumerate(pairwise(places), 1) if one != two]
            for start, end in pairwise([0, *changes, len(batch)]):
                if part is None or part.place != places[start]:
                    if part is not None:
                        yield part.finish()
                    part = _Part(self._uri, places[start], self._limits)
                part.write(batch.slice(start, end - start))
        if part is not None:
            yield part.finish()


class _Part:
    """One part under way. Another attempt at the same task may write it too: it appears when it is
    whole."""

    def __init__(self, uri: str, place: tuple[str, int], limits: tuple[int, int]):
        self.place = place
        self._files: dict[str, FileEntry] = {}
        split, number = place
        self._writer = FolderWriter(
            uri, split, SEQUENCE_SCHEMA, Cutter(*limits), self._files, number
        )
        self._counts, self._out_of_order = SplitCounts(), 0

    def write(self, batch: pa.RecordBatch) -> None:
        rows = pa.Table.from_batches([batch]).select(SEQUENCE_SCHEMA.names).cast(SEQUENCE_SCHEMA)
        (sequences,) = rows.combine_chunks().to_batches()
        self._counts = add_counts(self._counts, count_targets(sequences))
        self._out_of_order += pc.sum(batch["out_of_order"]).as_py()
        self._writer.write(sequences, sequence_lengths(sequences))

    def finish(self) -> pa.RecordBatch:
        self._writer.close()
        ((path, entry),) = self._files.items()
        report = {
            "path": path,
            "split": self.place[0],
            "entry": entry.model_dump(),
            "counts": self._counts.model_dump(),
            "out_of_order": self._out_of_order,
        }
        return pa.RecordBatch.from_pydict({"report": [json.dumps(report)]})


# --- the sorts ------------------------------------------------------------------------------


def _plan_parts(
    tables: _SparkTables, users: UserCounts, rule: SplitRule, options: BuildOptions
) -> dict[str, list[Key]]:
    """The key of the first row of each part, by split."""
    if rule.boundaries is None:
        bounds = (
            "SELECT user_id, interactions, interactions - 2 AS valid, interactions - 1 AS test "
            "FROM users"
        )
    else:
        before = ", ".join(
            f"count(CASE WHEN timestamp < {rule.boundaries[split]} THEN 1 END) AS {split}"
            for split in ("valid", "test")
        )
        bounds = (
            f"SELECT user_id, count(*) AS interactions, {before} FROM {users.kept_events} "
            "GROUP BY user_id"
        )
    ordered = tables.spark.sql(f"SELECT * FROM ({bounds}) ORDER BY md5(user_id), user_id")
    limits = (options.shard_interactions, options.row_group_interactions)
    planners = {split: _Planner(Cutter(*limits)) for split in SPLITS}
    for row in ordered.mapInArrow(_serialise, "rows binary").toLocalIterator():
        batch = pa.ipc.open_stream(row.rows).read_all()
        ends = [np.asarray(batch[name]) for name in ("valid", "test", "interactions")]
        begins = [np.zeros_like(ends[0]), *ends[:-1]]
        for split, begin, end in zip(SPLITS, begins, ends, strict=True):
            weights = end - sequence_starts(begin, end, options.context_limit)
            planners[split].feed(batch["user_id"].combine_chunks(), weights)
    return {split: planner.finish() for split, planner in planners.items()}


class _Planner:
    """Follows one split's rows, and keeps the keys at which parts begin."""

    def __init__(self, cutter: Cutter):
        self._cutter = cutter
        self._waiting = pa.array([], pa.string())
        self._keys: list[Key] = []

    def feed(self, user_ids: pa.StringArray, weights: np.ndarray) -> None:
        """[users] in order; those of weight 0 have no row."""
        has_row = weights > 0
        users = user_ids.filter(pa.array(has_row))
        self._waiting = pa.concat_arrays([self._waiting, users])
        self._follow(self._cutter.feed(weights[has_row]))

    def finish(self) -> list[Key]:
        self._follow(self._cutter.finish())
        return self._keys

    def _follow(self, groups: Iterable[Any]) -> None:
        start = 0
        for group in groups:
            if group.opens_part:
                self._keys.append(_key(self._waiting[start].as_py()))
            start += group.rows
        self._waiting = self._waiting.slice(start)


def _write_parts(
    tables: _SparkTables,
    users: UserCounts,
    rule: SplitRule,
    options: BuildOptions,
    plan: dict[str, list[Key]],
    staging: str,
    files: dict[str, FileEntry],
) -> tuple[int, dict[str, SplitCounts]]:
    """Write all sequences and enter the parts in ``files``. Gives the number of interactions out
    of order, and the counts."""
    interactions = tables.spark.sql(
        "SELECT user_id, CAST(item_sizes.item_id AS INT) AS item_id, CAST(label AS TINYINT) AS "
        "label, timestamp, time_us, input_order FROM (SELECT events.user_id, events.item_id AS "
        f"source_id, label, timestamp, time_us, input_order FROM {users.kept_events}) AS kept "
        "JOIN item_sizes USING (source_id)"
    )
    sequences = (
        interactions.repartition("user_id")
        .sortWithinPartitions("user_id", "time_us", "input_order")
        .mapInArrow(_Cut(rule, options.context_limit, plan), _schema(_PLACED_SCHEMA))
    )
    parts = sum(map(len, plan.values()))
    write = _Write(staging, options.shard_interactions, options.row_group_interactions)
    written = (
        sequences.selectExpr("*", "md5(user_id) AS md5")
        .repartition(parts, "split", "part")
        .sortWithinPartitions("split", "part", "md5", "user_id")
        .drop("md5")
        .mapInArrow(write, "report string")
    )
    with _task_errors():
        reports = [json.loads(row.report) for row in written.collect()]
    splits = {split: SplitCounts() for split in SPLITS}
    found = storage.list_files(staging)
    for path in found:
        if posixpath.basename(path).startswith("."):  # of an attempt that was killed
            storage.remove(storage.join(staging, path))
    for report in reports:
        entry = FileEntry(**report["entry"])
        if found.get(report["path"]) != entry.bytes:
            raise UserError(
                f"{staging}: expected {report['path']} of {entry.bytes:,} bytes, which an executor "
                f"wrote; found {found.get(report['path'], 'no such file')}. Give an --out that the "
                "driver and all executors share, such as an object store."
            )
        files[report["path"]] = entry
        splits[report["split"]] = add_counts(
            splits[report["split"]], SplitCounts(**report["counts"])
        )
    if len(reports) != parts:
        raise RuntimeError(f"expected {parts} parts, found {len(reports)}: {sorted(files)}")
    return sum(report["out_of_order"] for report in reports), splits
