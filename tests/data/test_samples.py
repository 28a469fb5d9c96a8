"""Cutting user sequences into prompts, against plain loops."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dti_dist.data.layout import PackShape, build_pack
from dti_dist.data.samples import SampleSettings, Units, interaction_lengths, sample_lengths
from tests.tiny import as_one_request_each, item_tokens, plain_samples, same, sequences, users

ROOM = PackShape(length=1024, slots=128)  # more than any sample here needs

numbers = {"n": st.integers(1, 12), "k": st.integers(1, 12), "min_context": st.integers(0, 12)}
rows = {"rows": st.lists(st.tuples(st.integers(0, 30), st.integers(0, 35)), max_size=6)}


def samples_of(rows, n, k, min_context):
    offsets = np.cumsum([0] + [length for length, _ in rows])
    target_start = np.array([start for _, start in rows], dtype=np.int64)
    return SampleSettings(n, k, min_context).cut(sequences(offsets, target_start))


def as_tuples(samples):
    fields = (samples.row, samples.first, samples.first_target, samples.end)
    return list(zip(*(field.tolist() for field in fields), strict=True))


def targets_of(samples):
    return [
        (row, position)
        for row, _, first_target, end in as_tuples(samples)
        for position in range(first_target, end)
    ]


@given(**rows, **numbers)
def test_samples_are_those_of_a_plain_loop(rows, n, k, min_context):
    expected = []
    for row, (length, target_start) in enumerate(rows):
        for first_target in range(max(target_start, min_context), length, k):
            end = min(first_target + k, length)
            expected.append((row, max(first_target - n, 0), first_target, end))
    assert as_tuples(samples_of(rows, n, k, min_context)) == expected


@given(**rows, **numbers)
def test_each_interaction_is_a_target_exactly_once_whatever_n_and_k(rows, n, k, min_context):
    eligible = [
        (row, position)
        for row, (length, target_start) in enumerate(rows)
        for position in range(length)
        if position >= target_start and position >= min_context
    ]
    assert targets_of(samples_of(rows, n, k, min_context)) == eligible


@given(**rows, **numbers)
def test_streaming_and_sliding_window_prompts_have_the_same_targets(rows, n, k, min_context):
    streaming = samples_of(rows, n, k, min_context)
    sliding = samples_of(rows, n, 1, min_context)
    assert targets_of(streaming) == targets_of(sliding)
    assert (sliding.targets == 1).all()


@given(**rows, **numbers)
def test_a_sample_has_at_most_k_targets_and_all_available_context_up_to_n(rows, n, k, min_context):
    samples = samples_of(rows, n, k, min_context)
    assert ((samples.targets >= 1) & (samples.targets <= k)).all()
    available = samples.first_target
    assert (samples.first_target - samples.first == np.minimum(n, available)).all()
    assert (available >= min_context).all()


some_users = {
    "seed": st.integers(0, 2**32 - 1),
    "lengths": st.lists(st.integers(0, 25), min_size=1, max_size=4),
}


@given(**some_users, target_start=st.integers(0, 9), **numbers)
def test_samples_of_requests_are_those_of_a_plain_loop(
    seed, lengths, target_start, n, k, min_context
):
    rng = np.random.default_rng(seed)
    block = users(rng, lengths, target_start=target_start, requests=True)
    samples = SampleSettings(n, k, min_context).cut(block)
    units = Units.of(samples, block)
    position = units.source - block.offsets[samples.row[units.sample]]
    bounds = np.cumsum([0, *samples.targets])
    assert bounds[-1] == len(units.targets)
    expected = plain_samples(block, n, k, min_context)
    assert samples.row.tolist() == [sample.row for sample in expected]
    for number, sample in enumerate(expected):
        mine = units.targets[bounds[number] : bounds[number + 1]]
        assert (units.sample[mine] == number).all()
        assert position[mine].tolist() == sample.targets
        # What each target sees of its sample, and the place of its request.
        history = (units.sample == number) & units.labelled
        before = sample.context
        seen_of = {}
        for targets, of_request in sample.requests:
            seen_of |= dict.fromkeys(targets, before)
            before = before + of_request
        for unit in mine:
            first = int(np.flatnonzero(units.sample == number)[0])
            seen = position[first : first + units.place[unit]]
            assert seen.tolist() == seen_of[position[unit]]
            assert history[first : first + units.place[unit]].all()


@given(**some_users, prefix=st.sampled_from([0, 3]), time_gaps=st.booleans(), **numbers)
def test_requests_of_one_give_the_samples_and_packs_that_there_are_without_requests(
    seed, lengths, prefix, time_gaps, n, k, min_context
):
    rng = np.random.default_rng(seed)
    tokens = item_tokens(rng, prefix=prefix, time_gaps=time_gaps)
    alone = as_one_request_each(users(rng, lengths))
    without = replace(alone, by_request=False)
    samples, expected = (SampleSettings(n, k, min_context).cut(b) for b in (alone, without))
    assert as_tuples(samples) == as_tuples(expected)
    lengths_of = sample_lengths(samples, alone, tokens)
    assert lengths_of.tolist() == sample_lengths(expected, without, tokens).tolist()
    for at in range(len(samples)):
        one = samples.take(np.array([at]))
        pack, plain = (build_pack(one, block, tokens, ROOM) for block in (alone, without))
        layout = replace(pack.layout, unit_place=None, unit_context_end=None)
        assert same(replace(pack, layout=layout), plain)


@given(
    **some_users,
    prefix=st.sampled_from([0, 3]),
    time_gaps=st.booleans(),
    requests=st.booleans(),
    **numbers,
)
def test_the_length_of_a_sample_is_that_of_its_pack(
    seed, lengths, prefix, time_gaps, requests, n, k, min_context
):
    rng = np.random.default_rng(seed)
    tokens = item_tokens(rng, prefix=prefix, time_gaps=time_gaps)
    block = users(rng, lengths, requests=requests)
    samples = SampleSettings(n, k, min_context).cut(block)
    found = [
        build_pack(samples.take(np.array([at])), block, tokens, ROOM).body_tokens
        for at in range(len(samples))
    ]
    assert sample_lengths(samples, block, tokens).tolist() == found


def test_the_longest_interaction_bounds_every_interaction():
    rng = np.random.default_rng(0)
    for time_gaps in (False, True):
        tokens, block = item_tokens(rng, time_gaps=time_gaps), users(rng, [200])
        assert interaction_lengths(block, tokens).max() <= tokens.longest_interaction
        assert tokens.longest_interaction <= 4 + 2 * time_gaps + 1  # as tests/tiny.py draws them
