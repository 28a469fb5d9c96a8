"""What is known of a step whose loss or gradients are not finite, for who looks into it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dti_dist.data.stream import Batch
from dti_dist.files import write_atomically
from dti_dist.model.ctr_model import CTRModel

_LARGEST = 20  # parameters that are listed


def write_diagnosis(
    folder: Path, engine: Any, batches: list[Batch], rank: int, **facts: Any
) -> str | None:
    """Run the step's batches forward once more and write ``rank-0.json``; all ranks do.

    The file has `facts`, every target with its place in the split, logit and loss, the first
    module whose output is not finite, and of this rank's part of each weight how many values are
    not finite and the largest magnitude.

    Returns:
        the name of that module, or None where all outputs are finite.
    """
    first = _FirstNonFinite(engine.module)
    targets = []
    with torch.no_grad():
        for batch in batches:
            targets += _targets(batch, engine(batch).float().cpu())
    first.remove()
    weights = sorted(
        (_summary(name, parameter) for name, parameter in engine.module.named_parameters()),
        key=lambda entry: (-entry["not_finite"], -entry["largest"]),
    )
    content = {
        **facts,
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


def _summary(name: str, parameter: nn.Parameter) -> dict[str, Any]:
    part = getattr(parameter, "ds_tensor", parameter).detach()
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
