"""The invariants of a streaming prompt, on random-weight models of every family, in float64."""

import numpy as np
import pytest
import torch

from dti_dist.attention.flex import compiled_graphs
from dti_dist.data.layout import PackShape
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
POLICIES = ("windowed", "reset", "budget", "isolated")
SHAPE = PackShape(length=256, slots=128)


def world(seed=0, prefix=0, time_gaps=False):
    rng = np.random.default_rng(seed)
    return item_tokens(rng, prefix=prefix, time_gaps=time_gaps), users(rng, [20, 9, 2, 13])


def largest_difference(a, b):
    assert a.keys() == b.keys()
    assert len(a) > 20
    return max(abs(float((a[key] - b[key]).detach())) for key in a)


def logits_and_gradients(model, batch):
    """Logits, and the gradients of a sum in which each of them counts differently."""
    model.zero_grad()
    found = logits_by_target(model, batch)
    sum((1.0 + key[1]) * torch.tanh(value) for key, value in found.items()).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found, gradients


def assert_the_same(first, second, tolerance):
    assert largest_difference(first[0], second[0]) < tolerance
    assert first[1].keys() == second[1].keys()
    for name, gradient in first[1].items():
        # What is 0 in exact numbers, such as Qwen2's key bias without rotation, is only rounding.
        allowed = tolerance * gradient.abs().max() + 1e-12
        assert (gradient - second[1][name]).abs().max() <= allowed, name


def exact_model(family, policy, positions="rope", prefix=0):
    """Rotary tables in float64: transformers' float32 would be the largest difference."""
    budget = [2, 2, 0] if policy == "budget" else "even"
    model = ctr_model(family, policy, N, positions=positions, budget=budget, prefix=prefix)
    model.backbone.rotary_emb = Float64Rotary(model.backbone.rotary_emb.inv_freq)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("positions", ["rope", "alibi"])
@pytest.mark.parametrize("policy", ["budget", "isolated"])
def test_streaming_equals_sliding_window_under_exact_policies(family, policy, positions):
    tokens, block = world()
    model = exact_model(family, policy, positions)
    streaming, sliding = (
        logits_and_gradients(model, batch_of(block, tokens, N, k, SHAPE)) for k in (K, 1)
    )
    assert_the_same(streaming, sliding, 1e-6)


@pytest.mark.parametrize(
    ("policy", "prefix", "time_gaps"),
    [("budget", 0, True), ("isolated", 0, True), ("isolated", 3, True)],
)
def test_streaming_equals_sliding_window_with_time_gaps_and_prefix(policy, prefix, time_gaps):
    tokens, block = world(prefix=prefix, time_gaps=time_gaps)
    model = exact_model("llama", policy, prefix=prefix)
    streaming, sliding = (
        logits_and_gradients(model, batch_of(block, tokens, N, k, SHAPE, share=share))
        for k, share in ((K, policy == "isolated"), (1, False))
    )
    assert_the_same(streaming, sliding, 1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_streaming_equals_sliding_window_with_the_tables_and_weights_of_transformers(family):
    tokens, block = world()
    model = ctr_model(family, "budget", N, budget=[2, 2, 0])
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.data *= 0.02 / 0.3
    streaming, sliding = (
        logits_by_target(model, batch_of(block, tokens, N, k, SHAPE)) for k in (K, 1)
    )
    assert largest_difference(streaming, sliding) < 1e-6


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("positions", ["rope", "alibi"])
@pytest.mark.parametrize("policy", ["windowed", "reset"])
def test_streaming_differs_from_sliding_window_under_leaking_policies(family, policy, positions):
    tokens, block = world()
    model = ctr_model(family, policy, N, positions=positions)
    streaming, sliding = (
        logits_by_target(model, batch_of(block, tokens, N, k, SHAPE)) for k in (K, 1)
    )
    assert largest_difference(streaming, sliding) > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("positions", ["rope", "alibi"])
@pytest.mark.parametrize("prefix", [0, 3])
def test_shared_interactions_change_neither_logits_nor_gradients(family, positions, prefix):
    rng = np.random.default_rng(1)
    tokens = item_tokens(rng, items=6, prefix=prefix, time_gaps=True)
    block = users(rng, [20, 9, 2, 13], items=6)
    model = exact_model(family, "isolated", positions, prefix)
    shared, each = (batch_of(block, tokens, N, K, SHAPE, share=share) for share in (True, False))
    assert shared.body_tokens < 0.6 * each.body_tokens
    assert shared.tokens.shape[1] < each.tokens.shape[1]
    assert_the_same(logits_and_gradients(model, shared), logits_and_gradients(model, each), 1e-6)


@pytest.mark.parametrize("head", ["yes_no", "linear"])
@pytest.mark.parametrize("positions", ["rope", "alibi"])
@pytest.mark.parametrize("policy", POLICIES)
def test_label_of_a_target_cannot_reach_its_own_prediction_or_an_earlier_one(
    policy, positions, head
):
    tokens, block = world()
    model = ctr_model("llama", policy, N, head, positions=positions)
    before = logits_by_target(model, batch_of(block, tokens, N, K, SHAPE))
    flipped = 7  # an interaction of the first user, in the middle of a prompt
    block.labels[flipped] ^= 1
    after = logits_by_target(model, batch_of(block, tokens, N, K, SHAPE))
    row = block.rows[0]
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved, "later targets must see the label"
    assert all(r == row and position > flipped for r, position in moved)


@pytest.mark.parametrize("positions", ["rope", "alibi"])
@pytest.mark.parametrize("policy", ["budget", "isolated"])
def test_interactions_more_than_n_back_cannot_reach_a_target_under_exact_policies(
    policy, positions
):
    tokens, block = world()
    model = ctr_model("llama", policy, N, positions=positions)
    before = logits_by_target(model, batch_of(block, tokens, N, K, SHAPE))
    changed = 7
    same_length = np.flatnonzero(tokens.lengths == tokens.lengths[block.item_ids[changed]])
    block.item_ids[changed] = next(i for i in same_length if i != block.item_ids[changed])
    block.labels[changed] ^= 1
    after = logits_by_target(model, batch_of(block, tokens, N, K, SHAPE))
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved == {(block.rows[0], position) for position in range(changed, changed + N + 1)}


@pytest.mark.parametrize("policy", ["windowed", "reset"])
def test_interactions_more_than_n_back_reach_a_target_under_leaking_policies(policy):
    tokens, block = world()
    model = ctr_model("llama", policy, N)
    before = logits_by_target(model, batch_of(block, tokens, N, K, SHAPE))
    block.labels[7] ^= 1
    after = logits_by_target(model, batch_of(block, tokens, N, K, SHAPE))
    moved = [key for key in before if not torch.equal(before[key], after[key])]
    assert max(position for _, position in moved) > 7 + N


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_sample_has_the_same_logits_alone_and_at_any_place_in_any_pack(policy, family):
    prefix, share = 0 if policy == "budget" else 3, policy == "isolated"
    tokens, block = world(prefix=prefix)
    model = ctr_model(family, policy, N, prefix=prefix)
    crowded, sparse = (
        logits_by_target(model, batch_of(block, tokens, N, K, PackShape(length, 128), share=share))
        for length in (640, 128)
    )
    assert largest_difference(crowded, sparse) < 1e-9


@pytest.mark.parametrize("policy", ["windowed", "reset", "isolated"])
def test_a_prefix_is_read(policy):
    tokens, block = world(prefix=3)
    model = ctr_model("llama", policy, N, prefix=3)
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
    batch.layout.unit[:, SHAPE.length :] = -1
    model(batch)
    assert torch.equal(with_slots, seen["hidden"][:, : SHAPE.length])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("positions", ["rope", "alibi"])
@pytest.mark.parametrize("policy", POLICIES)
def test_chunked_and_dense_backends_agree(family, policy, positions):
    tokens, block = world()
    batch = batch_of(block, tokens, N, K, SHAPE, share=policy == "isolated")
    chunked, dense = (
        logits_and_gradients(
            ctr_model(family, policy, N, backend=backend, positions=positions), batch
        )
        for backend in ("chunked", "dense")
    )
    assert_the_same(chunked, dense, 1e-6)


def test_yes_no_is_the_softmax_over_the_two_label_words_of_the_whole_vocabulary():
    tokens, block = world()
    model = ctr_model("mistral", "windowed", N)
    batch = batch_of(block, tokens, N, K, SHAPE)
    seen = {}
    model.head.register_forward_hook(lambda m, inputs, output: seen.update(hidden=inputs[0]))
    logits = model(batch)
    vocabulary = seen["hidden"] @ model.head.table.T
    no, yes = tokens.label_ids
    expected = vocabulary[..., [no, yes]].softmax(-1)[..., 1]
    torch.testing.assert_close(torch.sigmoid(logits.double()), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("positions", ["rope", "alibi"])
@pytest.mark.parametrize("policy", POLICIES)
def test_flex_and_dense_backends_agree_forward_with_two_graphs(policy, positions):
    tokens, block = world()
    wide = {"head_dim": 16, "hidden_size": 144, "num_attention_heads": 9, "num_key_value_heads": 3}
    batch = batch_of(block, tokens, N, K, SHAPE, share=policy == "isolated")
    graphs, found = compiled_graphs(), {}
    for backend in ("flex", "dense"):
        model = ctr_model("llama", policy, N, backend=backend, positions=positions, **wide).float()
        with torch.no_grad():
            found[backend] = logits_by_target(model, batch)
            found[backend] |= logits_by_target(model, batch)
    assert largest_difference(found["flex"], found["dense"]) < 1e-3
    assert compiled_graphs() - graphs <= 2  # of body and readout, whatever the layers' windows


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("positions", ["rope", "alibi"])
@pytest.mark.parametrize("policy", POLICIES)
def test_flex_on_cuda_is_the_dense_model_forward_and_backward(policy, positions):
    tokens, block = world()
    wide = {"head_dim": 16, "hidden_size": 144, "num_attention_heads": 9, "num_key_value_heads": 3}
    batch = batch_of(block, tokens, N, K, SHAPE, share=policy == "isolated").to("cuda")
    flex, dense = (
        logits_and_gradients(
            ctr_model("llama", policy, N, backend=backend, positions=positions, **wide).to(
                "cuda", dtype
            ),
            batch,
        )
        for backend, dtype in (("flex", torch.float32), ("dense", torch.float64))
    )
    assert_the_same(flex, dense, 2e-2)  # FlexAttention multiplies in TF32 where it may
