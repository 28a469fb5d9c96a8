"""`dti-dist benchmark ablation`: leakage policy, positions and k against quality.

Trains every combination from scratch on a prepared data set, evaluates it by sliding-window prompts
(what inference does) and by streaming prompts, and prints a table of means and standard deviations
over seeds. Every variant trains one epoch on the same targets, with about as many targets a step.

Runs that have an evaluation already are not repeated, so the command can be stopped and started
again; `--table` only prints what is there.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

N = 10
# (policy, positions, k); k = 1 is the sliding window.
VARIANTS = [
    *[
        (policy, positions, 40)
        for policy in ("windowed", "reset", "budget", "isolated")
        for positions in ("rope", "alibi")
    ],
    ("windowed", "rope", 10),
    ("windowed", "rope", 1),
    ("isolated", "rope", 10),
]
STEP_TOKENS = 4096  # of a step at k = 40, end to end; other k get about as many targets a step
PACK = 2048


def config(data: Path, run: Path, policy: str, positions: str, k: int, seed: int) -> dict[str, Any]:
    tokens_per_target = (N + k) / k
    packs = round(STEP_TOKENS / PACK * tokens_per_target / ((N + 40) / 40))
    one_pack = policy == "isolated"  # sharing is worth more in one long pack than in several
    return {
        "run_dir": str(run),
        "seed": seed,
        "data": {"path": str(data)},
        "sample": {"context": N, "targets": k},
        "template": {"item": "{title}", "max_item_tokens": 24},
        "pack": {"length": packs * PACK if one_pack else PACK},
        "model": {
            "name": "scratch",
            "scratch": {
                "vocab_size": 2048,
                "hidden_size": 64,
                "intermediate_size": 192,
                "layers": 4,
                "heads": 4,
                "key_value_heads": 2,
            },
        },
        "attention": {"policy": policy, "positions": positions},
        "training": {
            "epochs": 1,
            "global_batch_packs": 1 if one_pack else packs,
            "learning_rate": 3e-3,
            "precision": "fp32",
            "deepspeed": "cpu",
            "device": "cpu",
            "cpu_threads": 1,
            "log_every": 50,
        },
        "validation": {"max_targets": 2_000},
        "checkpoints": {"every_steps": 0, "keep_last": 1},
    }


def run_one(data: Path, work: Path, variant: tuple[str, str, int], seed: int) -> None:
    policy, positions, k = variant
    run = work / f"{policy}-{positions}-k{k}-seed{seed}"
    if (run / "eval" / "test.streaming.json").exists():
        return
    run.mkdir(parents=True, exist_ok=True)
    file = work / f"{run.name}.yaml"
    file.write_text(yaml.safe_dump(config(data, run, policy, positions, k, seed)))
    program = [sys.executable, "-m", "dti_dist"]
    with (work / f"{run.name}.log").open("w") as log:
        for command in (
            ["train", str(file)],
            ["evaluate", str(run), "--prompt", "sliding_window"],
            ["evaluate", str(run), "--prompt", "streaming"],
        ):
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            subprocess.run(
                [*program, *command], stdout=log, stderr=log, env=environment, check=True
            )
    print(f"{run.name} done", flush=True)


def ablation_table(work: Path, seeds: list[int]) -> str:
    lines = [
        "| policy | positions | k | AUC by sliding window | log loss | AUC by streaming | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for policy, positions, k in VARIANTS:
        found: dict[str, list[dict[str, Any]]] = {"sliding_window": [], "streaming": []}
        for seed in seeds:
            folder = work / f"{policy}-{positions}-k{k}-seed{seed}" / "eval"
            for prompt, results in found.items():
                path = folder / f"test.{prompt}.json"
                if path.exists():
                    results.append(json.loads(path.read_text()))
        count = len(found["streaming"])
        if count:
            lines.append(
                f"| {policy} | {positions} | {k} | {_mean(found['sliding_window'], 'auc')} "
                f"| {_mean(found['sliding_window'], 'log_loss')} "
                f"| {_mean(found['streaming'], 'auc')} | {count} |"
            )
    return "\n".join(lines)


def _mean(results: list[dict[str, Any]], metric: str) -> str:
    values = [result[metric] for result in results]
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{deviation}"


def benchmark_ablation(data: Path, work: Path, seeds: list[int], jobs: int) -> None:
    """Train and evaluate all variants, `jobs` runs at a time; finished runs are skipped."""
    work.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(jobs) as pool:
        runs = [pool.submit(run_one, data, work, each, seed) for seed in seeds for each in VARIANTS]
        for run in runs:
            run.result()
