"""Splits that a column of the events says."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from functools import partial

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dti_dist.cli import main
from dti_dist.data.dataset import SPLITS, Dataset
from dti_dist.data.prepare.append import append_to_dataset
from dti_dist.data.prepare.build import BuildOptions, build_dataset
from dti_dist.data.prepare.events import EventColumns, read_events
from dti_dist.data.stream import PackStream, Share, batches
from dti_dist.errors import UserError
from dti_dist.options import RequestOptions
from tests.data.shards import all_targets, stream_plan, tokenise
from tests.data.test_prepare_append import check_counts, content, targets
from tests.data.test_prepare_events import START, sequences, write_events, write_items

# Interactions of one second may be in two splits.
ALONE = RequestOptions(requests="none")
COLUMNS = EventColumns("user", "item", "time", item_key="item", texts=("title",), split="fold")
LIMIT = 5


def in_time_order(events):
    """Each user's (event, split); equal times keep the order of the input."""
    histories = {}
    for event, split in sorted(events, key=lambda pair: pair[0][2]):
        histories.setdefault(event[0], []).append((event, split))
    return histories


def with_splits(events, seed=0):
    """(event, split): each user's first interactions are train, then valid, then test; some users
    lack a split."""
    rng = random.Random(seed)
    numbered = in_time_order([(event, n) for n, event in enumerate(events)])
    split_of = {}
    for history in numbered.values():
        ends = sorted(rng.randint(0, len(history)) for _ in range(2))
        for place, (_, number) in enumerate(history):
            split_of[number] = SPLITS[sum(place >= end for end in ends)]
    return [(event, split_of[n]) for n, event in enumerate(events)]


def random_events(users=30, length=12, seconds=40, seed=0):
    """(user, item, time, rating) with many equal times, in a random order."""
    rng = random.Random(seed)
    return [
        (f"u{rng.randrange(users)}", f"i{rng.randrange(20)}", START + rng.randrange(seconds), n % 5)
        for n in range(users * length)
    ]


def reader(tmp_path, events, columns=COLUMNS, name="events.parquet"):
    path = write_events(
        tmp_path / name, [event for event, _ in events], fold=[split for _, split in events]
    )
    items = write_items(tmp_path / "items.parquet")
    label = "rating >= 4"
    read = partial(read_events, paths=[path], items=[items], columns=columns, label=label)
    return partial(read, requests=ALONE)


def build(tmp_path, events, out="out", **options):
    options = {"context_limit": LIMIT, "force": True, **options}
    return build_dataset(reader(tmp_path, events), str(tmp_path / out), BuildOptions(**options))


def append(tmp_path, events, out="out", append_to=None, columns=COLUMNS):
    read = reader(tmp_path, events, columns, "new.parquet")
    return append_to_dataset(read, str(tmp_path / out), append_to, BuildOptions())


# --- what is in each split ------------------------------------------------------------------


def expected_sequences(events, context_limit):
    """In plain Python: {split: {user: (items, labels, timestamps, target_start)}}, or None where
    a split is empty or a user's splits are not in order."""
    found = {split: {} for split in SPLITS}
    for user, history in in_time_order(events).items():
        if len(history) < 2:
            continue
        splits = [split for _, split in history]
        if splits != sorted(splits, key=SPLITS.index):
            return None
        for split in set(splits):
            begin = splits.index(split)
            end = begin + splits.count(split)
            first = max(0, begin - context_limit)
            kept = [event for event, _ in history[first:end]]
            _, items, times, ratings = (list(column) for column in zip(*kept, strict=True))
            labels = [int(rating >= 4) for rating in ratings]
            found[split][user] = (items, labels, times, begin - first)
    return found if all(found.values()) else None


random_tables = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "c", "dora", "é"]),
        st.sampled_from(["i0", "i1", "i2"]),
        st.integers(START, START + 15),
        st.integers(1, 5),
    ),
    min_size=6,
    max_size=60,
)


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    events=random_tables,
    seed=st.integers(0, 1000),
    exchanged=st.sampled_from([0, 0, 0, 1]),
    context_limit=st.integers(1, 5),
    shard=st.integers(1, 20),
)
def test_sequences_equal_those_of_a_plain_python_oracle(
    tmp_path, events, seed, exchanged, context_limit, shard
):
    events = with_splits(events, seed)
    rng = random.Random(seed)
    for _ in range(exchanged):
        one, other = rng.sample(range(len(events)), 2)
        (first, split), (second, another) = events[one], events[other]
        events[one], events[other] = (first, another), (second, split)
    expected = expected_sequences(events, context_limit)
    options = {"context_limit": context_limit, "shard_interactions": shard}
    if expected is None:
        with pytest.raises(UserError, match=r"--split-column fold: expected|at least 2 interact"):
            build(tmp_path, events, **options)
        return
    summary = build(tmp_path, events, **options)
    for split in SPLITS:
        assert {
            row["user_id"]: (
                *(row["item_ids"], row["labels"], row["timestamps"]),
                row["target_start"],
            )
            for row in sequences(tmp_path / "out", split)
        } == expected[split]
    assert summary.manifest.split.model_dump(exclude_none=True) == {
        "rule": "column",
        "column": "fold",
    }


def test_counts_and_statistics_are_those_of_the_files(tmp_path):
    events = with_splits(random_events())
    summary = build(tmp_path, events)
    check_counts(tmp_path / "out")
    counts = summary.manifest.counts.splits
    said = Counter(split for _, split in events)
    assert {split: counts[split].targets for split in SPLITS} == said
    assert summary.manifest.statistics.interactions_per_user.mean == pytest.approx(
        len(events) / summary.manifest.counts.users
    )


def test_streams_give_each_target_once_in_the_split_that_the_column_says(tmp_path):
    events = with_splits(random_events())
    build(tmp_path, events, shard_interactions=100, row_group_interactions=40)
    dataset = Dataset.open(str(tmp_path / "out"))
    names = dataset.items_table()["source_id"].to_pylist()
    tokens = tokenise(dataset, tmp_path / "cache")
    found = Counter()
    for split in SPLITS:
        plan = stream_plan(dataset, tokens, tmp_path / "cache", split=split)
        streamed = []
        for batch in batches(PackStream(plan, Share(4, 4)), 0):
            used = batch.used > 0
            rows, positions = batch.target_row[used], batch.target_position[used]
            streamed += zip(rows.tolist(), positions.tolist(), strict=True)
        assert sorted(streamed) == sorted(all_targets(dataset, split))
        rows = sequences(tmp_path / "out", split)
        for row, position in streamed:
            item, time = names.index(rows[row]["item_ids"][position]), rows[row]["timestamps"]
            found[rows[row]["user_id"], names[item], time[position], split] += 1
    # A user's first interaction has no context, and is no target.
    expected = Counter(
        (user, item, time, split)
        for history in in_time_order(events).values()
        for (user, item, time, _), split in history[1:]
    )
    assert found == expected


def test_equal_times_are_taken_in_the_order_of_the_input(tmp_path):
    rest = with_splits(random_events(users=10))
    splits = ["train", "train", "valid", "test"]
    tied = [(("tied", f"i{n}", START, 5), split) for n, split in enumerate(splits)]
    build(tmp_path, [*tied, *rest])
    (row,) = [r for r in sequences(tmp_path / "out", "test") if r["user_id"] == "tied"]
    assert (row["item_ids"], row["target_start"]) == (["i0", "i1", "i2", "i3"], 3)
    with pytest.raises(UserError, match=r"1 users have another.*Equal times keep the order of the"):
        build(tmp_path, [*tied[2:], *tied[:2], *rest])


def test_any_text_format_may_say_the_splits(tmp_path):
    events = with_splits(random_events(users=10))
    files = build(tmp_path, events).manifest.files
    rows = pq.read_table(tmp_path / "events.parquet")
    encoded = rows.set_column(4, "fold", rows["fold"].dictionary_encode())
    pq.write_table(encoded, tmp_path / "encoded.parquet")
    csv = [
        "user,item,time,rating,fold",
        *(",".join(map(str, r.values())) for r in rows.to_pylist()),
    ]
    (tmp_path / "events.csv").write_text("\n".join(csv))
    lines = "".join(json.dumps(row) + "\n" for row in rows.to_pylist())
    (tmp_path / "events.jsonl").write_text(lines)
    items = [str(tmp_path / "items.parquet")]
    for name in ("encoded.parquet", "events.csv", "events.jsonl"):
        read = partial(
            read_events,
            paths=[str(tmp_path / name)],
            items=items,
            columns=COLUMNS,
            label="rating >= 4",
            requests=ALONE,
        )
        options = BuildOptions(context_limit=LIMIT, force=True)
        assert build_dataset(read, str(tmp_path / "other"), options).manifest.files == files


# --- what is refused ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("Train", "'Train'"),
        ("valid ", "'valid '"),
        ("validation", "'validation'"),
        ("", "''"),
        (None, "null"),
    ],
)
def test_other_words_are_refused_with_their_row(tmp_path, value, found):
    events = with_splits(random_events())
    events[6], events[9] = (events[6][0], value), (events[9][0], "dev")
    user, item = events[6][0][:2]
    with pytest.raises(UserError) as refused:
        build(tmp_path, events)
    assert (
        "--split-column fold: expected train, valid or test, in these letters, in every "
        f"interaction; 2 have something else. The first is {found} in row 7 of "
        f"{tmp_path}/events.parquet (user {user}, item {item}). Rename the values"
    ) in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_numbers_are_no_splits(tmp_path):
    events = [(event, SPLITS.index(split)) for event, split in with_splits(random_events())]
    with pytest.raises(UserError, match=r"360 have something else. The first is '[012]' in row 1"):
        build(tmp_path, events)


@pytest.mark.parametrize(
    ("splits", "before", "after"),
    [
        (("train", "test", "valid"), "test at 2023-11-14 22:13:30", "valid at 2023-11-14 22:13:40"),
        (
            ("valid", "train", "test"),
            "valid at 2023-11-14 22:13:20",
            "train at 2023-11-14 22:13:30",
        ),
        (("train", "test", "train"), "test at 2023-11-14 22:13:30", "train at 2023-11-14 22:13:40"),
    ],
)
def test_splits_in_another_order_are_refused_with_user_times_and_values(
    tmp_path, splits, before, after
):
    wrong = [(("eve", "i1", START + 10 * n, 5), split) for n, split in enumerate(splits)]
    other = [(("adam", "i1", START + n, 5), split) for n, split in enumerate(["test", "train"])]
    with pytest.raises(UserError) as refused:
        build(tmp_path, [*with_splits(random_events()), *wrong, *other])
    said = str(refused.value)
    assert "a target may see only what came before it; 2 users have another order" in said
    place = r" \(row \d+ of \S+events\.parquet\)"
    assert re.search(f"User eve has {before}{place} before {after}{place}. Correct the col", said)


def test_users_left_out_need_no_order(tmp_path):
    events = with_splits(random_events())
    wrong = [(("eve", "i1", START, 5), "test"), (("eve", "i2", START + 1, 5), "train")]
    summary = build(tmp_path, [*events, *wrong], min_interactions=3)
    assert summary.manifest.counts.interactions_left_out == 2


def test_an_empty_split_is_refused(tmp_path):
    events = [(event, "train") for event in random_events()]
    with pytest.raises(UserError, match="in every split; valid, test has none"):
        build(tmp_path, events)


def command(tmp_path, *extra, name="events.parquet"):
    arguments = ["prepare", "events", str(tmp_path / name), "--items"]
    arguments += [str(tmp_path / "items.parquet"), "--user-col", "user", "--item-col", "item"]
    arguments += ["--time-col", "time", "--label", "rating >= 4", "--text-cols", "title"]
    arguments += ["--requests", "none"]
    return main([*arguments, "--out", str(tmp_path / "out"), *extra])


@pytest.mark.parametrize(
    "other", [("--split", "time"), ("--fractions", "0.8,0.1,0.1"), ("--split-times", "5,9")]
)
def test_the_column_goes_with_no_other_way_to_split(tmp_path, capsys, other):
    reader(tmp_path, with_splits(random_events()))
    assert command(tmp_path, "--split-column", "fold", *other) == 2
    assert (
        f"--split-column {other[0]}: expected the column alone to say which split; found {other[0]}"
    ) in capsys.readouterr().err


def test_the_command_splits_by_the_column_and_appends(tmp_path, capsys):
    events = with_splits(random_events())
    reader(tmp_path, events)
    assert command(tmp_path, "--split-column", "flod") == 2
    assert "--split-column flod: expected a column of the events" in capsys.readouterr().err
    assert command(tmp_path, "--split-column", "fold") == 0
    new = [(("new", f"i{n}", START + 100 + n, 5), split) for n, split in enumerate(SPLITS)]
    reader(tmp_path, new, name="new.parquet")
    by_column = ("--split-column", "fold", "--append")
    assert command(tmp_path, *by_column, "--append-to", "test", name="new.parquet") == 2
    assert "was split by the column fold, which also says where" in capsys.readouterr().err
    assert command(tmp_path, *by_column, name="new.parquet") == 0
    assert (
        "the new interactions joined the splits that the column says: train 1, valid 1, test 1"
    ) in capsys.readouterr().out


# --- appending ------------------------------------------------------------------------------


def parts(events, count=3):
    """The same in stretches of time; a stretch with equal times at its end is not cut there."""
    events = sorted(events, key=lambda pair: pair[0][2])
    times = sorted({event[2] for event, _ in events})
    ends = [times[len(times) * n // count] for n in range(1, count)]
    found = [[] for _ in range(count)]
    for pair in events:
        found[sum(pair[0][2] >= end for end in ends)].append(pair)
    return found


@pytest.mark.parametrize("seed", range(3))
def test_appended_parts_give_the_targets_and_contexts_of_all_at_once(tmp_path, seed):
    first, *others = parts(with_splits(random_events(users=60, seed=seed), seed))
    # An interaction that prepare left out, for it was its user's only one, is not remembered.
    of_user = Counter(event[0] for event, _ in first)
    first, *others = ([p for p in part if of_user[p[0][0]] != 1] for part in (first, *others))
    build(tmp_path, first)
    for part in others:
        last = append(tmp_path, part).manifest
    whole = build(tmp_path, [pair for part in (first, *others) for pair in part], "whole").manifest
    for split in SPLITS:
        assert targets(tmp_path / "out", [split]) == targets(tmp_path / "whole", [split])
    check_counts(tmp_path / "out")
    assert last.statistics == whole.statistics
    assert last.split == whole.split
    assert [(record.append_to, record.interactions) for record in last.appends] == [
        ("column", len(part)) for part in others
    ]


@pytest.mark.parametrize("later", ["train", "valid"])
def test_what_is_appended_may_not_go_back_to_an_earlier_split(tmp_path, later):
    build(
        tmp_path,
        [
            *with_splits(random_events()),
            *(((("eve"), "i1", START + n, 5), "test") for n in range(2)),
        ],
    )
    before = content(tmp_path / "out")
    with pytest.raises(UserError) as refused:
        append(tmp_path, [(("eve", "i2", START + 100, 5), later)])
    assert (
        "User eve has test at 2023-11-14 22:13:21 (the data set) before "
        f"{later} at 2023-11-14 22:15:00 (row 1 of {tmp_path}/new.parquet)"
    ) in str(refused.value)
    assert content(tmp_path / "out") == before


def test_appending_needs_the_column_where_it_split_the_data_set_and_only_there(tmp_path):
    events = with_splits(random_events())
    build(tmp_path, events)
    new = [(("u1", "i1", START + 100, 5), "test")]
    by_time = EventColumns("user", "item", "time", item_key="item", texts=("title",))
    with pytest.raises(
        UserError, match=r"expected --split-column, .* Add --split-column fold: new"
    ):
        append(tmp_path, new, columns=by_time)
    with pytest.raises(UserError, match="--append-to roll: expected a data set split by time"):
        append(tmp_path, new, append_to="roll")
    by_time = reader(tmp_path, events, by_time)
    build_dataset(by_time, str(tmp_path / "time"), BuildOptions())
    with pytest.raises(UserError, match=r"--split-column fold: .* was split by time. Leave it out"):
        append(tmp_path, new, out="time")
    with pytest.raises(UserError, match="expected train, valid or test"):
        append(tmp_path, [(new[0][0], "Test")])
    with pytest.raises(UserError, match="expected interactions newer than the data set's last"):
        append(tmp_path, [(("u1", "i1", START, 5), "test")])
