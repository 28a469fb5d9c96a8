"""The parts of gpu.sh: each in a process of its own, with a time limit and a JSON file."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import yaml

WITHIN_S = 540  # all parts
KILLED_AFTER = 3  # steps, of the run that is resumed
STEPS = 6
IMPORTED = ["deepspeed", "dti_dist.training.loop", "dti_dist.benchmarks.paradigm"]


@dataclass(frozen=True)
class Sizes:
    """What differs between a GPU and the rehearsal on a CPU."""

    device: str
    users: int
    history: int  # interactions of a user
    models: dict[str, dict[str, int]]
    timed: tuple[str, ...]  # of the models
    prompt: dict[str, int]
    length: int
    training: dict[str, Any]
    head_dims: tuple[int, ...]
    attention_lengths: tuple[int, ...]
    rounds: int
    trainer_prompts: int
    requests: int
    candidates: int
    steps: int  # of the run that measures stalls


SMOLLM2 = {
    "layers": 30,
    "hidden_size": 576,
    "heads": 9,
    "key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49_152,
}
LLAMA_1B = {
    "layers": 16,
    "hidden_size": 2048,
    "heads": 32,
    "key_value_heads": 8,
    "intermediate_size": 8192,
    "vocab_size": 128_256,
}
TINY = {
    "layers": 2,
    "hidden_size": 32,
    "heads": 4,
    "key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 512,
}
GPU = Sizes(
    device="cuda",
    users=2_000,
    history=120,
    models={"135m": SMOLLM2, "1b": LLAMA_1B},
    timed=("135m", "1b"),
    prompt={"context": 20, "targets": 50},
    length=8192,
    training={"precision": "bf16", "deepspeed": "zero1"},
    head_dims=(64, 128),
    attention_lengths=(4096, 8192),
    rounds=3,
    trainer_prompts=64,
    requests=32,
    candidates=100,
    steps=30,
)
CPU = Sizes(
    device="cpu",
    users=20,
    history=60,
    models={"135m": TINY, "1b": {**TINY, "layers": 3}},
    timed=("1b",),
    prompt={"context": 4, "targets": 6},
    length=256,
    training={"precision": "fp32", "deepspeed": "cpu", "cpu_threads": 1},
    head_dims=(8,),
    attention_lengths=(128,),
    rounds=1,
    trainer_prompts=4,
    requests=2,
    candidates=4,
    steps=4,
)


class Part:
    """Where a part works, and what it has found so far, which a time limit does not take away."""

    def __init__(self, name: str, out: Path, sizes: Sizes):
        self.name, self.out, self.sizes = name, out, sizes
        self.found: dict[str, Any] = {}
        self.work = out / "work"

    def record(self, name: str, value: Any) -> None:
        self.found[name] = value
        path = self.out / f"{self.name}.json"
        path.with_suffix(".new").write_text(json.dumps({"found": self.found}, indent=1))
        path.with_suffix(".new").replace(path)

    def config(self, name: str, model: str = "135m", **sections: dict[str, Any]) -> Path:
        """A config file of a run; sections are merged over what all runs share."""
        sizes = self.sizes
        shared: dict[str, dict[str, Any]] = {
            "data": {"path": str(self.work / "data"), "cache_dir": str(self.work / "cache")},
            "sample": sizes.prompt,
            "template": {"item": "\n{title}:"},
            "pack": {"length": sizes.length},
            "model": {"name": str(self.work / model)},
            "training": {
                "epochs": 1,
                "global_batch_packs": 2,
                "learning_rate": 1e-4,
                "device": sizes.device,
                "log_every": 1,
                **sizes.training,
            },
            "validation": {"max_targets": 40 * sizes.rounds},
        }
        for section, values in sections.items():
            shared[section] = {**shared.get(section, {}), **values}
        folder = self.work / self.name / name
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "config.yaml"
        path.write_text(yaml.safe_dump({"run_dir": str(folder / "run"), **shared}))
        return path


# --- parts ----------------------------------------------------------------------------------------


def inputs(part: Part) -> None:
    """The data set, and models of real shapes with random weights."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from dti_dist.config import TemplateConfig
    from dti_dist.data.dataset import Dataset
    from dti_dist.data.prepare.build import BuildOptions, build_dataset
    from dti_dist.data.prepare.synthetic import read_synthetic
    from dti_dist.data.template import Template
    from dti_dist.model.tokenizer import train_tokenizer

    data = part.work / "data"
    read = partial(
        read_synthetic, users=part.sizes.users, items=400, interactions_per_user=part.sizes.history
    )
    build_dataset(read, str(data), BuildOptions(force=True))
    dataset = Dataset.open(str(data))
    template = Template.for_items(
        TemplateConfig(item="\n{title}:"), dataset.manifest.item_text_columns
    )
    tokenizer = train_tokenizer(dataset, template, 448)
    for name, shape in part.sizes.models.items():
        config = LlamaConfig(
            vocab_size=shape["vocab_size"],
            hidden_size=shape["hidden_size"],
            intermediate_size=shape["intermediate_size"],
            num_hidden_layers=shape["layers"],
            num_attention_heads=shape["heads"],
            num_key_value_heads=shape["key_value_heads"],
            max_position_embeddings=16_384,
            tie_word_embeddings=True,
            dtype="bfloat16",
        )
        torch.manual_seed(0)
        with torch.device(part.sizes.device):
            model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
        model.save_pretrained(str(part.work / name))
        tokenizer.save_pretrained(str(part.work / name))
        part.record(name, {"parameters": sum(p.numel() for p in model.parameters())})


def attention(part: Part) -> None:
    """Whole models against the dense oracle in float64: logits, and gradients of all weights.

    The dense backend in the case's own precision says how far rounding alone is from it.
    """
    policies = ("windowed", "reset", "budget", "isolated")
    cases: list[dict[str, Any]] = [
        {"policy": policy, "positions": positions, "dtype": dtype}
        for dtype in ("fp32", "bf16")
        for policy in policies
        for positions in ("rope", "alibi")
    ]
    cases += [{"policy": "isolated", "share": True, "dtype": dtype} for dtype in ("fp32", "bf16")]
    cases += [
        {"policy": policy, "recompute": True, "dtype": dtype}
        for policy in ("budget", "isolated")
        for dtype in ("fp32", "bf16")
    ]
    cases += [
        {"dtype": dtype, "head_dim": head_dim, "kv_heads": kv_heads}
        for dtype in ("fp32", "bf16")
        for head_dim in part.sizes.head_dims
        for kv_heads in (4, 2)
    ]
    if part.sizes.device == "cpu":
        cases = cases[::4]
    failed = []
    for case in cases:
        name = " ".join(
            key if value is True else str(value) if isinstance(value, str) else f"{key} {value}"
            for key, value in case.items()
        )
        try:
            found = _against_oracle(part.sizes, **case)
        except Exception as error:
            found = {"holds": False, "error": f"{type(error).__name__}: {error}"}
        part.record(name, found)
        failed += [] if found["holds"] else [name]
    assert not failed, f"{len(failed)} of {len(cases)} cases: {'; '.join(failed)}"


def _against_oracle(
    sizes: Sizes,
    dtype: str,
    policy: str = "budget",
    positions: str = "rope",
    head_dim: int | None = None,
    kv_heads: int = 2,
    share: bool = False,
    recompute: bool = False,
) -> dict[str, Any]:
    import numpy as np
    import torch

    from dti_dist.data.layout import PackShape
    from dti_dist.model.ctr_model import cast_parameters
    from dti_dist.model.heads import Head
    from tests import tiny

    rng = np.random.default_rng(0)
    tokens = tiny.item_tokens(rng, items=12)
    block = tiny.users(rng, [25, 9, 14, 30, 40], items=12)
    batch = tiny.batch_of(block, tokens, 4, 6, PackShape(256, 128), share=share)
    dim = head_dim or sizes.head_dims[0]
    shape = {"head_dim": dim, "num_key_value_heads": kv_heads, "hidden_size": 4 * dim}
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]

    def run(backend: str, precision: torch.dtype, device: str) -> list[torch.Tensor]:
        made = tiny.ctr_model("llama", policy, 4, backend=backend, positions=positions, **shape)
        with torch.no_grad():  # scores of about 1, or a softmax of wide heads is a maximum
            for parameter in made.backbone.parameters():
                if parameter.ndim >= 2:
                    parameter.mul_((8 / dim) ** 0.5 * 0.5)
        cast_parameters(made, precision)
        made = made.to(device).train()
        if recompute:
            made.enable_activation_checkpointing()
        here = batch.to(torch.device(device))
        logits = made(here)
        Head.loss(logits, here).backward()
        used = logits[here.used > 0].detach()
        gradients = [p.grad for p in made.parameters() if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        return [x.double().cpu() for x in (used, flat)]

    fast = "flex" if sizes.device == "cuda" else "chunked"
    exact = run("dense", torch.float64, "cpu")
    found = run(fast, kind, sizes.device)
    rounded = run("dense", kind, sizes.device)
    of_backend, of_rounding = (
        [float((x - y).norm() / y.norm()) for x, y in zip(mine, exact, strict=True)]
        for mine in (found, rounded)
    )
    # FlexAttention multiplies in TF32 where it may, which has 10 bits of mantissa.
    floor = 1e-2 if sizes.device == "cuda" else 1e-5
    return {
        "holds": all(
            math.isfinite(x) and x <= 2 * y + floor
            for x, y in zip(of_backend, of_rounding, strict=True)
        ),
        "error of logits, gradients": of_backend,
        "dense in the same precision": of_rounding,
    }


def verify(part: Part) -> None:
    """`dti-dist verify` in bf16."""
    from dti_dist.config import load_config
    from dti_dist.reporting.verify import verify

    broken = []
    for policy in ("budget", "isolated"):
        config = part.config(policy, attention={"policy": policy})
        checks = verify(load_config(str(config), []), 2, "bf16")
        part.record(policy, [{**vars(check), "verdict": check.verdict} for check in checks])
        broken += [check.claim for check in checks if check.verdict == "BROKEN"]
    assert not broken, "; ".join(broken)


def resume(part: Part) -> None:
    """A run killed between two checkpoints and started again learns what an unbroken one learns."""
    of_run = {"training": {"max_steps": STEPS}, "checkpoints": {"every_steps": 2}}
    whole, killed = part.config("whole", **of_run), part.config("killed", **of_run)
    _train(whole).join()
    process = _train(killed)
    while process.is_alive() and not any(step >= KILLED_AFTER for step in _losses(killed)):
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    before = _losses(killed)
    _train(killed).join()
    losses, expected = _losses(killed), _losses(whole)
    largest = max((abs(losses[s] - expected[s]) for s in losses if s in expected), default=None)
    part.record("killed after step", max(before, default=0))
    part.record("largest difference of losses", largest)
    assert set(losses) == set(expected) == set(range(1, STEPS + 1)), f"{losses} of {expected}"
    assert max(before) < STEPS, "it had ended before it was killed"
    # Atomic additions on a GPU round in another order each time.
    assert largest < (0.05 if part.sizes.device == "cuda" else 1e-4), largest


def _train(config: Path, *overrides: str) -> Any:
    """A training run in a process of its own."""
    device = yaml.safe_load(config.read_text())["training"]["device"]
    process = _context(device).Process(target=_become_run, args=(str(config), overrides))
    process.start()
    return process


def _context(device: str) -> Any:
    """A fork has imported all already, and may not be given a GPU."""
    return multiprocessing.get_context("fork" if device == "cpu" else "spawn")


def _become_run(config: str, overrides: tuple[str, ...]) -> None:
    log = os.open(Path(config).with_name("log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    from dti_dist.cli import run

    run(["train", config, *overrides])


def _lines(config: Path) -> list[dict[str, Any]]:
    path = config.with_name("run") / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]


def _losses(config: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in _lines(config) if "loss" in line}


def scorer(part: Part) -> None:
    """Scorer in bf16 against float32, for requests of many sizes, and its speed."""
    import numpy as np
    import torch

    from dti_dist.benchmarks.scoring import benchmark_scoring
    from dti_dist.config import load_config
    from dti_dist.data.template import Template
    from dti_dist.inputs import Inputs
    from dti_dist.model.ctr_model import cast_parameters
    from dti_dist.serving.item_texts import ItemTexts
    from dti_dist.serving.pretrained import Pretrained
    from dti_dist.serving.scorer import Interaction, Request, Scorer

    for policy in ("budget", "isolated"):
        config = load_config(str(part.config(policy, attention={"policy": policy})), [])
        opened = Inputs.open(config, part.work / part.name / "tokenizer")
        columns = opened.dataset.manifest.item_text_columns
        template = Template.for_items(config.template, columns)
        titles = opened.dataset.items_table().select(columns).to_pylist()
        rng = np.random.default_rng(0)
        requests = [
            Request(
                [
                    Interaction(titles[rng.integers(len(titles))], int(rng.integers(2)))
                    for _ in range(int(rng.integers(0, config.sample.context)))
                ],
                [titles[at] for at in rng.integers(0, len(titles), int(rng.integers(1, 64)))],
            )
            for _ in range(2 * part.sizes.requests)
        ]
        scores = {}
        for dtype in (torch.float32, torch.bfloat16):
            model = opened.untrained_model()
            cast_parameters(model, dtype)
            items = ItemTexts(opened.tokens, template, opened.tokenizer)
            pretrained = Pretrained(model, items, config.sample.context, opened.dataset)
            made = Scorer(pretrained, part.sizes.device)
            # In bf16 one by one, so that each size is a shape of its own.
            batches = [requests] if dtype == torch.float32 else [[one] for one in requests]
            scores[dtype] = np.concatenate([s for b in batches for s in made.score_batch(b)])
        apart = np.abs(scores[torch.float32] - scores[torch.bfloat16])
        part.record(policy, {"scores": len(apart), "bf16 from fp32, at most": float(apart.max())})
        assert np.isfinite(apart).all()
        assert apart.max() < 0.05, f"{policy}: {apart.max()}"
    sizes = part.sizes
    speed = benchmark_scoring(
        load_config(str(part.config("speed")), []),
        sizes.rounds,
        sizes.requests,
        sizes.candidates,
    )
    part.record("speed", speed)


def steps(part: Part) -> None:
    """Engine steps of real packs: MFU, targets/s, and the peak of memory against the plan's."""
    stages = ("zero1", "zero3") if part.sizes.device == "cuda" else ("cpu",)
    for model in part.sizes.timed:
        for stage in stages:
            training = {"deepspeed": stage, "activation_checkpointing": model == "1b"}
            config = part.config(f"{model} {stage}", model, training=training)
            # DeepSpeed keeps what a process group was, and memory is measured of a fresh process.
            with ProcessPoolExecutor(1, mp_context=_context(part.sizes.device)) as pool:
                found = pool.submit(_calibrated, str(config), part.sizes.device).result()
            part.record(f"{model} {stage}", found)


def _calibrated(path: str, device: str) -> dict[str, Any]:
    from dti_dist.config import load_config
    from dti_dist.reporting.plan import plan

    planned = plan(load_config(path, []), 1, "cpu" if device == "cpu" else None, measure=True)
    measured, memory = planned["calibration"], planned["memory"]["config"]
    return {
        "mfu": measured["share_of_peak"],
        "targets_per_s": planned["data"]["dti"]["targets"] / planned["time"]["dti"]["train_s"],
        "micro_step_s": measured["micro_step"],
        "optimizer_s": measured["step"],
        "packing_s": measured["data"],
        "peak_gib": measured["memory_gib"],
        # Torch counts tensors on a GPU; on a CPU it is the process that is measured.
        "planned_gib": memory["peak" if device == "cpu" else "tensors"] / 2**30,
    }


def paradigm(part: Part) -> None:
    """dti against packed sliding windows and Hugging Face's Trainer."""
    from dti_dist.benchmarks.paradigm import benchmark_paradigm
    from dti_dist.config import load_config

    sizes = part.sizes
    for model in sizes.timed:
        training = {"activation_checkpointing": model == "1b"}
        part.record(
            model,
            benchmark_paradigm(
                load_config(str(part.config(model, model, training=training)), []),
                rounds=sizes.rounds,
                targets=2_000,
                policies=("budget", "isolated"),
                trainer_prompts=sizes.trainer_prompts,
                trainer_batch=min(16, sizes.trainer_prompts),
            ),
        )


def backends(part: Part) -> None:
    """FlexAttention against SDPA: of a causal mask, which sees more, and of a dense mask."""
    from dti_dist.benchmarks.attention import benchmark_attention

    for length in part.sizes.attention_lengths:
        part.record(str(length), benchmark_attention([length], part.sizes.rounds))


def run(part: Part) -> None:
    """A training run: how long it waits for data, and stands still for checkpoints."""
    training = {"max_steps": part.sizes.steps}
    every = max(part.sizes.steps // 3, 1)
    for model in part.sizes.timed:
        config = part.config(model, model, training=training, checkpoints={"every_steps": every})
        process = _train(config)
        process.join()
        lines = _lines(config)
        log = config.with_name("log").read_text(errors="replace")
        assert process.exitcode == 0, f"exit {process.exitcode}:\n{log[-1500:]}"
        steady = [line for line in lines if "loss" in line][1:]
        saved = [line["checkpoint"] for line in lines if isinstance(line.get("checkpoint"), dict)]
        part.record(
            model,
            {
                "step_s": median(line["step_s"] for line in steady),
                "data_wait_s": median(line["data_wait_s"] for line in steady),
                "tokens_per_s": median(line["tokens_per_s"] for line in steady),
                "logged mfu": median(line["mfu"] for line in steady)
                if "mfu" in steady[0]
                else None,
                "memory_gib": max(line["memory_gib"] for line in steady),
                "checkpoints": saved,
            },
        )


# Name → what it does, and the seconds that it may take on a GPU. What is right comes first.
PARTS: dict[str, tuple[Callable[[Part], None], int]] = {
    "inputs": (inputs, 60),
    "attention": (attention, 170),
    "verify": (verify, 50),
    "resume": (resume, 110),
    "scorer": (scorer, 80),
    "steps": (steps, 110),
    "paradigm": (paradigm, 100),
    "backends": (backends, 60),
    "run": (run, 80),
}


# --- all of them ----------------------------------------------------------------------------------


def _become_part(name: str, out: str, on_gpu: bool) -> None:
    os.setsid()  # what it starts ends with it
    path = Path(out)
    log = os.open(path / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    part = Part(name, path, GPU if on_gpu else CPU)
    part.record("date", time.strftime("%Y-%m-%d"))
    try:
        PARTS[name][0](part)
    except BaseException as error:
        traceback.print_exc()
        part.record("error", f"{type(error).__name__}: {error}"[:2000])
        sys.stdout.flush()
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)  # libraries' threads may not hold it


def _run(name: str, out: Path, on_gpu: bool, limit: float | None) -> dict[str, Any]:
    """Run a part, end it at its limit, and complete its file."""
    context = multiprocessing.get_context("spawn" if on_gpu else "forkserver")
    process = context.Process(target=_become_part, args=(name, str(out), on_gpu))
    began = time.monotonic()
    process.start()
    process.join(limit)
    verdict = "done" if process.exitcode == 0 else "failed"
    if process.is_alive():
        assert limit is not None
        verdict = f"stopped at its limit of {limit:.0f} s"
    if process.pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with all that it has started
    process.join()
    path = out / f"{name}.json"
    found = json.loads(path.read_text())["found"] if path.exists() else {}
    seconds = time.monotonic() - began
    entry = {"part": name, "verdict": verdict, "seconds": seconds, "found": found}
    path.write_text(json.dumps(entry, indent=1))
    return entry


def table(entries: list[dict[str, Any]], about: str) -> str:
    """Markdown: a line for each part, then its figures."""
    lines = [about, "", "| part | verdict | seconds |", "|---|---|---|"]
    lines += [f"| {e['part']} | {e['verdict']} | {e['seconds']:.0f} |" for e in entries]
    lines += ["", "| part | figure | value |", "|---|---|---|"]
    for entry in entries:
        lines += [f"| {entry['part']} | {name} | {text} |" for name, text in _figures(entry)]
    return "\n".join(lines) + "\n"


def _figures(entry: dict[str, Any]) -> list[tuple[str, str]]:
    found, name = entry["found"], entry["part"]
    rows = [("error", str(found["error"]).splitlines()[0][:300])] if "error" in found else []
    cases = {key: value for key, value in found.items() if key not in ("error", "date")}
    if name == "attention":
        of = "error of logits, gradients"
        held = [value for value in cases.values() if value["holds"]]
        worst = [max((v[of][at] for v in held), default=math.nan) for at in (0, 1)]
        text = f"{len(held)} of {len(cases)}; largest error {worst[0]:.1e}, {worst[1]:.1e}"
        rows.append(("cases that hold; of logits, gradients", text))
    elif name == "verify":
        rows += [
            (policy, ", ".join(f"{c['verdict']} {c['largest']:.1e}" for c in checks))
            for policy, checks in cases.items()
        ]
    elif name == "paradigm":
        for model, result in cases.items():
            for variant, of in result["variants"].items():
                text = f"{of['targets_per_s']['median']:,.1f} targets/s, "
                text += f"{of['speedup']['median']:.1f} times sliding windows"
                rows.append((f"{model}, {variant}", text))
    elif name == "backends":
        for length, result in cases.items():
            (by_length,) = result["windows"].values()
            (of,) = by_length.values()
            times = [f"{key} {v['median']:.2f} ms" for key, v in of["milliseconds"].items()]
            rows.append((f"{length} tokens", ", ".join(times)))
    elif name == "scorer":
        for key, value in cases.items():
            if key == "speed":
                rows += [
                    (variant, f"{of['requests_per_s']['median']:,.1f} requests/s")
                    for variant, of in value["variants"].items()
                ]
            else:
                rows.append((key, f"{value['bf16 from fp32, at most']:.1e} of {value['scores']:,}"))
    elif name == "run":
        for model, of in cases.items():
            stalls = [c["seconds"] for c in of["checkpoints"]]
            text = f"step {of['step_s']:.3f} s, of it waiting for data {of['data_wait_s']:.4f} s"
            text += f"; a checkpoint stops training for {max(stalls, default=math.nan):.2f} s"
            rows.append((model, text))
    elif name == "steps":
        for key, of in cases.items():
            text = f"MFU {of['mfu']:.1%}, {of['targets_per_s']:,.0f} targets/s, peak "
            text += f"{of['peak_gib']:.2f} GiB, planned {of['planned_gib']:.2f}"
            rows.append((key, text))
    else:
        rows += [(key, json.dumps(value)) for key, value in cases.items()]
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(prog="gpu.sh")
    parser.add_argument("out", type=Path)
    parser.add_argument("--cpu", action="store_true", help="rehearse with tiny shapes, on a CPU")
    parser.add_argument("--limit", type=float, help="seconds of each part")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    given = parser.parse_args()
    out = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if given.only == list(PARTS):
        shutil.rmtree(out / "work", ignore_errors=True)  # runs would go on
    on_gpu = not given.cpu
    if not on_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
        multiprocessing.get_context("forkserver").set_forkserver_preload(IMPORTED)
    began, entries = time.monotonic(), []
    for name in given.only:
        left = WITHIN_S - (time.monotonic() - began)
        # A rehearsal beside other work takes as long as it takes.
        limit = max(min(PARTS[name][1], left), 1) if on_gpu else None
        entries.append(_run(name, out, on_gpu, given.limit or limit))
        last = entries[-1]
        print(f"{name}: {last['verdict']}, {last['seconds']:.0f} s", flush=True)
        (out / "table.md").write_text(table(entries, _about(on_gpu)))
    print((out / "table.md").read_text())
    return int(any(entry["verdict"] != "done" for entry in entries))


def _about(on_gpu: bool) -> str:
    import torch

    where = torch.cuda.get_device_name() if on_gpu and torch.cuda.is_available() else "a CPU"
    what = "" if on_gpu else ": a rehearsal with tiny shapes, whose figures mean nothing"
    return f"{time.strftime('%Y-%m-%d')}, {where}, torch {torch.__version__}{what}"


if __name__ == "__main__":
    sys.exit(main())
