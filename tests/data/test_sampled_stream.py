"""Weights and sampled negatives on their way from prepare to the steps of training."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest

from dti_dist.data.dataset import Dataset, iter_sequences
from dti_dist.data.prepare.build import build_dataset
from dti_dist.data.prepare.slates import read_slates
from dti_dist.data.prepare.source import Source
from dti_dist.data.stream import PackStream, Share
from dti_dist.options import BuildOptions
from tests.data.shards import stream_plan, tokenise


def weighted(read, workspace) -> Source:
    """Slates whose interactions weigh 0 to 1.75, by their time."""
    source = read(workspace)
    weight = "(time_us // 1000000 % 8) / 4 AS weight"
    rules = source.rules.model_copy(update={"weight": "seconds"})
    return replace(source, events=f"SELECT *, {weight} FROM ({source.events})", rules=rules)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    uri = str(tmp_path_factory.mktemp("slates") / "data")
    read = partial(read_slates, users=60, requests_per_user=8, shown=4, keep_negatives=0.3)
    options = BuildOptions(row_group_interactions=400)
    build_dataset(partial(weighted, read), uri, options)
    return Dataset.open(uri)


def targets(dataset, split, kept):
    """(row, position) of all targets, or of those alone that training is to see: their weight."""
    found, row_number = {}, 0
    for batch in iter_sequences(dataset, split):
        for row in batch.rows.to_pylist():
            for at in range(row["target_start"], len(row["item_ids"])):
                if row["is_kept"][at] or not kept:
                    found[row_number, at] = row["weight"][at]
            row_number += 1
    return found


def seen(plan, ranks):
    """What all ranks' batches hold, and by step the weight that they say and the one they hold."""
    found, said, held = {}, {}, {}
    for rank in range(ranks):
        for batch in PackStream(plan, Share(4, 1, rank, ranks)):
            used = batch.used > 0
            places = zip(batch.target_row[used], batch.target_position[used], strict=True)
            keys = [(int(row), int(position)) for row, position in places]
            found |= dict(zip(keys, batch.weight[used].tolist(), strict=True))
            said.setdefault(batch.step, set()).add(batch.step_weight)
            held[batch.step] = held.get(batch.step, 0.0) + float(batch.weight.sum())
    return found, said, held


@pytest.mark.parametrize(
    ("split", "for_training"), [("train", True), ("test", True), ("test", False)]
)
@pytest.mark.parametrize("ranks", [1, 2])
def test_training_sees_the_kept_targets_and_each_step_its_weight(
    dataset, tmp_path, split, for_training, ranks
):
    tokens = tokenise(dataset, tmp_path)
    plan = stream_plan(
        dataset, tokens, tmp_path, split=split, min_context=0, for_training=for_training
    )
    found, said, held = seen(plan, ranks)
    assert found == targets(dataset, split, kept=for_training)
    assert all(len(weights) == 1 for weights in said.values())
    assert held == pytest.approx({step: weight for step, (weight,) in said.items()})
    counts = dataset.manifest.counts.splits[split]
    assert len(found) == (counts.kept_targets if for_training else counts.targets)
    assert len(targets(dataset, "test", kept=True)) < len(targets(dataset, "test", kept=False))
