"""`dti-dist benchmark paradigm`: training speed of streaming prompts against sliding windows."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch

from dti_dist.attention.policies import POLICIES
from dti_dist.benchmarks import measure
from dti_dist.benchmarks.padded_trainer import PaddedTrainer
from dti_dist.config import RunConfig
from dti_dist.console import say, table
from dti_dist.data.dataset import Dataset
from dti_dist.data.stream import Batch, PackStream, Share
from dti_dist.inputs import Inputs
from dti_dist.model.ctr_model import CTRModel, cast_parameters
from dti_dist.model.heads import Head
from dti_dist.options import PARADIGM_TARGETS, ROUNDS, TRAINER_BATCH, TRAINER_PROMPTS

BASELINE = "sliding_window"
BY_REQUEST = "one prompt a request"
TRAINER = "Trainer, one padded prompt a target"
# Name → what it changes of the config.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    BASELINE: {"sample": {"paradigm": "sliding_window"}, "attention": {"policy": "windowed"}},
    # No request is cut, so one of several targets is alone; those of one target go in twos.
    BY_REQUEST: {
        "sample": {"paradigm": "dti", "targets": 2},
        "attention": {"policy": "windowed"},
    },
    **{
        f"dti, {policy}": {"sample": {"paradigm": "dti"}, "attention": {"policy": policy}}
        for policy in POLICIES
    },
    "dti, isolated, not shared": {
        "sample": {"paradigm": "dti"},
        "attention": {"policy": "isolated", "share_interactions": False},
    },
}


@dataclass(frozen=True)
class _Taken:
    """What one timed call did."""

    targets: int
    tokens: int
    seconds: float | None = None  # where it has timed itself


def benchmark_paradigm(
    config: RunConfig,
    rounds: int = ROUNDS,
    targets: int = PARADIGM_TARGETS,
    policies: Sequence[str] = tuple(POLICIES),
    trainer_prompts: int = TRAINER_PROMPTS,
    trainer_batch: int = TRAINER_BATCH,
) -> dict[str, Any]:
    """Training steps of one pack each, forward, backward and AdamW, variant after variant.

    All variants train the same weights on packs of the same length, of the same users; packing is
    done before and not timed. Beside them runs what a team would do without this program: see
    PaddedTrainer.

    Args:
        config: data, n, k, template, pack length, model and precision are taken from it.
        rounds: timed steps of each variant.
        targets: the first whole users with so many targets; packs are taken from them in turn.
        policies: leakage policies of `dti` to measure.
        trainer_prompts, trainer_batch: prompts of Trainer's turn in a round, and of its step;
            0 prompts leave it out.

    Returns:
        Surroundings and, per variant, targets/s and tokens/s with spread, tokens a target, the
        speed over sliding_window as measured, on a CPU by processor time too, and as token counts
        alone would have it, the speed over Trainer and, on data with requests, over one prompt a
        request, the share of the ideal k(n+1)/(n+k), memory that a step adds, and energy where it
        can be read.
    """
    device, dtype = measure.device_and_dtype(config.training)
    has_requests = Dataset.open(config.data.path, storage=config.data.storage).has_requests
    variants = {name: VARIANTS[name] for name in VARIANTS if _wanted(name, policies, has_requests)}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "tokenizer"
        configs = {name: _changed(config, **changes) for name, changes in variants.items()}
        inputs = {name: Inputs.open(changed, folder) for name, changed in configs.items()}
        causal_lm = inputs[BASELINE].causal_lm()
        models = {
            name: opened.wrap(_with_same_weights(causal_lm)).to(device)
            for name, opened in inputs.items()
        }
        # Most parameters are shared by all; each variant has adapters or a linear head of its own.
        parameters = {id(p): p for model in models.values() for p in model.parameters()}
        for model in models.values():
            cast_parameters(model, dtype)
        optimizer = torch.optim.AdamW([p for p in parameters.values() if p.requires_grad], lr=1e-5)
        steps = {
            name: _step(
                models[name], _packs(opened, targets, rounds, device), optimizer, name, config
            )
            for name, opened in inputs.items()
        }
        if trainer_prompts:
            padded = PaddedTrainer(
                inputs[BASELINE], targets, trainer_prompts, trainer_batch, device, dtype
            )
            steps[TRAINER] = partial(_trainer_turn, padded, trainer_prompts)
        turns = measure.in_rounds(steps, rounds, device)
        memory = {
            # Of its few prompts Trainer finds the memory in what the process holds already.
            name: None if name == TRAINER else measure.peak_memory_mib(device, step)
            for name, step in steps.items()
        }
    n, k = config.sample.context, config.sample.targets
    ideal = k * (n + 1) / (n + k)
    return {
        "surroundings": measure.surroundings(device),
        "n": n,
        "k": k,
        "ideal": ideal,
        "pack_length": config.pack.length,
        "trainer_batch": trainer_batch if trainer_prompts else None,
        "model": config.model.name,
        "parameters": sum(p.numel() for p in models[BASELINE].backbone.parameters()),
        "precision": config.training.precision,
        "positions": config.attention.positions,
        "rounds": rounds,
        "variants": _figures(turns, memory, ideal, on_cpu=device.type == "cpu"),
    }


def _wanted(name: str, policies: Sequence[str], has_requests: bool) -> bool:
    if name == BY_REQUEST:
        return has_requests
    return name == BASELINE or name.split(", ")[1] in policies


def _trainer_turn(padded: PaddedTrainer, prompts: int) -> _Taken:
    say(f"{TRAINER}: {prompts:,} targets")
    padded.train()
    return _Taken(prompts, padded.tokens, padded.seconds)


def _with_same_weights(causal_lm: Any) -> Any:
    """A model of its own, so that each variant has its own hooks, around the same parameters."""
    return copy.deepcopy(causal_lm, {id(p): p for p in causal_lm.parameters()})


def _changed(config: RunConfig, **sections: dict[str, Any]) -> RunConfig:
    return measure.changed(config, template={"prefix": ""}, **sections)  # `budget` refuses one


def _packs(opened: Inputs, targets: int, rounds: int, device: torch.device) -> list[Batch]:
    """One warm-up pack and one for each round, or fewer where the users have no more.

    They lie evenly over all that the users have, for prompts grow longer with a user's history.
    """
    plan = opened.stream_plan("train", max_targets=targets)
    (epoch,) = plan.epochs
    wanted = {epoch.packs * turn // (rounds + 1) for turn in range(rounds + 1)}
    stream = enumerate(PackStream(plan, Share(1, 1)))
    first = islice(stream, max(wanted) + 1)
    return [batch.to(device) for number, batch in first if number in wanted]


def _step(
    model: CTRModel,
    packs: list[Batch],
    optimizer: torch.optim.Optimizer,
    name: str,
    config: RunConfig,
) -> Callable[[], _Taken]:
    model.train()
    if config.training.activation_checkpointing is True:
        model.enable_activation_checkpointing()
    turn = cycle(packs)

    def step() -> _Taken:
        batch = next(turn)
        tokens = batch.body_tokens + int(batch.used.sum())
        say(f"{name}: {batch.step_targets:,} targets, {tokens:,} tokens")
        loss = Head.loss(model(batch), batch) / (batch.step_weight or 1.0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return _Taken(batch.step_targets, tokens)

    return step


def _figures(
    turns: dict[str, list[measure.Turn]],
    memory: dict[str, float | None],
    ideal: float,
    on_cpu: bool,
) -> dict[str, dict[str, Any]]:
    """Rates and ratios by round."""
    rates: dict[str, list[float]] = {}
    token_rates: dict[str, list[float]] = {}
    tokens: dict[str, float] = {}
    by_processor: dict[str, list[float]] = {}
    for name, mine in turns.items():
        done: list[_Taken] = [turn.result for turn in mine]
        seconds = [turn.result.seconds or turn.seconds for turn in mine]
        rates[name] = [one.targets / took for one, took in zip(done, seconds, strict=True)]
        token_rates[name] = [one.tokens / took for one, took in zip(done, seconds, strict=True)]
        by_processor[name] = [turn.result.targets / turn.processor_s for turn in mine]
        tokens[name] = sum(one.tokens for one in done) / sum(one.targets for one in done)
    trainer, by_request = rates.get(TRAINER), rates.get(BY_REQUEST)
    found = {}
    for name, mine in turns.items():
        speedup = measure.ratios(rates[name], rates[BASELINE])
        joules = [t.joules / t.result.targets for t in mine if t.joules is not None]
        found[name] = {
            "targets_per_s": measure.spread(rates[name]),
            "tokens_per_s": measure.spread(token_rates[name]),
            "tokens_per_target": tokens[name],
            "speedup": speedup,
            "speedup_by_tokens": tokens[BASELINE] / tokens[name],
            # Trainer's would count its set-up.
            "speedup_by_processor_time": measure.ratios(by_processor[name], by_processor[BASELINE])
            if on_cpu and name != TRAINER
            else None,
            "speedup_over_trainer": trainer and measure.ratios(rates[name], trainer),
            "speedup_over_request": by_request and measure.ratios(rates[name], by_request),
            "share_of_ideal": speedup["median"] / ideal if name.startswith("dti") else None,
            "step_memory_mib": memory[name],
            "joules_per_target": measure.spread(joules) if joules else None,
        }
    return found


def benchmark_grid(
    config: RunConfig, of_n: Sequence[int], of_k: Sequence[int], **settings: Any
) -> dict[str, Any]:
    """`benchmark_paradigm` for each n and k."""
    found = []
    for n in of_n:
        for k in of_k:
            say(f"n = {n}, k = {k}")
            changed = _changed(config, sample={"context": n, "targets": k})
            found.append(benchmark_paradigm(changed, **settings))
    return {"grid": found}


def draw_grid(result: dict[str, Any], path: Path) -> None:
    """Speed over sliding_window by k, a panel for each n, as a PNG."""
    from matplotlib.figure import Figure

    cells = result["grid"]
    contexts = list(dict.fromkeys(cell["n"] for cell in cells))
    figure = Figure(figsize=(4.6 * len(contexts), 4.2), layout="constrained")
    panels = figure.subplots(1, len(contexts), sharey=True, squeeze=False)[0]
    for panel, n in zip(panels, contexts, strict=True):
        mine = sorted((cell for cell in cells if cell["n"] == n), key=lambda cell: cell["k"])
        ks = [cell["k"] for cell in mine]
        for name in mine[0]["variants"]:
            if name == BASELINE:
                continue
            middle, ends = measure.error_bars([c["variants"][name]["speedup"] for c in mine])
            panel.errorbar(ks, middle, ends, marker="o", markersize=4, capsize=2, label=name)
        panel.plot(ks, [c["ideal"] for c in mine], "k--", linewidth=1, label="k(n+1)/(n+k)")
        panel.set_title(f"n = {n}")
        panel.set_xlabel("k, targets a prompt")
        panel.set_xticks(ks)
        panel.set_ylim(bottom=0)
    panels[0].set_ylabel(f"targets/s over {BASELINE}")
    panels[0].legend(fontsize="x-small")
    figure.savefig(path, dpi=110)


def paradigm_table(result: dict[str, Any]) -> str:
    """The variants as aligned text."""
    if "grid" in result:
        return "\n\n".join(
            f"n = {cell['n']}, k = {cell['k']}, ideal {cell['ideal']:.1f}\n{paradigm_table(cell)}"
            for cell in result["grid"]
        )

    def figure(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    rows = []
    for name, figures in result["variants"].items():
        joules = figures["joules_per_target"]
        rows.append(
            (
                name,
                f"{figures['targets_per_s']['median']:,.1f}",
                f"{figures['tokens_per_s']['median']:,.0f}",
                f"{figures['tokens_per_target']:.1f}",
                measure.shown(figures["speedup"], ".1f"),
                measure.shown(figures["speedup_by_processor_time"], ".1f"),
                f"{figures['speedup_by_tokens']:.1f}",
                figure(figures["share_of_ideal"], ".0%"),
                measure.shown(figures["speedup_over_trainer"], ".1f"),
                measure.shown(figures["speedup_over_request"], ".1f"),
                figure(figures["step_memory_mib"], ",.0f"),
                figure(joules and joules["median"], ".2f"),
            )
        )
    header = (
        "",
        "targets/s",
        "tokens/s",
        "tokens/target",
        "over sliding_window",
        "by processor time",
        "by tokens",
        "of ideal",
        "over Trainer",
        "over one a request",
        "MiB a step",
        "J/target",
    )
    return table(header, rows)
