"""Frozen weights in 4 bits: what they are, what computes with them, and what keeps them."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dti_dist.config import AttentionConfig, LoraConfig, validate_config
from dti_dist.costs.shape import ModelShape
from dti_dist.data.layout import PackShape
from dti_dist.errors import UserError
from dti_dist.model.ctr_model import CTRModel, cast_parameters
from dti_dist.model.lora import add_adapters, base_fingerprint, merged
from dti_dist.model.nf4 import NF4, Linear4bit, dequantized, is_quantized, require_bitsandbytes
from dti_dist.model.weights import (
    BaseWeights,
    Placement,
    StateDict,
    as_kept,
    fill,
    hollow,
    own_value,
)
from tests.model.test_isolation import assert_the_same, logits_and_gradients
from tests.tiny import (
    FAMILIES,
    NO,
    SUM,
    YES,
    Float64Rotary,
    batch_of,
    causal_lm,
    item_tokens,
    users,
)

N = 4
SHAPE = PackShape(length=256, slots=128)
# Dettmers et al., arXiv 2305.14314, appendix E.
LEVELS = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]

needs_bitsandbytes = pytest.mark.skipif(
    not find_spec("bitsandbytes"), reason="needs bitsandbytes: pip install 'dti-dist[qlora]'"
)
pytest.importorskip("peft")


def by_hand(value: torch.Tensor) -> torch.Tensor:
    """Each number as the level nearest to it, of a block of 64 that its largest scales."""
    numbers = value.bfloat16().double().flatten().tolist()
    found: list[float] = []
    for start in range(0, len(numbers), 64):
        block = numbers[start : start + 64]
        scale = max(map(abs, block)) or 1.0
        for x in block:
            distances = [abs(x / scale - level) for level in LEVELS]
            found.append(scale * LEVELS[distances.index(min(distances))])
    return torch.tensor(found, dtype=torch.float64).view(value.shape)


def wide(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer_of(weight: torch.Tensor, bias: torch.Tensor | None = None, double=False) -> Linear4bit:
    layer = torch.nn.Linear(*reversed(weight.shape), bias=bias is not None)
    if bias is not None:
        layer.bias = torch.nn.Parameter(bias, requires_grad=False)
    layer = Linear4bit(layer)
    layer.weight = NF4(double).quantized(weight)
    return layer


def filled(family="llama", policy="budget", lora=None, four_bits=True, state=None, seed=0, **more):
    """A model with adapters over weights that it was filled with, and what they were."""
    settings = {"rank": 3, **(lora or {})}
    lm = causal_lm(family, seed=seed, **more)
    state = state or {name: value.clone() for name, value in lm.state_dict().items()}
    hollow(lm)
    budget = [2, 2, 0] if policy == "budget" else "even"
    attention = AttentionConfig(policy=policy, positions="rope", budget=budget)
    model = CTRModel(lm, "yes_no", (NO, YES), N, attention)
    add_adapters(model, LoraConfig(load_in_4bit=four_bits, **settings), SUM, seed=0)
    weights = BaseWeights(StateDict(state), {}, torch.float64)
    fill(model, weights, Placement(torch.float64))
    model.backbone.rotary_emb = Float64Rotary(model.backbone.rotary_emb.inv_freq)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter += 0.2 * noise
    return model, weights, state


def batch(k=6):
    rng = np.random.default_rng(0)
    return batch_of(users(rng, [20, 9, 2, 13]), item_tokens(rng), N, k, SHAPE)


def linear_names(model) -> set[str]:
    return {
        name.removesuffix(".base_layer")
        for name, module in model.backbone.layers.named_modules()
        if isinstance(module, Linear4bit)
    }


# --- the numbers -------------------------------------------------------------------------------


@needs_bitsandbytes
@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (7, 11), (3, 128), (5, 200)])
def test_each_number_becomes_the_nearest_level_of_its_block(shape):
    value = wide(*shape)
    rounded = NF4().rounded(value)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded.double(), by_hand(value), rtol=1e-6, atol=1e-7)
    assert (rounded - value).abs().max() > 0.01


@needs_bitsandbytes
@pytest.mark.parametrize("double", [False, True])
def test_weights_take_the_bytes_that_it_says(double):
    form, value = NF4(double), wide(256, 512)
    packed = form.quantized(value)
    state = packed.quant_state
    scales = state.absmax.nbytes + (state.state2.absmax.nbytes if double else 0)
    assert packed.nbytes + scales == form.bytes(value.numel())
    assert form.bytes(10**6) == pytest.approx(10**6 * (4.127 if double else 4.5) / 8, rel=1e-3)


@needs_bitsandbytes
def test_quantized_scales_differ_a_little():
    value = wide(256, 512)
    single, double = (NF4(double).rounded(value) for double in (False, True))
    error = (single - double).abs().max()
    assert 0 < error < 0.02 * value.abs().max()


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_the_same_4_bits_are_made_in_any_precision(dtype):
    value = wide(48, 32).bfloat16()
    assert torch.equal(NF4().quantized(value.to(dtype)), NF4().quantized(value))


# --- the layer ---------------------------------------------------------------------------------


@needs_bitsandbytes
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_layer_computes_as_plain_torch_with_the_dequantized_weight(dtype, double):
    bias = wide(48, seed=2).to(dtype)
    layer = layer_of(wide(48, 32), bias, double)
    weight = dequantized(layer.weight, dtype)
    inputs = wide(2, 5, 32, seed=1).to(dtype).requires_grad_()
    again = inputs.detach().clone().requires_grad_()
    found, expected = layer(inputs), F.linear(again, weight, bias)
    assert torch.equal(found, expected)
    found.backward(torch.ones_like(found))
    expected.backward(torch.ones_like(found))
    torch.testing.assert_close(inputs.grad, again.grad)
    assert layer.weight.grad is None


@needs_bitsandbytes
def test_no_dequantized_weight_waits_for_the_backward_pass():
    layer, inputs = layer_of(wide(64, 64)), wide(1, 64).requires_grad_()

    def kept_by(product) -> list[int]:
        found: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: found.append(tensor.numel()) or tensor, lambda tensor: tensor
        ):
            product(inputs)
        return found

    assert kept_by(layer) == []
    assert 64 * 64 in kept_by(lambda x: F.linear(x, dequantized(layer.weight, torch.float32)))


@needs_bitsandbytes
def test_casts_and_moves_leave_weight_and_scales():
    layer, value = layer_of(wide(48, 32), double=True), dequantized
    before = value(layer.weight, torch.float32)
    for cast in (layer.bfloat16, layer.double, layer.half, layer.cpu):
        cast()
        assert torch.equal(value(layer.weight, torch.float32), before)
    cast_parameters(layer, torch.float64)
    assert torch.equal(value(layer.weight, torch.float32), before)
    layer.to("meta")
    assert layer.weight.quant_state.absmax.device.type == "meta"


# --- the model ---------------------------------------------------------------------------------


@needs_bitsandbytes
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", ["budget", "reset"])
def test_logits_and_gradients_are_those_of_the_dequantized_weights(family, policy):
    model, _, state = filled(family, policy)
    names = linear_names(model)
    assert len(names) == 3 * (4 if family == "phi3" else 7)
    rounded = {f"model.layers.{name}.weight" for name in names}
    assert rounded < set(state)
    known = {name: by_hand(value) if name in rounded else value for name, value in state.items()}
    plain, _, _ = filled(family, policy, four_bits=False, state=known)
    assert_the_same(
        logits_and_gradients(model, batch()), logits_and_gradients(plain, batch()), 1e-5
    )
    original, _, _ = filled(family, policy, four_bits=False, state=state)
    with pytest.raises(AssertionError):
        assert_the_same(
            logits_and_gradients(model, batch()), logits_and_gradients(original, batch()), 1e-3
        )


@needs_bitsandbytes
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", ["budget", "isolated"])
def test_streaming_equals_sliding_window_over_4_bits(family, policy):
    model, _, _ = filled(family, policy)
    streaming, sliding = (logits_and_gradients(model, batch(k)) for k in (6, 1))
    assert_the_same(streaming, sliding, 1e-6)
    leaking, _, _ = filled(family, "windowed")
    with pytest.raises(AssertionError):
        assert_the_same(*(logits_and_gradients(leaking, batch(k)) for k in (6, 1)), 1e-6)


@needs_bitsandbytes
def test_recomputed_activations_change_no_gradient():
    model, _, _ = filled()
    expected = logits_and_gradients(model, batch())
    model.enable_activation_checkpointing()
    model.train()
    assert_the_same(logits_and_gradients(model, batch()), expected, 1e-12)


@needs_bitsandbytes
def test_the_decoders_frozen_linear_layers_alone_are_quantized():
    model, _, _ = filled("qwen2", lora={"target_modules": ["q_proj", "v_proj"]})
    quantized = {name for name, p in model.named_parameters() if is_quantized(p)}
    assert len(quantized) == 3 * 7
    assert all(name.startswith("backbone.layers.") for name in quantized)
    others = [p for name, p in model.named_parameters() if name not in quantized]
    assert {p.dtype for p in others} == {torch.float64}
    assert not any(is_quantized(p) for p in others)
    biases = [n for n, _ in model.backbone.named_parameters() if n.endswith(".bias")]
    assert len(biases) == 3 * 3


@needs_bitsandbytes
@pytest.mark.parametrize("double", [False, True])
def test_merged_weights_compute_what_the_quantized_model_does(double):
    """From the model itself, and as export has it: hollow, from the original files."""
    model, _, state = filled(lora={"double_quant": double})
    plain, weights, _ = filled(lora={"double_quant": double})  # the same, to be read hollow
    empty = causal_lm("llama")
    hollow(empty)
    empty = CTRModel(empty, "yes_no", (NO, YES), N, AttentionConfig(budget=[2, 2, 0]))
    add_adapters(empty, LoraConfig(rank=3, load_in_4bit=True, double_quant=double), SUM, seed=0)
    own = dict(model.named_parameters())

    def trained(name, parameter):
        return own[name] if own[name].requires_grad else weights(name, parameter)

    fill(empty, trained, Placement(torch.float64), only=lambda p: p.requires_grad)
    tied_or_not = {f"backbone.{name.removeprefix('model.')}" for name in state}
    for name in tied_or_not - {"backbone.lm_head.weight"}:
        found = merged(empty, name, as_kept(weights))
        assert torch.equal(found, merged(model, name, own_value)), name
    name = "backbone.layers.0.self_attn.q_proj.weight"
    original = state["model.layers.0.self_attn.q_proj.weight"]
    adapter = model.get_submodule(name.rpartition(".")[0]).get_delta_weight("default")
    rounded = NF4(double).rounded(original)
    torch.testing.assert_close(merged(model, name, own_value), rounded + adapter)
    assert not torch.allclose(rounded.double(), original, atol=0.01)
    assert is_quantized(plain.get_submodule(name.rpartition(".")[0]).base_layer.weight)


@needs_bitsandbytes
def test_the_fingerprint_is_of_the_original_weights():
    quantized, plain = (base_fingerprint(*filled(four_bits=b)[:2]) for b in (True, False))
    assert quantized == plain != base_fingerprint(*filled(seed=1)[:2])


@needs_bitsandbytes
def test_a_hollow_model_has_the_shape_of_one_that_is_not_quantized():
    def shape(four_bits):
        lm = causal_lm("llama")
        hollow(lm)
        model = CTRModel(lm, "yes_no", (NO, YES), N, AttentionConfig())
        add_adapters(model, LoraConfig(rank=3, load_in_4bit=four_bits), SUM, seed=0)
        return ModelShape.of(model)

    quantized, plain = shape(True), shape(False)
    assert quantized.layer == plain.layer
    assert (quantized.parameters, quantized.trained) == (plain.parameters, plain.trained)


# --- refusals ----------------------------------------------------------------------------------


def test_missing_bitsandbytes_is_refused_with_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"pip install 'dti-dist\[qlora\]'"):
        require_bitsandbytes()


def test_4_bits_without_adapters_are_refused():
    lora = {"load_in_4bit": True}
    with pytest.raises(UserError) as raised:
        validate_config({"run_dir": "r", "data": {"path": "d"}, "model": {"lora": lora}})
    assert "model.lora: load_in_4bit needs a rank above 0, found 0" in str(raised.value)
