"""`dti-dist benchmark attention`: backends over pack lengths, and the memory of a training step."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from dti_dist.attention.backend import AttentionPlans
from dti_dist.attention.flex import FlexPlan
from dti_dist.attention.intervals import body_intervals, readout_intervals
from dti_dist.attention.layout import PackLayout
from dti_dist.attention.policies import Windowed
from dti_dist.attention.scheme import AttentionScheme
from dti_dist.benchmarks import measure
from dti_dist.console import say, table
from dti_dist.options import ATTENTION_WINDOW, ROUNDS
from dti_dist.ranks import choose_device

T = TypeVar("T")

# Of one streaming prompt: MovieLens-1M titles have about 14 tokens an interaction.
N, K, TOKENS = ATTENTION_WINDOW, 50, 14
# SmolLM2-135M's.
HEADS, KV_HEADS, HEAD_DIM = 9, 3, 64
_PRODUCT = "matrix product"
_SIDE = 2048
# Dense attention's scores take HEADS · L² numbers, several times over in its backward pass.
_LONGEST_DENSE = 8192


def benchmark_attention(
    lengths: list[int], rounds: int = ROUNDS, windows: Sequence[int] = (N,)
) -> dict[str, Any]:
    """One layer's attention, forward and backward, over packs of full streaming prompts.

    Args:
        lengths: body tokens of a pack; each pack has the [SUM] slots that its targets need.
        rounds: timed rounds.
        windows: interactions that a token sees beside its own.

    Returns:
        Surroundings and, per window and length, milliseconds of each backend and of planning the
        pack, with spread; the FLOPs that the visible pairs need, and for each backend its FLOP/s
        on them over those of a large matrix product in the same round; and the memory that a
        training step of a four-layer Llama adds at its peak, in MiB.
    """
    device = choose_device("auto")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    by_window: dict[int, dict[int, Any]] = {}
    for window in windows:
        for length in lengths:
            say(f"window of {window} interactions, packs of {length:,} body tokens")
            found = _at_length(length, window, rounds, device, dtype)
            by_window.setdefault(window, {})[length] = found
    return {
        "surroundings": measure.surroundings(device),
        "n": N,
        "k": K,
        "tokens_per_interaction": TOKENS,
        "heads": [HEADS, KV_HEADS, HEAD_DIM],
        "dtype": str(dtype).removeprefix("torch."),
        "rounds": rounds,
        "windows": by_window,
    }


def full_pack(length: int, device: torch.device, n: int = N) -> PackLayout:
    """A pack of streaming prompts of n context interactions and k targets, until it is full."""
    interactions = length // TOKENS
    unit = torch.arange(length) // TOKENS
    unit[interactions * TOKENS :] = -1
    first = torch.arange(interactions) // (n + K) * (n + K)
    in_sample = torch.arange(interactions) - first
    targets = torch.nonzero(in_sample >= n).flatten()
    slots = max(-(-len(targets) // 128), 1) * 128  # one block where no target fits
    tail = torch.full((slots,), -1)
    tail[: len(targets)] = targets
    end = torch.zeros(slots, dtype=torch.long)
    end[: len(targets)] = (targets + 1) * TOKENS - 1
    start = torch.arange(interactions + 1) * TOKENS
    position = torch.arange(length) - start[first[unit.clamp(min=0)]]
    slot_position = end - start[first[tail.clamp(min=0)]]
    none = torch.zeros(interactions, dtype=torch.long)
    layout = PackLayout(
        unit=torch.cat([unit, tail])[None],
        position=torch.cat([position, slot_position.clamp(min=0)])[None],
        unit_start=start[None],
        unit_first=first[None],
        prefix_start=none[None],
        prefix_end=none[None],
        readout_end=end[None],
    )
    return layout.to(device)


def _at_length(
    length: int, window: int, rounds: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    layout = full_pack(length, device)
    total = layout.unit.shape[1]
    torch.manual_seed(0)
    qkv = [
        torch.randn(1, total, heads, HEAD_DIM, device=device, dtype=dtype)
        .transpose(1, 2)
        .requires_grad_()
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]
    weight = torch.randn(1, HEADS, total, HEAD_DIM, device=device, dtype=dtype)
    layers = 2  # the last one spares the body
    scheme = AttentionScheme(Windowed(), window, layers)
    names = ["flex" if device.type == "cuda" else "chunked"]
    if length <= _LONGEST_DENSE:
        names.append("dense")
    plans = {name: AttentionPlans(layout, replace(scheme, backend=name)) for name in names}
    works: dict[str, Callable[[], Any]] = {
        **{name: _training_pass(plan, qkv, weight) for name, plan in plans.items()},
        "plain causal": _causal_pass(qkv, weight),
        f"plan, {names[0]}": lambda: AttentionPlans(layout, replace(scheme, backend=names[0])),
        "plan, block masks": lambda: (
            FlexPlan.build(body_intervals(layout, window, False).for_windows(1)),
            FlexPlan.build(readout_intervals(layout, window, False).for_windows(1)),
        ),
        _PRODUCT: _matrix_product(device, dtype),
    }
    turns = measure.in_rounds(works, rounds, device)
    times = {name: [turn.seconds for turn in mine] for name, mine in turns.items()}
    products = times.pop(_PRODUCT)
    flops = {name: _flops(visible_pairs(layout, window)) for name in names}
    flops["plain causal"] = _flops(total * (total + 1) // 2)
    return {
        "slots": total - length,
        "step_memory_mib": _in_new_process(_step_memory_mib, length),
        "milliseconds": {
            name: measure.spread([1e3 * took for took in taken]) for name, taken in times.items()
        },
        "gflop": {name: count / 1e9 for name, count in flops.items()},
        "of_matrix_product": {
            name: measure.ratios(
                [count / took for took in times[name]],
                [2 * _SIDE**3 / took for took in products],
            )
            for name, count in flops.items()
        },
    }


def visible_pairs(layout: PackLayout, window: int) -> int:
    """Pairs of a query and a key that it sees, of body and [SUM] slots; padding sees itself."""
    pairs = 0
    for intervals in (
        body_intervals(layout, window, False),
        readout_intervals(layout, window, False),
    ):
        pairs += int((intervals.end - intervals.start).clamp(min=0).sum(dtype=torch.int64))
    return pairs


def _flops(pairs: int) -> int:
    """Of forward (2 products) and backward (5): 2 FLOPs for each pair, head and dimension."""
    return 7 * 2 * pairs * HEADS * HEAD_DIM


def _matrix_product(device: torch.device, dtype: torch.dtype) -> Callable[[], Any]:
    a, b = (torch.randn(_SIDE, _SIDE, device=device, dtype=dtype) for _ in range(2))
    return lambda: a @ b


def _training_pass(plans: AttentionPlans, qkv: list[Tensor], weight: Tensor) -> Callable[[], Any]:
    def run() -> tuple[Tensor, ...]:
        q, k, v = qkv
        return torch.autograd.grad(plans.attend(0, q, k, v, HEAD_DIM**-0.5), qkv, weight)

    return run


def _causal_pass(qkv: list[Tensor], weight: Tensor) -> Callable[[], Any]:
    def run() -> tuple[Tensor, ...]:
        q, k, v = qkv
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return torch.autograd.grad(out, qkv, weight)

    return run


def _in_new_process(work: Callable[[int], T], length: int) -> T:
    """Each figure in a process of its own: what another step left behind must not serve it."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(work, length).result()


def _step_memory_mib(length: int) -> float | None:
    """Peak of forward and backward over one pack, over what the process holds before."""
    from transformers import LlamaConfig, LlamaModel

    from dti_dist.attention.backend import ATTENTION_NAME, register

    register()
    device = choose_device("auto")
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=HEADS * HEAD_DIM,
        intermediate_size=1536,
        num_hidden_layers=4,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        attn_implementation=ATTENTION_NAME,
    )
    model = LlamaModel(config).to(device)

    def step(length: int) -> None:
        layout = full_pack(length, device)
        plans = AttentionPlans(layout, AttentionScheme(Windowed(), N, 4))
        ids = torch.zeros(layout.unit.shape, dtype=torch.long, device=device)
        out = model(ids, position_ids=plans.positions, attention_plans=plans, use_cache=False)
        out.last_hidden_state[:, length:].square().sum().backward()

    step(128)  # gradients and libraries
    return measure.peak_memory_mib(device, lambda: step(length))


def attention_table(result: dict[str, Any]) -> str:
    """Milliseconds by length, for each window, as aligned text."""
    return "\n\n".join(
        f"window of {window} interactions\n{_window_table(by_length)}"
        for window, by_length in result["windows"].items()
    )


def _window_table(by_length: dict[int, Any]) -> str:
    lengths = list(by_length)
    first = by_length[lengths[0]]

    def cells(kind: str, name: str, form: str) -> list[str]:
        return [measure.shown(by_length[length][kind].get(name), form) for length in lengths]

    rows = [(name, *cells("milliseconds", name, ".1f")) for name in first["milliseconds"]]
    rows += [
        (f"{name}: of a matrix product's FLOP/s", *cells("of_matrix_product", name, ".0%"))
        for name in first["of_matrix_product"]
    ]
    memory = [by_length[length]["step_memory_mib"] for length in lengths]
    in_mib = ["-" if mib is None else f"{mib:,.0f}" for mib in memory]
    rows.append(("MiB of a training step, 4 layers", *in_mib))
    return table(("milliseconds, median (spread)", *(f"{n:,} tokens" for n in lengths)), rows)
