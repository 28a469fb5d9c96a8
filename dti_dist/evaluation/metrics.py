"""Metrics of any number of targets, exactly and in bounded memory: SQL over tables of DuckDB.

Targets are a relation with the columns ``user`` (an integer that names the user), ``label``,
``probability`` and, where they are weighted, ``weight``: what each counts in every sum. Grouped by
equal probabilities they are a *curve*, from which AUC, log loss, calibration and classification all
follow. DuckDB sorts it and spills to disk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dti_dist import sql
from dti_dist.errors import UserError

CALIBRATION_BINS = 15
_EPS = float(np.finfo(np.float64).eps)  # scikit-learn's log_loss clips float64 probabilities by it


@dataclass(frozen=True)
class Sums:
    """What the metrics of some targets follow from.

    Attributes:
        clicks: targets with label 1.
        predicted: sum of the probabilities; loss: of the log losses, in nats.
        won: twice the pairs of a click and another target of which the click has the higher
            probability, equal ones counted half. All but predicted and loss are whole numbers
            where targets are not weighted.
    """

    targets: float
    clicks: float
    predicted: float
    loss: float
    won: float

    def figures(self) -> dict[str, float | None]:
        """Metrics by name; None where one is undefined because only one class occurs."""
        rate, loss = self.clicks / self.targets, self.loss / self.targets
        pairs = self.clicks * (self.targets - self.clicks)
        entropy = -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate)) if pairs else math.nan
        return {
            "auc": self.won / (2 * pairs) if pairs else None,
            "log_loss": loss,
            "ne": loss / entropy if pairs else None,
            "calibration_ratio": self.predicted / self.clicks if self.clicks else None,
            "targets": self.targets,
            "clicks": self.clicks,
            "label_rate": rate,
            "mean_prediction": self.predicted / self.targets,
        }


def curve_query(targets: str, keys: Sequence[str] = (), weighted: bool = False) -> str:
    """Clicks and other targets by probability, within each combination of the key columns."""
    columns = ", ".join([*keys, "probability"])
    clicks, others = "sum(label)::BIGINT", "(count(*) - sum(label))::BIGINT"
    if weighted:
        clicks, others = (f"fsum(weight) FILTER (label = {label})" for label in (1, 0))
        clicks, others = (f"coalesce({total}, 0)" for total in (clicks, others))
    return (
        f"SELECT {columns}, {clicks} AS clicks, {others} AS others FROM {targets} "
        f"GROUP BY {columns}"
    )


def sums_query(curve: str, keys: Sequence[str] = (), weighted: bool = False) -> str:
    """The fields of Sums of each combination of the key columns. `curve` is of `curve_query`."""
    total = "DOUBLE" if weighted else "BIGINT"
    listed = "".join(f"{key}, " for key in keys)
    partition = f"PARTITION BY {', '.join(keys)} " if keys else ""
    return (
        f"SELECT {listed}(sum(clicks) + sum(others))::{total} AS targets, "
        f"sum(clicks)::{total} AS clicks, "
        "fsum((clicks + others) * p) AS predicted, "
        f"-fsum(clicks * ln(greatest(p, {_EPS!r})) + others * ln(greatest(1 - p, {_EPS!r}))) "
        "AS loss, sum(clicks * (2 * below + others)) AS won FROM "
        f"(SELECT {listed}probability::DOUBLE AS p, clicks, others, "
        f"(sum(others) OVER ({partition}ORDER BY probability ROWS UNBOUNDED PRECEDING) - others)"
        f"::{total} AS below FROM {curve})" + (f" GROUP BY {', '.join(keys)}" if keys else "")
    )


def gauc_query(per_user: str, keys: Sequence[str] = ()) -> str:
    """Over users' sums: what GAUC and UAUC are quotients of, users, and users of one class.

    gauc_sum: targets times AUC, gauc_targets: targets, uauc_sum: AUC, uauc_users: users; all summed
    over users with both classes.
    """
    listed = "".join(f"{key}, " for key in keys)
    both = "FILTER (clicks > 0 AND clicks < targets)"
    auc = "won / (2::DOUBLE * clicks * (targets - clicks))"
    return (
        f"SELECT {listed}coalesce(fsum(targets * {auc}) {both}, 0) AS gauc_sum, "
        f"coalesce(sum(targets) {both}, 0) AS gauc_targets, "
        f"coalesce(fsum({auc}) {both}, 0) AS uauc_sum, count(*) {both} AS uauc_users, "
        f"count(*) AS users, count(*) - count(*) {both} AS users_of_one_class FROM {per_user}"
        + (f" GROUP BY {', '.join(keys)}" if keys else "")
    )


def measure(
    connection: duckdb.DuckDBPyConnection,
    targets: str,
    valid_threshold: float | None = None,
    weighted: bool = False,
) -> dict[str, Any]:
    """Metrics of a relation of targets. Makes the tables ``curve`` and ``per_user`` (Sums of each
    user), in place of others of that name.

    Definitions are in docs/evaluation.md. None where a metric is undefined because only one class
    occurs. f1 and accuracy are at threshold 0.5, f1_valid_threshold is at the given one. targets,
    clicks and users are counts; weight is the sum of the weights, where there are any.

    Raises:
        UserError: all weights are 0.
    """
    with sql_errors("computing the metrics"):
        connection.execute(f"CREATE OR REPLACE TABLE curve AS {curve_query(targets, (), weighted)}")
        by_user = sums_query(f"({curve_query(targets, ['user'], weighted)})", ["user"], weighted)
        connection.execute(f"CREATE OR REPLACE TABLE per_user AS {by_user}")
        (sums,) = rows(connection, sums_query("curve", (), weighted))
        (counts,) = rows(
            connection,
            f"SELECT count(*) AS targets, sum(label)::BIGINT AS clicks FROM {targets}",
        )
        if not sums["targets"]:
            raise UserError(
                f"expected targets that count; all {counts['targets']:,} have the weight 0. "
                "Prepare the data with another --weight."
            )
        (gauc,) = rows(connection, gauc_query("per_user"))
        whole = Sums(**sums)
        at_half = _classified(connection, whole, 0.5)
        found = whole.figures()
        return {
            "auc": found["auc"],
            "log_loss": found["log_loss"],
            "f1": at_half["f1"],
            "f1_valid_threshold": None
            if valid_threshold is None
            else _classified(connection, whole, valid_threshold)["f1"],
            "valid_threshold": valid_threshold,
            "accuracy": at_half["accuracy"],
            "gauc": quotient(gauc["gauc_sum"], gauc["gauc_targets"]),
            "uauc": quotient(gauc["uauc_sum"], gauc["uauc_users"]),
            "ne": found["ne"],
            "ece": _calibration_error(connection, whole),
            "calibration_ratio": found["calibration_ratio"],
            **counts,
            **({"weight": whole.targets} if weighted else {}),
            "users": gauc["users"],
            "users_of_one_class": gauc["users_of_one_class"],
            "label_rate": found["label_rate"],
            "mean_prediction": found["mean_prediction"],
        }


def measure_arrays(
    labels: npt.NDArray[np.integer],
    probabilities: npt.NDArray[np.floating],
    users: npt.NDArray[np.integer],
    weights: npt.NDArray[np.floating] | None = None,
) -> dict[str, Any]:
    """`measure`, in memory, of [targets] labels, probabilities, integers that name the user, and
    weights.

    Raises:
        UserError: a probability is not a finite number.
    """
    broken = len(probabilities) - int(np.isfinite(probabilities).sum())
    if broken:
        raise UserError(
            f"expected finite probabilities, found {broken:,} of {len(probabilities):,} that are "
            "not: the model has diverged. Lower the learning rate and train again."
        )
    columns = {"user": users, "label": labels, "probability": probabilities}
    if weights is not None:
        columns["weight"] = weights
    targets = pa.table(columns)
    # One thread, so that sums are rounded the same each time; without spilling to the disk.
    config: dict[str, Any] = {"threads": 1, "temp_directory": ""}
    with duckdb.connect(config=config) as connection:
        connection.register("targets", targets)
        return measure(connection, "targets", weighted=weights is not None)


def _classified(
    connection: duckdb.DuckDBPyConnection, whole: Sums, threshold: float
) -> dict[str, float]:
    """F1 and accuracy where a probability of at least the threshold is called a click."""
    (found,) = rows(
        connection,
        "SELECT coalesce(sum(clicks), 0) AS hits, coalesce(sum(others), 0) AS false "
        f"FROM curve WHERE probability::DOUBLE >= {threshold!r}",
    )
    hits, false = found["hits"], found["false"]
    right = hits + whole.targets - whole.clicks - false
    return {
        "f1": quotient(2 * hits, hits + false + whole.clicks) or 0.0,
        "accuracy": right / whole.targets,
    }


def _calibration_error(connection: duckdb.DuckDBPyConnection, whole: Sums) -> float:
    """torchmetrics' binary_calibration_error: bins of equal width, and one for exactly 1."""
    edges = np.linspace(0, 1, CALIBRATION_BINS + 1)[1:].tolist()
    number = " + ".join(f"(p >= {edge!r})::INTEGER" for edge in edges)
    gaps = rows(
        connection,
        "SELECT abs(sum(clicks)::DOUBLE - fsum((clicks + others) * p)) AS gap FROM "
        f"(SELECT clicks, others, probability::DOUBLE AS p FROM curve) GROUP BY {number}",
    )
    return math.fsum(gap["gap"] for gap in gaps) / whole.targets


def best_threshold(
    connection: duckdb.DuckDBPyConnection, targets: str, weighted: bool = False
) -> float | None:
    """The probability from which on to call a click for the best F1; the highest of equally good
    ones. None where there are no clicks."""
    with sql_errors("choosing the threshold"):
        found = rows(
            connection,
            "SELECT probability::DOUBLE AS threshold FROM (SELECT probability, "
            "sum(clicks) OVER later AS hits, sum(clicks + others) OVER later AS called, "
            f"sum(clicks) OVER () AS clicks FROM ({curve_query(targets, (), weighted)}) "
            "WINDOW later AS (ORDER BY probability DESC ROWS UNBOUNDED PRECEDING)) "
            "WHERE clicks > 0 ORDER BY 2 * hits / (called + clicks)::DOUBLE DESC, threshold DESC "
            "LIMIT 1",
        )
    return found[0]["threshold"] if found else None


def sql_errors(doing: str) -> AbstractContextManager[None]:
    """Turn DuckDB's errors into UserErrors that say what failed, and why in short."""
    return sql.sql_errors(
        doing,
        "Raise --memory-limit, or free disk space where it spills: the run's eval folder, or for "
        "compare the folder that TMPDIR names.",
    )


def rows(connection: duckdb.DuckDBPyConnection, query: str) -> list[dict[str, Any]]:
    """A small result."""
    result = connection.sql(query)
    return [dict(zip(result.columns, row, strict=True)) for row in result.fetchall()]


def quotient(above: float, below: float) -> float | None:
    return above / below if below else None
