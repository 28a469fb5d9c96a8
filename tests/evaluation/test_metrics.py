"""Metrics against scikit-learn and a few lines of plain Python."""

import math

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from sklearn.metrics import accuracy_score, f1_score, log_loss, roc_auc_score

from dti_dist.errors import UserError
from dti_dist.evaluation.bootstrap import differences, draw, intervals, read_groups
from dti_dist.evaluation.curves import histogram, is_skewed, reliability
from dti_dist.evaluation.metrics import (
    CALIBRATION_BINS,
    best_threshold,
    measure,
    measure_arrays,
)
from dti_dist.evaluation.slices import measure_slices
from tests.metrics_oracle import click_metrics


@pytest.fixture(scope="module")
def predictions():
    rng = np.random.default_rng(0)
    users = rng.integers(0, 40, 3000)
    users[:3] = 1000  # a user of one class
    probabilities = rng.random(3000)
    labels = (rng.random(3000) < probabilities**2).astype(int)
    labels[:3] = 1
    return labels, probabilities, users


def test_auc_log_loss_f1_and_accuracy_are_scikit_learns(predictions):
    labels, probabilities, users = predictions
    figures = measure_arrays(labels, probabilities, users)
    clicked = probabilities >= 0.5
    assert figures["auc"] == pytest.approx(roc_auc_score(labels, probabilities), abs=1e-12)
    assert figures["log_loss"] == pytest.approx(log_loss(labels, probabilities), abs=1e-12)
    assert figures["f1"] == pytest.approx(f1_score(labels, clicked), abs=1e-12)
    assert figures["accuracy"] == pytest.approx(accuracy_score(labels, clicked), abs=1e-12)
    assert (figures["targets"], figures["users"]) == (3000, 41)


def test_gauc_weighs_users_by_targets_and_leaves_users_of_one_class_out(predictions):
    labels, probabilities, users = predictions
    figures = measure_arrays(labels, probabilities, users)
    total = weight = 0.0
    for user in set(users.tolist()):
        clicks = [
            p for p, y, u in zip(probabilities, labels, users, strict=True) if u == user and y
        ]
        others = [
            p for p, y, u in zip(probabilities, labels, users, strict=True) if u == user and not y
        ]
        if clicks and others:
            wins = sum((c > o) + (c == o) / 2 for c in clicks for o in others)
            total += wins / (len(clicks) * len(others)) * (len(clicks) + len(others))
            weight += len(clicks) + len(others)
    assert figures["gauc"] == pytest.approx(total / weight, abs=1e-9)
    assert figures["users_of_one_class"] == 1


def test_a_weighted_target_counts_as_often_as_its_weight_says(predictions):
    labels, probabilities, users = predictions
    users = np.minimum(users, 40)
    probabilities = np.round(probabilities, 2)  # some are equal
    weights = np.random.default_rng(1).integers(0, 4, len(labels))
    columns = {"user": users, "label": labels, "probability": probabilities}
    repeated = {name: np.repeat(values, weights) for name, values in columns.items()}
    expected = measure_arrays(repeated["label"], repeated["probability"], repeated["user"])
    with duckdb.connect() as connection:
        for table, of_table in [
            ("weighted", columns | {"weight": weights / 2}),
            ("plain", repeated),
        ]:
            connection.register("added", pa.table(of_table))
            connection.execute(f"CREATE TABLE {table} AS FROM added")
        figures = measure(connection, "weighted", 0.3, weighted=True)
        groups = read_groups(connection, "weighted", 41, weighted=True)
        measure(connection, "plain")
        counted = read_groups(connection, "plain", 41)
        threshold = best_threshold(connection, "weighted", weighted=True)
        assert threshold == best_threshold(connection, "plain")
    for name in ("auc", "log_loss", "gauc", "ne", "ece", "calibration_ratio", "f1", "accuracy"):
        assert figures[name] == pytest.approx(expected[name], abs=1e-9), name
    assert figures["weight"] == weights.sum() / 2
    assert (figures["targets"], figures["clicks"]) == (len(labels), labels.sum())
    once = np.ones((1, len(groups)), dtype=np.int64)
    found, wanted = groups.resample(once), counted.resample(once)
    for name in ("auc", "log_loss", "gauc", "ne", "calibration_ratio"):
        assert found[name] == pytest.approx(wanted[name], abs=2e-3), name


def test_weights_that_are_all_0_are_refused():
    one = np.ones(3)
    with pytest.raises(UserError, match="all 3 have the weight 0"):
        measure_arrays(one.astype(int), one / 2, one.astype(int), 0 * one)


def test_ne_is_the_log_loss_over_that_of_the_label_rate(predictions):
    labels, probabilities, users = predictions
    figures = measure_arrays(labels, probabilities, users)
    rate = labels.mean()
    entropy = -rate * math.log(rate) - (1 - rate) * math.log(1 - rate)
    assert figures["ne"] == pytest.approx(figures["log_loss"] / entropy, abs=1e-12)
    constant = measure_arrays(labels, np.full(3000, rate), users)
    assert constant["ne"] == pytest.approx(1.0, abs=1e-9)


def test_ece_is_the_mean_gap_between_confidence_and_frequency_over_bins(predictions):
    labels, probabilities, users = predictions
    gap = 0.0
    for b in range(CALIBRATION_BINS):
        inside = (probabilities >= b / CALIBRATION_BINS) & (
            probabilities < (b + 1) / CALIBRATION_BINS
        )
        if inside.any():
            gap += abs(labels[inside].mean() - probabilities[inside].mean()) * inside.mean()
    assert measure_arrays(labels, probabilities, users)["ece"] == pytest.approx(gap, abs=1e-6)


def test_metrics_of_one_class_are_undefined_and_say_so():
    figures = measure_arrays(np.ones(5, int), np.full(5, 0.9), np.arange(5))
    assert figures["auc"] is None
    assert figures["gauc"] is None
    assert figures["ne"] is None
    assert figures["log_loss"] == pytest.approx(-math.log(0.9))


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("digits", [None, 2], ids=["few ties", "many ties"])
def test_metrics_of_validation_equal_the_libraries_to_the_rounding(kind, digits):
    rng = np.random.default_rng(5)
    probabilities = rng.random(50_000) if digits is None else np.round(rng.random(50_000), digits)
    probabilities = probabilities.astype(kind)
    labels = (rng.random(50_000) < probabilities**2).astype(np.int8)
    users = rng.integers(0, 9000, 50_000)
    figures = measure_arrays(labels, probabilities, users)
    for name, value in click_metrics(labels, probabilities, users).items():
        assert figures[name] == pytest.approx(value, rel=1e-12), name
    assert measure_arrays(labels, probabilities, users) == figures, "the same each time"


def test_probabilities_that_are_not_finite_are_refused(predictions):
    labels, probabilities, users = predictions
    broken = np.where(np.arange(3000) < 2, np.nan, probabilities)
    with pytest.raises(UserError, match=r"found 2 of 3,000.*diverged"):
        measure_arrays(labels, broken, users)


# Of a table, in any number of targets.


def table(labels, probabilities, users):
    connection = duckdb.connect(config={"threads": 2})
    columns = {
        "user": users,
        "label": labels.astype(np.int8),
        "probability": probabilities.astype(np.float32),
    }
    connection.register("targets", pa.table(columns))
    return connection


@pytest.mark.parametrize("digits", [None, 2], ids=["few ties", "many ties"])
def test_metrics_of_a_million_targets_are_scikit_learns(digits):
    rng = np.random.default_rng(3)
    count = 1_000_000
    probabilities = rng.random(count) if digits is None else np.round(rng.random(count), digits)
    probabilities = probabilities.astype(np.float32)
    labels = (rng.random(count) < probabilities**2).astype(np.int8)
    users = rng.integers(0, 200, count)
    figures = measure(table(labels, probabilities, users), "targets", valid_threshold=0.3)
    expected = click_metrics(labels, probabilities, users)
    of_users = [(labels[users == user], probabilities[users == user]) for user in range(200)]
    aucs, sizes = [roc_auc_score(*pair) for pair in of_users], [len(y) for y, _ in of_users]
    expected["gauc"] = np.average(aucs, weights=sizes)
    expected["f1_valid_threshold"] = f1_score(labels, probabilities >= 0.3)
    expected["calibration_ratio"] = probabilities.mean(dtype=np.float64) / labels.mean()
    for name, value in expected.items():
        assert figures[name] == pytest.approx(value, rel=0, abs=1e-9), name
    assert figures["clicks"] == labels.sum()


def test_log_loss_of_certain_and_wrong_predictions_is_clipped_as_by_scikit_learn():
    labels = np.array([0, 1, 0, 1, 1])
    probabilities = np.array([1, 0, 0, 1, 0.5], dtype=np.float32)
    figures = measure(table(labels, probabilities, np.arange(5)), "targets")
    expected = log_loss(labels, probabilities.astype(np.float64))
    assert expected > 10
    assert figures["log_loss"] == pytest.approx(expected, rel=1e-12)


def test_metrics_by_sql_of_one_class_are_undefined_too():
    labels, probabilities = np.ones(5, int), np.full(5, 0.9)
    figures = measure(table(labels, probabilities, np.arange(5)), "targets")
    assert [figures[name] for name in ("auc", "gauc", "ne")] == [None, None, None]
    assert figures["users_of_one_class"] == 5
    assert best_threshold(table(labels * 0, probabilities, np.arange(5)), "targets") is None


def test_the_best_threshold_is_that_of_trying_all():
    rng = np.random.default_rng(0)
    probabilities = np.round(rng.random(400), 2).astype(np.float32)
    labels = (rng.random(400) < probabilities**3).astype(int)
    tried = {float(t): f1_score(labels, probabilities >= t) for t in np.unique(probabilities)}
    chosen = best_threshold(table(labels, probabilities, np.zeros(400, int)), "targets")
    assert tried[chosen] == max(tried.values())
    assert tried[chosen] > f1_score(labels, probabilities >= 0.5)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("clicks", [0, 1, 12], ids=["no click", "one", "all"])
@pytest.mark.parametrize("users", [1, 2, 12])
@pytest.mark.parametrize("resamples", [1, 40])
def test_targets_of_one_class_make_no_library_warn(clicks, users, resamples):
    """Such a warning would show a path of this machine."""
    label = (np.arange(12) < clicks).astype(np.int8)
    connection = duckdb.connect(config={"threads": 1})
    columns = {
        "user": np.arange(12) % users,
        "label": label,
        "probability": np.linspace(0.1, 0.9, 12, dtype=np.float32),
        "slice_0": [f"{value}" for value in label],
    }
    connection.register("given", pa.table(columns))
    connection.execute("CREATE TABLE targets AS SELECT * FROM given")
    figures = measure(connection, "targets", best_threshold(connection, "targets"))
    groups = read_groups(connection, "targets", figures["users"])
    drawn = draw(len(groups), resamples)
    found = intervals(figures, groups, drawn)
    bins = reliability(groups, drawn)
    histogram(connection, is_skewed(bins))
    parts = measure_slices(connection, ["title"], drawn=drawn)["title"]
    assert {part["intervals"]["auc"] for part in parts} == {None}
    assert {part["auc"] for part in parts} == {None}
    if clicks in (0, 12):
        assert found["auc"] is None
    assert all(entry["interval"] is None or len(entry["interval"]) == 2 for entry in bins)
    both = differences((figures, groups), (figures, groups), drawn)
    assert (both["auc"].difference is None) == (clicks in (0, 12))
