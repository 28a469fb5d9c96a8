"""Metrics by request against the code of the MIND news challenge, over every order of ties."""

from itertools import combinations_with_replacement, product
from math import comb

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from sklearn.metrics import ndcg_score, roc_auc_score

from dti_dist.evaluation.bootstrap import METRICS
from dti_dist.evaluation.labels import LABELS
from dti_dist.evaluation.metrics import rows
from dti_dist.evaluation.request_metrics import CUTS, measure_requests
from tests.metrics_oracle import request_metrics


def measured(requests, seed=0):
    """measure_requests of lists of (label, probability), shuffled; each two of them in one row."""
    listed = [
        {
            "user": number,
            "row": number // 2,
            "timestamp": 1_000 + number % 2,
            "label": label,
            "probability": np.float32(probability),
        }
        for number, request in enumerate(requests)
        for label, probability in request
    ]
    np.random.default_rng(seed).shuffle(listed)
    connection = duckdb.connect(config={"threads": 1})
    connection.register("targets", pa.Table.from_pylist(listed))
    return measure_requests(connection, "targets"), connection


def both_labels(request):
    return 0 < sum(label for label, _ in request) < len(request)


def test_metrics_are_means_over_every_order_of_equal_probabilities():
    """Of every request of up to seven targets with three probabilities."""
    kinds = list(product((0, 1), (0.2, 0.5, 0.9)))
    requests = [r for size in range(1, 8) for r in combinations_with_replacement(kinds, size)]
    found, connection = measured(requests)
    per_request = {row.pop("user"): row for row in rows(connection, "FROM per_request")}
    expected = {n: request_metrics(r) for n, r in enumerate(requests) if both_labels(r)}
    assert per_request.keys() == expected.keys()
    for number, metrics in expected.items():
        assert per_request[number] == pytest.approx(metrics, abs=1e-12), requests[number]
    assert found.pop("requests") == len(requests)
    assert found.pop("requests_of_one_class") == len(requests) - len(expected)
    for name, value in found.items():
        mean = np.mean([metrics[name] for metrics in expected.values()])
        assert value == pytest.approx(mean, abs=1e-12), name


def of_many_ties(seed, targets=300, clicks=4):
    random = np.random.default_rng(seed)
    labels = np.zeros(targets, int)
    labels[random.permutation(targets)[:clicks]] = 1
    return labels, np.round(random.random(targets), 1)


def test_large_requests_with_many_ties():
    """NDCG is scikit-learn's, and a hit what drawing the first ranks of equal ones says."""
    requests = [of_many_ties(seed) for seed in range(20)]
    found, _ = measured([list(zip(*request, strict=True)) for request in requests])
    for cut in CUTS:
        expected = np.mean([ndcg_score([y], [p], k=cut) for y, p in requests])
        assert found[f"ndcg@{cut}"] == pytest.approx(expected, abs=1e-12)
        hits = []
        for labels, p in requests:  # about 30 targets share the highest probabilities
            above = labels[p == p.max()]
            if len(above) < cut:
                next_value = np.unique(p)[-2]
                clicked, drawn = above.any(), cut - len(above)
                above = labels[p == next_value]
            else:
                clicked, drawn = False, cut
            missed = comb(len(above) - above.sum(), drawn) / comb(len(above), drawn)
            hits.append(1.0 if clicked else 1 - missed)
        assert 0 < np.mean(hits) < 1
        assert found[f"hit@{cut}"] == pytest.approx(np.mean(hits), abs=1e-12)
    expected = np.mean([roc_auc_score(*request) for request in requests])
    assert found["request_auc"] == pytest.approx(expected, abs=1e-12)


def test_the_order_of_targets_changes_nothing():
    requests = [list(zip(*of_many_ties(seed, 12, 3), strict=True)) for seed in range(50)]
    assert len({str(measured(requests, seed)[0]) for seed in range(5)}) == 1


def test_constant_predictions_are_no_better_than_chance():
    """A stable sort would call the first target, which is the click, the best."""
    found, _ = measured([[(1, 0.5)] + 9 * [(0, 0.5)]])
    assert found["request_auc"] == pytest.approx(0.5)
    assert found["mrr"] == pytest.approx(np.mean(1 / np.arange(1, 11)))
    assert found["hit@5"] == pytest.approx(0.5)


def test_without_a_request_of_both_labels_there_are_no_metrics():
    found, _ = measured([[(1, 0.5), (1, 0.4)], [(0, 0.5)]])
    assert found == {"requests": 2, "requests_of_one_class": 2}


def test_a_request_is_what_a_row_has_at_one_time():
    """So what two rows have at the same time is two requests."""
    found, _ = measured(4 * [[(1, 0.5), (0, 0.4)]])
    assert (found["requests"], found["requests_of_one_class"]) == (4, 0)


def test_every_metric_has_a_name_for_people():
    assert LABELS.keys() >= set(METRICS)
