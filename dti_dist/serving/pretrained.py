"""A trained model ready to score, from an exported folder or from a run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dti_dist.config import AttentionConfig, SampleConfig, StorageConfig, TemplateConfig
from dti_dist.console import without_library_chatter
from dti_dist.data import item_tokens
from dti_dist.data.dataset import ONLY_TASK, TASK_NAME, Dataset
from dti_dist.data.item_vocabulary import FILE as ITEMS
from dti_dist.data.item_vocabulary import ItemVocabulary
from dti_dist.data.template import Template
from dti_dist.errors import UserError
from dti_dist.inputs import Inputs, cache_dir_of, template_of
from dti_dist.model import sources
from dti_dist.model.ctr_model import CTRModel, cast_parameters
from dti_dist.model.heads import HEADS
from dti_dist.model.item_vectors import item_vectors
from dti_dist.model.weights import Placement
from dti_dist.runs.calibration import Isotonic, Platt, calibrations
from dti_dist.runs.exported import EXTRA_FILE, read_extra, read_settings
from dti_dist.runs.folder import RunFolder
from dti_dist.runs.places import DATA, MODEL
from dti_dist.runs.trained import choose_checkpoint, trained_model
from dti_dist.serving.item_texts import ItemTexts


@dataclass(frozen=True)
class Pretrained:
    """A model with what builds its prompts.

    Attributes:
        n: context interactions.
        dataset: whose items are the first rows of `items`; None without one.
        by_request: interactions of one time were shown at once, and none sees another of them.
        tasks: names of what the model predicts, the main task first.
        calibration: of the probabilities, by task; of those without one they are as predicted.
    """

    model: CTRModel
    items: ItemTexts
    n: int
    dataset: Dataset | None
    by_request: bool = False
    tasks: tuple[str, ...] = (ONLY_TASK,)
    calibration: Mapping[str, Platt | Isotonic] = field(default_factory=dict)

    @staticmethod
    def of(inputs: Inputs, model: CTRModel) -> Pretrained:
        """A model with the inputs that it was made for."""
        dataset, config = inputs.dataset, inputs.config
        items = ItemTexts(inputs.tokens, inputs.template, inputs.tokenizer)
        n, by_request = config.sample.context, dataset.has_requests
        return Pretrained(model, items, n, dataset, by_request, dataset.tasks)


def load_run(
    folder: str | Path,
    which: str | None = None,
    data: str | None = None,
    base_model: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Pretrained:
    """A run's checkpoint with the data set that it was trained on, or another.

    Args:
        base_model: a folder with the model that the run began with, in place of its model.name.

    Raises:
        UserError: the run has no such checkpoint, or its data set can't be opened.
    """
    run = RunFolder(str(folder))
    own = {MODEL: base_model, DATA: data}
    config = run.read_config(*(key for key, instead in own.items() if instead is None))
    if data is not None:
        read_from = config.data.model_copy(update={"path": data})
        config = config.model_copy(update={"data": read_from})
    if base_model is not None:
        base = config.model.model_copy(update={"name": base_model, "revision": None})
        config = config.model_copy(update={"model": base})
    commit = choose_checkpoint(run, which)
    inputs = Inputs.open(config, run.tokenizer)
    return Pretrained.of(inputs, trained_model(inputs, commit, Placement(dtype)))


def load_exported(
    folder: str | Path,
    data: str | None = None,
    dtype: torch.dtype = torch.float32,
    storage: StorageConfig | None = None,
) -> Pretrained:
    """What `dti-dist export` wrote. Weights are read from safetensors alone, never from pickles.

    Args:
        data: a prepared data set, whose items are then known by their ids.

    Raises:
        UserError: the folder is not one of export, or the data set does not fit it.
    """
    folder = Path(folder)
    settings = read_settings(folder)
    if (folder / "adapter_config.json").exists():
        raise UserError(
            f"{folder} holds adapters alone. Export the run without --adapter-only, which merges "
            "them into the weights."
        )
    sources.check_folder(folder)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
        sample = SampleConfig.model_validate(settings["sample"])
        config = TemplateConfig.model_validate(settings["template"])
        attention = AttentionConfig.model_validate(settings["attention"])
        head, sum_id = str(settings["head"]), int(settings["sum_token_id"])
        label_ids = settings["label_token_ids"]
        no, yes = int(label_ids[0]), int(label_ids[1])
        calibration = calibrations(settings.get("calibration") or {})
        # Exports of before had no fields but the item's.
        of_events = {
            str(piece["field"]): tuple(map(str, piece["values"]))
            for piece in settings.get("pieces", ())
            if piece["field"]
        }
        borders = {
            str(piece["field"]): tuple(map(float, piece["borders"]))
            for piece in settings.get("pieces", ())
            if piece.get("borders")
        }
        for name, between in borders.items():
            if len(of_events[name]) != len(between) + 2:
                raise ValueError(f"{len(between)} borders between the classes of {name!r}")
        item_size = int(settings.get("item_embeddings") or 0)
        vocabulary = None
        if item_size:
            vocabulary = ItemVocabulary(
                unknown=int(settings["item_token_id"]),
                first=int(settings["first_item_id"]),
                hashes=np.load(folder / ITEMS, allow_pickle=False),
            )
        tasks = tuple(map(str, settings.get("tasks") or (ONLY_TASK,)))
        if not all(re.fullmatch(TASK_NAME, task) for task in tasks):
            raise ValueError(f"tasks {tasks}, whose names are none")
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(
            f"{folder}: expected what dti-dist export writes, found something else: {error}. "
            "Export the run again."
        ) from error
    dataset = None
    if data is None:
        template = Template.alone(config, of_events, borders)
        items = ItemTexts.none_yet(template, tokenizer, sum_id, vocabulary)
    else:
        dataset = Dataset.open(data, storage=storage)
        template = template_of(config, dataset)
        found = {piece.field for piece in template.event_pieces}
        if found != of_events.keys():
            differ = ", ".join(map(repr, sorted(map(str, found ^ of_events.keys()))))
            raise UserError(
                f"{data}: expected a data set in which template.item {config.item!r} reads as in "
                f"training; found {differ}, a column of the items in one of the two, and of the "
                "interaction in the other. Rename the items' column."
            )
        if template.borders != borders:
            raise UserError(
                f"{data}: expected the classes of numbers of the data set that the model was "
                "trained on; found others. Give that data set, or one that was appended to it."
            )
        cache = cache_dir_of(dataset)
        tokens = item_tokens.load_or_build(dataset, template, tokenizer, sum_id, cache, vocabulary)
        items = ItemTexts(tokens, template, tokenizer)
    causal_lm = _read_model(folder, head, dtype)
    prefix = len(items.tokens.prefix)
    longest = prefix + (sample.context + 1) * items.longest_interaction
    if items.profiles is not None:
        longest = max(longest, items.profiles.longest)
    model = CTRModel(
        causal_lm,
        head=head,
        label_ids=(no, yes),
        n=sample.context,
        attention=attention,
        prefix_length=prefix,
        longest_span=longest,
        keep_negatives=settings.get("keep_negatives"),
        further_tasks=tasks[1:],
        items=item_vectors(vocabulary, item_size, causal_lm.config.hidden_size),
    )
    _read_extra(folder, model)
    cast_parameters(model, dtype)
    by_request = settings.get("requests") is not None
    return Pretrained(model.eval(), items, sample.context, dataset, by_request, tasks, calibration)


def _read_extra(folder: Path, model: CTRModel) -> None:
    found = read_extra(folder)
    if not found and not model.head.tasks:
        return  # the export is from before the head had a bias and a scale
    for name, parameter in model.extra.items():
        if name not in found or found[name].shape != parameter.shape:
            raise UserError(
                f"{folder}: expected {name} in {EXTRA_FILE}, of shape {tuple(parameter.shape)}; "
                f"found {tuple(found[name].shape) if name in found else 'none'}. Export the run "
                "again."
            )
        parameter.data = found[name].to(parameter.dtype)


def _read_model(folder: Path, head: str, dtype: torch.dtype) -> Any:
    import transformers

    kind = getattr(transformers, HEADS[head].auto_class)
    try:
        with without_library_chatter():
            model, loading = kind.from_pretrained(
                str(folder),
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise UserError(
            f"{folder}: the model could not be read: {reason} Export the run again."
        ) from error
    wrong = {name: keys for name, keys in loading.items() if keys and name != "error_msgs"}
    if wrong:
        raise UserError(
            f"{folder}: the weights don't fit config.json: {wrong}. Export the run again."
        )
    return model
