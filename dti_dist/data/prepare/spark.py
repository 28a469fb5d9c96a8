"""Group, sort and split interactions on a Spark cluster.

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
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from itertools import groupby, pairwise
from operator import itemgetter
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dti_dist.console import say
from dti_dist.data import storage
from dti_dist.data.dataset import (
    SPLITS,
    FileEntry,
    InteractionRules,
    SplitCounts,
    SplitRule,
    profile_schema,
    sequence_schema,
)
from dti_dist.data.prepare.build import (
    BuildOptions,
    Summary,
    build_dataset,
)
from dti_dist.data.prepare.columns import kept_values
from dti_dist.data.prepare.duck import DuckTables, events_query
from dti_dist.data.prepare.findings import Findings
from dti_dist.data.prepare.input_table import FileScan
from dti_dist.data.prepare.items import is_blank
from dti_dist.data.prepare.source import Source
from dti_dist.data.prepare.split import (
    Histories,
    context_lengths,
    cut_sequences,
    target_ranges,
)
from dti_dist.data.prepare.tables import (
    UserCounts,
    before_split,
)
from dti_dist.data.prepare.users import or_empty, told_profiles
from dti_dist.data.prepare.writer import Cutter, DatasetWriter
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
_ARROW_TYPES = {
    "condition": pa.bool_(),
    "label": pa.float64(),
    "number": pa.float64(),
    "text": pa.string(),
}
_ITEM_SCHEMA = pa.schema([("item_id", pa.int64()), ("source_id", pa.string())])
Key = tuple[str, str]  # MD5 of the user's id, and the id: the order of rows
Batches = Iterable[pa.RecordBatch]


def build_with_spark(
    read_source: Callable[..., Source],
    out_uri: str,
    options: BuildOptions,
    master: str | None = None,
) -> Summary:
    """Build a prepared data set as ``build_dataset`` does, on Spark.

    ``read_source`` also takes ``survey``, see ``read_events``. ``master`` is Spark's, by default
    that of the environment or of spark-submit.

    Raises UserError as ``build_dataset``, and where PySpark or Java is missing.
    """
    with _session(master) as spark, ExitStack() as stack:

        def read_events(duck: DuckTables, source: Source) -> _SparkTables:
            return stack.enter_context(closing(_SparkTables(spark, duck, source)))

        read = partial(read_source, survey=partial(_survey, spark))
        return build_dataset(read, out_uri, options, read_events)


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
        if found := re.findall(rf"^{name}: (.*)$", str(error), flags=re.MULTILINE):
            raise UserError(found[-1]) from error
        if missing := re.findall(r"^ModuleNotFoundError: (.*)$", str(error), flags=re.MULTILINE):
            raise UserError(
                f"--engine spark: expected dti-dist in the Python of the executors; found: "
                f"{missing[-1]}. Install it there, or set PYSPARK_PYTHON to a Python that has it."
            ) from error
        raise


# --- tables ---------------------------------------------------------------------------------


class _SparkTables:
    """The raw interactions as views of Spark; see Engine."""

    def __init__(self, spark: Any, duck: DuckTables, source: Source):
        self._spark, self._duck = spark, duck
        self.name, self.text_columns = source.name, source.text_columns
        self.split_column = source.split_column
        self.rules, self.columns = source.rules, source.columns
        self._persisted: list[Any] = []
        if source.event_files is None:
            raise UserError(f"{self.name}: --engine spark reads event files; use --engine duckdb.")
        self._event_files = [file for file, _ in source.event_files.files]
        self._user_files = source.user_files
        query = events_query(duck, source, "{}")
        say(f"{self.name}: reading the interactions")
        self._scan("events", source.event_files, query, _event_schema(self))

    def close(self) -> None:
        for frame in self._persisted:
            frame.unpersist()

    def rows(self, query: str, doing: str) -> list[dict[str, Any]]:
        with _task_errors():
            return [row.asDict() for row in self._spark.sql(query).collect()]

    def create(self, table: str, query: str, doing: str) -> None:
        self._persist(table, self._spark.sql(query))

    def define(self, table: str, query: str) -> None:
        self._spark.sql(query).createOrReplaceTempView(table)

    def bring(self, table: str, query: str, doing: str) -> None:
        for rows in _to_driver(self._spark.sql(query)):
            self._duck.add(table, rows, doing)

    def add(self, table: str, rows: pa.Table, doing: str) -> None:
        with _task_errors():
            frame = self._spark.createDataFrame(rows.to_pylist(), _spark_schema(rows.schema))
            frame.createOrReplaceTempView(table)

    def take_items(self, writer: DatasetWriter) -> None:
        written = (path for path in sorted(writer.files) if path.startswith("items/"))
        parts = tuple(storage.join(writer.uri, path) for path in written)
        scan = FileScan.of_parquet("SELECT *", parts)
        query = f"SELECT item_id, source_id FROM ({{}}) WHERE NOT {is_blank(self.text_columns)}"
        self._scan("told_items", scan, query, _ITEM_SCHEMA)

    def take_profiles(self, writer: DatasetWriter) -> None:
        texts = self.rules.user_text_columns
        assert self._user_files is not None, "the users' texts lie in files"
        users = pa.schema([("user_id", pa.string()), *((name, pa.string()) for name in texts)])
        query = f"SELECT user_id, {or_empty(texts)} FROM ({{}})"
        self._scan("given_users", self._user_files, query, users)
        written = (path for path in sorted(writer.files) if path.startswith("profiles/"))
        parts = tuple(storage.join(writer.uri, path) for path in written)
        scan = FileScan.of_parquet("SELECT *", parts)
        self._scan("profiles", scan, "SELECT * FROM ({})", profile_schema(texts))
        # Spark quotes names in another way than DuckDB.
        self.define("told_profiles", told_profiles(texts).replace('"', "`"))

    def place(self, input_order: int) -> str:
        number, row = divmod(input_order, 1 << _ROW_BITS)
        return f"row {row + 1:,} of {self._event_files[number]}"

    def _scan(self, table: str, scan: FileScan, query: str, schema: pa.Schema) -> None:
        """Make a table of what ``query`` selects of the scan ``{}`` of each file."""
        doing = f"{self.name}: reading the interactions"
        self._persist(table, _read_files(self._spark, scan, query, schema, doing))

    def _persist(self, table: str, frame: Any) -> None:
        from pyspark import StorageLevel

        self._persisted.append(frame.persist(StorageLevel.DISK_ONLY))
        frame.createOrReplaceTempView(table)

    def write_sequences(
        self, writer: DatasetWriter, users: UserCounts, rule: SplitRule, options: BuildOptions
    ) -> tuple[Findings, dict[str, dict[str, float]]]:
        limits = (options.shard_interactions, options.row_group_interactions)
        plan = self._plan_parts(users, rule, options.context_limit, limits)
        columns = ["timestamp", "time_us", "input_order"]
        kept = kept_values(self.columns, self.rules)
        values = [*columns, *(f"{sql} AS {name}" for name, sql in kept.items())]
        profile = joined = ""
        if self.rules.user_text_columns:
            profile = ", coalesce(profile, 0) AS profile"
            joined = " LEFT JOIN told_profiles USING (user_id)"
        interactions = self._spark.sql(
            "SELECT user_id, CAST(told_items.item_id AS INT) AS item_id, CAST(label AS TINYINT) AS "
            f"label, {', '.join([*columns, *kept])}{profile} FROM (SELECT interactions.user_id, "
            f"interactions.item_id AS source_id, label, {', '.join(values)} FROM "
            f"{users.kept_events}) AS kept JOIN told_items USING (source_id){joined}"
        )
        cut = partial(
            _cut,
            rule,
            self.rules,
            options.context_limit,
            plan,
            _INTERACTIONS_AT_A_TIME,
        )
        sequences = (
            interactions.repartition("user_id")
            .sortWithinPartitions("user_id", "time_us", "input_order")
            .mapInArrow(cut, _spark_schema(_placed_schema(self.rules)))
        )
        parts = sum(map(len, plan.values()))
        written = (
            sequences.selectExpr("*", "md5(user_id) AS md5")
            .repartition(parts, "split", "part")
            .sortWithinPartitions("split", "part", "md5", "user_id")
            .drop("md5")
            .mapInArrow(partial(_write, writer.uri, self.rules, limits), "report string")
        )
        with _task_errors():
            reports = [json.loads(row.report) for row in written.collect()]
        found = storage.list_files(writer.uri)
        for path in found:
            if posixpath.basename(path).startswith("."):  # of an attempt that was killed
                storage.remove(storage.join(writer.uri, path))
        for report in reports:
            path, entry = report["path"], FileEntry(**report["entry"])
            if found.get(path) != entry.bytes:
                raise UserError(
                    f"{writer.uri}: expected {path} of {entry.bytes:,} bytes, which an executor "
                    f"wrote; found {found.get(path, 'no such file')}. Give an --out that the "
                    "driver and all executors share, such as an object store."
                )
            writer.add_part(report["split"], path, entry, SplitCounts(**report["counts"]))
        if len(reports) != parts:
            raise RuntimeError(
                f"expected {parts} parts, found {len(reports)}: {sorted(writer.files)}"
            )
        findings = (Findings.from_json(report["findings"]) for report in reports)
        return sum(findings, Findings()), {}

    def _plan_parts(
        self, users: UserCounts, rule: SplitRule, context_limit: int, limits: tuple[int, int]
    ) -> dict[str, list[Key]]:
        """The key of the first row of each part, by split."""
        ordered = self._spark.sql(
            f"SELECT * FROM ({self._bounds(users, rule)}) ORDER BY md5(user_id), user_id"
        )
        planners = {split: _Planner(Cutter(*limits)) for split in SPLITS}
        for batch in _to_driver(ordered):
            ends = [np.asarray(batch[name]) for name in ("valid", "test", "interactions")]
            zeros = np.zeros_like(ends[0])
            begins = [zeros, *ends[:-1]]
            histories = [
                zeros,
                *(np.asarray(batch[f"history_{split}"]) for split in ("valid", "test")),
            ]
            for split, begin, end, history in zip(SPLITS, begins, ends, histories, strict=True):
                weights = end - begin + context_lengths(begin, end, history, context_limit)
                if split == "train":
                    weights -= np.asarray(batch["left_out"])
                planners[split].feed(batch["user_id"].combine_chunks(), weights)
        return {split: planner.finish() for split, planner in planners.items()}

    def _bounds(self, users: UserCounts, rule: SplitRule) -> str:
        """A SELECT of each user's interactions: all, those before valid and test, and those of
        them that are history."""
        if rule.rule == "leave-last" and self.rules.requests is None:
            valid, test = (f"greatest(interactions - {last}, 0)" for last in (2, 1))
            return (
                f"SELECT user_id, interactions, {valid} AS valid, {test} AS test, "
                f"{valid} AS history_valid, {test} AS history_test, 0 AS left_out FROM users"
            )
        interactions = users.kept_events
        if rule.rule == "leave-last":
            is_target = self._flag("is_target")
            # A user's last request with targets, and the one before: those before both are train's.
            last = (
                f"SELECT user_id, max(timestamp) AS test FROM {interactions} WHERE {is_target} "
                "GROUP BY user_id"
            )
            one_before = (
                f"SELECT user_id, max(timestamp) AS valid FROM {interactions} JOIN ({last}) AS "
                f"last USING (user_id) WHERE {is_target} AND timestamp < test GROUP BY user_id"
            )
            interactions = (
                f"{interactions} LEFT JOIN ({last}) AS last USING (user_id) LEFT JOIN "
                f"({one_before}) AS one_before USING (user_id)"
            )
            never = np.iinfo(np.int64).max
            before = {
                "valid": f"timestamp < coalesce(valid, test, {never})",
                "test": f"timestamp < coalesce(test, {never})",
            }
        else:
            before = {split: before_split(rule, split) for split in ("valid", "test")}
        is_history = self._flag("is_history")
        counts = ", ".join(
            f"count(CASE WHEN {before[split]} AND {condition} THEN 1 END) AS {name}"
            for split in ("valid", "test")
            for name, condition in [(split, "true"), (f"history_{split}", is_history)]
        )
        # What train leaves out: as split.left_out_of_train has it.
        left_out = "false"
        if is_kept := kept_values(self.columns, self.rules).get("is_kept"):
            left_out = f"{before['valid']} AND NOT ({is_kept}) AND NOT {is_history}"
        return (
            f"SELECT user_id, count(*) AS interactions, {counts}, "
            f"count(CASE WHEN {left_out} THEN 1 END) AS left_out FROM {interactions} "
            "GROUP BY user_id"
        )

    def _flag(self, name: str) -> str:
        """SQL for a condition of interactions, which holds for all where there is no column."""
        return name if name in {column.name for column in self.columns} else "true"


def _event_schema(tables: _SparkTables) -> pa.Schema:
    """Of ``events``; see Tables."""
    columns = [(column.name, _ARROW_TYPES[column.kind]) for column in tables.columns]
    return pa.schema([*_EVENT_SCHEMA, *columns])


def _placed_schema(rules: InteractionRules) -> pa.Schema:
    """Of a sequence, the part it belongs to, and what its task found (JSON, or nothing)."""
    place = [("split", pa.string()), ("part", pa.int32()), ("findings", pa.string())]
    return pa.schema([*place, *sequence_schema(rules)])


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


def _survey(spark: Any, scan: FileScan) -> list[dict[str, Any]]:
    """A scan's aggregates, of each file; see ``read_events``."""
    query = "SELECT to_json(found)::VARCHAR AS found FROM ({}) AS found"
    rows = _read_files(spark, scan, query, pa.schema([("found", pa.string())]), "reading")
    with _task_errors():
        return [json.loads(row.found) for row in rows.collect()]


def _read_files(spark: Any, scan: FileScan, query: str, schema: pa.Schema, doing: str) -> Any:
    """A DataFrame of what ``query`` selects of the scan ``{}`` of each file, a task for each."""
    tasks = [(n, file, alone.query()) for n, (file, alone) in enumerate(scan.one_by_one())]
    files = spark.sparkContext.parallelize(tasks, len(tasks))
    read = partial(_read, query, schema, doing)
    return spark.createDataFrame(files, "number bigint, file string, scan string").mapInArrow(
        read, _spark_schema(schema)
    )


def _to_driver(frame: Any) -> Iterator[pa.Table]:
    """The rows of a DataFrame, a part at a time."""
    for row in frame.mapInArrow(_serialise, "rows binary").toLocalIterator():
        yield pa.ipc.open_stream(row.rows).read_all()


def _spark_schema(schema: pa.Schema) -> Any:
    from pyspark.sql.pandas.types import from_arrow_schema

    return from_arrow_schema(schema)


# --- what tasks do --------------------------------------------------------------------------


def _read(query: str, schema: pa.Schema, doing: str, batches: Batches) -> Iterator[pa.RecordBatch]:
    """Reads files in the order of their rows."""
    for batch in batches:
        for number, file, scan in zip(*batch.to_pydict().values(), strict=True):
            row = number << _ROW_BITS
            connection = duckdb.connect(config={"threads": 1, "memory_limit": "1GB"})
            connection.execute(SET_UTC)
            storage.register(connection, file)
            with sql_errors(doing, where=file):
                select = query.replace("{}", scan, 1)
                for found in stream(connection, select, _ROWS_AT_A_TIME):
                    table = pa.Table.from_batches([found])
                    if "input_order" in schema.names:
                        order = pa.array(np.arange(row, row + len(table)))
                        table = table.append_column("input_order", order)
                    row += len(table)
                    yield from table.select(schema.names).cast(schema).to_batches()


def _serialise(batches: Batches) -> Iterator[pa.RecordBatch]:
    """Each batch as one value: many rows reach the driver as fast as their bytes."""
    for batch in batches:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch)
        yield pa.RecordBatch.from_pydict({"rows": [sink.getvalue().to_pybytes()]})


def _cut(
    rule: SplitRule,
    rules: InteractionRules,
    context_limit: int,
    plan: dict[str, list[Key]],
    at_a_time: int,
    batches: Batches,
) -> Iterator[pa.RecordBatch]:
    """Cuts interactions, sorted by user, time and place in the input, into sequences of parts."""
    held: list[pa.RecordBatch] = []
    for batch in batches:
        held.append(batch)
        if sum(map(len, held)) >= at_a_time:
            rows = pa.Table.from_batches(held).combine_chunks()
            # The last user may have more interactions in the next batch.
            last = int(_starts(rows)[-1])
            if last:
                yield from _sequences(rule, rules, context_limit, plan, rows.slice(0, last))
            held = rows.slice(last).to_batches()
    if held:
        rows = pa.Table.from_batches(held).combine_chunks()
        yield from _sequences(rule, rules, context_limit, plan, rows)


def _sequences(
    rule: SplitRule,
    rules: InteractionRules,
    context_limit: int,
    plan: dict[str, list[Key]],
    rows: pa.Table,
) -> Iterator[pa.RecordBatch]:
    starts = _starts(rows)
    histories = Histories(
        user_ids=rows["user_id"].take(pa.array(starts)).combine_chunks(),
        lengths=np.diff([*starts, len(rows)]),
        columns={
            name: rows[name].to_numpy()
            for name in rows.column_names
            if name not in ("user_id", "time_us")
        },
        rules=rules,
    )
    findings: str | None = json.dumps(Findings.of(histories).to_json())
    for split, begin, end in target_ranges(histories, rule):
        batch = cut_sequences(histories, split, begin, end, context_limit)
        if not len(batch):
            continue
        parts = [bisect_right(plan[split], _key(user)) - 1 for user in batch["user_id"].to_pylist()]
        # What was found is said once, in the first row.
        found = [findings, *[None] * (len(batch) - 1)]
        findings = None
        yield pa.RecordBatch.from_arrays(
            [
                pa.array([split] * len(batch)),
                pa.array(parts, type=pa.int32()),
                pa.array(found, type=pa.string()),
                *batch.columns,
            ],
            schema=_placed_schema(rules),
        )


def _starts(rows: pa.Table) -> np.ndarray:
    """[users] the first row of each user in rows sorted by user."""
    users = rows["user_id"].combine_chunks()
    changes = np.asarray(pc.not_equal(users.slice(1), users.slice(0, len(users) - 1)))
    return np.concatenate([[0], np.flatnonzero(changes) + 1])


def _key(user: str) -> Key:
    return hashlib.md5(user.encode(), usedforsecurity=False).hexdigest(), user


def _write(
    uri: str, rules: InteractionRules, limits: tuple[int, int], batches: Batches
) -> Iterator[pa.RecordBatch]:
    """Writes parts from sequences sorted by split, part and key, and gives a report of each.

    Another attempt at the same task may write a part too: it appears when it is whole.
    """
    for (split, number), pieces in groupby(_pieces(batches), key=itemgetter(0)):
        writer, findings = DatasetWriter(uri, *limits, {split: number}), Findings()
        for _, piece in pieces:
            schema = sequence_schema(rules)
            rows = piece.select(schema.names).cast(schema)
            writer.write_sequences(split, rows.combine_chunks().to_batches()[0])
            for found in piece["findings"].drop_null().to_pylist():
                findings += Findings.from_json(json.loads(found))
        writer.close()
        ((path, entry),) = writer.files.items()
        report = {
            "path": path,
            "split": split,
            "entry": entry.model_dump(),
            "counts": writer.splits[split].model_dump(),
            "findings": findings.to_json(),
        }
        yield pa.RecordBatch.from_pydict({"report": [json.dumps(report)]})


def _pieces(batches: Batches) -> Iterator[tuple[tuple[str, int], pa.Table]]:
    """Rows that follow each other in one part, and its split and number."""
    for batch in filter(len, batches):
        places = list(zip(batch["split"].to_pylist(), batch["part"].to_pylist(), strict=True))
        changes = [n for n, (one, two) in enumerate(pairwise(places), 1) if one != two]
        for start, end in pairwise([0, *changes, len(batch)]):
            yield places[start], pa.Table.from_batches([batch.slice(start, end - start)])
