"""Published splits of MovieLens beside their rules in plain Python, and their sizes."""

from __future__ import annotations

from collections import defaultdict
from datetime import datetime, timezone
from functools import partial

import pytest

from dti_dist.data.dataset import SPLITS, Dataset, iter_sequences
from dti_dist.data.prepare.build import build_dataset
from dti_dist.data.prepare.published import BUILD, PUBLISHED, read_published
from tests.movielens import made_up_ratings, write_movielens
from tests.real_data import movielens_1m


def build(path, out, protocol):
    build_dataset(partial(read_published, path=str(path), split=protocol), str(out), BUILD)
    return Dataset.open(str(out))


def users_of(dataset):
    """By split and user: interactions of the context and the targets, both in order. An interaction
    is the movie, its label and its time."""
    movies = dataset.items_table()["source_id"].to_pylist()
    found = {split: {} for split in SPLITS}
    for split in SPLITS:
        for batch in iter_sequences(dataset, split):
            for row in batch.rows.to_pylist():
                names = [movies[item] for item in row["item_ids"]]
                all_of = list(zip(names, row["labels"], row["timestamps"], strict=True))
                start = row["target_start"]
                assert row["user_id"] not in found[split]
                found[split][row["user_id"]] = (all_of[:start], all_of[start:])
    return found


def by_user(rows):
    """Of (user, movie, label, time): by user, the others."""
    found = defaultdict(list)
    for user, *others in rows:
        found[user].append(tuple(others))
    return found


def collm(ratings):
    """Rows of each split."""
    found = {split: [] for split in SPLITS}
    for user, movie, rating, time in sorted(ratings, key=lambda row: row[3]):
        when = datetime.fromtimestamp(time, timezone.utc)
        month = (when.year - 2000) * 12 + when.month - 4
        for split, months in (("train", range(14, 24)), ("valid", range(24, 29))):
            if month in months:
                found[split].append((user, movie, int(rating >= 4), time))
        if month in range(29, 34):
            found["test"].append((user, movie, int(rating >= 4), time))
    return found


def rella(ratings):
    """Rows of each split; a user's first five are in train, and no targets."""
    seen, first, targets = defaultdict(int), [], []
    for user, movie, rating, time in sorted(ratings, key=lambda r: (r[3], int(r[0]), int(r[1]))):
        row = (user, movie, int(rating > 3), time)
        (targets if seen[user] >= 5 else first).append(row)
        seen[user] += 1
    train, valid = int(0.8 * len(targets)), int(0.1 * len(targets))
    return {
        "train": sorted(first + targets[:train], key=lambda r: (r[3], int(r[0]), int(r[1]))),
        "valid": targets[train : train + valid],
        "test": targets[train + valid :],
    }


@pytest.mark.parametrize(("protocol", "rule"), [("collm-ml1m", collm), ("rella-ml1m", rella)])
def test_splits_histories_and_their_order_are_those_of_plain_python(tmp_path, protocol, rule):
    ratings = made_up_ratings()
    write_movielens(tmp_path / "ml", ratings)
    found = users_of(build(tmp_path / "ml", tmp_path / "data", protocol))
    history = defaultdict(list)
    for split, rows in rule(ratings).items():
        assert len(rows) > 10
        expected = {user: (history[user], own) for user, own in by_user(rows).items()}
        assert found[split] == expected
        history |= {user: before + own for user, (before, own) in expected.items()}


@pytest.mark.parametrize(
    ("protocol", "rows", "users", "items", "test_users"),
    [
        ("collm-ml1m", (33_891, 10_401, 7_331), 838, 3_255, 320),
        ("rella-ml1m", (776_007, 97_000, 97_002), 6_040, 3_706, 1_193),
    ],
)
def test_movielens_1m_has_the_published_numbers_of_rows(
    tmp_path, protocol, rows, users, items, test_users
):
    dataset = build(movielens_1m(), tmp_path / "data", protocol)
    found = users_of(dataset)
    protocol_rows = PUBLISHED[protocol].interactions
    not_targets = PUBLISHED[protocol].min_context * users
    counted = {split: sum(len(own) for _, own in found[split].values()) for split in SPLITS}
    assert counted == protocol_rows
    assert (counted["train"] - not_targets, counted["valid"], counted["test"]) == rows
    assert dataset.manifest.counts.users == users
    assert len(found["test"]) == test_users
    rated = {movie for of in found.values() for _, own in of.values() for movie, *_ in own}
    assert len(rated) == items
