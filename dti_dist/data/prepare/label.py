"""The label expression: the one place where a user's SQL is run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import duckdb

from dti_dist.errors import UserError, nearest

_OPENING = "SELECT ("


def label_expression(connection: duckdb.DuckDBPyConnection, text: str, columns: list[str]) -> str:
    """Check that ``text`` is one scalar SQL expression over ``columns``; give it in parentheses.

    Raises UserError for text that does not parse, that is more than one expression (statements,
    clauses), that holds a subquery, ``*`` or a window, or that names an unknown column.
    """

    def refuse(problem: str) -> UserError:
        return UserError(
            f"--label {text!r}: {problem} Expected one SQL expression over the columns of an "
            'interaction, e.g. "rating >= 4" or "event = \'click\'".'
        )

    parsed = _parse(connection, text)
    if parsed["error"]:
        position = int(parsed.get("position") or 0) - len(_OPENING) + 1
        at = f"character {position}" if 0 < position <= len(text) else "its end"
        raise refuse(f"DuckDB can't read it: {parsed['error_message']}, at {at}.")
    if _clauses(parsed) != _clauses(_parse(connection, "1")):
        raise refuse("it is more than one expression.")
    for node in _nodes(parsed["statements"][0]["node"]["select_list"]):
        kind = node.get("class")
        if kind in ("SUBQUERY", "STAR", "WINDOW"):
            raise refuse(f"a label may not hold a {kind.lower()}.")
        if kind == "FUNCTION" and _is_aggregate(connection, node["function_name"]):
            raise refuse(f"{node['function_name']}() is over many interactions; a label is of one.")
        # SQL identifiers match whatever their case.
        if kind == "COLUMN_REF":
            name = node["column_names"][0]
            if name.lower() not in (column.lower() for column in columns):
                raise refuse(
                    f"no column {name!r} among {', '.join(columns)}.{nearest(name, columns)}"
                )
    return f"({text}\n)"


def _is_aggregate(connection: duckdb.DuckDBPyConnection, function: str) -> bool:
    found = connection.execute(
        "SELECT DISTINCT function_type FROM duckdb_functions() WHERE function_name = ?",
        [function.lower()],
    ).fetchall()
    return found == [("aggregate",)]


def _parse(connection: duckdb.DuckDBPyConnection, text: str) -> dict[str, Any]:
    # The line break ends a comment in the text, which would hide the parenthesis.
    query = f"{_OPENING}{text}\n)"
    answer = connection.execute("SELECT json_serialize_sql(?::VARCHAR)", [query]).fetchall()
    return json.loads(answer[0][0])


def _clauses(parsed: dict[str, Any]) -> Any:
    """All of the parsed query but its first expression: equal for any two single expressions."""

    def without_places(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: without_places(v) for k, v in value.items() if "location" not in k}
        if isinstance(value, list):
            return [without_places(v) for v in value]
        return value

    statements = without_places(parsed["statements"])
    for statement in statements:
        select_list = statement["node"].get("select_list", [])
        statement["node"]["select_list"] = len(select_list)
    return statements


def _nodes(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list):
        for child in value:
            yield from _nodes(child)
