"""Folders of models to train from, as `model.name` may name them."""

from pathlib import Path

import torch

VOCABULARY = 256  # without [SUM], which is added


def save_tokenizer_and_model(folder: Path, model_type: str = "llama") -> Path:
    """A tokenizer of bytes, and a config without weights."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, PreTrainedTokenizerFast

    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    AutoConfig.for_model(model_type).save_pretrained(folder)
    return folder


def save_base_model(folder: Path, tied: bool, seed: int = 0, **settings: int) -> Path:
    """A small Llama with a tokenizer of bytes; settings of its config are merged over these."""
    from transformers import LlamaConfig, LlamaForCausalLM

    save_tokenizer_and_model(folder)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    config = LlamaConfig(**{**sizes, **settings}, tie_word_embeddings=tied, initializer_range=0.2)
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
