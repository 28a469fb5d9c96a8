"""Packs: what goes together, and the arrays, against a pack that is laid out token by token."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import datetime
from zoneinfo import ZoneInfo

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dti_dist.data import item_tokens as item_tokens_module
from dti_dist.data.layout import PackShape, build_pack
from dti_dist.data.packing import assign_packs, pack_shape
from dti_dist.data.samples import Samples, SampleSettings, block_words
from dti_dist.errors import UserError
from tests.tiny import item_tokens, sequences, users, with_profiles

SHAPE = PackShape(length=1024, slots=128)

sizes = st.lists(st.tuples(st.integers(1, 256), st.integers(1, 128)), max_size=300)


def columns(sizes):
    table = np.array(sizes, dtype=np.int64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


# --- which samples go together ---------------------------------------------------------------


@given(sizes)
def test_each_sample_lies_in_one_pack_and_no_pack_overflows(sizes):
    tokens, targets = columns(sizes)
    pack_of = assign_packs(tokens, targets, PackShape(length=256, slots=128))
    assert len(pack_of) == len(sizes)
    assert np.bincount(pack_of, weights=tokens).max(initial=0) <= 256
    assert np.bincount(pack_of, weights=targets).max(initial=0) <= 128


@given(sizes)
def test_packs_are_numbered_in_the_order_they_open_and_none_is_empty(sizes):
    pack_of = assign_packs(*columns(sizes), PackShape(length=256, slots=128))
    opened = list(dict.fromkeys(pack_of.tolist()))
    assert opened == list(range(len(opened)))


@pytest.mark.parametrize(("k", "at_least"), [(50, 0.95), (1, 0.99)])
def test_packs_of_realistic_samples_are_nearly_full(k, at_least):
    """n=20, 14 tokens an interaction, users of 20 to 2,000 interactions. Measured over ten seeds:
    0.966 to 0.974 with k=50, and 0.998 with k=1."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(4.6, 0.9, 300), 20, 2000).astype(int)
    offsets = np.cumsum([0, *lengths])
    samples = SampleSettings(20, k, 1).cut(sequences(offsets))
    ends = np.cumsum([0, *rng.integers(9, 20, offsets[-1])])
    start = offsets[samples.row]
    sizes = rng.permutation(ends[start + samples.end] - ends[start + samples.first])
    shape = pack_shape(4096, None, sizes, samples.targets)
    packs = assign_packs(sizes, samples.targets, shape).max() + 1
    assert sizes.sum() / (packs * shape.length) >= at_least


# --- the arrays ------------------------------------------------------------------------------


def orders_of_pieces():
    """One piece of the item, or several with words before, between and behind them."""
    some = st.lists(st.sampled_from(["item", "hour", "weekday"]), max_size=2)
    return st.one_of(
        st.just(("item",)),
        some.map(lambda found: ("item", *found, "hour")),
        some.map(lambda found: (*found, "item")),
    )


def plain_pack(samples, block, tokens, shape):
    """A pack laid out token by token, as lists under the names of Pack's fields."""
    body, slots = [], []  # (token, position, unit); a dict per target
    units = []  # (start, first, prefix start, prefix end, profile start, profile end)
    for row, first, first_target, end in zip(
        samples.row, samples.first, samples.first_target, samples.end, strict=True
    ):
        profile = (0, 0)
        if tokens.profiles is not None:
            bounds = tokens.profiles.offsets[block.profile[row] :][:2]
            units.append((len(body), len(units), 0, 0, 0, 0))
            profile = (len(body), len(body) + int(bounds[1] - bounds[0]))
            for place, word in enumerate(tokens.profiles.tokens[slice(*bounds)]):
                body.append((int(word), place, len(units) - 1))
        sample_start = len(body)

        def write(words, start=sample_start):
            for word in words:
                body.append((int(word), len(body) - start, len(units) - 1))

        prefix = (0, 0)
        if len(tokens.prefix):
            units.append((len(body), len(units), 0, 0, *profile))
            write(tokens.prefix)
            prefix = (sample_start, len(body))
        first_unit = len(units)
        for position in range(first, end):
            at = block.offsets[row] + position
            units.append((len(body), first_unit, *prefix, *profile))
            if tokens.has_gaps:
                gap = 0 if position == 0 else block.timestamps[at] - block.timestamps[at - 1]
                bounds = (3600, 86400, 7 * 86400, 30 * 86400, 365 * 86400)
                write(tokens.words[0].texts[sum(gap >= bound for bound in bounds)])
            item_piece = iter(range(block.item_ids[at] * tokens.item_pieces, 10**9))
            words = iter(tokens.words[tokens.has_gaps :])
            for of_item in tokens.of_item[tokens.has_gaps :]:
                if of_item:
                    piece = next(item_piece)
                    write(tokens.tokens[tokens.offsets[piece] : tokens.offsets[piece + 1]])
                else:
                    piece = next(words)
                    moment = datetime.fromtimestamp(
                        int(block.timestamps[at]), ZoneInfo(tokens.time_zone)
                    )
                    code = {"hour": moment.hour, "weekday": moment.weekday()}[piece.field]
                    write(piece.texts[code])
            if position >= first_target:
                slots.append(
                    {
                        "readout_end": len(body),
                        "position": len(body) - sample_start,
                        "unit": len(units) - 1,
                        "labels": float(block.labels[at]),
                        "target_row": int(block.rows[row]),
                        "target_position": int(position),
                    }
                )
            write([tokens.label_ids[block.labels[at]]])

    def padded(values, size, padding):
        return [*values, *[padding] * (size - len(values))]

    def tail(name, padding):
        return padded([slot[name] for slot in slots], shape.slots, padding)

    tokens_of, positions, unit = map(
        list, zip(*padded(body, shape.length, (0, 0, -1)), strict=True)
    )
    room = 64 * max(-(-len(units) // 64), 1)
    unit_columns = list(zip(*units, strict=True)) or [()] * 6
    of_profiles = {
        name: padded(unit_columns[4 + at], room, 0)
        for at, name in enumerate(("profile_start", "profile_end"))
        if tokens.profiles is not None
    }
    return {
        **of_profiles,
        "tokens": tokens_of + padded([tokens.sum_id] * len(slots), shape.slots, 0),
        "position": positions + tail("position", 0),
        "unit": unit + tail("unit", -1),
        "unit_start": padded([*unit_columns[0], len(body)], room + 1, len(body)),
        "unit_first": padded(unit_columns[1], room, 0),
        "prefix_start": padded(unit_columns[2], room, 0),
        "prefix_end": padded(unit_columns[3], room, 0),
        "readout_end": tail("readout_end", 0),
        "labels": tail("labels", 0.0),
        "used": padded([1.0] * len(slots), shape.slots, 0.0),
        "target_row": tail("target_row", -1),
        "target_position": tail("target_position", -1),
        "body_tokens": len(body),
    }


@given(
    seed=st.integers(0, 10_000),
    lengths=st.lists(st.integers(0, 14), min_size=1, max_size=4),
    target_start=st.integers(0, 4),
    n=st.integers(1, 6),
    k=st.integers(1, 6),
    prefix=st.sampled_from([0, 1, 4]),
    time_gaps=st.booleans(),
    pieces=orders_of_pieces(),
    profiles=st.booleans(),
)
def test_a_pack_is_what_laying_it_out_token_by_token_gives(
    seed, lengths, target_start, n, k, prefix, time_gaps, pieces, profiles
):
    rng = np.random.default_rng(seed)
    tokens = item_tokens(rng, prefix=prefix, time_gaps=time_gaps, pieces=pieces)
    block = users(rng, lengths, target_start=target_start)
    if profiles:
        tokens, block = with_profiles(tokens, block, seed)
    samples = SampleSettings(n, k, 0).cut(block)
    chosen = rng.permutation(len(samples))[: int(rng.integers(0, 9))]
    samples = samples.take(chosen)  # in any order, as after shuffling; maybe none
    shape = replace(SHAPE, length=2048)
    pack = build_pack(samples, block, tokens, shape)
    expected = plain_pack(samples, block, tokens, shape)
    found = vars(pack) | vars(pack.layout)
    assert found.keys() - expected.keys() == {
        "layout",
        "shared",
        "unit_place",
        "unit_context_end",
        "weight",
        "further_labels",
        *(() if profiles else ("profile_start", "profile_end")),
    }
    assert pack.layout.shared is None
    for name, values in expected.items():
        array = found[name]
        assert (array.tolist() if isinstance(array, torch.Tensor) else array) == values, name
    assert pack.targets == samples.targets.sum()


@given(
    seed=st.integers(0, 2**32 - 1),
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=6),
    items=st.integers(1, 12),
    prefix=st.integers(0, 3),
    time_gaps=st.booleans(),
    pieces=orders_of_pieces(),
    numbers=st.sampled_from([1, 40, 1 << 40]),
)
def test_a_shared_body_holds_each_distinct_interaction_once(
    seed, lengths, items, prefix, time_gaps, pieces, numbers
):
    rng = np.random.default_rng(seed)
    tokens = item_tokens(rng, items=items, prefix=prefix, time_gaps=time_gaps, pieces=pieces)
    block = users(rng, lengths, items=items)
    samples = SampleSettings(4, 3, 0).cut(block)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(item_tokens_module, "_MOST_NUMBERS", numbers)  # of texts, before they fold
        pack = build_pack(samples, block, tokens, replace(SHAPE, body=128))
    plain = build_pack(samples, block, tokens, SHAPE)
    shared, ids = pack.layout.shared, pack.tokens[: -SHAPE.slots]
    used = plain.body_tokens
    source = shared.source[:used]
    assert pack.body_tokens == len(ids) == len(set(source.tolist()))
    assert (ids[source] == plain.tokens[:used]).all()

    # Each token, where it stands in a sample, and what of its own interaction it sees before it.
    seen = {}
    words = block_words(block, tokens)
    texts = set()
    unit = plain.layout.unit[:used].numpy()
    for place in range(used):
        own = np.flatnonzero(unit[: place + 1] == unit[place])[:-1]
        is_prefix = prefix and plain.layout.position[place] < prefix
        expected = list(range(own.size)) if is_prefix else source[own].tolist()
        at = int(source[place])
        found = list(range(shared.start[at], shared.end[at]))
        assert found == expected
        assert shared.position[at] == len(own) + (0 if is_prefix else prefix)
        assert seen.setdefault(at, found) == found
    for sample_row, first, end in zip(samples.row, samples.first, samples.end, strict=True):
        places = block.offsets[sample_row] + np.arange(first, end)
        texts |= {
            (*words[i].tolist(), int(block.item_ids[i]), int(block.labels[i])) for i in places
        }
    distinct_texts = {text[:-1] for text in texts}
    assert len(ids) == (prefix if texts else 0) + len(texts) + sum(
        int(tokens.lengths[item]) + sum(int(tokens.word_lengths[row]) for row in rows)
        for *rows, item in distinct_texts
    )


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("time_gaps", [False, True])
def test_a_pack_without_samples_is_padding_of_zero_weight(prefix, time_gaps):
    rng = np.random.default_rng(0)
    tokens = item_tokens(rng, prefix=prefix, time_gaps=time_gaps)
    pack = build_pack(Samples.none(), users(rng, [3]), tokens, SHAPE)
    assert pack.targets == pack.body_tokens == 0
    assert (pack.layout.unit == -1).all()
    assert (pack.target_row == -1).all()
    assert not pack.layout.unit_start.any()


def test_the_same_fields_have_the_same_types_in_every_pack():
    rng = np.random.default_rng(0)
    tokens, block = item_tokens(rng, prefix=2, time_gaps=True), users(rng, [9])
    samples = SampleSettings(3, 2, 1).cut(block)
    full, empty = (
        build_pack(samples.take(np.arange(count)), block, tokens, SHAPE) for count in (3, 0)
    )
    for a, b in ((full, empty), (full.layout, empty.layout)):
        for name, value in vars(a).items():
            other = getattr(b, name)
            assert type(value) is type(other)
            if isinstance(value, torch.Tensor):
                assert value.dtype == other.dtype, name


# --- the pack's constants --------------------------------------------------------------------


@given(sizes.filter(len), st.integers(1, 20))
def test_slots_are_sized_so_that_targets_seldom_run_out(sizes, blocks):
    tokens, targets = columns(sizes)
    shape = pack_shape(256 * blocks, None, tokens, targets)
    assert shape.slots % 128 == 0
    assert shape.slots >= targets.max()
    assert shape.slots >= 1.05 * shape.length * targets.sum() / tokens.sum() - 1


@given(st.integers(129, 5000))
def test_a_pack_too_short_names_the_length_that_works(longest):
    tokens, targets = np.array([100, longest, 7]), np.array([1, 2, 1])
    with pytest.raises(UserError, match=f"longest sample, which has {longest} tokens") as raised:
        pack_shape(128, None, tokens, targets)
    advised = int(re.search(r"Set pack\.length=(\d+)", str(raised.value))[1])
    assert pack_shape(advised, None, tokens, targets).length == advised
    assert advised % 128 == 0
    with pytest.raises(UserError):
        pack_shape(advised - 128, None, tokens, targets)


@given(st.integers(129, 5000))
def test_too_few_slots_name_the_number_that_works(most):
    tokens, targets = np.array([100, 90]), np.array([most, 1])
    with pytest.raises(UserError, match=f"too few for a sample with {most} targets") as raised:
        pack_shape(128, 128, tokens, targets)
    advised = int(re.search(r"Set pack\.readout_slots=(\d+)", str(raised.value))[1])
    assert pack_shape(128, advised, tokens, targets).slots == advised
