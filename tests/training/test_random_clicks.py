"""Clicks that were dealt at random: what a model trained on them predicts is a leak."""

import json

import pytest

from dti_dist.cli import main
from tests.launching import job, run, write_config

pytestmark = pytest.mark.slow


def interval(folder, requests, policy):
    """That of the AUC on test of a model that was trained on requests of two with one click."""
    size = ["--users", "200", "--requests-per-user", "10", "--shown", "2", "--taste", "0"]
    data = str(folder / "data")
    assert main(["prepare", "synthetic", *size, "--requests", requests, "--out", data]) == 0
    config = write_config(
        folder / "config.yaml",
        data,
        sample={"context": 4, "targets": 20},
        template={"item": "{title}", "time_gaps": True},
        pack={"length": 512},
        attention={"policy": policy},
        training={"max_steps": None, "global_batch_packs": 2, "learning_rate": 0.01},
    )
    run(job(1, config), folder / "log")
    options = ["--no-valid-threshold", "--no-pictures"]
    assert main(["evaluate", str(folder / "run"), *options]) == 0
    return json.loads((folder / "run" / "eval" / "test.json").read_text())["intervals"]["auc"]


def test_a_model_learns_to_predict_them_from_labels_of_their_request(tmp_path):
    low, _ = interval(tmp_path, "none", "budget")
    assert low > 0.7


@pytest.mark.parametrize("policy", ["windowed", "isolated"])
def test_with_requests_it_learns_nothing_under_the_loosest_and_the_strictest_policy(
    policy, tmp_path
):
    low, high = interval(tmp_path, "time", policy)
    assert low < 0.5 < high
