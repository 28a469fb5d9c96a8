"""Classes of numbers that events have: their borders, and which one an interaction is in."""

from __future__ import annotations

import json
import math
import random
import shutil
from decimal import Decimal
from itertools import pairwise

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dti_dist import Interaction, Request, Scorer, read_prompts
from dti_dist.cli import main
from dti_dist.config import load_config
from dti_dist.data.classes import class_codes, class_texts
from dti_dist.data.dataset import SPLITS, Dataset, EventField, InteractionRules, iter_sequences
from dti_dist.data.prepare.append import append_to_dataset
from dti_dist.data.prepare.build import BuildOptions, build_dataset
from dti_dist.data.prepare.columns import event_columns, with_codes
from dti_dist.data.prepare.spark import build_with_spark
from dti_dist.errors import UserError
from dti_dist.serving.pretrained import load_exported
from tests.data.test_event_columns import events_of, reader, score_request
from tests.data.test_prepare_spark import spark  # noqa: F401 a fixture
from tests.export.exported import export_random_weights, target_scores
from tests.launching import write_config

_RANDOM = random.Random(7)
COLUMNS = {  # 168 values, of which some are missing
    "floats": [round(_RANDOM.lognormvariate(3, 1), 2) for _ in range(160)] + [None] * 8,
    "whole": [_RANDOM.randrange(12) for _ in range(168)],
    "mostly one": [0.5] * 100 + [_RANDOM.uniform(-3, 3) for _ in range(60)] + [math.nan] * 8,
    "mostly the least": [0] * 160 + [5, 7] * 4,
    "mostly the greatest": [0, 1] * 4 + [9] * 160,
    "two": [2.0, 30.0] * 84,
    "zeros": [0.0, -0.0, -1.0, 1.0] * 42,
    "beyond": [math.inf, -math.inf, *range(-60, 100), *[1e300, -1e-300, 1e16, 0.1, 1 / 3, None]],
    "decimals": [Decimal(_RANDOM.randrange(1, 10**6)).scaleb(-3) for _ in range(168)],
}


def with_prices(prices, seed=0, first=0):
    """Events of which each has one of the prices, in any order."""
    events = events_of(seed, length=len(prices) // 12, first=first)
    assert len(events) == len(prices)
    return [event | {"price": price} for event, price in zip(events, prices, strict=True)]


def prepare(folder, events, count=4, **changed):
    read = reader(folder / "in", events, ("price",), bucket=(f"price={count}",), **changed)
    summary = build_dataset(read, str(folder / "out"), BuildOptions())
    (price,) = summary.manifest.event_columns
    return summary, price


def codes_in(uri):
    """(user, time) → the code of the interaction's price."""
    dataset, found = Dataset.open(uri), {}
    for split in SPLITS:
        for batch in iter_sequences(dataset, split):
            for row in batch.rows.to_pylist():
                for time, code in zip(row["timestamps"], row["event_price"], strict=True):
                    assert found.setdefault((row["user_id"], time), code) == code
    return found


def is_number(value):
    return value is not None and math.isfinite(value)


def borders_by_hand(prices, count):
    """The numbers in order, cut into ``count`` runs of one length: each run's first one."""
    ordered = sorted(float(price) for price in prices if is_number(price))
    firsts = {ordered[run * len(ordered) // count] for run in range(1, count)} - {ordered[0]}
    return sorted(firsts) or [next(number for number in ordered if number > ordered[0])]


def class_by_hand(price, borders):
    return 1 + sum(float(price) >= border for border in borders) if is_number(price) else 0


@pytest.mark.parametrize(
    ("column", "count"),
    [
        ("floats", 5),
        ("floats", 1000),
        ("whole", 5),
        ("mostly one", 6),
        ("mostly the least", 4),
        ("mostly the greatest", 4),
        ("two", 9),
        ("zeros", 3),
        ("beyond", 2),
        ("beyond", 168),
        ("decimals", 7),
    ],
)
def test_classes_are_those_that_sorting_finds(tmp_path, column, count):
    prices = COLUMNS[column]
    events = with_prices(prices)
    summary, price = prepare(tmp_path, events, count)
    expected = borders_by_hand(prices, count)
    assert list(price.borders) == expected
    assert price.classes == count
    assert price.values == class_texts(expected)
    assert codes_in(str(tmp_path / "out")) == {
        (event["user"], event["time"]): class_by_hand(event["price"], expected) for event in events
    }
    fewer = f"classes of price: {len(expected) + 1:,} instead of {count:,}"
    assert any(note.startswith(fewer) for note in summary.notes) == (len(expected) + 1 < count)


def test_classes_of_different_numbers_have_the_same_size(tmp_path):
    prepare(tmp_path, with_prices(_RANDOM.sample(range(10**6), 168)), 7)
    codes = list(codes_in(str(tmp_path / "out")).values())
    assert np.bincount(codes).tolist() == [0, *[24] * 7]


@pytest.mark.parametrize("kind", ["csv", "json", "float32"])
def test_a_number_is_what_its_digits_say_in_every_format(tmp_path, kind):
    """As a float32, 0.1 is more than 0.1: a request of 0.1 would have another class."""
    numbers = [round(0.1 * n, 1) for n in range(40)] * 4 + [None] * 8
    events = with_prices(numbers)
    read = reader(tmp_path / "in", events, ("price",), bucket=("price=6",))
    plain = build_dataset(read, str(tmp_path / "plain"), BuildOptions()).manifest
    table = pa.Table.from_pylist(events)
    path = tmp_path / "in" / f"other.{kind}"
    if kind == "csv":
        pa.csv.write_csv(table, path)
    elif kind == "json":
        path.write_text("".join(json.dumps(event) + "\n" for event in events))
    else:
        types = [(f.name, pa.float32() if f.name == "price" else f.type) for f in table.schema]
        pq.write_table(table.cast(pa.schema(types)), path)
    read.keywords["paths"] = [str(path)]
    other = build_dataset(read, str(tmp_path / "other"), BuildOptions()).manifest
    assert other.event_columns == plain.event_columns
    assert codes_in(str(tmp_path / "other")) == codes_in(str(tmp_path / "plain"))


def test_of_rows_that_are_joined_the_greatest_number_counts(tmp_path):
    events = with_prices(list(range(168)))
    doubled = [*events, *({**event, "price": 1000 + event["price"]} for event in events)]
    _, price = prepare(tmp_path, doubled, 4)
    assert price.borders == (1042, 1084, 1126)


@pytest.mark.skipif(not shutil.which("java"), reason="Spark needs Java")
@pytest.mark.slow
def test_spark_finds_the_same_classes_and_writes_the_same_bytes(spark, tmp_path):  # noqa: F811
    prices = [*COLUMNS["floats"], *COLUMNS["zeros"][:8], *COLUMNS["beyond"][:40], *[0.1] * 24]
    events = [event | {"size": n % 7} for n, event in enumerate(with_prices(prices))]
    read = reader(tmp_path, events, ("device", "price", "size"), bucket=("price=12", "size=3"))
    summaries = [
        build(read, str(tmp_path / name), BuildOptions())
        for name, build in [("duck", build_dataset), ("spark", build_with_spark)]
    ]
    manifests = [summary.manifest for summary in summaries]
    assert manifests[0].event_columns == manifests[1].event_columns
    assert len(manifests[0].event_columns[1].borders) == 11
    assert manifests[0].files == manifests[1].files
    assert summaries[0].notes == summaries[1].notes


def test_an_append_keeps_the_borders(tmp_path):
    old = with_prices(COLUMNS["floats"])
    _, price = prepare(tmp_path, old, 5)
    uri = str(tmp_path / "out")
    new = with_prices([-5, 10**6, None, *range(165)], seed=3, first=len(old))
    read = reader(tmp_path / "new", new, ("price",), bucket=("price=5",))
    append_to_dataset(read, uri, None, BuildOptions())
    assert Dataset.open(uri).manifest.event_columns == (price,)
    found = codes_in(uri)
    for event in [*old, *new]:
        expected = class_by_hand(event["price"], price.borders)
        assert found[event["user"], event["time"]] == expected
    for bucket in [(), ("price=6",)]:
        read = reader(tmp_path / "new", new, ("price",), bucket=bucket)
        with pytest.raises(UserError, match=r"--event-cols price --bucket price=5\."):
            append_to_dataset(read, uri, None, BuildOptions())


@pytest.mark.parametrize(
    ("bucket", "message"),
    [
        ("price", "expected a column and a number of classes from 2 to 1,000, such as price=10"),
        ("price=1", "from 2 to 1,000"),
        ("price=1001", "from 2 to 1,000"),
        ("price=2.5", "from 2 to 1,000"),
        ("=5", "from 2 to 1,000"),
        ("prise=5", "expected a column of --event-cols; found price, device.*Did you mean 'price'"),
        ("device=5", "expected a column of numbers; found VARCHAR in .*events.parquet"),
        ("price=5,price=6", "expected each column once"),
    ],
)
def test_what_can_be_no_classes_is_refused(tmp_path, bucket, message):
    read = reader(
        tmp_path, with_prices([1, 2] * 84), ("price", "device"), bucket=tuple(bucket.split(","))
    )
    with pytest.raises(UserError, match=f"--bucket {bucket.split(',')[-1]}: .*{message}"):
        build_dataset(read, str(tmp_path / "out"), BuildOptions())


@pytest.mark.parametrize(
    ("prices", "message"),
    [
        ([True, False], "expected a column of numbers; found BOOLEAN"),
        (["1", "2"], "expected a column of numbers; found VARCHAR"),
        ([5, None], "expected different numbers; found one number alone"),
        ([math.nan, None], "expected different numbers; found none"),
        ([None, None], "expected different numbers; found none"),
    ],
)
def test_columns_of_no_numbers_are_refused(tmp_path, prices, message):
    with pytest.raises(UserError, match=f"--bucket price=4: {message}"):
        prepare(tmp_path, with_prices(prices * 84))


def test_many_numbers_are_refused_with_the_way_out(tmp_path):
    events = with_prices([0.5 * n for n in range(1200)])
    with pytest.raises(UserError, match=r"at most 1,000 different numbers.*--bucket price=10,"):
        build_dataset(reader(tmp_path, events, ("price",)), str(tmp_path / "a"), BuildOptions())
    prepare(tmp_path, events)


# --- edges -----------------------------------------------------------------------------------


def test_a_class_has_its_lower_border_and_not_its_upper():
    rng = np.random.default_rng(0)
    for _ in range(30):
        size = int(rng.integers(1, 40))
        borders = np.unique(rng.normal(size=size) * 10.0 ** rng.integers(-20, 20, size=size))
        edges = [*borders, *np.nextafter(borders, np.inf), *np.nextafter(borders, -np.inf)]
        numbers = [*edges, *rng.normal(size=50), 0.0, -0.0, 1e308, -1e308]
        expected = [class_by_hand(number, borders) for number in numbers]
        assert class_codes(numbers, borders).tolist() == expected
        field = EventField(name="x", classes=9, borders=tuple(map(float, borders)))
        columns = event_columns(InteractionRules(event_columns=(EventField(name="x"),)), None, ())
        (column,) = with_codes(columns, [field])
        connection = duckdb.connect()
        connection.register("interactions", pa.table({"event_x": [*numbers, None]}))
        found = connection.sql(f"SELECT {column.kept} FROM interactions").fetchall()
        assert [code for (code,) in found] == [*expected, 0]
    assert class_codes([math.nan, math.inf, -math.inf], [1.0]).tolist() == [0, 0, 0]


def test_texts_of_classes_read_back_as_their_borders():
    assert class_texts([5, 12.5, 20]) == ("under 5", "5 to 12.5", "12.5 to 20", "20 and over")
    assert class_texts([-0.1]) == ("under -0.1", "-0.1 and over")
    rng = np.random.default_rng(1)
    borders = np.unique([*(rng.normal(size=200) * 10.0 ** rng.integers(-30, 30, 200)), 0.1 + 0.2])
    borders = np.unique([*borders, *np.nextafter(borders, np.inf), 2**53, 1e15, -1e15, 1e22])
    texts = class_texts(borders.tolist())
    assert len(texts) == len(borders) + 1 == len({*texts})
    between = [tuple(map(float, text.split(" to "))) for text in texts[1:-1]]
    assert between == list(pairwise(borders.tolist()))
    assert float(texts[0].removeprefix("under ")) == borders[0]
    assert float(texts[-1].removesuffix(" and over")) == borders[-1]


# --- prompts and scores ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("buckets")
    prices = [round(_RANDOM.lognormvariate(3, 1), 1) for _ in range(150)] + [None] * 18
    _RANDOM.shuffle(prices)
    events = with_prices(prices)
    read = reader(folder / "in", events, ("device", "price"), bucket=("price=8",))
    build_dataset(read, str(folder / "out"), BuildOptions())
    return folder / "out", {(event["user"], event["time"]): event for event in events}


@pytest.fixture(scope="module")
def exported(prepared, tmp_path_factory):
    return export_random_weights(
        tmp_path_factory.mktemp("exported"),
        prepared[0],
        template={"item": "{title} for {price} on {device}"},
    )


def test_a_prompt_shows_the_class(prepared, tmp_path):
    template = {"item": "{title} costs {price};", "missing": "what it may"}
    config = load_config(write_config(tmp_path / "config.yaml", prepared[0], template=template))
    (_, price) = Dataset.open(str(prepared[0])).manifest.event_columns
    texts = {f"costs {text};" for text in (*price.values, "what it may")}
    shown = "".join(prompt.text for prompt in read_prompts(config))
    assert {text for text in texts if text in shown} == texts


def of_test(prepared):
    """Of each target of test: (row, position), the row, and its events."""
    dataset = Dataset.open(str(prepared[0]))
    rows = (row for batch in iter_sequences(dataset, "test") for row in batch.rows.to_pylist())
    for number, row in enumerate(rows):
        events = [prepared[1][row["user_id"], time] for time in row["timestamps"]]
        for at in range(max(row["target_start"], 1), len(events)):
            yield (number, at), row, events


@pytest.mark.parametrize("with_data", [False, True], ids=["alone", "with data"])
def test_scores_of_raw_numbers_are_those_of_evaluation(exported, prepared, with_data):
    folder, inputs = exported
    titles = Dataset.open(str(prepared[0])).items_table()["title"].to_pylist()
    data = str(prepared[0]) if with_data else None
    scorer = Scorer.from_pretrained(folder, device="cpu", data=data)
    forms = [float, np.float32, np.float64, Decimal]  # of a number with few digits
    keys, requests = [], []
    for key, row, events in of_test(prepared):
        past = [
            Interaction(
                {
                    "title": titles[item],
                    "device": event["device"],
                    "price": None if event["price"] is None else forms[n % 4](str(event["price"])),
                },
                label,
                time,
            )
            for n, (item, event, label, time) in enumerate(
                zip(row["item_ids"], events, row["labels"], row["timestamps"], strict=True)
            )
        ]
        keys.append(key)
        at = key[1]
        item = dict(past[at].item)
        others = [item | {"price": price} for price in (-1, 10**9, math.nan, None)]
        requests.append(Request(past[:at], [item, *others], past[at].timestamp))
    scores = np.array(scorer.score_batch(requests))
    expected = target_scores(load_exported(folder, str(prepared[0])).model, inputs)
    assert expected.keys() == {*keys}
    assert np.abs(scores[:, 0] - [expected[key] for key in keys]).max() < 1e-5
    assert np.abs(scores[:, 1] - scores[:, 2]).max() > 1e-3, "the price is read"
    assert np.abs(scores[:, 3] - scores[:, 4]).max() < 1e-6, "NaN is missing"
    for wrong in ("12.5 to 20", "7", True, [7]):
        with pytest.raises(UserError, match="Item 0, price: expected a number, found"):
            scorer.score([], [{"title": "thing", "device": "phone", "price": wrong}])


@pytest.mark.parametrize("kind", [pa.float64(), pa.float32(), pa.decimal128(12, 2)], ids=str)
@pytest.mark.parametrize("given", [False, True], ids=["looked up", "given"])
def test_scores_of_files_are_those_of_evaluation(exported, prepared, tmp_path, given, kind):
    folder, inputs = exported
    data = str(prepared[0])
    names = Dataset.open(data).items_table()["source_id"].to_pylist()
    keys, rows = [], []
    for key, row, events in of_test(prepared):
        at = key[1]
        items = [names[item] for item in row["item_ids"]]
        keys.append(key)
        rows.append(score_request(row, items, at, events, ("device", "price"), given))
    table = pa.Table.from_pylist(rows)
    types = {"price": kind, "history_price": pa.list_(kind)}
    table = table.cast(pa.schema([(f.name, types.get(f.name, f.type)) for f in table.schema]))
    pq.write_table(table, tmp_path / "requests.parquet")
    arguments = ["--requests", str(tmp_path / "requests.parquet"), "--data", data]
    assert main(["score", str(folder), *arguments, "--out", str(tmp_path / "out")]) == 0
    first = [scores[0] for scores in pq.read_table(tmp_path / "out")["scores"].to_pylist()]
    expected = target_scores(load_exported(folder, data).model, inputs)
    assert np.abs(np.array(first) - [expected[key] for key in keys]).max() < 1e-5


def test_a_file_with_texts_of_classes_is_refused(exported, prepared, tmp_path, capsys):
    request = {"user_id": "u1", "candidates": ["i1"], "price": "under 5"}
    pq.write_table(pa.Table.from_pylist([request]), tmp_path / "requests.parquet")
    arguments = ["--requests", str(tmp_path / "requests.parquet"), "--data", str(prepared[0])]
    assert main(["score", str(exported[0]), *arguments, "--out", str(tmp_path / "out")]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert (
        "row 1: price: expected numbers, since its classes were made of numbers; found string"
        in said
    )


def test_a_data_set_of_other_classes_is_refused(exported, prepared, tmp_path):
    events = list(prepared[1].values())
    read = reader(tmp_path / "in", events, ("device", "price"), bucket=("price=7",))
    build_dataset(read, str(tmp_path / "out"), BuildOptions())
    with pytest.raises(UserError, match="expected the classes of numbers of the data set that"):
        load_exported(exported[0], str(tmp_path / "out"))


def test_the_command_takes_classes_and_data_sets_of_before_are_read(tmp_path):
    reader(tmp_path, with_prices(COLUMNS["floats"]))
    columns = ["--user-col", "user", "--item-col", "item", "--time-col", "time"]
    columns += ["--label", "rating >= 4", "--text-cols", "title"]
    classes = ["--event-cols", "price,rating,device", "--bucket", "price=6", "--bucket", "rating=2"]
    out = tmp_path / "out"
    events, items = (str(tmp_path / f"{name}.parquet") for name in ("events", "items"))
    paths = [events, "--items", items, "--out", str(out)]
    assert main(["prepare", "events", *paths, *columns, *classes]) == 0
    price, rating, device = Dataset.open(str(out)).manifest.event_columns
    assert (price.classes, rating.classes, device.classes) == (6, 2, None)
    assert len(price.borders) == 5
    manifest = json.loads((out / "dataset.json").read_text())
    del manifest["event_columns"][2]["classes"], manifest["event_columns"][2]["borders"]
    (out / "dataset.json").write_text(json.dumps(manifest))
    assert Dataset.open(str(out)).manifest.event_columns[2] == device
