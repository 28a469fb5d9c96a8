"""A random Llama of any size, trained, resumed, evaluated and exported, with the memory that takes.

python -m tests.training.large_model FOLDER [--layers 30] [--lora] [--only-loading]

The defaults are a model of 1.5 billion parameters in shards of 0.5 GB, on two ranks with ZeRO-3.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from tests.launching import write_config

RANKS = 2
LOADED = "DeepSpeed ZeRO stage"  # what rank 0 says when the engine has the weights


def write_model(folder: Path, layers: int, hidden: int, vocabulary: int, shard_bytes: int) -> int:
    """Weights in bfloat16 and a tokenizer of bytes. Returns the number of parameters."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, LlamaConfig

    from tests.base_models import save_tokenizer_and_model

    save_tokenizer_and_model(folder)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 256,
        tie_word_embeddings=False,
        max_position_embeddings=8192,
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).state_dict()
    shards = split_torch_state_dict_into_shards(
        shapes, filename_pattern="model{suffix}.safetensors", max_shard_size=shard_bytes
    )
    torch.manual_seed(0)
    for file, names in shards.filename_to_tensors.items():
        tensors = {}
        for name in names:
            ones = "norm" in name
            value = torch.empty(shapes[name].shape, dtype=torch.bfloat16)
            tensors[name] = value.fill_(1) if ones else value.normal_(std=0.02)
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": shards.tensor_to_filename}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(shape.numel() for shape in shapes.values())


def peak_mib(pid: int) -> float:
    """The most that was resident of a process so far."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return 0.0


def ranks_of(torchrun: int) -> list[int]:
    children = Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split()
    return sorted(int(child) for child in children)


def train(config: Path, *overrides: str, only_loading: bool = False) -> dict[str, Any]:
    """Peak resident MiB of each rank when the engine has the weights, and after training."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(RANKS), "-m", "dti_dist.training", str(config), *overrides),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    found: dict[str, Any] = {}
    said = []
    for line in process.stdout:
        said.append(line)
        pids = ranks_of(process.pid) if process.poll() is None else []
        if LOADED in line:
            found["loaded_mib"] = [peak_mib(pid) for pid in pids]
            if only_loading:
                process.send_signal(signal.SIGTERM)
        elif len(pids) == RANKS:
            found["trained_mib"] = [peak_mib(pid) for pid in pids]
    code = process.wait()
    if "loaded_mib" not in found or (code and not only_loading):
        raise RuntimeError("".join(said))
    return found


def alone(*arguments: str) -> float:
    """Peak resident MiB of a command of one process."""
    process = subprocess.Popen(
        [sys.executable, "-m", "dti_dist", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, arguments
    return usage.ru_maxrss / 1024


def config_of(folder: Path, data: Path, lora: bool) -> Path:
    return write_config(
        folder / "config.yaml",
        data,
        template={"item": "{title}", "label_words": ["N", "Y"]},
        model={"name": str(folder / "model"), **({"lora": {"rank": 8}} if lora else {})},
        pack={"length": 256},
        training={
            "max_steps": 3,
            "global_batch_packs": RANKS,
            "precision": "bf16",
            "deepspeed": "zero3",
            "device": "cpu",
            "activation_checkpointing": True,
            "log_every": 1,
        },
        validation={"max_targets": 8, "every_steps": 100},
        evaluation={"max_targets": 8},
    )


def prepare(
    folder: Path,
    layers: int = 30,
    hidden: int = 2048,
    vocabulary: int = 32000,
    shard_bytes: int = 5 * 10**8,
    lora: bool = False,
) -> tuple[Path, int]:
    """A config for a new model and a small data set in the folder, and the model's parameters."""
    folder.mkdir(parents=True)
    parameters = write_model(folder / "model", layers, hidden, vocabulary, shard_bytes)
    data = folder / "data"
    alone("prepare", "synthetic", "--out", str(data), "--users", "60", "--items", "48")
    return config_of(folder, data, lora), parameters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    for name, default in (("layers", 30), ("hidden", 2048), ("vocabulary", 32000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--shard-bytes", type=int, default=5 * 10**8)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--only-loading", action="store_true")
    options = vars(parser.parse_args())
    folder, only_loading = options["folder"], options.pop("only_loading")
    config, parameters = prepare(**options)
    found: dict[str, Any] = {"parameters": parameters}
    found["first"] = train(config, only_loading=only_loading)
    if not only_loading:
        run = str(folder / "run")
        found["resumed"] = train(config, "training.max_steps=5")
        found["evaluate_mib"] = alone("evaluate", run)
        found["export_mib"] = alone("export", run, "--out", str(folder / "exported"))
        from transformers import AutoModelForCausalLM

        _, report = AutoModelForCausalLM.from_pretrained(
            folder / "exported", output_loading_info=True
        )
        found["reloaded"] = not report["missing_keys"] and not report["unexpected_keys"]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
