"""A log of impressions, prepared, evaluated and replayed: all three agree on every target."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from dti_dist.cli import main
from dti_dist.data.dataset import iter_sequences
from dti_dist.data.stream import PackStream, Share
from dti_dist.serving.pretrained import load_exported
from tests.export.exported import export_random_weights, target_scores
from tests.impressions import prepare_impressions
from tests.launching import job, run, write_config


@pytest.fixture(scope="module")
def impressions(tmp_path_factory):
    return prepare_impressions(tmp_path_factory.mktemp("impressions"))


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {
            "attention": {"policy": "isolated", "positions": "rope"},
            "template": {"item": "{title}", "time_gaps": True, "prefix": "Will they click?"},
        },
    ],
    ids=["budget", "isolated"],
)
def test_evaluating_a_log_and_replaying_it_agree_on_every_target(
    impressions, tmp_path, capsys, sections
):
    exported, inputs = export_random_weights(
        tmp_path, impressions, pack={"length": 4096}, **sections
    )
    model = load_exported(exported, str(impressions)).model
    sliding = target_scores(model, inputs)
    streaming = {}
    for batch in PackStream(inputs.stream_plan("test"), Share(1, 1)):
        used = (batch.used > 0).nonzero(as_tuple=True)
        probabilities = model(batch)[used].sigmoid().detach().tolist()
        keys = zip(
            batch.target_row[used].tolist(), batch.target_position[used].tolist(), strict=True
        )
        streaming.update(zip(keys, probabilities, strict=True))
    names = inputs.dataset.items_table()["source_id"].to_pylist()
    rows = [r for b in iter_sequences(inputs.dataset, "test") for r in b.rows.to_pylist()]
    requests: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for row, position in sorted(sliding):
        key = rows[row]["user_id"], rows[row]["timestamps"][position]
        requests.setdefault(key, []).append((row, position))
    assert max(map(len, requests.values())) == 300
    table = {
        "user_id": [user for user, _ in requests],
        "timestamp": [time for _, time in requests],
        "candidates": [
            [names[rows[row]["item_ids"][position]] for row, position in targets]
            for targets in requests.values()
        ],
    }
    pq.write_table(pa.table(table), tmp_path / "requests.parquet")
    command = ["score", str(exported), "--data", str(impressions)]
    command += ["--requests", str(tmp_path / "requests.parquet"), "--out", str(tmp_path / "out")]
    assert main(command) == 0
    capsys.readouterr()
    scores = np.concatenate(pq.read_table(tmp_path / "out")["scores"].to_pylist())
    targets = [target for request in requests.values() for target in request]
    assert sliding.keys() == streaming.keys()
    for found in (sliding, streaming):
        assert np.abs(scores - [found[target] for target in targets]).max() < 1e-5
    assert np.std(scores) > 0.01


def test_a_trained_run_is_evaluated_and_replayed_alike(impressions, tmp_path, capsys):
    config = write_config(tmp_path / "config.yaml", impressions, pack={"length": 4096})
    run(job(2, config), tmp_path / "log")
    of_run = str(tmp_path / "run")
    predictions = tmp_path / "predictions.parquet"
    assert main(["evaluate", of_run, "--predictions", str(predictions)]) == 0
    found = pq.read_table(predictions).group_by(["user_id", "timestamp"], use_threads=False)
    found = found.aggregate([("item_id", "list"), ("probability", "list")])
    assert max(map(len, found["item_id_list"].to_pylist())) == 300
    requests = pa.table({name: found[name] for name in ("user_id", "timestamp")})
    requests = requests.append_column("candidates", found["item_id_list"])
    pq.write_table(requests, tmp_path / "requests.parquet")
    command = ["score", of_run, "--requests", str(tmp_path / "requests.parquet")]
    torch.set_num_threads(2)
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    assert torch.get_num_threads() == 1  # training.cpu_threads of the run
    capsys.readouterr()
    scores = np.concatenate(pq.read_table(tmp_path / "out")["scores"].to_pylist())
    expected = np.concatenate(found["probability_list"].to_pylist())
    assert np.abs(scores - expected).max() < 1e-5
    assert np.std(scores) > 1e-3
