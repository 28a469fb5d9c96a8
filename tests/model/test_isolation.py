"""The invariants of a streaming prompt, on random-weight models of every family, in float64."""

import numpy as np
import pytest
import torch

from dti_dist.data.packing import PackShape
from tests.tiny import (
    FAMILIES,
    Float64Rotary,
    batch_of,
    ctr_model,
    item_tokens,
    logits_by_target,
    users,
)

N, K = 4, 6
SHAPE = PackShape(length=256, slots=128)


def world(seed=0, prefix=0, time_gaps=False):
    rng = np.random.default_rng(seed)
    return item_tokens(rng, prefix=prefix, time_gaps=time_gaps), users(rng, [20, 9, 2, 13])


def largest_difference(a, b):
    assert a.keys() == b.keys()
    assert len(a) > 20
    return max(abs(float((a[key] - b[key]).detach())) for key in a)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("float64_rotary", "time_gaps"),
    [(True, False), (True, True), (False, False)],
)
def test_streaming_equals_sliding_window_under_budget(family, float64_rotary, time_gaps):
    tokens, block = world(time_gaps=time_gaps)
    model = ctr_model(family, "budget", N, budget=[2, 2, 0])
    if float64_rotary:
        model.backbone.rotary_emb = Float64Rotary(model.backbone.rotary_emb.inv_freq)
    else:  # weights as transformers initialises them
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.data *= 0.02 / 0.3
    gradients = []
    logits = []
    for k in (K, 1):
        model.zero_grad()
        found = logits_by_target(model, batch_of(block, tokens, N, k, SHAPE))
        weights = {key: 1.0 + key[1] for key in found}
        sum(weights[key] * torch.tanh(value) for key, value in found.items()).backward()
        logits.append(found)
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert largest_difference(*logits) < 1e-6
    for name, streaming in gradients[0].items():
        difference = (streaming - gradients[1][name]).abs().max() / streaming.abs().max()
        assert difference < 1e-6, name


@pytest.mark.parametrize("family", FAMILIES)
def test_streaming_differs_from_sliding_window_under_windowed(family):
    tokens, block = world()
    model = ctr_model(family, "windowed", N)
    streaming, sliding = (
        logits_by_target(model, batch_of(block, tokens, N, k, SHAPE)) for k in (K, 1)
    )
    assert largest_difference(streaming, sliding) > 1e-3


@pytest.mark.parametrize("head", ["yes_no", "linear"])
@pytest.mark.parametrize("policy", ["windowed", "budget"])
def test_label_of_a_target_cannot_reach_its_own_prediction_or_an_earlier_one(policy, head):
    tokens, block = world()
    model = ctr_model("llama", policy, N, head)
    before = logits_by_target(model, batch_of(block, tokens, N, K, SHAPE))
    flipped = 7  # an interaction of the first user, in the middle of a prompt
    block.labels[flipped] ^= 1
    after = logits_by_target(model, batch_of(block, tokens, N, K, SHAPE))
    row = block.rows[0]
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved, "later targets must see the label"
    assert all(r == row and position > flipped for r, position in moved)


def test_what_lies_more_than_n_back_cannot_reach_a_target_under_budget():
    tokens, block = world()
    model = ctr_model("llama", "budget", N)
    before = logits_by_target(model, batch_of(block, tokens, N, K, SHAPE))
    changed = 7
    same_length = np.flatnonzero(tokens.lengths == tokens.lengths[block.item_ids[changed]])
    block.item_ids[changed] = next(i for i in same_length if i != block.item_ids[changed])
    block.labels[changed] ^= 1
    after = logits_by_target(model, batch_of(block, tokens, N, K, SHAPE))
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved == {(block.rows[0], position) for position in range(changed, changed + N + 1)}


def test_what_lies_more_than_n_back_does_reach_a_target_under_windowed():
    tokens, block = world()
    model = ctr_model("llama", "windowed", N)
    before = logits_by_target(model, batch_of(block, tokens, N, K, SHAPE))
    block.labels[7] ^= 1
    after = logits_by_target(model, batch_of(block, tokens, N, K, SHAPE))
    moved = [key for key in before if not torch.equal(before[key], after[key])]
    assert max(position for _, position in moved) > 7 + N


@pytest.mark.parametrize("policy", ["windowed", "budget"])
def test_a_sample_has_the_same_logits_alone_and_at_any_place_in_any_pack(policy):
    tokens, block = world(prefix=3 if policy == "windowed" else 0)
    model = ctr_model("qwen3", policy, N, has_prefix=policy == "windowed")
    crowded = logits_by_target(model, batch_of(block, tokens, N, K, PackShape(640, 128)))
    sparse = logits_by_target(model, batch_of(block, tokens, N, K, PackShape(128, 128)))
    assert largest_difference(crowded, sparse) < 1e-9


def test_a_prefix_is_read_under_windowed():
    tokens, block = world(prefix=3)
    model = ctr_model("llama", "windowed", N, has_prefix=True)
    before = logits_by_target(model, batch_of(block, tokens, N, K, SHAPE))
    tokens.prefix[0] += 1
    after = logits_by_target(model, batch_of(block, tokens, N, K, SHAPE))
    assert all(not torch.equal(before[key], after[key]) for key in before)


def test_sum_slots_change_nothing_in_the_body():
    tokens, block = world()
    model = ctr_model("llama", "windowed", N)
    seen = {}
    model.backbone.layers[-1].register_forward_hook(
        lambda module, inputs, output: seen.update(
            hidden=output[0] if isinstance(output, tuple) else output
        )
    )
    batch = batch_of(block, tokens, N, K, SHAPE)
    model(batch)
    with_slots = seen["hidden"][:, : SHAPE.length].clone()
    batch.tokens[:, SHAPE.length :] = 0
    batch.unit[:, SHAPE.length :] = -1
    model(batch)
    assert torch.equal(with_slots, seen["hidden"][:, : SHAPE.length])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", ["windowed", "budget"])
def test_chunked_and_dense_backends_agree(family, policy):
    tokens, block = world()
    batch = batch_of(block, tokens, N, K, SHAPE)
    chunked, dense = (
        logits_by_target(ctr_model(family, policy, N, backend=backend), batch)
        for backend in ("chunked", "dense")
    )
    assert largest_difference(chunked, dense) < 1e-9


def test_yes_no_is_the_softmax_over_the_two_label_words_of_the_whole_vocabulary():
    tokens, block = world()
    model = ctr_model("mistral", "windowed", N)
    batch = batch_of(block, tokens, N, K, SHAPE)
    seen = {}
    model.head.register_forward_hook(lambda m, inputs, output: seen.update(hidden=inputs[0]))
    logits = model(batch)
    vocabulary = seen["hidden"] @ model.head.weight.T
    no, yes = tokens.label_ids
    expected = vocabulary[..., [no, yes]].softmax(-1)[..., 1]
    torch.testing.assert_close(torch.sigmoid(logits.double()), expected, atol=1e-6, rtol=1e-6)
