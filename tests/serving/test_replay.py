"""A log of impressions, prepared, evaluated and replayed: all three agree on every target."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dti_dist.cli import main
from dti_dist.data.dataset import iter_sequences
from dti_dist.data.stream import PackStream, Share
from dti_dist.serving.pretrained import load_exported
from tests.export.exported import export_random_weights, target_scores

ITEMS, USERS, REQUESTS = 400, 40, 12
SIZES = [1, 2, 3, 5, 8, 10]


@pytest.fixture(scope="module")
def impressions(tmp_path_factory):
    """Requests of 1 to 300 items, one to three of them clicked, as `prepare events` reads them."""
    folder = tmp_path_factory.mktemp("impressions")
    rng = np.random.default_rng(0)
    rows = []
    for user in range(USERS):
        for request in range(REQUESTS):
            size = 300 if (user, request) in [(3, 11), (5, 4)] else int(rng.choice(SIZES))
            clicked = rng.choice(size, min(size, int(rng.integers(0, 4))), replace=False)
            time = 1_700_000_000 + request * 90_000 + int(rng.integers(0, 80_000))
            rows += [
                {
                    "user": f"u{user}",
                    "request": f"{user}-{request}",
                    "item": f"i{item}",
                    "time": time + int(rng.integers(0, 30)),
                    "click": place in clicked,
                }
                for place, item in enumerate(rng.choice(ITEMS, size, replace=False))
            ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "log.parquet")
    titles = [f"{['red', 'blue', 'green'][i % 3]} thing {i}" for i in range(ITEMS)]
    items = {"item": [f"i{i}" for i in range(ITEMS)], "title": titles}
    pq.write_table(pa.table(items), folder / "items.parquet")
    command = ["prepare", "events", f"{folder}/log.parquet", "--items", f"{folder}/items.parquet"]
    command += ["--user-col", "user", "--item-col", "item", "--time-col", "time"]
    command += ["--request-col", "request", "--label", "click", "--history", "label = 1"]
    command += ["--text-cols", "title", "--out", str(folder / "data")]
    assert main(command) == 0
    return folder / "data"


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
