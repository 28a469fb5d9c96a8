"""Splits of MovieLens-1M as published protocols make them, to the row.

Both order interactions of one second. So each is a request of its own, and a target sees the labels
of those before it, unless requests are asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from dti_dist.data.prepare.movielens import read_movielens
from dti_dist.data.prepare.source import Source
from dti_dist.errors import UserError
from dti_dist.options import MOVIELENS_REQUESTS, BuildOptions, PublishedSplit
from dti_dist.sql import Workspace

_FIRST_MONTH = (2000, 4)  # CoLLM's month 0
_COLLM_MONTHS = {"train": (14, 23), "valid": (24, 28), "test": (29, 33)}  # both included
_RELLA_HISTORY = 5  # of a user's first interactions, which are no targets


@dataclass(frozen=True)
class Published:
    """How a protocol splits MovieLens-1M.

    Attributes:
        label: SQL over rating.
        events: a SELECT over one of user_id, item_id, time_us and label, in the order of
            ratings.dat; it adds ``split``.
        min_context: what a run's sample.min_context has to be, for the protocol's targets.
        interactions: of each split; in valid and test all are targets.
        cuts_seconds: whether a user's ratings of one second may lie in two splits.
    """

    label: str
    events: Callable[[str], str]
    min_context: int
    interactions: dict[str, int]
    cuts_seconds: bool


def _collm(events: str) -> str:
    """Months in UTC; what comes before or after them is not there."""
    year, month = _FIRST_MONTH
    number = (
        f"(year(make_timestamp(time_us)) * 12 + month(make_timestamp(time_us)) "
        f"- {year * 12 + month})"
    )
    cases = " ".join(
        f"WHEN {number} BETWEEN {first} AND {last} THEN '{split}'"
        for split, (first, last) in _COLLM_MONTHS.items()
    )
    named = f"SELECT *, CASE {cases} END AS split FROM ({events})"
    return f"SELECT * FROM ({named}) WHERE split IS NOT NULL"


def _rella(events: str) -> str:
    """Shares of the targets in the order of time, user and movie, rounded down; a user's first
    interactions, which are no targets, count as train."""
    order = "ORDER BY time_us, CAST(user_id AS BIGINT), CAST(item_id AS BIGINT)"
    is_target = f"nth > {_RELLA_HISTORY}"
    return (
        f"SELECT user_id, item_id, time_us, label, CASE WHEN NOT ({is_target}) OR "
        "place <= floor(0.8 * targets) THEN 'train' "
        "WHEN place <= floor(0.8 * targets) + floor(0.1 * targets) THEN 'valid' "
        f"ELSE 'test' END AS split FROM (SELECT *, "
        f"row_number() OVER (PARTITION BY {is_target} {order}) AS place, "
        f"count(*) OVER (PARTITION BY {is_target}) AS targets "
        f"FROM (SELECT *, row_number() OVER (PARTITION BY user_id {order}) AS nth "
        f"FROM ({events}))) {order}"
    )


PUBLISHED: dict[PublishedSplit, Published] = {
    "collm-ml1m": Published(
        "rating >= 4", _collm, 0, {"train": 33_891, "valid": 10_401, "test": 7_331}, False
    ),
    "rella-ml1m": Published(
        "rating > 3",
        _rella,
        _RELLA_HISTORY,
        {"train": 776_007 + _RELLA_HISTORY * 6_040, "valid": 97_000, "test": 97_002},
        True,
    ),
}

BUILD = BuildOptions(min_interactions=1)
"""A user with one interaction has a target too."""


def read_published(
    workspace: Workspace,
    path: str,
    split: PublishedSplit,
    requests: Literal["time", "none"] = MOVIELENS_REQUESTS,
) -> Source:
    """MovieLens-1M, a folder or zip, as a Source whose splits are those of a protocol.

    Args:
        requests: as of `read_movielens`.

    Raises UserError as `read_movielens` does, and for requests in a split that cuts through them.
    """
    protocol = PUBLISHED[split]
    if requests == "time" and protocol.cuts_seconds:
        raise UserError(
            f"--requests time: expected a split that never parts ratings of one second; {split} "
            "orders them by movie. Leave it out."
        )
    source = read_movielens(workspace, path, protocol.label, requests)
    return replace(
        source,
        name=split,
        events=protocol.events(source.events),
        split_column="split",
        description=source.description | {"protocol": split},
    )
