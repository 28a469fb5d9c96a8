"""Training on a part of the negatives, predicting of all of them."""

import json

import pytest

from dti_dist import Scorer
from dti_dist.cli import main
from dti_dist.data.dataset import Dataset
from tests.launching import job, run, write_config

pytestmark = pytest.mark.slow


def test_calibration_is_of_the_true_traffic_in_evaluation_scoring_and_export(tmp_path):
    data = str(tmp_path / "data")
    size = ["--users", "600", "--requests-per-user", "12", "--shown", "8"]
    slates = ["--clicks", "independent", "--taste", "3", "--keep-negatives", "0.1"]
    assert main(["prepare", "synthetic", *size, *slates, "--out", data]) == 0
    counts = Dataset.open(data).manifest.counts.splits
    train, test = counts["train"], counts["test"]
    true_rate = test.clicks / test.targets
    others = 8 * 600 * 12 * 0.8 - train.clicks
    assert (train.targets - train.clicks) / others == pytest.approx(0.1, abs=0.01)
    config = write_config(
        tmp_path / "config.yaml",
        data,
        sample={"context": 6, "targets": 20},
        template={"item": "{title}"},
        pack={"length": 1024},
        attention={"policy": "isolated"},
        training={"max_steps": None, "global_batch_packs": 2, "learning_rate": 0.005},
    )
    run(job(1, config), tmp_path / "log")
    folder = tmp_path / "run"
    assert main(["evaluate", str(folder), "--no-valid-threshold", "--no-pictures"]) == 0
    figures = json.loads((folder / "eval" / "test.json").read_text())
    assert figures["label_rate"] == pytest.approx(true_rate, abs=0.01)
    assert figures["calibration_ratio"] == pytest.approx(1, abs=0.08)  # uncorrected, above 2
    assert main(["export", str(folder), "--out", str(tmp_path / "exported")]) == 0
    assert "keep_negatives" in (tmp_path / "exported" / "README.md").read_text()
    history, shown = [("i1", 1), ("i2", 1)], ["i3", "i5", "i8"]
    scores = [
        Scorer.from_pretrained(place, data=data).score(history, shown)
        for place in (folder, tmp_path / "exported")
    ]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    assert max(scores[0]) < 5 * true_rate
