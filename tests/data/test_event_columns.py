"""Texts of the events that interactions keep as codes, and that templates name."""

from __future__ import annotations

import json
import random
import shutil
from functools import partial
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dti_dist import Interaction, Request, Scorer, read_prompts
from dti_dist.cli import main
from dti_dist.config import load_config
from dti_dist.data.dataset import SPLITS, Dataset, EventField, InteractionRules, iter_sequences
from dti_dist.data.prepare import event_values
from dti_dist.data.prepare.append import append_to_dataset
from dti_dist.data.prepare.build import BuildOptions, build_dataset
from dti_dist.data.prepare.events import EventColumns, read_events
from dti_dist.data.prepare.spark import build_with_spark
from dti_dist.data.sequences import find_fault
from dti_dist.errors import UserError
from dti_dist.serving.pretrained import load_exported
from tests.data.test_prepare_spark import spark  # noqa: F401 a fixture
from tests.export.exported import export_random_weights, target_scores
from tests.launching import write_config

START = 1_700_000_000
DEVICES = ["phone", "it's a \\tab\\", "", None, "télé", "desk {top}"]
PAGES = ["home", "search", None]


def events_of(seed, users=12, length=14, first=0):
    """Rows of a log, all at different times."""
    rng = random.Random(seed)
    rows = [
        {
            "user": f"u{user}",
            "item": f"i{rng.randrange(9)}",
            "rating": rng.randrange(1, 6),
            "device": rng.choice(DEVICES),
            "page": rng.choice(PAGES),
        }
        for user in range(users)
        for _ in range(length)
    ]
    rng.shuffle(rows)
    return [row | {"time": START + 5000 * (first + n)} for n, row in enumerate(rows)]


def reader(folder, events, event_cols=("device", "page"), **changed):
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(events), folder / "events.parquet")
    items = {"item": [f"i{n}" for n in range(9)], "title": [f"thing {n}" for n in range(9)]}
    pq.write_table(pa.table(items), folder / "items.parquet")
    return partial(
        read_events,
        paths=[str(folder / "events.parquet")],
        items=[str(folder / "items.parquet")],
        columns=EventColumns("user", "item", "time", item_key="item", texts=("title",)),
        label="rating >= 4",
        event_cols=event_cols,
        **changed,
    )


def values_in(dataset, splits=SPLITS):
    """(user, time) → device and page, as the data set has them; "" for none."""
    fields = dataset.manifest.event_columns
    found = {}
    for split in splits:
        for batch in iter_sequences(dataset, split):
            for row in batch.rows.to_pylist():
                for at, time in enumerate(row["timestamps"]):
                    codes = [row[field.stored][at] for field in fields]
                    pairs = zip(fields, codes, strict=True)
                    texts = tuple(["", *field.values][code] for field, code in pairs)
                    assert found.setdefault((row["user_id"], time), texts) == texts
    return found


def in_events(events):
    return {(e["user"], e["time"]): (e["device"] or "", e["page"] or "") for e in events}


def test_each_interaction_keeps_its_own_values(tmp_path):
    events = events_of(0)
    build_dataset(reader(tmp_path, events), str(tmp_path / "out"), BuildOptions())
    dataset = Dataset.open(str(tmp_path / "out"))
    device, page = dataset.manifest.event_columns
    assert (device.name, device.values) == ("device", tuple(sorted(filter(None, DEVICES))))
    assert (page.name, page.values) == ("page", ("home", "search"))
    assert values_in(dataset) == in_events(events)
    assert dataset.sequence_columns[-2:] == ["event_device", "event_page"]


@pytest.mark.skipif(not shutil.which("java"), reason="Spark needs Java")
@pytest.mark.slow
def test_spark_writes_the_same_bytes(spark, tmp_path):  # noqa: F811
    read = reader(tmp_path, events_of(1, users=30))
    manifests = [
        build(read, str(tmp_path / name), BuildOptions()).manifest
        for name, build in [("duck", build_dataset), ("spark", build_with_spark)]
    ]
    assert manifests[0].files == manifests[1].files
    assert manifests[0].event_columns == manifests[1].event_columns


def test_new_values_of_an_append_come_behind_the_old_ones(tmp_path):
    old, uri = events_of(2), str(tmp_path / "out")
    build_dataset(reader(tmp_path, old), uri, BuildOptions())
    before = Dataset.open(uri).manifest.event_columns
    new = [
        event | {"device": "a watch" if event["device"] == "phone" else event["device"]}
        for event in events_of(3, first=len(old))
    ]
    append_to_dataset(reader(tmp_path, new), uri, None, BuildOptions())
    dataset = Dataset.open(uri)
    device, page = dataset.manifest.event_columns
    assert device.values == (*before[0].values, "a watch")
    assert page == before[1]
    assert values_in(dataset) == in_events([*old, *new])
    with pytest.raises(UserError, match=r"Give --requests time --event-cols device,page\."):
        append_to_dataset(reader(tmp_path, new, ("device",)), uri, None, BuildOptions())


@pytest.mark.parametrize(
    ("event_cols", "message"),
    [
        (("devise",), "--event-cols"),
        (("hour",), "expected another name, since that tells the interaction's time"),
        (("title",), "expected another name than that of a text column of the items"),
        (("page", "Page"), "differ in more than the case of letters"),
        (("a-b",), "expected a name of letters, digits and _"),
    ],
)
def test_names_that_a_template_could_not_mean_are_refused(tmp_path, event_cols, message):
    with pytest.raises(UserError, match=message):
        build_dataset(
            reader(tmp_path, events_of(0), event_cols), str(tmp_path / "out"), BuildOptions()
        )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (lambda n: f"page {n}", "at most 20 different texts; found more.*sessions"),
        (lambda n: n / 4, "at most 10 different numbers; found more.*--bucket page=10,"),
    ],
)
def test_columns_of_too_many_values_are_refused(tmp_path, monkeypatch, values, message):
    monkeypatch.setattr(event_values, "_MOST_VALUES", 20)
    monkeypatch.setattr(event_values, "_MOST_NUMBERS", 10)
    events = [event | {"page": values(n % 21)} for n, event in enumerate(events_of(0))]
    with pytest.raises(UserError, match=message):
        build_dataset(reader(tmp_path, events), str(tmp_path / "out"), BuildOptions())
    few = [event | {"page": values(n % 10)} for n, event in enumerate(events)]
    build_dataset(reader(tmp_path, few), str(tmp_path / "out"), BuildOptions())


def test_a_code_of_no_value_is_found(prepared):
    dataset = Dataset.open(str(prepared[0]))
    (batch, *_) = iter_sequences(dataset, "train")
    assert find_fault(batch.rows, 9, dataset.manifest.stored) is None
    fewer = EventField(name="device", values=("phone",))
    _, problem = find_fault(batch.rows, 9, InteractionRules(event_columns=(fewer,)).stored)
    assert "event_device" in problem
    assert "expected 0 to 1, found" in problem


# --- prompts and scores ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("event-columns")
    events = events_of(4, users=20)
    build_dataset(reader(folder / "input", events), str(folder / "data"), BuildOptions())
    return folder / "data", {(event["user"], event["time"]): event for event in events}


def test_a_prompt_has_the_text_of_each_interaction(prepared, tmp_path):
    data, _ = prepared
    template = {"item": "\n{title} on {device}, {page}:", "missing": "nothing"}
    config = load_config(write_config(tmp_path / "config.yaml", data, template=template))
    dataset = Dataset.open(str(data))
    values = values_in(dataset, ["train"])
    rows = [row for batch in iter_sequences(dataset, "train") for row in batch.rows.to_pylist()]
    prompts = 0
    for prompt in read_prompts(config):
        row = rows[prompt.row]
        last = int(prompt.positions[-1])
        first = last + 1 - prompt.text.count("\n")
        expected = ""
        for at in range(first, last + 1):
            texts = [t or "nothing" for t in values[row["user_id"], row["timestamps"][at]]]
            expected += f"\nthing {row['item_ids'][at]} on {texts[0]}, {texts[1]}:"
            expected += "[SUM]" if at in prompt.positions else ""
            expected += (" No", " Yes")[row["labels"][at]]
        # Ids of items are dense: titles by the table.
        titles = dataset.items_table()["title"].to_pylist()
        for number, title in enumerate(titles):
            expected = expected.replace(f"\nthing {number} ", f"\n\x00{title} ")
        assert prompt.text == expected.replace("\x00", "")
        prompts += 1
    assert prompts > 10


@pytest.fixture(scope="module", params=["budget", "isolated"])
def exported(request, prepared, tmp_path_factory):
    return export_random_weights(
        tmp_path_factory.mktemp(request.param),
        prepared[0],
        template={"item": "{title} on {device} at {hour}, {page}:", "time_gaps": True},
        attention={"policy": request.param},
    )


def rows_of_test(prepared):
    dataset = Dataset.open(str(prepared[0]))
    return [row for batch in iter_sequences(dataset, "test") for row in batch.rows.to_pylist()]


def test_scores_are_those_of_evaluation(exported, prepared):
    folder, inputs = exported
    titles = Dataset.open(str(prepared[0])).items_table()["title"].to_pylist()
    keys, requests = [], []
    for number, row in enumerate(rows_of_test(prepared)):
        past = [
            Interaction(
                {"title": titles[item]}
                | {name: prepared[1][row["user_id"], time][name] for name in ("device", "page")},
                label,
                time,
            )
            for item, label, time in zip(
                row["item_ids"], row["labels"], row["timestamps"], strict=True
            )
        ]
        for at in range(max(row["target_start"], 1), len(past)):
            keys.append((number, at))
            item = dict(past[at].item)
            other = item | {"device": "never seen"}
            without = {"title": item["title"], "page": item["page"]}
            requests.append(Request(past[:at], [item, other, without], past[at].timestamp))
    for data in (None, str(prepared[0])):
        scorer = Scorer.from_pretrained(folder, device="cpu", data=data)
        with pytest.warns(UserWarning, match=f"^{len(requests)} values of event columns are none"):
            scores = np.array(scorer.score_batch(requests))
        expected = target_scores(load_exported(folder, str(prepared[0])).model, inputs)
        assert keys
        assert expected.keys() == set(keys)
        assert np.abs(scores[:, 0] - [expected[key] for key in keys]).max() < 1e-5
        assert np.abs(scores[:, 1] - scores[:, 2]).max() < 1e-6, "what is unknown is missing"
        assert np.abs(scores[:, 0] - scores[:, 1]).max() > 1e-3, "the device is read"


def test_values_that_training_did_not_see_are_counted(exported, prepared, tmp_path, capsys):
    common = {"history_items": ["i1", "i2"], "history_labels": [0, 1], "timestamp": START}
    common |= {"history_timestamps": [START - 9, START - 8], "candidates": ["i3", "i4"]}
    rows = [
        {"device": "phone", "page": ["home", None], "history_device": ["", "télé"]},
        {"device": "fridge", "page": ["home", "hall"], "history_device": ["fridge", None]},
    ]
    pq.write_table(pa.Table.from_pylist([common | row for row in rows]), tmp_path / "r.parquet")
    arguments = ["--requests", str(tmp_path / "r.parquet"), "--data", str(prepared[0])]
    assert main(["score", str(exported[0]), *arguments, "--out", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "_scores.json").read_text())["event_values_unseen"] == 4
    said = capsys.readouterr().err
    assert said.count("4 values of event columns are none that training saw") == 1


def score_request(row, items, at, events, fields, given):
    """What a service asks of a target, beside a user's first item: with the history, or without.

    Args:
        row: the user's sequence; items: their ids; at: which is the target.
        events: of each interaction its fields.
    """
    request = {
        "user_id": row["user_id"],
        "candidates": [items[at], items[0]],
        "timestamp": row["timestamps"][at],
        **{name: events[at][name] for name in fields},
    }
    if given:
        request |= {
            "history_items": items[:at],
            "history_labels": row["labels"][:at],
            "history_timestamps": row["timestamps"][:at],
            **{f"history_{name}": [event[name] for event in events[:at]] for name in fields},
        }
    return request


@pytest.mark.parametrize("given", [False, True], ids=["looked up", "given"])
def test_scores_of_files_are_those_of_evaluation(exported, prepared, tmp_path, given):
    folder, inputs = exported
    data = str(prepared[0])
    names = Dataset.open(data).items_table()["source_id"].to_pylist()
    keys, rows = [], []
    for number, row in enumerate(rows_of_test(prepared)):
        events = [prepared[1][row["user_id"], time] for time in row["timestamps"]]
        items = [names[item] for item in row["item_ids"]]
        for at in range(max(row["target_start"], 1), len(items)):
            keys.append((number, at))
            request = score_request(row, items, at, events, ("device", "page"), given)
            rows.append(request | {"page": [request["page"], "home"]})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "requests.parquet")
    arguments = ["--requests", str(tmp_path / "requests.parquet"), "--data", data]
    assert main(["score", str(folder), *arguments, "--out", str(tmp_path / "out")]) == 0
    scored = pq.read_table(tmp_path / "out")
    assert not {"history_device", "history_page"} & {*scored.schema.names}
    first = [scores[0] for scores in scored["scores"].to_pylist()]
    expected = target_scores(load_exported(folder, data).model, inputs)
    assert np.abs(np.array(first) - [expected[key] for key in keys]).max() < 1e-5
    assert len({*chain(first)}) > 5
