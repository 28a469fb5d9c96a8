"""An exported folder of a tiny model with random weights, made without a training run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dti_dist.config import load_config
from dti_dist.data.stream import PackStream, Share
from dti_dist.export.export import (
    DTI_CONFIG,
    dti_settings,
    hollow_hugging_face_model,
    hugging_face_value,
    save_extra,
    save_model,
)
from dti_dist.inputs import Inputs
from dti_dist.model.ctr_model import CTRModel
from dti_dist.model.weights import Placement, fill, own_value
from dti_dist.ranks import Ranks
from tests.launching import write_config

ONE = Ranks(0, 1, 0, 1, torch.device("cpu"))


def export_random_weights(folder: Path, data: Path, **sections: Any) -> tuple[Path, Inputs]:
    """The folder, and the inputs of the same config."""
    config = load_config(write_config(folder / "config.yaml", data, **sections))
    inputs = Inputs.open(config, folder / "tokenizer")
    model = random_weights(inputs)
    exported = folder / "exported"
    save_model(model, own_value, inputs.tokenizer, torch.float32, exported)
    save_extra(model, own_value, exported)
    inputs.tokenizer.save_pretrained(exported)
    (exported / DTI_CONFIG).write_text(json.dumps(dti_settings(inputs, model, step=0)))
    return exported, inputs


def random_weights(inputs: Inputs) -> CTRModel:
    """The run's model in float32, with the weights that `export_random_weights` exports."""
    model = inputs.untrained_model()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # wider than the default, so that scores differ
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.3, generator=generator)
    return model


def hugging_face_model(model: CTRModel, dtype: torch.dtype = torch.float32) -> Any:
    """What `dti-dist export` writes of a model, in memory."""
    plain = hollow_hugging_face_model(model)
    fill(plain, lambda name, _: hugging_face_value(model, name, own_value), Placement(dtype))
    return plain.eval()


def target_scores(
    model: Any, inputs: Inputs, split: str = "test", max_targets: int | None = None
) -> dict[tuple[int, int], float]:
    """(row, position) → what evaluation by sliding-window prompts predicts."""
    plan = inputs.stream_plan(split, k=1, max_targets=max_targets)
    found = {}
    with torch.no_grad():
        for batch in PackStream(plan, Share(1, 1)):
            used = batch.used > 0
            probabilities = torch.sigmoid(model(batch)[used].float()).numpy()
            keys = zip(
                batch.target_row[used].tolist(), batch.target_position[used].tolist(), strict=True
            )
            found.update(zip(keys, probabilities.astype(np.float64).tolist(), strict=True))
    return found
