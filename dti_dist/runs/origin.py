"""Where the first weights of a run come from that begins with another run's or with exported ones.

What must agree is what the weights can't do without: the model, its head and adapters, the label
words. What else they were trained with may differ, and is said.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dti_dist.config import AUTO, RunConfig, by_key
from dti_dist.data import storage
from dti_dist.data.dataset import ONLY_TASK
from dti_dist.data.item_vocabulary import FILE as ITEMS
from dti_dist.errors import UserError
from dti_dist.files import write_atomically
from dti_dist.inputs import Inputs
from dti_dist.model import sources
from dti_dist.model.ctr_model import CTRModel
from dti_dist.model.item_vectors import with_new_items
from dti_dist.model.weights import Reader, Stored, mark_stored
from dti_dist.redaction import redact
from dti_dist.runs.commits import Commit
from dti_dist.runs.exported import is_run, read_extra, read_settings
from dti_dist.runs.folder import DTI_CONFIG, RunFolder, read_json_object
from dti_dist.runs.places import DEEPSPEED, INIT, MODEL, same_place
from dti_dist.runs.trained import TrainedWeights, choose_checkpoint

_READ = (".safetensors", ".json", ".jinja", ".npy")

# Settings, or sections of them that end with a point.
_OF_MODEL = (MODEL, "model.head", "model.item_embeddings", "template.label_words")
_OF_SCRATCH = "model.scratch."
_OF_ADAPTERS = (
    *("model.lora.rank", "model.lora.alpha", "model.lora.target_modules"),
    *("model.lora.load_in_4bit", "model.lora.double_quant"),
)
_TASKS = "labels of the data set"
_ITEMS = "items with vectors"
_OF_OPTIMIZER = (DEEPSPEED, "training.precision")
_MAY_DIFFER = (
    *("sample.context", "template.", "requests", _TASKS),
    *("attention.policy", "attention.positions", "attention.budget", "attention.forgetting."),
)
# Of a model's config: those with the same have weights of the same shapes, and use them alike.
_ARCHITECTURE = (
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "tie_word_embeddings"),
    *("rope_parameters", "rms_norm_eps"),
)


@dataclass(frozen=True)
class Origin:
    """What model.init_from names, compared with the config of the run that begins.

    Attributes:
        place: as that config names it.
        folder: where it lies on this machine.
        settings: what its weights were trained with, by key.
        commit: the checkpoint of a run; None for an exported folder.
    """

    place: str
    folder: Path
    settings: dict[str, Any]
    commit: Commit | None = None

    @property
    def words(self) -> str:
        place = redact(self.place)
        return f"{self.commit.folder.name} of {place}" if self.commit else place

    def open(self, inputs: Inputs, model: CTRModel) -> Reader:
        """The values of a hollow model's weights, in float32.

        Raises:
            UserError: where they are of another model.
        """
        if inputs.config.model.init_optimizer == "kept":
            _refuse(
                self.place,
                "a run whose optimizer can be kept",
                _differences(self.settings, _now(inputs), [_TASKS, _ITEMS]),
                "Take a data set with the same labels, and with model.item_embeddings the same "
                "items, or set model.init_optimizer=fresh.",
            )
        if self.commit is not None:
            return TrainedWeights(inputs, self.commit, model, torch.float32, to_begin=True)
        exported = inputs.model.model_copy(update={"name": str(self.folder), "revision": None})
        theirs = sources.load_model_config(exported, inputs.vocabulary)
        there = {name: getattr(theirs, name, None) for name in _ARCHITECTURE}
        now = {name: getattr(model.config, name, None) for name in _ARCHITECTURE}
        base = self.settings.get(MODEL)
        _refuse(
            self.place,
            f"the model that model.name gives, {sources.public_name(inputs.config.model.name)}",
            _differences(there, now, _ARCHITECTURE),
            f"Set model.name to the model that the export began with, {base}.",
        )
        if model.head.is_new:
            mark_stored(model.head.weight, Stored(model.head.exported_weight))
        weights = replace(inputs, model=exported).open_weights(model)
        extra = read_extra(self.folder)
        return lambda name, own: (
            with_new_items(name, extra[name], own) if name in extra else weights(name, own)
        )

    def check(self, weights: Reader) -> str | None:
        """`TrainedWeights.check_base` of weights that were read; exported ones have no base."""
        return weights.check_base() if isinstance(weights, TrainedWeights) else None

    def differences(self, inputs: Inputs) -> list[str]:
        """What the weights were trained with that is not so now, each as a line for people."""
        return _differences(self.settings, _now(inputs), _MAY_DIFFER)

    def keep(self, file: Path, optimizer: str, differences: list[str]) -> None:
        """Write down what the run began with."""
        content = {
            "from": redact(self.place),
            "checkpoint": self.commit and self.commit.folder.name,
            "optimizer": optimizer,
            "differences": [line.strip() for line in differences],
        }
        write_atomically(file, json.dumps(content, indent=2, ensure_ascii=False))


def _now(inputs: Inputs) -> dict[str, Any]:
    """Settings by key of the run that begins, and what its data set says."""
    rule = inputs.dataset.manifest.requests
    requests = rule and rule.model_dump(mode="json")
    now: dict[str, Any] = {"requests": requests, _TASKS: list(inputs.dataset.tasks)}
    if inputs.tokens.vocabulary is not None:
        now[_ITEMS] = len(inputs.tokens.vocabulary)
    return inputs.config.flat() | now


def published_origin(file: Path) -> str | None:
    """What a run began with, without the path to it; None where it began with its model.name."""
    found = read_json_object(file)
    if "from" not in found:
        return None
    name = str(found["from"]).rstrip("/").rpartition("/")[2]
    return f"{name}, {found['checkpoint']}" if found.get("checkpoint") else name


@contextmanager
def find_origin(config: RunConfig) -> Iterator[Origin]:
    """What model.init_from names, on this machine for the time of the block.

    Raises:
        UserError: where it is neither a run with the checkpoint nor an exported folder, or its
            weights do not fit the config.
    """
    place = config.model.init_from
    assert place is not None
    with storage.on_this_machine(place, config.data.storage, _READ) as folder:
        if is_run(folder):
            yield _of_run(place, folder, config)
        elif (folder / DTI_CONFIG).exists():
            yield _of_export(place, folder, config)
        else:
            local = storage.is_local(place)
            there = "something else" if local and folder.exists() else "nothing"
            raise UserError(
                f"{INIT} {redact(place)}: expected the folder of a run, with config.yaml, or one "
                f"that dti-dist export wrote, with {DTI_CONFIG}; found {there if local else 'none'}"
                f"{'' if local else ' of the second there; a run must lie on this machine'}. Give "
                "another place, or leave it out to begin with model.name."
            )


def _of_run(place: str, folder: Path, config: RunConfig) -> Origin:
    if os.path.realpath(folder) == os.path.realpath(config.run_dir):
        raise UserError(
            f"{INIT} {place}: expected another run, found run_dir itself. Leave it out to go on "
            "with this run, or choose another run_dir."
        )
    run = RunFolder(folder)
    theirs = run.read_config().flat()
    if dataset := read_json_object(run.dataset):
        theirs["requests"] = dataset.get("requests")
        theirs[_TASKS] = [task["name"] for task in dataset.get("tasks", [])] or [ONLY_TASK]
    if (items := run.tokenizer / ITEMS).exists():
        theirs[_ITEMS] = len(np.load(items))
    commit = choose_checkpoint(run, config.model.init_checkpoint, option="model.init_checkpoint")
    now = config.flat()
    _refuse(
        place,
        "a run with the same adapters, or without",
        _differences(theirs, now, _OF_ADAPTERS),
        f"Set them as there. Or merge them into the model: dti-dist export {place} --out DIR. With "
        f"DIR as {INIT} all weights train on; with DIR as model.name, and no {INIT}, adapters can.",
    )
    scratch = [_OF_SCRATCH] if config.model.name == "scratch" else []
    _refuse(
        place,
        "a run of the same model",
        _differences(theirs, now, (*_OF_MODEL, *scratch)),
        "Set them as there.",
    )
    if config.model.init_optimizer == "kept":
        wanted = [key for key in _OF_OPTIMIZER if now[key] != AUTO]
        _refuse(
            place,
            "a run whose optimizer can be kept",
            _differences(theirs, now, wanted),
            "Set them as there, or model.init_optimizer=fresh.",
        )
    return Origin(place, folder, theirs, commit)


def _of_export(place: str, folder: Path, config: RunConfig) -> Origin:
    sources.check_folder(folder)
    model = config.model
    given = {
        "model.init_optimizer": model.init_optimizer == "kept",
        "model.init_checkpoint": model.init_checkpoint is not None,
    }
    for key in (key for key, is_given in given.items() if is_given):
        raise UserError(
            f"{INIT} {redact(place)}: expected a run with {key}, found an exported folder, which "
            f"has weights alone. Give the run that it was exported from, or leave {key} out."
        )
    if model.lora.rank:
        raise UserError(
            f"{INIT} {redact(place)}: expected a run with model.lora.rank {model.lora.rank}, found "
            "an exported folder. Give the run whose adapters are to train on; to train new "
            f"adapters on the exported model, set model.name to it and leave {INIT} out."
        )
    found = read_settings(folder)
    sections = {name: found.get(name) or {} for name in ("sample", "template", "attention")}
    theirs = by_key(sections) | {
        "model.head": found.get("head"),
        "model.item_embeddings": found.get("item_embeddings", 0),
        MODEL: found.get("base_model"),
    }
    if "requests" in found:
        theirs["requests"] = found["requests"]
    theirs[_TASKS] = found.get("tasks") or [ONLY_TASK]
    _refuse(
        place,
        "an export of the same model",
        _differences(theirs, config.flat(), [key for key in _OF_MODEL if key != MODEL]),
        "Set them as there.",
    )
    return Origin(place, folder, theirs)


def _differences(there: dict[str, Any], now: dict[str, Any], keys: Iterable[str]) -> list[str]:
    wanted = tuple(keys)
    return [
        f"  {key}: {value!r} there, {now.get(key)!r} now"
        for key, value in there.items()
        if (key in wanted or key.startswith(tuple(k for k in wanted if k.endswith("."))))
        and value != now.get(key)
        and not same_place(key, str(value), str(now.get(key)))
    ]


def _refuse(place: str, expected: str, differences: list[str], remedy: str) -> None:
    if differences:
        lines = "\n".join(differences)
        raise UserError(f"{INIT} {redact(place)}: expected {expected}, found\n{lines}\n{remedy}")
