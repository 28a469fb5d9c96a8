"""Interactions whose item has no text: refused, left out, or told by the item's id."""

from __future__ import annotations

import json
import random
import re
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dti_dist.cli import main
from dti_dist.data.dataset import MANIFEST, Dataset, UnknownItems
from dti_dist.data.prepare.append import append_to_dataset
from dti_dist.data.prepare.build import BuildOptions, build_dataset
from dti_dist.data.prepare.events import EventColumns, read_events
from dti_dist.errors import UserError
from dti_dist.options import RequestOptions

COLUMNS = EventColumns("user", "item", "time", item_key="item", texts=("title", "brand"))
START = 1_700_000_000
REQUESTS = {
    "none": RequestOptions(requests="none"),
    "time": RequestOptions(requests="time"),
    "column": RequestOptions(request_col="request", history="label = 1", context_only="rating = 2"),
}
# i8 and i9 have no row; i6 and i7 have no text; i4 and i5 have one text each.
TITLES = {"i4": None, "i6": None, "i7": ""} | {f"i{n}": f"title {n}" for n in (0, 1, 2, 3, 5)}
BRANDS = {"i5": "", "i6": None, "i7": "  "} | {f"i{n}": f"brand {n}" for n in (0, 1, 2, 3, 4)}
UNKNOWN = {"i6", "i7", "i8", "i9"}


def random_events(seed=0, users=25, requests=8):
    """(user, item, time, rating, request), requests of one to four items; user 0 has the others'
    unknown items alone."""
    rng = random.Random(seed)
    events = []
    for user in range(users):
        for number in range(requests):
            time = START + 1000 * number + rng.randrange(900)
            for item in rng.sample(range(10), rng.randrange(1, 5)):
                name = f"i{item % 4 + 6 if user == 0 else item}"
                seconds = rng.randrange(3)
                events.append(
                    (f"u{user}", name, time + seconds, rng.randrange(1, 6), f"{user}-{number}")
                )
    rng.shuffle(events)
    return events


def write(folder, events, titles, brands):
    """A log and an item table; the same paths for any content."""
    folder.mkdir(exist_ok=True)
    columns = ("user", "item", "time", "rating", "request")
    table = dict(zip(columns, map(list, zip(*events, strict=True)), strict=True))
    pq.write_table(pa.table(table), folder / "events.parquet")
    items = {
        "item": list(titles),
        "title": pa.array(titles.values(), pa.string()),
        "brand": pa.array([brands[item] for item in titles], pa.string()),
    }
    pq.write_table(pa.table(items), folder / "items.parquet")


def reader(folder, events, titles=TITLES, brands=BRANDS, requests="none"):
    write(folder, events, titles, brands)
    return partial(
        read_events,
        paths=[str(folder / "events.parquet")],
        items=[str(folder / "items.parquet")],
        columns=COLUMNS,
        label="rating >= 4",
        requests=REQUESTS[requests],
    )


def build(folder, out, *args, rule="fail", requests="none", **options):
    read = reader(folder, *args, requests=requests)
    options = BuildOptions(unknown_items=rule, context_limit=5, **options)
    return build_dataset(read, str(folder / out), options)


def told(events):
    return [event for event in events if event[1] not in UNKNOWN]


def with_ids(texts):
    """Texts of all items, where those without any have their id."""
    return {**texts, **{item: item for item in UNKNOWN}}


def numbers(events, rule):
    """What dataset.json says, by counting."""
    unknown = [event for event in events if event[1] in UNKNOWN]
    return UnknownItems(
        rule=rule,
        items=len({event[1] for event in unknown}),
        interactions=len(unknown),
        users=len({event[0] for event in unknown}) if rule == "drop" else None,
    )


def of_manifest(manifest):
    """All but what names the inputs and says what was done with unknown items."""
    return manifest.model_copy(update={"source": {}, "unknown_items": None})


@pytest.mark.parametrize("requests", REQUESTS)
@pytest.mark.parametrize("seed", [0, 1])
def test_dropped_items_leave_the_data_set_of_a_log_without_them(tmp_path, requests, seed):
    events = random_events(seed)
    found = build(tmp_path, "found", events, rule="drop", requests=requests).manifest
    wanted = build(tmp_path, "wanted", told(events), requests=requests).manifest
    assert of_manifest(found) == of_manifest(wanted)
    assert found.unknown_items == numbers(events, "drop")
    assert wanted.unknown_items is None
    assert "u0" not in {user for user, *_ in told(events)}


@pytest.mark.parametrize("requests", REQUESTS)
@pytest.mark.parametrize("seed", [0, 1])
def test_items_told_by_their_id_are_those_of_a_completed_table(tmp_path, requests, seed):
    events = random_events(seed)
    found = build(tmp_path, "found", events, rule="id", requests=requests).manifest
    tables = with_ids(TITLES), with_ids(BRANDS)
    wanted = build(tmp_path, "wanted", events, *tables, requests=requests).manifest
    assert of_manifest(found) == of_manifest(wanted)
    assert found.unknown_items == numbers(events, "id")
    rows = Dataset.open(str(tmp_path / "found")).items_table().to_pylist()
    texts = {row["source_id"]: (row["title"], row["brand"]) for row in rows}
    assert [texts[f"i{n}"] for n in (4, 5)] == [("", "brand 4"), ("title 5", "")]
    assert [texts[item] for item in sorted(UNKNOWN)] == [(i, i) for i in sorted(UNKNOWN)]


def test_the_default_refuses_them_and_names_the_choice(tmp_path):
    events = random_events()
    message = "no row in the item table; 2 such items, e.g. 'i8', 'i9'. Add them to the item "
    with pytest.raises(UserError, match=message):
        build(tmp_path, "out", events)
    with pytest.raises(
        UserError, match=r"no text .*; 2 such items, e.g. 'i6', 'i7'\. .*drop or id"
    ):
        build(tmp_path, "out", [event for event in events if event[1] not in ("i8", "i9")])
    assert not (tmp_path / "out").exists()


def test_what_was_done_is_in_the_summary_and_in_dataset_json(tmp_path):
    events = random_events()
    few = [*told(events), ("u3", "i9", START, 5, "x"), ("u4", "i9", START, 1, "x")]
    share = 2 / len(few)
    printed = str(build(tmp_path, "drop", few, rule="drop"))
    assert (
        f"note: interactions left out, for their item has no text: 2 ({share:.1%}); users who had "
        "such: 2; items: 1, e.g. 'i9'\n"
    ) in printed
    fields = json.loads((tmp_path / "drop" / MANIFEST).read_text())
    assert fields["unknown_items"] == {"rule": "drop", "items": 1, "interactions": 2, "users": 2}
    printed = str(build(tmp_path, "id", few, rule="id"))
    assert (
        "note: items whose text is their id, for they have no other: 1; interactions with them: 2 "
        f"({share:.1%}); e.g. 'i9'\n"
    ) in printed
    printed = str(build(tmp_path, "many", events, rule="drop"))
    assert "WARNING: interactions left out, for their item has no text" in printed
    assert "Check --item-key and --text-cols" in printed


def test_a_missing_text_beside_another_is_empty_and_counted(tmp_path):
    summary = build(tmp_path, "out", told(random_events()))
    assert summary.manifest.unknown_items is None
    assert "note: items without title: 3 of 8" in str(summary)
    assert "note: items without brand: 3 of 8" in str(summary)
    assert "items without" not in str(
        build(
            tmp_path,
            "full",
            told(random_events()),
            with_ids({**TITLES, "i4": "four"}),
            with_ids({**BRANDS, "i5": "five"}),
        )
    )


def test_nothing_left_is_refused(tmp_path):
    events = [event for event in random_events() if event[1] in UNKNOWN]
    with pytest.raises(UserError, match=rf"all {len(events)} have none, e.g. 'i6', .*--item-key"):
        build(tmp_path, "out", events, rule="drop")
    assert build(tmp_path, "out", events, rule="id").manifest.unknown_items.items == 4


# --- appended -------------------------------------------------------------------------------


@pytest.mark.parametrize("requests", ["none", "column"])
@pytest.mark.parametrize("rule", ["drop", "id"])
def test_an_append_does_alike(tmp_path, rule, requests):
    events = random_events(3)
    border = START + 5000
    old, new = ([e for e in events if (e[2] < border) == is_old] for is_old in (True, False))
    # The new table has a text of i9: in time under drop, too late under id.
    later = TITLES | {"i9": "title 9"}, BRANDS | {"i9": None}

    def made(out, old, new, rule, *tables):
        build(tmp_path, out, old, *tables, rule=rule, requests=requests)
        read = reader(tmp_path, new, *later, requests=requests)
        options = BuildOptions(unknown_items=rule)
        return append_to_dataset(read, str(tmp_path / out), "roll", options)

    summary = made("found", old, new, rule)
    if rule == "drop":
        unknown = [event for event in new if event[1] in UNKNOWN - {"i9"}]
        kept = [event for event in new if event not in unknown]
        wanted = made("wanted", told(old), kept, "fail").manifest
        of_append = UnknownItems(
            rule="drop",
            items=3,
            interactions=len(unknown),
            users=len({event[0] for event in unknown}),
        )
    else:
        wanted = made("wanted", old, new, "fail", with_ids(TITLES), with_ids(BRANDS)).manifest
        of_append = None  # all of them were told by their id before
    found = summary.manifest
    assert found.counts == wanted.counts
    assert found.statistics == wanted.statistics
    assert rows_of(tmp_path / "found") == rows_of(tmp_path / "wanted")
    assert found.unknown_items == numbers(old, rule)
    assert found.appends[0].unknown_items == of_append
    assert ("for their item has no text" in str(summary)) == (rule == "drop")


def rows_of(uri):
    """The item table and all sequences, by file but for its name."""
    dataset = Dataset.open(str(uri))
    found = {"items": dataset.items_table().to_pylist()}
    for split in ("train", "valid", "test"):
        for number, part in enumerate(dataset.parts(split)):
            found[f"{split} {number}"] = pq.read_table(part.uri).to_pylist()
    return found


def test_an_append_tells_new_items_by_their_id_and_changes_no_old_one(tmp_path):
    events = told(random_events())
    build(tmp_path, "out", events)
    before = Dataset.open(str(tmp_path / "out")).items_table()
    later = [("u1", "i9", START + 10**6, 5, "new"), ("u1", "i0", START + 10**6, 1, "new")]
    out = str(tmp_path / "out")
    with pytest.raises(UserError, match=r"no row in the item table; 1 such items, e\.g\. 'i9'"):
        append_to_dataset(reader(tmp_path, later), out, None, BuildOptions())
    options = BuildOptions(unknown_items="id")
    manifest = append_to_dataset(reader(tmp_path, later), out, None, options).manifest
    assert manifest.appends[0].unknown_items == UnknownItems(rule="id", items=1, interactions=1)
    after = Dataset.open(out).items_table()
    assert after.slice(0, len(before)) == before
    assert after.slice(len(before)).to_pylist() == [
        {"item_id": len(before), "source_id": "i9", "title": "i9", "brand": "i9"}
    ]
    # i6 has a row in the data set, without text: an append can't give it one.
    last = [("u1", "i6", START + 2 * 10**6, 5, "last"), ("u1", "i0", START + 2 * 10**6, 1, "last")]
    for rule in ("fail", "id"):
        with pytest.raises(UserError, match="it has 'i6' without, and an append changes no item"):
            append_to_dataset(reader(tmp_path, last), out, None, BuildOptions(unknown_items=rule))
    drop = BuildOptions(unknown_items="drop")
    record = append_to_dataset(reader(tmp_path, last), out, None, drop).manifest.appends[1]
    assert record.unknown_items == UnknownItems(rule="drop", items=1, interactions=1, users=1)
    assert record.interactions == 1


def test_the_command_takes_the_rule_for_a_data_set_and_an_append(tmp_path, capsys):
    events = random_events()
    write(tmp_path, events, TITLES, BRANDS)
    command = ["prepare", "events", f"{tmp_path}/events.parquet", "--items"]
    command += [f"{tmp_path}/items.parquet", "--user-col", "user", "--item-col", "item"]
    command += ["--time-col", "time", "--label", "rating >= 4", "--text-cols", "title,brand"]
    command += ["--out", str(tmp_path / "out")]
    assert main(command) == 2
    assert "--unknown-items drop or id" in capsys.readouterr().err
    assert main([*command, "--unknown-items", "drop"]) == 0
    assert re.search(r"left out, for their item has no text: [\d,]+ \(", capsys.readouterr().out)
    later = [(user, item, time + 10**7, rating, name) for user, item, time, rating, name in events]
    write(tmp_path, later, TITLES, BRANDS)
    assert main([*command, "--unknown-items", "drop", "--append"]) == 0
    manifest = Dataset.open(str(tmp_path / "out")).manifest
    assert manifest.appends[0].unknown_items == manifest.unknown_items == numbers(events, "drop")
