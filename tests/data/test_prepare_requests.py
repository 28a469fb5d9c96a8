"""Requests in prepare: against plain Python, by both engines, appended, and refused."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter, defaultdict
from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dti_dist.cli import main
from dti_dist.data.dataset import MANIFEST, SPLITS, Dataset, RequestRule, iter_sequences
from dti_dist.data.index import RowGroup, read_block
from dti_dist.data.prepare.append import append_to_dataset
from dti_dist.data.prepare.build import BuildOptions, build_dataset
from dti_dist.data.prepare.events import EventColumns, read_events
from dti_dist.data.prepare.movielens import read_movielens
from dti_dist.data.samples import SampleSettings
from dti_dist.errors import UserError
from dti_dist.options import EventOptions, RequestOptions
from tests.tiny import item_tokens

COLUMNS = EventColumns("user", "item", "time", item_key="item", texts=("title",))
START = 1_700_000_000
JOINED = ("label", "history", "target", "weight")
LABEL, WEIGHT = "rating >= 4", "rating / 2"
# The expressions of the tests, and the same in Python.
CONDITIONS = {
    None: None,
    "label = 1": lambda row: row["label"] == 1,
    "rating > 2": lambda row: row["rating"] > 2,
    "item = 'i0' OR rating = 5": lambda row: row["item"] == "i0" or row["rating"] == 5,
}


def write_events(folder, events, files=1):
    """(user, item, milliseconds since START, rating, request), shared out among files."""
    paths = []
    for number in range(files):
        rows = events[number * len(events) // files : (number + 1) * len(events) // files]
        user, item, time, rating, request = ([row[column] for row in rows] for column in range(5))
        table = pa.table(
            {
                "user": pa.array(user, pa.string()),
                "item": pa.array(item, pa.string()),
                "time": pa.array([START * 1000 + ms for ms in time], pa.int64()),
                "rating": pa.array(rating, pa.int64()),
                "request": pa.array(request, pa.string()),
            }
        )
        paths.append(str(folder / f"events-{number}.parquet"))
        pq.write_table(table, paths[-1])
    items = folder / "items.parquet"
    names = [f"i{n}" for n in range(12)]
    pq.write_table(pa.table({"item": names, "title": names}), items)
    return {"paths": paths, "items": [str(items)], "columns": COLUMNS, "label": LABEL}


def request_options(by, history=None, context_only=None):
    given = {"request_col": "request"} if by == "column" else {"requests": by}
    return RequestOptions(**given, history=history, context_only=context_only)


def build(
    folder,
    events,
    by="time",
    history=None,
    context_only=None,
    weight=None,
    keep=None,
    files=1,
    out="out",
    **options,
):
    read = partial(
        read_events,
        **write_events(folder, events, files),
        requests=request_options(by, history, context_only),
        weight=weight,
        keep_negatives=keep,
    )
    return build_dataset(read, str(folder / out), BuildOptions(**options))


# --- the same in plain Python ---------------------------------------------------------------


def interactions_of(events, by, history, context_only):
    """{user: interactions in order}; and how many rows were joined, with a click, left out."""
    rows = []
    for number, (user, item, ms, rating, request) in enumerate(events):
        row = {"user": user, "item": item, "ms": ms, "rating": rating, "request": request}
        row |= {"time": START + ms // 1000, "number": number, "label": int(rating >= 4)}
        row["history"] = CONDITIONS[history](row) if history else True
        row["target"] = not CONDITIONS[context_only](row) if context_only else True
        row["weight"] = rating / 2  # WEIGHT
        rows.append(row)
    if by == "none":
        rows.sort(key=lambda row: (row["ms"], row["number"]))
        joined = clicks = left_out = 0
    else:
        if by == "column":
            first = {}
            for row in rows:
                key = row["user"], row["request"]
                first[key] = min(first.get(key, row["time"]), row["time"])
            for row in rows:
                row["time"] = first[row["user"], row["request"]]
        together = defaultdict(list)
        for row in rows:
            together[row["user"], row["item"], row["time"]].append(row)
        joined = len(rows) - len(together)
        clicks = sum(
            len(same) - 1 for same in together.values() if len({r["label"] for r in same}) == 2
        )
        merged = [
            same[0]
            | {key: max(r[key] for r in same) for key in ("label", "history", "target", "weight")}
            for same in together.values()
        ]
        rows = [row for row in merged if row["history"] or row["target"]]
        left_out = len(merged) - len(rows)
        rows.sort(key=lambda row: (row["time"], row["number"]))
    users = defaultdict(list)
    for row in rows:
        users[row["user"]].append(row)
    return users, (joined, clicks, left_out)


def requests_of(rows, by):
    """The requests of one user's interactions, in order."""
    found = []
    for row in rows:
        if by != "none" and found and found[-1][0]["time"] == row["time"]:
            found[-1].append(row)
        else:
            found.append([row])
    return found


def split_ends(rows, by, split_rule, boundaries):
    """The places in a user's interactions at which valid and test begin."""
    if split_rule == "time":
        return [sum(row["time"] < limit for row in rows) for limit in boundaries]
    starts, place = [], 0
    for request in requests_of(rows, by):
        if any(row["target"] for row in request):
            starts.append(place)
        place += len(request)
    if not starts:
        return [len(rows), len(rows)]
    return [starts[max(len(starts) - 2, 0)], starts[-1]]


def is_kept(row, share):
    drawn = hashlib.md5(f"{row['user']}|{row['item']}|{row['time']}".encode()).hexdigest()
    return row["label"] == 1 or int(drawn[:8], 16) < round(share * 2**32)


def expected_sequences(users, by, split_rule, context_limit, keep=None):
    """{split: {user: columns of the row}}, and whether every split has targets."""
    times = [row["time"] for rows in users.values() for row in rows if row["target"]]

    def boundary(wanted):
        distances = ((abs(sum(other < t for other in times) - wanted), t) for t in set(times))
        return min(distances, default=(0, 0))[1]

    boundaries = [boundary(round(len(times) * share)) for share in (0.8, 0.8 + 0.1)]
    found, targets = {split: {} for split in SPLITS}, Counter()
    for user, rows in users.items():
        ends = [0, *split_ends(rows, by, split_rule, boundaries), len(rows)]
        for split, begin, end in zip(SPLITS, ends[:-1], ends[1:], strict=True):
            if begin == end:
                continue
            context = [row for row in rows[:begin] if row["history"]][-context_limit:]
            own = rows[begin:end]
            if keep is not None and split == "train":
                own = [row for row in own if row["history"] or is_kept(row, keep)]
                if not own:
                    continue
            kept = context + own
            found[split][user] = {
                "item_ids": [row["item"] for row in kept],
                "labels": [row["label"] for row in kept],
                "timestamps": [row["time"] for row in kept],
                "target_start": len(context),
                "is_history": [row["history"] for row in kept],
                "is_target": [row["target"] for row in kept],
                "weight": [row["weight"] for row in kept],
                "is_kept": [is_kept(row, keep) for row in kept] if keep is not None else None,
            }
            sampled = keep is not None and split == "train"
            targets[split] += sum(
                row["target"] and not (sampled and not is_kept(row, keep)) for row in own
            )
    return found, targets


def check_statistics(manifest, users, by):
    """Of requests, and the counts, against those of the interactions."""
    requests = [request for rows in users.values() for request in requests_of(rows, by)]
    targets = [[row for row in request if row["target"]] for request in requests]
    targets = [rows for rows in targets if rows]
    all_targets = [row for rows in targets for row in rows]
    assert sum(c.targets for c in manifest.counts.splits.values()) == len(all_targets)
    assert sum(c.clicks for c in manifest.counts.splits.values()) == sum(
        row["label"] for row in all_targets
    )
    assert manifest.counts.interactions == sum(map(len, users.values()))
    without = sum(
        row["target"] and not any(r["history"] for request in before for r in request)
        for rows in users.values()
        for before, request in (
            (requests_of(rows, by)[:n], request) for n, request in enumerate(requests_of(rows, by))
        )
        for row in request
    )
    found = manifest.statistics.requests
    if by == "none":
        assert found is None
        return without
    assert found.requests == len(targets)
    assert found.targets_per_request.histogram == Counter(map(len, targets))
    assert found.clicks_per_request.histogram == Counter(
        sum(row["label"] for row in rows) for rows in targets
    )
    assert found.history_targets == sum(row["history"] for row in all_targets)
    assert found.targets_without_history == without
    return without


event_lists = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "é"]),
        st.sampled_from(["i0", "i1", "i2"]),
        st.integers(0, 40).map(lambda quarter: quarter * 250),
        st.integers(1, 5),
        st.sampled_from(["r0", "r1", "r2", "r3", "r4", "r5"]),
    ),
    min_size=1,
    max_size=40,
)


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    events=event_lists,
    by=st.sampled_from(["time", "column", "none"]),
    history=st.sampled_from([None, "label = 1", "rating > 2"]),
    context_only=st.sampled_from([None, "item = 'i0' OR rating = 5"]),
    weight=st.sampled_from([None, WEIGHT]),
    keep=st.sampled_from([None, 0.4]),
    split=st.sampled_from(["time", "leave-last"]),
    context_limit=st.integers(1, 4),
    fewest=st.integers(1, 3),
    files=st.integers(1, 3),
)
def test_requests_equal_those_of_a_plain_python_oracle(
    tmp_path, events, by, history, context_only, weight, keep, split, context_limit, fewest, files
):
    if by == "none":
        history = context_only = keep = None
    users, (joined, clicks, left_out) = interactions_of(events, by, history, context_only)
    users = {user: rows for user, rows in users.items() if len(rows) >= fewest}
    expected, targets = expected_sequences(users, by, split, context_limit, keep)
    options = {"split": split, "context_limit": context_limit, "min_interactions": fewest}
    options |= {"history": history, "context_only": context_only, "by": by, "files": files}
    options |= {"weight": weight, "keep": keep}
    if not all(targets[split] for split in SPLITS):
        with pytest.raises(UserError, match=r"is empty|at least \d interactions|expected targets"):
            build(tmp_path, events, force=True, **options)
        return
    summary = build(tmp_path, events, force=True, **options)
    dataset = Dataset.open(str(tmp_path / "out"))
    names = dataset.items_table()["source_id"].to_pylist()
    columns = ["user_id", "item_ids", "labels", "timestamps", "target_start"]
    columns += ["is_history"] * bool(history) + ["is_target"] * bool(context_only)
    columns += ["weight"] * bool(weight) + ["is_kept"] * bool(keep)
    assert dataset.sequence_columns == columns
    for split in SPLITS:
        found = {}
        for batch in iter_sequences(dataset, split):
            for row in batch.rows.to_pylist():
                row["item_ids"] = [names[item] for item in row["item_ids"]]
                found[row.pop("user_id")] = row
        wanted = {
            user: {name: row[name] for name in columns if name in row}
            for user, row in expected[split].items()
        }
        assert found == wanted
    if keep:
        counts = summary.manifest.counts.splits
        assert {split: counts[split].targets for split in SPLITS} == targets
        return
    without = check_statistics(summary.manifest, users, by)
    printed = str(summary)
    assert f"targets without history before their request: {without:,} of" in printed
    said = re.search(r"rows joined .*: (\d+); (\d+) where .*, (\d+) repeats", printed)
    counts = tuple(map(int, said.groups())) if said else (0, 0, 0)
    assert counts == (joined, clicks, joined - clicks)
    said = re.search(r"neither history nor targets: (\d+)", printed)
    assert (int(said[1]) if said else 0) == left_out


# --- what is said ---------------------------------------------------------------------------


def slates(users=20, requests=6, shown=4, seed=0):
    """Each request shows items within three seconds; a click has a row of its own, later."""
    rng = random.Random(seed)
    events = []
    for user in range(users):
        for request in range(requests):
            name, begin = f"r{user}-{request}", 1000 * (user * 7 + request * 500)
            items = rng.sample(range(12), shown)
            for place, item in enumerate(items):
                events.append((f"u{user}", f"i{item}", begin + 700 * place, 1, name))
            events.append((f"u{user}", f"i{items[0]}", begin + 60_000, 5, name))
    rng.shuffle(events)
    return events


def test_a_log_of_impressions_and_clicks_becomes_requests_with_one_click(tmp_path):
    events = slates()
    summary = build(tmp_path, [*events, events[0]], by="column", history="label = 1")
    found = summary.manifest.statistics.requests
    assert found.requests == 120
    assert found.targets_per_request.histogram == {4: 120}
    assert found.clicks_per_request.histogram == {1: 120}
    assert found.history_targets == 120
    assert found.targets_without_history == 20 * 4
    printed = str(summary)
    assert "targets per request: min 4, median 4, mean 4.0, 90 % at most 4, max 4" in printed
    assert "clicks per request: mean 1.00, 90 % at most 1, max 1; 0.0% of the req" in printed
    assert "targets that are history for later ones: 25.0%" in printed
    assert summary.manifest.requests == RequestRule(
        by="column", column="request", history="label = 1"
    )
    (fields,) = [json.loads((tmp_path / "out" / MANIFEST).read_text())]
    assert fields["format_version"] == 2
    assert fields["schema"]["sequences"]["is_history"].startswith("list<")


def test_requests_of_one_second_are_one_and_counted(tmp_path):
    events = [(f"u{n % 9}", f"i{n % 5}", 5_000 * n, 4, f"r{n}") for n in range(80)]
    summary = build(tmp_path, events, by="column")
    assert "same second" not in str(summary)
    twice = [*events, *((user, "i7", ms + 900, 1, r + "b") for user, _, ms, _, r in events[:7])]
    summary = build(tmp_path, twice, by="column", force=True)
    assert "same second as another of their user, and are one with it: 7" in str(summary)


def test_shared_times_are_warned_of_where_requests_are_off(tmp_path):
    events = [(f"u{n % 9}", f"i{n % 5}", 5_000 * n, n % 5 + 1, "r") for n in range(90)]
    assert "second of another" not in str(build(tmp_path, events, by="none", out="alone"))
    shared = [*events, *((user, "i7", ms + 1, 1, r) for user, _, ms, _, r in events[:4])]
    printed = str(build(tmp_path, shared, by="none", out="few"))
    assert "note: 8 interactions (8.5%) have the second of another of their user" in printed
    shared = [*events, *((user, "i7", ms + 1, 1, r) for user, _, ms, _, r in events[:6])]
    printed = str(build(tmp_path, shared, by="none", out="many"))
    assert "WARNING: 12 interactions (12.5%) have the second of another" in printed
    assert "second of another" not in str(build(tmp_path, shared, by="time", out="time"))


def test_leave_last_of_users_with_one_interaction_has_test_targets_alone(tmp_path):
    events = [("one", "i0", 0, 5, "r"), *(("two", f"i{n}", 9_000 * n, 4, "r") for n in range(3))]
    for by in ("none", "time"):
        build(tmp_path, events, by=by, split="leave-last", min_interactions=1, force=True)
        dataset = Dataset.open(str(tmp_path / "out"))
        rows = {
            split: [row for b in iter_sequences(dataset, split) for row in b.rows.to_pylist()]
            for split in SPLITS
        }
        assert [row["user_id"] for split in SPLITS for row in rows[split]].count("one") == 1
        (row,) = (row for row in rows["test"] if row["user_id"] == "one")
        assert (row["target_start"], len(row["item_ids"])) == (0, 1)


def test_a_column_called_label_comes_before_the_computed_label(tmp_path):
    given = write_events(tmp_path, slates())
    table = pq.read_table(given["paths"][0])
    label = pa.array([n % 3 == 0 for n in range(len(table))])
    pq.write_table(table.append_column("label", label), given["paths"][0])
    requests = RequestOptions(request_col="request", history="label")
    build_dataset(
        partial(read_events, **given, requests=requests), str(tmp_path / "o"), BuildOptions()
    )
    found = Dataset.open(str(tmp_path / "o")).manifest.statistics.requests
    assert found.history_targets > 120


def test_movielens_keeps_each_rating_alone_and_says_how_many_share_a_time(tmp_path):
    folder = tmp_path / "ml"
    folder.mkdir()
    lines = [f"{n % 4 + 1}::{n % 3 + 1}::{n % 5 + 1}::{START + n // 8}" for n in range(80)]
    (folder / "ratings.dat").write_text("\n".join(lines) + "\n")
    (folder / "movies.dat").write_text("".join(f"{n}::M{n} (1999)::Drama\n" for n in (1, 2, 3)))
    read = partial(read_movielens, path=str(folder))
    alone = build_dataset(read, str(tmp_path / "alone"), BuildOptions())
    assert alone.manifest.requests is None
    assert "WARNING: 80 interactions (100.0%) have the second of another" in str(alone)
    out = tmp_path / "time"
    assert main(["prepare", "movielens", str(folder), "--requests", "time", "--out", str(out)]) == 0
    assert Dataset.open(str(out)).manifest.requests == RequestRule(by="time")


# --- what is refused ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"history": "rating"}, "expected --history to be a condition; found BIGINT. Use a comp"),
        (
            {"history": "raiting = 1"},
            r"--history 'raiting = 1': no column 'raiting' among .* label",
        ),
        ({"context_only": "rating >"}, r"--context-only 'rating >': DuckDB can't read it"),
        ({"history": "rating = '4.0'"}, r"--history .*: it compares text with a number"),
        ({"history": "max(rating) > 1"}, r"--history .*max\(\) is over many interactions"),
        (
            {"history": "nullif(rating, 5) > 3"},
            r"expected true or false of --history .* in every interaction; \d+ have none \(null\). "
            r"The first is row \d+ of",
        ),
        ({"context_only": "rating > 0"}, "--context-only 'rating > 0' holds for all interactions"),
        ({"request_col": "requests"}, r"--request-col requests: expected a column of the events"),
    ],
)
def test_what_can_not_be_read_is_refused(tmp_path, options, message):
    read = partial(
        read_events, **write_events(tmp_path, slates()), requests=RequestOptions(**options)
    )
    with pytest.raises(UserError, match=message):
        build_dataset(read, str(tmp_path / "out"), BuildOptions())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": "rating - 2"}, r"--weight 'rating - 2': expected a number that is 0 or"),
        ({"weight": "nullif(rating, 5)"}, r"expected a number of --weight .* in every int"),
        ({"weight": "item"}, r"--weight 'item': expected a number; found VARCHAR"),
        ({"by": "none", "keep": 0.1}, "--keep-negatives 0.1: expected requests with it"),
    ],
)
def test_weights_and_sampling_that_can_not_be_are_refused(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        build(tmp_path, slates(), **options)
    with pytest.raises(UserError, match="--keep-negatives 1: expected a share above 0 and below"):
        EventOptions((), "u", "i", "t", "label", (), keep_negatives=1.0)


def test_a_row_without_request_is_refused_with_its_place(tmp_path):
    events = slates()
    events[30] = (*events[30][:4], None)
    message = r"expected a request in request in every interaction; 1 have none .*row 31 of"
    with pytest.raises(UserError, match=message):
        build(tmp_path, events, by="column")


def test_a_request_has_one_split(tmp_path):
    given = write_events(tmp_path, sorted(slates(), key=lambda event: event[2]))
    table = pq.read_table(given["paths"][0])
    requests = table["request"].to_pylist()
    split = [SPLITS[max(0, int(name.split("-")[1]) - 3)] for name in requests]
    given["columns"] = replace(COLUMNS, split="split")
    options = RequestOptions(request_col="request", history="label = 1")
    read = partial(read_events, **given, requests=options)
    path, out = given["paths"][0], str(tmp_path / "out")
    pq.write_table(table.append_column("split", [split]), path)
    manifest = build_dataset(read, out, BuildOptions()).manifest
    assert manifest.counts.splits["test"].targets == 20 * 4
    click = next(n for n in range(len(split)) if requests[n] == "r3-3" and split[n] == "train")
    split[click] = "valid"
    pq.write_table(table.append_column("split", [split]), path)
    with pytest.raises(UserError, match=r"user u3 has train and valid in the one at 2023-11-14 "):
        build_dataset(read, out, BuildOptions(force=True))


def test_options_that_contradict_each_other_are_refused():
    with pytest.raises(UserError, match="--requests time --request-col r: expected one of them"):
        RequestOptions(requests="time", request_col="r")
    with pytest.raises(UserError, match="--history: expected requests with it; found --requests n"):
        RequestOptions(requests="none", history="label = 1")


# --- appended -------------------------------------------------------------------------------


def targets(uri):
    """Every target with the history before its request."""
    dataset = Dataset.open(str(uri))
    limit = dataset.manifest.context_limit
    names = dataset.items_table()["source_id"].to_pylist()
    found = []
    for split in SPLITS:
        for batch in iter_sequences(dataset, split):
            for row in batch.rows.to_pylist():
                count = len(row["item_ids"])
                flags = {n: row.get(n) or [True] * count for n in ("is_history", "is_target")}
                steps = list(
                    zip(
                        [names[item] for item in row["item_ids"]],
                        *(row[name] for name in ("timestamps", "labels")),
                        *flags.values(),
                        strict=True,
                    )
                )
                for step in steps[row["target_start"] :]:
                    before = [other for other in steps if other[3] and other[1] < step[1]]
                    found.append((row["user_id"], step, tuple(before[-limit:])))
    return Counter(found)


@pytest.mark.parametrize("append_to", ["roll", "train"])
@pytest.mark.parametrize(
    ("by", "history", "context_only"),
    [
        ("time", None, None),
        ("time", "label = 1", None),
        ("column", "rating > 2", "item = 'i0' OR rating = 5"),
        ("none", None, None),
    ],
)
def test_appended_days_give_the_targets_and_contexts_of_all_at_once(
    tmp_path, append_to, by, history, context_only
):
    rng = random.Random(1)
    events = []
    for request in range(300):
        user = f"u{rng.randrange(6)}"
        for _ in range(rng.randrange(1, 5)):
            item, rating = f"i{rng.randrange(12)}", rng.randrange(1, 6)
            events.append((user, item, 1000 * request, rating, f"r{request}"))
    whole = {"by": by, "history": history, "context_only": context_only, "context_limit": 5}
    build(tmp_path, events, out="whole", **whole)
    bounds = [200_000, 240_000, 270_000, 300_000]
    build(tmp_path, [e for e in events if e[2] < bounds[0]], **whole)
    for begin, end in pairwise(bounds):
        day = [e for e in events if begin <= e[2] < end]
        # Without options an append takes --requests as the data set has it.
        requests = RequestOptions(
            request_col="request" if by == "column" else None,
            history=history,
            context_only=context_only,
        )
        read = partial(read_events, **write_events(tmp_path, day), requests=requests)
        summary = append_to_dataset(read, str(tmp_path / "out"), append_to, BuildOptions())
    assert targets(tmp_path / "out") == targets(tmp_path / "whole")
    one, other = (Dataset.open(str(tmp_path / name)).manifest for name in ("out", "whole"))
    assert one.counts.interactions == other.counts.interactions
    assert one.label_rate == pytest.approx(other.label_rate)
    if by == "none":
        assert one.statistics.requests is other.statistics.requests is None
    else:
        found, wanted = (found.statistics.requests.model_dump() for found in (one, other))
        for name in ("targets_per_request", "clicks_per_request"):
            assert found[name].pop("mean") == pytest.approx(wanted[name].pop("mean"))
        assert found == wanted
    assert sum(record.interactions for record in one.appends) < one.counts.interactions
    assert summary.manifest == one


def training_targets(uri, split):
    dataset = Dataset.open(str(uri))
    tokens = item_tokens(np.random.default_rng(0), items=12)
    found, place = Counter(), 0
    for part in dataset.parts(split):
        with dataset.open_part(part) as file:
            row_groups = range(file.num_row_groups)
        for number in row_groups:
            block = read_block(dataset, RowGroup(part.path, number, place, 0), tokens, True)
            for at in SampleSettings(5, 3, 0).targets(block):
                found[
                    int(block.item_ids[at]), int(block.timestamps[at]), int(block.labels[at])
                ] += 1
    return found


@pytest.mark.parametrize("history", [None, "label = 1"])
def test_days_that_roll_into_train_are_sampled_as_if_prepared_at_once(tmp_path, history):
    rng = random.Random(5)
    events = [
        (f"u{rng.randrange(6)}", f"i{rng.randrange(12)}", 1000 * n, rng.randrange(1, 6), f"r{n}")
        for n in range(400)
    ]
    sampled = {"history": history, "keep": 0.3, "weight": WEIGHT}
    bounds = [300_000, 340_000, 370_000, 400_000]
    days = [[e for e in events if begin <= e[2] < end] for begin, end in pairwise([0, *bounds])]
    build(tmp_path, days[0], **sampled)
    for day in days[1:]:
        requests = request_options("time", history)
        read = partial(
            read_events,
            **write_events(tmp_path, day),
            requests=requests,
            weight=WEIGHT,
            keep_negatives=0.3,
        )
        append_to_dataset(read, str(tmp_path / "out"), "roll", BuildOptions())
    rolled = Dataset.open(str(tmp_path / "out")).manifest
    times = tuple(START + bound // 1000 for bound in bounds[1:3])
    assert tuple(rolled.split.boundaries.values()) == times
    whole = build(tmp_path, events, out="whole", split_times=times, **sampled).manifest
    for split in SPLITS:
        one, other = (training_targets(tmp_path / name, split) for name in ("out", "whole"))
        assert one == other
        for name in ("targets", "clicks", "kept_targets"):
            assert getattr(rolled.counts.splits[split], name) == getattr(
                whole.counts.splits[split], name
            )
    assert one.total() == whole.counts.splits["test"].kept_targets
    assert whole.counts.splits["test"].targets > one.total()


@pytest.mark.parametrize(
    ("prepared", "appended", "expected"),
    [
        ({"by": "time"}, {"by": "none"}, "found --requests none. Give --requests time."),
        ({"by": "none"}, {"by": "time"}, "found --requests time. Give --requests none."),
        (
            {"by": "column", "history": "label = 1"},
            {"by": "time"},
            "found --requests time. Give --request-col request --history 'label = 1'.",
        ),
    ],
)
def test_another_rule_for_requests_is_refused_by_an_append(tmp_path, prepared, appended, expected):
    events = slates()
    build(tmp_path, events, **prepared)
    later = [(user, item, ms + 10**8, rating, f"{r}b") for user, item, ms, rating, r in events]
    read = partial(
        read_events, **write_events(tmp_path, later), requests=request_options(**appended)
    )
    before = (tmp_path / "out" / MANIFEST).read_bytes()
    with pytest.raises(UserError, match=re.escape(expected)):
        append_to_dataset(read, str(tmp_path / "out"), "roll", BuildOptions())
    assert (tmp_path / "out" / MANIFEST).read_bytes() == before


def test_an_append_to_format_version_1_keeps_its_meaning(tmp_path):
    events = slates()
    build(tmp_path, events, by="none")
    path = tmp_path / "out" / MANIFEST
    fields = json.loads(path.read_text()) | {"format_version": 1}
    del fields["requests"], fields["statistics"]["requests"]
    path.write_text(json.dumps(fields))
    later = [(user, item, ms + 10**8, rating, r) for user, item, ms, rating, r in events]
    read = partial(read_events, **write_events(tmp_path, later))
    append_to_dataset(read, str(tmp_path / "out"), "roll", BuildOptions())
    build(tmp_path, events + later, by="none", out="whole")
    found = Dataset.open(str(tmp_path / "out"))
    assert not found.has_requests
    assert found.manifest.format_version == 1
    assert found.manifest.counts.interactions == 2 * len(events)


def test_the_commands_take_requests(tmp_path, capsys):
    given = write_events(tmp_path, slates())
    command = ["prepare", "events", *given["paths"], "--items", *given["items"], "--user-col"]
    command += ["user", "--item-col", "item", "--time-col", "time", "--label", LABEL]
    command += ["--text-cols", "title", "--out", str(tmp_path / "out")]
    assert main([*command, "--request-col", "request", "--history", "label = 1"]) == 0
    assert "rows joined with another of the same user, item and request: 120; 120 where" in (
        capsys.readouterr().out
    )
    assert main([*command, "--requests", "none", "--context-only", "rating = 1"]) == 2
    assert "--context-only: expected requests with it" in capsys.readouterr().err
