"""Tables as people have them: each value is taken as it was written, or refused with its place."""

import csv
import datetime as dt
import gzip
import io
import json
import os
import random
import re
from collections import defaultdict
from functools import partial

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dti_dist.cli import main
from dti_dist.data.dataset import SPLITS, Dataset, iter_sequences
from dti_dist.data.prepare.build import BuildOptions, build_dataset
from dti_dist.data.prepare.events import EventColumns, read_events, read_item_table
from dti_dist.data.prepare.times import TimeRule
from dti_dist.errors import UserError
from dti_dist.options import RequestOptions

START = 1_700_000_000
ROWS = 40
USERS = [f"u{n % 5}" for n in range(ROWS)]
TABLES = int(os.environ.get("DTI_DIST_TEST_TABLES", "40"))


def events(**columns):
    """A table of 40 interactions of 5 users with 20 items; ratings 1 to 5 in turn."""
    whole = {
        "user": USERS,
        "item": [f"i{n % 20}" for n in range(ROWS)],
        "time": [START + n for n in range(ROWS)],
        "rating": [n % 5 + 1 for n in range(ROWS)],
    }
    return pa.table(whole | columns)


def lines(rating="{n}", time="{t}", user="u{u}", end="\n", header="user,item,time,rating", by=","):
    rows = [header.replace(",", by)] if header else []
    for n in range(ROWS):
        cells = [user.format(u=n % 5), f"i{n % 20}", time.format(t=START + n, d=n % 28 + 1)]
        rows.append(by.join([*cells, rating.format(n=n % 5 + 1, b=n % 2)]))
    return end.join(rows) + end


def json_lines(**columns):
    rows = events(**columns).to_pylist()
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(folder, files):
    paths = []
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, pa.Table):
            pq.write_table(content, path)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        paths.append(str(path))
    return paths


def item_table(**columns):
    names = [f"i{n}" for n in range(20)]
    return pa.table({"item": names, **(columns or {"title": [f"t {name}" for name in names]})})


@pytest.fixture
def prepared(tmp_path):
    """Prepare files, given as tables, text or bytes, or the paths of files that are there."""

    def prepare(files, label="rating >= 4", items=None, rule=None, names=(), **options):
        paths = write(tmp_path, files) if isinstance(files, dict) else files
        items = item_table() if items is None else items
        write(tmp_path / "items", {"items.parquet": items})
        texts = tuple(name for name in items.column_names if name != "item")
        columns = EventColumns("user", "item", "time", "item", texts, rule or TimeRule(), names)
        read = partial(
            read_events,
            paths=paths,
            items=[str(tmp_path / "items")],
            columns=columns,
            label=label,
            requests=RequestOptions(requests="none"),  # so that each row can be found again
        )
        options = {"fractions": (0.5, 0.25, 0.25), "context_limit": 10**6, **options}
        out = str(tmp_path / "out")
        return build_dataset(read, out, BuildOptions(force=True, **options))

    return prepare


def interactions(uri):
    """All (user, item, label, timestamp), each once."""
    dataset = Dataset.open(str(uri))
    names = dataset.items_table()["source_id"].to_pylist()
    found = []
    for split in SPLITS:
        for batch in iter_sequences(dataset, split):
            for row in batch.rows.to_pylist():
                columns = (row["item_ids"], row["labels"], row["timestamps"])
                for item, label, time in list(zip(*columns, strict=True))[row["target_start"] :]:
                    found.append((row["user_id"], names[item], label, time))
    return sorted(found)


def label_rate(summary):
    return summary.manifest.label_rate


# --- what is read right ----------------------------------------------------------------------

CLICKS = 0.4  # of events(): ratings 4 and 5 of 1 to 5


@pytest.mark.parametrize(
    ("files", "rate"),
    [
        ({"a.parquet": events(), "b.parquet": events(rating=[3.5] * ROWS)}, 0.2),
        ({"b.parquet": events(rating=[3.5] * ROWS), "c.parquet": events()}, 0.2),
        (
            {
                "a.parquet": events(),
                "b.parquet": events(rating=pa.array([3.5] * ROWS, pa.float32())),
            },
            0.2,
        ),
        ({"a.parquet": events(), "b.parquet": events(rating=[True] * ROWS)}, 0.2),
        ({f"{n:02}.csv": lines(rating="{n}" if n < 11 else "3.5") for n in range(12)}, 11 / 30),
        ({"a.csv": lines(), "b.csv": lines(header="user,item,time,rating").replace("u", "u")}, 0.4),
        ({"a.jsonl": json_lines(rating=[3.5] + [4] * (ROWS - 1))}, 39 / 40),
    ],
    ids=[
        "half stars second",
        "half stars first",
        "float32",
        "booleans",
        "the twelfth of twelve CSV files",
        "two CSV files",
        "JSON lines",
    ],
)
def test_a_column_has_the_widest_type_of_all_files(prepared, files, rate):
    assert label_rate(prepared(files)) == pytest.approx(rate)


def test_a_csv_is_not_typed_by_a_sample_of_its_rows(prepared):
    whole = "".join(f"u{n % 50},i{n % 20},{START + n},{n % 5 + 1}\n" for n in range(30_000))
    halves = "".join(f"u{n % 50},i{n % 20},{START + n},3.5\n" for n in range(30_000, 40_000))
    summary = prepared({"a.csv": f"user,item,time,rating\n{whole}{halves}"})
    assert label_rate(summary) == 12_000 / 40_000


def test_columns_that_are_not_needed_may_differ(prepared):
    files = {
        "a.parquet": events(x=[1] * ROWS),
        "b.parquet": events(x=["a"] * ROWS, y=[None] * ROWS).select([5, 4, 3, 2, 1, 0]),
        "c.parquet": events(),
    }
    assert label_rate(prepared(files)) == CLICKS
    texts = {
        "a.csv": lines(header="user,item,time,rating,x", rating="{n},1"),
        "b.csv": lines(header="user,item,time,rating", rating="{n}"),
        "c.csv": lines(header="user,item,time,x,rating", rating="a,{n}"),
    }
    assert label_rate(prepared(texts)) == CLICKS


def test_a_first_file_without_rows_or_values_is_no_obstacle(prepared):
    nothing = pa.table({name: pa.array([], pa.null()) for name in events().column_names})
    empty_csv = "user,item,time,rating\n"
    assert label_rate(prepared({"a.parquet": nothing, "b.parquet": events()})) == CLICKS
    assert label_rate(prepared({"a.csv": empty_csv, "b.csv": lines()})) == CLICKS


@pytest.mark.parametrize(
    "columns",
    [
        {"time": [dt.date(2024, 1, n % 28 + 1) for n in range(ROWS)]},
        {"time": [f"2024-01-{n % 28 + 1:02}" for n in range(ROWS)]},
        {"time": [dt.datetime(2024, 1, n % 28 + 1) for n in range(ROWS)]},
        {"time": [1_704_067_200 + 86_400 * (n % 28) for n in range(ROWS)]},
        {"time": [1_704_067_200_000 + 86_400_000 * (n % 28) for n in range(ROWS)]},
        {"time": [(1_704_067_200 + 86_400 * (n % 28)) * 10**9 + 999_999_999 for n in range(ROWS)]},
        {"time": [f"{1_704_067_200 + 86_400 * (n % 28)}.9999999" for n in range(ROWS)]},
        {"time": [f"2024-01-{n % 28 + 1:02}T01:00:00.9999999+01:00" for n in range(ROWS)]},
    ],
    ids=["date32", "ISO", "timestamp", "s", "ms", "ns", "fractions as text", "fractions as ISO"],
)
def test_times_become_the_second_that_they_lie_in(prepared, tmp_path, columns):
    prepared({"a.parquet": events(**columns)})
    expected = sorted(1_704_067_200 + 86_400 * (n % 28) for n in range(ROWS))
    assert sorted(time for *_, time in interactions(tmp_path / "out")) == expected


def test_nanoseconds_of_a_timestamp_are_not_rounded_up(prepared, tmp_path):
    times = pa.array([START * 10**9 + 999_999_999] * ROWS, pa.timestamp("ns"))
    prepared({"a.parquet": events(time=times)}, split="leave-last")
    assert {time for *_, time in interactions(tmp_path / "out")} == {START}


@pytest.mark.parametrize(
    ("times", "rule", "first"),
    [
        ([20240101 + n % 28 for n in range(ROWS)], TimeRule(None, "%Y%m%d"), 1_704_067_200),
        (
            [20240101000000 + n for n in range(ROWS)],
            TimeRule(None, "%Y%m%d%H%M%S"),
            1_704_067_200,
        ),
        (
            [f"{n % 12 + 1:02}/01/2024" for n in range(ROWS)],
            TimeRule(None, "%m/%d/%Y"),
            1_704_067_200,
        ),
        (list(range(ROWS)), TimeRule("s"), 0),
        ([n * 1000 for n in range(ROWS)], TimeRule("ms"), 0),
    ],
    ids=["yyyymmdd", "yyyymmddHHMMSS", "month first", "seconds from 0", "milliseconds from 0"],
)
def test_a_unit_or_a_format_says_how_times_are_written(prepared, tmp_path, times, rule, first):
    summary = prepared({"a.parquet": events(time=times)}, rule=rule)
    assert min(time for *_, time in interactions(tmp_path / "out")) == first
    notes = " ".join(summary.notes)
    assert ("lie outside the years 1990 to 2100; the first is 0 in row 1 of" in notes) == (
        rule.unit is not None
    )


@pytest.mark.parametrize(
    ("name", "content", "user"),
    [
        ("a.tsv", lines(by="\t"), "u{}"),
        ("a.csv", lines(by=";", user='"u;{u}"'), "u;{}"),
        ("a.csv", lines(user='"u,{u}"', end="\r\n"), "u,{}"),
        ("a.csv", lines(user='"u ""{u}"""'), 'u "{}"'),
        ("a.csv", lines(user='"u \\"{u}"'), 'u "{}'),
        ("a.csv", lines(user="'{u}'"), "'{}'"),
        ("a.csv", lines(user="00{u}"), "00{}"),
        ("a.csv", "\ufeff" + lines(), "u{}"),
        ("a.csv.gz", gzip.compress(lines().encode()), "u{}"),
        (
            "a.csv",
            lines(header="user,item,time,rating,x", rating='{n},"' + "x" * 3_000_000 + '"'),
            "u{}",
        ),
        ("a.jsonl", json_lines(), "u{}"),
        ("a.jsonl", json_lines(user=[n % 5 for n in range(ROWS)]), "{}"),
        ("a.ndjson.gz", gzip.compress(json_lines().encode()), "u{}"),
        ("part-0", events(), "u{}"),
        ("a.parq", events(), "u{}"),
        ("a.parquet.gzip", events(), "u{}"),
        ("part-0.snappy.parquet", events(), "u{}"),
        ("user=anna/rating=1/a.parquet", events(), "u{}"),
        ("a.pq", events(user=pa.array(USERS).dictionary_encode()), "u{}"),
        ("a.parquet", events(user=[user.encode() for user in USERS]), "u{}"),
    ],
    ids=[
        *("tabs", "semicolons", "commas in quotes", "doubled quotes", "backslashes"),
        *("single quotes", "leading zeros", "BOM", "gzip", "long cell"),
        *("JSON lines", "numbers as ids", "gzipped JSON lines"),
        *("no ending", "parq", "parquet.gzip", "Spark's", "folders like columns"),
        *("dictionary", "bytes"),
    ],
)
def test_forms_of_files(prepared, tmp_path, name, content, user):
    assert label_rate(prepared({name: content})) == CLICKS
    users = {found for found, *_ in interactions(tmp_path / "out")}
    assert users == {user.format(n) for n in range(5)}


def test_json_keys_may_be_missing_and_values_nested(prepared):
    rows = [{**row, "more": {"a": [1]}} for row in events().to_pylist()]
    assert label_rate(prepared({"a.jsonl": "".join(json.dumps(r) + "\n" for r in rows)})) == CLICKS


@pytest.mark.parametrize("wrong", ["events1.parquet", "eventsx.parquet"])
def test_a_path_stands_for_itself_whatever_its_letters(prepared, tmp_path, wrong):
    write(tmp_path, {wrong: events(user=["wrong"] * ROWS)})
    prepared({"events[1].parquet": events(), "events*.parquet": events(user=["star"] * ROWS)})
    users = {user for user, *_ in interactions(tmp_path / "out")}
    assert users == {"star", *(f"u{n}" for n in range(5))}


def test_a_file_that_is_named_twice_is_read_once_and_that_is_said(prepared, tmp_path):
    (path,) = write(tmp_path / "logs", {"a.parquet": events()})
    os.symlink(path, tmp_path / "b.parquet")
    summary = prepared([str(tmp_path / "logs"), path, str(tmp_path / "b.parquet")])
    assert summary.manifest.counts.interactions == ROWS
    assert "the events: 2 files are named more than once and read once" in summary.notes


def test_linked_folders_are_read_and_circles_end(prepared, tmp_path):
    write(tmp_path / "elsewhere", {"b.parquet": events(user=["linked"] * ROWS)})
    write(tmp_path / "logs", {"a.parquet": events()})
    os.symlink(tmp_path / "elsewhere", tmp_path / "logs" / "more")
    os.symlink(tmp_path / "logs", tmp_path / "logs" / "circle")
    assert prepared([str(tmp_path / "logs")]).manifest.counts.interactions == 2 * ROWS


@pytest.mark.parametrize("name", ["label", "timestamp", "input_order", "user_id", "rank", "row"])
def test_text_columns_may_have_any_name(prepared, name):
    assert label_rate(prepared({"a.parquet": events()}, items=item_table(**{name: ["a"] * 20})))


@pytest.mark.parametrize("name", ["user_id", "time_us", "label", "input", "a b", 'q"q', "größe"])
def test_columns_of_the_label_may_have_any_name(prepared, name):
    files = {"a.parquet": events(**{name: [1, 0] * (ROWS // 2)})}
    quoted = '"{}"'.format(name.replace('"', '""'))
    assert label_rate(prepared(files, label=quoted)) == 0.5


def test_columns_that_differ_in_case_are_told_apart(prepared):
    both = {"label": [0] * ROWS, "Label": [1, 0] * (ROWS // 2)}
    assert label_rate(prepared({"a.parquet": events(**both)}, label="Label")) == 0.5
    rows = csv_text(events(**both))
    assert label_rate(prepared({"a.csv": rows}, label="Label")) == 0.5
    with pytest.raises(UserError, match="label and Label differ in the case of letters alone"):
        prepared({"a.parquet": events(**both)}, label="LABEL = 1")


def csv_text(table):
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(table.column_names)
    writer.writerows(zip(*(column.to_pylist() for column in table.columns), strict=True))
    return out.getvalue()


def test_texts_of_items(prepared, tmp_path):
    many = {
        "title": [b"Caf\xc3\xa9"] * 20,
        "year": [1984.5] * 10 + [float("nan")] * 10,
        "tags": [["a", "b"]] * 20,
        "flag": [True] * 20,
    }
    prepared({"a.parquet": events()}, items=item_table(**many))
    table = Dataset.open(str(tmp_path / "out")).items_table()
    assert set(table["title"].to_pylist()) == {"Café"}
    assert sorted(set(table["year"].to_pylist())) == ["", "1984.5"]
    assert set(table["tags"].to_pylist()) == {"a, b"}
    assert set(table["flag"].to_pylist()) == {"true"}


def test_an_item_table_for_scoring_is_read_in_the_same_way(tmp_path):
    connection = duckdb.connect()
    items = item_table(title=[float("nan")] * 20, more=[b"Caf\xc3\xa9"] * 20)
    (path,) = write(tmp_path, {"items.parquet": items})
    found = read_item_table(connection, [path], "item", ["title", "more"])
    assert found["title"].null_count == 20
    assert set(found["more"].to_pylist()) == {"Café"}
    (path,) = write(tmp_path, {"empty.parquet": pa.table({"item": ["", "a"], "title": ["x", "y"]})})
    with pytest.raises(UserError, match=r"1 have none \(null or empty\)"):
        read_item_table(connection, [path], "item", ["title"])


def test_equal_labels_are_warned_of(prepared):
    summary = prepared({"a.parquet": events(event=["Click"] * ROWS)}, label="event = 'click'")
    assert "WARNING: all labels are 0" in str(summary)


def test_csv_without_a_header_with_names(tmp_path, capsys):
    (path,) = write(tmp_path, {"a.tsv": lines(by="\t", header="")})
    write(tmp_path, {"items.parquet": item_table()})
    command = ["prepare", "events", path, "--items", str(tmp_path / "items.parquet")]
    command += ["--user-col", "user", "--item-col", "item", "--time-col", "time"]
    command += ["--label", "rating >= 4", "--text-cols", "title", "--out", str(tmp_path / "out")]
    assert main(command) == 2
    found = capsys.readouterr().err
    assert "a.tsv seems to have no header: name its columns with --columns" in found
    assert len(found) < 500
    command += ["--columns", "user,item,time,rating", "--fractions", "0.5,0.25,0.25"]
    assert main(command) == 0
    assert len(interactions(tmp_path / "out")) == ROWS


def test_splits_may_begin_at_given_times(prepared, tmp_path):
    for times in ((START + 20, START + 30), (START + 20, START + 31)):
        prepared({"a.parquet": events()}, split_times=times)
        dataset = Dataset.open(str(tmp_path / "out"))
        counts = dataset.manifest.counts.splits
        assert [counts[split].targets for split in SPLITS] == [
            20,
            times[1] - times[0],
            START + 40 - times[1],
        ]
        assert dataset.manifest.split.boundaries == {"valid": times[0], "test": times[1]}
    with pytest.raises(UserError, match=r"--split-times: .* valid, test has none"):
        prepared({"a.parquet": events()}, split_times=(START + 40, START + 50))


def test_split_times_are_dates_or_seconds(tmp_path, capsys):
    (path,) = write(
        tmp_path, {"a.parquet": events(time=[f"2024-01-{n % 28 + 1:02}" for n in range(ROWS)])}
    )
    write(tmp_path, {"items.parquet": item_table()})
    command = ["prepare", "events", path, "--items", str(tmp_path / "items.parquet")]
    command += ["--user-col", "user", "--item-col", "item", "--time-col", "time"]
    command += ["--label", "rating >= 4", "--text-cols", "title", "--out", str(tmp_path / "out")]
    assert main([*command, "--split-times", "2024-01-15,2024-01-20T12:00:00Z"]) == 0
    assert Dataset.open(str(tmp_path / "out")).manifest.split.boundaries == {
        "valid": 1_705_276_800,
        "test": 1_705_752_000,
    }
    assert main([*command, "--split-times", "2024-01-15,soon", "--force"]) == 2
    assert "expected two times such as" in capsys.readouterr().err


def test_users_with_few_interactions_are_left_out_or_kept(prepared):
    once = events(user=["once", *USERS[1:]])
    summary = prepared({"a.parquet": once}, min_interactions=1)
    assert summary.manifest.counts.users == 6
    assert "targets without history before their request: 6 of 40" in str(summary)
    assert prepared({"a.parquet": once}).manifest.counts.users == 5
    assert prepared({"a.parquet": once}, min_interactions=8).manifest.counts.users == 4


# --- what is refused -------------------------------------------------------------------------

REFUSED = {
    "a label of 0.7": (
        {"a.parquet": events(rating=[0, 1] * 20), "b.parquet": events(rating=[0.7] * ROWS)},
        {"label": "rating"},
        r"0 or 1 in every .*; 40 have something else. The first is 0.7 in row 1 of \S+b.parquet",
    ),
    "a label of 2 after booleans": (
        {"a.parquet": events(rating=[True] * ROWS), "b.parquet": events(rating=[2] * ROWS)},
        {"label": "rating"},
        r"The first is 2 in row 1 of \S+b.parquet",
    ),
    "a label that is almost 1": (
        {"a.parquet": events(rating=[0.9999999] * ROWS)},
        {"label": "rating"},
        "The first is 0.9999999 in row 1",
    ),
    "ids of two kinds": (
        {"a.parquet": events(user=[7] * ROWS), "b.parquet": events(user=["007"] * ROWS)},
        {},
        r"--user-col user: .* found integers in \S+a.parquet and text in \S+b.parquet",
    ),
    "ids of two kinds in JSON": (
        {"a.jsonl": json_lines(user=["007"] * ROWS) + json_lines(user=[7] * ROWS)},
        {},
        "--user-col: expected user to be of one kind in all rows .* integer and text",
    ),
    "ids that are floats": (
        {"a.parquet": events(user=[7.5] * ROWS)},
        {},
        "expected ids that are strings or integers; found DOUBLE in",
    ),
    "empty ids": (
        {"a.parquet": events(user=["a", ""] * 20)},
        {},
        r"20 have none \(null or empty\). The first is row 2 of",
    ),
    "nulls alone": (
        {"a.parquet": events(), "b.parquet": events(user=pa.nulls(ROWS))},
        {},
        r"expected a user in every interaction; 40 have none .* row 1 of \S+b.parquet",
    ),
    "text and numbers": (
        {"a.parquet": events(), "b.parquet": events(rating=["3.5"] * ROWS)},
        {},
        r"--label 'rating >= 4': expected rating to be of one kind .* integers in \S+a.parquet",
    ),
    "text compared with a number": (
        {"a.parquet": events(rating=["3.5"] * ROWS)},
        {"label": "rating = 4"},
        r"it compares text with a number: \(rating = 4\)",
    ),
    "text in a list with numbers": (
        {"a.parquet": events(rating=["3.5"] * ROWS)},
        {"label": "rating IN (4, 5)"},
        "it compares text with a number",
    ),
    "dates as numbers": (
        {"a.parquet": events(time=[20240101 + n % 28 for n in range(ROWS)])},
        {},
        "found 20240101, which looks like a date. Add --time-format %Y%m%d.",
    ),
    "dates and times as numbers": (
        {"a.parquet": events(time=[20240101000000 + n for n in range(ROWS)])},
        {},
        "Add --time-format %Y%m%d%H%M%S.",
    ),
    "seconds and milliseconds": (
        {"a.parquet": events(time=[(START + n) * (1000 if n == 7 else 1) for n in range(ROWS)])},
        {},
        r"found 39 that are plausible as seconds and 1 as milliseconds, the first of them "
        r"1700000007000 in row 8 of \S+a.parquet",
    ),
    "infinite times": (
        {"a.parquet": events(time=[float("-inf"), *(float(START + n) for n in range(1, ROWS))])},
        {},
        "expected times that are finite; found -inf in row 1 of",
    ),
    "months or days": (
        {"a.csv": lines(time="{d:02}/01/2024")},
        {},
        r"found '01/01/2024' in row 1 of \S+a.csv. Say how they are written, e.g. --time-format",
    ),
    "a row of another format": (
        {"a.csv": lines(time="{d:02}/01/2024")},
        {"rule": TimeRule(None, "%m/%d/%Y")},
        r"--time-format %m/%d/%Y says; 16 are not; found '13/01/2024' in row 13 of \S+a.csv",
    ),
    "times of float32": (
        {
            "a.parquet": events(
                time=pa.array([float(START)] * ROWS, pa.float64()).cast(pa.float32())
            )
        },
        {},
        "float32, which holds seconds of today to 128 s",
    ),
    "numbers that are no times": (
        {"a.parquet": events(time=list(range(ROWS)))},
        {},
        r"found 0 in row 1 of \S+a.parquet. Say what they are with --time-unit s|ms",
    ),
    "a struct as text": (
        {"a.parquet": events()},
        {"items": item_table(title=[{"name": "a"}] * 20)},
        r"--text-cols title: expected text, numbers or lists of them; found STRUCT",
    ),
    "text that is no UTF-8": (
        {"a.parquet": events(user=[b"Caf\xe9"] * ROWS)},
        {},
        r"failed in \S+a.parquet: Failure in decode",
    ),
    "CSV that is no UTF-8": (
        {"a.csv": lines(user="é{u}").encode("latin-1")},
        {},
        r"failed in \S+a.csv: CSV Error on Line: 2: Invalid unicode",
    ),
    "an empty file": (
        {"a.parquet": events(), "b.parquet": b""},
        {},
        r"b.parquet: expected data, found an empty file \(0 bytes\)",
    ),
    "JSON lines without rows": ({"a.jsonl": "\n"}, {}, r"found none: \S+a.jsonl has no rows"),
    "a broken second file": (
        {"a.parquet": events(), "b.parquet": b"PAR1 and no more"},
        {},
        r"the events: reading failed in \S+b.parquet: ",
    ),
    "a short row in a second file": (
        {"a.csv": lines(), "b.csv": lines() + "u1,i1,1700000000\n"},
        {},
        r"failed in \S+b.csv: CSV Error on Line: 42: Expected Number of Columns: 4 Found: 3",
    ),
    "a column that one file lacks": (
        {"a.csv": lines(), "b.csv": lines(header="user,item,time,stars")},
        {},
        r"rating: expected this column in every file of the events; \S+b.csv has only user, item,",
    ),
    "two columns of one name": (
        {"a.csv": lines(header="user,user,time,rating")},
        {},
        "expected one column user, found 2 of that name",
    ),
    "wrong names": (
        {"a.csv": lines(header="")},
        {"names": ("user", "item", "time")},
        r"expected as many names as \S+a.csv has columns, 4; found 3",
    ),
}


@pytest.mark.parametrize(("files", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_can_not_be_read_is_refused_with_its_place(
    prepared, tmp_path, files, options, message
):
    with pytest.raises(UserError, match=message):
        prepared(files, **options)
    assert not (tmp_path / "out").exists()


# --- random tables against plain Python ------------------------------------------------------


def random_files(rng):
    """Files of one format, and their interactions: (user, item, rating, seconds, file, row)."""
    form = rng.choice(["parquet", "csv", "jsonl"])
    units = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
    times = rng.choice(["s", "ms", "us", "ns", "iso", "mixed"])
    files, rows = {}, []
    for number in range(rng.randrange(1, 4)):
        ids = rng.choice(["text", "text", "text", "integer"])
        kind = rng.choice(["integer", "integer", "float", "float32", "bool", "text"])
        table = defaultdict(list)
        for _ in range(rng.randrange(0, 30)):
            seconds = START + rng.randrange(10**6)
            user = (
                rng.choice(["7", "007", "08", 'é,"', "-1"]) if ids == "text" else rng.randrange(9)
            )
            stars = {
                "integer": rng.randrange(1, 6),
                "float": rng.choice([1.0, 3.5, 4.0, 4.5]),
                "float32": rng.choice([0.5, 3.5, 4.0]),
                "bool": rng.random() < 0.5,
                "text": rng.choice(["3.5", "4", "05"]),
            }[kind]
            unit = rng.choice(["s", "ms"]) if times == "mixed" else times
            written = (
                dt.datetime.fromtimestamp(seconds, dt.timezone.utc).isoformat()
                if unit == "iso"
                else seconds * units[unit] + rng.randrange(units[unit])
            )
            item = f"i{rng.randrange(20)}"
            for name, value in zip(
                ("user", "item", "rating", "time"), (user, item, stars, written), strict=True
            ):
                table[name].append(value)
            rows.append((user, item, stars, seconds, unit))
        names = ["user", "item", "rating", "time"]
        if rng.random() < 0.4:
            extra = rng.choice(["x", "label", "Rating "])
            table[extra] = [rng.choice([1, None]) for _ in table["user"]]
            names.append(extra)
        rng.shuffle(names)
        files[f"{number}.{form}"] = _written(form, names, table, kind)
    return form, files, rows


def _written(form, names, table, kind):
    columns = {name: table[name] for name in names}
    if form == "parquet":
        types = {"rating": pa.float32()} if kind == "float32" else {}
        return pa.table({n: pa.array(v, types.get(n)) for n, v in columns.items()})
    rows = list(zip(*columns.values(), strict=True))
    if form == "jsonl":
        return (
            "".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows) or "\n"
        )
    out = io.StringIO()
    csv.writer(out).writerows([names, *rows])
    return out.getvalue()


def expected_of(form, rows):
    """(user, item, label, seconds) of users with two interactions; None: to be refused."""
    users = {isinstance(user, str) for user, *_ in rows}
    stars = {_family(value) for _, _, value, *_ in rows}
    units = {unit for *_, unit in rows}
    if form == "csv":
        users = {True}
        written = [str(value) for _, _, value, *_ in rows]
        numbers = [text for text in written if _is_number(text)]
        stars = {"number"} if len(numbers) == len(written) else {"text"}
        if {text.lower() for text in written} <= {"true", "false"}:
            stars = {"bool"}
    if len(users) > 1 or "text" in stars or len(units) > 1:
        return None
    if form == "jsonl" and len(stars) > 1:
        return None
    kept = defaultdict(list)
    for user, item, value, seconds, _ in rows:
        kept[str(user)].append((str(user), item, int(float(value) >= 4), seconds))
    return sorted(row for rows in kept.values() if len(rows) > 1 for row in rows)


def _is_number(text):
    try:
        float(text)
    except ValueError:
        return False
    return not (text.startswith("0") and len(text) > 1 and text[1] != ".")


def _family(value):
    return "bool" if isinstance(value, bool) else "text" if isinstance(value, str) else "number"


@pytest.mark.parametrize("seed", range(TABLES))
def test_random_tables_are_read_as_plain_python_reads_them_or_refused(prepared, tmp_path, seed):
    rng = random.Random(seed)
    form, files, rows = random_files(rng)
    expected = expected_of(form, rows)
    try:
        prepared(files, label="rating >= 4", split="leave-last")
    except UserError as refused:
        too_few = r"no rows|at least 2 interactions|is empty: leave-last|a first row"
        if expected is not None and not re.search(too_few, str(refused)):
            raise
        return
    assert expected is not None
    assert interactions(tmp_path / "out") == expected
