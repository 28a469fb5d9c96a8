"""Small random users, items and models that tests share."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from dti_dist.attention.layout import Record
from dti_dist.config import AttentionConfig
from dti_dist.data.item_tokens import ItemTokens, Words
from dti_dist.data.item_vocabulary import ItemVocabulary
from dti_dist.data.layout import PackShape, build_pack
from dti_dist.data.packing import assign_packs, with_shared_body
from dti_dist.data.profiles import ProfileTokens
from dti_dist.data.samples import SampleSettings, sample_lengths
from dti_dist.data.sequences import SequenceBlock
from dti_dist.data.stream import Batch
from dti_dist.data.template import GAP, MOMENTS, TIME_GAPS
from dti_dist.model.ctr_model import CTRModel
from dti_dist.model.families import SUPPORTED
from dti_dist.model.item_vectors import item_vectors

VOCABULARY = 60
NO, YES, SUM = 57, 58, 59
ITEM = 56  # texts have it too
FAMILIES = SUPPORTED
# What sets a family apart: layers without positions, partly rotated heads, factors.
FAMILY_SETTINGS: dict[str, dict[str, Any]] = {
    "smollm3": {"no_rope_layers": [1, 0, 1], "no_rope_layer_interval": 2},
    "phi3": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        }
    },
    "granite": {
        "logits_scaling": 3.0,
        "attention_multiplier": 0.2,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.7,
    },
}
FORGETTING = {"strength": 0.9, "shape": 1.5}


def profile_tokens(rng: np.random.Generator, profiles: int = 5) -> ProfileTokens:
    """Profiles of 0 to 4 random tokens, the first of 2."""
    lengths = [2, *rng.integers(0, 5, profiles - 1)]
    return ProfileTokens.of([rng.integers(0, NO, length).tolist() for length in lengths])


def with_profiles(
    tokens: ItemTokens, block: SequenceBlock, seed: int = 0
) -> tuple[ItemTokens, SequenceBlock]:
    """The same users, each with a profile."""
    rng = np.random.default_rng(seed)
    profiles = profile_tokens(rng)
    of_rows = rng.integers(0, len(profiles), len(block.rows))
    return replace(tokens, profiles=profiles), replace(block, profile=of_rows)


def with_item_tokens(tokens: ItemTokens) -> ItemTokens:
    """The same items with a token of their own behind each text; every fifth item is unknown."""
    J, items = tokens.item_pieces, len(tokens.lengths)
    vocabulary = ItemVocabulary(ITEM, VOCABULARY, np.arange(items, dtype=np.uint64))
    texts = np.split(tokens.tokens, tokens.offsets[1:-1])
    for item in range(items):
        last = item * J + J - 1
        texts[last] = np.append(texts[last], ITEM if item % 5 == 4 else VOCABULARY + item)
    return replace(
        tokens,
        tokens=np.concatenate(texts).astype(np.int32),
        offsets=np.cumsum([0, *map(len, texts)]),
        vocabulary=vocabulary,
    )


def add_item_vectors(model: CTRModel, tokens: ItemTokens, size: int = 3) -> None:
    """Random vectors of the items that have tokens of their own, in float64."""
    vectors = item_vectors(tokens.vocabulary, size, model.config.hidden_size)
    assert vectors is not None, "items with tokens of their own"
    torch.manual_seed(1)
    for parameter in vectors.parameters():
        torch.nn.init.normal_(parameter)
    model.items = vectors.double()


def item_tokens(
    rng: np.random.Generator,
    items: int = 30,
    prefix: int = 0,
    time_gaps: bool = False,
    pieces: tuple[str, ...] = ("item",),
) -> ItemTokens:
    """Items of 1 to 4 random tokens, and fields of the interaction: `pieces` in their order.

    Of several pieces of an item, and of words, some are empty.
    """
    several = pieces.count("item") > 1
    lengths = rng.integers(0 if several else 1, 5, items * pieces.count("item"))
    if several:
        lengths[:: pieces.count("item")] += 1
    gap_lengths = [0, *rng.integers(1, 3, len(TIME_GAPS))] if time_gaps else []
    tokens = rng.integers(0, NO, lengths.sum()).astype(np.int32)

    def texts(lengths: Any) -> tuple[np.ndarray, ...]:
        return tuple(rng.integers(0, NO, length).astype(np.int32) for length in lengths)

    made_prefix = rng.integers(0, NO, prefix).astype(np.int32)
    words = [Words(GAP, texts(gap_lengths))] if time_gaps else []
    for field in pieces:
        if field != "item":
            words.append(Words(field, texts(rng.integers(0, 3, len(MOMENTS[field])))))
    return ItemTokens(
        tokens=tokens,
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        label_ids=(NO, YES),
        prefix=made_prefix,
        words=tuple(words),
        of_item=(*[False] * time_gaps, *(field == "item" for field in pieces)),
        sum_id=SUM,
        fingerprint="test",
        time_zone="Asia/Kolkata",
    )


def users(
    rng: np.random.Generator,
    lengths: list[int],
    items: int = 30,
    target_start: int = 0,
    requests: bool = False,
) -> SequenceBlock:
    """Random interactions; `requests` of 1 to 8, some of them no history and some no targets."""
    total = sum(lengths)
    offsets = np.cumsum([0, *lengths])
    steps = [10, 10_000, 200_000, 90_000_000] + ([0] * 6 if requests else [])
    block = SequenceBlock(
        item_ids=rng.integers(0, items, total).astype(np.int32),
        labels=rng.integers(0, 2, total).astype(np.int8),
        timestamps=np.cumsum(rng.choice(steps, total)),
        offsets=offsets,
        target_start=np.full(len(lengths), target_start),
        rows=np.arange(len(lengths)) + 100,
    )
    if not requests:
        return block
    block = replace(
        block,
        by_request=True,
        stored={
            "is_history": rng.random(total) < rng.choice([0.3, 0.7, 1.0]),
            "is_target": rng.random(total) < rng.choice([0.8, 1.0]),
        },
    )
    starts = [
        int(block.requests.start[first + target_start] - first) if target_start < length else length
        for first, length in zip(offsets, lengths, strict=False)
    ]
    return replace(block, target_start=np.array(starts, dtype=np.int64))


def as_one_request_each(block: SequenceBlock) -> SequenceBlock:
    """The same interactions with requests of one, all of them history and targets."""
    assert block.timestamps is not None
    apart = np.arange(len(block.timestamps))
    return replace(block, by_request=True, timestamps=block.timestamps * 4 + apart % 2)


@dataclass(frozen=True)
class PlainSample:
    """A prompt as a plain loop finds it; positions in its user's row.

    Attributes:
        context: history before the first target's request.
        requests: of each request from there on, its targets, and its history that later ones see.
    """

    row: int
    context: list[int]
    requests: list[tuple[list[int], list[int]]]

    @property
    def targets(self) -> list[int]:
        return [target for targets, _ in self.requests for target in targets]


def plain_samples(block: SequenceBlock, n: int, k: int, min_context: int) -> list[PlainSample]:
    """What `SampleSettings.cut` finds, by plain loops."""
    found = []
    for row, (start, end) in enumerate(itertools.pairwise(block.offsets.tolist())):
        positions = range(end - start)
        times = [
            int(block.timestamps[start + p]) if block.by_request else p  # type: ignore[index]
            for p in positions
        ]
        is_history = [
            block.is_history is None or bool(block.is_history[start + p]) for p in positions
        ]
        is_target = [block.is_target is None or bool(block.is_target[start + p]) for p in positions]
        before: list[int] = []
        open_sample: PlainSample | None = None
        for _, group in itertools.groupby(positions, key=times.__getitem__):
            request = list(group)
            history = [p for p in request if is_history[p]]
            targets = [
                p
                for p in request
                if is_target[p] and p >= block.target_start[row] and len(before) >= min_context
            ]
            if targets and k == 1:
                found += [PlainSample(row, before[-n:], [([t], [])]) for t in targets]
            elif targets:
                if open_sample is None or len(open_sample.targets) + len(targets) > k:
                    open_sample = PlainSample(row, before[-n:], [])
                    found.append(open_sample)
                open_sample.requests.append((targets, history))
            elif open_sample is not None:
                open_sample.requests.append(([], history))
            before += history
        for sample in found:
            while sample.requests and not sample.requests[-1][0]:
                sample.requests.pop()  # what only later samples see
    return found


def sequences(offsets: np.ndarray, target_start: np.ndarray | int = 0) -> SequenceBlock:
    """Sequences of these bounds, all of one item."""
    rows, interactions = len(offsets) - 1, int(offsets[-1])
    return SequenceBlock(
        item_ids=np.zeros(interactions, dtype=np.int32),
        labels=np.zeros(interactions, dtype=np.int8),
        timestamps=None,
        offsets=np.asarray(offsets),
        target_start=np.broadcast_to(target_start, rows),
        rows=np.arange(rows),
    )


def same(a: Any, b: Any) -> bool:
    """Two records with equal tensors and numbers."""
    return type(a) is type(b) and all(
        torch.equal(x, y)
        if isinstance(x, torch.Tensor)
        else same(x, y)
        if isinstance(x, Record)
        else x == y
        for x, y in zip(vars(a).values(), vars(b).values(), strict=True)
    )


def batch_of(
    block: SequenceBlock,
    tokens: ItemTokens,
    n: int,
    k: int,
    shape: PackShape,
    min_context: int = 1,
    share: bool = False,
) -> Batch:
    """All targets of the block, packed in order into as many packs as it takes."""
    samples = SampleSettings(n, k, min_context).cut(block)
    if share:
        shape = with_shared_body(shape, samples, block, tokens)
    pack_of = assign_packs(sample_lengths(samples, block, tokens), samples.targets, shape)
    packs = [
        build_pack(samples.take(np.flatnonzero(pack_of == pack)), block, tokens, shape)
        for pack in range(pack_of.max() + 1)
    ]
    targets = int(samples.targets.sum())
    return Batch.collate(packs, shape, step_targets=targets)


def causal_lm(family: str, layers: int = 3, seed: int = 0, **changes: Any) -> Any:
    """A random-weight model of a family, in float64, with grouped key/value heads."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 4096,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
        **FAMILY_SETTINGS.get(family, {}),
    }
    config = AutoConfig.for_model(family, **{**settings, **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():  # wider than the default 0.02, so that differences are not lost
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.3)
    return model


class Float64Rotary(torch.nn.Module):
    """Rotary tables in float64, where transformers makes them in float32 whatever the model."""

    def __init__(self, inv_freq: torch.Tensor):
        super().__init__()
        self.inv_freq = inv_freq.double()

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        angles = (position_ids[..., None].double() * self.inv_freq).repeat(1, 1, 2)
        return angles.cos(), angles.sin()


def ctr_model(
    family: str = "llama",
    policy: str = "budget",
    n: int = 4,
    head: str = "yes_no",
    prefix: int = 0,
    backend: str = "auto",
    budget: Any = "even",
    positions: str = "rope",
    further_tasks: tuple[str, ...] = (),
    **changes: Any,
) -> CTRModel:
    attention = AttentionConfig(
        policy=policy, positions=positions, budget=budget, backend=backend, forgetting=FORGETTING
    )
    model = CTRModel(
        causal_lm(family, **changes),
        head,
        (NO, YES),
        n,
        attention,
        prefix_length=prefix,
        further_tasks=further_tasks,
    )
    if head == "linear":
        torch.nn.init.normal_(model.head.weight)
    return model.double()


def logits_by_target(model: CTRModel, batch: Batch) -> dict[tuple[int, int], torch.Tensor]:
    """(row, position) of each target → its logit, with gradient."""
    logits = model(batch)
    used = batch.used > 0
    keys = zip(batch.target_row[used].tolist(), batch.target_position[used].tolist(), strict=True)
    return dict(zip(keys, logits[used], strict=True))
