"""What the tests of any object store do with a data set in it."""

from __future__ import annotations

import threading
from functools import partial

import torch

from dti_dist.config import StorageConfig
from dti_dist.data.dataset import Dataset, iter_sequences
from dti_dist.data.prepare.build import BuildOptions, build_dataset
from dti_dist.data.prepare.synthetic import read_synthetic
from dti_dist.data.stream import PackStream, Share
from tests.data.shards import stream_plan, tokenise

SLACK_S = 10  # of a machine that does other things too
OPTIONS = BuildOptions(shard_interactions=300, row_group_interactions=100)


def build(uri: str, **changes) -> None:
    """What `build_shards` makes, at a URL."""
    read = partial(read_synthetic, users=50, items=40, interactions_per_user=20, seed=0)
    build_dataset(changes.get("read", read), uri, OPTIONS)


def settings(**changes) -> StorageConfig:
    return StorageConfig(**{"timeout_s": 2, "retry_s": 30, "greatest_wait_s": 1, **changes})


def stream(dataset: Dataset, cache) -> PackStream:
    """One epoch that reads a row group or two for each window, so all along."""
    plan = stream_plan(dataset, tokenise(dataset, cache), cache, window_interactions=150)
    share = Share(global_packs=2, micro_packs=1)
    return PackStream(plan, share)


def same(first, second) -> bool:
    """Whether two lists of batches are equal in every array and number."""
    return len(first) == len(second) and all(
        torch.equal(value, vars(b)[name])
        if isinstance(value, torch.Tensor)
        else value == vars(b)[name]
        for a, b in zip(first, second, strict=True)
        for name, value in vars(a).items()
    )


def rows(dataset: Dataset, split: str = "train") -> list[dict]:
    return [row for batch in iter_sequences(dataset, split) for row in batch.rows.to_pylist()]


def interrupted(server, batches_of, at: int, fault, fix, after_s: float):
    """All batches, with a fault after the first `at` that is fixed some seconds later."""
    found = []
    timer = threading.Timer(after_s, fix)
    for number, batch in enumerate(batches_of):
        found.append(batch)
        if number + 1 == at:
            fault()
            timer.start()
    timer.join()
    return found
