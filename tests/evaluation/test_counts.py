"""Counts before a target's request, against plain Python over the raw log."""

from collections import defaultdict
from itertools import chain, pairwise

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from dti_dist.data.dataset import SPLITS, Dataset, iter_sequences
from dti_dist.data.prepare.build import BuildOptions, build_dataset
from dti_dist.data.samples import SampleSettings
from dti_dist.evaluation.counts import COLUMNS, count_before
from dti_dist.options import RequestOptions
from dti_dist.sql import open_workspace
from tests.data.test_prepare_append import append, at_different_times, reader
from tests.data.test_prepare_events import random_events
from tests.data.test_prepare_requests import (
    START,
    build,
    expected_sequences,
    interactions_of,
    requests_of,
)

CONTEXT_LIMIT = 4
logs = st.lists(
    st.tuples(
        st.sampled_from(["a", "b"]),
        st.sampled_from(["i0", "i1", "i2"]),
        st.integers(0, 40).map(lambda quarter: quarter * 250),
        st.integers(1, 5),
        st.sampled_from(["r0", "r1", "r2", "r3", "r4", "r5"]),
    ),
    min_size=15,
    max_size=40,
)
quietly = settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])


def counts_of(uri, split, n=3, min_context=1):
    """{(split, user, row, position): [label, *COLUMNS]}"""
    with open_workspace() as workspace:
        dataset = Dataset.open(str(uri))
        whole = count_before(
            workspace.connection, dataset, split, SampleSettings(n, 50, min_context)
        )
        assert whole
        query = f"SELECT split, user_id, row, position, label, {', '.join(COLUMNS)} FROM counts"
        found = workspace.connection.sql(query).fetchall()
    assert len({row[:4] for row in found}) == len(found)
    return {(split, user, row, position): rest for split, user, row, position, *rest in found}


def own_interactions(uri, split):
    """{(row, position): (user, item, time)} of what is not there as context alone."""
    dataset = Dataset.open(str(uri))
    names = dataset.items_table()["source_id"].to_pylist()
    rows = chain.from_iterable(batch.rows.to_pylist() for batch in iter_sequences(dataset, split))
    return {
        (number, at): (row["user_id"], names[row["item_ids"][at]], row["timestamps"][at])
        for number, row in enumerate(rows)
        for at in range(row["target_start"], len(row["item_ids"]))
    }


def place(users, by, split_rule):
    """Add to each interaction the split and the position at which the data set has it; whether
    prepare takes such a log, where no split may be empty."""
    sequences, targets = expected_sequences(users, by, split_rule, CONTEXT_LIMIT)
    for user, rows in users.items():
        places = [
            (split, position)
            for split in SPLITS
            for row in [sequences[split].get(user, {"target_start": 0, "labels": []})]
            for position in range(row["target_start"], len(row["labels"]))
        ]
        for row, (split, position) in zip(rows, places, strict=True):
            row |= {"split": split, "position": position}
    return all(targets[split] for split in SPLITS)


def expected_counts(users, by, split, n, min_context):
    """The same, from each user's interactions in order, which are placed."""
    everything = list(chain(*users.values()))
    trained = [row for row in everything if row["split"] == "train"]
    labels = {row["label"] for row in trained if not row["target"]}
    of_items = defaultdict(list)
    for row in everything:
        row["counted"] = row["target"] or len(labels) == 2
        if row["counted"] and row["split"] == "train":
            of_items[row["item"]].append(row)
    found = {}
    for user, rows in users.items():
        before = []
        for request in requests_of(rows, by):
            past = [row["label"] for row in before if row["counted"]]
            enough = sum(row["history"] for row in before) >= min_context
            for row in request:
                if not (row["target"] and enough and row["split"] in ("train", split)):
                    continue
                of_item = [
                    other["label"]
                    for other in of_items[row["item"]]
                    if row["split"] != "train" or other["time"] < row["time"]
                ]
                counts = [(len(c), sum(c)) for c in (of_item, past, past[-n:])]
                key = row["split"], user, row["position"]
                found[key] = [row["label"], *chain(*counts)]
            before += request
    return found


@quietly
@given(
    events=logs,
    by=st.sampled_from(["time", "column", "none"]),
    history=st.sampled_from([None, "label = 1", "rating > 2"]),
    context_only=st.sampled_from([None, "item = 'i0' OR rating = 5", "label = 1"]),
    split_rule=st.sampled_from(["time", "leave-last"]),
    split=st.sampled_from(SPLITS),
    n=st.integers(1, 4),
    min_context=st.integers(0, 2),
)
def test_counts_are_those_of_plain_python(
    tmp_path, events, by, history, context_only, split_rule, split, n, min_context
):
    if by == "none":
        history = context_only = None
    users, _ = interactions_of(events, by, history, context_only)
    users = {user: rows for user, rows in users.items() if len(rows) >= 2}
    assume(place(users, by, split_rule))
    options = {"by": by, "history": history, "context_only": context_only, "split": split_rule}
    build(tmp_path, events, force=True, context_limit=CONTEXT_LIMIT, **options)
    expected = expected_counts(users, by, split, n, min_context)
    found = counts_of(tmp_path / "out", split, n, min_context)
    assert {(name, user, at): rest for (name, user, _, at), rest in found.items()} == expected


def flipped(events, from_second):
    """The events with other labels from a second on."""
    return [
        (user, item, ms, rating if ms // 1000 < from_second else 6 - rating + (rating == 3), name)
        for user, item, ms, rating, name in events
    ]


@quietly
@given(
    events=logs,
    by=st.sampled_from(["time", "none"]),
    history=st.sampled_from([None, "label = 1"]),
    from_second=st.integers(0, 10),
    split=st.sampled_from(SPLITS),
)
def test_labels_of_a_request_or_later_change_no_count_before_it(
    tmp_path, events, by, history, from_second, split
):
    history = history if by == "time" else None
    found = []
    for out, log in (("as-it-was", events), ("flipped", flipped(events, from_second))):
        users, _ = interactions_of(log, by, history, None)
        users = {user: rows for user, rows in users.items() if len(rows) >= 2}
        assume(place(users, by, "time"))
        build(tmp_path, log, by, history, out=out, force=True, context_limit=CONTEXT_LIMIT)
        counts = counts_of(tmp_path / out, split)
        # The order of the log parts what has one second where requests do not.
        last = START + from_second - (by == "none")
        until = {
            (row["split"], user, row["position"])
            for user, rows in users.items()
            for row in rows
            if row["time"] <= last
        }
        found.append({key: rest[1:] for key, rest in counts.items() if (*key[:2], key[3]) in until})
    assert found[0] == found[1]


def test_users_with_several_rows_in_a_split_are_one_user(tmp_path):
    """Also where train is later than what is evaluated. Rows begin with context of others."""
    requests = RequestOptions(requests="time")
    slots = defaultdict(dict)  # what a user has of four hours is a request
    for user, item, time, rating in at_different_times(random_events(users=8, length=30)):
        slots[time - time % 14_400].setdefault((user, item), rating)
    log = [[(*who, time, r) for who, r in slot.items()] for time, slot in slots.items()]
    first, *later = (list(chain(*log[a:b])) for a, b in pairwise([0, 5, 7, 9, 11, 13]))
    read, data = reader(tmp_path, first, requests=requests), tmp_path / "data"
    build_dataset(
        read, str(data), BuildOptions(context_limit=CONTEXT_LIMIT, fractions=(0.6, 0.2, 0.2))
    )
    for events, append_to in zip(later, ["train", "test", "valid", "roll"], strict=True):
        append(tmp_path, events, data, append_to, requests=requests)
    labels = {(user, item, time): int(r >= 4) for user, item, time, r in chain(*log)}
    found = {split: own_interactions(data, split) for split in SPLITS}
    users = defaultdict(set)
    for row, user in {(row, user) for (row, _), (user, *_) in found["train"].items()}:
        users[user].add(row)
    assert max(map(len, users.values())) == 4  # two as train, two rolled there
    in_train = set(found["train"].values())
    assert max(time for *_, time in in_train) > min(time for *_, time in found["valid"].values())
    for split in SPLITS:
        expected = {}
        for name in ("train", split):
            for (row, position), (user, item, time) in found[name].items():
                past = [r for (who, _, t), r in labels.items() if who == user and t < time]
                of_item = [
                    r
                    for (who, what, t), r in labels.items()
                    if what == item and (who, what, t) in in_train and (name != "train" or t < time)
                ]
                if past:
                    counts = [(len(c), sum(c)) for c in (of_item, past, past[-3:])]
                    key = name, user, row, position
                    expected[key] = [labels[user, item, time], *chain(*counts)]
        assert counts_of(data, split) == expected
