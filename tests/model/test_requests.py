"""Interactions that were shown at once: a prediction knows what serving knows, and no more."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dti_dist.data.layout import PackShape
from dti_dist.data.profiles import ProfileTokens
from dti_dist.serving.item_texts import ItemTexts
from dti_dist.serving.pretrained import Pretrained
from dti_dist.serving.requests import RawRequests
from dti_dist.serving.scorer import Scorer
from tests.model.test_isolation import (
    assert_the_same,
    exact_model,
    largest_difference,
    logits_and_gradients,
)
from tests.tiny import (
    FAMILIES,
    add_item_vectors,
    batch_of,
    ctr_model,
    item_tokens,
    logits_by_target,
    users,
    with_item_tokens,
    with_profiles,
)

N, K = 4, 6
POLICIES = ("windowed", "reset", "budget", "isolated")
SHAPE = PackShape(length=512, slots=128)


PIECES = (("item",), ("weekday", "item", "hour", "item"))
EVERYTHING = {
    "profiles": True,
    "pieces": PIECES[1],
    "time_gaps": True,
    "prefix": 3,
    "vectors": True,
}


def world(
    seed=0, prefix=0, time_gaps=False, items=30, pieces=("item",), profiles=False, vectors=False
):
    rng = np.random.default_rng(seed)
    tokens = item_tokens(rng, items=items, prefix=prefix, time_gaps=time_gaps, pieces=pieces)
    if vectors:
        tokens = with_item_tokens(tokens)
    block = users(rng, [40, 9, 2, 33], items=items, requests=True)
    return with_profiles(tokens, block, seed) if profiles else (tokens, block)


def raw_requests(block):
    """Each request with targets and history, its targets as candidates, and their keys."""
    bounds = block.requests
    raws, keys, of_row = [], [], []
    for row, (start, end) in enumerate(zip(block.offsets[:-1], block.offsets[1:], strict=True)):
        for first in np.unique(bounds.start[start:end]):
            mine = np.flatnonzero(bounds.start == first)
            targets = mine[block.is_target[mine]]
            history = np.arange(start, first)[bounds.history[start:first]]
            if len(targets) and len(history):
                raws.append((history, targets, int(block.timestamps[first])))
                of_row.append(row)
                keys += [(int(block.rows[row]), int(target - start)) for target in targets]
    history = np.concatenate([h for h, _, _ in raws])
    candidates = np.concatenate([t for _, t, _ in raws])
    raw = RawRequests(
        items=block.item_ids[history].astype(np.int64),
        labels=block.labels[history],
        timestamps=block.timestamps[history],
        offsets=np.cumsum([0, *(len(h) for h, _, _ in raws)]),
        candidates=block.item_ids[candidates].astype(np.int64),
        candidate_offsets=np.cumsum([0, *(len(t) for _, t, _ in raws)]),
        times=np.array([time for *_, time in raws]),
        profiles=None if block.profile is None else block.profile[of_row],
    )
    return raw, keys


def scores_of(model, block, tokens, n=N):
    """What a Scorer says of each target of the block, with its request as the candidates."""
    raw, keys = raw_requests(block)
    scorer = Scorer(Pretrained(model, ItemTexts(tokens, None, None), n, None, by_request=True))
    return dict(zip(keys, scorer.score_requests(scorer.cut(raw).requests), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("positions", ["rope", "alibi"])
@pytest.mark.parametrize("policy", ["budget", "isolated"])
@pytest.mark.parametrize("more", [{}, EVERYTHING], ids=["", "everything"])
def test_streaming_equals_sliding_window_and_scorer_under_exact_policies(
    family, policy, positions, more
):
    tokens, block = world(**more)
    model = exact_model(family, policy, positions)
    if tokens.vocabulary is not None:
        add_item_vectors(model, tokens)
    streaming, sliding = (
        logits_and_gradients(model, batch_of(block, tokens, N, k, SHAPE)) for k in (K, 1)
    )
    assert_the_same(streaming, sliding, 1e-6)
    scores = scores_of(model, block, tokens)
    assert scores.keys() == streaming[0].keys()
    for key, score in scores.items():
        assert (
            abs(float(torch.sigmoid(streaming[0][key].detach())) - score) < 2e-7
        )  # scores are float32


@settings(max_examples=12)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 9),
    k=st.integers(2, 20),
    policy=st.sampled_from(["budget", "isolated", "isolated, shared"]),
    positions=st.sampled_from(["rope", "alibi"]),
    pieces=st.sampled_from(PIECES),
    profiles=st.booleans(),
    vectors=st.booleans(),
)
def test_that_holds_for_any_requests_and_sizes(
    seed, n, k, policy, positions, pieces, profiles, vectors
):
    policy, _, shared = policy.partition(", ")
    prefix = 3 if policy == "isolated" else 0
    tokens, block = world(
        seed,
        prefix=prefix,
        time_gaps=True,
        items=8,
        pieces=pieces,
        profiles=profiles,
        vectors=vectors,
    )
    attention = {"budget": "even"} if policy == "budget" else {}
    model = ctr_model("llama", policy, n, positions=positions, prefix=prefix, **attention)
    if vectors:
        add_item_vectors(model, tokens)
    shape = PackShape(1024, 128)
    streaming, sliding = (
        logits_by_target(model, batch_of(block, tokens, n, size, shape, share=share))
        for size, share in ((k, bool(shared)), (1, False))
    )
    scores = scores_of(model, block, tokens, n)
    assert scores.keys() == streaming.keys() == sliding.keys()
    for key, score in scores.items():
        assert abs(float((streaming[key] - sliding[key]).detach())) < 1e-5  # rotary tables: float32
        assert abs(float(torch.sigmoid(streaming[key].detach())) - score) < 1e-5


@pytest.mark.parametrize("positions", ["rope", "alibi"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("k", [1, K])
def test_nothing_of_its_own_request_reaches_a_target(policy, positions, k):
    tokens, block = world()
    model = ctr_model("llama", policy, N, positions=positions)
    before = logits_by_target(model, batch_of(block, tokens, N, k, SHAPE))
    start = block.requests.start
    sizes = np.bincount(start, minlength=len(start))
    moved_later = 0
    for at in np.flatnonzero(sizes >= 3)[:6]:  # where a request of at least three begins
        for changed in (at, at + 1):
            was = block.item_ids[changed], block.labels[changed]
            of_length = np.flatnonzero(tokens.lengths == tokens.lengths[was[0]])
            block.item_ids[changed] = next(i for i in of_length if i != was[0])
            block.labels[changed] ^= 1
            after = logits_by_target(model, batch_of(block, tokens, N, k, SHAPE))
            block.item_ids[changed], block.labels[changed] = was
            row = int(np.searchsorted(block.offsets, changed, side="right")) - 1
            for key, logit in before.items():
                place = block.offsets[row] + key[1]
                same = key[0] == block.rows[row] and place != changed
                if same and start[place] == at:
                    assert torch.equal(after[key], logit)
                moved_later += bool(same and place > changed and not torch.equal(after[key], logit))
    assert moved_later, "later requests see what was clicked"


@pytest.mark.parametrize("k", [1, K])
@pytest.mark.parametrize("policy", POLICIES)
def test_the_order_and_number_of_a_request_reach_none_of_its_targets(policy, k):
    tokens, block = world(time_gaps=True)
    model = ctr_model("llama", policy, N)
    start, before = block.requests.start, block.requests.before
    sizes = np.bincount(start[: block.offsets[1]], block.is_target[: block.offsets[1]])
    # The first user's request with the most targets, behind some history.
    (mine,) = np.nonzero(start == np.argmax(sizes * (before[: len(sizes)] > 0)))
    assert len(mine) >= 4

    def logits(order, without=()):
        """Logits by which interaction it was, where the request holds these and in this order."""
        own, stored = (
            {name: values.copy() for name, values in columns.items()}
            for columns in ({"item_ids": block.item_ids, "labels": block.labels}, block.stored)
        )
        for values in (*own.values(), *stored.values()):
            values[mine] = values[mine[order]]
        gone = mine[[position for position, was in enumerate(order) if was in without]]
        stored["is_history"][gone] = stored["is_target"][gone] = False
        changed = replace(block, **own, stored=stored)
        found = logits_by_target(model, batch_of(changed, tokens, N, k, SHAPE))
        position = {int(place): was for place, was in zip(mine, order, strict=True)}
        return {
            position[at]: float(logit.detach())
            for (row, at), logit in found.items()
            if row == block.rows[0] and at in position
        }

    order = list(range(len(mine)))
    before = logits(order)
    assert len(before) >= 3
    for changed in (logits(order[::-1]), logits([*order[2:], *order[:2]]), logits(order, {0, 2})):
        assert changed
        for was, logit in changed.items():
            assert abs(before[was] - logit) < 1e-9


@pytest.mark.parametrize("policy", ["budget", "isolated"])
def test_an_hour_later_predictions_are_others(policy):
    tokens, block = world(**EVERYTHING)
    model = exact_model("llama", policy)
    add_item_vectors(model, tokens)
    moved = replace(block, timestamps=block.timestamps + 3600)
    now, later = (
        logits_by_target(model, batch_of(at, tokens, N, K, SHAPE)) for at in (block, moved)
    )
    assert largest_difference(later, now) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("positions", ["rope", "alibi"])
def test_shared_interactions_change_neither_logits_nor_gradients(family, positions):
    tokens, block = world(seed=1, prefix=3, time_gaps=True, items=6, profiles=True)
    model = exact_model(family, "isolated", positions, prefix=3)
    shared, each = (batch_of(block, tokens, N, K, SHAPE, share=share) for share in (True, False))
    assert shared.body_tokens < 0.7 * each.body_tokens
    assert_the_same(logits_and_gradients(model, shared), logits_and_gradients(model, each), 1e-6)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("profiles", [False, True], ids=["", "profiles"])
def test_a_sample_has_the_same_logits_alone_and_at_any_place_in_any_pack(policy, profiles):
    tokens, block = world(profiles=profiles)
    model = ctr_model("llama", policy, N)
    crowded, sparse = (
        logits_by_target(model, batch_of(block, tokens, N, K, PackShape(length, 128)))
        for length in (640, 256)
    )
    assert largest_difference(crowded, sparse) < 1e-9


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("positions", ["rope", "alibi"])
def test_all_backends_give_the_same(policy, positions):
    tokens, block = world(profiles=True)
    logits = []
    # Compiling takes a while: once, where neither body nor readout is the plain interval.
    for backend in ("dense", "chunked", *(["flex"] if policy == "budget" else [])):
        model = ctr_model(
            "llama", policy, N, backend=backend, positions=positions, head_dim=16
        ).float()
        with torch.no_grad():
            logits.append(logits_by_target(model, batch_of(block, tokens, N, K, SHAPE)))
    for other in logits[1:]:
        assert largest_difference(logits[0], other) < 1e-3


@pytest.mark.parametrize("positions", ["rope", "alibi"])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_profile_reaches_the_predictions_of_its_user_and_no_token_of_an_interaction(
    policy, positions
):
    tokens, block = world(prefix=2 if policy != "budget" else 0, profiles=True)
    block.profile[:] = [0, 3, 1, 3]
    prefix = len(tokens.prefix)
    model = ctr_model("llama", policy, N, positions=positions, prefix=prefix)

    def states(block):
        """Of interactions before the last layer; and logits by target."""
        batch = batch_of(block, tokens, N, K, SHAPE)
        found = []
        last = model.backbone.layers[-1]
        with last.register_forward_pre_hook(lambda _, args: found.append(args[0])):
            logits = logits_by_target(model, batch)
        layout = batch.layout
        kept = (layout.unit >= 0) & ~layout.before(layout.profile_end)
        kept[:, layout.length :] = False
        return found[0][kept].detach(), logits

    before, logits = states(block)
    after, changed = states(replace(block, profile=np.array([2, 3, 1, 3])))
    assert tokens.profiles.lengths[0] != tokens.profiles.lengths[2]
    assert (after - before).abs().max() < 1e-9
    for (row, at), logit in logits.items():
        assert (abs(float((changed[row, at] - logit).detach())) > 1e-6) == (row == block.rows[0])


def test_without_profiles_nothing_is_laid_out_and_nothing_is_read():
    tokens, block = world()
    layout = batch_of(block, tokens, N, K, SHAPE).layout
    assert layout.profile_end is None
    bare = replace(tokens, profiles=ProfileTokens.of([[]]))
    empty = replace(block, profile=np.zeros(len(block.rows), dtype=np.int64))
    for policy in POLICIES:
        model = ctr_model("llama", policy, N)
        without, with_none = (
            logits_by_target(model, batch_of(b, t, N, K, SHAPE))
            for b, t in ((block, tokens), (empty, bare))
        )
        assert largest_difference(without, with_none) < 1e-9
