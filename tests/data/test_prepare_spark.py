"""Spark against DuckDB: a real local session, the same input, the same files."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from pyspark import SparkContext
from pyspark.sql import SparkSession

from dti_dist.data.dataset import NO_RULES, SPLITS, Dataset, SplitRule
from dti_dist.data.prepare.build import BuildOptions, build_dataset
from dti_dist.data.prepare.events import EventColumns, read_events
from dti_dist.data.prepare.findings import Findings
from dti_dist.data.prepare.spark import _cut, build_with_spark
from dti_dist.errors import UserError
from dti_dist.options import RequestOptions

COLUMNS = EventColumns("user", "item", "time", item_key="item", texts=("title", "kind"))
START = 1_700_000_000
ALONE = RequestOptions(requests="none")
needs_java = pytest.mark.skipif(not shutil.which("java"), reason="Spark needs Java")


@pytest.fixture(scope="module")
def spark():
    """The session that all tests of this file share: starting one takes seconds."""
    os.environ["PYSPARK_PYTHON"] = sys.executable
    session = (
        SparkSession.builder.master("local[2]")
        .config("spark.ui.enabled", "false")
        .config("spark.sql.shuffle.partitions", "2")
        .config("spark.sql.adaptive.enabled", "false")
        .config("spark.sql.execution.arrow.maxRecordsPerBatch", "50")
        .config("spark.log.level", "OFF")
        .getOrCreate()
    )
    yield session
    session.stop()


def write_input(folder, events, kind="parquet", files=3, **columns):
    """Event files with many ties in time, out of order, and an item table. Paths of both."""
    bounds = np.linspace(0, len(events), files + 1).astype(int)
    user, item, timestamp, rating = (list(column) for column in zip(*events, strict=True))
    table = pa.table({"user": user, "item": item, "time": timestamp, "rating": rating} | columns)
    (folder / "events").mkdir()
    paths = [folder / "events" / f"{number}.{kind}" for number in range(files)]
    for path, first, end in zip(paths, bounds[:-1], bounds[1:], strict=True):
        write_table(table.slice(first, end - first), path)
    names = [f"{n:02d}" for n in range(12)]
    kinds = [None if n % 3 else f"kind {n}" for n in range(12)]
    items = folder / f"items.{kind}"
    write_table(
        pa.table({"item": names, "title": [f"títle {n}" for n in names], "kind": kinds}), items
    )
    return [str(folder / "events")], [str(items)]


def write_table(table, path):
    if path.suffix == ".csv":
        pyarrow.csv.write_csv(table, path)
    else:
        pq.write_table(table, path)


def random_events(seed, users=40, seconds=50, step=1):
    """(user, item, time, rating); users 0 to 4 have one interaction."""
    rng = random.Random(seed)
    events = []
    for user in range(users):
        for _ in range(1 if user < 5 else rng.randrange(2, 30)):
            time = START + step * rng.randrange(seconds)
            events.append((f"u{user:03d}", f"{rng.randrange(12):02d}", time, rng.randrange(1, 6)))
    rng.shuffle(events)
    return events


def both(
    tmp_path,
    paths,
    items,
    label="rating >= 4",
    columns=COLUMNS,
    requests=ALONE,
    more=None,
    **options,
):
    """What each engine built, or the error that it raised."""
    results = []
    for engine, build in [("duckdb", build_dataset), ("spark", build_with_spark)]:
        out = tmp_path / engine
        read = partial(
            read_events,
            paths=paths,
            items=items,
            columns=columns,
            label=label,
            requests=requests,
            **(more or {}),
        )
        try:
            results.append(build(read, str(out), BuildOptions(**options)))
        except UserError as error:
            assert not out.exists()
            results.append(str(error))
    return results


@needs_java
@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "kind", "limits"), [("time", "parquet", (60, 20)), ("leave-last", "csv", (40, 1000))]
)
def test_both_engines_write_the_same_bytes(spark, tmp_path, rule, kind, limits):
    events = random_events(seed=0)
    if kind == "csv":
        events = [(u, i, f"{np.datetime64(time, 's')}Z", rating) for u, i, time, rating in events]
    paths, items = write_input(tmp_path, events, kind)
    duck, spark_made = both(
        tmp_path,
        paths,
        items,
        split=rule,
        context_limit=6,
        shard_interactions=limits[0],
        row_group_interactions=limits[1],
    )
    assert spark_made.manifest == duck.manifest
    assert spark_made.notes == duck.notes
    assert any("out of time order" in note for note in duck.notes)
    assert duck.manifest.counts.users_left_out == 5
    dataset = Dataset.open(str(tmp_path / "spark"))
    dataset.verify_checksums()
    assert all(len(dataset.parts(split)) > 1 for split in SPLITS)
    assert {path.name for path in (tmp_path / "spark").iterdir()} == {
        "dataset.json",
        "items",
        *SPLITS,
    }


def say_splits(paths, rule):
    """Give each file of events a column, fold, from each interaction's place in its history."""
    files = sorted(Path(paths[0]).iterdir())
    tables = [pq.read_table(file) for file in files]
    rows = [row for table in tables for row in table.to_pylist()]
    histories = {}
    for number, row in enumerate(rows):
        histories.setdefault(row["user"], []).append((row["time"], number))
    for history in histories.values():
        for place, (_, number) in enumerate(sorted(history)):
            rows[number]["fold"] = rule(place, len(history))
    start = 0
    for file, table in zip(files, tables, strict=True):
        folds = [row["fold"] for row in rows[start : start + len(table)]]
        table = table.select(["user", "item", "time", "rating"])
        pq.write_table(table.append_column("fold", pa.array(folds)), file)
        start += len(table)


@needs_java
@pytest.mark.slow
def test_both_engines_split_alike_by_a_column(spark, tmp_path):
    paths, items = write_input(tmp_path, random_events(seed=3))
    say_splits(paths, lambda place, length: SPLITS[min(3 * place // length, 2)])
    columns = replace(COLUMNS, split="fold")
    limits = {"context_limit": 6, "shard_interactions": 60, "row_group_interactions": 20}
    duck, spark_made = both(tmp_path, paths, items, columns=columns, **limits)
    assert spark_made.manifest == duck.manifest
    assert duck.manifest.split == SplitRule(rule="column", column="fold")
    targets = [duck.manifest.counts.splits[split].targets for split in SPLITS]
    assert min(targets) > 100
    for rule, message in [
        (
            lambda place, length: SPLITS[place % 3],
            r"\d+ users have another order. User u\d+ has \w+ at",
        ),
        (lambda place, length: "Test" if place == 1 else "train", r"35 have something else"),
        (lambda place, length: "train", "valid, test has none"),
    ]:
        say_splits(paths, rule)
        shutil.rmtree(tmp_path / "duckdb", ignore_errors=True)
        shutil.rmtree(tmp_path / "spark", ignore_errors=True)
        duck, spark_made = both(tmp_path, paths, items, columns=columns)
        assert spark_made == duck
        assert re.search(message, duck)


@needs_java
@pytest.mark.slow
@pytest.mark.parametrize("rule", ["time", "leave-last"])
@pytest.mark.parametrize(
    "requests",
    [
        RequestOptions(requests="time"),
        RequestOptions(request_col="request", history="label = 1", context_only="item = '00'"),
    ],
    ids=["time", "column"],
)
def test_both_engines_form_the_same_requests(spark, tmp_path, rule, requests):
    events = random_events(seed=3)
    names = [f"r{time // 4}" for _, _, time, _ in events]
    paths, items = write_input(tmp_path, events, request=names)
    duck, spark_made = both(
        tmp_path,
        paths,
        items,
        requests=requests,
        more={"weight": "rating / 2", "keep_negatives": 0.4},
        split=rule,
        context_limit=3,
        shard_interactions=60,
        row_group_interactions=20,
    )
    assert spark_made.manifest == duck.manifest
    assert spark_made.notes == duck.notes
    assert any("rows joined" in note for note in duck.notes)
    assert ("is_target" in duck.manifest.columns["sequences"]) == bool(requests.context_only)


@needs_java
@pytest.mark.slow
@pytest.mark.parametrize(("rule", "items"), [("drop", 10), ("id", 12)])
def test_both_engines_treat_unknown_items_alike(spark, tmp_path, rule, items):
    paths, tables = write_input(tmp_path, random_events(seed=8))
    table = pq.read_table(tables[0]).slice(2).to_pylist()
    table[0] |= {"title": None, "kind": " "}
    pq.write_table(pa.Table.from_pylist(table), tables[0])
    limits = {"context_limit": 6, "shard_interactions": 60, "row_group_interactions": 20}
    duck, spark_made = both(tmp_path, paths, tables, unknown_items=rule, **limits)
    assert spark_made.manifest == duck.manifest
    assert spark_made.notes == duck.notes
    found = duck.manifest.unknown_items
    assert (found.rule, found.items) == (rule, 3)
    assert found.interactions > 10
    assert duck.manifest.counts.items == items


@needs_java
@pytest.mark.slow
def test_both_engines_refuse_alike(spark, tmp_path):
    paths, items = write_input(tmp_path, random_events(seed=7))
    pq.write_table(pq.read_table(items[0]).slice(2), tmp_path / "few.parquet")
    few = [str(tmp_path / "few.parquet")]
    for change, message in [
        (
            {"label": "rating"},
            r"expected a label of 0 or 1 .*; \d+ have something else. The first is \d in row \d+",
        ),
        (
            {"label": "user[1:1]::INTEGER"},
            r"events: reading the interactions failed in \S+.parquet: Could not conv",
        ),
        ({"items": few}, r"item with no row in the item table; 2 such items, e.g. '00', '01'"),
    ]:
        duck, spark_made = both(tmp_path, paths, change.pop("items", items), **change)
        # Of several files that can't be read, Spark names one that it came to first.
        one, other = (re.sub(r"events/\d\.", "events/N.", said) for said in (spark_made, duck))
        assert one == other
        assert re.search(message, duck)


@pytest.mark.parametrize("at_a_time", [1, 7, 40])
def test_histories_that_reach_over_batches_are_cut_as_one(at_a_time):
    users = np.repeat(["a", "b", "c", "d"], [9, 1, 30, 20])
    order = np.arange(60)
    rows = pa.table(
        {
            "user_id": users,
            "item_id": pa.array(order, pa.int32()),
            "label": pa.array(order % 2, pa.int8()),
            "timestamp": order // 3,
            "input_order": order % 5,
        }
    )
    rule = SplitRule(rule="time", boundaries={"valid": 12, "test": 16})
    plan = {split: [("", "")] for split in SPLITS}

    def cut(rows_of_a_batch, at_a_time):
        batches = rows.to_batches(max_chunksize=rows_of_a_batch)
        found = pa.Table.from_batches(_cut(rule, NO_RULES, 4, plan, at_a_time, batches))
        findings = map(json.loads, found["findings"].drop_null().to_pylist())
        summed = sum(map(Findings.from_json, findings), Findings())
        return summed, found.drop(["findings"]).sort_by(
            [("split", "ascending"), ("user_id", "ascending")]
        )

    whole = cut(60, 60)
    assert (whole[0].out_of_order, whole[0].interactions) == (9, 60)
    for rows_of_a_batch in (1, 4, 60):
        assert cut(rows_of_a_batch, at_a_time) == whole


def test_without_pyspark_or_java_the_error_says_how_to_get_them(tmp_path, monkeypatch):
    def build():
        build_with_spark(lambda workspace, extreme: None, str(tmp_path / "out"), BuildOptions())

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'dti-dist\[spark\]'"):
        build()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    monkeypatch.setattr(SparkContext, "_active_spark_context", None)
    monkeypatch.delenv("PYSPARK_GATEWAY_PORT", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.delenv("JAVA_HOME", raising=False)
    with pytest.raises(UserError, match=r"found no java on PATH.*Install Java 17"):
        build()
