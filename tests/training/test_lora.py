"""Adapters trained beside frozen weights by the real job, and read again by what follows it."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from dti_dist.cli import main
from dti_dist.config import load_config
from dti_dist.data.stream import PackStream, Share
from dti_dist.evaluation.predict import predict
from dti_dist.inputs import Inputs
from dti_dist.ranks import Ranks
from dti_dist.runs.exported import read_extra
from dti_dist.runs.folder import RunFolder
from dti_dist.runs.trained import choose_checkpoint, trained_model
from tests.base_models import VOCABULARY, save_base_model
from tests.launching import job, kill, losses, run, start, train, wait_for_step, write_config
from tests.metrics_oracle import click_metrics

pytest.importorskip("peft")
pytestmark = pytest.mark.slow
CLOSE = 1e-4
HEADS = ["yes_no", "linear"]


def lora_config(folder: Path, data: Path, base: Path, head: str = "yes_no", **lora) -> Path:
    return write_config(
        folder / "config.yaml",
        data,
        model={"name": str(base), "head": head, "lora": {"rank": 4, "alpha": 8, **lora}},
        template={"label_words": ["N", "Y"], "max_item_tokens": 8},
        training={
            "max_steps": 20,
            "epochs": 4,
            "global_batch_packs": 4,
            "learning_rate": 0.02,
            "new_rate_factor": 1,  # of a rate that is far above usual ones
            "precision": "fp32",
            "deepspeed": "cpu",
            "device": "cpu",
            "cpu_threads": 1,
            "log_every": 1,
            "activation_checkpointing": True,
        },
        checkpoints={"every_steps": 4, "keep_last": 9},
    )


@pytest.fixture(scope="module", params=HEADS)
def trained(request, synthetic, made_once):
    """Two ranks of ZeRO-3 with recomputed activations: config, run folder, base, what moved."""
    head = request.param

    def make(folder: Path) -> None:
        base = save_base_model(folder / "base", tied=head == "yes_no")
        config = lora_config(folder, synthetic, base, head)
        module = "tests.training.job_with_frozen_weights"
        run(job(2, config, folder / "weights.json", module=module), folder / "log")

    folder = made_once(f"lora-{head}", make)
    return {
        "config": folder / "config.yaml",
        "run": folder / "run",
        "base": folder / "base",
        "head": head,
        "printed": (folder / "log").read_text(),
        **json.loads((folder / "weights.json").read_text()),
    }


def assert_same_losses(first: dict[int, float], second: dict[int, float]) -> None:
    assert set(first) == set(second) == set(range(1, 21))
    assert max(abs(first[step] - second[step]) for step in first) < CLOSE
    assert len({round(loss, 3) for loss in first.values()}) > 5, "the losses don't move"


def test_what_trains_moves_and_frozen_weights_stay_to_the_bit(trained):
    expected = {name for name in trained["same"] if ".lora_" in name}
    assert len(expected) == 2 * 2 * 7  # A and B, layers, linear layers of each
    of_head = "head.weight" if trained["head"] == "linear" else "head.scale"
    expected |= {"backbone.embed_tokens.row", "head.bias", of_head}
    assert set(trained["trainable"]) == expected
    moved = {name for name, same in trained["same"].items() if not same}
    assert moved == expected


def test_loss_falls_and_the_job_says_how_much_trains(trained):
    folder = RunFolder(trained["run"])
    untrained = Inputs.open(folder.read_config(), folder.tokenizer).untrained_model().eval()
    before = log_loss(predictions(trained["run"], untrained, "train"))
    assert log_loss(predictions(trained["run"], split="train")) < before - 0.005
    found = re.search(r"([\d,]+) parameters, ([\d,]+) trainable", trained["printed"])
    total, trainable = (int(figure.replace(",", "")) for figure in found.groups())
    assert 0 < trainable < total / 4


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (1, ["training.activation_checkpointing=false"]),
        (2, ["training.deepspeed=zero2"]),
    ],
    ids=["one process, nothing recomputed", "ZeRO-2"],
)
@pytest.mark.parametrize("trained", ["yes_no"], indirect=True)
def test_losses_do_not_depend_on_how_the_work_is_shared_out(
    trained, synthetic, tmp_path, ranks, overrides
):
    config = lora_config(tmp_path, synthetic, trained["base"])
    train(config, *overrides, ranks=ranks)
    assert_same_losses(losses(trained["run"]), losses(tmp_path / "run"))
    run_dir = str(tmp_path / "run")
    np.testing.assert_allclose(
        predictions(run_dir).probability, predictions(trained["run"]).probability, atol=CLOSE
    )


@pytest.mark.parametrize("trained", ["yes_no"], indirect=True)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(trained, synthetic, tmp_path):
    config = lora_config(tmp_path, synthetic, trained["base"])
    process = start(job(2, config), tmp_path / "killed.log")
    try:
        wait_for_step(process, tmp_path / "run", 6)
    finally:
        kill(process)
    assert max(losses(tmp_path / "run")) < 20
    assert "resuming from step-" in train(config, ranks=2)
    assert_same_losses(losses(trained["run"]), losses(tmp_path / "run"))


@pytest.mark.parametrize("trained", ["yes_no"], indirect=True)
def test_a_resumed_run_drops_out_the_same(trained, synthetic, tmp_path):
    config = lora_config(tmp_path, synthetic, trained["base"], dropout=0.3)
    train(config)
    whole = losses(tmp_path / "run")
    assert max(abs(whole[step] - losses(trained["run"])[step]) for step in whole) > 10 * CLOSE
    for folder in (tmp_path / "run" / "checkpoints").glob("step-*"):
        if int(folder.name.removeprefix("step-")) > 8:
            shutil.rmtree(folder)
    assert "resuming from step-00000008" in train(config)
    assert_same_losses(whole, losses(tmp_path / "run"))


def test_checkpoints_leave_the_frozen_weights_out(trained):
    folder = choose_checkpoint(RunFolder(trained["run"]), "last").folder
    for file in folder.glob("*model_states.pt"):
        state = torch.load(file, weights_only=False)
        held = {name for name, value in state["module"].items() if name in trained["trainable"]}
        assert held == set(trained["trainable"])
        others = [value for name, value in state["module"].items() if name not in held]
        assert not any(value.numel() for value in others)
        assert not state["frozen_param_fragments"]


def predictions(run_dir, model=None, split="test"):
    folder = RunFolder(run_dir)
    inputs = Inputs.open(folder.read_config(), folder.tokenizer)
    model = model or trained_model(inputs, choose_checkpoint(folder, "best"))
    plan = inputs.stream_plan(split, k=1)
    one = Ranks(0, 1, 0, 1, torch.device("cpu"))
    return predict(model, PackStream(plan, Share(1, 1)), one)


def log_loss(found):
    return click_metrics(found.label, found.probability, found.row)["log_loss"]


def auto_class(head):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return AutoModelForCausalLM if head == "yes_no" else AutoModelForSequenceClassification


def without_adapters(run_dir, loaded, exported):
    """The run's model with an exported model's weights."""
    folder = RunFolder(run_dir)
    plain = ["model.lora.rank=0", "model.lora.load_in_4bit=false"]
    inputs = Inputs.open(load_config(folder.config_file, plain), folder.tokenizer)
    model = inputs.untrained_model().eval()
    model.backbone.load_state_dict(loaded.base_model.state_dict())
    if model.head.is_new:
        model.head.weight.data.copy_(loaded.score.weight)
    model.load_state_dict(read_extra(exported), strict=False)
    return model


def logit(probability):
    return np.log(probability) - np.log1p(-probability)


def test_merged_export_predicts_as_the_run_does(trained, tmp_path, capsys):
    out = tmp_path / "merged"
    assert main(["export", str(trained["run"]), "--out", str(out)]) == 0
    loaded, report = auto_class(trained["head"]).from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    of_run = predictions(trained["run"])
    of_export = predictions(trained["run"], without_adapters(trained["run"], loaded, out))
    np.testing.assert_allclose(logit(of_run.probability), logit(of_export.probability), atol=1e-5)
    assert of_run.probability.std() > 1e-3

    assert main(["evaluate", str(trained["run"])]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["mean_prediction"] == pytest.approx(of_export.probability.mean(), abs=1e-5)


def test_adapter_loads_in_peft_and_merges_to_the_merged_export(trained, tmp_path):
    from peft import PeftModel

    arguments = ["export", str(trained["run"]), "--out"]
    assert main([*arguments, str(tmp_path / "merged")]) == 0
    assert main([*arguments, str(tmp_path / "adapter"), "--adapter-only"]) == 0
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "dti_config.json"} <= names
    assert {"tokenizer.json", "README.md"} <= names
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "adapters and [SUM]'s embedding for peft. The base model base" in card
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "base"
    assert "model.safetensors" not in names

    kind = auto_class(trained["head"])
    merged = kind.from_pretrained(tmp_path / "merged")
    labels = {} if trained["head"] == "yes_no" else {"num_labels": 1}
    base = kind.from_pretrained(trained["base"], **labels)
    base.resize_token_embeddings(VOCABULARY + 1)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    weights, expected = loaded.state_dict(), merged.state_dict()
    assert weights.keys() == expected.keys() == before.keys()
    for name, value in weights.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6)
    differing = {name for name in before if not torch.equal(before[name], expected[name])}
    assert len(differing) >= 2 * 7 + 1


def test_a_run_without_adapters_has_none_to_export(tmp_path, synthetic, capsys):
    RunFolder(tmp_path / "run").prepare(
        load_config(write_config(tmp_path / "config.yaml", synthetic))
    )
    arguments = ["export", str(tmp_path / "run"), "--out", str(tmp_path / "x"), "--adapter-only"]
    assert main(arguments) == 2
    assert "has no adapters" in capsys.readouterr().err


@pytest.mark.parametrize("trained", ["yes_no"], indirect=True)
def test_another_base_model_beneath_the_adapters_is_refused(trained, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(trained["run"], copy)
    settings = yaml.safe_load((copy / "config.yaml").read_text())
    settings["model"]["name"] = str(save_base_model(tmp_path / "other", tied=True, seed=1))
    settings["run_dir"] = str(copy)
    (copy / "config.yaml").write_text(yaml.safe_dump(settings))
    assert main(["evaluate", str(copy)]) == 2
    assert "gives others than the run began with" in capsys.readouterr().err
    assert main(["train", str(copy / "config.yaml")]) == 2


@pytest.mark.parametrize("trained", HEADS, indirect=True)
def test_a_run_begins_with_the_adapters_of_another(trained, synthetic, tmp_path, capsys):
    begin = f"model.init_from={trained['run']}"
    stay = ["training.max_steps=1", "training.learning_rate=1.0e-30", begin]
    config = lora_config(tmp_path, synthetic, trained["base"], trained["head"])
    train(config, *stay, "seed=3", ranks=2)
    assert torch.equal(
        torch.tensor(predictions(tmp_path / "run").probability),
        torch.tensor(predictions(trained["run"]).probability),
    )
    for changed, expected in [
        ("model.lora.rank=2", "model.lora.rank: 4 there, 2 now"),
        ("model.lora.alpha=4", "model.lora.alpha: 8 there, 4 now"),
        ("model.lora.rank=0", "With DIR as model.init_from all weights train on; with DIR as mod"),
    ]:
        assert main(["train", str(config), *stay, f"run_dir={tmp_path}/b", changed]) == 2
        assert expected in capsys.readouterr().err
    other = save_base_model(tmp_path / "base", tied=trained["head"] == "yes_no", seed=1)
    assert main(["train", str(config), *stay, f"run_dir={tmp_path}/b", f"model.name={other}"]) == 2
    assert "model.name now gives others than the run began with" in capsys.readouterr().err
    exported = tmp_path / "exported"
    assert main(["export", str(trained["run"]), "--out", str(exported)]) == 0
    into_export = [*stay[:2], f"model.init_from={exported}", f"run_dir={tmp_path}/b"]
    assert main(["train", str(config), *into_export]) == 2
    assert "expected a run with model.lora.rank 4, found an exported" in capsys.readouterr().err
    all_train = [*into_export, "model.lora.rank=0"]  # over the merged weights
    assert main(["train", str(config), *all_train]) == 0
    assert predictions(tmp_path / "b").probability == pytest.approx(
        predictions(trained["run"]).probability, abs=1e-5
    )
