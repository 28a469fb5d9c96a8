"""Steps whose loss or gradients are not finite: what is known of them, and how many are allowed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dti_dist.data.stream import Batch
from dti_dist.errors import RunFailed
from dti_dist.files import write_atomically
from dti_dist.model.ctr_model import CTRModel
from dti_dist.model.heads import of_main_task
from dti_dist.training.engine import Engine
from dti_dist.training.job import Job
from dti_dist.training.journal import Journal
from dti_dist.training.progress import Progress
from dti_dist.training.step import Step

_LARGEST = 20  # parameters that are listed


def report_left_out(
    job: Job, engine: Engine, step: Step, progress: Progress, journal: Journal
) -> None:
    """Write down what is known of a step whose loss or gradients are not finite.

    All ranks must call this at once.

    Raises:
        RunFailed: where more steps were left out than training.max_skipped_steps allows.
    """
    progress.skipped_steps += 1
    number, allowed = progress.step + 1, job.config.training.max_skipped_steps
    folder = job.folder.nonfinite / f"step-{number:08d}"
    found = job.ranks.each(lambda: _write_diagnosis(folder, engine, step, number, job.ranks.rank))
    module = next(filter(None, found), None)
    what = "gradients are" if math.isfinite(step.loss_sum) else f"loss is {step.loss_sum}:"
    message = (
        f"Step {number:,}: the {what} not finite. The optimizer step was left out, so the "
        f"weights are those after step {progress.step:,}. "
        + (f"The first module whose output is not finite: {module}. " if module else "")
        + f"Targets, logits and weights are in {folder}."
    )
    journal.write(step=number, not_finite=str(step.loss_sum), module=module)
    if progress.skipped_steps > allowed:
        raise RunFailed(
            f"{message} {progress.skipped_steps} step(s) were left out, and "
            f"training.max_skipped_steps is {allowed}. Look there for what is odd; a lower "
            "training.learning_rate, a longer training.warmup_fraction or "
            "training.precision=fp32 help most often, in a new run_dir. A higher "
            "max_skipped_steps goes on from the last checkpoint."
        )
    journal.say(f"{message} Left out so far: {progress.skipped_steps} of {allowed} allowed.")


def _write_diagnosis(
    folder: Path, engine: Engine, step: Step, number: int, rank: int
) -> str | None:
    """Run the step's batches forward once more and write ``rank-0.json``; all ranks do.

    The file has every target with its place in the split, logit and loss, the first module whose
    output is not finite, and of this rank's part of each weight how many values are not finite and
    the largest magnitude.

    Returns:
        the name of that module, or None where all outputs are finite.
    """
    first = _FirstNonFinite(engine.model)
    targets = []
    with torch.no_grad():
        for batch in step.batches:
            logits = of_main_task(engine(batch), batch)
            targets += _targets(batch, logits.float().cpu())
    first.remove()
    weights = sorted(
        (_summary(name, part) for name, part in engine.own_weights()),
        key=lambda entry: (-entry["not_finite"], -entry["largest"]),
    )
    content = {
        "step": number,
        "loss_sum": str(step.loss_sum),
        "first_module_not_finite": first.name,
        "targets": targets,
        "weights": weights[:_LARGEST],
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / f"rank-{rank}.json", json.dumps(content, indent=1))
    return first.name


def _targets(batch: Batch, logits: torch.Tensor) -> list[dict[str, Any]]:
    used = batch.used.cpu() > 0
    labels = batch.labels.cpu()[used].float()
    losses = nn.functional.binary_cross_entropy_with_logits(logits[used], labels, reduction="none")
    columns = {
        "row": batch.target_row[used].tolist(),
        "position": batch.target_position[used].tolist(),
        "label": labels.int().tolist(),
        "logit": logits[used].tolist(),
        "loss": losses.tolist(),
    }
    return [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]


def _summary(name: str, part: torch.Tensor) -> dict[str, Any]:
    finite = torch.isfinite(part)
    largest = part[finite].abs().max().item() if finite.any() else math.nan
    return {"name": name, "not_finite": int((~finite).sum()), "largest": largest}


class _FirstNonFinite:
    """Hooks that remember the first module, from the inside out, with such an output."""

    def __init__(self, model: CTRModel):
        self.name: str | None = None
        self._hooks = [
            module.register_forward_hook(self._hook(name))
            for name, module in model.named_modules()
            if name
        ]

    def _hook(self, name: str) -> Any:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) and output else output
            if (
                self.name is None
                and isinstance(value, torch.Tensor)
                and value.is_floating_point()
                and not torch.isfinite(value).all()
            ):
                self.name = name

        return look

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
