"""The predictions of an evaluation as one Parquet file, with what the data says of each target.

It is the whole input of metrics, slices and comparisons, and stays in the run's folder.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dti_dist.config import StorageConfig
from dti_dist.data import storage
from dti_dist.data.dataset import TASK_NAME, Dataset, iter_sequences
from dti_dist.data.index import RowGroup, SplitIndex
from dti_dist.errors import UserError
from dti_dist.evaluation.metrics import sql_errors
from dti_dist.evaluation.tasks import columns_of_task, probability_column
from dti_dist.files import replacing
from dti_dist.runs.folder import RunFolder
from dti_dist.sql import parquet

SCHEMA = pa.schema(
    [
        ("user_id", pa.string()),  # the id in the source
        ("item_id", pa.string()),  # the id in the source
        ("timestamp", pa.int64()),  # seconds since 1970-01-01 UTC
        ("label", pa.int8()),
        ("probability", pa.float32()),
        ("row", pa.int64()),  # of the user sequence in the split
        ("position", pa.int32()),  # of the target in its sequence, from 0
    ]
)
_WEIGHT = pa.field("weight", pa.float32())  # of data that has weights
"""Behind these, of each further task the columns of `tasks.columns_of_task`."""
_DELTAS = ["timestamp", "row", "position"]  # neighbours are near each other
_ABOUT = b"dti_dist"
_ROWS_WRITTEN_AT_A_TIME = 1 << 17
_INTERACTIONS_AT_A_TIME = 1 << 20


@dataclass(frozen=True)
class About:
    """Where predictions come from, as their file's metadata says.

    Attributes:
        requests: whether the data set has requests: targets of one row and one timestamp.
        weighted: whether the file has weights.
        tasks: names of the further tasks.
    """

    checkpoint: str
    split: str
    prompt: str
    data: str
    max_targets: int | None = None
    requests: bool = False
    weighted: bool = False
    tasks: tuple[str, ...] = ()

    @property
    def schema(self) -> pa.Schema:
        """Of the file."""
        further = [column for task in self.tasks for column in columns_of_task(task)]
        return pa.schema([*SCHEMA, *further, *[_WEIGHT] * self.weighted])


def predictions_path(run: RunFolder, split: str, prompt: str) -> Path:
    return run.evaluations / f"{split}.{prompt}.predictions.parquet"


def with_targets(
    spooled: Callable[[int, int], pa.Table],
    dataset: Dataset,
    split: str,
    index: SplitIndex,
    source_ids: pa.ChunkedArray,
) -> Iterator[pa.RecordBatch]:
    """Predictions as batches of SCHEMA, and what they have of further tasks and weights, in the
    order of row and position.

    Args:
        spooled: the predictions of a range of rows, sorted.
        index: of the split, as it was predicted.
        source_ids: [items] the id in the source of each dense item id.
    """
    columns = ["user_id", "item_ids", "timestamps"]
    columns += ["weight"] if dataset.manifest.weight else []
    for places in _chunks(index):
        found = spooled(places[0].first_row, places[-1].first_row + places[-1].rows)
        bounds = np.searchsorted(
            found["row"].to_numpy(),
            [(place.first_row, place.first_row + place.rows) for place in places],
        ).tolist()
        wanted = [
            (place, found.slice(start, end - start))
            for place, (start, end) in zip(places, bounds, strict=True)
            if end > start
        ]
        sequences = iter_sequences(
            dataset,
            split,
            [
                "user_id",
                "item_ids",
                "timestamps",
                *["weight"] * (dataset.manifest.weight is not None),
            ],
            [(place.part, place.number) for place, _ in wanted],
        )
        for (place, predictions), batch in zip(wanted, sequences, strict=True):
            yield _joined(predictions, batch.rows, place.first_row, source_ids)


def _chunks(index: SplitIndex) -> Iterator[list[RowGroup]]:
    """Consecutive row groups with about a million interactions."""
    before = np.concatenate([[0], np.cumsum(index.interactions)[:-1]])
    number = before // _INTERACTIONS_AT_A_TIME
    starts = [0, *(np.flatnonzero(np.diff(number)) + 1).tolist(), len(number)]
    for start, end in pairwise(starts):
        yield list(index.row_groups[start:end])


def _joined(
    predictions: pa.Table, sequences: pa.RecordBatch, first_row: int, source_ids: pa.ChunkedArray
) -> pa.RecordBatch:
    row = predictions["row"].to_numpy() - first_row
    lengths = sequences["item_ids"].value_lengths().to_numpy()
    at = (np.cumsum(lengths) - lengths)[row] + predictions["position"].to_numpy()
    items = source_ids.take(sequences["item_ids"].flatten().take(at))
    columns = {
        "user_id": sequences["user_id"].take(row),
        "item_id": items.combine_chunks(),
        "timestamp": sequences["timestamps"].flatten().take(at),
        **{
            name: predictions[name].combine_chunks()
            for name in ("label", "probability", "row", "position")
        },
    }
    columns |= {
        name: predictions[name].combine_chunks()
        for name in predictions.column_names
        if name not in columns
    }
    if "weight" in sequences.schema.names:
        columns["weight"] = sequences["weight"].flatten().take(at)
    return pa.RecordBatch.from_pydict(columns)


def write(batches: Iterator[pa.RecordBatch], file: Path, about: About) -> int:
    """Write the file and give the number of targets. Raises UserError where it can't be written."""
    schema = about.schema.with_metadata({_ABOUT: json.dumps(asdict(about)).encode()})
    targets = 0
    waiting: list[pa.RecordBatch] = []
    try:
        with pq.ParquetWriter(
            file,
            schema,
            compression="zstd",
            use_dictionary=["user_id", "item_id"],
            column_encoding={
                **dict.fromkeys(_DELTAS, "DELTA_BINARY_PACKED"),
                **dict.fromkeys(_probabilities(about), "BYTE_STREAM_SPLIT"),
            },
        ) as writer:

            def write_waiting() -> None:
                writer.write_table(pa.Table.from_batches(waiting).cast(schema))
                waiting.clear()

            for batch in batches:
                targets += len(batch)
                waiting.append(batch)
                if sum(map(len, waiting)) >= _ROWS_WRITTEN_AT_A_TIME:
                    write_waiting()
            if waiting:
                write_waiting()
    except OSError as error:
        if isinstance(error, FileNotFoundError) or not error.errno:
            raise  # of the data, not of this file
        raise UserError(
            f"{file} can't be written: {error.strerror or error}. Free some space there."
        ) from error
    return targets


def _probabilities(about: About) -> list[str]:
    return ["probability", *map(probability_column, about.tasks)]


def read_about(file: Path) -> About:
    """Raises UserError where the file is none of evaluate's."""
    try:
        found = (pq.read_schema(file).metadata or {})[_ABOUT]
        about = About(**json.loads(found))
        if not all(re.fullmatch(TASK_NAME, task) for task in about.tasks):
            raise ValueError("tasks whose names are none")
        return replace(about, tasks=tuple(about.tasks))
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{file}: expected predictions that dti-dist evaluate wrote, found another or a broken "
            f"file ({str(error).splitlines()[0]}). Evaluate the run again."
        ) from error


def copy_to(file: Path, uri: str, settings: StorageConfig) -> None:
    """Copy the predictions to a local path or URL, where they appear when they are whole."""
    if not storage.is_local(uri):
        storage.upload(str(file), uri, settings)
        return
    target = Path(storage.filesystem(uri)[1])
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as staging:
            shutil.copyfile(file, staging)
    except OSError as error:
        raise UserError(
            f"--predictions: {target} can't be written: {error.strerror or error}. Name a file in "
            "a folder that you may write to."
        ) from error


def check_destination(uri: str) -> None:
    """Refuse, before any work, what predictions can't be written to."""
    _, path = storage.filesystem(uri)
    if storage.is_local(uri) and Path(path).is_dir():
        raise UserError(
            f"--predictions: expected the path of a Parquet file to write, found the folder "
            f"{path}. Name a file in it, such as {path}/predictions.parquet."
        )


def load_targets(
    connection: duckdb.DuckDBPyConnection,
    file: Path,
    more: str = "",
    joins: str = "",
    by_request: bool = False,
    weighted: bool = False,
) -> None:
    """Make the tables ``users`` and ``targets`` (user, label, probability, `more`) of a file.

    A user is a user_id, however many rows it has, and gets a number in an order that is random and
    the same every time.

    Args:
        more: further columns, each after a comma; joins: of the tables that they are from, with
            the file as the table ``predictions``.
        by_request: also row and timestamp, which name the request.
        weighted: also weight.
    """
    source = parquet([str(file)])
    more += ", row, timestamp" if by_request else ""
    more += ", weight" if weighted else ""
    with sql_errors(f"reading {file}"):
        number_users(connection, f"SELECT user_id FROM {source}")
        connection.execute(
            "CREATE OR REPLACE TABLE targets AS SELECT users.user, label, probability"
            f"{more} FROM {source} AS predictions JOIN users USING (user_id) {joins}"
        )


def number_users(connection: duckdb.DuckDBPyConnection, user_ids: str) -> None:
    connection.execute(
        "CREATE OR REPLACE TABLE users AS SELECT user_id, "
        "(row_number() OVER (ORDER BY md5(user_id), user_id) - 1)::UINTEGER AS user "
        f"FROM (SELECT DISTINCT user_id FROM ({user_ids}))"
    )
