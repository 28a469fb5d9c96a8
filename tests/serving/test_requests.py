"""Candidates that share a context: scored as alone, whatever else is in the pack."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dti_dist.attention.policies import Budget
from dti_dist.data.layout import PackShape
from dti_dist.data.stream import Batch
from dti_dist.serving.item_texts import ItemTexts
from dti_dist.serving.pretrained import Pretrained
from dti_dist.serving.requests import (
    RawRequests,
    Requests,
    Whose,
    build_request_pack,
    cut_requests,
    pack_requests,
)
from dti_dist.serving.scorer import _PACK_TOKENS, Scorer, compiled_shape
from tests.tiny import FAMILIES, batch_of, ctr_model, item_tokens, logits_by_target, users

N = 4
POLICIES = ("windowed", "reset", "budget", "isolated")


def scorer_of(model, tokens, **settings):
    return Scorer(Pretrained(model, ItemTexts(tokens, None, None), N, None), **settings)


def requests_of(block, tokens, candidates=(), share=False):
    """A request for each interaction but a user's first: what is before it, it, and others."""
    parts = []
    for row, (start, end) in enumerate(itertools.pairwise(block.offsets)):
        for at in range(start + 1, end):
            parts.append((row, at - start, slice(start, at), [block.item_ids[at], *candidates]))
    stamps = [block.timestamps[history] for _, _, history, _ in parts]
    raw = RawRequests(
        items=np.concatenate([block.item_ids[h] for _, _, h, _ in parts]).astype(np.int64),
        labels=np.concatenate([block.labels[h] for _, _, h, _ in parts]),
        timestamps=np.concatenate(stamps),
        offsets=np.cumsum([0, *(len(s) for s in stamps)]),
        candidates=np.concatenate([c for *_, c in parts]).astype(np.int64),
        candidate_offsets=np.cumsum([0, *(len(c) for *_, c in parts)]),
        times=np.array([block.timestamps[h.stop] for _, _, h, _ in parts]),
        whose=Whose(np.array([row for row, *_ in parts]), np.zeros(len(parts), dtype=np.int64)),
    )
    cut = cut_requests(raw, N, tokens, by_request=False, share=share)
    keys = [(int(block.rows[row]), position) for row, position, _, _ in parts]
    return cut.requests, keys


def world(prefix=0, time_gaps=False, seed=0, pieces=("item",)):
    rng = np.random.default_rng(seed)
    tokens = item_tokens(rng, prefix=prefix, time_gaps=time_gaps, pieces=pieces)
    return tokens, users(rng, [20, 9, 2, 13])


def sliding_window_scores(model, block, tokens):
    shape = PackShape(length=256, slots=128)
    with torch.no_grad():
        found = logits_by_target(model, batch_of(block, tokens, N, 1, shape))
    return {key: float(torch.sigmoid(logit)) for key, logit in found.items()}


def assert_equal_to_sliding_window(model, block, tokens, **settings):
    scorer = scorer_of(model, tokens, **settings)
    share = model.scheme.policy.exact
    requests, keys = requests_of(block, tokens, candidates=[3, 17, 8, 3], share=share)
    scores = scorer.score_requests(requests)[requests.candidate_offsets[:-1]]
    expected = sliding_window_scores(model, block, tokens)
    assert set(keys) == set(expected)
    difference = np.abs(scores - np.array([expected[key] for key in keys])).max()
    assert difference < 2e-7  # scores are float32
    assert np.std(scores) > 0.01
    return scorer


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_candidate_scores_as_the_target_of_a_sliding_window_prompt(family, policy):
    tokens, block = world()
    assert_equal_to_sliding_window(ctr_model(family, policy, N), block, tokens)


@pytest.mark.parametrize("positions", ["rope", "alibi"])
@pytest.mark.parametrize("head", ["yes_no", "linear"])
@pytest.mark.parametrize("policy", POLICIES)
def test_that_holds_for_all_positions_heads_prefixes_and_time_gaps(policy, positions, head):
    prefix = 0 if policy == "budget" else 3
    tokens, block = world(prefix=prefix, time_gaps=True)
    model = ctr_model("llama", policy, N, head, prefix=prefix, positions=positions)
    assert_equal_to_sliding_window(model, block, tokens)


@pytest.mark.parametrize("policy", POLICIES)
def test_that_holds_for_fields_of_the_interaction(policy):
    pieces = ("hour", "item", "weekday", "item")
    tokens, block = world(prefix=2 * (policy == "isolated"), time_gaps=True, pieces=pieces)
    model = ctr_model("llama", policy, N, prefix=len(tokens.prefix))
    assert_equal_to_sliding_window(model, block, tokens, pack_tokens=200)


@pytest.mark.parametrize("policy", POLICIES)
def test_scores_are_the_same_in_small_packs_and_padded_ones(policy, monkeypatch):
    tokens, block = world(time_gaps=True)
    model = ctr_model("smollm3", policy, N, positions="alibi")
    assert_equal_to_sliding_window(model, block, tokens, pack_tokens=30)
    monkeypatch.setattr(Scorer, "_shape_of", lambda scorer, *sizes: compiled_shape(*sizes))
    monkeypatch.setattr(Scorer, "_filled_up", lambda scorer, size: -(-size // 128) * 128)
    assert_equal_to_sliding_window(model, block, tokens, pack_tokens=300)


@given(st.lists(st.tuples(st.integers(1, 5_000), st.integers(1, 2_000)), min_size=1, max_size=40))
def test_mixed_traffic_needs_few_shapes(sizes):
    """Of requests of so many tokens and candidates, each in packs as a GPU has them."""
    shapes = set()
    for body, slots in sizes:
        body = max(body, slots)  # a candidate has a token of its own at least
        shape = compiled_shape(body, slots)
        assert shape.length >= body
        assert shape.slots >= slots
        assert shape.length % 128 == shape.slots % 128 == 0
        shapes.add(shape)
    largest = compiled_shape(_PACK_TOKENS["cuda"] // 2, _PACK_TOKENS["cuda"] // 2)
    lengths = [128 << power for power in range(20) if 128 << power <= largest.length]
    assert {shape.length for shape in shapes} <= set(lengths)
    assert len(shapes) <= len(lengths)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_mask_of_candidates_is_the_same_in_every_backend(policy):
    tokens, block = world(prefix=0 if policy == "budget" else 2)
    requests, _ = requests_of(block, tokens, candidates=[1, 2, 3])
    (pieces, *_) = pack_requests(requests, tokens, 600)
    built = build_request_pack(requests, pieces, tokens, compiled_shape)
    batch = Batch.collate(
        [built.pack], built.shape, step=0, epoch=0, step_targets=0, last_of_step=True
    )
    logits = []
    # Compiling takes a while: once, where neither body nor readout is the plain interval.
    for backend in ("dense", "chunked", *(["flex"] if policy == "windowed" else [])):
        model = ctr_model(
            "llama",
            policy,
            N,
            prefix=len(tokens.prefix),
            backend=backend,
            positions="alibi",
            head_dim=16,
        ).float()
        with torch.no_grad():
            logits.append(model(batch)[batch.used > 0])
    assert len(logits[0]) > 50
    for other in logits[1:]:
        assert torch.allclose(logits[0], other, atol=2e-5)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_score_is_the_same_alone_among_999_others_and_in_any_order(policy):
    rng = np.random.default_rng(5)
    tokens = item_tokens(rng, items=1000)
    model = ctr_model("llama", policy, N, positions="alibi").float()
    scorer = scorer_of(model, tokens, pack_tokens=1024)
    candidates = rng.permutation(1000)

    def score(items):
        count = len(items)
        return scorer.score_requests(
            Requests(
                history_items=np.array([5, 7, 9, 11]),
                history_labels=np.array([1, 0, 0, 1], dtype=np.int8),
                history_words=np.zeros((4, 0), dtype=np.int64),
                history_place=np.arange(4),
                context_start=np.array([0]),
                context_end=np.array([4]),
                candidate_items=np.asarray(items),
                candidate_words=np.zeros((count, 0), dtype=np.int64),
                candidate_offsets=np.array([0, count]),
            )
        )

    among = score(candidates)
    order = rng.permutation(1000)
    assert np.abs(score(candidates[order]) - among[order]).max() < 1e-5
    alone = [score(candidates[[at]])[0] for at in range(0, 1000, 50)]
    assert np.abs(np.array(alone) - among[::50]).max() < 1e-5
    assert np.std(among) > 0.01


def test_states_that_do_not_fit_are_forgotten_and_computed_again():
    tokens, block = world(prefix=2, time_gaps=True)
    model = ctr_model("llama", "isolated", N, prefix=2, positions="alibi")
    plenty = assert_equal_to_sliding_window(model, block, tokens, pack_tokens=60)
    few = assert_equal_to_sliding_window(model, block, tokens, pack_tokens=60, state_cache_gib=2e-5)
    assert plenty.states.misses < few.states.misses
    assert plenty.states.misses + plenty.states.hits == few.states.misses + few.states.hits


@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 40)), min_size=1, max_size=12),
    st.integers(5, 400),
    st.integers(0, 3),
    st.integers(0, 10_000),
)
def test_packing_takes_each_candidate_once_in_order_with_its_context(shapes, room, prefix, seed):
    rng = np.random.default_rng(seed)
    tokens = item_tokens(rng, prefix=prefix)
    history, candidates = np.array(shapes).T
    requests = Requests(
        history_items=rng.integers(0, 30, history.sum()),
        history_labels=rng.integers(0, 2, history.sum()).astype(np.int8),
        history_words=np.zeros((history.sum(), 0), dtype=np.int64),
        history_place=np.arange(history.sum()),
        context_start=history.cumsum() - history,
        context_end=history.cumsum(),
        candidate_items=rng.integers(0, 30, candidates.sum()),
        candidate_words=np.zeros((candidates.sum(), 0), dtype=np.int64),
        candidate_offsets=np.concatenate([[0], candidates.cumsum()]),
    )
    seen = []
    for pieces in pack_requests(requests, tokens, room):
        built = build_request_pack(requests, pieces, tokens)
        pack = built.pack
        used = pack.used > 0
        seen += pack.target_position[used].tolist()
        assert (
            np.searchsorted(requests.candidate_offsets, pack.target_position[used], "right") - 1
            == pack.target_row[used]
        ).all()
        size = len(pack.tokens)
        whole = all(
            f in requests.candidate_offsets and e in requests.candidate_offsets
            for f, e in zip(pieces.first, pieces.end, strict=True)
        )
        assert size <= room or len(pieces.first) == 1
        if size > room:  # one candidate after a context that leaves no room
            assert whole or pieces.end[0] - pieces.first[0] == 1
            assert used.sum() == 1
    assert seen == list(range(candidates.sum()))


def looked_up(rng, block, count, most):
    """Requests at random moments of random users, as they are found in a data set: unordered."""
    parts = []
    for row in rng.integers(0, len(block.rows), count).tolist():
        start, end = block.offsets[row : row + 2]
        history = np.arange(start, end)[block.requests.history[start:end]]
        time = int(rng.choice(block.timestamps[start:end])) + int(rng.integers(0, 2))
        past = history[block.timestamps[history] < time]
        begins = max(len(past) - most, 0)
        if begins:  # what the time gap of the oldest is counted from
            begins = int(np.sum(block.timestamps[past] < block.timestamps[past[begins]])) - 1
        parts.append((row, begins, past[max(begins, 0) :], time, rng.integers(0, 30, 3)))
    history = np.concatenate([h for _, _, h, *_ in parts])
    return RawRequests(
        items=block.item_ids[history].astype(np.int64),
        labels=block.labels[history],
        timestamps=block.timestamps[history],
        offsets=np.cumsum([0, *(len(h) for _, _, h, *_ in parts)]),
        candidates=np.concatenate([candidates for *_, candidates in parts]),
        candidate_offsets=np.arange(count + 1) * 3,
        times=np.array([time for *_, time, _ in parts]),
        whose=Whose(
            user=np.array([row for row, *_ in parts]),
            begins=np.array([max(begins, 0) for _, begins, *_ in parts]),
        ),
    )


@pytest.mark.parametrize("policy", ["budget", "isolated"])
@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.sampled_from([60, 200, 4096]))
@settings(max_examples=15)
def test_requests_of_one_user_share_their_contexts_and_score_as_alone(policy, seed, n, room):
    rng = np.random.default_rng(seed)
    tokens = item_tokens(rng, prefix=2 * (policy == "isolated"), time_gaps=True)
    block = users(rng, [40, 9, 2, 33], requests=True)
    model = ctr_model("llama", policy, n, prefix=len(tokens.prefix))
    raw = looked_up(rng, block, 40, n)
    scores, history = [], []
    for share in (True, False):
        cut = cut_requests(raw, n, tokens, by_request=True, share=share)
        assert cut.scored.tolist() != list(range(120)) or not share  # by user and time
        found = np.empty(120, dtype=np.float32)
        found[cut.scored] = scorer_of(model, tokens, pack_tokens=room).score_requests(cut.requests)
        scores.append(found)
        history.append(len(cut.requests.history_items))
    assert np.abs(scores[0] - scores[1]).max() < 1e-6
    assert np.std(scores[0]) > 0.01
    assert history[0] <= block.offsets[-1]
    assert history[1] == cut.context.sum() > history[0]


def test_shared_contexts_take_fewer_tokens():
    tokens, block = world()
    sizes = []
    for share in (True, False):
        requests, _ = requests_of(block, tokens, share=share)
        packs = [
            build_request_pack(requests, pieces, tokens)
            for pieces in pack_requests(requests, tokens, 4096)
        ]
        sizes.append(sum(built.pack.body_tokens for built in packs))
    assert sizes[0] < 0.5 * sizes[1]


def test_histories_are_sorted_and_cut_to_what_is_before_the_request():
    raw = RawRequests(
        items=np.array([10, 11, -1, 12, 13, 20, 21, 22]),
        labels=np.array([0, 1, 0, 1, 0, 1, 0, 1], dtype=np.int8),
        timestamps=np.array([50, 10, 30, 40, 60, 5, 5, 5]),
        offsets=np.array([0, 5, 8, 8]),
        candidates=np.array([1, -1, 2, 3]),
        candidate_offsets=np.array([0, 2, 4, 4]),
        times=np.array([60, 6, 0]),
    )
    cut = cut_requests(raw, 2, item_tokens(np.random.default_rng(0)), by_request=False)
    assert cut.requests.history_items.tolist() == [12, 10, 21, 22]
    assert cut.requests.history_labels.tolist() == [1, 0, 0, 1]
    assert cut.requests.context_start.tolist() == [0, 2, 4]
    assert cut.requests.context_end.tolist() == [2, 4, 4]
    assert cut.requests.candidate_items.tolist() == [1, 2, 3]
    assert cut.requests.candidate_offsets.tolist() == [0, 1, 3, 3]
    assert cut.scored.tolist() == [0, 2, 3]
    assert cut.context.tolist() == [2, 2, 0]
    assert (cut.without_text, cut.future, cut.older, cut.sorted) == (1, 1, 2, 1)


def test_windows_reach_as_far_for_a_late_candidate_as_for_the_first():
    """What every candidate of a request may see is its whole context, wherever it lies."""
    tokens, block = world()
    model = ctr_model("llama", "budget", N)
    assert Budget().windows(N, 3).readout[0] == N
    scorer = scorer_of(model, tokens)
    requests, _ = requests_of(block, tokens, candidates=list(range(25)))
    base = scorer.score_requests(requests)
    moved = requests.history_items.copy()
    first = requests.context_start[N]  # the oldest interaction of a request with n of them
    moved[first] = (moved[first] + 1) % 30
    changed = scorer.score_requests(Requests(**{**vars(requests), "history_items": moved}))
    of_request = slice(*requests.candidate_offsets[N : N + 2])
    differs = base != changed
    assert differs[of_request].all()
    assert not differs[: of_request.start].any()
    assert not differs[of_request.stop :].any()
