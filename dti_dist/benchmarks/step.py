"""`dti-dist benchmark step`: processor time and operators of a micro-step, beside the model's."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from dti_dist.attention.backend import AttentionPlans
from dti_dist.attention.flex import BLOCK, FlexPlan, flex_attention_call
from dti_dist.attention.intervals import body_intervals
from dti_dist.benchmarks import measure
from dti_dist.benchmarks.attention import full_pack
from dti_dist.config import AttentionConfig, TrainingConfig
from dti_dist.console import say, table
from dti_dist.data.stream import Batch
from dti_dist.model.ctr_model import CTRModel
from dti_dist.model.heads import Head
from dti_dist.options import ROUNDS, STEP_CONTEXTS, STEP_LAYERS
from dti_dist.ranks import Ranks, join_process_group, leave_process_group
from dti_dist.training.engine import Engine
from dti_dist.zero.configuration import read_deepspeed

_LENGTH = 2304  # holds a prompt of n = 100 and k = 50
_CALLS = 1000  # of attention in a round
_REPEATS = 3  # of each work in a round, which take milliseconds
# So narrow that operators take little time beside their calls.
_NARROW = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
MODEL = "the model alone"
PLANS = "plans"
_STAGES = ("zero1", "zero3")


def benchmark_step(
    contexts: Sequence[int] = STEP_CONTEXTS,
    layers: Sequence[int] = STEP_LAYERS,
    rounds: int = ROUNDS,
) -> dict[str, Any]:
    """Micro-steps of a very narrow Llama on one pack, under the policy `budget`.

    Args:
        contexts: n of the packs, one measurement each; layers: of the models, each with each n.
        rounds: timed rounds.

    Returns:
        Surroundings and, per n and number of layers, milliseconds of the host's processor time with
        spread and operators of: the backbone with causal attention alone, forward and backward;
        making the plans of FlexAttention; and a whole micro-step (forward, loss, backward,
        optimizer) under each ZeRO stage, with ratios over the model alone. Besides, the same time
        of one call of FlexAttention. The host is not made to wait for a GPU.
    """
    ranks = join_process_group("auto", timeout_minutes=5, cpu_threads=1)
    try:
        found = []
        for n in contexts:
            for depth in layers:
                say(f"n = {n}, {depth} layers")
                found.append({"n": n, "layers": depth, **_measured(n, depth, rounds, ranks)})
        call = _attention_call(rounds, ranks.device)
    finally:
        leave_process_group()
    return {
        "surroundings": measure.surroundings(ranks.device),
        "body_tokens": _LENGTH,
        "rounds": rounds,
        "cells": found,
        "attention_call_us": call,
    }


def _measured(n: int, layers: int, rounds: int, ranks: Ranks) -> dict[str, Any]:
    batch = _batch(n, ranks.device)
    model = _model(n, layers)
    frequencies = model.backbone.rotary_emb.inv_freq.to(ranks.device)
    scheme = replace(model.scheme, backend="flex")
    works: dict[str, Callable[[], Any]] = {
        MODEL: _plain_pass(layers, batch),
        PLANS: lambda: AttentionPlans(batch.layout, scheme, frequencies),
    }
    for stage in _STAGES:
        works[stage] = _micro_step(_engine(_model(n, layers), stage, ranks), batch)
    turns = measure.in_rounds(
        {name: partial(_processor_ms, work, _REPEATS) for name, work in works.items()},
        rounds,
        torch.device("cpu"),  # not synchronized: what the host takes
    )
    milliseconds = {name: [turn.result for turn in mine] for name, mine in turns.items()}
    return {
        "windows": len(set(scheme.windows.body[:-1])) + len(set(scheme.windows.readout)),
        "milliseconds": {name: measure.spread(mine) for name, mine in milliseconds.items()},
        "over_model": {
            name: measure.ratios(mine, milliseconds[MODEL]) for name, mine in milliseconds.items()
        },
        "operators": {name: operators(work) for name, work in works.items()},
    }


def _attention_call(rounds: int, device: torch.device) -> measure.Spread:
    """Microseconds: no query sees a key, so there is nothing to compute.

    With gradients on a GPU; FlexAttention has none on a CPU.
    """
    (plan,) = FlexPlan.build(body_intervals(full_pack(BLOCK, device), 1, False).for_windows(1))
    counts = {name: x for name, x in plan.blocks._asdict().items() if name.endswith("num_blocks")}
    nothing = plan.blocks._replace(**{name: x.zero_() for name, x in counts.items()})
    plan = replace(plan, blocks=nothing)
    q, k, v = (  # not one tensor: torch 2.11 refuses that
        torch.zeros(1, 1, BLOCK, 16, device=device, requires_grad=device.type == "cuda")
        for _ in range(3)
    )

    call = partial(flex_attention_call, q, k, v, plan, 1.0)
    call()  # compiles
    return measure.spread([1e3 * _processor_ms(call, _CALLS) for _ in range(rounds)])


def operators(work: Callable[[], Any]) -> int:
    """Calls of operators, views included, without those that operators make themselves."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        work()
    return sum(_is_operator(event) and not _within_one(event) for event in profiled.events())


def _is_operator(event: FunctionEvent) -> bool:
    return event.name.startswith("aten::")


def _within_one(event: FunctionEvent) -> bool:
    parent = event.cpu_parent
    while parent is not None and not _is_operator(parent):
        parent = parent.cpu_parent
    return parent is not None


def _processor_ms(work: Callable[[], Any], times: int) -> float:
    """Of one call, all threads together (on a GPU the backward pass has its own); other jobs on the
    same cores hardly change it."""
    began = time.process_time()
    for _ in range(times):
        work()
    return 1e3 * (time.process_time() - began) / times


def _batch(n: int, device: torch.device) -> Batch:
    layout = full_pack(_LENGTH, device, n)
    used = (layout.unit[:, _LENGTH:] >= 0).float()
    places = torch.zeros_like(used, dtype=torch.long)
    return Batch(
        tokens=torch.zeros_like(layout.unit, dtype=torch.long),
        layout=layout,
        labels=torch.zeros_like(used),
        used=used,
        weight=used,
        target_row=places,
        target_position=places,
        body_tokens=_LENGTH,
        step_targets=int(used.sum()),
        step_weight=float(used.sum()),
    )


def _llama(layers: int, **settings: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**_NARROW, num_hidden_layers=layers, **settings)


def _model(n: int, layers: int) -> CTRModel:
    from transformers import LlamaForCausalLM

    attention = AttentionConfig(policy="budget", positions="rope")
    return CTRModel(LlamaForCausalLM(_llama(layers)), "yes_no", (0, 1), n, attention).train()


def _plain_pass(layers: int, batch: Batch) -> Callable[[], None]:
    from transformers import LlamaModel

    model = LlamaModel(_llama(layers, attn_implementation="sdpa")).to(batch.tokens.device)

    def run() -> None:
        model(input_ids=batch.tokens, use_cache=False).last_hidden_state.sum().backward()

    return run


def _engine(model: CTRModel, stage: str, ranks: Ranks) -> Engine:
    config = read_deepspeed(stage)
    if stage == "zero3":  # else it would keep weights as small as these whole
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    with TemporaryDirectory() as folder:
        path = Path(folder) / "deepspeed.json"
        path.write_text(json.dumps(config))
        training = TrainingConfig(
            deepspeed=str(path),
            precision="bf16" if ranks.device.type == "cuda" else "fp32",
            global_batch_packs=1,
        )
        return Engine(model, training, ranks)


def _micro_step(engine: Engine, batch: Batch) -> Callable[[], None]:
    def run() -> None:
        engine.backward(Head.loss(engine(batch), batch) / batch.step_targets)
        engine.step()

    return run


def step_table(result: dict[str, Any]) -> str:
    """A row for each n, depth and work, as aligned text."""
    rows = [
        (
            str(cell["n"]),
            str(cell["layers"]),
            name,
            measure.shown(cell["milliseconds"][name], ".1f"),
            measure.shown(cell["over_model"][name], ".2f"),
            f"{cell['operators'][name]:,}",
        )
        for cell in result["cells"]
        for name in cell["milliseconds"]
    ]
    call = measure.shown(result["attention_call_us"])
    return (
        table(("n", "layers", "", "ms", "over the model alone", "operators"), rows)
        + f"\n\nA call of FlexAttention takes {call} µs of the host's processor time."
    )
