"""Several labels in prepare: against plain Python, by both engines, appended, and refused."""

from __future__ import annotations

import json
import random
import re
import shutil
from functools import partial
from itertools import groupby

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dti_dist.cli import main
from dti_dist.data.dataset import SPLITS, Dataset, iter_sequences, sequence_schema
from dti_dist.data.prepare.append import append_to_dataset
from dti_dist.data.prepare.build import BuildOptions, build_dataset
from dti_dist.data.prepare.events import EventColumns, read_events
from dti_dist.data.prepare.spark import build_with_spark
from dti_dist.data.sequences import find_fault
from dti_dist.errors import UserError
from dti_dist.options import RequestOptions

COLUMNS = EventColumns("user", "item", "time", item_key="item", texts=("title",))
LABELS = ("click=event <> 'view'", "like=liked", " buy = CAST(bought AS INTEGER) ")
START = 1_700_000_000
LIMIT = 4
ENGINES = {
    "duckdb": build_dataset,
    "spark": build_with_spark,
}
EACH_ENGINE = pytest.mark.parametrize(
    "engine",
    [
        "duckdb",
        pytest.param(
            "spark",
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(not shutil.which("java"), reason="Spark needs Java"),
            ],
        ),
    ],
)


def random_events(seed, users=25, days=20):
    rng = random.Random(seed)
    rows = []
    for user in range(users):
        for _ in range(rng.randrange(3, 25)):
            event = rng.choice(["view", "view", "click"])
            rows.append(
                {
                    "user": f"u{user}",
                    "item": f"i{rng.randrange(6)}",
                    "time": START + 3600 * rng.randrange(24 * days),
                    "event": event,
                    "liked": rng.choice([None, False, True]) if event == "click" else None,
                    "bought": rng.choice([None, 0, 0, 1]),
                }
            )
    rng.shuffle(rows)
    return rows


def reader(folder, rows, labels=LABELS, **changed):
    schema = pa.schema(
        [
            ("user", pa.string()),
            ("item", pa.string()),
            ("time", pa.int64()),
            ("event", pa.string()),
            ("liked", pa.bool_()),
            ("bought", pa.int64()),
        ]
    )
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / "events.parquet")
    names = [f"i{n}" for n in range(6)]
    pq.write_table(pa.table({"item": names, "title": names}), folder / "items.parquet")
    return partial(
        read_events,
        paths=[str(folder / "events.parquet")],
        items=[str(folder / "items.parquet")],
        columns=COLUMNS,
        label=labels,
        **changed,
    )


def by_hand(rows, by, history):
    """{user: interactions in order, of (item, time, click, like, buy)}, rows of one joined."""
    rows = [
        {
            "key": (row["user"], row["item"], row["time"]),
            "labels": (int(row["event"] != "view"), row["liked"], row["bought"]),
            "number": number,
        }
        for number, row in enumerate(rows)
    ]
    if by == "time":
        together = groupby(sorted(rows, key=lambda row: row["key"]), key=lambda row: row["key"])
        rows = []
        for key, group in together:
            same = list(group)
            labels = tuple(
                max((int(label) for label in of if label is not None), default=None)
                for of in zip(*(row["labels"] for row in same), strict=True)
            )
            rows.append({"key": key, "labels": labels, "number": min(r["number"] for r in same)})
    rows.sort(key=lambda row: (row["key"][2], row["number"]))
    found = {}
    for row in rows:
        user, item, time = row["key"]
        found.setdefault(user, []).append((item, time, *row["labels"]))
    return found


def read_all(uri):
    """{split: {user: its context, and its own interactions}}, as `by_hand` has them."""
    dataset = Dataset.open(str(uri))
    names = dataset.items_table()["source_id"].to_pylist()
    found = {split: {} for split in SPLITS}
    for split in SPLITS:
        for batch in iter_sequences(dataset, split):
            assert batch.rows.schema.equals(sequence_schema(dataset.manifest))
            assert find_fault(batch.rows, len(names), dataset.manifest.stored) is None
            for row in batch.rows.to_pylist():
                lists = ("timestamps", "labels", "label_like", "label_buy")
                items = [names[item] for item in row["item_ids"]]
                steps = list(zip(items, *(row[name] for name in lists), strict=True))
                start = row["target_start"]
                found[split].setdefault(row["user_id"], []).append((steps[:start], steps[start:]))
    return found


def check_counts(dataset, found):
    for split, counts in dataset.manifest.counts.splits.items():
        steps = [step for rows in found[split].values() for _, own in rows for step in own]
        assert counts.clicks == sum(step[2] for step in steps)
        assert counts.tasks.keys() == {"like", "buy"}
        for place, task in ((3, "like"), (4, "buy")):
            known = [step[place] for step in steps if step[place] is not None]
            assert counts.tasks[task].known == len(known) < len(steps)
            assert counts.tasks[task].clicks == sum(known) > 0


@EACH_ENGINE
@pytest.mark.parametrize(("by", "history"), [("none", None), ("time", None), ("time", "label = 1")])
def test_labels_of_all_tasks_are_those_of_the_events(tmp_path, engine, by, history):
    rows = random_events(seed=1)
    read = reader(tmp_path, rows, requests=RequestOptions(requests=by, history=history))
    options = BuildOptions(context_limit=LIMIT, row_group_interactions=60)
    made = ENGINES[engine](read, str(tmp_path / "out"), options)
    expected = by_hand(rows, by, history)
    found = read_all(tmp_path / "out")
    dataset = Dataset.open(str(tmp_path / "out"))
    boundaries = dataset.manifest.split.boundaries
    for split, begin, end in (
        ("train", 0, boundaries["valid"]),
        ("valid", boundaries["valid"], boundaries["test"]),
        ("test", boundaries["test"], 10**12),
    ):
        own = {
            user: [step for step in steps if begin <= step[1] < end]
            for user, steps in expected.items()
        }
        assert {user: of[0][1] for user, of in found[split].items()} == {
            user: steps for user, steps in own.items() if steps
        }
        for user, ((context, _),) in found[split].items():
            before = [step for step in expected[user] if step[1] < begin]
            seen = [step for step in before if history is None or step[2] == 1]
            assert context == seen[-LIMIT:]
    check_counts(dataset, found)
    assert [task.name for task in dataset.manifest.tasks] == ["click", "like", "buy"]
    assert dataset.manifest.tasks[0].label == dataset.manifest.source["label"] == "event <> 'view'"
    train = dataset.manifest.counts.splits["train"].tasks["like"]
    assert f"known labels of like, and their rate: train {train.known:,} ({train.rate:.4f})" in str(
        made
    )


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("java"), reason="Spark needs Java")
def test_both_engines_write_the_same_bytes_of_several_labels(tmp_path):
    read = reader(tmp_path, random_events(seed=2))
    made = [build(read, str(tmp_path / name), BuildOptions()) for name, build in ENGINES.items()]
    assert made[0].manifest == made[1].manifest
    assert made[0].notes == made[1].notes


def test_appended_labels_are_those_of_all_at_once(tmp_path):
    rows = sorted(random_events(seed=3), key=lambda row: row["time"])
    middle = rows[len(rows) // 2]["time"]
    old = [row for row in rows if row["time"] < middle]
    new = [row for row in rows if row["time"] >= middle]
    once, twice = tmp_path / "once", tmp_path / "twice"
    options = BuildOptions(context_limit=LIMIT)
    build_dataset(reader(tmp_path, rows), str(once), options)
    build_dataset(reader(tmp_path, old), str(twice), options)
    other = (*LABELS[:1], "like=liked AND true", LABELS[2])
    made = append_to_dataset(reader(tmp_path, new, other), str(twice), "train", BuildOptions())
    assert any("the label like is 'liked AND true'" in note for note in made.notes)
    found = [read_all(uri) for uri in (once, twice)]
    targets = [
        sorted(
            (user, *map(str, step))
            for split in SPLITS
            for user, sequences in of[split].items()
            for _, own in sequences
            for step in own
        )
        for of in found
    ]
    assert targets[0] == targets[1]
    check_counts(Dataset.open(str(twice)), found[1])
    contexts = [context for of in found[1]["train"].values() for context, _ in of[1:]]
    assert any(step[3] is None for context in contexts for step in context)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (("event = 'click'",), "found one label. Give --label 'click=…' --label 'like=…'"),
        (LABELS[:2], "expected the labels click, like, buy, as the data set has; found the labels"),
        ((LABELS[0], LABELS[2], LABELS[1]), "found the labels click, buy, like"),
    ],
)
def test_an_append_needs_the_labels_of_the_data_set(tmp_path, labels, said):
    rows = random_events(seed=4)
    build_dataset(reader(tmp_path, rows), str(tmp_path / "out"), BuildOptions())
    with pytest.raises(UserError, match=re.escape(said)):
        append_to_dataset(
            reader(tmp_path, rows, labels), str(tmp_path / "out"), "train", BuildOptions()
        )


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (("click=liked IS NULL", "liked"), "--label 'liked': expected NAME=EXPRESSION"),
        (("click=liked IS NULL", "bought == 1"), "expected NAME=EXPRESSION"),
        (("click=liked IS NULL", "Click=liked"), "several are called 'click'"),
        (("click=liked IS NULL", "like=event"), "expected --label like='event' to be a boolean"),
        (("click=liked IS NULL", "like=gone"), "--label like='gone': no column 'gone'"),
        (("click=liked IS NULL", "like=bought + 1"), "--label like='bought + 1': expected a label"),
        (("click=liked", "like=bought"), "expected a label in every interaction"),
    ],
)
def test_a_label_that_is_none_is_refused(tmp_path, labels, said):
    read = reader(tmp_path, random_events(seed=5), labels)
    with pytest.raises(UserError, match=re.escape(said)):
        build_dataset(read, str(tmp_path / "out"), BuildOptions())


def test_a_stored_label_that_is_none_is_found(tmp_path):
    build_dataset(reader(tmp_path, random_events(seed=6)), str(tmp_path / "out"), BuildOptions())
    dataset = Dataset.open(str(tmp_path / "out"))
    (batch,) = iter_sequences(dataset, "train")
    rows = batch.rows.to_pylist()
    rows[2]["label_like"][1] = 2
    bad = pa.RecordBatch.from_pylist(rows, schema=batch.rows.schema)
    assert find_fault(bad, 6, dataset.manifest.stored) == (
        2,
        "label_like[1]: expected 0 to 1, found 2",
    )


def test_a_task_whose_name_would_be_sql_is_refused(tmp_path):
    build_dataset(reader(tmp_path, random_events(seed=8)), str(tmp_path / "out"), BuildOptions())
    manifest = tmp_path / "out/dataset.json"
    fields = json.loads(manifest.read_text())
    fields["tasks"][1]["name"] = "like FROM x; COPY x TO 'y'; --"
    manifest.write_text(json.dumps(fields))
    with pytest.raises(UserError, match=r"tasks\.1\.name"):
        Dataset.open(str(tmp_path / "out"))


def test_several_labels_from_the_command_line(tmp_path, capsys):
    reader(tmp_path, random_events(seed=7))
    command = ["prepare", "events", str(tmp_path / "events.parquet")]
    command += ["--items", str(tmp_path / "items.parquet"), "--user-col", "user"]
    command += ["--item-col", "item", "--time-col", "time", "--text-cols", "title"]
    for label in LABELS:
        command += ["--label", label]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    assert "known labels of buy, and their rate: train" in capsys.readouterr().out
    names = [task.name for task in Dataset.open(str(tmp_path / "out")).manifest.tasks]
    assert names == ["click", "like", "buy"]
