"""Request files: values of any kind that holds them are read as they were written."""

from __future__ import annotations

from datetime import datetime, timezone
from uuid import UUID

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dti_dist.config import StorageConfig
from dti_dist.errors import UserError
from dti_dist.serving.request_files import RequestFiles

LISTS = {
    "user_id": ["u1", None, "u3"],
    "history_items": [["i1", "i2"], ["i3", "i4"], None],
    "history_labels": [[1, 0], [0, 1], None],
    "history_timestamps": [[10, 20], [30, 40], None],
    "candidates": [["i5", "i6"], ["i7", None], ["i8", "i9"]],
    "timestamp": [100, None, 300],
}
PLAIN = {
    "user_id": pa.string(),
    "history_items": pa.list_(pa.string()),
    "history_labels": pa.list_(pa.int64()),
    "history_timestamps": pa.list_(pa.int64()),
    "candidates": pa.list_(pa.string()),
    "timestamp": pa.int64(),
}
TEXTS = [
    pa.large_string(),
    pa.string_view(),
    pa.binary(),
    pa.large_binary(),
    pa.binary_view(),
    pa.dictionary(pa.int32(), pa.string()),
    pa.dictionary(pa.int8(), pa.large_string()),
]
LIST_KINDS = [pa.large_list, pa.list_view, pa.large_list_view, lambda kind: pa.list_(kind, 2)]


def table_of(columns=LISTS, **kinds):
    chosen = {**PLAIN, **kinds}
    return pa.table({name: _array(values, chosen[name]) for name, values in columns.items()})


def _array(values, kind):
    try:
        return pa.array(values, kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):  # dictionaries in lists
        return pa.array(values).cast(kind)


def read(path, *tables, row_group_size=None):
    path.mkdir(exist_ok=True)
    for number, table in enumerate(tables):
        file = path / f"{number}.parquet"
        try:
            pq.write_table(table, file, row_group_size=row_group_size)
            pq.ParquetFile(file).read_row_group(0)
        except pa.ArrowException as error:  # old releases: of views, and of fixed-size nulls
            pytest.skip(f"pyarrow {pa.__version__} can't store it: {error}")
    files = RequestFiles.open(str(path), StorageConfig())
    return files.read(0, files.total)


def values_of(rows):
    """What is read, as plain Python values."""

    def lists(found, values):
        parts = zip(found.offsets[:-1], found.offsets[1:], strict=True)
        return [values[first:end] for first, end in parts]

    stamps = rows.timestamps
    return {
        "user_id": None if rows.user_ids is None else rows.user_ids.to_pylist(),
        "history_items": lists(rows.items, rows.items.values.to_pylist()),
        "history_labels": lists(rows.items, rows.labels.tolist()),
        "history_timestamps": None if stamps is None else lists(rows.items, stamps.tolist()),
        "candidates": lists(rows.candidates, rows.candidates.values.to_pylist()),
        "timestamp": None if rows.times is None else rows.times.tolist(),
        "has_history": rows.has_history.tolist(),
    }


EXPECTED = {
    "user_id": ["u1", None, "u3"],
    "history_items": [["i1", "i2"], ["i3", "i4"], []],
    "history_labels": [[1, 0], [0, 1], []],
    "history_timestamps": [[10, 20], [30, 40], []],
    "candidates": [["i5", "i6"], ["i7", None], ["i8", "i9"]],
    "timestamp": [100, 2**63 - 1, 300],
    "has_history": [True, True, False],
}


def test_requests_are_read(tmp_path):
    assert values_of(read(tmp_path, table_of())) == EXPECTED


@pytest.mark.parametrize("kind", TEXTS, ids=str)
def test_ids_are_read_from_any_kind_of_text(tmp_path, kind):
    table = table_of(user_id=kind, history_items=pa.list_(kind), candidates=pa.list_(kind))
    assert values_of(read(tmp_path, table)) == EXPECTED
    assert values_of(read(tmp_path, table, row_group_size=1)) == EXPECTED


def test_uuids_are_read_as_prepare_writes_them(tmp_path):
    ids = [UUID(int=1), None, UUID("cf9b2a52-31c4-4c2c-8b5b-0d4b8c1b2e00")]
    table = table_of()
    users = pa.array([one and one.bytes for one in ids], pa.uuid())
    items = pa.ListArray.from_arrays([0, 1, 2, 3], users)
    for at, name, column in ((0, "user_id", users), (4, "candidates", items)):
        table = table.set_column(at, name, column)
    found = values_of(read(tmp_path, table))
    assert found["user_id"] == [one and str(one) for one in ids]
    assert found["candidates"] == [[one and str(one)] for one in ids]


@pytest.mark.parametrize("list_of", LIST_KINDS, ids=["large", "view", "large view", "fixed size"])
def test_lists_are_read_from_any_kind_of_list(tmp_path, list_of):
    kinds = {
        name: list_of(kind.value_type) for name, kind in PLAIN.items() if pa.types.is_list(kind)
    }
    found = read(tmp_path, table_of(**kinds))
    assert values_of(found) == EXPECTED


@pytest.mark.parametrize(
    ("labels", "stamps"),
    [
        (pa.bool_(), pa.timestamp("ms")),
        (pa.float32(), pa.timestamp("ns", "Europe/Berlin")),
        (pa.uint8(), pa.uint32()),
        (pa.int8(), pa.uint64()),
    ],
    ids=str,
)
def test_labels_and_times_are_read_from_any_kind_of_number(tmp_path, labels, stamps):
    times = LISTS["timestamp"], LISTS["history_timestamps"]
    table = table_of(history_labels=pa.list_(labels))
    moments, lists = times
    if pa.types.is_timestamp(stamps):

        def at(second):
            return None if second is None else datetime.fromtimestamp(second, timezone.utc)

        moments = [at(second) for second in moments]
        lists = [None if row is None else [at(second) for second in row] for row in lists]
    columns = {
        "timestamp": pa.array(moments, stamps),
        "history_timestamps": pa.array(lists, pa.list_(stamps)),
    }
    for name, column in columns.items():
        table = table.set_column(table.schema.get_field_index(name), name, column)
    assert values_of(read(tmp_path, table)) == EXPECTED


def test_labels_and_times_are_read_from_dictionaries(tmp_path):
    def dictionary(values):
        found = pa.ListArray.from_arrays([0, 2, 4], pa.array(values).dictionary_encode())
        return pa.concat_arrays([found, pa.nulls(1, found.type)])

    columns = {
        "history_labels": dictionary([1, 0, 0, 1]),
        "history_timestamps": dictionary([10, 20, 30, 40]),
        "timestamp": pa.array([100, None, 300]).dictionary_encode(),
    }
    table = table_of()
    for name, column in columns.items():
        table = table.set_column(table.schema.get_field_index(name), name, column)
    assert values_of(read(tmp_path, table)) == EXPECTED


def test_times_before_1970_are_rounded_down(tmp_path):
    table = table_of().set_column(
        5, "timestamp", pa.array([-1_500, None, 300_999], "timestamp[ms]")
    )
    assert read(tmp_path, table).times.tolist() == [-2, 2**63 - 1, 300]


def test_columns_of_nothing_but_null_are_read(tmp_path):
    """pandas writes a column without a value as one of type null."""
    columns = {name: [None] * 3 for name in LISTS} | {"candidates": LISTS["candidates"]}
    table = pa.table(columns)
    assert table.schema.field("user_id").type == table.schema.field("timestamp").type == pa.null()
    found = values_of(read(tmp_path, table))
    assert found["user_id"] == [None] * 3
    assert found["history_items"] == found["history_labels"] == [[], [], []]
    assert found["candidates"] == LISTS["candidates"]
    assert found["has_history"] == [False] * 3
    nothing = values_of(read(tmp_path, pa.table({**columns, "candidates": [None] * 3})))
    assert nothing["candidates"] == [[], [], []]


def test_histories_that_are_all_empty_are_read(tmp_path):
    names = ("history_items", "history_labels", "history_timestamps")
    table = pa.table({**LISTS, **{name: [[], [], []] for name in names}})
    assert table.schema.field("history_items").type == pa.list_(pa.null())
    found = values_of(read(tmp_path, table))
    assert found["history_items"] == found["history_labels"] == [[], [], []]
    assert found["has_history"] == [True] * 3


@pytest.mark.parametrize("list_of", [pa.list_, LIST_KINDS[0], LIST_KINDS[-1]])
def test_files_without_a_value_go_with_those_that_have_some(tmp_path, list_of):
    full = table_of(candidates=list_of(pa.string())).append_column("note", pa.array(["x"] * 3))
    nothing = pa.table({**{name: [None] * 3 for name in LISTS}, "note": [None] * 3})
    empty = nothing.set_column(1, "history_items", pa.array([[], [], []]))
    empty = empty.set_column(4, "candidates", pa.array([[], [], []]))
    found = read(tmp_path, nothing, full, empty)
    for name, expected in EXPECTED.items():
        assert values_of(found)[name][3:6] == expected, name
    assert found.kept["note"].to_pylist() == [None] * 3 + ["x"] * 3 + [None] * 3
    assert values_of(found)["candidates"][:3] == values_of(found)["candidates"][6:] == [[]] * 3


def test_files_of_other_types_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"1\.parquet: expected the columns of .*0\.parquet"):
        read(tmp_path, table_of(), table_of(timestamp=pa.int32()))


@pytest.mark.parametrize("name", ["scores", "context"])
def test_a_column_of_the_name_of_one_that_is_added_is_refused(tmp_path, name):
    table = table_of().append_column(name, pa.array([1, 2, 3]))
    with pytest.raises(UserError, match=rf"0\.parquet: column '{name}': .* Rename the column"):
        read(tmp_path, table)


def test_two_columns_of_one_name_are_refused(tmp_path):
    table = table_of().append_column("user_id", pa.array(["a", "b", "c"]))
    with pytest.raises(UserError, match=r"2 columns 'user_id'\. Rename or remove all but one"):
        read(tmp_path, table)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("user_id", pa.array(["a", b"\xe9", "c"], pa.binary()), r"row 2: user_id: .* b'\\xe9'"),
        (
            "candidates",
            pa.array([["a"], ["b", b"caf\xe9"], []], pa.list_(pa.binary())),
            r"row 2: candidates: expected ids in UTF-8, found b'caf\\xe9'",
        ),
        (
            "history_labels",
            pa.array([[1, 0], [0, None], None]),
            "row 2: history_labels: expected 0 or 1, found null",
        ),
        ("history_labels", pa.array([[1, 0], [0, 0.5], None]), "expected 0 or 1, found 0.5"),
        (
            "timestamp",
            pa.array([5, 2**64 - 1, 5], pa.uint64()),
            f"row 2: timestamp: expected seconds since 1970 or timestamps, found {2**64 - 1}",
        ),
        (
            "history_timestamps",
            pa.array([[10, 20], [30, 1_700_000_000_000], None]),
            "row 2: history_timestamps: .* found 1700000000000. Divide milliseconds",
        ),
        ("history_timestamps", pa.array([[10, 20], [30, None], None]), "row 2: .*found null"),
        ("timestamp", pa.array([1.5, 2, 3]), "column 'timestamp': expected seconds or timestamps"),
        ("user_id", pa.array([1.0, 2, None]), "column 'user_id': expected text or integers, found"),
        ("candidates", pa.array([[{"id": 1}]] * 3), "column 'candidates': expected lists of item"),
        ("candidates", pa.array([[["a"]]] * 3), "column 'candidates': expected lists of item"),
        ("user_id", pa.array([["a"]] * 3), "column 'user_id': expected text or integers, found"),
    ],
)  # fmt: skip
def test_what_is_no_request_is_refused_with_file_and_place(tmp_path, name, values, message):
    table = table_of()
    with pytest.raises(UserError, match=message) as refused:
        read(tmp_path, table.set_column(table.schema.get_field_index(name), name, values))
    assert f"{tmp_path}/0.parquet" in str(refused.value)
