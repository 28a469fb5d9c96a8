"""`dti-dist export`: a trained run as a Hugging Face folder."""

from __future__ import annotations

import copy
import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import torch

import dti_dist
from dti_dist.config import RunConfig
from dti_dist.console import without_library_chatter
from dti_dist.errors import UserError
from dti_dist.inputs import Inputs
from dti_dist.model.ctr_model import CTRModel
from dti_dist.model.tokenizer import SUM_TOKEN
from dti_dist.scoring.trained import choose_checkpoint, trained_model
from dti_dist.training.run_folder import RunFolder

DTI_CONFIG = "dti_config.json"


def export(run_dir: str, out: str, which: str = "best", dtype: str | None = None) -> Path:
    """Write safetensors, tokenizer and dti_config.json to a new folder.

    With the head yes_no the folder holds a causal LM; with linear, a sequence classifier with one
    label (its `score` is the head). Both load with transformers' Auto classes.

    Raises:
        UserError: when the folder exists and is not empty, or the run has no complete checkpoint.
    """
    target = Path(out)
    if target.exists() and any(target.iterdir()):
        raise UserError(f"{target} is not empty. Export to a new folder.")
    run = RunFolder(run_dir)
    config = run.read_config()
    commit = choose_checkpoint(run, which)
    inputs = Inputs.open(config, run.tokenizer)
    model = trained_model(inputs, commit)
    chosen = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype or config.training.precision]
    staging = target.with_name(f".{target.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        with without_library_chatter():
            hugging_face_model(model).to(chosen).save_pretrained(staging)
        inputs.tokenizer.save_pretrained(staging)
        settings = dti_settings(config, inputs, commit.step)
        (staging / DTI_CONFIG).write_text(json.dumps(settings, indent=2, ensure_ascii=False))
        if target.exists():
            target.rmdir()
        os.replace(staging, target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return target


def hugging_face_model(model: CTRModel) -> Any:
    """The same weights as a transformers model of the family, freshly made.

    A fresh model, because one that was read from GGUF can't be saved as safetensors.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    family = copy.deepcopy(model.config)
    family.vocab_size = model.backbone.get_input_embeddings().num_embeddings
    if hasattr(family, "quantization_config"):
        del family.quantization_config
    weights = {f"model.{name}": value for name, value in model.backbone.state_dict().items()}
    if model.head_kind == "yes_no":
        fresh = AutoModelForCausalLM.from_config(family)
        weights["lm_head.weight"] = model.head.weight.detach()
    else:
        family.num_labels = 1
        fresh = AutoModelForSequenceClassification.from_config(family)
        weights["score.weight"] = model.head.weight.detach()
    fresh.load_state_dict(weights, strict=True)
    return fresh


def dti_settings(config: RunConfig, inputs: Inputs, step: int) -> dict[str, Any]:
    """What a program needs beside the weights to build prompts and read predictions."""
    return {
        "dti_dist_version": dti_dist.__version__,
        "base_model": config.model.name,
        "head": config.model.head,
        "sample": config.sample.model_dump(mode="json"),
        "template": config.template.model_dump(mode="json"),
        "attention": config.attention.model_dump(mode="json", exclude={"backend"}),
        "sum_token": SUM_TOKEN,
        "sum_token_id": inputs.tokens.sum_id,
        "label_token_ids": list(inputs.tokens.label_ids),
        "step": step,
    }
