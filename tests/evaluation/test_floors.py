"""Floors: fitted on train, measured on the targets of an evaluation, kept, and shown."""

import json
import random
import shutil
from contextlib import redirect_stderr
from io import StringIO

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score

from dti_dist.cli import main
from dti_dist.data.dataset import BadShard, Dataset
from dti_dist.data.samples import SampleSettings
from dti_dist.errors import UserError
from dti_dist.evaluation import evaluate as evaluation
from dti_dist.evaluation.counts import count_before
from dti_dist.evaluation.floors import find_floors
from dti_dist.evaluation.labels import FLOORS, worse_than_regression
from dti_dist.evaluation.summary import floors_table
from dti_dist.sql import open_workspace
from tests.data.test_dataset_format import damage_middle_of_row_group
from tests.data.test_prepare_events import START, build, write_items
from tests.launching import run_dir
from tests.reporting.run_folders import beside_floors

SETTINGS = SampleSettings(n=5, k=8, min_context=1)


def find(uri, folder, split="test", settings=SETTINGS, skip_bad=False):
    with open_workspace(str(folder)) as workspace:
        return find_floors(
            workspace.connection,
            folder,
            workspace.folder,
            Dataset.open(str(uri), check_files=False),
            split,
            settings,
            skip_bad,
        )


def counts_of(uri, split, settings=SETTINGS):
    """Columns of the table counts."""
    with open_workspace() as workspace:
        count_before(workspace.connection, Dataset.open(str(uri)), split, settings)
        return workspace.connection.sql(
            f"SELECT * FROM counts WHERE split = '{split}' ORDER BY row, position"
        ).fetchnumpy()


def test_floors_are_rates_and_a_logistic_regression_of_counts(synthetic, tmp_path):
    found = find(synthetic, tmp_path)
    train, test = (counts_of(synthetic, split) for split in ("train", "test"))
    rate = train["label"].mean()
    assert found.fit.targets == len(train["label"])
    assert found.fit.rate == pytest.approx(rate)

    def rates(counts, name, prior):
        return (counts[f"{name}_clicks"] + prior * rate) / (counts[f"{name}_count"] + prior)

    def features(counts):
        logits = [
            np.log(p / (1 - p))
            for name, prior in found.fit.priors.items()
            for p in [rates(counts, name, prior)]
        ]
        return np.column_stack(
            [*logits, *(np.log1p(counts[f"{name}_count"]) for name in ("item", "user"))]
        )

    for name, chosen in found.fit.priors.items():
        losses = {
            prior: log_loss(train["label"], rates(train, name, prior))
            for prior in (1, 3, 10, 30, 100, 300, 1_000)
        }
        assert losses[chosen] == min(losses.values())
    model = LogisticRegression(tol=1e-8, max_iter=1_000).fit(features(train), train["label"])
    expected = {
        "train_rate": np.full(len(test["label"]), rate),
        "item_rate": rates(test, "item", found.fit.priors["item"]),
        "user_rate": rates(test, "user", found.fit.priors["user"]),
        "regression": model.predict_proba(features(test))[:, 1],
    }
    kept = pq.read_table(found.file)
    for name in ("row", "position"):
        assert np.array_equal(kept[name], test[name])
    assert list(expected) == list(FLOORS)
    for name in FLOORS:
        np.testing.assert_allclose(kept[name], expected[name], rtol=0, atol=1e-4)
    assert roc_auc_score(test["label"], kept["regression"]) > 0.6


def random_labels(items, seed=0):
    """Clicks without a cause, each item shown as often as another; about three times for 4,000."""
    rng = random.Random(seed)
    return [
        (f"u{n % 300}", f"i{rng.randrange(items)}", START + 100 * n, rng.choice([1, 5]))
        for n in range(12_000)
    ]


def test_clicks_without_a_cause_teach_nothing(tmp_path):
    """An item's rate that holds the target's own label, or later ones of its request, would."""
    names = write_items(tmp_path / "items.parquet", [f"i{n}" for n in range(4_000)])
    build(tmp_path, random_labels(4_000), items=names)
    kept = pq.read_table(find(tmp_path / "out", tmp_path).file)
    labels = counts_of(tmp_path / "out", "test")["label"]
    at_best = log_loss(labels, kept["train_rate"])
    assert log_loss(labels, kept["regression"]) < at_best + 0.005
    assert np.std(kept["regression"]) < 0.05


def test_floors_are_kept_for_the_same_data_and_settings(synthetic, tmp_path, capsys):
    first = find(synthetic, tmp_path)
    written = first.file.stat().st_mtime_ns
    assert "fitting floors" in capsys.readouterr().err
    again = find(synthetic, tmp_path)
    assert again == first
    assert first.file.stat().st_mtime_ns == written
    assert capsys.readouterr().err == ""
    assert find(synthetic, tmp_path, "valid").file != first.file
    other = find(synthetic, tmp_path, settings=SampleSettings(n=2, k=8, min_context=1))
    assert other.file == first.file
    assert other.fit != first.fit
    other.file.write_bytes(b"broken")
    assert find(synthetic, tmp_path) == first
    assert not [path for path in tmp_path.iterdir() if path != first.file and "test" in path.name]


def test_what_cannot_be_read_is_passed_over_and_the_rest_not_kept(tmp_path, capsys):
    options = {"shard_interactions": 2_000, "row_group_interactions": 500}
    build(tmp_path, random_labels(20), **options)
    data, folder = tmp_path / "out", tmp_path / "eval"
    parts = sorted((data / "train").iterdir())
    whole = find(data, folder)
    damage_middle_of_row_group(parts[0], 1)
    parts[1].unlink()
    whole.file.unlink()
    with pytest.raises(BadShard, match=parts[0].name):
        find(data, folder)
    capsys.readouterr()
    assert find(data, folder, skip_bad=True).fit.targets < whole.fit.targets
    assert list(folder.iterdir()) == []
    said = capsys.readouterr().err
    assert said.count("left out of the counts of train") == 2


def test_clicks_alone_in_train_have_no_floors(tmp_path, capsys):
    build(tmp_path, random_labels(20), label="rating >= 0")
    assert find(tmp_path / "out", tmp_path) is None
    assert "no floors: the targets of train have not both labels" in capsys.readouterr().err


# Beside an evaluation.


@pytest.fixture(scope="module")
def evaluated(uninterrupted, tmp_path_factory):
    """The folder of a run that was evaluated beside floors, and what was printed."""
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    shutil.copytree(run_dir(uninterrupted[0]), folder)
    with redirect_stderr(StringIO()) as said:
        assert main(["evaluate", str(folder), "--no-valid-threshold", "--no-pictures"]) == 0
    return folder, said.getvalue()


def figures_of(folder):
    return json.loads((folder / "eval" / "test.json").read_text())


@pytest.mark.slow
def test_floors_are_measured_on_the_targets_of_the_evaluation(evaluated):
    folder, said = evaluated
    figures = figures_of(folder)
    predicted, kept = (
        pq.read_table(folder / "eval" / f"test.{name}.parquet").sort_by(
            [("row", "ascending"), ("position", "ascending")]
        )
        for name in ("sliding_window.predictions", "floors")
    )
    assert predicted.select(["row", "position"]) == kept.select(["row", "position"])
    label = predicted["label"].to_numpy()
    for name in FLOORS:
        probability = kept[name].to_numpy().astype(np.float64)
        found = figures["floors"][name]
        assert found["auc"] == pytest.approx(roc_auc_score(label, probability), abs=1e-9)
        assert found["log_loss"] == pytest.approx(log_loss(label, probability), abs=1e-9)
        assert found["ne"] == pytest.approx(
            found["log_loss"] * figures["ne"] / figures["log_loss"], abs=1e-9
        )
    assert figures["floors"]["train_rate"]["auc"] == 0.5
    for name in ("auc", "log_loss", "ne"):
        found = figures["model_minus_regression"][name]
        difference = figures[name] - figures["floors"]["regression"][name]
        assert found["difference"] == pytest.approx(difference, abs=1e-12)
        assert found["interval"][0] < difference < found["interval"][1]
    assert floors_table(figures) in said
    worse = worse_than_regression(figures)
    assert (f"WARNING: {worse}" in said) == (worse is not None)


@pytest.mark.slow
def test_floors_can_be_left_out_and_are_found_again(evaluated, capsys):
    folder, _ = evaluated
    quick = ["--no-valid-threshold", "--no-pictures", "--bootstrap", "0"]
    assert main(["evaluate", str(folder), *quick, "--prompt", "streaming"]) == 0
    said = capsys.readouterr().err
    assert "fitting floors" not in said
    assert "regression on five counts" in said
    assert "95 %" not in said
    streaming = json.loads((folder / "eval" / "test.streaming.json").read_text())
    sliding = json.loads((folder / "eval" / "test.sliding_window.json").read_text())
    assert streaming["floors"] == sliding["floors"]
    assert streaming["model_minus_regression"]["auc"]["interval"] is None
    assert main(["evaluate", str(folder), *quick, "--split", "valid", "--no-floor"]) == 0
    assert "regression" not in capsys.readouterr().err
    assert not {"floors", "floors_fit", "model_minus_regression"} & set(
        json.loads((folder / "eval" / "valid.json").read_text())
    )
    assert not (folder / "eval" / "valid.floors.parquet").exists()


@pytest.mark.slow
def test_an_evaluation_goes_on_where_floors_cannot_be_had(evaluated, monkeypatch, capsys):
    def full(*_, **__):
        raise UserError("counting interactions ran out of memory or disk")

    folder, _ = evaluated
    monkeypatch.setattr(evaluation, "find_floors", full)
    quick = ["--no-valid-threshold", "--no-pictures", "--bootstrap", "0", "--split", "valid"]
    assert main(["evaluate", str(folder), *quick]) == 0
    assert "no floors: counting interactions ran out of memory" in capsys.readouterr().err
    assert "floors" not in json.loads((folder / "eval" / "valid.json").read_text())


@pytest.mark.slow
def test_a_comparison_shows_floors_of_the_same_targets(evaluated, tmp_path, capsys):
    folder, _ = evaluated
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    kept = other / "eval" / "test.sliding_window.json"
    figures = json.loads(kept.read_text())
    assert main(["compare", str(other), str(folder)]) == 0
    printed = capsys.readouterr().out
    assert f"regression on five counts  {figures['floors']['regression']['auc']:.4f}" in printed
    floors = figures.pop("floors")
    for changes in ({}, {"floors": {"regression": {"auc": 1.0}}, "targets": 3}):
        kept.write_text(json.dumps(figures | changes))
        assert main(["compare", str(other), str(folder), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["floors"] == floors
        assert main(["compare", str(other), str(other), "--json"]) == 0
        assert "floors" not in json.loads(capsys.readouterr().out)


def test_what_is_said_of_a_model_that_counts_beat():
    assert worse_than_regression(beside_floors(0.02, [0.01, 0.03])) is None
    assert worse_than_regression({"auc": 0.7}) is None
    said = worse_than_regression(beside_floors(-0.02, [-0.03, -0.01]))
    assert said == (
        "the model is worse than the regression on five counts: AUC 0.6800 against 0.7000, "
        "log loss 0.5200 against 0.5000"
    )
    assert "0.7000 (may be chance)" in worse_than_regression(beside_floors(-0.02, [-0.05, 0.01]))
    assert "0.7000, " in worse_than_regression(beside_floors(-0.02, None))
