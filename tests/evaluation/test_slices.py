"""Slices, and users with several rows, against a few lines over all targets of a data set."""

from collections import Counter, defaultdict
from datetime import datetime, timezone
from types import SimpleNamespace

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from dti_dist.data.dataset import Dataset, iter_sequences
from dti_dist.data.index import RowGroup
from dti_dist.errors import UserError
from dti_dist.evaluation import predictions_file, slices
from dti_dist.evaluation.metrics import measure
from dti_dist.evaluation.slices import check_slices, measure_slices, slice_columns
from tests.data.test_prepare_append import append, at_different_times, build, days_of
from tests.data.test_prepare_events import random_events
from tests.metrics_oracle import click_metrics

NAMES = ("activity", "popularity", "day", "title", "user_id", "item_id")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Users have several rows in train and in test, of which the later begin with context."""
    folder = tmp_path_factory.mktemp("appended")
    half, days = days_of(at_different_times(random_events(users=25)))
    build(folder, half, folder / "data")
    for day, append_to in zip(days, ["train", "test"] * len(days), strict=False):
        append(folder, day, folder / "data", append_to)
    return Dataset.open(str(folder / "data"))


def rows_of(dataset, split):
    for batch in iter_sequences(dataset, split):
        yield from batch.rows.to_pylist()


@pytest.fixture(scope="module")
def predicted(dataset):
    """Predictions of test at random: a table of the spools' columns."""
    rng = np.random.default_rng(0)
    places = [
        (number, position, row["labels"][position])
        for number, row in enumerate(rows_of(dataset, "test"))
        for position in range(row["target_start"], len(row["labels"]))
    ]
    row, position, label = np.array(places).T
    probability = np.round(rng.beta(2, 3, len(row)), 2)
    return pa.table(
        {
            "row": row,
            "position": position.astype(np.int32),
            "label": label.astype(np.int8),
            "probability": probability.astype(np.float32),
        }
    )


@pytest.fixture(scope="module")
def file(dataset, predicted, tmp_path_factory):
    file = tmp_path_factory.mktemp("kept") / "predictions.parquet"
    groups, first = [], 0
    for batch in iter_sequences(dataset, "test"):
        groups.append(RowGroup(batch.part.path, batch.row_group, first, len(batch.rows)))
        first += len(batch.rows)
    index = SimpleNamespace(row_groups=tuple(groups), interactions=np.full(len(groups), 400_000))

    def spooled(first_row, end):
        inside = pc.and_(
            pc.greater_equal(predicted["row"], first_row), pc.less(predicted["row"], end)
        )
        return predicted.filter(inside)

    source_ids = dataset.items_table()["source_id"]
    found = predictions_file.with_targets(spooled, dataset, "test", index, source_ids)
    about = predictions_file.About("step-1", "test", "streaming", dataset.uri)
    assert predictions_file.write(found, file, about) == len(predicted)
    assert predictions_file.read_about(file) == about
    return file


@pytest.fixture(scope="module")
def targets(dataset, predicted):
    """A dict for each target, read from the data set by hand."""
    items = dataset.items_table().to_pylist()
    sequences = list(rows_of(dataset, "test"))
    train = [
        (row["user_id"], item)
        for row in rows_of(dataset, "train")
        for item in row["item_ids"][row["target_start"] :]
    ]
    activity, popularity = (Counter(pair[at] for pair in train) for at in (0, 1))
    found = []
    for entry in predicted.to_pylist():
        sequence = sequences[entry["row"]]
        item, time = (sequence[name][entry["position"]] for name in ("item_ids", "timestamps"))
        found.append(
            {
                "label": entry["label"],
                "probability": entry["probability"],
                "user_id": sequence["user_id"],
                "item_id": items[item]["source_id"],
                "title": items[item]["title"],
                "day": str(datetime.fromtimestamp(time, timezone.utc).date()),
                "activity": activity[sequence["user_id"]],
                "popularity": popularity[item],
            }
        )
    return found


def by_hand(targets):
    users = {user: number for number, user in enumerate({t["user_id"] for t in targets})}
    label = np.array([t["label"] for t in targets])
    probability = np.array([t["probability"] for t in targets], np.float32)
    return click_metrics(label, probability, np.array([users[t["user_id"]] for t in targets]))


@pytest.fixture(scope="module")
def connection(dataset, file):
    connection = duckdb.connect(config={"threads": 1})
    columns = slice_columns(connection, NAMES, dataset, dataset.items_table(), skip_bad=False)
    predictions_file.load_targets(connection, file, columns.more, columns.joins)
    return connection


@pytest.fixture(scope="module")
def measured(connection):
    return measure_slices(connection, NAMES)


def assert_same(entry, expected):
    names = ("targets", "users", "label_rate", "mean_prediction", "auc", "log_loss", "ne", "gauc")
    for name in names:
        assert entry[name] == pytest.approx(expected[name], abs=1e-9), name


def test_a_user_with_several_rows_is_one_user(connection, targets, predicted):
    figures = measure(connection, "targets")
    assert_same(figures, by_hand(targets))
    rows = len(np.unique(predicted["row"]))
    assert figures["users"] == len({target["user_id"] for target in targets}) < rows


@pytest.mark.parametrize("name", ["day", "title", "user_id", "item_id"])
def test_slices_by_value_are_the_metrics_of_those_targets(name, measured, targets):
    groups = defaultdict(list)
    for target in targets:
        groups[target[name]].append(target)
    most = sorted(groups, key=lambda value: (-len(groups[value]), value))[: slices.MOST_VALUES]
    shown = [entry["value"] for entry in measured[name]]
    assert shown[: len(most)] == (sorted(most) if name == "day" else most)
    for entry in measured[name][: len(most)]:
        assert_same(entry, by_hand(groups[entry["value"]]))
    rest = [target for value in groups if value not in most for target in groups[value]]
    assert len(shown) == len(most) + bool(rest)
    if rest:
        assert shown[-1] == f"other ({len(groups) - len(most):,} values)"
        assert_same(measured[name][-1], by_hand(rest))


def test_some_slice_has_more_values_than_are_shown(measured):
    assert any(entries[-1]["value"].startswith("other (") for entries in measured.values())


@pytest.mark.parametrize("name", ["activity", "popularity"])
def test_slices_by_interactions_in_train_are_bins_named_by_their_range(name, measured, targets):
    last = -1
    total = 0
    for entry in measured[name]:
        low, *high = map(int, entry["value"].split(" to "))
        high = high[0] if high else low
        assert last < low <= high
        assert (low == 0) == (high == 0), "those without any stand alone"
        assert_same(entry, by_hand([t for t in targets if low <= t[name] <= high]))
        last, total = high, total + entry["targets"]
    assert total == len(targets)
    assert len(measured[name]) >= 3


def test_a_name_that_is_no_slice_is_refused_with_those_that_are(dataset):
    check_slices(NAMES, dataset)
    with pytest.raises(UserError, match=r"expected one of activity, .*title.*Did you mean 'title'"):
        check_slices(["titel"], dataset)
