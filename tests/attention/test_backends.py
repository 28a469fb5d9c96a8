"""Every backend is the dense attention, forward and backward."""

from __future__ import annotations

from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from dti_dist.attention import flex
from dti_dist.attention.backend import AttentionPlans
from dti_dist.attention.chunked import ChunkedPlan, chunked_attention
from dti_dist.attention.dense import dense_mask
from dti_dist.attention.flex import BLOCK, FlexPlan, compiled_graphs
from dti_dist.attention.intervals import VisibleIntervals, body_intervals, readout_intervals
from dti_dist.attention.layout import PackLayout
from dti_dist.attention.policies import POLICIES, Budget
from dti_dist.attention.scheme import POSITIONS, AttentionScheme
from dti_dist.errors import UserError
from tests.attention.random_packs import random_packs

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 5e-2}


def make_plans(layout: PackLayout, policy: str, backend: str, prefix: bool) -> AttentionPlans:
    chosen = Budget(share=0.7) if policy == "budget" else POLICIES[policy]()
    scheme = AttentionScheme(chosen, 3, 3, prefix_length=int(prefix), backend=backend)
    return AttentionPlans(layout, scheme, torch.tensor([1.0, 0.1], device=layout.unit.device))


def random_qkv(
    layout: PackLayout, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Laid out as a model makes them: [B, T, H, D] in memory."""
    packs, tokens = layout.unit.shape
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(packs, tokens, h, head_dim, dtype=dtype, device=layout.unit.device)
        .transpose(1, 2)
        .requires_grad_()
        for h in (heads, kv_heads, kv_heads)
    )
    return q, k, v


def forward_backward(plans: AttentionPlans, qkv: tuple[Tensor, ...], layer: int) -> list[Tensor]:
    out = plans.attend(layer, *qkv, qkv[0].shape[-1] ** -0.5)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    return [out, *torch.autograd.grad(out, qkv, weight.to(out))]


def assert_all_close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y.to(x), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (9, 3)])
@pytest.mark.parametrize("policy", ["windowed", "budget"])
@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("profile", [0, 3])
def test_chunked_equals_dense_forward_and_backward(dtype, heads, kv_heads, policy, prefix, profile):
    layout = random_packs(
        Random(0), body_length=200, slots=40, samples=8, interactions=20, max_profile=profile
    ).layout
    qkv = random_qkv(layout, heads, kv_heads, 8, dtype)
    exact = tuple(x.detach().double().requires_grad_() for x in qkv)
    for layer in range(3):
        found = forward_backward(make_plans(layout, policy, "chunked", prefix), qkv, layer)
        expected = forward_backward(make_plans(layout, policy, "dense", prefix), exact, layer)
        assert_all_close(found, expected, TOLERANCE[dtype])


@settings(max_examples=25, deadline=None)
@given(random=st.randoms(use_true_random=False), chunk=st.integers(1, 60), prefix=st.booleans())
def test_chunks_may_cut_a_pack_anywhere(random, chunk, prefix):
    layout = random_packs(random).layout
    length = layout.body_length
    q, k, v = random_qkv(layout, 4, 2, 8, torch.float64)
    expected = make_plans(layout, "windowed", "dense", prefix).attend(0, q, k, v, 0.3)
    body, readout = (
        *ChunkedPlan.build(body_intervals(layout, 3, prefix).for_windows(1), chunk=chunk),
        *ChunkedPlan.build(readout_intervals(layout, 3, prefix).for_windows(1), chunk=chunk),
    )
    found = torch.cat(
        [
            chunked_attention(q[:, :, :length], k[:, :, :length], v[:, :, :length], body, 0.3),
            chunked_attention(q[:, :, length:], k, v, readout, 0.3),
        ],
        dim=2,
    )
    torch.testing.assert_close(found, expected)


def test_chunked_takes_rows_with_any_stride():
    layout = random_packs(Random(1)).layout
    plans = make_plans(layout, "windowed", "chunked", True)
    q, k, v = random_qkv(layout, 4, 2, 8, torch.float64)
    strided = [x.detach().mT.contiguous().mT.requires_grad_() for x in (q, k, v)]
    # The gradient of a sum is a single 1, expanded: stride 0 everywhere.
    found = torch.autograd.grad(plans.attend(0, *strided, 0.3).sum(), strided)
    expected = torch.autograd.grad((plans.attend(0, q, k, v, 0.3) * 1.0).sum(), (q, k, v))
    assert_all_close(list(found), list(expected), 1e-12)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_chunked_can_be_recomputed_in_the_backward_pass(use_reentrant):
    layout = random_packs(Random(2)).layout
    plans = make_plans(layout, "budget", "chunked", True)
    qkv = random_qkv(layout, 4, 2, 8, torch.float64)
    expected = forward_backward(plans, qkv, 0)
    out = checkpoint(plans.attend, 0, *qkv, 8**-0.5, use_reentrant=use_reentrant)
    generator = torch.Generator().manual_seed(1)
    out.backward(torch.randn(out.shape, generator=generator, dtype=torch.float64))
    assert_all_close([out, *(x.grad for x in qkv)], expected, 0.0)


def test_an_unknown_backend_is_refused_with_the_nearest():
    with pytest.raises(UserError, match="Did you mean 'chunked'"):
        make_plans(random_packs(Random(0)).layout, "windowed", "chunk", True)


def test_tensors_of_another_batch_are_refused():
    plans = make_plans(random_packs(Random(0)).layout, "windowed", "chunked", True)
    q = torch.zeros(2, 4, 57, 8)
    with pytest.raises(UserError, match=r"2 packs of 56 tokens.*found 2 of 57"):
        plans.attend(0, q, q, q, 1.0)


def flex_packs(random: Random, max_prefix: int = 3, max_profile: int = 0) -> PackLayout:
    return random_packs(
        random,
        2,
        3 * BLOCK,
        BLOCK,
        max_prefix=max_prefix,
        samples=5,
        interactions=60,
        max_profile=max_profile,
    ).layout


def blocks_of(mask: Tensor) -> Tensor:
    """[B, Tq, Tk] → [B, blocks of queries, blocks of keys, 128 · 128]."""
    blocks = mask.unflatten(1, (-1, BLOCK)).unflatten(3, (-1, BLOCK))
    return blocks.transpose(2, 3).flatten(3)


@settings(max_examples=15, deadline=None)
@given(
    random=st.randoms(use_true_random=True),
    window=st.sampled_from([0, 3, 100]),
    prefix=st.booleans(),
)
def test_flex_visits_only_blocks_with_visible_keys_and_marks_full_ones(random, window, prefix):
    layout = flex_packs(random)
    for intervals in (
        body_intervals(layout, window, prefix),
        readout_intervals(layout, window, prefix),
    ):
        check_blocks(intervals)


def check_blocks(intervals: VisibleIntervals) -> Tensor:
    """Returns the full blocks, bool [B, blocks of queries, blocks of keys]."""
    (plan,) = FlexPlan.build(intervals.for_windows(1))
    mask = plan.block_mask
    # What the backward pass reads is what torch itself would derive from the forward's blocks.
    derived = BlockMask.from_kv_blocks(
        *(mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices),
        BLOCK_SIZE=BLOCK,
    )
    for name in ("q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices"):
        own, of_torch = getattr(mask, name), getattr(derived, name)
        assert torch.equal(own, of_torch), name
        assert own.dtype == of_torch.dtype
        assert own.is_contiguous()
    blocks = blocks_of(dense_mask(intervals))
    assert torch.equal(mask.to_dense()[:, 0].bool(), blocks.any(dim=-1))
    full = torch.zeros(blocks.shape[:3], dtype=torch.bool)
    for b, row in torch.cartesian_prod(*(torch.arange(size) for size in full.shape[:2])).tolist():
        count = mask.full_kv_num_blocks[b, 0, row]
        full[b, row, mask.full_kv_indices[b, 0, row, :count].long()] = True
    assert blocks.all(dim=-1)[full].all()
    return full


@settings(max_examples=10, deadline=None)
@given(random=st.randoms(use_true_random=False), prefix=st.booleans())
def test_plans_of_several_windows_are_those_of_each_window_alone(random, prefix):
    layout = flex_packs(random)
    windows = [0, 2, 5]
    column = torch.tensor(windows)[:, None, None]
    for see in (body_intervals, readout_intervals):
        together = see(layout, column, prefix).for_windows(3)
        for window, seen, found in zip(
            windows, together.by_window(), FlexPlan.build(together), strict=True
        ):
            alone = see(layout, window, prefix)
            assert torch.equal(seen.start, alone.start)
            assert torch.equal(seen.end, alone.end)
            assert seen.key_length == alone.key_length
            (expected,) = FlexPlan.build(alone.for_windows(1))
            for name, blocks in expected.blocks._asdict().items():
                mine = getattr(found.blocks, name)
                assert torch.equal(mine, blocks), name
                assert mine.is_contiguous()
                assert mine.data_ptr() % 16 == 0


class _Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("profile", [0, 3])
def test_plans_take_few_operators_whatever_the_number_of_windows(policy, positions, profile):
    layout = flex_packs(Random(0), max_prefix=0, max_profile=profile)
    counts = []
    for n, layers in ((5, 2), (40, 32)):
        scheme = AttentionScheme(
            POLICIES[policy](),
            n,
            layers,
            positions=POSITIONS[positions],
            initial_memory=lambda layer, initial: (initial, initial),
            backend="flex",
        )
        AttentionPlans(layout, scheme, torch.ones(8))  # what is kept for later batches
        with _Operators() as operators:
            AttentionPlans(layout, scheme, torch.ones(8))
        counts.append(operators.count)
    assert counts[0] == counts[1] <= 200 + 20 * profile


def test_flex_knows_the_full_blocks_of_a_long_causal_pack():
    position = torch.arange(4 * BLOCK, dtype=torch.int32)
    start = torch.zeros_like(position)
    intervals = VisibleIntervals(start[None, None], position[None, None] + 1, 4 * BLOCK)
    assert torch.equal(check_blocks(intervals)[0], torch.ones(4, 4, dtype=torch.bool).tril(-1))


@pytest.fixture(scope="module")
def flex_device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def test_flex_forward_equals_dense_and_new_packs_do_not_recompile(flex_device):
    graphs = []
    for seed in range(4):
        layout = flex_packs(Random(seed)).to(flex_device)
        qkv = [x.detach() for x in random_qkv(layout, 9, 3, 16, torch.float32)]
        for layer in range(3):
            found = make_plans(layout, "budget", "flex", True).attend(layer, *qkv, 0.25)
            expected = make_plans(layout, "budget", "dense", True).attend(layer, *qkv, 0.25)
            torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)
        graphs.append(compiled_graphs())
    assert graphs[0] >= 2  # body and readout
    assert graphs == graphs[:1] * 4


def test_flex_never_falls_back_to_the_unfused_attention(flex_device, monkeypatch):
    layout = flex_packs(Random(0)).to(flex_device)
    plans = make_plans(layout, "windowed", "flex", True)
    qkv = [x.detach() for x in random_qkv(layout, 2, 1, 32, torch.float32)]
    with (
        torch.compiler.set_stance("force_eager"),
        pytest.raises(UserError, match=r"torch\.compile is switched off"),
    ):
        plans.attend(0, *qkv, 0.25)
    monkeypatch.setattr(flex, "_most_graphs", 1)  # body and readout are two
    with pytest.raises(UserError, match="Keep the pack lengths constant"):
        plans.attend(0, *qkv, 0.25)


def test_what_is_compiled_runs_without_asking_dynamo_to_compile(flex_device, monkeypatch):
    layout = flex_packs(Random(0)).to(flex_device)
    plans = make_plans(layout, "windowed", "flex", True)
    qkv = [x.detach() for x in random_qkv(layout, 2, 1, 32, torch.float32)]
    first = plans.attend(0, *qkv, 0.25)
    monkeypatch.setattr(flex, "_compile_and_run", None)
    assert torch.equal(plans.attend(0, *qkv, 0.25), first)
    with pytest.raises(TypeError):  # another scale is another graph
        plans.attend(0, *qkv, 0.5)


def test_more_graphs_are_compiled_where_that_is_allowed(flex_device, monkeypatch):
    layout = flex_packs(Random(0)).to(flex_device)
    plans = make_plans(layout, "windowed", "flex", True)
    qkv = [x.detach() for x in random_qkv(layout, 2, 1, 32, torch.float32)]
    torch._dynamo.reset()
    monkeypatch.setattr(flex, "_most_graphs", 1)
    with pytest.raises(UserError, match="needs more than 1 graphs"):
        plans.attend(0, *qkv, 0.25)
    flex.allow_graphs(2)
    plans.attend(0, *qkv, 0.25)
    flex.allow_graphs(1)
    assert flex._most_graphs == 2


def test_flex_refuses_what_it_cannot_do():
    with pytest.raises(UserError, match=r"multiples of 128.*48"):
        make_plans(random_packs(Random(0)).layout, "windowed", "flex", True)
    layout = flex_packs(Random(0))
    plans = make_plans(layout, "windowed", "flex", True)
    with pytest.raises(UserError, match=r"head dim of at least 16.*8"):
        plans.attend(0, *random_qkv(layout, 4, 2, 8, torch.float32), 1.0)
    with pytest.raises(UserError, match="chunked backend on a CPU"):
        plans.attend(0, *random_qkv(layout, 4, 2, 16, torch.float32), 1.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 32), (9, 3, 64)])
@pytest.mark.parametrize("policy", ["windowed", "budget"])
@pytest.mark.parametrize("profile", [0, 3])
def test_flex_equals_dense_forward_and_backward_on_cuda(heads, kv_heads, head_dim, policy, profile):
    layout = flex_packs(Random(0), max_profile=profile).to("cuda")
    qkv = random_qkv(layout, heads, kv_heads, head_dim, torch.float32)
    exact = tuple(x.detach().double().requires_grad_() for x in qkv)
    for layer in range(3):
        found = forward_backward(make_plans(layout, policy, "flex", True), qkv, layer)
        expected = forward_backward(make_plans(layout, policy, "dense", True), exact, layer)
        # FlexAttention multiplies in TF32 where it may: 10 bits of mantissa.
        assert_all_close(found, expected, 1e-2)
