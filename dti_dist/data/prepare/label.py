"""The label and other expressions: the one place where a user's SQL is run."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import duckdb

from dti_dist.data.dataset import TASK_NAME, TaskRule
from dti_dist.data.prepare.input_table import NULL, Family, family
from dti_dist.errors import UserError, nearest
from dti_dist.sql import quote

_OPENING = "SELECT ("
_NAMED = re.compile(rf"\s*({TASK_NAME})\s*=(?!=)(.*)", re.S)


def read_tasks(labels: Sequence[str]) -> tuple[TaskRule, ...]:
    """The tasks of several --label, each a name and an expression, the main one first; none of a
    single one, which is an expression. Raises UserError for one without a name of its own."""
    if len(labels) == 1:
        return ()
    tasks = []
    for text in labels:
        if not (found := _NAMED.fullmatch(text)):
            raise UserError(
                f"--label {text!r}: expected NAME=EXPRESSION, since several labels are given, with "
                "a name of letters, digits and underscores. Give each a name, e.g. --label "
                "\"click=event = 'click'\"."
            )
        tasks.append(TaskRule(name=found[1], label=found[2].strip()))
    names = [task.name.lower() for task in tasks]  # SQL does not tell cases apart
    if again := next((name for name in names if names.count(name) > 1), None):
        raise UserError(
            f"--label: expected another name for each label; several are called {again!r}. Rename "
            "all but one."
        )
    return tuple(tasks)


class Expression:
    """One scalar SQL expression over the columns of an interaction.

    Attributes:
        names: of columns, as the expression has them.
        option: for messages.
    """

    def __init__(self, connection: duckdb.DuckDBPyConnection, text: str, option: str = "--label"):
        """Raises UserError for text that does not parse, that is more than one expression
        (statements, clauses), or that holds a subquery, ``*`` or a window."""
        self._connection, self._text = connection, text
        self.option = f"{option}{'' if option.endswith('=') else ' '}{text!r}"
        parsed = _parse(connection, text)
        if parsed["error"]:
            position = int(parsed.get("position") or 0) - len(_OPENING) + 1
            at = f"character {position}" if 0 < position <= len(text) else "its end"
            raise self._refused(f"DuckDB can't read it: {parsed['error_message']}, at {at}.")
        if _clauses(parsed) != _clauses(_parse(connection, "1")):
            raise self._refused("it is more than one expression.")
        self._parsed = parsed
        self._nodes = list(_nodes(parsed["statements"][0]["node"]["select_list"]))
        for node in self._nodes:
            kind = node.get("class")
            if kind in ("SUBQUERY", "STAR", "WINDOW"):
                raise self._refused(f"it may not hold a {kind.lower()}.")
            if kind == "FUNCTION" and _is_aggregate(connection, node["function_name"]):
                raise self._refused(
                    f"{node['function_name']}() is over many interactions; this is of one."
                )
        columns = (node for node in self._nodes if node.get("class") == "COLUMN_REF")
        self.names = list(dict.fromkeys(node["column_names"][0] for node in columns))

    def columns(self, known: Sequence[str]) -> list[str]:
        """The columns that the expression names, whatever the case of its letters.

        Raises:
            UserError: there is none of a name, or there are several.
        """
        found: dict[str, str] = {}
        for name in self.names:
            fitting = [column for column in known if column.lower() == name.lower()]
            if not fitting:
                raise self._refused(
                    f"no column {name!r} among {', '.join(known)}.{nearest(name, known)}"
                )
            column = name if name in fitting else fitting[0]
            clash = len(fitting) > 1 and name not in fitting
            if clash or found.setdefault(name.lower(), column) != column:
                raise self._refused(
                    f"{' and '.join(fitting)} differ in the case of letters alone, which SQL does "
                    "not tell apart. Write one of them as it is, or rename it."
                )
        return list(found.values())

    def sql(self, types: Mapping[str, str]) -> str:
        """The expression in parentheses, for columns of these types.

        Raises:
            UserError: it compares text with numbers, which SQL does by rounding: '3.5' = 4.
        """
        nulls = _nulls(types)
        for node in self._nodes:
            kinds = [(part, self._family(part, nulls)) for part in _compared(node)]
            numbers = any(kind in ("integer", "number") for _, kind in kinds)
            for part, kind in kinds:
                if numbers and kind == "text" and not _is_whole_number(part):
                    raise self._refused(
                        f"it compares text with a number: {self._sql_of(node)}. Put the number in "
                        "quotes, or cast the text, as in CAST(rating AS DOUBLE) >= 4."
                    )
        return f"({self._text}\n)"

    def type(self, types: Mapping[str, str]) -> str:
        """DuckDB's of its values, for columns of these types; NULL where DuckDB refuses it."""
        return self._type(f"({self._text}\n)", _nulls(types)) or NULL

    def _family(self, node: dict[str, Any], columns: str) -> Family | None:
        found = self._type(self._sql_of(node), columns)
        return family(found) if found else None

    def _type(self, expression: str, columns: str) -> str | None:
        query = f"SELECT {expression}" + (f" FROM (SELECT {columns})" if columns else "")
        try:
            return str(self._connection.sql(query).types[0])
        except duckdb.Error:  # DuckDB says what is wrong where it runs the whole
            return None

    def _sql_of(self, node: dict[str, Any]) -> str:
        statement = copy.deepcopy(self._parsed)
        statement["statements"][0]["node"]["select_list"] = [node]
        query = "SELECT json_deserialize_sql(?::JSON)"
        (found,) = self._connection.execute(query, [json.dumps(statement)]).fetchall()
        return found[0].removeprefix("SELECT ")

    def _refused(self, problem: str) -> UserError:
        return UserError(
            f"{self.option}: {problem} Expected one SQL expression over the columns of an "
            'interaction, e.g. "rating >= 4" or "event = \'click\'".'
        )


def _nulls(types: Mapping[str, str]) -> str:
    """A select list of columns of these types."""
    return ", ".join(
        f"{NULL if kind == NULL else f'NULL::{kind}'} AS {quote(name)}"
        for name, kind in types.items()
    )


def _compared(node: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts that a comparison brings to one type; none of another node."""
    if node.get("class") == "COMPARISON":
        return [node["left"], node["right"]]
    if node.get("class") == "BETWEEN":
        return [node["input"], node["lower"], node["upper"]]
    if node.get("type") in ("COMPARE_IN", "COMPARE_NOT_IN"):
        return node["children"]
    return []


def _is_whole_number(node: dict[str, Any]) -> bool:
    """Whether it is a text such as '4', which equals a number as it equals its text."""
    if node.get("class") != "CONSTANT":
        return False
    # Older releases of DuckDB write a constant as a value instead.
    text = node["literal"]["text"] if "literal" in node else (node["value"] or {}).get("value")
    return re.fullmatch(r"-?\d+", str(text)) is not None


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
