"""From a trained run to figures, predictions, pictures and comparisons."""

import json
import re
import shutil
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import f1_score

from dti_dist.cli import main
from dti_dist.config import load_config
from dti_dist.data import storage
from dti_dist.data.dataset import Dataset, iter_sequences
from dti_dist.data.stream import PackStream, Share
from dti_dist.evaluation import evaluate as evaluation
from dti_dist.evaluation.predict import predict
from dti_dist.evaluation.request_metrics import REQUEST_METRICS
from dti_dist.inputs import Inputs
from dti_dist.ranks import Ranks
from dti_dist.runs.folder import RunFolder
from dti_dist.runs.trained import choose_checkpoint, trained_model
from tests.launching import job, run, run_dir
from tests.metrics_oracle import click_metrics, request_metrics
from tests.s3_server import s3_server

pytestmark = pytest.mark.slow
ONE = Ranks(0, 1, 0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def trained(uninterrupted, tmp_path_factory):
    """The folder of a trained run that tests of this file may evaluate."""
    copy = tmp_path_factory.mktemp("evaluated") / "run"
    shutil.copytree(run_dir(uninterrupted[0]), copy)
    return copy


@pytest.fixture(scope="module")
def evaluated(trained):
    """Its figures after an evaluation on test."""
    assert main(["evaluate", str(trained)]) == 0
    return json.loads((trained / "eval" / "test.json").read_text())


def kept_predictions(folder, split="test", prompt="sliding_window"):
    return pq.read_table(folder / "eval" / f"{split}.{prompt}.predictions.parquet")


def predictions(folder, split="test", k=1):
    run = RunFolder(folder)
    inputs = Inputs.open(run.read_config(), run.tokenizer)
    model = trained_model(inputs, choose_checkpoint(run, "best"))
    return predict(model, PackStream(inputs.stream_plan(split, k=k), Share(1, 1)), ONE)


def test_evaluate_prints_json_and_keeps_it(trained, capsys):
    assert main(["evaluate", str(trained), "--slice", "day", "--bootstrap", "50"]) == 0
    printed = capsys.readouterr()
    kept = json.loads((trained / "eval" / "test.json").read_text())
    assert json.loads(printed.out) == kept
    assert "95 % over users" in printed.err
    assert "calibration ratio" in printed.err
    assert kept["prompt"] == "sliding_window"
    assert kept["ceiling"] > kept["auc"]
    assert sum(entry["targets"] for entry in kept["slices"]["day"]) == kept["targets"]
    config = load_config(trained / "config.yaml")
    assert kept["targets"] == Dataset.open(config.data.path).manifest.counts.splits["test"].targets


def test_evaluate_refreshes_the_report_of_the_run(trained, capsys, monkeypatch):
    command = ["evaluate", str(trained), "--split", "valid", "--bootstrap", "0"]
    report = trained / "report.html"
    report.unlink(missing_ok=True)
    assert main(command) == 0
    assert not report.exists()

    assert main(["report", str(trained)]) == 0
    report.write_text("an old report")
    capsys.readouterr()
    assert main(command) == 0
    assert f"wrote {report}" in capsys.readouterr().err
    assert "valid" in report.read_text()
    assert "Not evaluated yet" not in report.read_text()

    def full(folder):
        raise OSError("No space left on device")

    monkeypatch.setattr("dti_dist.reporting.report.write_report", full)
    assert main(command) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["split"] == "valid"
    assert f"{report} was not refreshed: No space left on device." in printed.err


def test_figures_are_those_of_all_predictions_in_memory(trained, evaluated):
    found = predictions(trained)
    expected = click_metrics(found.label, found.probability, found.row)
    for name, value in expected.items():
        assert evaluated[name] == pytest.approx(value, abs=1e-9), name
    low, high = evaluated["intervals"]["auc"]
    assert low < expected["auc"] < high


def test_the_threshold_of_f1_is_chosen_on_valid(trained, evaluated, capsys):
    valid, test = predictions(trained, "valid"), predictions(trained)
    tried = {
        float(t): f1_score(valid.label, valid.probability >= t) for t in valid.probability.tolist()
    }
    threshold = evaluated["valid_threshold"]
    assert tried[threshold] == max(tried.values())
    assert evaluated["f1_valid_threshold"] == pytest.approx(
        f1_score(test.label, test.probability >= np.float32(threshold)), abs=1e-9
    )
    wanted = ["--no-valid-threshold", "--no-pictures", "--bootstrap", "0"]
    assert main(["evaluate", str(trained), *wanted]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["f1_valid_threshold"] is figures["valid_threshold"] is None
    assert figures["intervals"] is None
    assert figures["f1"] == evaluated["f1"]


def test_predictions_are_kept_with_what_the_data_says_of_each_target(trained, evaluated):
    rows = kept_predictions(trained).to_pylist()
    assert [(row["row"], row["position"]) for row in rows] == sorted(
        (row["row"], row["position"]) for row in rows
    )
    dataset = Dataset.open(load_config(trained / "config.yaml").data.path)
    source_ids = dataset.items_table()["source_id"].to_pylist()
    sequences = [
        sequence for batch in iter_sequences(dataset, "test") for sequence in batch.rows.to_pylist()
    ]
    for row in rows:
        sequence, at = sequences[row["row"]], row["position"]
        assert row["user_id"] == sequence["user_id"]
        assert row["item_id"] == source_ids[sequence["item_ids"][at]]
        assert row["timestamp"] == sequence["timestamps"][at]
        assert row["label"] == sequence["labels"][at]
    assert np.array_equal([row["probability"] for row in rows], predictions(trained).probability)


def test_pictures_are_drawn_and_nothing_else_is_left(trained, evaluated):
    names = {path.name for path in (trained / "eval").iterdir()}
    stem = "test.sliding_window"
    assert names >= {f"{stem}.reliability.png", f"{stem}.roc.png", f"{stem}.json", "test.json"}
    assert not [name for name in names if name.startswith(".")]
    for name in ("reliability", "roc"):
        assert (trained / "eval" / f"{stem}.{name}.png").read_bytes().startswith(b"\x89PNG")


def test_both_kinds_of_prompt_give_the_same_predictions_under_budget(trained, evaluated):
    assert main(["evaluate", str(trained), "--prompt", "streaming", "--bootstrap", "0"]) == 0
    sliding, streaming = (
        kept_predictions(trained, prompt=p) for p in ("sliding_window", "streaming")
    )
    assert sliding.drop("probability") == streaming.drop("probability")
    one, other = (table["probability"].to_numpy() for table in (sliding, streaming))
    np.testing.assert_allclose(one, other, atol=1e-5)
    assert one.std() > 1e-3


def test_two_ranks_evaluate_like_one(trained, evaluated, tmp_path):
    one = kept_predictions(trained)
    text = run(job(2, "evaluate", trained, module="dti_dist"), tmp_path / "two")
    figures = json.loads(text[text.index("{") : text.rindex("}") + 1])
    assert figures["targets"] == evaluated["targets"]
    assert figures["auc"] == pytest.approx(evaluated["auc"], abs=1e-9)
    assert figures["log_loss"] == pytest.approx(evaluated["log_loss"], abs=1e-6)
    both = kept_predictions(trained)
    assert both.drop("probability") == one.drop("probability")
    one, both = (table["probability"].to_numpy() for table in (one, both))
    np.testing.assert_allclose(one, both, rtol=0, atol=1e-6)


IN_PARTS = """
import sys
import torch
from dti_dist import cli
from dti_dist.evaluation import evaluate, spool

original = evaluate.spool

def spool_and_look(model, *arguments):
    held = sum(p.ds_tensor.numel() for p in model.parameters() if not p.ds_persist)
    whole = sum(p.ds_numel for p in model.parameters() if not p.ds_persist)
    print(f"holds {held} of {whole}", flush=True)
    if sys.argv[2:] and torch.distributed.get_rank() == 1:
        spool._refuse_nan = lambda found: (_ for _ in ()).throw(cli.UserError("rank 1 gave up"))
    return original(model, *arguments)

evaluate.spool = spool_and_look
cli.run(["evaluate", sys.argv[1], "--bootstrap", "0"])
"""


@pytest.mark.slow
def test_under_zero_3_each_rank_holds_a_part_and_one_that_fails_ends_all(trained, tmp_path):
    script = tmp_path / "in_parts.py"
    script.write_text(IN_PARTS)
    text = run(job(2, trained, script=script), tmp_path / "log")
    held, whole = map(int, re.search(r"holds (\d+) of (\d+)", text).groups())
    assert whole / 2 <= held < whole / 2 + 100
    text = run(job(2, trained, "fail", script=script), tmp_path / "failed", expect=2)
    assert text.count("rank 1 gave up") == 1
    assert "Traceback" not in text


def test_a_data_set_in_s3_gives_the_same_figures(trained, evaluated, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder, ignore=shutil.ignore_patterns("eval"))
    on_disk = Path(load_config(folder / "config.yaml").data.path)
    with s3_server(tmp_path / "server") as server:
        for path in on_disk.rglob("*"):
            place = path.relative_to(on_disk)
            if path.is_file() and place.parts[0] != "cache":
                storage.upload(str(path), server.uri(f"shop/{place}"))
        config = (folder / "config.yaml").read_text()
        config = config.replace(str(on_disk), server.uri("shop"))
        (folder / "config.yaml").write_text(
            config.replace("cache_dir: null", f"cache_dir: {tmp_path}/cache")
        )
        copy = server.uri("predictions/test.parquet")
        assert main(["evaluate", str(folder), "--predictions", copy]) == 0
        assert server.uri("shop") in (folder / "config.yaml").read_text()
        written = storage.read_bytes(copy)
    assert written == (folder / "eval/test.sliding_window.predictions.parquet").read_bytes()
    capsys.readouterr()
    assert json.loads((folder / "eval" / "test.json").read_text()) == evaluated


def test_max_targets_takes_whole_users(trained, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    assert main(["evaluate", str(copy), "--max-targets", "40"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert 40 <= figures["targets"] < 60


@pytest.mark.parametrize("where", ["local", "url"])
def test_predictions_are_copied_where_the_user_says(trained, evaluated, tmp_path, where):
    uri = str(tmp_path / "new" / "p.parquet") if where == "local" else "memory://eval/p.parquet"
    assert main(["evaluate", str(trained), "--predictions", uri, "--bootstrap", "0"]) == 0
    with fsspec.open(uri) as file:
        assert pq.read_table(file) == kept_predictions(trained)
    if where == "local":
        assert [path.name for path in (tmp_path / "new").iterdir()] == ["p.parquet"]


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        (["--slice", "titel"], "Did you mean 'title'?"),
        (["--predictions", "/tmp"], "found the folder /tmp"),
        (["--checkpoint", "7"], "There are: best, last, "),
    ],
)
def test_wishes_that_cannot_be_met_are_refused_before_any_work(trained, wish, message, capsys):
    assert main(["evaluate", str(trained), *wish]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "targets by" not in said


@pytest.mark.parametrize("arguments", [["evaluate", "RUN"], ["compare", "RUN", "RUN"]])
def test_a_folder_that_is_no_run_is_refused(arguments, tmp_path, capsys):
    assert main([str(tmp_path) if word == "RUN" else word for word in arguments]) == 2
    assert "is not a run's folder" in capsys.readouterr().err


def test_an_evaluation_that_fails_leaves_everything_as_it_was(trained, evaluated, monkeypatch):
    before = {path.name: path.stat().st_mtime_ns for path in (trained / "eval").iterdir()}
    monkeypatch.setattr(evaluation, "measure", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluation.evaluate(str(trained))
    after = {path.name: path.stat().st_mtime_ns for path in (trained / "eval").iterdir()}
    assert after == before


# Comparisons.


@pytest.fixture
def two_runs(trained, evaluated, tmp_path):
    """The run, and one whose predictions are better, under the same targets."""
    other = tmp_path / "other"
    shutil.copytree(trained, other)
    file = other / "eval" / "test.sliding_window.predictions.parquet"
    table = pq.read_table(file)
    label, probability = (table[name].to_numpy() for name in ("label", "probability"))
    better = np.clip(probability + 0.2 * (label - 0.5), 0, 1).astype(np.float32)
    place = table.schema.get_field_index("probability")
    # In another order too: targets are paired by what they are.
    table = table.set_column(place, table.schema.field(place), [better])
    pq.write_table(table.take(np.arange(len(table))[::-1]), file)
    return trained, other


def compare(*arguments):
    return main(["compare", *map(str, arguments)])


def test_compare_tells_a_better_run_from_noise(two_runs, capsys):
    assert compare(*two_runs, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    auc = found["differences"]["auc"]
    assert auc["difference"] == pytest.approx(found["b"]["auc"] - found["a"]["auc"])
    assert 0 < auc["interval"][0] < auc["difference"] < auc["interval"][1]
    assert auc["p_value"] < 0.01
    assert found["differences"]["log_loss"]["difference"] < 0
    assert compare(two_runs[0], two_runs[0]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[0] == "auc" and line.split()[-1] == "1.0000" for line in lines if line)


def test_compare_refuses_other_targets_and_says_how_many(two_runs, capsys):
    one, other = two_runs
    file = other / "eval" / "test.sliding_window.predictions.parquet"
    table = pq.read_table(file)
    pq.write_table(table.slice(5), file)
    assert compare(one, other) == 2
    said = capsys.readouterr().err
    assert f"{len(table) - 5:,} are in both, 5 only in A, 0 only in B" in said
    assert "Evaluate both runs again" in said
    assert main(["evaluate", str(other), "--max-targets", "40", "--bootstrap", "0"]) == 0
    capsys.readouterr()
    assert compare(one, other) == 2
    assert "--max-targets was not given for A and 40 for B" in capsys.readouterr().err


def test_compare_of_a_run_that_was_not_evaluated_names_the_command(two_runs, capsys):
    one, other = two_runs
    shutil.rmtree(other / "eval")
    assert compare(one, other) == 2
    expected = f"dti-dist evaluate {other} --split test --prompt sliding_window"
    assert expected in capsys.readouterr().err
    (other / "eval").mkdir()
    (other / "eval" / "test.sliding_window.predictions.parquet").write_text("broken")
    assert compare(one, other) == 2
    assert "broken file" in capsys.readouterr().err


def test_what_a_user_should_know_of_checkpoint_and_data_is_said_on_stderr(
    trained, tmp_path, capsys
):
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    few = ["evaluate", str(copy), "--max-targets", "30", "--bootstrap", "0", "--no-pictures"]
    few += ["--no-floor"]
    assert main(few) == 0
    assert "WARNING" not in capsys.readouterr().err
    manifest = json.loads((copy / "dataset.json").read_text())
    for path, entry in manifest["files"].items():
        if path.startswith("train/"):
            entry["sha256"] = "0" * 64
    (copy / "dataset.json").write_text(json.dumps(manifest))
    (copy / "checkpoints" / "best.json").unlink()
    assert main(few) == 0
    said = capsys.readouterr().err
    assert (
        "holds another data set than the one that the run was trained on: its train differs" in said
    )
    assert "The last checkpoint is taken instead, step-00000020" in said
    assert main([*few, "--checkpoint", "best"]) == 2
    assert "expected the best checkpoint by validation" in capsys.readouterr().err


# Requests.


def with_requests(folder, out, seconds):
    """A copy of a data set in which what a user has in so many seconds is a request."""
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("cache"))
    manifest = json.loads((out / "dataset.json").read_text())
    for name, entry in manifest["files"].items():
        if not name.startswith("items/"):
            table = pq.read_table(out / name)
            times = [[t - t % seconds for t in row] for row in table["timestamps"].to_pylist()]
            at = table.schema.get_field_index("timestamps")
            field = table.schema.field(at)
            pq.write_table(table.set_column(at, field, pa.array(times, field.type)), out / name)
            entry["bytes"] = (out / name).stat().st_size
    (out / "dataset.json").write_text(json.dumps(manifest | {"requests": {"by": "time"}}))


def test_metrics_by_request_from_evaluation_to_comparison_and_report(
    trained, evaluated, tmp_path, capsys
):
    assert not evaluated.keys() & {*REQUEST_METRICS, "requests"}
    data, one, other = tmp_path / "data", tmp_path / "run", tmp_path / "other"
    shutil.copytree(trained, one, ignore=shutil.ignore_patterns("eval"))
    config = (one / "config.yaml").read_text()
    with_requests(Path(load_config(one / "config.yaml").data.path), data, 30 * 86_400)
    path = load_config(one / "config.yaml").data.path
    (one / "config.yaml").write_text(config.replace(path, str(data)))
    slices = ["--slice", "request_size", "--slice", "request_place"]
    assert main(["evaluate", str(one), "--bootstrap", "100", *slices]) == 0
    printed = capsys.readouterr()
    figures = json.loads(printed.out)

    rows = kept_predictions(one).to_pylist()
    requests = {}
    for row in rows:
        request = requests.setdefault((row["row"], row["timestamp"]), [])
        request.append((row["label"], row["probability"]))
    both = [r for r in requests.values() if len({label for label, _ in r}) == 2]
    assert figures["requests"] == len(requests)
    assert figures["requests_of_one_class"] == len(requests) - len(both)
    of_each = [request_metrics(request) for request in both]
    for name in REQUEST_METRICS:
        expected = np.mean([metrics[name] for metrics in of_each])
        assert figures[name] == pytest.approx(expected, abs=1e-9), name
        low, high = figures["intervals"][name]
        assert low <= expected <= high
    assert f"{len(requests):,} requests, of which {len(both):,} have both labels" in printed.err
    places = figures["slices"]["request_place"]
    assert places[0]["targets"] == len(requests)
    low, high = places[0]["intervals"]["auc"]
    assert f" {places[0]['auc']:.4f} ({low:.4f} to {high:.4f}) " in printed.err
    assert "mrr" in figures["slices"]["request_size"][-1]

    shutil.copytree(one, other)
    assert compare(one, other, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    for name in REQUEST_METRICS:
        assert found["differences"][name]["difference"] == pytest.approx(0, abs=1e-12)
        assert found["a"][name] == pytest.approx(figures[name], abs=1e-12)
    assert main(["report", str(one)]) == 0
    report = (one / "report.html").read_text()
    assert "AUC within requests" in report
    assert "By request place" in report


def test_a_run_is_measured_on_another_data_set(trained, evaluated, tmp_path, capsys):
    own = load_config(trained / "config.yaml").data.path
    other, out = tmp_path / "other", tmp_path / "figures"
    with_requests(Path(own), other, 30 * 86_400)
    before = {file.name: file.stat().st_mtime_ns for file in (trained / "eval").iterdir()}
    command = ["evaluate", str(trained), "--bootstrap", "0", "--no-pictures", "--no-floor"]
    assert main([*command, "--data", str(other), "--out", str(out)]) == 0
    printed = capsys.readouterr()
    figures = json.loads(printed.out)
    assert figures["requests"]
    assert figures["targets"] == evaluated["targets"]
    assert "WARNING" not in printed.err
    assert json.loads((out / "test.json").read_text()) == figures
    assert main([*command, "--data", own, "--out", str(out)]) == 0
    assert json.loads(capsys.readouterr().out)["auc"] == evaluated["auc"]
    assert {f.name: f.stat().st_mtime_ns for f in (trained / "eval").iterdir()} == before

    assert main([*command, "--data", own]) == 2
    assert "--data needs --out" in capsys.readouterr().err
    rows = "".join(f"u{i % 2},i{i % 3},{1_700_000_000 + i},{i % 2}\n" for i in range(20))
    (tmp_path / "log.csv").write_text("user,item,time,click\n" + rows)
    (tmp_path / "items.csv").write_text("item,name\ni0,boots\ni1,lamp\ni2,tent\n")
    log = ["prepare", "events", f"{tmp_path}/log.csv", "--items", f"{tmp_path}/items.csv"]
    log += ["--user-col", "user", "--item-col", "item", "--time-col", "time", "--label", "click"]
    assert main([*log, "--text-cols", "name", "--out", str(tmp_path / "log")]) == 0
    capsys.readouterr()
    assert main([*command, "--data", str(tmp_path / "log"), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert "title" in error
    assert "name" in error
