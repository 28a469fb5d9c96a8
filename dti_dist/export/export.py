"""`dti-dist export`: a trained run as a Hugging Face folder."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

import dti_dist
from dti_dist.config import RunConfig, StorageConfig
from dti_dist.console import progress, say
from dti_dist.data import storage
from dti_dist.data.item_vocabulary import FILE as ITEMS
from dti_dist.data.template import LONGEST_TIME_GAP, TIME_GAPS
from dti_dist.errors import UserError
from dti_dist.evaluation.calibrating import calibrate
from dti_dist.export.model_card import Exported, model_card
from dti_dist.inputs import Inputs
from dti_dist.model import sources
from dti_dist.model.ctr_model import CTRModel
from dti_dist.model.lora import SumEmbedding, is_adapted, merged
from dti_dist.model.tokenizer import SUM_TOKEN
from dti_dist.model.weights import Placement, Reader, as_kept, fill, hollow
from dti_dist.redaction import redact
from dti_dist.runs.commits import refuse_altered
from dti_dist.runs.exported import EXTRA_FILE
from dti_dist.runs.folder import DTI_CONFIG, RunFolder
from dti_dist.runs.places import DATA, MODEL
from dti_dist.runs.trained import TrainedWeights, choose_checkpoint

MODEL_CARD = "README.md"
_SHARD = 5 * 10**9  # bytes
_READING = (("scale", "head.scale"), ("bias", "head.bias"))  # of logits, by their name in settings


def export(
    run_dir: str,
    out: str,
    which: str | None = None,
    dtype: str | None = None,
    adapter_only: bool = False,
    licence: str | None = None,
    calibration: Literal["platt", "isotonic"] | None = None,
) -> None:
    """Write safetensors, tokenizer, model card and dti_config.json to a new folder or URL.

    With the head yes_no the folder holds a causal LM; with linear, a sequence classifier with one
    label (its `score` is the head). Both load with transformers' Auto classes. Adapters are merged
    into the weights, or with `adapter_only` they are all that is written, for peft. What neither
    has room for is in EXTRA_FILE.

    Args:
        out: a folder or any fsspec URL. It appears whole; in an object store dti_config.json comes
            last, so a folder without it is not finished.
        licence: an identifier for the model card, where the base model's is not to stand there.
        calibration: also fit one of each task on the checkpoint's predictions of valid.

    Raises:
        UserError: when the folder exists and is not empty, the run has no complete checkpoint, the
            checkpoint was altered, adapters are asked for and it has none, or the predictions that
            a calibration needs are not there.
    """
    run = RunFolder(run_dir)
    config = run.read_config(DATA, MODEL)
    if set(storage.list_files(out, config.data.storage)) - {"."}:  # what some stores call a folder
        raise UserError(f"{redact(out)} is not empty. Export to a new folder.")
    if adapter_only and not config.model.lora.rank:
        raise UserError(
            f"{run.path} has no adapters: all of its weights were trained (model.lora.rank is 0). "
            "Leave --adapter-only out."
        )
    commit = choose_checkpoint(run, which)
    refuse_altered(commit)
    inputs = Inputs.open(config, run.tokenizer)
    model = inputs.hollow_model()
    weights = TrainedWeights(inputs, commit, model, torch.float32)
    # Only what adapters consist of is in memory as a whole.
    fill(model, weights, Placement(), only=lambda p: is_adapted(model) and p.requires_grad)
    precision = dtype or config.training.precision
    chosen = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    settings = dti_settings(inputs, model, commit.step)
    if calibration:
        settings["calibration"] = {}
        for place, task in enumerate(inputs.dataset.tasks):
            further = task if place else None
            fitted, said = calibrate(run, commit.folder.name, calibration, further)
            settings["calibration"][task] = fitted.model_dump()
            say(said)
    with _new_folder(out, config.data.storage) as folder:
        if adapter_only:
            save_adapter(model, chosen, sources.public_name(config.model.name), folder)
        else:
            save_model(model, as_kept(weights), inputs.tokenizer, chosen, folder)
        extra = save_extra(model, weights, folder)
        settings |= {key: float(extra[name]) for key, name in _READING if name in extra}
        weights.check_base()
        inputs.tokenizer.save_pretrained(folder)
        if inputs.tokens.vocabulary is not None:
            np.save(folder / ITEMS, inputs.tokens.vocabulary.hashes)
        card = model_card(
            run,
            inputs,
            Exported(commit, settings, precision, adapter_only, _parameters(model)),
            {"license": licence} if licence else sources.licence_of(config.model),
        )
        (folder / MODEL_CARD).write_text(card, encoding="utf-8")
        text = json.dumps(settings, indent=2, ensure_ascii=False)
        (folder / DTI_CONFIG).write_text(text, encoding="utf-8")


@contextmanager
def _new_folder(out: str, settings: StorageConfig) -> Iterator[Path]:
    """A folder on this machine whose files appear at `out` when the block ends well."""
    if storage.is_local(out):
        with storage.publish_folder(out, commit_file=DTI_CONFIG) as staging:
            yield Path(staging)
        return
    with tempfile.TemporaryDirectory(prefix="dti-dist-export-") as staging:
        yield Path(staging)
        try:
            _upload(Path(staging), out, settings)
        except BaseException:
            with suppress(Exception):  # once: the store has just failed
                storage.remove(out, settings.model_copy(update={"retry_s": 0.0}))
            raise


def _upload(folder: Path, url: str, settings: StorageConfig) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    files.sort(key=lambda path: path.name == DTI_CONFIG)
    size = sum(path.stat().st_size for path in files)
    with progress(f"uploading to {redact(url)}", size, "bytes") as bar:
        for path in files:
            name = path.relative_to(folder).as_posix()
            storage.upload(str(path), storage.join(url, name), settings)
            bar.advance(path.stat().st_size)


def _parameters(model: CTRModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def save_model(
    model: CTRModel, read: Reader, tokenizer: Any, dtype: torch.dtype, folder: Path
) -> None:
    """model.safetensors (or shards) and config.json, as transformers' Auto classes load them.

    One shard at a time is in memory.

    Args:
        read: values of the model's weights; those of its adapters it has itself.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    plain = hollow_hugging_face_model(model)
    if plain.config.pad_token_id is None:  # a classifier's batches need one
        plain.config.pad_token_id = tokenizer.pad_token_id
    plain.config.dtype = str(dtype).rpartition(".")[2]
    plain.config.architectures = [type(plain).__name__]
    plain.config.save_pretrained(folder)
    if plain.can_generate():
        plain.generation_config.save_pretrained(folder)
    shapes = {
        name: torch.empty(parameter.shape, dtype=dtype, device="meta")
        for name, parameter in plain.named_parameters()
    }
    shards = split_torch_state_dict_into_shards(
        shapes, filename_pattern="model{suffix}.safetensors", max_shard_size=_SHARD
    )
    with progress("writing weights", shards.metadata["total_size"], "bytes") as bar:
        for file, names in shards.filename_to_tensors.items():
            tensors = {
                name: hugging_face_value(model, name, read).to(dtype).contiguous() for name in names
            }
            save_file(tensors, folder / file, metadata={"format": "pt"})
            bar.advance(sum(tensor.nbytes for tensor in tensors.values()))
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True)
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


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
    settings.task_type = model.head.peft_task
    if model.head.is_new:
        settings.modules_to_save = [model.head.exported_weight.partition(".")[0]]
        weights[model.head.exported_weight] = model.head.weight
    settings.save_pretrained(folder)
    save_file(
        {
            f"base_model.model.{name}": value.detach().to(dtype).contiguous()
            for name, value in weights.items()
        },
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )


def save_extra(model: CTRModel, read: Reader, folder: Path) -> dict[str, torch.Tensor]:
    """What no class of transformers has room for, by its name in the model."""
    from safetensors.torch import save_file

    tensors = {
        name: read(name, parameter).detach().float().contiguous()
        for name, parameter in model.extra.items()
    }
    save_file(tensors, folder / EXTRA_FILE)
    return tensors


def hollow_hugging_face_model(model: CTRModel) -> Any:
    """A transformers model of the family that has the same weights, but for their values.

    A fresh one, because one that was read from GGUF can't be saved as safetensors.
    """
    from accelerate import init_empty_weights

    family = copy.deepcopy(model.config)
    family.vocab_size = model.backbone.get_input_embeddings().num_embeddings
    if hasattr(family, "quantization_config"):
        del family.quantization_config
    with init_empty_weights(include_buffers=False):
        plain = model.head.empty_export(family)
    plain.tie_weights()
    hollow(plain)
    return plain


def hugging_face_value(model: CTRModel, name: str, read: Reader) -> torch.Tensor:
    """A weight by its name in a transformers model of the family."""
    if name == model.head.exported_weight:
        return model.head.exported(lambda own, _: merged(model, own, read))
    return merged(model, f"backbone.{name.removeprefix('model.')}", read)


def dti_settings(inputs: Inputs, model: CTRModel, step: int) -> dict[str, Any]:
    """What a program needs beside the weights to build prompts and read predictions."""
    config = inputs.config
    requests, borders = inputs.dataset.manifest.requests, inputs.template.borders
    vocabulary = inputs.tokens.vocabulary
    why_not = why_not_plain(
        model,
        config.sample.context,
        inputs.dataset.has_requests,
        inputs.tokens.profiles is not None,
    )
    return {
        "dti_dist_version": dti_dist.__version__,
        "base_model": sources.public_name(config.model.name),
        "head": config.model.head,
        "sample": config.sample.model_dump(mode="json"),
        "template": config.template.model_dump(mode="json"),
        "time_gaps": _time_gaps(config),
        "keep_negatives": inputs.dataset.manifest.keep_negatives,
        "pieces": [
            {"format": piece.format, "field": piece.field, "values": piece.values}
            | ({"borders": borders[piece.field]} if piece.field and piece.field in borders else {})
            for piece in inputs.template.pieces
        ],
        "requests": requests and requests.model_dump(mode="json"),
        "tasks": [task.name for task in inputs.dataset.manifest.tasks],
        "attention": config.attention.model_dump(mode="json", exclude={"backend"}),
        "sum_token": SUM_TOKEN,
        "sum_token_id": inputs.tokens.sum_id,
        "label_token_ids": list(inputs.tokens.label_ids),
        "item_embeddings": config.model.item_embeddings,
        "item_token_id": vocabulary and vocabulary.unknown,
        "first_item_id": vocabulary and vocabulary.first,
        "step": step,
        "plain_transformers": why_not is None,
        "plain_transformers_why": why_not or _WHY_PLAIN.format(n=config.sample.context),
    }


def _time_gaps(config: RunConfig) -> list[dict[str, Any]]:
    """Words before an interaction, by the seconds since the user's one before; shortest first."""
    if not config.template.time_gaps:
        return []
    bounded = [{"below_seconds": bound, "words": words} for bound, words in TIME_GAPS]
    return [*bounded, {"below_seconds": None, "words": LONGEST_TIME_GAP}]


_WHY_PLAIN = (
    "In a sliding-window prompt of up to n = {n} context interactions each token sees all tokens "
    "before it, by the model's own positions, as in a plain causal forward pass."
)


def why_not_plain(
    model: CTRModel, n: int, by_request: bool = False, has_profile: bool = False
) -> str | None:
    """Why a plain causal forward pass over a sliding-window prompt isn't the trained function.

    None where it is: where every state that [SUM] is made of has seen all tokens before it, by the
    model's own positions, and nothing else.

    Args:
        by_request: interactions that were shown at once do not see each other.
        has_profile: [SUM] reads a profile.
    """
    scheme = model.scheme
    if has_profile:
        return (
            "[SUM] alone reads the profile (template.profile), at the same distance from every "
            "target, and in a plain causal forward pass all tokens do, at their own."
        )
    if model.items is not None:
        return (
            "Items have vectors (model.item_embeddings), which an embedding of [ITEM] has to be "
            "added to, and transformers has no place for them."
        )
    body, readout = scheme.windows.body, scheme.windows.readout
    if not scheme.positions.rotated:
        return (
            "attention.positions is alibi: [SUM] has no position, and its attention falls with the "
            "distance, which a plain causal forward pass doesn't know of."
        )
    if by_request and len(body) > 1:
        return (
            "Interactions of a history that were shown at once do not see each other, which a "
            "plain causal forward pass doesn't know of."
        )
    # Nobody reads the body behind the last layer, so its window does not count.
    if min((*body[:-1], *readout)) < n:
        return (
            f"The leakage policy has layers in which a token sees fewer than n = {n} interactions "
            f"back (body {list(body)}, [SUM] {list(readout)}); in a plain causal forward pass all "
            "layers see the whole prompt."
        )
    # One layer reads initial embeddings: there is nothing to forget toward.
    if scheme.forgetting is not None and scheme.forgetting.any() and len(readout) > 1:
        return (
            "attention.policy is reset: [SUM] forgets what is far back toward its initial "
            "embedding, which a plain causal forward pass doesn't know of."
        )
    if scheme.prefix_length and not scheme.readout_sees_prefix:
        return (
            "attention.policy is isolated and template.prefix is not empty: [SUM] reads the "
            "prefix from other tokens alone, and in a plain causal forward pass by itself too."
        )
    return None
