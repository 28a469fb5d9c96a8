"""Metrics by request: how well the items that a user was shown at once are ordered.

A request is the targets of one row that have one timestamp; the relation of targets has the columns
``row`` and ``timestamp`` beside those of metrics.py. Every metric is a mean over the requests with
both labels. Definitions are those of the MIND news challenge. Equal probabilities count as in
random order: a metric is its expected value, so the order of targets in a file changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from dti_dist.evaluation.metrics import curve_query, rows, sql_errors
from dti_dist.sql import quote

CUTS = (5, 10)
REQUEST_METRICS = (
    *("request_auc", "mrr"),
    *(f"ndcg@{cut}" for cut in CUTS),
    *(f"hit@{cut}" for cut in CUTS),
)
_REQUEST = ("row", "timestamp")


def measure_requests(connection: duckdb.DuckDBPyConnection, targets: str) -> dict[str, Any]:
    """REQUEST_METRICS of a relation of targets, and the numbers of its requests.

    The metrics are absent where no request has both labels. Makes the tables ``ranks`` and
    ``per_request`` (as of request_query), in place of others of that name.
    """
    with sql_errors("computing the metrics by request"):
        (counts,) = rows(
            connection,
            "SELECT count(*) AS requests, max(targets) AS largest FROM (SELECT count(*) AS targets "
            f"FROM {targets} GROUP BY {', '.join(_REQUEST)})",
        )
        _make_ranks(connection, counts["largest"])
        connection.execute(f"CREATE OR REPLACE TABLE per_request AS {request_query(targets)}")
        (sums,) = rows(connection, request_sums_query("per_request"))
    return {
        "requests": counts["requests"],
        "requests_of_one_class": counts["requests"] - sums["requests"],
        **(request_means(sums) if sums["requests"] else {}),
    }


def request_means(sums: Mapping[str, Any]) -> dict[str, Any]:
    """REQUEST_METRICS by sums as of request_sums_query: numbers, or arrays of them."""
    return {name: sums[name] / sums["requests"] for name in REQUEST_METRICS}


def request_sums_query(per_request: str, keys: Sequence[str] = ()) -> str:
    """By the key columns: ``requests``, and the sum of each of REQUEST_METRICS over them."""
    listed = "".join(f"{key}, " for key in keys)
    sums = ", ".join(f"fsum({quote(name)}) AS {quote(name)}" for name in REQUEST_METRICS)
    return f"SELECT {listed}count(*) AS requests, {sums} FROM {per_request}" + (
        f" GROUP BY {', '.join(keys)}" if keys else ""
    )


def request_query(targets: str, keys: Sequence[str] = ()) -> str:
    """Each request with both labels: the key columns, ``user`` and REQUEST_METRICS.

    Targets with equal probabilities have the ranks from ``above + 1`` to ``upto``, each of them
    any of these as likely, so their clicks get the mean of what these ranks are worth.
    """
    request = [*keys, "user", *_REQUEST]
    by_request = f"PARTITION BY {', '.join(request)}"
    listed = ", ".join(request)
    tied = (
        f"SELECT {listed}, clicks, others, clicks + others AS tied, "
        "(sum(clicks + others) OVER falling)::BIGINT AS upto, "
        "(sum(others) OVER falling)::BIGINT AS others_upto, "
        f"(sum(others) OVER ({by_request}))::BIGINT AS all_others "
        f"FROM ({curve_query(targets, request)}) WINDOW falling AS "
        f"({by_request} ORDER BY probability DESC ROWS UNBOUNDED PRECEDING)"
    )
    worth = {
        "reciprocal": "reciprocal_ranks",
        **{f"gain_{cut}": f"gains_{cut}" for cut in CUTS},
    }
    gains = ", ".join(
        f"fsum(clicks * (last.{column} - above.{column}) / tied) AS {name}"
        for column, name in worth.items()
    )
    misses = ", ".join(f"product({_miss(cut)}) AS miss_{cut}" for cut in CUTS)
    summed = (
        f"SELECT {listed}, sum(clicks)::BIGINT AS clicks, any_value(all_others) AS others, "
        f"sum(clicks * (2 * others_upto - others)) AS lost, {gains}, {misses} "
        f"FROM ({tied}) AS tied_targets "
        "JOIN ranks AS last ON last.rank = upto JOIN ranks AS above ON above.rank = upto - tied "
        f"WHERE clicks > 0 AND all_others > 0 GROUP BY {listed}"
    )
    metrics = {
        "request_auc": "1 - lost / (2::DOUBLE * clicks * others)",
        "mrr": "reciprocal_ranks / clicks",
        **{f"ndcg@{cut}": f"gains_{cut} / ideal.gain_{cut}" for cut in CUTS},
        **{f"hit@{cut}": f"1 - miss_{cut}" for cut in CUTS},
    }
    columns = ", ".join(f"{value} AS {quote(name)}" for name, value in metrics.items())
    return (
        f"SELECT {', '.join([*keys, 'user'])}, {columns} FROM ({summed}) AS requests "
        "JOIN ranks AS ideal ON ideal.rank = requests.clicks"
    )


def _miss(cut: int) -> str:
    """The probability that no click of equal probabilities gets one of the first `cut` ranks."""
    places = f"least(tied, {cut} - upto + tied)"  # of these ranks
    drawn = [
        f"CASE WHEN {places} > {at} THEN greatest(others - {at}, 0) / (tied - {at})::DOUBLE "
        "ELSE 1 END"
        for at in range(cut)
    ]
    return " * ".join(drawn)


def _make_ranks(connection: duckdb.DuckDBPyConnection, largest: int) -> None:
    """Make the table ``ranks``: what the ranks from 1 to each ``rank`` are worth together.

    ``reciprocal`` sums up 1 / rank; ``gain_k`` the discounts 1 / log2(rank + 1) of the first k.
    """
    rank = np.arange(1, largest + 1)
    worth = {
        "reciprocal": 1 / rank,
        **{f"gain_{cut}": (rank <= cut) / np.log2(rank + 1) for cut in CUTS},
    }
    sums = {name: np.concatenate([[0.0], np.cumsum(values)]) for name, values in worth.items()}
    connection.register("given_ranks", pa.table({"rank": np.arange(largest + 1), **sums}))
    connection.execute("CREATE OR REPLACE TABLE ranks AS SELECT * FROM given_ranks")
    connection.unregister("given_ranks")
