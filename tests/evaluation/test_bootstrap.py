"""Intervals against plain bootstraps, and against truths that are known."""

from collections import Counter

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from sklearn.metrics import auc, log_loss, roc_auc_score

from dti_dist.evaluation.bootstrap import (
    METRICS,
    differences,
    draw,
    intervals,
    intervals_of_mean,
    read_groups,
)
from dti_dist.evaluation.curves import reliability, roc
from dti_dist.evaluation.metrics import measure
from dti_dist.evaluation.request_metrics import REQUEST_METRICS, measure_requests


def simulated(users, per_user, seed, noise=1.0):
    """Labels that depend on the user, and a model's probabilities: users, labels, probabilities."""
    rng = np.random.default_rng(seed)
    user = np.repeat(np.arange(users), per_user)
    logit = rng.normal(size=users)[user] + rng.normal(size=len(user)) - 1
    labels = (rng.random(len(user)) < 1 / (1 + np.exp(-logit))).astype(np.int8)
    seen = logit + noise * rng.normal(size=len(user))
    return user, labels, (1 / (1 + np.exp(-seen))).astype(np.float32)


def measured(user, labels, probabilities, most=2_000, by_request=True):
    connection = duckdb.connect(config={"threads": 1})
    columns = {
        "user": user,
        "row": user,
        "timestamp": request_of(user),
        "label": labels,
        "probability": probabilities,
    }
    connection.register("given", pa.table(columns))
    connection.execute("CREATE TABLE targets AS SELECT * FROM given")
    figures = measure(connection, "targets")
    if by_request:
        figures |= measure_requests(connection, "targets")
    return figures, read_groups(connection, "targets", figures["users"], most, by_request)


def request_of(user):
    """[targets] Each user's targets come in requests of five, numbered over all users."""
    return np.arange(len(user)) // 5


def plain(user, labels, probabilities, drawn):
    """METRICS of a sample in which each user's targets occur as often as the user was drawn."""
    often = drawn[user]
    y, p = np.repeat(labels, often), np.repeat(probabilities, often).astype(np.float64)
    rate, loss = y.mean(), log_loss(y, p)
    aucs, targets, times = aucs_within(user, labels, probabilities, often)
    request_aucs, _, request_times = aucs_within(request_of(user), labels, probabilities, often)
    return {
        "auc": roc_auc_score(y, p),
        "log_loss": loss,
        "gauc": np.average(aucs, weights=targets * times),
        "uauc": np.average(aucs, weights=times),
        "request_auc": np.average(request_aucs, weights=request_times),
        "ne": loss / -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate)),
        "calibration_ratio": p.mean() / rate,
    }


def aucs_within(part, labels, probabilities, often):
    """Of each part with both labels: AUC, targets, how often it was drawn."""
    found = []
    for number in np.unique(part):
        inside = part == number
        click = probabilities[inside & (labels == 1)][:, None]
        other = probabilities[inside & (labels == 0)]
        if click.size and other.size:
            auc = ((click > other) + (click == other) / 2).mean()
            found.append((auc, inside.sum(), often[inside][0]))
    return np.array(found).T


def test_a_resample_is_the_sample_in_which_users_are_repeated():
    data = simulated(60, 15, seed=1)
    _, groups = measured(*data)
    drawn = draw(60, 5)
    assert (drawn.sum(axis=1) == 60).all()
    found = groups.resample(drawn)
    for number, once in enumerate(drawn):
        for name, value in plain(*data, once).items():
            assert found[name][number] == pytest.approx(value, abs=1e-6), name


def test_bins_of_the_probability_cost_auc_less_than_a_thousandth_of_its_interval():
    user, labels, probabilities = data = simulated(500, 60, seed=2)
    figures, groups = measured(*data)
    assert groups.counts.shape[2] < len(np.unique(probabilities)) / 7
    drawn = draw(500, 20)
    low, high = intervals(figures, groups, draw(500, 400))["auc"]
    shift = groups.resample(np.ones((1, 500), int))["auc"][0] - figures["auc"]
    exact = [
        roc_auc_score(np.repeat(labels, once[user]), np.repeat(probabilities, once[user]))
        for once in drawn
    ]
    assert np.abs(groups.resample(drawn)["auc"] - shift - exact).max() < 1e-3 * (high - low)


def test_intervals_of_groups_of_users_are_those_of_users():
    """400 groups know a standard deviation to 1 / sqrt(2 x 399) = 3.5 %, and 1,000 resamples to
    2.2 %, in each of both: four times the standard error of the ratio is 19 %."""
    data = simulated(4_000, 5, seed=3)
    figures, groups = measured(*data, most=400)
    _, of_users = measured(*data, most=4_000)
    assert (len(groups), len(of_users)) == (400, 4_000)
    coarse = intervals(figures, groups, draw(400, 1_000))
    fine = intervals(figures, of_users, draw(4_000, 1_000, seed=1))
    for name in METRICS:
        widths = [high - low for low, high in (coarse[name], fine[name])]
        assert widths[0] == pytest.approx(widths[1], rel=0.19), name
        assert coarse[name][0] <= figures[name] <= coarse[name][1]
        assert (widths[0] == 0) == name.startswith("hit@"), "a request of five has a hit"


def test_users_and_not_targets_are_resampled():
    """With ten equal targets a user, the interval is that of one target a user."""
    user, labels, probabilities = simulated(300, 1, seed=4)
    once = intervals(*measured(user, labels, probabilities), draw(300, 500))
    tenfold = (np.repeat(column, 10) for column in (user, labels, probabilities))
    ten = intervals(*measured(*tenfold), draw(300, 500))
    assert ten["auc"] == pytest.approx(once["auc"], abs=1e-6)
    assert ten["log_loss"] == pytest.approx(once["log_loss"], abs=1e-6)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    """Of 100 data sets 95 are expected, with a standard deviation of 2.2: at least 87."""
    truth, _ = measured(*simulated(100_000, 5, seed=5), by_request=False)
    covered = Counter()
    for seed in range(100):
        sample = measured(*simulated(150, 5, seed=100 + seed), by_request=False)
        for name, (low, high) in intervals(*sample, draw(150, 400)).items():
            covered[name] += low <= truth[name] <= high
    assert covered.keys() == set(METRICS) - set(REQUEST_METRICS)
    assert all(count >= 87 for count in covered.values()), covered
    assert sum(covered.values()) < 6 * 100


def delong_deviation(labels, first, second):
    """Standard deviation of a difference of AUC where targets are independent (DeLong, 1988)."""
    parts = []
    for clicked in (1, 0):
        placements = []
        for p in (first, second):
            own, other = p[labels == clicked][:, None], p[labels != clicked][None]
            wins = (own > other) if clicked else (own < other)
            placements.append((wins + (own == other) / 2).mean(axis=1))
        difference = placements[1] - placements[0]
        parts.append(difference.var(ddof=1) / len(difference))
    return np.sqrt(sum(parts))


def test_differences_of_auc_vary_as_delong_says_where_each_user_has_one_target():
    user, labels, first = simulated(1_500, 1, seed=6)
    rng = np.random.default_rng(0)
    second = (first + 0.2 * rng.random(1_500) * (labels - 0.5)).clip(0, 1).astype(np.float32)
    found = differences(
        measured(user, labels, first), measured(user, labels, second), draw(1_500, 2_000)
    )["auc"]
    assert found.difference == pytest.approx(
        roc_auc_score(labels, second) - roc_auc_score(labels, first), abs=1e-9
    )
    deviation = (found.interval[1] - found.interval[0]) / (2 * 1.96)
    # Resamples know it to 1.6 %, quantiles at 2.5 % to about twice that.
    assert deviation == pytest.approx(delong_deviation(labels, first, second), rel=0.12)
    assert found.p_value < 0.01


def test_a_difference_that_is_noise_has_a_high_p_value():
    user, labels, first = simulated(400, 5, seed=7)
    rng = np.random.default_rng(1)
    second = (first + 0.02 * rng.normal(size=len(first))).clip(0, 1).astype(np.float32)
    one, other = measured(user, labels, first), measured(user, labels, second)
    drawn = draw(400, 500)
    assert differences(one, other, drawn)["auc"].p_value > 0.05
    same = differences(one, one, drawn)["auc"]
    assert (same.difference, same.interval, same.p_value) == (0, [0, 0], 1)


def test_reliability_and_roc_are_those_of_sorted_targets():
    data = _, labels, probabilities = simulated(200, 10, seed=8)
    groups = measured(*data)[1]
    bins = reliability(groups, draw(200, 200))
    order = np.argsort(probabilities)
    assert [entry["targets"] for entry in bins] == [100] * 20
    for entry, chosen in zip(bins, np.split(order, 20), strict=True):
        assert entry["label_rate"] == pytest.approx(labels[chosen].mean())
        assert entry["mean_prediction"] == pytest.approx(probabilities[chosen].mean(), abs=1e-6)
        assert entry["interval"][0] <= entry["label_rate"] <= entry["interval"][1]
    others, clicks = np.array(roc(groups)).T
    assert auc(others, clicks) == pytest.approx(roc_auc_score(labels, probabilities))


def test_without_resamples_or_with_one_user_there_are_no_intervals():
    figures, groups = measured(*simulated(50, 5, seed=9))
    assert set(intervals(figures, groups, draw(50, 0)).values()) == {None}
    assert reliability(groups, None)[0]["interval"] is None
    one = measured(*simulated(1, 50, seed=9))
    assert set(differences(one, one, draw(1, 0))) == set(METRICS)


def test_a_sample_without_a_request_of_both_labels_leaves_their_metrics_undefined():
    """Where hardly any user has such a request there is no interval, as for GAUC."""
    user = np.repeat(np.arange(40), 5)
    labels = (np.arange(200) < 2).astype(np.int8)  # clicks of the first user alone
    probabilities = np.linspace(0, 1, 200, dtype=np.float32)
    figures, groups = measured(user, labels, probabilities)
    assert figures["requests_of_one_class"] == 39
    assert figures["request_auc"] == figures["uauc"] == figures["gauc"] == 0
    assert intervals(figures, groups, draw(40, 200))["mrr"] == [figures["mrr"]] * 2
    without = measured(user, labels * 0, probabilities)
    found = intervals(*without, draw(40, 200))
    assert found.keys() == set(METRICS) - set(REQUEST_METRICS)
    assert differences(without, without, draw(40, 200)).keys() == found.keys()


def test_intervals_of_a_mean_are_those_of_the_mean_in_each_resample():
    user, labels, probabilities = simulated(200, 5, seed=6)
    other = simulated(200, 5, seed=6, noise=2.0)[2]
    both = [measured(user, labels, which) for which in (probabilities, other)]
    drawn = draw(200, 300)
    found = intervals_of_mean(both, drawn)
    assert intervals_of_mean(both[:1], drawn) == intervals(*both[0], drawn)
    losses = [
        -np.log(np.where(labels == 1, p, 1 - p.astype(float))) for p in (probabilities, other)
    ]
    counts = drawn[:, user]
    means = counts @ np.mean(losses, axis=0) / counts.sum(axis=1)
    # Groups have random users, here one each: which is which changes no distribution.
    assert found["log_loss"] == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=1e-6)
