"""A transformers model under the "dti" attention keeps the promises of the prompt."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaModel, MistralConfig, MistralModel

from dti_dist.attention.backend import AttentionPlans, attention_forward, register
from dti_dist.attention.policies import POLICIES, Budget
from dti_dist.attention.scheme import AttentionScheme
from dti_dist.errors import UserError
from tests.attention.random_packs import Packs, one_sample

TEXTS = [2, 3, 1, 4, 2, 3, 2, 1, 3]
TARGETS = 5
N = 3
VOCABULARY = 50

register()


def tiny(config_class=LlamaConfig, model_class=LlamaModel, attention="dti", **changes):
    config = config_class(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation=attention,
        use_cache=False,
        **changes,
    )
    torch.manual_seed(0)
    return model_class(config).double().eval()


def make_plans(packs: Packs, policy: str = "budget", n: int = N) -> AttentionPlans:
    chosen = Budget(share=0.7) if policy == "budget" else POLICIES[policy]()
    return AttentionPlans(packs.layout, AttentionScheme(chosen, n, 3, backend="chunked"))


@pytest.fixture
def packs() -> Packs:
    return one_sample(TEXTS, TARGETS)


@pytest.fixture
def ids(packs) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(VOCABULARY, tuple(packs.layout.unit.shape), generator=generator)


def run(packs: Packs, ids: Tensor, policy: str = "budget") -> Tensor:
    """[T, hidden] states; a slot has the position after its target's last text token."""
    length = packs.layout.body_length
    position = torch.cat([torch.arange(length)[None], packs.layout.readout_end], dim=1)
    plans = make_plans(packs, policy)
    with torch.no_grad():
        out = tiny()(ids, position_ids=position, attention_plans=plans, use_cache=False)
    return out.last_hidden_state[0]


def changed(ids: Tensor, places: list[int]) -> Tensor:
    ids = ids.clone()
    ids[0, places] = (ids[0, places] + 1) % VOCABULARY
    return ids


def places(packs: Packs, kind: str, interaction: int) -> list[int]:
    tokens = packs.tokens[0]
    return [t.position for t in tokens if t.kind == kind and t.interaction == interaction]


def test_a_window_over_everything_is_causal_attention():
    packs = one_sample(TEXTS, targets=0)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, tuple(packs.layout.unit.shape), generator=generator)
    plans = make_plans(packs, "windowed", n=len(TEXTS))
    found = tiny()(ids, attention_plans=plans).last_hidden_state
    expected = tiny(attention="sdpa")(ids).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("policy", ["windowed", "budget"])
def test_label_of_a_target_reaches_later_predictions_only(packs, ids, policy):
    before = run(packs, ids, policy)
    for slot in range(TARGETS - 1):
        target = len(TEXTS) - TARGETS + slot
        after = run(packs, changed(ids, places(packs, "label", target)), policy)
        moved = (before != after).any(dim=1)[packs.layout.body_length :]
        assert not moved[: slot + 1].any()
        assert moved[slot + 1]


@pytest.mark.parametrize(("policy", "reaches"), [("windowed", True), ("budget", False)])
def test_interactions_older_than_n_reach_a_prediction_under_windowed_only(
    packs, ids, policy, reaches
):
    last = len(TEXTS) - 1
    before = run(packs, ids, policy)[-1]
    in_context = run(packs, changed(ids, places(packs, "text", last - N)), policy)[-1]
    too_old = run(packs, changed(ids, places(packs, "text", last - N - 1)), policy)[-1]
    assert not torch.equal(before, in_context)
    assert torch.equal(before, too_old) != reaches


def test_nothing_but_itself_sees_a_readout_slot(packs, ids):
    slot = packs.layout.body_length + 2
    moved = (run(packs, ids) != run(packs, changed(ids, [slot]))).any(dim=1)
    assert moved.nonzero().flatten().tolist() == [slot]


def test_gradient_checkpointing_of_transformers_changes_nothing(packs, ids):
    gradients = []
    for checkpointing in (False, True):
        model = tiny().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ids, attention_plans=make_plans(packs)).last_hidden_state.square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_missing_plans_are_named(ids):
    with pytest.raises(UserError, match="attention_plans=AttentionPlans"):
        tiny()(ids)


def test_dropout_in_training_is_refused(packs, ids):
    model = tiny(attention_dropout=0.1)
    model(ids, attention_plans=make_plans(packs))
    with pytest.raises(UserError, match="attention_dropout=0"):
        model.train()(ids, attention_plans=make_plans(packs))


@pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias"])
def test_what_would_change_the_scores_is_refused(packs, name):
    qkv = torch.zeros(1, 2, packs.layout.unit.shape[1], 8)
    with pytest.raises(UserError, match=name):
        attention_forward(
            torch.nn.Identity(),
            *(qkv, qkv, qkv),
            attention_mask=None,
            attention_plans=make_plans(packs),
            **{name: torch.ones(2)},
        )


def test_a_sliding_window_is_accepted_only_where_it_hides_nothing(packs, ids):
    length = packs.layout.body_length
    mistral = (MistralConfig, MistralModel)
    tiny(*mistral, sliding_window=length)(ids, attention_plans=make_plans(packs))
    with pytest.raises(
        UserError,
        match=f"sliding window of {length - 1} tokens, but a token must see up to {length}",
    ):
        tiny(*mistral, sliding_window=length - 1)(ids, attention_plans=make_plans(packs))
