"""Predictions and figures of the tasks beside the main one, by the same metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dti_dist.console import say
from dti_dist.data.dataset import label_column
from dti_dist.evaluation.bootstrap import CONFIDENCE, Groups, draw, intervals, read_groups
from dti_dist.evaluation.curves import reliability
from dti_dist.evaluation.metrics import best_threshold, measure, rows, sql_errors
from dti_dist.evaluation.request_metrics import measure_requests


def columns_of_task(task: str | None = None) -> list[tuple[str, pa.DataType]]:
    """Label and probability of a further task, or of the main one. A label that is unknown is
    null."""
    names = ("label", "probability")
    if task is not None:
        names = (label_column(task), probability_column(task))
    return [(names[0], pa.int8()), (names[1], pa.float32())]


def probability_column(task: str) -> str:
    return f"probability_{task}"


def names_of_columns(tasks: Sequence[str]) -> list[str]:
    return [name for task in tasks for name, _ in columns_of_task(task)]


def thresholds(
    connection: duckdb.DuckDBPyConnection, table: str, tasks: Sequence[str]
) -> dict[str, float | None]:
    """For the best F1 of each further task on the targets of a table with the columns ``user`` and
    those of the tasks; None without clicks."""
    return {
        task: best_threshold(
            connection,
            f"(SELECT user, {label_column(task)} AS label, {probability_column(task)} AS "
            f"probability FROM {table} WHERE {label_column(task)} IS NOT NULL)",
        )
        for task in tasks
    }


def take_task(
    connection: duckdb.DuckDBPyConnection,
    table: str,
    task: str,
    probability: str,
    by_request: bool,
    weighted: bool,
) -> bool:
    """Make the table ``of_task`` (user, label, probability; for requests row and timestamp; weight)
    of the targets in a table whose label of the task is known. Users are numbered anew, as
    `bootstrap.read_groups` needs them.

    Args:
        probability: the column with the task's.

    Returns:
        whether there are any, with weights above 0.
    """
    label = label_column(task)
    more = (", row, timestamp" if by_request else "") + (", weight" if weighted else "")
    with sql_errors(f"finding the targets of the task {task}"):
        connection.execute(
            f"CREATE OR REPLACE TABLE of_task AS WITH known AS (SELECT * FROM {table} WHERE "
            f"{label} IS NOT NULL), numbers AS (SELECT user AS before, (row_number() OVER (ORDER "
            "BY user) - 1)::UINTEGER AS number FROM (SELECT DISTINCT user FROM known)) "
            f"SELECT number AS user, {label} AS label, {probability} AS probability{more} FROM "
            "known JOIN numbers ON known.user = numbers.before"
        )
        total = "sum(weight)" if weighted else "count(*)"
        (found,) = rows(connection, f"SELECT {total} AS total FROM of_task")
    return bool(found["total"])


def measure_task(
    connection: duckdb.DuckDBPyConnection,
    by_request: bool,
    weighted: bool,
    threshold: float | None = None,
) -> tuple[dict[str, Any], Groups]:
    """Metrics of the table ``of_task``, and its groups of users."""
    figures = measure(connection, "of_task", threshold, weighted)
    if by_request:
        figures |= measure_requests(connection, "of_task")
    users = figures["users"]
    groups = read_groups(connection, "of_task", users, by_request=by_request, weighted=weighted)
    return figures, groups


def measure_tasks(
    connection: duckdb.DuckDBPyConnection,
    tasks: Sequence[str],
    at: Mapping[str, float | None],
    by_request: bool,
    weighted: bool,
    resamples: int,
) -> dict[str, dict[str, Any]]:
    """Figures by further task, over the targets of the table ``targets`` whose label is known; a
    task without any is said and left out. Replaces the tables of `metrics.measure`.

    Args:
        at: thresholds by task.
        resamples: of the bootstrap; 0 for none.
    """
    found = {}
    for task in tasks:
        probability = probability_column(task)
        if not take_task(connection, "targets", task, probability, by_request, weighted):
            say(f"WARNING: no target has a known label of the task {task}, so it has no metrics.")
            continue
        figures, groups = measure_task(connection, by_request, weighted, at.get(task))
        drawn: npt.NDArray[np.int64] | None = None
        if resamples:
            drawn = draw(len(groups), resamples)
        found[task] = figures | {
            "intervals": None if drawn is None else intervals(figures, groups, drawn),
            "bootstrap": {
                "resamples": resamples,
                "groups": len(groups),
                "confidence": CONFIDENCE,
            },
            "reliability": reliability(groups, drawn),
        }
    return found
