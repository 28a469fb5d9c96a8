"""Targets of test evaluated by sliding-window prompts, and the same targets scored as requests."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from dti_dist.benchmarks import measure
from dti_dist.config import RunConfig
from dti_dist.console import say
from dti_dist.data.dataset import Dataset, iter_sequences
from dti_dist.data.stream import Batch, PackStream, Share
from dti_dist.evaluation.predict import Predictions, predict
from dti_dist.inputs import Inputs
from dti_dist.model.ctr_model import cast_parameters
from dti_dist.ranks import Ranks
from dti_dist.serving.pretrained import Pretrained
from dti_dist.serving.request_files import RequestFiles
from dti_dist.serving.score import PartScorer, ScoreOptions
from dti_dist.serving.scorer import Scorer

POLICIES = ("budget", "isolated")  # those that are exact


def benchmark_replay(config: RunConfig, rounds: int, targets: int, scratch: Path) -> dict[str, Any]:
    """Seconds of the predictions of `dti-dist evaluate`, and of `dti-dist score`, in turn.

    Both include reading the data; neither includes loading the model, metrics, or building caches.

    Args:
        config: as of benchmark_scoring.
        targets: of the first users of test, about.

    Returns:
        by policy: targets, requests, seconds of both, their ratio, and the largest difference of
        two probabilities; None where the data set has no requests, and evaluation also sees what
        has the target's time and stands before it.
    """
    return {
        policy: _replay(_with_policy(config, policy), rounds, targets, scratch / policy)
        for policy in POLICIES
    }


def _with_policy(config: RunConfig, policy: str) -> RunConfig:
    changes = {"template": {"prefix": ""}, "attention": {"policy": policy}}  # no prefix in `budget`
    return measure.changed(config, **changes)


def _replay(config: RunConfig, rounds: int, targets: int, scratch: Path) -> dict[str, Any]:
    device, dtype = measure.device_and_dtype(config.training)
    ranks = Ranks(0, 1, 0, 1, device)
    inputs = Inputs.open(config, scratch / "tokenizer")
    model = inputs.untrained_model().to(device).eval()
    cast_parameters(model, dtype)

    scorer = Scorer(Pretrained.of(inputs, model), device)
    requests = str(scratch / "requests.parquet")
    plan = inputs.stream_plan("test", k=1, max_targets=targets)
    packs = config.evaluation.batch_packs

    def predicted(by: Callable[[Batch], torch.Tensor]) -> Predictions:
        found = predict(by, PackStream(plan, Share(packs, packs)), ranks)
        assert found is not None
        return found

    order = _write_requests(inputs.dataset, predicted(lambda batch: batch.labels), requests)

    def evaluate() -> np.ndarray:
        say(f"{config.attention.policy}: evaluating {len(order):,} targets")
        return predicted(model).probability[order]

    def score() -> np.ndarray:
        say(f"{config.attention.policy}: scoring {len(order):,} targets")
        return _scores(scorer, requests, ranks)

    turns = measure.in_rounds({"evaluate": evaluate, "score": score}, rounds, device)
    seconds = {name: [turn.seconds for turn in mine] for name, mine in turns.items()}
    difference = np.abs(turns["score"][-1].result - turns["evaluate"][-1].result).max()
    return {
        "targets": len(order),
        "requests": pq.read_metadata(requests).num_rows,
        **{f"{name}_s": measure.spread(mine) for name, mine in seconds.items()},
        "score_over_evaluate": measure.ratios(seconds["score"], seconds["evaluate"]),
        "largest_difference": float(difference) if inputs.dataset.has_requests else None,
    }


def _write_requests(dataset: Dataset, targets: Predictions, file: str) -> np.ndarray:
    """A request for what a user was shown at one time; where each candidate lies in `targets`."""
    names = dataset.items_table()["source_id"].combine_chunks()
    columns: dict[str, list[Any]] = {"user_id": [], "timestamp": [], "candidates": []}
    order, first_row = [], 0
    for batch in iter_sequences(dataset, "test", ["user_id", "item_ids", "timestamps"]):
        mine = np.flatnonzero(np.isin(targets.row, first_row + np.arange(batch.rows.num_rows)))
        for row in np.unique(targets.row[mine]):
            user = batch.rows.slice(int(row) - first_row, 1).to_pylist()[0]
            of_user = mine[targets.row[mine] == row]
            times = np.array(user["timestamps"])[targets.position[of_user]]
            for time in np.unique(times):
                shown = of_user[times == time]
                items = np.array(user["item_ids"])[targets.position[shown]]
                columns["user_id"].append(user["user_id"])
                columns["timestamp"].append(int(time))
                columns["candidates"].append(names.take(pa.array(items)).to_pylist())
                order.append(shown)
        first_row += batch.rows.num_rows
    pq.write_table(pa.table(columns), file)
    return np.concatenate(order)


def _scores(scorer: Scorer, requests: str, ranks: Ranks) -> np.ndarray:
    """What `dti-dist score` computes between loading the model and writing its files."""
    options = ScoreOptions()
    files = RequestFiles.open(requests, options.storage)
    size = options.part_requests
    parts = list(range(-(-files.total // size)))
    found = []
    with ExitStack() as stack:
        opened = PartScorer.open(scorer, files, options, parts, stack, ranks)
        for part in parts:
            end = min((part + 1) * size, files.total)
            table, _, _ = opened.part(part * size, end, lambda requests: None)
            found.append(table["scores"].combine_chunks().flatten().to_numpy(zero_copy_only=False))
    return np.concatenate(found)
