"""What a model is trained on, as plain iterators: for notebooks and checks by eye."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dti_dist.config import RunConfig, StorageConfig, load_config
from dti_dist.data.dataset import Dataset, iter_sequences
from dti_dist.data.index import needed_columns
from dti_dist.data.layout import PackShape, build_pack
from dti_dist.data.samples import SampleSettings, sample_lengths
from dti_dist.data.sequences import SequenceBlock
from dti_dist.data.stream import Batch, PackStream, Share
from dti_dist.errors import UserError
from dti_dist.inputs import Inputs


@dataclass(frozen=True)
class User:
    """A user sequence of a split.

    Attributes:
        items: a mapping of text columns, and source_id, for each interaction, oldest first.
        labels: [interactions] 0 or 1.
        timestamps: [interactions] seconds since 1970-01-01 UTC.
        target_start: interactions before it are context only.
        profile: the user's texts by column, empty where nothing is known; None: the data set has
            none of users.
    """

    user_id: str
    items: list[dict[str, str]]
    labels: npt.NDArray[np.int8]
    timestamps: npt.NDArray[np.int64]
    target_start: int
    profile: dict[str, str] | None = None


def read_users(
    path: str | Path, split: str = "train", storage: StorageConfig | None = None
) -> Iterator[User]:
    """The users of a prepared data set in the order of its files, one row group in memory.

    Raises:
        UserError: there is no such data set or split, or a file is broken.
    """
    dataset = Dataset.open(str(path), storage=storage)
    items = dataset.items_table().drop_columns(["item_id"])
    profiles: list[dict[str, str]] = []
    if dataset.manifest.user_text_columns:
        profiles = dataset.profiles_table().drop_columns(["profile_id"]).to_pylist()
    for batch in iter_sequences(dataset, split):
        for row in batch.rows.to_pylist():
            yield User(
                user_id=row["user_id"],
                items=items.take(row["item_ids"]).to_pylist(),
                labels=np.array(row["labels"], dtype=np.int8),
                timestamps=np.array(row["timestamps"], dtype=np.int64),
                target_start=row["target_start"],
                profile=profiles[row["profile"]] if profiles else None,
            )


@dataclass(frozen=True)
class Prompt:
    """One sample: what the model reads of it.

    Attributes:
        text: of the tokens in the order of a prompt, each target's [SUM] before its label.
        tokens: [L] ids of the body, without [SUM].
        sum_at: [k] before which token of the body each [SUM] stands.
        labels: [k] of the targets.
        row, positions: the user's row in the split, and [k] which interactions are the targets.
    """

    text: str
    tokens: npt.NDArray[np.int64]
    sum_at: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int8]
    row: int
    positions: npt.NDArray[np.int64]


def read_prompts(
    config: RunConfig | str | Path, split: str = "train", k: int | None = None
) -> Iterator[Prompt]:
    """The streaming prompts of a config's data, user after user; k=1 gives sliding-window prompts.

    Raises:
        UserError: the config, what it names, or k is at fault.
    """
    if k is not None and not (isinstance(k, int) and k >= 1):
        raise UserError(f"k: expected a whole number of targets, at least 1, found {k!r}.")
    settings = _settings(config)
    with Inputs.open_for_reading(settings) as inputs:
        sample, tokens = settings.sample, inputs.tokens
        samples_of = SampleSettings(sample.context, k or sample.k, sample.min_context)
        columns = needed_columns(inputs.dataset, tokens)
        first_row = 0
        for batch in iter_sequences(inputs.dataset, split, columns):
            block = SequenceBlock.from_arrow(batch.rows, first_row, inputs.dataset.has_requests)
            first_row += batch.rows.num_rows
            samples = samples_of.cut(block)
            lengths = sample_lengths(samples, block, tokens)
            for number in range(len(samples)):
                one = samples.take(np.array([number]))
                shape = PackShape(int(lengths[number]), int(one.targets[0]))
                pack = build_pack(one, block, tokens, shape)
                body = pack.tokens[: shape.length].numpy()
                words = body if tokens.vocabulary is None else tokens.vocabulary.in_words(body)
                sum_at = pack.layout.readout_end.numpy()
                yield Prompt(
                    text=inputs.tokenizer.decode(np.insert(words, sum_at, tokens.sum_id)),
                    tokens=body,
                    sum_at=sum_at.astype(np.int64),
                    labels=pack.labels.numpy().astype(np.int8),
                    row=int(pack.target_row[0]),
                    positions=pack.target_position.numpy().astype(np.int64),
                )


def read_packs(
    config: RunConfig | str | Path, split: str = "train", shuffle: bool = True
) -> Iterator[Batch]:
    """The packs of a config's first epoch, one a batch, in the order of training (`shuffle`).

    Fields of a Batch are tensors [1, …]; see dti_dist.data.layout.Pack.

    Raises:
        UserError: the config, or what it names, is at fault.
    """
    with Inputs.open_for_reading(_settings(config)) as inputs:
        yield from PackStream(inputs.stream_plan(split, shuffle=shuffle), Share(1, 1))


def _settings(config: RunConfig | str | Path) -> RunConfig:
    return config if isinstance(config, RunConfig) else load_config(config)
