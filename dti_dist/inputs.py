"""What a config names, opened: the data set, the tokenizer, item tokens and streams of packs."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from dti_dist.config import ModelConfig, RunConfig, TemplateConfig
from dti_dist.console import say
from dti_dist.data import index as split_index
from dti_dist.data import item_tokens
from dti_dist.data.dataset import BadShard, Dataset
from dti_dist.data.epochs import Order, plan_epochs
from dti_dist.data.index import SINGLE_PROCESS, ProcessGroup
from dti_dist.data.item_tokens import ItemTokens
from dti_dist.data.item_vocabulary import FILE as ITEMS
from dti_dist.data.item_vocabulary import Hashes
from dti_dist.data.layout import PackShape
from dti_dist.data.packing import pack_shape, with_shared_body
from dti_dist.data.samples import SampleSettings
from dti_dist.data.sequences import SequenceBlock
from dti_dist.data.stream import StreamPlan
from dti_dist.data.template import Template
from dti_dist.errors import UserError, nearest
from dti_dist.files import replacing
from dti_dist.model import sources
from dti_dist.model.ctr_model import CTRModel
from dti_dist.model.item_vectors import item_vectors
from dti_dist.model.lora import add_adapters, base_fingerprint, require_packages
from dti_dist.model.tokenizer import SUM_TOKEN, item_vocabulary, vocabulary_of
from dti_dist.model.weights import BaseWeights, Placement, fill


def template_of(template: TemplateConfig, dataset: Dataset) -> Template:
    """Raises UserError where the template names what the data set has not."""
    manifest = dataset.manifest
    return Template.for_items(
        template, manifest.item_text_columns, manifest.user_text_columns, manifest.event_columns
    )


@dataclass(frozen=True)
class Inputs:
    """An opened data set with a tokenizer and the tokens of its items.

    Attributes:
        model: where the weights are read: config.model, or the folder that a job fetched it to.
    """

    config: RunConfig
    dataset: Dataset
    tokenizer: Any
    tokens: ItemTokens
    cache_dir: Path
    model: ModelConfig

    @staticmethod
    def open(config: RunConfig, tokenizer_dir: Path, model: ModelConfig | None = None) -> Inputs:
        """Open what the config names; caches are built where missing.

        The tokenizer is read from `tokenizer_dir`, or made and kept there, so that a run and what
        follows it read the same tokens.

        Args:
            model: the config's, where `sources.fetch` has put it.
        """
        model = model or config.model
        if config.model.lora.rank:
            require_packages(config.model.lora)  # before caches are built
        dataset = Dataset.open(
            config.data.path,
            # A reader that passes over bad parts judges them one by one.
            check_files=config.data.on_bad_shard == "fail",
            storage=config.data.storage,
        )
        template = template_of(config.template, dataset)
        if config.sample.context > dataset.manifest.context_limit:
            raise UserError(
                f"sample.context is {config.sample.context}, but the data set {dataset.uri} keeps "
                f"only {dataset.manifest.context_limit} interactions before the targets of valid "
                f"and test. Prepare it with --context-limit {config.sample.context} or more."
            )
        _check_task_weights(config, dataset)
        if (tokenizer_dir / "tokenizer.json").exists():
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_dir), trust_remote_code=False)
            sum_id = int(tokenizer.convert_tokens_to_ids(SUM_TOKEN))
        else:
            tokenizer, sum_id = sources.load_tokenizer(model, dataset, template)
            items = sources.load_items(model, dataset) if model.item_embeddings else None
            _keep(tokenizer, items, tokenizer_dir)
        cache_dir = cache_dir_of(dataset, config.data.cache_dir)
        vocabulary = None
        if model.item_embeddings:
            vocabulary = item_vocabulary(tokenizer, np.load(tokenizer_dir / ITEMS))
        tokens = item_tokens.load_or_build(
            dataset, template, tokenizer, sum_id, cache_dir, vocabulary
        )
        dataset = dataset.with_cache(cache_dir)
        return Inputs(config, dataset, tokenizer, tokens, cache_dir, model)

    @staticmethod
    def open_together(config: RunConfig, tokenizer_dir: Path, group: ProcessGroup) -> Inputs:
        """`open` in all processes of `group` at once: one of each node builds and fetches."""
        model = sources.fetch(config.model, group)
        return group.first_on_node(lambda: Inputs.open(config, tokenizer_dir, model))

    @staticmethod
    @contextmanager
    def open_for_reading(config: RunConfig) -> Iterator[Inputs]:
        """Inputs for a command that only looks: the run's folder stays as it is.

        The tokenizer is the run's where training has begun, else a temporary one.
        """
        folder = Path(config.run_dir) / "tokenizer"
        with TemporaryDirectory(prefix="dti-dist-") as scratch:
            if not (folder / "tokenizer.json").exists():
                folder = Path(scratch) / "tokenizer"
            yield Inputs.open(config, folder)

    @property
    def template(self) -> Template:
        return template_of(self.config.template, self.dataset)

    @property
    def vocabulary(self) -> int:
        """Embedding rows that the tokenizer needs."""
        return vocabulary_of(self.tokenizer)

    def stream_plan(
        self,
        split: str,
        *,
        epochs: int = 1,
        shuffle: bool = False,
        k: int | None = None,
        max_targets: int | None = None,
        for_training: bool = False,
        group: ProcessGroup = SINGLE_PROCESS,
    ) -> StreamPlan:
        """How a split becomes packs. All processes of `group` must call this at once.

        Args:
            k: targets per prompt where it differs from the config's; 1 is the sliding window.
            max_targets: stop at the first whole users that have so many; without shuffling.
            for_training: leave out the targets that training is not to see.
        """
        assert not (shuffle and max_targets), "the first users are a part of the last row group"
        sample = self.config.sample
        if k is not None:
            sample = sample.model_copy(update={"paradigm": "dti", "targets": k})
        config = self.config
        settings = SampleSettings.of(sample, for_training)
        index = split_index.load_or_build(
            self.dataset,
            split,
            settings,
            self.tokens,
            self.cache_dir,
            group,
            skip_bad=config.data.on_bad_shard == "skip",
        )
        if index.left_out and group.rank == 0:
            rows = sum(entry.rows for entry in index.left_out)
            say(
                f"{split}: {len(index.left_out):,} files or row groups with {rows:,} users can't "
                f"be read and are left out. To include them, fix them and remove {index.folder}."
            )
            for entry in index.left_out:
                say(f"left out of {split}: {entry.reason}")
        index = index.first_users(max_targets)
        slots = config.pack.readout_slots if k is None else None
        shape = group.first_on_node(lambda: self._shape(split, index, settings, slots))
        order = Order(config.data.shuffle_interactions, config.seed, shuffle)
        return StreamPlan(
            dataset=self.dataset,
            tokens=self.tokens,
            samples=settings,
            epochs=plan_epochs(index, shape, order, epochs, self.cache_dir, group),
            skip_bad=config.data.on_bad_shard == "skip",
            task_weights=tuple(config.tasks.get(task, 1.0) for task in self.dataset.tasks),
        )

    def _shape(
        self, split: str, index: split_index.SplitIndex, settings: SampleSettings, slots: int | None
    ) -> PackShape:
        if not index.total_targets:
            raise UserError(
                f"{self.dataset.uri}: the split {split} has no target with at least "
                f"sample.min_context = {settings.min_context} interactions before it. Lower "
                "sample.min_context, or prepare the data set with other fractions."
            )
        shape = pack_shape(self.config.pack.length, slots, index.tokens, index.targets)
        return self._with_shared_body(shape, index, settings)

    def _with_shared_body(
        self, shape: PackShape, index: split_index.SplitIndex, settings: SampleSettings
    ) -> PackShape:
        if not self.config.attention.shares_interactions:
            return shape
        number, block = self._first_readable(index, settings.for_training)
        samples = settings.cut(block)
        indexed = index.samples_of(number)  # not all of them with max_targets
        in_index = samples.take(np.arange(min(indexed.stop - indexed.start, len(samples))))
        return with_shared_body(shape, in_index, block, self.tokens)

    def _first_readable(
        self, index: split_index.SplitIndex, for_training: bool
    ) -> tuple[int, SequenceBlock]:
        for number, place in enumerate(index.row_groups):
            try:
                return number, split_index.read_block(
                    self.dataset, place, self.tokens, for_training
                )
            except BadShard:
                last = number == len(index.row_groups) - 1
                if self.config.data.on_bad_shard == "fail" or last:
                    raise
        raise AssertionError("an index with targets has row groups")

    def hollow_model(self) -> CTRModel:
        """The model with shapes and no weights: [SUM] added, adapters as they begin."""
        return self.wrap(sources.hollow_causal_lm(self.model, self.vocabulary))

    def open_weights(self, model: CTRModel, dtype: torch.dtype = torch.float32) -> BaseWeights:
        """What a hollow model starts to train from, opened and not read."""
        return sources.open_weights(self.model, self.vocabulary, self.config.seed, model, dtype)

    def fill(self, model: CTRModel, placement: Placement) -> str | None:
        """Give a hollow model the weights that it starts to train from.

        Returns:
            where weights are read: the fingerprint of those that stay as they are.
        """
        weights = placement.by_reader(lambda: self.open_weights(model, placement.dtype))
        fill(model, weights, placement)
        return base_fingerprint(model, weights) if weights else None

    def untrained_model(self) -> CTRModel:
        """The model before training, in float32 on the CPU: [SUM] added, nothing partitioned."""
        model = self.hollow_model()
        self.fill(model, Placement())
        return model

    def causal_lm(self) -> Any:
        """The transformers model that the config names, with an embedding for [SUM]."""
        return sources.load_causal_lm(self.model, self.vocabulary, self.config.seed)

    def wrap(self, causal_lm: Any) -> CTRModel:
        """A causal LM with the config's attention, head and adapters."""
        config = self.config
        tokens = self.tokens
        longest = len(tokens.prefix) + (config.sample.context + 1) * tokens.longest_interaction
        if tokens.profiles is not None:
            longest = max(longest, tokens.profiles.longest)
        model = CTRModel(
            causal_lm,
            head=config.model.head,
            label_ids=self.tokens.label_ids,
            n=config.sample.context,
            attention=config.attention,
            prefix_length=len(self.tokens.prefix),
            longest_span=longest,
            keep_negatives=self.dataset.manifest.keep_negatives,
            further_tasks=self.dataset.tasks[1:],
            items=item_vectors(
                tokens.vocabulary,
                config.model.item_embeddings,
                causal_lm.config.hidden_size,
                config.model.item_dropout,
                config.seed,
            ),
        )
        rates = self.dataset.label_rates(config.data.train_on)
        model.begin_at(rates, pretrained=config.model.name != "scratch")
        if config.model.lora.rank:
            add_adapters(model, config.model.lora, self.tokens.sum_id, config.seed)
        return model


def _check_task_weights(config: RunConfig, dataset: Dataset) -> None:
    known = [task.name for task in dataset.manifest.tasks]
    for name in config.tasks:
        if name not in known:
            there = f"the tasks {', '.join(known)}" if known else "one label, whose weight is 1"
            raise UserError(
                f"tasks.{name}: expected a task of the data set {dataset.uri}, which has {there}."
                f"{nearest(name, known)} Leave it out, or prepare the data set with it."
            )


def _keep(tokenizer: Any, items: Hashes | None, folder: Path) -> None:
    """Save it whole or not at all: the first ranks of several nodes may do so at once."""
    with replacing(folder, keep=lambda: (folder / "tokenizer.json").exists()) as staging:
        tokenizer.save_pretrained(str(staging))
        if items is not None:
            np.save(staging / ITEMS, items)


def cache_dir_of(dataset: Dataset, given: str | None = None) -> Path:
    """Where the data set's caches lie on this machine: the folder given, or one of its own.

    Raises:
        UserError: it can't be made.
    """
    folder = Path(given) if given else _default_cache_dir(dataset)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"The cache folder {folder} can't be made: {error.strerror or error}. Set "
            "data.cache_dir to a folder that you may write to."
        ) from error
    return folder


def _default_cache_dir(dataset: Dataset) -> Path:
    local = Path(dataset.uri.removeprefix("file://"))
    if local.is_dir() and os.access(local, os.W_OK):
        return local / "cache"
    home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    return home / "dti-dist" / hashlib.sha256(dataset.uri.encode()).hexdigest()[:16]
