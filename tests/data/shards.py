"""A prepared data set of several parts and row groups, and what a stream needs of it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from dti_dist.config import TemplateConfig
from dti_dist.data import index, item_tokens
from dti_dist.data.dataset import Dataset, iter_sequences
from dti_dist.data.epochs import Order, plan_epochs
from dti_dist.data.index import SplitIndex
from dti_dist.data.item_tokens import ItemTokens
from dti_dist.data.packing import pack_shape
from dti_dist.data.prepare.build import BuildOptions, build_dataset
from dti_dist.data.prepare.synthetic import read_synthetic
from dti_dist.data.samples import SampleSettings
from dti_dist.data.stream import StreamPlan
from dti_dist.data.template import Template
from dti_dist.model.tokenizer import add_sum_token, train_tokenizer


class Threads:
    """Ranks that are threads of this process: a ProcessGroup without processes."""

    def __init__(self, world: int):
        self.world = world
        self._barrier = threading.Barrier(world)
        self._made: list[Any] = [None] * world

    def run(self, work: Callable[[Any], Any]) -> list[Any]:
        """Call `work` with each rank at once."""
        with ThreadPoolExecutor(self.world) as pool:
            return list(pool.map(lambda rank: work(_Thread(self, rank)), range(self.world)))


class _Thread:
    def __init__(self, threads: Threads, rank: int):
        self.threads, self.rank, self.world = threads, rank, threads.world

    def each(self, make: Callable[[], Any]) -> list[Any]:
        barrier, made = self.threads._barrier, self.threads._made
        try:
            made[self.rank] = (None, make())
        except Exception as error:
            made[self.rank] = (error, None)
        barrier.wait(timeout=60)
        outcomes = list(made)
        barrier.wait(timeout=60)
        for error, _ in [outcomes[self.rank], *outcomes]:
            if error is not None:
                raise error
        return [result for _, result in outcomes]

    def first_on_node(self, make: Callable[[], Any]) -> Any:
        made: list[Any] = []
        self.each(lambda: made.append(make()) if self.rank == 0 else None)
        self.each(lambda: made.append(make()) if self.rank > 0 else None)
        return made[0]


def build_shards(folder: Path, seed: int = 0) -> Dataset:
    """50 users of 20 interactions: train has 3 parts of 3 row groups or so."""
    options = BuildOptions(shard_interactions=300, row_group_interactions=100)
    read = partial(read_synthetic, users=50, items=40, interactions_per_user=20, seed=seed)
    build_dataset(read, str(folder), options)
    return Dataset.open(str(folder))


def tokenise(dataset: Dataset, cache: Path, vocab_size: int = 320, **template: Any) -> ItemTokens:
    made = Template.for_items(TemplateConfig(**template), dataset.manifest.item_text_columns)
    tokenizer = train_tokenizer(dataset, made, vocab_size)
    sum_id = add_sum_token(tokenizer)
    return item_tokens.load_or_build(dataset, made, tokenizer, sum_id, cache)


def stream_plan(
    dataset: Dataset,
    tokens: ItemTokens,
    cache: Path,
    *,
    split: str = "train",
    n: int = 4,
    k: int = 3,
    length: int = 128,
    window_interactions: int = 1_000_000,
    seed: int = 0,
    epochs: int = 1,
    shuffle: bool = True,
    min_context: int = 1,
    for_training: bool = False,
    change: Any = lambda index: index,
) -> StreamPlan:
    settings = SampleSettings(n, k, min_context, for_training)
    made: SplitIndex = change(index.load_or_build(dataset, split, settings, tokens, cache))
    shape = pack_shape(length, None, made.tokens, made.targets)
    planned = plan_epochs(made, shape, Order(window_interactions, seed, shuffle), epochs, cache)
    return StreamPlan(dataset, tokens, settings, planned)


def all_targets(dataset: Dataset, split: str = "train", min_context: int = 1) -> dict:
    """(row, position) of every target → its label, read without the code under test."""
    found = {}
    row = 0
    for batch in iter_sequences(dataset, split):
        for sequence in batch.rows.to_pylist():
            for position, label in enumerate(sequence["labels"]):
                if position >= max(sequence["target_start"], min_context):
                    found[row, position] = label
            row += 1
    return found
