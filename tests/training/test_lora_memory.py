"""Frozen weights beneath adapters: in float32 in no rank's memory, and in no checkpoint."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path

import pytest
import torch

from dti_dist.cli import main
from dti_dist.costs.memory import checkpoint_bytes, states
from dti_dist.inputs import Inputs
from dti_dist.model import weights
from dti_dist.model.weights import Placement
from dti_dist.runs.folder import RunFolder
from dti_dist.runs.trained import choose_checkpoint, trained_model
from tests.base_models import save_base_model
from tests.launching import job, run, write_config
from tests.training.job_that_counts_floats import float32_numbers

pytest.importorskip("peft")
pytestmark = pytest.mark.slow
SIZES = {"hidden_size": 128, "intermediate_size": 192}
LEAST = 64 * 128  # numbers of the smallest frozen matrix, a key projection
RANKS = 2
MOMENTS = ("before", "after")


def config_of(folder: Path, data: Path, stage: int, tied: bool = True) -> Path:
    """Few weights train: all of them together are fewer than half of the smallest frozen matrix."""
    base = save_base_model(folder / "base", tied=tied, **SIZES)
    zero = {
        "stage": stage,
        "reduce_bucket_size": 1000,
        "allgather_bucket_size": 1000,
        "stage3_prefetch_bucket_size": 1000,
        "stage3_param_persistence_threshold": 100,
    }
    file = folder / "deepspeed.json"
    # The setting that lets DeepSpeed take torch's AdamW, as in deepspeed_configs/.
    others = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    file.write_text(json.dumps({"zero_optimization": zero, **others}))
    lora = {"rank": 2, "target_modules": ["q_proj", "v_proj"]}
    return write_config(
        folder / "config.yaml",
        data,
        model={"name": str(base), "lora": lora},
        template={"label_words": ["N", "Y"], "max_item_tokens": 8},
        pack={"length": 128},
        training={
            "max_steps": 2,
            "global_batch_packs": 4,
            "precision": "bf16",
            "deepspeed": str(file),
        },
        validation={"max_targets": 8},
        checkpoints={"every_steps": 1},
    )


def moments(folder: Path, config: Path, ranks: int, *overrides: str) -> list[dict]:
    """What each rank held before and after each step of a job."""
    out = folder / f"held-{ranks}-{len(list(folder.glob('held-*')))}"
    module = "tests.training.job_that_counts_floats"
    run(job(ranks, config, out, *overrides, module=module), folder / "log")
    files = [Path(f"{out}.{rank}") for rank in range(ranks)]
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def counts(config: Path) -> tuple[int, int]:
    """All parameters, and those that train."""
    folder = RunFolder(config.parent / "run")
    model = Inputs.open(folder.read_config(), folder.tokenizer).hollow_model()
    return (
        sum(p.numel() for p in model.parameters()),
        sum(p.numel() for p in model.parameters() if p.requires_grad),
    )


def float32_in_files(folder: Path) -> list[int]:
    """Numbers of each float32 tensor in a checkpoint's files."""
    found: list[int] = []

    def walk(content: object) -> None:
        if isinstance(content, torch.Tensor):
            found.extend([content.numel()] if content.dtype == torch.float32 else [])
        elif isinstance(content, dict):
            for value in content.values():
                walk(value)
        elif isinstance(content, list | tuple):
            for value in content:
                walk(value)

    for file in folder.glob("*.pt"):
        walk(torch.load(file, weights_only=False))
    return found


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_no_rank_holds_a_frozen_weight_in_float32(synthetic, tmp_path, stage):
    config = config_of(tmp_path, synthetic, stage)
    first = moments(tmp_path, config, RANKS)
    parameters, trained = counts(config)
    assert 2 * trained < LEAST / RANKS, "what trains could hide a frozen weight"
    assert {(m["moment"], m["step"]) for m in first} == {(m, s) for m in MOMENTS for s in (0, 1)}
    checkpoint = choose_checkpoint(RunFolder(tmp_path / "run"), "last").folder
    assert checkpoint.name == "step-00000002"
    sizes = float32_in_files(checkpoint), sum(f.stat().st_size for f in checkpoint.glob("*.pt"))
    shutil.rmtree(checkpoint)
    resumed = moments(tmp_path, config, RANKS)
    shutil.rmtree(checkpoint)
    resharded = moments(tmp_path, config, 1)
    assert {(m["moment"], m["step"]) for m in [*resumed, *resharded]} == {(m, 1) for m in MOMENTS}
    for moment in [*first, *resumed, *resharded]:
        ranks = 1 if moment in resharded else RANKS
        assert moment["float32"][0] < LEAST / ranks, moment
        assert moment["dtypes"] == ["torch.bfloat16"]
        assert moment["master_weights"] == pytest.approx(trained / ranks, abs=64)
        assert moment["moments"] in (0, 2 * moment["master_weights"])
        zero = {"stage": stage}
        held = states(parameters, trained, zero, "bf16", ranks, accumulates=True)
        assert moment["weight_bytes"] == pytest.approx(held.weights, rel=0.02)
        assert 4 * 3 * moment["master_weights"] == pytest.approx(held.optimizer, rel=0.05)

    in_float32, size = sizes
    assert max(in_float32) < LEAST / RANKS
    whole, _ = checkpoint_bytes(trained, stage, "bf16", RANKS)
    assert size < whole + LEAST * 2 * RANKS, "there is room for a frozen matrix in bf16"


def test_all_weights_that_train_are_held_in_float32(synthetic, tmp_path):
    """So that the test above can fail."""
    config = config_of(tmp_path, synthetic, 3)
    found = moments(tmp_path, config, 1, "model.lora.rank=0", "training.max_steps=1")
    assert all(moment["float32"][0] > LEAST for moment in found)


@pytest.fixture(scope="module")
def trained(synthetic, made_once):
    def make(folder: Path) -> None:
        run(job(1, config_of(folder, synthetic, 2, tied=False)), folder / "log")

    return made_once("lora-memory", make)


def large() -> list[int]:
    """Sizes of the float32 tensors that are as large as a frozen matrix."""
    return [numbers for numbers in float32_numbers() if numbers >= LEAST]


@pytest.fixture
def large_at_each_read(monkeypatch):
    """Float32 tensors as large as a frozen matrix, in memory whenever the base model is read."""
    found: list[list[int]] = []
    read = weights.Safetensors.read

    def counted(self: weights.Safetensors, name: str) -> torch.Tensor:
        found.append(large())
        return read(self, name)

    monkeypatch.setattr(weights.Safetensors, "read", counted)
    gc.freeze()  # what other tests of this process have left is neither counted nor walked
    yield found
    gc.unfreeze()


def test_evaluation_in_bf16_holds_no_frozen_weight_in_float32(trained, large_at_each_read):
    folder = RunFolder(trained / "run")
    inputs = Inputs.open(folder.read_config(), folder.tokenizer)
    commit = choose_checkpoint(folder, "best")
    model = trained_model(inputs, commit, Placement(torch.bfloat16))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert len(large_at_each_read) > 2 * 7
    assert not any(large_at_each_read)
    assert not large()


def test_export_in_bf16_holds_one_frozen_weight_at_a_time_in_float32(
    trained, tmp_path, large_at_each_read
):
    out = str(tmp_path / "out")
    assert main(["export", str(trained / "run"), "--out", out, "--dtype", "bf16"]) == 0
    assert len(large_at_each_read) > 2 * 7
    assert max(map(len, large_at_each_read)) <= 1
