"""Pictures of predictions of every shape."""

import duckdb
import numpy as np
import pyarrow as pa
import pytest

from dti_dist.errors import UserError
from dti_dist.evaluation import pictures
from dti_dist.evaluation.bootstrap import draw, intervals, read_groups
from dti_dist.evaluation.curves import histogram, is_skewed, reliability, roc
from dti_dist.evaluation.metrics import measure

pytest.importorskip("matplotlib")
SHAPES = {
    "even": lambda random: random.random(2_000),
    "clicks are rare": lambda random: 1 / (1 + np.exp(5 - 1.5 * random.normal(size=2_000))),
    "certain": lambda random: np.round(random.random(2_000)),
    "constant": lambda random: np.full(2_000, 0.3),
}


@pytest.mark.parametrize("resamples", [0, 50])
@pytest.mark.parametrize("shape", SHAPES)
def test_pictures_are_drawn(shape, resamples, tmp_path):
    random = np.random.default_rng(0)
    probability = SHAPES[shape](random)
    columns = {
        "user": np.arange(2_000) // 4,
        "label": (random.random(2_000) < probability).astype(np.int8),
        "probability": probability.astype(np.float32),
    }
    connection = duckdb.connect(config={"threads": 1})
    connection.register("given", pa.table(columns))
    connection.execute("CREATE TABLE targets AS SELECT * FROM given")
    figures = measure(connection, "targets")
    groups = read_groups(connection, "targets", figures["users"])
    drawn = draw(len(groups), resamples) if resamples else None
    bins = reliability(groups, drawn)
    assert is_skewed(bins) == (shape == "clicks are rare")
    targets = histogram(connection, is_skewed(bins))
    assert sum(targets["targets"]) == sum(entry["targets"] for entry in bins) == 2_000
    figures |= {
        "split": "test",
        "prompt": "streaming",
        "checkpoint": "step-1",
        "intervals": None if drawn is None else intervals(figures, groups, drawn),
        "reliability": bins,
        "histogram": targets,
        "roc": roc(groups),
    }
    for draw_picture in (pictures.draw_reliability, pictures.draw_roc):
        draw_picture(figures, tmp_path / "picture.png")
        assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_pictures_without_matplotlib_are_refused_only_where_they_are_asked_for(monkeypatch):
    assert pictures.check_pictures(None)
    assert not pictures.check_pictures(False)
    monkeypatch.setattr(pictures, "find_spec", lambda _: None)
    assert not pictures.check_pictures(None)
    with pytest.raises(UserError, match=r"pip install 'dti-dist\[plots\]'"):
        pictures.check_pictures(True)
