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
from dti_dist.model.lora import SumEmbedding, merge_adapters
from dti_dist.model.tokenizer import SUM_TOKEN
from dti_dist.scoring.trained import choose_checkpoint, trained_model
from dti_dist.training.run_folder import RunFolder

DTI_CONFIG = "dti_config.json"


def export(
    run_dir: str,
    out: str,
    which: str = "best",
    dtype: str | None = None,
    adapter_only: bool = False,
) -> Path:
    """Write safetensors, tokenizer and dti_config.json to a new folder.

    With the head yes_no the folder holds a causal LM; with linear, a sequence classifier with one
    label (its `score` is the head). Both load with transformers' Auto classes. Adapters are merged
    into the weights, or with `adapter_only` they are all that is written, for peft.

    Raises:
        UserError: when the folder exists and is not empty, the run has no complete checkpoint, or
            adapters are asked for and it has none.
    """
    target = Path(out)
    if target.exists() and any(target.iterdir()):
        raise UserError(f"{target} is not empty. Export to a new folder.")
    run = RunFolder(run_dir)
    config = run.read_config()
    if adapter_only and not config.model.lora.rank:
        raise UserError(
            f"{run.path} has no adapters: all of its weights were trained (model.lora.rank is 0). "
            "Leave --adapter-only out."
        )
    commit = choose_checkpoint(run, which)
    inputs = Inputs.open(config, run.tokenizer)
    model = trained_model(inputs, commit)
    chosen = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype or config.training.precision]
    staging = target.with_name(f".{target.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        if adapter_only:
            save_adapter(model, chosen, config.model.name, staging)
        else:
            merge_adapters(model)
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


def save_adapter(model: CTRModel, dtype: torch.dtype, base_model: str, folder: Path) -> None:
    """adapter_model.safetensors and adapter_config.json as peft reads them.

    Beside the adapters they hold [SUM]'s embedding, as peft's trainable token, and the head
    `linear`, as a module to save.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    embeddings = model.backbone.get_input_embeddings()
    assert isinstance(embeddings, SumEmbedding), "the model has no adapters"
    adapters = get_peft_model_state_dict(model.backbone, save_embedding_layers=False)
    weights = {f"model.{name}": value for name, value in adapters.items()}
    weights["model.embed_tokens.token_adapter.trainable_tokens_delta"] = embeddings.row[None]
    settings = copy.deepcopy(model.backbone.peft_config["default"])
    settings.base_model_name_or_path = base_model
    settings.inference_mode = True
    settings.trainable_token_indices = {"embed_tokens": [embeddings.sum_id]}
    settings.task_type = "CAUSAL_LM"
    if model.head_kind == "linear":
        settings.task_type = "SEQ_CLS"
        settings.modules_to_save = ["score"]
        weights["score.weight"] = model.head.weight
    settings.save_pretrained(folder)
    save_file(
        {
            f"base_model.model.{name}": value.detach().to(dtype).contiguous()
            for name, value in weights.items()
        },
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )


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
