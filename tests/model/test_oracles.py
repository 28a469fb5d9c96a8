"""What a prediction is, computed in other ways: by plain transformers, and token by token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import rotate_half

from dti_dist.attention.policies import POLICIES, Reset
from dti_dist.attention.readout import alibi_slopes
from dti_dist.data.layout import PackShape
from dti_dist.data.samples import SampleSettings
from tests.tiny import (
    FAMILIES,
    FAMILY_SETTINGS,
    FORGETTING,
    NO,
    SUM,
    YES,
    batch_of,
    causal_lm,
    ctr_model,
    item_tokens,
    logits_by_target,
    users,
    with_profiles,
)

N = 3
SHAPE = PackShape(length=256, slots=128)
# Rotary tables are float32 in transformers, and angles differ in how they are rounded.
CLOSE = 1e-5


def world(prefix: int = 0) -> tuple[Any, Any]:
    rng = np.random.default_rng(3)
    return item_tokens(rng, prefix=prefix), users(rng, [8, 5])


def prompts(tokens: Any, block: Any) -> dict[tuple[int, int], list[list[int]]]:
    """Token ids of the interactions of each target's sliding-window prompt; none of its label."""
    samples = SampleSettings(N, 1, 1).cut(block)
    found = {}
    for row, first, target in zip(samples.row, samples.first, samples.first_target, strict=True):
        place = block.offsets[row] + np.arange(first, target + 1)
        texts = [
            tokens.tokens[tokens.offsets[item] : tokens.offsets[item + 1]].tolist()
            for item in block.item_ids[place]
        ]
        words = [[(NO, YES)[label]] for label in block.labels[place]]
        words[-1] = []
        found[block.rows[row], target] = [
            text + word for text, word in zip(texts, words, strict=True)
        ]
    return found


def one_layer(family: str, **changes: Any) -> dict[str, Any]:
    rotary = {"no_rope_layers": [1]} if family == "smollm3" else {}
    return {"layers": 1, **rotary, **changes}


def label_logit(logits: Tensor) -> float:
    return float(logits[YES] - logits[NO])


def assert_all_close(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    assert len(found) > 9
    assert max(abs(expected[key] - float(found[key].detach())) for key in found) < CLOSE
    assert np.std(list(expected.values())) > 0.1


@torch.no_grad()
def plain(model: Any, prefix: list[int], interactions: list[list[int]]) -> float:
    """Plain causal attention over the prompt; the logit of the label words at [SUM]."""
    ids = [*prefix, *(token for tokens in interactions for token in tokens), SUM]
    return label_logit(model(torch.tensor([ids]), use_cache=False).logits[0, -1])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prefix", [0, 3])
def test_windowed_with_rope_is_plain_causal_attention_over_a_sliding_window_prompt(family, prefix):
    tokens, block = world(prefix)
    model = ctr_model(family, "windowed", N, prefix=prefix)
    found = logits_by_target(model, batch_of(block, tokens, N, 1, SHAPE))
    causal = causal_lm(family)
    expected = {
        key: plain(causal, tokens.prefix.tolist(), prompt)
        for key, prompt in prompts(tokens, block).items()
    }
    assert_all_close(found, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_isolated_layer_is_plain_causal_attention(family):
    """In one layer no state has seen another yet, so isolation must not show, nor sharing."""
    tokens, block = world()
    settings = one_layer(family)
    model = ctr_model(family, "isolated", N, **settings)
    found = logits_by_target(model, batch_of(block, tokens, N, 6, SHAPE, share=True))
    causal = causal_lm(family, **settings)
    expected = {key: plain(causal, [], prompt) for key, prompt in prompts(tokens, block).items()}
    assert_all_close(found, expected)


def test_a_layer_without_positions_is_plain_causal_attention_too():
    tokens, block = world()
    settings = {"layers": 1, "no_rope_layers": [0]}
    model = ctr_model("smollm3", "isolated", N, **settings)
    assert model.scheme.rotary_layers == (False,)
    found = logits_by_target(model, batch_of(block, tokens, N, 6, SHAPE, share=True))
    causal = causal_lm("smollm3", **settings)
    expected = {key: plain(causal, [], prompt) for key, prompt in prompts(tokens, block).items()}
    assert_all_close(found, expected)


@torch.no_grad()
def with_distance_penalty(model: Any, interactions: list[list[int]]) -> float:
    """Transformers' eager attention without rotation, with ALiBi's penalty as its mask."""
    ids = [*(token for tokens in interactions for token in tokens), SUM]
    place = torch.arange(len(ids))
    distance = (place[:, None] - place).double()
    heads = model.config.num_attention_heads
    mask = -alibi_slopes(heads).double()[:, None, None] * distance
    mask = mask.masked_fill(distance < 0, -torch.inf)[None]
    out = model(
        torch.tensor([ids]),
        attention_mask=mask,
        position_ids=torch.zeros(1, len(ids), dtype=torch.long),
        use_cache=False,
    )
    return label_logit(out.logits[0, -1])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", ["windowed", "reset", "budget", "isolated"])
def test_one_layer_with_alibi_is_unrotated_attention_with_a_distance_penalty(family, policy):
    """`reset` too: the first layer's states are the initial embeddings, so it forgets nothing."""
    tokens, block = world()
    settings = one_layer(family)
    model = ctr_model(family, policy, N, positions="alibi", **settings)
    batch = batch_of(block, tokens, N, 6, SHAPE, share=policy == "isolated")
    causal = causal_lm(family, attn_implementation="eager", **settings)
    expected = {
        key: with_distance_penalty(causal, prompt) for key, prompt in prompts(tokens, block).items()
    }
    assert_all_close(logits_by_target(model, batch), expected)


# --- a prediction token by token -----------------------------------------------------------------


def rotated(x: Tensor, position: int, inv_freq: Tensor) -> Tensor:
    """[H, D] at a position."""
    angles = (position * inv_freq.double()).repeat(2)
    return x * angles.cos() + rotate_half(x) * angles.sin()


@torch.no_grad()
def by_hand(
    causal: Any,
    prefix: list[int],
    interactions: list[list[int]],
    policy: str,
    positions: str,
    profile: Sequence[int] = (),
) -> float:
    """The logit of a sliding-window prompt under a policy, one token and one score at a time."""
    backbone, config = causal.model, causal.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    width, layers = config.head_dim, config.num_hidden_layers
    chosen = Reset(**FORGETTING) if policy == "reset" else POLICIES[policy]()
    windows = chosen.windows(N, layers)
    inv_freq = backbone.rotary_emb.inv_freq
    slopes = alibi_slopes(heads).double()
    alpha = chosen.forgetting(N) if policy == "reset" else torch.zeros(N + 1)
    target = len(interactions) - 1

    ids, unit = list(prefix), [-1] * len(prefix)
    place = list(range(len(prefix)))
    for number, tokens in enumerate(interactions):
        for offset, token in enumerate(tokens):
            place.append(len(prefix) + offset if policy == "isolated" else len(ids))
            ids.append(token)
            unit.append(number)
    length = len(ids)
    # The profile, in front of all: [SUM] reads it from the place behind it, others never.
    front = len(profile)
    place = [*range(front), *place]
    ids = [*profile, *ids, SUM]
    unit = [None] * front + unit
    initial = backbone.embed_tokens(torch.tensor(ids))
    hidden = initial.clone()

    for number, layer in enumerate(backbone.layers):
        attention = layer.self_attn

        def projected(states: Tensor, name: str, count: int, layer=layer) -> Tensor:
            projection = getattr(layer.self_attn, name)
            return projection(layer.input_layernorm(states)).view(-1, count, width)

        q = projected(hidden, "q_proj", heads)
        k = projected(hidden, "k_proj", kv_heads)
        v = projected(hidden, "v_proj", kv_heads)
        k0 = projected(initial, "k_proj", kv_heads)
        v0 = projected(initial, "v_proj", kv_heads)
        out = torch.zeros(front + length + 1, heads, width, dtype=torch.float64)
        last = front + length
        for i in range(last + 1):
            for head in range(heads):
                group = head // (heads // kv_heads)
                terms: list[tuple[float, Tensor]] = []  # (weight before normalisation, value)
                for j in range(last):
                    if unit[j] is None or (i < last and unit[i] is None):
                        if i < last and (unit[i] is not None or j > i):
                            continue
                        query, key = q[i, head], k[j, group]
                        if i < last or positions == "rope":
                            query = rotated(q[i], min(i, front), inv_freq)[head]
                            key = rotated(k[j], j, inv_freq)[group]
                        terms.append((math.exp(query @ key / math.sqrt(width)), v[j, group]))
                        continue
                    if i < last:
                        near = unit[j] < 0 or unit[i] - windows.body[number] <= unit[j]
                        visible = j <= i and near
                    elif unit[j] < 0:
                        visible = policy != "isolated"
                    else:
                        visible = target - windows.readout[number] <= unit[j]
                    if not visible:
                        continue
                    if i < last:
                        query = rotated(q[i], place[i], inv_freq)[head]
                        key = rotated(k[j], place[j], inv_freq)[group]
                        score = query @ key / math.sqrt(width)
                        terms.append((math.exp(score), v[j, group]))
                        continue
                    a = 0.0 if unit[j] < 0 else float(alpha[target - unit[j]])
                    for weight, keys, values in ((1 - a, k, v), (a, k0, v0)):
                        if positions == "rope":
                            query = rotated(q[i], length, inv_freq)[head]
                            key = rotated(keys[j], j - front, inv_freq)[group]
                            penalty = 0.0
                        else:
                            query, key = q[i, head], keys[j, group]
                            penalty = float(slopes[head]) * (last - j)
                        score = query @ key / math.sqrt(width) - penalty
                        terms.append((weight * math.exp(score), values[j, group]))
                if i == last:  # [SUM] sees itself
                    score = q[i, head] @ k[i, group] / math.sqrt(width)
                    terms.append((math.exp(score), v[i, group]))
                total = sum(weight for weight, _ in terms)
                out[i, head] = sum(weight / total * value for weight, value in terms)
        hidden = hidden + attention.o_proj(out.flatten(1))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return label_logit(causal.lm_head(backbone.norm(hidden[-1])))


@pytest.mark.parametrize("positions", ["rope", "alibi"])
@pytest.mark.parametrize(
    ("policy", "prefix"),
    [(policy, 0) for policy in ("windowed", "reset", "budget", "isolated")]
    + [(policy, 2) for policy in ("windowed", "reset", "isolated")],
)
@pytest.mark.parametrize("profiles", [False, True], ids=["", "profiles"])
def test_a_prediction_is_what_the_policy_says_token_by_token(policy, prefix, positions, profiles):
    tokens, block = world(prefix)
    profile_of = dict.fromkeys(block.rows.tolist(), ())
    if profiles:
        tokens, block = with_profiles(tokens, block)
        block.profile[:] = [0, 1]
        for row, texts in zip(block.rows.tolist(), (slice(0, 2), slice(2, 6)), strict=True):
            profile_of[row] = tokens.profiles.tokens[texts].tolist()
    model = ctr_model("llama", policy, N, positions=positions, prefix=prefix)
    batch = batch_of(block, tokens, N, 1, SHAPE, share=policy == "isolated")
    causal = causal_lm("llama")
    expected = {
        key: by_hand(causal, tokens.prefix.tolist(), prompt, policy, positions, profile_of[key[0]])
        for key, prompt in prompts(tokens, block).items()
    }
    assert_all_close(logits_by_target(model, batch), expected)


def test_every_family_with_special_settings_has_them_in_its_model():
    for family, settings in FAMILY_SETTINGS.items():
        config = causal_lm(family).config
        for name, value in settings.items():
            assert getattr(config, name) == value
