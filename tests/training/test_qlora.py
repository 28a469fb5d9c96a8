"""Adapters over weights in 4 bits, trained by the real job, and read again by what follows it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from dti_dist.cli import main
from dti_dist.costs.memory import states
from dti_dist.costs.shape import ModelShape
from dti_dist.inputs import Inputs
from dti_dist.model.nf4 import NF4
from dti_dist.runs.folder import RunFolder
from dti_dist.runs.trained import choose_checkpoint
from tests.base_models import save_base_model
from tests.launching import assert_same_losses, losses, train
from tests.training import test_lora_memory
from tests.training.test_lora import (
    auto_class,
    logit,
    lora_config,
    predictions,
    without_adapters,
)

pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'dti-dist[qlora]'")
pytest.importorskip("peft")
pytestmark = pytest.mark.slow
ZERO_2 = "training.deepspeed=zero2"


def round_linear_weights(base: Path, out: Path) -> int:
    """A copy of a base model, its decoder's linear weights as 4 bits have them."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(base, out)
    weights = load_file(base / "model.safetensors")
    linear = [name for name in weights if name.endswith("_proj.weight")]
    for name in linear:
        weights[name] = NF4().rounded(weights[name])
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return len(linear)


@pytest.fixture(scope="module")
def quantized(synthetic, made_once):
    """Two ranks of ZeRO-2 with recomputed activations."""

    def make(folder: Path) -> None:
        base = save_base_model(folder / "base", tied=False)
        config = lora_config(folder, synthetic, base, load_in_4bit=True)
        train(config, ZERO_2, ranks=2)

    return made_once("qlora", make)


@pytest.fixture(scope="module")
def rounded(quantized, synthetic, made_once):
    """One process that trains adapters over the dequantized weights, in plain torch."""

    def make(folder: Path) -> None:
        assert round_linear_weights(quantized / "base", folder / "base") == 2 * 7
        train(lora_config(folder, synthetic, folder / "base"))

    return made_once("qlora-rounded", make)


def test_a_run_is_one_over_the_dequantized_weights(quantized, rounded):
    assert_same_losses(losses(quantized / "run"), losses(rounded / "run"))
    of_run, expected = (predictions(str(folder / "run")) for folder in (quantized, rounded))
    np.testing.assert_allclose(of_run.probability, expected.probability, atol=1e-4)
    assert of_run.probability.std() > 1e-3


def test_a_resumed_run_goes_on_over_the_same_bits(quantized, tmp_path):
    shutil.copytree(quantized, tmp_path / "copy")
    config = tmp_path / "copy" / "config.yaml"
    run_dir = tmp_path / "copy" / "run"
    for folder in (run_dir / "checkpoints").glob("step-*"):
        if int(folder.name.removeprefix("step-")) > 8:
            shutil.rmtree(folder)
    said = train(config, ZERO_2, f"run_dir={run_dir}", ranks=2)
    assert "resuming from step-00000008" in said
    assert_same_losses(losses(quantized / "run"), losses(run_dir))


def test_a_run_in_bf16_begins_with_the_adapters_of_another(quantized, synthetic, tmp_path):
    config = lora_config(tmp_path, synthetic, quantized / "base", load_in_4bit=True)
    stay = ["training.max_steps=1", "training.learning_rate=1.0e-30", "training.precision=bf16"]
    train(config, ZERO_2, *stay, f"model.init_from={quantized / 'run'}", ranks=2)
    begun, source = (predictions(folder / "run") for folder in (tmp_path, quantized))
    assert np.array_equal(begun.probability, source.probability)


def test_checkpoints_hold_no_quantized_weight(quantized):
    folder = choose_checkpoint(RunFolder(quantized / "run"), "last").folder
    for file in folder.glob("*model_states.pt"):
        module = torch.load(file, weights_only=False)["module"]
        assert not [name for name in module if "base_layer" in name]
        assert torch.uint8 not in {value.dtype for value in module.values()}


def test_merged_export_predicts_as_the_run_does(quantized, rounded, tmp_path):
    """So it is merged into the dequantized weights, not into the original ones."""
    out = tmp_path / "merged"
    run_dir = str(quantized / "run")
    assert main(["export", run_dir, "--out", str(out), "--dtype", "fp32"]) == 0
    loaded = auto_class("yes_no").from_pretrained(out)
    of_export = predictions(run_dir, without_adapters(run_dir, loaded, out))
    of_run = predictions(run_dir)
    np.testing.assert_allclose(logit(of_run.probability), logit(of_export.probability), atol=1e-5)
    card = (out / "README.md").read_text()
    assert "merged into the dequantized weights here" in card


def test_plan_counts_the_bits_of_the_weights(quantized):
    folder = RunFolder(quantized / "run")
    model = Inputs.open(folder.read_config(), folder.tokenizer).hollow_model()
    shape = ModelShape.of(model)
    linear = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32)
    assert shape.quantized.numbers == linear
    assert shape.quantized.largest == 48 * 32
    counted = (shape.parameters, shape.trained, {"stage": 2}, "bf16", 2, False)
    held = states(*counted, shape.quantized)
    assert held.weights == 2 * (shape.parameters - linear) + linear * (4 + 32 / 64) / 8
    assert held.optimizer == states(*counted).optimizer


@pytest.mark.parametrize("stage", [1, 2])
def test_a_rank_holds_the_bits_and_nothing_of_them_in_float32(synthetic, tmp_path, stage):
    config = test_lora_memory.config_of(tmp_path, synthetic, stage)
    found = test_lora_memory.moments(tmp_path, config, 2, "model.lora.load_in_4bit=true")
    folder = RunFolder(tmp_path / "run")
    shape = ModelShape.of(Inputs.open(folder.read_config(), folder.tokenizer).hollow_model())
    planned = states(
        shape.parameters, shape.trained, {"stage": stage}, "bf16", 2, True, shape.quantized
    )
    scales = 4 * shape.quantized.numbers / 64  # which are no parameters
    assert len(found) == 2 * 2 * 2
    for moment in found:
        assert moment["float32"][0] < test_lora_memory.LEAST / 2
        assert moment["dtypes"] == ["torch.bfloat16", "torch.uint8"]
        assert moment["weight_bytes"] + scales == pytest.approx(planned.weights, rel=0.001)


def test_verify_finds_the_run_isolated(quantized, capsys):
    config = str(quantized / "run" / "config.yaml")
    assert main(["verify", config, "--dtype", "fp64"]) == 0
    assert "FAILED" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["zero3", "zero3_offload", "cpu"])
def test_plan_refuses_stage_3(quantized, capsys, name):
    arguments = [str(quantized / "config.yaml"), f"training.deepspeed={name}"]
    assert main(["plan", *arguments, "--gpus", "2"]) == 2
    assert "Set training.deepspeed to zero1, zero2 or auto" in capsys.readouterr().err


def test_a_job_refuses_stage_3_before_any_work(quantized, synthetic, tmp_path):
    config = lora_config(tmp_path, synthetic, quantized / "base", load_in_4bit=True)
    said = train(config, expect=2)  # with `cpu`
    assert "found stage 3, which would have to partition weights in 4 bits" in said
    assert not (tmp_path / "run").exists()


def test_auto_takes_a_stage_that_holds_them_whole(quantized, synthetic, tmp_path):
    config = lora_config(tmp_path, synthetic, quantized / "base", load_in_4bit=True)
    said = train(config, "training.deepspeed=auto", "training.max_steps=1")
    assert "training.deepspeed=zero1" in said
