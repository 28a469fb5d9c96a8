"""Metrics of parts of the targets: by user activity, item popularity, day, request, or a column."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dti_dist.console import progress
from dti_dist.data.dataset import Dataset
from dti_dist.data.prepare.statistics import date_of_day
from dti_dist.errors import UserError, nearest
from dti_dist.evaluation.bootstrap import Parts, intervals, read_groups_of_parts
from dti_dist.evaluation.counts import read_sequences
from dti_dist.evaluation.metrics import (
    Sums,
    curve_query,
    gauc_query,
    quotient,
    rows,
    sql_errors,
    sums_query,
)
from dti_dist.evaluation.request_metrics import request_means, request_query, request_sums_query
from dti_dist.sql import quote

MOST_VALUES = 20
COUNT_BINS = 5  # beside a bin for none at all
_COUNTED = ("activity", "popularity")
_OF_TARGETS = ("day", "user_id", "item_id")
_OF_REQUESTS = {
    "request_size": (1, 5, 10, 20, 50, 100, 200, 500, 1_000),
    "request_place": (*range(1, 11), 20, 50, 100, 200, 500, 1_000),
}
"""Where parts of them end; what is above is one part."""
_WITH_WHOLE_REQUESTS = ("activity", "day", "user_id", "request_size")
_DAY = 86_400  # seconds


def check_slices(names: Sequence[str], dataset: Dataset) -> None:
    """Raises UserError for a name that is no slice of this data set."""
    known = [*_COUNTED, *_OF_TARGETS, *dataset.manifest.item_text_columns]
    if dataset.has_requests:
        known += _OF_REQUESTS
    for name in names:
        if name in _OF_REQUESTS and name not in known:
            raise UserError(
                f"--slice {name}: expected a data set with requests, found none in {dataset.uri}. "
                "Prepare it again with --requests time, or leave this slice out."
            )
        if name not in known:
            raise UserError(
                f"--slice: expected one of {', '.join(known)}; found {name!r}."
                f"{nearest(name, known)}"
            )


@dataclass(frozen=True)
class Columns:
    """SQL that adds a column for each slice to predictions_file.load_targets."""

    more: str
    joins: str


def slice_columns(
    connection: duckdb.DuckDBPyConnection,
    names: Sequence[str],
    dataset: Dataset,
    items: pa.Table,
    skip_bad: bool,
) -> Columns:
    """Make the tables that slices are joined from, and say how. Slice i is the column ``slice_i``.

    Args:
        items: the data set's item table.
        skip_bad: pass over parts of train that can't be read.
    """
    joins = ""
    if set(names) & set(_COUNTED):
        _count_train(connection, dataset, items["source_id"], skip_bad)
        joins += "LEFT JOIN train_users USING (user_id) LEFT JOIN train_items USING (item_id) "
    texts = [name for name in names if name not in (*_COUNTED, *_OF_TARGETS, *_OF_REQUESTS)]
    if texts:
        connection.register("item_table", items.select(["source_id", *texts]))
        columns = ", ".join(f"coalesce({quote(name)}, '') AS {quote(name)}" for name in texts)
        connection.execute(
            f"CREATE OR REPLACE TABLE item_texts AS SELECT source_id, {columns} FROM item_table"
        )
        connection.unregister("item_table")
        joins += "LEFT JOIN item_texts ON predictions.item_id = item_texts.source_id"
    values = {
        "activity": "coalesce(train_users.interactions, 0)",
        "popularity": "coalesce(train_items.interactions, 0)",
        "day": f"floor(timestamp / {_DAY})::BIGINT",
        "user_id": "predictions.user_id",
        "item_id": "predictions.item_id",
        "request_size": "count(*) OVER (PARTITION BY row, timestamp)",
        "request_place": "row_number() OVER (PARTITION BY row, timestamp ORDER BY position)",
    }
    more = "".join(
        f", {values.get(name, f'item_texts.{quote(name)}')} AS slice_{number}"
        for number, name in enumerate(names)
    )
    return Columns(more, joins)


def _count_train(
    connection: duckdb.DuckDBPyConnection,
    dataset: Dataset,
    source_ids: pa.ChunkedArray,
    skip_bad: bool,
) -> None:
    """Make ``train_users`` and ``train_items``: interactions in train, each counted once."""
    connection.execute("CREATE OR REPLACE TABLE counted (user_id VARCHAR, interactions BIGINT)")
    of_items = np.zeros(len(source_ids), dtype=np.int64)
    total = sum(part.rows for part in dataset.parts("train"))
    with progress("counting train", total, "users") as bar:
        columns = ["user_id", "item_ids", "target_start"]
        for _, batch in read_sequences(dataset, "train", columns, skip_bad):
            lengths = batch["item_ids"].value_lengths().to_numpy()
            start = batch["target_start"].to_numpy()
            ends = np.cumsum(lengths)
            place = np.arange(lengths.sum()) - np.repeat(ends - lengths, lengths)
            items = batch["item_ids"].flatten().to_numpy()
            of_items += np.bincount(
                items[place >= np.repeat(start, lengths)], minlength=len(of_items)
            )
            users = pa.table({"user_id": batch["user_id"], "interactions": lengths - start})
            connection.register("batch_of_users", users)
            connection.execute(
                "INSERT INTO counted SELECT user_id, interactions FROM batch_of_users"
            )
            connection.unregister("batch_of_users")
            bar.advance(len(batch))
    connection.execute(
        "CREATE OR REPLACE TABLE train_users AS SELECT user_id, sum(interactions)::BIGINT AS "
        "interactions FROM counted GROUP BY user_id"
    )
    connection.register("counts_of_items", pa.table({"id": source_ids, "interactions": of_items}))
    connection.execute(
        "CREATE OR REPLACE TABLE train_items AS SELECT id AS item_id, interactions FROM "
        "counts_of_items"
    )
    connection.unregister("counts_of_items")


def measure_slices(
    connection: duckdb.DuckDBPyConnection,
    names: Sequence[str],
    by_request: bool = False,
    drawn: npt.NDArray[np.integer] | None = None,
    weighted: bool = False,
) -> dict[str, list[dict[str, Any]]]:
    """For each slice its values, each with ``value``, metrics, and their ``intervals``.

    Counts of interactions are bins of about equally many targets; sizes of requests and places in
    them have given ranges. Of others the most frequent values stand alone, the rest together. Bins,
    ranges and days come in order, others by their targets.

    Args:
        by_request: also REQUEST_METRICS, where no request is in several parts: measure_requests has
            measured the targets.
        drawn: [resamples, groups] how often groups of users are drawn; None for no intervals.
    """
    found = {}
    with progress("slices", len(names), "slices") as bar:
        for number, name in enumerate(names):
            with sql_errors(f"computing the slice {name}"):
                whole = by_request and name in _WITH_WHOLE_REQUESTS
                column = f"slice_{number}"
                found[name] = _measure(connection, name, column, whole, drawn, weighted)
            bar.advance()
    return found


def _measure(
    connection: duckdb.DuckDBPyConnection,
    name: str,
    column: str,
    by_request: bool,
    drawn: npt.NDArray[np.integer] | None,
    weighted: bool,
) -> list[dict[str, Any]]:
    cut = _ranges if name in _OF_REQUESTS else _count_bins if name in _COUNTED else _most_frequent
    shown, rest = cut(connection, name, column)
    called = {part: text for _, part, text in shown}
    of_rest = max(called) + 1
    parts = _make_parts(connection, shown, of_rest, column, by_request, weighted)
    users = {row["part"]: row for row in rows(connection, gauc_query(parts.per_user, ["part"]))}
    requests = {}
    if parts.per_request:
        summed = rows(connection, request_sums_query(parts.per_request, ["part"]))
        requests = {row["part"]: request_means(row) for row in summed}
    groups = []
    if drawn is not None:
        groups = read_groups_of_parts(connection, parts, of_rest + 1, drawn.shape[1])
    result = []
    whole = rows(connection, sums_query(parts.curve, ["part"], weighted))
    counted = f"SELECT part, count(*) AS targets FROM {parts.targets} GROUP BY part"
    counts = {row["part"]: row["targets"] for row in rows(connection, counted)}
    for sums in sorted(whole, key=lambda row: row["part"]):
        part = sums.pop("part")
        if not sums["targets"]:  # of the weight 0, all of them
            continue
        figures, of_users = Sums(**sums).figures(), users[part]
        entry = {
            "value": called.get(part, rest),
            "targets": counts[part],
            "users": of_users["users"],
            "label_rate": figures["label_rate"],
            "mean_prediction": figures["mean_prediction"],
            "calibration_ratio": figures["calibration_ratio"],
            "auc": figures["auc"],
            "log_loss": figures["log_loss"],
            "ne": figures["ne"],
            "gauc": quotient(of_users["gauc_sum"], of_users["gauc_targets"]),
            "uauc": quotient(of_users["uauc_sum"], of_users["uauc_users"]),
            **requests.get(part, {}),
        }
        entry["intervals"] = None if drawn is None else intervals(entry, groups[part], drawn)
        result.append(entry)
    return result


def _make_parts(
    connection: duckdb.DuckDBPyConnection,
    shown: Sequence[tuple[Any, int, str]],
    of_rest: int,
    column: str,
    by_request: bool,
    weighted: bool,
) -> Parts:
    """Make the tables of the parts, in place of those of another slice."""
    values = [value for value, _, _ in shown]
    kind = pa.int64() if isinstance(values[0], int) else pa.string()
    numbers = pa.array([part for _, part, _ in shown], pa.int32())
    connection.register("given", pa.table({"original": pa.array(values, kind), "part": numbers}))
    connection.execute("CREATE OR REPLACE TABLE shown AS SELECT * FROM given")
    connection.unregister("given")
    targets = (
        f"(SELECT targets.*, coalesce(shown.part, {of_rest}) AS part "
        f"FROM targets LEFT JOIN shown ON targets.{column} = shown.original)"
    )
    by_user = curve_query(targets, ["part", "user"], weighted)
    queries = {
        "curve": curve_query(targets, ["part"], weighted),
        "per_user": sums_query(f"({by_user})", ["part", "user"], weighted),
    }
    if by_request:
        queries["per_request"] = request_query(targets, ["part"])
    for name, query in queries.items():
        connection.execute(f"CREATE OR REPLACE TABLE parts_{name} AS {query}")
    per_request = "parts_per_request" if by_request else None
    return Parts(targets, "parts_curve", "parts_per_user", per_request, weighted)


_Shown = tuple[list[tuple[Any, int, str]], str]  # (value, its part, what it is called); the rest


def _most_frequent(connection: duckdb.DuckDBPyConnection, name: str, column: str) -> _Shown:
    found = rows(
        connection,
        f"SELECT {column} AS value, count(*) AS targets, count(*) OVER () AS values FROM targets "
        f"GROUP BY value ORDER BY targets DESC, value LIMIT {MOST_VALUES}",
    )
    values = [row["value"] for row in found]
    if name == "day":
        values.sort()
        called = [date_of_day(value) for value in values]
    else:
        called = [value or "(none)" for value in values]
    others = found[0]["values"] - len(values)
    shown = [
        (value, place, text) for place, (value, text) in enumerate(zip(values, called, strict=True))
    ]
    return shown, f"other ({others:,} values)"


def _ranges(connection: duckdb.DuckDBPyConnection, name: str, column: str) -> _Shown:
    """Every number that occurs, in the given range that holds it."""
    found = rows(connection, f"SELECT DISTINCT {column} AS value FROM targets ORDER BY value")
    ends = _OF_REQUESTS[name]
    shown = []
    for row in found:
        place = bisect_left(ends, row["value"])
        shown.append((row["value"], place, _range(ends, place)))
    return shown, ""


def _range(ends: Sequence[int], place: int) -> str:
    low = ends[place - 1] + 1 if place else 1
    if place == len(ends):
        return f"{low:,} or more"
    return f"{low:,}" + (f" to {ends[place]:,}" if ends[place] > low else "")


def _count_bins(connection: duckdb.DuckDBPyConnection, name: str, column: str) -> _Shown:
    """Every count that occurs, in a bin that is named by its range."""
    found = rows(
        connection,
        f"SELECT {column} AS value, count(*) AS targets FROM targets GROUP BY value ORDER BY value",
    )
    counts = np.array([row["value"] for row in found])
    targets = np.array([row["targets"] for row in found]) * (counts > 0)
    before = np.cumsum(targets) - targets
    bins = np.where(counts > 0, 1 + before * COUNT_BINS // max(targets.sum(), 1), 0)
    shown = []
    for place, number in enumerate(np.unique(bins).tolist()):
        inside = counts[bins == number].tolist()
        text = f"{inside[0]:,}" + (f" to {inside[-1]:,}" if len(inside) > 1 else "")
        shown += [(count, place, text) for count in inside]
    return shown, ""
