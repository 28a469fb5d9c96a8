"""`dti-dist benchmark paradigm`: training speed of streaming prompts against sliding windows."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from dti_dist.benchmarks import measure
from dti_dist.config import RunConfig, validate_config
from dti_dist.console import say
from dti_dist.data.stream import Batch, PackStream, Share
from dti_dist.inputs import Inputs
from dti_dist.model.ctr_model import CTRModel, click_loss
from dti_dist.ranks import choose_device

BASELINE = "sliding_window"
# Name → what it changes of the config.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    BASELINE: {"sample": {"paradigm": "sliding_window"}, "attention": {"policy": "windowed"}},
    **{
        f"dti, {policy}": {"sample": {"paradigm": "dti"}, "attention": {"policy": policy}}
        for policy in ("windowed", "reset", "budget", "isolated")
    },
    "dti, isolated, not shared": {
        "sample": {"paradigm": "dti"},
        "attention": {"policy": "isolated", "share_interactions": False},
    },
}


def benchmark_paradigm(config: RunConfig, rounds: int = 3, targets: int = 20_000) -> dict[str, Any]:
    """Training steps of one pack each, forward, backward and AdamW, variant after variant.

    All variants train the same weights on packs of the same length, of the same users; packing is
    done before and not timed.

    Args:
        config: data, n, k, template, pack length, model and precision are taken from it.
        rounds: timed steps of each variant.
        targets: the first whole users with so many targets; packs are taken from them in turn.

    Returns:
        Surroundings and, per variant, targets/s and tokens/s with spread, tokens a target, and the
        speed over sliding_window as measured and as the token counts alone would have it.
    """
    device = choose_device(config.training.device)
    if device.type == "cpu" and config.training.cpu_threads:
        torch.set_num_threads(config.training.cpu_threads)
    dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "tokenizer"
        configs = {name: _changed(config, changes) for name, changes in VARIANTS.items()}
        inputs = {name: Inputs.open(changed, folder) for name, changed in configs.items()}
        causal_lm = inputs[BASELINE].causal_lm()
        models = {
            name: opened.wrap(_with_same_weights(causal_lm)).to(device)
            for name, opened in inputs.items()
        }
        # Most parameters are shared by all; each variant has adapters or a linear head of its own.
        parameters = {id(p): p for model in models.values() for p in model.parameters()}
        for parameter in parameters.values():  # buffers stay float32: rotary frequencies
            parameter.data = parameter.data.to(dtype)
        optimizer = torch.optim.AdamW([p for p in parameters.values() if p.requires_grad], lr=1e-5)
        packs = {name: _packs(opened, targets, rounds, device) for name, opened in inputs.items()}
        steps = {
            name: _step(models[name], cycle(packs[name]), optimizer, name, config)
            for name in VARIANTS
        }
        times = measure.in_rounds(steps, rounds, device)
    return {
        "surroundings": measure.surroundings(device),
        "n": config.sample.context,
        "k": config.sample.targets,
        "pack_length": config.pack.length,
        "model": config.model.name,
        "parameters": sum(p.numel() for p in models[BASELINE].backbone.parameters()),
        "precision": config.training.precision,
        "rounds": rounds,
        "variants": _figures(packs, times, rounds),
    }


def _with_same_weights(causal_lm: Any) -> Any:
    """A model of its own, so that each variant has its own hooks, around the same parameters."""
    return copy.deepcopy(causal_lm, {id(p): p for p in causal_lm.parameters()})


def _changed(config: RunConfig, changes: dict[str, dict[str, Any]]) -> RunConfig:
    raw = config.model_dump(mode="json")
    raw["template"]["prefix"] = ""  # which `budget` refuses
    for section, values in changes.items():
        raw[section].update(values)
    return validate_config(raw)


def _packs(opened: Inputs, targets: int, rounds: int, device: torch.device) -> list[Batch]:
    """One warm-up pack and one for each round, or fewer where the users have no more."""
    plan = opened.stream_plan("train", max_targets=targets)
    stream = iter(PackStream(plan, Share(1, 1)))
    return [batch.to(device) for batch, _ in zip(stream, range(rounds + 1), strict=False)]


def _step(
    model: CTRModel, packs: Any, optimizer: torch.optim.Optimizer, name: str, config: RunConfig
) -> Callable[[], None]:
    model.train()
    if config.training.activation_checkpointing:
        model.enable_activation_checkpointing()

    def step() -> None:
        batch = next(packs)
        say(f"{name}: {batch.step_targets:,} targets, {_tokens(batch):,} tokens")
        loss = click_loss(model(batch), batch) / max(batch.step_targets, 1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _tokens(batch: Batch) -> int:
    return batch.body_tokens + int(batch.weights.sum())


def _figures(
    packs: dict[str, list[Batch]], times: dict[str, list[float]], rounds: int
) -> dict[str, dict[str, Any]]:
    """Rates by round: round r of a variant took its pack r + 1, the first being the warm-up."""
    found: dict[str, dict[str, Any]] = {}
    rates: dict[str, list[float]] = {}
    for name, batches in packs.items():
        taken = [batches[number % len(batches)] for number in range(1, rounds + 1)]
        targets = [batch.step_targets for batch in taken]
        tokens = [_tokens(batch) for batch in taken]
        rates[name] = [count / took for count, took in zip(targets, times[name], strict=True)]
        found[name] = {
            "targets_per_s": measure.spread(rates[name]),
            "tokens_per_s": measure.spread(
                [count / took for count, took in zip(tokens, times[name], strict=True)]
            ),
            "tokens_per_target": sum(tokens) / sum(targets),
        }
    for name, figures in found.items():
        ratios = [mine / base for mine, base in zip(rates[name], rates[BASELINE], strict=True)]
        figures["speedup"] = measure.spread(ratios)
        figures["speedup_by_tokens"] = (
            found[BASELINE]["tokens_per_target"] / figures["tokens_per_target"]
        )
    return found


def paradigm_table(result: dict[str, Any]) -> str:
    """The variants as aligned text."""
    rows = []
    for name, figures in result["variants"].items():
        speedup = figures["speedup"]
        rows.append(
            (
                name,
                f"{figures['targets_per_s']['median']:,.1f}",
                f"{figures['tokens_per_s']['median']:,.0f}",
                f"{figures['tokens_per_target']:.1f}",
                f"{speedup['median']:.1f} ({speedup['min']:.1f}-{speedup['max']:.1f})",
                f"{figures['speedup_by_tokens']:.1f}",
            )
        )
    header = ("", "targets/s", "tokens/s", "tokens/target", "speedup (spread)", "by tokens alone")
    return measure.table(header, rows)
