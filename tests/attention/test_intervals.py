"""The intervals are exactly the prompt's rules, and the windows spend no more than n."""

from __future__ import annotations

from itertools import pairwise
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dti_dist.attention.dense import dense_mask
from dti_dist.attention.intervals import body_intervals, readout_intervals
from dti_dist.attention.policies import POLICIES, Budget, Isolated, Reset
from dti_dist.attention.readout import alibi_slopes
from dti_dist.config import AttentionConfig, validate_config
from dti_dist.errors import UserError
from tests.attention.random_packs import Token, random_packs


def may_see(query: Token, key: Token, window: int, prefix_visible: bool) -> bool:
    """The rules of the prompt, token by token."""
    if query == key:
        return True
    if "pad" in (query.kind, key.kind) or key.kind == "sum" or query.sample != key.sample:
        return False
    if "profile" in (query.kind, key.kind):
        own = query.kind == key.kind and key.position <= query.position
        return query.kind == "sum" or own
    if key.kind == "prefix" and query.kind != "prefix":
        return prefix_visible
    if query.kind == "sum":
        own_label = key.kind == "label" and key.interaction == query.interaction
        return query.interaction - window <= key.interaction <= query.interaction and not own_label
    return query.interaction - window <= key.interaction and key.position <= query.position


@settings(max_examples=60, deadline=None)
@given(random=st.randoms(use_true_random=False), window=st.integers(0, 7), prefix=st.booleans())
def test_every_token_sees_what_the_rules_say_and_nothing_else(random, window, prefix):
    packs = random_packs(random, max_profile=3)
    length = packs.layout.body_length
    for intervals, queries, keys in (
        (body_intervals(packs.layout, window, prefix), slice(length), slice(length)),
        (readout_intervals(packs.layout, window, prefix), slice(length, None), slice(None)),
    ):
        expected = [
            [[may_see(q, k, window, prefix) for k in tokens[keys]] for q in tokens[queries]]
            for tokens in packs.tokens
        ]
        assert torch.equal(dense_mask(intervals), torch.tensor(expected))


@settings(max_examples=30, deadline=None)
@given(random=st.randoms(use_true_random=False), window=st.integers(0, 7), prefix=st.booleans())
def test_ranges_of_a_query_are_disjoint(random, window, prefix):
    layout = random_packs(random, max_profile=3).layout
    for intervals in (
        body_intervals(layout, window, prefix),
        readout_intervals(layout, window, prefix),
    ):
        lengths = (intervals.end - intervals.start).clamp(min=0).sum(dim=0)
        assert torch.equal(lengths, dense_mask(intervals).sum(dim=-1))


@pytest.mark.parametrize("policy", ["windowed", "reset"])
def test_windowed_and_reset_give_n_to_every_layer(policy):
    windows = POLICIES[policy]().windows(n=20, num_layers=3)
    assert windows.body == windows.readout == (20, 20, 20)


def test_isolated_gives_n_to_sum_alone():
    windows = Isolated().windows(n=20, num_layers=3)
    assert windows.body == (0, 0, 0)
    assert windows.readout == (20, 20, 20)


def test_an_even_budget_reaches_up_where_there_are_more_layers_than_interactions():
    windows = Budget().windows(n=20, num_layers=30)
    spent = [layer for layer, window in enumerate(windows.body) if window]
    assert len(spent) == sum(windows.body) == 10
    assert {later - earlier for earlier, later in pairwise(spent)} <= {2, 3}
    assert spent[-1] > 24
    early = Budget("early").windows(n=20, num_layers=30).body
    late = Budget("late").windows(n=20, num_layers=30).body
    assert sum(early[:15]) == sum(late[14:29]) == 10


def test_forgetting_grows_from_nothing_at_the_target_to_its_strength_at_n():
    assert Reset(1.0, 1.0).forgetting(4).tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert Reset(0.8, 2.0).forgetting(2).tolist() == pytest.approx([0, 0.2, 0.8])


def test_alibi_slopes_are_those_of_the_paper():
    assert alibi_slopes(8).tolist() == [2.0**-h for h in range(1, 9)]
    assert alibi_slopes(4).tolist() == [2.0**-h for h in (2, 4, 6, 8)]


@pytest.mark.parametrize(
    ("budget", "body", "readout"),
    [
        ("even", (2, 2, 1, 0), (10, 8, 6, 5)),
        ("early", (3, 2, 0, 0), (10, 7, 5, 5)),
        ("late", (0, 3, 2, 0), (10, 10, 7, 5)),
        ([2, 2, 2, 0], (2, 2, 2, 0), (10, 8, 6, 4)),
        ([0, 0, 0, 0], (0, 0, 0, 0), (10, 10, 10, 10)),
    ],
)
def test_budget_leaves_readout_what_the_layers_below_have_not_spent(budget, body, readout):
    windows = Budget(budget).windows(n=10, num_layers=4)
    assert windows.body == body
    assert windows.readout == readout


@given(
    n=st.integers(0, 50),
    num_layers=st.integers(1, 40),
    budget=st.sampled_from(["even", "early", "late"]),
    share=st.floats(0, 1),
)
def test_nothing_older_than_n_reaches_a_prediction_under_budget(n, num_layers, budget, share):
    windows = Budget(budget, share).windows(n, num_layers)
    seen = 0  # how far back the body states that a layer reads have seen
    for body, readout in zip(windows.body, windows.readout, strict=True):
        assert body >= 0
        assert seen + readout == n
        seen += body
    assert seen == (round(n * share) if num_layers > 1 else 0)
    assert windows.body[-1] == 0


@pytest.mark.parametrize(
    ("budget", "reason"),
    [
        ([1, 1], "2 entries"),
        ([2, -1, 0], "negative"),
        ([2, 2, 1], "sums to 5.*exact"),
        ("evn", "Did you mean 'even'"),
    ],
)
def test_a_budget_that_cannot_be_exact_is_refused_with_the_reason(budget, reason):
    with pytest.raises(UserError, match=reason):
        Budget(budget).windows(n=4, num_layers=3)


def test_every_policy_that_a_config_can_name_exists_and_two_are_exact():
    named = get_args(AttentionConfig.model_fields["policy"].annotation)
    assert set(named) == set(POLICIES)
    assert [name for name in named if POLICIES[name].exact] == ["budget", "isolated"]
    with pytest.raises(UserError, match=r"'isolated'.*Did you mean 'windowed'"):
        validate_config({"run_dir": "r", "data": {"path": "d"}, "attention": {"policy": "window"}})
