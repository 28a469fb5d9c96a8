"""`dti-dist benchmark quality`: on a made-up MovieLens, stopped and started again."""

from __future__ import annotations

import json
import statistics

import pytest
import yaml

from dti_dist import daily
from dti_dist.benchmarks.quality import quality_table
from dti_dist.benchmarks.scoreboard import BOARDS
from dti_dist.cli import main
from dti_dist.data.dataset import Dataset
from tests.launching import metrics
from tests.movielens import made_up_ratings, write_movielens

SMALL = [
    *("model.scratch.hidden_size=16", "model.scratch.intermediate_size=16"),
    *("model.scratch.layers=1", "model.scratch.heads=2", "model.scratch.key_value_heads=1"),
    *("model.scratch.vocab_size=300", "training.device=cpu", "training.cpu_threads=1"),
    *("training.epochs=1", "training.log_every=1", "pack.length=1024"),
]


@pytest.fixture
def here(monkeypatch):
    """Trainings and evaluations run in this process; gives their commands. One that stands in
    `stopping` does not run."""
    ran, stopping = [], []

    def in_process(launch, words):
        if any(word in words for word in stopping):
            return 75
        ran.append(words)
        return main(words)

    monkeypatch.setattr(daily, "start", in_process)
    return ran, stopping


@pytest.fixture
def movielens(tmp_path):
    write_movielens(tmp_path / "ml", made_up_ratings())
    return tmp_path / "ml"


@pytest.mark.slow
def test_it_goes_on_where_it_was_stopped_and_gives_the_mean_of_its_seeds(
    movielens, here, tmp_path, capsys
):
    ran, stopping = here
    out = tmp_path / "out"
    command = ["benchmark", "quality", "rella-ml1m", *SMALL, "--seeds", "3,5", "--out", str(out)]
    assert main(command) == 2
    assert "expected either --ml1m PATH or --download" in " ".join(capsys.readouterr().err.split())
    stopping += ["seed=5"]
    assert main([*command, "--ml1m", str(movielens), "--json"]) == 75
    assert [words[0] for words in ran] == ["train", "evaluate"]
    stopping.clear()
    assert main([*command, "--json"]) == 0  # the split is there
    result = json.loads((out / "test.json").read_text())
    assert [words[0] for words in ran] == ["train", "evaluate"] * 2
    capsys.readouterr()
    assert main(command) == 0
    assert len(ran) == 4, "all was done"
    assert "These are not the rows of the published split" in capsys.readouterr().out

    evaluated = [json.loads((out / f"seed-{seed}/eval/test.json").read_text()) for seed in (3, 5)]
    for name, found in result["metrics"].items():
        values = [figures[name] for figures in evaluated]
        assert found["mean"] == pytest.approx(statistics.mean(values))
        assert found["deviation"] == pytest.approx(statistics.stdev(values))
        low, high = found["interval"]
        assert low < found["mean"] < high
    for found, floor in zip(
        result["floors"].values(), evaluated[0]["floors"].values(), strict=True
    ):
        assert {name: found[name] for name in ("auc", "log_loss")} == pytest.approx(
            {name: floor[name] for name in ("auc", "log_loss")}
        )
    assert [of["seed"] for of in result["seeds"]] == [3, 5]
    assert all(of["training_s"] > 0 for of in result["seeds"])

    counts = {}
    for user, *_ in made_up_ratings():
        counts[user] = counts.get(user, 0) + 1
    targets = sum(max(count - 5, 0) for count in counts.values())
    train, valid = int(0.8 * targets), int(0.1 * targets)
    assert result["targets"] == targets - train - valid
    trained = sum(line["targets"] for line in metrics(out / "seed-3") if "loss" in line)
    assert trained == train, "the first five of a user are no targets"


@pytest.mark.slow
def test_other_settings_are_refused_where_runs_have_begun(movielens, here, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["benchmark", "quality", "collm-ml1m", *SMALL, "--seeds", "0", "--out", str(out)]
    command += ["--ml1m", str(movielens), "--split", "valid"]
    assert main([*command, "seed=3"]) == 2
    assert "seed=3: expected a setting of the model; --seeds says it" in capsys.readouterr().err
    assert main(command) == 0
    assert (out / "valid.json").exists()
    assert not (out / "test.json").exists()
    before = (out / "config.yaml").read_text()
    assert yaml.safe_load(before)["sample"]["min_context"] == 0
    capsys.readouterr()
    assert main([*command, "training.learning_rate=0.5"]) == 2
    assert "training.learning_rate: 0.002 there, 0.5 now" in capsys.readouterr().err
    assert (out / "config.yaml").read_text() == before
    assert main(["benchmark", "quality", "rella-ml1m", "--out", str(out)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "expected the split rella-ml1m with --requests none, found collm-ml1m with none" in said


@pytest.mark.slow
def test_by_request_a_target_sees_nothing_of_its_own_second(movielens, here, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["benchmark", "quality", "collm-ml1m", *SMALL, "--seeds", "0", "--out", str(out)]
    command += ["--ml1m", str(movielens), "--requests", "time"]
    assert main(command) == 0
    assert "Ours see nothing of a target's own second" in capsys.readouterr().out
    assert Dataset.open(str(out / "data")).has_requests
    command[2], command[-4:] = "rella-ml1m", ["--ml1m", str(movielens), "--requests", "time"]
    command[command.index(str(out))] = str(tmp_path / "other")
    assert main(command) == 2
    assert "expected a split that never parts ratings" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("protocol", BOARDS)
def test_the_row_stands_beside_the_published_ones_with_their_sources(protocol):
    metric = {"mean": 0.75, "interval": [0.7, 0.8], "deviation": None}
    metrics_of = dict.fromkeys(("auc", "uauc", "log_loss"), metric)
    seed = {
        "seed": 0,
        **dict.fromkeys(metrics_of, 0.75),
        "intervals": {name: [0.7, 0.8] for name in metrics_of},
        "checkpoint": "step-1",
        "training_s": 1.0,
        "parameters": 1_000,
        "devices": {"cpu": 1},
        "versions": {"torch": "2"},
    }
    result = {
        "date": "2026-11-28",
        "command": "dti-dist",
        "protocol": protocol,
        "is_exact": True,
        "split": "test",
        "requests": "none",
        "targets": 10,
        "users": 2,
        "users_with_both_labels": 1,
        "metrics": metrics_of,
        "seeds": [seed],
        "floors": {},
        "config": {"model": {"name": "scratch"}, "sample": {"context": 10}},
    }
    lines = quality_table(result).splitlines()
    for model, figures, source in BOARDS[protocol].rows:
        (line,) = [line for line in lines if line.startswith(f"{model}  ")]
        assert [f"{figure:.4f}" in line for figure in figures] == [True, True]
        assert line.endswith(source)
    others = quality_table(result | {"is_exact": False})
    assert not any(model in others for model, *_ in BOARDS[protocol].rows)
