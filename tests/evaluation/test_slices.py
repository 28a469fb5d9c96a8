"""Slices, and users with several rows, against a few lines over all targets of a data set."""

import json
from collections import Counter, defaultdict
from dataclasses import replace
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
from dti_dist.evaluation.bootstrap import METRICS, draw, intervals, read_groups
from dti_dist.evaluation.metrics import measure
from dti_dist.evaluation.request_metrics import REQUEST_METRICS, measure_requests
from dti_dist.evaluation.slices import check_slices, measure_slices, slice_columns
from tests.data.test_prepare_append import append, at_different_times, build, days_of
from tests.data.test_prepare_events import random_events
from tests.metrics_oracle import click_metrics, request_metrics

NAMES = ("activity", "popularity", "day", "title", "user_id", "item_id")
OF_REQUESTS = ("request_size", "request_place")
SIX_HOURS = 21_600
RESAMPLES = 60


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Users have several rows in train and in test, of which the later begin with context. What
    they have of six hours is a request."""
    folder = tmp_path_factory.mktemp("appended")
    events = at_different_times(random_events(users=25, length=24))
    half, days = days_of([(u, i, t - t % SIX_HOURS, rating) for u, i, t, rating in events])
    days[0] = [event for event in days[0] if event[2] > half[-1][2]]
    build(folder, half, folder / "data")
    for day, append_to in zip(days, ["train", "test"] * len(days), strict=False):
        append(folder, day, folder / "data", append_to)
    manifest = folder / "data" / "dataset.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"requests": {"by": "time"}}))
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
                "request": (entry["row"], time),
            }
        )
    for request in by(found, "request").values():
        for place, target in enumerate(request, 1):
            target |= {"request_size": len(request), "request_place": place}
    return found


def by(targets, name):
    groups = defaultdict(list)
    for target in targets:
        groups[target[name]].append(target)
    return groups


def by_hand(targets):
    users = {user: number for number, user in enumerate({t["user_id"] for t in targets})}
    label = np.array([t["label"] for t in targets])
    probability = np.array([t["probability"] for t in targets], np.float32)
    return click_metrics(label, probability, np.array([users[t["user_id"]] for t in targets]))


def requests_by_hand(targets):
    """Metrics by request, and the number of requests with both labels."""
    pairs = [[(t["label"], t["probability"]) for t in r] for r in by(targets, "request").values()]
    found = [request_metrics(r) for r in pairs if len({label for label, _ in r}) == 2]
    names = REQUEST_METRICS if found else ()
    return {name: np.mean([one[name] for one in found]) for name in names}, len(found)


@pytest.fixture(scope="module")
def connection(dataset, file):
    connection = duckdb.connect(config={"threads": 1})
    names = [*NAMES, *OF_REQUESTS]
    columns = slice_columns(connection, names, dataset, dataset.items_table(), skip_bad=False)
    predictions_file.load_targets(connection, file, columns.more, columns.joins, by_request=True)
    return connection


@pytest.fixture(scope="module")
def of_requests(connection):
    return measure_requests(connection, "targets")


@pytest.fixture(scope="module")
def drawn(targets):
    return draw(len(by(targets, "user_id")), RESAMPLES)


@pytest.fixture(scope="module")
def measured(connection, of_requests, drawn):
    return measure_slices(connection, [*NAMES, *OF_REQUESTS], by_request=True, drawn=drawn)


def assert_same(entry, expected):
    names = ("targets", "users", "label_rate", "mean_prediction", "auc", "log_loss", "ne", "gauc")
    for name in (*names, "uauc"):
        assert entry[name] == pytest.approx(expected[name], abs=1e-9), name


def test_a_user_with_several_rows_is_one_user(connection, targets, predicted):
    figures = measure(connection, "targets")
    assert_same(figures, by_hand(targets))
    rows = len(np.unique(predicted["row"]))
    assert figures["users"] == len({target["user_id"] for target in targets}) < rows


@pytest.mark.parametrize("name", ["day", "title", "user_id", "item_id"])
def test_slices_by_value_are_the_metrics_of_those_targets(name, measured, targets):
    groups = by(targets, name)
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


def test_metrics_by_request_are_those_of_the_targets_of_a_row_and_a_time(of_requests, targets):
    expected, both = requests_by_hand(targets)
    found = of_requests.copy()
    number = found.pop("requests")
    assert number == len({target["request"] for target in targets})
    assert found.pop("requests_of_one_class") == number - both > 0
    assert found == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("name", OF_REQUESTS)
def test_slices_by_size_of_the_request_and_place_in_it(name, measured, targets):
    ranges = {}
    for entry in measured[name]:
        low, *high = map(int, entry["value"].split(" to "))
        ranges[entry["value"]] = range(low, (high or [low])[0] + 1)
    assert list(ranges)[:2] == (["1", "2 to 5"] if name == "request_size" else ["1", "2"])
    for entry in measured[name]:
        assert_same(entry, by_hand([t for t in targets if t[name] in ranges[entry["value"]]]))
    assert sum(entry["targets"] for entry in measured[name]) == len(targets)


def part(targets, name, value):
    """The targets of a part that is a value, or a range of numbers."""
    low, *high = value.split(" to ")
    return [
        target
        for target in targets
        if target[name] == low
        or (low.isdecimal() and int(low) <= target[name] <= int((high or [low])[0]))
    ]


@pytest.mark.parametrize("name", ["request_size", "day", "activity"])
def test_slices_of_whole_requests_have_metrics_by_request(name, measured, targets):
    for entry in measured[name]:
        expected, _ = requests_by_hand(part(targets, name, entry["value"]))
        assert {key: entry[key] for key in REQUEST_METRICS if key in entry} == pytest.approx(
            expected, abs=1e-9
        )
    assert any("mrr" in entry for entry in measured[name])


def test_slices_that_part_requests_have_none(measured):
    for name in ("request_place", "item_id", "title"):
        assert not any(entry.keys() & set(REQUEST_METRICS) for entry in measured[name])
    assert not any("mrr" in entry for entry in measured["request_size"] if entry["value"] == "1")


@pytest.mark.parametrize("name", ["request_place", "request_size", "day"])
def test_intervals_are_those_of_resampled_users(name, measured, targets, connection, drawn):
    """All users are drawn, also those without a target in the part."""
    numbers = dict(connection.sql("SELECT user_id, user FROM users").fetchall())
    assert len(numbers) == drawn.shape[1]
    some = 0
    for entry in measured[name]:
        inside = part(targets, name, entry["value"])
        auc, by_request = [], defaultdict(list)
        for once in drawn:
            often = {user: int(once[number]) for user, number in numbers.items()}
            auc.append(auc_by_hand([t for t in inside for _ in range(often[t["user_id"]])]))
            for metric, value in resampled_requests(inside, often).items():
                by_request[metric].append(value)
        assert entry["intervals"]["auc"] == middle(auc)
        for metric in entry["intervals"].keys() & set(REQUEST_METRICS):
            assert entry["intervals"][metric] == middle(by_request[metric]), metric
            some += 1
    assert (some > 0) == (name != "request_place")


def auc_by_hand(targets):
    """None where only one label occurs."""
    clicks, others = ([t["probability"] for t in targets if t["label"] == y] for y in (1, 0))
    won = sum((click > other) + (click == other) / 2 for click in clicks for other in others)
    return won / (len(clicks) * len(others)) if clicks and others else None


def resampled_requests(targets, often):
    """Means over requests, each as often as its user was drawn."""
    found = [
        request_metrics([(t["label"], t["probability"]) for t in request])
        for request in by(targets, "request").values()
        if len({t["label"] for t in request}) == 2
        for _ in range(often[request[0]["user_id"]])
    ]
    return {
        name: sum(one[name] for one in found) / len(found) if found else None
        for name in REQUEST_METRICS
    }


def middle(values):
    """The middle 95 % of values that are defined; None if most are not."""
    defined = [value for value in values if value is not None]
    if 2 * len(defined) < len(values):
        return None
    return pytest.approx(np.quantile(defined, [0.025, 0.975]).tolist(), abs=1e-6)


def test_intervals_of_a_part_that_is_the_whole_are_those_of_the_whole():
    """Fewer bins of the probability cost AUC a hundredth of the interval's width."""
    random = np.random.default_rng(0)
    user = np.repeat(np.arange(300), 60)
    probability = random.random(len(user)).astype(np.float32)
    taste = random.normal(0, 0.1, 300)[user]
    columns = {
        "user": user,
        "label": (random.random(len(user)) < probability + taste).astype(np.int8),
        "probability": probability,
        "slice_0": np.zeros(len(user), np.int64),
        "slice_1": np.arange(len(user)) % 4 + 1,
    }
    connection = duckdb.connect(config={"threads": 1})
    connection.register("given", pa.table(columns))
    connection.execute("CREATE TABLE targets AS SELECT * FROM given")
    figures = measure(connection, "targets")
    drawn = draw(300, 200)
    whole = intervals(figures, read_groups(connection, "targets", 300), drawn)
    found = measure_slices(connection, ["day", "request_place"], drawn=drawn)
    (one,) = found["day"]
    assert one["intervals"].keys() == whole.keys() == set(METRICS) - set(REQUEST_METRICS)
    for name, (low, high) in whole.items():
        allowed = 0.01 * (high - low) if name == "auc" else 1e-9
        assert one["intervals"][name] == pytest.approx([low, high], abs=allowed), name
    widths = [high - low for low, high in (e["intervals"]["auc"] for e in found["request_place"])]
    low, high = whole["auc"]
    assert len(widths) == 4
    assert all(high - low < width < 4 * (high - low) for width in widths)
    without = measure_slices(connection, ["day"])["day"]
    assert without == [one | {"intervals": None}]


def test_large_sizes_have_wide_ranges():
    connection = duckdb.connect()
    connection.execute("CREATE TABLE targets AS SELECT range AS size FROM range(1, 3000)")
    shown, _ = slices._ranges(connection, "request_size", "size")
    named = {value: name for value, _, name in shown}
    assert [named[size] for size in (1, 2, 5, 6, 300, 1_000, 1_001, 2_999)] == [
        *("1", "2 to 5", "2 to 5", "6 to 10", "201 to 500", "501 to 1,000"),
        *("1,001 or more", "1,001 or more"),
    ]


def test_a_slice_by_request_of_data_without_requests_is_refused(dataset):
    without = replace(dataset, manifest=dataset.manifest.model_copy(update={"requests": None}))
    check_slices(OF_REQUESTS, dataset)
    with pytest.raises(UserError, match=r"--slice request_size: .*with --requests time"):
        check_slices(["request_size"], without)


def test_a_name_that_is_no_slice_is_refused_with_those_that_are(dataset):
    check_slices(NAMES, dataset)
    with pytest.raises(UserError, match=r"expected one of activity, .*title.*Did you mean 'title'"):
        check_slices(["titel"], dataset)
