"""Calibrations that are fitted on predictions of valid."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from dti_dist.errors import UserError
from dti_dist.evaluation import predictions_file
from dti_dist.evaluation.calibrating import calibrate
from dti_dist.runs.calibration import calibrations
from dti_dist.runs.folder import RunFolder

STEP = "step-00000007"


def sigmoid(logits):
    return 1 / (1 + np.exp(-logits))


def predictions(seed, count=30_000, labels=None):
    """Probabilities of a model whose logits are too large, twice as far from 0 and 1 higher."""
    rng = np.random.default_rng(seed)
    true = rng.normal(-1, 1, count)
    drawn = rng.random(count) < sigmoid(true)
    label = drawn if labels is None else np.full(count, labels)
    return sigmoid(2 * true + 1).astype(np.float32), label.astype(np.int8)


def write(
    run, split, probability, label, weight=None, checkpoint=STEP, prompt="sliding_window", more=None
):
    count = len(label)
    columns = {
        "user_id": [f"u{n % 50}" for n in range(count)],
        "item_id": ["i"] * count,
        "timestamp": np.arange(count),
        "label": label,
        "probability": probability,
        "row": np.arange(count),
        "position": np.ones(count, dtype=np.int32),
    }
    columns |= more or {}
    if weight is not None:
        columns["weight"] = weight.astype(np.float32)
    about = predictions_file.About(
        checkpoint,
        split,
        prompt,
        "data",
        weighted=weight is not None,
        tasks=("like",) if more else (),
    )
    batch = pa.RecordBatch.from_pydict(columns, schema=about.schema)
    file = predictions_file.predictions_path(run, split, prompt)
    file.parent.mkdir(parents=True, exist_ok=True)
    predictions_file.write(iter([batch]), file, about)


@pytest.fixture
def run(tmp_path):
    return RunFolder(str(tmp_path))


@pytest.mark.parametrize("weighted", [False, True])
def test_calibrations_are_those_of_all_targets_by_scikit_learn(run, weighted):
    probability, label = predictions(0)
    weight = np.random.default_rng(1).integers(0, 3, len(label)) / 2 if weighted else None
    write(run, "valid", probability, label, weight)
    at = np.linspace(0.05, 0.95, 50, dtype=np.float32)
    logits = np.log(probability / (1 - probability))[:, None].astype(np.float64)
    line = LogisticRegression(C=np.inf, tol=1e-10).fit(logits, label, sample_weight=weight)
    found, said = calibrate(run, STEP, "platt")
    expected = line.predict_proba(np.log(at / (1 - at))[:, None])[:, 1]
    assert found.apply(at) == pytest.approx(expected, abs=1e-4)
    assert (found.scale, found.offset) == pytest.approx((0.5, -0.5), abs=0.05)
    assert said == "calibrated on valid; test was not evaluated"
    curve = IsotonicRegression(out_of_bounds="clip").fit(probability, label, sample_weight=weight)
    found, _ = calibrate(run, STEP, "isotonic")
    assert found.apply(at) == pytest.approx(curve.predict(at), abs=0.01)
    assert 0 < found.apply(np.float32([0]))[0] < found.apply(np.float32([1]))[0] < 1


@pytest.mark.parametrize("method", ["platt", "isotonic"])
def test_what_a_calibration_does_to_test_is_said_and_it_is_kept(run, method):
    for seed, split in enumerate(("valid", "test")):
        write(run, split, *predictions(seed))
    found, said = calibrate(run, STEP, method)
    before, after = (float(part) for part in said.split("test: ")[1].split(", now "))
    assert before > 1.1
    assert after == pytest.approx(1, abs=0.03)
    again = calibrations(json.loads(json.dumps({"label": found.model_dump()})))["label"]
    at = np.linspace(0, 1, 11, dtype=np.float32)
    assert np.array_equal(again.apply(at), found.apply(at))
    assert np.all(np.diff(found.apply(at)) >= 0)


def test_a_further_task_has_a_calibration_of_its_own(run):
    probability, label = predictions(2)
    other = np.where(np.arange(len(label)) % 3, label, -1)
    known = pa.array([None if value < 0 else value for value in other.tolist()], pa.int8())
    write(
        run, "valid", *predictions(3), more={"label_like": known, "probability_like": probability}
    )
    found, said = calibrate(run, STEP, "platt", "like")
    assert said.startswith("calibrated like on valid")
    logits = np.log(probability / (1 - probability))[other >= 0, None].astype(np.float64)
    line = LogisticRegression(C=np.inf, tol=1e-10).fit(logits, label[other >= 0])
    assert found.scale == pytest.approx(line.coef_[0, 0], abs=1e-3)


def test_predictions_of_another_checkpoint_or_of_one_label_do_not_do(run):
    with pytest.raises(UserError, match=r"found none in .*dti-dist evaluate .* --checkpoint 7"):
        calibrate(run, STEP, "platt")
    write(run, "valid", *predictions(0, 100), checkpoint="step-00000006")
    with pytest.raises(UserError, match=r"--calibrate isotonic: expected predictions of valid by"):
        calibrate(run, STEP, "isotonic")
    write(run, "valid", *predictions(0, 100, labels=1), prompt="streaming")
    with pytest.raises(UserError, match="expected both labels among the targets of valid"):
        calibrate(run, STEP, "platt")
