"""Texts of users: a profile for each row of sequences, from a table of users."""

import random
from dataclasses import replace
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dti_dist.data.dataset import SPLITS, Dataset, iter_sequences
from dti_dist.data.prepare.append import append_to_dataset
from dti_dist.data.prepare.build import BuildOptions, build_dataset
from dti_dist.data.prepare.events import read_events
from dti_dist.data.prepare.movielens import read_movielens
from dti_dist.errors import UserError
from tests.data.test_prepare_append import at_different_times, days_of
from tests.data.test_prepare_events import COLUMNS, random_events, write_events, write_items
from tests.data.test_prepare_spark import needs_java
from tests.data.test_prepare_spark import spark as spark_session

TEXTS = ("age", "größe")
WITH_USERS = replace(COLUMNS, user_key="id", user_texts=TEXTS)
OPTIONS = {"shard_interactions": 60, "row_group_interactions": 20}
spark = spark_session


def some_users(seed, users=20):
    """Texts of some of the users of `random_events`, and of some without an interaction."""
    rng = random.Random(seed)
    ids = rng.sample([f"u{n}" for n in range(40)], users)
    return {user: (rng.choice(["25", "30", None]), rng.choice(["S", "", "L"])) for user in ids}


def reader(folder, events, texts_of=None, **changed):
    paths = [write_events(folder / "events.parquet", events)]
    given = {"columns": COLUMNS}
    if texts_of is not None:
        table = {"id": list(texts_of)}
        for place, name in enumerate(TEXTS):
            table[name] = pa.array([texts[place] for texts in texts_of.values()], pa.string())
        pq.write_table(pa.table(table), folder / "users.parquet")
        given = {"columns": WITH_USERS, "users": [str(folder / "users.parquet")]}
    items = [write_items(folder / "items.parquet")]
    given |= changed
    return partial(read_events, paths=paths, items=items, label="rating >= 4", **given)


def profiles_of(uri, splits=SPLITS):
    """The texts of each row: user → those of its rows, in the order of time."""
    dataset = Dataset.open(str(uri))
    dataset.verify_checksums()
    assert dataset.manifest.user_text_columns == list(TEXTS)
    table = dataset.profiles_table().select(TEXTS).to_pylist()
    assert len({tuple(row.values()) for row in table}) == len(table), "each combination once"
    assert set(table[0].values()) == {""}
    rows = []
    for split in splits:
        for batch in iter_sequences(dataset, split):
            for row in batch.rows.to_pylist():
                texts = tuple(table[row["profile"]].values())
                rows.append((row["timestamps"][row["target_start"]], row["user_id"], texts))
    found = {}
    for _, user, texts in sorted(rows):
        found.setdefault(user, []).append(texts)
    return found


def expected(users, user):
    return tuple(text or "" for text in users.get(user, ("", "")))


def test_each_row_has_its_users_texts_and_those_without_any_are_counted(tmp_path):
    events, users = random_events(), some_users(0)
    summary = build_dataset(reader(tmp_path, events, users), str(tmp_path / "out"), BuildOptions())
    found = profiles_of(tmp_path / "out")
    assert len(found) == 30
    for user, rows in found.items():
        assert set(rows) == {expected(users, user)}
    unknown = sum(user not in users for user in found)
    assert f"users without a row of texts: {unknown} of 30" in summary.notes
    plain = build_dataset(reader(tmp_path, events), str(tmp_path / "plain"), BuildOptions())
    assert plain.manifest.user_text_columns == []
    assert not Dataset.open(str(tmp_path / "plain")).profiles_table().num_rows


def test_an_append_gives_new_texts_and_keeps_those_of_users_without_a_row(tmp_path):
    half, (day, *later) = days_of(at_different_times(random_events()))
    first, second = some_users(0), some_users(1)
    out = str(tmp_path / "out")
    build_dataset(reader(tmp_path, half, first), out, BuildOptions(**OPTIONS))
    before = Dataset.open(out).profiles_table()
    append_to_dataset(reader(tmp_path, day, second), out, "roll", BuildOptions(**OPTIONS))
    append_to_dataset(reader(tmp_path, later[0]), out, "roll", BuildOptions(**OPTIONS))
    assert Dataset.open(out).profiles_table().slice(0, len(before)) == before
    of_day, of_later = ({event[0] for event in part} for part in (day, later[0]))
    now = first | {user: texts for user, texts in second.items() if user in of_day}
    changed = 0
    for user, rows in profiles_of(out).items():
        assert rows[0] in {expected(first, user), expected(now, user)}
        if user in of_day | of_later:
            assert rows[-1] == expected(now, user)
            changed += rows[0] != rows[-1]
    assert changed


@needs_java
@pytest.mark.slow
def test_both_engines_write_the_same_profiles(spark, tmp_path):
    from dti_dist.data.prepare.spark import build_with_spark

    read = reader(tmp_path, random_events(), some_users(0))
    duck = build_dataset(read, str(tmp_path / "duck"), BuildOptions(**OPTIONS))
    on_spark = build_with_spark(read, str(tmp_path / "spark"), BuildOptions(**OPTIONS))
    assert on_spark.manifest == duck.manifest
    assert on_spark.notes == duck.notes


@pytest.mark.parametrize(
    ("users", "changed", "message"),
    [
        ({"": ("25", "S")}, {}, "expected an id for every row of the users' table; 1 rows have"),
        (None, {"users": ["x"]}, "--users: expected --user-text-cols with it"),
        (None, {"columns": WITH_USERS}, "--user-text-cols: expected --users with it"),
        (
            {"u1": ("25", "S")},
            {"columns": replace(WITH_USERS, user_texts=("agee",))},
            "--user-text-cols agee.*age",
        ),
        ({"u1": ("25", "S")}, {"columns": replace(WITH_USERS, user_key=None)}, "--user-key user"),
    ],
)
def test_a_table_of_users_that_is_none_is_refused(tmp_path, users, changed, message):
    with pytest.raises(UserError, match=message):
        build_dataset(
            reader(tmp_path, random_events(), users, **changed),
            str(tmp_path / "out"),
            BuildOptions(),
        )


def test_an_append_of_other_texts_is_refused(tmp_path):
    half, days = days_of(at_different_times(random_events()))
    out = str(tmp_path / "out")
    build_dataset(reader(tmp_path, half), out, BuildOptions())
    with pytest.raises(UserError, match=r"expected user texts of none.*found age, größe.*--users"):
        append_to_dataset(reader(tmp_path, days[0], some_users(0)), out, None, BuildOptions())


def test_movielens_has_the_texts_of_its_users_in_words(tmp_path):
    folder = tmp_path / "ml-1m"
    folder.mkdir()
    ratings = [f"{user}::{item}::{item}::{978300760 + item}" for user in (1, 2) for item in (1, 5)]
    (folder / "ratings.dat").write_text("\n".join(ratings * 4) + "\n")
    (folder / "movies.dat").write_text("1::Heat (1995)::Action\n5::Jumanji (1995)::Comedy\n")
    (folder / "users.dat").write_text("1::F::1::10::48067\n2::M::56::0::70072\n")
    build_dataset(
        partial(read_movielens, path=str(folder)),
        str(tmp_path / "out"),
        BuildOptions(split="leave-last"),
    )
    rows = Dataset.open(str(tmp_path / "out")).profiles_table().to_pylist()
    assert rows[1:] == [
        {
            "profile_id": 1,
            "gender": "female",
            "age": "under 18",
            "occupation": "K-12 student",
            "zip": "48067",
        },
        {
            "profile_id": 2,
            "gender": "male",
            "age": "56 or older",
            "occupation": "",
            "zip": "70072",
        },
    ]
    (folder / "users.dat").write_text("1::F::2::10::48067\n")
    with pytest.raises(UserError, match=r"users.dat: not in the MovieLens format"):
        build_dataset(
            partial(read_movielens, path=str(folder)),
            str(tmp_path / "out"),
            BuildOptions(split="leave-last", force=True),
        )
