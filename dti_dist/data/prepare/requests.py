"""Which interactions of a user are one request, and which rows of a log are one interaction."""

from __future__ import annotations

from dti_dist.data.prepare.tables import Tables, date_and_time
from dti_dist.errors import UserError

_SAME = "user_id, item_id, timestamp"  # rows that are equal in these are one interaction


def form_requests(tables: Tables) -> list[str]:
    """Make the table ``interactions`` of ``known_events``, and give lines for the summary.

    Without requests they are the same. With requests an interaction's time is that of its request,
    rows of one user, item and request are one interaction, and what is neither history nor a target
    is left out. Raises UserError for a request with two splits.
    """
    rule = tables.rules.requests
    if rule is None:
        tables.define("interactions", "SELECT * FROM known_events")
        return []
    # All but the time, which is the request's.
    values = ["label", *(column.name for column in tables.columns if column.kept)]
    rows, notes = "known_events", []
    if rule.by == "column":
        notes += _take_times_of_requests(tables, values)
        rows = "timed_events"
    if tables.split_column:
        _refuse_two_splits(tables, rows)
    if joined := _join_rows(tables, rows, values):
        notes += joined
        rows = "joined_events"
    interactions = (
        f"SELECT {_SAME}, timestamp * 1000000 AS time_us, {', '.join(values)}, input_order "
        f"FROM {rows}"
    )
    if rule.history and rule.context_only:
        (found,) = tables.rows(
            f"SELECT count(*) AS rows FROM {rows} WHERE NOT (is_history OR is_target)",
            "counting what is neither history nor target",
        )
        interactions += " WHERE is_history OR is_target"
        if found["rows"]:
            notes.append(
                "interactions left out, for they are neither history nor targets: "
                f"{found['rows']:,}"
            )
    tables.define("interactions", interactions)
    return notes


def _take_times_of_requests(tables: Tables, values: list[str]) -> list[str]:
    """Make ``timed_events``: rows whose timestamp is the first of their request."""
    doing = "finding the times of requests"
    tables.create(
        "request_times",
        "SELECT user_id, request, min(timestamp) AS timestamp FROM known_events "
        "GROUP BY user_id, request",
        doing,
    )
    others = ", ".join(f"known_events.{column}" for column in ("item_id", *values, "input_order"))
    tables.create(
        "timed_events",
        f"SELECT known_events.user_id, request_times.timestamp, {others} FROM known_events JOIN "
        "request_times ON known_events.user_id = request_times.user_id AND known_events.request = "
        "request_times.request",
        doing,
    )
    (found,) = tables.rows(
        "SELECT coalesce(CAST(sum(requests - 1) AS BIGINT), 0) AS joined FROM (SELECT count(*) AS "
        "requests FROM request_times GROUP BY user_id, timestamp) AS times",
        doing,
    )
    if not found["joined"]:
        return []
    return [
        "requests that began in the same second as another of their user, and are one with it: "
        f"{found['joined']:,}"
    ]


def _refuse_two_splits(tables: Tables, rows: str) -> None:
    found = tables.rows(
        f"SELECT user_id, timestamp, min(split) AS one, max(split) AS other FROM {rows} GROUP BY "
        "user_id, timestamp HAVING min(split) <> max(split) ORDER BY timestamp, user_id LIMIT 1",
        "comparing the splits of requests",
    )
    if found:
        (first,) = found
        raise UserError(
            f"--split-column {tables.split_column}: expected one split for all interactions of a "
            f"request; user {first['user_id']} has {first['one']} and {first['other']} in the one "
            f"at {date_and_time(first['timestamp'])}. Correct the column, or say with "
            "--request-col or --requests none what is one request."
        )


def _join_rows(tables: Tables, rows: str, values: list[str]) -> list[str]:
    """Make ``joined_events``, where rows of one interaction are one; nothing where all are."""
    doing = "looking for rows of one interaction"
    most = ", ".join(f"max({column}) AS {column}" for column in values)
    tables.create(
        "repeated",
        f"SELECT {_SAME}, {most}, min(input_order) AS input_order, min(label) AS least_label, "
        f"count(*) AS copies FROM {rows} GROUP BY {_SAME} HAVING count(*) > 1",
        doing,
    )
    (found,) = tables.rows(
        "SELECT coalesce(CAST(sum(copies - 1) AS BIGINT), 0) AS joined, coalesce(CAST(sum(CASE "
        "WHEN least_label < label THEN copies - 1 END) AS BIGINT), 0) AS clicks FROM repeated",
        doing,
    )
    if not found["joined"]:
        return []
    columns = ", ".join([_SAME, *values, "input_order"])
    tables.define(
        "joined_events",
        f"SELECT {columns} FROM {rows} ANTI JOIN repeated USING ({_SAME}) UNION ALL "
        f"SELECT {columns} FROM repeated",
    )
    return [
        f"rows joined with another of the same user, item and request: {found['joined']:,}; "
        f"{found['clicks']:,} where one row says click and another does not, "
        f"{found['joined'] - found['clicks']:,} repeats"
    ]
