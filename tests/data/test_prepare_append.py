from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import fsspec
import pyarrow.parquet as pq
import pytest

from dti_dist.cli import main
from dti_dist.data import storage
from dti_dist.data.dataset import SPLITS, Dataset, iter_sequences
from dti_dist.data.prepare.append import append_to_dataset
from dti_dist.data.prepare.build import BuildOptions, build_dataset
from dti_dist.data.prepare.events import EventColumns, read_events
from dti_dist.errors import UserError
from tests.data.test_prepare_events import START, random_events, write_events, write_items

COLUMNS = EventColumns("user", "item", "time", item_key="item", texts=("title",))
LIMIT = 5
DAY = 86_400


def at_different_times(events):
    """The same, sorted, no two at once: ties are ordered by input, which days would change."""
    events = sorted(events, key=lambda event: event[2])
    return [
        (user, item, START + 700 * n, rating) for n, (user, item, _, rating) in enumerate(events)
    ]


def days_of(events):
    """Half of the events, and then the others by day."""
    half = events[: len(events) // 2]
    days = {}
    for event in events[len(half) :]:
        days.setdefault(event[2] // DAY, []).append(event)
    return half, list(days.values())


def reader(tmp_path, events, items=None, **changed):
    path = write_events(tmp_path / "events.parquet", events)
    items = items or write_items(tmp_path / "items.parquet")
    return partial(
        read_events,
        paths=[path],
        items=[items],
        **{"columns": COLUMNS, "label": "rating >= 4"} | changed,
    )


def build(tmp_path, events, uri):
    options = BuildOptions(context_limit=LIMIT, shard_interactions=60, row_group_interactions=20)
    return build_dataset(reader(tmp_path, events), str(uri), options)


def append(tmp_path, events, uri, append_to="roll", items=None, **changed):
    options = BuildOptions(shard_interactions=60, row_group_interactions=20)
    read = reader(tmp_path, events, items, **changed)
    return append_to_dataset(read, str(uri), append_to, options)


def targets(uri, splits=SPLITS):
    """Every target with its last LIMIT interactions before it, by names of items."""
    dataset = Dataset.open(str(uri))
    names = dataset.items_table()["source_id"].to_pylist()
    found = []
    for split in splits:
        for batch in iter_sequences(dataset, split):
            for row in batch.rows.to_pylist():
                items = [names[item] for item in row["item_ids"]]
                steps = list(zip(items, row["labels"], row["timestamps"], strict=True))
                for place in range(row["target_start"], len(steps)):
                    context = tuple(steps[max(0, place - LIMIT) : place])
                    found.append((row["user_id"], steps[place], context))
    assert len(set(found)) == len(found)
    return set(found)


def check_counts(uri):
    """The manifest's counts are those of the files."""
    dataset = Dataset.open(str(uri))
    dataset.verify_checksums()
    for split, counts in dataset.manifest.counts.splits.items():
        found = targets(uri, [split])
        assert counts.targets == len(found)
        assert counts.clicks == sum(step[1] for _, step, _ in found)
        assert counts.rows == sum(part.rows for part in dataset.parts(split))
        assert counts.first_timestamp == min(step[2] for _, step, _ in found)
        assert counts.last_timestamp == max(step[2] for _, step, _ in found)
    assert dataset.manifest.counts.users == len({user for user, _, _ in targets(uri)})
    assert dataset.manifest.counts.items == len(dataset.items_table())


@pytest.mark.parametrize("append_to", ["roll", "train", "test"])
def test_day_by_day_gives_the_targets_and_contexts_of_all_at_once(tmp_path, append_to):
    half, days = days_of(at_different_times(random_events(users=25)))
    # An interaction that prepare left out, for it was its user's only one, is not remembered.
    users = Counter(event[0] for event in half)
    half, *days = ([e for e in part if users[e[0]] != 1] for part in (half, *days))
    events = [event for part in (half, *days) for event in part]
    out = tmp_path / "out"
    build(tmp_path, half, out)
    for day in days:
        append(tmp_path, day, out, append_to)
    whole = build(tmp_path, events, tmp_path / "whole").manifest
    assert targets(out) == targets(tmp_path / "whole")
    check_counts(out)
    found = Dataset.open(str(out)).manifest
    assert found.statistics == whole.statistics
    assert found.label_rate == pytest.approx(whole.label_rate)
    assert len(days) >= 2
    assert [record.interactions for record in found.appends] == [len(day) for day in days]


def test_a_roll_moves_test_to_valid_and_valid_to_train(tmp_path):
    events = at_different_times(random_events())
    half, (day, *_) = days_of(events)
    out = tmp_path / "out"
    build(tmp_path, half, out)
    before = {split: targets(out, [split]) for split in SPLITS}
    old = Dataset.open(str(out))
    summary = append(tmp_path, day, out)
    assert targets(out, ["train"]) == before["train"] | before["valid"]
    assert targets(out, ["valid"]) == before["test"]
    assert {step[2] for _, step, _ in targets(out, ["test"])} == {event[2] for event in day}
    assert summary.manifest.split.boundaries == {
        "valid": old.manifest.split.boundaries["test"],
        "test": day[0][2],
    }
    # Who opened the data set before reads on, and the parts of train are those that were there.
    old.verify_checksums()
    for part in old.parts("train"):
        assert summary.manifest.files[part.path].sha256 == part.sha256
    assert "test became valid, and valid joined train" in str(summary)


def test_what_a_roll_replaced_goes_with_the_next_append(tmp_path):
    half, (first, second, *_) = days_of(at_different_times(random_events()))
    out = tmp_path / "out"
    build(tmp_path, half, out)
    append(tmp_path, first, out)
    listed = set(append(tmp_path, second, out, "test").manifest.files)
    assert set(storage.list_files(str(out))) == listed | {"dataset.json"}


def test_new_items_and_users_join_and_old_ids_stay(tmp_path):
    events = at_different_times(random_events())
    out = tmp_path / "out"
    build(tmp_path, events, out)
    before = Dataset.open(str(out)).items_table()
    later = START + 700 * len(events)
    names = ["i00", "i3", "a new one"]
    items = write_items(tmp_path / "new.parquet", names, ["zero", "another text", "new"])
    new = [("u3", "a new one", later, 5), ("nobody", "i3", later + 1, 1)]
    record = append(tmp_path, new, out, items=items).manifest.appends[0]
    after = Dataset.open(str(out)).items_table()
    assert after.slice(0, len(before)) == before
    assert after["source_id"].to_pylist()[len(before) :] == ["a new one", "i00"]
    assert (record.users, record.new_users, record.new_items) == (2, 1, 2)
    found = {user: (step, context) for user, step, context in targets(out, ["test"])}
    assert found["nobody"] == (("i3", 0, later + 1), ())
    assert len(found["u3"][1]) == LIMIT
    check_counts(out)


def test_an_object_store_is_appended_to_likewise(tmp_path):
    half, (day, *_) = days_of(at_different_times(random_events()))
    uri = f"memory://bucket-{time.monotonic_ns()}/out"
    build(tmp_path, half, uri)
    build(tmp_path, half, tmp_path / "out")
    append(tmp_path, day, uri)
    append(tmp_path, day, tmp_path / "out")
    assert targets(uri) == targets(tmp_path / "out")
    Dataset.open(uri).verify_checksums()


# --- what is refused ------------------------------------------------------------------------


@pytest.fixture
def prepared(tmp_path):
    half, days = days_of(at_different_times(random_events()))
    build(tmp_path, half, tmp_path / "out")
    return tmp_path / "out", half, days


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_day_twice_is_refused(prepared, tmp_path):
    out, _, (day, *_) = prepared
    append(tmp_path, day, out)
    before = content(out)
    with pytest.raises(UserError, match=rf"{len(day)} of {len(day)} are not, .* appended before"):
        append(tmp_path, day, out)
    assert content(out) == before


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"columns": EventColumns("user", "item", "time", "item", ("item",))}, "--text-cols title"),
        ({"label": "rating"}, "expected a label of 0 or 1 in every"),
    ],
)
def test_what_does_not_fit_is_refused(prepared, tmp_path, changed, message):
    out, _, (day, *_) = prepared
    before = content(out)
    with pytest.raises(UserError, match=message):
        append(tmp_path, day, out, **changed)
    assert content(out) == before


def test_unknown_items_leave_last_and_other_folders_are_refused(prepared, tmp_path):
    out, half, (day, *_) = prepared
    user, _, timestamp, rating = day[0]
    with pytest.raises(UserError, match=r"no row in the item table; 1 such items, e.g. 'none'"):
        append(tmp_path, [(user, "none", timestamp, rating)], out)
    with pytest.raises(UserError, match=r"found no dataset\.json"):
        append(tmp_path, day, tmp_path / "nowhere")
    build_dataset(reader(tmp_path, half), str(tmp_path / "last"), BuildOptions(split="leave-last"))
    with pytest.raises(UserError, match="split by time or by a column; found leave-last"):
        append(tmp_path, day, tmp_path / "last")


def test_another_append_in_between_is_noticed(prepared, tmp_path, monkeypatch):
    out, _, (day, *_) = prepared
    manifest = out / "dataset.json"
    check = "dti_dist.data.prepare.append._check_written"
    monkeypatch.setattr(check, lambda *_: manifest.write_text(manifest.read_text() + "\n"))
    with pytest.raises(UserError, match="another command has changed it since"):
        append(tmp_path, day, out)


def test_the_command_appends_and_exits_with_2_where_it_refuses(prepared, tmp_path, capsys):
    out, _, (day, *_) = prepared
    events, items = write_events(tmp_path / "day.parquet", day), str(tmp_path / "items.parquet")
    command = ["prepare", "events", events, "--items", items, "--user-col", "user"]
    command += ["--item-col", "item", "--time-col", "time", "--label", "rating > 3"]
    command += ["--text-cols", "title", "--out", str(out), "--append"]
    for extra, message in [
        (["--force"], "--append --force: expected the data set's own settings"),
        (["--context-limit", "9"], "--append --context-limit: expected the data set's own"),
        (["--engine", "spark"], "--append --engine spark: expected --engine duckdb"),
    ]:
        assert main([*command, *extra]) == 2
        assert message in capsys.readouterr().err
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert f"appended {len(day):,} interactions of" in printed
    assert "the label is 'rating > 3'; the data set was prepared with 'rating >= 4'" in printed
    assert main(command) == 2
    assert "expected interactions newer than the data set's last" in capsys.readouterr().err
    assert main([*command[:-1], "--append-to", "test"]) == 2
    assert "--append-to test: expected --append with it" in capsys.readouterr().err


# --- kill -9 --------------------------------------------------------------------------------

KILLED_BEFORE_ITS_COMMIT = """
import sys, time
from functools import partial
from pathlib import Path
from dti_dist.data.prepare import append
from tests.data import test_prepare_append as tests
import pyarrow.parquet as pq

def hang(uri, manifest):
    print("all files are written", flush=True)
    time.sleep(600)

append.write_manifest = hang
folder = Path(sys.argv[1])
day = [tuple(row.values()) for row in pq.read_table(folder / "day.parquet").to_pylist()]
tests.append(folder, day, folder / "out")
"""


def test_a_killed_append_leaves_the_old_data_set_and_a_second_try_works(prepared, tmp_path):
    out, _, (day, *_) = prepared
    write_events(tmp_path / "day.parquet", day)
    assert pq.read_table(tmp_path / "day.parquet").num_rows == len(day)
    before, manifest = targets(out), (out / "dataset.json").read_bytes()
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED_BEFORE_ITS_COMMIT, str(tmp_path)],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout.readline().strip() == b"all files are written"
    process.kill()
    process.wait()
    process.stdout.close()
    assert (out / "dataset.json").read_bytes() == manifest
    assert set(storage.list_files(str(out))) > {*Dataset.open(str(out)).manifest.files}
    Dataset.open(str(out)).verify_checksums()
    assert targets(out) == before
    append(tmp_path, day, out)
    assert targets(out) > before
    check_counts(out)


def test_a_failed_write_of_the_manifest_leaves_the_old_one(prepared, tmp_path, monkeypatch):
    uri = f"memory://bucket-{time.monotonic_ns()}/out"
    _, half, (day, *_) = prepared
    build(tmp_path, half, uri)
    before = targets(uri)

    def fail(path, content):
        raise OSError("connection reset")

    monkeypatch.setattr(storage, "write_atomic", fail)
    with pytest.raises(OSError, match="connection reset"):
        append(tmp_path, day, uri)
    monkeypatch.undo()
    assert targets(uri) == before
    append(tmp_path, day, uri)
    assert targets(uri) > before
    assert fsspec.filesystem("memory").exists(uri)
