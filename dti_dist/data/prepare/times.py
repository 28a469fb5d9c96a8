"""A column of times as microseconds since 1970: dates, ISO text, text of a format, or numbers.

Numbers are read as seconds, milliseconds, microseconds or nanoseconds where all of them then lie
between 1990 and 2100, or as the unit that is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dti_dist.data.prepare.input_table import (
    NULL,
    Column,
    InputTable,
    Value,
    as_it_is,
    as_type,
    family,
)
from dti_dist.errors import UserError
from dti_dist.options import TimeUnit
from dti_dist.sql import literal, quote

_YEARS = "1990 to 2100"
_FIRST, _END = 631_152_000, 4_102_444_800  # their seconds
# Of a unit: how many make a second.
_UNITS: dict[TimeUnit, int] = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_WORDS: dict[TimeUnit, str] = {
    "s": "seconds",
    "ms": "milliseconds",
    "us": "microseconds",
    "ns": "nanoseconds",
}
_LATEST = 253_402_300_800  # seconds, the year 10000: no calendar goes farther
# Dates written as numbers: between which values they lie, and the format that reads them.
_DATES = {
    "%Y%m%d": (19_900_101, 21_000_000),
    "%Y%m%d%H%M%S": (19_900_101_000_000, 21_000_000_000_000),
}
_ISO = r"\d{4}-\d{2}-\d{2}([T ]\d{2}:\d{2}(:\d{2}([.,]\d+)?)?\s?(Z|UTC|[+-]\d{2}(:?\d{2})?)?)?"
_NUMBER = r"\s*[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d{1,3})?\s*"
_WHOLE = r"\s*[+-]?\d+\s*"
_TIME, _WRITTEN = "\x01time", "\x01written"  # beside the names of other columns


@dataclass(frozen=True)
class TimeRule:
    """What the user says of the time column; None: it is found out."""

    unit: TimeUnit | None = None
    format: str | None = None

    def __post_init__(self) -> None:
        if self.unit and self.format:
            raise UserError(
                f"--time-unit {self.unit} --time-format {self.format}: expected one of them; found "
                "both. A format reads text and dates written as numbers, a unit numbers."
            )


class TimeColumn:
    """The time column of a table: what a survey must ask of it, and how its values are read."""

    def __init__(self, table: InputTable, column: str, rule: TimeRule):
        """Raises UserError for a column of another kind than times."""
        self._table, self._rule = table, rule
        self.option = f"--time-col {column}"
        self._type = table.one_type(column, self.option)
        if self._type == NULL:
            self._type = "VARCHAR"
        self._column, self._name = column, quote(_TIME)
        self.value = (column, as_it_is if self._type == "VARCHAR" else as_type(self._type))
        kind = family(self._type)
        if kind not in ("time", "text", "integer", "number"):
            raise self._refused("expected numbers, dates or ISO strings", self._type)
        if self._type == "FLOAT":
            raise self._refused(
                "expected times that are exact",
                "float32, which holds seconds of today to 128 s",
                "Write them as int64 or float64.",
            )
        if rule.unit and kind == "time":
            raise self._refused(f"expected numbers with --time-unit {rule.unit}", self._type)
        if rule.format and kind not in ("text", "integer"):
            raise self._refused(f"expected text with --time-format {rule.format}", self._type)
        self._kind = kind

    @property
    def values(self) -> dict[str, Value]:
        written: dict[str, Value] = {_WRITTEN: (self._column, self._written)}
        return {_TIME: self.value} | (written if self._kind == "text" else {})

    def _written(self, column: Column) -> str:
        """What a text is written as; each condition is tried where none before it holds."""
        _, as_value = self.value
        value = as_value(column)
        return (
            f"CASE WHEN regexp_full_match({value}, {literal(_WHOLE)}) THEN 'whole' "
            f"WHEN regexp_full_match({value}, {literal(_NUMBER)}) THEN 'number' "
            f"WHEN regexp_full_match({value}, {literal(_ISO)}) AND "
            f"TRY_CAST({value} AS TIMESTAMPTZ) IS NOT NULL THEN 'iso' END"
        )

    @property
    def _number(self) -> str:
        return f"TRY_CAST({self._name} AS DOUBLE)"

    @property
    def _formatted(self) -> str:
        assert self._rule.format
        return f"try_strptime(CAST({self._name} AS VARCHAR), {literal(self._rule.format)})"

    def _conditions(self) -> dict[str, str]:
        """By what a value may be, the condition for it."""
        name, number = self._name, self._number
        if self._rule.format:
            return {"format": f"{self._formatted} IS NOT NULL"}
        if self._kind == "time":
            outside = f"epoch({name}) NOT BETWEEN {_FIRST} AND {_END}"
            return {"infinite": f"NOT isfinite({name})", "outside": outside}
        found = {"number": f"isfinite({number})"}
        if self._kind == "text":
            written = quote(_WRITTEN)
            found = {
                "whole": f"{written} = 'whole'",
                "number": f"({written} IN ('whole', 'number') AND isfinite({number}))",
                "iso": f"{written} = 'iso'",
            }
        for unit, of_second in _UNITS.items():
            found[unit] = f"{number} >= {_FIRST * of_second} AND {number} < {_END * of_second}"
            found[f"{unit} readable"] = f"abs({number}) < {_LATEST * of_second}"
        for written_as, (first, end) in _DATES.items():
            found[written_as] = f"{number} >= {first} AND {number} < {end}"
        return found

    @property
    def counts(self) -> dict[str, str]:
        """What a survey must ask."""
        return {"time all": f"count({self._name})"} | {
            f"time {what}": f"count(CASE WHEN {condition} THEN 1 END)"
            for what, condition in self._conditions().items()
        }

    def read(self, found: Mapping[str, Any]) -> tuple[str, str, list[str]]:
        """From the survey's values: SQL for microseconds, the unit in words, and notes.

        Raises:
            UserError: a value that is none of a time, or that may be read in several ways.
        """
        counts = {
            name.removeprefix("time "): value
            for name, value in found.items()
            if name.startswith("time ")
        }
        total = counts["all"]
        if self._rule.format:
            return self._read_format(counts)
        if self._kind == "time":
            return self._read_dates(counts)
        if self._kind == "text" and counts["iso"] == total and not self._rule.unit:
            return _epoch(f"CAST({self._name} AS TIMESTAMPTZ)"), "ISO text", []
        if counts["number"] < total:
            raise self._no_times(counts)
        unit = self._rule.unit or self._unit(counts)
        if counts[f"{unit} readable"] < total:
            place, value = self._first(f"NOT ({self._conditions()[f'{unit} readable']})")
            raise self._refused(
                f"expected {_WORDS[unit]} since 1970 before the year 10000", f"{value} in {place}"
            )
        notes = []
        if outside := total - counts[unit]:
            place, value = self._first(f"NOT ({self._conditions()[unit]})")
            notes.append(
                f"{outside:,} of {total:,} times in {self._column}, read as {_WORDS[unit]}, lie "
                f"outside the years {_YEARS}; the first is {value} in {place}"
            )
        whole = self._kind == "integer" or counts.get("whole") == total
        return self._to_us(unit, whole), _WORDS[unit], notes

    def _unit(self, counts: Mapping[str, int]) -> TimeUnit:
        """The one unit in which all numbers are plausible."""
        total = counts["all"]
        units = [unit for unit in _UNITS if counts[unit]]
        if not total:
            return "s"
        if len(units) == 1 and counts[units[0]] == total:
            return units[0]
        for format in _DATES:
            if counts[format] == total:
                _, value = self._first("true")
                raise self._refused(
                    "expected numbers that count from 1970, or dates with their format",
                    f"{value}, which looks like a date",
                    f"Add --time-format {format}.",
                )
        if not units:
            place, value = self._first("true")
            raise self._refused(
                f"expected times that lie in the years {_YEARS} as seconds, milliseconds, "
                "microseconds or nanoseconds since 1970",
                f"{value} in {place}",
                "Say what they are with --time-unit s|ms|us|ns or --time-format FORMAT.",
            )
        most = max(units, key=lambda unit: counts[unit])
        place, value = self._first(f"NOT ({self._conditions()[most]})")
        others = [f"{counts[unit]:,} as {_WORDS[unit]}" for unit in units if unit != most]
        left = total - sum(counts[unit] for unit in units)
        others += [f"{left:,} in no unit"] if left else []
        raise self._refused(
            f"expected all times in one unit, in the years {_YEARS}",
            f"{counts[most]:,} that are plausible as {_WORDS[most]} and {', '.join(others)}, the "
            f"first of them {value} in {place}",
            f"Fix or remove these rows, or say the unit with --time-unit, such as {most}.",
        )

    def _to_us(self, unit: TimeUnit, whole_numbers: bool) -> str:
        """Rounded down, and exact: text and integers never become doubles."""
        of_second, name = _UNITS[unit], self._name
        number = f"CAST({name} AS DECIMAL(28, 9))" if self._kind == "text" else name
        if of_second > 10**6:
            whole, by = f"CAST(floor({number}) AS HUGEINT)", of_second // 10**6
            if whole_numbers:
                whole = f"CAST({name} AS HUGEINT)"
            return f"CAST(({whole} - (({whole} % {by}) + {by}) % {by}) // {by} AS BIGINT)"
        times = 10**6 // of_second
        if whole_numbers:  # of text too: decimals take five times as long
            return f"CAST(CAST({name} AS HUGEINT) * {times} AS BIGINT)"
        if self._kind == "text":
            return f"CAST(floor({number} * {times}) AS BIGINT)"
        # The whole and the rest apart: their sum may have more digits than a double.
        whole = f"floor({name})"
        rest = f"CAST(floor(({name} - {whole}) * {times}) AS BIGINT)"
        return f"(CAST({whole} AS BIGINT) * {times} + {rest})"

    def _read_format(self, counts: Mapping[str, int]) -> tuple[str, str, list[str]]:
        if counts["format"] < counts["all"]:
            place, value = self._first(f"{self._formatted} IS NULL")
            raise self._refused(
                f"expected times as --time-format {self._rule.format} says; "
                f"{counts['all'] - counts['format']:,} are not",
                f"{value!r} in {place}",
                "Change the format, or fix these rows.",
            )
        return _epoch(self._formatted), f"format {self._rule.format}", []

    def _read_dates(self, counts: Mapping[str, int]) -> tuple[str, str, list[str]]:
        if counts["infinite"]:
            place, value = self._first(f"NOT isfinite({self._name})")
            raise self._refused("expected times that are finite", f"{value} in {place}")
        notes = []
        if outside := counts["outside"]:
            place, value = self._first(self._conditions()["outside"])
            notes.append(
                f"{outside:,} of {counts['all']:,} times in {self._column} lie outside the years "
                f"{_YEARS}; the first is {value} in {place}"
            )
        if self._type.endswith("_NS"):
            return f"(epoch_ns({self._name}) // 1000)", self._type.lower(), notes
        value = self._name if "ZONE" in self._type else f"CAST({self._name} AS TIMESTAMP)"
        return _epoch(value), self._type.lower(), notes

    def _no_times(self, counts: Mapping[str, int]) -> UserError:
        """Of values that are neither all numbers nor all ISO text."""
        conditions = self._conditions()
        if self._kind != "text":
            place, value = self._first(f"NOT isfinite({self._number})")
            return self._refused("expected times that are finite", f"{value} in {place}")
        known = "iso" if counts["iso"] > counts["number"] else "number"
        if not counts[known]:
            place, value = self._first("true")
        else:
            place, value = self._first(f"NOT coalesce({conditions[known]}, false)")
        return self._refused(
            "expected numbers or ISO dates such as 2024-05-01 or 2024-05-01T12:30:00Z",
            f"{value!r} in {place}",
            "Say how they are written, e.g. --time-format %d/%m/%Y, or convert the column.",
        )

    def _first(self, condition: str) -> tuple[str, Any]:
        return self._table.first_row(f"{self._name} IS NOT NULL AND ({condition})", self.values)

    def _refused(self, expected: str, found: str, advice: str = "") -> UserError:
        return UserError(
            f"{self.option}: {expected}; found {found}. "
            f"{advice or 'Convert the column, or name another.'}"
        )


def _epoch(timestamp: str) -> str:
    return f"epoch_us({timestamp})"
