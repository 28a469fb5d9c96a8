from __future__ import annotations

import hashlib
import random
import subprocess
import sys
import time
from collections import defaultdict
from functools import partial
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dti_dist.data import storage
from dti_dist.data.dataset import SPLITS, Dataset, iter_sequences
from dti_dist.data.prepare.build import BuildOptions, build_dataset
from dti_dist.data.prepare.events import EventColumns, read_events
from dti_dist.errors import UserError
from dti_dist.options import RequestOptions
from dti_dist.sql import open_workspace, stream

COLUMNS = EventColumns("user", "item", "time", item_key="item", texts=("title",))
START = 1_700_000_000


def random_events(users=30, length=12, seed=0):
    """(user, item, time, rating) in a random order, all times different."""
    rng = random.Random(seed)
    events = [
        (f"u{user}", f"i{rng.randrange(20)}", START + rng.randrange(10**6), rng.randrange(1, 6))
        for user in range(users)
        for _ in range(length)
    ]
    rng.shuffle(events)
    return events


def write_events(path: Path, events, **columns) -> str:
    user, item, timestamp, rating = (list(column) for column in zip(*events, strict=True))
    table = {"user": user, "item": item, "time": timestamp, "rating": rating} | columns
    pq.write_table(pa.table(table), path)
    return str(path)


def write_items(path: Path, names=None, titles=None) -> str:
    names = [f"i{n}" for n in range(20)] if names is None else names
    titles = titles or [f"title of {name}" for name in names]
    pq.write_table(pa.table({"item": names, "title": pa.array(titles, pa.string())}), path)
    return str(path)


def build(
    tmp_path,
    events,
    out=None,
    items=None,
    label="rating >= 4",
    columns=COLUMNS,
    requests="time",
    **options,
):
    """Build from event tuples, or from the paths of files."""
    if not isinstance(events[0], str):
        events = [write_events(tmp_path / "events.parquet", events)]
    items = items or write_items(tmp_path / "items.parquet")
    read = partial(
        read_events,
        paths=events,
        items=[items],
        columns=columns,
        label=label,
        requests=RequestOptions(requests=requests),
    )
    return build_dataset(read, str(out or tmp_path / "out"), BuildOptions(**options))


def sequences(uri, split):
    """All sequences of a split as dicts, item ids replaced by the source's."""
    dataset = Dataset.open(str(uri))
    names = dataset.items_table()["source_id"].to_pylist()
    rows = [row for batch in iter_sequences(dataset, split) for row in batch.rows.to_pylist()]
    for row in rows:
        row["item_ids"] = [names[item] for item in row["item_ids"]]
    return rows


# --- grouping, sorting, splitting -----------------------------------------------------------


def expected_sequences(events, split_rule, fractions, context_limit):
    """The same, in plain Python: {split: {user: (items, labels, timestamps, target_start)}}."""
    histories = defaultdict(list)
    for number, (user, item, timestamp, rating) in enumerate(events):
        histories[user].append((timestamp, number, item, int(rating >= 4)))
    histories = {user: sorted(rows) for user, rows in histories.items() if len(rows) >= 2}
    times = [row[0] for rows in histories.values() for row in rows]

    def boundary(wanted):
        distances = ((abs(sum(other < t for other in times) - wanted), t) for t in set(times))
        return min(distances, default=(0, 0))[1]

    valid = boundary(round(len(times) * fractions[0]))
    test = boundary(round(len(times) * (fractions[0] + fractions[1])))
    found = {split: {} for split in SPLITS}
    for user, rows in histories.items():
        if split_rule == "leave-last":
            ends = [0, len(rows) - 2, len(rows) - 1, len(rows)]
        else:
            before = [sum(row[0] < limit for row in rows) for limit in (valid, test)]
            ends = [0, *before, len(rows)]
        for split, begin, end in zip(SPLITS, ends[:-1], ends[1:], strict=True):
            if begin < end:
                first = max(0, begin - context_limit)
                timestamps, _, items, labels = (list(c) for c in zip(*rows[first:end], strict=True))
                found[split][user] = (items, labels, timestamps, begin - first)
    return found


event_lists = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "c", "dora", "é"]),
        st.sampled_from(["i0", "i1", "i2"]),
        st.integers(START, START + 30),
        st.integers(1, 5),
    ),
    min_size=1,
    max_size=60,
)


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    events=event_lists,
    rule=st.sampled_from(["time", "leave-last"]),
    fractions=st.sampled_from([(0.8, 0.1, 0.1), (0.5, 0.25, 0.25)]),
    context_limit=st.integers(1, 5),
    shard=st.integers(1, 20),
)
def test_sequences_equal_those_of_a_plain_python_oracle(
    tmp_path, events, rule, fractions, context_limit, shard
):
    expected = expected_sequences(events, rule, fractions, context_limit)
    options = {"split": rule, "fractions": fractions, "context_limit": context_limit}
    options |= {"requests": "none"}
    if not all(expected[split] for split in SPLITS):
        with pytest.raises(UserError, match=r"is empty|at least 2 interactions"):
            build(tmp_path, events, force=True, shard_interactions=shard, **options)
        return
    build(tmp_path, events, force=True, shard_interactions=shard, **options)
    for split in SPLITS:
        found = sequences(tmp_path / "out", split)
        users = [row["user_id"] for row in found]
        assert users == sorted(users, key=lambda user: hashlib.md5(user.encode()).hexdigest())
        columns = ("item_ids", "labels", "timestamps", "target_start")
        assert {
            row["user_id"]: tuple(row[column] for column in columns) for row in found
        } == expected[split]


def test_counts_in_the_manifest_are_those_of_the_sequences(tmp_path):
    manifest = build(tmp_path, random_events()).manifest
    assert manifest.counts.interactions == 360
    assert manifest.counts.users == 30
    for split, counts in manifest.counts.splits.items():
        rows = sequences(tmp_path / "out", split)
        targets = [
            (label, timestamp)
            for row in rows
            for label, timestamp in list(zip(row["labels"], row["timestamps"], strict=True))[
                row["target_start"] :
            ]
        ]
        assert counts.rows == len(rows)
        assert counts.interactions == sum(len(row["labels"]) for row in rows)
        assert counts.targets == len(targets)
        assert counts.clicks == sum(label for label, _ in targets)
        assert counts.first_timestamp == min(timestamp for _, timestamp in targets)
        assert counts.last_timestamp == max(timestamp for _, timestamp in targets)


def test_no_train_interaction_is_later_than_a_valid_or_test_target(tmp_path):
    counts = build(tmp_path, random_events()).manifest.counts.splits
    assert counts["train"].last_timestamp < counts["valid"].first_timestamp
    assert counts["valid"].last_timestamp < counts["test"].first_timestamp


def test_users_with_one_interaction_are_counted_and_left_out(tmp_path):
    events = [*random_events(), ("single", "i1", START, 5), ("other", "i2", START, 1)]
    summary = build(tmp_path, events)
    assert summary.manifest.counts.users == 30
    assert summary.manifest.counts.users_left_out == 2
    assert summary.manifest.counts.interactions_left_out == 2
    assert "users left out, for they have fewer than 2 interactions: 2" in str(summary)


def test_interactions_out_of_time_order_are_sorted_and_the_summary_says_how_many(tmp_path):
    events = sorted(random_events(), key=lambda event: event[2])
    assert "out of time order" not in str(build(tmp_path, events))
    first, second = [n for n, event in enumerate(events) if event[0] == "u3"][:2]
    events[first], events[second] = events[second], events[first]
    summary = build(tmp_path, events, force=True)
    assert "interactions out of time order in the input, now sorted: 1" in str(summary)


def test_equal_timestamps_keep_the_order_of_the_input(tmp_path):
    names = [f"i{n}" for n in (7, 3, 9, 1, 5)]
    events = random_events() + [("tied", name, START, 5) for name in names]
    build(tmp_path, events)
    tied = [row for row in sequences(tmp_path / "out", "train") if row["user_id"] == "tied"]
    assert tied[0]["item_ids"] == names


def test_parts_and_row_groups_are_bounded_and_lose_nothing(tmp_path):
    events = random_events(users=200)
    build(tmp_path, events, out=tmp_path / "one")
    build(tmp_path, events, shard_interactions=500, row_group_interactions=100)
    dataset = Dataset.open(str(tmp_path / "out"))
    dataset.verify_checksums()
    parts = dataset.parts("train")
    assert len(parts) >= 4
    for part in parts:
        lengths = [
            pa.compute.list_value_length(batch.rows["item_ids"]).to_numpy().sum()
            for batch in iter_sequences(dataset, "train")
            if batch.part == part
        ]
        assert max(lengths) <= 100
        assert sum(lengths) <= 500
    for split in SPLITS:
        assert sequences(tmp_path / "out", split) == sequences(tmp_path / "one", split)


@pytest.mark.parametrize("sorted_at_once", [1, 40, 100, 1_000])
def test_users_sorted_part_by_part_give_the_same_files(tmp_path, monkeypatch, sorted_at_once):
    longest = [("longest", "i2", START + n, 4) for n in range(50)]
    events = random_events(users=30, length=12) + longest
    whole = build(tmp_path, events, out=tmp_path / "whole")
    queries = []

    def noted(connection, query, rows):
        queries.append(query)
        return stream(connection, query, rows)

    monkeypatch.setattr("dti_dist.data.prepare.duck.stream", noted)
    monkeypatch.setattr("dti_dist.data.prepare.duck._SORTED_BYTES", (1 << 30) // sorted_at_once)
    monkeypatch.setattr("dti_dist.data.prepare.duck._SORTING_SHARE", 1)
    parts = build(tmp_path, events, out=tmp_path / "parts", memory_limit="1GiB")
    assert parts.manifest.files == whole.manifest.files
    users = sorted(
        {event[0] for event in events}, key=lambda user: hashlib.md5(user.encode()).hexdigest()
    )
    lengths = [50 if user == "longest" else 12 for user in users]
    befores = [sum(lengths[:number]) for number in range(len(users))]
    sorts = sum("ORDER BY rank, time_us" in query for query in queries)
    assert sorts == len({before // sorted_at_once for before in befores})


def test_same_input_gives_the_same_files(tmp_path):
    files = [
        build(tmp_path, random_events(), out=tmp_path / name, threads=threads).manifest.files
        for name, threads in [("one", 1), ("two", 2)]
    ]
    assert files[0] == files[1]


# --- what may be read -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("times", "unit"),
    [
        (lambda t: t, "seconds"),
        (lambda t: t * 1_000 + 5, "milliseconds"),
        (lambda t: t * 1_000_000 + 5, "microseconds"),
        (lambda t: t * 1_000_000_000 + 5, "nanoseconds"),
        (lambda t: t + 0.25, "seconds"),
        (lambda t: np.datetime64(t, "s"), "timestamp"),
        (lambda t: f"{np.datetime64(t, 's')}Z", "ISO text"),
        (lambda t: f"{np.datetime64(t + 7200, 's')}+02:00", "ISO text"),
    ],
)
def test_times_in_any_unit_become_seconds(tmp_path, times, unit):
    events = random_events()
    expected = {row["user_id"]: row for row in build_train(tmp_path, events, "plain")}
    path = write_events(tmp_path / "t.parquet", events, time=[times(event[2]) for event in events])
    summary = build(tmp_path, [path])
    assert summary.manifest.source["time_unit"] == unit
    assert {row["user_id"]: row for row in sequences(tmp_path / "out", "train")} == expected


def build_train(tmp_path, events, name):
    build(tmp_path, events, out=tmp_path / name)
    return sequences(tmp_path / name, "train")


def test_csv_ids_keep_their_leading_zeros(tmp_path):
    lines = [f"00{n % 5},0{n % 3},{START + n},{n % 2}" for n in range(60)]
    (tmp_path / "events.csv").write_text("\n".join(["user,item,time,clicked", *lines]))
    (tmp_path / "items.csv").write_text("item,title\n00,1984\n01,007\n02,two\n")
    build(
        tmp_path,
        [str(tmp_path / "events.csv")],
        items=str(tmp_path / "items.csv"),
        label="clicked",
    )
    table = Dataset.open(str(tmp_path / "out")).items_table()
    assert table["source_id"].to_pylist() == ["00", "01", "02"]
    assert table["title"].to_pylist() == ["1984", "007", "two"]
    assert {row["user_id"] for row in sequences(tmp_path / "out", "train")} == {
        f"00{n}" for n in range(5)
    }


def test_folders_globs_and_urls_give_the_same_data_set(tmp_path):
    events = random_events()
    folder = tmp_path / "logs" / "day=1"
    folder.mkdir(parents=True)
    (tmp_path / "logs" / "_SUCCESS").touch()
    memory = fsspec.filesystem("memory")
    for number, rows in enumerate((events[:200], events[200:])):
        path = write_events(folder / f"part-{number}.parquet", rows)
        memory.pipe_file(f"/logs/part-{number}.parquet", Path(path).read_bytes())
    items = write_items(tmp_path / "items.parquet")
    memory.pipe_file("/items.parquet", Path(items).read_bytes())
    files = [
        build(tmp_path, [paths], out=tmp_path / f"out{number}", items=item_path).manifest.files
        for number, (paths, item_path) in enumerate(
            [
                (str(tmp_path / "logs"), items),
                (f"{folder}/part-*.parquet", items),
                ("memory://logs", "memory://items.parquet"),
                ("memory://logs/*.parquet", items),
            ]
        )
    ]
    assert files[0] == files[1] == files[2] == files[3]


def test_label_may_be_any_expression_with_comments_and_odd_names(tmp_path):
    events = random_events()
    path = write_events(tmp_path / "e.parquet", events, **{'my "col"': [e[3] for e in events]})
    found = build(tmp_path, [path], label='"my ""col""" in (4, 5) -- likes').manifest
    assert found.files == build(tmp_path, events, out=tmp_path / "plain").manifest.files


def test_lists_of_texts_are_joined_and_a_null_text_is_empty(tmp_path):
    names = [f"i{n}" for n in range(20)]
    tags = [["a", "b"]] * 10 + [None] * 10
    pq.write_table(
        pa.table({"item": names, "title": names, "tags": tags}), tmp_path / "tags.parquet"
    )
    columns = EventColumns("user", "item", "time", item_key="item", texts=("title", "tags"))
    items = str(tmp_path / "tags.parquet")
    build(tmp_path, random_events(), items=items, columns=columns)
    found = Dataset.open(str(tmp_path / "out")).items_table()["tags"].to_pylist()
    assert sorted(found) == [""] * 10 + ["a, b"] * 10


# --- what is refused ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("rating >=", r"DuckDB can't read it: syntax error .* at its end"),
        ("rating >= = 4", r"syntax error at or near \"=\", at character 11"),
        ("raiting >= 4", r"no column 'raiting' among user, item, time, rating. Did you mean 'rat"),
        ("1; DROP TABLE items", "DuckDB can't read it"),
        ("1), (2", "more than one expression"),
        ("1) FROM (SELECT 1", "more than one expression"),
        ("1) WHERE (true", "more than one expression"),
        ("(SELECT 1)", "may not hold a subquery"),
        ("rating > max(rating) OVER ()", "may not hold a window"),
        ("max(rating) > 3", r"max\(\) is over many interactions"),
        ("*", "may not hold a star"),
        ("user", "expected the label to be a boolean, or a number that is 0 or 1; found VARCHAR"),
        ("user::INTEGER", "Could not convert string"),
        (
            "rating",
            r"expected a label of 0 or 1 .*; \d+ have something else. The first is 3 in row 1 of ",
        ),
    ],
)
def test_bad_labels_are_refused_with_the_reason(tmp_path, label, message):
    events = [("u1", "i1", START, 3), *random_events()]
    with pytest.raises(UserError, match=message):
        build(tmp_path, events, label=label)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (
            "user",
            r"expected a user in every interaction; 2 have none \(null or empty\). The first is ",
        ),
        ("item", "expected an item in every interaction; 2 have none"),
        ("time", "expected a timestamp in every interaction; 2 have none"),
        ("rating", "expected a label in every interaction; 2 have none"),
    ],
)
def test_a_null_is_refused_and_its_row_named(tmp_path, column, message):
    events = random_events()
    values = [event[("user", "item", "time", "rating").index(column)] for event in events]
    values[6] = values[9] = None
    path = write_events(tmp_path / "nulls.parquet", events, **{column: values})
    with pytest.raises(UserError, match=message) as refused:
        build(tmp_path, [path])
    assert "row 7 of" in str(refused.value)


def test_interactions_of_unknown_items_are_refused_with_examples(tmp_path):
    items = write_items(tmp_path / "few.parquet", names=[f"i{n}" for n in range(4, 20)])
    with pytest.raises(UserError, match="no row in the item table; 4 such items") as refused:
        build(tmp_path, random_events(), items=items)
    assert "'i0', 'i1', 'i2'" in str(refused.value)


def test_interacted_items_without_text_are_refused_with_examples(tmp_path):
    titles = [None, " ", *("x" for _ in range(18))]
    items = write_items(tmp_path / "blank.parquet", titles=titles)
    with pytest.raises(UserError, match=r"no text \(null or blank in \"title\"\); 2 such items"):
        build(tmp_path, random_events(), items=items)


def test_duplicate_items_are_refused_with_examples(tmp_path):
    items = write_items(tmp_path / "twice.parquet", names=["i1", "i1", "i2", "i2", "i3"])
    with pytest.raises(UserError, match=r"2 ids have several, e.g. 'i1', 'i2'"):
        build(tmp_path, random_events(), items=items)


def test_empty_input_is_refused(tmp_path):
    path = tmp_path / "empty.parquet"
    pq.write_table(pq.read_table(write_events(path, random_events())).slice(0, 0), path)
    with pytest.raises(UserError, match="expected interactions, found none"):
        build(tmp_path, [str(path)])


def test_an_empty_split_is_refused_with_its_boundaries(tmp_path):
    events = [("a", "i1", START, 5), ("a", "i2", START, 1), ("b", "i3", START, 1)] * 5
    with pytest.raises(UserError, match=r"train, valid is empty.*2023-11-14 22:13:20.*--fractions"):
        build(tmp_path, events)
    pairs = [(f"u{n}", f"i{n}", START + n + k, 5) for n in range(9) for k in range(2)]
    with pytest.raises(UserError, match="train is empty: leave-last"):
        build(tmp_path, pairs, split="leave-last")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"user": "usr"}, "--user-col usr: expected a column of the events; .* mean 'user'"),
        ({"item": "itm"}, "--item-col itm: expected a column of the events; .* mean 'item'"),
        ({"time": "tine"}, "--time-col tine: expected a column of the events; .* mean 'time'"),
        ({"texts": ("titel",)}, "--text-cols titel: expected a column of the item table"),
        ({"item_key": "id"}, "--item-key id: expected a column of the item table; found item, ti"),
        ({"user": "score"}, "--user-col score: expected ids that are .* found DOUBLE"),
        ({"time": "flag"}, "--time-col flag: expected numbers, dates or ISO .* found BOOLEAN"),
        (
            {"time": "item"},
            "--time-col item: expected numbers or ISO dates .* found 'i\\d+' in row 1 of",
        ),
        ({"texts": ("item_id",)}, "none named item_id or source_id"),
    ],
)
def test_bad_columns_are_refused_by_option(tmp_path, changed, message):
    events = random_events()
    path = write_events(tmp_path / "e.parquet", events, score=[0.5] * 360, flag=[True] * 360)
    names = [f"i{n}" for n in range(20)]
    items = tmp_path / "with_id.parquet"
    pq.write_table(pa.table({"item": names, "title": names, "item_id": names}), items)
    with pytest.raises(UserError, match=message):
        build(tmp_path, [path], items=str(items), columns=EventColumns(**(vars(COLUMNS) | changed)))


def test_missing_mixed_and_broken_files_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.parquet: expected a file, a folder or a glob"):
        build(tmp_path, [str(tmp_path / "nowhere.parquet")])
    with pytest.raises(UserError, match="found nothing there"):
        build(tmp_path, [str(tmp_path / "*.csv")])
    (tmp_path / "a.csv").write_text("user\n1\n")
    path = write_events(tmp_path / "a.parquet", random_events())
    with pytest.raises(UserError, match="expected files of one format"):
        build(tmp_path, [path, str(tmp_path / "a.csv")])
    (tmp_path / "broken.parquet").write_bytes(b"no parquet at all")
    with pytest.raises(UserError, match=r"the events: reading .*broken\.parquet"):
        build(tmp_path, [str(tmp_path / "broken.parquet")])
    with pytest.raises(UserError, match="a URL that fsspec can open"):
        build(tmp_path, ["nonsense://bucket/x.parquet"])


@pytest.mark.parametrize(("limit", "most"), [(None, 6.0), ("2GiB", 2.0)])
def test_memory_is_bounded_on_any_machine(tmp_path, limit, most):
    with open_workspace(str(tmp_path), memory_limit=limit) as workspace:
        found = workspace.connection.sql("SELECT current_setting('memory_limit')").fetchall()[0][0]
    number, unit = found.split()
    assert unit == "MiB" or float(number) <= most


def test_bad_options_are_refused():
    with pytest.raises(UserError, match=r"add up to 1.*found 0\.8, 0\.1, 0\.2"):
        BuildOptions(fractions=(0.8, 0.1, 0.2))
    with pytest.raises(UserError, match="context_limit: expected at least 1, found 0"):
        BuildOptions(context_limit=0)


# --- publication ----------------------------------------------------------------------------


def test_an_existing_data_set_is_kept_unless_forced(tmp_path):
    build(tmp_path, random_events())
    with pytest.raises(UserError, match=r"already exists and is not empty.*--force"):
        build(tmp_path, random_events(seed=1))
    assert build(tmp_path, random_events(users=31), force=True).manifest.counts.users == 31
    Dataset.open(str(tmp_path / "out")).verify_checksums()


def test_force_never_replaces_a_folder_that_is_no_data_set(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"holds no dataset\.json"):
        build(tmp_path, random_events(), out=tmp_path / "home", force=True)
    assert (tmp_path / "home" / "thesis.txt").exists()


def test_force_keeps_the_old_data_set_if_the_new_build_fails(tmp_path):
    build(tmp_path, random_events())
    before = sorted(path.name for path in tmp_path.iterdir())
    manifest = (tmp_path / "out" / "dataset.json").read_bytes()
    with pytest.raises(UserError, match="0 or 1"):
        build(tmp_path, random_events(), label="rating", force=True)
    assert (tmp_path / "out" / "dataset.json").read_bytes() == manifest
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    Dataset.open(str(tmp_path / "out")).verify_checksums()


def test_a_failed_build_leaves_nothing(tmp_path, monkeypatch):
    path = write_events(tmp_path / "events.parquet", random_events())
    items = write_items(tmp_path / "items.parquet")

    def full_disk(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("dti_dist.data.prepare.writer.DatasetWriter.finish", full_disk)
    with pytest.raises(OSError, match="No space"):
        build(tmp_path, [path], items=items)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["events.parquet", "items.parquet"]


KILLED_WHILE_WRITING = """
import sys, time
from dti_dist.data.prepare import synthetic, writer
from dti_dist.data.prepare.build import BuildOptions, build_dataset

def hang(self, **fields):
    self.close()
    print("all parts are written", flush=True)
    time.sleep(600)

writer.DatasetWriter.finish = hang
build_dataset(lambda w: synthetic.read_synthetic(w, users=50), sys.argv[1], BuildOptions())
"""


def test_a_killed_build_leaves_nothing_that_looks_finished(tmp_path):
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED_WHILE_WRITING, str(out)],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout.readline().strip() == b"all parts are written"
    process.kill()
    process.wait()
    process.stdout.close()
    assert not out.exists()
    with pytest.raises(UserError, match=r"found no dataset\.json"):
        Dataset.open(str(out))
    build(tmp_path, random_events(), out=out)
    Dataset.open(str(out)).verify_checksums()


def test_on_an_object_store_the_manifest_is_published_last(tmp_path, monkeypatch):
    memory = fsspec.filesystem("memory")
    uri = f"memory://bucket-{time.monotonic_ns()}/out"
    copied = []
    copy = type(memory).cp_file

    def record(self, source, target, **kwargs):
        copied.append(target)
        if broken and target.endswith("dataset.json"):
            raise OSError("connection reset")
        return copy(self, source, target, **kwargs)

    monkeypatch.setattr(type(memory), "cp_file", record)
    broken = False
    build(tmp_path, random_events(), out=uri)
    assert copied[-1].endswith("/dataset.json")
    Dataset.open(uri).verify_checksums()
    broken = True
    with pytest.raises(OSError, match="connection reset"):
        build(tmp_path, random_events(seed=1), out=uri, force=True)
    assert "dataset.json" not in storage.list_files(uri)
    assert not [name for name in memory.find(uri.rsplit("/", 1)[0]) if ".partial-" in name]
