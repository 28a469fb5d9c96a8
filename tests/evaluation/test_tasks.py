"""Metrics of further tasks: those of their known labels alone."""

from __future__ import annotations

import duckdb
import numpy as np
import pyarrow as pa
import pytest

from dti_dist.evaluation.metrics import measure_arrays
from dti_dist.evaluation.tasks import measure_tasks, thresholds

TARGETS = 400


def table(seed, users=30):
    rng = np.random.default_rng(seed)
    known = rng.random(TARGETS) < 0.6
    return known, {
        "user": rng.integers(0, users, TARGETS).astype(np.uint32),
        "label": rng.integers(0, 2, TARGETS).astype(np.int8),
        "probability": rng.random(TARGETS).astype(np.float32),
        "label_like": rng.integers(0, 2, TARGETS).astype(np.int8),
        "probability_like": rng.random(TARGETS).round(2).astype(np.float32),
        "weight": rng.integers(0, 4, TARGETS).astype(np.float32),
    }


@pytest.mark.parametrize("weighted", [False, True])
def test_a_tasks_metrics_are_those_of_its_known_labels(weighted):
    known, columns = table(seed=int(weighted))
    known &= columns["user"] != 7  # whom a group of users must not be kept for
    of_task = [columns[name][known] for name in ("label_like", "probability_like", "user")]
    expected = measure_arrays(*of_task, columns["weight"][known] if weighted else None)
    label = pa.array(columns["label_like"], mask=~known)
    targets = pa.table(columns | {"label_like": label})
    with duckdb.connect() as connection:
        connection.register("targets", targets)
        at = thresholds(connection, "targets", ["like"])
        found = measure_tasks(connection, ["like"], at, False, weighted, resamples=20)["like"]
    for name, value in expected.items():
        if name not in ("f1_valid_threshold", "valid_threshold"):
            assert found[name] == pytest.approx(value, rel=1e-6), name
    assert found["bootstrap"]["groups"] == len(np.unique(columns["user"][known]))
    low, high = found["intervals"]["auc"]
    assert low < found["auc"] < high
    predicted = of_task[1].astype(np.float64) >= at["like"]
    hits = int((predicted & (of_task[0] == 1)).sum())
    f1 = 2 * hits / (int(predicted.sum()) + int(of_task[0].sum()))
    if not weighted:
        assert found["f1_valid_threshold"] == pytest.approx(f1)
        assert f1 >= found["f1"]


def test_a_task_without_a_known_label_is_said_and_left_out(capsys):
    _, columns = table(seed=2)
    label = pa.array(columns["label_like"], mask=np.ones(TARGETS, dtype=bool))
    with duckdb.connect() as connection:
        connection.register("targets", pa.table(columns | {"label_like": label}))
        assert thresholds(connection, "targets", ["like"]) == {"like": None}
        assert measure_tasks(connection, ["like"], {}, False, False, 20) == {}
    assert "no target has a known label of the task like" in capsys.readouterr().err
