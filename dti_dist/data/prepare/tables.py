"""What every engine asks of the raw interactions: checks, users, split boundaries, statistics.

The SQL here is what DuckDB and Spark have in common, so that both find, refuse and split the same.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import accumulate
from typing import Any, Literal, Protocol

import pyarrow as pa

from dti_dist.data.dataset import (
    SPLITS,
    DayCounts,
    InteractionRules,
    RequestStatistics,
    SplitCounts,
    SplitRule,
    Statistics,
)
from dti_dist.data.prepare.columns import MAIN_LABEL, EventColumn, split_place
from dti_dist.data.prepare.statistics import date_of_day, distribution, sizes
from dti_dist.errors import UserError
from dti_dist.sql import literal

_DAY = 86_400  # seconds


class Tables(Protocol):
    """Raw interactions that an engine has read, as SQL tables.

    ::

        events        user_id, item_id, time_us, timestamp (seconds), label (double), input_order,
                      and ``columns``
        told_items    item_id (dense), source_id, of the items that have text
        known_events  those of events whose item is among them: ``keep_known`` makes them
        interactions  as these, without request: ``form_requests`` makes them

    ``input_order`` grows in the order of the files and of the rows in each: equal times keep it.
    """

    name: str
    text_columns: list[str]
    split_column: str | None
    rules: InteractionRules
    columns: tuple[EventColumn, ...]

    def rows(self, query: str, doing: str) -> list[dict[str, Any]]:
        """A small result. ``doing`` says in an error what failed, e.g. "ranking the users"."""

    def create(self, table: str, query: str, doing: str) -> None:
        """Keep the result of a query as a table."""

    def define(self, table: str, query: str) -> None:
        """Let a name stand for a query."""

    def bring(self, table: str, query: str, doing: str) -> None:
        """Keep the result of a query, no larger than the item table, as a table of DuckDB on this
        machine."""

    def add(self, table: str, rows: pa.Table, doing: str) -> None:
        """Keep a small table of this process."""

    def place(self, input_order: int) -> str:
        """Where an interaction is in the input: "row 7 of FILE", counted from 1."""


def check_events(tables: Tables) -> None:
    """Refuse interactions without user, item, time, label, or what their other columns must be."""
    missing = {
        "user_id": (("a user", "null or empty"), "coalesce(user_id, '') = ''"),
        "item_id": (("an item", "null or empty"), "coalesce(item_id, '') = ''"),
        "time_us": (("a timestamp", "null"), "time_us IS NULL"),
    } | {
        column.name: (column.missing, column.is_missing)
        for column in (MAIN_LABEL, *tables.columns)
        if column.missing
    }
    refused = {column.name: column for column in (MAIN_LABEL, *tables.columns) if column.allowed}
    wrong = {f"{name}_missing": condition for name, (_, condition) in missing.items()}
    wrong |= {f"{name}_refused": f"NOT ({column.allowed})" for name, column in refused.items()}
    counts = ", ".join(
        f"count(CASE WHEN {condition} THEN 1 END) AS {name}_count, "
        f"min(CASE WHEN {condition} THEN input_order END) AS {name}_first"
        for name, condition in wrong.items()
    )
    (found,) = tables.rows(
        f"SELECT count(*) AS total, {counts} FROM events", "checking the interactions"
    )
    if not found["total"]:
        raise UserError(
            f"{tables.name}: expected interactions, found none: the input has no rows. Check the "
            "paths."
        )
    for name, ((what, none), _) in missing.items():
        if count := found[f"{name}_missing_count"]:
            place, _ = _interaction(tables, found[f"{name}_missing_first"])
            raise UserError(
                f"{tables.name}: expected {what} in every interaction; {count:,} have none "
                f"({none}). The first is {place}. Remove or fill these rows, or check which "
                "column the command reads."
            )
    for name, column in refused.items():
        if count := found[f"{name}_refused_count"]:
            place, event = _interaction(tables, found[f"{name}_refused_first"])
            value = "null" if event[name] is None else repr(event[name]).removesuffix(".0")
            raise UserError(
                f"{column.option or tables.name}: expected {column.expected} in every interaction; "
                f"{count:,} have something else. The first is {value} in {place}. {column.remedy}"
            )


def _interaction(tables: Tables, input_order: int) -> tuple[str, dict[str, Any]]:
    """An interaction in words, and its row of events."""
    (event,) = tables.rows(
        f"SELECT * FROM events WHERE input_order = {input_order}", "finding an interaction"
    )
    place = tables.place(input_order)
    return f"{place} (user {event['user_id']}, item {event['item_id']})", event


def listed(names: list[str]) -> str:
    return ", ".join(repr(name) for name in names)


@dataclass(frozen=True)
class UserCounts:
    """``per_user``: users by their number of interactions; the others are left out.

    ``kept_events`` is the FROM clause of the interactions of the users that stay.
    """

    per_user: dict[int, int]
    users_left_out: int
    interactions_left_out: int

    @property
    def users(self) -> int:
        return sum(self.per_user.values())

    @property
    def interactions(self) -> int:
        return sum(length * users for length, users in self.per_user.items())

    @property
    def kept_events(self) -> str:
        # Without anyone to leave out the join would cost and change nothing.
        return "interactions" + (" SEMI JOIN users USING (user_id)" if self.users_left_out else "")


def count_users(tables: Tables, fewest: int) -> UserCounts:
    """Make the table ``users`` (user_id, interactions) of those with enough interactions."""
    doing = "counting the users"
    tables.create(
        "all_users",
        "SELECT user_id, count(*) AS interactions FROM interactions GROUP BY user_id",
        doing,
    )
    tables.create("users", f"SELECT * FROM all_users WHERE interactions >= {fewest}", doing)
    found = tables.rows(
        "SELECT interactions, count(*) AS users FROM all_users GROUP BY interactions", doing
    )
    users = {row["interactions"]: row["users"] for row in found}
    few = {length: count for length, count in users.items() if length < fewest}
    if len(few) == len(users):
        raise UserError(
            f"{tables.name}: expected users with at least {fewest} interactions; all "
            f"{sum(few.values()):,} users have fewer. Check the user column."
        )
    return UserCounts(
        per_user={length: count for length, count in users.items() if length not in few},
        users_left_out=sum(few.values()),
        interactions_left_out=sum(length * count for length, count in few.items()),
    )


@dataclass(frozen=True)
class Day:
    """Targets, and clicks among them, of one day since 1970-01-01 UTC."""

    interactions: int
    clicks: int
    first_timestamp: int
    last_timestamp: int


def targets_of(tables: Tables, interactions: str) -> str:
    """A FROM clause of the targets among those of a FROM clause."""
    if "is_target" not in {column.name for column in tables.columns}:
        return interactions
    return f"(SELECT * FROM {interactions} WHERE is_target) AS targets"


def count_days(tables: Tables, targets: str) -> dict[int, Day]:
    """By day, in time order. ``targets`` is a FROM clause. Raises UserError if it has no rows."""
    found = tables.rows(
        f"SELECT CAST(floor(timestamp / {_DAY}) AS BIGINT) AS day, count(*) AS interactions, "
        "CAST(sum(label) AS BIGINT) AS clicks, min(timestamp) AS first_timestamp, "
        f"max(timestamp) AS last_timestamp FROM {targets} GROUP BY 1",
        "counting the days",
    )
    if not found and tables.rules.requests:
        raise UserError(
            f"{tables.name}: expected targets; --context-only "
            f"{tables.rules.requests.context_only!r} holds for all interactions. Change the "
            "expression, or leave it out."
        )
    return {row.pop("day"): Day(**row) for row in sorted(found, key=lambda row: row["day"])}


def choose_split(
    tables: Tables,
    rule: Literal["time", "leave-last"],
    fractions: tuple[float, float, float],
    days: Mapping[int, Day],
    interactions: str,
    times: tuple[int, int] | None = None,
) -> SplitRule:
    """Find the timestamps at which valid and test begin under the rule ``time``, or take those
    that are given. Where a column says the splits, that is the rule, and the others are not."""
    targets = targets_of(tables, interactions)
    if tables.split_column:
        check_split_order(tables, interactions)
        return _column_split(tables, targets, tables.split_column)
    if rule == "leave-last":
        return SplitRule(rule="leave-last")
    if times is not None:
        return _given_split(tables, targets, *times)
    total = sum(day.interactions for day in days.values())
    train, valid, _ = fractions
    boundaries = {
        split: _boundary(tables, days, targets, round(total * share))
        for split, share in [("valid", train), ("test", train + valid)]
    }
    return SplitRule(rule="time", fractions=fractions, boundaries=boundaries)


def check_split_order(tables: Tables, events: str) -> None:
    """Refuse users whose interactions, in time order, are not first train, then valid, then test.

    ``events`` is a FROM clause with user_id, time_us, timestamp, split and input_order, which is
    negative for what is in a data set.
    """
    doing = "checking the order of the splits"

    def times(aggregate: str, condition: str) -> str:
        return f"{aggregate}(CASE WHEN split {condition} THEN time_us END)"

    # Only users whose splits meet in time are sorted: few, as a rule.
    tables.create(
        "users_to_sort",
        f"SELECT user_id FROM {events} GROUP BY user_id HAVING "
        f"{times('max', '= ' + literal('train'))} >= {times('min', '<> ' + literal('train'))} OR "
        f"{times('max', '<> ' + literal('test'))} >= {times('min', '= ' + literal('test'))}",
        doing,
    )
    columns = ("split", "timestamp", "time_us", "input_order")
    before = ", ".join(f"lag({name}) OVER in_order AS {name}_before" for name in columns)
    tables.create(
        "disordered",
        f"SELECT * FROM (SELECT user_id, {', '.join(columns)}, {before} FROM {events} SEMI JOIN "
        "users_to_sort USING (user_id) WINDOW in_order AS (PARTITION BY user_id ORDER BY time_us, "
        f"input_order)) AS pairs WHERE {split_place('split')} < {split_place('split_before')}",
        doing,
    )
    (found,) = tables.rows("SELECT count(DISTINCT user_id) AS users FROM disordered", doing)
    if not found["users"]:
        return
    (first,) = tables.rows("SELECT * FROM disordered ORDER BY input_order LIMIT 1", doing)

    def step(suffix: str) -> str:
        order = first[f"input_order{suffix}"]
        place = tables.place(order) if order >= 0 else "the data set"
        return (
            f"{first[f'split{suffix}']} at {date_and_time(first[f'timestamp{suffix}'])} ({place})"
        )

    remedy = "Correct the column or the times."
    if first["time_us"] == first["time_us_before"]:
        remedy = "Equal times keep the order of the input: put the rows, or the files, in order."
    raise UserError(
        f"--split-column {tables.split_column}: expected each user's interactions, in time order, "
        "to be first train, then valid, then test, for a target may see only what came before it; "
        f"{found['users']:,} users have another order. User {first['user_id']} has "
        f"{step('_before')} before {step('')}. {remedy}"
    )


def before_split(rule: SplitRule, split: str) -> str:
    """SQL for whether an interaction belongs to an earlier split, other than by leave-last."""
    if rule.boundaries is None:
        return f"{split_place('split')} < {SPLITS.index(split)}"
    return f"timestamp < {rule.boundaries[split]}"


def _column_split(tables: Tables, targets: str, column: str) -> SplitRule:
    found = tables.rows(f"SELECT DISTINCT split FROM {targets}", "counting the splits")
    present = {row["split"] for row in found}
    if empty := [split for split in SPLITS if split not in present]:
        raise UserError(
            f"--split-column {column}: expected interactions in every split; {', '.join(empty)} "
            "has none. Give it some of another's, the last of each user's train for example."
        )
    return SplitRule(rule="column", column=column)


def _given_split(tables: Tables, targets: str, valid: int, test: int) -> SplitRule:
    conditions = {
        "train": f"timestamp < {valid}",
        "valid": f"timestamp >= {valid} AND timestamp < {test}",
        "test": f"timestamp >= {test}",
    }
    counts = ", ".join(
        f"count(CASE WHEN {condition} THEN 1 END) AS {split}"
        for split, condition in conditions.items()
    )
    (found,) = tables.rows(
        f"SELECT {counts}, min(timestamp) AS first, max(timestamp) AS last FROM {targets}",
        "counting the splits",
    )
    if empty := [split for split in conditions if not found[split]]:
        raise UserError(
            f"--split-times: expected interactions in every split; {', '.join(empty)} has none. "
            f"Valid begins at {date_and_time(valid)} and test at {date_and_time(test)}; timestamps "
            f"run from {date_and_time(found['first'])} to {date_and_time(found['last'])}."
        )
    return SplitRule(rule="time", boundaries={"valid": valid, "test": test})


def _boundary(tables: Tables, days: Mapping[int, Day], targets: str, wanted: int) -> int:
    """The timestamp that has the nearest to the wanted number of targets before it; of two
    equally near, the earlier."""
    numbers = list(days)
    ends = list(accumulate(day.interactions for day in days.values()))
    place = min(bisect_right(ends, wanted), len(numbers) - 1)
    before = ends[place] - days[numbers[place]].interactions
    # No timestamp of another day is nearer than the first of this one, but the next day's first.
    first = numbers[place] * _DAY
    seconds = tables.rows(
        f"SELECT timestamp, count(*) AS interactions FROM {targets} WHERE timestamp >= {first} AND "
        f"timestamp < {first + _DAY} GROUP BY timestamp",
        "finding the split's boundaries",
    )
    candidates = []
    for second in sorted(seconds, key=lambda row: row["timestamp"]):
        candidates.append((abs(before - wanted), second["timestamp"]))
        before += second["interactions"]
    if place + 1 < len(numbers):
        candidates.append((abs(before - wanted), days[numbers[place + 1]].first_timestamp))
    return min(candidates)[1]


def read_statistics(
    items: Tables,
    per_user: Mapping[int, int],
    days: Mapping[int, Day],
    requests: RequestStatistics | None,
) -> Statistics:
    """Texts are those of all ``known_events``; ``items`` has the table ``interacted``."""

    def counted(column: str) -> dict[int, int]:
        found = items.rows(
            f"SELECT {column}, CAST(sum(interactions) AS BIGINT) AS interactions FROM interacted "
            f"GROUP BY {column}",
            "measuring the texts",
        )
        return {row[column]: row["interactions"] for row in found}

    return Statistics(
        interactions_per_user=distribution(per_user),
        characters_per_interaction=sizes(counted("characters")),
        words_per_interaction=sizes(counted("words")),
        days={
            date_of_day(day): DayCounts(interactions=found.interactions, clicks=found.clicks)
            for day, found in days.items()
        },
        requests=requests,
    )


def refuse_empty_split(rule: SplitRule, users: UserCounts, days: Mapping[int, Day]) -> None:
    """Raise UserError if a split has no targets, and say why."""
    if rule.rule == "leave-last" and max(users.per_user) < 3:
        raise UserError(
            "the split train is empty: leave-last gives train all but a user's last two "
            "interactions, and no user has three. Use --split time, or more data."
        )
    if rule.boundaries is None:
        return
    first = min(day.first_timestamp for day in days.values())
    last = max(day.last_timestamp for day in days.values())
    # At each boundary there is an interaction, so a split between two of them is not empty.
    bounds = [first, rule.boundaries["valid"], rule.boundaries["test"], last + 1]
    ranges = zip(SPLITS, bounds[:-1], bounds[1:], strict=True)
    if empty := [split for split, begin, end in ranges if begin >= end]:
        raise UserError(
            f"the split {', '.join(empty)} is empty: timestamps run from {date_and_time(first)} to "
            f"{date_and_time(last)}, valid begins at {date_and_time(bounds[1])} and test at "
            f"{date_and_time(bounds[2])}, and equal timestamps can't be parted. Change "
            "--fractions, check the time column, or use --split leave-last."
        )


def refuse_split_without_targets(splits: Mapping[str, SplitCounts]) -> None:
    """Raise UserError if a split that was written has no targets."""
    if empty := [split for split, counts in splits.items() if not counts.targets]:
        raise UserError(
            f"the split {', '.join(empty)} is empty: leave-last gives test each user's last "
            "request, valid the one before and train the others, and no user has enough. Use "
            "--split time, --requests none, or more data."
        )


def date_and_time(timestamp: int | None) -> str:
    if timestamp is None:
        return "never"
    try:
        return datetime.fromtimestamp(timestamp, timezone.utc).strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return f"timestamp {timestamp}"
