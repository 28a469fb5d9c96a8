"""`dti-dist evaluate`: metrics of a trained run on a split, by either kind of prompt."""

from __future__ import annotations

import json
from typing import Any

import torch

from dti_dist.config import RunConfig
from dti_dist.console import progress, say
from dti_dist.data.stream import PackStream, Share, batches
from dti_dist.inputs import Inputs
from dti_dist.model.ctr_model import CTRModel
from dti_dist.ranks import Ranks, leave, meet
from dti_dist.scoring.metrics import click_metrics
from dti_dist.scoring.predict import predict
from dti_dist.scoring.trained import choose_checkpoint, trained_model
from dti_dist.training.checkpoint import write_atomically
from dti_dist.training.run_folder import RunFolder

PROMPTS = ("sliding_window", "streaming")


def evaluate(
    run_dir: str,
    split: str = "test",
    prompt: str | None = None,
    which: str = "best",
    overrides: dict[str, Any] | None = None,
) -> dict[str, Any] | None:
    """Evaluate a run's checkpoint and write eval/{split}.json.

    Args:
        prompt: sliding_window (what inference does) or streaming; default from the config.
        which: best, last, or a step.
        overrides: evaluation settings that replace the run's.

    Returns:
        The metrics on rank 0, None on the others. With synthetic data they include the ceiling:
        the AUC of the true click probabilities.
    """
    run = RunFolder(run_dir)
    config = run.read_config()
    if overrides:
        evaluation = config.evaluation.model_copy(update=overrides)
        config = config.model_copy(update={"evaluation": evaluation})
    settings = config.training
    ranks = meet(settings.device, settings.collective_timeout_minutes, settings.cpu_threads)
    try:
        return _evaluate(run, config, split, prompt or config.evaluation.prompt, which, ranks)
    finally:
        leave()


def _evaluate(
    run: RunFolder, config: RunConfig, split: str, prompt: str, which: str, ranks: Ranks
) -> dict[str, Any] | None:
    commit = choose_checkpoint(run, which)
    inputs = ranks.first_on_node(lambda: Inputs.open(config, run.tokenizer))
    plan = inputs.stream_plan(
        split,
        k=1 if prompt == "sliding_window" else config.sample.targets,
        max_targets=config.evaluation.max_targets,
        together=ranks,
    )
    model = trained_model(inputs, commit).to(ranks.device)
    if ranks.device.type == "cuda" and config.training.precision == "bf16":
        model = _in_bf16(model)
    share = Share(
        ranks.world * config.evaluation.batch_packs,
        config.evaluation.batch_packs,
        ranks.rank,
        ranks.world,
    )
    if ranks.is_main:
        say(
            f"evaluating {commit.folder.name} on {split}: {plan.index.total_targets:,} targets by "
            f"{prompt} prompts"
        )
    loader = batches(
        PackStream(plan, share),
        config.data.workers,
        config.data.prefetch,
        ranks.device.type == "cuda",
    )
    with progress(f"evaluating {split}", plan.index.total_targets, "targets", ranks.is_main) as bar:
        found = predict(model, loader, ranks, lambda batch: bar.advance(batch.step_targets))
    if found is None:
        return None
    ceiling = inputs.dataset.ceiling or {}
    figures = {
        **click_metrics(found.label, found.probability, found.row),
        "split": split,
        "prompt": prompt,
        "checkpoint": commit.folder.name,
        **({"ceiling": ceiling[split]} if split in ceiling else {}),
    }
    run.evaluations.mkdir(exist_ok=True)
    content = json.dumps(figures, indent=2)
    write_atomically(run.evaluations / f"{split}.json", content)
    write_atomically(run.evaluations / f"{split}.{prompt}.json", content)
    return figures


def _in_bf16(model: CTRModel) -> CTRModel:
    for parameter in model.parameters():  # buffers stay float32: rotary frequencies
        parameter.data = parameter.data.to(torch.bfloat16)
    return model
