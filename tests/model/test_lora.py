"""Adapters beside frozen weights: what trains, what stays, and that merging changes nothing."""

from __future__ import annotations

import hashlib
import sys

import numpy as np
import pytest
import torch

from dti_dist.config import AttentionConfig, LoraConfig, validate_config
from dti_dist.data.layout import PackShape
from dti_dist.errors import UserError
from dti_dist.model.ctr_model import CTRModel
from dti_dist.model.heads import Head
from dti_dist.model.lora import add_adapters, base_fingerprint, merged, require_packages
from dti_dist.model.weights import (
    BaseWeights,
    Placement,
    StateDict,
    fill,
    hollow,
    own_value,
)
from tests.tiny import (
    FAMILIES,
    NO,
    SUM,
    YES,
    batch_of,
    causal_lm,
    ctr_model,
    item_tokens,
    users,
)

pytest.importorskip("peft")


def adapted(family="llama", lora=None, **settings):
    """A model with adapters that do nothing yet, and a batch for it."""
    rng = np.random.default_rng(0)
    batch = batch_of(users(rng, [6, 9]), item_tokens(rng), 4, 3, PackShape(128, 128))
    model = ctr_model(family, **settings)
    before = model(batch)
    add_adapters(model, lora or LoraConfig(rank=3), SUM, seed=0)
    model.double()
    assert torch.equal(model(batch), before)
    return model, batch


def move(model):
    """Change all that trains, as training would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter += 0.2 * noise


@pytest.mark.parametrize(
    ("family", "head"),
    [(family, "yes_no") for family in FAMILIES]
    + [(family, "linear") for family in FAMILIES if family != "granite"],
)
def test_adapters_the_sum_row_and_the_linear_head_get_gradients_and_nothing_else(family, head):
    model, batch = adapted(family, head=head, tie_word_embeddings=True)
    model.enable_activation_checkpointing()
    model.train()
    move(model)
    Head.loss(model(batch), batch).backward()
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    linear = {
        f"backbone.{name}"
        for name, module in ctr_model(family).backbone.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    assert len(linear) == 3 * (4 if family == "phi3" else 7)
    assert with_gradient == {
        "backbone.embed_tokens.row",
        *(f"{name}.lora_{side}.default.weight" for name in linear for side in "AB"),
        "head.bias",
        "head.weight" if head == "linear" else "head.scale",
    }


@pytest.mark.parametrize("policy", ["budget", "reset"])
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_model_is_of_the_base_models_form_and_computes_the_same(family, policy):
    model, batch = adapted(family, policy=policy)
    base = ctr_model(family, policy=policy)
    at_first = model(batch)
    move(model)
    expected = model(batch)
    assert (expected - at_first)[batch.used > 0].abs().min() > 1e-6
    others = {name: value.clone() for name, value in base.state_dict().items()}
    weights = {name: merged(model, name, own_value) for name in others}
    plain = base.double()
    plain.load_state_dict(weights)
    torch.testing.assert_close(plain(batch), expected, rtol=0, atol=1e-10)

    table, head = "backbone.embed_tokens.weight", "head.weight"  # tied in Gemma
    for name in (table, head):
        assert torch.equal(weights[name][:SUM], others[name][:SUM])
    assert not torch.equal(weights[table][SUM], others[table][SUM])
    changed = {name for name in weights if not torch.equal(weights[name], others[name])}
    assert {table, *model.extra} <= changed
    changed -= {*model.extra}
    assert all(name.endswith("proj.weight") for name in changed - {table, head})


def test_only_the_target_modules_get_adapters():
    model, _ = adapted(lora=LoraConfig(rank=2, target_modules=["q_proj", "v_proj"]))
    adapters = {n.split(".lora_")[0] for n, _ in model.named_parameters() if ".lora_" in n}
    assert {name.rpartition(".")[2] for name in adapters} == {"q_proj", "v_proj"}


def test_seed_alone_decides_the_adapters():
    def first(seed):
        model = ctr_model()
        add_adapters(model, LoraConfig(rank=2), SUM, seed)
        return next(p for name, p in model.named_parameters() if "lora_A" in name)

    torch.manual_seed(5)
    one = first(0)
    torch.manual_seed(6)
    assert torch.equal(one, first(0))
    assert not torch.equal(one, first(1))


def filled(seed=0, lora=True):
    """A model that was hollow, what filled it, and the weights that it was to get."""
    lm = causal_lm("llama", seed=seed)
    state = {name: value.clone() for name, value in lm.state_dict().items()}
    hollow(lm)
    model = CTRModel(lm, "yes_no", (NO, YES), 4, AttentionConfig())
    if lora:
        add_adapters(model, LoraConfig(rank=2), SUM, seed=0)
    weights = BaseWeights(StateDict(state), {}, torch.float64)
    fill(model, weights, Placement(torch.float64))
    return model, weights, state


def test_a_hollow_model_has_the_weights_that_it_is_filled_with():
    model, weights, state = filled()
    assert torch.equal(model.backbone.embed_tokens.row, state["model.embed_tokens.weight"][SUM])
    table = state["lm_head.weight"]
    assert torch.equal(model.head.weight, table[[NO, YES]])
    assert torch.equal(weights("head.table", model.head.table), table)
    with pytest.raises(AssertionError, match="is hollow"):
        own_value("head.table", model.head.table)
    for name in set(state) - {"lm_head.weight"}:
        value = merged(model, name.replace("model.", "backbone."), own_value)
        assert torch.equal(value, state[name])


def test_base_models_are_distinguished_by_their_weights_whatever_the_adapters():
    model, weights, state = filled()
    fingerprint = base_fingerprint(model, weights)
    digest = hashlib.sha256()
    for name, parameter in model.backbone.layers.named_parameters():
        if ".lora_" not in name:
            values = state[f"model.layers.{name.replace('.base_layer', '')}"].flatten()
            digest.update(f"{name} {tuple(parameter.shape)}".encode())
            digest.update(values[:: max(values.numel() // 4096, 1)].float().numpy().tobytes())
    assert fingerprint == digest.hexdigest()[:16]
    move(model)
    assert base_fingerprint(model, weights) == fingerprint != base_fingerprint(*filled(seed=1)[:2])
    assert base_fingerprint(*filled(lora=False)[:2]) is None


def test_a_sample_of_a_tensor_does_not_keep_the_tensor():
    value = torch.zeros(10 * BaseWeights.SAMPLED)
    _, sample = BaseWeights(StateDict({"w": value}), {}).sample("w")
    assert sample.untyped_storage().nbytes() == sample.nbytes < value.nbytes


# --- refusals --------------------------------------------------------------------------------


def test_unknown_target_modules_are_refused_with_the_known():
    with pytest.raises(UserError) as raised:
        adapted("phi3", LoraConfig(rank=2, target_modules=["o_proj", "qk_proj"]))
    assert str(raised.value) == (
        "model.lora.target_modules: the decoder layers have no linear layer 'qk_proj'. "
        "Did you mean 'qkv_proj'? Known: down_proj, gate_up_proj, o_proj, qkv_proj."
    )


def test_missing_peft_is_refused_with_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"pip install 'dti-dist\[lora\]'"):
        require_packages(LoraConfig(rank=1))


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({"lora": {"rank": 8}}, "model: lora.rank must be 0 with name scratch"),
        ({"lora": {"dropout": 1}}, "model.lora.dropout: expected less than 1, found 1."),
        ({"lora": {"target_modules": []}}, "model.lora.target_modules: expected 1 or more values"),
    ],
)
def test_bad_settings_are_refused(model, expected):
    with pytest.raises(UserError) as raised:
        validate_config({"run_dir": "r", "data": {"path": "d"}, "model": model})
    assert expected in str(raised.value)


def test_a_model_without_adapters_is_exported_without_peft(monkeypatch):
    model = ctr_model()
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setitem(sys.modules, "peft.tuners.lora", None)
    weight = model.backbone.layers[0].mlp.up_proj.weight
    assert torch.equal(merged(model, "backbone.layers.0.mlp.up_proj.weight", own_value), weight)
