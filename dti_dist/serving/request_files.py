"""Requests to score, in Parquet files on disk or in an object store."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dti_dist.config import StorageConfig
from dti_dist.data import storage
from dti_dist.data.dataset import EventField
from dti_dist.data.samples import IntArray
from dti_dist.errors import UserError, nearest
from dti_dist.serving.given import MOST_SECONDS

HISTORY_COLUMNS = ("history_items", "history_labels", "history_timestamps")
ADDED_COLUMNS = ("context", "scores")


@dataclass(frozen=True)
class _File:
    uri: str
    size: int
    row_group_rows: list[int]

    @property
    def rows(self) -> int:
        return sum(self.row_group_rows)


@dataclass(frozen=True)
class Lists:
    """Lists end to end: row r of R is values[offsets[r] : offsets[r + 1]]."""

    values: Any
    offsets: IntArray

    @property
    def lengths(self) -> IntArray:
        return np.diff(self.offsets)


@dataclass(frozen=True)
class RequestRows:
    """Some consecutive requests.

    Attributes:
        first: number of the first one, over all files.
        kept: their columns but for the histories, as they were read.
        candidates: Lists of item ids (strings).
        user_ids: [R] strings, null where not given; None without the column.
        items: Lists of item ids (strings); labels: int8; timestamps: int64 seconds or None.
        has_history: [R] whether the request brings its history.
        times: [R] int64 seconds, the largest int64 where not given; None without the column.
        profiles: [R] texts of each user by column, None where not given; None without the column.
        events: by event column, texts, or of one with borders float64, of the interactions of
            histories and of candidates, null where not given.
    """

    first: int
    kept: pa.Table
    candidates: Lists
    user_ids: pa.Array | None
    items: Lists
    labels: npt.NDArray[np.int8]
    timestamps: IntArray | None
    has_history: npt.NDArray[np.bool_]
    times: IntArray | None
    profiles: list[dict[str, str | None] | None] | None = None
    events: Mapping[str, tuple[pa.Array, pa.Array]] = field(default_factory=dict)


@dataclass
class RequestFiles:
    """All requests of a file, or of the Parquet files of a folder in the order of their names.

    Reads any range of them; the row group read last stays in memory. Of each of `fields` the column
    of its name has the value of a request's candidates, or a list of theirs, and history_… a list.
    """

    files: list[_File]
    schema: pa.Schema
    settings: StorageConfig
    fields: Mapping[str, EventField] = field(default_factory=dict)
    _last: tuple[tuple[str, int], pa.Table] | None = field(default=None, repr=False)

    @classmethod
    def open(cls, uri: str, settings: StorageConfig) -> RequestFiles:
        """Read the footers.

        Raises:
            UserError: there is no Parquet file, one is broken, or columns are missing or differ.
        """
        files: list[_File] = []
        schema: pa.Schema | None = None
        for path, size in _list(uri, settings):
            with _open(path, size, settings) as file:
                found, metadata = file.schema_arrow, file.metadata
            _check_columns(path, found)
            common = found if schema is None else _common_schema(schema, found)
            if common is None:
                raise UserError(
                    f"{path}: expected the columns of {files[0].uri}, {_described(schema)}; found "
                    f"{_described(found)}. Score files of other columns apart."
                )
            schema = common
            groups = range(metadata.num_row_groups)
            files.append(_File(path, size, [metadata.row_group(g).num_rows for g in groups]))
        assert schema is not None
        return cls(files, schema, settings)

    @property
    def total(self) -> int:
        return sum(file.rows for file in self.files)

    @property
    def brings_histories(self) -> bool:
        return "history_items" in self.schema.names

    @property
    def names_users(self) -> bool:
        return "user_id" in self.schema.names

    def read(self, first: int, end: int) -> RequestRows:
        """Requests first … end - 1.

        Raises:
            UserError: a value that is none of a request; it names file and row.
        """
        tables, start = [], 0
        for file in self.files:
            for group, rows in enumerate(file.row_group_rows):
                low, high = max(first - start, 0), min(end - start, rows)
                if low < high:
                    read = self._row_group(file, group).slice(low, high - low)
                    tables.append(_with_types(read, self.schema))
                start += rows
        return self._checked(first, pa.concat_tables(tables).combine_chunks())

    def _row_group(self, file: _File, group: int) -> pa.Table:
        place = (file.uri, group)
        if self._last is None or self._last[0] != place:
            with _open(file.uri, file.size, self.settings) as opened:
                self._last = place, opened.read_row_group(group)
        return self._last[1]

    def where(self, row: int) -> str:
        """File and row of a request, for messages; rows count from 1."""
        for file in self.files:
            if row < file.rows:
                return f"{file.uri}, row {row + 1:,}"
            row -= file.rows
        raise IndexError(row)

    def _checked(self, first: int, table: pa.Table) -> RequestRows:
        rows = table.num_rows

        def column(name: str) -> pa.Array | None:
            return _plain(table[name].combine_chunks()) if name in table.schema.names else None

        def fail(row: int, problem: str) -> UserError:
            return UserError(f"{self.where(first + row)}: {problem}")

        def lists(name: str) -> tuple[Lists, npt.NDArray[np.bool_]]:
            values = column(name)
            if values is None or pa.types.is_null(values.type):
                return Lists(pa.nulls(0), np.zeros(rows + 1, dtype=np.int64)), np.zeros(rows, bool)
            lengths = pc.fill_null(pc.list_value_length(values), 0).to_numpy(zero_copy_only=False)
            offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
            given = values.is_valid().to_numpy(zero_copy_only=False)
            return Lists(_plain(pc.list_flatten(values)), offsets), given

        def text(values: pa.Array, name: str, offsets: IntArray) -> pa.Array:
            try:
                if isinstance(values.type, pa.UuidType):
                    values = pa.array(
                        map(str, values.to_pylist()), pa.string(), mask=values.is_null()
                    )
                found = pc.cast(values, pa.string())
                found.validate(full=True)
            except pa.ArrowInvalid as error:
                row, value = _first_not_utf8(values, offsets)
                raise fail(
                    row,
                    f"{name}: expected ids in UTF-8, found {value!r}. Write the ids in UTF-8, as "
                    "in the data set.",
                ) from error
            return found

        def numbers(values: pa.Array, name: str, offsets: IntArray) -> pa.Array:
            kind = values.type
            if not (
                pa.types.is_integer(kind)
                or pa.types.is_floating(kind)
                or pa.types.is_decimal(kind)
                or pa.types.is_null(kind)
            ):
                raise fail(
                    0,
                    f"{name}: expected numbers, since its classes were made of numbers; found "
                    f"{kind}. Give the number itself, not the text of its class.",
                )
            if pa.types.is_float32(kind) or pa.types.is_decimal(kind):  # by their digits
                values = pc.cast(values, pa.string())
            return pc.cast(values, pa.float64(), safe=False)

        def ids(name: str) -> tuple[Lists, npt.NDArray[np.bool_]]:
            found, given = lists(name)
            return Lists(text(found.values, name, found.offsets), found.offsets), given

        def seconds(
            values: pa.Array, name: str, offsets: IntArray
        ) -> tuple[IntArray, npt.NDArray[np.bool_]]:
            missing = values.is_null().to_numpy(zero_copy_only=False)
            if pa.types.is_timestamp(values.type):
                values = pc.floor_temporal(values, unit="second")
                values = pc.cast(values, pa.timestamp("s", values.type.tz))
            if pa.types.is_timestamp(values.type) or pa.types.is_null(values.type):
                values = pc.cast(values, pa.int64())
            stamps = pc.fill_null(values, 0).to_numpy(zero_copy_only=False)
            wrong = np.flatnonzero((stamps > MOST_SECONDS) | (stamps < -MOST_SECONDS))
            if len(wrong):
                raise fail(
                    _row_at(offsets, wrong[0]),
                    f"{name}: expected seconds since 1970 or timestamps, found "
                    f"{values[int(wrong[0])].as_py()}. Divide milliseconds by 1000, or cast the "
                    "column to a timestamp.",
                )
            return stamps.astype(np.int64), missing

        candidates, _ = ids("candidates")
        items, has_history = ids("history_items")
        label_lists, _ = lists("history_labels")
        stamp_lists, _ = lists("history_timestamps")
        stamps_given = "history_timestamps" in table.schema.names
        for name, other in (("history_labels", label_lists), ("history_timestamps", stamp_lists)):
            row = _first_difference(items.lengths, other.lengths)
            if row is not None and (name == "history_labels" or stamps_given):
                raise fail(
                    row,
                    f"expected history_items and {name} of one length, found "
                    f"{items.lengths[row]} and {other.lengths[row]}.",
                )
        values = label_lists.values
        if pa.types.is_boolean(values.type):
            values = pc.cast(values, pa.int8())
        labels = pc.fill_null(pc.cast(values, pa.float64()), np.nan).to_numpy(zero_copy_only=False)
        wrong = np.flatnonzero((labels != 0) & (labels != 1))
        if len(wrong):
            found = label_lists.values[int(wrong[0])].as_py()
            raise fail(
                _row_at(label_lists.offsets, wrong[0]),
                f"history_labels: expected 0 or 1, found {'null' if found is None else found}.",
            )
        stamps = None
        if stamps_given:
            stamps, missing = seconds(stamp_lists.values, "history_timestamps", stamp_lists.offsets)
            if missing.any():
                row = _row_at(stamp_lists.offsets, int(np.argmax(missing)))
                raise fail(row, "history_timestamps: expected a time, found null.")
        times, users = None, column("user_id")
        time_column = column("timestamp")
        if time_column is not None:
            times, missing = seconds(time_column, "timestamp", np.arange(rows + 1))
            times = np.where(missing, np.iinfo(np.int64).max, times)
        if users is not None:
            users = text(users, "user_id", np.arange(rows + 1))
        profiles = column("profile")
        events = {}
        for name, event_field in self.fields.items():
            kind, read = (pa.float64(), numbers) if event_field.borders else (pa.string(), text)
            past, of_history = lists(f"history_{name}"), pa.nulls(len(items.values), kind)
            if f"history_{name}" in table.schema.names:
                if (row := _first_difference(items.lengths, past[0].lengths)) is not None:
                    raise fail(
                        row,
                        f"expected history_items and history_{name} of one length, found "
                        f"{items.lengths[row]} and {past[0].lengths[row]}.",
                    )
                of_history = read(past[0].values, f"history_{name}", past[0].offsets)
            own = column(name)
            if own is None:
                of_candidates = pa.nulls(len(candidates.values), kind)
            elif _is_list(own.type):
                own_lists, _ = lists(name)
                if (row := _first_difference(candidates.lengths, own_lists.lengths)) is not None:
                    raise fail(
                        row,
                        f"expected one value in {name}, or as many as candidates, "
                        f"{candidates.lengths[row]}; found {own_lists.lengths[row]}.",
                    )
                of_candidates = read(own_lists.values, name, own_lists.offsets)
            else:
                whole = read(own, name, np.arange(rows + 1))
                of_candidates = whole.take(np.arange(rows).repeat(candidates.lengths))
            events[name] = of_history, of_candidates
        of_histories = {*HISTORY_COLUMNS, *(f"history_{name}" for name in self.fields)}
        kept = [name for name in table.schema.names if name not in of_histories]
        return RequestRows(
            first=first,
            kept=table.select(kept),
            candidates=candidates,
            user_ids=users,
            items=items,
            labels=labels.astype(np.int8),
            timestamps=stamps,
            has_history=has_history,
            times=times,
            profiles=None if profiles is None else profiles.to_pylist(),
            events=events,
        )


def _first_difference(one: IntArray, other: IntArray) -> int | None:
    """The first row with another length; None where all are equal."""
    differ = np.flatnonzero(one != other)
    return int(differ[0]) if len(differ) else None


def _row_at(offsets: IntArray, place: int) -> int:
    """The row whose list holds a value."""
    return int(np.searchsorted(offsets, place, side="right")) - 1


def _first_not_utf8(values: pa.Array, offsets: IntArray) -> tuple[int, bytes]:
    """The row of the first value that is no UTF-8, and the value."""
    for place, value in enumerate(pc.cast(values, pa.binary()).to_pylist()):
        try:
            (value or b"").decode()
        except UnicodeDecodeError:
            return _row_at(offsets, place), value
    raise AssertionError("all values are UTF-8")


def _plain(values: pa.Array) -> pa.Array:
    return values.dictionary_decode() if pa.types.is_dictionary(values.type) else values


def _is_list(kind: pa.DataType) -> bool:
    views = pa.types.is_list_view, pa.types.is_large_list_view
    return _is_cast_list(kind) or any(test(kind) for test in views)


def _is_cast_list(kind: pa.DataType) -> bool:
    """A kind of list that pyarrow casts to another; views it does not."""
    tests = pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list
    return any(test(kind) for test in tests)


def _common_schema(first: pa.Schema, other: pa.Schema) -> pa.Schema | None:
    """The schema of two files, whose columns are the same but where one holds nothing but null."""
    if first.names != other.names:
        return None
    kinds = [_common(a.type, b.type) for a, b in zip(first, other, strict=True)]
    if None in kinds:
        return None
    fields = [pa.field(name, kind) for name, kind in zip(first.names, kinds, strict=True)]
    return pa.schema(fields, first.metadata)


def _common(first: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    if first == other or pa.types.is_null(other):
        return first
    if pa.types.is_null(first):
        return other
    if _is_cast_list(first) and _is_cast_list(other):
        one = _common(first.value_type, other.value_type)
        return None if one is None else pa.list_(one)
    return None


def _with_types(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The table with the types of `schema`, which differ where all is null."""
    columns = [column.cast(kind) for column, kind in zip(table.columns, schema.types, strict=True)]
    return pa.table(columns, schema=schema)


def _list(uri: str, settings: StorageConfig) -> list[tuple[str, int]]:
    """The Parquet files that a path stands for, and their sizes, by name."""
    found = storage.list_files(uri, settings)
    if list(found) == ["."]:  # a file, whatever its name
        return [(uri, found["."])]
    names = [
        name
        for name in sorted(found)
        if name.endswith((".parquet", ".pq"))
        and not any(part.startswith((".", "_")) for part in name.split("/"))
    ]
    if not names:
        raise UserError(
            f"{uri}: expected a Parquet file, or a folder with some, of requests; found "
            f"{'none in ' + str(len(found)) + ' files' if found else 'nothing'} there. "
            "Check --requests."
        )
    return [(storage.join(uri, name), found[name]) for name in names]


@contextmanager
def _open(uri: str, size: int, settings: StorageConfig) -> Iterator[pq.ParquetFile]:
    local = storage.is_local(uri)
    try:
        source = (
            storage.filesystem(uri)[1]
            if local
            else pa.PythonFile(storage.RangeFile(uri, size, settings), mode="r")
        )
        with pq.ParquetFile(source, pre_buffer=not local) as file:
            yield file
    except pa.ArrowException as error:
        raise UserError(
            f"{uri}: expected a Parquet file of requests, found one that can't be read: "
            f"{str(error).splitlines()[0]}. Write it again."
        ) from error


def _check_columns(path: str, schema: pa.Schema) -> None:
    def is_id(kind: pa.DataType) -> bool:
        tests = (
            pa.types.is_integer,
            pa.types.is_string,
            pa.types.is_large_string,
            pa.types.is_string_view,
            pa.types.is_binary,
            pa.types.is_large_binary,
            pa.types.is_binary_view,
        )
        return isinstance(kind, pa.UuidType) or any(test(kind) for test in tests)

    def is_time(kind: pa.DataType) -> bool:
        return bool(pa.types.is_integer(kind) or pa.types.is_timestamp(kind))

    def is_label(kind: pa.DataType) -> bool:
        return bool(
            pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_floating(kind)
        )

    for name in schema.names:
        if name in ADDED_COLUMNS:
            raise UserError(
                f"{path}: column {name!r}: expected other names than those of the columns that the "
                f"output adds, {' and '.join(ADDED_COLUMNS)}. Rename the column, or leave it out."
            )
        if schema.names.count(name) > 1:
            raise UserError(
                f"{path}: expected columns of different names, found "
                f"{schema.names.count(name)} columns {name!r}. Rename or remove all but one."
            )
    expected = {
        "candidates": ("lists of item ids (text or integers)", True, is_id),
        "user_id": ("text or integers", False, is_id),
        "history_items": ("lists of item ids (text or integers)", True, is_id),
        "history_labels": ("lists of 0 and 1", True, is_label),
        "history_timestamps": ("lists of seconds or timestamps", True, is_time),
        "timestamp": ("seconds or timestamps", False, is_time),
    }
    if "profile" in schema.names:
        kind = schema.field("profile").type
        if not (pa.types.is_struct(kind) or pa.types.is_null(kind)):
            raise UserError(
                f"{path}: column 'profile': expected a struct of the user's texts by column, found "
                f"{kind}."
            )
    if "candidates" not in schema.names:
        raise UserError(
            f"{path}: expected the column 'candidates', {expected['candidates'][0]}; found "
            f"{', '.join(schema.names)}.{nearest('candidates', schema.names)}"
        )
    if not {"user_id", "history_items"} & set(schema.names):
        raise UserError(
            f"{path}: expected the column 'user_id', or 'history_items' and 'history_labels'; "
            f"found {', '.join(schema.names)}."
        )
    if "history_items" in schema.names and "history_labels" not in schema.names:
        raise UserError(
            f"{path}: expected 'history_labels' beside 'history_items': whether each was clicked. "
            f"Found {', '.join(schema.names)}.{nearest('history_labels', schema.names)}"
        )
    for name, (what, as_list, fits) in expected.items():
        if name not in schema.names:
            continue
        kind = schema.field(name).type
        if pa.types.is_null(kind):
            continue
        is_list = _is_list(kind)
        value = kind.value_type if is_list else kind
        value = value.value_type if pa.types.is_dictionary(value) else value
        # Lists that are all empty have no type of values.
        if is_list != as_list or not (fits(value) or (is_list and pa.types.is_null(value))):
            raise UserError(f"{path}: column {name!r}: expected {what}, found {kind}.")


def _described(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in schema)
